//! A call of the inner service: its request, what becomes of its response, and a stored one that it confirms.

use std::{
    sync::Arc,
    time::{Instant, SystemTime},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, Method, Request, Response, StatusCode, header, response};
use http_body::Body;
use tower_service::Service;

use super::{
    Looked,
    miss::{Mapped, Miss, SoFar, serve_stale, stored},
};
use crate::{
    catalog::{Freshness, Lifetime},
    engine::{Leader, Sealed, beside},
    http::{
        cache_status::{Forwarded, Handled},
        conditions::validate,
        fields::{put_date, stored_headers, take_weak_date, updated_headers},
        freshness::{Exchange, Verdict, judge},
    },
    key::{Key, Tag},
    layer::{
        body::CacheBody,
        changes::Reads,
        extensions::{NoCache, forward_tags, take_tags},
        future,
        reading::{Reading, Reply, settle},
        serve::{How, serve, unstored},
    },
    route::variant_key,
    store::{Entry, Payload, StoredResponse},
};

impl Miss {
    /// Calls the inner service, answers its request, and stores the response for others if it may be. What is done with the response
    /// is boxed when it is known: what is not begun yet is moved, all the room for it included.
    #[expect(clippy::manual_async_fn, reason = "an async fn holds what it is given twice")]
    pub(super) fn load<S, B, R>(
        self,
        mut inner: S,
        mut request: Request<B>,
        mut leader: Option<Leader>,
        reply: Reply<R, S::Error>,
    ) -> impl Future<Output = ()>
    where
        S: Service<Request<B>, Response = Response<R>>,
        R: Body<Data = Bytes>,
    {
        async move {
            let (start, date) = (Instant::now(), self.mapped.core.date());
            let (headers, reads) = (request.headers().clone(), Reads::default());
            tracing::debug!(
                key = %self.so_far.key().as_bytes().escape_ascii(),
                tags = ?leader.iter().flat_map(Leader::tags).collect::<Vec<_>>(),
                reason = self.so_far.reason.as_str(),
                "calling the inner service"
            );
            let confirmable = self.prepare(&mut request, leader.as_mut());
            let is_asked = leader.as_ref().is_none_or(|leader| leader.unshared);
            if let Some(whole) = &self.so_far.whole {
                whole.include(&reads);
            }
            let result = beside(leader.as_mut(), reads.scope(future::call(&mut inner, request))).await;
            let is_ok = matches!(&result, Ok(response) if !response.status().is_server_error());
            self.mapped.route.teller.watcher().loaded(is_ok, start.elapsed());
            if !is_ok && let Some(response) = self.instead(leader.as_ref()) {
                let _ = reply.send(Ok(response));
                return;
            }
            let response = match result {
                Ok(response) => response,
                Err(error) => {
                    drop(leader);
                    // Nobody is there to be answered if the client hung up.
                    let _ = reply.send(Err(error));
                    return;
                }
            };
            let called = Called { start, date, headers: &headers, reads, confirmable, is_asked, leader };
            match self.answered(response, called, reply) {
                Next::Nothing => {}
                Next::Confirm(confirmed, reply) => Box::pin(self.confirm(confirmed, reply)).await,
                Next::Read(reading, body, reply) => {
                    let (reads, asked) = (reading.known.0.clone(), &self.so_far.asked);
                    reads.scope(Box::pin(reading.read(body, asked, reply))).await;
                }
            }
        }
    }

    /// What becomes of a response.
    fn answered<R, E>(&self, response: Response<R>, called: Called<'_>, reply: Reply<R, E>) -> Next<R, E>
    where
        R: Body<Data = Bytes>,
    {
        let Called { start, date, headers, reads, confirmable, is_asked, leader } = called;
        let (Mapped { core, route, tenant, .. }, SoFar { asked, .. }) = (&self.mapped, &self.so_far);
        let (mut parts, body) = response.into_parts();
        take_weak_date(&mut parts.headers, date, start.elapsed());
        // What a part says from now on is not among its tags.
        let known = (reads.clone(), reads.count());
        let late = take_tags(&mut parts, core, tenant, route.data_type(), &reads);
        if let (Some(whole), Ok(late)) = (&self.so_far.whole, &late) {
            whole.add_tags(late.iter());
        }
        let mut forwarded = Forwarded { status: Some(parts.status), ..Forwarded::new(self.so_far.reason) };
        let confirmed = confirmable.filter(|_| parts.status == StatusCode::NOT_MODIFIED);
        let late = match &confirmed {
            Some(stored) => late.map(|late| update(stored, &mut parts, core.date(), late, leader.as_ref())),
            None => late,
        };
        let size = if confirmed.is_some() { 0 } else { body.size_hint().lower() };
        let verdict = match &late {
            Err(reason) => Verdict::Alone(reason),
            // It answers the client's own condition, and says nothing of what others would get.
            Ok(_) if is_asked && parts.status == StatusCode::NOT_MODIFIED => Verdict::Fail("status"),
            Ok(_) => self.verdict(&parts, size, start),
        };
        let late = late.unwrap_or_default();
        let settled = settle(leader, verdict, &mut forwarded).map(|(mut leader, life, names)| {
            let known = self.so_far.known.as_ref();
            leader.known = known.map(|(known, until)| (*until, known.iter().all(|name| names.contains(name))));
            (leader.made_of(reads.stamps()), life, names)
        });
        if let (true, Some(header), Some((leader, ..))) = (forwarded.stored, &core.options.forwards, &settled) {
            forward_tags(&mut parts.headers, header, leader.tags().chain(&late));
        }
        if let Some(stored) = confirmed {
            let kept = settled.map(|(leader, life, names)| {
                let varied = self.varied(names, headers);
                Kept { leader, late, life, varied }
            });
            return Next::Confirm(Confirmed { stored, parts, kept, forwarded }, reply);
        }
        let Some((leader, life, names)) = settled else {
            let (key, reason) = (self.so_far.key().as_bytes().escape_ascii(), forwarded.detail);
            tracing::debug!(%key, reason, status = parts.status.as_u16(), "not stored");
            route.teller.tell(Handled::Forwarded(forwarded), asked.key(), &mut parts);
            let _ = reply.send(Ok(unstored(parts, body, asked, is_asked)));
            return Next::Nothing;
        };
        let (varied, limit) = (self.varied(names, headers), core.options.body_limit);
        let is_plain = parts.status == StatusCode::OK && !parts.headers.contains_key(header::ETAG);
        let adds_tag = core.options.entity_tags && is_plain;
        let (date, teller, route) = (core.date(), route.teller.clone(), route.clone());
        let reading = Reading {
            leader,
            teller,
            route: Box::new(move || route.what()),
            late,
            known,
            parts,
            date,
            forwarded,
            life,
            varied,
            adds_tag,
            limit,
            accepts: |_, _| Ok(()),
        };
        Next::Read(reading, body, reply)
    }

    /// Asks for the whole response, or whether the stored one is still good, which is then returned. Where nothing will be
    /// stored, the handler is asked what the client asks.
    fn prepare<B>(&self, request: &mut Request<B>, leader: Option<&mut Leader>) -> Option<StoredResponse> {
        request.extensions_mut().get_or_insert_default::<Looked>().add(&self.mapped.core, self.so_far.primary.clone());
        let leader = leader?;
        leader.primary = self.so_far.primary.clone();
        if leader.unshared {
            return None;
        }
        if self.so_far.asked.head {
            *request.method_mut() = Method::GET;
        }
        let headers = request.headers_mut();
        headers.remove(header::RANGE);
        // The client's conditions are met from the whole response.
        headers.remove(header::IF_NONE_MATCH);
        headers.remove(header::IF_MODIFIED_SINCE);
        let known = stored(leader).filter(|stale| !stale.invalidated);
        match known.filter(|_| self.mapped.route.policy.freshness == Freshness::Response).map(|s| &s.entry.payload) {
            Some(Payload::Response(stored)) => validate(headers, &stored.headers.to_map()).then(|| stored.clone()),
            _ => None,
        }
    }

    /// What to answer with when the origin fails, if anything.
    fn instead<R: Body>(&self, leader: Option<&Leader>) -> Option<Response<CacheBody<R>>> {
        let (Mapped { core, route, .. }, SoFar { asked, whole, .. }) = (&self.mapped, &self.so_far);
        let now = core.engine.now();
        let stale = leader?.stale().filter(|stale| stale.serves_on_error(now, &route.policy))?;
        serve_stale(core, route, (asked, whole.as_ref()), &stale.entry)
    }

    fn verdict(&self, parts: &response::Parts, size: u64, start: Instant) -> Verdict {
        if size > self.mapped.core.options.body_limit as u64 {
            return Verdict::Alone("body-limit");
        }
        let exchange = Exchange {
            policy: &self.mapped.route.policy,
            keyed: &self.mapped.route.vary,
            no_cache: parts.extensions.get::<NoCache>().is_some(),
            needs_public: self.so_far.needs_public,
            targeted: &self.mapped.core.options.targeted_header,
            now: self.mapped.core.date(),
            took: start.elapsed(),
        };
        judge(&exchange, parts)
    }

    /// Which headers the response depends on, or others are known to, and the key they give in this request: an origin that
    /// says now more and now less of them has as many variants as all of them make.
    fn varied(&self, names: Box<[HeaderName]>, headers: &HeaderMap) -> Option<(Box<[HeaderName]>, Key)> {
        let mut names = names.into_vec();
        names.extend(self.so_far.known.iter().flat_map(|(known, _)| known.iter().cloned()));
        names.sort_by(|a, b| a.as_str().cmp(b.as_str()));
        names.dedup();
        let key = (!names.is_empty()).then(|| Key::new(variant_key(self.so_far.primary.as_bytes(), &names, headers)));
        key.map(|key| (names.into(), key))
    }

    /// Stores what the origin has confirmed anew, and answers with it.
    async fn confirm<R: Body, E>(&self, confirmed: Confirmed, reply: Reply<R, E>) {
        let Confirmed { stored, parts, kept, mut forwarded } = confirmed;
        let headers = stored_headers(parts.headers).into();
        let payload = Payload::Response(StoredResponse { headers, ..stored });
        let engine = &self.mapped.core.engine;
        let life = kept.as_ref().map_or_else(Lifetime::default, |kept| kept.life);
        let sealed = match kept.filter(|_| forwarded.stored) {
            Some(Kept { leader, late, life, varied }) => {
                leader.confirmed().seal(payload.clone(), late, life, varied).await
            }
            None => None,
        };
        forwarded.stored = sealed.as_ref().is_some_and(Sealed::is_kept);
        let unstored = || Arc::new(Entry::new(payload, Box::default(), engine.now(), life));
        let entry = sealed.as_ref().map_or_else(unstored, |sealed| sealed.entry.clone());
        let how = How::forwarded(&self.mapped.route.teller, forwarded);
        if let Some(response) = serve(&entry, engine.now(), &self.so_far.asked, how) {
            let _ = reply.send(Ok(response));
        }
        if let Some(sealed) = sealed {
            sealed.store().await;
        }
    }
}

/// A call of the inner service.
struct Called<'r> {
    start: Instant,
    /// When it began.
    date: SystemTime,
    /// Of the request.
    headers: &'r HeaderMap,
    /// What its handler says that the response depends on.
    reads: Reads,
    /// The stored response that a 304 confirms.
    confirmable: Option<StoredResponse>,
    /// Whether the handler is asked what the client asks.
    is_asked: bool,
    leader: Option<Leader>,
}

/// What is still to be done with a response.
enum Next<R, E>
where
    R: Body,
{
    Nothing,
    Confirm(Confirmed, Reply<R, E>),
    Read(Reading, R, Reply<R, E>),
}

/// A stored response that the origin has confirmed.
struct Confirmed {
    stored: StoredResponse,
    parts: response::Parts,
    kept: Option<Kept>,
    forwarded: Forwarded,
}

/// Makes the head of a confirmation that of the stored response, which is still made of what it was made of.
fn update(
    stored: &StoredResponse,
    parts: &mut response::Parts,
    now: SystemTime,
    late: Vec<Tag>,
    leader: Option<&Leader>,
) -> Vec<Tag> {
    parts.status = stored.status;
    // It is as old as its confirmation.
    put_date(&mut parts.headers, now);
    parts.headers = updated_headers(&stored.headers.to_map(), std::mem::take(&mut parts.headers));
    let stamps = leader.and_then(Leader::stale).into_iter().flat_map(|stale| stale.entry.stamps.iter());
    late.into_iter().chain(stamps.map(|stamp| stamp.tag.clone())).collect()
}

/// For how long, under which tags and for which variant a confirmed response is kept.
struct Kept {
    leader: Leader,
    late: Vec<Tag>,
    life: Lifetime,
    varied: Option<(Box<[HeaderName]>, Key)>,
}
