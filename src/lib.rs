//! Tower middleware that caches the responses of any Tower HTTP service (axum, hyper, tonic), per tenant and data type,
//! and drops, in cascade, everything that a write has made stale before the client sees the write's response.
//!
//! # Quick start
//!
//! ```
//! use axum::{Json, Router, extract::Path, routing::get};
//! use tower_cache_aside::{Cache, DataType, Mutation, Route, Ttl};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let cache = Cache::builder("agents")
//!     .tenant_header("x-tenant-id")
//!     .data_type(DataType::new("agent", Ttl::Standard))
//!     .route(Route::new("/agents/{agent_id}", "agent"))
//!     .mutation(Mutation::put("/agents/{agent_id}", "agent"))
//!     .build()?;
//!
//! let app: Router = Router::new()
//!     .route("/agents/{agent_id}", get(read).put(write))
//!     .layer(cache.layer())
//!     .layer(cache.invalidate_layer());
//! # Ok(()) }
//! # async fn read(Path(id): Path<String>) -> Json<String> { Json(id) }
//! # async fn write(Path(id): Path<String>) -> Json<String> { Json(id) }
//! ```
//!
//! The first `GET /agents/42` of a tenant answers `cache-status: tower-cache-aside; fwd=uri-miss; stored`, the second
//! `…; hit; ttl=3599`; after a `PUT /agents/42` the next misses.
//!
//! # The guarantee
//!
//! After a write has been acknowledged through a layer of the cache (or [`Cache::invalidate`] has returned), no
//! request that begins later is served what was read before it. Not from the cache, not from a call that was under way,
//! and not from a slow read that stores its result afterwards: that classic race of cache-aside is closed by giving
//! every entity a *generation*, which a load captures before it begins, an entry is valid under, and a write drops. See
//! [`store`] for what it asks of a store, and [`docs::redis`] for what becomes of this, fault by fault, when the store is
//! shared.
//!
//! # Safe by default
//!
//! A request without a tenant, or with two, is not cached, nor is one with `Authorization` or `Cookie` unless its route
//! says what they mean ([`Credentials`]). A response with `Set-Cookie`, `private`, `no-store`, `no-cache` or `Vary: *`, one
//! that is not a success, and one over the [body limit](CacheBuilder::body_limit) is passed through and not stored.
//! [`docs::http`] says what is made of each header. **Put authorization outside the cache**: a hit never reaches what is
//! inside ([`docs::layers`]).
//!
//! # The parts
//!
//! - [`Cache`] and its [builder](CacheBuilder): one handle for any number of layers, handlers and jobs.
//! - [`CacheAsideLayer`] and [`InvalidateLayer`]: the HTTP side.
//! - [`Route`], [`Mutation`]: from a request to what it reads or changes.
//! - [`DataType`], [`Ttl`], [`Cascade`], [`Config`]: the catalogue; [`docs::configuration`] has it as a file, and
//!   [`docs::mapping`] says how to map a real API. What cannot work is refused when the cache is built.
//! - [`Changes`], [`changed`], [`depends_on`]: what handlers and repositories say, where no table can know.
//! - [`Cache::entry`], [`Cache::write`], [`Cache::invalidate`]: the same for code that is not behind HTTP.
//! - [`store`]: where entries live, and the trait to implement for another place (`docs::stores`).
//!
//! # Cancel safety
//!
//! Every future may be dropped at any time. A call of the inner service that others may wait for, and a write with its
//! invalidation, run in tasks of their own and go on to their end. (So task-local values of outer layers do not reach
//! the inner service on a miss or a mutation; request extensions do.) The layers must be used within a tokio runtime.
//!
//! # Features
//!
//! - `redis`: `store::RedisStore`, the shared store of a fleet, with a coherent tier in each process.
//! - `memcached`: `store::MemcachedStore`, the same over memcached.
//! - `redis-cluster`, `redis-tls`: clusters, `rediss://`.
//! - `postgres`: `postgres`, the changes of its rows as events.
//! - `grpc`: `GrpcLayer`, for unary calls of tonic services.
//! - `axum`: which route a request is, and under which prefix, as axum's router says.
//! - `stats`: `Cache::stats`, alerts and the audit.
//! - `metrics`: the same through the `metrics` facade.
//! - `admin`: an API and a page to look at the cache, to explain and to purge.
//! - `warm`: `Cache::warm`, which loads what is popular before it is asked for.
//! - `testing`: `testing`, for tests of your own mapping: a twin without a cache, a clock and a store that can be told;
//!   `store::conformance`, for stores of your own.
//! - `lz4`: compress large bodies of entries that leave the process.
//! - `toml`: read the [`Config`] from a file.

#![doc(test(attr(deny(warnings), allow(unused))))]
#![warn(unreachable_pub)]
#![cfg_attr(docsrs, feature(doc_cfg))]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

#[cfg(feature = "admin")]
mod admin;
mod cache;
mod catalog;
mod clock;
mod config;
mod engine;
mod error;
mod events;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod http;
mod key;
mod layer;
#[cfg(any(feature = "memcached", feature = "redis"))]
#[cfg_attr(
    not(all(feature = "memcached", feature = "redis")),
    allow(dead_code, reason = "each protocol has its own way to tell whose a reply is")
)]
mod mux;
mod observe;
mod route;
pub mod store;
mod sync;
#[cfg(feature = "testing")]
pub mod testing;
mod units;
#[cfg(feature = "warm")]
mod warm;

#[cfg(feature = "admin")]
pub use admin::{Admin, AdminBody, AdminService};
pub use cache::{
    Applied, Cache, CacheBuilder, Codec, CodecError, DescribedRead, DescribedWrite, Description, Drained, Dropped,
    EntryBuilder, Fetch, Following, Generate, Invalidation, Json, MessagePack, Report, Source,
};
pub use catalog::{Canonical, Cascade, Coalesce, DataType, Freshness, Tier, Ttl};
pub use clock::TimeSource;
pub use config::{Config, OnUnreachable};
pub use engine::Invalidated;
pub use error::ConfigError;
#[cfg(feature = "postgres")]
pub use events::postgres;
pub use events::{Batch, Event, EventChange, EventPolicy, EventSource, Notes, Received, SourceError, SourceFuture};
#[cfg(feature = "redis")]
pub use events::{RedisStream, RedisStreamBuilder};
pub use key::{Key, Tag};
pub use layer::{
    Bodies, CacheAside, CacheAsideLayer, CacheBody, CacheTags, Changes, Invalidate, InvalidateBody, InvalidateLayer,
    NoBodies, NoCache, ReadBody, RequestBody, ResponseFuture, changed, depends_on,
};
#[cfg(feature = "grpc")]
pub use layer::{Grpc, GrpcLayer, GrpcResponseBody};
#[cfg(feature = "stats")]
pub use observe::{
    Alert, AlertRules, MemoryStats, Popular, Quantiles, Sent, Series, Sizes, SourceStats, Stats, StoreStats, TypeStats,
};
#[cfg(feature = "metrics")]
pub use observe::{DURATION_BUCKETS, SIZE_BUCKETS};
pub use observe::{FoundIn, Handling, Outcome};
pub use route::{BodyKey, Credentials, Hosts, Mutation, OnUnmapped, Query, Route};
#[cfg(feature = "grpc")]
pub use route::{GrpcMethod, GrpcTarget};
#[cfg(feature = "warm")]
pub use warm::{Warm, Warming};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// Pages that are about the whole crate.
pub mod docs {
    #[doc = include_str!("../docs/configuration.md")]
    pub mod configuration {}

    #[doc = include_str!("../docs/events.md")]
    pub mod events {}
    #[doc = include_str!("../docs/http.md")]
    pub mod http {}

    #[doc = include_str!("../docs/layers.md")]
    pub mod layers {}

    #[doc = include_str!("../docs/mapping.md")]
    pub mod mapping {}

    #[cfg(all(feature = "admin", feature = "metrics"))]
    #[doc = include_str!("../docs/operations.md")]
    pub mod operations {}

    #[doc = include_str!("../docs/memcached.md")]
    pub mod memcached {}
    #[doc = include_str!("../docs/redis.md")]
    pub mod redis {}

    #[cfg(feature = "redis")]
    #[doc = include_str!("../docs/regions.md")]
    pub mod regions {}

    #[doc = include_str!("../docs/security.md")]
    pub mod security {}

    #[doc = include_str!("../docs/stores.md")]
    #[doc = "```"]
    #[doc = include_str!("../examples/own_store.rs")]
    #[doc = "```"]
    #[cfg(feature = "testing")]
    pub mod stores {}

    #[cfg(feature = "testing")]
    #[doc = include_str!("../docs/testing.md")]
    pub mod testing {}

    #[cfg(feature = "warm")]
    #[doc = include_str!("../docs/warming.md")]
    pub mod warming {}
}
