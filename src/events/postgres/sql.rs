//! The SQL of the triggers that tell of changes.

use std::fmt::Write as _;

use sha2::{Digest, Sha256};

/// What our messages in the log begin with.
pub(crate) const PREFIX: &str = "tower-cache-aside";

/// The publication that `pgoutput` asks for. It is empty: rows are not read, messages are.
pub(super) const PUBLICATION: &str = "tower_cache_aside";

/// Where the functions are, and what the triggers' names begin with.
const SCHEMA: &str = "tower_cache_aside";

/// Rows that one message names.
const ROWS: usize = 1_000;

/// The longest name, in bytes, that PostgreSQL does not cut.
const LONGEST: usize = 63;

/// The values of the field `op`.
const INSERT: &str = "insert";
const UPDATE: &str = "update";
const DELETE: &str = "delete";
pub(crate) const TRUNCATE: &str = "truncate";

/// A table whose changes are events, and which of its columns they name.
///
/// ```
/// # use tower_cache_aside::postgres::Table;
/// let table = Table::new("prices").schema("sales").column("product_id").tenant("customer");
/// ```
///
/// A bare name stands for a table of the schema `public` with the columns `id` and `tenant`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub struct Table {
    schema: String,
    name: String,
    columns: Vec<String>,
    tenant: Option<String>,
}

impl Table {
    /// A table of the schema `public`, by its exact name: it is quoted, so case and dots are part of it.
    pub fn new(name: impl Into<String>) -> Self {
        Self { schema: "public".to_owned(), name: name.into(), columns: vec![], tenant: None }
    }

    /// Its schema; the events are called `schema.table` then.
    pub fn schema(mut self, schema: impl Into<String>) -> Self {
        self.schema = schema.into();
        self
    }

    /// A column that becomes a field of the events, with one value for each row, as text: an id, or a part of one. One that is called
    /// `op` cannot be one: that field says what was done.
    pub fn column(mut self, column: impl Into<String>) -> Self {
        let column = column.into();
        if column != "op" && !self.columns.contains(&column) {
            self.columns.push(column);
        }
        self
    }

    /// The column that says whose a row is; by default rows are nobody's. Each event is of one tenant.
    pub fn tenant(mut self, column: impl Into<String>) -> Self {
        self.tenant = Some(column.into());
        self
    }

    /// What its events are called.
    fn event(&self) -> String {
        if self.schema == "public" { self.name.clone() } else { format!("{}.{}", self.schema, self.name) }
    }

    fn quoted(&self) -> String {
        format!("{}.{}", identifier(&self.schema), identifier(&self.name))
    }

    /// The function that tells of an operation. Plain names are kept, so that it can be recognised; others are told apart by a hash.
    fn function(&self, op: &str) -> String {
        let event = self.event();
        let is_plain = |name: &str| name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
        let mut name = format!("{event}_{op}");
        if !is_plain(&self.schema) || !is_plain(&self.name) || name.len() > LONGEST {
            let digest = Sha256::digest(format!("{}\0{}", self.schema, self.name));
            let hash = digest.iter().take(8).fold(String::new(), |hash, byte| format!("{hash}{byte:02x}"));
            let start: String = event.chars().filter(char::is_ascii_alphanumeric).take(32).collect();
            name = format!("{start}_{hash}_{op}");
        }
        format!("{SCHEMA}.{}", identifier(&name))
    }
}

impl<N: Into<String>> From<N> for Table {
    fn from(name: N) -> Self {
        Self::new(name).column("id").tenant("tenant")
    }
}

/// SQL that makes changes of these tables events; to be run by their owner, with the right to create in the database, in a migration.
///
/// ```
/// # use tower_cache_aside::postgres::{Table, install_sql};
/// let sql = install_sql([Table::from("agents"), Table::new("prices").column("product_id")]);
/// ```
///
/// It is one statement, so all of it is done or nothing, within a transaction or without; and it can be run again, which it
/// must be, in the same migration, when a column that it names is renamed: until then the table cannot be written.
///
/// It creates a schema `tower_cache_aside` with a function for each table and kind of change, which triggers `tower_cache_aside_…`
/// call once for each statement, and an empty publication `tower_cache_aside`. Who writes needs no rights for these.
pub fn install_sql<T: Into<Table>>(tables: impl IntoIterator<Item = T>) -> String {
    let mut body = format!(
        "BEGIN\n\
         \x20 IF pg_catalog.to_regnamespace('{SCHEMA}') IS NULL THEN\n\
         \x20   CREATE SCHEMA {SCHEMA};\n\
         \x20 END IF;\n\
         \x20 IF NOT EXISTS (SELECT FROM pg_catalog.pg_publication WHERE pubname = '{PUBLICATION}') THEN\n\
         \x20   CREATE PUBLICATION {PUBLICATION};\n\
         \x20 END IF;\n"
    );
    for table in tables {
        install(&mut body, &table.into());
    }
    body += "END\n";
    format!("DO {};\n", dollar_quoted(&body))
}

/// SQL that takes away what [`install_sql`] made for these tables, and with the last of them what it made for all. The
/// replication slot stays: `SELECT pg_drop_replication_slot('…')`, once nobody reads it.
///
/// It is one statement, and can be run again, also when the tables are gone.
pub fn uninstall_sql<T: Into<Table>>(tables: impl IntoIterator<Item = T>) -> String {
    let mut body = "BEGIN\n".to_owned();
    for table in tables {
        let table = table.into();
        for op in [INSERT, UPDATE, DELETE, TRUNCATE] {
            let _ = writeln!(body, "  DROP TRIGGER IF EXISTS {SCHEMA}_{op} ON {};", table.quoted());
            let _ = writeln!(body, "  DROP FUNCTION IF EXISTS {}();", table.function(op));
        }
    }
    let _ = write!(
        body,
        "  IF NOT EXISTS (SELECT FROM pg_catalog.pg_proc\n\
         \x20     WHERE pronamespace = pg_catalog.to_regnamespace('{SCHEMA}')) THEN\n\
         \x20   DROP SCHEMA IF EXISTS {SCHEMA};\n\
         \x20   DROP PUBLICATION IF EXISTS {PUBLICATION};\n\
         \x20 END IF;\n\
         END\n"
    );
    format!("DO {};\n", dollar_quoted(&body))
}

fn install(sql: &mut String, table: &Table) {
    let on = table.quoted();
    // A function's columns are looked for when it is called first, which would be by somebody's write.
    let _ = writeln!(sql, "\n  PERFORM {} FROM {on} AS r WHERE false;", selected(table));
    let rows = |transition: &str| format!("SELECT {} FROM {transition} AS r", selected(table));
    for (op, referencing, rows) in [
        (INSERT, " REFERENCING NEW TABLE AS new_rows", rows("new_rows")),
        // Ids that stayed as they were are named once.
        (
            UPDATE,
            " REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows",
            format!("{} UNION {}", rows("old_rows"), rows("new_rows")),
        ),
        (DELETE, " REFERENCING OLD TABLE AS old_rows", rows("old_rows")),
        (TRUNCATE, "", String::new()),
    ] {
        let (function, trigger) = (table.function(op), format!("{SCHEMA}_{op}"));
        let body = if op == TRUNCATE { truncated(table) } else { changed(table, op, &rows) };
        let body = dollar_quoted(&format!("BEGIN\n{body}\n      RETURN NULL;\n    END\n    "));
        let _ = write!(
            sql,
            "  CREATE OR REPLACE FUNCTION {function}() RETURNS trigger\n\
             \x20   LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS {body};\n\
             \x20 CREATE OR REPLACE TRIGGER {trigger} AFTER {} ON {on}{referencing}\n\
             \x20   FOR EACH STATEMENT EXECUTE FUNCTION {function}();\n\
             \x20 ALTER TABLE {on} ENABLE ALWAYS TRIGGER {trigger};\n",
            op.to_uppercase(),
        );
    }
}

/// Whose the rows `r` are, and what is named of them, as texts. (Qualified: a column may be called as a variable is.)
fn selected(table: &Table) -> String {
    let tenant = table.tenant.as_ref().map_or("NULL".to_owned(), |column| format!("r.{}", identifier(column)));
    let columns =
        table.columns.iter().enumerate().map(|(at, column)| format!(", r.{}::text AS c{at}", identifier(column)));
    format!("{tenant}::text AS tenant{}", columns.collect::<String>())
}

/// Tells of the rows that a statement has changed: for each tenant, and a thousand of them at a time.
fn changed(table: &Table, op: &str, rows: &str) -> String {
    let name = literal(&table.event());
    let fields = table.columns.iter().enumerate().map(|(at, column)| format!(", {}, json_agg(c{at})", literal(column)));
    let fields = fields.collect::<String>();
    format!(
        "      PERFORM pg_logical_emit_message(true, '{PREFIX}', json_build_object('name', {name}, 'tenant', tenant,\n\
         \x20       'fields', json_build_object('op', '{op}'{fields}))::text)\n\
         \x20     FROM (SELECT *, (row_number() OVER (PARTITION BY tenant) - 1) / {ROWS} AS part FROM (\n\
         \x20       {rows}\n\
         \x20     ) AS changed) AS parts GROUP BY tenant, part;"
    )
}

/// Tells that all rows are gone, which names none of them.
fn truncated(table: &Table) -> String {
    let name = literal(&table.event());
    format!(
        "      PERFORM pg_logical_emit_message(true, '{PREFIX}', json_build_object('name', {name},\n\
         \x20       'fields', json_build_object('op', '{TRUNCATE}'))::text);"
    )
}

fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A backslash means itself, whatever `standard_conforming_strings` says.
pub(super) fn literal(text: &str) -> String {
    let escapes = if text.contains('\\') { "E" } else { "" };
    format!("{escapes}'{}'", text.replace('\'', "''").replace('\\', "\\\\"))
}

/// Quoted by a tag that the text does not contain.
fn dollar_quoted(text: &str) -> String {
    let mut tag = "$cache$".to_owned();
    while text.contains(&tag) {
        tag.insert(tag.len() - 1, '_');
    }
    format!("{tag}\n{text}{tag}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_leave_their_quotes() {
        assert_eq!(identifier(r#"a"b'; --"#), r#""a""b'; --""#);
        assert_eq!(literal(r#"a"b'; --"#), r#"'a"b''; --'"#);
        assert_eq!(literal(r"a\'"), r"E'a\\'''");
        assert_eq!(dollar_quoted("a $cache$ b"), "$cache_$\na $cache$ b$cache_$");
    }

    #[test]
    fn functions_have_names_of_their_own() {
        let name = |schema: &str, table: &str| Table::new(table).schema(schema).function(INSERT);
        assert_eq!(name("public", "agents"), r#"tower_cache_aside."agents_insert""#);
        assert_eq!(name("sales", "agents"), r#"tower_cache_aside."sales.agents_insert""#);
        let long = "x".repeat(60);
        let names = [
            name("a.b", "c"),
            name("a", "b.c"),
            name("public", "a.b.c"),
            name("public", "A"),
            name("public", "a"),
            name("public", &long),
            name("public", &format!("{long}y")),
            name("public", "ä"),
            name("public", "ö"),
        ];
        let distinct: std::collections::BTreeSet<_> = names.iter().collect();
        assert_eq!(distinct.len(), names.len());
        assert!(names.iter().all(|name| name.len() <= SCHEMA.len() + 3 + LONGEST), "{names:?}");
    }
}
