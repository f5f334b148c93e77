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
    #[serde(default)]
    pub(crate) freshness: Freshness,
    #[serde(default, deserialize_with = "config::duration")]
    pub(crate) stale_while_revalidate: Option<Duration>,
    #[serde(default, deserialize_with = "config::duration")]
    pub(crate) stale_if_error: Option<Duration>,
    #[serde(default)]
    pub(crate) serve_invalidated_on_error: bool,
    #[serde(default, deserialize_with = "config::duration")]
    pub(crate) soft_timeout: Option<Duration>,
    #[serde(default)]
    pub(crate) early_refresh: f64,
    #[serde(default)]
    pub(crate) jitter: f64,
    #[serde(default)]
    pub(crate) negative: Option<Negative>,
    #[serde(default)]
    pub(crate) stores_cookies: bool,
}

impl From<Ttl> for Policy {
    fn from(ttl: Ttl) -> Self {
        Self {
            ttl,
            tier: Tier::default(),
            coalesce: Coalesce::default(),
            freshness: Freshness::default(),
            stale_while_revalidate: None,
            stale_if_error: None,
            serve_invalidated_on_error: false,
            soft_timeout: None,
            early_refresh: 0.0,
            jitter: 0.0,
            negative: None,
            stores_cookies: false,
        }
    }
}

impl Policy {
    /// The TTL, shortened by a random part of the jitter.
    pub(crate) fn jittered(&self) -> Option<Duration> {
        let ttl = self.ttl.duration()?;
        Some(if self.jitter > 0.0 { ttl.mul_f64(1.0 - self.jitter * rand::random::<f64>()) } else { ttl })
    }
}

/// Which word counts on how long a response stays fresh.
///
/// In a file: `freshness = "tighten"` or `"response"`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Freshness {
    /// The data type's TTL, unless the response asks for less (`Cache-Control`, `Expires`); it can never ask for more.
    #[default]
    Tighten,
    /// The response's, as RFC 9111 has it for a shared cache: also for longer than the TTL, also for errors, by
    /// heuristics if it names only when it was last modified, and with a conditional request to the inner service when
    /// it is no longer fresh. The TTL, which may be zero, is for responses that say nothing.
    Response,
}

/// Statuses that are kept for a while although they are no success.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Negative {
    pub(crate) statuses: Vec<u16>,
    pub(crate) ttl: Ttl,
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

    /// Whose word counts on how long a response stays fresh; by default [`Freshness::Tighten`].
    #[must_use]
    pub fn freshness(mut self, freshness: Freshness) -> Self {
        self.policy.freshness = freshness;
        self
    }

    /// For this long after it expired a response is still served, while one request refreshes it in the background
    /// (RFC 5861); by default not at all. An invalidated one never is.
    #[must_use]
    pub fn stale_while_revalidate(mut self, window: Duration) -> Self {
        self.policy.stale_while_revalidate = Some(window);
        self
    }

    /// For this long after it expired a response is still served when the inner service fails: a 5xx or an error (RFC
    /// 5861); by default not at all. An invalidated one is not, unless
    /// [so declared](Self::serve_invalidated_on_error).
    #[must_use]
    pub fn stale_if_error(mut self, window: Duration) -> Self {
        self.policy.stale_if_error = Some(window);
        self
    }

    /// On error, serves even what a write has made stale; needs [`stale_if_error`](Self::stale_if_error), and counts
    /// its window from the expiry too.
    #[must_use]
    pub fn serve_invalidated_on_error(mut self) -> Self {
        self.policy.serve_invalidated_on_error = true;
        self
    }

    /// Serves an expired response that [`stale_if_error`](Self::stale_if_error) would allow when the inner service has
    /// not answered after this long; its answer is stored when it comes.
    #[must_use]
    pub fn soft_timeout(mut self, timeout: Duration) -> Self {
        self.policy.soft_timeout = Some(timeout);
        self
    }

    /// Refreshes in the background before the expiry, with a probability that grows towards it, so that popular entries
    /// never expire and never in a stampede (XFetch: Vattani et al., VLDB 2015). `beta` is usually 1, more is earlier; by
    /// default 0, never. The time the last load took is measured.
    #[must_use]
    pub fn early_refresh(mut self, beta: f64) -> Self {
        self.policy.early_refresh = beta;
        self
    }

    /// Shortens each entry's TTL by a random part of it, up to this share (0.1 for a tenth), so that what was filled
    /// together doesn't expire together; by default 0.
    #[must_use]
    pub fn jitter(mut self, share: f64) -> Self {
        self.policy.jitter = share;
        self
    }

    /// Also keeps responses with these statuses (404, 410), with a TTL of their own.
    #[must_use]
    pub fn negative(mut self, statuses: impl IntoIterator<Item = u16>, ttl: impl Into<Ttl>) -> Self {
        self.policy.negative = Some(Negative { statuses: statuses.into_iter().collect(), ttl: ttl.into() });
        self
    }

    /// Stores responses with `Set-Cookie` as well, which everybody in the tenant then gets. For origins whose
    /// `Cache-Control` is to be taken at its word.
    #[must_use]
    pub fn stores_cookies(mut self) -> Self {
        self.policy.stores_cookies = true;
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
            if policy.ttl.duration() == Some(Duration::ZERO) && policy.freshness == Freshness::Tighten {
                return Err(ConfigError::new(format!(
                    "data type `{name}`: a TTL of zero (or under a millisecond) would never hit; \
                     give it a longer one, or take its routes out"
                )));
            }
            if !(0.0..1.0).contains(&policy.jitter) {
                return Err(ConfigError::new(format!(
                    "data type `{name}`: a jitter of {} is no share of the TTL; choose one from 0 to below 1",
                    policy.jitter
                )));
            }
            if !(0.0..=1_000.0).contains(&policy.early_refresh) {
                return Err(ConfigError::new(format!(
                    "data type `{name}`: early_refresh = {} makes no sense; 1 is usual, 0 turns it off",
                    policy.early_refresh
                )));
            }
            let needs_window = [
                ("serve_invalidated_on_error", policy.serve_invalidated_on_error),
                ("soft_timeout", policy.soft_timeout.is_some()),
            ];
            if let Some((setting, _)) = needs_window.iter().find(|(_, on)| *on && policy.stale_if_error.is_none()) {
                return Err(ConfigError::new(format!(
                    "data type `{name}`: {setting} needs stale_if_error, which says for how long"
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
