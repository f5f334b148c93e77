//! A service behind the cache and its twin without one: both are asked the same, and must answer the same.

use std::{
    fmt,
    future::{Future, poll_fn},
    pin::Pin,
};

use bytes::Bytes;
use http::{HeaderName, Method, Request, Response, header};
use tower_service::Service;

use super::{
    compare::{Answered, Reply, difference},
    difference::{Difference, Step},
    minimise::minimise,
    request::{Body, is_read},
};
use crate::{cache::Cache, observe::Handling};

type Ask = Box<dyn FnMut(Request<Bytes>) -> Pin<Box<dyn Future<Output = Answered> + Send>> + Send>;

/// A service behind the cache, and the same service without one.
///
/// Every read is sent to both, and their answers are compared: status, bytes, trailers, and headers but for those of the moment
/// (`Date`, `Age`, `Expires`, `Cache-Status`, those of the connection), and those that a cache may add or take out.
///
/// Usually both stand before **one** database: a write then goes through the cache alone, and the twin sees what it did. Where
/// each has a database of its own ([`apart`](Self::apart)), writes are sent to both and compared like reads.
///
/// ```
/// # use axum::{Router, extract::{Path, State}, routing::get};
/// # use std::{collections::BTreeMap, sync::{Arc, Mutex}};
/// # use tower_cache_aside::{Cache, DataType, Mutation, Route, Ttl};
/// use http::Method;
/// use tower_cache_aside::testing::{Requests, Twin};
///
/// # type Database = Arc<Mutex<BTreeMap<String, String>>>;
/// # async fn read(State(db): State<Database>, Path(id): Path<String>) -> String {
/// #     db.lock().unwrap().get(&id).cloned().unwrap_or_default()
/// # }
/// # async fn write(State(db): State<Database>, Path(id): Path<String>, name: String) {
/// #     db.lock().unwrap().insert(id, name);
/// # }
/// fn cache() -> Cache {
///     let builder = Cache::builder("docs").single_tenant("all").data_type(DataType::new("agent", Ttl::Standard));
///     let builder = builder.route(Route::new("/agents/{agent_id}", "agent"));
///     builder.mutation(Mutation::put("/agents/{agent_id}", "agent")).build().unwrap()
/// }
///
/// /// Both before a database of their own, in which there is nothing yet.
/// async fn twin() -> Twin {
///     let (cache, database) = (cache(), Database::default());
///     let app = Router::new().route("/agents/{agent_id}", get(read).put(write)).with_state(database);
///     Twin::new(app.clone().layer(cache.layer()).layer(cache.invalidate_layer()), app)
/// }
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), tower_cache_aside::testing::Difference> {
/// let requests = Requests::of(&cache()).body(Method::PUT, "/agents/{agent_id}", |n| format!("name {n}"));
/// for seed in 0..10 {
///     let compared = Twin::check(twin, requests.generate(seed, 100)).await?;
///     assert!(compared.hits > 10, "{compared:?}");
/// }
/// # Ok(()) }
/// ```
pub struct Twin {
    cached: Ask,
    uncached: Ask,
    ignored: Vec<HeaderName>,
    is_apart: bool,
    cache: Option<Cache>,
}

/// What was compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Compared {
    /// Answers that were the same.
    pub answers: usize,
    /// How many of them the cache gave. A test in which there are none has tested nothing.
    pub hits: usize,
    /// Requests that were sent through the cache alone.
    pub writes: usize,
}

impl Compared {
    fn count(&mut self, cached: &Answered, is_compared: bool) {
        let told = cached.as_ref().ok().and_then(Reply::told);
        let is_hit = told.is_some_and(|told| told.handling == Handling::Hit);
        match is_compared {
            true => (self.answers, self.hits) = (self.answers + 1, self.hits + usize::from(is_hit)),
            false => self.writes += 1,
        }
    }
}

impl Twin {
    /// A service with the layers of the cache around it, and the same without. (A service that takes other bodies than
    /// [`Body`] is mapped to them, see there; axum's router takes any.)
    pub fn new<C, U, R, Q>(cached: C, uncached: U) -> Self
    where
        C: Service<Request<Body>, Response = Response<R>, Error: fmt::Display, Future: Send> + Clone + Send + 'static,
        U: Service<Request<Body>, Response = Response<Q>, Error: fmt::Display, Future: Send> + Clone + Send + 'static,
        R: http_body::Body<Data = Bytes, Error: fmt::Display> + Send + 'static,
        Q: http_body::Body<Data = Bytes, Error: fmt::Display> + Send + 'static,
    {
        let (cached, uncached) = (ask(cached), ask(uncached));
        Self { cached, uncached, ignored: vec![], is_apart: false, cache: None }
    }

    /// Each has a database of its own, in which the same is at the beginning: writes are sent to both, and compared.
    #[must_use]
    pub fn apart(mut self) -> Self {
        self.is_apart = true;
        self
    }

    /// A response header that may differ: a request's id, a time.
    #[must_use]
    pub fn ignore_header(mut self, name: HeaderName) -> Self {
        self.ignored.push(name);
        self
    }

    /// Waits between two requests until [nothing is under way](Cache::settled) in this cache: where the store takes its time, or
    /// the runtime has several threads, every run is then like the other.
    #[must_use]
    pub fn settling(mut self, cache: &Cache) -> Self {
        self.cache = Some(cache.clone());
        self
    }

    /// Sends these requests, one after the other.
    ///
    /// # Errors
    /// The first difference, with all requests up to there.
    pub async fn run(&mut self, requests: impl IntoIterator<Item = Request<Bytes>>) -> Result<Compared, Difference> {
        let (mut compared, mut steps) = (Compared::default(), vec![]);
        for request in requests {
            let is_compared = self.is_apart || is_read(&request);
            let (cached, found) =
                if is_compared { self.both(&request).await } else { ((self.cached)(request.clone()).await, None) };
            if let Some(cache) = &self.cache {
                cache.settled().await;
            }
            compared.count(&cached, is_compared);
            let told = cached.as_ref().ok().and_then(Reply::told).cloned();
            steps.push(Step { request, told });
            if let Some((what, uncached)) = found {
                return Err(Difference::new(steps, what, cached, uncached));
            }
        }
        Ok(compared)
    }

    /// Sends these requests to a new twin; if they make a difference, fewer and plainer ones to others, until none can be left
    /// out. What they make must begin alike each time: a database of its own, a cache in which nothing is.
    ///
    /// # Errors
    /// The first difference, with the requests that it takes.
    pub async fn check(
        make: impl AsyncFn() -> Self,
        requests: impl IntoIterator<Item = Request<Bytes>>,
    ) -> Result<Compared, Difference> {
        match make().await.run(requests).await {
            Ok(compared) => Ok(compared),
            Err(found) => {
                let run = async |requests: Vec<Request<Bytes>>| make().await.run(requests).await.err();
                Err(minimise(&run, found).await)
            }
        }
    }

    /// Asks both; how they differ, and what the twin answered.
    async fn both(&mut self, request: &Request<Bytes>) -> (Answered, Option<(String, Answered)>) {
        let (mut cached, mut uncached) = ((self.cached)(request.clone()).await, (self.uncached)(request.clone()).await);
        let mut what = difference(&cached, &uncached, &self.ignored);
        // A cache may answer a condition or a range that the service ignores: then both are asked for the whole.
        if let Some(whole) = whole(request).filter(|_| what.is_some()) {
            (cached, uncached) = ((self.cached)(whole.clone()).await, (self.uncached)(whole).await);
            what = difference(&cached, &uncached, &self.ignored);
        }
        (cached, what.map(|what| (what, uncached)))
    }
}

/// The same request for the whole response, if it asks for less.
fn whole(request: &Request<Bytes>) -> Option<Request<Bytes>> {
    let mut whole = request.clone();
    let partial = [header::IF_NONE_MATCH, header::IF_MODIFIED_SINCE, header::RANGE];
    let asks_for_less = partial.into_iter().filter(|name| whole.headers_mut().remove(name).is_some()).count() > 0;
    let is_get = *request.method() == Method::GET;
    (is_get && asks_for_less).then_some(whole)
}

fn ask<S, R>(service: S) -> Ask
where
    S: Service<Request<Body>, Response = Response<R>, Error: fmt::Display, Future: Send> + Clone + Send + 'static,
    R: http_body::Body<Data = Bytes, Error: fmt::Display> + Send + 'static,
{
    Box::new(move |request| {
        let mut service = service.clone();
        Box::pin(async move {
            poll_fn(|cx| service.poll_ready(cx)).await.map_err(|error| error.to_string())?;
            let response = service.call(request.map(Body::from)).await.map_err(|error| error.to_string())?;
            Ok(Reply::read(response).await)
        })
    })
}

impl fmt::Debug for Twin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Twin").field("ignored", &self.ignored).field("is_apart", &self.is_apart).finish_non_exhaustive()
    }
}
