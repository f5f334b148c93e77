//! What has come of the log, until it is given.

use pgwire_replication::{Lsn, ReplicationEvent};

use super::sql::{PREFIX, TRUNCATE};
use crate::events::Event;

/// What is given at once, in bytes of messages: so a transaction of any length takes little memory.
const MOST: usize = 256 << 10;

/// What a message takes beside its content.
const MESSAGE: usize = 64;

/// Messages, and where their transactions end.
#[derive(Default)]
pub(crate) struct Gathered {
    pub(crate) events: Vec<Event>,
    pub(crate) unreadable: Vec<&'static str>,
    /// The transactions that these are of.
    pub(crate) xids: Vec<u32>,
    /// Everything before has come, this included.
    pub(crate) to: Lsn,
    /// A table was truncated: said after what came before.
    pub(crate) truncated: Option<String>,
    size: usize,
    /// The transaction that has begun.
    open: Option<u32>,
    /// What is here has the end of a transaction.
    is_whole: bool,
}

impl Gathered {
    /// Nothing, up to here.
    pub(crate) fn at(to: Lsn) -> Self {
        Self { to, ..Self::default() }
    }

    pub(crate) fn take(&mut self, event: ReplicationEvent) {
        match event {
            ReplicationEvent::Begin { xid, .. } => self.open = Some(xid),
            ReplicationEvent::Message { transactional, prefix, content, .. } if prefix == PREFIX => {
                self.size += content.len() + MESSAGE;
                match if transactional { read(&content) } else { Err("a message that is not transactional") } {
                    Ok(event) if is_truncation(&event) => {
                        self.truncated = Some(format!("{} was truncated", event.name()));
                    }
                    Ok(event) => self.events.push(event),
                    Err(why) => self.unreadable.push(why),
                }
                if let Some(xid) = self.open.filter(|xid| self.xids.last() != Some(xid)) {
                    self.xids.push(xid);
                }
                self.is_whole |= self.open.is_none();
            }
            ReplicationEvent::Commit { end_lsn, .. } => {
                self.open = None;
                self.to = self.to.max(end_lsn);
                self.is_whole = !self.is_empty();
            }
            // Within a transaction it tells of its beginning at most.
            ReplicationEvent::KeepAlive { wal_end, .. } if self.open.is_none() => self.to = self.to.max(wal_end),
            _ => {}
        }
    }

    /// Whether more can be taken before it is given.
    pub(crate) fn has_room(&self) -> bool {
        self.size < MOST && self.truncated.is_none()
    }

    /// Whether there is something to be given now: the end of a transaction, or a part of a long one.
    pub(crate) fn is_due(&self) -> bool {
        !self.is_empty() && (self.is_whole || !self.has_room())
    }

    fn is_empty(&self) -> bool {
        self.events.is_empty() && self.unreadable.is_empty()
    }

    /// What has come; what comes goes on from here.
    pub(crate) fn give(&mut self) -> Self {
        let next = Self { to: self.to, open: self.open, truncated: self.truncated.take(), ..Self::default() };
        std::mem::replace(self, next)
    }
}

/// In words that are the same for all of a kind: anybody may write such a message.
fn read(content: &[u8]) -> Result<Event, &'static str> {
    serde_json::from_slice(content).map_err(|_| "a message that is no event")
}

/// Which rows, nobody knows any more.
fn is_truncation(event: &Event) -> bool {
    event.values("op") == [TRUNCATE]
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn begin(xid: u32) -> ReplicationEvent {
        ReplicationEvent::Begin { final_lsn: Lsn(0), xid, commit_time_micros: 0 }
    }

    fn commit(end: u64) -> ReplicationEvent {
        ReplicationEvent::Commit { lsn: Lsn(0), end_lsn: Lsn(end), commit_time_micros: 0 }
    }

    fn alive(end: u64) -> ReplicationEvent {
        ReplicationEvent::KeepAlive { wal_end: Lsn(end), reply_requested: false, server_time_micros: 0 }
    }

    fn message(content: impl Into<String>) -> ReplicationEvent {
        let content = Bytes::from(content.into());
        ReplicationEvent::Message { transactional: true, lsn: Lsn(0), prefix: PREFIX.to_owned(), content }
    }

    #[test]
    fn an_open_transaction_is_not_read() {
        let mut gathered = Gathered::at(Lsn(5));
        for event in [begin(1), message(r#"{"name": "a"}"#), commit(10), begin(2), alive(30), message("{}")] {
            gathered.take(event);
        }
        assert!(gathered.is_due());
        let given = gathered.give();
        assert_eq!((given.to, &*given.xids, given.events.len(), given.unreadable.len()), (Lsn(10), &[1, 2][..], 1, 1));
        assert!(!gathered.is_due());
        gathered.take(alive(40));
        assert_eq!(gathered.to, Lsn(10));
        gathered.take(commit(20));
        gathered.take(alive(15));
        assert_eq!(gathered.to, Lsn(20));
        gathered.take(alive(40));
        assert_eq!((gathered.to, gathered.is_due()), (Lsn(40), false));
    }

    #[test]
    fn a_long_transaction_is_given_in_parts() {
        let mut gathered = Gathered::at(Lsn(5));
        gathered.take(begin(1));
        let name = "n".repeat(MOST / 2);
        gathered.take(message(format!(r#"{{"name": "{name}"}}"#)));
        assert!(!gathered.is_due() && gathered.has_room());
        gathered.take(message(format!(r#"{{"name": "{name}"}}"#)));
        assert!(gathered.is_due() && !gathered.has_room());
        assert_eq!(gathered.give().to, Lsn(5));
        gathered.take(message(r#"{"name": "last"}"#));
        assert!(!gathered.is_due());
        gathered.take(commit(10));
        let given = gathered.give();
        assert_eq!((given.to, &*given.xids, given.events.len()), (Lsn(10), &[1][..], 1));
    }

    #[test]
    fn a_truncation_is_told_after_what_was_before() {
        let mut gathered = Gathered::at(Lsn(5));
        let truncate = r#"{"name": "a", "fields": {"op": "truncate"}}"#;
        for event in [begin(1), message(r#"{"name": "b"}"#), message(truncate)] {
            gathered.take(event);
        }
        assert!(gathered.is_due() && !gathered.has_room());
        assert_eq!(gathered.give().events.len(), 1);
        assert_eq!((gathered.truncated.as_deref(), gathered.is_due()), (Some("a was truncated"), false));
    }
}
