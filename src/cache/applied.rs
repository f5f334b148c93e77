//! Events from outside: what they make stale is dropped.

use std::collections::BTreeSet;

use crate::{
    Cache,
    catalog::Drops,
    engine::Invalidated,
    error::ConfigError,
    events::Event,
    layer::{Blame, By},
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
        let core = &self.0;
        let (mut applied, mut drops, mut tenants) = (Applied::default(), Drops::default(), BTreeSet::new());
        for (at, event) in events.iter().enumerate() {
            match self.add_event(&mut drops, event).await {
                Ok(of) if of.is_empty() => applied.ignored += 1,
                Ok(of) => tenants.extend(of),
                Err(mistake) => {
                    let why = mistake.to_string();
                    if core.warnings.is_new("events", &why) {
                        tracing::warn!(why, "an event was refused, and has dropped nothing");
                    }
                    applied.refused.push((at, mistake));
                }
            }
        }
        if !drops.groups.is_empty() {
            let what = events.first().filter(|_| events.len() == 1).map(|event| format!("event {}", event.name()));
            let tenant = tenants.first().filter(|_| tenants.len() == 1).map(String::as_bytes);
            let blame = Blame { by: By::Event, what: what.as_deref().unwrap_or("events"), tenant };
            applied.dropped = core.drop_all(drops, None, &blame).await;
        }
        applied
    }

    /// Adds what an event drops, and whose that is: nobody's, if no policy reads it. What cannot be read adds nothing.
    async fn add_event(&self, drops: &mut Drops, event: &Event) -> Result<Vec<String>, ConfigError> {
        let core = &self.0;
        let mut changes = vec![];
        for policy in core.events.iter().filter(|policy| policy.reads(event)) {
            changes.push((core.tenants.by_hand(policy.tenant_of(event)?)?.to_owned(), policy.change(event)?));
        }
        let mut tenants = vec![];
        for (name, change) in changes {
            let tenant = core.space.tenant(name.as_str());
            core.add_change(drops, std::slice::from_ref(&tenant), &change, core.cascades.patience).await;
            tenants.push(name);
        }
        Ok(tenants)
    }
}
