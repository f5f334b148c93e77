//! The agent service tests its own mapping: behind its cache and without it, before one database, it answers the same.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[allow(dead_code)]
#[path = "../examples/agent_service/caching.rs"]
mod caching;
#[allow(dead_code)]
#[path = "../examples/agent_service/cli.rs"]
mod cli;
#[allow(dead_code)]
#[path = "../examples/agent_service/database.rs"]
mod database;
#[path = "../examples/agent_service/outbox.rs"]
mod outbox;
#[path = "../examples/agent_service/routes.rs"]
mod routes;

use std::{sync::Arc, time::Duration};

use cli::Args;
use database::Database;
use http::Method;
use tower_cache_aside::{
    Cache,
    testing::{Difference, Requests, Twin},
};

/// Few enough of all to meet.
fn requests(cache: &Cache) -> Requests {
    let [agents, conversation] = [["agent-1", "agent-2"], ["c", "d"]];
    let either = |n: u32, ids: [&'static str; 2]| ids[n as usize % 2];
    let requests = Requests::of(cache).tenants(["demo", "other"]).ids("agent_id", agents);
    let requests =
        requests.ids("conversation_id", conversation).ids("message_id", ["m", "m1"]).ids("execution_id", ["e"]);
    let requests = requests.query("/agents", "limit", ["1", "5"]).query("/agents", "offset", ["0", "1"]);
    requests
        .body(Method::POST, "/agents", move |n| format!(r#"{{"id":"{}","name":"{n}"}}"#, either(n, agents)))
        .body(Method::PUT, "/agents/{agent_id}", |n| format!(r#"{{"name":"{n}"}}"#))
        .body(Method::PUT, "/agents/{agent_id}/config", |n| format!(r#"{{"x":{n}}}"#))
        .body(Method::PUT, "/agents/{agent_id}/tools", |n| format!("[{n}]"))
        .body(Method::PUT, "/agents/{agent_id}/executions/{execution_id}", |n| n.to_string())
        .body(Method::POST, "/agents/{agent_id}/conversations", move |n| {
            format!(r#"{{"id":"{}","title":"{n}"}}"#, either(n, conversation))
        })
        .body(Method::PUT, "/conversations/{conversation_id}", move |n| {
            format!(r#"{{"title":"{n}","agent_id":"{}"}}"#, either(n, agents))
        })
        .body(Method::POST, "/conversations/{conversation_id}/messages", |n| {
            // One that is there already, or another.
            format!(r#"{{"id":"m{}","content":"{n}"}}"#, ["", "1", "2", "3"][n as usize % 4])
        })
        .body(Method::PUT, "/collections/{collection_id}", |n| format!(r#"{{"n":{n}}}"#))
}

/// A new database, in which there is something of everything.
async fn database() -> Database {
    let db = Database::open(None, Duration::ZERO, 2).unwrap();
    for (tenant, agent, conversation) in [("demo", "agent-2", "c"), ("demo", "agent-1", "d"), ("other", "agent-1", "c")]
    {
        if tenant == "other" {
            db.create_agent(tenant, agent, "first", "").await.unwrap();
        }
        db.create_conversation(tenant, agent, conversation, "").await.unwrap().unwrap();
        db.create_message(tenant, conversation, "m", "user", "hello").await.unwrap().unwrap();
        db.put_execution(tenant, agent, "e", &"running".into()).await.unwrap().unwrap();
    }
    db
}

/// The service and its twin, before a new database.
async fn twin(args: &Args) -> Twin {
    let db = database().await;
    let cache = caching::cache(args, db.clone()).unwrap();
    let service = routes::router(db, Arc::new(|| "ok"), Arc::new(String::new));
    Twin::new(caching::apply(service.clone(), &cache), service).settling(&cache)
}

/// How many hits there were in so many seeds.
async fn check(args: &Args, seeds: u64) -> Result<usize, Difference> {
    // What the service has, whatever its mapping knows of it.
    let requests = requests(&caching::cache(&Args::default(), database().await).unwrap());
    let mut hits = 0;
    for seed in 0..seeds {
        hits += Twin::check(async || twin(args).await, requests.generate(seed, 150)).await?.hits;
    }
    Ok(hits)
}

#[tokio::test]
async fn the_cache_says_what_the_service_would_have_said() {
    let hits = check(&Args::default(), 20).await.unwrap();
    assert!(hits > 300, "{hits}");
}

/// Whoever takes a line out of the mapping is told which.
#[tokio::test]
async fn a_line_that_is_missing_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("agents.toml");
    let right = include_str!("../examples/agent_service/agents.toml");
    for (line, instead, says) in [
        (
            "mutates = [\"agent\"]\ninclude = [\"conversations\", \"executions\"]",
            "mutates = [\"agent\"]\ninclude = [\"executions\"]",
            "`DELETE /agents/",
        ),
        ("all = [\"agents_list\"]", "", "does not drop what is read here"),
        ("query = [\"limit\", \"offset\"]", "query = [\"limit\"]", "depends on the query"),
    ] {
        assert_eq!(right.matches(line).count(), 1, "{line}");
        std::fs::write(&config, right.replace(line, instead)).unwrap();
        let args = Args { config: Some(config.clone()), ..Args::default() };
        let difference = check(&args, 40).await.expect_err(line);
        let report = difference.to_string();
        assert!(difference.requests().len() <= 6 && report.contains(says), "{line}: {report}");
    }
}
