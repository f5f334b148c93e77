//! The agent service: a multi-tenant axum server on SQLite, with a cache in front of it.
//!
//! `routes` and `database` are a program that knows nothing of caching, `caching` declares all of it in one place, and
//! this file puts the two together: `cargo run --release --example agent_service -- --help`.

mod caching;
mod cli;
mod database;
mod outbox;
mod routes;

use std::{io::Write, process::ExitCode, sync::Arc, time::Duration};

use axum::serve::ListenerExt;
use tokio::{net::TcpListener, sync::watch};
use tower_cache_aside::store::Health;

/// How long a shutdown waits for the requests that are still running, and for the shared store.
const GRACE: Duration = Duration::from_secs(10);

#[tokio::main]
async fn main() -> ExitCode {
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            // One line, whatever the reason holds; and a closed stderr is no cause to panic.
            let _ = writeln!(std::io::stderr(), "agent_service: {}", reason.replace(['\n', '\r'], " "));
            ExitCode::from(2)
        }
    }
}

async fn run() -> Result<(), String> {
    // Quiet unless asked: RUST_LOG=tower_cache_aside=debug shows every invalidation with its report.
    let warn = tracing_subscriber::filter::LevelFilter::WARN.into();
    let filter = tracing_subscriber::EnvFilter::builder().with_default_directive(warn).from_env_lossy();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let args = cli::parse(std::env::args_os().skip(1))?;
    if args.help {
        let _ = std::io::stdout().write_all(cli::USAGE.as_bytes());
        return Ok(());
    }

    let db =
        database::Database::open(args.db.as_deref(), args.origin_delay, args.seed_agents).map_err(|e| {
            match &args.db {
                Some(path) => format!("--db: cannot open {path:?}: {e}"),
                None => format!("cannot open a temporary database: {e}"),
            }
        })?;
    // First, so that nothing is counted that nobody records.
    let exporter = caching::exporter()?;
    let cache = caching::cache(&args, db.clone())?;
    if args.check {
        let _ = write!(std::io::stdout(), "{}", cache.describe());
        return Ok(());
    }
    caching::follow(&args, &cache, &db)?;
    let (health, counted) = (cache.clone(), cache.clone());
    let metrics: routes::Metrics = Arc::new(move || {
        counted.record_metrics();
        exporter.render()
    });
    let store_state: routes::StoreState =
        Arc::new(move || if health.health() == Health::Ok { "ok" } else { "degraded" });
    let app = caching::apply(routes::router(db, store_state, metrics), &cache);
    let warming = caching::warm(&app, &args, &cache)?;
    let app = caching::admin(app, &args, &cache)?;

    let unusable = |e| format!("--listen: cannot listen on {}: {e}", args.listen);
    let listener = TcpListener::bind(args.listen).await.map_err(unusable)?;
    let address = listener.local_addr().map_err(unusable)?;
    // Whoever started us reads this line to learn the port, so it must not wait in a buffer.
    let mut stdout = std::io::stdout();
    let _ = writeln!(stdout, "listening on http://{address}").and_then(|()| stdout.flush());

    let listener = listener.tap_io(|connection| {
        let _ = connection.set_nodelay(true);
    });
    let (stop, stopping) = watch::channel(());
    let mut drained = stopping.clone();
    tokio::spawn(async move {
        shutdown_signal().await;
        drop(stop); // the channel closes, which is what both waiters below see
    });
    let mut asked = stopping;
    let server = axum::serve(listener, app).with_graceful_shutdown(async move {
        let _ = asked.changed().await;
    });
    tokio::select! {
        served = server => served.map_err(|e| format!("the server failed: {e}"))?,
        // An endless response must not keep the process alive.
        () = async { let _ = drained.changed().await; tokio::time::sleep(GRACE).await } => {}
    }
    // For the process that is started next.
    if let Some(warming) = warming {
        let _ = tokio::time::timeout(GRACE, warming.save()).await;
    }
    // What the shared store has not been told is told now, or never.
    let undelivered = cache.drain(GRACE).await.undelivered;
    if undelivered > 0 {
        let _ = writeln!(
            std::io::stderr(),
            "agent_service: {undelivered} invalidations could not be delivered: other processes may serve what they \
             dropped, until its TTL"
        );
    }
    Ok(())
}

/// Completes at ctrl-c or, where there is such a thing, SIGTERM.
async fn shutdown_signal() {
    let interrupted = async {
        // Without a handler there is nothing to wait for: the system's default action ends the process.
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    #[cfg(unix)]
    let terminated = async {
        match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
            Ok(mut signal) => _ = signal.recv().await,
            Err(_) => std::future::pending().await,
        }
    };
    #[cfg(not(unix))]
    let terminated = std::future::pending::<()>();
    tokio::select! {
        () = interrupted => {}
        () = terminated => {}
    }
}
