//! The time, in milliseconds since the epoch: the wall clock at start, carried on by a clock that nobody sets and that goes
//! on while the machine sleeps, so that neither setting its clock nor suspending it prolongs an entry.

use std::{
    fmt,
    sync::{Arc, LazyLock},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::time::Instant;

/// Milliseconds since the Unix epoch, as the engine's clock tells them.
pub type Millis = u64;

/// What tells the time: for tests, a closure or the feature `testing`'s clock.
pub trait TimeSource: Send + Sync + 'static {
    /// The time.
    fn now(&self) -> SystemTime;
}

impl<F: Fn() -> SystemTime + Send + Sync + 'static> TimeSource for F {
    fn now(&self) -> SystemTime {
        self()
    }
}

#[derive(Clone)]
pub(crate) enum Clock {
    Monotonic { wall: Millis, start: Millis },
    Custom(Arc<dyn TimeSource>),
}

impl Default for Clock {
    /// The same for all of a process: caches that share a store tell its entries' times alike, whatever the wall clock did between
    /// their makings.
    fn default() -> Self {
        static START: LazyLock<(Millis, Millis)> = LazyLock::new(|| (millis(SystemTime::now()), uptime()));
        let (wall, start) = *START;
        Self::Monotonic { wall, start }
    }
}

impl Clock {
    pub(crate) fn now(&self) -> Millis {
        match self {
            Self::Monotonic { wall, start } => wall + uptime().saturating_sub(*start),
            Self::Custom(source) => millis(source.now()),
        }
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Clock({})", self.now())
    }
}

/// A time in the past: by the clock of tasks, and by the one that goes on while the machine sleeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Moment {
    at: Instant,
    uptime: Millis,
}

impl Moment {
    pub(crate) fn of(at: Instant) -> Self {
        let ago = at.elapsed().as_millis() as Millis;
        Self { at, uptime: uptime().saturating_sub(ago) }
    }

    /// How long ago it is, by the clock that says more.
    pub(crate) fn elapsed(self) -> Duration {
        self.at.elapsed().max(Duration::from_millis(uptime().saturating_sub(self.uptime)))
    }
}

fn millis(time: SystemTime) -> Millis {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as Millis)
}

/// Milliseconds since the machine started, the time it slept included.
#[cfg(any(target_os = "linux", target_os = "android"))]
pub(crate) fn uptime() -> Millis {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let (seconds, nanos) = (u64::try_from(now.tv_sec).unwrap_or(0), u64::try_from(now.tv_nsec).unwrap_or(0));
    seconds * 1_000 + nanos / 1_000_000
}

/// Milliseconds since the first call. (Time that the machine sleeps may be missing.)
#[cfg(not(any(target_os = "linux", target_os = "android")))]
pub(crate) fn uptime() -> Millis {
    static START: LazyLock<std::time::Instant> = LazyLock::new(std::time::Instant::now);
    START.elapsed().as_millis() as Millis + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whenever they were made: an entry of one is as old to the other.
    #[test]
    fn all_caches_of_a_process_have_one_clock() {
        let start = || match Clock::default() {
            Clock::Monotonic { wall, start } => (wall, start),
            Clock::Custom(_) => (0, 0),
        };
        let first = start();
        std::thread::sleep(Duration::from_millis(3));
        assert_eq!(start(), first);
    }
}
