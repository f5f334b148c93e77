//! The protocol: generation-validated entries, and one flight per key.
//!
//! An entry is valid only while every generation that it was filled under is still current. A load captures the
//! generations of its tags *before* it begins, and stores its result under them; an invalidation drops generations. So
//! a load that read the database before a write can store what it read, at any time later, without anybody ever being
//! served it. Nothing here knows of HTTP or of a particular store.

mod fleet;
mod flight;
mod invalidated;
mod leader;
mod lookup;
mod obtain;
mod stale;

use std::{sync::Arc, time::Duration};

use quick_cache::sync::Cache as Memo;

use crate::{
    catalog::Drops,
    clock::{Clock, Millis},
    key::{Key, Tag},
    store::{Entry, Fence, Store, StoreError, TagGroup},
};
use flight::Flights;
pub use invalidated::Invalidated;
pub(crate) use leader::{Leader, Sealed};
pub(crate) use obtain::{Asker, Obtained, Source, Use};
pub(crate) use stale::Stale;

/// How long a key whose response could not be shared is loaded by each request on its own, without waiting.
const UNSHARED_FOR: Duration = Duration::from_secs(10);

/// How many keys the engine remembers something about.
const MEMOS: usize = 65_536;

/// After this many failed flights a request stops waiting for others.
const MAX_ATTEMPTS: u32 = 3;

pub(crate) struct Engine {
    store: Arc<dyn Store>,
    flights: Flights,
    memos: Memo<Key, Arc<KeyMemo>>,
    clock: Clock,
}

/// What earlier loads of a key taught. Lost without harm.
#[derive(Default, Clone)]
struct KeyMemo {
    /// Tags that the response declared, which the request does not name.
    late: Arc<[Tag]>,
    /// Until then its responses are not worth waiting for.
    unshared_until: Millis,
}

impl Engine {
    pub(crate) fn new(store: Arc<dyn Store>, clock: Clock) -> Self {
        Self { store, flights: Flights::default(), memos: Memo::new(MEMOS), clock }
    }

    pub(crate) fn now(&self) -> Millis {
        self.clock.now()
    }

    /// A hit that needs no waiting.
    pub(crate) fn peek(&self, key: &[u8], now: Millis) -> Option<Arc<Entry>> {
        self.store.peek(key, now).filter(|entry| entry.is_fresh(now))
    }

    /// Fences all these tags for a write that is about to begin.
    pub(crate) async fn fence(&self, drops: Drops, fence: &Fence) -> Result<(), StoreError> {
        self.store.fence(&tag_groups(drops), fence).await
    }

    /// Whether an invalidation would reach the store now.
    pub(crate) fn is_reachable(&self) -> bool {
        self.store.is_reachable()
    }

    /// Tags of the entry that the request does not name are looked up with it from now on.
    fn remember_late(&self, key: &Key, late: &[Tag]) {
        let memo = self.memos.get(key).map_or_else(KeyMemo::default, |m| (*m).clone());
        self.memos.insert(key.clone(), Arc::new(KeyMemo { late: late.into(), ..memo }));
    }

    fn remember_unshared(&self, key: &Key) {
        let memo = self.memos.get(key).map_or_else(KeyMemo::default, |m| (*m).clone());
        let unshared_until = self.now() + UNSHARED_FOR.as_millis() as Millis;
        self.memos.insert(key.clone(), Arc::new(KeyMemo { unshared_until, ..memo }));
    }

    /// Drops the generations of all these tags, at once, and says how many entries that made stale.
    pub(crate) async fn invalidate(&self, drops: Drops, fence: Option<&Fence>) -> Invalidated {
        let lines: Vec<_> = drops.groups.iter().map(|g| g.line.clone()).collect();
        let groups = tag_groups(drops);
        let counts = match self.store.invalidate(&groups, fence).await {
            Ok(counts) => counts,
            Err(error) => {
                tracing::error!(%error, "invalidation did not reach the store yet");
                vec![0; groups.len()]
            }
        };
        Invalidated::new(lines.into_iter().zip(groups.into_iter().map(|g| g.data_type)).zip(counts))
    }
}

fn tag_groups(drops: Drops) -> Vec<TagGroup> {
    drops.groups.into_iter().map(|g| TagGroup::new(g.data_type, g.tags)).collect()
}
