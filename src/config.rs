//! The whole mapping as plain data: data types, tenant, routes, mutations and cascades.
//!
//! The builder fills it from code; with the feature `toml` it can be read from a file, with the same names and the same
//! checks.

use std::{collections::BTreeMap, fmt, time::Duration};

use serde::{
    Deserialize, Deserializer,
    de::{self, IntoDeserializer},
};

use crate::{
    catalog::{Canonical, Cascade, DataType, Policy, Tier, Ttl},
    events::EventPolicy,
    route::{Credentials, Hosts, Mutation, OnUnmapped, Route},
    units::{bytes, duration},
};

#[cfg(feature = "memcached")]
use crate::store::MemcachedBuilder as MemcachedTable;
#[cfg(feature = "redis")]
use crate::store::{RedisBuilder as RedisTable, RegionalBuilder as RegionsTable};
#[cfg(not(feature = "memcached"))]
use absent::MemcachedTable;
#[cfg(not(feature = "redis"))]
use absent::{RedisTable, RegionsTable};

/// Everything about caching that a service declares. The [`docs::configuration`](crate::docs::configuration) page
/// has the file format.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[non_exhaustive]
pub struct Config {
    /// The request header that names the tenant.
    pub tenant_header: Option<String>,
    /// How far the host of a request tells its response from others.
    pub hosts: Option<Hosts>,
    /// Whether anything is answered from the cache.
    pub enabled: Option<bool>,
    /// What becomes of requests with credentials, where a route says nothing else.
    pub credentials: Option<Credentials>,
    /// Headers by which the service knows its users, besides the usual ones.
    pub credential_headers: Vec<String>,
    /// The version of what entries hold.
    pub version: Option<String>,
    /// How many bytes the in-process store may take.
    #[serde(deserialize_with = "bytes")]
    pub memory: Option<u64>,
    /// Responses with a larger body are not stored.
    #[serde(deserialize_with = "bytes")]
    pub body_limit: Option<u64>,
    /// Whether responses of mutations say what was dropped.
    pub report_header: Option<bool>,
    /// What becomes of writes while the store cannot be told about them.
    pub on_unreachable: Option<OnUnreachable>,
    /// What becomes of writes that nothing is said of.
    pub on_unmapped: Option<OnUnmapped>,
    /// How types are held in process that say nothing about it.
    pub tier: Option<Tier>,
    /// See `CacheBuilder::audit`. (Feature `stats`.)
    pub audit: Option<f64>,
    /// The shared store. (Feature `redis`.)
    pub redis: Option<RedisTable>,
    /// The other regions, which hear what this one drops. (Feature `redis`.)
    pub regions: Option<RegionsTable>,
    /// The same, of another kind. (Feature `memcached`.)
    pub memcached: Option<MemcachedTable>,
    /// The data types and their TTLs.
    #[serde(deserialize_with = "data_types")]
    pub types: Vec<DataType>,
    /// How the ids of entities are spelled.
    pub entities: BTreeMap<String, Canonical>,
    /// How long writes may take whose cascade says nothing else; see [`Cascade::fenced`]. By default they are not
    /// fenced.
    #[serde(deserialize_with = "duration")]
    pub fence: Option<Duration>,
    /// The routes whose responses are cached.
    pub routes: Vec<Route>,
    /// Paths that routes match, and that are not cached.
    pub uncached: Vec<String>,
    /// The routes that mutate.
    pub mutations: Vec<Mutation>,
    /// What events from outside make stale.
    pub events: Vec<EventPolicy>,
    /// What mutations drop.
    pub cascades: Vec<Cascade>,
}

/// What becomes of writes while the store cannot be told about them.
///
/// In a file: `on_unreachable = "journal"` or `"reject"`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum OnUnreachable {
    /// They go on; their invalidations are kept and delivered when the store is back (the default).
    #[default]
    Journal,
    /// They are answered 503 before they run. That the store is gone may take a heartbeat (250 ms) to notice, unless the
    /// cascade is [fenced](crate::Cascade::fenced): raising the fence finds out.
    Reject,
}

impl Config {
    /// Reads the mapping from TOML. (Feature `toml`.)
    ///
    /// # Errors
    /// Syntax errors, unknown fields and bad values, each with its line. What is wrong between parts (an unknown data
    /// type, a duplicate route, a write that would miss a route) is found by [`CacheBuilder::build`](crate::CacheBuilder::build).
    #[cfg(feature = "toml")]
    pub fn from_toml(text: &str) -> Result<Self, crate::ConfigError> {
        toml::from_str(text).map_err(|e| crate::ConfigError::new(e.to_string()))
    }

    /// Adds what another declares. Of what can be said only once, its word counts.
    pub(crate) fn add(&mut self, other: Self) {
        fn replace<T>(own: &mut Option<T>, other: Option<T>) {
            *own = other.or_else(|| own.take());
        }
        replace(&mut self.tenant_header, other.tenant_header);
        replace(&mut self.hosts, other.hosts);
        replace(&mut self.enabled, other.enabled);
        replace(&mut self.credentials, other.credentials);
        replace(&mut self.version, other.version);
        replace(&mut self.memory, other.memory);
        replace(&mut self.body_limit, other.body_limit);
        replace(&mut self.report_header, other.report_header);
        replace(&mut self.on_unreachable, other.on_unreachable);
        replace(&mut self.on_unmapped, other.on_unmapped);
        replace(&mut self.tier, other.tier);
        replace(&mut self.audit, other.audit);
        replace(&mut self.redis, other.redis);
        replace(&mut self.regions, other.regions);
        replace(&mut self.memcached, other.memcached);
        replace(&mut self.fence, other.fence);
        self.types.extend(other.types);
        self.entities.extend(other.entities);
        self.credential_headers.extend(other.credential_headers);
        self.routes.extend(other.routes);
        self.uncached.extend(other.uncached);
        self.mutations.extend(other.mutations);
        self.events.extend(other.events);
        self.cascades.extend(other.cascades);
    }

    /// Whether a cascade declares a relation of this name, for which a resolver may then be given.
    pub fn has_relation(&self, name: &str) -> bool {
        self.cascades.iter().any(|c| c.relations.contains_key(name))
    }
}

/// What the tables of stores are whose features are not turned on.
#[cfg(not(all(feature = "redis", feature = "memcached")))]
mod absent {
    use serde::{Deserialize, de::IgnoredAny};

    use crate::{error::ConfigError, store::MemoryStore};

    macro_rules! absent {
        ($table:ident, $feature:literal) => {
            /// The table of a store that is not compiled in.
            #[cfg(not(feature = $feature))]
            #[allow(unreachable_pub)] // The type of a public field that nobody can fill but by a file.
            #[derive(Clone, Debug, Deserialize)]
            pub struct $table(IgnoredAny);

            #[cfg(not(feature = $feature))]
            impl $table {
                pub(crate) fn build(self) -> Result<MemoryStore, ConfigError> {
                    let Self(IgnoredAny) = self;
                    Err(ConfigError::new(concat!(
                        "`[",
                        $feature,
                        "]`: turn on the feature `",
                        $feature,
                        "` of tower-cache-aside"
                    )))
                }
            }
        };
    }
    absent!(RedisTable, "redis");
    absent!(RegionsTable, "redis");
    absent!(MemcachedTable, "memcached");
}

fn data_types<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<DataType>, D::Error> {
    struct Visitor;
    impl<'de> de::Visitor<'de> for Visitor {
        type Value = Vec<DataType>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a table of data types")
        }

        fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut types = vec![];
            while let Some(name) = map.next_key::<String>()? {
                let TtlOrPolicy(policy) = map.next_value()?;
                types.push(DataType { name, policy });
            }
            Ok(types)
        }
    }
    deserializer.deserialize_map(Visitor)
}

/// `"5m"` is short for `{ ttl = "5m" }`. (Not an untagged enum, which would lose the message of what is wrong.)
struct TtlOrPolicy(Policy);

impl<'de> Deserialize<'de> for TtlOrPolicy {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Policy;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a TTL (short, standard, extended, permanent, \"5m\") or a table { ttl = … }")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Policy, E> {
                Ttl::deserialize(text.into_deserializer()).map(Policy::from)
            }

            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<Policy, A::Error> {
                Policy::deserialize(de::value::MapAccessDeserializer::new(map))
            }
        }
        deserializer.deserialize_any(Visitor).map(Self)
    }
}
