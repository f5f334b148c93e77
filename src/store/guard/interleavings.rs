//! Invalidations that do not reach the store, in every order of their steps.

use shuttle::{
    future::block_on,
    thread::{self, JoinHandle},
};

use super::*;
use crate::{
    store::MemoryStore,
    sync::tried::{Row, breaks, holds},
};

type Guarded = Guard<MemoryStore>;

fn tag() -> Tag {
    Tag::entity(b"s{t}", "doc", "doc", b"1")
}

fn groups() -> Vec<TagGroup> {
    vec![TagGroup::new("doc", vec![tag()])]
}

struct World {
    guard: Guarded,
    row: Row,
}

impl World {
    fn new() -> Arc<Self> {
        Arc::new(Self { guard: Guard::new(MemoryStore::new(1 << 20)), row: Row::default() })
    }

    /// A write whose client hangs up before the store has answered: it goes to the journal.
    fn write(&self, how: fn(&Guarded)) {
        self.row.write(|| how(&self.guard));
    }

    fn spawn(self: &Arc<Self>, what: impl FnOnce(&Self) + Send + 'static) -> JoinHandle<()> {
        let world = self.clone();
        thread::spawn(move || what(&world))
    }
}

fn postpone(guard: &Guarded) {
    drop(Pending::new(&guard.shared, What::Groups(groups())));
}

/// Takes it to be delivered already where somebody delivers, and looks no more when that is over.
fn postpone_carelessly(guard: &Guarded) {
    let shared = &guard.shared;
    shared.postpone(&What::Groups(groups()), &"its caller went away".into());
    if !shared.delivering.swap(true, Ordering::AcqRel) {
        let shared = shared.clone();
        shuttle::future::spawn(async move {
            while let Some(batch) = { shared.journal().front() } {
                shared.attempt(&batch.what).await.unwrap();
                shared.strike(&batch);
            }
            shared.delivering.store(false, Ordering::Release);
        });
    }
}

fn two_writes_and_a_drain(how: fn(&Guarded)) {
    let world = World::new();
    let writers = [(); 2].map(|()| world.spawn(move |world| world.write(how)));
    writers.into_iter().for_each(|thread| thread.join().unwrap());
    block_on(async {
        while world.guard.shared.is_behind() {
            // Without asking for it, as `drain` does.
            let emptied = world.guard.shared.emptied.notified();
            if world.guard.shared.is_behind() {
                emptied.await;
            }
        }
    });
    assert!(world.guard.shared.outage().is_none() && world.guard.health() == Health::Ok);
}

#[test]
fn what_is_postponed_is_delivered() {
    holds(|| two_writes_and_a_drain(postpone));
}

#[test]
fn what_is_added_while_the_last_delivery_ends_is_found_out_if_nobody_looks_again() {
    breaks(|| two_writes_and_a_drain(postpone_carelessly), "deadlock");
}

/// Drops nothing that this process would notice, and delivers.
fn deliver_later(guard: &Guarded) {
    let shared = guard.shared.clone();
    thread::spawn(move || {
        shared.postpone(&What::Groups(groups()), &"its caller went away".into());
        shared.deliver();
    });
}

/// What was read before a write is no answer after it, whether the journal holds the write or the store has it.
fn a_reader_and_a_write(how: fn(&Guarded)) {
    let world = World::new();
    let before = block_on(world.guard.open(&[tag()])).unwrap().generations;
    let reader = world.spawn(move |world| {
        let acknowledged = world.row.acknowledged();
        let found = block_on(world.guard.open(&[tag()]));
        let is_current = found.is_ok_and(|found| found.generations == before);
        assert!(!(is_current && acknowledged > 0), "a generation that a write had dropped");
    });
    world.write(how);
    reader.join().unwrap();
    block_on(world.guard.drain(Duration::from_secs(1))).unwrap();
}

#[test]
fn nothing_is_read_while_a_write_waits_to_be_delivered() {
    holds(|| a_reader_and_a_write(postpone));
}

#[test]
fn a_write_acknowledged_before_it_is_in_the_journal_is_found_out() {
    breaks(|| a_reader_and_a_write(deliver_later), "had dropped");
}
