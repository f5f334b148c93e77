//! The cache-aside function, for code that is not behind HTTP: look up → fetch → generate → store → return the value
//! and how it was obtained.

use std::{
    borrow::Cow,
    collections::HashSet,
    future::{Future, IntoFuture},
    marker::PhantomData,
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use serde::{Serialize, de::DeserializeOwned};

use super::value::{Codec, Loaded, MessagePack, Report, Shape, Sought, Source, obtain};
use crate::{
    error::ConfigError,
    key::{Key, KeyBuf, Tags, Tenant, bounded, key_and_tags, push_escaped, push_ids, push_type},
    layer::Core,
};

/// A value to be obtained through the cache; made by [`Cache::entry`](crate::Cache::entry). `C` is how it is
/// [written](Codec).
#[must_use = "nothing is looked up before `fetch`"]
pub struct EntryBuilder<T, C = MessagePack> {
    core: Arc<Core>,
    data_type: String,
    resource: String,
    tenant: Option<String>,
    scope: Vec<(String, String)>,
    tags: Vec<(String, String)>,
    version: Option<u32>,
    variant: Vec<u8>,
    ttl: Option<Duration>,
    keep_none: Option<Duration>,
    value: PhantomData<fn() -> (T, C)>,
}

impl<T> EntryBuilder<T> {
    pub(super) fn new(core: Arc<Core>, data_type: String, resource: String) -> Self {
        Self {
            core,
            data_type,
            resource,
            tenant: None,
            scope: vec![],
            tags: vec![],
            version: None,
            variant: vec![],
            ttl: None,
            keep_none: None,
            value: PhantomData,
        }
    }
}

impl<T, C: Codec> EntryBuilder<T, C> {
    /// How the value is written; by default [`MessagePack`]. Values that are written in different ways are different ones.
    pub fn codec<D: Codec>(self) -> EntryBuilder<T, D> {
        let Self { core, data_type, resource, tenant, scope, tags, version, variant, ttl, keep_none, value: _ } = self;
        let value = PhantomData;
        EntryBuilder { core, data_type, resource, tenant, scope, tags, version, variant, ttl, keep_none, value }
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

    /// An entity that it belongs to, which is no part of its key: a cascade that drops this type by that entity finds it.
    pub fn tag(mut self, entity: impl Into<String>, id: impl Into<String>) -> Self {
        self.tags.push((entity.into(), id.into()));
        self
    }

    /// The shape of the value: each has entries of its own, and falls with the same writes. Count it up when the type changes
    /// in a way that [`Codec`] would read wrongly.
    pub fn version(mut self, version: u32) -> Self {
        self.version = Some(version);
        self
    }

    /// What else the value depends on: a page, a language, a model's name.
    pub fn variant(mut self, variant: impl Into<Vec<u8>>) -> Self {
        self.variant = variant.into();
        self
    }

    /// How long this value is kept, at most as long as its type says.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = Some(ttl);
        self
    }

    /// Also keeps for so long that there is none (`Ok(None)`), at most as long as its type says. A write that creates it must
    /// drop it.
    pub fn keep_none(mut self, ttl: Duration) -> Self {
        self.keep_none = Some(ttl);
        self
    }

    /// How to get it from the database: `Ok(None)` when the database has none.
    ///
    /// The closure runs in a task of its own, which goes on when the caller is dropped. Its error goes to the caller
    /// and is not cached; callers that waited for it try themselves.
    ///
    /// # Errors
    /// What no write would ever drop: an unknown data type, no tenant where there are several, neither scope nor tag of an
    /// entity by which cascades drop this type; a tag by which none does.
    pub fn fetch<F, Fut, E>(self, fetch: F) -> Result<Fetch<T, F, C>, ConfigError>
    where
        T: Serialize + DeserializeOwned + Send + 'static,
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = Result<Option<T>, E>> + Send + 'static,
    {
        let core = &self.core;
        let what = format!("entry of `{}`", self.data_type);
        core.catalogue.check(&what, &self.data_type)?;
        let names = |entity: &str| self.scope.iter().chain(&self.tags).any(|(named, _)| named == entity);
        let expected = &core.routes.expected;
        if let Some((entity, _)) = self.tags.iter().find(|(entity, _)| !expected.is_useful(&self.data_type, entity)) {
            return Err(ConfigError::new(format!(
                "{what}: no cascade drops this type by {entity}; mend the tag, or declare the cascade"
            )));
        }
        if let Some(missing) = core.routes.expected.missing(&self.data_type, names) {
            return Err(ConfigError::new(format!(
                "{what}: cascades drop this type by {missing}, which neither its id nor its scope names; add it with `scope` \
                 (or `tag`)"
            )));
        }
        let tenant = core.space.tenant(core.tenants.by_hand(self.tenant.as_deref())?);
        let place = self.place(&tenant);
        Ok(Fetch { entry: self, tenant, place, fetch })
    }

    /// Under which key it is stored, and its tags; `None` if one of its ids has no form in which a write would find it.
    fn place(&self, tenant: &Tenant) -> Option<(Key, Tags)> {
        let (space, entities) = (&self.core.space, &self.core.cascades.entities);
        let id =
            |(entity, id): &(String, String)| Some((entity.clone(), entities.id(entity, id.as_bytes())?.into_owned()));
        let own = entities.of_type(&self.data_type).to_owned();
        let own = id(&(own, self.resource.clone()));
        let own = own?;
        let mut scope = self.scope.iter().map(id).collect::<Option<Vec<_>>>()?;
        scope.sort_unstable();
        scope.dedup();
        let mut key = KeyBuf::new();
        space.push_entry(&mut key, tenant.name());
        push_type(&mut key, &self.data_type);
        push_ids(&mut key, Some(&own.1), scope.iter().map(|(e, id)| (e.as_str(), &id[..])));
        key.push(b'v');
        push_escaped(&mut key, C::NAME.as_bytes());
        if let Some(version) = self.version {
            key.extend_from_slice(format!("@{version}").as_bytes());
        }
        if !self.variant.is_empty() {
            key.push(b'?');
            push_escaped(&mut key, &self.variant);
        }
        let tags = self.tags.iter().map(id).collect::<Option<Vec<_>>>()?;
        let entities = scope.iter().chain(&tags).filter(|s| **s != own).chain([&own]);
        let entities = entities.map(|(entity, id)| (entity.as_str(), Cow::from(&id[..])));
        let mut type_part = KeyBuf::new();
        push_type(&mut type_part, &self.data_type);
        let (key, mut tags, _) = key_and_tags(bounded(key), b"", &type_part, entities);
        let mut seen = HashSet::new();
        tags.retain(|tag| seen.insert(tag.clone()));
        Some((key, tags))
    }
}

/// A value with its `fetch`; await it for an `Option`, or go on to [`generate`](Self::generate).
#[must_use = "nothing is looked up before it is awaited"]
pub struct Fetch<T, F, C = MessagePack> {
    entry: EntryBuilder<T, C>,
    tenant: Tenant,
    place: Option<(Key, Tags)>,
    fetch: F,
}

impl<T, F, C: Codec> Fetch<T, F, C> {
    fn sought(&self) -> Sought {
        let EntryBuilder { core, data_type, resource, ttl, keep_none, .. } = &self.entry;
        Sought {
            core: core.clone(),
            data_type: data_type.clone(),
            resource: resource.clone(),
            tenant: self.tenant.clone(),
            place: self.place.clone(),
            ttl: *ttl,
            keep_none: *keep_none,
        }
    }

    /// How to make one when the database has none; the result is stored like a fetched one.
    pub fn generate<G, Fut, E>(self, generate: G) -> Generate<T, F, G, C>
    where
        G: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = Result<T, E>> + Send + 'static,
    {
        Generate { fetch: self, generate }
    }
}

/// A value with its `fetch` and its `generate`; await it.
#[must_use = "nothing is looked up before it is awaited"]
pub struct Generate<T, F, G, C = MessagePack> {
    fetch: Fetch<T, F, C>,
    generate: G,
}

type Output<T, E> = Pin<Box<dyn Future<Output = Result<(T, Report), E>> + Send>>;

impl<T, F, C, Fut, E> IntoFuture for Fetch<T, F, C>
where
    T: Serialize + DeserializeOwned + Send + 'static,
    C: Codec,
    F: FnOnce() -> Fut + Send + 'static,
    Fut: Future<Output = Result<Option<T>, E>> + Send + 'static,
    E: Send + 'static,
{
    type Output = Result<(Option<T>, Report), E>;
    type IntoFuture = Output<Option<T>, E>;

    fn into_future(self) -> Self::IntoFuture {
        let (sought, fetch) = (self.sought(), self.fetch);
        // There may be none, and that may be kept.
        let shape = Shape::<T, Option<T>> { of: Some, some: Option::as_ref };
        Box::pin(obtain::<T, C, _, _, _, _>(sought, shape, move || async move {
            let start = Instant::now();
            let value = fetch().await?;
            Ok(Loaded { value, source: Source::Origin, fetch: start.elapsed(), generate: Duration::ZERO })
        }))
    }
}

impl<T, F, G, C, Fut, Gut, E> IntoFuture for Generate<T, F, G, C>
where
    T: Serialize + DeserializeOwned + Send + 'static,
    C: Codec,
    F: FnOnce() -> Fut + Send + 'static,
    Fut: Future<Output = Result<Option<T>, E>> + Send + 'static,
    G: FnOnce() -> Gut + Send + 'static,
    Gut: Future<Output = Result<T, E>> + Send + 'static,
    E: Send + 'static,
{
    type Output = Result<(T, Report), E>;
    type IntoFuture = Output<T, E>;

    fn into_future(self) -> Self::IntoFuture {
        let (sought, fetch, generate) = (self.fetch.sought(), self.fetch.fetch, self.generate);
        let shape = Shape::<T, T> { of: |value| value, some: |value| Some(value) };
        Box::pin(obtain::<T, C, _, _, _, _>(sought, shape, move || async move {
            let start = Instant::now();
            let found = fetch().await?;
            let fetch = start.elapsed();
            let (value, source) = match found {
                Some(value) => (value, Source::Origin),
                None => (generate().await?, Source::Generated),
            };
            Ok(Loaded { value, source, fetch, generate: start.elapsed() - fetch })
        }))
    }
}
