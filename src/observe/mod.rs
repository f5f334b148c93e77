//! What is told of each request: in its response, and to those who look after the service.

#[cfg(feature = "stats")]
mod alerts;
#[cfg(feature = "stats")]
mod counts;
#[cfg(feature = "stats")]
mod observer;
mod outcome;
#[cfg(feature = "stats")]
mod recent;
#[cfg(feature = "stats")]
mod snapshot;
mod teller;
#[cfg_attr(not(feature = "stats"), path = "unwatched.rs")]
mod watch;

#[cfg(feature = "stats")]
pub use alerts::AlertRules;
#[cfg(feature = "stats")]
pub(crate) use counts::{BYTES, NANOS, Timer};
#[cfg(feature = "stats")]
pub(crate) use observer::{Cause, Dropped, Observer, now};
pub use outcome::{FoundIn, Handling, Outcome};
#[cfg(feature = "stats")]
pub(crate) use recent::{Event, KINDS, What, shortened};
#[cfg(feature = "stats")]
pub use snapshot::Alert;
#[cfg(feature = "stats")]
pub(crate) use snapshot::{HANDLINGS, OfHistogram, OfType, STEP_SECONDS, Snapshot};
pub(crate) use teller::{Found, Teller, Tellers};
pub(crate) use watch::Watch;
#[cfg(not(feature = "stats"))]
pub(crate) use watch::{Observer, Timer};
