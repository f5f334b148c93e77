//! From what is declared to a [`Cache`]: everything is checked here, before the first request.

use std::{fmt, sync::Arc, time::Duration};

use http::{HeaderName, request};

use super::Cache;
use crate::{
    catalog::{
        Canonical, Cascade, Cascades, Catalogue, DataType, Entities, FenceTimes, PATIENCE, Resolver, ResolverError,
        Resolvers, Tier,
    },
    clock::{Clock, TimeSource},
    config::{Config, OnUnreachable},
    engine::{Engine, Invalidated},
    error::ConfigError,
    events::{EventPolicy, Sources},
    key::{Space, Tag},
    layer::{Core, OnInvalidated, Options, Warnings},
    observe::{Observer, Tellers},
    route::{
        Credentials, Hosts, Identity, Mutation, OnUnmapped, Route, Routes, Table, TenantSource, UserFrom, entities,
    },
    store::{MemoryStore, Store},
};

/// 64 MiB.
const MEMORY: u64 = 64 << 20;

/// 2 MiB.
const BODY_LIMIT: u64 = 2 << 20;

/// Configures a [`Cache`].
#[must_use]
pub struct CacheBuilder {
    service: String,
    config: Config,
    tenant: Option<TenantSource>,
    user: Option<UserFrom>,
    resolvers: Resolvers,
    patience: Duration,
    store: Option<Arc<dyn Store>>,
    tag_header: String,
    targeted_header: String,
    entity_tags: bool,
    request_directives: bool,
    show_keys: bool,
    #[cfg(feature = "stats")]
    audit_values: bool,
    cache_status: Option<String>,
    forwards: Option<String>,
    #[cfg(feature = "stats")]
    alerts: crate::AlertRules,
    #[cfg(feature = "stats")]
    metrics_tenants: usize,
    on_invalidated: Option<OnInvalidated>,
    #[cfg(feature = "grpc")]
    grpc: Vec<crate::GrpcMethod>,
    clock: Clock,
}

impl CacheBuilder {
    pub(super) fn new(service: String) -> Self {
        Self {
            service,
            config: Config::default(),
            tenant: None,
            user: None,
            resolvers: Resolvers::new(),
            patience: PATIENCE,
            store: None,
            tag_header: "cache-tag".to_owned(),
            targeted_header: "tower-cache-control".to_owned(),
            entity_tags: true,
            request_directives: false,
            show_keys: false,
            #[cfg(feature = "stats")]
            audit_values: false,
            cache_status: Some("tower-cache-aside".to_owned()),
            forwards: None,
            #[cfg(feature = "stats")]
            alerts: crate::AlertRules::default(),
            #[cfg(feature = "stats")]
            metrics_tenants: 0,
            on_invalidated: None,
            #[cfg(feature = "grpc")]
            grpc: vec![],
            clock: Clock::default(),
        }
    }

    /// Adds everything that a [`Config`] declares. Of what can be said only once, the last word counts.
    pub fn config(mut self, config: Config) -> Self {
        self.config.add(config);
        self
    }

    /// The tenant is the value of this request header. Requests without it, or with several, are not cached.
    pub fn tenant_header(mut self, name: impl Into<String>) -> Self {
        self.config.tenant_header = Some(name.into());
        self
    }

    /// The tenant is what this closure finds in the request; `None` or empty bypasses the cache.
    pub fn tenant_from<F>(mut self, extract: F) -> Self
    where
        F: Fn(&request::Parts) -> Option<String> + Send + Sync + 'static,
    {
        self.tenant = Some(TenantSource::Extractor(Arc::new(extract)));
        self
    }

    /// How far the host of a request tells its response from those for other hosts; by default each has its own.
    pub fn hosts(mut self, hosts: Hosts) -> Self {
        self.config.hosts = Some(hosts);
        self
    }

    /// Whether anything is answered from the cache; by default yes. Off, every read goes to the inner service
    /// (`detail=disabled`) and nothing is stored, while types, routes and checks stay, and writes drop what other processes
    /// may have.
    pub fn enabled(mut self, on: bool) -> Self {
        self.config.enabled = Some(on);
        self
    }

    /// What becomes of requests with credentials where a route or method says nothing else; by default they bypass the cache.
    pub fn credentials(mut self, credentials: Credentials) -> Self {
        self.config.credentials = Some(credentials);
        self
    }

    /// Headers by which this service knows who asks, besides `authorization`, `cookie`, `proxy-authorization`, `x-api-key`,
    /// `x-auth-token`, `x-forwarded-user`, `x-forwarded-client-cert` and others of their kind. Requests that have any bypass the
    /// cache where a route says nothing else ([`Credentials`](crate::Credentials)). The one that names the tenant is none of them.
    pub fn credential_headers<T: Into<String>>(mut self, names: impl IntoIterator<Item = T>) -> Self {
        self.config.credential_headers.extend(names.into_iter().map(Into::into));
        self
    }

    /// The user is what this closure finds in the request (a session that an outer layer has put into its extensions, the
    /// subject of a client certificate), for routes whose responses are [each user's own](crate::Credentials::User).
    pub fn user_from<F>(mut self, extract: F) -> Self
    where
        F: Fn(&request::Parts) -> Option<String> + Send + Sync + 'static,
    {
        self.user = Some(Arc::new(extract));
        self
    }

    /// The service has no tenants: everything is stored under this name, by requests and by hand.
    pub fn single_tenant(mut self, name: impl Into<Arc<str>>) -> Self {
        self.tenant = Some(TenantSource::Single(name.into()));
        self
    }

    /// The version of what entries hold, for a fleet whose old and new processes share a store: each reads only entries of
    /// its own, while a write through either drops both. Change it with the shape of a response or a value, and once a
    /// changed cascade is deployed everywhere; by default there is none.
    pub fn version(mut self, version: impl Into<String>) -> Self {
        self.config.version = Some(version.into());
        self
    }

    /// Declares a data type.
    pub fn data_type(mut self, data_type: DataType) -> Self {
        self.config.types.push(data_type);
        self
    }

    /// How a tier in this process may hold entries of a shared store, for types that say nothing else.
    pub fn tier(mut self, tier: Tier) -> Self {
        self.config.tier = Some(tier);
        self
    }

    /// Fences every write whose cascade says nothing else, with this lease; see [`Cascade::fenced`].
    pub fn fenced(mut self, lease: Duration) -> Self {
        self.config.fence = Some(lease);
        self
    }

    /// What becomes of writes while the store cannot be told about them; by default they go on.
    pub fn on_unreachable(mut self, what: OnUnreachable) -> Self {
        self.config.on_unreachable = Some(what);
        self
    }

    /// Declares a cacheable route.
    pub fn route(mut self, route: Route) -> Self {
        self.config.routes.push(route);
        self
    }

    /// A path that routes match and that is not cached: `/users/me` beside a route `/users/{user_id}`. (Within a router of
    /// axum, the feature `axum` knows that these are two routes.)
    pub fn uncached(mut self, path: impl Into<String>) -> Self {
        self.config.uncached.push(path.into());
        self
    }

    /// Declares a unary gRPC method whose responses are cached, or that mutates. (Feature `grpc`.)
    #[cfg(feature = "grpc")]
    pub fn grpc(mut self, method: crate::GrpcMethod) -> Self {
        self.grpc.push(method);
        self
    }

    /// Declares a mutating route.
    pub fn mutation(mut self, mutation: Mutation) -> Self {
        self.config.mutations.push(mutation);
        self
    }

    /// Declares what events from outside make stale, for [`Cache::apply`](crate::Cache::apply).
    pub fn event(mut self, policy: EventPolicy) -> Self {
        self.config.events.push(policy);
        self
    }

    /// Declares what a mutation of a data type drops.
    pub fn cascade(mut self, cascade: Cascade) -> Self {
        self.config.cascades.push(cascade);
        self
    }

    /// How the ids of an entity are spelled, so that a write by one spelling finds what was read by another. Needed for
    /// every entity whose ids handlers parse (`Path<u64>`, `Path<Uuid>`) or a database compares without case.
    pub fn entity(mut self, name: impl Into<String>, ids: Canonical) -> Self {
        self.config.entities.insert(name.into(), ids);
        self
    }

    /// Finds the children of a relation: (tenant, ids of parents) → ids of all their children, usually from the database.
    ///
    /// It is asked before the mutating handler runs *and* after it succeeded, once for all parents of a level. Should it
    /// fail, panic, take too long, or find more than 1,000, all children of the tenant are dropped.
    pub fn resolver<F, Fut, E>(mut self, relation: impl Into<String>, resolve: F) -> Self
    where
        F: Fn(String, Vec<String>) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Vec<String>, E>> + Send + 'static,
        E: Into<ResolverError>,
    {
        self.resolvers.insert(relation.into(), Resolver::new(resolve));
        self
    }

    /// How long the resolvers of one write may take together, before and again after it; by default 5 s.
    pub fn resolver_timeout(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// The store; by default a [`MemoryStore`] of [`memory`](Self::memory) bytes.
    pub fn store(mut self, store: impl Store) -> Self {
        self.store = Some(Arc::new(store));
        self
    }

    /// How many bytes the in-process store may take; by default 64 MiB.
    pub fn memory(mut self, bytes: u64) -> Self {
        self.config.memory = Some(bytes);
        self
    }

    /// Responses with a larger body are passed through and not stored; by default 2 MiB.
    pub fn body_limit(mut self, bytes: usize) -> Self {
        self.config.body_limit = Some(bytes as u64);
        self
    }

    /// The response header by which handlers declare tags ([`CacheTags`](crate::CacheTags)); by default `cache-tag`. It
    /// is taken out before the client sees the response.
    pub fn tag_header(mut self, name: impl Into<String>) -> Self {
        self.tag_header = name.into();
        self
    }

    /// Adds the report of what was dropped to responses of mutations, as the header `cache-invalidated`.
    pub fn report_header(mut self, on: bool) -> Self {
        self.config.report_header = Some(on);
        self
    }

    /// Gives responses without an `ETag` a weak one, so that clients can ask whether what they have is still good; by
    /// default on.
    pub fn entity_tags(mut self, on: bool) -> Self {
        self.entity_tags = on;
        self
    }

    /// Honours `Cache-Control` in requests: `no-cache`, `no-store`, `max-age`, `min-fresh`, `max-stale` and
    /// `only-if-cached` (RFC 9111, section 5.2.1). By default off, because it lets any client defeat the cache.
    pub fn request_directives(mut self, on: bool) -> Self {
        self.request_directives = on;
        self
    }

    /// The response header whose directives are for this cache alone, and count instead of `Cache-Control` and `Expires`
    /// (RFC 9213); by default `tower-cache-control`.
    pub fn targeted_header(mut self, name: impl Into<String>) -> Self {
        self.targeted_header = name.into();
        self
    }

    /// Says the key in `Cache-Status`, for debugging: it holds the tenant and whatever the request is stored by. By
    /// default off.
    pub fn show_keys(mut self, on: bool) -> Self {
        self.show_keys = on;
        self
    }

    /// What this cache is called in `Cache-Status` (RFC 9211, section 2), such as the name of the service or of the host;
    /// by default `tower-cache-aside`. With `None` the header is not said: layers outside still find the
    /// [`Outcome`](crate::Outcome).
    pub fn cache_status<'n>(mut self, name: impl Into<Option<&'n str>>) -> Self {
        self.cache_status = name.into().map(str::to_owned);
        self
    }

    /// Also says the tags of stored responses in this header, `cache-tag` or `surrogate-key` (separated by spaces), for
    /// a CDN that is to be purged by them ([`on_invalidated`](Self::on_invalidated)): those of whole types first, and as many
    /// as have room in 16 KiB. They hold the names of service and tenant, and ids. By default they stay inside.
    pub fn forward_tags(mut self, header: impl Into<String>) -> Self {
        self.forwards = Some(header.into());
        self
    }

    /// Calls this after each invalidation, before its write is answered, with its report and the tags that were dropped, so
    /// that caches outside can be purged by the same cascade. It must be quick (hand the tags to a task of your own); if it
    /// panics, that is logged. ([`Cache::clear`](crate::Cache::clear) has no tags, and does not call it.)
    pub fn on_invalidated(mut self, hook: impl Fn(&Invalidated, &[Tag]) + Send + Sync + 'static) -> Self {
        self.on_invalidated = Some(Arc::new(hook));
        self
    }

    /// Compares this share of hits (0.001 is one in a thousand) with what the inner service says, behind their readers, and finds
    /// what a write has left stale: the mutation that nobody has declared. By default none; a type may say its own
    /// ([`DataType::audit`](crate::DataType::audit)). (Feature `stats`.)
    #[cfg(feature = "stats")]
    pub fn audit(mut self, share: f64) -> Self {
        self.config.audit = Some(share);
        self
    }

    /// Shows what differs in an audit's findings, as JSON of up to 256 characters a field, to who may use the admin's API: by default
    /// only the fields are named, for what is in them may be anybody's. It is never logged. (Feature `stats`.)
    #[cfg(feature = "stats")]
    pub fn audit_values(mut self, on: bool) -> Self {
        self.audit_values = on;
        self
    }

    /// When to raise an alert ([`Cache::stats`](crate::Cache::stats)). (Feature `stats`.)
    #[cfg(feature = "stats")]
    pub fn alerts(mut self, rules: crate::AlertRules) -> Self {
        self.alerts = rules;
        self
    }

    /// How many tenants have a label of their own in metrics, up to 64: those that come first; the others are `other`. By default
    /// none, and metrics know of no tenants. (Feature `metrics`.)
    #[cfg(feature = "metrics")]
    pub fn metrics_tenants(mut self, most: usize) -> Self {
        self.metrics_tenants = most;
        self
    }

    /// What becomes of a successful write that nothing is said of; by default a warning names its route, once.
    pub fn on_unmapped(mut self, what: OnUnmapped) -> Self {
        self.config.on_unmapped = Some(what);
        self
    }

    /// The source of the time by which entries age and expire, for tests: a closure, or `testing::Clock`. By default the wall
    /// clock at start, carried on by the monotonic clock.
    pub fn clock(mut self, source: impl TimeSource) -> Self {
        self.clock = Clock::Custom(Arc::new(source));
        self
    }

    /// Checks everything and makes the cache.
    ///
    /// # Errors
    /// The first mistake found, with the route or data type it is about and the mend.
    pub fn build(mut self) -> Result<Cache, ConfigError> {
        let options = self.options()?;
        let store = self.make_store(options.body_limit as u64)?;
        let Config { types, tier, routes, uncached, mutations, cascades, .. } = &self.config;
        let space = Space::new(&self.service, self.config.version.as_deref().unwrap_or_default())?;
        let catalogue = catalogue(types, *tier, &*store)?;
        let known = Entities::new(self.config.entities.clone(), entities(routes));
        let cascades = Cascades::new(&catalogue, cascades, &self.resolvers, known, self.patience)?;
        let (tenants, hosts) = (self.tenants()?, self.config.hosts.clone().unwrap_or_default().checked()?);
        let credentials = self.config.credentials.clone().unwrap_or_default();
        let identity = Identity::new(&self.config.credential_headers, &tenants, self.user.clone(), credentials)?;
        #[cfg(feature = "stats")]
        let observer = Observer::new(
            &self.service,
            catalogue.known(),
            (self.alerts.clone(), self.metrics_tenants),
            catalogue.names(),
            if store.is_shared() { 0 } else { store.usage().capacity },
        );
        #[cfg(not(feature = "stats"))]
        let observer = Observer;
        let observer = Arc::new(observer);
        let tellers = Tellers::new(self.cache_name()?, &observer, catalogue.known());
        let table = Table {
            tellers: &tellers,
            routes,
            uncached,
            mutations,
            identity: &identity,
            #[cfg(feature = "grpc")]
            grpc: &self.grpc,
        };
        let routes = Routes::new(&catalogue, &cascades, table)?;
        let (clock, on_invalidated) = (self.clock.clone(), self.on_invalidated.clone());
        let memos = memos(self.config.memory.unwrap_or(MEMORY));
        #[cfg(feature = "stats")]
        let auditor = auditor((self.config.audit, self.audit_values), &self.config.types)?;
        #[cfg(not(feature = "stats"))]
        no_auditor(self.config.audit, &self.config.types)?;
        let engine = Arc::new(Engine::new(store, clock, memos));
        let warnings = Warnings::default();
        let core = Core {
            catalogue,
            cascades,
            events: self.config.events.clone(),
            sources: Sources::default(),
            routes,
            tenants,
            identity,
            hosts,
            space,
            engine,
            options,
            warnings,
            observer,
            tellers,
            #[cfg(feature = "stats")]
            auditor,
            on_invalidated,
            #[cfg(feature = "warm")]
            sampler: std::sync::OnceLock::new(),
        };
        core.check_events()?;
        let cache = Cache(Arc::new(core));
        // Now that nothing is wrong, a store that connects may begin with it.
        cache.health();
        #[cfg(feature = "stats")]
        cache.keep();
        Ok(cache)
    }

    fn options(&self) -> Result<Options, ConfigError> {
        let Config { enabled, fence, report_header, on_unreachable, on_unmapped, body_limit, .. } = &self.config;
        if *fence == Some(Duration::ZERO) {
            return Err(ConfigError::new("a fence of zero fences nothing; make it longer than handlers take"));
        }
        let tag_header = own_header("tag header", &self.tag_header)?;
        let targeted_header = own_header("targeted header", &self.targeted_header)?;
        if tag_header == targeted_header {
            return Err(ConfigError::new(format!("`{tag_header}` is both tag header and targeted header; rename one")));
        }
        Ok(Options {
            enabled: enabled.unwrap_or(true),
            body_limit: usize::try_from(body_limit.unwrap_or(BODY_LIMIT)).unwrap_or(usize::MAX),
            tag_header,
            targeted_header,
            report_header: report_header.unwrap_or(false),
            entity_tags: self.entity_tags,
            request_directives: self.request_directives,
            show_keys: self.show_keys,
            fence: fence.map(|lease| FenceTimes { lease, hold: Duration::ZERO }),
            on_unmapped: on_unmapped.unwrap_or_default(),
            forwards: self.forwards.as_deref().map(|name| own_header("header for tags", name)).transpose()?,
            rejects: *on_unreachable == Some(OnUnreachable::Reject),
        })
    }

    fn cache_name(&self) -> Result<Option<Arc<str>>, ConfigError> {
        let Some(name) = &self.cache_status else { return Ok(None) };
        // A token of structured fields (RFC 8941, section 3.3.4).
        let begins = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '*');
        let is_token = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~:/".contains(c);
        if !begins || !name.chars().all(is_token) {
            return Err(ConfigError::new(format!(
                "cache status `{name}` is no token; begin it with a letter, and use letters, digits and `-._:/`"
            )));
        }
        Ok(Some(name.as_str().into()))
    }

    fn tenants(&self) -> Result<TenantSource, ConfigError> {
        let Config { tenant_header, routes, mutations, .. } = &self.config;
        #[cfg(feature = "grpc")]
        let has_grpc = !self.grpc.is_empty();
        #[cfg(not(feature = "grpc"))]
        let has_grpc = false;
        match (&self.tenant, tenant_header) {
            (Some(tenant), None) => Ok(tenant.clone()),
            (None, Some(name)) => TenantSource::header(name),
            (None, None) if routes.is_empty() && mutations.is_empty() && !has_grpc => Ok(TenantSource::ByHand),
            (None, None) => Err(ConfigError::new(
                "no tenant: call tenant_header or tenant_from, or single_tenant if there is only one",
            )),
            (Some(_), Some(name)) => {
                Err(ConfigError::new(format!("two tenants: take out the tenant header `{name}` or the other")))
            }
        }
    }

    /// The shared store that `[redis]` describes, with other regions or without.
    fn make_redis(&mut self) -> Result<Option<Arc<dyn Store>>, ConfigError> {
        match (self.config.redis.take(), self.config.regions.take()) {
            (None, None) => Ok(None),
            (Some(redis), None) => Ok(Some(Arc::new(redis.build()?))),
            #[cfg(not(feature = "redis"))]
            (None, Some(regions)) => Ok(Some(Arc::new(regions.build()?))),
            #[cfg(feature = "redis")]
            (None, Some(_)) => {
                Err(ConfigError::new("`[regions]` needs this region's own Redis; describe it in `[redis]`"))
            }
            #[cfg(feature = "redis")]
            (Some(redis), Some(regions)) => Ok(Some(Arc::new(regions.build(redis)?))),
            #[cfg(not(feature = "redis"))]
            (Some(redis), Some(_)) => Ok(Some(Arc::new(redis.build()?))),
        }
    }

    fn make_store(&mut self, body_limit: u64) -> Result<Arc<dyn Store>, ConfigError> {
        let redis = self.make_redis()?;
        let memcached = self.config.memcached.take().map(|memcached| memcached.build()).transpose()?;
        let memcached = memcached.map(|store| Arc::new(store) as Arc<dyn Store>);
        let mut given = [self.store.take(), redis, memcached].into_iter().flatten();
        let memory = self.config.memory;
        if let Some(store) = given.next() {
            if given.next().is_some() {
                return Err(ConfigError::new(
                    "two stores: take out all but one of `[redis]`, `[memcached]` and the call of `store`",
                ));
            }
            return match memory {
                None => Ok(store),
                Some(_) => Err(ConfigError::new(
                    "`memory` is for the store in this process, which is not used beside another one; take it out, or \
                     say how much the tier over Redis may take with its `in_process`",
                )),
            };
        }
        let memory = memory.unwrap_or(MEMORY);
        if body_limit.saturating_mul(4) > memory {
            return Err(ConfigError::new(format!(
                "the body limit ({body_limit} bytes) is over a quarter of the in-process store ({memory} bytes), which \
                 would refuse such entries; lower it with body_limit or enlarge the store with memory"
            )));
        }
        Ok(Arc::new(MemoryStore::with_largest(memory - memos(memory), body_limit)))
    }
}

/// Whoever compares hits with the inner service, if any type wants that.
#[cfg(feature = "stats")]
fn auditor(
    (share, shows): (Option<f64>, bool),
    types: &[DataType],
) -> Result<Option<crate::layer::Auditor>, ConfigError> {
    let of_types = types.iter().map(|t| (format!("data type `{}`: ", t.name), t.policy.audit));
    let all: Vec<_> = std::iter::once((String::new(), share)).chain(of_types).collect();
    for (what, share) in &all {
        if let Some(share) = share.filter(|share| !(0.0..=1.0).contains(share)) {
            return Err(ConfigError::new(format!("{what}audit = {share} is no share of hits; choose one from 0 to 1")));
        }
    }
    let audits = all.iter().any(|(_, share)| share.is_some_and(|share| share > 0.0));
    Ok(audits.then(|| crate::layer::Auditor::new(share.unwrap_or_default(), shows)))
}

#[cfg(not(feature = "stats"))]
fn no_auditor(share: Option<f64>, types: &[DataType]) -> Result<(), ConfigError> {
    match share.is_some() || types.iter().any(|t| t.policy.audit.is_some()) {
        true => Err(ConfigError::new(
            "`audit` needs the feature `stats` of tower-cache-aside; enable it, or take `audit` out",
        )),
        false => Ok(()),
    }
}

/// How much of the memory the engine takes for what it remembers of keys.
fn memos(memory: u64) -> u64 {
    (memory / 16).min(4 << 20)
}

/// Fields that mean something to clients, proxies or this cache: the cache may not take them away.
const TAKEN: [&str; 29] = [
    "accept-ranges",
    "age",
    "allow",
    "alt-svc",
    "authorization",
    "cache-control",
    "cache-invalidated",
    "cache-status",
    "connection",
    "cookie",
    "date",
    "etag",
    "expires",
    "host",
    "keep-alive",
    "last-modified",
    "link",
    "location",
    "retry-after",
    "server",
    "set-cookie",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "vary",
    "via",
    "www-authenticate",
    "grpc-status",
];

/// The types, held in process as is said, if the store can do that.
fn catalogue(types: &[DataType], tier: Option<Tier>, store: &dyn Store) -> Result<Catalogue, ConfigError> {
    let default = Some(Tier::default()).filter(|tier| store.refuses(*tier).is_none());
    let catalogue = Catalogue::new(types, tier.or(default).unwrap_or(Tier::Validated))?;
    if store.is_shared() {
        catalogue.check_tiers(|tier| store.refuses(tier))?;
    } else {
        catalogue.check_alone(tier.is_some())?;
    }
    Ok(catalogue)
}

/// A header that is for this cache alone.
fn own_header(what: &str, name: &str) -> Result<HeaderName, ConfigError> {
    let not_one = |_| ConfigError::new(format!("{what} `{name}` is not a header name; choose another"));
    let header = HeaderName::try_from(name).map_err(not_one)?;
    if TAKEN.contains(&header.as_str()) || header.as_str().starts_with("content-") {
        return Err(ConfigError::new(format!(
            "{what} `{name}` means something to others already; choose one of its own"
        )));
    }
    // Its first clone allocates what all clones share; requests are to find that done.
    drop(header.clone());
    Ok(header)
}

impl fmt::Debug for CacheBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CacheBuilder").field("config", &self.config).finish_non_exhaustive()
    }
}
