//! Values: how they are written, and how one is obtained.

use std::{
    borrow::Cow,
    error::Error,
    fmt,
    future::Future,
    marker::PhantomData,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};
use tokio::sync::oneshot;

use crate::{
    catalog::{Lifetime, Policy},
    clock::Millis,
    engine::{self, Asker, Inside, Leader, Obtained, Use, beside},
    key::{Key, Tag, Tags, Tenant},
    layer::{Core, Reads},
    observe::{FoundIn, Handling, Served, Teller, Timer, Watch},
    store::{Entry, Payload},
};

/// Why a value cannot be written or read.
pub type CodecError = Box<dyn Error + Send + Sync>;

/// How values are written in the store: what it reads must be what it wrote. [`MessagePack`] is the default.
pub trait Codec: 'static {
    /// Part of the key: what is written in one way is not read in another.
    const NAME: &'static str;

    /// Writes a value.
    ///
    /// # Errors
    /// The value has no such form. It is then not cached, which a warning says.
    fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, CodecError>;

    /// Reads a value.
    ///
    /// # Errors
    /// It was written in another shape. It is then loaded anew, which a warning says.
    fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError>;
}

/// [MessagePack](https://msgpack.org), with the names of fields: reads what it wrote, also `NaN`, keys of maps that are no text,
/// `()` and nulls; fields may be added with a default. Like most formats it writes an option in an option as one: `Some(None)`
/// in a field comes back as `None`. What is nested more than 128 deep is not read again, as in JSON.
// As text where types know two forms: what serde buffers (`flatten`, `tag`, `untagged`) is read as if it were.
#[derive(Clone, Copy, Debug)]
pub struct MessagePack;

/// What is nested more deeply is not read: it would take the stack of the thread that reads it.
const MOST_NESTED: usize = 128;

impl Codec for MessagePack {
    const NAME: &'static str = "m";

    fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, CodecError> {
        let mut bytes = vec![];
        value.serialize(&mut rmp_serde::Serializer::new(&mut bytes).with_struct_map().with_human_readable())?;
        Ok(bytes)
    }

    fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
        let mut reader = rmp_serde::Deserializer::from_read_ref(bytes).with_human_readable();
        reader.set_max_depth(MOST_NESTED);
        Ok(T::deserialize(&mut reader)?)
    }
}

/// JSON, which others can read. It has no `NaN`, and keys of maps must be text.
#[derive(Clone, Copy, Debug)]
pub struct Json;

impl Codec for Json {
    const NAME: &'static str = "j";

    fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, CodecError> {
        Ok(serde_json::to_vec(value)?)
    }

    fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
        Ok(serde_json::from_slice(bytes)?)
    }
}

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

/// What is looked for.
pub(super) struct Sought {
    pub(super) core: Arc<Core>,
    pub(super) data_type: String,
    pub(super) resource: String,
    pub(super) tenant: Tenant,
    /// Under which key, and its tags; `None` if no write would find it.
    pub(super) place: Option<(Key, Tags)>,
    pub(super) ttl: Option<Duration>,
    pub(super) keep_none: Option<Duration>,
}

impl Sought {
    /// How long what is found is kept.
    fn kept(&self, policy: &Policy) -> Kept {
        let shorter = |own: Option<Duration>| match (policy.jittered(), own) {
            (Some(of_type), Some(own)) => Some(of_type.min(own)),
            (of_type, own) => of_type.or(own),
        };
        let refresh = policy.stale_while_revalidate.unwrap_or_default();
        Kept { value: shorter(self.ttl), none: self.keep_none.and_then(|none| shorter(Some(none))), refresh }
    }
}

/// What the closures gave, and how long they took.
pub(super) struct Loaded<V> {
    pub(super) value: V,
    pub(super) source: Source,
    pub(super) fetch: Duration,
    pub(super) generate: Duration,
}

/// What is wanted of a value that there may be none of.
pub(crate) struct Shape<T, V> {
    /// From what is stored; `None` if that is not good enough.
    pub(crate) of: fn(Option<T>) -> Option<V>,
    /// What is to be stored.
    pub(crate) some: fn(&V) -> Option<&T>,
}

impl<T, V> Clone for Shape<T, V> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T, V> Copy for Shape<T, V> {}

/// Before a value in the store: whether there is one. (Many formats write `None` like `Some(())`.)
const NONE: u8 = 0;
const SOME: u8 = 1;

impl<T: Serialize + DeserializeOwned, V> Shape<T, V> {
    pub(crate) fn encode<C: Codec>(self, value: &V) -> Result<Vec<u8>, CodecError> {
        let Some(value) = (self.some)(value) else { return Ok(vec![NONE]) };
        let mut bytes = C::encode(value)?;
        bytes.insert(0, SOME);
        Ok(bytes)
    }

    pub(crate) fn decode<C: Codec>(self, entry: &Entry) -> Option<V> {
        let Payload::Value(bytes) = &entry.payload else { return None };
        let value = match bytes.split_first() {
            Some((&NONE, [])) => Ok(None),
            Some((&SOME, bytes)) => C::decode(bytes).map(Some),
            _ => Err("it was written in another way".into()),
        };
        let value =
            value.inspect_err(|error| tracing::warn!(%error, "cached value has another shape: loading it anew"));
        (self.of)(value.ok()?)
    }
}

/// An entry of another shape than ours is loaded anew.
struct Ask<T, V, C> {
    shape: Shape<T, V>,
    /// What the value becomes a part of.
    whole: Option<Reads>,
    /// Where the answer was found, and how many milliseconds it took to load once.
    found: (engine::Source, Served),
    codec: PhantomData<fn() -> C>,
}

impl<T: Serialize + DeserializeOwned, V, C: Codec> Asker for Ask<T, V, C> {
    type Answer = V;

    fn judge(&mut self, entry: Arc<Entry>, source: engine::Source, _: Millis) -> Use<V> {
        let Some(value) = self.shape.decode::<C>(&entry) else { return Use::Lacking };
        let bytes = match &entry.payload {
            Payload::Value(bytes) => bytes.len() as u64,
            _ => 0,
        };
        self.found = (source, Served { bytes, saved: entry.load, ..Served::default() });
        if let Some(whole) = &self.whole {
            whole.add_stamps(&entry.stamps);
            if source == engine::Source::Stale {
                whole.spoil();
            }
        }
        Use::Answer(value)
    }
}

impl<T, V, C> Ask<T, V, C> {
    fn finish(&self, watch: Watch, tier: FoundIn) {
        let (source, served) = self.found;
        match source {
            engine::Source::Store => watch.finish((Handling::Hit, None), Some(tier), served),
            engine::Source::Flight => watch.finish((Handling::Coalesced, Some("uri-miss")), None, served),
            engine::Source::Stale => watch.finish((Handling::Stale, None), Some(tier), served),
        }
    }
}

/// Looks for a value: in this process, in the store, with others.
async fn find<T, V, C>(core: &Core, place: Option<(Key, Tags)>, policy: &Policy, ask: &mut Ask<T, V, C>) -> Obtained<V>
where
    T: Serialize + DeserializeOwned,
    C: Codec,
{
    let Some((key, tags)) = place else { return Obtained::Load(None) };
    let now = core.engine.now();
    let held = core.engine.peek(key.as_bytes(), now, |entry| entry.suited(&tags, policy.longest()));
    match held.map(|entry| ask.judge(entry, engine::Source::Store, now)) {
        Some(Use::Answer(value)) => Obtained::Answer(value),
        _ => core.engine.obtain(key, &tags, policy, ask).await,
    }
}

pub(super) async fn obtain<T, C, V, E, L, Fut>(sought: Sought, shape: Shape<T, V>, load: L) -> Result<(V, Report), E>
where
    T: Serialize + DeserializeOwned + Send + 'static,
    C: Codec,
    V: Send + 'static,
    E: Send + 'static,
    L: FnOnce() -> Fut + Send + 'static,
    Fut: Future<Output = Result<Loaded<V>, E>> + Send + 'static,
{
    let start = Instant::now();
    let teller = sought.core.tellers.of(&sought.data_type);
    let name = || Cow::from(format!("{}/{}", sought.data_type, sought.resource));
    let mut watch = Some(teller.watcher().watch(Timer::start(), || Some(sought.tenant.name().into()), name));
    let policy = sought.core.policy(&sought.data_type);
    let kept = sought.kept(&policy);
    let Sought { core, data_type, resource, tenant, place, .. } = sought;
    let place = place.filter(|_| core.keeps_out(&data_type, &policy).is_none());
    let report = |loaded: Option<&Loaded<V>>, lookup| Report {
        source: loaded.map_or(Source::Cache, |l| l.source),
        data_type,
        resource,
        lookup,
        fetch: loaded.map_or(Duration::ZERO, |l| l.fetch),
        generate: loaded.map_or(Duration::ZERO, |l| l.generate),
        total: start.elapsed(),
    };
    // What this value becomes a part of depends on what this value depends on.
    let whole = Reads::current();
    let found = (engine::Source::Store, Served::default());
    let mut ask = Ask { shape, whole: whole.clone(), found, codec: PhantomData::<fn() -> C> };
    let tags = place.as_ref().map(|(_, tags)| tags.clone());
    let found = find(&core, place, &policy, &mut ask).await;
    let lookup = start.elapsed();
    if let Obtained::Answer(_) | Obtained::AnswerAndReload(..) = &found {
        watch.take().into_iter().for_each(|watch| ask.finish(watch, core.found_in()));
    }
    let fill = Fill { teller: teller.clone(), core: core.clone(), tenant, kept, reads: Reads::default() };
    let leader = match found {
        Obtained::Answer(value) => return Ok((value, report(None, lookup))),
        Obtained::AnswerAndReload(value, leader) => {
            core.engine.spawn(Inside::of(Some(&leader)).around(fill.load::<T, C, _, _, _, _>(
                Some(leader),
                shape,
                load,
            )));
            return Ok((value, report(None, lookup)));
        }
        Obtained::Absent => None,
        Obtained::Load(leader) => leader,
    };
    let (scope, parts) = (Inside::of(leader.as_ref()), fill.reads.clone());
    let (reply, replied) = oneshot::channel();
    // Who has gone does not want it any more.
    let load = async move { drop(reply.send(fill.load::<T, C, _, _, _, _>(leader, shape, load).await)) };
    let loaded = core.engine.attend(scope.around(load), replied).await;
    let reason = if loaded.is_ok() { "uri-miss" } else { "error" };
    watch.into_iter().for_each(|watch| watch.finish((Handling::Miss, Some(reason)), None, Served::default()));
    // That there was an error may depend on all that, too.
    if let Some(whole) = whole {
        whole.add_loaded(tags.as_deref(), &parts);
    }
    let loaded = loaded?;
    let report = report(Some(&loaded), lookup);
    Ok((loaded.value, report))
}

/// How long a value is kept (`None`: for ever), and that there is none (`None`: not at all).
struct Kept {
    value: Option<Duration>,
    none: Option<Duration>,
    /// For so long it is then served while it is refreshed.
    refresh: Duration,
}

/// What a load needs to store what it has loaded.
struct Fill {
    teller: Teller,
    core: Arc<Core>,
    tenant: Tenant,
    kept: Kept,
    reads: Reads,
}

impl Fill {
    async fn load<T, C, V, E, L, Fut>(
        self,
        mut leader: Option<Leader>,
        shape: Shape<T, V>,
        load: L,
    ) -> Result<Loaded<V>, E>
    where
        T: Serialize + DeserializeOwned,
        C: Codec,
        L: FnOnce() -> Fut,
        Fut: Future<Output = Result<Loaded<V>, E>>,
    {
        let start = Instant::now();
        let loaded = beside(leader.as_mut(), self.reads.scope(async { load().await })).await;
        self.teller.watcher().loaded(loaded.is_ok(), start.elapsed());
        let loaded = loaded?;
        if let (Some(leader), Ok(late)) = (leader, self.reads.tags(&self.core, &self.tenant)) {
            let is_some = (shape.some)(&loaded.value).is_some();
            let keep = if is_some { Some(self.kept.value) } else { self.kept.none.map(Some) };
            let bytes = shape.encode::<C>(&loaded.value);
            self.store(leader.made_of(self.reads.stamps()), late, bytes, (keep, start.elapsed())).await;
        }
        Ok(loaded)
    }

    /// Gives a value to those who wait for it, and stores it if it is to be kept.
    async fn store(
        &self,
        leader: Leader,
        late: Vec<Tag>,
        bytes: Result<Vec<u8>, CodecError>,
        (keep, took): (Option<Option<Duration>>, Duration),
    ) {
        match bytes {
            Ok(bytes) => {
                let refresh = if keep.is_some() { self.kept.refresh } else { Duration::ZERO };
                let size = bytes.len();
                let fresh = keep.unwrap_or(Some(Duration::ZERO));
                let life = Lifetime { refresh, load: took, is_mapped: keep.is_some(), ..Lifetime::fresh_for(fresh) };
                let sealed = leader.seal(Payload::Value(Bytes::from(bytes)), late, life, None).await;
                if let Some(sealed) = sealed.filter(|sealed| keep.is_some() && sealed.is_kept()) {
                    self.teller.watcher().stored(size);
                    match sealed.is_remote() {
                        true => drop(self.core.engine.spawn(sealed.store())),
                        false => sealed.store().await,
                    }
                }
            }
            Err(error) => tracing::warn!(%error, "value not cached: it cannot be written"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// What is read is what was stored, to the last bit.
        #[test]
        fn numbers_are_kept(value: f64) {
            prop_assume!(value.is_finite());
            prop_assert_eq!(Json::decode::<f64>(&Json::encode(&value).unwrap()).unwrap().to_bits(), value.to_bits());
            prop_assert_eq!(MessagePack::decode::<f64>(&MessagePack::encode(&value).unwrap()).unwrap().to_bits(), value.to_bits());
        }
    }
}
