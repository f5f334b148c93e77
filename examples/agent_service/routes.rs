//! The HTTP side: what each route reads, writes and answers.

use std::{fmt::Write as _, io::Write as _, sync::Arc};

use axum::{
    Extension, Json, Router,
    body::Bytes,
    extract::{DefaultBodyLimit, FromRequest, FromRequestParts, Path, Query, Request, State},
    http::{StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value, json};
use uuid::Uuid;

use crate::database::{
    self, Agent, AgentConfig, AgentTools, AgentsPage, Collection, Conversation, Database, Execution,
};

/// The largest request body, in bytes.
const MAX_BODY: usize = 16 << 20;
const DEFAULT_LIMIT: u64 = 50;
const MAX_LIMIT: u64 = 500;

/// Response extension: the agent that the row in the answer belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentOf(pub String);

/// What `/healthz` says of the store.
pub type StoreState = Arc<dyn Fn() -> &'static str + Send + Sync>;

/// What `/metrics` says besides.
pub type Metrics = Arc<dyn Fn() -> String + Send + Sync>;

pub fn router(db: Database, store_state: StoreState, metrics: Metrics) -> Router {
    Router::new()
        .route("/agents", post(create_agent).get(list_agents))
        .route("/agents/{agent_id}", get(get_agent).put(put_agent).delete(delete_agent))
        .route("/agents/{agent_id}/config", get(get_config).put(put_config))
        .route("/agents/{agent_id}/tools", get(get_tools).put(put_tools))
        .route("/agents/{agent_id}/executions/{execution_id}", get(get_execution).put(put_execution))
        .route("/agents/{agent_id}/conversations", post(create_conversation))
        .route("/agents/{agent_id}/conversations/{conversation_id}", get(get_conversation_of_agent))
        .route(
            "/conversations/{conversation_id}",
            get(get_conversation).put(put_conversation).delete(delete_conversation),
        )
        .route("/conversations/{conversation_id}/memory", get(get_memory))
        .route("/conversations/{conversation_id}/messages", get(list_messages).post(create_message))
        .route("/conversations/{conversation_id}/messages/{message_id}", get(get_message))
        .route("/collections/{collection_id}", get(get_collection).put(put_collection))
        .route("/metrics", get(move |State(db): State<Database>| async move { metrics_of(&db, &metrics()) }))
        .route("/healthz", get(move || async move { Json(json!({ "status": "ok", "store": store_state() })) }))
        .route("/_origin", get(origin))
        .fallback(async || Failure::NotFound)
        .method_not_allowed_fallback(async || Failure::MethodNotAllowed)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(db)
}

// Agents

#[derive(Deserialize)]
struct NewAgent {
    id: Option<String>,
    name: String,
    #[serde(default)]
    description: Option<String>,
}

async fn create_agent(Tenant(tenant): Tenant, State(db): State<Database>, body: Body) -> Answer<Response> {
    let new: NewAgent = body.fields()?;
    let id = id_or_new(new.id)?;
    let agent = db.create_agent(&tenant, &id, &new.name, &new.description.unwrap_or_default()).await?;
    Ok(created(format!("/agents/{}", segment(&id)), agent))
}

#[derive(Deserialize)]
struct Page {
    limit: Option<u64>,
    offset: Option<u64>,
}

async fn list_agents(
    Tenant(tenant): Tenant,
    State(db): State<Database>,
    PageOf { limit, offset }: PageOf,
) -> Answer<Json<AgentsPage>> {
    Ok(Json(db.agents(&tenant, limit, offset).await?))
}

async fn get_agent(Tenant(tenant): Tenant, State(db): State<Database>, Ids(id): Ids<String>) -> Answer<Json<Agent>> {
    found(db.agent(&tenant, &id).await?)
}

#[derive(Deserialize)]
struct AgentChange {
    name: Option<String>,
    description: Option<String>,
}

async fn put_agent(
    Tenant(tenant): Tenant,
    State(db): State<Database>,
    Ids(id): Ids<String>,
    body: Body,
) -> Answer<Json<Agent>> {
    let change: AgentChange = body.fields()?;
    found(db.update_agent(&tenant, &id, change.name, change.description).await?)
}

async fn delete_agent(Tenant(tenant): Tenant, State(db): State<Database>, Ids(id): Ids<String>) -> Answer<StatusCode> {
    deleted(db.delete_agent(&tenant, &id).await?)
}

async fn get_config(
    Tenant(tenant): Tenant,
    State(db): State<Database>,
    Ids(id): Ids<String>,
) -> Answer<Json<AgentConfig>> {
    found(db.agent_config(&tenant, &id).await?)
}

async fn put_config(
    Tenant(tenant): Tenant,
    State(db): State<Database>,
    Ids(id): Ids<String>,
    body: Body,
) -> Answer<Json<AgentConfig>> {
    let config = body.object("config")?;
    found(db.put_agent_config(&tenant, &id, &config).await?)
}

async fn get_tools(
    Tenant(tenant): Tenant,
    State(db): State<Database>,
    Ids(id): Ids<String>,
) -> Answer<Json<AgentTools>> {
    found(db.agent_tools(&tenant, &id).await?)
}

async fn put_tools(
    Tenant(tenant): Tenant,
    State(db): State<Database>,
    Ids(id): Ids<String>,
    body: Body,
) -> Answer<Json<AgentTools>> {
    let tools = body.under("tools");
    if !tools.is_array() {
        return Err(Failure::InvalidBody("tools must be an array".into()));
    }
    found(db.put_agent_tools(&tenant, &id, &tools).await?)
}

async fn get_execution(
    Tenant(tenant): Tenant,
    State(db): State<Database>,
    Ids((agent, id)): Ids<(String, String)>,
) -> Answer<Json<Execution>> {
    found(db.execution(&tenant, &agent, &id).await?)
}

async fn put_execution(
    Tenant(tenant): Tenant,
    State(db): State<Database>,
    Ids((agent, id)): Ids<(String, String)>,
    body: Body,
) -> Answer<Json<Execution>> {
    found(db.put_execution(&tenant, &agent, &id, &body.under("state")).await?)
}

// Conversations

#[derive(Deserialize)]
struct NewConversation {
    id: Option<String>,
    title: Option<String>,
}

async fn create_conversation(
    Tenant(tenant): Tenant,
    State(db): State<Database>,
    Ids(agent): Ids<String>,
    body: Body,
) -> Answer<Response> {
    let new: NewConversation = body.fields()?;
    let id = id_or_new(new.id)?;
    let row = db.create_conversation(&tenant, &agent, &id, &new.title.unwrap_or_default()).await?;
    let row = row.ok_or(Failure::NotFound)?;
    Ok(created(format!("/conversations/{}", segment(&id)), row))
}

async fn get_conversation_of_agent(
    Tenant(tenant): Tenant,
    State(db): State<Database>,
    Ids((agent, id)): Ids<(String, String)>,
) -> Answer<OfAgent<Conversation>> {
    let row = db.conversation_of_agent(&tenant, &agent, &id).await?.ok_or(Failure::NotFound)?;
    Ok(of_agent(row.agent_id.clone(), row))
}

async fn get_conversation(
    Tenant(tenant): Tenant,
    State(db): State<Database>,
    Ids(id): Ids<String>,
) -> Answer<OfAgent<Conversation>> {
    let row = db.conversation(&tenant, &id).await?.ok_or(Failure::NotFound)?;
    Ok(of_agent(row.agent_id.clone(), row))
}

#[derive(Deserialize)]
struct ConversationChange {
    title: Option<String>,
    agent_id: Option<String>,
}

async fn put_conversation(
    Tenant(tenant): Tenant,
    State(db): State<Database>,
    Ids(id): Ids<String>,
    body: Body,
) -> Answer<Json<Conversation>> {
    let change: ConversationChange = body.fields()?;
    found(db.update_conversation(&tenant, &id, change.title, change.agent_id).await?)
}

async fn delete_conversation(
    Tenant(tenant): Tenant,
    State(db): State<Database>,
    Ids(id): Ids<String>,
) -> Answer<StatusCode> {
    deleted(db.delete_conversation(&tenant, &id).await?)
}

async fn get_memory(
    Tenant(tenant): Tenant,
    State(db): State<Database>,
    Ids(id): Ids<String>,
) -> Answer<OfAgent<database::Memory>> {
    let row = db.memory(&tenant, &id).await?.ok_or(Failure::NotFound)?;
    Ok(of_agent(row.agent_id.clone(), row))
}

// Messages

#[derive(Deserialize)]
struct NewMessage {
    id: Option<String>,
    role: Option<String>,
    content: String,
}

async fn create_message(
    Tenant(tenant): Tenant,
    State(db): State<Database>,
    Ids(conversation): Ids<String>,
    body: Body,
) -> Answer<Response> {
    let new: NewMessage = body.fields()?;
    let id = id_or_new(new.id)?;
    let role = new.role.as_deref().unwrap_or("user");
    let row = db.create_message(&tenant, &conversation, &id, role, &new.content).await?;
    let row = row.ok_or(Failure::NotFound)?;
    Ok(created(format!("/conversations/{}/messages/{}", segment(&conversation), segment(&id)), row))
}

async fn list_messages(
    Tenant(tenant): Tenant,
    State(db): State<Database>,
    Ids(conversation): Ids<String>,
) -> Answer<OfAgent<Value>> {
    let list = db.messages(&tenant, &conversation).await?.ok_or(Failure::NotFound)?;
    Ok(of_agent(list.agent_id, json!({ "total": list.row.len(), "items": list.row })))
}

async fn get_message(
    Tenant(tenant): Tenant,
    State(db): State<Database>,
    Ids((conversation, id)): Ids<(String, String)>,
) -> Answer<OfAgent<database::Message>> {
    let found = db.message(&tenant, &conversation, &id).await?.ok_or(Failure::NotFound)?;
    Ok(of_agent(found.agent_id, found.row))
}

// Collections

async fn get_collection(
    Tenant(tenant): Tenant,
    State(db): State<Database>,
    Ids(id): Ids<String>,
) -> Answer<Json<Collection>> {
    found(db.collection(&tenant, &id).await?)
}

async fn put_collection(
    Tenant(tenant): Tenant,
    State(db): State<Database>,
    Ids(id): Ids<String>,
    body: Body,
) -> Answer<Json<Collection>> {
    let metadata = body.object("metadata")?;
    Ok(Json(db.put_collection(&tenant, &id, &metadata).await?))
}

// The service itself

fn metrics_of(db: &Database, more: &str) -> impl IntoResponse + use<> {
    let mut text = String::from(
        "# HELP agent_service_origin_reads_total Database reads since the start.\n\
         # TYPE agent_service_origin_reads_total counter\n",
    );
    for (data_type, count) in db.calls() {
        let _ = writeln!(text, "agent_service_origin_reads_total{{data_type=\"{data_type}\"}} {count}");
    }
    let tasks = tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let _ = write!(
        text,
        "# HELP agent_service_tasks Tasks that are alive, connections among them.\n\
         # TYPE agent_service_tasks gauge\nagent_service_tasks {tasks}\n",
    );
    text.push_str(more);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text)
}

async fn origin(State(db): State<Database>) -> Json<Value> {
    let calls: Map<String, Value> = db.calls().map(|(data_type, count)| (data_type.into(), count.into())).collect();
    Json(json!({ "calls": calls }))
}

// What comes in

/// The tenant that the request names, exactly once.
struct Tenant(String);

impl<S: Send + Sync> FromRequestParts<S> for Tenant {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Answer<Self> {
        let mut named = parts.headers.get_all("x-tenant-id").iter();
        let (Some(tenant), None) = (named.next(), named.next()) else {
            return Err(Failure::TenantRequired);
        };
        match std::str::from_utf8(tenant.as_bytes()) {
            Ok(tenant) if !tenant.trim().is_empty() && !tenant.contains(char::is_control) => Ok(Self(tenant.into())),
            _ => Err(Failure::TenantRequired),
        }
    }
}

/// The path's parameters, percent-decoded.
struct Ids<T>(T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Ids<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Answer<Self> {
        match Path::from_request_parts(parts, state).await {
            Ok(Path(ids)) => Ok(Self(ids)),
            Err(e) => Err(Failure::InvalidPath(e.body_text())),
        }
    }
}

/// Which part of a list is wanted; a limit above the largest is the largest.
struct PageOf {
    limit: i64,
    offset: i64,
}

impl<S: Send + Sync> FromRequestParts<S> for PageOf {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Answer<Self> {
        let Query(page) = Query::<Page>::try_from_uri(&parts.uri).map_err(|e| Failure::InvalidQuery(e.body_text()))?;
        let number = |n: u64| i64::try_from(n).map_err(|e| Failure::InvalidQuery(e.to_string()));
        Ok(Self {
            limit: number(page.limit.unwrap_or(DEFAULT_LIMIT).min(MAX_LIMIT))?,
            offset: number(page.offset.unwrap_or(0))?,
        })
    }
}

/// A JSON body, whatever its content type is said to be.
struct Body(Value);

impl<S: Send + Sync> FromRequest<S> for Body {
    type Rejection = Failure;

    async fn from_request(request: Request, state: &S) -> Answer<Self> {
        let bytes = Bytes::from_request(request, state).await.map_err(|e| match e.status() {
            StatusCode::PAYLOAD_TOO_LARGE => Failure::BodyTooLarge,
            _ => Failure::InvalidBody(e.body_text()),
        })?;
        serde_json::from_slice(&bytes).map(Self).map_err(|e| Failure::InvalidBody(e.to_string()))
    }
}

impl Body {
    /// An object with these fields; others are ignored.
    fn fields<T: DeserializeOwned>(self) -> Answer<T> {
        // Asked first, because serde would also take an array for a struct.
        if !self.0.is_object() {
            return Err(Failure::InvalidBody("the body must be an object".into()));
        }
        serde_json::from_value(self.0).map_err(|e| Failure::InvalidBody(e.to_string()))
    }

    /// The value itself, which may come wrapped in an object whose only field is `key`.
    fn under(self, key: &str) -> Value {
        match self.0 {
            Value::Object(mut fields) if fields.len() == 1 && fields.contains_key(key) => {
                fields.remove(key).unwrap_or_default()
            }
            bare => bare,
        }
    }

    /// As [`Body::under`], but nothing else than an object will do.
    fn object(self, key: &str) -> Answer<Value> {
        let value = self.under(key);
        if value.is_object() { Ok(value) } else { Err(Failure::InvalidBody(format!("{key} must be an object"))) }
    }
}

/// The id that the client gave, or a fresh one. An empty one could not be asked for again.
fn id_or_new(given: Option<String>) -> Answer<String> {
    match given {
        Some(id) if id.is_empty() => Err(Failure::InvalidBody("id must not be empty".into())),
        Some(id) => Ok(id),
        None => Ok(Uuid::new_v4().to_string()),
    }
}

// What goes out

type Answer<T> = Result<T, Failure>;
type OfAgent<T> = (Extension<AgentOf>, Json<T>);

fn of_agent<T>(agent: String, row: T) -> OfAgent<T> {
    (Extension(AgentOf(agent)), Json(row))
}

fn found<T>(row: Option<T>) -> Answer<Json<T>> {
    row.map(Json).ok_or(Failure::NotFound)
}

fn deleted(existed: bool) -> Answer<StatusCode> {
    if existed { Ok(StatusCode::NO_CONTENT) } else { Err(Failure::NotFound) }
}

fn created(location: String, row: impl Serialize) -> Response {
    (StatusCode::CREATED, [(header::LOCATION, location)], Json(row)).into_response()
}

/// An id as one segment of a path: all but the unreserved characters of RFC 3986 percent-encoded.
fn segment(id: &str) -> String {
    let mut encoded = String::with_capacity(id.len());
    for byte in id.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

/// Every answer that is not the one asked for.
enum Failure {
    TenantRequired,
    InvalidPath(String),
    InvalidQuery(String),
    InvalidBody(String),
    BodyTooLarge,
    NotFound,
    AgentNotFound,
    MethodNotAllowed,
    Conflict,
    Database(String),
}

impl From<database::Error> for Failure {
    fn from(error: database::Error) -> Self {
        match error {
            database::Error::Conflict => Self::Conflict,
            database::Error::UnknownAgent => Self::AgentNotFound,
            database::Error::Failed(reason) => Self::Database(reason),
        }
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let (status, error, detail) = match self {
            Self::TenantRequired => (StatusCode::BAD_REQUEST, "tenant_required", None),
            Self::InvalidPath(detail) => (StatusCode::BAD_REQUEST, "invalid_path", Some(detail)),
            Self::InvalidQuery(detail) => (StatusCode::BAD_REQUEST, "invalid_query", Some(detail)),
            Self::InvalidBody(detail) => (StatusCode::BAD_REQUEST, "invalid_body", Some(detail)),
            Self::BodyTooLarge => (StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", None),
            Self::NotFound => (StatusCode::NOT_FOUND, "not_found", None),
            Self::AgentNotFound => (StatusCode::NOT_FOUND, "agent_not_found", None),
            Self::MethodNotAllowed => (StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", None),
            Self::Conflict => (StatusCode::CONFLICT, "conflict", None),
            Self::Database(reason) => {
                // The client learns that it failed, the operator learns why.
                let _ = writeln!(std::io::stderr(), "agent_service: database: {reason}");
                (StatusCode::INTERNAL_SERVER_ERROR, "database", None)
            }
        };
        let mut body = json!({ "error": error });
        if let Some(detail) = detail {
            body["detail"] = detail.into();
        }
        (status, Json(body)).into_response()
    }
}
