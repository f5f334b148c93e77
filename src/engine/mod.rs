//! The protocol: generation-validated entries, and one flight per key.
//!
//! An entry is valid only while every generation that it was filled under is still current. A load captures the
//! generations of its tags *before* it begins, and stores its result under them; an invalidation drops generations. So
//! a load that read the database before a write can store what it read, at any time later, without anybody ever being
//! served it. Where a tag had no generation, the point in time is captured: one is made while the load is under way, and the
//! result stored only if the store proves that the tag was not dropped in between. Nothing here knows of HTTP or of a particular store.

mod attended;
mod capture;
mod fleet;
mod flight;
mod invalidated;
mod leader;
mod learned;
mod lookup;
mod obtain;
mod stale;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use foldhash::fast::RandomState;
use quick_cache::{
    Weighter,
    sync::{Cache as Memo, DefaultLifecycle},
};
use tokio::{
    runtime::Handle,
    task::JoinHandle,
    time::{Instant, timeout},
};
use tokio_util::task::TaskTracker;

use crate::{
    catalog::{Drops, Policy, Tier},
    clock::{Clock, Millis},
    key::{Key, Tag},
    store::{Entry, Fence, Health, Store, StoreError, TagGroup},
    sync::task_local,
};
pub(crate) use attended::Attended;
use flight::{Flight, Flights};
pub use invalidated::Invalidated;
pub(crate) use leader::{Leader, Sealed, beside};
use learned::Types;
#[cfg(feature = "admin")]
pub(crate) use lookup::Found;
pub(crate) use obtain::{Asker, Obtained, Source, Use};
pub(crate) use stale::Stale;

/// How long a key whose response could not be shared is loaded by each request on its own, without waiting.
const UNSHARED_FOR: Duration = Duration::from_secs(10);

/// Nobody waits longer for a drain.
const MAX_DRAIN: Duration = Duration::from_secs(86_400);

/// How many keys the engine remembers something about, about.
const MEMOS: usize = 16_384;

/// After this many failed flights a request stops waiting for others.
const MAX_ATTEMPTS: u32 = 3;

task_local! {
    /// The flights whose calls this task is a part of, the outermost first.
    static INSIDE: Inside;
}

/// Whose calls a task is a part of.
#[derive(Clone, Default)]
pub(crate) struct Inside(Arc<[Arc<Flight>]>);

impl Inside {
    fn current() -> Self {
        INSIDE.try_with(Self::clone).unwrap_or_default()
    }

    fn flights(&self) -> &[Arc<Flight>] {
        &self.0
    }

    /// That of a call. Without a leader it is a part of what the caller is.
    pub(crate) fn of(leader: Option<&Leader>) -> Self {
        leader.map_or_else(Self::current, |leader| {
            Self(leader.inside.0.iter().chain([&leader.flight]).cloned().collect())
        })
    }

    /// Polls the call, so that what it needs does not wait for itself.
    pub(crate) fn around<F: Future>(self, call: F) -> impl Future<Output = F::Output> {
        INSIDE.scope(self, call)
    }
}

/// The next engine's number.
static NUMBER: AtomicU64 = AtomicU64::new(1);

pub(crate) struct Engine {
    /// Its own in this process, for as long as that runs.
    number: u64,
    store: Arc<dyn Store>,
    flights: Flights,
    /// How many requests have stopped waiting for another's call.
    overdue: AtomicU64,
    memos: Memo<Key, Arc<KeyMemo>, Weight, RandomState>,
    types: Types,
    clock: Clock,
    /// Loads, writes and fills that go on without their clients.
    tasks: TaskTracker,
}

/// What earlier loads of a key taught. Lost without harm.
#[derive(Default, Clone)]
struct KeyMemo {
    /// Tags that the response declared, which the request does not name.
    late: Arc<[Tag]>,
    /// Until then its responses are not worth waiting for.
    unshared_until: Millis,
}

/// How many bytes a memo takes.
#[derive(Clone)]
struct Weight;

impl Weighter<Key, Arc<KeyMemo>> for Weight {
    fn weight(&self, key: &Key, memo: &Arc<KeyMemo>) -> u64 {
        let tags: usize = memo.late.iter().map(|tag| tag.0.len() + 48).sum();
        (key.0.len() + tags + 256) as u64
    }
}

impl Engine {
    /// `memory` is how many bytes it may take for what it remembers of keys.
    pub(crate) fn new(store: Arc<dyn Store>, clock: Clock, memory: u64) -> Self {
        let memos = Memo::with(MEMOS, memory, Weight, RandomState::default(), DefaultLifecycle::default());
        let tasks = TaskTracker::new();
        // Whoever waits, waits until there are none; that is no reason to take no more.
        tasks.close();
        Self {
            number: NUMBER.fetch_add(1, Ordering::Relaxed),
            store,
            flights: Flights::default(),
            overdue: AtomicU64::new(0),
            memos,
            types: Types::new(),
            clock,
            tasks,
        }
    }

    pub(crate) fn now(&self) -> Millis {
        self.clock.now()
    }

    /// A hit that needs no waiting, if it [suits](Entry::suited) this cache: another over the same store may have put it there.
    pub(crate) fn peek(
        &self,
        key: &[u8],
        now: Millis,
        suited: impl FnOnce(Arc<Entry>) -> Option<Arc<Entry>>,
    ) -> Option<Arc<Entry>> {
        suited(self.store.peek(key, now)?).filter(|entry| entry.is_fresh(now))
    }

    /// The same of what this process holds, and may answer with once [it is known to be current](Self::is_current).
    pub(crate) fn held(
        &self,
        key: &[u8],
        tier: Tier,
        now: Millis,
        suited: impl FnOnce(Arc<Entry>) -> Option<Arc<Entry>>,
    ) -> Option<Arc<Entry>> {
        suited(self.store.held(key, tier)?).filter(|entry| entry.is_fresh(now))
    }

    /// Whether an entry suits, by tags that follow from its key. That one does as it is, is remembered: then they are made no more.
    pub(crate) fn suited<T: AsRef<[Tag]>>(
        &self,
        entry: Arc<Entry>,
        tags: impl FnOnce() -> T,
        policy: &Policy,
    ) -> Option<Arc<Entry>> {
        if entry.suits(self.number) {
            return Some(entry);
        }
        let suited = entry.clone().suited(tags().as_ref(), policy.longest())?;
        if Arc::ptr_eq(&suited, &entry) {
            entry.note_suits(self.number);
        }
        Some(suited)
    }

    /// Whether nothing of an entry that is held has been dropped.
    pub(crate) async fn is_current(&self, key: &[u8], entry: &Entry) -> Result<bool, StoreError> {
        let is_current = self.store.is_current(key, entry).await;
        is_current.inspect_err(|error| tracing::debug!(%error, "store unavailable: calling the origin"))
    }

    /// Fences all these tags for a write that is about to begin.
    pub(crate) async fn fence(&self, drops: Drops, fence: &Fence) -> Result<(), StoreError> {
        self.store.fence(&tag_groups(drops), fence).await
    }

    /// Drops everything of everybody.
    pub(crate) async fn clear(&self) -> Result<(), StoreError> {
        self.store.clear().await
    }

    /// Whether other processes use the store, too.
    pub(crate) fn is_shared(&self) -> bool {
        self.store.is_shared()
    }

    /// How many requests have stopped waiting for another's call, for it took too long.
    #[cfg(feature = "stats")]
    pub(crate) fn overdue(&self) -> u64 {
        self.overdue.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// What the store takes.
    #[cfg(feature = "stats")]
    pub(crate) fn usage(&self) -> crate::store::Usage {
        self.store.usage()
    }

    /// How many entries these drops would make stale, by data type, as far as the store can tell.
    #[cfg(feature = "admin")]
    pub(crate) async fn count(&self, drops: &Drops) -> Result<Invalidated, StoreError> {
        let groups = tag_groups(drops.clone());
        let counts = self.store.count(&groups).await?;
        let lines = drops.groups.iter().map(|group| (group.line.clone(), group.data_type.clone()));
        Ok(Invalidated::new(lines.zip(counts.into_iter().chain(std::iter::repeat(0))), 0))
    }

    /// Keys of entries, for those who look on.
    #[cfg(feature = "admin")]
    pub(crate) async fn search(&self, search: crate::store::Search<'_>) -> Result<Vec<Key>, StoreError> {
        self.store.search(search).await
    }

    /// What the processes of the fleet say of themselves.
    #[cfg(feature = "stats")]
    pub(crate) async fn exchange(&self, exchange: crate::store::Exchange<'_>) -> Result<Vec<Vec<u8>>, StoreError> {
        self.store.exchange(exchange).await
    }

    /// The store, for what is no entry.
    pub(crate) fn store(&self) -> Arc<dyn Store> {
        self.store.clone()
    }

    /// How far behind the store may be in what is dropped elsewhere; `None` if nothing is.
    pub(crate) fn behind(&self) -> Option<Duration> {
        self.store.behind()
    }

    pub(crate) fn health(&self) -> Health {
        self.store.health()
    }

    /// Does this whatever becomes of who wanted it; [`drain`](Self::drain) waits for it. Within a runtime.
    pub(crate) fn spawn<F>(&self, task: F) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        self.tasks.spawn(task)
    }

    /// The same, in this runtime.
    pub(crate) fn spawn_on<F>(&self, task: F, runtime: &Handle) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        self.tasks.spawn_on(task, runtime)
    }

    /// Waits until nothing is under way.
    pub(crate) async fn settled(&self) {
        self.tasks.wait().await;
    }

    /// Waits for what is under way, and delivers what the store has not been told; how many tags are left.
    pub(crate) async fn drain(&self, within: Duration) -> usize {
        let within = within.min(MAX_DRAIN);
        let deadline = Instant::now() + within;
        let _ = timeout(within, self.settled()).await;
        let left = self.store.drain(deadline.saturating_duration_since(Instant::now())).await;
        left.unwrap_or_default()
    }

    /// Tags of the entry that the request does not name are looked up with it from now on.
    fn remember_late<'t>(&self, key: &Key, late: impl IntoIterator<Item = &'t Tag>) {
        let memo = self.memos.get(key).map_or_else(KeyMemo::default, |m| (*m).clone());
        self.memos.insert(key.clone(), Arc::new(KeyMemo { late: late.into_iter().cloned().collect(), ..memo }));
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
        let (counts, undelivered) = match self.store.invalidate(&groups, fence).await {
            Ok(counts) => (counts, 0),
            // The store says so, once; this is for those who ask about this one.
            Err(error) => {
                let tags = groups.iter().map(|group| group.tags.len()).sum();
                tracing::debug!(%error, tags, "an invalidation is not delivered yet");
                (vec![0; groups.len()], tags)
            }
        };
        let counts = lines.into_iter().zip(groups.into_iter().map(|g| g.data_type)).zip(counts);
        Invalidated::new(counts, undelivered)
    }
}

fn tag_groups(drops: Drops) -> Vec<TagGroup> {
    drops.groups.into_iter().map(|g| TagGroup::new(g.data_type, g.tags)).collect()
}
