//! What changed without a request to this service: events, the policies that say what they make stale, and the sources that they
//! come from.

mod event;
mod policy;
mod source;

pub use event::Event;
pub use policy::EventPolicy;
pub use source::{Batch, EventSource, Notes, Received, SourceError, SourceFuture};
