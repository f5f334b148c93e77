//! Which responses may be stored, and which may at least be given to those who wait for the same.

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header, response};

use super::cache_status::CACHE_STATUS;
use crate::route::ReadRoute;

/// What may be done with a response.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Storable {
    Yes,
    /// Not stored, but good for everybody who waits for it.
    Shared(&'static str),
    /// For nobody but its own request.
    No(&'static str),
    /// The origin failed: those who wait try themselves.
    Failed(&'static str),
}

pub(crate) fn storable(route: &ReadRoute, parts: &response::Parts) -> Storable {
    let headers = &parts.headers;
    if parts.status.is_server_error() {
        return Storable::Failed("status");
    }
    if parts.status == StatusCode::PARTIAL_CONTENT || parts.status.is_informational() {
        return Storable::No("status");
    }
    if headers.contains_key(header::SET_COOKIE) {
        return Storable::No("set-cookie");
    }
    if headers.contains_key(header::CONTENT_RANGE) {
        return Storable::No("partial");
    }
    for directive in list(headers, header::CACHE_CONTROL) {
        let name = directive.split('=').next().unwrap_or_default().trim();
        for (forbids, detail) in [("no-store", "no-store"), ("private", "private"), ("no-cache", "no-cache")] {
            if name.eq_ignore_ascii_case(forbids) {
                return Storable::No(detail);
            }
        }
    }
    for name in list(headers, header::VARY) {
        if !route.vary.iter().any(|v| v.as_str().eq_ignore_ascii_case(name)) {
            return Storable::No("vary");
        }
    }
    let media_type = headers.get(header::CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
    for stream in [&b"text/event-stream"[..], b"multipart/x-mixed-replace", b"application/grpc"] {
        if media_type.get(..stream.len()).is_some_and(|start| start.eq_ignore_ascii_case(stream)) {
            return Storable::No("stream");
        }
    }
    if !parts.status.is_success() { Storable::Shared("status") } else { Storable::Yes }
}

/// The members of a comma-separated header, over all its lines.
fn list(headers: &HeaderMap, name: HeaderName) -> impl Iterator<Item = &str> {
    let lines = headers.get_all(name).into_iter().map(|v| v.to_str().unwrap_or("*"));
    lines.flat_map(|line| line.split(',')).map(str::trim).filter(|member| !member.is_empty())
}

/// Headers as they are stored: without those of the connection (RFC 9110, section 7.6.1), and with places for those that
/// a hit adds.
pub(crate) fn stored_headers(headers: &HeaderMap) -> HeaderMap {
    const HOP_BY_HOP: [HeaderName; 6] = [
        header::CONNECTION,
        header::PROXY_AUTHENTICATE,
        header::TE,
        header::TRAILER,
        header::TRANSFER_ENCODING,
        header::UPGRADE,
    ];
    let named: Vec<_> = list(headers, header::CONNECTION).collect();
    let mut stored = HeaderMap::with_capacity(headers.keys_len() + 2);
    for (name, value) in headers {
        let hop = HOP_BY_HOP.contains(name)
            || matches!(name.as_str(), "keep-alive" | "proxy-connection")
            || named.iter().any(|n| n.eq_ignore_ascii_case(name.as_str()));
        if !hop && *name != header::AGE {
            stored.append(name.clone(), value.clone());
        }
    }
    const EMPTY: HeaderValue = HeaderValue::from_static("");
    stored.entry(CACHE_STATUS).or_insert(EMPTY);
    stored.insert(header::AGE, EMPTY);
    stored
}

#[cfg(test)]
mod tests {
    use http::Response;

    use super::*;
    use crate::{Route, catalog::Catalogue};

    fn judge(status: u16, headers: &[(&str, &str)]) -> Storable {
        let route = Route::new("/x", "embedding").vary("Accept-Language");
        let route = ReadRoute::new("route", &route, &Catalogue::default()).unwrap();
        let mut response = Response::builder().status(status);
        for (name, value) in headers {
            response = response.header(*name, *value);
        }
        storable(&route, &response.body(()).unwrap().into_parts().0)
    }

    #[test]
    fn only_what_everybody_in_the_tenant_may_see_is_stored() {
        use Storable::{Failed, No, Shared, Yes};
        for (status, headers, expected) in [
            (200, &[][..], Yes),
            (200, &[("cache-control", "public, max-age=5")], Yes),
            (200, &[("vary", "accept-language, Accept-Language")], Yes),
            (200, &[("x-private", "private")], Yes),
            (204, &[], Yes),
            (404, &[], Shared("status")),
            (301, &[], Shared("status")),
            (206, &[], No("status")),
            (500, &[], Failed("status")),
            (200, &[("set-cookie", "a=b")], No("set-cookie")),
            (404, &[("set-cookie", "a=b")], No("set-cookie")),
            (200, &[("content-range", "bytes 0-1/2")], No("partial")),
            (200, &[("cache-control", "Private")], No("private")),
            (200, &[("cache-control", "max-age=5,NO-STORE")], No("no-store")),
            (200, &[("cache-control", "max-age=5"), ("cache-control", "no-cache=\"x\"")], No("no-cache")),
            (200, &[("vary", "*")], No("vary")),
            (200, &[("vary", "accept-language, accept")], No("vary")),
            (200, &[("content-type", "text/event-stream; charset=utf-8")], No("stream")),
        ] {
            assert_eq!(judge(status, headers), expected, "{status} {headers:?}");
        }
    }

    #[test]
    fn headers_of_the_connection_are_not_stored() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "x-hop, close"),
            ("x-hop", "1"),
            ("keep-alive", "1"),
            ("transfer-encoding", "chunked"),
            ("age", "7"),
            ("x-kept", "1"),
            ("x-kept", "2"),
        ] {
            headers.append(name, HeaderValue::from_static(value));
        }
        let stored = stored_headers(&headers);
        let mut names: Vec<_> = stored.iter().map(|(n, v)| (n.as_str(), v.to_str().unwrap())).collect();
        names.sort_unstable();
        assert_eq!(names, [("age", ""), ("cache-status", ""), ("x-kept", "1"), ("x-kept", "2")]);
    }
}
