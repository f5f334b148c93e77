//! Strangers who ask for ever new things take no more memory than is configured: ids, queries, headers, hosts, tenants,
//! methods and spellings, against the agent service as a process. `FLOOD_SECONDS` says for how long (by default 25 each):
//! an hour by hand is `FLOOD_SECONDS=3600 cargo test --all-features --release --test flood -- --nocapture`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

#[path = "support/redis.rs"]
mod redis;
#[path = "support/strangers.rs"]
mod strangers;
#[path = "support/mod.rs"]
mod support;
#[path = "support/vitals.rs"]
mod vitals;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use strangers::Stranger;
use support::{Http, Service};
use vitals::resident;

/// What the process takes at the beginning, half-way and at the end, and how many requests that were.
async fn flood(service: &Service, seed: u64) -> ([u64; 3], u64) {
    let seconds: u64 = std::env::var("FLOOD_SECONDS").map_or(25, |seconds| seconds.parse().unwrap());
    let half = Duration::from_secs(seconds) / 2;
    let count = Arc::new(AtomicU64::new(0));
    let mut sizes = [resident(service.pid()), 0, 0];
    for (round, size) in sizes[1..].iter_mut().enumerate() {
        let start = Instant::now();
        let strangers = (0..8).map(|nth| {
            let (count, url) = (count.clone(), service.url.clone());
            let mut stranger = Stranger::new(seed + (8 * round + nth) as u64);
            tokio::spawn(async move {
                while start.elapsed() < half {
                    stranger.ask(&url).await.unwrap();
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
