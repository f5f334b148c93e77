//! No interleaving of reads and writes serves a read older than a write acknowledged before it began: the forced race, and
//! thousands of seeded schedules over a store that stops at every step, with a checker that is itself checked by breaking
//! the protocol on purpose.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::HashMap,
    convert::Infallible,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use rand::{Rng, RngExt, SeedableRng, rngs::SmallRng};
use tokio::sync::Notify;
use tower::{Layer, ServiceExt, service_fn, util::BoxCloneSyncService};
use tower_cache_aside::{
    Cache, CacheTags, Cascade, DataType, Key, Mutation, Route, Tag, Tier, Ttl,
    store::{
        Entry, Fence, Generation, Inquiry, Lookup, Mark, MemoryStore, Millis, Opened, Store, StoreFuture, TagGroup,
    },
};

/// A rule of the protocol, broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Sabotage {
    None,
    /// Entries are valid whatever became of their generations.
    SkipTheCheck,
    /// Entries are filled under the generations there are after the load.
    CaptureAfterTheLoad,
    /// Reads get the generations that an earlier read got, and so join its flight.
    JoinAnyFlight,
    /// Late tags are said not to have been dropped.
    BelieveLateTags,
}

/// An entry and the generations there were when it was filled.
type Filled = (Arc<Entry>, Vec<Generation>);

/// The in-process store, as if it were far away: every step may stop before and after it happens.
struct Chaos {
    inner: MemoryStore,
    rng: Arc<Mutex<SmallRng>>,
    sabotage: Sabotage,
    filled: Mutex<HashMap<Key, Filled>>,
    opened: Mutex<HashMap<Vec<Tag>, Opened>>,
}

impl Chaos {
    fn new(rng: Arc<Mutex<SmallRng>>, sabotage: Sabotage) -> Self {
        let (filled, opened) = Default::default();
        Self { inner: MemoryStore::new(8 << 20), rng, sabotage, filled, opened }
    }

    async fn step<T: Send>(&self, call: impl Future<Output = T> + Send) -> T {
        stop(&self.rng).await;
        let result = call.await;
        stop(&self.rng).await;
        result
    }
}

async fn stop(rng: &Mutex<SmallRng>) {
    let times = rng.lock().unwrap().random_range(0..4);
    for _ in 0..times {
        tokio::task::yield_now().await;
    }
}

impl Store for Chaos {
    fn peek(&self, key: &[u8], now: Millis) -> Option<Arc<Entry>> {
        let skip = self.sabotage != Sabotage::None || self.rng.lock().unwrap().random();
        if skip { None } else { self.inner.peek(key, now) }
    }

    fn lookup<'a>(&'a self, inquiry: Inquiry<'a>) -> StoreFuture<'a, Lookup> {
        Box::pin(self.step(async move {
            let Inquiry { key, tags, tier, now, .. } = inquiry;
            let found = self.inner.lookup(inquiry).await?;
            let filled = self.filled.lock().unwrap().get(key).cloned();
            match (self.sabotage, filled) {
                (Sabotage::SkipTheCheck | Sabotage::CaptureAfterTheLoad, Some((entry, generations))) => {
                    let stamps: Vec<_> = entry.stamps().iter().map(|s| s.tag.clone()).collect();
                    let now = self.inner.lookup(Inquiry::new(key, &stamps, tier, now)).await?.generations;
                    let is_current = now.iter().flatten().eq(&generations);
                    if self.sabotage == Sabotage::CaptureAfterTheLoad && !is_current {
                        return Ok(found);
                    }
                    let stamp = |tag: &Tag| entry.stamps().iter().find(|s| s.tag == *tag).map(|s| s.generation);
                    let generations = tags.iter().map(stamp).collect();
                    Ok(Lookup::new(Some(entry), generations))
                }
                _ => Ok(found),
            }
        }))
    }

    fn open<'a>(&'a self, tags: &'a [Tag]) -> StoreFuture<'a, Opened> {
        Box::pin(self.step(async move {
            let opened = self.inner.open(tags).await?;
            if self.sabotage == Sabotage::JoinAnyFlight {
                return Ok(self.opened.lock().unwrap().entry(tags.to_vec()).or_insert(opened).clone());
            }
            Ok(opened)
        }))
    }

    fn extend<'a>(&'a self, mark: Mark, tags: &'a [Tag]) -> StoreFuture<'a, Option<Vec<Generation>>> {
        Box::pin(self.step(async move {
            if self.sabotage == Sabotage::BelieveLateTags {
                return Ok(Some(self.inner.open(tags).await?.generations));
            }
            self.inner.extend(mark, tags).await
        }))
    }

    fn fill<'a>(&'a self, key: &'a Key, entry: Arc<Entry>, tier: Tier, now: Millis) -> StoreFuture<'a, ()> {
        Box::pin(self.step(async move {
            if self.sabotage == Sabotage::JoinAnyFlight {
                // The flight goes on until its result is stored: long enough for others to come after a write.
                for _ in 0..8 {
                    stop(&self.rng).await;
                }
            }
            let tags: Vec<_> = entry.stamps().iter().map(|s| s.tag.clone()).collect();
            let generations = self.inner.open(&tags).await?.generations;
            self.filled.lock().unwrap().insert(key.clone(), (entry.clone(), generations));
            self.opened.lock().unwrap().clear();
            self.inner.fill(key, entry, tier, now).await
        }))
    }

    fn invalidate<'a>(&'a self, groups: &'a [TagGroup], fence: Option<&'a Fence>) -> StoreFuture<'a, Vec<u64>> {
        Box::pin(self.step(self.inner.invalidate(groups, fence)))
    }

    fn fence<'a>(&'a self, groups: &'a [TagGroup], fence: &'a Fence) -> StoreFuture<'a, ()> {
        Box::pin(self.step(self.inner.fence(groups, fence)))
    }

    fn clear(&self) -> StoreFuture<'_, ()> {
        Box::pin(self.step(self.inner.clear()))
    }
}

const PARENTS: usize = 2;

/// Versions, as a database would hold them, and the newest that was acknowledged.
struct Database {
    rng: Arc<Mutex<SmallRng>>,
    versions: [AtomicU64; PARENTS],
    acknowledged: [AtomicU64; PARENTS],
}

impl Database {
    async fn read(&self, parent: usize) -> u64 {
        stop(&self.rng).await;
        let version = self.versions[parent].load(Ordering::SeqCst);
        stop(&self.rng).await;
        version
    }

    async fn write(&self, parent: usize) -> u64 {
        stop(&self.rng).await;
        let version = self.versions[parent].fetch_add(1, Ordering::SeqCst) + 1;
        stop(&self.rng).await;
        version
    }
}

type Web = BoxCloneSyncService<
    Request<Full<Bytes>>,
    Response<http_body_util::combinators::BoxBody<Bytes, Infallible>>,
    Infallible,
>;

/// Parents have children; a child shows the version of its parent. The path of a child need not name it.
fn web(cache: &Cache, db: &Arc<Database>) -> Web {
    let db = db.clone();
    let inner = service_fn(move |request: Request<Full<Bytes>>| {
        let db = db.clone();
        async move {
            let ids: Vec<_> = request.uri().path().split('/').skip(1).map(str::to_owned).collect();
            let parent: usize = ids[1].parse().unwrap();
            let version = match request.method().as_str() {
                "GET" => db.read(parent).await,
                _ => db.write(parent).await,
            };
            let mut response = Response::new(Full::new(Bytes::from(version.to_string())));
            if ids[0] == "children" {
                CacheTags::of(response.extensions_mut()).add("parent", ids[1].clone());
            }
            // A write whose outcome its client cannot know.
            if request.method() == "POST" {
                *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
            }
            Ok::<_, Infallible>(response)
        }
    });
    let layered = cache.invalidate_layer().layer(cache.layer().layer(inner));
    BoxCloneSyncService::new(layered.map_response(|r| r.map(BodyExt::boxed)))
}

fn cache(store: impl Store, fenced: bool) -> Cache {
    let mut builder = Cache::builder("test")
        .single_tenant("t")
        .data_type(DataType::new("parent", Ttl::Standard))
        .data_type(DataType::new("child", Ttl::Standard))
        .data_type(DataType::new("value", Ttl::Standard))
        .route(Route::new("/parents/{parent_id}", "parent"))
        .route(Route::new("/parents/{parent_id}/children/{child_id}", "child"))
        .route(Route::new("/children/{child_id}", "child").declares_tags())
        .mutation(Mutation::put("/parents/{parent_id}", "parent").include("children"))
        .mutation(Mutation::post("/parents/{parent_id}").mutates("parent").include("children"))
        .cascade(Cascade::new("parent").drops(["value"]).relation("children", "child"))
        .store(store);
    if fenced {
        builder = builder.fenced(Duration::from_secs(60));
    }
    builder.build().unwrap()
}

async fn send(web: &Web, method: &str, path: String) -> (StatusCode, u64) {
    let request = Request::builder().method(method).uri(path).body(Full::default()).unwrap();
    let response = web.clone().oneshot(request).await.unwrap();
    let status = response.status();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, std::str::from_utf8(&body).unwrap().parse().unwrap())
}

async fn value(cache: &Cache, db: &Arc<Database>, parent: usize) -> u64 {
    let db = db.clone();
    let fetch = move || async move { Ok::<_, Infallible>(Some(db.read(parent).await)) };
    let value = cache.entry::<u64>("value", "v").tenant("t").scope("parent", parent.to_string()).fetch(fetch);
    value.unwrap().await.unwrap().0.unwrap()
}

/// One schedule; what was read too old.
async fn schedule(seed: u64, sabotage: Sabotage) -> Vec<String> {
    let mut plan = SmallRng::seed_from_u64(seed);
    let rng = Arc::new(Mutex::new(SmallRng::seed_from_u64(plan.next_u64())));
    let cache = cache(Chaos::new(rng.clone(), sabotage), seed.is_multiple_of(4));
    let db = Arc::new(Database { rng, versions: Default::default(), acknowledged: Default::default() });
    let web = web(&cache, &db);
    let stale = Arc::new(Mutex::new(vec![]));
    let mut tasks = vec![];
    for task in 0..6 {
        let kinds: Vec<_> = (0..6).map(|_| (plan.random_range(0..PARENTS), plan.random_range(0..8u32))).collect();
        let (cache, db, web, stale) = (cache.clone(), db.clone(), web.clone(), stale.clone());
        tasks.push(tokio::spawn(async move {
            for (parent, kind) in kinds {
                let floor = db.acknowledged[parent].load(Ordering::SeqCst);
                let writes = task < 2;
                let read = match kind {
                    _ if writes && kind < 4 => {
                        let (_, version) = send(&web, "PUT", format!("/parents/{parent}")).await;
                        db.acknowledged[parent].fetch_max(version, Ordering::SeqCst);
                        continue;
                    }
                    4 if writes => {
                        // Acknowledged or not, whoever has the answer may rely on it.
                        let (_, version) = send(&web, "POST", format!("/parents/{parent}")).await;
                        db.acknowledged[parent].fetch_max(version, Ordering::SeqCst);
                        continue;
                    }
                    _ if writes => {
                        let version = db.write(parent).await;
                        let mutated = cache.invalidate("t").mutated("parent", parent.to_string());
                        mutated.include("children").run().await.unwrap();
                        db.acknowledged[parent].fetch_max(version, Ordering::SeqCst);
                        continue;
                    }
                    0 => send(&web, "GET", format!("/parents/{parent}")).await.1,
                    1 => send(&web, "GET", format!("/parents/{parent}/children/c")).await.1,
                    2 | 3 => value(&cache, &db, parent).await,
                    4 => {
                        // A client that hangs up.
                        let path = format!("/children/{parent}");
                        let _ = tokio::time::timeout(Duration::ZERO, send(&web, "GET", path)).await;
                        continue;
                    }
                    _ => send(&web, "GET", format!("/children/{parent}")).await.1,
                };
                if read < floor {
                    stale.lock().unwrap().push(format!("kind {kind} read {read} of {parent}, not {floor}"));
                }
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    let stale = stale.lock().unwrap();
    stale.clone()
}

fn run(seeds: std::ops::Range<u64>, sabotage: Sabotage) -> Option<(u64, Vec<String>)> {
    for seed in seeds {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let stale = runtime.block_on(schedule(seed, sabotage));
        if !stale.is_empty() {
            return Some((seed, stale));
        }
    }
    None
}

#[test]
fn no_schedule_gives_a_stale_read() {
    assert_eq!(run(0..4_000, Sabotage::None), None, "(failing seed, stale reads)");
}

/// The checker is worth something: each rule, broken, is caught.
#[test]
fn skipping_the_check_is_caught() {
    assert!(run(0..200, Sabotage::SkipTheCheck).is_some());
}

#[test]
fn capturing_after_the_load_is_caught() {
    assert!(run(0..2_000, Sabotage::CaptureAfterTheLoad).is_some());
}

#[test]
fn joining_any_flight_is_caught() {
    assert!(run(0..2_000, Sabotage::JoinAnyFlight).is_some());
}

#[test]
fn believing_late_tags_is_caught() {
    assert!(run(0..4_000, Sabotage::BelieveLateTags).is_some());
}

/// A gate that one visitor waits at until it is opened.
#[derive(Default)]
struct Gate {
    reached: Notify,
    open: Notify,
}

impl Gate {
    async fn pass(&self) {
        self.reached.notify_one();
        self.open.notified().await;
    }
}

/// The classic race of cache-aside, step by step.
#[tokio::test]
async fn a_slow_read_cannot_undo_a_write() {
    let cache = cache(MemoryStore::new(8 << 20), false);
    let version = Arc::new(AtomicU64::new(1));
    let gate = Arc::new(Gate::default());
    let read = |gate: Option<Arc<Gate>>| {
        let version = version.clone();
        let fetch = move || async move {
            let row = version.load(Ordering::SeqCst);
            if let Some(gate) = gate {
                gate.pass().await;
            }
            Ok::<_, Infallible>(Some(row))
        };
        let entry = cache.entry::<u64>("value", "v").tenant("t").scope("parent", "1").fetch(fetch).unwrap();
        async { entry.await.unwrap().0.unwrap() }
    };
    let slow = tokio::spawn(read(Some(gate.clone())));
    gate.reached.notified().await;
    version.store(2, Ordering::SeqCst);
    cache.invalidate("t").mutated("parent", "1").run().await.unwrap();
    assert_eq!(read(None).await, 2, "a read that begins after the write does not join the flight from before it");
    gate.open.notify_one();
    assert_eq!(slow.await.unwrap(), 1, "the slow read itself began before the write");
    assert_eq!(read(None).await, 2, "what it stored is not valid");
}

/// The same over HTTP, with an entry whose only link to what was written is a tag that its response declares.
#[tokio::test]
async fn a_slow_read_cannot_undo_a_write_over_http() {
    for path in ["/parents/1", "/parents/1/children/c", "/children/1"] {
        let cache = cache(MemoryStore::new(8 << 20), false);
        let version = Arc::new(AtomicU64::new(1));
        let gate = Arc::new(Gate::default());
        let slow = Arc::new(Mutex::new(Some(gate.clone())));
        let (v, s) = (version.clone(), slow.clone());
        let inner = service_fn(move |request: Request<Full<Bytes>>| {
            let (version, gate) = (v.clone(), s.lock().unwrap().take());
            async move {
                if request.method() == "PUT" {
                    version.fetch_add(1, Ordering::SeqCst);
                }
                let row = version.load(Ordering::SeqCst);
                if let Some(gate) = gate {
                    gate.pass().await;
                }
                let mut response = Response::new(Full::new(Bytes::from(row.to_string())));
                CacheTags::of(response.extensions_mut()).add("parent", "1");
                Ok::<_, Infallible>(response)
            }
        });
        let layered = cache.invalidate_layer().layer(cache.layer().layer(inner));
        let web: Web = BoxCloneSyncService::new(layered.map_response(|r| r.map(BodyExt::boxed)));
        let first = tokio::spawn({
            let web = web.clone();
            async move { send(&web, "GET", path.to_owned()).await.1 }
        });
        gate.reached.notified().await;
        send(&web, "PUT", "/parents/1".to_owned()).await;
        let second = tokio::spawn({
            let web = web.clone();
            async move { send(&web, "GET", path.to_owned()).await.1 }
        });
        // Which tags it has, nobody knows yet of the last: there the second read waits for the first, in vain.
        let (second, path_is_known) = (second, !path.starts_with("/children"));
        let second = if path_is_known { Ok(second.await.unwrap()) } else { Err(second) };
        gate.open.notify_one();
        assert_eq!(first.await.unwrap(), 1);
        let second = match second {
            Ok(version) => version,
            Err(waiting) => waiting.await.unwrap(),
        };
        assert_eq!(second, 2, "{path}");
        for _ in 0..3 {
            assert_eq!(send(&web, "GET", path.to_owned()).await.1, 2, "{path}");
        }
    }
}
