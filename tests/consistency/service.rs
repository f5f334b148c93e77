//! The service under test: parents with children, values that belong to a parent and (as the new code knows) to a team, and
//! handlers that fail in every way.

use std::{
    collections::{BTreeSet, HashMap},
    convert::Infallible,
    fmt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::stream;
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body::Frame;
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use tower::{Layer, ServiceExt, service_fn, util::BoxCloneSyncService};
use tower_cache_aside::{
    Cache, CacheBuilder, CacheTags, Cascade, Coalesce, DataType, Invalidated, Mutation, OnUnreachable, Route, Source,
    Warm, changed,
    store::{Guard, MemoryStore, RedisStore},
};

use crate::{
    line::Line,
    plan::{Fate, How, Kind, Mode, Over, PARENTS, PROCESSES, TEAM, THINGS},
    redis::connect,
    sabotage::{Loose, Sabotage},
    world::{Versions, World},
};

/// Longer than any handler takes.
pub const LEASE: Duration = Duration::from_secs(5);

/// How far the clock of each process is ahead, in milliseconds.
const AHEAD: [u64; PROCESSES] = [0, 3_600_000, 12_345];

/// How long a handler hangs that does.
pub const HANG: u64 = 3_000;

/// How long anybody waits for another's call.
pub const COALESCE: u64 = 400;

/// How long entries are fresh, and served stale on purpose.
const TTLS: [(Kind, u64, u64); 4] =
    [(Kind::Parent, 10_000, 0), (Kind::Child, 300, 300), (Kind::Late, 1_000, 200), (Kind::Value, 30_000, 0)];

/// For how long at most an entry of this kind answers.
pub fn longest(kind: Kind) -> u64 {
    TTLS.iter().find(|(of, ..)| *of == kind).map_or(0, |(_, ttl, stale)| ttl + stale)
}

/// What goes wrong in a handler, where that is no response.
#[derive(Debug)]
pub struct Failed;

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("failed")
    }
}

impl std::error::Error for Failed {}

type Body = UnsyncBoxBody<Bytes, Failed>;
type Web = BoxCloneSyncService<Request<Full<Bytes>>, Response<Body>, Failed>;

/// A process.
pub struct Process {
    pub slot: usize,
    pub is_new: bool,
    pub cache: Cache,
    /// When it was started.
    pub since: u64,
    web: Web,
    world: Arc<World>,
    /// What it has acknowledged itself.
    pub own: Mutex<Versions>,
    pub is_dead: Arc<AtomicBool>,
    pub is_stopping: AtomicBool,
    /// Requests under way.
    pub busy: AtomicUsize,
}

/// How a write ended.
pub enum Written {
    /// By 503, before it began.
    Refused,
    /// The client has an answer, or an end; with what was committed, and the report.
    Ended { version: u64, report: Option<Invalidated> },
}

/// The mapping; the new code `knows` of teams.
fn builder(mode: Mode, knows: bool) -> CacheBuilder {
    let ms = Duration::from_millis;
    let types = TTLS.map(|(kind, ttl, stale)| {
        let name = ["parent", "child", "late", "value"][kind as usize];
        let data_type = DataType::new(name, ms(ttl)).coalesce_timeout(ms(COALESCE));
        let fleet = if mode != Mode::Embedded && kind == Kind::Late { Coalesce::Fleet } else { Coalesce::Process };
        data_type.stale_while_revalidate(ms(stale)).stale_if_error(ms(stale)).coalesce(fleet)
    });
    let team = if knows { Cascade::new("team").drops(["value"]) } else { Cascade::new("team") };
    let builder = types.into_iter().fold(Cache::builder("test").single_tenant("t"), CacheBuilder::data_type);
    let builder = builder
        .data_type(DataType::new("team", ms(1_000)))
        .route(Route::new("/parents/{parent_id}", "parent"))
        .route(Route::new("/parents/{parent_id}/children/{child_id}", "child"))
        .route(Route::new("/children/{child_id}", "late").declares_tags())
        .mutation(Mutation::put("/parents/{parent_id}", "parent"))
        .mutation(Mutation::put("/teams/{team_id}", "team"))
        .cascade(Cascade::new("parent").drops(["child", "late", "value"]))
        .cascade(team);
    match mode {
        Mode::Embedded | Mode::Shared => builder,
        Mode::Reject => builder.on_unreachable(OnUnreachable::Reject),
        Mode::Fenced => builder.on_unreachable(OnUnreachable::Reject).fenced(LEASE),
    }
}

/// The tags that a write of each thing must drop, as the new code says.
pub fn cascades() -> [BTreeSet<Vec<u8>>; THINGS] {
    let dropped = Arc::new(Mutex::new(BTreeSet::new()));
    let heard = dropped.clone();
    let cache = builder(Mode::Embedded, true)
        .on_invalidated(move |_, tags| heard.lock().unwrap().extend(tags.iter().map(|tag| tag.as_bytes().to_vec())))
        .store(MemoryStore::new(1 << 20))
        .build()
        .unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    std::array::from_fn(|thing| {
        let (data_type, id) = named(thing);
        runtime.block_on(cache.invalidate("t").mutated(data_type, id).run()).unwrap();
        std::mem::take(&mut *dropped.lock().unwrap())
    })
}

/// Data type and id.
fn named(thing: usize) -> (&'static str, String) {
    if thing == TEAM { ("team", "1".to_owned()) } else { ("parent", thing.to_string()) }
}

fn redis(world: &Arc<World>, slot: usize, is_dead: &Arc<AtomicBool>) -> RedisStore {
    let (clock, world, replicas, is_dead) = (world.clone(), world.clone(), world.replicas, is_dead.clone());
    RedisStore::builder(["redis://played"])
        .clock(move || clock.dice.wall(1_000 + 7 * AHEAD[slot]))
        .connect_by(move || connect(world.clone(), slot, is_dead.clone()))
        .replicas(replicas)
        .in_process(4 << 20)
        .build()
        .unwrap()
}

impl Process {
    pub fn start(world: &Arc<World>, slot: usize, is_new: bool) -> Arc<Self> {
        let is_dead = Arc::new(AtomicBool::new(false));
        let is_embedded = world.over == Over::Process;
        let line = Line { world: world.clone(), process: slot, is_dead: is_dead.clone(), is_embedded, warms: false };
        // What goes over lines is told by one clock; Redis' store tells it anew.
        let is_redis = matches!(world.over, Over::Redis(_));
        let (clock, ahead) = (world.clone(), if is_redis { AHEAD[slot] } else { 0 });
        let builder = builder(world.mode, is_new).clock(move || clock.dice.wall(ahead));
        let cache = match (world.over, world.sabotage) {
            (Over::Process, _) => builder.store(line.clone()).build(),
            (Over::Redis(tier), _) => builder.tier(tier).store(redis(world, slot, &is_dead)).build(),
            (Over::Lines, Sabotage::None) => builder.store(Guard::new(line.clone())).build(),
            (Over::Lines, sabotage) => {
                builder.store(Loose { guard: Guard::new(line.clone()), line: line.clone(), sabotage }).build()
            }
        };
        let cache = cache.unwrap();
        let since = world.dice.now();
        let place = Place { world: world.clone(), slot, is_new, is_dead: is_dead.clone(), before: None };
        let warmed = asked_by_warmer(&cache, &place, line);
        if world.warms {
            // What is asked twice is popular, and is asked again whatever else goes on.
            cache.warm(warmed, Full::from, Warm::new().sample(1).concurrency(2).budget(1_000_000)).unwrap();
        }
        let web = web(&cache, place);
        let (own, busy) = (Mutex::default(), AtomicUsize::new(0));
        let (world, is_stopping) = (world.clone(), AtomicBool::new(false));
        Arc::new(Self { slot, is_new, cache, since, web, world, own, is_dead, is_stopping, busy })
    }

    /// What a client reads; `None` if it gets no good answer. And whether it came out of the cache.
    pub async fn read(&self, kind: Kind, parent: usize, fate: Fate) -> Option<(Versions, bool)> {
        let path = match kind {
            Kind::Value => return self.value(parent, fate).await,
            Kind::Parent => format!("/parents/{parent}"),
            Kind::Child => format!("/parents/{parent}/children/c"),
            Kind::Late => format!("/children/{parent}"),
        };
        let response = self.send("GET", path, fate).await.ok()?;
        let is_hit =
            response.headers()[header::HeaderName::from_static("cache-status")].to_str().unwrap().contains("hit");
        if response.status() != StatusCode::OK {
            return None;
        }
        let body = response.into_body().collect().await.ok()?.to_bytes();
        let mut versions = Versions::default();
        let text = std::str::from_utf8(&body).unwrap();
        for (version, text) in versions.iter_mut().zip(text.split(' ')) {
            *version = text.parse().unwrap();
        }
        Some((versions, is_hit))
    }

    async fn value(&self, parent: usize, fate: Fate) -> Option<(Versions, bool)> {
        let (world, slot, is_dead) = (self.world.clone(), self.slot, self.is_dead.clone());
        let fetch = move || async move {
            let versions = world.read(20 + slot as u64).await;
            ends(&is_dead).await;
            match fate {
                Fate::Panics => std::panic::resume_unwind(Box::new("as planned")),
                Fate::Hangs => tokio::time::sleep(Duration::from_millis(HANG)).await,
                _ if fate.fails() => return Err(Failed),
                _ => {}
            }
            Ok(Some(versions))
        };
        let entry = self.cache.entry::<Versions>("value", "v").tenant("t").scope("parent", parent.to_string());
        let entry = if self.is_new { entry.tag("team", "1") } else { entry };
        let (versions, report) = entry.fetch(fetch).unwrap().await.ok()?;
        Some((versions?, report.source == Source::Cache))
    }

    async fn send(&self, method: &str, path: String, fate: Fate) -> Result<Response<Body>, Failed> {
        let request = Request::builder().method(method).uri(path).extension(fate).body(Full::default()).unwrap();
        self.web.clone().oneshot(request).await
    }

    /// What a client gets that writes. It runs in a task, which may panic.
    pub async fn write(self: Arc<Self>, how: How, thing: usize, fate: Fate) -> Written {
        let ((data_type, id), world) = (named(thing), self.world.clone());
        let salt = 30 + self.slot as u64;
        match how {
            How::Request => self.request(thing, fate).await,
            How::ByHand => {
                let version = world.write(thing, salt, false).await;
                ends(&self.is_dead).await;
                let report = self.cache.invalidate("t").mutated(data_type, id).run().await.unwrap();
                Written::Ended { version, report: Some(report) }
            }
            How::Job => {
                let is_dead = self.is_dead.clone();
                let work = async move {
                    changed(data_type, id);
                    let version = world.write(thing, salt, false).await;
                    ends(&is_dead).await;
                    version
                };
                let (version, report) = self.cache.write("t", work).await.unwrap();
                Written::Ended { version, report: Some(report) }
            }
        }
    }

    async fn request(&self, thing: usize, fate: Fate) -> Written {
        let path = if thing == TEAM { "/teams/1".to_owned() } else { format!("/parents/{thing}") };
        let version = Arc::new(Mutex::new(0));
        let request = Request::put(path).extension(fate).extension(Commit(version.clone()));
        let request = request.body(Full::default()).unwrap();
        let web = self.web.clone();
        let response = tokio::spawn(web.oneshot(request)).await;
        let Ok(Ok(response)) = response else {
            return Written::Ended { version: *version.lock().unwrap(), report: None };
        };
        if response.status() == StatusCode::SERVICE_UNAVAILABLE {
            return Written::Refused;
        }
        let report = response.extensions().get::<Invalidated>().cloned();
        // While it streams, its handler writes.
        let report = report.filter(|_| !matches!(fate, Fate::Streams | Fate::Breaks));
        let _ = response.into_body().collect().await;
        Written::Ended { version: *version.lock().unwrap(), report }
    }
}

/// Where a handler says what it has committed.
#[derive(Clone)]
struct Commit(Arc<Mutex<u64>>);

/// A process that was killed goes no further.
async fn ends(is_dead: &AtomicBool) {
    if is_dead.load(Ordering::SeqCst) {
        std::future::pending().await
    }
}

/// Where a handler runs.
#[derive(Clone)]
struct Place {
    world: Arc<World>,
    slot: usize,
    is_new: bool,
    is_dead: Arc<AtomicBool>,
    /// What was read of each path the time before, where that is what is answered.
    before: Option<Arc<Mutex<HashMap<String, String>>>>,
}

/// The service whose popular requests are repeated.
fn asked_by_warmer(cache: &Cache, place: &Place, line: Line) -> Web {
    let place = place.clone();
    match place.world.sabotage {
        // Another cache over the same store: so its flights are nobody else's, and what it fills can be told apart.
        Sabotage::WarmerCapturesAfterTheLoad => {
            let clock = place.world.clone();
            let builder = builder(place.world.mode, place.is_new).clock(move || clock.dice.wall(0));
            web(&builder.store(Line { warms: true, ..line }).build().unwrap(), place)
        }
        Sabotage::WarmerRefillsFromBefore => web(cache, Place { before: Some(Arc::default()), ..place }),
        _ => web(cache, place),
    }
}

fn web(cache: &Cache, place: Place) -> Web {
    let sabotage = place.world.sabotage;
    let inner = service_fn(move |request| handle(place.clone(), request));
    let inner = inner.map_response(move |mut response: Response<Body>| {
        if sabotage == Sabotage::FailureIsNoWrite && response.status().is_server_error() {
            *response.status_mut() = StatusCode::CONFLICT;
        }
        response
    });
    let layered = cache.invalidate_layer().layer(cache.layer().layer(inner));
    BoxCloneSyncService::new(layered.map_response(|r| r.map(BodyExt::boxed_unsync)))
}

async fn handle(place: Place, request: Request<Full<Bytes>>) -> Result<Response<Body>, Failed> {
    let Place { world, slot, is_new, is_dead, before } = place;
    let fate = request.extensions().get::<Fate>().copied().unwrap_or(Fate::Fine);
    let commit = request.extensions().get::<Commit>().cloned();
    let ids: Vec<_> = request.uri().path().split('/').skip(1).map(str::to_owned).collect();
    let thing = if ids[0] == "teams" { TEAM } else { ids[1].parse().unwrap() };
    let salt = 40 + slot as u64;
    let writes_late = commit.is_some() && matches!(fate, Fate::Streams | Fate::Breaks);
    let mut text = String::new();
    match &commit {
        None => text = world.read(salt).await.map(|version| version.to_string()).join(" "),
        _ if writes_late || matches!(fate, Fate::Refuses | Fate::FailsEarly) => world.dice.pause(salt).await,
        Some(commit) => {
            let is_fenced = world.mode == Mode::Fenced && (is_new || thing != TEAM);
            *commit.0.lock().unwrap() = world.write(thing, salt, is_fenced).await;
        }
    }
    if let (None, Some(before)) = (&commit, before) {
        let earlier = before.lock().unwrap().insert(request.uri().path().to_owned(), text.clone());
        text = earlier.unwrap_or(text);
    }
    ends(&is_dead).await;
    let status = match fate {
        Fate::Refuses => StatusCode::CONFLICT,
        Fate::Fails | Fate::FailsEarly => StatusCode::INTERNAL_SERVER_ERROR,
        Fate::Panics => std::panic::resume_unwind(Box::new("as planned")),
        Fate::Errs => return Err(Failed),
        Fate::Hangs => {
            tokio::time::sleep(Duration::from_millis(HANG)).await;
            StatusCode::OK
        }
        Fate::Fine | Fate::Private | Fate::Streams | Fate::Breaks => StatusCode::OK,
    };
    let body = match fate {
        Fate::Streams | Fate::Breaks => streamed(world, thing, commit, fate, text, is_dead),
        _ => Full::new(Bytes::from(text)).map_err(|never: Infallible| match never {}).boxed_unsync(),
    };
    let mut response = Response::new(body);
    *response.status_mut() = status;
    if ids[0] == "children" && thing < PARENTS {
        CacheTags::of(response.extensions_mut()).add("parent", ids[1].clone());
    }
    if fate == Fate::Private {
        response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("private"));
    }
    Ok(response)
}

/// A body of two pieces, between which its handler may write; and which may break off.
fn streamed(
    world: Arc<World>,
    thing: usize,
    commit: Option<Commit>,
    fate: Fate,
    text: String,
    is_dead: Arc<AtomicBool>,
) -> Body {
    let pieces = stream::unfold(0, move |nth| {
        let (world, commit, is_dead) = (world.clone(), commit.clone(), is_dead.clone());
        let (head, tail) = text.split_at(text.len() / 2);
        let (head, tail) = (Bytes::from(head.to_owned()), Bytes::from(tail.to_owned()));
        async move {
            match nth {
                0 => Some((Ok(Frame::data(head)), 1)),
                1 => {
                    world.dice.pause(50).await;
                    if let Some(Commit(version)) = &commit {
                        let written = world.write(thing, 51, false).await;
                        *version.lock().unwrap() = written;
                    }
                    ends(&is_dead).await;
                    let piece = if fate == Fate::Breaks { Err(Failed) } else { Ok(Frame::data(tail)) };
                    Some((piece, 2))
                }
                _ => None,
            }
        }
    });
    StreamBody::new(pieces).boxed_unsync()
}
