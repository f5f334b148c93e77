//! The origin: SQLite, one file that several processes may share.
//!
//! Every write is one SQL statement, so that a row's `version` grows by exactly one however many writers there are.
//! Every read is counted by data type when it begins, and may be slowed down *after* it has read the row: the answer is
//! then already old when it is returned, which is what a cache has to cope with.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use rusqlite::{
    Connection, ErrorCode, OpenFlags, OptionalExtension, Params, Row, TransactionBehavior, ffi, params, types::Type,
};
use serde::Serialize;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::Semaphore;

use crate::outbox::Outbox;

/// How many reads run at once.
const READERS: usize = 8;
/// How long to wait for another process that holds the file.
const BUSY: Duration = Duration::from_secs(10);

/// `seq` (the rowid) keeps the order of insertion; an index on the columns before it therefore yields rows in that order.
const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS agents (
    seq INTEGER PRIMARY KEY,
    tenant TEXT NOT NULL,
    id TEXT NOT NULL,
    name TEXT NOT NULL,
    description TEXT NOT NULL DEFAULT '',
    version INTEGER NOT NULL DEFAULT 1,
    config TEXT NOT NULL DEFAULT '{}',
    config_version INTEGER NOT NULL DEFAULT 1,
    tools TEXT NOT NULL DEFAULT '[]',
    tools_version INTEGER NOT NULL DEFAULT 1,
    UNIQUE (tenant, id)
);
CREATE INDEX IF NOT EXISTS agents_of_tenant ON agents (tenant);

CREATE TABLE IF NOT EXISTS executions (
    tenant TEXT NOT NULL,
    agent_id TEXT NOT NULL,
    id TEXT NOT NULL,
    state TEXT NOT NULL,
    version INTEGER NOT NULL DEFAULT 1,
    PRIMARY KEY (tenant, agent_id, id),
    FOREIGN KEY (tenant, agent_id) REFERENCES agents (tenant, id) ON DELETE CASCADE
);

CREATE TABLE IF NOT EXISTS conversations (
    tenant TEXT NOT NULL,
    id TEXT NOT NULL,
    agent_id TEXT NOT NULL,
    title TEXT NOT NULL DEFAULT '',
    version INTEGER NOT NULL DEFAULT 1,
    PRIMARY KEY (tenant, id),
    FOREIGN KEY (tenant, agent_id) REFERENCES agents (tenant, id) ON DELETE CASCADE
);
CREATE INDEX IF NOT EXISTS conversations_of_agent ON conversations (tenant, agent_id);

CREATE TABLE IF NOT EXISTS memories (
    tenant TEXT NOT NULL,
    conversation_id TEXT NOT NULL,
    content TEXT NOT NULL,
    version INTEGER NOT NULL DEFAULT 1,
    PRIMARY KEY (tenant, conversation_id),
    FOREIGN KEY (tenant, conversation_id) REFERENCES conversations (tenant, id) ON DELETE CASCADE
);

CREATE TABLE IF NOT EXISTS messages (
    seq INTEGER PRIMARY KEY,
    tenant TEXT NOT NULL,
    conversation_id TEXT NOT NULL,
    id TEXT NOT NULL,
    role TEXT NOT NULL,
    content TEXT NOT NULL,
    version INTEGER NOT NULL DEFAULT 1,
    UNIQUE (tenant, conversation_id, id),
    FOREIGN KEY (tenant, conversation_id) REFERENCES conversations (tenant, id) ON DELETE CASCADE
);
CREATE INDEX IF NOT EXISTS messages_of_conversation ON messages (tenant, conversation_id);

CREATE TABLE IF NOT EXISTS collections (
    tenant TEXT NOT NULL,
    id TEXT NOT NULL,
    metadata TEXT NOT NULL,
    version INTEGER NOT NULL DEFAULT 1,
    PRIMARY KEY (tenant, id)
);

CREATE TRIGGER IF NOT EXISTS remember AFTER INSERT ON messages BEGIN
    -- Version 1 is the generated, empty memory.
    INSERT INTO memories (tenant, conversation_id, content, version)
    VALUES (new.tenant, new.conversation_id, json_object('messages', 1, 'last', new.content), 2)
    ON CONFLICT (tenant, conversation_id) DO UPDATE SET
        content = json_object('messages', json_extract(content, '$.messages') + 1, 'last', new.content),
        version = version + 1;
END;
";

const SEED: &str = "
WITH RECURSIVE n (i) AS (SELECT 1 WHERE ?1 >= 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?1)
INSERT INTO agents (tenant, id, name, description)
SELECT 'demo', 'agent-' || i, 'Agent ' || i, 'Sample agent ' || i FROM n WHERE true
ON CONFLICT DO NOTHING
";

/// What a read is counted under. The order is that of [`READS`].
#[derive(Clone, Copy)]
enum Read {
    Agent,
    AgentsList,
    AgentConfig,
    AgentTools,
    ExecutionState,
    Conversation,
    Memory,
    MessagesList,
    Message,
    Collection,
}

const READS: [&str; 10] = [
    "agent",
    "agents_list",
    "agent_config",
    "agent_tools",
    "agent_execution_state",
    "conversation",
    "conversation_memory",
    "conversation_messages_list",
    "conversation_message",
    "collection_metadata",
];

#[derive(Debug, Clone, Serialize)]
pub struct Agent {
    pub id: String,
    pub name: String,
    pub description: String,
    pub version: i64,
}

#[derive(Debug, Clone, Serialize)]
pub struct AgentsPage {
    pub items: Vec<Agent>,
    pub limit: i64,
    pub offset: i64,
    pub total: i64,
}

#[derive(Debug, Clone, Serialize)]
pub struct AgentConfig {
    pub agent_id: String,
    pub config: Value,
    pub version: i64,
}

#[derive(Debug, Clone, Serialize)]
pub struct AgentTools {
    pub agent_id: String,
    pub tools: Value,
    pub version: i64,
}

#[derive(Debug, Clone, Serialize)]
pub struct Execution {
    pub agent_id: String,
    pub execution_id: String,
    pub state: Value,
    pub version: i64,
}

#[derive(Debug, Clone, Serialize)]
pub struct Conversation {
    pub id: String,
    pub agent_id: String,
    pub title: String,
    pub version: i64,
}

#[derive(Debug, Clone, Serialize)]
pub struct Memory {
    pub conversation_id: String,
    pub agent_id: String,
    pub memory: Value,
    pub version: i64,
    /// `database`, or `generated` when nothing has been stored yet.
    pub source: &'static str,
}

#[derive(Debug, Clone, Serialize)]
pub struct Message {
    pub id: String,
    pub conversation_id: String,
    pub role: String,
    pub content: String,
    pub version: i64,
}

/// A row about a conversation and, from the same SQL read, the agent that the conversation belongs to.
#[derive(Debug, Clone)]
pub struct OfAgent<T> {
    pub agent_id: String,
    pub row: T,
}

#[derive(Debug, Clone, Serialize)]
pub struct Collection {
    pub collection_id: String,
    pub metadata: Value,
    pub version: i64,
}

#[derive(Debug)]
pub enum Error {
    /// The id is taken.
    Conflict,
    /// The row would belong to an agent that does not exist.
    UnknownAgent,
    Failed(String),
}

pub type Result<T> = std::result::Result<T, Error>;

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Conflict => f.write_str("the id is taken"),
            Self::UnknownAgent => f.write_str("there is no such agent"),
            Self::Failed(reason) => f.write_str(reason),
        }
    }
}

impl std::error::Error for Error {}

impl From<rusqlite::Error> for Error {
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error().map(|e| e.extended_code) {
            Some(ffi::SQLITE_CONSTRAINT_PRIMARYKEY | ffi::SQLITE_CONSTRAINT_UNIQUE) => Self::Conflict,
            Some(ffi::SQLITE_CONSTRAINT_FOREIGNKEY) => Self::UnknownAgent,
            _ => Self::Failed(error.to_string()),
        }
    }
}

#[derive(Clone)]
pub struct Database(Arc<Inner>);

struct Inner {
    path: PathBuf,
    /// Async, so that writers that wait for each other hold no thread.
    writer: Arc<tokio::sync::Mutex<Connection>>,
    readers: Mutex<Vec<Connection>>,
    permits: Arc<Semaphore>,
    calls: [AtomicU64; READS.len()],
    origin_delay: Duration,
    /// Last, because fields are dropped in this order: the connections close before their file goes.
    _temporary: Option<TempDir>,
}

impl Database {
    /// Opens (and if needed creates) the file, and inserts the sample agents that it does not hold yet. Blocks.
    pub fn open(path: Option<&Path>, origin_delay: Duration, seed_agents: usize) -> Result<Self> {
        let failed = |e: std::io::Error| Error::Failed(e.to_string());
        let (path, temporary) = match path {
            Some(path) => (path.to_owned(), None),
            None => {
                let dir = TempDir::with_prefix("agent_service-").map_err(failed)?;
                (dir.path().join("agents.db"), Some(dir))
            }
        };
        let writer = initialise(&path, seed_agents)?;
        Ok(Self(Arc::new(Inner {
            path,
            writer: Arc::new(tokio::sync::Mutex::new(writer)),
            readers: Mutex::new(Vec::with_capacity(READERS)),
            permits: Arc::new(Semaphore::new(READERS)),
            calls: Default::default(),
            origin_delay,
            _temporary: temporary,
        })))
    }

    /// What triggers write down of every change, whoever makes it. Blocks.
    pub fn outbox(&self) -> Result<Outbox> {
        Ok(Outbox::install(connect(&self.0.path)?)?)
    }

    /// The reads since the start, by data type; all of them, also those that never happened.
    pub fn calls(&self) -> impl Iterator<Item = (&'static str, u64)> {
        READS.into_iter().zip(self.0.calls.each_ref().map(|count| count.load(Ordering::Relaxed)))
    }

    // Agents

    pub async fn create_agent(&self, tenant: &str, id: &str, name: &str, description: &str) -> Result<Agent> {
        let row = owned([tenant, id, name, description]);
        let created = self.write(
            "INSERT INTO agents (tenant, id, name, description) VALUES (?1, ?2, ?3, ?4)
             RETURNING id, name, description, version",
            row,
            agent,
        );
        created.await?.ok_or_else(|| Error::Failed("an insert returned no row".into()))
    }

    pub async fn agents(&self, tenant: &str, limit: i64, offset: i64) -> Result<AgentsPage> {
        let tenant = tenant.to_owned();
        self.read(Read::AgentsList, move |db| {
            // One statement, so that the page and the total are of the same moment; the left join keeps the total when
            // the page is empty.
            let mut statement = db.prepare_cached(
                "SELECT a.id, a.name, a.description, a.version, t.total
                 FROM (SELECT count(*) AS total FROM agents WHERE tenant = ?1) t
                 LEFT JOIN (SELECT * FROM agents WHERE tenant = ?1 ORDER BY seq LIMIT ?2 OFFSET ?3) a ON true
                 ORDER BY a.seq",
            )?;
            let mut rows = statement.query(params![tenant, limit, offset])?;
            let mut page = AgentsPage { items: Vec::new(), limit, offset, total: 0 };
            while let Some(row) = rows.next()? {
                page.total = row.get(4)?;
                if row.get_ref(0)?.data_type() != Type::Null {
                    page.items.push(agent(row)?);
                }
            }
            Ok(page)
        })
        .await
    }

    pub async fn agent(&self, tenant: &str, id: &str) -> Result<Option<Agent>> {
        let sql = "SELECT id, name, description, version FROM agents WHERE tenant = ?1 AND id = ?2";
        self.read_one(Read::Agent, sql, [tenant, id], agent).await
    }

    pub async fn update_agent(
        &self,
        tenant: &str,
        id: &str,
        name: Option<String>,
        description: Option<String>,
    ) -> Result<Option<Agent>> {
        self.write(
            "UPDATE agents SET name = coalesce(?3, name), description = coalesce(?4, description), version = version + 1
             WHERE tenant = ?1 AND id = ?2 RETURNING id, name, description, version",
            (tenant.to_owned(), id.to_owned(), name, description),
            agent,
        )
        .await
    }

    /// Deletes the agent with its conversations and executions; false when there is none.
    pub async fn delete_agent(&self, tenant: &str, id: &str) -> Result<bool> {
        let sql = "DELETE FROM agents WHERE tenant = ?1 AND id = ?2 RETURNING 1";
        Ok(self.write(sql, owned([tenant, id]), |_| Ok(())).await?.is_some())
    }

    pub async fn agent_config(&self, tenant: &str, id: &str) -> Result<Option<AgentConfig>> {
        let sql = "SELECT id, config, config_version FROM agents WHERE tenant = ?1 AND id = ?2";
        self.read_one(Read::AgentConfig, sql, [tenant, id], agent_config).await
    }

    pub async fn put_agent_config(&self, tenant: &str, id: &str, config: &Value) -> Result<Option<AgentConfig>> {
        self.write(
            "UPDATE agents SET config = ?3, config_version = config_version + 1
             WHERE tenant = ?1 AND id = ?2 RETURNING id, config, config_version",
            owned([tenant, id, &config.to_string()]),
            agent_config,
        )
        .await
    }

    pub async fn agent_tools(&self, tenant: &str, id: &str) -> Result<Option<AgentTools>> {
        let sql = "SELECT id, tools, tools_version FROM agents WHERE tenant = ?1 AND id = ?2";
        self.read_one(Read::AgentTools, sql, [tenant, id], agent_tools).await
    }

    pub async fn put_agent_tools(&self, tenant: &str, id: &str, tools: &Value) -> Result<Option<AgentTools>> {
        self.write(
            "UPDATE agents SET tools = ?3, tools_version = tools_version + 1
             WHERE tenant = ?1 AND id = ?2 RETURNING id, tools, tools_version",
            owned([tenant, id, &tools.to_string()]),
            agent_tools,
        )
        .await
    }

    pub async fn execution(&self, tenant: &str, agent: &str, id: &str) -> Result<Option<Execution>> {
        let sql = "SELECT agent_id, id, state, version FROM executions
                   WHERE tenant = ?1 AND agent_id = ?2 AND id = ?3";
        self.read_one(Read::ExecutionState, sql, [tenant, agent, id], execution).await
    }

    /// Creates or replaces the state; nothing when there is no such agent.
    pub async fn put_execution(&self, tenant: &str, agent: &str, id: &str, state: &Value) -> Result<Option<Execution>> {
        self.write(
            "INSERT INTO executions (tenant, agent_id, id, state)
             SELECT ?1, ?2, ?3, ?4 FROM agents WHERE tenant = ?1 AND id = ?2
             ON CONFLICT (tenant, agent_id, id) DO UPDATE SET state = excluded.state, version = version + 1
             RETURNING agent_id, id, state, version",
            owned([tenant, agent, id, &state.to_string()]),
            execution,
        )
        .await
    }

    // Conversations

    /// Nothing when there is no such agent.
    pub async fn create_conversation(
        &self,
        tenant: &str,
        agent: &str,
        id: &str,
        title: &str,
    ) -> Result<Option<Conversation>> {
        self.write(
            "INSERT INTO conversations (tenant, agent_id, id, title)
             SELECT ?1, ?2, ?3, ?4 FROM agents WHERE tenant = ?1 AND id = ?2
             RETURNING id, agent_id, title, version",
            owned([tenant, agent, id, title]),
            conversation,
        )
        .await
    }

    pub async fn conversation(&self, tenant: &str, id: &str) -> Result<Option<Conversation>> {
        let sql = "SELECT id, agent_id, title, version FROM conversations WHERE tenant = ?1 AND id = ?2";
        self.read_one(Read::Conversation, sql, [tenant, id], conversation).await
    }

    pub async fn conversation_of_agent(&self, tenant: &str, agent: &str, id: &str) -> Result<Option<Conversation>> {
        let sql = "SELECT id, agent_id, title, version FROM conversations
                   WHERE tenant = ?1 AND agent_id = ?2 AND id = ?3";
        self.read_one(Read::Conversation, sql, [tenant, agent, id], conversation).await
    }

    /// Changes the title, or moves the conversation to another agent.
    pub async fn update_conversation(
        &self,
        tenant: &str,
        id: &str,
        title: Option<String>,
        agent: Option<String>,
    ) -> Result<Option<Conversation>> {
        self.write(
            "UPDATE conversations
             SET title = coalesce(?3, title), agent_id = coalesce(?4, agent_id), version = version + 1
             WHERE tenant = ?1 AND id = ?2 RETURNING id, agent_id, title, version",
            (tenant.to_owned(), id.to_owned(), title, agent),
            conversation,
        )
        .await
    }

    /// Deletes the conversation with its messages and memory; false when there is none.
    pub async fn delete_conversation(&self, tenant: &str, id: &str) -> Result<bool> {
        let sql = "DELETE FROM conversations WHERE tenant = ?1 AND id = ?2 RETURNING 1";
        Ok(self.write(sql, owned([tenant, id]), |_| Ok(())).await?.is_some())
    }

    /// The ids of an agent's conversations. A look-up for the program itself: neither counted nor delayed.
    pub async fn conversations_of(&self, tenant: &str, agents: &[String]) -> Result<Vec<String>> {
        // One question, however many agents: SQLite takes a list as JSON.
        let agents = serde_json::Value::from(agents).to_string();
        let key = owned([tenant, &agents]);
        self.with_reader(move |db| {
            let sql =
                "SELECT id FROM conversations WHERE tenant = ?1 AND agent_id IN (SELECT value FROM json_each(?2))";
            let mut statement = db.prepare_cached(sql)?;
            let ids = statement.query_map(key, |row| row.get(0))?;
            ids.collect()
        })
        .await
    }

    pub async fn memory(&self, tenant: &str, conversation: &str) -> Result<Option<Memory>> {
        let sql = "SELECT c.id, c.agent_id, m.content, m.version FROM conversations c
                   LEFT JOIN memories m ON m.tenant = c.tenant AND m.conversation_id = c.id
                   WHERE c.tenant = ?1 AND c.id = ?2";
        self.read_one(Read::Memory, sql, [tenant, conversation], memory).await
    }

    // Messages

    /// Nothing when there is no such conversation.
    pub async fn create_message(
        &self,
        tenant: &str,
        conversation: &str,
        id: &str,
        role: &str,
        content: &str,
    ) -> Result<Option<Message>> {
        self.write(
            "INSERT INTO messages (tenant, conversation_id, id, role, content)
             SELECT ?1, ?2, ?3, ?4, ?5 FROM conversations WHERE tenant = ?1 AND id = ?2
             RETURNING id, conversation_id, role, content, version",
            owned([tenant, conversation, id, role, content]),
            message,
        )
        .await
    }

    /// All messages in the order in which they came; nothing when there is no such conversation.
    pub async fn messages(&self, tenant: &str, conversation: &str) -> Result<Option<OfAgent<Vec<Message>>>> {
        let key = owned([tenant, conversation]);
        self.read(Read::MessagesList, move |db| {
            let mut statement = db.prepare_cached(
                "SELECT m.id, m.conversation_id, m.role, m.content, m.version, c.agent_id FROM conversations c
                 LEFT JOIN messages m ON m.tenant = c.tenant AND m.conversation_id = c.id
                 WHERE c.tenant = ?1 AND c.id = ?2 ORDER BY m.seq",
            )?;
            let mut rows = statement.query(key)?;
            let mut list = None;
            while let Some(row) = rows.next()? {
                if list.is_none() {
                    list = Some(OfAgent { agent_id: row.get(5)?, row: Vec::new() });
                }
                if let Some(list) = &mut list
                    && row.get_ref(0)?.data_type() != Type::Null
                {
                    list.row.push(message(row)?);
                }
            }
            Ok(list)
        })
        .await
    }

    pub async fn message(&self, tenant: &str, conversation: &str, id: &str) -> Result<Option<OfAgent<Message>>> {
        let sql = "SELECT m.id, m.conversation_id, m.role, m.content, m.version, c.agent_id FROM messages m
                   JOIN conversations c ON c.tenant = m.tenant AND c.id = m.conversation_id
                   WHERE m.tenant = ?1 AND m.conversation_id = ?2 AND m.id = ?3";
        let of_agent = |row: &Row<'_>| Ok(OfAgent { agent_id: row.get(5)?, row: message(row)? });
        self.read_one(Read::Message, sql, [tenant, conversation, id], of_agent).await
    }

    // Collections

    pub async fn collection(&self, tenant: &str, id: &str) -> Result<Option<Collection>> {
        let sql = "SELECT id, metadata, version FROM collections WHERE tenant = ?1 AND id = ?2";
        self.read_one(Read::Collection, sql, [tenant, id], collection).await
    }

    pub async fn put_collection(&self, tenant: &str, id: &str, metadata: &Value) -> Result<Collection> {
        let stored = self.write(
            "INSERT INTO collections (tenant, id, metadata) VALUES (?1, ?2, ?3)
             ON CONFLICT (tenant, id) DO UPDATE SET metadata = excluded.metadata, version = version + 1
             RETURNING id, metadata, version",
            owned([tenant, id, &metadata.to_string()]),
            collection,
        );
        stored.await?.ok_or_else(|| Error::Failed("an upsert returned no row".into()))
    }

    // How statements run

    async fn read_one<T: Send + 'static, const N: usize>(
        &self,
        what: Read,
        sql: &'static str,
        key: [&str; N],
        map: fn(&Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Option<T>>
    where
        [String; N]: Params,
    {
        let key = owned(key);
        self.read(what, move |db| db.prepare_cached(sql)?.query_row(key, map).optional()).await
    }

    /// A read on behalf of a client: counted at once, and delayed only after the row has been read.
    async fn read<T: Send + 'static>(
        &self,
        what: Read,
        run: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T> {
        self.0.calls[what as usize].fetch_add(1, Ordering::Relaxed);
        let result = self.with_reader(run).await;
        if !self.0.origin_delay.is_zero() {
            tokio::time::sleep(self.0.origin_delay).await;
        }
        result
    }

    async fn with_reader<T: Send + 'static>(
        &self,
        run: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T> {
        let permit = self.0.permits.clone().acquire_owned().await.map_err(|e| Error::Failed(e.to_string()))?;
        let inner = self.0.clone();
        blocking(move || {
            let pooled = inner.readers.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let reader = match pooled {
                Some(reader) => reader,
                None => open_reader(&inner.path)?,
            };
            let result = run(&reader);
            inner.readers.lock().unwrap_or_else(PoisonError::into_inner).push(reader);
            drop(permit); // after the connection is back, so that the pool never grows beyond the permits
            Ok(result?)
        })
        .await
    }

    /// Runs one writing statement and returns the row it returns.
    async fn write<T: Send + 'static>(
        &self,
        sql: &'static str,
        values: impl Params + Send + 'static,
        map: fn(&Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Option<T>> {
        let writer = self.0.writer.clone().lock_owned().await;
        blocking(move || {
            let mut statement = writer.prepare_cached(sql)?;
            let mut rows = statement.query(values)?;
            let returned = rows.next()?.map(map).transpose()?;
            // Stepping to the end is what checks the foreign keys and commits: a write acknowledged after its first
            // row could still fail.
            while rows.next()?.is_some() {}
            Ok(returned)
        })
        .await
    }
}

async fn blocking<T: Send + 'static>(run: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(run).await.unwrap_or_else(|e| Err(Error::Failed(e.to_string())))
}

fn owned<const N: usize>(values: [&str; N]) -> [String; N] {
    values.map(str::to_owned)
}

/// Opens the file for writing and brings it up to date, together with whichever processes do the same right now.
fn initialise(path: &Path, seed_agents: usize) -> Result<Connection> {
    let deadline = Instant::now() + BUSY;
    loop {
        match try_initialise(path, seed_agents) {
            // Switching to WAL is the one step that does not wait for the others by itself.
            Err(e) if is_busy(&e) && Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
            done => return Ok(done?),
        }
    }
}

fn try_initialise(path: &Path, seed_agents: usize) -> rusqlite::Result<Connection> {
    let mut db = connect(path)?;
    let mode: String = db.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0))?;
    if mode != "wal" {
        // An in-memory name, for one: every connection would have a database of its own.
        return Err(rusqlite::Error::InvalidPath(path.to_owned()));
    }
    let transaction = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
    transaction.execute_batch(SCHEMA)?;
    transaction.execute(SEED, [i64::try_from(seed_agents).unwrap_or(i64::MAX)])?;
    transaction.commit()?;
    Ok(db)
}

fn open_reader(path: &Path) -> rusqlite::Result<Connection> {
    let db = connect(path)?;
    db.pragma_update(None, "query_only", true)?;
    Ok(db)
}

fn connect(path: &Path) -> rusqlite::Result<Connection> {
    // No URI names: the path is a path. No mutex: a connection has one user at a time.
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let db = Connection::open_with_flags(path, flags)?;
    db.busy_timeout(BUSY)?;
    db.pragma_update(None, "synchronous", "NORMAL")?;
    db.pragma_update(None, "foreign_keys", true)?;
    db.set_prepared_statement_cache_capacity(32);
    Ok(db)
}

fn is_busy(error: &rusqlite::Error) -> bool {
    matches!(error.sqlite_error_code(), Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked))
}

// From rows to values

fn parsed(row: &Row<'_>, column: usize) -> rusqlite::Result<Value> {
    serde_json::from_str(row.get_ref(column)?.as_str()?)
        .map_err(|e| rusqlite::Error::FromSqlConversionFailure(column, Type::Text, Box::new(e)))
}

fn agent(row: &Row<'_>) -> rusqlite::Result<Agent> {
    Ok(Agent { id: row.get(0)?, name: row.get(1)?, description: row.get(2)?, version: row.get(3)? })
}

fn agent_config(row: &Row<'_>) -> rusqlite::Result<AgentConfig> {
    Ok(AgentConfig { agent_id: row.get(0)?, config: parsed(row, 1)?, version: row.get(2)? })
}

fn agent_tools(row: &Row<'_>) -> rusqlite::Result<AgentTools> {
    Ok(AgentTools { agent_id: row.get(0)?, tools: parsed(row, 1)?, version: row.get(2)? })
}

fn execution(row: &Row<'_>) -> rusqlite::Result<Execution> {
    Ok(Execution { agent_id: row.get(0)?, execution_id: row.get(1)?, state: parsed(row, 2)?, version: row.get(3)? })
}

fn conversation(row: &Row<'_>) -> rusqlite::Result<Conversation> {
    Ok(Conversation { id: row.get(0)?, agent_id: row.get(1)?, title: row.get(2)?, version: row.get(3)? })
}

fn memory(row: &Row<'_>) -> rusqlite::Result<Memory> {
    let (memory, version, source) = match row.get_ref(2)?.data_type() {
        Type::Null => (json!({ "messages": 0, "last": null }), 1, "generated"),
        _ => (parsed(row, 2)?, row.get(3)?, "database"),
    };
    Ok(Memory { conversation_id: row.get(0)?, agent_id: row.get(1)?, memory, version, source })
}

fn message(row: &Row<'_>) -> rusqlite::Result<Message> {
    Ok(Message {
        id: row.get(0)?,
        conversation_id: row.get(1)?,
        role: row.get(2)?,
        content: row.get(3)?,
        version: row.get(4)?,
    })
}

fn collection(row: &Row<'_>) -> rusqlite::Result<Collection> {
    Ok(Collection { collection_id: row.get(0)?, metadata: parsed(row, 1)?, version: row.get(2)? })
}
