//! Fewer and plainer requests that still make a difference.

use bytes::Bytes;
use http::{Request, Uri};

use super::difference::Difference;

/// Leaves requests out, by halves and less, then headers and queries, for as long as those that are left make a difference when
/// they are run.
pub(super) async fn minimise(
    run: &impl AsyncFn(Vec<Request<Bytes>>) -> Option<Difference>,
    mut found: Difference,
) -> Difference {
    let mut size = found.len() / 2;
    while size > 0 {
        let before = found.len();
        let mut at = 0;
        // The last is the one that differs.
        while at + 1 < found.len() {
            let mut fewer = found.requests();
            fewer.drain(at..(at + size).min(fewer.len() - 1));
            match run(fewer).await {
                Some(smaller) => found = smaller,
                None => at += size,
            }
        }
        // What could not go may go now.
        size = if size == 1 && found.len() < before { 1 } else { size / 2 };
    }
    let mut at = 0;
    while at < found.len() {
        match with_plainer(run, &found, at).await {
            Some(plainer) => found = plainer,
            None => at += 1,
        }
    }
    found
}

/// The same with one request plainer, if that can be.
async fn with_plainer(
    run: &impl AsyncFn(Vec<Request<Bytes>>) -> Option<Difference>,
    found: &Difference,
    at: usize,
) -> Option<Difference> {
    for plain in plainer(&found.requests()[at]) {
        let mut requests = found.requests();
        requests[at] = plain;
        if let Some(plainer) = run(requests).await {
            return Some(plainer);
        }
    }
    None
}

/// Each says one thing less.
fn plainer(request: &Request<Bytes>) -> Vec<Request<Bytes>> {
    let without_header = request.headers().keys().map(|name| {
        let mut plain = request.clone();
        plain.headers_mut().remove(name);
        plain
    });
    let mut all: Vec<_> = without_header.collect();
    let path: Option<Uri> = request.uri().query().and_then(|_| request.uri().path().parse().ok());
    all.extend(path.map(|path| {
        let mut plain = request.clone();
        *plain.uri_mut() = path;
        plain
    }));
    all
}
