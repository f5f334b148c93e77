//! Strangers who ask for ever new things take no more memory than is configured: ids, queries, headers, hosts, tenants,
//! methods and spellings, against the agent service as a process. `FLOOD_SECONDS` says for how long (by default 25 each):
//! an hour by hand is `FLOOD_SECONDS=3600 cargo test --all-features --release --test flood -- --nocapture`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

#[path = "support/redis.rs"]
mod redis;
#[path = "support/mod.rs"]
mod support;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::future::join_all;
use http::{Method, Request};
use http_body_util::{BodyExt, Full};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use support::{Http, Service};

/// What the process holds in memory, in MiB.
fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() >> 10
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

/// What the process takes at the beginning, half-way and at the end, and how many requests that were.
async fn flood(service: &Service, seed: u64) -> ([u64; 3], u64) {
    let seconds: u64 = std::env::var("FLOOD_SECONDS").map_or(25, |seconds| seconds.parse().unwrap());
    let half = Duration::from_secs(seconds) / 2;
    let client = Client::builder(TokioExecutor::new()).build_http::<Full<Bytes>>();
    let count = Arc::new(AtomicU64::new(0));
    let mut sizes = [resident(service.pid()), 0, 0];
    let mut rng = SmallRng::seed_from_u64(seed);
    for size in &mut sizes[1..] {
        let start = Instant::now();
        let strangers = (0..8).map(|_| {
            let (client, count, url) = (client.clone(), count.clone(), service.url.clone());
            let mut rng = SmallRng::from_rng(&mut rng);
            tokio::spawn(async move {
                while start.elapsed() < half {
                    let response = client.request(strange(&mut rng, &url)).await.unwrap();
                    response.into_body().collect().await.unwrap();
                    count.fetch_add(1, Ordering::Relaxed);
                }
            })
        });
        join_all(strangers).await.into_iter().for_each(|ended| ended.unwrap());
        *size = resident(service.pid());
    }
    (sizes, count.load(Ordering::Relaxed))
}

/// Everything that its answers could depend on tells them apart, and 8 MiB are all that there is.
fn config(memory: &str) -> tempfile::NamedTempFile {
    let built_in = include_str!("../examples/agent_service/agents.toml");
    let file = tempfile::NamedTempFile::new().unwrap();
    let text = built_in.replace("hosts = \"any\"", &format!("hosts = \"each\"\nbody_limit = \"1MiB\"\n{memory}"));
    assert_ne!(text, built_in);
    std::fs::write(file.path(), text).unwrap();
    file
}

async fn takes_no_more(args: &[&str], memory: &str) {
    let config = config(memory);
    let args = [args, &["--config", config.path().to_str().unwrap()]].concat();
    let service = Service::start(&args);
    let demo = Http::new(&service.url, "demo");
    demo.get("/agents").await;
    let ([start, half, end], requests) = flood(&service, 7).await;
    eprintln!("{args:?}: {requests} requests; {start} MiB at the start, {half} half-way, {end} at the end");
    assert!(requests > 1_000, "{requests}");
    // What is configured, and as much for what is under way, for the database and for the allocator.
    assert!(end < start + 96 && end < half + 32, "{start} MiB, {half} MiB, {end} MiB");
    // And it still does what it is for.
    let path = "/agents?limit=5";
    demo.get(path).await;
    assert!(demo.get(path).await.is_hit());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_take_no_more_memory_in_process() {
    takes_no_more(&[], "memory = \"8MiB\"").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_take_no_more_memory_over_redis() {
    let redis = redis::Redis::start(&["--maxmemory", "32mb", "--maxmemory-policy", "allkeys-lru"]);
    takes_no_more(&["--redis", &redis.url(), "--l1", "on"], "").await;
}
