//! gRPC through real tonic servers and clients over TCP, and over raw services where a client could not tell.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../examples/tonic_agents/service.rs"]
mod service;
mod support;

use std::{
    convert::Infallible,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::StreamExt;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use prost::Message;
use service::{Agents, AgentsClient, GET, GetAgent, UPDATE, UpdateAgent, WATCH};
use support::example;
use tokio::net::TcpListener;
use tokio_stream::wrappers::{TcpListenerStream, UnboundedReceiverStream};
use tonic::{
    Code, Status,
    metadata::MetadataMap,
    service::interceptor::InterceptedService,
    transport::{Channel, Endpoint, Server},
};
use tower::{Layer, ServiceExt, service_fn};
use tower_cache_aside::{
    Cache, Canonical, Cascade, Changes, Credentials, DataType, DescribedWrite, GrpcMethod, GrpcTarget, NoCache,
    OnUnmapped, Ttl, changed, depends_on, testing::Clock,
};

fn cache() -> Cache {
    cache_with(|read| read)
}

fn cache_with(read: impl Fn(GrpcMethod) -> GrpcMethod) -> Cache {
    let get = GrpcMethod::read(GET, "agent").message(|bytes| Some(GrpcTarget::new(GetAgent::decode(bytes).ok()?.id)));
    let update = GrpcMethod::mutation(UPDATE, "agent")
        .message(|bytes| Some(GrpcTarget::new(UpdateAgent::decode(bytes).ok()?.id)));
    let builder = Cache::builder("test")
        .tenant_header("x-tenant-id")
        .report_header(true)
        .data_type(DataType::new("agent", Ttl::Standard));
    builder.grpc(read(get)).grpc(update).build().unwrap()
}

async fn serve(cache: &Cache, agents: &Agents) -> Endpoint {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let server = Server::builder().layer(cache.grpc_layer()).add_service(agents.clone());
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    Endpoint::from_shared(url).unwrap()
}

async fn connect(endpoint: &Endpoint) -> Channel {
    endpoint.connect().await.unwrap()
}

fn status(metadata: &MetadataMap) -> String {
    let status = metadata.get("cache-status").map_or("", |v| v.to_str().unwrap());
    let status = status.strip_prefix("tower-cache-aside; ").unwrap_or(status);
    status.split("; fwd-status").next().unwrap().to_owned()
}

/// What a message says besides the id tells entries apart, and what a call writes is on the page of the mapping.
#[tokio::test]
async fn what_a_message_says_is_told() {
    let cache = cache_with(|read| {
        read.message(|bytes| {
            let id = GetAgent::decode(bytes).ok()?.id;
            Some(GrpcTarget::new(&id[..1]).variant(id))
        })
    });
    let agents = Agents::default();
    let mut client = AgentsClient::new(connect(&serve(&cache, &agents).await).await, "t");
    for id in ["1a", "1b"] {
        client.update(id, &format!("name {id}")).await.unwrap();
    }
    for hit in [false, true] {
        for id in ["1a", "1b"] {
            let reply = client.get(id).await.unwrap();
            assert_eq!(status(reply.metadata()).starts_with("hit"), hit);
            assert_eq!(reply.get_ref().name, format!("name {id}"));
        }
    }
    let [described, whole] = [true, false].map(|is_described| {
        let mut update = GrpcMethod::mutation(UPDATE, "agent");
        if is_described {
            update = update.message(|_| None);
        }
        let builder = Cache::builder("test").single_tenant("t").data_type(DataType::new("agent", Ttl::Standard));
        builder.grpc(update).build().unwrap().describe().writes.remove(0)
    });
    assert_eq!(described.name, format!("gRPC {UPDATE}"));
    let by = |write: &DescribedWrite| write.drops[0].by.clone();
    assert_eq!((by(&described), by(&whole)), (vec!["agent".to_owned()], vec![]));
}

#[tokio::test]
async fn a_hit_is_the_same_and_costs_no_call() {
    let agents = Agents::default();
    let endpoint = serve(&cache(), &agents).await;
    let mut client = AgentsClient::new(connect(&endpoint).await, "t");
    client.update("1", "first").await.unwrap();
    let miss = client.get("1").await.unwrap();
    assert_eq!(status(miss.metadata()), "fwd=uri-miss; stored");
    let hit = client.get("1").await.unwrap();
    assert!(status(hit.metadata()).starts_with("hit; ttl="), "{hit:?}");
    assert_eq!((hit.get_ref(), agents.reads()), (miss.get_ref(), 1));
    let names = |metadata: &MetadataMap| {
        let keys = metadata.keys().map(|key| format!("{key:?}"));
        let mut names: Vec<_> = keys.filter(|k| !k.contains("date")).collect();
        names.sort();
        names
    };
    assert_eq!(names(hit.metadata()), names(miss.metadata()), "headers and trailers");
}

/// How long calls are kept is learned of their reloads, as it is of HTTP's.
#[tokio::test]
async fn an_adaptive_ttl_is_learned_of_calls() {
    let (agents, clock) = (Agents::default(), Clock::new());
    let min = Duration::from_secs(30);
    let get = GrpcMethod::read(GET, "agent").message(|bytes| Some(GrpcTarget::new(GetAgent::decode(bytes).ok()?.id)));
    let ttl = Ttl::adaptive(min, Duration::from_secs(86_400), 0.5);
    let builder = Cache::builder("test").tenant_header("x-tenant-id").data_type(DataType::new("agent", ttl));
    let update = GrpcMethod::mutation(UPDATE, "agent")
        .message(|bytes| Some(GrpcTarget::new(UpdateAgent::decode(bytes).ok()?.id)));
    let cache = builder.clock(clock.clone()).grpc(get).grpc(update).build().unwrap();
    let endpoint = serve(&cache, &agents).await;
    let mut client = AgentsClient::new(connect(&endpoint).await, "t");
    client.update("1", "first").await.unwrap();
    let mut last = min;
    for _ in 0..10 {
        client.get("1").await.unwrap();
        cache.settled().await;
        let hit = status(client.get("1").await.unwrap().metadata());
        let ttl = Duration::from_secs(hit.strip_prefix("hit; ttl=").unwrap().parse().unwrap());
        assert!(ttl >= last, "{ttl:?}");
        clock.advance(ttl + Duration::from_secs(1));
        last = ttl;
    }
    assert!(last > 10 * min, "{last:?}");
    assert_eq!(cache.stats().types["agent"].drift, 0);
}

#[tokio::test]
async fn a_write_is_seen_at_once_on_every_connection() {
    let agents = Agents::default();
    let endpoint = serve(&cache(), &agents).await;
    let mut one = AgentsClient::new(connect(&endpoint).await, "t");
    let mut other = AgentsClient::new(connect(&endpoint).await, "t");
    for version in 1..20u64 {
        let written = one.update("1", &format!("name {version}")).await.unwrap();
        let dropped = written.metadata().get("cache-invalidated").unwrap();
        assert_eq!(dropped, if version == 1 { "agent=0, total=0" } else { "agent=1, total=1" }, "in the trailers");
        assert_eq!(other.get("1").await.unwrap().get_ref().version, version);
        assert!(status(other.get("1").await.unwrap().metadata()).starts_with("hit"));
    }
    assert_eq!(agents.reads(), 19);
}

#[tokio::test]
async fn tenants_and_ids_are_apart() {
    let agents = Agents::default();
    let endpoint = serve(&cache(), &agents).await;
    let channel = connect(&endpoint).await;
    for tenant in ["a", "b"] {
        for id in ["1", "11"] {
            let mut client = AgentsClient::new(channel.clone(), tenant);
            client.update(id, &format!("{tenant}{id}")).await.unwrap();
            client.get(id).await.unwrap();
            assert_eq!(client.get(id).await.unwrap().get_ref().name, format!("{tenant}{id}"));
        }
    }
    assert_eq!(agents.reads(), 4);
    AgentsClient::new(channel.clone(), "a").update("1", "new").await.unwrap();
    for (tenant, id, hit) in [("a", "11", true), ("b", "1", true), ("a", "1", false)] {
        let reply = AgentsClient::new(channel.clone(), tenant).get(id).await.unwrap();
        assert_eq!(status(reply.metadata()).starts_with("hit"), hit, "{tenant} {id}");
    }
}

#[tokio::test]
async fn errors_are_not_stored_and_change_nothing() {
    let agents = Agents::default();
    let endpoint = serve(&cache(), &agents).await;
    let mut client = AgentsClient::new(connect(&endpoint).await, "t");
    for reads in 1..=2 {
        assert_eq!(client.get("1").await.unwrap_err().code(), Code::NotFound);
        assert_eq!(agents.reads(), reads);
    }
    client.update("1", "first").await.unwrap();
    client.get("1").await.unwrap();
    assert_eq!(client.update("1", "").await.unwrap_err().code(), Code::InvalidArgument);
    assert!(status(client.get("1").await.unwrap().metadata()).starts_with("hit"), "a refused write drops nothing");
}

#[tokio::test]
async fn encodings_are_part_of_the_key_and_deadlines_are_not() {
    let agents = Agents::default();
    let endpoint = serve(&cache(), &agents).await;
    let channel = connect(&endpoint).await;
    let mut identity = AgentsClient::new(channel.clone(), "t");
    let mut gzip = AgentsClient::new(channel.clone(), "t").gzip();
    let name = "x".repeat(10_000);
    identity.update("1", &name).await.unwrap();
    for _ in 0..2 {
        assert_eq!(gzip.get("1").await.unwrap().get_ref().name, name);
        assert_eq!(identity.get("1").await.unwrap().get_ref().name, name);
    }
    assert_eq!(agents.reads(), 2);
    for timeout in ["5S", "900m"] {
        let mut client = AgentsClient::new(channel.clone(), "t").with("grpc-timeout", timeout);
        assert!(status(client.get("1").await.unwrap().metadata()).starts_with("hit"), "{timeout}");
    }
}

#[tokio::test]
async fn streams_pass_untouched_and_at_once() {
    // Even if somebody declares them by mistake.
    let builder = Cache::builder("test").tenant_header("x-tenant-id").data_type(DataType::new("agent", Ttl::Standard));
    let declared = builder.grpc(GrpcMethod::read(WATCH, "agent")).build().unwrap();
    for cache in [cache(), declared] {
        let agents = Agents::default();
        let endpoint = serve(&cache, &agents).await;
        let mut client = AgentsClient::new(connect(&endpoint).await, "t");
        client.update("1", "first").await.unwrap();
        for reads in 1..=2 {
            let mut stream = client.watch("1").await.unwrap();
            assert_eq!(stream.message().await.unwrap().unwrap().name, "first", "before the stream ends");
            assert_eq!(agents.reads(), reads);
        }
        let (ask, asked) = tokio::sync::mpsc::unbounded_channel();
        ask.send(GetAgent { id: "1".into() }).unwrap();
        let mut answers = client.chat(UnboundedReceiverStream::new(asked)).await.unwrap();
        for _ in 0..3 {
            assert_eq!(answers.message().await.unwrap().unwrap().name, "first");
            ask.send(GetAgent { id: "1".into() }).unwrap();
        }
    }
}

/// An interceptor around a service sits inside `Server::layer`. That is harmless by default: what carries credentials
/// passes by the cache, and what carries none was never let in.
#[tokio::test]
async fn a_warm_entry_is_not_for_who_is_not_let_in() {
    let guard = |request: tonic::Request<()>| match request.metadata().get("authorization") {
        Some(token) if token == "secret" => Ok(request),
        _ => Err(Status::unauthenticated("who are you?")),
    };
    for (shared, code) in [(false, Some(Code::Unauthenticated)), (true, None)] {
        let agents = Agents::default();
        let cache = cache_with(|read| if shared { read.credentials(Credentials::Shared) } else { read });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let guarded = InterceptedService::new(agents.clone(), guard);
        let server = Server::builder().layer(cache.grpc_layer()).add_service(guarded);
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        let channel = Endpoint::from_shared(url).unwrap().connect().await.unwrap();
        let mut known = AgentsClient::new(channel.clone(), "t").with("authorization", "secret");
        let mut stranger = AgentsClient::new(channel, "t");
        known.update("1", "first").await.unwrap();
        for _ in 0..2 {
            known.get("1").await.unwrap();
        }
        let reply = stranger.get("1").await;
        // Declared shared with the guard inside, the wrong order serves a stranger: the docs say so.
        assert_eq!(reply.err().map(|status| status.code()), code, "shared: {shared}");
        assert_eq!(agents.reads(), if shared { 1 } else { 2 });
    }
}

type Raw = UnsyncBoxBody<Bytes, std::io::Error>;

fn framed(message: &[u8]) -> Bytes {
    let mut framed = vec![0];
    framed.extend_from_slice(&(message.len() as u32).to_be_bytes());
    framed.extend_from_slice(message);
    framed.into()
}

fn call(path: &str, body: Bytes) -> Request<Full<Bytes>> {
    let request = Request::post(path).header("content-type", "application/grpc").header("x-tenant-id", "t");
    request.body(Full::new(body)).unwrap()
}

fn trailers(code: &'static str) -> Frame<Bytes> {
    Frame::trailers(HeaderMap::from_iter([("grpc-status".parse().unwrap(), HeaderValue::from_static(code))]))
}

fn answer(frames: Vec<Result<Frame<Bytes>, std::io::Error>>) -> Response<Raw> {
    let body = UnsyncBoxBody::new(StreamBody::new(futures_util::stream::iter(frames)));
    Response::builder().header("content-type", "application/grpc").body(body).unwrap()
}

/// What is stored: exactly one message, and a status of 0 at its end.
#[tokio::test]
async fn only_one_whole_message_is_stored() {
    let data = || Ok(Frame::data(framed(b"hello")));
    for (what, frames, stored) in [
        ("whole", vec![data(), Ok(trailers("0"))], true),
        (
            "in pieces",
            vec![
                Ok(Frame::data(framed(b"hello").slice(..3))),
                Ok(Frame::data(framed(b"hello").slice(3..))),
                Ok(trailers("0")),
            ],
            true,
        ),
        ("an error after data", vec![data(), Ok(trailers("13"))], false),
        ("no trailers", vec![data()], false),
        ("two messages", vec![data(), data(), Ok(trailers("0"))], false),
        ("no message", vec![Ok(trailers("0"))], false),
        ("cut short", vec![Ok(Frame::data(framed(b"hello").slice(..7))), Ok(trailers("0"))], false),
        ("broken", vec![data(), Err(std::io::Error::other("broken"))], false),
    ] {
        let calls = Arc::new(AtomicU64::new(0));
        let frames = Arc::new(Mutex::new(Some(frames)));
        let (counted, once) = (calls.clone(), frames.clone());
        let inner = service_fn(move |request: Request<_>| {
            counted.fetch_add(1, Ordering::SeqCst);
            let frames = once.lock().unwrap().take();
            let frames = frames.unwrap_or_else(|| vec![Ok(Frame::data(framed(b"second"))), Ok(trailers("0"))]);
            let _: &Request<_> = &request;
            async { Ok::<_, Infallible>(answer(frames)) }
        });
        let builder =
            Cache::builder("test").tenant_header("x-tenant-id").data_type(DataType::new("agent", Ttl::Standard));
        let service = builder.grpc(GrpcMethod::read(GET, "agent")).build().unwrap().grpc_layer().layer(inner);
        let first = service.clone().oneshot(call(GET, framed(b"1"))).await.unwrap();
        assert!(!first.headers().contains_key("content-length"), "{what}");
        let first = first.into_body().collect().await;
        let second = service.clone().oneshot(call(GET, framed(b"1"))).await.unwrap();
        assert!(!second.headers().contains_key("content-length") && !second.headers().contains_key("age"));
        let second = second.into_body().collect().await.unwrap();
        assert_eq!(calls.load(Ordering::SeqCst), if stored { 1 } else { 2 }, "{what}");
        if stored {
            let first = first.unwrap();
            assert_eq!(second.trailers(), first.trailers());
            assert_eq!(second.to_bytes(), first.to_bytes());
        }
        // Another message is another key.
        service.clone().oneshot(call(GET, framed(b"2"))).await.unwrap().into_body().collect().await.unwrap();
        assert_eq!(calls.load(Ordering::SeqCst), if stored { 2 } else { 3 }, "{what}");
    }
}

/// A call that never comes back is nobody's after a while.
#[tokio::test]
async fn a_call_that_hangs_is_nobodys() {
    let agent = DataType::new("agent", Ttl::Standard).coalesce_timeout(Duration::from_millis(200));
    let builder = Cache::builder("test").tenant_header("x-tenant-id").data_type(agent);
    let calls = Arc::new(AtomicU64::new(0));
    let count = calls.clone();
    let inner = service_fn(move |request: Request<_>| {
        let n = count.fetch_add(1, Ordering::SeqCst);
        let _: &Request<_> = &request;
        async move {
            if n == 0 {
                std::future::pending::<()>().await;
            }
            Ok::<_, Infallible>(answer(vec![Ok(Frame::data(framed(b"x"))), Ok(trailers("0"))]))
        }
    });
    let service = builder.grpc(GrpcMethod::read(GET, "agent")).build().unwrap().grpc_layer().layer(inner);
    let ask = || service.clone().oneshot(call(GET, framed(b"1")));
    let hangs = tokio::spawn(ask());
    while calls.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    let all = futures_util::future::join_all((0..25).map(|_| ask()));
    let all = tokio::time::timeout(Duration::from_secs(20), all).await.expect("they wait for ever");
    assert!(all.iter().all(|response| response.as_ref().unwrap().status() == 200));
    hangs.abort();
}

/// (how a mutation ends, whether it drops): unknown is a write.
#[tokio::test]
async fn a_mutation_is_decided_at_its_trailers() {
    for (ending, drops) in [
        ("0", true),
        ("5", false),
        ("3", false),
        ("6", false),
        ("7", false),
        ("9", false),
        ("16", false),
        ("1", true),
        ("2", true),
        ("8", true),
        ("10", true),
        // tonic says this when its answer is too large to be sent.
        ("11", true),
        ("12", true),
        ("14", true),
        ("15", true),
        ("4", true),
        ("13", true),
        ("none", true),
        ("broken", true),
        ("dropped", true),
        ("headers 3", false),
        ("headers 14", true),
    ] {
        let version = Arc::new(AtomicU64::new(0));
        let inner = service_fn(move |request: Request<_>| {
            let path = request.uri().path().to_owned();
            let _: &Request<_> = &request;
            let version = version.clone();
            async move {
                let data = Ok(Frame::data(framed(version.load(Ordering::SeqCst).to_string().as_bytes())));
                if path == GET {
                    return Ok::<_, Infallible>(answer(vec![data, Ok(trailers("0"))]));
                }
                version.fetch_add(1, Ordering::SeqCst);
                Ok(match ending {
                    "none" => answer(vec![data]),
                    "broken" => answer(vec![data, Err(std::io::Error::other("broken"))]),
                    "dropped" => {
                        let body = futures_util::stream::iter([data]).chain(futures_util::stream::pending());
                        Response::new(UnsyncBoxBody::new(StreamBody::new(body)))
                    }
                    headers if headers.starts_with("headers") => {
                        let mut response = answer(vec![]);
                        let code = HeaderValue::from_static(&headers["headers ".len()..]);
                        response.headers_mut().insert("grpc-status", code);
                        response
                    }
                    code => answer(vec![data, Ok(trailers(code))]),
                })
            }
        });
        let service = cache().grpc_layer().layer(inner);
        let read = async || {
            let id = prost::Message::encode_to_vec(&GetAgent { id: "1".into() });
            let response = service.clone().oneshot(call(GET, framed(&id))).await.unwrap();
            response.into_body().collect().await.unwrap().to_bytes()
        };
        let first = read().await;
        assert_eq!(read().await, first);
        let new = prost::Message::encode_to_vec(&UpdateAgent { id: "1".into(), name: "x".into() });
        let mut body = service.clone().oneshot(call(UPDATE, framed(&new))).await.unwrap().into_body();
        if ending == "dropped" {
            body.frame().await.unwrap().unwrap();
            drop(body);
            while read().await == first {
                tokio::task::yield_now().await;
            }
            continue;
        }
        // Until it is over, what it wrote may not be committed; when its trailers are there, it is dropped.
        while body.frame().await.is_some_and(|frame| frame.is_ok()) {}
        drop(body);
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        assert_eq!(read().await != first, drops, "{ending}");
    }
}

/// A client that cancels after the commit, and a server's deadline, cannot come between the write and its invalidation.
#[tokio::test]
async fn a_cancelled_mutation_still_invalidates() {
    let agents = Agents::default();
    let gate = Arc::new(tokio::sync::Notify::new());
    let committed = Arc::new(AtomicBool::new(false));
    let (inner, g, c) = (agents.clone(), gate.clone(), committed.clone());
    let slow = service_fn(move |request: Request<_>| {
        let (inner, gate, committed) = (inner.clone(), g.clone(), c.clone());
        async move {
            let update = request.uri().path() == UPDATE;
            let response = inner.oneshot(request).await;
            if update {
                committed.store(true, Ordering::SeqCst);
                gate.notified().await;
            }
            response
        }
    });
    let service = cache().grpc_layer().layer(slow);
    let get = prost::Message::encode_to_vec(&GetAgent { id: "1".into() });
    let new = |name: &str| prost::Message::encode_to_vec(&UpdateAgent { id: "1".into(), name: name.into() });
    let send = async |path: &'static str, message: Vec<u8>| {
        let response = service.clone().oneshot(call(path, framed(&message))).await.unwrap();
        response.into_body().collect().await.unwrap().to_bytes()
    };
    gate.notify_one();
    send(UPDATE, new("first")).await;
    committed.store(false, Ordering::SeqCst);
    let first = send(GET, get.clone()).await;
    let cancelled = tokio::time::timeout(Duration::from_millis(20), send(UPDATE, new("second"))).await;
    assert!(cancelled.is_err() && committed.load(Ordering::SeqCst));
    gate.notify_one();
    while send(GET, get.clone()).await == first {
        tokio::task::yield_now().await;
    }
}

/// Scopes and tags of a message meet the cascades that HTTP and jobs use.
#[tokio::test]
async fn cascades_reach_what_a_message_is_about() {
    let calls = Arc::new(AtomicU64::new(0));
    let counted = calls.clone();
    let inner = service_fn(move |request: Request<_>| {
        counted.fetch_add(1, Ordering::SeqCst);
        let _: &Request<_> = &request;
        async { Ok::<_, Infallible>(answer(vec![Ok(Frame::data(framed(b"x"))), Ok(trailers("0"))])) }
    });
    let user = Arc::new(AtomicU64::new(8));
    let of = user.clone();
    let read = GrpcMethod::read(GET, "note").message(move |bytes| {
        let target = GrpcTarget::new(GetAgent::decode(bytes).ok()?.id).scope("agent", "7");
        Some(target.tag("user", of.load(Ordering::SeqCst).to_string()))
    });
    let builder = Cache::builder("test").tenant_header("x-tenant-id").data_type(DataType::new("note", Ttl::Standard));
    let builder = builder
        .data_type(DataType::new("agent", Ttl::Standard))
        .data_type(DataType::new("user", Ttl::Standard))
        .grpc(read);
    let cascades = ["agent", "user"].map(|of| Cascade::new(of).drops(["note"]));
    let cache = cascades.into_iter().fold(builder, |b, cascade| b.cascade(cascade)).build().unwrap();
    let service = cache.grpc_layer().layer(inner);
    let id = prost::Message::encode_to_vec(&GetAgent { id: "1".into() });
    let is_called = async || {
        let before = calls.load(Ordering::SeqCst);
        service.clone().oneshot(call(GET, framed(&id))).await.unwrap().into_body().collect().await.unwrap();
        calls.load(Ordering::SeqCst) > before
    };
    for (data_type, id_of, falls) in
        [("agent", "7", true), ("user", "8", true), ("agent", "8", false), ("note", "1", true)]
    {
        is_called().await;
        assert!(!is_called().await);
        cache.invalidate("t").mutated(data_type, id_of).run().await.unwrap();
        assert_eq!(is_called().await, falls, "{data_type} {id_of}");
    }
    // Tags are no part of the key: what is stored may lack one by which it is to fall now.
    user.store(9, Ordering::SeqCst);
    assert!(is_called().await && !is_called().await);
}

#[test]
fn mistakes_are_refused_with_their_place() {
    let builder = || Cache::builder("test").single_tenant("t").data_type(DataType::new("agent", Ttl::Short));
    for (builder, names, says) in [
        (builder().grpc(GrpcMethod::read("/agents.v1.Agents/GetAgent", "agnet")), "GetAgent", "unknown data type"),
        (builder().grpc(GrpcMethod::read("GetAgent", "agent")), "GetAgent", "/package.Service/Method"),
        (builder().grpc(GrpcMethod::read("agents/v1/GetAgent", "agent")), "GetAgent", "/package.Service/Method"),
        (builder().grpc(GrpcMethod::read(GET, "agent")).grpc(GrpcMethod::read(GET, "agent")), "GetAgent", "twice"),
        (builder().grpc(GrpcMethod::mutation(UPDATE, "agent").include("friends")), "UpdateAgent", "friends"),
        // A list under the type of its rows: no update of one would find it.
        (
            builder()
                .grpc(GrpcMethod::read(GET, "agent"))
                .grpc(GrpcMethod::mutation(UPDATE, "agent").message(|_| Some(GrpcTarget::new("1")))),
            "GetAgent",
            "a type of its own",
        ),
    ] {
        let message = builder.build().map_or_else(|e| e.to_string(), |_| panic!("accepted: {says}"));
        assert!(message.contains(names) && message.contains(says), "{message}");
    }
}

/// A message that does not say whose its answer is: no write of that would find it.
#[tokio::test]
async fn what_no_write_would_find_is_not_stored() {
    let inner = service_fn(|_: Request<_>| async {
        Ok::<_, Infallible>(answer(vec![Ok(Frame::data(framed(b"x"))), Ok(trailers("0"))]))
    });
    for owner in [None, Some("user"), Some("team")] {
        let target = move |bytes: &[u8]| {
            let target = GrpcTarget::new(GetAgent::decode(bytes).ok()?.id);
            Some(match owner {
                Some(owner) => target.tag(owner, "8"),
                None => target,
            })
        };
        let cache = Cache::builder("test")
            .tenant_header("x-tenant-id")
            .data_type(DataType::new("agent", Ttl::Standard))
            .data_type(DataType::new("user", Ttl::Standard))
            .grpc(GrpcMethod::read(GET, "agent").message(target))
            .grpc(GrpcMethod::mutation(UPDATE, "user").message(|_| Some(GrpcTarget::new("8"))))
            .cascade(Cascade::new("user").drops(["agent"]))
            .build()
            .unwrap();
        let service = cache.grpc_layer().layer(inner);
        let message = prost::Message::encode_to_vec(&GetAgent { id: "1".into() });
        let response = service.oneshot(call(GET, framed(&message))).await.unwrap();
        let status = status(&MetadataMap::from_headers(response.into_parts().0.headers));
        let expected = if owner == Some("user") { "fwd=uri-miss; stored" } else { "fwd=bypass; detail=tags" };
        assert_eq!(status, expected, "{owner:?}");
    }
}

/// Spellings of an id, and tags that responses declare, are for gRPC what they are for HTTP.
#[tokio::test]
async fn ids_are_canonical_and_tags_are_declared() {
    let calls = Arc::new(AtomicU64::new(0));
    let (counted, tags) = (calls.clone(), Arc::new(Mutex::new("user=8")));
    let declared = tags.clone();
    let inner = service_fn(move |request: Request<_>| {
        counted.fetch_add(1, Ordering::SeqCst);
        let _: &Request<_> = &request;
        let mut response = answer(vec![Ok(Frame::data(framed(b"x"))), Ok(trailers("0"))]);
        response.headers_mut().insert("cache-tag", declared.lock().unwrap().parse().unwrap());
        async { Ok::<_, Infallible>(response) }
    });
    let target = |bytes: &[u8]| Some(GrpcTarget::new(GetAgent::decode(bytes).ok()?.id));
    let cache = Cache::builder("test")
        .tenant_header("x-tenant-id")
        .data_type(DataType::new("agent", Ttl::Standard))
        .data_type(DataType::new("user", Ttl::Standard))
        .entity("agent", Canonical::Integer)
        .grpc(GrpcMethod::read(GET, "agent").message(target).declares_tags())
        .grpc(GrpcMethod::mutation(UPDATE, "agent").message(target))
        .cascade(Cascade::new("user").drops(["agent"]))
        .build()
        .unwrap();
    let service = cache.grpc_layer().layer(inner);
    let send = async |path: &str, id: &str| {
        let message = prost::Message::encode_to_vec(&GetAgent { id: id.into() });
        let response = service.clone().oneshot(call(path, framed(&message))).await.unwrap();
        assert!(!response.headers().contains_key("cache-tag"), "{path}");
        let (parts, body) = response.into_parts();
        body.collect().await.unwrap();
        status(&MetadataMap::from_headers(parts.headers))
    };
    send(GET, "42").await;
    assert!(send(GET, "042").await.starts_with("hit"));
    send(UPDATE, "+42").await;
    assert_eq!(send(GET, "42").await, "fwd=uri-miss; stored");
    send(UPDATE, "no id").await;
    assert_eq!(send(GET, "42").await, "fwd=uri-miss; stored", "the whole type");
    assert_eq!(send(GET, "no id").await, "fwd=bypass; detail=id");
    cache.invalidate("t").mutated("user", "8").run().await.unwrap();
    *tags.lock().unwrap() = "user = 8";
    for _ in 0..2 {
        assert_eq!(send(GET, "42").await, "fwd=uri-miss; detail=bad-tags");
    }
    assert!(!send("/other.Service/Method", "1").await.starts_with("hit"));
}

/// A service that counts its reads, and drops what is cached of them by a cascade of another type.
fn noted(more: impl Fn(tower_cache_aside::CacheBuilder) -> tower_cache_aside::CacheBuilder) -> Cache {
    let target = |bytes: &[u8]| Some(GrpcTarget::new(GetAgent::decode(bytes).ok()?.id));
    let builder = Cache::builder("test")
        .tenant_header("x-tenant-id")
        .data_type(DataType::new("agent", Ttl::Standard))
        .data_type(DataType::new("list", Ttl::Standard))
        .grpc(GrpcMethod::read(GET, "agent").message(target))
        .grpc(GrpcMethod::read("/agents.v1.Agents/List", "list"))
        .grpc(GrpcMethod::mutation(UPDATE, "agent").message(target))
        .cascade(Cascade::new("agent").all(["list"]).relation("twin", "agent"))
        .resolver("twin", |_, _| async { Ok::<_, Infallible>(vec!["1".to_owned()]) });
    more(builder).build().unwrap()
}

/// What a server takes for a call is a write, however it is framed or spelled; and what cannot be read of it drops its type
/// with what hangs on it.
#[tokio::test]
async fn a_write_is_a_write_however_it_is_framed() {
    let cache = noted(|builder| builder.body_limit(1_000));
    let inner = service_fn(|request: Request<_>| async move {
        let _: Request<_> = request;
        Ok::<_, Infallible>(answer(vec![Ok(Frame::data(framed(b"x"))), Ok(trailers("0"))]))
    });
    let service = cache.grpc_layer().layer(inner);
    let read = async |path: &str, id: &str| {
        let message = prost::Message::encode_to_vec(&GetAgent { id: id.into() });
        let response = service.clone().oneshot(call(path, framed(&message))).await.unwrap();
        let (parts, body) = response.into_parts();
        body.collect().await.unwrap();
        status(&MetadataMap::from_headers(parts.headers)).starts_with("hit")
    };
    let message = framed(&prost::Message::encode_to_vec(&GetAgent { id: "1".into() }));
    let mut compressed = message.to_vec();
    compressed[0] = 1;
    let large = framed(&prost::Message::encode_to_vec(&GetAgent { id: "1".repeat(2_000) }));
    let text: Bytes = Bytes::from_static(b"AAAAAAMKATE=");
    let empty = framed(&prost::Message::encode_to_vec(&GetAgent { id: String::new() }));
    for (method, content_type, body, all) in [
        ("POST", Some("application/grpc"), &message, false),
        ("POST", None, &message, false),
        ("POST", Some("Application/GRPC+proto"), &message, false),
        ("POST", Some("application/grpc-web"), &message, false),
        ("POST", Some("application/proto"), &message, false),
        ("PUT", Some("application/grpc"), &message, false),
        ("GET", Some("application/grpc"), &message, false),
        ("POST", Some("application/grpc-web-text"), &text, true),
        ("POST", Some("application/grpc"), &compressed.into(), true),
        ("POST", Some("application/grpc"), &large, true),
        ("POST", Some("application/grpc"), &empty, true),
    ] {
        for id in ["1", "2"] {
            read(GET, id).await;
            assert!(read(GET, id).await);
        }
        read("/agents.v1.Agents/List", "").await;
        let request = Request::builder().method(method).uri(UPDATE).header("x-tenant-id", "t");
        let request = content_type.into_iter().fold(request, |request, value| request.header("content-type", value));
        let written = service.clone().oneshot(request.body(Full::new(body.clone())).unwrap()).await.unwrap();
        written.into_body().collect().await.unwrap();
        let hits = (read(GET, "1").await, read(GET, "2").await, read("/agents.v1.Agents/List", "").await);
        assert_eq!(hits, (false, !all, false), "{method} {content_type:?} {all}");
    }
}

/// Where the status is a part of the body, the client knows of it before it has been read here: the head waits.
#[tokio::test]
async fn a_write_is_not_acknowledged_before_it_is_dropped() {
    let cache = noted(|builder| builder);
    for (content_type, falls) in [("application/grpc-web+proto", true), ("application/grpc+proto", false)] {
        let inner = service_fn(move |request: Request<_>| async move {
            let _: Request<_> = request;
            let mut response = answer(vec![Ok(Frame::data(framed(b"x"))), Ok(trailers("0"))]);
            response.headers_mut().insert("content-type", content_type.parse().unwrap());
            Ok::<_, Infallible>(response)
        });
        let service = cache.grpc_layer().layer(inner);
        let message = framed(&prost::Message::encode_to_vec(&GetAgent { id: "1".into() }));
        let stored = cache.grpc_layer().layer(service_fn(|request: Request<_>| async move {
            let _: Request<_> = request;
            Ok::<_, Infallible>(answer(vec![Ok(Frame::data(framed(b"x"))), Ok(trailers("0"))]))
        }));
        let read = async || {
            let (parts, body) = stored.clone().oneshot(call(GET, message.clone())).await.unwrap().into_parts();
            body.collect().await.unwrap();
            status(&MetadataMap::from_headers(parts.headers)).starts_with("hit")
        };
        read().await;
        let mut body = service.clone().oneshot(call(UPDATE, message.clone())).await.unwrap().into_body();
        assert_eq!(!read().await, falls, "{content_type}: at the head");
        while body.frame().await.is_some() {}
        assert!(!read().await, "{content_type}: at the end");
    }
}

/// What HTTP takes for somebody's own, gRPC does, too: of the request and of the response.
#[tokio::test]
async fn what_is_somebodys_own_is_not_shared() {
    const NONE: &[(&str, &str)] = &[];
    let declared = |credentials: Credentials| {
        let target = |bytes: &[u8]| Some(GrpcTarget::new(GetAgent::decode(bytes).ok()?.id));
        let get = GrpcMethod::read(GET, "agent").message(target).credentials(credentials);
        let builder = Cache::builder("test").tenant_header("x-tenant-id").credential_headers(["x-session"]);
        builder.data_type(DataType::new("agent", Ttl::Standard)).grpc(get).build().unwrap()
    };
    // Credentials, metadata of the request and of the response, whether the handler keeps the cache out; and what is said of
    // the second of two.
    for (credentials, asks, says, no_cache, expected) in [
        (Credentials::Bypass, NONE, NONE, false, "hit"),
        (Credentials::Bypass, &[("authorization", "x")], NONE, false, "fwd=bypass; detail=credentials"),
        (Credentials::Bypass, &[("cookie", "a=b")], NONE, false, "fwd=bypass; detail=credentials"),
        (Credentials::Bypass, &[("x-api-key", "x")], NONE, false, "fwd=bypass; detail=credentials"),
        (Credentials::Bypass, &[("x-session", "x")], NONE, false, "fwd=bypass; detail=credentials"),
        (Credentials::Shared, &[("authorization", "x"), ("cookie", "a=b")], NONE, false, "hit"),
        (Credentials::Declared, &[("authorization", "x")], NONE, false, "fwd=uri-miss; detail=credentials"),
        (Credentials::Declared, &[("authorization", "x")], &[("cache-control", "public")], false, "hit"),
        (Credentials::per_user("x-user"), &[("x-user", "ada")], NONE, false, "hit"),
        (Credentials::per_user("x-user"), NONE, NONE, false, "fwd=bypass; detail=no-user"),
        (Credentials::Bypass, NONE, &[("set-cookie", "a=b")], false, "fwd=uri-miss; detail=set-cookie"),
        (Credentials::Bypass, NONE, &[("cache-control", "no-store")], false, "fwd=uri-miss; detail=no-store"),
        (Credentials::Bypass, NONE, &[("cache-control", "private")], false, "fwd=uri-miss; detail=private"),
        (Credentials::Bypass, NONE, &[("vary", "accept-language")], false, "fwd=uri-miss; detail=vary"),
        (Credentials::Bypass, NONE, NONE, true, "fwd=uri-miss; detail=no-cache"),
    ] {
        let cache = declared(credentials.clone());
        let inner = service_fn(move |request: Request<_>| async move {
            let _: Request<_> = request;
            let mut response = answer(vec![Ok(Frame::data(framed(b"x"))), Ok(trailers("0"))]);
            for (name, value) in says {
                response.headers_mut().append(*name, value.parse().unwrap());
            }
            response.headers_mut().append("cache-tag", "agent=1".parse().unwrap());
            if no_cache {
                response.extensions_mut().insert(NoCache);
            }
            Ok::<_, Infallible>(response)
        });
        let service = cache.grpc_layer().layer(inner);
        let send = async |more: &[(&'static str, &str)], passes: bool| {
            let mut request = call(GET, framed(&prost::Message::encode_to_vec(&GetAgent { id: "1".into() })));
            for (name, value) in more {
                request.headers_mut().append(*name, value.parse().unwrap());
            }
            if passes {
                request.extensions_mut().insert(NoCache);
            }
            let (parts, body) = service.clone().oneshot(request).await.unwrap().into_parts();
            body.collect().await.unwrap();
            assert!(!parts.headers.contains_key("cache-tag"), "what is declared is not the client's");
            status(&MetadataMap::from_headers(parts.headers))
        };
        send(asks, false).await;
        let found = send(asks, false).await;
        assert!(found.starts_with(expected), "{credentials:?} {asks:?} {says:?}: {found}");
        if let Some((_, user)) = asks.iter().find(|(name, _)| *name == "x-user") {
            assert!(!send(&[("x-user", "grace")], false).await.starts_with("hit"), "it is {user}'s");
        }
        if found.starts_with("hit") {
            assert!(send(asks, true).await.starts_with("fwd=bypass; detail=no-cache"));
        }
    }
}

/// Clients that balance by themselves name each server; a method may say that its answers name the host.
#[tokio::test]
async fn a_host_is_no_part_of_a_call_unless_it_is_asked_for() {
    for per_host in [false, true] {
        let cache = cache_with(|read| if per_host { read.per_host() } else { read });
        let inner = service_fn(|request: Request<_>| async move {
            let _: Request<_> = request;
            Ok::<_, Infallible>(answer(vec![Ok(Frame::data(framed(b"x"))), Ok(trailers("0"))]))
        });
        let service = cache.grpc_layer().layer(inner);
        let send = async |authority: &str| {
            let mut request = call(GET, framed(&prost::Message::encode_to_vec(&GetAgent { id: "1".into() })));
            *request.uri_mut() = format!("http://{authority}{GET}").parse().unwrap();
            let (parts, body) = service.clone().oneshot(request).await.unwrap().into_parts();
            body.collect().await.unwrap();
            status(&MetadataMap::from_headers(parts.headers)).starts_with("hit")
        };
        assert!(!send("10.0.0.1:50051").await && send("10.0.0.1:50051").await);
        assert_eq!(send("10.0.0.2:50051").await, !per_host);
    }
}

/// The example serves clients of any language, and stays until it is stopped.
#[tokio::test]
async fn the_example_serves_others() {
    let mut child = std::process::Command::new(example("tonic_agents"))
        .args(["--listen", "127.0.0.1:0"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.take().unwrap()), &mut line).unwrap();
    let url = line.trim().strip_prefix("listening on ").expect("the first line names the address").to_owned();
    let channel = Endpoint::from_shared(url).unwrap().connect().await.unwrap();
    let mut client = AgentsClient::new(channel, "t");
    client.update("1", "Ada").await.unwrap();
    for is_hit in [false, true] {
        let reply = client.get("1").await.unwrap();
        assert_eq!((reply.get_ref().name.as_str(), status(reply.metadata()).starts_with("hit")), ("Ada", is_hit));
    }
    assert_eq!(client.get("none").await.unwrap_err().code(), Code::NotFound);
    child.kill().unwrap();
    child.wait().unwrap();
}

/// A body that never says anything is no message, and takes no room.
#[tokio::test]
async fn a_message_of_nothing_is_passed_on() {
    let cache = noted(|builder| builder.body_limit(1_000));
    let inner = service_fn(|request: Request<_>| async move {
        let _: Request<_> = request;
        Ok::<_, Infallible>(answer(vec![Ok(Frame::data(framed(b"x"))), Ok(trailers("0"))]))
    });
    for path in [GET, UPDATE] {
        let nothing = futures_util::stream::repeat_with(|| Ok::<_, std::io::Error>(Frame::data(Bytes::new())));
        let request = call(path, Bytes::new()).map(|_| StreamBody::new(nothing));
        let response = cache.grpc_layer().layer(inner).oneshot(request).await.unwrap();
        assert!(response.into_body().collect().await.is_ok(), "{path}");
    }
}

/// A mutation whose answer breaks may be committed: its client hears of that when all is dropped.
#[tokio::test]
async fn a_broken_answer_waits_for_the_invalidation() {
    let cache = noted(|builder| builder);
    let inner = service_fn(|request: Request<_>| async move {
        let _: &Request<_> = &request;
        let last = if request.uri().path() == GET { Ok(trailers("0")) } else { Err(std::io::Error::other("lost")) };
        Ok::<_, Infallible>(answer(vec![Ok(Frame::data(framed(b"x"))), last]))
    });
    let service = cache.grpc_layer().layer(inner);
    let message = framed(&prost::Message::encode_to_vec(&GetAgent { id: "1".into() }));
    let send = async |path: &str| {
        let (parts, body) = service.clone().oneshot(call(path, message.clone())).await.unwrap().into_parts();
        (status(&MetadataMap::from_headers(parts.headers)).starts_with("hit"), body.collect().await.is_ok())
    };
    send(GET).await;
    assert_eq!(send(GET).await, (true, true));
    assert!(!send(UPDATE).await.1);
    assert!(!send(GET).await.0);
}

/// Calls that a layer of HTTP sees on their way are the other layer's: a read is no write of nobody knows what.
#[tokio::test]
async fn reads_are_no_writes_to_the_layers_of_http() {
    let cache = noted(|builder| builder.on_unmapped(OnUnmapped::Drop));
    let inner = service_fn(|request: Request<_>| async move {
        let _: Request<_> = request;
        Ok::<_, Infallible>(answer(vec![Ok(Frame::data(framed(b"x"))), Ok(trailers("0"))]))
    });
    let service = cache.invalidate_layer().layer(cache.grpc_layer().layer(inner));
    let read = async |path: &str| {
        let message = framed(&prost::Message::encode_to_vec(&GetAgent { id: "1".into() }));
        let (parts, body) = service.clone().oneshot(call(path, message)).await.unwrap().into_parts();
        body.collect().await.unwrap();
        status(&MetadataMap::from_headers(parts.headers)).starts_with("hit")
    };
    read(GET).await;
    assert!(read(GET).await && !read("/agents.v1.Agents/List").await);
    assert!(read(GET).await);
    read("/agents.v1.Agents/Unknown").await;
    assert!(!read(GET).await, "what nobody has declared may be a write");
}

/// What a call in this process has become a part of falls with it.
#[tokio::test]
async fn what_is_made_of_a_call_falls_with_it() {
    let cache = noted(|builder| {
        let digest = tower_cache_aside::Route::new("/digests/{digest_id}", "digest");
        builder.data_type(DataType::new("digest", Ttl::Standard)).route(digest)
    });
    let calls = Arc::new(AtomicU64::new(0));
    let count = calls.clone();
    let agents = cache.grpc_layer().layer(service_fn(move |request: Request<_>| {
        count.fetch_add(1, Ordering::SeqCst);
        let _: &Request<_> = &request;
        async { Ok::<_, Infallible>(answer(vec![Ok(Frame::data(framed(b"x"))), Ok(trailers("0"))])) }
    }));
    let digests = cache.layer().layer(service_fn(move |_: Request<Full<Bytes>>| {
        let agents = agents.clone();
        async move {
            let message = prost::Message::encode_to_vec(&GetAgent { id: "1".into() });
            let agent = agents.oneshot(call(GET, framed(&message))).await.unwrap();
            agent.into_body().collect().await.unwrap();
            Ok::<_, Infallible>(Response::new(Full::new(Bytes::from("digest"))))
        }
    }));
    let is_hit = async |id: &str| {
        let request = Request::get(format!("/digests/{id}")).header("x-tenant-id", "t").body(Full::default()).unwrap();
        let response = digests.clone().oneshot(request).await.unwrap();
        let outcome = response.extensions().get::<tower_cache_aside::Outcome>().unwrap().outcome;
        response.into_body().collect().await.unwrap();
        outcome == tower_cache_aside::Handling::Hit
    };
    for _ in 0..2 {
        // One loads the agent, and one finds it.
        assert!(!is_hit("1").await && !is_hit("2").await);
        assert!(is_hit("1").await && is_hit("2").await);
        cache.invalidate("t").mutated("agent", "1").run().await.unwrap();
    }
    assert_eq!(calls.load(Ordering::SeqCst), 2);
}

/// Handlers of any call say what they change, and those of reads what they depend on.
#[tokio::test]
async fn handlers_of_calls_say_what_they_change() {
    const JOB: &str = "/agents.v1.Agents/Job";
    let cache = noted(|builder| builder.data_type(DataType::new("user", Ttl::Standard)));
    let inner = service_fn(|request: Request<_>| async move {
        let what = request.headers().get("do").map_or("", |v| v.to_str().unwrap()).to_owned();
        let path = request.uri().path().to_owned();
        let _: &Request<_> = &request;
        let changes = request.extensions().get::<Changes>().cloned();
        if path == GET {
            assert!(changes.is_none());
            depends_on("user", 7);
        }
        match &*what {
            "one" => _ = changes.unwrap().mutated("agent", 1),
            "include" => _ = changes.unwrap().include("twin"),
            "function" => changed("agent", 1),
            "user" => changed("user", 7),
            "nothing" => _ = changes.unwrap().nothing(),
            // When its head has been sent already.
            "late" => {
                let changes = changes.unwrap();
                let last = futures_util::stream::once(async move {
                    tokio::task::yield_now().await;
                    changes.mutated("agent", 1);
                    Ok(trailers("0"))
                });
                let frames = futures_util::stream::iter([Ok(Frame::data(framed(b"x")))]).chain(last);
                return Ok::<_, Infallible>(Response::new(UnsyncBoxBody::new(StreamBody::new(frames))));
            }
            _ => {}
        }
        let code = request.headers().get("then").map_or("0", |v| if v == "fail" { "13" } else { "9" });
        Ok::<_, Infallible>(answer(vec![Ok(Frame::data(framed(b"x"))), Ok(trailers(code))]))
    });
    let service = cache.grpc_layer().layer(inner);
    let send = async |path: &str, id: &str, what: &str, then: &str| {
        let message = prost::Message::encode_to_vec(&GetAgent { id: id.into() });
        let mut request = call(path, framed(&message));
        request.headers_mut().insert("do", what.parse().unwrap());
        if !then.is_empty() {
            request.headers_mut().insert("then", then.parse().unwrap());
        }
        let (parts, body) = service.clone().oneshot(request).await.unwrap().into_parts();
        assert!(body.collect().await.unwrap().trailers().is_some());
        status(&MetadataMap::from_headers(parts.headers)).starts_with("hit")
    };
    for (path, what, then, falls) in [
        (JOB, "one", "", [true, false]),
        (JOB, "function", "", [true, false]),
        (JOB, "late", "", [true, false]),
        (JOB, "one", "refuse", [true, false]),
        (JOB, "one", "fail", [true, false]),
        (JOB, "", "", [false, false]),
        (JOB, "", "fail", [false, false]),
        (JOB, "user", "", [true, true]),
        (UPDATE, "", "", [false, true]),
        (UPDATE, "one", "", [true, true]),
        (UPDATE, "include", "", [true, true]),
        (UPDATE, "nothing", "", [false, false]),
        (UPDATE, "nothing", "fail", [false, true]),
        (UPDATE, "", "refuse", [false, false]),
    ] {
        for id in ["1", "2"] {
            send(GET, id, "", "").await;
            assert!(send(GET, id, "", "").await);
        }
        send(path, "2", what, then).await;
        let fallen = [!send(GET, "1", "", "").await, !send(GET, "2", "", "").await];
        assert_eq!(fallen, falls, "{path} {what} {then}");
    }
}
