//! What the RFCs say of HTTP caching, as functions of headers and time. Nothing here knows of Tower, of a store or of the
//! engine.

pub(crate) mod cache_status;
pub(crate) mod conditions;
pub(crate) mod directives;
pub(crate) mod fields;
pub(crate) mod freshness;
pub(crate) mod locations;
pub(crate) mod ranges;
