//! Three processes of the agent service on one SQLite file and one Redis, each with another tier, for as long as one likes,
//! with faults all the while: what is answered is what the docs promise, nothing fails, and nothing grows. Strangers flood
//! them meanwhile with ids, queries, hosts and headers.
//!
//! `SOAK_SECONDS` says for how long (by default 20 each); an hour by hand, of the journal's promises or of the fences':
//! `SOAK_SECONDS=3600 cargo test --all-features --release --test soak -- --nocapture faults_are_survived_by_the_journal`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/history.rs"]
mod history;
#[path = "support/proxy.rs"]
mod proxy;
#[path = "support/redis.rs"]
mod redis;
#[path = "support/strangers.rs"]
mod strangers;
#[path = "support/mod.rs"]
mod support;
#[path = "support/vitals.rs"]
mod vitals;
#[path = "support/world.rs"]
mod world;

use std::{
    fmt,
    fs::File,
    io::Write as _,
    path::PathBuf,
    sync::{Arc, Mutex, atomic::Ordering},
    time::{Duration, Instant},
};

use history::{GONE, History, Life, Register};
use proxy::{Mode, Proxy};
use rand::seq::{IndexedRandom, SliceRandom};
use redis::Redis;
use support::{Http, Service, until_hit};
use tempfile::TempDir;
use tokio::{task::block_in_place, time::sleep};
use world::{Process, World};

/// What the docs say of the tier in process: two heartbeats.
const BOUND: Duration = Duration::from_millis(500);
/// Until all is well again, and until a process that is told to has ended: longer than the busiest machine takes.
const PATIENCE: Duration = Duration::from_secs(180);
/// The one that is killed now and then. The others live all the time.
const MORTAL: usize = 0;

// The processes.

/// A process of the service, again and again.
struct Member {
    name: &'static str,
    args: Vec<String>,
    lag: Duration,
    starts: usize,
    dir: PathBuf,
    service: Service,
}

impl Member {
    /// With a tier of its own.
    fn start(tier: &'static str, redis: &str, args: &[&str], dir: &TempDir) -> Self {
        let db = dir.path().join("agents.db");
        let own = ["--db", db.to_str().unwrap(), "--redis", redis, "--l1", tier];
        let args: Vec<_> = own.iter().chain(args).map(|arg| (*arg).to_owned()).collect();
        let lag = if tier == "on" { BOUND } else { Duration::ZERO };
        let service = service(&args, &dir.path().join(format!("{tier}-1.log")));
        Self { name: tier, args, lag, starts: 1, dir: dir.path().to_owned(), service }
    }

    fn log(&self) -> PathBuf {
        self.dir.join(format!("{}-{}.log", self.name, self.starts))
    }

    fn restart(&mut self) {
        self.starts += 1;
        self.service = service(&self.args, &self.log());
    }

    fn process(&self) -> Arc<Process> {
        Process::new(format!("{} #{}", self.name, self.starts), &self.service.url, self.lag)
    }
}

fn service(args: &[String], log: &std::path::Path) -> Service {
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    block_in_place(|| Service::start_logging(&args, log))
}

struct Crew {
    members: Vec<Member>,
    redis: Redis,
    proxies: Vec<Proxy>,
    faults: Faults,
    dir: TempDir,
}

/// What was done to whom, and when.
struct Faults {
    world: Arc<World>,
    file: Mutex<File>,
}

impl Faults {
    fn note(&self, what: impl fmt::Debug) {
        let mut file = self.file.lock().unwrap();
        writeln!(file, "{:.2} s: {what:?}", self.world.history.elapsed()).unwrap();
    }
}

impl Crew {
    /// One talks to Redis directly, and two by way of a network that may fail.
    async fn start(args: &[&str]) -> Self {
        let dir = TempDir::new().unwrap();
        let small = ["--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lru"];
        let redis = block_in_place(|| Redis::start_on(redis::lasting_port(), &small));
        let proxies = vec![Proxy::start(redis.port).await, Proxy::start(redis.port).await];
        let urls = [&redis.url(), &proxies[0].url, &proxies[1].url];
        let tiers = ["off", "validated", "on"].into_iter().zip(urls);
        let members: Vec<_> = tiers.map(|(tier, url)| Member::start(tier, url, args, &dir)).collect();
        let world = World::new(members.iter().map(Member::process).collect(), args.contains(&"--fence-ms")).await;
        let file = Mutex::new(File::create(dir.path().join("faults.log")).unwrap());
        Self { members, redis, proxies, faults: Faults { world, file }, dir }
    }

    /// Everything at once, each by itself.
    async fn torment(&mut self, time: Duration) {
        let until = Instant::now() + time;
        let Self { members, redis, proxies, faults, .. } = self;
        tokio::join!(
            torment_redis(redis, faults, until),
            torment_network(proxies, faults, until),
            torment_processes(members, faults, until)
        );
    }

    /// Until everybody says that all is well, and hits are back.
    async fn healed(&self) {
        let start = Instant::now();
        let crew = self.world().crew.read().unwrap().clone();
        for process in &crew {
            while !self.world().is_well(process).await {
                assert!(start.elapsed() < PATIENCE, "{} does not heal", process.life.name);
                sleep(Duration::from_millis(50)).await;
            }
            until_hit(&Http::new(&process.url, "demo"), "/agents/agent-1").await;
        }
    }

    fn world(&self) -> &Arc<World> {
        &self.faults.world
    }

    async fn vitals(&self) -> Vec<Vitals> {
        let crew = self.world().crew.read().unwrap().clone();
        let mut all = vec![];
        for (member, process) in self.members.iter().zip(&crew) {
            let pid = member.service.pid();
            let metrics = String::from_utf8(process.nobody.get("/metrics").await.body.to_vec()).unwrap();
            let metric = |name: &str| {
                let line = metrics.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name}"));
                line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()
            };
            all.push(Vitals {
                mib: vitals::resident(pid),
                held: metric("cache_aside_store_bytes") >> 20,
                threads: vitals::threads(pid),
                tasks: metric("agent_service_tasks"),
                files: vitals::files(pid),
            });
        }
        all
    }

    fn connections(&self) -> u64 {
        let info = self.redis.command(&["INFO", "clients"]);
        let count = info.lines().find_map(|line| line.strip_prefix("connected_clients:")).unwrap();
        count.parse().unwrap()
    }
}

impl Drop for Crew {
    /// What the processes said, and what was done to them, is kept if anything is wrong.
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.dir.disable_cleanup(true);
            println!("see {}", self.dir.path().display());
        }
    }
}

/// What a process takes.
#[derive(Debug, Clone, Copy)]
struct Vitals {
    mib: u64,
    /// Of those, what the cache says that it holds, which is bounded.
    held: u64,
    threads: u64,
    tasks: u64,
    files: u64,
}

impl Vitals {
    /// By more than what the cache holds, and as much for what that counts roughly and for the allocator; or than what is
    /// under way takes, and a client's connection here and there.
    fn has_grown(&self, since: &Self) -> bool {
        let held = self.held.saturating_sub(since.held);
        self.mib > since.mib + 2 * held + 48
            || self.held > 64
            || self.threads > since.threads + 32
            || self.tasks > since.tasks + 64
            || self.files > since.files + 64
    }
}

// The faults.

fn seconds() -> f64 {
    std::env::var("SOAK_SECONDS").map_or(20.0, |seconds| seconds.parse().unwrap())
}

/// Between two faults, at most. Who has an hour sees more of what comes after a fault.
fn calm() -> f64 {
    (seconds() / 600.0).clamp(1.0, 6.0)
}

/// How long a fault lasts, at most.
fn outage() -> f64 {
    (seconds() / 600.0).clamp(2.5, 6.0)
}

/// Each of them before any comes again, at least once, until it is time.
async fn each<F: Copy>(mut faults: Vec<F>, until: Instant, mut inflict: impl AsyncFnMut(F)) {
    let mut is_first = true;
    while is_first || Instant::now() < until {
        faults.shuffle(&mut rand::rng());
        for fault in &faults {
            pause(0.2, calm()).await;
            if !is_first && Instant::now() >= until {
                return;
            }
            inflict(*fault).await;
        }
        is_first = false;
    }
}

async fn pause(least: f64, most: f64) {
    sleep(Duration::from_secs_f64(rand::random_range(least..most))).await;
}

async fn torment_redis(redis: &mut Redis, faults: &Faults, until: Instant) {
    each(vec!["freeze", "kill", "flush", "cut off"], until, async |fault| {
        faults.note(("redis", fault));
        match fault {
            "freeze" => {
                redis.signal("-STOP");
                pause(0.05, outage()).await;
                redis.signal("-CONT");
            }
            "kill" => {
                block_in_place(|| redis.kill());
                pause(0.0, outage()).await;
                block_in_place(|| redis.restart());
            }
            "flush" => _ = redis.try_command(&["FLUSHALL"]),
            _ => {
                for _ in 0..rand::random_range(1..=5) {
                    redis.try_command(&["CLIENT", "KILL", "TYPE", "normal"]);
                    pause(0.0, 0.2).await;
                }
            }
        }
        faults.note(("redis", "goes on"));
    })
    .await;
}

async fn torment_network(proxies: &[Proxy], faults: &Faults, until: Instant) {
    let delays = [5, 40, 150, 400].map(|ms| Mode::Delay(Duration::from_millis(ms)));
    let delay = || *delays.choose(&mut rand::rng()).unwrap();
    each(vec![Mode::Cut, Mode::Hold, Mode::Swallow, delays[0]], until, async |mode| {
        let mode = if mode == delays[0] { delay() } else { mode };
        let victim = rand::random_range(0..proxies.len());
        faults.note(("network of", victim + 1, mode));
        proxies[victim].set(mode);
        pause(0.05, outage()).await;
        proxies[victim].set(Mode::Pass);
        faults.note(("network of", victim + 1, "goes on"));
    })
    .await;
}

async fn torment_processes(members: &mut [Member], faults: &Faults, until: Instant) {
    each(vec!["-STOP", "-KILL", "-STOP", "-TERM"], until, async |signal| {
        let victim = if signal == "-STOP" { rand::random_range(0..members.len()) } else { MORTAL };
        faults.note(("process", victim, signal));
        let member = &mut members[victim];
        if signal == "-STOP" {
            member.service.signal(signal);
            // Shorter than the others wait for the database, which it may have locked.
            pause(0.05, 2.0).await;
            member.service.signal("-CONT");
        } else {
            end(member, signal, faults).await;
            pause(0.0, 1.0).await;
            member.restart();
            faults.world.crew.write().unwrap()[victim] = member.process();
        }
        faults.note(("process", victim, "goes on"));
    })
    .await;
}

/// Ends a process. One that is told to has delivered everything, or says what it has not.
async fn end(member: &mut Member, signal: &str, faults: &Faults) {
    let life = faults.world.crew.read().unwrap()[MORTAL].life.clone();
    life.end();
    let asked = Instant::now();
    member.service.signal(signal);
    while member.service.ended().is_none() {
        assert!(asked.elapsed() < PATIENCE, "it does not end");
        sleep(Duration::from_millis(5)).await;
    }
    // Answers that are on their way are counted in first.
    sleep(Duration::from_millis(100)).await;
    let log = std::fs::read_to_string(member.log()).unwrap();
    if signal == "-TERM" && !log.contains("invalidations could not be delivered") {
        life.has_told(Instant::now());
    }
    faults.world.history.lost.fetch_add(life.forget() as u64, Ordering::Relaxed);
}

// The tests.

async fn soak(args: &[&str]) {
    let time = Duration::from_secs_f64(seconds());
    let mut crew = Crew::start(args).await;
    let world = crew.world().clone();
    // Until what is taken once is taken.
    world.during(sleep(time / 10)).await;
    crew.healed().await;
    let (start, connections) = (crew.vitals().await, crew.connections());
    println!("at the start: {start:?}, {connections} connections to Redis");
    for when in ["half-way", "at the end"] {
        world.during(crew.torment(time / 2)).await;
        crew.healed().await;
        world.compare().await;
        let (now, open) = (crew.vitals().await, crew.connections());
        println!("{when}: {now:?}, {open} connections to Redis\n{}", world.history.summary());
        world.history.assert_good();
        let grown = now.iter().zip(&start).any(|(now, start)| now.has_grown(start));
        assert!(!grown && open <= connections + 3, "it grows: {start:?}, {now:?}");
    }
}

/// Others may be stale until the journal is delivered.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn faults_are_survived_by_the_journal() {
    soak(&[]).await;
}

/// What cannot be told is refused before it runs, and a kill leaves nothing stale.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn faults_are_survived_by_fences() {
    soak(&["--fence-ms", "5000", "--on-unreachable", "reject"]).await;
}

// The checks are checked.

/// One of three is told of nothing: it has another Redis.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_process_that_hears_of_nothing_is_found() {
    let (redis, other) = (Redis::start(&[]), Redis::start(&[]));
    for tier in ["off", "validated", "on"] {
        let dir = TempDir::new().unwrap();
        let urls = [redis.url(), redis.url(), other.url()];
        let members: Vec<_> = urls.iter().map(|url| Member::start(tier, url, &["--prefix", tier], &dir)).collect();
        let world = World::new(members.iter().map(Member::process).collect(), false).await;
        let start = Instant::now();
        world
            .during(async {
                while world.history.stale() == 0 {
                    assert!(start.elapsed() < PATIENCE, "not found: {}", world.history.summary());
                    sleep(Duration::from_millis(10)).await;
                }
            })
            .await;
        assert_eq!(world.history.failed(), 0);
    }
}

/// What a read at each of two processes, of which `lag` may lag, has to find at least.
#[tokio::test]
async fn the_history_knows_who_must_have_heard_of_what() {
    let life = |lag| Life::new(String::new(), lag);
    let (own, other, lagging) = (life(Duration::ZERO), life(Duration::ZERO), life(BOUND));
    let register = Register::default();
    let floors = || [&own, &other, &lagging].map(|reader| register.floor(reader));
    register.acknowledge(1, &own, true);
    assert_eq!(floors(), [1, 1, 0]);
    sleep(BOUND).await;
    assert_eq!(floors(), [1, 1, 1]);
    let asked_before = Instant::now();
    register.acknowledge(2, &own, false);
    own.has_told(asked_before);
    assert_eq!((floors(), register.newest()), ([2, 1, 1], 2));
    own.has_told(Instant::now());
    assert_eq!(floors(), [2, 2, 1]);
    register.acknowledge(3, &own, false);
    assert_eq!(own.forget(), 1);
    own.has_told(Instant::now());
    sleep(Duration::from_secs(1)).await;
    assert_eq!(floors(), [3, 2, 2]);
    register.acknowledge(GONE, &other, true);
    assert_eq!(floors(), [GONE, GONE, 2]);
}

#[test]
fn what_is_stale_and_what_grows_is_found() {
    let history = History::default();
    for (found, floor, newest) in [(2, 2, 2), (2, 1, 3), (3, 2, 2), (GONE, GONE, GONE)] {
        history.read(found, floor, newest, String::new);
    }
    assert_eq!((history.stale(), history.lagged.load(Ordering::Relaxed)), (0, 1));
    history.read(1, 2, 2, String::new);
    history.read(7, GONE, GONE, String::new);
    assert_eq!(history.stale(), 2);
    let start = Vitals { mib: 20, held: 4, threads: 4, tasks: 20, files: 30 };
    assert!(!Vitals { mib: 120, held: 40, threads: 12, tasks: 40, files: 50 }.has_grown(&start));
    for grown in [
        Vitals { mib: 100, ..start },
        Vitals { held: 80, ..start },
        Vitals { threads: 50, ..start },
        Vitals { tasks: 100, ..start },
        Vitals { files: 100, ..start },
    ] {
        assert!(grown.has_grown(&start), "{grown:?}");
    }
}
