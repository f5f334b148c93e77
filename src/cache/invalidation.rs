//! Invalidations by hand.

use std::{fmt, sync::Arc};

use crate::{catalog::Drops, engine::Invalidated, layer::Core};

/// An invalidation by hand; made by [`Cache::invalidate`](crate::Cache::invalidate).
#[must_use = "nothing is dropped before `run`"]
pub struct Invalidation {
    core: Arc<Core>,
    tenant: String,
    entities: Vec<(String, String)>,
    all: Vec<String>,
    include: Vec<Arc<str>>,
}

impl Invalidation {
    pub(super) fn new(core: Arc<Core>, tenant: String) -> Self {
        Self { core, tenant, entities: vec![], all: vec![], include: vec![] }
    }

    /// The entity of this data type was changed: its cascade is dropped.
    pub fn mutated(mut self, data_type: impl Into<String>, id: impl Into<String>) -> Self {
        self.entities.push((data_type.into(), id.into()));
        self
    }

    /// Any entry of this data type may be stale: all that the tenant has are dropped.
    pub fn all(mut self, data_type: impl Into<String>) -> Self {
        self.all.push(data_type.into());
        self
    }

    /// Follows this relation of the mutated types' cascades.
    pub fn include(mut self, relation: impl AsRef<str>) -> Self {
        self.include.push(relation.as_ref().into());
        self
    }

    /// Drops it all. When it returns, nobody is served any of it again.
    ///
    /// Relations are resolved as they are now: call it *after* the write, and after a delete whose children only the
    /// database knew, name those as well.
    pub async fn run(self) -> Invalidated {
        let mut drops = Drops::default();
        let tenant = self.core.space.tenant(self.tenant);
        for (data_type, id) in &self.entities {
            self.core.drop_entity(&mut drops, &tenant, data_type, id.as_bytes(), &self.include).await;
        }
        for data_type in &self.all {
            drops.all(&tenant, data_type);
        }
        self.core.drop_all(drops, None).await
    }
}

impl fmt::Debug for Invalidation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tenant, entities, all, include, .. } = self;
        let mut debug = f.debug_struct("Invalidation");
        debug.field("tenant", tenant).field("entities", entities).field("all", all).field("include", include);
        debug.finish_non_exhaustive()
    }
}
