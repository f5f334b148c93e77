//! What a stranger broke: sources, regions and warming, each as it was found.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/redis.rs"]
mod redis;
#[path = "support/web.rs"]
mod web;

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::Full;
use redis::Redis;
use tokio::time::{Instant, sleep, timeout};
use tower::{Layer, ServiceExt, service_fn, util::BoxCloneSyncService};
use tower_cache_aside::{
    Cache, CacheBuilder, DataType, Mutation, Query, Route, Ttl, Warm,
    store::{RedisStore, Regional, Store},
};
use web::{Web, ok, with};

fn builder() -> CacheBuilder {
    living(Duration::from_secs(3_600))
}

fn living(ttl: Duration) -> CacheBuilder {
    let start = Instant::now();
    Cache::builder("test")
        .tenant_header("x-tenant-id")
        .data_type(DataType::new("agent", ttl))
        .route(Route::new("/agents/{agent_id}", "agent").query(Query::only(["page"])))
        .mutation(Mutation::put("/agents/{agent_id}", "agent"))
        .clock(move || std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000) + start.elapsed())
}

type Handler = BoxCloneSyncService<Request<Full<Bytes>>, Response<web::Body>, std::io::Error>;

fn app<F>(cache: &Cache, answer: F) -> (Handler, Arc<Mutex<Vec<String>>>)
where
    F: Fn(&Request<Full<Bytes>>) -> Response<web::Body> + Send + Sync + 'static,
{
    let calls = Arc::new(Mutex::new(vec![]));
    let (c, answer) = (calls.clone(), Arc::new(answer));
    let handler = service_fn(move |request: Request<Full<Bytes>>| {
        c.lock().unwrap().push(format!("{} {}", request.method(), request.uri()));
        let response = answer(&request);
        async move { Ok::<_, std::io::Error>(response) }
    });
    let layered = cache.invalidate_layer().layer(cache.layer().layer(handler));
    let layered = layered.map_response(|r| r.map(http_body_util::combinators::UnsyncBoxBody::new));
    (BoxCloneSyncService::new(layered), calls)
}

async fn ask(service: &Handler, method: Method, tenant: &str, path: &str) -> web::Reply {
    Web::of(service.clone()).send(with(method, path, &[("x-tenant-id", tenant)])).await
}

/// A hundred popular requests whose responses cannot be stored, of one tenant, take the whole budget for ever, and what others
/// have is not kept warm.
#[tokio::test(start_paused = true)]
async fn what_cannot_be_stored_does_not_eat_the_budget_of_all() {
    for evil in [0, 100] {
        let cache = living(Duration::from_secs(45)).build().unwrap();
        let (service, calls) = app(&cache, |request| {
            let mut response = ok("row");
            if request.uri().path().starts_with("/agents/no") {
                response.headers_mut().insert("cache-control", "no-store".parse().unwrap());
            }
            response
        });
        cache.warm(service.clone(), Full::from, Warm::new().sample(1)).unwrap();
        let (mut asked, mut hits, mut in_vain) = (0, 0, 0);
        for second in 0..300 {
            for id in 0..evil {
                if second % 5 == 0 {
                    ask(&service, Method::GET, "evil", &format!("/agents/no{id}")).await;
                    in_vain -= 1;
                }
            }
            for id in 0..100 {
                if (second + id) % 10 == 0 {
                    let reply = ask(&service, Method::GET, "acme", &format!("/agents/{id}")).await;
                    asked += usize::from(second > 60);
                    hits += usize::from(second > 60 && reply.is_hit());
                }
            }
            sleep(Duration::from_secs(1)).await;
        }
        in_vain += calls.lock().unwrap().iter().filter(|call| call.contains("/no")).count() as i64;
        println!("{evil} uncacheable: {hits} of {asked} hits for others, {in_vain} calls in vain in five minutes");
        if evil > 0 {
            assert!(in_vain <= 500 && asked - hits <= 10, "{in_vain} calls in vain, {hits} hits of {asked}");
        }
    }
}

/// The job holds the service, which holds the cache: it ends when it is told to.
#[tokio::test(start_paused = true)]
async fn what_is_stopped_is_warmed_no_more() {
    let cache = living(Duration::from_secs(60)).build().unwrap();
    let (service, calls) = app(&cache, |_| ok("row"));
    let warming = cache.warm(service.clone(), Full::from, Warm::new().sample(1)).unwrap();
    for _ in 0..30 {
        ask(&service, Method::GET, "acme", "/agents/1").await;
    }
    sleep(Duration::from_secs(5)).await;
    warming.stop().await;
    let before = calls.lock().unwrap().len();
    sleep(Duration::from_secs(600)).await;
    assert_eq!(calls.lock().unwrap().len(), before);
    cache.warmed().await;
}

/// Who waits to be ready waits for ever, if the runtime of the job is gone (or the job has panicked).
#[test]
fn nobody_waits_for_a_job_that_is_gone() {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let cache = builder().build().unwrap();
    let first = runtime();
    first.block_on(async {
        let (service, _) = app(&cache, |_| ok("row"));
        cache.warm(service, Full::from, Warm::new()).unwrap();
    });
    drop(first);
    let waited = runtime().block_on(async { timeout(Duration::from_secs(3), cache.warmed()).await });
    assert!(waited.is_ok(), "it waits for a job that is gone");
}

/// The handler panics once, and it is never asked again.
#[tokio::test(start_paused = true)]
async fn what_has_panicked_once_is_warmed_again() {
    let cache = living(Duration::from_secs(60)).build().unwrap();
    let panics = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let p = panics.clone();
    let (service, calls) = app(&cache, move |_| {
        assert!(!p.load(SeqCst), "the database is away");
        ok("row")
    });
    cache.warm(service.clone(), Full::from, Warm::new().sample(1)).unwrap();
    for _ in 0..1000 {
        ask(&service, Method::GET, "acme", "/agents/1").await;
    }
    sleep(Duration::from_secs(5)).await;
    panics.store(true, SeqCst);
    sleep(Duration::from_secs(60)).await;
    panics.store(false, SeqCst);
    calls.lock().unwrap().clear();
    sleep(Duration::from_secs(300)).await;
    assert!(!calls.lock().unwrap().is_empty(), "not asked in five minutes");
}

/// A refresh that fails is taken for a load that went well: whoever is in trouble is asked again each second.
#[tokio::test(start_paused = true)]
async fn a_refresh_that_fails_is_a_failure() {
    let cache = living(Duration::from_secs(60)).build().unwrap();
    let fails = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let f = fails.clone();
    let (service, calls) = app(&cache, move |_| {
        let mut response = ok("row");
        if f.load(SeqCst) {
            *response.status_mut() = http::StatusCode::INTERNAL_SERVER_ERROR;
        }
        response
    });
    cache.warm(service.clone(), Full::from, Warm::new().sample(1)).unwrap();
    for _ in 0..100 {
        for id in 0..50 {
            ask(&service, Method::GET, "acme", &format!("/agents/{id}")).await;
        }
    }
    sleep(Duration::from_secs(40)).await;
    fails.store(true, SeqCst);
    calls.lock().unwrap().clear();
    // Until just before they end.
    sleep(Duration::from_secs(19)).await;
    let failed = calls.lock().unwrap().len();
    println!("{failed} calls, counted as loaded: {:?}", cache.stats().warmed);
    assert!(failed <= 20, "{failed} calls in a row of what fails");
}

/// What is seen by HEAD first is asked by HEAD: which stores nothing, once a second.
#[tokio::test(start_paused = true)]
async fn a_head_is_not_asked_again() {
    let cache = builder().build().unwrap();
    let (service, calls) = app(&cache, |_| ok("row"));
    cache.warm(service.clone(), Full::from, Warm::new().sample(1)).unwrap();
    // A load balancer that probes.
    for _ in 0..30 {
        ask(&service, Method::HEAD, "acme", "/agents/1").await;
    }
    for _ in 0..30 {
        ask(&service, Method::GET, "acme", "/agents/1").await;
    }
    sleep(Duration::from_secs(5)).await;
    cache.clear().await.unwrap();
    calls.lock().unwrap().clear();
    sleep(Duration::from_secs(60)).await;
    let heads = calls.lock().unwrap().iter().filter(|call| call.starts_with("HEAD")).count();
    let is_there = ask(&service, Method::GET, "acme", "/agents/1").await.is_hit();
    assert!(heads <= 5 && is_there, "{heads} HEADs in a minute, there: {is_there}");
}

/// A secret in the query that is no part of the key goes into the list, the page, and the replay.
#[tokio::test(start_paused = true)]
async fn what_is_no_part_of_the_key_is_not_kept() {
    let cache = builder().build().unwrap();
    let (service, _) = app(&cache, |_| ok("row"));
    cache.warm(service.clone(), Full::from, Warm::new().sample(1)).unwrap();
    for _ in 0..30 {
        ask(&service, Method::GET, "acme", "/agents/1?page=1&access_token=secret").await;
    }
    sleep(Duration::from_secs(5)).await;
    let popular = cache.stats().popular;
    assert!(popular.iter().all(|one| !one.request.contains("secret")), "{popular:?}");
}

fn region(name: &str, own: &Redis, peer: (&str, &Redis), hold: Duration) -> Regional {
    let redis = RedisStore::builder([own.url()]).settle(Duration::ZERO).budget(Duration::from_secs(2));
    Regional::builder(name).peer(peer.0, peer.1.url()).hold(hold).build(redis).unwrap()
}

/// After a gap what a replica has not heard of is stored: `hold` is forgotten.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gap_is_held_for_replicas_as_well() {
    let (eu, us) = (Redis::start(&[]), Redis::start(&[]));
    let cache = Cache::builder("docs")
        .tenant_header("x-tenant-id")
        .data_type(DataType::new("doc", Ttl::Extended))
        .route(Route::new("/docs/{doc_id}", "doc"))
        .store(region("us", &us, ("eu", &eu), Duration::from_secs(2)))
        .build()
        .unwrap();
    // What the replica has: 0, until it has heard of 1.
    let replica = Arc::new(AtomicU64::new(0));
    let r = replica.clone();
    let web = Web::new(&cache, move |_| {
        let text = r.load(SeqCst).to_string();
        async move { Ok(ok(text)) }
    });
    let get = async || web.send(with(Method::GET, "/docs/1", &[("x-tenant-id", "acme")])).await;
    let start = std::time::Instant::now();
    sleep(Duration::from_secs(3)).await;
    while !get().await.is_hit() {
        assert!(start.elapsed() < Duration::from_secs(20));
        sleep(Duration::from_millis(10)).await;
    }
    // A write in eu; its Redis forgets what it was to tell. The replica is behind by 1.2 s, which is less than `hold`.
    eu.command(&["FLUSHALL"]);
    let written = std::time::Instant::now();
    let mut is_dropped = false;
    while written.elapsed() < Duration::from_millis(1_200) {
        is_dropped |= !get().await.is_hit();
        sleep(Duration::from_millis(10)).await;
    }
    assert!(is_dropped, "the gap was not noticed");
    replica.store(1, SeqCst);
    sleep(Duration::from_secs(4)).await;
    let reply = get().await;
    assert_eq!(reply.text(), "1", "{}, {:?} after the write", reply.cache_status(), written.elapsed());
}

/// A source that gives one gap.
struct Gaps(tokio::sync::mpsc::UnboundedReceiver<()>);

impl tower_cache_aside::EventSource for Gaps {
    fn name(&self) -> &str {
        "gaps"
    }

    fn next(&mut self) -> tower_cache_aside::SourceFuture<'_, tower_cache_aside::Received> {
        Box::pin(async {
            match self.0.recv().await {
                Some(()) => Ok(tower_cache_aside::Received::Gap("the slot was lost".to_owned())),
                None => std::future::pending().await,
            }
        })
    }

    fn ack(&mut self) -> tower_cache_aside::SourceFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }
}

/// The same of a source that is followed, where the cascade has a `hold`.
#[tokio::test(start_paused = true)]
async fn a_gap_of_a_source_is_held_as_well() {
    let hold = Duration::from_secs(2);
    let builder = builder().cascade(tower_cache_aside::Cascade::new("agent").fenced(Duration::from_secs(5)).hold(hold));
    let cache = builder.event(tower_cache_aside::EventPolicy::on("agents").mutated("agent", "id")).build().unwrap();
    let replica = Arc::new(AtomicU64::new(0));
    let r = replica.clone();
    let (service, _) = app(&cache, move |_| ok(r.load(SeqCst).to_string()));
    let (tx, rx) = tokio::sync::mpsc::unbounded_channel();
    cache.follow(Gaps(rx)).unwrap();
    tx.send(()).unwrap();
    sleep(Duration::from_millis(100)).await;
    // Read meanwhile, from a replica that is behind by half a second.
    ask(&service, Method::GET, "acme", "/agents/1").await;
    sleep(Duration::from_millis(400)).await;
    replica.store(1, SeqCst);
    sleep(Duration::from_secs(10)).await;
    let reply = ask(&service, Method::GET, "acme", "/agents/1").await;
    assert_eq!(reply.text(), "1", "{}", reply.cache_status());
}

/// What was not read for a while is dropped in one step, however much that is: it never succeeds, and keeps Redis from all else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backlog_of_large_drops_is_taken() {
    let (eu, us) = (Redis::start(&[]), Redis::start(&[]));
    let first = region("eu", &eu, ("us", &us), Duration::from_secs(1));
    let second = region("us", &us, ("eu", &eu), Duration::from_secs(1));
    let cache_us = Cache::builder("docs")
        .tenant_header("x-tenant-id")
        .data_type(DataType::new("doc", Ttl::Extended))
        .route(Route::new("/docs/{doc_id}", "doc"))
        .store(second.clone())
        .build()
        .unwrap();
    let web = Web::new(&cache_us, |_| async { Ok(ok("x")) });
    let cache_eu = Cache::builder("docs")
        .tenant_header("x-tenant-id")
        .data_type(DataType::new("doc", Ttl::Extended))
        .route(Route::new("/docs/{doc_id}", "doc"))
        .event(tower_cache_aside::EventPolicy::on("docs").mutated("doc", "id"))
        .store(first.clone())
        .build()
        .unwrap();
    let get = async || web.send(with(Method::GET, "/docs/1", &[("x-tenant-id", "acme")])).await;
    let _ = first.health();
    while !get().await.is_hit() || second.usage().regions.iter().any(|region| region.behind.is_none()) {
        sleep(Duration::from_millis(20)).await;
    }
    // The relay cannot write for a while (its own Redis is frozen); eu imports 600,000 rows by events, 5,000 at a time.
    us.signal("-STOP");
    for chunk in 0..120 {
        let events: Vec<_> = (0..5)
            .map(|part| {
                let event = tower_cache_aside::Event::new("docs").tenant("acme");
                (0..1_000).fold(event, |event, id| event.field("id", chunk * 5_000 + part * 1_000 + id))
            })
            .collect();
        let applied = cache_eu.apply(&events).await;
        assert_eq!(applied.dropped.undelivered(), 0, "chunk {chunk}");
    }
    println!("imported");
    us.signal("-CONT");
    let start = std::time::Instant::now();
    let mut slowest = Duration::ZERO;
    while second.usage().regions.iter().all(|region| region.behind.is_none_or(|behind| behind > Duration::from_secs(2)))
    {
        let one = std::time::Instant::now();
        let health = second.health();
        us.try_command(&["PING"]);
        slowest = slowest.max(one.elapsed());
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "{:?}, {health:?}; PING took up to {slowest:?}",
            second.usage().regions
        );
        sleep(Duration::from_millis(200)).await;
    }
    println!("heard after {:?}; PING took up to {slowest:?}", start.elapsed());
}

/// Two services that share a Redis and, as the page on events says, a group: one of them hears nothing, and has proofs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_of_two_services_is_two() {
    let redis = Redis::start(&[]);
    for is_shared in [true, false] {
        let stream = format!("events{is_shared}");
        let make = |name: &str| {
            let mut builder = Cache::builder(name)
                .tenant_header("x-tenant-id")
                .data_type(DataType::new("agent", Ttl::Standard).max_lag(Duration::from_secs(5)))
                .route(Route::new("/agents/{agent_id}", "agent"))
                .event(tower_cache_aside::EventPolicy::on("agents").mutated("agent", "id"));
            if is_shared {
                let store = RedisStore::builder([redis.url()]).settle(Duration::ZERO);
                builder = builder.store(store.budget(Duration::from_secs(2)).build().unwrap());
            }
            let cache = builder.build().unwrap();
            let source = tower_cache_aside::RedisStream::builder(redis.url(), &stream).group("fleet");
            cache.follow(source.build().unwrap()).unwrap();
            cache
        };
        let version = Arc::new(AtomicU64::new(0));
        let webs = ["agents", "billing"].map(|name| {
            let v = version.clone();
            let cache = make(name);
            (
                name,
                Web::new(&cache, move |_| {
                    let text = v.load(SeqCst).to_string();
                    async move { Ok(ok(text)) }
                }),
                cache,
            )
        });
        let get = async |web: &Web| web.send(with(Method::GET, "/agents/1", &[("x-tenant-id", "acme")])).await;
        let start = std::time::Instant::now();
        for (_, web, _) in &webs {
            while !get(web).await.is_hit() {
                assert!(start.elapsed() < Duration::from_secs(20));
                sleep(Duration::from_millis(20)).await;
            }
        }
        sleep(Duration::from_secs(1)).await;
        version.store(1, SeqCst);
        redis.command(&["XADD", &stream, "*", "name", "agents", "tenant", "acme", "id", "1"]);
        sleep(Duration::from_secs(8)).await;
        for (name, web, cache) in &webs {
            let (reply, sources) = (get(web).await, cache.stats().sources);
            println!("{name}, shared {is_shared}: {} {} {sources:?}", reply.text(), reply.cache_status());
        }
        for (name, web, _) in &webs {
            let reply = get(web).await;
            assert_eq!(reply.text(), "1", "{name}, shared {is_shared}: {}", reply.cache_status());
        }
    }
}

/// A source that was stopped (or whose runtime has ended) can never be followed again, and keeps types with a `max_lag` out.
#[tokio::test]
async fn what_is_followed_no_more_can_be_followed_again() {
    let cache = builder().event(tower_cache_aside::EventPolicy::on("agents").mutated("agent", "id")).build().unwrap();
    let (_tx, rx) = tokio::sync::mpsc::unbounded_channel();
    cache.follow(Gaps(rx)).unwrap().stop().await;
    let (_tx, rx) = tokio::sync::mpsc::unbounded_channel();
    cache.follow(Gaps(rx)).unwrap();
}

/// Behind a proxy that says by which scheme it was asked, and over HTTP/2, nothing is ever found popular.
#[tokio::test]
async fn what_comes_by_a_proxy_or_http2_is_popular_as_well() {
    let mut without = vec![];
    for (what, uri, header) in [
        ("plain", "/agents/1", ("host", "a.example")),
        ("a proxy's", "/agents/1", ("x-forwarded-proto", "https")),
        ("a proxy's host", "/agents/1", ("x-forwarded-host", "a.example")),
        ("forwarded", "/agents/1", ("forwarded", "for=1.1.1.1;proto=https;host=a.example")),
        ("HTTP/2", "https://a.example/agents/1", ("accept", "*/*")),
    ] {
        let cache = builder().build().unwrap();
        let (service, _) = app(&cache, |_| ok("row"));
        cache.warm(service.clone(), Full::from, Warm::new().sample(1)).unwrap();
        let web = Web::of(service);
        for _ in 0..30 {
            web.send(with(Method::GET, uri, &[("x-tenant-id", "acme"), header])).await;
        }
        sleep(Duration::from_millis(2_500)).await;
        println!("{what}: hits {}, popular {:?}", cache.stats().totals.hits, cache.stats().popular);
        if cache.stats().popular.is_empty() {
            without.push(what);
        }
    }
    assert!(without.is_empty(), "not warmed: {without:?}");
}

/// What a route varies by is hashed in keys, as it may say who asks; the list has it as it is.
#[tokio::test]
async fn the_list_has_no_secrets() {
    let vary = Route::new("/own/{agent_id}", "agent").vary("x-session");
    let cache = builder().route(vary).build().unwrap();
    let (service, _) = app(&cache, |_| ok("mine"));
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("popular");
    let warming = cache.warm(service.clone(), Full::from, Warm::new().sample(1).file(&file)).unwrap();
    let web = Web::of(service);
    for _ in 0..30 {
        web.send(with(Method::GET, "/own/1", &[("x-tenant-id", "acme"), ("x-session", "hunter2")])).await;
        web.send(with(Method::GET, "/agents/1", &[("x-tenant-id", "acme")])).await;
    }
    while cache.stats().popular.is_empty() {
        sleep(Duration::from_millis(10)).await;
    }
    warming.save().await;
    let list = std::fs::read(&file).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&file).unwrap().permissions());
    // Bytes are written as lists of numbers.
    let text = String::from_utf8_lossy(&list);
    assert!(!text.contains("hunter2") && text.contains("/agents/1"), "{}", text.escape_debug());
    assert_eq!(mode & 0o777, 0o600);
}
