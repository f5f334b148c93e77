//! The layer that answers reads from the cache.
//!
//! A hit in this process is answered on the spot: no task, no boxing, no lock held. Everything else goes through the
//! engine, which tells whether to answer, to wait for another request's call, or to call the inner service. That call
//! runs in a task of its own, so it goes on when its client hangs up.

use std::{
    future::poll_fn,
    panic::AssertUnwindSafe,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt;
use http::{HeaderMap, HeaderName, Method, Request, Response, StatusCode, header, request, response};
use http_body::{Body, Frame};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
};
use tower_layer::Layer;
use tower_service::Service;
use tracing::Instrument;

use super::{
    NoCache,
    body::{CacheBody, Piece},
    cache_status::{Forwarded, Handled, Reason},
    freshness::{Exchange, Storable, judge, stored_headers, updated_headers},
    future::{self, Finish, ResponseFuture},
    serve::{Asked, entity_tag, serve, validate},
    tags, take_ready,
};
use crate::{
    Cache,
    catalog::Freshness,
    engine::{Attempt, Begin, Landed, Leader, Stale},
    key::{Key, Tag},
    route::{ReadRoute, Wanted, variant_key},
    store::{Entry, Lifetime, Payload, StoredResponse},
};

/// A body that streams for longer than this is not waited for by others, and not stored.
const STREAM_LIMIT: Duration = Duration::from_secs(10);

/// Wraps services in [`CacheAside`].
#[derive(Clone, Debug)]
pub struct CacheAsideLayer {
    cache: Cache,
}

impl CacheAsideLayer {
    /// A layer over this cache.
    pub fn new(cache: Cache) -> Self {
        Self { cache }
    }
}

impl<S> Layer<S> for CacheAsideLayer {
    type Service = CacheAside<S>;

    fn layer(&self, inner: S) -> Self::Service {
        CacheAside { inner, cache: self.cache.clone() }
    }
}

/// Answers the cache's routes from the cache, and calls the inner service for the rest.
#[derive(Clone, Debug)]
pub struct CacheAside<S> {
    inner: S,
    cache: Cache,
}

impl<S, B, R> Service<Request<B>> for CacheAside<S>
where
    S: Service<Request<B>, Response = Response<R>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Send,
    B: Body + Send + 'static,
    R: Body<Data = Bytes> + Send + 'static,
    R::Error: Send,
{
    type Response = Response<CacheBody<R>>;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future, R, CacheBody<R>, S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let (parts, body) = request.into_parts();
        let Some(found) = self.cache.routes().read(&parts.uri) else {
            return ResponseFuture::pass(self.inner.call(Request::from_parts(parts, body)), None, CacheBody::inner);
        };
        let route: &Arc<ReadRoute> = found.value;
        let passed = match self.wanted(route, &parts, &body, &found.params) {
            Ok((wanted, asked)) => {
                let engine = self.cache.engine();
                let now = engine.now();
                let mut variant = None;
                let mut entry = engine.peek(&wanted.key, now);
                if let Some(Payload::Vary(names)) = entry.as_deref().map(|e| &e.payload) {
                    let key = variant_key(&wanted.key, names, &parts.headers);
                    let of_variant = engine.peek(&key, now);
                    (variant, entry) = (Some(key), of_variant);
                }
                let entry = entry.filter(|entry| asked.accepts(entry, now));
                let response = entry.as_ref().and_then(|entry| serve(entry, now, &asked, None));
                let is_due = !asked.is_partial() && entry.is_some_and(|e| e.is_due(now, route.policy.early_refresh));
                match response {
                    Some(response) if !is_due => return ResponseFuture::ready(response),
                    response => {
                        let tenant = self.cache.tenant_source().tenant(&parts).unwrap_or_default();
                        let primary = Key::new(wanted.key);
                        let miss = Miss {
                            key: variant.map_or_else(|| primary.clone(), Key::new),
                            primary,
                            tags: route.tags(&tenant, &found.params),
                            tenant: tenant.into_owned(),
                            needs_public: wanted.needs_public,
                            route: route.clone(),
                            cache: self.cache.clone(),
                            asked,
                        };
                        let inner = take_ready(&mut self.inner);
                        let request = Request::from_parts(parts, body);
                        let Some(response) = response else {
                            return ResponseFuture::boxed(Box::pin(miss.answer(inner, request)));
                        };
                        tokio::spawn(miss.refresh(inner, request).in_current_span());
                        return ResponseFuture::ready(response);
                    }
                }
            }
            Err(handled) => Finish { handled, tag_header: self.cache.tag_header().clone() },
        };
        ResponseFuture::pass(self.inner.call(Request::from_parts(parts, body)), Some(passed), CacheBody::inner)
    }
}

impl<S> CacheAside<S> {
    /// What a request of a cacheable route looks for, or why the cache leaves it alone.
    fn wanted<B: Body>(
        &self,
        route: &ReadRoute,
        parts: &request::Parts,
        body: &B,
        params: &matchit::Params<'_, '_>,
    ) -> Result<(Wanted, Asked), Handled> {
        let bypass = |detail| Forwarded::because(Reason::Bypass, detail);
        if parts.method != Method::GET && parts.method != Method::HEAD {
            return Err(Handled::Forwarded(Forwarded::new(Reason::Method)));
        }
        let wanted = route.wanted(parts, params, self.cache.tenant_source()).map_err(bypass)?;
        if !body.is_end_stream() {
            return Err(bypass("request-body"));
        }
        if parts.extensions.get::<NoCache>().is_some() {
            return Err(bypass("no-cache"));
        }
        let http = self.cache.http();
        let mut asked = Asked::new(parts, wanted.is_conditional, http.request_directives);
        if asked.directives().is_some_and(|directives| directives.no_store) {
            return Err(Forwarded::because(Reason::Request, "no-store"));
        }
        if http.show_keys {
            asked.key = Some(Bytes::copy_from_slice(&wanted.key));
        }
        Ok((wanted, asked))
    }
}

/// A request that was not answered on the spot.
struct Miss {
    /// The key without request headers that responses turned out to vary by.
    primary: Key,
    /// The key with them, as far as they are known.
    key: Key,
    tags: Vec<Tag>,
    tenant: Vec<u8>,
    needs_public: bool,
    route: Arc<ReadRoute>,
    cache: Cache,
    asked: Asked,
}

type Replied<R, E> = Result<Response<CacheBody<R>>, E>;
pub(super) type Reply<R, E> = oneshot::Sender<Replied<R, E>>;

/// What an entry is to a request that found it.
enum Found<R: Body> {
    Answer(Response<CacheBody<R>>),
    /// The answer to other request headers; this one's is under another key.
    Elsewhere(Key),
    Useless,
}

impl Miss {
    /// What to do with an entry that is fresh, or that is good enough although it is not.
    fn found<R: Body>(&self, entry: &Entry, headers: &HeaderMap, handled: Option<Handled>) -> Found<R> {
        let names = match (&entry.payload, &entry.varied) {
            (Payload::Vary(names), _) => Some((names, None)),
            (_, Some((names, key))) => Some((names, Some(key))),
            _ => None,
        };
        if let Some((names, of_entry)) = names {
            let own = Key::new(variant_key(self.primary.as_bytes(), names, headers));
            if of_entry != Some(&own) {
                return if own == self.key { Found::Useless } else { Found::Elsewhere(own) };
            }
        }
        let now = self.cache.engine().now();
        match serve(entry, now, &self.asked, handled) {
            Some(response) if self.asked.accepts(entry, now) => Found::Answer(response),
            _ => Found::Useless,
        }
    }

    /// Serves what is not fresh, on purpose.
    fn stale<R: Body>(&self, stale: &Stale) -> Option<Response<CacheBody<R>>> {
        serve(&stale.entry, self.cache.engine().now(), &self.asked, None)
    }

    async fn answer<S, B, R>(mut self, mut inner: S, request: Request<B>) -> Result<Response<CacheBody<R>>, S::Error>
    where
        S: Service<Request<B>, Response = Response<R>> + Send + 'static,
        S::Future: Send,
        S::Error: Send,
        B: Send + 'static,
        R: Body<Data = Bytes> + Send + 'static,
        R::Error: Send,
    {
        let engine = self.cache.engine().clone();
        let policy = self.route.policy.clone();
        let only_if_cached = self.asked.directives().is_some_and(|directives| directives.only_if_cached);
        let is_partial = self.asked.is_partial();
        let mut attempt = Attempt { alone: is_partial, ..Attempt::default() };
        let mut reason = if self.key == self.primary { Reason::UriMiss } else { Reason::VaryMiss };
        let leader = loop {
            let collapsed = Handled::Forwarded(Forwarded { collapsed: true, ..Forwarded::new(reason) });
            let (entry, handled) = match engine.begin(&self.key, &self.tags, &policy, attempt).await {
                Begin::Lead(leader) => break Some(leader),
                Begin::Unavailable => break None,
                Begin::Hit(entry) => (entry, None),
                Begin::Collapsed(entry) => (entry, Some(collapsed)),
                Begin::Follow(flight, stale) => {
                    let now = engine.now();
                    if let Some(response) =
                        stale.as_ref().filter(|s| s.serves_meanwhile(now)).and_then(|s| self.stale(s))
                    {
                        return Ok(response);
                    }
                    if only_if_cached {
                        return Ok(gateway_timeout());
                    }
                    match engine.follow(flight).await {
                        Landed::Done(entry) => (entry, Some(collapsed)),
                        Landed::Unshareable => {
                            attempt.failures += 1;
                            continue;
                        }
                        Landed::Failed => {
                            let served = stale.filter(|s| s.serves_on_error(engine.now(), &policy));
                            if let Some(response) = served.and_then(|stale| self.stale(&stale)) {
                                return Ok(response);
                            }
                            attempt.failures += 1;
                            continue;
                        }
                    }
                }
            };
            match self.found(&entry, request.headers(), handled) {
                Found::Answer(response) => return Ok(response),
                Found::Elsewhere(key) => {
                    (self.key, reason) = (key, Reason::VaryMiss);
                    attempt.failures += 1;
                }
                Found::Useless => {
                    attempt.reload = true;
                    reason = Reason::Request;
                }
            }
        };
        let stale = leader.as_ref().and_then(Leader::stale).cloned();
        let stale = stale.filter(|stale| matches!(stale.entry.payload, Payload::Response(_)));
        let now = engine.now();
        if let Some(stale) = stale.as_ref().filter(|stale| !stale.invalidated) {
            if !stale.entry.is_fresh(now) {
                reason = Reason::Stale;
                if self.asked.accepts_stale(&stale.entry, now, self.cache.targeted_header())
                    && let Some(response) = self.stale(stale)
                {
                    return Ok(response);
                }
            }
            if stale.serves_meanwhile(now)
                && !attempt.reload
                && let Some(response) = self.stale(stale)
            {
                if !is_partial {
                    self.spawn_load(inner, request, leader, reason);
                }
                return Ok(response);
            }
        }
        if only_if_cached {
            return Ok(gateway_timeout());
        }
        if is_partial {
            drop(leader);
            let detail = if self.asked.head { "head" } else { "range" };
            let mut response = inner.call(request).await?;
            response.headers_mut().remove(self.cache.tag_header());
            let status = response.status();
            let forwarded = Forwarded::because(reason, detail);
            forwarded.append(response.headers_mut(), Some(status), self.asked.key.as_deref());
            return Ok(response.map(CacheBody::inner));
        }
        let patience = policy.soft_timeout;
        let patience = patience.zip(stale.filter(|s| !s.invalidated && s.serves_on_error(now, &policy)));
        let asked = self.asked.clone();
        let (task, mut replied) = self.spawn_load(inner, request, leader, reason);
        let outcome = match patience {
            None => replied.await,
            Some((patience, stale)) => match tokio::time::timeout(patience, &mut replied).await {
                Ok(outcome) => outcome,
                Err(_) => match serve(&stale.entry, engine.now(), &asked, None) {
                    Some(response) => return Ok(response),
                    None => replied.await,
                },
            },
        };
        future::replied(outcome, task).await
    }

    /// Replaces what has been served already, unless somebody else does.
    async fn refresh<S, B, R>(self, inner: S, request: Request<B>)
    where
        S: Service<Request<B>, Response = Response<R>>,
        R: Body<Data = Bytes>,
    {
        let attempt = Attempt { refresh: true, ..Attempt::default() };
        let begun = self.cache.engine().begin(&self.key, &self.tags, &self.route.policy, attempt).await;
        if let Begin::Lead(leader) = begun {
            let (nobody, _) = oneshot::channel();
            self.load(inner, request, Some(leader), Reason::Stale, nobody).await;
        }
    }

    /// Calls the inner service in a task, which goes on whatever becomes of its client.
    fn spawn_load<S, B, R>(
        self,
        inner: S,
        request: Request<B>,
        leader: Option<Leader>,
        reason: Reason,
    ) -> (JoinHandle<()>, oneshot::Receiver<Replied<R, S::Error>>)
    where
        S: Service<Request<B>, Response = Response<R>> + Send + 'static,
        S::Future: Send,
        S::Error: Send,
        B: Send + 'static,
        R: Body<Data = Bytes> + Send + 'static,
        R::Error: Send,
    {
        let (reply, replied) = oneshot::channel();
        (tokio::spawn(self.load(inner, request, leader, reason, reply).in_current_span()), replied)
    }

    /// Calls the inner service, answers its request, and stores the response for others if it may be.
    async fn load<S, B, R>(
        self,
        mut inner: S,
        mut request: Request<B>,
        mut leader: Option<Leader>,
        reason: Reason,
        reply: Reply<R, S::Error>,
    ) where
        S: Service<Request<B>, Response = Response<R>>,
        R: Body<Data = Bytes>,
    {
        let engine = self.cache.engine().clone();
        let policy = &self.route.policy;
        let start = Instant::now();
        let request_headers = request.headers().clone();
        // The whole response is wanted; the client's conditions are met from that.
        request.headers_mut().remove(header::IF_NONE_MATCH);
        request.headers_mut().remove(header::IF_MODIFIED_SINCE);
        if let Some(leader) = &mut leader {
            leader.primary = self.primary.clone();
        }
        let stale = leader.as_ref().and_then(Leader::stale).cloned();
        let known = stale.as_ref().filter(|stale| !stale.invalidated && policy.freshness == Freshness::Response);
        let confirmable = known.and_then(|stale| match &stale.entry.payload {
            Payload::Response(stored) => validate(request.headers_mut(), &stored.headers).then(|| stored.clone()),
            _ => None,
        });
        let result = inner.call(request).await;
        if !matches!(&result, Ok(response) if !response.status().is_server_error()) {
            let served = stale.filter(|stale| stale.serves_on_error(engine.now(), policy));
            if let Some(response) = served.and_then(|stale| self.stale(&stale)) {
                let _ = reply.send(Ok(response));
                return;
            }
        }
        let response = match result {
            Ok(response) => response,
            Err(error) => {
                drop(leader);
                // Nobody is there to be answered if the client hung up.
                let _ = reply.send(Err(error));
                return;
            }
        };
        let (mut parts, body) = response.into_parts();
        let late = tags::take(&mut parts, self.cache.tag_header(), &self.tenant, self.route.data_type());
        let mut forwarded = Forwarded { status: Some(parts.status), ..Forwarded::new(reason) };
        let confirmed = confirmable.filter(|_| parts.status == StatusCode::NOT_MODIFIED);
        if let Some(stored) = &confirmed {
            parts.status = stored.status;
            parts.headers = updated_headers(&stored.headers, &parts.headers);
        }
        let exchange = Exchange {
            route: &self.route,
            needs_public: self.needs_public,
            targeted: self.cache.targeted_header(),
            now: self.cache.date(),
            took: start.elapsed(),
        };
        let over_limit = confirmed.is_none() && body.size_hint().lower() > self.cache.body_limit() as u64;
        let verdict = match (&late, over_limit) {
            (Err(reason), _) => Storable::No(reason),
            (Ok(_), true) => Storable::No("body-limit"),
            (Ok(_), false) => judge(&exchange, &parts),
        };
        let (is_shared, is_alone) =
            (matches!(verdict, Storable::Yes(..) | Storable::Shared(_)), matches!(verdict, Storable::No(_)));
        let (life, names) = match verdict {
            Storable::Yes(life, names) => {
                forwarded.stored = leader.is_some();
                forwarded.detail = leader.is_none().then_some("store-unavailable");
                (life, names)
            }
            Storable::Shared(reason) => {
                forwarded.detail = Some(reason);
                (Lifetime::fresh_for(Some(Duration::ZERO)), Box::default())
            }
            Storable::No(reason) | Storable::Failed(reason) => {
                forwarded.detail = Some(reason);
                (Lifetime::default(), Box::default())
            }
        };
        let varied = self.varied(names, &request_headers);
        if let Some(stored) = confirmed {
            let late = late.unwrap_or_default();
            self.confirm(leader, Confirmed { stored, parts, late, life, varied, forwarded }, reply).await;
            return;
        }
        let leader = match leader {
            Some(leader) if is_shared => leader,
            leader => {
                match leader {
                    Some(leader) if is_alone => leader.unshareable(),
                    other => drop(other),
                }
                let key = self.asked.key.as_deref();
                Handled::Forwarded(forwarded).append(&mut parts.headers, None, key);
                let _ = reply.send(Ok(Response::from_parts(parts, CacheBody::inner(body))));
                return;
            }
        };
        let limit = self.cache.body_limit();
        let adds_tag = self.cache.http().entity_tags
            && parts.status == StatusCode::OK
            && !parts.headers.contains_key(header::ETAG);
        let late = late.unwrap_or_default();
        let accepts = |_: &Bytes, _: Option<&HeaderMap>| Ok(());
        let load = Load { leader, late, parts, forwarded, life, varied, adds_tag, limit, accepts };
        load.read(body, &self.asked, reply).await;
    }

    /// Which headers the response depends on, and the key they give in this request.
    fn varied(&self, names: Box<[HeaderName]>, headers: &HeaderMap) -> Option<(Box<[HeaderName]>, Key)> {
        let key = (!names.is_empty()).then(|| Key::new(variant_key(self.primary.as_bytes(), &names, headers)));
        key.map(|key| (names, key))
    }

    /// Stores what the origin has confirmed anew, and answers with it.
    async fn confirm<R: Body, E>(&self, leader: Option<Leader>, confirmed: Confirmed, reply: Reply<R, E>) {
        let Confirmed { stored, parts, late, life, varied, mut forwarded } = confirmed;
        let headers = stored_headers(&parts.headers);
        let payload = Payload::Response(StoredResponse { headers, ..stored });
        let engine = self.cache.engine();
        let sealed = match leader.filter(|_| forwarded.stored) {
            Some(leader) => leader.seal(payload.clone(), late, life, varied).await,
            None => None,
        };
        forwarded.stored = sealed.as_ref().is_some_and(|sealed| !sealed.is_fenced());
        let unstored = || Arc::new(Entry::new(payload, Box::default(), engine.now(), life));
        let entry = sealed.as_ref().map_or_else(unstored, |sealed| sealed.entry.clone());
        if let Some(response) = serve(&entry, engine.now(), &self.asked, Some(Handled::Forwarded(forwarded))) {
            let _ = reply.send(Ok(response));
        }
        if let Some(sealed) = sealed {
            sealed.store().await;
        }
    }
}

/// A stored response that the origin has confirmed, with its head as it is now.
struct Confirmed {
    stored: StoredResponse,
    parts: response::Parts,
    late: Vec<Tag>,
    life: Lifetime,
    varied: Option<(Box<[HeaderName]>, Key)>,
    forwarded: Forwarded,
}

/// The answer to a request that wants nothing but what is stored, when nothing is (RFC 9111, section 5.2.1.7).
fn gateway_timeout<R: Body>() -> Response<CacheBody<R>> {
    let mut response = Response::new(CacheBody::full(Bytes::new(), None));
    *response.status_mut() = StatusCode::GATEWAY_TIMEOUT;
    Forwarded::because(Reason::Request, "only-if-cached").append(response.headers_mut(), None, None);
    response
}

/// A response whose body is being read, to be stored or at least shared.
pub(super) struct Load {
    pub(super) leader: Leader,
    pub(super) late: Vec<Tag>,
    pub(super) parts: response::Parts,
    pub(super) forwarded: Forwarded,
    pub(super) life: Lifetime,
    pub(super) varied: Option<(Box<[HeaderName]>, Key)>,
    /// It has no entity tag, and is to get one.
    pub(super) adds_tag: bool,
    pub(super) limit: usize,
    /// The last word, when all of it has been read: why it may not be stored after all.
    pub(super) accepts: fn(&Bytes, Option<&HeaderMap>) -> Result<(), &'static str>,
}

impl Load {
    pub(super) async fn read<R, E>(mut self, body: R, asked: &Asked, reply: Reply<R, E>)
    where
        R: Body<Data = Bytes>,
    {
        let size = body.size_hint();
        let mut body = Box::pin(body);
        let mut copy = Copy::default();
        let mut client = Client::Waiting(reply);
        let mut deadline = pin!(tokio::time::sleep(STREAM_LIMIT));
        loop {
            let poll = poll_fn(|cx| match body.as_mut().poll_frame(cx) {
                Poll::Ready(frame) => Poll::Ready(Read::<R>::Frame(frame)),
                // What is not there at once is streamed to the client while it is read.
                Poll::Pending if matches!(client, Client::Waiting(_)) => Poll::Ready(Read::Waits),
                Poll::Pending => deadline.as_mut().poll(cx).map(|()| Read::TooLong),
            });
            match AssertUnwindSafe(poll).catch_unwind().await {
                Ok(Read::Waits) => {
                    let (tx, rx) = mpsc::unbounded_channel();
                    copy.replay(&tx);
                    let response = Response::from_parts(self.head(asked), CacheBody::tee(rx, &size));
                    client = client.stream(response, tx);
                }
                Ok(Read::Frame(Some(Ok(frame)))) => {
                    let over = copy.push(&frame, self.limit);
                    client.send(Piece::Frame(frame));
                    if over {
                        return self.give_up(client, copy, body, &size, asked);
                    }
                }
                Ok(Read::TooLong) => return self.give_up(client, copy, body, &size, asked),
                Ok(Read::Frame(None)) => break,
                Ok(Read::Frame(Some(Err(error)))) => {
                    drop(self.leader);
                    let parts = self.parts;
                    return client.finish(copy, Piece::Error(error), |rx| {
                        Response::from_parts(parts, CacheBody::tee(rx, &size))
                    });
                }
                Err(panic) => {
                    drop(self.leader);
                    let parts = self.parts;
                    return client.finish(copy, Piece::Panic(panic), |rx| {
                        Response::from_parts(parts, CacheBody::tee(rx, &size))
                    });
                }
            }
        }
        let (data, trailers) = copy.into_parts();
        if let Err(detail) = (self.accepts)(&data, trailers.as_ref()) {
            drop(self.leader);
            match client {
                Client::Waiting(reply) => {
                    (self.forwarded.stored, self.forwarded.detail) = (false, Some(detail));
                    let handled = Handled::Forwarded(self.forwarded);
                    handled.append(&mut self.parts.headers, None, asked.key.as_deref());
                    let _ = reply.send(Ok(Response::from_parts(self.parts, CacheBody::full(data, trailers))));
                }
                mut streaming => streaming.send(Piece::End),
            }
            return;
        }
        if let (true, Ok(tag)) = (self.adds_tag, entity_tag(&data)) {
            self.parts.headers.insert(header::ETAG, tag);
        }
        let stored = StoredResponse {
            status: self.parts.status,
            headers: stored_headers(&self.parts.headers),
            body: data.clone(),
            trailers: trailers.clone(),
        };
        let (keep, mut forwarded) = (self.forwarded.stored, self.forwarded);
        let sealed = self.leader.seal(Payload::Response(stored), self.late, self.life, self.varied).await;
        match client {
            Client::Waiting(reply) => {
                forwarded.stored = keep && sealed.as_ref().is_some_and(|s| !s.is_fenced());
                let handled = Handled::Forwarded(forwarded);
                let conditional = sealed.as_ref().filter(|_| asked.conditions.is_some());
                let response = conditional.and_then(|sealed| {
                    let mut response = serve(&sealed.entry, sealed.entry.created, asked, Some(handled))?;
                    // The age it came with, if it came with one: it is not from the cache.
                    match self.parts.headers.get(header::AGE) {
                        Some(age) => response.headers_mut().insert(header::AGE, age.clone()),
                        None => response.headers_mut().remove(header::AGE),
                    };
                    Some(response)
                });
                let response = response.unwrap_or_else(|| {
                    let mut parts = self.parts;
                    handled.append(&mut parts.headers, None, asked.key.as_deref());
                    Response::from_parts(parts, CacheBody::full(data, trailers))
                });
                let _ = reply.send(Ok(response));
            }
            mut streaming => streaming.send(Piece::End),
        }
        if let Some(sealed) = sealed.filter(|_| keep) {
            sealed.store().await;
        }
    }

    /// The head of the response, for a client that gets the body while it is read.
    fn head(&self, asked: &Asked) -> response::Parts {
        let mut parts = self.parts.clone();
        Handled::Forwarded(self.forwarded).append(&mut parts.headers, None, asked.key.as_deref());
        parts
    }

    /// Too large or too slow: the client reads on by itself, and those who wait call the origin.
    fn give_up<R: Body, E>(
        mut self,
        client: Client<R, E>,
        copy: Copy,
        body: Pin<Box<R>>,
        size: &http_body::SizeHint,
        asked: &Asked,
    ) {
        (self.forwarded.stored, self.forwarded.detail) = (false, Some("body-limit"));
        let parts = self.head(asked);
        self.leader.unshareable();
        client.finish(copy, Piece::Rest(body), |rx| Response::from_parts(parts, CacheBody::tee(rx, size)));
    }
}

enum Read<R: Body> {
    Frame(Option<Result<Frame<Bytes>, R::Error>>),
    Waits,
    TooLong,
}

/// The request that the load was begun for: it has its response or not.
enum Client<R: Body, E> {
    Waiting(Reply<R, E>),
    Streaming(mpsc::UnboundedSender<Piece<R>>),
}

impl<R: Body, E> Client<R, E> {
    fn stream(self, response: Response<CacheBody<R>>, tx: mpsc::UnboundedSender<Piece<R>>) -> Self {
        if let Self::Waiting(reply) = self {
            let _ = reply.send(Ok(response));
        }
        Self::Streaming(tx)
    }

    /// Nothing is lost on one that hung up.
    fn send(&mut self, piece: Piece<R>) {
        if let Self::Streaming(tx) = self {
            let _ = tx.send(piece);
        }
    }

    /// Sends the last piece; if the response was not sent, that and all before it.
    fn finish(
        self,
        copy: Copy,
        last: Piece<R>,
        response: impl FnOnce(mpsc::UnboundedReceiver<Piece<R>>) -> Response<CacheBody<R>>,
    ) {
        let mut client = match self {
            Self::Streaming(_) => self,
            Self::Waiting(_) => {
                let (tx, rx) = mpsc::unbounded_channel();
                copy.replay(&tx);
                self.stream(response(rx), tx)
            }
        };
        client.send(last);
    }
}

/// What has been read of a body.
#[derive(Default)]
struct Copy {
    data: Vec<Bytes>,
    size: usize,
    trailers: Option<HeaderMap>,
}

impl Copy {
    /// Whether that was more than the limit.
    fn push(&mut self, frame: &Frame<Bytes>, limit: usize) -> bool {
        if let Some(data) = frame.data_ref() {
            self.size += data.len();
            self.data.push(data.clone());
        } else if let Some(trailers) = frame.trailers_ref() {
            self.trailers = Some(trailers.clone());
        }
        self.size > limit
    }

    fn replay<R: Body>(&self, tx: &mpsc::UnboundedSender<Piece<R>>) {
        let frames = self.data.iter().cloned().map(Frame::data);
        for frame in frames.chain(self.trailers.clone().map(Frame::trailers)) {
            let _ = tx.send(Piece::Frame(frame));
        }
    }

    /// In one piece of its own: a slice would keep the buffer alive that it was read into.
    fn into_parts(self) -> (Bytes, Option<HeaderMap>) {
        let mut all = BytesMut::with_capacity(self.size);
        for data in &self.data {
            all.extend_from_slice(data);
        }
        (all.freeze(), self.trailers)
    }
}
