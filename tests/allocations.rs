//! A hit in process costs at most six heap allocations, and a hot one four, beyond those of the request itself.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../benches/support/mod.rs"]
mod support;

use allocation_counter::measure;
use futures_util::FutureExt;
use support::{builder, get, origin};
use tower::{Layer, Service, ServiceExt};

/// Servers put something into the extensions of every request, which have room for those of its response then.
fn served(path: &str) -> http::Request<http_body_util::Full<bytes::Bytes>> {
    let mut request = get(path);
    request.extensions_mut().insert(1_u8);
    request
}

#[test]
fn a_hit_allocates_at_most_six_times() {
    let mut fewest = u64::MAX;
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut service = builder().build().unwrap().layer().layer(origin());
    runtime.block_on(async { service.ready().await.unwrap().call(get("/agents/1")).await.unwrap() });
    // The second of one second makes what the others share; should the second end meanwhile, so does the fourth.
    for most in [6, u64::MAX, 6, 6, 6, 6, 6, 6] {
        let request = served("/agents/1");
        let mut response = None;
        let hit = measure(|| response = service.call(request).now_or_never());
        let response = response.unwrap().unwrap();
        assert!(response.headers()["cache-status"].to_str().unwrap().contains("; hit"));
        assert!(hit.count_total <= most, "{} allocations", hit.count_total);
        fewest = fewest.min(hit.count_total);
    }
    assert!(fewest <= 4, "{fewest} allocations");

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
