//! What the Redis store promises when something dies, lags or lies: a writer, a connection, the network, Redis itself, or
//! the bytes in it. Two caches on one Redis are two processes here; one that is killed is a real one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/proxy.rs"]
mod proxy;
#[path = "support/redis.rs"]
mod redis;
#[path = "support/web.rs"]
mod web;

use std::{
    io,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use futures_util::FutureExt;
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use proxy::{Mode, Proxy};
use redis::{Redis, number};
use tempfile::TempDir;
use tokio::{sync::Semaphore, task::JoinHandle};
use tower::{Layer, ServiceExt, service_fn};
use tower_cache_aside::{
    Cache, CacheBuilder, CacheTags, Cascade, DataType, GrpcMethod, GrpcTarget, Mutation, OnUnreachable, Route, Tier,
    Ttl,
    store::{Health, RedisBuilder, RedisStore},
};
use web::{Body, Reply, Web, full, ok};

/// What the docs say of the tier in process: two heartbeats.
const BOUND: Duration = Duration::from_millis(500);
/// Longer than any test takes.
const FOREVER: Duration = Duration::from_secs(60);
const PATH: &str = "/docs/1";

/// A store that reads Redis again as soon as it is there: one process alone needs no time to settle.
fn store(url: &str) -> RedisBuilder {
    RedisStore::builder([url]).prefix("faults").in_process(8 << 20).settle(Duration::ZERO)
}

/// One that no busy machine makes miss.
fn patient(url: &str) -> RedisBuilder {
    store(url).budget(FOREVER).heartbeat(FOREVER)
}

fn builder(store: RedisBuilder, tier: Tier) -> CacheBuilder {
    over(store.build().unwrap(), tier)
}

fn over(store: RedisStore, tier: Tier) -> CacheBuilder {
    Cache::builder("test")
        .single_tenant("t")
        .data_type(DataType::new("doc", Ttl::Standard).tier(tier))
        .route(Route::new("/docs/{doc_id}", "doc").vary("accept-encoding"))
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

/// Until it is answered from the cache; and never with anything else than this.
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

/// And until Redis has it: those who come right after the load are answered before that.
async fn until_stored(redis: &Redis, web: &Web, text: &str) -> String {
    until_hit(web, text).await;
    until(|| redis.keys("faults:e:test{t}*").len() == 1).await;
    redis.keys("faults:e:test{t}*").remove(0)
}

async fn until(what: impl Fn() -> bool) {
    let start = Instant::now();
    while !what() {
        assert!(start.elapsed() < FOREVER, "it does not come to that");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// How many `MGET`s, and how many bytes from Redis, ten hits cost; `None` if any was a miss.
async fn ten_hits(redis: &Redis, web: &Web) -> Option<(u64, u64)> {
    // Less those of heartbeats, each of which drops something as well.
    let asks = || {
        let [mget, unlink] = redis.calls(["mget", "unlink"]);
        mget.saturating_sub(unlink)
    };
    let bytes = || number(&redis.command(&["INFO", "stats"]), "total_net_output_bytes:");
    let before = (asks(), bytes());
    for _ in 0..10 {
        if !web.get(PATH).await.is_hit() {
            return None;
        }
    }
    Some((asks() - before.0, bytes() - before.1))
}

/// Until ten hits cost this: the tier in process is used once its tracking connection is there.
async fn until_ten_hits(redis: &Redis, web: &Web, wanted: impl Fn((u64, u64)) -> bool) {
    let start = Instant::now();
    loop {
        let cost = ten_hits(redis, web).await;
        if cost.is_some_and(&wanted) {
            return;
        }
        assert!(start.elapsed() < FOREVER, "{cost:?}");
    }
}

/// Also while it is written: who comes after that waits for another look-up.
#[tokio::test]
async fn who_looks_up_a_key_at_once_shares_it() {
    let (redis, db) = (Redis::start(&[]), Db::default());
    let web = Web::new(&builder(patient(&redis.url()), Tier::Off).build().unwrap(), origin(&db));
    for i in 0..20 {
        let text = i.to_string();
        until_stored(&redis, &web, &text).await;
        // Of heartbeats there may be one in between.
        let [before] = redis.calls(["mget"]);
        let replies = futures_util::future::join_all((0..64).map(|_| web.get(PATH))).await;
        let [after] = redis.calls(["mget"]);
        assert!(after - before <= 4, "{} look-ups for 64 readers", after - before);
        assert!(replies.iter().all(|reply| reply.is_hit() && reply.text() == text), "{replies:?}");
        // Readers before, during and after: those who begin after the write has been acknowledged see it.
        let written = async {
            assert_eq!(web.put(PATH).await.status, 200);
            let after = futures_util::future::join_all((0..8).map(|_| web.get(PATH))).await;
            assert!(after.iter().all(|reply| reply.text() == row(&db)), "{after:?}");
        };
        let reader = async || {
            for _ in 0..20 {
                web.get(PATH).await;
            }
        };
        tokio::join!(futures_util::future::join_all((0..16).map(|_| reader())), written);
    }
}

/// Many fills under one tag prolong it once, and what is dropped and made again is prolonged again.
#[tokio::test]
async fn a_generation_is_prolonged_once() {
    let redis = Redis::start(&[]);
    let web = Web::new(&builder(patient(&redis.url()), Tier::Off).build().unwrap(), origin(&Db::default()));
    let prolonged = || {
        // Less those of heartbeats, each of which drops something as well.
        let [pexpireat, unlink] = redis.calls(["pexpireat", "unlink"]);
        pexpireat.saturating_sub(unlink)
    };
    let lives = || {
        let ttls = redis.keys("faults:g:test{t}*").into_iter().map(|name| redis.command(&["PTTL", &name]));
        ttls.map(|ttl| number(&ttl, ":")).min().unwrap()
    };
    until_stored(&redis, &web, "0").await;
    let before = prolonged();
    for i in 0..20 {
        web.get(&format!("{PATH}?n={i}")).await;
    }
    until(|| redis.keys("faults:e:test{t}*").len() == 21).await;
    // Two generations, and what counts their entries, where time went on.
    let more = prolonged().saturating_sub(before);
    assert!(more <= 8, "{more} for 20 fills");
    assert!(lives() > 1_000_000, "as long as what is stored");
    web.put(PATH).await;
    until_hit(&web, "1").await;
    until(|| lives() > 1_000_000).await;
}

/// Its server is told so of each once, and one that had to go and was made anew by the next fill would live for ever: there are few
/// of these at any time. An entry that is kept for a shorter time does not cut it off.
#[tokio::test]
async fn what_counts_entries_has_an_end() {
    let redis = Redis::start(&[]);
    let web = Web::new(&builder(patient(&redis.url()), Tier::Off).build().unwrap(), |request: Request<_>| {
        let mut response = ok("text");
        if request.uri().query() == Some("short") {
            response.headers_mut().insert("cache-control", "max-age=60".parse().unwrap());
        }
        std::future::ready(Ok(response))
    });
    let fill = async |variant: &str, entries: usize| {
        for doc in 0..400 {
            web.get(&format!("/docs/{doc}?{variant}")).await;
        }
        until(|| redis.keys("faults:e:test{t}*").len() == entries).await;
    };
    let counters = || {
        let names = redis.keys("faults:c:*");
        assert_eq!(names.len(), 401, "of each, and of all");
        names.into_iter().map(|name| (redis.command(&["PTTL", &name]), name)).collect::<Vec<_>>()
    };
    let is_long = |(left, _): &(String, String)| number(left, ":") > 1_000_000;
    fill("long", 400).await;
    assert!(counters().iter().all(is_long));
    fill("short", 800).await;
    assert!(counters().iter().all(is_long), "{:?}", counters());
    for (_, counter) in counters() {
        redis.command(&["DEL", &counter]);
    }
    fill("longer", 1_200).await;
    let endless = counters().iter().filter(|(left, _)| left.starts_with(":-1")).count();
    assert!(endless <= 256, "{endless}");
}

/// What has generations is loaded after one look-up; what has no mark needs all of them first.
#[tokio::test]
async fn a_miss_whose_tags_are_known_asks_once() {
    let redis = Redis::start(&[]);
    let web = Web::new(&builder(patient(&redis.url()), Tier::Off).build().unwrap(), origin(&Db::default()));
    let calls = || redis.calls(["mget", "set"]);
    let stored = until_stored(&redis, &web, "0").await;
    redis.command(&["DEL", &stored]);
    let before = calls();
    assert!(!web.get(PATH).await.is_hit());
    until(|| redis.keys(&stored).len() == 1).await;
    assert_eq!([0, 1].map(|at| calls()[at] - before[at]), [1, 1]);

    web.put(PATH).await;
    let before = calls();
    assert!(!web.get(PATH).await.is_hit());
    until(|| calls()[1] - before[1] == 4).await;
    assert_eq!(calls()[0] - before[0], 2, "two tags and the mark are made, and told");
}

// A writer that dies.

/// Its database is a file; its fences last this long.
fn file_builder(url: &str, lease: Option<Duration>) -> CacheBuilder {
    let builder = builder(patient(url), Tier::Off);
    lease.into_iter().fold(builder, CacheBuilder::fenced)
}

/// Not a test: the process that [`killed`] starts. It commits, and never comes to its invalidation.
#[tokio::test]
async fn the_writer() {
    let Ok(url) = std::env::var("FAULTS_URL") else { return };
    let lease = std::env::var("FAULTS_LEASE").ok().map(|ms| Duration::from_millis(ms.parse().unwrap()));
    let file = std::env::var("FAULTS_FILE").unwrap();
    let web = Web::new(&file_builder(&url, lease).build().unwrap(), move |_| {
        std::fs::write(&file, "new").unwrap();
        std::future::pending::<io::Result<Response<Body>>>()
    });
    // Should the parent be gone.
    let _ = tokio::time::timeout(FOREVER, web.put(PATH)).await;
}

/// Caches the old row, and kills a writer of the new one between its commit and its invalidation.
async fn killed(lease: Option<Duration>) -> (Redis, Web, TempDir) {
    let (redis, dir) = (Redis::start(&[]), TempDir::new().unwrap());
    let file = dir.path().join("row");
    std::fs::write(&file, "old").unwrap();
    let row = file.clone();
    let reader = Web::new(&file_builder(&redis.url(), lease).build().unwrap(), move |_| {
        std::future::ready(std::fs::read(&row).map(ok))
    });
    until_stored(&redis, &reader, "old").await;
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "the_writer", "--nocapture"]).stdout(Stdio::null());
    command.env("FAULTS_URL", redis.url()).env("FAULTS_FILE", &file);
    command.envs(lease.map(|lease| ("FAULTS_LEASE", lease.as_millis().to_string())));
    let mut writer = command.spawn().unwrap();
    until(|| std::fs::read(&file).unwrap() == b"new").await;
    writer.kill().unwrap();
    writer.wait().unwrap();
    (redis, reader, dir)
}

/// What fences are for: this is the one way to be stale that is left without them.
#[tokio::test(flavor = "multi_thread")]
async fn without_a_fence_a_writer_that_dies_leaves_what_is_stale() {
    let (_redis, reader, _dir) = killed(None).await;
    let reply = reader.get(PATH).await;
    assert!(reply.is_hit());
    assert_eq!(reply.text(), "old");
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_a_fence_a_writer_that_dies_leaves_nothing_stale() {
    let (_redis, reader, _dir) = killed(Some(FOREVER)).await;
    assert_fenced(&reader, "new").await;
    // Once the lease has run out, it is stored again.
    let (_redis, reader, _dir) = killed(Some(Duration::from_millis(700))).await;
    until_hit(&reader, "new").await;
}

// Fences.

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
    let (redis, db) = (Redis::start(&[]), Db::default());
    let cache = || builder(patient(&redis.url()), Tier::Off).fenced(FOREVER).build().unwrap();
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

/// Nor does one whose invalidation comes late, by way of its journal.
#[tokio::test(flavor = "multi_thread")]
async fn a_late_invalidation_lifts_no_fence_of_others() {
    let (redis, db) = (Redis::start(&[]), Db::default());
    let proxy = Proxy::start(redis.port).await;
    let cache = |url| builder(store(url).budget(FOREVER), Tier::Off).fenced(FOREVER).build().unwrap();
    let (direct, cut) = (cache(&redis.url()), cache(&proxy.url));
    let (first, late) = (Writer::new(&direct, &db, StatusCode::OK), Writer::new(&cut, &db, StatusCode::OK));
    until_hit(&late.web, "0").await;
    let write = first.begin().await;
    proxy.set(Mode::Cut);
    late.end(late.begin().await).await;
    assert!(cut.health() != Health::Ok);
    proxy.set(Mode::Pass);
    until(|| cut.health() == Health::Ok).await;
    assert_fenced(&first.web, "1").await;
    first.end(write).await;
    until_hit(&first.web, "2").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fence_that_holds_stands_after_the_write() {
    for hold in [FOREVER, Duration::from_millis(300)] {
        let (redis, db) = (Redis::start(&[]), Db::default());
        let builder = builder(patient(&redis.url()), Tier::Off);
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

// The network.

/// Whatever the network does, reads neither fail nor find less than what was written; and it heals.
async fn survives_the_network(tier: Tier) {
    let (redis, db) = (Redis::start(&[]), Db::default());
    let proxy = Proxy::start(redis.port).await;
    let cache = builder(store(&proxy.url), tier).build().unwrap();
    let web = Web::new(&cache, origin(&db));
    let elsewhere = Web::new(&builder(patient(&redis.url()), Tier::Off).build().unwrap(), origin(&db));
    let slow = [5, 40, 150].map(|ms| Mode::Delay(Duration::from_millis(ms)));
    // In the last of them, generations are one byte longer than they say.
    let lies = [Mode::CutShort, Mode::Garble("$16\r\n", "$15\r\n")];
    for mode in slow.into_iter().chain([Mode::Cut, Mode::Hold, Mode::Swallow]).chain(lies) {
        until_hit(&web, &row(&db)).await;
        proxy.set(mode);
        for round in 0..4 {
            // A tier that answers on its own hears of writes elsewhere a little later.
            let writer = if round % 2 == 0 || tier == Tier::On { &web } else { &elsewhere };
            assert_eq!(writer.put(PATH).await.status, 200, "{mode:?}");
            for _ in 0..3 {
                let reply = web.get(PATH).await;
                assert_eq!(reply.text(), row(&db), "{mode:?} {tier:?}: {}", reply.cache_status());
            }
        }
        proxy.set(Mode::Pass);
        until_hit(&web, &row(&db)).await;
        assert!(cache.health() == Health::Ok);
        // What was written without Redis has been told to the others.
        until_hit(&elsewhere, &row(&db)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_network_is_survived() {
    tokio::join!(
        survives_the_network(Tier::Off),
        survives_the_network(Tier::Validated),
        survives_the_network(Tier::On)
    );
}

// What is new.

/// Who is the first to ask for something does not wait until it has a generation, which is made while the load is under way, and
/// nobody else asks for it meanwhile. What is written before it has one is not answered from what was read before that.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_new_is_answered_while_its_generation_is_made() {
    const NEW: &str = "/docs/2";
    const LOADED: &str = "/docs/3";
    for writes in [false, true] {
        let (redis, db, loads) = (Redis::start(&[]), Db::default(), Arc::new(AtomicU64::new(0)));
        let (proxy, gate) = (Proxy::start(redis.port).await, Arc::new(Semaphore::new(0)));
        let (inner, counted, opens) = (origin(&db), loads.clone(), gate.clone());
        let near = builder(patient(&proxy.url), Tier::Off).build().unwrap();
        let web = Web::new(&near, move |request| {
            counted.fetch_add(1, Ordering::SeqCst);
            let (waits, answer, gate) = (request.uri().path() == LOADED, inner(request), opens.clone());
            async move {
                if waits {
                    gate.acquire().await.unwrap().forget();
                }
                answer.await
            }
        });
        let elsewhere = Web::new(&builder(patient(&redis.url()), Tier::Off).build().unwrap(), origin(&db));
        until_hit(&web, "0").await;
        near.settled().await;
        loads.store(0, Ordering::SeqCst);
        let get = |path| {
            let web = web.clone();
            tokio::spawn(async move { web.get(path).await })
        };
        proxy.set(Mode::HoldAt("SET", "doc=2"));
        let first = tokio::time::timeout(FOREVER / 6, get(NEW)).await.expect("it waits for its generation").unwrap();
        assert_eq!((first.text(), first.cache_status()), ("0", "fwd=uri-miss; stored"));
        proxy.holds().await;
        let others: Vec<_> = (0..8).map(|_| get(NEW)).collect();
        if writes {
            assert_eq!(elsewhere.put(NEW).await.status, 200);
            assert_eq!(elsewhere.get(NEW).await.text(), "1");
        }
        proxy.set(Mode::Pass);
        for other in others {
            let other = other.await.unwrap();
            // They may have come before the write, or after it.
            assert!(other.text() == "0" || writes && other.text() == "1", "{}", other.cache_status());
        }
        for _ in 0..2 {
            let last = web.get(NEW).await;
            assert_eq!(last.text(), row(&db), "{}", last.cache_status());
            near.settled().await;
        }
        assert!(web.get(NEW).await.is_hit());
        if !writes {
            assert_eq!(loads.load(Ordering::SeqCst), 1, "loads of one key");
        }
        proxy.set(Mode::HoldAt("SET", "doc=3"));
        let loaded = get(LOADED);
        tokio::time::timeout(FOREVER / 6, proxy.holds()).await.expect("it is made while the load is under way");
        proxy.set(Mode::Pass);
        gate.add_permits(1);
        assert_eq!(loaded.await.unwrap().cache_status(), "fwd=uri-miss; stored");
    }
}

/// Nor does a response wait for the generation of what only it declares.
#[tokio::test(flavor = "multi_thread")]
async fn what_declares_something_new_is_answered_while_its_generation_is_made() {
    const DECLARES: &str = "/docs/1?with=2";
    let (redis, db) = (Redis::start(&[]), Db::default());
    let (proxy, inner) = (Proxy::start(redis.port).await, origin(&db));
    let (cache, loads) = (builder(patient(&proxy.url), Tier::Off).build().unwrap(), Arc::new(AtomicU64::new(0)));
    let counted = loads.clone();
    let web = Web::new(&cache, move |request| {
        let (declares, answer) = (request.uri().query().is_some(), inner(request));
        counted.fetch_add(u64::from(declares), Ordering::SeqCst);
        async move {
            let mut response = answer.await?;
            if declares {
                CacheTags::of(response.extensions_mut()).add("doc", "2");
            }
            Ok::<_, io::Error>(response)
        }
    });
    until_hit(&web, "0").await;
    cache.settled().await;
    proxy.set(Mode::HoldAt("SET", "doc=2"));
    let reply = tokio::time::timeout(FOREVER / 6, web.get(DECLARES)).await.expect("it waits for a generation");
    assert_eq!((reply.text(), reply.cache_status()), ("0", "fwd=uri-miss; stored"));
    proxy.holds().await;
    let others = futures_util::future::join_all((0..8).map(|_| web.get(DECLARES)));
    let (others, ()) = tokio::join!(others, async { proxy.set(Mode::Pass) });
    for other in others {
        assert_eq!(other.text(), "0", "{}", other.cache_status());
    }
    cache.settled().await;
    assert!(web.get(DECLARES).await.is_hit());
    assert_eq!(loads.load(Ordering::SeqCst), 1, "loads of one key");
    assert_eq!(web.put("/docs/2").await.status, 200);
    assert_eq!((web.get(DECLARES).await.text(), web.get(PATH).await.is_hit()), ("1", true));
}

/// So it is for values and gRPC: the load that does not end before its generation is being made ends.
#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_loaded_has_its_generation_made_meanwhile() {
    let (redis, db, gate) = (Redis::start(&[]), Db::default(), Arc::new(Semaphore::new(0)));
    let proxy = Proxy::start(redis.port).await;
    let get = GrpcMethod::read("/docs.Docs/Get", "doc").message(|_| Some(GrpcTarget::new("2")));
    let cache = builder(patient(&proxy.url), Tier::Off).grpc(get).build().unwrap();
    until_hit(&Web::new(&cache, origin(&db)), "0").await;
    cache.settled().await;
    let load = {
        let gate = gate.clone();
        move || {
            let gate = gate.clone();
            async move { gate.acquire().await.unwrap().forget() }
        }
    };
    let waits = load.clone();
    let grpc = cache.grpc_layer().layer(service_fn(move |_: Request<_>| {
        let waits = waits();
        async {
            waits.await;
            let response = Response::builder().header("content-type", "application/grpc").header("grpc-status", "5");
            Ok::<_, io::Error>(response.body(Body::default()).unwrap())
        }
    }));
    let call = Request::post("/docs.Docs/Get").header("content-type", "application/grpc");
    let call = grpc.oneshot(call.body(full(&[0; 5][..])).unwrap());
    let fetch = cache.entry::<u32>("doc", "3").fetch(move || async move {
        load().await;
        Ok::<_, io::Error>(Some(1))
    });
    let fetch = fetch.unwrap().into_future();
    for (new, loading) in
        [("doc=2", async { _ = call.await.unwrap() }.boxed()), ("doc=3", async { _ = fetch.await.unwrap() }.boxed())]
    {
        proxy.set(Mode::HoldAt("SET", new));
        let loading = tokio::spawn(loading);
        tokio::time::timeout(FOREVER / 6, proxy.holds()).await.expect(new);
        proxy.set(Mode::Pass);
        gate.add_permits(1);
        tokio::time::timeout(FOREVER, loading).await.unwrap().unwrap();
    }
}

// The tracking connection.

/// However it dies, what is held in process is not answered from for longer than two heartbeats after a write elsewhere.
#[tokio::test(flavor = "multi_thread")]
async fn a_dead_tracking_connection_is_noticed_within_the_bound() {
    let (redis, db) = (Redis::start(&[]), Db::default());
    let proxy = Proxy::start(redis.port).await;
    let web = Web::new(&builder(store(&proxy.url), Tier::On).build().unwrap(), origin(&db));
    let elsewhere = Web::new(&builder(patient(&redis.url()).in_process(0), Tier::Off).build().unwrap(), origin(&db));
    for kill in [true, true, true, false, false] {
        until_ten_hits(&redis, &web, |(asks, _)| asks == 0).await;
        if kill {
            let clients = redis.command(&["CLIENT", "LIST"]);
            let field = |line: &str, name: &str| line.split(' ').find_map(|f| f.strip_prefix(name)).map(str::to_owned);
            let tracks = |line: &&str| field(line, "flags=").is_some_and(|flags| flags.contains('t'));
            let tracking: Vec<_> = clients.lines().filter(tracks).map(|line| field(line, "id=").unwrap()).collect();
            assert_eq!(tracking.len(), 1, "{clients}");
            assert!(redis.command(&["CLIENT", "KILL", "ID", &tracking[0]]).starts_with(":1"));
        } else {
            proxy.set(Mode::Hold);
        }
        elsewhere.put(PATH).await;
        tokio::time::sleep(BOUND).await;
        for _ in 0..20 {
            assert_eq!(web.get(PATH).await.text(), row(&db), "killed: {kill}");
        }
        proxy.set(Mode::Pass);
        until_hit(&web, &row(&db)).await;
    }
    until_ten_hits(&redis, &web, |(asks, _)| asks == 0).await;
}

// The connection for look-ups.

/// Whoever ends it, and however often: what was dropped meanwhile is not answered, and it is opened again.
#[tokio::test(flavor = "multi_thread")]
async fn look_ups_have_a_connection_that_may_die() {
    for tier in [Tier::Off, Tier::Validated, Tier::On] {
        let (redis, db) = (Redis::start(&[]), Db::default());
        let cache = builder(store(&redis.url()), tier).build().unwrap();
        let web = Web::new(&cache, origin(&db));
        let elsewhere = Web::new(&builder(patient(&redis.url()), Tier::Off).build().unwrap(), origin(&db));
        for _ in 0..5 {
            until_hit(&web, &row(&db)).await;
            // Nobody else asks nothing but the time, or `MGET` last.
            let list = redis.command(&["CLIENT", "LIST"]);
            let is_lane = |line: &&str| ["cmd=mget", "cmd=time"].iter().any(|command| line.contains(command));
            let lanes: Vec<_> = list.lines().filter(is_lane).filter_map(|line| line.split(' ').next()).collect();
            assert!(!lanes.is_empty(), "{list}");
            for id in lanes {
                let id = id.rsplit('=').next().unwrap();
                redis.command(&["CLIENT", "KILL", "ID", id]);
            }
            elsewhere.put(PATH).await;
            if tier == Tier::On {
                tokio::time::sleep(BOUND).await;
            }
            for _ in 0..20 {
                assert_eq!(web.get(PATH).await.text(), row(&db), "{tier:?}");
            }
        }
        until_hit(&web, &row(&db)).await;
        until(|| cache.health() == Health::Ok).await;
    }
}

// Redis itself.

#[tokio::test(flavor = "multi_thread")]
async fn writes_that_cannot_be_invalidated_are_refused_before_they_run() {
    // A fence finds out by itself; without one, the heartbeat does.
    for lease in [None, Some(FOREVER)] {
        let (mut redis, db) = (Redis::start(&[]), Db::default());
        let builder = builder(store(&redis.url()), Tier::On).on_unreachable(OnUnreachable::Reject);
        let cache = lease.into_iter().fold(builder, CacheBuilder::fenced).build().unwrap();
        let web = Web::new(&cache, origin(&db));
        until_hit(&web, "0").await;
        assert_eq!(web.put(PATH).await.text(), "1");
        until_hit(&web, "1").await;
        redis.kill();
        if lease.is_none() {
            until(|| cache.health() != Health::Ok).await;
        }
        for _ in 0..3 {
            let refused = web.put(PATH).await;
            assert_eq!((refused.status, refused.header("retry-after")), (StatusCode::SERVICE_UNAVAILABLE, "1"));
            let read = web.get(PATH).await;
            assert_eq!((read.status, read.text()), (StatusCode::OK, "1"));
        }
        assert_eq!(row(&db), "1", "no handler ran");
        redis.restart();
        until(|| cache.health() == Health::Ok).await;
        assert_eq!(web.put(PATH).await.text(), "2");
        until_hit(&web, "2").await;
    }
}

/// Even when Redis comes back with what it held before, and is believed.
#[tokio::test(flavor = "multi_thread")]
async fn a_write_during_an_outage_is_delivered_before_anything_is_read() {
    for tier in [Tier::Off, Tier::On] {
        let (mut redis, db) = (Redis::start(&["--dbfilename", "old.rdb"]), Db::default());
        let cache = builder(store(&redis.url()), tier).build().unwrap();
        let web = Web::new(&cache, origin(&db));
        until_stored(&redis, &web, "0").await;
        assert!(redis.command(&["SAVE"]).contains("OK"));
        redis.kill();
        assert_eq!(web.put(PATH).await.text(), "1");
        assert!(cache.health() != Health::Ok);
        redis.restart();
        assert_eq!(redis.keys("faults:e:test{t}*").len(), 1, "the entry is back");
        until_hit(&web, "1").await;
        assert!(cache.health() == Health::Ok);
    }
}

// What hits cost.

#[tokio::test(flavor = "multi_thread")]
async fn tiers_ask_for_what_they_say() {
    const BODY: usize = 100_000;
    let redis = Redis::start(&[]);
    let cap = Duration::from_secs(60);
    for (tier, asks, bodies) in
        [(Tier::Off, 10, 10), (Tier::Validated, 10, 0), (Tier::On, 0, 0), (Tier::Capped(cap), 0, 0)]
    {
        let ahead = Arc::new(AtomicU64::new(0));
        let skew = ahead.clone();
        let clock = move || SystemTime::now() + Duration::from_secs(skew.load(Ordering::SeqCst));
        let cache = builder(patient(&redis.url()), tier).clock(clock).build().unwrap();
        let web = Web::new(&cache, |_| {
            let response = Response::builder().header("content-encoding", "gzip");
            std::future::ready(Ok(response.body(full(vec![b'x'; BODY])).unwrap()))
        });
        until_hit(&web, &"x".repeat(BODY)).await;
        until_ten_hits(&redis, &web, |cost| (cost.0, cost.1 / BODY as u64) == (asks, bodies)).await;
        assert_eq!(ten_hits(&redis, &web).await.map(|cost| cost.0), Some(asks), "{tier:?}");
        ahead.store(cap.as_secs() + 1, Ordering::SeqCst);
        // Once the cap is over it is asked for, and held again.
        let asks = if matches!(tier, Tier::Capped(_)) { 1 } else { asks };
        // The heartbeat that is due by this clock is asked in several steps, one of which may fall outside.
        let later = ten_hits(&redis, &web).await.map(|cost| cost.0);
        assert!(later.is_some_and(|later| later.abs_diff(asks) <= 1), "{tier:?}, later: {later:?}");
    }
}

// Bytes.

#[tokio::test(flavor = "multi_thread")]
async fn corrupt_entries_are_misses_and_counted() {
    let read = "local key, entry = KEYS[1], redis.call('GET', KEYS[1])";
    for (damage, counted) in [
        ("redis.call('SET', key, 'garbage')", 1),
        ("redis.call('SET', key, '')", 1),
        ("redis.call('SET', key, string.sub(entry, 1, -2))", 1),
        ("redis.call('SET', key, string.sub(entry, 1, 20))", 1),
        ("redis.call('SET', key, string.sub(entry, 2))", 1),
        ("redis.call('APPEND', key, 'x')", 1),
        ("redis.call('SETRANGE', key, 0, '\\9')", 1),
        ("redis.call('SETBIT', key, 100, 1 - redis.call('GETBIT', key, 100))", 1),
        ("redis.call('DEL', key) redis.call('LPUSH', key, entry)", 0),
    ] {
        let redis = Redis::start(&[]);
        let store = patient(&redis.url()).in_process(0).build().unwrap();
        let web = Web::new(&over(store.clone(), Tier::Off).build().unwrap(), origin(&Db::default()));
        let key = until_stored(&redis, &web, "0").await;
        let reply = redis.command(&["EVAL", &format!("{read} {damage}"), "1", &key]);
        assert!(reply.starts_with("$-1"), "{reply}");
        let reply = web.get(PATH).await;
        assert_eq!((reply.text(), reply.cache_status()), ("0", "fwd=uri-miss; stored"), "{damage}");
        assert_eq!(store.stats().unreadable, counted, "{damage}");
        until_hit(&web, "0").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_shrinks_is_stored_compressed() {
    let text = "the same again and ".repeat(1_000);
    for (name, value, compressed) in [
        ("content-type", "text/plain", true),
        ("content-type", "image/png", false),
        ("content-encoding", "gzip", false),
    ] {
        let redis = Redis::start(&[]);
        let store = patient(&redis.url()).in_process(0).build().unwrap();
        let cache = over(store.clone(), Tier::Off).build().unwrap();
        let body = text.clone();
        let web = Web::new(&cache, move |_| {
            std::future::ready(Ok(Response::builder().header(name, value).body(full(body.clone())).unwrap()))
        });
        let key = until_stored(&redis, &web, &text).await;
        let stats = store.stats();
        assert_eq!(stats.uncompressed, if compressed { text.len() as u64 } else { 0 }, "{value}");
        assert_eq!(stats.compressed < stats.uncompressed / 10, compressed, "{value}");
        let stored: usize = redis.command(&["STRLEN", &key])[1..].lines().next().unwrap().parse().unwrap();
        assert_eq!(stored < text.len(), compressed, "{value}");
    }
}
