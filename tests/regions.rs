//! Several regions, each with a Redis and a replica of the database of its own: nothing is older than is promised, whatever becomes of
//! the ways between them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/history.rs"]
mod history;
#[path = "support/proxy.rs"]
mod proxy;
#[path = "support/redis.rs"]
mod redis;
mod support;
#[path = "support/web.rs"]
mod web;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use history::{History, Life, Register, count};
use http::Method;
use proxy::{Mode, Proxy};
use redis::Redis;
use serde_json::json;
use support::{Http, Service, until_hit};
use tokio::{sync::Semaphore, time::sleep};
use tower_cache_aside::{
    Cache, CacheBuilder, Config, DataType, Mutation, OnUnreachable, Route, Tier, Ttl,
    store::{Health, RedisStore, Regional, Wait},
};
use web::{Web, ok, with};

/// Those that are read and written at random, and one whose writes take long.
const IDS: u64 = 16;
const SLOW: u64 = IDS;

/// A database that is written in one place, and read from replicas that are behind.
#[derive(Default)]
struct Database([Mutex<Vec<(Instant, u64)>>; IDS as usize + 1]);

impl Database {
    fn write(&self, id: u64) -> u64 {
        let mut versions = self.0[id as usize].lock().unwrap();
        let next = versions.last().map_or(1, |(_, version)| version + 1);
        versions.push((Instant::now(), next));
        let old = versions.len().saturating_sub(10_000);
        versions.drain(..old);
        next
    }

    fn read(&self, id: u64, lag: Duration) -> u64 {
        let now = Instant::now();
        let versions = self.0[id as usize].lock().unwrap();
        versions.iter().rev().find(|(at, _)| *at + lag <= now).map_or(0, |(_, version)| *version)
    }
}

#[derive(Clone)]
struct Terms {
    /// How far each region's replica is behind.
    lags: Vec<Duration>,
    hold: Duration,
    max_lag: Option<Duration>,
    wait: Wait,
    tier: Tier,
    processes: usize,
    fenced: Option<Duration>,
}

impl Default for Terms {
    fn default() -> Self {
        let max_lag = Some(Duration::from_secs(2));
        Self {
            lags: vec![Duration::ZERO; 2],
            hold: Duration::ZERO,
            max_lag,
            wait: Wait::Local,
            tier: Tier::Validated,
            processes: 1,
            fenced: None,
        }
    }
}

/// A process of a region, with a runtime of its own, so that it can be killed.
struct Process {
    web: Web,
    cache: Cache,
    life: Arc<Life>,
    runtime: Mutex<Option<tokio::runtime::Runtime>>,
}

impl Process {
    fn is_well(&self) -> bool {
        self.cache.health() == Health::Ok
    }

    async fn get(&self, id: u64) -> web::Reply {
        self.web.send(with(Method::GET, &format!("/docs/{id}"), &[("x-tenant-id", "acme")])).await
    }

    async fn put(&self, id: u64) -> web::Reply {
        self.web.send(with(Method::PUT, &format!("/docs/{id}"), &[("x-tenant-id", "acme")])).await
    }
}

impl Process {
    fn kill(&self) {
        self.life.end();
        self.runtime.lock().unwrap().take().into_iter().for_each(tokio::runtime::Runtime::shutdown_background);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A place for a process, which others may take when it was killed.
type Slot = Arc<Mutex<Arc<Process>>>;

struct World {
    terms: Terms,
    servers: Vec<Redis>,
    /// From the first region to the second: the second's server as the first reaches it.
    ways: BTreeMap<(usize, usize), Proxy>,
    database: Arc<Database>,
    /// Writes of one document wait for it.
    gate: Arc<Semaphore>,
    slots: Vec<Vec<Slot>>,
}

fn name(region: usize) -> String {
    ["eu", "us", "asia"][region].to_owned()
}

impl World {
    async fn start(terms: Terms) -> Self {
        let regions = terms.lags.len();
        let servers: Vec<_> = (0..regions).map(|_| Redis::start(&[])).collect();
        let mut ways = BTreeMap::new();
        for (from, to) in (0..regions).flat_map(|from| (0..regions).map(move |to| (from, to))).filter(|(a, b)| a != b) {
            ways.insert((from, to), Proxy::start(servers[to].port).await);
        }
        let mut world =
            Self { terms, servers, ways, database: Arc::default(), gate: Arc::new(Semaphore::new(0)), slots: vec![] };
        for region in 0..regions {
            let slot = |_| Arc::new(Mutex::new(Arc::new(world.process(region))));
            let slots = (0..world.terms.processes).map(slot).collect();
            world.slots.push(slots);
        }
        for process in world.all() {
            heals(&process).await;
        }
        world
    }

    fn at(&self, region: usize, nth: usize) -> Arc<Process> {
        self.slots[region][nth].lock().unwrap().clone()
    }

    fn all(&self) -> Vec<Arc<Process>> {
        self.slots.iter().flatten().map(|slot| slot.lock().unwrap().clone()).collect()
    }

    fn process(&self, region: usize) -> Process {
        let Terms { lags, hold, max_lag, wait, tier, .. } = &self.terms;
        let mut regional = Regional::builder(name(region)).hold(*hold).wait(*wait);
        for ((_, to), way) in self.ways.iter().filter(|((from, _), _)| *from == region) {
            regional = regional.peer(name(*to), &way.url);
        }
        let redis = RedisStore::builder([self.servers[region].url()]).settle(Duration::ZERO);
        let redis = redis.budget(Duration::from_secs(2)).invalidate_budget(Duration::from_secs(5));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let within = runtime.enter();
        let mut docs = DataType::new("doc", Ttl::Extended).tier(*tier);
        if let Some(max_lag) = max_lag {
            docs = docs.max_lag(*max_lag);
        }
        let builder = Cache::builder("docs");
        let builder = self.terms.fenced.into_iter().fold(builder, CacheBuilder::fenced);
        let cache = builder
            .tenant_header("x-tenant-id")
            .data_type(docs)
            .route(Route::new("/docs/{doc_id}", "doc"))
            .mutation(Mutation::put("/docs/{doc_id}", "doc"))
            .store(regional.build(redis).unwrap())
            .build()
            .unwrap();
        drop(within);
        let (database, lag, gate) = (self.database.clone(), lags[region], self.gate.clone());
        let web = Web::new(&cache, move |request| {
            let id: u64 = request.uri().path().rsplit('/').next().unwrap().parse().unwrap();
            let (database, is_write, gate) = (database.clone(), request.method() == Method::PUT, gate.clone());
            async move {
                if is_write && id == SLOW {
                    gate.acquire().await.unwrap().forget();
                }
                let version = if is_write { database.write(id) } else { database.read(id, lag) };
                // So that others come in between.
                tokio::task::yield_now().await;
                Ok(ok(version.to_string()))
            }
        });
        // What was acknowledged so long ago in another region is seen here: by its drop, or by the replica.
        let abroad = max_lag.unwrap_or(Duration::from_secs(2)).max(lag);
        let life =
            Life::of_region(format!("{} {}", name(region), cache_number()), Duration::ZERO, (region as u64, abroad));
        Process { web, cache, life, runtime: Mutex::new(Some(runtime)) }
    }

    fn cut(&self, mode: Mode) {
        self.ways.values().for_each(|way| way.set(mode));
    }
}

fn cache_number() -> usize {
    static NUMBER: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    NUMBER.fetch_add(1, SeqCst)
}

async fn heals(process: &Process) {
    let start = Instant::now();
    while !process.is_well() || process.get(0).await.cache_status().contains("bypass") {
        assert!(start.elapsed() < Duration::from_secs(30), "{}: {}", process.life.name, process.cache.health());
        sleep(Duration::from_millis(10)).await;
    }
}

/// Reads and writes everywhere, until it is over.
struct Load {
    history: Arc<History>,
    over: Arc<AtomicBool>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Load {
    /// Written in these regions only: where the database is behind, what its own region reads is old by itself.
    fn start(world: &World, writing: &[usize]) -> Self {
        let (history, over) = (Arc::new(History::default()), Arc::new(AtomicBool::new(false)));
        let registers: Arc<Vec<Register>> = Arc::new((0..IDS).map(|_| Register::default()).collect());
        let mut tasks = vec![];
        for (region, slots) in world.slots.iter().enumerate() {
            for slot in slots {
                for nth in 0..3 {
                    let (slot, history, over) = (slot.clone(), history.clone(), over.clone());
                    let (registers, writes) = (registers.clone(), nth == 0 && writing.contains(&region));
                    tasks.push(tokio::spawn(async move {
                        while !over.load(SeqCst) {
                            let process = slot.lock().unwrap().clone();
                            let id = rand::random_range(0..IDS);
                            let register = &registers[id as usize];
                            if writes {
                                sleep(Duration::from_millis(rand::random_range(1..100))).await;
                                let reply = process.put(id).await;
                                let report = reply.report.as_ref().unwrap();
                                register.acknowledge(
                                    reply.text().parse().unwrap(),
                                    &process.life,
                                    report.undelivered() == 0,
                                );
                                count(&history.writes);
                                continue;
                            }
                            let (floor, newest) = (register.floor(&process.life), register.newest());
                            let reply = process.get(id).await;
                            let what = || format!("{} of {id}: {}", process.life.name, reply.cache_status());
                            history.read(reply.text().parse().unwrap(), floor, newest, what);
                            count(&history.reads);
                            if reply.is_hit() {
                                count(&history.hits);
                            }
                            sleep(Duration::from_millis(1)).await;
                        }
                    }));
                }
            }
        }
        Self { history, over, tasks }
    }

    async fn end(self) -> Arc<History> {
        self.over.store(true, SeqCst);
        for task in self.tasks {
            task.await.unwrap();
        }
        println!("{}", self.history.summary());
        self.history
    }
}

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// Until this process answers this version.
async fn reads(process: &Process, id: u64, version: &str) {
    let start = Instant::now();
    while process.get(id).await.text() != version {
        assert!(start.elapsed() < Duration::from_secs(20), "{} does not hear of it", process.life.name);
        sleep(ms(2)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_written_in_one_region_falls_in_all() {
    for tier in [Tier::Validated, Tier::On] {
        let world = World::start(Terms { lags: vec![Duration::ZERO; 3], tier, processes: 2, ..Terms::default() }).await;
        for (writing, version) in [0, 1, 2, 0].into_iter().zip(1..) {
            for process in world.all() {
                while !process.get(1).await.is_hit() {
                    sleep(ms(1)).await;
                }
            }
            assert_eq!(world.at(writing, 0).put(1).await.text(), version.to_string());
            // A tier that answers on its own has to hear of it first.
            if tier == Tier::Validated {
                assert_eq!(world.at(writing, 1).get(1).await.text().parse(), Ok(version), "in its own region at once");
            }
            for process in world.all() {
                reads(&process, 1, &version.to_string()).await;
            }
        }
        // What is heard is not told again: each drop is in one stream, once.
        let drops = |region: usize| {
            let entries = world.servers[region].command(&["XRANGE", &format!("cas:r:{{{}}}", name(region)), "-", "+"]);
            entries.matches("doc").count()
        };
        let told = [0, 1, 2].map(drops);
        assert!(told[1] > 0 && told[1] == told[2] && told[0] == 2 * told[1], "{told:?}");
    }
}

/// With the same load, lag and checker: a replica that is behind makes a region stale for good where what is dropped is not held.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_replica_has_not_heard_of_is_not_stored() {
    for (hold, is_fresh) in [(ms(400), true), (Duration::ZERO, false)] {
        let world = World::start(Terms {
            lags: vec![Duration::ZERO, ms(300)],
            hold,
            max_lag: Some(ms(1_000)),
            ..Terms::default()
        })
        .await;
        let load = Load::start(&world, &[0]);
        let start = Instant::now();
        sleep(ms(if is_fresh { 6_000 } else { 4_000 })).await;
        while !is_fresh && load.history.stale() == 0 {
            assert!(start.elapsed() < Duration::from_secs(60), "without a hold nothing is found: the checker is blind");
            sleep(ms(50)).await;
        }
        let history = load.end().await;
        if is_fresh {
            history.assert_good();
            assert!(history.hits.load(SeqCst) > 0);
        }
    }
}

/// Ways between the regions that are gone for longer than the bound, in every way that ways can be gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partition_makes_nothing_older_than_the_bound() {
    let bound = ms(1_500);
    for (max_lag, is_bounded) in [(Some(bound), true), (None, false)] {
        let world = World::start(Terms { max_lag, ..Terms::default() }).await;
        let load = Load::start(&world, &[0, 1]);
        let modes: &[Mode] = if is_bounded { &[Mode::Swallow, Mode::Cut, Mode::Hold] } else { &[Mode::Cut] };
        if is_bounded {
            // As far as from one continent to another: nobody bypasses anything for that.
            world.cut(Mode::Delay(ms(40)));
            for process in world.all() {
                heals(&process).await;
            }
            sleep(bound).await;
            assert!(!world.at(1, 0).get(0).await.cache_status().contains("bypass"));
        }
        for mode in modes {
            world.cut(*mode);
            sleep(2 * bound).await;
            if is_bounded {
                let status = world.at(1, 0).get(0).await;
                assert_eq!(status.cache_status(), "fwd=bypass; detail=events-behind", "{mode:?}");
            }
            let start = Instant::now();
            while !is_bounded && load.history.stale() == 0 {
                assert!(
                    start.elapsed() < Duration::from_secs(60),
                    "without a bound nothing is found: the checker is blind"
                );
                sleep(ms(50)).await;
            }
            world.cut(Mode::Pass);
            if is_bounded {
                for process in world.all() {
                    heals(&process).await;
                }
            }
        }
        let history = load.end().await;
        if is_bounded {
            history.assert_good();
            assert!(history.hits.load(SeqCst) > 0);
        }
    }
}

/// Who follows may be killed, and a region's Redis be lost, restarted, or flushed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_is_lost_nothing_is_older_than_the_bound() {
    let mut world = World::start(Terms { processes: 2, ..Terms::default() }).await;
    let load = Load::start(&world, &[0]);
    for round in 0..3 {
        sleep(ms(500)).await;
        // One of the two follows; each is killed in turn.
        let next = Arc::new(world.process(1));
        heals(&next).await;
        let killed = std::mem::replace(&mut *world.slots[1][round % 2].lock().unwrap(), next);
        killed.kill();
    }
    let gaps = |process: &Process| process.cache.stats().sources["region eu"].gaps;
    for (at, what) in [(0, "FLUSHALL"), (1, "FLUSHALL"), (0, "DEL"), (0, "restart"), (1, "restart")] {
        sleep(ms(300)).await;
        match what {
            "FLUSHALL" => _ = world.servers[at].command(&["FLUSHALL"]),
            "DEL" => _ = world.servers[at].command(&["DEL", "cas:r:{eu}"]),
            _ => world.servers[at].restart(),
        }
        for process in world.all() {
            heals(&process).await;
        }
    }
    load.end().await.assert_good();
    // It was noticed that what the other region had told was gone.
    let noticed = [0, 1].map(|nth| gaps(&world.at(1, nth)));
    assert!(noticed.iter().sum::<u64>() >= 3, "{noticed:?}");
}

/// With `wait = "all"` a write is acknowledged when all regions have dropped it; where one of them is away, a second later.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_may_wait_for_all_regions() {
    let world = World::start(Terms { wait: Wait::All, lags: vec![Duration::ZERO; 3], ..Terms::default() }).await;
    for round in 1..100 {
        for process in world.all() {
            while !process.get(2).await.is_hit() {
                sleep(ms(1)).await;
            }
        }
        let version = world.at(round % 3, 0).put(2).await;
        for process in world.all() {
            assert_eq!(process.get(2).await.text(), version.text(), "round {round}: {}", process.life.name);
        }
    }
    world.ways[&(1, 0)].set(Mode::Cut);
    let reply = world.at(0, 0).put(2).await;
    assert_eq!(reply.report.unwrap().undelivered(), 0, "its own region has dropped it");
    reads(&world.at(2, 0), 2, std::str::from_utf8(&reply.body).unwrap()).await;
}

/// A write that is fenced in one region is so in the others, until it is done or its lease ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fence_is_raised_in_all_regions() {
    let world = World::start(Terms { fenced: Some(ms(2_000)), ..Terms::default() }).await;
    let (here, there) = (world.at(0, 0).clone(), world.at(1, 0).clone());
    for is_killed in [false, true] {
        while !there.get(SLOW).await.is_hit() {
            sleep(ms(1)).await;
        }
        let writer = Arc::new(world.process(0));
        let writing = tokio::spawn({
            let writer = writer.clone();
            async move { writer.put(SLOW).await }
        });
        // Nothing is written yet.
        let start = Instant::now();
        while there.get(SLOW).await.is_hit() {
            assert!(start.elapsed() < Duration::from_secs(20), "it was not told of the fence");
            sleep(ms(1)).await;
        }
        for _ in 0..20 {
            assert!(!there.get(SLOW).await.is_hit());
        }
        if is_killed {
            writing.abort();
            let _ = writing.await;
            drop(writer);
        } else {
            world.gate.add_permits(1);
            writing.await.unwrap();
        }
        while !there.get(SLOW).await.is_hit() || !here.get(SLOW).await.is_hit() {
            assert!(start.elapsed() < Duration::from_secs(20), "the fence stands for ever");
            sleep(ms(1)).await;
        }
    }
}

/// What is held for a replica does not fall with what this region writes, though that is not fenced.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_held_stands() {
    // As long as a gap is held, with which each region begins.
    let world = World::start(Terms { hold: Duration::from_secs(5), ..Terms::default() }).await;
    let (here, there) = (&world.at(0, 0), &world.at(1, 0));
    while !there.get(1).await.is_hit() {
        sleep(ms(1)).await;
    }
    here.put(1).await;
    reads(there, 1, "1").await;
    there.put(1).await;
    for _ in 0..20 {
        assert!(!there.get(1).await.is_hit(), "what is held has fallen with a write of this region");
    }
}

#[test]
fn mistakes_are_found_when_the_store_is_built() {
    let redis = || RedisStore::builder(["redis://localhost"]);
    let cases = [
        (Regional::builder("eu"), redis(), "region `eu`: it has no peer"),
        (Regional::builder("eu").peer("eu", "redis://a"), redis(), "region `eu`: it is its own peer"),
        (Regional::builder("eu").peer("u{s}", "redis://a"), redis(), "region `eu`: `u{s}` is no name"),
        (Regional::builder("").peer("us", "redis://a"), redis(), "`` is no name of a region"),
        (Regional::builder("eu").peer("us", "http://a"), redis(), "region `us`: Redis address"),
        (Regional::builder("eu").peer("us", "redis+cluster://a:1"), redis(), "region `us`: stream"),
        (
            Regional::builder("eu").peer("us", "redis://a"),
            RedisStore::builder(["redis+cluster://a:1"]),
            "region `eu`: what it drops",
        ),
        (Regional::builder("eu").peer("us", "redis://a").hold(Duration::from_secs(100_000)), redis(), "hold"),
    ];
    for (regional, redis, says) in cases {
        let error = regional.build(redis).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    let of_file = |text: &str| {
        let config = Config::from_toml(text)?;
        Cache::builder("docs").config(config).on_unreachable(OnUnreachable::Journal).build()
    };
    let regions = "[regions]\nname = 'eu'\nhold = '2s'\nwait = 'all'\npeers = { us = 'redis://us' }\n";
    assert!(of_file(&format!("[redis]\nurls = ['redis://localhost']\n{regions}")).is_ok());
    assert!(of_file(regions).unwrap_err().to_string().contains("`[regions]` needs this region's own Redis"));
    assert!(of_file("[regions]\nname = 'eu'\nclock = 'mine'").unwrap_err().to_string().contains("clock"));
}

/// What is worse comes first.
#[tokio::test]
async fn a_region_that_is_not_heard_is_told() {
    let mut redis = Redis::start(&[]);
    let regional = Regional::builder("eu").peer("us", "redis://127.0.0.1:1");
    let store = regional.build(RedisStore::builder([redis.url()]).settle(Duration::ZERO)).unwrap();
    let cache = Cache::builder("docs").store(store).on_unreachable(OnUnreachable::Journal).build().unwrap();
    let until = async |says: &str| {
        let start = Instant::now();
        while !cache.health().to_string().contains(says) {
            assert!(start.elapsed() < Duration::from_secs(60), "{} is not {says}", cache.health());
            sleep(ms(10)).await;
        }
    };
    until("degraded: region `us` is not heard").await;
    redis.kill();
    until("down").await;
    redis.restart();
    until("degraded: region `us` is not heard").await;
}

/// The agent service, in two regions over one database.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_agent_service_has_regions() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("agents.db");
    let servers = [Redis::start(&[]), Redis::start(&[])];
    let serve = |region: usize| {
        let (own, peer) = (servers[region].url(), format!("{}={}", name(1 - region), servers[1 - region].url()));
        let args = ["--db", file.to_str().unwrap(), "--redis", &own, "--region", &name(region), "--peer", &peer];
        Service::start(&[&args[..], &["--hold-ms", "0", "--max-lag-ms", "5000", "--admin-token", "secret"]].concat())
    };
    let services = [serve(0), serve(1)];
    let [eu, us] = services.each_ref().map(|service| Http::new(&service.url, "demo"));
    for round in 2..6 {
        until_hit(&eu, "/agents/agent-1").await;
        until_hit(&us, "/agents/agent-1").await;
        let writer = if round % 2 == 0 { &eu } else { &us };
        writer.put("/agents/agent-1", json!({"name": "x"})).await;
        for client in [&eu, &us] {
            let start = Instant::now();
            while client.get("/agents/agent-1").await.json()["version"] != round {
                assert!(start.elapsed() < Duration::from_secs(20), "round {round}");
                sleep(ms(5)).await;
            }
        }
    }
    let admin = Http::anonymous(&services[0].url).with("authorization", "Bearer secret");
    let stats = admin.get("/_cache/api/stats").await.json();
    assert!(stats["sources"]["region us"]["behind_ms"].is_u64(), "{stats}");
}
