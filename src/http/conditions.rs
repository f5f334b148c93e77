//! Conditional requests (RFC 9110, section 13): those of clients, and ours to the origin.

use std::time::SystemTime;

use http::{
    HeaderMap, HeaderValue,
    header::{self, InvalidHeaderValue},
};
use sha2::{Digest, Sha256};

use super::directives::{date, single};

/// What the entity tags begin with that the cache computes: the origin does not know them. They are weak, for a layer outside may
/// compress what they name, and give two representations the same one.
const OWN_TAG: &str = "W/\"tca-";

/// Under which condition a client wants the response.
#[derive(Clone, Debug, Default)]
pub(crate) struct Preconditions {
    none_match: Vec<HeaderValue>,
    modified_since: Option<SystemTime>,
}

impl Preconditions {
    pub(crate) fn of(headers: &HeaderMap) -> Self {
        let none_match: Vec<_> = headers.get_all(header::IF_NONE_MATCH).iter().cloned().collect();
        // Of two conditions the tag counts (RFC 9110, section 13.2.2).
        let modified_since =
            single(headers, header::IF_MODIFIED_SINCE).filter(|_| none_match.is_empty()).and_then(date);
        Self { none_match, modified_since }
    }

    /// Whether what the client has is what is stored (RFC 9110, sections 13.1.2 and 13.1.3).
    pub(crate) fn is_not_modified(&self, stored: &HeaderMap) -> bool {
        if !self.none_match.is_empty() {
            // What is empty is no tag.
            let own = stored.get(header::ETAG).map(HeaderValue::as_bytes).map(opaque).filter(|own| !own.is_empty());
            return self.none_match.iter().any(|line| {
                line.as_bytes().trim_ascii() == b"*"
                    || own.is_some_and(|own| tags(line.as_bytes()).any(|tag| tag == own))
            });
        }
        let Some(since) = self.modified_since else { return false };
        // When a response was made proves nothing of what it was made of.
        single(stored, header::LAST_MODIFIED).and_then(date).is_some_and(|modified| modified <= since)
    }
}

/// An entity tag without its weakness, which does not count here.
fn opaque(tag: &[u8]) -> &[u8] {
    let tag = tag.trim_ascii();
    tag.strip_prefix(b"W/").unwrap_or(tag)
}

/// The tags of a list. A comma in a tag parts nothing.
fn tags(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut quoted = false;
    line.split(move |&b| {
        quoted ^= b == b'"';
        b == b',' && !quoted
    })
    .map(opaque)
}

/// A weak entity tag: 120 bits of the body's SHA-256.
pub(crate) fn entity_tag(body: &[u8]) -> Result<HeaderValue, InvalidHeaderValue> {
    let digest = Sha256::digest(body);
    let bits = digest.first_chunk().map_or(0, |first| u128::from_be_bytes(*first)) >> 8;
    HeaderValue::from_str(&format!("{OWN_TAG}{bits:030x}\""))
}

/// Asks the origin whether what is stored is still good (RFC 9111, section 4.3.1); whether there is anything to ask by.
pub(crate) fn validate(request: &mut HeaderMap, stored: &HeaderMap) -> bool {
    let tag = stored.get(header::ETAG).filter(|tag| !tag.as_bytes().starts_with(OWN_TAG.as_bytes()));
    let modified = stored.get(header::LAST_MODIFIED);
    if let Some(tag) = tag {
        request.insert(header::IF_NONE_MATCH, tag.clone());
    }
    if let Some(modified) = modified {
        request.insert(header::IF_MODIFIED_SINCE, modified.clone());
    }
    tag.is_some() || modified.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(lines: &[(&'static str, &'static str)]) -> HeaderMap {
        let name = http::HeaderName::from_static;
        lines.iter().map(|(n, v)| (name(n), HeaderValue::from_static(v))).collect()
    }

    /// RFC 9110, sections 8.8.3.2 and 13.1.
    #[test]
    fn conditions_compare_weakly_and_by_second() {
        let earlier = "Sun, 06 Nov 1994 08:49:36 GMT";
        let modified = "Sun, 06 Nov 1994 08:49:37 GMT";
        let later = "Sun, 06 Nov 1994 08:49:38 GMT";
        for (request, stored, expected) in [
            (("if-none-match", "\"a\""), ("etag", "\"a\""), true),
            (("if-none-match", "W/\"a\""), ("etag", "\"a\""), true),
            (("if-none-match", "\"a\""), ("etag", "W/\"a\""), true),
            (("if-none-match", "\"b\", \"a\" , \"c\""), ("etag", "\"a\""), true),
            (("if-none-match", "\"b,\", \"a,a\""), ("etag", "\"a,a\""), true),
            (("if-none-match", "\"b,a\""), ("etag", "\"a\""), false),
            (("if-none-match", "a"), ("etag", "\"a\""), false),
            (("if-none-match", "*"), ("x", "y"), true),
            (("if-none-match", "\"a\""), ("x", "y"), false),
            (("if-none-match", ""), ("etag", ""), false),
            (("if-modified-since", modified), ("last-modified", modified), true),
            (("if-modified-since", later), ("last-modified", modified), true),
            (("if-modified-since", earlier), ("last-modified", modified), false),
            (("if-modified-since", "Sunday, 06-Nov-94 08:49:37 GMT"), ("last-modified", modified), true),
            (("if-modified-since", modified), ("date", modified), false),
            (("if-modified-since", later), ("date", modified), false),
            (("if-modified-since", "nonsense"), ("last-modified", modified), false),
            (("if-modified-since", modified), ("x", "y"), false),
        ] {
            let found = Preconditions::of(&headers(&[request])).is_not_modified(&headers(&[stored]));
            assert_eq!(found, expected, "{request:?} {stored:?}");
        }
    }
}
