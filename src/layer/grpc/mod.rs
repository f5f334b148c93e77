//! gRPC: unary calls of declared methods from the cache, and mutations that invalidate before their trailers. (Feature
//! `grpc`.)
//!
//! **Authorization must sit outside this layer.** A tonic interceptor wraps one service, so it sits *inside*
//! `Server::layer`: a hit never reaches it. Therefore requests with credentials pass by the cache, unless their
//! method [says otherwise](crate::GrpcMethod::credentials).
//!
//! What is stored: one message with `grpc-status: 0` in its trailers, which are stored and replayed with it. Errors (which
//! come in the headers, or after data), streams, and whatever is not one message pass through untouched, the first message
//! at once. A mutation succeeds at its trailers: they are held until the invalidation is done. Unknown outcomes invalidate.
//! grpc-web carries trailers in its body, and passes by the cache.

mod body;
mod read;
mod status;
mod write;

use std::{
    fmt,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{Method, Request, Response, request};
use http_body::Body;
use tower_layer::Layer;
use tower_service::Service;
use tracing::Instrument;

use super::{
    body::CacheBody,
    changes::Reads,
    core::Core,
    extensions::NoCache,
    future::{self, Finish, ResponseFuture, watched},
    request::RequestBody,
};
use crate::{
    engine::Inside,
    http::cache_status::{Forwarded, Reason},
    observe::Timer,
};
pub use body::GrpcResponseBody;
use read::Read;
#[cfg(any(test, fuzzing))]
pub(crate) use read::{accepts, message};
use write::Write;

/// Wraps gRPC services in [`Grpc`]: unary calls of declared methods are answered from the cache, and mutations invalidate
/// before their trailers are sent. (Feature `grpc`.)
///
/// **Authorization must sit outside this layer.** A tonic interceptor wraps one service, so it sits *inside*
/// `Server::layer`, and a hit never reaches it. Therefore requests with credentials pass by the cache, unless their
/// method [says otherwise](crate::GrpcMethod::credentials): do that only with authorization in a layer of its own, outside.
///
/// ```
/// # use prost::Message;
/// # use tower_cache_aside::{Cache, DataType, GrpcMethod, GrpcTarget, Ttl};
/// #[derive(Clone, PartialEq, prost::Message)]
/// struct GetAgent {
///     #[prost(string, tag = "1")]
///     id: String,
/// }
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let get = GrpcMethod::read("/agents.v1.Agents/GetAgent", "agent");
/// let cache = Cache::builder("docs")
///     .tenant_header("x-tenant-id")
///     .data_type(DataType::new("agent", Ttl::Standard))
///     .grpc(get.message(|bytes| Some(GrpcTarget::new(GetAgent::decode(bytes).ok()?.id))))
///     .build()?;
/// let layer = cache.grpc_layer(); // tonic::transport::Server::builder().layer(layer)
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct GrpcLayer {
    pub(crate) core: Arc<Core>,
}

impl<S> Layer<S> for GrpcLayer {
    type Service = Grpc<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Grpc { inner, core: self.core.clone() }
    }
}

impl fmt::Debug for GrpcLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GrpcLayer")
    }
}

/// Answers the declared methods of a gRPC service from the cache, and invalidates after its mutations.
#[derive(Clone)]
pub struct Grpc<S> {
    inner: S,
    core: Arc<Core>,
}

impl<S: fmt::Debug> fmt::Debug for Grpc<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grpc").field("inner", &self.inner).finish_non_exhaustive()
    }
}

impl<S, B, R> Service<Request<B>> for Grpc<S>
where
    S: Service<Request<RequestBody<B>>, Response = Response<R>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Send,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Send,
    R: Body<Data = Bytes> + Send + 'static,
    R::Error: Send,
{
    type Response = Response<GrpcResponseBody<R>>;
    type Error = S::Error;
    type Future = ResponseFuture<S, RequestBody<B>, R, GrpcResponseBody<R>>;

    /// Always: a hit needs nobody. What needs the inner service waits for it in its own future.
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let route = self.core.routes.grpc(request.uri().path()).cloned();
        let (parts, body) = request.into_parts();
        let Core { tenants, space, identity, options, .. } = &*self.core;
        let (passed, teller) = match route {
            // A server answers a call that is framed or spelled in another way, too; only what is answered here must be
            // what it seems.
            Some(route) if !route.mutates && !is_grpc(&parts) => ("not-grpc", route.teller.clone()),
            Some(route) if !route.mutates => {
                match (self.core.keeps_out(&route.data_type, &route.policy), tenants.tenant(&parts)) {
                    (Some(why), _) => (why, route.teller.clone()),
                    (None, Err(reason)) => (reason, route.teller.clone()),
                    (None, Ok(_)) if route.forbids(&parts.headers, identity) => ("credentials", route.teller.clone()),
                    (None, Ok(_)) if parts.extensions.get::<NoCache>().is_some() => ("no-cache", route.teller.clone()),
                    (None, Ok(tenant)) => {
                        let whole = Reads::current();
                        let read = Read { tenant: space.tenant(tenant), route, core: self.core.clone(), whole };
                        let watch = read.route.teller.watcher().watch(
                            Timer::start(),
                            || tenants.tenant(&parts).ok(),
                            || parts.uri.path().into(),
                        );
                        let request = Request::from_parts(parts, body);
                        let answer = read.answer(self.inner.clone(), request);
                        return ResponseFuture::boxed(Box::pin(watched(Some(watch), answer)));
                    }
                }
            }
            route => {
                let write = Write { tenants: tenants.tenants(&parts, space), route, core: self.core.clone() };
                let request = Request::from_parts(parts, body);
                let (mut inner, engine) = (self.inner.clone(), self.core.engine.clone());
                return ResponseFuture::boxed(Box::pin(async move {
                    // Until then its client may still change its mind.
                    future::ready(&mut inner).await?;
                    let scope = Inside::of(None);
                    future::joined(engine.spawn(scope.around(write.run(inner, request)).in_current_span())).await
                }));
            }
        };
        let watch = teller.watcher().watch(Timer::start(), || tenants.tenant(&parts).ok(), || parts.uri.path().into());
        let told = Some((Forwarded::because(Reason::Bypass, passed), teller, Some(watch)));
        // Which entities its message names, nobody has read.
        let whole = Reads::current();
        whole.iter().for_each(Reads::spoil);
        let finish = Finish { told, tag_header: options.tag_header.clone(), whole };
        let request = Request::from_parts(parts, RequestBody::passing(body));
        ResponseFuture::pass(self.inner.clone(), request, Some(finish), |body| {
            GrpcResponseBody::untouched(CacheBody::inner(body))
        })
    }
}

fn is_grpc(parts: &request::Parts) -> bool {
    parts.method == Method::POST && status::is_plain(&parts.headers)
}
