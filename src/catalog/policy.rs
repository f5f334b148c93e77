//! What a data type says about how its entries are kept.

use std::{sync::Arc, time::Duration};

use serde::{Deserialize, Deserializer};

use super::ttl::Ttl;
use crate::units::duration;

/// A named kind of cached thing.
///
/// In a file: `agent = "standard"` or `agent = { ttl = "90s" }`.
#[derive(Clone, Debug, PartialEq)]
pub struct DataType {
    pub(crate) name: String,
    pub(crate) policy: Policy,
}

/// So long requests wait for another's call, where nothing else is said.
const COALESCE_TIMEOUT: Duration = Duration::from_secs(10);

/// What is configured per data type.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Policy {
    pub(crate) ttl: Ttl,
    #[serde(default)]
    pub(crate) tier: Option<Tier>,
    #[serde(default)]
    pub(crate) coalesce: Coalesce,
    #[serde(default)]
    pub(crate) freshness: Freshness,
    #[serde(default, deserialize_with = "duration")]
    pub(crate) stale_while_revalidate: Option<Duration>,
    #[serde(default, deserialize_with = "duration")]
    pub(crate) stale_if_error: Option<Duration>,
    #[serde(default)]
    pub(crate) serve_invalidated_on_error: bool,
    #[serde(default, deserialize_with = "duration")]
    pub(crate) soft_timeout: Option<Duration>,
    #[serde(default, deserialize_with = "duration")]
    pub(crate) coalesce_timeout: Option<Duration>,
    #[serde(default)]
    pub(crate) early_refresh: f64,
    #[serde(default)]
    pub(crate) jitter: f64,
    #[serde(default, deserialize_with = "duration")]
    pub(crate) max_lag: Option<Duration>,
    #[serde(default)]
    pub(crate) negative: Option<Negative>,
    #[serde(default)]
    pub(crate) stores_cookies: bool,
    #[serde(default)]
    pub(crate) loads_whole: bool,
    /// Response headers that say nothing of whether it is another.
    #[serde(default)]
    pub(crate) ignored_headers: Arc<[String]>,
    /// The share of hits that are compared with the inner service.
    #[serde(default)]
    pub(crate) audit: Option<f64>,
}

impl From<Ttl> for Policy {
    fn from(ttl: Ttl) -> Self {
        Self {
            ttl,
            tier: None,
            coalesce: Coalesce::default(),
            freshness: Freshness::default(),
            stale_while_revalidate: None,
            stale_if_error: None,
            serve_invalidated_on_error: false,
            soft_timeout: None,
            coalesce_timeout: None,
            early_refresh: 0.0,
            jitter: 0.0,
            max_lag: None,
            negative: None,
            stores_cookies: false,
            loads_whole: false,
            ignored_headers: Arc::default(),
            audit: None,
        }
    }
}

impl Policy {
    /// How long requests wait for another's call.
    pub(crate) fn coalesce_timeout(&self) -> Duration {
        self.coalesce_timeout.unwrap_or(COALESCE_TIMEOUT)
    }

    /// How it is held in process.
    pub(crate) fn tier(&self) -> Tier {
        self.tier.unwrap_or_default()
    }

    /// How long an entry may be fresh at most, whatever its writer thought; `None` where the response decides, or nobody.
    pub(crate) fn longest(&self) -> Option<Duration> {
        if self.freshness == Freshness::Response {
            return None;
        }
        let negative = self.negative.as_ref().map_or(Some(Duration::ZERO), |negative| negative.ttl.duration());
        Some(self.ttl.duration()?.max(negative?))
    }

    /// The same, held like this if it says nothing about it.
    pub(super) fn or_tier(self, tier: Tier) -> Self {
        Self { tier: self.tier.or(Some(tier)), ..self }
    }

    /// The TTL, shortened by a random part of the jitter. What is learned is shortened when it is known.
    pub(crate) fn jittered(&self) -> Option<Duration> {
        let ttl = self.ttl.duration()?;
        Some(if self.ttl.bounds().is_some() { ttl } else { self.shortened(ttl) })
    }

    /// Shorter by a random part of the jitter.
    pub(crate) fn shortened(&self, ttl: Duration) -> Duration {
        if self.jitter > 0.0 { ttl.mul_f64(1.0 - self.jitter * rand::random::<f64>()) } else { ttl }
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

    /// How the tier in process may hold it; by default as the builder's [`tier`](crate::CacheBuilder::tier) says.
    #[must_use]
    pub fn tier(mut self, tier: Tier) -> Self {
        self.policy.tier = Some(tier);
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

    /// How long requests wait for another's call, counted from its beginning; by default 10 s. Who has waited for so long calls
    /// the inner service itself, or is served what [`stale_if_error`](Self::stale_if_error) allows; who comes then waits for
    /// others again.
    #[must_use]
    pub fn coalesce_timeout(mut self, timeout: Duration) -> Self {
        self.policy.coalesce_timeout = Some(timeout);
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

    /// Bounds what may be unknown of [changes elsewhere](crate::Cache::follow): while it is not proven that everything that had
    /// changed this long ago was read and dropped, requests go to the inner service (`detail=events-behind`), and nothing is
    /// stored. Sources prove that about four times a second, so a second is short; by default there is no bound.
    #[must_use]
    pub fn max_lag(mut self, most: Duration) -> Self {
        self.policy.max_lag = Some(most);
        self
    }

    /// Also keeps responses with these statuses (404, 410), with a TTL of their own.
    #[must_use]
    pub fn negative(mut self, statuses: impl IntoIterator<Item = u16>, ttl: impl Into<Ttl>) -> Self {
        self.policy.negative = Some(Negative { statuses: statuses.into_iter().collect(), ttl: ttl.into() });
        self
    }

    /// A `HEAD`, or a request for a range, that finds nothing loads the whole response, which is then stored and cut. By default
    /// they go to the inner service as they are, each for itself.
    #[must_use]
    pub fn loads_whole(mut self) -> Self {
        self.policy.loads_whole = true;
        self
    }

    /// Response headers that say nothing of whether a reload is another response, besides `Date`, `Age` and others that say when
    /// and how (a request's id, a trace): for [adaptive TTLs](Ttl::adaptive), and for what is counted as drift.
    #[must_use]
    pub fn ignored_headers(mut self, names: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.policy.ignored_headers = names.into_iter().map(Into::into).collect();
        self
    }

    /// The share of hits that are compared with what the inner service says (`CacheBuilder::audit`).
    /// Zero for what may be asked for only once (a one-time link): each comparison is a request. (Feature `stats`.)
    #[must_use]
    pub fn audit(mut self, share: f64) -> Self {
        self.policy.audit = Some(share);
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

/// How a tier in this process may hold an entry of a store outside it. Configured per data type.
///
/// In a file: `tier = "on"`, `"off"`, `"validated"`, or the cap as a duration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Tier {
    /// Every hit first asks the store whether the generations are current, in one round trip of a few dozen bytes; only the
    /// entry itself is spared. Strict: no response that begins after a write was acknowledged is from before it (the
    /// default).
    #[default]
    Validated,
    /// Hits are answered in this process, until the entry expires or is said to be dropped. Faster, and stale for as long
    /// as that takes to be said: usually well under a millisecond, and at most two heartbeats when the connection is lost.
    On,
    /// The same, for at most this long.
    Capped(Duration),
    /// Every hit is read from the store, body and all.
    Off,
}

impl<'de> Deserialize<'de> for Tier {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Ok(match text.as_str() {
            "on" => Self::On,
            "off" => Self::Off,
            "validated" => Self::Validated,
            other => Self::Capped(humantime::parse_duration(other).map_err(|e| {
                serde::de::Error::custom(format!("tier `{other}`: {e}; write on, off, validated or a duration"))
            })?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::DataType;

    /// Where the mapping decides.
    #[test]
    fn an_entry_is_fresh_for_no_longer_than_its_type_says() {
        let doc = DataType::new("doc", Duration::from_secs(60));
        assert_eq!(doc.policy.longest(), Some(Duration::from_secs(60)));
        assert_eq!(doc.freshness(Freshness::Response).policy.longest(), None);
    }
}
