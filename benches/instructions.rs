//! What callgrind counts: the instructions of a call, which do not depend on how busy a machine is. It is run by
//! `bash .ci/instructions`, a case at a time; each prints how many calls were counted.
//!
//! Only what runs within `measured`, and not within `played`, is counted. All is on one thread, and no time passes.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "../tests/support/redis.rs"]
mod redis;
mod support;

use std::{
    io::{self, Read, Write},
    net::TcpStream,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use support::{Never, origin, served};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
    runtime::Runtime,
};
use tower::{Layer, Service};
use tower_cache_aside::{Tier, store::RedisStore, testing::Clock};

const CALLS: usize = 1_000;
/// So few that what the allocator keeps at hand is enough for them, as it is where requests come one by one.
const BATCH: usize = 4;
/// So many ask at once, where many do.
const TASKS: usize = 64;
/// What the first calls make is then there.
const BEFORE: usize = 200;

fn main() {
    let case = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    let _entered = runtime.enter();
    match case.as_deref() {
        Some("alone") => run(&runtime, origin(), "/healthz", |_| true),
        Some("pass-through") => run(&runtime, in_process(), "/healthz", |_| true),
        Some("hit") => run(&runtime, in_process(), "/agents/4711", is_hit),
        Some("cold") => cold(&runtime),
        Some("redis-off") => in_redis(&runtime, Tier::Off),
        Some("redis-validated") => in_redis(&runtime, Tier::Validated),
        Some("redis-miss") => miss_in_redis(&runtime),
        Some("many-off") => many_in_redis(&runtime, Tier::Off),
        Some("many-validated") => many_in_redis(&runtime, Tier::Validated),
        _ => eprintln!("run by: bash .ci/instructions"),
    }
}

#[inline(never)]
fn measured<T>(run: impl FnOnce() -> T) -> T {
    // Not the last call, or it might be a jump, and callgrind would not see its end.
    std::hint::black_box(run())
}

fn is_hit<B>(response: &Response<B>) -> bool {
    response.headers()["cache-status"].to_str().unwrap().contains("; hit")
}

fn in_process() -> impl Service<Request<Full<Bytes>>, Response = Response<impl Send>, Error = Never> {
    let cache = support::builder().clock(Clock::running()).build().unwrap();
    cache.layer().layer(origin())
}

fn warm<S, B>(runtime: &Runtime, service: &mut S, path: &str)
where
    S: Service<Request<Full<Bytes>>, Response = Response<B>, Error = Never>,
{
    runtime.block_on(async {
        for _ in 0..BEFORE {
            let _ = service.call(served(path)).await.unwrap();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
}

fn run<S, B>(runtime: &Runtime, mut service: S, path: &str, is_right: impl Fn(&Response<B>) -> bool)
where
    S: Service<Request<Full<Bytes>>, Response = Response<B>, Error = Never>,
{
    warm(runtime, &mut service, path);
    // Building requests and dropping responses is the affair of others.
    let (mut requests, mut responses) = (Vec::with_capacity(BATCH), Vec::with_capacity(BATCH));
    for _ in 0..CALLS / BATCH {
        requests.extend((0..BATCH).map(|_| served(path)));
        measured(|| {
            runtime.block_on(async {
                for request in requests.drain(..) {
                    responses.push(service.call(request).await.unwrap());
                }
            });
        });
        assert!(responses.iter().all(&is_right), "something else was measured");
        responses.clear();
    }
    println!("{CALLS}");
}

/// Each of more entries than anything is kept ready of.
fn cold(runtime: &Runtime) {
    let mut service = in_process();
    for n in 0..3 * CALLS {
        let request = served(&format!("/agents/{}", n % CALLS));
        let call = || runtime.block_on(async { service.call(request).await.unwrap() });
        let response = if n < 2 * CALLS { call() } else { measured(call) };
        assert!(n < CALLS || is_hit(&response), "something else was measured");
    }
    println!("{CALLS}");
}

fn run_many<S, B>(runtime: &Runtime, service: S, path: &'static str, is_right: impl Fn(&Response<B>) -> bool)
where
    S: Service<Request<Full<Bytes>>, Response = Response<B>, Error = Never, Future: Send> + Clone + Send + 'static,
    B: Send + 'static,
{
    warm(runtime, &mut service.clone(), path);
    let mut responses = Vec::with_capacity(TASKS);
    for round in 0..CALLS / TASKS {
        let mut tasks = Vec::with_capacity(TASKS);
        for _ in 0..TASKS {
            let (mut service, request) = (service.clone(), served(path));
            tasks.push(runtime.spawn(async move { service.call(request).await.unwrap() }));
        }
        let mut all = || {
            runtime.block_on(async {
                for task in tasks.drain(..) {
                    responses.push(task.await.unwrap());
                }
            });
        };
        if round == 0 {
            all()
        } else {
            measured(all)
        }
        assert!(responses.iter().all(&is_right), "something else was measured");
        responses.clear();
    }
    println!("{}", (CALLS / TASKS - 1) * TASKS);
}

fn in_redis(runtime: &Runtime, tier: Tier) {
    let (_server, service) = over_redis(tier);
    run(runtime, service, "/agents/4711", is_hit);
}

/// Until its client has the answer.
fn miss_in_redis(runtime: &Runtime) {
    let (_server, mut service) = over_redis(Tier::Validated);
    for n in 0..BEFORE + CALLS {
        let request = served(&format!("/agents/4711?n={n}"));
        let call = || runtime.block_on(async { service.call(request).await.unwrap() });
        let response = if n < BEFORE { call() } else { measured(call) };
        assert!(!is_hit(&response), "something else was measured");
        drop(response);
        runtime.block_on(tokio::time::sleep(Duration::from_millis(5)));
    }
    println!("{CALLS}");
}

/// Of tasks that ask at once, what they share is shared.
fn many_in_redis(runtime: &Runtime, tier: Tier) {
    let (_server, service) = over_redis(tier);
    run_many(runtime, service, "/agents/4711", is_hit);
}

fn over_redis(
    tier: Tier,
) -> (
    redis::Redis,
    impl Service<Request<Full<Bytes>>, Response = Response<impl Send>, Error = Never, Future: Send> + Clone + Send,
) {
    let server = redis::Redis::start(&[]);
    let port = server.port;
    let connect = move || async move {
        let (ours, theirs) = tokio::io::duplex(1 << 20);
        tokio::spawn(Played(Box::pin(play(theirs, port))));
        Ok(ours)
    };
    let store = RedisStore::builder([server.url()]).connect_by(connect).clock(Clock::running());
    let store = store.budget(Duration::from_secs(10)).build().unwrap();
    let cache = support::tiered(tier).store(store).clock(Clock::running()).build().unwrap();
    (server, cache.layer().layer(origin()))
}

struct Played(Pin<Box<dyn Future<Output = io::Result<()>> + Send>>);

impl Future for Played {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        played(&mut self.0, cx)
    }
}

#[inline(never)]
fn played(server: &mut Pin<Box<dyn Future<Output = io::Result<()>> + Send>>, cx: &mut Context<'_>) -> Poll<()> {
    std::hint::black_box(server.as_mut().poll(cx).map(drop))
}

/// Hands commands to the real server and waits for what it says, with all else standing still: so that everything happens in
/// the same order each time.
async fn play(mut client: DuplexStream, port: u16) -> io::Result<()> {
    let mut server = TcpStream::connect(("127.0.0.1", port))?;
    server.set_nodelay(true)?;
    let (mut asked, mut said, mut part) = (vec![], vec![], [0; 1 << 16]);
    loop {
        if client.read_buf(&mut asked).await? == 0 {
            return Ok(());
        }
        let (mut due, mut taken) = (0, 0);
        while let Some(size) = frame(&asked[taken..]) {
            (due, taken) = (due + 1, taken + size);
        }
        server.write_all(&asked[..taken])?;
        asked.drain(..taken);
        while due > 0 {
            while let Some(size) = frame(&said) {
                // Pushes answer nobody.
                due -= usize::from(said[0] != b'>');
                client.write_all(&said[..size]).await?;
                said.drain(..size);
            }
            if due > 0 {
                let size = server.read(&mut part)?;
                said.extend_from_slice(&part[..size]);
            }
        }
    }
}

/// How long the first value of the protocol is, if all of it is there.
fn frame(bytes: &[u8]) -> Option<usize> {
    let end = bytes.windows(2).position(|pair| pair == b"\r\n")? + 2;
    let count = || std::str::from_utf8(&bytes[1..end - 2]).ok()?.parse::<i64>().ok();
    let values = match bytes[0] {
        b'$' | b'=' | b'!' => {
            let size = usize::try_from(count()?).map_or(end, |size| end + size + 2);
            return (bytes.len() >= size).then_some(size);
        }
        b'*' | b'~' | b'>' => count()?.max(0),
        b'%' | b'|' => 2 * count()?,
        _ => 0,
    };
    let mut size = end;
    for _ in 0..values {
        size += frame(&bytes[size..])?;
    }
    Some(size)
}
