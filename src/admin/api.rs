//! What can be asked of a cache, and of what it is told to drop.

use std::{
    borrow::Cow,
    pin::{Pin, pin},
    sync::{Arc, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::poll_fn;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body::Body;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{
    sync::{broadcast::error::RecvError, mpsc},
    time::timeout,
};

use super::{
    AdminBody, AdminService,
    explain::explain,
    query::{member, members},
    search::search,
};
use crate::{
    cache::{Applied, stats::snapshot},
    catalog::Drops,
    engine::Invalidated,
    events,
    key::Tag,
    observe::{Event, KINDS, Snapshot, Stats},
};

/// A larger body says nothing that is wanted.
const LARGEST: usize = 256 << 10;

/// And nobody takes longer to say it.
const PATIENCE: Duration = Duration::from_secs(10);

/// A comment, so that a connection that is gone is noticed.
const HEARTBEAT: Duration = Duration::from_secs(10);

/// So many tags of a purge are named.
const NAMED: usize = 200;

/// What `POST api/invalidate` says.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Purge {
    #[serde(default)]
    tenant: String,
    #[serde(default)]
    mutated: Vec<Mutated>,
    #[serde(default)]
    all: Vec<String>,
    #[serde(default)]
    include: Vec<String>,
    #[serde(default)]
    everything: bool,
    #[serde(default)]
    dry_run: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Mutated {
    #[serde(rename = "type")]
    data_type: String,
    id: String,
}

impl AdminService {
    pub(super) async fn api<B>(&self, name: &str, request: Request<B>) -> Response<AdminBody>
    where
        B: Body<Data = Bytes> + Send,
    {
        self.cache.keep();
        let (parts, body) = request.into_parts();
        let members = members(parts.uri.query());
        let is_get = [Method::GET, Method::HEAD].contains(&parts.method);
        match name {
            "stats" if is_get => self.stats(member(&members, "process")),
            "recent" if is_get => self.recent(&members),
            "explain" if is_get => replied(explain(&self.cache.0, &members, &parts.headers).await),
            "search" if is_get => replied(search(&self.cache.0, &members).await),
            "events" if is_get => self.events(),
            "invalidate" if parts.method == Method::POST => match whole(body).await {
                Some(body) => self.invalidate(&body).await,
                None => failed(StatusCode::BAD_REQUEST, "the body is too large, or does not come"),
            },
            "events" if parts.method == Method::POST => match whole(body).await {
                Some(body) => self.apply(&body).await,
                None => failed(StatusCode::BAD_REQUEST, "the body is too large, or does not come"),
            },
            "stats" | "recent" | "explain" | "search" | "events" | "invalidate" => {
                failed(StatusCode::METHOD_NOT_ALLOWED, "there is no such method here")
            }
            _ => failed(StatusCode::NOT_FOUND, "there is no such thing here"),
        }
    }

    fn snapshots(&self) -> Vec<Snapshot> {
        let own = snapshot(&self.cache.0);
        let others = self.cache.0.observer.others.lock().unwrap_or_else(PoisonError::into_inner).clone();
        std::iter::once(own).chain(others).collect()
    }

    fn stats(&self, process: Option<&str>) -> Response<AdminBody> {
        let core = &self.cache.0;
        core.observer.looks();
        let all = self.snapshots();
        let process = process.filter(|process| !process.is_empty() && *process != "all");
        let chosen: Vec<_> = all.iter().filter(|one| process.is_none_or(|id| id == one.process)).cloned().collect();
        if chosen.is_empty() {
            return failed(StatusCode::NOT_FOUND, "there is no such process, or it has said nothing for a while");
        }
        let stats = Stats::of(core.observer.service(), process.unwrap_or("all"), &chosen);
        let Ok(Value::Object(mut stats)) = serde_json::to_value(&stats) else {
            return failed(StatusCode::INTERNAL_SERVER_ERROR, "the statistics cannot be written");
        };
        let processes: Vec<_> =
            all.iter().map(|one| json!({"id": one.process, "since": one.since, "seen": one.seen})).collect();
        stats.insert("processes".to_owned(), json!(processes));
        stats.insert("read_only".to_owned(), json!(self.gate.admin.read_only));
        let kind = if core.engine.is_shared() { "shared" } else { "in process" };
        if let Some(Value::Object(store)) = stats.get_mut("store") {
            store.insert("kind".to_owned(), json!(kind));
        }
        answered(&Value::Object(stats))
    }

    fn recent(&self, members: &[(String, String)]) -> Response<AdminBody> {
        let kind = member(members, "kind").filter(|kind| !kind.is_empty());
        if kind.is_some_and(|kind| !KINDS.contains(&kind)) {
            return failed(StatusCode::BAD_REQUEST, &format!("`kind` is one of: {}", KINDS.join(", ")));
        }
        let Ok(most) = member(members, "n").unwrap_or("100").parse::<usize>() else {
            return failed(StatusCode::BAD_REQUEST, "`n` is a number");
        };
        let events = self.cache.0.observer.recent.newest(kind, most.min(500), |_| true);
        answered(&json!(events))
    }

    /// What happens, as it happens (server-sent events).
    fn events(&self) -> Response<AdminBody> {
        let Ok(permit) = Arc::clone(&self.gate.listeners).try_acquire_owned() else {
            return failed(StatusCode::SERVICE_UNAVAILABLE, "too many listen already");
        };
        let mut live = self.cache.0.observer.recent.live();
        let (tx, rx) = mpsc::channel(64);
        tokio::spawn(async move {
            let _permit = permit;
            loop {
                let text = match timeout(HEARTBEAT, live.recv()).await {
                    Err(_) => ": still here\n\n".to_owned(),
                    Ok(Ok(event)) => sse(&event),
                    Ok(Err(RecvError::Lagged(missed))) => format!(": {missed} events missed\n\n"),
                    Ok(Err(RecvError::Closed)) => return,
                };
                // One who does not read for so long is gone.
                match timeout(HEARTBEAT, tx.send(text.into())).await {
                    Ok(Ok(())) => {}
                    Ok(Err(_)) | Err(_) => return,
                }
            }
        });
        let mut response = Response::new(AdminBody::events(rx));
        let stream = HeaderValue::from_static("text/event-stream; charset=utf-8");
        response.headers_mut().insert(header::CONTENT_TYPE, stream);
        response
    }

    /// Events from outside: one, or several.
    async fn apply(&self, body: &[u8]) -> Response<AdminBody> {
        let is_list = body.trim_ascii_start().first() == Some(&b'[');
        let events =
            if is_list { serde_json::from_slice(body) } else { serde_json::from_slice(body).map(|one| vec![one]) };
        let events: Vec<events::Event> = match events {
            Ok(events) => events,
            Err(error) => return failed(StatusCode::BAD_REQUEST, &error.to_string()),
        };
        if self.gate.admin.read_only {
            return failed(StatusCode::FORBIDDEN, "this is for looking only");
        }
        let Applied { dropped, ignored, refused } = self.cache.apply(&events).await;
        if let Some((_, mistake)) = refused.first().filter(|_| refused.len() == events.len()) {
            return failed(StatusCode::BAD_REQUEST, &mistake.to_string());
        }
        let mut report = report(false, Some(&dropped), None);
        report["ignored"] = json!(ignored);
        report["refused"] = refused.iter().map(|(at, why)| json!({"event": at, "because": why.to_string()})).collect();
        answered(&report)
    }

    async fn invalidate(&self, body: &[u8]) -> Response<AdminBody> {
        let purge: Purge = match serde_json::from_slice(body) {
            Ok(purge) => purge,
            Err(error) => return failed(StatusCode::BAD_REQUEST, &error.to_string()),
        };
        if self.gate.admin.read_only && !purge.dry_run {
            return failed(StatusCode::FORBIDDEN, "this is for looking only");
        }
        if purge.mutated.is_empty() && purge.all.is_empty() && !purge.everything {
            return failed(
                StatusCode::BAD_REQUEST,
                "it drops nothing: say what, with `mutated`, `all` or `everything`",
            );
        }
        let named = (!purge.tenant.is_empty()).then_some(&*purge.tenant);
        let tenant = match self.cache.0.tenants.by_hand(named) {
            Ok(tenant) => tenant.to_owned(),
            Err(mistake) => return failed(StatusCode::BAD_REQUEST, &mistake.to_string()),
        };
        let mut invalidation = self.cache.invalidate(tenant).by("admin");
        for Mutated { data_type, id } in purge.mutated {
            invalidation = invalidation.mutated(data_type, id);
        }
        invalidation = purge.all.into_iter().fold(invalidation, |all, data_type| all.all(data_type));
        invalidation = purge.include.iter().fold(invalidation, |all, relation| all.include(relation));
        if purge.everything {
            invalidation = invalidation.everything();
        }
        let result = match purge.dry_run {
            true => invalidation.dry_run().await.map(|(drops, counts)| report(true, counts.as_ref(), Some(&drops))),
            false => invalidation.run().await.map(|dropped| report(false, Some(&dropped), None)),
        };
        match result {
            Ok(report) => answered(&report),
            Err(mistake) => failed(StatusCode::BAD_REQUEST, &mistake.to_string()),
        }
    }
}

/// Without counts the store could not be asked.
fn report(dry_run: bool, counts: Option<&Invalidated>, drops: Option<&Drops>) -> Value {
    let dropped = counts.map(|counts| {
        let of_type = counts.types().iter().map(|(data_type, count)| (data_type.to_string(), json!(count)));
        of_type.collect::<serde_json::Map<_, _>>()
    });
    let tags = drops.iter().flat_map(|drops| &drops.groups).flat_map(|group| &group.tags);
    let tags: Vec<_> = tags.map(Tag::label).take(NAMED).collect();
    let (total, undelivered) = (counts.map(Invalidated::total), counts.map(Invalidated::undelivered));
    json!({"dry_run": dry_run, "dropped": dropped, "total": total, "tags": tags, "undelivered": undelivered})
}

fn sse(event: &Event) -> String {
    let data = serde_json::to_string(event).unwrap_or_default();
    format!("event: {}\ndata: {data}\n\n", event.what.kind())
}

/// The whole body, if it is not too large and comes in time.
async fn whole<B: Body<Data = Bytes>>(body: B) -> Option<Vec<u8>> {
    let read = async {
        let (mut body, mut all) = (pin!(body), vec![]);
        while let Some(frame) = poll_fn(|cx| Pin::as_mut(&mut body).poll_frame(cx)).await {
            if let Ok(data) = frame.ok()?.into_data() {
                all.extend_from_slice(&data);
            }
            if all.len() > LARGEST {
                return None;
            }
        }
        Some(all)
    };
    timeout(PATIENCE, read).await.ok().flatten()
}

fn replied(result: Result<Value, (StatusCode, String)>) -> Response<AdminBody> {
    match result {
        Ok(value) => answered(&value),
        Err((status, why)) => failed(status, &why),
    }
}

fn answered(value: &Value) -> Response<AdminBody> {
    let mut response = Response::new(AdminBody::full(value.to_string()));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

pub(super) fn failed(status: StatusCode, why: &str) -> Response<AdminBody> {
    let why: Cow<'_, str> = why.into();
    let mut response = answered(&json!({"error": why}));
    *response.status_mut() = status;
    response
}
