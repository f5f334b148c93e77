//! Events from a source that is followed: what they make stale is dropped, and acknowledged then.
//!
//! | it gives | what is done | if the store does not acknowledge it |
//! | --- | --- | --- |
//! | events | what they make stale is dropped | again and again, until it does |
//! | early events | it is fenced until their changes are visible, and dropped then | the same |
//! | a gap | everything is dropped; until a new proof nothing is proven | the same |
//! | a proof | the lag is counted from it | |
//! | an error, nothing for half a minute | it is asked again after a while | |

use std::{
    fmt,
    panic::AssertUnwindSafe,
    sync::{Arc, Weak},
    time::Duration,
};

use futures_util::FutureExt;
use tokio::{
    runtime::Handle,
    task::JoinHandle,
    time::{sleep, timeout},
};

use super::{Cache, applied::Planned};
use crate::{
    error::ConfigError,
    events::{Batch, Became, Event, EventSource, Followed, Notes, Received},
    layer::{Blame, By, Core},
    store::Fence,
};

/// A source that says nothing for so long is asked anew.
const SILENCE: Duration = Duration::from_secs(30);

/// How long is waited after an error, the first time and at most.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// How long what is not visible yet is fenced, where nothing longer is said; the fence is raised again while it is not.
const LEASE: Duration = Duration::from_secs(10);

/// Values of events that are applied at once, about.
const AT_ONCE: usize = 5_000;

/// A source that is [followed](Cache::follow). It is followed for as long as there is the cache, also when this is dropped.
#[derive(Debug)]
pub struct Following(JoinHandle<()>);

impl Following {
    /// Follows it no longer, and waits until it is gone: what was given and not acknowledged is for others. Types with a
    /// [`max_lag`](crate::DataType::max_lag) bypass the cache from then on.
    pub async fn stop(self) {
        self.0.abort();
        let _ = self.0.await;
    }
}

impl Cache {
    /// Drops what the source's events make stale, by the [policies](crate::CacheBuilder::event) that read them, from now on and until
    /// the cache is dropped; acknowledges each when the store has acknowledged that. Errors are logged and tried again, and show in
    /// `Cache::stats` (feature `stats`). Within a runtime.
    ///
    /// While it is not known for a type's [`max_lag`](crate::DataType::max_lag) that everything was read, the type's requests go to the
    /// inner service.
    ///
    /// # Errors
    /// No policy reads any event; a source of this name is followed already; there is no runtime.
    pub fn follow(&self, source: impl EventSource) -> Result<Following, ConfigError> {
        let core = &self.0;
        let what = format!("event source `{}`", source.name());
        if core.events.is_empty() {
            let mend = "nothing says what an event makes stale; declare policies (`CacheBuilder::event`, `[[events]]`)";
            return Err(ConfigError::new(format!("{what}: {mend}")));
        }
        let runtime = Handle::try_current().map_err(|_| {
            ConfigError::new(format!("{what}: there is no runtime to follow it in; call `follow` within one"))
        })?;
        let state = core.sources.add(source.name());
        let state =
            state.ok_or_else(|| ConfigError::new(format!("{what} is followed already; name one of them otherwise")))?;
        let follower = Follower { core: Arc::downgrade(core), state, pause: PAUSES.0, begins: true };
        let notes =
            Notes { store: core.engine.store(), name: format!("{}{{*}}:{}", core.space.service(), source.name()) };
        Ok(Following(runtime.spawn(follower.run(source, notes))))
    }
}

/// The cache is gone.
struct Gone;

/// It goes on until then.
enum Never {}

struct Follower {
    core: Weak<Core>,
    state: Arc<Followed>,
    /// How long is waited after the next error.
    pause: Duration,
    /// It has given nothing yet.
    begins: bool,
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.state.end();
        self.state.trouble(Some("it is not followed any more".to_owned()));
    }
}

impl Follower {
    async fn run(mut self, mut source: impl EventSource, notes: Notes) {
        let followed = AssertUnwindSafe(self.follow(&mut source, notes)).catch_unwind().await;
        if followed.is_err() {
            tracing::error!(source = self.state.name, "an event source panicked, and is not followed any more");
        }
    }

    async fn follow(&mut self, source: &mut impl EventSource, notes: Notes) -> Result<Never, Gone> {
        source.start(notes);
        loop {
            match timeout(SILENCE, source.next()).await {
                Ok(Ok(Received::Proof(at))) => {
                    self.works();
                    self.state.prove(at);
                    continue;
                }
                Ok(Ok(Received::Events(batch))) => self.take(batch, source).await?,
                Ok(Ok(Received::Gap(why))) => self.drop_everything(&why).await?,
                Ok(Err(error)) => {
                    self.fails(&error).await?;
                    continue;
                }
                Err(_) => {
                    self.fails(&format!("it says nothing for {SILENCE:?}")).await?;
                    continue;
                }
            }
            if let Err(error) = source.ack().await {
                self.fails(&error).await?;
            }
        }
    }

    fn core(&self) -> Result<Arc<Core>, Gone> {
        self.core.upgrade().ok_or(Gone)
    }

    /// What was wrong is over.
    fn works(&mut self) {
        self.begins = false;
        self.pause = PAUSES.0;
        if self.state.trouble(None) {
            tracing::info!(source = self.state.name, "the event source is well again");
        }
    }

    /// Says what is wrong when that begins, and waits for a while.
    async fn fails(&mut self, why: &impl fmt::Display) -> Result<(), Gone> {
        self.core()?;
        let why = why.to_string();
        if self.state.trouble(Some(why.clone())) {
            tracing::warn!(source = self.state.name, why, "an event source fails, and is asked again");
        }
        sleep(self.pause.mul_f64(0.5 + rand::random::<f64>() / 2.0)).await;
        self.pause = (2 * self.pause).min(PAUSES.1);
        Ok(())
    }

    /// Drops what a batch makes stale, and returns when the store has acknowledged it.
    async fn take(&mut self, batch: Batch, source: &mut impl EventSource) -> Result<(), Gone> {
        self.begins = false;
        let Batch { events, early, unreadable } = batch;
        for why in &unreadable {
            if self.core()?.warnings.is_new("events", why) {
                tracing::warn!(source = self.state.name, why, "what should be an event is none, and is skipped");
            }
        }
        self.state.count(Became::Unreadable, unreadable.len());
        let fenced = if early { Some(self.fenced(&events, source).await?) } else { None };
        let mut events = &events[..];
        while !events.is_empty() {
            let mut values = 0;
            let mut fits = |event: &Event| {
                values += event.size();
                values <= AT_ONCE
            };
            let (some, rest) = events.split_at(events.iter().take_while(|event| fits(event)).count().max(1));
            self.apply(some, fenced.as_ref().filter(|_| rest.is_empty())).await?;
            events = rest;
        }
        Ok(())
    }

    /// Applies events until the store acknowledges it. With the last of a batch that was fenced, the fence is lifted.
    async fn apply(&mut self, events: &[Event], fenced: Option<&(Planned, Fence)>) -> Result<(), Gone> {
        loop {
            let core = self.core()?;
            let planned = Planned::new(&core, events).await;
            let (planned, fence) = match fenced {
                Some((before, fence)) => (planned.with(before), Some(fence.clone())),
                None => {
                    let fence = planned.fence(&core);
                    (planned, fence)
                }
            };
            let applied = planned.apply(&core, fence.as_ref()).await;
            drop(core);
            if applied.dropped.undelivered() == 0 {
                let (ignored, refused) = (applied.ignored, applied.refused.len());
                let counts = [events.len() - ignored - refused, ignored, refused];
                for (what, more) in [Became::Applied, Became::Ignored, Became::Refused].into_iter().zip(counts) {
                    self.state.count(what, more);
                }
                return Ok(());
            }
            self.fails(&"the store does not acknowledge what events drop").await?;
        }
    }

    /// Fences what early events make stale until their changes are visible. What was fenced is to be dropped with the fence.
    async fn fenced(&mut self, events: &[Event], source: &mut impl EventSource) -> Result<(Planned, Fence), Gone> {
        let core = self.core()?;
        let planned = Planned::new(&core, events).await;
        let mut fence = planned.fence(&core).unwrap_or_else(|| Fence::new(LEASE, Duration::ZERO));
        fence.lease = fence.lease.max(LEASE);
        drop(core);
        loop {
            // Raised again before its lease ends: who reads meanwhile may still see what was before.
            let raised = self.core()?.engine.fence(planned.drops().clone(), &fence).await;
            let waited = match raised {
                Ok(()) => timeout(fence.lease / 3, source.visible()).await,
                Err(error) => Ok(Err(error.into())),
            };
            match waited {
                Ok(Ok(())) => return Ok((planned, fence)),
                Ok(Err(error)) => self.fails(&error).await?,
                Err(_) => {}
            }
        }
    }

    /// Events may have been missed: everything falls.
    async fn drop_everything(&mut self, why: &str) -> Result<(), Gone> {
        self.state.lose();
        self.state.count(Became::Gap, 1);
        match std::mem::take(&mut self.begins) {
            // Nothing was missed that was promised.
            true => tracing::info!(source = self.state.name, why, "followed from now on: everything is dropped"),
            false => {
                tracing::warn!(source = self.state.name, why, "events may have been missed: everything is dropped")
            }
        }
        // Who starts is not connected yet; and while the store is down nothing is read from it.
        while !self.core()?.engine.health().takes_invalidations() {
            self.state.trouble(Some("the store is down, and cannot be told of a gap".to_owned()));
            sleep(PAUSES.0).await;
        }
        self.clear().await?;
        // And once more when replicas have heard of what was missed: what is stored meanwhile may be from before.
        let hold = self.core()?.longest_hold();
        if !hold.is_zero() {
            sleep(hold).await;
            self.clear().await?;
        }
        Ok(())
    }

    async fn clear(&mut self) -> Result<(), Gone> {
        let what = format!("gap in {}", self.state.name);
        loop {
            let cleared = self.core()?.clear(&Blame { by: By::Event, what: &what, tenant: None }).await;
            match cleared {
                Ok(()) => return Ok(()),
                Err(error) => self.fails(&error).await?,
            }
        }
    }
}
