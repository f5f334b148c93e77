//! A hit in process costs at most six heap allocations, and one of those that follow others of their second three, beyond
//! those of the request itself; what one in Redis costs besides is bounded as well. And what is remembered of questions has its
//! bound in bytes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/redis.rs"]
mod redis;
#[path = "../benches/support/mod.rs"]
mod support;

use std::{convert::Infallible, time::Duration};

use allocation_counter::measure;
use bytes::Bytes;
use futures_util::FutureExt;
use http::{Request, Response};
use http_body_util::Full;
use support::{builder, get, origin, served};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_cache_aside::{Tier, store::RedisStore};

#[test]
fn a_hit_allocates_at_most_six_times() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut service = builder().build().unwrap().layer().layer(origin());
    runtime.block_on(async { service.ready().await.unwrap().call(get("/agents/1")).await.unwrap() });
    let counted: Vec<u64> = (0..300)
        .map(|_| {
            let request = served("/agents/1");
            let mut response = None;
            let hit = measure(|| response = service.call(request).now_or_never());
            let response = response.unwrap().unwrap();
            assert!(response.headers()["cache-status"].to_str().unwrap().contains("; hit"));
            hit.count_total
        })
        .collect();
    // The first of a thread makes its places. One of each second makes what the others of that second share: before and after it is
    // copied.
    let many = counted.iter().filter(|count| **count > 6).count();
    assert!(many <= 10 && counted.iter().all(|count| *count <= 60), "allocations: {counted:?}");
    assert!(counted[100..].iter().filter(|count| **count > 3).count() <= 10, "allocations: {counted:?}");

    // Of the first requests that no route reads, somebody looks why.
    for _ in 0..32 {
        drop(service.call(get("/healthz")).now_or_never());
    }
    let request = get("/healthz");
    let alone = measure(|| drop(origin().call(request).now_or_never()));
    let request = get("/healthz");
    let passed = measure(|| drop(service.call(request).now_or_never()));
    assert_eq!(passed.count_total, alone.count_total, "what is not cached costs no allocation");
}

/// With all that the connection's task does for it.
#[test]
fn a_hit_in_redis_has_a_bound() {
    let redis = redis::Redis::start(&[]);
    for (tier, most) in [(Tier::Off, 14), (Tier::Validated, 8)] {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let store = RedisStore::builder([redis.url()]).prefix(format!("{tier:?}")).budget(Duration::from_secs(10));
        let cache = support::tiered(tier).store(store.build().unwrap()).build().unwrap();
        let mut service = cache.layer().layer(origin());
        let mut counted: Vec<u64> = vec![];
        // A heartbeat may come in between, and the first are misses.
        for _ in 0..200 {
            let request = served("/agents/1");
            let mut response = None;
            let hit = measure(|| response = Some(runtime.block_on(async { service.call(request).await.unwrap() })));
            let is_hit = response.unwrap().headers()["cache-status"].to_str().unwrap().contains("; hit");
            counted.extend(is_hit.then_some(hit.count_total));
            runtime.block_on(async { tokio::time::sleep(Duration::from_millis(1)).await });
        }
        assert!(counted.len() > 20, "{tier:?}: {} hits", counted.len());
        assert!(counted.iter().min().is_some_and(|least| *least <= most), "{tier:?}: allocations: {counted:?}");
    }
}

/// What a stranger asks for is remembered up to a bound in bytes, however long it is.
#[test]
fn long_questions_take_no_more_than_short_ones() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let cache = builder().memory(8 << 20).show_keys(true).build().unwrap();
    let origin = service_fn(|_: Request<Full<Bytes>>| async {
        let response = Response::builder().header("cache-control", "private").header("cache-tag", "type-0=1");
        Ok::<_, Infallible>(response.body(Full::from("x")).unwrap())
    });
    let mut service = cache.layer().layer(origin);
    let mut ask = |n: usize| {
        let parameters: Vec<_> = (0..900).map(|i| format!("{n}p{i}={}", "x".repeat(55))).collect();
        let request = get(&format!("/agents/{n}?{}", parameters.join("&")));
        let response = runtime.block_on(async { service.ready().await.unwrap().call(request).await.unwrap() });
        let said = response.headers()["cache-status"].to_str().unwrap().to_owned();
        said.split("key=").nth(1).unwrap_or_default().to_owned()
    };
    let keys = [0, 1].map(&mut ask);
    assert!(keys[0] != keys[1] && keys.iter().all(|key| (1..1_200).contains(&key.len())), "{keys:?}");
    let grown = measure(|| (0..1_000).for_each(|n| drop(ask(n)))).bytes_current;
    assert!(grown < 16 << 20, "{} MiB", grown >> 20);
}
