//! What handlers say to the cache: tags of a response, and that it is to keep out.

use std::collections::HashSet;

use http::{Extensions, HeaderMap, HeaderName, HeaderValue, response};
use percent_encoding::percent_decode_str;

use super::{
    changes::{MOST_READ, Reads},
    core::Core,
};
use crate::key::{Tag, Tenant};

/// Entities that a response belongs to, besides those that its path names; in the extensions of the response, where every
/// layer may [add](Self::of) its own. Or send them as the header `cache-tag: agent=42, user=7` (ids percent-encoded where
/// they hold `,`, `=` or `%`), which is taken out before the client sees it.
///
/// A cascade that drops the response's data type for agent 42 then finds it, whatever its path. What no cascade can match
/// (an entity by which no cascade drops this type, an id that is none, something malformed) is a mistake: such a response is
/// not stored, `Cache-Status` says `bad-tags`, and a warning says which. Nor is one that declares more than 1,000 different ones.
///
/// ```
/// # use tower_cache_aside::CacheTags;
/// # let mut response = http::Response::new(());
/// CacheTags::of(response.extensions_mut()).add("agent", "42").add("user", "7");
/// ```
// Nobody can make one to insert, and so overwrite those of the layers below.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheTags {
    tags: Vec<(String, String)>,
}

impl CacheTags {
    /// The tags that are declared so far.
    pub fn of(extensions: &mut Extensions) -> &mut Self {
        extensions.get_or_insert_with(|| Self { tags: vec![] })
    }

    /// The response belongs to this entity.
    pub fn add(&mut self, entity: impl Into<String>, id: impl Into<String>) -> &mut Self {
        self.tags.push((entity.into(), id.into()));
        self
    }
}

/// Keeps the cache out of one exchange: in the extensions of a request, which then goes to the inner service whatever is
/// stored, and in those of a response, which is then not stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NoCache;

/// Takes the declared tags out of a response. Those that no cascade would match are an error of the handler: the response
/// must then not be stored.
pub(crate) fn take_tags(
    parts: &mut response::Parts,
    core: &Core,
    tenant: &Tenant,
    data_type: &str,
    reads: &Reads,
) -> Result<Vec<Tag>, &'static str> {
    let header = &core.options.tag_header;
    let declared = parts.extensions.remove::<CacheTags>().map_or(vec![], |declared| declared.tags);
    let mut tags: Vec<_> = declared.into_iter().map(|(entity, id)| Ok((entity, id.into_bytes()))).collect();
    // Most responses have none.
    if parts.headers.contains_key(header) {
        for value in parts.headers.get_all(header) {
            match value.to_str() {
                Ok(text) => tags.extend(text.split(',').map(str::trim).filter(|m| !m.is_empty()).map(parse)),
                Err(_) => tags.push(Err(String::from_utf8_lossy(value.as_bytes()).into_owned())),
            }
        }
        parts.headers.remove(header);
    }
    let tag = |declared: Result<(String, Vec<u8>), String>| {
        let (entity, id) = declared?;
        let canonical = core.cascades.entities.id(&entity, &id).filter(|id| !id.is_empty());
        match canonical.filter(|_| core.routes.expected.is_useful(data_type, &entity)) {
            Some(id) => Ok(Tag::entity(tenant.head(), data_type, &entity, &id)),
            None => Err(format!("{entity}={}", String::from_utf8_lossy(&id))),
        }
    };
    let depends = reads.tags(core, tenant);
    let mut tags = tags.into_iter().map(tag).collect::<Result<Vec<_>, String>>().map_err(|tag| {
        if core.warnings.is_new("tags", data_type) {
            let mend = "mend the tag, or declare the cascade";
            tracing::warn!(%data_type, %tag, "not stored: no cascade drops this type by that tag; {mend}");
        }
        "bad-tags"
    })?;
    // The same may be said for each item of a page.
    if tags.len() > MOST_READ && tags.iter().collect::<HashSet<_>>().len() > MOST_READ {
        if core.warnings.is_new("many-tags", data_type) {
            tracing::warn!(%data_type, "not stored: it declares more than 1,000 tags; declare what they have in common");
        }
        return Err("bad-tags");
    }
    tags.extend(depends?);
    Ok(tags)
}

/// What other caches cut off.
const MOST_FORWARDED: usize = 16 << 10;

/// Says the tags to caches outside: the coarse ones first, and as many as have room.
pub(super) fn forward_tags<'t>(headers: &mut HeaderMap, name: &HeaderName, tags: impl Iterator<Item = &'t Tag>) {
    let mut tags: Vec<_> = tags.map(Tag::as_bytes).collect();
    tags.sort_by_key(|tag| !tag.ends_with(b"*"));
    let between = if *name == "surrogate-key" { &b" "[..] } else { b"," };
    let mut all: Vec<u8> = vec![];
    for (i, tag) in tags.iter().enumerate().filter(|(i, tag)| !tags[..*i].contains(tag)) {
        if all.len() + between.len() + tag.len() > MOST_FORWARDED {
            break;
        }
        all.extend_from_slice(if i == 0 { b"" } else { between });
        all.extend_from_slice(tag);
    }
    if let Ok(value) = HeaderValue::from_bytes(&all) {
        headers.insert(name, value);
    }
}

/// `agent=42`; else what it is instead.
fn parse(member: &str) -> Result<(String, Vec<u8>), String> {
    let is_plain = |text: &str| !text.is_empty() && !text.contains(['"', '=']) && !text.contains(char::is_whitespace);
    match member.split_once('=') {
        Some((entity, id)) if is_plain(entity) && is_plain(id) => {
            Ok((entity.to_owned(), percent_decode_str(id).collect()))
        }
        _ => Err(member.to_owned()),
    }
}
