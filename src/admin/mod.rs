//! A service for those who look after a cache: what it does, why, and what to drop. Without a router or a framework.

mod api;
mod body;
mod explain;
mod query;
mod search;
mod words;

use std::{
    convert::Infallible,
    fmt,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body::Body;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use tokio::sync::Semaphore;
use tower_service::Service;

pub use body::AdminBody;

use crate::{cache::Cache, error::ConfigError};

const PAGE: &str = include_str!("dashboard.html");

/// After so many wrong tokens in so long, somebody guesses: that is said, and each of them told to come back later. The right one
/// is let in all the same, for else guessing would keep it out.
const WRONG: u32 = 20;
const WINDOW: Duration = Duration::from_secs(10);

/// So many may listen to what happens at a time.
const LISTENERS: usize = 32;

/// Who may look after a cache, and how far.
///
/// ```
/// # use tower_cache_aside::{Admin, Cache};
/// # fn main() -> Result<(), tower_cache_aside::ConfigError> {
/// # let cache = Cache::builder("docs").build()?;
/// // axum: Router::new().nest_service("/_cache", service)
/// let service = cache.admin(Admin::bearer("a long secret")?);
/// # Ok(()) }
/// ```
#[must_use]
pub struct Admin {
    /// Its hash, so that comparing tells nothing of its length either.
    token: [u8; 32],
    read_only: bool,
}

impl Admin {
    /// Everybody who has this token (RFC 6750): make it long, and keep it out of the code. Space around it does not count.
    ///
    /// # Errors
    /// It is empty, as of a variable that is not set.
    pub fn bearer(token: impl AsRef<[u8]>) -> Result<Self, ConfigError> {
        match token.as_ref().trim_ascii() {
            [] => Err(ConfigError::new("the admin's token is empty, and would let everybody in; set one that is long")),
            token => Ok(Self { token: Sha256::digest(token).into(), read_only: false }),
        }
    }

    /// They may look, and drop nothing.
    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }
}

impl fmt::Debug for Admin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admin").field("read_only", &self.read_only).finish_non_exhaustive()
    }
}

impl Cache {
    /// A service for those who look after this cache: a page at `/`, and what it is made of under `/api`, below whatever prefix it
    /// is mounted at. (Feature `admin`; `docs/operations.md` has it all.)
    pub fn admin(&self, admin: Admin) -> AdminService {
        self.keep();
        self.0.observer.recent.watch();
        let gate =
            Gate { admin, wrong: Mutex::new((Instant::now(), 0)), listeners: Arc::new(Semaphore::new(LISTENERS)) };
        AdminService { cache: self.clone(), gate: Arc::new(gate) }
    }
}

/// Answers those who look after a cache; made by [`Cache::admin`](crate::Cache::admin).
#[derive(Clone)]
pub struct AdminService {
    cache: Cache,
    gate: Arc<Gate>,
}

impl fmt::Debug for AdminService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AdminService").field("admin", &self.gate.admin).finish_non_exhaustive()
    }
}

struct Gate {
    admin: Admin,
    /// Since when, and how many wrong tokens.
    wrong: Mutex<(Instant, u32)>,
    listeners: Arc<Semaphore>,
}

impl Gate {
    /// Whether a request may come in; else why not.
    fn admits<B>(&self, request: &Request<B>) -> Result<(), StatusCode> {
        let mut lines = request.headers().get_all(header::AUTHORIZATION).iter();
        let (Some(line), None) = (lines.next(), lines.next()) else { return Err(StatusCode::UNAUTHORIZED) };
        let scheme = line.as_bytes().get(..7).filter(|scheme| scheme.eq_ignore_ascii_case(b"bearer "));
        let token = scheme.and_then(|_| line.as_bytes().get(7..)).ok_or(StatusCode::UNAUTHORIZED)?;
        let is_right: bool = Sha256::digest(token.trim_ascii()).as_slice().ct_eq(&self.admin.token).into();
        if is_right {
            return Ok(());
        }
        let mut wrong = self.wrong.lock().unwrap_or_else(PoisonError::into_inner);
        if wrong.0.elapsed() > WINDOW {
            *wrong = (Instant::now(), 0);
        }
        wrong.1 = wrong.1.saturating_add(1);
        if wrong.1 == WRONG + 1 {
            tracing::warn!("many wrong tokens for the admin's API: somebody guesses");
        }
        Err(if wrong.1 > WRONG { StatusCode::TOO_MANY_REQUESTS } else { StatusCode::UNAUTHORIZED })
    }
}

impl<B> Service<Request<B>> for AdminService
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Send,
{
    type Response = Response<AdminBody>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<AdminBody>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let this = self.clone();
        Box::pin(async move { Ok(this.answer(request).await) })
    }
}

impl AdminService {
    async fn answer<B>(self, request: Request<B>) -> Response<AdminBody>
    where
        B: Body<Data = Bytes> + Send,
    {
        let path = request.uri().path().to_owned();
        let Some((_, name)) = path.rsplit_once("/api/") else { return page(&path) };
        match self.gate.admits(&request) {
            Ok(()) => hardened(self.api(name, request).await),
            Err(status) => {
                let mut response = Response::new(AdminBody::empty());
                *response.status_mut() = status;
                let (name, value) = match status {
                    StatusCode::UNAUTHORIZED => (header::WWW_AUTHENTICATE, "Bearer"),
                    _ => (header::RETRY_AFTER, "10"),
                };
                response.headers_mut().insert(name, HeaderValue::from_static(value));
                hardened(response)
            }
        }
    }
}

/// The page, which needs no token, for it shows nothing before it has one.
fn page(path: &str) -> Response<AdminBody> {
    // Mounted somewhere, `/_cache` is it as well as `/_cache/`.
    if path.rsplit('/').next().is_some_and(|last| last.contains('.')) {
        return api::failed(StatusCode::NOT_FOUND, "there is no such thing here");
    }
    let nonce = format!("{:032x}", rand::random::<u128>());
    let mut response = Response::new(AdminBody::full(PAGE.replace("{{nonce}}", &nonce)));
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    let html = HeaderValue::from_static("text/html; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, html);
    if let Ok(policy) = HeaderValue::try_from(policy) {
        response.headers_mut().insert(header::CONTENT_SECURITY_POLICY, policy);
    }
    hardened(response)
}

/// Nobody is to keep, sniff or frame it.
fn hardened(mut response: Response<AdminBody>) -> Response<AdminBody> {
    for (name, value) in [
        (header::CACHE_CONTROL, "no-store"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_FRAME_OPTIONS, "DENY"),
    ] {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}
