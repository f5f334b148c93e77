//! The query as a part of the variant: sorted by name, repeated names kept in their order, every part escaped anew.
//!
//! `%41` and `A` are the same byte (RFC 3986, section 2.4) and give the same key. `+` stays apart from both `%20` and
//! `%2B`: a handler may read it either way, and a miss is cheaper than the wrong answer.

use std::borrow::Cow;

use percent_encoding::percent_decode_str;
use serde::{Deserialize, Deserializer, de};
use smallvec::SmallVec;

use crate::key::{KeyBuf, push_escaped};

/// Which query parameters a response depends on.
///
/// They are compared in their canonical form: `%41` is `A` and empty parts are none, parameters of different names are in any
/// order, and the values of one name in theirs. A handler that tells `a=1&b=2` from `b=2&a=1`, or a `;` from a `&`, needs
/// [`Exact`](Self::Exact).
///
/// In a file: `query = "all"`, `"exact"`, `"ignore"`, or `query = ["limit", "offset"]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Query {
    /// All of them (the default).
    #[default]
    All,
    /// The query as it was sent, byte by byte.
    Exact,
    /// None of them.
    Ignore,
    /// Only these; others are not part of the key.
    Only(Vec<String>),
}

impl Query {
    /// Only these parameters; others are not part of the key.
    pub fn only<T: Into<String>>(names: impl IntoIterator<Item = T>) -> Self {
        Self::Only(names.into_iter().map(Into::into).collect())
    }

    /// As much of a query as is a part of the key, as it was sent.
    #[cfg(feature = "warm")]
    pub(crate) fn counted(&self, query: &str) -> String {
        match self {
            Self::All | Self::Exact => query.to_owned(),
            Self::Ignore => String::new(),
            Self::Only(names) => {
                let counts = |part: &&str| {
                    let name = decode_name(part.split_once('=').map_or(*part, |(name, _)| name));
                    names.iter().any(|counted| counted.as_bytes() == &*name)
                };
                query.split('&').filter(counts).collect::<Vec<_>>().join("&")
            }
        }
    }

    pub(crate) fn push(&self, buf: &mut KeyBuf, query: &str) {
        if *self == Self::Exact {
            buf.push(b'?');
            return push_escaped(buf, query.as_bytes());
        }
        if matches!(self, Self::Ignore) || query.is_empty() {
            return;
        }
        let mut pairs = SmallVec::<[_; 8]>::new();
        for part in query.split('&').filter(|p| !p.is_empty()) {
            let (raw, value) = part.split_once('=').map_or((part, None), |(n, v)| (n, Some(v)));
            let name = decode_name(raw);
            let counts = match self {
                Self::Only(names) => names.iter().any(|n| n.as_bytes() == &*name),
                Self::All | Self::Exact | Self::Ignore => true,
            };
            if counts {
                pairs.push((name, raw, value));
            }
        }
        // Stable: the order of the values of one name, however it is spelled, may mean something.
        pairs.sort_by(|a, b| a.0.cmp(&b.0));
        for (i, (_, name, value)) in pairs.iter().enumerate() {
            buf.push(if i == 0 { b'?' } else { b'&' });
            push_decoded(buf, name);
            if let Some(value) = value {
                buf.push(b'=');
                push_decoded(buf, value);
            }
        }
    }
}

/// As `application/x-www-form-urlencoded` has it.
fn decode_name(raw: &str) -> Cow<'_, [u8]> {
    if raw.contains('+') {
        let spaced = raw.replace('+', " ");
        return Cow::Owned(percent_decode_str(&spaced).collect());
    }
    percent_decode_str(raw).into()
}

fn push_decoded(buf: &mut KeyBuf, raw: &str) {
    for (i, piece) in raw.split('+').enumerate() {
        if i > 0 {
            buf.push(b'+');
        }
        push_escaped(buf, &Cow::from(percent_decode_str(piece)));
    }
}

impl<'de> Deserialize<'de> for Query {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Query;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("\"all\", \"exact\", \"ignore\" or a list of query parameters")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Query, E> {
                match text {
                    "all" => Ok(Query::All),
                    "exact" => Ok(Query::Exact),
                    "ignore" => Ok(Query::Ignore),
                    other => Err(E::invalid_value(de::Unexpected::Str(other), &self)),
                }
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, mut seq: A) -> Result<Query, A::Error> {
                let mut names = vec![];
                while let Some(name) = seq.next_element()? {
                    names.push(name);
                }
                Ok(Query::Only(names))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn variant(query: &str) -> String {
        variant_of(&Query::All, query)
    }

    fn variant_of(rule: &Query, query: &str) -> String {
        let mut buf = KeyBuf::new();
        rule.push(&mut buf, query);
        String::from_utf8(buf.to_vec()).unwrap()
    }

    #[test]
    fn order_and_spelling_do_not_matter_but_values_do() {
        for (a, b, same) in [
            ("a=1&b=2", "b=2&a=1", true),
            ("%61=%31", "a=1", true),
            ("a=1&&b=2&", "a=1&b=2", true),
            ("a=1&a=2", "a=2&a=1", false),
            ("a", "a=", false),
            ("a=1", "a=1&b", false),
            ("a=%26b=1", "a=&b=1", false),
            ("a=%2B", "a=+", false),
            ("a=%20", "a=+", false),
            ("a=1%3D2", "a=1=2", true),
            ("a%3D1", "a=1", false),
            ("a+b=1", "a%20b=1", false),
            ("a+b=1", "a%2Bb=1", false),
            ("%61=1&a=2", "a=2&%61=1", false),
            ("a=%2b", "a=%2B", true),
            ("a=1+2", "a=12", false),
        ] {
            assert_eq!(variant(a) == variant(b), same, "{a} {b}");
        }
    }

    #[test]
    fn the_allow_list_is_all_that_counts() {
        let only = Query::only(["limit", "offset"]);
        assert_eq!(variant_of(&only, "utm=1&offset=2&limit=1"), "?limit=1&offset=2");
        assert_eq!(variant_of(&only, "utm=1"), "");
        assert_eq!(variant_of(&Query::Ignore, "limit=1"), "");
        for (a, b) in [("a=1&b=2", "b=2&a=1"), ("%61=1", "a=1"), ("a=1&", "a=1"), ("", "a")] {
            assert_ne!(variant_of(&Query::Exact, a), variant_of(&Query::Exact, b), "{a} {b}");
        }
    }

    /// As it was sent, so that it can be sent again.
    #[test]
    #[cfg(feature = "warm")]
    fn what_counts_of_a_query_is_kept_as_it_was_sent() {
        let only = Query::only(["limit", "a b"]);
        for (query, counted) in [("utm=1&limit=2", "limit=2"), ("%6cimit=%31&a+b&c", "%6cimit=%31&a+b"), ("utm", "")] {
            assert_eq!(only.counted(query), counted, "{query}");
            assert_eq!(variant_of(&only, counted), variant_of(&only, query), "{query}");
        }
        assert_eq!([Query::All, Query::Exact, Query::Ignore].map(|rule| rule.counted("b&a=1")), ["b&a=1", "b&a=1", ""]);
    }

    proptest! {
        #[test]
        fn different_pairs_give_different_variants(
            a in proptest::collection::vec(("[a-c&=+%]{0,2}", "[a-c&=+% ]{0,3}"), 0..4),
            b in proptest::collection::vec(("[a-c&=+%]{0,2}", "[a-c&=+% ]{0,3}"), 0..4),
        ) {
            let encode = |s: &str| percent_encoding::utf8_percent_encode(s, percent_encoding::NON_ALPHANUMERIC).to_string();
            let query = |pairs: &[(String, String)]| {
                pairs.iter().map(|(n, v)| format!("{}={}", encode(n), encode(v))).collect::<Vec<_>>().join("&")
            };
            let canonical = |pairs: &[(String, String)]| {
                let mut pairs = pairs.to_vec();
                pairs.sort_by(|a, b| a.0.cmp(&b.0));
                pairs
            };
            prop_assert_eq!(canonical(&a) == canonical(&b), variant(&query(&a)) == variant(&query(&b)));
        }
    }
}
