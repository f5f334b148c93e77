//! PostgreSQL as a source of events, through the trait: what is given, what is a gap, and what is never lost.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/proxy.rs"]
mod proxy;
#[path = "support/postgres.rs"]
mod server;
#[path = "support/web.rs"]
mod web;

use std::{
    collections::BTreeSet,
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use http::Method;
use proxy::{Mode, Proxy};
use server::Postgres;
use tokio::time::{Instant, sleep, timeout};
use tower_cache_aside::{
    Batch, Cache, DataType, Event, EventPolicy, EventSource, Notes, Received, Route, SourceFuture, Ttl,
    postgres::{PostgresSource, Table, install_sql, uninstall_sql},
    store::MemoryStore,
};
use web::{Web, ok, with};

const SLOT: &str = "fleet";

/// A test that waits for so long has failed.
const TOO_LONG: Duration = Duration::from_secs(30);

/// Where a fleet keeps what its sources remember.
async fn notes() -> Notes {
    struct Remembers(Arc<Mutex<Option<Notes>>>);
    impl EventSource for Remembers {
        fn name(&self) -> &str {
            "remembers"
        }
        fn start(&mut self, notes: Notes) {
            *self.0.lock().unwrap() = Some(notes);
        }
        fn next(&mut self) -> SourceFuture<'_, Received> {
            Box::pin(std::future::pending())
        }
        fn ack(&mut self) -> SourceFuture<'_, ()> {
            Box::pin(std::future::ready(Ok(())))
        }
    }
    let cache =
        Cache::builder("test").store(MemoryStore::new(1 << 20)).data_type(DataType::new("agent", Ttl::Standard));
    let cache = cache.event(EventPolicy::on("agents").all("agent")).build().unwrap();
    let notes = Arc::new(Mutex::default());
    let following = cache.follow(Remembers(notes.clone())).unwrap();
    while notes.lock().unwrap().is_none() {
        sleep(Duration::from_millis(1)).await;
    }
    following.stop().await;
    let notes = notes.lock().unwrap().take();
    notes.unwrap()
}

/// One process of a fleet.
struct Process {
    source: PostgresSource,
    /// What went wrong, and was tried again.
    errors: Vec<String>,
}

impl Process {
    fn new(url: &str, notes: Option<&Notes>) -> Self {
        let mut source = PostgresSource::builder(url).slot(SLOT).timeout(Duration::from_secs(2)).build().unwrap();
        if let Some(notes) = notes {
            source.start(notes.clone());
        }
        Self { source, errors: vec![] }
    }

    /// That has acknowledged the gap with which everything begins.
    async fn begun(url: &str, notes: Option<&Notes>) -> Self {
        let mut this = Self::new(url, notes);
        this.gap().await;
        this
    }

    async fn next(&mut self) -> Received {
        let waited = timeout(TOO_LONG, async {
            loop {
                match self.source.next().await {
                    Ok(received) => return received,
                    Err(error) => {
                        self.errors.push(error.to_string());
                        sleep(Duration::from_millis(50)).await;
                    }
                }
            }
        });
        waited.await.unwrap_or_else(|_| panic!("nothing comes; {:?}", self.errors))
    }

    /// The next that is no proof, before it is acknowledged.
    async fn given(&mut self) -> Received {
        let waited = timeout(TOO_LONG, async {
            loop {
                match self.next().await {
                    Received::Proof(_) => {}
                    given => return given,
                }
            }
        });
        waited.await.unwrap_or_else(|_| panic!("nothing but proofs comes; {:?}", self.errors))
    }

    async fn batch(&mut self) -> Batch {
        match self.given().await {
            Received::Events(batch) => batch,
            other => panic!("{other:?}; {:?}", self.errors),
        }
    }

    async fn ack(&mut self) {
        self.source.ack().await.unwrap();
    }

    /// The events that come next, as soon as they can be seen; and they are done with.
    async fn events(&mut self) -> Vec<Event> {
        let batch = self.batch().await;
        if batch.is_early() {
            timeout(TOO_LONG, self.source.visible()).await.unwrap().unwrap();
        }
        assert!(batch.reasons().is_empty(), "{batch:?}");
        self.ack().await;
        batch.events().to_vec()
    }

    /// The events up to this one, which may be again what was acknowledged and not told to the server yet.
    async fn up_to(&mut self, last: &Event) -> Vec<Event> {
        let mut events = vec![];
        while events.last() != Some(last) {
            events.extend(self.events().await);
        }
        events
    }

    /// As many events as are awaited.
    async fn so_many(&mut self, count: usize) -> Vec<Event> {
        let mut events = vec![];
        while events.len() < count {
            events.extend(self.events().await);
        }
        events
    }

    async fn gap(&mut self) -> String {
        match self.given().await {
            Received::Gap(why) => {
                self.ack().await;
                why
            }
            other => panic!("{other:?}; {:?}", self.errors),
        }
    }

    /// Nothing but proofs comes until there is one of this time.
    async fn quiet(&mut self) {
        let start = Instant::now();
        loop {
            match self.next().await {
                Received::Proof(at) if at >= start => return,
                Received::Proof(_) => {}
                other => panic!("{other:?}; {:?}", self.errors),
            }
        }
    }
}

fn agents(tenant: &str, op: &str, ids: &[&str]) -> Event {
    ids.iter().fold(Event::new("agents").tenant(tenant).field("op", op), |event, id| event.field("id", id))
}

/// A server with a table whose changes are events.
fn agents_server(settings: &[&str]) -> Postgres {
    let server = Postgres::start(settings);
    server.sql("CREATE TABLE agents (id text PRIMARY KEY, tenant text NOT NULL, name text)");
    server.sql(&install_sql(["agents"]));
    server
}

fn insert(server: &Postgres, ids: &[&str]) {
    let rows: Vec<_> = ids.iter().map(|id| format!("('{id}', 'acme')")).collect();
    server.sql(&format!("INSERT INTO agents VALUES {}", rows.join(", ")));
}

fn sorted(events: Vec<Event>) -> Vec<String> {
    let mut sorted: Vec<_> = events.iter().map(|event| format!("{event:?}")).collect();
    sorted.sort();
    sorted
}

/// Whoever writes, and by which statement.
#[tokio::test]
async fn each_change_is_an_event_of_its_tenant() {
    let server = agents_server(&[]);
    server.sql(
        "CREATE TABLE notes (id int PRIMARY KEY, agent text REFERENCES agents ON DELETE CASCADE ON UPDATE CASCADE);
         CREATE ROLE writer LOGIN; GRANT SELECT, INSERT, UPDATE, DELETE ON agents, notes TO writer",
    );
    server.sql(&install_sql([Table::new("notes").column("id").column("agent")]));
    let mut process = Process::begun(&server.url(), None).await;
    let note = |op: &str, id: &str, agent: &[&str]| {
        let event = Event::new("notes").field("op", op);
        agent.iter().fold(event, |event, agent| event.field("id", id).field("agent", agent))
    };
    let steps = [
        ("INSERT INTO agents VALUES ('a', 'acme'), ('b', 'acme')", vec![agents("acme", "insert", &["a", "b"])]),
        // One message for each tenant.
        (
            "INSERT INTO agents SELECT * FROM (VALUES ('c', 'acme'), ('d', 'zeta'), ('e', 'acme')) AS rows",
            vec![agents("acme", "insert", &["c", "e"]), agents("zeta", "insert", &["d"])],
        ),
        ("UPDATE agents SET name = 'Ada' WHERE id = 'a'", vec![agents("acme", "update", &["a"])]),
        ("UPDATE agents SET name = 'nobody' WHERE id = 'nobody'", vec![]),
        ("DELETE FROM agents WHERE id = 'e'", vec![agents("acme", "delete", &["e"])]),
        (
            "COPY agents FROM PROGRAM 'printf ''x\\tacme\\tX\\ny\\tacme\\tY\\n'''",
            vec![agents("acme", "insert", &["x", "y"])],
        ),
        (
            "INSERT INTO agents VALUES ('x', 'acme'), ('z', 'acme') ON CONFLICT (id) DO UPDATE SET name = 'both'",
            vec![agents("acme", "insert", &["z"]), agents("acme", "update", &["x"])],
        ),
        (
            "MERGE INTO agents USING (VALUES ('x'), ('m')) AS new (id) ON agents.id = new.id
             WHEN MATCHED THEN DELETE WHEN NOT MATCHED THEN INSERT VALUES (new.id, 'acme')",
            vec![agents("acme", "insert", &["m"]), agents("acme", "delete", &["x"])],
        ),
        // A changed key or tenant is two of them.
        ("UPDATE agents SET id = 'q' WHERE id = 'y'", vec![agents("acme", "update", &["q", "y"])]),
        (
            "UPDATE agents SET tenant = 'beta' WHERE id = 'q'",
            vec![agents("acme", "update", &["q"]), agents("beta", "update", &["q"])],
        ),
        ("INSERT INTO notes VALUES (1, 'a')", vec![note("insert", "1", &["a"])]),
        // Foreign keys change other tables.
        (
            "UPDATE agents SET id = 'a2' WHERE id = 'a'",
            vec![agents("acme", "update", &["a", "a2"]), note("update", "1", &["a", "a2"])],
        ),
        ("DELETE FROM agents WHERE id = 'a2'", vec![agents("acme", "delete", &["a2"]), note("delete", "1", &["a2"])]),
        (
            "SET session_replication_role = replica; INSERT INTO agents VALUES ('r', 'acme')",
            vec![agents("acme", "insert", &["r"])],
        ),
    ];
    for (sql, expected) in steps {
        server.sql(sql);
        // What came of this, and nothing else, up to a row of another's.
        server
            .sql_as("writer", "INSERT INTO agents VALUES ('end', 'end'); DELETE FROM agents WHERE id = 'end'")
            .unwrap();
        let mut events = process.so_many(expected.len() + 2).await;
        assert_eq!(
            events.split_off(expected.len()),
            [agents("end", "insert", &["end"]), agents("end", "delete", &["end"])]
        );
        assert_eq!(sorted(events), sorted(expected), "{sql}");
    }
    assert!(process.errors.is_empty(), "{:?}", process.errors);
}

#[tokio::test]
async fn what_is_rolled_back_is_no_event() {
    let server = agents_server(&[]);
    let mut process = Process::begun(&server.url(), None).await;
    server.sql("BEGIN; INSERT INTO agents VALUES ('a', 'acme'); ROLLBACK");
    server.sql(
        "BEGIN; INSERT INTO agents VALUES ('b', 'acme'); SAVEPOINT s; INSERT INTO agents VALUES ('c', 'acme');
         ROLLBACK TO s; INSERT INTO agents VALUES ('d', 'acme'); COMMIT",
    );
    server.try_sql("INSERT INTO agents VALUES ('e', 'acme'), ('e', 'acme')").unwrap_err();
    insert(&server, &["f"]);
    let events = process.so_many(3).await;
    assert_eq!(events, ["b", "d", "f"].map(|id| agents("acme", "insert", &[id])));
}

/// Which rows are gone, and whose, nobody knows.
#[tokio::test]
async fn a_truncated_table_is_a_gap() {
    let server = agents_server(&[]);
    let mut process = Process::begun(&server.url(), None).await;
    server.sql("BEGIN; INSERT INTO agents VALUES ('a', 'acme'); TRUNCATE agents; INSERT INTO agents VALUES ('b', 'acme'); COMMIT");
    assert_eq!(process.events().await, [agents("acme", "insert", &["a"])]);
    // It is given again while it is not acknowledged, with what was before it.
    assert!(matches!(process.given().await, Received::Gap(why) if why == "agents was truncated"));
    assert_eq!(process.events().await, [agents("acme", "insert", &["a"])]);
    assert_eq!(process.gap().await, "agents was truncated");
    assert_eq!(process.events().await, [agents("acme", "insert", &["b"])]);
    process.quiet().await;
}

#[tokio::test]
async fn any_name_is_quoted() {
    let server = agents_server(&[]);
    let mut process = Process::begun(&server.url(), None).await;
    for (schema, name) in [
        ("public", r#"a"b'; drop table agents; --"#),
        ("public", "$cache$ a $cache_$"),
        ("public", r"back\slash'"),
        ("public", "new\nline"),
        ("public", "select"),
        ("public", "ünï.cödé"),
        ("public", &"long".repeat(15)),
        (r#"sche"ma.'"#, "agents"),
        ("sales", "agents"),
    ] {
        let quoted = |name: &str| format!("\"{}\"", name.replace('"', "\"\""));
        let (on, column) = (format!("{}.{}", quoted(schema), quoted(name)), r#"i"d'"#);
        server.sql(&format!(
            "CREATE SCHEMA IF NOT EXISTS {}; CREATE TABLE {on} ({} int, found text)",
            quoted(schema),
            quoted(column)
        ));
        let table = Table::new(name).schema(schema).column(column).column("found").tenant("found");
        // Also where a backslash does not mean itself.
        server.sql(&format!("SET standard_conforming_strings = off; {}", install_sql([table.clone()])));
        server.sql(&format!("INSERT INTO {on} VALUES (1, 'x'); TRUNCATE {on}"));
        let event = if schema == "public" { name.to_owned() } else { format!("{schema}.{name}") };
        let expected = Event::new(&event).tenant("x").field("op", "insert").field(column, 1).field("found", "x");
        assert_eq!(process.events().await, [expected]);
        assert_eq!(process.gap().await, format!("{event} was truncated"));
        server.sql(&uninstall_sql([table]));
    }
    insert(&server, &["a"]);
    assert_eq!(process.events().await, [agents("acme", "insert", &["a"])]);
}

/// Partitions and heirs, by way of the table that was named.
#[tokio::test]
async fn changes_by_way_of_a_partitioned_table_are_events() {
    let server = agents_server(&[]);
    server.sql(
        "CREATE TABLE parts (id int, tenant text) PARTITION BY RANGE (id);
         CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (10);
         CREATE TABLE parts_2 PARTITION OF parts FOR VALUES FROM (10) TO (20)",
    );
    server.sql(&install_sql(["parts"]));
    let mut process = Process::begun(&server.url(), None).await;
    server.sql("INSERT INTO parts VALUES (1, 'acme'), (11, 'acme')");
    server.sql("UPDATE parts SET id = 12 WHERE id = 1");
    server.sql("DELETE FROM parts WHERE id = 11");
    let part = |op: &str, ids: &[u32]| {
        ids.iter().fold(Event::new("parts").tenant("acme").field("op", op), |event, id| event.field("id", id))
    };
    let expected = [part("insert", &[1, 11]), part("update", &[1, 12]), part("delete", &[11])];
    assert_eq!(process.so_many(3).await, expected);
}

/// A thousand ids a message, some messages at a time.
#[tokio::test]
async fn a_transaction_of_a_hundred_thousand_rows_comes_in_parts() {
    let server = agents_server(&[]);
    let mut process = Process::begun(&server.url(), None).await;
    server
        .sql("INSERT INTO agents SELECT 'agent-with-a-longer-name-' || i, 'acme' FROM generate_series(1, 100000) AS i");
    insert(&server, &["last"]);
    let (mut ids, mut messages, mut batches) = (BTreeSet::new(), 0, 0);
    loop {
        let events = process.events().await;
        let named: usize = events.iter().map(|event| event.values("id").len()).sum();
        assert!(named <= 20_000, "{named} at once");
        (messages, batches) = (messages + events.len(), batches + 1);
        ids.extend(events.iter().flat_map(|event| event.values("id").to_vec()));
        if ids.contains("last") {
            break;
        }
    }
    assert_eq!((ids.len(), messages), (100_001, 101));
    assert!(batches > 5, "{batches}");
    // Nothing of it is acknowledged before its end: after that all of it is.
    drop(process);
    server.wait_for(&format!("SELECT active FROM pg_replication_slots WHERE slot_name = '{SLOT}'"), "f");
}

/// Half of a long transaction was acknowledged, and the rest was not: all of it comes again.
#[tokio::test]
async fn a_part_of_a_transaction_is_not_acknowledged() {
    let server = agents_server(&[]);
    let notes = notes().await;
    let mut process = Process::begun(&server.url(), Some(&notes)).await;
    server
        .sql("INSERT INTO agents SELECT 'agent-with-a-longer-name-' || i, 'acme' FROM generate_series(1, 50000) AS i");
    assert!(process.events().await.len() < 50);
    drop(process);
    let mut process = Process::new(&server.url(), Some(&notes));
    assert_eq!(process.so_many(50).await.len(), 50);
}

#[tokio::test]
async fn what_is_not_acknowledged_comes_again() {
    let mut server = agents_server(&[]);
    let notes = notes().await;
    let mut process = Process::begun(&server.url(), Some(&notes)).await;
    insert(&server, &["a"]);
    assert_eq!(process.batch().await.events(), [agents("acme", "insert", &["a"])]);
    // To whoever asks again,
    assert_eq!(process.batch().await.events(), [agents("acme", "insert", &["a"])]);
    drop(process);
    // to the next process,
    let mut process = Process::new(&server.url(), Some(&notes));
    assert_eq!(process.batch().await.events(), [agents("acme", "insert", &["a"])]);
    // and after a crash of the server.
    server.restart();
    insert(&server, &["b"]);
    assert_eq!(process.so_many(2).await, ["a", "b"].map(|id| agents("acme", "insert", &[id])));
    process.quiet().await;
}

#[tokio::test]
async fn nothing_is_lost_while_nobody_reads() {
    let mut server = agents_server(&[]);
    let notes = notes().await;
    drop(Process::begun(&server.url(), Some(&notes)).await);
    insert(&server, &["a"]);
    assert!(server.stops());
    server.restart();
    insert(&server, &["b"]);
    let mut process = Process::new(&server.url(), Some(&notes));
    assert_eq!(process.so_many(2).await, ["a", "b"].map(|id| agents("acme", "insert", &[id])));
    // One that remembers by itself knows it too.
    let mut process =
        Process { source: PostgresSource::builder(server.url()).slot("other").build().unwrap(), errors: vec![] };
    process.gap().await;
    server.sql("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE active");
    insert(&server, &["c"]);
    assert_eq!(process.so_many(1).await, [agents("acme", "insert", &["c"])]);
    assert!(!process.errors.is_empty());
}

/// What becomes of the slot behind the fleet's back.
#[tokio::test]
async fn a_slot_that_is_another_is_a_gap() {
    let server = agents_server(&[]);
    let notes = notes().await;
    let mut process = Process::begun(&server.url(), Some(&notes)).await;
    let drop_slot = || {
        server.wait_for("SELECT count(*) FROM pg_replication_slots WHERE active", "0");
        insert(&server, &[&format!("lost-{}", server.sql("SELECT count(*) FROM agents"))]);
        server.sql(&format!("SELECT pg_drop_replication_slot('{SLOT}')"));
    };
    for recreated in [false, true] {
        drop(process);
        drop_slot();
        if recreated {
            server.sql(&format!("SELECT pg_create_logical_replication_slot('{SLOT}', 'pgoutput')"));
        }
        process = Process::new(&server.url(), Some(&notes));
        assert!(process.gap().await.contains("the slot begins after what was read"));
        // Not twice.
        drop(process);
        process = Process::new(&server.url(), Some(&notes));
        process.quiet().await;
    }
    // A gap that is not acknowledged is given again.
    drop(process);
    drop_slot();
    for _ in 0..2 {
        process = Process::new(&server.url(), Some(&notes));
        assert!(matches!(process.given().await, Received::Gap(_)));
        drop(process);
    }
    let mut process = Process::new(&server.url(), Some(&notes));
    process.gap().await;
    insert(&server, &["a"]);
    assert_eq!(process.events().await, [agents("acme", "insert", &["a"])]);
    // Somebody moves it.
    drop(process);
    server.wait_for("SELECT count(*) FROM pg_replication_slots WHERE active", "0");
    insert(&server, &["skipped"]);
    server.sql(&format!("SELECT pg_replication_slot_advance('{SLOT}', pg_current_wal_lsn())"));
    Process::new(&server.url(), Some(&notes)).gap().await;
}

#[tokio::test]
async fn a_slot_whose_log_is_gone_is_made_anew() {
    let server = agents_server(&["max_slot_wal_keep_size=1MB", "min_wal_size=32MB", "max_wal_size=32MB"]);
    let notes = notes().await;
    drop(Process::begun(&server.url(), Some(&notes)).await);
    for _ in 0..4 {
        server.sql("CREATE TABLE filler AS SELECT repeat('x', 500) FROM generate_series(1, 40000); DROP TABLE filler; CHECKPOINT");
    }
    server.wait_for("SELECT wal_status FROM pg_replication_slots", "lost");
    let mut process = Process::new(&server.url(), Some(&notes));
    assert!(process.gap().await.contains("the slot begins after what was read"));
    insert(&server, &["a"]);
    assert_eq!(process.events().await, [agents("acme", "insert", &["a"])]);
}

#[tokio::test]
async fn another_server_or_timeline_is_a_gap() {
    let mut server = agents_server(&[]);
    let notes = notes().await;
    let mut process = Process::begun(&server.url(), Some(&notes)).await;
    // As after a failover or a restored backup: with the slot, as later versions have it.
    assert!(server.stops());
    server.write("recovery.signal", "");
    server.write("postgresql.auto.conf", "restore_command = 'false'");
    server.restart();
    server.wait_for("SELECT pg_is_in_recovery()", "f");
    assert!(process.gap().await.contains("timeline"));
    drop(process);
    let (url, port) = (server.url(), server.port);
    drop(server);
    let server = Postgres::start_on(port, &[]).unwrap();
    let mut process = Process::new(&url, Some(&notes));
    assert!(process.gap().await.contains("another server"));
    drop(server);
}

/// Its log has changes from a time without the publication, which nobody can read past.
#[tokio::test]
async fn a_publication_that_was_dropped_is_made_anew() {
    let server = agents_server(&[]);
    server.sql("CREATE TABLE others (id int)");
    let mut process = Process::begun(&server.url(), None).await;
    server.sql(
        "DROP PUBLICATION tower_cache_aside; INSERT INTO others VALUES (1); INSERT INTO agents VALUES ('a', 'acme')",
    );
    let given = loop {
        match process.given().await {
            // What came before it cannot be read further.
            Received::Events(_) => process.ack().await,
            given => break given,
        }
    };
    assert!(matches!(given, Received::Gap(_)), "{given:?}");
    process.ack().await;
    insert(&server, &["b"]);
    assert_eq!(process.events().await, [agents("acme", "insert", &["b"])]);
}

/// The other side neither answers nor ends.
#[tokio::test]
async fn a_network_that_swallows_everything_is_noticed() {
    let server = agents_server(&[]);
    let proxy = Proxy::start(server.port).await;
    let url = format!("postgres://postgres@{}/postgres", proxy.address);
    let mut process = Process::begun(&url, None).await;
    process.quiet().await;
    proxy.set(Mode::Swallow);
    insert(&server, &["a"]);
    // While it reads, and while it connects.
    for reads in [true, false] {
        let error = timeout(TOO_LONG, async {
            loop {
                match process.source.next().await {
                    Ok(Received::Proof(_)) => {}
                    other => break other.unwrap_err().to_string(),
                }
            }
        });
        let error = error.await.unwrap();
        // Of one that reads the server waits for as long, and may be the first to give it up.
        assert!(reads || error.contains("for 2s"), "{error}");
    }
    proxy.set(Mode::Pass);
    assert_eq!(process.events().await, [agents("acme", "insert", &["a"])]);
    // While it looks what can be seen.
    let locked = EarlyCommit::begin(&server).await;
    assert!(process.batch().await.is_early());
    proxy.set(Mode::Swallow);
    assert!(timeout(TOO_LONG, process.source.visible()).await.unwrap().is_err());
    proxy.set(Mode::Pass);
    assert!(timeout(Duration::from_secs(3), async { while process.source.visible().await.is_err() {} }).await.is_err());
    locked.end(&server).await;
    while timeout(TOO_LONG, process.source.visible()).await.unwrap().is_err() {}
    process.up_to(&agents("acme", "insert", &["early"])).await;
}

/// Only the connection that reads the log is dead; and the slot is held by what is left of it.
#[tokio::test]
async fn a_stream_that_is_silent_is_noticed() {
    let server = agents_server(&[]);
    let mut process = Process::begun(&server.url(), None).await;
    process.quiet().await;
    let pid = server.sql("SELECT active_pid FROM pg_replication_slots");
    let signal = |signal: &str| assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    signal("-STOP");
    insert(&server, &["a"]);
    let error = timeout(TOO_LONG, async {
        loop {
            match process.source.next().await {
                Ok(Received::Proof(_)) => {}
                other => break other.unwrap_err().to_string(),
            }
        }
    });
    assert_eq!(error.await.unwrap(), "reading the log: nothing has come for 2s");
    // Somebody reads it, as far as the server knows: not even that there is nothing is proved.
    let proved = timeout(Duration::from_secs(1), process.source.next()).await;
    assert!(proved.is_err(), "{proved:?}");
    signal("-CONT");
    process.up_to(&agents("acme", "insert", &["a"])).await;
}

/// A commit that is in the log, and waits for a standby that is not there before anybody sees it.
struct EarlyCommit(tokio::task::JoinHandle<()>);

impl EarlyCommit {
    async fn begin(server: &Postgres) -> Self {
        server.sql("ALTER SYSTEM SET synchronous_standby_names = 'missing'");
        server.sql("SELECT pg_reload_conf()");
        server.wait_for("SHOW synchronous_standby_names", "missing");
        let (client, connection) = tokio_postgres::connect(&server.url(), tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        Self(tokio::spawn(async move {
            client.batch_execute("INSERT INTO agents VALUES ('early', 'acme')").await.unwrap();
        }))
    }

    async fn end(self, server: &Postgres) {
        server.sql("ALTER SYSTEM RESET synchronous_standby_names");
        server.sql("SELECT pg_reload_conf()");
        timeout(TOO_LONG, self.0).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn an_event_before_its_row_is_early() {
    let server = agents_server(&[]);
    let mut process = Process::begun(&server.url(), None).await;
    insert(&server, &["a"]);
    assert!(!process.batch().await.is_early(), "it was seen when it was written");
    process.ack().await;
    let commit = EarlyCommit::begin(&server).await;
    let batch = process.batch().await;
    assert!(batch.is_early());
    assert_eq!(batch.events(), [agents("acme", "insert", &["early"])]);
    // Dropped half-way, and called again.
    for _ in 0..3 {
        let visible = timeout(Duration::from_millis(300), process.source.visible()).await;
        assert!(visible.is_err(), "{visible:?}");
    }
    assert_eq!(server.sql("SELECT count(*) FROM agents WHERE id = 'early'"), "0");
    // After an error it is not taken for seen.
    server.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'tower-cache-aside' AND query LIKE '%snapshot%'");
    let visible = timeout(Duration::from_secs(2), process.source.visible()).await;
    assert!(!matches!(visible, Ok(Ok(()))), "{visible:?}");
    let visible = timeout(Duration::from_millis(500), process.source.visible()).await;
    assert!(visible.is_err(), "{visible:?}");
    commit.end(&server).await;
    timeout(TOO_LONG, process.source.visible()).await.unwrap().unwrap();
    assert_eq!(server.sql("SELECT count(*) FROM agents WHERE id = 'early'"), "1");
    // The connection was lost: it comes again.
    assert_eq!(process.events().await, [agents("acme", "insert", &["early"])]);
}

/// While it reads, and while it is busy with what it was given.
#[tokio::test]
async fn a_server_can_be_stopped() {
    let mut server = agents_server(&[]);
    let notes = notes().await;
    let mut process = Process::begun(&server.url(), Some(&notes)).await;
    insert(&server, &["a"]);
    assert_eq!(process.batch().await.events().len(), 1);
    let server = tokio::task::spawn_blocking(move || {
        assert!(server.stops(), "it waits for what is not acknowledged");
        server.restart();
        server
    });
    let mut server = server.await.unwrap();
    assert_eq!(process.events().await, [agents("acme", "insert", &["a"])]);
    let reads = tokio::spawn(async move {
        process.quiet().await;
        let events = process.up_to(&agents("acme", "insert", &["b"])).await;
        (process, events)
    });
    sleep(Duration::from_millis(500)).await;
    server.sql("CREATE TABLE others AS SELECT generate_series(1, 1000)");
    let server = tokio::task::spawn_blocking(move || {
        assert!(server.stops(), "it waits for what it has told");
        server.restart();
        insert(&server, &["b"]);
        server
    });
    let server = server.await.unwrap();
    let (process, events) = timeout(TOO_LONG, reads).await.unwrap().unwrap();
    assert!(events.len() <= 2, "{events:?}");
    assert!(!process.errors.is_empty());
    drop(server);
}

#[tokio::test]
async fn one_of_several_processes_reads_and_the_others_know_how_far() {
    let server = agents_server(&[]);
    let notes = notes().await;
    let mut first = Process::begun(&server.url(), Some(&notes)).await;
    first.quiet().await;
    let mut second = Process::new(&server.url(), Some(&notes));
    // As long as somebody reads.
    {
        let (reads, proved) = (first.quiet(), second.quiet());
        tokio::join!(reads, proved);
    }
    insert(&server, &["a"]);
    let committed = Instant::now();
    assert_eq!(first.batch().await.events().len(), 1);
    // Not before it is acknowledged.
    let proofs = timeout(Duration::from_secs(2), async {
        loop {
            match second.next().await {
                Received::Proof(at) if at < committed => {}
                other => break other,
            }
        }
    });
    let proved = proofs.await;
    assert!(proved.is_err(), "{proved:?}");
    first.ack().await;
    second.quiet().await;
    insert(&server, &["b"]);
    assert_eq!(first.batch().await.events().len(), 1);
    drop(first);
    second.up_to(&agents("acme", "insert", &["b"])).await;
    second.quiet().await;
}

/// A slot that another process has made anew is ahead of what was dropped.
#[tokio::test]
async fn a_standby_proves_nothing_while_a_gap_is_not_acknowledged() {
    let server = agents_server(&[]);
    let notes = notes().await;
    drop(Process::begun(&server.url(), Some(&notes)).await);
    server.wait_for("SELECT count(*) FROM pg_replication_slots WHERE active", "0");
    server.sql(&format!("SELECT pg_drop_replication_slot('{SLOT}')"));
    let mut first = Process::new(&server.url(), Some(&notes));
    assert!(matches!(first.given().await, Received::Gap(_)));
    let mut second = Process::new(&server.url(), Some(&notes));
    let proved = timeout(Duration::from_secs(2), second.next()).await;
    assert!(proved.is_err(), "{proved:?}");
    first.ack().await;
    tokio::join!(first.quiet(), second.quiet());
}

#[tokio::test]
async fn a_call_that_is_dropped_has_lost_nothing() {
    let server = agents_server(&[]);
    let mut process = Process::new(&server.url(), None);
    let writer = {
        let url = server.url();
        async move {
            let (client, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await.unwrap();
            tokio::spawn(connection);
            for id in 0..500 {
                client.batch_execute(&format!("INSERT INTO agents VALUES ({id}, 'acme')")).await.unwrap();
            }
        }
    };
    let (mut writer, mut ids, mut proofs) = (Some(writer), vec![], 0);
    while ids.len() < 500 || proofs == 0 {
        match timeout(Duration::from_millis(1), process.source.next()).await {
            Err(_) => continue,
            Ok(Ok(Received::Events(batch))) => {
                ids.extend(batch.events().iter().flat_map(|event| event.values("id").to_vec()));
                while batch.is_early() && timeout(Duration::from_millis(1), process.source.visible()).await.is_err() {}
                process.ack().await;
            }
            Ok(Ok(Received::Gap(_))) => {
                process.ack().await;
                tokio::spawn(writer.take().expect("one gap"));
            }
            Ok(Ok(_)) => proofs += 1,
            Ok(Err(error)) => panic!("{error}"),
        }
    }
    assert_eq!(ids, (0..500).map(|id| id.to_string()).collect::<Vec<_>>());
}

/// Anybody may write one.
#[tokio::test]
async fn a_message_that_is_no_event_is_counted_and_skipped() {
    let server = agents_server(&[]);
    let mut process = Process::begun(&server.url(), None).await;
    let emit = |transactional: bool, prefix: &str, content: &str| {
        server.sql(&format!("SELECT pg_logical_emit_message({transactional}, '{prefix}', '{content}')"));
    };
    for content in ["", "{}", "[]", r#"{"name": 1}"#, r#"{"name": "agents", "fields": {"id": {}}}"#, "\u{fe}"] {
        emit(true, "tower-cache-aside", content);
    }
    emit(false, "tower-cache-aside", r#"{"name": "agents"}"#);
    emit(true, "tower-cache-aside-not", "of another");
    emit(true, "other", "of another");
    server.sql(r"SELECT pg_logical_emit_message(true, 'tower-cache-aside', '\xff00'::bytea)");
    insert(&server, &["a"]);
    let (mut reasons, mut events) = (vec![], vec![]);
    while events.is_empty() {
        let batch = process.batch().await;
        reasons.extend(batch.reasons().to_vec());
        events.extend(batch.events().to_vec());
        process.ack().await;
    }
    assert_eq!((reasons.len(), events), (8, vec![agents("acme", "insert", &["a"])]));
    assert_eq!(reasons.iter().collect::<BTreeSet<_>>().len(), 2, "{reasons:?}");
}

/// None is of a later time than what was committed and not given yet.
#[tokio::test]
async fn proofs_come_in_order_with_events() {
    let server = agents_server(&[]);
    let mut process = Process::begun(&server.url(), None).await;
    let (client, connection) = tokio_postgres::connect(&server.url(), tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    let committed = Arc::new(Mutex::new(vec![]));
    let writes = {
        let committed = committed.clone();
        tokio::spawn(async move {
            for id in 0..3_000 {
                client.batch_execute(&format!("INSERT INTO agents VALUES ({id}, 'acme')")).await.unwrap();
                committed.lock().unwrap().push(Instant::now());
            }
        })
    };
    let (mut given, mut proofs) = (0, vec![]);
    while given < 3_000 {
        match process.next().await {
            Received::Events(batch) => {
                given += batch.events().len();
                if batch.is_early() {
                    process.source.visible().await.unwrap();
                }
                // So more has come when it is asked again.
                sleep(Duration::from_millis(10)).await;
                process.ack().await;
            }
            Received::Proof(at) => {
                let before = committed.lock().unwrap().iter().filter(|committed| **committed <= at).count();
                assert!(before <= given, "{before} were committed before, and {given} given");
                proofs.push(at);
            }
            other => panic!("{other:?}"),
        }
    }
    writes.await.unwrap();
    process.quiet().await;
    // Also while there is always more.
    let first = committed.lock().unwrap()[0];
    assert!(proofs.iter().any(|at| *at > first) && proofs.is_sorted(), "{proofs:?}");
}

/// What is flushed in the background ends in the middle of a record.
#[tokio::test]
async fn an_open_transaction_holds_up_no_proof() {
    let server = agents_server(&[]);
    let mut process = Process::begun(&server.url(), None).await;
    let (client, connection) = tokio_postgres::connect(&server.url(), tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    server.sql("ALTER TABLE agents ALTER name SET STORAGE EXTERNAL");
    server.sql(MESSAGES.0);
    client.batch_execute("BEGIN").await.unwrap();
    for id in 0..5 {
        let name = "n".repeat(20_000 + id);
        client.batch_execute(&format!("INSERT INTO agents VALUES ({id}, 'acme', '{name}')")).await.unwrap();
        // What is flushed is up to the end of a page by then.
        sleep(Duration::from_millis(300)).await;
        process.quiet().await;
    }
    client.batch_execute("COMMIT").await.unwrap();
    assert_eq!(process.so_many(5).await.len(), 5);
    // So that the log ended with a whole one, beside five that are events.
    assert!(server.sql(MESSAGES.1).parse::<usize>().unwrap() > 5);
}

/// Makes a slot, and counts the messages in the log since then.
const MESSAGES: (&str, &str) = (
    "SELECT pg_create_logical_replication_slot('messages', 'pgoutput')",
    "SELECT count(*) FROM pg_logical_slot_peek_binary_changes('messages', NULL, NULL,
     'proto_version', '1', 'publication_names', 'tower_cache_aside', 'messages', 'true') WHERE get_byte(data, 0) = 77",
);

/// The slot does not keep what other tables write; and nothing is written to know that it was read.
#[tokio::test]
async fn what_is_no_event_is_acknowledged_too() {
    const TIMES: usize = 10;
    let server = agents_server(&[]);
    let mut process = Process::begun(&server.url(), None).await;
    server.sql("CREATE TABLE others (name text)");
    server.sql(MESSAGES.0);
    for _ in 0..TIMES {
        server.sql("INSERT INTO others SELECT repeat('x', 500) FROM generate_series(1, 1000)");
        let end = server.sql("SELECT pg_current_wal_flush_lsn()");
        process.quiet().await;
        let confirmed =
            format!("SELECT confirmed_flush_lsn >= '{end}' FROM pg_replication_slots WHERE slot_name = '{SLOT}'");
        while server.sql(&confirmed) != "t" {
            process.quiet().await;
        }
    }
    let messages: usize = server.sql(MESSAGES.1).parse().unwrap();
    assert!(messages < TIMES, "{messages}");
}

#[tokio::test]
async fn a_user_needs_only_to_log_in_and_to_replicate() {
    let server = agents_server(&[]);
    server.sql("SET password_encryption = 'scram-sha-256'; CREATE ROLE cache LOGIN REPLICATION PASSWORD 's3cret ''@'");
    server
        .write("pg_hba.conf", "host postgres cache 127.0.0.1/32 scram-sha-256\nhost all postgres 127.0.0.1/32 trust\n");
    server.sql("SELECT pg_reload_conf()");
    let url = |password: &str| format!("postgres://cache:{password}@127.0.0.1:{}/postgres", server.port);
    let mut process = Process::begun(&url("s3cret%20%27%40"), None).await;
    insert(&server, &["a"]);
    assert_eq!(process.events().await, [agents("acme", "insert", &["a"])]);
    process.quiet().await;
    assert!(process.errors.is_empty(), "{:?}", process.errors);
    let error = Process::new(&url("wrong"), None).source.next().await.unwrap_err().to_string();
    assert!(error.contains("password authentication failed") && !error.contains("wrong"), "{error}");
    // Who may not make the publication is told who does.
    server.sql(&uninstall_sql(["agents"]));
    let error = Process::new(&url("s3cret%20%27%40"), None).source.next().await.unwrap_err().to_string();
    assert!(error.contains("install_sql"), "{error}");
}

#[tokio::test]
async fn it_can_be_installed_again_and_leaves_nothing() {
    let server = Postgres::start(&[]);
    let objects = "SELECT count(*) FROM (
        SELECT oid FROM pg_proc UNION ALL SELECT oid FROM pg_trigger UNION ALL SELECT oid FROM pg_namespace
        UNION ALL SELECT oid FROM pg_publication UNION ALL SELECT oid FROM pg_class) AS all_of_them";
    server.sql("CREATE TABLE agents (id int, tenant text); CREATE TABLE prices (sku int)");
    let before = server.sql(objects);
    let prices = || Table::new("prices").column("sku");
    for _ in 0..2 {
        server.sql(&install_sql([Table::from("agents"), prices()]));
        let triggers = "SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'tower_cache_aside_%' AND tgenabled = 'A'";
        assert_eq!(server.sql(triggers), "8");
    }
    // It is all or nothing.
    let error = server.try_sql(&install_sql(["agents", "missing"])).unwrap_err();
    assert!(error.contains("missing"), "{error}");
    let error = server.try_sql(&install_sql([Table::new("agents").column("typo")])).unwrap_err();
    assert!(error.contains("typo"), "{error}");
    server.sql(&format!("BEGIN; {} ROLLBACK", uninstall_sql(["agents"])));
    server.sql(&uninstall_sql(["agents"]));
    server.sql("INSERT INTO agents VALUES (1, 'a'); INSERT INTO prices VALUES (1)");
    for _ in 0..2 {
        server.sql(&uninstall_sql([prices()]));
    }
    assert_eq!(server.sql(objects), before);
    server.sql("DROP TABLE prices");
    server.sql(&uninstall_sql([prices()]));
}

/// The whole way: whoever changes rows, what is cached of them falls.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_another_program_changes_are_read_anew() {
    let server = agents_server(&[]);
    server.sql("INSERT INTO agents SELECT i, 'acme', '0' FROM generate_series(1, 5) AS i");
    let (rows, connection) = tokio_postgres::connect(&server.url(), tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    let rows = Arc::new(rows);
    let read = move |path: String| {
        let (rows, id) = (rows.clone(), path.rsplit('/').next().unwrap().to_owned());
        async move { rows.query_one("SELECT name FROM agents WHERE id = $1", &[&id]).await.unwrap().get::<_, String>(0) }
    };
    let cache = Cache::builder("test")
        .tenant_header("x-tenant-id")
        .data_type(DataType::new("agent", Ttl::Standard))
        .route(Route::new("/agents/{agent_id}", "agent"))
        .event(EventPolicy::on("agents").mutated("agent", "id"))
        .build()
        .unwrap();
    let web = Web::new(&cache, {
        let read = read.clone();
        move |request| {
            let name = read(request.uri().path().to_owned());
            async move { Ok(ok(name.await)) }
        }
    });
    cache.follow(PostgresSource::builder(server.url()).slot(SLOT).build().unwrap()).unwrap();
    server.wait_for("SELECT count(*) FROM pg_replication_slots WHERE active", "1");
    let (writer, connection) = tokio_postgres::connect(&server.url(), tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    let over = Arc::new(AtomicBool::new(false));
    let is_over = over.clone();
    let writes = tokio::spawn(async move {
        for version in 0.. {
            let update = format!("UPDATE agents SET name = '{version}' WHERE id = '{}'", version % 5 + 1);
            writer.batch_execute(&update).await.unwrap();
            if is_over.load(SeqCst) && version > 1_000 {
                return;
            }
            // So that something is read twice in between, also where writes are the faster ones.
            sleep(Duration::from_millis(1)).await;
        }
    });
    let get = async |id: u32| web.send(with(Method::GET, &format!("/agents/{id}"), &[("x-tenant-id", "acme")])).await;
    let (start, mut hits) = (Instant::now(), 0);
    while !writes.is_finished() {
        assert!(start.elapsed() < 4 * TOO_LONG, "{hits} hits");
        for id in 1..=5 {
            hits += usize::from(get(id).await.is_hit());
        }
        over.store(hits > 100, SeqCst);
    }
    writes.await.unwrap();
    for id in 1..=5 {
        let now = read(format!("/agents/{id}")).await;
        let same = async { while get(id).await.body != now.as_bytes() {} };
        timeout(TOO_LONG, same).await.unwrap_or_else(|_| panic!("agent {id} is stale"));
    }
}
