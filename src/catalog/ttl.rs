//! Times to live: four classes, any duration of a millisecond and more, or one that is learned.

use std::{fmt, time::Duration};

use serde::{
    Deserialize, Deserializer,
    de::{self, value::MapAccessDeserializer},
};

use super::adaptive::Bounds;
use crate::units::duration;

/// How long an entry lives.
///
/// In a file: `"short"`, `"standard"`, `"extended"`, `"permanent"`, a duration such as `"5m"`, `"1h 30m"`, `"250ms"`, or
/// `{ min = "30s", max = "24h", risk = 0.05 }`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Ttl {
    /// 5 minutes.
    Short,
    /// 1 hour.
    Standard,
    /// 24 hours.
    Extended,
    /// Until it is invalidated or evicted.
    Permanent,
    /// This long, in whole milliseconds.
    Custom(Duration),
    /// As long as goes well, which is learned of each key: see [`Ttl::adaptive`].
    #[non_exhaustive]
    Adaptive {
        /// No shorter, and so long while nothing is known.
        min: Duration,
        /// No longer.
        max: Duration,
        /// How likely a change that nobody tells of may be within the TTL: above 0, and below 1.
        risk: f64,
    },
}

impl Ttl {
    /// As long as goes well: so long that a change which nobody tells of comes within it with the probability `risk`.
    ///
    /// Writes drop what they change, so a TTL is only there for changes that no write tells of. How often they come is learned
    /// from reloads: of an entry that has expired, or is loaded anew before it does, and that no write has dropped, does the
    /// origin say the same? (The status, the trailers, the body, which as JSON may be written in another order, and the headers
    /// but for those that say when and how, such as `Date` and `Age`, and the [ignored](crate::DataType::ignored_headers).) With
    /// their rate λ the TTL is −ln(1 − risk) / λ, from `min` to `max`. So of what is served less than `risk` is stale: about half
    /// of it, if it is asked for often.
    ///
    /// It is learned of each key, and kept with its entry, also in a shared store; a key that was never loaded anew begins
    /// with what its type's others in its tenant (or, where they have told too little, in all tenants) have shown to this process,
    /// or at `min`. Where nothing changes, the TTL grows by about twice the risk with each reload; where several in a row find
    /// changes that are not likely at the known rate, it is learned anew, and is at once a fraction of their interval.
    ///
    /// For that an entry is kept beyond its expiry: until it is `max` old, and at least as long again as it was fresh. It is
    /// not served then, unless [windows](crate::DataType::stale_while_revalidate) say so, or a client that may ask for it
    /// (`max-stale`).
    ///
    /// A response's own word still shortens it ([`Freshness::Tighten`](crate::Freshness::Tighten)); under
    /// [`Freshness::Response`](crate::Freshness::Response) only responses that say nothing are learned from. It holds for calls of
    /// gRPC and values of [`Cache::entry`](crate::Cache::entry) as well, whose bytes are compared: with a `HashMap` in them they
    /// are others each time, and the TTL stays at `min`.
    ///
    /// The estimator is that of Cho and Garcia-Molina for few polls at irregular intervals ("Estimating Frequency of
    /// Change", ACM Transactions on Internet Technology 3(3), 2003).
    ///
    /// ```
    /// # use std::time::Duration;
    /// use tower_cache_aside::{DataType, Ttl};
    /// let day = Duration::from_secs(86_400);
    /// let pages = DataType::new("page", Ttl::adaptive(Duration::from_secs(30), day, 0.05)).ignored_headers(["x-request-id"]);
    /// ```
    pub fn adaptive(min: Duration, max: Duration, risk: f64) -> Self {
        Self::Adaptive { min, max, risk }
    }

    /// The duration in whole milliseconds, of an adaptive one the longest; `None` for `Permanent`.
    pub fn duration(self) -> Option<Duration> {
        match self {
            Self::Short => Some(Duration::from_secs(300)),
            Self::Standard => Some(Duration::from_secs(3_600)),
            Self::Extended => Some(Duration::from_secs(86_400)),
            Self::Permanent => None,
            // Cut to what stores can express, so that nothing is zero there that was not zero here.
            Self::Custom(d) | Self::Adaptive { max: d, .. } => {
                Some(Duration::from_millis(u64::try_from(d.as_millis()).unwrap_or(u64::MAX)))
            }
        }
    }

    /// Between which it is learned, if it is.
    pub(crate) fn bounds(self) -> Option<Bounds> {
        match self {
            Self::Adaptive { min, max, risk } => Some(Bounds { min, max, risk }),
            _ => None,
        }
    }
}

impl From<Duration> for Ttl {
    fn from(duration: Duration) -> Self {
        Self::Custom(duration)
    }
}

impl<'de> Deserialize<'de> for Ttl {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Ttl;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(
                    "a TTL (short, standard, extended, permanent, \"5m\") or a table { min = …, max = …, risk = … }",
                )
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Ttl, E> {
                Ok(match text {
                    "short" => Ttl::Short,
                    "standard" => Ttl::Standard,
                    "extended" => Ttl::Extended,
                    "permanent" => Ttl::Permanent,
                    other => Ttl::Custom(humantime::parse_duration(other).map_err(|e| {
                        E::custom(format!(
                            "TTL `{other}`: {e}; write short, standard, extended, permanent, a duration such as \"5m\" or \
                             {{ min = …, max = …, risk = … }}"
                        ))
                    })?),
                })
            }

            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<Ttl, A::Error> {
                let Learnt { min, max, risk } = Learnt::deserialize(MapAccessDeserializer::new(map))?;
                Ok(Ttl::adaptive(min, max, risk))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// An adaptive TTL, as a file writes it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Learnt {
    #[serde(deserialize_with = "some_duration")]
    min: Duration,
    #[serde(deserialize_with = "some_duration")]
    max: Duration,
    risk: f64,
}

fn some_duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    duration(deserializer)?.ok_or_else(|| de::Error::custom("a duration is missing"))
}

/// How long an entry is good for, counted from now.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Lifetime {
    /// How old it is already.
    pub(crate) age: Duration,
    /// For how long from its beginning it is fresh; `None` means for ever.
    pub(crate) fresh: Option<Duration>,
    /// How much longer it is served while it is refreshed.
    pub(crate) refresh: Duration,
    /// How much longer it is served when the origin fails.
    pub(crate) on_error: Duration,
    /// How much longer it is kept to be validated.
    pub(crate) validate: Duration,
    /// How long it took to load.
    pub(crate) load: Duration,
    /// The mapping says for how long, and the response at most that it is less: what adapts, adapts this.
    pub(crate) is_mapped: bool,
}

impl Lifetime {
    pub(crate) fn fresh_for(fresh: Option<Duration>) -> Self {
        Self { fresh, ..Self::default() }
    }
}
