//! What headers say: each reader against a second, simple one.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use http::{HeaderMap, HeaderName, HeaderValue, Response, header, response};

use super::input::Input;
use crate::{
    catalog::{DataType, Freshness, Lifetime, Ttl},
    http::{
        conditions::{Preconditions, entity_tag, validate},
        directives::{MAX_SECONDS, RequestDirectives, ResponseDirectives, date},
        fields::{stored_headers, take_weak_date, updated_headers},
        freshness::{Exchange, Verdict, judge},
        locations::Target,
        ranges::parse_range,
    },
    store::{Entry, Payload},
};

const TARGETED: HeaderName = HeaderName::from_static("cdn-cache-control");

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777)
}

/// Each member of `Cache-Control` lines with its value: letter by letter.
fn said(headers: &HeaderMap) -> BTreeMap<String, Vec<Option<String>>> {
    let mut all: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for line in headers.get_all(header::CACHE_CONTROL) {
        let line = String::from_utf8_lossy(line.as_bytes()).into_owned();
        let mut members = vec![String::new()];
        let (mut quoted, mut escaped) = (false, false);
        for c in line.chars() {
            if c == ',' && !quoted {
                members.push(String::new());
                escaped = false;
                continue;
            }
            members.last_mut().unwrap().push(c);
            (quoted, escaped) = match c {
                _ if escaped => (quoted, false),
                '\\' => (quoted, quoted),
                '"' => (!quoted, false),
                _ => (quoted, false),
            };
        }
        // A quote that is not closed is none.
        match quoted {
            true => line.split(',').for_each(|member| add(&mut all, member.trim())),
            false => members.iter().for_each(|member| add(&mut all, member.trim())),
        }
    }
    all
}

fn add(all: &mut BTreeMap<String, Vec<Option<String>>>, member: &str) {
    if member.is_empty() {
        return;
    }
    let (name, value) = match member.find('=') {
        Some(at) => (&member[..at], Some(&member[at + 1..])),
        None => (member, None),
    };
    // Space before the equals sign spoils the value.
    let value = value.map(|value| if name.trim() == name { value.to_owned() } else { String::new() });
    all.entry(name.trim().to_ascii_lowercase()).or_default().push(value);
}

fn seconds(value: Option<&String>) -> u64 {
    let text = value.map_or("", |value| value);
    let text = text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or(text);
    let is_number = !text.is_empty() && text.chars().all(|c| c.is_ascii_digit());
    if is_number { text.parse().unwrap_or(u64::MAX).min(MAX_SECONDS) } else { 0 }
}

/// A status and how it is judged; then the headers of a response, and those of a request.
pub(super) fn directives(data: &[u8]) {
    let mut input = Input(data);
    let first = String::from_utf8_lossy(input.line()).into_owned();
    let headers = input.headers();
    of_responses(&headers);
    of_requests(&headers, &input.headers());
    let mut words = first.split(' ');
    let status = words.next().and_then(|status| status.parse().ok()).unwrap_or(200);
    let Ok(response) = Response::builder().status(status).body(()) else { return };
    let (mut parts, ()) = response.into_parts();
    parts.headers = headers;
    judged(parts, first.contains("response"), first.contains("public"));
}

fn of_responses(headers: &HeaderMap) {
    let mut untargeted = headers.clone();
    untargeted.remove(&TARGETED);
    let found = ResponseDirectives::of(&untargeted, &TARGETED);
    let said = said(&untargeted);
    let is = |name: &str| said.contains_key(name);
    let least = |name: &str| said.get(name).map(|values| values.iter().map(|v| seconds(v.as_ref())).min().unwrap());
    let expected = ResponseDirectives {
        no_store: is("no-store"),
        private: is("private"),
        no_cache: is("no-cache"),
        public: is("public"),
        must_revalidate: is("must-revalidate"),
        proxy_revalidate: is("proxy-revalidate"),
        must_understand: is("must-understand"),
        max_age: least("max-age"),
        s_maxage: least("s-maxage"),
        stale_while_revalidate: least("stale-while-revalidate"),
        stale_if_error: least("stale-if-error"),
        targeted: false,
    };
    assert_eq!(found, expected, "{said:?}");
    // Written in one line, in either header, they are the same.
    let targeted = ResponseDirectives::of(headers, &TARGETED);
    for (name, directives) in [(header::CACHE_CONTROL, found), (TARGETED, targeted)] {
        let line = HeaderValue::try_from(written(&directives)).unwrap();
        let read = ResponseDirectives::of(&[(name.clone(), line)].into_iter().collect(), &TARGETED);
        let is_nothing = written(&directives).is_empty();
        let targeted = name == TARGETED && !is_nothing;
        assert_eq!(read, ResponseDirectives { targeted, ..directives });
        // No lifetime makes anything overflow.
        let _ = read.lifetime(headers, now());
    }
}

fn written(directives: &ResponseDirectives) -> String {
    let flags = [
        ("no-store", directives.no_store),
        ("private", directives.private),
        ("no-cache", directives.no_cache),
        ("public", directives.public),
        ("must-revalidate", directives.must_revalidate),
        ("proxy-revalidate", directives.proxy_revalidate),
        ("must-understand", directives.must_understand),
    ];
    let times = [
        ("max-age", directives.max_age),
        ("s-maxage", directives.s_maxage),
        ("stale-while-revalidate", directives.stale_while_revalidate),
        ("stale-if-error", directives.stale_if_error),
    ];
    let flags = flags.into_iter().filter(|(_, on)| *on).map(|(name, _)| name.to_owned());
    let times = times.into_iter().filter_map(|(name, seconds)| Some(format!("{name}={}", seconds?)));
    flags.chain(times).collect::<Vec<_>>().join(", ")
}

fn of_requests(response: &HeaderMap, request: &HeaderMap) {
    for headers in [response, request] {
        let (found, said) = (RequestDirectives::of(headers), said(headers));
        let last = |name: &str| said.get(name).map(|values| seconds(values.last().unwrap().as_ref()));
        let stale = said.get("max-stale").map(|values| values.last().unwrap());
        let expected = RequestDirectives {
            no_cache: said.contains_key("no-cache"),
            no_store: said.contains_key("no-store"),
            only_if_cached: said.contains_key("only-if-cached"),
            max_age: last("max-age"),
            min_fresh: last("min-fresh"),
            max_stale: stale.map(|value| value.as_ref().map_or(MAX_SECONDS, |value| seconds(Some(value)))),
        };
        assert_eq!(found, expected, "{said:?}");
        let (age, ttl) = (Duration::from_secs(60), Some(60));
        if found.accept(age, ttl) {
            // Nor are younger and fresher ones refused.
            assert!(!found.no_cache && found.accept(Duration::ZERO, Some(61)) && found.accept(age, None));
        }
    }
}

/// Responses as they are judged, and with one more header, which may only make them less fresh.
fn judged(parts: response::Parts, by_response: bool, needs_public: bool) {
    let freshness = if by_response { Freshness::Response } else { Freshness::Tighten };
    let data_type = DataType::new("page", Ttl::Standard).freshness(freshness).negative([404], Ttl::Short);
    let exchange = Exchange {
        policy: &data_type.policy,
        keyed: &[header::ACCEPT_LANGUAGE],
        no_cache: false,
        needs_public,
        targeted: &TARGETED,
        now: now(),
        took: Duration::from_secs(1),
    };
    let before = judge(&exchange, &parts);
    let says = ResponseDirectives::of(&parts.headers, &TARGETED);
    if let Verdict::Store(life, names) = &before {
        is_sound(&exchange, &parts, life, names);
        assert!(!says.private && (!says.no_store || says.must_understand) && (!says.no_cache || by_response));
        assert!(!needs_public || says.public || says.must_revalidate || says.s_maxage.is_some());
    }
    let _ = updated_headers(&parts.headers, parts.headers.clone());
    let mut stored = stored_headers(parts.headers.clone());
    assert_eq!(stored_headers(stored.clone()), stored);
    take_weak_date(&mut stored, now(), Duration::from_secs(1));
    if says.targeted {
        return;
    }
    for line in ["max-age=5", "no-store", "private", "s-maxage=7"] {
        let mut parts = parts.clone();
        parts.headers.append(header::CACHE_CONTROL, HeaderValue::from_static(line));
        match (judge(&exchange, &parts), &before) {
            (Verdict::Store(life, _), _) if line.ends_with(char::is_numeric) => {
                let kept = life.fresh.unwrap().saturating_sub(life.age);
                assert!(says.s_maxage.is_some() || kept <= Duration::from_secs(7), "{kept:?} {line}");
            }
            (Verdict::Store(..), _) => assert!(line == "no-store" && says.must_understand, "{line}"),
            (Verdict::Share(..), Verdict::Alone(why)) => assert_eq!(*why, "credentials"),
            _ => {}
        }
    }
}

fn is_sound(exchange: &Exchange<'_>, parts: &response::Parts, life: &Lifetime, names: &[HeaderName]) {
    let headers = &parts.headers;
    assert!(!headers.contains_key(header::SET_COOKIE) && parts.status != 206 && parts.status != 304);
    assert!(names.is_sorted_by(|a, b| a.as_str() < b.as_str()) && !names.contains(&header::ACCEPT_LANGUAGE));
    for line in headers.get_all(header::VARY) {
        for name in line.to_str().unwrap().split(',').map(str::trim).filter(|name| !name.is_empty()) {
            let name = HeaderName::try_from(name).unwrap();
            assert!(name != "*" && (name == header::ACCEPT_LANGUAGE || names.contains(&name)));
        }
    }
    if exchange.policy.freshness == Freshness::Tighten {
        assert!(life.fresh.is_some_and(|fresh| fresh <= Duration::from_secs(3_600)), "{life:?}");
        assert!(parts.status.is_success() || parts.status == 404);
    }
    let at = 784_111_777_000;
    let entry = Entry::new(Payload::Vary(names.into()), [].into(), at, *life);
    let fresh = life.fresh.unwrap().saturating_sub(life.age).as_millis() as u64;
    assert!(entry.expires <= at + fresh && entry.keep_until >= entry.expires, "{entry:?}");
}

/// Every date that is read is one of three spellings of that time (RFC 9110, section 5.6.7), however its letters and day are.
pub(super) fn dates(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let found = date(&text);
    if let Ok(strict) = httpdate::parse_http_date(&text)
        && text.trim().len() <= 40
    {
        assert_eq!(found, Some(strict));
    }
    let swapped: String = text
        .chars()
        .map(|c| if c.is_ascii_lowercase() { c.to_ascii_uppercase() } else { c.to_ascii_lowercase() })
        .collect();
    assert_eq!(date(&swapped), found, "{swapped}");
    let Some(time) = found else { return };
    let written = httpdate::fmt_http_date(time);
    assert_eq!(date(&written), Some(time));
    // Nobody says leap seconds any more, but some read them.
    if text.contains(":60") {
        return;
    }
    let words: Vec<_> = written.split(' ').collect();
    let [_, day, month, year, clock, _] = words[..] else { panic!("{written}") };
    let short = day.trim_start_matches('0');
    let (name, rest) = text.trim().split_once([' ', ',']).unwrap();
    let rest = rest.trim_start();
    let spellings = [
        format!("{day} {month} {year} {clock} GMT"),
        format!("{day}-{month}-{} {clock} GMT", &year[2..]),
        format!("{month} {short:>2} {clock} {year}"),
        format!("{month} {day} {clock} {year}"),
    ];
    // What stands between the day and the clock in the second one is not looked at.
    let is_it = |one: &str| {
        let mut letters = one.bytes().zip(rest.bytes()).enumerate();
        one.len() == rest.len()
            && letters.all(|(at, (a, b))| a.eq_ignore_ascii_case(&b) || at == 9 && one == spellings[1])
    };
    assert!(spellings.iter().any(|one| is_it(one)), "{text} is {written}");
    let days = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"];
    assert!(
        days.iter().any(|day| *day == name.to_ascii_lowercase() || day[..3] == name.to_ascii_lowercase()),
        "{name}"
    );
}

/// The headers of a request, and what is stored.
pub(super) fn conditions(data: &[u8]) {
    let mut input = Input(data);
    let (request, stored) = (input.headers(), input.headers());
    let length = stored.get("length").and_then(|length| length.to_str().ok()?.parse().ok()).unwrap_or(10);
    if let Some(range) = request.get(header::RANGE) {
        ranges(range, length);
    }
    matches(&request, &stored);
    let mut asks = HeaderMap::new();
    let own = stored.get(header::ETAG).is_some_and(|tag| tag.as_bytes().starts_with(b"W/\"tca-"));
    let asked = validate(&mut asks, &stored);
    assert_eq!(asked, !asks.is_empty());
    assert!(!own || !asks.contains_key(header::IF_NONE_MATCH));
    // What the origin is asked by, it answers with 304 to.
    if let (Some(tag), false) = (stored.get(header::ETAG), own)
        && tag.len() > 1
        && tag.as_bytes().iter().filter(|&&b| b == b'"').count() == 2
        && tag.as_bytes().ends_with(b"\"")
        && (tag.as_bytes().starts_with(b"\"") || tag.as_bytes().starts_with(b"W/\""))
    {
        assert!(Preconditions::of(&asks).is_not_modified(&stored));
    }
    let computed = [(header::ETAG, entity_tag(data).unwrap())].into_iter().collect();
    assert!(!validate(&mut HeaderMap::new(), &computed));
}

/// A number as ranges have them: digits only.
fn number(text: &str) -> Option<u128> {
    let is_number = !text.is_empty() && text.bytes().all(|c| c.is_ascii_digit());
    let digits = text.trim_start_matches('0');
    (is_number && digits.len() < 30).then(|| digits.parse().unwrap_or(0))
}

fn ranges(range: &HeaderValue, length: usize) {
    let found = parse_range(range, length);
    let text = range.to_str().unwrap_or_default();
    let parts: Vec<_> = text.strip_prefix("bytes=").map_or(vec![], |set| set.split('-').map(str::trim).collect());
    // The bytes that are asked for, one by one where there are few.
    let asked = match parts[..] {
        ["", last] => number(last).map(|last| ((length as u128).saturating_sub(last), length as u128)),
        [first, ""] => number(first).map(|first| (first, u128::MAX)),
        [first, last] => number(first).zip(number(last)).filter(|(first, last)| first <= last).map(|(a, b)| (a, b + 1)),
        _ => None,
    };
    let there =
        asked.map(|(from, to)| (from, to.min(length as u128))).map(|(from, to)| (from < to).then_some((from, to)));
    match (found, there) {
        (None, None) => {}
        // What is absurdly large may be ignored.
        (None, Some(_)) => assert!(text.len() > 20, "{text} of {length}"),
        (Some(None), Some(None)) => {}
        (Some(Some((first, last))), Some(Some((from, to)))) => {
            assert_eq!((first as u128, last as u128 + 1), (from, to), "{text} of {length}");
        }
        (found, there) => panic!("{text} of {length}: {found:?}, and not {there:?}"),
    }
}

/// The tags of a list, letter by letter, without their weakness.
fn tags(line: &[u8]) -> Vec<Vec<u8>> {
    let (mut all, mut quoted) = (vec![vec![]], false);
    for &b in line {
        quoted ^= b == b'"';
        match b {
            b',' if !quoted => all.push(vec![]),
            b => all.last_mut().unwrap().push(b),
        }
    }
    all.iter().map(|tag| opaque(tag)).collect()
}

fn opaque(tag: &[u8]) -> Vec<u8> {
    let tag = tag.trim_ascii();
    tag.strip_prefix(b"W/").unwrap_or(tag).to_vec()
}

fn matches(request: &HeaderMap, stored: &HeaderMap) {
    let found = Preconditions::of(request).is_not_modified(stored);
    let lines: Vec<_> = request.get_all(header::IF_NONE_MATCH).iter().map(HeaderValue::as_bytes).collect();
    let expected = if lines.is_empty() {
        let text = |headers: &HeaderMap, name| date(headers.get(name)?.to_str().ok()?);
        let (since, modified) = (text(request, header::IF_MODIFIED_SINCE), text(stored, header::LAST_MODIFIED));
        since.zip(modified).is_some_and(|(since, modified)| modified <= since)
    } else {
        let own = stored.get(header::ETAG).map(|tag| opaque(tag.as_bytes())).filter(|tag| !tag.is_empty());
        lines.iter().any(|line| line.trim_ascii() == b"*" || own.as_ref().is_some_and(|own| tags(line).contains(own)))
    };
    assert_eq!(found, expected, "{request:?} {stored:?}");
}

/// The path of a request, a reference in its response, and the request's headers.
pub(super) fn locations(data: &[u8]) {
    let mut input = Input(data);
    let (path, reference) = (String::from_utf8_lossy(input.line()).into_owned(), input.line());
    let (Ok(uri), Ok(reference)) = (http::Uri::try_from(path.as_str()), HeaderValue::from_bytes(reference)) else {
        return;
    };
    let target = Target::new(&uri, uri.path(), &input.headers());
    let Some(named) = target.path(&reference) else { return };
    assert!(named.is_empty() || named.starts_with('/'), "{named}");
    assert!(!named.split('/').any(|segment| segment == "." || segment == ".."), "{named}");
    assert!(target.own_path(&reference).is_none_or(|own| own == named));
    // It is in its normal form.
    let again = HeaderValue::try_from(&named).unwrap();
    if named.starts_with('/') && !named.starts_with("//") {
        assert_eq!(target.path(&again), Some(named.clone()));
        assert_eq!(target.own_path(&again), Some(named));
    }
}
