//! Regions of several real processes each: the agent service over one database, with a Redis for each region, and everything that
//! may become of the ways, the processes and the servers; seen from outside by the checker of its history.
//!
//! `REGIONS_SECONDS=600 cargo test --all-features --release --test regions_fleet -- --nocapture` goes on for longer. With network
//! namespaces, whose links go down as links do (root, and `iproute2`):
//! `cargo test --all-features --test regions_fleet -- --ignored --nocapture`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/history.rs"]
mod history;
#[path = "support/namespaces.rs"]
mod namespaces;
#[path = "support/proxy.rs"]
mod proxy;
#[path = "support/redis.rs"]
mod redis;
mod support;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use history::{History, Life, Register, count};
use namespaces::Namespace;
use proxy::{Mode, Proxy};
use redis::Redis;
use serde_json::json;
use support::{Http, Reply, Service};
use tempfile::TempDir;
use tokio::time::{sleep, timeout};

/// Types with a `max_lag` are no older than that elsewhere.
const BOUND: Duration = Duration::from_millis(1_500);
const AGENTS: u64 = 8;
/// A write waits for its own region's Redis for seconds, and a database that is locked for ten.
const PATIENCE: Duration = Duration::from_secs(15);
const NAMES: [&str; 3] = ["eu", "us", "asia"];

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// A process of a region.
struct Member {
    life: Arc<Life>,
    http: Http,
    nobody: Http,
    service: Mutex<Service>,
}

impl Member {
    /// `None` where it was being killed; what else is no good answer is noted.
    async fn ask(&self, history: &History, http: &Http, path: &str, body: Option<serde_json::Value>) -> Option<Reply> {
        let (begin, is_write) = (Instant::now(), body.is_some());
        let method = if is_write { http::Method::PUT } else { http::Method::GET };
        let what = format!("{method} {path} at {}", self.life.name);
        match timeout(PATIENCE, http.try_send(method, path, body)).await {
            Ok(Some(reply)) if reply.status.is_success() => {
                history.took(is_write, begin.elapsed());
                return Some(reply);
            }
            Ok(Some(reply)) => history.fail(format!("{what}: {reply:?}")),
            _ if self.life.is_ending() => count(&history.unanswered),
            Ok(None) => history.fail(format!("{what}: the connection failed")),
            Err(_) => history.fail(format!("{what}: no answer within {PATIENCE:?}")),
        }
        None
    }

    /// Whether what another region tells is heard of here: for then nothing bypasses the cache.
    async fn status(&self) -> String {
        let reply = self.http.get("/agents/agent-1").await;
        reply.header("cache-status").to_owned()
    }
}

type Slot = Arc<Mutex<Arc<Member>>>;

/// A region's servers, and where they are.
struct Region {
    redis: Mutex<Redis>,
    namespace: Option<Namespace>,
}

struct World {
    /// They end before their region does.
    slots: Vec<Vec<Slot>>,
    regions: Vec<Region>,
    /// From the first region to the second: the second's server as the first reaches it.
    ways: BTreeMap<(usize, usize), Proxy>,
    max_lag: Option<Duration>,
    database: TempDir,
    history: Arc<History>,
    over: Arc<AtomicBool>,
}

impl World {
    async fn start(regions: Vec<Region>, processes: usize, max_lag: Option<Duration>) -> Self {
        let mut ways = BTreeMap::new();
        let count = regions.len();
        for (from, to) in (0..count).flat_map(|from| (0..count).map(move |to| (from, to))).filter(|(a, b)| a != b) {
            // Over the links of both, where they have any.
            let [near, far] = [from, to].map(|at| regions[at].namespace.as_ref());
            let near = near.map_or("127.0.0.1", |own| &own.gate);
            let (host, port) = {
                let redis = regions[to].redis.lock().unwrap();
                (redis.host.clone(), redis.port)
            };
            let far = far.map_or(host, |other| other.wide.clone());
            ways.insert((from, to), Proxy::between(near, format!("{far}:{port}")).await);
        }
        let (database, history, over) = (TempDir::new().unwrap(), Arc::default(), Arc::default());
        let mut world = Self { slots: vec![], regions, ways, max_lag, database, history, over };
        for region in 0..count {
            let slots = (0..processes).map(|_| Arc::new(Mutex::new(Arc::new(world.member(region)))));
            world.slots.push(slots.collect());
        }
        for slot in world.slots.concat() {
            world.heals(&slot).await;
        }
        world
    }

    fn member(&self, region: usize) -> Member {
        static NUMBER: AtomicU64 = AtomicU64::new(1);
        let name = format!("{} {}", NAMES[region], NUMBER.fetch_add(1, SeqCst));
        let Region { redis, namespace } = &self.regions[region];
        let mut args: Vec<String> = ["--hold-ms", "0", "--seed-agents", &AGENTS.to_string(), "--admin-token", "secret"]
            .map(str::to_owned)
            .to_vec();
        let database = self.database.path().join("agents.db").to_str().unwrap().to_owned();
        args.extend(["--db".into(), database, "--redis".into(), redis.lock().unwrap().url()]);
        args.extend(["--region".into(), NAMES[region].into()]);
        for ((_, to), way) in self.ways.iter().filter(|((from, _), _)| *from == region) {
            args.extend(["--peer".into(), format!("{}={}", NAMES[*to], way.url)]);
        }
        if let Some(max_lag) = self.max_lag {
            args.extend(["--max-lag-ms".into(), max_lag.as_millis().to_string()]);
        }
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let service = match namespace {
            Some(own) => Service::start_within(&own.name, &own.host, &args),
            None => Service::start(&args),
        };
        let (http, nobody) = (Http::new(&service.url, "demo"), Http::anonymous(&service.url));
        let life = Life::of_region(name, Duration::ZERO, (region as u64, BOUND));
        Member { life, http, nobody, service: Mutex::new(service) }
    }

    fn at(&self, region: usize, nth: usize) -> Arc<Member> {
        self.slots[region][nth].lock().unwrap().clone()
    }

    /// Until it hears all others, and answers out of the cache.
    async fn heals(&self, slot: &Slot) {
        let start = Instant::now();
        loop {
            let member = slot.lock().unwrap().clone();
            let status = member.status().await;
            if status.contains("hit") {
                return;
            }
            assert!(start.elapsed() < Duration::from_secs(40), "{} does not heal: {status}", member.life.name);
            sleep(ms(20)).await;
        }
    }

    async fn all_heal(&self) {
        for slot in self.slots.concat() {
            self.heals(&slot).await;
        }
    }

    /// `kill -9`; and another takes its place.
    async fn replace(&self, region: usize, nth: usize) {
        let old = self.at(region, nth);
        old.life.end();
        old.service.lock().unwrap().signal("-9");
        self.history.lost.fetch_add(old.life.forget() as u64, SeqCst);
        // Its neighbour takes over what it did for the region, before there is another.
        sleep(ms(500)).await;
        *self.slots[region][nth].lock().unwrap() = Arc::new(self.member(region));
        self.heals(&self.slots[region][nth]).await;
    }

    fn cut(&self, mode: Mode, is: impl Fn(usize, usize) -> bool) {
        self.ways.iter().filter(|((from, to), _)| is(*from, *to)).for_each(|(_, way)| way.set(mode));
    }

    /// Reads, writes and looks everywhere, while this goes on.
    async fn during(&self, what: impl Future<Output = ()>) {
        let registers: Arc<Vec<Register>> = Arc::new((0..AGENTS * 2).map(|_| Register::default()).collect());
        let mut tasks = vec![];
        for slot in self.slots.concat() {
            for nth in 0..3 {
                let client = Client {
                    slot: slot.clone(),
                    history: self.history.clone(),
                    registers: registers.clone(),
                    over: self.over.clone(),
                };
                tasks.push(tokio::spawn(async move {
                    match nth {
                        0 => client.writes().await,
                        1 => client.reads().await,
                        _ => client.looks().await,
                    }
                }));
            }
        }
        what.await;
        self.over.store(true, SeqCst);
        for task in tasks {
            task.await.unwrap();
        }
        println!("{}", self.history.summary());
    }

    /// How often all of the processes that there are have found that something may have been missed.
    async fn gaps(&self, of: usize) -> u64 {
        let mut gaps = 0;
        for slot in self.slots.concat() {
            let member = slot.lock().unwrap().clone();
            let admin = member.nobody.clone().with("authorization", "Bearer secret");
            let stats = admin.get("/_cache/api/stats").await.json();
            gaps += stats["sources"][format!("region {}", NAMES[of])]["gaps"].as_u64().unwrap_or(0);
        }
        gaps
    }
}

/// One who uses whatever process there is in a slot.
struct Client {
    slot: Slot,
    history: Arc<History>,
    registers: Arc<Vec<Register>>,
    over: Arc<AtomicBool>,
}

impl Client {
    fn member(&self) -> Arc<Member> {
        self.slot.lock().unwrap().clone()
    }

    fn pick(&self) -> (String, &Register) {
        let pick = rand::random_range(0..self.registers.len());
        let what = if pick % 2 == 0 { "" } else { "/config" };
        (format!("/agents/agent-{}{what}", pick / 2 + 1), &self.registers[pick])
    }

    async fn reads(&self) {
        while !self.over.load(SeqCst) {
            let (member, (path, register)) = (self.member(), self.pick());
            let (floor, newest) = (register.floor(&member.life), register.newest());
            if let Some(reply) = member.ask(&self.history, &member.http, &path, None).await {
                count(&self.history.reads);
                if reply.is_hit() {
                    count(&self.history.hits);
                }
                let what = || format!("GET {path} at {}: {}", member.life.name, reply.header("cache-status"));
                self.history.read(reply.json()["version"].as_u64().unwrap(), floor, newest, what);
            }
            sleep(ms(rand::random_range(1..4))).await;
        }
    }

    async fn writes(&self) {
        while !self.over.load(SeqCst) {
            sleep(ms(rand::random_range(20..120))).await;
            let (member, (path, register)) = (self.member(), self.pick());
            let body = if path.ends_with("config") { json!({"config": {"x": 1}}) } else { json!({"name": "x"}) };
            if let Some(reply) = member.ask(&self.history, &member.http, &path, Some(body)).await {
                count(&self.history.writes);
                let is_told = !reply.header("cache-invalidated").contains("undelivered=");
                if !is_told {
                    count(&self.history.undelivered);
                }
                register.acknowledge(reply.json()["version"].as_u64().unwrap(), &member.life, is_told);
            }
        }
    }

    /// Whether it has delivered what it could not.
    async fn looks(&self) {
        while !self.over.load(SeqCst) {
            let (member, asked) = (self.member(), Instant::now());
            let health = member.ask(&self.history, &member.nobody, "/healthz", None).await;
            if health.is_some_and(|reply| reply.json()["store"] == "ok") {
                member.life.has_told(asked);
            }
            sleep(ms(50)).await;
        }
    }
}

fn seconds() -> Duration {
    let seconds = std::env::var("REGIONS_SECONDS").map_or(0, |text| text.parse().expect("REGIONS_SECONDS is a number"));
    Duration::from_secs(seconds)
}

fn plain(count: usize) -> Vec<Region> {
    (0..count).map(|_| Region { redis: Mutex::new(Redis::start(&[])), namespace: None }).collect()
}

/// Ways that are gone both ways, a process that follows killed, and a region's Redis lost and back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_older_than_the_bound_in_regions_of_several_processes() {
    let world = World::start(plain(3), 2, Some(BOUND)).await;
    let begin = Instant::now();
    world
        .during(async {
            loop {
                for mode in [Mode::Swallow, Mode::Cut, Mode::Hold] {
                    world.cut(mode, |from, to| from + to == 1);
                    sleep(2 * BOUND).await;
                    for region in [0, 1] {
                        let status = world.at(region, 0).status().await;
                        assert!(status.contains("detail=events-behind"), "{mode:?}: {status}");
                    }
                    world.heals(&world.slots[2][0]).await;
                    world.cut(Mode::Pass, |_, _| true);
                    world.all_heal().await;
                }
                // One of the two follows: each is killed in turn.
                for nth in [0, 1] {
                    world.replace(1, nth).await;
                }
                let before = world.gaps(0).await;
                world.regions[0].redis.lock().unwrap().kill();
                sleep(BOUND).await;
                world.regions[0].redis.lock().unwrap().restart();
                world.all_heal().await;
                assert!(world.gaps(0).await > before, "nobody has noticed that the server has forgotten everything");
                if begin.elapsed() >= seconds() {
                    break;
                }
            }
        })
        .await;
    world.history.assert_good();
    assert!(world.history.hits.load(SeqCst) > 0);
}

/// The same load and checker: where nothing bounds it, a partition is seen.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_bound_a_partition_is_found() {
    let world = World::start(plain(2), 2, None).await;
    world
        .during(async {
            world.cut(Mode::Cut, |_, _| true);
            let start = Instant::now();
            while world.history.stale() == 0 {
                assert!(start.elapsed() < Duration::from_secs(60), "nothing is found: the checker is blind");
                sleep(ms(50)).await;
            }
        })
        .await;
}

/// Each region in a network namespace of its own, 40 ms away, and the links go down: nothing is answered, and nothing is reset.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "makes network namespaces: needs root, and iproute2"]
async fn links_that_go_down_make_nothing_older_than_the_bound() {
    let regions = (0..2).map(|nth| {
        let namespace = Namespace::new(nth);
        let redis = Mutex::new(Redis::start_within(&namespace.name, &namespace.host));
        Region { redis, namespace: Some(namespace) }
    });
    let world = World::start(regions.collect(), 2, Some(BOUND)).await;
    world.cut(Mode::Delay(ms(40)), |_, _| true);
    world.all_heal().await;
    println!("from one region to the other and back: {:?}", world.ways[&(0, 1)].ping().await);
    let begin = Instant::now();
    world
        .during(async {
            loop {
                // So far apart nobody bypasses anything.
                sleep(2 * BOUND).await;
                world.all_heal().await;
                for namespace in world.regions.iter().filter_map(|region| region.namespace.as_ref()) {
                    namespace.link("down");
                }
                sleep(3 * BOUND).await;
                for region in [0, 1] {
                    let status = world.at(region, 0).status().await;
                    assert!(status.contains("detail=events-behind"), "{status}");
                }
                for namespace in world.regions.iter().filter_map(|region| region.namespace.as_ref()) {
                    namespace.link("up");
                }
                world.all_heal().await;
                world.replace(1, 0).await;
                if begin.elapsed() >= seconds() {
                    break;
                }
            }
        })
        .await;
    world.history.assert_good();
    assert!(world.history.hits.load(SeqCst) > 0 && world.history.lagged.load(SeqCst) > 0);
}
