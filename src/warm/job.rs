//! The job: asks what is due, and learns when that is again.

use std::{
    future::poll_fn,
    panic::AssertUnwindSafe,
    path::Path,
    pin::{Pin, pin},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use bytes::Bytes;
use futures_util::FutureExt;
use http::{HeaderName, Request, Response};
use http_body::Body;
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval, sleep_until, timeout},
};
use tower_service::Service;

use super::{
    list::{CAUSES, Cause, List, Listed, Place},
    options::Warm,
};
use crate::{
    clock::Millis,
    layer::{Core, Replay, Sampler, Sighting, Warmup},
    observe::{Handling, Outcome},
    store::Store,
};

/// How often is looked for what is due, and ranked anew.
const LOOKS: Duration = Duration::from_millis(100);
const RANKS: Duration = Duration::from_secs(2);

pub(super) const MINUTE: Duration = Duration::from_secs(60);

/// Nothing is asked for longer.
const PATIENCE: Duration = Duration::from_secs(30);

/// Whether it is still there is asked so often: another process may have dropped it.
const CHECKS: Duration = Duration::from_secs(30);

/// After a load it is asked when that ends.
const SOON: Duration = Duration::from_secs(1);

/// So many failures in a row stop it for so long.
const FAILURES: u32 = 3;
const STOPPED: Duration = Duration::from_secs(30);

/// How many are shown.
const SHOWN: usize = 20;

/// The format of the list, and how large it may be.
const VERSION: u8 = 1;
const LARGEST: usize = 900 << 10;

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What came of a request.
#[derive(Clone, Copy, Debug)]
pub(super) enum Answer {
    /// It was there, for so many seconds more.
    There(Option<i64>),
    /// The inner service was called; and whether what it said was stored.
    Loaded { is_ok: bool, kept: bool, took: Duration },
    /// Another request had it called.
    Shared,
    /// The cache keeps out of it.
    Nothing,
}

pub(super) type Asking = Pin<Box<dyn Future<Output = Answer> + Send>>;

/// Asks a request again.
pub(super) type Asks = Arc<dyn Fn(Replay, Millis) -> Asking + Send + Sync>;

/// How a service is asked.
pub(super) fn asker<S, B, R, F>(service: S, body: F) -> Asks
where
    S: Service<Request<B>, Response = Response<R>> + Clone + Send + 'static,
    S::Future: Send,
    F: Fn(Bytes) -> B + Send + Sync + 'static,
    B: Send + 'static,
    R: Body<Data: Send> + Send + 'static,
{
    // Shared by requests, and cloned by each: it need not be Sync.
    let service = Mutex::new(service);
    Arc::new(move |replay, ahead| {
        let service = locked(&service).clone();
        let request = replay.request(body(replay.body.clone().unwrap_or_default().into()));
        Box::pin(async move {
            let Some(mut request) = request else { return Answer::Nothing };
            request.extensions_mut().insert(Warmup { ahead });
            let failed = Answer::Loaded { is_ok: false, kept: false, took: PATIENCE };
            // A handler may panic.
            let asking = AssertUnwindSafe(timeout(PATIENCE, ask(service, request))).catch_unwind();
            asking.await.map_or(failed, |asked| asked.unwrap_or(failed))
        })
    })
}

async fn ask<S, B, R>(mut service: S, request: Request<B>) -> Answer
where
    S: Service<Request<B>, Response = Response<R>>,
    R: Body,
{
    let start = Instant::now();
    let failed = |took| Answer::Loaded { is_ok: false, kept: false, took };
    if poll_fn(|cx| service.poll_ready(cx)).await.is_err() {
        return failed(start.elapsed());
    }
    let Ok(response) = service.call(request).await else { return failed(start.elapsed()) };
    let (parts, body) = response.into_parts();
    // What is not read to its end is not stored.
    let mut body = pin!(body);
    while let Some(Ok(_)) = poll_fn(|cx| body.as_mut().poll_frame(cx)).await {}
    let took = start.elapsed();
    let is_ok = !parts.status.is_server_error();
    match parts.extensions.get::<Outcome>() {
        Some(outcome) => match outcome.outcome {
            Handling::Hit => Answer::There(outcome.served.ttl),
            Handling::Miss => Answer::Loaded { is_ok, kept: outcome.served.kept, took },
            // What is stale is served here only where the inner service fails.
            Handling::Stale => failed(took),
            Handling::Coalesced => Answer::Shared,
            Handling::Bypass => Answer::Nothing,
        },
        None => Answer::Nothing,
    }
}

/// How many are asked at once: fewer while the inner service is slower than it was.
#[derive(Debug)]
struct Pace {
    most: usize,
    now: usize,
    /// Seconds that a load takes, of late and usually.
    late: f64,
    usual: f64,
    failures: u32,
    stopped: Option<Instant>,
}

impl Pace {
    fn new(most: usize) -> Self {
        Self { most, now: most, late: 0.0, usual: 0.0, failures: 0, stopped: None }
    }

    fn loaded(&mut self, is_ok: bool, took: Duration, now: Instant) {
        if !is_ok {
            self.failures += 1;
            if self.failures >= FAILURES {
                (self.failures, self.stopped) = (0, Some(now + STOPPED));
            }
            return;
        }
        self.failures = 0;
        let took = took.as_secs_f64().max(1e-6);
        if self.usual == 0.0 {
            (self.late, self.usual) = (took, took);
        }
        self.late += 0.3 * (took - self.late);
        if self.late > 2.0 * self.usual {
            self.now = (self.now / 2).max(1);
            // What stays slow becomes usual, in the long run.
            self.usual *= 1.01;
        } else {
            self.usual += 0.05 * (took - self.usual);
            self.now = (self.now + 1).min(self.most);
        }
    }

    /// How many may be asked at once now.
    fn allows(&mut self, now: Instant) -> usize {
        self.stopped = self.stopped.filter(|until| *until > now);
        if self.stopped.is_some() { 0 } else { self.now }
    }
}

/// What the job is told.
pub(super) enum Command {
    /// Writes the list down.
    Save(oneshot::Sender<()>),
    Stop,
}

/// Whatever ended the job: nobody waits for it.
struct Ended(Weak<Core>);

impl Drop for Ended {
    fn drop(&mut self) {
        if let Some(core) = self.0.upgrade()
            && let Some(Sampler { state, .. }) = core.sampler.get()
        {
            state.warmed.send_replace(true);
        }
    }
}

pub(super) struct Job {
    core: Weak<Core>,
    warm: Warm,
    asks: Asks,
    list: List,
    pace: Pace,
    /// Calls that are left in this minute.
    budget: u32,
    asking: JoinSet<(Place, Cause, Answer)>,
    /// What is left of what was popular before.
    before: usize,
    _ended: Ended,
}

impl Job {
    pub(super) fn new(core: Weak<Core>, warm: Warm, asks: Asks) -> Self {
        let (pace, budget, ended) = (Pace::new(warm.concurrency), warm.budget, Ended(core.clone()));
        Self { _ended: ended, core, warm, asks, list: List::default(), pace, budget, asking: JoinSet::new(), before: 0 }
    }

    /// Until the cache is gone.
    pub(super) async fn run(mut self, mut sightings: mpsc::Receiver<Sighting>, mut commands: mpsc::Receiver<Command>) {
        let every = |period| {
            let mut every = interval(period);
            every.set_missed_tick_behavior(MissedTickBehavior::Delay);
            every
        };
        self.begin().await;
        let ready = Instant::now() + MINUTE;
        let (mut looks, mut ranks) = (every(LOOKS), every(RANKS));
        let (mut minutes, mut saves) = (every(MINUTE), every(self.warm.saves));
        saves.reset();
        minutes.reset();
        loop {
            tokio::select! {
                // In an order that simulations can repeat; what may come without end comes last.
                biased;
                _ = looks.tick() => {}
                _ = ranks.tick() => {
                    self.list.rank(self.warm.requests, Instant::now());
                    self.show();
                }
                _ = minutes.tick() => {
                    self.budget = self.warm.budget;
                    self.list.fade();
                }
                _ = saves.tick() => self.save().await,
                Some(command) = commands.recv() => match command {
                    Command::Stop => return,
                    Command::Save(done) => {
                        self.save().await;
                        let _ = done.send(());
                    }
                },
                () = sleep_until(ready), if self.before > 0 => self.before = 0,
                Some(Ok((place, cause, answer))) = self.asking.join_next() => self.answered(&place, cause, answer),
                Some(sighting) = sightings.recv() => self.sighted(sighting),
            }
            let Some(core) = self.core.upgrade() else { return };
            self.ask();
            self.tell(&core);
        }
    }

    fn sighted(&mut self, sighting: Sighting) {
        match sighting {
            Sighting::Asked(seen) => self.list.seen(*seen),
            Sighting::Dropped(tags) => self.list.dropped(Some(&tags), Instant::now()),
            Sighting::Cleared => self.list.dropped(None, Instant::now()),
        }
    }

    /// Asks what is due, as far as pace and budget allow.
    fn ask(&mut self) {
        let now = Instant::now();
        while self.asking.len() < self.pace.allows(now) && self.budget > 0 {
            let Some((place, cause, replay)) = self.list.due(now) else { return };
            self.budget -= 1;
            let ahead = u64::try_from(self.warm.ahead.as_millis()).unwrap_or(u64::MAX);
            let asking = (self.asks)(replay, ahead);
            self.asking.spawn(async move { (place, cause, asking.await) });
        }
    }

    fn answered(&mut self, place: &Place, cause: Cause, answer: Answer) {
        let now = Instant::now();
        let again = match answer {
            Answer::There(None) => CHECKS,
            Answer::There(Some(left)) => {
                let left = Duration::from_secs(u64::try_from(left).unwrap_or_default());
                left.saturating_sub(self.warm.ahead).clamp(SOON, CHECKS)
            }
            Answer::Loaded { is_ok: true, .. } | Answer::Shared => SOON,
            Answer::Loaded { is_ok: false, .. } => CHECKS,
            Answer::Nothing => MINUTE,
        };
        match answer {
            Answer::Loaded { is_ok: true, kept: false, .. } => self.list.in_vain(place, now),
            _ => self.list.done(place, again, now),
        }
        if cause == Cause::Start {
            self.before = self.before.saturating_sub(1);
        }
        let Answer::Loaded { is_ok, took, .. } = answer else {
            // The inner service was not called. (Where the cache keeps out of it, it was.)
            let back = u32::from(!matches!(answer, Answer::Nothing));
            self.budget = (self.budget + back).min(self.warm.budget);
            return;
        };
        self.pace.loaded(is_ok, took, now);
        if self.pace.stopped.is_some() {
            self.before = 0;
        }
        // What was asked before it ended, and was gone, was not about to end.
        if let Some(core) = self.core.upgrade().filter(|_| is_ok)
            && let Some(sampler) = core.sampler.get()
        {
            let name = CAUSES.iter().find(|(known, _)| *known == cause).map_or("", |(_, name)| name);
            *locked(&sampler.state.loaded).entry(name).or_default() += 1;
        }
    }

    fn tell(&self, core: &Core) {
        let Some(Sampler { state, .. }) = core.sampler.get() else { return };
        if self.before == 0 && !*state.warmed.borrow() {
            state.warmed.send_replace(true);
        }
    }

    /// For those who look on.
    fn show(&self) {
        if let Some(core) = self.core.upgrade()
            && let Some(Sampler { state, .. }) = core.sampler.get()
        {
            *locked(&state.popular) = self.list.first(SHOWN);
        }
    }

    /// What was popular before.
    async fn begin(&mut self) {
        let listed = self.read().await;
        let now = Instant::now();
        for one in listed {
            self.list.adopt(one, Some(now));
        }
        self.list.rank(self.warm.requests, now);
        self.before = self.list.listed().len();
        tracing::debug!(requests = self.before, "popular requests are loaded");
    }

    /// Writes it down, with what others have written.
    async fn save(&mut self) {
        for one in self.read().await {
            self.list.adopt(Listed { score: one.score / 2.0, ..one }, None);
        }
        self.list.rank(self.warm.requests, Instant::now());
        let mut listed = self.list.listed();
        let bytes = loop {
            let Ok(bytes) = rmp_serde::to_vec(&(VERSION, &listed)) else { return };
            if bytes.len() <= LARGEST {
                break bytes;
            }
            listed.truncate(listed.len() / 2);
        };
        if let Err(error) = self.write(bytes).await {
            let core = self.core.upgrade();
            match core.is_some_and(|core| core.warnings.is_new("warm", "list")) {
                true => tracing::warn!(error, "the list of what is popular is not written: a restart begins cold"),
                false => tracing::debug!(error, "the list of what is popular is not written"),
            }
        }
    }

    /// In the store: the fleet's.
    fn place(&self) -> Option<(Arc<dyn Store>, String)> {
        let core = self.core.upgrade()?;
        Some((core.engine.store(), format!("{}{{*}}:popular", core.space.service())))
    }

    async fn write(&self, bytes: Vec<u8>) -> Result<(), String> {
        if let Some(path) = self.warm.file.clone() {
            let written = tokio::task::spawn_blocking(move || replace(&path, &bytes)).await;
            return written.map_err(|error| error.to_string())?.map_err(|error| error.to_string());
        }
        let Some((store, name)) = self.place() else { return Ok(()) };
        store.note(&name, &bytes).await.map_err(|error| error.to_string())
    }

    /// What was written, as far as it makes sense: it comes from elsewhere.
    async fn read(&self) -> Vec<Listed> {
        let bytes = match self.warm.file.clone() {
            Some(path) => tokio::task::spawn_blocking(move || std::fs::read(path)).await.ok().and_then(Result::ok),
            None => match self.place() {
                Some((store, name)) => store.noted(&name).await.ok().flatten(),
                None => None,
            },
        };
        let Some((VERSION, mut listed)) =
            bytes.and_then(|bytes| rmp_serde::from_slice::<(u8, Vec<Listed>)>(&bytes).ok())
        else {
            return vec![];
        };
        let Some(core) = self.core.upgrade() else { return vec![] };
        listed.retain(|one| is_harmless(&core, &one.replay));
        listed.truncate(self.warm.requests);
        listed
    }
}

/// Whether it is a read that anybody in the tenant may ask.
fn is_harmless(core: &Core, replay: &Replay) -> bool {
    let Some(request) = replay.request(()) else { return false };
    let is_private =
        |name: &HeaderName| core.identity.is_credential(name) && core.tenants.named_by().is_none_or(|own| own != name);
    core.reads(&request) && !request.headers().keys().any(is_private)
}

/// A file is there whole, or as it was.
fn replace(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!(".{:08x}", rand::random::<u32>()));
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create(true).truncate(true);
    // It says who asks what.
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    std::io::Write::write_all(&mut options.open(&beside)?, bytes)?;
    std::fs::rename(&beside, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_pace_is_halved_while_it_is_slow_and_stopped_when_it_fails() {
        let (mut pace, now) = (Pace::new(4), Instant::now());
        let ms = Duration::from_millis;
        (0..50).for_each(|_| pace.loaded(true, ms(10), now));
        assert_eq!(pace.allows(now), 4);
        (0..3).for_each(|_| pace.loaded(true, ms(40), now));
        assert!(pace.allows(now) <= 2);
        (0..20).for_each(|_| pace.loaded(true, ms(10), now));
        assert_eq!(pace.allows(now), 4);
        (0..FAILURES).for_each(|_| pace.loaded(false, ms(1), now));
        assert_eq!(pace.allows(now), 0);
        assert_eq!(pace.allows(now + STOPPED), 4);
    }
}
