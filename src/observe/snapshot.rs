//! What was counted until now, in numbers that can be added up over processes.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::outcome::Handling;

/// In the order of their numbers.
pub(crate) const HANDLINGS: [Handling; 5] =
    [Handling::Hit, Handling::Stale, Handling::Coalesced, Handling::Miss, Handling::Bypass];

/// How many steps a series has, and how long each is.
pub(crate) const STEPS: usize = 60;
pub(crate) const STEP_SECONDS: u64 = 5;

/// How often values fell into each bucket.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct OfHistogram {
    pub(crate) counts: Vec<u64>,
    pub(crate) sum: u64,
    pub(crate) max: u64,
}

impl OfHistogram {
    pub(crate) fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.counts.resize(self.counts.len().max(other.counts.len()), 0);
        self.counts.iter_mut().zip(&other.counts).for_each(|(sum, count)| *sum += count);
        self.sum = self.sum.saturating_add(other.sum);
        self.max = self.max.max(other.max);
    }

    /// About which value this share of them is not above.
    pub(crate) fn quantile(&self, share: f64, bounds: &[u64]) -> Option<u64> {
        let rank = (self.count() as f64 * share).ceil() as u64;
        let mut below = 0;
        for (at, count) in self.counts.iter().enumerate().filter(|(_, count)| **count > 0) {
            if below + count >= rank && rank > below {
                let lower = at.checked_sub(1).and_then(|at| bounds.get(at)).copied().unwrap_or_default();
                let upper = bounds.get(at).copied().unwrap_or(self.max).min(self.max).max(lower);
                let within = (rank - below) as f64 / *count as f64;
                return Some(lower + ((upper - lower) as f64 * within) as u64);
            }
            below += count;
        }
        None
    }
}

/// How often, by what became of a request and why.
pub(crate) type ByReason = BTreeMap<String, BTreeMap<String, u64>>;

/// The counts of a data type or a tenant.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct OfType {
    pub(crate) handled: [OfHistogram; 5],
    pub(crate) reasons: ByReason,
    pub(crate) saved_ms: u64,
    /// Hits that the store was asked for, and how many bytes were sent: found in this process, in the store, by the inner service.
    #[serde(default)]
    pub(crate) from_store: u64,
    #[serde(default)]
    pub(crate) sent: [u64; 3],
    /// Successes and failures.
    pub(crate) loads: [OfHistogram; 2],
    pub(crate) bytes: OfHistogram,
    pub(crate) invalidations: u64,
    pub(crate) invalidated: u64,
    #[serde(default)]
    pub(crate) drift: u64,
    /// Requests that were not bypassed, and hits, of the last steps.
    pub(crate) series: [Vec<u64>; 2],
}

impl OfType {
    pub(crate) fn of(&self, handling: Handling) -> u64 {
        self.handled[handling as usize].count()
    }

    /// Why and how often, of hits too.
    #[cfg(feature = "metrics")]
    pub(crate) fn by_reason(&self) -> ByReason {
        let mut all = self.reasons.clone();
        for handling in HANDLINGS {
            let of_handling = all.entry(handling.as_str().to_owned()).or_default();
            let rest = self.of(handling).saturating_sub(of_handling.values().sum());
            let reason = handling.usual();
            if rest > 0 || [Handling::Hit, Handling::Stale].contains(&handling) {
                *of_handling.entry(reason.to_owned()).or_default() += rest;
            }
        }
        all
    }

    /// Hits by where they were found: in this process, and by asking the store.
    pub(crate) fn found(&self) -> [u64; 2] {
        let found = self.of(Handling::Hit) + self.of(Handling::Stale);
        [found.saturating_sub(self.from_store), self.from_store]
    }

    pub(crate) fn requests(&self) -> u64 {
        HANDLINGS.iter().map(|handling| self.of(*handling)).sum()
    }

    /// Those that the inner service was not asked for.
    pub(crate) fn spared(&self) -> u64 {
        self.of(Handling::Hit) + self.of(Handling::Stale) + self.of(Handling::Coalesced)
    }

    pub(crate) fn ratio(&self) -> Option<f64> {
        let asked = self.requests() - self.of(Handling::Bypass);
        (asked > 0).then(|| self.spared() as f64 / asked as f64)
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.handled.iter_mut().zip(&other.handled).for_each(|(sum, one)| sum.add(one));
        for (handling, reasons) in &other.reasons {
            let of_handling = self.reasons.entry(handling.clone()).or_default();
            reasons.iter().for_each(|(reason, count)| *of_handling.entry(reason.clone()).or_default() += count);
        }
        self.saved_ms += other.saved_ms;
        self.from_store += other.from_store;
        self.sent.iter_mut().zip(&other.sent).for_each(|(sum, one)| *sum += one);
        self.loads.iter_mut().zip(&other.loads).for_each(|(sum, one)| sum.add(one));
        self.bytes.add(&other.bytes);
        self.invalidations += other.invalidations;
        self.invalidated += other.invalidated;
        self.drift += other.drift;
        for (sum, one) in self.series.iter_mut().zip(&other.series) {
            // The last steps are the same time.
            let longer = one.len().saturating_sub(sum.len());
            sum.splice(0..0, std::iter::repeat_n(0, longer));
            let offset = sum.len() - one.len();
            sum.iter_mut().skip(offset).zip(one).for_each(|(sum, one)| *sum += one);
        }
    }
}

/// Look-ups of a part of the keys, and how many of them hit: with half the memory, with what there is, with twice as much.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct OfMemory {
    pub(crate) lookups: u64,
    pub(crate) hits: [u64; 3],
    /// By type: hits each second for each mebibyte.
    pub(crate) worth: BTreeMap<String, f64>,
}

/// A source of events.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct OfSource {
    /// How far behind it may be; `None` if that is not known.
    pub(crate) behind_ms: Option<u64>,
    /// What is wrong with it.
    pub(crate) trouble: Option<String>,
    /// What became of events.
    pub(crate) became: BTreeMap<String, u64>,
}

/// What is remarkable, and since when.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Alert {
    /// `hit_ratio`, `large_entry`, `store`, `audit`, `drift`, `unmapped` or `events`.
    pub kind: String,
    /// The data type that it is about, if it is about one.
    #[serde(rename = "type")]
    pub data_type: Option<String>,
    /// The ratio, the size in bytes, the state of the store, the route, what is wrong with a source of events.
    pub value: serde_json::Value,
    /// When it was raised, in milliseconds since 1970.
    pub since: u64,
}

/// So many tenants are told to others: the busiest.
const TOLD: usize = 20;

impl Snapshot {
    /// What others are told: of tenants no more than is shown.
    pub(crate) fn compact(&self) -> Self {
        let mut busiest: Vec<_> = self.tenants.iter().collect();
        busiest.sort_by_key(|(_, of_tenant)| std::cmp::Reverse(of_tenant.requests()));
        let told = busiest.into_iter().take(TOLD).map(|(name, of_tenant)| (name.clone(), of_tenant.clone()));
        Self { tenants: told.collect(), ..self.clone() }
    }
}

/// Everything that one process has counted.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Snapshot {
    pub(crate) process: String,
    pub(crate) since: u64,
    pub(crate) seen: u64,
    pub(crate) types: BTreeMap<String, OfType>,
    pub(crate) tenants: BTreeMap<String, OfType>,
    /// Requests by tenant that has a label, and data type. For this process alone.
    #[serde(skip)]
    pub(crate) labelled: BTreeMap<String, BTreeMap<String, ByReason>>,
    /// Whether tenants have labels at all.
    #[serde(skip)]
    pub(crate) has_labels: bool,
    pub(crate) alerts: Vec<Alert>,
    /// How the store is, and why; and how many tags wait to be delivered.
    pub(crate) health: (String, Option<String>),
    pub(crate) journal: u64,
    /// By source.
    pub(crate) invalidations: BTreeMap<String, OfHistogram>,
    /// By data type, and source.
    pub(crate) invalidated: BTreeMap<String, BTreeMap<String, u64>>,
    pub(crate) audits: BTreeMap<String, BTreeMap<String, u64>>,
    pub(crate) unmapped: u64,
    /// Sources of events, by name.
    #[serde(default)]
    pub(crate) sources: BTreeMap<String, OfSource>,
    #[serde(default)]
    pub(crate) memory: Option<OfMemory>,
    /// What was loaded before it was asked for, by cause.
    #[serde(default)]
    pub(crate) warmed: BTreeMap<String, u64>,
    /// What is popular: whose, what, and how much.
    #[serde(default)]
    pub(crate) popular: Vec<(String, String, f64)>,
    /// Requests that stopped waiting for another's call.
    #[serde(default)]
    pub(crate) overdue: u64,
    pub(crate) store_errors: BTreeMap<String, u64>,
    pub(crate) evictions: u64,
    /// Look-ups of what had been evicted not long before.
    #[serde(default)]
    pub(crate) evicted_misses: u64,
    pub(crate) eviction_age_ms: u64,
    pub(crate) store_bytes: u64,
    pub(crate) store_capacity: u64,
    pub(crate) store_entries: u64,
}
