//! A tonic server behind the cache, and a client that shows what happens: a miss, a hit, a mutation, and the miss after it.
//!
//! `cargo run --release --example tonic_agents`, or with `--listen 127.0.0.1:50051` for clients of any language.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod service;

use std::{error::Error, net::SocketAddr, process::ExitCode};

use lexopt::{Arg, ValueExt};
use prost::Message;
use service::{Agent, Agents, AgentsClient, GET, GetAgent, UPDATE, UpdateAgent};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{
    Response,
    transport::{Endpoint, Server},
};
use tower_cache_aside::{Cache, DataType, GrpcMethod, GrpcTarget, Ttl};

/// Everything about caching: which methods, by what, and whose.
fn cache() -> Result<Cache, tower_cache_aside::ConfigError> {
    Cache::builder("tonic_agents")
        .tenant_header("x-tenant-id")
        .report_header(true)
        .data_type(DataType::new("agent", Ttl::Standard))
        .grpc(GrpcMethod::read(GET, "agent").message(|bytes| Some(GrpcTarget::new(GetAgent::decode(bytes).ok()?.id))))
        .grpc(
            GrpcMethod::mutation(UPDATE, "agent")
                .message(|bytes| Some(GrpcTarget::new(UpdateAgent::decode(bytes).ok()?.id))),
        )
        .build()
}

fn show(what: &str, response: &Response<Agent>) {
    let said = |name: &str| response.metadata().get(name).and_then(|v| v.to_str().ok()).unwrap_or("-").to_owned();
    let Agent { name, version, .. } = response.get_ref();
    println!("{what:28} {name:8} v{version}  {}  dropped: {}", said("cache-status"), said("cache-invalidated"));
}

const USAGE: &str = "\
A tonic server behind the cache.

Usage: tonic_agents [--listen ADDR]

    [--listen 127.0.0.1:50051]  # serves until it is stopped, for clients of any language; port 0 picks a free one, and the
                                # first line on stdout is: listening on http://ADDR
                                # without it, a client of its own shows what happens
";

/// Where to listen, if not for a client of its own; `None` if only the usage was asked for.
fn parse() -> Result<Option<Option<SocketAddr>>, lexopt::Error> {
    let (mut parser, mut listen) = (lexopt::Parser::from_env(), None);
    while let Some(arg) = parser.next()? {
        match arg {
            Arg::Long("listen") => listen = Some(parser.value()?.parse()?),
            Arg::Long("help") | Arg::Short('h') => return Ok(None),
            other => return Err(other.unexpected()),
        }
    }
    Ok(Some(listen))
}

#[tokio::main]
async fn main() -> ExitCode {
    let result = match parse() {
        Ok(None) => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Ok(Some(listen)) => run(listen).await.map_err(|e| e.to_string()),
        Err(error) => Err(format!("{error}; --help lists the flags")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("{reason}");
            ExitCode::from(2)
        }
    }
}

async fn run(listen: Option<SocketAddr>) -> Result<(), Box<dyn Error>> {
    let agents = Agents::default();
    let address = listen.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 0)));
    let listener =
        TcpListener::bind(address).await.map_err(|e| format!("--listen: cannot listen on {address}: {e}"))?;
    let address = listener.local_addr()?;
    // Authorization, if there is any, goes outside the cache: a hit never reaches what is inside.
    let server = Server::builder().layer(cache()?.grpc_layer()).add_service(agents.clone());
    let serving = server.serve_with_incoming(TcpListenerStream::new(listener));
    println!("listening on http://{address}");
    if listen.is_some() {
        return Ok(serving.await?);
    }
    tokio::spawn(serving);
    show_all(address, &agents).await
}

async fn show_all(address: SocketAddr, agents: &Agents) -> Result<(), Box<dyn Error>> {
    let channel = Endpoint::from_shared(format!("http://{address}"))?.connect().await?;
    let mut acme = AgentsClient::new(channel.clone(), "acme");
    let mut other = AgentsClient::new(channel, "other");
    show("acme creates an agent", &acme.update("42", "first").await?);
    other.update("42", "theirs").await?;
    show("acme reads it: a miss", &acme.get("42").await?);
    show("again: a hit", &acme.get("42").await?);
    show("another tenant reads its own", &other.get("42").await?);
    show("acme changes it", &acme.update("42", "second").await?);
    show("acme reads it: a miss", &acme.get("42").await?);
    show("the other one's is a hit", &other.get("42").await?);
    println!("{} reads of the database", agents.reads());
    Ok(())
}
