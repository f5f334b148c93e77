//! Requests and their keys: what a handler may tell apart, the cache does, and what it cannot is one key.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::OnceLock,
};

use http::{Extensions, HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, header, request};
use percent_encoding::percent_decode_str;

use super::input::Input;
use crate::{
    cache::Cache,
    config::Config,
    key::Tag,
    layer::Core,
    route::{At, Hosts, Known, Place, Query},
};

const MAPPING: &str = r#"
tenant_header = "x-tenant-id"
memory = "1 MiB"
body_limit = "64 KiB"
credentials = "shared"

[entities]
number = "integer"

[types]
agent = "standard"
run = "standard"
page = "standard"
number = "standard"
file = "standard"

[[routes]]
path = "/agents/{agent_id}"
type = "agent"

[[routes]]
path = "/agents/{agent_id}/runs/{run_id}"
type = "run"
query = ["limit", "offset"]
vary = ["accept-language"]

[[routes]]
path = "/pages/{page_id}"
type = "page"
query = "exact"
vary = ["x-role"]

[[routes]]
path = "/numbers/{number_id}"
type = "number"
query = "ignore"
credentials = { per_user = "x-user" }

[[routes]]
path = "/files/{*file_id}"
type = "file"
"#;

/// The segments of routes that are no parameters.
const LITERALS: [&str; 6] = ["", "agents", "runs", "pages", "numbers", "files"];

fn core() -> &'static Core {
    static CACHE: OnceLock<Cache> = OnceLock::new();
    let make = || Cache::builder("svc").config(Config::from_toml(MAPPING).unwrap()).build().unwrap();
    &CACHE.get_or_init(make).0
}

/// What a handler sees of a request.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    tenant: Vec<u8>,
    route: String,
    params: Vec<Vec<u8>>,
    query: Asked,
    places: Vec<(char, Vec<u8>)>,
    headers: Vec<Vec<u8>>,
}

/// The values of each name, in their order; each with its name as it was spelled, in parts between pluses.
type Pairs = BTreeMap<Vec<u8>, Vec<(Vec<Vec<u8>>, Option<Vec<Vec<u8>>>)>>;

#[derive(Debug, PartialEq, Eq)]
enum Asked {
    Exactly(Option<String>),
    Pairs(Pairs),
}

fn decoded(text: &str) -> Vec<u8> {
    percent_decode_str(text).collect()
}

fn plus(text: &str) -> Vec<Vec<u8>> {
    text.split('+').map(decoded).collect()
}

fn pairs(query: &str, only: Option<&[&str]>) -> Pairs {
    let mut all = Pairs::new();
    for part in query.split('&').filter(|part| !part.is_empty()) {
        let (name, value) = part.split_once('=').map_or((part, None), |(name, value)| (name, Some(value)));
        let read = decoded(&name.replace('+', " "));
        if only.is_none_or(|only| only.iter().any(|one| one.as_bytes() == read)) {
            all.entry(read).or_default().push((plus(name), value.map(plus)));
        }
    }
    all
}

/// Where a client thinks it is, as servers, proxies and handlers may read it.
fn places(parts: &request::Parts) -> Vec<(char, Vec<u8>)> {
    let lines = |name: HeaderName| parts.headers.get_all(name).iter().map(|line| line.as_bytes().to_vec());
    let small = |text: &[u8]| text.to_ascii_lowercase();
    let named = parts.uri.authority().map(|authority| authority.as_str().as_bytes().to_vec());
    let host = named.or(lines(header::HOST).next()).filter(|host| !host.is_empty());
    let mut all: Vec<_> = host.iter().map(|host| ('/', small(host))).collect();
    all.extend(parts.uri.scheme_str().map(|scheme| ('s', scheme.as_bytes().to_vec())));
    all.extend(lines(HeaderName::from_static("x-forwarded-host")).map(|line| ('h', small(&line))));
    all.extend(lines(HeaderName::from_static("x-forwarded-proto")).map(|line| ('p', line)));
    for line in lines(header::FORWARDED) {
        for pair in line.split(|b| b";,".contains(b)).map(<[u8]>::trim_ascii) {
            let at = pair.iter().position(|&b| b == b'=').unwrap_or(pair.len());
            let (name, value) = (small(&pair[..at]), pair.get(at + 1..).unwrap_or_default());
            let value = value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\"")).unwrap_or(value);
            match &name[..] {
                b"host" => all.push(('f', small(value))),
                b"proto" => all.push(('p', value.to_vec())),
                _ => {}
            }
        }
    }
    all
}

/// The key of a request, its tags, and what a handler sees of it; `None` where it is not cached.
fn key(parts: &request::Parts, hosts: &Hosts) -> Option<(Vec<u8>, Vec<Tag>, Seen)> {
    let core = core();
    let none = Extensions::new();
    let place = Place::new(&parts.uri, &none, None);
    let read = core.routes.read(&Method::GET, &place)?;
    let route = read.route?;
    let (at, known) = (At { params: &read.params, mount: read.mount }, Known { hosts, ..core.known() });
    let wanted = route.wanted(parts, &at, &known).ok()?;
    let tenant = core.space.tenant(&wanted.tenant[..]);
    let tags = route.tags(tenant.head(), &read.params);
    assert_eq!(tags.len(), route.params().len() + 1);
    assert!(wanted.key.len() <= 1_024 && wanted.key.starts_with(tenant.head()));
    assert!(wanted.key.iter().all(|c| c.is_ascii_graphic() && *c != b'"' && *c != b'\\'));
    let query = parts.uri.query();
    let (query, vary) = match route.data_type() {
        "page" => (Asked::Exactly(query.map(str::to_owned)), Some("x-role")),
        "number" => (Asked::Pairs(Pairs::new()), Some("x-user")),
        "run" => (Asked::Pairs(pairs(query.unwrap_or_default(), Some(&["limit", "offset"]))), Some("accept-language")),
        _ => (Asked::Pairs(pairs(query.unwrap_or_default(), None)), None),
    };
    let raw = route.params().iter().map(|param| read.params.get(&param.name).unwrap());
    let params = raw.map(|raw| match route.data_type() {
        "number" => whole(std::str::from_utf8(&decoded(raw)).unwrap()),
        _ => decoded(raw),
    });
    let values = vary.map(|name| parts.headers.get_all(name).iter().map(|value| value.as_bytes().to_vec()).collect());
    let seen = Seen {
        tenant: parts.headers["x-tenant-id"].as_bytes().to_vec(),
        route: route.what(),
        params: params.collect(),
        query,
        places: if *hosts == Hosts::Each { places(parts) } else { vec![] },
        headers: values.unwrap_or_default(),
    };
    Some((wanted.key, tags.into_vec(), seen))
}

fn request(uri: &[u8], headers: HeaderMap) -> Option<request::Parts> {
    let (mut parts, ()) = Request::new(()).into_parts();
    (parts.uri, parts.headers) = (Uri::try_from(uri).ok()?, headers);
    Some(parts)
}

/// Which hosts there are; then two requests, each a target and headers.
pub(super) fn requests(data: &[u8]) {
    let mut input = Input(data);
    let hosts = String::from_utf8_lossy(input.line()).into_owned();
    let mut names = hosts.split(' ');
    let hosts = match names.next() {
        Some("any") => Hosts::Any,
        Some("same") => Hosts::same(names),
        Some("only") => Hosts::only(names),
        _ => Hosts::Each,
    };
    let Ok(hosts) = hosts.checked() else { return };
    assert_eq!(hosts.clone().checked(), Ok(hosts.clone()));
    let mut two = [(); 2].map(|()| {
        let (uri, headers) = (input.line(), input.headers());
        request(uri, headers)
    });
    let found = two.each_ref().map(|one| one.as_ref().and_then(|parts| key(parts, &hosts)));
    if let [Some(a), Some(b)] = &found
        && a.0 == b.0
    {
        assert_eq!(a.2, b.2, "{} is the key of both", a.0.escape_ascii());
        assert_eq!(a.1, b.1);
    }
    queries(two.each_ref().map(|one| one.as_ref().and_then(|parts| parts.uri.query()).unwrap_or_default()));
    for (parts, found) in two.iter_mut().zip(&found) {
        let (Some(parts), Some((key_of, tags, _))) = (parts, found) else { continue };
        let Some(respelled) = respelled(parts) else { continue };
        let again = key(&respelled, &hosts).map(|(key, tags, _)| (key, tags));
        let again = again.as_ref().map(|(key, tags)| (key.escape_ascii().to_string(), tags));
        assert_eq!(again, Some((key_of.escape_ascii().to_string(), tags)), "{parts:?} {respelled:?}");
    }
}

/// Two queries have one variant where they say the same, and nowhere else.
fn queries([a, b]: [&str; 2]) {
    let only = ["limit", "offset"];
    for (rule, names) in [(Query::All, None), (Query::only(only), Some(&only[..]))] {
        let [one, other] = [a, b].map(|query| {
            let mut buf = vec![];
            rule.push(&mut buf, query);
            buf
        });
        assert_eq!(one == other, pairs(a, names) == pairs(b, names), "{a} {b}");
    }
}

/// The same request in another spelling.
fn respelled(parts: &request::Parts) -> Option<request::Parts> {
    let path: Vec<_> =
        parts.uri.path().split('/').map(|s| if LITERALS.contains(&s) { s.into() } else { escaped(s) }).collect();
    let is_file = path.get(1).is_some_and(|first| first == "files");
    let path = if is_file { parts.uri.path().to_owned() } else { path.join("/") };
    let query = parts.uri.query().map(|query| match path.starts_with("/pages") {
        true => format!("?{query}"),
        false => format!("?{}", shuffled(query)),
    });
    let before = match (parts.uri.scheme_str(), parts.uri.authority()) {
        (Some(scheme), Some(authority)) => format!("{scheme}://{}", authority.as_str().to_ascii_uppercase()),
        _ => String::new(),
    };
    let mut headers = parts.headers.clone();
    if let Some(host) = headers.get_mut(header::HOST) {
        *host = HeaderValue::from_bytes(&host.as_bytes().to_ascii_uppercase()).unwrap();
    }
    request(format!("{before}{path}{}", query.unwrap_or_default()).as_bytes(), headers)
}

/// The names the other way round, their values in their order, and nothing between some.
fn shuffled(query: &str) -> String {
    let parts: Vec<_> = query.split('&').collect();
    let name = |part: &str| decoded(&part.split('=').next().unwrap_or_default().replace('+', " "));
    let names: BTreeSet<_> = parts.iter().map(|part| name(part)).collect();
    let of = |wanted: &Vec<u8>| {
        parts.iter().filter(|part| name(part) == *wanted).map(|part| escaped(part)).collect::<Vec<_>>()
    };
    names.iter().rev().map(of).map(|values| values.join("&&")).collect::<Vec<_>>().join("&")
}

/// Every letter and digit escaped, and every escape with letters of the other case.
fn escaped(text: &str) -> String {
    let (mut out, bytes, mut at) = (vec![], text.as_bytes(), 0);
    while let Some(&c) = bytes.get(at) {
        let digits = bytes.get(at + 1..at + 3).filter(|digits| c == b'%' && digits.iter().all(u8::is_ascii_hexdigit));
        match digits {
            Some(digits) => {
                out.push(b'%');
                out.extend(
                    digits
                        .iter()
                        .map(|d| if d.is_ascii_lowercase() { d.to_ascii_uppercase() } else { d.to_ascii_lowercase() }),
                );
                at += 2;
            }
            None if c.is_ascii_alphanumeric() => out.extend(format!("%{c:02x}").bytes()),
            None => out.push(c),
        }
        at += 1;
    }
    String::from_utf8(out).unwrap()
}

/// A whole number without what may be before it.
fn whole(text: &str) -> Vec<u8> {
    let digits = text.trim_start_matches(['+', '-', '0']);
    let sign = if text.starts_with('-') && !digits.is_empty() { "-" } else { "" };
    format!("{sign}{digits}").into_bytes()
}
