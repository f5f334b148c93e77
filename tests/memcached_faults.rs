//! What the memcached store promises when something dies, lags or lies: a writer, the network, a server, or what it says. Two
//! caches on one memcached are two processes here; one that is killed is a real one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/memcached.rs"]
mod memcached;
#[path = "support/proxy.rs"]
mod proxy;
#[path = "support/web.rs"]
mod web;

use std::{
    io,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use memcached::Memcached;
use proxy::{Mode, Proxy};
use tempfile::TempDir;
use tokio::{sync::Semaphore, task::JoinHandle};
use tower_cache_aside::{
    Cache, CacheBuilder, Cascade, DataType, Mutation, OnUnreachable, Route, Tier, Ttl,
    store::{Health, MemcachedBuilder, MemcachedStore, Store},
};
use web::{Body, Reply, Web, full, ok};

/// Longer than any test takes.
const FOREVER: Duration = Duration::from_secs(60);
const PATH: &str = "/docs/1";

/// A store that reads memcached again as soon as it is there: one process alone needs no time to settle.
fn store(address: &str) -> MemcachedBuilder {
    MemcachedStore::builder([address]).prefix("faults").in_process(8 << 20).settle(Duration::ZERO)
}

/// One that no busy machine makes miss.
fn patient(address: &str) -> MemcachedBuilder {
    store(address).budget(FOREVER).heartbeat(Duration::from_secs(1))
}

fn builder(store: MemcachedBuilder, tier: Tier) -> CacheBuilder {
    over(store.build().unwrap(), tier)
}

fn over(store: MemcachedStore, tier: Tier) -> CacheBuilder {
    Cache::builder("test")
        .single_tenant("t")
        .data_type(DataType::new("doc", Ttl::Standard).tier(tier))
        .route(Route::new("/docs/{doc_id}", "doc"))
        .mutation(Mutation::put("/docs/{doc_id}", "doc"))
        .store(store)
}

/// A row that all processes share: what is read is how often it was written.
type Db = Arc<AtomicU64>;
type Answer = std::future::Ready<io::Result<Response<Body>>>;

fn row(db: &Db) -> String {
    db.load(Ordering::SeqCst).to_string()
}

fn origin(db: &Db) -> impl Fn(Request<Full<bytes::Bytes>>) -> Answer + use<> {
    let db = db.clone();
    move |request| {
        if request.method() == Method::PUT {
            db.fetch_add(1, Ordering::SeqCst);
        }
        std::future::ready(Ok(ok(row(&db))))
    }
}

async fn until_hit(web: &Web, text: &str) {
    let start = Instant::now();
    loop {
        let reply = web.get(PATH).await;
        assert_eq!(reply.text(), text, "{}", reply.cache_status());
        if reply.is_hit() {
            return;
        }
        assert!(start.elapsed() < FOREVER, "no hit: {}", reply.cache_status());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn until(what: impl Fn() -> bool) {
    let start = Instant::now();
    while !what() {
        assert!(start.elapsed() < FOREVER);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

// ---- a writer that dies ----------------------------------------------------------------------------------------------

fn file_builder(address: &str, lease: Option<Duration>) -> CacheBuilder {
    lease.into_iter().fold(builder(patient(address), Tier::Off), CacheBuilder::fenced)
}

/// Not a test: the process that [`killed`] starts. It commits, and never comes to its invalidation.
#[tokio::test]
async fn the_writer() {
    let Ok(address) = std::env::var("FAULTS_ADDRESS") else { return };
    let lease = std::env::var("FAULTS_LEASE").ok().map(|ms| Duration::from_millis(ms.parse().unwrap()));
    let file = std::env::var("FAULTS_FILE").unwrap();
    let web = Web::new(&file_builder(&address, lease).build().unwrap(), move |_| {
        std::fs::write(&file, "new").unwrap();
        std::future::pending::<io::Result<Response<Body>>>()
    });
    // Should the parent be gone.
    let _ = tokio::time::timeout(FOREVER, web.put(PATH)).await;
}

/// Caches the old row, and kills a writer of the new one between its commit and its invalidation.
async fn killed(lease: Option<Duration>) -> (Memcached, Web, TempDir) {
    let (server, dir) = (Memcached::start(&[]), TempDir::new().unwrap());
    let file = dir.path().join("row");
    std::fs::write(&file, "old").unwrap();
    let row = file.clone();
    let reader = Web::new(&file_builder(&server.address(), lease).build().unwrap(), move |_| {
        std::future::ready(std::fs::read(&row).map(ok))
    });
    until_hit(&reader, "old").await;
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "the_writer", "--nocapture"]).stdout(Stdio::null());
    command.env("FAULTS_ADDRESS", server.address()).env("FAULTS_FILE", &file);
    command.envs(lease.map(|lease| ("FAULTS_LEASE", lease.as_millis().to_string())));
    let mut writer = command.spawn().unwrap();
    until(|| std::fs::read(&file).unwrap() == b"new").await;
    writer.kill().unwrap();
    writer.wait().unwrap();
    (server, reader, dir)
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_a_fence_a_writer_that_dies_leaves_nothing_stale() {
    // Without one it does: this is what fences are for.
    let (_server, reader, _dir) = killed(None).await;
    assert_eq!(reader.get(PATH).await.text(), "old");
    let (_server, reader, _dir) = killed(Some(FOREVER)).await;
    assert_fenced(&reader, "new").await;
    // Once the lease has run out, it is stored again.
    let (_server, reader, _dir) = killed(Some(Duration::from_millis(700))).await;
    until_hit(&reader, "new").await;
}

// ---- fences ----------------------------------------------------------------------------------------------------------

/// Reads are misses, and not stored.
async fn assert_fenced(web: &Web, text: &str) {
    for _ in 0..5 {
        let reply = web.get(PATH).await;
        assert_eq!((reply.text(), reply.cache_status()), (text, "fwd=uri-miss"));
    }
}

/// A process whose writes stop in the handler before they commit.
struct Writer {
    web: Web,
    entered: Arc<Semaphore>,
    gate: Arc<Semaphore>,
    status: StatusCode,
}

impl Writer {
    fn new(cache: &Cache, db: &Db, status: StatusCode) -> Self {
        let (entered, gate) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
        let (e, g, db) = (entered.clone(), gate.clone(), db.clone());
        let web = Web::new(cache, move |request| {
            let (entered, gate, db) = (e.clone(), g.clone(), db.clone());
            async move {
                let mut response = ok(row(&db));
                if request.method() == Method::PUT {
                    entered.add_permits(1);
                    gate.acquire().await.unwrap().forget();
                    db.fetch_add(u64::from(status.is_success()), Ordering::SeqCst);
                    *response.status_mut() = status;
                }
                Ok(response)
            }
        });
        Self { web, entered, gate, status }
    }

    async fn begin(&self) -> JoinHandle<Reply> {
        let web = self.web.clone();
        let write = tokio::spawn(async move { web.put(PATH).await });
        self.entered.acquire().await.unwrap().forget();
        write
    }

    async fn end(&self, write: JoinHandle<Reply>) {
        self.gate.add_permits(1);
        assert_eq!(write.await.unwrap().status, self.status);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_lifts_no_fence_but_its_own() {
    let (server, db) = (Memcached::start(&[]), Db::default());
    let cache = || builder(patient(&server.address()), Tier::Off).fenced(FOREVER).build().unwrap();
    let (own, other) = (cache(), cache());
    for (cache, status) in [(&own, 200), (&other, 200), (&own, 404), (&other, 404)] {
        let first = Writer::new(&own, &db, StatusCode::OK);
        let second = Writer::new(cache, &db, StatusCode::from_u16(status).unwrap());
        until_hit(&first.web, &row(&db)).await;
        let (write, overlapping) = (first.begin().await, second.begin().await);
        assert_fenced(&first.web, &row(&db)).await;
        second.end(overlapping).await;
        assert_fenced(&second.web, &row(&db)).await;
        other.invalidate("t").mutated("doc", "1").run().await.unwrap();
        assert_fenced(&first.web, &row(&db)).await;
        first.end(write).await;
        assert_eq!(first.web.get(PATH).await.cache_status(), "fwd=uri-miss; stored");
        until_hit(&second.web, &row(&db)).await;
    }
}

/// Many writers at once change one fence, and none of them is lost.
#[tokio::test(flavor = "multi_thread")]
async fn many_writers_may_fence_one_tag() {
    let (server, db) = (Memcached::start(&[]), Db::default());
    let fenced = || builder(patient(&server.address()).invalidate_budget(FOREVER), Tier::Off).fenced(FOREVER);
    let caches: Vec<_> = (0..4).map(|_| fenced().on_unreachable(OnUnreachable::Reject).build().unwrap()).collect();
    let writers: Vec<_> = (0..100).map(|i| Writer::new(&caches[i % 4], &db, StatusCode::OK)).collect();
    until_hit(&writers[0].web, "0").await;
    // Who cannot raise its fence does not begin.
    let writes = futures_util::future::join_all(writers.iter().map(Writer::begin));
    let writes = tokio::time::timeout(FOREVER, writes).await.expect("all have raised their fences");
    for (writer, write) in writers.iter().zip(writes) {
        assert_fenced(&writers[0].web, &row(&db)).await;
        writer.end(write).await;
    }
    until_hit(&writers[1].web, "100").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fence_that_holds_stands_after_the_write() {
    for hold in [FOREVER, Duration::from_millis(300)] {
        let (server, db) = (Memcached::start(&[]), Db::default());
        let builder = builder(patient(&server.address()), Tier::Off);
        let cache = builder.cascade(Cascade::new("doc").fenced(FOREVER).hold(hold)).build().unwrap();
        let web = Web::new(&cache, origin(&db));
        until_hit(&web, "0").await;
        web.put(PATH).await;
        if hold == FOREVER {
            assert_fenced(&web, "1").await;
        } else {
            until_hit(&web, "1").await;
        }
    }
}

/// A reader that has begun before the write and fills after it.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_read_cannot_bring_back_what_was_written_over() {
    for tier in [Tier::Off, Tier::Validated] {
        let (server, db) = (Memcached::start(&[]), Db::default());
        let (entered, gate) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
        let (e, g, rows) = (entered.clone(), gate.clone(), db.clone());
        let cache = builder(patient(&server.address()), tier).build().unwrap();
        let slow = Web::new(&cache, move |_| {
            let (entered, gate, text) = (e.clone(), g.clone(), row(&rows));
            async move {
                entered.add_permits(1);
                gate.acquire().await.unwrap().forget();
                Ok(ok(text))
            }
        });
        let writer = Web::new(&builder(patient(&server.address()), tier).build().unwrap(), origin(&db));
        let reading = tokio::spawn(async move { slow.get(PATH).await });
        entered.acquire().await.unwrap().forget();
        assert_eq!(writer.put(PATH).await.status, 200);
        gate.add_permits(1);
        assert_eq!(reading.await.unwrap().text(), "0");
        let reply = writer.get(PATH).await;
        assert_eq!((reply.text(), reply.is_hit()), ("1", false));
        until_hit(&writer, "1").await;
    }
}

// ---- the network -----------------------------------------------------------------------------------------------------

/// What a bad network makes of replies.
const GARBLED: &[(&str, &str)] = &[
    ("VA 16 ", "VA 14 "),
    ("VA 16 ", "VA 18 "),
    ("VA 16 ", "VA 99 "),
    ("HD", "VA"),
    ("HD", "XX"),
    ("MN", "HD"),
    ("VA ", "VA-"),
    ("NF", "EN"),
];

/// Whatever the network does, reads neither fail nor find less than what was written; and it heals.
async fn survives_the_network(tier: Tier) {
    let (server, db) = (Memcached::start(&[]), Db::default());
    let proxy = Proxy::start(server.port).await;
    let cache = builder(store(&proxy.address), tier).build().unwrap();
    let web = Web::new(&cache, origin(&db));
    // The same list of servers, by another way.
    let slow = [5, 40, 150].map(|ms| Mode::Delay(Duration::from_millis(ms)));
    let garbled = GARBLED.iter().map(|(old, new)| Mode::Garble(old, new));
    for mode in slow.into_iter().chain([Mode::Cut, Mode::CutShort, Mode::Hold, Mode::Swallow]).chain(garbled) {
        until_hit(&web, &row(&db)).await;
        proxy.set(mode);
        for _ in 0..4 {
            assert_eq!(web.put(PATH).await.status, 200, "{mode:?}");
            for _ in 0..3 {
                let reply = web.get(PATH).await;
                assert_eq!(reply.text(), row(&db), "{mode:?} {tier:?}: {}", reply.cache_status());
            }
        }
        proxy.set(Mode::Pass);
        until_hit(&web, &row(&db)).await;
        assert_eq!(cache.health(), Health::Ok, "{mode:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_network_is_survived() {
    tokio::join!(survives_the_network(Tier::Off), survives_the_network(Tier::Validated));
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_that_cannot_be_invalidated_are_refused_before_they_run() {
    let (mut server, db) = (Memcached::start(&[]), Db::default());
    let cache = builder(store(&server.address()), Tier::Off).on_unreachable(OnUnreachable::Reject).build().unwrap();
    let web = Web::new(&cache, origin(&db));
    until_hit(&web, "0").await;
    server.kill();
    until(|| !cache.health().takes_invalidations()).await;
    assert_eq!(web.put(PATH).await.status, 503);
    assert_eq!((web.get(PATH).await.text(), row(&db).as_str()), ("0", "0"));
    server.restart();
    until(|| cache.health() == Health::Ok).await;
    assert_eq!(web.put(PATH).await.status, 200);
    until_hit(&web, "1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_during_an_outage_is_delivered_before_anything_is_read() {
    let (server, db) = (Memcached::start(&[]), Db::default());
    let cache =
        builder(store(&server.address()).invalidate_budget(Duration::from_millis(50)), Tier::Off).build().unwrap();
    let web = Web::new(&cache, origin(&db));
    let elsewhere = Web::new(&builder(patient(&server.address()), Tier::Off).build().unwrap(), origin(&db));
    until_hit(&web, "0").await;
    until_hit(&elsewhere, "0").await;
    server.signal("-STOP");
    assert_eq!(web.put(PATH).await.status, 200);
    assert_eq!(web.get(PATH).await.text(), "1");
    server.signal("-CONT");
    until_hit(&web, "1").await;
    assert_eq!(elsewhere.get(PATH).await.text(), "1");
}

/// Others have until then to deliver what they could not, also to a server that was away from the beginning.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_was_away_is_not_read_before_it_has_settled() {
    let (mut server, db) = (Memcached::start(&[]), Db::default());
    let address = server.address();
    let process = |settle| {
        let store = store(&address).budget(FOREVER).settle(settle);
        let cache = builder(store, Tier::Off).build().unwrap();
        let web = Web::new(&cache, origin(&db));
        (cache, web)
    };
    let (early, hasty) = (process(FOREVER), process(Duration::ZERO));
    until_hit(&early.1, "0").await;
    until_hit(&hasty.1, "0").await;
    server.kill();
    let late = process(FOREVER);
    for (cache, web) in [&early, &hasty, &late] {
        web.get(PATH).await;
        until(|| matches!(cache.health(), Health::Down(_))).await;
    }
    // That it cannot be reached at all was seen as well.
    until(|| !late.0.health().to_string().contains("not connected")).await;
    server.restart();
    for (cache, web) in [&early, &hasty, &late] {
        web.get(PATH).await;
        until(|| cache.health() == Health::Ok).await;
    }
    until_hit(&hasty.1, "0").await;
    for (_, web) in [&early, &late] {
        for _ in 0..3 {
            assert!(!web.get(PATH).await.is_hit());
        }
    }
}

/// A cache that is a `static` outlives runtimes.
#[test]
fn a_store_lives_on_in_the_next_runtime() {
    let (server, db) = (Memcached::start(&[]), Db::default());
    let web = Web::new(&builder(patient(&server.address()), Tier::Off).build().unwrap(), origin(&db));
    for _ in 0..3 {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(until_hit(&web, "0"));
    }
}

/// Callers that go away cost neither a connection nor anybody else's answer.
#[tokio::test(flavor = "multi_thread")]
async fn callers_that_go_away_cost_nothing() {
    let (server, db) = (Memcached::start(&[]), Db::default());
    let web = Web::new(&builder(patient(&server.address()), Tier::Off).build().unwrap(), origin(&db));
    until_hit(&web, "0").await;
    let before = server.stat("total_connections");
    for round in 0..2_000 {
        let call = web.get(PATH);
        if round % 3 == 0 {
            let _ = tokio::time::timeout(Duration::from_micros(round % 50), call).await;
        } else {
            assert_eq!(call.await.text(), "0");
        }
    }
    // Each of these questions is a connection of its own.
    assert_eq!(server.stat("total_connections") - before, 1);
}

// ---- what a server takes ---------------------------------------------------------------------------------------------

/// No id and no host is too long or too odd to be a name: least of all may the server take a body for commands.
#[tokio::test(flavor = "multi_thread")]
async fn no_name_is_too_long() {
    let (server, db) = (Memcached::start(&[]), Db::default());
    let web = Web::new(&builder(patient(&server.address()), Tier::Off).build().unwrap(), origin(&db));
    for id in [
        "x".repeat(100),
        "x".repeat(128),
        "%0D%0Aflush_all%0D%0A".repeat(20),
        "%F0%9F%98%80".repeat(60),
        "y".repeat(4_000),
    ] {
        let path = format!("/docs/{id}?q={}", "z".repeat(300));
        assert!(!web.get(&path).await.is_hit(), "{id}");
        assert!(web.get(&path).await.is_hit(), "{id}");
        assert_eq!(web.put(&format!("/docs/{id}")).await.status, 200);
        let reply = web.get(&path).await;
        assert_eq!((reply.text(), reply.is_hit()), (row(&db).as_str(), false), "{id}");
    }
    assert!(server.keys().iter().all(|key| key.len() <= 250));
    assert_eq!(server.stat("cmd_flush"), 0);
}

/// Answers with as many bytes as the path says.
fn sized(request: Request<Full<bytes::Bytes>>) -> Answer {
    let size: usize = request.uri().path().rsplit('/').next().unwrap().parse().unwrap();
    // Noise, which nothing makes smaller.
    let noise: Vec<u8> = std::iter::repeat_with(rand::random).take(size).collect();
    std::future::ready(Ok(Response::new(full(noise))))
}

/// What is too large for the server is a response that is not stored, is counted, and hurts nobody else.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_large_is_not_stored() {
    let server = Memcached::start(&["-I", "64k", "-o", "slab_chunk_max=16384"]);
    let store = patient(&server.address()).build().unwrap();
    let web = Web::new(&over(store.clone(), Tier::Off).build().unwrap(), sized);
    for (size, is_stored) in [(1, true), (40_000, true), (70_000, false), (700_000, false), (60_000, true)] {
        let (path, before) = (format!("/docs/{size}"), store.stats().too_large);
        assert_eq!(web.get(&path).await.body.len(), size);
        until(|| is_stored || store.stats().too_large > before).await;
        // While it is on its way there, others are answered by what is.
        let mut tries = 0;
        let reply = loop {
            let reply = web.get(&path).await;
            tries += 1;
            if reply.is_hit() == is_stored || tries == 100 {
                break reply;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        assert_eq!((reply.body.len(), reply.is_hit()), (size, is_stored), "{size}: {}", reply.cache_status());
    }
    assert!(store.health() == Health::Ok);
}

/// Beyond 30 days memcached takes a time for one since the epoch, and beyond 2038 for one that is over.
#[tokio::test(flavor = "multi_thread")]
async fn times_are_as_long_as_can_be() {
    for days in [31, 36_500] {
        let (server, db) = (Memcached::start(&[]), Db::default());
        let long = Duration::from_secs(days * 86_400);
        let store = patient(&server.address()).generation_ttl(long);
        let cache = builder(store, Tier::Off).fenced(long).build().unwrap();
        let (web, writer) = (Web::new(&cache, origin(&db)), Writer::new(&cache, &db, StatusCode::OK));
        until_hit(&web, "0").await;
        let write = writer.begin().await;
        assert_fenced(&web, "0").await;
        writer.end(write).await;
        until_hit(&web, "1").await;
    }
}

/// Of two processes with different lists neither reads what the other has stored, for neither hears what the other drops.
#[tokio::test(flavor = "multi_thread")]
async fn another_list_of_servers_is_another_cache() {
    let (servers, db) = ([(); 2].map(|()| Memcached::start(&[])), Db::default());
    let [a, b] = servers.each_ref().map(|server| server.address());
    let over_servers = |list: &[&str]| {
        let store = MemcachedStore::builder(list.iter().copied()).settle(Duration::ZERO).budget(FOREVER);
        Web::new(&builder(store, Tier::Off).build().unwrap(), origin(&db))
    };
    let (one, both, turned) = (over_servers(&[&a]), over_servers(&[&a, &b]), over_servers(&[&b, &a]));
    until_hit(&one, "0").await;
    assert!(!both.get(PATH).await.is_hit());
    until_hit(&both, "0").await;
    // The order says nothing.
    assert!(turned.get(PATH).await.is_hit());
}

/// However many there are, and whichever of them has a tenant's entries.
#[tokio::test(flavor = "multi_thread")]
async fn what_several_servers_drop_is_counted() {
    let (servers, db) = ([(); 2].map(|()| Memcached::start(&[])), Db::default());
    let list = servers.each_ref().map(|server| server.address());
    let store = MemcachedStore::builder(list).settle(Duration::ZERO).budget(FOREVER);
    let cache = Cache::builder("test")
        .tenant_header("x-tenant")
        .data_type(DataType::new("doc", Ttl::Standard))
        .route(Route::new("/docs/{doc_id}", "doc"))
        .mutation(Mutation::put("/docs/{doc_id}", "doc"))
        .report_header(true)
        .store(store.build().unwrap());
    let (cache, start) = (cache.build().unwrap(), Instant::now());
    let web = Web::new(&cache, origin(&db));
    for tenant in ["a", "b", "c", "d", "e", "f", "g", "h"] {
        let ask = |method| web.send(web::with(method, PATH, &[("x-tenant", tenant)]));
        while !ask(Method::GET).await.is_hit() {
            assert!(start.elapsed() < FOREVER, "{tenant}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        for count in ["doc=1, total=1", "doc=0, total=0"] {
            assert_eq!(ask(Method::PUT).await.header("cache-invalidated"), count, "{tenant}");
        }
    }
}

/// What the tier forbids, and what has no room, is not held in the process.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_held_in_the_process_is_what_the_tier_says() {
    let server = Memcached::start(&[]);
    for (room, tier, held) in [(8 << 20, Tier::Validated, 1), (8 << 20, Tier::Off, 0), (0, Tier::Validated, 0)] {
        let store = patient(&server.address()).prefix(format!("{room}{tier:?}")).in_process(room).build().unwrap();
        let web = Web::new(&over(store.clone(), tier).build().unwrap(), origin(&Db::default()));
        until_hit(&web, "0").await;
        assert!(web.get(PATH).await.is_hit());
        assert_eq!(store.usage().entries, held, "{room} {tier:?}");
    }
}

#[test]
fn a_prefix_is_short_and_plain() {
    for (prefix, is_good) in
        [("cas", true), (&*"x".repeat(64), true), (&*"x".repeat(65), false), ("", false), ("a b", false), ("ä", false)]
    {
        let error = MemcachedStore::builder(["127.0.0.1:11211"]).prefix(prefix).build().err().map(|e| e.to_string());
        assert_eq!(error.is_none(), is_good, "{prefix}");
        assert!(error.is_none_or(|error| error.contains(&format!("prefix `{prefix}`"))));
    }
}

/// What is held in the process holds nothing else: not what was read from the network together with it.
#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn what_is_held_takes_no_more_than_itself() {
    const ROUNDS: usize = 150;
    let resident = || -> usize {
        let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
        pages.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4_096
    };
    let server = Memcached::start(&[]);
    let filled = Web::new(&builder(patient(&server.address()), Tier::Off).build().unwrap(), sized);
    for size in 10_000..10_000 + ROUNDS {
        while !filled.get(&format!("/docs/{size}")).await.is_hit() {}
    }
    let both = builder(patient(&server.address()), Tier::Validated)
        .data_type(DataType::new("large", Ttl::Standard).tier(Tier::Off))
        .route(Route::new("/large/{large_id}", "large"));
    let web = Web::new(&both.build().unwrap(), sized);
    web.get("/large/800000").await;
    while !web.get("/large/800000").await.is_hit() {}
    let before = resident();
    for size in 10_000..10_000 + ROUNDS {
        assert!(web.get("/large/800000").await.is_hit());
        assert!(web.get(&format!("/docs/{size}")).await.is_hit());
    }
    let taken = resident().saturating_sub(before);
    assert!(taken < 40 << 20, "{taken} bytes");
}

/// A server that says how large an item may be, and does not take one: it is not stored and counted all the same, and no
/// trouble of the store's.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_server_finds_too_large_is_not_stored_either() {
    let server = Memcached::start(&["-I", "64k", "-o", "slab_chunk_max=16384"]);
    let proxy = Proxy::start(server.port).await;
    proxy.set(Mode::Garble("item_size_max 65536", "item_size_max 95536"));
    let store = patient(&proxy.address).build().unwrap();
    let web = Web::new(&over(store.clone(), Tier::Off).build().unwrap(), sized);
    assert_eq!(web.get("/docs/80000").await.body.len(), 80_000);
    until(|| store.stats().too_large == 1).await;
    assert_eq!(store.health(), Health::Ok);
    assert_eq!(web.get("/docs/80000").await.cache_status(), "fwd=uri-miss; stored");
}

/// A server that takes small items and no larger ones is said to be so once, and not at each request anew.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_server_stays_degraded() {
    let server = Memcached::start(&["-M", "-m", "2"]);
    let store = patient(&server.address()).build().unwrap();
    let web = Web::new(&over(store.clone(), Tier::Off).build().unwrap(), sized);
    web.get("/docs/1").await;
    until(|| store.health() == Health::Ok).await;
    let ballast = "x".repeat(20_000);
    while !server
        .command(&format!("set ballast{} 0 0 20000\r\n{ballast}", rand::random::<u64>()))
        .contains("SERVER_ERROR")
    {}
    web.get("/docs/20000").await;
    until(|| matches!(store.health(), Health::Degraded(_))).await;
    for size in [2, 3, 4] {
        assert_eq!(web.get(&format!("/docs/{size}")).await.body.len(), size);
        assert!(matches!(store.health(), Health::Degraded(_)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn purges_drop_everything() {
    let (server, db) = (Memcached::start(&[]), Db::default());
    let cache = builder(patient(&server.address()), Tier::Validated).build().unwrap();
    let web = Web::new(&cache, origin(&db));
    until_hit(&web, "0").await;
    cache.clear().await.unwrap();
    let reply = web.get(PATH).await;
    assert!(!reply.is_hit(), "{}", reply.cache_status());
    until_hit(&web, "0").await;
    until(|| server.keys().iter().any(|name| name.contains(":r:"))).await;
}
