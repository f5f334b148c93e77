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
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt;
use http::{
    HeaderMap, HeaderValue, Method, Request, Response,
    header::{self, InvalidHeaderValue},
    response,
};
use http_body::{Body, Frame};
use tokio::sync::{mpsc, oneshot};
use tower_layer::Layer;
use tower_service::Service;
use tracing::Instrument;

use super::{
    body::{CacheBody, Piece},
    cache_status::Handled,
    future::ResponseFuture,
    storable::{Storable, storable, stored_headers},
    tags,
};
use crate::{
    Cache,
    engine::{Attempt, Begin, Landed, Leader},
    key::{Key, Tag},
    route::ReadRoute,
    store::{Entry, Millis, Payload, StoredResponse},
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
        let method = request.method();
        if *method != Method::GET && *method != Method::HEAD {
            return ResponseFuture::pass(self.inner.call(request), None, CacheBody::inner);
        }
        let (parts, body) = request.into_parts();
        let Some(found) = self.cache.routes().read(&parts.method, &parts.uri) else {
            return ResponseFuture::pass(self.inner.call(Request::from_parts(parts, body)), None, CacheBody::inner);
        };
        let route: &Arc<ReadRoute> = found.value;
        let tenants = self.cache.tenant_source();
        let bypass = match route.key(&parts, &found.params, tenants) {
            Ok(_) if !body.is_end_stream() => "request-body",
            Ok(key) => {
                let engine = self.cache.engine();
                let now = engine.now();
                if let Some(response) = engine.peek(&key, now).and_then(|e| respond(&e, now, &parts.method, None)) {
                    return ResponseFuture::ready(response);
                }
                let tenant = tenants.tenant(&parts).unwrap_or_default();
                let miss = Miss {
                    key: Key::new(key),
                    tags: route.tags(&tenant, &found.params),
                    tenant: tenant.into_owned(),
                    route: route.clone(),
                    cache: self.cache.clone(),
                };
                // The inner service that was polled ready is called; its clone stays behind.
                let clone = self.inner.clone();
                let inner = std::mem::replace(&mut self.inner, clone);
                return ResponseFuture::boxed(Box::pin(miss.answer(inner, Request::from_parts(parts, body))));
            }
            Err(reason) => reason,
        };
        let passed = self.inner.call(Request::from_parts(parts, body));
        ResponseFuture::pass(passed, Some(Handled::Bypass(bypass)), CacheBody::inner)
    }
}

/// The response that an entry holds; `None` if it holds none.
fn respond<R: Body>(
    entry: &Entry,
    now: Millis,
    method: &Method,
    handled: Option<Handled>,
) -> Option<Response<CacheBody<R>>> {
    let Payload::Response(stored) = &entry.payload else { return None };
    let (age, ttl) = (entry.age(now).as_secs(), entry.ttl(now).map(|ttl| ttl.as_secs()));
    let make = |handled: Handled| {
        let mut headers = stored.headers.clone();
        handled.append(&mut headers);
        if let (Some(place), Ok(age)) = (headers.get_mut(header::AGE), number(age)) {
            *place = age;
        }
        headers
    };
    let mut headers = match handled {
        None => entry.replay.headers(age, ttl.unwrap_or(0), || make(Handled::Hit { ttl })),
        Some(handled) => make(handled),
    };
    let body = if *method == Method::HEAD {
        if !stored.body.is_empty() && !headers.contains_key(header::CONTENT_LENGTH) {
            headers.insert(header::CONTENT_LENGTH, stored.body.len().into());
        }
        CacheBody::full(Bytes::new(), None)
    } else {
        CacheBody::full(stored.body.clone(), stored.trailers.clone())
    };
    let mut response = Response::new(body);
    *response.status_mut() = stored.status;
    *response.headers_mut() = headers;
    Some(response)
}

/// A number as a header, in one allocation.
fn number(number: u64) -> Result<HeaderValue, InvalidHeaderValue> {
    HeaderValue::from_str(itoa::Buffer::new().format(number))
}

/// A request that was not answered on the spot.
struct Miss {
    key: Key,
    tags: Vec<Tag>,
    tenant: Vec<u8>,
    route: Arc<ReadRoute>,
    cache: Cache,
}

type Reply<R, E> = oneshot::Sender<Result<Response<CacheBody<R>>, E>>;

impl Miss {
    async fn answer<S, B, R>(self, mut inner: S, request: Request<B>) -> Result<Response<CacheBody<R>>, S::Error>
    where
        S: Service<Request<B>, Response = Response<R>> + Send + 'static,
        S::Future: Send,
        S::Error: Send,
        B: Send + 'static,
        R: Body<Data = Bytes> + Send + 'static,
        R::Error: Send,
    {
        let method = request.method().clone();
        let engine = self.cache.engine();
        let mut attempt = Attempt { alone: method == Method::HEAD, ..Attempt::default() };
        let leader = loop {
            let (entry, handled) = match engine.begin(&self.key, &self.tags, &self.route.policy, attempt).await {
                Begin::Lead(leader) => break Some(leader),
                Begin::Unavailable => break None,
                Begin::Hit(entry) => (entry, None),
                Begin::Collapsed(entry) => (entry, Some(Handled::Collapsed)),
                Begin::Follow(flight) => match engine.follow(flight).await {
                    Landed::Done(entry) => (entry, Some(Handled::Collapsed)),
                    Landed::Unshareable | Landed::Failed => {
                        attempt.failures += 1;
                        continue;
                    }
                },
            };
            match respond(&entry, engine.now(), &method, handled) {
                Some(response) => return Ok(response),
                None => attempt.reload = true,
            }
        };
        if method == Method::HEAD {
            drop(leader);
            let mut response = inner.call(request).await?;
            Handled::Miss { stored: false, detail: Some("head") }.append(response.headers_mut());
            return Ok(response.map(CacheBody::inner));
        }
        let (reply, replied) = oneshot::channel();
        let task = tokio::spawn(self.load(inner, request, leader, reply).in_current_span());
        match replied.await {
            Ok(result) => result,
            Err(_) => match task.await.map_err(tokio::task::JoinError::try_into_panic) {
                Err(Ok(panic)) => std::panic::resume_unwind(panic),
                // The runtime is shutting down, and this task with it.
                _ => std::future::pending().await,
            },
        }
    }

    /// Calls the inner service, answers its request, and stores the response for others if it may be.
    async fn load<S, B, R>(self, mut inner: S, request: Request<B>, leader: Option<Leader>, reply: Reply<R, S::Error>)
    where
        S: Service<Request<B>, Response = Response<R>>,
        R: Body<Data = Bytes>,
    {
        let response = match inner.call(request).await {
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
        let over_limit = body.size_hint().lower() > self.cache.body_limit() as u64;
        let verdict = match (&late, over_limit) {
            (Err(reason), _) => Storable::No(reason),
            (Ok(_), true) => Storable::No("body-limit"),
            (Ok(_), false) => storable(&self.route, &parts),
        };
        let (stored, detail) = match verdict {
            Storable::Yes => (leader.is_some(), leader.is_none().then_some("store-unavailable")),
            Storable::Shared(reason) => (false, Some(reason)),
            Storable::No(reason) | Storable::Failed(reason) => (false, Some(reason)),
        };
        let leader = match (leader, verdict) {
            (Some(leader), Storable::Yes | Storable::Shared(_)) => leader,
            (leader, verdict) => {
                match (leader, verdict) {
                    (Some(leader), Storable::No(_)) => leader.unshareable(),
                    (leader, _) => drop(leader),
                }
                Handled::Miss { stored: false, detail }.append(&mut parts.headers);
                let _ = reply.send(Ok(Response::from_parts(parts, CacheBody::inner(body))));
                return;
            }
        };
        let load =
            Load { leader, late: late.unwrap_or_default(), parts, stored, detail, limit: self.cache.body_limit() };
        load.read(body, self.route.policy.ttl.duration(), reply).await;
    }
}

/// A response whose body is being read, to be stored or at least shared.
struct Load {
    leader: Leader,
    late: Vec<Tag>,
    parts: response::Parts,
    stored: bool,
    detail: Option<&'static str>,
    limit: usize,
}

impl Load {
    async fn read<R, E>(self, body: R, ttl: Option<Duration>, reply: Reply<R, E>)
    where
        R: Body<Data = Bytes>,
    {
        let size = body.size_hint();
        let mut body = Box::pin(body);
        let mut copy = Copy::default();
        let mut client = Client::Waiting(reply);
        let mut deadline = pin!(tokio::time::sleep(STREAM_LIMIT));
        let head = |parts: &response::Parts, stored| {
            let mut parts = parts.clone();
            Handled::Miss { stored, detail: self.detail }.append(&mut parts.headers);
            parts
        };
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
                    let response = Response::from_parts(head(&self.parts, self.stored), CacheBody::tee(rx, &size));
                    client = client.stream(response, tx);
                }
                Ok(Read::Frame(Some(Ok(frame)))) => {
                    let over = copy.push(&frame, self.limit);
                    client.send(Piece::Frame(frame));
                    if over {
                        return self.give_up(client, copy, body, &size);
                    }
                }
                Ok(Read::TooLong) => return self.give_up(client, copy, body, &size),
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
        let stored = StoredResponse {
            status: self.parts.status,
            headers: stored_headers(&self.parts.headers),
            body: data.clone(),
            trailers: trailers.clone(),
        };
        let ttl = if self.stored { ttl } else { Some(Duration::ZERO) };
        let sealed = self.leader.seal(Payload::Response(stored), self.late, ttl).await;
        match client {
            Client::Waiting(reply) => {
                let mut parts = self.parts;
                let stored = self.stored && sealed.as_ref().is_some_and(|s| !s.is_fenced());
                Handled::Miss { stored, detail: self.detail }.append(&mut parts.headers);
                let _ = reply.send(Ok(Response::from_parts(parts, CacheBody::full(data, trailers))));
            }
            mut streaming => streaming.send(Piece::End),
        }
        if let Some(sealed) = sealed.filter(|_| self.stored) {
            sealed.store().await;
        }
    }

    /// Too large or too slow: the client reads on by itself, and those who wait call the origin.
    fn give_up<R: Body, E>(self, client: Client<R, E>, copy: Copy, body: Pin<Box<R>>, size: &http_body::SizeHint) {
        self.leader.unshareable();
        let mut parts = self.parts;
        Handled::Miss { stored: false, detail: Some("body-limit") }.append(&mut parts.headers);
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
