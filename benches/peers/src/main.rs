//! A hit and a pass-through of this crate beside its peers: one thread, 1 KiB body, 8 headers, a tenant header, by turns,
//! net of building the request. `cargo run --release --manifest-path benches/peers/Cargo.toml`
#![allow(clippy::unwrap_used)]

use std::{convert::Infallible, hint::black_box, time::{Duration, Instant}};

use axum::body::Body;
use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Request, Response};
use http_body_util::Full;
use tower::{BoxError, Layer, Service, ServiceExt, service_fn, util::BoxCloneService};

type Boxed = BoxCloneService<Request<Body>, (), BoxError>;

const CALLS: u32 = 20_000;

fn request(method: Method, path: &str) -> Request<Body> {
    let request = Request::builder().method(method).uri(path).header("x-tenant-id", "tenant-17");
    request.header("accept", "application/json").header("user-agent", "bench/1.0").body(Body::empty()).unwrap()
}

fn origin<B: Send + 'static, R: From<Vec<u8>> + Send + 'static>()
-> impl Service<Request<B>, Response = Response<R>, Error = Infallible, Future: Send> + Clone + Send + Sync + 'static {
    service_fn(|_: Request<B>| async {
        let mut response = Response::new(R::from(vec![b'x'; 1_024]));
        for i in 0..8 {
            let name = HeaderName::from_bytes(format!("x-header-{i}").as_bytes()).unwrap();
            response.headers_mut().insert(name, HeaderValue::from_static("some value of some length"));
        }
        Ok::<_, Infallible>(response)
    })
}

/// Nothing of the response is kept: reading the body is the client's affair.
fn boxed<S, R>(service: S) -> Boxed
where
    S: Service<Request<Body>, Response = http::Response<R>, Error: Into<BoxError>, Future: Send> + Clone + Send + 'static,
    R: Send + 'static,
{
    BoxCloneService::new(service.map_response(|response| drop(black_box(response))).map_err(Into::into))
}

fn measure(service: &mut Boxed, runtime: &tokio::runtime::Runtime, method: &Method, path: &str) -> Duration {
    let building = Instant::now();
    for _ in 0..CALLS {
        black_box(request(method.clone(), path));
    }
    let building = building.elapsed();
    let start = Instant::now();
    runtime.block_on(async {
        for _ in 0..CALLS {
            let future = service.ready().await.unwrap().call(request(method.clone(), path));
            future.await.unwrap();
        }
    });
    start.elapsed().saturating_sub(building) / CALLS
}

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let ours = tower_cache_aside::Cache::builder("peers")
        .tenant_header("x-tenant-id")
        .data_type(tower_cache_aside::DataType::new("agent", tower_cache_aside::Ttl::Standard))
        .route(tower_cache_aside::Route::new("/agents/{agent_id}", "agent"))
        .build()
        .unwrap();
    let axum_response_cache = axum_response_cache::CacheLayer::with_lifespan(Duration::from_secs(3_600));
    use tower_http_cache::prelude::*;
    let tower_http_cache = CacheLayer::builder(InMemoryBackend::new(10_000)).ttl(Duration::from_secs(3_600)).build();
    // It asks for bodies that are `Sync`, which axum's are not.
    let full = tower_http_cache.layer(origin::<Full<Bytes>, Full<Bytes>>());
    let full = full.map_request(|request: Request<Body>| request.map(|_| Full::default()));
    let mut services: Vec<(&str, Boxed)> = vec![
        ("origin alone", boxed(origin::<Body, Body>())),
        ("tower-cache-aside", boxed(ours.layer().layer(origin::<Body, Body>()))),
        ("axum-response-cache", boxed(axum_response_cache.layer(origin::<Body, Body>()))),
        ("tower-http-cache", boxed(full)),
    ];
    for (what, method, path) in [("hit", Method::GET, "/agents/4711"), ("pass through", Method::POST, "/elsewhere")] {
        let mut rounds = vec![vec![]; services.len()];
        for _ in 0..15 {
            for ((_, service), times) in services.iter_mut().zip(&mut rounds) {
                times.push(measure(service, &runtime, &method, path));
            }
        }
        for ((name, _), mut times) in services.iter().zip(rounds) {
            times.sort();
            println!("{what:13} {name:20} median {:>9.0?}  best {:>9.0?}", times[times.len() / 2], times[0]);
        }
    }
}
