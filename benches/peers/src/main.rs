//! Hits, misses and what passes through, of this crate and of its peers in one run; and over Redis beside a cache-aside as people
//! write it by hand; and the clients of Redis. `cargo run --release --manifest-path benches/peers/Cargo.toml`
//!
//! As `goals` measures: by turns, without building requests, bodies of noise, 20 routes, a tenant header. Of this crate only the
//! feature `redis` is on.
#![allow(clippy::unwrap_used)]

mod clients;
#[path = "../../support/measure.rs"]
mod measure;
#[path = "../../../tests/support/redis.rs"]
mod server;
#[path = "../../support/mod.rs"]
mod support;
#[path = "../../support/turns.rs"]
mod turns;

use std::{
    convert::Infallible,
    hint::black_box,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use axum::body::Body;
use bytes::Bytes;
use hitbox::policy::PolicyConfig;
use hitbox_http::{
    BufferedBody, CacheableHttpRequest, CacheableHttpResponse,
    extractors::{Method as ByMethod, header::HeaderExtractor, path::PathExtractor},
    predicates::{NeutralResponsePredicate, request::Method as OnlyMethod},
};
use hitbox_tower::CacheConfig;
use http::{Method, Request, Response};
use http_body_util::Full;
use redis::{AsyncCommands, aio::MultiplexedConnection};
// As the crate's own modules name it.
pub(crate) use clients::mux;
use support::{NOISE, TENANT, builder, headers, served};
use tokio::runtime::Runtime;
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_cache_aside::{Tier, store::RedisStore};
use turns::{Goal, Side, Table};

const PATH: &str = "/agents/4711";
/// So few that what the allocator keeps at hand is enough for them, as it is where requests come one by one.
const BATCH: u64 = 4;
const LONG: Duration = Duration::from_secs(3_600);

fn main() {
    let mut table = Table::from_args("peers");
    for what in [What::Hit, What::Miss, What::PassThrough] {
        if table.wants(&format!("{what:?}").to_lowercase()) {
            in_process(&mut table, what);
        }
    }
    for (tasks, calls) in [(1, 4_000), (64, 32_000)] {
        if table.wants("redis") {
            over_redis(&mut table, tasks, calls);
        }
    }
    for workers in [2, 1] {
        if table.wants("clients") {
            clients::compare(&mut table, workers);
        }
    }
    table.finish(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
}

#[derive(Clone, Copy, Debug)]
enum What {
    Hit,
    Miss,
    PassThrough,
}

fn request(what: What) -> Request<Body> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let request = match what {
        What::Hit => served(PATH),
        What::Miss => served(&format!("/agents/{}", NEXT.fetch_add(1, Ordering::Relaxed))),
        What::PassThrough => {
            let mut request = served("/elsewhere");
            *request.method_mut() = Method::POST;
            request
        }
    };
    request.map(|_| Body::empty())
}

/// How often an origin was asked, which says whether hits were hits.
static LOADS: AtomicU64 = AtomicU64::new(0);

fn origin<B: Send + 'static, R: From<Bytes> + Send + 'static>()
-> impl Service<Request<B>, Response = Response<R>, Error = Infallible, Future: Send> + Clone + Send + Sync + 'static {
    // When it is polled: one peer calls the service for each hit, and drops what that returns.
    service_fn(|_: Request<B>| async {
        LOADS.fetch_add(1, Ordering::Relaxed);
        Ok::<_, Infallible>(support::response().map(|_| R::from(Bytes::copy_from_slice(&NOISE))))
    })
}

/// As its documentation has it; the tenant is in the key.
fn hitbox_config() -> impl CacheConfig<CacheableHttpRequest<Body>, CacheableHttpResponse<Body>> + Clone {
    hitbox::Config::builder()
        .request_predicate(OnlyMethod::new(Method::GET).unwrap())
        .response_predicate(NeutralResponsePredicate::new())
        .extractor(ByMethod::new().path("/agents/{agent_id}").header(TENANT.to_owned()))
        .policy(PolicyConfig::builder().ttl(LONG).build())
        .build()
}

/// One thread; in batches whose requests are there before.
fn turn<'a, S, R>(name: &str, mut service: S, what: What, calls: u64, runtime: &'a Runtime) -> Side<'a>
where
    S: Service<Request<Body>, Response = Response<R>, Error: std::fmt::Debug> + 'a,
{
    let mut some = move |runtime: &Runtime, calls: u64| {
        let (mut took, mut batch) = (Duration::ZERO, Vec::with_capacity(BATCH as usize));
        for _ in 0..calls.div_ceil(BATCH) {
            batch.extend((0..BATCH).map(|_| request(what)));
            let start = Instant::now();
            runtime.block_on(async {
                for request in batch.drain(..) {
                    // Reading the body is the client's affair.
                    drop(black_box(service.ready().await.unwrap().call(request).await.unwrap()));
                }
            });
            took += start.elapsed();
        }
        took.as_nanos() as f64 / (calls.div_ceil(BATCH) * BATCH) as f64
    };
    some(runtime, 64);
    let measured = name.to_owned();
    let turn = move || {
        let before = LOADS.load(Ordering::Relaxed);
        let cost = some(runtime, calls);
        let loads = LOADS.load(Ordering::Relaxed) - before;
        assert_eq!(loads == 0, matches!(what, What::Hit), "{measured}, {what:?}: {loads} of {calls} asked the origin");
        cost
    };
    (format!("{what:?}: {name}"), Box::new(turn))
}

fn in_process(table: &mut Table, what: What) {
    use tower_http_cache::prelude::*;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let calls = table.calls(if matches!(what, What::Miss) { 10_000 } else { 50_000 });
    let ours = builder().memory(1 << 30).build().unwrap().layer().layer(origin::<Body, Body>());
    let axum_response_cache = axum_response_cache::CacheLayer::with_lifespan(LONG).layer(origin::<Body, Body>());
    let tower_http_cache = CacheLayer::builder(InMemoryBackend::new(1_000_000)).ttl(LONG).build();
    // It asks for bodies that are `Sync`, which axum's are not.
    let tower_http_cache = tower_http_cache.layer(origin::<Full<Bytes>, Full<Bytes>>());
    let tower_http_cache = tower_http_cache.map_request(|request: Request<Body>| request.map(|_| Full::default()));
    let moka = hitbox_moka::MokaBackend::builder().max_entries(1_000_000).build();
    let hitbox = hitbox_tower::Cache::builder().backend(moka).config(hitbox_config()).build();
    let hitbox = hitbox.layer(origin::<BufferedBody<Body>, Body>());
    let turn_of = |name| turn(name, origin::<Body, Body>(), what, calls, &runtime);
    let mut sides = vec![];
    // A hit is held against the leanest peer; all else against the service itself.
    let peer = "axum-response-cache (no tenant, no routes, caches any method)";
    match what {
        What::Hit => sides.push(turn(peer, axum_response_cache, what, calls, &runtime)),
        What::Miss => {
            sides.push(turn_of("the service alone"));
            sides.push(turn(peer, axum_response_cache, what, calls, &runtime));
        }
        What::PassThrough => sides.push(turn_of("the service alone")),
    }
    sides.push(turn("tower-http-cache, memory", tower_http_cache, what, calls, &runtime));
    sides.push(turn("hitbox, moka", hitbox, what, calls, &runtime));
    sides.push(turn("tower-cache-aside", ours, what, calls, &runtime));
    let mut goals = vec![Goal::Times(None); sides.len() - 1];
    match what {
        What::Hit => *goals.last_mut().unwrap() = Goal::Times(Some(1.0)),
        What::Miss => {}
        What::PassThrough => goals.fill(Goal::More(None)),
    }
    table.compare("ns", sides, &goals);
}

/// What people write: the key from tenant and path, `GET`; else the service, and `SET EX`. The body alone is kept, and the
/// headers are made anew. No invalidation, one flight each, and an error of Redis is the client's.
fn by_hand(
    connection: MultiplexedConnection,
) -> impl Service<Request<Body>, Response = Response<Body>, Error = redis::RedisError, Future: Send> + Clone + Send + 'static
{
    service_fn(move |request: Request<Body>| {
        let mut connection = connection.clone();
        async move {
            let tenant = request.headers()[TENANT].to_str().unwrap();
            let key = format!("cache:{tenant}:{}", request.uri().path());
            let stored: Option<Vec<u8>> = connection.get(&key).await?;
            let body = match stored {
                Some(body) => Bytes::from(body),
                None => {
                    LOADS.fetch_add(1, Ordering::Relaxed);
                    let body = Bytes::copy_from_slice(&NOISE);
                    let _: () = connection.set_ex(&key, &body[..], LONG.as_secs()).await?;
                    body
                }
            };
            let mut response = Response::new(Body::from(body));
            *response.headers_mut() = headers();
            Ok(response)
        }
    })
}

fn over_redis(table: &mut Table, tasks: u64, calls: u64) {
    let server = server::Redis::start(&[]);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let _entered = runtime.enter();
    let client = redis::Client::open(server.url()).unwrap();
    let connection = runtime.block_on(client.get_multiplexed_async_connection()).unwrap();
    let calls = table.calls(calls);
    let ours = |tier: Tier| {
        let store = RedisStore::builder([server.url()]).prefix(format!("{tier:?}").to_lowercase());
        let cache =
            support::tiered(tier).store(store.budget(Duration::from_secs(10)).build().unwrap()).build().unwrap();
        cache.layer().layer(origin::<Body, Body>())
    };
    let redis = hitbox_redis::RedisBackend::builder().connection(hitbox_redis::ConnectionMode::single(server.url()));
    let hitbox = hitbox_tower::Cache::builder().backend(redis.build().unwrap()).config(hitbox_config()).build();
    let hitbox = hitbox.layer(origin::<BufferedBody<Body>, Body>());
    let sides = vec![
        among("a cache-aside by hand (redis-rs)", by_hand(connection), tasks, calls, &runtime),
        among("hitbox over Redis", hitbox, tasks, calls, &runtime),
        among("tower-cache-aside, `off`", ours(Tier::Off), tasks, calls, &runtime),
        among("tower-cache-aside, `validated`", ours(Tier::Validated), tasks, calls, &runtime),
        among("tower-cache-aside, `on`", ours(Tier::On), tasks, calls, &runtime),
    ];
    table.compare("µs", sides, &[Goal::Rate(None); 4]);
}

/// Hits over Redis, divided among tasks on two workers; what one takes, in microseconds, without building its request.
fn among<'a, S, R>(name: &str, service: S, tasks: u64, calls: u64, runtime: &'a Runtime) -> Side<'a>
where
    S: Service<Request<Body>, Response = Response<R>, Error: std::fmt::Debug, Future: Send> + Clone + Send + 'static,
    R: Send + 'static,
{
    let each = calls.div_ceil(tasks);
    let task = |mut service: S, calls: u64| async move {
        for n in 0..calls {
            drop(black_box(service.ready().await.unwrap().call(request(What::Hit)).await.unwrap()));
            // What is answered at once never yields, and heartbeats must come in between.
            if n % 64 == 63 {
                tokio::task::yield_now().await;
            }
        }
    };
    // Until it is there, and in process where it may be.
    runtime.block_on(async {
        for _ in 0..50 {
            task(service.clone(), 1).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    let measured = name.to_owned();
    let turn = move || {
        let before = LOADS.load(Ordering::Relaxed);
        let took = runtime.block_on(async {
            let start = Instant::now();
            let all: Vec<_> = (0..tasks).map(|_| tokio::spawn(task(service.clone(), each))).collect();
            for task in all {
                task.await.unwrap();
            }
            start.elapsed()
        });
        let loads = LOADS.load(Ordering::Relaxed) - before;
        assert!(loads <= 1 + calls / 1_000, "{measured}: {loads} of {calls} were no hits");
        took.as_nanos() as f64 / 1e3 / (each * tasks) as f64 - building() / 2.min(tasks) as f64
    };
    (format!("Hit over Redis, {tasks} at once: {name}"), Box::new(turn))
}

/// Building a request, in microseconds: in batches, as dropping it is its reader's affair.
fn building() -> f64 {
    let mut took = Duration::ZERO;
    for _ in 0..64 {
        let mut batch = Vec::with_capacity(64);
        let start = Instant::now();
        batch.extend((0..64).map(|_| request(What::Hit)));
        took += start.elapsed();
        drop(black_box(batch));
    }
    took.as_nanos() as f64 / 1e3 / (64.0 * 64.0)
}
