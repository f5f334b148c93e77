//! An outbox: triggers in the database write down every change, whoever makes it, and the service follows what they have written.
//!
//! A row of it appears with the change that it is about, so there is nothing to wait for; a rollback takes both back. SQLite has one
//! writer at a time, and so the numbers of its rows are in the order of their commits: who has read up to one has missed none. (Of
//! a database with several writers that is not true: see the page on events.)

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rusqlite::{Connection, OptionalExtension, TransactionBehavior, types::ValueRef};
use tokio::time::{Instant, sleep};
use tower_cache_aside::{Batch, Event, EventSource, Notes, Received, SourceError, SourceFuture};

/// How many of the last changes are kept: who is further behind than that has a gap.
const KEPT: i64 = 100_000;

const AT_ONCE: i64 = 1_000;
const PAUSE: Duration = Duration::from_millis(50);
const PROOFS: Duration = Duration::from_millis(250);

/// The tables; by what their rows are known besides the tenant; and whether a row may take the place of another that is known by
/// something else (their key is a number).
const TABLES: [(&str, &[&str], bool); 6] = [
    ("agents", &["id"], true),
    ("executions", &["id", "agent_id"], false),
    ("conversations", &["id", "agent_id"], false),
    ("memories", &["conversation_id"], false),
    ("messages", &["id", "conversation_id"], true),
    ("collections", &["id"], false),
];

/// The outbox and its triggers. (No JSON here: what a writer has put into a column must not make its write fail.)
fn schema() -> String {
    let mut sql = format!(
        "CREATE TABLE IF NOT EXISTS outbox (
             seq INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, op TEXT NOT NULL, tenant, first, second
         );
         CREATE TRIGGER IF NOT EXISTS outbox_kept AFTER INSERT ON outbox BEGIN
             DELETE FROM outbox WHERE seq <= new.seq - {KEPT};
         END;"
    );
    for (table, keys, is_numbered) in TABLES {
        let row = |of: &str| {
            let second = keys.get(1).map_or("NULL".to_owned(), |key| format!("{of}{key}"));
            format!("{of}tenant, {of}{}, {second}", keys[0])
        };
        let add = |op: &str, rest: &str| {
            format!("INSERT INTO outbox (name, op, tenant, first, second) SELECT '{table}', '{op}', {rest};")
        };
        let mut trigger = |when: &str, name: &str, steps: &[String]| {
            let steps = steps.concat();
            sql +=
                &format!("CREATE TRIGGER IF NOT EXISTS outbox_{table}_{name} {when} ON {table} BEGIN {steps} END;\n");
        };
        let (old, new) = (row("old."), row("new."));
        trigger("AFTER INSERT", "insert", &[add("insert", &new)]);
        trigger("AFTER DELETE", "delete", &[add("delete", &old)]);
        // One whose keys change is two.
        let moved = format!("{new} WHERE ({old}) IS NOT ({new})");
        trigger("AFTER UPDATE", "update", &[add("update", &old), add("update", &moved)]);
        if is_numbered {
            // `REPLACE` deletes without a trigger.
            let replaced = format!("{} FROM {table} WHERE seq = new.seq", row(""));
            trigger("BEFORE INSERT", "replace", &[add("delete", &replaced)]);
            trigger("BEFORE UPDATE OF seq", "renumber", &[add("delete", &replaced)]);
        }
    }
    sql
}

/// What the triggers have written, from where the fleet has left it.
pub struct Outbox {
    database: Arc<Mutex<Connection>>,
    notes: Option<Notes>,
    /// Everything up to this has been dropped.
    read: Option<i64>,
    /// And up to this, when what was given last has been.
    given: i64,
    proven: Option<Instant>,
    /// What is proven when what was given last has been dropped.
    proves: Option<Instant>,
    /// What is proven, and not said yet.
    due: Option<Instant>,
}

/// What there is after a position.
struct Rows {
    events: Vec<Event>,
    last: i64,
    /// The first that is kept, and the last that ever was.
    kept: (i64, i64),
}

impl Outbox {
    /// Has the triggers made where there are none.
    pub fn install(mut database: Connection) -> rusqlite::Result<Self> {
        let transaction = database.transaction_with_behavior(TransactionBehavior::Immediate)?;
        transaction.execute_batch(&schema())?;
        transaction.commit()?;
        database.pragma_update(None, "query_only", true)?;
        Ok(Self {
            database: Arc::new(Mutex::new(database)),
            notes: None,
            read: None,
            given: 0,
            proven: None,
            proves: None,
            due: None,
        })
    }

    async fn rows(&self, after: i64) -> Result<Rows, SourceError> {
        let database = self.database.clone();
        let rows = tokio::task::spawn_blocking(move || {
            rows(&mut database.lock().unwrap_or_else(PoisonError::into_inner), after)
        });
        rows.await.map_err(SourceError::new)?.map_err(SourceError::new)
    }

    async fn remembered(&self) -> Result<Option<i64>, SourceError> {
        let Some(notes) = &self.notes else { return Ok(None) };
        let note = notes.read().await?;
        Ok(note.and_then(|note| std::str::from_utf8(&note).ok()?.parse().ok()))
    }

    async fn look(&mut self) -> Result<Option<Received>, SourceError> {
        if let Some(now) = self.due.take() {
            self.proven = Some(now);
            return Ok(Some(Received::Proof(now)));
        }
        if self.read.is_none() {
            self.read = self.remembered().await?;
        }
        // A snapshot that begins now has everything that was committed before.
        let now = Instant::now();
        let rows = self.rows(self.read.unwrap_or(i64::MAX)).await?;
        let why = match self.read {
            None => Some("nobody knows how far the outbox was read"),
            Some(read) if read > rows.kept.1 => Some("the outbox is another one"),
            Some(read) if read + 1 < rows.kept.0 => Some("the outbox has forgotten what was not read"),
            Some(_) => None,
        };
        if let Some(why) = why {
            (self.given, self.proves) = (rows.kept.1, None);
            return Ok(Some(Received::Gap(why.to_owned())));
        }
        if !rows.events.is_empty() {
            // What this read has found is all that there was, if it is not more than it may find.
            self.proves = (rows.events.len() < AT_ONCE as usize).then_some(now);
            self.given = rows.last;
            return Ok(Some(Received::Events(Batch::new(rows.events))));
        }
        if self.proven.is_none_or(|proven| proven.elapsed() >= PROOFS) {
            self.proven = Some(now);
            return Ok(Some(Received::Proof(now)));
        }
        Ok(None)
    }
}

impl EventSource for Outbox {
    fn name(&self) -> &str {
        "outbox"
    }

    fn start(&mut self, notes: Notes) {
        self.notes = Some(notes);
    }

    fn next(&mut self) -> SourceFuture<'_, Received> {
        Box::pin(async move {
            loop {
                if let Some(received) = self.look().await? {
                    return Ok(received);
                }
                sleep(PAUSE).await;
            }
        })
    }

    fn ack(&mut self) -> SourceFuture<'_, ()> {
        Box::pin(async move {
            if let Some(notes) = &self.notes {
                notes.write(self.given.to_string().as_bytes()).await?;
            }
            self.read = Some(self.given);
            self.due = self.proves.take();
            Ok(())
        })
    }
}

fn rows(database: &mut Connection, after: i64) -> rusqlite::Result<Rows> {
    let snapshot = database.transaction()?;
    let last = "SELECT seq FROM sqlite_sequence WHERE name = 'outbox'";
    let last: i64 = snapshot.query_row(last, [], |row| row.get(0)).optional()?.unwrap_or(0);
    let first: Option<i64> = snapshot.query_row("SELECT min(seq) FROM outbox", [], |row| row.get(0))?;
    let mut rows = Rows { events: vec![], last: after, kept: (first.unwrap_or(last + 1), last) };
    let mut statement = snapshot.prepare_cached(
        "SELECT seq, name, op, tenant, first, second FROM outbox WHERE seq > ?1 ORDER BY seq LIMIT ?2",
    )?;
    let mut found = statement.query([after, AT_ONCE])?;
    while let Some(row) = found.next()? {
        rows.last = row.get(0)?;
        let name: String = row.get(1)?;
        let keys = TABLES.iter().find(|(table, ..)| *table == name).map_or(&[][..], |(_, keys, _)| keys);
        let mut event = Event::new(name).field("op", row.get::<_, String>(2)?).tenant(text(row.get_ref(3)?));
        for (at, key) in keys.iter().enumerate() {
            event = event.field(*key, text(row.get_ref(4 + at)?));
        }
        rows.events.push(event);
    }
    Ok(rows)
}

/// As the routes have it.
fn text(value: ValueRef<'_>) -> String {
    match value {
        ValueRef::Null => String::new(),
        ValueRef::Integer(number) => number.to_string(),
        ValueRef::Real(number) => number.to_string(),
        ValueRef::Text(text) | ValueRef::Blob(text) => String::from_utf8_lossy(text).into_owned(),
    }
}
