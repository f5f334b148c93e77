//! The meta commands that are made, and how they are written.

use std::{
    fmt::{self, Write},
    time::Duration,
};

use bytes::{BufMut, BytesMut};
use sha2::{Digest, Sha256};

/// The server takes no longer names.
const LONGEST: usize = 250;

/// Beyond this the server takes a time for one since the epoch.
const RELATIVE: u64 = 30 * 86_400;

/// What is to end later than this has ended at once: the server cuts times to 32 bits, and says nothing.
const LAST: u64 = i32::MAX as u64;

/// The name of an item: printable, without spaces, and not too long, whatever it is made of. (What is too long the server
/// refuses, and takes the value after it for commands.)
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Name(Vec<u8>);

impl Name {
    pub(super) fn new(prefix: &str, kind: &str, rest: &[u8]) -> Self {
        let is_plain = rest.iter().all(|c| c.is_ascii_graphic());
        let mut name = [prefix.as_bytes(), kind.as_bytes()].concat();
        if is_plain && name.len() + rest.len() <= LONGEST {
            name.extend_from_slice(rest);
        } else {
            // No key and no tag begins like this.
            name.push(b'#');
            for byte in Sha256::digest(rest) {
                name.extend_from_slice(&[HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]]);
            }
        }
        Self(name)
    }
}

const HEX: &[u8; 16] = b"0123456789abcdef";

/// When an item ends: in so many seconds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Until(u64);

impl Until {
    /// After this time, or somewhat later (but never later than the server can tell); `now` is the server's, in seconds, the
    /// first of which has begun already.
    pub(super) fn after(time: Duration, now: u64) -> Self {
        let seconds = time.as_secs().saturating_add(u64::from(time.subsec_nanos() > 0)).saturating_add(1);
        let end = now.saturating_add(seconds).min(LAST);
        Self(if end > now.saturating_add(RELATIVE) { end } else { seconds.min(RELATIVE) })
    }
}

/// One command. Those that read are quiet about what is not there.
#[derive(Clone, Debug)]
pub(super) struct Command {
    verb: &'static str,
    name: Name,
    value: Option<Vec<u8>>,
    /// Ready flags.
    flags: &'static str,
    /// A flag, and when the item ends.
    until: Option<(&'static str, Until)>,
    /// Only if it still is this one.
    unchanged: Option<u64>,
}

impl Command {
    fn new(verb: &'static str, name: Name, flags: &'static str) -> Self {
        Self { verb, name, value: None, flags, until: None, unchanged: None }
    }

    /// What an older command answers is nobody's of the others.
    pub(super) fn plain(verb: &'static str) -> Self {
        Self::new(verb, Name(vec![]), "")
    }

    pub(super) fn get(name: Name) -> Self {
        Self::new("mg", name, " v q")
    }

    /// With what it can be replaced under.
    pub(super) fn get_cas(name: Name) -> Self {
        Self::new("mg", name, " v c q")
    }

    /// Moves the end of what is there, and reads nothing.
    pub(super) fn touch(name: Name, until: Until) -> Self {
        Self { until: Some((" T", until)), ..Self::new("mg", name, " q") }
    }

    pub(super) fn set(name: Name, value: Vec<u8>, until: Until) -> Self {
        Self { value: Some(value), until: Some((" T", until)), ..Self::new("ms", name, "") }
    }

    /// Only if there is none.
    pub(super) fn add(name: Name, value: Vec<u8>, until: Until) -> Self {
        Self { flags: " ME", ..Self::set(name, value, until) }
    }

    /// Only if it still is this one.
    pub(super) fn replace(name: Name, value: Vec<u8>, until: Until, unchanged: u64) -> Self {
        Self { unchanged: Some(unchanged), ..Self::set(name, value, until) }
    }

    pub(super) fn delete(name: Name) -> Self {
        Self::new("md", name, "")
    }

    /// Only if it still is this one.
    pub(super) fn delete_unchanged(name: Name, unchanged: u64) -> Self {
        Self { unchanged: Some(unchanged), ..Self::delete(name) }
    }

    /// Adds one to a number, which begins with one.
    pub(super) fn count(name: Name, until: Until) -> Self {
        Self { until: Some((" N", until)), ..Self::new("ma", name, " J1 D1 q") }
    }

    fn write(&self, out: &mut BytesMut, number: u32) -> fmt::Result {
        out.put_slice(self.verb.as_bytes());
        if !self.name.0.is_empty() {
            out.put_u8(b' ');
            out.put_slice(&self.name.0);
            if let Some(value) = &self.value {
                write!(out, " {}", value.len())?;
            }
            out.put_slice(self.flags.as_bytes());
            if let Some((flag, Until(until))) = &self.until {
                write!(out, "{flag}{until}")?;
            }
            if let Some(cas) = &self.unchanged {
                write!(out, " C{cas}")?;
            }
            write!(out, " O{number}")?;
        }
        out.put_slice(b"\r\n");
        if let Some(value) = &self.value {
            out.put_slice(value);
            out.put_slice(b"\r\n");
        }
        Ok(())
    }
}

/// Writes a call: these commands, with numbers from `first` on, and an end.
pub(super) fn write(out: &mut BytesMut, commands: &[Command], first: u32) {
    for (command, number) in commands.iter().zip(0..) {
        // To memory, which does not fail.
        let _ = command.write(out, first.wrapping_add(number));
    }
    out.put_slice(b"mn\r\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_ends_early_nor_at_a_time_that_the_server_cannot_tell() {
        const NOW: u64 = 1_800_000_000;
        let end = |time, now| Until::after(time, now).0;
        for (millis, seconds) in [(0, 1), (1, 2), (700, 2), (1_000, 2), (1_001, 3)] {
            assert_eq!(end(Duration::from_millis(millis), NOW), seconds, "{millis}");
        }
        assert_eq!(end(Duration::from_secs(RELATIVE - 1), NOW), RELATIVE);
        assert_eq!(end(Duration::from_secs(RELATIVE), NOW), NOW + RELATIVE + 1);
        for long in [Duration::from_secs(400_000_000), Duration::MAX] {
            assert_eq!(end(long, NOW), LAST);
            assert_eq!(end(long, LAST - 5), RELATIVE);
        }
    }
}
