//! Mutating routes: which data type a write is about, and where the id of what it changes is found.

use std::{collections::BTreeMap, sync::Arc};

use http::Method;
use serde::Deserialize;

use super::{
    check::{Cause, Check},
    method::{check_method, method},
    pattern::{Param, Pattern, pattern_error},
};
use crate::{
    catalog::{Cascades, Catalogue, Change},
    error::ConfigError,
};

/// A route that changes data: after it, everything its cascades name is stale.
///
/// ```
/// # use tower_cache_aside::Mutation;
/// let update = Mutation::put("/agents/{agent_id}", "agent").include("conversations");
/// let create = Mutation::post("/agents").creates("agent").all("agents_list");
/// ```
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mutation {
    #[serde(deserialize_with = "method")]
    pub(crate) method: Method,
    pub(crate) path: String,
    #[serde(default)]
    mutates: Vec<String>,
    #[serde(default)]
    all: Vec<String>,
    #[serde(default)]
    creates: Option<String>,
    #[serde(default)]
    include: Vec<String>,
    #[serde(default)]
    entities: BTreeMap<String, String>,
    #[serde(default)]
    follows_locations: bool,
    #[serde(default)]
    refuses_with: Vec<u16>,
}

/// Stands for every method that is not safe.
const ANY: &str = "*";

impl Mutation {
    /// A mutation by any method.
    pub fn new(method: Method, path: impl Into<String>) -> Self {
        Self {
            method,
            path: path.into(),
            mutates: vec![],
            all: vec![],
            creates: None,
            include: vec![],
            entities: BTreeMap::new(),
            follows_locations: false,
            refuses_with: vec![],
        }
    }

    /// A mutation by every method that has no mutation of its own, and is not safe: all but `GET`, `HEAD`, `OPTIONS` and
    /// `TRACE`, and `QUERY`, `SEARCH`, `REPORT`, `PROPFIND` and `CONNECT`, which must be declared each for itself. In a file:
    /// `method = "*"`.
    pub fn any(path: impl Into<String>) -> Self {
        let any = Method::from_bytes(ANY.as_bytes()).unwrap_or(Method::POST);
        Self::new(any, path)
    }

    /// `PUT path` changes the entity of this data type that the path names.
    pub fn put(path: impl Into<String>, data_type: impl Into<String>) -> Self {
        Self::new(Method::PUT, path).mutates(data_type)
    }

    /// `DELETE path` removes the entity of this data type that the path names.
    pub fn delete(path: impl Into<String>, data_type: impl Into<String>) -> Self {
        Self::new(Method::DELETE, path).mutates(data_type)
    }

    /// `POST path`, which says with [`creates`](Self::creates), [`mutates`](Self::mutates) or [`all`](Self::all) what it
    /// changes.
    pub fn post(path: impl Into<String>) -> Self {
        Self::new(Method::POST, path)
    }

    /// Changes the entity of this data type that the path names: its cascade is dropped.
    #[must_use]
    pub fn mutates(mut self, data_type: impl Into<String>) -> Self {
        self.mutates.push(data_type.into());
        self
    }

    /// Changes any entry of this data type that the tenant has: all of them are dropped.
    #[must_use]
    pub fn all(mut self, data_type: impl Into<String>) -> Self {
        self.all.push(data_type.into());
        self
    }

    /// Creates an entity of this data type, which the response's `Location` names: its cascade is dropped. Without a
    /// (matching) `Location`, all entries of the type are.
    #[must_use]
    pub fn creates(mut self, data_type: impl Into<String>) -> Self {
        self.creates = Some(data_type.into());
        self
    }

    /// Follows this relation of the mutated types' cascades.
    #[must_use]
    pub fn include(mut self, relation: impl Into<String>) -> Self {
        self.include.push(relation.into());
        self
    }

    /// Which entity a path parameter names; by default the parameter without `_id`.
    #[must_use]
    pub fn entity(mut self, param: impl Into<String>, entity: impl Into<String>) -> Self {
        self.entities.insert(param.into(), entity.into());
        self
    }

    /// Also changes what the response's `Location` and `Content-Location` name, where they are on the same host (RFC 9111,
    /// section 4.4).
    #[must_use]
    pub fn follows_locations(mut self) -> Self {
        self.follows_locations = true;
        self
    }

    /// Statuses by which the handler says that it has changed nothing, besides those that always do: a 500 where the handler
    /// rolls back. Only for what nobody else says on the way: a layer inside that catches panics says 500 after a commit, one
    /// with a time-out says 503, and proxies say 502, 503, 504 and 520 to 526 of what they do not know. What they say in the
    /// handler's place would leave stale what it has written.
    #[must_use]
    pub fn refuses_with(mut self, statuses: impl IntoIterator<Item = u16>) -> Self {
        self.refuses_with.extend(statuses);
        self
    }
}

/// A compiled [`Mutation`].
#[derive(Debug)]
pub(crate) struct MutationRoute {
    pub(crate) method: Method,
    path: String,
    /// Data types, and the parameters that name their entities.
    targets: Vec<(Arc<str>, Param)>,
    pattern: Pattern,
    all: Vec<Arc<str>>,
    creates: Option<Arc<str>>,
    include: Arc<[Arc<str>]>,
    follows_locations: bool,
    refuses_with: Vec<u16>,
}

impl MutationRoute {
    pub(super) fn new(
        mutation: &Mutation,
        catalogue: &Catalogue,
        cascades: &Cascades,
        check: &mut Check<'_>,
    ) -> Result<Self, ConfigError> {
        let what = &format!("mutation {} {}", mutation.method, mutation.path);
        let pattern = Pattern::new(&mutation.path, &mutation.entities, &cascades.entities);
        let pattern = pattern.map_err(|e| pattern_error(what, &e))?;
        check_method(what, &mutation.method)?;
        if let Some(status) = mutation.refuses_with.iter().find(|status| !(400..600).contains(*status)) {
            return Err(ConfigError::new(format!(
                "{what}: {status} is no status of a refusal; refuse with one from 400 to 599, or take it out"
            )));
        }
        let types = mutation.mutates.iter().chain(&mutation.all).chain(&mutation.creates).map(String::as_str);
        for data_type in types.clone() {
            catalogue.check(what, data_type)?;
        }
        if types.clone().next().is_none() {
            return Err(ConfigError::new(format!("{what}: it mutates nothing; say what with mutates or all")));
        }
        let mut targets = vec![];
        for data_type in &mutation.mutates {
            let entity = cascades.entities.of_type(data_type);
            let param = pattern.params().iter().find(|param| check.names(param, data_type)).ok_or_else(|| {
                let called = pattern.params().iter().any(|param| param.entity == entity);
                let mend = if called || !check.is_explicit(data_type) {
                    format!("call it `{{{data_type}_id}}` here and in the routes of `{data_type}`")
                } else {
                    format!("name one `{entity}_id` (or say with `entities` that one is)")
                };
                ConfigError::new(format!(
                    "{what}: no path parameter says for certain which {entity} of `{data_type}` it mutates; {mend}, or use \
                     all"
                ))
            })?;
            targets.push((data_type.as_str().into(), param.clone()));
        }
        if let Some(created) = mutation.creates.as_ref().filter(|created| !check.has_home(created)) {
            return Err(ConfigError::new(format!(
                "{what}: it creates `{created}`, but no route of that type has a parameter for its id, which the \
                 `Location` of the response could name; declare that route, or use all"
            )));
        }
        for relation in &mutation.include {
            cascades.check_relation(what, types.clone(), relation)?;
        }
        let include: Arc<[Arc<str>]> = mutation.include.iter().map(|r| r.as_str().into()).collect();
        check.cause(&Cause {
            what,
            types: mutation.mutates.iter().chain(&mutation.creates).map(String::as_str).collect(),
            include: &include,
            all: mutation.all.iter().map(String::as_str).collect(),
        })?;
        Ok(Self {
            method: mutation.method.clone(),
            path: mutation.path.clone(),
            targets,
            pattern,
            all: mutation.all.iter().map(|t| t.as_str().into()).collect(),
            creates: mutation.creates.as_deref().map(Into::into),
            include,
            follows_locations: mutation.follows_locations,
            refuses_with: mutation.refuses_with.clone(),
        })
    }

    /// Whether it is about this method, on its own or as one of all.
    pub(crate) fn is_for(&self, method: &Method) -> bool {
        self.method == *method || self.method.as_str() == ANY
    }

    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    /// What errors and descriptions call it.
    pub(crate) fn what(&self) -> String {
        format!("{} {}", self.method, self.path)
    }

    pub(crate) fn params(&self) -> &[Param] {
        self.pattern.params()
    }

    pub(crate) fn targets(&self) -> impl Iterator<Item = &Arc<str>> {
        self.targets.iter().map(|(data_type, _)| data_type).chain(&self.creates)
    }

    pub(crate) fn all(&self) -> &[Arc<str>] {
        &self.all
    }

    pub(crate) fn include(&self) -> &[Arc<str>] {
        &self.include
    }
}

/// What becomes of a successful unsafe request that no mutation names, whose path no route reads, and of which its handler
/// says nothing ([`Changes`](crate::Changes)). (Where a route reads its path, what is there falls in any case.)
///
/// In a file: `on_unmapped = "ignore"`, `"warn"` or `"drop"`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum OnUnmapped {
    /// It changes nothing that is cached.
    Ignore,
    /// A warning names its route, once (the default).
    #[default]
    Warn,
    /// It drops everything of its tenant. A write that is mapped, and whose tenant is not known, drops everything of all.
    Drop,
}

/// What one request mutates: owned, so that it outlives the request.
#[derive(Clone, Debug)]
pub(crate) struct Mutated {
    route: Arc<MutationRoute>,
    change: Change,
}

impl Mutated {
    /// Without parameters nobody knows which entities it names.
    pub(crate) fn new(route: &Arc<MutationRoute>, params: Option<&matchit::Params<'_, '_>>) -> Self {
        let mut change = Change { all: route.all.clone(), include: route.include.to_vec(), ..Change::default() };
        for (data_type, param) in &route.targets {
            match params.and_then(|params| param.value(params)) {
                Some(id) => change.entities.push((data_type.clone(), id.into_owned())),
                // Nobody knows what the handler made of it.
                None => change.all.push(data_type.clone()),
            }
        }
        Self { route: route.clone(), change }
    }

    /// What is known of it before its handler has run: also what the creation of any entity drops whole.
    pub(crate) fn change_before(&self, cascades: &Cascades) -> Change {
        let mut change = self.change.clone();
        if let Some(data_type) = self.creates() {
            change.whole.extend(cascades.drops_whole(data_type));
        }
        change
    }

    /// What the path and the route say of it.
    pub(crate) fn change(&self) -> &Change {
        &self.change
    }

    /// The data types whose cascades it fires.
    pub(crate) fn types(&self) -> impl Iterator<Item = &str> {
        self.route.targets().chain(&self.route.all).map(|t| &**t)
    }

    /// The data type of what the `Location` of the response names.
    pub(crate) fn creates(&self) -> Option<&Arc<str>> {
        self.route.creates.as_ref()
    }

    pub(crate) fn include(&self) -> &[Arc<str>] {
        &self.route.include
    }

    pub(crate) fn refuses_with(&self) -> &[u16] {
        &self.route.refuses_with
    }

    pub(crate) fn follows_locations(&self) -> bool {
        self.route.follows_locations
    }
}
