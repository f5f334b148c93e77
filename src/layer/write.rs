//! An unsafe request of HTTP, from before its handler until everything that it has made stale is dropped.
//!
//! | the handler | what the route declares | what the handler says ([`Changes`]) |
//! | --- | --- | --- |
//! | refuses (a status that says so) | stays | falls |
//! | succeeds | falls, unless the handler says that nothing has changed | falls |
//! | fails, panics, or may have committed | falls | falls |

use std::{
    panic::{AssertUnwindSafe, resume_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use futures_util::FutureExt;
use http::{HeaderMap, Request, Response, StatusCode, header};
use http_body::Body;
use smallvec::SmallVec;
use tokio::task::JoinHandle;
use tower_service::Service;
use tracing::Instrument;

use super::{
    changes::Changes,
    core::Core,
    future::Origin,
    writing::{Due, Refused, Writing},
};
use crate::{
    catalog::Change,
    engine::Inside,
    http::locations::Target,
    route::{Mutated, Place, Written},
};

/// By which caches an unsafe request is taken care of already, and as what: several layers of one cache may see it, and one
/// of them may know more, be it the path or the route.
#[derive(Clone, Debug, Default)]
struct Claimed(SmallVec<[Claim; 2]>);

#[derive(Clone, Debug)]
struct Claim {
    cache: usize,
    /// What is known to change; nothing if nobody has said anything.
    change: Option<Change>,
    /// Whether a layer inside knows better.
    is_known_inside: Arc<AtomicBool>,
}

impl Claimed {
    /// Claims it for a cache, unless that knows as much already.
    fn claim(&mut self, cache: usize, written: &Written) -> Option<Arc<AtomicBool>> {
        let change = match written {
            Written::Declared(mutated) => Some(mutated.change()),
            Written::Read(change) => Some(change),
            Written::Unmapped => None,
        };
        let mut own = self.0.iter().filter(|claim| claim.cache == cache).peekable();
        let is_first = own.peek().is_none();
        if !is_first && (change.is_none() || own.clone().any(|claim| claim.change.as_ref() == change)) {
            return None;
        }
        own.for_each(|outer| outer.is_known_inside.store(true, Ordering::Release));
        let claim = Claim { cache, change: change.cloned(), is_known_inside: Arc::default() };
        let is_known_inside = claim.is_known_inside.clone();
        self.0.push(claim);
        Some(is_known_inside)
    }
}

/// An unsafe request.
pub(super) struct Write {
    writing: Writing,
    written: Written,
    target: Target,
    place: Place<'static>,
    /// A layer inside knows better what it changes, and says so in the response.
    is_known_inside: Arc<AtomicBool>,
}

/// A response after its write, and what is to be dropped once more when its body is over (or was dropped unread, hence the
/// order): it may still be written.
pub(super) struct Answered<R> {
    pub(super) response: Response<R>,
    pub(super) again: Option<Due>,
}

/// What a write comes to.
type Ran<R, E> = Result<Result<Answered<R>, Refused>, E>;

/// How a handler ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Refused,
    Done,
    /// It may have committed.
    Unknown,
}

/// Whether a status says that the request was refused before it changed anything. Nothing else is evidence: 408 and 499 are
/// said while a handler goes on, 406 and 416 after it, and 424 of one part of several.
fn refuses(status: StatusCode) -> bool {
    matches!(status.as_u16(), 400..=405 | 409..=415 | 417 | 421..=423 | 425 | 426 | 428 | 429 | 431 | 451)
}

impl Write {
    /// An unsafe request that no other layer of this cache takes care of; it is then claimed, and its handler may say what
    /// it changes.
    pub(super) fn of<B>(core: &Arc<Core>, request: &mut Request<B>, mount: Option<&str>) -> Option<Self> {
        if request.method().is_safe() {
            return None;
        }
        let place = Place::new(request.uri(), request.extensions(), mount);
        let written = core.routes.written(request.method(), &place)?;
        let place = place.into_owned();
        let claimed = request.extensions_mut().get_or_insert_default::<Claimed>();
        let is_known_inside = claimed.claim(Arc::as_ptr(core) as usize, &written)?;
        let changes = request.extensions_mut().get_or_insert_default::<Changes>().clone();
        let what = format!("{} {}", request.method(), place.full());
        Some(Self {
            written,
            target: Target::new(request.uri(), place.full(), request.headers()),
            writing: Writing::new(core, Arc::default(), changes, what),
            place,
            is_known_inside,
        })
    }

    /// Runs it in a task of its own, in which nothing can come between the handler and the invalidation.
    pub(super) fn spawn<S, B, R>(mut self, inner: S, request: Request<B>) -> JoinHandle<Ran<R, S::Error>>
    where
        S: Origin<B, R>,
        B: Send + 'static,
        R: Body + Send + 'static,
    {
        let core = self.writing.core.clone();
        let (parts, body) = request.into_parts();
        // Every tenant that the request may be about.
        self.writing.tenants = core.tenants.tenants(&parts, &core.space).into();
        let scope = Inside::of(None);
        core.engine.spawn(scope.around(self.run(inner, Request::from_parts(parts, body))).in_current_span())
    }

    /// Calls the handler, and drops what it has made stale; or says that it was not called.
    async fn run<S, B, R>(mut self, mut inner: S, request: Request<B>) -> Ran<R, S::Error>
    where
        S: Service<Request<B>, Response = Response<R>>,
        R: Body,
    {
        if let Err(refused) = self.begin().await {
            return Ok(Err(refused));
        }
        let changes = self.writing.changes.clone();
        let call = changes.scope(async { inner.call(request).await });
        let result = AssertUnwindSafe(call).catch_unwind().await;
        let response = result.as_ref().ok().and_then(|result| result.as_ref().ok());
        let outcome = match response.map(Response::status) {
            Some(status) if refuses(status) || self.refuses_with(status) => Outcome::Refused,
            Some(status) if !status.is_client_error() && !status.is_server_error() => Outcome::Done,
            _ => Outcome::Unknown,
        };
        self.ended(outcome, response.map(Response::headers)).await;
        if self.writing.is_idle() {
            let response = result.unwrap_or_else(|panic| resume_unwind(panic))?;
            let again = (outcome != Outcome::Refused && streams(response.body())).then(|| Due::arm(self.writing));
            return Ok(Ok(Answered { response, again }));
        }
        let (core, again) = (self.writing.core.clone(), self.writing.again());
        let report = self.writing.end().await;
        let mut response = result.unwrap_or_else(|panic| resume_unwind(panic))?;
        if !self.is_known_inside.load(Ordering::Acquire) {
            Writing::report(&core, &report, response.headers_mut());
            response.extensions_mut().insert(report);
        }
        let again = streams(response.body()).then(|| Due::arm(again));
        Ok(Ok(Answered { response, again }))
    }

    fn refuses_with(&self, status: StatusCode) -> bool {
        matches!(&self.written, Written::Declared(mutated) if mutated.refuses_with().contains(&status.as_u16()))
    }

    /// Before the handler: it may remove the rows that name the children.
    async fn begin(&mut self) -> Result<(), Refused> {
        match &self.written {
            Written::Declared(mutated) => {
                let known = mutated.change_before(&self.writing.core.cascades);
                self.writing.begin(&known, mutated.types()).await
            }
            Written::Read(change) => {
                let types = change.entities.iter().map(|(t, _)| t).chain(&change.all);
                self.writing.begin(change, types.map(|t| &**t)).await
            }
            Written::Unmapped => self.writing.admit(),
        }
    }

    /// After it: the response may say what else has changed.
    async fn ended(&mut self, outcome: Outcome, response: Option<&HeaderMap>) {
        if outcome == Outcome::Refused || outcome == Outcome::Done && self.writing.changes.says_nothing() {
            return self.writing.cancel().await;
        }
        match &self.written {
            Written::Declared(mutated) => {
                let created = self.created(mutated, response);
                let located = response.filter(|_| mutated.follows_locations()).map(|headers| self.located(headers));
                let located = located.into_iter().flatten().map(|change| change.include(mutated.include()));
                let changes: Vec<_> = [mutated.change().clone()].into_iter().chain(created).chain(located).collect();
                changes.into_iter().for_each(|change| self.writing.declare(change));
            }
            Written::Read(change) => self.writing.declare(change.clone()),
            Written::Unmapped => {
                let is_mapped = self.is_known_inside.load(Ordering::Acquire) || self.writing.changes.says_nothing();
                if !is_mapped && self.writing.is_silent() {
                    self.writing.is_unmapped(outcome == Outcome::Done);
                }
            }
        }
    }

    /// What the creation of an entity drops, which the response's `Location` names, if it does.
    fn created(&self, mutated: &Mutated, response: Option<&HeaderMap>) -> Option<Change> {
        let data_type = mutated.creates()?;
        let path = response.and_then(|headers| self.target.path(headers.get(header::LOCATION)?));
        let located = path.and_then(|path| self.writing.core.routes.locate(&path, &self.place));
        let created = located.filter(|change| change.entities.iter().any(|(found, _)| found == data_type));
        Some(created.unwrap_or_else(|| Change::all(data_type.clone())).include(mutated.include()))
    }

    /// What the response names on the same host (RFC 9111, section 4.4).
    fn located(&self, headers: &HeaderMap) -> Vec<Change> {
        let named = [header::LOCATION, header::CONTENT_LOCATION].into_iter().flat_map(|name| headers.get_all(name));
        let paths = named.filter_map(|reference| self.target.own_path(reference));
        paths.filter_map(|path| self.writing.core.routes.locate(&path, &self.place)).collect()
    }
}

/// Whether a body may still be followed by what its handler writes.
fn streams(body: &impl Body) -> bool {
    !body.is_end_stream() && body.size_hint().exact().is_none()
}
