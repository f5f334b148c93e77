//! Single flight across processes.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    Engine,
    flight::Landed,
    leader::Leader,
    lookup::{Begin, Validity, validity},
};
use crate::{key::Tag, store::Lookup};

/// How long a process may load a key for the fleet before others do as well.
const CLAIM: Duration = Duration::from_secs(3);

/// Pauses between two looks at whether the claim is free.
const PAUSES: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(50));

impl Engine {
    /// Leads for the fleet, or waits until the process that does has stored its entry.
    pub(super) async fn lead_fleet(&self, mut leader: Leader, tags: &[Tag]) -> Begin {
        let flight = leader.flight.clone();
        let asked = flight.tags();
        let start = Instant::now();
        let mut pause = PAUSES.0;
        // With something to serve meanwhile there is no need to wait: whoever has the claim refreshes it.
        let meanwhile = leader.stale.clone().filter(|stale| stale.serves_meanwhile(self.now()));
        loop {
            match self.store.claim(&leader.key, CLAIM).await {
                Ok(true) => leader.claimed = true,
                Ok(false) if meanwhile.is_some() => {
                    if let Some(stale) = meanwhile {
                        return Begin::Hit(stale.entry);
                    }
                }
                Ok(false) if start.elapsed() < CLAIM => {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(PAUSES.1);
                }
                // Unreachable, or held for too long by a process that may be dead.
                Ok(false) | Err(_) => return Begin::Lead(leader),
            }
            // Also after claiming: the last holder may have stored its entry just before.
            let found = self.ask(self.inquiry(&leader.key, asked, tags.len(), &leader.policy, self.now())).await;
            if let Ok(Lookup { entry: Some(entry), generations, .. }) = found {
                let valid = matches!(validity(&entry, tags, asked, &generations), Validity::Valid);
                if valid && entry.is_fresh(self.now()) {
                    leader.land(Landed::Done(entry.clone()));
                    return Begin::Collapsed(entry);
                }
            }
            if leader.claimed {
                return Begin::Lead(leader);
            }
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        catalog::{Coalesce, DataType, Lifetime, Tier},
        engine::lookup::tests::{Bench, SECOND, value},
        key::Key,
        store::{Entry, Fence, Generation, Inquiry, Mark, MemoryStore, Opened, Store, StoreFuture, TagGroup},
    };

    /// In which another process has every claim, for ever; and which is not here.
    pub(in crate::engine) struct Claimed(pub(in crate::engine) MemoryStore);

    impl Store for Claimed {
        fn claim<'a>(&'a self, _: &'a Key, _: Duration) -> StoreFuture<'a, bool> {
            Box::pin(std::future::ready(Ok(false)))
        }
        fn lookup<'a>(&'a self, inquiry: Inquiry<'a>) -> StoreFuture<'a, Lookup> {
            self.0.lookup(inquiry)
        }
        fn open<'a>(&'a self, tags: &'a [Tag]) -> StoreFuture<'a, Opened> {
            self.0.open(tags)
        }
        fn extend<'a>(&'a self, mark: Mark, tags: &'a [Tag]) -> StoreFuture<'a, Option<Vec<Generation>>> {
            self.0.extend(mark, tags)
        }
        fn fill<'a>(&'a self, key: &'a Key, entry: Arc<Entry>, tier: Tier, now: u64) -> StoreFuture<'a, ()> {
            self.0.fill(key, entry, tier, now)
        }
        fn invalidate<'a>(&'a self, groups: &'a [TagGroup], fence: Option<&'a Fence>) -> StoreFuture<'a, Vec<u64>> {
            self.0.invalidate(groups, fence)
        }
        fn fence<'a>(&'a self, groups: &'a [TagGroup], fence: &'a Fence) -> StoreFuture<'a, ()> {
            self.0.fence(groups, fence)
        }
        fn clear(&self) -> StoreFuture<'_, ()> {
            self.0.clear()
        }
    }

    /// Who has the claim may be dead: nobody waits for longer than a claim, nor at all with something to serve meanwhile.
    #[tokio::test(start_paused = true)]
    async fn a_claim_is_waited_for_no_longer_than_it_may_last() {
        let doc = DataType::new("doc", SECOND).coalesce(Coalesce::Fleet);
        let bench = Bench::of(doc, Claimed(MemoryStore::new(1 << 20)));
        let start = Instant::now();
        let leader = bench.lead().await;
        assert!((CLAIM..CLAIM + SECOND).contains(&start.elapsed()), "{:?}", start.elapsed());
        let life = Lifetime { refresh: SECOND * 60, ..Lifetime::fresh_for(Some(Duration::ZERO)) };
        leader.seal(value(), vec![], life, None).await.unwrap().store().await;
        let start = Instant::now();
        let begun = bench.begin().await;
        assert!(matches!(begun, Begin::Hit(_)) && start.elapsed().is_zero());
    }
}
