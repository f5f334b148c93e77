//! What the layers cost beside the bare commands, on a redis-server of our own: hits beside `GET`, fills beside `SET PX`,
//! cascades, hits in process, and invalidation beside what it replaces, a `SCAN` for the keys.
//!
//! Whatever is compared runs by turns. The ratios, and what is too slow to repeat for criterion, are on stderr.
//!
//! `cargo bench --all-features --bench redis`
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "../tests/support/redis.rs"]
mod server;
mod support;

use std::{
    cell::RefCell,
    collections::BTreeMap,
    hint::black_box,
    iter::StepBy,
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use futures_util::FutureExt;
use http::{Request, Response};
use http_body_util::Full;
use redis::aio::MultiplexedConnection;
use server::Redis;
use support::{Never, get};
use tokio::runtime::Runtime;
use tower::{Layer, Service, service_fn};
use tower_cache_aside::{
    Cache, Cascade, DataType, Route, Tier, Ttl,
    store::{MemoryStore, RedisStore},
};

const PATH: &str = "/agents/4711";

type Turns = StepBy<Range<u64>>;

/// Whether this only shows that it works: then with few keys.
fn is_test() -> bool {
    let has = |flag: &str| std::env::args().any(|a| a == flag);
    has("--test") || !has("--bench")
}

/// Whether what criterion does not filter is asked for.
fn is_chosen(name: &str) -> bool {
    let mut filters = std::env::args().skip(1).filter(|a| !a.starts_with('-')).peekable();
    filters.peek().is_none() || filters.any(|f| name.contains(&f))
}

fn scaled(full: u64) -> u64 {
    if is_test() { full.div_ceil(1_000).max(full.min(10)) } else { full }
}

/// Calls, time and CPU time.
type Sample = (f64, Duration, Duration);

/// The server that is measured, and the bare client beside us, set up as ours is.
struct Bench {
    server: Redis,
    runtime: Runtime,
    bare: MultiplexedConnection,
    /// By name.
    tally: RefCell<BTreeMap<String, Vec<Sample>>>,
}

impl Bench {
    fn start() -> Self {
        let server = Redis::start(&["--enable-debug-command", "yes"]);
        let runtime = Runtime::new().unwrap();
        let client = redis::Client::open(format!("{}?protocol=resp3", server.url())).unwrap();
        let bare = runtime.block_on(client.get_multiplexed_async_connection()).unwrap();
        Self { server, runtime, bare, tally: RefCell::default() }
    }

    fn store(&self) -> RedisStore {
        let store = RedisStore::builder([self.server.url()]).budget(Duration::from_secs(1));
        self.runtime.block_on(async { store.build().unwrap() })
    }

    /// Divides the calls among tasks, each of which makes its own one after the other.
    fn spread<F>(&self, tasks: u64, calls: u64, task: impl Fn(Turns) -> F) -> Duration
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.runtime.block_on(async {
            let start = Instant::now();
            let all: Vec<_> =
                (0..tasks).map(|i| tokio::spawn(task((i.min(calls)..calls).step_by(tasks as usize)))).collect();
            for task in all {
                task.await.unwrap();
            }
            start.elapsed()
        })
    }

    /// Runs so many calls and keeps what they took, and what of this process' CPU: the steadier measure on shared cores.
    fn measure(&self, name: &str, tasks: u64, calls: u64, run: impl FnOnce(u64, u64) -> Duration) -> Duration {
        let before = cpu();
        let took = run(tasks, calls);
        // Warming up is not measured.
        if calls >= 4 * tasks {
            let mut tally = self.tally.borrow_mut();
            tally.entry(format!("{name}, {tasks} task(s)")).or_default().push((calls as f64, took, cpu() - before));
        }
        took
    }

    /// Calls per second (the median of the samples) and CPU per call, of ours and the others, and our share of theirs.
    fn report(&self, names: &[&str]) {
        let tally = self.tally.borrow();
        for tasks in [1, 64] {
            let mut ours = None;
            for name in names {
                let name = format!("{name}, {tasks} task(s)");
                let Some(samples) = tally.get(&name) else { continue };
                let rate = median(samples.iter().map(|(calls, took, _)| calls / took.as_secs_f64()));
                let calls: f64 = samples.iter().map(|s| s.0).sum();
                let cpu = samples.iter().map(|s| s.2).sum::<Duration>().as_secs_f64() * 1e6 / calls;
                let ours = *ours.get_or_insert(rate);
                eprintln!("{name}: {rate:.0}/s, {cpu:.1} µs of CPU each; ours is {:.2} of it", ours / rate);
            }
        }
    }

    /// Empties the server, in the background: a server that is busy for long is taken for a dead one.
    fn flush(&self) {
        self.server.command(&["FLUSHALL", "ASYNC"]);
        while !self.server.command(&["INFO", "memory"]).contains("lazyfree_pending_objects:0") {
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// How often the server has run a command, and the microseconds that took it.
    fn spent(&self, command: &str) -> (u64, u64) {
        let info = self.server.command(&["INFO", "commandstats"]);
        let line = info.lines().find_map(|l| l.strip_prefix("cmdstat_")?.strip_prefix(command)?.strip_prefix(':'));
        let field = |name: &str| line?.split(',').find_map(|f| f.strip_prefix(name)?.parse().ok());
        (field("calls=").unwrap_or(0), field("usec=").unwrap_or(0))
    }
}

fn median(samples: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<_> = samples.collect();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// What this process has had, in ticks of 10 ms.
fn cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat.rsplit(") ").next().unwrap_or_default().split(' ');
    Duration::from_millis(fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<u64>().ok()).sum::<u64>() * 10)
}

/// Like the support's, but of bytes that no compression shrinks.
fn origin(
    size: usize,
) -> impl Service<Request<Body>, Response = Response<Body>, Error = Never, Future: Send> + Clone + Send {
    let noise = (0..size as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8);
    let body: Bytes = noise.collect();
    service_fn(move |_: Request<Body>| {
        let mut response = Response::new(Full::new(body.clone()));
        *response.headers_mut() = support::headers();
        response.headers_mut().insert("content-length", size.into());
        async { Ok::<_, Never>(response) }
    })
}

type Body = Full<Bytes>;

fn says<B>(response: &Response<B>, what: &str) -> bool {
    response.headers()["cache-status"].to_str().unwrap().contains(what)
}

fn hit(c: &mut Criterion) {
    let bench = Bench::start();
    let (server, runtime) = (&bench.server, &bench.runtime);
    let tiers = [("hit", Tier::Off), ("hit, validated", Tier::Validated), ("hit, on", Tier::On)].map(|(name, tier)| {
        let cache = support::tiered(tier).store(bench.store()).build().unwrap();
        let service = cache.layer().layer(origin(support::BODY));
        runtime.block_on(async {
            let start = Instant::now();
            // Once more when it is there, so that it is in process where it may be.
            for _ in 0..20 {
                while !says(&service.clone().call(get(PATH)).await.unwrap(), "hit") {
                    assert!(start.elapsed() < Duration::from_secs(5), "never stored");
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                tokio::time::sleep(Duration::from_millis(30)).await;
            }
        });
        (name, service)
    });
    let all = server.keys("cas:*");
    let of_kind =
        |kind: &'static str| all.iter().filter(move |k| k.split(':').nth(1) == Some(kind) && !k.contains("{~"));
    let keys: Vec<_> = of_kind("e").chain(of_kind("g")).cloned().collect();
    let value = "v".repeat(support::BODY);
    let mut set = redis::cmd("SET");
    runtime.block_on(set.arg("bare").arg(value).query_async::<()>(&mut bench.bare.clone())).unwrap();
    let mut group = c.benchmark_group("redis/hit");
    group.sample_size(20).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(2));
    group.throughput(Throughput::Elements(1));
    for (tasks, round) in [1, 64].into_iter().flat_map(|tasks| (1..=3).map(move |round| (tasks, round))) {
        let id = |name: &str| BenchmarkId::new(format!("{name}, {tasks} task(s)"), round);
        let command = |name: &'static str, keys: Vec<String>| {
            let connection = &bench.bare;
            move |turns: Turns| {
                let (mut connection, keys) = (connection.clone(), keys.clone());
                async move {
                    for _ in turns {
                        let command = redis::cmd(name).arg(&keys[..]).take();
                        black_box(command.query_async::<redis::Value>(&mut connection).await.unwrap());
                    }
                }
            }
        };
        let get_one = command("GET", vec!["bare".to_owned()]);
        group.bench_function(id("bare GET"), |b| {
            b.iter_custom(|n| bench.measure("bare GET", tasks, n, |t, n| bench.spread(t, n, &get_one)));
        });
        let get_all = command("MGET", keys.clone());
        group.bench_function(id("bare MGET of our keys"), |b| {
            b.iter_custom(|n| bench.measure("bare MGET of our keys", tasks, n, |t, n| bench.spread(t, n, &get_all)));
        });
        for (name, service) in &tiers {
            let ours = |turns: Turns| {
                let mut service = service.clone();
                async move {
                    for n in turns {
                        assert!(says(&service.call(get(PATH)).await.unwrap(), "hit"));
                        // What is answered on the spot never yields, and heartbeats must come in between.
                        if n % 64 < tasks {
                            tokio::task::yield_now().await;
                        }
                    }
                }
            };
            group.bench_function(id(name), |b| {
                b.iter_custom(|n| bench.measure(name, tasks, n, |t, n| bench.spread(t, n, ours)));
            });
        }
    }
    group.finish();
    bench.report(&["hit", "hit, validated", "hit, on", "bare GET", "bare MGET of our keys"]);
}

/// Until the entry is in Redis, which the client does not wait for.
fn fill(c: &mut Criterion) {
    let bench = Bench::start();
    let service = support::tiered(Tier::Off).store(bench.store()).build().unwrap().layer().layer(origin(support::BODY));
    let next = AtomicU64::new(0);
    // Every entry is counted under each of its tags, last of all.
    let counted = || bench.spent("pfadd").0;
    let ours = |tasks, calls| {
        let (before, from) = (counted(), next.fetch_add(calls, Ordering::Relaxed));
        let start = Instant::now();
        bench.spread(tasks, calls, |turns| {
            let mut service = service.clone();
            async move {
                for n in turns {
                    let response = service.call(get(&format!("/agents/{}", from + n))).await.unwrap();
                    assert!(says(&response, "stored"), "{:?}", response.headers());
                }
            }
        });
        let tags = 2;
        while counted() < before + tags * calls {
            assert!(start.elapsed() < Duration::from_secs(60), "{} of {}", counted() - before, tags * calls);
        }
        start.elapsed()
    };
    let value = "v".repeat(support::BODY);
    let bare = |tasks, calls| {
        let from = next.fetch_add(calls, Ordering::Relaxed);
        bench.spread(tasks, calls, |turns| {
            let (mut connection, value) = (bench.bare.clone(), value.clone());
            async move {
                for n in turns {
                    let key = format!("bare:{}", from + n);
                    let set = redis::cmd("SET").arg(key).arg(&value).arg("PX").arg(3_600_000).take();
                    set.query_async::<()>(&mut connection).await.unwrap();
                }
            }
        })
    };
    let mut group = c.benchmark_group("redis/fill");
    group.sample_size(20).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(2));
    group.throughput(Throughput::Elements(1));
    for (tasks, round) in [1, 64].into_iter().flat_map(|tasks| (1..=3).map(move |round| (tasks, round))) {
        let id = |name: &str| BenchmarkId::new(format!("{name}, {tasks} task(s)"), round);
        bench.flush();
        group.bench_function(id("bare SET PX"), |b| {
            b.iter_custom(|n| bench.measure("bare SET PX", tasks, n, bare));
        });
        bench.flush();
        group.bench_function(id("fill"), |b| {
            b.iter_custom(|n| bench.measure("fill", tasks, n, ours));
        });
    }
    group.finish();
    bench.report(&["fill", "bare SET PX"]);
}

fn l1(c: &mut Criterion) {
    let bench = Bench::start();
    let _entered = bench.runtime.enter();
    let memory = support::builder().store(MemoryStore::new(64 << 20)).build().unwrap();
    let tracked = support::tiered(Tier::On).store(bench.store()).build().unwrap();
    let mut group = c.benchmark_group("redis/in process");
    for (round, (name, cache)) in
        (1..=3).flat_map(|round| [("memory alone", &memory), ("tracked", &tracked)].map(|it| (round, it)))
    {
        let mut service = cache.layer().layer(origin(support::BODY));
        // In a row: a look-up on the server may for once be answered within one poll.
        let (start, mut in_a_row) = (Instant::now(), 0);
        while in_a_row < 100 {
            in_a_row += 1;
            if !service.call(get(PATH)).now_or_never().is_some_and(|r| says(&r.unwrap(), "hit")) {
                in_a_row = 0;
                assert!(start.elapsed() < Duration::from_secs(5), "{name}: never held in process");
                let _ = bench.runtime.block_on(service.call(get(PATH)));
            }
        }
        let mut lapsed = 0u64;
        group.bench_function(BenchmarkId::new(name, round), |b| {
            b.iter(|| {
                service.call(get(PATH)).now_or_never().unwrap_or_else(|| {
                    lapsed += 1;
                    bench.runtime.block_on(service.call(get(PATH)))
                })
            });
        });
        if lapsed > 0 {
            eprintln!("{name}: {lapsed} hits were not in process");
        }
    }
    group.finish();
}

/// Pages of books: a mutation of the book drops its pages.
fn books(bench: &Bench) -> Cache {
    Cache::builder("bench")
        .single_tenant("t")
        .store(bench.store())
        .data_type(DataType::new("page", Ttl::Standard).tier(Tier::Off))
        .data_type(DataType::new("book", Ttl::Standard).tier(Tier::Off))
        .route(Route::new("/books/{book_id}/pages/{page_id}", "page"))
        .route(Route::new("/books/{book_id}", "book"))
        .cascade(Cascade::new("book").drops(["page"]))
        .build()
        .unwrap()
}

/// Stores so many pages of a book; then drops them, and says how long that took us and the server.
fn drop_pages(bench: &Bench, cache: &Cache, book: &str, pages: u64) -> (f64, Vec<(&'static str, u64, u64)>) {
    let service = cache.layer().layer(origin(16));
    let before = bench.spent("pfadd").0;
    bench.spread(64, pages, |turns| {
        let (mut service, book) = (service.clone(), book.to_owned());
        async move {
            for page in turns {
                let _ = service.call(get(&format!("/books/{book}/pages/{page}"))).await.unwrap();
            }
        }
    });
    while bench.spent("pfadd").0 < before + pages * 3 {
        std::thread::sleep(Duration::from_millis(1));
    }
    bench.server.command(&["CONFIG", "RESETSTAT"]);
    let start = Instant::now();
    let report = bench.runtime.block_on(cache.invalidate("t").mutated("book", book).run()).unwrap();
    let took = start.elapsed();
    assert!(report.total().abs_diff(pages) * 20 <= pages, "{report}, not {pages}");
    let spent = ["unlink", "pfcount"].map(|command| {
        let (calls, micros) = bench.spent(command);
        (command, calls, micros)
    });
    (took.as_secs_f64() * 1e6, spent.into())
}

/// What a cascade costs by how many entries its tags have: us, and the server, which serves nobody meanwhile.
fn cascade(_: &mut Criterion) {
    if !is_chosen("redis/cascade") {
        return;
    }
    let bench = Bench::start();
    let cache = books(&bench);
    for pages in [10, 1_000, 100_000].map(scaled) {
        let rounds: Vec<_> = (0..5).map(|_| drop_pages(&bench, &cache, &pages.to_string(), pages)).collect();
        let wall: Vec<_> = rounds.iter().map(|(wall, _)| *wall).collect();
        eprintln!("\ncascade over {pages} entries: {:.0} µs, of {wall:.0?}", median(wall.iter().copied()));
        for (_, spent) in rounds {
            eprintln!("  server, (command, calls, µs): {spent:?}");
        }
    }
}

/// What is replaced: ask for all keys, and delete those that match.
async fn scan(connection: &mut MultiplexedConnection, pattern: &str, count: u64) -> u64 {
    let (mut cursor, mut deleted) = ("0".to_owned(), 0);
    loop {
        let scan = redis::cmd("SCAN").arg(&cursor).arg("MATCH").arg(pattern).arg("COUNT").arg(count).take();
        let (next, keys): (String, Vec<String>) = scan.query_async(connection).await.unwrap();
        if !keys.is_empty() {
            deleted += redis::cmd("UNLINK").arg(keys).query_async::<u64>(connection).await.unwrap();
        }
        if next == "0" {
            return deleted;
        }
        cursor = next;
    }
}

/// On a server of a million other keys.
fn scan_and_delete(_: &mut Criterion) {
    if !is_chosen("redis/scan") {
        return;
    }
    let bench = Bench::start();
    let (others, pages) = (scaled(1_000_000), scaled(1_000));
    // Before we connect, who would take a server that is busy for so long for a dead one.
    bench.server.command(&["DEBUG", "POPULATE", &others.to_string(), "other", "16"]);
    let cache = books(&bench);
    for _ in 0..3 {
        for count in [10, 1_000] {
            bench.spread(1, pages, |turns| {
                let mut connection = bench.bare.clone();
                async move {
                    for page in turns {
                        let set = redis::cmd("SET").arg(format!("cache:t:book:1:page:{page}")).arg("x").take();
                        set.query_async::<()>(&mut connection).await.unwrap();
                    }
                }
            });
            bench.server.command(&["CONFIG", "RESETSTAT"]);
            let start = Instant::now();
            let deleted = bench.runtime.block_on(scan(&mut bench.bare.clone(), "cache:t:book:1:*", count));
            let took = start.elapsed();
            assert_eq!(deleted, pages);
            let (calls, micros) = bench.spent("scan");
            eprintln!(
                "\nSCAN, COUNT {count}, of {others} keys for {pages}: {took:.0?}; server: {micros} µs, {calls} calls"
            );
        }
        let (wall, spent) = drop_pages(&bench, &cache, "1", pages);
        eprintln!("our cascade over {pages} entries beside them: {wall:.0} µs; server: {spent:?}");
    }
}

criterion_group!(benches, hit, fill, l1, cascade, scan_and_delete);
criterion_main!(benches);
