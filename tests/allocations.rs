//! A hit in process costs at most five heap allocations, beyond those of the request itself.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../benches/support/mod.rs"]
mod support;

use allocation_counter::measure;
use futures_util::FutureExt;
use support::{builder, get, origin};
use tower::{Layer, Service, ServiceExt};

#[test]
fn a_hit_allocates_at_most_five_times() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut service = builder().build().unwrap().layer().layer(origin());
    runtime.block_on(async { service.ready().await.unwrap().call(get("/agents/1")).await.unwrap() });
    let request = get("/agents/1");
    let mut response = None;
    let hit = measure(|| response = service.call(request).now_or_never());
    let response = response.unwrap().unwrap();
    assert!(response.headers()["cache-status"].to_str().unwrap().contains("; hit"));
    assert!(hit.count_total <= 5, "{} allocations", hit.count_total);

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
