//! How handlers answer, in all the ways in which they do, and in which that goes wrong.
//!
//! A read is odd if its request asks for it (`x-fault`), which the mapping knows nothing of: nobody else may be given that. All
//! else is a matter of the route.

use std::{io, panic::panic_any, sync::Arc};

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{HeaderMap, HeaderValue, Method, Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use tower_cache_aside::{Changes, changed, depends_on};

use super::world::{Body, Framing, Said, Saying, Seen, Shared, World, framed, full};

/// What goes wrong with reads, and is for nobody but who asked.
pub const OF_READS: &[&str] =
    &["error", "panic", "broken", "302", "401", "403", "406", "429", "500", "503", "private", "no-store", "set-cookie"];

/// With writes: before the commit, after it, or none of the client's business.
pub const OF_WRITES: &[&str] = &[
    "refuse-400",
    "refuse-403",
    "refuse-404",
    "refuse-409",
    "refuse-422",
    "error",
    "panic",
    "broken",
    "late",
    "204",
    "303",
    "304",
    "408",
    "499",
    "500",
    "503",
    "nothing",
];

/// The panic of a handler, which nobody needs to read of.
pub const BUG: &str = "a bug of the handler";

pub async fn handle<W: World>(
    world: &Arc<W>,
    rows: &Shared<W::Rows>,
    mount: &'static str,
    request: Request<Body>,
) -> io::Result<Response<Body>> {
    let (parts, body) = request.into_parts();
    let changes = parts.extensions.get::<Changes>().cloned();
    let seen = Seen::new(mount, parts, body.collect().await?.to_bytes());
    let read = world.read(&rows.lock().0, &seen);
    if let Some(said) = read {
        said.depends.iter().for_each(|(data_type, id)| depends_on(&**data_type, id));
        pause(&seen).await;
        return answered(said, &seen);
    }
    pause(&seen).await;
    written(world, rows, &seen, changes).await
}

async fn pause(seen: &Seen) {
    for _ in 0..seen.header("x-pause").parse().unwrap_or(0) {
        tokio::task::yield_now().await;
    }
}

// ---- reads -----------------------------------------------------------------------------------------------------------

fn answered(mut said: Said, seen: &Seen) -> io::Result<Response<Body>> {
    let fault = seen.header("x-fault");
    match fault {
        "" => return Ok(respond(said, seen)),
        "error" => return Err(io::Error::other("connection lost")),
        "panic" => panic_any(BUG),
        "broken" => said.framing = Framing { pieces: 2, breaks: true, messages: 1, ..Framing::default() },
        "private" | "no-store" => said = said.header("cache-control", fault),
        "set-cookie" => said = said.header("set-cookie", "a=b"),
        status => {
            said.status = status.parse().unwrap();
            // What goes wrong for one is not said to be good for a while.
            said.headers.retain(|(name, _)| *name != "cache-control");
        }
    }
    said.body.splice(0..0, *b"odd ");
    said.has_tag = false;
    Ok(respond(said, seen))
}

fn respond(mut said: Said, seen: &Seen) -> Response<Body> {
    if seen.is_grpc() {
        return replied(said);
    }
    if said.encodes && seen.header("accept-encoding") == "gzip" {
        said = said.header("content-encoding", "gzip");
        said.body.splice(0..0, *b"zipped ");
    }
    if said.has_tag && said.status == 200 {
        let tag = format!("\"h{:x}\"", said.body.iter().fold(7_u64, |hash, c| hash.wrapping_mul(31) + u64::from(*c)));
        said = said.header("etag", &tag);
        let known = seen.headers.get_all("if-none-match").iter().map(|line| line.to_str().unwrap());
        if known.flat_map(|line| line.split(',')).any(|known| known.trim() == tag || known.trim() == "*") {
            said.status = 304;
        }
    }
    let mut response = Response::builder().status(said.status);
    if said.status != 304 {
        response = response.header("content-type", "text/plain");
    } else {
        said.headers.retain(|(name, _)| !name.starts_with("content-"));
    }
    response = said.headers.iter().fold(response, |response, (name, value)| response.header(*name, value));
    if said.status == 304 {
        return response.body(full("")).unwrap();
    }
    if let Some(more) = said.framing.length {
        response = response.header("content-length", said.body.len() + more);
    }
    if said.framing.trailers {
        response = response.header("trailer", "x-sum");
    }
    let is_head = seen.method == Method::HEAD;
    response.body(if is_head { full("") } else { body(&said.body, &said.framing, "x-sum", "5") }).unwrap()
}

/// As gRPC says it.
fn replied(said: Said) -> Response<Body> {
    // What may have been committed is no refusal.
    let (code, is_ok) = match said.status {
        200..=204 | 303 | 304 => ("0", true),
        404 => ("5", false),
        400 | 403 | 405 | 409 | 422 => ("9", false),
        _ => ("13", false),
    };
    let messages = if is_ok { said.framing.messages } else { 0 };
    let mut bytes: Vec<u8> = (0..messages).flat_map(|_| framed(&said.body)).collect();
    if said.framing.length.is_some_and(|more| more > 0) {
        // Cut short.
        bytes.truncate(bytes.len() / 2);
    }
    let framing = Framing { trailers: !said.framing.no_status, ..said.framing };
    let response = Response::builder().header("content-type", "application/grpc");
    let headers = said.headers.iter().filter(|(name, _)| matches!(*name, "cache-control" | "set-cookie" | "cache-tag"));
    let response = headers.fold(response, |response, (name, value)| response.header(*name, value));
    let pieces = Framing { pieces: framing.pieces.max(1), ..framing };
    response.body(body(&bytes, &pieces, "grpc-status", code)).unwrap()
}

fn body(bytes: &[u8], framing: &Framing, name: &'static str, value: &'static str) -> Body {
    let Framing { pieces, slow, trailers, breaks, .. } = *framing;
    if pieces == 0 && !trailers && !breaks {
        return full(bytes.to_vec());
    }
    let size = bytes.len().div_ceil(pieces.max(1)).max(1);
    let pieces = bytes.chunks(size).map(|piece| Ok(Frame::data(Bytes::copy_from_slice(piece))));
    let mut frames: Vec<io::Result<Frame<Bytes>>> = pieces.collect();
    if breaks {
        frames.pop();
        frames.push(Err(io::Error::other("broken")));
    } else if trailers {
        let fields = HeaderMap::from_iter([(name.parse().unwrap(), HeaderValue::from_static(value))]);
        frames.push(Ok(Frame::trailers(fields)));
    }
    let frames = stream::iter(frames).then(move |frame| async move {
        if slow {
            tokio::task::yield_now().await;
        }
        frame
    });
    Body::new(StreamBody::new(frames))
}

// ---- writes ----------------------------------------------------------------------------------------------------------

/// Says what was changed, by the handle or by the task it runs in.
fn say(changes: Option<&Changes>, saying: &[Saying]) {
    for one in saying {
        match (one, changes) {
            (Saying::ByFunction(data_type, id), Some(_)) => changed(&**data_type, id),
            (Saying::ByHandle(data_type, id), Some(changes)) => _ = changes.mutated(&**data_type, id),
            (Saying::Include(relation), Some(changes)) => _ = changes.include(&**relation),
            (_, None) => {}
        }
    }
}

fn commit<W: World>(world: &W, rows: &Shared<W::Rows>, seen: &Seen) -> Said {
    let mut rows = rows.lock();
    rows.1 += 1;
    world.write(&mut rows.0, seen)
}

async fn written<W: World>(
    world: &Arc<W>,
    rows: &Shared<W::Rows>,
    seen: &Seen,
    changes: Option<Changes>,
) -> io::Result<Response<Body>> {
    let fault = seen.header("x-fault");
    if let Some(status) = fault.strip_prefix("refuse-") {
        return Ok(respond(Said::new(status.parse().unwrap(), "refused"), seen));
    }
    if fault == "nothing" {
        changes.inspect(|changes| _ = changes.nothing());
        return Ok(respond(Said::new(200, "the same"), seen));
    }
    if fault == "late" {
        return Ok(late(world.clone(), rows.clone(), seen, changes));
    }
    let mut said = commit(&**world, rows, seen);
    say(changes.as_ref(), &said.changes);
    pause(seen).await;
    match fault {
        "" => {}
        "error" => return Err(io::Error::other("connection lost")),
        "panic" => panic_any(BUG),
        "broken" => said.framing = Framing { pieces: 2, breaks: true, messages: 1, ..Framing::default() },
        // It is no refusal if something was written.
        _ if said.status >= 400 => {}
        status => said.status = status.parse().unwrap(),
    }
    Ok(respond(said, seen))
}

/// Writes while its body streams. (What it says then, it says by its handle.)
fn late<W: World>(world: Arc<W>, rows: Shared<W::Rows>, seen: &Seen, changes: Option<Changes>) -> Response<Body> {
    let is_grpc = seen.is_grpc();
    let seen = Seen {
        method: seen.method.clone(),
        path: seen.path.clone(),
        query: seen.query.clone(),
        host: seen.host.clone(),
        headers: seen.headers.clone(),
        body: seen.body.clone(),
        ..*seen
    };
    let frames = stream::once(async move {
        tokio::task::yield_now().await;
        let mut said = commit(&*world, &rows, &seen);
        for one in &mut said.changes {
            if let Saying::ByFunction(data_type, id) = one {
                *one = Saying::ByHandle(std::mem::take(data_type), std::mem::take(id));
            }
        }
        say(changes.as_ref(), &said.changes);
        Ok(Frame::data(Bytes::from(if is_grpc { framed(b"done") } else { b"done".to_vec() })))
    });
    let status = HeaderMap::from_iter([("grpc-status".parse().unwrap(), HeaderValue::from_static("0"))]);
    let status = is_grpc.then(|| Ok(Frame::trailers(status)));
    let kind = if is_grpc { "application/grpc" } else { "text/plain" };
    let body = Body::new(StreamBody::new(frames.chain(stream::iter(status))));
    Response::builder().header("content-type", kind).body(body).unwrap()
}
