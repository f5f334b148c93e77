//! A gRPC service of agents, written by hand so that nothing needs protoc, and its client. It knows nothing of caching.

use std::{
    collections::HashMap,
    convert::Infallible,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::Body;
use tokio_stream::{Stream, StreamExt};
use tonic::{
    Request, Response, Status, Streaming,
    body::Body as TonicBody,
    client::Grpc as Client,
    codec::{CompressionEncoding, EnabledCompressionEncodings},
    codegen::http::uri::PathAndQuery,
    server::{Grpc as Server, NamedService},
    transport::Channel,
};
use tonic_prost::ProstCodec;
use tower::{Service, service_fn};

pub const GET: &str = "/agents.v1.Agents/GetAgent";
pub const UPDATE: &str = "/agents.v1.Agents/UpdateAgent";
pub const WATCH: &str = "/agents.v1.Agents/WatchAgent";
pub const CHAT: &str = "/agents.v1.Agents/Chat";

#[derive(Clone, PartialEq, prost::Message)]
pub struct GetAgent {
    #[prost(string, tag = "1")]
    pub id: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct UpdateAgent {
    #[prost(string, tag = "1")]
    pub id: String,
    #[prost(string, tag = "2")]
    pub name: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Agent {
    #[prost(string, tag = "1")]
    pub id: String,
    #[prost(string, tag = "2")]
    pub name: String,
    #[prost(uint64, tag = "3")]
    pub version: u64,
}

/// The service; its clones share one database.
#[derive(Clone, Default)]
pub struct Agents(Arc<Database>);

#[derive(Default)]
struct Database {
    /// By tenant and id.
    agents: Mutex<HashMap<(String, String), Agent>>,
    reads: AtomicU64,
}

impl Agents {
    /// How often the database was read.
    pub fn reads(&self) -> u64 {
        self.0.reads.load(Ordering::SeqCst)
    }

    fn get(&self, tenant: String, id: String) -> Result<Agent, Status> {
        self.0.reads.fetch_add(1, Ordering::SeqCst);
        let agents = self.0.agents.lock().unwrap_or_else(PoisonError::into_inner);
        agents.get(&(tenant, id)).cloned().ok_or_else(|| Status::not_found("no such agent"))
    }

    fn update(&self, tenant: String, change: UpdateAgent) -> Result<Agent, Status> {
        if change.name.is_empty() {
            return Err(Status::invalid_argument("an agent needs a name"));
        }
        let mut agents = self.0.agents.lock().unwrap_or_else(PoisonError::into_inner);
        let agent = agents.entry((tenant, change.id.clone())).or_default();
        *agent = Agent { id: change.id, name: change.name, version: agent.version + 1 };
        Ok(agent.clone())
    }
}

fn tenant<T>(request: &Request<T>) -> Result<String, Status> {
    let tenant = request.metadata().get("x-tenant-id").and_then(|tenant| tenant.to_str().ok());
    tenant.map(str::to_owned).ok_or_else(|| Status::invalid_argument("x-tenant-id is missing"))
}

type Answers = Pin<Box<dyn Stream<Item = Result<Agent, Status>> + Send>>;

impl NamedService for Agents {
    const NAME: &'static str = "agents.v1.Agents";
}

impl<B> Service<http::Request<B>> for Agents
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send + 'static,
{
    type Response = http::Response<TonicBody>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            let mut gzip = EnabledCompressionEncodings::default();
            gzip.enable(CompressionEncoding::Gzip);
            Ok(match request.uri().path() {
                GET => {
                    let get = service_fn(move |request: Request<GetAgent>| {
                        let agent = tenant(&request).and_then(|t| this.get(t, request.into_inner().id));
                        async { agent.map(Response::new) }
                    });
                    let mut server = Server::new(ProstCodec::default()).apply_compression_config(gzip, gzip);
                    server.unary(get, request).await
                }
                UPDATE => {
                    let update = service_fn(move |request: Request<UpdateAgent>| {
                        let agent = tenant(&request).and_then(|t| this.update(t, request.into_inner()));
                        async { agent.map(Response::new) }
                    });
                    Server::new(ProstCodec::default()).unary(update, request).await
                }
                WATCH => {
                    let watch = service_fn(move |request: Request<GetAgent>| {
                        let first = tenant(&request).and_then(|t| this.get(t, request.into_inner().id));
                        let rest = tokio_stream::pending();
                        let answers: Answers = Box::pin(tokio_stream::once(first).chain(rest));
                        async { Ok::<_, Status>(Response::new(answers)) }
                    });
                    Server::new(ProstCodec::default()).server_streaming(watch, request).await
                }
                CHAT => {
                    let chat = service_fn(move |request: Request<Streaming<GetAgent>>| {
                        let this = this.clone();
                        let tenant = tenant(&request);
                        let answers: Answers =
                            Box::pin(request.into_inner().map(move |asked| this.get(tenant.clone()?, asked?.id)));
                        async { Ok::<_, Status>(Response::new(answers)) }
                    });
                    Server::new(ProstCodec::default()).streaming(chat, request).await
                }
                _ => Status::unimplemented("no such method").into_http(),
            })
        })
    }
}

/// A client of one tenant.
#[derive(Clone)]
pub struct AgentsClient {
    client: Client<Channel>,
    tenant: String,
    headers: Vec<(&'static str, String)>,
}

impl AgentsClient {
    pub fn new(channel: Channel, tenant: &str) -> Self {
        Self { client: Client::new(channel), tenant: tenant.to_owned(), headers: vec![] }
    }

    /// Accepts gzip.
    #[allow(dead_code)]
    pub fn gzip(mut self) -> Self {
        self.client = self.client.accept_compressed(CompressionEncoding::Gzip);
        self
    }

    /// Adds a header to every request.
    #[allow(dead_code)]
    pub fn with(mut self, name: &'static str, value: &str) -> Self {
        self.headers.push((name, value.to_owned()));
        self
    }

    fn request<T>(&self, message: T) -> Result<Request<T>, Status> {
        let mut request = Request::new(message);
        let invalid = |_| Status::invalid_argument("a header that is none");
        request.metadata_mut().insert("x-tenant-id", self.tenant.parse().map_err(invalid)?);
        for (name, value) in &self.headers {
            request.metadata_mut().insert(*name, value.parse().map_err(invalid)?);
        }
        Ok(request)
    }

    async fn ready(&mut self) -> Result<(), Status> {
        self.client.ready().await.map_err(|e| Status::unavailable(e.to_string()))
    }

    pub async fn get(&mut self, id: &str) -> Result<Response<Agent>, Status> {
        self.ready().await?;
        let request = self.request(GetAgent { id: id.to_owned() })?;
        self.client.unary(request, PathAndQuery::from_static(GET), ProstCodec::default()).await
    }

    pub async fn update(&mut self, id: &str, name: &str) -> Result<Response<Agent>, Status> {
        self.ready().await?;
        let request = self.request(UpdateAgent { id: id.to_owned(), name: name.to_owned() })?;
        self.client.unary(request, PathAndQuery::from_static(UPDATE), ProstCodec::default()).await
    }

    #[allow(dead_code)]
    pub async fn watch(&mut self, id: &str) -> Result<Streaming<Agent>, Status> {
        self.ready().await?;
        let request = self.request(GetAgent { id: id.to_owned() })?;
        let path = PathAndQuery::from_static(WATCH);
        Ok(self.client.server_streaming(request, path, ProstCodec::default()).await?.into_inner())
    }

    #[allow(dead_code)]
    pub async fn chat<S>(&mut self, asked: S) -> Result<Streaming<Agent>, Status>
    where
        S: Stream<Item = GetAgent> + Send + 'static,
    {
        self.ready().await?;
        let request = self.request(asked)?;
        let path = PathAndQuery::from_static(CHAT);
        Ok(self.client.streaming(request, path, ProstCodec::default()).await?.into_inner())
    }
}
