//! Runs a case against a service behind the cache and its twin without one, and makes a case that fails smaller.

use std::{
    collections::BTreeMap,
    ops::AddAssign,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, UNIX_EPOCH},
};

use futures_util::future::join_all;
use http::{Method, Request, Response};
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use tokio::task::JoinHandle;
use tower::{Layer, ServiceExt, service_fn, util::BoxCloneSyncService};
use tower_cache_aside::{Cache, CacheBuilder, RequestBody};

use super::{
    compare::{Tags, is_good, is_same},
    handler::{OF_READS, handle},
    wire::{Front, Protocol, Reply, Wire, in_process},
    world::{Asked, Body, Shared, World, full, pick},
};

/// What happens in a case.
#[derive(Clone, Debug)]
pub enum Op {
    /// One request after the other.
    Read(Asked),
    Write(Asked),
    /// A read that is under way while others write; its client waits or hangs up.
    Begin(Asked, bool),
    /// A write whose client hangs up after so many turns.
    Leave(Asked, usize),
    /// All at once.
    Burst(Vec<Asked>),
    Pass(Duration),
    /// Each twice, and the second time from the cache.
    Warm(Vec<Asked>),
}

/// On what a case is run.
pub struct Stage<'s> {
    pub protocol: Protocol,
    /// Of these the writes of each are seen by all.
    pub processes: usize,
    /// What store they have, and whether that goes by the test's clock.
    pub store: &'s dyn Fn(CacheBuilder) -> CacheBuilder,
    pub has_clock: bool,
}

impl Stage<'_> {
    pub fn in_process() -> Self {
        Self { protocol: Protocol::InProcess, processes: 1, store: &|builder| builder, has_clock: true }
    }
}

/// What a case was about.
#[derive(Debug, Default)]
pub struct Counts {
    pub reads: u64,
    pub hits: u64,
    pub writes: u64,
    /// Answers that ended too early, without the cache as well.
    pub broken: u64,
    pub parts: u64,
    /// Calls of gRPC from the cache.
    pub calls: u64,
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.reads += other.reads;
        self.hits += other.hits;
        self.writes += other.writes;
        self.broken += other.broken;
        self.parts += other.parts;
        self.calls += other.calls;
    }
}

/// Why a case failed.
#[derive(Debug)]
pub enum Failure {
    /// `build` refuses the mapping.
    Refused(String),
    Differs(String),
}

/// Both twins, and what they were asked so far.
struct Twins<W: World> {
    rows: Shared<W::Rows>,
    caches: Vec<Cache>,
    cached: Vec<Wire>,
    /// The twin without a cache, as clients reach it, and by itself.
    alone: Wire,
    front: Front,
    clock: Arc<AtomicU64>,
    tags: Tags,
    begun: Vec<Begun>,
    counts: Counts,
}

/// A read under way, and what its twin has been answered since.
struct Begun {
    asked: Asked,
    reply: JoinHandle<Reply>,
    may_be: Vec<Reply>,
    hung_up: bool,
    is_over: bool,
}

fn requests_again(body: RequestBody<Body>) -> Body {
    Body::new(body)
}

/// A service: the router that takes prefixes away, the layers below it if there is a cache, and the handlers.
fn front<W: World>(world: &Arc<W>, rows: &Shared<W::Rows>, cache: Option<&Cache>) -> Front {
    let handlers = |mount: &'static str| {
        let (world, rows) = (world.clone(), rows.clone());
        service_fn(move |request: Request<Body>| {
            let (world, rows) = (world.clone(), rows.clone());
            async move { handle(&world, &rows, mount, request).await }
        })
    };
    let below = |mount: &'static str| -> Front {
        let Some(cache) = cache else { return BoxCloneSyncService::new(handlers(mount)) };
        let told = if world.says_mounts() { mount } else { "" };
        let inner = cache.layer().mounted_at(told).request_bodies(requests_again).layer(handlers(mount));
        let layered = cache.invalidate_layer().mounted_at(told).layer(inner);
        BoxCloneSyncService::new(layered.map_response(|response| response.map(Body::new)))
    };
    let mounts: Vec<_> = world.mounts().iter().map(|mount| (*mount, below(mount))).collect();
    let calls: Front = match cache {
        None => BoxCloneSyncService::new(handlers("")),
        Some(cache) => {
            let inner = handlers("").map_request(|request: Request<RequestBody<Body>>| request.map(Body::new));
            let layered = cache.grpc_layer().layer(inner);
            BoxCloneSyncService::new(layered.map_response(|response| response.map(Body::new)))
        }
    };
    BoxCloneSyncService::new(service_fn(move |mut request: Request<Body>| {
        let is_call = request.headers().get("content-type").is_some_and(|kind| kind == "application/grpc");
        let path = request.uri().path().to_owned();
        let below = mounts.iter().find(|(mount, _)| path.starts_with(&format!("{mount}/")) && !is_call);
        let service = if is_call { Some((calls.clone(), "")) } else { below.map(|(m, service)| (service.clone(), *m)) };
        async move {
            let Some((service, mount)) = service else {
                return Ok(Response::builder().status(404).body(full("no such place")).unwrap());
            };
            if !mount.is_empty() {
                *request.uri_mut() = request.uri().to_string().replacen(mount, "", 1).parse().unwrap();
            }
            service.oneshot(request).await
        }
    }))
}

impl<W: World> Twins<W> {
    async fn new(world: &W, stage: &Stage<'_>) -> Result<Self, Failure> {
        let world = &Arc::new(world.clone());
        let (rows, alone_rows) = (Shared::new(world.rows()), Shared::new(world.rows()));
        let clock = Arc::new(AtomicU64::new(1_700_000_000_000));
        let (mut caches, mut cached) = (vec![], vec![]);
        for _ in 0..stage.processes {
            let mut builder = (stage.store)(world.mapping(&rows));
            if stage.has_clock {
                let clock = clock.clone();
                builder = builder.clock(move || UNIX_EPOCH + Duration::from_millis(clock.load(Ordering::SeqCst)));
            }
            let cache = builder.build().map_err(|error| Failure::Refused(error.to_string()))?;
            cached.push(Wire::new(front(world, &rows, Some(&cache)), stage.protocol).await);
            caches.push(cache);
        }
        let front = front(world, &alone_rows, None);
        let alone = Wire::new(front.clone(), stage.protocol).await;
        let (tags, begun, counts) = (Tags::default(), vec![], Counts::default());
        Ok(Self { rows, caches, cached, alone, front, clock, tags, begun, counts })
    }

    fn way(&self, asked: &Asked) -> &Wire {
        &self.cached[asked.via % self.cached.len()]
    }

    /// With the last tag that the client knows, where it asks by that.
    fn filled(&self, asked: &Asked) -> Asked {
        match asked.header("if-none-match") {
            "LAST" => asked.but("if-none-match", &self.tags.last(&asked.target)),
            _ => asked.clone(),
        }
    }

    async fn check(&mut self, asked: &Asked, found: &Reply) -> Result<(), Failure> {
        let quick = |other: &Asked| other.but("x-pause", "");
        let twin = async |other: &Asked| self.alone.send(&quick(other)).await;
        if !is_good(asked, found, twin, &self.tags).await {
            let expected = self.alone.send(&quick(asked)).await;
            return Err(differs(asked, found, &expected));
        }
        self.tags.learn(asked, found);
        self.counts.reads += 1;
        self.counts.hits += u64::from(found.is_hit());
        self.counts.calls += u64::from(found.is_hit() && asked.is_grpc());
        self.counts.broken += u64::from(matches!(found, Reply::Broken));
        self.counts.parts += u64::from(matches!(found, Reply::Whole(whole) if [206, 304].contains(&whole.status)));
        Ok(())
    }

    async fn read(&mut self, asked: &Asked) -> Result<Reply, Failure> {
        let asked = self.filled(asked);
        let found = self.way(&asked).send(&asked).await;
        self.check(&asked, &found).await?;
        Ok(found)
    }

    async fn write(&mut self, asked: &Asked) -> Result<(), Failure> {
        let found = self.way(asked).send(asked).await;
        let expected = self.alone.send(asked).await;
        self.counts.writes += 1;
        if is_same(&found, &expected) { Ok(()) } else { Err(differs(asked, &found, &expected)) }
    }

    async fn step(&mut self, op: &Op) -> Result<(), Failure> {
        match op {
            Op::Read(asked) => _ = self.read(asked).await?,
            Op::Write(asked) => self.write(asked).await?,
            Op::Begin(asked, hung_up) => self.begin(asked, *hung_up).await,
            Op::Leave(asked, turns) => self.leave(asked, *turns).await,
            Op::Burst(all) => {
                let all: Vec<_> = all.iter().map(|asked| self.filled(asked)).collect();
                let replies = join_all(all.iter().map(|asked| self.way(asked).send(asked))).await;
                for (asked, found) in all.iter().zip(replies) {
                    self.check(asked, &found).await?;
                }
            }
            Op::Pass(time) => _ = self.clock.fetch_add(time.as_millis() as u64, Ordering::SeqCst),
            Op::Warm(all) => {
                for asked in all {
                    self.read(asked).await?;
                    let again = self.read(asked).await?;
                    if !again.is_hit() {
                        return Err(Failure::Differs(format!("{asked:?} is not stored: {}", again.cache_status())));
                    }
                }
            }
        }
        for begun in self.begun.iter_mut().filter(|begun| !begun.is_over) {
            begun.may_be.push(in_process(&self.front, &begun.asked.but("x-pause", "")).await);
            begun.is_over = begun.reply.is_finished();
        }
        Ok(())
    }

    async fn begin(&mut self, asked: &Asked, hung_up: bool) {
        let (asked, way) = (self.filled(asked), self.way(asked).clone());
        let may_be = vec![in_process(&self.front, &asked.but("x-pause", "")).await];
        let own = asked.clone();
        let reply = tokio::spawn(async move { way.send(&own).await });
        tokio::task::yield_now().await;
        if hung_up {
            reply.abort();
        }
        self.begun.push(Begun { asked, reply, may_be, hung_up, is_over: hung_up });
    }

    /// Nobody is told that it is done; when it is, it is seen.
    async fn leave(&mut self, asked: &Asked, turns: usize) {
        let (own, way, before) = (asked.clone(), self.way(asked).clone(), self.rows.commits());
        let reply = tokio::spawn(async move { way.send(&own).await });
        for _ in 0..turns {
            tokio::task::yield_now().await;
        }
        reply.abort();
        let _ = reply.await;
        for cache in &self.caches {
            cache.drain(Duration::from_secs(10)).await;
        }
        if self.rows.commits() > before {
            in_process(&self.front, asked).await;
        }
        self.counts.writes += 1;
    }

    /// Those under way have been answered as things were at some time since they began.
    async fn end(&mut self) -> Result<(), Failure> {
        for begun in std::mem::take(&mut self.begun) {
            let Ok(found) = begun.reply.await else { continue };
            let mut is_one = begun.hung_up;
            for expected in &begun.may_be {
                let twin = async |other: &Asked| {
                    if *other == begun.asked { expected.clone() } else { in_process(&self.front, other).await }
                };
                is_one |= is_good(&begun.asked, &found, twin, &self.tags).await;
            }
            if !is_one {
                return Err(differs(&begun.asked, &found, &begun.may_be[0]));
            }
        }
        Ok(())
    }
}

fn differs(asked: &Asked, found: &Reply, expected: &Reply) -> Failure {
    Failure::Differs(format!("{asked:?}\nis answered {found:#?}\nand without the cache {expected:#?}"))
}

pub async fn run<W: World>(world: &W, ops: &[Op], stage: &Stage<'_>) -> Result<Counts, Failure> {
    let mut twins = Twins::new(world, stage).await?;
    for op in ops {
        twins.step(op).await?;
    }
    twins.end().await?;
    for cache in &twins.caches {
        cache.drain(Duration::from_secs(10)).await;
    }
    Ok(twins.counts)
}

// ---- cases -----------------------------------------------------------------------------------------------------------

/// The same but for one thing, by which the answer may differ.
fn like<W: World>(world: &W, asked: &Asked, rng: &mut SmallRng) -> Asked {
    let (name, values): (_, &[&str]) = match rng.random_range(0..8) {
        0 => ("accept-language", &["", "de", "en"]),
        1 => ("accept-encoding", &["", "gzip"]),
        2 => ("x-user", &["", "ada", "grace"]),
        3 => ("x-lang", &["", "de", "en"]),
        4 => ("x-fault", OF_READS),
        5 if !asked.target.starts_with("http:") => ("host", &["acme.example", "a.example", "b.example"]),
        6 => {
            let mount = world.mounts().iter().find(|mount| asked.target.contains(**mount)).copied().unwrap_or("");
            let other = *pick(rng, world.mounts());
            let target = asked.target.replacen(mount, other, usize::from(!mount.is_empty()));
            return Asked { target, ..asked.clone() };
        }
        _ => return asked.clone(),
    };
    let value = *pick(rng, values);
    asked.but(name, value)
}

/// What makes an answer depend on more than how things are when it is made.
const ODD: &[&str] = &["x-fault", "accept-encoding", "if-none-match", "if-modified-since", "range"];

/// What happens to a service: much is asked again, so that it is found.
pub fn ops<W: World>(world: &W, rng: &mut SmallRng, count: usize, stage: &Stage<'_>) -> Vec<Op> {
    let pool: Vec<_> = (0..4).map(|_| world.any_read(rng)).collect();
    let read = |rng: &mut SmallRng| {
        let asked = if rng.random_bool(0.85) { pick(rng, &pool).clone() } else { world.any_read(rng) };
        let asked = if rng.random_bool(0.3) { like(world, &asked, rng) } else { asked };
        Asked { via: rng.random_range(0..8), ..asked }
    };
    let write = |rng: &mut SmallRng| Asked { via: rng.random_range(0..8), ..world.any_write(rng) };
    let in_process = stage.protocol == Protocol::InProcess;
    let op = |rng: &mut SmallRng| match rng.random_range(0..100) {
        0..70 => Op::Read(read(rng)),
        70..86 => Op::Write(write(rng)),
        86..91 if in_process => {
            let mut plain = ODD.iter().fold(read(rng), |asked, name| asked.but(name, ""));
            if plain.method == Method::HEAD {
                plain.method = Method::GET;
            }
            let pause = rng.random_range(1..20).to_string();
            Op::Begin(plain.but("x-pause", &pause), rng.random_bool(0.3))
        }
        91..95 if in_process => Op::Leave(write(rng), rng.random_range(0..8)),
        95..98 => {
            let some: Vec<_> = (0..3).map(|_| read(rng).but("x-pause", "2").but("x-fault", "")).collect();
            Op::Burst((0..24).map(|_| like(world, pick(rng, &some), rng)).collect())
        }
        98 if stage.has_clock => Op::Pass(Duration::from_secs(*pick(rng, &[1, 400, 4_000, 10_000]))),
        _ => Op::Read(read(rng)),
    };
    (0..count).map(|_| op(rng)).collect()
}

/// A case without what it does not need to fail.
pub async fn smaller<W: World>(world: &W, ops: Vec<Op>, stage: &Stage<'_>) -> Vec<Op> {
    let fails = async |ops: &[Op]| matches!(run(world, ops, stage).await, Err(Failure::Differs(_)));
    let mut ops = ops;
    let mut size = ops.len().div_ceil(2);
    while size > 0 {
        let mut at = 0;
        while at < ops.len() {
            let without = [&ops[..at], &ops[ops.len().min(at + size)..]].concat();
            if fails(&without).await {
                ops = without;
            } else {
                at += size;
            }
        }
        size /= 2;
    }
    for at in 0..ops.len() {
        let mut tried = 0;
        while let Some(simpler) = simpler(&ops[at]).into_iter().nth(tried) {
            let mut changed = ops.clone();
            changed[at] = simpler;
            if fails(&changed).await {
                ops = changed;
            } else {
                tried += 1;
            }
        }
    }
    ops
}

/// The same with one thing less.
fn simpler(op: &Op) -> Vec<Op> {
    let less = |asked: &Asked| -> Vec<Asked> {
        let names: BTreeMap<_, _> = asked.headers.iter().filter(|(name, _)| *name != "content-type").cloned().collect();
        let mut less: Vec<_> = names.keys().map(|name| asked.but(name, "")).collect();
        less.extend(asked.target.split_once('?').map(|(path, _)| Asked { target: path.to_owned(), ..asked.clone() }));
        less.extend((asked.method == Method::HEAD).then(|| Asked { method: Method::GET, ..asked.clone() }));
        less
    };
    match op {
        Op::Read(asked) => less(asked).into_iter().map(Op::Read).collect(),
        Op::Write(asked) => less(asked).into_iter().map(Op::Write).collect(),
        Op::Begin(asked, _) => vec![Op::Read(asked.clone())],
        Op::Leave(asked, _) => vec![Op::Write(asked.clone())],
        Op::Burst(all) | Op::Warm(all) if all.len() > 1 => {
            let without = |at: usize| {
                let rest = [&all[..at], &all[at + 1..]].concat();
                if matches!(op, Op::Burst(_)) { Op::Burst(rest) } else { Op::Warm(rest) }
            };
            (0..all.len()).map(without).collect()
        }
        _ => vec![],
    }
}

/// Runs the case of a seed.
pub async fn case<W: World>(world: &W, seed: u64, count: usize, stage: &Stage<'_>) -> Counts {
    tried(world, seed, ops(world, &mut SmallRng::seed_from_u64(seed), count, stage), stage).await
}

/// Runs this; what fails is made small and said.
pub async fn tried<W: World>(world: &W, seed: u64, ops: Vec<Op>, stage: &Stage<'_>) -> Counts {
    let first = match run(world, &ops, stage).await {
        Ok(counts) => return counts,
        Err(Failure::Refused(why)) => panic!("TWIN_SEED={seed} is refused: {why}\n{world:#?}"),
        Err(Failure::Differs(first)) => first,
    };
    let ops = smaller(world, ops, stage).await;
    let why = match run(world, &ops, stage).await {
        Err(Failure::Differs(why)) => why,
        _ => format!("(not again when it is smaller) {first}"),
    };
    panic!("TWIN_SEED={seed} {:?}: {why}\nafter\n{ops:#?}\nof\n{world:#?}", stage.protocol)
}
