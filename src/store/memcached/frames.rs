//! What memcached answers to meta commands (its `doc/protocol.txt`), line by line.
//!
//! Each call ends with `mn`, whose `MN` says that all before it has been answered: so commands may be quiet. All others carry
//! a number (`O`), which each reply but an error repeats; a reply with another number is nobody's, and its connection
//! is given up.

use bytes::{Buf, Bytes, BytesMut};

use crate::mux::{Asked, COPIED, Framing, Garbled, Place};

/// No line is longer.
const LINE: usize = 4 << 10;

/// The server does not know what it is asked.
pub(super) const OLD: &str =
    "it does not know the meta commands: memcached 1.6.9 or later is needed, without a proxy in between";

/// It says this to whom it does not take.
const FULL: &str = "it has as many connections as it takes (its -c)";

/// One reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) kind: Kind,
    opaque: Option<u32>,
    /// What the value is replaced under, if that was asked for.
    pub(crate) cas: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `VA`
    Value(Bytes),
    /// `HD`
    Done,
    /// `NF`, `EN`
    Absent,
    /// `NS`, `EX`
    Refused,
    /// `MN`
    End,
    /// `CLIENT_ERROR`, `SERVER_ERROR`, in its own words.
    Error(String),
    /// Of commands that are older than the meta ones.
    Line(String),
}

/// The scanner.
pub(crate) struct Frames {
    /// No value is larger.
    pub(crate) largest: usize,
}

impl Framing for Frames {
    type Reply = Reply;

    fn next(&mut self, bytes: &mut BytesMut) -> Result<Option<Reply>, Garbled> {
        let Some(end) = bytes.iter().take(LINE).position(|&c| c == b'\n') else {
            return if bytes.len() < LINE { Ok(None) } else { Err(Garbled("a line without an end")) };
        };
        let line = bytes.get(..end).and_then(|line| line.strip_suffix(b"\r")).ok_or(Garbled("half a line's end"))?;
        let line = str::from_utf8(line).map_err(|_| Garbled("a line that is no text"))?;
        let (code, rest) = line.split_once(' ').unwrap_or((line, ""));
        let kind = match code {
            "VA" => {
                let (size, flags) = rest.split_once(' ').unwrap_or((rest, ""));
                let size = size.parse().ok().filter(|size| *size <= self.largest);
                let size: usize = size.ok_or(Garbled("a value of no size, or of too large a one"))?;
                let Some(after) = bytes.get(end + 1 + size..).and_then(|after| after.get(..2)) else {
                    return Ok(None);
                };
                if after != b"\r\n" {
                    return Err(Garbled("a value that is longer than it says"));
                }
                let (opaque, cas) = numbers(flags)?;
                bytes.advance(end + 1);
                let value = bytes.split_to(size);
                bytes.advance(2);
                let value = if size < COPIED { Bytes::copy_from_slice(&value) } else { value.freeze() };
                return Ok(Some(Reply { kind: Kind::Value(value), opaque, cas }));
            }
            "HD" => Kind::Done,
            "NF" | "EN" => Kind::Absent,
            "NS" | "EX" => Kind::Refused,
            "MN" => Kind::End,
            "CLIENT_ERROR" | "SERVER_ERROR" => Kind::Error(line.to_owned()),
            "ERROR" if rest.contains("connections") => return Err(Garbled(FULL)),
            "ERROR" => return Err(Garbled(OLD)),
            "STAT" | "END" | "VERSION" => Kind::Line(line.to_owned()),
            _ => return Err(Garbled("a line that is no reply")),
        };
        let has_numbers = matches!(kind, Kind::Done | Kind::Absent | Kind::Refused);
        let (opaque, cas) = if has_numbers { numbers(rest)? } else { (None, None) };
        bytes.advance(end + 1);
        Ok(Some(Reply { kind, opaque, cas }))
    }

    fn place(&self, reply: &Reply, call: Asked) -> Place {
        match (&reply.kind, reply.opaque) {
            (Kind::End, _) => Place::End,
            (Kind::Error(_) | Kind::Line(_), _) => Place::Some,
            (_, Some(number)) => match number.wrapping_sub(call.first) {
                at if at < call.count => Place::Command(at as usize),
                _ => Place::Stray,
            },
            (_, None) => Place::Stray,
        }
    }
}

/// The number and the CAS among a reply's flags.
fn numbers(flags: &str) -> Result<(Option<u32>, Option<u64>), Garbled> {
    let (mut opaque, mut cas) = (None, None);
    for flag in flags.split(' ') {
        match flag.as_bytes().first() {
            Some(b'O') => opaque = Some(flag[1..].parse().map_err(|_| Garbled("a number that is none"))?),
            Some(b'c') => cas = Some(flag[1..].parse().map_err(|_| Garbled("a number that is none"))?),
            _ => {}
        }
    }
    Ok((opaque, cas))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_server_says_that_takes_no_more_connections_is_not_taken_for_its_age() {
        let said = |line: &str| Frames { largest: 0 }.next(&mut line.into());
        assert_eq!(said("ERROR Too many open connections\r\n"), Err(Garbled(FULL)));
        assert_eq!(said("ERROR\r\n"), Err(Garbled(OLD)));
    }

    /// A number that nobody has asked under is no place.
    #[test]
    fn a_reply_is_to_a_command_of_its_call() {
        let mut frames = Frames { largest: 0 };
        let mut place = |line: &str, first| {
            let reply = frames.next(&mut line.into()).unwrap().unwrap();
            frames.place(&reply, Asked { first, count: 2 })
        };
        for (line, first, expected) in [
            ("HD O7\r\n", 7, Place::Command(0)),
            ("HD O8\r\n", 7, Place::Command(1)),
            ("HD O9\r\n", 7, Place::Stray),
            ("HD O6\r\n", 7, Place::Stray),
            ("HD O0\r\n", u32::MAX, Place::Command(1)),
            ("HD\r\n", 7, Place::Stray),
            ("MN\r\n", 7, Place::End),
            ("SERVER_ERROR out of memory\r\n", 7, Place::Some),
        ] {
            assert_eq!(place(line, first), expected, "{line:?} {first}");
        }
    }
}
