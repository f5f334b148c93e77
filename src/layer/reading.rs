//! A response on its way to the client, to those who wait for the same, and into the store: for HTTP and gRPC alike.
//!
//! | its body | its client gets it | the others |
//! | --- | --- | --- |
//! | is there at once | whole | whole |
//! | comes by and by | while it is read | whole, when it has ended |
//! | … and does not say how long it is | while it is read | call the origin after 100 ms |
//! | is too large, or takes too long | while it is read, and the rest on its own | call the origin |
//! | breaks, or its service panics | as far as it went, and then the error | try again |

use std::{
    any::Any,
    future::poll_fn,
    panic::AssertUnwindSafe,
    pin::{Pin, pin},
    task::Poll,
    time::{Duration, SystemTime},
};

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt;
use http::{HeaderMap, HeaderName, Response, header, response};
use http_body::{Body, Frame, SizeHint};
use tokio::{
    sync::{mpsc, oneshot},
    task::yield_now,
};

use super::{
    body::{CacheBody, Piece},
    changes::Reads,
    serve::{Asked, How, not_modified, serve},
};
use crate::{
    catalog::Lifetime,
    engine::{Leader, Sealed, beside},
    http::{
        cache_status::{Forwarded, Handled},
        conditions::entity_tag,
        fields::{put_date, stored_headers},
        freshness::Verdict,
    },
    key::{Key, Tag},
    observe::Teller,
    store::{Payload, StoredResponse},
};

/// A body that streams for longer than this is not stored.
const STREAM_LIMIT: Duration = Duration::from_secs(10);

/// A body of which nobody knows how long it will be is not waited for by others after this.
const STREAM_GRACE: Duration = Duration::from_millis(100);

pub(super) type Replied<R, E> = Result<Response<CacheBody<R>>, E>;
pub(super) type Reply<R, E> = oneshot::Sender<Replied<R, E>>;

/// What people call a route, should anybody have to know.
pub(super) type Named = Box<dyn FnOnce() -> String + Send>;

/// Who gets a response besides its own request: `None` if nobody does, and those who wait are told so.
pub(super) fn settle(
    leader: Option<Leader>,
    verdict: Verdict,
    forwarded: &mut Forwarded,
) -> Option<(Leader, Lifetime, Box<[HeaderName]>)> {
    let Some(leader) = leader else {
        forwarded.detail = Some(match verdict {
            Verdict::Store(..) => "store-unavailable",
            Verdict::Share(why, _) | Verdict::Alone(why) | Verdict::Decline(why) | Verdict::Fail(why) => why,
        });
        return None;
    };
    match verdict {
        Verdict::Store(life, names) => {
            forwarded.stored = true;
            Some((leader, life, names))
        }
        Verdict::Share(why, names) => {
            forwarded.detail = Some(why);
            Some((leader, Lifetime::fresh_for(Some(Duration::ZERO)), names))
        }
        Verdict::Alone(why) => {
            forwarded.detail = Some(why);
            leader.unshareable();
            None
        }
        Verdict::Decline(why) => {
            forwarded.detail = Some(why);
            leader.decline();
            None
        }
        Verdict::Fail(why) => {
            forwarded.detail = Some(why);
            None
        }
    }
}

/// A response whose body is being read, to be stored or at least shared.
pub(super) struct Reading {
    pub(super) leader: Leader,
    pub(super) teller: Teller,
    pub(super) route: Named,
    pub(super) late: Vec<Tag>,
    /// What it depends on, and how much of that is among its tags: its body may say more.
    pub(super) known: (Reads, usize),
    pub(super) parts: response::Parts,
    /// When it came.
    pub(super) date: SystemTime,
    pub(super) forwarded: Forwarded,
    pub(super) life: Lifetime,
    pub(super) varied: Option<(Box<[HeaderName]>, Key)>,
    /// It has no entity tag, and is to get one.
    pub(super) adds_tag: bool,
    pub(super) limit: usize,
    /// The last word, when all of it has been read: why it may not be stored after all.
    pub(super) accepts: fn(&Bytes, Option<&HeaderMap>) -> Result<(), &'static str>,
}

/// How the reading of a body ended.
enum End<R: Body> {
    Whole,
    /// Too large or too slow.
    GivenUp,
    Error(R::Error),
    Panic(Box<dyn Any + Send>),
}

enum Read<R: Body> {
    Frame(Option<Result<Frame<Bytes>, R::Error>>),
    /// There is nothing at the moment.
    Waits,
    /// Others wait for something that may have no end.
    LetGo,
    TooLong,
}

impl Reading {
    /// (An async fn would hold what it is given twice.)
    pub(super) fn read<R, E>(
        mut self,
        body: R,
        asked: &Asked,
        reply: Reply<R, E>,
    ) -> impl Future<Output = ()> + use<'_, R, E>
    where
        R: Body<Data = Bytes>,
    {
        let (size, mut body) = (body.size_hint(), Box::pin(body));
        let mut client = Client::Waiting(reply, asked.head);
        async move {
            let mut copy = Copy::default();
            match self.copy(&mut body, &mut copy, &mut client, &size, asked).await {
                End::Whole => self.complete(client, copy, asked).await,
                End::GivenUp => self.give_up(client, copy, body, &size, asked),
                End::Error(error) => self.fail(client, copy, Piece::Error(error), &size, asked),
                End::Panic(panic) => self.fail(client, copy, Piece::Panic(panic), &size, asked),
            }
        }
    }

    /// Reads until the body ends, in one way or another. What is not there at once is streamed to the client meanwhile.
    async fn copy<R, E>(
        &mut self,
        body: &mut Pin<Box<R>>,
        copy: &mut Copy,
        client: &mut Client<R, E>,
        size: &SizeHint,
        asked: &Asked,
    ) -> End<R>
    where
        R: Body<Data = Bytes>,
    {
        let mut deadline = pin!(tokio::time::sleep(STREAM_LIMIT));
        let mut grace = pin!(tokio::time::sleep(STREAM_GRACE));
        let mut holds = size.exact().is_none() && !self.parts.headers.contains_key(header::CONTENT_LENGTH);
        loop {
            let waits = matches!(client, Client::Waiting(..));
            let poll = poll_fn(|cx| match body.as_mut().poll_frame(cx) {
                Poll::Ready(frame) => Poll::Ready(Read::<R>::Frame(frame)),
                Poll::Pending if waits => Poll::Ready(Read::Waits),
                Poll::Pending if holds && grace.as_mut().poll(cx).is_ready() => Poll::Ready(Read::LetGo),
                Poll::Pending => deadline.as_mut().poll(cx).map(|()| Read::TooLong),
            });
            match beside(Some(&mut self.leader), AssertUnwindSafe(poll).catch_unwind()).await {
                Ok(Read::Waits) if asked.is_not_modified(&self.parts) => client.end(|| not_modified(self.head(asked))),
                Ok(Read::Waits) => {
                    let (tx, rx) = mpsc::unbounded_channel();
                    copy.replay(&tx);
                    client.stream(Response::from_parts(self.head(asked), CacheBody::tee(rx, size)), tx);
                }
                Ok(Read::Frame(Some(Ok(frame)))) => {
                    let over = copy.push(&frame, self.limit);
                    client.send(Piece::Frame(frame));
                    if over {
                        return End::GivenUp;
                    }
                }
                Ok(Read::LetGo) => {
                    holds = false;
                    self.leader.let_go();
                }
                Ok(Read::TooLong) => return End::GivenUp,
                Ok(Read::Frame(None)) => return End::Whole,
                Ok(Read::Frame(Some(Err(error)))) => return End::Error(error),
                Err(panic) => return End::Panic(panic),
            }
        }
    }

    /// All of it is there.
    #[expect(clippy::manual_async_fn, reason = "an async fn holds what it is given twice")]
    fn complete<R: Body, E>(
        mut self,
        mut client: Client<R, E>,
        copy: Copy,
        asked: &Asked,
    ) -> impl Future<Output = ()> + use<'_, R, E> {
        async move {
            let (data, trailers) = copy.into_parts();
            let (reads, known) = &self.known;
            let is_counted = counts(&self.parts.headers, data.len());
            let accepted = if is_counted { (self.accepts)(&data, trailers.as_ref()) } else { Err("content-length") };
            if let Err(detail) = accepted.and(if reads.count() > *known { Err("late-tags") } else { Ok(()) }) {
                drop(self.leader);
                (self.forwarded.stored, self.forwarded.detail) = (false, Some(detail));
                return client.end(|| {
                    self.teller.tell(Handled::Forwarded(self.forwarded), asked.key(), &mut self.parts);
                    let body = CacheBody::full(data, trailers);
                    Response::from_parts(self.parts, if is_counted { body } else { body.uncounted() })
                });
            }
            if self.adds_tag
                && let Ok(tag) = entity_tag(&data)
            {
                self.parts.headers.insert(header::ETAG, tag);
            }
            let (status, headers) = (self.parts.status, self.parts.headers.clone());
            let keep = self.forwarded.stored;
            let leader = self.leader.made_of(self.known.0.stamps());
            let teller = &self.teller;
            let whole = |forwarded, mut parts: response::Parts| {
                teller.tell(Handled::Forwarded(forwarded), asked.key(), &mut parts);
                Response::from_parts(parts, CacheBody::full(data.clone(), trailers.clone()))
            };
            // A client that gets the whole response does not wait for the generations; a part is made of what is stored.
            let is_first = leader.is_open_with(&self.late) && !asked.is_conditional();
            let parts = if is_first {
                client.end(|| whole(self.forwarded, self.parts));
                yield_now().await;
                None
            } else {
                Some(self.parts)
            };
            let mut headers = stored_headers(headers);
            put_date(&mut headers, self.date);
            let trailers = trailers.as_ref().map(|trailers| Box::new(trailers.clone()));
            let stored = StoredResponse { status, headers: headers.into(), body: data.clone(), trailers };
            let sealed = leader.seal(Payload::Response(stored), self.late, self.life, self.varied).await;
            self.forwarded.stored = tell_stored(sealed.as_ref(), keep, teller, data.len(), self.route);
            if let Some(parts) = parts {
                client.end(|| {
                    let how = How::forwarded(teller, self.forwarded);
                    let part = sealed.as_ref().filter(|_| asked.is_conditional());
                    let part = part.and_then(|sealed| conditionally(sealed, &parts, asked, how));
                    part.unwrap_or_else(|| whole(self.forwarded, parts))
                });
            }
            if let Some(sealed) = sealed.filter(|_| keep) {
                // Its client does not wait for that; who asks here before it is stored finds the flight.
                if sealed.is_remote() && !is_first {
                    yield_now().await;
                }
                sealed.store().await;
            }
        }
    }

    /// The head of the response, for a client that gets the body while it is read: nobody knows yet whether it will be stored.
    fn head(&self, asked: &Asked) -> response::Parts {
        let mut parts = self.parts.clone();
        let forwarded = Forwarded { stored: false, ..self.forwarded };
        self.teller.tell(Handled::Forwarded(forwarded), asked.key(), &mut parts);
        parts
    }

    /// The client reads on by itself, and those who wait call the origin.
    fn give_up<R: Body, E>(
        mut self,
        mut client: Client<R, E>,
        copy: Copy,
        body: Pin<Box<R>>,
        size: &SizeHint,
        asked: &Asked,
    ) {
        (self.forwarded.stored, self.forwarded.detail) = (false, Some("body-limit"));
        let parts = self.head(asked);
        self.leader.unshareable();
        if let (Client::Waiting(..), true) = (&client, asked.is_not_modified(&self.parts)) {
            return client.end(|| not_modified(parts));
        }
        client.finish(copy, Piece::Rest(body), |rx| Response::from_parts(parts, CacheBody::tee(rx, size)));
    }

    /// The client gets what there was, and what it ended with.
    fn fail<R: Body, E>(self, client: Client<R, E>, copy: Copy, last: Piece<R>, size: &SizeHint, asked: &Asked) {
        let parts = self.head(asked);
        drop(self.leader);
        client.finish(copy, last, |rx| Response::from_parts(parts, CacheBody::tee(rx, size)));
    }
}

/// Tells of a response of that size that is to be kept or not, and whether it is.
fn tell_stored(sealed: Option<&Sealed>, keep: bool, teller: &Teller, size: usize, route: Named) -> bool {
    let Some(sealed) = sealed else { return false };
    let is_kept = keep && sealed.is_kept();
    if is_kept {
        teller.watcher().stored(size);
        teller.watcher().kept(sealed.key(), sealed.entry.weight());
    }
    tell_drift(sealed, teller, route);
    is_kept
}

/// Says so if what was loaded is another than what it replaces, though no write has dropped that: when it is sure that none was on
/// its way.
fn tell_drift(sealed: &Sealed, teller: &Teller, route: Named) {
    #[cfg(feature = "stats")]
    if let Some(drift) = sealed.drift() {
        let watcher = teller.watcher().clone();
        tokio::spawn(async move {
            if drift.await {
                watcher.drifted(&route());
            }
        });
    }
    #[cfg(not(feature = "stats"))]
    let _ = (sealed, teller, route);
}

/// Whether what a response says of its length is so.
fn counts(headers: &HeaderMap, length: usize) -> bool {
    let said = headers.get_all(header::CONTENT_LENGTH).iter();
    said.map(|line| line.to_str().ok()?.trim().parse().ok()).all(|said| said == Some(length))
}

/// The part of a new entry that its own request asked for.
fn conditionally<R: Body>(
    sealed: &Sealed,
    parts: &response::Parts,
    asked: &Asked,
    how: How<'_>,
) -> Option<Response<CacheBody<R>>> {
    let mut response = serve(&sealed.entry, sealed.entry.created, asked, how)?;
    // The age it came with, if it came with one: it is not from the cache.
    match parts.headers.get(header::AGE) {
        Some(age) => response.headers_mut().insert(header::AGE, age.clone()),
        None => response.headers_mut().remove(header::AGE),
    };
    Some(response)
}

/// The request that the load was begun for: it has its response or not.
enum Client<R: Body, E> {
    /// And whether it wants no body.
    Waiting(Reply<R, E>, bool),
    Streaming(mpsc::UnboundedSender<Piece<R>>),
    Gone,
}

/// A response to a `HEAD` that was loaded whole has none.
fn without_body<R: Body>(response: Response<CacheBody<R>>, head: bool) -> Response<CacheBody<R>> {
    if head { response.map(|_| CacheBody::full(Bytes::new(), None)) } else { response }
}

impl<R: Body, E> Client<R, E> {
    /// Begins to stream.
    fn stream(&mut self, response: Response<CacheBody<R>>, tx: mpsc::UnboundedSender<Piece<R>>) {
        if let Self::Waiting(reply, head) = std::mem::replace(self, Self::Gone) {
            let _ = reply.send(Ok(without_body(response, head)));
        }
        *self = Self::Streaming(tx);
    }

    /// Nothing is lost on one that hung up.
    fn send(&mut self, piece: Piece<R>) {
        if let Self::Streaming(tx) = self {
            let _ = tx.send(piece);
        }
    }

    /// It has all of it now, or gets it.
    fn end(&mut self, response: impl FnOnce() -> Response<CacheBody<R>>) {
        match std::mem::replace(self, Self::Gone) {
            Self::Waiting(reply, head) => drop(reply.send(Ok(without_body(response(), head)))),
            Self::Streaming(tx) => drop(tx.send(Piece::End)),
            Self::Gone => {}
        }
    }

    /// Sends the last piece; if the response was not sent, that and all before it.
    fn finish(
        mut self,
        copy: Copy,
        last: Piece<R>,
        response: impl FnOnce(mpsc::UnboundedReceiver<Piece<R>>) -> Response<CacheBody<R>>,
    ) {
        if let Self::Waiting(..) = self {
            let (tx, rx) = mpsc::unbounded_channel();
            copy.replay(&tx);
            self.stream(response(rx), tx);
        }
        self.send(last);
    }
}

/// What has been read of a body.
#[derive(Default)]
struct Copy {
    data: Vec<Bytes>,
    size: usize,
    trailers: Option<HeaderMap>,
}

impl Copy {
    /// Whether that was more than the limit.
    fn push(&mut self, frame: &Frame<Bytes>, limit: usize) -> bool {
        if let Some(data) = frame.data_ref() {
            self.size += data.len();
            self.data.push(data.clone());
        } else if let Some(trailers) = frame.trailers_ref() {
            self.trailers = Some(trailers.clone());
        }
        self.size > limit
    }

    fn replay<R: Body>(&self, tx: &mpsc::UnboundedSender<Piece<R>>) {
        let frames = self.data.iter().cloned().map(Frame::data);
        for frame in frames.chain(self.trailers.clone().map(Frame::trailers)) {
            let _ = tx.send(Piece::Frame(frame));
        }
    }

    /// In one piece of its own: a slice would keep the buffer alive that it was read into.
    fn into_parts(self) -> (Bytes, Option<HeaderMap>) {
        (joined(&self.data, self.size), self.trailers)
    }
}

/// The pieces of a body as one.
pub(super) fn joined(pieces: &[Bytes], size: usize) -> Bytes {
    let mut all = BytesMut::with_capacity(size);
    for piece in pieces {
        all.extend_from_slice(piece);
    }
    all.freeze()
}
