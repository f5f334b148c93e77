//! Rows of PostgreSQL behind a cache that hears of every change of them, whoever makes it: this service, `psql`, a migration.
//!
//! ```text
//! # once: ALTER SYSTEM SET wal_level = logical, and restart the server
//! cargo run --example postgres_events -- --database postgres://postgres@localhost/postgres
//! psql -h localhost -U postgres -c "INSERT INTO agents VALUES ('demo', 'a1', 'Ada')"
//! curl -i localhost:8080/agents/a1 -H 'x-tenant-id: demo'    # cache-status: a miss, then hits
//! psql -h localhost -U postgres -c "UPDATE agents SET name = 'Grace' WHERE id = 'a1'"
//! curl -i localhost:8080/agents/a1 -H 'x-tenant-id: demo'    # a miss: Grace
//! ```
//!
//! Stop PostgreSQL: after `--max-lag-ms` nothing that was cached is answered any more (`fwd=bypass; detail=events-behind`), since
//! nobody knows what has changed. Start it, and it goes on. With `--redis URL` several processes share what is cached, and the slot:
//! one of them reads the log, and all are fresh.
//!
//! When you are done: `SELECT pg_drop_replication_slot('postgres_events')`. A slot that nobody reads keeps the server's log.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::{net::SocketAddr, process::ExitCode, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    extract::{FromRequestParts, Path, State},
    http::{StatusCode, request::Parts},
    response::{IntoResponse, Response},
    routing::get,
};
use lexopt::{Arg, ValueExt};
use serde::{Deserialize, Serialize};
use tokio::{net::TcpListener, sync::Mutex, time::timeout};
use tokio_postgres::{Client, Config, NoTls, Row};
use tower_cache_aside::{
    Cache, Cascade, ConfigError, DataType, EventPolicy, Mutation, Route, Ttl,
    postgres::{PostgresSource, install_sql},
    store::RedisStore,
};

const USAGE: &str = "\
Rows of PostgreSQL behind a cache that hears of every change of them.

Usage: postgres_events --database URL [FLAGS]

    --database URL              # such as postgres://user:password@localhost:5432/app; its wal_level is logical
    [--listen 127.0.0.1:8080]   # port 0 picks a free one; the first line on stdout is: listening on http://ADDR
    [--slot postgres_events]    # the replication slot: one for each store
    [--redis URL]               # the store of several processes; without it each has its own, and needs a slot of its own
    [--max-lag-ms 5000]         # what was changed longer ago than this is not served, whatever happens
    [--help]                    # prints this
";

/// How long a read may take; one of a server that says nothing would go on for ever.
const PATIENCE: Duration = Duration::from_secs(5);

struct Args {
    database: String,
    listen: SocketAddr,
    slot: String,
    redis: Option<String>,
    max_lag: Duration,
}

/// Everything about caching: no handler knows of it.
fn cache(args: &Args) -> Result<Cache, ConfigError> {
    let builder = Cache::builder("postgres_events")
        .tenant_header("x-tenant-id")
        // Nothing is served that others have changed longer ago than this. That is what happens when no event comes; else
        // they come within milliseconds, and so entries can live long.
        .data_type(DataType::new("agent", Ttl::Extended).max_lag(args.max_lag))
        .data_type(DataType::new("agents", Ttl::Extended).max_lag(args.max_lag))
        .cascade(Cascade::new("agent").all(["agents"]))
        .route(Route::new("/agents", "agents"))
        .route(Route::new("/agents/{agent_id}", "agent"))
        // This service's own writes are fresh when they are answered.
        .mutation(Mutation::put("/agents/{agent_id}", "agent"))
        // Those of everybody else as soon as PostgreSQL tells of them: the table's name, and the column with the id.
        .event(EventPolicy::on("agents").mutated("agent", "id"));
    match &args.redis {
        Some(url) => builder.store(RedisStore::builder([url.as_str()]).build()?).build(),
        None => builder.build(),
    }
}

/// Reads what has changed from PostgreSQL's log, from now on.
fn follow(cache: &Cache, args: &Args) -> Result<(), ConfigError> {
    cache.follow(PostgresSource::builder(&args.database).slot(&args.slot).build()?)?;
    Ok(())
}

/// What a migration would do: the table, and the triggers that tell of its changes. Processes that start together take turns.
fn migration() -> String {
    let table = "CREATE TABLE IF NOT EXISTS agents (
        tenant text, id text, name text NOT NULL, version bigint NOT NULL DEFAULT 1, PRIMARY KEY (tenant, id))";
    let triggers = install_sql(["agents"]);
    format!("BEGIN; SELECT pg_advisory_xact_lock(1); {table}; {triggers} COMMIT")
}

/// One connection, which is made anew when it is lost. (A real service has a pool.)
#[derive(Clone)]
struct Database(Arc<(Config, Mutex<Option<Arc<Client>>>)>);

impl Database {
    fn new(url: &str) -> Result<Self, tokio_postgres::Error> {
        let mut config: Config = url.parse()?;
        // A network that swallows everything is not waited for.
        config.connect_timeout(PATIENCE).tcp_user_timeout(PATIENCE);
        Ok(Self(Arc::new((config, Mutex::new(None)))))
    }

    async fn client(&self) -> Result<Arc<Client>, tokio_postgres::Error> {
        let (config, connected) = &*self.0;
        let mut connected = connected.lock().await;
        if let Some(client) = connected.as_ref().filter(|client| !client.is_closed()) {
            return Ok(client.clone());
        }
        let (client, connection) = config.connect(NoTls).await?;
        tokio::spawn(connection);
        Ok(connected.insert(Arc::new(client)).clone())
    }
}

#[derive(Serialize)]
struct Agent {
    id: String,
    name: String,
    version: i64,
}

impl From<Row> for Agent {
    fn from(row: Row) -> Self {
        Self { id: row.get("id"), name: row.get("name"), version: row.get("version") }
    }
}

#[derive(Deserialize)]
struct NewName {
    name: String,
}

struct Tenant(String);

impl<S: Sync> FromRequestParts<S> for Tenant {
    type Rejection = (StatusCode, &'static str);

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Self::Rejection> {
        let named = parts.headers.get("x-tenant-id").and_then(|name| name.to_str().ok());
        named.map(|name| Self(name.to_owned())).ok_or((StatusCode::BAD_REQUEST, "x-tenant-id is missing"))
    }
}

enum Failure {
    NotFound,
    /// The database does not answer.
    Unavailable(String),
}

impl From<tokio_postgres::Error> for Failure {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Unavailable(with_cause(&error))
    }
}

impl From<tokio::time::error::Elapsed> for Failure {
    fn from(_: tokio::time::error::Elapsed) -> Self {
        Self::Unavailable(format!("no answer within {PATIENCE:?}"))
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        match self {
            Self::NotFound => StatusCode::NOT_FOUND.into_response(),
            Self::Unavailable(why) => {
                eprintln!("postgres_events: {why}");
                StatusCode::SERVICE_UNAVAILABLE.into_response()
            }
        }
    }
}

async fn list(State(db): State<Database>, Tenant(tenant): Tenant) -> Result<Json<Vec<Agent>>, Failure> {
    let sql = "SELECT id, name, version FROM agents WHERE tenant = $1 ORDER BY id LIMIT 100";
    let rows = timeout(PATIENCE, async { db.client().await?.query(sql, &[&tenant]).await }).await??;
    Ok(Json(rows.into_iter().map(Agent::from).collect()))
}

async fn read(
    State(db): State<Database>,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
) -> Result<Json<Agent>, Failure> {
    let sql = "SELECT id, name, version FROM agents WHERE tenant = $1 AND id = $2";
    let row = timeout(PATIENCE, async { db.client().await?.query_opt(sql, &[&tenant, &id]).await }).await??;
    row.map(|row| Json(row.into())).ok_or(Failure::NotFound)
}

async fn write(
    State(db): State<Database>,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
    Json(NewName { name }): Json<NewName>,
) -> Result<Json<Agent>, Failure> {
    let sql = "INSERT INTO agents (tenant, id, name) VALUES ($1, $2, $3) ON CONFLICT (tenant, id)
               DO UPDATE SET name = excluded.name, version = agents.version + 1 RETURNING id, name, version";
    let row = db.client().await?.query_one(sql, &[&tenant, &id, &name]).await?;
    Ok(Json(row.into()))
}

fn app(cache: &Cache, db: Database) -> Router {
    Router::new()
        .route("/agents", get(list))
        .route("/agents/{id}", get(read).put(write))
        .with_state(db)
        .layer(cache.layer())
        .layer(cache.invalidate_layer())
}

async fn run(args: Args) -> Result<(), String> {
    let database = |e: tokio_postgres::Error| format!("--database: {}", with_cause(&e));
    let db = Database::new(&args.database).map_err(database)?;
    db.client().await.map_err(database)?.batch_execute(&migration()).await.map_err(database)?;
    let cache = cache(&args).map_err(|e| e.to_string())?;
    follow(&cache, &args).map_err(|e| e.to_string())?;
    let unusable = |e| format!("--listen: cannot listen on {}: {e}", args.listen);
    let listener = TcpListener::bind(args.listen).await.map_err(unusable)?;
    println!("listening on http://{}", listener.local_addr().map_err(unusable)?);
    axum::serve(listener, app(&cache, db)).await.map_err(|e| e.to_string())
}

fn with_cause(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), |cause| format!("{error}: {cause}"))
}

/// `None`: only the usage was asked for.
fn parse() -> Result<Option<Args>, String> {
    let mut parser = lexopt::Parser::from_env();
    let (mut database, mut listen, mut slot) =
        (None, SocketAddr::from(([127, 0, 0, 1], 8080)), "postgres_events".into());
    let (mut redis, mut max_lag) = (None, Duration::from_secs(5));
    while let Some(arg) = parser.next().map_err(|e| e.to_string())? {
        let name = match arg {
            Arg::Long("help") | Arg::Short('h') => return Ok(None),
            Arg::Long(name) => name.to_owned(),
            other => return Err(format!("{}; --help lists the flags", other.unexpected())),
        };
        let value = parser.value().and_then(|v| v.string()).map_err(|e| format!("--{name}: {e}"))?;
        let refused = |what: &str| format!("--{name}: {value:?} is not accepted; give {what}");
        match name.as_str() {
            "database" => database = Some(value),
            "listen" => listen = value.parse().map_err(|_| refused("IP:PORT"))?,
            "slot" => slot = value,
            "redis" => redis = Some(value),
            "max-lag-ms" => max_lag = Duration::from_millis(value.parse().map_err(|_| refused("milliseconds"))?),
            other => return Err(format!("unknown flag --{other}; --help lists the flags")),
        }
    }
    let database = database.ok_or("--database is missing; give a URL such as postgres://user@localhost/app")?;
    Ok(Some(Args { database, listen, slot, redis, max_lag }))
}

#[tokio::main]
async fn main() -> ExitCode {
    let result = match parse() {
        Ok(None) => {
            print!("{USAGE}");
            Ok(())
        }
        Ok(Some(args)) => run(args).await,
        Err(reason) => Err(reason),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("postgres_events: {}", reason.replace(['\n', '\r'], " "));
            ExitCode::from(2)
        }
    }
}
