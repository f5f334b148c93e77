//! The in-process store: bounded in bytes, with the eviction of `quick_cache` (S3-FIFO), and a table of tags.
//!
//! An entry holds pointers to the state of its tags and the versions it was filled under, so a hit is one look-up and
//! as many atomic loads as it has tags, and an invalidation is one atomic store per tag however many entries are
//! stored under it. What was invalidated or has expired is found out when it is read, and evicted when room is needed.
//!
//! Versions are numbers of one counter, never reused while the process lives. A tag without state has its shard's
//! `floor` as version; a state is forgotten only when no entry points to it, and then the floor is raised to its
//! version: forgetting can make a fill useless, but never make a dropped version current again.

mod hot;
mod members;

use std::{
    collections::{HashMap, HashSet},
    fmt,
    future::ready,
    hash::BuildHasher,
    sync::{Arc, PoisonError, Weak},
    time::Duration,
};

use bytes::Bytes;
use foldhash::fast::SeedableRandomState;
use quick_cache::{Lifecycle, OptionsBuilder, Weighter};

use super::{
    Entry, Fence, Generation, Inquiry, Lookup, Mark, Opened, Search, Store, StoreError, StoreFuture, TagGroup, Usage,
};
use crate::{
    catalog::Tier,
    clock::Millis,
    key::{Key, Tag},
    sync::{
        Cache, Instant, Mutex, MutexGuard, RandomState,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};
use members::{List, Members};

/// Where all orders of few steps are tried, the tags of a program meet, and what is unused is forgotten at once.
const IS_TRIED: bool = cfg!(all(test, shuttle));

const TAG_SHARDS: usize = if IS_TRIED { 1 } else { 64 };

/// Keys whose changes are counted together: each of these is a reason to look again, and no more.
const CHANGES: usize = 1024;

/// Set in the version of a fenced tag.
const FENCED: u64 = 1 << 63;

/// Tags that may be fenced at once, per shard.
const MAX_FENCES: usize = 4096;

/// A lease that is longer than clocks can count is this.
const MAX_LEASE: Duration = Duration::from_secs(365 * 86_400);

/// So much of what was dropped is freed by who fills.
const FREED: usize = 16;

static IDS: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);

/// So many of the last that had to go are known again.
const REMEMBERED: usize = if IS_TRIED { 1 } else { 4096 };

/// Up to this many entries per group an invalidation counts exactly; above, it reports how many were filled.
const COUNT_LIMIT: usize = 4096;

/// The in-process store. Its generations mean nothing in another process.
pub struct MemoryStore {
    entries: Cache<Bytes, Arc<Resident>, Weigh, RandomState, Evictions>,
    evictions: Evictions,
    tags: [Mutex<TagShard>; TAG_SHARDS],
    /// Which tags share a shard, and so its floor. Where tests are made it is the same each time, so that they can be repeated.
    shards: SeedableRandomState,
    hasher: RandomState,
    /// What tells it from others.
    id: u64,
    /// How often something was put in place or taken away, by the hash of its key.
    changes: Box<[AtomicU64; CHANGES]>,
    /// The last version given out.
    versions: AtomicU64,
    notes: Mutex<HashMap<String, Vec<u8>>>,
    trash: Trash,
}

/// Tags resolved, with the versions they had then. While it lives, no drop of them goes unnoticed.
pub(super) type Captured = Vec<(Arc<TagState>, u64)>;

/// An entry in place, with its tags resolved.
struct Resident {
    entry: Arc<Entry>,
    tags: Box<[(Arc<TagState>, u64)]>,
    /// Not answered from after this.
    until: Millis,
    /// Whether an invalidation's report has counted it, so that no other does.
    counted: AtomicBool,
    filled: Instant,
}

impl Resident {
    fn is_valid(&self) -> bool {
        is_current(&self.tags)
    }
}

fn is_current(tags: &[(Arc<TagState>, u64)]) -> bool {
    tags.iter().all(|(state, version)| state.version.load(Ordering::Acquire) == *version)
}

pub(crate) struct TagState {
    version: AtomicU64,
    /// The entries filled since the last drop, for the counts.
    members: Mutex<Members<Weak<Resident>>>,
}

impl TagState {
    fn members(&self) -> MutexGuard<'_, Members<Weak<Resident>>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What was dropped, until it is freed, which takes milliseconds for a hundred thousand. (Of no interest to those who try orders of
/// steps: nobody asks what is in it.)
#[derive(Default)]
struct Trash {
    list: std::sync::Mutex<Vec<Weak<Resident>>>,
    is_there: std::sync::atomic::AtomicBool,
}

impl Trash {
    fn add(&self, members: List<Weak<Resident>>) {
        self.list.lock().unwrap_or_else(PoisonError::into_inner).append(&mut members.into_vec());
        self.is_there.store(true, Ordering::Relaxed);
    }

    fn free(&self, count: usize) {
        if !self.is_there.load(Ordering::Relaxed) {
            return;
        }
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        let left = list.len().saturating_sub(count);
        list.truncate(left);
        if left == 0 {
            *list = vec![];
            self.is_there.store(false, Ordering::Relaxed);
        }
    }
}

#[derive(Default)]
struct TagShard {
    states: HashMap<Tag, Arc<TagState>, RandomState>,
    floor: u64,
    /// Writers that fence a tag, and until when.
    fences: HashMap<Tag, Vec<(u128, Instant)>, RandomState>,
    /// Forget unused states when there are more than this.
    sweep_at: usize,
    /// Take down fences whose lease has run out when there are more than this.
    sweep_fences_at: usize,
}

/// How many there may be before those are looked for that can be forgotten, when so many are left.
fn sweep_at(left: usize, spare: usize) -> usize {
    if IS_TRIED { 0 } else { 2 * left + spare }
}

impl TagShard {
    /// `next` is the next version.
    fn state(&mut self, tag: &Tag, next: impl Fn() -> u64) -> Arc<TagState> {
        if self.states.len() > self.sweep_at {
            let (floor, fences) = (&mut self.floor, &self.fences);
            self.states.retain(|tag, state| {
                // Only this table holds it, and it is locked: nobody can come by a pointer to it meanwhile.
                let used = Arc::strong_count(state) > 1 || fences.contains_key(tag);
                if !used {
                    let version = state.version.load(Ordering::Acquire);
                    // The end of a fence is a drop: who has read under it has a mark, and that version is not greater.
                    *floor = if version & FENCED == 0 { (*floor).max(version) } else { next() };
                }
                used
            });
            self.sweep_at = sweep_at(self.states.len(), 256);
        }
        if let Some(state) = self.states.get(tag) {
            return state.clone();
        }
        let state = Arc::new(TagState { version: AtomicU64::new(self.floor), members: Mutex::default() });
        // It outlives the entry whose key and tags share an allocation.
        self.states.insert(Tag(Bytes::copy_from_slice(tag.as_bytes())), state.clone());
        state
    }
}

impl TagShard {
    /// How many writers fence a tag.
    fn fences_of(&mut self, tag: &Tag) -> usize {
        let Some(fences) = self.fences.get_mut(tag) else { return 0 };
        let now = Instant::now();
        fences.retain(|(_, until)| *until > now);
        let left = fences.len();
        if left == 0 {
            self.fences.remove(tag);
        }
        left
    }

    /// Raises one writer's fence. The tags whose fences have run out are forgotten by and by, though nobody asks for them
    /// again.
    fn raise(&mut self, tag: &Tag, fence: &Fence) -> Result<(), StoreError> {
        if self.fences.len() > self.sweep_fences_at {
            let now = Instant::now();
            self.fences.retain(|_, fences| fences.iter().any(|(_, until)| *until > now));
            self.sweep_fences_at = sweep_at(self.fences.len(), 64);
        }
        if self.fences.len() >= MAX_FENCES && !self.fences.contains_key(tag) {
            self.sweep_fences_at = 0;
            return Err(StoreError::new("too many tags are fenced at once"));
        }
        let until = Instant::now() + fence.lease.min(MAX_LEASE);
        self.fences.entry(tag.clone()).or_default().push((fence.writer, until));
        Ok(())
    }

    /// Takes down the fence of one writer, or leaves it for the time it is to hold.
    fn lift(&mut self, tag: &Tag, fence: &Fence) {
        let Some(fences) = self.fences.get_mut(tag) else { return };
        for (writer, until) in fences.iter_mut().filter(|(writer, _)| *writer == fence.writer) {
            let _ = writer;
            *until = Instant::now() + fence.hold.min(MAX_LEASE);
        }
    }
}

/// What had to go while it was valid.
#[derive(Clone)]
struct Evictions(Arc<Evicted>);

struct Evicted {
    count: AtomicU64,
    /// In milliseconds; each counts for an eighth.
    age: AtomicU64,
    hasher: RandomState,
    /// The hashes of the last, each in the place that it gives: some displace others.
    last: [AtomicU64; REMEMBERED],
    /// How often one of those was looked for.
    missed: AtomicU64,
}

impl Evictions {
    fn new(hasher: RandomState) -> Self {
        let [count, age, missed] = [const { AtomicU64::new(0) }; 3];
        Self(Arc::new(Evicted { count, age, hasher, last: [const { AtomicU64::new(0) }; REMEMBERED], missed }))
    }

    fn remember(&self, key: &[u8]) {
        let hash = self.0.hasher.hash_one(key);
        self.0.last[hash as usize % REMEMBERED].store(hash, Ordering::Relaxed);
    }

    /// An entry is looked for under this key.
    fn sought(&self, key: &[u8]) {
        let hash = self.0.hasher.hash_one(key);
        let place = &self.0.last[hash as usize % REMEMBERED];
        // Once for each time that it went.
        if place.compare_exchange(hash, 0, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            self.0.missed.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Lifecycle<Bytes, Arc<Resident>> for Evictions {
    /// Dropped when no lock is held. More than two in one call are rare.
    type RequestState = [Option<(Bytes, Arc<Resident>)>; 2];

    /// Not called of what is replaced.
    fn before_evict(&self, _: &mut Self::RequestState, key: &Bytes, resident: &mut Arc<Resident>) {
        if resident.is_valid() {
            let Evicted { count, age, .. } = &*self.0;
            self.remember(key);
            let own = u64::try_from(resident.filled.elapsed().as_millis()).unwrap_or(u64::MAX);
            let before = age.load(Ordering::Relaxed);
            let first = count.fetch_add(1, Ordering::Relaxed) == 0;
            age.store(if first { own } else { before - before / 8 + own / 8 }, Ordering::Relaxed);
        }
    }

    fn on_evict(&self, state: &mut Self::RequestState, key: Bytes, resident: Arc<Resident>) {
        if let Some(free) = state.iter_mut().find(|place| place.is_none()) {
            *free = Some((key, resident));
        }
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
        let evictions = Evictions::new(hasher.clone());
        let mut options = OptionsBuilder::new();
        options.estimated_items_capacity(items).weight_capacity(capacity).shards(shards);
        let entries = match options.build() {
            Ok(options) => Cache::with_options(options, Weigh, hasher.clone(), evictions.clone()),
            Err(_) => Cache::with(items, capacity, Weigh, hasher.clone(), evictions.clone()),
        };
        Self {
            entries,
            evictions,
            tags: std::array::from_fn(|_| Mutex::default()),
            shards: if cfg!(feature = "testing") {
                SeedableRandomState::fixed()
            } else {
                SeedableRandomState::random()
            },
            hasher,
            id: IDS.fetch_add(1, Ordering::Relaxed),
            changes: Box::new([const { AtomicU64::new(0) }; CHANGES]),
            versions: AtomicU64::new(1),
            notes: Mutex::default(),
            trash: Trash::default(),
        }
    }

    fn shard(&self, tag: &Tag) -> MutexGuard<'_, TagShard> {
        let at = self.shards.hash_one(tag) as usize % TAG_SHARDS;
        self.tags[at].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next_version(&self) -> u64 {
        self.versions.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// The version of a tag now. A fence whose lease has run out is taken down.
    fn version(&self, shard: &mut TagShard, tag: &Tag) -> u64 {
        let version = shard.states.get(tag).map_or(shard.floor, |s| s.version.load(Ordering::Acquire));
        if version & FENCED == 0 || shard.fences_of(tag) > 0 {
            return version;
        }
        let version = self.next_version();
        if let Some(state) = shard.states.get(tag) {
            state.version.store(version, Ordering::Release);
        }
        version
    }

    /// Resolves tags, and notices every drop of them from now on.
    pub(crate) fn capture<'t>(&self, tags: impl IntoIterator<Item = &'t Tag>) -> Captured {
        let capture = |tag| {
            let mut shard = self.shard(tag);
            let state = shard.state(tag, || self.next_version());
            let version = self.version(&mut shard, tag);
            (state, version)
        };
        tags.into_iter().map(capture).collect()
    }

    /// Stores an entry under what was captured, to be answered from until then.
    pub(crate) fn insert(&self, key: &Key, entry: Arc<Entry>, tags: Captured, until: Millis) {
        if tags
            .iter()
            .any(|(state, version)| version & FENCED != 0 || state.version.load(Ordering::Acquire) != *version)
        {
            return;
        }
        let (entry, counted, filled) = (Entry::packed(entry), AtomicBool::new(false), Instant::now());
        let resident = Arc::new(Resident { entry, tags: tags.into(), until, counted, filled });
        self.trash.free(FREED);
        for (state, _) in &resident.tags {
            state.members().add(Arc::downgrade(&resident), |member| member.strong_count() > 0);
        }
        self.entries.insert(key.0.clone(), resident);
        self.changes(self.hasher.hash_one(&key.0[..])).fetch_add(1, Ordering::Release);
    }

    /// How often there was a change of a key with this hash. Counted after it: who has read the count before saw what was there
    /// before, or what is there now.
    fn changes(&self, hash: u64) -> &AtomicU64 {
        &self.changes[(hash >> 32) as usize % CHANGES]
    }

    /// The entry that is in place, or was a moment ago: a copy of it, if this thread asks for it often. `valid_at` says when it is to
    /// be valid; without that it may be invalid, and is nobody's answer before its generations were asked for.
    fn resident(&self, key: &[u8], valid_at: Option<Millis>) -> Option<Arc<Entry>> {
        let hash = self.hasher.hash_one(key);
        let changes = self.changes(hash).load(Ordering::Acquire);
        // What is good for one is not for the other.
        let which = if valid_at.is_some() { (self.id, hash) } else { (!self.id, hash.rotate_left(32)) };
        // Threads that take turns at each step are one thread to copies.
        let looked =
            if IS_TRIED { hot::Looked::Seldom } else { hot::look(which, key, valid_at.unwrap_or_default(), changes) };
        if let hot::Looked::Good(entry) = looked {
            return Some(entry);
        }
        let is_good = |resident: &Arc<Resident>| valid_at.is_none_or(|now| now < resident.until && resident.is_valid());
        let Some(resident) = self.entries.get(key).filter(is_good) else {
            hot::keep(which, None);
            return None;
        };
        if let hot::Looked::Often = looked
            && let Some(entry) = hot::copied(&resident.entry)
        {
            let (until, tags) = match valid_at {
                Some(_) => (resident.until, resident.tags.clone()),
                None => (Millis::MAX, Box::default()),
            };
            hot::keep(which, Some(hot::Hot { key: Bytes::copy_from_slice(key), entry, tags, until, changes }));
        }
        Some(resident.entry.clone())
    }

    /// The entry, valid or not.
    pub(super) fn raw(&self, key: &[u8]) -> Option<Arc<Entry>> {
        self.resident(key, None)
    }

    /// An entry is looked for: if it had to go not long ago, that is counted.
    pub(super) fn sought(&self, key: &Key) {
        self.evictions.sought(&key.0);
    }

    /// What is in place under this key is there no more, if it is this; nor are threads' copies, also of what has gone before.
    #[cfg(any(feature = "redis", feature = "memcached"))]
    pub(super) fn forget(&self, key: &[u8], is_it: impl FnOnce(&Entry) -> bool) {
        self.entries.remove_if(key, |resident| is_it(&resident.entry));
        self.changes(self.hasher.hash_one(key)).fetch_add(1, Ordering::Release);
    }

    /// Drops a tag that nobody but this process' entries and captures know.
    #[cfg(feature = "redis")]
    pub(super) fn drop_local(&self, tag: &Tag) {
        if let Some(state) = self.shard(tag).states.get(tag) {
            state.version.store(self.next_version(), Ordering::Release);
        }
    }

    fn drop_group(&self, group: &TagGroup, fence: Option<&Fence>) -> u64 {
        let states: Vec<_> = group.tags.iter().map(|tag| self.shard(tag).states.get(tag).cloned()).collect();
        let mut count = 0;
        let mut exact = 0;
        for state in states.iter().flatten() {
            let members = state.members().take();
            let checked = members.len().min(COUNT_LIMIT - exact);
            exact += checked;
            count += (members.len() - checked) as u64;
            for member in members[..checked].iter().filter_map(Weak::upgrade) {
                // Replaced entries are gone (the pointer is weak), but an expired one may still be in its place.
                if member.is_valid() && !member.counted.swap(true, Ordering::Relaxed) {
                    count += 1;
                }
            }
            if members.len() > COUNT_LIMIT {
                self.trash.add(members);
            }
        }
        for tag in &group.tags {
            let mut shard = self.shard(tag);
            if let Some(fence) = fence {
                shard.lift(tag, fence);
            }
            let fenced = if shard.fences_of(tag) > 0 { FENCED } else { 0 };
            let version = self.next_version() | fenced;
            match shard.states.get(tag) {
                Some(state) => state.version.store(version, Ordering::Release),
                None => shard.floor = version,
            }
        }
        count
    }
}

fn generation(version: u64) -> Generation {
    let generation = Generation((version & !FENCED).into());
    if version & FENCED == 0 { generation } else { generation.fenced() }
}

fn done<'a, T: Send + 'a>(value: T) -> StoreFuture<'a, T> {
    Box::pin(ready(Ok::<_, StoreError>(value)))
}

impl Store for MemoryStore {
    fn peek(&self, key: &[u8], now: Millis) -> Option<Arc<Entry>> {
        self.resident(key, Some(now))
    }

    fn lookup<'a>(&'a self, Inquiry { key, tags, .. }: Inquiry<'a>) -> StoreFuture<'a, Lookup> {
        self.sought(key);
        let version = |tag| self.version(&mut self.shard(tag), tag);
        done(Lookup::new(self.raw(key.as_bytes()), tags.iter().map(|tag| Some(generation(version(tag)))).collect()))
    }

    fn open<'a>(&'a self, tags: &'a [Tag]) -> StoreFuture<'a, Opened> {
        // The mark first: whatever is dropped after it has a greater version.
        let mark = Mark(self.versions.load(Ordering::Acquire).into());
        let captured = self.capture(tags);
        done(Opened::new(captured.iter().map(|(_, version)| generation(*version)).collect(), mark))
    }

    fn extend<'a>(&'a self, mark: Mark, tags: &'a [Tag]) -> StoreFuture<'a, Option<Vec<Generation>>> {
        // A fenced generation is greater than any mark.
        let version = |tag: &Tag| Some(generation(self.version(&mut self.shard(tag), tag))).filter(|g| g.0 <= mark.0);
        done(tags.iter().map(version).collect())
    }

    fn fill<'a>(&'a self, key: &'a Key, entry: Arc<Entry>, _: Tier, _: Millis) -> StoreFuture<'a, ()> {
        let captured = self.capture(entry.stamps.iter().map(|s| &s.tag));
        let current = captured.iter().zip(&entry.stamps).all(|((_, v), stamp)| generation(*v) == stamp.generation);
        if current {
            let until = entry.keep_until;
            self.insert(key, entry, captured, until);
        }
        done(())
    }

    fn invalidate<'a>(&'a self, groups: &'a [TagGroup], fence: Option<&'a Fence>) -> StoreFuture<'a, Vec<u64>> {
        done(groups.iter().map(|group| self.drop_group(group, fence)).collect())
    }

    fn is_shared(&self) -> bool {
        false
    }

    fn count<'a>(&'a self, groups: &'a [TagGroup]) -> StoreFuture<'a, Vec<u64>> {
        let count = |group: &TagGroup| {
            let mut seen = HashSet::new();
            for state in group.tags.iter().filter_map(|tag| self.shard(tag).states.get(tag).cloned()) {
                let members = state.members();
                let live = members.list().iter().take(COUNT_LIMIT).filter_map(Weak::upgrade);
                let live = live.filter(|member| member.is_valid());
                seen.extend(live.map(|member| Arc::as_ptr(&member) as usize));
            }
            seen.len() as u64
        };
        done(groups.iter().map(count).collect())
    }

    fn search<'a>(&'a self, search: Search<'a>) -> StoreFuture<'a, Vec<Key>> {
        let found = self.entries.iter().map(|(key, _)| key).filter(|key| search.accepts(key));
        done(found.take(search.most).map(Key).collect())
    }

    fn note<'a>(&'a self, name: &'a str, note: &'a [u8]) -> StoreFuture<'a, ()> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), note.to_vec());
        done(())
    }

    fn noted<'a>(&'a self, name: &'a str) -> StoreFuture<'a, Option<Vec<u8>>> {
        done(self.notes.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned())
    }

    fn usage(&self) -> Usage {
        Usage {
            bytes: self.entries.weight(),
            capacity: self.entries.capacity(),
            entries: self.entries.len() as u64,
            evictions: self.evictions.0.count.load(Ordering::Relaxed),
            evicted_misses: self.evictions.0.missed.load(Ordering::Relaxed),
            eviction_age: Duration::from_millis(self.evictions.0.age.load(Ordering::Relaxed)),
            ..Usage::default()
        }
    }

    fn clear(&self) -> StoreFuture<'_, ()> {
        for shard in &self.tags {
            let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            shard.floor = self.next_version();
            let TagShard { states, fences, .. } = &*shard;
            for (tag, state) in states {
                // A fence goes on: its writer has not come back.
                let fenced = if fences.contains_key(tag) { FENCED } else { 0 };
                state.version.store(self.next_version() | fenced, Ordering::Release);
            }
        }
        self.entries.clear();
        self.changes.iter().for_each(|changes| _ = changes.fetch_add(1, Ordering::Release));
        done(())
    }

    fn fence<'a>(&'a self, groups: &'a [TagGroup], fence: &'a Fence) -> StoreFuture<'a, ()> {
        let mut raised = Ok(());
        for tag in groups.iter().flat_map(|g| &g.tags) {
            let mut shard = self.shard(tag);
            raised = raised.and_then(|()| shard.raise(tag, fence));
            if raised.is_ok() {
                let version = self.next_version() | FENCED;
                shard.state(tag, || self.next_version()).version.store(version, Ordering::Release);
            }
        }
        Box::pin(ready(raised))
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

#[cfg(all(test, shuttle))]
mod interleavings;

#[cfg(test)]
mod tests {
    use http::{HeaderMap, HeaderValue, StatusCode};

    use super::*;
    use crate::{
        catalog::Lifetime,
        store::{Payload, Stamp, StoredResponse},
    };

    fn group(ids: std::ops::Range<usize>) -> [TagGroup; 1] {
        let tags = ids.map(|id| Tag::entity(b"s{t}", "doc", "doc", id.to_string().as_bytes())).collect();
        [TagGroup::new("doc", tags)]
    }

    fn fenced(store: &MemoryStore) -> usize {
        store.tags.iter().map(|shard| shard.lock().unwrap().fences.len()).sum()
    }

    /// Writes that are refused, or die, leave fences that nobody lifts, on tags that nobody asks for again.
    #[tokio::test]
    async fn fences_that_have_run_out_are_forgotten() {
        let store = MemoryStore::new(8 << 20);
        let fence = Fence::new(Duration::ZERO, Duration::ZERO);
        for i in 0..200 {
            store.fence(&group(i * 100..(i + 1) * 100), &fence).await.unwrap();
        }
        assert!(fenced(&store) < 64 * 200, "{} of 20,000", fenced(&store));
    }

    /// Under a fence a row may be read as it was before: its end, too, is a drop, whether anybody asks for the tag or it is
    /// forgotten.
    #[tokio::test]
    async fn a_mark_made_under_a_fence_proves_nothing_when_that_has_run_out() {
        let store = MemoryStore::new(8 << 20);
        store.fence(&group(0..1), &Fence::new(Duration::ZERO, Duration::ZERO)).await.unwrap();
        let mark = store.open(&[]).await.unwrap().mark;
        // By others that are fenced its fence is forgotten, and by others that are read its state.
        store.fence(&group(1..1_000), &Fence::new(Duration::from_secs(600), Duration::ZERO)).await.unwrap();
        store.open(&group(1_000..60_000)[0].tags).await.unwrap();
        let forgotten = &group(0..1)[0].tags;
        assert!(!store.shard(&forgotten[0]).states.contains_key(&forgotten[0]));
        assert_eq!(store.extend(mark, forgotten).await.unwrap(), None);
    }

    /// Those that stand are bounded as well; a fence that cannot be raised is said to be none.
    #[tokio::test]
    async fn fences_that_stand_are_bounded() {
        let store = MemoryStore::new(8 << 20);
        let fence = Fence::new(Duration::from_secs(600), Duration::ZERO);
        let all = TAG_SHARDS * MAX_FENCES + 1;
        assert!(store.fence(&group(0..all), &fence).await.is_err());
        assert!(fenced(&store) <= TAG_SHARDS * MAX_FENCES);
    }

    /// Stores a response of this size, and says what is in place.
    async fn fill(store: &MemoryStore, key: &Key, size: usize) -> Arc<Entry> {
        let tags = &group(0..1)[0].tags;
        let generations = store.open(tags).await.unwrap().generations;
        let stamps = tags.iter().zip(generations).map(|(tag, generation)| Stamp { tag: tag.clone(), generation });
        let mut headers = HeaderMap::new();
        headers.insert("x-own", HeaderValue::from_static("1"));
        let stored = StoredResponse {
            status: StatusCode::OK,
            headers: headers.into(),
            body: vec![b'x'; size].into(),
            trailers: None,
        };
        let life = Lifetime::fresh_for(Some(Duration::from_secs(10)));
        let entry = Arc::new(Entry::new(Payload::Response(stored), stamps.collect(), 0, life));
        store.fill(key, entry, Tier::default(), 0).await.unwrap();
        store.entries.get(&key.0).unwrap().entry.clone()
    }

    /// The last of many answers.
    fn hot(store: &MemoryStore, key: &Key) -> Option<Arc<Entry>> {
        (0..200).map(|_| store.peek(key.as_bytes(), 1)).last()?
    }

    /// It is another, and falls with its original in every way.
    #[tokio::test]
    async fn what_is_asked_for_often_is_copied() {
        let (store, other) = (MemoryStore::new(8 << 20), MemoryStore::new(8 << 20));
        let key = Key::new(b"s{t}:doc:=1".to_vec());
        let body = |entry: &Entry| match &entry.payload {
            Payload::Response(stored) => (stored.headers.to_map().into_owned(), stored.body.clone()),
            _ => panic!("{entry:?}"),
        };
        let original = fill(&store, &key, 100).await;
        let seldom = store.peek(key.as_bytes(), 1).unwrap();
        assert!(Arc::ptr_eq(&seldom, &original));
        let copy = hot(&store, &key).unwrap();
        assert!(!Arc::ptr_eq(&copy, &original) && body(&copy) == body(&original));
        assert!(hot(&other, &key).is_none());
        assert!(store.peek(key.as_bytes(), 10_000).is_none(), "it ends when its original does");

        let newer = fill(&store, &key, 200).await;
        assert_eq!(body(&store.peek(key.as_bytes(), 1).unwrap()), body(&newer));
        assert!(!Arc::ptr_eq(&hot(&store, &key).unwrap(), &newer));
        store.invalidate(&group(0..1), None).await.unwrap();
        assert!(store.peek(key.as_bytes(), 1).is_none());
        for gone in [false, true] {
            fill(&store, &key, 100).await;
            hot(&store, &key).unwrap();
            if gone {
                store.forget(key.as_bytes(), |_| true)
            } else {
                store.clear().await.unwrap()
            }
            assert!(store.peek(key.as_bytes(), 1).is_none(), "{gone}");
        }

        let large = fill(&store, &key, 100_000).await;
        assert!(Arc::ptr_eq(&hot(&store, &key).unwrap(), &large));
        // What many others are asked for as often is not.
        let small = fill(&store, &key, 100).await;
        let others: Vec<_> = (0..1_000).map(|i| Key::new(format!("s{{t}}:doc:={i}").into_bytes())).collect();
        for _ in 0..200 {
            for other in &others {
                store.peek(other.as_bytes(), 1);
            }
        }
        assert!(Arc::ptr_eq(&store.peek(key.as_bytes(), 1).unwrap(), &small));
    }

    /// However many others are asked for meanwhile; and no more is kept of those than is in use.
    #[tokio::test]
    async fn a_tag_in_use_is_not_forgotten() {
        let (store, key) = (MemoryStore::new(8 << 20), Key::new(b"s{t}:doc:=1".to_vec()));
        fill(&store, &key, 100).await;
        for i in 1..100 {
            store.open(&group(i * 500..(i + 1) * 500)[0].tags).await.unwrap();
        }
        let states: usize = store.tags.iter().map(|shard| shard.lock().unwrap().states.len()).sum();
        assert!(states <= TAG_SHARDS * 512, "{states} of 49,501");
        assert!(store.peek(key.as_bytes(), 1).is_some());
        store.invalidate(&group(0..1), None).await.unwrap();
        assert!(store.peek(key.as_bytes(), 1).is_none());
    }

    #[tokio::test]
    async fn what_was_dropped_is_counted_exactly_and_far_more_by_what_was_filled() {
        for count in [1, 3, COUNT_LIMIT, COUNT_LIMIT + 5] {
            let store = MemoryStore::new(64 << 20);
            for i in 0..count {
                fill(&store, &Key::new(format!("s{{t}}:doc:={i}").into_bytes()), 10).await;
            }
            assert_eq!(store.count(&group(0..1)).await.unwrap(), [count.min(COUNT_LIMIT) as u64]);
            assert_eq!(store.invalidate(&group(0..1), None).await.unwrap(), [count as u64]);
            assert_eq!(store.invalidate(&group(0..1), None).await.unwrap(), [0]);
        }
    }

    /// What counts them is freed by those who fill, whatever they fill.
    #[tokio::test]
    async fn what_was_dropped_is_freed_by_and_by() {
        let store = MemoryStore::new(64 << 20);
        let key = |i: usize| Key::new(format!("s{{t}}:doc:={i}").into_bytes());
        for i in 0..=COUNT_LIMIT {
            fill(&store, &key(i), 10).await;
        }
        store.invalidate(&group(0..1), None).await.unwrap();
        let left = || store.trash.list.lock().unwrap().len();
        assert_eq!(left(), COUNT_LIMIT + 1);
        for i in 1..=COUNT_LIMIT / FREED + 1 {
            fill(&store, &key(i), 10).await;
            assert_eq!(left(), (COUNT_LIMIT + 1).saturating_sub(i * FREED));
        }
        assert!(!store.trash.is_there.load(Ordering::Relaxed));
    }

    /// How full it is, what had to go, and how often that was looked for: once for each time that it went.
    #[tokio::test]
    async fn what_has_to_go_is_told() {
        let store = MemoryStore::with_largest(1 << 20, 64 << 10);
        let key = |i: usize| Key::new(format!("s{{t}}:doc:={i}").into_bytes());
        fill(&store, &key(0), 10_000).await;
        let Usage { bytes, capacity, entries, evictions, evicted_misses, .. } = store.usage();
        assert_eq!((capacity, entries, evictions, evicted_misses), (1 << 20, 1, 0, 0));
        assert!((10_000..11_000).contains(&bytes), "{bytes}");
        for i in 0..300 {
            fill(&store, &key(i), 10_000).await;
        }
        let gone: Vec<_> = (0..300).filter(|i| store.peek(key(*i).as_bytes(), 1).is_none()).collect();
        let Usage { bytes, entries, evictions, .. } = store.usage();
        assert!(bytes <= 1 << 20 && entries as usize == 300 - gone.len(), "{bytes} {entries}");
        assert_eq!(evictions as usize, gone.len());
        for again in [false, true] {
            let before = store.usage().evicted_misses;
            for i in &gone {
                store
                    .lookup(Inquiry {
                        key: &key(*i),
                        tags: &[],
                        required: 0,
                        tier: Tier::default(),
                        longest: None,
                        now: 1,
                    })
                    .await
                    .unwrap();
            }
            let missed = store.usage().evicted_misses - before;
            assert!(if again { missed == 0 } else { missed as usize > gone.len() / 2 }, "{missed} of {}", gone.len());
        }
        // What was dropped before it had to go is no loss.
        store.invalidate(&group(0..1), None).await.unwrap();
        let before = store.usage().evictions;
        for i in 300..320 {
            fill(&store, &key(i), 10_000).await;
        }
        assert!(store.usage().evictions - before < 20);
    }
}
