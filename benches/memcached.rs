//! What a hit and a miss cost over memcached, beside the same over Redis and beside a bare `mg` of the same entry; each round takes
//! all of them by turns. Medians, and the share of the bare command's rate, as a table.
//!
//! `cargo bench --bench memcached`
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "../tests/support/memcached.rs"]
mod memcached;
#[path = "../tests/support/redis.rs"]
mod redis;
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
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use memcached::Memcached;
use redis::Redis;
use support::{BODY, Never, get};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tower::{Layer, ServiceExt, util::BoxCloneSyncService};
use tower_cache_aside::{
    Cache, CacheBuilder, DataType, Route, Tier, Ttl,
    store::{MemcachedStore, RedisStore},
};

const TASKS: u64 = 64;
const ROUNDS: usize = 9;

type Body = Full<Bytes>;
/// Answers with the `Cache-Status`, when the body has been read.
type Web = BoxCloneSyncService<Request<Body>, String, Never>;

fn is_test() -> bool {
    !std::env::args().any(|arg| arg == "--bench")
}

fn web(builder: CacheBuilder, tier: Tier) -> Web {
    let cache: Cache = builder
        .single_tenant("t")
        .data_type(DataType::new("agent", Ttl::Standard).tier(tier))
        .route(Route::new("/agents/{agent_id}", "agent"))
        .build()
        .unwrap();
    BoxCloneSyncService::new(cache.layer().layer(support::origin()).and_then(read))
}

async fn read<B: http_body::Body<Error: std::fmt::Debug>>(response: Response<B>) -> Result<String, Never> {
    let status = response.headers()["cache-status"].to_str().unwrap().to_owned();
    response.into_body().collect().await.unwrap();
    Ok(status)
}

/// Calls of one kind by all tasks at once, each one after the other; how many a second.
async fn spread<F: Future<Output = ()>>(calls: u64, call: impl Fn(u64) -> F) -> f64 {
    let start = Instant::now();
    let task = async |task: u64| {
        for i in (task..calls).step_by(TASKS as usize) {
            call(i).await;
        }
    };
    join_all((0..TASKS).map(task)).await;
    calls as f64 / start.elapsed().as_secs_f64()
}

/// A connection for each task, a command and its answer at a time.
async fn bare(port: u16, calls: u64, command: &str, ends: &str) -> f64 {
    let start = Instant::now();
    let task = async |task: u64| {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let (mut answer, mut part) = (vec![], [0; 4096]);
        for _ in (task..calls).step_by(TASKS as usize) {
            stream.write_all(command.as_bytes()).await.unwrap();
            answer.clear();
            while !answer.ends_with(ends.as_bytes()) {
                let size = stream.read(&mut part).await.unwrap();
                answer.extend_from_slice(&part[..size]);
            }
        }
    };
    join_all((0..TASKS).map(task)).await;
    calls as f64 / start.elapsed().as_secs_f64()
}

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}

async fn until_hit(web: &Web) {
    while !web.clone().oneshot(get("/agents/1")).await.unwrap().contains("; hit") {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::main]
async fn main() {
    let (memcached, redis) = (Memcached::start(&[]), Redis::start(&[]));
    let long = Duration::from_secs(10);
    let over = |tier: Tier, is_redis: bool| {
        let builder = Cache::builder(format!("{tier:?}").to_lowercase());
        let builder = if is_redis {
            builder.store(RedisStore::builder([redis.url()]).budget(long).build().unwrap())
        } else {
            builder.store(MemcachedStore::builder([memcached.address()]).budget(long).build().unwrap())
        };
        web(builder, tier)
    };
    let kinds = [
        ("memcached, off", over(Tier::Off, false)),
        ("memcached, validated", over(Tier::Validated, false)),
        ("Redis, off", over(Tier::Off, true)),
        ("Redis, validated", over(Tier::Validated, true)),
    ];
    for (_, web) in &kinds {
        until_hit(web).await;
    }
    let find = || memcached.keys().into_iter().find(|key| key.contains(":e:off{"));
    let entry = std::iter::repeat_with(find).flatten().next().unwrap();
    let command = format!("mg {entry} v\r\n");
    let calls = if is_test() { 640 } else { 64_000 };
    let fresh = Arc::new(AtomicU64::new(0));
    let mut rates: Vec<(String, Vec<f64>)> = vec![];
    let mut keep = |name: String, rate: f64| match rates.iter_mut().find(|(known, _)| *known == name) {
        Some((_, all)) => all.push(rate),
        None => rates.push((name, vec![rate])),
    };
    for _ in 0..if is_test() { 1 } else { ROUNDS } {
        keep("a bare mg".to_owned(), bare(memcached.port, calls, &command, "\r\n").await);
        for (name, web) in &kinds {
            let hit = |_| async {
                let status = web.clone().oneshot(get("/agents/1")).await.unwrap();
                assert!(status.contains("; hit"), "{status}");
            };
            keep(format!("a hit: {name}"), spread(calls, hit).await);
        }
        for (name, web) in &kinds {
            let miss = |_| async {
                let path = format!("/agents/new-{}", fresh.fetch_add(1, Ordering::Relaxed));
                web.clone().oneshot(get(&path)).await.unwrap();
            };
            keep(format!("a miss: {name}"), spread(calls / 8, miss).await);
        }
    }
    let beside = median(rates[0].1.clone());
    println!("| {TASKS} tasks, {BODY} B | a second | beside a bare mg |\n| --- | --- | --- |");
    for (name, rates) in rates {
        let rate = median(rates);
        println!("| {name} | {rate:.0} | {:.2} |", rate / beside);
    }
}
