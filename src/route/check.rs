//! That a write finds every entry that it makes stale: each route is held against what each mutation drops.
//!
//! The rule: for each mutation, and each route of each type that it drops, some tag that falls is on every entry of that
//! route: by its path, by the tags that its responses declare, or because the type falls whole. A mapping for which it does
//! not hold serves something stale after some write, so it is refused.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{pattern::Param, read::ReadRoute};
use crate::{
    catalog::{By, Cascades, Catalogue, Named, Reached},
    error::ConfigError,
};

/// Who reads entries of a type.
pub(super) enum Reader {
    Route(Arc<ReadRoute>),
    /// A gRPC method, and whether its message says what it is about.
    #[cfg(feature = "grpc")]
    Method {
        what: String,
        data_type: String,
        is_described: bool,
    },
}

impl Reader {
    fn data_type(&self) -> &str {
        match self {
            Self::Route(route) => route.data_type(),
            #[cfg(feature = "grpc")]
            Self::Method { data_type, .. } => data_type,
        }
    }
}

/// A change that is declared: what causes it, of which types' entities, with which relations, and what falls whole anyway.
pub(super) struct Cause<'a> {
    pub(super) what: &'a str,
    pub(super) types: Vec<&'a str>,
    pub(super) include: &'a [Arc<str>],
    pub(super) all: Vec<&'a str>,
}

/// What writes count on that entries are tagged with.
#[derive(Debug, Default)]
pub(crate) struct Expected {
    /// By data type: the entities that each entry must name besides its own.
    needed: BTreeMap<String, BTreeSet<Arc<str>>>,
    /// By data type: the entities that some write drops it by.
    useful: BTreeMap<String, BTreeSet<Arc<str>>>,
    /// Types whose entities cannot be told by id, alone or with one of their relations: of what type entries stay, and why.
    unnamed: BTreeMap<(String, Option<Arc<str>>), Stays>,
}

/// Of what type entries stay, and why.
type Stays = (Arc<str>, ConfigError);

impl Expected {
    /// The entities that entries of this type must name besides their own.
    pub(crate) fn needed(&self, data_type: &str) -> impl Iterator<Item = &Arc<str>> {
        self.needed.get(data_type).into_iter().flatten()
    }

    /// An entity that entries of this type must name besides their own, and that this one does not.
    pub(crate) fn missing(&self, data_type: &str, named: impl Fn(&str) -> bool) -> Option<&Arc<str>> {
        self.needed(data_type).find(|entity| !named(entity))
    }

    /// Whether some write drops entries of this type by this entity.
    pub(crate) fn is_useful(&self, data_type: &str, entity: &str) -> bool {
        self.useful.get(data_type).is_some_and(|useful| useful.contains(entity))
    }

    /// Whether entities of this type can be told by id.
    pub(crate) fn check_named(&self, data_type: &str) -> Result<(), ConfigError> {
        self.check(data_type, None, &[])
    }

    /// Whether a change of one entity of this type finds everything, with this relation, and where these types fall whole.
    pub(crate) fn check(
        &self,
        data_type: &str,
        relation: Option<&Arc<str>>,
        all: &[Arc<str>],
    ) -> Result<(), ConfigError> {
        match self.unnamed.get(&(data_type.to_owned(), relation.cloned())) {
            Some((stays, error)) if !all.contains(stays) => Err(error.clone()),
            _ => Ok(()),
        }
    }
}

/// Holds the readers against what writes drop.
pub(super) struct Check<'a> {
    cascades: &'a Cascades,
    readers: &'a [Reader],
    /// By type: the parameter that is its resource.
    homes: BTreeMap<&'a str, Param>,
    expected: Expected,
}

impl<'a> Check<'a> {
    pub(super) fn new(cascades: &'a Cascades, readers: &'a [Reader], homes: BTreeMap<&'a str, Param>) -> Self {
        Self { cascades, readers, homes, expected: Expected::default() }
    }

    /// Whether a parameter names an entity as the routes of its own type do.
    pub(super) fn names(&self, param: &Param, of: &str) -> bool {
        match self.homes.get(of) {
            Some(home) => param.is_like(home),
            None => param.entity == self.cascades.entities.of_type(of),
        }
    }

    /// Whether the parameter that is a type's resource says of what.
    pub(super) fn is_explicit(&self, of: &str) -> bool {
        self.homes.get(of).is_none_or(Param::is_explicit)
    }

    /// Whether the ids of a type are those that are named by this.
    fn is_own(&self, data_type: &str, named: &Named) -> bool {
        let of_type = self.cascades.entities.of_type(data_type);
        match (self.homes.get(data_type), self.homes.get(&*named.of)) {
            (Some(home), Some(other)) => home.is_like(other),
            _ => *of_type == *named.entity,
        }
    }

    /// Whether a type has a route whose resource a `Location` can name.
    pub(super) fn has_home(&self, data_type: &str) -> bool {
        self.homes.contains_key(data_type)
    }

    /// Checks one declared change.
    pub(super) fn cause(&mut self, cause: &Cause<'_>) -> Result<(), ConfigError> {
        self.try_cause(cause).map_err(|(_, error)| error)
    }

    /// The same; else of what type entries stay, and why.
    fn try_cause(&mut self, cause: &Cause<'_>) -> Result<(), Stays> {
        let reach =
            |types: &[&str]| types.iter().flat_map(|t| self.cascades.reach(t, cause.include)).collect::<Vec<_>>();
        let reached = reach(&cause.types);
        let falls_whole = reach(&cause.all).into_iter().chain(reached.iter().filter(|r| r.by == By::Whole).cloned());
        let whole: BTreeSet<_> = falls_whole.map(|r| r.data_type).collect();
        for one in reached.iter().filter(|one| !whole.contains(&one.data_type)) {
            let By::Entity(any) = &one.by else { continue };
            let Some(named) = any.last() else { continue };
            let of_type = |reader: &&Reader| reader.data_type() == &*one.data_type;
            if let Some(reader) = self.readers.iter().filter(of_type).find(|reader| !self.is_found(reader, named)) {
                return Err((one.data_type.clone(), self.not_found(cause.what, one, named, reader)));
            }
            if !self.is_own(&one.data_type, named) {
                self.expected.needed.entry(one.data_type.to_string()).or_default().insert(named.entity.clone());
            }
        }
        Ok(())
    }

    fn is_found(&self, reader: &Reader, named: &Named) -> bool {
        match reader {
            Reader::Route(route) => {
                route.declares_tags || route.params().iter().any(|param| self.names(param, &named.of))
            }
            #[cfg(feature = "grpc")]
            Reader::Method { is_described, .. } => *is_described,
        }
    }

    /// Every type may be mutated by hand, with every relation: what such changes find, and which of them cannot be.
    pub(super) fn finish(mut self, catalogue: &Catalogue) -> Expected {
        let types: BTreeSet<_> = catalogue.names().chain(self.cascades.declared().map(|t| &**t)).collect();
        for data_type in types {
            for one in self.cascades.reach(data_type, &self.cascades.relations(data_type)) {
                if let By::Entity(any) = one.by {
                    let useful = self.expected.useful.entry(one.data_type.to_string()).or_default();
                    useful.extend(any.into_iter().map(|named| named.entity));
                }
            }
            let relations = self.cascades.relations(data_type).into_iter().map(Some);
            for relation in relations.chain([None]) {
                let (what, include) = (format!("invalidation of one `{data_type}`"), Vec::from_iter(relation.clone()));
                let by_hand = Cause { what: &what, types: vec![data_type], include: &include, all: vec![] };
                if let Err(stays) = self.try_cause(&by_hand) {
                    self.expected.unnamed.insert((data_type.to_owned(), relation), stays);
                }
            }
        }
        self.expected
    }

    fn not_found(&self, what: &str, one: &Reached, named: &Named, reader: &Reader) -> ConfigError {
        let (data_type, entity) = (&one.data_type, &named.entity);
        let how = one.relation.as_ref().map_or(String::new(), |name| format!(", which its relation `{name}` leads to"));
        let resolve = match &one.relation {
            Some(relation) if named.of != one.data_type => format!(", give `{relation}` a resolver"),
            _ => String::new(),
        };
        ConfigError::new(match reader {
            Reader::Route(route) if route.params().iter().any(|param| param.entity == **entity) => format!(
                "{what}: it drops `{data_type}`{how} by {entity}, but the `{{{entity}}}` of {} may be another thing's than that \
                 of `{}`: call both parameters after what they name, such as `{{{}_id}}`, or say so with `entities`",
                route.what(),
                named.of,
                named.of
            ),
            Reader::Route(route) => format!(
                "{what}: it drops `{data_type}`{how} by {entity}, but {} does not say which {entity} its entries belong to, \
                 so they would stay: name a path parameter `{entity}_id` (or say with `entities` that one is), let the route \
                 declare tags{resolve}, or drop the type whole with `all` (for a list: a type of its own)",
                route.what()
            ),
            #[cfg(feature = "grpc")]
            Reader::Method { what: method, .. } => format!(
                "{what}: it drops `{data_type}`{how} by {entity}, but {method} does not say which {entity} its entries \
                 belong to, so they would stay: describe its `message`{resolve}, or give it a type of its own which the \
                 cascade drops whole with `all`"
            ),
        })
    }
}
