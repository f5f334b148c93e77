//! What a cache has done, and the task that looks after it: alerts, the series, the fleet, metrics.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{PoisonError, Weak},
    time::{Duration, Instant},
};

use tokio::{
    runtime::Handle,
    time::{MissedTickBehavior, interval},
};

use super::Cache;
#[cfg(feature = "warm")]
use crate::observe::{name_of, shortened};
use crate::{
    events::{BECAME, Followed},
    layer::Core,
    observe::{OfSource, STEP_SECONDS, Snapshot, Stats},
    store::{Exchange, Health, RegionUsage},
};

/// After the store would not have it, so many steps later.
const PAUSE: u32 = 12;

/// A process that has said nothing for so long is gone.
const GONE: Duration = Duration::from_secs(20);

impl Cache {
    /// What this process has done since the cache was built. (Feature `stats`.)
    ///
    /// ```
    /// # use tower_cache_aside::{Cache, DataType, Ttl};
    /// # fn main() -> Result<(), tower_cache_aside::ConfigError> {
    /// let cache = Cache::builder("docs").data_type(DataType::new("agent", Ttl::Standard)).build()?;
    /// let stats = cache.stats();
    /// assert_eq!((stats.totals.requests, stats.totals.hit_ratio), (0, None));
    /// println!("{}", serde_json::to_string(&stats).unwrap_or_default());
    /// # Ok(()) }
    /// ```
    pub fn stats(&self) -> Stats {
        self.keep();
        let snapshot = snapshot(&self.0);
        Stats::of(self.0.observer.service(), self.0.observer.process(), &[snapshot])
    }

    /// Hands what was counted since the last time to the recorder of the `metrics` facade. A task does so each second; call it
    /// before a scrape is answered, and the scrape has everything. (Feature `metrics`.)
    #[cfg(feature = "metrics")]
    pub fn record_metrics(&self) {
        self.keep();
        self.0.observer.export(|| snapshot(&self.0));
    }

    /// Sees to it that somebody looks after the cache: once, within a runtime.
    pub(crate) fn keep(&self) {
        if let Ok(runtime) = Handle::try_current()
            && self.0.observer.starts()
        {
            runtime.spawn(kept(Ends(std::sync::Arc::downgrade(&self.0))));
        }
    }
}

/// Everything that this process knows.
pub(crate) fn snapshot(core: &Core) -> Snapshot {
    let (usage, health) = (core.engine.usage(), core.engine.health());
    let health = match health {
        Health::Ok => ("ok".to_owned(), None),
        Health::Degraded(why) => ("degraded".to_owned(), Some(why.to_string())),
        Health::Down(why) => ("down".to_owned(), Some(why.to_string())),
    };
    let regions = usage.regions.iter().map(|region| (format!("region {}", region.name), of_region(region)));
    let sources = core.sources.all();
    let sources = sources.iter().map(|source| (source.name.clone(), of_source(source))).chain(regions).collect();
    Snapshot {
        health,
        journal: usage.journal_tags,
        sources,
        warmed: warmed(core),
        popular: popular(core),
        overdue: core.engine.overdue(),
        store_errors: usage.errors.into_iter().map(|(kind, count)| (kind.to_owned(), count)).collect(),
        evictions: usage.evictions,
        evicted_misses: usage.evicted_misses,
        eviction_age_ms: u64::try_from(usage.eviction_age.as_millis()).unwrap_or(u64::MAX),
        store_bytes: usage.bytes,
        store_capacity: usage.capacity,
        store_entries: usage.entries,
        ..core.observer.snapshot()
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(feature = "warm")]
fn warmed(core: &Core) -> BTreeMap<String, u64> {
    let loaded =
        core.sampler.get().map(|sampler| sampler.state.loaded.lock().unwrap_or_else(PoisonError::into_inner).clone());
    loaded.into_iter().flatten().map(|(cause, count)| (cause.to_owned(), count)).collect()
}

#[cfg(feature = "warm")]
fn popular(core: &Core) -> Vec<(String, String, f64)> {
    let popular =
        core.sampler.get().map(|sampler| sampler.state.popular.lock().unwrap_or_else(PoisonError::into_inner).clone());
    popular.into_iter().flatten().map(|(tenant, what, score)| (name_of(&tenant), shortened(&what), score)).collect()
}

#[cfg(not(feature = "warm"))]
fn warmed(_: &Core) -> BTreeMap<String, u64> {
    BTreeMap::new()
}

#[cfg(not(feature = "warm"))]
fn popular(_: &Core) -> Vec<(String, String, f64)> {
    vec![]
}

fn of_region(region: &RegionUsage) -> OfSource {
    OfSource {
        behind_ms: region.behind.map(millis),
        trouble: region.trouble.clone(),
        became: [("applied".to_owned(), region.dropped), ("gap".to_owned(), region.gaps)].into(),
    }
}

fn of_source(source: &Followed) -> OfSource {
    OfSource {
        behind_ms: source.behind().map(millis),
        trouble: source.what_is_wrong(),
        became: BECAME.iter().zip(source.became()).map(|((_, name), count)| ((*name).to_owned(), count)).collect(),
    }
}

/// The cache, and that nobody looks after it any more: the runtime may end, before it has begun, or a recorder of metrics panic.
/// Then somebody else has to.
struct Ends(Weak<Core>);

impl Drop for Ends {
    fn drop(&mut self) {
        if let Some(core) = self.0.upgrade() {
            core.observer.ends();
        }
    }
}

/// As long as there is a cache.
async fn kept(cache: Ends) {
    let mut seconds = interval(Duration::from_secs(1));
    seconds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut step = 0;
    let mut fleet = Fleet::default();
    loop {
        seconds.tick().await;
        let Some(core) = cache.0.upgrade() else { return };
        #[cfg(feature = "metrics")]
        let snapshot = core.observer.export(|| snapshot(&core));
        #[cfg(not(feature = "metrics"))]
        let snapshot = snapshot(&core);
        core.observer.look(&snapshot);
        step += 1;
        if step % STEP_SECONDS == 0 {
            core.observer.step();
            fleet.publish(&core, &snapshot).await;
        }
    }
}

/// What is known of the other processes.
#[derive(Default)]
struct Fleet {
    /// What each has said last, and when that was new: by this clock, for theirs may be any.
    said: HashMap<String, (u64, Instant)>,
    gone: Vec<String>,
    /// So many steps are left out, after the store would not have it.
    pause: u32,
}

impl Fleet {
    /// Tells the others, and hears of them.
    async fn publish(&mut self, core: &Core, snapshot: &Snapshot) {
        if self.pause > 0 {
            self.pause -= 1;
            return;
        }
        let observer = &core.observer;
        // Who is not looked at need not be heard.
        let Some(hears) = observer.is_shown() else { return };
        let Ok(said) = serde_json::to_vec(&snapshot.compact()) else { return };
        let fleet = format!("{}{{*}}", observer.service());
        let (member, gone) = (observer.process(), &self.gone[..]);
        let exchange = Exchange { fleet: &fleet, member, said: &said, gone, hears };
        let heard = core.engine.exchange(exchange).await;
        let others = match heard {
            Ok(heard) => heard.iter().filter_map(|said| serde_json::from_slice(said).ok()).collect(),
            Err(error) => {
                tracing::debug!(%error, "the fleet is not heard");
                self.pause = PAUSE;
                vec![]
            }
        };
        let others: Vec<Snapshot> =
            others.into_iter().filter(|one: &Snapshot| one.process != observer.process()).collect();
        self.said.retain(|process, _| others.iter().any(|one| one.process == *process));
        let (alive, gone): (Vec<_>, Vec<_>) = others.into_iter().partition(|one| {
            let known = self.said.entry(one.process.clone()).or_insert_with(|| (one.seen, Instant::now()));
            if known.0 != one.seen {
                *known = (one.seen, Instant::now());
            }
            known.1.elapsed() < GONE
        });
        self.gone = gone.into_iter().map(|one| one.process).collect();
        *observer.others.lock().unwrap_or_else(PoisonError::into_inner) = alive;
    }
}
