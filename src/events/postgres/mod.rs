//! Changes of PostgreSQL's rows, by logical replication. (Feature `postgres`.)
//!
//! [`docs::events`](crate::docs::events) has what is guaranteed, the rights that are needed, and what to set on the server.
//!
//! Triggers, whose SQL is [`install_sql`]'s, write a message into the log with each statement that changes a row, whoever sends
//! it; it is seen if and when its transaction is committed. A [`PostgresSource`] reads them. Needs PostgreSQL 14 or later.

mod connecting;
mod control;
mod failed;
mod gathered;
mod kept;
mod memory;
mod place;
mod proofs;
mod reading;
mod settings;
mod sight;
mod snapshot;
mod sql;
mod standby;
mod stream;

use std::{fmt, sync::Arc, time::Duration};

use crate::{
    error::ConfigError,
    events::{EventSource, Notes, Received, SourceFuture},
};
use connecting::{Before, Role, connect};
use failed::{Failed, MISSING};
use kept::Kept;
use memory::Memory;
use settings::Settings;
use sight::Sight;
pub use sql::{Table, install_sql, uninstall_sql};

/// What is made of what the server says, for fuzzers.
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzed {
    pub(crate) use super::{
        gathered::Gathered,
        place::Place,
        snapshot::Snapshot,
        sql::{PREFIX, TRUNCATE},
    };
}

const NAME: &str = "postgres";
const TIMEOUT: Duration = Duration::from_secs(10);
const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(3_600);

/// The changes of rows of one PostgreSQL database, in which [`install_sql`] was run.
///
/// All processes that share a store share a slot: one of them reads, the others stand by. A store that is not shared needs a slot of
/// its own.
pub struct PostgresSource {
    name: String,
    settings: Arc<Settings>,
    memory: Memory,
    role: Option<Role>,
    connecting: Kept<Role>,
    /// What was given last is not acknowledged yet.
    is_given: bool,
    /// What was given last is early.
    sight: Option<Sight>,
    /// The slot cannot be read any more.
    is_broken: bool,
}

/// Configures a [`PostgresSource`].
#[derive(Clone)]
#[must_use]
pub struct PostgresBuilder {
    url: String,
    name: Option<String>,
    slot: Option<String>,
    timeout: Option<Duration>,
}

impl PostgresSource {
    /// A source at this address: `postgres://user:password@host:5432/database`, or with several hosts, of which the first that takes
    /// writes is read. Passwords are proved by SCRAM; there is no TLS.
    pub fn builder(url: impl Into<String>) -> PostgresBuilder {
        PostgresBuilder { url: url.into(), name: None, slot: None, timeout: None }
    }

    async fn receive(&mut self) -> Result<Received, Failed> {
        // It comes again, from where the server is.
        if std::mem::take(&mut self.is_given) {
            self.role = None;
        }
        self.sight = None;
        loop {
            match &mut self.role {
                None => self.connect().await?,
                Some(Role::StandsBy(standby)) => match standby.next().await? {
                    Some(proof) => return Ok(proof),
                    None => self.role = None,
                },
                Some(Role::Reads(reading)) => {
                    let received = reading.next(&mut self.memory).await?;
                    self.is_given = !matches!(received, Received::Proof(_));
                    self.sight = reading.sight();
                    return Ok(received);
                }
            }
        }
    }

    async fn connect(&mut self) -> Result<(), Failed> {
        if !self.connecting.has_begun() {
            let (settings, notes, own) = (self.settings.clone(), self.memory.notes.clone(), self.memory.own().cloned());
            self.connecting.begin(connect(Before { settings, notes, own, is_broken: self.is_broken }));
        }
        let role = self.connecting.end().await?;
        if matches!(role, Role::Reads(_)) {
            self.is_broken = false;
        }
        self.role = Some(role);
        Ok(())
    }

    /// After an error nothing stays open: a server that is told to stop waits for those who read its log.
    fn ended<T>(&mut self, result: Result<T, Failed>) -> Result<T, Failed> {
        if let Err(failed) = &result {
            // The log has changes from when there was no publication: no one will ever read past them.
            self.is_broken |= failed.is(MISSING) && matches!(self.role, Some(Role::Reads(_)));
            self.role = None;
        }
        result
    }
}

impl EventSource for PostgresSource {
    fn name(&self) -> &str {
        &self.name
    }

    fn start(&mut self, notes: Notes) {
        self.memory.notes = Some(notes);
    }

    fn next(&mut self) -> SourceFuture<'_, Received> {
        Box::pin(async move {
            let received = self.receive().await;
            Ok(self.ended(received)?)
        })
    }

    fn visible(&mut self) -> SourceFuture<'_, ()> {
        Box::pin(async move {
            let Some(sight) = &mut self.sight else { return Ok(()) };
            let visible = sight.visible().await;
            Ok(self.ended(visible)?)
        })
    }

    fn ack(&mut self) -> SourceFuture<'_, ()> {
        Box::pin(async move {
            let Some(Role::Reads(reading)) = &mut self.role else { return Ok(()) };
            let acknowledged = reading.ack(&mut self.memory).await;
            self.ended(acknowledged)?;
            self.is_given = false;
            Ok(())
        })
    }
}

impl fmt::Debug for PostgresSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresSource").field("name", &self.name).finish_non_exhaustive()
    }
}

impl PostgresBuilder {
    /// What it is called in logs, metrics and the fleet's notes; by default `postgres`.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// The replication slot; it must be said, as the server has it for all of its databases: one for each fleet, such as
    /// `agents_cache`. It is made if it is not there, and keeps the server's log until somebody reads it: set
    /// `max_slot_wal_keep_size`.
    pub fn slot(mut self, slot: impl Into<String>) -> Self {
        self.slot = Some(slot.into());
        self
    }

    /// How long the server may be silent before it is gone, and connected to anew; by default 10 s.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Checks what was said. It connects when it is first read.
    ///
    /// # Errors
    /// An address that cannot be read, or asks for TLS; a slot that is not named; a time-out below 1 s or above an hour.
    pub fn build(self) -> Result<PostgresSource, ConfigError> {
        let timeout = self.timeout.unwrap_or(TIMEOUT);
        if !(SHORTEST..=LONGEST).contains(&timeout) {
            return Err(ConfigError::new(format!(
                "PostgreSQL timeout {timeout:?}: it is to be between {SHORTEST:?} and {LONGEST:?}"
            )));
        }
        let settings = Settings::new(&self.url, self.slot.unwrap_or_default(), timeout)?;
        Ok(PostgresSource {
            name: self.name.unwrap_or_else(|| NAME.to_owned()),
            settings: Arc::new(settings),
            memory: Memory::default(),
            role: None,
            connecting: Kept::default(),
            is_given: false,
            sight: None,
            is_broken: false,
        })
    }
}

impl fmt::Debug for PostgresBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresBuilder").field("slot", &self.slot).finish_non_exhaustive()
    }
}
