//! Nobody warms: without the feature `warm` this takes the place of `popular.rs`.

use std::sync::Arc;

use bytes::Bytes;
use http::request;

use super::core::Core;
use crate::route::{At, Place, ReadRoute, Wanted};

/// Nothing is picked.
pub(super) enum Picked {}

impl Picked {
    pub(super) fn send_with(self, _: &[u8], _: &Bytes) {}
}

pub(super) fn picked(
    _: &Arc<Core>,
    _: &ReadRoute,
    _: (&Place<'_>, &At<'_, '_>),
    _: &request::Parts,
    _: (&Wanted<'_>, Option<&[u8]>),
) -> Option<Picked> {
    None
}
