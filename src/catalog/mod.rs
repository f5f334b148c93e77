//! The catalogue: which data types there are, how long each lives, and what a mutation of one drops.
//!
//! Everything here is plain data that says *what*, from code or from a file ([`Config::from_toml`]); the engine and
//! the layers compile it once, when the cache is built, and refuse what cannot work.

mod cascade;
mod config;
mod ttl;

pub use cascade::Cascade;
pub(crate) use cascade::{Cascades, Drops, FenceTimes, Resolver, ResolverError, Resolvers, Target};
pub use config::{Config, ConfigError};
pub use ttl::Ttl;

use std::{collections::BTreeMap, time::Duration};

use serde::Deserialize;

use crate::store::Tier;

/// A named kind of cached thing.
///
/// In a file: `agent = "standard"` or `agent = { ttl = "90s" }`.
#[derive(Clone, Debug, PartialEq)]
pub struct DataType {
    pub(crate) name: String,
    pub(crate) policy: Policy,
}

/// What is configured per data type.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Policy {
    pub(crate) ttl: Ttl,
    #[serde(default)]
    pub(crate) tier: Tier,
    #[serde(default)]
    pub(crate) coalesce: Coalesce,
}

impl From<Ttl> for Policy {
    fn from(ttl: Ttl) -> Self {
        Self { ttl, tier: Tier::default(), coalesce: Coalesce::default() }
    }
}

/// How far single flight reaches.
///
/// In a file: `coalesce = "process"` or `"fleet"`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Coalesce {
    /// Concurrent misses of a key in this process make one call.
    #[default]
    Process,
    /// Concurrent misses in all processes that share the store make one call. One that waits for another process'
    /// entry does so for three seconds at most.
    Fleet,
}

impl DataType {
    /// A data type whose entries live for `ttl`.
    pub fn new(name: impl Into<String>, ttl: impl Into<Ttl>) -> Self {
        Self { name: name.into(), policy: ttl.into().into() }
    }

    /// How the tier in process may hold it; by default [`Tier::On`]. Without a shared store it has no effect.
    #[must_use]
    pub fn tier(mut self, tier: Tier) -> Self {
        self.policy.tier = tier;
        self
    }

    /// How far single flight reaches; by default this process.
    #[must_use]
    pub fn coalesce(mut self, coalesce: Coalesce) -> Self {
        self.policy.coalesce = coalesce;
        self
    }
}

/// The data types that have a TTL without being declared.
const GLOBAL_DEFAULTS: [(&str, Ttl); 6] = [
    ("embedding", Ttl::Extended),
    ("embedding_batch", Ttl::Extended),
    ("vector_store", Ttl::Standard),
    ("query_result", Ttl::Short),
    ("retrieval_cache", Ttl::Short),
    ("semantic_index", Ttl::Standard),
];

/// The declared data types, with the look-up that never comes back empty.
#[derive(Clone, Debug, Default)]
pub(crate) struct Catalogue(BTreeMap<String, Policy>);

impl Catalogue {
    pub(crate) fn new(types: &[DataType]) -> Result<Self, ConfigError> {
        let mut map = BTreeMap::new();
        for DataType { name, policy } in types {
            if name.is_empty() {
                return Err(ConfigError::new("a data type has an empty name; give it one"));
            }
            if policy.ttl.duration() == Some(Duration::ZERO) {
                return Err(ConfigError::new(format!(
                    "data type `{name}`: a TTL of zero (or under a millisecond) would never hit; \
                     give it a longer one, or take its routes out"
                )));
            }
            if map.insert(name.clone(), policy.clone()).is_some() {
                return Err(ConfigError::new(format!("data type `{name}` is declared twice; remove one of them")));
            }
        }
        Ok(Self(map))
    }

    /// The service's own mapping, then the global defaults, then `standard`.
    pub(crate) fn policy(&self, data_type: &str) -> Policy {
        if let Some(policy) = self.0.get(data_type) {
            return policy.clone();
        }
        let default = GLOBAL_DEFAULTS.iter().find(|(name, _)| *name == data_type);
        default.map_or(Ttl::Standard, |(_, ttl)| *ttl).into()
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// `Ok` when the type is declared or has a global default; else what to do about it.
    pub(crate) fn check(&self, what: &str, data_type: &str) -> Result<(), ConfigError> {
        if self.0.contains_key(data_type) || GLOBAL_DEFAULTS.iter().any(|(name, _)| *name == data_type) {
            return Ok(());
        }
        let known: Vec<_> = self.names().collect();
        Err(ConfigError::new(format!(
            "{what}: unknown data type `{data_type}`; declare it, or use one of: {}",
            known.join(", ")
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ttl_lookup_is_service_then_global_then_standard() {
        let own = DataType::new("query_result", Duration::from_millis(250));
        let catalogue = Catalogue::new(&[own, DataType::new("agent", Ttl::Permanent)]).unwrap();
        let ttl = |name: &str| catalogue.policy(name).ttl.duration();
        assert_eq!(ttl("query_result"), Some(Duration::from_millis(250)));
        assert_eq!(ttl("agent"), None);
        for (name, seconds) in [
            ("embedding", 86_400),
            ("embedding_batch", 86_400),
            ("vector_store", 3_600),
            ("retrieval_cache", 300),
            ("semantic_index", 3_600),
            ("anything else", 3_600),
        ] {
            assert_eq!(ttl(name), Some(Duration::from_secs(seconds)), "{name}");
        }
    }

    #[test]
    fn a_zero_ttl_is_refused() {
        for ttl in [Duration::ZERO, Duration::from_micros(999)] {
            let error = Catalogue::new(&[DataType::new("agent", ttl)]).unwrap_err().to_string();
            assert!(error.contains("`agent`") && error.contains("zero"), "{error}");
        }
    }
}
