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
use mutation::is_unsafe;
pub(crate) use mutation::{Mutated, MutationRoute};
pub use mutation::{Mutation, OnUnmapped};
pub use query::Query;
pub use read::{Credentials, Route};
pub(crate) use read::{ReadRoute, Wanted, variant_key};
pub(crate) use tenant::TenantSource;

use std::{
    collections::{BTreeMap, BTreeSet, btree_map},
    sync::Arc,
};

use http::{Method, Uri};

use crate::{
    catalog::{Cascades, Catalogue, Change, Entities},
    error::ConfigError,
};
use check::{Cause, Check, Expected, Reader};
use pattern::{Param, Pattern};

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

/// The parameters by which routes name the resource of each data type: the one called like the type, if there is one.
fn homes(routes: &[Route]) -> BTreeMap<&str, Param> {
    let mut homes = BTreeMap::new();
    for route in routes {
        let pattern = Pattern::new(&route.path, &route.entities, &Entities::default()).ok();
        let resource = pattern.as_ref().and_then(|p| p.resource(route.resource.as_deref()));
        let Some(param) = resource.cloned() else { continue };
        match homes.entry(route.data_type.as_str()) {
            btree_map::Entry::Vacant(free) => _ = free.insert(param),
            btree_map::Entry::Occupied(mut other) => {
                if param.entity == route.data_type && other.get().entity != param.entity {
                    other.insert(param);
                }
            }
        }
    }
    homes
}

/// Which entity the resource of each data type is, where routes say so.
pub(crate) fn entities(routes: &[Route]) -> BTreeMap<String, String> {
    homes(routes).into_iter().map(|(data_type, param)| (data_type.to_owned(), param.entity)).collect()
}

impl Routes {
    pub(crate) fn new(catalogue: &Catalogue, cascades: &Cascades, table: Table<'_>) -> Result<Self, ConfigError> {
        let mut this = Self::default();
        let homes = homes(table.routes);
        this.add_reads(catalogue, cascades, table.routes, &homes)?;
        let readers = this.declared.reads.iter().cloned().map(Reader::Route);
        #[cfg(feature = "grpc")]
        let readers = readers.chain(table.grpc.iter().filter_map(GrpcMethod::reader));
        let readers: Vec<_> = readers.collect();
        let mut check = Check::new(cascades, &readers, homes);
        this.add_writes(catalogue, cascades, table.mutations, &mut check)?;
        #[cfg(feature = "grpc")]
        this.add_grpc(catalogue, cascades, table.grpc, &mut check)?;
        this.check_cascades(cascades, &mut check)?;
        this.check_entities(catalogue, cascades)?;
        this.expected = check.finish(catalogue);
        Ok(this)
    }

    fn add_reads(
        &mut self,
        catalogue: &Catalogue,
        cascades: &Cascades,
        routes: &[Route],
        homes: &BTreeMap<&str, Param>,
    ) -> Result<(), ConfigError> {
        let mut ids = BTreeMap::new();
        for route in routes {
            let compiled =
                Arc::new(ReadRoute::new(route, catalogue, &cascades.entities, homes.get(&*route.data_type))?);
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

    /// A canonical form that is never applied would be worse than none.
    fn check_entities(&self, catalogue: &Catalogue, cascades: &Cascades) -> Result<(), ConfigError> {
        let of_routes = self.declared.reads.iter().flat_map(|route| route.params());
        let of_mutations = self.declared.mutations.iter().flat_map(|mutation| mutation.params());
        let params: Vec<_> = of_routes.chain(of_mutations).map(|param| &*param.entity).collect();
        let own: Vec<_> = catalogue.known().map(|data_type| cascades.entities.of_type(data_type)).collect();
        match cascades.entities.declared().find(|entity| !params.contains(entity) && !own.contains(entity)) {
            None => Ok(()),
            Some(unknown) => Err(ConfigError::new(format!(
                "entity `{unknown}`: nothing names it, so its ids would keep all their spellings; call the path parameter \
                 `{{{unknown}_id}}` (or say with `entities` that one is), or use one of: {}",
                params.iter().chain(&own).copied().collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>().join(", ")
            ))),
        }
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

    /// What a request changes, as far as that is declared; `None` if it may change nothing, or nothing that is not seen to
    /// elsewhere.
    pub(crate) fn written(&self, method: &Method, uri: &Uri) -> Option<Written> {
        if method.is_safe() {
            return None;
        }
        let is_unsafe = is_unsafe(method);
        if let Ok(found) = self.writes.at(uri.path()) {
            let own = found.value.iter().find(|m| m.method == *method);
            let any = || found.value.iter().find(|m| is_unsafe && m.is_for(method));
            if let Some(route) = own.or_else(any) {
                return Some(Written::Declared(Mutated::new(route, &found.params)));
            }
        }
        // The layer of gRPC knows which of its calls are reads.
        #[cfg(feature = "grpc")]
        let is_unsafe = is_unsafe && self.grpc(uri.path()).is_none();
        is_unsafe.then(|| self.locate(uri.path()).map_or(Written::Unmapped, Written::Read))
    }

    /// A change of what a path names, as the read routes know it; of the whole type, where it does not name one by its id.
    pub(crate) fn locate(&self, path: &str) -> Option<Change> {
        let found = self.reads.at(path).ok()?;
        let data_type: Arc<str> = found.value.data_type().into();
        let is_named = self.expected.check_named(&data_type).is_ok();
        Some(match found.value.own_id(&found.params).filter(|_| is_named) {
            Some(id) => Change::entity(data_type, id),
            None => Change::all(data_type),
        })
    }
}

/// What an unsafe request changes.
#[derive(Debug)]
pub(crate) enum Written {
    /// What a mutation says.
    Declared(Mutated),
    /// What is read under its path (RFC 9111, section 4.4).
    Read(Change),
    Unmapped,
}

fn insert_error(what: &str, error: &matchit::InsertError) -> ConfigError {
    ConfigError::new(match error {
        matchit::InsertError::Conflict { with } => {
            format!("{what}: conflicts with the route {with}, which matches the same paths; remove one of them")
        }
        other => format!("{what}: bad pattern: {other}; write parameters as {{name}}, one per segment"),
    })
}
