//! Hits whose entry this process holds. In tier `validated` the store is asked once whether it is current, and what comes of it is
//! what would come of looking the entry up.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/memcached.rs"]
mod memcached;
#[path = "support/redis.rs"]
mod redis;
#[path = "support/web.rs"]
mod web;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use http::{Method, Request, Response};
use http_body_util::Full;
use memcached::Memcached;
use redis::Redis;
use serde_json::json;
use tower_cache_aside::{
    Cache, CacheBuilder, Coalesce, DataType, Key, Mutation, Route, Stats, Tag, Tier, Ttl,
    store::{
        Entry, Fence, Generation, Inquiry, Lookup, Mark, MemcachedStore, MemoryStore, Opened, RedisBuilder, RedisStore,
        Regional, Store, StoreError, StoreFuture, TagGroup,
    },
    testing::Faulty,
};
use web::{Reply, Web, full, with};

const PATH: &str = "/docs/1";
const HEARTBEAT: Duration = Duration::from_millis(50);
const UNAVAILABLE: &str = "fwd=uri-miss; detail=store-unavailable";

/// What a store is asked, and whether it answers.
#[derive(Clone, Default)]
struct Asked {
    looked: Arc<AtomicU64>,
    confirmed: Arc<AtomicU64>,
    is_silent: Arc<AtomicBool>,
    hangs: Arc<AtomicBool>,
}

impl Asked {
    /// How often for entries, and how often whether one is current, since it was asked last.
    fn take(&self) -> (u64, u64) {
        (self.looked.swap(0, Ordering::SeqCst), self.confirmed.swap(0, Ordering::SeqCst))
    }
}

/// A store, with a count of what it is asked.
struct Counted(Arc<dyn Store>, Asked);

impl Store for Counted {
    fn peek(&self, key: &[u8], now: u64) -> Option<Arc<Entry>> {
        self.0.peek(key, now)
    }
    fn held(&self, key: &[u8], tier: Tier) -> Option<Arc<Entry>> {
        self.0.held(key, tier)
    }
    fn is_current<'a>(&'a self, key: &'a [u8], entry: &'a Entry) -> StoreFuture<'a, bool> {
        self.1.confirmed.fetch_add(1, Ordering::SeqCst);
        if self.1.hangs.load(Ordering::SeqCst) {
            return Box::pin(std::future::pending());
        }
        if self.1.is_silent.load(Ordering::SeqCst) {
            return Box::pin(std::future::ready(Err(StoreError::unreachable("no answer"))));
        }
        self.0.is_current(key, entry)
    }
    fn lookup<'a>(&'a self, inquiry: Inquiry<'a>) -> StoreFuture<'a, Lookup> {
        self.1.looked.fetch_add(1, Ordering::SeqCst);
        self.0.lookup(inquiry)
    }
    fn open<'a>(&'a self, tags: &'a [Tag]) -> StoreFuture<'a, Opened> {
        self.0.open(tags)
    }
    fn extend<'a>(&'a self, mark: Mark, tags: &'a [Tag]) -> StoreFuture<'a, Option<Vec<Generation>>> {
        self.0.extend(mark, tags)
    }
    fn fill<'a>(&'a self, key: &'a Key, entry: Arc<Entry>, tier: Tier, now: u64) -> StoreFuture<'a, ()> {
        self.0.fill(key, entry, tier, now)
    }
    fn invalidate<'a>(&'a self, groups: &'a [TagGroup], fence: Option<&'a Fence>) -> StoreFuture<'a, Vec<u64>> {
        self.0.invalidate(groups, fence)
    }
    fn fence<'a>(&'a self, groups: &'a [TagGroup], fence: &'a Fence) -> StoreFuture<'a, ()> {
        self.0.fence(groups, fence)
    }
    fn clear(&self) -> StoreFuture<'_, ()> {
        self.0.clear()
    }
}

/// One that no busy machine makes miss, and whose heartbeats are not among what is counted.
fn redis_store(redis: &Redis) -> RedisBuilder {
    let long = Duration::from_secs(60);
    RedisStore::builder([redis.url()]).settle(Duration::ZERO).budget(long).invalidate_budget(long).heartbeat(long)
}

fn over(store: impl Store, doc: DataType) -> CacheBuilder {
    Cache::builder("test")
        .single_tenant("t")
        .data_type(doc)
        .route(Route::new("/docs/{doc_id}", "doc"))
        .mutation(Mutation::put("/docs/{doc_id}", "doc"))
        .request_directives(true)
        .store(store)
}

fn doc() -> DataType {
    DataType::new("doc", Ttl::Standard).early_refresh(0.0)
}

/// A row, which is how often it was written, and how often it was read.
#[derive(Clone, Default)]
struct Db {
    row: Arc<AtomicU64>,
    reads: Arc<AtomicU64>,
    fails: Arc<AtomicBool>,
}

impl Db {
    fn web(&self, cache: &Cache) -> Web {
        let db = self.clone();
        Web::new(cache, move |request| {
            match *request.method() {
                Method::PUT => db.row.fetch_add(1, Ordering::SeqCst),
                _ => db.reads.fetch_add(1, Ordering::SeqCst),
            };
            let text = format!("row {}", db.row.load(Ordering::SeqCst));
            let mut response = Response::builder().status(if db.fails.load(Ordering::SeqCst) { 500 } else { 200 });
            if request.uri().query().is_some() {
                response = response.header("etag", format!("\"{text}\"")).header("vary", "accept-language");
            }
            std::future::ready(Ok(response.body(full(text)).unwrap()))
        })
    }
}

/// Until it is held, and asked about once.
async fn until_held(cache: &Cache, web: &Web, asked: &Asked) {
    until_asked(cache, web, asked, (0, 1)).await;
}

/// Until a hit asks the store so often.
async fn until_asked(cache: &Cache, web: &Web, asked: &Asked, expected: (u64, u64)) {
    let start = Instant::now();
    loop {
        // What has been filled is looked up once before it is held.
        cache.drain(Duration::from_secs(60)).await;
        asked.take();
        let reply = web.get(PATH).await;
        if reply.is_hit() && asked.take() == expected {
            return;
        }
        assert!(start.elapsed() < Duration::from_secs(60), "it is not held: {reply:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Also what another process has dropped is counted once, and asked for no oftener than if nothing had been held. What has ended is
/// not asked about.
#[tokio::test(flavor = "multi_thread")]
async fn a_hit_asks_once_whether_it_is_current() {
    let (redis, asked, db) = (Redis::start(&[]), Asked::default(), Db::default());
    let ahead = Arc::new(AtomicU64::new(0));
    let skew = ahead.clone();
    let clock = move || SystemTime::now() + Duration::from_secs(skew.load(Ordering::SeqCst));
    let cache = over(Counted(Arc::new(redis_store(&redis).build().unwrap()), asked.clone()), doc());
    let cache = cache.clock(clock).build().unwrap();
    let (web, other) = (db.web(&cache), db.web(&over(redis_store(&redis).build().unwrap(), doc()).build().unwrap()));
    until_held(&cache, &web, &asked).await;
    let before = of_doc(&cache);
    for _ in 0..10 {
        let reply = web.get(PATH).await;
        assert!(reply.is_hit() && reply.text() == "row 0", "{reply:?}");
    }
    assert_eq!(asked.take(), (0, 10));
    let after = of_doc(&cache);
    assert_eq!((after.0 - before.0, after.1 - before.1, after.2 - before.2), (10, 10, 0));
    let mut asked_redis = vec![];
    for n in 1..=5 {
        until_held(&cache, &web, &asked).await;
        assert_eq!(other.put(PATH).await.status, 200);
        let (before, [already]) = (of_doc(&cache), redis.calls(["mget"]));
        let reply = web.get(PATH).await;
        assert_eq!((reply.text(), reply.cache_status()), (&*format!("row {n}"), "fwd=uri-miss; stored"));
        assert_eq!(asked.take(), (1, 1));
        asked_redis.push(redis.calls(["mget"])[0] - already);
        let after = of_doc(&cache);
        assert_eq!((after.0 - before.0, after.1 - before.1, after.2 - before.2), (1, 0, 1));
    }
    // Whether it is current, what there is instead, and the generations that are made then; a heartbeat may ask as well.
    assert_eq!(asked_redis.iter().min(), Some(&3), "{asked_redis:?}");
    until_held(&cache, &web, &asked).await;
    ahead.store(10 * 86_400, Ordering::SeqCst);
    web.get(PATH).await;
    assert_eq!(asked.take(), (1, 0));
}

/// Requests, hits, misses.
fn of_doc(cache: &Cache) -> (u64, u64, u64) {
    let Stats { types, .. } = cache.stats();
    let doc = &types["doc"];
    (doc.requests, doc.hits, doc.misses)
}

/// A request waits for a store that does not answer once, not twice.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_does_not_answer_is_asked_once() {
    let (redis, asked, db) = (Redis::start(&[]), Asked::default(), Db::default());
    let cache = over(Counted(Arc::new(redis_store(&redis).build().unwrap()), asked.clone()), doc()).build().unwrap();
    let web = db.web(&cache);
    until_held(&cache, &web, &asked).await;
    asked.is_silent.store(true, Ordering::SeqCst);
    let reply = web.get(PATH).await;
    assert_eq!((reply.text(), reply.cache_status(), asked.take()), ("row 0", UNAVAILABLE, (0, 1)));
    let stored = web.send(with(Method::GET, PATH, &[("cache-control", "only-if-cached")])).await;
    assert_eq!((stored.status.as_u16(), asked.take()), (504, (0, 1)));
    asked.is_silent.store(false, Ordering::SeqCst);
    assert!(web.get(PATH).await.is_hit());
    // Who hangs up meanwhile is counted as one that was not answered.
    let before = of_doc(&cache);
    asked.hangs.store(true, Ordering::SeqCst);
    assert!(tokio::time::timeout(Duration::from_millis(20), web.get(PATH)).await.is_err());
    let after = of_doc(&cache);
    assert_eq!((after.0 - before.0, after.1 - before.1, after.2 - before.2), (1, 0, 1));
    assert_eq!(json!(cache.stats().types["doc"].miss_reasons)["cancelled"], 1);
}

/// With the probability that the paper gives, not with its square: a tenth of these.
#[tokio::test(flavor = "multi_thread")]
async fn an_early_refresh_is_drawn_once() {
    let (redis, asked, db) = (Redis::start(&[]), Asked::default(), Db::default());
    let now = SystemTime::now();
    // A load takes a millisecond, and so much is always left, about.
    let left = Duration::from_millis((1_000.0 * 10.0_f64.ln()) as u64);
    let doc = DataType::new("doc", left).early_refresh(1_000.0);
    let cache = over(Counted(Arc::new(redis_store(&redis).build().unwrap()), asked.clone()), doc).clock(move || now);
    let cache = cache.build().unwrap();
    let web = db.web(&cache);
    until_held(&cache, &web, &asked).await;
    let mut refreshed = 0;
    for _ in 0..600 {
        let before = db.reads.load(Ordering::SeqCst);
        assert!(web.get(PATH).await.is_hit());
        cache.drain(Duration::from_secs(60)).await;
        refreshed += db.reads.load(Ordering::SeqCst) - before;
    }
    let (looked, confirmed) = asked.take();
    assert!(confirmed > 300, "{looked} {confirmed}");
    assert!((30..=90).contains(&refreshed), "{refreshed} of 600");
}

/// What has just taken the place of what is about to end is not about to end.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_drawn_is_of_its_entry() {
    let (redis, asked, db) = (Redis::start(&[]), Asked::default(), Db::default());
    let ahead = Arc::new(AtomicU64::new(0));
    let (now, skew) = (SystemTime::now(), ahead.clone());
    let clock = move || now + Duration::from_millis(skew.load(Ordering::SeqCst));
    let doc = || DataType::new("doc", Duration::from_secs(3_600)).early_refresh(1_000.0);
    let cache =
        over(Counted(Arc::new(redis_store(&redis).build().unwrap()), asked.clone()), doc()).clock(clock.clone());
    let cache = cache.build().unwrap();
    let other = over(redis_store(&redis).build().unwrap(), doc()).clock(clock).build().unwrap();
    let (web, elsewhere) = (db.web(&cache), db.web(&other));
    until_held(&cache, &web, &asked).await;
    // A load takes a millisecond: what ends in a fifth of a second is refreshed four times out of five, what ends in an hour never.
    let almost = 3_600_000 - 200;
    ahead.store(almost, Ordering::SeqCst);
    let row = |n: u64| format!("row {n}");
    for n in 1..=5 {
        elsewhere.put(PATH).await;
        while !elsewhere.get(PATH).await.is_hit() {}
        other.drain(Duration::from_secs(60)).await;
        let reads = db.reads.load(Ordering::SeqCst);
        let reply = web.get(PATH).await;
        assert!(reply.is_hit() && reply.text() == row(n), "{reply:?}");
        cache.drain(Duration::from_secs(60)).await;
        assert_eq!(db.reads.load(Ordering::SeqCst), reads, "it was refreshed");
        until_held(&cache, &web, &asked).await;
        ahead.fetch_add(almost, Ordering::SeqCst);
    }
}

/// What a reply says, but for seconds that may have gone by.
fn told(reply: &Reply) -> impl PartialEq + std::fmt::Debug {
    let mut headers = reply.headers.clone();
    for name in ["age", "date", "cache-status"] {
        headers.remove(name);
    }
    let status = reply.cache_status().split("ttl=").next().unwrap().to_owned();
    (reply.status, reply.body.clone(), headers, status, reply.headers.contains_key("age"))
}

/// Whatever is asked of it, the answer is that of a process that holds nothing.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_held_answers_like_what_is_looked_up() {
    let (redis, asked, db) = (Redis::start(&[]), Asked::default(), Db::default());
    let builders = [
        over(Counted(Arc::new(redis_store(&redis).build().unwrap()), asked.clone()), doc()),
        over(redis_store(&redis).in_process(0).build().unwrap(), doc()),
    ];
    let [held, plain] = builders.map(|builder| db.web(&builder.build().unwrap()));
    for path in [PATH, "/docs/1?tagged"] {
        let start = Instant::now();
        while !(held.get(path).await.is_hit() && plain.get(path).await.is_hit()) || start.elapsed().as_millis() < 50 {
            assert!(start.elapsed() < Duration::from_secs(60), "nothing is stored");
        }
        for (name, value) in [
            ("accept", "*/*"),
            ("range", "bytes=1-2"),
            ("range", "bytes=90-"),
            ("if-none-match", "\"row 0\""),
            ("if-none-match", "\"row 1\""),
            ("cache-control", "no-cache"),
            ("cache-control", "max-age=99"),
            ("cache-control", "min-fresh=1"),
            ("cache-control", "min-fresh=7200"),
            ("cache-control", "max-stale"),
            ("cache-control", "only-if-cached"),
            ("cache-control", "no-store"),
            ("pragma", "no-cache"),
            ("authorization", "secret"),
            ("accept-language", "de"),
        ] {
            for method in [Method::GET, Method::HEAD] {
                let ask = async |web: &Web| -> Reply {
                    let request: Request<Full<bytes::Bytes>> = with(method.clone(), path, &[(name, value)]);
                    web.send(request).await
                };
                // What they store is there for both the second time.
                let _ = (ask(&held).await, ask(&plain).await);
                let (ours, theirs) = (ask(&held).await, ask(&plain).await);
                assert_eq!(told(&ours), told(&theirs), "{method} {path} {name}: {value}");
            }
        }
    }
    let (looked, confirmed) = asked.take();
    assert!(confirmed > 30, "{looked} {confirmed}");
}

/// Also those that wrap others.
#[tokio::test(flavor = "multi_thread")]
async fn every_store_that_holds_entries_confirms_them() {
    let (redis, peer, memcached) = (Redis::start(&[]), Redis::start(&[]), Memcached::start(&[]));
    let long = Duration::from_secs(60);
    let region =
        Regional::builder("eu").peer("us", peer.url()).build(redis_store(&redis).heartbeat(HEARTBEAT)).unwrap();
    let stores: [Arc<dyn Store>; 4] = [
        Arc::new(redis_store(&redis).prefix("plain").build().unwrap()),
        Arc::new(MemcachedStore::builder([memcached.address()]).budget(long).invalidate_budget(long).build().unwrap()),
        Arc::new(Faulty::new(redis_store(&redis).prefix("faulty").build().unwrap())),
        Arc::new(region),
    ];
    for store in stores {
        let (asked, db) = (Asked::default(), Db::default());
        let cache = over(Counted(store, asked.clone()), doc()).build().unwrap();
        let web = db.web(&cache);
        until_held(&cache, &web, &asked).await;
        web.put(PATH).await;
        assert_eq!(web.get(PATH).await.text(), "row 1");
    }
}

/// Two caches of a process may have one store, and not the same mapping: then an entry may lack what the other's writes drop, or
/// live longer than it may here. What is as this one's mapping says answers at once, whoever has stored it.
#[tokio::test(flavor = "multi_thread")]
async fn what_another_mapping_has_stored_is_no_answer() {
    let redis = Redis::start(&[]);
    let stores: [(_, _, Arc<dyn Store>); 3] = [
        (Tier::On, (0, 0), Arc::new(MemoryStore::new(1 << 20))),
        (Tier::On, (0, 0), Arc::new(redis_store(&redis).prefix("on").build().unwrap())),
        (Tier::Validated, (0, 1), Arc::new(redis_store(&redis).build().unwrap())),
    ];
    let (hour, moment) = (Duration::from_secs(3_600), Duration::from_secs(1));
    for (tier, of_a_hit, store) in stores {
        let (asked, db) = (Asked::default(), Db::default());
        let store = Arc::new(Counted(store, asked.clone()));
        let mapped = |entity: &str, doc: DataType| {
            let cache = Cache::builder("test").single_tenant("t").store(store.clone());
            let cache = cache.route(Route::new("/docs/{doc_id}", "doc").entity("doc_id", entity));
            let cache = cache.data_type(doc.early_refresh(0.0).tier(tier));
            let cache = cache.data_type(DataType::new(entity, hour)).build().unwrap();
            (db.web(&cache), cache)
        };
        let doc = |ttl| DataType::new("doc", ttl);
        let (pages, cache) = mapped("page", doc(hour));
        let (same, _) = mapped("page", doc(hour));
        let (files, other) = mapped("file", doc(hour));
        until_asked(&cache, &pages, &asked, of_a_hit).await;
        for web in [&same, &pages] {
            let reply = web.get(PATH).await;
            assert!(reply.is_hit() && asked.take() == of_a_hit, "{tier:?}: {reply:?}");
        }
        assert_eq!(files.get(PATH).await.cache_status(), "fwd=uri-miss; stored", "{tier:?}");
        until_asked(&other, &files, &asked, of_a_hit).await;
        for coalesce in [Coalesce::Process, Coalesce::Fleet] {
            let (short, _) = mapped("page", doc(moment).coalesce(coalesce));
            cache.clear().await.unwrap();
            until_asked(&cache, &pages, &asked, of_a_hit).await;
            tokio::time::sleep(moment).await;
            assert!(pages.get(PATH).await.is_hit(), "{tier:?}");
            assert_eq!(short.get(PATH).await.cache_status(), "fwd=stale; stored", "{tier:?} {coalesce:?}");
        }
    }
}

/// What this process holds may have ended here, when another process has stored what has not.
#[tokio::test(flavor = "multi_thread")]
async fn what_has_ended_here_is_looked_up() {
    let redis = Redis::start(&[]);
    let (hour, moment) = (Duration::from_secs(3_600), Duration::from_secs(2));
    let (asked, db) = (Asked::default(), Db::default());
    let store = Arc::new(Counted(Arc::new(redis_store(&redis).build().unwrap()), asked.clone()));
    let mapped = |store: Arc<dyn Store>, ttl: Duration| {
        let cache = over(store, DataType::new("doc", ttl).early_refresh(0.0)).build().unwrap();
        (db.web(&cache), cache)
    };
    let ((long, cache), (short, _)) = (mapped(store.clone(), hour), mapped(store, moment));
    let (elsewhere, other) = mapped(Arc::new(redis_store(&redis).build().unwrap()), moment);
    until_held(&cache, &long, &asked).await;
    tokio::time::sleep(moment).await;
    while !elsewhere.get(PATH).await.is_hit() {
        other.drain(Duration::from_secs(60)).await;
    }
    let reads = db.reads.load(Ordering::SeqCst);
    let reply = short.get(PATH).await;
    assert!(reply.is_hit() && db.reads.load(Ordering::SeqCst) == reads, "{reply:?}");
}

/// Also what varies by what no route names: what leads to it stays as long.
#[tokio::test(flavor = "multi_thread")]
async fn what_varies_is_served_stale_for_as_long_as_is_meant() {
    let redis = Redis::start(&[]);
    let (hour, moment) = (Duration::from_secs(3_600), Duration::from_millis(100));
    let docs: [fn(DataType, Duration) -> DataType; 2] = [DataType::stale_while_revalidate, DataType::stale_if_error];
    for (prefix, doc) in ["refresh", "error"].into_iter().zip(docs) {
        let stores: [Arc<dyn Store>; 3] = [
            Arc::new(MemoryStore::new(1 << 20)),
            Arc::new(redis_store(&redis).prefix(prefix).build().unwrap()),
            Arc::new(redis_store(&redis).prefix(format!("{prefix}-off")).in_process(0).build().unwrap()),
        ];
        for store in stores {
            let db = Db::default();
            let cache = over(store, doc(DataType::new("doc", moment), hour).early_refresh(0.0)).build().unwrap();
            let web = db.web(&cache);
            // Until it is connected.
            let start = Instant::now();
            while web.get("/docs/1?varies").await.cache_status() != "fwd=uri-miss; stored" {
                assert!(start.elapsed() < Duration::from_secs(60), "nothing is stored");
            }
            cache.drain(Duration::from_secs(60)).await;
            tokio::time::sleep(moment).await;
            db.fails.store(true, Ordering::SeqCst);
            let reply = web.get("/docs/1?varies").await;
            assert_eq!((reply.status.as_u16(), reply.text()), (200, "row 0"), "{prefix}: {reply:?}");
        }
    }
}
