//! Runs a schedule: each action at its time, each client in a task of its own; and at its end, when nothing is wrong any more,
//! everybody reads everything.

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    task::JoinSet,
    time::{sleep, sleep_until, timeout},
};

use crate::{
    plan::{Action, Fate, How, KINDS, Kind, Mode, PARENTS, PROCESSES, Plan, TEAM, THINGS, What},
    sabotage::Sabotage,
    service::{COALESCE, HANG, LEASE, Process, Written, cascades, longest},
    world::{Counts, World},
};

/// How long the store may be asked in vain before a request goes to the origin, all its calls together, and what a handler
/// that does not hang takes.
const READ: u64 = 600;

/// For another process' call.
const FLEET: u64 = 3_000;

/// The budgets of fence, invalidation and repeated invalidation, and what a handler that does not hang takes.
const WRITE: u64 = 3_300;

/// After a fault: until the journal is delivered.
const DELIVERED: u64 = 2_500;

/// How long a process that stops has for it.
const DRAIN: Duration = Duration::from_secs(5);

/// How long a process may take to find out that its store is well.
const YOUNG: u64 = 100;

/// The processes that there are.
type Fleet = Mutex<[Option<Arc<Process>>; PROCESSES]>;

struct Run {
    world: Arc<World>,
    fleet: Fleet,
}

/// How a schedule ended.
#[derive(Debug)]
pub struct Ran {
    pub wrong: Vec<String>,
    pub counts: Counts,
}

/// Runs one schedule.
pub fn run(plan: &Plan, sabotage: Sabotage, cascades: &[BTreeSet<Vec<u8>>; THINGS]) -> Ran {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let world = World::new(plan, sabotage, cascades.clone());
        let start = |slot| (slot < plan.processes).then(|| Process::start(&world, slot, false));
        let run = Arc::new(Run { fleet: Mutex::new(std::array::from_fn(start)), world: world.clone() });
        let mut tasks = JoinSet::new();
        for Action { at, what } in plan.actions.clone() {
            let run = run.clone();
            tasks.spawn(async move {
                sleep_until(run.world.dice.instant(at)).await;
                run.act(what).await;
            });
        }
        while let Some(done) = tasks.join_next().await {
            if let Err(error) = done.map_err(tokio::task::JoinError::into_panic) {
                std::panic::resume_unwind(error);
            }
        }
        run.settle().await;
        let (wrong, counts) = world.end();
        Ran { wrong, counts }
    })
}

impl Run {
    fn process(&self, slot: usize) -> Option<Arc<Process>> {
        let process = self.fleet.lock().unwrap()[slot].clone();
        process.filter(|process| !process.is_stopping.load(Ordering::SeqCst))
    }

    async fn act(&self, what: What) {
        match what {
            What::Read { process, kind, parent, fate, patience } => {
                if let Some(process) = self.process(process) {
                    self.read(&process, kind, parent, fate, patience).await;
                }
            }
            What::Write { process, how, thing, fate, patience } => {
                if let Some(process) = self.process(process) {
                    self.write(&process, how, thing, fate, patience).await;
                }
            }
            // It is looked up by whoever uses the connection.
            What::Fault { .. } => {}
            What::Flush => self.world.flush().await.unwrap(),
            What::FailOver { lag } => self.world.redis.fail_over(&self.world, lag),
            What::Stop { process } => self.stop(process).await,
            What::Kill { process } => {
                if let Some(process) = self.fleet.lock().unwrap()[process].take() {
                    process.is_stopping.store(true, Ordering::SeqCst);
                    process.is_dead.store(true, Ordering::SeqCst);
                }
            }
            What::Start { process: slot, is_new } => {
                let process = &mut self.fleet.lock().unwrap()[slot];
                if process.is_none() {
                    *process = Some(Process::start(&self.world, slot, is_new));
                }
            }
        }
    }

    async fn read(&self, process: &Arc<Process>, kind: Kind, parent: usize, fate: Fate, patience: Option<u64>) {
        let world = &self.world;
        let _busy = Busy::new(process);
        let floors = {
            let own = *process.own.lock().unwrap();
            world.floors(process.slot, &own, longest(kind))
        };
        let begin = world.dice.now();
        let fleet = if kind == Kind::Late && world.mode != Mode::Embedded { FLEET + COALESCE } else { 0 };
        let bound = READ + 3 * COALESCE + 2 * fleet + if fate == Fate::Hangs { HANG } else { 0 };
        let within = Duration::from_millis(patience.unwrap_or(bound));
        // In a task, as a server does it: it may panic.
        let task = {
            let process = process.clone();
            tokio::spawn(async move { process.read(kind, parent, fate).await })
        };
        let abort = task.abort_handle();
        let result = timeout(within, task).await;
        if process.is_dead.load(Ordering::SeqCst) {
            return abort.abort();
        }
        let who = format!("process {} reads {kind:?} {parent} ({fate:?}, since {begin} ms)", process.slot);
        match result {
            Err(_) => {
                abort.abort();
                if patience.is_none() {
                    world.wrong(format!("{who}: no answer"));
                }
            }
            Ok(Ok(Some((versions, is_hit)))) => {
                let took = world.dice.now() - begin;
                world.count(|counts| {
                    counts.reads += 1;
                    counts.hits[world.over.nth()] += u64::from(is_hit);
                    counts.longest[0] = counts.longest[0].max(if fate == Fate::Hangs { 0 } else { took });
                });
                // Of teams, the old code knows nothing.
                let things = [parent].into_iter().chain((kind == Kind::Value && process.is_new).then_some(TEAM));
                for thing in things.filter(|thing| versions[*thing] < floors[*thing]) {
                    world.wrong(format!("{who}: {} of {thing}, not {}", versions[thing], floors[thing]));
                }
            }
            Ok(Ok(None) | Err(_)) if fate.fails() => {}
            Ok(Ok(None) | Err(_)) => world.wrong(format!("{who}: failed")),
        }
    }

    async fn write(&self, process: &Arc<Process>, how: How, thing: usize, fate: Fate, patience: Option<u64>) {
        let world = &self.world;
        let _busy = Busy::new(process);
        let begin = world.dice.now();
        let bound = WRITE + if fate == Fate::Hangs { HANG } else { 0 };
        let rejects = matches!(world.mode, Mode::Reject | Mode::Fenced);
        let must_refuse = rejects && how == How::Request && world.is_out(process.slot);
        let within = Duration::from_millis(patience.unwrap_or(bound));
        let written = timeout(within, process.clone().write(how, thing, fate)).await;
        if process.is_dead.load(Ordering::SeqCst) {
            return;
        }
        let who = format!("process {} writes {thing} ({how:?}, {fate:?}, since {begin} ms)", process.slot);
        match written {
            Err(_) if patience.is_none() => world.wrong(format!("{who}: no answer")),
            Err(_) => {}
            Ok(Written::Refused) => {
                world.count(|counts| counts.refused += 1);
                let is_young = begin <= process.since + YOUNG;
                if !rejects || !(is_young || world.had_fault(process.slot, DELIVERED)) {
                    world.wrong(format!("{who}: refused"));
                }
            }
            Ok(Written::Ended { version, report }) => {
                if must_refuse {
                    world.wrong(format!("{who}: not refused"));
                }
                let undelivered = report.as_ref().is_some_and(|report| report.undelivered() > 0);
                let took = world.dice.now() - begin;
                world.count(|counts| {
                    counts.writes += 1;
                    counts.undelivered += u64::from(undelivered);
                    counts.longest[1] = counts.longest[1].max(if fate == Fate::Hangs { 0 } else { took });
                });
                let knows = thing != TEAM || process.is_new;
                if version > 0 && knows {
                    let own = &mut process.own.lock().unwrap()[thing];
                    *own = version.max(*own);
                    let is_fenced = world.mode == Mode::Fenced && how == How::Request;
                    world.acknowledged(thing, version, is_fenced, report.is_some() && !undelivered);
                }
            }
        }
    }

    async fn stop(&self, slot: usize) {
        let Some(process) = self.process(slot) else { return };
        process.is_stopping.store(true, Ordering::SeqCst);
        // Its server waits for its clients.
        while process.busy.load(Ordering::SeqCst) > 0 {
            sleep(Duration::from_millis(10)).await;
        }
        let drained = process.cache.drain(DRAIN).await;
        if process.is_dead.load(Ordering::SeqCst) {
            return;
        }
        self.check_delivered(&process, drained.undelivered, "has drained");
        process.is_dead.store(true, Ordering::SeqCst);
        self.fleet.lock().unwrap()[slot] = None;
    }

    fn check_delivered(&self, process: &Process, undelivered: usize, what: &str) {
        let (own, delivered) = (*process.own.lock().unwrap(), self.world.delivered());
        if undelivered == 0 && (0..THINGS).any(|thing| delivered[thing] < own[thing]) {
            self.world.wrong(format!("process {} {what}: {own:?} was written, {delivered:?} delivered", process.slot));
        }
    }

    /// When nothing is wrong any more.
    async fn settle(&self) {
        while (0..PROCESSES).any(|slot| self.world.had_fault(slot, DELIVERED)) {
            sleep(Duration::from_millis(100)).await;
        }
        if self.world.mode == Mode::Fenced {
            sleep(LEASE).await;
        }
        for process in (0..PROCESSES).filter_map(|slot| self.process(slot)) {
            // A client that has just hung up leaves the rest to the journal.
            let _ = timeout(Duration::from_millis(DELIVERED), async {
                while !process.cache.health().takes_invalidations() {
                    sleep(Duration::from_millis(10)).await;
                }
            })
            .await;
            self.check_delivered(&process, 0, "is at its end");
            for (kind, parent) in KINDS.into_iter().flat_map(|kind| (0..PARENTS).map(move |parent| (kind, parent))) {
                self.read(&process, kind, parent, Fate::Fine, None).await;
            }
        }
    }
}

/// A request under way.
struct Busy(Arc<Process>);

impl Busy {
    fn new(process: &Arc<Process>) -> Self {
        process.busy.fetch_add(1, Ordering::SeqCst);
        Self(process.clone())
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.busy.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The schedule of a seed that fails, made smaller, and what is wrong.
pub fn minimised(seed: u64, sabotage: Sabotage) -> (Plan, Vec<String>) {
    let cascades = cascades();
    let plan = Plan::new(seed).minimised(|plan| !run(plan, sabotage, &cascades).wrong.is_empty());
    let wrong = run(&plan, sabotage, &cascades).wrong;
    (plan, wrong)
}

/// Runs schedules on all cores, until one fails: the first of them.
pub fn search(seeds: std::ops::Range<u64>, sabotage: Sabotage) -> Result<Counts, u64> {
    let cascades = cascades();
    let (next, failed) = (AtomicU64::new(seeds.start), AtomicU64::new(u64::MAX));
    let total = Mutex::new(Counts::default());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let done = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut counts = Counts::default();
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end || failed.load(Ordering::Relaxed) < seed {
                        break;
                    }
                    let plan = Plan::new(seed);
                    if !sabotage.is_of(plan.over, plan.warms()) {
                        continue;
                    }
                    let ran = run(&plan, sabotage, &cascades);
                    counts.add(&ran.counts);
                    if !ran.wrong.is_empty() {
                        failed.fetch_min(seed, Ordering::Relaxed);
                    }
                    let done = done.fetch_add(1, Ordering::Relaxed) + 1;
                    if done.is_multiple_of(10_000) {
                        eprintln!("{done} schedules");
                    }
                }
                total.lock().unwrap().add(&counts);
            });
        }
    });
    match failed.into_inner() {
        u64::MAX => Ok(total.into_inner().unwrap()),
        seed => Err(seed),
    }
}
