//! Strangers who ask for ever new things: ids, queries, headers, hosts, tenants, methods and spellings.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use rand::{RngExt, SeedableRng, rngs::SmallRng};

pub struct Stranger {
    client: Client<HttpConnector, Full<Bytes>>,
    rng: SmallRng,
}

impl Stranger {
    pub fn new(seed: u64) -> Self {
        let client = Client::builder(TokioExecutor::new()).build_http();
        Self { client, rng: SmallRng::seed_from_u64(seed) }
    }

    /// `None` if nobody answers.
    pub async fn ask(&mut self, url: &str) -> Option<StatusCode> {
        let response = self.client.request(strange(&mut self.rng, url)).await.ok()?;
        let status = response.status();
        response.into_body().collect().await.ok()?;
        Some(status)
    }
}

fn text(rng: &mut SmallRng, most: usize) -> String {
    (0..rng.random_range(1..=most)).map(|_| char::from(rng.random_range(b'a'..=b'z'))).collect()
}

/// A request that nobody has made before.
fn strange(rng: &mut SmallRng, url: &str) -> Request<Full<Bytes>> {
    let id = text(rng, 40);
    let path = match rng.random_range(0..9) {
        0 => format!("/agents/{id}"),
        1 => format!("/agents/{id}/config"),
        2 => format!("/agents/{id}/conversations/{}", text(rng, 300)),
        3 => format!("/conversations/{id}/messages"),
        4 => format!("/collections/%{:02x}{id}", rng.random_range(33..126)),
        5 => format!("/{id}/{}", text(rng, 20)),
        6 => format!("/conversations/{id}/memory"),
        7 => format!("/agents?limit={}&offset={}", rng.random_range(0..1_000_000), rng.random_range(0..1_000_000)),
        _ => "/agents".to_owned(),
    };
    let query: Vec<_> = (0..rng.random_range(0..4)).map(|_| format!("{}={}", text(rng, 9), text(rng, 2_000))).collect();
    let between = if path.contains('?') { '&' } else { '?' };
    let method = match rng.random_range(0..40) {
        0 => Method::PUT,
        1 => Method::DELETE,
        2 => Method::POST,
        3 => Method::HEAD,
        4 => Method::from_bytes(text(rng, 12).to_ascii_uppercase().as_bytes()).unwrap(),
        _ => Method::GET,
    };
    let mut request = Request::builder().method(method).uri(format!("{url}{path}{between}{}", query.join("&")));
    request = request.header("host", format!("{}.example", text(rng, 60)));
    request = request.header("x-tenant-id", if rng.random_bool(0.5) { "demo".to_owned() } else { text(rng, 30) });
    for _ in 0..rng.random_range(0..6) {
        let name =
            ["accept-language", "accept-encoding", "if-none-match", "range", "x-api-key", "cookie", "cache-control"]
                [rng.random_range(0..7)];
        request = request.header(name, text(rng, 400));
    }
    request = request.header(format!("x-{}", text(rng, 20)), text(rng, 200));
    request.body(Full::default()).unwrap()
}
