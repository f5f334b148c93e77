//! What was counted, as people and dashboards read it.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{
    counts::{BYTES, NANOS},
    outcome::Handling,
    snapshot::{Alert, OfHistogram, OfSource, OfType, STEP_SECONDS, Snapshot},
};

/// Of more tenants than this, the busiest are shown.
const SHOWN: usize = 20;

/// What a cache has done since it was built: a snapshot, made by [`Cache::stats`](crate::Cache::stats). As JSON it is what the
/// admin's API answers.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Stats {
    /// The service's name.
    pub service: String,
    /// The process that has counted, or `all`.
    pub process: String,
    /// When it began, in milliseconds since 1970.
    pub since: u64,
    /// How the store is.
    pub store: StoreStats,
    /// Of all data types together.
    pub totals: TypeStats,
    /// By data type, as far as there is anything to say.
    pub types: BTreeMap<String, TypeStats>,
    /// By tenant: the busiest.
    pub tenants: BTreeMap<String, TypeStats>,
    /// What somebody should look at.
    pub alerts: Vec<Alert>,
    /// Successful writes that nothing was said of.
    pub unmapped_writes: u64,
    /// Requests that stopped waiting for another's call, for it took longer than `coalesce_timeout`.
    pub overdue_waits: u64,
    /// How audits ended.
    pub audits: BTreeMap<String, u64>,
    /// The sources of events that are followed.
    pub sources: BTreeMap<String, SourceStats>,
    /// How often something was loaded before it was asked for (`Cache::warm`), by cause: `start`, `expiry`, `refill`, `missing`.
    pub warmed: BTreeMap<String, u64>,
    /// What is asked for most, the most popular first.
    pub popular: Vec<Popular>,
    /// What the store in process would do with another size; none if there is no such store, or nothing was looked up.
    pub memory: Option<MemoryStats>,
}

/// What a store in process would do with half its memory, and with twice as much: an estimate by a part of the keys, usually within
/// three hundredths.
#[derive(Clone, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct MemoryStats {
    /// The share of look-ups of the sample that would hit with half the memory.
    pub half: f64,
    /// With what there is.
    pub now: f64,
    /// With twice as much.
    pub twice: f64,
    /// How many look-ups that is told by.
    pub lookups: u64,
    /// By data type, hits each second for each mebibyte that its entries take: which are worth their memory.
    pub hits_per_mib_second: BTreeMap<String, f64>,
}

/// A request that is asked for often.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Popular {
    /// Whose it is.
    pub tenant: String,
    /// Its method and path.
    pub request: String,
    /// How often it is asked, in a sample; that fades.
    pub score: f64,
}

/// A source of events that is followed.
#[derive(Clone, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct SourceStats {
    /// Everything that had changed so many milliseconds ago, at least, was read and dropped; none if that is not known. Of several
    /// processes the worst.
    pub behind_ms: Option<u64>,
    /// What is wrong with it.
    pub trouble: Option<String>,
    /// How many events were applied.
    pub applied: u64,
    /// How many no policy reads.
    pub ignored: u64,
    /// How many a policy could not make sense of.
    pub refused: u64,
    /// How many were none.
    pub unreadable: u64,
    /// How often events may have been missed, and everything was dropped.
    pub gaps: u64,
}

impl SourceStats {
    fn add(&mut self, one: &OfSource, is_first: bool) {
        self.behind_ms =
            if is_first { one.behind_ms } else { self.behind_ms.zip(one.behind_ms).map(|(a, b)| a.max(b)) };
        self.trouble = self.trouble.take().or_else(|| one.trouble.clone());
        let count = |result: &str| one.became.get(result).copied().unwrap_or_default();
        self.applied += count("applied");
        self.ignored += count("ignored");
        self.refused += count("refused");
        self.unreadable += count("unreadable");
        self.gaps += count("gap");
    }
}

/// How a store is.
#[derive(Clone, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct StoreStats {
    /// `ok` or `degraded`.
    pub state: &'static str,
    /// Why, and the mend.
    pub detail: Option<String>,
    /// Tags that the store has not been told of.
    pub journal_tags: u64,
    /// What entries in this process take, and may take.
    pub bytes: u64,
    /// See `bytes`; 0 if there is none.
    pub capacity: u64,
    /// How many there are.
    pub entries: u64,
    /// How many had to go for others.
    pub evictions: u64,
    /// How often something was looked for that had been evicted not long before: with more room it had been a hit.
    pub evicted_misses: u64,
    /// How old the last of those were, in milliseconds.
    pub eviction_age_ms: u64,
}

/// The counts of a data type or a tenant.
#[derive(Clone, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct TypeStats {
    /// All requests.
    pub requests: u64,
    /// By [`Handling`].
    pub hits: u64,
    /// By [`Handling`].
    pub stale: u64,
    /// By [`Handling`].
    pub misses: u64,
    /// By [`Handling`].
    pub coalesced: u64,
    /// Why the cache kept out, and how often.
    pub bypasses: BTreeMap<String, u64>,
    /// Why something was a miss, and how often.
    pub miss_reasons: BTreeMap<String, u64>,
    /// The share of requests that the inner service was spared, of those that did not bypass the cache.
    pub hit_ratio: Option<f64>,
    /// How long the inner service was spared, as it took for what was served.
    pub origin_ms_saved: u64,
    /// Hits, stale ones included, that were found in this process.
    pub hits_in_process: u64,
    /// And those that the store was asked for.
    pub hits_in_store: u64,
    /// What was sent.
    pub bytes_sent: Sent,
    /// How long it took.
    pub load_ms: Quantiles,
    /// How large bodies are that were stored.
    pub bytes: Sizes,
    /// Writes that dropped this.
    pub invalidations: u64,
    /// Entries that they dropped.
    pub invalidated: u64,
    /// Reloads that differ from what was stored, though no write dropped it: somebody writes and does not say so. Of tenants it is
    /// not counted.
    pub drift: u64,
    /// The last five minutes.
    pub series: Series,
}

/// Durations in milliseconds, as far as their buckets tell.
#[derive(Clone, Copy, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct Quantiles {
    /// The median.
    pub p50: Option<f64>,
    /// One in twenty is longer.
    pub p95: Option<f64>,
}

/// Sizes in bytes, as far as their buckets tell.
#[derive(Clone, Copy, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct Sizes {
    /// The median.
    pub p50: Option<u64>,
    /// The largest.
    pub max: u64,
}

/// How many bytes the bodies have that were sent, as far as that is known when a response begins.
#[derive(Clone, Copy, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct Sent {
    /// Of what was found in this process.
    pub process: u64,
    /// Of what the store was asked for.
    pub store: u64,
    /// Of what comes from the inner service, by this request or another.
    pub inner: u64,
}

/// Counts of the last steps, the oldest first.
#[derive(Clone, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct Series {
    /// How long a step is.
    pub step_s: u64,
    /// Requests, without those that bypass the cache.
    pub requests: Vec<u64>,
    /// Those that the inner service was spared.
    pub hits: Vec<u64>,
}

impl Stats {
    /// Of one process, or of all together.
    pub(crate) fn of(service: &str, process: &str, snapshots: &[Snapshot]) -> Self {
        let (mut types, mut tenants) = (BTreeMap::<_, OfType>::new(), BTreeMap::<_, OfType>::new());
        let (mut alerts, mut store, mut audits) =
            (vec![], StoreStats { state: "ok", ..StoreStats::default() }, BTreeMap::new());
        let (mut unmapped_writes, mut overdue_waits, mut sources) = (0, 0, BTreeMap::new());
        for snapshot in snapshots {
            snapshot.types.iter().for_each(|(name, one)| types.entry(name.clone()).or_default().add(one));
            snapshot.tenants.iter().for_each(|(name, one)| tenants.entry(name.clone()).or_default().add(one));
            for alert in &snapshot.alerts {
                if !alerts
                    .iter()
                    .any(|known: &Alert| (&known.kind, &known.data_type) == (&alert.kind, &alert.data_type))
                {
                    alerts.push(alert.clone());
                }
            }
            for (result, count) in snapshot.audits.values().flatten() {
                *audits.entry(result.clone()).or_default() += count;
            }
            for (name, one) in &snapshot.sources {
                let is_first = !sources.contains_key(name);
                sources.entry(name.clone()).or_insert_with(SourceStats::default).add(one, is_first);
            }
            unmapped_writes += snapshot.unmapped;
            overdue_waits += snapshot.overdue;
            store.add(snapshot);
        }
        let (warmed, popular) = popular(snapshots);
        let memory = memory(snapshots);
        let mut totals = OfType::default();
        types.values().for_each(|of_type| totals.add(of_type));
        let mut busiest: Vec<_> = tenants.into_iter().collect();
        busiest.sort_by_key(|(_, of_tenant)| std::cmp::Reverse(of_tenant.requests()));
        busiest.truncate(SHOWN);
        // A write that drops entries of several types is one.
        totals.invalidations = snapshots.iter().flat_map(|s| s.invalidations.values()).map(OfHistogram::count).sum();
        Self {
            service: service.to_owned(),
            process: process.to_owned(),
            since: snapshots.iter().map(|snapshot| snapshot.since).min().unwrap_or_default(),
            store,
            totals: TypeStats::of(&totals),
            types: types.iter().map(|(name, of_type)| (name.clone(), TypeStats::of(of_type))).collect(),
            tenants: busiest.iter().map(|(name, of_tenant)| (name.clone(), TypeStats::of(of_tenant))).collect(),
            alerts,
            unmapped_writes,
            overdue_waits,
            audits,
            sources,
            warmed,
            popular,
            memory,
        }
    }
}

/// In all processes together.
fn memory(snapshots: &[Snapshot]) -> Option<MemoryStats> {
    let (mut all, mut hits) = (MemoryStats::default(), [0; 3]);
    for of in snapshots.iter().filter_map(|snapshot| snapshot.memory.as_ref()) {
        all.lookups += of.lookups;
        hits.iter_mut().zip(of.hits).for_each(|(sum, one)| *sum += one);
        for (name, worth) in &of.worth {
            *all.hits_per_mib_second.entry(name.clone()).or_default() += worth;
        }
    }
    [all.half, all.now, all.twice] = hits.map(|hits| hits as f64 / all.lookups.max(1) as f64);
    (all.lookups > 0).then_some(all)
}

/// What was loaded before it was asked for, and what is popular, in all processes together.
fn popular(snapshots: &[Snapshot]) -> (BTreeMap<String, u64>, Vec<Popular>) {
    let (mut warmed, mut all) = (BTreeMap::new(), BTreeMap::<(String, String), f64>::new());
    for snapshot in snapshots {
        for (cause, count) in &snapshot.warmed {
            *warmed.entry(cause.clone()).or_default() += count;
        }
        for (tenant, request, score) in &snapshot.popular {
            *all.entry((tenant.clone(), request.clone())).or_default() += score;
        }
    }
    let mut popular: Vec<_> =
        all.into_iter().map(|((tenant, request), score)| Popular { tenant, request, score }).collect();
    popular.sort_by(|a, b| b.score.total_cmp(&a.score));
    popular.truncate(SHOWN);
    (warmed, popular)
}

impl StoreStats {
    fn add(&mut self, snapshot: &Snapshot) {
        if snapshot.health.0 != "ok" {
            (self.state, self.detail) = ("degraded", snapshot.health.1.clone());
        }
        self.journal_tags += snapshot.journal;
        self.bytes += snapshot.store_bytes;
        self.capacity += snapshot.store_capacity;
        self.entries += snapshot.store_entries;
        self.evictions += snapshot.evictions;
        self.evicted_misses += snapshot.evicted_misses;
        self.eviction_age_ms = self.eviction_age_ms.max(snapshot.eviction_age_ms);
    }
}

impl TypeStats {
    fn of(of_type: &OfType) -> Self {
        let reasons = |handling: Handling| of_type.reasons.get(handling.as_str()).cloned().unwrap_or_default();
        let mut loads = OfHistogram::default();
        of_type.loads.iter().for_each(|one| loads.add(one));
        let ms = |share| loads.quantile(share, &NANOS).map(|nanos| nanos as f64 / 1_000_000.0);
        let [requests, hits] = of_type.series.clone();
        let [hits_in_process, hits_in_store] = of_type.found();
        let [process, store, inner] = of_type.sent;
        Self {
            requests: of_type.requests(),
            hits: of_type.of(Handling::Hit),
            stale: of_type.of(Handling::Stale),
            misses: of_type.of(Handling::Miss),
            coalesced: of_type.of(Handling::Coalesced),
            bypasses: reasons(Handling::Bypass),
            miss_reasons: reasons(Handling::Miss),
            hit_ratio: of_type.ratio(),
            origin_ms_saved: of_type.saved_ms,
            hits_in_process,
            hits_in_store,
            bytes_sent: Sent { process, store, inner },
            load_ms: Quantiles { p50: ms(0.5), p95: ms(0.95) },
            bytes: Sizes { p50: of_type.bytes.quantile(0.5, &BYTES), max: of_type.bytes.max },
            invalidations: of_type.invalidations,
            invalidated: of_type.invalidated,
            drift: of_type.drift,
            series: Series { step_s: STEP_SECONDS, requests, hits },
        }
    }
}
