//! Mutating routes: which data type a write is about, and where the id of what it changes is found.

use std::{collections::BTreeMap, sync::Arc};

use http::Method;
use serde::{Deserialize, Deserializer, de};
use smallvec::SmallVec;

use super::pattern::{Pattern, pattern_error, value};
use crate::{
    catalog::{Cascades, Catalogue},
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
}

/// Stands for every method that is not safe.
const ANY: &str = "*";

fn method<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Method, D::Error> {
    let text = String::deserialize(deserializer)?;
    Method::from_bytes(text.as_bytes()).map_err(|_| de::Error::custom(format!("`{text}` is not an HTTP method")))
}

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
        }
    }

    /// A mutation by every method that is not safe (all but `GET`, `HEAD`, `OPTIONS` and `TRACE`) and has no mutation of
    /// its own. In a file: `method = "*"`.
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
}

/// A compiled [`Mutation`].
#[derive(Debug)]
pub(crate) struct MutationRoute {
    pub(crate) method: Method,
    /// (data type, path parameter).
    targets: Vec<(String, String)>,
    all: Vec<String>,
    creates: Option<String>,
    include: Arc<[Arc<str>]>,
    follows_locations: bool,
}

impl MutationRoute {
    /// Whether it is about this method, on its own or as one of all.
    pub(crate) fn is_for(&self, method: &Method) -> bool {
        self.method == *method || self.method.as_str() == ANY
    }
}

impl MutationRoute {
    pub(crate) fn new(
        what: &str,
        mutation: &Mutation,
        catalogue: &Catalogue,
        cascades: &Cascades,
    ) -> Result<Self, ConfigError> {
        let pattern = Pattern::new(&mutation.path, &mutation.entities).map_err(|e| pattern_error(what, &e))?;
        if mutation.method.is_safe() {
            return Err(ConfigError::new(format!("{what}: {} is a safe method; use another", mutation.method)));
        }
        let types = mutation.mutates.iter().chain(&mutation.all).chain(&mutation.creates);
        for data_type in types.clone() {
            catalogue.check(what, data_type)?;
        }
        if types.clone().next().is_none() {
            return Err(ConfigError::new(format!("{what}: it mutates nothing; say what with mutates or all")));
        }
        let mut targets = vec![];
        for data_type in &mutation.mutates {
            let entity = cascades.entity_of(data_type);
            let param = pattern.params().iter().find(|(_, e)| e == entity).ok_or_else(|| {
                ConfigError::new(format!(
                    "{what}: no path parameter says which {entity} of `{data_type}` it mutates; name one \
                     `{entity}_id`, or use all"
                ))
            })?;
            targets.push((data_type.clone(), param.0.clone()));
        }
        for relation in &mutation.include {
            if !types.clone().any(|t| cascades.relations(t).contains(&relation.as_str())) {
                let known: Vec<_> = types.clone().flat_map(|t| cascades.relations(t)).collect();
                return Err(ConfigError::new(format!(
                    "{what}: no cascade of what it mutates has a relation `{relation}`; use one of: {}",
                    known.join(", ")
                )));
            }
        }
        Ok(Self {
            method: mutation.method.clone(),
            targets,
            all: mutation.all.clone(),
            creates: mutation.creates.clone(),
            include: mutation.include.iter().map(|r| r.as_str().into()).collect(),
            follows_locations: mutation.follows_locations,
        })
    }
}

/// What one request mutates: owned, so that it outlives the request.
#[derive(Debug)]
pub(crate) struct Mutated {
    route: Arc<MutationRoute>,
    ids: SmallVec<[Vec<u8>; 2]>,
}

impl Mutated {
    pub(crate) fn new(route: &Arc<MutationRoute>, params: &matchit::Params<'_, '_>) -> Self {
        let ids = route.targets.iter().map(|(_, param)| value(params, param).into_owned()).collect();
        Self { route: route.clone(), ids }
    }

    /// (data type, id) of what the path names.
    pub(crate) fn entities(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.route.targets.iter().zip(&self.ids).map(|((t, _), id)| (&**t, &**id))
    }

    /// The data types whose cascades it fires.
    pub(crate) fn types(&self) -> impl Iterator<Item = &str> {
        let named = self.route.targets.iter().map(|(t, _)| t.as_str());
        named.chain(self.creates()).chain(self.all().iter().map(String::as_str))
    }

    pub(crate) fn all(&self) -> &[String] {
        &self.route.all
    }

    /// The data type of what the `Location` of the response names.
    pub(crate) fn creates(&self) -> Option<&str> {
        self.route.creates.as_deref()
    }

    pub(crate) fn include(&self) -> &[Arc<str>] {
        &self.route.include
    }

    pub(crate) fn follows_locations(&self) -> bool {
        self.route.follows_locations
    }
}
