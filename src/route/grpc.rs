//! gRPC methods: which unary calls are cached or mutate, and what their messages are about.
//!
//! HTTP cannot tell what kind of call a method is, and buffering a stream of requests would hang it; so caching is an
//! opt-in list of unary methods. A read's key is made of its path, tenant, encodings and message, or of what a closure
//! over the message yields (the bytes of equal messages may differ: protobuf has no canonical form).

use std::{
    collections::{BTreeMap, HashSet},
    fmt,
    sync::{Arc, Once},
};

use http::{HeaderMap, HeaderName, header, request};

use super::{
    Credentials, Identity, Known,
    check::{Cause, Check, Expected, Reader},
    identity::Credential,
    tenant::header_values,
};
use crate::{
    catalog::{Cascades, Catalogue, Entities, Policy},
    error::ConfigError,
    key::{KeyBuf, Tag, Tenant, bounded, push_ids, push_secret, push_type},
    observe::{Teller, Tellers},
};

/// What a message is about.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GrpcTarget {
    resource: String,
    scope: Vec<(String, String)>,
    tags: Vec<(String, String)>,
    variant: Vec<u8>,
}

impl GrpcTarget {
    /// The thing with this id: of the entity that the data type's routes name, where it has any.
    pub fn new(resource: impl Into<String>) -> Self {
        Self { resource: resource.into(), ..Self::default() }
    }

    /// An entity that it belongs to: part of its key, and a tag that cascades may drop.
    #[must_use]
    pub fn scope(mut self, entity: impl Into<String>, id: impl Into<String>) -> Self {
        self.scope.push((entity.into(), id.into()));
        self
    }

    /// An entity that it belongs to, which is no part of its key.
    #[must_use]
    pub fn tag(mut self, entity: impl Into<String>, id: impl Into<String>) -> Self {
        self.tags.push((entity.into(), id.into()));
        self
    }

    /// What else the response depends on: page, mask, language.
    #[must_use]
    pub fn variant(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.variant = bytes.into();
        self
    }
}

type Describe = dyn Fn(&[u8]) -> Option<GrpcTarget> + Send + Sync;

/// A unary method whose responses are cached, or that mutates.
#[derive(Clone)]
pub struct GrpcMethod {
    path: String,
    data_type: String,
    mutates: bool,
    credentials: Option<Credentials>,
    per_host: bool,
    include: Vec<String>,
    describe: Option<Arc<Describe>>,
    declares_tags: bool,
}

impl GrpcMethod {
    /// A unary method, as `/package.Service/Method`, whose responses are of this data type.
    pub fn read(path: impl Into<String>, data_type: impl Into<String>) -> Self {
        Self {
            path: path.into(),
            data_type: data_type.into(),
            mutates: false,
            credentials: None,
            per_host: false,
            include: vec![],
            describe: None,
            declares_tags: false,
        }
    }

    /// A unary method that changes the entity of this data type that its [message](Self::message) names. Without that,
    /// or when the message cannot be read, all entries of the type are dropped.
    pub fn mutation(path: impl Into<String>, data_type: impl Into<String>) -> Self {
        Self { mutates: true, ..Self::read(path, data_type) }
    }

    /// Says what a message is about, from its bytes (protobuf: `GetAgent::decode(bytes).ok()`). `None` leaves a read
    /// uncached.
    #[must_use]
    pub fn message(mut self, describe: impl Fn(&[u8]) -> Option<GrpcTarget> + Send + Sync + 'static) -> Self {
        self.describe = Some(Arc::new(describe));
        self
    }

    /// What to do with requests that carry credentials (in their metadata, as in HTTP); by default what the
    /// [builder](crate::CacheBuilder::credentials) says.
    #[must_use]
    pub fn credentials(mut self, credentials: Credentials) -> Self {
        self.credentials = Some(credentials);
        self
    }

    /// The response depends on the [host](crate::CacheBuilder::hosts) (`:authority`). By default it does not: clients that balance
    /// by themselves name the address of each server.
    #[must_use]
    pub fn per_host(mut self) -> Self {
        self.per_host = true;
        self
    }

    /// Follows this relation of the mutated type's cascade.
    #[must_use]
    pub fn include(mut self, relation: impl Into<String>) -> Self {
        self.include.push(relation.into());
        self
    }

    /// Says that the responses declare what they belong to ([`CacheTags`](crate::CacheTags)), so that a cascade may count
    /// on it: for lists, whose request names nothing.
    #[must_use]
    pub fn declares_tags(mut self) -> Self {
        self.declares_tags = true;
        self
    }

    /// As one whose entries writes have to find.
    pub(super) fn reader(&self) -> Option<Reader> {
        (!self.mutates).then(|| Reader::Method {
            what: format!("gRPC method {}", self.path),
            data_type: self.data_type.clone(),
            is_described: self.describe.is_some() || self.declares_tags,
        })
    }
}

impl fmt::Debug for GrpcMethod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GrpcMethod({}: {})", self.path, self.data_type)
    }
}

/// A compiled method.
pub(crate) struct GrpcRoute {
    pub(crate) data_type: Arc<str>,
    pub(crate) mutates: bool,
    credentials: Credential,
    per_host: bool,
    pub(crate) policy: Policy,
    pub(crate) teller: Teller,
    pub(crate) include: Arc<[Arc<str>]>,
    pub(crate) path: String,
    pub(crate) declares_tags: bool,
    describe: Option<Arc<Describe>>,
    warned: Once,
}

/// What a read looks for.
pub(crate) struct GrpcWanted {
    pub(crate) key: KeyBuf,
    /// The response may be stored only if it says that it is for everybody.
    pub(crate) needs_public: bool,
    pub(crate) tags: Vec<Tag>,
}

impl GrpcRoute {
    /// The methods by path.
    pub(super) fn compile(
        methods: &[GrpcMethod],
        catalogue: &Catalogue,
        cascades: &Cascades,
        (identity, tellers): (&Identity, &Tellers),
        check: &mut Check<'_>,
    ) -> Result<BTreeMap<String, Arc<Self>>, ConfigError> {
        let mut routes = BTreeMap::new();
        for method in methods {
            let what = format!("gRPC method {}", method.path);
            catalogue.check(&what, &method.data_type)?;
            if method.path.matches('/').count() != 2 || !method.path.starts_with('/') {
                return Err(ConfigError::new(format!("{what}: not a method; write it as /package.Service/Method")));
            }
            let data_type = method.data_type.as_str();
            for relation in &method.include {
                cascades.check_relation(&what, std::iter::once(data_type), relation)?;
            }
            let include: Arc<[Arc<str>]> = method.include.iter().map(|r| r.as_str().into()).collect();
            if method.mutates {
                // What no message is read of drops its type whole.
                let all = if method.describe.is_none() { vec![data_type] } else { vec![] };
                check.cause(&Cause { what: &what, types: vec![data_type], include: &include, all })?;
            }
            let route = Self {
                data_type: data_type.into(),
                mutates: method.mutates,
                credentials: Credential::new(&what, method.credentials.as_ref(), identity)?,
                per_host: method.per_host,
                policy: catalogue.policy(data_type),
                teller: tellers.of(data_type),
                include,
                path: method.path.clone(),
                declares_tags: method.declares_tags,
                describe: method.describe.clone(),
                warned: Once::new(),
            };
            if routes.insert(method.path.clone(), Arc::new(route)).is_some() {
                return Err(ConfigError::new(format!("{what} is declared twice; make it one")));
            }
        }
        Ok(routes)
    }

    /// Whether a request with these headers must not be answered from the cache.
    pub(crate) fn forbids(&self, headers: &HeaderMap, identity: &Identity) -> bool {
        headers.keys().any(|name| self.credentials.forbids(name, identity))
    }

    /// Whether a mutation's message says what it is about.
    pub(crate) fn is_described(&self) -> bool {
        self.describe.is_some()
    }

    /// The id of what a mutation's message names.
    pub(crate) fn resource(&self, message: Option<&[u8]>) -> Option<String> {
        self.describe.as_ref().zip(message).and_then(|(describe, message)| describe(message)).map(|t| t.resource)
    }

    /// What a read looks for, or why the cache leaves it alone. `framed` is the message as it was sent, `message` the same
    /// without its frame, unless it is compressed.
    pub(crate) fn wanted(
        &self,
        tenant: &Tenant,
        parts: &request::Parts,
        (framed, message): (&[u8], Option<&[u8]>),
        known: &Known<'_>,
        declared: (&Entities, &Expected),
    ) -> Result<GrpcWanted, &'static str> {
        let (headers, identity) = (&parts.headers, known.identity);
        let needs_public = headers.keys().any(|name| self.credentials.needs_public(name, identity));
        let mut key = KeyBuf::new();
        known.space.push_entry(&mut key, tenant.name());
        push_type(&mut key, &self.data_type);
        let target = match &self.describe {
            None => None,
            Some(describe) => Some(message.and_then(|message| describe(message)).ok_or("message")?),
        };
        let mut tags = match &target {
            None => {
                push_ids(&mut key, None, []);
                vec![]
            }
            Some(target) => self.push_target(&mut key, tenant.head(), target, declared)?,
        };
        tags.push(Tag::all(tenant.head(), &self.data_type));
        key.push(b'g');
        if self.per_host {
            known.hosts.push(&mut key, &parts.uri, headers)?;
        }
        self.credentials.push_user(&mut key, parts, identity)?;
        self.push_variant(&mut key, headers, target.as_ref().map_or(framed, |target| &target.variant));
        Ok(GrpcWanted { key: bounded(key), needs_public, tags })
    }

    /// Appends the ids of what a message is about, and gives their tags.
    fn push_target(
        &self,
        key: &mut KeyBuf,
        head: &[u8],
        target: &GrpcTarget,
        (entities, expected): (&Entities, &Expected),
    ) -> Result<Vec<Tag>, &'static str> {
        // No form in which a write would find it.
        let id = |(e, id): &(String, String)| Some((e.clone(), entities.id(e, id.as_bytes())?.into_owned()));
        let ids = |named: &[(String, String)]| named.iter().map(id).collect::<Option<Vec<_>>>().ok_or("id");
        let (mut scope, also) = (ids(&target.scope)?, ids(&target.tags)?);
        scope.sort_unstable();
        let entity = entities.of_type(&self.data_type);
        let resource = entities.id(entity, target.resource.as_bytes()).ok_or("id")?;
        push_ids(key, Some(&*resource), scope.iter().map(|(e, id)| (e.as_str(), &id[..])));
        let own = (entity.to_owned(), resource.to_vec());
        let named: Vec<_> = std::iter::once(own).chain(scope).chain(also).collect();
        let missing = expected.missing(&self.data_type, |entity| named.iter().any(|(e, _)| e == entity));
        if let Some(missing) = missing.filter(|_| !self.declares_tags) {
            let method = &self.path;
            self.warned.call_once(|| {
                tracing::warn!(%method, %missing, "not cached: its message does not say what writes drop it by");
            });
            return Err("tags");
        }
        let mut tags: Vec<_> =
            named.iter().map(|(entity, id)| Tag::entity(head, &self.data_type, entity, id)).collect();
        let mut seen = HashSet::new();
        tags.retain(|tag| seen.insert(tag.clone()));
        Ok(tags)
    }

    /// Appends the hash of what else a response depends on: its encodings, and the message or what it yields.
    fn push_variant(&self, key: &mut KeyBuf, headers: &HeaderMap, message: &[u8]) {
        let mut parts: Vec<&[u8]> = vec![self.path.as_bytes()];
        for name in [header::CONTENT_TYPE, HeaderName::from_static("grpc-encoding")] {
            parts.push(headers.get(name).map_or(b"", http::HeaderValue::as_bytes));
        }
        let name = HeaderName::from_static("grpc-accept-encoding");
        let accepted = header_values(headers, &name);
        let mut accepted: Vec<_> =
            accepted.flat_map(|line| line.split(|&b| b == b',')).map(<[u8]>::trim_ascii).collect();
        accepted.sort_unstable();
        accepted.dedup();
        let accepted = accepted.join(&b","[..]);
        parts.extend([&accepted, message]);
        let mut all = vec![];
        for part in parts {
            all.extend_from_slice(&(part.len() as u64).to_be_bytes());
            all.extend_from_slice(part);
        }
        key.push(b'!');
        push_secret(key, &all);
    }
}

impl fmt::Debug for GrpcRoute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GrpcRoute({}: {})", self.path, self.data_type)
    }
}
