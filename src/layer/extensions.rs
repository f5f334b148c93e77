//! What handlers say to the cache: tags of a response, and that it is to keep out.

use http::{HeaderName, response};
use percent_encoding::percent_decode_str;

use crate::key::{Tag, Tenant};

/// Entities that a response belongs to, besides those that its path names. Put it into the extensions of the response;
/// or send them as the header `cache-tag: agent=42, user=7` (ids percent-encoded where they hold `,`, `=` or `%`), which is
/// taken out before the client sees it.
///
/// A cascade that drops the response's data type for agent 42 then finds it, whatever its path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CacheTags(pub Vec<(String, String)>);

impl CacheTags {
    /// One entity.
    pub fn new(entity: impl Into<String>, id: impl Into<String>) -> Self {
        Self(vec![(entity.into(), id.into())])
    }
}

/// Keeps the cache out of one exchange: in the extensions of a request, which then goes to the inner service whatever is
/// stored, and in those of a response, which is then not stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NoCache;

/// Takes the declared tags out of a response. Malformed ones are an error of the handler: the response must then not be
/// stored, since a cascade would not find it.
pub(super) fn take_tags(
    parts: &mut response::Parts,
    header: &HeaderName,
    tenant: &Tenant,
    data_type: &str,
) -> Result<Vec<Tag>, &'static str> {
    let head = tenant.head();
    let mut tags = vec![];
    if let Some(CacheTags(declared)) = parts.extensions.remove() {
        tags.extend(declared.iter().map(|(entity, id)| Tag::entity(head, data_type, entity, id.as_bytes())));
    }
    if !parts.headers.contains_key(header) {
        return Ok(tags);
    }
    let values: Vec<_> = parts.headers.get_all(header).iter().cloned().collect();
    parts.headers.remove(header);
    for value in values {
        let text = value.to_str().map_err(|_| "bad-tags")?;
        for member in text.split(',').map(str::trim).filter(|m| !m.is_empty()) {
            let (entity, id) = member.split_once('=').ok_or("bad-tags")?;
            let id: Vec<u8> = percent_decode_str(id).collect();
            tags.push(Tag::entity(head, data_type, entity, &id));
        }
    }
    Ok(tags)
}
