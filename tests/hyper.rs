//! `hyper_proxy` as a real process in front of a real origin: HTTP/1.1 and HTTP/2, bodies of every kind, and what is not
//! the cache's to touch.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    convert::Infallible,
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, Empty, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use support::example;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

type Body = UnsyncBoxBody<Bytes, Infallible>;

const MEGABYTE: usize = 1 << 20;

struct Proxy {
    child: Child,
    url: String,
    calls: Arc<AtomicU64>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Proxy {
    async fn start(args: &[&str]) -> Self {
        let calls = Arc::new(AtomicU64::new(0));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let upstream = format!("http://{}", listener.local_addr().unwrap());
        let counted = calls.clone();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let calls = counted.clone();
                let service = service_fn(move |request: Request<Incoming>| {
                    let n = calls.fetch_add(1, Ordering::SeqCst);
                    async move { Ok::<_, Infallible>(origin(request, n).await) }
                });
                let server = hyper::server::conn::http1::Builder::new();
                tokio::spawn(server.serve_connection(TokioIo::new(stream), service).with_upgrades());
            }
        });
        let mut child = Command::new(example("hyper_proxy"))
            .args(["--upstream", &upstream, "--listen", "127.0.0.1:0", "--preset", "rfc"])
            .args(args)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let url = line.trim().strip_prefix("listening on ").expect("the first line names the address").to_owned();
        Self { child, url, calls }
    }

    fn calls(&self) -> u64 {
        self.calls.load(Ordering::SeqCst)
    }

    /// The most memory it has ever had, in bytes.
    fn peak(&self) -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1_024
    }
}

fn full(text: impl Into<Bytes>) -> Body {
    UnsyncBoxBody::new(Full::new(text.into()))
}

/// Answers with a number that grows with each call, in the way the path asks for.
async fn origin(request: Request<Incoming>, n: u64) -> Response<Body> {
    let path = request.uri().path().to_owned();
    let response = Response::builder().header("cache-control", "max-age=60").header("x-two", "1").header("x-two", "2");
    match path.as_str() {
        "/chunked" => {
            let parts = ["some ", "more ", "pieces"].map(|part| Ok(Frame::data(Bytes::from(part))));
            response.body(UnsyncBoxBody::new(StreamBody::new(futures_util::stream::iter(parts)))).unwrap()
        }
        "/large" => {
            let megabytes = (0..100).map(|_| Ok(Frame::data(Bytes::from(vec![b'x'; MEGABYTE]))));
            response.body(UnsyncBoxBody::new(StreamBody::new(futures_util::stream::iter(megabytes)))).unwrap()
        }
        "/upgrade" => {
            tokio::spawn(async move {
                let mut stream = TokioIo::new(hyper::upgrade::on(request).await.unwrap());
                let mut word = [0; 4];
                stream.read_exact(&mut word).await.unwrap();
                stream.write_all(&word).await.unwrap();
            });
            let response = response.status(101).header("connection", "upgrade").header("upgrade", "echo");
            response.body(full("")).unwrap()
        }
        "/headers" => {
            let names: Vec<_> = request.headers().keys().map(http::HeaderName::as_str).collect();
            Response::new(full(names.join(" ")))
        }
        "/language" => {
            let language = request.headers().get("accept-language").map_or("none", |v| v.to_str().unwrap()).to_owned();
            response.header("vary", "accept-language").body(full(language)).unwrap()
        }
        "/odd" => response.status(299).body(full(n.to_string())).unwrap(),
        "/echo" => {
            let body = request.into_body().collect().await.unwrap().to_bytes();
            Response::new(full(body.len().to_string()))
        }
        _ => response.body(full(n.to_string())).unwrap(),
    }
}

struct Reply {
    status: StatusCode,
    cache_status: String,
    headers: http::HeaderMap,
    body: Bytes,
}

async fn send(client: &Client<HttpConnector, Full<Bytes>>, method: Method, url: String) -> Reply {
    let request = Request::builder().method(method).uri(url).body(Full::default()).unwrap();
    let (parts, body) = client.request(request).await.unwrap().into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    let cache_status = parts.headers.get("cache-status").map_or("", |v| v.to_str().unwrap()).to_owned();
    Reply { status: parts.status, cache_status, headers: parts.headers, body }
}

#[tokio::test(flavor = "multi_thread")]
async fn both_protocols_and_both_framings_hit() {
    for http2 in [false, true] {
        let proxy = Proxy::start(&[]).await;
        let client = Client::builder(TokioExecutor::new()).http2_only(http2).build_http();
        for path in ["/plain", "/chunked", "/odd"] {
            let url = format!("{}{path}", proxy.url);
            let miss = send(&client, Method::GET, url.clone()).await;
            let hit = send(&client, Method::GET, url.clone()).await;
            assert!(hit.cache_status.contains("; hit"), "{path}: {}", hit.cache_status);
            assert_eq!((hit.status, &hit.body), (miss.status, &miss.body), "{path}");
            assert_eq!(hit.headers.get_all("x-two").iter().collect::<Vec<_>>(), ["1", "2"]);
            assert_eq!(hit.headers["date"], miss.headers["date"]);
            let head = send(&client, Method::HEAD, url).await;
            assert!(head.cache_status.contains("; hit") && head.body.is_empty());
            assert_eq!(head.headers["content-length"], miss.body.len().to_string());
        }
        assert_eq!(proxy.calls(), 3);
    }
}

/// RFC 9111, section 4.4, and what is not cached at all.
#[tokio::test(flavor = "multi_thread")]
async fn unsafe_methods_and_excluded_paths_go_through() {
    let proxy = Proxy::start(&["--uncached", "/live"]).await;
    let client = Client::builder(TokioExecutor::new()).build_http();
    let get = async |path: &str| send(&client, Method::GET, format!("{}{path}", proxy.url)).await;
    for path in ["/", "/a?x=1", "/a?x=2"] {
        assert!(!get(path).await.cache_status.contains("hit"));
        assert!(get(path).await.cache_status.contains("hit"), "{path}");
    }
    let calls = proxy.calls();
    for n in 1..=2 {
        assert_eq!(get("/live/x").await.cache_status, "");
        assert_eq!(proxy.calls(), calls + n);
    }
    send(&client, Method::DELETE, format!("{}/a", proxy.url)).await;
    assert!(!get("/a?x=1").await.cache_status.contains("hit"));
    assert!(get("/").await.cache_status.contains("hit"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_megabytes_pass_in_bounded_memory() {
    let proxy = Proxy::start(&[]).await;
    let client: Client<HttpConnector, Empty<Bytes>> = Client::builder(TokioExecutor::new()).build_http();
    for _ in 0..2 {
        let response = client.get(format!("{}/large", proxy.url).parse().unwrap()).await.unwrap();
        let mut body = response.into_body();
        let mut size = 0;
        while let Some(frame) = body.frame().await {
            size += frame.unwrap().data_ref().map_or(0, Bytes::len);
        }
        assert_eq!(size, 100 * MEGABYTE);
    }
    assert!(proxy.peak() < 60 * MEGABYTE, "{} bytes", proxy.peak());
    assert_eq!(proxy.calls(), 2, "too large to be stored");
}

#[tokio::test(flavor = "multi_thread")]
async fn request_bodies_reach_the_origin() {
    let proxy = Proxy::start(&[]).await;
    let client = Client::builder(TokioExecutor::new()).build_http();
    let body = Full::new(Bytes::from(vec![b'x'; 3 * MEGABYTE]));
    let request = Request::post(format!("{}/echo", proxy.url)).body(body).unwrap();
    let body = client.request(request).await.unwrap().into_body().collect().await.unwrap().to_bytes();
    assert_eq!(body, (3 * MEGABYTE).to_string());
}

/// A request to upgrade passes the layers untouched: what comes after it is no HTTP.
#[tokio::test]
async fn an_upgrade_is_not_the_caches() {
    use tower::Layer;
    let cache = tower_cache_aside::Cache::builder("test")
        .single_tenant("t")
        .data_type(tower_cache_aside::DataType::new("page", tower_cache_aside::Ttl::Short))
        .route(tower_cache_aside::Route::new("/{page_id}", "page"))
        .build()
        .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let inner = tower::service_fn(|request| async { Ok::<_, Infallible>(origin(request, 0).await) });
        let service = cache.invalidate_layer().layer(cache.layer().layer(inner));
        let service = hyper_util::service::TowerToHyperService::new(service);
        let server = auto::Builder::new(TokioExecutor::new());
        server.serve_connection_with_upgrades(TokioIo::new(stream), service).await.unwrap();
    });
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream
        .write_all(b"GET /upgrade HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n")
        .await
        .unwrap();
    let mut head = vec![];
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    let head = String::from_utf8(head).unwrap();
    assert!(head.starts_with("HTTP/1.1 101") && head.contains("fwd=bypass; detail=upgrade"), "{head}");
    stream.write_all(b"ping").await.unwrap();
    let mut word = [0; 4];
    tokio::time::timeout(Duration::from_secs(5), stream.read_exact(&mut word)).await.unwrap().unwrap();
    assert_eq!(&word, b"ping");
}

#[test]
fn mistakes_on_the_command_line_are_one_clear_line() {
    for (args, says) in [
        (&[][..], "--upstream"),
        (&["--upstream", "ftp://x"], "--upstream"),
        (&["--upstream", "http://127.0.0.1:1", "--preset", "browser"], "--preset"),
        (&["--upstream", "http://127.0.0.1:1", "--listen", "nowhere"], "--listen"),
        (&["--upstream", "http://127.0.0.1:1", "--uncached", "live"], "--uncached"),
        (&["--nonsense", "x"], "--nonsense"),
    ] {
        let output = Command::new(example("hyper_proxy")).args(args).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), stderr.trim_end().lines().count()), (Some(2), 1), "{args:?}: {stderr}");
        assert!(stderr.contains(says), "{args:?}: {stderr}");
    }
}

/// What is for the next hop alone, or for this proxy, the origin does not get (RFC 9110, sections 7.6.1 and 11.7.1).
#[tokio::test]
async fn what_is_for_the_proxy_is_not_passed_on() {
    let proxy = Proxy::start(&[]).await;
    let address = proxy.url.trim_start_matches("http://").to_owned();
    let mut stream = TcpStream::connect(&address).await.unwrap();
    let request = format!(
        "GET /headers HTTP/1.1\r\nHost: {address}\r\nConnection: close, X-Secret, keep-alive\r\nX-Secret: 1\r\nX-Open: 1\r\n\
         Proxy-Authorization: Basic eDp5\r\nKeep-Alive: 5\r\nTE: trailers\r\nProxy-Connection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, names) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    assert!(names.contains("x-open"), "{names}");
    for hop in ["x-secret", "proxy-authorization", "keep-alive", "te ", "proxy-connection", "connection"] {
        assert!(!names.contains(hop), "{hop}: {names}");
    }
}

/// What the origin does not get, its response does not depend on: nobody can store it for others.
#[tokio::test]
async fn a_variant_is_of_what_the_origin_has_seen() {
    let proxy = Proxy::start(&[]).await;
    let address = proxy.url.trim_start_matches("http://").to_owned();
    for (connection, language) in [("close, accept-language", "none"), ("close", "de"), ("close", "de")] {
        let mut stream = TcpStream::connect(&address).await.unwrap();
        let request = format!(
            "GET /language HTTP/1.1\r\nHost: {address}\r\nAccept-Language: de\r\nConnection: {connection}\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.ends_with(&format!("\r\n\r\n{language}")), "{answer}");
    }
}
