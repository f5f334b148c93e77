//! The [`Cache`]: one handle on configuration, engine and store, which layers, handlers and jobs share.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::{HeaderName, Uri, request};

use crate::{
    CacheAsideLayer, InvalidateLayer,
    catalog::{
        Cascade, Cascades, Catalogue, Config, ConfigError, DataType, Drops, FenceTimes, Policy, Resolver,
        ResolverError, Resolvers, Target,
    },
    engine::{Clock, Engine, EntryBuilder, Invalidated},
    route::{Mutated, Mutation, Route, Routes, TenantSource},
    store::{Fence, Generation, MemoryStore, Store},
};

/// 64 MiB.
const MEMORY: u64 = 64 << 20;

/// 2 MiB.
const BODY_LIMIT: usize = 2 << 20;

/// A cache: cheap to clone, and shared by any number of routers, handlers and jobs.
#[derive(Clone)]
pub struct Cache(Arc<Inner>);

struct Inner {
    catalogue: Catalogue,
    cascades: Cascades,
    routes: Routes,
    tenant: TenantSource,
    engine: Arc<Engine>,
    body_limit: usize,
    tag_header: HeaderName,
    report_header: bool,
    fence: Option<FenceTimes>,
    on_unreachable: OnUnreachable,
    targeted_header: HeaderName,
    http: HttpOptions,
}

/// What becomes of writes while the store cannot be told about them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnUnreachable {
    /// They go on; their invalidations are kept and delivered when the store is back (the default).
    #[default]
    Journal,
    /// They are answered 503 before they run. That the store is gone may take a heartbeat (250 ms) to notice, unless the
    /// cascade is [fenced](crate::Cascade::fenced): raising the fence finds out.
    Reject,
}

impl Cache {
    /// A cache to be configured.
    pub fn builder() -> CacheBuilder {
        CacheBuilder::default()
    }

    /// The layer that answers the configured [`Route`]s from this cache.
    pub fn layer(&self) -> CacheAsideLayer {
        CacheAsideLayer::new(self.clone())
    }

    /// The layer that invalidates after the configured [`Mutation`]s.
    pub fn invalidate_layer(&self) -> InvalidateLayer {
        InvalidateLayer::new(self.clone())
    }

    /// The layer for tonic's servers: reads and mutations of gRPC methods. (Feature `grpc`.)
    #[cfg(feature = "grpc")]
    pub fn grpc_layer(&self) -> crate::GrpcLayer {
        crate::GrpcLayer::new(self.clone())
    }

    /// The cache-aside function: a typed value by data type and id, for code that is not behind HTTP.
    ///
    /// ```
    /// # use tower_cache_aside::{Cache, Source};
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let cache = Cache::builder().data_type("conversation_memory", tower_cache_aside::Ttl::Extended).build()?;
    /// let memory = || {
    ///     cache
    ///         .entry::<Vec<String>>("conversation_memory", "7")
    ///         .tenant("acme")
    ///         .scope("agent", "42")
    ///         .fetch(|| async { Ok::<_, std::io::Error>(None) }) // the database has none
    ///         .generate(|| async { Ok(vec!["hello".to_owned()]) })
    /// };
    /// let (value, report) = memory().await?;
    /// assert_eq!((value.len(), report.source), (1, Source::Generated));
    /// let (_, report) = memory().await?;
    /// assert_eq!(report.source, Source::Cache);
    /// # Ok(()) }
    /// ```
    pub fn entry<T>(&self, data_type: impl Into<String>, resource: impl Into<String>) -> EntryBuilder<T> {
        EntryBuilder::new(self.clone(), data_type.into(), resource.into())
    }

    /// Invalidates from a handler or a job: say what was mutated, then [`run`](Invalidation::run) it.
    pub fn invalidate(&self, tenant: impl Into<String>) -> Invalidation {
        let tenant = tenant.into();
        Invalidation { cache: self.clone(), tenant, entities: vec![], all: vec![], include: vec![] }
    }

    pub(crate) fn engine(&self) -> &Arc<Engine> {
        &self.0.engine
    }

    pub(crate) fn routes(&self) -> &Routes {
        &self.0.routes
    }

    pub(crate) fn tenant_source(&self) -> &TenantSource {
        &self.0.tenant
    }

    pub(crate) fn policy(&self, data_type: &str) -> Policy {
        self.0.catalogue.policy(data_type)
    }

    pub(crate) fn body_limit(&self) -> usize {
        self.0.body_limit
    }

    pub(crate) fn tag_header(&self) -> &HeaderName {
        &self.0.tag_header
    }

    pub(crate) fn targeted_header(&self) -> &HeaderName {
        &self.0.targeted_header
    }

    pub(crate) fn http(&self) -> &HttpOptions {
        &self.0.http
    }

    pub(crate) fn report_header(&self) -> bool {
        self.0.report_header
    }

    /// Whether everything works; `false` while the shared store cannot be reached, and requests go to the origin.
    pub fn is_healthy(&self) -> bool {
        self.0.engine.is_reachable()
    }

    /// The time as dates in headers have it.
    pub(crate) fn date(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_millis(self.0.engine.now())
    }

    pub(crate) fn rejects(&self) -> bool {
        self.0.on_unreachable == OnUnreachable::Reject
    }

    /// The fence that a mutation of these types raises, if any of them is fenced.
    pub(crate) fn fence<'t>(&self, types: impl Iterator<Item = &'t str>) -> Option<Fence> {
        let times = types.filter_map(|t| self.0.cascades.fence(t).or(self.0.fence));
        let all = times.reduce(|a, b| FenceTimes { lease: a.lease.max(b.lease), hold: a.hold.max(b.hold) })?;
        Some(Fence { writer: Generation::unique().0, lease: all.lease, hold: all.hold })
    }

    /// Invalidates. Where any fences are used at all, those of other writers are respected.
    pub(crate) async fn drop_all(&self, drops: Drops, fence: Option<&Fence>) -> Invalidated {
        let any = self.0.fence.is_some() || self.0.cascades.any_fence();
        self.0.engine.invalidate(drops, fence.or(any.then_some(&Fence::NOBODY))).await
    }

    pub(crate) async fn drop_entity(&self, drops: &mut Drops, target: Target<'_>) {
        self.0.cascades.add(drops, &target);
        let entity_of = |data_type: &str| self.0.routes.entity_of(data_type).to_owned();
        self.0.cascades.resolve(drops, &target, &entity_of).await;
    }

    /// Adds what a mutation by HTTP drops, as the relations are now.
    pub(crate) async fn drop_mutated(&self, drops: &mut Drops, tenants: &[Vec<u8>], mutated: &Mutated) {
        for tenant in tenants {
            for (data_type, entity, id) in mutated.entities() {
                let target = Target { tenant, data_type, entity, id, include: mutated.include() };
                self.drop_entity(drops, target).await;
            }
            for data_type in mutated.all() {
                drops.all(tenant, data_type);
            }
        }
    }

    /// Adds what is at these paths.
    pub(crate) async fn drop_located(
        &self,
        drops: &mut Drops,
        tenants: &[Vec<u8>],
        paths: &[String],
        include: &[Arc<str>],
    ) {
        for (data_type, id) in paths.iter().filter_map(|path| self.0.routes.locate(path)) {
            let entity = self.0.routes.entity_of(data_type);
            for tenant in tenants {
                self.drop_entity(drops, Target { tenant, data_type, entity, id: &id, include }).await;
            }
        }
    }

    /// Adds what the creation of an entity drops, which the response's `Location` names, if it does.
    pub(crate) async fn drop_created(
        &self,
        drops: &mut Drops,
        tenants: &[Vec<u8>],
        mutated: &Mutated,
        location: Option<&str>,
    ) {
        let Some((data_type, entity)) = mutated.creates() else { return };
        let uri = location.and_then(|l| l.parse::<Uri>().ok());
        let located = uri.as_ref().and_then(|uri| self.0.routes.locate(uri.path()));
        let id = located.filter(|(found, _)| *found == data_type).map(|(_, id)| id);
        for tenant in tenants {
            match &id {
                Some(id) => {
                    let target = Target { tenant, data_type, entity, id, include: mutated.include() };
                    self.drop_entity(drops, target).await;
                }
                None => drops.all(tenant, data_type),
            }
        }
    }
}

impl fmt::Debug for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cache").field("tenant", &self.0.tenant).field("routes", &self.0.routes).finish_non_exhaustive()
    }
}

/// An invalidation by hand; made by [`Cache::invalidate`].
#[must_use = "nothing is dropped before `run`"]
#[derive(Debug)]
pub struct Invalidation {
    cache: Cache,
    tenant: String,
    entities: Vec<(String, String)>,
    all: Vec<String>,
    include: Vec<Arc<str>>,
}

impl Invalidation {
    /// The entity of this data type was changed: its cascade is dropped.
    pub fn mutated(mut self, data_type: impl Into<String>, id: impl Into<String>) -> Self {
        self.entities.push((data_type.into(), id.into()));
        self
    }

    /// Any entry of this data type may be stale: all that the tenant has are dropped.
    pub fn all(mut self, data_type: impl Into<String>) -> Self {
        self.all.push(data_type.into());
        self
    }

    /// Follows this relation of the mutated types' cascades.
    pub fn include(mut self, relation: impl AsRef<str>) -> Self {
        self.include.push(relation.as_ref().into());
        self
    }

    /// Drops it all. When it returns, nobody is served any of it again.
    ///
    /// Relations are resolved as they are now: call it *after* the write, and after a delete whose children only the
    /// database knew, name those as well.
    pub async fn run(self) -> Invalidated {
        let mut drops = Drops::default();
        let tenant = self.tenant.as_bytes();
        for (data_type, id) in &self.entities {
            let entity = self.cache.routes().entity_of(data_type);
            let target = Target { tenant, data_type, entity, id: id.as_bytes(), include: &self.include };
            self.cache.drop_entity(&mut drops, target).await;
        }
        for data_type in &self.all {
            drops.all(tenant, data_type);
        }
        self.cache.drop_all(drops, None).await
    }
}

/// Configures a [`Cache`].
#[must_use]
pub struct CacheBuilder {
    config: Config,
    tenant: Option<TenantSource>,
    resolvers: Resolvers,
    store: Option<Arc<dyn Store>>,
    memory: u64,
    body_limit: usize,
    tag_header: String,
    report_header: bool,
    on_unreachable: OnUnreachable,
    targeted_header: String,
    http: HttpOptions,
    #[cfg(feature = "grpc")]
    grpc: Vec<crate::GrpcMethod>,
    clock: Clock,
}

/// What the HTTP side does besides.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HttpOptions {
    pub(crate) entity_tags: bool,
    pub(crate) request_directives: bool,
    pub(crate) show_keys: bool,
}

impl Default for CacheBuilder {
    fn default() -> Self {
        Self {
            config: Config::default(),
            tenant: None,
            resolvers: Resolvers::new(),
            store: None,
            memory: MEMORY,
            body_limit: BODY_LIMIT,
            tag_header: "cache-tag".to_owned(),
            report_header: false,
            on_unreachable: OnUnreachable::default(),
            targeted_header: "tower-cache-control".to_owned(),
            http: HttpOptions { entity_tags: true, request_directives: false, show_keys: false },
            #[cfg(feature = "grpc")]
            grpc: vec![],
            clock: Clock::default(),
        }
    }
}

impl CacheBuilder {
    /// Adds everything that a [`Config`] declares.
    pub fn config(mut self, config: Config) -> Self {
        let Config { tenant_header, types, fence, routes, mutations, cascades } = config;
        self.config.fence = fence.or(self.config.fence);
        self.config.tenant_header = tenant_header.or(self.config.tenant_header);
        self.config.types.extend(types);
        self.config.routes.extend(routes);
        self.config.mutations.extend(mutations);
        self.config.cascades.extend(cascades);
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

    /// The service has no tenants: everything is stored under this name.
    pub fn single_tenant(mut self, name: impl Into<Arc<str>>) -> Self {
        self.tenant = Some(TenantSource::Single(name.into()));
        self
    }

    /// Declares a data type.
    pub fn data_type(mut self, name: impl Into<String>, ttl: impl Into<crate::Ttl>) -> Self {
        self.config.types.push(DataType::new(name, ttl));
        self
    }

    /// Declares a data type that has more to say than its TTL.
    pub fn with(mut self, data_type: DataType) -> Self {
        self.config.types.push(data_type);
        self
    }

    /// Fences every write whose cascade says nothing else, with this lease; see [`Cascade::fenced`].
    pub fn fenced(mut self, lease: Duration) -> Self {
        self.config.fence = Some(lease);
        self
    }

    /// What becomes of writes while the store cannot be told about them; by default they go on.
    pub fn on_unreachable(mut self, what: OnUnreachable) -> Self {
        self.on_unreachable = what;
        self
    }

    /// Declares a cacheable route.
    pub fn route(mut self, route: Route) -> Self {
        self.config.routes.push(route);
        self
    }

    /// Declares a unary gRPC method whose responses are cached, by its whole message: `/package.Service/Method`. (Feature
    /// `grpc`.)
    #[cfg(feature = "grpc")]
    pub fn grpc(self, path: impl Into<String>, data_type: impl Into<String>) -> Self {
        self.grpc_method(crate::GrpcMethod::read(path, data_type))
    }

    /// Declares a unary gRPC method that has more to say, or that mutates. (Feature `grpc`.)
    #[cfg(feature = "grpc")]
    pub fn grpc_method(mut self, method: crate::GrpcMethod) -> Self {
        self.grpc.push(method);
        self
    }

    /// Declares a mutating route.
    pub fn mutation(mut self, mutation: Mutation) -> Self {
        self.config.mutations.push(mutation);
        self
    }

    /// Declares what a mutation of a data type drops.
    pub fn cascade(mut self, cascade: Cascade) -> Self {
        self.config.cascades.push(cascade);
        self
    }

    /// Finds the children of a relation: (tenant, parent id) → ids of the children, usually from the database.
    ///
    /// It is asked before the mutating handler runs *and* after it succeeded. Should it fail, or find more than 1,000,
    /// all children of the tenant are dropped.
    pub fn resolver<F, Fut, E>(mut self, relation: impl Into<String>, resolve: F) -> Self
    where
        F: Fn(String, String) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Vec<String>, E>> + Send + 'static,
        E: Into<ResolverError>,
    {
        self.resolvers.insert(relation.into(), Resolver::new(resolve));
        self
    }

    /// The store; by default a [`MemoryStore`] of [`memory`](Self::memory) bytes.
    pub fn store(mut self, store: impl Store) -> Self {
        self.store = Some(Arc::new(store));
        self
    }

    /// How many bytes the in-process store may take; by default 64 MiB.
    pub fn memory(mut self, bytes: u64) -> Self {
        self.memory = bytes;
        self
    }

    /// Responses with a larger body are passed through and not stored; by default 2 MiB.
    pub fn body_limit(mut self, bytes: usize) -> Self {
        self.body_limit = bytes;
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
        self.report_header = on;
        self
    }

    /// Gives responses without an `ETag` a strong one, so that clients can ask whether what they have is still good; by
    /// default on.
    pub fn entity_tags(mut self, on: bool) -> Self {
        self.http.entity_tags = on;
        self
    }

    /// Honours `Cache-Control` in requests: `no-cache`, `no-store`, `max-age`, `min-fresh`, `max-stale` and
    /// `only-if-cached` (RFC 9111, section 5.2.1). By default off, because it lets any client defeat the cache.
    pub fn request_directives(mut self, on: bool) -> Self {
        self.http.request_directives = on;
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
        self.http.show_keys = on;
        self
    }

    /// The source of time, for tests. By default the wall clock at start, carried on by the monotonic clock.
    pub fn clock<F: Fn() -> SystemTime + Send + Sync + 'static>(mut self, now: F) -> Self {
        self.clock = Clock::Custom(Arc::new(now));
        self
    }

    /// Checks everything and makes the cache.
    ///
    /// # Errors
    /// The first mistake found, with the route or data type it is about and the mend.
    pub fn build(self) -> Result<Cache, ConfigError> {
        let Config { tenant_header, types, fence, routes, mutations, cascades } = &self.config;
        if *fence == Some(Duration::ZERO) {
            return Err(ConfigError::new("a fence of zero fences nothing; make it longer than handlers take"));
        }
        let fence = fence.map(|lease| FenceTimes { lease, hold: Duration::ZERO });
        let catalogue = Catalogue::new(types)?;
        let cascades = Cascades::new(&catalogue, cascades, &self.resolvers)?;
        let compiled = Routes::new(&catalogue, &cascades, routes, mutations)?;
        #[cfg(feature = "grpc")]
        let compiled = compiled.with_grpc(&self.grpc, &catalogue, &cascades)?;
        #[cfg(feature = "grpc")]
        let has_grpc = !self.grpc.is_empty();
        #[cfg(not(feature = "grpc"))]
        let has_grpc = false;
        let tenant = match (self.tenant, tenant_header) {
            (Some(tenant), None) => tenant,
            (None, Some(name)) => TenantSource::header(name).map_err(ConfigError::new)?,
            (None, None) if routes.is_empty() && mutations.is_empty() && !has_grpc => TenantSource::Single("".into()),
            (None, None) => {
                return Err(ConfigError::new(
                    "no tenant: call tenant_header or tenant_from, or single_tenant if there is only one",
                ));
            }
            (Some(_), Some(name)) => {
                return Err(ConfigError::new(format!("two tenants: take out the tenant header `{name}` or the other")));
            }
        };
        let store = match self.store {
            Some(store) => store,
            None if (self.body_limit as u64).saturating_mul(4) > self.memory => {
                return Err(ConfigError::new(format!(
                    "the body limit ({} bytes) is over a quarter of the in-process store ({} bytes), which would refuse \
                     such entries; lower it with body_limit or enlarge the store with memory",
                    self.body_limit, self.memory
                )));
            }
            None => Arc::new(MemoryStore::with_largest(self.memory, self.body_limit as u64)),
        };
        let tag_header = HeaderName::try_from(&self.tag_header)
            .map_err(|_| ConfigError::new(format!("tag header `{}` is not a header name", self.tag_header)))?;
        let targeted_header = HeaderName::try_from(&self.targeted_header).map_err(|_| {
            ConfigError::new(format!("targeted header `{}` is not a header name", self.targeted_header))
        })?;
        Ok(Cache(Arc::new(Inner {
            catalogue,
            cascades,
            routes: compiled,
            tenant,
            engine: Arc::new(Engine::new(store, self.clock)),
            body_limit: self.body_limit,
            tag_header,
            report_header: self.report_header,
            fence,
            on_unreachable: self.on_unreachable,
            targeted_header,
            http: self.http,
        })))
    }
}

impl fmt::Debug for CacheBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CacheBuilder").field("config", &self.config).finish_non_exhaustive()
    }
}
