//! The whole mapping as plain data: data types, tenant, routes, mutations and cascades.
//!
//! The builder fills it from code; with the feature `toml` it can be read from a file, with the same names and the same
//! checks.

use std::{error::Error as StdError, fmt, time::Duration};

use serde::{Deserialize, Deserializer, de::IntoDeserializer};

use super::{Cascade, DataType, Policy, Ttl};
use crate::route::{Mutation, Route};

/// Everything about caching that a service declares. The [`docs::configuration`](crate::docs::configuration) page
/// has the file format.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[non_exhaustive]
pub struct Config {
    /// The request header that names the tenant.
    pub tenant_header: Option<String>,
    /// The data types and their TTLs.
    #[serde(deserialize_with = "data_types")]
    pub types: Vec<DataType>,
    /// How long writes may take whose cascade says nothing else; see [`Cascade::fenced`]. By default they are not
    /// fenced.
    #[serde(deserialize_with = "duration")]
    pub fence: Option<Duration>,
    /// The routes whose responses are cached.
    pub routes: Vec<Route>,
    /// The routes that mutate.
    pub mutations: Vec<Mutation>,
    /// What mutations drop.
    pub cascades: Vec<Cascade>,
}

impl Config {
    /// Reads the mapping from TOML. (Feature `toml`.)
    ///
    /// # Errors
    /// Syntax errors, unknown fields and bad values, each with its line. What is wrong between parts (an unknown data
    /// type, a duplicate route, a cycle) is found by [`CacheBuilder::build`](crate::CacheBuilder::build).
    #[cfg(feature = "toml")]
    pub fn from_toml(text: &str) -> Result<Self, ConfigError> {
        toml::from_str(text).map_err(|e| ConfigError::new(e.to_string()))
    }

    /// Whether a cascade declares a relation of this name, for which a resolver may then be given.
    pub fn has_relation(&self, name: &str) -> bool {
        self.cascades.iter().any(|c| c.relations.contains_key(name))
    }
}

pub(super) fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    let text = String::deserialize(deserializer)?;
    let duration = humantime::parse_duration(&text);
    duration
        .map(Some)
        .map_err(|e| serde::de::Error::custom(format!("duration `{text}`: {e}; write one such as \"5s\"")))
}

fn data_types<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<DataType>, D::Error> {
    struct Visitor;
    impl<'de> serde::de::Visitor<'de> for Visitor {
        type Value = Vec<DataType>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a table of data types")
        }

        fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut types = vec![];
            while let Some(name) = map.next_key::<String>()? {
                let error = |e| serde::de::Error::custom(format!("data type `{name}`: {e}"));
                let TtlOrPolicy(policy) = map.next_value().map_err(error)?;
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
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = Policy;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a TTL (short, standard, extended, permanent, \"5m\") or a table { ttl = … }")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Policy, E> {
                Ttl::deserialize(text.into_deserializer()).map(Policy::from)
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(self, map: A) -> Result<Policy, A::Error> {
                Policy::deserialize(serde::de::value::MapAccessDeserializer::new(map))
            }
        }
        deserializer.deserialize_any(Visitor).map(Self)
    }
}

/// A mistake in the configuration: names the route or type, and the mend. The wording is not stable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError(String);

impl ConfigError {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl StdError for ConfigError {}
