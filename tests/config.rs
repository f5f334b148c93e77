//! The configuration from a file: one good one, and one for each mistake, which names what is wrong and the mend.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/web.rs"]
mod web;

use std::time::Duration;

use tower_cache_aside::{
    BodyKey, Cache, Canonical, Cascade, Coalesce, Config, DataType, Mutation, OnUnreachable, Query, Route, Tier, Ttl,
};
use web::{Web, ok, with};

const GOOD: &str = r#"
    tenant_header = "x-tenant-id"
    fence = "5s"
    version = "2"
    memory = "32 MiB"
    body_limit = 1000000
    report_header = true
    on_unreachable = "reject"

    [entities]
    agent = "lowercase"

    [types]
    agent = "standard"
    agent_config = "1h 30m"
    agents_list = { ttl = "250ms" }
    conversation = "permanent"
    page = { ttl = { min = "30s", max = "24h", risk = 0.05 }, ignored_headers = ["x-request-id"] }

    [[routes]]
    path = "/agents/{agent_id}"
    type = "agent"
    vary = ["accept-language"]
    credentials = "shared"

    [[routes]]
    path = "/agents"
    type = "agents_list"
    query = ["limit", "offset"]

    [[routes]]
    path = "/agents/{agent_id}/config"
    type = "agent_config"
    query = "ignore"
    credentials = { per_user = "x-user-id" }

    [[routes]]
    path = "/agents/{agent_id}/conversations/{id}"
    type = "conversation"
    resource = "id"
    entities = { id = "conversation" }
    declares_tags = true

    [[mutations]]
    method = "PUT"
    path = "/agents/{agent_id}"
    mutates = ["agent"]
    include = ["conversations"]

    [[mutations]]
    method = "POST"
    path = "/agents"
    creates = "agent"
    all = ["agents_list"]

    [[cascades]]
    type = "agent"
    drops = ["agent_config"]
    all = ["agents_list"]
    relations = { conversations = "conversation" }
    fenced = "10s"
    hold = "100ms"
"#;

#[tokio::test]
async fn a_file_says_the_same_as_code() {
    let search = "[[routes]]\npath = \"/search\"\ntype = \"result\"\nmethod = \"POST\"\nbody = \"json\"";
    let search = Config::from_toml(search).unwrap();
    assert_eq!(search.routes, [Route::new("/search", "result").method(http::Method::POST).body(BodyKey::Json)]);
    let config = Config::from_toml(GOOD).unwrap();
    assert_eq!(config.tenant_header.as_deref(), Some("x-tenant-id"));
    assert_eq!(config.fence, Some(Duration::from_secs(5)));
    assert_eq!((config.memory, config.body_limit), (Some(32 << 20), Some(1_000_000)));
    assert_eq!((config.report_header, config.on_unreachable), (Some(true), Some(OnUnreachable::Reject)));
    assert!(matches!(config.entities["agent"], Canonical::Lowercase));
    let shared = "tier = \"validated\"\n[types]\na = { ttl = \"1s\", tier = \"off\", coalesce = \"fleet\" }";
    let shared = Config::from_toml(shared).unwrap();
    assert_eq!(shared.tier, Some(Tier::Validated));
    assert_eq!(shared.types, [DataType::new("a", Duration::from_secs(1)).tier(Tier::Off).coalesce(Coalesce::Fleet)]);
    assert_eq!(
        config.types,
        [
            DataType::new("agent", Ttl::Standard),
            DataType::new("agent_config", Duration::from_secs(5_400)),
            DataType::new("agents_list", Duration::from_millis(250)),
            DataType::new("conversation", Ttl::Permanent),
            DataType::new("page", Ttl::adaptive(Duration::from_secs(30), Duration::from_secs(86_400), 0.05))
                .ignored_headers(["x-request-id"]),
        ]
    );
    assert_eq!(config.routes[1], Route::new("/agents", "agents_list").query(Query::only(["limit", "offset"])));
    let conversations = Route::new("/agents/{agent_id}/conversations/{id}", "conversation");
    assert_eq!(config.routes[3], conversations.resource("id").entity("id", "conversation").declares_tags());
    assert_eq!(config.mutations[0], Mutation::put("/agents/{agent_id}", "agent").include("conversations"));
    assert_eq!(config.mutations[1], Mutation::post("/agents").creates("agent").all("agents_list"));
    let cascade = Cascade::new("agent").drops(["agent_config"]).all(["agents_list"]);
    let cascade = cascade.relation("conversations", "conversation");
    assert_eq!(config.cascades, [cascade.fenced(Duration::from_secs(10)).hold(Duration::from_millis(100))]);
    assert!(config.has_relation("conversations") && !config.has_relation("agents"));

    let web = Web::new(&Cache::builder("test").config(config).build().unwrap(), |_| async { Ok(ok("text")) });
    let get = |path: &'static str| web.send(with(http::Method::GET, path, &[("x-tenant-id", "t")]));
    assert!(!get("/agents/1").await.is_hit());
    assert!(get("/agents/1").await.is_hit());
}

/// (what is added to a good file, or replaces a line of it; what the message names; what else it says).
#[test]
fn every_mistake_is_refused_with_its_place_and_mend() {
    let replace = |from: &str, to: &str| {
        assert!(GOOD.contains(from), "{from}");
        GOOD.replacen(from, to, 1)
    };
    let add = |text: &str| format!("{GOOD}\n{text}");
    let adaptive = |ttl: &str| replace("agent = \"standard\"", &format!("agent = {{ ttl = {{ {ttl} }} }}"));
    let learned = "{ min = \"30s\", max = \"24h\", risk = 0.05 }";
    let negative = format!("agent = {{ ttl = \"5m\", negative = {{ statuses = [404], ttl = {learned} }} }}");
    for (text, names, says) in [
        (replace("type = \"agent\"", "type = \"agnet\""), "/agents/{agent_id}", "unknown data type `agnet`"),
        (
            replace("mutates = [\"agent\"]", "mutates = [\"agnet\"]"),
            "PUT /agents/{agent_id}",
            "unknown data type `agnet`",
        ),
        (replace("drops = [\"agent_config\"]", "drops = [\"agnet\"]"), "agent", "unknown data type `agnet`"),
        (add("[[routes]]\npath = \"/agents/{agent_id}\"\ntype = \"agent\""), "/agents/{agent_id}", "remove"),
        (
            add("[[routes]]\npath = \"/agents/{other_id}\"\ntype = \"agent\""),
            "/agents/{other_id}",
            "/agents/{agent_id}",
        ),
        (add("[[routes]]\npath = \"/agents/{agent_id\"\ntype = \"agent\""), "/agents/{agent_id", ""),
        (add("[[routes]]\npath = \"agents\"\ntype = \"agent\""), "agents", "/"),
        (add("[[routes]]\npath = \"/x/{a_id}/{a_id}\"\ntype = \"agent\""), "/x/{a_id}/{a_id}", "entit"),
        (
            add("[[mutations]]\nmethod = \"PUT\"\npath = \"/agents/{agent_id}\"\nmutates = [\"agent\"]"),
            "PUT /agents/{agent_id}",
            "",
        ),
        (
            add("[[mutations]]\nmethod = \"GET\"\npath = \"/x/{agent_id}\"\nmutates = [\"agent\"]"),
            "GET /x/{agent_id}",
            "safe method",
        ),
        (add("[[mutations]]\nmethod = \"PUT\"\npath = \"/x/{agent_id}\""), "PUT /x/{agent_id}", "mutates nothing"),
        (add("[[mutations]]\nmethod = \"PUT\"\npath = \"/x/{y}\"\nmutates = [\"agent\"]"), "PUT /x/{y}", "agent_id"),
        (replace("include = [\"conversations\"]", "include = [\"convs\"]"), "PUT /agents/{agent_id}", "conversations"),
        (add("[[cascades]]\ntype = \"conversation\"\nrelations = { agents = \"agent\" }"), "agents", "resolver"),
        (add("[[cascades]]\ntype = \"agent\""), "agent", ""),
        (replace("agent = \"standard\"", "agent = \"0s\""), "agent", "zero"),
        (replace("agent = \"standard\"", "agent = \"soon\""), "agent", "soon"),
        (adaptive("min = \"30s\", max = \"24h\", risk = 0.0"), "`agent`", "above 0 and below 1"),
        (adaptive("min = \"30s\", max = \"24h\", risk = 1.0"), "`agent`", "above 0 and below 1"),
        (adaptive("min = \"30s\", max = \"24h\", risk = nan"), "`agent`", "above 0 and below 1"),
        (adaptive("min = \"1us\", max = \"24h\", risk = 0.05"), "`agent`", "zero"),
        (adaptive("min = \"25h\", max = \"24h\", risk = 0.05"), "`agent`", "exchange"),
        (adaptive("min = \"30s\", risk = 0.05"), "agent", "max"),
        (adaptive("min = \"30s\", max = \"24h\", risk = 0.05, jitter = 0.1"), "agent", "jitter"),
        (
            replace("agent = \"standard\"", "agent = { ttl = \"5m\", ignored_headers = [\"x y\"] }"),
            "`x y`",
            "header name",
        ),
        (replace("agent = \"standard\"", &negative), "`agent`", "`negative` is not learned"),
        (replace("agent = \"standard\"", "agent = 5"), "agent", ""),
        (replace("agent = \"standard\"", "agent = { ttl = \"5m\", ttll = 1 }"), "agent", "ttll"),
        (replace("agent = \"standard\"", "agent = \"standard\"\nagent = \"short\""), "agent", "duplicate"),
        (replace("ttl = \"250ms\"", "ttl = \"250ms\", tier = \"of\""), "agents_list", "off"),
        (replace("agent = \"lowercase\"", "agent = \"uid\""), "line 11", "uuid"),
        (replace("fence = \"5s\"", "fence = \"0s\""), "fence", "zero"),
        (replace("memory = \"32 MiB\"", "memory = \"32 MoB\""), "line 5", "64 MiB"),
        (replace("body_limit = 1000000", "body_limit = -1"), "line 6", "number of bytes"),
        (replace("\"reject\"", "\"refuse\""), "line 8", "reject"),
        (replace("conversation = \"permanent\"", "conversation = \"for ever\""), "line 17", "for ever"),
        (replace("fenced = \"10s\"\n", ""), "agent", "fenced"),
        (replace("tenant_header = \"x-tenant-id\"", "tenant_header = \"x tenant\""), "x tenant", "header"),
        (replace("tenant_header = \"x-tenant-id\"", ""), "tenant", "tenant_header"),
        (replace("vary = [\"accept-language\"]", "vary = [\"no such header\"]"), "/agents/{agent_id}", "header name"),
        (replace("resource = \"id\"", "resource = \"idd\""), "conversations/{id}", "idd"),
        (replace("credentials = \"shared\"", "credentials = \"all\""), "all", "shared"),
        (replace("query = \"ignore\"", "query = \"none\""), "none", "ignore"),
        (replace("type = \"agent\"", "typ = \"agent\""), "typ", "type"),
        (add("[surprise]\nx = 1"), "surprise", "routes"),
        ("tenant_header = ".to_owned(), "tenant_header", ""),
    ] {
        let result =
            Config::from_toml(&text).and_then(|config| Cache::builder("test").config(config).build().map(|_| ()));
        let message = result.map_or_else(|e| e.to_string(), |()| panic!("accepted: {names} {says}"));
        assert!(message.contains(names) && message.contains(says), "expected `{names}` and `{says}`:\n{message}");
    }
}

/// Mistakes that only code can make.
#[test]
fn the_builder_refuses_what_cannot_work() {
    let good = || {
        Cache::builder("test")
            .single_tenant("t")
            .data_type(DataType::new("agent", Ttl::Short))
            .route(Route::new("/agents/{agent_id}", "agent"))
    };
    good().build().unwrap();
    for (builder, says) in [
        (good().tenant_header("x-tenant-id"), "two tenants"),
        (good().data_type(DataType::new("agent", Ttl::Short)), "declared twice"),
        (good().tag_header("cache tag"), "cache tag"),
        (good().memory(1 << 20).body_limit(1 << 20), "body limit"),
        (good().resolver("nothing", |_, _| async { Ok::<_, std::io::Error>(vec![]) }), "nothing"),
        (good().fenced(Duration::ZERO), "zero"),
    ] {
        let message = builder.build().map_or_else(|e| e.to_string(), |_| panic!("accepted: {says}"));
        assert!(message.contains(says), "{message}");
    }
}

#[test]
fn the_name_of_a_service_is_part_of_its_keys_and_cannot_forge_anothers() {
    for name in ["", "a b", "a{b}", "a:b", "a%", &"x".repeat(200)] {
        let error = Cache::builder(name).build().unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("letters"), "{error}");
    }
    Cache::builder("agents-v1.eu_2").version("2").build().unwrap();
    assert!(Cache::builder("agents").version("2:x").build().unwrap_err().to_string().contains("2:x"));
}

#[test]
fn shared_stores_are_not_asked_without_a_pause_and_their_times_end() {
    for table in ["[redis]\nurls = [\"redis://127.0.0.1:1\"]", "[memcached]\nservers = [\"127.0.0.1:1\"]"] {
        let of = |line: &str| {
            let config = Config::from_toml(&format!("{table}\n{line}")).unwrap();
            Cache::builder("test").config(config).build().map_err(|e| e.to_string())
        };
        let names = ["heartbeat", "budget", "invalidate_budget", "settle", "generation_ttl"];
        for name in names {
            let error = of(&format!("{name} = \"500000000y\"")).unwrap_err();
            assert!(error.contains(name) && error.contains("choose one from"), "{error}");
            of(&format!("{name} = \"1s\"")).unwrap();
        }
        assert!(of("heartbeat = \"0s\"").unwrap_err().contains("1ms"));
        of("settle = \"0s\"").unwrap();
        // memcached's heartbeat keeps what does not live for a minute without.
        let rare = of("heartbeat = \"1m\"");
        assert_eq!(rare.err().is_some_and(|error| error.contains("15s")), table.contains("memcached"));
    }
}

#[test]
fn addresses_of_memcached_are_checked() {
    let of = |servers: &str| {
        let config = Config::from_toml(&format!("[memcached]\nservers = {servers}")).unwrap();
        Cache::builder("test").config(config).build().map(drop).map_err(|e| e.to_string())
    };
    for good in ["['a']", "['a:1', 'b:1', 'a:2']", "['[::1]:11211', '[::2]']", "['10.0.0.1']"] {
        of(good).unwrap();
    }
    for (bad, says) in [
        ("[]", "no memcached server"),
        ("['a:1', 'A:1']", "`A:1`: it is in the list twice"),
        ("['a', 'a:11211']", "twice"),
        ("['a:011211', 'a:11211']", "twice"),
        ("['::1']", "in brackets"),
        ("['[::1']", "in brackets"),
        ("['::1]']", "in brackets"),
        ("['a:0']", "the port"),
        ("['a:70000']", "the port"),
        ("['a b']", "host:port"),
        ("['memcached://a']", "host:port"),
        ("[':1']", "host:port"),
    ] {
        let error = of(bad).unwrap_err();
        assert!(error.contains(says), "{bad}: {error}");
    }
    let two = "[redis]\nurls = ['redis://a']\n[memcached]\nservers = ['a']";
    let error = Cache::builder("test").config(Config::from_toml(two).unwrap()).build().unwrap_err().to_string();
    assert!(error.contains("two stores"), "{error}");
    let tracked = "[memcached]\nservers = ['a']\n[types]\ndoc = { ttl = '1h', tier = 'on' }";
    let tracked = Config::from_toml(tracked).unwrap();
    let error = Cache::builder("test").single_tenant("t").config(tracked).build().unwrap_err().to_string();
    assert!(error.contains("`doc`") && error.contains("validated"), "{error}");
}

/// Neither in what is shown, nor in what is refused.
#[test]
fn passwords_are_not_told() {
    let url = |scheme: &str| format!("{scheme}://user:hunter2@127.0.0.1:6379/none/such");
    for scheme in ["redis", "rediss", "http", "redis+sentinel", "redis+cluster"] {
        let config = Config::from_toml(&format!("[redis]\nurls = [\"{}\"]", url(scheme))).unwrap();
        let builder = Cache::builder("test").config(config.clone());
        let shown = format!("{config:?} {builder:?}");
        let error = builder.build().map_or_else(|e| e.to_string(), |cache| format!("{cache:?}"));
        assert!(shown.contains("127.0.0.1") && !shown.contains("hunter2"), "{shown}");
        assert!(!error.contains("hunter2"), "{error}");
    }
}
