//! From an entry and what a request asks for to a response: whole, without its body (`HEAD`), not modified (304), or a
//! part (206).

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode,
    header::{self, InvalidHeaderValue},
    request,
};
use http_body::Body;
use sha2::{Digest, Sha256};

use super::{
    body::CacheBody,
    cache_status::Handled,
    directives::{RequestDirectives, ResponseDirectives, date, single},
};
use crate::store::{Entry, Millis, Payload, StoredResponse};

/// What the entity tags begin with that the cache computes: the origin does not know them.
const OWN_TAG: &str = "\"tca-";

/// What of a request decides how an entry answers it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Asked {
    pub(crate) head: bool,
    /// Absent in most requests.
    pub(crate) conditions: Option<Box<Conditions>>,
    /// Say the key in `Cache-Status`.
    pub(crate) key: Option<Bytes>,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Conditions {
    none_match: Vec<HeaderValue>,
    modified_since: Option<SystemTime>,
    range: Option<HeaderValue>,
    pub(crate) directives: RequestDirectives,
}

impl Asked {
    /// `is_conditional` and `honours_directives` spare most requests the look at their headers.
    pub(crate) fn new(parts: &request::Parts, is_conditional: bool, honours_directives: bool) -> Self {
        let head = parts.method == Method::HEAD;
        let conditions = is_conditional.then(|| {
            let headers = &parts.headers;
            let none_match: Vec<_> = headers.get_all(header::IF_NONE_MATCH).iter().cloned().collect();
            Box::new(Conditions {
                // Of two conditions the tag counts (RFC 9110, section 13.2.2).
                modified_since: single(headers, header::IF_MODIFIED_SINCE)
                    .filter(|_| none_match.is_empty())
                    .and_then(date),
                none_match,
                range: headers.get(header::RANGE).filter(|_| !head).cloned(),
                directives: if honours_directives { RequestDirectives::of(headers) } else { Default::default() },
            })
        });
        Self { head, conditions, key: None }
    }

    pub(crate) fn directives(&self) -> Option<&RequestDirectives> {
        self.conditions.as_ref().map(|c| &c.directives)
    }

    /// Whether the response to this request would be no good for others.
    pub(crate) fn is_partial(&self) -> bool {
        self.head || self.conditions.as_ref().is_some_and(|c| c.range.is_some())
    }

    /// Whether the request's directives let this entry answer it (RFC 9111, section 5.2.1).
    pub(crate) fn accepts(&self, entry: &Entry, now: Millis) -> bool {
        let Some(directives) = self.directives() else { return true };
        let seconds = Duration::from_secs;
        !directives.no_cache
            && directives.max_age.is_none_or(|most| entry.age(now) <= seconds(most))
            && directives.min_fresh.is_none_or(|least| entry.ttl(now).is_none_or(|ttl| ttl >= least as i64))
    }

    /// Whether the request says that so stale an entry is good enough, and the response does not forbid it.
    pub(crate) fn accepts_stale(&self, entry: &Entry, now: Millis, targeted: &HeaderName) -> bool {
        let (Some(most), Payload::Response(stored)) = (self.directives().and_then(|d| d.max_stale), &entry.payload)
        else {
            return false;
        };
        let says = ResponseDirectives::of(&stored.headers, targeted);
        let strict = says.must_revalidate || says.no_cache || says.s_maxage.is_some();
        !strict && entry.ttl(now).is_some_and(|ttl| -ttl <= most as i64) && self.accepts(entry, now)
    }
}

impl Conditions {
    /// Whether what the client has is what is stored (RFC 9110, sections 13.1.2 and 13.1.3).
    fn is_not_modified(&self, stored: &HeaderMap) -> bool {
        if !self.none_match.is_empty() {
            let own = stored.get(header::ETAG).map(HeaderValue::as_bytes).map(opaque);
            return self.none_match.iter().any(|line| {
                line.as_bytes().trim_ascii() == b"*"
                    || own.is_some_and(|own| tags(line.as_bytes()).any(|tag| tag == own))
            });
        }
        let Some(since) = self.modified_since else { return false };
        let modified = single(stored, header::LAST_MODIFIED).or_else(|| single(stored, header::DATE)).and_then(date);
        modified.is_some_and(|modified| modified <= since)
    }
}

/// An entity tag without its weakness, which does not count here.
fn opaque(tag: &[u8]) -> &[u8] {
    let tag = tag.trim_ascii();
    tag.strip_prefix(b"W/").unwrap_or(tag)
}

/// The tags of a list. A comma in a tag parts nothing.
fn tags(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut quoted = false;
    line.split(move |&b| {
        quoted ^= b == b'"';
        b == b',' && !quoted
    })
    .map(opaque)
}

/// A strong entity tag: 120 bits of the body's SHA-256.
pub(crate) fn entity_tag(body: &[u8]) -> Result<HeaderValue, InvalidHeaderValue> {
    let digest = Sha256::digest(body);
    let hex: String = digest[..15].iter().map(|b| format!("{b:02x}")).collect();
    HeaderValue::from_str(&format!("{OWN_TAG}{hex}\""))
}

/// Asks the origin whether what is stored is still good (RFC 9111, section 4.3.1); whether there is anything to ask by.
pub(crate) fn validate(request: &mut HeaderMap, stored: &HeaderMap) -> bool {
    let tag = stored.get(header::ETAG).filter(|tag| !tag.as_bytes().starts_with(OWN_TAG.as_bytes()));
    let modified = stored.get(header::LAST_MODIFIED);
    if let Some(tag) = tag {
        request.insert(header::IF_NONE_MATCH, tag.clone());
    }
    if let Some(modified) = modified {
        request.insert(header::IF_MODIFIED_SINCE, modified.clone());
    }
    tag.is_some() || modified.is_some()
}

/// The response that an entry holds, or the part of it that was asked for; `None` if it holds none. `handled` is how it
/// came to be, if not by a hit.
pub(crate) fn serve<R: Body>(
    entry: &Entry,
    now: Millis,
    asked: &Asked,
    handled: Option<Handled>,
) -> Option<Response<CacheBody<R>>> {
    let Payload::Response(stored) = &entry.payload else { return None };
    let (age, ttl) = (entry.age(now).as_secs(), entry.ttl(now));
    let make = |handled: Handled| {
        let mut headers = stored.headers.clone();
        handled.append(&mut headers, Some(stored.status), asked.key.as_deref());
        if let (Some(place), Ok(age)) = (headers.get_mut(header::AGE), number(age)) {
            *place = age;
        }
        headers
    };
    let headers = match handled {
        None if asked.key.is_none() => entry.replay.headers(age, ttl.unwrap_or(0), || make(Handled::Hit { ttl })),
        None => make(Handled::Hit { ttl }),
        Some(handled) => make(handled),
    };
    let mut response = match &asked.conditions {
        Some(conditions) => conditionally(stored, headers, asked.head, conditions),
        None => whole(stored, headers, asked.head),
    };
    if response.headers().get(header::AGE).is_some_and(HeaderValue::is_empty) {
        response.headers_mut().remove(header::AGE);
    }
    Some(response)
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
        CacheBody::full(stored.body.clone(), stored.trailers.clone())
    };
    respond(stored.status, headers, body)
}

fn conditionally<R: Body>(
    stored: &StoredResponse,
    mut headers: HeaderMap,
    head: bool,
    conditions: &Conditions,
) -> Response<CacheBody<R>> {
    if stored.status != StatusCode::OK {
        return whole(stored, headers, head);
    }
    if conditions.is_not_modified(&stored.headers) {
        // What the client needs to know of what it has (RFC 9110, section 15.4.5), not what describes a body.
        for of_body in [
            header::CONTENT_LENGTH,
            header::CONTENT_TYPE,
            header::CONTENT_ENCODING,
            header::CONTENT_LANGUAGE,
            header::CONTENT_RANGE,
        ] {
            headers.remove(of_body);
        }
        return respond(StatusCode::NOT_MODIFIED, headers, CacheBody::full(Bytes::new(), None));
    }
    let length = stored.body.len();
    match conditions.range.as_ref().and_then(|range| parse_range(range, length)) {
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

/// A single range of bytes (RFC 9110, section 14.1.2): `None` if it is to be ignored, `Some(None)` if there are no such
/// bytes.
fn parse_range(range: &HeaderValue, length: usize) -> Option<Option<(usize, usize)>> {
    let (first, last) = range.to_str().ok()?.strip_prefix("bytes=")?.split_once('-')?;
    let number = |text: &str| text.trim().parse::<usize>().ok();
    match (first.trim(), last.trim()) {
        ("", suffix) => {
            let suffix = number(suffix)?;
            Some((suffix > 0 && length > 0).then(|| (length.saturating_sub(suffix), length - 1)))
        }
        (first, last) => {
            let first = number(first)?;
            let last = if last.is_empty() { usize::MAX } else { number(last)? };
            if last < first {
                return None;
            }
            Some((first < length).then(|| (first, last.min(length - 1))))
        }
    }
}

/// A number as a header, in one allocation.
fn number(number: u64) -> Result<HeaderValue, InvalidHeaderValue> {
    HeaderValue::from_str(itoa::Buffer::new().format(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(lines: &[(&'static str, &'static str)]) -> HeaderMap {
        let name = http::HeaderName::from_static;
        lines.iter().map(|(n, v)| (name(n), HeaderValue::from_static(v))).collect()
    }

    /// RFC 9110, sections 8.8.3.2 and 13.1.
    #[test]
    fn conditions_compare_weakly_and_by_second() {
        let earlier = "Sun, 06 Nov 1994 08:49:36 GMT";
        let modified = "Sun, 06 Nov 1994 08:49:37 GMT";
        let later = "Sun, 06 Nov 1994 08:49:38 GMT";
        for (request, stored, expected) in [
            (("if-none-match", "\"a\""), ("etag", "\"a\""), true),
            (("if-none-match", "W/\"a\""), ("etag", "\"a\""), true),
            (("if-none-match", "\"a\""), ("etag", "W/\"a\""), true),
            (("if-none-match", "\"b\", \"a\" , \"c\""), ("etag", "\"a\""), true),
            (("if-none-match", "\"b,\", \"a,a\""), ("etag", "\"a,a\""), true),
            (("if-none-match", "\"b,a\""), ("etag", "\"a\""), false),
            (("if-none-match", "a"), ("etag", "\"a\""), false),
            (("if-none-match", "*"), ("x", "y"), true),
            (("if-none-match", "\"a\""), ("x", "y"), false),
            (("if-modified-since", modified), ("last-modified", modified), true),
            (("if-modified-since", later), ("last-modified", modified), true),
            (("if-modified-since", earlier), ("last-modified", modified), false),
            (("if-modified-since", "Sunday, 06-Nov-94 08:49:37 GMT"), ("last-modified", modified), true),
            (("if-modified-since", modified), ("date", modified), true),
            (("if-modified-since", "nonsense"), ("last-modified", modified), false),
            (("if-modified-since", modified), ("x", "y"), false),
        ] {
            let mut parts = http::Request::new(()).into_parts().0;
            parts.headers = headers(&[request]);
            let asked = Asked::new(&parts, true, false);
            let found = asked.conditions.unwrap().is_not_modified(&headers(&[stored]));
            assert_eq!(found, expected, "{request:?} {stored:?}");
        }
    }

    #[test]
    fn ranges_are_single_or_ignored() {
        for (range, expected) in [
            ("bytes=0-1", Some(Some((0, 1)))),
            ("bytes=8-", Some(Some((8, 9)))),
            ("bytes=-3", Some(Some((7, 9)))),
            ("bytes=-30", Some(Some((0, 9)))),
            ("bytes=5-50", Some(Some((5, 9)))),
            ("bytes=10-", Some(None)),
            ("bytes=-0", Some(None)),
            ("bytes=3-2", None),
            ("bytes=0-1,3-4", None),
            ("bytes=a-b", None),
            ("lines=0-1", None),
            ("bytes", None),
        ] {
            assert_eq!(parse_range(&HeaderValue::from_static(range), 10), expected, "{range}");
        }
    }
}
