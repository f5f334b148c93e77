//! Beside tower-http's layers, in the order that the docs recommend and in others that must be harmless.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    http::{HeaderMap, Method, Request, StatusCode, header},
    routing::get,
};
use http_body_util::BodyExt;
use tower::{ServiceBuilder, ServiceExt};
use tower_cache_aside::{Cache, DataType, Mutation, Route, Ttl};
use tower_http::{
    compression::CompressionLayer,
    cors::{Any, CorsLayer},
    request_id::{MakeRequestUuid, PropagateRequestIdLayer, SetRequestIdLayer},
    timeout::TimeoutLayer,
    trace::TraceLayer,
};

fn cache() -> Cache {
    let builder = Cache::builder("test").single_tenant("t").data_type(DataType::new("page", Ttl::Standard));
    let builder = builder.route(Route::new("/pages/{page_id}", "page"));
    builder.mutation(Mutation::put("/pages/{page_id}", "page")).build().unwrap()
}

/// Pages of 10 kB, each call with its number; slow if asked to be.
fn pages(calls: &Arc<AtomicU64>) -> Router {
    let calls = calls.clone();
    let read = move |headers: HeaderMap| {
        let n = calls.fetch_add(1, Ordering::SeqCst);
        async move {
            if headers.contains_key("x-slow") {
                tokio::time::sleep(Duration::from_millis(300)).await;
            }
            format!("{n} {}", "text ".repeat(2_000))
        }
    };
    Router::new().route("/pages/{id}", get(read).put(async || "written"))
}

struct Reply {
    status: StatusCode,
    headers: HeaderMap,
    body: Vec<u8>,
}

impl Reply {
    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |v| v.to_str().unwrap())
    }

    fn is_hit(&self) -> bool {
        self.header("cache-status").contains("; hit")
    }
}

async fn send(app: &Router, method: Method, headers: &[(&str, &str)]) -> Reply {
    let mut request = Request::builder().method(method).uri("/pages/1");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let response = app.clone().oneshot(request.body(Body::empty()).unwrap()).await.unwrap();
    let (parts, body) = response.into_parts();
    Reply { status: parts.status, headers: parts.headers, body: body.collect().await.unwrap().to_bytes().to_vec() }
}

/// Outside the cache, one entry serves every encoding; inside, each encoding has its own. Neither mixes them up.
#[tokio::test]
async fn compression_outside_and_inside() {
    for (outside, expected_calls) in [(true, 1), (false, 2)] {
        let (cache, calls) = (cache(), Arc::default());
        let app = pages(&calls);
        let app = match outside {
            true => app.layer(cache.layer()).layer(CompressionLayer::new()),
            false => app.layer(CompressionLayer::new()).layer(cache.layer()),
        };
        for _ in 0..3 {
            let gzip = send(&app, Method::GET, &[("accept-encoding", "gzip")]).await;
            assert_eq!(gzip.header("content-encoding"), "gzip");
            assert!(gzip.body.len() < 1_000);
            let plain = send(&app, Method::GET, &[]).await;
            assert_eq!((plain.header("content-encoding"), plain.body.len() > 10_000), ("", true), "outside: {outside}");
        }
        assert_eq!(calls.load(Ordering::SeqCst), expected_calls, "outside: {outside}");
    }
}

/// The order that the docs recommend.
#[tokio::test]
async fn the_recommended_stack() {
    let (cache, calls) = (cache(), Arc::default());
    let stack = ServiceBuilder::new()
        .layer(SetRequestIdLayer::x_request_id(MakeRequestUuid))
        .layer(TraceLayer::new_for_http())
        .layer(PropagateRequestIdLayer::x_request_id())
        .layer(CorsLayer::new().allow_origin(Any))
        .layer(CompressionLayer::new())
        .layer(TimeoutLayer::with_status_code(StatusCode::GATEWAY_TIMEOUT, Duration::from_secs(10)))
        .layer(cache.invalidate_layer())
        .layer(cache.layer());
    let app = pages(&calls).layer(stack);
    let mut ids = vec![];
    for i in 0..3 {
        let reply = send(&app, Method::GET, &[("origin", "https://a.example")]).await;
        assert_eq!((reply.is_hit(), reply.header("access-control-allow-origin")), (i > 0, "*"));
        ids.push(reply.header("x-request-id").to_owned());
    }
    ids.dedup();
    assert_eq!(ids.len(), 3, "each request has its own id, hits as well");
    send(&app, Method::PUT, &[]).await;
    assert!(!send(&app, Method::GET, &[]).await.is_hit());
}

/// The client of a time-out outside gets it; the call goes on, and its response is there for the next.
#[tokio::test]
async fn a_timeout_outside_loses_nothing() {
    let (cache, calls) = (cache(), Arc::default());
    let timeout = TimeoutLayer::with_status_code(StatusCode::GATEWAY_TIMEOUT, Duration::from_millis(50));
    let app = pages(&calls).layer(cache.layer()).layer(timeout);
    assert_eq!(send(&app, Method::GET, &[("x-slow", "1")]).await.status, 504);
    while !send(&app, Method::GET, &[]).await.is_hit() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(calls.load(Ordering::SeqCst), 1);
}

/// What is inside the cache is part of what is stored: a request id or an origin of another must not be.
#[tokio::test]
async fn cors_inside_varies_by_origin() {
    let (cache, calls) = (cache(), Arc::default());
    let allowed = ["https://a.example", "https://b.example"];
    let cors = CorsLayer::new().allow_origin(allowed.map(|origin| origin.parse().unwrap()));
    let app = pages(&calls).layer(cors).layer(cache.layer());
    for origin in allowed.into_iter().chain(allowed) {
        let reply = send(&app, Method::GET, &[("origin", origin)]).await;
        assert_eq!(reply.header(header::ACCESS_CONTROL_ALLOW_ORIGIN.as_str()), origin);
    }
    assert_eq!(calls.load(Ordering::SeqCst), 2);
    let preflight =
        send(&app, Method::OPTIONS, &[("origin", allowed[0]), ("access-control-request-method", "GET")]).await;
    assert_eq!(preflight.status, 200);
}
