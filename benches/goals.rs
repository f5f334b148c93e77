//! What this crate is to cost, beside what it is held against: bare commands of Redis, the least that any cache of responses has
//! to do, the service itself. The goals are ratios of one run. `cargo bench --bench goals`
//!
//! Requests are like those that a server hands on, and building them is not counted: it is outside of the clock, or what it
//! takes by itself is taken off. Bodies are noise. Nobody asks the server anything while it is measured. Workers are threads of
//! tokio's multi-thread runtime, also where it is one.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "support/bare.rs"]
mod bare;
#[path = "support/measure.rs"]
mod measure;
mod support;
#[path = "support/turns.rs"]
mod turns;

use std::{
    cell::Cell,
    hint::{black_box, spin_loop},
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use bare::Bare;
use http::{Request, Response};
use measure::{Body, PATH, Shared, at_once, batches, micros, own, says};
use support::{NOISE, Never, builder, origin, response, served};
use tower::{Layer, Service, service_fn};
use tower_cache_aside::Tier;
use turns::{Goal, Side, Table};

const GIB: u64 = 1 << 30;
const PAUSE: Duration = Duration::from_millis(1);

fn main() {
    let mut table = Table::from_args("goals");
    for workers in [2, 1] {
        if table.wants(&format!("redis hit, {workers} workers")) {
            redis_hit(&mut table, workers);
        }
    }
    if table.wants("redis hit, a runtime for each core") {
        redis_hit_by_core(&mut table);
    }
    for workers in [2, 1] {
        if table.wants(&format!("redis miss, {workers} workers")) {
            redis_miss(&mut table, workers);
        }
    }
    if table.wants("redis server's time") {
        servers_time(&mut table);
    }
    if table.wants("in process") {
        in_process(&mut table);
    }
    if table.wants("threads") {
        threads(&mut table);
    }
    if table.wants("pass through") {
        pass_through(&mut table);
    }
    if table.wants("memory") {
        memory(&mut table);
    }
    table.finish(env!("CARGO_MANIFEST_DIR"));
}

fn side<'a>(name: impl Into<String>, round: impl FnMut() -> f64 + 'a) -> Side<'a> {
    (name.into(), Box::new(round))
}

fn some(count: u64, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// How often a cache's origin was asked, which says whether hits were hits.
static LOADS: AtomicU64 = AtomicU64::new(0);

fn counted() -> impl Service<Request<Body>, Response = Response<Body>, Error = Never, Future: Send> + Clone + Send {
    service_fn(|_: Request<Body>| {
        LOADS.fetch_add(1, Ordering::Relaxed);
        async { Ok::<_, Never>(response()) }
    })
}

/// Building a request, in microseconds: in batches, as dropping it is its reader's affair.
fn building() -> f64 {
    let mut took = Duration::ZERO;
    for _ in 0..64 {
        let mut batch = Vec::with_capacity(64);
        let start = Instant::now();
        batch.extend((0..64).map(|_| served(black_box(PATH))));
        took += start.elapsed();
        drop(black_box(batch));
    }
    micros(took, 64 * 64)
}

fn redis_hit(table: &mut Table, workers: usize) {
    let shared = Shared::start(workers);
    let tiers = [Tier::Off, Tier::Validated].map(|tier| {
        let service = shared.cache(tier).layer().layer(counted());
        (0..64).for_each(|task| shared.until_hits(&service, &path_of(task)));
        (format!("{tier:?}").to_lowercase(), service)
    });
    set_bare(&shared);
    for (tasks, calls) in [(1, 4_000), (8, 16_000), (64, 32_000), (256, 32_000)] {
        let (name, calls) =
            (format!("{}, {}", some(tasks, "task"), some(workers as u64, "worker")), table.calls(calls));
        let mut sides = vec![side(format!("bare GET, {name}"), || gets(&shared, tasks, calls))];
        // What many ask for at once is looked up once: with a key for each task, it is not.
        let keys = if tasks == 64 { &[false, true][..] } else { &[false] };
        for (own_key, (tier, service)) in keys.iter().flat_map(|own| tiers.iter().map(move |tier| (*own, tier))) {
            let (shared, own) = (&shared, if own_key { ", each its own key" } else { "" });
            sides.push(side(format!("a hit in Redis, `{tier}`, {name}{own}"), move || {
                let took = hits(shared, service, (tasks, calls), own_key);
                took - building() / workers.min(tasks as usize) as f64
            }));
        }
        let goals = match (tasks, workers) {
            (1, 2) => [Some(0.95); 2],
            (8, 2) => [Some(0.85); 2],
            (64, 2) => [Some(0.75), Some(0.95)],
            (64, 1) => [Some(1.2), Some(1.4)],
            (256, 2) => [Some(0.7); 2],
            _ => [None; 2],
        };
        let goals: Vec<_> = keys.iter().flat_map(|_| goals.map(Goal::Rate)).collect();
        table.compare("µs", sides, &goals);
    }
}

fn set_bare(shared: &Shared) {
    let set = redis::cmd("SET").arg("bare").arg(&NOISE[..]).take();
    shared.runtime.block_on(set.exec_async(&mut shared.bare.clone())).unwrap();
}

fn gets(shared: &Shared, tasks: u64, calls: u64) -> f64 {
    shared.spread(tasks, calls, |calls| {
        let mut connection = shared.bare.clone();
        async move {
            for _ in 0..calls {
                let get = redis::cmd("GET").arg("bare").take();
                black_box(get.query_async::<redis::Value>(&mut connection).await.unwrap());
            }
        }
    })
}

fn hits<S>(shared: &Shared, service: &S, (tasks, calls): (u64, u64), own_key: bool) -> f64
where
    S: Service<Request<Body>, Error = Never, Future: Send> + Clone + Send + 'static,
{
    let (before, next) = (LOADS.load(Ordering::Relaxed), AtomicUsize::new(0));
    let took = shared.spread(tasks, calls, |calls| {
        let n = next.fetch_add(usize::from(own_key), Ordering::Relaxed);
        let (mut service, path) = (service.clone(), path_of(n));
        async move {
            for _ in 0..calls {
                black_box(service.call(served(&path)).await.unwrap());
            }
        }
    });
    let loads = LOADS.load(Ordering::Relaxed) - before;
    assert!(loads <= 1 + calls / 1_000, "{loads} of {calls} were no hits");
    took
}

/// 64 tasks again, but two runtimes of one worker each, with connections and a cache of its own each, as two processes have: no task
/// goes from one core to the other.
fn redis_hit_by_core(table: &mut Table) {
    let first = Shared::start(1);
    let cores = [first.beside(1), first];
    cores.iter().for_each(set_bare);
    let at_once = |round: &(dyn Fn(usize) -> f64 + Sync)| {
        let rates =
            std::thread::scope(|scope| [0, 1].map(|core| scope.spawn(move || 1.0 / round(core))).map(|t| t.join()));
        1.0 / rates.into_iter().map(Result::unwrap).sum::<f64>()
    };
    let tiers = [Tier::Off, Tier::Validated].map(|tier| {
        let services = cores.each_ref().map(|core| {
            let service = core.cache(tier).layer().layer(counted());
            (0..32).for_each(|task| core.until_hits(&service, &path_of(task)));
            service
        });
        (format!("{tier:?}").to_lowercase(), services)
    });
    let (name, calls) = ("64 tasks, a runtime for each of 2 cores", table.calls(16_000));
    let mut sides = vec![side(format!("bare GET, {name}"), || at_once(&|core| gets(&cores[core], 32, calls)))];
    for (own_key, (tier, services)) in [false, true].iter().flat_map(|own| tiers.iter().map(move |tier| (*own, tier))) {
        let (cores, at_once, own) = (&cores, &at_once, if own_key { ", 32 keys" } else { "" });
        sides.push(side(format!("a hit in Redis, `{tier}`, {name}{own}"), move || {
            at_once(&|core| hits(&cores[core], &services[core], (32, calls), own_key)) - building() / 2.0
        }));
    }
    table.compare("µs", sides, &[Goal::Rate(None); 4]);
}

/// The path of a task that has its own.
fn path_of(task: usize) -> String {
    if task == 0 { PATH.to_owned() } else { format!("{PATH}-{task}") }
}

/// What its client waits for: one after the other, each when all that the last one left to do is done. Both sides pause in between,
/// or the bare one alone would find every thread awake.
fn redis_miss(table: &mut Table, workers: usize) {
    let shared = Shared::start(workers);
    let cache = shared.cache(Tier::Validated);
    let service = cache.layer().layer(origin());
    shared.until_hit(&service);
    let workers = some(workers as u64, "worker");
    let (calls, next) = (table.calls(400), Cell::new(0_u64));
    let set = side(format!("a bare SET, {workers}"), || {
        let (mut connection, from) = (shared.bare.clone(), next.replace(next.get() + calls));
        let task = async move {
            let mut times = vec![];
            for n in from..from + calls {
                let start = Instant::now();
                let set = redis::cmd("SET").arg(format!("bare:{n}")).arg(&NOISE[..]).arg("PX").arg(3_600_000).take();
                set.exec_async(&mut connection).await.unwrap();
                times.push(micros(start.elapsed(), 1));
                tokio::time::sleep(PAUSE).await;
            }
            turns::median(&times)
        };
        shared.runtime.block_on(async { tokio::spawn(task).await.unwrap() })
    });
    let miss = |path: fn(u64) -> String| {
        let (mut service, cache, from) = (service.clone(), cache.clone(), next.replace(next.get() + calls));
        let task = async move {
            let mut times = vec![];
            for n in from..from + calls {
                let request = served(&path(n));
                let start = Instant::now();
                let response = service.call(request).await.unwrap();
                times.push(micros(start.elapsed(), 1));
                assert!(says(&response, "fwd=uri-miss"), "{:?}", response.headers());
                drop(response);
                cache.settled().await;
                tokio::time::sleep(PAUSE).await;
            }
            turns::median(&times)
        };
        shared.runtime.block_on(async { tokio::spawn(task).await.unwrap() })
    };
    // The same entity, asked for in another way each time.
    let known = side(format!("a miss, generations known, {workers}"), || miss(|n| format!("{PATH}?n={n}")));
    let new = side(format!("a miss, generations new, {workers}"), || miss(|n| format!("/agents/new-{n}")));
    table.compare("µs", vec![set, known, new], &[Goal::Times(Some(1.3)), Goal::Times(Some(2.0))]);
}

fn servers_time(table: &mut Table) {
    let shared = Shared::start(2);
    let cache = shared.cache(Tier::Validated);
    let service = cache.layer().layer(origin());
    shared.until_hit(&service);
    let (calls, next) = (table.calls(8_000), AtomicU64::new(0));
    let set = side("Redis' own time for a SET", || {
        let (before, _) = shared.spent();
        shared.spread(8, calls, |calls| {
            let (mut connection, from) = (shared.bare.clone(), next.fetch_add(calls, Ordering::Relaxed));
            async move {
                for n in from..from + calls {
                    let key = format!("bare:{n}");
                    let set = redis::cmd("SET").arg(key).arg(&NOISE[..]).arg("PX").arg(3_600_000).take();
                    set.exec_async(&mut connection).await.unwrap();
                }
            }
        });
        (shared.spent().0 - before) / calls as f64
    });
    let miss = |path: fn(u64) -> String, with_reads: bool| {
        let before = shared.spent();
        shared.spread(8, calls, |calls| {
            let (mut service, from) = (service.clone(), next.fetch_add(calls, Ordering::Relaxed));
            async move {
                for n in from..from + calls {
                    black_box(service.call(served(&path(n))).await.unwrap());
                }
            }
        });
        shared.runtime.block_on(cache.settled());
        let after = shared.spent();
        let reads = if with_reads { 0.0 } else { after.1 - before.1 };
        (after.0 - before.0 - reads) / calls as f64
    };
    let known: fn(u64) -> String = |n| format!("{PATH}?n={n}");
    let new: fn(u64) -> String = |n| format!("/agents/new-{n}");
    let sides = vec![
        set,
        side("Redis' own time for a fill, generations known", || miss(known, false)),
        side("the same, generations new", || miss(new, false)),
        side("the same, with the look-up (MGET)", || miss(new, true)),
    ];
    table.compare("µs", sides, &[Some(1.3), None, None].map(Goal::Times));
}

/// So that it is there, and was asked for again.
fn fill<S: Service<Request<Body>, Error = Never>>(service: &mut S, paths: impl IntoIterator<Item = String>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        for path in paths {
            for _ in 0..2 {
                let _ = service.call(served(&path)).await.unwrap();
            }
        }
    });
}

fn in_process(table: &mut Table) {
    let bare = Bare::new();
    bare.fill(&served(PATH));
    let mut service = builder().memory(GIB).build().unwrap().layer().layer(origin());
    fill(&mut service, [PATH.to_owned()]);
    assert!(says(&at_once(&mut service, served(PATH)), "; hit"));
    let calls = table.calls(100_000);
    let sides = vec![
        side("the least that a hit can be", || batches(calls, PATH, |request| bare.answer(&request).unwrap())),
        side("a hit in process", || batches(calls, PATH, |request| at_once(&mut service, request))),
    ];
    table.compare("ns", sides, &[Goal::Times(Some(1.05))]);
}

/// All threads at once, burst by burst, with requests that are there before; what one call takes, in nanoseconds of the clock.
fn bursts<S>(threads: usize, service: &S, paths: &[String]) -> f64
where
    S: Service<Request<Body>, Error = Never> + Clone + Sync + Send,
{
    const BURST: usize = 1_024;
    let arrived = AtomicUsize::new(0);
    let rate: f64 = std::thread::scope(|scope| {
        let thread = |_| {
            scope.spawn(|| {
                let (mut service, mut took) = (service.clone(), Duration::ZERO);
                for (burst, paths) in paths.chunks_exact(BURST).enumerate() {
                    let requests: Vec<_> = paths.iter().map(|path| served(path)).collect();
                    // Both begin at once, or half a burst would have the machine to itself.
                    arrived.fetch_add(1, Ordering::AcqRel);
                    while arrived.load(Ordering::Acquire) < threads * (burst + 1) {
                        spin_loop();
                    }
                    let start = Instant::now();
                    for request in requests {
                        black_box(at_once(&mut service, request));
                    }
                    took += start.elapsed();
                }
                (paths.len() / BURST * BURST) as f64 / took.as_nanos() as f64
            })
        };
        let all: Vec<_> = (0..threads).map(thread).collect();
        all.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    1.0 / rate
}

fn threads(table: &mut Table) {
    let calls = table.calls(60 * 1_024).max(1_024);
    let hot: Vec<_> = (0..calls).map(|_| PATH.to_owned()).collect();
    // The popularity of rank r is 1 / r: ranks drawn log-uniformly.
    let rank = |i: u64| 100_000_f64.powf((i * 7_919 % calls) as f64 / calls as f64) as u64;
    let zipf: Vec<_> = (0..calls).map(|i| format!("/agents/{}", rank(i))).collect();
    for (name, paths, goal) in [("one hot key", hot, 1.8), ("zipf of 100,000 keys", zipf, 1.9)] {
        let mut service = builder().memory(GIB).build().unwrap().layer().layer(origin());
        fill(&mut service, paths.iter().cloned());
        let sides = vec![
            side(format!("{name}, one thread"), || bursts(1, &service, &paths)),
            side(format!("{name}, two threads"), || bursts(2, &service, &paths)),
        ];
        table.compare("ns", sides, &[Goal::Rate(Some(goal))]);
    }
}

fn pass_through(table: &mut Table) {
    let cache = builder().memory(GIB).build().unwrap();
    let mut alone = origin();
    let mut layered = cache.layer().layer(origin());
    let mut both = cache.invalidate_layer().layer(cache.layer().layer(origin()));
    let (path, calls) = ("/healthz", table.calls(100_000));
    let sides = vec![
        side("GET of what is not cached, the service alone", || batches(calls, path, |r| at_once(&mut alone, r))),
        side("behind the cache", || batches(calls, path, |r| at_once(&mut layered, r))),
        side("behind both layers", || batches(calls, path, |r| at_once(&mut both, r))),
    ];
    table.compare("ns", sides, &[Goal::More(Some(50.0)), Goal::More(None)]);
}

/// What an entry takes in Redis beyond what it holds, each with an entity of its own. (In process: `allocations`.)
fn memory(table: &mut Table) {
    let path = |n: u64| format!("/agents/{n:07}");
    let shared = Shared::start(2);
    let cache = shared.cache(Tier::Off);
    let service = cache.layer().layer(origin());
    shared.until_hit(&service);
    let used = || {
        let info = shared.server.command(&["INFO", "memory"]);
        info.lines().find_map(|line| line.strip_prefix("used_memory:")?.trim().parse::<f64>().ok()).unwrap()
    };
    let (entries, next, before) = (table.calls(50_000), AtomicU64::new(0), used());
    shared.spread(64, entries, |calls| {
        let (mut service, from) = (service.clone(), next.fetch_add(calls, Ordering::Relaxed));
        async move {
            for n in from..from + calls {
                let _ = service.call(served(&path(n))).await.unwrap();
            }
        }
    });
    shared.runtime.block_on(cache.settled());
    let entries = next.into_inner() as f64;
    table.count(
        "memory of an entry in Redis, beyond its own",
        "B",
        (used() - before) / entries - own(&path(0)),
        Goal::Most(None),
    );
}
