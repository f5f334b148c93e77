//! The [`Cache`]: one handle on configuration, engine and store, which layers, handlers and jobs share.

mod applied;
mod builder;
mod describe;
mod entry;
mod follow;
mod invalidation;
#[cfg(feature = "stats")]
pub(crate) mod stats;
mod value;

use std::{fmt, sync::Arc, time::Duration};

pub use applied::Applied;
pub use builder::CacheBuilder;
pub use describe::{DescribedRead, DescribedWrite, Description, Dropped};
pub use entry::{EntryBuilder, Fetch, Generate};
pub use follow::Following;
pub use invalidation::Invalidation;
#[cfg(any(test, fuzzing))]
pub(crate) use value::Shape;
pub use value::{Codec, CodecError, Json, MessagePack, Report, Source};

use crate::{
    engine::Invalidated,
    error::ConfigError,
    layer::{Blame, By, CacheAsideLayer, Changes, Core, Due, InvalidateLayer, Writing, joined},
    store::{Health, StoreError},
};

/// A cache: cheap to clone, and shared by any number of routers, handlers and jobs.
#[derive(Clone)]
pub struct Cache(pub(crate) Arc<Core>);

impl Cache {
    /// A cache to be configured. The name of the service is part of every key, so that services which share a store do
    /// not share entries; processes that are to share them have the same name.
    pub fn builder(service: impl Into<String>) -> CacheBuilder {
        CacheBuilder::new(service.into())
    }

    /// The layer that answers the configured [`Route`](crate::Route)s from this cache.
    pub fn layer(&self) -> CacheAsideLayer {
        #[cfg(feature = "stats")]
        self.keep();
        CacheAsideLayer::new(self.0.clone())
    }

    /// The layer that invalidates after the configured [`Mutation`](crate::Mutation)s.
    pub fn invalidate_layer(&self) -> InvalidateLayer {
        #[cfg(feature = "stats")]
        self.keep();
        InvalidateLayer::new(self.0.clone())
    }

    /// The layer for tonic's servers: reads and mutations of gRPC methods. (Feature `grpc`.)
    #[cfg(feature = "grpc")]
    pub fn grpc_layer(&self) -> crate::GrpcLayer {
        #[cfg(feature = "stats")]
        self.keep();
        crate::GrpcLayer { core: self.0.clone() }
    }

    /// The cache-aside function: a typed value by data type and id, for code that is not behind HTTP.
    ///
    /// ```
    /// # use tower_cache_aside::{Cache, DataType, Source, Ttl};
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let memories = DataType::new("conversation_memory", Ttl::Extended);
    /// let cache = Cache::builder("docs").data_type(memories).build()?;
    /// let memory = || {
    ///     cache
    ///         .entry::<Vec<String>>("conversation_memory", "7")
    ///         .tenant("acme")
    ///         .scope("agent", "42")
    ///         .fetch(|| async { Ok::<_, std::io::Error>(None) }) // the database has none
    ///         .map(|memory| memory.generate(|| async { Ok(vec!["hello".to_owned()]) }))
    /// };
    /// let (value, report) = memory()?.await?;
    /// assert_eq!((value.len(), report.source), (1, Source::Generated));
    /// let (_, report) = memory()?.await?;
    /// assert_eq!(report.source, Source::Cache);
    /// # Ok(()) }
    /// ```
    pub fn entry<T>(&self, data_type: impl Into<String>, resource: impl Into<String>) -> EntryBuilder<T> {
        EntryBuilder::new(self.0.clone(), data_type.into(), resource.into())
    }

    /// Invalidates from a handler or a job: say what was mutated, then [`run`](Invalidation::run) it.
    pub fn invalidate(&self, tenant: impl Into<String>) -> Invalidation {
        Invalidation::new(self.0.clone(), tenant.into())
    }

    /// Runs code that changes things outside of a request (a job, a consumer of messages), and then drops what it said by
    /// [`changed`](crate::changed), whatever became of it: also when this future is dropped half-way, or panics.
    ///
    /// ```
    /// # use tower_cache_aside::{Cache, DataType, Ttl, changed};
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let cache = Cache::builder("docs").data_type(DataType::new("task", Ttl::Standard)).build()?;
    /// async fn close(id: u64) -> std::io::Result<()> {
    ///     changed("task", id); // in the repository, beside the SQL
    ///     Ok(())
    /// }
    /// let (result, report) = cache.write("acme", close(7)).await?;
    /// result?;
    /// assert_eq!(report.to_string(), "task=0, total=0");
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// No such tenant: then nothing has run.
    pub async fn write<F: Future>(&self, tenant: &str, work: F) -> Result<(F::Output, Invalidated), ConfigError> {
        let core = &self.0;
        let tenant = core.space.tenant(core.tenants.by_hand(Some(tenant))?);
        let changes = Changes::default();
        let mut due = Due::arm(Writing::new(core, [tenant].into(), changes.clone(), "Cache::write").by_hand());
        let output = changes.scope(work).await;
        let report = match due.take() {
            Some(writing) => joined(core.engine.spawn(writing.end())).await,
            None => Invalidated::default(),
        };
        Ok((output, report))
    }

    /// The mapping on one page, for review: what each write drops, and what drops each route's entries.
    ///
    /// ```
    /// # use tower_cache_aside::{Cache, DataType, Mutation, Route, Ttl};
    /// # fn main() -> Result<(), tower_cache_aside::ConfigError> {
    /// let cache = Cache::builder("docs")
    ///     .single_tenant("all")
    ///     .data_type(DataType::new("agent", Ttl::Standard))
    ///     .route(Route::new("/agents/{agent_id}", "agent"))
    ///     .mutation(Mutation::put("/agents/{agent_id}", "agent"))
    ///     .build()?;
    /// assert_eq!(cache.describe().reads[0].dropped_by, ["PUT /agents/{agent_id}"]);
    /// println!("{}", cache.describe());
    /// # Ok(()) }
    /// ```
    pub fn describe(&self) -> Description {
        Description::new(&self.0)
    }

    /// Drops everything of all tenants: after a restore, a migration, between tests. When it returns, nobody is served any
    /// of it again. Once begun it goes on, also when this future is dropped.
    ///
    /// # Errors
    /// The store could not be told about it: this process serves none of it, others may until the TTL.
    pub async fn clear(&self) -> Result<(), StoreError> {
        let core = self.0.clone();
        let clear = async move { core.clear(&Blame { by: By::Hand, what: "Cache::clear", tenant: None }).await };
        self.0.engine.anyway(clear).await
    }

    /// Whether the store does what it is there for, and why not. While it is down, requests go to the origin.
    pub fn health(&self) -> Health {
        self.0.engine.health()
    }

    /// Waits for what is under way without its clients (writes, loads, fills), and delivers to the store what it has not
    /// been told: to be awaited at shutdown, after the server has stopped. It takes no longer than this.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let cache = tower_cache_aside::Cache::builder("docs").build()?;
    /// let drained = cache.drain(Duration::from_secs(10)).await;
    /// if drained.undelivered > 0 {
    ///     eprintln!("other processes may serve what {} tags have dropped, until their TTL", drained.undelivered);
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn drain(&self, within: Duration) -> Drained {
        Drained { undelivered: self.0.engine.drain(within).await }
    }
}

/// What [`Cache::drain`] came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Drained {
    /// How many tags were dropped by acknowledged writes and could not be delivered to the store. If the process ends
    /// now, others may serve their entries until the TTL.
    pub undelivered: usize,
}

impl fmt::Debug for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cache").field("tenant", &self.0.tenants).field("routes", &self.0.routes).finish_non_exhaustive()
    }
}
