//! From a request to what it means for the cache: which data type, whose tenant, which entities, which variant.
//!
//! [`Route`]s say what may be cached and [`Mutation`]s what makes it stale; both are plain data. [`Routes`] is their
//! compiled form: two path matchers (reads and writes), so that a request that is neither costs one look-up.

mod check;
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

use std::{
    collections::{BTreeMap, btree_map},
    sync::Arc,
};

use http::{Method, Uri};

use crate::{
    catalog::{Cascades, Catalogue, Entities},
    error::ConfigError,
};
use check::{Cause, Check, Expected, Reader};
use pattern::Pattern;

/// All routes, compiled.
#[derive(Debug, Default)]
pub(crate) struct Routes {
    reads: matchit::Router<Arc<ReadRoute>>,
    /// Per path, the mutating methods.
    writes: matchit::Router<Vec<Arc<MutationRoute>>>,
    #[cfg(feature = "grpc")]
    grpc: BTreeMap<String, Arc<GrpcRoute>>,
    /// As they were declared.
    pub(crate) declared: Declared,
    pub(crate) expected: Expected,
}

/// Reads and mutations in the order in which they were declared.
#[derive(Debug, Default)]
pub(crate) struct Declared {
    pub(crate) reads: Vec<Arc<ReadRoute>>,
    pub(crate) mutations: Vec<Arc<MutationRoute>>,
}

/// What is declared to a cache of what it reads and writes.
#[derive(Clone, Copy)]
pub(crate) struct Table<'a> {
    pub(crate) routes: &'a [Route],
    pub(crate) mutations: &'a [Mutation],
    #[cfg(feature = "grpc")]
    pub(crate) grpc: &'a [GrpcMethod],
}

/// Which entity the resource of each data type is, where routes say so: the one called like the type, if there is one.
pub(crate) fn entities(routes: &[Route]) -> BTreeMap<String, String> {
    let mut entities = BTreeMap::new();
    for route in routes {
        let pattern = Pattern::new(&route.path, &route.entities, &Entities::default()).ok();
        let resource = pattern.as_ref().and_then(|p| p.resource(route.resource.as_deref()));
        let Some(entity) = resource.map(|param| param.entity.clone()) else { continue };
        match entities.entry(route.data_type.clone()) {
            btree_map::Entry::Vacant(free) => _ = free.insert(entity),
            btree_map::Entry::Occupied(mut other) if entity == route.data_type => _ = other.insert(entity),
            btree_map::Entry::Occupied(_) => {}
        }
    }
    entities
}

impl Routes {
    pub(crate) fn new(catalogue: &Catalogue, cascades: &Cascades, table: Table<'_>) -> Result<Self, ConfigError> {
        let mut this = Self::default();
        this.add_reads(catalogue, cascades, table.routes)?;
        let readers = this.declared.reads.iter().cloned().map(Reader::Route);
        #[cfg(feature = "grpc")]
        let readers = readers.chain(table.grpc.iter().filter_map(GrpcMethod::reader));
        let readers: Vec<_> = readers.collect();
        let mut check = Check::new(cascades, &readers);
        this.add_writes(catalogue, cascades, table.mutations, &mut check)?;
        #[cfg(feature = "grpc")]
        this.add_grpc(catalogue, cascades, table.grpc, &mut check)?;
        this.check_cascades(cascades, &mut check)?;
        this.expected = check.finish(catalogue);
        Ok(this)
    }

    fn add_reads(&mut self, catalogue: &Catalogue, cascades: &Cascades, routes: &[Route]) -> Result<(), ConfigError> {
        let mut ids = BTreeMap::new();
        for route in routes {
            let compiled = Arc::new(ReadRoute::new(route, catalogue, &cascades.entities)?);
            let what = format!("route {}", compiled.what());
            if let Some(other) = ids.insert(compiled.id().to_vec(), &route.path).filter(|o| *o != &route.path) {
                return Err(ConfigError::new(format!("{what}: its hash equals that of {other}; rename a parameter")));
            }
            self.reads.insert(route.path.clone(), compiled.clone()).map_err(|e| insert_error(&what, &e))?;
            self.declared.reads.push(compiled);
        }
        Ok(())
    }

    fn add_writes(
        &mut self,
        catalogue: &Catalogue,
        cascades: &Cascades,
        mutations: &[Mutation],
        check: &mut Check<'_>,
    ) -> Result<(), ConfigError> {
        let mut writes: BTreeMap<&str, Vec<Arc<MutationRoute>>> = BTreeMap::new();
        for mutation in mutations {
            let compiled = Arc::new(MutationRoute::new(mutation, catalogue, cascades, check)?);
            let methods = writes.entry(&mutation.path).or_default();
            if methods.iter().any(|m| m.method == compiled.method) {
                let what = compiled.what();
                return Err(ConfigError::new(format!("mutation {what} is declared twice; make it one")));
            }
            methods.push(compiled.clone());
            self.declared.mutations.push(compiled);
        }
        for (path, methods) in writes {
            let what = format!("mutation {} {path}", methods[0].method);
            self.writes.insert(path, methods).map_err(|e| insert_error(&what, &e))?;
        }
        Ok(())
    }

    #[cfg(feature = "grpc")]
    fn add_grpc(
        &mut self,
        catalogue: &Catalogue,
        cascades: &Cascades,
        methods: &[GrpcMethod],
        check: &mut Check<'_>,
    ) -> Result<(), ConfigError> {
        self.grpc = GrpcRoute::compile(methods, catalogue, cascades, check)?;
        Ok(())
    }

    /// Cascades may be fired by hand too, with any of their relations or none. What all mutations of a type drop whole anyway, its
    /// own cascade need not find.
    fn check_cascades(&self, cascades: &Cascades, check: &mut Check<'_>) -> Result<(), ConfigError> {
        for data_type in cascades.declared() {
            let of_type = self.declared.mutations.iter().filter(|m| m.targets().any(|t| t == data_type));
            let all: Vec<_> = of_type.flat_map(|m| m.all()).map(|t| &**t).collect();
            let (what, relations) = (format!("cascade `{data_type}`"), cascades.relations(data_type));
            for include in [&relations[..], &[]] {
                check.cause(&Cause { what: &what, types: vec![&**data_type], include, all: all.clone() })?;
            }
        }
        Ok(())
    }

    #[cfg(feature = "grpc")]
    pub(crate) fn grpc(&self, path: &str) -> Option<&Arc<GrpcRoute>> {
        self.grpc.get(path)
    }

    #[cfg(feature = "grpc")]
    pub(crate) fn grpc_methods(&self) -> impl Iterator<Item = &Arc<GrpcRoute>> {
        self.grpc.values()
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

fn insert_error(what: &str, error: &matchit::InsertError) -> ConfigError {
    ConfigError::new(match error {
        matchit::InsertError::Conflict { with } => {
            format!("{what}: conflicts with the route {with}, which matches the same paths; remove one of them")
        }
        other => format!("{what}: bad pattern: {other}; write parameters as {{name}}, one per segment"),
    })
}
