//! A call of a method whose responses are cached.

use std::{marker::PhantomData, sync::Arc, time::Instant};

use bytes::{Buf, Bytes};
use http::{HeaderMap, Request, Response, StatusCode, header, request, response};
use http_body::Body;
use tokio::sync::oneshot;
use tower_service::Service;

use super::{body::GrpcResponseBody, status::GRPC_STATUS};
use crate::{
    catalog::Lifetime,
    clock::Millis,
    engine::{Asker, Inside, Leader, Obtained, Source, Use, beside},
    http::{
        cache_status::{Forwarded, Handled, Reason},
        directives::ResponseDirectives,
        freshness::{Exchange, Verdict, reserved},
    },
    key::{Key, Tenant},
    layer::{
        body::CacheBody,
        changes::Reads,
        core::Core,
        extensions::{NoCache, take_tags},
        future::{self, Finish, Origin},
        reading::{Reading, Reply, settle},
        request::RequestBody,
        serve::{Asked, How},
    },
    observe::FoundIn,
    route::{GrpcRoute, GrpcWanted},
    store::{Entry, Payload},
};

/// The frame of a message: whether it is compressed, and its length.
const FRAME: usize = 5;

/// The message of a body that holds exactly one: `Some(None)` if it is compressed.
pub(crate) fn message(body: &Bytes) -> Option<Option<Bytes>> {
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
fn replay<R: Body>(entry: &Entry, now: u64, how: How<'_>) -> Option<Response<CacheBody<R>>> {
    let Payload::Response(stored) = &entry.payload else { return None };
    let mut response = Response::new(CacheBody::full(stored.body.clone(), stored.trailers.as_deref().cloned()));
    *response.status_mut() = stored.status;
    *response.headers_mut() = stored.headers.to_map().into_owned();
    response.headers_mut().remove(header::AGE);
    how.teller.say(how.handled(entry.ttl(now)), response.headers_mut(), Some(stored.status), None);
    let outcome = how.outcome(entry, now, response.body());
    response.extensions_mut().insert(outcome);
    Some(response)
}

/// Every entry under its key answers it.
struct Ask<'a, R> {
    read: &'a Read,
    body: PhantomData<fn() -> R>,
}

impl<R: Body> Asker for Ask<'_, R> {
    type Answer = Response<CacheBody<R>>;

    fn judge(&mut self, entry: Arc<Entry>, source: Source, now: Millis) -> Use<Self::Answer> {
        let Read { core, route, whole, .. } = self.read;
        if let Some(whole) = whole {
            whole.add_stamps(&entry.stamps);
            if source == Source::Stale {
                whole.spoil();
            }
        }
        let collapsed = Forwarded { collapsed: true, ..Forwarded::new(Reason::UriMiss) };
        let how = How::of(source, &route.teller, core.found_in(), collapsed);
        replay(&entry, now, how).map_or(Use::Useless, Use::Answer)
    }
}

pub(super) struct Read {
    pub(super) tenant: Tenant,
    pub(super) route: Arc<GrpcRoute>,
    pub(super) core: Arc<Core>,
    /// What its response becomes a part of, if it is asked for by another load.
    pub(super) whole: Option<Reads>,
}

impl Read {
    pub(super) async fn answer<S, B, R>(self, mut inner: S, request: Request<B>) -> Result<Out<R>, S::Error>
    where
        S: Origin<RequestBody<B>, R>,
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Send,
        R: Body<Data = Bytes, Error: Send> + Send + 'static,
    {
        let (parts, body) = request.into_parts();
        let body = RequestBody::read(body, self.core.options.body_limit).await;
        // Its message may have taken long.
        let kept_out = self.core.keeps_out(&self.route.data_type, &self.route.policy);
        let wanted = kept_out.map_or_else(|| self.wanted(&parts, body.whole().as_ref()), Err);
        let request = Request::from_parts(parts, body);
        let GrpcWanted { key, needs_public, tags } = match wanted {
            Ok(wanted) => wanted,
            Err(reason) => {
                self.whole.iter().for_each(Reads::spoil);
                let response = future::call(&mut inner, request).await?;
                let told = Some((Forwarded::because(Reason::Bypass, reason), self.route.teller.clone(), None));
                let finish = Finish { told, tag_header: self.core.options.tag_header.clone(), whole: None };
                return Ok(out(finish.finish(response).map(CacheBody::inner)));
            }
        };
        let (core, route) = (self.core.clone(), self.route.clone());
        let engine = &core.engine;
        let hit = How::hit(&route.teller, FoundIn::Process);
        let held = engine.peek(&key, engine.now(), |entry| entry.suited(&tags, route.policy.longest()));
        if let Some((entry, response)) =
            held.and_then(|entry| replay(&entry, engine.now(), hit).map(|response| (entry, response)))
        {
            self.whole.iter().for_each(|whole| whole.add_stamps(&entry.stamps));
            return Ok(out(response));
        }
        self.whole.iter().for_each(|whole| whole.add_tags(tags.iter()));
        let mut ask = Ask { read: &self, body: PhantomData::<fn() -> R> };
        let leader = match engine.obtain(Key::new(key), &tags, &route.policy, &mut ask).await {
            Obtained::Answer(response) | Obtained::AnswerAndReload(response, _) => return Ok(out(response)),
            Obtained::Absent => None,
            Obtained::Load(leader) => leader,
        };
        let (reply, replied) = oneshot::channel();
        let scope = Inside::of(leader.as_ref());
        let load = self.load(inner, request, leader, needs_public, reply);
        core.engine.attend(scope.around(load), replied).await.map(out)
    }

    /// What the message asks for, if it is one message that says so.
    fn wanted(&self, parts: &request::Parts, body: Option<&Bytes>) -> Result<GrpcWanted, &'static str> {
        let framed = body.ok_or("message")?;
        let message = message(framed).ok_or("message")?;
        let Core { cascades, routes, .. } = &*self.core;
        let declared = (&cascades.entities, &routes.expected);
        self.route.wanted(&self.tenant, parts, (framed, message.as_deref()), &self.core.known(), declared)
    }

    async fn load<S, B, R>(
        self,
        mut inner: S,
        request: Request<RequestBody<B>>,
        mut leader: Option<Leader>,
        needs_public: bool,
        reply: Reply<R, S::Error>,
    ) where
        S: Service<Request<RequestBody<B>>, Response = Response<R>>,
        B: Body<Data = Bytes>,
        R: Body<Data = Bytes>,
    {
        let start = Instant::now();
        let reads = Reads::default();
        if let Some(whole) = &self.whole {
            whole.include(&reads);
        }
        let result = beside(leader.as_mut(), reads.scope(future::call(&mut inner, request))).await;
        self.route.teller.watcher().loaded(result.is_ok(), start.elapsed());
        let response = match result {
            Ok(response) => response,
            Err(error) => {
                drop(leader);
                let _ = reply.send(Err(error));
                return;
            }
        };
        let (mut parts, body) = response.into_parts();
        let known = (reads.clone(), reads.count());
        let late = take_tags(&mut parts, &self.core, &self.tenant, &self.route.data_type, &reads);
        if let (Some(whole), Ok(late)) = (&self.whole, &late) {
            whole.add_tags(late.iter());
        }
        let limit = self.core.options.body_limit;
        let verdict = match &late {
            Err(reason) => Verdict::Alone(reason),
            Ok(_) if body.size_hint().lower() > limit as u64 => Verdict::Alone("body-limit"),
            Ok(_) => self.verdict(&parts, needs_public, start),
        };
        let mut forwarded = Forwarded::new(Reason::UriMiss);
        let Some((leader, life, _)) = settle(leader, verdict, &mut forwarded) else {
            self.route.teller.tell(Handled::Forwarded(forwarded), None, &mut parts);
            let _ = reply.send(Ok(Response::from_parts(parts, CacheBody::inner(body))));
            return;
        };
        let late = late.unwrap_or_default();
        let route = self.route.clone();
        let reading = Reading {
            leader,
            teller: self.route.teller.clone(),
            route: Box::new(move || format!("gRPC method {}", route.path)),
            late,
            known,
            parts,
            date: self.core.date(),
            forwarded,
            life,
            varied: None,
            adds_tag: false,
            limit,
            accepts,
        };
        reads.scope(reading.read(body, &Asked::default(), reply)).await;
    }
}

impl Read {
    /// What a response says of itself, which HTTP would take at its word, too.
    fn verdict(&self, parts: &response::Parts, needs_public: bool, start: Instant) -> Verdict {
        // With its status in the headers it is an error, and has no message.
        if parts.status != StatusCode::OK || parts.headers.contains_key(GRPC_STATUS) {
            return Verdict::Fail("grpc-status");
        }
        let exchange = Exchange {
            policy: &self.route.policy,
            keyed: &[],
            no_cache: parts.extensions.get::<NoCache>().is_some(),
            needs_public,
            targeted: &self.core.options.targeted_header,
            now: self.core.date(),
            took: start.elapsed(),
        };
        let says = ResponseDirectives::of(&parts.headers, exchange.targeted);
        match reserved(&exchange, &parts.headers, &says) {
            Some(reason) => Verdict::Alone(reason),
            // Only the message and its encodings are told apart.
            None if parts.headers.contains_key(header::VARY) => Verdict::Alone("vary"),
            None => {
                let life = Lifetime::fresh_for(self.route.policy.jittered());
                Verdict::Store(Lifetime { load: exchange.took, is_mapped: true, ..life }, Box::default())
            }
        }
    }
}

/// Only one message, and a success.
pub(crate) fn accepts(body: &Bytes, trailers: Option<&HeaderMap>) -> Result<(), &'static str> {
    match (message(body), trailers.and_then(|t| t.get(GRPC_STATUS))) {
        (Some(_), Some(status)) if status == "0" => Ok(()),
        (Some(_), _) => Err("grpc-status"),
        (None, _) => Err("not-one-message"),
    }
}
