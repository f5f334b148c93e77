//! Which responses may be stored and for how long, and which may at least be given to those who wait for the same
//! (RFC 9111, sections 3 and 4.2, for a shared cache).

use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header, response};

use super::directives::{MAX_SECONDS, ResponseDirectives, date, list, single};
use crate::catalog::{Freshness, Lifetime, Policy};

/// How long a response is kept that can only be used after the origin has confirmed it.
const VALIDATE: Duration = Duration::from_secs(86_400);

/// Statuses that may be fresh without saying so (RFC 9110, section 15.1).
const HEURISTIC: [u16; 12] = [200, 203, 204, 206, 300, 301, 308, 404, 405, 410, 414, 501];

/// What may be done with a response.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// For so long, and for requests that have the same of these headers.
    Store(Lifetime, Box<[HeaderName]>),
    /// Not stored, but good for everybody who waits for it and has the same of these headers.
    Share(&'static str, Box<[HeaderName]>),
    /// For nobody but its own request, and the next one will hardly be another.
    Alone(&'static str),
    /// For nobody but its own request, which may have been refused for what it is.
    Decline(&'static str),
    /// The origin failed: those who wait try themselves.
    Fail(&'static str),
}

/// What is known of the exchange besides the response's head.
pub(crate) struct Exchange<'a> {
    pub(crate) policy: &'a Policy,
    /// Request headers that are part of the key in any case.
    pub(crate) keyed: &'a [HeaderName],
    /// The handler says that it is not to be stored.
    pub(crate) no_cache: bool,
    /// The request had credentials: only a response that says that it is for everybody is.
    pub(crate) needs_public: bool,
    pub(crate) targeted: &'a HeaderName,
    pub(crate) now: SystemTime,
    /// How long the origin took.
    pub(crate) took: Duration,
}

pub(crate) fn judge(exchange: &Exchange<'_>, parts: &response::Parts) -> Verdict {
    let policy = exchange.policy;
    let by_response = policy.freshness == Freshness::Response;
    let (status, headers) = (parts.status, &parts.headers);
    let mut directives = ResponseDirectives::of(headers, exchange.targeted);
    // It is for caches that know nothing of this directive, or not what the status means (section 5.2.2.3).
    directives.no_store &= !(directives.must_understand && status.canonical_reason().is_some());
    let says = directives.lifetime(headers, exchange.now);
    let has_validator = headers.contains_key(header::ETAG) || headers.contains_key(header::LAST_MODIFIED);
    let is_meant = || says.is_some() || heuristic(exchange, status, headers, &directives).is_some();
    if status.is_server_error() && !(by_response && is_meant()) {
        return Verdict::Fail("status");
    }
    if let Some(reason) = forbidden(exchange, status, headers, &directives) {
        return Verdict::Alone(reason);
    }
    let Some(names) = varies_by(headers, exchange.keyed) else { return Verdict::Alone("vary") };
    // With others is shared only what might have been stored for them: what a status says of the resource, not of who asks.
    let unstored = |names| match HEURISTIC.contains(&status.as_u16()) {
        true => Verdict::Share("status", names),
        false => Verdict::Decline("status"),
    };
    let own = policy.jittered();
    let stricter = |ttl: Option<Duration>| match (ttl, says) {
        (Some(ttl), Some(says)) => Some(ttl.min(says)),
        (ttl, says) => ttl.or(says),
    };
    let negative = policy.negative.as_ref().filter(|negative| negative.statuses.contains(&status.as_u16()));
    let (fresh, is_mapped) = match (says, negative) {
        (Some(says), _) if by_response => (Some(says), false),
        (_, Some(negative)) => (stricter(negative.ttl.duration()), true),
        _ if by_response => match heuristic(exchange, status, headers, &directives) {
            None if !status.is_success() => return unstored(names),
            None => (own, true),
            Some(heuristic) => (Some(heuristic), false),
        },
        _ if !status.is_success() => return unstored(names),
        _ => (stricter(own), true),
    };
    let age = age(headers, exchange.now);
    let fresh = if directives.no_cache { Some(Duration::ZERO) } else { fresh };
    // What must be validated is no use when the origin fails; `s-maxage` says so too (section 5.2.2.10).
    let strict = directives.no_cache || directives.must_revalidate || directives.proxy_revalidate;
    let strict = strict || directives.s_maxage.is_some();
    let window = |own: Option<Duration>, says: Option<u64>| match (own, says.map(Duration::from_secs)) {
        _ if strict => Duration::ZERO,
        (Some(own), Some(says)) if !by_response => own.min(says),
        (own, says) if by_response => says.or(own).unwrap_or_default(),
        (own, _) => own.unwrap_or_default(),
    };
    let life = Lifetime {
        age,
        fresh,
        refresh: window(policy.stale_while_revalidate, directives.stale_while_revalidate),
        on_error: window(policy.stale_if_error, directives.stale_if_error),
        validate: if by_response && has_validator { VALIDATE } else { Duration::ZERO },
        load: exchange.took,
        is_mapped: is_mapped && !directives.no_cache,
    };
    let is_stale = fresh.is_some_and(|fresh| fresh <= age);
    if is_stale && status.is_server_error() {
        return Verdict::Fail("status");
    }
    if is_stale && !status.is_success() && !HEURISTIC.contains(&status.as_u16()) {
        return Verdict::Decline("status");
    }
    if is_stale && life.validate.is_zero() {
        return Verdict::Share("stale", names);
    }
    Verdict::Store(life, names)
}

/// The request headers that a response depends on, besides those that are part of the key; `None` if on more than headers.
fn varies_by(headers: &HeaderMap, keyed: &[HeaderName]) -> Option<Box<[HeaderName]>> {
    let mut names: Vec<HeaderName> = vec![];
    for name in list(headers, header::VARY) {
        let name = HeaderName::try_from(name).ok().filter(|name| name.as_str() != "*")?;
        if !keyed.contains(&name) {
            names.push(name);
        }
    }
    // What is encoded is not for everybody, also where nobody says so (precompressed files).
    let is_encoded = list(headers, header::CONTENT_ENCODING).any(|coding| !coding.eq_ignore_ascii_case("identity"));
    if is_encoded && !keyed.contains(&header::ACCEPT_ENCODING) {
        names.push(header::ACCEPT_ENCODING);
    }
    names.sort_by(|a, b| a.as_str().cmp(b.as_str()));
    names.dedup();
    Some(names.into())
}

/// Why a response is for nobody but its own request.
fn forbidden(
    exchange: &Exchange<'_>,
    status: StatusCode,
    headers: &HeaderMap,
    directives: &ResponseDirectives,
) -> Option<&'static str> {
    if matches!(status, StatusCode::PARTIAL_CONTENT | StatusCode::NOT_MODIFIED) || status.is_informational() {
        return Some("status");
    }
    // In a 200 it means nothing, but is more likely a mistake of the handler's than none.
    if headers.contains_key(header::CONTENT_RANGE) && exchange.policy.freshness != Freshness::Response {
        return Some("partial");
    }
    if directives.must_understand && status.canonical_reason().is_none() {
        return Some("must-understand");
    }
    if let Some(reason) = reserved(exchange, headers, directives) {
        return Some(reason);
    }
    let media_type = headers.get(header::CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
    for stream in [&b"text/event-stream"[..], b"multipart/x-mixed-replace", b"application/grpc"] {
        if media_type.get(..stream.len()).is_some_and(|start| start.eq_ignore_ascii_case(stream)) {
            return Some("stream");
        }
    }
    None
}

/// Why a response is for nobody but its own request, whatever the protocol: it says so.
pub(crate) fn reserved(
    exchange: &Exchange<'_>,
    headers: &HeaderMap,
    directives: &ResponseDirectives,
) -> Option<&'static str> {
    if exchange.no_cache {
        return Some("no-cache");
    }
    if headers.contains_key(header::SET_COOKIE) && !exchange.policy.stores_cookies {
        return Some("set-cookie");
    }
    let can_validate = exchange.policy.freshness == Freshness::Response;
    for (forbids, detail) in [
        (directives.no_store, "no-store"),
        (directives.private, "private"),
        (directives.no_cache && !can_validate, "no-cache"),
    ] {
        if forbids {
            return Some(detail);
        }
    }
    let is_public = directives.public || directives.must_revalidate || directives.s_maxage.is_some();
    (exchange.needs_public && !is_public).then_some("credentials")
}

/// A tenth of the time since it was last modified (section 4.2.2).
fn heuristic(
    exchange: &Exchange<'_>,
    status: StatusCode,
    headers: &HeaderMap,
    directives: &ResponseDirectives,
) -> Option<Duration> {
    if !(HEURISTIC.contains(&status.as_u16()) || directives.public) {
        return None;
    }
    let modified = single(headers, header::LAST_MODIFIED).and_then(date)?;
    let since = single(headers, header::DATE).and_then(date).unwrap_or(exchange.now);
    since.duration_since(modified).ok().map(|unchanged| unchanged / 10)
}

/// How old a response is when it arrives (section 4.2.3). Of several `Age`s the first counts, and what is none is ignored
/// (section 5.1).
fn age(headers: &HeaderMap, now: SystemTime) -> Duration {
    let said = list(headers, header::AGE).next().filter(|age| age.bytes().all(|digit| digit.is_ascii_digit()));
    let said = said.map_or(0, |age| age.parse().unwrap_or(MAX_SECONDS).min(MAX_SECONDS));
    let apparent = single(headers, header::DATE).and_then(date).and_then(|sent| now.duration_since(sent).ok());
    // Dates have no fractions.
    let apparent = apparent.filter(|age| age.as_secs() > 0).unwrap_or_default();
    apparent.max(Duration::from_secs(said))
}

#[cfg(test)]
mod tests {
    use http::Response;

    use super::*;
    use crate::catalog::{DataType, Ttl};

    fn judge_as(data_type: DataType, status: u16, headers: &[(&str, &str)]) -> Verdict {
        let mut response = Response::builder().status(status);
        for (name, value) in headers {
            response = response.header(*name, *value);
        }
        let targeted = HeaderName::from_static("tower-cache-control");
        let exchange = Exchange {
            policy: &data_type.policy,
            keyed: &[header::ACCEPT_LANGUAGE],
            no_cache: false,
            needs_public: false,
            targeted: &targeted,
            now: date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap(),
            took: Duration::ZERO,
        };
        judge(&exchange, &response.body(()).unwrap().into_parts().0)
    }

    fn show(storable: &Verdict) -> String {
        match storable {
            Verdict::Store(life, names) if names.is_empty() => {
                let left = life.fresh.map(|fresh| fresh.saturating_sub(life.age).as_secs());
                left.map_or("for ever".to_owned(), |left| left.to_string())
            }
            Verdict::Store(_, names) => {
                format!("by {}", names.iter().map(HeaderName::as_str).collect::<Vec<_>>().join(","))
            }
            Verdict::Share(reason, names) if names.is_empty() => format!("shared: {reason}"),
            Verdict::Share(reason, names) => format!("shared: {reason} by {names:?}"),
            Verdict::Decline(reason) => format!("declined: {reason}"),
            Verdict::Alone(reason) => format!("no: {reason}"),
            Verdict::Fail(reason) => format!("failed: {reason}"),
        }
    }

    #[test]
    fn a_response_can_only_tighten_the_ttl() {
        for (status, headers, expected) in [
            (200, &[][..], "3600"),
            (200, &[("cache-control", "public, max-age=5")], "5"),
            (200, &[("cache-control", "max-age=9999999")], "3600"),
            (200, &[("cache-control", "max-age=5"), ("age", "3")], "2"),
            (200, &[("cache-control", "max-age=5"), ("date", "Sun, 06 Nov 1994 08:49:33 GMT")], "1"),
            (200, &[("cache-control", "max-age=5"), ("age", "9")], "shared: stale"),
            (200, &[("cache-control", "max-age=5"), ("age", "1, 9")], "4"),
            (200, &[("cache-control", "max-age=5"), ("age", "9, 1")], "shared: stale"),
            (200, &[("cache-control", "max-age=5"), ("age", "1"), ("age", "9")], "4"),
            (200, &[("cache-control", "max-age=5"), ("age", "-1")], "5"),
            (200, &[("cache-control", "max-age=5"), ("age", "abc")], "5"),
            (200, &[("cache-control", "max-age=5"), ("age", "9.0")], "5"),
            (200, &[("cache-control", "max-age=5"), ("age", "99999999999999999999999")], "shared: stale"),
            (200, &[("cache-control", "max-age=5, no-store, must-understand")], "5"),
            (200, &[("cache-control", "max-age=5, no-store")], "no: no-store"),
            (200, &[("cache-control", "max-age=-1")], "shared: stale"),
            (200, &[("expires", "0")], "shared: stale"),
            (200, &[("expires", "Sun, 06 Nov 1994 08:50:07 GMT")], "30"),
            (200, &[("tower-cache-control", "max-age=7"), ("cache-control", "no-store")], "7"),
            (200, &[("x-private", "private")], "3600"),
            (204, &[], "3600"),
            (200, &[("vary", "accept-language, Accept-Language")], "3600"),
            (200, &[("vary", "accept-language, Accept"), ("vary", "x-b, accept")], "by accept,x-b"),
            (200, &[("vary", "*")], "no: vary"),
            (200, &[("vary", "accept, *")], "no: vary"),
            (404, &[], "shared: status"),
            (404, &[("cache-control", "max-age=5")], "shared: status"),
            (301, &[], "shared: status"),
            (302, &[], "declined: status"),
            (401, &[], "declined: status"),
            (429, &[], "declined: status"),
            (404, &[("vary", "accept")], "shared: status by [\"accept\"]"),
            (200, &[("cache-control", "max-age=0"), ("vary", "accept")], "shared: stale by [\"accept\"]"),
            (200, &[("content-encoding", "gzip")], "by accept-encoding"),
            (200, &[("content-encoding", "identity")], "3600"),
            (206, &[], "no: status"),
            (500, &[("cache-control", "max-age=5")], "failed: status"),
            (200, &[("set-cookie", "a=b")], "no: set-cookie"),
            (404, &[("set-cookie", "a=b")], "no: set-cookie"),
            (200, &[("content-range", "bytes 0-1/2")], "no: partial"),
            (200, &[("cache-control", "Private")], "no: private"),
            (200, &[("cache-control", "max-age=5,NO-STORE")], "no: no-store"),
            (200, &[("cache-control", "max-age=5"), ("cache-control", "no-cache=\"x\"")], "no: no-cache"),
            (200, &[("content-type", "text/event-stream; charset=utf-8")], "no: stream"),
        ] {
            let data_type = DataType::new("page", Ttl::Standard);
            assert_eq!(show(&judge_as(data_type, status, headers)), expected, "{status} {headers:?}");
        }
    }

    #[test]
    fn a_response_may_be_taken_at_its_word() {
        let modified = ("last-modified", "Sun, 06 Nov 1994 08:32:57 GMT");
        for (status, headers, expected) in [
            (200, &[][..], "shared: stale"),
            (200, &[("cache-control", "max-age=9999999")], "9999999"),
            (404, &[("cache-control", "max-age=5")], "5"),
            (503, &[("cache-control", "max-age=5")], "5"),
            (503, &[], "failed: status"),
            (403, &[], "declined: status"),
            (404, &[], "shared: status"),
            (200, &[modified], "100"),
            (404, &[modified], "100"),
            (501, &[modified], "100"),
            (502, &[modified], "failed: status"),
            (599, &[("cache-control", "max-age=5")], "5"),
            (599, &[("cache-control", "max-age=5, must-understand")], "no: must-understand"),
            (599, &[("cache-control", "max-age=5, no-store, must-understand")], "no: must-understand"),
            (200, &[("expires", "SUN, 06 nov 1994 08:50:07 gmt")], "30"),
            (403, &[modified], "declined: status"),
            (401, &[("cache-control", "max-age=0")], "declined: status"),
            (401, &[("cache-control", "no-cache"), ("etag", "\"a\"")], "declined: status"),
            (401, &[("cache-control", "max-age=5")], "5"),
            (503, &[("cache-control", "max-age=0")], "failed: status"),
            (404, &[("cache-control", "max-age=0"), ("etag", "\"a\"")], "0"),
            (599, &[modified], "failed: status"),
            (599, &[modified, ("cache-control", "public")], "100"),
            (200, &[("cache-control", "max-age=5, no-cache"), ("etag", "\"a\"")], "0"),
            (200, &[("cache-control", "no-cache")], "shared: stale"),
            (200, &[("cache-control", "max-age=0"), ("etag", "\"a\"")], "0"),
        ] {
            let data_type = DataType::new("page", Duration::ZERO).freshness(Freshness::Response);
            assert_eq!(show(&judge_as(data_type, status, headers)), expected, "{status} {headers:?}");
        }
    }

    #[test]
    fn only_some_words_make_a_response_everybodys() {
        let targeted = HeaderName::from_static("tower-cache-control");
        for (control, is_public) in [
            ("public", true),
            ("s-maxage=5", true),
            ("must-revalidate", true),
            ("proxy-revalidate", false),
            ("max-age=5", false),
        ] {
            let response = http::Response::builder().header("cache-control", control).body(()).unwrap();
            let data_type = DataType::new("page", Ttl::Standard);
            let exchange = Exchange {
                policy: &data_type.policy,
                keyed: &[],
                no_cache: false,
                needs_public: true,
                targeted: &targeted,
                now: SystemTime::UNIX_EPOCH,
                took: Duration::ZERO,
            };
            let verdict = show(&judge(&exchange, &response.into_parts().0));
            assert_eq!(verdict != "no: credentials", is_public, "{control}");
        }
    }

    #[test]
    fn negative_answers_have_a_ttl_of_their_own() {
        let data_type = || DataType::new("page", Ttl::Standard).negative([404, 410], Duration::from_secs(10));
        for (status, headers, expected) in [
            (404, &[][..], "10"),
            (410, &[], "10"),
            (404, &[("cache-control", "max-age=5")], "5"),
            (404, &[("cache-control", "no-store")], "no: no-store"),
            (403, &[], "declined: status"),
            (200, &[], "3600"),
        ] {
            assert_eq!(show(&judge_as(data_type(), status, headers)), expected, "{status} {headers:?}");
        }
    }

    #[test]
    fn windows_of_staleness_are_the_types_unless_the_response_forbids() {
        let second = Duration::from_secs(1);
        let data_type = || {
            let data_type = DataType::new("page", Ttl::Standard).stale_while_revalidate(60 * second);
            data_type.stale_if_error(600 * second)
        };
        for (control, refresh, on_error) in [
            ("max-age=5", 60, 600),
            ("max-age=5, stale-while-revalidate=7, stale-if-error=9000", 7, 600),
            ("max-age=5, must-revalidate", 0, 0),
            ("max-age=5, proxy-revalidate", 0, 0),
            ("s-maxage=5", 0, 0),
        ] {
            let Verdict::Store(life, _) = judge_as(data_type(), 200, &[("cache-control", control)]) else { panic!() };
            assert_eq!((life.refresh.as_secs(), life.on_error.as_secs()), (refresh, on_error), "{control}");
        }
    }

    /// RFC 5861: for how long what has expired is served on purpose.
    #[test]
    fn a_window_is_only_tightened_unless_the_response_is_taken_at_its_word() {
        for (own, says, tightened, by_response) in [
            (None, "max-age=60", 0, 0),
            (Some(10), "max-age=60", 10, 10),
            (None, "max-age=60, stale-while-revalidate=20", 0, 20),
            (Some(10), "max-age=60, stale-while-revalidate=20", 10, 20),
            (Some(10), "max-age=60, stale-while-revalidate=5", 5, 5),
            (Some(10), "max-age=60, stale-while-revalidate=20, must-revalidate", 0, 0),
        ] {
            for (freshness, expected) in [(Freshness::Tighten, tightened), (Freshness::Response, by_response)] {
                let mut data_type = DataType::new("page", Ttl::Standard).freshness(freshness);
                if let Some(own) = own {
                    data_type = data_type.stale_while_revalidate(Duration::from_secs(own));
                }
                let Verdict::Store(life, _) = judge_as(data_type, 200, &[("cache-control", says)]) else {
                    panic!("{says} is not stored");
                };
                assert_eq!(life.refresh.as_secs(), expected, "{own:?} {says} {freshness:?}");
            }
        }
    }
}
