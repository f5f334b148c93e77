//! The agent service from outside: a real process, driven over HTTP as its users would.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::process::Command;

use http::Method;
use serde_json::{Value, json};
use support::{Http, Reply, Service, example, until_hit};

/// A service with one agent (`a`) of the tenant `acme`, which has one conversation (`c`) with one message (`m`).
async fn start(args: &[&str]) -> (Service, Http) {
    let service = Service::start(args);
    let http = Http::new(&service.url, "acme");
    assert_eq!(http.post("/agents", json!({"id": "a", "name": "first"})).await.status, 201);
    assert_eq!(http.post("/agents/a/conversations", json!({"id": "c"})).await.status, 201);
    assert_eq!(http.post("/conversations/c/messages", json!({"id": "m", "content": "hello"})).await.status, 201);
    assert_eq!(http.put("/agents/a/executions/e", json!({"state": "running"})).await.status, 200);
    assert_eq!(http.put("/collections/k", json!({"metadata": {"size": 1}})).await.status, 200);
    (service, http)
}

/// Every cacheable route, with its data type.
const READS: [(&str, &str); 11] = [
    ("/agents?limit=5&offset=0", "agents_list"),
    ("/agents/a", "agent"),
    ("/agents/a/config", "agent_config"),
    ("/agents/a/tools", "agent_tools"),
    ("/agents/a/executions/e", "agent_execution_state"),
    ("/agents/a/conversations/c", "conversation"),
    ("/conversations/c", "conversation"),
    ("/conversations/c/memory", "conversation_memory"),
    ("/conversations/c/messages", "conversation_messages_list"),
    ("/conversations/c/messages/m", "conversation_message"),
    ("/collections/k", "collection_metadata"),
];

async fn warm(http: &Http) {
    for (path, _) in READS {
        http.get(path).await;
        let reply = http.get(path).await;
        assert!(reply.is_hit(), "{path}: {reply:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_read_misses_then_hits() {
    let (_service, http) = start(&[]).await;
    for (path, data_type) in READS {
        let before = http.origin_calls(data_type).await;
        let miss = http.get(path).await;
        assert_eq!(miss.status, 200, "{path}");
        assert_eq!(miss.header("cache-status"), "tower-cache-aside; fwd=uri-miss; stored; fwd-status=200", "{path}");
        for _ in 0..3 {
            let hit = http.get(path).await;
            assert!(hit.is_hit(), "{path}: {hit:?}");
            assert_eq!((hit.status, &hit.body), (miss.status, &miss.body), "{path}");
            assert_eq!(hit.header("content-type"), miss.header("content-type"), "{path}");
            assert_eq!(hit.header("content-length"), miss.body.len().to_string(), "{path}");
        }
        assert_eq!(http.origin_calls(data_type).await, before + 1, "{path}");
        let head = http.send(Method::HEAD, path, None).await;
        assert!(head.is_hit() && head.body.is_empty(), "{path}: {head:?}");
        assert_eq!(head.header("content-length"), miss.body.len().to_string(), "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ttl_class_is_what_it_says() {
    let (_service, http) = start(&[]).await;
    for (path, ttl) in [("/agents?limit=1", 300), ("/agents/a", 3_600), ("/conversations/c", 86_400)] {
        http.get(path).await;
        let status = http.get(path).await.header("cache-status").to_owned();
        let left: u64 = status.rsplit_once("ttl=").unwrap().1.parse().unwrap();
        assert!((ttl - 60..=ttl).contains(&left), "{path}: {status}");
    }
}

/// (method, path, body, status, the paths that then miss; all others still hit; the report).
type Write<'a> = (&'a str, &'a str, Value, u16, Vec<&'a str>, &'a str);

#[tokio::test(flavor = "multi_thread")]
async fn every_write_drops_its_cascade_and_nothing_else() {
    let agent = ["/agents/a", "/agents/a/config", "/agents/a/tools", "/agents?limit=5&offset=0"];
    let conversation = [
        "/agents/a/conversations/c",
        "/conversations/c",
        "/conversations/c/memory",
        "/conversations/c/messages",
        "/conversations/c/messages/m",
    ];
    let all: Vec<_> = agent.iter().chain(&conversation).copied().collect();
    let conversation_report = "conversation=2, conversation_memory=1, conversation_message=1, \
                               conversation_messages_list=1, total=5";
    let cases: [Write<'_>; 10] = [
        ("POST", "/agents", json!({"name": "b"}), 201, vec!["/agents?limit=5&offset=0"], "agents_list=1"),
        (
            "PUT",
            "/agents/a",
            json!({"name": "new"}),
            200,
            all.clone(),
            "agent=1, agent_config=1, agent_tools=1, agents_list=1, conversations=5, total=9",
        ),
        (
            "PUT",
            "/agents/a/config",
            json!({"config": {"x": 1}}),
            200,
            vec!["/agents/a/config"],
            "agent_config=1, total=1",
        ),
        ("PUT", "/agents/a/tools", json!({"tools": []}), 200, vec!["/agents/a/tools"], "agent_tools=1, total=1"),
        (
            "PUT",
            "/agents/a/executions/e",
            json!({"state": "done"}),
            200,
            vec!["/agents/a/executions/e"],
            "agent_execution_state=1, total=1",
        ),
        ("POST", "/agents/a/conversations", json!({"id": "other"}), 201, vec![], "total=0"),
        ("PUT", "/conversations/c", json!({"title": "new"}), 200, conversation.to_vec(), conversation_report),
        (
            "POST",
            "/conversations/c/messages",
            json!({"content": "again"}),
            201,
            conversation.to_vec(),
            conversation_report,
        ),
        (
            "PUT",
            "/collections/k",
            json!({"metadata": {}}),
            200,
            vec!["/collections/k"],
            "collection_metadata=1, total=1",
        ),
        ("DELETE", "/conversations/c", Value::Null, 204, conversation.to_vec(), conversation_report),
    ];
    for (method, path, body, status, dropped, report) in cases {
        let (_service, http) = start(&[]).await;
        warm(&http).await;
        let versions = |replies: &[Reply]| replies.iter().map(|r| r.json()["version"].clone()).collect::<Vec<_>>();
        let mut before = vec![];
        for path in &dropped {
            before.push(http.get(path).await);
        }
        let reply = http.send(method.parse().unwrap(), path, Some(body).filter(|b| !b.is_null())).await;
        assert_eq!(reply.status, status, "{method} {path}: {reply:?}");
        assert!(reply.header("cache-invalidated").contains(report), "{method} {path}: {reply:?}");
        let mut after = vec![];
        for (read, _) in READS {
            let reply = http.get(read).await;
            assert_eq!(reply.is_hit(), !dropped.contains(&read), "{method} {path}, then {read}: {reply:?}");
            if dropped.contains(&read) {
                after.push(reply);
            }
        }
        if method == "PUT" && dropped.len() == 1 {
            assert_ne!(versions(&before), versions(&after), "{method} {path}");
        }
        if method == "DELETE" {
            assert!(after.iter().all(|r| r.status == 404), "{after:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_agent_takes_its_conversations_along() {
    let (_service, http) = start(&[]).await;
    warm(&http).await;
    let reply = http.delete("/agents/a").await;
    assert_eq!(reply.status, 204);
    let report = reply.header("cache-invalidated");
    assert!(report.contains("conversations=5") && report.contains("executions=1"), "{report}");
    for (path, data_type) in READS {
        let reply = http.get(path).await;
        match data_type {
            "agents_list" => assert_eq!(reply.json()["total"], 0),
            "collection_metadata" => assert!(reply.is_hit()),
            _ => assert_eq!(reply.status, 404, "{path}: {reply:?}"),
        }
    }
}

/// By the path that does not name the agent, and after it was moved from one agent to another.
#[tokio::test(flavor = "multi_thread")]
async fn a_conversation_falls_with_either_agent() {
    for moved in [false, true] {
        for falls_with in ["a", "b"] {
            let (_service, http) = start(&[]).await;
            http.post("/agents", json!({"id": "b", "name": "second"})).await;
            warm(&http).await;
            if moved {
                let reply = http.put("/conversations/c", json!({"agent_id": "b"})).await;
                assert_eq!(reply.json()["agent_id"], "b");
            }
            for _ in 0..2 {
                http.get("/conversations/c").await;
            }
            let reply = http.put(&format!("/agents/{falls_with}"), json!({"name": "x"})).await;
            let owner = if moved { "b" } else { "a" };
            assert_eq!(reply.dropped("conversations").unwrap() > 0, falls_with == owner, "{moved} {reply:?}");
            let reply = http.get("/conversations/c").await;
            assert_eq!(reply.is_hit(), falls_with != owner, "{moved} {falls_with} {reply:?}");
            assert_eq!(reply.json()["agent_id"], owner);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_write_drops_nothing() {
    let (_service, http) = start(&[]).await;
    warm(&http).await;
    for (method, path, body, status) in [
        ("PUT", "/agents/a", json!([]), 400),
        ("PUT", "/agents/none", json!({"name": "x"}), 404),
        ("DELETE", "/agents/none", Value::Null, 404),
        ("POST", "/agents", json!({"id": "a", "name": "again"}), 409),
        ("PUT", "/agents/a/config", json!("text"), 400),
        ("DELETE", "/conversations/none", Value::Null, 404),
        ("PATCH", "/agents/a", json!({}), 405),
    ] {
        let reply = http.send(method.parse().unwrap(), path, Some(body).filter(|b| !b.is_null())).await;
        assert_eq!(reply.status, status, "{method} {path}: {reply:?}");
        assert_eq!(reply.header("cache-invalidated"), "", "{method} {path}");
    }
    for (path, _) in READS {
        assert!(http.get(path).await.is_hit(), "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ids_are_whatever_they_are() {
    let ids = [
        "1",
        "10",
        "100",
        "a:b",
        "*",
        "%2A",
        "{t}",
        "a=b",
        "a b",
        "ä",
        "a%b",
        "..",
        "A",
        "~",
        "'",
        "1,2",
        "a;b",
        "a?b",
        "a#b",
        "a%2Fb",
        &"x".repeat(1_000),
    ];
    let (_service, http) = start(&[]).await;
    let path = |id: &str| {
        let escape = |b: u8| match b {
            b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' => char::from(b).to_string(),
            _ => format!("%{b:02X}"),
        };
        format!("/agents/{}", id.bytes().map(escape).collect::<String>())
    };
    for id in ids {
        let reply = http.post("/agents", json!({"id": id, "name": id})).await;
        assert_eq!(reply.status, 201, "{id:?}");
    }
    for id in ids {
        http.get(&path(id)).await;
    }
    for id in ids {
        let reply = http.get(&path(id)).await;
        assert!(reply.is_hit(), "{id:?}: {reply:?}");
        assert_eq!(reply.json()["id"], id);
    }
    for (i, id) in ids.iter().enumerate() {
        let reply = http.put(&path(id), json!({"name": "changed"})).await;
        assert_eq!(reply.dropped("agent"), Some(1), "{id:?}: {reply:?}");
        for (j, other) in ids.iter().enumerate() {
            let reply = http.get(&path(other)).await;
            assert_eq!(reply.is_hit(), i != j, "changed {id:?}, read {other:?}");
            assert_eq!(reply.json()["version"], if j <= i { 2 } else { 1 });
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tenants_never_meet() {
    let service = Service::start(&[]);
    let tenants = ["t", "t:u", "T", "t%3Au", "{t}", "t=u", "t*", "t.u", "t u"];
    let clients: Vec<_> = tenants.iter().map(|t| Http::new(&service.url, t)).collect();
    for (tenant, http) in tenants.iter().zip(&clients) {
        assert_eq!(http.post("/agents", json!({"id": "a", "name": tenant})).await.status, 201);
    }
    for _ in 0..2 {
        for (tenant, http) in tenants.iter().zip(&clients) {
            assert_eq!(http.get("/agents/a").await.json()["name"], *tenant);
        }
    }
    for (i, http) in clients.iter().enumerate() {
        let reply = http.put("/agents/a", json!({"description": "new"})).await;
        assert_eq!(reply.dropped("agent"), Some(1));
        for (j, other) in clients.iter().enumerate() {
            assert_eq!(other.get("/agents/a").await.is_hit(), i != j, "{} then {}", tenants[i], tenants[j]);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_and_two_tenants_get_nothing() {
    let (service, http) = start(&[]).await;
    warm(&http).await;
    let nobody = Http::anonymous(&service.url);
    let two = Http::new(&service.url, "acme").with("x-tenant-id", "other");
    let same = Http::new(&service.url, "acme").with("x-tenant-id", "acme");
    let empty = Http::new(&service.url, "");
    for client in [&nobody, &two, &same, &empty] {
        for (path, _) in READS {
            let reply = client.get(path).await;
            assert_eq!((reply.status.as_u16(), reply.json()), (400, json!({"error": "tenant_required"})), "{path}");
            assert!(reply.header("cache-status").contains("; fwd=bypass; detail="), "{reply:?}");
        }
        assert_eq!(client.put("/agents/a", json!({"name": "x"})).await.status, 400);
    }
    let with_credentials = http.clone().with("authorization", "Bearer x");
    let with_cookie = http.clone().with("cookie", "a=b");
    for client in [with_credentials, with_cookie] {
        let reply = client.get("/agents/a").await;
        assert_eq!((reply.status.as_u16(), reply.is_hit()), (200, false));
        assert!(reply.header("cache-status").contains("detail=credentials"), "{reply:?}");
    }
    for (path, _) in READS {
        assert!(http.get(path).await.is_hit(), "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_query_counts_as_far_as_it_is_declared() {
    let (_service, http) = start(&[]).await;
    http.get("/agents?limit=5&offset=1").await;
    for (query, hit) in [
        ("limit=5&offset=1", true),
        ("offset=1&limit=5", true),
        ("offset=1&utm=x&limit=5", true),
        ("limit=5", false),
        ("limit=5&offset=2", false),
        ("limit=51", false),
        ("", false),
    ] {
        assert_eq!(http.get(&format!("/agents?{query}")).await.is_hit(), hit, "{query}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stampede_is_one_read_of_the_database() {
    let (_service, http) = start(&["--origin-delay-ms", "300"]).await;
    let tasks: Vec<_> = (0..100)
        .map(|_| {
            let http = http.clone();
            tokio::spawn(async move { http.get("/agents/a").await })
        })
        .collect();
    let mut stored = 0;
    for task in tasks {
        let reply = task.await.unwrap();
        assert_eq!(reply.json()["name"], "first");
        stored += usize::from(reply.header("cache-status").contains("; stored"));
    }
    assert_eq!((http.origin_calls("agent").await, stored), (1, 1));
}

/// The classic race over HTTP: the database is slow *after* it has read the row.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_read_cannot_undo_a_write() {
    let (_service, http) = start(&["--origin-delay-ms", "400"]).await;
    for path in ["/agents/a", "/agents/a/config", "/agents/a/conversations/c"] {
        let slow = tokio::spawn({
            let (http, path) = (http.clone(), path.to_owned());
            async move { http.get(&path).await }
        });
        // Until the row has been read.
        while http.origin_calls(READS.iter().find(|(p, _)| *p == path).unwrap().1).await == 0 {
            tokio::task::yield_now().await;
        }
        let (write, body) = match path {
            "/agents/a" => ("/agents/a", json!({"name": "new"})),
            "/agents/a/config" => ("/agents/a/config", json!({"config": {"a": 1}})),
            _ => ("/conversations/c", json!({"title": "new"})),
        };
        let version = http.put(write, body).await.json()["version"].clone();
        let (fresh, slow) = (http.get(path).await, slow.await.unwrap());
        assert_eq!(fresh.json()["version"], version, "a read after the write joined one from before it");
        assert!(slow.json()["version"].as_u64() <= version.as_u64());
        for _ in 0..3 {
            assert_eq!(http.get(path).await.json()["version"], version, "{path}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_goes_on_without_its_client() {
    let (_service, http) = start(&["--origin-delay-ms", "300"]).await;
    let impatient = http.clone();
    let hung_up = tokio::time::timeout(std::time::Duration::from_millis(100), impatient.get("/agents/a")).await;
    assert!(hung_up.is_err());
    drop(impatient);
    let reply = http.get("/agents/a").await;
    assert!(reply.is_hit() || reply.header("cache-status").contains("collapsed"), "{reply:?}");
    assert_eq!(http.origin_calls("agent").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_absent_memory_is_generated_and_stored() {
    let service = Service::start(&[]);
    let http = Http::new(&service.url, "demo");
    assert_eq!(http.post("/agents/agent-1/conversations", json!({"id": "c"})).await.status, 201);
    let first = http.get("/conversations/c/memory").await;
    assert_eq!((first.status.as_u16(), first.json()["version"].as_u64()), (200, Some(1)));
    let second = http.get("/conversations/c/memory").await;
    assert!(second.is_hit());
    assert_eq!(second.body, first.body);
    http.post("/conversations/c/messages", json!({"content": "x"})).await;
    let third = http.get("/conversations/c/memory").await;
    assert!(third.is_miss());
    assert_ne!(third.body, first.body);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_not_stored() {
    let (_service, http) = start(&[]).await;
    for path in ["/agents/new", "/agents/new/config", "/conversations/new"] {
        for _ in 0..2 {
            let reply = http.get(path).await;
            assert_eq!(reply.status, 404);
            assert!(!reply.is_hit());
        }
    }
    assert_eq!(http.post("/agents", json!({"id": "new", "name": "x"})).await.header("location"), "/agents/new");
    assert_eq!(http.get("/agents/new").await.status, 200);
    assert_eq!(http.get("/agents/new/config").await.json()["version"], 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn health_and_metrics_answer_without_a_tenant() {
    let service = Service::start(&["--seed-agents", "3"]);
    let nobody = Http::anonymous(&service.url);
    let health = nobody.get("/healthz").await;
    assert_eq!((health.status.as_u16(), health.json()["store"].as_str()), (200, Some("ok")));
    let metrics = nobody.get("/metrics").await;
    assert_eq!(metrics.status, 200);
    assert!(metrics.header("content-type").starts_with("text/plain"));
    assert_eq!(nobody.get("/_cache/stats").await.status, 404);
    assert_eq!(Http::new(&service.url, "demo").get("/agents").await.json()["total"], 3);
}

#[test]
fn every_mistake_on_the_command_line_is_one_clear_line() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("bad.toml");
    std::fs::write(&config, "tenant_header = \"x-tenant-id\"\n[types]\nagent = \"0s\"\n").unwrap();
    let config = config.to_str().unwrap();
    for (args, says) in [
        (&["--nonsense"][..], "--nonsense"),
        (&["stray"], "stray"),
        (&["-x"], "-x"),
        (&["--listen"], "--listen"),
        (&["--listen", "nowhere"], "--listen"),
        (&["--listen", "203.0.113.1:1"], "--listen"),
        (&["--l1", "maybe"], "--l1"),
        (&["--coalesce", "all"], "--coalesce"),
        (&["--fence-ms", "-1"], "--fence-ms"),
        (&["--unmapped", "maybe"], "--unmapped"),
        (&["--seed-agents", "many"], "--seed-agents"),
        (&["--prefix", ""], "--prefix"),
        (&["--redis", "127.0.0.1"], "--redis"),
        (&["--redis", "http://127.0.0.1"], "--redis"),
        (&["--db", "/nowhere/at/all.db"], "--db"),
        (&["--config", "/nowhere.toml"], "--config"),
        (&["--config", config], "agent"),
    ] {
        let output = Command::new(example("agent_service")).args(args).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
        assert_eq!(stderr.trim_end().lines().count(), 1, "{args:?}: {stderr}");
        assert!(stderr.contains(says), "{args:?}: {stderr}");
        assert!(output.stdout.is_empty(), "{args:?}");
    }
}

/// What falls when, on one page; a mapping that cannot work ends with the route and the mend.
#[test]
fn a_mapping_can_be_checked() {
    let check = |config: &[&str]| Command::new(example("agent_service")).arg("--check").args(config).output().unwrap();
    let output = check(&[]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}", output = output.status);
    for line in ["PUT /agents/{agent_id}", "GET /conversations/{conversation_id}/memory  conversation_memory, 1day"] {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("bad.toml");
    let text = r#"
        [types]
        agent = "short"
        [[routes]]
        path = "/agents/{agent_id}"
        type = "agent"
        [[routes]]
        path = "/agents"
        type = "agent"
        [[mutations]]
        method = "PUT"
        path = "/agents/{agent_id}"
        mutates = ["agent"]
    "#;
    std::fs::write(&config, text).unwrap();
    let output = check(&["--config", config.to_str().unwrap()]);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), output.stdout.len()), (Some(2), 0), "{error}");
    assert!(
        error.contains("PUT /agents/{agent_id}") && error.contains("GET /agents ") && error.contains("`all`"),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_config_file_replaces_the_catalogue() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("only-agents.toml");
    let text = r#"
        [types]
        agent = "1500ms"
        [[routes]]
        path = "/agents/{agent_id}"
        type = "agent"
        [[mutations]]
        method = "PUT"
        path = "/agents/{agent_id}"
        mutates = ["agent"]
    "#;
    std::fs::write(&config, text).unwrap();
    let service = Service::start(&["--config", config.to_str().unwrap()]);
    let http = Http::new(&service.url, "demo");
    assert!(http.get("/agents/agent-1").await.is_miss());
    assert!(http.get("/agents/agent-1").await.is_hit());
    assert_eq!(http.get("/agents/agent-1/config").await.header("cache-status"), "");
    assert_eq!(http.put("/agents/agent-1", json!({"name": "x"})).await.header("cache-invalidated"), "agent=1, total=1");
    http.get("/agents/agent-1").await;
    tokio::time::sleep(std::time::Duration::from_millis(1_600)).await;
    assert!(http.get("/agents/agent-1").await.is_miss(), "a TTL that is no whole second");
}

/// What the mapping does not name: warned of once, ignored, or everything of the tenant falls.
#[tokio::test(flavor = "multi_thread")]
async fn an_unmapped_write_is_said_or_drops_everything() {
    let dir = tempfile::tempdir().unwrap();
    let (config, log) = (dir.path().join("agents.toml"), dir.path().join("log"));
    let text = "[types]\nagent = \"standard\"\n[[routes]]\npath = \"/agents/{agent_id}\"\ntype = \"agent\"\n";
    std::fs::write(&config, text).unwrap();
    for (unmapped, drops, lines) in [("ignore", false, 0), ("warn", false, 1), ("drop", true, 0)] {
        let service = Service::start_logging(&["--config", config.to_str().unwrap(), "--unmapped", unmapped], &log);
        let (http, other) = (Http::new(&service.url, "demo"), Http::new(&service.url, "other"));
        other.post("/agents", json!({"id": "a", "name": "theirs"})).await;
        for id in ["agent-1", "agent-2"] {
            until_hit(&http, &format!("/agents/{id}")).await;
        }
        until_hit(&other, "/agents/a").await;
        for agent in ["agent-1", "agent-3"] {
            let written = http.put(&format!("/agents/{agent}/config"), json!({"x": 1})).await;
            assert_eq!(written.status, 200);
        }
        assert_eq!(http.get("/agents/agent-2").await.is_hit(), !drops, "{unmapped}");
        assert!(other.get("/agents/a").await.is_hit(), "{unmapped}");
        // What is read at the path of a write falls in any case.
        until_hit(&http, "/agents/agent-1").await;
        until_hit(&http, "/agents/agent-2").await;
        assert_eq!(
            http.put("/agents/agent-1", json!({"name": "x"})).await.header("cache-invalidated"),
            "agent=1, total=1"
        );
        assert!(http.get("/agents/agent-1").await.is_miss() && http.get("/agents/agent-2").await.is_hit());
        let log = std::fs::read_to_string(&log).unwrap();
        assert_eq!(
            log.lines().filter(|line| line.contains("PUT /agents/…/config") && !line.contains("alert")).count(),
            lines,
            "{unmapped}: {log}"
        );
    }
}

/// The example of a repository that says what it changes.
#[tokio::test(flavor = "multi_thread")]
async fn a_repository_needs_no_table() {
    let service = Service::of("task_board", &["127.0.0.1:0"]);
    let http = Http::anonymous(&service.url);
    let boards = ["/people/ada/board", "/people/bob/board"];
    for (path, body, falls) in [
        ("/tasks/close", json!([1, 2]), [true, false]),
        ("/tasks/3/assignee/ada", json!(null), [true, true]),
        ("/tasks/close", json!([3]), [true, false]),
        ("/tasks/9/assignee/ada", json!(null), [false, false]),
    ] {
        for board in boards {
            until_hit(&http, board).await;
        }
        http.post(path, body).await;
        let hits = [http.get(boards[0]).await.is_hit(), http.get(boards[1]).await.is_hit()];
        assert_eq!(hits.map(|hit| !hit), falls, "{path}");
    }
    assert_eq!(http.get(boards[0]).await.json()["3"]["is_open"], false);
}
