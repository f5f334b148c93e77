//! Everything about caching, in one place: the catalogue and route table (`agents.toml`, or `--config`), and the two
//! layers around the application. No handler knows of it.

use axum::{Router, middleware, response::Response};
use tower_cache_aside::{Cache, CacheTags, Config};

use crate::{
    cli::{Args, Coalesce},
    database::Database,
    routes::AgentOf,
};

const AGENTS: &str = include_str!("agents.toml");

/// Puts the cache around the application; an error is a mistake in the configuration.
pub fn apply(router: Router, args: &Args, db: Database) -> Result<Router, String> {
    let not_built = [
        ("--redis", !args.redis.is_empty()),
        ("--l1 off", !args.l1),
        ("--coalesce fleet", args.coalesce == Coalesce::Fleet),
        ("--fence-ms", args.fence.is_some()),
        ("--admin-token", args.admin_token.is_some()),
        ("--warm on", args.warm),
    ];
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
    let resolves = config.has_relation("conversations");
    let mut builder = Cache::builder().config(config).report_header(true);
    if resolves {
        builder = builder.resolver("conversations", move |tenant, agent| {
            let db = db.clone();
            async move { db.conversations_of(&tenant, &agent).await }
        });
    }
    let cache = builder.build().map_err(|e| format!("{name}: {}", one_line(&e.to_string())))?;
    let router = router.layer(middleware::map_response(declare_agent));
    Ok(router.layer(cache.layer()).layer(cache.invalidate_layer()))
}

/// A conversation falls with its agent, whatever the path it was read by.
async fn declare_agent(mut response: Response) -> Response {
    if let Some(AgentOf(agent)) = response.extensions_mut().remove() {
        response.extensions_mut().insert(CacheTags::new("agent", agent));
    }
    response
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
