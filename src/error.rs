//! Mistakes of those who use the crate.

use std::{error::Error as StdError, fmt};

/// A mistake in the configuration, or in what is asked for by hand: names the route or type, and the mend. The wording is
/// not stable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError(String);

impl ConfigError {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl StdError for ConfigError {}
