//! Which server one talks to, what its answers mean, and what outlives a process: real masters, replicas and sentinels of
//! users with few rights, against the promises of the Redis store. Two caches on one Redis are two processes here.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/proxy.rs"]
mod proxy;
#[path = "support/redis.rs"]
mod redis;
#[path = "support/web.rs"]
mod web;

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use http::{Method, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, Full, StreamBody};
use proxy::{Mode, Proxy};
use redis::Redis;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinHandle,
};
use tower::{Layer, ServiceExt, service_fn};
use tower_cache_aside::{
    Admin, Cache, CacheBuilder, Cascade, DataType, GrpcMethod, GrpcTarget, Mutation, OnUnreachable, Route, Tier,
    store::{Health, RedisStore},
};
use web::{Reply, Web, ok};

const PATIENCE: Duration = Duration::from_secs(20);
const TTL: Duration = Duration::from_secs(3_600);

type Db = Arc<AtomicU64>;

fn builder(url: &str, tier: Tier) -> CacheBuilder {
    lasting(url, tier, TTL)
}

fn lasting(url: &str, tier: Tier, ttl: Duration) -> CacheBuilder {
    let store = RedisStore::builder([url]).settle(Duration::ZERO).budget(Duration::from_secs(5));
    Cache::builder("test")
        .single_tenant("t")
        .data_type(DataType::new("doc", ttl).tier(tier))
        .route(Route::new("/docs/{doc_id}", "doc"))
        .mutation(Mutation::put("/docs/{doc_id}", "doc"))
        .store(store.build().unwrap())
}

/// A process over a row that all share: what is read is how often it was written.
fn process(cache: &Cache, db: &Db) -> Web {
    let db = db.clone();
    Web::new(cache, move |request| {
        if request.method() == Method::PUT {
            db.fetch_add(1, Ordering::SeqCst);
        }
        std::future::ready(match request.uri().path() {
            "/docs/none" => Err(std::io::Error::other("there is none")),
            _ => Ok(ok(db.load(Ordering::SeqCst).to_string())),
        })
    })
}

async fn until(what: &str, mut done: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !done().await {
        assert!(start.elapsed() < PATIENCE, "{what} does not come about");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn until_hit(web: &Web, text: &str) {
    until("a hit", async || {
        let reply = web.get("/docs/1").await;
        assert_eq!(reply.text(), text, "{}", reply.cache_status());
        reply.is_hit()
    })
    .await;
}

async fn until_health(cache: &Cache, says: &str) {
    until(says, async || cache.health().to_string().contains(says)).await;
}

fn follow(replica: &Redis, master: &Redis) {
    replica.command(&["REPLICAOF", "127.0.0.1", &master.port.to_string()]);
}

async fn until_synced(replica: &Redis) {
    until("the replica", async || {
        let info = replica.command(&["INFO", "replication"]);
        info.contains("role:slave") && info.contains("master_link_status:up")
    })
    .await;
}

/// Promoted, written to, and the old master promoted again without a restart: what it held from before is not read.
#[tokio::test(flavor = "multi_thread")]
async fn a_failover_and_back_brings_nothing_back() {
    for tier in [Tier::Off, Tier::Validated, Tier::On] {
        let (a, b, db) = (Redis::start(&[]), Redis::start(&[]), Db::default());
        let cache = builder(&a.url(), tier).build().unwrap();
        let reader = process(&cache, &db);
        until_hit(&reader, "0").await;
        follow(&b, &a);
        until_synced(&b).await;
        b.command(&["REPLICAOF", "NO", "ONE"]);
        let writer = process(&builder(&b.url(), tier).build().unwrap(), &db);
        until_hit(&writer, "0").await;
        assert_eq!(writer.put("/docs/1").await.text(), "1");
        // B is gone before A hears of it.
        drop(b);
        a.command(&["REPLICAOF", "127.0.0.1", "1"]);
        until_health(&cache, "replica").await;
        assert_eq!(reader.get("/docs/1").await.text(), "1", "{tier:?}");
        a.command(&["REPLICAOF", "NO", "ONE"]);
        until("ok", async || cache.health() == Health::Ok).await;
        until_hit(&reader, "1").await;
    }
}

/// A server that answers and takes no writes is as good as none, says so, and why; with `Reject` no write runs.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_refuses_writes_is_not_believed() {
    for (begin, end, says) in [
        (&["REPLICAOF", "127.0.0.1", "1"][..], &["REPLICAOF", "NO", "ONE"][..], "replica"),
        (
            &["CONFIG", "SET", "min-replicas-to-write", "1"],
            &["CONFIG", "SET", "min-replicas-to-write", "0"],
            "NOREPLICAS",
        ),
        (&["ACL", "SETUSER", "default", "-@write"], &["ACL", "SETUSER", "default", "+@all"], "ACL"),
    ] {
        let (redis, db) = (Redis::start(&[]), Db::default());
        let url = redis.url();
        let cache = builder(&url, Tier::Validated).build().unwrap();
        let strict = builder(&url, Tier::Validated).on_unreachable(OnUnreachable::Reject).build().unwrap();
        let (web, rejecting) = (process(&cache, &db), process(&strict, &db));
        until_hit(&web, "0").await;
        until_hit(&rejecting, "0").await;
        redis.command(begin);
        until_health(&cache, says).await;
        until_health(&strict, says).await;
        assert!(!strict.health().takes_invalidations(), "{says}");
        assert_eq!(rejecting.put("/docs/1").await.status, StatusCode::SERVICE_UNAVAILABLE, "{says}");
        let written = web.put("/docs/1").await;
        assert_eq!((written.status, written.report.unwrap().undelivered()), (StatusCode::OK, 1), "{says}");
        for web in [&web, &rejecting] {
            assert_eq!(web.get("/docs/1").await.text(), "1", "{says}");
        }
        redis.command(end);
        until("ok", async || cache.health() == Health::Ok && strict.health() == Health::Ok).await;
        until_hit(&web, "1").await;
        until_hit(&rejecting, "1").await;
    }
}

/// It takes no entries, but invalidations: that is not well either, and is said.
#[tokio::test(flavor = "multi_thread")]
async fn what_keeps_entries_out_is_said() {
    let (redis, db) = (Redis::start(&[]), Db::default());
    let cache = builder(&redis.url(), Tier::On).build().unwrap();
    let web = process(&cache, &db);
    until_hit(&web, "0").await;
    redis.command(&["CONFIG", "SET", "maxmemory", "1"]);
    until_health(&cache, "maxmemory-policy").await;
    assert!(cache.health().takes_invalidations());
    redis.command(&["CONFIG", "SET", "maxmemory", "0"]);
    until("ok", async || cache.health() == Health::Ok).await;
    // Without the right to CLIENT nothing is answered without asking; without INFO nothing at all.
    redis.command(&["ACL", "SETUSER", "default", "-client"]);
    let untracked = builder(&redis.url(), Tier::On).build().unwrap();
    until_hit(&process(&untracked, &db), "0").await;
    until_health(&untracked, "permission").await;
    redis.command(&["ACL", "SETUSER", "default", "+@all", "-info"]);
    until_health(&cache, "INFO").await;
    assert!(!web.get("/docs/1").await.is_hit());
    // Its writes are everybody's all the same.
    assert_eq!(web.put("/docs/1").await.report.unwrap().undelivered(), 0);
}

/// Clients that hang up are no evidence about the server.
#[tokio::test(flavor = "multi_thread")]
async fn callers_that_go_away_cost_no_connection() {
    let (redis, db) = (Redis::start(&[]), Db::default());
    let cache = builder(&redis.url(), Tier::Off).build().unwrap();
    let web = process(&cache, &db);
    until_hit(&web, "0").await;
    let connections =
        || redis.command(&["INFO", "stats"]).lines().find(|l| l.starts_with("total_conn")).unwrap().to_owned();
    let before: u64 = connections().split(':').nth(1).unwrap().parse().unwrap();
    for _ in 0..50 {
        let request = web.start(web::request(Method::GET, "/docs/1"));
        tokio::select! { biased; _ = request => {}, () = tokio::task::yield_now() => {} }
    }
    assert!(web.get("/docs/1").await.is_hit());
    let after: u64 = connections().split(':').nth(1).unwrap().parse().unwrap();
    assert_eq!(after - before, 1, "none but the one that asks");
}

/// No clock of one machine prolongs an entry on another.
#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_is_wrong_prolongs_nothing() {
    for tier in [Tier::Off, Tier::Validated, Tier::On] {
        let (redis, db) = (Redis::start(&[]), Db::default());
        let ahead = || SystemTime::now() + Duration::from_secs(60);
        let ttl = Duration::from_secs(2);
        let wrong = process(&lasting(&redis.url(), tier, ttl).clock(ahead).build().unwrap(), &db);
        let right = process(&lasting(&redis.url(), tier, ttl).build().unwrap(), &db);
        until_hit(&wrong, "0").await;
        until_hit(&right, "0").await;
        // Nobody tells.
        db.store(7, Ordering::SeqCst);
        let start = Instant::now();
        until("the end of the entry", async || right.get("/docs/1").await.text() == "7").await;
        assert!(start.elapsed() < ttl + Duration::from_secs(1), "{tier:?}");
    }
}

/// An id that is asked for, and is not there, leaves nothing for long.
#[tokio::test(flavor = "multi_thread")]
async fn ids_that_are_probed_leave_nothing_durable() {
    let (redis, db) = (Redis::start(&[]), Db::default());
    let web = process(&builder(&redis.url(), Tier::Validated).build().unwrap(), &db);
    until_hit(&web, "0").await;
    let _ = web.try_send(web::request(Method::GET, "/docs/none")).await;
    let left = |key: &str| redis.command(&["PTTL", key])[1..].lines().next().unwrap().parse::<i64>().unwrap();
    let probed = left("cas:g:test{t}:doc:doc=none");
    // Its generation is made beside the load: where that was over before, there is none.
    assert!(probed == -2 || (1..=120_000).contains(&probed), "{probed} ms");
    assert!(left("cas:g:test{t}:doc:doc=1") >= TTL.as_millis() as i64 - 60_000, "what is stored needs its generation");
}

/// What the store was not told is told before the process ends, or said to be lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_delivers_what_is_in_the_journal() {
    let (mut redis, db) = (Redis::start(&[]), Db::default());
    let cache = builder(&redis.url(), Tier::Validated).build().unwrap();
    let web = process(&cache, &db);
    until_hit(&web, "0").await;
    redis.kill();
    assert_eq!(web.put("/docs/1").await.report.unwrap().undelivered(), 1);
    assert_eq!(cache.drain(Duration::from_millis(100)).await.undelivered, 1);
    redis.restart();
    assert_eq!(cache.drain(PATIENCE).await.undelivered, 0);
}

/// A cache that is a `static` outlives runtimes.
#[test]
fn a_store_lives_on_in_the_next_runtime() {
    let (redis, db) = (Redis::start(&[]), Db::default());
    let cache = builder(&redis.url(), Tier::On).build().unwrap();
    let web = process(&cache, &db);
    for _ in 0..3 {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(until_hit(&web, "0"));
    }
}

/// Old and new code side by side: neither reads what the other stored, and a write through either drops both.
#[tokio::test(flavor = "multi_thread")]
async fn versions_share_invalidations_and_no_entries() {
    for tier in [Tier::Off, Tier::Validated, Tier::On] {
        let (redis, db) = (Redis::start(&[]), Db::default());
        let version = |v: &str| process(&builder(&redis.url(), tier).version(v).build().unwrap(), &db);
        let (old, new, same) = (version("1"), version("2"), version("2"));
        until_hit(&old, "0").await;
        assert!(!new.get("/docs/1").await.is_hit(), "{tier:?}");
        until_hit(&new, "0").await;
        // A hit may be what another request has just brought, and is about to store.
        until("both entries", async || redis.keys("cas:e:test*").len() == 2).await;
        assert!(same.get("/docs/1").await.is_hit(), "{tier:?}");
        for (writer, text) in [(&old, "1"), (&new, "2")] {
            assert_eq!(writer.put("/docs/1").await.text(), text);
            // Where it is answered without asking, a push may take a moment.
            until("the new row", async || old.get("/docs/1").await.text() == text).await;
            until("the new row", async || new.get("/docs/1").await.text() == text).await;
            until_hit(&old, text).await;
            until_hit(&new, text).await;
        }
    }
}

/// A list that declares what is on it, and a write that drops the lists of what it changes.
fn lists(url: &str, lease: Duration) -> Cache {
    let store = RedisStore::builder([url]).settle(Duration::ZERO).budget(Duration::from_secs(5)).build().unwrap();
    let types = ["doc", "list"].map(|name| DataType::new(name, TTL).tier(Tier::Off));
    let builder = types.into_iter().fold(Cache::builder("test").single_tenant("t"), CacheBuilder::data_type);
    let lists = Route::new("/lists/{list_id}", "list").declares_tags();
    let builder = builder.route(Route::new("/docs/{doc_id}", "doc")).route(lists).fenced(lease);
    let cascade = Cascade::new("doc").drops(["list"]);
    builder.mutation(Mutation::put("/docs/{doc_id}", "doc")).cascade(cascade).store(store).build().unwrap()
}

/// Reads the row, and answers when it may.
fn slow_lists(cache: &Cache, db: &Db, entered: &Arc<Semaphore>, gate: &Arc<Semaphore>) -> Web {
    let (db, entered, gate) = (db.clone(), entered.clone(), gate.clone());
    Web::new(cache, move |_| {
        let (db, entered, gate) = (db.clone(), entered.clone(), gate.clone());
        async move {
            let row = db.load(Ordering::SeqCst).to_string();
            entered.add_permits(1);
            gate.acquire().await.unwrap().forget();
            let mut response = ok(row);
            response.headers_mut().insert("cache-tag", "doc=1".parse().unwrap());
            Ok(response)
        }
    })
}

/// A write that has committed, and never answers.
async fn commits_and_hangs(cache: &Cache, db: &Db) -> JoinHandle<Reply> {
    let written = db.clone();
    let writer = Web::new(cache, move |_| {
        written.store(1, Ordering::SeqCst);
        std::future::pending()
    });
    let dying = tokio::spawn(async move { writer.put("/docs/1").await });
    until("the commit", async || db.load(Ordering::SeqCst) == 1).await;
    dying
}

/// A read that began before a write which died behind its fence stores its old row nowhere, though only its response says
/// what it belongs to, and the lease is over when it does.
#[tokio::test(flavor = "multi_thread")]
async fn a_fence_outlives_reads_from_before_it() {
    let (redis, db) = (Redis::start(&[]), Db::default());
    let (entered, gate) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
    let cache = lists(&redis.url(), Duration::from_millis(300));
    let reader = slow_lists(&cache, &db, &entered, &gate);
    until("ok", async || cache.health() == Health::Ok).await;
    let slow = reader.clone();
    let read = tokio::spawn(async move { slow.get("/lists/1").await });
    entered.acquire().await.unwrap().forget();
    let dying = commits_and_hangs(&lists(&redis.url(), Duration::from_millis(300)), &db).await;
    until("the end of the lease", async || !is_fenced(&redis)).await;
    gate.add_permits(1000);
    assert_eq!(read.await.unwrap().text(), "0", "it began before");
    for _ in 0..3 {
        assert_eq!(reader.get("/lists/1").await.text(), "1");
    }
    dying.abort();
}

/// Nor does one that began behind it, before the commit.
#[tokio::test(flavor = "multi_thread")]
async fn a_fence_outlives_reads_from_behind_it() {
    let (redis, db) = (Redis::start(&[]), Db::default());
    let (entered, gate) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
    let (begun, commit) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
    let [reading, writing] = [(); 2].map(|()| lists(&redis.url(), Duration::from_secs(1)));
    let reader = slow_lists(&reading, &db, &entered, &gate);
    until("ok", async || reading.health() == Health::Ok && writing.health() == Health::Ok).await;
    let (begins, commits, row) = (begun.clone(), commit.clone(), db.clone());
    let writer = Web::new(&writing, move |_| {
        let (begun, commit, db) = (begins.clone(), commits.clone(), row.clone());
        async move {
            begun.add_permits(1);
            commit.acquire().await.unwrap().forget();
            db.store(1, Ordering::SeqCst);
            std::future::pending().await
        }
    });
    let dying = tokio::spawn(async move { writer.put("/docs/1").await });
    begun.acquire().await.unwrap().forget();
    let slow = reader.clone();
    let read = tokio::spawn(async move { slow.get("/lists/1").await });
    entered.acquire().await.unwrap().forget();
    assert!(is_fenced(&redis), "the fence stands");
    commit.add_permits(1);
    until("the end of the lease", async || !is_fenced(&redis)).await;
    gate.add_permits(1000);
    assert_eq!(read.await.unwrap().text(), "0", "it began before");
    for _ in 0..3 {
        assert_eq!(reader.get("/lists/1").await.text(), "1");
    }
    dying.abort();
}

/// Whether the tag of the row is there, as a fence leaves it, and nothing else does in these tests.
fn is_fenced(redis: &Redis) -> bool {
    !redis.keys("cas:g:test*list*doc*").is_empty()
}

/// Behind a fence no call is shared, though only its response names what is fenced: a write that is acknowledged and not
/// delivered has nothing else to stand for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_fence_stands_for_a_write_that_is_not_delivered() {
    let (redis, db) = (Arc::new(Redis::start(&[])), Db::default());
    redis.command(&["ACL", "SETUSER", "writer", "on", ">secret", "~*", "&*", "+@all"]);
    let (entered, gate) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
    let (begun, commit) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
    let [reading, writing] =
        [redis.url(), redis.url().replace("://", "://writer:secret@")].map(|url| lists(&url, PATIENCE));
    let reader = slow_lists(&reading, &db, &entered, &gate);
    until("ok", async || reading.health() == Health::Ok && writing.health() == Health::Ok).await;
    let (begins, commits, row, server) = (begun.clone(), commit.clone(), db.clone(), redis.clone());
    let writer = Web::new(&writing, move |_| {
        let (begun, commit, db, redis) = (begins.clone(), commits.clone(), row.clone(), server.clone());
        async move {
            begun.add_permits(1);
            commit.acquire().await.unwrap().forget();
            db.store(1, Ordering::SeqCst);
            redis.command(&["ACL", "SETUSER", "writer", "-eval"]);
            Ok(ok("written"))
        }
    });
    let write = tokio::spawn(async move { writer.put("/docs/1").await });
    begun.acquire().await.unwrap().forget();
    let get = |web: Web| tokio::spawn(async move { web.get("/lists/1").await });
    let before = get(reader.clone());
    entered.acquire().await.unwrap().forget();
    commit.add_permits(1);
    assert_eq!(write.await.unwrap().status, StatusCode::OK);
    assert_ne!(writing.health(), Health::Ok, "it is not delivered");
    let after = get(reader.clone());
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(entered.available_permits(), 0, "it waits for the call of the other");
    gate.add_permits(1000);
    assert_eq!(before.await.unwrap().text(), "0");
    assert_eq!(after.await.unwrap().text(), "1");
}

/// A read that began before the fence, and stores what it has read while that stands, does not prolong it: once the lease of
/// a dead writer is over, what is read is stored again.
#[tokio::test(flavor = "multi_thread")]
async fn a_fill_prolongs_no_fence() {
    let (redis, db) = (Redis::start(&[]), Db::default());
    let (entered, gate) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
    let cache = lists(&redis.url(), Duration::from_secs(1));
    let reader = slow_lists(&cache, &db, &entered, &gate);
    until("ok", async || cache.health() == Health::Ok).await;
    let slow = reader.clone();
    let read = tokio::spawn(async move { slow.get("/docs/1").await });
    entered.acquire().await.unwrap().forget();
    let dying = commits_and_hangs(&cache, &db).await;
    gate.add_permits(1000);
    assert_eq!(read.await.unwrap().text(), "0", "it began before");
    until("what it has stored", async || !redis.keys("cas:e:test*").is_empty()).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    until_hit(&reader, "1").await;
    dying.abort();
}

/// The drop of generations and of the mark is one step: a connection that breaks after the script has left none half done.
#[tokio::test(flavor = "multi_thread")]
async fn a_fenced_invalidation_is_one_step() {
    let (redis, db) = (Redis::start(&[]), Db::default());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("redis://{}", listener.local_addr().unwrap());
    let (port, armed) = (redis.port, Arc::new(AtomicBool::new(false)));
    let cuts = armed.clone();
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            let armed = cuts.clone();
            tokio::spawn(async move {
                let far = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
                let ((mut near_in, mut near_out), (mut far_in, mut far_out)) = (near.into_split(), far.into_split());
                let back = async { drop(tokio::io::copy(&mut far_in, &mut near_out).await) };
                let forth = async {
                    let mut buffer = vec![0; 1 << 16];
                    while let Ok(size @ 1..) = near_in.read(&mut buffer).await {
                        let bytes = &buffer[..size];
                        let find = |from: usize, what: &[u8]| {
                            bytes[from..].windows(what.len()).position(|w| w == what).map(|at| from + at)
                        };
                        // Up to the command that follows the script, and nothing more, ever.
                        let after = find(0, b"EVAL")
                            .and_then(|at| find(at, b"$6\r\nUNLINK"))
                            .filter(|_| armed.load(Ordering::SeqCst));
                        let end = after.and_then(|at| bytes[..at].iter().rposition(|b| *b == b'*')).unwrap_or(size);
                        if far_out.write_all(&bytes[..end]).await.is_err() || end < size {
                            break;
                        }
                    }
                };
                tokio::select! { () = back => {}, () = forth => {} }
            });
        }
    });
    let (entered, gate) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(1000)));
    let direct = lists(&redis.url(), PATIENCE);
    until("ok", async || direct.health() == Health::Ok).await;
    let reader = slow_lists(&direct, &db, &entered, &gate);
    let cut = lists(&url, PATIENCE);
    until("ok", async || cut.health() == Health::Ok).await;
    let mark = "cas:m:test{t}";
    let armed_in = armed.clone();
    let (redis, probe) = (Arc::new(redis), reader.clone());
    let seen = redis.clone();
    let writer = Web::new(&cut, move |_| {
        let (armed, probe, redis) = (armed_in.clone(), probe.clone(), seen.clone());
        async move {
            // While the write is under way a read takes the mark; the fence is up, and what follows is cut.
            probe.get("/lists/1").await;
            assert!(redis.command(&["EXISTS", mark]).starts_with(":1"));
            armed.store(true, Ordering::SeqCst);
            Ok(ok("written"))
        }
    });
    let write = tokio::spawn(async move { writer.put("/docs/1").await });
    until("the script", async || armed.load(Ordering::SeqCst) && redis.keys("cas:f:test*").is_empty()).await;
    assert!(redis.command(&["EXISTS", mark]).starts_with(":0"), "the mark fell with the generations");
    armed.store(false, Ordering::SeqCst);
    assert_eq!(write.await.unwrap().status, StatusCode::OK);
}

/// A fence that is raised while everything is dropped stands: between the look at a tag and its drop it does, too, and when all that
/// comes of the drop is that the connection breaks.
#[tokio::test(flavor = "multi_thread")]
async fn a_fence_outlives_what_is_cleared_beside_it() {
    for breaks in [false, true] {
        let (redis, db) = (Redis::start(&[]), Db::default());
        let proxy = Proxy::start(redis.port).await;
        let (clearing, cache) = (lists(&proxy.url, PATIENCE), lists(&redis.url(), PATIENCE));
        let web = process(&cache, &db);
        for cache in [&clearing, &cache] {
            until("ok", async || cache.health() == Health::Ok).await;
        }
        until_hit(&web, "0").await;
        // Of a tag: heartbeats unlink as well.
        proxy.set(Mode::HoldAt("UNLINK", "cas:g:test"));
        let clears = clearing.clone();
        let cleared = tokio::spawn(async move { clears.clear().await });
        proxy.holds().await;
        let dying = commits_and_hangs(&cache, &db).await;
        proxy.set(if breaks { Mode::CutShort } else { Mode::Pass });
        assert_eq!(cleared.await.unwrap().is_err(), breaks);
        proxy.set(Mode::Pass);
        until("delivered", async || clearing.health() == Health::Ok).await;
        for _ in 0..3 {
            let seen = web.get("/docs/1").await;
            assert_eq!((seen.text(), seen.is_hit()), ("1", false), "nothing is stored of what is being written");
        }
        dying.abort();
    }
}

/// Whatever was loaded before everything was dropped: also what gets its generation between the look at those that there are, and the
/// drop of the mark that it is to be proven by.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_from_before_outlives_that_everything_is_dropped() {
    let (redis, db) = (Redis::start(&[]), Db::default());
    let (near, far) = (Proxy::start(redis.port).await, Proxy::start(redis.port).await);
    let patient = |url| lists(url, PATIENCE);
    let (clearing, reading) = (patient(&near.url), patient(&far.url));
    let web = process(&reading, &db);
    for cache in [&clearing, &reading] {
        until("ok", async || cache.health() == Health::Ok).await;
    }
    until_hit(&web, "0").await;
    reading.settled().await;
    // The first of its type: nothing of it has a generation.
    far.set(Mode::HoldAt("SET", "cas:g:test"));
    assert_eq!(web.get("/lists/1").await.cache_status(), "fwd=uri-miss; stored");
    far.holds().await;
    // Nobody tells which row that is.
    db.store(1, Ordering::SeqCst);
    near.set(Mode::HoldAt("UNLINK", "cas:m:test"));
    let cleared = tokio::spawn(async move { clearing.clear().await });
    near.holds().await;
    far.set(Mode::Pass);
    reading.settled().await;
    assert_eq!(web.get("/lists/1").await.text(), "0", "its generation is there, and so is the mark");
    near.set(Mode::Pass);
    cleared.await.unwrap().unwrap();
    assert_eq!(web.get("/lists/1").await.text(), "1");
}

/// An invalidation that too few replicas have is not acknowledged yet.
#[tokio::test(flavor = "multi_thread")]
async fn an_invalidation_may_wait_for_replicas() {
    let (master, db) = (Redis::start(&[]), Db::default());
    let store = RedisStore::builder([master.url()]).replicas(1).settle(Duration::ZERO).budget(Duration::from_secs(5));
    let builder = Cache::builder("test").single_tenant("t").data_type(DataType::new("doc", TTL));
    let builder = builder.route(Route::new("/docs/{doc_id}", "doc")).mutation(Mutation::put("/docs/{doc_id}", "doc"));
    let cache = builder.store(store.build().unwrap()).build().unwrap();
    let web = process(&cache, &db);
    until_hit(&web, "0").await;
    let written = web.put("/docs/1").await;
    assert_eq!((written.text(), written.report.as_ref().unwrap().undelivered()), ("1", 1));
    assert!(cache.health().to_string().contains("0 of 1 replicas"), "{}", cache.health());
    let replica = Redis::start(&[]);
    follow(&replica, &master);
    until_synced(&replica).await;
    until("ok", async || cache.health() == Health::Ok).await;
    until_hit(&web, "1").await;
    assert_eq!(web.put("/docs/1").await.report.unwrap().undelivered(), 0);
    assert!(replica.keys("cas:g:test{t}:doc:doc=1").is_empty(), "it has the drop as well");
}

/// A process of the code that knows which team a document belongs to, or of the one before it.
async fn ask(cache: &Cache, db: &Db) -> (String, bool) {
    let row = db.load(Ordering::SeqCst).to_string();
    let inner = service_fn(move |_: http::Request<_>| {
        let mut trailers = http::HeaderMap::new();
        trailers.insert("grpc-status", "0".parse().unwrap());
        let message = [&[0, 0, 0, 0, row.len() as u8], row.as_bytes()].concat();
        let frames = [Frame::data(Bytes::from(message)), Frame::trailers(trailers)].map(Ok::<_, Infallible>);
        std::future::ready(Ok::<_, Infallible>(http::Response::new(StreamBody::new(futures_util::stream::iter(
            frames,
        )))))
    });
    let request = http::Request::post("/docs.v1.Docs/Get").header("content-type", "application/grpc");
    let request = request.body(Full::new(Bytes::from_static(&[0, 0, 0, 0, 1, b'1']))).unwrap();
    let response = cache.grpc_layer().layer(inner).oneshot(request).await.unwrap();
    let is_hit = response.headers()["cache-status"].to_str().unwrap().contains("; hit");
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (String::from_utf8(body[5..].to_vec()).unwrap(), is_hit)
}

/// An entry that lacks a tag which the new code counts on is a miss for it, in every tier: else a write of that code would
/// not find it.
#[tokio::test(flavor = "multi_thread")]
async fn an_entry_of_the_old_code_lacks_no_tag_of_the_new() {
    let process = |url: &str, tier, knows_teams: bool| {
        let store = RedisStore::builder([url]).settle(Duration::ZERO).budget(Duration::from_secs(5)).build().unwrap();
        let get = GrpcMethod::read("/docs.v1.Docs/Get", "doc").message(move |bytes| {
            let target = GrpcTarget::new(String::from_utf8_lossy(bytes));
            Some(if knows_teams { target.tag("team", "7") } else { target })
        });
        let types = ["doc", "team"].map(|name| DataType::new(name, TTL).tier(tier));
        let builder = types.into_iter().fold(Cache::builder("test").single_tenant("t"), CacheBuilder::data_type);
        let cascade = if knows_teams { Cascade::new("team").drops(["doc"]) } else { Cascade::new("team") };
        builder.grpc(get).cascade(cascade).store(store).build().unwrap()
    };
    for tier in [Tier::Off, Tier::Validated, Tier::On] {
        let (redis, db) = (Redis::start(&[]), Db::default());
        let (old, new) = (process(&redis.url(), tier, false), process(&redis.url(), tier, true));
        until("ok", async || old.health() == Health::Ok && new.health() == Health::Ok).await;
        for round in 0..20 {
            // The generation of the team is there already: that it is made would be heard.
            ask(&new, &db).await;
            new.invalidate("t").mutated("doc", "1").run().await.unwrap();
            until("a hit of the old", async || ask(&old, &db).await.1).await;
            // Whoever looks on asks for no tags, and lets nothing in that requests would not take.
            let search = http::Request::get("/api/search?text=doc").header("authorization", "Bearer x");
            let found =
                new.admin(Admin::bearer("x").unwrap()).oneshot(search.body(Full::<Bytes>::default()).unwrap()).await;
            let found = found.unwrap().into_body().collect().await.unwrap().to_bytes();
            assert!(String::from_utf8_lossy(&found).contains("\"verdict\":\"hit\""), "{found:?}");
            // Behind everybody's back, so that it shows whose entry answers.
            let row = (db.fetch_add(1, Ordering::SeqCst) + 1).to_string();
            for _ in 0..5 {
                assert_eq!(ask(&new, &db).await.0, row, "{tier:?} {round}");
            }
            let row = (db.fetch_add(1, Ordering::SeqCst) + 1).to_string();
            new.invalidate("t").mutated("team", "7").run().await.unwrap();
            for _ in 0..3 {
                assert_eq!(ask(&new, &db).await.0, row, "{tier:?} {round}");
            }
            // What the old code has stored, it drops as well, by the tag it has.
            new.invalidate("t").mutated("doc", "1").run().await.unwrap();
            until("the drop", async || ask(&old, &db).await.0 == row).await;
        }
    }
}

/// The page says which rights are needed: with these alone, and nothing more, everything works.
#[tokio::test(flavor = "multi_thread")]
async fn the_rights_that_are_documented_are_enough() {
    let page = include_str!("../docs/redis.md");
    let rights = page.split_once("**The rights that are needed**").unwrap().1.split("\n\n").next().unwrap();
    let rights: Vec<_> = rights.split('`').skip(1).step_by(2).flat_map(str::split_whitespace).collect();
    let needed = |fenced: bool, is_old: bool| {
        let of_fences = ["+eval", "+del", "+type", "+zadd", "+zrem", "+zremrangebyscore", "+pexpire"];
        let of_old = ["+eval", "+pttl"];
        let all = rights.iter().filter(move |right| match (of_fences.contains(right), of_old.contains(right)) {
            (of_fences, of_old) if of_fences || of_old => (fenced && of_fences) || (is_old && of_old),
            _ => true,
        });
        all.filter(|right| right.starts_with(['~', '+'])).copied().collect::<Vec<_>>()
    };
    for fenced in [false, true] {
        let (redis, db) = (Redis::start(&[]), Db::default());
        let is_old = redis.command(&["INFO", "server"]).contains("redis_version:6.");
        let rights = needed(fenced, is_old);
        let user = [&["ACL", "SETUSER", "agents", "on", ">secret", "resetkeys", "-@all"][..], &rights].concat();
        assert!(redis.command(&user).starts_with("+OK"), "{user:?}");
        let url = redis.url().replace("://", "://agents:secret@");
        let lists = Route::new("/lists/{list_id}", "list").declares_tags();
        let mut builder = builder(&url, Tier::On).data_type(DataType::new("list", TTL)).route(lists);
        builder = builder.cascade(Cascade::new("doc").drops(["list"]));
        if fenced {
            builder = builder.fenced(PATIENCE);
        }
        let cache = builder.build().unwrap();
        let web = process(&cache, &db);
        until_hit(&web, "0").await;
        let written = web.put("/docs/1").await;
        assert_eq!((written.text(), written.report.as_ref().unwrap().total()), ("1", 1));
        until_hit(&web, "1").await;
        let lists = Web::new(&cache, |_| {
            let mut response = ok("list");
            response.headers_mut().insert("cache-tag", "doc=1".parse().unwrap());
            std::future::ready(Ok(response))
        });
        until("what only its response says is of a row", async || lists.get("/lists/1").await.is_hit()).await;
        until("ok", async || cache.health() == Health::Ok).await;
        let log = redis.command(&["ACL", "LOG"]);
        assert!(log.starts_with("*0"), "{log}");
    }
}

/// What has expired, or is not wanted, is replaced in every tier, and what replaces it is hit.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_replaced_is_hit_again() {
    for tier in [Tier::Off, Tier::Validated, Tier::On] {
        let (redis, db) = (Redis::start(&[]), Db::default());
        let ttl = Duration::from_millis(1_500);
        let cache = lasting(&redis.url(), tier, ttl).request_directives(true).build().unwrap();
        let web = process(&cache, &db);
        for row in 0..3u64 {
            db.store(row, Ordering::SeqCst);
            until("the new row", async || web.get("/docs/1").await.text() == row.to_string()).await;
            until_hit(&web, &row.to_string()).await;
            for _ in 0..5 {
                assert!(web.get("/docs/1").await.is_hit(), "{tier:?} {row}");
            }
        }
        db.store(7, Ordering::SeqCst);
        let reload = web::with(Method::GET, "/docs/1", &[("cache-control", "no-cache")]);
        assert_eq!(web.send(reload).await.text(), "7");
        until("the reloaded row", async || web.get("/docs/1").await.text() == "7").await;
        until_hit(&web, "7").await;
    }
}

/// The connection that waits for replicas is made anew when it is lost, though the other one is well.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_connection_for_invalidations_is_replaced() {
    let (master, db) = (Redis::start(&[]), Db::default());
    let replica = Redis::start(&[]);
    follow(&replica, &master);
    until_synced(&replica).await;
    let store = RedisStore::builder([master.url()]).replicas(1).settle(Duration::ZERO).budget(Duration::from_secs(5));
    let builder = Cache::builder("test").single_tenant("t").data_type(DataType::new("doc", TTL));
    let builder = builder.route(Route::new("/docs/{doc_id}", "doc")).mutation(Mutation::put("/docs/{doc_id}", "doc"));
    let cache = builder.store(store.build().unwrap()).build().unwrap();
    let web = process(&cache, &db);
    until_hit(&web, "0").await;
    web.put("/docs/1").await;
    let clients = master.command(&["CLIENT", "LIST"]);
    let waits = clients.lines().find(|line| line.contains("cmd=wait")).unwrap();
    let id = waits.split(' ').find_map(|field| field.strip_prefix("id=")).unwrap();
    assert!(master.command(&["CLIENT", "KILL", "ID", id]).starts_with(":1"));
    for row in 2..5 {
        assert_eq!(web.put("/docs/1").await.text(), row.to_string());
        until_hit(&web, &row.to_string()).await;
    }
    assert_eq!(cache.health(), Health::Ok);
}
