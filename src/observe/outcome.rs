//! How a request was handled, as its response says it: for clients as a header, for layers outside as a value.

use std::{sync::Arc, time::Duration};

/// How the cache handled a request; in the extensions of every response to a request that a route or gRPC method reads, for
/// layers outside.
///
/// ```
/// # use tower_cache_aside::{Handling, Outcome};
/// # fn count(response: http::Response<()>) {
/// let is_hit = response.extensions().get::<Outcome>().is_some_and(|outcome| outcome.outcome == Handling::Hit);
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Outcome {
    /// What became of it.
    pub outcome: Handling,
    /// Why it is no hit, or why its response was not stored: the `detail` of `Cache-Status`, else its `fwd`.
    pub reason: Option<&'static str>,
    /// The data type of the route.
    pub data_type: Arc<str>,
    /// Where a stored response was found; `None` if it comes from the inner service, by this request or another.
    pub tier: Option<FoundIn>,
    /// How old a stored response is (RFC 9111, section 4.2.3).
    pub age: Option<Duration>,
    pub(crate) served: Served,
}

/// What counts of a response besides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Served {
    /// How many bytes are sent of what was stored.
    pub(crate) bytes: u64,
    /// How many milliseconds the inner service took for it once, if it was spared that.
    pub(crate) saved: u32,
    /// For how many more seconds a hit is fresh; `None` means for ever.
    pub(crate) ttl: Option<i64>,
    /// What came from the inner service has been stored.
    pub(crate) kept: bool,
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Handling {
    /// Answered from the cache.
    Hit,
    /// Answered from the cache with what is no longer fresh, on purpose: while it is refreshed, or because the inner service
    /// failed.
    Stale,
    /// Answered with what another request got from the inner service.
    Coalesced,
    /// Answered by the inner service.
    Miss,
    /// The cache kept out of it; or it wanted nothing but what is stored, which nothing was (`only-if-cached`).
    Bypass,
}

impl Handling {
    /// As metrics call it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Hit => "hit",
            Self::Stale => "stale",
            Self::Coalesced => "coalesced",
            Self::Miss => "miss",
            Self::Bypass => "bypass",
        }
    }
}

#[cfg(feature = "stats")]
impl Handling {
    /// Why, where nothing else is said.
    pub(crate) fn usual(self) -> &'static str {
        if self == Self::Stale { "stale" } else { "fresh" }
    }
}

/// Where a stored response was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FoundIn {
    /// In this process, which answered on the spot.
    Process,
    /// By asking the shared store, which may have held it in this process as well.
    Store,
}
