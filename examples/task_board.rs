//! A repository that says what it changes and what it reads, so that joins and bulk endpoints need no table.
//!
//! ```text
//! cargo run --example task_board
//! curl -i localhost:8080/people/ada/board       # a join of a person and their tasks: cache-status says miss, then hit
//! curl -i -X POST localhost:8080/tasks/close -H 'content-type: application/json' -d '[1, 2]'
//! curl -i localhost:8080/people/ada/board       # a miss: ada's board shows task 1
//! curl -i localhost:8080/people/bob/board       # still a hit: none of his tasks was closed
//! ```

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use axum::{
    Json, Router,
    extract::{Path, State},
    http::StatusCode,
    routing::{get, post},
};
use serde::Serialize;
use tower_cache_aside::{Cache, Canonical, ConfigError, DataType, OnUnmapped, Route, Ttl, changed, depends_on};

#[derive(Clone, Serialize)]
struct Task {
    title: String,
    assignee: String,
    is_open: bool,
}

/// The one place that knows rows, and so the one place that knows what is made of which and what has changed.
#[derive(Clone, Default)]
struct Tasks(Arc<Mutex<BTreeMap<u64, Task>>>);

impl Tasks {
    fn of(&self, person: &str) -> BTreeMap<u64, Task> {
        let rows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let own: BTreeMap<_, _> =
            rows.iter().filter(|(_, task)| task.assignee == person).map(|(id, t)| (*id, t.clone())).collect();
        // Whatever response is made of this falls with any of them, and with the person, who may get another one.
        depends_on("person", person);
        own.keys().for_each(|id| depends_on("task", id));
        own
    }

    fn close(&self, ids: &[u64]) {
        let mut rows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for id in ids {
            if let Some(task) = rows.get_mut(id) {
                task.is_open = false;
                changed("task", id);
            }
        }
    }

    fn assign(&self, id: u64, person: &str) -> bool {
        let mut rows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(task) = rows.get_mut(&id) else { return false };
        let before = std::mem::replace(&mut task.assignee, person.to_owned());
        changed("task", id);
        changed("person", before);
        changed("person", person);
        true
    }
}

// The handlers know nothing of a cache.

async fn board(State(tasks): State<Tasks>, Path(person): Path<String>) -> Json<BTreeMap<u64, Task>> {
    Json(tasks.of(&person))
}

async fn close(State(tasks): State<Tasks>, Json(ids): Json<Vec<u64>>) -> StatusCode {
    tasks.close(&ids);
    StatusCode::NO_CONTENT
}

async fn assign(State(tasks): State<Tasks>, Path((id, person)): Path<(u64, String)>) -> StatusCode {
    if tasks.assign(id, &person) { StatusCode::NO_CONTENT } else { StatusCode::NOT_FOUND }
}

/// All there is to declare: which things there are, and what is cached. No mutations, no cascades.
fn cache() -> Result<Cache, ConfigError> {
    Cache::builder("task_board")
        .single_tenant("all")
        .data_type(DataType::new("task", Ttl::Standard))
        .data_type(DataType::new("person", Ttl::Standard))
        .data_type(DataType::new("board", Ttl::Standard))
        .entity("task", Canonical::Integer)
        .route(Route::new("/people/{person_id}/board", "board"))
        // What neither says `changed` nor is read at its own path would be warned of; here, it drops everything instead.
        .on_unmapped(OnUnmapped::Drop)
        .report_header(true)
        .build()
}

fn app(cache: &Cache) -> Router {
    let rows = [(1, "Write", "ada"), (2, "Review", "ada"), (3, "Test", "bob")];
    let task = |title: &str, assignee: &str| Task { title: title.into(), assignee: assignee.into(), is_open: true };
    let rows = rows.into_iter().map(|(id, title, assignee)| (id, task(title, assignee))).collect();
    Router::new()
        .route("/people/{person_id}/board", get(board))
        .route("/tasks/close", post(close))
        .route("/tasks/{id}/assignee/{person}", post(assign))
        .with_state(Tasks(Arc::new(Mutex::new(rows))))
        .layer(cache.layer())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:8080".to_owned());
    let listener = tokio::net::TcpListener::bind(address).await?;
    println!("listening on http://{}", listener.local_addr()?);
    Ok(axum::serve(listener, app(&cache()?)).await?)
}
