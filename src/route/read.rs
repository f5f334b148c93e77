//! Cacheable routes: a path pattern, its data type, and what else its responses depend on.

use std::{borrow::Cow, collections::BTreeMap};

use http::{HeaderMap, HeaderName, header, request};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use smallvec::SmallVec;

use super::{
    Query, TenantSource,
    pattern::{Param, Pattern, pattern_error},
    tenant::header_values,
};
use crate::{
    catalog::{Catalogue, Entities, Policy},
    error::ConfigError,
    key::{KeyBuf, Space, Tag, push_escaped, push_ids, push_type},
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
    credentials: Credentials,
    #[serde(default)]
    pub(crate) declares_tags: bool,
}

/// What the cache does with requests that carry `Authorization` or `Cookie`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Credentials {
    /// They are not cached (the default).
    #[default]
    Bypass,
    /// They are ignored: within a tenant everybody who gets through the outer layers may see the same response. Put
    /// authorization *outside* the cache: a hit never reaches what is inside.
    Shared,
    /// The named request header identifies the user, and is part of the key. Without it the request is not cached.
    PerUser(String),
    /// What the origin declares: the response to a request with `Authorization` is stored, and then serves everybody in
    /// the tenant, if its `Cache-Control` says `public`, `s-maxage` or `must-revalidate` (RFC 9111, section 3.5). Cookies
    /// are ignored.
    Declared,
}

impl Credentials {
    /// The named request header identifies the user, and is part of the key.
    pub fn per_user(header: impl Into<String>) -> Self {
        Self::PerUser(header.into())
    }
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
            credentials: Credentials::Bypass,
            declares_tags: false,
        }
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

    /// What to do with requests that carry credentials; by default they bypass the cache.
    #[must_use]
    pub fn credentials(mut self, credentials: Credentials) -> Self {
        self.credentials = credentials;
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
}

#[derive(Debug)]
enum Credential {
    Bypass,
    Shared,
    PerUser(HeaderName),
    Declared,
}

/// What a cacheable request looks for.
pub(crate) struct Wanted {
    pub(crate) key: KeyBuf,
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
            key.push(b'=');
            push_escaped(&mut key, &members.join(&b","[..]));
        }
    }
    key
}

impl ReadRoute {
    pub(crate) fn new(
        route: &Route,
        catalogue: &Catalogue,
        entities: &Entities,
        home: Option<&Param>,
    ) -> Result<Self, ConfigError> {
        let what = &format!("route GET {}", route.path);
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
        let credentials = match &route.credentials {
            Credentials::Bypass => Credential::Bypass,
            Credentials::Shared => Credential::Shared,
            Credentials::PerUser(name) => Credential::PerUser(header(name)?),
            Credentials::Declared => Credential::Declared,
        };
        let has_own_id = resource.zip(home).is_some_and(|(at, home)| params[at].is_like(home));
        let digest = Sha256::digest(route.path.as_bytes());
        let mut type_part = KeyBuf::new();
        push_type(&mut type_part, &route.data_type);
        Ok(Self {
            path: route.path.clone(),
            data_type: route.data_type.clone(),
            type_part,
            policy: catalogue.policy(&route.data_type),
            pattern,
            resource,
            has_own_id,
            scope,
            id: digest[..4].iter().flat_map(|b| format!("{b:02x}").into_bytes()).collect(),
            query: route.query.clone(),
            vary,
            credentials,
            declares_tags: route.declares_tags,
        })
    }

    /// What errors and descriptions call it.
    pub(crate) fn what(&self) -> String {
        format!("GET {}", self.path)
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

    pub(crate) fn id(&self) -> &[u8] {
        &self.id
    }

    /// The id of what a path names, in its canonical form, where it is the type's own id (and no slug).
    pub(crate) fn own_id(&self, params: &matchit::Params<'_, '_>) -> Option<Vec<u8>> {
        self.resource_param().filter(|_| self.has_own_id)?.value(params).map(Cow::into_owned)
    }

    /// What a request looks for, or the reason why the cache must not answer it.
    pub(crate) fn wanted(
        &self,
        parts: &request::Parts,
        params: &matchit::Params<'_, '_>,
        tenants: &TenantSource,
        space: &Space,
    ) -> Result<Wanted, &'static str> {
        let tenant = tenants.tenant(parts)?;
        let headers = &parts.headers;
        let mut user = None;
        if let Credential::PerUser(name) = &self.credentials {
            let mut values = header_values(headers, name);
            match (values.next(), values.next()) {
                (Some(id), None) if !id.is_empty() => user = Some(id),
                _ => return Err("no-user"),
            }
        }
        let (mut is_conditional, mut needs_public) = (false, false);
        // One pass over a handful of names is cheaper than asking for each of these.
        for name in headers.keys() {
            match *name {
                header::AUTHORIZATION | header::COOKIE if matches!(self.credentials, Credential::Bypass) => {
                    return Err("credentials");
                }
                header::AUTHORIZATION => needs_public = matches!(self.credentials, Credential::Declared),
                header::IF_NONE_MATCH | header::IF_MODIFIED_SINCE | header::RANGE | header::CACHE_CONTROL => {
                    is_conditional = true;
                }
                header::IF_MATCH | header::IF_UNMODIFIED_SINCE | header::IF_RANGE => return Err("precondition"),
                header::UPGRADE => return Err("upgrade"),
                _ => {}
            }
        }
        let mut key = KeyBuf::with_capacity(192);
        let names = self.pattern.params();
        // No form in which a write would find it.
        let values = names.iter().map(|param| param.value(params)).collect::<Option<SmallVec<[_; 4]>>>().ok_or("id")?;
        let scope = self.scope.iter().map(|&i| (&*names[i].entity, &*values[i]));
        space.push_entry(&mut key, &tenant);
        key.extend_from_slice(&self.type_part);
        push_ids(&mut key, self.resource.map(|i| &*values[i]), scope);
        key.push(b'h');
        key.extend_from_slice(&self.id);
        if let Some(query) = parts.uri.query() {
            self.query.push(&mut key, query);
        }
        if let Some(user) = user {
            key.extend_from_slice(b";;");
            push_escaped(&mut key, user);
        }
        for name in &self.vary {
            key.push(b';');
            push_escaped(&mut key, name.as_str().as_bytes());
            for value in header_values(headers, name) {
                key.push(b'=');
                push_escaped(&mut key, value);
            }
        }
        Ok(Wanted { key, is_conditional, needs_public })
    }

    /// The tags of the entry: each entity of the path, and the type as a whole.
    pub(crate) fn tags(&self, head: &[u8], params: &matchit::Params<'_, '_>) -> Vec<Tag> {
        let entity = |param: &Param| Some(Tag::entity(head, &self.data_type, &param.entity, &param.value(params)?));
        let mut tags: Vec<_> = self.pattern.params().iter().filter_map(entity).collect();
        tags.push(Tag::all(head, &self.data_type));
        tags
    }
}
