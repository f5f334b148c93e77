//! What a write does before and after its handler: for HTTP and gRPC alike.

use std::{
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures_util::FutureExt;
use http::{HeaderMap, HeaderName, HeaderValue};
use tokio::{runtime::Handle, task::JoinHandle, time::Instant};

use super::{
    changes::{Changes, Heard},
    core::{Blame, By, Core},
};
use crate::{
    catalog::{Change, Drops},
    engine::Invalidated,
    key::Tenant,
    route::OnUnmapped,
    store::Fence,
};

const REPORT: HeaderName = HeaderName::from_static("cache-invalidated");

/// As much of a path is said in warnings.
const MOST_PARTS: usize = 12;

/// A write that has not begun, since the store cannot be told about it.
pub(super) struct Refused;

/// A write under way: whose it is, what it will drop, what its handler says, and the fence around that.
#[derive(Clone)]
pub(crate) struct Writing {
    pub(super) core: Arc<Core>,
    pub(super) tenants: Arc<[Tenant]>,
    pub(super) changes: Changes,
    heard: Heard,
    /// Method and path, for warnings.
    what: Arc<str>,
    /// Code, and no request.
    by: By,
    /// What is known to be stale after it.
    declared: Vec<Change>,
    /// What was, before it.
    drops: Drops,
    fence: Option<Fence>,
    /// It makes things stale of a tenant that nobody knows.
    is_nobodys: bool,
    /// How long resolvers may take.
    patience: Duration,
}

impl Writing {
    pub(crate) fn new(core: &Arc<Core>, tenants: Arc<[Tenant]>, changes: Changes, what: impl Into<Arc<str>>) -> Self {
        Self {
            core: core.clone(),
            tenants,
            changes,
            heard: Heard::default(),
            what: what.into(),
            by: By::Request,
            declared: vec![],
            drops: Drops::default(),
            fence: None,
            is_nobodys: false,
            patience: core.cascades.patience,
        }
    }

    /// It is code that writes, and no request.
    pub(crate) fn by_hand(self) -> Self {
        Self { by: By::Hand, ..self }
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
        self.patience = core.cascades.patience;
        self.fence = core.fence(types);
        let Some(fence) = &self.fence else { return Ok(()) };
        let raised = core.engine.fence(self.drops.clone(), fence).await;
        if raised.is_err() && core.options.rejects { Err(Refused) } else { Ok(()) }
    }

    /// Refuses what nobody has said anything of, where that would drop everything, and the store cannot be told.
    pub(super) fn admit(&self) -> Result<(), Refused> {
        let Core { options, engine, .. } = &*self.core;
        let drops = options.rejects && options.on_unmapped == OnUnmapped::Drop;
        if drops && !engine.health().takes_invalidations() { Err(Refused) } else { Ok(()) }
    }

    /// Adds what a change drops, as the relations are now.
    async fn add(&mut self, change: &Change) {
        if self.tenants.is_empty() {
            self.is_nobodys |= !change.is_empty();
            return;
        }
        let start = Instant::now();
        self.core.add_change(&mut self.drops, &self.tenants, change, self.patience).await;
        self.patience = self.patience.saturating_sub(start.elapsed());
    }

    /// Adds what a handler said or extended. What nobody can read is everything.
    async fn add_said(&mut self, change: &Change) {
        let core = self.core.clone();
        match core.check_said(change) {
            Ok(()) => self.add(change).await,
            Err(error) => {
                if core.warnings.is_new("changes", &error.to_string()) {
                    tracing::warn!(%error, "dropping everything of the tenant, for the handler says what nobody knows");
                }
                self.add(&core.everything()).await;
            }
        }
    }

    /// After the handler: this has changed. (It is looked for once more: it may have moved a child here.)
    pub(super) fn declare(&mut self, change: Change) {
        self.declared.push(change);
    }

    #[cfg(feature = "grpc")]
    pub(super) fn is_fenced(&self) -> bool {
        self.fence.is_some()
    }

    /// Whether its handler has said nothing of what it changed.
    pub(super) fn is_silent(&self) -> bool {
        self.changes.is_silent(self.heard)
    }

    /// Whether there is nothing to do, as far as the handler has said.
    pub(super) fn is_idle(&self) -> bool {
        let knows_nothing = self.declared.is_empty() && self.drops.groups.is_empty() && !self.is_nobodys;
        knows_nothing && self.is_silent()
    }

    /// The same once more, without the fence.
    pub(super) fn again(&self) -> Self {
        Self { fence: None, patience: self.core.cascades.patience, ..self.clone() }
    }

    /// Drops everything, what the handler has said included, and lifts the fence.
    pub(crate) async fn end(mut self) -> Invalidated {
        let mut said = self.changes.hear(&mut self.heard);
        said.late = said.include.clone();
        for change in std::mem::take(&mut self.declared) {
            let late: Vec<_> =
                said.include.iter().filter(|relation| !change.include.contains(relation)).cloned().collect();
            match &late[..] {
                [] => self.add(&change).await,
                relations => self.add_said(&Change { late: late.clone(), ..change.include(relations) }).await,
            }
        }
        if !said.is_empty() {
            self.add_said(&said).await;
        }
        if self.is_nobodys {
            self.blame_nobody().await;
        }
        if self.drops.groups.is_empty() {
            return Invalidated::default();
        }
        let fence = self.held().await;
        // Of several, it is nobody's in particular.
        let tenant = self.tenants.first().filter(|_| self.tenants.len() == 1).map(|tenant| tenant.name());
        let blame = Blame { by: self.by, what: &self.what, tenant };
        let report = self.core.drop_all(self.drops, fence.as_ref(), &blame).await;
        tracing::debug!(%report, "invalidated");
        report
    }

    /// The fence that is to stand for a moment after the invalidation: also around what was not known before the handler ran.
    async fn held(&mut self) -> Option<Fence> {
        let own = self.fence.take();
        let of_types = self.core.fence(self.drops.groups.iter().map(|group| &*group.data_type));
        let Some(held) = of_types.filter(|fence| !fence.hold.is_zero()) else { return own };
        let fence = Fence { writer: own.map_or(held.writer, |own| own.writer), ..held };
        // Where it cannot be raised, nothing can be dropped either, and this process reads nothing of it.
        let _ = self.core.engine.fence(self.drops.clone(), &fence).await;
        Some(fence)
    }

    /// Something of somebody is stale, and nobody knows whose.
    async fn blame_nobody(&self) {
        let Core { options, warnings, .. } = &*self.core;
        let request = route_of(&self.what);
        if options.on_unmapped != OnUnmapped::Ignore && warnings.is_new("no tenant", &request) {
            tracing::warn!(
                request,
                "a write of no tenant, which drops nothing of any: find the tenant as the handler does (`tenant_from`), or \
                 choose `on_unmapped`"
            );
        }
        let blame = Blame { by: By::Request, what: &self.what, tenant: None };
        if options.on_unmapped == OnUnmapped::Drop && self.core.clear(&blame).await.is_err() {
            tracing::error!("everything was to be dropped, and the store could not be told");
        }
    }

    /// A success that nobody has said anything of.
    pub(super) fn is_unmapped(&mut self, is_done: bool) {
        let Core { options, warnings, .. } = &*self.core;
        #[cfg(feature = "stats")]
        if is_done {
            let tenant = self.tenants.first().map(|tenant| tenant.name());
            self.core.observer.unmapped(&route_of(&self.what), tenant, options.on_unmapped == OnUnmapped::Ignore);
        }
        match options.on_unmapped {
            OnUnmapped::Drop if !self.tenants.is_empty() => self.declare(self.core.everything()),
            OnUnmapped::Warn if is_done && warnings.is_new("unmapped", &route_of(&self.what)) => {
                tracing::warn!(
                    request = route_of(&self.what),
                    "a write that nothing is said of: what it makes stale stays. Declare a mutation, say it with `Changes` \
                     (`nothing`, if so), or choose `on_unmapped`"
                );
            }
            OnUnmapped::Drop | OnUnmapped::Warn | OnUnmapped::Ignore => {}
        }
    }

    /// Of what is known, nothing was changed; but a fence may be up.
    pub(super) async fn cancel(&mut self) {
        self.declared.clear();
        self.is_nobodys = false;
        let drops = std::mem::take(&mut self.drops);
        if let Some(fence) = self.fence.take() {
            self.core.lift(drops, &fence).await;
        }
    }

    /// Puts the report into the headers (or trailers) of the response, if it is wanted there.
    pub(super) fn report(core: &Core, report: &Invalidated, headers: &mut HeaderMap) {
        if core.options.report_header
            && let Ok(value) = HeaderValue::try_from(report.to_string())
        {
            headers.insert(REPORT, value);
        }
    }
}

/// The route, as far as a path tells: ids are left out, so that it is warned of once.
fn route_of(what: &str) -> String {
    let is_id = |part: &&str| part.len() > 24 || part.bytes().any(|c| c.is_ascii_digit() || c == b'%');
    let parts = what.split('/').map(|part| if is_id(&part) { "…" } else { part });
    parts.take(MOST_PARTS).collect::<Vec<_>>().join("/")
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
