//! Cascades, checked and ready: from what was mutated to the tags that fall.
//!
//! The children of an entity are found by three ways at once: entries whose *scope* or *declared tags* name the parent, and
//! ids that a *resolver* returns.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use super::{
    cascade::Cascade,
    drops::{Drops, Target},
    resolver::{Resolver, Resolvers},
    types::Catalogue,
};
use crate::{error::ConfigError, key::Tag};

/// More children than this are not named one by one: their types are dropped whole for the tenant.
const MAX_CHILDREN: usize = 1_000;

#[derive(Debug)]
struct Compiled {
    /// The mutated type and those that hang on the same entity.
    types: Vec<Arc<str>>,
    /// Those that fall whole.
    all: Vec<Arc<str>>,
    relations: Vec<Relation>,
    fence: Option<FenceTimes>,
}

/// How long writes are fenced.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct FenceTimes {
    pub(crate) lease: Duration,
    pub(crate) hold: Duration,
}

#[derive(Debug)]
struct Relation {
    name: Arc<str>,
    child: String,
    resolver: Option<Resolver>,
}

/// All cascades, checked and ready.
#[derive(Debug, Default)]
pub(crate) struct Cascades {
    cascades: BTreeMap<String, Compiled>,
    /// The entity that the resource of a data type is, where it is not named like the type.
    entities: BTreeMap<String, String>,
}

impl Cascades {
    /// `entities` says which entity the resource of a data type is, as its routes name it.
    pub(crate) fn new(
        catalogue: &Catalogue,
        declared: &[Cascade],
        resolvers: &Resolvers,
        entities: BTreeMap<String, String>,
    ) -> Result<Self, ConfigError> {
        let mut cascades = BTreeMap::new();
        for cascade in declared {
            let compiled = Compiled::new(catalogue, cascade, resolvers)?;
            let name = &cascade.data_type;
            if cascades.insert(name.clone(), compiled).is_some() {
                return Err(ConfigError::new(format!("cascade `{name}` is declared twice; make it one")));
            }
        }
        let known = |name: &String| declared.iter().any(|c| c.relations.contains_key(name));
        if let Some(name) = resolvers.keys().find(|name| !known(name)) {
            return Err(ConfigError::new(format!(
                "resolver `{name}`: no cascade declares a relation of that name; declare it, or remove the resolver"
            )));
        }
        let this = Self { cascades, entities };
        for name in this.cascades.keys() {
            this.check_cycle(name, &mut vec![])?;
        }
        Ok(this)
    }

    fn check_cycle<'a>(&'a self, name: &'a str, path: &mut Vec<&'a str>) -> Result<(), ConfigError> {
        if let Some(at) = path.iter().position(|p| *p == name) {
            let cycle: Vec<_> = path[at..].iter().chain([&name]).copied().collect();
            return Err(ConfigError::new(format!(
                "cascade `{name}`: its relations form a cycle ({}); remove one of them",
                cycle.join(" → ")
            )));
        }
        path.push(name);
        for relation in self.cascades.get(name).into_iter().flat_map(|c| &c.relations) {
            self.check_cycle(&relation.child, path)?;
        }
        path.pop();
        Ok(())
    }

    /// What the resource of a data type is called: `agent` for `agent_config`, if its route is
    /// `/agents/{agent_id}/config`.
    pub(crate) fn entity_of<'a>(&'a self, data_type: &'a str) -> &'a str {
        self.entities.get(data_type).map_or(data_type, String::as_str)
    }

    /// How mutations of this type are fenced.
    pub(crate) fn fence(&self, data_type: &str) -> Option<FenceTimes> {
        self.cascades.get(data_type)?.fence
    }

    /// Whether any cascade is fenced.
    pub(crate) fn any_fence(&self) -> bool {
        self.cascades.values().any(|c| c.fence.is_some())
    }

    /// The relations that mutations of this type may include.
    pub(crate) fn relations(&self, data_type: &str) -> Vec<&str> {
        self.cascades.get(data_type).map_or(vec![], |c| c.relations.iter().map(|r| &*r.name).collect())
    }

    /// The types whose entries must carry a tag of the mutated entity, the mutated type itself excepted.
    pub(crate) fn direct(&self, data_type: &str) -> &[Arc<str>] {
        self.cascades.get(data_type).map_or(&[], |c| &c.types[1..])
    }

    pub(crate) fn declared(&self) -> impl Iterator<Item = &str> {
        self.cascades.keys().map(String::as_str)
    }

    /// Adds what a mutation of one entity drops, as its relations are now.
    pub(crate) async fn drop_entity(&self, drops: &mut Drops, target: &Target<'_>) {
        self.add(drops, target);
        self.resolve(drops, target).await;
    }

    /// Adds what needs no resolver.
    fn add(&self, drops: &mut Drops, target: &Target<'_>) {
        let Some(cascade) = self.cascades.get(target.data_type) else {
            let data_type = Arc::from(target.data_type);
            return drops.add(&data_type, &data_type, target.tag(&data_type));
        };
        for data_type in &cascade.types {
            drops.add(data_type, data_type, target.tag(data_type));
        }
        for data_type in &cascade.all {
            drops.add(data_type, data_type, Tag::all(target.tenant.head(), data_type));
        }
        for relation in cascade.relations.iter().filter(|r| target.includes(&r.name)) {
            self.add_children(drops, &relation.name, &relation.child, target, Children::OfParent);
        }
    }

    /// Adds what resolvers know: one level of relations, whose children's own relations follow recursively.
    async fn resolve(&self, drops: &mut Drops, target: &Target<'_>) {
        // (relation whose line it counts under, type, id) of parents still to be asked for their children.
        let mut parents = vec![(None::<Arc<str>>, target.data_type, target.id.to_vec())];
        while let Some((line, data_type, id)) = parents.pop() {
            let Some(cascade) = self.cascades.get(data_type) else { continue };
            // Children's own relations always follow: they are part of what the mutation asked for.
            for relation in cascade.relations.iter().filter(|r| line.is_some() || target.includes(&r.name)) {
                let line = line.as_ref().unwrap_or(&relation.name);
                let Some(resolver) = &relation.resolver else { continue };
                match resolver.resolve(&target.tenant.name, &id).await {
                    Ok(ids) if ids.len() <= MAX_CHILDREN => {
                        let entity = self.entity_of(&relation.child);
                        for child in ids {
                            let of = Target { entity, id: child.as_bytes(), ..*target };
                            self.add_children(drops, line, &relation.child, &of, Children::Named);
                            parents.push((Some(line.clone()), &relation.child, child.into_bytes()));
                        }
                    }
                    Ok(_) => self.add_children(drops, line, &relation.child, target, Children::All),
                    Err(error) => {
                        tracing::warn!(relation = %relation.name, %error, "resolver failed: dropping all children");
                        self.add_children(drops, line, &relation.child, target, Children::All);
                    }
                }
            }
        }
    }

    /// Adds the tags of a child type and of all that its cascade drops, its own relations included.
    fn add_children(&self, drops: &mut Drops, line: &Arc<str>, child: &str, of: &Target<'_>, how: Children) {
        let own = [Arc::from(child)];
        let cascade = self.cascades.get(child);
        for data_type in cascade.map_or(&own[..], |c| &c.types) {
            let tag = match how {
                Children::OfParent | Children::Named => of.tag(data_type),
                Children::All => Tag::all(of.tenant.head(), data_type),
            };
            drops.add(line, data_type, tag);
        }
        for data_type in cascade.map_or(&[][..], |c| &c.all) {
            drops.add(line, data_type, Tag::all(of.tenant.head(), data_type));
        }
        for relation in cascade.map_or(&[][..], |c| &c.relations) {
            self.add_children(drops, line, &relation.child, of, how);
        }
    }
}

/// How the entries of children are named.
#[derive(Clone, Copy)]
enum Children {
    /// By the parent's tag on them: from the scope, or declared by the response.
    OfParent,
    /// By their own id.
    Named,
    /// All of the tenant.
    All,
}

impl Compiled {
    fn new(catalogue: &Catalogue, cascade: &Cascade, resolvers: &Resolvers) -> Result<Self, ConfigError> {
        let name = &cascade.data_type;
        let what = format!("cascade `{name}`");
        for data_type in [name].into_iter().chain(&cascade.drops).chain(&cascade.all) {
            catalogue.check(&what, data_type)?;
        }
        let mut types: Vec<Arc<str>> = vec![name.as_str().into()];
        for data_type in &cascade.drops {
            if !types.iter().any(|t| **t == **data_type) {
                types.push(data_type.as_str().into());
            }
        }
        let mut relations = vec![];
        for (relation, child) in &cascade.relations {
            catalogue.check(&format!("{what}, relation `{relation}`"), child)?;
            let (name, resolver) = (relation.as_str().into(), resolvers.get(relation).cloned());
            relations.push(Relation { name, child: child.clone(), resolver });
        }
        let all = cascade.all.iter().map(|t| t.as_str().into()).collect();
        Ok(Self { types, all, relations, fence: fence_times(&what, cascade)? })
    }
}

fn fence_times(what: &str, cascade: &Cascade) -> Result<Option<FenceTimes>, ConfigError> {
    match (cascade.fenced, cascade.hold) {
        (Some(Duration::ZERO), _) => Err(ConfigError::new(format!(
            "{what}: a lease of zero fences nothing; make it longer than its handlers take, or take it out"
        ))),
        (None, Some(_)) => {
            Err(ConfigError::new(format!("{what}: `hold` needs a fence; give it a lease with `fenced`")))
        }
        (Some(lease), hold) => Ok(Some(FenceTimes { lease, hold: hold.unwrap_or_default() })),
        (None, None) => Ok(None),
    }
}
