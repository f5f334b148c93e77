//! A store of one's own: what the engine relies on, over a map that stands for a server, and checked by the suite.
//!
//! `cargo run --example own_store`

use std::{
    collections::{HashMap, HashSet},
    future::ready,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use tower_cache_aside::{
    Key, Tag, Tier,
    store::{
        Clocks, Entry, Fence, Generation, Inquiry, Lookup, Mark, Millis, Opened, Store, StoreError, StoreFuture,
        TagGroup, conformance,
    },
};

/// One process' handle to the place; clones are those of others.
#[derive(Clone, Default)]
pub struct OwnStore(Arc<Mutex<Place>>);

#[derive(Default)]
struct Place {
    entries: HashMap<Key, Vec<u8>>,
    tags: HashMap<Tag, TagState>,
    claims: HashMap<Key, Instant>,
    /// How many tags have been dropped: what a mark is.
    drops: u128,
}

#[derive(Default)]
struct TagState {
    /// None since it was dropped.
    generation: Option<Generation>,
    /// Which drop that was.
    dropped: u128,
    fences: Vec<(u128, Instant)>,
    /// What was filled under it, for the counts.
    keys: HashSet<Key>,
}

impl Place {
    /// Drops a generation for good: the next one is another. How many entries go with it.
    fn drop_tag(&mut self, tag: &Tag) -> HashSet<Key> {
        self.drops += 1;
        let state = self.tags.entry(tag.clone()).or_default();
        (state.generation, state.dropped) = (None, self.drops);
        std::mem::take(&mut state.keys)
    }

    /// The end of a fence is a drop as well: somebody may have read a row under it as it was before.
    fn end_fences(&mut self, tag: &Tag) {
        let Some(state) = self.tags.get_mut(tag) else { return };
        let stood = state.fences.len();
        state.fences.retain(|(_, until)| *until > Instant::now());
        if state.fences.len() < stood && state.fences.is_empty() {
            self.drop_tag(tag);
        }
    }

    /// The generation of a tag, which is made if it is absent.
    fn generation(&mut self, tag: &Tag) -> Generation {
        self.end_fences(tag);
        let state = self.tags.entry(tag.clone()).or_default();
        let generation = *state.generation.get_or_insert_with(Generation::unique);
        if state.fences.is_empty() { generation } else { generation.fenced() }
    }

    fn invalidate(&mut self, group: &TagGroup, fence: Option<&Fence>) -> u64 {
        let mut keys = HashSet::new();
        for tag in &group.tags {
            keys.extend(self.drop_tag(tag));
            let state = self.tags.entry(tag.clone()).or_default();
            for (_, until) in state.fences.iter_mut().filter(|(writer, _)| fence.is_some_and(|f| f.writer == *writer)) {
                *until = Instant::now() + fence.map_or(Duration::ZERO, |fence| fence.hold);
            }
        }
        keys.len() as u64
    }
}

/// The server's clock, which all processes share.
fn shared() -> Millis {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as Millis)
}

impl OwnStore {
    fn place(&self) -> MutexGuard<'_, Place> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn done<'a, T: Send + 'a>(answer: T) -> StoreFuture<'a, T> {
    Box::pin(ready(Ok(answer)))
}

impl Store for OwnStore {
    fn lookup<'a>(&'a self, Inquiry { key, tags, longest, now, .. }: Inquiry<'a>) -> StoreFuture<'a, Lookup> {
        let mut place = self.place();
        let clocks = Clocks { here: now, shared: shared() };
        // What cannot be read is not there.
        let read = |bytes: &Vec<u8>| Entry::decode(bytes.clone().into(), clocks, longest).ok().map(Arc::new);
        let entry = place.entries.get(key).and_then(read);
        done(Lookup::new(entry, tags.iter().map(|tag| Some(place.generation(tag))).collect()))
    }

    fn open<'a>(&'a self, tags: &'a [Tag]) -> StoreFuture<'a, Opened> {
        let mut place = self.place();
        let generations = tags.iter().map(|tag| place.generation(tag)).collect();
        done(Opened::new(generations, Mark(place.drops)))
    }

    fn extend<'a>(&'a self, mark: Mark, tags: &'a [Tag]) -> StoreFuture<'a, Option<Vec<Generation>>> {
        let mut place = self.place();
        let generations: Vec<_> = tags.iter().map(|tag| place.generation(tag)).collect();
        let stands = |tag: &Tag| place.tags.get(tag).is_some_and(|s| s.dropped <= mark.0 && s.fences.is_empty());
        done(tags.iter().all(stands).then_some(generations))
    }

    fn fill<'a>(&'a self, key: &'a Key, entry: Arc<Entry>, _: Tier, now: Millis) -> StoreFuture<'a, ()> {
        let bytes = match entry.encode(Clocks { here: now, shared: shared() }) {
            Ok(bytes) => bytes,
            Err(error) => return Box::pin(ready(Err(StoreError::new(error)))),
        };
        let mut place = self.place();
        place.entries.insert(key.clone(), bytes);
        for stamp in entry.stamps() {
            place.tags.entry(stamp.tag.clone()).or_default().keys.insert(key.clone());
        }
        done(())
    }

    fn invalidate<'a>(&'a self, groups: &'a [TagGroup], fence: Option<&'a Fence>) -> StoreFuture<'a, Vec<u64>> {
        let mut place = self.place();
        done(groups.iter().map(|group| place.invalidate(group, fence)).collect())
    }

    fn fence<'a>(&'a self, groups: &'a [TagGroup], fence: &'a Fence) -> StoreFuture<'a, ()> {
        let mut place = self.place();
        for tag in groups.iter().flat_map(|group| &group.tags) {
            place.drop_tag(tag);
            let state = place.tags.entry(tag.clone()).or_default();
            state.fences.push((fence.writer, Instant::now() + fence.lease));
        }
        done(())
    }

    fn claim<'a>(&'a self, key: &'a Key, lease: Duration) -> StoreFuture<'a, bool> {
        let mut place = self.place();
        let is_free = place.claims.get(key).is_none_or(|until| *until <= Instant::now());
        if is_free {
            place.claims.insert(key.clone(), Instant::now() + lease);
        }
        done(is_free)
    }

    fn release<'a>(&'a self, key: &'a Key) -> StoreFuture<'a, ()> {
        self.place().claims.remove(key);
        done(())
    }

    fn clear(&self) -> StoreFuture<'_, ()> {
        let mut place = self.place();
        let tags: Vec<_> = place.tags.keys().cloned().collect();
        for tag in tags {
            place.drop_tag(&tag);
        }
        place.entries.clear();
        done(())
    }
}

#[tokio::main]
async fn main() {
    let place = OwnStore::default();
    conformance::check(async || place.clone()).await;
    println!("it does what the engine relies on");
}
