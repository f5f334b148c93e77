//! What happens in Redis besides hits and fills, which `goals` measures: hits in process over it, cascades, and invalidation beside
//! what it replaces, a `SCAN` for the keys; on a redis-server of our own.
//!
//! Whatever is compared runs by turns. What is too slow to repeat for criterion is on stderr.
//!
//! `cargo bench --bench redis`
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "../tests/support/redis.rs"]
mod server;
mod support;

use std::{
    iter::StepBy,
    ops::Range,
    time::{Duration, Instant},
};

use criterion::{BatchSize, BenchmarkId, Criterion, criterion_group, criterion_main};
use futures_util::FutureExt;
use http::Response;
use redis::aio::MultiplexedConnection;
use server::Redis;
use support::get;
use tokio::runtime::Runtime;
use tower::{Layer, Service};
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

/// The server that is measured, and the bare client beside us, set up as ours is.
struct Bench {
    server: Redis,
    runtime: Runtime,
    bare: MultiplexedConnection,
}

impl Bench {
    fn start() -> Self {
        let server = Redis::start(&["--enable-debug-command", "yes"]);
        let runtime = Runtime::new().unwrap();
        let client = redis::Client::open(format!("{}?protocol=resp3", server.url())).unwrap();
        let bare = runtime.block_on(client.get_multiplexed_async_connection()).unwrap();
        Self { server, runtime, bare }
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

fn says<B>(response: &Response<B>, what: &str) -> bool {
    response.headers()["cache-status"].to_str().unwrap().contains(what)
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
        let mut service = cache.layer().layer(support::origin());
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
            let hit = |request| {
                service.call(request).now_or_never().unwrap_or_else(|| {
                    lapsed += 1;
                    bench.runtime.block_on(service.call(get(PATH)))
                })
            };
            b.iter_batched(|| get(PATH), hit, BatchSize::SmallInput);
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
    let service = cache.layer().layer(support::sized(16));
    bench.spread(64, pages, |turns| {
        let (mut service, book) = (service.clone(), book.to_owned());
        async move {
            for page in turns {
                let _ = service.call(get(&format!("/books/{book}/pages/{page}"))).await.unwrap();
            }
        }
    });
    bench.runtime.block_on(cache.settled());
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

criterion_group!(benches, l1, cascade, scan_and_delete);
criterion_main!(benches);
