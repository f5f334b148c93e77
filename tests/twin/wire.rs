//! How a request reaches a twin, and what comes back: in this process, or over a socket by HTTP/1.1 or HTTP/2.

use std::{
    io,
    net::SocketAddr,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use futures_util::FutureExt;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response};
use http_body_util::{BodyExt, combinators::UnsyncBoxBody};
use hyper::client::conn::http2::SendRequest;
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time::timeout,
};
use tower::{ServiceExt, util::BoxCloneSyncService};

use super::world::{Asked, Body, full};

/// A whole service, as its server has it.
pub type Front = BoxCloneSyncService<Request<Body>, Response<Body>, io::Error>;

/// Longer than anything here takes, unless it hangs.
const LONG: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Protocol {
    InProcess,
    One,
    Two,
}

/// What a client makes of an answer.
#[derive(Clone, Debug)]
pub enum Reply {
    Whole(Box<Whole>),
    /// There is none, or it ends too early: how much of it came, nobody promises.
    Broken,
}

#[derive(Clone, Debug)]
pub struct Whole {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Bytes,
    pub trailers: HeaderMap,
}

impl Reply {
    pub fn header(&self, name: &str) -> &str {
        match self {
            Self::Whole(whole) => whole.headers.get(name).map_or("", |value| value.to_str().unwrap()),
            Self::Broken => "",
        }
    }

    /// This cache's `Cache-Status`, without its name.
    pub fn cache_status(&self) -> &str {
        let status = self.header("cache-status");
        status.strip_prefix("tower-cache-aside; ").unwrap_or(status)
    }

    pub fn is_hit(&self) -> bool {
        self.cache_status().starts_with("hit")
    }
}

/// The way to one service. Its server ends with the last of these.
#[derive(Clone)]
pub struct Wire {
    front: Front,
    protocol: Protocol,
    server: Option<Arc<Server>>,
}

struct Server {
    address: SocketAddr,
    task: JoinHandle<()>,
    two: Mutex<Option<SendRequest<Body>>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Wire {
    pub async fn new(front: Front, protocol: Protocol) -> Self {
        let server = match protocol {
            Protocol::InProcess => None,
            Protocol::One | Protocol::Two => Some(Arc::new(Server::start(front.clone()).await)),
        };
        Self { front, protocol, server }
    }

    pub async fn send(&self, asked: &Asked) -> Reply {
        let sent = async {
            match &self.server {
                None => in_process(&self.front, asked).await,
                Some(server) if self.protocol == Protocol::One && !asked.is_grpc() => server.one(asked).await,
                Some(server) => server.two(asked).await,
            }
        };
        timeout(LONG, sent).await.unwrap_or_else(|_| panic!("no answer to {asked:?}"))
    }
}

pub async fn in_process(front: &Front, asked: &Asked) -> Reply {
    let answer = async {
        let (parts, body) = front.clone().oneshot(asked.request()).await.ok()?.into_parts();
        let body = body.collect().await.ok()?;
        Some((parts.status.as_u16(), parts.headers, body.trailers().cloned(), body.to_bytes()))
    };
    // A server takes a panic for the end of the connection.
    match AssertUnwindSafe(answer).catch_unwind().await {
        Ok(Some((status, headers, trailers, body))) => {
            Reply::Whole(Box::new(Whole { status, headers, body, trailers: trailers.unwrap_or_default() }))
        }
        _ => Reply::Broken,
    }
}

impl Server {
    async fn start(front: Front) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let service = front.map_request(|request: Request<hyper::body::Incoming>| {
            request.map(|body| UnsyncBoxBody::new(body.map_err(io::Error::other)))
        });
        let task = tokio::spawn(async move {
            loop {
                let stream = at_once(listener.accept().await.unwrap().0);
                let service = TowerToHyperService::new(service.clone());
                tokio::spawn(async move {
                    auto::Builder::new(TokioExecutor::new()).serve_connection(stream, service).await
                });
            }
        });
        Self { address, task, two: Mutex::default() }
    }

    /// On a connection of its own, as it is written.
    async fn one(&self, asked: &Asked) -> Reply {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let mut answer = vec![];
        // A server that has said enough need not read what is left.
        let _ = stream.write_all(&written(asked)).await;
        let _ = stream.read_to_end(&mut answer).await;
        parsed(&answer, asked.method == Method::HEAD).map_or(Reply::Broken, |whole| Reply::Whole(Box::new(whole)))
    }

    async fn two(&self, asked: &Asked) -> Reply {
        let answer = async {
            let mut two = self.connected().await;
            two.ready().await.ok()?;
            let (parts, body) = two.send_request(of_two(asked)).await.ok()?.into_parts();
            let body = body.collect().await.ok()?;
            let (status, headers) = (parts.status.as_u16(), parts.headers);
            let trailers = body.trailers().cloned().unwrap_or_default();
            Some(Whole { status, headers, body: body.to_bytes(), trailers })
        };
        match answer.await {
            Some(whole) => Reply::Whole(Box::new(whole)),
            None => Reply::Broken,
        }
    }

    async fn connected(&self) -> SendRequest<Body> {
        let known = self.two.lock().unwrap().clone().filter(|two| !two.is_closed());
        if let Some(two) = known {
            return two;
        }
        let stream = at_once(TcpStream::connect(self.address).await.unwrap());
        let (two, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), stream).await.unwrap();
        tokio::spawn(connection);
        self.two.lock().unwrap().insert(two).clone()
    }
}

/// What is written is sent, and does not wait for an acknowledgement of what was sent before.
fn at_once(stream: TcpStream) -> TokioIo<TcpStream> {
    stream.set_nodelay(true).unwrap();
    TokioIo::new(stream)
}

/// The same request with an `:authority`, which takes the place of a `Host` where that can be one.
fn of_two(asked: &Asked) -> Request<Body> {
    let path = asked.target.strip_prefix("http://").map_or(&*asked.target, |rest| &rest[rest.find('/').unwrap()..]);
    let host = asked.header("host").to_owned();
    let authority: Option<http::uri::Authority> = host.parse().ok();
    let authority = authority.as_ref().filter(|authority| !authority.as_str().contains('@'));
    let uri = format!("http://{}{path}", authority.map_or("x.example", |authority| authority.as_str()));
    let request = Request::builder().method(asked.method.clone()).uri(uri);
    let headers = asked.headers.iter().filter(|(name, _)| *name != "host" || authority.is_none());
    let request = headers.fold(request, |request, (name, value)| request.header(*name, value));
    request.body(full(asked.body.clone())).unwrap()
}

/// As a client of HTTP/1.1 writes it: names in capitals, and bodies in chunks, now and then.
fn written(asked: &Asked) -> Vec<u8> {
    let is_loud = asked.target.len().is_multiple_of(3);
    let mut text = format!("{} {} HTTP/1.1\r\n", asked.method, asked.target);
    for (name, value) in &asked.headers {
        let name = if is_loud { name.to_ascii_uppercase() } else { (*name).to_owned() };
        text += &format!("{name}: {value}\r\n");
    }
    text += "te: trailers\r\nconnection: close\r\n";
    let mut bytes = text.into_bytes();
    match &asked.body[..] {
        [] if asked.method == Method::POST => bytes.extend(b"content-length: 0\r\n\r\n"),
        [] => bytes.extend(b"\r\n"),
        body if is_loud => {
            bytes.extend(b"transfer-encoding: chunked\r\n\r\n");
            for chunk in body.chunks(3) {
                bytes.extend(format!("{:x}\r\n", chunk.len()).bytes());
                bytes.extend(chunk);
                bytes.extend(b"\r\n");
            }
            bytes.extend(b"0\r\n\r\n");
        }
        body => {
            bytes.extend(format!("content-length: {}\r\n\r\n", body.len()).bytes());
            bytes.extend(body);
        }
    }
    bytes
}

/// What of an answer is promised: all of it if it is whole.
fn parsed(answer: &[u8], is_head: bool) -> Option<Whole> {
    let (head, body) = split(answer, b"\r\n\r\n")?;
    let head = std::str::from_utf8(head).ok()?;
    let status: u16 = head.get(9..12)?.parse().ok()?;
    let headers = fields(head.split("\r\n").skip(1))?;
    let mut whole = Whole { status, headers, body: Bytes::new(), trailers: HeaderMap::new() };
    if is_head || matches!(status, 204 | 304) {
        return body.is_empty().then_some(whole);
    }
    if whole.headers.contains_key("transfer-encoding") {
        let (mut rest, mut data) = (body, vec![]);
        loop {
            let (size, after) = split(rest, b"\r\n")?;
            let size = usize::from_str_radix(std::str::from_utf8(size).ok()?, 16).ok()?;
            if size == 0 {
                // Trailers, and the end.
                let trailers = std::str::from_utf8(after.strip_suffix(b"\r\n")?).ok()?;
                whole.trailers = fields(trailers.split("\r\n").filter(|line| !line.is_empty()))?;
                whole.body = data.into();
                return Some(whole);
            }
            data.extend_from_slice(after.get(..size)?);
            rest = after.get(size..)?.strip_prefix(b"\r\n")?;
        }
    }
    let length = whole.headers.get("content-length").map(|length| length.to_str().unwrap().parse::<usize>().unwrap());
    whole.body = Bytes::copy_from_slice(body);
    (length.is_none_or(|length| length == body.len())).then_some(whole)
}

fn split<'a>(bytes: &'a [u8], at: &[u8]) -> Option<(&'a [u8], &'a [u8])> {
    let found = bytes.windows(at.len()).position(|window| window == at)?;
    Some((&bytes[..found], &bytes[found + at.len()..]))
}

fn fields<'a>(lines: impl Iterator<Item = &'a str>) -> Option<HeaderMap> {
    let mut fields = HeaderMap::new();
    for line in lines {
        let (name, value) = line.split_once(':')?;
        fields.append(HeaderName::try_from(name).ok()?, HeaderValue::from_str(value.trim()).ok()?);
    }
    Some(fields)
}
