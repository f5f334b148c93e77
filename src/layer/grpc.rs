//! gRPC: unary calls of declared methods from the cache, and mutations that invalidate before their trailers. (Feature
//! `grpc`.)
//!
//! **Authorization must sit outside this layer.** A tonic interceptor wraps one service, so it sits *inside*
//! `Server::layer`: a hit never reaches it. Therefore requests with `authorization` pass by the cache, unless their
//! method is declared [shared](crate::GrpcMethod::shared).
//!
//! What is stored: one message with `grpc-status: 0` in its trailers, which are stored and replayed with it. Errors (which
//! come in the headers, or after data), streams, and whatever is not one message pass through untouched, the first message
//! at once. A mutation succeeds at its trailers: they are held until the invalidation is done. Unknown outcomes invalidate.
//! grpc-web carries trailers in its body, and passes by the cache.

use std::{
    collections::VecDeque,
    future::poll_fn,
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use bytes::{Buf, Bytes, BytesMut};
use futures_util::FutureExt;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body::{Body, Frame, SizeHint};
use tokio::sync::oneshot;
use tower_layer::Layer;
use tower_service::Service;
use tracing::Instrument;

use super::{
    body::CacheBody,
    cache_aside::{Load, Reply},
    cache_status::{Forwarded, Handled, Reason},
    future::{self, Finish, ResponseFuture},
    invalidate::{InvalidateBody, REPORT},
    serve::Asked,
    take_ready,
};
use crate::{
    Cache,
    catalog::{Drops, Target},
    engine::Leader,
    key::Key,
    route::GrpcRoute,
    store::{Entry, Lifetime, Payload},
};

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");

/// The frame of a message: whether it is compressed, and its length.
const FRAME: usize = 5;

/// Wraps gRPC services in [`Grpc`]: unary calls of declared methods are answered from the cache, and mutations invalidate
/// before their trailers are sent. (Feature `grpc`.)
///
/// **Authorization must sit outside this layer.** A tonic interceptor wraps one service, so it sits *inside*
/// `Server::layer`, and a hit never reaches it. Therefore requests with `authorization` pass by the cache, unless their
/// method is declared [shared](crate::GrpcMethod::shared): do that only with authorization in a layer of its own, outside.
///
/// ```
/// # use tower_cache_aside::{Cache, GrpcMethod, GrpcTarget, Ttl};
/// #[derive(Clone, PartialEq, prost::Message)]
/// struct GetAgent {
///     #[prost(string, tag = "1")]
///     id: String,
/// }
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let get = GrpcMethod::read("/agents.v1.Agents/GetAgent", "agent");
/// let cache = Cache::builder()
///     .tenant_header("x-tenant-id")
///     .data_type("agent", Ttl::Standard)
///     .grpc_method(get.message(|get: &GetAgent| Some(GrpcTarget::new(&get.id))))
///     .grpc("/agents.v1.Agents/ListAgents", "agent") // by its whole message
///     .build()?;
/// let layer = cache.grpc_layer(); // tonic::transport::Server::builder().layer(layer)
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct GrpcLayer {
    cache: Cache,
}

impl GrpcLayer {
    /// A layer over this cache.
    pub fn new(cache: Cache) -> Self {
        Self { cache }
    }
}

impl<S> Layer<S> for GrpcLayer {
    type Service = Grpc<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Grpc { inner, cache: self.cache.clone() }
    }
}

/// Answers the declared methods of a gRPC service from the cache, and invalidates after its mutations.
#[derive(Clone, Debug)]
pub struct Grpc<S> {
    inner: S,
    cache: Cache,
}

impl<S, B, R> Service<Request<B>> for Grpc<S>
where
    S: Service<Request<GrpcBody<B>>, Response = Response<R>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Send,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Send,
    R: Body<Data = Bytes> + Send + 'static,
    R::Error: Send,
{
    type Response = Response<InvalidateBody<CacheBody<R>>>;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future, R, InvalidateBody<CacheBody<R>>, S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let route = self.cache.routes().grpc(request.uri().path()).filter(|_| is_grpc(&request)).cloned();
        let (parts, body) = request.into_parts();
        let tenants = self.cache.tenant_source();
        let passed = match route {
            None => None,
            Some(route) if route.mutates => {
                let write = Write { tenants: tenants.tenants(&parts), route, cache: self.cache.clone() };
                let request = Request::from_parts(parts, body);
                let inner = take_ready(&mut self.inner);
                let task = tokio::spawn(write.run(inner, request).in_current_span());
                return ResponseFuture::boxed(Box::pin(future::joined(task)));
            }
            Some(route) => match tenants.tenant(&parts) {
                Err(reason) => Some(reason),
                Ok(_) if !route.shared && parts.headers.contains_key(header::AUTHORIZATION) => Some("credentials"),
                Ok(tenant) => {
                    let read = Read { tenant: tenant.into_owned(), route, cache: self.cache.clone() };
                    let request = Request::from_parts(parts, body);
                    let inner = take_ready(&mut self.inner);
                    return ResponseFuture::boxed(Box::pin(read.answer(inner, request)));
                }
            },
        };
        let finish = passed.map(|reason| Finish {
            handled: Forwarded::because(Reason::Bypass, reason),
            tag_header: self.cache.tag_header().clone(),
        });
        let request = Request::from_parts(parts, GrpcBody::passing(body));
        ResponseFuture::pass(self.inner.call(request), finish, |body| InvalidateBody::untouched(CacheBody::inner(body)))
    }
}

fn is_grpc<B>(request: &Request<B>) -> bool {
    let content_type = request.headers().get(header::CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
    let rest = content_type.strip_prefix(b"application/grpc");
    *request.method() == Method::POST && rest.is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
}

/// The request body that the inner service gets: what was read of it to know the message, and the rest.
pub struct GrpcBody<B: Body> {
    read: VecDeque<Result<Frame<Bytes>, B::Error>>,
    rest: Option<Pin<Box<B>>>,
}

// Nothing in it is pinned but the box.
impl<B: Body> Unpin for GrpcBody<B> {}

impl<B: Body<Data = Bytes>> GrpcBody<B> {
    fn passing(body: B) -> Self {
        Self { read: VecDeque::new(), rest: Some(Box::pin(body)) }
    }

    /// Reads the body of a unary call, to its end if that comes before the limit.
    async fn read(body: B, limit: usize) -> Self {
        let mut this = Self::passing(body);
        let mut size = 0;
        while let Some(rest) = &mut this.rest {
            let frame = poll_fn(|cx| rest.as_mut().poll_frame(cx)).await;
            match frame {
                None => this.rest = None,
                Some(frame) => {
                    let is_error = frame.is_err();
                    size += frame.as_ref().ok().and_then(Frame::data_ref).map_or(0, Bytes::len);
                    this.read.push_back(frame);
                    if is_error || size > limit {
                        break;
                    }
                }
            }
        }
        this
    }

    /// The whole body, if it was read to its end.
    fn whole(&self) -> Option<Bytes> {
        if self.rest.is_some() {
            return None;
        }
        let data = self.read.iter().map(|frame| frame.as_ref().ok()?.data_ref().cloned());
        let data: Vec<_> = data.flatten().collect();
        match &data[..] {
            [one] => Some(one.clone()),
            many => Some(many.iter().flatten().copied().collect::<BytesMut>().freeze()),
        }
    }
}

impl<B: Body<Data = Bytes>> Body for GrpcBody<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        if let Some(frame) = self.read.pop_front() {
            return Poll::Ready(Some(frame));
        }
        match &mut self.rest {
            None => Poll::Ready(None),
            Some(rest) => rest.as_mut().poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.read.is_empty() && self.rest.as_ref().is_none_or(|rest| rest.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        match &self.rest {
            Some(rest) if self.read.is_empty() => rest.size_hint(),
            _ => SizeHint::default(),
        }
    }
}

/// The message of a body that holds exactly one: `Some(None)` if it is compressed.
fn message(body: &Bytes) -> Option<Option<Bytes>> {
    let mut head = body.get(..FRAME)?;
    let compressed = head.get_u8();
    let length = head.get_u32() as usize;
    (body.len() == FRAME + length).then(|| (compressed == 0).then(|| body.slice(FRAME..)))
}

/// A call of a method whose responses are cached.
struct Read {
    tenant: Vec<u8>,
    route: Arc<GrpcRoute>,
    cache: Cache,
}

type Out<R> = Response<InvalidateBody<CacheBody<R>>>;

fn out<R: Body<Data = Bytes>>(response: Response<CacheBody<R>>) -> Out<R> {
    response.map(InvalidateBody::untouched)
}

/// The response that an entry holds: as it was, so that a client sees no difference.
fn replay<R: Body>(entry: &Entry, now: u64, handled: Option<Handled>) -> Option<Response<CacheBody<R>>> {
    let Payload::Response(stored) = &entry.payload else { return None };
    let mut response = Response::new(CacheBody::full(stored.body.clone(), stored.trailers.clone()));
    *response.status_mut() = stored.status;
    *response.headers_mut() = stored.headers.clone();
    response.headers_mut().remove(header::AGE);
    let handled = handled.unwrap_or_else(|| Handled::Hit { ttl: entry.ttl(now) });
    handled.append(response.headers_mut(), None, None);
    Some(response)
}

impl Read {
    async fn answer<S, B, R>(self, mut inner: S, request: Request<B>) -> Result<Out<R>, S::Error>
    where
        S: Service<Request<GrpcBody<B>>, Response = Response<R>> + Send + 'static,
        S::Future: Send,
        S::Error: Send,
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Send,
        R: Body<Data = Bytes> + Send + 'static,
        R::Error: Send,
    {
        let (parts, body) = request.into_parts();
        let body = GrpcBody::read(body, self.cache.body_limit()).await;
        let whole = body.whole();
        let one = whole.as_ref().and_then(|body| message(body).map(|message| (body, message)));
        let wanted = one.and_then(|(framed, message)| {
            let entity = self.cache.routes().entity_of(&self.route.data_type);
            self.route.wanted(&self.tenant, &parts.headers, framed, message.as_deref(), entity)
        });
        let request = Request::from_parts(parts, body);
        let Some(wanted) = wanted else {
            let mut response = inner.call(request).await?;
            Forwarded::because(Reason::Bypass, "message").append(response.headers_mut(), None, None);
            return Ok(out(response.map(CacheBody::inner)));
        };
        let engine = self.cache.engine().clone();
        let key = Key::new(wanted.key);
        if let Some(response) = engine.peek(key.as_bytes(), engine.now()).and_then(|e| replay(&e, engine.now(), None)) {
            return Ok(out(response));
        }
        let collapsed = Handled::Forwarded(Forwarded { collapsed: true, ..Forwarded::new(Reason::UriMiss) });
        let answer = |entry: &Entry, shared: bool| replay(entry, engine.now(), shared.then_some(collapsed));
        let leader = match engine.obtain(&key, &wanted.tags, &self.route.policy, answer).await {
            Ok(response) => return Ok(out(response)),
            Err(leader) => leader,
        };
        let (reply, replied) = oneshot::channel();
        let task = tokio::spawn(self.load(inner, request, leader, reply).in_current_span());
        future::replied(replied.await, task).await.map(out)
    }

    async fn load<S, B, R>(
        self,
        mut inner: S,
        request: Request<GrpcBody<B>>,
        leader: Option<Leader>,
        reply: Reply<R, S::Error>,
    ) where
        S: Service<Request<GrpcBody<B>>, Response = Response<R>>,
        B: Body<Data = Bytes>,
        R: Body<Data = Bytes>,
    {
        let start = Instant::now();
        let response = match inner.call(request).await {
            Ok(response) => response,
            Err(error) => {
                drop(leader);
                let _ = reply.send(Err(error));
                return;
            }
        };
        let (mut parts, body) = response.into_parts();
        let mut forwarded = Forwarded::new(Reason::UriMiss);
        // With its status in the headers it is an error, and has no message.
        let has_message = parts.status == StatusCode::OK && !parts.headers.contains_key(GRPC_STATUS);
        let over_limit = body.size_hint().lower() > self.cache.body_limit() as u64;
        let leader = match leader {
            Some(leader) if has_message && !over_limit => leader,
            other => {
                forwarded.detail = Some(if has_message { "not-stored" } else { "grpc-status" });
                drop(other);
                Handled::Forwarded(forwarded).append(&mut parts.headers, None, None);
                let _ = reply.send(Ok(Response::from_parts(parts, CacheBody::inner(body))));
                return;
            }
        };
        forwarded.stored = true;
        let life = Lifetime { load: start.elapsed(), ..Lifetime::fresh_for(self.route.policy.jittered()) };
        let load = Load {
            leader,
            late: vec![],
            parts,
            forwarded,
            life,
            varied: None,
            adds_tag: false,
            limit: self.cache.body_limit(),
            accepts: |body, trailers| match (message(body), trailers.and_then(|t| t.get(GRPC_STATUS))) {
                (Some(_), Some(status)) if status == "0" => Ok(()),
                (Some(_), _) => Err("grpc-status"),
                (None, _) => Err("not-one-message"),
            },
        };
        load.read(body, &Asked::default(), reply).await;
    }
}

/// A call of a method that mutates.
struct Write {
    tenants: Vec<Vec<u8>>,
    route: Arc<GrpcRoute>,
    cache: Cache,
}

/// Whether a status says that nothing was changed (as a 4xx does): the request was refused before it did anything.
pub(super) fn is_refusal(headers: &HeaderMap) -> bool {
    let status = headers.get(GRPC_STATUS).and_then(|status| status.to_str().ok());
    // INVALID_ARGUMENT, NOT_FOUND, ALREADY_EXISTS, PERMISSION_DENIED, RESOURCE_EXHAUSTED, FAILED_PRECONDITION,
    // OUT_OF_RANGE, UNIMPLEMENTED, UNAUTHENTICATED.
    matches!(status, Some("3" | "5" | "6" | "7" | "8" | "9" | "11" | "12" | "16"))
}

/// The answer to a write that the store could not be told about: UNAVAILABLE.
fn unavailable<R: Body<Data = Bytes>>() -> Out<R> {
    let mut response = Response::new(InvalidateBody::default());
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(GRPC_STATUS, HeaderValue::from_static("14"));
    response
}

impl Write {
    async fn drops(&self, drops: &mut Drops, id: Option<&str>) {
        let data_type = &self.route.data_type;
        for tenant in &self.tenants {
            match id {
                None => drops.all(tenant, data_type),
                Some(id) => {
                    let entity = self.cache.routes().entity_of(data_type);
                    let include = &self.route.include;
                    self.cache
                        .drop_entity(drops, Target { tenant, data_type, entity, id: id.as_bytes(), include })
                        .await;
                }
            }
        }
    }

    async fn run<S, B, R>(self, mut inner: S, request: Request<B>) -> Result<Out<R>, S::Error>
    where
        S: Service<Request<GrpcBody<B>>, Response = Response<R>>,
        B: Body<Data = Bytes>,
        R: Body<Data = Bytes>,
    {
        if self.cache.rejects() && !self.cache.is_healthy() {
            return Ok(unavailable());
        }
        let (parts, body) = request.into_parts();
        let body = GrpcBody::read(body, self.cache.body_limit()).await;
        let message = body.whole().and_then(|body| message(&body)).flatten();
        let id = self.route.resource(message.as_deref());
        let mut drops = Drops::default();
        self.drops(&mut drops, id.as_deref()).await;
        let fence = self.cache.fence(std::iter::once(self.route.data_type.as_str()));
        if let Some(fence) = &fence
            && self.cache.engine().fence(drops.clone(), fence).await.is_err()
            && self.cache.rejects()
        {
            return Ok(unavailable());
        }
        let call = AssertUnwindSafe(async { inner.call(Request::from_parts(parts, body)).await });
        let result = call.catch_unwind().await;
        let refused = matches!(&result, Ok(Ok(response)) if is_refusal(response.headers()));
        if refused && fence.is_none() {
            return result
                .map_or_else(|panic| std::panic::resume_unwind(panic), |r| r.map(|r| out(r.map(CacheBody::inner))));
        }
        // After it: it may have moved a child here.
        self.drops(&mut drops, id.as_deref()).await;
        match result {
            Ok(Ok(response)) if !response.headers().contains_key(GRPC_STATUS) => {
                let response = response.map(CacheBody::inner);
                Ok(response.map(|body| InvalidateBody::until_trailers(body, self.cache, drops, fence)))
            }
            result => {
                let report = self.cache.drop_all(drops, fence.as_ref()).await;
                tracing::info!(%report, "invalidated");
                let mut response = result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
                let value = HeaderValue::try_from(report.to_string());
                if let Some(value) = value.ok().filter(|_| self.cache.report_header() && !refused) {
                    response.headers_mut().insert(REPORT, value);
                }
                Ok(out(response.map(CacheBody::inner)))
            }
        }
    }
}
