//! From a request to what it means for the cache: which data type, whose tenant, which entities, which variant.
//!
//! [`Route`]s say what may be cached and [`Mutation`]s what makes it stale; both are plain data. [`Routes`] is their
//! compiled form: two path matchers (reads and writes), so that a request that is neither costs one look-up.

mod body;
mod check;
#[cfg(feature = "grpc")]
mod grpc;
mod hosts;
mod identity;
mod method;
mod mutation;
mod pattern;
mod place;
mod query;
mod read;
mod tenant;

pub use body::BodyKey;

#[cfg(feature = "grpc")]
pub use grpc::{GrpcMethod, GrpcTarget};
#[cfg(feature = "grpc")]
pub(crate) use grpc::{GrpcRoute, GrpcWanted};
pub use hosts::Hosts;
pub use identity::Credentials;
pub(crate) use identity::{Identity, UserFrom};
use method::is_unsafe;
pub(crate) use mutation::{Mutated, MutationRoute};
pub use mutation::{Mutation, OnUnmapped};
use place::Found;
pub(crate) use place::Place;
pub(crate) use place::is_same;
pub use query::Query;
pub use read::Route;
pub(crate) use read::{At, Known, ReadRoute, Wanted, variant_key};
pub(crate) use tenant::TenantSource;

use std::{
    collections::{BTreeMap, BTreeSet, btree_map},
    sync::Arc,
};

use http::Method;

use crate::{
    catalog::{Cascades, Catalogue, Change, Entities},
    error::ConfigError,
    observe::Tellers,
};
use check::{Cause, Check, Expected, Reader};
#[cfg(any(test, fuzzing))]
pub(crate) use pattern::MOST_PARAMS;
pub(crate) use pattern::Pattern;
use pattern::{Param, pattern_error};

/// All routes, compiled.
#[derive(Debug, Default)]
pub(crate) struct Routes {
    reads: matchit::Router<OfPath<ReadRoute>>,
    writes: matchit::Router<OfPath<MutationRoute>>,
    #[cfg(feature = "grpc")]
    grpc: BTreeMap<String, Arc<GrpcRoute>>,
    /// As they were declared.
    pub(crate) declared: Declared,
    pub(crate) expected: Expected,
}

/// What is declared of one path pattern, by method.
#[derive(Debug)]
struct OfPath<T> {
    pattern: String,
    routes: Vec<Arc<T>>,
}

impl<T> place::Pattern for OfPath<T> {
    fn pattern(&self) -> &str {
        &self.pattern
    }
}

/// What a path is read by.
pub(crate) struct Read<'k, 'p> {
    /// By this method; `None` if only by others.
    pub(crate) route: Option<&'k Arc<ReadRoute>>,
    /// By any.
    pub(crate) any: &'k ReadRoute,
    pub(crate) params: matchit::Params<'k, 'p>,
    pub(crate) mount: &'p str,
    /// The router does not say that it is another route.
    pub(crate) is_certain: bool,
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
    /// Paths that routes match, and that are not cached.
    pub(crate) uncached: &'a [String],
    pub(crate) mutations: &'a [Mutation],
    pub(crate) identity: &'a Identity,
    pub(crate) tellers: &'a Tellers,
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
        this.add_reads(catalogue, cascades, table, &homes)?;
        let readers = this.declared.reads.iter().cloned().map(Reader::Route);
        #[cfg(feature = "grpc")]
        let readers = readers.chain(table.grpc.iter().filter_map(GrpcMethod::reader));
        let readers: Vec<_> = readers.collect();
        let mut check = Check::new(cascades, &readers, homes);
        this.add_writes(catalogue, cascades, table.mutations, &mut check)?;
        this.check_methods()?;
        #[cfg(feature = "grpc")]
        this.add_grpc(catalogue, cascades, table, &mut check)?;
        this.check_cascades(cascades, &mut check)?;
        this.check_entities(catalogue, cascades)?;
        this.expected = check.finish(catalogue);
        Ok(this)
    }

    fn add_reads(
        &mut self,
        catalogue: &Catalogue,
        cascades: &Cascades,
        table: Table<'_>,
        homes: &BTreeMap<&str, Param>,
    ) -> Result<(), ConfigError> {
        let mut ids = BTreeMap::new();
        let mut reads: BTreeMap<&str, Vec<Arc<ReadRoute>>> = BTreeMap::new();
        for route in table.routes {
            let home = homes.get(&*route.data_type);
            let compiled =
                Arc::new(ReadRoute::new(route, catalogue, &cascades.entities, (table.identity, table.tellers), home)?);
            let what = format!("route {}", compiled.what());
            let of_path = reads.entry(&route.path).or_default();
            if of_path.iter().any(|other| other.what() == compiled.what()) {
                return Err(ConfigError::new(format!("{what} is declared twice; remove one of them")));
            }
            if let Some(other) = ids.insert(compiled.id().to_vec(), compiled.what()) {
                return Err(ConfigError::new(format!("{what}: its hash equals that of {other}; rename a parameter")));
            }
            of_path.push(compiled.clone());
            self.declared.reads.push(compiled);
        }
        for path in table.uncached {
            let what = format!("uncached {path}");
            let any: String =
                path.split('/').map(|part| if part.contains('{') { "x" } else { part }).collect::<Vec<_>>().join("/");
            let is_read = |pattern: &str| {
                let mut router = matchit::Router::new();
                router.insert(pattern, ()).is_ok() && router.at(&any).is_ok()
            };
            if !table.routes.iter().any(|route| is_read(&route.path)) {
                return Err(ConfigError::new(format!(
                    "{what}: no route matches that path anyway; mend it, or take it out"
                )));
            }
            Pattern::new(path, &BTreeMap::new(), &cascades.entities).map_err(|e| pattern_error(&what, &e))?;
            if reads.insert(path, vec![]).is_some() {
                return Err(ConfigError::new(format!(
                    "{what}: it is declared twice, or a route as well; take one out"
                )));
            }
        }
        for (path, routes) in reads {
            let what =
                routes.first().map_or_else(|| format!("uncached {path}"), |route| format!("route {}", route.what()));
            let of_path = OfPath { pattern: path.to_owned(), routes };
            self.reads.insert(path, of_path).map_err(|e| insert_error(&what, &e))?;
        }
        Ok(())
    }

    /// A method reads a path or writes it.
    fn check_methods(&self) -> Result<(), ConfigError> {
        let is_read = |mutation: &&Arc<MutationRoute>| {
            let mut reads = self.declared.reads.iter().filter(|read| read.is_for(&mutation.method));
            reads.any(|read| is_same(place::Pattern::pattern(&**read), mutation.path(), true))
        };
        match self.declared.mutations.iter().find(is_read).map(|mutation| mutation.what()) {
            None => Ok(()),
            Some(both) => Err(ConfigError::new(format!(
                "mutation {both}: a route says that this only reads; take the one or the other out"
            ))),
        }
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
            let of_path = OfPath { pattern: path.to_owned(), routes: methods };
            self.writes.insert(path, of_path).map_err(|e| insert_error(&what, &e))?;
        }
        Ok(())
    }

    #[cfg(feature = "grpc")]
    fn add_grpc(
        &mut self,
        catalogue: &Catalogue,
        cascades: &Cascades,
        table: Table<'_>,
        check: &mut Check<'_>,
    ) -> Result<(), ConfigError> {
        self.grpc = GrpcRoute::compile(table.grpc, catalogue, cascades, (table.identity, table.tellers), check)?;
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

    /// What reads this path, if anything cacheable does.
    pub(crate) fn read<'k, 'p>(&'k self, method: &Method, place: &'p Place<'_>) -> Option<Read<'k, 'p>> {
        let found = place.find(&self.reads)?;
        let any = found.value.routes.first()?;
        let route = found.value.routes.iter().find(|route| route.is_for(method));
        Some(Read { route, any, params: found.params, mount: found.mount, is_certain: found.is_certain })
    }

    /// What a request changes, whose method is not known to be safe, as far as that is declared; `None` if it may change nothing,
    /// or nothing that is not seen to elsewhere.
    pub(crate) fn written(&self, method: &Method, place: &Place<'_>) -> Option<Written> {
        let is_unsafe = is_unsafe(method);
        let (read, written) = (place.find(&self.reads), place.find(&self.writes));
        // One that only reads.
        let reading =
            read.as_ref().filter(|read| read.is_certain && read.value.routes.iter().any(|r| r.is_for(method)));
        if let Some(found) = &written {
            let own = found.value.routes.iter().find(|m| m.method == *method);
            let any = || found.value.routes.iter().find(|m| is_unsafe && reading.is_none() && m.is_for(method));
            let is_general = |read: &Found<'_, '_, OfPath<ReadRoute>>| {
                self.writes.at(&read.value.pattern).is_ok_and(|w| std::ptr::eq(w.value, found.value))
            };
            if let Some(route) = own.filter(|_| !reading.is_some_and(is_general)).or_else(any) {
                // What is not cached is another route, and its parameters are other things.
                let is_other = read.as_ref().is_some_and(|read| {
                    read.value.routes.is_empty() && !is_same(&read.value.pattern, &found.value.pattern, true)
                });
                let params = Some(&found.params).filter(|_| found.is_certain && !is_other);
                return Some(Written::Declared(Mutated::new(route, params)));
            }
        }
        // The layer of gRPC knows which of its calls are reads.
        #[cfg(feature = "grpc")]
        let is_unsafe = is_unsafe && self.grpc(place.full()).is_none();
        if !is_unsafe || reading.is_some() {
            return None;
        }
        let changed = read.and_then(|found| self.change_of(found.value, found.is_certain.then_some(&found.params)));
        Some(changed.map_or(Written::Unmapped, Written::Read))
    }

    /// A change of what a path names, as the read routes know it; of the whole type, where it does not name one by its id.
    pub(crate) fn locate(&self, path: &str, place: &Place<'_>) -> Option<Change> {
        let at = |path| {
            let found = self.reads.at(path).ok()?;
            self.change_of(found.value, Some(&found.params))
        };
        at(path).or_else(|| at(place.below(path)?))
    }

    fn change_of(&self, of_path: &OfPath<ReadRoute>, params: Option<&matchit::Params<'_, '_>>) -> Option<Change> {
        let changes = of_path.routes.iter().map(|route| {
            let data_type: Arc<str> = route.data_type().into();
            let is_named = self.expected.check_named(&data_type).is_ok();
            match params.and_then(|params| route.own_id(params)).filter(|_| is_named) {
                Some(id) => Change::entity(data_type, id),
                None => Change::all(data_type),
            }
        });
        changes.reduce(|mut one, other| {
            one.entities.extend(other.entities);
            one.all.extend(other.all);
            one
        })
    }

    /// The prefix that is between what this path names and a route, if there evidently is one.
    pub(crate) fn prefix_of(&self, path: &str) -> Option<String> {
        let starts = |path: &str| path.match_indices('/').map(|(at, _)| at).skip(1).collect::<Vec<_>>();
        // What a router hides of the path, or what the layer is outside of.
        let hidden = self.declared.reads.iter().find_map(|route| {
            let pattern = place::Pattern::pattern(&**route);
            let is_read = |at: &usize| {
                let mut router = matchit::Router::new();
                // By something that it says itself.
                let says = pattern[*at..].split('/').any(|part| !part.is_empty() && !part.contains('{'));
                says && !pattern[..*at].contains('{')
                    && router.insert(&pattern[*at..], ()).is_ok()
                    && router.at(path).is_ok()
            };
            Some(pattern[..starts(pattern).into_iter().find(is_read)?].to_owned())
        });
        let is_read =
            |at: &usize| self.reads.at(&path[*at..]).is_ok_and(|found| !found.value.pattern.starts_with("/{"));
        hidden.or_else(|| Some(path[..starts(path).into_iter().find(is_read)?].to_owned()))
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crate::{Cache, DataType, Route};

    /// Which prefix somebody has forgotten, or written too much; by no route that reads whatever has as many segments.
    #[test]
    fn a_prefix_is_found_where_it_evidently_is_one() {
        let routes =
            ["/api/v1/agents/{agent_id}", "/teams/{team_id}/tools/{tool_id}", "/things/{thing_id}", "/{page_id}"];
        let mut builder = Cache::builder("prefixes").single_tenant("t");
        for (route, data_type) in routes.iter().zip(["agent", "tool", "thing", "page"]) {
            builder = builder
                .data_type(DataType::new(data_type, Duration::from_secs(60)))
                .route(Route::new(*route, data_type));
        }
        let cache = builder.build().unwrap();
        for (path, prefix) in [
            ("/agents/1", Some("/api/v1")),
            ("/v1/agents/1", Some("/api")),
            ("/app/api/v1/agents/1", Some("/app")),
            ("/a/b/things/1", Some("/a/b")),
            ("/tools/1", None),
            ("/1/tools/1", Some("/teams")),
            ("/a/b", None),
            ("/healthz", None),
            ("/", None),
        ] {
            assert_eq!(cache.0.routes.prefix_of(path).as_deref(), prefix, "{path}");
        }
    }
}
