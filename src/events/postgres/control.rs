//! The ordinary connection, beside the one for replication: what the server knows, and what is to be made on it.

use std::{sync::Arc, time::Duration};

use pgwire_replication::Lsn;
use tokio::{sync::watch, task::AbortHandle, time::Instant};
use tokio_postgres::{Client, Config, NoTls, SimpleQueryMessage, SimpleQueryRow, config::Host};

use super::{
    failed::{DENIED, EXISTS, Failed, MISSING, within},
    place::Place,
    settings::Settings,
    snapshot::Snapshot,
    sql::{PUBLICATION, literal},
};

/// Cheap to clone. It is closed with the last clone.
#[derive(Clone)]
pub(super) struct Control {
    client: Arc<Client>,
    settings: Arc<Settings>,
    _task: Arc<Ends>,
    closed: watch::Receiver<()>,
    /// Where it is connected to.
    pub(super) host: Host,
    pub(super) port: u16,
}

struct Ends(AbortHandle);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The fleet's slot, as the server has it.
pub(super) struct Slot {
    /// Somebody reads it.
    pub(super) is_active: bool,
    /// Its log is gone, or it was invalidated otherwise.
    pub(super) is_lost: bool,
    /// It is for this database, and for `pgoutput`.
    is_ours: bool,
    pub(super) confirmed: Lsn,
}

/// Up to where the log was durable, at a time.
#[derive(Clone)]
pub(super) struct Flushed {
    /// Taken before the server was asked.
    pub(super) at: Instant,
    pub(super) place: Place,
    /// Whether somebody read the slot.
    pub(super) is_read: bool,
}

impl Control {
    /// Connects to the first of the hosts that answers and takes writes.
    pub(super) async fn connect(settings: &Arc<Settings>) -> Result<Self, Failed> {
        let mut failed = Failed::new("connecting", "no host");
        for (host, port) in &settings.hosts {
            let connecting = Self::connect_to(settings, host, *port);
            match within(settings.timeout, "connecting", connecting).await {
                Ok(control) => return Ok(control),
                Err(why) => failed = why,
            }
        }
        Err(failed)
    }

    async fn connect_to(settings: &Arc<Settings>, host: &Host, port: u16) -> Result<Self, Failed> {
        let mut config = Config::new();
        config.user(&settings.user).dbname(&settings.database).application_name(&settings.application_name).port(port);
        // Not to wait for a standby that is missing.
        config.options(format!("{} -c synchronous_commit=local", settings.options));
        if let Some(password) = &settings.password {
            config.password(password);
        }
        match host {
            Host::Tcp(name) => config.host(name),
            #[cfg(unix)]
            Host::Unix(path) => config.host_path(path),
        };
        let connecting = config.connect(NoTls).await;
        let (client, connection) = connecting.map_err(|e| Failed::query("connecting", &e))?;
        let (open, closed) = watch::channel(());
        let task = tokio::spawn(async move {
            let _open = open;
            // The client says it as well, of what was asked.
            let _ = connection.await;
        });
        let (host, settings, task) = (host.clone(), settings.clone(), Arc::new(Ends(task.abort_handle())));
        let control = Self { client: Arc::new(client), settings, _task: task, closed, host, port };
        match control.text("connecting", "SELECT pg_is_in_recovery()").await?.as_str() {
            "f" => Ok(control),
            _ => Err(Failed::new("connecting", "the server is a replica")),
        }
    }

    /// Completes when the connection has ended, by whomever.
    pub(super) fn closed(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut closed = self.closed.clone();
        async move { while closed.changed().await.is_ok() {} }
    }

    async fn rows(&self, what: &'static str, sql: &str) -> Result<Vec<SimpleQueryRow>, Failed> {
        self.rows_within(self.settings.timeout, what, sql).await
    }

    async fn rows_within(&self, limit: Duration, what: &'static str, sql: &str) -> Result<Vec<SimpleQueryRow>, Failed> {
        let rows = |message| match message {
            SimpleQueryMessage::Row(row) => Some(row),
            _ => None,
        };
        within(limit, what, async {
            let answer = self.client.simple_query(sql).await.map_err(|e| Failed::query(what, &e))?;
            Ok(answer.into_iter().filter_map(rows).collect())
        })
        .await
    }

    /// The first column of the first row.
    async fn text(&self, what: &'static str, sql: &str) -> Result<String, Failed> {
        let rows = self.rows(what, sql).await?;
        column(what, rows.first(), 0).map(str::to_owned)
    }

    pub(super) async fn snapshot(&self) -> Result<Snapshot, Failed> {
        const WHAT: &str = "asking which transactions are visible";
        let text = self.text(WHAT, "SELECT pg_current_snapshot()").await?;
        Snapshot::parse(&text).ok_or_else(|| Failed::new(WHAT, text))
    }

    /// Where the log ends that nobody can lose. With `push` it ends behind a whole record: what is flushed in the background is
    /// up to the end of a page, and the stream waits for the rest of a record that goes on in the next one.
    pub(super) async fn flushed(self, push: bool) -> Result<Flushed, Failed> {
        const WHAT: &str = "asking how long the log is";
        if push {
            self.rows(WHAT, "SELECT pg_logical_emit_message(true, 'tower-cache-aside-push', '')").await?;
        }
        let at = Instant::now();
        let sql = format!(
            "SELECT l.lsn, ('x' || substr(pg_walfile_name(l.lsn), 1, 8))::bit(32)::int, \
             (SELECT system_identifier FROM pg_control_system()), \
             coalesce((SELECT active FROM pg_replication_slots WHERE slot_name = {}), false) \
             FROM (SELECT pg_current_wal_flush_lsn() AS lsn) AS l",
            literal(&self.settings.slot)
        );
        let rows = self.rows(WHAT, &sql).await?;
        let column = |at| column(WHAT, rows.first(), at);
        let timeline = column(1)?.parse().map_err(|_| Failed::new(WHAT, "a timeline that is no number"))?;
        let place = Place { system: column(2)?.to_owned(), timeline, lsn: lsn(WHAT, column(0)?)? };
        Ok(Flushed { at, place, is_read: column(3)? == "t" })
    }

    /// The fleet's slot.
    pub(super) async fn slot(&self) -> Result<Option<Slot>, Failed> {
        const WHAT: &str = "looking at the replication slot";
        let sql = format!(
            "SELECT active, wal_status = 'lost', coalesce(confirmed_flush_lsn, '0/0'), \
             plugin = 'pgoutput' AND database = current_database() FROM pg_replication_slots WHERE slot_name = {}",
            literal(&self.settings.slot)
        );
        let rows = self.rows(WHAT, &sql).await?;
        let Some(row) = rows.first() else { return Ok(None) };
        let is = |at| row.get(at) == Some("t");
        let slot = Slot {
            is_active: is(0),
            is_lost: is(1),
            is_ours: is(3),
            confirmed: lsn(WHAT, column(WHAT, Some(row), 2)?)?,
        };
        if slot.is_ours {
            return Ok(Some(slot));
        }
        Err(Failed::new(WHAT, format!("`{}` is for something else; choose another name", self.settings.slot)))
    }

    /// Makes the publication, if it is not there: before the slot, whose log may not begin without it.
    pub(super) async fn publish(&self) -> Result<(), Failed> {
        const WHAT: &str = "making the publication";
        let sql = format!("SELECT FROM pg_publication WHERE pubname = '{PUBLICATION}'");
        if !self.rows(WHAT, &sql).await?.is_empty() {
            return Ok(());
        }
        match self.rows(WHAT, &format!("CREATE PUBLICATION {PUBLICATION}")).await {
            Ok(_) => Ok(()),
            Err(failed) if failed.is(EXISTS) => Ok(()),
            Err(failed) if failed.is(DENIED) => {
                Err(Failed::new(WHAT, format!("{failed}; have the database's owner run what `install_sql` says")))
            }
            Err(failed) => Err(failed),
        }
    }

    /// Makes the slot, if nobody else does: it waits for the transactions that are open.
    pub(super) async fn create_slot(&self) -> Result<(), Failed> {
        const WHAT: &str = "making the replication slot, which waits for the transactions that are open";
        let sql = format!("SELECT pg_create_logical_replication_slot({}, 'pgoutput')", literal(&self.settings.slot));
        match self.rows_within(self.settings.timeout.max(Duration::from_secs(60)), WHAT, &sql).await {
            Ok(_) => Ok(()),
            Err(failed) if failed.is(EXISTS) => Ok(()),
            Err(failed) => Err(failed),
        }
    }

    /// Drops the slot, unless somebody reads it; if `lost`, only if it still is: another process may have made it anew.
    pub(super) async fn drop_slot(&self, lost: bool) -> Result<(), Failed> {
        let only = if lost { " AND wal_status = 'lost'" } else { "" };
        let sql = format!(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots \
             WHERE slot_name = {} AND NOT active{only}",
            literal(&self.settings.slot)
        );
        match self.rows("dropping the replication slot", &sql).await {
            Ok(_) => Ok(()),
            Err(failed) if failed.is(MISSING) => Ok(()),
            Err(failed) => Err(failed),
        }
    }
}

fn column<'r>(what: &'static str, row: Option<&'r SimpleQueryRow>, at: usize) -> Result<&'r str, Failed> {
    row.and_then(|row| row.try_get(at).ok()?).ok_or_else(|| Failed::new(what, "an answer without a value"))
}

fn lsn(what: &'static str, text: &str) -> Result<Lsn, Failed> {
    Lsn::parse(text).map_err(|e| Failed::new(what, e.to_string()))
}
