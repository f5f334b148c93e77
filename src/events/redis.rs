//! Events from a stream of Redis. (Feature `redis`.)

use std::fmt;

use super::{Batch, Event, EventSource, Notes, Received, SourceError, SourceFuture};
use crate::{
    error::ConfigError,
    store::{StreamEntry, StreamRead, StreamReader},
};

/// Events that others add to a stream of Redis (`XADD`), as a source.
///
/// An entry is an event: with the one field `event`, which has it as the JSON of an [`Event`], or with a field `name`, perhaps a
/// `tenant`, and the event's own fields, of which each may be there several times.
///
/// ```console
/// > XADD events MAXLEN ~ 1000000 * name agents tenant acme op update id a1 id a2
/// > XADD events MAXLEN ~ 1000000 * event '{"name": "agents", "tenant": "acme", "fields": {"id": ["a1", "a2"]}}'
/// ```
///
/// [`docs::events`](crate::docs::events) has what is guaranteed, and the rights that are needed. Needs Redis 6.2 or later (7.0 to
/// tell every trimming that lost nothing from one that did), or a server like it, with scripts and `INFO`.
#[derive(Debug)]
pub struct RedisStream {
    reader: StreamReader,
    name: String,
}

/// Configures a [`RedisStream`].
#[must_use]
pub struct RedisStreamBuilder {
    url: String,
    stream: String,
    group: Option<String>,
    name: Option<String>,
}

impl RedisStream {
    /// Reads a stream at this address: `redis://host:6379/0`, `rediss://…` (feature `redis-tls`), `unix:///path`, or
    /// `redis+sentinel://host:26379,host:26379/master`.
    pub fn builder(url: impl Into<String>, stream: impl Into<String>) -> RedisStreamBuilder {
        RedisStreamBuilder { url: url.into(), stream: stream.into(), group: None, name: None }
    }
}

impl RedisStreamBuilder {
    /// One process reads for all that name this group and have their store in common; when it is gone, another goes on where it
    /// was. By default each process reads for itself, as is right for a store in process, and begins with a
    /// [gap](Received::Gap).
    pub fn group(mut self, fleet: impl Into<String>) -> Self {
        self.group = Some(fleet.into());
        self
    }

    /// What it is called in logs and metrics; by default `redis:` and the stream.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Checks what was given. It connects when it is first read.
    ///
    /// # Errors
    /// An address that cannot be read, needs a feature that is not turned on, or is a cluster's; an empty name.
    pub fn build(self) -> Result<RedisStream, ConfigError> {
        let name = self.name.unwrap_or_else(|| format!("redis:{}", self.stream));
        if name.is_empty() {
            return Err(ConfigError::new(format!("stream `{}`: its source has no name; give it one", self.stream)));
        }
        Ok(RedisStream { reader: StreamReader::new(&self.url, &self.stream, self.group.as_deref(), false)?, name })
    }
}

/// Without its address, which may have a password.
impl fmt::Debug for RedisStreamBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisStreamBuilder")
            .field("stream", &self.stream)
            .field("group", &self.group)
            .finish_non_exhaustive()
    }
}

impl EventSource for RedisStream {
    fn name(&self) -> &str {
        &self.name
    }

    /// What one service has dropped, another has not: its group is its own.
    fn start(&mut self, notes: Notes) {
        let mend = match (self.reader.joins(notes.service()), notes.are_shared()) {
            (true, false) => "each process has a store of its own, and one of the group reads: leave the group out",
            (false, true) => {
                "the store is shared, and each process drops for all, beginning with a gap: give it a group"
            }
            _ => return,
        };
        tracing::warn!(source = self.name, mend, "a stream is not read as its store is shared");
    }

    fn next(&mut self) -> SourceFuture<'_, Received> {
        Box::pin(async move {
            loop {
                return Ok(
                    match self.reader.next().await.map_err(|trouble| SourceError::new(trouble.to_string()))? {
                        StreamRead::Entries(entries) => Received::Events(batch(entries)),
                        StreamRead::Gap(why) => Received::Gap(why),
                        StreamRead::Proof(time) => Received::Proof(time),
                        // The store is common: what another process does there is done for this one, too.
                        StreamRead::Torn(_) => continue,
                    },
                );
            }
        })
    }

    fn ack(&mut self) -> SourceFuture<'_, ()> {
        Box::pin(async move { self.reader.ack().await.map_err(|trouble| SourceError::new(trouble.to_string())) })
    }
}

fn batch(entries: Vec<StreamEntry>) -> Batch {
    let mut batch = Batch::default();
    for entry in entries {
        match event(entry.fields) {
            Ok(event) => batch.events.push(event),
            Err(why) => batch = batch.unreadable(why),
        }
    }
    batch
}

/// What an entry says, or why that is no event.
pub(crate) fn event(fields: Vec<(Vec<u8>, Vec<u8>)>) -> Result<Event, &'static str> {
    if let [(name, json)] = &fields[..]
        && name == b"event"
    {
        let event: Event = serde_json::from_slice(json).map_err(|_| "the field `event` is no event as JSON")?;
        return if event.name().is_empty() { Err("the name is empty") } else { Ok(event) };
    }
    let (mut name, mut tenant, mut rest) = (None, None, vec![]);
    for (field, value) in fields {
        let (Ok(field), Ok(value)) = (String::from_utf8(field), String::from_utf8(value)) else {
            return Err("a field is no UTF-8");
        };
        let once = match &*field {
            "name" => name.replace(value),
            "tenant" => tenant.replace(value),
            _ => {
                rest.push((field, value));
                None
            }
        };
        if once.is_some() {
            return Err("the name or the tenant is there twice");
        }
    }
    match name {
        None => Err("neither a field `name`, nor `event` alone"),
        Some(name) if name.is_empty() => Err("the name is empty"),
        Some(name) => {
            let event = tenant.into_iter().fold(Event::new(name), Event::tenant);
            Ok(rest.into_iter().fold(event, |event, (field, value)| event.field(field, value)))
        }
    }
}
