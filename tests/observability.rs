//! What comes with the crate to look at it: the rules and dashboards for Prometheus against a real one, and the page in a real
//! browser.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/redis.rs"]
mod redis;
#[path = "support/mod.rs"]
mod support;

use std::{
    collections::BTreeSet,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use http::Method;
use redis::lasting_port;
use serde_json::{Value, json};
use support::{Http, Service};
use tempfile::TempDir;

const TOKEN: &str = "a token";

fn observability(file: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("observability").join(file).to_str().unwrap().to_owned()
}

/// A program, killed when dropped.
struct Running(Child);

impl Running {
    fn start(command: &mut Command) -> Self {
        let what = format!("{:?} is installed: run `bash .ci/test`, which does it", command.get_program());
        Self(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect(&what))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Asks until the answer is good.
async fn until<T, F: Future<Output = Result<T, String>>>(mut ask: impl FnMut() -> F) -> T {
    let mut last = String::new();
    for _ in 0..600 {
        match ask().await {
            Ok(answer) => return answer,
            Err(why) => last = why,
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("{last}");
}

// ---- Prometheus ------------------------------------------------------------------------------------------------------

#[test]
fn the_rules_hold_what_their_tests_say() {
    for (check, file) in [("check", "alerts.yml"), ("test", "alerts_test.yml")] {
        let output = Command::new("promtool").args([check, "rules"]).arg(observability(file)).output();
        let output = output.expect("promtool is installed: run `bash .ci/test`, which does it");
        let text = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap()).concat();
        assert!(output.status.success(), "{text}");
    }
}

/// Every alert has a heading that its runbook leads to.
#[test]
fn every_alert_has_a_runbook() {
    let rules = std::fs::read_to_string(observability("alerts.yml")).unwrap();
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/operations.md");
    let docs = std::fs::read_to_string(docs).unwrap();
    let alerts: Vec<_> = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert!(alerts.len() >= 8);
    for alert in alerts {
        assert!(rules.contains(&format!("#{}", alert.to_lowercase())), "{alert} has a runbook");
        assert!(
            docs.lines().any(|line| line.trim_start_matches('#').trim() == alert && line.starts_with('#')),
            "{alert}"
        );
    }
}

/// The `expr` of every panel.
fn expressions(of: &Value, found: &mut BTreeSet<String>) {
    match of {
        Value::Object(members) => members.iter().for_each(|(name, value)| match value {
            Value::String(text) if name == "expr" => _ = found.insert(text.clone()),
            value => expressions(value, found),
        }),
        Value::Array(members) => members.iter().for_each(|value| expressions(value, found)),
        _ => {}
    }
}

/// Everything that a service under load can do, again and again.
async fn load(service: &Service, turn: usize) {
    let demo = Http::new(&service.url, "demo");
    for _ in 0..10 {
        demo.get("/agents").await;
        demo.get("/agents/agent-2").await;
        Http::new(&service.url, "other").get("/agents").await;
        Http::new(&service.url, &format!("tenant-{turn}")).get("/agents").await;
    }
    demo.clone().with("authorization", "x").get("/agents").await;
    demo.get(&format!("/agents/unknown-{turn}")).await;
    demo.put("/agents/agent-1", json!({"name": format!("Ada {turn}")})).await;
    demo.put("/collections/c1", json!({"name": format!("{turn}")})).await;
}

/// A real Prometheus scrapes a real service, and finds what rules and dashboards ask for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rules_and_dashboards_find_their_data() {
    let built_in = include_str!("../examples/agent_service/agents.toml");
    // A table that forgets the lists, so that there is something to be found.
    let forgetful = built_in
        .replace("all = [\"agents_list\"]", "")
        .replace("\"agents_list\", ", "")
        .replace(", \"agents_list\"", "");
    let dir = TempDir::new().unwrap();
    let (table, config) = (dir.path().join("agents.toml"), dir.path().join("prometheus.yml"));
    std::fs::write(&table, forgetful).unwrap();
    let redis = redis::Redis::start(&[]);
    let args = ["--redis", &redis.url(), "--config", table.to_str().unwrap(), "--audit", "1", "--metrics-tenants", "3"];
    let more = ["--origin-delay-ms", "30", "--l1", "on", "--outbox", "on", "--warm", "on"];
    let service = Service::start(&[&args[..], &more].concat());
    let target = service.url.strip_prefix("http://").unwrap();
    let text = format!(
        "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: ['{}']\nscrape_configs: \
         [{{job_name: a, static_configs: [{{targets: ['{target}']}}]}}]\n",
        observability("alerts.yml")
    );
    std::fs::write(&config, text).unwrap();
    let port = lasting_port();
    let _prometheus = Running::start(
        Command::new("prometheus")
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.tsdb.path={}", dir.path().join("data").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}")),
    );
    let prometheus = Http::anonymous(&format!("http://127.0.0.1:{port}"));
    let query = async |expression: &str| {
        let form: String = percent_encoding(expression);
        match prometheus.try_send(Method::GET, &format!("/api/v1/query?query={form}"), None).await {
            Some(reply) => reply.json(),
            None => json!({"status": "not there yet"}),
        }
    };
    let mut all = BTreeSet::new();
    for file in ["overview", "tenant", "data-type"] {
        let text = std::fs::read_to_string(observability(&format!("dashboards/{file}.json"))).unwrap();
        expressions(&serde_json::from_str(&text).unwrap(), &mut all);
    }
    assert!(all.len() > 30, "{}", all.len());
    let mut left: Vec<_> = all.into_iter().collect();
    for turn in 0..60 {
        load(&service, turn).await;
        let mut missing = vec![];
        for expression in left {
            let filled = expression.replace("$__rate_interval", "10s").replace("$__range", "1m");
            let filled =
                ["$service", "$data_type", "$tenant"].iter().fold(filled, |text, name| text.replace(name, ".*"));
            let answer = query(&filled).await;
            assert_ne!(answer["status"], "error", "{filled}: {answer}");
            if answer["data"]["result"].as_array().is_none_or(Vec::is_empty) {
                missing.push(expression);
            }
        }
        left = missing;
        if left.is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    assert!(left.is_empty(), "nothing is found by {left:#?}");
    // What the alerts are about is there, and what went wrong is an alert.
    let rules = std::fs::read_to_string(observability("alerts.yml")).unwrap();
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let names = rules.split(|c| !is_name(c)).filter(|word| word.starts_with("cache_aside_")).collect::<BTreeSet<_>>();
    for name in names {
        let answer = query(name).await;
        assert!(!answer["data"]["result"].as_array().unwrap().is_empty(), "{name}");
    }
    let firing = query("ALERTS{alertname=\"CacheAuditStale\",alertstate=\"firing\",data_type=\"agents_list\"}").await;
    assert_eq!(firing["data"]["result"].as_array().unwrap().len(), 1, "{firing:#}");
}

/// As it goes into a query.
fn percent_encoding(text: &str) -> String {
    text.bytes()
        .map(|b| if b.is_ascii_alphanumeric() { char::from(b).to_string() } else { format!("%{b:02x}") })
        .collect()
}

// ---- the page --------------------------------------------------------------------------------------------------------

/// A browser, driven by WebDriver (W3C).
struct Browser {
    driver: Http,
    session: String,
    _running: Running,
    _profile: TempDir,
}

impl Browser {
    async fn start() -> Self {
        let (port, profile) = (lasting_port(), TempDir::new().unwrap());
        let running = Running::start(Command::new("chromedriver").arg(format!("--port={port}")));
        let driver = Http::anonymous(&format!("http://127.0.0.1:{port}"));
        let user_data = format!("--user-data-dir={}", profile.path().display());
        let arguments = [
            "--headless=new",
            "--no-sandbox",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-quic",
            "--disable-dev-shm-usage",
            &user_data,
        ];
        let wanted = json!({"capabilities": {"alwaysMatch": {
            "goog:chromeOptions": {"args": arguments}, "goog:loggingPrefs": {"browser": "ALL"},
        }}});
        let session = until(|| async {
            let reply = driver.try_send(Method::POST, "/session", Some(wanted.clone())).await.ok_or("no driver yet")?;
            let session = reply.json()["value"]["sessionId"].as_str().map(str::to_owned);
            session.ok_or_else(|| format!("{:?}", reply.body))
        })
        .await;
        Self { driver, session, _running: running, _profile: profile }
    }

    async fn command(&self, name: &str, body: Value) -> Value {
        let reply = self.driver.post(&format!("/session/{}/{name}", self.session), body).await;
        let value = reply.json()["value"].clone();
        assert!(reply.status.is_success(), "{name}: {value:#}");
        value
    }

    async fn script(&self, script: &str) -> Value {
        self.command("execute/sync", json!({"script": script, "args": []})).await
    }

    async fn element(&self, id: &str) -> String {
        let found = self.command("element", json!({"using": "css selector", "value": format!("#{id}")})).await;
        let element = found.as_object().unwrap().values().next().unwrap().as_str().unwrap().to_owned();
        format!("element/{element}")
    }

    async fn click(&self, id: &str) {
        let element = self.element(id).await;
        self.script(&format!("document.getElementById('{id}').scrollIntoView({{block: 'center'}})")).await;
        self.command(&format!("{element}/click"), json!({})).await;
    }

    async fn write(&self, id: &str, text: &str) {
        let element = self.element(id).await;
        self.command(&format!("{element}/value"), json!({"text": text})).await;
    }

    /// The text of an element, as soon as it says this.
    async fn says(&self, id: &str, wanted: &str) -> String {
        until(|| async {
            let text = self.script(&format!("return document.getElementById('{id}').innerText")).await;
            let text = text.as_str().unwrap_or_default().to_owned();
            if text.contains(wanted) { Ok(text) } else { Err(format!("#{id} says {text:?}, and not {wanted:?}")) }
        })
        .await
    }
}

/// Somebody comes in, reads what is there, asks why, and purges, with a dry run first; nothing of strangers is anything but text.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_works_in_a_browser() {
    let service = Service::start(&["--admin-token", TOKEN]);
    let demo = Http::new(&service.url, "demo");
    let hostile = Http::new(&service.url, "<img src=x onerror=alert(1)>");
    for _ in 0..4 {
        demo.get("/agents/agent-1").await;
        hostile.get("/agents/%3Cscript%3Ealert(1)%3C%2Fscript%3E").await;
    }
    let browser = Browser::start().await;
    browser.command("url", json!({"url": format!("{}/_cache/", service.url)})).await;
    browser.write("token", "a wrong one").await;
    browser.click("enter").await;
    browser.says("gate", "oken").await;
    browser.script("document.getElementById('token').value = ''").await;
    browser.write("token", TOKEN).await;
    browser.click("enter").await;
    browser.says("card-requests", "8").await;
    let types = browser.says("types", "agent").await;
    assert!(types.contains("collection_metadata"), "{types}");
    browser.says("tenants", "<img src=x onerror=alert(1)>").await;

    browser.write("explain-path", "/agents/agent-1").await;
    browser.write("explain-tenant", "demo").await;
    browser.click("explain-go").await;
    browser.says("explain-result", "valid, and fresh").await;
    browser.write("search-text", "agent =agent-1").await;
    browser.write("search-tenant", "demo").await;
    browser.click("search-go").await;
    browser.says("search-result", "agent_service{demo}:agent:=agent-1").await;

    browser.write("purge-tenant", "demo").await;
    browser.script("const s = document.getElementById('purge-type'); s.value = 'agent'; s.dispatchEvent(new Event('input', {bubbles: true})); s.dispatchEvent(new Event('change', {bubbles: true}))").await;
    browser.write("purge-id", "agent-1").await;
    let is_off = async || browser.script("return document.getElementById('purge-go').disabled").await;
    assert_eq!(is_off().await, true, "not before a dry run");
    browser.click("purge-dry").await;
    browser.says("purge-result", "would be dropped").await;
    assert!(demo.get("/agents/agent-1").await.is_hit(), "that was a dry run");
    assert_eq!(is_off().await, false);
    browser.click("purge-go").await;
    until(|| async {
        let seen = demo.get("/agents/agent-1").await;
        if seen.is_miss() { Ok(()) } else { Err("not purged".to_owned()) }
    })
    .await;
    browser.says("writes", "admin").await;
    browser.says("misses", "uri-miss").await;

    // Narrow and dark: nothing leaves the page, and what is hostile is text.
    let dark = json!({"cmd": "Emulation.setEmulatedMedia", "params": {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}});
    browser.command("goog/cdp/execute", dark).await;
    let narrow = json!({"width": 400, "height": 900, "deviceScaleFactor": 1, "mobile": false});
    browser.command("goog/cdp/execute", json!({"cmd": "Emulation.setDeviceMetricsOverride", "params": narrow})).await;
    let width = browser.script("return document.documentElement.scrollWidth").await;
    assert!(width.as_u64().unwrap() <= 400, "{width}");
    assert_eq!(browser.script("return document.querySelectorAll('img, script[src]').length").await, 0);
    let log = browser.command("se/log", json!({"type": "browser"})).await;
    let wrong: Vec<_> = log.as_array().unwrap().iter().filter(|line| !line.to_string().contains("401")).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    let session = format!("/session/{}", browser.session);
    browser.driver.send(Method::DELETE, &session, None).await;
}
