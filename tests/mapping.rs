//! Mappings: what cannot work is refused with the mend. (That what is accepted drops whatever a write makes stale, the twins show.)
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/mappings.rs"]
mod mappings;
#[path = "support/web.rs"]
mod web;

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicU64, Ordering},
};

use http::{Method, Response};
use mappings::Mapping;
use rand::{SeedableRng, rngs::SmallRng};
use tower_cache_aside::{
    Cache, CacheBuilder, CacheTags, Canonical, Cascade, Coalesce, DataType, EntryBuilder, Mutation, Route, Source,
    Tier, Ttl, store::MemoryStore,
};
use web::{Web, full, request};

/// `build` against the model: it refuses exactly those mappings under which some write leaves something stale.
#[test]
fn build_accepts_what_the_model_finds_no_hole_in() {
    let (mut accepted, mut refused) = (0, 0);
    for seed in 0..6_000 {
        let mapping = Mapping::random(&mut SmallRng::seed_from_u64(seed));
        match (mapping.builder().build(), mapping.hole()) {
            (Ok(_), None) => accepted += 1,
            (Err(_), Some(_)) => refused += 1,
            (Ok(_), Some(hole)) => panic!("seed {seed}: accepted, but {hole}\n{mapping:#?}"),
            (Err(error), None) => panic!("seed {seed}: refused without a hole: {error}\n{mapping:#?}"),
        }
    }
    assert!(accepted > 1_000 && refused > 1_000, "{accepted} {refused}");
}

// ---- what is refused -------------------------------------------------------------------------------------------------

fn agents() -> CacheBuilder {
    Cache::builder("test")
        .single_tenant("t")
        .data_type(DataType::new("agent", Ttl::Standard))
        .data_type(DataType::new("conversation", Ttl::Standard))
        .data_type(DataType::new("agents_list", Ttl::Short))
        .report_header(true)
}

fn refusal(builder: CacheBuilder) -> String {
    builder.build().map_or_else(|error| error.to_string(), |_| panic!("accepted"))
}

/// (the mapping, what the message names, the mend that it offers).
#[test]
fn what_cannot_work_is_refused_with_the_mend() {
    let agent = || agents().route(Route::new("/agents/{agent_id}", "agent"));
    let put = || Mutation::put("/agents/{agent_id}", "agent");
    let two = || {
        let cascade = Cascade::new("agent").drops(["conversation"]);
        agents().route(Route::new("/agents/{id}", "agent")).cascade(cascade)
    };
    let related = || Cascade::new("agent").relation("conversations", "conversation");
    let ask = |_, _| async { Ok::<_, std::io::Error>(vec![]) };
    for (builder, names, mend) in [
        // Routes of the mutated type that say nothing of which.
        (agent().route(Route::new("/agents", "agent")).mutation(put()), "GET /agents ", "a type of its own"),
        (
            agent().route(Route::new("/agents/by-name/{name}", "agent")).mutation(put()),
            "GET /agents/by-name/{name}",
            "declare tags",
        ),
        // Called like an entity, elsewhere, and not for certain that.
        (
            agent()
                .route(Route::new("/browsers/{agent}", "conversation"))
                .mutation(put())
                .cascade(Cascade::new("agent").drops(["conversation"])),
            "GET /browsers/{agent}",
            "{agent_id}",
        ),
        // Declared in the other order it is the same.
        (
            agents()
                .route(Route::new("/agents/by-name/{name}", "agent"))
                .route(Route::new("/agents/{agent_id}", "agent"))
                .mutation(put()),
            "GET /agents/by-name/{name}",
            "declare tags",
        ),
        // One good route among several is not enough.
        (
            agent()
                .route(Route::new("/agents/{agent_id}/conversations", "conversation"))
                .route(Route::new("/conversations/{conversation_id}", "conversation"))
                .cascade(Cascade::new("agent").drops(["conversation"])),
            "GET /conversations/{conversation_id}",
            "agent_id",
        ),
        // Nothing resolves it.
        (
            agent().route(Route::new("/conversations/{conversation_id}", "conversation")).cascade(related()),
            "relation `conversations`",
            "a resolver",
        ),
        // Agent 1 is not conversation 1.
        (two().route(Route::new("/conversations/{id}", "conversation")), "GET /conversations/{id}", "{agent_id}"),
        (
            agents()
                .route(Route::new("/agents/{id}", "agent"))
                .mutation(Mutation::put("/conversations/{id}/agent", "agent")),
            "PUT /conversations/{id}/agent",
            "{agent_id}",
        ),
        (
            agents().route(Route::new("/agents/{id}", "agent")).mutation(Mutation::put("/changes/{agent_id}", "agent")),
            "PUT /changes/{agent_id}",
            "{agent_id}",
        ),
        // What is missing is a name as the type's own routes have it, or as they should.
        (agent().mutation(Mutation::put("/changes/{x}", "agent")), "PUT /changes/{x}", "name one `agent_id`"),
        (
            agents().route(Route::new("/agents/{id}", "agent")).mutation(Mutation::put("/changes/{x}", "agent")),
            "PUT /changes/{x}",
            "call it `{agent_id}` here and in the routes",
        ),
        // Nor is one agent another, within one type.
        (
            agents()
                .route(Route::new("/agents/{id}", "agent"))
                .route(Route::new("/conversations/{id}/agent", "agent"))
                .mutation(Mutation::put("/agents/{id}", "agent")),
            "GET /conversations/{id}/agent",
            "{agent_id}",
        ),
        // A canonical form of what nothing names.
        (agent().entity("agnet", Canonical::Integer), "agnet", "{agnet_id}"),
        (
            agents().route(Route::new("/agents/{id}", "agent")).entity("agent", Canonical::Integer),
            "entity `agent`",
            "{agent_id}",
        ),
        // Whose ids would it be given?
        (
            agent()
                .cascade(Cascade::new("agent").relation("all", "conversation"))
                .cascade(Cascade::new("agents_list").relation("all", "conversation"))
                .resolver("all", ask),
            "resolver `all`",
            "otherwise",
        ),
        (agent().mutation(Mutation::post("/conversations").creates("conversation")), "creates `conversation`", "route"),
        (agent().mutation(put().include("friends")), "friends", "declare it"),
        (agent().cascade(related()).resolver("friends", ask), "friends", "remove the resolver"),
        // Patterns that match nothing.
        (agents().route(Route::new("/agents/:id", "agent")), "/agents/:id", "{id}"),
        (agents().route(Route::new("/agents/*rest", "agent")), "/agents/*rest", "{*rest}"),
        (agents().route(Route::new("/agents/{id}?x=1", "agent")), "?x=1", "query"),
        (agents().route(Route::new("/agents/{id}#x", "agent")), "#x", "query"),
        (agents().route(Route::new("/agents of/{id}", "agent")), "/agents of/", "percent-encoded"),
        (agents().route(Route::new("/straße/{id}", "agent")), "/straße", "percent-encoded"),
        (agent().mutation(Mutation::post("/agents/:id").mutates("agent")), "/agents/:id", "{id}"),
        (
            agent().mutation(Mutation::new(Method::from_bytes(b"put").unwrap(), "/agents/{agent_id}").mutates("agent")),
            "put /agents/{agent_id}",
            "write PUT",
        ),
        (
            agents().data_type(DataType::new("x", Ttl::Short).negative([404, 200], Ttl::Short)),
            "data type `x`",
            "404 and 410",
        ),
        (agents().tag_header("content-type"), "content-type", "choose one"),
        (agents().tag_header("Set-Cookie"), "Set-Cookie", "choose one"),
        (agents().targeted_header("cache-control"), "cache-control", "choose one"),
        (agents().tag_header("x-a").targeted_header("x-a"), "x-a", "rename one"),
        // What needs a store that others see.
        (
            agents().data_type(DataType::new("x", Ttl::Short).coalesce(Coalesce::Fleet)),
            "data type `x`",
            "share a store",
        ),
        (agents().data_type(DataType::new("x", Ttl::Short).tier(Tier::On)), "data type `x`", "share a store"),
        (agents().tier(Tier::Validated), "tier", "share a store"),
        (agents().memory(1 << 20).store(MemoryStore::new(1 << 20)), "memory", "take it out"),
    ] {
        let message = refusal(builder);
        assert!(message.contains(names) && message.contains(mend), "expected `{names}` and `{mend}`:\n{message}");
    }
}

/// The mends of the refusals above.
#[test]
fn what_the_refusals_offer_is_accepted() {
    let put = || Mutation::put("/agents/{agent_id}", "agent");
    let agent = || agents().route(Route::new("/agents/{agent_id}", "agent"));
    let named = || Route::new("/agents/by-name/{name}", "agent");
    let ask = |_, _| async { Ok::<_, std::io::Error>(vec![]) };
    let conversation = || Route::new("/conversations/{conversation_id}", "conversation");
    let related = || Cascade::new("agent").relation("conversations", "conversation");
    for builder in [
        agent().route(named().declares_tags()).mutation(put()),
        agent().route(named()).mutation(put().all("agent")),
        agent().route(Route::new("/agents/of/{owner}", "agent").entity("owner", "agent")).mutation(put()),
        agent()
            .route(Route::new("/agents", "agents_list"))
            .mutation(put())
            .cascade(Cascade::new("agent").all(["agents_list"])),
        agent().route(conversation()).cascade(related()).resolver("conversations", ask),
        agent().route(conversation().declares_tags()).cascade(related()),
        agents()
            .route(Route::new("/agents/{id}", "agent"))
            .route(Route::new("/agents/{id}/conversation", "conversation"))
            .cascade(Cascade::new("agent").drops(["conversation"])),
    ] {
        builder.build().unwrap();
    }
}

/// A task's write drops its project's lists, a project's delete drops its tasks: each is followed once.
#[tokio::test]
async fn relations_may_lead_up_and_down() {
    let (ups, downs) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let (up, down) = (ups.clone(), downs.clone());
    let cache = Cache::builder("test")
        .single_tenant("t")
        .data_type(DataType::new("project", Ttl::Standard))
        .data_type(DataType::new("project_tasks", Ttl::Standard))
        .data_type(DataType::new("task", Ttl::Standard))
        .route(Route::new("/projects/{project_id}", "project"))
        .route(Route::new("/projects/{project_id}/tasks", "project_tasks"))
        .route(Route::new("/tasks/{task_id}", "task"))
        .mutation(Mutation::put("/tasks/{task_id}", "task").include("project"))
        .mutation(Mutation::delete("/projects/{project_id}", "project").include("tasks"))
        .cascade(Cascade::new("project").drops(["project_tasks"]).relation("tasks", "task"))
        .cascade(Cascade::new("task").relation("project", "project"))
        .resolver("project", move |_, tasks| {
            up.fetch_add(1, Ordering::SeqCst);
            async move { Ok::<_, std::io::Error>(tasks.into_iter().map(|_| "p".to_owned()).collect()) }
        })
        .resolver("tasks", move |_, projects| {
            down.fetch_add(1, Ordering::SeqCst);
            async move { Ok::<_, std::io::Error>(projects.iter().flat_map(|_| ["1", "2"]).map(str::to_owned).collect()) }
        })
        .report_header(true)
        .build()
        .unwrap();
    let web = Web::new(&cache, |_| async { Ok(web::ok("text")) });
    let paths = ["/projects/p", "/projects/p/tasks", "/tasks/1", "/tasks/2", "/projects/q/tasks", "/tasks/9"];
    for (method, path) in [(Method::PUT, "/tasks/1"), (Method::DELETE, "/projects/p")] {
        for path in paths {
            web.get(path).await;
        }
        for counter in [&ups, &downs] {
            counter.store(0, Ordering::SeqCst);
        }
        web.send(request(method, path)).await;
        // Before the handler and after it; the way back is not gone again and again.
        assert!(ups.load(Ordering::SeqCst) <= 4 && downs.load(Ordering::SeqCst) <= 4, "{ups:?} {downs:?}");
        let mut hits = vec![];
        for path in paths {
            hits.push(web.get(path).await.is_hit());
        }
        assert_eq!(hits, [false, false, false, false, true, true], "{path}");
    }
}

/// By hand, what would drop nothing is an error, which names it, and nothing is dropped.
#[tokio::test]
async fn typos_by_hand_are_errors() {
    let delete = Mutation::delete("/agents/{agent_id}", "agent");
    let cache = agents()
        .route(Route::new("/agents/{agent_id}", "agent"))
        .route(Route::new("/agents", "agents_list"))
        .route(Route::new("/conversations/{conversation_id}", "conversation"))
        .mutation(delete.include("conversations").all("conversation"))
        .cascade(Cascade::new("agent").all(["agents_list"]).relation("conversations", "conversation"))
        .build()
        .unwrap();
    let by_hand = || cache.invalidate("t");
    for (invalidation, says) in [
        (by_hand().mutated("agnet", "1"), "unknown data type `agnet`"),
        (by_hand().all("agnet"), "unknown data type `agnet`"),
        (by_hand().mutated("agent", "1").include("nope"), "no cascade of what it mutates has a relation `nope`"),
        // Its routes have no ids.
        (by_hand().mutated("agents_list", "1"), "GET /agents "),
        // A relation that finds nothing, unless the mutation drops the type whole.
        (by_hand().mutated("agent", "1").include("conversations"), "GET /conversations/{conversation_id} "),
        (cache.invalidate("other").all("agent"), "single tenant `t`"),
    ] {
        let error = invalidation.run().await.unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    by_hand().mutated("agent", "1").run().await.unwrap();
    by_hand().mutated("agent", "1").include("conversations").all("conversation").run().await.unwrap();
}

/// A changed entity that is come to again as a child follows all of its relations.
#[tokio::test]
async fn what_is_found_again_is_followed_further() {
    let ids = |ids: &'static [&'static str]| {
        move |_, _| async move { Ok::<_, std::io::Error>(ids.iter().map(|id| (*id).to_owned()).collect()) }
    };
    let cache = Cache::builder("test")
        .single_tenant("t")
        .data_type(DataType::new("project", Ttl::Standard))
        .data_type(DataType::new("task", Ttl::Standard))
        .data_type(DataType::new("comment", Ttl::Standard))
        .route(Route::new("/projects/{project_id}/tasks/{task_id}", "task"))
        .route(Route::new("/projects/{project_id}", "project"))
        .route(Route::new("/comments/{comment_id}", "comment"))
        .mutation(
            Mutation::delete("/projects/{project_id}/tasks/{task_id}", "task").mutates("project").include("tasks"),
        )
        .cascade(Cascade::new("project").relation("tasks", "task"))
        .cascade(Cascade::new("task").relation("comments", "comment"))
        .resolver("tasks", ids(&["1", "2"]))
        .resolver("comments", ids(&["7"]))
        .build()
        .unwrap();
    let web = Web::new(&cache, |_| async { Ok(web::ok("text")) });
    web.get("/comments/7").await;
    web.get("/comments/8").await;
    web.send(request(Method::DELETE, "/projects/p/tasks/1")).await;
    assert!(!web.get("/comments/7").await.is_hit() && web.get("/comments/8").await.is_hit());
}

/// A hub with many neighbours, each of which leads back, is not gone through in every order.
#[test]
fn many_relations_up_and_down_are_compiled_at_once() {
    let names: Vec<_> = (0..12).map(|i| format!("k{i}")).collect();
    let mut builder = Cache::builder("test").single_tenant("t").data_type(DataType::new("hub", Ttl::Standard));
    let mut hub = Cascade::new("hub");
    for name in &names {
        let ask = |_, ids: Vec<String>| async { Ok::<_, std::io::Error>(ids) };
        let (down, up) = (format!("{name}s"), format!("hub_of_{name}"));
        hub = hub.relation(&down, name);
        builder = builder
            .data_type(DataType::new(name, Ttl::Standard))
            .route(Route::new(format!("/{name}/{{{name}_id}}"), name))
            .mutation(Mutation::put(format!("/{name}/{{{name}_id}}"), name).include(&up))
            .cascade(Cascade::new(name).relation(&up, "hub"))
            .resolver(down, ask)
            .resolver(up, ask);
    }
    let cache = builder.cascade(hub).build().unwrap();
    assert_eq!(cache.describe().writes[0].drops.len(), 14, "itself, and by its relation the hub and all of its");
}

// ---- who is who ------------------------------------------------------------------------------------------------------

/// A write by any spelling of an id drops what was read by any other, wherever the spelling comes from.
#[tokio::test]
async fn an_id_is_one_id() {
    let uuid = "67e55044-10b1-426f-9247-bb680e5fe0c8";
    let (capitals, plain) = (uuid.to_uppercase(), uuid.replace('-', ""));
    let by = || Canonical::by(|id| id.strip_prefix("agent-").or(Some(id)).map(str::to_owned));
    let another = "/agents/00000000-0000-0000-0000-000000000000";
    for (canonical, spellings, no_id, other) in [
        (Canonical::Integer, ["42", "042", "+42", "%342"], "x", "/agents/7"),
        (Canonical::Uuid, [uuid, &capitals, &plain, &format!("%7B{uuid}%7D")], "42", another),
        (Canonical::Lowercase, ["zo%C3%AB", "ZO%C3%8B", "Zo%c3%ab", "zO%C3%AB"], "%FF", "/agents/zoe"),
        (by(), ["7", "agent-7", "%61gent-7", "agent%2D7"], "%FF", "/agents/8"),
    ] {
        let listed = Arc::new(Mutex::new(String::new()));
        let resolved = listed.clone();
        let cache = agents()
            .entity("agent", canonical)
            .data_type(DataType::new("note", Ttl::Standard))
            .route(Route::new("/agents/{agent_id}", "agent"))
            .route(Route::new("/notes/{note_id}", "note").declares_tags())
            .mutation(Mutation::put("/agents/{agent_id}", "agent"))
            .mutation(Mutation::post("/agents").creates("agent"))
            .mutation(Mutation::put("/conversations/{conversation_id}", "conversation").include("agents"))
            .cascade(Cascade::new("conversation").relation("agents", "agent"))
            .cascade(Cascade::new("agent").drops(["note"]))
            .resolver("agents", move |_, _| {
                let id = resolved.lock().unwrap().clone();
                async { Ok::<_, std::io::Error>(vec![id]) }
            })
            .build()
            .unwrap();
        let tag = Arc::new(Mutex::new(String::new()));
        let declared = tag.clone();
        let web = Web::new(&cache, move |request| {
            let tag = declared.lock().unwrap().clone();
            async move {
                let response = Response::builder().status(if request.method() == Method::POST { 201 } else { 200 });
                let response = response.header("location", format!("/agents/{tag}"));
                let is_note = request.uri().path().starts_with("/notes");
                let response = if is_note { response.header("cache-tag", format!("agent={tag}")) } else { response };
                Ok(response.body(full("text")).unwrap())
            }
        });
        for read in spellings {
            for write in spellings {
                let decoded = percent_encoding::percent_decode_str(write).decode_utf8().unwrap().into_owned();
                *listed.lock().unwrap() = decoded.clone();
                for way in 0..4 {
                    *tag.lock().unwrap() = read.to_owned();
                    let agent = format!("/agents/{read}");
                    web.get(&agent).await;
                    web.get("/notes/1").await;
                    web.get(other).await;
                    assert!(web.get(&agent).await.is_hit() && web.get("/notes/1").await.is_hit(), "{read}");
                    assert!(web.get(&format!("/agents/{write}")).await.is_hit(), "{write} is {read}");
                    *tag.lock().unwrap() = write.to_owned();
                    match way {
                        0 => _ = web.put(&format!("/agents/{write}")).await,
                        1 => _ = web.send(request(Method::POST, "/agents")).await,
                        2 => _ = web.put("/conversations/1").await,
                        _ => _ = cache.invalidate("t").mutated("agent", &decoded).run().await.unwrap(),
                    }
                    for path in [&agent[..], "/notes/1"] {
                        assert!(!web.get(path).await.is_hit(), "{way}: {path} after a write of {write}");
                    }
                    assert!(web.get(other).await.is_hit(), "{way}: {write} is not all of them");
                }
            }
        }
        // What is no id: read past the cache, and a write of everything.
        let path = format!("/agents/{}", spellings[0]);
        web.get(&path).await;
        for _ in 0..2 {
            let reply = web.get(&format!("/agents/{no_id}")).await;
            assert_eq!(reply.cache_status(), "fwd=bypass; detail=id", "{no_id}");
        }
        assert!(web.get(&path).await.is_hit());
        web.put(&format!("/agents/{no_id}")).await;
        assert!(!web.get(&path).await.is_hit(), "{no_id}");
    }
}

/// The typed function, too: its ids and its scope.
#[tokio::test]
async fn an_id_is_one_id_without_http() {
    let cache = agents()
        .entity("agent", Canonical::Integer)
        .cascade(Cascade::new("agent").drops(["conversation"]))
        .build()
        .unwrap();
    let load = async |id: &str| {
        let entry = cache.entry::<u32>("conversation", "c").scope("agent", id);
        entry.fetch(|| async { Ok::<_, std::io::Error>(Some(1)) }).unwrap().await.unwrap().1.source
    };
    assert_eq!((load("042").await, load("42").await), (Source::Origin, Source::Cache));
    cache.invalidate("t").mutated("agent", "+42").run().await.unwrap();
    assert_eq!((load("0042").await, load("42").await), (Source::Origin, Source::Cache));
    assert_eq!((load("x").await, load("x").await), (Source::Origin, Source::Origin));
    cache.invalidate("t").mutated("agent", "x").run().await.unwrap();
    assert_eq!(load("42").await, Source::Origin, "of no id: the whole type");
}

/// By hand the tenant is the service's, and cannot be forgotten; nor can what a cascade counts on.
#[tokio::test]
async fn entries_by_hand_are_found_by_writes() {
    let fetch = || async { Ok::<_, std::io::Error>(Some(1)) };
    let cache = agents().route(Route::new("/agents/{agent_id}", "agent"));
    let cache = cache.cascade(Cascade::new("agent").drops(["conversation"])).build().unwrap();
    let source = async |entry: EntryBuilder<u32>| entry.fetch(fetch).unwrap().await.unwrap().1.source;
    assert_eq!(source(cache.entry("agent", "1")).await, Source::Origin);
    assert_eq!(source(cache.entry("agent", "1").tenant("t")).await, Source::Cache);
    cache.invalidate("t").mutated("agent", "1").run().await.unwrap();
    assert_eq!(source(cache.entry("agent", "1")).await, Source::Origin);
    for (entry, says) in [
        (cache.entry::<u32>("agnet", "1"), "unknown data type `agnet`"),
        (cache.entry("agent", "1").tenant("other"), "single tenant `t`"),
        (cache.entry("conversation", "1"), "by agent"),
    ] {
        let error = entry.fetch(fetch).err().unwrap().to_string();
        assert!(error.contains(says), "{error}");
    }
    let with_tenants =
        Cache::builder("test").tenant_header("x-tenant-id").data_type(DataType::new("agent", Ttl::Short));
    let with_tenants = with_tenants.build().unwrap();
    for entry in [with_tenants.entry::<u32>("agent", "1"), with_tenants.entry("agent", "1").tenant("")] {
        assert!(entry.fetch(fetch).err().unwrap().to_string().contains("no tenant"));
    }
    assert!(with_tenants.invalidate("").all("agent").run().await.is_err());
    assert!(with_tenants.entry("agent", "1").tenant("a").fetch(fetch).is_ok());
}

/// In whatever order and however often it says them, a response falls with each of a thousand tags, and those it does not say
/// again are none of its tags. More are not asked for with every hit: that one is not stored.
#[tokio::test]
async fn a_response_may_have_a_thousand_tags() {
    let cache = agents()
        .route(Route::new("/conversations/{conversation_id}", "conversation").declares_tags())
        .cascade(Cascade::new("agent").drops(["conversation"]))
        .build()
        .unwrap();
    let declared = Arc::new(Mutex::new(vec![]));
    let declares = declared.clone();
    let web = Web::new(&cache, move |_| {
        let mut response = web::ok("text");
        for id in declares.lock().unwrap().iter() {
            CacheTags::of(response.extensions_mut()).add("agent", u32::to_string(id));
        }
        async { Ok(response) }
    });
    let drop_agent = async |id: u32| cache.invalidate("t").mutated("agent", id.to_string()).run().await.unwrap();
    for (ids, dropped) in [
        ((0..1_000).collect::<Vec<_>>(), 999),
        ((0..1_000).rev().collect(), 0),
        ((0..1_500).map(|n| n % 500).collect(), 499),
        ((250..1_000).collect(), 700),
        (vec![3, 1, 2], 1),
    ] {
        *declared.lock().unwrap() = ids.clone();
        for _ in 0..2 {
            assert!(!web.get("/conversations/1").await.is_hit() && web.get("/conversations/1").await.is_hit());
            drop_agent(2_000).await;
            if let Some(other) = (0..1_000).find(|id| !ids.contains(id)) {
                drop_agent(other).await;
            }
            assert!(web.get("/conversations/1").await.is_hit(), "{} tags", ids.len());
            drop_agent(dropped).await;
        }
    }
    *declared.lock().unwrap() = (0..1_001).collect();
    assert_eq!(web.get("/conversations/1").await.cache_status(), "fwd=uri-miss; detail=bad-tags");
}

/// Tags that no cascade could match: not stored, and the reason is said; tags of several layers add up; clients see none.
#[tokio::test]
async fn declared_tags_are_checked_add_up_and_stay_inside() {
    let cache = agents()
        .route(Route::new("/agents/{agent_id}", "agent"))
        .route(Route::new("/conversations/{conversation_id}", "conversation").declares_tags())
        .cascade(Cascade::new("agent").drops(["conversation"]))
        .build()
        .unwrap();
    let header = Arc::new(Mutex::new(""));
    let declared = header.clone();
    let web = Web::new(&cache, move |_| {
        let header = *declared.lock().unwrap();
        async move { Ok(Response::builder().header("cache-tag", header).body(full("text")).unwrap()) }
    });
    for (tags, stored) in [
        ("agent=42", true),
        (" agent=42 ,, agent=7,", true),
        ("agent=%34%32", true),
        ("", true),
        ("agent = 42", false),
        ("Agent=42", false),
        ("agent=\"42\"", false),
        ("agent=", false),
        ("=42", false),
        ("agent", false),
        ("agent=4 2", false),
        ("agent=a=b", false),
        ("user=7", false),
        ("agent=1, user=7", false),
    ] {
        *header.lock().unwrap() = tags;
        let first = web.get("/conversations/1").await;
        assert_eq!(first.cache_status().ends_with("; detail=bad-tags"), !stored, "{tags}: {first:?}");
        let second = web.get("/conversations/1").await;
        assert_eq!(second.is_hit(), stored, "{tags}");
        assert!(first.header("cache-tag").is_empty() && second.header("cache-tag").is_empty(), "{tags}");
        cache.invalidate("t").all("conversation").run().await.unwrap();
        *header.lock().unwrap() = "user=7";
        assert_eq!(web.get("/elsewhere").await.header("cache-tag"), "", "what no route matches leaks none either");
    }

    let web = Web::new(&cache, |_| async {
        let mut response = web::ok("text");
        CacheTags::of(response.extensions_mut()).add("agent", "1");
        // Another layer, which knows nothing of the first.
        CacheTags::of(response.extensions_mut()).add("agent", "2");
        response.headers_mut().append("cache-tag", "agent=3".parse().unwrap());
        response.headers_mut().append("cache-tag", "agent=4".parse().unwrap());
        Ok(response)
    });
    for agent in 1..=4 {
        web.get("/conversations/1").await;
        assert!(web.get("/conversations/1").await.is_hit());
        cache.invalidate("t").mutated("agent", agent.to_string()).run().await.unwrap();
        assert!(!web.get("/conversations/1").await.is_hit(), "{agent}");
    }
}

/// The review of a mapping: every write with what it drops, every route with what drops it.
#[test]
fn a_mapping_is_described_on_one_page() {
    let cache = agents()
        .route(Route::new("/agents/{agent_id}", "agent"))
        .route(Route::new("/agents", "agents_list"))
        .route(Route::new("/conversations/{conversation_id}", "conversation").declares_tags())
        .mutation(Mutation::put("/agents/{agent_id}", "agent").include("conversations"))
        .mutation(Mutation::post("/import").all("conversation"))
        .cascade(Cascade::new("agent").all(["agents_list"]).relation("conversations", "conversation"))
        .build()
        .unwrap();
    let description = cache.describe();
    let json = serde_json::to_value(&description).unwrap();
    assert_eq!(json["writes"][0]["name"], "PUT /agents/{agent_id}");
    assert_eq!(
        json["writes"][0]["drops"],
        serde_json::json!([
            {"data_type": "agent", "relation": null, "by": ["agent"]},
            {"data_type": "agents_list", "relation": null, "by": []},
            {"data_type": "conversation", "relation": "conversations", "by": ["agent"]},
        ])
    );
    let by: Vec<_> = description.reads.iter().map(|read| (&*read.name, read.dropped_by.join(", "))).collect();
    assert_eq!(
        by,
        [
            ("GET /agents/{agent_id}", "PUT /agents/{agent_id}".to_owned()),
            ("GET /agents", "PUT /agents/{agent_id}".to_owned()),
            ("GET /conversations/{conversation_id}", "PUT /agents/{agent_id}, POST /import".to_owned()),
        ]
    );
    let text = description.to_string();
    for line in [
        "PUT /agents/{agent_id}",
        "    agents_list                      all of the tenant",
        "    conversation                     of the agent  (conversations)",
        "GET /agents  agents_list, 5m",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
}
