//! What all processes of a schedule share: the database, the store, the faults; and the checker, who knows what each read may
//! be answered with.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
};

use tower_cache_aside::{Tier, store::StoreError};

use crate::{
    dice::Dice,
    line::Server,
    plan::{Action, Fault, Mode, Over, Plan, THINGS, What},
    redis::Redis,
    sabotage::Sabotage,
};

/// How long a push is under way at most.
const PUSH: u64 = 25;

/// Two heartbeats.
const PROVEN: u64 = 500;

/// Until it is asked again whether it is well.
const HEARTBEAT: u64 = 300;

/// Until a process has found another server, and trusts it.
const SETTLED: u64 = 2_500;

pub type Versions = [u64; THINGS];

pub struct World {
    pub dice: Dice,
    pub mode: Mode,
    pub over: Over,
    pub replicas: u32,
    /// What is popular is kept warm.
    pub warms: bool,
    pub server: Server,
    pub redis: Redis,
    pub sabotage: Sabotage,
    failovers: Vec<u64>,
    /// From when until when, of which process.
    faults: Vec<(u64, u64, Option<usize>, Fault)>,
    pub history: Mutex<History>,
}

/// What has happened so far.
#[derive(Default)]
pub struct History {
    /// When which version was written: each counts from 1.
    committed: [Vec<u64>; THINGS],
    /// What was committed when the store last dropped all that a write makes stale.
    dropped: Versions,
    /// From when on every process sees these: the store had dropped all that a write makes stale when they were committed; or
    /// they were written behind a fence, or acknowledged to a client of any process by a write that had one.
    visible: Vec<(u64, Versions)>,
    wrong: Vec<String>,
    pub counts: Counts,
}

/// What a number of schedules came to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    pub reads: u64,
    /// In one process, over lines, over Redis.
    pub hits: [u64; 3],
    pub writes: u64,
    pub undelivered: u64,
    pub refused: u64,
    /// The longest that a client had to wait, in milliseconds: for a read, for a write.
    pub longest: [u64; 2],
}

impl Counts {
    pub fn add(&mut self, other: &Self) {
        self.reads += other.reads;
        self.hits = std::array::from_fn(|i| self.hits[i] + other.hits[i]);
        self.writes += other.writes;
        self.undelivered += other.undelivered;
        self.refused += other.refused;
        self.longest = std::array::from_fn(|i| self.longest[i].max(other.longest[i]));
    }
}

impl History {
    pub fn wrong(&mut self, what: String) {
        self.wrong.push(what);
    }

    fn sees(&mut self, now: u64, thing: usize, version: u64) {
        let mut last = self.visible.last().map_or_else(Versions::default, |(_, versions)| *versions);
        if last[thing] < version {
            last[thing] = version;
            self.visible.push((now, last));
        }
    }

    /// How many versions there were at this time.
    fn committed_at(&self, thing: usize, at: u64) -> u64 {
        self.committed[thing].partition_point(|committed| *committed <= at) as u64
    }
}

impl World {
    pub fn new(plan: &Plan, sabotage: Sabotage, cascades: [BTreeSet<Vec<u8>>; THINGS]) -> Arc<Self> {
        let fault = |action: &Action| match action.what {
            What::Fault { process, fault, lasts } => Some((action.at, action.at + lasts, process, fault)),
            _ => None,
        };
        Arc::new(Self {
            dice: Dice::new(plan.seed),
            mode: plan.mode,
            over: plan.over,
            replicas: plan.replicas.into(),
            warms: plan.warms(),
            server: Server::new(sabotage, cascades),
            redis: Redis::default(),
            sabotage,
            failovers: plan.actions.iter().filter(|a| matches!(a.what, What::FailOver { .. })).map(|a| a.at).collect(),
            faults: plan.actions.iter().filter_map(fault).collect(),
            history: Mutex::default(),
        })
    }

    /// What is wrong now with the connection of a process.
    pub fn fault(&self, process: usize) -> Option<Fault> {
        self.fault_now(process).map(|(.., fault)| *fault)
    }

    /// When that is over.
    pub fn fault_ends(&self, process: usize) -> u64 {
        self.fault_now(process).map_or(0, |(_, until, ..)| *until)
    }

    fn fault_now(&self, process: usize) -> Option<&(u64, u64, Option<usize>, Fault)> {
        let now = self.dice.now();
        let is_on = |(from, until, of, _): &&(u64, u64, Option<usize>, Fault)| {
            (*from..*until).contains(&now) && of.is_none_or(|of| of == process)
        };
        self.faults.iter().rev().find(is_on)
    }

    /// Whether anything was wrong with it within so many milliseconds.
    pub fn had_fault(&self, process: usize, within: u64) -> bool {
        let now = self.dice.now();
        let had = |&(from, until, of, _): &(u64, u64, Option<usize>, Fault)| {
            from <= now && now <= until + within && of.is_none_or(|of| of == process)
        };
        let failed_over = |at: &u64| *at <= now && now <= at + SETTLED + within;
        self.faults.iter().any(had) || self.failovers.iter().any(failed_over)
    }

    /// Whether a process must have noticed by now that the store cannot be told of a write.
    pub fn is_out(&self, process: usize) -> bool {
        let Some(since) = self.dice.now().checked_sub(PROVEN + HEARTBEAT) else { return false };
        let of_it = self.faults.iter().filter(|(_, until, of, _)| *until > since && of.is_none_or(|of| of == process));
        let mut of_it = of_it.filter(|(from, ..)| *from <= self.dice.now());
        let is_outage =
            |fault| matches!(fault, Fault::Cut | Fault::LosesRequests | Fault::LosesReplies | Fault::ReadOnly);
        let lasts = of_it
            .next()
            .is_some_and(|(from, until, _, fault)| *from <= since && *until > self.dice.now() && is_outage(*fault));
        lasts && of_it.next().is_none() && matches!(self.over, Over::Redis(_))
    }

    /// For how long a process may not have heard of what others write.
    fn deafness(&self, process: usize) -> u64 {
        match self.over {
            Over::Redis(Tier::On) if self.had_fault(process, PROVEN) => PROVEN + PUSH,
            Over::Redis(Tier::On) => PUSH,
            _ => 0,
        }
    }

    pub async fn read(&self, salt: u64) -> Versions {
        self.dice.pause(salt).await;
        let versions = std::array::from_fn(|i| self.history.lock().unwrap().committed[i].len() as u64);
        self.dice.pause(salt).await;
        versions
    }

    /// Writes the next version. Behind a fence all can see it at once: nothing that is stored answers.
    pub async fn write(&self, thing: usize, salt: u64, is_fenced: bool) -> u64 {
        self.dice.pause(salt).await;
        let version = {
            let mut history = self.history.lock().unwrap();
            history.committed[thing].push(self.dice.now());
            let version = history.committed[thing].len() as u64;
            if is_fenced {
                history.sees(self.dice.now(), thing, version);
            }
            version
        };
        self.dice.pause(salt).await;
        version
    }

    /// The store has dropped all that writes of these make stale.
    pub fn dropped(&self, things: impl Iterator<Item = usize>) {
        let mut history = self.history.lock().unwrap();
        for thing in things {
            history.dropped[thing] = history.committed[thing].len() as u64;
            let version = history.dropped[thing];
            history.sees(self.dice.now(), thing, version);
        }
    }

    pub async fn flush(&self) -> Result<(), StoreError> {
        self.server.flush().await?;
        self.redis.flush();
        self.dropped(0..THINGS);
        Ok(())
    }

    /// What a read must not be older than that begins now, in a process whose own writes these were, and where nothing is
    /// kept for longer than this.
    pub fn floors(&self, process: usize, own: &Versions, longest: u64) -> Versions {
        let (now, deafness) = (self.dice.now(), self.deafness(process));
        let history = self.history.lock().unwrap();
        let heard = match deafness {
            0 => history.visible.len(),
            deafness => history.visible.partition_point(|(at, _)| at + deafness < now),
        };
        let visible = history.visible[..heard].last().map_or_else(Versions::default, |(_, versions)| *versions);
        // The clocks of the cache and of the database tick a millisecond apart.
        let expired = now.checked_sub(longest + 2);
        std::array::from_fn(|i| {
            let by_age = expired.map_or(0, |at| history.committed_at(i, at));
            own[i].max(visible[i]).max(by_age)
        })
    }

    /// A client knows that this was written.
    pub fn acknowledged(&self, thing: usize, version: u64, is_fenced: bool, is_delivered: bool) {
        let mut history = self.history.lock().unwrap();
        if is_fenced {
            history.sees(self.dice.now(), thing, version);
        }
        if is_delivered && history.dropped[thing] < version {
            let at = self.dice.now();
            history.wrong(format!("{at} ms: version {version} of {thing} is said to be delivered, and is not"));
        }
    }

    /// What the store has been told of.
    pub fn delivered(&self) -> Versions {
        self.history.lock().unwrap().dropped
    }

    pub fn wrong(&self, what: String) {
        let at = self.dice.now();
        self.history.lock().unwrap().wrong(format!("{at} ms: {what}"));
    }

    pub fn count(&self, count: impl FnOnce(&mut Counts)) {
        count(&mut self.history.lock().unwrap().counts);
    }

    /// What was wrong, if anything, and what happened.
    pub fn end(&self) -> (Vec<String>, Counts) {
        let mut history = self.history.lock().unwrap();
        (std::mem::take(&mut history.wrong), history.counts)
    }
}
