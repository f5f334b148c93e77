//! Everything about caching, in one place: the catalogue and route table (`agents.toml`, or `--config`), the store, and the
//! two layers around the application. No handler knows of it.

use axum::{Router, middleware, response::Response};
use tower_cache_aside::{Cache, CacheTags, Coalesce as Reach, Config, Tier, store::RedisStore};

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
    let not_built = [("--admin-token", args.admin_token.is_some()), ("--warm on", args.warm)];
    if let Some((flag, _)) = not_built.iter().find(|(_, used)| *used) {
        return Err(format!("{flag}: not built yet"));
    }
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
    let resolves = config.has_relation("conversations");
    if !args.redis.is_empty() {
        let in_process = if args.l1 == Tier::Off { 0 } else { MEMORY };
        config.redis = Some(RedisStore::builder(&args.redis).prefix(&args.prefix).in_process(in_process));
        config.tier = Some(args.l1);
        config.memory = None;
    }
    let builder = Cache::builder("agent_service").config(config).report_header(true);
    let mut builder = builder.on_unreachable(args.on_unreachable);
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
        if what.starts_with("Redis ") && !args.redis.is_empty() {
            format!("--redis: {what}")
        } else {
            format!("{name}: {what}")
        }
    })
}

/// Puts the cache around the application.
pub fn apply(router: Router, cache: &Cache) -> Router {
    let router = router.layer(middleware::map_response(declare_agent));
    router.layer(cache.layer()).layer(cache.invalidate_layer())
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
