//! Where events come from.

use std::{error::Error as StdError, fmt, future::ready, pin::Pin, sync::Arc};

use tokio::time::Instant;

use super::Event;
use crate::store::{Store, StoreError};

/// A future returned by a source.
pub type SourceFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, SourceError>> + Send + 'a>>;

/// A stream of events with acknowledgement, which [`Cache::follow`](crate::Cache::follow) reads: a log, a queue, an outbox.
///
/// Events may come twice and in any order. What must not happen is that one is lost: whatever was given by [`next`](Self::next)
/// and not [acknowledged](Self::ack) is given again, also after an error or to another process, and where some may have been
/// missed, a [gap](Received::Gap) is given.
///
/// Each call is awaited before the next one is made. After an error of `next` or `ack` it is `next` that is called again, some
/// time later, and begins with what has not been acknowledged; after one of [`visible`](Self::visible) that is, until it succeeds.
pub trait EventSource: Send + 'static {
    /// What it is called in logs, metrics and the fleet's notes; unique among the sources of a service.
    fn name(&self) -> &str;

    /// Called once, before the first `next`, with the place where the fleet keeps what the source wants to remember: how far it has
    /// read.
    fn start(&mut self, notes: Notes) {
        let _ = notes;
    }

    /// Waits for what comes next. A call that is dropped half-way has lost nothing. It gives a [proof](Received::Proof) at least
    /// once a second while its source answers, also where another process of the fleet is the one that reads.
    fn next(&mut self) -> SourceFuture<'_, Received>;

    /// Completes when whoever reads from now on sees the changes of the [early](Batch::early) batch that was given last. It may be
    /// dropped half-way, or fail, and is called again, as what it is about stays fenced meanwhile.
    fn visible(&mut self) -> SourceFuture<'_, ()> {
        Box::pin(ready(Ok(())))
    }

    /// What was given last, events or a gap, has been dropped, and the store has acknowledged that.
    fn ack(&mut self) -> SourceFuture<'_, ()>;
}

/// What a source gives.
#[derive(Debug)]
#[non_exhaustive]
pub enum Received {
    /// Something has changed.
    Events(Batch),
    /// Events may have been missed, and why: everything is dropped.
    Gap(String),
    /// Everything that had changed at this time, by this process' clock, has been given, and acknowledged, by whichever process
    /// reads.
    Proof(Instant),
}

/// Events that are acknowledged together.
#[derive(Debug, Default)]
#[must_use]
pub struct Batch {
    pub(crate) events: Vec<Event>,
    pub(crate) early: bool,
    pub(crate) unreadable: Vec<String>,
}

impl Batch {
    /// These events, whose changes can be read by everybody.
    pub fn new(events: Vec<Event>) -> Self {
        Self { events, ..Self::default() }
    }

    /// Their changes may not be readable yet: what they make stale is fenced until they are
    /// [visible](EventSource::visible), and dropped then.
    pub fn early(mut self) -> Self {
        self.early = true;
        self
    }

    /// Something that should have been an event is none, and why, in words that are the same for all of the same kind. It is
    /// counted, logged once for each kind, and skipped.
    pub fn unreadable(mut self, why: impl Into<String>) -> Self {
        self.unreadable.push(why.into());
        self
    }

    /// The events, for tests of a source. (Feature `testing`.)
    #[cfg(feature = "testing")]
    pub fn events(&self) -> &[Event] {
        &self.events
    }

    /// Whether it is [early](Self::early). (Feature `testing`.)
    #[cfg(feature = "testing")]
    pub fn is_early(&self) -> bool {
        self.early
    }

    /// What was said of what is [unreadable](Self::unreadable), for tests of a source. (Feature `testing`.)
    #[cfg(feature = "testing")]
    pub fn reasons(&self) -> &[String] {
        &self.unreadable
    }
}

/// Where the fleet keeps what a source wants to remember: in the shared store, as long as that keeps it.
#[derive(Clone)]
pub struct Notes {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) name: String,
}

impl Notes {
    /// The service that they are of.
    #[cfg(feature = "redis")]
    pub(crate) fn service(&self) -> &str {
        self.name.split("{*}").next().unwrap_or_default()
    }

    /// Whether other processes see them, and the entries.
    #[cfg(feature = "redis")]
    pub(crate) fn are_shared(&self) -> bool {
        self.store.is_shared()
    }

    /// What was written last; `None` if nothing was, or it was lost.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn read(&self) -> Result<Option<Vec<u8>>, StoreError> {
        self.store.noted(&self.name).await
    }

    /// Writes it, instead of what was there.
    ///
    /// # Errors
    /// The store does not answer: it may have been written or not.
    pub async fn write(&self, note: &[u8]) -> Result<(), StoreError> {
        self.store.note(&self.name, note).await
    }
}

impl fmt::Debug for Notes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Notes").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Why a source could not do what it was asked.
#[derive(Debug)]
pub struct SourceError(Box<dyn StdError + Send + Sync>);

impl SourceError {
    /// For this reason.
    pub fn new(cause: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self(cause.into())
    }
}

impl fmt::Display for SourceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl StdError for SourceError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(&*self.0)
    }
}

impl From<StoreError> for SourceError {
    fn from(error: StoreError) -> Self {
        Self::new(error)
    }
}
