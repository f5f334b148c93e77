//! The point of it all: whatever is asked of a service behind the cache, it answers as its twin without one.
//!
//! A generator makes services, and what is asked of them and done to them; every answer is compared. By hand, for as long as one
//! likes (the seed of the first case, and how many):
//!
//! ```text
//! TWIN_SEED=1000000 TWIN_CASES=100000 cargo test --all-features --release --test twin -- --nocapture
//! ```
//!
//! What fails is made small, and said with its seed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod compare;
mod handler;
mod mapped;
#[path = "../support/mappings.rs"]
mod mappings;
#[path = "../support/redis.rs"]
mod redis;
mod requests;
mod run;
mod service;
mod wire;
mod world;

use std::{ops::Range, sync::Once};

use mapped::Mapped;
use rand::{SeedableRng, rngs::SmallRng};
use redis::Redis;
use run::{Counts, Failure, Op, Stage, case, ops, run, tried};
use service::{Flaw, Service, Tenancy};
use tower_cache_aside::{Tier, store::RedisStore};
use wire::Protocol;

/// What handlers panic of is nobody's business.
fn be_quiet() {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| {
        std::panic::set_hook(Box::new(|info| {
            if info.payload().downcast_ref() != Some(&handler::BUG) {
                eprintln!("{info}");
            }
        }));
    });
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap())
}

/// Of its own seeds a test knows how much there is to find; unless they are others, it fails without that.
fn is_about_a_cache(counts: &Counts) {
    eprintln!("{counts:?}");
    let Counts { reads, hits, writes, broken, parts, calls } = counts;
    let is_own = number("TWIN_SEED").or(number("TWIN_CASES")).is_none();
    assert!(!is_own || hits * 20 > *reads && writes * 20 > *reads && broken * parts * calls > 0, "{counts:?}");
}

/// The seeds of a test: its own, or as many as are asked for.
fn seeds(own: Range<u64>) -> Range<u64> {
    be_quiet();
    let first = number("TWIN_SEED").unwrap_or(own.start);
    let count = number("TWIN_CASES").unwrap_or(if number("TWIN_SEED").is_some() { 1 } else { own.end - own.start });
    first..first + count
}

async fn services(own: Range<u64>, stage: &Stage<'_>) -> Counts {
    let mut counts = Counts::default();
    for seed in seeds(own) {
        counts += case(&Service::random(seed, None), seed, 60, stage).await;
    }
    counts
}

#[tokio::test]
async fn services_from_memory() {
    is_about_a_cache(&services(0..120, &Stage::in_process()).await);
}

#[tokio::test]
async fn services_over_sockets() {
    let mut counts = Counts::default();
    for (protocol, own) in [(Protocol::One, 1_000..1_020), (Protocol::Two, 2_000..2_020)] {
        counts += services(own, &Stage { protocol, ..Stage::in_process() }).await;
    }
    is_about_a_cache(&counts);
}

/// Processes share what is stored; each sees the others' writes at once where it asks the store for everything.
#[tokio::test]
async fn services_from_redis() {
    let redis = Redis::start(&[]);
    let mut counts = Counts::default();
    for (tier, processes, own) in
        [(Tier::Off, 2, 3_000..3_016), (Tier::Validated, 2, 3_100..3_116), (Tier::On, 1, 3_200..3_216)]
    {
        let prefix = std::cell::Cell::new(0);
        let store = |builder: tower_cache_aside::CacheBuilder| {
            prefix.set(prefix.get() + 1);
            let prefix = format!("{tier:?}{}", (prefix.get() - 1) / processes).to_lowercase();
            builder.store(RedisStore::builder([redis.url()]).prefix(prefix).build().unwrap()).tier(tier)
        };
        let stage = Stage { processes, store: &store, has_clock: false, ..Stage::in_process() };
        for seed in seeds(own) {
            let mut service = Service::random(seed, None);
            service.answers.in_fleet = seed.is_multiple_of(2);
            counts += case(&service, seed, 60, &stage).await;
        }
    }
    is_about_a_cache(&counts);
}

/// The same bytes as without the cache, for any framing, condition and part; and the same again from the cache.
#[tokio::test]
async fn answers_come_as_they_are_sent() {
    let redis = Redis::start(&[]);
    let store = RedisStore::builder([redis.url()]).build().unwrap();
    let shared = |builder: tower_cache_aside::CacheBuilder| builder.store(store.clone()).tier(Tier::Off);
    let of_redis = Stage { protocol: Protocol::One, store: &shared, has_clock: false, ..Stage::in_process() };
    for (stage, own) in [
        (Stage { protocol: Protocol::One, ..Stage::in_process() }, 0..120),
        (Stage { protocol: Protocol::Two, ..Stage::in_process() }, 200..260),
        (of_redis, 1_000..1_060),
    ] {
        let mut service = Service::random(0, None);
        (service.mounts, service.tenancy, service.answers.body_limit) = (&[""], Tenancy::Single, 1 << 20);
        let mut counts = Counts::default();
        for seed in seeds(own) {
            let ops = requests::of_answer(seed).into_iter().map(Op::Read).collect();
            counts += tried(&service, seed, ops, &stage).await;
        }
        let Counts { reads, hits, broken, parts, calls, .. } = counts;
        let is_own = number("TWIN_SEED").or(number("TWIN_CASES")).is_none();
        assert!(
            !is_own || hits * 10 > reads && broken > 3 && parts * 40 > reads && calls > 10,
            "it is about all of it: {counts:?}"
        );
    }
}

/// Whatever mapping `build` accepts.
#[tokio::test]
async fn mappings_from_memory() {
    let mut counts = Counts::default();
    let mut mappings = 0;
    for seed in seeds(0..200) {
        let Some(mapped) = Mapped::random(seed) else { continue };
        mappings += 1;
        counts += case(&mapped, seed, 60, &Stage::in_process()).await;
    }
    let is_own = number("TWIN_SEED").or(number("TWIN_CASES")).is_none();
    assert!(!is_own || mappings > 50 && counts.hits > 1_000 && counts.writes > 500, "{mappings} mappings: {counts:?}");
}

/// Everything is stored, and each write drops all that it makes stale.
#[tokio::test]
async fn each_write_drops_every_page_that_it_affects() {
    for seed in seeds(0..100) {
        let Some(mapped) = Mapped::random(seed) else { continue };
        let warm = Op::Warm(mapped.all_pages());
        let ops = mapped.all_writes().into_iter().flat_map(|write| [warm.clone(), Op::Write(write)]);
        let ops: Vec<_> = ops.chain([warm.clone()]).collect();
        tried(&mapped, seed, ops, &Stage::in_process()).await;
    }
}

/// The twins themselves: what a mapping does not say, they find.
#[tokio::test]
async fn what_is_not_said_is_found() {
    be_quiet();
    for flaw in Flaw::ALL {
        let mut services = (0..).map(|seed| (seed, Service::random(seed, Some(flaw))));
        let mut tried = 0;
        let seed = loop {
            let (seed, service) = services.find(|(_, service)| service.has_its_flaw()).unwrap();
            let stage = Stage::in_process();
            let ops = ops(&service, &mut SmallRng::seed_from_u64(seed), 60, &stage);
            if let Err(Failure::Differs(_)) = run(&service, &ops, &stage).await {
                break seed;
            }
            tried += 1;
            assert!(tried < 100, "{flaw:?} is not found");
        };
        eprintln!("{flaw:?} is found by case {seed}");
    }
}
