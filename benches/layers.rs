//! What the layers cost in process besides hits and what they let pass, which `goals` measures: misses, writes, invalidations, a
//! stampede. Building requests is not counted.
//!
//! `cargo bench --bench layers`
#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use criterion::{
    BatchSize::SmallInput, BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main,
};
use futures_util::FutureExt;
use http::{Method, Request};
use http_body_util::Full;
use support::{builder, get, origin, response};
use tokio::runtime::Runtime;
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_cache_aside::{Cache, Cascade, DataType, Mutation, Route, Ttl, store::MemoryStore};

fn call<S>(service: &mut S, request: Request<Full<Bytes>>) -> S::Response
where
    S: Service<Request<Full<Bytes>>, Error = support::Never>,
{
    service.call(request).now_or_never().unwrap().unwrap()
}

fn pass_through(c: &mut Criterion) {
    let mut group = c.benchmark_group("pass through");
    let cache = builder().memory(512 << 20).build().unwrap();
    let mut alone = origin();
    let mut layered = cache.layer().layer(origin());
    let mut both = cache.invalidate_layer().layer(cache.layer().layer(origin()));
    let post = || {
        let mut request = get("/healthz");
        *request.method_mut() = Method::POST;
        request
    };
    // A write runs in a task of its own.
    let runtime = one_thread();
    group.bench_function("POST, origin alone", |b| {
        b.iter_batched(post, |request| runtime.block_on(async { alone.call(request).await }), SmallInput);
    });
    group.bench_function("POST, both layers", |b| {
        b.iter_batched(post, |request| runtime.block_on(async { both.call(request).await }), SmallInput);
    });
    // A bypass has derived the key: what it costs more than an uncached route is the key and its `Cache-Status`.
    let with_body = || get("/agents/4711").map(|_| Full::new(Bytes::from_static(b"x")));
    group.bench_function("GET, bypassed after the key was derived", |b| {
        b.iter_batched(with_body, |request| call(&mut layered, request), SmallInput);
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
        b.iter_batched(&mut next, |request| runtime.block_on(alone.call(request)), SmallInput);
    });
    group.bench_function("tower-cache-aside, stored", |b| {
        b.iter_batched(&mut next, |request| runtime.block_on(layered.call(request)), SmallInput);
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

criterion_group!(benches, pass_through, miss, invalidate, stampede);
criterion_main!(benches);
