//! Events from outside: what they make stale is dropped.

use std::collections::BTreeSet;

use crate::{
    Cache,
    catalog::Drops,
    engine::Invalidated,
    error::ConfigError,
    events::Event,
    layer::{Blame, By, Core},
    store::Fence,
};

/// What [`Cache::apply`] came to.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Applied {
    /// What was dropped, by all of them.
    pub dropped: Invalidated,
    /// How many of the events no policy reads.
    pub ignored: usize,
    /// Those that a policy cannot make sense of, by their places, and why: they have dropped nothing.
    pub refused: Vec<(usize, ConfigError)>,
}

/// What events make stale, as the relations are now.
#[derive(Default)]
pub(super) struct Planned {
    drops: Drops,
    tenants: BTreeSet<String>,
    types: BTreeSet<String>,
    /// What they are called.
    what: String,
    ignored: usize,
    refused: Vec<(usize, ConfigError)>,
}

impl Cache {
    /// Drops what these events make stale, by the [policies](crate::CacheBuilder::event) that read them. When it returns, nobody is
    /// served any of it again.
    ///
    /// ```
    /// # use tower_cache_aside::{Cache, DataType, Event, EventPolicy, Route, Ttl};
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), tower_cache_aside::ConfigError> {
    /// let cache = Cache::builder("docs")
    ///     .tenant_header("x-tenant-id")
    ///     .data_type(DataType::new("agent", Ttl::Standard))
    ///     .route(Route::new("/agents/{agent_id}", "agent"))
    ///     .event(EventPolicy::on("agents").mutated("agent", "id"))
    ///     .build()?;
    /// let applied = cache.apply(&[Event::new("agents").tenant("acme").field("id", "a1")]).await;
    /// assert!(applied.refused.is_empty());
    /// # Ok(()) }
    /// ```
    pub async fn apply(&self, events: &[Event]) -> Applied {
        let planned = Planned::new(&self.0, events).await;
        let fence = planned.fence(&self.0);
        planned.apply(&self.0, fence.as_ref()).await
    }
}

impl Planned {
    pub(super) async fn new(core: &Core, events: &[Event]) -> Self {
        let mut planned = Self::default();
        for (at, event) in events.iter().enumerate() {
            match planned.add(core, event).await {
                Ok(true) => {}
                Ok(false) => planned.ignored += 1,
                Err(mistake) => {
                    let why = mistake.to_string();
                    if core.warnings.is_new("events", &why) {
                        tracing::warn!(why, "an event was refused, and has dropped nothing");
                    }
                    planned.refused.push((at, mistake));
                }
            }
        }
        planned.what = match events {
            [event] => format!("event {}", event.name()),
            _ => "events".to_owned(),
        };
        planned
    }

    /// Adds what an event drops; whether a policy reads it. What cannot be read adds nothing.
    async fn add(&mut self, core: &Core, event: &Event) -> Result<bool, ConfigError> {
        let mut changes = vec![];
        let policies = || core.events.iter().filter(|policy| policy.reads(event));
        for policy in policies() {
            for (tenant, change) in policy.changes(event)? {
                if policy.is_code() {
                    core.check_change(&policy.what(), &change)?;
                }
                changes.push((core.tenants.by_hand(tenant.as_deref())?.to_owned(), change));
            }
        }
        for (name, change) in changes {
            let tenant = core.space.tenant(name.as_str());
            core.add_change(&mut self.drops, std::slice::from_ref(&tenant), &change, core.cascades.patience).await;
            let types = change.entities.iter().map(|(data_type, _)| data_type).chain(&change.all);
            self.types.extend(types.map(|data_type| data_type.to_string()));
            self.tenants.insert(name);
        }
        Ok(policies().next().is_some())
    }

    /// What was dropped before, in addition.
    pub(super) fn with(mut self, before: &Self) -> Self {
        self.drops.add_all(before.drops.clone());
        self
    }

    /// The fence by which a write of the same would hold what it drops, for replicas that are behind.
    pub(super) fn fence(&self, core: &Core) -> Option<Fence> {
        core.fence(self.types.iter().map(String::as_str))
    }

    pub(super) fn drops(&self) -> &Drops {
        &self.drops
    }

    pub(super) async fn apply(self, core: &Core, fence: Option<&Fence>) -> Applied {
        let Self { drops, tenants, what, ignored, refused, .. } = self;
        let mut applied = Applied { dropped: Invalidated::default(), ignored, refused };
        if !drops.groups.is_empty() {
            let tenant = tenants.first().filter(|_| tenants.len() == 1).map(String::as_bytes);
            let blame = Blame { by: By::Event, what: &what, tenant };
            applied.dropped = core.drop_all(drops, fence, &blame).await;
        }
        applied
    }
}
