//! Requests that lead, follow, fail and go away, in every order of their steps: the engine over the store in process.
//!
//! Each program has a twin with a fault, which has to be found.

use std::{
    sync::atomic::{AtomicUsize, Ordering::SeqCst},
    time::{Duration, UNIX_EPOCH},
};

use bytes::Bytes;
use futures_util::FutureExt;
use shuttle::{
    future::block_on,
    thread::{self, JoinHandle},
};

use super::*;
use crate::{
    catalog::{Lifetime, Policy, Ttl},
    clock::{Clock, Millis},
    engine::{
        Asker, Engine, Inside, Leader, Obtained, Sealed, Source, Use, beside,
        capture::tests::{Marking, pause},
        lookup::Begin,
        stale::Attempt,
    },
    store::{Fence, Generation, Mark, MemoryStore, Opened, Payload, Store, TagGroup},
    sync::tried::{Row, breaks, holds, holds_always},
};

const STALE: &str = "a read that was given what was before it";

fn tag(of: u8) -> Tag {
    Tag::entity(b"s{t}", "doc", "doc", &[b'0' + of])
}

fn key(of: u8) -> Key {
    Key::new(vec![b'k', of])
}

/// Two rows of a database, an engine, and how often the rows were read for it.
struct World {
    store: Arc<MemoryStore>,
    engine: Arc<Engine>,
    policy: Policy,
    rows: [Row; 2],
    loads: AtomicUsize,
}

impl World {
    fn new() -> Arc<Self> {
        Self::that_remembers(1 << 20)
    }

    /// Of its keys, in so many bytes.
    fn that_remembers(memory: u64) -> Arc<Self> {
        let store = Arc::new(MemoryStore::new(1 << 20));
        Self::over(store.clone(), store, memory)
    }

    /// Whose store is far away, and proves what it says or does not.
    fn far_away(proves: bool) -> Arc<Self> {
        let store = Arc::new(MemoryStore::new(1 << 20));
        Self::over(store.clone(), Arc::new(Marking::new(store, proves)), 1 << 20)
    }

    fn over(store: Arc<MemoryStore>, of_engine: Arc<dyn Store>, memory: u64) -> Arc<Self> {
        let engine = Arc::new(Engine::new(of_engine, Clock::Custom(Arc::new(|| UNIX_EPOCH)), memory));
        let (policy, rows, loads) = (Policy::from(Ttl::Short), Default::default(), AtomicUsize::new(0));
        Arc::new(Self { store, engine, policy, rows, loads })
    }

    fn spawn<F>(self: &Arc<Self>, what: impl FnOnce(Arc<Self>) -> F + Send + 'static) -> JoinHandle<()>
    where
        F: Future<Output = ()>,
    {
        let world = self.clone();
        thread::spawn(move || block_on(what(world)))
    }

    fn drop_tag(&self, of: u8, fence: Option<&Fence>) {
        let groups = [TagGroup::new("doc", vec![tag(of)])];
        self.store.invalidate(&groups, fence).now_or_never().unwrap().unwrap();
    }

    /// Stores what has nothing to do with it under the first tag, whose generation is not forgotten then.
    fn keep_tag(&self) {
        let generations = self.store.open(&[tag(0)]).now_or_never().unwrap().unwrap().generations;
        let stamps = [Stamp { tag: tag(0), generation: generations[0] }];
        let entry = Arc::new(Entry::new(payload(0), stamps.into(), 0, life()));
        self.store.fill(&key(9), entry, self.policy.tier(), 0).now_or_never().unwrap().unwrap();
    }

    async fn begin(&self) -> Begin {
        self.engine.begin(&key(0), &[tag(0)], &self.policy, Attempt::default()).await
    }

    /// What a request for this key is answered; `load` is for the one who leads.
    async fn get(&self, of: u8, load: impl AsyncFnOnce(Leader) -> u64) -> u64 {
        match self.engine.obtain(key(of), &[tag(0)], &self.policy, &mut Caller).await {
            Obtained::Answer(answer) => answer,
            Obtained::Load(Some(leader)) => load(leader).await,
            _ => panic!("no answer"),
        }
    }

    /// Reads a row for those who wait, and for the store.
    async fn load(&self, mut leader: Leader, row: usize) -> u64 {
        let loads = self.loads.fetch_add(1, SeqCst);
        let read = async {
            // At once, or while what was absent is made, or after that.
            for _ in 0..loads % 3 {
                pause().await;
            }
            self.rows[row].read()
        };
        let read = beside(Some(&mut leader), read).await;
        if let Some(sealed) = seal(leader, read, row).await {
            sealed.store().await;
        }
        read
    }
}

/// The second row's tag is one that only its responses declare.
async fn seal(leader: Leader, read: u64, row: usize) -> Option<Sealed> {
    let late = if row == 1 { vec![tag(1)] } else { vec![] };
    leader.seal(payload(read), late, life(), None).await
}

fn life() -> Lifetime {
    Lifetime::fresh_for(Some(Duration::from_secs(300)))
}

fn payload(value: u64) -> Payload {
    Payload::Value(Bytes::copy_from_slice(&value.to_be_bytes()))
}

fn value(entry: &Entry) -> u64 {
    let Payload::Value(bytes) = &entry.payload else { panic!("no value") };
    u64::from_be_bytes(bytes[..].try_into().unwrap())
}

struct Caller;

impl Asker for Caller {
    type Answer = u64;

    fn judge(&mut self, entry: Arc<Entry>, _: Source, _: Millis) -> Use<u64> {
        Use::Answer(value(&entry))
    }
}

fn join(threads: impl IntoIterator<Item = JoinHandle<()>>) {
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

/// Joins whatever flight there is, as if it had read the same generations.
async fn get_from_any_flight(world: &World) -> u64 {
    if let Some(other) = world.engine.flights.current(&key(0)) {
        let own = Arc::new(Flight::new(other.tags.clone(), other.capture.clone(), 0, other.until));
        if let Some(flight) = world.engine.flights.join_or_lead(&key(0), &own, None)
            && let Landed::Done(entry) = world.engine.follow(flight).await
        {
            return value(&entry);
        }
        world.engine.flights.remove(&key(0), &own);
    }
    world.get(0, async |leader| world.load(leader, 0).await).await
}

fn three_readers_and_a_writer(world: Arc<World>, joins_equal: bool) {
    let reader = || {
        world.spawn(move |world| async move {
            let acknowledged = world.rows[0].acknowledged();
            let answer = match joins_equal {
                true => world.get(0, async |leader| world.load(leader, 0).await).await,
                false => get_from_any_flight(&world).await,
            };
            assert!(answer >= acknowledged, "{STALE}: {answer} after {acknowledged}");
        })
    };
    let readers = [reader(), reader(), reader()];
    world.rows[0].write(|| world.drop_tag(0, None));
    join(readers);
}

#[test]
fn a_read_shares_no_flight_from_before_a_write() {
    holds(|| three_readers_and_a_writer(World::new(), true));
}

/// Nor does one whose generations are made while it is under way.
#[test]
fn a_read_shares_no_flight_from_before_a_write_and_what_is_absent_is_made_beside_it() {
    holds(|| three_readers_and_a_writer(World::far_away(true), true));
}

#[test]
fn what_is_not_proven_of_what_was_absent_is_found_out() {
    breaks(|| three_readers_and_a_writer(World::far_away(false), true), STALE);
}

#[test]
fn a_flight_that_is_not_equal_is_found_out() {
    breaks(|| three_readers_and_a_writer(World::new(), false), STALE);
    breaks(|| three_readers_and_a_writer(World::far_away(true), false), STALE);
}

/// A write with a fence, and readers that began before it, under it and after it.
fn readers_and_a_fence(is_raised_first: bool) {
    let world = World::new();
    let reader = || {
        world.spawn(|world| async move {
            let acknowledged = world.rows[0].acknowledged();
            let answer = world.get(0, async |leader| world.load(leader, 0).await).await;
            assert!(answer >= acknowledged, "{STALE}: {answer} after {acknowledged}");
        })
    };
    let readers = [reader(), reader()];
    let fence = Fence::new(Duration::from_secs(10), Duration::ZERO);
    let raise = || {
        let groups = [TagGroup::new("doc", vec![tag(0)])];
        world.store.fence(&groups, &fence).now_or_never().unwrap().unwrap();
    };
    if is_raised_first {
        raise();
        // It dies here, and what it has written is known to all.
        world.rows[0].write(|| ());
    } else {
        world.rows[0].write(|| ());
        raise();
    }
    join(readers);
    join([reader()]);
}

#[test]
fn nothing_read_under_a_fence_is_shared_or_stored() {
    holds(|| readers_and_a_fence(true));
}

#[test]
fn a_fence_raised_after_the_write_is_found_out() {
    breaks(|| readers_and_a_fence(false), STALE);
}

/// Lands, and only then stores: who comes in between has neither a flight nor an entry.
async fn load_and_land_first(world: &World, mut leader: Leader) -> u64 {
    world.loads.fetch_add(1, SeqCst);
    let (payload, stamps) = (payload(0), leader.flight.stamps().unwrap().collect());
    let entry = Arc::new(Entry::new(payload, stamps, 0, life()));
    leader.land(Landed::Done(entry.clone()));
    world.store.fill(&key(0), entry, world.policy.tier(), 0).await.unwrap();
    0
}

fn three_misses(world: Arc<World>, stores_first: bool) {
    let request = || {
        world.spawn(move |world| async move {
            let load = async |leader| match stores_first {
                true => world.load(leader, 0).await,
                false => load_and_land_first(&world, leader).await,
            };
            world.get(0, load).await;
        })
    };
    join([request(), request(), request()]);
    assert_eq!(world.loads.load(SeqCst), 1, "calls for one key");
    assert!(world.engine.flights.current(&key(0)).is_none(), "a flight that never ends");
}

#[test]
fn three_misses_are_one_call() {
    holds(|| three_misses(World::new(), true));
    holds(|| three_misses(World::far_away(true), true));
}

#[test]
fn a_flight_that_ends_before_its_entry_is_stored_is_found_out() {
    breaks(|| three_misses(World::new(), false), "calls for one key");
}

/// How a leader may end.
#[derive(Clone, Copy, PartialEq)]
enum End {
    Dropped,
    Declined,
    /// It never ends: what must not happen.
    Forgotten,
}

fn a_leader_that_fails(end: End) {
    let (world, failures) = (World::new(), Arc::new(AtomicUsize::new(0)));
    let request = || {
        let failures = failures.clone();
        world.spawn(move |world| async move {
            let load = async |leader: Leader| {
                if failures.fetch_add(1, SeqCst) > 0 {
                    return world.load(leader, 0).await;
                }
                thread::yield_now();
                match end {
                    End::Dropped => drop(leader),
                    End::Declined => leader.decline(),
                    End::Forgotten => std::mem::forget(leader),
                }
                0
            };
            world.get(0, load).await;
        })
    };
    join([request(), request(), request()]);
    // Who failed has an answer of its own, and the others one call between them.
    assert!(world.loads.load(SeqCst) <= 1, "calls for one key after the first");
}

#[test]
fn a_leader_that_fails_is_followed_by_one_other() {
    holds(|| a_leader_that_fails(End::Dropped));
}

#[test]
fn a_leader_that_declines_is_followed_by_one_other() {
    holds(|| a_leader_that_fails(End::Declined));
}

#[test]
fn a_leader_that_vanishes_without_a_word_is_found_out() {
    breaks(|| a_leader_that_fails(End::Forgotten), "deadlock");
}

/// Each request has a response of its own.
fn responses_for_nobody_else(is_shared: bool) {
    let world = World::new();
    let request = |own: u64| {
        world.spawn(move |world| async move {
            let load = async |leader: Leader| {
                world.loads.fetch_add(1, SeqCst);
                match is_shared {
                    true => seal(leader, own, 0).await.unwrap().store().await,
                    false => leader.unshareable(),
                }
                own
            };
            assert_eq!(world.get(0, load).await, own, "the response of another");
        })
    };
    join([request(1), request(2), request(3)]);
    assert_eq!(world.loads.load(SeqCst), 3);
}

#[test]
fn an_unshareable_response_is_nobody_elses() {
    holds(|| responses_for_nobody_else(false));
}

#[test]
fn a_response_that_is_shared_is_found_out() {
    breaks(|| responses_for_nobody_else(true), "the response of another");
}

/// Takes what a flight has brought without asking whether its late tags still have these generations.
async fn get_unproven(world: &World) -> u64 {
    match world.begin().await {
        Begin::Follow(flight, _) => match flight.wait(&[]).await {
            Landed::Done(entry) => value(&entry),
            _ => world.rows[1].read(),
        },
        Begin::Hit(entry) => value(&entry),
        Begin::Lead(leader) => world.load(leader, 1).await,
        _ => panic!("no answer"),
    }
}

/// The second row is what is read, and only the response says so.
fn late_tags(are_proven: bool) {
    // What is remembered of a key may be lost at any time.
    let world = World::that_remembers(0);
    world.keep_tag();
    let reader = || {
        world.spawn(move |world| async move {
            let acknowledged = world.rows[1].acknowledged();
            let answer = match are_proven {
                true => world.get(0, async |leader| world.load(leader, 1).await).await,
                false => get_unproven(&world).await,
            };
            assert!(answer >= acknowledged, "{STALE}: {answer} after {acknowledged}");
        })
    };
    let readers = [reader(), reader()];
    world.rows[1].write(|| world.drop_tag(1, None));
    join(readers);
}

#[test]
fn followers_are_given_what_late_tags_prove() {
    holds(|| late_tags(true));
}

#[test]
fn followers_that_ask_for_no_proof_are_found_out() {
    breaks(|| late_tags(false), STALE);
}

/// As [`Follower::wait`], in the other order: asks first, and then says that it waits.
async fn wait_unsaid(flight: Follower, inside: &[Arc<Flight>]) -> Landed {
    if flight.is_needed_by(inside) {
        return Landed::Alone;
    }
    let _waiting = Waiting::new(inside, &flight.flight);
    let is_over = flight.flight.is_over.notified();
    if flight.landed().is_none() {
        is_over.await;
    }
    flight.landed().unwrap()
}

/// A call that needs another key, whose call needs this one.
async fn get_both(world: &World, own: u8, says_first: bool) {
    let load = async |leader: Leader| {
        let inside = Inside::of(Some(&leader));
        let flights = inside.flights().to_vec();
        let part = async {
            if says_first {
                return world.get(1 - own, async |leader| world.load(leader, 0).await).await;
            }
            match world.engine.begin(&key(1 - own), &[tag(0)], &world.policy, Attempt::default()).await {
                Begin::Follow(flight, _) => match wait_unsaid(flight, &flights).await {
                    Landed::Done(entry) => value(&entry),
                    _ => world.rows[0].read(),
                },
                Begin::Hit(entry) => value(&entry),
                Begin::Lead(leader) => world.load(leader, 0).await,
                _ => panic!("no answer"),
            }
        };
        let part = inside.around(part).await;
        if let Some(sealed) = seal(leader, part, 0).await {
            sealed.store().await;
        }
        part
    };
    world.get(own, load).await;
}

fn calls_that_need_each_other(says_first: bool) {
    let world = World::new();
    join([0, 1].map(|own| world.spawn(move |world| async move { get_both(&world, own, says_first).await })));
    for of in [0, 1] {
        assert!(world.engine.flights.current(&key(of)).is_none(), "a flight that never ends");
    }
}

#[test]
fn calls_that_need_each_other_do_not_wait_for_each_other() {
    holds(|| calls_that_need_each_other(true));
}

#[test]
fn a_wait_that_is_not_said_before_it_is_asked_is_found_out() {
    breaks(|| calls_that_need_each_other(false), "deadlock");
}

fn flight(of: u8) -> Arc<Flight> {
    let until = Instant::now() + Duration::from_secs(3_600);
    let capture = Capture::opened(Opened::new(vec![Generation(of.into())], Mark(0)));
    Arc::new(Flight::new(vec![tag(0)], capture, 0, until))
}

/// Of two who want to lead, one does; asked in two steps, both may.
fn two_who_want_to_lead(in_one_step: bool) {
    let (flights, leaders) = (Arc::new(Flights::default()), Arc::new(AtomicUsize::new(0)));
    let threads = [(); 2].map(|()| {
        let (flights, leaders) = (flights.clone(), leaders.clone());
        thread::spawn(move || {
            let own = flight(1);
            let leads = match in_one_step {
                true => flights.join_or_lead(&key(0), &own, None).is_none(),
                false => {
                    let leads = flights.current(&key(0)).is_none();
                    flights.shard(&key(0)).entry(key(0)).or_insert(own);
                    leads
                }
            };
            leaders.fetch_add(leads.into(), SeqCst);
        })
    });
    join(threads);
    assert_eq!(leaders.load(SeqCst), 1, "leaders of one key");
}

#[test]
fn exactly_one_leads_in_all_orders() {
    holds_always(|| two_who_want_to_lead(true), 1_000_000);
}

#[test]
fn a_lead_taken_in_two_steps_is_found_out() {
    breaks(|| two_who_want_to_lead(false), "leaders of one key");
}

/// How a follower may wait.
#[derive(Clone, Copy, PartialEq)]
enum Waits {
    AsItShould,
    /// For what comes after it has looked twice.
    ForChange,
}

/// A flight lands, and its leader goes away, while others come.
fn a_landing(waits: Waits) {
    let (flights, own) = (Arc::new(Flights::default()), flight(1));
    assert!(flights.join_or_lead(&key(0), &own, None).is_none());
    let followers = [(); 2].map(|()| {
        let flights = flights.clone();
        thread::spawn(move || {
            let Some(follower) = flights.current(&key(0)).and_then(|f| flights.join_or_lead(&key(0), &f, None)) else {
                return;
            };
            if waits == Waits::AsItShould {
                assert!(matches!(block_on(follower.wait(&[])), Landed::Unshareable), "the second word");
            } else if follower.landed().is_none() {
                thread::yield_now();
                block_on(follower.flight.is_over.notified());
            }
        })
    });
    own.land(Landed::Unshareable);
    flights.remove(&key(0), &own);
    // The first word counts.
    own.land(Landed::Failed);
    drop(own);
    join(followers);
}

#[test]
fn no_follower_misses_a_landing() {
    holds(|| a_landing(Waits::AsItShould));
}

#[test]
fn a_wake_up_that_is_lost_is_found_out() {
    breaks(|| a_landing(Waits::ForChange), "deadlock");
}

/// A call that takes too long, or as long as it likes.
fn a_call_that_does_not_end(is_overdue: bool) {
    let world = World::new();
    let Begin::Lead(leader) = block_on(world.begin()) else { panic!("nobody leads") };
    let follower = world.spawn(|world| async move {
        assert_eq!(world.get(0, async |leader| world.load(leader, 0).await).await, 0);
    });
    let clock = thread::spawn(move || {
        thread::yield_now();
        if is_overdue {
            shuttle_tokio::time::trigger_timeouts(|_| true);
        }
    });
    join([follower, clock]);
    assert_eq!(world.engine.overdue.load(SeqCst), 1);
    assert!(leader.flight.awaits().is_empty());
    assert_eq!(block_on(world.load(leader, 0)), 0);
    assert!(world.engine.flights.current(&key(0)).is_none(), "a flight that never ends");
}

#[test]
fn nobody_waits_for_a_call_that_takes_too_long() {
    holds(|| a_call_that_does_not_end(true));
}

#[test]
fn a_wait_without_a_bound_is_found_out() {
    breaks(|| a_call_that_does_not_end(false), "deadlock");
}

/// A follower that goes away while it waits leaves nothing behind.
#[test]
fn a_follower_that_goes_away_is_forgotten() {
    holds(|| {
        let (inside, own) = (flight(2), flight(1));
        let follower = Follower { flight: own.clone(), own: None };
        let waiting = {
            let inside = inside.clone();
            thread::spawn(move || _ = follower.wait(&[inside]).now_or_never())
        };
        own.land(Landed::Failed);
        waiting.join().unwrap();
        assert!(inside.awaits().is_empty(), "it waits for ever");
    });
}
