//! The simulated shared store, and the connections to it: each request and each reply is a task of its own, which comes late,
//! twice or never, whatever becomes of who sent it.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tower_cache_aside::{
    Key, Tag, Tier,
    store::{
        Entry, Fence, Generation, Health, Inquiry, Lookup, Mark, MemoryStore, Millis, Opened, Store, StoreError,
        StoreFuture, TagGroup,
    },
};

use crate::{
    dice::mix,
    plan::{Fault, THINGS},
    sabotage::Sabotage,
    world::World,
};

/// An entry and the generations there were when it was filled.
type Filled = (Arc<Entry>, Vec<Generation>);

/// The server: a store in this process, and what a checker knows of it.
pub struct Server {
    memory: MemoryStore,
    sabotage: Sabotage,
    filled: Mutex<HashMap<Key, Filled>>,
    opened: Mutex<HashMap<Vec<Tag>, Opened>>,
    claims: Mutex<HashMap<Key, u64>>,
    /// What a write of each thing must drop.
    pub cascades: [BTreeSet<Vec<u8>>; THINGS],
}

impl Server {
    pub fn new(sabotage: Sabotage, cascades: [BTreeSet<Vec<u8>>; THINGS]) -> Self {
        let (filled, opened, claims) = Default::default();
        Self { memory: MemoryStore::new(8 << 20), sabotage, filled, opened, claims, cascades }
    }

    async fn lookup(&self, Asked { key, tags, required, tier, longest, now }: Asked) -> Result<Lookup, StoreError> {
        let mut inquiry = Inquiry::new(&key, &tags, tier, now);
        (inquiry.required, inquiry.longest) = (required, longest);
        let found = self.memory.lookup(inquiry).await?;
        let filled = self.filled.lock().unwrap().get(&key).cloned();
        let Some((entry, generations)) = filled else { return Ok(found) };
        let stamps: Vec<_> = entry.stamps().iter().map(|s| s.tag.clone()).collect();
        let current = self.memory.lookup(Inquiry::new(&key, &stamps, tier, now)).await?.generations;
        let is_current = current.iter().flatten().eq(&generations);
        match self.sabotage {
            Sabotage::CaptureAfterTheLoad | Sabotage::WarmerCapturesAfterTheLoad if !is_current => Ok(found),
            Sabotage::SkipTheCheck | Sabotage::CaptureAfterTheLoad | Sabotage::WarmerCapturesAfterTheLoad => {
                let stamp = |tag: &Tag| entry.stamps().iter().find(|s| s.tag == *tag).map(|s| s.generation);
                let generations = tags.iter().map(stamp).collect();
                Ok(Lookup::new(Some(entry), generations))
            }
            _ => Ok(found),
        }
    }

    async fn open(&self, tags: Vec<Tag>) -> Result<Opened, StoreError> {
        let opened = self.memory.open(&tags).await?;
        if self.sabotage == Sabotage::JoinAnyFlight {
            return Ok(self.opened.lock().unwrap().entry(tags).or_insert(opened).clone());
        }
        Ok(opened)
    }

    async fn extend(&self, mark: Mark, tags: Vec<Tag>) -> Result<Option<Vec<Generation>>, StoreError> {
        if self.sabotage == Sabotage::BelieveLateTags {
            return Ok(Some(self.memory.open(&tags).await?.generations));
        }
        self.memory.extend(mark, &tags).await
    }

    async fn fill(&self, key: Key, entry: Arc<Entry>, tier: Tier, now: Millis, warms: bool) -> Result<(), StoreError> {
        if self.sabotage == Sabotage::WarmerCapturesAfterTheLoad && !warms {
            self.filled.lock().unwrap().remove(&key);
        } else if self.sabotage != Sabotage::None {
            let tags: Vec<_> = entry.stamps().iter().map(|s| s.tag.clone()).collect();
            let generations = self.memory.open(&tags).await?.generations;
            self.filled.lock().unwrap().insert(key.clone(), (entry.clone(), generations));
            self.opened.lock().unwrap().clear();
        }
        self.memory.fill(&key, entry, tier, now).await
    }

    /// The things whose cascade these tags are.
    fn things(&self, groups: &[TagGroup]) -> impl Iterator<Item = usize> {
        let tags: BTreeSet<_> = groups.iter().flat_map(|g| &g.tags).map(|tag| tag.as_bytes().to_vec()).collect();
        (0..THINGS).filter(move |thing| self.cascades[*thing].is_subset(&tags))
    }
}

/// What a look-up asks for.
#[derive(Clone)]
struct Asked {
    key: Key,
    tags: Vec<Tag>,
    required: usize,
    tier: Tier,
    longest: Option<Duration>,
    now: Millis,
}

/// The connection of one process.
#[derive(Clone)]
pub struct Line {
    pub world: Arc<World>,
    pub process: usize,
    /// The process is no more.
    pub is_dead: Arc<AtomicBool>,
    pub is_embedded: bool,
    /// It is the warmer's, where that has one of its own.
    pub warms: bool,
}

/// What is sent over a connection.
#[derive(Clone, Copy, PartialEq)]
enum Sent {
    Read,
    Write,
}

impl Line {
    fn salt(&self, of: u64) -> u64 {
        mix(of << 8 | self.process as u64)
    }

    fn fault(&self, odds: u64) -> Option<Fault> {
        let fault = self.world.fault(self.process)?;
        let always = matches!(fault, Fault::Cut | Fault::ReadOnly | Fault::Refuses | Fault::Slow);
        (always || self.world.dice.roll(self.salt(odds), 3) > 0).then_some(fault)
    }

    /// Sends a request and waits for its reply.
    async fn send<T, F>(&self, sent: Sent, salt: u64, call: impl Fn(Arc<World>) -> F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, StoreError>> + Send + 'static,
    {
        let (world, salt) = (self.world.clone(), self.salt(salt));
        if self.is_embedded {
            world.dice.pause(salt).await;
            let result = call(world.clone()).await;
            world.dice.pause(salt).await;
            return result;
        }
        if self.is_dead.load(Ordering::SeqCst) {
            return std::future::pending().await;
        }
        match self.fault(salt) {
            Some(Fault::Cut) => {
                world.dice.pause(salt).await;
                return Err(StoreError::unreachable("the connection is cut"));
            }
            fault @ Some(Fault::ReadOnly | Fault::Refuses) if sent == Sent::Write || fault == Some(Fault::Refuses) => {
                world.dice.pause(salt).await;
                return Err(StoreError::new("refused"));
            }
            _ => {}
        }
        let (reply, replied) = tokio::sync::oneshot::channel();
        let (there, line) = (call(world.clone()), self.clone());
        let again = (self.fault(salt) == Some(Fault::Duplicates)).then(|| call(world.clone()));
        tokio::spawn(async move {
            line.travel(salt).await;
            if line.fault(salt) == Some(Fault::LosesRequests) {
                return std::mem::forget(reply);
            }
            let result = there.await;
            if let Some(again) = again {
                line.travel(salt).await;
                let _ = again.await;
            }
            line.travel(salt).await;
            match line.fault(salt) {
                Some(Fault::LosesReplies) => std::mem::forget(reply),
                Some(Fault::Resets) => drop(reply),
                _ => drop(reply.send(result)),
            }
        });
        replied.await.unwrap_or_else(|_| Err(StoreError::unreachable("the connection was reset")))
    }

    /// From one end to the other.
    async fn travel(&self, salt: u64) {
        self.world.dice.pause(salt).await;
        if self.fault(salt) == Some(Fault::Slow) {
            let long = 10 + self.world.dice.roll(salt, 150);
            tokio::time::sleep(Duration::from_millis(long)).await;
        }
    }
}

impl Store for Line {
    fn peek(&self, key: &[u8], now: Millis) -> Option<Arc<Entry>> {
        let is_asked = self.is_embedded && self.world.server.sabotage == Sabotage::None;
        let peeks = is_asked && self.world.dice.roll(self.salt(1), 2) == 0;
        if peeks { self.world.server.memory.peek(key, now) } else { None }
    }

    fn lookup<'a>(&'a self, inquiry: Inquiry<'a>) -> StoreFuture<'a, Lookup> {
        let Inquiry { key, tags, required, tier, longest, now, .. } = inquiry;
        let asked = Asked { key: key.clone(), tags: tags.to_vec(), required, tier, longest, now };
        Box::pin(self.send(Sent::Read, 2, move |world| {
            let asked = asked.clone();
            async move { world.server.lookup(asked).await }
        }))
    }

    fn open<'a>(&'a self, tags: &'a [Tag]) -> StoreFuture<'a, Opened> {
        Box::pin(self.send(Sent::Write, 3, |world| {
            let tags = tags.to_vec();
            async move { world.server.open(tags).await }
        }))
    }

    fn extend<'a>(&'a self, mark: Mark, tags: &'a [Tag]) -> StoreFuture<'a, Option<Vec<Generation>>> {
        Box::pin(self.send(Sent::Write, 4, move |world| {
            let tags = tags.to_vec();
            async move { world.server.extend(mark, tags).await }
        }))
    }

    fn fill<'a>(&'a self, key: &'a Key, entry: Arc<Entry>, tier: Tier, now: Millis) -> StoreFuture<'a, ()> {
        let warms = self.warms;
        Box::pin(self.send(Sent::Write, 5, move |world| {
            let (key, entry) = (key.clone(), entry.clone());
            async move {
                // The flight goes on until its result is stored: long enough for others to come after a write.
                let long = match world.server.sabotage {
                    Sabotage::JoinAnyFlight => 20,
                    Sabotage::WarmerCapturesAfterTheLoad if warms => 300,
                    _ => 0,
                };
                if long > 0 {
                    tokio::time::sleep(Duration::from_millis(long)).await;
                }
                world.server.fill(key, entry, tier, now, warms).await
            }
        }))
    }

    fn invalidate<'a>(&'a self, groups: &'a [TagGroup], fence: Option<&'a Fence>) -> StoreFuture<'a, Vec<u64>> {
        Box::pin(self.send(Sent::Write, 6, move |world| {
            let (groups, fence) = (groups.to_vec(), fence.cloned());
            async move {
                let dropped = world.server.memory.invalidate(&groups, fence.as_ref()).await?;
                world.dropped(world.server.things(&groups));
                Ok(dropped)
            }
        }))
    }

    fn fence<'a>(&'a self, groups: &'a [TagGroup], fence: &'a Fence) -> StoreFuture<'a, ()> {
        Box::pin(self.send(Sent::Write, 7, move |world| {
            let (groups, fence) = (groups.to_vec(), fence.clone());
            async move {
                if world.server.sabotage == Sabotage::RaiseNoFence {
                    return Ok(());
                }
                world.server.memory.fence(&groups, &fence).await?;
                world.dropped(world.server.things(&groups));
                Ok(())
            }
        }))
    }

    fn claim<'a>(&'a self, key: &'a Key, lease: Duration) -> StoreFuture<'a, bool> {
        Box::pin(self.send(Sent::Write, 8, move |world| {
            let key = key.clone();
            async move {
                let now = world.dice.now();
                let mut claims = world.server.claims.lock().unwrap();
                let is_free = claims.get(&key).is_none_or(|until| *until <= now);
                if is_free {
                    claims.insert(key, now + lease.as_millis() as u64);
                }
                Ok(is_free)
            }
        }))
    }

    fn release<'a>(&'a self, key: &'a Key) -> StoreFuture<'a, ()> {
        Box::pin(self.send(Sent::Write, 9, move |world| {
            let key = key.clone();
            async move {
                world.server.claims.lock().unwrap().remove(&key);
                Ok(())
            }
        }))
    }

    fn clear(&self) -> StoreFuture<'_, ()> {
        Box::pin(self.send(Sent::Write, 10, |world| async move { world.flush().await }))
    }

    fn is_shared(&self) -> bool {
        !self.is_embedded
    }

    fn health(&self) -> Health {
        match self.world.fault(self.process) {
            Some(Fault::Cut | Fault::ReadOnly | Fault::Refuses) => Health::Down("a fault".into()),
            _ => Health::Ok,
        }
    }
}

impl Server {
    pub async fn flush(&self) -> Result<(), StoreError> {
        self.claims.lock().unwrap().clear();
        self.memory.clear().await
    }
}
