//! A request that was not answered on the spot.

use std::sync::Arc;

use bytes::Bytes;
use http::{Extensions, HeaderMap, HeaderName, Request, Response, StatusCode};
use http_body::Body;
use tokio::{sync::oneshot, time::timeout};
use tower_service::Service;
use tracing::Instrument;

use crate::{
    clock::Millis,
    engine::{Asker, Attended, Inside, Leader, Obtained, Source, Stale, Use},
    http::cache_status::{Forwarded, Reason},
    key::{Key, Tags, Tenant},
    layer::{
        body::CacheBody,
        changes::Reads,
        core::Core,
        extensions::take_tags,
        future::{self, Boxed, Origin},
        reading::Replied,
        serve::{Asked, How, serve, use_up},
    },
    observe::Teller,
    route::{ReadRoute, variant_key},
    store::{Entry, Payload},
};

pub(super) struct Miss {
    pub(super) mapped: Mapped,
    pub(super) so_far: SoFar,
}

/// What the mapping says of it, whatever becomes of it.
pub(super) struct Mapped {
    pub(super) core: Arc<Core>,
    pub(super) route: Arc<ReadRoute>,
    pub(super) tenant: Tenant,
    pub(super) tags: Tags,
}

/// What is known of it while an answer is sought.
pub(super) struct SoFar {
    /// The key without request headers that responses turned out to vary by.
    pub(super) primary: Key,
    /// The key with them, as far as they are known, if it is another.
    pub(super) variant: Option<Box<Key>>,
    pub(super) asked: Asked,
    /// The response may be stored only if it says that it is for everybody.
    pub(super) needs_public: bool,
    pub(super) turn: Turn,
    /// Why nothing stored has answered it so far.
    pub(super) reason: Reason,
    /// What responses are known to depend on, and for how long that is remembered.
    pub(super) known: Option<(Box<[HeaderName]>, Millis)>,
    /// What its response becomes a part of, if it is asked for by another load.
    pub(super) whole: Option<Reads>,
    /// What has been drawn of the entry that was made then.
    pub(super) drawn: Option<(Millis, Behind)>,
    /// What is done about what answers it.
    pub(super) behind: Behind,
}

/// Whether a request is looked for again, and why. What counts or picks requests has seen it the first time.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    First,
    /// What this process held of it is not current.
    NotCurrent,
    /// The store cannot be asked.
    Unavailable,
}

/// What is done about an entry that has been served.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Behind {
    Nothing,
    /// It is refreshed before it expires.
    Refresh,
    /// It is compared with what the inner service says.
    #[cfg(feature = "stats")]
    Audit,
}

/// An answer, or what is still to be done for it.
type Done<R, E> = Result<Response<CacheBody<R>>, Boxed<CacheBody<R>, E>>;

/// A request with its headers, which say which variant it wants.
struct Ask<'a> {
    mapped: &'a Mapped,
    so_far: &'a mut SoFar,
    headers: &'a HeaderMap,
}

/// A response that answers, and when. It is made where it is needed: it is larger, and would be moved through all that waits for it.
struct Good {
    entry: Arc<Entry>,
    source: Source,
    now: Millis,
}

impl Asker for Ask<'_> {
    type Answer = Good;

    fn judge(&mut self, entry: Arc<Entry>, source: Source, now: Millis) -> Use<Good> {
        let (so_far, Mapped { core, route, .. }) = (&mut *self.so_far, self.mapped);
        if let Some(whole) = &so_far.whole {
            whole.add_stamps(&entry.stamps);
            if source == Source::Stale && !matches!(entry.payload, Payload::Vary(_)) {
                whole.spoil();
            }
        }
        if let Payload::Vary(names) = &entry.payload {
            so_far.known = Some((names.clone(), entry.keep_until()));
        }
        let names = match (&entry.payload, entry.varied.as_deref()) {
            (Payload::Vary(names), _) => Some((names, None)),
            (_, Some((names, key))) => Some((names, Some(key))),
            _ => None,
        };
        if let Some((names, of_entry)) = names.filter(|_| source != Source::Stale) {
            let own = Key::new(variant_key(so_far.primary.as_bytes(), names, self.headers));
            if of_entry != Some(&own) {
                if own == *so_far.key() {
                    so_far.reason = Reason::Request;
                    return Use::Useless;
                }
                (so_far.variant, so_far.reason) = (Some(Box::new(own.clone())), Reason::VaryMiss);
                return Use::Elsewhere(own);
            }
        }
        // Who warms wants it replaced.
        if source == Source::Stale && so_far.asked.ahead().is_some() {
            return Use::Useless;
        }
        let is_good = source == Source::Stale || so_far.asked.accepts(&entry, now);
        if !is_good || entry.response().is_none() {
            so_far.reason = Reason::Request;
            return Use::Useless;
        }
        so_far.behind = match (source, so_far.drawn) {
            (Source::Store, Some((created, behind))) if created == entry.created => behind,
            (Source::Store, _) => {
                draw(core, route, &so_far.asked, (so_far.key().as_bytes(), &entry), self.headers, now)
            }
            _ => Behind::Nothing,
        };
        Use::Answer(Good { entry, source, now })
    }

    fn is_alone(&self) -> bool {
        self.so_far.is_partial(&self.mapped.route)
    }

    fn only_stored(&self) -> bool {
        self.so_far.only_stored()
    }

    fn accepts_expired(&self, entry: &Entry, now: Millis) -> bool {
        self.so_far.asked.accepts_stale(entry, now, &self.mapped.core.options.targeted_header)
    }
}

impl SoFar {
    pub(super) fn key(&self) -> &Key {
        self.variant.as_deref().unwrap_or(&self.primary)
    }

    /// Whether its response would be no good for others.
    fn is_partial(&self, route: &ReadRoute) -> bool {
        self.asked.is_partial() && !route.policy.loads_whole
    }

    fn only_stored(&self) -> bool {
        self.asked.directives().is_some_and(|directives| directives.only_if_cached)
    }
}

impl Miss {
    /// Whether the inner service is asked for the whole response: not for what cannot be stored.
    fn loads_whole(&self, leader: Option<&Leader>) -> bool {
        let is_shared = || leader.is_some_and(|leader| !leader.unshared);
        !self.so_far.asked.is_partial() || self.mapped.route.policy.loads_whole && is_shared()
    }

    /// Small for a hit, which most requests are: what is larger than 1,032 bytes, glibc's malloc takes a lock for.
    #[expect(clippy::manual_async_fn, reason = "an async fn holds what it is given twice")]
    pub(super) fn answer<S, B, R>(
        mut self,
        inner: S,
        request: Request<B>,
    ) -> impl Future<Output = Replied<R, S::Error>> + Send
    where
        S: Origin<B, R>,
        B: Send + 'static,
        R: Body<Data = Bytes, Error: Send> + Send + 'static,
    {
        async move {
            let (key, turn) = (self.so_far.key().clone(), self.so_far.turn);
            let (mapped, so_far) = (&self.mapped, &mut self.so_far);
            let Mapped { core, route, tags, .. } = mapped;
            let mut ask = Ask { mapped, so_far, headers: request.headers() };
            let obtained = match turn {
                Turn::Unavailable => Obtained::unavailable(&ask),
                _ => core.engine.obtain(key, tags, &route.policy, &mut ask).await,
            };
            match self.done(obtained, inner, request) {
                Ok(response) => Ok(response),
                Err(rest) => rest.await,
            }
        }
    }

    /// The answer, or what is still to be done for it.
    fn done<S, B, R>(mut self, obtained: Obtained<Good>, inner: S, mut request: Request<B>) -> Done<R, S::Error>
    where
        S: Origin<B, R>,
        B: Send + 'static,
        R: Body<Data = Bytes, Error: Send> + Send + 'static,
    {
        match obtained {
            Obtained::Answer(good) => {
                let behind = self.so_far.behind;
                // What the request's map held its extensions in has room for the outcome, if it is done with.
                let extensions = match behind {
                    Behind::Nothing => std::mem::take(request.extensions_mut()),
                    _ => Extensions::new(),
                };
                match self.show(good, extensions) {
                    Some(response) if behind == Behind::Nothing => Ok(response),
                    Some(response) => Err(Box::pin(self.replace(response, behind, inner, request))),
                    None => Err(Box::pin(self.call(inner, request, None))),
                }
            }
            Obtained::Absent => Ok(gateway_timeout(&self.mapped.route.teller)),
            Obtained::AnswerAndReload(good, leader) => {
                let Some(response) = self.show(good, Extensions::new()) else {
                    return Err(Box::pin(self.call(inner, request, Some(leader))));
                };
                if self.loads_whole(Some(&leader)) {
                    self.expired(&leader);
                    drop(self.attend(inner, request, Some(leader)));
                }
                Ok(response)
            }
            Obtained::Load(leader) => {
                if let Some(leader) = &leader {
                    self.expired(leader);
                }
                if !self.loads_whole(leader.as_ref()) {
                    return Err(Box::pin(self.pass(inner, request)));
                }
                Err(Box::pin(self.call(inner, request, leader)))
            }
        }
    }

    /// The response, with its outcome in these.
    fn show<R: Body>(&self, good: Good, extensions: Extensions) -> Option<Response<CacheBody<R>>> {
        let Good { entry, source, now } = good;
        let (Mapped { core, route, .. }, SoFar { asked, reason, .. }) = (&self.mapped, &self.so_far);
        let collapsed = Forwarded { collapsed: true, ..Forwarded::new(*reason) };
        let how = How::of(source, &route.teller, core.found_in(), collapsed);
        use_up(entry, now, asked, how, extensions)
    }

    /// Says so if what is stored has only grown old.
    fn expired(&mut self, leader: &Leader) {
        if stored(leader).is_some_and(|stale| stale.has_expired(self.mapped.core.engine.now())) {
            self.so_far.reason = Reason::Stale;
        }
    }

    /// A part of a response is no good for others.
    async fn pass<S, B, R>(self, mut inner: S, request: Request<B>) -> Replied<R, S::Error>
    where
        S: Service<Request<B>, Response = Response<R>>,
        R: Body,
    {
        let detail = if self.so_far.asked.head { "head" } else { "range" };
        let (mut parts, body) = future::call(&mut inner, request).await?.into_parts();
        let late = take_tags(
            &mut parts,
            &self.mapped.core,
            &self.mapped.tenant,
            self.mapped.route.data_type(),
            &Reads::default(),
        );
        if let Some(whole) = &self.so_far.whole {
            late.map_or_else(|_| whole.spoil(), |late| whole.add_tags(late.iter()));
        }
        let forwarded = Forwarded::because(self.so_far.reason, detail);
        self.mapped.route.teller.tell(forwarded, self.so_far.asked.key(), &mut parts);
        Ok(Response::from_parts(parts, CacheBody::inner(body)))
    }

    /// Waits for the origin, or for as long as its type has patience with it while there is something else to serve.
    fn call<S, B, R>(
        self,
        inner: S,
        request: Request<B>,
        leader: Option<Leader>,
    ) -> impl Future<Output = Replied<R, S::Error>> + Send + use<S, B, R>
    where
        S: Origin<B, R>,
        B: Send + 'static,
        R: Body<Data = Bytes, Error: Send> + Send + 'static,
    {
        let (core, route, asked, whole) =
            (self.mapped.core.clone(), self.mapped.route.clone(), self.so_far.asked.clone(), self.so_far.whole.clone());
        let (engine, policy) = (&core.engine, &route.policy);
        let stale = leader.as_ref().and_then(stored).filter(|stale| !stale.invalidated).cloned();
        let stale = stale.filter(|stale| stale.serves_on_error(engine.now(), policy));
        let patience = policy.soft_timeout.zip(stale);
        let mut load = self.attend(inner, request, leader);
        async move {
            let Some((patience, stale)) = patience else { return load.await };
            match timeout(patience, &mut load).await {
                Ok(replied) => replied,
                Err(_) => match serve_stale(&core, &route, (&asked, whole.as_ref()), &stale.entry) {
                    Some(response) => Ok(response),
                    None => load.await,
                },
            }
        }
    }

    pub(super) async fn follow_up<S, B, R>(self, behind: Behind, inner: S, request: Request<B>)
    where
        S: Service<Request<B>, Response = Response<R>>,
        R: Body<Data = Bytes>,
    {
        match behind {
            Behind::Nothing => {}
            Behind::Refresh => self.refresh(inner, request).await,
            #[cfg(feature = "stats")]
            Behind::Audit => self.audit(inner, request).await,
        }
    }

    /// What answers it is replaced: behind its reader, unless that is all he asks for; then what replaces it is the answer.
    async fn replace<S, B, R>(
        mut self,
        response: Response<CacheBody<R>>,
        behind: Behind,
        inner: S,
        request: Request<B>,
    ) -> Replied<R, S::Error>
    where
        S: Origin<B, R>,
        B: Send + 'static,
        R: Body<Data = Bytes, Error: Send> + Send + 'static,
    {
        let engine = self.mapped.core.engine.clone();
        if behind != Behind::Refresh || self.so_far.asked.ahead().is_none() {
            engine.spawn(self.follow_up(behind, inner, request).in_current_span());
            return Ok(response);
        }
        let Some(leader) = engine.lead_refresh(self.so_far.key(), &self.mapped.tags, &self.mapped.route.policy).await
        else {
            return Ok(response);
        };
        (self.so_far.reason, self.so_far.whole) = (Reason::Stale, None);
        self.attend(inner, request, Some(leader)).await
    }

    /// Replaces what has been served already, unless somebody else does.
    async fn refresh<S, B, R>(mut self, inner: S, request: Request<B>)
    where
        S: Service<Request<B>, Response = Response<R>>,
        R: Body<Data = Bytes>,
    {
        self.so_far.reason = Reason::Stale;
        // What it was a part of has been made of what was served.
        self.so_far.whole = None;
        if let Some(leader) =
            self.mapped.core.engine.lead_refresh(self.so_far.key(), &self.mapped.tags, &self.mapped.route.policy).await
        {
            let (nobody, _) = oneshot::channel();
            let scope = Inside::of(Some(&leader));
            scope.around(self.load(inner, request, Some(leader), nobody)).await;
        }
    }

    /// Calls the inner service, whatever becomes of its client.
    fn attend<S, B, R>(self, inner: S, request: Request<B>, leader: Option<Leader>) -> Attended<Replied<R, S::Error>>
    where
        S: Origin<B, R>,
        B: Send + 'static,
        R: Body<Data = Bytes, Error: Send> + Send + 'static,
    {
        let (reply, replied) = oneshot::channel();
        let engine = self.mapped.core.engine.clone();
        let scope = Inside::of(leader.as_ref());
        engine.attend(scope.around(self.load(inner, request, leader, reply)), replied)
    }
}

/// What is done about a stored entry that answers a request: some of it by chance.
pub(super) fn draw(
    core: &Core,
    route: &ReadRoute,
    asked: &Asked,
    (key, entry): (&[u8], &Entry),
    headers: &HeaderMap,
    now: Millis,
) -> Behind {
    let _ = (core, key, headers);
    match asked.is_partial() {
        true => Behind::Nothing,
        false if asked.replaces(entry, now, route.policy.early_refresh) => Behind::Refresh,
        #[cfg(feature = "stats")]
        false if audits(core, route, key, headers) => Behind::Audit,
        false => Behind::Nothing,
    }
}

#[cfg(feature = "stats")]
/// Whether a hit is to be compared. One with credentials is nobody else's business.
fn audits(core: &Core, route: &ReadRoute, key: &[u8], headers: &HeaderMap) -> bool {
    let Some(auditor) = &core.auditor else { return false };
    route.body.is_none()
        && !route.is_of_users()
        && auditor.picks(route.policy.audit, key, || route.what())
        && !headers.keys().any(|name| core.identity.is_credential(name))
}

/// The response that was stored when the load began.
pub(super) fn stored(leader: &Leader) -> Option<&Stale> {
    leader.stale().filter(|stale| matches!(stale.entry.payload, Payload::Response(_)))
}

/// What is stale, as an answer. What that becomes a part of is stale, too.
pub(super) fn serve_stale<R: Body>(
    core: &Core,
    route: &ReadRoute,
    (asked, whole): (&Asked, Option<&Reads>),
    entry: &Entry,
) -> Option<Response<CacheBody<R>>> {
    let response = serve(entry, core.engine.now(), asked, How::stale(&route.teller, core.found_in()))?;
    if let Some(whole) = whole {
        whole.spoil();
    }
    Some(response)
}

/// The answer to a request that wants nothing but what is stored, when nothing is (RFC 9111, section 5.2.1.7).
fn gateway_timeout<R: Body>(teller: &Teller) -> Response<CacheBody<R>> {
    let mut response = Response::new(CacheBody::full(Bytes::new(), None));
    *response.status_mut() = StatusCode::GATEWAY_TIMEOUT;
    let handled = Forwarded::because(Reason::Request, "only-if-cached");
    teller.say(handled, response.headers_mut(), None, None);
    response.extensions_mut().insert(teller.outcome(handled, None));
    response
}

#[cfg(all(test, target_pointer_width = "64"))]
mod tests {
    use http_body_util::Full;
    use tower::util::BoxCloneSyncService;

    use super::*;
    use crate::layer::future::Watched;

    type Bodies = Full<Bytes>;
    type Inner = BoxCloneSyncService<Request<Bodies>, Response<Bodies>, std::io::Error>;

    /// As the compiler lays it out, with services and bodies as they mostly are.
    #[test]
    fn what_a_hit_waits_in_is_small() {
        fn size<F>(_: fn(Miss, Inner, Request<Bodies>) -> F) -> usize {
            size_of::<Watched<F>>()
        }
        let size = size(Miss::answer::<Inner, Bodies, Bodies>);
        assert!(size <= 1_032, "{size}");
    }
}
