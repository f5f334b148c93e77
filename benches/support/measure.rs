//! What benches measure with: calls in process, and calls over a Redis of their own.
#![allow(dead_code, clippy::unwrap_used)]

#[path = "../../tests/support/redis.rs"]
mod server;

use std::{
    hint::black_box,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::FutureExt;
use http::{Request, Response};
use http_body_util::Full;
use redis::aio::MultiplexedConnection;
use server::Redis;
use tokio::runtime::Runtime;
use tower::Service;
use tower_cache_aside::{Cache, CacheBody, CacheBuilder, Tier, store::RedisStore};

use crate::support::{self, Never, served};

pub type Body = Full<Bytes>;

pub const PATH: &str = "/agents/4711";

pub fn says<B>(response: &Response<B>, what: &str) -> bool {
    response.headers()["cache-status"].to_str().unwrap().contains(what)
}

pub fn nanos(took: Duration, calls: u64) -> f64 {
    took.as_nanos() as f64 / calls as f64
}

pub fn micros(took: Duration, calls: u64) -> f64 {
    nanos(took, calls) / 1e3
}

/// So few that what the allocator keeps at hand is enough for them, as it is where requests come one by one.
pub const BATCH: u64 = 4;

/// Calls in batches whose requests are there before; what one takes, in nanoseconds.
pub fn batches<R>(calls: u64, path: &str, call: impl FnMut(Request<Body>) -> R) -> f64 {
    batches_of(calls, || served(path), call)
}

pub fn batches_of<R>(
    calls: u64,
    mut request: impl FnMut() -> Request<Body>,
    mut call: impl FnMut(Request<Body>) -> R,
) -> f64 {
    let (mut took, mut batch) = (Duration::ZERO, Vec::with_capacity(BATCH as usize));
    let batches = calls.div_ceil(BATCH);
    for _ in 0..batches {
        batch.extend((0..BATCH).map(|_| request()));
        let start = Instant::now();
        for request in batch.drain(..) {
            black_box(call(request));
        }
        took += start.elapsed();
    }
    nanos(took, batches * BATCH)
}

pub fn at_once<S: Service<Request<Body>, Error = Never>>(service: &mut S, request: Request<Body>) -> S::Response {
    service.call(request).now_or_never().unwrap().unwrap()
}

/// What an entry holds for its reader: key, headers and body.
pub fn own(path: &str) -> f64 {
    let headers: usize = support::headers().iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    (path.len() + "tenant-17".len() + headers + support::BODY) as f64
}

/// The resident bytes of this process.
pub fn resident() -> f64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    statm.split(' ').nth(1).and_then(|pages| pages.parse::<f64>().ok()).unwrap_or(f64::NAN) * 4_096.0
}

fn multi_thread(workers: usize) -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(workers).enable_all().build().unwrap()
}

/// The server that is measured, and a bare client of it beside us.
pub struct Shared {
    pub server: Arc<Redis>,
    pub runtime: Runtime,
    pub bare: MultiplexedConnection,
}

impl Shared {
    pub fn start(workers: usize) -> Self {
        Self::start_on(multi_thread(workers))
    }

    pub fn start_on(runtime: Runtime) -> Self {
        Self::of(Redis::start(&[]).into(), runtime)
    }

    /// The same server, asked from another runtime, as another process would.
    pub fn beside(&self, workers: usize) -> Self {
        Self::of(self.server.clone(), multi_thread(workers))
    }

    fn of(server: Arc<Redis>, runtime: Runtime) -> Self {
        let client = redis::Client::open(format!("{}?protocol=resp3", server.url())).unwrap();
        let bare = runtime.block_on(client.get_multiplexed_async_connection()).unwrap();
        Self { server, runtime, bare }
    }

    pub fn cache(&self, tier: Tier) -> Cache {
        self.over(support::tiered(tier), &format!("{tier:?}").to_lowercase())
    }

    pub fn over(&self, builder: CacheBuilder, prefix: &str) -> Cache {
        let _entered = self.runtime.enter();
        let store = RedisStore::builder([self.server.url()]).prefix(prefix).budget(Duration::from_secs(10));
        builder.store(store.build().unwrap()).build().unwrap()
    }

    /// Until it is there, and in process where it may be.
    pub fn until_hit<S>(&self, service: &S)
    where
        S: Service<Request<Body>, Response = Response<CacheBody<Body>>, Error = Never> + Clone,
    {
        self.until_hits(service, PATH);
    }

    pub fn until_hits<S>(&self, service: &S, path: &str)
    where
        S: Service<Request<Body>, Response = Response<CacheBody<Body>>, Error = Never> + Clone,
    {
        self.runtime.block_on(async {
            let (start, mut in_a_row) = (Instant::now(), 0);
            while in_a_row < 100 {
                let is_hit = says(&service.clone().call(served(path)).await.unwrap(), "; hit");
                in_a_row = if is_hit { in_a_row + 1 } else { 0 };
                assert!(start.elapsed() < Duration::from_secs(10), "never stored");
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        });
    }

    /// Divides the calls among tasks, each of which makes its own one after the other; what one takes, in microseconds.
    pub fn spread<F>(&self, tasks: u64, calls: u64, task: impl Fn(u64) -> F) -> f64
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let each = calls.div_ceil(tasks);
        self.runtime.block_on(async {
            let start = Instant::now();
            let all: Vec<_> = (0..tasks).map(|_| tokio::spawn(task(each))).collect();
            for task in all {
                task.await.unwrap();
            }
            micros(start.elapsed(), each * tasks)
        })
    }

    /// What the server has spent on commands since, in microseconds, by `INFO`, which is asked before and after only.
    pub fn spent(&self) -> (f64, f64) {
        let info = self.server.command(&["INFO", "commandstats"]);
        let of = |line: &str| line.split(',').find_map(|field| field.strip_prefix("usec=")?.parse::<f64>().ok());
        let all = info.lines().filter(|line| !line.starts_with("cmdstat_info") && !line.starts_with("cmdstat_client"));
        let reads = info.lines().filter(|line| line.starts_with("cmdstat_mget:"));
        (
            all.filter_map(|line| of(line.split_once(':')?.1)).sum(),
            reads.filter_map(|line| of(line.split_once(':')?.1)).sum(),
        )
    }
}
