//! A schedule as a list of actions, made from a seed before anything runs; and how one that fails is made smaller.

use std::fmt;

use rand::{RngExt, SeedableRng, rngs::SmallRng};
use tower_cache_aside::Tier;

/// Processes of a fleet at most.
pub const PROCESSES: usize = 3;

/// Parents have children and values; values also belong to a team, of which only new processes know.
pub const PARENTS: usize = 2;
pub const TEAM: usize = PARENTS;
pub const THINGS: usize = PARENTS + 1;

/// What is promised depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// One process, and the store in it.
    Embedded,
    Shared,
    Reject,
    /// Fenced, and `Reject`.
    Fenced,
}

/// Where entries are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    Process,
    /// A store behind a guard, and connections that do what connections may.
    Lines,
    Redis(Tier),
}

impl Over {
    pub fn nth(self) -> usize {
        match self {
            Self::Process => 0,
            Self::Lines => 1,
            Self::Redis(_) => 2,
        }
    }
}

#[derive(Clone, Debug)]
pub struct Plan {
    pub seed: u64,
    pub mode: Mode,
    pub over: Over,
    /// Writes wait until a replica has their invalidation.
    pub replicas: bool,
    pub processes: usize,
    pub actions: Vec<Action>,
}

/// At this many milliseconds.
#[derive(Clone, Debug)]
pub struct Action {
    pub at: u64,
    pub what: What,
}

#[derive(Clone, Debug)]
pub enum What {
    /// A client asks, and hangs up after so many milliseconds.
    Read {
        process: usize,
        kind: Kind,
        parent: usize,
        fate: Fate,
        patience: Option<u64>,
    },
    Write {
        process: usize,
        how: How,
        thing: usize,
        fate: Fate,
        patience: Option<u64>,
    },
    /// The connection of one process, or of all, is like this for so many milliseconds.
    Fault {
        process: Option<usize>,
        fault: Fault,
        lasts: u64,
    },
    /// The store loses all that it has.
    Flush,
    /// Another server takes over, which has not heard of the last so many milliseconds; or has, for it was waited for.
    FailOver {
        lag: Option<u64>,
    },
    /// It stops taking requests, delivers what it has not delivered, and ends.
    Stop {
        process: usize,
    },
    Kill {
        process: usize,
    },
    /// A process starts where none is: the old code or the new.
    Start {
        process: usize,
        is_new: bool,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Parent,
    Child,
    /// Its path does not name its parent: the response declares it.
    Late,
    /// Of the typed function.
    Value,
}

pub const KINDS: [Kind; 4] = [Kind::Parent, Kind::Child, Kind::Late, Kind::Value];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    Request,
    /// A handler that says nothing: it invalidates by hand.
    ByHand,
    /// `Cache::write`.
    Job,
}

/// What becomes of a handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Fine,
    /// Nothing is changed.
    Refuses,
    /// Before anything is changed, and nobody can tell.
    FailsEarly,
    Fails,
    Panics,
    Errs,
    /// For seconds.
    Hangs,
    /// What it does, it does while its body streams.
    Streams,
    /// And then the body breaks off.
    Breaks,
    /// The response is for nobody else.
    Private,
}

impl Fate {
    /// Whether the service itself fails its request.
    pub fn fails(self) -> bool {
        !matches!(self, Self::Fine | Self::Hangs | Self::Streams | Self::Private)
    }

    fn of(rng: &mut SmallRng) -> Self {
        match rng.random_range(0..24) {
            0 => Self::Refuses,
            1 => Self::FailsEarly,
            2 => Self::Fails,
            3 => Self::Panics,
            4 => Self::Errs,
            5 => Self::Hangs,
            6 | 7 => Self::Streams,
            8 => Self::Breaks,
            9 => Self::Private,
            _ => Self::Fine,
        }
    }
}

/// What a connection does to what is sent over it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    Slow,
    LosesRequests,
    /// Whoever asked does not know whether it happened.
    LosesReplies,
    /// The same, and it is said at once that the connection is gone.
    Resets,
    Duplicates,
    /// Nothing is sent.
    Cut,
    /// The store answers, and takes no writes.
    ReadOnly,
    Refuses,
}

const FAULTS: [Fault; 8] = [
    Fault::Slow,
    Fault::LosesRequests,
    Fault::LosesReplies,
    Fault::Resets,
    Fault::Duplicates,
    Fault::Cut,
    Fault::ReadOnly,
    Fault::Refuses,
];

/// What a schedule is about: each has a part of what there is, for in a schedule of everything little comes together.
struct Flavour {
    mode: Mode,
    over: Over,
    replicas: bool,
    processes: usize,
    parents: usize,
    kinds: Vec<Kind>,
    fates: bool,
    faults: Vec<Fault>,
    /// Whether faults last for longer than writes wait.
    outages: bool,
    /// How often of a hundred.
    odds: Odds,
    /// How long it is until the next action at most, usually and sometimes.
    gaps: (u64, u64),
}

struct Odds {
    fault: u32,
    life: u32,
    flush: u32,
    write: u32,
}

/// Each of these with even odds, but at least one.
fn some<T: Copy>(rng: &mut SmallRng, all: &[T]) -> Vec<T> {
    let mut some: Vec<_> = all.iter().filter(|_| rng.random_bool(0.5)).copied().collect();
    if some.is_empty() {
        some.push(all[rng.random_range(0..all.len())]);
    }
    some
}

impl Flavour {
    fn new(rng: &mut SmallRng) -> Self {
        // One store in one process is what has the fewest ways to fail.
        let mode = [Mode::Embedded, Mode::Shared, Mode::Shared, Mode::Reject, Mode::Fenced][rng.random_range(0..5)];
        let is_alone = mode == Mode::Embedded;
        let over = match rng.random_range(0..12) {
            _ if is_alone => Over::Process,
            0 => Over::Redis(Tier::Off),
            1 => Over::Redis(Tier::Validated),
            2 | 3 => Over::Redis(Tier::On),
            _ => Over::Lines,
        };
        let is_redis = matches!(over, Over::Redis(_));
        let replicas = is_redis && rng.random_ratio(1, 3);
        // There a fence is a key as well, and lost with the others.
        let flushes = mode != Mode::Fenced || !is_redis || replicas;
        let faults = (0..rng.random_range(1..=2)).map(|_| FAULTS[rng.random_range(0..FAULTS.len())]).collect();
        Self {
            mode,
            over,
            replicas,
            processes: if is_alone { 1 } else { rng.random_range(1..=PROCESSES) },
            parents: rng.random_range(1..=PARENTS),
            kinds: some(rng, &KINDS),
            fates: rng.random(),
            faults,
            outages: rng.random(),
            odds: Odds {
                fault: if is_alone { 0 } else { [0, 4, 10][rng.random_range(0..3)] },
                life: if is_alone { 0 } else { [0, 0, 8, 16][rng.random_range(0..4)] },
                flush: if flushes { [0, 0, 3][rng.random_range(0..3)] } else { 0 },
                write: rng.random_range(10..50),
            },
            gaps: [(3, 20), (20, 200), (30, 1_500)][rng.random_range(0..3)],
        }
    }

    fn what(&self, rng: &mut SmallRng) -> What {
        let process = rng.random_range(0..self.processes);
        let patience = (self.fates && rng.random_ratio(1, 8)).then(|| rng.random_range(0..60));
        let fate = if self.fates { Fate::of(rng) } else { Fate::Fine };
        let Odds { fault, life, flush, write } = self.odds;
        match rng.random_range(0..100) {
            n if n < fault => {
                let fault = self.faults[rng.random_range(0..self.faults.len())];
                let lasts = if self.outages { rng.random_range(1_000..3_000) } else { rng.random_range(0..200) };
                What::Fault { process: rng.random_ratio(2, 3).then_some(process), fault, lasts }
            }
            n if n < fault + life => match rng.random_range(0..4) {
                0 => What::Kill { process },
                1 => What::Stop { process },
                _ => What::Start { process, is_new: true },
            },
            n if n < fault + life + flush => match self.over {
                Over::Redis(_) if self.mode == Mode::Fenced || rng.random() => {
                    What::FailOver { lag: (!self.replicas).then(|| rng.random_range(0..1_000)) }
                }
                _ => What::Flush,
            },
            n if n < fault + life + flush + write => {
                let is_team = self.odds.life > 0 && rng.random_ratio(1, 4);
                let thing = if is_team { TEAM } else { rng.random_range(0..self.parents) };
                let how = [How::Request, How::Request, How::ByHand, How::Job][rng.random_range(0..4)];
                What::Write { process, how, thing, fate, patience }
            }
            _ => {
                let kind = self.kinds[rng.random_range(0..self.kinds.len())];
                What::Read { process, kind, parent: rng.random_range(0..self.parents), fate, patience }
            }
        }
    }
}

impl Flavour {
    /// What comes of an action that something may be wrong with, just when that shows.
    fn echo(&self, rng: &mut SmallRng, what: &What) -> Option<(u64, What)> {
        let kind = self.kinds[rng.random_range(0..self.kinds.len())];
        let (fate, patience) = (Fate::Fine, None);
        match *what {
            // A write waits for so long until it goes on without the store.
            What::Write { process, thing, .. } if self.odds.fault > 0 && rng.random() => {
                let stop = self.odds.life > 0 && rng.random_ratio(1, 3);
                let read = What::Read { process, kind, parent: thing.min(PARENTS - 1), fate, patience };
                Some((rng.random_range(1_000..1_100), if stop { What::Stop { process } } else { read }))
            }
            What::FailOver { .. } => {
                let (process, parent) = (rng.random_range(0..self.processes), rng.random_range(0..self.parents));
                Some((rng.random_range(1_000..2_000), What::Read { process, kind, parent, fate, patience }))
            }
            _ => None,
        }
    }
}

impl Plan {
    /// Whether what is popular is kept warm.
    pub fn warms(&self) -> bool {
        self.seed % 4 == 3
    }

    pub fn new(seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let flavour = Flavour::new(&mut rng);
        let (length, mut at) = (rng.random_range(6..40), 0);
        let mut actions = vec![];
        for _ in 0..length {
            let (usually, sometimes) = flavour.gaps;
            let most = if rng.random_ratio(1, 6) { sometimes } else { usually };
            at += rng.random_range(0..most);
            let what = flavour.what(&mut rng);
            if let Some((later, what)) = flavour.echo(&mut rng, &what) {
                actions.push(Action { at: at + later, what });
            }
            actions.push(Action { at, what });
        }
        actions.sort_by_key(|action| action.at);
        let Flavour { mode, over, replicas, processes, .. } = flavour;
        Self { seed, mode, over, replicas, processes, actions }
    }

    /// The same with as few actions, hang-ups and bad fates as still fail.
    pub fn minimised(mut self, fails: impl Fn(&Self) -> bool) -> Self {
        let mut size = self.actions.len().div_ceil(2);
        while size > 0 {
            let (mut from, before) = (0, self.actions.len());
            while from < self.actions.len() {
                let mut less = self.clone();
                less.actions.drain(from..(from + size).min(self.actions.len()));
                if fails(&less) { self = less } else { from += size }
            }
            if self.actions.len() == before || size > 1 {
                size /= 2;
            }
        }
        for i in 0..self.actions.len() {
            for simpler in simpler(&self.actions[i].what) {
                let mut less = self.clone();
                less.actions[i].what = simpler;
                if fails(&less) {
                    self = less;
                }
            }
        }
        self
    }
}

fn simpler(what: &What) -> Vec<What> {
    match *what {
        What::Read { process, kind, parent, fate, .. } => vec![
            What::Read { process, kind, parent, fate, patience: None },
            What::Read { process, kind, parent, fate: Fate::Fine, patience: None },
        ],
        What::Write { process, how, thing, fate, .. } => vec![
            What::Write { process, how, thing, fate, patience: None },
            What::Write { process, how, thing, fate: Fate::Fine, patience: None },
        ],
        _ => vec![],
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, mode, over, replicas, processes, .. } = self;
        let replicas = if *replicas { " with replicas" } else { "" };
        writeln!(f, "SIM_SEED={seed} ({mode:?} over {over:?}{replicas}, {processes} processes)")?;
        self.actions.iter().try_for_each(|Action { at, what }| writeln!(f, "  {at:>5} ms  {what:?}"))
    }
}
