//! Whose answer it is: no response is given to a request that another one would have been made for.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/web.rs"]
mod web;

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use axum::{Router, extract::Path, routing};
use bytes::Bytes;
use futures_util::future::join_all;
use http::{Method, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper_util::{
    client::legacy::Client,
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tower::{Layer, ServiceExt, service_fn};
use tower_cache_aside::{BodyKey, Cache, CacheBuilder, Credentials, DataType, Hosts, Mutation, Query, Route, Ttl};
use web::{Body, Reply, Web, full, ok, request, with};

fn pages() -> CacheBuilder {
    Cache::builder("test").single_tenant("t").data_type(DataType::new("page", Ttl::Standard))
}

fn cached(more: impl FnOnce(Route) -> Route) -> CacheBuilder {
    pages().route(more(Route::new("/pages/{page_id}", "page")))
}

/// A service that says who asked for what.
fn mirror(cache: &Cache) -> Web {
    Web::new(cache, |request| async move {
        let headers = request.headers();
        let said = |name: &str| headers.get(name).map_or("", |v| v.to_str().unwrap()).to_owned();
        Ok(ok(format!("{} {} {}", request.uri(), said("host"), said("x-user"))))
    })
}

// ---- the host --------------------------------------------------------------------------------------------------------

#[tokio::test]
async fn a_host_has_entries_of_its_own() {
    let of = |host: &'static str| with(Method::GET, "/pages/1", &[("host", host)]);
    let web = mirror(&cached(|route| route).build().unwrap());
    for host in ["a.example", "evil.example", "a.example:8080"] {
        assert_eq!(web.send(of(host)).await.text(), format!("/pages/1 {host} "));
        assert!(web.send(of(host)).await.is_hit());
    }
    assert!(web.send(of("A.EXAMPLE")).await.is_hit());
    for forged in ["evil.example/x@a.example", "evil.example/?a.example", "evil.example#a.example"] {
        assert_eq!(web.send(of(forged)).await.cache_status(), "fwd=bypass; detail=host", "{forged}");
    }
    for (name, value) in [("x-forwarded-host", "evil.example"), ("x-forwarded-proto", "http"), ("forwarded", "host=x")]
    {
        let request = with(Method::GET, "/pages/1", &[("host", "a.example"), (name, value)]);
        assert!(!web.send(request).await.is_hit(), "{name}");
    }
    let twice = with(Method::GET, "/pages/1", &[("host", "a.example"), ("host", "evil.example")]);
    assert_eq!(web.send(twice).await.cache_status(), "fwd=bypass; detail=host");
    // A write drops those of all hosts.
    let cache = cached(|route| route).mutation(Mutation::put("/pages/{page_id}", "page")).build().unwrap();
    let web = mirror(&cache);
    web.send(of("a.example")).await;
    web.send(with(Method::PUT, "/pages/1", &[("host", "admin.example")])).await;
    assert!(!web.send(of("a.example")).await.is_hit());
    for (hosts, other_hits, other_says) in [
        (Hosts::Any, true, ""),
        (Hosts::same(["a.example", "b.example"]), false, "fwd=uri-miss; stored"),
        (Hosts::only(["a.example", "b.example"]), false, "fwd=bypass; detail=host"),
    ] {
        let web = mirror(&cached(|route| route).hosts(hosts.clone()).build().unwrap());
        web.send(of("a.example")).await;
        assert!(web.send(of("b.example")).await.is_hit(), "{hosts:?}");
        let other = web.send(of("c.example")).await;
        assert_eq!(other.is_hit(), other_hits, "{hosts:?}");
        assert!(other_hits || other.cache_status() == other_says, "{hosts:?}: {}", other.cache_status());
    }
    let error = cached(|route| route).hosts(Hosts::only(["https://a.example"])).build().unwrap_err().to_string();
    assert!(error.contains("https://a.example") && error.contains("example.com"), "{error}");
}

/// The same over real connections: the `Host` of HTTP/1.1, the `:authority` of HTTP/2.
#[tokio::test]
async fn both_versions_of_http_name_the_host() {
    let cache = cached(|route| route).build().unwrap();
    let inner = service_fn(|request: Request<hyper::body::Incoming>| async move {
        let authority = request.uri().authority().map(|authority| authority.to_string());
        let host = request.headers().get("host").map(|host| host.to_str().unwrap().to_owned());
        Ok::<_, io::Error>(Response::new(full(format!("for {}", authority.or(host).unwrap()))))
    });
    let service = cache.layer().layer(inner);
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
    let one = async |host: &str| {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET /pages/1 HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    };
    for host in ["evil.example", "good.example"] {
        assert!(one(host).await.ends_with(&format!("for {host}")));
        assert!(one(host).await.contains("; hit"));
    }
    let two: Client<_, Full<Bytes>> = Client::builder(TokioExecutor::new()).http2_only(true).build_http();
    let answer = two.get(format!("http://{address}/pages/1").parse().unwrap()).await.unwrap();
    let text = answer.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(text, format!("for {address}"));
    // HTTP/2 says the scheme, too, and a handler may make a link of it.
    assert!(!one(&address.to_string()).await.contains("; hit"));
}

// ---- the route -------------------------------------------------------------------------------------------------------

async fn ask(router: &Router, method: Method, path: &str) -> (String, String) {
    let request = Request::builder().method(method).uri(path).body(axum::body::Body::empty()).unwrap();
    let (parts, body) = router.clone().oneshot(request).await.unwrap().into_parts();
    let text = body.collect().await.unwrap().to_bytes();
    let status = parts.headers.get("cache-status").map_or("", |v| v.to_str().unwrap()).to_owned();
    (String::from_utf8(text.to_vec()).unwrap(), status)
}

/// A router that nests takes the prefix away, and the same path is then two things.
#[tokio::test]
async fn two_mounts_are_two_places() {
    fn users(whose: &'static str, cache: &Cache) -> Router {
        Router::new()
            .route("/users/me", routing::get(move || async move { format!("{whose} me") }))
            .route(
                "/users/{id}",
                routing::get(move |Path(id): Path<String>| async move { format!("{whose} {id}") })
                    .put(|| async { "changed" }),
            )
            .layer(cache.layer())
    }
    for path in ["/users/{user_id}", "/admin/users/{user_id}"] {
        let cache = Cache::builder("test")
            .single_tenant("t")
            .data_type(DataType::new("user", Ttl::Standard))
            .route(Route::new(path, "user"))
            .mutation(Mutation::put(path, "user"))
            .build()
            .unwrap();
        let router = Router::new().nest("/admin", users("admin", &cache)).nest("/public", users("public", &cache));
        let is_nested = path.starts_with("/users");
        for round in 0..2 {
            for (path, text) in [("/admin/users/1", "admin 1"), ("/public/users/1", "public 1")] {
                let (found, status) = ask(&router, Method::GET, path).await;
                assert_eq!(found, text);
                let is_cached = is_nested || path.starts_with("/admin");
                assert_eq!(status.contains("; hit"), is_cached && round == 1, "{path}: {status}");
            }
            // The router knows that these are two routes.
            let (found, status) = ask(&router, Method::GET, "/admin/users/me").await;
            assert_eq!((found.as_str(), status.contains("detail=route")), ("admin me", true), "{status}");
        }
        // A write under either drops both, for it is one user.
        ask(&router, Method::PUT, "/admin/users/1").await;
        for path in ["/admin/users/1", "/public/users/1"] {
            assert!(!ask(&router, Method::GET, path).await.1.contains("; hit"), "{path}");
        }
    }
}

/// Without a router that says so, the layer is told; and what no route is to answer.
#[tokio::test]
async fn a_mount_may_be_said() {
    let cache = Cache::builder("test")
        .single_tenant("t")
        .data_type(DataType::new("user", Ttl::Standard))
        .route(Route::new("/users/{user_id}", "user"))
        .uncached("/users/me")
        .mutation(Mutation::post("/users").creates("user"))
        .build()
        .unwrap();
    let at = |mount: &'static str| {
        let inner = service_fn(move |request: Request<Full<Bytes>>| async move {
            let response = Response::builder().header("location", format!("{mount}/users/7"));
            Ok(response.body(full(format!("{mount} {}", request.uri().path()))).unwrap())
        });
        let layered = cache.invalidate_layer().mounted_at(mount).layer(cache.layer().mounted_at(mount).layer(inner));
        Web::of(layered)
    };
    let (admin, public) = (at("/admin"), at("/public"));
    for web in [&admin, &public] {
        web.get("/users/7").await;
    }
    assert_eq!(
        (admin.get("/users/7").await.text(), public.get("/users/7").await.text()),
        ("/admin /users/7", "/public /users/7")
    );
    assert!(admin.get("/users/7").await.is_hit());
    assert_eq!(admin.get("/users/me").await.cache_status(), "");
    // What a `Location` names is what the client sees.
    admin.get("/users/8").await;
    public.send(request(Method::POST, "/users")).await;
    assert!(!admin.get("/users/7").await.is_hit() && admin.get("/users/8").await.is_hit());
}

/// What takes the prefix away may be around axum's router, and a prefix may be written in many ways.
#[tokio::test]
async fn a_mount_may_be_around_the_router() {
    let cache = Cache::builder("test")
        .single_tenant("t")
        .data_type(DataType::new("user", Ttl::Standard))
        .route(Route::new("/users/{user_id}", "user"))
        .route(Route::new("/admin/teams/{user_id}", "user"))
        .build()
        .unwrap();
    let at = |mount: &'static str| {
        let answer = move || async move { mount };
        let router =
            Router::new().route("/users/{id}", routing::get(answer)).route("/teams/{id}", routing::get(answer));
        router.layer(cache.layer().mounted_at(mount))
    };
    for (mount, other) in [("/admin", "/public"), ("admin", "public/"), ("/admin/", "/public/")] {
        let (admin, public) = (at(mount), at(other));
        for _ in 0..2 {
            assert_eq!(ask(&admin, Method::GET, "/users/1").await.0.trim_matches('/'), "admin");
            assert_eq!(ask(&public, Method::GET, "/users/1").await.0.trim_matches('/'), "public");
        }
        ask(&admin, Method::GET, "/teams/1").await;
        assert!(ask(&admin, Method::GET, "/teams/1").await.1.contains("; hit"), "{mount}: as clients see it");
        cache.clear().await.unwrap();
    }
}

/// A layer that knows less is no reason for one that knows more to be silent.
#[tokio::test]
async fn the_layer_that_knows_most_takes_care_of_a_write() {
    let cache = Cache::builder("test")
        .single_tenant("t")
        .data_type(DataType::new("user", Ttl::Standard))
        .route(Route::new("/users/{user_id}", "user"))
        .mutation(Mutation::put("/users/{user_id}", "user"))
        .report_header(true)
        .build()
        .unwrap();
    let users = routing::get(|Path(id): Path<String>| async move { id }).put(|| async { "changed" });
    let users = Router::new().route("/users/{id}", users).route("/users/me", routing::put(|| async { "changed" }));
    let router = Router::new().nest("/admin", users.layer(cache.layer())).layer(cache.invalidate_layer());
    for (path, falls) in [("/admin/users/1", true), ("/admin/users/2", false), ("/admin/users/me", true)] {
        ask(&router, Method::GET, "/admin/users/1").await;
        assert!(ask(&router, Method::GET, "/admin/users/1").await.1.contains("; hit"));
        let request = Request::put(path).body(axum::body::Body::empty()).unwrap();
        let response = router.clone().oneshot(request).await.unwrap();
        let dropped = if falls { "user=1, total=1" } else { "user=0, total=0" };
        assert_eq!(response.headers()["cache-invalidated"], dropped, "{path}");
        assert_eq!(!ask(&router, Method::GET, "/admin/users/1").await.1.contains("; hit"), falls, "{path}");
    }
}

/// What a middleware has made of a path is not told by what it was.
#[tokio::test]
async fn a_path_that_was_rewritten_is_another() {
    let cache = pages().route(Route::new("/{*path}", "page").entity("path", "page")).build().unwrap();
    let page = routing::get(|Path(path): Path<String>| async move { path });
    let inner = Router::new().route("/{*path}", page).layer(cache.layer());
    let rewrite = service_fn(move |mut request: Request<axum::body::Body>| {
        let version = request.headers()["x-version"].to_str().unwrap();
        *request.uri_mut() = format!("/{version}{}", request.uri().path()).parse().unwrap();
        inner.clone().oneshot(request)
    });
    let router = Router::new().fallback_service(rewrite);
    for (version, text) in [("a", "a/p"), ("b", "b/p"), ("a", "a/p")] {
        let request = Request::get("/p").header("x-version", version).body(axum::body::Body::empty()).unwrap();
        let body = router.clone().oneshot(request).await.unwrap().into_body();
        assert_eq!(body.collect().await.unwrap().to_bytes(), text);
    }
}

/// A method reads or writes by the route that it is, and of what is not cached nobody knows the parameters.
#[tokio::test]
async fn a_method_reads_or_writes() {
    let builder = || {
        pages()
            .data_type(DataType::new("result", Ttl::Standard))
            .route(Route::new("/pages/{page_id}", "page"))
            .route(Route::new("/search", "result").method(Method::POST))
            .route(Route::new("/jobs/{job_id}", "result").method(Method::POST))
            .uncached("/pages/me")
            .mutation(Mutation::put("/pages/{page_id}", "page"))
            .mutation(Mutation::any("/{*path}").all("page"))
    };
    let cache = builder().build().unwrap();
    let inner = service_fn(|_: Request<Full<Bytes>>| async { Ok::<_, io::Error>(ok("text")) });
    let again = |_: tower_cache_aside::RequestBody<Full<Bytes>>| Full::default();
    let web = Web::of(cache.invalidate_layer().layer(cache.layer().request_bodies(again).layer(inner)));
    for (method, path, falls) in [
        (Method::POST, "/search", false),
        (Method::PUT, "/search", true),
        (Method::PUT, "/pages/2", false),
        (Method::PUT, "/pages/me", true),
        (Method::POST, "/anything", true),
    ] {
        web.get("/pages/1").await;
        assert!(web.get("/pages/1").await.is_hit());
        web.send(request(method.clone(), path)).await;
        assert_eq!(!web.get("/pages/1").await.is_hit(), falls, "{method} {path}");
    }
    web.send(request(Method::POST, "/search")).await;
    assert!(web.send(request(Method::POST, "/search")).await.is_hit());
    // The router says that it is none of those that read: its handler may say what it changes.
    let import = routing::post(|| async {
        tower_cache_aside::changed("page", 1);
        "done"
    });
    let page = routing::get(|| async { "page" });
    let router = Router::new().route("/jobs/import", import).route("/pages/{id}", page).layer(cache.layer());
    ask(&router, Method::GET, "/pages/1").await;
    ask(&router, Method::POST, "/jobs/import").await;
    assert!(!ask(&router, Method::GET, "/pages/1").await.1.contains("; hit"));
    for (builder, says) in [
        (builder().uncached("/pages/me/"), "/pages/me/"),
        (builder().mutation(Mutation::post("/jobs/{id}").all("page")), "only reads"),
    ] {
        let error = builder.build().unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
}

/// An escaped delimiter is not the delimiter: to the server behind a proxy these are different resources.
#[tokio::test]
async fn what_is_escaped_is_not_what_it_stands_for() {
    let cache = pages()
        .route(Route::new("/{*path}", "page").entity("path", "page"))
        .mutation(Mutation::put("/{*path}", "page").entity("path", "page"))
        .build()
        .unwrap();
    let web = mirror(&cache);
    let different = ["/a/b", "/a%2Fb", "/a%2fb", "/a;b", "/a%3Bb", "/a/../b", "/a/%2E%2E/b", "/b", "//b", "/b/"];
    for path in different {
        assert_eq!(web.get(path).await.text(), format!("{path}  "));
    }
    // A write of any spelling drops them all.
    assert!(web.get("/a%2Fb").await.is_hit());
    web.put("/a/b").await;
    assert!(!web.get("/a%2Fb").await.is_hit() && !web.get("/a/b").await.is_hit() && web.get("/b").await.is_hit());
    let web = mirror(&cached(|route| route).build().unwrap());
    for path in ["/pages/a;b", "/pages/a%3Bb", "/pages/a%2Fb", "/pages/a%252Fb"] {
        assert_eq!(web.get(path).await.text(), format!("{path}  "));
    }
    web.get("/pages/%41%c3%a9").await;
    assert!(web.get("/pages/A%C3%A9").await.is_hit(), "what needs no escape is the same");
}

#[tokio::test]
async fn a_query_may_count_byte_by_byte() {
    for (query, hits) in [(Query::All, true), (Query::Exact, false)] {
        let web = mirror(&cached(|route| route.query(query)).build().unwrap());
        web.get("/pages/1?a=1&b=2&a=3").await;
        assert_eq!(web.get("/pages/1?a=1&a=3&b=2").await.is_hit(), hits);
        assert!(web.get("/pages/1?a=1&b=2&a=3").await.is_hit());
    }
}

// ---- who waits -------------------------------------------------------------------------------------------------------

/// What is made for one alone is not given to those who wait with it.
#[tokio::test]
async fn who_waits_gets_what_is_theirs() {
    for (status, headers, is_shared) in [
        (200, &[][..], true),
        (404, &[], true),
        (301, &[], true),
        (200, &[("cache-control", "max-age=0")], true),
        (302, &[], false),
        (303, &[], false),
        (307, &[], false),
        (400, &[], false),
        (401, &[], false),
        (403, &[], false),
        (406, &[], false),
        (407, &[], false),
        (408, &[], false),
        (421, &[], false),
        (429, &[], false),
        (431, &[], false),
        (500, &[], false),
        (503, &[], false),
        (200, &[("cache-control", "private")], false),
        (200, &[("set-cookie", "a=b")], false),
    ] {
        let calls = Arc::new(AtomicU64::new(0));
        let count = calls.clone();
        let web = Web::new(&cached(|route| route).build().unwrap(), move |request| {
            let n = count.fetch_add(1, Ordering::SeqCst);
            let own = request.headers()["x-user"].to_str().unwrap().to_owned();
            async move {
                tokio::time::sleep(Duration::from_millis(20)).await;
                let mut response = Response::builder().status(if n == 0 { status } else { 200 });
                if n == 0 {
                    response = headers.iter().fold(response, |response, (name, value)| response.header(*name, *value));
                }
                Ok(response.body(full(own)).unwrap())
            }
        });
        let users: Vec<_> = (0..8).map(|user| user.to_string()).collect();
        let replies =
            join_all(users.iter().map(|user| web.send(with(Method::GET, "/pages/1", &[("x-user", user.as_str())]))));
        let replies: Vec<Reply> = replies.await;
        let odd: Vec<_> = replies.iter().filter(|reply| reply.status == status).map(Reply::text).collect();
        if is_shared {
            assert_eq!((calls.load(Ordering::SeqCst), odd.len()), (1, 8), "{status} {headers:?}");
        } else if status != 200 {
            // Its own request's alone; the others' is another, which they share.
            assert_eq!(odd, ["0"], "{status} {headers:?}");
            assert_eq!(calls.load(Ordering::SeqCst), 2, "{status} {headers:?}");
        } else {
            assert!(calls.load(Ordering::SeqCst) >= 2, "{status} {headers:?}");
            assert_eq!(replies.iter().filter(|reply| reply.text() == "0").count(), 1, "{status} {headers:?}");
        }
    }
}

/// What is not stored varies all the same.
#[tokio::test]
async fn who_waits_in_another_language_waits_for_that() {
    for control in ["max-age=0", "max-age=60"] {
        let web = Web::new(&cached(|route| route).build().unwrap(), move |request| async move {
            let language = request.headers()["accept-language"].to_str().unwrap().to_owned();
            tokio::time::sleep(Duration::from_millis(20)).await;
            let response = Response::builder().header("vary", "accept-language").header("cache-control", control);
            Ok(response.body(full(language)).unwrap())
        });
        let languages = ["de", "fr", "de", "en", "fr", "de"];
        let asked = languages.map(|language| with(Method::GET, "/pages/1", &[("accept-language", language)]));
        let replies = join_all(asked.map(|request| web.send(request))).await;
        assert_eq!(replies.iter().map(Reply::text).collect::<Vec<_>>(), languages, "{control}");
    }
}

// ---- who asks --------------------------------------------------------------------------------------------------------

#[tokio::test]
async fn whoever_says_who_they_are_is_answered_alone() {
    let credentials = ["authorization", "cookie", "proxy-authorization", "x-api-key", "x-forwarded-user", "x-session"];
    let web = mirror(&cached(|route| route).credential_headers(["X-Session"]).build().unwrap());
    for name in credentials {
        let request = || with(Method::GET, "/pages/1", &[(name, "ada")]);
        assert_eq!(web.send(request()).await.cache_status(), "fwd=bypass; detail=credentials", "{name}");
    }
    let web = mirror(&cached(|route| route.credentials(Credentials::Shared)).build().unwrap());
    for (i, name) in credentials.into_iter().enumerate() {
        assert_eq!(web.send(with(Method::GET, "/pages/1", &[(name, "ada")])).await.is_hit(), i > 0, "{name}");
    }
    // What names the tenant is no credential.
    let by_key = Cache::builder("test").tenant_header("x-api-key").data_type(DataType::new("page", Ttl::Standard));
    let web = mirror(&by_key.route(Route::new("/pages/{page_id}", "page")).build().unwrap());
    let request = || with(Method::GET, "/pages/1", &[("x-api-key", "k1")]);
    web.send(request()).await;
    assert!(web.send(request()).await.is_hit());
}

/// What the builder says counts where a route says nothing; and a cache that is off answers nothing, and drops.
#[tokio::test]
async fn a_default_is_for_all_that_say_nothing_else() {
    let builder = || cached(|route| route).route(Route::new("/own/{page_id}", "page").credentials(Credentials::Bypass));
    let web = mirror(&builder().credentials(Credentials::Shared).build().unwrap());
    for (path, says) in [("/pages/1", "hit"), ("/own/1", "fwd=bypass; detail=credentials")] {
        let ask = || with(Method::GET, path, &[("authorization", "x")]);
        web.send(ask()).await;
        assert!(web.send(ask()).await.cache_status().starts_with(says), "{path}");
    }
    let dropped = Arc::new(AtomicU64::new(0));
    let count = dropped.clone();
    let off = builder()
        .mutation(Mutation::put("/pages/{page_id}", "page"))
        .enabled(false)
        .on_invalidated(move |_, _| _ = count.fetch_add(1, Ordering::SeqCst))
        .build()
        .unwrap();
    let web = mirror(&off);
    for _ in 0..2 {
        assert_eq!(web.get("/pages/1").await.cache_status(), "fwd=bypass; detail=disabled");
        let (_, report) =
            off.entry::<u64>("page", "1").fetch(|| async { Ok::<_, io::Error>(Some(1)) }).unwrap().await.unwrap();
        assert_eq!(report.source, tower_cache_aside::Source::Origin);
    }
    web.put("/pages/1").await;
    assert_eq!(dropped.load(Ordering::SeqCst), 1, "other processes may be on");
}

/// A user is known by a header or by a closure, and stands nowhere in clear.
#[tokio::test]
async fn each_user_has_an_answer_of_their_own() {
    #[derive(Clone)]
    struct Session(&'static str);
    let by_header = cached(|route| route.credentials(Credentials::per_user("x-user")));
    let by_session = cached(|route| route.credentials(Credentials::User))
        .user_from(|parts| parts.extensions.get::<Session>().map(|session| session.0.to_owned()));
    for builder in [by_header, by_session] {
        let web = mirror(&builder.show_keys(true).build().unwrap());
        let of = |user: &'static str| {
            let mut request = with(Method::GET, "/pages/1", &[("x-user", user)]);
            request.extensions_mut().insert(Session(user));
            request
        };
        for user in ["ada@example.com", "grace@example.com"] {
            let reply = web.send(of(user)).await;
            assert!(reply.text().ends_with(user) && !reply.is_hit());
            let reply = web.send(of(user)).await;
            assert!(reply.text().ends_with(user) && reply.is_hit());
            assert!(
                reply.cache_status().contains("key=") && !reply.cache_status().contains("example"),
                "{}",
                reply.cache_status()
            );
        }
        assert_eq!(web.get("/pages/1").await.cache_status(), "fwd=bypass; detail=no-user");
    }
    let secret = cached(|route| route.vary("x-user")).show_keys(true).build().unwrap();
    let reply = mirror(&secret).send(with(Method::GET, "/pages/1", &[("x-user", "ada")])).await;
    assert!(!reply.cache_status().contains("ada"), "{}", reply.cache_status());
    let error = cached(|route| route.credentials(Credentials::User)).build().unwrap_err().to_string();
    assert!(error.contains("/pages/{page_id}") && error.contains("user_from"), "{error}");
}

#[tokio::test]
async fn only_a_response_for_everybody_is_for_everybody() {
    for (control, hits) in
        [("public", true), ("s-maxage=9", true), ("must-revalidate", true), ("proxy-revalidate", false)]
    {
        for name in ["authorization", "x-api-key"] {
            let web = Web::new(
                &cached(|route| route.credentials(Credentials::Declared)).build().unwrap(),
                move |_| async move { Ok(Response::builder().header("cache-control", control).body(full("text")).unwrap()) },
            );
            let of = |value| with(Method::GET, "/pages/1", &[(name, value)]);
            web.send(of("ada")).await;
            assert_eq!(web.send(of("grace")).await.is_hit(), hits, "{control} {name}");
        }
    }
}

// ---- what they can read ----------------------------------------------------------------------------------------------

/// What is encoded is for those who can decode it, whether its `Vary` says so or not: a real file server's.
#[tokio::test]
async fn what_is_encoded_is_for_those_who_can_decode_it() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("pages")).unwrap();
    std::fs::write(folder.path().join("pages/1"), "plain").unwrap();
    std::fs::write(folder.path().join("pages/1.gz"), "zipped").unwrap();
    let files = tower_http::services::ServeDir::new(folder.path()).precompressed_gzip();
    let files = service_fn(move |request: Request<Full<Bytes>>| {
        let files = files.clone();
        async move {
            let mut response = files.oneshot(request).await.unwrap();
            response.headers_mut().remove("vary");
            Ok(response.map(|body| Body::new(BodyExt::map_err(body, io::Error::other))))
        }
    });
    let web = Web::around(&cached(|route| route).build().unwrap(), files);
    let of = |accepts: &'static str| with(Method::GET, "/pages/1", &[("accept-encoding", accepts)]);
    for (accepts, text, is_hit) in
        [("gzip", "zipped", false), ("gzip", "zipped", true), ("identity", "plain", false), ("identity", "plain", true)]
    {
        let reply = web.send(of(accepts)).await;
        assert_eq!((reply.text(), reply.is_hit()), (text, is_hit), "{accepts}");
    }
    assert_eq!(web.get("/pages/1").await.text(), "plain");
}

/// A tag that the cache has computed does not say that two encodings are the same bytes.
#[tokio::test]
async fn a_computed_tag_is_weak() {
    let cache = cached(|route| route).build().unwrap();
    let inner = service_fn(|_: Request<Full<Bytes>>| async { Ok::<_, io::Error>(ok("text ".repeat(100))) });
    let service = tower_http::compression::CompressionLayer::new().layer(cache.layer().layer(inner));
    for _ in 0..2 {
        let request = with(Method::GET, "/pages/1", &[("accept-encoding", "gzip")]);
        let response = service.clone().oneshot(request).await.unwrap();
        assert_eq!(response.headers()["content-encoding"], "gzip");
        assert!(response.headers()["etag"].to_str().unwrap().starts_with("W/\""));
    }
}

// ---- reads with a body -----------------------------------------------------------------------------------------------

/// A query, or a `POST` that only reads, is answered by what its body asks.
#[tokio::test]
async fn what_a_body_asks_for_is_part_of_the_question() {
    for (method, how) in [(Method::POST, BodyKey::Json), (Method::POST, BodyKey::Bytes), (Method::QUERY, BodyKey::Json)]
    {
        let calls = Arc::new(AtomicU64::new(0));
        let count = calls.clone();
        let cache = pages()
            .data_type(DataType::new("query_result", Ttl::Short))
            .route(Route::new("/search", "query_result").method(method.clone()).body(how))
            .mutation(Mutation::put("/pages/{page_id}", "page").all("query_result"))
            .body_limit(1_000)
            .build()
            .unwrap();
        let inner = service_fn(move |request: Request<Full<Bytes>>| {
            let n = count.fetch_add(1, Ordering::SeqCst);
            async move {
                let body = request.into_body().collect().await.unwrap().to_bytes();
                Ok(ok([&b"for "[..], &body[..], format!(" #{n}").as_bytes()].concat()))
            }
        });
        let again = |body: tower_cache_aside::RequestBody<Full<Bytes>>| {
            let whole = futures_util::FutureExt::now_or_never(body.collect()).unwrap().unwrap();
            Full::new(whole.to_bytes())
        };
        let web = Web::of(cache.invalidate_layer().layer(cache.layer().request_bodies(again).layer(inner)));
        let ask = async |body: &str, content_type: &str| {
            let request = with(method.clone(), "/search", &[("content-type", content_type)]);
            web.send(request.map(|_| Full::new(Bytes::from(body.to_owned())))).await
        };
        let (one, other) = (r#"{"a":1,"b":2}"#, r#"{"a":1,"b":3}"#);
        assert!(ask(one, "application/json").await.text().starts_with(&format!("for {one}")));
        assert!(ask(one, "application/json").await.is_hit());
        assert!(ask(other, "application/json").await.text().starts_with(&format!("for {other}")));
        assert!(!ask(one, "text/plain").await.is_hit());
        assert_eq!(ask(r#"{ "b": 2, "a": 1 }"#, "application/json").await.is_hit(), how == BodyKey::Json);
        assert!(!ask("", "application/json").await.is_hit());
        let large = "x".repeat(2_000);
        assert_eq!(ask(&large, "text/plain").await.cache_status(), "fwd=bypass; detail=request-body");
        // Invalidated like all, and unsafe to nobody.
        web.get("/pages/1").await;
        assert!(ask(one, "application/json").await.is_hit());
        web.put("/pages/1").await;
        assert!(!ask(one, "application/json").await.is_hit());
        // A crowd is one call.
        web.put("/pages/1").await;
        let before = calls.load(Ordering::SeqCst);
        join_all((0..10).map(|_| ask(one, "application/json"))).await;
        assert_eq!(calls.load(Ordering::SeqCst) - before, 1);
        // What is asked of a part of it, or of what one has, is no question to a `POST` (RFC 9110, sections 13.1 and 14.2).
        if method == Method::POST {
            for name in ["if-none-match", "if-modified-since", "range"] {
                let reply = web.send(with(Method::POST, "/search", &[(name, "bytes=0-1")])).await;
                assert_eq!(reply.cache_status(), "fwd=bypass; detail=precondition", "{name}");
            }
        }
        // Other methods write what is read here.
        web.send(request(Method::DELETE, "/search")).await;
        assert!(!ask(one, "application/json").await.is_hit());
    }
    // A layer that was not told how to make a body lets them pass.
    let cache = pages().route(Route::new("/search", "page").method(Method::POST)).build().unwrap();
    let web = mirror(&cache);
    let reply = web.send(request(Method::POST, "/search")).await;
    assert_eq!(reply.cache_status(), "fwd=bypass; detail=request-body");
    for (builder, says) in [
        (pages().route(Route::new("/search", "page").method(Method::PUT)), "QUERY"),
        (pages().route(Route::new("/search", "page").body(BodyKey::Json)), "method"),
        (
            pages()
                .route(Route::new("/search", "page").method(Method::POST))
                .mutation(Mutation::post("/search").all("page")),
            "only reads",
        ),
    ] {
        let error = builder.build().unwrap_err().to_string();
        assert!(error.contains("/search") && error.contains(says), "{error}");
    }
}

/// In axum it is one line.
#[tokio::test]
async fn axum_makes_bodies_of_what_was_read() {
    let cache = pages().route(Route::new("/search", "page").method(Method::POST)).build().unwrap();
    let search = routing::post(|body: String| async move { format!("for {body}") });
    let router = Router::new().route("/search", search).layer(cache.layer().request_bodies(axum::body::Body::new));
    for is_hit in [false, true] {
        let request = Request::post("/search").body(axum::body::Body::from("this")).unwrap();
        let (parts, body) = router.clone().oneshot(request).await.unwrap().into_parts();
        assert_eq!(body.collect().await.unwrap().to_bytes(), "for this");
        assert_eq!(parts.headers["cache-status"].to_str().unwrap().contains("; hit"), is_hit);
    }
}
