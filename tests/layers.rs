//! The two layers as Tower middleware: what they pass through, what they store, what they drop, and the mistakes that other
//! cache layers make, each as a test.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/web.rs"]
mod web;

use std::{
    convert::Infallible,
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use tower::{Layer, Service, ServiceExt, limit::ConcurrencyLimitLayer, service_fn};
use tower_cache_aside::{
    Cache, CacheBuilder, Cascade, Credentials, DataType, Invalidated, Mutation, Query, Route, Ttl,
};
use web::{Body, Web, full, ok, request, with};

fn builder() -> CacheBuilder {
    Cache::builder("test")
        .tenant_header("x-tenant-id")
        .data_type(DataType::new("user", Ttl::Standard))
        .data_type(DataType::new("order", Ttl::Standard))
        .route(Route::new("/users/{id}", "user").entity("id", "user"))
        .route(Route::new("/orders/{id}", "order").entity("id", "order"))
        .mutation(Mutation::put("/users/{id}", "user").entity("id", "user"))
        .mutation(Mutation::new(Method::POST, "/users/{id}").mutates("user").entity("id", "user"))
        .report_header(true)
}

fn single() -> CacheBuilder {
    Cache::builder("test")
        .single_tenant("t")
        .data_type(DataType::new("user", Ttl::Standard))
        .route(Route::new("/users/{user_id}", "user"))
        .mutation(Mutation::put("/users/{user_id}", "user"))
        .report_header(true)
}

type Answer = std::future::Ready<io::Result<Response<Body>>>;

/// Answers with a number that grows with each call, and a description of the request.
fn counting(calls: &Arc<AtomicU64>) -> impl Fn(Request<Full<Bytes>>) -> Answer + use<> {
    let calls = calls.clone();
    move |request| {
        let n = calls.fetch_add(1, Ordering::SeqCst);
        std::future::ready(Ok(ok(format!("{n} {} {}", request.method(), request.uri()))))
    }
}

#[tokio::test]
async fn keys_tell_apart_what_differs() {
    let calls = Arc::default();
    let web = Web::new(&builder().build().unwrap(), counting(&calls));
    let mut seen = vec![];
    for (path, tenant) in [
        ("/users/1", "a"),
        ("/orders/1", "a"),
        ("/users/1?x=1", "a"),
        ("/users/1?x=2", "a"),
        ("/users/2", "a"),
        ("/users/1", "b"),
    ] {
        let reply = web.send(with(Method::GET, path, &[("x-tenant-id", tenant)])).await;
        assert!(!reply.is_hit(), "{path}");
        seen.push((path, tenant, reply));
    }
    for (path, tenant, first) in seen {
        let reply = web.send(with(Method::GET, path, &[("x-tenant-id", tenant)])).await;
        assert!(reply.is_hit());
        assert_eq!(reply.body, first.body);
    }
    assert_eq!(calls.load(Ordering::SeqCst), 6);
}

#[tokio::test]
async fn other_methods_pass_and_neither_read_nor_fill() {
    let calls = Arc::default();
    let web = Web::new(&single().build().unwrap(), counting(&calls));
    for method in [Method::POST, Method::OPTIONS, Method::DELETE, Method::PATCH, Method::TRACE] {
        let reply = web.send(request(method.clone(), "/users/1")).await;
        assert_eq!(reply.cache_status(), "fwd=method", "{method}");
        assert!(reply.text().contains(method.as_str()));
    }
    assert!(!web.get("/users/1").await.is_hit());
    assert_eq!(web.get("/elsewhere").await.header("cache-status"), "");
    assert!(web.get("/users/1").await.is_hit());
}

/// `HEAD` is answered from what a `GET` stored, and never stored as one.
#[tokio::test]
async fn head_is_not_stored_as_get() {
    let web = Web::new(&single().build().unwrap(), |request| async move {
        Ok(if request.method() == Method::HEAD { ok("") } else { ok("text") })
    });
    assert_eq!(web.send(request(Method::HEAD, "/users/1")).await.cache_status(), "fwd=uri-miss; detail=head");
    assert_eq!(web.get("/users/1").await.text(), "text");
    let head = web.send(request(Method::HEAD, "/users/1")).await;
    assert!(head.is_hit() && head.body.is_empty());
    assert_eq!(head.header("content-length"), "4");
}

#[tokio::test]
async fn a_response_that_is_not_for_everybody_is_not_stored() {
    for (status, name, value, detail) in [
        (200, "set-cookie", "a=b", "set-cookie"),
        (200, "cache-control", "private", "private"),
        (200, "cache-control", "no-store", "no-store"),
        (200, "vary", "*", "vary"),
        (206, "content-range", "bytes 0-1/2", "status"),
        (200, "content-type", "text/event-stream", "stream"),
        (404, "x", "y", "status"),
        (500, "x", "y", "status"),
        (302, "location", "/", "status"),
    ] {
        let web = Web::new(&single().build().unwrap(), move |_| async move {
            let response = Response::builder().status(status).header(name, value);
            Ok(response.body(full("text")).unwrap())
        });
        for _ in 0..2 {
            let reply = web.get("/users/1").await;
            assert_eq!((reply.status.as_u16(), reply.text(), reply.header(name)), (status, "text", value));
            assert_eq!(reply.cache_status(), format!("fwd=uri-miss; detail={detail}"), "{status} {name}: {value}");
        }
    }
}

#[tokio::test]
async fn a_request_that_is_not_everybodys_is_not_answered_from_the_cache() {
    let calls = Arc::default();
    let web = Web::new(&single().build().unwrap(), counting(&calls));
    web.get("/users/1").await;
    for (name, detail) in [("authorization", "credentials"), ("cookie", "credentials"), ("upgrade", "upgrade")] {
        let reply = web.send(with(Method::GET, "/users/1", &[(name, "x")])).await;
        assert_eq!(reply.cache_status(), format!("fwd=bypass; detail={detail}"));
    }
    assert!(web.get("/users/1").await.is_hit());
}

#[tokio::test]
async fn credentials_are_what_the_route_says() {
    let calls = Arc::default();
    let cache = builder()
        .data_type(DataType::new("note", Ttl::Standard))
        .route(Route::new("/shared/{note_id}", "note").credentials(Credentials::Shared))
        .route(Route::new("/own/{note_id}", "note").credentials(Credentials::per_user("x-user")))
        .build()
        .unwrap();
    let web = Web::new(&cache, counting(&calls));
    let get = async |path: &str, headers: &[(&str, &str)]| {
        let mut all = vec![("x-tenant-id", "t")];
        all.extend(headers);
        web.send(with(Method::GET, path, &all)).await
    };
    get("/shared/1", &[("authorization", "a")]).await;
    assert!(get("/shared/1", &[("authorization", "b"), ("cookie", "c=d")]).await.is_hit());
    assert_eq!(get("/own/1", &[("authorization", "a")]).await.cache_status(), "fwd=bypass; detail=no-user");
    assert_eq!(get("/own/1", &[("x-user", "")]).await.cache_status(), "fwd=bypass; detail=no-user");
    assert_eq!(get("/own/1", &[("x-user", "a"), ("x-user", "b")]).await.cache_status(), "fwd=bypass; detail=no-user");
    let a = get("/own/1", &[("x-user", "a"), ("authorization", "a")]).await;
    let b = get("/own/1", &[("x-user", "b"), ("authorization", "b")]).await;
    assert_ne!(a.body, b.body);
    assert_eq!(get("/own/1", &[("x-user", "a")]).await.body, a.body);
}

/// By a closure, which may find nothing, or nothing in it.
#[tokio::test]
async fn a_tenant_may_be_found_by_a_closure() {
    let calls = Arc::default();
    let cache = Cache::builder("test")
        .tenant_from(|parts| Some(parts.headers.get("x-team")?.to_str().ok()?.to_owned()))
        .data_type(DataType::new("user", Ttl::Standard))
        .route(Route::new("/users/{user_id}", "user"))
        .build()
        .unwrap();
    let web = Web::new(&cache, counting(&calls));
    let get = async |teams: &[(&str, &str)]| web.send(with(Method::GET, "/users/1", teams)).await;
    let red = get(&[("x-team", "red")]).await.body;
    assert_ne!(get(&[("x-team", "blue")]).await.body, red);
    let again = get(&[("x-team", "red")]).await;
    assert!(again.is_hit() && again.body == red);
    for nobody in [&[][..], &[("x-team", "")]] {
        assert_eq!(get(nobody).await.cache_status(), "fwd=bypass; detail=no-tenant");
    }
}

#[tokio::test]
async fn declared_vary_headers_and_query_are_part_of_the_key() {
    let calls = Arc::default();
    let cache = Cache::builder("test")
        .single_tenant("t")
        .data_type(DataType::new("page", Ttl::Standard))
        .route(Route::new("/pages/{page_id}", "page").vary("accept-language").query(Query::only(["a", "b"])))
        .build()
        .unwrap();
    let web = Web::new(&cache, counting(&calls));
    let get =
        async |path: &str, lang: &str| web.send(with(Method::GET, path, &[("accept-language", lang)])).await.is_hit();
    assert!(!get("/pages/1", "de").await);
    assert!(!get("/pages/1", "fr").await);
    assert!(get("/pages/1?utm=1", "de").await);
    assert!(!get("/pages/1?a=1&a=2", "de").await);
    assert!(!get("/pages/1?a=2&a=1", "de").await, "the order of one parameter's values may matter");
    assert!(!get("/pages/1?a=2", "de").await);
    assert!(!get("/pages/1?a=1&a=2&b=3", "de").await);
    assert!(get("/pages/1?b=3&a=1&a=2", "de").await);
}

fn chunks(count: usize, size: usize, read: &Arc<AtomicUsize>) -> Body {
    let read = read.clone();
    let frames = (0..count).map(move |_| {
        read.fetch_add(1, Ordering::SeqCst);
        Ok::<_, io::Error>(Frame::data(Bytes::from(vec![b'x'; size])))
    });
    UnsyncBoxBody::new(StreamBody::new(futures_util::stream::iter(frames)))
}

/// A body over the limit reaches the client whole, and no more of it than the limit is read ahead.
#[tokio::test]
async fn a_large_body_passes_through_whole() {
    const CHUNK: usize = 1_000;
    let read: Arc<AtomicUsize> = Arc::default();
    let counted = read.clone();
    let web = Web::new(&single().body_limit(10 * CHUNK).build().unwrap(), move |_| {
        let body = chunks(1_000, CHUNK, &counted);
        async move { Ok(Response::new(body)) }
    });
    let response = web.start(request(Method::GET, "/users/1")).await.unwrap();
    assert!(read.load(Ordering::SeqCst) <= 12, "{} chunks were buffered", read.load(Ordering::SeqCst));
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes().len(), 1_000 * CHUNK);
    assert!(!web.get("/users/1").await.is_hit());
    let small = Web::new(&single().body_limit(10 * CHUNK).build().unwrap(), {
        let read = read.clone();
        move |_| {
            let body = chunks(10, CHUNK, &read);
            async move { Ok(Response::new(body)) }
        }
    });
    assert_eq!(small.get("/users/1").await.body.len(), 10 * CHUNK);
    assert!(small.get("/users/1").await.is_hit(), "the limit itself is within it");
}

/// A body whose length is known to be over the limit isn't read at all before it is asked for.
#[tokio::test]
async fn a_body_known_to_be_large_is_not_touched() {
    let web = Web::new(&single().body_limit(10).build().unwrap(), |_| async { Ok(ok("eleven char")) });
    let reply = web.get("/users/1").await;
    assert_eq!((reply.text(), reply.cache_status()), ("eleven char", "fwd=uri-miss; detail=body-limit"));
}

/// The first bytes of a stream reach the client before the last exist.
#[tokio::test]
async fn a_stream_reaches_the_client_as_it_comes() {
    let (send, receive) = tokio::sync::mpsc::unbounded_channel::<io::Result<Frame<Bytes>>>();
    let receive = Arc::new(Mutex::new(Some(receive)));
    let web = Web::new(&single().build().unwrap(), move |_| {
        let mut receive = receive.lock().unwrap().take().unwrap();
        let stream = futures_util::stream::poll_fn(move |cx| receive.poll_recv(cx));
        async move { Ok(Response::new(UnsyncBoxBody::new(StreamBody::new(stream)))) }
    });
    send.send(Ok(Frame::data("first".into()))).unwrap();
    let mut body = web.start(request(Method::GET, "/users/1")).await.unwrap().into_body();
    assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "first");
    send.send(Ok(Frame::data("last".into()))).unwrap();
    assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "last");
    let trailers = HeaderMap::from_iter([("x-sum".parse().unwrap(), HeaderValue::from_static("9"))]);
    send.send(Ok(Frame::trailers(trailers.clone()))).unwrap();
    drop(send);
    assert_eq!(body.frame().await.unwrap().unwrap().into_trailers().unwrap(), trailers);
    assert!(body.frame().await.is_none());
    let hit = web.get("/users/1").await;
    assert!(hit.is_hit(), "it was stored on the way");
    assert_eq!((hit.text(), &hit.trailers), ("firstlast", &Some(trailers)), "trailers and all");
}

#[tokio::test]
async fn a_broken_body_is_broken_for_its_client_and_not_stored() {
    let first = Arc::new(AtomicBool::new(true));
    let web = Web::new(&single().build().unwrap(), move |_| {
        let broken = first.swap(false, Ordering::SeqCst);
        async move {
            let frames = [Ok(Frame::data("some".into())), Err(io::Error::other("broken"))];
            let frames = futures_util::stream::iter(frames.into_iter().take(if broken { 2 } else { 1 }));
            Ok(Response::new(UnsyncBoxBody::new(StreamBody::new(frames))))
        }
    });
    assert!(web.try_send(request(Method::GET, "/users/1")).await.is_err());
    assert!(!web.get("/users/1").await.is_hit());
    assert!(web.get("/users/1").await.is_hit());
}

/// Bytes are shared with the store, not copied.
#[tokio::test]
async fn a_hit_copies_no_body() {
    let web = Web::new(&single().build().unwrap(), |_| async { Ok(ok(vec![b'x'; 1 << 20])) });
    web.get("/users/1").await;
    let (one, other) = (web.get("/users/1").await, web.get("/users/1").await);
    assert!(one.is_hit() && other.is_hit());
    assert_eq!(one.body.as_ptr(), other.body.as_ptr());
}

#[tokio::test]
async fn a_ttl_is_kept_to_the_millisecond() {
    let now = Arc::new(AtomicU64::new(1_000_000));
    let clock = now.clone();
    let cache = single()
        .data_type(DataType::new("brief", Duration::from_millis(300)))
        .data_type(DataType::new("forever", Ttl::Permanent))
        .route(Route::new("/brief/{x_id}", "brief"))
        .route(Route::new("/forever/{x_id}", "forever"))
        .clock(move || SystemTime::UNIX_EPOCH + Duration::from_millis(clock.load(Ordering::SeqCst)))
        .build()
        .unwrap();
    let web = Web::new(&cache, counting(&Arc::default()));
    for path in ["/brief/1", "/forever/1"] {
        web.get(path).await;
    }
    now.fetch_add(299, Ordering::SeqCst);
    assert_eq!(web.get("/brief/1").await.cache_status(), "hit; ttl=0");
    now.fetch_add(1, Ordering::SeqCst);
    assert!(!web.get("/brief/1").await.is_hit());
    now.fetch_add(100 * 365 * 86_400_000, Ordering::SeqCst);
    assert_eq!(web.get("/forever/1").await.cache_status(), "hit");
}

#[tokio::test]
async fn age_is_told_and_cache_status_appended() {
    let now = Arc::new(AtomicU64::new(1_000_000));
    let clock = now.clone();
    let cache = single().clock(move || SystemTime::UNIX_EPOCH + Duration::from_millis(clock.load(Ordering::SeqCst)));
    let web = Web::new(&cache.build().unwrap(), |_| async {
        let response =
            Response::builder().header("cache-status", "upstream; hit").header("x-a", "1").header("x-a", "2");
        Ok(response.header("connection", "x-hop").header("x-hop", "1").body(full("text")).unwrap())
    });
    web.get("/users/1").await;
    now.fetch_add(7_900, Ordering::SeqCst);
    let hit = web.get("/users/1").await;
    assert_eq!(hit.header("age"), "7");
    let status: Vec<_> = hit.headers.get_all("cache-status").iter().map(|v| v.to_str().unwrap()).collect();
    assert_eq!(status.join(", "), "upstream; hit, tower-cache-aside; hit; ttl=3592");
    assert_eq!(hit.headers.get_all("x-a").iter().collect::<Vec<_>>(), ["1", "2"]);
    assert!(!hit.headers.contains_key("x-hop") && !hit.headers.contains_key("connection"));
}

/// Calling a service that was not polled ready panics over a concurrency limit; calling the one that was does not.
#[tokio::test]
async fn the_inner_service_that_is_called_was_ready() {
    #[derive(Clone)]
    struct Strict {
        ready: bool,
    }
    impl Service<Request<Full<Bytes>>> for Strict {
        type Response = Response<Full<Bytes>>;
        type Error = Infallible;
        type Future = std::future::Ready<Result<Self::Response, Infallible>>;
        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            self.ready = true;
            Poll::Ready(Ok(()))
        }
        fn call(&mut self, _: Request<Full<Bytes>>) -> Self::Future {
            assert!(std::mem::take(&mut self.ready), "called before it was ready");
            std::future::ready(Ok(Response::new(Full::from("text"))))
        }
    }
    let cache = single().build().unwrap();
    let mut service = cache.invalidate_layer().layer(cache.layer().layer(Strict { ready: false }));
    let mut limited = cache.layer().layer(ConcurrencyLimitLayer::new(1).layer(Strict { ready: false }));
    for (method, path) in
        [(Method::GET, "/users/1"), (Method::PUT, "/users/1"), (Method::POST, "/x"), (Method::GET, "/x")]
    {
        for _ in 0..3 {
            let response = service.ready().await.unwrap().call(request(method.clone(), path)).await.unwrap();
            assert_eq!(response.status(), 200);
            let response = limited.ready().await.unwrap().call(request(method.clone(), path)).await.unwrap();
            assert_eq!(response.status(), 200);
        }
    }
}

/// Any number of layers and routers share one cache, and a handler may purge through the same handle.
#[tokio::test]
async fn layers_are_handles_on_one_cache() {
    let cache = single().build().unwrap();
    let calls = Arc::default();
    let (one, other) = (Web::new(&cache, counting(&calls)), Web::new(&cache.clone(), counting(&calls)));
    one.get("/users/1").await;
    assert!(other.get("/users/1").await.is_hit());
    assert_eq!(other.put("/users/1").await.report.unwrap().total(), 1);
    assert!(!one.get("/users/1").await.is_hit());
    let report: Invalidated = cache.invalidate("t").mutated("user", "1").run().await.unwrap();
    assert_eq!(report.to_string(), "user=1, total=1");
    assert!(!one.get("/users/1").await.is_hit());
    assert_eq!(cache.invalidate("t").all("user").run().await.unwrap().count("user"), 1);
    assert!(!one.get("/users/1").await.is_hit());
    assert!(cache.invalidate("other").all("user").run().await.is_err());
    assert!(one.get("/users/1").await.is_hit());
}

/// What a client sends neither invalidates nor declares.
#[tokio::test]
async fn headers_of_the_request_have_no_power() {
    let web = Web::new(&single().build().unwrap(), counting(&Arc::default()));
    web.get("/users/1").await;
    for header in ["cache-tag", "cache-invalidated", "cache-control", "pragma", "x-cache-invalidate", "purge"] {
        let reply = web.send(with(Method::GET, "/users/1", &[(header, "no-cache")])).await;
        assert!(reply.is_hit(), "{header}");
    }
    // To the cache it is one unsafe method like others: the handler has it, and its success is a write.
    assert!(!web.send(request(Method::from_bytes(b"PURGE").unwrap(), "/users/1")).await.is_hit());
    assert!(!web.get("/users/1").await.is_hit());
}

#[tokio::test]
async fn declared_tags_are_for_the_cache_alone() {
    let cache = builder()
        .data_type(DataType::new("note", Ttl::Standard))
        .route(Route::new("/notes/{note_id}", "note").declares_tags())
        .cascade(Cascade::new("user").drops(["note"]))
        .build()
        .unwrap();
    let web = Web::new(&cache, |request: Request<Full<Bytes>>| async move {
        let tags = if request.uri().path() == "/notes/bad" { "nonsense" } else { "user=a%2Cb, user=c" };
        Ok(Response::builder().header("cache-tag", tags).body(full("text")).unwrap())
    });
    let tenant = [("x-tenant-id", "t")];
    for (user, falls) in [("a%2Cb", true), ("c", true), ("a", false), ("b", false)] {
        web.send(with(Method::GET, "/notes/1", &tenant)).await;
        let hit = web.send(with(Method::GET, "/notes/1", &tenant)).await;
        assert!(hit.is_hit() && hit.header("cache-tag").is_empty(), "{hit:?}");
        web.send(with(Method::PUT, &format!("/users/{user}"), &tenant)).await;
        assert_eq!(web.send(with(Method::GET, "/notes/1", &tenant)).await.is_hit(), !falls, "{user}");
    }
    let bad = web.send(with(Method::GET, "/notes/bad", &tenant)).await;
    assert_eq!((bad.cache_status(), bad.header("cache-tag")), ("fwd=uri-miss; detail=bad-tags", ""));
}

/// Only a clear refusal is no write: (how the handler ends, whether it drops).
#[tokio::test]
async fn unknown_is_a_write() {
    for (ending, drops) in [("200", true), ("204", true), ("302", true), ("400", false), ("404", false), ("409", false)]
        .into_iter()
        .chain([("500", true), ("503", true), ("error", true), ("panic", true), ("body", true)])
    {
        let web = Web::new(&single().build().unwrap(), move |request| async move {
            if request.method() == Method::GET {
                return Ok(ok("text"));
            }
            match ending {
                "error" => Err(io::Error::other("connection lost")),
                "panic" => panic!("a bug in the handler"),
                "body" => {
                    let frames = [Ok(Frame::data("half".into())), Err(io::Error::other("broken"))];
                    Ok(Response::new(UnsyncBoxBody::new(StreamBody::new(futures_util::stream::iter(frames)))))
                }
                status => Ok(Response::builder().status(status).body(full("")).unwrap()),
            }
        });
        web.get("/users/1").await;
        let task = tokio::spawn({
            let web = web.clone();
            async move { web.try_send(request(Method::PUT, "/users/1")).await }
        });
        let outcome = task.await;
        match ending {
            "panic" => assert!(outcome.unwrap_err().is_panic()),
            "error" | "body" => assert!(outcome.unwrap().is_err()),
            status => {
                let reply = outcome.unwrap().unwrap();
                assert_eq!(reply.status, StatusCode::from_bytes(status.as_bytes()).unwrap());
                assert_eq!(reply.header("cache-invalidated"), if drops { "user=1, total=1" } else { "" });
            }
        }
        assert_eq!(web.get("/users/1").await.is_hit(), !drops, "{ending}");
    }
}

/// A client that hangs up, or an outer time-out, cannot come between the write and its invalidation.
#[tokio::test]
async fn a_write_runs_to_its_end() {
    let gate = Arc::new(tokio::sync::Notify::new());
    let (reached, written) = (Arc::new(tokio::sync::Notify::new()), Arc::new(AtomicBool::new(false)));
    let (g, r, w) = (gate.clone(), reached.clone(), written.clone());
    let web = Web::new(&single().build().unwrap(), move |request| {
        let (gate, reached, written) = (g.clone(), r.clone(), w.clone());
        async move {
            if request.method() == Method::PUT {
                reached.notify_one();
                gate.notified().await;
                written.store(true, Ordering::SeqCst);
            }
            Ok(ok("text"))
        }
    });
    web.get("/users/1").await;
    let client = tokio::spawn({
        let web = web.clone();
        async move { web.put("/users/1").await }
    });
    reached.notified().await;
    client.abort();
    assert!(client.await.unwrap_err().is_cancelled());
    gate.notify_one();
    while web.get("/users/1").await.is_hit() {
        tokio::task::yield_now().await;
    }
    assert!(written.load(Ordering::SeqCst), "the entry fell because the write was done");
}

/// While a body streams its handler may still write, so its end is held back until what it wrote is dropped.
#[tokio::test]
async fn the_end_of_a_streamed_answer_invalidates_again() {
    for ends in [true, false] {
        let (send, receive) = tokio::sync::mpsc::unbounded_channel::<io::Result<Frame<Bytes>>>();
        let receive = Arc::new(Mutex::new(Some(receive)));
        let web = Web::new(&single().build().unwrap(), move |request| {
            let receive = receive.clone();
            async move {
                if request.method() == Method::GET {
                    return Ok(ok("text"));
                }
                let mut receive = receive.lock().unwrap().take().unwrap();
                let stream = futures_util::stream::poll_fn(move |cx| receive.poll_recv(cx));
                Ok(Response::new(UnsyncBoxBody::new(StreamBody::new(stream))))
            }
        });
        let body = web.start(request(Method::PUT, "/users/1")).await.unwrap().into_body();
        web.get("/users/1").await;
        assert!(web.get("/users/1").await.is_hit());
        if ends {
            drop(send);
            body.collect().await.unwrap();
            assert!(!web.get("/users/1").await.is_hit());
        } else {
            drop(body);
            while web.get("/users/1").await.is_hit() {
                tokio::task::yield_now().await;
            }
        }
    }
}

/// The children of an entity are resolved before the handler and after it, and the union falls.
#[tokio::test]
async fn relations_are_resolved_before_and_after() {
    let children = Arc::new(Mutex::new(vec!["1".to_owned(), "2".to_owned()]));
    let (known, moved) = (children.clone(), children.clone());
    let cache = single()
        .data_type(DataType::new("order", Ttl::Standard))
        .route(Route::new("/orders/{order_id}", "order"))
        .mutation(Mutation::delete("/users/{user_id}", "user").include("orders"))
        .cascade(Cascade::new("user").relation("orders", "order"))
        .resolver("orders", move |tenant, users| {
            let known = known.lock().unwrap().clone();
            async move {
                assert_eq!((tenant.as_str(), users.as_slice()), ("t", &["7".to_owned()][..]));
                if known.is_empty() { Err(io::Error::other("database is down")) } else { Ok(known) }
            }
        })
        .build()
        .unwrap();
    let web = Web::new(&cache, move |request: Request<Full<Bytes>>| {
        if request.method() == Method::DELETE {
            let mut children = moved.lock().unwrap();
            *children = if *children == ["9"] { vec![] } else { vec!["3".to_owned()] };
        }
        async { Ok(ok("text")) }
    });
    let warm = async || {
        for id in 1..=4 {
            web.get(&format!("/orders/{id}")).await;
        }
    };
    let hits = async || {
        let mut hits = vec![];
        for id in 1..=4 {
            hits.push(web.get(&format!("/orders/{id}")).await.is_hit());
        }
        hits
    };
    warm().await;
    let reply = web.send(request(Method::DELETE, "/users/7")).await;
    assert_eq!(reply.header("cache-invalidated"), "user=0, orders=3, total=3");
    assert_eq!(hits().await, [false, false, false, true]);
    warm().await;
    *children.lock().unwrap() = vec!["9".to_owned()];
    web.send(request(Method::DELETE, "/users/7")).await;
    assert_eq!(hits().await, [false; 4], "a resolver that fails drops all children, rather than none");
}

/// The cache does not fail a request whose tenant or id is nonsense.
#[tokio::test]
async fn nothing_panics_on_input() {
    let web = Web::new(&builder().build().unwrap(), |_| async { Ok(ok("text")) });
    for path in
        ["/users/%", "/users/%zz", "/users/%00", "/users/%ff%fe", "/users/a?%&=&&==", "/users/", "*", "/users/a//b"]
    {
        for tenant in [&b"t"[..], b"\xff\xfe", b"", b"a b", b"%00", &[b'x'; 10_000]] {
            for method in [Method::GET, Method::HEAD, Method::PUT] {
                let request = Request::builder().method(method).uri(path).header("x-tenant-id", tenant);
                assert_eq!(web.send(request.body(Full::default()).unwrap()).await.status, 200, "{path}");
            }
        }
    }
}

/// The layers compose with services of any body and error, axum's included.
#[tokio::test]
async fn it_layers_over_anything() {
    let cache = single().build().unwrap();
    let plain =
        service_fn(|_: Request<Full<Bytes>>| async { Ok::<_, Infallible>(Response::new(Full::<Bytes>::from("x"))) });
    let mut stack = tower::ServiceBuilder::new().layer(cache.invalidate_layer()).layer(cache.layer()).service(plain);
    let response = stack.ready().await.unwrap().call(request(Method::GET, "/users/1")).await.unwrap();
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "x");
    let router = axum::Router::<()>::new()
        .route("/users/{id}", axum::routing::get(|| async { "never" }))
        .layer(cache.layer())
        .layer(cache.invalidate_layer());
    let request = Request::builder().uri("/users/1").body(axum::body::Body::empty()).unwrap();
    let response = router.oneshot(request).await.unwrap();
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "x", "one cache, two stacks");
}
