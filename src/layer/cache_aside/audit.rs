//! A hit that is compared with what the inner service says.

use std::{sync::Arc, time::Instant};

use bytes::Bytes;
use http::{Request, Response, uri::PathAndQuery};
use http_body::Body;
use tokio::sync::oneshot;
use tower_service::Service;

use super::miss::{Miss, stored};
use crate::{
    engine::Inside,
    http::cache_status::Reason,
    layer::{
        audit::{Suspect, differences, is_same, values},
        core::Core,
    },
    observe::{Event, What, name_of, shortened, tag_hash},
    route::ReadRoute,
    store::Entry,
};

/// A route whose loads differ so often from each other, with no write in between, says something else each time.
const STRIKES: u8 = 3;

/// So many writes are named.
const SUSPECTS: usize = 10;

/// How a comparison ended.
enum Compared {
    /// They are the same, or nobody can tell.
    Same,
    /// They are not, and it is to be seen whether that means anything.
    Suspect(Suspect),
    Stale(Suspect),
    Unreproducible,
}

impl Miss {
    /// Loads what was served anew, and compares.
    pub(super) async fn audit<S, B, R>(mut self, inner: S, request: Request<B>)
    where
        S: Service<Request<B>, Response = Response<R>>,
        R: Body<Data = Bytes>,
    {
        let (core, route, key) = (self.mapped.core.clone(), self.mapped.route.clone(), self.so_far.key().clone());
        let Some((auditor, permit)) = core.auditor.as_ref().and_then(|auditor| Some((auditor, auditor.permit()?)))
        else {
            return;
        };
        let suspect = auditor.take_suspect(&key);
        (self.so_far.reason, self.so_far.whole) = (Reason::Stale, None);
        let (tags, tenant) = (self.mapped.tags.clone(), self.mapped.tenant.clone());
        let path = request.uri().path_and_query().map_or("", PathAndQuery::as_str).to_owned();
        let Some(leader) = core.engine.lead_refresh(&key, &tags, &route.policy).await else { return };
        let held = stored(&leader).filter(|stale| !stale.invalidated).map(|stale| stale.entry.clone());
        // What has just been dropped is nobody's fault, and what shall not be stored cannot be compared.
        let Some(old) = held.filter(|_| !leader.unshared) else { return };
        let began = Instant::now();
        let (nobody, _) = oneshot::channel();
        let scope = Inside::of(Some(&leader));
        scope.around(self.load(inner, request, Some(leader), nobody)).await;
        auditor.took(began.elapsed(), old.load);
        drop(permit);
        let Ok(Some(found)) = core.engine.look_at(&key, &tags, &route.policy).await else { return };
        if found.lost().next().is_some() {
            return;
        }
        let was_written = |since: u64| writes(&core, tenant.name(), since).next().is_some();
        let result = match compared(suspect, old, found.entry, was_written) {
            Compared::Same => "ok",
            Compared::Suspect(suspect) => return auditor.suspect(&key, route.what(), suspect),
            Compared::Unreproducible => {
                if auditor.is_unreproducible(route.what()) {
                    unreproducible(&core, &route, &path, tenant.name());
                }
                "not_reproducible"
            }
            Compared::Stale(suspect) => {
                if !core.engine.stays_current(&suspect.old.stamps).await {
                    return;
                }
                stale(&core, &route, (&path, tenant.name()), &suspect);
                "stale"
            }
        };
        core.observer.audited(route.data_type(), result);
    }
}

/// What two loads, one after the other, say of what was served.
fn compared(suspect: Option<Suspect>, old: Arc<Entry>, new: Arc<Entry>, was_written: impl Fn(u64) -> bool) -> Compared {
    let Some(Suspect { old: first, new: second, strikes }) = suspect else {
        return if is_same(&old, &new) { Compared::Same } else { Compared::Suspect(Suspect { old, new, strikes: 0 }) };
    };
    // Somebody has loaded it meanwhile, and got something else.
    if !is_same(&second, &old) {
        return Compared::Same;
    }
    let strikes = if was_written(second.created) { strikes } else { strikes + 1 };
    match is_same(&old, &new) {
        true => Compared::Stale(Suspect { old: first, new, strikes }),
        false if strikes >= STRIKES => Compared::Unreproducible,
        false => Compared::Suspect(Suspect { old: first, new, strikes }),
    }
}

/// The writes of a tenant since then, the last one first: what they were, and which tags they dropped.
fn writes(core: &Core, tenant: &[u8], since: u64) -> impl Iterator<Item = (String, Arc<[u64]>)> {
    let tenant = Some(name_of(tenant));
    let is_it = |event: &Event| match &event.what {
        What::Invalidation { tenant: own, .. } => event.at + 10 >= since && (own.is_none() || *own == tenant),
        _ => false,
    };
    core.observer.recent.newest(Some("invalidation"), 100, is_it).into_iter().filter_map(|event| match event.what {
        What::Invalidation { what, all, .. } => Some((what, all)),
        _ => None,
    })
}

fn unreproducible(core: &Core, route: &ReadRoute, path: &str, tenant: &[u8]) {
    tracing::warn!(
        route = route.what(),
        "not audited any more: it answers something else each time (the time of day? a random number?)"
    );
    core.observer.note(What::Audit {
        result: "not_reproducible",
        route: route.what(),
        path: shortened(path),
        tenant: Some(name_of(tenant)),
        data_type: route.data_type().to_owned(),
        age_ms: 0,
        fields: vec![],
        values: vec![],
        tags: vec![],
        suspects: vec![],
    });
}

/// A stale response was served; it is healed. The writes since its fill that dropped none of its tags are suspect.
fn stale(core: &Core, route: &ReadRoute, (path, tenant): (&str, &[u8]), suspect: &Suspect) {
    let tags: Vec<_> = suspect.old.stamps.iter().map(|stamp| stamp.tag.label()).collect();
    let hashes: Vec<_> = suspect.old.stamps.iter().map(|stamp| tag_hash(stamp.tag.named())).collect();
    let mut suspects: Vec<String> = vec![];
    for (what, dropped) in writes(core, tenant, suspect.old.created) {
        if !dropped.iter().any(|tag| hashes.contains(tag)) && !suspects.contains(&what) && suspects.len() < SUSPECTS {
            suspects.push(what);
        }
    }
    let fields = differences(&suspect.old, &suspect.new);
    let shows = core.auditor.as_ref().is_some_and(|auditor| auditor.shows);
    let values = if shows { values(&suspect.old, &suspect.new, &fields) } else { vec![] };
    tracing::error!(
        route = route.what(),
        ?fields,
        ?suspects,
        "audit: a stale response was served (it is healed): a write that changes it is not declared to drop it"
    );
    core.observer.stale(route.data_type(), &route.what());
    core.observer.note(What::Audit {
        result: "stale",
        route: route.what(),
        path: shortened(path),
        tenant: Some(name_of(tenant)),
        data_type: route.data_type().to_owned(),
        age_ms: suspect.new.created.saturating_sub(suspect.old.created),
        fields,
        values,
        tags,
        suspects,
    });
}
