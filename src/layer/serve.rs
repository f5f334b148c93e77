//! From an entry and what a request asks for to a response: whole, without its body (`HEAD`), not modified (304), or a
//! part (206).

use std::sync::Arc;

use bytes::Bytes;
use http::{
    Extensions, HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode,
    header::{self, InvalidHeaderValue},
    request, response,
};
use http_body::Body;

use crate::{
    clock::Millis,
    engine::Source,
    http::{
        cache_status::{Forwarded, Handled},
        conditions::Preconditions,
        directives::{RequestDirectives, ResponseDirectives},
        ranges::parse_range,
    },
    layer::body::CacheBody,
    observe::{Found, FoundIn, Outcome, Teller},
    store::{Entry, Payload, StoredResponse},
};

/// What of a request decides how an entry answers it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Asked {
    pub(crate) head: bool,
    /// Absent in most requests.
    extras: Option<Box<Extras>>,
}

#[derive(Clone, Debug, Default)]
struct Extras {
    /// Whether its headers may ask for anything but the whole response.
    is_conditional: bool,
    preconditions: Preconditions,
    range: Option<HeaderValue>,
    directives: RequestDirectives,
    /// Say the key in `Cache-Status`.
    key: Option<Bytes>,
    /// It is asked to warm: what ends within this time is replaced.
    ahead: Option<Millis>,
}

impl Asked {
    /// `is_conditional` and `honours_directives` spare most requests the look at their headers.
    pub(crate) fn new(parts: &request::Parts, is_conditional: bool, honours_directives: bool) -> Self {
        let head = parts.method == Method::HEAD;
        let headers = &parts.headers;
        let extras = is_conditional.then(|| {
            Box::new(Extras {
                is_conditional,
                preconditions: Preconditions::of(headers),
                range: headers.get(header::RANGE).filter(|_| !head).cloned(),
                directives: if honours_directives { RequestDirectives::of(headers) } else { Default::default() },
                ..Extras::default()
            })
        });
        Self { head, extras }
    }

    #[cfg(feature = "warm")]
    pub(crate) fn warm(&mut self, ahead: Millis) {
        self.extras.get_or_insert_default().ahead = Some(ahead);
    }

    pub(crate) fn say_key(&mut self, key: &[u8]) {
        self.extras.get_or_insert_default().key = Some(Bytes::copy_from_slice(key));
    }

    /// Whether it may be answered by another response than what is stored, or by a part of it.
    pub(crate) fn is_conditional(&self) -> bool {
        self.head || self.extras.as_ref().is_some_and(|extras| extras.is_conditional)
    }

    /// The key, if it is to be said.
    pub(crate) fn key(&self) -> Option<&[u8]> {
        self.extras.as_ref().and_then(|extras| extras.key.as_deref())
    }

    /// What is asked for to warm the cache, and how long before it ends it is replaced.
    pub(crate) fn ahead(&self) -> Option<Millis> {
        self.extras.as_ref().and_then(|extras| extras.ahead)
    }

    pub(crate) fn directives(&self) -> Option<&RequestDirectives> {
        self.extras.as_ref().map(|extras| &extras.directives)
    }

    /// Whether what the client has is this response of the inner service.
    pub(crate) fn is_not_modified(&self, parts: &response::Parts) -> bool {
        let extras = self.extras.as_ref().filter(|_| parts.status == StatusCode::OK);
        extras.is_some_and(|extras| extras.preconditions.is_not_modified(&parts.headers))
    }

    /// Whether an entry that is good is to be replaced before it ends: by chance, or because that is what is asked.
    pub(crate) fn replaces(&self, entry: &Entry, now: Millis, beta: f64) -> bool {
        entry.is_due(now, beta) || self.ahead().is_some_and(|ahead| entry.ends_within(ahead, now))
    }

    /// Whether the response to this request would be no good for others.
    pub(crate) fn is_partial(&self) -> bool {
        self.head || self.extras.as_ref().is_some_and(|extras| extras.range.is_some())
    }

    /// Whether the request's directives let this entry answer it (RFC 9111, section 5.2.1).
    pub(crate) fn accepts(&self, entry: &Entry, now: Millis) -> bool {
        self.directives().is_none_or(|directives| directives.accept(entry.age(now), entry.ttl(now)))
    }

    /// Whether the request says that so stale an entry is good enough, and the response does not forbid it.
    pub(crate) fn accepts_stale(&self, entry: &Entry, now: Millis, targeted: &HeaderName) -> bool {
        let (Some(most), Payload::Response(stored)) = (self.directives().and_then(|d| d.max_stale), &entry.payload)
        else {
            return false;
        };
        let says = ResponseDirectives::of(&stored.headers.to_map(), targeted);
        let strict = says.must_revalidate || says.proxy_revalidate || says.no_cache || says.s_maxage.is_some();
        !strict && entry.ttl(now).is_some_and(|ttl| -ttl <= most as i64) && self.accepts(entry, now)
    }
}

/// How an entry came to answer a request, and who tells of it.
#[derive(Clone, Copy)]
pub(crate) struct How<'a> {
    pub(crate) teller: &'a Teller,
    /// If not by a hit.
    handled: Option<Handled>,
    tier: FoundIn,
    is_stale: bool,
}

impl<'a> How<'a> {
    pub(crate) fn hit(teller: &'a Teller, tier: FoundIn) -> Self {
        Self { teller, handled: None, tier, is_stale: false }
    }

    /// On purpose, although it is not fresh.
    pub(crate) fn stale(teller: &'a Teller, tier: FoundIn) -> Self {
        Self { is_stale: true, ..Self::hit(teller, tier) }
    }

    /// It came from the inner service.
    pub(crate) fn forwarded(teller: &'a Teller, forwarded: Forwarded) -> Self {
        Self { handled: Some(Handled::Forwarded(forwarded)), ..Self::hit(teller, FoundIn::Process) }
    }

    /// As the engine has it.
    pub(crate) fn of(source: Source, teller: &'a Teller, tier: FoundIn, collapsed: Forwarded) -> Self {
        match source {
            Source::Store => Self::hit(teller, tier),
            Source::Flight => Self::forwarded(teller, collapsed),
            Source::Stale => Self::stale(teller, tier),
        }
    }

    pub(crate) fn handled(&self, ttl: Option<i64>) -> Handled {
        self.handled.unwrap_or(Handled::Hit { ttl })
    }

    /// Says it in the headers of what was stored.
    fn say(&self, headers: &mut HeaderMap, (age, ttl): (u64, Option<i64>), status: StatusCode, asked: &Asked) {
        self.teller.say(self.handled(ttl), headers, Some(status), asked.key());
        if let (Some(place), Ok(age)) = (headers.get_mut(header::AGE), number(age)) {
            *place = age;
        }
    }

    pub(crate) fn outcome<R: Body>(&self, entry: &Entry, now: Millis, body: &CacheBody<R>) -> Outcome {
        let (age, load, bytes) = (entry.age(now), entry.load, body.held());
        let found = Found { tier: self.tier, age, is_stale: self.is_stale, load, bytes };
        self.teller.outcome(self.handled(entry.ttl(now)), Some(found))
    }
}

/// The response that an entry holds, or the part of it that was asked for; `None` if it holds none.
pub(crate) fn serve<R: Body>(
    entry: &Entry,
    now: Millis,
    asked: &Asked,
    how: How<'_>,
) -> Option<Response<CacheBody<R>>> {
    let stored = entry.response()?;
    let mut response = answer((entry, stored), now, asked, how);
    let outcome = how.outcome(entry, now, response.body());
    response.extensions_mut().insert(outcome);
    Some(response)
}

/// The same, without the [`Outcome`]. (What is returned as it is, is made where it is to be: that a response is moved once more is
/// felt.)
pub(crate) fn answer<R: Body>(
    (entry, stored): (&Entry, &StoredResponse),
    now: Millis,
    asked: &Asked,
    how: How<'_>,
) -> Response<CacheBody<R>> {
    let (age, ttl) = (entry.age(now).as_secs(), entry.ttl(now));
    let make = || {
        let mut headers = stored.headers.to_map().into_owned();
        how.say(&mut headers, (age, ttl), stored.status, asked);
        headers
    };
    let headers = match (how.handled, asked.key()) {
        (None, None) => entry.replay.headers((age, ttl.unwrap_or(0)), how.teller.name(), make),
        _ => make(),
    };
    match &asked.extras {
        Some(extras) => conditionally(stored, headers, asked.head, extras),
        None => whole(stored, headers, asked.head),
    }
}

/// The same of an entry that is not needed any more: what nobody else has is not copied.
pub(crate) fn use_up<R: Body>(
    mut entry: Arc<Entry>,
    now: Millis,
    asked: &Asked,
    how: How<'_>,
    extensions: Extensions,
) -> Option<Response<CacheBody<R>>> {
    let (age, ttl) = (entry.age(now).as_secs(), entry.ttl(now));
    let own = Arc::get_mut(&mut entry).filter(|_| !asked.is_conditional());
    let mut response = match own.map(|entry| &mut entry.payload) {
        Some(Payload::Response(stored)) => {
            let mut headers = std::mem::take(&mut stored.headers).into_map();
            how.say(&mut headers, (age, ttl), stored.status, asked);
            let trailers = stored.trailers.take().map(|trailers| *trailers);
            respond(stored.status, headers, CacheBody::full(std::mem::take(&mut stored.body), trailers))
        }
        _ => answer((&entry, entry.response()?), now, asked, how),
    };
    let outcome = how.outcome(&entry, now, response.body());
    put_outcome(&mut response, extensions, outcome);
    Some(response)
}

/// Puts the outcome in what its request held its extensions in, which has room for it.
pub(crate) fn put_outcome<T>(response: &mut Response<T>, mut extensions: Extensions, outcome: Outcome) {
    extensions.clear();
    extensions.insert(outcome);
    *response.extensions_mut() = extensions;
}

/// A response that is not stored, as far as its request asked for it. The handler that `is_asked` has said what it says.
pub(crate) fn unstored<R: Body>(
    parts: response::Parts,
    body: R,
    asked: &Asked,
    is_asked: bool,
) -> Response<CacheBody<R>> {
    if !is_asked && asked.is_not_modified(&parts) {
        return not_modified(parts);
    }
    // Where it was loaded whole.
    let body = if asked.head { CacheBody::full(Bytes::new(), None) } else { CacheBody::inner(body) };
    Response::from_parts(parts, body)
}

/// What the client needs to know of what it has (RFC 9110, section 15.4.5), not what describes a body.
pub(crate) fn not_modified<R: Body>(mut parts: response::Parts) -> Response<CacheBody<R>> {
    parts.status = StatusCode::NOT_MODIFIED;
    for of_body in [
        header::CONTENT_LENGTH,
        header::CONTENT_TYPE,
        header::CONTENT_ENCODING,
        header::CONTENT_LANGUAGE,
        header::CONTENT_RANGE,
    ] {
        parts.headers.remove(of_body);
    }
    Response::from_parts(parts, CacheBody::full(Bytes::new(), None))
}

fn respond<R: Body>(status: StatusCode, headers: HeaderMap, body: CacheBody<R>) -> Response<CacheBody<R>> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}

fn whole<R: Body>(stored: &StoredResponse, mut headers: HeaderMap, head: bool) -> Response<CacheBody<R>> {
    let body = if head {
        if !stored.body.is_empty() && !headers.contains_key(header::CONTENT_LENGTH) {
            headers.insert(header::CONTENT_LENGTH, stored.body.len().into());
        }
        CacheBody::full(Bytes::new(), None)
    } else {
        CacheBody::full(stored.body.clone(), stored.trailers.as_deref().cloned())
    };
    respond(stored.status, headers, body)
}

fn conditionally<R: Body>(
    stored: &StoredResponse,
    mut headers: HeaderMap,
    head: bool,
    extras: &Extras,
) -> Response<CacheBody<R>> {
    if stored.status != StatusCode::OK {
        return whole(stored, headers, head);
    }
    if extras.preconditions.is_not_modified(&headers) {
        let mut parts = Response::new(()).into_parts().0;
        parts.headers = headers;
        return not_modified(parts);
    }
    let length = stored.body.len();
    match extras.range.as_ref().and_then(|range| parse_range(range, length)) {
        None => whole(stored, headers, head),
        Some(None) => {
            let unsatisfied = HeaderValue::try_from(format!("bytes */{length}"));
            headers.remove(header::CONTENT_LENGTH);
            headers.extend(unsatisfied.ok().map(|value| (header::CONTENT_RANGE, value)));
            respond(StatusCode::RANGE_NOT_SATISFIABLE, headers, CacheBody::full(Bytes::new(), None))
        }
        Some(Some((first, last))) => {
            let range = HeaderValue::try_from(format!("bytes {first}-{last}/{length}"));
            headers.insert(header::CONTENT_LENGTH, (last - first + 1).into());
            headers.extend(range.ok().map(|value| (header::CONTENT_RANGE, value)));
            let part = stored.body.slice(first..=last);
            respond(StatusCode::PARTIAL_CONTENT, headers, CacheBody::full(part, None))
        }
    }
}

/// A number as a header, in one allocation.
fn number(number: u64) -> Result<HeaderValue, InvalidHeaderValue> {
    HeaderValue::from_str(itoa::Buffer::new().format(number))
}
