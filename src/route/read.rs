//! Cacheable routes: a path pattern, its data type, and what else its responses depend on.

use std::{borrow::Cow, collections::BTreeMap};

use http::{HeaderMap, HeaderName, Method, header, request};
use serde::{Deserialize, Deserializer};
use sha2::{Digest, Sha256};
use smallvec::SmallVec;

use super::{
    BodyKey, Credentials, Hosts, Identity, Query, TenantSource,
    identity::{Credential, push_values},
    method::method,
    pattern::{Param, Pattern, pattern_error},
    place,
    tenant::header_values,
};
use crate::{
    catalog::{Catalogue, Entities, Policy},
    error::ConfigError,
    key::{Key, KeyBuf, Space, Tags, Tenant, bounded, buffer, key_and_tags, push_escaped, push_ids, push_type},
    observe::{Teller, Tellers},
};

/// A route whose `GET` responses are cached (and answer `HEAD` too).
///
/// ```
/// # use tower_cache_aside::{Query, Route};
/// let route = Route::new("/agents/{agent_id}/runs/{run_id}", "run").query(Query::only(["verbose"]));
/// ```
///
/// The last path parameter is the resource, the others are its scope. A parameter `agent_id` names the entity
/// `agent`: the entry is tagged `agent=42`, and a cascade that drops this data type for agent 42 finds it.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Route {
    pub(crate) path: String,
    #[serde(rename = "type")]
    pub(crate) data_type: String,
    #[serde(default)]
    pub(crate) resource: Option<String>,
    #[serde(default)]
    pub(crate) entities: BTreeMap<String, String>,
    #[serde(default)]
    query: Query,
    #[serde(default)]
    vary: Vec<String>,
    #[serde(default)]
    credentials: Option<Credentials>,
    #[serde(default)]
    pub(crate) declares_tags: bool,
    #[serde(default, deserialize_with = "optional_method")]
    method: Option<Method>,
    #[serde(default)]
    body: Option<BodyKey>,
}

fn optional_method<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Method>, D::Error> {
    method(deserializer).map(Some)
}

impl Route {
    /// A cacheable route with axum's path syntax: `/agents/{agent_id}`.
    pub fn new(path: impl Into<String>, data_type: impl Into<String>) -> Self {
        Self {
            path: path.into(),
            data_type: data_type.into(),
            resource: None,
            entities: BTreeMap::new(),
            query: Query::All,
            vary: vec![],
            credentials: None,
            declares_tags: false,
            method: None,
            body: None,
        }
    }

    /// The method by which it is read: `GET` (the default), `QUERY`, or `POST` where that only reads (a search, an embedding).
    /// Of the latter two the request's body is a part of the key, up to the
    /// [limit](crate::CacheBuilder::body_limit); the layer needs to know how to make one
    /// ([`request_bodies`](crate::CacheAsideLayer::request_bodies)).
    #[must_use]
    pub fn method(mut self, method: Method) -> Self {
        self.method = Some(method);
        self
    }

    /// How bodies of requests are compared; by default by their bytes.
    #[must_use]
    pub fn body(mut self, body: BodyKey) -> Self {
        self.body = Some(body);
        self
    }

    /// Which path parameter is the id of the thing itself; by default the last.
    #[must_use]
    pub fn resource(mut self, param: impl Into<String>) -> Self {
        self.resource = Some(param.into());
        self
    }

    /// Which entity a path parameter names; by default the parameter without `_id`.
    #[must_use]
    pub fn entity(mut self, param: impl Into<String>, entity: impl Into<String>) -> Self {
        self.entities.insert(param.into(), entity.into());
        self
    }

    /// Which query parameters the response depends on; by default all.
    #[must_use]
    pub fn query(mut self, query: Query) -> Self {
        self.query = query;
        self
    }

    /// A request header that the response depends on.
    #[must_use]
    pub fn vary(mut self, header: impl Into<String>) -> Self {
        self.vary.push(header.into());
        self
    }

    /// What to do with requests that carry credentials; by default what the [builder](crate::CacheBuilder::credentials) says.
    #[must_use]
    pub fn credentials(mut self, credentials: Credentials) -> Self {
        self.credentials = Some(credentials);
        self
    }

    /// Says that the responses declare what else they belong to ([`CacheTags`](crate::CacheTags)), so that a cascade
    /// may count on it.
    #[must_use]
    pub fn declares_tags(mut self) -> Self {
        self.declares_tags = true;
        self
    }
}

/// A compiled [`Route`].
#[derive(Debug)]
pub(crate) struct ReadRoute {
    path: String,
    data_type: String,
    /// The data type as a part of the key.
    type_part: KeyBuf,
    pub(crate) policy: Policy,
    pub(crate) teller: Teller,
    pattern: Pattern,
    /// Position of the resource among the parameters.
    resource: Option<usize>,
    /// Whether the resource is what the type's other routes call so, too.
    has_own_id: bool,
    /// Positions of the scope's parameters, sorted by entity.
    scope: Vec<usize>,
    /// What tells this route from others of its type: eight digits of its path's hash.
    id: Vec<u8>,
    query: Query,
    pub(crate) vary: Vec<HeaderName>,
    credentials: Credential,
    pub(crate) declares_tags: bool,
    method: Method,
    /// How the bodies of its requests are compared, if they have any.
    pub(crate) body: Option<BodyKey>,
}

/// Where in the mapping a request stands.
pub(crate) struct At<'k, 'p> {
    pub(crate) params: &'p matchit::Params<'k, 'p>,
    /// The prefix that the route says nothing of.
    pub(crate) mount: &'p str,
}

/// What a service says of all its requests.
#[derive(Clone, Copy)]
pub(crate) struct Known<'a> {
    pub(crate) tenants: &'a TenantSource,
    pub(crate) space: &'a Space,
    pub(crate) identity: &'a Identity,
    pub(crate) hosts: &'a Hosts,
}

/// What a cacheable request looks for.
pub(crate) struct Wanted<'r> {
    pub(crate) key: KeyBuf,
    pub(crate) tenant: Cow<'r, [u8]>,
    /// It has conditions, a range or directives.
    pub(crate) is_conditional: bool,
    /// The response may be stored only if it says that it is for everybody.
    pub(crate) needs_public: bool,
}

/// The key of the variant that a request asks for, where responses depend on these headers (RFC 9111, section 4.1): lines
/// of one name are one list, and the spaces in it don't count.
pub(crate) fn variant_key(primary: &[u8], names: &[HeaderName], headers: &HeaderMap) -> KeyBuf {
    let mut key = primary.to_vec();
    key.extend_from_slice(b";;;");
    for name in names {
        key.push(b';');
        push_escaped(&mut key, name.as_str().as_bytes());
        let mut values = header_values(headers, name).peekable();
        if values.peek().is_some() {
            let lines: Vec<_> = values.collect();
            let mut line = lines.join(&b","[..]);
            // Of these, case does not count (RFC 9110, section 12.5).
            if [header::ACCEPT_LANGUAGE, header::ACCEPT_ENCODING, header::ACCEPT_CHARSET].contains(name) {
                line.make_ascii_lowercase();
            }
            let members: Vec<_> = line.split(|&b| b == b',').map(<[u8]>::trim_ascii).collect();
            push_values(&mut key, name, std::iter::once(&*members.join(&b","[..])));
        }
    }
    bounded(key)
}

impl ReadRoute {
    pub(crate) fn new(
        route: &Route,
        catalogue: &Catalogue,
        entities: &Entities,
        (identity, tellers): (&Identity, &Tellers),
        home: Option<&Param>,
    ) -> Result<Self, ConfigError> {
        let method = route.method.clone().unwrap_or_default();
        let what = &format!("route {method} {}", route.path);
        let body = body_key(what, &method, route.body)?;
        catalogue.check(what, &route.data_type)?;
        let pattern = Pattern::new(&route.path, &route.entities, entities).map_err(|e| pattern_error(what, &e))?;
        let params = pattern.params();
        let resource = match &route.resource {
            None => params.len().checked_sub(1),
            Some(param) => Some(pattern.position(param).ok_or_else(|| {
                ConfigError::new(format!("{what}: resource `{param}` is no parameter of the path; name one that is"))
            })?),
        };
        let mut scope: Vec<_> = (0..params.len()).filter(|i| Some(*i) != resource).collect();
        scope.sort_by(|a, b| params[*a].entity.cmp(&params[*b].entity));
        let is_twice = |(i, param): &(usize, &Param)| params[..*i].iter().any(|other| other.entity == param.entity);
        if let Some((_, twice)) = params.iter().enumerate().find(is_twice) {
            return Err(ConfigError::new(format!(
                "{what}: two parameters name the entity `{}`; tell them apart with `entities`",
                twice.entity
            )));
        }
        let header = |name: &String| {
            HeaderName::try_from(name.as_str())
                .map_err(|_| ConfigError::new(format!("{what}: `{name}` is not a header name; mend or remove it")))
        };
        let mut vary = route.vary.iter().map(header).collect::<Result<Vec<_>, _>>()?;
        vary.sort_by(|a, b| a.as_str().cmp(b.as_str()));
        vary.dedup();
        let credentials = Credential::new(what, route.credentials.as_ref(), identity)?;
        let has_own_id = resource.zip(home).is_some_and(|(at, home)| params[at].is_like(home));
        let name = if body.is_some() { format!("{method} {}", route.path) } else { route.path.clone() };
        let digest = Sha256::digest(name.as_bytes());
        let mut type_part = KeyBuf::new();
        push_type(&mut type_part, &route.data_type);
        Ok(Self {
            path: route.path.clone(),
            data_type: route.data_type.clone(),
            type_part,
            policy: catalogue.policy(&route.data_type),
            teller: tellers.of(&route.data_type),
            pattern,
            resource,
            has_own_id,
            scope,
            id: digest[..4].iter().flat_map(|b| format!("{b:02x}").into_bytes()).collect(),
            query: route.query.clone(),
            vary,
            credentials,
            declares_tags: route.declares_tags,
            method,
            body,
        })
    }

    /// What errors and descriptions call it.
    pub(crate) fn what(&self) -> String {
        format!("{} {}", self.method, self.path)
    }

    #[cfg(feature = "testing")]
    pub(crate) fn method(&self) -> &Method {
        &self.method
    }

    #[cfg(feature = "testing")]
    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    #[cfg(feature = "testing")]
    pub(crate) fn query(&self) -> &Query {
        &self.query
    }

    /// Whether it is read by this method.
    pub(super) fn is_for(&self, method: &Method) -> bool {
        self.method == *method || self.method == Method::GET && *method == Method::HEAD
    }

    pub(crate) fn params(&self) -> &[Param] {
        self.pattern.params()
    }

    pub(crate) fn resource_param(&self) -> Option<&Param> {
        self.resource.and_then(|at| self.pattern.params().get(at))
    }

    pub(crate) fn data_type(&self) -> &str {
        &self.data_type
    }

    /// Whether its responses are each user's own.
    #[cfg(feature = "stats")]
    pub(crate) fn is_of_users(&self) -> bool {
        matches!(self.credentials, Credential::PerUser(_) | Credential::User)
    }

    /// As much of a query as is a part of the key.
    #[cfg(feature = "warm")]
    pub(crate) fn counted_query(&self, query: &str) -> String {
        self.query.counted(query)
    }

    pub(crate) fn id(&self) -> &[u8] {
        &self.id
    }

    /// The id of what a path names, in its canonical form, where it is the type's own id (and no slug).
    pub(crate) fn own_id(&self, params: &matchit::Params<'_, '_>) -> Option<Vec<u8>> {
        self.resource_param().filter(|_| self.has_own_id)?.value(params).map(Cow::into_owned)
    }

    /// What a request looks for, or the reason why the cache must not answer it.
    pub(crate) fn wanted<'r>(
        &self,
        parts: &'r request::Parts,
        at: &At<'_, '_>,
        known: &Known<'r>,
    ) -> Result<Wanted<'r>, &'static str> {
        let Known { tenants, space, identity, hosts } = *known;
        let tenant = tenants.tenant(parts)?;
        let headers = &parts.headers;
        let (mut is_conditional, mut needs_public) = (false, false);
        // One pass over a handful of names is cheaper than asking for each of these.
        for name in headers.keys() {
            if self.credentials.forbids(name, identity) {
                return Err("credentials");
            }
            needs_public |= self.credentials.needs_public(name, identity);
            match *name {
                header::IF_NONE_MATCH | header::IF_MODIFIED_SINCE | header::RANGE if self.method == Method::POST => {
                    return Err("precondition");
                }
                header::IF_NONE_MATCH | header::IF_MODIFIED_SINCE | header::RANGE | header::CACHE_CONTROL => {
                    is_conditional = true;
                }
                header::IF_MATCH | header::IF_UNMODIFIED_SINCE | header::IF_RANGE => return Err("precondition"),
                header::UPGRADE => return Err("upgrade"),
                _ => {}
            }
        }
        let names = self.pattern.params();
        // Else there is no form in which a write would find it.
        let part = |param: &Param| param.part(at.params).filter(|part| !part.is_empty());
        let values = names.iter().map(part).collect::<Option<SmallVec<[_; 4]>>>().ok_or("id")?;
        let scope = self.scope.iter().map(|&i| (&*names[i].entity, &*values[i]));
        let mut key = buffer();
        space.push_entry(&mut key, &tenant);
        key.extend_from_slice(&self.type_part);
        push_ids(&mut key, self.resource.map(|i| &*values[i]), scope);
        key.push(b'h');
        key.extend_from_slice(&self.id);
        if !at.mount.is_empty() {
            key.push(b'@');
            push_escaped(&mut key, at.mount.as_bytes());
        }
        hosts.push(&mut key, &parts.uri, headers)?;
        if let Some(query) = parts.uri.query() {
            self.query.push(&mut key, query);
        }
        self.credentials.push_user(&mut key, parts, identity)?;
        for name in &self.vary {
            key.push(b';');
            push_escaped(&mut key, name.as_str().as_bytes());
            push_values(&mut key, name, header_values(headers, name));
        }
        Ok(Wanted { key: bounded(key), tenant, is_conditional, needs_public })
    }

    /// The tags of the entry: each entity of the path, and the type as a whole.
    pub(crate) fn tags(&self, head: &[u8], params: &matchit::Params<'_, '_>) -> Tags {
        self.key_and_tags(head.to_vec(), b"", params).1
    }

    /// The same behind a key that has been built.
    pub(crate) fn key_and_tags(
        &self,
        key: KeyBuf,
        name: &[u8],
        params: &matchit::Params<'_, '_>,
    ) -> (Key, Tags, Tenant) {
        let names = self.pattern.params().iter();
        let entities = names.filter_map(|param| Some((&*param.entity, param.value(params)?)));
        key_and_tags(key, name, &self.type_part, entities)
    }
}

impl place::Pattern for ReadRoute {
    fn pattern(&self) -> &str {
        &self.path
    }
}

/// How the bodies of a route's requests are compared, if they have any.
fn body_key(what: &str, method: &Method, said: Option<BodyKey>) -> Result<Option<BodyKey>, ConfigError> {
    match *method {
        Method::GET if said.is_some() => Err(ConfigError::new(format!(
            "{what}: a GET has no body that means anything; take `body` out, or say by which method it is read"
        ))),
        Method::GET => Ok(None),
        Method::POST | Method::QUERY => Ok(Some(said.unwrap_or_default())),
        _ => Err(ConfigError::new(format!(
            "{what}: things are read by GET (and HEAD), QUERY, or POST where it only reads; use one of these"
        ))),
    }
}
