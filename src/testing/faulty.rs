//! A store that can be told to be slow, behind or gone.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::time::sleep;

use crate::{
    catalog::Tier,
    clock::Millis,
    key::{Key, Tag},
    store::{
        Entry, Exchange, Fence, Generation, Health, Inquiry, Lookup, Mark, Opened, Search, Store, StoreError,
        StoreFuture, TagGroup, Usage,
    },
};

/// A store that can be told to be slow, behind or gone: what a shared store is at times. Over a [`MemoryStore`] it stands in for
/// one; as every store that calls may fail of, it belongs into a [`Guard`].
///
/// ```
/// # use std::time::Duration;
/// # use tower_cache_aside::{Cache, DataType, Ttl, store::{Guard, MemoryStore}, testing::Faulty};
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let store = Faulty::new(MemoryStore::new(64 << 20));
/// let faults = store.faults();
/// let agents = DataType::new("agent", Ttl::Standard);
/// let cache = Cache::builder("docs").data_type(agents).store(Guard::new(store)).build()?;
///
/// faults.gone();
/// let report = cache.invalidate("acme").mutated("agent", "42").run().await?;
/// assert_eq!(report.undelivered(), 1); // it waits in the journal, and nothing is read meanwhile
/// faults.heal();
/// assert_eq!(cache.drain(Duration::from_secs(10)).await.undelivered, 0);
/// # Ok(()) }
/// ```
///
/// [`MemoryStore`]: crate::store::MemoryStore
/// [`Guard`]: crate::store::Guard
pub struct Faulty {
    store: Arc<dyn Store>,
    faults: Faults,
}

/// What a [`Faulty`] store is told. Its clones are about the same store; what is told counts for calls that begin later.
#[derive(Clone, Debug, Default)]
pub struct Faults(Arc<Mutex<Fault>>);

#[derive(Clone, Copy, Debug, Default)]
enum Fault {
    #[default]
    None,
    Slow(Duration),
    Behind(Duration),
    Gone,
}

impl Faults {
    /// Every call is done at once, and answered so much later. To a caller that does not wait so long, the answer is lost.
    pub fn slow(&self, by: Duration) {
        self.set(Fault::Slow(by));
    }

    /// Reads are answered at once, but what is written (entries, drops, fences) arrives so much later, and is acknowledged then:
    /// also when the caller has given up waiting.
    pub fn behind(&self, by: Duration) {
        self.set(Fault::Behind(by));
    }

    /// Every call fails at once, and nothing of it arrives. The store says that it is down.
    pub fn gone(&self) {
        self.set(Fault::Gone);
    }

    /// Nothing is wrong any more.
    pub fn heal(&self) {
        self.set(Fault::None);
    }

    fn set(&self, fault: Fault) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = fault;
    }

    fn now(&self) -> Fault {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Faulty {
    /// This store, with which nothing is wrong yet.
    pub fn new(store: impl Store) -> Self {
        Self { store: Arc::new(store), faults: Faults::default() }
    }

    /// To tell it what is wrong.
    pub fn faults(&self) -> Faults {
        self.faults.clone()
    }

    /// The same store as another process reaches it, with faults of its own.
    #[must_use]
    pub fn link(&self) -> Self {
        Self { store: self.store.clone(), faults: Faults::default() }
    }

    /// A store may begin with a call before its future is polled.
    async fn call<'a, T, F>(&'a self, call: impl FnOnce(&'a Arc<dyn Store>) -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        match self.faults.now() {
            Fault::Gone => Err(gone()),
            Fault::Slow(by) => {
                let done = call(&self.store).await;
                sleep(by).await;
                done
            }
            Fault::None | Fault::Behind(_) => call(&self.store).await,
        }
    }

    async fn write<T, F>(&self, write: impl FnOnce(Arc<dyn Store>) -> F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, StoreError>> + Send + 'static,
    {
        let write = write(self.store.clone());
        let Fault::Behind(by) = self.faults.now() else { return self.call(|_| write).await };
        let late = tokio::spawn(async move {
            sleep(by).await;
            write.await
        });
        late.await.unwrap_or_else(|_| Err(gone()))
    }
}

fn gone() -> StoreError {
    StoreError::unreachable("the store is gone, as the test has told it")
}

impl fmt::Debug for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Faulty").field("faults", &self.faults).finish_non_exhaustive()
    }
}

impl Store for Faulty {
    fn peek(&self, key: &[u8], now: Millis) -> Option<Arc<Entry>> {
        match self.faults.now() {
            Fault::None | Fault::Behind(_) => self.store.peek(key, now),
            Fault::Slow(_) | Fault::Gone => None,
        }
    }

    fn held(&self, key: &[u8], tier: Tier) -> Option<Arc<Entry>> {
        self.store.held(key, tier)
    }

    fn is_current<'a>(&'a self, key: &'a [u8], entry: &'a Entry) -> StoreFuture<'a, bool> {
        Box::pin(self.call(move |store| store.is_current(key, entry)))
    }

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
        let key = key.clone();
        Box::pin(self.write(move |store| async move { store.fill(&key, entry, tier, now).await }))
    }

    fn invalidate<'a>(&'a self, groups: &'a [TagGroup], fence: Option<&'a Fence>) -> StoreFuture<'a, Vec<u64>> {
        let (groups, fence) = (groups.to_vec(), fence.cloned());
        Box::pin(self.write(move |store| async move { store.invalidate(&groups, fence.as_ref()).await }))
    }

    fn fence<'a>(&'a self, groups: &'a [TagGroup], fence: &'a Fence) -> StoreFuture<'a, ()> {
        let (groups, fence) = (groups.to_vec(), fence.clone());
        Box::pin(self.write(move |store| async move { store.fence(&groups, &fence).await }))
    }

    fn claim<'a>(&'a self, key: &'a Key, lease: Duration) -> StoreFuture<'a, bool> {
        Box::pin(self.call(move |store| store.claim(key, lease)))
    }

    fn release<'a>(&'a self, key: &'a Key) -> StoreFuture<'a, ()> {
        Box::pin(self.call(move |store| store.release(key)))
    }

    fn clear(&self) -> StoreFuture<'_, ()> {
        Box::pin(self.write(|store| async move { store.clear().await }))
    }

    fn health(&self) -> Health {
        match self.faults.now() {
            Fault::Gone => Health::Down("the store is gone, as the test has told it".into()),
            _ => self.store.health(),
        }
    }

    fn count<'a>(&'a self, groups: &'a [TagGroup]) -> StoreFuture<'a, Vec<u64>> {
        Box::pin(self.call(move |store| store.count(groups)))
    }

    fn search<'a>(&'a self, search: Search<'a>) -> StoreFuture<'a, Vec<Key>> {
        Box::pin(self.call(move |store| store.search(search)))
    }

    fn exchange<'a>(&'a self, exchange: Exchange<'a>) -> StoreFuture<'a, Vec<Vec<u8>>> {
        Box::pin(self.call(move |store| store.exchange(exchange)))
    }

    fn note<'a>(&'a self, name: &'a str, note: &'a [u8]) -> StoreFuture<'a, ()> {
        Box::pin(self.call(move |store| store.note(name, note)))
    }

    fn noted<'a>(&'a self, name: &'a str) -> StoreFuture<'a, Option<Vec<u8>>> {
        Box::pin(self.call(move |store| store.noted(name)))
    }

    fn usage(&self) -> Usage {
        self.store.usage()
    }

    fn drain(&self, within: Duration) -> StoreFuture<'_, usize> {
        self.store.drain(within)
    }
}
