//! The in-process store: bounded in bytes, with the eviction of `quick_cache` (S3-FIFO), and a table of tags.
//!
//! An entry holds pointers to the state of its tags and the versions it was filled under, so a hit is one look-up and
//! as many atomic loads as it has tags, and an invalidation is one atomic store per tag however many entries are
//! stored under it. What was invalidated or has expired is found out when it is read, and evicted when room is needed.
//!
//! Versions are numbers of one counter, never reused while the process lives. A tag without state has its shard's
//! `floor` as version; a state is forgotten only when no entry points to it, and then the floor is raised to its
//! version: forgetting can make a fill useless, but never make a dropped version current again.

use std::{
    collections::HashMap,
    fmt,
    future::ready,
    hash::BuildHasher,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use foldhash::fast::RandomState;
use quick_cache::{
    OptionsBuilder, Weighter,
    sync::{Cache, DefaultLifecycle},
};

use super::{Entry, Generation, Lookup, Mark, Millis, Opened, Store, StoreError, StoreFuture, TagGroup};
use crate::key::{Key, Tag};

const TAG_SHARDS: usize = 64;

/// Up to this many entries per group an invalidation counts exactly; above, it reports how many were filled.
const COUNT_LIMIT: usize = 4096;

/// The in-process store. Its generations mean nothing in another process.
pub struct MemoryStore {
    entries: Cache<Bytes, Arc<Resident>, Weigh, RandomState, DefaultLifecycle<Bytes, Arc<Resident>>>,
    tags: [Mutex<TagShard>; TAG_SHARDS],
    hasher: RandomState,
    /// The last version given out.
    versions: AtomicU64,
}

/// An entry in place, with its tags resolved.
struct Resident {
    entry: Arc<Entry>,
    tags: Box<[(Arc<TagState>, u64)]>,
    /// Whether an invalidation's report has counted it, so that no other does.
    counted: AtomicBool,
}

impl Resident {
    fn is_valid(&self) -> bool {
        self.tags.iter().all(|(state, version)| state.version.load(Ordering::Acquire) == *version)
    }
}

struct TagState {
    version: AtomicU64,
    /// The entries filled since the last drop, for the counts; pruned when it grows.
    members: Mutex<Vec<Weak<Resident>>>,
}

#[derive(Default)]
struct TagShard {
    states: HashMap<Tag, Arc<TagState>, RandomState>,
    floor: u64,
    /// Forget unused states when there are more than this.
    sweep_at: usize,
}

impl TagShard {
    fn version(&self, tag: &Tag) -> u64 {
        self.states.get(tag).map_or(self.floor, |s| s.version.load(Ordering::Acquire))
    }

    fn state(&mut self, tag: &Tag) -> &Arc<TagState> {
        if self.states.len() > self.sweep_at {
            let floor = &mut self.floor;
            self.states.retain(|_, state| {
                // Only this table holds it, and it is locked: nobody can come by a pointer to it meanwhile.
                let used = Arc::strong_count(state) > 1;
                if !used {
                    *floor = (*floor).max(state.version.load(Ordering::Acquire));
                }
                used
            });
            self.sweep_at = 2 * self.states.len() + 256;
        }
        let floor = self.floor;
        self.states
            .entry(tag.clone())
            .or_insert_with(|| Arc::new(TagState { version: AtomicU64::new(floor), members: Mutex::default() }))
    }
}

#[derive(Clone)]
struct Weigh;

impl Weighter<Bytes, Arc<Resident>> for Weigh {
    fn weight(&self, key: &Bytes, value: &Arc<Resident>) -> u64 {
        let tags = value.tags.len() * (size_of::<(Arc<TagState>, u64)>() + 16);
        (key.len() + tags + value.entry.weight() + 128) as u64
    }
}

impl MemoryStore {
    /// A store that holds at most about `capacity` bytes of keys, headers and bodies, none of them larger than a
    /// quarter of it.
    pub fn new(capacity: u64) -> Self {
        Self::with_largest(capacity, 2 << 20)
    }

    /// The same for entries of up to `largest` bytes: the store has as many shards as still let each hold four of
    /// them.
    pub fn with_largest(capacity: u64, largest: u64) -> Self {
        let shards = (capacity / (4 * largest.max(1))).clamp(1, 64);
        let shards = 1usize << shards.ilog2();
        // The options' defaults cannot fail: both numbers are given.
        let items = usize::try_from(capacity / 2048).unwrap_or(usize::MAX).clamp(64, 1 << 20);
        let hasher = RandomState::default();
        let mut options = OptionsBuilder::new();
        options.estimated_items_capacity(items).weight_capacity(capacity).shards(shards);
        let entries = match options.build() {
            Ok(options) => Cache::with_options(options, Weigh, hasher.clone(), DefaultLifecycle::default()),
            Err(_) => Cache::with(items, capacity, Weigh, hasher.clone(), DefaultLifecycle::default()),
        };
        Self { entries, tags: std::array::from_fn(|_| Mutex::default()), hasher, versions: AtomicU64::new(1) }
    }

    fn shard(&self, tag: &Tag) -> MutexGuard<'_, TagShard> {
        let at = self.hasher.hash_one(tag) as usize % TAG_SHARDS;
        self.tags[at].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fill_now(&self, key: &Key, entry: Arc<Entry>) {
        let mut tags = Vec::with_capacity(entry.stamps.len());
        for stamp in &entry.stamps {
            let state = self.shard(&stamp.tag).state(&stamp.tag).clone();
            let version = state.version.load(Ordering::Acquire);
            if generation(version) != stamp.generation {
                return;
            }
            tags.push((state, version));
        }
        let resident = Arc::new(Resident { entry, tags: tags.into(), counted: AtomicBool::new(false) });
        for (state, _) in &resident.tags {
            let mut members = state.members.lock().unwrap_or_else(PoisonError::into_inner);
            if members.len() == members.capacity() {
                members.retain(|m| m.upgrade().is_some_and(|m| m.is_valid()));
            }
            members.push(Arc::downgrade(&resident));
        }
        self.entries.insert(key.0.clone(), resident);
    }

    fn drop_group(&self, group: &TagGroup) -> u64 {
        let states: Vec<_> = group.tags.iter().map(|tag| self.shard(tag).states.get(tag).cloned()).collect();
        let mut count = 0;
        let mut exact = 0;
        for state in states.iter().flatten() {
            let members = std::mem::take(&mut *state.members.lock().unwrap_or_else(PoisonError::into_inner));
            let checked = members.len().min(COUNT_LIMIT - exact);
            exact += checked;
            count += (members.len() - checked) as u64;
            for member in members[..checked].iter().filter_map(Weak::upgrade) {
                // Replaced entries are gone (the pointer is weak), but an expired one may still be in its place.
                if member.is_valid() && !member.counted.swap(true, Ordering::Relaxed) {
                    count += 1;
                }
            }
        }
        for tag in &group.tags {
            let mut shard = self.shard(tag);
            let version = self.versions.fetch_add(1, Ordering::AcqRel) + 1;
            match shard.states.get(tag) {
                Some(state) => state.version.store(version, Ordering::Release),
                None => shard.floor = version,
            }
        }
        count
    }
}

fn generation(version: u64) -> Generation {
    Generation(version.into())
}

fn done<'a, T: Send + 'a>(value: T) -> StoreFuture<'a, T> {
    Box::pin(ready(Ok::<_, StoreError>(value)))
}

impl Store for MemoryStore {
    fn peek(&self, key: &[u8], now: Millis) -> Option<Arc<Entry>> {
        let resident = self.entries.get(key)?;
        (now < resident.entry.keep_until && resident.is_valid()).then(|| resident.entry.clone())
    }

    fn lookup<'a>(&'a self, key: &'a Key, tags: &'a [Tag]) -> StoreFuture<'a, Lookup> {
        done(Lookup {
            entry: self.entries.get(&key.0).map(|resident| resident.entry.clone()),
            generations: tags.iter().map(|tag| Some(generation(self.shard(tag).version(tag)))).collect(),
        })
    }

    fn open<'a>(&'a self, tags: &'a [Tag]) -> StoreFuture<'a, Opened> {
        // The mark first: whatever is dropped after it has a greater version.
        let mark = Mark(self.versions.load(Ordering::Acquire).into());
        let version = |tag| self.shard(tag).state(tag).version.load(Ordering::Acquire);
        done(Opened { generations: tags.iter().map(|tag| generation(version(tag))).collect(), mark })
    }

    fn extend<'a>(&'a self, mark: Mark, tags: &'a [Tag]) -> StoreFuture<'a, Option<Vec<Generation>>> {
        let version = |tag: &Tag| Some(generation(self.shard(tag).version(tag))).filter(|g| g.0 <= mark.0);
        done(tags.iter().map(version).collect())
    }

    fn fill<'a>(&'a self, key: &'a Key, entry: Arc<Entry>) -> StoreFuture<'a, ()> {
        self.fill_now(key, entry);
        done(())
    }

    fn invalidate<'a>(&'a self, groups: &'a [TagGroup]) -> StoreFuture<'a, Vec<u64>> {
        done(groups.iter().map(|group| self.drop_group(group)).collect())
    }
}

impl fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryStore")
            .field("entries", &self.entries.len())
            .field("bytes", &self.entries.weight())
            .field("capacity", &self.entries.capacity())
            .finish()
    }
}
