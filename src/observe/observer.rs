//! One for each cache: what all its parts tell, and what is known of it.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    hash::BuildHasher,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};

use foldhash::fast::RandomState;

use super::{
    alerts::{AlertRules, Raised},
    counts::{Counts, Histogram, NANOS, Reasons, nanos},
    outcome::Handling,
    recent::{Event, Recent, What, name_of, shortened},
    shadow::Shadow,
    snapshot::{ByReason, OfMemory, OfType, STEPS, Snapshot},
};

/// So many tenants are told apart, and those that come later are one.
const TENANTS: usize = 64;

/// After somebody has looked at the fleet, the others are heard for so long, in milliseconds.
const LOOKING: u64 = 60_000;

/// What caused an invalidation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// A request.
    Route,
    /// [`Cache::invalidate`](crate::Cache::invalidate), the admin's API, a job.
    Hand,
    /// [`Cache::apply`](crate::Cache::apply).
    Event,
}

pub(super) const CAUSES: [Cause; 3] = [Cause::Route, Cause::Hand, Cause::Event];

impl Cause {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Route => "route",
            Self::Hand => "hand",
            Self::Event => "event",
        }
    }
}

/// An invalidation that has been acknowledged, or is in the journal.
pub(crate) struct Dropped<'a> {
    pub(crate) cause: Cause,
    /// `PUT /agents/a1`, or who did it by hand.
    pub(crate) what: &'a str,
    pub(crate) tenant: Option<&'a [u8]>,
    /// Entries by data type.
    pub(crate) types: &'a [(Arc<str>, u64)],
    /// The first of them.
    pub(crate) tags: Vec<String>,
    /// The hashes of all.
    pub(crate) all: Arc<[u64]>,
    pub(crate) took: Duration,
    pub(crate) undelivered: usize,
}

/// The tenants that are told apart: found without a lock.
#[derive(Debug)]
struct Tenants {
    slots: Box<[OnceLock<Known>]>,
    hasher: RandomState,
    known: AtomicU64,
    others: Counts,
    shards: usize,
    /// How many have a label in metrics, and how many data types there are.
    labels: usize,
    types: usize,
}

#[derive(Debug)]
struct Known {
    name: Box<[u8]>,
    counts: Counts,
    /// What metrics say of it, by data type, if it has a label.
    labelled: Option<Box<[OnceLock<Box<Reasons>>]>>,
}

/// Which tenant a request is counted for: the number of its slot, or one beyond the last.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TenantSlot(usize);

impl Tenants {
    fn new(shards: usize, labels: usize, types: usize) -> Self {
        Self {
            slots: (0..2 * TENANTS).map(|_| OnceLock::new()).collect(),
            hasher: RandomState::default(),
            known: AtomicU64::new(0),
            others: Counts::new(shards),
            shards,
            labels,
            types,
        }
    }

    fn slot(&self, name: &[u8]) -> TenantSlot {
        let size = self.slots.len();
        let start = self.hasher.hash_one(name) as usize % size;
        for at in (0..size).map(|i| (start + i) % size) {
            match self.slots[at].get() {
                Some(known) if *known.name == *name => return TenantSlot(at),
                Some(_) => {}
                None if self.known.load(Relaxed) >= TENANTS as u64 => break,
                None => {
                    let known = self.slots[at].get_or_init(|| {
                        let has_label = self.known.fetch_add(1, Relaxed) < self.labels as u64;
                        let labelled = has_label.then(|| (0..self.types).map(|_| OnceLock::new()).collect());
                        Known { name: name.into(), counts: Counts::new(self.shards), labelled }
                    });
                    // Another may have come first.
                    if *known.name == *name {
                        return TenantSlot(at);
                    }
                }
            }
        }
        TenantSlot(size)
    }

    fn counts(&self, TenantSlot(at): TenantSlot) -> &Counts {
        self.slots.get(at).and_then(OnceLock::get).map_or(&self.others, |known| &known.counts)
    }

    fn read(&self) -> BTreeMap<String, OfType> {
        let known = self.slots.iter().filter_map(OnceLock::get);
        let known = known.map(|known| (name_of(&known.name), known.counts.read()));
        let others = self.others.read();
        let others = (others.requests() > 0).then(|| ("other".to_owned(), others));
        let mut all: BTreeMap<String, OfType> = BTreeMap::new();
        // Two names that are cut off may be one.
        for (name, of_tenant) in known.chain(others).filter(|(_, one)| one.requests() + one.invalidations > 0) {
            let sum = all.entry(name).or_default();
            sum.add(&of_tenant);
        }
        all
    }

    /// What metrics say of those that have a label.
    fn labelled<'t>(
        &self,
        types: impl Iterator<Item = &'t Arc<str>> + Clone,
    ) -> BTreeMap<String, BTreeMap<String, ByReason>> {
        let mut all = BTreeMap::new();
        for known in self.slots.iter().filter_map(OnceLock::get) {
            let Some(of_types) = &known.labelled else { continue };
            let named = types.clone().zip(of_types.iter());
            let read = named.filter_map(|(data_type, reasons)| Some((data_type.to_string(), reasons.get()?.read())));
            all.insert(name_of(&known.name), read.collect());
        }
        all
    }
}

/// The last steps of a type or tenant.
#[derive(Debug, Default)]
struct Steps {
    /// What was counted when the last step ended.
    last: [u64; 2],
    steps: [VecDeque<u64>; 2],
}

impl Steps {
    fn step(&mut self, now: [u64; 2]) {
        for ((steps, last), now) in self.steps.iter_mut().zip(&mut self.last).zip(now) {
            steps.push_back(now.saturating_sub(*last));
            if steps.len() > STEPS {
                steps.pop_front();
            }
            *last = now;
        }
    }
}

/// Everything that is known of a cache besides what it stores.
#[derive(Debug)]
pub(crate) struct Observer {
    service: String,
    /// Unique among the processes that share a store.
    process: String,
    since: u64,
    types: BTreeMap<Arc<str>, Arc<Counts>>,
    /// Those of them that are shown whether or not there is anything to say.
    declared: BTreeSet<String>,
    tenants: Tenants,
    pub(crate) recent: Recent,
    pub(super) shadow: Shadow,
    series: Mutex<[BTreeMap<String, Steps>; 2]>,
    invalidations: [Histogram<14>; CAUSES.len()],
    invalidated: Mutex<BTreeMap<String, BTreeMap<String, u64>>>,
    audits: Mutex<BTreeMap<String, BTreeMap<String, u64>>>,
    unmapped: AtomicU64,
    /// Routes that were warned of: there are only so many.
    drifting: Mutex<BTreeSet<String>>,
    pub(super) rules: AlertRules,
    pub(super) raised: Mutex<Raised>,
    started: AtomicBool,
    /// When somebody looked at the whole fleet, in milliseconds since 1970.
    looked: AtomicU64,
    #[cfg(feature = "metrics")]
    pub(super) told: Mutex<super::told::Told>,
    /// What other processes have published.
    pub(crate) others: Mutex<Vec<Snapshot>>,
}

/// Milliseconds since 1970.
pub(crate) fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Observer {
    pub(crate) fn new<'t>(
        service: &str,
        types: impl Iterator<Item = &'t str>,
        (rules, labels): (AlertRules, usize),
        declared: impl Iterator<Item = &'t str>,
        capacity: u64,
    ) -> Self {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let shards = threads.next_power_of_two().min(8);
        let types: BTreeMap<_, _> = types.map(|name| (name.into(), Arc::new(Counts::new(shards)))).collect();
        Self {
            service: service.to_owned(),
            process: format!("{}-{:08x}", std::process::id(), rand::random::<u32>()),
            since: now(),
            tenants: Tenants::new(shards, labels, types.len()),
            types,
            declared: declared.map(str::to_owned).collect(),
            recent: Recent::new(),
            shadow: Shadow::new(capacity),
            series: Mutex::default(),
            invalidations: CAUSES.map(|_| Histogram::new(&NANOS)),
            invalidated: Mutex::default(),
            audits: Mutex::default(),
            unmapped: AtomicU64::new(0),
            drifting: Mutex::default(),
            rules,
            raised: Mutex::default(),
            started: AtomicBool::new(false),
            looked: AtomicU64::new(0),
            #[cfg(feature = "metrics")]
            told: Mutex::default(),
            others: Mutex::default(),
        }
    }

    pub(crate) fn service(&self) -> &str {
        &self.service
    }

    pub(crate) fn process(&self) -> &str {
        &self.process
    }

    /// The counts of a type, and its number.
    pub(super) fn counts(&self, data_type: &str) -> Option<(Arc<Counts>, usize)> {
        let at = self.types.keys().position(|name| **name == *data_type)?;
        self.types.get(data_type).map(|counts| (counts.clone(), at))
    }

    /// What metrics say of a tenant's requests of a type, if it has a label.
    pub(super) fn labelled(&self, TenantSlot(at): TenantSlot, data_type: usize) -> Option<&Reasons> {
        let of_types = self.tenants.slots.get(at)?.get()?.labelled.as_ref()?;
        of_types.get(data_type).map(|reasons| &**reasons.get_or_init(|| Box::new(Reasons::new())))
    }

    pub(crate) fn tenant(&self, name: &[u8]) -> TenantSlot {
        self.tenants.slot(name)
    }

    pub(super) fn of_tenant(&self, slot: TenantSlot) -> &Counts {
        self.tenants.counts(slot)
    }

    /// Whether this is the first time that somebody asks: there is one task that looks after it all.
    pub(crate) fn starts(&self) -> bool {
        !self.started.load(Relaxed) && !self.started.swap(true, Relaxed)
    }

    /// That task has ended.
    pub(crate) fn ends(&self) {
        self.started.store(false, Relaxed);
    }

    /// Somebody looks at the whole fleet.
    #[cfg(feature = "admin")]
    pub(crate) fn looks(&self) {
        self.looked.store(now(), Relaxed);
    }

    /// Whether anybody may look at this process, and whether somebody has just looked at all of them.
    pub(crate) fn is_shown(&self) -> Option<bool> {
        self.recent.is_watched().then(|| now().abs_diff(self.looked.load(Relaxed)) < LOOKING)
    }

    pub(crate) fn note(&self, what: What) {
        self.recent.note(Event { at: now(), what });
    }

    pub(crate) fn dropped(&self, dropped: &Dropped<'_>) {
        let Dropped { cause, what, tenant, types, tags, all, took, undelivered } = dropped;
        self.invalidations[*cause as usize].record(nanos(*took));
        let total = types.iter().map(|(_, count)| count).sum();
        if let Some(tenant) = tenant {
            let counts = self.tenants.counts(self.tenants.slot(tenant));
            counts.invalidations.fetch_add(1, Relaxed);
            counts.invalidated.fetch_add(total, Relaxed);
        }
        let mut invalidated = locked(&self.invalidated);
        for (name, count) in *types {
            if let Some(counts) = self.types.get(name) {
                counts.invalidations.fetch_add(1, Relaxed);
                counts.invalidated.fetch_add(*count, Relaxed);
            }
            let of_type = invalidated.entry(name.to_string()).or_default();
            *of_type.entry(cause.as_str().to_owned()).or_default() += count;
        }
        drop(invalidated);
        self.note(What::Invalidation {
            source: cause.as_str(),
            what: shortened(what),
            tenant: tenant.map(name_of),
            dropped: types.iter().map(|(name, count)| (name.to_string(), *count)).collect(),
            total,
            tags: tags.iter().map(|tag| shortened(tag)).collect(),
            all: all.clone(),
            ms: took.as_secs_f64() * 1_000.0,
            undelivered: *undelivered,
        });
    }

    /// A write that nothing is said of, and whether that is all right.
    pub(crate) fn unmapped(&self, what: &str, tenant: Option<&[u8]>, is_ignored: bool) {
        if !is_ignored {
            self.unmapped.fetch_add(1, Relaxed);
            locked(&self.raised).unmapped(what, now());
        }
        // An audit may find out what it has changed.
        self.note(What::Invalidation {
            source: "unmapped",
            what: shortened(what),
            tenant: tenant.map(name_of),
            dropped: BTreeMap::new(),
            total: 0,
            tags: vec![],
            all: Arc::default(),
            ms: 0.0,
            undelivered: 0,
        });
    }

    /// An audit has found something stale.
    pub(crate) fn stale(&self, data_type: &str, route: &str) {
        locked(&self.raised).audit(data_type, route, now());
    }

    /// A reload of this route was another, and no write was told of. Whether that is new.
    pub(super) fn drifted(&self, data_type: &str, route: &str) -> bool {
        locked(&self.raised).drift(data_type, route, now());
        locked(&self.drifting).insert(route.to_owned())
    }

    /// How an audit ended.
    pub(crate) fn audited(&self, data_type: &str, result: &'static str) {
        let mut audits = locked(&self.audits);
        *audits.entry(data_type.to_owned()).or_default().entry(result.to_owned()).or_default() += 1;
    }

    /// Looks for what should be looked at; what has begun or ended is said.
    pub(crate) fn look(&self, snapshot: &Snapshot) {
        let changes = locked(&self.raised).look(&self.rules, snapshot, now());
        for change in changes {
            if let What::Alert { alert, data_type, value, raised } = &change {
                let data_type = data_type.as_deref().unwrap_or("-");
                match raised {
                    true => tracing::warn!(alert, data_type, %value, "alert raised"),
                    false => tracing::info!(alert, data_type, "alert cleared"),
                }
            }
            self.note(change);
        }
    }

    /// A step of the series has ended.
    pub(crate) fn step(&self) {
        let mut series = locked(&self.series);
        let types = self.types.iter().map(|(name, counts)| (name.to_string(), counts.read()));
        for (steps, now) in series.iter_mut().zip([types.collect(), self.tenants.read()]) {
            for (name, of_type) in now {
                let asked = of_type.requests() - of_type.of(Handling::Bypass);
                steps.entry(name).or_default().step([asked, of_type.spared()]);
            }
        }
    }

    /// What a cache of another size would do.
    fn memory(&self) -> Option<OfMemory> {
        let estimate = self.shadow.estimate();
        let name = |at: usize| self.types.keys().nth(at).map(|name| name.to_string());
        let worth = estimate.worth.iter().filter_map(|(at, worth)| Some((name(*at)?, *worth))).collect();
        (estimate.lookups > 0).then_some(OfMemory { lookups: estimate.lookups, hits: estimate.hits, worth })
    }

    /// Everything that this process has counted, but for what its store knows.
    pub(crate) fn snapshot(&self) -> Snapshot {
        let with_series = |all: BTreeMap<String, OfType>, steps: &BTreeMap<String, Steps>| {
            let add = |(name, of_type): (String, OfType)| {
                let series = steps.get(&name).map(|steps| steps.steps.each_ref().map(|s| s.iter().copied().collect()));
                (name, OfType { series: series.unwrap_or_default(), ..of_type })
            };
            all.into_iter().map(add).collect()
        };
        let types = self.types.iter().map(|(name, counts)| (name.to_string(), counts.read()));
        let types = types.filter(|(name, t)| self.declared.contains(name) || t.requests() + t.invalidations > 0);
        let series = locked(&self.series);
        let mut invalidations = BTreeMap::new();
        for (cause, histogram) in CAUSES.iter().zip(&self.invalidations) {
            histogram.read(invalidations.entry(cause.as_str().to_owned()).or_default());
        }
        Snapshot {
            process: self.process.clone(),
            since: self.since,
            seen: now(),
            types: with_series(types.collect(), &series[0]),
            tenants: with_series(self.tenants.read(), &series[1]),
            labelled: self.tenants.labelled(self.types.keys()),
            has_labels: self.tenants.labels > 0,
            alerts: locked(&self.raised).all(),
            invalidations,
            invalidated: locked(&self.invalidated).clone(),
            audits: locked(&self.audits).clone(),
            memory: self.memory(),
            unmapped: self.unmapped.load(Relaxed),
            ..Snapshot::default()
        }
    }
}
