//! The time, in milliseconds since the epoch: the wall clock at start, carried on by the monotonic clock, so that
//! setting the machine's clock neither expires nor prolongs an entry.

use std::{
    fmt,
    sync::Arc,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

/// Milliseconds since the Unix epoch, as the engine's clock tells them.
pub type Millis = u64;

#[derive(Clone)]
pub(crate) enum Clock {
    Monotonic { wall: Millis, start: Instant },
    Custom(Arc<dyn Fn() -> SystemTime + Send + Sync>),
}

impl Default for Clock {
    fn default() -> Self {
        Self::Monotonic { wall: millis(SystemTime::now()), start: Instant::now() }
    }
}

impl Clock {
    pub(crate) fn now(&self) -> Millis {
        match self {
            Self::Monotonic { wall, start } => wall + start.elapsed().as_millis() as Millis,
            Self::Custom(now) => millis(now()),
        }
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Clock({})", self.now())
    }
}

fn millis(time: SystemTime) -> Millis {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as Millis)
}
