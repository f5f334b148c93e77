//! What changed without a request to this service: events, the policies that say what they make stale, and the sources that they
//! come from.

mod event;
mod followed;
mod policy;
#[cfg(feature = "postgres")]
pub mod postgres;
#[cfg(feature = "redis")]
mod redis;
mod source;

pub use event::Event;
#[cfg(feature = "stats")]
pub(crate) use followed::BECAME;
pub(crate) use followed::{Became, Followed, Sources};
pub use policy::{EventChange, EventPolicy};
#[cfg(any(test, fuzzing))]
pub(crate) use redis::event as event_of_entry;
#[cfg(feature = "redis")]
pub use redis::{RedisStream, RedisStreamBuilder};
pub use source::{Batch, EventSource, Notes, Received, SourceError, SourceFuture};
