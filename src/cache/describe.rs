//! A mapping on one page: what each write drops, and what drops each route's entries.

use std::{collections::BTreeSet, fmt, sync::Arc};

use serde::Serialize;

use crate::{
    catalog::{By, Reached},
    events::EventPolicy,
    layer::Core,
    route::{MutationRoute, ReadRoute},
};

/// What falls when: for the review of a mapping, as text (`Display`) and as data. Made by
/// [`Cache::describe`](crate::Cache::describe).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Description {
    /// The service's name.
    pub service: String,
    /// Every declared write, in the order of its declaration, and then every policy of events.
    pub writes: Vec<DescribedWrite>,
    /// Every cacheable route, in the order of its declaration.
    pub reads: Vec<DescribedRead>,
}

/// A write, and what it drops.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct DescribedWrite {
    /// `PUT /agents/{agent_id}`, `gRPC /agents.v1.Agents/Update`, ``event `agents` ``.
    pub name: String,
    /// What it drops.
    pub drops: Vec<Dropped>,
}

/// What a write drops of one data type.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Dropped {
    /// The data type.
    pub data_type: String,
    /// The relation that leads there.
    pub relation: Option<String>,
    /// The entities that an entry has to name one of; none if the type falls whole.
    pub by: Vec<String>,
}

/// A cacheable route, and what drops its entries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct DescribedRead {
    /// `GET /agents/{agent_id}`, `gRPC /agents.v1.Agents/Get`.
    pub name: String,
    /// Its data type.
    pub data_type: String,
    /// Its TTL in milliseconds; none if it is permanent.
    pub ttl_ms: Option<u64>,
    /// The names of the writes that drop (some of) its entries.
    pub dropped_by: Vec<String>,
}

impl Description {
    pub(super) fn new(core: &Core) -> Self {
        let declared = &core.routes.declared;
        let writes = declared.mutations.iter().map(|mutation| of_mutation(core, mutation));
        #[cfg(feature = "grpc")]
        let writes = writes.chain(core.routes.grpc_methods().filter(|method| method.mutates).map(|method| {
            let reached = core.cascades.reach(&method.data_type, &method.include);
            let whole = if method.is_described() { vec![] } else { reached.clone() };
            let reached = if method.is_described() { reached } else { vec![] };
            DescribedWrite { name: format!("gRPC {}", method.path), drops: dropped(reached, &whole) }
        }));
        let writes: Vec<_> = writes.chain(core.events.iter().map(|policy| of_event(core, policy))).collect();
        let read = |name: String, data_type: &str| {
            let drops = |write: &&DescribedWrite| write.drops.iter().any(|dropped| dropped.data_type == data_type);
            DescribedRead {
                name,
                data_type: data_type.to_owned(),
                ttl_ms: core
                    .policy(data_type)
                    .ttl
                    .duration()
                    .map(|ttl| u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX)),
                dropped_by: writes.iter().filter(drops).map(|write| write.name.clone()).collect(),
            }
        };
        let reads = declared.reads.iter().map(|route: &Arc<ReadRoute>| read(route.what(), route.data_type()));
        #[cfg(feature = "grpc")]
        let reads = reads.chain(
            core.routes.grpc_methods().filter(|m| !m.mutates).map(|m| read(format!("gRPC {}", m.path), &m.data_type)),
        );
        let reads = reads.collect();
        Self { service: core.space.service().to_owned(), writes, reads }
    }
}

fn of_mutation(core: &Core, mutation: &MutationRoute) -> DescribedWrite {
    let reach = |types: &mut dyn Iterator<Item = &Arc<str>>| {
        types.flat_map(|t| core.cascades.reach(t, mutation.include())).collect::<Vec<_>>()
    };
    let whole = reach(&mut mutation.all().iter());
    DescribedWrite { name: mutation.what(), drops: dropped(reach(&mut mutation.targets()), &whole) }
}

fn of_event(core: &Core, policy: &EventPolicy) -> DescribedWrite {
    // It was made once already, when the cache was built.
    let change = policy.sample().unwrap_or_default();
    let reach = |types: &mut dyn Iterator<Item = &Arc<str>>| {
        types.flat_map(|t| core.cascades.reach(t, &change.include)).collect::<Vec<_>>()
    };
    let whole = reach(&mut change.all.iter());
    let targets = reach(&mut change.entities.iter().map(|(data_type, _)| data_type));
    DescribedWrite { name: policy.what(), drops: dropped(targets, &whole) }
}

fn dropped(reached: Vec<Reached>, whole: &[Reached]) -> Vec<Dropped> {
    let mut drops: Vec<Dropped> = vec![];
    let whole = whole.iter().cloned().map(|one| Reached { by: By::Whole, ..one });
    for one in whole.chain(reached) {
        let by: BTreeSet<_> = match one.by {
            By::Entity(any) => any.iter().map(|named| named.entity.to_string()).collect(),
            By::Whole => BTreeSet::new(),
        };
        let dropped = Dropped {
            data_type: one.data_type.to_string(),
            relation: one.relation.map(|name| name.to_string()),
            by: by.into_iter().collect(),
        };
        if !drops.contains(&dropped) {
            drops.push(dropped);
        }
    }
    drops
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: what each write drops", self.service)?;
        for DescribedWrite { name, drops } in &self.writes {
            writeln!(f, "\n{name}")?;
            for Dropped { data_type, relation, by } in drops {
                let whose =
                    if by.is_empty() { "all of the tenant".to_owned() } else { format!("of the {}", by.join(" or ")) };
                let how = relation.as_ref().map_or(String::new(), |relation| format!("  ({relation})"));
                writeln!(f, "    {data_type:<32} {whose}{how}")?;
            }
        }
        writeln!(f, "\n{}: what drops each route's entries", self.service)?;
        for DescribedRead { name, data_type, ttl_ms, dropped_by } in &self.reads {
            let ttl = ttl_ms.map(|ttl| humantime::format_duration(std::time::Duration::from_millis(ttl)).to_string());
            writeln!(f, "\n{name}  {data_type}, {}", ttl.as_deref().unwrap_or("permanent"))?;
            for write in dropped_by {
                writeln!(f, "    {write}")?;
            }
            if dropped_by.is_empty() {
                writeln!(f, "    no write: only its TTL, and what is invalidated by hand")?;
            }
        }
        Ok(())
    }
}
