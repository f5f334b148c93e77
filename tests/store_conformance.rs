//! Every store does what the engine relies on; and whoever breaks a rule of it is found, by its name.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/memcached.rs"]
mod memcached;
#[path = "../examples/own_store.rs"]
#[allow(dead_code)]
mod own_store;
#[path = "support/redis.rs"]
mod redis;

use std::{
    collections::HashMap,
    future::ready,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::future::join_all;
use memcached::Memcached;
use own_store::OwnStore;
use redis::{Redis, RedisCluster};
use tower_cache_aside::{
    Cache, DataType, Key, Source, Tag, Tier, Ttl,
    store::{
        Clocks, Entry, Exchange, Fence, Generation, Guard, Inquiry, Lookup, Mark, MemcachedStore, MemoryStore, Millis,
        Opened, RedisStore, Regional, Search, Store, StoreError, StoreFuture, StoredResponse, TagGroup, conformance,
    },
    testing::Faulty,
};

/// A way not to do what the engine relies on.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Sabotage {
    /// Says, as a store of one process, that it is not shared. (No sabotage.)
    Alone,
    NeverHits,
    /// A tag has its first generation for ever.
    DroppedComesBack,
    FixedGeneration,
    /// Fences drop, and do not stand.
    IgnoresTheFence,
    LiftsEverybodysFences,
    ExtendAlwaysProves,
    /// A mark proves everything but what is fenced now.
    ExtendLooksAtFencesOnly,
    DropsTheFirstTagOnly,
    DropsTheFirstGroupOnly,
    /// An invalidation is answered before it is made.
    AcknowledgesEarly,
    CountsFail,
    CountsAreMadeUp,
    ClaimIsAlwaysTrue,
    ReleaseDoesNothing,
    LooksUpInTheWrongOrder,
    CutsTheBody,
    LosesTrailers,
    LosesAllButOneValue,
    LaterByAnHour,
    ForgetsLongest,
    /// Look-ups, too, whatever was dropped.
    MarksAreTheSame,
    LeasesNeverEnd,
    ClearDoesNothing,
    /// Everybody who opens a tag gets a generation of its own.
    OpensDisagree,
    /// What is to be kept for more than thirty days is kept until some day in 1970, as by memcached.
    CountsToThirtyDays,
    MixesFleets,
    MixesNotes,
    /// Keys of more than 250 bytes are cut.
    CutsKeys,
    PeeksAtWhatWasDropped,
    /// What it holds is current for ever.
    HoldsWhatWasDropped,
    FailsAlways,
}

use Sabotage::*;

/// Each with a rule that it breaks.
const SABOTAGES: [(Sabotage, &str); 31] = [
    (NeverHits, "it_hits"),
    (DroppedComesBack, "a_dropped_generation_never_comes_back"),
    (FixedGeneration, "a_dropped_generation_never_comes_back"),
    (IgnoresTheFence, "a_fence_stands_until_its_writer_comes_back"),
    (LiftsEverybodysFences, "a_writer_lifts_only_its_own_fence"),
    (ExtendAlwaysProves, "a_mark_proves_nothing_of_what_was_dropped"),
    (MarksAreTheSame, "a_mark_proves_nothing_of_what_was_dropped"),
    (ExtendLooksAtFencesOnly, "a_mark_proves_nothing_of_a_lease_that_ran_out"),
    (DropsTheFirstTagOnly, "an_invalidation_drops_all_tags_of_all_groups"),
    (DropsTheFirstGroupOnly, "an_invalidation_drops_all_tags_of_all_groups"),
    (AcknowledgesEarly, "no_entry_outlives_the_drop_of_its_tags"),
    (CountsFail, "counts_are_about_right"),
    (CountsAreMadeUp, "counts_are_about_right"),
    (ClaimIsAlwaysTrue, "one_claims_at_a_time"),
    (ReleaseDoesNothing, "one_claims_at_a_time"),
    (LooksUpInTheWrongOrder, "what_is_asked_is_answered_in_order"),
    (CutsTheBody, "bodies_are_found_whole"),
    (LosesTrailers, "every_kind_of_entry_is_found_as_it_was"),
    (LosesAllButOneValue, "odd_headers_are_found_as_they_were"),
    (LaterByAnHour, "no_other_clock_makes_an_entry_last_longer"),
    (ForgetsLongest, "a_reader_has_the_last_word_on_how_long"),
    (LeasesNeverEnd, "a_lease_runs_out"),
    (ClearDoesNothing, "clear_drops_all_tenants"),
    (OpensDisagree, "opens_at_once_agree"),
    (CountsToThirtyDays, "what_is_kept_for_long_is_found"),
    (MixesFleets, "members_of_a_fleet_hear_each_other"),
    (MixesNotes, "a_note_is_kept_as_it_was_written_last"),
    (CutsKeys, "each_key_has_its_own_entry"),
    (PeeksAtWhatWasDropped, "a_peek_tells_only_what_is_current"),
    (HoldsWhatWasDropped, "what_is_held_is_current_until_it_is_dropped"),
    (FailsAlways, "it_hits"),
];

/// A store with a sabotage. Its clones are handles to the same place.
#[derive(Clone)]
struct Sabotaged {
    store: Arc<dyn Store>,
    how: Sabotage,
    first: Arc<Mutex<HashMap<Tag, Generation>>>,
    writers: Arc<Mutex<Vec<Fence>>>,
    /// Entries by what is left of their keys.
    held: Arc<Mutex<HashMap<Vec<u8>, Arc<Entry>>>>,
}

impl Sabotaged {
    fn new(store: impl Store, how: Sabotage) -> Self {
        let (first, writers, held) = Default::default();
        Self { store: Arc::new(store), how, first, writers, held }
    }

    fn seen(&self, tag: &Tag, generation: Generation) -> Generation {
        match self.how {
            FixedGeneration => Generation(7),
            DroppedComesBack => *self.first.lock().unwrap().entry(tag.clone()).or_insert(generation),
            IgnoresTheFence => generation.unfenced(),
            OpensDisagree => Generation::unique(),
            _ => generation,
        }
    }

    /// The same, but for its response.
    fn altered(entry: &Entry, now: Millis, alter: impl Fn(&mut StoredResponse)) -> Arc<Entry> {
        let Some(response) = entry.response() else { return Arc::new(entry.clone()) };
        let mut response = response.clone();
        alter(&mut response);
        Arc::new(Entry::of_response(response, entry.stamps().to_vec(), now, Duration::from_secs(3_600)))
    }

    fn entry(&self, inquiry: &Inquiry<'_>, entry: Arc<Entry>) -> Option<Arc<Entry>> {
        let now = inquiry.now;
        Some(match self.how {
            NeverHits => return None,
            CutsTheBody => Self::altered(&entry, now, |response| response.body.truncate(1_000)),
            LosesTrailers => Self::altered(&entry, now, |response| response.trailers = None),
            LosesAllButOneValue => Self::altered(&entry, now, |response| {
                let mut headers = response.headers.to_map().into_owned();
                response.headers =
                    headers.drain().filter_map(|(n, v)| Some((n?, v))).collect::<http::HeaderMap>().into();
            }),
            LaterByAnHour => {
                let late = Clocks { here: now, shared: now + 3_600_000 };
                let bytes = entry.encode(late).unwrap();
                Arc::new(Entry::decode(bytes.into(), Clocks { here: now, shared: now }, None).unwrap())
            }
            _ => entry,
        })
    }
}

fn cut(key: &[u8]) -> Vec<u8> {
    key[..key.len().min(250)].to_vec()
}

fn fails<'a, T: Send + 'a>() -> StoreFuture<'a, T> {
    Box::pin(ready(Err(StoreError::new("sabotage"))))
}

impl Store for Sabotaged {
    fn peek(&self, key: &[u8], now: Millis) -> Option<Arc<Entry>> {
        match self.how {
            PeeksAtWhatWasDropped => self.held.lock().unwrap().get(&cut(key)).cloned(),
            _ => self.store.peek(key, now),
        }
    }

    fn held(&self, key: &[u8], tier: Tier) -> Option<Arc<Entry>> {
        match self.how {
            HoldsWhatWasDropped => self.held.lock().unwrap().get(&cut(key)).cloned(),
            _ => self.store.held(key, tier),
        }
    }

    fn is_current<'a>(&'a self, key: &'a [u8], entry: &'a Entry) -> StoreFuture<'a, bool> {
        match self.how {
            HoldsWhatWasDropped => Box::pin(ready(Ok(true))),
            _ => self.store.is_current(key, entry),
        }
    }

    fn lookup<'a>(&'a self, inquiry: Inquiry<'a>) -> StoreFuture<'a, Lookup> {
        Box::pin(async move {
            let mut asked = inquiry;
            asked.longest = asked.longest.filter(|_| self.how != ForgetsLongest);
            let found = self.store.lookup(asked).await?;
            let mut entry = found.entry.and_then(|entry| self.entry(&inquiry, entry));
            if self.how == CutsKeys {
                entry = self.held.lock().unwrap().get(&cut(inquiry.key.as_bytes())).cloned();
            }
            let generations = inquiry.tags.iter().zip(found.generations);
            let mut generations: Vec<_> = generations.map(|(tag, g)| g.map(|g| self.seen(tag, g))).collect();
            if self.how == LooksUpInTheWrongOrder {
                generations.sort_by_key(|generation| generation.map(|generation| generation.0));
            }
            let mark = (self.how == MarksAreTheSame).then_some(Mark(0));
            if self.how == FailsAlways { fails().await } else { Ok(Lookup::new(entry, generations).marked(mark)) }
        })
    }

    fn open<'a>(&'a self, tags: &'a [Tag]) -> StoreFuture<'a, Opened> {
        Box::pin(async move {
            if self.how == FailsAlways {
                return fails().await;
            }
            let opened = self.store.open(tags).await?;
            let generations = tags.iter().zip(opened.generations).map(|(tag, g)| self.seen(tag, g)).collect();
            Ok(Opened::new(generations, if self.how == MarksAreTheSame { Mark(0) } else { opened.mark }))
        })
    }

    fn extend<'a>(&'a self, mark: Mark, tags: &'a [Tag]) -> StoreFuture<'a, Option<Vec<Generation>>> {
        Box::pin(async move {
            let now = self.open(tags).await?.generations;
            let is_fenced = now.iter().any(|generation| generation.is_fenced());
            match self.how {
                ExtendAlwaysProves => Ok(Some(now)),
                ExtendLooksAtFencesOnly => Ok((!is_fenced).then_some(now)),
                _ => Ok(self.store.extend(mark, tags).await?.and(Some(now))),
            }
        })
    }

    fn fill<'a>(&'a self, key: &'a Key, entry: Arc<Entry>, tier: Tier, now: Millis) -> StoreFuture<'a, ()> {
        if self.how == FailsAlways {
            return fails();
        }
        if self.how == CountsToThirtyDays && entry.keep_until() > now + 30 * 86_400_000 {
            return Box::pin(ready(Ok(())));
        }
        self.held.lock().unwrap().insert(cut(key.as_bytes()), entry.clone());
        self.store.fill(key, entry, tier, now)
    }

    fn invalidate<'a>(&'a self, groups: &'a [TagGroup], fence: Option<&'a Fence>) -> StoreFuture<'a, Vec<u64>> {
        let first_of =
            |group: &TagGroup| TagGroup::new(group.data_type.clone(), group.tags[..group.tags.len().min(1)].to_vec());
        let counts = vec![0; groups.len()];
        Box::pin(async move {
            match self.how {
                FailsAlways => fails().await,
                CountsFail => self.store.invalidate(groups, fence).await.and(fails().await),
                CountsAreMadeUp => self.store.invalidate(groups, fence).await.map(|_| vec![3; groups.len()]),
                DropsTheFirstTagOnly => {
                    let groups: Vec<_> = groups.iter().map(first_of).collect();
                    self.store.invalidate(&groups, fence).await
                }
                DropsTheFirstGroupOnly => {
                    self.store.invalidate(&groups[..groups.len().min(1)], fence).await?;
                    Ok(counts)
                }
                AcknowledgesEarly => {
                    let (store, groups, fence) = (self.store.clone(), groups.to_vec(), fence.cloned());
                    tokio::spawn(async move {
                        tokio::time::sleep(Duration::from_millis(3)).await;
                        store.invalidate(&groups, fence.as_ref()).await
                    });
                    Ok(counts)
                }
                LiftsEverybodysFences => {
                    let writers = self.writers.lock().unwrap().clone();
                    for writer in &writers {
                        self.store.invalidate(groups, Some(writer)).await?;
                    }
                    self.store.invalidate(groups, fence).await
                }
                _ => self.store.invalidate(groups, fence).await,
            }
        })
    }

    fn fence<'a>(&'a self, groups: &'a [TagGroup], fence: &'a Fence) -> StoreFuture<'a, ()> {
        self.writers.lock().unwrap().push(fence.clone());
        let lease = if self.how == LeasesNeverEnd { Duration::from_secs(3_600) } else { fence.lease };
        let mut fence = fence.clone();
        fence.lease = lease;
        Box::pin(
            async move { if self.how == FailsAlways { fails().await } else { self.store.fence(groups, &fence).await } },
        )
    }

    fn claim<'a>(&'a self, key: &'a Key, lease: Duration) -> StoreFuture<'a, bool> {
        if self.how == ClaimIsAlwaysTrue { Box::pin(ready(Ok(true))) } else { self.store.claim(key, lease) }
    }

    fn release<'a>(&'a self, key: &'a Key) -> StoreFuture<'a, ()> {
        if self.how == ReleaseDoesNothing { Box::pin(ready(Ok(()))) } else { self.store.release(key) }
    }

    fn is_shared(&self) -> bool {
        self.how != Alone && self.store.is_shared()
    }

    fn clear(&self) -> StoreFuture<'_, ()> {
        if self.how == ClearDoesNothing { Box::pin(ready(Ok(()))) } else { self.store.clear() }
    }

    fn count<'a>(&'a self, groups: &'a [TagGroup]) -> StoreFuture<'a, Vec<u64>> {
        self.store.count(groups)
    }

    fn search<'a>(&'a self, search: Search<'a>) -> StoreFuture<'a, Vec<Key>> {
        self.store.search(search)
    }

    fn exchange<'a>(&'a self, exchange: Exchange<'a>) -> StoreFuture<'a, Vec<Vec<u8>>> {
        if self.how == MixesFleets {
            return Box::pin(ready(Ok(vec![exchange.said.to_vec(), b"another fleet".to_vec()])));
        }
        self.store.exchange(exchange)
    }

    fn note<'a>(&'a self, name: &'a str, note: &'a [u8]) -> StoreFuture<'a, ()> {
        self.store.note(name, note)
    }

    fn noted<'a>(&'a self, name: &'a str) -> StoreFuture<'a, Option<Vec<u8>>> {
        if self.how == MixesNotes {
            return Box::pin(ready(Ok(Some(b"another's".to_vec()))));
        }
        self.store.noted(name)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_store_in_process_does() {
    let store = Arc::new(MemoryStore::new(64 << 20));
    conformance::check(async || store.clone()).await;
}

/// Too small for the largest of what is filled, which it refuses.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_small_store_in_process_does() {
    let store = Arc::new(MemoryStore::with_largest(3 << 20, 750 << 10));
    conformance::check(async || store.clone()).await;
}

#[tokio::test]
async fn a_store_of_ones_own_does() {
    let place = OwnStore::default();
    conformance::check(async || place.clone()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrapped_does() {
    let place = OwnStore::default();
    let guarded = conformance::check(async || Guard::new(Faulty::new(place.clone())).budget(Duration::from_secs(5)));
    // It is of one process, whatever those say who wrap it.
    let faulty = Faulty::new(MemoryStore::new(64 << 20));
    let linked = conformance::check(async || Sabotaged::new(Guard::new(faulty.link()), Alone));
    tokio::join!(guarded, linked);
}

fn redis_store(url: String, in_process: u64) -> RedisStore {
    let patient = Duration::from_secs(5);
    let store = RedisStore::builder([url]).in_process(in_process).budget(patient).invalidate_budget(patient);
    store.build().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_does() {
    let redis = Redis::start(&[]);
    conformance::check(async || redis_store(redis.url(), 64 << 20)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_does_without_a_tier_in_process() {
    let redis = Redis::start(&[]);
    conformance::check(async || redis_store(redis.url(), 0)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_of_redis_does() {
    let cluster = RedisCluster::start();
    conformance::check(async || redis_store(cluster.url(), 64 << 20)).await;
}

/// Until it has taken so many drops of the other region, at least, and nothing is torn.
async fn follows(region: &Regional, drops: u64) {
    region.health();
    let start = std::time::Instant::now();
    while matches!(&region.usage().regions[0], other if other.behind.is_none() || other.dropped < drops) {
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", region.usage());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A region does what its Redis does; and another region hears of it meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_region_does() {
    let servers = [Redis::start(&[]), Redis::start(&[])];
    let region = |at: usize| {
        let redis = RedisStore::builder([servers[at].url()]).settle(Duration::ZERO);
        let redis = redis.budget(Duration::from_secs(5)).invalidate_budget(Duration::from_secs(5));
        let names = ["eu", "us"];
        Regional::builder(names[at]).peer(names[1 - at], servers[1 - at].url()).build(redis).unwrap()
    };
    let (own, other) = (region(0), region(1));
    other.health();
    // A region that meets another drops everything once, which other rules are not to be disturbed by.
    follows(&own, 0).await;
    conformance::check(async || region(0)).await;
    follows(&other, 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memcached_does() {
    let servers = [(); 3].map(|()| Memcached::start(&[]));
    for (count, in_process) in [(1, 64 << 20), (3, 0)] {
        let addresses: Vec<_> = servers[..count].iter().map(Memcached::address).collect();
        conformance::check(async || {
            let store = MemcachedStore::builder(addresses.clone()).in_process(in_process).settle(Duration::ZERO);
            store.budget(Duration::from_secs(5)).invalidate_budget(Duration::from_secs(5)).build().unwrap()
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_sabotage_is_found() {
    let found = SABOTAGES.map(|(how, rule)| async move {
        let store = Sabotaged::new(OwnStore::default(), how);
        let broken = conformance::broken(async || store.clone()).await;
        (how, rule, broken)
    });
    let mut missed = join_all(found).await;
    missed.retain(|(_, rule, broken)| broken.iter().all(|broken| broken.rule != *rule));
    assert!(missed.is_empty(), "{missed:#?}");
}

/// Each has its own entries and drops its own; what one clears is cleared for all.
#[tokio::test]
async fn a_store_may_serve_several_caches() {
    let store = Arc::new(MemoryStore::new(8 << 20));
    let cache = |service: &str, n: u32| {
        let builder = Cache::builder(service).data_type(DataType::new("agent", Ttl::Standard)).store(store.clone());
        (builder.build().unwrap(), n)
    };
    let caches = [cache("agents", 1), cache("bots", 2), cache("agents-2", 3)];
    let load = async |(cache, n): &(Cache, u32), tenant: &str| {
        let n = *n;
        let entry = cache.entry::<u32>("agent", "1").tenant(tenant);
        let (value, report) = entry.fetch(move || async move { Ok::<_, StoreError>(Some(n)) }).unwrap().await.unwrap();
        assert_eq!(value, Some(n), "another service's value");
        report.source
    };
    for (tenant, cache) in ["acme", "other"].into_iter().flat_map(|tenant| caches.iter().map(move |c| (tenant, c))) {
        assert_eq!(load(cache, tenant).await, Source::Origin);
        assert_eq!(load(cache, tenant).await, Source::Cache);
    }
    assert_eq!(caches[0].0.invalidate("acme").mutated("agent", "1").run().await.unwrap().total(), 1);
    for cache in &caches[1..] {
        assert_eq!(load(cache, "acme").await, Source::Cache, "dropped by another service");
    }
    assert_eq!(load(&caches[0], "acme").await, Source::Origin);
    assert_eq!(load(&caches[0], "other").await, Source::Cache, "dropped by another tenant");
    caches[1].0.clear().await.unwrap();
    for cache in &caches {
        assert_eq!(load(cache, "other").await, Source::Origin);
    }
    assert_eq!(store.usage().entries, 3, "each has its own again");
}
