//! What a cache hands to its layers: the mapping, the engine and the options.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::{HeaderName, Uri};

use crate::{
    catalog::{Cascades, Catalogue, Drops, FenceTimes, Policy, Target},
    engine::{Engine, Invalidated},
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

    /// Adds what a mutation of the entity with this id drops.
    pub(crate) async fn drop_entity(
        &self,
        drops: &mut Drops,
        tenant: &Tenant,
        data_type: &str,
        id: &[u8],
        include: &[Arc<str>],
    ) {
        let entity = self.cascades.entity_of(data_type);
        self.cascades.drop_entity(drops, &Target { tenant, data_type, entity, id, include }).await;
    }

    /// Adds what a mutation by HTTP drops, as the relations are now.
    pub(crate) async fn drop_mutated(&self, drops: &mut Drops, tenants: &[Tenant], mutated: &Mutated) {
        for tenant in tenants {
            for (data_type, id) in mutated.entities() {
                self.drop_entity(drops, tenant, data_type, id, mutated.include()).await;
            }
            for data_type in mutated.all() {
                drops.all(tenant, data_type);
            }
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
            for tenant in tenants {
                self.drop_entity(drops, tenant, data_type, &id, include).await;
            }
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
        let id = located.filter(|(found, _)| *found == data_type).map(|(_, id)| id);
        for tenant in tenants {
            match &id {
                Some(id) => self.drop_entity(drops, tenant, data_type, id, mutated.include()).await,
                None => drops.all(tenant, data_type),
            }
        }
    }
}
