//! What a rule plays in: handles to one place, names that nobody else uses, and what was seen.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use tokio::time::{Instant, sleep};

use crate::{
    catalog::{Lifetime, Tier},
    clock::Millis,
    key::{Key, Tag},
    store::{
        Entry, Fence, Generation, Inquiry, Lookup, Opened, Payload, Stamp, Store, StoreError, StoreFuture,
        StoredResponse, TagGroup,
    },
};

/// How long a store that cannot do what it is asked is asked again.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long is waited for what must come, but not at once.
const MUST_COME: Duration = Duration::from_secs(10);

const PAUSE: Duration = Duration::from_millis(20);

const TYPE: &str = "thing";

pub(super) const HOUR: Duration = Duration::from_secs(3_600);

/// The shortest lease: stores may count in seconds.
pub(super) const LEASE: Duration = Duration::from_secs(2);

/// The ways in which a tier in this process may hold an entry.
pub(super) const TIERS: [Tier; 4] = [Tier::Off, Tier::Validated, Tier::On, Tier::Capped(Duration::from_secs(60))];

/// Why a rule does not hold.
#[derive(Debug)]
pub(super) enum Flaw {
    /// Something that must never be seen.
    Wrong(String),
    /// Something that is not there. A store may lose whatever it holds, but not each time.
    Missing(String),
}

pub(super) type Seen<T = ()> = Result<T, Flaw>;

pub(super) fn never(is_seen: bool, what: impl FnOnce() -> String) -> Seen {
    if is_seen { Err(Flaw::Wrong(what())) } else { Ok(()) }
}

pub(super) fn expect(is_there: bool, what: impl FnOnce() -> String) -> Seen {
    if is_there { Ok(()) } else { Err(Flaw::Missing(what())) }
}

/// The answer of a store, which is asked again while it fails: it may be slow, or not be connected yet.
pub(super) async fn steady<'a, T>(what: &str, call: impl Fn() -> StoreFuture<'a, T>) -> Seen<T> {
    let until = Instant::now() + PATIENCE;
    loop {
        match call().await {
            Ok(answer) => return Ok(answer),
            Err(error) if Instant::now() >= until => return Err(Flaw::Missing(format!("{what} fails: {error}"))),
            Err(_) => sleep(PAUSE).await,
        }
    }
}

/// Waits until this is so.
pub(super) async fn comes(what: &str, is_so: impl AsyncFn() -> Seen<bool>) -> Seen {
    let until = Instant::now() + MUST_COME;
    while !is_so().await? {
        if Instant::now() >= until {
            return Err(Flaw::Missing(format!("{what}: not within {MUST_COME:?}")));
        }
        sleep(PAUSE).await;
    }
    Ok(())
}

/// What is used by one try of one rule alone.
pub(super) struct Scene {
    pub(super) here: Handle,
    /// The same place, as other processes reach it.
    pub(super) there: Handle,
    pub(super) elsewhere: Handle,
    service: String,
}

/// One process' handle to the place.
#[derive(Clone)]
pub(super) struct Handle(pub(super) Arc<dyn Store>);

impl Scene {
    pub(super) fn new(handles: &[Handle; 3]) -> Self {
        static SCENES: AtomicU64 = AtomicU64::new(0);
        let [here, there, elsewhere] = handles.clone();
        // The place may be one that others have used before, or use now.
        let service = format!("conformance-{:x}-{}", rand::random::<u32>(), SCENES.fetch_add(1, Ordering::Relaxed));
        Self { here, there, elsewhere, service }
    }

    pub(super) fn handles(&self) -> [&Handle; 3] {
        [&self.here, &self.there, &self.elsewhere]
    }

    fn head(&self, tenant: &str) -> Vec<u8> {
        format!("{}{{{tenant}}}", self.service).into_bytes()
    }

    /// The service and the first tenant, which names of this scene begin with.
    pub(super) fn first_tenant(&self) -> Vec<u8> {
        self.head("acme")
    }

    pub(super) fn service(&self) -> &str {
        &self.service
    }

    pub(super) fn tag(&self, id: &str) -> Tag {
        self.tag_of("acme", TYPE, id)
    }

    pub(super) fn tag_of(&self, tenant: &str, data_type: &str, id: &str) -> Tag {
        Tag::entity(&self.head(tenant), data_type, data_type, id.as_bytes())
    }

    pub(super) fn key(&self, name: &str) -> Key {
        self.key_of("acme", name)
    }

    /// `name` is as it is in keys: escaped, of whatever length.
    pub(super) fn key_of(&self, tenant: &str, name: &str) -> Key {
        Key::new([&self.head(tenant), ":thing:=".as_bytes(), name.as_bytes(), b"::"].concat())
    }
}

pub(super) fn group(tags: &[Tag]) -> Vec<TagGroup> {
    vec![TagGroup::new(TYPE, tags.to_vec())]
}

/// By the clock of this machine.
pub(super) fn now() -> Millis {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as Millis)
}

impl Handle {
    pub(super) async fn open(&self, tags: &[Tag]) -> Seen<Opened> {
        let opened = steady("open", || self.0.open(tags)).await?;
        never(opened.generations.len() != tags.len(), || {
            format!("open gave {} generations for {} tags", opened.generations.len(), tags.len())
        })?;
        Ok(opened)
    }

    /// The same, and what a look-up tells, if that is as much.
    pub(super) async fn marks(&self, key: &Key, tags: &[Tag]) -> Seen<Vec<Opened>> {
        let mut marks = vec![self.open(tags).await?];
        for tier in TIERS {
            let Lookup { generations, mark, .. } = self.lookup(key, tags, tier).await?;
            // Whether a fence still stands is for `open` to find out.
            let generations = generations.into_iter().map(|now| now.filter(|generation| !generation.is_fenced()));
            let generations = generations.collect::<Option<Vec<_>>>();
            marks.extend(mark.zip(generations).map(|(mark, generations)| Opened::new(generations, mark)));
        }
        Ok(marks)
    }

    /// What look-ups tell of the moment, whatever they find.
    pub(super) async fn moments(&self, key: &Key, tags: &[Tag]) -> Seen<Vec<Opened>> {
        let mut moments = vec![];
        for tier in TIERS {
            moments.extend(self.lookup(key, tags, tier).await?.mark.map(|mark| Opened::new(vec![], mark)));
        }
        Ok(moments)
    }

    pub(super) async fn extend(&self, opened: &Opened, tags: &[Tag]) -> Seen<Option<Vec<Generation>>> {
        steady("extend", || self.0.extend(opened.mark, tags)).await
    }

    pub(super) async fn ask(&self, inquiry: Inquiry<'_>) -> Seen<Lookup> {
        let found = steady("lookup", || self.0.lookup(inquiry)).await?;
        never(found.generations.len() != inquiry.tags.len(), || {
            format!("lookup gave {} generations for {} tags", found.generations.len(), inquiry.tags.len())
        })?;
        Ok(found)
    }

    pub(super) async fn lookup(&self, key: &Key, tags: &[Tag], tier: Tier) -> Seen<Lookup> {
        self.ask(Inquiry::new(key, tags, tier, now())).await
    }

    /// The entry under this key, if it is valid.
    pub(super) async fn valid(&self, key: &Key, tags: &[Tag], tier: Tier) -> Seen<Option<Arc<Entry>>> {
        let Lookup { entry, generations, .. } = self.lookup(key, tags, tier).await?;
        Ok(entry.filter(|entry| is_valid(entry, tags, &generations)))
    }

    /// Stores an entry as it is.
    pub(super) async fn put(&self, key: &Key, entry: &Arc<Entry>, tier: Tier) -> Seen {
        steady("fill", || self.0.fill(key, entry.clone(), tier, now())).await
    }

    /// Stores an entry under the generations that the tags have.
    pub(super) async fn fill(&self, key: &Key, tags: &[Tag], body: &str) -> Seen<Arc<Entry>> {
        let opened = self.open(tags).await?;
        let entry = Arc::new(entry(response(body.as_bytes().to_vec()), stamps(tags, &opened.generations)));
        self.put(key, &entry, Tier::default()).await?;
        Ok(entry)
    }

    pub(super) async fn invalidate(&self, groups: &[TagGroup], fence: Option<&Fence>) -> Seen<Vec<u64>> {
        let counts = steady("invalidate", || self.0.invalidate(groups, fence)).await?;
        never(counts.len() != groups.len(), || {
            format!("invalidate gave {} counts for {} groups", counts.len(), groups.len())
        })?;
        Ok(counts)
    }

    pub(super) async fn drop_tags(&self, tags: &[Tag]) -> Seen {
        self.invalidate(&group(tags), None).await.map(drop)
    }

    pub(super) async fn fence(&self, tags: &[Tag], fence: &Fence) -> Seen {
        let groups = group(tags);
        steady("fence", || self.0.fence(&groups, fence)).await
    }

    pub(super) async fn clear(&self) -> Seen {
        steady("clear", || self.0.clear()).await
    }

    /// One answer, or none: who asks twice may get another.
    pub(super) async fn claim(&self, key: &Key, lease: Duration) -> Result<bool, StoreError> {
        self.0.claim(key, lease).await
    }

    /// Whether any of these tags has one of these generations, in whatever way it is asked.
    pub(super) async fn shows(&self, key: &Key, tags: &[Tag], old: &[Generation]) -> Seen<bool> {
        for tier in TIERS {
            let found = self.lookup(key, tags, tier).await?.generations;
            if found.iter().zip(old).any(|(now, old)| *now == Some(*old)) {
                return Ok(true);
            }
        }
        let opened = self.open(tags).await?;
        let extended = self.extend(&opened, tags).await?.unwrap_or_default();
        Ok(opened.generations.iter().chain(&extended).zip(old.iter().chain(old)).any(|(now, old)| now == old))
    }
}

/// Whether every generation of an entry is current, as the engine decides.
pub(super) fn is_valid(entry: &Entry, tags: &[Tag], generations: &[Option<Generation>]) -> bool {
    let is_current = |stamp: &Stamp| {
        let at = tags.iter().position(|tag| *tag == stamp.tag);
        at.is_some_and(|at| generations.get(at) == Some(&Some(stamp.generation)))
    };
    entry.stamps.iter().all(is_current)
}

pub(super) fn stamps(tags: &[Tag], generations: &[Generation]) -> Box<[Stamp]> {
    tags.iter().cloned().zip(generations.iter().copied()).map(|(tag, generation)| Stamp { tag, generation }).collect()
}

/// With everything that a response may have.
pub(super) fn response(body: impl Into<Bytes>) -> StoredResponse {
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    for value in ["first", "second"] {
        headers.append("x-twice", HeaderValue::from_static(value));
    }
    let mut trailers = HeaderMap::new();
    trailers.insert(HeaderName::from_static("grpc-status"), HeaderValue::from_static("0"));
    StoredResponse {
        status: StatusCode::NON_AUTHORITATIVE_INFORMATION,
        headers: headers.into(),
        body: body.into(),
        trailers: Some(Box::new(trailers)),
    }
}

/// Loaded a minute ago, and fresh for an hour.
pub(super) fn entry(response: StoredResponse, stamps: Box<[Stamp]>) -> Entry {
    let minute = Duration::from_secs(60);
    let life = Lifetime {
        age: minute,
        refresh: minute,
        on_error: 2 * minute,
        load: Duration::from_millis(12),
        ..Lifetime::fresh_for(Some(HOUR + minute))
    };
    Entry::new(Payload::Response(response), stamps, now(), life)
}

/// The body of a response, as far as there is one.
pub(super) fn text(entry: &Entry) -> String {
    entry.response().map_or(String::new(), |response| String::from_utf8_lossy(&response.body).into_owned())
}

/// How an entry differs from what was filled, but for its times; what a hit fills in is left out.
/// Milliseconds by which a time may be another when it has been told by the clock of a server, which may count seconds.
const BETWEEN_CLOCKS: Millis = 10_000;

pub(super) fn difference(filled: &Entry, found: &Entry) -> Option<String> {
    let (one, other) = match (&filled.payload, &found.payload) {
        (Payload::Response(one), Payload::Response(other)) => (one, other),
        (Payload::Value(one), Payload::Value(other)) if one == other => return none_but_stamps(filled, found),
        (Payload::Vary(one), Payload::Vary(other)) if one == other => return none_but_stamps(filled, found),
        _ => return Some("another kind of entry, or another value".to_owned()),
    };
    if one.status != other.status {
        return Some(format!("the status {} instead of {}", other.status, one.status));
    }
    if one.body != other.body {
        return Some(format!("another body, of {} bytes instead of {}", other.body.len(), one.body.len()));
    }
    if said(&one.headers.to_map()) != said(&other.headers.to_map()) {
        return Some(format!("the headers {:?} instead of {:?}", other.headers, one.headers));
    }
    if one.trailers != other.trailers {
        return Some(format!("the trailers {:?} instead of {:?}", other.trailers, one.trailers));
    }
    none_but_stamps(filled, found)
}

fn none_but_stamps(filled: &Entry, found: &Entry) -> Option<String> {
    let times = [("made", filled.created, found.created), ("fresh until", filled.expires, found.expires)];
    if let Some((what, one, other)) = times.into_iter().find(|(_, one, other)| one.abs_diff(*other) > BETWEEN_CLOCKS) {
        return Some(format!("{what} {other} instead of {one}, in milliseconds since 1970"));
    }
    (filled.stamps != found.stamps)
        .then(|| format!("the generations {:?} instead of {:?}", found.stamps, filled.stamps))
}

fn said(headers: &HeaderMap) -> Vec<(&HeaderName, &HeaderValue)> {
    let is_place = |name: &HeaderName| *name == header::AGE || name == "cache-status";
    let mut said: Vec<_> = headers.iter().filter(|(name, value)| !(value.is_empty() && is_place(name))).collect();
    // The order of different names means nothing, that of the values of one does.
    said.sort_by_key(|(name, _)| name.as_str());
    said
}
