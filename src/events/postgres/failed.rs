//! What went wrong with a server.

use std::{error::Error as StdError, fmt, time::Duration};

use pgwire_replication::PgWireError;
use tokio::time::timeout;

use crate::events::SourceError;

/// It is taken by another process.
pub(super) const IN_USE: &str = "55006";
pub(super) const MISSING: &str = "42704";
pub(super) const DENIED: &str = "42501";
pub(super) const EXISTS: &str = "42710";

/// What could not be done, and why.
#[derive(Debug)]
pub(super) struct Failed {
    what: &'static str,
    why: String,
    /// As SQL has it.
    code: Option<String>,
}

impl Failed {
    pub(super) fn new(what: &'static str, why: impl Into<String>) -> Self {
        Self { what, why: why.into(), code: None }
    }

    /// On the ordinary connection.
    pub(super) fn query(what: &'static str, error: &tokio_postgres::Error) -> Self {
        // It only says "db error" itself.
        let cause = error.source().map_or(String::new(), |cause| format!(": {cause}"));
        Self { what, why: format!("{error}{cause}"), code: error.code().map(|code| code.code().to_owned()) }
    }

    /// On the connection for replication.
    pub(super) fn stream(what: &'static str, error: &PgWireError) -> Self {
        let why = error.to_string();
        let code = why.split_once("SQLSTATE ").and_then(|(_, code)| code.get(..5)).map(str::to_owned);
        Self { what, why, code }
    }

    pub(super) fn is(&self, code: &str) -> bool {
        self.code.as_deref() == Some(code)
    }
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.why)
    }
}

impl StdError for Failed {}

impl From<Failed> for SourceError {
    fn from(failed: Failed) -> Self {
        Self::new(failed)
    }
}

/// What takes longer has failed: a network that swallows what is sent would have it wait for ever.
pub(super) async fn within<T>(
    limit: Duration,
    what: &'static str,
    work: impl Future<Output = Result<T, Failed>>,
) -> Result<T, Failed> {
    match timeout(limit, work).await {
        Ok(result) => result,
        Err(_) => Err(Failed::new(what, format!("no answer for {limit:?}"))),
    }
}
