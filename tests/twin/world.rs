//! What a service is to its twins: rows, what its handlers make of a request, and what the cache is told of them.

use std::{
    fmt, io,
    sync::{Arc, Mutex, MutexGuard},
};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, header, request};
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use rand::{RngExt, rngs::SmallRng};
use tower_cache_aside::CacheBuilder;

pub type Body = UnsyncBoxBody<Bytes, io::Error>;

pub fn full(text: impl Into<Bytes>) -> Body {
    UnsyncBoxBody::new(Full::new(text.into()).map_err(|never| match never {}))
}

/// A generated service. It knows nothing of caches but what it tells them.
pub trait World: Clone + fmt::Debug + Send + Sync + 'static {
    type Rows: Clone + Send + 'static;

    /// As they are at the beginning.
    fn rows(&self) -> Self::Rows;

    /// What the cache is told. Resolvers look into these rows.
    fn mapping(&self, rows: &Shared<Self::Rows>) -> CacheBuilder;

    /// The prefixes under which its router stands, which knows nothing of them.
    fn mounts(&self) -> &'static [&'static str] {
        &[""]
    }

    /// Whether the cache is told of them.
    fn says_mounts(&self) -> bool {
        true
    }

    /// What is answered to what only reads.
    fn read(&self, rows: &Self::Rows, seen: &Seen) -> Option<Said>;

    /// Writes, and says what it has written.
    fn write(&self, rows: &mut Self::Rows, seen: &Seen) -> Said;

    fn any_read(&self, rng: &mut SmallRng) -> Asked;

    fn any_write(&self, rng: &mut SmallRng) -> Asked;
}

/// The rows of one twin, and how often they were written.
pub struct Shared<R>(Arc<Mutex<(R, u64)>>);

impl<R> Clone for Shared<R> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<R> Shared<R> {
    pub fn new(rows: R) -> Self {
        Self(Arc::new(Mutex::new((rows, 0))))
    }

    pub fn lock(&self) -> MutexGuard<'_, (R, u64)> {
        self.0.lock().unwrap()
    }

    pub fn commits(&self) -> u64 {
        self.lock().1
    }
}

/// A request, as its client writes it.
#[derive(Clone, Debug, PartialEq)]
pub struct Asked {
    pub method: Method,
    pub target: String,
    pub headers: Vec<(&'static str, String)>,
    pub body: Bytes,
    /// Of several processes the one that is asked.
    pub via: usize,
}

impl Asked {
    pub fn new(method: Method, target: impl Into<String>) -> Self {
        Self { method, target: target.into(), headers: vec![], body: Bytes::new(), via: 0 }
    }

    pub fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    /// With another value, or without one.
    pub fn but(&self, name: &'static str, value: &str) -> Self {
        let mut other = self.clone();
        other.headers.retain(|(known, _)| *known != name);
        if value.is_empty() { other } else { other.with(name, value) }
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.iter().find(|(known, _)| *known == name).map_or("", |(_, value)| value)
    }

    pub fn is_grpc(&self) -> bool {
        self.header("content-type").starts_with("application/grpc")
    }

    /// A call of gRPC with this message.
    pub fn call(path: impl Into<String>, message: &str) -> Self {
        let call = Self::new(Method::POST, path).with("content-type", "application/grpc");
        Self { body: framed(message.as_bytes()).into(), ..call }
    }

    pub fn request(&self) -> Request<Body> {
        let request = Request::builder().method(self.method.clone()).uri(&self.target);
        let request = self.headers.iter().fold(request, |request, (name, value)| request.header(*name, value));
        request.body(full(self.body.clone())).unwrap()
    }
}

/// A message as gRPC frames it.
pub fn framed(message: &[u8]) -> Vec<u8> {
    let mut framed = vec![0];
    framed.extend_from_slice(&(message.len() as u32).to_be_bytes());
    framed.extend_from_slice(message);
    framed
}

/// A request, as a handler sees it.
pub struct Seen {
    pub method: Method,
    pub mount: &'static str,
    pub path: String,
    pub query: String,
    /// In small letters.
    pub host: String,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Seen {
    pub fn new(mount: &'static str, parts: request::Parts, body: Bytes) -> Self {
        let host = parts.uri.authority().map(|authority| authority.as_str().to_owned());
        let said = parts.headers.get(header::HOST).map(|host| String::from_utf8_lossy(host.as_bytes()).into_owned());
        Self {
            method: parts.method,
            mount,
            path: parts.uri.path().to_owned(),
            query: parts.uri.query().unwrap_or("").to_owned(),
            host: host.or(said).unwrap_or_default().to_lowercase(),
            headers: parts.headers,
            body,
        }
    }

    /// The first line of this name.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    pub fn is_grpc(&self) -> bool {
        self.header("content-type").starts_with("application/grpc")
    }

    /// What a call's only message says.
    pub fn message(&self) -> &str {
        std::str::from_utf8(self.body.get(5..).unwrap_or_default()).unwrap()
    }
}

/// What a handler has to say, before anything goes wrong with saying it.
#[derive(Clone, Debug)]
pub struct Said {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
    /// What it declares: types and ids that it is made of.
    pub depends: Vec<(String, String)>,
    /// What it says to have changed.
    pub changes: Vec<Saying>,
    pub framing: Framing,
    /// It has a strong tag, and knows what to do with one.
    pub has_tag: bool,
    /// It is encoded for those who can decode it.
    pub encodes: bool,
}

/// How a handler says what it has changed.
#[derive(Clone, Debug)]
pub enum Saying {
    ByHandle(String, String),
    ByFunction(String, String),
    Include(String),
}

/// How a body is sent.
#[derive(Clone, Debug, Default)]
pub struct Framing {
    /// In so many pieces; all at once if none.
    pub pieces: usize,
    /// Its length is said, and is so much too large.
    pub length: Option<usize>,
    pub slow: bool,
    pub trailers: bool,
    /// It breaks before its end.
    pub breaks: bool,
    /// Of gRPC: so many messages, and whether there is a status.
    pub messages: usize,
    pub no_status: bool,
}

impl Said {
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self {
            status,
            headers: vec![],
            body: body.into(),
            depends: vec![],
            changes: vec![],
            framing: Framing { messages: 1, ..Framing::default() },
            has_tag: false,
            encodes: false,
        }
    }

    pub fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.retain(|(known, _)| *known != name);
        self.headers.push((name, value.into()));
        self
    }
}

pub fn pick<'a, T>(rng: &mut SmallRng, of: &'a [T]) -> &'a T {
    &of[rng.random_range(0..of.len())]
}

/// A path segment in one of its spellings: what must be escaped is, and sometimes what need not be.
pub fn escaped(text: &str, rng: &mut SmallRng) -> String {
    let more = if rng.random_bool(0.2) { 0.5 } else { 0.0 };
    let escape = |c: u8, rng: &mut SmallRng| match c {
        b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' | b'-' | b';' | b'+' if !rng.random_bool(more) => {
            char::from(c).to_string()
        }
        c if rng.random_bool(0.5) => format!("%{c:02X}"),
        c => format!("%{c:02x}"),
    };
    text.bytes().map(|c| escape(c, rng)).collect()
}
