//! What is told of each request: in its response, and to those who look after the service.

#[cfg(feature = "stats")]
mod alerts;
#[cfg(feature = "stats")]
mod counts;
#[cfg(feature = "metrics")]
mod export;
#[cfg(feature = "stats")]
mod observer;
mod outcome;
#[cfg(feature = "stats")]
mod recent;
#[cfg(feature = "stats")]
mod shadow;
#[cfg(feature = "stats")]
mod snapshot;
#[cfg(feature = "stats")]
mod stats;
mod teller;
#[cfg(feature = "metrics")]
mod told;
#[cfg_attr(not(feature = "stats"), path = "unwatched.rs")]
mod watch;

#[cfg(feature = "stats")]
pub use alerts::AlertRules;
#[cfg(feature = "stats")]
pub(crate) use counts::Timer;
#[cfg(feature = "metrics")]
pub use export::{DURATION_BUCKETS, SIZE_BUCKETS};
#[cfg(feature = "stats")]
#[cfg(feature = "admin")]
pub(crate) use observer::now;
#[cfg(feature = "stats")]
pub(crate) use observer::{Cause, Dropped, Observer};
pub(crate) use outcome::Served;
pub use outcome::{FoundIn, Handling, Outcome};
#[cfg(feature = "admin")]
pub(crate) use recent::KINDS;
#[cfg(feature = "stats")]
pub(crate) use recent::{Differing, Event, What, name_of, shortened, tag_hash, tag_hashes};
#[cfg(feature = "stats")]
pub use snapshot::Alert;
#[cfg(feature = "stats")]
pub(crate) use snapshot::{OfSource, STEP_SECONDS, Snapshot};
#[cfg(feature = "stats")]
pub use stats::{MemoryStats, Popular, Quantiles, Sent, Series, Sizes, SourceStats, Stats, StoreStats, TypeStats};
pub(crate) use teller::{Found, Teller, Tellers};
pub(crate) use watch::Watch;
#[cfg(not(feature = "stats"))]
pub(crate) use watch::{Observer, Timer};
