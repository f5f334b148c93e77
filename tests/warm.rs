//! What is popular is there before it is asked for: at start, before it ends, after a write; within a budget, and never stale.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/history.rs"]
mod history;
#[path = "support/redis.rs"]
mod redis;
mod support;
#[path = "support/web.rs"]
mod web;

use std::{
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use bytes::Bytes;
use history::{History, Life, Register, count};
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use redis::Redis;
use serde_json::json;
use tokio::time::{Instant, sleep};
use tower::{Layer, ServiceExt, service_fn, util::BoxCloneSyncService};
use tower_cache_aside::{
    Cache, CacheBuilder, Credentials, DataType, Mutation, Query, Route, Ttl, Warm, Warming, store::RedisStore,
};
use web::{Reply, Web, ok, with};

const AGENTS: u64 = 10_000;

fn builder() -> CacheBuilder {
    Cache::builder("test")
        .tenant_header("x-tenant-id")
        .data_type(DataType::new("agent", Ttl::Standard))
        .route(Route::new("/agents/{agent_id}", "agent"))
        .mutation(Mutation::put("/agents/{agent_id}", "agent"))
}

type Handler = BoxCloneSyncService<Request<Full<Bytes>>, Response<web::Body>, std::io::Error>;

/// A service behind a cache's layers, and how often it was called.
struct App {
    cache: Cache,
    web: Web,
    service: Handler,
    calls: Arc<AtomicU64>,
    /// At once, now and at most.
    busy: Arc<[AtomicUsize; 2]>,
    slow: Arc<AtomicU64>,
    fails: Arc<AtomicBool>,
}

impl App {
    fn new(cache: Cache) -> Self {
        let calls = Arc::new(AtomicU64::new(0));
        let (busy, slow, fails) =
            (Arc::<[AtomicUsize; 2]>::default(), Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (c, b, s, f) = (calls.clone(), busy.clone(), slow.clone(), fails.clone());
        let handler = service_fn(move |request: Request<Full<Bytes>>| {
            let (calls, busy, slow, fails) = (c.clone(), b.clone(), s.clone(), f.clone());
            async move {
                if request.method() != Method::PUT {
                    calls.fetch_add(1, SeqCst);
                }
                let now = busy[0].fetch_add(1, SeqCst) + 1;
                busy[1].fetch_max(now, SeqCst);
                sleep(Duration::from_millis(slow.load(SeqCst))).await;
                busy[0].fetch_sub(1, SeqCst);
                if fails.load(SeqCst) {
                    let mut response = ok("no");
                    *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
                    return Ok::<_, std::io::Error>(response);
                }
                Ok(ok("row"))
            }
        });
        let layered = cache.invalidate_layer().layer(cache.layer().layer(handler));
        let layered = layered.map_response(|response| response.map(http_body_util::combinators::UnsyncBoxBody::new));
        let service = BoxCloneSyncService::new(layered);
        Self { cache, web: Web::of(service.clone()), service, calls, busy, slow, fails }
    }

    fn warm(&self, warm: Warm) -> Warming {
        self.cache.warm(self.service.clone(), Full::from, warm).unwrap()
    }

    async fn get(&self, tenant: &str, path: &str) -> Reply {
        self.web.send(with(Method::GET, path, &[("x-tenant-id", tenant)])).await
    }

    fn calls(&self) -> u64 {
        self.calls.load(SeqCst)
    }

    fn loaded(&self, cause: &str) -> u64 {
        self.cache.stats().warmed.get(cause).copied().unwrap_or_default()
    }

    /// Asks these often enough to be popular.
    async fn make_popular(&self, tenant: &str, paths: &[&str]) {
        for _ in 0..200 {
            for path in paths {
                self.get(tenant, path).await;
            }
        }
    }
}

async fn until(what: &str, is_so: impl Fn() -> bool) {
    let start = std::time::Instant::now();
    while !is_so() {
        assert!(start.elapsed() < Duration::from_secs(30), "{what}");
        sleep(Duration::from_millis(20)).await;
    }
}

/// By how often it is asked under zipf: 0 is the most popular.
struct Zipf(Vec<f64>);

impl Zipf {
    fn new() -> Self {
        let mut sum = 0.0;
        Self(
            (1..=AGENTS)
                .map(|rank| {
                    sum += 1.0 / rank as f64;
                    sum
                })
                .collect(),
        )
    }

    fn draw(&self) -> usize {
        let at = rand::random_range(0.0..*self.0.last().unwrap());
        self.0.partition_point(|sum| *sum < at)
    }
}

/// Of the 200 most popular of 10,000, at least 95 % are there at once after a restart; within the budget.
async fn a_restart_hits(make: impl Fn() -> Cache, warm: impl Fn() -> Warm) {
    let zipf = Zipf::new();
    let before = App::new(make());
    let warming = before.warm(warm());
    for _ in 0..200_000 {
        before.get("acme", &format!("/agents/{}", zipf.draw())).await;
    }
    // What waits for the job is counted by then.
    sleep(Duration::from_millis(300)).await;
    warming.save().await;
    drop(before);
    let after = App::new(make());
    after.warm(warm());
    after.cache.warmed().await;
    let calls = after.calls();
    assert!((190..=1_200).contains(&calls), "{calls} calls for what was popular");
    let mut hits = 0;
    for rank in 0..200 {
        hits += u64::from(after.get("acme", &format!("/agents/{rank}")).await.is_hit());
    }
    println!("{hits} of the 200 most popular of {AGENTS} hit after a restart, {calls} calls for that");
    assert!(hits >= 190, "{hits} of 200");
    assert_eq!(after.loaded("start"), calls);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_popular_is_there_after_a_restart_by_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("popular");
    a_restart_hits(|| builder().build().unwrap(), || Warm::new().file(&file)).await;
    // What is no list is none.
    std::fs::write(&file, b"nonsense").unwrap();
    let app = App::new(builder().build().unwrap());
    app.warm(Warm::new().file(&file)).save().await;
    app.cache.warmed().await;
    assert_eq!(app.calls(), 0);
}

/// The list of the fleet is in the store. What a process has found popular, others load as well, when they have room.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_popular_is_there_after_a_flush_by_the_store() {
    let redis = Redis::start(&[]);
    let make = || {
        let store =
            RedisStore::builder([redis.url()]).settle(Duration::ZERO).budget(Duration::from_secs(5)).build().unwrap();
        builder().store(store).build().unwrap()
    };
    let before = App::new(make());
    let warming = before.warm(Warm::new());
    let paths: Vec<String> = (0..50).map(|id| format!("/agents/{id}")).collect();
    let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
    before.make_popular("acme", &paths).await;
    sleep(Duration::from_millis(300)).await;
    warming.save().await;
    drop(before);
    // Everything but the list is gone.
    before_flush(&redis);
    let after = App::new(make());
    after.warm(Warm::new());
    after.cache.warmed().await;
    for path in &paths {
        assert!(after.get("acme", path).await.is_hit(), "{path}");
    }
    assert_eq!(after.calls(), 50);
}

fn before_flush(redis: &Redis) {
    for kind in ["cas:e:*", "cas:g:*"] {
        for key in redis.keys(kind) {
            redis.command(&["DEL", &key]);
        }
    }
}

/// The next reader of what a write has dropped need not wait.
#[tokio::test]
async fn what_a_write_has_dropped_is_loaded_again() {
    let app = App::new(builder().build().unwrap());
    app.warm(Warm::new());
    app.make_popular("acme", &["/agents/1", "/agents/2"]).await;
    until("it is not found popular", || app.cache.stats().popular.len() == 2).await;
    for round in 1..6 {
        let before = app.calls();
        app.web.send(with(Method::PUT, "/agents/1", &[("x-tenant-id", "acme")])).await;
        until("it is not loaded again", || app.calls() > before).await;
        until("it is not counted", || app.loaded("refill") == round).await;
        assert!(app.get("acme", "/agents/1").await.is_hit());
        assert!(app.get("acme", "/agents/2").await.is_hit());
        assert_eq!(app.calls(), before + 1, "one call for one entry");
    }
    // They are nobody's requests.
    let stats = app.cache.stats();
    assert_eq!(stats.totals.requests, 400 + 10);
}

/// Under a clock that goes on with tokio's.
fn ticking(builder: CacheBuilder) -> CacheBuilder {
    let start = Instant::now();
    builder.clock(move || std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000) + start.elapsed())
}

#[tokio::test(start_paused = true)]
async fn what_is_about_to_end_is_replaced() {
    let short = DataType::new("agent", Duration::from_secs(60));
    let cache = Cache::builder("test")
        .tenant_header("x-tenant-id")
        .data_type(short)
        .route(Route::new("/agents/{agent_id}", "agent"));
    let app = App::new(ticking(cache).build().unwrap());
    app.warm(Warm::new());
    app.make_popular("acme", &["/agents/1"]).await;
    let mut misses = 0;
    // Ten minutes, in which somebody asks now and then.
    for _ in 0..600 {
        sleep(Duration::from_secs(1)).await;
        misses += u64::from(!app.get("acme", "/agents/1").await.is_hit());
    }
    assert_eq!(misses, 0);
    let calls = app.calls();
    assert!((11..=16).contains(&calls), "{calls} calls in ten minutes of a minute each");
    assert!(app.loaded("expiry") >= 9, "{:?}", app.cache.stats().warmed);
}

/// Early refresh works over a shared store, too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_shared_store_has_is_refreshed_early() {
    let redis = Redis::start(&[]);
    let store =
        RedisStore::builder([redis.url()]).settle(Duration::ZERO).budget(Duration::from_secs(5)).build().unwrap();
    let agents = DataType::new("agent", Duration::from_secs(5)).early_refresh(1_000.0);
    let cache = Cache::builder("test")
        .tenant_header("x-tenant-id")
        .data_type(agents)
        .route(Route::new("/agents/{agent_id}", "agent"));
    let app = App::new(cache.store(store).build().unwrap());
    app.slow.store(20, SeqCst);
    while !app.get("acme", "/agents/1").await.is_hit() {
        sleep(Duration::from_millis(5)).await;
    }
    let calls = app.calls();
    until("it is not refreshed", || {
        app.calls() > calls || {
            let (web, request) = (app.web.clone(), with(Method::GET, "/agents/1", &[("x-tenant-id", "acme")]));
            tokio::spawn(async move { web.send(request).await });
            false
        }
    })
    .await;
}

/// The inner service is called no more often than is configured, and by no more at once.
#[tokio::test(start_paused = true)]
async fn a_budget_and_a_concurrency_are_kept() {
    let app = App::new(ticking(builder()).build().unwrap());
    let paths: Vec<String> = (0..100).map(|id| format!("/agents/{id}")).collect();
    let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
    app.warm(Warm::new().budget(30).concurrency(3));
    app.make_popular("acme", &paths).await;
    app.slow.store(50, SeqCst);
    sleep(Duration::from_secs(120)).await;
    app.busy[1].store(0, SeqCst);
    for _ in 0..2 {
        app.cache.clear().await.unwrap();
        let before = app.calls();
        // A minute of the budget may begin within this one.
        sleep(Duration::from_secs(50)).await;
        let soon = app.calls() - before;
        assert!((10..=60).contains(&soon), "{soon} calls in less than a minute");
        sleep(Duration::from_secs(250)).await;
        let later = app.calls() - before;
        assert!(later > soon && later <= 6 * 30, "{later} calls in five minutes");
    }
    assert!(app.busy[1].load(SeqCst) <= 3, "{} at once", app.busy[1].load(SeqCst));
}

/// An inner service that fails is left alone for a while, and one that slows down is asked by fewer at once.
#[tokio::test(start_paused = true)]
async fn an_inner_service_in_trouble_is_spared() {
    let app = App::new(ticking(builder()).build().unwrap());
    let paths: Vec<String> = (0..200).map(|id| format!("/agents/{id}")).collect();
    let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
    app.warm(Warm::new());
    app.slow.store(10, SeqCst);
    app.make_popular("acme", &paths[..100]).await;
    // How long it usually takes.
    app.cache.clear().await.unwrap();
    sleep(Duration::from_secs(30)).await;
    app.slow.store(400, SeqCst);
    app.cache.clear().await.unwrap();
    sleep(Duration::from_secs(5)).await;
    app.busy[1].store(0, SeqCst);
    sleep(Duration::from_secs(5)).await;
    assert_eq!(app.busy[1].load(SeqCst), 1, "at once, while it takes forty times as long");
    app.slow.store(10, SeqCst);
    app.fails.store(true, SeqCst);
    app.cache.clear().await.unwrap();
    let before = app.calls();
    sleep(Duration::from_secs(60)).await;
    let failed = app.calls() - before;
    assert!((3..=20).contains(&failed), "{failed} calls of what fails");
    // Those who wait for it do not wait for ever.
    app.cache.warmed().await;
    app.fails.store(false, SeqCst);
    sleep(Duration::from_secs(120)).await;
    for path in &paths[..50] {
        assert!(app.get("acme", path).await.is_hit());
    }
}

/// Nothing that is anybody's own is asked again, and nobody's key.
#[tokio::test]
async fn what_is_private_is_never_asked_again() {
    let user = Route::new("/mine/{agent_id}", "agent").credentials(Credentials::PerUser("x-user".to_owned()));
    let shared = Route::new("/shared/{agent_id}", "agent").credentials(Credentials::Shared);
    let own = Route::new("/own/{agent_id}", "agent").credentials(Credentials::User);
    let listed = Route::new("/listed/{agent_id}", "agent").query(Query::only(["page"]));
    let user_from = |_: &http::request::Parts| Some("eve".to_owned());
    let cache = builder().route(user).route(shared).route(own).route(listed).user_from(user_from).build().unwrap();
    let app = App::new(cache);
    app.warm(Warm::new());
    for _ in 0..60 {
        for (path, header) in [
            ("/agents/1", ("authorization", "Bearer x")),
            ("/mine/1", ("x-user", "eve")),
            ("/shared/1", ("cookie", "session=1")),
        ] {
            app.web.send(with(Method::GET, path, &[("x-tenant-id", "acme"), header])).await;
        }
        app.get("acme", "/own/1").await;
        // No more of it than counts.
        app.get("acme", "/listed/2?session=1&page=3").await;
    }
    until("nothing is popular", || !app.cache.stats().popular.is_empty()).await;
    sleep(Duration::from_millis(300)).await;
    let popular: Vec<_> = app.cache.stats().popular.into_iter().map(|one| one.request).collect();
    assert_eq!(popular, ["GET /listed/2?page=3"]);
}

/// A route that reads by a body is asked with that body.
#[tokio::test]
async fn what_is_asked_by_a_body_is_asked_again_with_it() {
    use axum::{Router, body::Body, routing::post};
    let types = Cache::builder("test").tenant_header("x-tenant-id").data_type(DataType::new("shoes", Ttl::Standard));
    let cache = types.route(Route::new("/search", "shoes").method(Method::POST)).build().unwrap();
    let bodies = Arc::new(Mutex::new(vec![]));
    let seen = bodies.clone();
    let search = move |body: String| {
        seen.lock().unwrap().push(body);
        async { "found" }
    };
    let router = Router::new()
        .route("/search", post(search))
        .layer(cache.layer().request_bodies(Body::new))
        .layer(cache.invalidate_layer());
    cache.warm(router.clone().into_service(), Body::from, Warm::new()).unwrap();
    let ask = async |body: &'static str| {
        let request = Request::post("/search").header("x-tenant-id", "acme").header("content-type", "text/plain");
        router.clone().oneshot(request.body(Body::from(body)).unwrap()).await.unwrap()
    };
    for _ in 0..60 {
        ask("red shoes").await;
    }
    let first = bodies.lock().unwrap().clone();
    assert!(first.iter().all(|body| body == "red shoes"));
    until("it is not found popular", || cache.stats().popular.len() == 1).await;
    cache.clear().await.unwrap();
    until("it is not asked again", || bodies.lock().unwrap().len() > first.len()).await;
    assert_eq!(bodies.lock().unwrap().last().unwrap(), "red shoes");
    let response = ask("red shoes").await;
    assert!(response.headers()["cache-status"].to_str().unwrap().contains("; hit"), "{response:?}");
}

/// What is asked again goes the way of every other request: a write during it never leaves anything stale.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn warming_leaves_nothing_stale() {
    let cache = builder().build().unwrap();
    let rows: Arc<Vec<AtomicU64>> = Arc::new((0..20).map(|_| AtomicU64::new(0)).collect());
    let row = rows.clone();
    let handler = service_fn(move |request: Request<Full<Bytes>>| {
        let row = row.clone();
        async move {
            let id: usize = request.uri().path().rsplit('/').next().unwrap().parse().unwrap();
            if request.method() == Method::PUT {
                return Ok::<_, std::io::Error>(ok((row[id].fetch_add(1, SeqCst) + 1).to_string()));
            }
            let read = row[id].load(SeqCst);
            // Long enough for a write to come in between.
            sleep(Duration::from_millis(rand::random_range(0..4))).await;
            Ok(ok(read.to_string()))
        }
    });
    let layered = cache.invalidate_layer().layer(cache.layer().layer(handler));
    let service =
        BoxCloneSyncService::new(layered.map_response(|r| r.map(http_body_util::combinators::UnsyncBoxBody::new)));
    let web = Web::of(service.clone());
    cache.warm(service, Full::from, Warm::new().concurrency(16).budget(1_000_000)).unwrap();
    let (history, life) = (Arc::new(History::default()), Life::new("process".to_owned(), Duration::ZERO));
    let registers: Arc<Vec<Register>> = Arc::new((0..20).map(|_| Register::default()).collect());
    let start = std::time::Instant::now();
    let tasks = (0..6).map(|nth| {
        let (web, history, life, registers) = (web.clone(), history.clone(), life.clone(), registers.clone());
        tokio::spawn(async move {
            while start.elapsed() < Duration::from_secs(4) {
                let id = rand::random_range(0..20_usize);
                let path = format!("/agents/{id}");
                let send = async |method| web.send(with(method, &path, &[("x-tenant-id", "acme")])).await;
                if nth == 0 {
                    let reply = send(Method::PUT).await;
                    registers[id].acknowledge(reply.text().parse().unwrap(), &life, true);
                    count(&history.writes);
                    sleep(Duration::from_millis(2)).await;
                    continue;
                }
                let (floor, newest) = (registers[id].floor(&life), registers[id].newest());
                let reply = send(Method::GET).await;
                history.read(reply.text().parse().unwrap(), floor, newest, || path.clone());
                count(&history.reads);
                if reply.is_hit() {
                    count(&history.hits);
                }
                tokio::task::yield_now().await;
            }
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.unwrap();
    }
    println!("{}; loaded by the job: {:?}", history.summary(), cache.stats().warmed);
    history.assert_good();
    assert!(cache.stats().warmed["refill"] > 100, "{:?}", cache.stats().warmed);
}

#[test]
fn mistakes_are_found_when_it_begins() {
    let app = App::new(builder().build().unwrap());
    let warm = |app: &App, warm: Warm| app.cache.warm(app.service.clone(), Full::from, warm).map(drop);
    let says = |result: Result<(), tower_cache_aside::ConfigError>, what: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    };
    says(warm(&app, Warm::new()), "there is no runtime");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _within = runtime.enter();
    says(warm(&app, Warm::new().requests(0)), "`requests`");
    says(warm(&app, Warm::new().concurrency(0)), "warms nothing");
    says(warm(&app, Warm::new().budget(0)), "warms nothing");
    says(warm(&app, Warm::new().saves(Duration::ZERO)), "`saves`");
    warm(&app, Warm::new()).unwrap();
    says(warm(&app, Warm::new()), "warmed already");
}

/// The agent service: what was popular before it was stopped is there when it is started.
#[tokio::test(flavor = "multi_thread")]
async fn the_agent_service_is_warm_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("agents.db");
    let args = ["--db", file.to_str().unwrap(), "--warm", "on", "--admin-token", "secret"];
    let popular = async |service: &support::Service| {
        let admin = support::Http::anonymous(&service.url).with("authorization", "Bearer secret");
        admin.get("/_cache/api/stats").await.json()["popular"].as_array().unwrap().len()
    };
    let mut service = support::Service::start(&args);
    let client = support::Http::new(&service.url, "demo");
    for _ in 0..40 {
        for id in 1..6 {
            client.get(&format!("/agents/agent-{id}")).await;
        }
    }
    let start = std::time::Instant::now();
    while popular(&service).await < 5 {
        assert!(start.elapsed() < Duration::from_secs(20));
        sleep(Duration::from_millis(50)).await;
    }
    // A write, and its refill.
    let calls = client.origin_calls("agent").await;
    client.put("/agents/agent-1", json!({"name": "x"})).await;
    while client.origin_calls("agent").await == calls {
        assert!(start.elapsed() < Duration::from_secs(20));
        sleep(Duration::from_millis(10)).await;
    }
    service.signal("-TERM");
    while service.ended().is_none() {
        sleep(Duration::from_millis(20)).await;
    }
    assert!(Path::new(&format!("{}.popular", file.display())).exists());
    let service = support::Service::start(&args);
    let client = support::Http::new(&service.url, "demo");
    while client.origin_calls("agent").await < 5 {
        assert!(start.elapsed() < Duration::from_secs(40));
        sleep(Duration::from_millis(10)).await;
    }
    // The last may still be under way: who asks for it waits for that call, and makes none.
    for id in 1..6 {
        assert_eq!(client.get(&format!("/agents/agent-{id}")).await.status, 200);
    }
    assert_eq!(client.origin_calls("agent").await, 5);
}
