//! Times to live: four classes, or any duration of a millisecond and more.

use std::time::Duration;

use serde::{Deserialize, Deserializer, de::Error};

/// How long an entry lives.
///
/// In a file: `"short"`, `"standard"`, `"extended"`, `"permanent"`, or a duration such as `"5m"`, `"1h 30m"`, `"250ms"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
}

impl Ttl {
    /// The duration in whole milliseconds; `None` for `Permanent`.
    pub fn duration(self) -> Option<Duration> {
        match self {
            Self::Short => Some(Duration::from_secs(300)),
            Self::Standard => Some(Duration::from_secs(3_600)),
            Self::Extended => Some(Duration::from_secs(86_400)),
            Self::Permanent => None,
            // Cut to what stores can express, so that nothing is zero there that was not zero here.
            Self::Custom(d) => Some(Duration::from_millis(u64::try_from(d.as_millis()).unwrap_or(u64::MAX))),
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
        let text = String::deserialize(deserializer)?;
        Ok(match text.as_str() {
            "short" => Self::Short,
            "standard" => Self::Standard,
            "extended" => Self::Extended,
            "permanent" => Self::Permanent,
            other => Self::Custom(humantime::parse_duration(other).map_err(|e| {
                D::Error::custom(format!(
                    "TTL `{other}`: {e}; write short, standard, extended, permanent or a duration such as \"5m\""
                ))
            })?),
        })
    }
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
}

impl Lifetime {
    pub(crate) fn fresh_for(fresh: Option<Duration>) -> Self {
        Self { fresh, ..Self::default() }
    }
}
