//! The history of what was written by and read from several processes, and whether it is what the docs promise.
//!
//! A register only grows, and what is deleted is [`GONE`]. A read must find at least what was acknowledged before it
//! began. Where the acknowledgement says `undelivered`, that goes for the process that gave it; for others from when its
//! journal has been delivered, or a later write has: until then they may be stale. What a process that is killed has not
//! delivered, nobody need ever hear of.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// The version of what was deleted.
pub const GONE: u64 = u64::MAX;

/// At most how long a process may lag behind what it was told.
const MOST_LAG: Duration = Duration::from_secs(10);

/// Findings that are kept; all are counted.
const KEPT: usize = 20;

/// One process, from its start to its end.
#[derive(Debug)]
pub struct Life {
    pub name: String,
    number: u64,
    /// For how long it may serve what was written over elsewhere: the tier that answers without asking.
    lag: Duration,
    region: u64,
    /// For how long it may serve what was written over in another region.
    abroad: Duration,
    ending: AtomicBool,
    /// What it acknowledged and has not told the others yet.
    untold: Mutex<Vec<Arc<Ack>>>,
}

#[derive(Debug)]
struct Ack {
    version: u64,
    by: u64,
    region: u64,
    at: Instant,
    /// Since when every process has to know.
    told: OnceLock<Instant>,
}

impl Life {
    pub fn new(name: String, lag: Duration) -> Arc<Self> {
        Self::of_region(name, lag, (0, Duration::ZERO))
    }

    /// In a region, which hears within so long what others write.
    pub fn of_region(name: String, lag: Duration, (region, abroad): (u64, Duration)) -> Arc<Self> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        assert!(lag.max(abroad) <= MOST_LAG);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        Arc::new(Self { name, number, lag, region, abroad, ending: AtomicBool::new(false), untold: Mutex::default() })
    }

    /// It is about to be killed: from now on requests to it may fail.
    pub fn end(&self) {
        self.ending.store(true, Ordering::SeqCst);
    }

    pub fn is_ending(&self) -> bool {
        self.ending.load(Ordering::SeqCst)
    }

    /// When it was asked, at `asked`, it had nothing to deliver.
    pub fn has_told(&self, asked: Instant) {
        let now = Instant::now();
        self.untold.lock().unwrap().retain(|ack| {
            let is_told = ack.at <= asked;
            if is_told {
                let _ = ack.told.set(now);
            }
            !is_told
        });
    }

    /// It is dead; and how many of its writes nobody was told of.
    pub fn forget(&self) -> usize {
        std::mem::take(&mut *self.untold.lock().unwrap()).len()
    }
}

/// Something whose version only grows.
#[derive(Debug, Default)]
pub struct Register {
    acks: Mutex<Acks>,
    doomed: AtomicBool,
}

#[derive(Debug, Default)]
struct Acks {
    /// What every read must see by now.
    base: u64,
    recent: Vec<Arc<Ack>>,
}

impl Register {
    /// A write was acknowledged by this process; `is_told` unless that said that others might not know.
    pub fn acknowledge(&self, version: u64, by: &Life, is_told: bool) {
        let at = Instant::now();
        let ack = Arc::new(Ack { version, by: by.number, region: by.region, at, told: OnceLock::new() });
        let mut acks = self.acks.lock().unwrap();
        // Before it counts as acknowledged, it is among those that are not told.
        if is_told {
            let _ = ack.told.set(at);
        } else {
            by.untold.lock().unwrap().push(ack.clone());
        }
        acks.recent.push(ack);
        let Acks { base, recent } = &mut *acks;
        let old = recent.iter().filter(|ack| ack.told.get().is_some_and(|told| *told + MOST_LAG <= at));
        *base = old.map(|ack| ack.version).chain([*base]).max().unwrap_or(0);
        recent.retain(|ack| ack.version > *base);
    }

    /// The least that a read which begins now, at this process, may find.
    pub fn floor(&self, reader: &Life) -> u64 {
        let now = Instant::now();
        let acks = self.acks.lock().unwrap();
        let lag = |ack: &Ack| if ack.region == reader.region { reader.lag } else { reader.abroad };
        let counts =
            |ack: &&Arc<Ack>| ack.by == reader.number || ack.told.get().is_some_and(|told| *told + lag(ack) <= now);
        acks.recent.iter().filter(counts).map(|ack| ack.version).max().unwrap_or(0).max(acks.base)
    }

    /// What it would have to find if nothing ever failed, and no process lagged.
    pub fn newest(&self) -> u64 {
        let acks = self.acks.lock().unwrap();
        acks.recent.iter().map(|ack| ack.version).max().unwrap_or(0).max(acks.base)
    }

    /// Somebody begins to delete it: from now on it may be gone. Whether nobody else has begun.
    pub fn doom(&self) -> bool {
        !self.doomed.swap(true, Ordering::SeqCst)
    }

    pub fn is_doomed(&self) -> bool {
        self.doomed.load(Ordering::SeqCst)
    }
}

/// What was done, and what was wrong with it.
#[derive(Debug)]
pub struct History {
    start: Instant,
    pub reads: AtomicU64,
    pub hits: AtomicU64,
    pub writes: AtomicU64,
    /// Writes whose acknowledgement said that others might not know.
    pub undelivered: AtomicU64,
    /// Of those, the ones whose process was killed first.
    pub lost: AtomicU64,
    /// Reads that found less than the newest that was acknowledged, and no less than what is promised.
    pub lagged: AtomicU64,
    /// Requests to a process that was being killed.
    pub unanswered: AtomicU64,
    /// Writes that were refused before they ran, where that is what was asked for.
    pub refused: AtomicU64,
    pub strange: AtomicU64,
    pub compared: AtomicU64,
    slowest: Mutex<[Duration; 2]>,
    stale: Mutex<(u64, Vec<String>)>,
    failed: Mutex<(u64, Vec<String>)>,
}

impl Default for History {
    fn default() -> Self {
        Self {
            start: Instant::now(),
            reads: AtomicU64::new(0),
            hits: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            undelivered: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            lagged: AtomicU64::new(0),
            unanswered: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            strange: AtomicU64::new(0),
            compared: AtomicU64::new(0),
            slowest: Mutex::default(),
            stale: Mutex::default(),
            failed: Mutex::default(),
        }
    }
}

pub fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl History {
    pub fn elapsed(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }

    fn keep(&self, findings: &Mutex<(u64, Vec<String>)>, what: String) {
        let mut findings = findings.lock().unwrap();
        findings.0 += 1;
        if findings.1.len() < KEPT {
            let what = format!("{:.2} s: {what}", self.elapsed());
            println!("{what}");
            findings.1.push(what);
        }
    }

    pub fn fail(&self, what: String) {
        self.keep(&self.failed, what);
    }

    /// A read that began when it had to find at least `floor`, and the newest was `newest`.
    pub fn read(&self, found: u64, floor: u64, newest: u64, what: impl FnOnce() -> String) {
        if found < floor {
            let of = |version: u64| if version == GONE { "gone".to_owned() } else { version.to_string() };
            self.keep(&self.stale, format!("{} of at least {}: {}", of(found), of(floor), what()));
        } else if found < newest {
            count(&self.lagged);
        }
    }

    pub fn took(&self, is_write: bool, time: Duration) {
        let slowest = &mut self.slowest.lock().unwrap()[usize::from(is_write)];
        *slowest = time.max(*slowest);
    }

    pub fn stale(&self) -> u64 {
        self.stale.lock().unwrap().0
    }

    pub fn failed(&self) -> u64 {
        self.failed.lock().unwrap().0
    }

    pub fn summary(&self) -> String {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let [read, write] = *self.slowest.lock().unwrap();
        format!(
            "{:.0} s: {} reads ({} hits, {} older than the newest as is promised), {} writes ({} undelivered at first, {} \
             lost by a kill, {} refused), {} strange requests, {} to a process that was being killed, {} comparisons; \
             slowest read {read:.1?}, write {write:.1?}; {} stale, {} failed",
            self.elapsed(),
            of(&self.reads),
            of(&self.hits),
            of(&self.lagged),
            of(&self.writes),
            of(&self.undelivered),
            of(&self.lost),
            of(&self.refused),
            of(&self.strange),
            of(&self.unanswered),
            of(&self.compared),
            self.stale(),
            self.failed()
        )
    }

    /// What holds in every case.
    pub fn assert_good(&self) {
        let (reads, writes) = (self.reads.load(Ordering::Relaxed), self.writes.load(Ordering::Relaxed));
        let (stale, failed) = (self.stale.lock().unwrap(), self.failed.lock().unwrap());
        assert!(stale.1.is_empty() && failed.1.is_empty(), "stale: {:#?}\nfailed: {:#?}", stale.1, failed.1);
        assert!(reads > 100 && writes > 10, "too little happened to prove anything: {reads}, {writes}");
    }
}
