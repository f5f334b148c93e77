//! What keeps a slow or dead store from hurting anybody: a time budget for every call, a circuit breaker, and a journal
//! of invalidations that could not be delivered.
//!
//! A call that fails or is refused makes its request go to the origin; nothing waits longer than its budget. While the
//! journal holds anything, this process does not read the store: what it would read may be stale. Deliveries are retried
//! until they succeed.

mod breaker;
#[cfg(all(test, shuttle))]
mod interleavings;
mod journal;

use std::{
    fmt,
    pin::pin,
    sync::{Arc, PoisonError, Weak},
    time::Duration,
};

use tokio::time::Instant;

use super::{
    Entry, Exchange, Fence, Generation, Health, Inquiry, Lookup, Mark, Opened, Search, Store, StoreError, StoreFuture,
    TagGroup, Usage,
};
use crate::{
    catalog::Tier,
    clock::Millis,
    key::{Key, Tag},
    sync::{
        Handle, Mutex, MutexGuard, Notify,
        atomic::{AtomicBool, AtomicU64, Ordering},
        sleep, timeout, timeout_at,
    },
};
use breaker::Breaker;
use journal::{Batch, Journal, What};

/// Pauses between two attempts to deliver: at first, and at most.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(100));

/// How long one delivery from the journal may take.
const DELIVERY: Duration = Duration::from_secs(1);

/// And one that drops everything, which has to look for it.
const CLEARING: Duration = Duration::from_secs(60);

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
    /// Whether there is anything in it: each call asks.
    behind: AtomicBool,
    outage: Mutex<Option<Outage>>,
    /// Whether a task is delivering the journal.
    delivering: AtomicBool,
    emptied: Notify,
    /// Whether any write was fenced: then late invalidations leave the fences of other writers standing, as others do.
    fenced: AtomicBool,
    /// Calls that were refused, got no answer, were not made.
    errors: [AtomicU64; 3],
}

/// While the journal holds anything.
struct Outage {
    since: Instant,
    writes: u64,
    why: Arc<str>,
}

impl<S: fmt::Debug> fmt::Debug for Shared<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("store", &self.store).field("journal", &self.journal).finish_non_exhaustive()
    }
}

impl<S: Store> Guard<S> {
    /// Guards `store` with the default budgets: 50 ms for a read or a fill, 1 s for an invalidation.
    ///
    /// The breaker opens when at least half of at least 20 calls within 10 s get no answer within their budget, for 1 s at
    /// first and doubling to 5 s; then one call tries.
    pub fn new(store: S) -> Self {
        let shared = Shared {
            store,
            breaker: Breaker::new(),
            journal: Mutex::default(),
            behind: AtomicBool::new(false),
            outage: Mutex::default(),
            delivering: AtomicBool::new(false),
            emptied: Notify::new(),
            fenced: AtomicBool::new(false),
            errors: Default::default(),
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

    /// What it guards.
    #[cfg(any(feature = "memcached", feature = "redis"))]
    pub(crate) fn inner(&self) -> &S {
        &self.shared.store
    }

    /// For those who look on alone: what goes wrong is no trouble of the store's, and nobody waits for it.
    async fn looks_on<'a, T, F>(&'a self, call: impl FnOnce(&'a S) -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        if self.shared.is_behind() {
            return Err(StoreError::away("invalidations wait to be delivered first"));
        }
        timeout(DELIVERY, call(&self.shared.store)).await.unwrap_or_else(|_| Err(StoreError::unreachable("no answer")))
    }

    /// Makes one call under the budget, if the breaker lets it. A store may begin with it before its future is polled, so it is
    /// not asked before that is known.
    pub(crate) async fn call<'a, T, F>(&'a self, call: impl FnOnce(&'a S) -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        let shared = &self.shared;
        if shared.is_behind() {
            // The runtime in which that was begun may be gone.
            shared.deliver();
            shared.errors[2].fetch_add(1, Ordering::Relaxed);
            return Err(StoreError::away("invalidations wait to be delivered first"));
        }
        let Some(permit) = shared.breaker.permit() else {
            shared.errors[2].fetch_add(1, Ordering::Relaxed);
            return Err(StoreError::away("the circuit breaker is open"));
        };
        let (deadline, mut call) = (Instant::now() + self.budget, pin!(call(&shared.store)));
        let mut answer = timeout_at(deadline, call.as_mut()).await;
        if answer.is_err() {
            // For as long as something has kept this thread from hearing that it is time, it has not heard the store either.
            answer = timeout(deadline.elapsed(), call).await;
        }
        let no_answer = |_| Err(StoreError::unreachable(format!("no answer within {:?}", self.budget)));
        let result = answer.unwrap_or_else(no_answer);
        match &result {
            Err(error) if error.is_silence() => {
                shared.errors[1].fetch_add(1, Ordering::Relaxed);
                permit.failed();
            }
            // Who was not asked has shown neither that it answers nor that it does not.
            Err(error) if error.is_away() => {
                shared.errors[2].fetch_add(1, Ordering::Relaxed);
                drop(permit);
            }
            Err(_) => {
                shared.errors[0].fetch_add(1, Ordering::Relaxed);
                permit.succeeded();
            }
            // An answer, even one that says no, is a sign of life.
            _ => permit.succeeded(),
        }
        result
    }
}

impl<S: Store> Shared<S> {
    fn is_behind(&self) -> bool {
        self.behind.load(Ordering::SeqCst)
    }

    fn journal(&self) -> MutexGuard<'_, Journal> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn outage(&self) -> MutexGuard<'_, Option<Outage>> {
        self.outage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what was not delivered. It is said when that begins, and when it is over.
    fn postpone(&self, what: &What, why: &Arc<str>) {
        let mut journal = self.journal();
        match what {
            What::Groups(groups) => journal.add(groups),
            What::Everything => journal.add_everything(),
        }
        self.behind.store(!journal.is_empty(), Ordering::SeqCst);
        let mut outage = self.outage();
        if outage.is_none() {
            tracing::error!(
                %why,
                "an invalidation did not reach the store: this process serves from the origin, others may serve what is \
                 stale until it is delivered"
            );
        }
        let outage = outage.get_or_insert_with(|| Outage { since: Instant::now(), writes: 0, why: why.clone() });
        outage.writes += 1;
        outage.why = why.clone();
    }

    /// Strikes out what was delivered.
    fn strike(&self, batch: &Batch) {
        let over = {
            let mut journal = self.journal();
            journal.delivered(batch);
            if !journal.is_empty() {
                return;
            }
            // Before anything is added: what is, begins another.
            let over = self.outage().take();
            self.behind.store(false, Ordering::SeqCst);
            over
        };
        if let Some(Outage { since, writes, .. }) = over {
            let after = since.elapsed();
            tracing::warn!(writes, ?after, "the store has been told of all invalidations that did not reach it");
        }
        self.emptied.notify_waiters();
    }

    /// Delivers what is in the journal, for as long as there is something and somebody holds the store.
    fn deliver(self: &Arc<Self>) {
        let Ok(runtime) = Handle::try_current() else { return };
        // In one order with what is behind: either this finds it over, or who ends it finds that there is something.
        if self.delivering.swap(true, Ordering::SeqCst) {
            return;
        }
        let delivering = Delivering { shared: Arc::downgrade(self), is_done: false };
        runtime.spawn(async move {
            let mut delivering = delivering;
            let mut pause = RETRY.0;
            while let Some(shared) = delivering.shared.upgrade() {
                let Some(batch) = shared.journal().front() else {
                    delivering.is_done = true;
                    return;
                };
                match shared.attempt(&batch.what).await {
                    Ok(()) => {
                        shared.strike(&batch);
                        pause = RETRY.0;
                    }
                    Err(error) => {
                        tracing::debug!(%error, "an invalidation is still not delivered");
                        drop(shared);
                        sleep(pause).await;
                        pause = (pause * 2).min(RETRY.1);
                    }
                }
            }
        });
    }

    async fn attempt(&self, what: &What) -> Result<(), StoreError> {
        let fence = self.fenced.load(Ordering::Relaxed).then_some(&Fence::NOBODY);
        let within = |budget| move |_| StoreError::unreachable(format!("not acknowledged within {budget:?}"));
        match what {
            What::Groups(groups) => {
                let delivered = timeout(DELIVERY, self.store.invalidate(groups, fence)).await;
                delivered.map_err(within(DELIVERY))?.map(drop)
            }
            What::Everything => timeout(CLEARING, self.store.clear()).await.map_err(within(CLEARING))?,
        }
    }
}

/// A task that delivers the journal; when it ends, in whatever way, another may.
struct Delivering<S: Store> {
    shared: Weak<Shared<S>>,
    /// It has not just gone down with its runtime.
    is_done: bool,
}

impl<S: Store> Drop for Delivering<S> {
    fn drop(&mut self) {
        if let Some(shared) = self.shared.upgrade() {
            shared.delivering.store(false, Ordering::SeqCst);
            // Something may have been added since it looked.
            if self.is_done && shared.is_behind() {
                shared.deliver();
            }
        }
    }
}

impl<S: Store> Store for Guard<S> {
    fn lookup<'a>(&'a self, inquiry: Inquiry<'a>) -> StoreFuture<'a, Lookup> {
        Box::pin(self.call(move |store| store.lookup(inquiry)))
    }

    fn open<'a>(&'a self, tags: &'a [Tag]) -> StoreFuture<'a, Opened> {
        Box::pin(self.call(move |store| store.open(tags)))
    }

    fn extend<'a>(&'a self, mark: Mark, tags: &'a [Tag]) -> StoreFuture<'a, Option<Vec<Generation>>> {
        Box::pin(self.call(move |store| store.extend(mark, tags)))
    }

    fn fill<'a>(&'a self, key: &'a Key, entry: Arc<Entry>, tier: Tier, now: Millis) -> StoreFuture<'a, ()> {
        Box::pin(self.call(move |store| store.fill(key, entry, tier, now)))
    }

    fn claim<'a>(&'a self, key: &'a Key, lease: Duration) -> StoreFuture<'a, bool> {
        Box::pin(self.call(move |store| store.claim(key, lease)))
    }

    fn release<'a>(&'a self, key: &'a Key) -> StoreFuture<'a, ()> {
        Box::pin(self.call(move |store| store.release(key)))
    }

    fn fence<'a>(&'a self, groups: &'a [TagGroup], fence: &'a Fence) -> StoreFuture<'a, ()> {
        Box::pin(async move {
            self.shared.fenced.store(true, Ordering::Relaxed);
            match timeout(self.invalidate_budget, self.shared.store.fence(groups, fence)).await {
                Ok(result) => result,
                Err(_) => Err(StoreError::unreachable(format!("not acknowledged within {:?}", self.invalidate_budget))),
            }
        })
    }

    fn invalidate<'a>(&'a self, groups: &'a [TagGroup], fence: Option<&'a Fence>) -> StoreFuture<'a, Vec<u64>> {
        let shared = &self.shared;
        if fence.is_some() {
            shared.fenced.store(true, Ordering::Relaxed);
        }
        Box::pin(async move {
            // What has not been delivered when the budget is over is in the journal, and should this future be dropped, too.
            let mut pending = Pending::new(shared, What::Groups(groups.to_vec()));
            // Behind the journal there is nothing to wait for: the outage is known.
            let budget = if shared.is_behind() { Duration::ZERO } else { self.invalidate_budget };
            let deadline = Instant::now() + budget;
            let mut last = None;
            while let Ok(attempt) = timeout_at(deadline, shared.store.invalidate(groups, fence)).await {
                match attempt {
                    Ok(counts) => {
                        pending.why = None;
                        return Ok(counts);
                    }
                    Err(error) => {
                        pending.why = Some(error.to_string().into());
                        last = Some(error);
                    }
                }
                // A refusal may come at once, also after the deadline.
                if timeout_at(deadline, sleep(RETRY.0)).await.is_err() {
                    break;
                }
            }
            let no_answer = || StoreError::unreachable(format!("not acknowledged within {budget:?}"));
            let error = last.unwrap_or_else(no_answer);
            pending.why = Some(error.to_string().into());
            Err(error)
        })
    }

    fn clear(&self) -> StoreFuture<'_, ()> {
        let shared = &self.shared;
        Box::pin(async move {
            let mut pending = Pending::new(shared, What::Everything);
            let result = timeout(CLEARING, shared.store.clear()).await;
            let result = result.unwrap_or_else(|_| Err(StoreError::unreachable("the store is not cleared in time")));
            pending.why = result.as_ref().err().map(|error| error.to_string().into());
            result
        })
    }

    fn is_shared(&self) -> bool {
        self.shared.store.is_shared()
    }

    fn health(&self) -> Health {
        let health = self.shared.store.health();
        if let Health::Down(_) = health {
            return health;
        }
        if let Some(outage) = &*self.shared.outage() {
            return Health::Down(format!("invalidations wait to be delivered: {}", outage.why).into());
        }
        match (health, self.shared.breaker.is_open()) {
            (Health::Ok, true) => Health::Degraded("the circuit breaker is open: the store is too slow".into()),
            (health, _) => health,
        }
    }

    fn refuses(&self, tier: Tier) -> Option<&'static str> {
        self.shared.store.refuses(tier)
    }

    fn count<'a>(&'a self, groups: &'a [TagGroup]) -> StoreFuture<'a, Vec<u64>> {
        Box::pin(self.call(move |store| store.count(groups)))
    }

    fn search<'a>(&'a self, search: Search<'a>) -> StoreFuture<'a, Vec<Key>> {
        Box::pin(self.looks_on(move |store| store.search(search)))
    }

    fn exchange<'a>(&'a self, exchange: Exchange<'a>) -> StoreFuture<'a, Vec<Vec<u8>>> {
        Box::pin(self.looks_on(move |store| store.exchange(exchange)))
    }

    fn note<'a>(&'a self, name: &'a str, note: &'a [u8]) -> StoreFuture<'a, ()> {
        Box::pin(self.looks_on(move |store| store.note(name, note)))
    }

    fn noted<'a>(&'a self, name: &'a str) -> StoreFuture<'a, Option<Vec<u8>>> {
        Box::pin(self.looks_on(move |store| store.noted(name)))
    }

    fn usage(&self) -> Usage {
        let errors = ["refused", "silent", "away"].into_iter().zip(&self.shared.errors);
        let errors = errors.map(|(kind, count)| (kind, count.load(Ordering::Relaxed))).collect();
        Usage { journal_tags: self.shared.journal().len() as u64, errors, ..self.shared.store.usage() }
    }

    fn drain(&self, within: Duration) -> StoreFuture<'_, usize> {
        let shared = &self.shared;
        Box::pin(async move {
            let emptied = async {
                loop {
                    let emptied = shared.emptied.notified();
                    if !shared.is_behind() {
                        return;
                    }
                    shared.deliver();
                    emptied.await;
                }
            };
            let _ = timeout(within, emptied).await;
            Ok(shared.journal().len())
        })
    }
}

/// An invalidation that is not acknowledged yet; dropped, it goes to the journal.
struct Pending<'a, S: Store> {
    shared: &'a Arc<Shared<S>>,
    what: What,
    /// Why not; `None` once it is.
    why: Option<Arc<str>>,
}

impl<'a, S: Store> Pending<'a, S> {
    fn new(shared: &'a Arc<Shared<S>>, what: What) -> Self {
        Self { shared, what, why: Some("its caller went away".into()) }
    }
}

impl<S: Store> Drop for Pending<'_, S> {
    fn drop(&mut self) {
        if let Some(why) = &self.why {
            self.shared.postpone(&self.what, why);
            self.shared.deliver();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::MemoryStore;

    /// A store may do at once what it is asked. What it would read before it is known that it may be read is no answer.
    #[tokio::test]
    async fn a_store_is_asked_when_its_answer_is_waited_for() {
        let guard = Guard::new(MemoryStore::new(1 << 20));
        let tags = [Tag::entity(b"s{t}", "doc", "doc", b"1")];
        let before = guard.open(&tags).await.unwrap().generations;
        let read = guard.open(&tags);
        guard.invalidate(&[TagGroup::new("doc", tags.to_vec())], None).await.unwrap();
        assert_ne!(read.await.unwrap().generations, before);
    }

    /// A store that says no works, and one that was not asked has shown nothing: each is counted as what it is.
    #[tokio::test(start_paused = true)]
    async fn only_silence_opens_the_breaker() {
        type Make = fn(&'static str) -> StoreError;
        let answers: [(Option<Make>, [u64; 3]); 4] = [
            (Some(StoreError::new), [100, 0, 0]),
            (Some(StoreError::unreachable), [0, 20, 80]),
            (Some(StoreError::away), [0, 0, 100]),
            (None, [0, 0, 0]),
        ];
        for (answer, counts) in answers {
            let guard = Guard::new(MemoryStore::new(1 << 20));
            for _ in 0..100 {
                assert_eq!(
                    guard.call(|_| async { answer.map_or(Ok(()), |make| Err(make("why"))) }).await.is_err(),
                    answer.is_some()
                );
            }
            assert_eq!(guard.usage().errors, Vec::from_iter(["refused", "silent", "away"].into_iter().zip(counts)));
            assert_eq!(matches!(guard.health(), Health::Degraded(_)), counts[1] > 0, "{counts:?}");
        }
        let guard = Guard::new(MemoryStore::new(1 << 20));
        let error = guard.call(|_| std::future::pending::<Result<(), _>>()).await.unwrap_err();
        assert!(error.is_silence() && error.to_string().contains("no answer within 50ms"), "{error}");
    }

    /// A thread that is kept busy hears neither the clock nor the store.
    #[tokio::test]
    async fn who_did_not_listen_has_heard_no_silence() {
        let guard = Guard::new(MemoryStore::new(1 << 20)).budget(Duration::from_millis(20));
        let answers = || {
            let (tx, rx) = tokio::sync::oneshot::channel();
            // Asked as soon as this thread comes to it.
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(2)).await;
                let _ = tx.send(());
            });
            rx
        };
        let asked = guard.call(|_| async { answers().await.map_err(|_| StoreError::new("gone")) });
        let busy = async { std::thread::sleep(Duration::from_millis(200)) };
        let (answer, ()) = tokio::join!(asked, busy);
        answer.unwrap();
        assert_eq!(guard.usage().errors, [("refused", 0), ("silent", 0), ("away", 0)]);
    }

    #[tokio::test]
    async fn it_says_what_is_undelivered() {
        let guard = Guard::new(MemoryStore::new(1 << 20));
        let tag = Tag::entity(b"s{t}", "doc", "doc", b"1");
        guard.shared.journal().add(&[TagGroup::new("doc", vec![tag])]);
        assert_eq!(guard.usage().journal_tags, 1);
        guard.shared.journal().add_everything();
        assert_eq!(guard.usage().journal_tags, 1, "that is all there is to tell");
    }
}
