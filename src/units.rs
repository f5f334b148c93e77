//! Durations and sizes, as a configuration file writes them.

use std::{fmt, time::Duration};

use bytesize::ByteSize;
use serde::{Deserialize, Deserializer, de};

/// Reads an optional duration such as `"5s"`.
pub(crate) fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    let text = String::deserialize(deserializer)?;
    let duration = humantime::parse_duration(&text);
    duration.map(Some).map_err(|e| de::Error::custom(format!("duration `{text}`: {e}; write one such as \"5s\"")))
}

/// Reads an optional number of bytes: a number, or a string such as `"64 MiB"`.
pub(crate) fn bytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    struct Visitor;
    impl de::Visitor<'_> for Visitor {
        type Value = Option<u64>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a number of bytes, or a string such as \"64 MiB\"")
        }

        fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<Option<u64>, E> {
            u64::try_from(bytes).map(Some).map_err(|_| E::invalid_value(de::Unexpected::Signed(bytes), &self))
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<Option<u64>, E> {
            let size: Result<ByteSize, _> = text.parse();
            size.map(|size| Some(size.as_u64())).map_err(|_| E::invalid_value(de::Unexpected::Str(text), &self))
        }
    }
    deserializer.deserialize_any(Visitor)
}
