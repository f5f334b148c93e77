//! An inner service made of a closure, behind both layers, without a network.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{convert::Infallible, sync::Arc};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use tower::{Layer, Service, ServiceExt, service_fn, util::BoxCloneSyncService};
use tower_cache_aside::{Cache, Invalidated};

pub type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// A service behind the invalidate layer and the cache-aside layer.
#[derive(Clone)]
pub struct Web(BoxCloneSyncService<Request<Full<Bytes>>, Response<Body>, std::io::Error>);

#[derive(Debug, Clone)]
pub struct Reply {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
    pub trailers: Option<HeaderMap>,
    pub report: Option<Invalidated>,
}

impl Reply {
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |v| v.to_str().unwrap())
    }

    /// This cache's `Cache-Status`, without its name and what the inner service answered.
    pub fn cache_status(&self) -> &str {
        let status = self.header("cache-status");
        let status = status.strip_prefix("tower-cache-aside; ").unwrap_or(status);
        status.split("; fwd-status").next().unwrap()
    }

    pub fn is_hit(&self) -> bool {
        self.cache_status().starts_with("hit")
    }
}

pub fn full(text: impl Into<Bytes>) -> Body {
    UnsyncBoxBody::new(Full::new(text.into()).map_err(|never: Infallible| match never {}))
}

/// A `200` with this text.
pub fn ok(text: impl Into<Bytes>) -> Response<Body> {
    Response::new(full(text))
}

impl Web {
    pub fn new<F, Fut>(cache: &Cache, handler: F) -> Self
    where
        F: Fn(Request<Full<Bytes>>) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Response<Body>, std::io::Error>> + Send + 'static,
    {
        let handler = Arc::new(handler);
        Self::around(cache, service_fn(move |request| handler(request)))
    }

    pub fn around<S>(cache: &Cache, inner: S) -> Self
    where
        S: Service<Request<Full<Bytes>>, Response = Response<Body>, Error = std::io::Error>,
        S: Clone + Send + Sync + 'static,
        S::Future: Send,
    {
        Self::of(cache.invalidate_layer().layer(cache.layer().layer(inner)))
    }

    /// What is layered already.
    pub fn of<S, R>(layered: S) -> Self
    where
        S: Service<Request<Full<Bytes>>, Response = Response<R>, Error = std::io::Error>,
        S: Clone + Send + Sync + 'static,
        S::Future: Send,
        R: http_body::Body<Data = Bytes, Error = std::io::Error> + Send + 'static,
    {
        Self(BoxCloneSyncService::new(layered.map_response(|r| r.map(UnsyncBoxBody::new))))
    }

    pub async fn start(&self, request: Request<Full<Bytes>>) -> Result<Response<Body>, std::io::Error> {
        self.0.clone().oneshot(request).await
    }

    pub async fn try_send(&self, request: Request<Full<Bytes>>) -> Result<Reply, std::io::Error> {
        let (mut parts, body) = self.start(request).await?.into_parts();
        let body = body.collect().await?;
        let trailers = body.trailers().cloned();
        let report = parts.extensions.remove();
        Ok(Reply { status: parts.status, headers: parts.headers, body: body.to_bytes(), trailers, report })
    }

    pub async fn send(&self, request: Request<Full<Bytes>>) -> Reply {
        self.try_send(request).await.unwrap()
    }

    pub async fn get(&self, path: &str) -> Reply {
        self.send(request(Method::GET, path)).await
    }

    pub async fn put(&self, path: &str) -> Reply {
        self.send(request(Method::PUT, path)).await
    }
}

pub fn request(method: Method, path: &str) -> Request<Full<Bytes>> {
    with(method, path, &[])
}

pub fn with(method: Method, path: &str, headers: &[(&str, &str)]) -> Request<Full<Bytes>> {
    let mut request = Request::builder().method(method).uri(path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(Full::default()).unwrap()
}
