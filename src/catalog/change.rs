//! From what was changed to the tags that fall.

use std::{
    collections::{BTreeSet, HashSet},
    sync::Arc,
};

use futures_util::future::join_all;
use tokio::time::Instant;

use super::{
    cascades::{Cascades, Relation},
    drops::{Drops, Whose},
};
use crate::key::Tenant;

/// More children than this are not named one by one: their types are dropped whole for the tenant.
const MAX_CHILDREN: usize = 1_000;

/// What was changed, as far as it is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Change {
    /// Entities by data type and id, which need not be in its canonical form yet.
    pub(crate) entities: Vec<(Arc<str>, Vec<u8>)>,
    /// Types of which any entity may have changed.
    pub(crate) all: Vec<Arc<str>>,
    /// Types whose entries fall, all of them, and nothing with them.
    pub(crate) whole: Vec<Arc<str>>,
    /// The relations that follow.
    pub(crate) include: Vec<Arc<str>>,
    /// Those of them that resolvers could not be asked for before the handler ran: the rows that name the children may be gone.
    pub(crate) late: Vec<Arc<str>>,
}

/// Entities of one type whose children are to be found, under one line of the report (`None` for the changed ones
/// themselves).
struct Parents {
    line: Option<Arc<str>>,
    data_type: Arc<str>,
    ids: Vec<Vec<u8>>,
}

impl Change {
    pub(crate) fn entity(data_type: impl Into<Arc<str>>, id: impl Into<Vec<u8>>) -> Self {
        Self { entities: vec![(data_type.into(), id.into())], ..Self::default() }
    }

    pub(crate) fn all(data_type: impl Into<Arc<str>>) -> Self {
        Self { all: vec![data_type.into()], ..Self::default() }
    }

    /// Whether it says that anything has changed.
    pub(crate) fn is_empty(&self) -> bool {
        self.entities.is_empty() && self.all.is_empty() && self.whole.is_empty()
    }

    #[must_use]
    pub(crate) fn include(mut self, relations: &[Arc<str>]) -> Self {
        self.include.extend_from_slice(relations);
        self
    }

    fn includes(&self, relation: &Relation) -> bool {
        self.include.contains(&relation.name)
    }
}

impl Cascades {
    /// Adds what a change drops, as the relations are now.
    ///
    /// What resolvers have not answered at the deadline is everything of the tenant that they could have.
    pub(crate) async fn add_change(&self, drops: &mut Drops, tenant: &Tenant, change: &Change, deadline: Instant) {
        let mut changed: Vec<Parents> = vec![];
        for data_type in &change.whole {
            drops.add_of(tenant, data_type, data_type, Whose::All);
        }
        for data_type in &change.all {
            self.add_changed(drops, tenant, data_type, Whose::All, change);
        }
        for (data_type, id) in &change.entities {
            let entity = self.entities.of_type(data_type);
            let Some(id) = self.entities.id(entity, id) else {
                // Nobody knows what a handler made of it.
                self.add_changed(drops, tenant, data_type, Whose::All, change);
                continue;
            };
            self.add_changed(drops, tenant, data_type, Whose::Of(entity, &id), change);
            match changed.iter_mut().find(|parents| parents.data_type == *data_type) {
                Some(parents) => parents.ids.push(id.into_owned()),
                None => changed.push(Parents { line: None, data_type: data_type.clone(), ids: vec![id.into_owned()] }),
            }
        }
        self.resolve(drops, tenant, changed, change, deadline).await;
    }

    /// Adds what needs no resolver: of an entity, what is found by its id; of one that is not known, the whole type and what
    /// hangs on it, for everything may have been touched.
    fn add_changed(&self, drops: &mut Drops, tenant: &Tenant, data_type: &Arc<str>, whose: Whose<'_>, change: &Change) {
        let cascade = self.of(data_type);
        for data_type in &cascade.types {
            drops.add_of(tenant, data_type, data_type, whose);
        }
        for data_type in &cascade.all {
            drops.add_of(tenant, data_type, data_type, Whose::All);
        }
        for relation in cascade.relations.iter().filter(|r| change.includes(r)) {
            let is_late = relation.resolver.is_some() && change.late.contains(&relation.name);
            let whose = if is_late { Whose::All } else { whose };
            self.add_children(drops, tenant, &relation.name, &relation.child, whose, &mut BTreeSet::new());
        }
    }

    /// Adds the entries of a child type and of all that its cascade drops, its own relations included, each type once.
    fn add_children(
        &self,
        drops: &mut Drops,
        tenant: &Tenant,
        line: &Arc<str>,
        child: &Arc<str>,
        whose: Whose<'_>,
        gone: &mut BTreeSet<Arc<str>>,
    ) {
        if !gone.insert(child.clone()) {
            return;
        }
        let cascade = self.of(child);
        for data_type in &cascade.types {
            drops.add_of(tenant, line, data_type, whose);
        }
        for data_type in &cascade.all {
            drops.add_of(tenant, line, data_type, Whose::All);
        }
        for relation in &cascade.relations {
            self.add_children(drops, tenant, line, &relation.child, whose, gone);
        }
    }

    /// Adds what resolvers know, level by level, each entity once. All questions of a level are asked at once, each for all
    /// of its parents.
    async fn resolve(
        &self,
        drops: &mut Drops,
        tenant: &Tenant,
        mut parents: Vec<Parents>,
        change: &Change,
        deadline: Instant,
    ) {
        // One that is found again as a child follows all of its relations, if it has not done so already.
        let is_done = |p: &&Parents| self.of(&p.data_type).relations.iter().all(|relation| change.includes(relation));
        let ids = |p: &Parents| p.ids.iter().map(|id| (p.data_type.clone(), id.clone())).collect::<Vec<_>>();
        let mut seen: HashSet<_> = parents.iter().filter(is_done).flat_map(ids).collect();
        let mut found = 0;
        while !parents.is_empty() {
            let level: Vec<_> = parents.iter().map(|parents| (parents, self.of(&parents.data_type))).collect();
            // Children's own relations always follow: they are part of what the mutation asked for.
            let followed = level.iter().flat_map(|(parents, cascade)| {
                let is_followed = |r: &&Relation| change.includes(r) && !change.late.contains(&r.name);
                let followed = cascade.relations.iter().filter(move |r| parents.line.is_some() || is_followed(r));
                followed.map(move |relation| (*parents, relation))
            });
            let asked = followed.filter_map(|(parents, relation)| {
                let resolver = relation.resolver.as_ref()?;
                Some(async move { (parents, relation, resolver.resolve(tenant.name(), &parents.ids, deadline).await) })
            });
            let answers = join_all(asked.collect::<Vec<_>>()).await;
            let mut next = vec![];
            for (parents, relation, children) in answers {
                let line = parents.line.as_ref().unwrap_or(&relation.name);
                let children = children.and_then(|children| self.canonical_children(&relation.child, children));
                let children = children.inspect_err(|error| {
                    tracing::warn!(relation = %relation.name, %error, "resolver failed: dropping all children");
                });
                let Some(children) = children.ok().filter(|children| found + children.len() <= MAX_CHILDREN) else {
                    self.add_children(drops, tenant, line, &relation.child, Whose::All, &mut BTreeSet::new());
                    continue;
                };
                found += children.len();
                let entity = self.entities.of_type(&relation.child);
                let mut ids = vec![];
                for id in children.into_iter().filter(|id| seen.insert((relation.child.clone(), id.clone()))) {
                    let whose = Whose::Of(entity, &id);
                    self.add_children(drops, tenant, line, &relation.child, whose, &mut BTreeSet::new());
                    ids.push(id);
                }
                if !ids.is_empty() {
                    next.push(Parents { line: Some(line.clone()), data_type: relation.child.clone(), ids });
                }
            }
            parents = next;
        }
    }

    fn canonical_children(&self, child: &str, ids: Vec<String>) -> Result<Vec<Vec<u8>>, super::ResolverError> {
        let entity = self.entities.of_type(child);
        let canonical = |id: String| match self.entities.id(entity, id.as_bytes()) {
            Some(id) => Ok(id.into_owned()),
            None => Err(format!("`{id}` is no {entity}").into()),
        };
        ids.into_iter().map(canonical).collect()
    }
}
