//! What changed without a request to this service: events, the policies that say what they make stale, and the sources that they
//! come from.

mod event;
mod followed;
mod policy;
mod source;

pub use event::Event;
#[cfg(feature = "stats")]
pub(crate) use followed::BECAME;
pub(crate) use followed::{Became, Followed, Sources};
pub use policy::{EventChange, EventPolicy};
pub use source::{Batch, EventSource, Notes, Received, SourceError, SourceFuture};
