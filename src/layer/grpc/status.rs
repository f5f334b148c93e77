//! What a `grpc-status` says.

use http::{HeaderMap, HeaderName};

pub(super) const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");

/// Whether a status says that nothing was changed (as a 4xx does): the request was refused before it did anything.
pub(super) fn is_refusal(headers: &HeaderMap) -> bool {
    let status = headers.get(GRPC_STATUS).and_then(|status| status.to_str().ok());
    // INVALID_ARGUMENT, NOT_FOUND, ALREADY_EXISTS, PERMISSION_DENIED, RESOURCE_EXHAUSTED, FAILED_PRECONDITION,
    // OUT_OF_RANGE, UNIMPLEMENTED, UNAUTHENTICATED.
    matches!(status, Some("3" | "5" | "6" | "7" | "8" | "9" | "11" | "12" | "16"))
}
