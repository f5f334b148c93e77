//! What a cache has done, and the task that looks after it: alerts, the series, the fleet, metrics.

use std::{
    sync::{PoisonError, Weak},
    time::Duration,
};

use tokio::{runtime::Handle, time::interval};

use super::Cache;
use crate::{
    layer::Core,
    observe::{STEP_SECONDS, Snapshot, Stats, now},
    store::Health,
};

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
        self.0.observer.export(&snapshot(&self.0));
    }

    /// Sees to it that somebody looks after the cache: once, within a runtime.
    pub(crate) fn keep(&self) {
        if let Ok(runtime) = Handle::try_current()
            && self.0.observer.starts()
        {
            runtime.spawn(kept(std::sync::Arc::downgrade(&self.0)));
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
    Snapshot {
        health,
        journal: usage.journal_tags,
        store_errors: usage.errors.into_iter().map(|(kind, count)| (kind.to_owned(), count)).collect(),
        evictions: usage.evictions,
        eviction_age_ms: u64::try_from(usage.eviction_age.as_millis()).unwrap_or(u64::MAX),
        store_bytes: usage.bytes,
        store_capacity: usage.capacity,
        store_entries: usage.entries,
        ..core.observer.snapshot()
    }
}

/// As long as there is a cache.
async fn kept(cache: Weak<Core>) {
    let mut seconds = interval(Duration::from_secs(1));
    let mut step = 0;
    let mut gone = vec![];
    loop {
        seconds.tick().await;
        let Some(core) = cache.upgrade() else { return };
        let snapshot = snapshot(&core);
        core.observer.look(&snapshot);
        #[cfg(feature = "metrics")]
        core.observer.export(&snapshot);
        step += 1;
        if step % STEP_SECONDS == 0 {
            core.observer.step();
            publish(&core, &snapshot, &mut gone).await;
        }
    }
}

/// Tells the fleet, and hears of it.
async fn publish(core: &Core, snapshot: &Snapshot, gone: &mut Vec<String>) {
    let Ok(said) = serde_json::to_vec(snapshot) else { return };
    let observer = &core.observer;
    let fleet = format!("{}{{*}}", observer.service());
    let Ok(all) = core.engine.exchange(&fleet, observer.process(), said, gone).await else { return };
    let all: Vec<Snapshot> = all.iter().filter_map(|said| serde_json::from_slice(said).ok()).collect();
    let oldest = now().saturating_sub(u64::try_from(GONE.as_millis()).unwrap_or(u64::MAX));
    let (others, left): (Vec<_>, Vec<_>) =
        all.into_iter().filter(|one| one.process != observer.process()).partition(|one| one.seen >= oldest);
    *gone = left.into_iter().map(|one| one.process).collect();
    *observer.others.lock().unwrap_or_else(PoisonError::into_inner) = others;
}
