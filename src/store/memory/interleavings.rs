//! Readers, writers and fences over one store, in every order of their steps.
//!
//! Each program has a twin with a fault, which has to be found.

use std::sync::atomic::Ordering::SeqCst;

use futures_util::FutureExt;
use shuttle::thread::{self, JoinHandle};

use super::*;
use crate::{
    catalog::Lifetime,
    store::{Payload, Stamp},
    sync::tried::{Row, advance, breaks, holds, holds_always},
};

const STALE: &str = "a hit that a write had made stale";

/// How long a handler may take.
const LEASE: Duration = Duration::from_secs(10);

/// Two rows of a database, and what is made of them.
struct World {
    store: MemoryStore,
    rows: [Row; 2],
}

impl World {
    fn new() -> Arc<Self> {
        Self::with_capacity(1 << 20)
    }

    fn with_capacity(bytes: u64) -> Arc<Self> {
        Arc::new(Self { store: MemoryStore::new(bytes), rows: Default::default() })
    }

    fn spawn(self: &Arc<Self>, what: impl FnOnce(&Self) + Send + 'static) -> JoinHandle<()> {
        let world = self.clone();
        thread::spawn(move || what(&world))
    }
}

fn join(threads: impl IntoIterator<Item = JoinHandle<()>>) {
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

/// All futures of this store are ready at once.
fn now<T>(future: StoreFuture<'_, T>) -> T {
    future.now_or_never().unwrap().unwrap()
}

fn tag(of: u8) -> Tag {
    Tag::entity(b"s{t}", "doc", "doc", &[b'0' + of])
}

fn key(of: u8) -> Key {
    Key::new(vec![b'k', of])
}

fn group(tags: &[u8]) -> [TagGroup; 1] {
    [TagGroup::new("doc", tags.iter().copied().map(tag).collect())]
}

fn fence() -> Fence {
    Fence::new(LEASE, Duration::ZERO)
}

fn entry(value: u64, tags: &[u8], generations: &[Generation]) -> Arc<Entry> {
    let stamps = tags.iter().zip(generations).map(|(of, g)| Stamp { tag: tag(*of), generation: *g }).collect();
    let value = Bytes::copy_from_slice(&value.to_be_bytes());
    Arc::new(Entry::new(Payload::Value(value), stamps, 0, Lifetime::default()))
}

fn value(entry: &Entry) -> u64 {
    let Payload::Value(bytes) = &entry.payload else { panic!("no value") };
    u64::from_be_bytes(bytes[..].try_into().unwrap())
}

impl MemoryStore {
    fn put(&self, entry: Arc<Entry>) {
        now(self.fill(&key(0), entry, Tier::default(), 0));
    }

    fn drop_tags(&self, tags: &[u8]) -> u64 {
        now(self.invalidate(&group(tags), None)).iter().sum()
    }

    fn generations(&self, tags: &[u8]) -> Vec<Generation> {
        now(self.open(&tags.iter().copied().map(tag).collect::<Vec<_>>())).generations
    }

    /// As [`peek`](Store::peek), and as the engine judges what was looked up.
    fn hit(&self) -> Option<u64> {
        if let Some(entry) = self.peek(key(0).as_bytes(), 0) {
            return Some(value(&entry));
        }
        let (key, tags) = (key(0), [tag(0), tag(1)]);
        let found = now(self.lookup(Inquiry::new(&key, &tags, Tier::default(), 0)));
        let now_of = |of: &Tag| found.generations[usize::from(*of == tags[1])];
        let entry = found.entry.filter(|e| e.stamps.iter().all(|s| now_of(&s.tag) == Some(s.generation)));
        entry.filter(|e| e.stamps.iter().all(|s| !s.generation.is_fenced())).map(|entry| value(&entry))
    }
}

/// Whether the generations are captured before the load, as they should be, or when its result is stored.
#[derive(Clone, Copy, PartialEq)]
enum Capture {
    First,
    Late,
}

/// Answers from the store, or loads the first row and stores it.
fn read(world: &World, capture: Capture) {
    let acknowledged = world.rows[0].acknowledged();
    match world.store.hit() {
        Some(hit) => assert!(hit >= acknowledged, "{STALE}: {hit} after {acknowledged}"),
        None => load(world, capture),
    }
}

fn load(world: &World, capture: Capture) {
    let mut generations = world.store.generations(&[0]);
    let row = world.rows[0].read();
    if capture == Capture::Late {
        generations = world.store.generations(&[0]);
    }
    world.store.put(entry(row, &[0], &generations));
}

/// Unused tags come and go, so that states are forgotten and floors rise.
fn churn(world: &World) {
    world.store.generations(&[2]);
    world.store.drop_tags(&[3]);
}

fn two_readers_and_a_writer(capture: Capture) {
    let world = World::new();
    let reader = move |world: &World| (0..2).for_each(|_| read(world, capture));
    let writer = |world: &World| (0..2).for_each(|_| world.rows[0].write(|| _ = world.store.drop_tags(&[0])));
    join([world.spawn(reader), world.spawn(reader), world.spawn(writer), world.spawn(churn)]);
    read(&world, capture);
}

#[test]
fn what_a_write_has_overtaken_is_never_a_hit() {
    holds(|| two_readers_and_a_writer(Capture::First));
}

#[test]
fn generations_captured_after_the_load_are_found_out() {
    breaks(|| two_readers_and_a_writer(Capture::Late), STALE);
}

/// Small enough for all orders, the more so if the generations are captured before it begins and not compared in the end.
fn a_load_and_a_write(whole: bool) {
    let world = World::new();
    let captured = world.store.capture(&[tag(0)]);
    let loading = world.spawn(move |world| {
        if whole {
            return load(world, Capture::First);
        }
        let row = world.rows[0].read();
        world.store.insert(&key(0), entry(row, &[], &[]), captured, Millis::MAX);
    });
    world.rows[0].write(|| _ = world.store.drop_tags(&[0]));
    if let Some(entry) = world.store.peek(key(0).as_bytes(), 0) {
        assert!(value(&entry) >= 1, "{STALE}");
    }
    join([loading]);
}

#[test]
fn one_load_and_one_write_are_right_in_all_orders() {
    holds_always(|| a_load_and_a_write(false), 1_000_000);
}

#[test]
#[ignore = "takes minutes"]
fn one_load_with_its_look_and_one_write_are_right_in_all_orders() {
    holds_always(|| a_load_and_a_write(true), 2_000_000);
}

/// The second row's tag is learned from the response, and proven by the mark.
fn a_late_tag(capture: Capture) {
    let world = World::new();
    let reader = move |world: &World| {
        let mut opened = now(world.store.open(&[tag(0)]));
        let row = world.rows[1].read();
        if capture == Capture::Late {
            opened = now(world.store.open(&[tag(0)]));
        }
        if let Some(late) = now(world.store.extend(opened.mark, &[tag(1)])) {
            world.store.put(entry(row, &[0, 1], &[opened.generations[0], late[0]]));
        }
        let acknowledged = world.rows[1].acknowledged();
        let hit = world.store.hit();
        assert!(hit.is_none_or(|hit| hit >= acknowledged), "{STALE}: {hit:?} after {acknowledged}");
    };
    let writer = |world: &World| world.rows[1].write(|| _ = world.store.drop_tags(&[1]));
    join([world.spawn(reader), world.spawn(reader), world.spawn(writer), world.spawn(churn)]);
}

#[test]
fn a_mark_proves_late_tags() {
    holds(|| a_late_tag(Capture::First));
}

#[test]
fn a_mark_made_after_the_load_is_found_out() {
    breaks(|| a_late_tag(Capture::Late), STALE);
}

/// A writer whose fence stands until it has dropped what it wrote.
fn write_fenced(world: &World, fence: &Fence) {
    now(world.store.fence(&group(&[0]), fence));
    world.rows[0].write(|| {
        assert!(world.store.generations(&[0])[0].is_fenced(), "a fence that another has lifted");
        assert!(
            world.store.peek(key(0).as_bytes(), 0).is_none(),
            "a hit under a fence, or one that another has lifted"
        );
        now(world.store.invalidate(&group(&[0]), Some(fence)));
    });
}

fn two_fences(same_writer: bool) {
    let world = World::new();
    let fences = [fence(), fence()];
    let other = if same_writer { &fences[0] } else { &fences[1] }.clone();
    let first = world.spawn(move |world| write_fenced(world, &fences[0]));
    let second = world.spawn(move |world| write_fenced(world, &other));
    let reader = |world: &World| (0..2).for_each(|_| read(world, Capture::First));
    join([first, second, world.spawn(reader), world.spawn(reader)]);
    read(&world, Capture::First);
    assert!(!world.store.generations(&[0])[0].is_fenced(), "a fence that nobody lifts");
}

#[test]
fn nothing_is_a_hit_under_a_fence_and_each_writer_lifts_its_own() {
    holds(|| two_fences(false));
}

#[test]
fn a_fence_lifted_by_another_is_found_out() {
    breaks(|| two_fences(true), "another has lifted");
}

/// A writer that never comes back, and acknowledges with the end of its lease. Its tag is a late one to the readers.
fn a_writer_that_dies(lease: Duration) {
    let world = World::new();
    let writer = move |world: &World| {
        now(world.store.fence(&group(&[1]), &Fence::new(lease, Duration::ZERO)));
        if lease < LEASE {
            advance(lease);
        }
        world.rows[1].write(|| advance(LEASE));
    };
    let reader = |world: &World| {
        world.store.generations(&[1]);
        let opened = now(world.store.open(&[tag(0)]));
        let row = world.rows[1].read();
        if let Some(late) = now(world.store.extend(opened.mark, &[tag(1)])) {
            world.store.put(entry(row, &[0, 1], &[opened.generations[0], late[0]]));
        }
        let acknowledged = world.rows[1].acknowledged();
        let hit = world.store.hit();
        assert!(hit.is_none_or(|hit| hit >= acknowledged), "{STALE}: {hit:?} after {acknowledged}");
    };
    // Raises and lifts others meanwhile, by which those that have run out are forgotten.
    let other = |world: &World| {
        let fence = fence();
        now(world.store.fence(&group(&[2]), &fence));
        now(world.store.invalidate(&group(&[2]), Some(&fence)));
    };
    join([world.spawn(writer), world.spawn(reader), world.spawn(other)]);
    reader(&world);
}

#[test]
fn a_writer_that_dies_leaves_nothing_stale_when_its_lease_ends() {
    holds(|| a_writer_that_dies(LEASE));
}

#[test]
fn a_lease_shorter_than_the_handler_is_found_out() {
    breaks(|| a_writer_that_dies(LEASE / 2), STALE);
}

/// Readers read a replica that shows the write only when it has been acknowledged for a while.
fn a_lagging_replica(hold: Duration) {
    let world = World::new();
    let writer = move |world: &World| {
        let fence = Fence::new(LEASE, hold);
        now(world.store.fence(&group(&[0]), &fence));
        now(world.store.invalidate(&group(&[0]), Some(&fence)));
        // Now the replica has it.
        world.rows[0].write(|| ());
        advance(LEASE);
    };
    let reader = |world: &World| (0..2).for_each(|_| read(world, Capture::First));
    join([world.spawn(writer), world.spawn(reader), world.spawn(reader)]);
    read(&world, Capture::First);
}

#[test]
fn a_fence_that_is_held_covers_a_replica_that_lags() {
    holds(|| a_lagging_replica(LEASE));
}

#[test]
fn a_fence_held_too_short_is_found_out() {
    breaks(|| a_lagging_replica(Duration::ZERO), STALE);
}

/// Everything is dropped, and a fence goes on.
fn a_clearing(capture: Capture) {
    let world = World::new();
    let writer = |world: &World| {
        let fence = fence();
        now(world.store.fence(&group(&[1]), &fence));
        world.rows[0].write(|| now(world.store.clear()));
        assert!(world.store.generations(&[1])[0].is_fenced(), "a fence that was cleared");
    };
    let reader = move |world: &World| (0..2).for_each(|_| read(world, capture));
    join([world.spawn(writer), world.spawn(reader), world.spawn(reader), world.spawn(churn)]);
    read(&world, capture);
}

#[test]
fn nothing_survives_a_clearing_but_fences() {
    holds(|| a_clearing(Capture::First));
}

#[test]
fn what_is_captured_after_a_clearing_is_found_out() {
    breaks(|| a_clearing(Capture::Late), STALE);
}

/// Entries of one tag that push each other out while it is dropped, twice.
fn a_store_that_is_too_small() {
    let world = World::with_capacity(1_100);
    let (stored, counted) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let filler = |world: &Arc<World>, of: u8| {
        let stored = stored.clone();
        world.spawn(move |world| {
            let generations = world.store.generations(&[0, 1]);
            let row = world.rows[0].read();
            now(world.store.fill(&key(of), entry(row, &[0, 1], &generations), Tier::default(), 0));
            stored.fetch_add(1, SeqCst);
            if let Some(entry) = world.store.peek(key(of).as_bytes(), 0) {
                assert!(value(&entry) >= row);
            }
        })
    };
    let dropper = |world: &Arc<World>, of: u8| {
        let counted = counted.clone();
        world.spawn(move |world| {
            world.rows[0].write(|| _ = counted.fetch_add(world.store.drop_tags(&[of]), SeqCst));
            let acknowledged = world.rows[0].acknowledged();
            for of in 0..3 {
                let hit = world.store.peek(key(of).as_bytes(), 0);
                assert!(hit.is_none_or(|hit| value(&hit) >= acknowledged), "{STALE}");
            }
        })
    };
    join([filler(&world, 0), filler(&world, 1), filler(&world, 2), dropper(&world, 0), dropper(&world, 1)]);
    let (stored, counted) = (stored.load(SeqCst), counted.load(SeqCst));
    assert!(counted <= stored, "{counted} dropped of {stored}");
    let usage = world.store.usage();
    assert!(usage.bytes <= usage.capacity && usage.evictions <= stored, "{usage:?}");
}

#[test]
fn what_is_evicted_while_it_is_dropped_is_counted_once_and_served_by_nobody() {
    holds(a_store_that_is_too_small);
}
