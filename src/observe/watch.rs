//! From a request to what is counted of it. Without the feature `stats` it is `unwatched.rs` instead: the same, for nothing.

use std::{
    borrow::Cow,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use http::Extensions;
use http_body::SizeHint;

use super::{
    counts::{Counts, Timer},
    observer::{Observer, TenantSlot, now},
    outcome::{FoundIn, Handling, Outcome, Served},
    recent::{What, name_of, shortened},
};

/// What counts for one data type.
#[derive(Debug)]
pub(crate) struct Watcher {
    data_type: Arc<str>,
    /// And its number among the types.
    counts: Option<(Arc<Counts>, usize)>,
    observer: Arc<Observer>,
}

/// A request that was not answered on the spot. It is counted when it has its response; and as it is dropped, if it gets none.
pub(crate) struct Watch(Option<Under>);

/// What is under way.
struct Under {
    /// What it is if it has no response: why the cache keeps out of it, if it does.
    bypass: Option<&'static str>,
    watcher: Arc<Watcher>,
    began: Instant,
    tenant: Option<TenantSlot>,
    /// For those who look on.
    note: Option<Box<Note>>,
}

struct Note {
    path: String,
    tenant: Option<String>,
}

impl Watcher {
    pub(super) fn new(observer: &Arc<Observer>, data_type: &str) -> Self {
        Self { data_type: data_type.into(), counts: observer.counts(data_type), observer: observer.clone() }
    }

    /// A hit in this process.
    pub(crate) fn hit<'t>(&self, timer: Timer, outcome: &Outcome, tenant: impl FnOnce() -> Option<Cow<'t, [u8]>>) {
        let Self { counts, observer, .. } = self;
        let Some((counts, data_type)) = counts else { return };
        counts.hit(outcome, timer);
        if let Some(tenant) = tenant() {
            let slot = observer.tenant(&tenant);
            observer.of_tenant(slot).hit(outcome, timer);
            if let Some(labelled) = observer.labelled(slot, *data_type) {
                labelled.add((outcome.outcome, outcome.outcome.usual()));
            }
        }
    }

    /// Begins to watch a request.
    pub(crate) fn watch<'t>(
        self: &Arc<Self>,
        timer: Timer,
        tenant: impl FnOnce() -> Option<Cow<'t, [u8]>>,
        path: impl FnOnce() -> Cow<'t, str>,
    ) -> Watch {
        let observer = &self.observer;
        let tenant = tenant();
        let note = observer.recent.is_watched().then(|| {
            let tenant = tenant.as_deref().map(name_of);
            Box::new(Note { path: shortened(&path()), tenant })
        });
        let tenant = tenant.map(|name| observer.tenant(&name));
        Watch(Some(Under { bypass: None, watcher: self.clone(), began: timer.began(), tenant, note }))
    }

    /// The inner service was called.
    pub(crate) fn loaded(&self, is_ok: bool, took: Duration) {
        if let Some((counts, _)) = &self.counts {
            counts.load(is_ok, took);
        }
    }

    /// A key was looked up in this process, and there or not.
    pub(crate) fn looked(&self, key: &[u8], is_hit: bool) {
        if let Some((_, data_type)) = &self.counts {
            self.observer.shadow.looked(key, *data_type, is_hit);
        }
    }

    /// Something that takes so much was stored under this key.
    pub(crate) fn kept(&self, key: &[u8], weight: usize) {
        if let Some((_, data_type)) = &self.counts {
            self.observer.shadow.stored(key, *data_type, weight as u64);
        }
    }

    /// A reload was another, though no write had dropped what was stored.
    pub(crate) fn drifted(&self, route: &str) {
        let Self { counts, observer, data_type } = self;
        if let Some((counts, _)) = counts {
            counts.drift.fetch_add(1, Relaxed);
        }
        if observer.drifted(data_type, route) {
            tracing::warn!(
                route,
                data_type = &**data_type,
                "drift: a reload differs from what was stored, and no write was told of: a mutation or events are missing"
            );
        }
    }

    /// Something of this size was stored.
    pub(crate) fn stored(&self, bytes: usize) {
        let Self { counts, observer, .. } = self;
        if let Some((counts, _)) = counts {
            counts.stored(bytes);
        }
        observer.large(&self.data_type, bytes as u64);
    }
}

impl Watch {
    /// The cache keeps out of it.
    pub(crate) fn bypassing(mut self, reason: &'static str) -> Self {
        if let Some(under) = &mut self.0 {
            under.bypass = Some(reason);
        }
        self
    }

    /// It is not answered yet, and somebody else watches it from when it began.
    pub(crate) fn hand_on(mut self) -> Timer {
        self.0.take().map_or_else(Timer::start, |under| Timer::since(under.began))
    }

    /// The request has its response, or the inner service's error.
    pub(crate) fn end(mut self, response: Option<(&Extensions, SizeHint)>) {
        let Some(under) = self.0.take() else { return };
        let outcome = response.and_then(|(extensions, size)| Some((extensions.get()?, size)));
        let Some((Outcome { outcome, reason, tier, served, .. }, size)) = outcome else {
            return under.unanswered("error");
        };
        let Served { bytes, .. } = *served;
        // What comes from the inner service says how long it is, or does not know.
        let bytes = if bytes == 0 { size.exact().unwrap_or_default() } else { bytes };
        under.count((*outcome, *reason), *tier, Served { bytes, ..*served });
    }

    /// The same, of what is no response.
    pub(crate) fn finish(mut self, why: (Handling, Option<&'static str>), tier: Option<FoundIn>, served: Served) {
        self.0.take().into_iter().for_each(|under| under.count(why, tier, served));
    }
}

impl Drop for Watch {
    /// Its client has gone, or its handler has panicked.
    fn drop(&mut self) {
        if let Some(under) = self.0.take() {
            under.unanswered(if std::thread::panicking() { "error" } else { "cancelled" });
        }
    }
}

impl Under {
    fn unanswered(self, why: &'static str) {
        match self.bypass {
            Some(reason) => self.count((Handling::Bypass, Some(reason)), None, Served::default()),
            None => self.count((Handling::Miss, Some(why)), None, Served::default()),
        }
    }

    fn count(self, why: (Handling, Option<&'static str>), tier: Option<FoundIn>, served: Served) {
        let (handling, reason) = why;
        let Self { watcher, began, tenant, note, .. } = self;
        let Watcher { data_type, counts, observer } = &*watcher;
        let took = began.elapsed();
        if let (Some(slot), Some((_, data_type))) = (tenant, counts)
            && let Some(labelled) = observer.labelled(slot, *data_type)
        {
            labelled.add((handling, reason.unwrap_or(handling.usual())));
        }
        let tenant = tenant.map(|slot| observer.of_tenant(slot));
        if let Some(of_tenant) = tenant.filter(|_| handling == Handling::Miss) {
            // As its request saw it.
            of_tenant.load(reason != Some("error"), took);
        }
        for counts in counts.as_ref().map(|(counts, _)| &**counts).into_iter().chain(tenant) {
            counts.request(why, tier, took, served);
        }
        if let Some(note) = note.filter(|_| handling != Handling::Hit) {
            let Note { path, tenant } = *note;
            let ms = took.as_secs_f64() * 1_000.0;
            let data_type = data_type.to_string();
            observer.note(What::Miss { path, tenant, data_type, outcome: handling.as_str(), reason, ms });
        }
    }
}

impl Observer {
    /// Remembers a body that is larger than is thought good.
    fn large(&self, data_type: &str, bytes: u64) {
        if bytes > self.rules.entry_bytes {
            super::observer::locked(&self.raised).large(data_type, bytes, now());
        }
    }
}
