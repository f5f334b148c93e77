//! The service that is measured: 20 routes, a tenant header, responses of 1 KiB and 8 headers.
#![allow(dead_code, clippy::unwrap_used)]

use std::{convert::Infallible, sync::LazyLock};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response};
use http_body_util::Full;
use tower::{Service, service_fn};
use tower_cache_aside::{Cache, CacheBuilder, DataType, Mutation, Route, Tier, Ttl};

pub const BODY: usize = 1_024;
pub const TENANT: &str = "x-tenant-id";

/// Twenty paths, of which the first is the one that is asked for.
pub const PATHS: [&str; 20] = [
    "/agents/{agent_id}",
    "/agents",
    "/agents/{agent_id}/config",
    "/agents/{agent_id}/tools",
    "/agents/{agent_id}/executions/{execution_id}",
    "/agents/{agent_id}/conversations",
    "/agents/{agent_id}/conversations/{conversation_id}",
    "/conversations/{conversation_id}",
    "/conversations/{conversation_id}/memory",
    "/conversations/{conversation_id}/messages",
    "/conversations/{conversation_id}/messages/{message_id}",
    "/collections/{collection_id}",
    "/collections/{collection_id}/documents/{document_id}",
    "/users/{user_id}",
    "/users/{user_id}/settings",
    "/orders/{order_id}",
    "/orders/{order_id}/items/{item_id}",
    "/search",
    "/reports/{report_id}",
    "/reports/{report_id}/pages/{page_id}",
];

/// In this process alone.
pub fn builder() -> CacheBuilder {
    mapping(|data_type| data_type)
}

/// Over a shared store.
pub fn tiered(tier: Tier) -> CacheBuilder {
    mapping(|data_type| data_type.tier(tier))
}

fn mapping(more: impl Fn(DataType) -> DataType) -> CacheBuilder {
    let builder = PATHS.iter().enumerate().fold(Cache::builder("bench").tenant_header(TENANT), |b, (i, path)| {
        let data_type = format!("type-{i}");
        b.data_type(more(DataType::new(data_type.clone(), Ttl::Standard))).route(Route::new(*path, data_type))
    });
    builder.mutation(Mutation::put("/agents/{agent_id}", "type-0"))
}

pub fn headers() -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in [
        ("content-type", "application/json"),
        ("content-length", "1024"),
        ("x-served-by", "bench-17"),
        ("etag", "\"33a64df551425fcc55e4d42a148795d9f25f89d4\""),
        ("x-request-id", "0b7c9c3e-5f0a-4f7a-9d3c-0d7d2f1c8a11"),
        ("server", "bench"),
        ("x-version", "17"),
        ("last-modified", "Mon, 23 Nov 2026 11:00:00 GMT"),
    ] {
        headers.insert(HeaderName::from_static(name), HeaderValue::from_static(value));
    }
    headers
}

/// Bytes that no compression shrinks.
pub fn noise(size: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    std::iter::repeat_with(next).take(size).collect()
}

pub static NOISE: LazyLock<Vec<u8>> = LazyLock::new(|| noise(BODY));

pub fn response() -> Response<Full<Bytes>> {
    // As handlers make it: on the heap, and new each time.
    let mut response = Response::new(Full::new(Bytes::copy_from_slice(&NOISE)));
    *response.headers_mut() = headers();
    response
}

pub type Never = Infallible;

/// The inner service: answers at once.
pub fn origin()
-> impl Service<Request<Full<Bytes>>, Response = Response<Full<Bytes>>, Error = Never, Future: Send> + Clone + Send {
    service_fn(|_: Request<Full<Bytes>>| async { Ok::<_, Never>(response()) })
}

/// The same with bodies of so many bytes.
pub fn sized(
    size: usize,
) -> impl Service<Request<Full<Bytes>>, Response = Response<Full<Bytes>>, Error = Never, Future: Send> + Clone + Send {
    let body = Bytes::from(noise(size));
    service_fn(move |_: Request<Full<Bytes>>| {
        let mut response = Response::new(Full::new(Bytes::copy_from_slice(&body)));
        *response.headers_mut() = headers();
        response.headers_mut().insert("content-length", size.into());
        async { Ok::<_, Never>(response) }
    })
}

pub fn get(path: &str) -> Request<Full<Bytes>> {
    Request::builder()
        .method(Method::GET)
        .uri(path)
        .header(TENANT, "tenant-17")
        .header("accept", "application/json")
        .header("user-agent", "bench/1.0")
        .body(Full::default())
        .unwrap()
}

/// Servers put something into the extensions of every request, which have room for those of its response then.
pub fn served(path: &str) -> Request<Full<Bytes>> {
    let mut request = get(path);
    request.extensions_mut().insert(1_u8);
    request
}
