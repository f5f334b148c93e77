//! The layer that answers reads from the cache, and invalidates after the writes that come through it.
//!
//! A hit in this process is answered on the spot: no task, no boxing, no lock held. What this process holds, but may answer
//! with only when the store says that it is current, is answered as soon as that is said. Everything else goes through the
//! engine, which tells whether to answer, to wait for another request's call, or to call the inner service. That call is
//! polled by its request, and goes on in a task of its own when its client hangs up.

#[cfg(feature = "stats")]
mod audit;
mod held;
mod load;
mod miss;

use std::{
    borrow::Cow,
    fmt,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{Method, Request, Response, Uri, Version, header, request, uri::PathAndQuery};
use http_body::Body;
use matchit::Params;
use smallvec::SmallVec;
use tower_layer::Layer;
use tower_service::Service;
use tracing::Instrument;

#[cfg(feature = "warm")]
use super::sampler::Warmup;
use super::{
    body::CacheBody,
    changes::Reads,
    core::Core,
    extensions::NoCache,
    future::{self, Finish, Origin, ResponseFuture, watched},
    invalidate::{answer as answer_write, mount, unavailable},
    popular::{Picked, picked},
    request::{Bodies, NoBodies, ReadBody, RequestBody},
    serve::{Asked, How, answer, put_outcome},
    write::Write,
};
use crate::{
    http::cache_status::{Forwarded, Handled, Reason},
    key::{Key, KeyBuf, Tags, Tenant, give_back},
    observe::{FoundIn, Timer, Watch},
    route::{At, BodyKey, Place, Read, ReadRoute, Wanted},
    store::Entry,
};
use held::{Held, held};
use miss::{Behind, Mapped, Miss, SoFar, Turn};

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
pub struct CacheAsideLayer<M = NoBodies> {
    core: Arc<Core>,
    mount: Option<Arc<str>>,
    bodies: M,
}

impl CacheAsideLayer {
    pub(crate) fn new(core: Arc<Core>) -> Self {
        Self { core, mount: None, bodies: NoBodies }
    }
}

impl<M> CacheAsideLayer<M> {
    /// The prefix that a router around this layer takes away from every path, such as `/admin`: routes are then written as
    /// clients see them. A route that is written without it is one of several, under as many prefixes. (Of axum's nested
    /// routers the feature `axum` knows by itself.)
    #[must_use]
    pub fn mounted_at(mut self, prefix: impl Into<Arc<str>>) -> Self {
        self.mount = Some(mount(&prefix.into()));
        self
    }

    /// How to make a request's body of one that was read, for routes whose [method](crate::Route::method) has one; in axum
    /// `axum::body::Body::new`. Without it such requests bypass the cache.
    #[must_use]
    pub fn request_bodies<B, F>(self, make: F) -> CacheAsideLayer<Bodies<F>>
    where
        B: Body<Data = Bytes>,
        F: Fn(RequestBody<B>) -> B + Clone + Send + Sync + 'static,
    {
        CacheAsideLayer { core: self.core, mount: self.mount, bodies: Bodies(make) }
    }
}

impl<S, M: Clone> Layer<S> for CacheAsideLayer<M> {
    type Service = CacheAside<S, M>;

    fn layer(&self, inner: S) -> Self::Service {
        CacheAside { inner, core: self.core.clone(), mount: self.mount.clone(), bodies: self.bodies.clone() }
    }
}

impl<M> fmt::Debug for CacheAsideLayer<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CacheAsideLayer")
    }
}

/// Answers the cache's routes from the cache, and calls the inner service for the rest.
#[derive(Clone)]
pub struct CacheAside<S, M = NoBodies> {
    inner: S,
    core: Arc<Core>,
    mount: Option<Arc<str>>,
    bodies: M,
}

impl<S: fmt::Debug, M> fmt::Debug for CacheAside<S, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CacheAside").field("inner", &self.inner).finish_non_exhaustive()
    }
}

impl<S, M, B, R> Service<Request<B>> for CacheAside<S, M>
where
    S: Service<Request<B>, Response = Response<R>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Send,
    M: ReadBody<B>,
    B: Body + Send + 'static,
    R: Body<Data = Bytes> + Send + 'static,
    R::Error: Send,
{
    type Response = Response<CacheBody<R>>;
    type Error = S::Error;
    type Future = ResponseFuture<S, B, R, CacheBody<R>>;

    /// Always: a hit needs nobody. What needs the inner service waits for it in its own future.
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        match Write::of(&self.core, &mut request, self.mount.as_deref()) {
            Some(write) => self.write(write, request),
            None => self.seek(request, Timer::start(), Turn::First),
        }
    }
}

impl<S, M> CacheAside<S, M> {
    /// Answers a read.
    fn seek<B, R>(&self, request: Request<B>, timer: Timer, turn: Turn) -> ResponseFuture<S, B, R, CacheBody<R>>
    where
        S: Origin<B, R> + Clone,
        M: ReadBody<B>,
        B: Body + Send + 'static,
        R: Body<Data = Bytes, Error: Send> + Send + 'static,
    {
        let (parts, body) = request.into_parts();
        let place = Place::new(&parts.uri, &parts.extensions, self.mount.as_deref());
        // What another load asks for becomes a part of what it makes.
        let whole = Reads::current();
        let Some(read) = self.core.routes.read(&parts.method, &place) else {
            let finish = self.unmatched(&parts.method, &place, whole);
            return self.pass(Request::from_parts(parts, body), Some(finish));
        };
        let (route, wanted, asked) = match self.wanted(&read, &parts, &body) {
            Ok(wanted) => wanted,
            Err(handled) => {
                let finish = self.bypassed(&read, &parts, (handled, timer), whole);
                return self.pass(Counted::mark(&self.core, Request::from_parts(parts, body)), Some(finish));
            }
        };
        let looked = |looked: &Looked| route.body.is_none() && looked.has(&self.core, &wanted.key);
        if parts.extensions.get().is_some_and(looked) {
            return self.pass(Request::from_parts(parts, body), None);
        }
        let held = held(&self.core, route, &wanted.key, &asked, &parts.headers, (whole.as_ref(), turn), &read.params);
        let Held { found, now, unconfirmed, variant, known } = held;
        let at = At { params: &read.params, mount: read.mount };
        let picks = || picked(&self.core, route, (&place, &at), &parts, (&wanted, variant.as_deref()));
        let picked = if turn == Turn::First { picks() } else { None };
        let Wanted { mut key, tenant: name, needs_public, .. } = wanted;
        let (watcher, how) = (route.teller.watcher(), How::hit(&route.teller, FoundIn::Process));
        let found = found.as_ref().and_then(|(entry, behind)| Some(((&**entry, entry.response()?), *behind)));
        let watch = || watcher.watch(timer, || Some(name.clone()), || asked_for(&place, &parts.uri));
        let (shown, watch) = match found {
            Some((entry, behind)) => {
                let mut response = answer(entry, now, &asked, how);
                let outcome = how.outcome(entry.0, now, response.body());
                watcher.hit(timer, &outcome, || Some((&*name).into()));
                if behind == Behind::Nothing {
                    put_outcome(&mut response, parts.extensions, outcome);
                    give_back(key);
                    return ResponseFuture::ready(response);
                }
                response.extensions_mut().insert(outcome);
                (Some((Box::new(response), behind)), None)
            }
            None => (None, asked.ahead().is_none().then(watch)),
        };
        if let Some((entry, Behind::Nothing)) = unconfirmed {
            return self.confirm((key, entry), (route.clone(), asked), watch, Request::from_parts(parts, body));
        }
        let (primary, tags, tenant) = named(route, &mut key, &name, &read.params);
        whole.iter().for_each(|whole| whole.add_tags(tags.iter()));
        let reason = if variant.is_some() { Reason::VaryMiss } else { Reason::UriMiss };
        let by_body = route.body.map(|how| (how, route.clone(), picked));
        let mapped = Mapped { core: self.core.clone(), route: route.clone(), tenant, tags };
        let miss = move |primary: Key| {
            let variant = variant.map(|variant| Box::new(Key::new(variant)));
            let (drawn, behind) = (unconfirmed.map(|(entry, behind)| (entry.created, behind)), Behind::Nothing);
            let so_far = SoFar { primary, variant, asked, needs_public, turn, reason, known, whole, drawn, behind };
            Miss { mapped, so_far }
        };
        let (inner, request) = (self.inner.clone(), Request::from_parts(parts, body));
        match (shown, by_body) {
            (None, Some(by_body)) => self.answer_body(miss, key, by_body, watch, inner, request),
            (None, None) => ResponseFuture::boxed(Box::pin(watched(watch, miss(primary).answer(inner, request)))),
            (Some((shown, behind)), _) => self.answer_before(*shown, miss(primary).follow_up(behind, inner, request)),
        }
    }
}

/// Which caches have looked for a request's response already, and under which key: another layer of theirs is no other. (A
/// request for something else that was made of this one is.)
#[derive(Clone, Default)]
struct Looked(SmallVec<[(usize, Key); 2]>);

impl Looked {
    fn add(&mut self, core: &Arc<Core>, key: Key) {
        self.0.push((Arc::as_ptr(core) as usize, key));
    }

    fn has(&self, core: &Arc<Core>, key: &[u8]) -> bool {
        let own = Arc::as_ptr(core) as usize;
        self.0.iter().any(|(cache, looked)| *cache == own && looked.as_bytes() == key)
    }
}

/// The caches that have counted a request which they keep out of: another layer of theirs does not count it again.
#[derive(Clone, Default)]
struct Counted(SmallVec<[usize; 2]>);

impl Counted {
    fn mark<B>(core: &Arc<Core>, mut request: Request<B>) -> Request<B> {
        request.extensions_mut().get_or_insert_default::<Self>().0.push(Arc::as_ptr(core) as usize);
        request
    }

    fn has(&self, core: &Arc<Core>) -> bool {
        self.0.contains(&(Arc::as_ptr(core) as usize))
    }
}

/// What a request looks for, by which route.
type Sought<'k> = (&'k Arc<ReadRoute>, Wanted<'k>, Asked);

impl<S, M> CacheAside<S, M> {
    /// Answers with what this process holds, if the store says that it is current; else it is looked for as though nothing was held.
    fn confirm<B, R>(
        &self,
        (key, entry): (KeyBuf, Arc<Entry>),
        (route, asked): (Arc<ReadRoute>, Asked),
        watch: Option<Watch>,
        mut request: Request<B>,
    ) -> ResponseFuture<S, B, R, CacheBody<R>>
    where
        S: Origin<B, R> + Clone,
        M: ReadBody<B>,
        B: Body + Send + 'static,
        R: Body<Data = Bytes, Error: Send> + Send + 'static,
    {
        let layer = self.clone();
        ResponseFuture::boxed(Box::pin(async move {
            let engine = &layer.core.engine;
            let is_current = engine.is_current(&key, &entry).await.ok();
            give_back(key);
            let (now, how) = (engine.now(), How::hit(&route.teller, layer.core.found_in()));
            let is_good = is_current == Some(true) && entry.is_fresh(now) && asked.accepts(&entry, now);
            if let Some(stored) = entry.response().filter(|_| is_good) {
                let mut response = answer((&entry, stored), now, &asked, how);
                let outcome = how.outcome(&entry, now, response.body());
                if let Some(watch) = watch {
                    watch.finish((outcome.outcome, outcome.reason), outcome.tier, outcome.served);
                }
                put_outcome(&mut response, std::mem::take(request.extensions_mut()), outcome);
                return Ok(response);
            }
            // Not held while the inner service works.
            drop((entry, route, asked));
            let turn = if is_current.is_some() { Turn::NotCurrent } else { Turn::Unavailable };
            let timer = watch.map_or_else(Timer::start, Watch::hand_on);
            let again = Box::pin(layer.seek(request, timer, turn));
            drop(layer);
            again.await
        }))
    }

    /// Answers, and does this behind it.
    fn answer_before<B, R: Body>(
        &self,
        response: Response<CacheBody<R>>,
        task: impl Future<Output = ()> + Send + 'static,
    ) -> ResponseFuture<S, B, R, CacheBody<R>>
    where
        S: Service<Request<B>>,
    {
        self.core.engine.spawn(task.in_current_span());
        ResponseFuture::ready(response)
    }

    /// A path that no route reads.
    fn unmatched(&self, method: &Method, place: &Place<'_>, whole: Option<Reads>) -> Finish {
        if *method == Method::GET {
            self.core.unmatched(place.full());
        }
        Finish { told: None, tag_header: self.core.options.tag_header.clone(), whole }
    }

    fn pass<B, R: Body>(&self, request: Request<B>, finish: Option<Finish>) -> ResponseFuture<S, B, R, CacheBody<R>>
    where
        S: Service<Request<B>> + Clone,
    {
        ResponseFuture::pass(self.inner.clone(), request, finish, CacheBody::inner)
    }

    /// A request whose body says what it asks for.
    fn answer_body<B, R>(
        &self,
        miss: impl FnOnce(Key) -> Miss + Send + 'static,
        mut key: Vec<u8>,
        (how, route, picked): (BodyKey, Arc<ReadRoute>, Option<Picked>),
        watch: Option<Watch>,
        mut inner: S,
        request: Request<B>,
    ) -> ResponseFuture<S, B, R, CacheBody<R>>
    where
        S: Origin<B, R> + Clone,
        M: ReadBody<B>,
        B: Send + 'static,
        R: Body<Data = Bytes, Error: Send> + Send + 'static,
    {
        let (core, bodies, part_of) = (self.core.clone(), self.bodies.clone(), Reads::current());
        ResponseFuture::boxed(Box::pin(watched(watch, async move {
            let (parts, body) = request.into_parts();
            let (whole, body) = bodies.read(body, core.options.body_limit).await;
            let request = Request::from_parts(parts, body);
            // It may have taken long.
            let kept_out = core.keeps_out(route.data_type(), &route.policy);
            if let (Some(whole), None) = (whole, kept_out) {
                how.push(&mut key, request.headers(), &whole);
                picked.into_iter().for_each(|picked| picked.send_with(&key, &whole));
                if request.extensions().get().is_some_and(|looked: &Looked| looked.has(&core, &key)) {
                    return future::call(&mut inner, request).await.map(|response| response.map(CacheBody::inner));
                }
                let whole = Key::new(key.as_slice().into());
                give_back(key);
                return miss(whole).answer(inner, request).await;
            }
            let response = future::call(&mut inner, request).await?;
            let why = kept_out.unwrap_or("request-body");
            let told = Some((Forwarded::because(Reason::Bypass, why), route.teller.clone(), None));
            let finish = Finish { told, tag_header: core.options.tag_header.clone(), whole: part_of };
            Ok(finish.finish(response).map(CacheBody::inner))
        })))
    }

    /// What the cache keeps out of is a part of what asks for it, all the same.
    fn bypassed(
        &self,
        read: &Read<'_, '_>,
        parts: &request::Parts,
        (handled, timer): (Handled, Timer),
        whole: Option<Reads>,
    ) -> Finish {
        let Core { tenants, space, options, .. } = &*self.core;
        if let (Some(whole), Some(route)) = (&whole, read.route.filter(|_| read.is_certain)) {
            match tenants.tenant(parts) {
                Ok(tenant) => whole.add_tags(route.tags(space.tenant(tenant).head(), &read.params).iter()),
                Err(_) => whole.spoil(),
            }
        }
        let teller = &read.route.map_or(read.any, |route| route).teller;
        let is_counted = parts.extensions.get::<Counted>().is_some_and(|counted| counted.has(&self.core));
        let watch = read.route.filter(|_| !is_counted).map(|_| {
            let asked = || parts.uri.path_and_query().map_or("", PathAndQuery::as_str).into();
            teller.watcher().watch(timer, || tenants.tenant(parts).ok(), asked).bypassing(handled.reason())
        });
        Finish { told: Some((handled, teller.clone(), watch)), tag_header: options.tag_header.clone(), whole }
    }

    /// A write that no [`Invalidate`](crate::Invalidate) outside takes care of.
    fn write<B, R>(&mut self, write: Write, request: Request<B>) -> ResponseFuture<S, B, R, CacheBody<R>>
    where
        S: Origin<B, R> + Clone,
        B: Send + 'static,
        R: Body<Data = Bytes> + Send + 'static,
    {
        let place = Place::new(request.uri(), request.extensions(), self.mount.as_deref());
        let told = self.core.routes.read(request.method(), &place).map(|read| {
            // It is no read that is to be counted.
            (Handled::Forwarded(Forwarded::new(Reason::Method)), read.any.teller.clone(), None)
        });
        let mut inner = self.inner.clone();
        let (tag_header, whole) = (self.core.options.tag_header.clone(), Reads::current());
        ResponseFuture::boxed(Box::pin(async move {
            future::ready(&mut inner).await?;
            let response = match future::joined(write.spawn(inner, request)).await? {
                Ok(answered) => answer_write(answered).map(CacheBody::written),
                Err(refused) => return Ok(unavailable(refused)),
            };
            Ok(Finish { told, tag_header, whole }.finish(response))
        }))
    }

    /// What a request of a cacheable route looks for, or why the cache leaves it alone.
    fn wanted<'k, B: Body>(
        &'k self,
        read: &Read<'k, '_>,
        parts: &'k request::Parts,
        body: &B,
    ) -> Result<Sought<'k>, Handled> {
        let bypass = |detail| Forwarded::because(Reason::Bypass, detail);
        let route = read.route.ok_or(Handled::Forwarded(Forwarded::new(Reason::Method)))?;
        if !read.is_certain {
            return Err(bypass("route"));
        }
        if let Some(why) = self.core.keeps_out(route.data_type(), &route.policy) {
            return Err(bypass(why));
        }
        let at = At { params: &read.params, mount: read.mount };
        let wanted = route.wanted(parts, &at, &self.core.known()).map_err(bypass)?;
        if route.body.is_none() && has_body(parts, body) {
            if self.core.warnings.is_new("request-body", route.data_type()) {
                let route = route.what();
                tracing::warn!(route, "not cached: the request has a body, or one that does not say that it is empty");
            }
            return Err(bypass("request-body"));
        }
        if parts.extensions.get::<NoCache>().is_some() {
            return Err(bypass("no-cache"));
        }
        let options = &self.core.options;
        let mut asked = Asked::new(parts, wanted.is_conditional, options.request_directives);
        if asked.directives().is_some_and(|directives| directives.no_store) {
            return Err(Forwarded::because(Reason::Request, "no-store"));
        }
        #[cfg(feature = "warm")]
        if let Some(warmup) = self.core.sampler.get().and_then(|_| parts.extensions.get::<Warmup>()) {
            asked.warm(warmup.ahead);
        }
        if options.show_keys {
            asked.say_key(&wanted.key);
        }
        Ok((route, wanted, asked))
    }
}

/// The key and the tags of what a request asks for. A key that a body is a part of is not known yet, and goes on.
fn named(route: &ReadRoute, key: &mut KeyBuf, tenant: &[u8], params: &Params<'_, '_>) -> (Key, Tags, Tenant) {
    if route.body.is_none() {
        return route.key_and_tags(std::mem::take(key), tenant, params);
    }
    let (_, tags, tenant) = route.key_and_tags(key.clone(), tenant, params);
    (Key::new(KeyBuf::new()), tags, tenant)
}

/// The path as clients see it, and the query.
fn asked_for<'p>(place: &'p Place<'_>, uri: &Uri) -> Cow<'p, str> {
    match uri.query() {
        Some(query) => format!("{}?{query}", place.full()).into(),
        None => place.full().into(),
    }
}

/// Whether a request has a body. One that a layer outside has wrapped may not say itself that it is empty; of HTTP/1.1 the
/// headers do (RFC 9112, section 6.3).
fn has_body<B: Body>(parts: &request::Parts, body: &B) -> bool {
    let size = body.size_hint();
    if body.is_end_stream() || size.exact() == Some(0) {
        return false;
    }
    let length = parts.headers.get(header::CONTENT_LENGTH).map(|length| length.as_bytes().trim_ascii());
    let is_framed =
        parts.headers.contains_key(header::TRANSFER_ENCODING) || length.is_some_and(|length| length != b"0");
    size.lower() > 0 || is_framed || parts.version > Version::HTTP_11 && length.is_none()
}
