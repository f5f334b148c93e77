//! Rows of PostgreSQL that are written by SQL only, and read through the cache by many: nothing is older than the bound, also where an
//! event comes before its row can be seen.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/history.rs"]
mod history;
#[path = "support/proxy.rs"]
mod proxy;
#[path = "support/postgres.rs"]
mod server;
#[path = "support/web.rs"]
mod web;

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use history::{History, Life, Register, count};
use http::Method;
use proxy::{Mode, Proxy};
use server::Postgres;
use tokio::{sync::mpsc, task::JoinHandle, time::sleep};
use tokio_postgres::{Client, NoTls, Row};
use tower_cache_aside::{
    Batch, Cache, DataType, EventPolicy, EventSource, Notes, Received, Route, SourceFuture, Ttl,
    postgres::{PostgresSource, install_sql},
};
use web::{Web, ok, with};

/// Rows that are read.
const IDS: usize = 32;

/// Those that are written by few: whose commits wait for a standby, or that are among many rows.
const RARE: [usize; 4] = [0, 1, 2, 3];

const MANY: usize = 100_000;

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// What a source has given of the rows that are read.
#[derive(Default)]
struct Seen {
    early: BTreeSet<usize>,
    acknowledged: BTreeSet<usize>,
}

/// PostgreSQL's events, with word of each to those who read right after it.
struct Tapped {
    source: PostgresSource,
    /// Else what is early is given as if it could be seen.
    is_fenced: bool,
    given: Vec<usize>,
    seen: Arc<Mutex<Seen>>,
    early: Arc<AtomicU64>,
    tell: mpsc::UnboundedSender<usize>,
}

impl Tapped {
    fn tell(&self) {
        for id in &self.given {
            let _ = self.tell.send(*id);
        }
    }

    fn tap(&mut self, batch: Batch) -> Batch {
        let ids = batch.events().iter().flat_map(|event| event.values("id"));
        self.given = ids.filter_map(|id| id.parse().ok()).filter(|id| *id < IDS).collect();
        if batch.is_early() {
            count(&self.early);
            self.seen.lock().unwrap().early.extend(&self.given);
        }
        self.tell();
        assert!(batch.reasons().is_empty(), "{batch:?}");
        if self.is_fenced { batch } else { Batch::new(batch.events().to_vec()) }
    }
}

impl EventSource for Tapped {
    fn name(&self) -> &str {
        self.source.name()
    }

    fn start(&mut self, notes: Notes) {
        self.source.start(notes);
    }

    fn next(&mut self) -> SourceFuture<'_, Received> {
        Box::pin(async {
            Ok(match self.source.next().await? {
                Received::Events(batch) => Received::Events(self.tap(batch)),
                other => other,
            })
        })
    }

    fn visible(&mut self) -> SourceFuture<'_, ()> {
        self.source.visible()
    }

    fn ack(&mut self) -> SourceFuture<'_, ()> {
        Box::pin(async {
            self.source.ack().await?;
            self.tell();
            self.seen.lock().unwrap().acknowledged.extend(&self.given);
            Ok(())
        })
    }
}

/// What differs between the tests.
struct Terms {
    /// What is older is found.
    bound: Duration,
    /// Whether the cache is told of it.
    is_bounded: bool,
    is_fenced: bool,
}

impl Terms {
    fn of(bound: Duration) -> Self {
        Self { bound, is_bounded: true, is_fenced: true }
    }
}

async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

struct World {
    bound: Duration,
    server: Postgres,
    cache: Cache,
    shared: Arc<Shared>,
    seen: Arc<Mutex<Seen>>,
    early: Arc<AtomicU64>,
    readers: Vec<JoinHandle<()>>,
}

/// What its tasks have in common.
struct Shared {
    web: Web,
    registers: Vec<Register>,
    history: History,
    /// The service, which may be behind by the bound; and who writes, which is another program.
    reader: Arc<Life>,
    writer: Arc<Life>,
    over: AtomicBool,
}

impl Shared {
    async fn read(&self, id: usize) -> web::Reply {
        let register = &self.registers[id];
        let (floor, newest) = (register.floor(&self.reader), register.newest());
        let request = with(Method::GET, &format!("/agents/{id}"), &[("x-tenant-id", "acme")]);
        let reply = self.web.send(request).await;
        self.history.read(reply.text().parse().unwrap(), floor, newest, || format!("{id}: {}", reply.cache_status()));
        count(&self.history.reads);
        if reply.is_hit() {
            count(&self.history.hits);
        }
        reply
    }

    /// Writes these rows by SQL alone, in one transaction, and returns when it is committed.
    async fn write(&self, client: &Client, ids: &[usize]) {
        let ids: Vec<_> = ids.iter().map(usize::to_string).collect();
        let sql = "UPDATE agents SET version = version + 1 WHERE id = ANY($1) RETURNING id::int, version";
        for row in client.query(sql, &[&ids]).await.unwrap() {
            self.acknowledge(&row);
        }
    }

    fn acknowledge(&self, row: &Row) {
        let (id, version): (i32, i64) = (row.get(0), row.get(1));
        self.registers[id as usize].acknowledge(version as u64, &self.writer, true);
        count(&self.history.writes);
    }
}

impl World {
    /// With many readers; the source's connections go through this proxy, if there is one.
    async fn start(server: Postgres, terms: Terms, way: Option<&Proxy>) -> Self {
        let Terms { bound, is_bounded, is_fenced } = terms;
        server.sql("CREATE TABLE agents (id text PRIMARY KEY, tenant text NOT NULL, version bigint NOT NULL)");
        server.sql(&install_sql(["agents"]));
        server.sql(&format!("INSERT INTO agents SELECT i, 'acme', 1 FROM generate_series(0, {IDS} - 1) AS i"));
        let agents = DataType::new("agent", Ttl::Extended);
        let cache = Cache::builder("test")
            .tenant_header("x-tenant-id")
            .data_type(if is_bounded { agents.max_lag(bound) } else { agents })
            .route(Route::new("/agents/{agent_id}", "agent"))
            .event(EventPolicy::on("agents").mutated("agent", "id"))
            .build()
            .unwrap();
        let database = Arc::new(connect(&server.url()).await);
        let web = Web::new(&cache, move |request| {
            let (database, id) = (database.clone(), request.uri().path().rsplit('/').next().unwrap().to_owned());
            async move {
                let row = database.query_one("SELECT version FROM agents WHERE id = $1", &[&id]).await.unwrap();
                Ok(ok(row.get::<_, i64>(0).to_string()))
            }
        });
        let shared = Arc::new(Shared {
            web,
            registers: (0..IDS).map(|_| Register::default()).collect(),
            history: History::default(),
            reader: Life::new("the service".to_owned(), bound),
            writer: Life::new("another program".to_owned(), Duration::ZERO),
            over: AtomicBool::new(false),
        });
        let url = way.map_or_else(|| server.url(), |way| format!("postgres://postgres@{}/postgres", way.address));
        let source = PostgresSource::builder(url).slot("load").timeout(ms(2_000)).build().unwrap();
        let (tell, told) = mpsc::unbounded_channel();
        let (seen, early) = (Arc::<Mutex<Seen>>::default(), Arc::<AtomicU64>::default());
        cache
            .follow(Tapped { source, is_fenced, given: vec![], seen: seen.clone(), early: early.clone(), tell })
            .unwrap();
        let readers = readers(&shared, told);
        let this = Self { bound, server, cache, shared, seen, early, readers };
        this.heals().await;
        this
    }

    /// Until the source is well, and what is cached is answered.
    async fn heals(&self) {
        let (start, most) = (Instant::now(), self.bound.as_millis() as u64);
        let is_well = || self.cache.stats().sources["postgres"].behind_ms.is_some_and(|behind| behind < most);
        while !is_well() || !self.shared.read(0).await.is_hit() {
            assert!(start.elapsed() < ms(30_000), "{:?}", self.cache.stats().sources);
            sleep(ms(10)).await;
        }
    }

    /// So many writers, until they are stopped.
    async fn writers(&self, writers: usize, pause: Duration) -> Writers {
        let over = Arc::new(AtomicBool::new(false));
        let mut tasks = vec![];
        for _ in 0..writers {
            let (client, shared, over) = (connect(&self.server.url()).await, self.shared.clone(), over.clone());
            tasks.push(tokio::spawn(async move {
                while !over.load(SeqCst) {
                    shared.write(&client, &[rand::random_range(RARE.len()..IDS)]).await;
                    sleep(pause).await;
                }
            }));
        }
        Writers { over, tasks }
    }

    fn standbys(&self, names: &str) {
        self.server.sql(&format!("ALTER SYSTEM SET synchronous_standby_names = '{names}'"));
        self.server.sql("SELECT pg_reload_conf()");
        self.server.wait_for("SHOW synchronous_standby_names", names);
    }

    /// Until the source has given them all.
    async fn until_seen(&self, is: impl Fn(&Seen) -> &BTreeSet<usize>) {
        let start = Instant::now();
        while !RARE.iter().all(|id| is(&self.seen.lock().unwrap()).contains(id)) {
            assert!(start.elapsed() < ms(30_000), "{:?}", self.cache.stats().sources);
            sleep(ms(2)).await;
        }
    }

    async fn until_stale(&self, without: &str) {
        let start = Instant::now();
        while self.shared.history.stale() == 0 {
            assert!(start.elapsed() < ms(30_000), "without {without} nothing is found: the checker is blind");
            sleep(ms(5)).await;
        }
    }

    /// What was found, also of what nobody writes any more.
    async fn end(self) -> Arc<Shared> {
        sleep(self.bound + ms(50)).await;
        for id in 0..IDS {
            self.shared.read(id).await;
        }
        self.shared.over.store(true, SeqCst);
        for reader in self.readers {
            reader.await.unwrap();
        }
        println!("{}; {} early", self.shared.history.summary(), self.early.load(SeqCst));
        self.shared
    }
}

/// Some read at random, and some what they are told, right after it: when it is given, and when it has been acknowledged.
fn readers(shared: &Arc<Shared>, told: mpsc::UnboundedReceiver<usize>) -> Vec<JoinHandle<()>> {
    let at_random = (0..6).map(|_| {
        let shared = shared.clone();
        tokio::spawn(async move {
            while !shared.over.load(SeqCst) {
                shared.read(rand::random_range(0..IDS)).await;
                sleep(ms(1)).await;
            }
        })
    });
    let told = Arc::new(tokio::sync::Mutex::new(told));
    let when_told = (0..2).map(|_| {
        let (shared, told) = (shared.clone(), told.clone());
        tokio::spawn(async move {
            while !shared.over.load(SeqCst) {
                let next = async { told.lock().await.recv().await };
                if let Ok(Some(id)) = tokio::time::timeout(ms(50), next).await {
                    shared.read(id).await;
                }
            }
        })
    });
    at_random.chain(when_told).collect()
}

struct Writers {
    over: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<()>>,
}

impl Writers {
    async fn stop(self) {
        self.over.store(true, SeqCst);
        for task in self.tasks {
            task.await.unwrap();
        }
    }
}

/// Every core and the log are busy: with what others compute, with what they write, and with a hundred thousand rows at a time, which
/// are taken back every other time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_older_than_the_bound_while_the_server_is_loaded() {
    let world = World::start(Postgres::start(&[]), Terms::of(ms(2_000)), None).await;
    world.server.sql(&format!("INSERT INTO agents SELECT i, 'acme', 1 FROM generate_series({IDS}, {MANY}) AS i"));
    let over = Arc::new(AtomicBool::new(false));
    let mut others = vec![];
    for sql in [
        "SELECT count(*) FROM generate_series(1, 100000)",
        "CREATE TABLE IF NOT EXISTS others (name text); INSERT INTO others SELECT repeat('x', 100) FROM generate_series(1, 500)",
    ] {
        let (client, over) = (connect(&world.server.url()).await, over.clone());
        others.push(tokio::spawn(async move {
            while !over.load(SeqCst) {
                client.batch_execute(sql).await.unwrap();
            }
        }));
    }
    let writers = world.writers(4, ms(1)).await;
    let mut client = connect(&world.server.url()).await;
    let sql = format!(
        "WITH changed AS (UPDATE agents SET version = version + 1
         WHERE id::int < {few} OR id::int >= {IDS} RETURNING id::int, version)
         SELECT id, version FROM changed WHERE id < {few}",
        few = RARE.len()
    );
    for round in 0..4 {
        let all = client.transaction().await.unwrap();
        let rows = all.query(&sql, &[]).await.unwrap();
        assert_eq!(rows.len(), RARE.len());
        if round % 2 == 1 {
            all.rollback().await.unwrap();
            sleep(ms(300)).await;
            continue;
        }
        all.commit().await.unwrap();
        rows.iter().for_each(|row| world.shared.acknowledge(row));
        sleep(ms(300)).await;
    }
    writers.stop().await;
    over.store(true, SeqCst);
    for other in others {
        other.await.unwrap();
    }
    world.heals().await;
    let shared = world.end().await;
    shared.history.assert_good();
    assert!(shared.history.hits.load(SeqCst) > 0);
}

/// Commits are in the log, and told of, before anybody sees them. Whoever reads right after the event finds the old row, and if that
/// were stored it would stay: which is what is found without the fence.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_seen_yet_is_not_stored() {
    for is_fenced in [true, false] {
        let world = World::start(Postgres::start(&[]), Terms { is_fenced, ..Terms::of(ms(1_000)) }, None).await;
        for _ in 0..if is_fenced { 4 } else { 1 } {
            for id in RARE {
                while !world.shared.read(id).await.is_hit() {
                    sleep(ms(1)).await;
                }
            }
            *world.seen.lock().unwrap() = Seen::default();
            world.standbys("missing");
            let (client, shared) = (connect(&world.server.url()).await, world.shared.clone());
            let waiting = tokio::spawn(async move { shared.write(&client, &RARE).await });
            world.until_seen(|seen| if is_fenced { &seen.early } else { &seen.acknowledged }).await;
            for id in RARE {
                while world.shared.read(id).await.is_hit() == is_fenced {
                    sleep(ms(1)).await;
                }
                for _ in 0..20 {
                    assert!(!world.shared.read(id).await.is_hit() || !is_fenced, "{id} is stored");
                }
            }
            assert!(!waiting.is_finished());
            world.standbys("");
            waiting.await.unwrap();
            if !is_fenced {
                world.until_stale("the fence").await;
            }
            // As long as nothing else is changed.
            sleep(world.bound + ms(50)).await;
            for id in RARE {
                world.shared.read(id).await;
            }
        }
        world.heals().await;
        let shared = world.end().await;
        if is_fenced {
            shared.history.assert_good();
            assert!(shared.history.hits.load(SeqCst) > 0);
        }
    }
}

/// The source's connections only: who reads and who writes goes on. Without `max_lag` it is found.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_older_than_the_bound_while_the_source_is_cut_off() {
    for is_bounded in [true, false] {
        let server = Postgres::start(&[]);
        let proxy = Proxy::start(server.port).await;
        let world = World::start(server, Terms { is_bounded, ..Terms::of(ms(1_000)) }, Some(&proxy)).await;
        let writers = world.writers(2, ms(5)).await;
        let modes: &[Mode] = if is_bounded { &[Mode::Swallow, Mode::Hold, Mode::Cut] } else { &[Mode::Swallow] };
        for mode in modes {
            proxy.set(*mode);
            sleep(2 * world.bound).await;
            if is_bounded {
                let reply = world.shared.read(0).await;
                assert_eq!(reply.cache_status(), "fwd=bypass; detail=events-behind", "{mode:?}");
            } else {
                world.until_stale("a bound").await;
            }
            proxy.set(Mode::Pass);
            world.heals().await;
        }
        writers.stop().await;
        let gaps = world.cache.stats().sources["postgres"].gaps;
        assert_eq!(gaps, 1, "what came meanwhile was given again");
        let shared = world.end().await;
        if is_bounded {
            shared.history.assert_good();
        }
    }
}
