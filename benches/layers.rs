//! What the layers cost in process: a hit beside its bare limit, a miss, what passes through, an invalidation, a stampede.
//!
//! Each figure includes building the request (and dropping the response): take `the request itself` off it.
//!
//! `cargo bench --bench layers`
#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::{
    hint::black_box,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use foldhash::fast::FixedState;
use futures_util::FutureExt;
use http::{HeaderValue, Method, Request, Response, header};
use http_body_util::Full;
use quick_cache::sync::Cache as QuickCache;
use support::{PATHS, TENANT, builder, get, headers, origin, response};
use tokio::runtime::Runtime;
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_cache_aside::{Cache, Cascade, DataType, Mutation, Route, Ttl, store::MemoryStore};

fn call<S>(service: &mut S, request: Request<Full<Bytes>>) -> S::Response
where
    S: Service<Request<Full<Bytes>>, Error = support::Never>,
{
    service.call(request).now_or_never().unwrap().unwrap()
}

/// The least that a cache of responses has to do: match one of 20 routes, read the tenant, hash both and the id to 128
/// bits, look up, compare the key, load three generations, check the expiry, and build the response.
struct Bare {
    router: matchit::Router<usize>,
    map: QuickCache<u128, Arc<Stored>>,
    start: Instant,
}

struct Stored {
    key: Vec<u8>,
    generations: [(Arc<AtomicU64>, u64); 3],
    expires: Duration,
    headers: http::HeaderMap,
    body: Bytes,
}

impl Bare {
    fn new() -> Self {
        let mut router = matchit::Router::new();
        for (i, path) in PATHS.iter().enumerate() {
            router.insert(*path, i).unwrap();
        }
        Self { router, map: QuickCache::new(10_000), start: Instant::now() }
    }

    fn key(&self, request: &Request<Full<Bytes>>) -> (u128, smallvec::SmallVec<[u8; 256]>) {
        use std::hash::BuildHasher;
        let found = self.router.at(request.uri().path()).unwrap();
        let mut key = smallvec::SmallVec::new();
        key.extend_from_slice(request.headers()[TENANT].as_bytes());
        key.push(b':');
        key.push(*found.value as u8);
        for (_, value) in found.params.iter() {
            key.push(b':');
            key.extend_from_slice(value.as_bytes());
        }
        let (low, high) = (FixedState::with_seed(1).hash_one(&key[..]), FixedState::with_seed(2).hash_one(&key[..]));
        (u128::from(high) << 64 | u128::from(low), key)
    }

    fn fill(&self, request: &Request<Full<Bytes>>) {
        let (hash, key) = self.key(request);
        let generations = std::array::from_fn(|i| (Arc::new(AtomicU64::new(i as u64)), i as u64));
        let expires = Duration::from_secs(3_600);
        let mut headers = headers();
        headers.insert("cache-status", HeaderValue::from_static(""));
        headers.insert(header::AGE, HeaderValue::from_static(""));
        let body = Bytes::from(vec![b'x'; support::BODY]);
        self.map.insert(hash, Arc::new(Stored { key: key.to_vec(), generations, expires, headers, body }));
    }

    fn answer(&self, request: &Request<Full<Bytes>>) -> Option<Response<Full<Bytes>>> {
        let (hash, key) = self.key(request);
        let stored = self.map.get(&hash)?;
        let fresh = stored.generations.iter().all(|(now, then)| now.load(Ordering::Acquire) == *then);
        if !fresh || stored.key[..] != key[..] || self.start.elapsed() > stored.expires {
            return None;
        }
        let mut response = Response::new(Full::new(stored.body.clone()));
        *response.headers_mut() = stored.headers.clone();
        Some(response)
    }
}

fn hit(c: &mut Criterion) {
    let runtime = Runtime::new().unwrap();
    let mut group = c.benchmark_group("hit");
    let path = "/agents/4711";
    let bare = Bare::new();
    bare.fill(&get(path));
    let cache = builder().memory(512 << 20).build().unwrap();
    let mut service = cache.layer().layer(origin());
    runtime.block_on(async {
        for _ in 0..2 {
            service.ready().await.unwrap().call(get(path)).await.unwrap();
        }
    });
    assert!(call(&mut service, get(path)).headers()["cache-status"].to_str().unwrap().contains("hit"));
    // By turns, so that both see the machine at both of its speeds.
    for round in 1..=3 {
        group.bench_function(BenchmarkId::new("the request itself", round), |b| b.iter(|| get(path)));
        group.bench_function(BenchmarkId::new("bare limit", round), |b| {
            b.iter(|| bare.answer(&get(path)).unwrap());
        });
        group.bench_function(BenchmarkId::new("tower-cache-aside", round), |b| {
            b.iter(|| call(&mut service, get(path)));
        });
    }
    group.finish();
}

fn pass_through(c: &mut Criterion) {
    let mut group = c.benchmark_group("pass through");
    let cache = builder().memory(512 << 20).build().unwrap();
    let mut alone = origin();
    let mut layered = cache.layer().layer(origin());
    let mut both = cache.invalidate_layer().layer(cache.layer().layer(origin()));
    let post = |path: &str| {
        let mut request = get(path);
        *request.method_mut() = Method::POST;
        request
    };
    group.bench_function("GET, origin alone", |b| b.iter(|| call(&mut alone, get("/healthz"))));
    group.bench_function("GET, cache-aside layer", |b| b.iter(|| call(&mut layered, get("/healthz"))));
    group.bench_function("GET, both layers", |b| b.iter(|| call(&mut both, get("/healthz"))));
    // A write runs in a task of its own.
    let runtime = one_thread();
    group.bench_function("POST, origin alone", |b| {
        b.iter(|| runtime.block_on(async { alone.call(post("/healthz")).await }));
    });
    group.bench_function("POST, both layers", |b| {
        b.iter(|| runtime.block_on(async { both.call(post("/healthz")).await }));
    });
    // A bypass has derived the key: what it costs more than an uncached route is the key and its `Cache-Status`.
    let with_body = || get("/agents/4711").map(|_| Full::new(Bytes::from_static(b"x")));
    group.bench_function("GET, bypassed after the key was derived", |b| {
        b.iter(|| call(&mut layered, with_body()));
    });
    group.finish();
}

/// Where a task that is spawned costs no waking of another thread.
fn one_thread() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn miss(c: &mut Criterion) {
    let runtime = one_thread();
    let cache = builder().memory(512 << 20).build().unwrap();
    let (mut alone, mut layered) = (origin(), cache.layer().layer(origin()));
    let mut group = c.benchmark_group("miss");
    let mut n = 0u64;
    let mut next = || {
        n += 1;
        get(&format!("/agents/{n}"))
    };
    group.bench_function("origin alone", |b| {
        b.iter(|| runtime.block_on(alone.call(next())));
    });
    group.bench_function("tower-cache-aside, stored", |b| {
        b.iter(|| runtime.block_on(layered.call(next())));
    });
    group.finish();
}

/// A tag with so many entries: one atomic store, however many.
fn invalidate(c: &mut Criterion) {
    let runtime = one_thread();
    let mut group = c.benchmark_group("invalidate");
    for entries in [1u32, 1_000, 100_000] {
        let cache = Cache::builder("bench")
            .single_tenant("t")
            .store(MemoryStore::with_largest(2 << 30, 4_096))
            .data_type(DataType::new("page", Ttl::Standard))
            .route(Route::new("/books/{book_id}/pages/{page_id}", "page"))
            .route(Route::new("/books/{book_id}", "book"))
            .data_type(DataType::new("book", Ttl::Standard))
            .cascade(Cascade::new("book").drops(["page"]))
            .mutation(Mutation::put("/books/{book_id}", "book"))
            .build()
            .unwrap();
        let service = cache.layer().layer(origin());
        let fill = || {
            runtime.block_on(async {
                for page in 0..entries {
                    let _ = service.clone().oneshot(get(&format!("/books/1/pages/{page}"))).await.unwrap();
                }
            });
        };
        group.sample_size(10).sampling_mode(SamplingMode::Flat);
        group.warm_up_time(Duration::from_millis(1)).measurement_time(Duration::from_millis(1));
        group.bench_function(BenchmarkId::from_parameter(entries), |b| {
            b.iter_custom(|rounds| {
                let mut took = Duration::ZERO;
                // Each needs its entries again.
                for _ in 0..rounds {
                    fill();
                    let start = Instant::now();
                    let report = runtime.block_on(cache.invalidate("t").mutated("book", "1").run()).unwrap();
                    took += start.elapsed();
                    assert_eq!(report.total(), u64::from(entries));
                }
                took
            });
        });
    }
    group.finish();
}

fn stampede(c: &mut Criterion) {
    let runtime = Runtime::new().unwrap();
    let mut group = c.benchmark_group("stampede");
    group.sample_size(20).throughput(Throughput::Elements(1_000));
    group.bench_function("1,000 tasks, one call of 1 ms", |b| {
        b.iter_custom(|rounds| {
            let mut took = Duration::ZERO;
            for _ in 0..rounds {
                let calls = Arc::new(AtomicU64::new(0));
                let counted = calls.clone();
                let origin = service_fn(move |_: Request<Full<Bytes>>| {
                    counted.fetch_add(1, Ordering::Relaxed);
                    async {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                        Ok::<_, support::Never>(response())
                    }
                });
                let service = builder().memory(512 << 20).build().unwrap().layer().layer(origin);
                let start = Instant::now();
                runtime.block_on(async {
                    let call = || tokio::spawn(service.clone().oneshot(get("/agents/1")));
                    let tasks: Vec<_> = (0..1_000).map(|_| call()).collect();
                    for task in tasks {
                        let _ = task.await.unwrap().unwrap();
                    }
                });
                took += start.elapsed();
                assert_eq!(calls.load(Ordering::Relaxed), 1);
            }
            took
        });
    });
    group.finish();
}

/// Two threads, 100,000 keys, a few of them hot.
fn zipf(c: &mut Criterion) {
    let runtime = Runtime::new().unwrap();
    let cache = builder().memory(512 << 20).build().unwrap();
    let service = cache.layer().layer(origin());
    // The popularity of rank r is 1 / r: ranks drawn log-uniformly.
    let pick = |u: f64| (100_000f64.powf(u)) as u64;
    let paths: Vec<_> =
        (0..20_000).map(|i| format!("/agents/{}", pick(f64::from(i * 7_919 % 20_000) / 20_000.0))).collect();
    runtime.block_on(async {
        for path in &paths {
            let _ = service.clone().oneshot(get(path)).await.unwrap();
        }
    });
    let mut group = c.benchmark_group("zipf");
    for threads in [1, 2] {
        group.throughput(Throughput::Elements(threads * paths.len() as u64)).sample_size(20);
        group.bench_function(BenchmarkId::new("hits, threads", threads), |b| {
            b.iter(|| {
                std::thread::scope(|scope| {
                    for _ in 0..threads {
                        scope.spawn(|| {
                            let mut service = service.clone();
                            for path in &paths {
                                black_box(call(&mut service, get(path)));
                            }
                        });
                    }
                });
            });
        });
    }
    group.finish();
}

criterion_group!(benches, hit, pass_through, miss, invalidate, stampede, zipf);
criterion_main!(benches);
