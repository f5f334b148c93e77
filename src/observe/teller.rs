//! Who says, in a response, how its request was handled.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use http::{HeaderMap, StatusCode, response};

use super::{
    Observer,
    outcome::{FoundIn, Handling, Outcome, Served},
    watch::Watcher,
};
use crate::http::cache_status::{Handled, Reason};

/// What tells of requests of one data type.
#[derive(Clone, Debug)]
pub(crate) struct Teller(Arc<OfType>);

#[derive(Debug)]
struct OfType {
    data_type: Arc<str>,
    /// The cache's name in `Cache-Status`; without one the header is not said.
    name: Option<Arc<str>>,
    watcher: Arc<Watcher>,
}

impl Teller {
    fn new(data_type: &str, name: Option<&Arc<str>>, observer: &Arc<Observer>) -> Self {
        let watcher = Arc::new(Watcher::new(observer, data_type));
        Self(Arc::new(OfType { data_type: data_type.into(), name: name.cloned(), watcher }))
    }

    /// The cache's name in `Cache-Status`.
    pub(crate) fn name(&self) -> Option<&Arc<str>> {
        self.0.name.as_ref()
    }

    /// Who counts them.
    pub(crate) fn watcher(&self) -> &Arc<Watcher> {
        &self.0.watcher
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
                let reason = handled.reason();
                let handling = match forwarded.reason {
                    Reason::Bypass | Reason::Method => Handling::Bypass,
                    // What the request itself says.
                    Reason::Request
                        if forwarded.status.is_none() && ["no-store", "only-if-cached"].contains(&reason) =>
                    {
                        Handling::Bypass
                    }
                    _ if forwarded.collapsed => Handling::Coalesced,
                    _ => Handling::Miss,
                };
                (handling, Some(reason))
            }
        };
        let saved = found.filter(|_| handling != Handling::Miss).map_or(0, |found| found.load);
        let ttl = if let Handled::Hit { ttl } = handled { ttl } else { None };
        let kept = matches!(handled, Handled::Forwarded(forwarded) if forwarded.stored);
        let served = Served { bytes: found.map_or(0, |found| found.bytes), saved, ttl, kept };
        let found = found.filter(|_| matches!(handled, Handled::Hit { .. }));
        let handling = if found.is_some_and(|found| found.is_stale) { Handling::Stale } else { handling };
        let data_type = self.0.data_type.clone();
        let (tier, age) = (found.map(|found| found.tier), found.map(|found| found.age));
        Outcome { outcome: handling, reason, data_type, tier, age, served }
    }
}

/// What was found in a store.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Found {
    pub(crate) tier: FoundIn,
    pub(crate) age: Duration,
    /// It is served although nobody would say that it is current.
    pub(crate) is_stale: bool,
    /// How many milliseconds it took to load.
    pub(crate) load: u32,
    /// How long the body is that is sent of it.
    pub(crate) bytes: u64,
}

/// Those of all data types.
#[derive(Debug)]
pub(crate) struct Tellers {
    observer: Arc<Observer>,
    name: Option<Arc<str>>,
    types: BTreeMap<String, Teller>,
}

impl Tellers {
    /// `name` is the cache's in `Cache-Status`; without one that header is not said.
    pub(crate) fn new<'t>(
        name: Option<Arc<str>>,
        observer: &Arc<Observer>,
        types: impl Iterator<Item = &'t str>,
    ) -> Self {
        let teller = |data_type: &str| (data_type.to_owned(), Teller::new(data_type, name.as_ref(), observer));
        let types = types.map(teller).collect();
        Self { observer: observer.clone(), name, types }
    }

    pub(crate) fn of(&self, data_type: &str) -> Teller {
        self.types.get(data_type).cloned().unwrap_or_else(|| Teller::new(data_type, self.name.as_ref(), &self.observer))
    }
}
