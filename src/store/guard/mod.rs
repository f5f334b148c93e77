//! What keeps a slow or dead store from hurting anybody: a time budget for every call, a circuit breaker, and a journal
//! of invalidations that could not be delivered.
//!
//! A call that fails or is refused makes its request go to the origin; nothing waits longer than its budget. While the
//! journal holds anything, this process does not read the store: what it would read may be stale. Deliveries are retried
//! until they succeed.

mod breaker;
mod journal;

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{runtime::Handle, time::timeout};

use super::{Entry, Fence, Generation, Lookup, Mark, Opened, Store, StoreError, StoreFuture, TagGroup};
use crate::{
    catalog::Tier,
    key::{Key, Tag},
};
use breaker::Breaker;
use journal::Journal;

/// Pauses between two attempts to deliver the journal.
const RETRY: Duration = Duration::from_millis(50);

/// Wraps a [`Store`] that is reached over a network.
#[derive(Debug)]
pub struct Guard<S> {
    shared: Arc<Shared<S>>,
    budget: Duration,
    invalidate_budget: Duration,
}

struct Shared<S> {
    store: S,
    breaker: Breaker,
    journal: Mutex<Journal>,
    /// Whether a task is delivering the journal.
    delivering: AtomicBool,
    /// Whether any write was fenced: then late invalidations leave the fences of other writers standing, as others do.
    fenced: AtomicBool,
}

impl<S: fmt::Debug> fmt::Debug for Shared<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("store", &self.store).field("journal", &self.journal).finish_non_exhaustive()
    }
}

impl<S: Store> Guard<S> {
    /// Guards `store` with the default budgets: 50 ms for a read or a fill, 1 s for an invalidation.
    ///
    /// The breaker opens when at least half of at least 20 calls within 10 s fail or exceed their budget, for 1 s at
    /// first and doubling to 5 s; then one call tries.
    pub fn new(store: S) -> Self {
        let shared = Shared {
            store,
            breaker: Breaker::new(),
            journal: Mutex::default(),
            delivering: AtomicBool::new(false),
            fenced: AtomicBool::new(false),
        };
        Self { shared: Arc::new(shared), budget: Duration::from_millis(50), invalidate_budget: Duration::from_secs(1) }
    }

    /// How long a read or a fill may take before its request goes to the origin; by default 50 ms.
    #[must_use]
    pub fn budget(mut self, budget: Duration) -> Self {
        self.budget = budget;
        self
    }

    /// How long a write waits for its invalidation to be acknowledged before it goes to the journal; by default 1 s.
    #[must_use]
    pub fn invalidate_budget(mut self, budget: Duration) -> Self {
        self.invalidate_budget = budget;
        self
    }

    /// Makes a call of the store's own under the same budget and breaker.
    pub(crate) async fn guarded<'a, T, F>(&'a self, call: impl FnOnce(&'a S) -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        self.call(call(&self.shared.store)).await
    }

    pub(crate) fn inner(&self) -> &S {
        &self.shared.store
    }

    /// Makes one call under the budget, if the breaker lets it.
    async fn call<T>(&self, call: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
        let shared = &self.shared;
        if shared.is_behind() {
            return Err(StoreError::unreachable("invalidations wait to be delivered first"));
        }
        let Some(permit) = shared.breaker.permit() else {
            return Err(StoreError::unreachable("the circuit breaker is open"));
        };
        let result = match timeout(self.budget, call).await {
            Ok(result) => result,
            Err(_) => Err(StoreError::unreachable("over the time budget")),
        };
        match &result {
            Err(error) if error.is_unreachable() => permit.failed(),
            // An answer, even one that says no, is a sign of life.
            _ => permit.succeeded(),
        }
        result
    }
}

impl<S: Store> Shared<S> {
    fn is_behind(&self) -> bool {
        !self.journal().is_empty()
    }

    fn journal(&self) -> std::sync::MutexGuard<'_, Journal> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Delivers what is in the journal, for as long as there is something and somebody holds the store.
    fn deliver(self: &Arc<Self>) {
        let Ok(runtime) = Handle::try_current() else { return };
        if self.delivering.swap(true, Ordering::AcqRel) {
            return;
        }
        let weak: Weak<Self> = Arc::downgrade(self);
        runtime.spawn(async move {
            while let Some(shared) = weak.upgrade() {
                let Some(batch) = shared.journal().front() else {
                    shared.delivering.store(false, Ordering::Release);
                    // Something may have been added since.
                    if shared.is_behind() {
                        shared.deliver();
                    }
                    return;
                };
                let fence = shared.fenced.load(Ordering::Relaxed).then_some(&Fence::NOBODY);
                match timeout(Duration::from_secs(1), shared.store.invalidate(&batch.groups, fence)).await {
                    Ok(Ok(_)) => {
                        let left = shared.journal().delivered(&batch);
                        tracing::info!(left, "undelivered invalidations reached the store");
                    }
                    other => {
                        if let Ok(Err(error)) = other {
                            tracing::debug!(%error, "an invalidation is still not delivered");
                        }
                        drop(shared);
                        tokio::time::sleep(RETRY).await;
                    }
                }
            }
        });
    }
}

impl<S: Store> Store for Guard<S> {
    fn lookup<'a>(&'a self, key: &'a Key, tags: &'a [Tag], tier: Tier) -> StoreFuture<'a, Lookup> {
        Box::pin(self.call(self.shared.store.lookup(key, tags, tier)))
    }

    fn open<'a>(&'a self, tags: &'a [Tag]) -> StoreFuture<'a, Opened> {
        Box::pin(self.call(self.shared.store.open(tags)))
    }

    fn extend<'a>(&'a self, mark: Mark, tags: &'a [Tag]) -> StoreFuture<'a, Option<Vec<Generation>>> {
        Box::pin(self.call(self.shared.store.extend(mark, tags)))
    }

    fn fill<'a>(&'a self, key: &'a Key, entry: Arc<Entry>, tier: Tier) -> StoreFuture<'a, ()> {
        Box::pin(self.call(self.shared.store.fill(key, entry, tier)))
    }

    fn claim<'a>(&'a self, key: &'a Key, lease: Duration) -> StoreFuture<'a, bool> {
        Box::pin(self.call(self.shared.store.claim(key, lease)))
    }

    fn release<'a>(&'a self, key: &'a Key) -> StoreFuture<'a, ()> {
        Box::pin(self.call(self.shared.store.release(key)))
    }

    fn fence<'a>(&'a self, groups: &'a [TagGroup], fence: &'a Fence) -> StoreFuture<'a, ()> {
        Box::pin(async move {
            match timeout(self.invalidate_budget, self.shared.store.fence(groups, fence)).await {
                Ok(result) => result,
                Err(_) => Err(StoreError::unreachable("over the time budget")),
            }
        })
    }

    fn invalidate<'a>(&'a self, groups: &'a [TagGroup], fence: Option<&'a Fence>) -> StoreFuture<'a, Vec<u64>> {
        let shared = &self.shared;
        if fence.is_some() {
            shared.fenced.store(true, Ordering::Relaxed);
        }
        let attempts = async move {
            loop {
                match shared.store.invalidate(groups, fence).await {
                    Err(error) if error.is_unreachable() => tokio::time::sleep(RETRY).await,
                    other => return other,
                }
            }
        };
        Box::pin(async move {
            // Whatever comes of it, and should this future be dropped: what was not acknowledged is in the journal.
            let mut pending = Pending { shared, groups, acknowledged: false };
            // Behind the journal there is nothing to wait for: the outage is known.
            let budget = if shared.is_behind() { Duration::ZERO } else { self.invalidate_budget };
            let result = timeout(budget, attempts).await;
            let result = result.unwrap_or_else(|_| Err(StoreError::unreachable("over the time budget")));
            pending.acknowledged = result.is_ok();
            result
        })
    }

    fn is_reachable(&self) -> bool {
        !self.shared.is_behind() && self.shared.store.is_reachable()
    }
}

/// An invalidation that is not acknowledged yet; dropped, it goes to the journal.
struct Pending<'a, S: Store> {
    shared: &'a Arc<Shared<S>>,
    groups: &'a [TagGroup],
    acknowledged: bool,
}

impl<S: Store> Drop for Pending<'_, S> {
    fn drop(&mut self) {
        if !self.acknowledged {
            self.shared.journal().add(self.groups);
            self.shared.deliver();
        }
    }
}
