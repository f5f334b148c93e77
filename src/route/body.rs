//! The body of a request as a part of its key.

use std::{collections::BTreeMap, fmt};

use http::{HeaderMap, header};
use serde::{
    Deserialize,
    de::{self, Deserializer},
};
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

use super::tenant::header_values;
use crate::key::{KeyBuf, push_secret};

/// How the bodies of requests are compared, where a route is read [by a method](crate::Route::method) that has one.
///
/// In a file: `body = "bytes"` or `"json"`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum BodyKey {
    /// Byte by byte (the default).
    #[default]
    Bytes,
    /// As JSON: spaces, escapes and the order of members do not count. Numbers are compared as they are written. What is no
    /// JSON, has a member twice, or is nested more than 32 deep, is compared byte by byte.
    Json,
}

impl BodyKey {
    /// Appends what tells this body, and how it is to be read, from others.
    pub(crate) fn push(self, key: &mut KeyBuf, headers: &HeaderMap, body: &[u8]) {
        let canonical = match self {
            Self::Json => serde_json::from_slice(body).ok().and_then(|json| {
                let mut out = vec![];
                push_json(&mut out, json, MOST_NESTED)?;
                Some(out)
            }),
            Self::Bytes => None,
        };
        let mut digest = Sha256::new();
        digest.update([u8::from(canonical.is_some())]);
        digest.update(canonical.as_deref().unwrap_or(body));
        let digest = digest.finalize();
        let mut parts = digest.to_vec();
        for name in [header::CONTENT_TYPE, header::CONTENT_ENCODING, header::CONTENT_LANGUAGE] {
            for value in header_values(headers, &name) {
                parts.extend_from_slice(&(value.len() as u64).to_be_bytes());
                parts.extend_from_slice(value);
            }
            parts.push(b'\n');
        }
        key.push(b'!');
        push_secret(key, &parts);
    }
}

/// What is nested more deeply is compared byte by byte.
const MOST_NESTED: usize = 32;

/// The members of an object, in the order of their names.
struct Members<'a>(BTreeMap<String, &'a RawValue>);

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = BTreeMap::new();
                while let Some((name, value)) = map.next_entry::<String, &'de RawValue>()? {
                    if members.insert(name, value).is_some() {
                        return Err(de::Error::custom("it is there twice"));
                    }
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Visitor)
    }
}

/// Appends a value in its canonical form; `None` if it has none, or is nested more deeply than this. (Each level is read again.)
fn push_json(out: &mut Vec<u8>, value: &RawValue, most: usize) -> Option<()> {
    let most = most.checked_sub(1)?;
    let text = value.get();
    match text.as_bytes().first()? {
        b'{' => {
            let Members(members) = serde_json::from_str(text).ok()?;
            out.push(b'{');
            for (name, value) in members {
                serde_json::to_writer(&mut *out, &name).ok()?;
                out.push(b':');
                push_json(out, value, most)?;
                out.push(b',');
            }
            out.push(b'}');
        }
        b'[' => {
            let values: Vec<&RawValue> = serde_json::from_str(text).ok()?;
            out.push(b'[');
            for value in values {
                push_json(out, value, most)?;
                out.push(b',');
            }
            out.push(b']');
        }
        b'"' => serde_json::to_writer(&mut *out, &serde_json::from_str::<String>(text).ok()?).ok()?,
        _ => out.extend_from_slice(text.as_bytes()),
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(how: BodyKey, body: &str, content_type: &'static str) -> Vec<u8> {
        let mut key = KeyBuf::new();
        let headers = HeaderMap::from_iter([(header::CONTENT_TYPE, content_type.parse().unwrap())]);
        how.push(&mut key, &headers, body.as_bytes());
        key
    }

    #[test]
    fn json_is_compared_by_what_it_says() {
        let deep = format!("{}1{}", "[".repeat(100_000), "]".repeat(100_000));
        for (a, b, same) in [
            (r#"{"a":1,"b":[1,2]}"#, r#" { "b" : [1, 2], "a" : 1 } "#, true),
            (r#"{"a":"\u0041"}"#, r#"{"a":"A"}"#, true),
            (r#"{"\u0061":1}"#, r#"{"a":1}"#, true),
            ("[1,2]", "[2,1]", false),
            ("1", "1.0", false),
            ("123456789012345678901", "123456789012345678902", false),
            (r#"{"a":1}"#, r#"{"a":1,"a":1}"#, false),
            (r#"{"a":1,"a":2}"#, r#"{"a":2,"a":1}"#, false),
            (r#"{"a":{"b":1,"b":2}}"#, r#"{"a":{"b":2}}"#, false),
            (r#"["a","b"]"#, r#"["a\",\"b"]"#, false),
            ("not json", "not  json", false),
            ("[1]", "[[1]]", false),
            ("[]", "{}", false),
            (&deep, "1", false),
        ] {
            let of = |body| key(BodyKey::Json, body, "application/json");
            assert_eq!(of(a) == of(b), same, "{a} {b}");
            assert_ne!(key(BodyKey::Bytes, a, "x"), key(BodyKey::Bytes, b, "x"), "{a} {b}");
        }
        assert_ne!(key(BodyKey::Bytes, "a", "text/plain"), key(BodyKey::Bytes, "a", "application/json"));
    }
}
