//! Cascades, checked and ready, and what each reaches.
//!
//! The children of an entity are found by three ways at once: entries whose *scope* or *declared tags* name the parent, and
//! ids that a *resolver* returns. [`Cascades::reach`] says by which of them each type is found, so that the routes can be
//! held against it when the cache is built.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map},
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
    pub(crate) patience: Duration,
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
        for name in resolvers.keys() {
            let of: Vec<_> =
                declared.iter().filter(|c| c.relations.contains_key(name)).map(|c| &*c.data_type).collect();
            match of[..] {
                [_] => {}
                [] => {
                    return Err(ConfigError::new(format!(
                        "resolver `{name}`: no cascade declares a relation of that name; declare it, or remove the resolver"
                    )));
                }
                // It could not tell the ids of whom it is given.
                _ => {
                    return Err(ConfigError::new(format!(
                        "resolver `{name}`: several cascades ({}) have a relation of that name; call one of them \
                         otherwise, and give it a resolver of its own",
                        of.join(", ")
                    )));
                }
            }
        }
        Ok(Self { cascades, entities, patience })
    }

    /// The cascade of a type, which is only itself where none is declared.
    pub(super) fn of(&self, data_type: &str) -> Arc<Compiled> {
        let alone = || Compiled { types: vec![data_type.into()], all: vec![], relations: vec![], fence: None };
        self.cascades.get(data_type).cloned().unwrap_or_else(|| alone().into())
    }

    /// The types that fall whole with any entity of this one.
    pub(crate) fn drops_whole(&self, data_type: &str) -> Vec<Arc<str>> {
        self.of(data_type).all.clone()
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
        let own = Named { entity: self.entities.of_type(data_type).into(), of: data_type.into() };
        let cascade = self.of(data_type);
        let mut reached = vec![];
        cascade.reach(&mut reached, None, &By::Entity(vec![own.clone()]));
        let included = cascade.relations.iter().filter(|r| include.contains(&r.name));
        let mut ways: Vec<_> = included.map(|r| self.follow(r, &r.name, &own, &BTreeSet::new(), true)).collect();
        // Ways that come to a type by the same name are one, which is gone again only for other names that it brings.
        let mut gone: BTreeMap<_, BTreeSet<Named>> = BTreeMap::new();
        while let Some(Way { line, child, last, others, is_known }) = ways.pop() {
            let key = (line.clone(), child.clone(), last.clone(), is_known);
            let before = gone.entry(key);
            let is_new = matches!(before, btree_map::Entry::Vacant(_));
            let all = before.or_default();
            let count = all.len();
            all.extend(others);
            if is_new || all.len() > count {
                let relations = &self.of(&child).relations;
                let next: Vec<_> = relations.iter().map(|r| self.follow(r, &line, &last, all, is_known)).collect();
                ways.extend(next);
            }
        }
        for ((line, child, last, _), others) in gone {
            let named = others.into_iter().filter(|other| *other != last).chain([last.clone()]).collect();
            self.of(&child).reach(&mut reached, Some(&line), &By::Entity(named));
        }
        reached
    }

    /// From the names by which children are found to those by which theirs are. `is_known`: whether the ids of the last one
    /// are, so that a resolver can be asked.
    fn follow(
        &self,
        relation: &Relation,
        line: &Arc<str>,
        last: &Named,
        others: &BTreeSet<Named>,
        is_known: bool,
    ) -> Way {
        let (line, child) = (line.clone(), relation.child.clone());
        let (is_known, mut others) = (is_known && relation.resolver.is_some(), others.clone());
        let mut last = last.clone();
        if is_known {
            let own = Named { entity: self.entities.of_type(&child).into(), of: child.clone() };
            others.insert(std::mem::replace(&mut last, own));
        }
        Way { line, child, last, others, is_known }
    }
}

/// How children are come to: under which line of the report, to which type, by which name at last and by which others on the
/// way, and whether their ids are known.
struct Way {
    line: Arc<str>,
    child: Arc<str>,
    last: Named,
    others: BTreeSet<Named>,
    is_known: bool,
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
