//! How a request was handled, as its response says it: for clients as a header, for layers outside as a value.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use http::{HeaderMap, StatusCode, response};

use crate::http::cache_status::{Handled, Reason};

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
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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
    /// The cache kept out of it.
    Bypass,
}

/// Where a stored response was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FoundIn {
    /// In this process: in its store, or in its tier of a shared one.
    Process,
    /// In the shared store, or in this process after the shared store said that it is valid.
    Store,
}

/// What tells of requests of one data type.
#[derive(Clone, Debug)]
pub(crate) struct Teller(Arc<OfType>);

#[derive(Debug)]
struct OfType {
    data_type: Arc<str>,
    /// The cache's name in `Cache-Status`; without one the header is not said.
    name: Option<Arc<str>>,
}

impl Teller {
    fn new(data_type: &str, name: Option<&Arc<str>>) -> Self {
        Self(Arc::new(OfType { data_type: data_type.into(), name: name.cloned() }))
    }

    /// Says in a response of the inner service how its request was handled.
    pub(crate) fn tell(&self, handled: Handled, key: Option<&[u8]>, parts: &mut response::Parts) {
        self.say(handled, &mut parts.headers, Some(parts.status), key);
        parts.extensions.insert(self.outcome(handled, None));
    }

    /// Says in the headers alone how a request was handled; `status` is what the inner service answered, if it was asked.
    pub(crate) fn say(
        &self,
        handled: Handled,
        headers: &mut HeaderMap,
        status: Option<StatusCode>,
        key: Option<&[u8]>,
    ) {
        handled.say(self.0.name.as_deref(), headers, status, key);
    }

    /// How a request was handled, with what was `found` in a store.
    pub(crate) fn outcome(&self, handled: Handled, found: Option<Found>) -> Outcome {
        let (handling, reason) = match handled {
            Handled::Hit { ttl } if ttl.is_some_and(|ttl| ttl < 0) => (Handling::Stale, None),
            Handled::Hit { .. } => (Handling::Hit, None),
            Handled::Forwarded(forwarded) => {
                let reason = forwarded.detail.unwrap_or_else(|| forwarded.reason.as_str());
                let handling = match forwarded.reason {
                    Reason::Bypass | Reason::Method => Handling::Bypass,
                    _ if forwarded.collapsed => Handling::Coalesced,
                    _ => Handling::Miss,
                };
                (handling, Some(reason))
            }
        };
        let found = found.filter(|_| matches!(handled, Handled::Hit { .. }));
        let handling = if found.is_some_and(|found| found.is_stale) { Handling::Stale } else { handling };
        let data_type = self.0.data_type.clone();
        Outcome {
            outcome: handling,
            reason,
            data_type,
            tier: found.map(|found| found.tier),
            age: found.map(|found| found.age),
        }
    }
}

/// What was found in a store.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Found {
    pub(crate) tier: FoundIn,
    pub(crate) age: Duration,
    /// It is served although nobody would say that it is current.
    pub(crate) is_stale: bool,
}

/// Those of all data types.
#[derive(Debug, Default)]
pub(crate) struct Tellers {
    name: Option<Arc<str>>,
    types: BTreeMap<String, Teller>,
}

impl Tellers {
    /// `name` is the cache's in `Cache-Status`; without one that header is not said.
    pub(crate) fn new<'t>(name: Option<Arc<str>>, types: impl Iterator<Item = &'t str>) -> Self {
        let types = types.map(|data_type| (data_type.to_owned(), Teller::new(data_type, name.as_ref()))).collect();
        Self { name, types }
    }

    pub(crate) fn of(&self, data_type: &str) -> Teller {
        self.types.get(data_type).cloned().unwrap_or_else(|| Teller::new(data_type, self.name.as_ref()))
    }
}
