//! What a write does before and after its handler: for HTTP and gRPC alike.

use std::{
    sync::Arc,
    task::{Context, Poll, ready},
};

use futures_util::FutureExt;
use http::{HeaderMap, HeaderName, HeaderValue};
use tokio::{runtime::Handle, task::JoinHandle};

use super::{
    changes::{Changes, Said},
    core::Core,
};
use crate::{
    catalog::{Change, Drops},
    engine::Invalidated,
    key::Tenant,
    store::Fence,
};

const REPORT: HeaderName = HeaderName::from_static("cache-invalidated");

/// A write that has not begun, since the store cannot be told about it.
pub(super) struct Refused;

/// A write under way: whose it is, what it will drop, what its handler says, and the fence around that.
pub(crate) struct Writing {
    pub(super) core: Arc<Core>,
    pub(super) tenants: Arc<[Tenant]>,
    pub(super) changes: Changes,
    drops: Drops,
    fence: Option<Fence>,
}

impl Writing {
    pub(crate) fn new(core: &Arc<Core>, tenants: Arc<[Tenant]>, changes: Changes) -> Self {
        Self { core: core.clone(), tenants, changes, drops: Drops::default(), fence: None }
    }

    /// Before the handler runs: adds what is known to be stale after it, for it may remove the rows that name the children;
    /// raises the fence that these types ask for; or refuses, where the store must be told and cannot be.
    pub(super) async fn begin<'t>(
        &mut self,
        change: &Change,
        types: impl Iterator<Item = &'t str>,
    ) -> Result<(), Refused> {
        let core = self.core.clone();
        if core.options.rejects && !core.engine.health().takes_invalidations() {
            return Err(Refused);
        }
        self.add(change).await;
        self.fence = core.fence(types);
        let Some(fence) = &self.fence else { return Ok(()) };
        let raised = core.engine.fence(self.drops.clone(), fence).await;
        if raised.is_err() && core.options.rejects { Err(Refused) } else { Ok(()) }
    }

    /// Adds what a change drops, as the relations are now.
    pub(super) async fn add(&mut self, change: &Change) {
        self.core.add_change(&mut self.drops, &self.tenants, change).await;
    }

    /// Adds what the handler said. What nobody can read is everything.
    pub(super) async fn add_said(&mut self, said: &Said) {
        if said.is_empty() {
            return;
        }
        if let Err(error) = self.core.check_change("changes", &said.change) {
            if self.core.warnings.is_new("changes", &error.to_string()) {
                tracing::warn!(%error, "dropping everything of the tenant, for the handler says what nobody knows");
            }
            return self.add(&self.core.everything()).await;
        }
        self.add(&said.change).await;
    }

    #[cfg(feature = "grpc")]
    pub(super) fn is_fenced(&self) -> bool {
        self.fence.is_some()
    }

    /// Whether anything is to be dropped so far.
    pub(super) fn drops_nothing(&self) -> bool {
        self.drops.groups.is_empty()
    }

    /// Whether there is nothing to do, as far as the handler has said.
    pub(super) fn is_idle(&self) -> bool {
        self.drops_nothing() && self.changes.is_empty()
    }

    /// The same once more, without the fence.
    pub(super) fn again(&self) -> Self {
        Self {
            core: self.core.clone(),
            tenants: self.tenants.clone(),
            changes: self.changes.clone(),
            drops: self.drops.clone(),
            fence: None,
        }
    }

    /// Drops everything, what the handler has said since included, and lifts the fence.
    pub(crate) async fn end(mut self) -> Invalidated {
        let said = self.changes.take();
        self.add_said(&said).await;
        if self.drops_nothing() {
            return Invalidated::default();
        }
        let report = self.core.drop_all(self.drops, self.fence.as_ref()).await;
        tracing::debug!(%report, "invalidated");
        report
    }

    /// Of what is known, nothing was changed; but a fence is up.
    pub(super) async fn cancel(&mut self) {
        let drops = std::mem::take(&mut self.drops);
        if let Some(fence) = self.fence.take() {
            self.core.lift(drops, &fence).await;
        }
    }

    /// Puts the report into the headers (or trailers) of the response, if it is wanted there.
    pub(super) fn report(core: &Core, report: &Invalidated, headers: &mut HeaderMap) {
        if let (true, Ok(value)) = (core.options.report_header, HeaderValue::try_from(report.to_string())) {
            headers.insert(REPORT, value);
        }
    }
}

/// An invalidation that is due when a response body is over. Dropped before, it runs all the same.
#[derive(Default)]
pub(crate) struct Due {
    armed: Option<(Writing, Handle)>,
    /// In a task, so that it comes to its end in any case.
    running: Option<JoinHandle<Invalidated>>,
}

impl Due {
    pub(crate) fn arm(writing: Writing) -> Self {
        Self { armed: Some((writing, Handle::current())), running: None }
    }

    pub(super) fn is_done(&self) -> bool {
        self.armed.is_none() && self.running.is_none()
    }

    #[cfg(feature = "grpc")]
    pub(super) fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// What is due.
    #[cfg(feature = "grpc")]
    pub(super) fn writing(&self) -> Option<&Writing> {
        self.armed.as_ref().map(|(writing, _)| writing)
    }

    /// It is run by somebody else.
    pub(crate) fn take(&mut self) -> Option<Writing> {
        self.armed.take().map(|(writing, _)| writing)
    }

    /// Starts it, if that has not been done.
    pub(super) fn fire(&mut self) {
        if let Some((writing, runtime)) = self.armed.take().filter(|(writing, _)| !writing.is_idle()) {
            let engine = writing.core.engine.clone();
            self.running = Some(engine.spawn_on(writing.end(), &runtime));
        }
    }

    /// Until it has run, if it was started; the report of one that has just come to its end.
    pub(super) fn poll_done(&mut self, cx: &mut Context<'_>) -> Poll<Option<Invalidated>> {
        let Some(task) = &mut self.running else { return Poll::Ready(None) };
        // A task that failed was cancelled by a runtime that shuts down.
        let report = ready!(task.poll_unpin(cx)).ok();
        self.running = None;
        Poll::Ready(report)
    }
}

impl Drop for Due {
    fn drop(&mut self) {
        self.fire();
    }
}
