//! Requests at random, of the routes that a cache knows and of others.

use std::{collections::BTreeMap, fmt, sync::Arc};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Request, header};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use rand::{RngExt, SeedableRng, rngs::SmallRng};

use super::request::ReadOnly;
use crate::{
    cache::Cache,
    route::{Query, TenantSource},
};

/// What need not be escaped (RFC 3986, section 2.3).
const ESCAPED: AsciiSet = NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

type MakeBody = Arc<dyn Fn(u32) -> Bytes + Send + Sync>;

/// Makes requests of what the mapping of a cache declares: reads of its routes, the writes that it knows, and, now and then, unsafe
/// methods at its paths that it does not know. The same seed makes the same requests.
///
/// What the mapping does not name, a request cannot have: say which headers handlers look at ([`header`](Self::header)), which
/// writes there are besides ([`route`](Self::route)), and what writes carry ([`body`](Self::body)). Ids, tenants and
/// values are few, so that requests meet; ids come in several spellings.
#[derive(Clone)]
pub struct Requests {
    reads: Vec<Shape>,
    writes: Vec<Shape>,
    tenant: Option<HeaderName>,
    tenants: Vec<String>,
    ids: BTreeMap<String, Vec<String>>,
    headers: Vec<(HeaderName, Vec<HeaderValue>)>,
    query: Vec<Parameter>,
    bodies: Vec<(Method, String, MakeBody)>,
}

/// A parameter of the query that the route of this path takes.
#[derive(Clone)]
struct Parameter {
    path: String,
    name: String,
    values: Vec<String>,
}

/// Requests of one route.
#[derive(Clone, Debug)]
struct Shape {
    method: Method,
    path: String,
    /// Parameters of the query.
    query: Vec<String>,
    vary: Vec<HeaderName>,
}

impl Shape {
    fn new(method: Method, path: impl Into<String>) -> Self {
        Self { method, path: path.into(), query: vec![], vary: vec![] }
    }
}

impl Requests {
    /// Of the routes and mutations of this cache. (Methods of gRPC are none of them.)
    pub fn of(cache: &Cache) -> Self {
        let core = &cache.0;
        let declared = &core.routes.declared;
        let reads = declared.reads.iter().map(|route| {
            let query = match route.query() {
                Query::Only(names) => names.clone(),
                Query::All | Query::Exact | Query::Ignore => vec![],
            };
            Shape { query, vary: route.vary.clone(), ..Shape::new(route.method().clone(), route.path()) }
        });
        let writes = declared.mutations.iter().flat_map(|mutation| {
            let own = mutation.method.clone();
            let methods = if own.as_str() == "*" { UNSAFE.to_vec() } else { vec![own] };
            methods.into_iter().map(|method| Shape::new(method, mutation.path()))
        });
        let tenant = match &core.tenants {
            TenantSource::Header(name) => Some(name.clone()),
            TenantSource::Extractor(_) | TenantSource::Single(_) | TenantSource::ByHand => None,
        };
        Self {
            reads: reads.collect(),
            writes: writes.collect(),
            tenant,
            tenants: strings(["acme", "globex"]),
            ids: BTreeMap::new(),
            headers: vec![(header::ACCEPT_LANGUAGE, ["en", "de"].map(HeaderValue::from_static).into())],
            query: vec![],
            bodies: vec![],
        }
    }

    /// The tenants, where a header names them; by default `acme` and `globex`. (Where something else does, say it with
    /// [`header`](Self::header).)
    #[must_use]
    pub fn tenants<T: Into<String>>(mut self, names: impl IntoIterator<Item = T>) -> Self {
        self.tenants = strings(names);
        self
    }

    /// The ids that a parameter of a path takes; by default `1` and `2`.
    #[must_use]
    pub fn ids<T: Into<String>>(mut self, param: impl Into<String>, ids: impl IntoIterator<Item = T>) -> Self {
        self.ids.insert(param.into(), strings(ids));
        self
    }

    /// A header that some requests have, with one of these values. By default there is `accept-language`, `en` or `de`.
    #[must_use]
    pub fn header(mut self, name: HeaderName, values: impl IntoIterator<Item = HeaderValue>) -> Self {
        self.headers.retain(|(own, _)| *own != name);
        self.headers.push((name, values.into_iter().collect()));
        self
    }

    /// A parameter that the query of some reads of this route has, with one of these values. (Those that the mapping names are
    /// there by themselves, as `1`.)
    #[must_use]
    pub fn query<T: Into<String>>(
        mut self,
        path: impl Into<String>,
        name: impl Into<String>,
        values: impl IntoIterator<Item = T>,
    ) -> Self {
        self.query.push(Parameter { path: path.into(), name: name.into(), values: strings(values) });
        self
    }

    /// A route of the service that the mapping does not know, such as a write that it should.
    #[must_use]
    pub fn route(mut self, method: Method, path: impl Into<String>) -> Self {
        let path = path.into();
        let shape = Shape::new(method, if path.starts_with('/') { path } else { format!("/{path}") });
        if shape.method.is_safe() {
            self.reads.push(shape)
        } else {
            self.writes.push(shape)
        }
        self
    }

    /// What requests of a route carry, made of a number that is another one each time; by default `{}`. (A read
    /// [by its body](crate::Route::method) as well.)
    #[must_use]
    pub fn body<T: Into<Bytes>>(
        mut self,
        method: Method,
        path: impl Into<String>,
        make: impl Fn(u32) -> T + Send + Sync + 'static,
    ) -> Self {
        self.bodies.push((method, path.into(), Arc::new(move |n| make(n).into())));
        self
    }

    /// So many requests, the same for the same seed.
    pub fn generate(&self, seed: u64, count: usize) -> Vec<Request<Bytes>> {
        let rng = &mut SmallRng::seed_from_u64(seed);
        let (mut requests, mut reads) = (Vec::with_capacity(count), vec![]);
        for _ in 0..count {
            // What was read before is read again: that is what caches are for, and where they are wrong.
            let request = match rng.random_range(0..20) {
                0 => self.unknown(rng),
                1..6 => pick(rng, &self.writes).and_then(|shape| self.write(shape, rng)),
                6..14 => pick(rng, &reads).map(|at: &usize| Request::clone(&requests[*at])),
                _ => None,
            };
            let request = request.or_else(|| self.read(pick(rng, &self.reads)?, rng));
            let is_read = request.as_ref().is_some_and(|request| request.extensions().get::<ReadOnly>().is_some());
            reads.extend(is_read.then_some(requests.len()));
            requests.extend(request);
        }
        requests
    }

    /// An unsafe method at a path that the mapping knows by others.
    fn unknown(&self, rng: &mut SmallRng) -> Option<Request<Bytes>> {
        let known = if rng.random() { &self.reads } else { &self.writes };
        let (shape, method) = (pick(rng, known)?, pick(rng, &UNSAFE)?.clone());
        let is_read = self.reads.iter().any(|read| read.path == shape.path && read.method == method);
        if is_read { None } else { self.write(&Shape { method, ..shape.clone() }, rng) }
    }

    fn read(&self, shape: &Shape, rng: &mut SmallRng) -> Option<Request<Bytes>> {
        let mut uri = self.path(&shape.path, rng);
        let mut between = '?';
        let said = self.query.iter().filter(|own| own.path == shape.path);
        let known = shape.query.iter().filter(|name| !said.clone().any(|own| own.name == **name));
        let said = said.clone().map(|own| (&own.name, &own.values[..]));
        for (name, values) in said.chain(known.map(|name| (name, &[][..]))) {
            if rng.random_bool(0.4) {
                let value = pick(rng, values).map_or("1", String::as_str);
                let [name, value] = [name, value].map(|text| utf8_percent_encode(text, &ESCAPED));
                uri.push_str(&format!("{between}{name}={value}"));
                between = '&';
            }
        }
        let is_get = shape.method == Method::GET;
        let method = if is_get && rng.random_bool(0.05) { Method::HEAD } else { shape.method.clone() };
        let body = if is_get { Bytes::new() } else { self.body_of(shape, rng) };
        let mut request = self.with_headers(Request::builder().method(method).uri(uri), &shape.vary, body, rng)?;
        request.extensions_mut().insert(ReadOnly);
        Some(request)
    }

    fn write(&self, shape: &Shape, rng: &mut SmallRng) -> Option<Request<Bytes>> {
        let builder = Request::builder().method(&shape.method).uri(self.path(&shape.path, rng));
        let body = if shape.method == Method::DELETE { Bytes::new() } else { self.body_of(shape, rng) };
        self.with_headers(builder, &[], body, rng)
    }

    fn with_headers(
        &self,
        mut builder: http::request::Builder,
        vary: &[HeaderName],
        body: Bytes,
        rng: &mut SmallRng,
    ) -> Option<Request<Bytes>> {
        if let (Some(name), Some(tenant)) = (&self.tenant, pick(rng, &self.tenants)) {
            let escaped = || utf8_percent_encode(tenant, &ESCAPED).to_string();
            builder = match HeaderValue::try_from(tenant) {
                Ok(tenant) => builder.header(name, tenant),
                Err(_) => builder.header(name, escaped()),
            };
        }
        let own = vary.iter().filter(|name| !self.headers.iter().any(|(known, _)| known == *name));
        let own: Vec<_> = own.map(|name| (name.clone(), ["1", "2"].map(HeaderValue::from_static).into())).collect();
        for (name, values) in self.headers.iter().chain(&own).filter(|(name, _)| Some(name) != self.tenant.as_ref()) {
            if let Some(value) = pick(rng, values).filter(|_| rng.random_bool(0.7)) {
                builder = builder.header(name, value);
            }
        }
        if body.starts_with(b"{") || body.starts_with(b"[") {
            builder = builder.header(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        }
        builder.body(body).ok()
    }

    fn body_of(&self, shape: &Shape, rng: &mut SmallRng) -> Bytes {
        let own = self.bodies.iter().rfind(|(method, path, _)| *method == shape.method && *path == shape.path);
        own.map_or(Bytes::from_static(b"{}"), |(.., make)| make(rng.random()))
    }

    /// A path of this pattern.
    fn path(&self, pattern: &str, rng: &mut SmallRng) -> String {
        let (mut path, mut rest) = (String::new(), pattern);
        while let Some((before, after)) = rest.split_once('{') {
            path.push_str(before);
            let Some((name, after)) = after.split_once('}') else { break };
            let name = name.trim_start_matches('*');
            let id = match self.ids.get(name) {
                Some(ids) => pick(rng, ids).map_or("", String::as_str),
                None if rng.random() => "1",
                None => "2",
            };
            path.push_str(&spelled(id, rng));
            rest = after;
        }
        path + rest
    }
}

const UNSAFE: [Method; 4] = [Method::PUT, Method::POST, Method::PATCH, Method::DELETE];

/// An id in one of its spellings: escaped without need, with zeros before it, in capitals. Where handlers take these for the same,
/// the mapping must as well ([`Canonical`](crate::Canonical)).
fn spelled(id: &str, rng: &mut SmallRng) -> String {
    let escape = |id: &str| utf8_percent_encode(id, &ESCAPED).to_string();
    match rng.random_range(0..20) {
        0 => id.bytes().map(|byte| format!("%{byte:02X}")).collect(),
        1 if !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_digit()) => format!("0{id}"),
        1 => escape(&id.to_uppercase()),
        _ => escape(id),
    }
}

fn pick<'a, T>(rng: &mut SmallRng, all: &'a [T]) -> Option<&'a T> {
    if all.is_empty() { None } else { all.get(rng.random_range(0..all.len())) }
}

fn strings<T: Into<String>>(all: impl IntoIterator<Item = T>) -> Vec<String> {
    all.into_iter().map(Into::into).collect()
}

impl fmt::Debug for Requests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Requests").field("reads", &self.reads).field("writes", &self.writes).finish_non_exhaustive()
    }
}
