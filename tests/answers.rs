//! That there is an answer, with the right bytes: nobody waits without a bound, nothing is said that was not counted, and
//! nothing grows without a bound.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/redis.rs"]
mod redis;
#[path = "support/web.rs"]
mod web;

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{StreamExt, future::join_all, stream};
use http::{HeaderMap, Method, Request, Response};
use http_body::{Body as _, Frame};
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
    service::TowerToHyperService,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_cache_aside::{
    Cache, CacheBuilder, Cascade, Coalesce, Codec, Credentials, DataType, EntryBuilder, FoundIn, Handling, Json,
    MessagePack, Outcome, Route, Source, Ttl, depends_on, store::RedisStore,
};
use web::{Body, Reply, Web, full, ok, request, with};

/// Longer than anything here takes, unless it hangs.
const LONG: Duration = Duration::from_secs(20);

fn of(data_type: DataType) -> CacheBuilder {
    Cache::builder("test").single_tenant("t").data_type(data_type).route(Route::new("/pages/{page_id}", "page"))
}

fn pages() -> CacheBuilder {
    of(DataType::new("page", Ttl::Standard))
}

// ---- that there is one -----------------------------------------------------------------------------------------------

/// A call that never comes back is nobody's after a while: those who waited go on alone, and the key is as good as others.
#[tokio::test]
async fn a_call_that_hangs_is_nobodys() {
    let page = DataType::new("page", Ttl::Standard).coalesce_timeout(Duration::from_millis(200));
    is_nobodys(of(page.clone()).build().unwrap()).await;
    let redis = redis::Redis::start(&[]);
    let store = RedisStore::builder([redis.url()]).build().unwrap();
    is_nobodys(of(page.coalesce(Coalesce::Fleet)).store(store).build().unwrap()).await;
}

async fn is_nobodys(cache: Cache) {
    let calls = Arc::new(AtomicU64::new(0));
    let count = calls.clone();
    let web = Web::new(&cache, move |_| {
        let n = count.fetch_add(1, Ordering::SeqCst);
        async move {
            if n == 0 {
                std::future::pending::<()>().await;
            }
            Ok(ok("text"))
        }
    });
    let hangs = tokio::spawn({
        let web = web.clone();
        async move { web.get("/pages/1").await }
    });
    while calls.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    let replies = timeout(LONG, join_all((0..25).map(|_| web.get("/pages/1")))).await.expect("they wait for ever");
    assert!(replies.iter().all(|reply| reply.text() == "text"));
    // None of those calls was anybody else's, and the last of them may not be stored yet.
    let hit = async {
        while !web.get("/pages/1").await.is_hit() {
            tokio::task::yield_now().await;
        }
    };
    timeout(LONG, hit).await.expect("the key is as good as others");
    hangs.abort();

    let hung = Arc::new(AtomicBool::new(true));
    let value = async || {
        let hangs = hung.swap(false, Ordering::SeqCst);
        let fetch = move || async move {
            if hangs {
                std::future::pending::<()>().await;
            }
            Ok::<_, io::Error>(Some(1))
        };
        cache.entry::<u64>("page", "9").fetch(fetch).unwrap().await.unwrap().0
    };
    assert!(timeout(Duration::from_millis(50), value()).await.is_err());
    let values = timeout(LONG, join_all((0..25).map(|_| value()))).await.expect("they wait for ever");
    assert!(values.iter().all(|value| *value == Some(1)));
}

/// A refresh that hangs is no reason to wait when its window is over; and who waits has the patience of who calls.
#[tokio::test]
async fn a_refresh_that_hangs_is_nobodys() {
    let second = Duration::from_secs(1);
    for soft in [false, true] {
        let mut page =
            DataType::new("page", 10 * second).stale_while_revalidate(10 * second).stale_if_error(600 * second);
        page = page.coalesce_timeout(Duration::from_millis(200));
        if soft {
            page = page.coalesce_timeout(600 * second).soft_timeout(Duration::from_millis(50));
        }
        let now = Arc::new(AtomicU64::new(1_000_000));
        let clock = now.clone();
        let cache = of(page)
            .clock(move || std::time::UNIX_EPOCH + Duration::from_millis(clock.load(Ordering::SeqCst)))
            .build()
            .unwrap();
        let calls = Arc::new(AtomicU64::new(0));
        let count = calls.clone();
        let web = Web::new(&cache, move |_| {
            let n = count.fetch_add(1, Ordering::SeqCst);
            async move {
                if n > 0 {
                    std::future::pending::<()>().await;
                }
                Ok(ok("text"))
            }
        });
        web.get("/pages/1").await;
        now.fetch_add(15_000, Ordering::SeqCst);
        assert!(web.get("/pages/1").await.is_hit(), "while it is refreshed");
        while calls.load(Ordering::SeqCst) < 2 {
            tokio::task::yield_now().await;
        }
        now.fetch_add(10_000, Ordering::SeqCst);
        // What is stale answers those who have waited, be it for the call of another or, soon, for their own.
        let waiting = (0..10).map(|_| web.get("/pages/1"));
        let replies = timeout(LONG, join_all(waiting)).await.expect("they wait for ever");
        assert!(replies.iter().all(|reply| reply.text() == "text"));
    }
}

/// What is needed for a response may be that response: the layer twice, a load that needs itself, two that need each other.
#[tokio::test]
async fn nobody_waits_for_themselves() {
    let page = || DataType::new("page", Ttl::Standard).coalesce_timeout(Duration::from_secs(3_600));
    let cache = of(page()).build().unwrap();
    let inner = service_fn(|_: Request<Full<Bytes>>| async { Ok::<_, io::Error>(ok("text")) });
    let twice = Web::of(cache.layer().layer(cache.layer().layer(inner)));
    let reply = timeout(LONG, twice.get("/pages/1")).await.expect("it waits for itself");
    assert_eq!(reply.text(), "text");
    assert!(twice.get("/pages/1").await.header("cache-status").contains("; hit"));

    // What is stale is no answer to who is to replace it, and what it declares is everybody's.
    let now = Arc::new(AtomicU64::new(1_000_000));
    let clock = now.clone();
    let stale = DataType::new("page", Duration::from_secs(10)).stale_if_error(LONG).stale_while_revalidate(LONG);
    let cached = of(stale)
        .data_type(DataType::new("user", Ttl::Standard))
        .clock(move || std::time::UNIX_EPOCH + Duration::from_millis(clock.load(Ordering::SeqCst)))
        .build()
        .unwrap();
    let calls = Arc::new(AtomicU64::new(0));
    let count = calls.clone();
    let inner = service_fn(move |_: Request<Full<Bytes>>| {
        let n = count.fetch_add(1, Ordering::SeqCst);
        async move {
            depends_on("user", 7);
            Ok::<_, io::Error>(ok(n.to_string()))
        }
    });
    let twice = Web::of(cached.layer().layer(cached.layer().layer(inner)));
    assert_eq!(twice.get("/pages/1").await.text(), "0");
    now.fetch_add(11_000, Ordering::SeqCst);
    assert_eq!(twice.get("/pages/1").await.text(), "0");
    while twice.get("/pages/1").await.text() == "0" {
        tokio::task::yield_now().await;
    }
    cached.invalidate("t").mutated("user", "7").run().await.unwrap();
    assert_eq!(twice.get("/pages/1").await.text(), "2");

    // Through the whole service, as a gateway that calls itself.
    let itself: Arc<Mutex<Option<Web>>> = Arc::default();
    let seen = itself.clone();
    let web = Web::new(&cache, move |request| {
        let web = seen.lock().unwrap().clone().filter(|_| !request.headers().contains_key("x-inner"));
        async move {
            match web {
                Some(web) => web.start(with(Method::GET, "/pages/2", &[("x-inner", "1")])).await,
                None => Ok(ok("inner")),
            }
        }
    });
    *itself.lock().unwrap() = Some(web.clone());
    assert_eq!(timeout(LONG, web.get("/pages/2")).await.expect("it waits for itself").text(), "inner");

    // Each begins, and then needs the other.
    let both = Arc::new(tokio::sync::Barrier::new(2));
    let value = |own: &'static str, other: &'static str| {
        let (cache, both) = (cache.clone(), both.clone());
        let fetch = move || async move {
            both.wait().await;
            let plain = || async { Ok::<_, io::Error>(Some(1u64)) };
            let other = cache.entry::<u64>("page", other).fetch(plain).unwrap().await?;
            Ok::<_, io::Error>(other.0.map(|n| n + 1))
        };
        (own, fetch)
    };
    let (a, b) = (value("a", "b"), value("b", "a"));
    let a = cache.entry::<u64>("page", a.0).fetch(a.1).unwrap().into_future();
    let b = cache.entry::<u64>("page", b.0).fetch(b.1).unwrap().into_future();
    let (a, b) = timeout(LONG, futures_util::future::join(a, b)).await.expect("they wait for each other");
    assert!(a.unwrap().0.is_some() && b.unwrap().0.is_some());
}

/// An inner service that says whether it is ready.
#[derive(Clone)]
struct Gate<S> {
    inner: S,
    open: Arc<AtomicBool>,
    fails: bool,
}

impl<S: Service<Request<Full<Bytes>>, Error = io::Error>> Service<Request<Full<Bytes>>> for Gate<S> {
    type Response = S::Response;
    type Error = io::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), io::Error>> {
        match self.open.load(Ordering::SeqCst) {
            true => self.inner.poll_ready(cx),
            false if self.fails => Poll::Ready(Err(io::Error::other("overloaded"))),
            false => Poll::Pending,
        }
    }

    fn call(&mut self, request: Request<Full<Bytes>>) -> S::Future {
        assert!(self.open.load(Ordering::SeqCst), "it was called and not ready");
        self.inner.call(request)
    }
}

/// A hit, and what is served in place of an error, asks nobody whether they are ready.
#[tokio::test]
async fn hits_need_no_ready_service() {
    for fails in [false, true] {
        let now = Arc::new(AtomicU64::new(1_000_000));
        let clock = now.clone();
        let page = DataType::new("page", Duration::from_secs(10)).stale_if_error(Duration::from_secs(600));
        let cache = of(page)
            .clock(move || std::time::UNIX_EPOCH + Duration::from_millis(clock.load(Ordering::SeqCst)))
            .build()
            .unwrap();
        let open = Arc::new(AtomicBool::new(true));
        let inner = service_fn(|_: Request<Full<Bytes>>| async { Ok::<_, io::Error>(ok("text")) });
        let web = Web::around(&cache, Gate { inner, open: open.clone(), fails });
        web.get("/pages/1").await;
        open.store(false, Ordering::SeqCst);
        for _ in 0..2 {
            assert!(
                timeout(LONG, web.get("/pages/1"))
                    .await
                    .expect("it waits for a service that it does not need")
                    .is_hit()
            );
        }
        for (method, path) in [(Method::GET, "/pages/2"), (Method::GET, "/elsewhere"), (Method::POST, "/elsewhere")] {
            let asked = timeout(Duration::from_millis(20), web.try_send(request(method.clone(), path))).await;
            match asked {
                Ok(answered) => assert!(fails && answered.is_err(), "{method} {path}"),
                Err(_) => assert!(!fails, "{method} {path}: it waits for what has failed"),
            }
        }
        if fails {
            now.fetch_add(20_000, Ordering::SeqCst);
            assert_eq!(web.get("/pages/1").await.text(), "text", "what is stale is better than an error");
        }
    }
}

/// A stream of which nobody knows its length reaches each of its readers as it comes, and is called stored by nobody.
#[tokio::test]
async fn a_stream_reaches_all_its_readers() {
    let web = Web::new(&pages().build().unwrap(), |_| async {
        let lines = stream::iter([Ok(Frame::data(Bytes::from("{}\n")))]).chain(stream::pending());
        Ok(Response::builder()
            .header("content-type", "application/x-ndjson")
            .body(UnsyncBoxBody::new(StreamBody::new(lines)))
            .unwrap())
    });
    let reader = async || {
        let response = web.start(request(Method::GET, "/pages/1")).await.unwrap();
        assert!(!response.headers()["cache-status"].to_str().unwrap().contains("stored"));
        let mut body = response.into_body();
        let first = body.frame().await.unwrap().unwrap().into_data().unwrap();
        (first, body)
    };
    let readers =
        timeout(Duration::from_secs(8), join_all([reader(), reader(), reader()])).await.expect("it waits for the end");
    assert!(readers.iter().all(|(first, _)| first == "{}\n"));
}

/// A body that a layer outside has wrapped does not say that it is empty; the request's head does.
#[tokio::test]
async fn a_wrapped_body_is_no_body() {
    let cache = pages().build().unwrap();
    let inner = service_fn(|_: Request<UnsyncBoxBody<Bytes, io::Error>>| async { Ok::<_, io::Error>(ok("text")) });
    let service = cache.layer().layer(inner);
    for (header, expected) in [
        (None, "hit"),
        (Some(("content-length", "0")), "hit"),
        (Some(("content-length", "3")), "detail=request-body"),
        (Some(("transfer-encoding", "chunked")), "detail=request-body"),
    ] {
        let mut last = String::new();
        for _ in 0..2 {
            let body = UnsyncBoxBody::new(StreamBody::new(stream::empty::<io::Result<Frame<Bytes>>>()));
            assert!(!body.is_end_stream());
            let mut request = Request::get("/pages/1");
            if let Some((name, value)) = header {
                request = request.header(name, value);
            }
            let response = service.clone().oneshot(request.body(body).unwrap()).await.unwrap();
            last = response.headers()["cache-status"].to_str().unwrap().to_owned();
        }
        assert!(last.contains(expected), "{header:?}: {last}");
    }
}

// ---- with the right bytes --------------------------------------------------------------------------------------------

/// Serves over real connections, of either version.
async fn serve<S, R>(service: S) -> std::net::SocketAddr
where
    S: Service<Request<hyper::body::Incoming>, Response = Response<R>, Error = io::Error>
        + Clone
        + Send
        + Sync
        + 'static,
    S::Future: Send,
    R: http_body::Body<Data = Bytes, Error = io::Error> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let stream = TokioIo::new(listener.accept().await.unwrap().0);
            let service = TowerToHyperService::new(service.clone());
            tokio::spawn(
                async move { auto::Builder::new(TokioExecutor::new()).serve_connection(stream, service).await },
            );
        }
    });
    address
}

/// All that a connection answers to these requests, sent at once.
async fn raw(address: std::net::SocketAddr, requests: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(requests.as_bytes()).await.unwrap();
    let mut answer = vec![];
    let _ = timeout(LONG, stream.read_to_end(&mut answer)).await.expect("the connection stays open");
    String::from_utf8(answer).unwrap()
}

/// A length that is not so is what it would be without the cache, never stored, and puts no connection out of step.
#[tokio::test]
async fn a_length_that_is_wrong_is_not_passed_on_as_right() {
    for (said, sent) in [("10", "12345"), ("3", "12345"), ("x", "12345")] {
        for streams in [false, true] {
            let answers = move |_: Request<hyper::body::Incoming>| async move {
                let pieces = stream::iter([Ok::<_, io::Error>(Frame::data(Bytes::from(sent)))]);
                let body = if streams {
                    let slow = stream::once(async { tokio::time::sleep(Duration::from_millis(5)).await });
                    Body::new(StreamBody::new(
                        slow.flat_map(move |()| stream::iter([Ok(Frame::data(Bytes::from(sent)))])),
                    ))
                } else {
                    Body::new(StreamBody::new(pieces))
                };
                Ok::<_, io::Error>(Response::builder().header("content-length", said).body(body).unwrap())
            };
            let cache = pages().build().unwrap();
            let alone = serve(service_fn(answers)).await;
            let cached = serve(cache.layer().layer(service_fn(answers))).await;
            let two =
                "GET /pages/1 HTTP/1.1\r\nhost: x\r\n\r\nGET /pages/1 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
            for _ in 0..2 {
                let (expected, found) = (raw(alone, two).await, raw(cached, two).await);
                // How much of what is broken is flushed, nobody promises.
                let bytes = |answer: &str| {
                    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
                    let is_whole = head.contains(&format!("content-length: {}", body.len()));
                    (is_whole, if is_whole { body.to_owned() } else { String::new() })
                };
                assert_eq!(bytes(&found), bytes(&expected), "{said} {sent} {streams}: {found}");
                let count = |answer: &str| answer.matches("HTTP/1.1 ").count().max(1);
                assert_eq!(count(&found), count(&expected), "what is too much is no response: {found}");
                assert!(!found.contains("; hit") && !found.contains("stored"), "{found}");
            }
        }
    }
}

/// Where nothing is stored, conditions count all the same.
#[tokio::test]
async fn conditions_count_where_nothing_is_stored() {
    let seen = Arc::new(AtomicU64::new(0));
    let count = seen.clone();
    let web = Web::new(&pages().build().unwrap(), move |request| {
        let knows = request.headers().contains_key("if-none-match");
        count.fetch_add(u64::from(knows), Ordering::SeqCst);
        async move {
            let response = Response::builder().header("cache-control", "private").header("etag", "\"1\"");
            Ok(response.status(if knows { 304 } else { 200 }).body(full(if knows { "" } else { "text" })).unwrap())
        }
    });
    let ask = async |tag: &str| web.send(with(Method::GET, "/pages/1", &[("if-none-match", tag)])).await;
    // The first is asked for all of it, for it might be stored; once it is known not to be, the handler answers.
    for handled in [0, 1, 2] {
        let reply = ask("\"1\"").await;
        assert_eq!((reply.status.as_u16(), reply.body.len()), (304, 0));
        assert_eq!(seen.load(Ordering::SeqCst), handled);
    }
    assert_eq!(web.get("/pages/1").await.text(), "text");
}

/// Two versions of one second have the same date: what was made in that second proves nothing.
#[tokio::test]
async fn a_date_proves_nothing_within_its_second() {
    let modified: u64 = 1_000_000_000;
    // (when it is asked, how long the handler takes, when a client comes back)
    for (made, takes, later, status) in [
        (0, 0, 0, 200),
        // Of one whose clock is ahead.
        (-5_000, 0, 0, 200),
        (999, 0, 0, 200),
        (900, 200, 0, 200),
        (500, 0, 3_000, 200),
        (1_000, 0, 0, 304),
        (60_000, 0, 3_000, 304),
    ] {
        let now = Arc::new(AtomicU64::new((modified * 1_000).saturating_add_signed(made)));
        let (time, own) = (now.clone(), now.clone());
        let clock = move || std::time::UNIX_EPOCH + Duration::from_millis(time.load(Ordering::SeqCst));
        let web = Web::new(&pages().clock(clock).build().unwrap(), move |_| {
            own.fetch_add(takes, Ordering::SeqCst);
            async move {
                let date = httpdate::fmt_http_date(std::time::UNIX_EPOCH + Duration::from_secs(modified));
                Ok(Response::builder().header("last-modified", date).body(full("text")).unwrap())
            }
        });
        let date = httpdate::fmt_http_date(std::time::UNIX_EPOCH + Duration::from_secs(modified));
        let first = web.get("/pages/1").await;
        assert_eq!(first.header("last-modified") == date, made >= 1_000, "nobody is to come back with it");
        now.fetch_add(later, Ordering::SeqCst);
        let reply = web.send(with(Method::GET, "/pages/1", &[("if-modified-since", &date)])).await;
        assert_eq!(reply.status, status, "{made}");
    }
}

/// How long the origin took is a part of the age (RFC 9111, section 4.2.3).
#[tokio::test]
async fn a_response_is_as_old_as_its_request() {
    let now = Arc::new(AtomicU64::new(1_000_000));
    let (clock, own) = (now.clone(), now.clone());
    let cache = pages().clock(move || std::time::UNIX_EPOCH + Duration::from_millis(clock.load(Ordering::SeqCst)));
    let web = Web::new(&cache.build().unwrap(), move |_| {
        own.fetch_add(3_000, Ordering::SeqCst);
        async { Ok(ok("text")) }
    });
    web.get("/pages/1").await;
    now.fetch_add(2_000, Ordering::SeqCst);
    let hit = web.get("/pages/1").await;
    assert_eq!((hit.is_hit(), hit.header("age")), (true, "5"));
}

/// A hit over HTTP/1.1 has its trailers, and the date at which it was made.
#[tokio::test]
async fn a_hit_has_its_trailers_and_its_date() {
    let inner = service_fn(|_: Request<hyper::body::Incoming>| async {
        let trailers = HeaderMap::from_iter([("x-sum".parse().unwrap(), "5".parse().unwrap())]);
        let frames = [Ok::<_, io::Error>(Frame::data(Bytes::from("text"))), Ok(Frame::trailers(trailers))];
        let response = Response::builder().header("trailer", "x-sum");
        Ok::<_, io::Error>(response.body(Body::new(StreamBody::new(stream::iter(frames)))).unwrap())
    });
    let cache = pages().clock(|| std::time::UNIX_EPOCH + Duration::from_secs(784_111_777)).build().unwrap();
    let address = serve(cache.layer().layer(inner)).await;
    for _ in 0..2 {
        let request = "GET /pages/1 HTTP/1.1\r\nhost: x\r\nte: trailers\r\nconnection: close\r\n\r\n";
        let answer = raw(address, request).await;
        assert!(answer.contains("x-sum: 5"), "{answer}");
        if answer.contains("; hit") {
            assert!(answer.contains("date: Sun, 06 Nov 1994 08:49:37 GMT"), "{answer}");
        }
    }
    assert!(raw(address, "GET /pages/1 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.contains("; hit"));
}

/// An origin that says now more and now less of what a response depends on has as many variants as there are.
#[tokio::test]
async fn a_vary_that_differs_makes_no_more_variants() {
    let calls = Arc::new(AtomicU64::new(0));
    let count = calls.clone();
    let web = Web::new(&pages().build().unwrap(), move |request| {
        let n = count.fetch_add(1, Ordering::SeqCst);
        let accept = request.headers()["accept"].to_str().unwrap().to_owned();
        async move {
            let vary = if n.is_multiple_of(2) { "accept" } else { "accept, accept-language" };
            Ok(Response::builder().header("vary", vary).body(full(accept)).unwrap())
        }
    });
    for n in 0..30 {
        let accept = ["a", "b", "c"][n % 3];
        assert_eq!(web.send(with(Method::GET, "/pages/1", &[("accept", accept)])).await.text(), accept);
    }
    assert!(calls.load(Ordering::SeqCst) <= 5, "{} calls for three variants", calls.load(Ordering::SeqCst));
}

/// A variant that lives for a second does not take the others along.
#[tokio::test]
async fn a_short_lived_variant_ends_no_other() {
    let now = Arc::new(AtomicU64::new(1_000_000));
    let clock = now.clone();
    let cache = pages().clock(move || std::time::UNIX_EPOCH + Duration::from_millis(clock.load(Ordering::SeqCst)));
    let web = Web::new(&cache.build().unwrap(), move |request| async move {
        let accept = request.headers()["accept"].to_str().unwrap().to_owned();
        let control = if accept == "short" { "max-age=1" } else { "max-age=1000" };
        let response = Response::builder().header("vary", "accept").header("cache-control", control);
        Ok(response.body(full(accept)).unwrap())
    });
    let ask = async |accept: &str| web.send(with(Method::GET, "/pages/1", &[("accept", accept)])).await;
    for accept in ["long", "short"] {
        ask(accept).await;
        assert!(ask(accept).await.is_hit());
    }
    now.fetch_add(5_000, Ordering::SeqCst);
    assert!(ask("long").await.is_hit() && !ask("short").await.is_hit());
}

/// What another request of the same service has become a part of falls with it.
#[tokio::test]
async fn a_response_depends_on_the_responses_that_it_is_made_of() {
    let cache = pages()
        .data_type(DataType::new("digest", Ttl::Standard))
        .data_type(DataType::new("user", Ttl::Standard))
        .route(Route::new("/digests/{digest_id}", "digest"))
        .build()
        .unwrap();
    let itself: Arc<Mutex<Option<Web>>> = Arc::default();
    let seen = itself.clone();
    let web = Web::new(&cache, move |asked| {
        let web = seen.lock().unwrap().clone().unwrap();
        async move {
            if asked.uri().path() == "/pages/1" {
                depends_on("user", 7);
                return Ok(ok("page"));
            }
            Ok(ok(web.get("/pages/1").await.text().to_owned()))
        }
    });
    *itself.lock().unwrap() = Some(web.clone());
    for (data_type, id) in [("page", "1"), ("user", "7")] {
        // One loads the page, and one finds it.
        for digest in ["/digests/1", "/digests/2"] {
            web.get(digest).await;
            assert!(web.get(digest).await.is_hit());
        }
        cache.invalidate("t").mutated(data_type, id).run().await.unwrap();
        for digest in ["/digests/1", "/digests/2"] {
            assert!(!web.get(digest).await.is_hit(), "{digest} {data_type}");
        }
    }
}

/// A digest of a page: its handler asks for it as it likes.
fn digests(more: impl Fn(CacheBuilder) -> CacheBuilder, page: DataType) -> Cache {
    let builder = of(page).data_type(DataType::new("digest", Ttl::Standard));
    let digest = Route::new("/digests/{digest_id}", "digest").credentials(Credentials::Shared);
    more(builder.route(digest)).build().unwrap()
}

/// What is made of a part that is served although it is stale is not stored, whoever serves that.
#[tokio::test]
async fn what_is_made_of_something_stale_is_not_stored() {
    for soft in [false, true] {
        let mut page = DataType::new("page", Ttl::Standard).stale_if_error(LONG);
        page = match soft {
            false => page.serve_invalidated_on_error(),
            true => page.soft_timeout(Duration::from_millis(20)),
        };
        let now = Arc::new(AtomicU64::new(1_000_000));
        let clock = now.clone();
        let clock = move || std::time::UNIX_EPOCH + Duration::from_millis(clock.load(Ordering::SeqCst));
        let cache = digests(|builder| builder.clock(clock.clone()), page);
        let (itself, ill) = (Arc::new(Mutex::new(None::<Web>)), Arc::new(AtomicBool::new(false)));
        let (seen, is_ill) = (itself.clone(), ill.clone());
        let web = Web::new(&cache, move |asked| {
            let (web, is_ill) = (seen.lock().unwrap().clone().unwrap(), is_ill.load(Ordering::SeqCst));
            async move {
                Ok(match asked.uri().path() {
                    "/pages/1" if is_ill && soft => std::future::pending().await,
                    "/pages/1" if is_ill => Response::builder().status(500).body(full("")).unwrap(),
                    "/pages/1" => ok("page"),
                    _ => ok(web.get("/pages/1").await.text().to_owned()),
                })
            }
        });
        *itself.lock().unwrap() = Some(web.clone());
        web.get("/pages/1").await;
        ill.store(true, Ordering::SeqCst);
        match soft {
            false => drop(cache.invalidate("t").mutated("page", "1").run().await.unwrap()),
            true => drop(now.fetch_add(3_600_000 + 1_000, Ordering::SeqCst)),
        }
        let made = web.get("/digests/1").await;
        assert_eq!((made.text(), made.cache_status()), ("page", "fwd=uri-miss; detail=stale-part"), "soft: {soft}");
    }
}

/// Neither is it forgotten when the cache keeps out of the part: one with credentials, and one that is asked for by the
/// request for the whole itself.
#[tokio::test]
async fn what_the_cache_keeps_out_of_is_a_part_all_the_same() {
    for how in ["credentials", "extensions", "range", "tags"] {
        let cache = digests(|builder| builder, DataType::new("page", Ttl::Standard));
        let itself = Arc::new(Mutex::new(None::<Web>));
        let seen = itself.clone();
        let web = Web::new(&cache, move |asked| {
            let web = seen.lock().unwrap().clone().unwrap();
            async move {
                if asked.uri().path() == "/pages/1" {
                    let tags = (how == "tags").then_some(("cache-tag", "page=2"));
                    let page = tags.into_iter().fold(Response::builder(), |page, (name, tags)| page.header(name, tags));
                    return Ok(page.body(full("page")).unwrap());
                }
                let (name, value) = match how {
                    "credentials" | "tags" => ("authorization", "x"),
                    "range" => ("range", "bytes=0-1"),
                    _ => ("x-nothing", ""),
                };
                let mut part = with(Method::GET, "/pages/1", &[(name, value)]);
                *part.extensions_mut() = asked.extensions().clone();
                Ok(ok(web.send(part).await.text().to_owned()))
            }
        });
        *itself.lock().unwrap() = Some(web.clone());
        web.get("/digests/1").await;
        // What it was told by those tags is not known any more.
        assert_eq!(web.get("/digests/1").await.is_hit(), how != "tags", "{how}");
        cache.invalidate("t").mutated("page", "1").run().await.unwrap();
        assert!(!web.get("/digests/1").await.is_hit(), "{how}");
    }
}

/// Of more parts than can be remembered, none is forgotten.
#[tokio::test]
async fn no_part_is_one_too_many() {
    let cache = digests(|builder| builder.data_type(DataType::new("user", 60 * LONG)), DataType::new("page", LONG));
    let itself = Arc::new(Mutex::new(None::<Web>));
    let seen = itself.clone();
    let web = Web::new(&cache, move |asked| {
        let web = seen.lock().unwrap().clone().unwrap();
        async move {
            if asked.uri().path().starts_with("/pages/") {
                if asked.uri().query() == Some("1001") {
                    depends_on("user", 7);
                }
                return Ok(ok("page"));
            }
            for part in 0..=1_001 {
                web.get(&format!("/pages/1?{part}")).await;
            }
            Ok(ok("digest"))
        }
    });
    *itself.lock().unwrap() = Some(web.clone());
    web.get("/digests/1").await;
    cache.invalidate("t").mutated("user", "7").run().await.unwrap();
    assert!(!web.get("/digests/1").await.is_hit());
}

/// A refresh for a `HEAD` is none, where the key has turned out to be unshared.
#[tokio::test]
async fn a_head_never_fills_with_nothing() {
    let page = DataType::new("page", Duration::from_secs(10)).stale_while_revalidate(600 * LONG).loads_whole();
    let now = Arc::new(AtomicU64::new(1_000_000));
    let clock = now.clone();
    let clock = move || std::time::UNIX_EPOCH + Duration::from_millis(clock.load(Ordering::SeqCst));
    let calls = Arc::new(AtomicU64::new(0));
    let count = calls.clone();
    let web = Web::new(&of(page).clock(clock).build().unwrap(), move |asked| {
        let n = count.fetch_add(1, Ordering::SeqCst);
        let text = if asked.method() == Method::HEAD { "" } else { "text" };
        let private = if n == 1 { "private" } else { "public" };
        async move { Ok(Response::builder().header("cache-control", private).body(full(text)).unwrap()) }
    });
    let settled = async |n| {
        while calls.load(Ordering::SeqCst) < n {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    web.get("/pages/1").await;
    now.fetch_add(11_000, Ordering::SeqCst);
    assert!(web.get("/pages/1").await.is_hit());
    settled(2).await;
    web.send(request(Method::HEAD, "/pages/1")).await;
    settled(2).await;
    assert_eq!(web.get("/pages/1").await.text(), "text");
}

/// A 304 to a client's own condition says nothing of whom the response is for: the key is shared again when its time is over.
#[tokio::test]
async fn polling_keeps_no_key_from_being_shared() {
    let now = Arc::new(AtomicU64::new(1_000_000));
    let clock = now.clone();
    let clock = move || std::time::UNIX_EPOCH + Duration::from_millis(clock.load(Ordering::SeqCst));
    let calls = Arc::new(AtomicU64::new(0));
    let count = calls.clone();
    let web = Web::new(&pages().clock(clock).build().unwrap(), move |asked| {
        let private = if count.fetch_add(1, Ordering::SeqCst) == 0 { "private" } else { "public" };
        let knows = asked.headers().contains_key("if-none-match");
        async move {
            let response = Response::builder().header("cache-control", private).header("etag", "\"1\"");
            Ok(response.status(if knows { 304 } else { 200 }).body(full(if knows { "" } else { "text" })).unwrap())
        }
    });
    for _ in 0..4 {
        assert_eq!(web.send(with(Method::GET, "/pages/1", &[("if-none-match", "\"1\"")])).await.status, 304);
        now.fetch_add(6_000, Ordering::SeqCst);
    }
    assert_eq!(calls.load(Ordering::SeqCst), 3, "private, asked itself, loaded whole, and a hit");
}

// ---- what is said of it ----------------------------------------------------------------------------------------------

/// Layers outside need not read headers.
#[tokio::test]
async fn every_response_says_how_it_came_to_be() {
    let page = DataType::new("page", Duration::from_secs(10)).stale_if_error(LONG);
    let now = Arc::new(AtomicU64::new(1_000_000));
    let clock = now.clone();
    let clock = move || std::time::UNIX_EPOCH + Duration::from_millis(clock.load(Ordering::SeqCst));
    let (ill, slow) = (Arc::new(AtomicBool::new(false)), Arc::new(tokio::sync::Semaphore::new(1_000)));
    let (is_ill, may) = (ill.clone(), slow.clone());
    for (name, status) in [(Some("edge.1"), "edge.1; "), (None, "")] {
        ill.store(false, Ordering::SeqCst);
        let (is_ill, may, clock) = (is_ill.clone(), may.clone(), clock.clone());
        let cache = of(page.clone()).uncached("/pages/me").cache_status(name).clock(clock).build().unwrap();
        let web = Web::new(&cache, move |asked| {
            let (is_ill, may) = (is_ill.load(Ordering::SeqCst), may.clone());
            let private = if asked.uri().path() == "/pages/mine" { "private" } else { "public" };
            async move {
                may.acquire().await.unwrap().forget();
                let status = if is_ill { 500 } else { 200 };
                Ok(Response::builder().status(status).header("cache-control", private).body(full("text")).unwrap())
            }
        });
        let ask = async |request| {
            let response = web.start(request).await.unwrap();
            let said = response.headers().get("cache-status").map_or("", |value| value.to_str().unwrap()).to_owned();
            assert!(said.starts_with(status) && said.is_empty() == status.is_empty(), "{said}");
            let Outcome { outcome, reason, data_type, tier, age, .. } =
                response.extensions().get::<Outcome>().expect("an outcome").clone();
            assert_eq!(&*data_type, "page");
            (outcome, reason, tier, age.map(|age| age.as_secs()))
        };
        let get = |path| request(Method::GET, path);
        assert_eq!(ask(get("/pages/1")).await, (Handling::Miss, Some("uri-miss"), None, None));
        now.fetch_add(3_000, Ordering::SeqCst);
        assert_eq!(ask(get("/pages/1")).await, (Handling::Hit, None, Some(FoundIn::Process), Some(3)));
        assert_eq!(ask(get("/pages/mine")).await, (Handling::Miss, Some("private"), None, None));
        let credentials = with(Method::GET, "/pages/1", &[("authorization", "x")]);
        assert_eq!(ask(credentials).await, (Handling::Bypass, Some("credentials"), None, None));
        assert_eq!(ask(request(Method::OPTIONS, "/pages/1")).await, (Handling::Bypass, Some("method"), None, None));
        slow.forget_permits(1_000);
        let (one, other) = tokio::join!(ask(get("/pages/2")), async {
            let other = tokio::spawn({
                let web = web.clone();
                async move { web.start(request(Method::GET, "/pages/2")).await.unwrap().extensions().get().cloned() }
            });
            tokio::time::sleep(Duration::from_millis(20)).await;
            slow.add_permits(1_000);
            other.await.unwrap().map(|outcome: Outcome| outcome.outcome)
        });
        let both = [one.0, other.unwrap()];
        assert!(both.contains(&Handling::Miss) && both.contains(&Handling::Coalesced), "{both:?}");
        now.fetch_add(10_000, Ordering::SeqCst);
        ill.store(true, Ordering::SeqCst);
        assert_eq!(ask(get("/pages/1")).await, (Handling::Stale, None, Some(FoundIn::Process), Some(13)));
        let unmatched = web.start(get("/others/1")).await.unwrap();
        assert!(unmatched.extensions().get::<Outcome>().is_none() && !unmatched.headers().contains_key("cache-status"));
    }
    for name in ["", "1st", "my cache", "a,b", "\u{e9}"] {
        let error = pages().cache_status(name).build().unwrap_err();
        assert!(error.to_string().contains(&format!("`{name}`")), "{error}");
    }
}

/// A length that nobody keeps is not mended to none.
#[tokio::test]
async fn nothing_is_not_the_rest_of_something() {
    let answers = |_: Request<hyper::body::Incoming>| async {
        let slow = stream::once(async { tokio::time::sleep(Duration::from_millis(1)).await });
        let nothing = slow.flat_map(|()| stream::empty::<io::Result<Frame<Bytes>>>());
        let response = Response::builder().header("content-length", "5");
        Ok::<_, io::Error>(response.body(Body::new(StreamBody::new(nothing))).unwrap())
    };
    let address = serve(pages().build().unwrap().layer().layer(service_fn(answers))).await;
    for _ in 0..2 {
        let answer = raw(address, "GET /pages/1 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await;
        assert!(!answer.contains("content-length: 0"), "{answer}");
    }
}

/// Where the type says so, heads and parts fill the cache, and a crowd of them is one call.
#[tokio::test]
async fn heads_and_parts_may_load_the_whole() {
    for whole in [false, true] {
        let page = DataType::new("page", Ttl::Standard);
        let cache = of(if whole { page.loads_whole() } else { page }).build().unwrap();
        let calls = Arc::new(AtomicU64::new(0));
        let count = calls.clone();
        let web = Web::new(&cache, move |request| {
            count.fetch_add(1, Ordering::SeqCst);
            let (head, part) = (request.method() == Method::HEAD, request.headers().contains_key("range"));
            async move {
                tokio::time::sleep(Duration::from_millis(10)).await;
                Ok(match (head, part) {
                    (true, _) => ok(""),
                    (_, true) => {
                        let part = Response::builder().status(206).header("content-range", "bytes 1-2/5");
                        part.body(full("12")).unwrap()
                    }
                    _ => ok("01234"),
                })
            }
        });
        let part = || with(Method::GET, "/pages/1", &[("range", "bytes=1-2")]);
        let replies: Vec<Reply> = join_all((0..10).map(|_| web.send(part()))).await;
        assert!(replies.iter().all(|reply| (reply.status.as_u16(), reply.text()) == (206, "12")));
        let heads = join_all((0..10).map(|_| web.send(request(Method::HEAD, "/pages/2")))).await;
        assert!(heads.iter().all(|reply| reply.status == 200 && reply.body.is_empty()));
        assert_eq!(calls.load(Ordering::SeqCst), if whole { 2 } else { 20 });
        let hits = [web.get("/pages/1").await, web.get("/pages/2").await];
        assert_eq!(
            hits.map(|reply| (reply.is_hit(), reply.text().to_owned())),
            [(whole, "01234".to_owned()), (whole, "01234".to_owned())]
        );
    }
}

// ---- values ----------------------------------------------------------------------------------------------------------

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind")]
enum Seen {
    Login {
        ip: IpAddr,
        #[serde(flatten)]
        more: More,
    },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct More {
    at: SocketAddr,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum Untagged {
    Ip(IpAddr),
}

/// What is read is what was written, whatever it is.
#[tokio::test]
async fn a_value_comes_back_as_it_was() {
    async fn twice<T, C>(cache: &Cache, id: &str, value: T) -> (Option<T>, Source)
    where
        T: Clone + Serialize + DeserializeOwned + Send + 'static,
        C: Codec,
    {
        let mut last = None;
        for _ in 0..2 {
            let value = value.clone();
            let fetch = || async { Ok::<_, io::Error>(Some(value)) };
            let (value, report) = cache.entry::<T>("page", id).codec::<C>().fetch(fetch).unwrap().await.unwrap();
            last = Some((value, report.source));
        }
        last.unwrap()
    }
    let cache = pages().build().unwrap();
    let null = serde_json::Value::Null;
    assert_eq!(twice::<_, MessagePack>(&cache, "null", null.clone()).await, (Some(null.clone()), Source::Cache));
    assert_eq!(twice::<_, Json>(&cache, "null", null.clone()).await, (Some(null), Source::Cache));
    assert_eq!(twice::<_, MessagePack>(&cache, "unit", ()).await, (Some(()), Source::Cache));
    let tuples = BTreeMap::from([((1u8, 2u8), "a".to_owned()), ((3, 4), "b".to_owned())]);
    assert_eq!(twice::<_, MessagePack>(&cache, "tuples", tuples.clone()).await, (Some(tuples.clone()), Source::Cache));
    let (nan, source) = twice::<_, MessagePack>(&cache, "nan", f64::NAN).await;
    assert!(nan.unwrap().is_nan() && source == Source::Cache);
    // What a format cannot say is not cached, and never something else.
    assert_eq!(twice::<_, Json>(&cache, "tuples", tuples.clone()).await, (Some(tuples), Source::Origin));
    let wide = u128::MAX;
    assert_eq!(twice::<_, MessagePack>(&cache, "wide", wide).await.0, Some(wide));
    // What types have two forms of, where serde reads ahead.
    let ip: IpAddr = "::1".parse().unwrap();
    let login = Seen::Login { ip, more: More { at: (ip, 80).into() } };
    assert_eq!(twice::<_, MessagePack>(&cache, "login", login.clone()).await, (Some(login), Source::Cache));
    let from = Untagged::Ip(ip);
    assert_eq!(twice::<_, MessagePack>(&cache, "from", from.clone()).await, (Some(from), Source::Cache));
}

/// A value has versions and variants, tags by which it falls, and a time of its own; and that there is none can be kept.
#[tokio::test]
async fn a_value_says_what_it_is() {
    let now = Arc::new(AtomicU64::new(1_000_000));
    let clock = now.clone();
    let cache = pages()
        .data_type(DataType::new("user", Ttl::Standard))
        .cascade(Cascade::new("user").drops(["page"]))
        .route(Route::new("/users/{user_id}/pages", "page").declares_tags())
        .clock(move || std::time::UNIX_EPOCH + Duration::from_millis(clock.load(Ordering::SeqCst)))
        .build();
    // Every entry of the type must say which user it is of.
    let error = cache.map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("user"), "{error}");
    let clock = now.clone();
    let cache = Cache::builder("test")
        .single_tenant("t")
        .data_type(DataType::new("page", Ttl::Standard))
        .data_type(DataType::new("user", Ttl::Standard))
        .cascade(Cascade::new("user").drops(["page"]))
        .clock(move || std::time::UNIX_EPOCH + Duration::from_millis(clock.load(Ordering::SeqCst)))
        .build()
        .unwrap();
    let entry = || cache.entry::<u64>("page", "1").tag("user", "7");
    let ask = async |entry: EntryBuilder<u64>, value: Option<u64>| {
        let (value, report) = entry.fetch(move || async move { Ok::<_, io::Error>(value) }).unwrap().await.unwrap();
        (value, report.source == Source::Cache)
    };
    assert_eq!(ask(entry(), Some(1)).await, (Some(1), false));
    assert_eq!(ask(entry(), Some(2)).await, (Some(1), true));
    assert_eq!(ask(entry().version(2), Some(2)).await, (Some(2), false));
    assert_eq!(ask(entry().variant("de"), Some(3)).await, (Some(3), false));
    assert_eq!(ask(entry().variant("fr"), Some(4)).await, (Some(4), false));
    cache.invalidate("t").mutated("user", "7").run().await.unwrap();
    for (entry, value) in [(entry(), 5), (entry().version(2), 6), (entry().variant("de"), 7)] {
        assert_eq!(ask(entry, Some(value)).await, (Some(value), false));
    }
    // Tags are no part of the key: what was asked for with others may lack one by which it is to fall now.
    let of = |user: &str| cache.entry::<u64>("page", "2").tag("user", user);
    for (user, value, is_hit) in [("1", 1, false), ("1", 1, true), ("2", 2, false), ("2", 2, true), ("1", 3, false)] {
        assert_eq!(ask(of(user), Some(value)).await, (Some(value), is_hit), "{user}");
    }
    // A time of its own, and no longer than its type's.
    for (own, kept) in [(10, 10), (1_000_000, 3_600)] {
        cache.clear().await.unwrap();
        let entry = || entry().ttl(Duration::from_secs(own));
        ask(entry(), Some(1)).await;
        now.fetch_add((kept - 1) * 1_000, Ordering::SeqCst);
        assert!(ask(entry(), Some(2)).await.1, "{own}");
        now.fetch_add(2_000, Ordering::SeqCst);
        assert!(!ask(entry(), Some(2)).await.1, "{own}");
    }
    // That there is none.
    cache.clear().await.unwrap();
    assert_eq!((ask(entry(), None).await, ask(entry(), None).await), ((None, false), (None, false)));
    let none = || entry().keep_none(Duration::from_secs(10));
    assert_eq!((ask(none(), None).await, ask(none(), Some(1)).await), ((None, false), (None, true)));
    let made = none().fetch(|| async { Ok::<_, io::Error>(None) }).unwrap().generate(|| async { Ok(9) }).await.unwrap();
    assert_eq!(made.0, 9, "none is not good enough for who would make one");
    cache.clear().await.unwrap();
    ask(none(), None).await;
    now.fetch_add(11_000, Ordering::SeqCst);
    assert_eq!(ask(none(), Some(1)).await, (Some(1), false));
    let unknown = cache.entry::<u64>("page", "1").tag("user", "7").tag("team", "1");
    let error = unknown.fetch(|| async { Ok::<_, io::Error>(None) }).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("team"), "{error}");
}

/// What is served while it is refreshed is refreshed.
#[tokio::test]
async fn a_value_is_refreshed_behind_its_reader() {
    let second = Duration::from_secs(1);
    let now = Arc::new(AtomicU64::new(1_000_000));
    let clock = now.clone();
    let cache = of(DataType::new("page", 10 * second).stale_while_revalidate(60 * second))
        .clock(move || std::time::UNIX_EPOCH + Duration::from_millis(clock.load(Ordering::SeqCst)))
        .build()
        .unwrap();
    let loads = Arc::new(AtomicU64::new(0));
    let ask = async || {
        let count = loads.clone();
        let fetch = || async move { Ok::<_, io::Error>(Some(count.fetch_add(1, Ordering::SeqCst))) };
        cache.entry::<u64>("page", "1").fetch(fetch).unwrap().await.unwrap().0.unwrap()
    };
    assert_eq!(ask().await, 0);
    now.fetch_add(20_000, Ordering::SeqCst);
    assert_eq!(ask().await, 0, "it is stale, and served");
    while loads.load(Ordering::SeqCst) < 2 {
        tokio::task::yield_now().await;
    }
    while ask().await == 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(loads.load(Ordering::SeqCst), 2);
}
