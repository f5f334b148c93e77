//! What the response of a write locates (RFC 9111, section 4.4).

use http::{HeaderMap, HeaderValue, Uri, header, uri::Authority};

/// The paths that `Location` and `Content-Location` name on the host of the request.
pub(super) fn located(request: &Uri, host: Option<&HeaderValue>, headers: &HeaderMap) -> Vec<String> {
    let named = [header::LOCATION, header::CONTENT_LOCATION].into_iter().flat_map(|name| headers.get_all(name));
    let own = request.authority().map(Authority::as_str).or_else(|| host.and_then(|host| host.to_str().ok()));
    let path_of = |location: &str| match location.parse::<Uri>() {
        Ok(uri) if uri.authority().is_some() => {
            let other = uri.authority().map(Authority::as_str);
            (other == own).then(|| uri.path().to_owned())
        }
        Ok(uri) if location.starts_with('/') => Some(uri.path().to_owned()),
        // Relative to the folder of the request's path.
        _ => {
            let folder = request.path().rsplit_once('/').map_or("", |(folder, _)| folder);
            let name = location.split(['?', '#']).next().unwrap_or_default();
            Some(format!("{folder}/{name}"))
        }
    };
    named.filter_map(|value| path_of(value.to_str().ok()?)).collect()
}
