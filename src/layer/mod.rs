//! The Tower side: layers over what one cache hands them.
//!
//! [`CacheAsideLayer`] answers reads, [`InvalidateLayer`] sits on writes, and `GrpcLayer` does both for gRPC. All take
//! their routes from the cache, so all can wrap a whole router; what is not theirs passes through for the price of one path match.

#[cfg(feature = "stats")]
mod audit;
mod body;
mod cache_aside;
mod changes;
mod core;
mod extensions;
mod future;
#[cfg(feature = "grpc")]
mod grpc;
mod invalidate;
#[cfg_attr(not(feature = "warm"), path = "unpopular.rs")]
mod popular;
mod reading;
mod request;
#[cfg(feature = "warm")]
mod sampler;
mod serve;
mod warnings;
mod write;
mod writing;

#[cfg(feature = "stats")]
pub(crate) use self::audit::Auditor;
pub(crate) use self::core::{Blame, By, Core, OnInvalidated, Options};
pub use body::CacheBody;
pub use cache_aside::{CacheAside, CacheAsideLayer};
pub(crate) use changes::Reads;
pub use changes::{Changes, changed, depends_on};
#[cfg(any(test, fuzzing))]
pub(crate) use extensions::take_tags;
pub use extensions::{CacheTags, NoCache};
pub use future::ResponseFuture;
pub(crate) use future::joined;
#[cfg(feature = "grpc")]
pub use grpc::{Grpc, GrpcLayer, GrpcResponseBody};
#[cfg(any(test, fuzzing))]
pub(crate) use grpc::{accepts, message};
pub use invalidate::{Invalidate, InvalidateBody, InvalidateLayer};
pub use request::{Bodies, NoBodies, ReadBody, RequestBody};
#[cfg(feature = "warm")]
pub(crate) use sampler::{Replay, Sampler, Seen, Sighting, Warmup};
pub(crate) use warnings::Warnings;
pub(crate) use writing::{Due, Writing};
