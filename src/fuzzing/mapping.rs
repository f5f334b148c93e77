//! What a service says of itself: its file, its paths, and the tags of its responses.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use http::{HeaderName, HeaderValue, Response};
use percent_encoding::percent_decode_str;

use super::input::Input;
use crate::{
    cache::{Cache, Source},
    catalog::Entities,
    config::Config,
    key::Tag,
    layer::{CacheTags, Reads, take_tags},
    route::{MOST_PARAMS, Pattern, is_same},
};

/// Two patterns, and two paths.
pub(super) fn patterns(data: &[u8]) {
    let mut input = Input(data);
    let lines: [_; 4] = std::array::from_fn(|_| String::from_utf8_lossy(input.line()).into_owned());
    let [one, other, a, b] = &lines;
    let overrides = BTreeMap::from([("id".to_owned(), "agent".to_owned())]);
    let overrides = [if one.contains("{id}") { overrides } else { BTreeMap::new() }, BTreeMap::new()];
    let patterns = [one, other].map(|pattern| {
        let mut router = matchit::Router::new();
        // It is not asked about more, and would panic.
        (pattern.matches('{').count() <= MOST_PARAMS && router.insert(pattern, ()).is_ok()).then_some(router)
    });
    for (i, pattern) in [one, other].into_iter().enumerate() {
        match Pattern::new(pattern, &overrides[i], &Entities::default()) {
            Ok(compiled) => patterns[i].iter().for_each(|router| of_pattern(&compiled, router, [a, b])),
            Err(why) => assert!(!why.is_empty()),
        }
    }
    assert!(is_same(one, one, true) && is_same(one, one, false));
    assert_eq!(is_same(one, other, true), is_same(other, one, true), "{one} {other}");
    // Two that are the same but for their names match the same.
    let is_valid = |pattern: &str| Pattern::new(pattern, &BTreeMap::new(), &Entities::default()).is_ok();
    if let [Some(left), Some(right)] = &patterns
        && is_valid(one)
        && is_valid(other)
        && is_same(one, other, true)
    {
        assert_eq!(left.at(a).is_ok(), right.at(a).is_ok(), "{a}: {one} {other}");
    }
}

/// The parameters are those that the router finds, and two that handlers tell apart are two.
fn of_pattern(pattern: &Pattern, router: &matchit::Router<()>, paths: [&String; 2]) {
    let found = paths.map(|path| router.at(path).ok().map(|found| found.params));
    for params in found.iter().flatten() {
        let names: Vec<_> = params.iter().map(|(name, _)| name).collect();
        assert_eq!(names, pattern.params().iter().map(|param| &*param.name).collect::<Vec<_>>());
    }
    let [Some(a), Some(b)] = &found else { return };
    for param in pattern.params() {
        let value = |of| param.value(of);
        let read = |of: &matchit::Params<'_, '_>| percent_decode_str(of.get(&param.name).unwrap()).collect::<Vec<_>>();
        assert_eq!(value(a).map_or(vec![], std::borrow::Cow::into_owned), read(a));
        if param.part(a) == param.part(b) {
            assert_eq!(value(a), value(b), "{a:?} {b:?}");
        }
    }
}

/// A file that is taken works: what is loaded is found, and what a write drops is loaded anew.
pub(super) fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let mut config = match Config::from_toml(text) {
        Ok(config) => config,
        Err(why) => return assert!(!why.to_string().is_empty()),
    };
    if let Some(redis) = config.redis.take()
        && let Err(why) = redis.in_process(0).build()
    {
        hides_passwords(text, &why.to_string());
    }
    config.memory = config.memory.map(|memory| memory.min(1 << 20)).or(Some(1 << 20));
    config.body_limit = config.body_limit.map(|limit| limit.min(64 << 10)).or(Some(64 << 10));
    let ttls: Vec<_> = config.types.iter().map(|one| (one.name.clone(), one.policy.clone())).collect();
    let is_on = config.enabled.unwrap_or(true);
    let cache = match Cache::builder("svc").config(config).build() {
        Ok(cache) => cache,
        Err(why) => return assert!(!why.to_string().is_empty()),
    };
    for (name, policy) in &ttls {
        let found = cache.0.policy(name);
        assert!(found.ttl == policy.ttl && found.jittered() <= found.ttl.duration(), "{name}");
        let longest = found.longest();
        assert!(longest.is_none_or(|longest| longest >= found.ttl.duration().unwrap()), "{name}");
    }
    for read in &cache.describe().reads {
        assert!(!read.name.is_empty());
    }
    if let Some((name, policy)) = ttls.first() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let shortest = policy.ttl.bounds().map_or_else(|| policy.ttl.duration(), |bounds| Some(bounds.min));
        let is_short = shortest.is_some_and(|ttl| ttl.as_secs() < 60) || policy.jitter > 0.5;
        // What its entities' ids are like.
        let is_id = cache.0.cascades.entities.id(cache.0.cascades.entities.of_type(name), b"1").is_some();
        runtime.block_on(works(&cache, name, is_on && is_id && !is_short && policy.early_refresh == 0.0));
    }
}

async fn works(cache: &Cache, name: &str, keeps: bool) {
    let loads = Arc::new(AtomicU64::new(0));
    let read = async || {
        let loads = loads.clone();
        let entry = cache.entry::<u64>(name, "1").tenant("acme");
        let fetch =
            entry.fetch(move || async move { Ok::<_, Infallible>(Some(loads.fetch_add(1, Ordering::Relaxed))) });
        let Ok(value) = fetch.ok()?.await;
        // What is stored in the background.
        for _ in 0..8 {
            tokio::task::yield_now().await;
        }
        Some((value.0.unwrap(), value.1.source))
    };
    let Some((first, source)) = read().await else { return };
    assert_eq!((first, source), (0, Source::Origin));
    let Some((second, _)) = read().await else { panic!("{name} is not read a second time") };
    assert!(second == 0 || !keeps, "{name} is not kept");
    let Ok(dropped) = cache.invalidate("acme").mutated(name, "1").run().await else { return };
    assert_eq!(dropped.undelivered(), 0);
    let Some((third, source)) = read().await else { panic!("{name} is not read a third time") };
    assert!(source == Source::Origin && third > 0, "{name} is stale");
}

/// No password of an address is in what is said about it.
fn hides_passwords(text: &str, said: &str) {
    let is_address = |text: &&str| {
        text.split_once("://").is_some_and(|(scheme, _)| scheme.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'+'))
    };
    for address in text.split('"').filter(is_address) {
        let login =
            address.rsplit_once('@').and_then(|(before, _)| before.split_once("://")).map_or("", |(_, login)| login);
        let password = login.split_once(':').map_or("", |(_, password)| password);
        let is_it = password.len() > 8 && text.matches(password).count() == 1;
        assert!(!is_it || !said.contains(password), "{said}");
    }
}

const DECLARED: &str = r#"
tenant_header = "x-tenant-id"
memory = "1 MiB"
body_limit = "64 KiB"

[entities]
team = "integer"

[types]
agent = "standard"
team = "standard"
search = "standard"

[[routes]]
path = "/search"
type = "search"
declares_tags = true

[[cascades]]
type = "agent"
drops = ["search"]

[[cascades]]
type = "team"
drops = ["search"]
"#;

fn declared() -> &'static Cache {
    static CACHE: OnceLock<Cache> = OnceLock::new();
    let make = || Cache::builder("svc").config(Config::from_toml(DECLARED).unwrap()).build().unwrap();
    CACHE.get_or_init(make)
}

/// Lines of a `cache-tag` header: all that is declared is a tag that a write drops, or the response is not stored.
pub(super) fn tags(data: &[u8]) {
    let core = &declared().0;
    let tenant = core.space.tenant("acme");
    let lines: Vec<_> = data.split(|&b| b == b'\n').filter_map(|line| HeaderValue::from_bytes(line).ok()).collect();
    let (mut parts, ()) = Response::new(()).into_parts();
    let name = HeaderName::from_static("cache-tag");
    for line in &lines {
        parts.headers.append(&name, line.clone());
    }
    let found = take_tags(&mut parts, core, &tenant, "search", &Reads::default());
    assert!(parts.headers.is_empty());
    let wanted: Option<Vec<_>> = lines.iter().flat_map(members).collect();
    let tag = |(entity, id): &(String, Vec<u8>)| {
        let id = if entity == "team" { integer(id)? } else { id.clone() };
        Some(Tag::entity(tenant.head(), "search", entity, &id))
    };
    let expected = wanted.as_ref().and_then(|all| all.iter().map(tag).collect::<Option<Vec<_>>>());
    assert_eq!(found.as_ref().ok(), expected.as_ref(), "{lines:?}");
    // Handlers may say the same without a header.
    let Some(wanted) = wanted else { return };
    let texts: Option<Vec<_>> =
        wanted.iter().map(|(entity, id)| Some((entity, std::str::from_utf8(id).ok()?))).collect();
    let Some(texts) = texts else { return };
    for (entity, id) in texts {
        CacheTags::of(&mut parts.extensions).add(entity, id);
    }
    assert_eq!(take_tags(&mut parts, core, &tenant, "search", &Reads::default()), found);
    let Ok(tags) = found else { return };
    for (tag, (entity, id)) in tags.iter().zip(&wanted) {
        let Ok(id) = std::str::from_utf8(id) else { continue };
        let change = declared().invalidate("acme").mutated(entity.as_str(), id);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let (drops, _) = runtime.block_on(change.dry_run()).unwrap();
        assert!(drops.groups.iter().any(|group| group.tags.contains(tag)), "{tag:?}");
    }
}

/// What a line declares, or `None` for what cannot be matched.
fn members(line: &HeaderValue) -> Vec<Option<(String, Vec<u8>)>> {
    let Ok(text) = line.to_str() else { return vec![None] };
    let one = |member: &str| {
        let mut halves = member.split('=');
        let (entity, id) = (halves.next()?, halves.next()?);
        let is_plain = |text: &str| !text.is_empty() && text.bytes().all(|c| c.is_ascii_graphic() && c != b'"');
        let is_known = ["agent", "team", "search"].contains(&entity);
        (halves.next().is_none() && is_plain(id) && is_known)
            .then(|| (entity.to_owned(), percent_decode_str(id).collect()))
    };
    text.split(',').map(str::trim).filter(|member| !member.is_empty()).map(one).collect()
}

/// The one spelling of a whole number.
fn integer(id: &[u8]) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(id).ok()?;
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    if digits.is_empty() || digits.bytes().any(|c| !c.is_ascii_digit()) {
        return None;
    }
    let digits = digits.trim_start_matches('0');
    let sign = if text.starts_with('-') && !digits.is_empty() { "-" } else { "" };
    Some(if digits.is_empty() { b"0".to_vec() } else { format!("{sign}{digits}").into_bytes() })
}
