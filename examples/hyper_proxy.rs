//! A caching reverse proxy in front of any URL: a plain hyper server, whose inner service is a hyper client.
//!
//! `cargo run --release --example hyper_proxy -- --upstream http://127.0.0.1:8000 --listen 127.0.0.1:8080`
//!
//! It takes the origin at its word: what is fresh, and for how long, is what the responses' headers say (RFC 9111).
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::{convert::Infallible, net::SocketAddr, process::ExitCode, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Uri, header, uri::PathAndQuery};
use http_body_util::{BodyExt, Empty, combinators::UnsyncBoxBody};
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
    service::TowerToHyperService,
};
use lexopt::{Arg, ValueExt};
use tokio::net::TcpListener;
use tower::{Layer, ServiceExt, service_fn};
use tower_cache_aside::{Cache, Credentials, DataType, Freshness, Mutation, Route};

const USAGE: &str = "\
A caching reverse proxy.

Usage: hyper_proxy --upstream URL [FLAGS]

    --upstream URL              # where requests go that the cache does not answer, such as http://127.0.0.1:8000
    [--listen 127.0.0.1:8080]   # port 0 picks a free one; the first line on stdout is: listening on http://ADDR
    [--preset rfc]              # responses say how long they are fresh (RFC 9111); the only preset, and the default
    [--uncached PREFIX]         # paths that begin with this are not cached; may be repeated
    [--help]                    # prints this
";

type Body = UnsyncBoxBody<Bytes, hyper::Error>;

struct Args {
    upstream: Uri,
    listen: SocketAddr,
    uncached: Vec<String>,
}

/// `None`: only the usage was asked for.
fn parse() -> Result<Option<Args>, String> {
    let mut parser = lexopt::Parser::from_env();
    let (mut upstream, mut listen, mut uncached) = (None, SocketAddr::from(([127, 0, 0, 1], 8080)), vec![]);
    while let Some(arg) = parser.next().map_err(|e| e.to_string())? {
        let name = match arg {
            Arg::Long("help") | Arg::Short('h') => return Ok(None),
            Arg::Long(name) => name.to_owned(),
            other => return Err(format!("{}; --help lists the flags", other.unexpected())),
        };
        let value = parser.value().and_then(|v| v.string()).map_err(|e| format!("--{name}: {e}"))?;
        let refused = |what: &str| format!("--{name}: {value:?} is not accepted; give {what}");
        match name.as_str() {
            "upstream" => {
                let uri: Option<Uri> = value.parse().ok();
                let uri = uri.filter(|uri| uri.scheme_str() == Some("http") && uri.authority().is_some());
                upstream = Some(uri.ok_or_else(|| refused("a URL such as http://127.0.0.1:8000"))?);
            }
            "listen" => listen = value.parse().map_err(|_| refused("IP:PORT"))?,
            "preset" if value == "rfc" => {}
            "preset" => return Err(refused("rfc")),
            "uncached" if value.starts_with('/') => uncached.push(value),
            "uncached" => return Err(refused("a path that begins with /")),
            other => return Err(format!("unknown flag --{other}; --help lists the flags")),
        }
    }
    let upstream = upstream.ok_or("--upstream is missing; give a URL such as http://127.0.0.1:8000")?;
    Ok(Some(Args { upstream, listen, uncached }))
}

/// One tenant, pages and the one that has no name, and nothing fresh that does not say so.
fn cache() -> Result<Cache, tower_cache_aside::ConfigError> {
    let page = |name| DataType::new(name, Duration::ZERO).freshness(Freshness::Response).stores_cookies();
    let route = |path, data_type| Route::new(path, data_type).credentials(Credentials::Declared);
    // An error changes nothing (RFC 9111, section 4.4); what is a gateway's word is no such error.
    let mutation = |path| Mutation::any(path).follows_locations().refuses_with([500, 501]);
    Cache::builder("hyper_proxy")
        .single_tenant("proxy")
        .data_type(page("page"))
        .data_type(page("home"))
        .route(route("/{*path}", "page"))
        .route(route("/", "home"))
        .mutation(mutation("/{*path}").mutates("page").entity("path", "path"))
        .mutation(mutation("/").all("home"))
        .targeted_header("cdn-cache-control")
        .request_directives(true)
        .entity_tags(false)
        .build()
}

/// The same request, to the upstream.
fn redirect<B>(mut request: Request<B>, upstream: &Uri) -> Request<B> {
    let path = request.uri().path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
    let mut parts = upstream.clone().into_parts();
    parts.path_and_query = Some(path);
    if let Ok(uri) = Uri::from_parts(parts) {
        *request.uri_mut() = uri;
    }
    *request.version_mut() = http::Version::HTTP_11;
    if let Some(host) = upstream.authority().and_then(|host| HeaderValue::from_str(host.as_str()).ok()) {
        request.headers_mut().insert(header::HOST, host);
    }
    request
}

/// What is for the next hop alone (RFC 9110, section 7.6.1): what the sender says is, and what always is. (hyper speaks of an
/// upgrade anew.)
fn strip_hops(headers: &mut HeaderMap) {
    let named = headers.get_all(header::CONNECTION).iter().filter_map(|line| line.to_str().ok());
    let named: Vec<_> = named.flat_map(|line| line.split(',')).map(|name| name.trim().to_ascii_lowercase()).collect();
    let always = ["connection", "keep-alive", "proxy-authorization", "proxy-connection", "te", "transfer-encoding"];
    for name in named.iter().map(String::as_str).filter(|name| *name != "upgrade").chain(always) {
        headers.remove(name);
    }
}

fn bad_gateway() -> Response<Body> {
    let nothing = Empty::new().map_err(|never: Infallible| match never {});
    let mut response = Response::new(UnsyncBoxBody::new(nothing));
    *response.status_mut() = StatusCode::BAD_GATEWAY;
    response
}

async fn run(args: Args) -> Result<(), String> {
    let Args { upstream, listen, uncached } = args;
    let cache = cache().map_err(|e| e.to_string())?;
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    let client = Client::builder(TokioExecutor::new()).build::<_, Incoming>(connector);
    let origin = service_fn(move |request: Request<Incoming>| {
        let (client, request) = (client.clone(), redirect(request, &upstream));
        async move { client.request(request).await }
    });
    let cached = cache.invalidate_layer().layer(cache.layer().layer(origin.clone()));
    let proxy = service_fn(move |mut request: Request<Incoming>| {
        // Before the cache sees it: what the origin does not get, no response depends on.
        strip_hops(request.headers_mut());
        let pass = uncached.iter().any(|prefix| request.uri().path().starts_with(prefix.as_str()));
        let (cached, origin) = (cached.clone(), origin.clone());
        async move {
            let result = if pass {
                origin.oneshot(request).await.map(|response| response.map(UnsyncBoxBody::new))
            } else {
                cached.oneshot(request).await.map(|response| response.map(UnsyncBoxBody::new))
            };
            Ok::<Response<Body>, Infallible>(result.unwrap_or_else(|_| bad_gateway()))
        }
    });
    let listener = TcpListener::bind(listen).await.map_err(|e| format!("--listen: cannot listen on {listen}: {e}"))?;
    let address = listener.local_addr().map_err(|e| e.to_string())?;
    println!("listening on http://{address}");
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // Out of file descriptors: some will be free again.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let _ = stream.set_nodelay(true);
        let service = TowerToHyperService::new(proxy.clone());
        tokio::spawn(async move {
            let server = auto::Builder::new(TokioExecutor::new());
            // A client that goes away is no error.
            let _ = server.serve_connection_with_upgrades(TokioIo::new(stream), service).await;
        });
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let result = match parse() {
        Ok(None) => {
            print!("{USAGE}");
            Ok(())
        }
        Ok(Some(args)) => run(args).await,
        Err(reason) => Err(reason),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("hyper_proxy: {}", reason.replace(['\n', '\r'], " "));
            ExitCode::from(2)
        }
    }
}
