//! What a cache hands to its layers: the mapping, the engine and the options.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::{HeaderName, Uri};

use super::warnings::Warnings;
use crate::{
    catalog::{Cascades, Catalogue, Change, Drops, FenceTimes, Policy},
    engine::{Engine, Invalidated},
    error::ConfigError,
    key::{Space, Tenant},
    route::{Mutated, Routes, TenantSource},
    store::Fence,
};

pub(crate) struct Core {
    pub(crate) catalogue: Catalogue,
    pub(crate) cascades: Cascades,
    pub(crate) routes: Routes,
    pub(crate) tenants: TenantSource,
    pub(crate) space: Space,
    pub(crate) engine: Arc<Engine>,
    pub(crate) options: Options,
    pub(crate) warnings: Warnings,
}

/// What the layers do besides.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) body_limit: usize,
    pub(crate) tag_header: HeaderName,
    pub(crate) targeted_header: HeaderName,
    pub(crate) report_header: bool,
    pub(crate) entity_tags: bool,
    pub(crate) request_directives: bool,
    pub(crate) show_keys: bool,
    pub(crate) fence: Option<FenceTimes>,
    /// Whether writes are refused that the store cannot be told about.
    pub(crate) rejects: bool,
}

impl Core {
    pub(crate) fn policy(&self, data_type: &str) -> Policy {
        self.catalogue.policy(data_type)
    }

    /// The time as dates in headers have it.
    pub(crate) fn date(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_millis(self.engine.now())
    }

    /// The fence that a mutation of these types raises, if any of them is fenced.
    pub(crate) fn fence<'t>(&self, types: impl Iterator<Item = &'t str>) -> Option<Fence> {
        let times = types.filter_map(|t| self.cascades.fence(t).or(self.options.fence));
        let all = times.reduce(|a, b| FenceTimes { lease: a.lease.max(b.lease), hold: a.hold.max(b.hold) })?;
        Some(Fence::new(all.lease, all.hold))
    }

    /// Invalidates. Where any fences are used at all, those of other writers are respected.
    pub(crate) async fn drop_all(&self, drops: Drops, fence: Option<&Fence>) -> Invalidated {
        let any = self.options.fence.is_some() || self.cascades.any_fence();
        self.engine.invalidate(drops, fence.or(any.then_some(&Fence::NOBODY))).await
    }

    /// That a change says nothing that would drop nothing.
    pub(crate) fn check_change(&self, what: &str, change: &Change) -> Result<(), ConfigError> {
        let types = change.entities.iter().map(|(data_type, _)| data_type).chain(&change.all).map(|t| &**t);
        for data_type in types.clone() {
            self.catalogue.check(what, data_type)?;
        }
        for (data_type, _) in &change.entities {
            self.routes.expected.check_named(data_type)?;
        }
        change.include.iter().try_for_each(|relation| self.cascades.check_relation(what, types.clone(), relation))
    }

    /// Adds what a change drops, as the relations are now.
    pub(crate) async fn add_change(&self, drops: &mut Drops, tenants: &[Tenant], change: &Change) {
        for tenant in tenants {
            self.cascades.add_change(drops, tenant, change).await;
        }
    }

    /// Adds what is at these paths.
    pub(crate) async fn drop_located(
        &self,
        drops: &mut Drops,
        tenants: &[Tenant],
        paths: &[String],
        include: &[Arc<str>],
    ) {
        for (data_type, id) in paths.iter().filter_map(|path| self.routes.locate(path)) {
            self.add_change(drops, tenants, &Change::entity(data_type, id).include(include)).await;
        }
    }

    /// Adds what the creation of an entity drops, which the response's `Location` names, if it does.
    pub(crate) async fn drop_created(
        &self,
        drops: &mut Drops,
        tenants: &[Tenant],
        mutated: &Mutated,
        location: Option<&str>,
    ) {
        let Some(data_type) = mutated.creates() else { return };
        let uri = location.and_then(|l| l.parse::<Uri>().ok());
        let located = uri.as_ref().and_then(|uri| self.routes.locate(uri.path()));
        let change = match located.filter(|(found, _)| **found == **data_type) {
            Some((_, id)) => Change::entity(data_type.clone(), id),
            None => Change::all(data_type.clone()),
        };
        self.add_change(drops, tenants, &change.include(mutated.include())).await;
    }
}
