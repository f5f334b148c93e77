//! What is counted of requests: relaxed additions to atomics that were made with the cache. No lock, no registry, no allocation.

use std::{
    cell::Cell,
    sync::{OnceLock, atomic::AtomicUsize},
    time::{Duration, Instant},
};

use super::{
    outcome::{FoundIn, Handling, Outcome, Served},
    snapshot::{ByReason, HANDLINGS, OfHistogram, OfType},
};
use crate::sync::atomic::{AtomicU64, Ordering::Relaxed};

#[cfg(all(test, shuttle))]
mod interleavings;

/// Upper bounds of durations, in nanoseconds: 10 µs to 10 s.
pub(crate) const NANOS: [u64; 14] = [
    10_000,
    100_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    25_000_000,
    50_000_000,
    100_000_000,
    250_000_000,
    500_000_000,
    1_000_000_000,
    10_000_000_000,
];

/// Upper bounds of sizes, in bytes; one of them is the size that an alert is about.
pub(crate) const BYTES: [u64; 8] = [256, 1_024, 4_096, 16_384, 65_536, 102_400, 262_144, 1_048_576];

/// One of so many hits in process is timed, and stands for the others.
const SAMPLE: u32 = 16;

/// Of a type (or tenant) more reasons than this are one.
const REASONS: usize = 64;

/// As many as the largest needs.
const BUCKETS: usize = 15;

#[derive(Debug)]
pub(super) struct Histogram<const N: usize> {
    bounds: &'static [u64; N],
    /// One more than bounds, in place: what belongs to one thread shares no line with others.
    counts: [AtomicU64; BUCKETS],
    sum: AtomicU64,
    max: AtomicU64,
}

impl<const N: usize> Histogram<N> {
    pub(super) fn new(bounds: &'static [u64; N]) -> Self {
        const { assert!(N < BUCKETS) };
        let counts = [const { AtomicU64::new(0) }; BUCKETS];
        Self { bounds, counts, sum: AtomicU64::new(0), max: AtomicU64::new(0) }
    }

    fn at(&self, value: u64) -> usize {
        self.bounds.partition_point(|bound| *bound < value)
    }

    pub(super) fn record(&self, value: u64) {
        self.counts[self.at(value)].fetch_add(1, Relaxed);
        self.sum.fetch_add(value, Relaxed);
        self.max.fetch_max(value, Relaxed);
    }

    pub(super) fn read(&self, into: &mut OfHistogram) {
        into.counts.resize(N + 1, 0);
        for (sum, count) in into.counts.iter_mut().zip(&self.counts) {
            *sum += count.load(Relaxed);
        }
        into.sum += self.sum.load(Relaxed);
        into.max = into.max.max(self.max.load(Relaxed));
    }
}

/// What one thread counts, more or less: two that count at once seldom share a line.
#[derive(Debug)]
#[repr(align(128))]
struct Shard {
    handled: [Histogram<14>; 5],
    /// How long the last hit took that was timed.
    last: AtomicU64,
    saved: AtomicU64,
    /// Stored responses that the store was asked for: the others were found in this process.
    from_store: AtomicU64,
    /// What was sent: found in this process, by asking the store, and by the inner service.
    bytes: [AtomicU64; 3],
}

impl Shard {
    fn new() -> Self {
        let handled = HANDLINGS.map(|_| Histogram::new(&NANOS));
        let zero = || AtomicU64::new(0);
        Self { handled, last: zero(), saved: zero(), from_store: zero(), bytes: [zero(), zero(), zero()] }
    }
}

thread_local! {
    static THREAD: Cell<usize> = const { Cell::new(usize::MAX) };
    static TICK: Cell<u32> = const { Cell::new(0) };
}

/// A number of this thread's own.
fn thread() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    THREAD.with(|own| {
        if own.get() == usize::MAX {
            own.set(NEXT.fetch_add(1, Relaxed));
        }
        own.get()
    })
}

/// When a request began, if that is worth the look at the clock, and for how many it stands: what is no hit looks for itself.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timer(Option<(Instant, u32)>);

impl Timer {
    pub(crate) fn start() -> Self {
        let tick = TICK.with(|tick| tick.replace(tick.get().wrapping_add(1)));
        match tick {
            // Of a thread's first requests each.
            ..SAMPLE => Self(Some((Instant::now(), 1))),
            _ => Self(tick.is_multiple_of(SAMPLE).then(|| (Instant::now(), SAMPLE))),
        }
    }

    /// Of one request, which began then.
    pub(crate) fn since(began: Instant) -> Self {
        Self(Some((began, 1)))
    }

    pub(crate) fn began(self) -> Instant {
        self.0.map_or_else(Instant::now, |(began, _)| began)
    }
}

/// Why, and how often.
#[derive(Debug)]
pub(super) struct Reasons {
    names: [OnceLock<(Handling, &'static str)>; REASONS],
    counts: [AtomicU64; REASONS],
}

impl Reasons {
    pub(super) fn new() -> Self {
        Self { names: [const { OnceLock::new() }; REASONS], counts: [const { AtomicU64::new(0) }; REASONS] }
    }

    pub(super) fn add(&self, why: (Handling, &'static str)) {
        let start = why.1.len() * 7 + why.0 as usize;
        for at in (0..REASONS).map(|i| (start + i) % REASONS) {
            if *self.names[at].get_or_init(|| why) == why {
                self.counts[at].fetch_add(1, Relaxed);
                return;
            }
        }
    }

    pub(super) fn read(&self) -> ByReason {
        let mut read = ByReason::new();
        for (name, count) in self.names.iter().zip(&self.counts) {
            if let Some((handling, reason)) = name.get() {
                let of_handling = read.entry(handling.as_str().to_owned()).or_default();
                *of_handling.entry((*reason).to_owned()).or_default() += count.load(Relaxed);
            }
        }
        read
    }
}

/// The counts of one data type, or of one tenant.
#[derive(Debug)]
pub(crate) struct Counts {
    shards: Box<[Shard]>,
    reasons: Reasons,
    loads: [Histogram<14>; 2],
    bytes: Histogram<8>,
    pub(super) invalidations: AtomicU64,
    pub(super) invalidated: AtomicU64,
    pub(super) drift: AtomicU64,
}

impl Counts {
    /// With so many shards: a power of two.
    pub(super) fn new(shards: usize) -> Self {
        Self {
            shards: (0..shards).map(|_| Shard::new()).collect(),
            reasons: Reasons::new(),
            loads: [Histogram::new(&NANOS), Histogram::new(&NANOS)],
            bytes: Histogram::new(&BYTES),
            invalidations: AtomicU64::new(0),
            invalidated: AtomicU64::new(0),
            drift: AtomicU64::new(0),
        }
    }

    fn shard(&self) -> &Shard {
        &self.shards[thread() & (self.shards.len() - 1)]
    }

    /// A hit in this process.
    pub(super) fn hit(&self, outcome: &Outcome, timer: Timer) {
        let shard = self.shard();
        let handled = &shard.handled[outcome.outcome as usize];
        match timer.0 {
            None => _ = handled.counts[shard.last.load(Relaxed) as usize].fetch_add(1, Relaxed),
            Some((began, weight)) => {
                let nanos = nanos(began.elapsed());
                let at = handled.at(nanos);
                shard.last.store(at as u64, Relaxed);
                handled.counts[at].fetch_add(1, Relaxed);
                handled.sum.fetch_add(nanos * u64::from(weight), Relaxed);
                handled.max.fetch_max(nanos, Relaxed);
            }
        }
        let Served { bytes, saved, .. } = outcome.served;
        shard.bytes[0].fetch_add(bytes, Relaxed);
        if saved > 0 {
            shard.saved.fetch_add(saved.into(), Relaxed);
        }
    }

    pub(super) fn request(
        &self,
        (handling, reason): (Handling, Option<&'static str>),
        tier: Option<FoundIn>,
        took: Duration,
        served: Served,
    ) {
        // Before it is counted: whoever reads the counts first finds its reason.
        if let Some(reason) = reason {
            self.reasons.add((handling, reason));
        }
        let shard = self.shard();
        shard.handled[handling as usize].record(nanos(took));
        shard.saved.fetch_add(served.saved.into(), Relaxed);
        if tier == Some(FoundIn::Store) {
            shard.from_store.fetch_add(1, Relaxed);
        }
        shard.bytes[tier.map_or(2, |tier| tier as usize)].fetch_add(served.bytes, Relaxed);
    }

    pub(super) fn load(&self, is_ok: bool, took: Duration) {
        self.loads[usize::from(!is_ok)].record(nanos(took));
    }

    pub(super) fn stored(&self, bytes: usize) {
        self.bytes.record(bytes as u64);
    }

    pub(super) fn read(&self) -> OfType {
        let mut of_type = OfType::default();
        for shard in &self.shards {
            for (handled, into) in shard.handled.iter().zip(&mut of_type.handled) {
                handled.read(into);
            }
            of_type.saved_ms += shard.saved.load(Relaxed);
            of_type.from_store += shard.from_store.load(Relaxed);
            for (sum, bytes) in of_type.sent.iter_mut().zip(&shard.bytes) {
                *sum += bytes.load(Relaxed);
            }
        }
        of_type.reasons = self.reasons.read();
        for (loads, into) in self.loads.iter().zip(&mut of_type.loads) {
            loads.read(into);
        }
        self.bytes.read(&mut of_type.bytes);
        of_type.invalidations = self.invalidations.load(Relaxed);
        of_type.invalidated = self.invalidated.load(Relaxed);
        of_type.drift = self.drift.load(Relaxed);
        of_type
    }
}

pub(super) fn nanos(took: Duration) -> u64 {
    u64::try_from(took.as_nanos()).unwrap_or(u64::MAX)
}
