//! What a write does before and after its handler: for HTTP and gRPC alike.

use std::{
    sync::Arc,
    task::{Context, Poll, ready},
};

use futures_util::FutureExt;
use http::{HeaderMap, HeaderName, HeaderValue};
use tokio::{runtime::Handle, task::JoinHandle};

use super::core::Core;
use crate::{catalog::Drops, engine::Invalidated, store::Fence};

const REPORT: HeaderName = HeaderName::from_static("cache-invalidated");

/// A write that has not begun, since the store cannot be told about it.
pub(super) struct Refused;

/// A write under way: what it will drop, and the fence around that.
pub(super) struct Writing {
    core: Arc<Core>,
    pub(super) drops: Drops,
    fence: Option<Fence>,
}

impl Writing {
    /// Whether a write may run at all.
    pub(super) fn check(core: &Core) -> Result<(), Refused> {
        if core.options.rejects && !core.engine.health().takes_invalidations() { Err(Refused) } else { Ok(()) }
    }

    /// Raises the fence that these types ask for.
    pub(super) async fn begin<'t>(
        core: &Arc<Core>,
        drops: Drops,
        types: impl Iterator<Item = &'t str>,
    ) -> Result<Self, Refused> {
        let fence = core.fence(types);
        if let Some(fence) = &fence
            && core.engine.fence(drops.clone(), fence).await.is_err()
            && core.options.rejects
        {
            return Err(Refused);
        }
        Ok(Self { core: core.clone(), drops, fence })
    }

    /// What is dropped once more, when its fence is down.
    pub(super) fn unfenced(core: &Arc<Core>, drops: Drops) -> Self {
        Self { core: core.clone(), drops, fence: None }
    }

    #[cfg(feature = "grpc")]
    pub(super) fn is_fenced(&self) -> bool {
        self.fence.is_some()
    }

    /// Drops everything, and lifts the fence.
    pub(super) async fn end(self) -> Invalidated {
        let report = self.core.drop_all(self.drops, self.fence.as_ref()).await;
        tracing::debug!(%report, "invalidated");
        report
    }

    /// Nothing was changed; but a fence is up.
    pub(super) async fn cancel(self) {
        if self.fence.is_some() {
            self.core.drop_all(self.drops, self.fence.as_ref()).await;
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
pub(super) struct Due {
    armed: Option<(Writing, Handle)>,
    /// In a task, so that it comes to its end in any case.
    running: Option<JoinHandle<Invalidated>>,
}

impl Due {
    pub(super) fn arm(writing: Writing) -> Self {
        Self { armed: Some((writing, Handle::current())), running: None }
    }

    pub(super) fn is_done(&self) -> bool {
        self.armed.is_none() && self.running.is_none()
    }

    #[cfg(feature = "grpc")]
    pub(super) fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// There is nothing to invalidate after all.
    #[cfg(feature = "grpc")]
    pub(super) fn disarm(&mut self) {
        self.armed = None;
    }

    /// Starts it, if that has not been done.
    pub(super) fn fire(&mut self) {
        if let Some((writing, runtime)) = self.armed.take() {
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
