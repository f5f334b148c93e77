//! What is seen of a cache: that the counts are exact, that alerts are raised, that an audit finds what is stale, and that those
//! who look after it are told why. Against the agent service over HTTP where that is the point.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/memcached.rs"]
mod memcached;
#[path = "support/redis.rs"]
mod redis;
#[path = "support/mod.rs"]
mod support;
#[path = "support/web.rs"]
mod web;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};
use support::{Http, Service};
use tower::{Layer, ServiceExt};
use tower_cache_aside::{
    Admin, AdminService, AlertRules, Cache, CacheBuilder, Cascade, DataType, Mutation, Route, Ttl,
    store::{Health, MemcachedStore, RedisStore},
};
use web::{Web, full, ok, with};

const TOKEN: &str = "a token";

fn shop() -> CacheBuilder {
    Cache::builder("shop")
        .tenant_header("x-tenant-id")
        .data_type(DataType::new("item", Ttl::Standard))
        .data_type(DataType::new("items", Ttl::Standard))
        .route(Route::new("/items/{item_id}", "item"))
        .route(Route::new("/items", "items"))
}

fn of(tenant: &str, method: Method, path: &str) -> Request<Full<Bytes>> {
    with(method, path, &[("x-tenant-id", tenant)])
}

async fn ask(admin: &AdminService, method: Method, path: &str, body: Value) -> (StatusCode, Value) {
    let request = Request::builder().method(method).uri(path).header("authorization", format!("Bearer {TOKEN}"));
    let response = admin.clone().oneshot(request.body(Full::<Bytes>::from(body.to_string())).unwrap()).await.unwrap();
    let status = response.status();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, serde_json::from_slice(&body).unwrap_or(Value::Null))
}

async fn get(admin: &AdminService, path: &str) -> Value {
    let (status, value) = ask(admin, Method::GET, path, Value::Null).await;
    assert_eq!(status, 200, "{path}: {value}");
    value
}

/// Waits until this holds, and says what did not.
async fn until<F: Future<Output = (bool, Value)>>(mut look: impl FnMut() -> F) -> Value {
    let mut last = Value::Null;
    for _ in 0..400 {
        let (holds, seen) = look().await;
        if holds {
            return seen;
        }
        last = seen;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{last:#}");
}

// ---- counts ----------------------------------------------------------------------------------------------------------

/// Each request is counted once, whatever becomes of it, by type and by tenant.
#[tokio::test]
async fn counts_are_exact() {
    let cache = shop().mutation(Mutation::put("/items/{item_id}", "item").all("items")).build().unwrap();
    let slow = Arc::new(tokio::sync::Semaphore::new(1_000));
    let may = slow.clone();
    let web = Web::new(&cache, move |asked| {
        let may = may.clone();
        async move {
            may.acquire().await.unwrap().forget();
            Ok(match asked.uri().path() {
                "/items/broken" => Response::builder().status(500).body(full("")).unwrap(),
                "/items/private" => Response::builder().header("cache-control", "private").body(full("x")).unwrap(),
                "/items/large" => ok(vec![b'x'; 200_000]),
                _ => ok("text"),
            })
        }
    });
    for tenant in ["a", "b"] {
        for _ in 0..20 {
            web.send(of(tenant, Method::GET, "/items/1")).await;
        }
    }
    for path in ["/items/broken", "/items/private", "/items/large", "/items", "/others"] {
        web.send(of("a", Method::GET, path)).await;
    }
    web.send(with(Method::GET, "/items/1", &[("x-tenant-id", "a"), ("authorization", "x")])).await;
    web.get("/items/1").await;
    web.send(of("a", Method::PUT, "/items/1")).await;
    cache.invalidate("a").all("items").run().await.unwrap();
    slow.forget_permits(2_000);
    let crowd: Vec<_> = (0..10)
        .map(|_| {
            let web = web.clone();
            tokio::spawn(async move { web.send(of("a", Method::GET, "/items/crowd")).await })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(50)).await;
    slow.add_permits(1_000);
    for one in crowd {
        one.await.unwrap();
    }

    let stats = cache.stats();
    let item = &stats.types["item"];
    assert_eq!((item.hits, item.misses, item.coalesced, item.stale), (38, 6, 9, 0));
    assert_eq!(item.requests, 38 + 6 + 9 + 2);
    assert_eq!(json!(item.bypasses), json!({"credentials": 1, "no-tenant": 1}));
    assert_eq!(json!(item.miss_reasons), json!({"uri-miss": 4, "status": 1, "private": 1}));
    assert_eq!((item.bytes.max, item.invalidations, item.invalidated), (200_000, 1, 1));
    let items = &stats.types["items"];
    assert_eq!((items.requests, items.misses, items.invalidations, items.invalidated), (1, 1, 2, 1));
    assert_eq!(stats.tenants["b"].requests, 20);
    assert_eq!((stats.tenants["a"].hits, stats.tenants["a"].misses), (19, 6));
    assert_eq!(stats.tenants["a"].requests + stats.tenants["b"].requests, item.requests + items.requests - 1);
    assert_eq!((stats.totals.invalidations, stats.totals.invalidated), (2, 2), "one drops of two types");
    let ratio = stats.totals.hit_ratio.unwrap();
    assert!((ratio - 47.0 / 54.0).abs() < 1e-9, "{ratio}");
}

/// What gets no answer is counted, too: of who hung up, and where the inner service failed or panicked.
#[tokio::test]
async fn what_has_no_answer_is_counted() {
    let cache = shop().build().unwrap();
    let web = Web::new(&cache, |asked| async move {
        match asked.uri().path() {
            "/items/hangs" => std::future::pending().await,
            "/items/panics" => panic!("as it should"),
            _ => Err(std::io::Error::other("down")),
        }
    });
    let hung = tokio::time::timeout(Duration::from_millis(20), web.send(of("a", Method::GET, "/items/hangs"))).await;
    assert!(hung.is_err());
    let panics = tokio::spawn({
        let web = web.clone();
        async move { web.send(of("a", Method::GET, "/items/panics")).await }
    });
    assert!(panics.await.is_err());
    assert!(web.try_send(of("a", Method::GET, "/items/1")).await.is_err());
    let bypass = with(Method::GET, "/items/1", &[("x-tenant-id", "a"), ("authorization", "x")]);
    assert!(web.try_send(bypass).await.is_err());
    let item = &cache.stats().types["item"];
    assert_eq!(json!(item.miss_reasons), json!({"cancelled": 1, "error": 2}));
    assert_eq!((json!(item.bypasses), item.requests), (json!({"credentials": 1}), 4));
}

/// Who waits in vain for another's call is counted.
#[tokio::test]
async fn waits_that_are_overdue_are_counted() {
    let slow = DataType::new("slow", Ttl::Standard).coalesce_timeout(Duration::from_millis(50));
    let cache = shop().data_type(slow).route(Route::new("/slow/{slow_id}", "slow")).build().unwrap();
    let calls = Arc::new(AtomicU64::new(0));
    let count = calls.clone();
    let web = Web::new(&cache, move |_| {
        let n = count.fetch_add(1, Ordering::SeqCst);
        async move {
            if n == 0 {
                std::future::pending::<()>().await;
            }
            Ok(ok("text"))
        }
    });
    let hangs = tokio::spawn({
        let web = web.clone();
        async move { web.send(of("a", Method::GET, "/slow/1")).await }
    });
    while calls.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    let waits = (0..3).map(|_| web.send(of("a", Method::GET, "/slow/1")));
    futures_util::future::join_all(waits).await;
    assert_eq!(cache.stats().overdue_waits, 3);
    hangs.abort();
}

/// Two layers of one cache count a request once, and a purge of everything is no silence.
#[tokio::test]
async fn nothing_is_counted_twice() {
    let cache = shop().build().unwrap();
    let inner = tower::service_fn(|_: Request<Full<Bytes>>| async { Ok::<_, std::io::Error>(ok("text")) });
    let layer = cache.layer();
    let twice = tower::Layer::layer(&layer, tower::Layer::layer(&layer, inner));
    let send = async |request| twice.clone().oneshot(request).await.map(drop).unwrap();
    send(of("a", Method::GET, "/items/1")).await;
    send(of("a", Method::GET, "/items/1")).await;
    send(with(Method::GET, "/items/1", &[("x-tenant-id", "a"), ("authorization", "x")])).await;
    let item = &cache.stats().types["item"];
    assert_eq!((item.requests, item.misses, item.hits), (3, 1, 1));
    let admin = cache.admin(Admin::bearer(TOKEN).unwrap());
    cache.clear().await.unwrap();
    let seen = get(&admin, "/api/recent?kind=invalidation").await;
    assert_eq!((&seen[0]["what"], &seen[0]["tags"]), (&json!("Cache::clear"), &json!(["*"])));
    let explained = get(&admin, "/api/explain?path=/items/1&tenant=a").await;
    assert!(explained["because"].as_str().unwrap().contains("`Cache::clear` dropped `everything`"), "{explained:#}");
}

/// A cache that is made in one runtime, or in none, and serves in another is looked after there.
#[test]
fn whoever_serves_looks_after_it() {
    let runtime = || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    for builds_inside in [false, true] {
        let cache = match builds_inside {
            true => runtime().block_on(async { shop().build().unwrap() }),
            false => shop().build().unwrap(),
        };
        let cache = cache.clone();
        let admin = cache.admin(Admin::bearer(TOKEN).unwrap());
        runtime().block_on(async move {
            let layer = cache.layer();
            let inner =
                tower::service_fn(|_: Request<Full<Bytes>>| async { Ok::<_, std::io::Error>(ok(vec![b'x'; 200_000])) });
            let service = tower::Layer::layer(&layer, inner);
            service.oneshot(of("a", Method::GET, "/items/large")).await.map(drop).unwrap();
            until(|| async {
                let stats = get(&admin, "/api/stats").await;
                (stats["alerts"].to_string().contains("large_entry"), stats["alerts"].clone())
            })
            .await;
        });
    }
}

/// So are values that code asks for.
#[tokio::test]
async fn values_are_counted() {
    let cache = shop().build().unwrap();
    let ask = async |id: &str, fails: bool| {
        let fetch = move || async move { if fails { Err("down") } else { Ok(Some(1_u32)) } };
        cache.entry::<u32>("item", id).tenant("a").fetch(fetch).unwrap().await
    };
    for _ in 0..4 {
        ask("1", false).await.unwrap();
    }
    ask("2", true).await.unwrap_err();
    let stats = cache.stats();
    let item = &stats.types["item"];
    assert_eq!((item.requests, item.hits, item.misses), (5, 3, 2));
    assert_eq!(json!(item.miss_reasons), json!({"uri-miss": 1, "error": 1}));
    assert_eq!(stats.tenants["a"].requests, 5);
}

/// Where hits were found and what was sent is counted to the byte: in this process, in the store, and by the inner service.
#[tokio::test]
async fn tiers_and_bytes_are_exact() {
    let redis = redis::Redis::start(&[]);
    for (shared, expected) in [(false, (3, 0)), (true, (0, 3))] {
        let mut builder = shop();
        if shared {
            let store = RedisStore::builder([redis.url()]).settle(Duration::ZERO).in_process(0);
            builder = builder.store(store.build().unwrap());
        }
        let cache = builder.build().unwrap();
        until(|| async { (cache.health() == Health::Ok, json!(cache.health().to_string())) }).await;
        let web = Web::new(&cache, |asked| async move {
            let length = asked.uri().path().rsplit('/').next().unwrap().parse().unwrap();
            Ok(ok(vec![b'x'; length]))
        });
        web.send(of("a", Method::GET, "/items/1000")).await;
        until(|| async {
            let stored = web.send(of("a", Method::GET, "/items/1000")).await.is_hit();
            (stored, Value::Null)
        })
        .await;
        let before = cache.stats().types["item"].clone();
        web.send(of("a", Method::GET, "/items/1000")).await;
        web.send(of("a", Method::HEAD, "/items/1000")).await;
        web.send(with(Method::GET, "/items/1000", &[("x-tenant-id", "a"), ("range", "bytes=0-9")])).await;
        web.send(of("a", Method::GET, "/items/500")).await;
        web.send(with(Method::GET, "/items/70", &[("x-tenant-id", "a"), ("authorization", "x")])).await;
        let now = &cache.stats().types["item"];
        let found = (now.hits_in_process - before.hits_in_process, now.hits_in_store - before.hits_in_store);
        assert_eq!(found, expected);
        let (sent, earlier) = (now.bytes_sent, before.bytes_sent);
        let sent = [sent.process - earlier.process, sent.store - earlier.store, sent.inner - earlier.inner];
        assert_eq!(sent, if shared { [0, 1_010, 570] } else { [1_010, 0, 570] });
        let tenant = &cache.stats().tenants["a"];
        assert_eq!((tenant.hits_in_process, tenant.hits_in_store), (now.hits_in_process, now.hits_in_store));
    }
}

/// Whether more memory would help: what was evicted and is asked for again is told from what was never there.
#[tokio::test]
async fn misses_of_what_was_evicted_are_told() {
    for (memory, asks_again, helps) in [(2 << 20, true, true), (2 << 20, false, false), (64 << 20, true, false)] {
        let cache = shop().memory(memory).body_limit(100_000).build().unwrap();
        let web = Web::new(&cache, |_| async { Ok(ok(vec![b'x'; 20_000])) });
        for id in 0..300 {
            web.send(of("a", Method::GET, &format!("/items/{id}"))).await;
        }
        for id in (0..300).filter(|_| asks_again) {
            web.send(of("a", Method::GET, &format!("/items/{id}"))).await;
        }
        let store = cache.stats().store;
        assert_eq!(store.evicted_misses > 100, helps, "{store:?}");
        assert!(helps || store.evicted_misses == 0, "{store:?}");
        assert!(store.evicted_misses <= store.evictions, "{store:?}");
    }
}

/// Of more tenants than are told apart, none is lost.
#[tokio::test]
async fn tenants_are_bounded() {
    let cache = shop().build().unwrap();
    let web = Web::new(&cache, |_| async { Ok(ok("text")) });
    for tenant in 0..500 {
        web.send(of(&format!("tenant-{tenant}"), Method::GET, "/items/1")).await;
    }
    let stats = cache.stats();
    assert!(stats.tenants.len() <= 20, "the busiest");
    assert_eq!(stats.tenants["other"].requests, 500 - 64);
    assert_eq!(stats.types["item"].requests, 500);
}

/// What metrics say is what has happened: names, labels and counts.
#[tokio::test]
async fn metrics_are_exact() {
    let args = ["--metrics-tenants", "2", "--origin-delay-ms", "20", "--admin-token", TOKEN];
    let service = Service::start(&args);
    for (tenant, times) in [("demo", 5), ("two", 3), ("three", 2), ("four", 1)] {
        for _ in 0..times {
            Http::new(&service.url, tenant).get("/agents").await;
        }
    }
    let demo = Http::new(&service.url, "demo");
    demo.put("/agents/agent-1", json!({"name": "Ada"})).await;
    demo.clone().with("authorization", "x").get("/agents").await;
    let text = String::from_utf8(demo.get("/metrics").await.body.to_vec()).unwrap();
    let all = "service=\"agent_service\"";
    for (line, value) in [
        (
            format!(
                "cache_aside_requests_total{{{all},tenant=\"demo\",data_type=\"agents_list\",outcome=\"hit\",reason=\"fresh\"}}"
            ),
            "4",
        ),
        (
            format!(
                "cache_aside_requests_total{{{all},tenant=\"two\",data_type=\"agents_list\",outcome=\"miss\",reason=\"uri-miss\"}}"
            ),
            "1",
        ),
        (
            format!(
                "cache_aside_requests_total{{{all},tenant=\"other\",data_type=\"agents_list\",outcome=\"hit\",reason=\"fresh\"}}"
            ),
            "1",
        ),
        (
            format!(
                "cache_aside_requests_total{{{all},tenant=\"other\",data_type=\"agents_list\",outcome=\"miss\",reason=\"uri-miss\"}}"
            ),
            "2",
        ),
        (
            format!(
                "cache_aside_requests_total{{{all},tenant=\"demo\",data_type=\"agents_list\",outcome=\"bypass\",reason=\"credentials\"}}"
            ),
            "1",
        ),
        (format!("cache_aside_request_duration_seconds_count{{{all},data_type=\"agents_list\",outcome=\"hit\"}}"), "7"),
        (format!("cache_aside_load_duration_seconds_count{{{all},data_type=\"agents_list\",result=\"ok\"}}"), "4"),
        (format!("cache_aside_entry_bytes_count{{{all},data_type=\"agents_list\"}}"), "4"),
        (format!("cache_aside_entry_bytes_bucket{{{all},data_type=\"agents_list\",le=\"102400\"}}"), "4"),
        (format!("cache_aside_invalidation_duration_seconds_count{{{all},source=\"route\"}}"), "1"),
        (format!("cache_aside_invalidated_entries_total{{{all},data_type=\"agents_list\",source=\"route\"}}"), "1"),
        (format!("cache_aside_store_up{{{all}}}"), "1"),
        (format!("cache_aside_overdue_waits_total{{{all}}}"), "0"),
        (format!("cache_aside_drift_total{{{all},data_type=\"agents_list\"}}"), "0"),
        (format!("cache_aside_hits_total{{{all},data_type=\"agents_list\",tier=\"process\"}}"), "7"),
        (format!("cache_aside_hits_total{{{all},data_type=\"agents_list\",tier=\"store\"}}"), "0"),
        (format!("cache_aside_evicted_misses_total{{{all}}}"), "0"),
    ] {
        let found = text.lines().find_map(|own| own.strip_prefix(&line)).map(str::trim);
        assert_eq!(found, Some(value), "{line}\n{text}");
    }
    let stats = Http::new(&service.url, "demo").with("authorization", &format!("Bearer {TOKEN}"));
    let stats = stats.get("/_cache/api/stats").await.json();
    let lists = &stats["types"]["agents_list"];
    assert_eq!((&lists["hits"], &lists["misses"], &lists["requests"]), (&json!(7), &json!(4), &json!(12)));
    assert_eq!((&lists["bypasses"], &stats["totals"]["invalidations"]), (&json!({"credentials": 1}), &json!(1)));
    assert!(!text.contains("=\"\"") && !text.contains("tenant=\"three\"") && !text.contains("agent-1"), "{text}");
}

// ---- alerts ----------------------------------------------------------------------------------------------------------

/// Raised once, for what is wrong, and cleared once.
#[tokio::test]
async fn alerts_are_raised_and_cleared() {
    let rules = AlertRules::default().hit_ratio(0.5).requests(10).entry_bytes(1_000);
    let cache = shop().alerts(rules).build().unwrap();
    let admin = cache.admin(Admin::bearer(TOKEN).unwrap());
    let web = Web::new(&cache, |asked| async move {
        Ok(if asked.uri().path() == "/items/large" { ok(vec![b'x'; 2_000]) } else { ok("text") })
    });
    web.send(of("a", Method::GET, "/items/large")).await;
    web.send(of("a", Method::POST, "/unknown")).await;
    for item in 0..12 {
        web.send(of("a", Method::GET, &format!("/items/{item}"))).await;
    }
    let kinds = |stats: &Value| {
        let alerts = stats["alerts"].as_array().unwrap().iter();
        alerts.map(|alert| format!("{} {}", alert["kind"].as_str().unwrap(), alert["type"])).collect::<Vec<_>>()
    };
    let expected = ["hit_ratio \"item\"", "large_entry \"item\"", "unmapped null"];
    until(|| async {
        let stats = get(&admin, "/api/stats").await;
        (kinds(&stats) == expected, stats["alerts"].clone())
    })
    .await;
    for _ in 0..100 {
        web.send(of("a", Method::GET, "/items/1")).await;
    }
    until(|| async {
        let stats = get(&admin, "/api/stats").await;
        (kinds(&stats) == expected[1..], stats["alerts"].clone())
    })
    .await;
    let recent = get(&admin, "/api/recent?kind=alert").await;
    let ratio: Vec<_> = recent.as_array().unwrap().iter().filter(|e| e["alert"] == "hit_ratio").collect();
    assert_eq!(
        ratio.iter().map(|e| e["raised"].as_bool().unwrap()).collect::<Vec<_>>(),
        [false, true],
        "the newest first"
    );
}

// ---- the audit -------------------------------------------------------------------------------------------------------

/// A table that forgets the lists: the audit finds the stale one, says by which route and after which write, and heals it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_audit_finds_the_write_that_nobody_declared() {
    let built_in = include_str!("../examples/agent_service/agents.toml");
    let forgetful: String = built_in
        .lines()
        .map(|line| {
            line.replace("all = [\"agents_list\"]", "")
                .replace("\"agents_list\", ", "")
                .replace(", \"agents_list\"", "")
        })
        .map(|line| line + "\n")
        .collect();
    assert_ne!(forgetful, built_in);
    for (table, finds) in [(forgetful.as_str(), true), (built_in, false)] {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), table).unwrap();
        let config = file.path().to_str().unwrap();
        let service = Service::start(&["--config", config, "--audit", "1", "--admin-token", TOKEN]);
        let demo = Http::new(&service.url, "demo");
        let admin = Http::new(&service.url, "demo").with("authorization", &format!("Bearer {TOKEN}"));
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, reader) = (stop.clone(), demo.clone());
        let load = tokio::spawn(async move {
            while !stopped.load(Ordering::Relaxed) {
                reader.get("/agents").await;
                reader.get("/agents/agent-2").await;
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        for n in 0..3 {
            demo.put("/agents/agent-1", json!({"name": format!("Ada {n}")})).await;
            tokio::time::sleep(Duration::from_millis(1_500)).await;
        }
        let audits = || async { admin.get("/_cache/api/recent?kind=audit").await.json() };
        if finds {
            let seen = until(|| async {
                let seen = audits().await;
                (!seen.as_array().unwrap().is_empty(), seen)
            })
            .await;
            let found = seen.as_array().unwrap().last().unwrap().clone();
            assert_eq!((&found["result"], &found["route"]), (&json!("stale"), &json!("GET /agents")), "{found:#}");
            assert!(found["suspects"].as_array().unwrap().contains(&json!("PUT /agents/agent-1")), "{found:#}");
            let fields = found["fields"].as_array().unwrap();
            assert!(fields.iter().any(|field| field.as_str().unwrap().ends_with("/name")), "{found:#}");
            assert!(!found.to_string().contains("Ada"), "no values: {found:#}");
            let list = demo.get("/agents").await.json();
            assert!(list.to_string().contains("Ada 2"), "healed: {list}");
            until(|| async {
                let stats = admin.get("/_cache/api/stats").await.json();
                (stats["alerts"].to_string().contains("\"audit\""), stats["alerts"].clone())
            })
            .await;
        } else {
            assert_eq!(audits().await, json!([]));
            let stats = admin.get("/_cache/api/stats").await.json();
            assert!(stats["audits"]["ok"].as_u64().unwrap() > 10, "{stats:#}");
        }
        stop.store(true, Ordering::Relaxed);
        load.await.unwrap();
    }
}

/// With the right table nothing is found, in any store and tier, under random load. `AUDIT_SECONDS` says for how long each.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_audit_finds_nothing_where_nothing_is_stale() {
    let seconds: u64 = std::env::var("AUDIT_SECONDS").map_or(4, |seconds| seconds.parse().unwrap());
    let redis = redis::Redis::start(&[]);
    let url = redis.url();
    let mut services = vec![];
    for tier in [
        &[][..],
        &["--redis", &url, "--l1", "on"],
        &["--redis", &url, "--l1", "validated"],
        &["--redis", &url, "--l1", "off"],
    ] {
        let prefix = format!("tier{}", tier.join(""));
        let args = [tier, &["--audit", "0.3", "--admin-token", TOKEN, "--prefix", &prefix]].concat();
        let service = Service::start(&args);
        let end = std::time::Instant::now() + Duration::from_secs(seconds);
        let load = (0..6_u64).map(|seed| {
            let demo = Http::new(&service.url, "demo");
            tokio::spawn(async move {
                let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
                while std::time::Instant::now() < end {
                    let agent = format!("/agents/agent-{}", rng.random_range(1..4));
                    match rng.random_range(0..30) {
                        0 => drop(demo.put(&agent, json!({"name": format!("{}", rng.random::<u32>())})).await),
                        1 => drop(
                            demo.put(&format!("{agent}/config"), json!({"config": {"a": rng.random::<u32>()}})).await,
                        ),
                        2..12 => drop(demo.get("/agents").await),
                        12..20 => drop(demo.get(&format!("{agent}/config")).await),
                        _ => drop(demo.get(&agent).await),
                    }
                }
            })
        });
        futures_util::future::join_all(load).await.into_iter().for_each(|ended| ended.unwrap());
        services.push((prefix, service));
    }
    // What is suspect is looked at again some seconds later.
    tokio::time::sleep(Duration::from_secs(6)).await;
    for (prefix, service) in services {
        let admin = Http::new(&service.url, "demo").with("authorization", &format!("Bearer {TOKEN}"));
        let stats = admin.get("/_cache/api/stats").await.json();
        let found = admin.get("/_cache/api/recent?kind=audit").await.json();
        assert_eq!(found, json!([]), "{prefix}: {found:#}");
        assert!(stats["audits"]["ok"].as_u64().unwrap() > 10, "{prefix}: {:#}", stats["audits"]);
    }
}

/// What differs is shown where that is asked for, and nowhere else.
#[tokio::test]
async fn an_audit_shows_values_if_it_is_asked_to() {
    let find = async |shows: bool| {
        let cache = shop().audit(1.0).audit_values(shows).build().unwrap();
        let admin = cache.admin(Admin::bearer(TOKEN).unwrap());
        let row = Arc::new(AtomicU64::new(1));
        let read = row.clone();
        let web = Web::new(&cache, move |_| {
            let body = json!({"name": "Ada", "at": [{"n": read.load(Ordering::SeqCst)}]}).to_string();
            async move { Ok(ok(body)) }
        });
        web.send(of("a", Method::GET, "/items/1")).await;
        // Behind the cache's back.
        row.store(2, Ordering::SeqCst);
        let seen = until(|| async {
            web.send(of("a", Method::GET, "/items/1")).await;
            let seen = get(&admin, "/api/recent?kind=audit").await;
            (!seen.as_array().unwrap().is_empty(), seen)
        })
        .await;
        assert_eq!(seen[0]["fields"], json!(["/at/0/n"]), "{seen:#}");
        seen[0]["values"].clone()
    };
    let (shown, hidden) = tokio::join!(find(true), find(false));
    assert_eq!(shown, json!([{"field": "/at/0/n", "served": "1", "now": "2"}]));
    assert_eq!(hidden, Value::Null);
}

/// What is another thing each time is said to be so, once, and left alone; what has credentials is never looked at.
#[tokio::test]
async fn what_cannot_be_compared_is_said_once() {
    let cache = shop().audit(1.0).build().unwrap();
    let admin = cache.admin(Admin::bearer(TOKEN).unwrap());
    let calls = Arc::new(AtomicU64::new(0));
    let count = calls.clone();
    let web = Web::new(&cache, move |_| {
        let n = count.fetch_add(1, Ordering::SeqCst);
        async move { Ok(ok(format!("{n}"))) }
    });
    let seen = until(|| async {
        web.send(of("a", Method::GET, "/items/1")).await;
        let seen = get(&admin, "/api/recent?kind=audit").await;
        (!seen.as_array().unwrap().is_empty(), seen)
    })
    .await;
    assert_eq!(seen[0]["result"], "not_reproducible");
    let known = calls.load(Ordering::SeqCst);
    for _ in 0..20 {
        web.send(of("a", Method::GET, "/items/1")).await;
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert_eq!(calls.load(Ordering::SeqCst), known);
    assert_eq!(get(&admin, "/api/recent?kind=audit").await.as_array().unwrap().len(), 1);

    let error = shop().audit(1.5).build().unwrap_err().to_string();
    assert!(error.contains("1.5"), "{error}");
    let error = shop().data_type(DataType::new("x", Ttl::Short).audit(-1.0)).build().unwrap_err().to_string();
    assert!(error.contains("`x`"), "{error}");
}

// ---- the admin's API -------------------------------------------------------------------------------------------------

/// Without the token nothing is said; with a wrong one, less and less.
#[tokio::test]
async fn only_who_has_the_token_comes_in() {
    let cache = shop().build().unwrap();
    let admin = cache.admin(Admin::bearer(TOKEN).unwrap());
    for empty in ["", " ", "\n"] {
        assert!(Admin::bearer(empty).unwrap_err().to_string().contains("empty"));
    }
    let send = async |path: &str, authorization: &str| {
        let mut request = Request::get(path).body(Full::<Bytes>::default()).unwrap();
        if !authorization.is_empty() {
            request.headers_mut().insert("authorization", authorization.parse().unwrap());
        }
        let response = admin.clone().oneshot(request).await.unwrap();
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        (status, headers, response.into_body().collect().await.unwrap().to_bytes())
    };
    for path in ["/api/stats", "/_cache/api/stats", "/api/events", "/api/explain?path=/items", "/api/nothing"] {
        for wrong in ["", "Bearer", "Bearer ", "Basic YTpi"] {
            let (status, headers, body) = send(path, wrong).await;
            assert_eq!((status, body.len()), (401, 0), "{path} {wrong}");
            assert_eq!(headers["www-authenticate"], "Bearer");
        }
    }
    assert_eq!(send("/api/stats", &format!("bearer {TOKEN}")).await.0, 200);
    let guessed: Vec<_> = futures_util::future::join_all((0..50).map(|n| {
        let guess = format!("Bearer guess {n}");
        let send = &send;
        async move { send("/api/stats", &guess).await.0 }
    }))
    .await;
    assert!(guessed[..10].iter().all(|status| *status == 401) && guessed[40..].iter().all(|status| *status == 429));
    assert_eq!(
        send("/api/stats", &format!("Bearer {TOKEN}")).await.0,
        200,
        "who has it is not kept out by who guesses"
    );

    let (status, headers, page) = send("/", "").await;
    let policy = headers["content-security-policy"].to_str().unwrap();
    let nonce = policy.split("'nonce-").nth(1).unwrap().split('\'').next().unwrap().to_owned();
    assert_eq!(status, 200);
    assert!(policy.starts_with("default-src 'none'") && String::from_utf8_lossy(&page).contains(&nonce));
    assert!(!String::from_utf8_lossy(&page).contains("{{nonce}}"));
    assert!(!String::from_utf8_lossy(&send("/", "").await.2).contains(&nonce), "another each time");
    assert_eq!(send("/favicon.ico", "").await.0, 404);
}

/// (what is asked, what happens, words that say why)
#[tokio::test]
async fn explain_says_why() {
    let cache = shop()
        .data_type(DataType::new("page", Duration::from_millis(300)))
        .route(Route::new("/pages/{page_id}", "page"))
        .mutation(Mutation::put("/items/{item_id}", "item"))
        .mutation(Mutation::put("/pages/{page_id}", "page"))
        .build()
        .unwrap();
    let admin = cache.admin(Admin::bearer(TOKEN).unwrap());
    let web = Web::new(&cache, |asked| async move {
        let language = asked.headers().get("accept-language").map_or("", |v| v.to_str().unwrap()).to_owned();
        Ok(Response::builder().header("vary", "accept-language").body(full(format!("<{language}>"))).unwrap())
    });
    let explain = async |query: &str| get(&admin, &format!("/api/explain?{query}")).await;
    let verdict = |explained: &Value| {
        (explained["verdict"].as_str().unwrap().to_owned(), explained["because"].as_str().unwrap().to_owned())
    };
    let (miss, why) = verdict(&explain("path=/items/1&tenant=a").await);
    assert!(miss == "miss" && why.contains("nothing is stored"), "{why}");
    web.send(with(Method::GET, "/items/1", &[("x-tenant-id", "a"), ("accept-language", "de")])).await;
    let explained = explain("path=/items/1&tenant=a&header=accept-language:de").await;
    let (hit, why) = verdict(&explained);
    assert!(hit == "hit" && why.contains("fresh for"), "{why}");
    assert_eq!((&explained["route"], &explained["data_type"]), (&json!("GET /items/{item_id}"), &json!("item")));
    assert_eq!((&explained["entry"]["size"], &explained["entry"]["status"]), (&json!(4), &json!(200)));
    assert!(explained["tags"].as_array().unwrap().iter().all(|tag| tag["ok"] == true), "{explained:#}");
    assert_eq!(explain("path=/items/1&tenant=a&header=accept-language:fr").await["verdict"], "miss");
    assert_eq!(explain("path=/items/1&tenant=b&header=accept-language:de").await["verdict"], "miss");

    web.send(of("a", Method::PUT, "/items/1")).await;
    let (miss, why) = verdict(&explain("path=/items/1&tenant=a&header=accept-language%3Ade").await);
    assert!(miss == "miss" && why.contains("`PUT /items/1` dropped `item=1`"), "{why}");

    web.send(of("a", Method::GET, "/pages/1")).await;
    tokio::time::sleep(Duration::from_millis(400)).await;
    let (miss, why) = verdict(&explain("path=/pages/1&tenant=a").await);
    assert!(miss == "miss" && (why.contains("expired") || why.contains("nothing is stored")), "{why}");
    // Below a router that takes a prefix away: one for each.
    let mounted = cache.layer().mounted_at("/eu").layer(tower::service_fn(|_: Request<Full<Bytes>>| async {
        Ok::<_, std::io::Error>(Response::new(Full::new(Bytes::from_static(b"x"))))
    }));
    mounted.oneshot(of("a", Method::GET, "/items/5")).await.unwrap();
    assert_eq!(explain("path=/eu/items/5&mount=/eu&tenant=a").await["verdict"], "hit");
    assert_eq!(explain("path=/items/5&tenant=a").await["verdict"], "miss");
    assert_eq!(explain("path=/us/items/5&mount=/us/&tenant=a").await["verdict"], "miss");

    for (query, words) in [
        ("path=/items/1&tenant=a&header=authorization:x", "credentials"),
        ("path=/items/1", "no tenant"),
        ("path=/nothing&tenant=a", "no route"),
        ("path=/items/1&tenant=a&header=if-match:x", "precondition"),
    ] {
        let (bypass, why) = verdict(&explain(query).await);
        assert!(bypass == "bypass" && why.contains(words), "{query}: {why}");
    }
    for mistake in
        ["", "path=items", "path=/items/1&mount=/eu", "path=/items/1&header=nonsense", "path=/items/1&header=a%20b:c"]
    {
        let (status, error) = ask(&admin, Method::GET, &format!("/api/explain?{mistake}"), Value::Null).await;
        assert!(status == 400 && error["error"].is_string(), "{mistake}: {error}");
    }
}

/// A purge reaches every variant; a dry run says what it would, and drops nothing; who may only look drops nothing either.
#[tokio::test]
async fn purges_say_what_they_drop() {
    let cache = shop()
        .data_type(DataType::new("part", Ttl::Standard))
        .route(Route::new("/items/{item_id}/parts", "part"))
        .cascade(Cascade::new("item").drops(["part"]))
        .build()
        .unwrap();
    let admin = cache.admin(Admin::bearer(TOKEN).unwrap());
    let web = Web::new(&cache, |_| async {
        Ok(Response::builder().header("vary", "accept-language").body(full("text")).unwrap())
    });
    let variants = async || {
        let mut hits = 0;
        for language in ["de", "fr"] {
            for path in ["/items/1", "/items/1/parts", "/items/2"] {
                let request = with(Method::GET, path, &[("x-tenant-id", "a"), ("accept-language", language)]);
                hits += u32::from(web.send(request).await.is_hit());
            }
        }
        hits
    };
    variants().await;
    assert_eq!(variants().await, 6);
    let purge = |dry_run| json!({"tenant": "a", "mutated": [{"type": "item", "id": "1"}], "dry_run": dry_run});
    let (status, dry) = ask(&admin, Method::POST, "/api/invalidate", purge(true)).await;
    assert_eq!((status.as_u16(), &dry["dry_run"]), (200, &json!(true)));
    assert_eq!(dry["tags"], json!(["item:item=1", "part:item=1"]));
    assert_eq!(variants().await, 6, "nothing was dropped");
    let looking = cache.admin(Admin::bearer(TOKEN).unwrap().read_only());
    assert_eq!(ask(&looking, Method::POST, "/api/invalidate", purge(false)).await.0, 403);
    assert_eq!(ask(&looking, Method::POST, "/api/invalidate", purge(true)).await.0, 200);
    let (_, wet) = ask(&admin, Method::POST, "/api/invalidate", purge(false)).await;
    assert_eq!((&wet["dropped"], &wet["total"]), (&dry["dropped"], &dry["total"]), "as the dry run said");
    assert_eq!(variants().await, 2);
    for (body, word) in [
        (json!({"tenant": "a", "mutated": [{"type": "itm", "id": "1"}]}), "itm"),
        (json!({"tenant": "a", "mutated": [{"type": "item", "id": "1"}], "include": ["friends"]}), "friends"),
        (json!({"tenant": "a"}), "nothing"),
        (json!({"tenant": "a", "everythin": true}), "everythin"),
        (json!({"mutated": [{"type": "item", "id": "1"}]}), "tenant"),
        (json!("text"), "invalid"),
    ] {
        let (status, error) = ask(&admin, Method::POST, "/api/invalidate", body.clone()).await;
        assert!(status == 400 && error["error"].as_str().unwrap().contains(word), "{body}: {error}");
    }
    let (_, all) = ask(&admin, Method::POST, "/api/invalidate", json!({"tenant": "a", "everything": true})).await;
    assert!(all["total"].as_u64().unwrap() >= 6, "{all}");
    assert_eq!(variants().await, 0);
}

/// What happens is told as it happens, hostile or not; who does not listen is in nobody's way.
#[tokio::test]
async fn events_come_as_they_happen() {
    let cache = shop().build().unwrap();
    let admin = cache.admin(Admin::bearer(TOKEN).unwrap());
    let web = Web::new(&cache, |_| async { Ok(ok("text")) });
    let listen = || {
        let request = Request::get("/api/events").header("authorization", format!("Bearer {TOKEN}"));
        admin.clone().oneshot(request.body(Full::<Bytes>::default()).unwrap())
    };
    let mut events = listen().await.unwrap().into_body();
    // One who never reads.
    let _deaf = listen().await.unwrap();
    web.send(of("<script>", Method::GET, "/items/%3Cimg%3E")).await;
    let frame = events.frame().await.unwrap().unwrap().into_data().unwrap();
    let text = std::str::from_utf8(&frame).unwrap();
    let data: Value = serde_json::from_str(text.split_once("data: ").unwrap().1.trim()).unwrap();
    assert!(text.starts_with("event: miss\ndata: ") && text.ends_with("\n\n"), "{text}");
    assert_eq!((&data["tenant"], &data["path"]), (&json!("<script>"), &json!("/items/%3Cimg%3E")));
    assert_eq!(get(&admin, "/api/recent?kind=miss&n=1").await[0], data);
    for item in 0..2_000 {
        web.send(of("a", Method::GET, &format!("/items/{item}"))).await;
    }
    let many: Vec<_> = futures_util::future::join_all((0..40).map(|_| listen())).await;
    let refused = many.iter().filter(|response| response.as_ref().unwrap().status() == 503).count();
    assert_eq!(refused, 40 - 30, "so many may listen, and no more");
    let (status, error) = ask(&admin, Method::GET, "/api/recent?kind=nonsense", Value::Null).await;
    assert!(status == 400 && error["error"].as_str().unwrap().contains("miss"), "{error}");
}

/// Processes of a fleet are seen together, or one by one; a purge by one reaches the others.
#[tokio::test]
async fn a_fleet_is_seen_as_one() {
    let redis = redis::Redis::start(&[]);
    let args = ["--redis", &redis.url(), "--admin-token", TOKEN, "--l1", "on"];
    let db = tempfile::TempDir::new().unwrap();
    let file = db.path().join("agents.db");
    let args = [&args[..], &["--db", file.to_str().unwrap()]].concat();
    let fleet = [Service::start(&args), Service::start(&args)];
    let of = |i: usize| Http::new(&fleet[i].url, "demo");
    for i in [0, 1] {
        for _ in 0..5 {
            of(i).get("/agents/agent-1").await;
        }
    }
    let admin = of(0).with("authorization", &format!("Bearer {TOKEN}"));
    let stats = until(|| async {
        let stats = admin.get("/_cache/api/stats").await.json();
        (stats["types"]["agent"]["requests"] == 10, stats)
    })
    .await;
    let processes = stats["processes"].as_array().unwrap();
    assert_eq!(processes.len(), 2);
    for process in processes {
        let id = process["id"].as_str().unwrap();
        let one = admin.get(&format!("/_cache/api/stats?process={id}")).await.json();
        assert_eq!((&one["process"], &one["types"]["agent"]["requests"]), (&json!(id), &json!(5)));
    }
    assert_eq!(admin.get("/_cache/api/stats?process=nobody").await.status, 404);
    let seen = admin.get("/_cache/api/explain?path=/agents/agent-1&tenant=demo").await.json();
    assert_eq!(seen["verdict"], "hit", "{seen:#}");
    let purge = json!({"tenant": "demo", "mutated": [{"type": "agent", "id": "agent-1"}]});
    assert_eq!(admin.post("/_cache/api/invalidate", purge).await.json()["dropped"]["agent"], 1);
    until(|| async { (of(1).get("/agents/agent-1").await.is_miss(), Value::Null) }).await;
    let seen = of(1).with("authorization", &format!("Bearer {TOKEN}"));
    let health = seen.get("/_cache/api/stats").await.json();
    assert_eq!(health["store"]["state"], "ok", "{health:#}");
}

/// Whichever store they share.
#[tokio::test]
async fn a_fleet_that_shares_memcached_is_seen_as_one() {
    let server = memcached::Memcached::start(&[]);
    let fleet = [(); 2].map(|()| {
        let store = MemcachedStore::builder([server.address()]).settle(Duration::ZERO).build().unwrap();
        let cache = shop().store(store).build().unwrap();
        let web = Web::new(&cache, |_| async { Ok(ok("text")) });
        (cache.admin(Admin::bearer(TOKEN).unwrap()), web)
    });
    for (_, web) in &fleet {
        web.send(of("a", Method::GET, "/items/1")).await;
    }
    until(|| async {
        let stats = get(&fleet[0].0, "/api/stats").await;
        (stats["types"]["item"]["requests"] == 2 && stats["processes"].as_array().unwrap().len() == 2, stats)
    })
    .await;
}

/// Entries are found by what their keys hold, of one tenant or of all, with what would become of them.
#[tokio::test]
async fn entries_are_searched() {
    let redis = redis::Redis::start(&[]);
    // However many other keys there are.
    redis.command(&["EVAL", "for i = 1, 20000 do redis.call('SET', 'hay:' .. i, 1) end", "0"]);
    for shared in [false, true] {
        let mut builder = shop().mutation(Mutation::put("/items/{item_id}", "item"));
        if shared {
            let store = RedisStore::builder([redis.url()]).settle(Duration::ZERO).prefix("a-b");
            builder = builder.store(store.build().unwrap());
        }
        let cache = builder.build().unwrap();
        until(|| async { (cache.health() == Health::Ok, json!(cache.health().to_string())) }).await;
        let admin = cache.admin(Admin::bearer(TOKEN).unwrap());
        let web = Web::new(&cache, |_| async { Ok(ok("text")) });
        for tenant in ["a", "b*"] {
            for id in ["1", "22", "x%20y"] {
                web.send(of(tenant, Method::GET, &format!("/items/{id}"))).await;
            }
        }
        let search = async |query: &str| get(&admin, &format!("/api/search?{query}")).await.as_array().unwrap().clone();
        until(|| async { (search("").await.len() == 6, Value::Null) }).await;
        for (query, found) in [
            ("tenant=a", 3),
            ("tenant=b*", 3),
            ("tenant=*", 0),
            ("text=item+22", 2),
            ("text=22&tenant=a", 1),
            ("text==22", 2),
            ("text=x%2520y", 0),
            ("text=x+y&tenant=a", 1),
            ("text=*", 3),
            ("text=nothing", 0),
            ("n=2", 2),
        ] {
            assert_eq!(search(query).await.len(), found, "{query}, shared: {shared}");
        }
        web.send(of("a", Method::PUT, "/items/22")).await;
        let found = search("text=22&tenant=a").await;
        // In Redis it is there until somebody replaces it, and nobody is answered with it.
        assert!(found.iter().all(|entry| entry["verdict"] == "miss"), "{found:?}");
        let found = search("text=1&tenant=b*").await;
        let one = &found[0];
        let seen = (&one["verdict"], &one["tenant"], &one["data_type"], &one["entry"]["size"]);
        assert_eq!(seen, (&json!("hit"), &json!("b*"), &json!("item"), &json!(4)), "{one:#}");
        assert_eq!(one["tags"][0]["ok"], true, "{one:#}");
    }
}

/// A user who may not leave a word for the fleet is no worse off for the rest.
#[tokio::test]
async fn without_the_rights_for_the_fleet_all_else_works() {
    let redis = redis::Redis::start(&[]);
    redis.command(&["ACL", "SETUSER", "agents", "on", ">secret", "~*", "&*", "+@all", "-hset", "-hvals", "-scan"]);
    let url = redis.url().replace("://", "://agents:secret@");
    let store = RedisStore::builder([url]).settle(Duration::ZERO).build().unwrap();
    let cache = shop().mutation(Mutation::put("/items/{item_id}", "item")).store(store).build().unwrap();
    let admin = cache.admin(Admin::bearer(TOKEN).unwrap());
    let web = Web::new(&cache, |_| async { Ok(ok("text")) });
    until(|| async {
        get(&admin, "/api/stats").await;
        let log = redis.command(&["ACL", "LOG"]);
        (log.contains("hset"), json!(log))
    })
    .await;
    until(|| async { (web.send(of("a", Method::GET, "/items/1")).await.is_hit(), Value::Null) }).await;
    let written = web.send(of("a", Method::PUT, "/items/1")).await;
    assert_eq!(written.report.as_ref().unwrap().total(), 1);
    let stats = get(&admin, "/api/stats").await;
    assert_eq!((&stats["store"]["state"], &stats["alerts"]), (&json!("ok"), &json!([])), "{stats:#}");
    assert_eq!(stats["types"]["item"]["invalidated"], 1, "{stats:#}");
    let log = redis.command(&["ACL", "LOG"]);
    assert!(log.contains("count\r\n:1\r\n"), "not again and again: {log}");
    let (status, why) = ask(&admin, Method::GET, "/api/search", Value::Null).await;
    assert!(status == 503 && why["error"].as_str().unwrap().contains("scan"), "{why}");
}

/// Nothing is told where nobody asked for it.
#[tokio::test]
async fn without_a_token_there_is_no_admin() {
    let service = Service::start(&[]);
    let demo = Http::new(&service.url, "demo");
    for path in ["/_cache/", "/_cache/api/stats"] {
        assert_eq!(demo.get(path).await.status, 404, "{path}");
    }
}
