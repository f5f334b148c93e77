//! The cache-aside function, for code that is not behind HTTP: look up → fetch → generate → store → return the value
//! and how it was obtained.

use std::{
    fmt,
    future::{Future, IntoFuture},
    marker::PhantomData,
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    catalog::Lifetime,
    engine::{self, Asker, Engine, Inside, Leader, Obtained, Use},
    error::ConfigError,
    key::{Key, KeyBuf, Tag, Tenant, bounded, push_ids, push_type},
    layer::{Core, Reads, joined},
    store::{Entry, Payload},
};

/// Where a value came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Source {
    /// The cache, or a load that another caller had under way.
    Cache,
    /// The `fetch` closure.
    Origin,
    /// The `generate` closure, because `fetch` found nothing.
    Generated,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cache => "cache",
            Self::Origin => "origin",
            Self::Generated => "generated",
        })
    }
}

/// How a value was obtained.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Report {
    /// Where it came from.
    pub source: Source,
    /// Its data type.
    pub data_type: String,
    /// Its id.
    pub resource: String,
    /// How long the look-up took, waiting for another's load included.
    pub lookup: Duration,
    /// How long `fetch` took; zero on a hit.
    pub fetch: Duration,
    /// How long `generate` took; zero if it did not run.
    pub generate: Duration,
    /// How long it all took.
    pub total: Duration,
}

/// A value to be obtained through the cache; made by [`Cache::entry`](crate::Cache::entry).
#[must_use = "nothing is looked up before `fetch`"]
pub struct EntryBuilder<T> {
    core: Arc<Core>,
    data_type: String,
    resource: String,
    tenant: Option<String>,
    scope: Vec<(String, String)>,
    value: PhantomData<fn() -> T>,
}

impl<T> EntryBuilder<T> {
    pub(super) fn new(core: Arc<Core>, data_type: String, resource: String) -> Self {
        Self { core, data_type, resource, tenant: None, scope: vec![], value: PhantomData }
    }

    /// Whose value it is. A cache with a [single tenant](crate::CacheBuilder::single_tenant) may leave it out.
    pub fn tenant(mut self, tenant: impl Into<String>) -> Self {
        self.tenant = Some(tenant.into());
        self
    }

    /// An entity that it belongs to: part of its key, and a tag that cascades may drop.
    pub fn scope(mut self, entity: impl Into<String>, id: impl Into<String>) -> Self {
        self.scope.push((entity.into(), id.into()));
        self
    }

    /// How to get it from the database: `Ok(None)` when the database has none.
    ///
    /// The closure runs in a task of its own, which goes on when the caller is dropped. Its error goes to the caller
    /// and is not cached; callers that waited for it try themselves.
    ///
    /// # Errors
    /// What no write would ever drop: an unknown data type, no tenant where there are several, a scope that lacks an entity
    /// by which cascades drop this type.
    pub fn fetch<F, Fut, E>(self, fetch: F) -> Result<Fetch<T, F>, ConfigError>
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = Result<Option<T>, E>> + Send + 'static,
    {
        let core = &self.core;
        let what = format!("entry of `{}`", self.data_type);
        core.catalogue.check(&what, &self.data_type)?;
        let names = |entity: &str| self.scope.iter().any(|(scope, _)| scope == entity);
        if let Some(missing) = core.routes.expected.missing(&self.data_type, names) {
            return Err(ConfigError::new(format!(
                "{what}: cascades drop this type by {missing}, which neither its id nor its scope names; add it with `scope`"
            )));
        }
        let tenant = core.space.tenant(core.tenants.by_hand(self.tenant.as_deref())?);
        let place = self.place(&tenant);
        Ok(Fetch { entry: self, tenant, place, fetch })
    }

    /// Under which key it is stored, and its tags; `None` if one of its ids has no form in which a write would find it.
    fn place(&self, tenant: &Tenant) -> Option<(Key, Vec<Tag>)> {
        let (space, entities) = (&self.core.space, &self.core.cascades.entities);
        let head = tenant.head();
        let id =
            |(entity, id): &(String, String)| Some((entity.clone(), entities.id(entity, id.as_bytes())?.into_owned()));
        let own = entities.of_type(&self.data_type).to_owned();
        let own = id(&(own, self.resource.clone()));
        let own = own?;
        let mut scope = self.scope.iter().map(id).collect::<Option<Vec<_>>>()?;
        scope.sort_unstable();
        scope.dedup();
        let mut key = KeyBuf::new();
        space.push_entry(&mut key, &tenant.name);
        push_type(&mut key, &self.data_type);
        push_ids(&mut key, Some(&own.1), scope.iter().map(|(e, id)| (e.as_str(), &id[..])));
        key.push(b'v');
        let entities = scope.iter().filter(|s| **s != own).chain([&own]);
        let mut tags: Vec<_> = entities.map(|(e, id)| Tag::entity(head, &self.data_type, e, id)).collect();
        tags.push(Tag::all(head, &self.data_type));
        Some((Key::new(bounded(key)), tags))
    }
}

/// A value with its `fetch`; await it for an `Option`, or go on to [`generate`](Self::generate).
#[must_use = "nothing is looked up before it is awaited"]
pub struct Fetch<T, F> {
    entry: EntryBuilder<T>,
    tenant: Tenant,
    place: Option<(Key, Vec<Tag>)>,
    fetch: F,
}

impl<T, F> Fetch<T, F> {
    /// How to make one when the database has none; the result is stored like a fetched one.
    pub fn generate<G, Fut, E>(self, generate: G) -> Generate<T, F, G>
    where
        G: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = Result<T, E>> + Send + 'static,
    {
        Generate { fetch: self, generate }
    }
}

/// A value with its `fetch` and its `generate`; await it.
#[must_use = "nothing is looked up before it is awaited"]
pub struct Generate<T, F, G> {
    fetch: Fetch<T, F>,
    generate: G,
}

type Output<T, E> = Pin<Box<dyn Future<Output = Result<(T, Report), E>> + Send>>;

impl<T, F, Fut, E> IntoFuture for Fetch<T, F>
where
    T: Serialize + DeserializeOwned + Send + 'static,
    F: FnOnce() -> Fut + Send + 'static,
    Fut: Future<Output = Result<Option<T>, E>> + Send + 'static,
    E: Send + 'static,
{
    type Output = Result<(Option<T>, Report), E>;
    type IntoFuture = Output<Option<T>, E>;

    fn into_future(self) -> Self::IntoFuture {
        let fetch = self.fetch;
        Box::pin(obtain(self.entry, self.tenant, self.place, move || async move {
            let start = Instant::now();
            let value = fetch().await?;
            let keep = value.is_some();
            Ok(Loaded { value, keep, source: Source::Origin, fetch: start.elapsed(), generate: Duration::ZERO })
        }))
    }
}

impl<T, F, G, Fut, Gut, E> IntoFuture for Generate<T, F, G>
where
    T: Serialize + DeserializeOwned + Send + 'static,
    F: FnOnce() -> Fut + Send + 'static,
    Fut: Future<Output = Result<Option<T>, E>> + Send + 'static,
    G: FnOnce() -> Gut + Send + 'static,
    Gut: Future<Output = Result<T, E>> + Send + 'static,
    E: Send + 'static,
{
    type Output = Result<(T, Report), E>;
    type IntoFuture = Output<T, E>;

    fn into_future(self) -> Self::IntoFuture {
        let (fetch, generate) = (self.fetch.fetch, self.generate);
        Box::pin(obtain(self.fetch.entry, self.fetch.tenant, self.fetch.place, move || async move {
            let start = Instant::now();
            let found = fetch().await?;
            let fetch = start.elapsed();
            let (value, source) = match found {
                Some(value) => (value, Source::Origin),
                None => (generate().await?, Source::Generated),
            };
            Ok(Loaded { value, keep: true, source, fetch, generate: start.elapsed() - fetch })
        }))
    }
}

/// What the closures gave, and how long they took.
struct Loaded<V> {
    value: V,
    /// Whether it is stored; that there is none is only shared with those who wait for it.
    keep: bool,
    source: Source,
    fetch: Duration,
    generate: Duration,
}

async fn obtain<T, V, E, L, Fut>(
    entry: EntryBuilder<T>,
    tenant: Tenant,
    place: Option<(Key, Vec<Tag>)>,
    load: L,
) -> Result<(V, Report), E>
where
    V: Serialize + DeserializeOwned + Send + 'static,
    E: Send + 'static,
    L: FnOnce() -> Fut + Send + 'static,
    Fut: Future<Output = Result<Loaded<V>, E>> + Send + 'static,
{
    let start = Instant::now();
    let EntryBuilder { core, data_type, resource, .. } = entry;
    let policy = core.policy(&data_type);
    let report = |loaded: Option<&Loaded<V>>, lookup| Report {
        source: loaded.map_or(Source::Cache, |l| l.source),
        data_type,
        resource,
        lookup,
        fetch: loaded.map_or(Duration::ZERO, |l| l.fetch),
        generate: loaded.map_or(Duration::ZERO, |l| l.generate),
        total: start.elapsed(),
    };
    let engine = &core.engine;
    // What this value becomes a part of depends on what this value depends on.
    let whole = Reads::current();
    let mut ask = Ask { whole: whole.clone(), value: PhantomData::<fn() -> V> };
    let tags = place.as_ref().map(|(_, tags)| tags.clone());
    let found = match place {
        None => Obtained::Load(None),
        Some((key, tags)) => {
            let held = engine.peek(key.as_bytes(), engine.now());
            match held.map(|entry| ask.judge(&entry, engine::Source::Store)) {
                Some(Use::Answer(value)) => Obtained::Answer(value),
                _ => engine.obtain(key, &tags, &policy, &mut ask).await,
            }
        }
    };
    let leader = match found {
        Obtained::Answer(value) | Obtained::AnswerAndReload(value, _) => {
            return Ok((value, report(None, start.elapsed())));
        }
        Obtained::Absent => None,
        Obtained::Load(leader) => leader,
    };
    let lookup = start.elapsed();
    let ttl = policy.jittered();
    let fills = core.clone();
    let reads = Reads::default();
    let parts = reads.clone();
    let scope = Inside::of(leader.as_ref());
    let task = engine.spawn(scope.around(async move {
        let loaded = reads.scope(load()).await?;
        if let (Some(leader), Ok(late)) = (leader, reads.tags(&fills, &tenant)) {
            let leader = leader.made_of(reads.stamps());
            store(&fills.engine, leader, late, serde_json::to_vec(&loaded.value), loaded.keep, ttl).await;
        }
        Ok(loaded)
    }));
    let loaded = joined(task).await;
    // That there was an error may depend on all that, too.
    if let Some(whole) = whole {
        whole.add_loaded(tags.as_deref(), &parts);
    }
    let loaded = loaded?;
    let report = report(Some(&loaded), lookup);
    Ok((loaded.value, report))
}

/// An entry of another shape than ours is loaded anew.
struct Ask<V> {
    /// What the value becomes a part of.
    whole: Option<Reads>,
    value: PhantomData<fn() -> V>,
}

impl<V: DeserializeOwned> Asker for Ask<V> {
    type Answer = V;

    fn judge(&mut self, entry: &Entry, source: engine::Source) -> Use<V> {
        let Some(value) = decode(entry) else { return Use::Useless };
        if let Some(whole) = &self.whole {
            whole.add_stamps(&entry.stamps);
            if source == engine::Source::Stale {
                whole.spoil();
            }
        }
        Use::Answer(value)
    }
}

/// Gives a value to those who wait for it, and stores it if it is to be kept.
async fn store(
    engine: &Engine,
    leader: Leader,
    late: Vec<Tag>,
    json: serde_json::Result<Vec<u8>>,
    keep: bool,
    ttl: Option<Duration>,
) {
    match json {
        Ok(json) => {
            let sealed = leader.seal(Payload::Value(Bytes::from(json)), late, Lifetime::fresh_for(ttl), None).await;
            if let Some(sealed) = sealed.filter(|_| keep) {
                engine.spawn(sealed.store());
            }
        }
        Err(error) => tracing::warn!(%error, "value not cached: it cannot be written as JSON"),
    }
}

fn decode<V: DeserializeOwned>(entry: &Entry) -> Option<V> {
    match &entry.payload {
        Payload::Value(json) => serde_json::from_slice(json)
            .inspect_err(|error| tracing::warn!(%error, "cached value has another shape: loading it anew"))
            .ok(),
        Payload::Response(_) | Payload::Vary(_) => None,
    }
}
