//! Cascades, checked and ready, and what each reaches.
//!
//! The children of an entity are found by three ways at once: entries whose *scope* or *declared tags* name the parent, and
//! ids that a *resolver* returns. [`Cascades::reach`] says by which of them each type is found, so that the routes can be
//! held against it when the cache is built.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use super::{
    cascade::Cascade,
    entities::Entities,
    resolver::{Resolver, Resolvers},
    types::Catalogue,
};
use crate::error::ConfigError;

#[derive(Debug)]
pub(super) struct Compiled {
    /// The mutated type and those that hang on the same entity.
    pub(super) types: Vec<Arc<str>>,
    /// Those that fall whole.
    pub(super) all: Vec<Arc<str>>,
    pub(super) relations: Vec<Relation>,
    fence: Option<FenceTimes>,
}

/// How long writes are fenced.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct FenceTimes {
    pub(crate) lease: Duration,
    pub(crate) hold: Duration,
}

#[derive(Debug)]
pub(super) struct Relation {
    pub(super) name: Arc<str>,
    pub(super) child: Arc<str>,
    pub(super) resolver: Option<Resolver>,
}

/// All cascades, checked and ready. Types without one drop only themselves.
#[derive(Debug, Default)]
pub(crate) struct Cascades {
    cascades: BTreeMap<Arc<str>, Arc<Compiled>>,
    pub(crate) entities: Entities,
    /// How long resolvers may take, all that one write asks for together.
    pub(super) patience: Duration,
}

/// What a mutation finds of one data type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reached {
    /// The relation that leads there; `None` for the mutated entity itself.
    pub(crate) relation: Option<Arc<str>>,
    pub(crate) data_type: Arc<str>,
    pub(crate) by: By,
}

/// How it finds its entries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum By {
    /// Those that name one of these. Only the last is certain to find all of them: the ones before it find what is *below*
    /// those entities, but which way is down, relations do not say.
    Entity(Vec<Named>),
    /// All of the tenant.
    Whole,
}

/// An entity whose id is known: which it is, and of which type it is the resource.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Named {
    pub(crate) entity: Arc<str>,
    pub(crate) of: Arc<str>,
    /// The relation whose resolver finds its ids; `None` for the mutated entity.
    pub(crate) resolved: Option<Arc<str>>,
}

impl Cascades {
    pub(crate) fn new(
        catalogue: &Catalogue,
        declared: &[Cascade],
        resolvers: &Resolvers,
        entities: Entities,
        patience: Duration,
    ) -> Result<Self, ConfigError> {
        let mut cascades = BTreeMap::new();
        for cascade in declared {
            let compiled = Compiled::new(catalogue, cascade, resolvers)?;
            let name = &cascade.data_type;
            if cascades.insert(name.as_str().into(), compiled.into()).is_some() {
                return Err(ConfigError::new(format!("cascade `{name}` is declared twice; make it one")));
            }
        }
        let known = |name: &String| declared.iter().any(|c| c.relations.contains_key(name));
        if let Some(name) = resolvers.keys().find(|name| !known(name)) {
            return Err(ConfigError::new(format!(
                "resolver `{name}`: no cascade declares a relation of that name; declare it, or remove the resolver"
            )));
        }
        Ok(Self { cascades, entities, patience })
    }

    /// The cascade of a type, which is only itself where none is declared.
    pub(super) fn of(&self, data_type: &str) -> Arc<Compiled> {
        let alone = || Compiled { types: vec![data_type.into()], all: vec![], relations: vec![], fence: None };
        self.cascades.get(data_type).cloned().unwrap_or_else(|| alone().into())
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
    pub(crate) fn relations(&self, data_type: &str) -> Vec<Arc<str>> {
        self.cascades.get(data_type).map_or(vec![], |c| c.relations.iter().map(|r| r.name.clone()).collect())
    }

    /// The types that have a cascade.
    pub(crate) fn declared(&self) -> impl Iterator<Item = &Arc<str>> {
        self.cascades.keys()
    }

    /// Whether none of the types' cascades has this relation, and which they have.
    pub(crate) fn check_relation<'t>(
        &self,
        what: &str,
        types: impl Iterator<Item = &'t str>,
        relation: &str,
    ) -> Result<(), ConfigError> {
        let known: Vec<_> = types.flat_map(|t| self.relations(t)).collect();
        if known.iter().any(|known| **known == *relation) {
            return Ok(());
        }
        let known =
            if known.is_empty() { "declare it".to_owned() } else { format!("use one of: {}", known.join(", ")) };
        Err(ConfigError::new(format!("{what}: no cascade of what it mutates has a relation `{relation}`; {known}")))
    }

    /// What a mutation of one entity of this type finds, with these of its relations. Children's own relations follow.
    pub(crate) fn reach(&self, data_type: &str, include: &[Arc<str>]) -> Vec<Reached> {
        let own = Named { entity: self.entities.of_type(data_type).into(), of: data_type.into(), resolved: None };
        let cascade = self.of(data_type);
        let mut reached = vec![];
        cascade.reach(&mut reached, None, &By::Entity(vec![own.clone()]));
        let included = cascade.relations.iter().filter(|r| include.contains(&r.name));
        let mut ways: Vec<_> = included.map(|r| self.follow(r, &r.name, std::slice::from_ref(&own), true)).collect();
        let mut gone = BTreeSet::new();
        while let Some((line, child, named, is_known)) = ways.pop() {
            // In a circle of relations each way ends where it finds nothing by which it has not come already.
            if !gone.insert((child.clone(), named.clone(), is_known)) {
                continue;
            }
            let cascade = self.of(&child);
            cascade.reach(&mut reached, Some(&line), &By::Entity(named.clone()));
            ways.extend(cascade.relations.iter().map(|r| self.follow(r, &line, &named, is_known)));
        }
        reached
    }

    /// From entities by whose names children are found to those by whose names theirs are. `is_known`: whether the last
    /// one's ids are, so that a resolver can be asked.
    fn follow(&self, relation: &Relation, line: &Arc<str>, named: &[Named], is_known: bool) -> Way {
        let child = relation.child.clone();
        let is_known = is_known && relation.resolver.is_some();
        let mut named = named.to_vec();
        if is_known {
            let entity = self.entities.of_type(&child).into();
            let own = Named { entity, of: child.clone(), resolved: Some(relation.name.clone()) };
            named.retain(|n| (&n.entity, &n.of) != (&own.entity, &own.of));
            named.push(own);
        }
        (line.clone(), child, named, is_known)
    }
}

/// Which line of the report, which type, by which names, and whether its ids are known.
type Way = (Arc<str>, Arc<str>, Vec<Named>, bool);

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
            relations.push(Relation { name, child: child.as_str().into(), resolver });
        }
        let all = cascade.all.iter().map(|t| t.as_str().into()).collect();
        Ok(Self { types, all, relations, fence: fence_times(&what, cascade)? })
    }

    fn reach(&self, reached: &mut Vec<Reached>, relation: Option<&Arc<str>>, by: &By) {
        let types = self.types.iter().map(|t| (t, by)).chain(self.all.iter().map(|t| (t, &By::Whole)));
        for (data_type, by) in types {
            let one = Reached { relation: relation.cloned(), data_type: data_type.clone(), by: by.clone() };
            if !reached.contains(&one) {
                reached.push(one);
            }
        }
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
