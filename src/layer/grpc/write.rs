//! A call of a method that mutates.

use std::{
    panic::{AssertUnwindSafe, resume_unwind},
    sync::Arc,
};

use bytes::Bytes;
use futures_util::FutureExt;
use http::{HeaderValue, Request, Response, header};
use http_body::Body;
use tower_service::Service;

use super::{
    body::{GrpcBody, GrpcResponseBody},
    read::{Out, message, out},
    status::{GRPC_STATUS, is_refusal},
};
use crate::{
    catalog::{Change, Drops},
    key::Tenant,
    layer::{
        body::CacheBody,
        core::Core,
        writing::{Refused, Writing},
    },
    route::GrpcRoute,
};

pub(super) struct Write {
    pub(super) tenants: Vec<Tenant>,
    pub(super) route: Arc<GrpcRoute>,
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

impl Write {
    async fn add_drops(&self, drops: &mut Drops, id: Option<&str>) {
        let GrpcRoute { data_type, include, .. } = &*self.route;
        let change = match id {
            None => Change::all(data_type.clone()),
            Some(id) => Change::entity(data_type.clone(), id),
        };
        self.core.add_change(drops, &self.tenants, &change.include(include)).await;
    }

    async fn begin(&self, id: Option<&str>) -> Result<Writing, Refused> {
        let mut drops = Drops::default();
        self.add_drops(&mut drops, id).await;
        Writing::begin(&self.core, drops, std::iter::once(&*self.route.data_type)).await
    }

    pub(super) async fn run<S, B, R>(self, mut inner: S, request: Request<B>) -> Result<Out<R>, S::Error>
    where
        S: Service<Request<GrpcBody<B>>, Response = Response<R>>,
        B: Body<Data = Bytes>,
        R: Body<Data = Bytes>,
    {
        let (parts, body) = request.into_parts();
        let body = GrpcBody::read(body, self.core.options.body_limit).await;
        // When all of it is there: its client sets the pace.
        if let Err(refused) = Writing::check(&self.core) {
            return Ok(unavailable(refused));
        }
        let message = body.whole().and_then(|body| message(&body)).flatten();
        let id = self.route.resource(message.as_deref());
        let mut writing = match self.begin(id.as_deref()).await {
            Ok(writing) => writing,
            Err(refused) => return Ok(unavailable(refused)),
        };
        let call = AssertUnwindSafe(async { inner.call(Request::from_parts(parts, body)).await });
        let mut result = call.catch_unwind().await;
        if let Ok(Ok(response)) = &mut result {
            response.headers_mut().remove(&self.core.options.tag_header);
        }
        if let Ok(Ok(response)) = &result
            && is_refusal(response.headers())
        {
            writing.cancel().await;
            return result.unwrap_or_else(|panic| resume_unwind(panic)).map(|r| out(r.map(CacheBody::inner)));
        }
        // After it: it may have moved a child here.
        self.add_drops(&mut writing.drops, id.as_deref()).await;
        match result {
            Ok(Ok(response)) if !response.headers().contains_key(GRPC_STATUS) => {
                let response = response.map(CacheBody::inner);
                Ok(response.map(|body| GrpcResponseBody::until_trailers(body, self.core, writing)))
            }
            result => {
                let report = writing.end().await;
                let mut response = result.unwrap_or_else(|panic| resume_unwind(panic))?;
                Writing::report(&self.core, &report, response.headers_mut());
                Ok(out(response.map(CacheBody::inner)))
            }
        }
    }
}
