//! Without the feature `stats`: what would be counted, and is not.

use std::{borrow::Cow, sync::Arc, time::Duration};

use http::Extensions;
use http_body::SizeHint;

use super::outcome::{FoundIn, Handling, Outcome, Served};

/// Knows nothing.
#[derive(Debug)]
pub(crate) struct Observer;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Timer;

#[derive(Debug)]
pub(crate) struct Watcher;

pub(crate) struct Watch;

impl Timer {
    pub(crate) fn start() -> Self {
        Self
    }
}

impl Watcher {
    pub(super) fn new(_: &Arc<Observer>, _: &str) -> Self {
        Self
    }

    pub(crate) fn hit<'t>(&self, _: Timer, _: &Outcome, _: impl FnOnce() -> Option<Cow<'t, [u8]>>) {}

    pub(crate) fn watch<'t>(
        &self,
        _: Timer,
        _: impl FnOnce() -> Option<Cow<'t, [u8]>>,
        _: impl FnOnce() -> Cow<'t, str>,
    ) -> Watch {
        Watch
    }

    pub(crate) fn loaded(&self, _: bool, _: Duration) {}

    pub(crate) fn stored(&self, _: usize) {}

    pub(crate) fn looked(&self, _: &[u8], _: bool) {}

    pub(crate) fn kept(&self, _: &[u8], _: usize) {}
}

impl Watch {
    pub(crate) fn bypassing(self, _: &'static str) -> Self {
        self
    }

    pub(crate) fn hand_on(self) -> Timer {
        Timer
    }

    pub(crate) fn end(self, _: Option<(&Extensions, SizeHint)>) {}

    pub(crate) fn finish(self, _: (Handling, Option<&'static str>), _: Option<FoundIn>, _: Served) {}
}
