//! What is asked for in the query of a request.

use percent_encoding::percent_decode_str;

/// The members of a query, decoded.
pub(super) fn members(query: Option<&str>) -> Vec<(String, String)> {
    let decode = |text: &str| percent_decode_str(&text.replace('+', " ")).decode_utf8_lossy().into_owned();
    let members = query.unwrap_or_default().split('&').filter(|member| !member.is_empty());
    members.map(|member| member.split_once('=').unwrap_or((member, ""))).map(|(n, v)| (decode(n), decode(v))).collect()
}

pub(super) fn member<'m>(members: &'m [(String, String)], name: &str) -> Option<&'m str> {
    members.iter().find(|(own, _)| own == name).map(|(_, value)| &**value)
}
