//! What would become of a request, and why.

use std::sync::Arc;

use http::{Extensions, HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Uri, header, request};
use serde_json::{Map, Value, json};

use super::{query::member, words};
use crate::{
    catalog::Policy,
    engine::Found,
    http::directives::RequestDirectives,
    key::{Key, Tag},
    layer::Core,
    observe::{Event, What, now, shortened, tag_hash},
    route::{At, Known, Place, ReadRoute, TenantSource, variant_key},
    store::{Payload, StoredResponse},
};

/// What is asked about.
struct Asked {
    parts: request::Parts,
    /// The prefix that a router takes away before the layer sees it, and that these parts lack.
    mount: Option<String>,
    tenant: Arc<str>,
}

/// What would become of a `GET` of a path for a tenant with these headers.
pub(super) async fn explain(
    core: &Core,
    members: &[(String, String)],
    own: &HeaderMap,
) -> Result<Value, (StatusCode, String)> {
    let Asked { parts, mount, tenant } = asked(members, own).map_err(|mistake| (StatusCode::BAD_REQUEST, mistake))?;
    let place = Place::new(&parts.uri, &parts.extensions, mount.as_deref());
    let Some(read) = core.routes.read(&Method::GET, &place) else {
        return Ok(bypass(None, "no route reads this path"));
    };
    let Some(route) = read.route else {
        return Ok(bypass(Some(read.any), "it is read by another method than GET"));
    };
    if let Some(why) = core.keeps_out(route.data_type(), &route.policy) {
        return Ok(bypass(Some(route), &words::of_bypass(why)));
    }
    if route.body.is_some() {
        return Ok(bypass(Some(route), "its body says what it asks for: this asks about paths"));
    }
    let named = (!tenant.is_empty()).then_some(&*tenant);
    let Ok(tenant) = core.tenants.by_hand(named) else {
        return Ok(bypass(Some(route), &words::of_bypass("no-tenant")));
    };
    let tenants = TenantSource::Single(tenant.into());
    let (at, known) = (At { params: &read.params, mount: read.mount }, Known { tenants: &tenants, ..core.known() });
    let wanted = match route.wanted(&parts, &at, &known) {
        Ok(wanted) => wanted,
        Err(detail) => return Ok(bypass(Some(route), &words::of_bypass(detail))),
    };
    let tags = route.tags(core.space.tenant(tenant.as_bytes()).head(), &read.params);
    let mut key = Key::new(wanted.key);
    let away = |error: crate::store::StoreError| {
        (StatusCode::SERVICE_UNAVAILABLE, format!("the store cannot be asked: {error}"))
    };
    let mut found = core.engine.look_at(&key, &tags, &route.policy).await.map_err(away)?;
    if let Some(Payload::Vary(names)) = found.as_ref().map(|found| &found.entry.payload) {
        key = Key::new(variant_key(key.as_bytes(), names, &parts.headers));
        found = core.engine.look_at(&key, &tags, &route.policy).await.map_err(away)?;
    }
    let directives = core.options.request_directives.then(|| RequestDirectives::of(&parts.headers));
    if directives.as_ref().is_some_and(|directives| directives.no_store) {
        return Ok(bypass(Some(route), "its `Cache-Control: no-store` forbids it"));
    }
    let (verdict, because) = judge(core, &route.policy, found.as_ref(), (&tags, tenant));
    let is_refused = |directives: &RequestDirectives| {
        let asked = core.engine.now();
        found.as_ref().is_some_and(|found| !directives.accept(found.entry.age(asked), found.entry.ttl(asked)))
    };
    let (verdict, because) = match directives.as_ref().is_some_and(is_refused) {
        true if verdict == "hit" => ("miss", "its `Cache-Control` wants a younger or fresher response".to_owned()),
        _ => (verdict, because),
    };
    let listed = match &found {
        Some(found) => of_tags(found),
        None => {
            tags.iter().map(|tag| json!({"tag": tag.label(), "stamped": null, "current": null, "ok": null})).collect()
        }
    };
    Ok(json!({
        "route": route.what(),
        "data_type": route.data_type(),
        "key": key.as_bytes().escape_ascii().to_string(),
        "tags": Value::Array(listed),
        "entry": found.as_ref().map(|found| of_entry(core, found)),
        "verdict": verdict,
        "because": because,
    }))
}

fn asked(members: &[(String, String)], own: &HeaderMap) -> Result<Asked, String> {
    let member = |name| member(members, name);
    let path = member("path").filter(|path| path.starts_with('/')).ok_or("say a `path` that begins with `/`")?;
    let mount = member("mount").map(|mount| mount.trim_end_matches('/')).filter(|mount| !mount.is_empty());
    let below = |mount: &str| path.strip_prefix(mount).filter(|rest| rest.starts_with('/'));
    let path = match mount {
        Some(mount) => below(mount).ok_or_else(|| format!("`path` is not below the `mount` {mount}"))?,
        None => path,
    };
    let uri: Uri = path.parse().map_err(|_| "`path` is no path".to_owned())?;
    let tenant = member("tenant").unwrap_or_default();
    let mut request = Request::new(());
    *request.uri_mut() = uri;
    let (mut parts, ()) = request.into_parts();
    // That of whoever asks, unless another is said.
    parts.headers.extend(own.get(header::HOST).map(|host| (header::HOST, host.clone())));
    for (_, line) in members.iter().filter(|(name, _)| name == "header") {
        let (name, value) =
            line.split_once(':').ok_or_else(|| format!("`{line}` is no header: write `name: value`"))?;
        let name = HeaderName::try_from(name.trim()).map_err(|_| format!("`{name}` is not a header name"))?;
        let value = HeaderValue::try_from(value.trim()).map_err(|_| format!("`{value}` is not a header value"))?;
        match name {
            header::HOST => _ = parts.headers.insert(name, value),
            name => _ = parts.headers.append(name, value),
        }
    }
    parts.extensions = Extensions::new();
    Ok(Asked { parts, mount: mount.map(str::to_owned), tenant: tenant.into() })
}

fn bypass(route: Option<&ReadRoute>, because: &str) -> Value {
    json!({
        "route": route.map(ReadRoute::what), "data_type": route.map(ReadRoute::data_type), "key": null, "tags": [],
        "entry": null, "verdict": "bypass", "because": because,
    })
}

pub(super) fn of_tags(found: &Found) -> Vec<Value> {
    found.now.iter().map(|(tag, now)| of_tag(found, tag, now.map(|g| g.0))).collect()
}

fn of_tag(found: &Found, tag: &Tag, current: Option<u128>) -> Value {
    let stamped = found.entry.stamps.iter().find(|stamp| stamp.tag == *tag).map(|stamp| stamp.generation.0);
    let short = |generation: Option<u128>| generation.map(|generation| format!("{generation:x}"));
    let is_ok = stamped.is_some() && stamped == current;
    json!({"tag": tag.label(), "stamped": short(stamped), "current": short(current), "ok": is_ok})
}

pub(super) fn of_entry(core: &Core, found: &Found) -> Value {
    let (entry, at) = (&found.entry, core.engine.now());
    let Payload::Response(StoredResponse { status, headers, body, .. }) = &entry.payload else { return Value::Null };
    let mut said = Map::new();
    for (name, value) in headers.to_map().iter().filter(|(_, value)| !value.is_empty()) {
        said.insert(name.as_str().to_owned(), json!(String::from_utf8_lossy(value.as_bytes())));
    }
    json!({
        "age": entry.age(at).as_secs(), "ttl": entry.ttl(at), "size": body.len(), "status": status.as_u16(), "headers": said,
    })
}

/// What would become of it, and why, in words.
pub(super) fn judge(
    core: &Core,
    policy: &Policy,
    found: Option<&Found>,
    (tags, tenant): (&[Tag], &str),
) -> (&'static str, String) {
    let at = core.engine.now();
    let Some(found) = found else {
        return match dropped(core, (tags, tenant), None) {
            Some(by) => (
                "miss",
                format!("nothing is stored under its key: {by}, and nothing was stored since, or it had to go"),
            ),
            None => {
                ("miss", "nothing is stored under its key: it was not asked for, not stored, or had to go".to_owned())
            }
        };
    };
    let entry = &found.entry;
    let lost: Vec<_> = found.lost().cloned().collect();
    if !lost.is_empty() {
        let since = entry.created;
        let labels: Vec<_> = lost.iter().map(|tag| format!("`{}`", tag.label())).collect();
        let by = dropped(core, (&lost, tenant), Some(since)).unwrap_or_else(|| {
            format!("{} was dropped by another process, or is lost (evicted, restarted)", labels.join(", "))
        });
        return ("miss", by);
    }
    let Payload::Response(stored) = &entry.payload else {
        return ("miss", "what is stored under its key is no response".to_owned());
    };
    match entry.ttl(at) {
        _ if entry.is_fresh(at) => {
            let for_long = entry.ttl(at).map_or("for ever".to_owned(), |ttl| format!("for {ttl} s more"));
            ("hit", format!("a response with status {} is stored, valid, and fresh {for_long}", status(stored.status)))
        }
        Some(ttl) if at < entry.refresh_until => {
            ("hit", format!("it expired {} s ago, and is served while one request refreshes it", -ttl))
        }
        ttl => {
            let ago = ttl.map_or(0, |ttl| -ttl);
            let kept = if entry.on_error_until > at && policy.stale_if_error.is_some() {
                "; it is kept for when the origin fails"
            } else {
                ""
            };
            ("miss", format!("it expired {ago} s ago{kept}"))
        }
    }
}

fn status(status: StatusCode) -> u16 {
    status.as_u16()
}

/// Which write has dropped one of these tags, as far as this process remembers.
fn dropped(core: &Core, (tags, tenant): (&[Tag], &str), since: Option<u64>) -> Option<String> {
    let tenant = Some(shortened(tenant));
    let hashes: Vec<_> = tags.iter().map(Tag::named).chain([&b"*"[..]]).map(tag_hash).collect();
    let is_it = |event: &Event| match &event.what {
        What::Invalidation { all, tenant: own, .. } if own.is_none() || *own == tenant => {
            // Clocks of engine and wall may differ by a bit.
            since.is_none_or(|since| event.at + 1_000 >= since) && all.iter().any(|tag| hashes.contains(tag))
        }
        _ => false,
    };
    let event = core.observer.recent.newest(Some("invalidation"), 1, is_it).pop()?;
    let What::Invalidation { what, all, .. } = &event.what else { return None };
    let tag = tags.iter().find(|tag| all.contains(&tag_hash(tag.named()))).map(Tag::label);
    let tag = tag.as_deref().unwrap_or("everything");
    let ago = now().saturating_sub(event.at) / 1_000;
    let named = tag.split_once(':').map_or(tag, |(_, named)| named);
    let named = if named == "*" { tag } else { named };
    Some(format!("a `{what}` dropped `{named}` {ago} s ago"))
}
