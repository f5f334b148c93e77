//! What a `grpc-status` says.

use http::{HeaderMap, HeaderName, HeaderValue, header};

pub(super) const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");

fn status(headers: &HeaderMap) -> Option<&str> {
    headers.get(GRPC_STATUS)?.to_str().ok()
}

/// Whether a status says that the request was refused before it changed anything. Servers, proxies and the framework say the
/// others, too, and after the handler has run: `OUT_OF_RANGE` and `RESOURCE_EXHAUSTED`, for one, of an answer that is too
/// large.
pub(super) fn is_refusal(headers: &HeaderMap) -> bool {
    // INVALID_ARGUMENT, NOT_FOUND, ALREADY_EXISTS, PERMISSION_DENIED, FAILED_PRECONDITION, UNAUTHENTICATED.
    matches!(status(headers), Some("3" | "5" | "6" | "7" | "9" | "16"))
}

/// Whether a message is framed as gRPC has it, with its status in trailers: not as grpc-web or in another way.
pub(super) fn is_plain(headers: &HeaderMap) -> bool {
    let content_type = headers.get(header::CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
    let rest = content_type.strip_prefix(b"application/grpc");
    rest.is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
}

/// Whether it was a success.
pub(super) fn is_success(headers: &HeaderMap) -> bool {
    status(headers) == Some("0")
}
