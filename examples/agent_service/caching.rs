//! Everything about caching, in one place: the catalogue and route table (`agents.toml`, or `--config`), the store, and the
//! two layers around the application. No handler knows of it.

use std::time::Duration;

use axum::{Router, body::Body, middleware, response::Response};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tower_cache_aside::{
    Admin, Cache, CacheTags, Coalesce as Reach, Config, DURATION_BUCKETS, RedisStream, SIZE_BUCKETS, Tier, Warm,
    Warming,
    store::{MemcachedStore, RedisStore, Regional},
};

use crate::{
    cli::{Args, Coalesce},
    database::Database,
    routes::AgentOf,
};

const AGENTS: &str = include_str!("agents.toml");

/// In-process bytes over Redis.
const MEMORY: u64 = 64 << 20;

/// The cache; an error is a mistake in the configuration.
pub fn cache(args: &Args, db: Database) -> Result<Cache, String> {
    let (name, text) = match &args.config {
        None => ("the built-in catalogue".to_owned(), AGENTS.to_owned()),
        Some(path) => {
            let text = std::fs::read_to_string(path).map_err(|e| format!("--config {}: {e}", path.display()))?;
            (format!("--config {}", path.display()), text)
        }
    };
    let mut config = Config::from_toml(&text).map_err(|e| format!("{name}: {}", one_line(&e.to_string())))?;
    config.tenant_header.get_or_insert_with(|| "x-tenant-id".to_owned());
    if args.coalesce == Coalesce::Fleet {
        config.types = config.types.into_iter().map(|t| t.coalesce(Reach::Fleet)).collect();
    }
    if let Some(most) = args.max_lag {
        if !args.outbox && args.events.is_none() && args.region.is_none() {
            return Err("--max-lag-ms: nothing tells of changes; add --outbox on, --events or --region".to_owned());
        }
        config.types = config.types.into_iter().map(|t| t.max_lag(most)).collect();
    }
    let resolves = config.has_relation("conversations");
    let in_process = if args.l1 == Tier::Off { 0 } else { MEMORY };
    if !args.memcached.is_empty() {
        let store = MemcachedStore::builder(&args.memcached).prefix(&args.prefix).in_process(in_process);
        (config.memcached, config.tier, config.memory) = (Some(store), Some(args.l1), None);
    }
    if !args.redis.is_empty() {
        config.redis = Some(RedisStore::builder(&args.redis).prefix(&args.prefix).in_process(in_process));
        config.tier = Some(args.l1);
        config.memory = None;
    }
    regions(args, &mut config)?;
    let builder = Cache::builder("agent_service").config(config).report_header(true);
    let mut builder = builder.on_unreachable(args.on_unreachable).metrics_tenants(args.metrics_tenants);
    if let Some(share) = args.audit {
        builder = builder.audit(share);
    }
    if resolves {
        builder = builder.resolver("conversations", move |tenant, agents| {
            let db = db.clone();
            async move { db.conversations_of(&tenant, &agents).await }
        });
    }
    if let Some(what) = args.unmapped {
        builder = builder.on_unmapped(what);
    }
    if let Some(lease) = args.fence {
        builder = builder.fenced(lease);
    }
    builder.build().map_err(|e| {
        let what = one_line(&e.to_string());
        match what.split(' ').next() {
            Some("Redis") if !args.redis.is_empty() => format!("--redis: {what}"),
            Some("region" | "regions:" | "regions") if args.region.is_some() => format!("--region, --peer: {what}"),
            Some("memcached") if !args.memcached.is_empty() => format!("--memcached: {what}"),
            Some("two") => format!("--redis, --memcached: {what}"),
            Some("`tier`:") => format!("--l1: {}", what.trim_start_matches("`tier`: ")),
            _ => format!("{name}: {what}"),
        }
    })
}

/// The other regions, which hear what this one drops.
fn regions(args: &Args, config: &mut Config) -> Result<(), String> {
    match &args.region {
        Some(_) if args.redis.is_empty() => Err("--region: a region has a Redis of its own; add --redis".to_owned()),
        Some(region) => {
            let regions = Regional::builder(region);
            let regions = args.peers.iter().fold(regions, |regions, (name, url)| regions.peer(name, url));
            config.regions = Some(args.hold.into_iter().fold(regions, |regions, hold| regions.hold(hold)));
            Ok(())
        }
        None if args.peers.is_empty() && args.hold.is_none() => Ok(()),
        None => Err("--peer, --hold-ms: they are of a region; name this one with --region".to_owned()),
    }
}

/// Follows what tells of changes that are made without this service.
pub fn follow(args: &Args, cache: &Cache, db: &Database) -> Result<(), String> {
    if args.outbox {
        let outbox = db.outbox().map_err(|e| format!("--outbox: {e}"))?;
        cache.follow(outbox).map_err(|e| format!("--outbox: {e}"))?;
    }
    if let Some((url, stream)) = &args.events {
        let events = RedisStream::builder(url, stream);
        // What a fleet has in common is told by one of its processes.
        let is_alone = args.redis.is_empty() && args.memcached.is_empty();
        let events = if is_alone { events } else { events.group(&args.prefix) };
        let source = events.build().map_err(|e| format!("--events: {e}"))?;
        cache.follow(source).map_err(|e| format!("--events: {e}"))?;
    }
    Ok(())
}

/// Puts the cache around the application.
pub fn apply(router: Router, cache: &Cache) -> Router {
    let router = router.layer(middleware::map_response(declare_agent));
    router.layer(cache.layer()).layer(cache.invalidate_layer())
}

/// Keeps what is popular warm: asks it of the application, cache and all, before anybody does. Without a shared store the list is kept
/// beside the database.
pub fn warm(app: &Router, args: &Args, cache: &Cache) -> Result<Option<Warming>, String> {
    if !args.warm {
        return Ok(None);
    }
    let mut warm = Warm::new();
    if let (Some(db), true, true) = (&args.db, args.redis.is_empty(), args.memcached.is_empty()) {
        let mut list = db.clone().into_os_string();
        list.push(".popular");
        warm = warm.file(list);
    }
    cache.warm(app.clone().into_service(), Body::from, warm).map(Some).map_err(|e| format!("--warm: {e}"))
}

/// The service for those who look after the cache: beside the application, not inside its layers.
pub fn admin(app: Router, args: &Args, cache: &Cache) -> Result<Router, String> {
    let Some(token) = &args.admin_token else { return Ok(app) };
    let admin = Admin::bearer(token).map_err(|e| format!("--admin-token: {e}"))?;
    Ok(app.nest_service("/_cache", cache.admin(admin)))
}

/// Where metrics go, and who writes them down for Prometheus. Within a runtime.
pub fn exporter() -> Result<PrometheusHandle, String> {
    let named = |suffix: &str| Matcher::Suffix(suffix.to_owned());
    let builder = PrometheusBuilder::new()
        .set_buckets_for_metric(named("_seconds"), &DURATION_BUCKETS)
        .and_then(|builder| builder.set_buckets_for_metric(named("_bytes"), &SIZE_BUCKETS));
    let handle = builder.and_then(PrometheusBuilder::install_recorder).map_err(|e| format!("metrics: {e}"))?;
    // What was recorded waits to be added up, and grows until it is.
    let upkeep = handle.clone();
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(Duration::from_secs(5)).await;
            upkeep.run_upkeep();
        }
    });
    Ok(handle)
}

/// A conversation falls with its agent, whatever the path it was read by.
async fn declare_agent(mut response: Response) -> Response {
    if let Some(AgentOf(agent)) = response.extensions_mut().remove() {
        CacheTags::of(response.extensions_mut()).add("agent", agent);
    }
    response
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
