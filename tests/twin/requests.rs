//! What clients ask of a [`Service`], in all the ways in which they write it; and what of that its answers are made of.

use http::Method;
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use tower_cache_aside::{BodyKey, Credentials, Query};

use super::{
    handler::{OF_READS, OF_WRITES},
    service::{Ids, Page, Service, Shape, Tenancy, name},
    world::{Asked, Framing, Said, Seen, escaped, framed, pick},
};

/// When something was modified, and about then.
const DATES: &[&str] =
    &["Sun, 06 Nov 1994 08:49:37 GMT", "Sun, 06 Nov 1994 08:49:36 GMT", "Sunday, 06-Nov-94 08:49:38 GMT", "never"];

// ---- what an answer is made of ---------------------------------------------------------------------------------------

/// What a page shows of its request, as frameworks hand it down: members of a query by name, languages without their spaces.
pub fn seen(service: &Service, page: &Page, seen: &Seen) -> String {
    let sees = &page.sees;
    let mut shown = vec![seen.mount.to_owned()];
    shown.push(match service.tenancy {
        Tenancy::Single => String::new(),
        Tenancy::Header => seen.header("x-tenant-id").split(',').next().unwrap_or_default().trim().to_owned(),
        Tenancy::Host => seen.host.split('.').next().unwrap_or_default().to_owned(),
    });
    if service.shows_host {
        shown.push(format!("{} by {}", seen.host, seen.header("x-forwarded-proto")));
    }
    if sees.header {
        shown.push(seen.header("x-lang").to_owned());
    }
    if sees.vary {
        let languages = seen.header("accept-language").split(',').map(|one| one.trim().to_lowercase());
        shown.push(languages.collect::<Vec<_>>().join(","));
    }
    match &sees.credentials {
        Credentials::Bypass => {
            shown.extend(["authorization", "cookie", "x-api-key"].map(|name| seen.header(name).to_owned()))
        }
        Credentials::Declared if page.is_for_who_asks() => {
            shown.extend(["authorization", "x-api-key"].map(|name| seen.header(name).to_owned()));
        }
        Credentials::PerUser(name) => shown.push(seen.header(name).to_owned()),
        _ => {}
    }
    shown.push(query(&sees.query, &seen.query));
    if page.shape == Shape::Search {
        let text = String::from_utf8(seen.body.to_vec()).unwrap();
        let json = serde_json::from_str::<serde_json::Value>(&text).ok().filter(|_| sees.body == BodyKey::Json);
        shown.push(json.map_or(text, |json| json.to_string()));
    }
    shown.join("\n")
}

fn query(rule: &Query, query: &str) -> String {
    let decoded = |text: &str| percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned();
    let pairs = query.split('&').filter(|part| !part.is_empty());
    let mut pairs: Vec<_> = pairs.map(|pair| pair.split_once('=').unwrap_or((pair, ""))).collect();
    pairs.sort_by_key(|(name, _)| decoded(name));
    let shown = match rule {
        Query::Exact => return query.to_owned(),
        Query::Ignore => return String::new(),
        Query::Only(names) => pairs.into_iter().filter(|(name, _)| names.contains(&decoded(name))).collect(),
        _ => pairs,
    };
    shown.iter().map(|(name, value)| format!("{}={}", decoded(name), decoded(value))).collect::<Vec<_>>().join(" ")
}

/// An answer of its own for each number, in whatever way origins answer.
pub fn answer_of(number: &str) -> Said {
    let Ok(number) = number.parse::<u64>() else { return Said::new(404, "no such answer") };
    let rng = &mut SmallRng::seed_from_u64(number);
    let size = if rng.random_bool(0.2) { 0 } else { rng.random_range(0..120) };
    let body: Vec<u8> = (0..size).map(|_| b'a' + rng.random_range(0..26u8)).collect();
    let mut said = Said::new(*pick(rng, &[200, 200, 200, 200, 203, 404, 500]), body);
    let length = match rng.random_range(0..6) {
        0..3 => None,
        3 | 4 => Some(0),
        _ => Some(rng.random_range(1..5)),
    };
    said.framing = Framing {
        // A server that knows how long it is does not believe another length.
        pieces: rng.random_range(if length.unwrap_or(0) > 0 { 1..5 } else { 0..5 }),
        length,
        slow: rng.random_bool(0.4),
        // One who says how long it is has no room for trailers.
        trailers: length.is_none() && rng.random_bool(0.3),
        breaks: rng.random_bool(0.05),
        messages: *pick(rng, &[1, 1, 1, 1, 0, 2]),
        no_status: rng.random_bool(0.1),
    };
    // Whether what is broken has changed, nobody can know.
    let is_sound = !said.framing.breaks && length.unwrap_or(0) == 0;
    said.has_tag = is_sound && rng.random_bool(0.5);
    let control = *pick(rng, &["", "", "", "private", "no-store", "max-age=0"]);
    if !control.is_empty() {
        said = said.header("cache-control", control);
    }
    if is_sound && rng.random_bool(0.4) { said.header("last-modified", DATES[0]) } else { said }
}

// ---- what is asked ---------------------------------------------------------------------------------------------------

/// An id in one of the spellings that handlers take for it.
pub fn spelled(ids: Ids, number: u32, rng: &mut SmallRng) -> String {
    escaped(&varied(ids, number, rng), rng)
}

fn varied(ids: Ids, number: u32, rng: &mut SmallRng) -> String {
    let text = ids.text(number);
    let way = rng.random_range(0..5);
    match (ids, way) {
        (Ids::Integer, 0) => format!("00{text}"),
        (Ids::Integer, 1) => format!("+{text}"),
        (Ids::Lowercase, 0) => text.to_uppercase(),
        (Ids::Lowercase, 1) => text.replace('z', "Z"),
        (Ids::Uuid, 0) => text.to_uppercase(),
        (Ids::Uuid, 1) => text.replace('-', ""),
        (Ids::Uuid, 2) => format!("{{{text}}}"),
        _ => text,
    }
}

/// One that may be there; now and then one that is none.
fn any_number(rng: &mut SmallRng) -> u32 {
    rng.random_range(1..=5)
}

fn any_id(service: &Service, kind: usize, rng: &mut SmallRng) -> String {
    if rng.random_bool(0.04) {
        return (*pick(rng, &["x", "%FF", "a%2Fb", "..", "1;2", "%31%"])).to_owned();
    }
    let number = any_number(rng);
    spelled(service.kinds[kind].ids, number, rng)
}

fn path(service: &Service, page: &Page, rng: &mut SmallRng) -> String {
    let k = name(page.kind);
    let id = any_id(service, page.kind, rng);
    let above = service.kinds[page.kind].parent.map(|p| format!("/{}/{}/{k}", name(p), any_id(service, p, rng)));
    match page.shape {
        Shape::Row => format!("/{k}/{id}"),
        Shape::Line => format!("/{k}/{id}/line"),
        Shape::Summary => format!("/{k}/{id}/summary"),
        Shape::Slug => format!("/{k}-by-name/{}", escaped(&format!("name-{}", any_number(rng)), rng)),
        Shape::List => format!("/{k}"),
        Shape::Search => format!("/{k}-search"),
        Shape::File => {
            let files = ["a/b", "a%2Fb", "a%2fb", "a/../b", "a;b", "a%3Bb", "b", "%62", "b/", "/b"];
            format!("/files/{}", pick(rng, &files))
        }
        Shape::Below => above.unwrap(),
        Shape::Nested => format!("{}/{id}", above.unwrap()),
    }
}

/// Perhaps with one of these.
fn maybe(asked: Asked, share: f64, name: &'static str, of: &[&str], rng: &mut SmallRng) -> Asked {
    if rng.random_bool(share) { asked.with(name, *pick(rng, of)) } else { asked }
}

/// The headers that say whose it is, and by which way it came.
fn addressed(service: &Service, mut asked: Asked, rng: &mut SmallRng) -> Asked {
    let hosts = match service.tenancy {
        Tenancy::Host => &["acme.example", "umbrella.example", "ACME.example", "x.example"][..],
        _ => &["a.example", "a.example", "b.example", "A.example", "a.example:81"],
    };
    let host = *pick(rng, hosts);
    let host = if rng.random_bool(0.01) { "evil.example/x@a.example" } else { host };
    asked = asked.with("host", host);
    if rng.random_bool(0.05) && !asked.is_grpc() && !host.contains('/') {
        asked.target = format!("http://{host}{}", asked.target);
    }
    if service.tenancy == Tenancy::Header {
        let tenants = ["acme", "acme", "umbrella"];
        asked = match rng.random_range(0..40) {
            0 => asked,
            1 => asked.with("x-tenant-id", "acme, umbrella"),
            2 => asked.with("x-tenant-id", "acme").with("x-tenant-id", "umbrella"),
            _ => asked.with("x-tenant-id", *pick(rng, &tenants)),
        };
    }
    asked
}

fn mounted(service: &Service, path: String, rng: &mut SmallRng) -> String {
    format!("{}{path}", pick(rng, service.mounts))
}

pub fn any_read(service: &Service, rng: &mut SmallRng) -> Asked {
    match rng.random_range(0..20) {
        0..3 => return any_answer(service, rng),
        3..6 => return any_call(service, rng),
        _ => {}
    }
    let page = pick(rng, &service.pages);
    let mut target = mounted(service, path(service, page, rng), rng);
    target += match rng.random_range(0..60) {
        0 => "/",
        1 => "/x",
        2 => "//",
        _ => "",
    };
    let queries = [
        "",
        "",
        "",
        "",
        "?a=1&b=2",
        "?b=2&a=1",
        "?a=1&b=2&a=3",
        "?a=1&a=3&b=2",
        "?a=%31&b=2",
        "?a=1&b=",
        "?a=1&b",
        "?page=2",
        "?utm=x&page=2",
        "?%70age=2",
        "?page=1&page=2",
        "?a=+",
        "?a=%20",
        "?a=%2B",
        "?&a=1&&",
        "?",
    ];
    target += *pick(rng, &queries);
    let mut asked = addressed(service, Asked::new(Method::GET, target), rng);
    for (share, name, values) in [
        (0.3, "x-lang", &["de", "en"][..]),
        (0.3, "accept-language", &["de", "en", "DE", "de, en", "de,en"]),
        (0.3, "accept-encoding", &["gzip"]),
        (0.4, "x-user", &["ada", "grace"]),
        (0.07, "authorization", &["Bearer 1", "Bearer 2"]),
        (0.05, "cookie", &["a=1", "a=2"]),
        (0.05, "x-api-key", &["1", "2"]),
        (0.2, "x-forwarded-proto", &["http", "https"]),
        (0.08, "x-fault", OF_READS),
        (0.05, "cache-control", &["no-cache", "max-age=0", "no-store", "max-stale", "min-fresh=10"]),
        (0.1, "accept", &["text/html", "*/*"]),
    ] {
        asked = maybe(asked, share, name, values, rng);
    }
    if page.shape == Shape::Search {
        asked.method = Method::POST;
        let bodies = ["{\"q\":1,\"a\":2}", "{ \"a\": 2, \"q\": 1 }", "{\"q\":2}", "x", ""];
        let large = "y".repeat(80);
        asked.body = if rng.random_bool(0.1) { large.into() } else { bytes::Bytes::from(*pick(rng, &bodies)) };
        return maybe(asked, 0.9, "content-type", &["application/json", "application/json", "text/plain"], rng);
    }
    conditioned(asked, rng)
}

/// With conditions, and other methods that only read.
fn conditioned(mut asked: Asked, rng: &mut SmallRng) -> Asked {
    match rng.random_range(0..30) {
        0..3 => asked.method = Method::HEAD,
        3 => asked.method = Method::OPTIONS,
        _ => {}
    }
    asked = maybe(asked, 0.15, "if-none-match", &["LAST", "LAST", "\"1\"", "*", "W/\"1\", \"2\""], rng);
    asked = maybe(asked, 0.08, "if-modified-since", DATES, rng);
    asked = maybe(asked, 0.03, "if-match", &["*", "\"1\""], rng);
    let ranges =
        ["bytes=0-4", "bytes=3-", "bytes=-5", "bytes=-0", "bytes=100-200", "bytes=5-2", "bytes=0-1,3-4", "x=1-2"];
    asked = maybe(asked, 0.1, "range", &ranges, rng);
    maybe(asked, 0.02, "if-range", &["\"1\""], rng)
}

/// One of few at first, for the same ones to be met again.
fn any_answer(service: &Service, rng: &mut SmallRng) -> Asked {
    let number = rng.random_range(0..1_000_u64);
    if rng.random_bool(0.2) {
        return addressed(service, Asked::call("/twin.Answers/Get", &number.to_string()), rng);
    }
    let target = mounted(service, format!("/answers/{number}"), rng);
    conditioned(addressed(service, Asked::new(Method::GET, target), rng), rng)
}

/// An answer in all the ways in which it is asked for, twice and more.
pub fn of_answer(number: u64) -> Vec<Asked> {
    let asked = Asked::new(Method::GET, format!("/answers/{number}")).with("host", "a.example");
    let from = number % 50;
    let ranges = [format!("bytes={from}-{}", from + 9), format!("bytes=-{}", from + 1), "bytes=500-".to_owned()];
    let call = Asked::call("/twin.Answers/Get", &number.to_string()).with("host", "a.example");
    let mut all = vec![asked.clone(), asked.clone(), Asked { method: Method::HEAD, ..asked.clone() }];
    all.extend(ranges.iter().map(|range| asked.but("range", range)));
    all.extend(["LAST", "\"2\"", "*"].map(|tag| asked.but("if-none-match", tag)));
    all.extend(DATES.iter().map(|date| asked.but("if-modified-since", date)));
    all.extend([asked.but("range", "bytes=0-3").but("if-none-match", "LAST"), asked, call.clone(), call.clone(), call]);
    all
}

fn any_call(service: &Service, rng: &mut SmallRng) -> Asked {
    let kind = rng.random_range(0..service.kinds.len());
    let number = any_number(rng);
    let asked = match rng.random_bool(0.3) && service.has(Shape::List, kind) {
        true => Asked::call(format!("/twin.{}/List", name(kind)), if rng.random_bool(0.5) { "" } else { "1" }),
        false => Asked::call(format!("/twin.{}/Get", name(kind)), &varied(service.kinds[kind].ids, number, rng)),
    };
    let asked = maybe(addressed(service, asked, rng), 0.1, "x-fault", OF_READS, rng);
    maybe(asked, 0.05, "authorization", &["Bearer 1"], rng)
}

pub fn any_write(service: &Service, rng: &mut SmallRng) -> Asked {
    let kind = rng.random_range(0..service.kinds.len());
    let (k, number, below) = (name(kind), any_number(rng), any_number(rng));
    let ids = service.kinds[kind].ids;
    let row = format!("/{k}/{}", any_id(service, kind, rng));
    let to = if rng.random_bool(0.5) { format!("to={below}") } else { String::new() };
    let new = format!("id={number}&below={below}");
    let above =
        service.kinds[kind].parent.map(|p| format!("/{}/{}/{k}", name(p), spelled(service.kinds[p].ids, below, rng)));
    let (method, path, body) = match (rng.random_range(0..12), above) {
        (0..3, _) => (Method::PUT, row, to),
        (3, Some(above)) => (Method::PUT, format!("{above}/{}", spelled(ids, number, rng)), to),
        (4 | 5, _) => (Method::DELETE, row, String::new()),
        (6, _) => (Method::POST, format!("/{k}"), new),
        (7, Some(above)) => (Method::POST, above, new),
        (8, _) if rng.random_bool(0.5) => (Method::PATCH, row, String::new()),
        (8, _) if service.has(Shape::File, 0) => {
            let files = ["a/b", "a%2Fb", "a%2F%62", "b", "%62"];
            (Method::PUT, format!("/files/{}", pick(rng, &files)), String::new())
        }
        (9, _) => (Method::POST, "/jobs".to_owned(), format!("kind={kind}&id={number}")),
        (way, _) => {
            let removes = way == 10 && service.removes_by_call(kind);
            let call = Asked::call(format!("/twin.{k}/{}", if removes { "Delete" } else { "Put" }), "");
            let call = Asked { body: framed(varied(ids, number, rng).as_bytes()).into(), ..call };
            return failing(addressed(service, call, rng), rng);
        }
    };
    let asked = Asked { body: body.into(), ..Asked::new(method, mounted(service, path, rng)) };
    let asked = maybe(addressed(service, asked, rng), 0.3, "x-location", &["none", "absolute"], rng);
    failing(asked, rng)
}

fn failing(asked: Asked, rng: &mut SmallRng) -> Asked {
    let asked = maybe(asked, 0.4, "x-fault", OF_WRITES, rng);
    maybe(asked, 0.3, "x-pause", &["1", "3"], rng)
}
