//! Invalidations by hand.

use std::{fmt, sync::Arc};

use crate::{
    catalog::{Change, Drops},
    engine::Invalidated,
    error::ConfigError,
    layer::{Blame, By, Core},
};

/// An invalidation by hand; made by [`Cache::invalidate`](crate::Cache::invalidate).
#[must_use = "nothing is dropped before `run`"]
pub struct Invalidation {
    core: Arc<Core>,
    tenant: String,
    change: Change,
    everything: bool,
    what: &'static str,
}

impl Invalidation {
    pub(super) fn new(core: Arc<Core>, tenant: String) -> Self {
        Self { core, tenant, change: Change::default(), everything: false, what: "Cache::invalidate" }
    }

    /// The entity of this data type was changed: its cascade is dropped. (An id that has no
    /// [canonical form](crate::Canonical) drops the whole type and what hangs on it.)
    pub fn mutated(mut self, data_type: impl Into<Arc<str>>, id: impl Into<String>) -> Self {
        self.change.entities.push((data_type.into(), id.into().into_bytes()));
        self
    }

    /// Any entity of this data type may have changed: all entries that the tenant has of it, and of what its cascade drops,
    /// are dropped.
    pub fn all(mut self, data_type: impl Into<Arc<str>>) -> Self {
        self.change.all.push(data_type.into());
        self
    }

    /// Follows this relation of the mutated types' cascades.
    pub fn include(mut self, relation: impl AsRef<str>) -> Self {
        self.change.include.push(relation.as_ref().into());
        self
    }

    /// Everything of the tenant: after a restore, a migration, the deletion of the tenant.
    pub fn everything(mut self) -> Self {
        self.everything = true;
        self
    }

    /// Who does it, for those who look on.
    #[cfg(feature = "admin")]
    pub(crate) fn by(mut self, what: &'static str) -> Self {
        self.what = what;
        self
    }

    /// What it would drop: the tags, and about how many entries.
    #[cfg(feature = "admin")]
    pub(crate) async fn dry_run(self) -> Result<(Drops, Option<Invalidated>), ConfigError> {
        let (core, drops) = (self.core.clone(), self.drops().await?);
        let counts = core.engine.count(&drops).await.ok();
        Ok((drops, counts))
    }

    async fn drops(&self) -> Result<Drops, ConfigError> {
        let tenant = self.core.space.tenant(self.core.tenants.by_hand(Some(&self.tenant))?);
        self.core.check_change("invalidation", &self.change)?;
        let mut change = self.change.clone();
        if self.everything {
            change.all.extend(self.core.everything().all);
        }
        let (mut drops, patience) = (Drops::default(), self.core.cascades.patience);
        self.core.add_change(&mut drops, std::slice::from_ref(&tenant), &change, patience).await;
        Ok(drops)
    }

    /// Drops it all. When it returns, nobody is served any of it again. Once begun it goes on, also when this future is
    /// dropped, as a handler's is when its client hangs up.
    ///
    /// Relations are resolved as they are now: call it *after* the write, and after a delete whose children only the
    /// database knew, name those as well.
    ///
    /// # Errors
    /// What would drop nothing: an unknown data type or relation, a type whose entities have no ids in its routes, a tenant
    /// that is empty or not the single one. Then nothing was dropped.
    pub async fn run(self) -> Result<Invalidated, ConfigError> {
        let core = self.core.clone();
        core.engine.anyway(self.finish()).await
    }

    async fn finish(self) -> Result<Invalidated, ConfigError> {
        let drops = self.drops().await?;
        let blame = Blame { by: By::Hand, what: self.what, tenant: Some(self.tenant.as_bytes()) };
        Ok(self.core.drop_all(drops, None, &blame).await)
    }
}

impl fmt::Debug for Invalidation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tenant, change, everything, .. } = self;
        let mut debug = f.debug_struct("Invalidation");
        debug.field("tenant", tenant).field("change", change).field("everything", everything).finish_non_exhaustive()
    }
}
