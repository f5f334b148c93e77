//! A call of a method whose responses are cached.

use std::{marker::PhantomData, sync::Arc, time::Instant};

use bytes::{Buf, Bytes};
use http::{HeaderMap, Request, Response, StatusCode, header};
use http_body::Body;
use tokio::sync::oneshot;
use tower_service::Service;
use tracing::Instrument;

use super::{
    body::{GrpcBody, GrpcResponseBody},
    status::GRPC_STATUS,
};
use crate::{
    catalog::Lifetime,
    engine::{Asker, Leader, Obtained, Source, Use},
    http::{
        cache_status::{Forwarded, Handled, Reason},
        freshness::Verdict,
    },
    key::{Key, Tenant},
    layer::{
        body::CacheBody,
        changes::Reads,
        core::Core,
        extensions::take_tags,
        future,
        reading::{Reading, Reply, settle},
        serve::Asked,
    },
    route::{GrpcRoute, GrpcWanted},
    store::{Entry, Payload},
};

/// The frame of a message: whether it is compressed, and its length.
const FRAME: usize = 5;

/// The message of a body that holds exactly one: `Some(None)` if it is compressed.
pub(super) fn message(body: &Bytes) -> Option<Option<Bytes>> {
    let mut head = body.get(..FRAME)?;
    let compressed = head.get_u8();
    let length = head.get_u32() as usize;
    (body.len() == FRAME + length).then(|| (compressed == 0).then(|| body.slice(FRAME..)))
}

pub(super) type Out<R> = Response<GrpcResponseBody<R>>;

pub(super) fn out<R: Body>(response: Response<CacheBody<R>>) -> Out<R> {
    response.map(GrpcResponseBody::untouched)
}

/// The response that an entry holds: as it was, so that a client sees no difference.
fn replay<R: Body>(entry: &Entry, now: u64, handled: Option<Handled>) -> Option<Response<CacheBody<R>>> {
    let Payload::Response(stored) = &entry.payload else { return None };
    let mut response = Response::new(CacheBody::full(stored.body.clone(), stored.trailers.clone()));
    *response.status_mut() = stored.status;
    *response.headers_mut() = stored.headers.clone();
    response.headers_mut().remove(header::AGE);
    let handled = handled.unwrap_or_else(|| Handled::Hit { ttl: entry.ttl(now) });
    handled.append(response.headers_mut(), None, None);
    Some(response)
}

/// Every entry under its key answers it.
struct Ask<'a, R>(&'a Core, PhantomData<fn() -> R>);

impl<R: Body> Asker for Ask<'_, R> {
    type Answer = Response<CacheBody<R>>;

    fn judge(&mut self, entry: &Entry, source: Source) -> Use<Self::Answer> {
        let collapsed = Handled::Forwarded(Forwarded { collapsed: true, ..Forwarded::new(Reason::UriMiss) });
        let handled = (source == Source::Flight).then_some(collapsed);
        replay(entry, self.0.engine.now(), handled).map_or(Use::Useless, Use::Answer)
    }
}

pub(super) struct Read {
    pub(super) tenant: Tenant,
    pub(super) route: Arc<GrpcRoute>,
    pub(super) core: Arc<Core>,
}

impl Read {
    pub(super) async fn answer<S, B, R>(self, mut inner: S, request: Request<B>) -> Result<Out<R>, S::Error>
    where
        S: Service<Request<GrpcBody<B>>, Response = Response<R>> + Send + 'static,
        S::Future: Send,
        S::Error: Send,
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Send,
        R: Body<Data = Bytes> + Send + 'static,
        R::Error: Send,
    {
        let (parts, body) = request.into_parts();
        let body = GrpcBody::read(body, self.core.options.body_limit).await;
        let wanted = self.wanted(&parts.headers, body.whole().as_ref());
        let request = Request::from_parts(parts, body);
        let GrpcWanted { key, tags } = match wanted {
            Ok(wanted) => wanted,
            Err(reason) => {
                let mut response = inner.call(request).await?;
                response.headers_mut().remove(&self.core.options.tag_header);
                Forwarded::because(Reason::Bypass, reason).append(response.headers_mut(), None, None);
                return Ok(out(response.map(CacheBody::inner)));
            }
        };
        let (core, route) = (self.core.clone(), self.route.clone());
        let engine = &core.engine;
        if let Some(response) = engine.peek(&key, engine.now()).and_then(|e| replay(&e, engine.now(), None)) {
            return Ok(out(response));
        }
        let mut ask = Ask(&core, PhantomData::<fn() -> R>);
        let leader = match engine.obtain(Key::new(key), &tags, &route.policy, &mut ask).await {
            Obtained::Answer(response) | Obtained::AnswerAndReload(response, _) => return Ok(out(response)),
            Obtained::Absent => None,
            Obtained::Load(leader) => leader,
        };
        let (reply, replied) = oneshot::channel();
        let task = core.engine.spawn(self.load(inner, request, leader, reply).in_current_span());
        future::replied(replied.await, task).await.map(out)
    }

    /// What the message asks for, if it is one message that says so.
    fn wanted(&self, headers: &HeaderMap, body: Option<&Bytes>) -> Result<GrpcWanted, &'static str> {
        let framed = body.ok_or("message")?;
        let message = message(framed).ok_or("message")?;
        let Core { cascades, routes, space, .. } = &*self.core;
        let known = (&cascades.entities, &routes.expected);
        self.route.wanted(space, &self.tenant, headers, (framed, message.as_deref()), known)
    }

    async fn load<S, B, R>(
        self,
        mut inner: S,
        request: Request<GrpcBody<B>>,
        leader: Option<Leader>,
        reply: Reply<R, S::Error>,
    ) where
        S: Service<Request<GrpcBody<B>>, Response = Response<R>>,
        B: Body<Data = Bytes>,
        R: Body<Data = Bytes>,
    {
        let start = Instant::now();
        let reads = Reads::default();
        let response = match reads.scope(async { inner.call(request).await }).await {
            Ok(response) => response,
            Err(error) => {
                drop(leader);
                let _ = reply.send(Err(error));
                return;
            }
        };
        let (mut parts, body) = response.into_parts();
        let late = take_tags(&mut parts, &self.core, &self.tenant, &self.route.data_type, &reads);
        let limit = self.core.options.body_limit;
        // With its status in the headers it is an error, and has no message.
        let has_message = parts.status == StatusCode::OK && !parts.headers.contains_key(GRPC_STATUS);
        let verdict = match (has_message, &late) {
            (false, _) => Verdict::Fail("grpc-status"),
            (true, Err(reason)) => Verdict::Alone(reason),
            (true, Ok(_)) if body.size_hint().lower() > limit as u64 => Verdict::Alone("body-limit"),
            (true, Ok(_)) => {
                let life = Lifetime::fresh_for(self.route.policy.jittered());
                Verdict::Store(Lifetime { load: start.elapsed(), ..life }, Box::default())
            }
        };
        let mut forwarded = Forwarded::new(Reason::UriMiss);
        let Some((leader, life, _)) = settle(leader, verdict, &mut forwarded) else {
            Handled::Forwarded(forwarded).append(&mut parts.headers, None, None);
            let _ = reply.send(Ok(Response::from_parts(parts, CacheBody::inner(body))));
            return;
        };
        let late = late.unwrap_or_default();
        let known = (reads.clone(), reads.count());
        let reading =
            Reading { leader, late, known, parts, forwarded, life, varied: None, adds_tag: false, limit, accepts };
        reads.scope(reading.read(body, &Asked::default(), reply)).await;
    }
}

/// Only one message, and a success.
fn accepts(body: &Bytes, trailers: Option<&HeaderMap>) -> Result<(), &'static str> {
    match (message(body), trailers.and_then(|t| t.get(GRPC_STATUS))) {
        (Some(_), Some(status)) if status == "0" => Ok(()),
        (Some(_), _) => Err("grpc-status"),
        (None, _) => Err("not-one-message"),
    }
}
