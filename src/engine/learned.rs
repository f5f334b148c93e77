//! What a reload tells of how long to keep what it loads: whether it is another than what it replaces, though no write has
//! dropped that, and what that says of its key and its type.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderName};
use quick_cache::sync::Cache as Memo;
use serde_json::Value;

use crate::{
    catalog::{Bounds, Learned},
    key::Tag,
    store::{Entry, Payload},
};

/// So many types of tenants are told apart; of others counts what their type has shown anywhere.
const TENANTS: usize = 1_024;

/// Headers that say when and how a response came, for how long it is good, or once more what its body says.
const ASIDE: [&str; 11] = [
    "age",
    "cache-control",
    "cache-status",
    "content-length",
    "date",
    "etag",
    "expires",
    "last-modified",
    "server-timing",
    "tower-cache-control",
    "via",
];

/// What keys of a type have shown to this process, by tenant and in all of them: for keys of which nothing is known. Lost
/// without harm, as are polls that come at the same moment.
pub(super) struct Types(Memo<Bytes, Learned>);

impl Types {
    pub(super) fn new() -> Self {
        Self(Memo::new(TENANTS))
    }

    /// What is assumed of a key whose entries have this tag.
    pub(super) fn seed(&self, of: Option<&Tag>) -> Learned {
        let names = of.map(names);
        let known = names.iter().flatten().filter_map(|name| self.0.get(name)).find(Learned::is_enough);
        known.unwrap_or_default().seed()
    }

    pub(super) fn add(&self, of: Option<&Tag>, poll: &Poll, bounds: &Bounds) {
        for name in of.map(names).into_iter().flatten() {
            let known = self.0.get(&name).unwrap_or_default();
            self.0.insert(name, known.pooled(poll.change.is_some(), poll.interval, bounds));
        }
    }
}

/// A reload of what no write has dropped.
pub(super) struct Poll {
    /// After how long.
    pub(super) interval: Duration,
    /// What it replaces, if that is another.
    pub(super) change: Option<Arc<Entry>>,
}

/// A type of a tenant, and the type alone.
fn names(all: &Tag) -> [Bytes; 2] {
    [all.0.clone(), all.0.slice(all.tenant().len()..)]
}

/// Whether two payloads say the same; `None` if they are of different kinds.
pub(super) fn is_same(one: &Payload, other: &Payload, ignored: &[String]) -> Option<bool> {
    let says = |name: &HeaderName| {
        !ASIDE.contains(&name.as_str()) && !ignored.iter().any(|ignored| ignored.eq_ignore_ascii_case(name.as_str()))
    };
    let is_same_map = |one: &HeaderMap, other: &HeaderMap| {
        let has = |name: &HeaderName| one.get_all(name).iter().eq(other.get_all(name));
        one.keys().chain(other.keys()).filter(|name| says(name)).all(has)
    };
    match (one, other) {
        (Payload::Value(one), Payload::Value(other)) => Some(one == other),
        (Payload::Response(one), Payload::Response(other)) => {
            let none = HeaderMap::new();
            let [trailers, other_trailers] = [one, other].map(|of| of.trailers.as_deref().unwrap_or(&none));
            Some(
                one.status == other.status
                    && is_same_map(&one.headers.to_map(), &other.headers.to_map())
                    && is_same_map(trailers, other_trailers)
                    && is_same_body(&one.body, &other.body),
            )
        }
        _ => None,
    }
}

/// Members of a JSON object have no order.
fn is_same_body(one: &[u8], other: &[u8]) -> bool {
    let json = |body: &[u8]| serde_json::from_slice::<Value>(body).ok();
    one == other || json(one).is_some_and(|one| json(other).is_some_and(|other| one == other))
}
