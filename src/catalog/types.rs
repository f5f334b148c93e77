//! The declared data types.

use std::{collections::BTreeMap, time::Duration};

use http::HeaderName;

use super::{
    adaptive::Bounds,
    policy::{Coalesce, DataType, Freshness, Policy, Tier},
    ttl::Ttl,
};
use crate::error::ConfigError;

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
pub(crate) struct Catalogue {
    types: BTreeMap<String, Policy>,
    /// Types that say how they are held over a shared store.
    tiers: Vec<String>,
    /// How types are held in process that say nothing about it.
    tier: Tier,
}

impl Catalogue {
    /// The types; `tier` is of those that say nothing.
    pub(crate) fn new(types: &[DataType], tier: Tier) -> Result<Self, ConfigError> {
        let mut map = BTreeMap::new();
        let says_tier = types.iter().filter(|t| t.policy.tier.is_some());
        let tiers = says_tier.map(|t| t.name.clone()).collect();
        for DataType { name, policy } in types {
            if name.is_empty() {
                return Err(ConfigError::new("a data type has an empty name; give it one"));
            }
            check_policy(name, policy)?;
            if map.insert(name.clone(), policy.clone().or_tier(tier)).is_some() {
                return Err(ConfigError::new(format!("data type `{name}` is declared twice; remove one of them")));
            }
        }
        Ok(Self { types: map, tiers, tier })
    }

    /// The service's own mapping, then the global defaults, then `standard`.
    pub(crate) fn policy(&self, data_type: &str) -> Policy {
        if let Some(policy) = self.types.get(data_type) {
            return policy.clone();
        }
        let default = GLOBAL_DEFAULTS.iter().find(|(name, _)| *name == data_type);
        Policy::from(default.map_or(Ttl::Standard, |(_, ttl)| *ttl)).or_tier(self.tier)
    }

    /// That the store can hold entries as is said.
    pub(crate) fn check_tiers(&self, refuses: impl Fn(Tier) -> Option<&'static str>) -> Result<(), ConfigError> {
        if let Some(why) = refuses(self.tier) {
            return Err(ConfigError::new(format!("`tier`: {why}")));
        }
        let refused = self.types.iter().find_map(|(name, policy)| Some((name, refuses(policy.tier())?)));
        let error = |(name, why): (&String, &str)| ConfigError::new(format!("data type `{name}`: its `tier`: {why}"));
        refused.map_or(Ok(()), |refused| Err(error(refused)))
    }

    /// That nothing is said which needs a shared store; `says_tier`: for all types.
    pub(crate) fn check_alone(&self, says_tier: bool) -> Result<(), ConfigError> {
        let alone = "but the store is in this process alone; take it out, or share a store (`[redis]`)";
        if says_tier {
            return Err(ConfigError::new(format!("`tier` says how entries of a shared store are held, {alone}")));
        }
        if let Some(name) = self.tiers.first() {
            return Err(ConfigError::new(format!(
                "data type `{name}`: `tier` says how entries of a shared store are held, {alone}"
            )));
        }
        let fleet = self.types.iter().find(|(_, policy)| policy.coalesce == Coalesce::Fleet);
        fleet.map_or(Ok(()), |(name, _)| {
            Err(ConfigError::new(format!("data type `{name}`: its calls are to be coalesced in the fleet, {alone}")))
        })
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.types.keys().map(String::as_str)
    }

    /// All types of which anything may be stored.
    pub(crate) fn known(&self) -> impl Iterator<Item = &str> {
        let global = GLOBAL_DEFAULTS.iter().map(|(name, _)| *name).filter(|name| !self.types.contains_key(*name));
        self.names().chain(global)
    }

    /// `Ok` when the type is declared or has a global default; else what to do about it.
    pub(crate) fn check(&self, what: &str, data_type: &str) -> Result<(), ConfigError> {
        if self.types.contains_key(data_type) || GLOBAL_DEFAULTS.iter().any(|(name, _)| *name == data_type) {
            return Ok(());
        }
        let known: Vec<_> = self.names().collect();
        Err(ConfigError::new(format!(
            "{what}: unknown data type `{data_type}`; declare it, or use one of: {}",
            known.join(", ")
        )))
    }
}

/// What a type says that cannot work.
fn check_policy(name: &str, policy: &Policy) -> Result<(), ConfigError> {
    if policy.ttl.duration() == Some(Duration::ZERO) && policy.freshness == Freshness::Tighten {
        return Err(ConfigError::new(format!(
            "data type `{name}`: a TTL of zero (or under a millisecond) would never hit; \
             give it a longer one, or take its routes out"
        )));
    }
    check_adaptive(name, policy)?;
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
    if policy.max_lag == Some(Duration::ZERO) {
        return Err(ConfigError::new(format!(
            "data type `{name}`: a max_lag of zero can never be proven; give it some seconds, or take it out"
        )));
    }
    let negative = policy.negative.as_ref().map_or(&[][..], |negative| &negative.statuses);
    if let Some(status) = negative.iter().find(|status| !(400..600).contains(*status)) {
        return Err(ConfigError::new(format!(
            "data type `{name}`: `negative` keeps answers that say no, such as 404 and 410; {status} is none"
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
    Ok(())
}

/// That what is to be learned can be.
fn check_adaptive(name: &str, policy: &Policy) -> Result<(), ConfigError> {
    if policy.negative.as_ref().is_some_and(|negative| negative.ttl.bounds().is_some()) {
        return Err(ConfigError::new(format!(
            "data type `{name}`: the TTL of `negative` is not learned; give it a fixed one"
        )));
    }
    if let Some(header) = policy.ignored_headers.iter().find(|header| HeaderName::try_from(&***header).is_err()) {
        return Err(ConfigError::new(format!(
            "data type `{name}`: `{header}` in `ignored_headers` is not a header name; no response has it: mend the name"
        )));
    }
    let Some(Bounds { min, max, risk }) = policy.ttl.bounds() else { return Ok(()) };
    let mend = if !(risk > 0.0 && risk < 1.0) {
        format!(
            "a risk of {risk} is no probability of a change within the TTL; choose one above 0 and below 1, such as 0.05"
        )
    } else if min < Duration::from_millis(1) {
        "a `min` of zero (or under a millisecond) would never hit; 30 s is a good start".to_owned()
    } else if min > max {
        format!("its `min` of {min:?} is longer than its `max` of {max:?}; exchange them")
    } else {
        return Ok(());
    };
    Err(ConfigError::new(format!("data type `{name}`: its adaptive TTL: {mend}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ttl_lookup_is_service_then_global_then_standard() {
        let own = DataType::new("query_result", Duration::from_millis(250));
        let catalogue = Catalogue::new(&[own, DataType::new("agent", Ttl::Permanent)], Tier::default()).unwrap();
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
            let error = Catalogue::new(&[DataType::new("agent", ttl)], Tier::default()).unwrap_err().to_string();
            assert!(error.contains("`agent`") && error.contains("zero"), "{error}");
        }
    }
}
