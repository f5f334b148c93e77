//! The layer that answers reads from the cache, and invalidates after the writes that come through it.
//!
//! A hit in this process is answered on the spot: no task, no boxing, no lock held. Everything else goes through the
//! engine, which tells whether to answer, to wait for another request's call, or to call the inner service. That call
//! runs in a task of its own, so it goes on when its client hangs up.

mod load;
mod miss;

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
    core::Core,
    extensions::NoCache,
    future::{self, Finish, ResponseFuture, take_ready},
    invalidate::{answer, unavailable},
    serve::{Asked, serve},
    write::Write,
};
use crate::{
    http::cache_status::{Forwarded, Handled, Reason},
    key::Key,
    route::{ReadRoute, Wanted, variant_key},
    store::Payload,
};
use miss::Miss;

/// Wraps services in [`CacheAside`]; made by [`Cache::layer`](crate::Cache::layer).
///
/// ```
/// use http::{Method, Request, Response};
/// use http_body_util::Full;
/// use tower::{Layer, ServiceExt, service_fn};
/// use tower_cache_aside::{Cache, DataType, Mutation, Route, Ttl};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let cache = Cache::builder("docs")
///     .tenant_header("x-tenant-id")
///     .data_type(DataType::new("agent", Ttl::Standard))
///     .route(Route::new("/agents/{agent_id}", "agent"))
///     .mutation(Mutation::put("/agents/{agent_id}", "agent"))
///     .build()?;
/// let database = service_fn(|_: Request<Full<bytes::Bytes>>| async {
///     Ok::<_, std::io::Error>(Response::new(Full::<bytes::Bytes>::from("a row")))
/// });
/// let service = cache.invalidate_layer().layer(cache.layer().layer(database));
///
/// let ask = async |method: Method| {
///     let request = Request::builder().method(method).uri("/agents/42").header("x-tenant-id", "acme");
///     let response = service.clone().oneshot(request.body(Full::default())?).await?;
///     let status = response.headers().get("cache-status").map_or("", |status| status.to_str().unwrap_or("")).to_owned();
///     Ok::<_, Box<dyn std::error::Error>>(status)
/// };
/// assert_eq!(ask(Method::GET).await?, "tower-cache-aside; fwd=uri-miss; stored; fwd-status=200");
/// assert!(ask(Method::GET).await?.starts_with("tower-cache-aside; hit; ttl="));
/// ask(Method::PUT).await?;
/// assert_eq!(ask(Method::GET).await?, "tower-cache-aside; fwd=uri-miss; stored; fwd-status=200");
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct CacheAsideLayer {
    pub(crate) core: Arc<Core>,
}

impl<S> Layer<S> for CacheAsideLayer {
    type Service = CacheAside<S>;

    fn layer(&self, inner: S) -> Self::Service {
        CacheAside { inner, core: self.core.clone() }
    }
}

impl fmt::Debug for CacheAsideLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CacheAsideLayer")
    }
}

/// Answers the cache's routes from the cache, and calls the inner service for the rest.
#[derive(Clone)]
pub struct CacheAside<S> {
    inner: S,
    core: Arc<Core>,
}

impl<S: fmt::Debug> fmt::Debug for CacheAside<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CacheAside").field("inner", &self.inner).finish_non_exhaustive()
    }
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

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        if let Some(write) = Write::of(&self.core, &mut request) {
            return self.write(write, request);
        }
        let (parts, body) = request.into_parts();
        let finish = |handled| Some(Finish { handled, tag_header: self.core.options.tag_header.clone() });
        let Some(found) = self.core.routes.read(&parts.uri) else {
            let inner = self.inner.call(Request::from_parts(parts, body));
            return ResponseFuture::pass(inner, finish(None), CacheBody::inner);
        };
        let route: &Arc<ReadRoute> = found.value;
        let (wanted, asked) = match self.wanted(route, &parts, &body, &found.params) {
            Ok(wanted) => wanted,
            Err(handled) => {
                let inner = self.inner.call(Request::from_parts(parts, body));
                return ResponseFuture::pass(inner, finish(Some(handled)), CacheBody::inner);
            }
        };
        let engine = &self.core.engine;
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
        let response = match response {
            Some(response) if !is_due => return ResponseFuture::ready(response),
            response => response,
        };
        let tenant = self.core.space.tenant(self.core.tenants.tenant(&parts).unwrap_or_default());
        let primary = Key::new(wanted.key);
        let miss = Miss {
            reason: if variant.is_some() { Reason::VaryMiss } else { Reason::UriMiss },
            key: variant.map_or_else(|| primary.clone(), Key::new),
            primary,
            tags: route.tags(tenant.head(), &found.params),
            tenant,
            needs_public: wanted.needs_public,
            route: route.clone(),
            core: self.core.clone(),
            asked,
        };
        let inner = take_ready(&mut self.inner);
        let request = Request::from_parts(parts, body);
        match response {
            None => ResponseFuture::boxed(Box::pin(miss.answer(inner, request))),
            Some(response) => {
                self.core.engine.spawn(miss.refresh(inner, request).in_current_span());
                ResponseFuture::ready(response)
            }
        }
    }
}

impl<S> CacheAside<S> {
    /// A write that no [`Invalidate`](crate::Invalidate) outside takes care of.
    fn write<B, R>(&mut self, write: Write, request: Request<B>) -> ResponseFuture<S::Future, R, CacheBody<R>, S::Error>
    where
        S: Service<Request<B>, Response = Response<R>> + Clone + Send + 'static,
        S::Future: Send,
        S::Error: Send,
        B: Send + 'static,
        R: Body<Data = Bytes> + Send + 'static,
    {
        let is_read = self.core.routes.read(request.uri()).is_some();
        let task = write.spawn(take_ready(&mut self.inner), request);
        let tag_header = self.core.options.tag_header.clone();
        ResponseFuture::boxed(Box::pin(async move {
            let mut response = match future::joined(task).await? {
                Ok(answered) => answer(answered).map(CacheBody::written),
                Err(refused) => return Ok(unavailable(refused)),
            };
            response.headers_mut().remove(tag_header);
            if is_read {
                let status = response.status();
                let handled = Handled::Forwarded(Forwarded::new(Reason::Method));
                handled.append(response.headers_mut(), Some(status), None);
            }
            Ok(response)
        }))
    }

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
        let Core { tenants, space, options, .. } = &*self.core;
        let wanted = route.wanted(parts, params, tenants, space).map_err(bypass)?;
        if !body.is_end_stream() {
            return Err(bypass("request-body"));
        }
        if parts.extensions.get::<NoCache>().is_some() {
            return Err(bypass("no-cache"));
        }
        let mut asked = Asked::new(parts, wanted.is_conditional, options.request_directives);
        if asked.directives().is_some_and(|directives| directives.no_store) {
            return Err(Forwarded::because(Reason::Request, "no-store"));
        }
        if options.show_keys {
            asked.key = Some(Bytes::copy_from_slice(&wanted.key));
        }
        Ok((wanted, asked))
    }
}
