//! How popular requests are warmed.

use std::{path::PathBuf, time::Duration};

use crate::error::ConfigError;

/// How many requests may be on the list at most.
const MOST: usize = 10_000;

/// How popular requests are [warmed](crate::Cache::warm).
///
/// ```
/// # use tower_cache_aside::Warm;
/// let warm = Warm::new().requests(500).concurrency(2).budget(120).file("/var/lib/agents/popular");
/// ```
#[derive(Clone, Debug)]
#[must_use]
pub struct Warm {
    pub(super) requests: usize,
    pub(super) concurrency: usize,
    pub(super) budget: u32,
    pub(super) ahead: Duration,
    pub(super) sample: u8,
    pub(super) saves: Duration,
    pub(super) file: Option<PathBuf>,
}

impl Default for Warm {
    fn default() -> Self {
        Self {
            requests: 2_000,
            concurrency: 4,
            budget: 1_200,
            ahead: Duration::from_secs(10),
            sample: 8,
            saves: Duration::from_secs(60),
            file: None,
        }
    }
}

impl Warm {
    /// With the defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many requests are kept warm, of no tenant more than a fifth of them; by default 2,000.
    pub fn requests(mut self, most: usize) -> Self {
        self.requests = most;
        self
    }

    /// How many of them are asked at once; by default 4. Half of it while the inner service takes twice as long as usual, and none
    /// for half a minute when it fails three times in a row.
    pub fn concurrency(mut self, most: usize) -> Self {
        self.concurrency = most;
        self
    }

    /// How often a minute the inner service is called for it, at most; by default 1,200.
    pub fn budget(mut self, calls_per_minute: u32) -> Self {
        self.budget = calls_per_minute;
        self
    }

    /// So long before it ends a response is replaced (and no sooner than in the last quarter of its time); by default 10 s.
    pub fn ahead(mut self, ahead: Duration) -> Self {
        self.ahead = ahead;
        self
    }

    /// Looks at one request in so many; by default 8. One that is looked at takes about a microsecond longer.
    pub fn sample(mut self, one_in: u8) -> Self {
        self.sample = one_in;
        self
    }

    /// How often the list is written down; by default every minute.
    pub fn saves(mut self, every: Duration) -> Self {
        self.saves = every;
        self
    }

    /// Keeps the list in this file, which holds paths and the names of tenants; by default it is in the shared store, for the whole
    /// fleet. For a store in process, which is empty at each start.
    pub fn file(mut self, path: impl Into<PathBuf>) -> Self {
        self.file = Some(path.into());
        self
    }

    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let wrong = |what: &str| Err(ConfigError::new(format!("warm: {what}")));
        if self.requests == 0 || self.requests > MOST {
            return wrong("there may be 1 to 10,000 `requests`");
        }
        if self.sample == 0 {
            return wrong("a `sample` of one in zero is none; 1 looks at every request");
        }
        if self.concurrency == 0 || self.budget == 0 {
            return wrong("a `concurrency` or `budget` of zero warms nothing; leave `Cache::warm` out instead");
        }
        if self.saves < Duration::from_millis(10) {
            return wrong("it `saves` too often; give it some seconds");
        }
        Ok(())
    }
}
