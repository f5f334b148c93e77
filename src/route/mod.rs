//! From a request to what it means for the cache: which data type, whose tenant, which entities, which variant.
//!
//! [`Route`]s say what may be cached and [`Mutation`]s what makes it stale; both are plain data. [`Routes`] is their
//! compiled form: two path matchers (reads and writes), so that a request that is neither costs one look-up.

#[cfg(feature = "grpc")]
mod grpc;
mod mutation;
mod pattern;
mod query;
mod read;
mod tenant;

#[cfg(feature = "grpc")]
pub use grpc::{GrpcMethod, GrpcTarget};
#[cfg(feature = "grpc")]
pub(crate) use grpc::{GrpcRoute, GrpcWanted};
pub use mutation::Mutation;
pub(crate) use mutation::{Mutated, MutationRoute};
pub use query::Query;
pub use read::{Credentials, Route};
pub(crate) use read::{ReadRoute, Wanted, variant_key};
pub(crate) use tenant::TenantSource;

use std::{collections::BTreeMap, sync::Arc};

use http::{Method, Uri};

use crate::{
    catalog::{Cascades, Catalogue},
    error::ConfigError,
};
use pattern::Pattern;

/// All routes, compiled.
#[derive(Debug, Default)]
pub(crate) struct Routes {
    reads: matchit::Router<Arc<ReadRoute>>,
    /// Per path, the mutating methods.
    writes: matchit::Router<Vec<Arc<MutationRoute>>>,
    #[cfg(feature = "grpc")]
    grpc: std::collections::HashMap<String, Arc<GrpcRoute>>,
}

/// Which entity the resource of each data type is, where routes say so.
pub(crate) fn entities(routes: &[Route]) -> BTreeMap<String, String> {
    let mut entities = BTreeMap::new();
    for route in routes {
        let pattern = Pattern::new(&route.path, &route.entities).ok();
        if let Some(entity) = pattern.and_then(|p| p.entity(route.resource.as_deref()).map(str::to_owned)) {
            entities.entry(route.data_type.clone()).or_insert(entity);
        }
    }
    entities
}

impl Routes {
    pub(crate) fn new(
        catalogue: &Catalogue,
        cascades: &Cascades,
        routes: &[Route],
        mutations: &[Mutation],
    ) -> Result<Self, ConfigError> {
        let mut this = Self::default();
        this.add_reads(catalogue, routes)?;
        for cascade in cascades.declared() {
            for dropped in cascades.direct(cascade) {
                check_drop(cascades, cascade, dropped, routes)?;
            }
        }
        this.add_writes(catalogue, cascades, mutations)?;
        Ok(this)
    }

    fn add_reads(&mut self, catalogue: &Catalogue, routes: &[Route]) -> Result<(), ConfigError> {
        let mut ids = BTreeMap::new();
        for route in routes {
            let what = format!("route GET {}", route.path);
            catalogue.check(&what, &route.data_type)?;
            let compiled = ReadRoute::new(&what, route, catalogue)?;
            if let Some(other) = ids.insert(compiled.id().to_vec(), &route.path).filter(|o| *o != &route.path) {
                return Err(ConfigError::new(format!("{what}: its hash equals that of {other}; rename a parameter")));
            }
            self.reads.insert(route.path.clone(), compiled.into()).map_err(|e| insert_error(&what, &e))?;
        }
        Ok(())
    }

    fn add_writes(
        &mut self,
        catalogue: &Catalogue,
        cascades: &Cascades,
        mutations: &[Mutation],
    ) -> Result<(), ConfigError> {
        let mut writes: BTreeMap<&str, Vec<Arc<MutationRoute>>> = BTreeMap::new();
        for mutation in mutations {
            let what = format!("mutation {} {}", mutation.method, mutation.path);
            let compiled = MutationRoute::new(&what, mutation, catalogue, cascades)?;
            let methods = writes.entry(&mutation.path).or_default();
            if methods.iter().any(|m| m.method == compiled.method) {
                return Err(ConfigError::new(format!("{what} is declared twice; make it one")));
            }
            methods.push(compiled.into());
        }
        for (path, methods) in writes {
            let what = format!("mutation {} {path}", methods[0].method);
            self.writes.insert(path, methods).map_err(|e| insert_error(&what, &e))?;
        }
        Ok(())
    }

    #[cfg(feature = "grpc")]
    pub(crate) fn with_grpc(
        self,
        methods: &[GrpcMethod],
        catalogue: &Catalogue,
        cascades: &Cascades,
    ) -> Result<Self, ConfigError> {
        Ok(Self { grpc: GrpcRoute::compile(methods, catalogue, cascades)?, ..self })
    }

    #[cfg(feature = "grpc")]
    pub(crate) fn grpc(&self, path: &str) -> Option<&Arc<GrpcRoute>> {
        self.grpc.get(path)
    }

    pub(crate) fn read<'m>(&'m self, uri: &'m Uri) -> Option<matchit::Match<'m, 'm, &'m Arc<ReadRoute>>> {
        self.reads.at(uri.path()).ok()
    }

    pub(crate) fn write(&self, method: &Method, uri: &Uri) -> Option<Mutated> {
        if method.is_safe() {
            return None;
        }
        let found = self.writes.at(uri.path()).ok()?;
        let own = found.value.iter().find(|m| m.method == *method);
        let route = own.or_else(|| found.value.iter().find(|m| m.is_for(method)))?;
        Some(Mutated::new(route, &found.params))
    }

    /// The data type and the id of what a path names, as the read routes know it: how a `Location` names what was created.
    pub(crate) fn locate(&self, path: &str) -> Option<(&str, Vec<u8>)> {
        let found = self.reads.at(path).ok()?;
        Some((found.value.data_type(), found.value.resource(&found.params)?))
    }
}

/// A cascade that drops a type by an entity that none of its routes names would silently drop nothing.
fn check_drop(cascades: &Cascades, cascade: &str, dropped: &str, routes: &[Route]) -> Result<(), ConfigError> {
    let entity = cascades.entity_of(cascade);
    let mut of_type = routes.iter().filter(|r| r.data_type == dropped).peekable();
    let names_it = |route: &Route| {
        route.declares_tags || Pattern::new(&route.path, &route.entities).is_ok_and(|p| p.names(entity))
    };
    if of_type.peek().is_none() || of_type.any(names_it) {
        return Ok(());
    }
    Err(ConfigError::new(format!(
        "cascade `{cascade}`: it drops `{dropped}` of one {entity}, but no route of `{dropped}` says which {entity} its \
         entries belong to; name a path parameter `{entity}_id`, let the route declare tags, or drop all of it"
    )))
}

fn insert_error(what: &str, error: &matchit::InsertError) -> ConfigError {
    ConfigError::new(match error {
        matchit::InsertError::Conflict { with } => {
            format!("{what}: conflicts with the route {with}, which matches the same paths; remove one of them")
        }
        other => format!("{what}: bad pattern: {other}; write parameters as {{name}}, one per segment"),
    })
}
