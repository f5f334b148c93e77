//! A clock that tests move.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use tokio::time::Instant;

use crate::clock::TimeSource;

/// A clock that tests move, so that entries age and expire without anybody's sleeping. Its clones are one clock.
///
/// ```
/// # use std::time::Duration;
/// # use tower_cache_aside::{Cache, DataType, Route, Ttl, testing::Clock};
/// # fn main() -> Result<(), tower_cache_aside::ConfigError> {
/// let clock = Clock::new();
/// let cache = Cache::builder("docs")
///     .single_tenant("all")
///     .data_type(DataType::new("page", Ttl::Short))
///     .route(Route::new("/pages/{page_id}", "page"))
///     .clock(clock.clone())
///     .build()?;
/// // Fill it, and then:
/// clock.advance(Duration::from_secs(301)); // every page has expired
/// # Ok(()) }
/// ```
///
/// It tells how old entries are. What the cache *waits* for (budgets, leases of fences, the pauses of a circuit breaker) goes by
/// tokio's time, which `tokio::time::pause` and `advance` move.
#[derive(Clone, Debug)]
pub struct Clock(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// What it says, or said at `since`.
    time: Mutex<SystemTime>,
    /// Since when it runs; `None` if it stands.
    since: Option<Instant>,
}

impl Clock {
    /// A clock that stands still, at the time that it is, until it is moved.
    pub fn new() -> Self {
        Self::at(SystemTime::now())
    }

    /// A clock that stands still at this time, until it is moved.
    pub fn at(time: SystemTime) -> Self {
        Self(Arc::new(Inner { time: Mutex::new(time), since: None }))
    }

    /// A clock that goes on with tokio's time, from the time that it is: with `tokio::time::pause`, as that is moved. Several
    /// of them, each [set](Self::set) a bit wrong, are the clocks of a fleet.
    pub fn running() -> Self {
        Self(Arc::new(Inner { time: Mutex::new(SystemTime::now()), since: Some(Instant::now()) }))
    }

    /// Moves it forward.
    pub fn advance(&self, by: Duration) {
        let mut time = self.time();
        *time = time.checked_add(by).unwrap_or(*time);
    }

    /// Sets it, to an earlier time as well.
    pub fn set(&self, to: SystemTime) {
        *self.time() = to.checked_sub(self.ran()).unwrap_or(to);
    }

    /// The time that it tells.
    pub fn now(&self) -> SystemTime {
        let time = *self.time();
        time.checked_add(self.ran()).unwrap_or(time)
    }

    fn ran(&self) -> Duration {
        self.0.since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    fn time(&self) -> MutexGuard<'_, SystemTime> {
        self.0.time.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::new()
    }
}

impl TimeSource for Clock {
    fn now(&self) -> SystemTime {
        Self::now(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn it_stands_or_runs_and_can_be_set() {
        let hour = Duration::from_secs(3_600);
        let begin = SystemTime::UNIX_EPOCH + 1_000 * hour;
        for (clock, goes_on) in [(Clock::at(begin), 0), (Clock::running(), 1)] {
            clock.set(begin);
            tokio::time::advance(hour).await;
            assert_eq!(clock.now(), begin + goes_on * hour);
            clock.clone().advance(hour);
            assert_eq!(clock.now(), begin + (goes_on + 1) * hour);
            clock.set(begin);
            assert_eq!(clock.now(), begin);
        }
    }
}
