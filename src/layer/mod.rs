//! The HTTP side: two Tower layers over one [`Cache`](crate::Cache).
//!
//! [`CacheAsideLayer`] answers reads, [`InvalidateLayer`] sits on writes. Both take their routes from the cache, so both
//! can wrap a whole router; what is not theirs passes through for the price of one path match.

mod body;
mod cache_aside;
mod cache_status;
mod directives;
mod freshness;
mod future;
#[cfg(feature = "grpc")]
mod grpc;
mod invalidate;
mod serve;
mod tags;

pub use body::CacheBody;
pub use cache_aside::{CacheAside, CacheAsideLayer};
pub use future::ResponseFuture;
#[cfg(feature = "grpc")]
pub use grpc::{Grpc, GrpcBody, GrpcLayer};
pub use invalidate::{Invalidate, InvalidateBody, InvalidateLayer};
pub use tags::{CacheTags, NoCache};

/// The inner service that was polled ready, to be called; its clone stays behind, and is polled ready before the next call.
fn take_ready<S: Clone>(inner: &mut S) -> S {
    let clone = inner.clone();
    std::mem::replace(inner, clone)
}
