//! What of a request can be asked again by the job that warms: as little as makes the same key, and nothing that is anybody's own.
//! (Feature `warm`.)

use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderName, Method, header, request};

use super::{
    core::Core,
    sampler::{Replay, Seen, Warmup},
};
use crate::{
    observe::tag_hash,
    route::{At, Place, ReadRoute, Wanted},
};

/// Longer ones are not kept.
const LONGEST_PATH: usize = 2_048;
const LONGEST_VALUE: usize = 256;
const LARGEST_BODY: usize = 4_096;

/// What of a request its response may depend on, besides what its route says.
static KEPT: [HeaderName; 8] = [
    header::HOST,
    header::FORWARDED,
    HeaderName::from_static("x-forwarded-host"),
    HeaderName::from_static("x-forwarded-proto"),
    header::ACCEPT,
    header::ACCEPT_ENCODING,
    header::ACCEPT_LANGUAGE,
    header::CONTENT_TYPE,
];

/// A request that is picked, without its body.
pub(super) struct Picked {
    core: Arc<Core>,
    seen: Box<Seen>,
}

impl Picked {
    fn send(self) {
        if let Some(sampler) = self.core.sampler.get() {
            sampler.asked(self.seen);
        }
    }

    /// The same with a body, by which it is asked.
    pub(super) fn send_with(mut self, key: &[u8], body: &Bytes) {
        if body.len() <= LARGEST_BODY {
            self.seen.id = tag_hash(key);
            self.seen.replay.body = Some(body.to_vec());
            self.send();
        }
    }
}

/// Tells the job what of a request it may ask again, if this is one that is picked: no credentials, and as little of it as makes
/// the same key. One that is asked by its body is told when that has been read.
pub(super) fn picked(
    core: &Arc<Core>,
    route: &ReadRoute,
    (place, at): (&Place<'_>, &At<'_, '_>),
    parts: &request::Parts,
    (wanted, variant): (&Wanted<'_>, Option<&[u8]>),
) -> Option<Picked> {
    let sampler = core.sampler.get()?;
    // What only a `HEAD` asks for stores nothing.
    if !sampler.picks() || parts.method == Method::HEAD || parts.extensions.get::<Warmup>().is_some() {
        return None;
    }
    let is_private = |name: &HeaderName| core.identity.is_credential(name);
    // Of a header that a route varies by nobody knows whose it is.
    let is_plain = |name: &HeaderName| KEPT.contains(name) || core.tenants.named_by() == Some(name);
    let varies = !route.vary.iter().all(is_plain);
    if varies || route.is_of_users() || wanted.needs_public || parts.headers.keys().any(is_private) {
        return None;
    }
    // No more of it than counts.
    let query = parts.uri.query().map(|query| route.counted_query(query)).filter(|query| !query.is_empty());
    let from = match (parts.uri.scheme_str(), parts.uri.authority()) {
        (Some(scheme), Some(authority)) => format!("{scheme}://{authority}"),
        _ => String::new(),
    };
    let path = match query {
        Some(query) => format!("{from}{}?{query}", place.full()),
        None => format!("{from}{}", place.full()),
    };
    let names = KEPT.iter().chain(core.tenants.named_by());
    let mut headers: Vec<(String, Vec<u8>)> = vec![];
    for name in names {
        let own = || (name.as_str().to_owned(), parts.headers.get(name).map(|value| value.as_bytes().to_vec()));
        if let (name, Some(value)) = own()
            && headers.iter().all(|(known, _)| *known != name)
        {
            headers.push((name, value));
        }
    }
    if path.len() > LONGEST_PATH || headers.iter().any(|(_, value)| value.len() > LONGEST_VALUE) {
        return None;
    }
    let replay = Replay { method: parts.method.as_str().to_owned(), path, headers, body: None };
    let (again, ()) = replay.request(())?.into_parts();
    let same = route.wanted(&again, at, &core.known()).is_ok_and(|again| again.key == wanted.key);
    let picked = same.then(|| {
        let tenant = core.space.tenant(&*wanted.tenant);
        let tags = route.tags(tenant.head(), at.params).iter().map(|tag| tag_hash(tag.as_bytes())).collect();
        let id = tag_hash(variant.unwrap_or(&wanted.key));
        let seen = Box::new(Seen { id, tenant: wanted.tenant.as_ref().into(), tags, replay });
        Picked { core: core.clone(), seen }
    })?;
    if route.body.is_some() {
        return Some(picked);
    }
    picked.send();
    None
}
