//! Which entries there are, and whether they are valid.

use http::StatusCode;
use percent_encoding::percent_decode;
use serde_json::{Value, json};

use super::{
    explain::{judge, of_entry, of_tags},
    query::member,
};
use crate::{
    key::{Key, push_escaped},
    layer::Core,
    store::{Search, StoreError},
};

/// So many are looked at, whatever is wanted.
const MOST: usize = 100;

/// The entries whose keys hold all of these words: of a tenant, if one is said.
pub(super) async fn search(core: &Core, members: &[(String, String)]) -> Result<Value, (StatusCode, String)> {
    let Ok(most) = member(members, "n").unwrap_or("20").parse::<usize>() else {
        return Err((StatusCode::BAD_REQUEST, "`n` is a number".to_owned()));
    };
    let named = member(members, "tenant").filter(|tenant| !tenant.is_empty());
    let prefix = match named {
        Some(tenant) => core.space.tenant(tenant).head().to_vec(),
        None => format!("{}{{", core.space.service()).into_bytes(),
    };
    let words = member(members, "text").unwrap_or_default().split_whitespace();
    let words: Vec<_> = words.map(|word| spelled(word.as_bytes())).collect();
    let wanted = Search { prefix: &prefix, words: &words, most: most.min(MOST) };
    let away = |error: StoreError| (StatusCode::SERVICE_UNAVAILABLE, format!("the store cannot be asked: {error}"));
    let mut entries = vec![];
    for key in core.engine.search(wanted).await.map_err(away)? {
        entries.extend(entry(core, &key).await.map_err(away)?);
    }
    Ok(json!(entries))
}

/// As keys have it: escaped, but for what separates their parts.
fn spelled(word: &[u8]) -> Vec<u8> {
    let mut spelled = vec![];
    for byte in word {
        match byte {
            b'=' | b':' | b',' => spelled.push(*byte),
            _ => push_escaped(&mut spelled, &[*byte]),
        }
    }
    spelled
}

async fn entry(core: &Core, key: &Key) -> Result<Option<Value>, StoreError> {
    let (tenant, data_type) = names(key);
    let policy = core.policy(&data_type);
    let Some(found) = core.engine.look_at(key, &[], &policy).await? else { return Ok(None) };
    let (verdict, because) = judge(core, &policy, Some(&found), (&[], &tenant));
    Ok(Some(json!({
        "route": null,
        "key": key.as_bytes().escape_ascii().to_string(),
        "tenant": tenant,
        "data_type": data_type,
        "tags": of_tags(&found),
        "entry": of_entry(core, &found),
        "verdict": verdict,
        "because": because,
    })))
}

/// The tenant and the data type of an entry. Of a long name it is the hash.
fn names(key: &Key) -> (String, String) {
    let text = |bytes: &[u8]| percent_decode(bytes).decode_utf8_lossy().into_owned();
    let head = key.tenant();
    let tenant = head.split(|byte| *byte == b'{').nth(1).unwrap_or_default();
    let tenant = tenant.strip_suffix(b"}").unwrap_or(tenant);
    let rest = key.as_bytes().get(head.len()..).unwrap_or_default();
    let data_type = rest.split(|byte| *byte == b':').nth(1).unwrap_or_default();
    (text(tenant.strip_prefix(b"~").filter(|rest| rest.is_empty()).unwrap_or(tenant)), text(data_type))
}
