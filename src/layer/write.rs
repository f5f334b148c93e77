//! An unsafe request of HTTP, from before its handler until everything that it has made stale is dropped.
//!
//! | the handler | what the route declares | what the handler says ([`Changes`]) |
//! | --- | --- | --- |
//! | refuses (a status that says so) | stays | falls |
//! | succeeds | falls, unless the handler says that nothing has changed | falls |
//! | fails, panics, or may have committed | falls | falls |

use std::{
    panic::{AssertUnwindSafe, resume_unwind},
    sync::Arc,
};

use futures_util::FutureExt;
use http::{HeaderMap, Method, Request, Response, StatusCode, header};
use http_body::Body;
use smallvec::SmallVec;
use tokio::task::JoinHandle;
use tower_service::Service;
use tracing::Instrument;

use super::{
    changes::Changes,
    core::Core,
    writing::{Refused, Writing},
};
use crate::{
    catalog::Change,
    http::locations::Target,
    route::{Mutated, OnUnmapped, Written},
};

/// By which cache an unsafe request is taken care of already: several layers of one cache may see it.
#[derive(Clone, Debug, Default)]
struct Claimed(SmallVec<[usize; 2]>);

/// An unsafe request.
pub(super) struct Write {
    writing: Writing,
    written: Written,
    target: Target,
    /// Method and path, for warnings.
    what: (Method, String),
}

/// A response after its write, and what is to be dropped once more when its body is over: it may still be written.
pub(super) struct Answered<R> {
    pub(super) response: Response<R>,
    pub(super) again: Option<Writing>,
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

/// Whether a method may change anything. (Of the registered ones these are safe, besides those that the `http` crate knows:
/// RFC 4918, RFC 3253, RFC 5323, and `QUERY`.)
fn is_unsafe(method: &Method) -> bool {
    let is_safe = method.is_safe() || matches!(method.as_str(), "PROPFIND" | "REPORT" | "SEARCH" | "QUERY");
    !is_safe && *method != Method::CONNECT
}

/// Whether a status says that the request was refused before it changed anything. Nothing else is evidence: 408 and 499 are
/// said while a handler goes on, 406 and 416 after it, and 424 of one part of several.
fn refuses(status: StatusCode) -> bool {
    matches!(status.as_u16(), 400..=405 | 409..=415 | 417 | 421..=423 | 425 | 426 | 428 | 429 | 431 | 451)
}

impl Write {
    /// An unsafe request that no other layer of this cache takes care of; it is then claimed, and its handler may say what
    /// it changes.
    pub(super) fn of<B>(core: &Arc<Core>, request: &mut Request<B>) -> Option<Self> {
        if !is_unsafe(request.method()) {
            return None;
        }
        let cache = Arc::as_ptr(core) as usize;
        let claimed = request.extensions_mut().get_or_insert_default::<Claimed>();
        if claimed.0.contains(&cache) {
            return None;
        }
        claimed.0.push(cache);
        let changes = request.extensions_mut().get_or_insert_default::<Changes>().clone();
        let (uri, method) = (request.uri(), request.method());
        Some(Self {
            written: core.routes.written(method, uri),
            target: Target::new(uri, request.headers()),
            what: (method.clone(), uri.path().to_owned()),
            writing: Writing::new(core, Arc::default(), changes),
        })
    }

    /// Runs it in a task of its own, in which nothing can come between the handler and the invalidation.
    pub(super) fn spawn<S, B, R>(mut self, inner: S, request: Request<B>) -> JoinHandle<Ran<R, S::Error>>
    where
        S: Service<Request<B>, Response = Response<R>> + Send + 'static,
        S::Future: Send,
        S::Error: Send,
        B: Send + 'static,
        R: Body + Send + 'static,
    {
        let core = self.writing.core.clone();
        let (parts, body) = request.into_parts();
        // Every tenant that the request may be about.
        self.writing.tenants = core.tenants.tenants(&parts, &core.space).into();
        core.engine.spawn(self.run(inner, Request::from_parts(parts, body)).in_current_span())
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
            Some(status) if refuses(status) => Outcome::Refused,
            Some(status) if !status.is_client_error() && !status.is_server_error() => Outcome::Done,
            _ => Outcome::Unknown,
        };
        self.add_changed(outcome, response.map(Response::headers)).await;
        if self.writing.drops_nothing() {
            let response = result.unwrap_or_else(|panic| resume_unwind(panic))?;
            let again = (outcome != Outcome::Refused && streams(response.body())).then_some(self.writing);
            return Ok(Ok(Answered { response, again }));
        }
        let (core, again) = (self.writing.core.clone(), self.writing.again());
        let report = self.writing.end().await;
        let mut response = result.unwrap_or_else(|panic| resume_unwind(panic))?;
        Writing::report(&core, &report, response.headers_mut());
        response.extensions_mut().insert(report);
        let again = streams(response.body()).then_some(again);
        Ok(Ok(Answered { response, again }))
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
            Written::Unmapped => Ok(()),
        }
    }

    /// After it: it may have moved a child here, and the response and the handler may say what else has changed.
    async fn add_changed(&mut self, outcome: Outcome, response: Option<&HeaderMap>) {
        let said = self.writing.changes.take();
        if outcome == Outcome::Refused || outcome == Outcome::Done && said.nothing {
            self.writing.cancel().await;
            return self.writing.add_said(&said).await;
        }
        let is_said = said.nothing || !said.is_empty();
        self.writing.add_said(&said).await;
        match &self.written {
            Written::Declared(mutated) => {
                let mutated = mutated.clone();
                self.writing.add(mutated.change()).await;
                if let Some(change) = self.created(&mutated, response) {
                    self.writing.add(&change).await;
                }
                if let (true, Some(headers)) = (mutated.follows_locations(), response) {
                    for change in self.located(headers) {
                        self.writing.add(&change.include(mutated.include())).await;
                    }
                }
            }
            // All of it was known before: no relation follows, whose children might be others now.
            Written::Read(_) => {}
            Written::Unmapped if is_said => {}
            Written::Unmapped => return self.unmapped(outcome).await,
        }
        self.owned().await;
    }

    /// What the creation of an entity drops, which the response's `Location` names, if it does.
    fn created(&self, mutated: &Mutated, response: Option<&HeaderMap>) -> Option<Change> {
        let data_type = mutated.creates()?;
        let path = response.and_then(|headers| self.target.path(headers.get(header::LOCATION)?));
        let located = path.and_then(|path| self.writing.core.routes.locate(&path));
        let created = located.filter(|change| change.entities.iter().any(|(found, _)| found == data_type));
        Some(created.unwrap_or_else(|| Change::all(data_type.clone())).include(mutated.include()))
    }

    /// What the response names on the same host (RFC 9111, section 4.4).
    fn located(&self, headers: &HeaderMap) -> Vec<Change> {
        let named = [header::LOCATION, header::CONTENT_LOCATION].into_iter().flat_map(|name| headers.get_all(name));
        let paths = named.filter_map(|reference| self.target.own_path(reference));
        paths.filter_map(|path| self.writing.core.routes.locate(&path)).collect()
    }

    /// Nobody has said what this changes.
    async fn unmapped(&mut self, outcome: Outcome) {
        let core = self.writing.core.clone();
        match core.options.on_unmapped {
            OnUnmapped::Drop => self.writing.add(&core.everything()).await,
            OnUnmapped::Warn if outcome == Outcome::Done && core.warnings.is_new("unmapped", &self.label()) => {
                tracing::warn!(
                    request = self.label(),
                    "a write that nothing is said of: what it makes stale stays. Declare a mutation, say it with `Changes` \
                     (`nothing`, if so), or choose `on_unmapped`"
                );
            }
            OnUnmapped::Warn | OnUnmapped::Ignore => {}
        }
    }

    /// That it is known whose things have changed.
    async fn owned(&self) {
        let core = &self.writing.core;
        if !self.writing.tenants.is_empty() {
            return;
        }
        let on_unmapped = core.options.on_unmapped;
        if on_unmapped != OnUnmapped::Ignore && core.warnings.is_new("no tenant", &self.label()) {
            tracing::warn!(
                request = self.label(),
                "a write of no tenant, which drops nothing of any: find the tenant as the handler does (`tenant_from`), or \
                 choose `on_unmapped`"
            );
        }
        if on_unmapped == OnUnmapped::Drop && core.engine.clear().await.is_err() {
            tracing::error!("everything was to be dropped, and the store could not be told");
        }
    }

    /// The route, as far as a path tells: ids are left out, so that it is warned of once.
    fn label(&self) -> String {
        let (method, path) = &self.what;
        let is_id = |part: &&str| part.len() > 24 || part.bytes().any(|c| c.is_ascii_digit() || c == b'%');
        let parts: Vec<_> = path.split('/').map(|part| if is_id(&part) { "…" } else { part }).collect();
        format!("{method} {}", parts.join("/"))
    }
}

/// Whether a body may still be followed by what its handler writes.
fn streams(body: &impl Body) -> bool {
    !body.is_end_stream() && body.size_hint().exact().is_none()
}
