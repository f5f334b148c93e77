//! Header fields as they are stored and sent on (RFC 9110, section 7.6.1; RFC 9111, section 3).

use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderName, HeaderValue, header};

use super::{
    cache_status::CACHE_STATUS,
    directives::{date, list, single},
};

fn is_hop_by_hop(name: &HeaderName) -> bool {
    const HOP_BY_HOP: [HeaderName; 5] =
        [header::CONNECTION, header::PROXY_AUTHENTICATE, header::TE, header::TRANSFER_ENCODING, header::UPGRADE];
    HOP_BY_HOP.contains(name)
        || matches!(
            name.as_str(),
            "keep-alive" | "proxy-connection" | "proxy-authentication-info" | "proxy-authorization"
        )
}

/// A `Date`.
fn date_of(time: SystemTime) -> Option<HeaderValue> {
    let date = HeaderValue::try_from(httpdate::fmt_http_date(time)).ok()?;
    // Its first clone allocates what all clones share; a hit is to find that done.
    drop(date.clone());
    Some(date)
}

/// Says when a response was made, where nobody has said so (RFC 9110, section 6.6.1).
pub(crate) fn put_date(headers: &mut HeaderMap, made: SystemTime) {
    if !headers.contains_key(header::DATE)
        && let Some(date) = date_of(made)
    {
        headers.insert(header::DATE, date);
    }
}

/// Takes out a `Last-Modified` of the second in which the load began, or later: what is written in the rest of it has the same,
/// and nobody could tell by it (RFC 9110, section 8.8.2.2). It began when this clock says, or that of the origin.
pub(crate) fn take_weak_date(headers: &mut HeaderMap, began: SystemTime, took: Duration) {
    let by_origin = single(headers, header::DATE).and_then(date).and_then(|sent| sent.checked_sub(took));
    let began = by_origin.map_or(began, |by_origin| by_origin.min(began));
    let modified = single(headers, header::LAST_MODIFIED).and_then(date);
    if modified.is_some_and(|modified| modified + Duration::from_secs(1) > began) {
        headers.remove(header::LAST_MODIFIED);
    }
}

/// Headers as they are stored: without those of the connection (RFC 9110, section 7.6.1), and with places for those that
/// a hit adds.
pub(crate) fn stored_headers(mut headers: HeaderMap) -> HeaderMap {
    let named = list(&headers, header::CONNECTION).filter_map(|name| HeaderName::try_from(name).ok());
    let hops: Vec<_> = headers.keys().filter(|name| is_hop_by_hop(name)).cloned().chain(named).collect();
    hops.iter().for_each(|name| drop(headers.remove(name)));
    const EMPTY: HeaderValue = HeaderValue::from_static("");
    headers.entry(CACHE_STATUS).or_insert(EMPTY);
    headers.insert(header::AGE, EMPTY);
    headers
}

/// The headers of a response that the origin has confirmed with these of a 304 (RFC 9111, section 3.2).
pub(crate) fn updated_headers(stored: &HeaderMap, confirmed: HeaderMap) -> HeaderMap {
    let mut headers = stored.clone();
    let new = stored_headers(confirmed);
    for name in new.keys() {
        // The body is still the old one.
        let of_body = [header::CONTENT_LENGTH, header::CONTENT_ENCODING, header::CONTENT_RANGE, header::ETAG];
        if of_body.contains(name) || matches!(name.as_str(), "age" | "cache-status" | "content-md5") {
            continue;
        }
        headers.remove(name);
        for value in new.get_all(name) {
            headers.append(name.clone(), value.clone());
        }
    }
    headers
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let stored = stored_headers(headers);
        let mut names: Vec<_> = stored.iter().map(|(n, v)| (n.as_str(), v.to_str().unwrap())).collect();
        names.sort_unstable();
        assert_eq!(names, [("age", ""), ("cache-status", ""), ("x-kept", "1"), ("x-kept", "2")]);
    }

    /// RFC 9111, section 3.2.
    #[test]
    fn a_confirmation_changes_headers_but_not_those_of_the_body() {
        let of = |lines: &[(&'static str, &'static str)]| -> HeaderMap {
            lines.iter().map(|(n, v)| (HeaderName::from_static(n), HeaderValue::from_static(v))).collect()
        };
        let of_body = [
            ("content-length", "5"),
            ("content-encoding", "gzip"),
            ("content-range", "bytes 0-4/5"),
            ("etag", "\"a\""),
            ("content-md5", "a"),
        ];
        let stored = of(&[&of_body[..], &[("x-new", "old"), ("x-old", "1")]].concat());
        let says = of_body.map(|(name, _)| (name, "another"));
        let confirmed = of(&[&says[..], &[("x-new", "new"), ("age", "7"), ("cache-status", "other; hit")]].concat());
        let expected = of(&[&of_body[..], &[("x-new", "new"), ("x-old", "1")]].concat());
        assert_eq!(updated_headers(&stored, confirmed), expected);
    }
}
