//! A tonic server behind the cache, and a client that shows what happens: a miss, a hit, a mutation, and the miss after it.
//!
//! `cargo run --release --example tonic_agents`
#![allow(clippy::print_stdout)]

mod service;

use std::error::Error;

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

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let agents = Agents::default();
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    // Authorization, if there is any, goes outside the cache: a hit never reaches what is inside.
    let server = Server::builder().layer(cache()?.grpc_layer()).add_service(agents.clone());
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    println!("serving on http://{address}");

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
