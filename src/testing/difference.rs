//! The report of a difference.

use std::{collections::BTreeSet, error::Error, fmt};

use bytes::Bytes;
use http::{HeaderName, Request};

use super::{
    compare::{Answered, Shown},
    request::is_read,
    told::Told,
};
use crate::observe::Handling;

/// So much of a request's body is shown.
const SHOWN: usize = 120;

/// A request, and how the cache handled it.
#[derive(Clone)]
pub(super) struct Step {
    pub(super) request: Request<Bytes>,
    pub(super) told: Option<Told>,
}

/// The cached service answered otherwise than its twin: to which requests, and what both said. It is read as text, also where only
/// `Debug` is shown.
#[derive(Clone)]
pub struct Difference(Box<Found>);

#[derive(Clone)]
struct Found {
    /// The last is the one that they answered differently.
    steps: Vec<Step>,
    what: String,
    cached: Answered,
    uncached: Answered,
}

impl Difference {
    pub(super) fn new(steps: Vec<Step>, what: String, cached: Answered, uncached: Answered) -> Self {
        Self(Box::new(Found { steps, what, cached, uncached }))
    }

    pub(super) fn len(&self) -> usize {
        self.0.steps.len()
    }

    /// The requests that lead to it; the last is the one that they answered differently. They can be [run](super::Twin::run)
    /// again.
    pub fn requests(&self) -> Vec<Request<Bytes>> {
        self.0.steps.iter().map(|step| step.request.clone()).collect()
    }

    /// What differs: `status`, `body`, ``header `content-language` ``.
    pub fn what(&self) -> &str {
        &self.0.what
    }

    /// What the mistake usually is: a write between what was stored and what was read that does not drop it, or something in
    /// which the two reads differ, and their keys do not.
    fn guess(&self) -> Option<String> {
        let (last, before) = self.0.steps.split_last()?;
        let handling = |step: &Step| step.told.as_ref().map(|told| told.handling);
        if !matches!(handling(last)?, Handling::Hit | Handling::Stale | Handling::Coalesced) {
            return None;
        }
        let path = last.request.uri().path();
        let is_filler = |step: &Step| handling(step) == Some(Handling::Miss) && step.request.uri().path() == path;
        let filled = before.iter().rposition(is_filler)?;
        if let Some(write) = before[filled..].iter().rfind(|step| !is_read(&step.request)) {
            let (method, path) = (write.request.method(), write.request.uri().path());
            return Some(format!(
                "`{method} {path}` does not drop what is read here: declare the mutation, what else it changes, or how ids are \
                 spelled (`entity`)"
            ));
        }
        let what = unlike(&before[filled].request, &last.request).join(" and ");
        (!what.is_empty()).then(|| format!("the response depends on {what}, and its key does not: say so in its route"))
    }
}

/// In what two requests for one path differ.
fn unlike(one: &Request<Bytes>, other: &Request<Bytes>) -> Vec<String> {
    let (own, others) = (one.headers(), other.headers());
    let names: BTreeSet<_> = own.keys().chain(others.keys()).map(HeaderName::as_str).collect();
    let unlike = names.into_iter().filter(|name| !own.get_all(*name).iter().eq(others.get_all(*name)));
    let mut unlike: Vec<_> = unlike.map(|name| format!("the header `{name}`")).collect();
    unlike.extend((one.uri().query() != other.uri().query()).then(|| "the query".to_owned()));
    unlike
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Found { steps, what, cached, uncached } = &*self.0;
        writeln!(f, "the cached service and its twin without a cache differ in: {what}\n\nafter")?;
        for (at, step) in steps.iter().enumerate() {
            writeln!(f, "{:>4}. {step}", at + 1)?;
        }
        writeln!(f, "\ncached:   {}", Shown(cached, uncached))?;
        write!(f, "uncached: {}", Shown(uncached, cached))?;
        match self.guess() {
            Some(guess) => write!(f, "\n\nIt looks as if {guess}."),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl Error for Difference {}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { request, told } = self;
        write!(f, "{} {}", request.method(), request.uri())?;
        for (name, value) in request.headers() {
            write!(f, "  {name}: {}", String::from_utf8_lossy(value.as_bytes()))?;
        }
        let body = request.body();
        if !body.is_empty() {
            let cut = if body.len() > SHOWN { "…" } else { "" };
            write!(f, "  {}{cut}", String::from_utf8_lossy(&body[..body.len().min(SHOWN)]))?;
        }
        match told {
            Some(told) => write!(f, "  -> {told}"),
            None => Ok(()),
        }
    }
}
