//! Assertions on responses, which say what was the case instead.

use std::fmt;

use super::told::{Answer, Told};
use crate::observe::Handling;

/// What an assertion is about.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    Hit,
    Miss,
    Fresh,
}

impl Expected {
    fn holds(self, handling: Handling) -> bool {
        match self {
            Self::Hit => handling == Handling::Hit,
            Self::Miss => matches!(handling, Handling::Miss | Handling::Coalesced),
            Self::Fresh => handling != Handling::Stale,
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Hit => "a hit",
            Self::Miss => "a miss",
            Self::Fresh => "a fresh response",
        }
    }
}

/// Whether a response is what is expected; else what it is.
fn expect(answer: &impl Answer, expected: Expected) -> Result<(), String> {
    let what = expected.as_str();
    match Told::of(answer) {
        Some(told) if expected.holds(told.handling) => Ok(()),
        Some(told) => {
            let said = answer.headers().get("cache-status").and_then(|said| said.to_str().ok());
            let said = said.map_or(String::new(), |said| format!(": `cache-status: {said}`"));
            Err(format!("expected {what}, found: {told}{said}"))
        }
        None => Err(format!(
            "expected {what}, but nothing says that a cache has handled it: no route of the mapping reads this path, or the \
             layer is not around this service"
        )),
    }
}

/// Panics unless a response is what is expected; `why` is said as well.
#[doc(hidden)]
#[track_caller]
pub fn assert_told(answer: &impl Answer, expected: Expected, why: Option<fmt::Arguments<'_>>) {
    let found = expect(answer, expected).err();
    let why = why.map_or(String::new(), |why| format!(": {why}"));
    assert!(found.is_none(), "{}{why}", found.unwrap_or_default());
}

/// Asserts that a response was answered from the cache, and is fresh. (Feature `testing`.)
///
/// It is asked of an [`http::Response`], by its [`Outcome`](crate::Outcome), or of the headers of one that came over a socket, by their
/// `Cache-Status`. What comes after it is said as well when it fails, as with [`assert!`].
///
/// ```
/// # use tower_cache_aside::assert_hit;
/// let response = http::Response::builder().header("cache-status", "tower-cache-aside; hit; ttl=300").body(())?;
/// assert_hit!(response);
/// assert_hit!(response.headers(), "agent {}", 42);
/// # Ok::<_, http::Error>(())
/// ```
#[macro_export]
macro_rules! assert_hit {
    ($response:expr $(,)?) => {
        $crate::testing::assert_told(&$response, $crate::testing::Expected::Hit, ::std::option::Option::None)
    };
    ($response:expr, $($why:tt)+) => {
        $crate::testing::assert_told(
            &$response,
            $crate::testing::Expected::Hit,
            ::std::option::Option::Some(::std::format_args!($($why)+)),
        )
    };
}

/// Asserts that a response comes from the inner service because nothing (that is good) was stored: by this request, or by one it
/// has waited for. A request that the cache keeps out of is no miss. (Feature `testing`.)
///
/// ```should_panic
/// # use tower_cache_aside::assert_miss;
/// # let response = http::Response::builder();
/// let response = response.header("cache-status", "tower-cache-aside; fwd=bypass; detail=no-tenant").body(()).unwrap();
/// assert_miss!(response); // expected a miss, found: bypass (no-tenant): `cache-status: …`
/// ```
#[macro_export]
macro_rules! assert_miss {
    ($response:expr $(,)?) => {
        $crate::testing::assert_told(&$response, $crate::testing::Expected::Miss, ::std::option::Option::None)
    };
    ($response:expr, $($why:tt)+) => {
        $crate::testing::assert_told(
            &$response,
            $crate::testing::Expected::Miss,
            ::std::option::Option::Some(::std::format_args!($($why)+)),
        )
    };
}

/// Asserts that a response is not a stale one, served on purpose while it is refreshed or because the inner service failed:
/// it is a hit, or comes from the inner service. (Feature `testing`.)
///
/// ```
/// # use tower_cache_aside::assert_fresh;
/// # let response = http::Response::builder();
/// let response = response.header("cache-status", "tower-cache-aside; fwd=uri-miss; stored").body(())?;
/// assert_fresh!(response);
/// # Ok::<_, http::Error>(())
/// ```
#[macro_export]
macro_rules! assert_fresh {
    ($response:expr $(,)?) => {
        $crate::testing::assert_told(&$response, $crate::testing::Expected::Fresh, ::std::option::Option::None)
    };
    ($response:expr, $($why:tt)+) => {
        $crate::testing::assert_told(
            &$response,
            $crate::testing::Expected::Fresh,
            ::std::option::Option::Some(::std::format_args!($($why)+)),
        )
    };
}
