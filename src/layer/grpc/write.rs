//! A call that may mutate: of a method that is declared to, or of one that nothing is said of, whose handler may say what it
//! changes.

use std::{
    panic::{AssertUnwindSafe, resume_unwind},
    sync::Arc,
};

use bytes::Bytes;
use futures_util::FutureExt;
use http::{HeaderMap, HeaderValue, Request, Response, header};
use http_body::Body;
use tower_service::Service;

use super::{
    body::GrpcResponseBody,
    read::{Out, message, out},
    status::{GRPC_STATUS, is_plain, is_refusal, is_success},
};
use crate::{
    catalog::Change,
    key::Tenant,
    layer::{
        body::CacheBody,
        changes::Changes,
        core::Core,
        request::RequestBody,
        writing::{Refused, Writing},
    },
    route::GrpcRoute,
};

pub(super) struct Write {
    pub(super) tenants: Vec<Tenant>,
    /// What is declared of its method, if anything is.
    pub(super) route: Option<Arc<GrpcRoute>>,
    pub(super) core: Arc<Core>,
}

/// The answer to a write that the store could not be told about: UNAVAILABLE.
fn unavailable<R: Body<Data = Bytes>>(_: Refused) -> Out<R> {
    let mut response = Response::new(GrpcResponseBody::default());
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(GRPC_STATUS, HeaderValue::from_static("14"));
    response
}

/// What a declared call changes: the entity that its message names. A message that cannot be read (compressed, too large,
/// of another protocol) may name any.
fn change_of(route: &GrpcRoute, body: Option<&Bytes>) -> Change {
    let message = body.and_then(message).flatten();
    let change = match route.resource(message.as_deref()) {
        None => Change::all(route.data_type.clone()),
        Some(id) => Change::entity(route.data_type.clone(), id),
    };
    change.include(&route.include)
}

impl Write {
    pub(super) async fn run<S, B, R>(self, mut inner: S, request: Request<B>) -> Result<Out<R>, S::Error>
    where
        S: Service<Request<RequestBody<B>>, Response = Response<R>>,
        B: Body<Data = Bytes>,
        R: Body<Data = Bytes>,
    {
        let (mut parts, body) = request.into_parts();
        let changes = parts.extensions.get_or_insert_default::<Changes>().clone();
        let what = format!("{} {}", parts.method, parts.uri.path());
        let mut writing = Writing::new(&self.core, self.tenants.into(), changes.clone(), what);
        let (body, change) = match &self.route {
            None => (RequestBody::passing(body), None),
            Some(route) => {
                let body = RequestBody::read(body, self.core.options.body_limit).await;
                let change = change_of(route, body.whole().as_ref());
                // When all of it is there: its client sets the pace.
                if let Err(refused) = writing.begin(&change, std::iter::once(&*route.data_type)).await {
                    return Ok(unavailable(refused));
                }
                (body, Some(change))
            }
        };
        let call = changes.scope(async { inner.call(Request::from_parts(parts, body)).await });
        let mut result = AssertUnwindSafe(call).catch_unwind().await;
        let mut headers = result.as_mut().ok().and_then(|result| result.as_mut().ok()).map(Response::headers_mut);
        if let Some(headers) = &mut headers {
            headers.remove(&self.core.options.tag_header);
        }
        let stays = |headers: &mut HeaderMap| is_refusal(headers) || is_success(headers) && changes.says_nothing();
        if headers.is_some_and(stays) {
            writing.cancel().await;
        } else if let Some(change) = change {
            writing.declare(change);
        }
        match result {
            Ok(Ok(response)) if !response.headers().contains_key(GRPC_STATUS) => {
                if !is_plain(response.headers()) {
                    // What it ends with is a part of its body (grpc-web), which tells the client before it tells anybody here.
                    let again = writing.again();
                    std::mem::replace(&mut writing, again).end().await;
                }
                let response = response.map(CacheBody::inner);
                Ok(response.map(|body| GrpcResponseBody::until_trailers(body, self.core, writing)))
            }
            result => {
                let report = if writing.is_idle() { None } else { Some(writing.end().await) };
                let mut response = result.unwrap_or_else(|panic| resume_unwind(panic))?;
                if let Some(report) = report {
                    Writing::report(&self.core, &report, response.headers_mut());
                }
                Ok(out(response.map(CacheBody::inner)))
            }
        }
    }
}
