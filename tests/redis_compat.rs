//! What the store relies on, on every server that it is tested with, and what it does without. Two caches on one server are
//! two processes here.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/redis.rs"]
mod redis;
#[path = "support/web.rs"]
mod web;

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use http::{Method, StatusCode};
use redis::{Redis, SERVERS};
use tokio::{sync::Semaphore, time::timeout};
use tower_cache_aside::{
    Cache, CacheBuilder, Cascade, Coalesce, DataType, Mutation, OnUnreachable, Route, Tier,
    store::{Health, RedisBuilder, RedisStore},
};
use web::{Web, ok};

const PATIENCE: Duration = Duration::from_secs(20);
const TTL: Duration = Duration::from_secs(3_600);

type Db = Arc<AtomicU64>;

fn store(redis: &Redis) -> RedisBuilder {
    RedisStore::builder([redis.url()]).settle(Duration::ZERO).budget(Duration::from_secs(5))
}

/// Documents, their notes, and lists whose responses say which documents are on them.
fn over(store: RedisBuilder, tier: Tier) -> CacheBuilder {
    let types = ["doc", "note", "list"].map(|name| DataType::new(name, TTL).tier(tier));
    types
        .into_iter()
        .fold(Cache::builder("test").single_tenant("t"), CacheBuilder::data_type)
        .route(Route::new("/docs/{doc_id}", "doc"))
        .route(Route::new("/docs/{doc_id}/notes", "note"))
        .route(Route::new("/lists/{list_id}", "list").declares_tags())
        .mutation(Mutation::put("/docs/{doc_id}", "doc"))
        .cascade(Cascade::new("doc").drops(["note", "list"]))
        .store(store.build().unwrap())
}

fn cache(redis: &Redis, tier: Tier) -> Cache {
    over(store(redis), tier).build().unwrap()
}

/// A process over a row that all share: what is read is how often it was written. Reads wait for the gate.
fn gated(cache: &Cache, db: &Db, gate: &Arc<Semaphore>) -> Web {
    let (db, gate) = (db.clone(), gate.clone());
    Web::new(cache, move |request| {
        let (db, gate) = (db.clone(), gate.clone());
        async move {
            if request.method() == Method::PUT {
                db.fetch_add(1, Ordering::SeqCst);
                return Ok(ok("written"));
            }
            let mut response = ok(db.load(Ordering::SeqCst).to_string());
            if request.uri().path().starts_with("/lists/") {
                response.headers_mut().insert("cache-tag", "doc=1".parse().unwrap());
            }
            gate.acquire().await.unwrap().forget();
            Ok(response)
        }
    })
}

fn process(cache: &Cache, db: &Db) -> Web {
    gated(cache, db, &Arc::new(Semaphore::new(Semaphore::MAX_PERMITS)))
}

async fn until(what: &str, mut done: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !done().await {
        assert!(start.elapsed() < PATIENCE, "{what} does not come about");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn until_hit(web: &Web, path: &str, text: &str) {
    until("a hit", async || {
        let reply = web.get(path).await;
        assert_eq!(reply.text(), text, "{path}: {}", reply.cache_status());
        reply.is_hit()
    })
    .await;
}

async fn until_health(cache: &Cache, says: &str) {
    let start = Instant::now();
    while !cache.health().to_string().contains(says) {
        assert!(start.elapsed() < PATIENCE, "{} does not become {says}", cache.health());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// On one after the other.
async fn on_every_server(args: &[&str], test: impl AsyncFn(Redis)) {
    for server in SERVERS {
        eprintln!("on {server:?}");
        test(Redis::start_server(server, args)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_are_shared_and_fall_with_their_cascade() {
    on_every_server(&[], async |redis| {
        for tier in [Tier::Off, Tier::Validated, Tier::On] {
            let (db, paths) = (Db::default(), ["/docs/1", "/docs/1/notes", "/lists/1"]);
            let caches = [cache(&redis, tier), cache(&redis, tier)];
            let processes = caches.each_ref().map(|cache| process(cache, &db));
            for row in 0..3_u64 {
                for web in &processes {
                    for path in paths {
                        until_hit(web, path, &row.to_string()).await;
                    }
                }
                let report = processes[row as usize % 2].put("/docs/1").await.report.unwrap();
                assert_eq!((report.total(), report.undelivered()), (3, 0), "{tier:?} {report}");
                // Where it is answered without asking, a push may take a moment.
                for web in &processes {
                    until("the new row", async || {
                        let reply = web.get("/docs/1/notes").await;
                        let is_new = reply.text() == (row + 1).to_string();
                        assert!(is_new || tier == Tier::On, "{tier:?}");
                        is_new && web.get("/lists/1").await.text() == reply.text()
                    })
                    .await;
                }
            }
            let last = || redis.command(&["PTTL", "cas:g:test{t}:doc:doc=1"])[1..].lines().next().unwrap().parse();
            until_hit(&processes[0], "/docs/1", "3").await;
            let last: i64 = last().unwrap();
            assert!(last >= TTL.as_millis() as i64 - 60_000, "what is stored needs its generation: {last} ms");
            until_health(&caches[0], "ok").await;
            redis.command(&["FLUSHALL"]);
        }
    })
    .await;
}

/// The race that cache-aside has: a read that a write overtakes stores nothing that is ever served.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_write_overtakes_is_not_served() {
    on_every_server(&[], async |redis| {
        for (tier, path) in [(Tier::Off, "/docs/1"), (Tier::Validated, "/lists/1"), (Tier::On, "/docs/1/notes")] {
            let (db, gate) = (Db::default(), Arc::new(Semaphore::new(0)));
            let (reading, writing) = (cache(&redis, tier), cache(&redis, tier));
            let (reader, writer) = (gated(&reading, &db, &gate), process(&writing, &db));
            until("ok", async || reading.health() == Health::Ok && writing.health() == Health::Ok).await;
            let slow = reader.clone();
            let read = tokio::spawn(async move { slow.get(path).await });
            until("its generation", async || !redis.keys("cas:m:*").is_empty()).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
            assert_eq!(writer.put("/docs/1").await.report.unwrap().undelivered(), 0);
            gate.add_permits(1_000);
            assert_eq!(read.await.unwrap().text(), "0", "it began before");
            until_hit(&reader, path, "1").await;
            redis.command(&["FLUSHALL"]);
        }
    })
    .await;
}

/// A writer that dies behind its fence leaves nothing stale, also for what only responses say that they belong to.
#[tokio::test(flavor = "multi_thread")]
async fn fences_stand_until_their_lease_ends() {
    on_every_server(&[], async |redis| {
        let (db, lease) = (Db::default(), Duration::from_secs(1));
        let fenced = || over(store(&redis), Tier::Off).fenced(lease).build().unwrap();
        let (reading, writing) = (fenced(), fenced());
        let reader = process(&reading, &db);
        until_hit(&reader, "/docs/1", "0").await;
        until_hit(&reader, "/lists/1", "0").await;
        let row = db.clone();
        let writer = Web::new(&writing, move |_| {
            row.fetch_add(1, Ordering::SeqCst);
            std::future::pending()
        });
        let dying = tokio::spawn(async move { writer.put("/docs/1").await });
        until("the commit", async || db.load(Ordering::SeqCst) == 1).await;
        let begin = Instant::now();
        for path in ["/docs/1", "/lists/1"] {
            let reply = reader.get(path).await;
            assert_eq!(reply.text(), "1", "{path}");
            assert!(!reply.is_hit() || begin.elapsed() >= lease, "{path}: {}", reply.cache_status());
        }
        until_hit(&reader, "/docs/1", "1").await;
        until_hit(&reader, "/lists/1", "1").await;
        dying.abort();
        // One that comes back lifts its own.
        let writer = process(&writing, &db);
        assert_eq!(writer.put("/docs/1").await.report.unwrap().undelivered(), 0);
        until_hit(&reader, "/docs/1", "2").await;
        assert_eq!((reading.health(), writing.health()), (Health::Ok, Health::Ok));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_tier_on_answers_alone_and_hears_of_drops() {
    on_every_server(&[], async |redis| {
        let db = Db::default();
        let (reading, writing) = (cache(&redis, Tier::On), cache(&redis, Tier::On));
        let (reader, writer) = (process(&reading, &db), process(&writing, &db));
        for row in 0..3_u64 {
            let text = row.to_string();
            until_hit(&reader, "/docs/1", &text).await;
            until("answers of its own", async || {
                tokio::time::sleep(Duration::from_millis(200)).await;
                assert_eq!(reader.get("/docs/1").await.text(), text);
                redis.signal("-STOP");
                let hit = async || {
                    let reply = timeout(Duration::from_millis(100), reader.get("/docs/1")).await;
                    reply.is_ok_and(|reply| reply.is_hit() && reply.text() == text)
                };
                let alone = hit().await && hit().await && hit().await;
                redis.signal("-CONT");
                alone
            })
            .await;
            writer.put("/docs/1").await;
            tokio::time::sleep(Duration::from_millis(500)).await;
            assert_eq!(reader.get("/docs/1").await.text(), (row + 1).to_string());
        }
        assert_eq!(reading.health(), Health::Ok);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_process_loads_for_all_and_one_clears_for_all() {
    on_every_server(&[], async |redis| {
        let (db, gate, calls) = (Db::default(), Arc::new(Semaphore::new(0)), Db::default());
        let caches = [(); 3].map(|()| {
            let doc = DataType::new("doc", TTL).tier(Tier::Off).coalesce(Coalesce::Fleet);
            let builder = Cache::builder("test").single_tenant("t").data_type(doc);
            builder.route(Route::new("/docs/{doc_id}", "doc")).store(store(&redis).build().unwrap()).build().unwrap()
        });
        let processes = caches.each_ref().map(|cache| {
            let (db, gate, calls) = (db.clone(), gate.clone(), calls.clone());
            Web::new(cache, move |_| {
                let (db, gate, calls) = (db.clone(), gate.clone(), calls.clone());
                async move {
                    calls.fetch_add(1, Ordering::SeqCst);
                    gate.acquire().await.unwrap().forget();
                    Ok(ok(db.load(Ordering::SeqCst).to_string()))
                }
            })
        });
        until("ok", async || caches.iter().all(|cache| cache.health() == Health::Ok)).await;
        let reads = processes.clone().map(|web| tokio::spawn(async move { web.get("/docs/1").await }));
        until("a call", async || calls.load(Ordering::SeqCst) > 0).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        gate.add_permits(1_000);
        for read in reads {
            assert_eq!(read.await.unwrap().text(), "0");
        }
        assert_eq!(calls.load(Ordering::SeqCst), 1);
        db.store(1, Ordering::SeqCst);
        caches[0].clear().await.unwrap();
        for web in &processes {
            until_hit(web, "/docs/1", "1").await;
        }
    })
    .await;
}

/// What others have written under our keys is replaced.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_none_of_ours_is_replaced() {
    on_every_server(&[], async |redis| {
        let (db, cache) = (Db::default(), cache(&redis, Tier::Off));
        let web = process(&cache, &db);
        let (generation, mark) = ("cas:g:test{t}:doc:doc=1", "cas:m:test{t}");
        for foreign in [&["SET", generation, "x"][..], &["LPUSH", generation, "x"], &["LPUSH", mark, "x"]] {
            redis.command(&["FLUSHALL"]);
            redis.command(foreign);
            until_hit(&web, "/docs/1", "0").await;
        }
        assert_eq!(cache.health(), Health::Ok);
    })
    .await;
}

/// One node of a cluster is not a server.
#[tokio::test(flavor = "multi_thread")]
async fn a_single_address_of_a_cluster_is_said_to_be_one() {
    on_every_server(&["--cluster-enabled", "yes"], async |redis| {
        let cache = cache(&redis, Tier::Off);
        assert!(!process(&cache, &Db::default()).get("/docs/1").await.is_hit());
        until_health(&cache, "redis+cluster://").await;
    })
    .await;
}

// What a server does without.

/// What is logged in the meantime.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn what_a_server_lacks_is_logged_once() {
    // Where there is one subscriber alone, a line that a thread without it says first is heard by nobody from then on.
    let _ = tracing::subscriber::set_global_default(tracing_subscriber::registry());
    for (server, args, lacks) in [
        (SERVERS[0], &[][..], "PEXPIREAT GT (a script"),
        (SERVERS[1], &["--rename-command", "HELLO", ""], "RESP3 (tier"),
        (SERVERS[1], &["--rename-command", "INFO", ""], "INFO (it cannot"),
        (SERVERS[4], &[], "nothing that is needed"),
    ] {
        let log = Log::default();
        let into = log.clone();
        let lines = tracing_subscriber::fmt().with_ansi(false).with_writer(move || into.clone()).finish();
        let _guard = tracing::subscriber::set_default(lines);
        let redis = Redis::start_server(server, args);
        let cache = over(store(&redis).assume_one_server(true), Tier::Validated).build().unwrap();
        until("ok", async || cache.health() == Health::Ok).await;
        tokio::time::sleep(Duration::from_millis(700)).await;
        let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
        let said: Vec<_> = log.lines().filter(|line| line.contains("connected to Redis")).collect();
        assert!(said.len() == 1 && said[0].contains(lacks), "{log}");
    }
}

/// Neither is needed by anything.
#[tokio::test(flavor = "multi_thread")]
async fn without_config_and_role_all_works() {
    on_every_server(&["--rename-command", "CONFIG", "", "--rename-command", "ROLE", ""], async |redis| {
        let cache = cache(&redis, Tier::On);
        until_hit(&process(&cache, &Db::default()), "/docs/1", "0").await;
        until_health(&cache, "ok").await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_info_it_is_read_if_it_is_the_only_server() {
    on_every_server(&["--rename-command", "INFO", ""], async |redis| {
        let (db, hidden) = (Db::default(), cache(&redis, Tier::Validated));
        let web = process(&hidden, &db);
        until_health(&hidden, "assume_one_server").await;
        assert!(hidden.health().takes_invalidations() && !web.get("/docs/1").await.is_hit());
        let alone = over(store(&redis).assume_one_server(true), Tier::On).build().unwrap();
        let web = process(&alone, &db);
        until_hit(&web, "/docs/1", "0").await;
        assert_eq!(web.put("/docs/1").await.report.unwrap().undelivered(), 0);
        until_hit(&web, "/docs/1", "1").await;
        until_health(&alone, "ok").await;
    })
    .await;
}

/// Nobody says then what others drop: it is asked for.
#[tokio::test(flavor = "multi_thread")]
async fn without_tracking_the_tier_on_is_validated() {
    for command in ["CLIENT", "HELLO"] {
        on_every_server(&["--rename-command", command, ""], async |redis| {
            let db = Db::default();
            let (on, validated) = (cache(&redis, Tier::On), cache(&redis, Tier::Validated));
            let (reader, writer) = (process(&on, &db), process(&validated, &db));
            for row in 0..3_u64 {
                until_hit(&reader, "/docs/1", &row.to_string()).await;
                writer.put("/docs/1").await;
                assert_eq!(reader.get("/docs/1").await.text(), (row + 1).to_string());
            }
            until_health(&on, command).await;
            assert!(on.health().to_string().starts_with("degraded"), "{}", on.health());
            assert_eq!(validated.health(), Health::Ok, "{command}");
        })
        .await;
    }
}

/// Whether it says so in the answer to `HELLO`, which speaks of `HELLO`, or to what comes after.
#[tokio::test(flavor = "multi_thread")]
async fn a_password_is_asked_for_and_given_in_either_protocol() {
    for args in [&["--requirepass", "secret"][..], &["--requirepass", "secret", "--rename-command", "HELLO", ""]] {
        let redis = Redis::start(args);
        until_health(&cache(&redis, Tier::Off), "check user and password").await;
        let store = RedisStore::builder([redis.url().replace("://", "://:secret@")]).settle(Duration::ZERO);
        let cache = over(store.budget(Duration::from_secs(5)), Tier::Off).build().unwrap();
        until_hit(&process(&cache, &Db::default()), "/docs/1", "0").await;
    }
}

/// Nothing can be fenced, which a fenced cascade says; invalidations arrive.
#[tokio::test(flavor = "multi_thread")]
async fn without_scripts_nothing_is_fenced() {
    for server in &SERVERS[1..] {
        let redis = Redis::start_server(*server, &["--rename-command", "EVAL", ""]);
        let (db, plain) = (Db::default(), cache(&redis, Tier::Validated));
        let fenced = over(store(&redis), Tier::Validated).fenced(PATIENCE).build().unwrap();
        let (reader, writer) = (process(&plain, &db), process(&fenced, &db));
        for row in 0..3_u64 {
            until_hit(&reader, "/docs/1", &row.to_string()).await;
            until_hit(&writer, "/docs/1", &row.to_string()).await;
            assert_eq!(writer.put("/docs/1").await.report.unwrap().undelivered(), 0);
        }
        until_hit(&reader, "/docs/1", "3").await;
        until_health(&fenced, "EVAL").await;
        assert!(fenced.health().takes_invalidations());
        assert_eq!(plain.health(), Health::Ok);
        let strict = over(store(&redis), Tier::Off).fenced(PATIENCE).on_unreachable(OnUnreachable::Reject);
        let strict = strict.build().unwrap();
        until("ok", async || strict.health() == Health::Ok).await;
        assert_eq!(process(&strict, &db).put("/docs/1").await.status, StatusCode::SERVICE_UNAVAILABLE);
        // It is known of the next connection as well.
        redis.command(&["CLIENT", "KILL", "TYPE", "normal"]);
        redis.signal("-STOP");
        until_health(&fenced, "down").await;
        redis.signal("-CONT");
        until_health(&fenced, "EVAL").await;
        // What stands under our keys is replaced without a script, too.
        redis.command(&["LPUSH", "cas:g:test{t}:doc:doc=2", "x"]);
        until_hit(&reader, "/docs/2", "3").await;
    }
    // Before Redis 7.0 nothing else prolongs a generation: what is stored lives for two minutes, and that is said.
    let redis = Redis::start_server(SERVERS[0], &["--rename-command", "EVAL", ""]);
    let cache = cache(&redis, Tier::Validated);
    until_health(&cache, "EVAL").await;
    assert!(cache.health().takes_invalidations());
    until_hit(&process(&cache, &Db::default()), "/docs/1", "0").await;
}

/// What is needed is asked for before anybody needs it, and missed aloud.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_needed_and_missing_is_said() {
    for command in ["SET", "MGET", "PEXPIREAT", "UNLINK", "TIME"] {
        on_every_server(&["--rename-command", command, ""], async |redis| {
            let cache = cache(&redis, Tier::Validated);
            let web = process(&cache, &Db::default());
            until_health(&cache, command).await;
            for _ in 0..3 {
                let reply = web.get("/docs/1").await;
                // Where nothing prolongs a generation, what is stored under it ends with it.
                let is_stored = reply.is_hit() && command != "PEXPIREAT";
                assert!(!is_stored && reply.text() == "0", "{command}: {}", reply.cache_status());
            }
            assert_ne!(cache.health(), Health::Ok, "{command}");
            until_health(&cache, if command == "UNLINK" { "down" } else { "degraded" }).await;
        })
        .await;
    }
    on_every_server(&["--rename-command", "WAIT", ""], async |redis| {
        let cache = over(store(&redis).replicas(1), Tier::Validated).build().unwrap();
        until_health(&cache, "WAIT").await;
        assert!(!cache.health().takes_invalidations());
    })
    .await;
}

/// Heartbeats are in order, and what requests ask is refused: that is no health either, until it is over.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_to_requests_alone_is_said() {
    on_every_server(&[], async |redis| {
        let user = |rights: &[&str]| {
            let reply = redis.command(&[&["ACL", "SETUSER", "agents"][..], rights].concat());
            assert!(reply.starts_with("+OK"), "{reply}");
        };
        user(&["on", ">secret", "+@all", "~cas:?:{~}"]);
        let store = RedisStore::builder([redis.url().replace("://", "://agents:secret@")]).settle(Duration::ZERO);
        let cache = over(store.budget(Duration::from_secs(5)), Tier::Validated).build().unwrap();
        let web = process(&cache, &Db::default());
        until_health(&cache, "ok").await;
        for rights in [&[][..], &["~cas:m:*", "~cas:g:*"]] {
            user(rights);
            assert!(!web.get("/docs/1").await.is_hit());
            until_health(&cache, "permissions").await;
            assert!(cache.health().takes_invalidations());
        }
        user(&["~cas:*"]);
        until_hit(&web, "/docs/1", "0").await;
        until_health(&cache, "ok").await;
    })
    .await;
}
