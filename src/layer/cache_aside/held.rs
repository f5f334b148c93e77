//! What this process holds for a request: what answers it on the spot, and what does so once the store has said that it is current.

use std::sync::Arc;

use http::{HeaderMap, HeaderName};
use matchit::Params;

use super::miss::{Behind, Turn, draw};
use crate::{
    clock::Millis,
    layer::{changes::Reads, core::Core, serve::Asked},
    route::{ReadRoute, variant_key},
    store::{Entry, Payload},
};

pub(super) struct Held {
    /// What answers, and what is done behind its reader.
    pub(super) found: Option<(Arc<Entry>, Behind)>,
    /// When.
    pub(super) now: Millis,
    /// What may answer as soon as the store says that it is current, and what is done about it then.
    pub(super) unconfirmed: Option<(Arc<Entry>, Behind)>,
    /// The key of its variant, where there are any.
    pub(super) variant: Option<Vec<u8>>,
    /// By which headers, and for how long that is remembered.
    pub(super) known: Option<(Box<[HeaderName]>, Millis)>,
}

pub(super) fn held(
    core: &Core,
    route: &ReadRoute,
    key: &[u8],
    asked: &Asked,
    headers: &HeaderMap,
    (whole, turn): (Option<&Reads>, Turn),
    params: &Params<'_, '_>,
) -> Held {
    let engine = &core.engine;
    let now = engine.now();
    let (mut variant, mut known) = (None, None);
    let suited = |entry| engine.suited(entry, || route.tags(key, params), &route.policy);
    let peek = |key: &[u8]| engine.peek(key, now, suited);
    let mut entry = if route.body.is_some() { None } else { peek(key) };
    if let Some(Payload::Vary(names)) = entry.as_deref().map(|entry| &entry.payload) {
        let key = variant_key(key, names, headers);
        let of_variant = peek(&key);
        known = entry.as_ref().map(|marker| (names.clone(), marker.keep_until()));
        (variant, entry) = (Some(key), of_variant);
    }
    let answers = |entry: &Entry| entry.response().is_some() && asked.ahead().is_none() && asked.accepts(entry, now);
    let found = entry.filter(|entry| answers(entry)).map(|entry| {
        if let Some(whole) = whole {
            whole.add_stamps(&entry.stamps);
        }
        let key = variant.as_deref().unwrap_or(key);
        let behind = draw(core, route, asked, (key, &entry), headers, now);
        (entry, behind)
    });
    let mut unconfirmed = None;
    if route.body.is_none() && asked.ahead().is_none() && turn == Turn::First {
        route.teller.watcher().looked(variant.as_deref().unwrap_or(key), found.is_some());
        // What leads to variants, or is a part of another response, is looked up.
        if found.is_none() && variant.is_none() && whole.is_none() {
            let entry = engine.held(key, route.policy.tier(), now, suited);
            unconfirmed = entry.and_then(|entry| to_confirm(core, route, (key, entry), asked, headers, now));
        }
    }
    Held { found, now, unconfirmed, variant, known }
}

fn to_confirm(
    core: &Core,
    route: &ReadRoute,
    (key, entry): (&[u8], Arc<Entry>),
    asked: &Asked,
    headers: &HeaderMap,
    now: Millis,
) -> Option<(Arc<Entry>, Behind)> {
    let is_plain = matches!(entry.payload, Payload::Response(_)) && entry.varied.is_none();
    if !is_plain || !asked.accepts(&entry, now) {
        return None;
    }
    let behind = draw(core, route, asked, (key, &entry), headers, now);
    Some((entry, behind))
}
