//! What a server answers (RESP2, and pushes): where a reply ends, without making anything of it, and the strings in it.
//!
//! A scan goes on where it stopped, however small the pieces are, and counts how many values are still to come instead of
//! going into them: no nesting is too deep. What only RESP3 has is no reply, since it is not asked for, but for pushes, which
//! nobody has asked for by definition.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use redis::{RedisResult, Value};

use crate::mux::{Asked, COPIED, Framing, Garbled, Place};

/// No line is longer.
const LINE: usize = 4 << 10;

/// No string is longer: the server's own limit, if nobody has raised it.
const LONGEST: usize = 512 << 20;

/// No reply is longer.
const LARGEST: usize = 1 << 30;

/// No reply has more values.
const VALUES: usize = 1 << 20;

/// A whole reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reply(Bytes);

/// The scanner.
#[derive(Debug)]
pub(crate) struct Resp {
    /// So much of the next reply is known.
    scanned: usize,
    /// So many values of it are still to come.
    missing: usize,
}

impl Default for Resp {
    fn default() -> Self {
        Self { scanned: 0, missing: 1 }
    }
}

impl Framing for Resp {
    type Reply = Reply;

    fn next(&mut self, bytes: &mut BytesMut) -> Result<Option<Reply>, Garbled> {
        while self.scan(bytes)? {
            let size = std::mem::take(self).scanned;
            if bytes.first() == Some(&b'>') {
                bytes.advance(size);
                continue;
            }
            let reply = bytes.split_to(size);
            return Ok(Some(Reply(if size < COPIED { Bytes::copy_from_slice(&reply) } else { reply.freeze() })));
        }
        Ok(None)
    }

    /// Replies come in the order of what was asked.
    fn place(&self, _: &Reply, _: Asked) -> Place {
        Place::Next
    }
}

impl Resp {
    /// Goes on; whether the reply is whole.
    fn scan(&mut self, bytes: &[u8]) -> Result<bool, Garbled> {
        while self.missing > 0 {
            let Some((head, after)) = line(bytes, self.scanned)? else { return Ok(false) };
            let (more, size) = match head.split_first() {
                Some((b'+' | b'-', _)) => (0, 0),
                Some((b':', number)) => (0, number_in(number).map(|_| 0)?),
                Some((b'_', [])) => (0, 0),
                Some((b'$', length)) => (0, length_in(length, LONGEST)?.map_or(0, |length| length + 2)),
                Some((b'*', count)) => (length_in(count, VALUES)?.unwrap_or(0), 0),
                Some((b'>', count)) if self.scanned == 0 => (length_in(count, VALUES)?.unwrap_or(0), 0),
                _ => return Err(Garbled("a line that is no reply")),
            };
            let end = after + size;
            if end > LARGEST || self.missing + more > VALUES {
                return Err(Garbled("a reply that is too large"));
            }
            if size > 0 {
                let Some(body) = bytes.get(after..end) else { return Ok(false) };
                if !body.ends_with(b"\r\n") {
                    return Err(Garbled("a string that is longer than it says"));
                }
            }
            (self.scanned, self.missing) = (end, self.missing - 1 + more);
        }
        Ok(true)
    }
}

/// The line that begins there, without its end, and what comes after it.
fn line(bytes: &[u8], from: usize) -> Result<Option<(&[u8], usize)>, Garbled> {
    let rest = bytes.get(from..).unwrap_or_default();
    let Some(end) = rest.iter().take(LINE).position(|&c| c == b'\n') else {
        return if rest.len() < LINE { Ok(None) } else { Err(Garbled("a line without an end")) };
    };
    let line = rest.get(..end).and_then(|line| line.strip_suffix(b"\r")).ok_or(Garbled("half a line's end"))?;
    Ok(Some((line, from + end + 1)))
}

fn number_in(digits: &[u8]) -> Result<i64, Garbled> {
    // What all lengths look like, and what does not overflow.
    if (1..=18).contains(&digits.len()) {
        let digit = |byte: &u8| Some(byte.wrapping_sub(b'0')).filter(|digit| *digit < 10);
        if let Some(number) = digits.iter().try_fold(0, |number, byte| Some(number * 10 + i64::from(digit(byte)?))) {
            return Ok(number);
        }
    }
    let number = str::from_utf8(digits).ok().and_then(|digits| digits.parse().ok());
    number.ok_or(Garbled("a number that is none"))
}

/// A length, or that there is nothing.
fn length_in(digits: &[u8], most: usize) -> Result<Option<usize>, Garbled> {
    match number_in(digits)? {
        -1 => Ok(None),
        length => {
            let length = usize::try_from(length).ok().filter(|length| *length <= most);
            length.map(Some).ok_or(Garbled("a length that makes no sense"))
        }
    }
}

impl Reply {
    /// The strings of an array, in their order; none for what is no string. Nothing if it is no array.
    pub(crate) fn strings(&self) -> Option<impl Iterator<Item = Option<&[u8]>>> {
        let (head, after) = line(&self.0, 0).ok()??;
        let count = length_in(head.strip_prefix(b"*")?, VALUES).ok()??;
        let mut rest = self.0.get(after..)?;
        Some((0..count).map_while(move |_| {
            if let Some((string, after)) = string(rest) {
                rest = after;
                return Some(Some(string));
            }
            let mut value = Resp::default();
            value.scan(rest).ok()?.then_some(())?;
            rest = rest.get(value.scanned..)?;
            Some(None)
        }))
    }

    /// A part of it that is kept.
    pub(crate) fn keep(&self, part: &[u8]) -> Bytes {
        self.0.slice_ref(part)
    }

    /// What it is to the client library.
    pub(crate) fn value(&self) -> RedisResult<Value> {
        redis::parse_redis_value(&self.0)
    }
}

/// The string that these values begin with, if it is one that is there, and what comes after it.
fn string(values: &[u8]) -> Option<(&[u8], &[u8])> {
    let (head, after) = line(values, 0).ok()??;
    let length = length_in(head.strip_prefix(b"$")?, LONGEST).ok()??;
    Some((values.get(after..after + length)?, values.get(after + length + 2..)?))
}

/// Writes a command: its name, and so many arguments, in parts.
pub(crate) fn write<'a, const N: usize>(
    out: &mut BytesMut,
    name: &str,
    count: usize,
    arguments: impl Iterator<Item = [&'a [u8]; N]>,
) {
    let mut digits = itoa::Buffer::new();
    let mut head = |out: &mut BytesMut, kind: u8, length: usize| {
        out.put_u8(kind);
        out.put_slice(digits.format(length).as_bytes());
        out.put_slice(b"\r\n");
    };
    head(out, b'*', 1 + count);
    head(out, b'$', name.len());
    out.put_slice(name.as_bytes());
    out.put_slice(b"\r\n");
    for parts in arguments {
        head(out, b'$', parts.iter().map(|part| part.len()).sum());
        parts.iter().for_each(|part| out.put_slice(part));
        out.put_slice(b"\r\n");
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::mux::replies_in;

    fn scan(data: &[u8], piece: usize) -> (Vec<Reply>, bool) {
        replies_in(Resp::default(), data, piece)
    }

    fn encode(value: &Value, out: &mut Vec<u8>) {
        match value {
            Value::Nil => out.extend_from_slice(b"$-1\r\n"),
            Value::Int(number) => out.extend_from_slice(format!(":{number}\r\n").as_bytes()),
            Value::SimpleString(text) => out.extend_from_slice(format!("+{text}\r\n").as_bytes()),
            Value::BulkString(bytes) => {
                out.extend_from_slice(format!("${}\r\n", bytes.len()).as_bytes());
                out.extend_from_slice(bytes);
                out.extend_from_slice(b"\r\n");
            }
            Value::Array(values) => {
                out.extend_from_slice(format!("*{}\r\n", values.len()).as_bytes());
                values.iter().for_each(|value| encode(value, out));
            }
            other => panic!("{other:?}"),
        }
    }

    fn value() -> impl Strategy<Value = Value> {
        let bytes = proptest::collection::vec(any::<u8>(), 0..40);
        let leaf = prop_oneof![
            Just(Value::Nil),
            any::<i64>().prop_map(Value::Int),
            "[a-z ]{1,20}".prop_filter("it is `Okay`", |text| text != "ok").prop_map(Value::SimpleString),
            bytes.prop_map(Value::BulkString),
        ];
        leaf.prop_recursive(4, 40, 6, |inner| proptest::collection::vec(inner, 0..6).prop_map(Value::Array))
    }

    proptest! {
        /// Whatever it is cut into, and whatever is pushed in between.
        #[test]
        fn replies_are_what_was_answered(
            values in proptest::collection::vec((value(), any::<bool>()), 0..10),
            piece in 1_usize..200,
        ) {
            let mut data = vec![];
            for (value, is_after_push) in &values {
                if *is_after_push {
                    data.extend_from_slice(b">2\r\n$10\r\ninvalidate\r\n*1\r\n$1\r\ng\r\n>2\r\n+x\r\n_\r\n");
                }
                encode(value, &mut data);
            }
            let (replies, is_garbled) = scan(&data, piece);
            prop_assert!(!is_garbled);
            let read: Vec<_> = replies.iter().map(|reply| reply.value().unwrap()).collect();
            prop_assert_eq!(&read, &values.iter().map(|(value, _)| value.clone()).collect::<Vec<_>>());
            for (reply, value) in replies.iter().zip(read) {
                let strings = reply.strings().map(|all| all.map(|s| s.map(<[u8]>::to_vec)).collect::<Vec<_>>());
                let expected = match value {
                    Value::Array(all) => Some(all.into_iter().map(|v| match v {
                        Value::BulkString(bytes) => Some(bytes),
                        _ => None,
                    }).collect()),
                    _ => None,
                };
                prop_assert_eq!(strings, expected);
            }
        }

        #[test]
        fn no_input_is_too_strange(data in proptest::collection::vec(any::<u8>(), 0..100), piece in 1_usize..10) {
            let (replies, _) = scan(&data, piece);
            for reply in replies {
                let _ = (reply.strings().map(Iterator::count), reply.value());
            }
        }
    }

    #[test]
    fn what_is_no_reply_is_refused() {
        for data in [
            "?\r\n",
            "\r\n",
            "\n",
            "+OK\n",
            "$3\r\nabcd\r\n",
            "$-2\r\n",
            "$536870913\r\n",
            "*1048577\r\n",
            ":x\r\n",
            "*x\r\n",
            "*1\r\n>1\r\n",
            "_x\r\n",
            "%1\r\n",
            "$99999999999999999999\r\n",
        ] {
            assert_eq!(scan(data.as_bytes(), 1), (vec![], true), "{data:?}");
        }
        let deep = "*1\r\n".repeat(100_000) + ":1\r\n";
        assert_eq!(scan(deep.as_bytes(), 1 << 16).0.len(), 1);
        assert_eq!(scan("*600000\r\n".repeat(2).as_bytes(), 1 << 16), (vec![], true));
        assert_eq!(scan(&[b'+'; LINE], 7), (vec![], true));
    }

    #[test]
    fn what_is_kept_of_a_small_reply_keeps_nothing_else() {
        let mut bytes = BytesMut::from(&b"*1\r\n$3\r\nabc\r\n+OK\r\n"[..]);
        let reply = Resp::default().next(&mut bytes).unwrap().unwrap();
        let abc = reply.strings().unwrap().next().unwrap().unwrap();
        assert_eq!(reply.keep(abc), "abc");
        assert!(bytes.try_reclaim(0) && bytes.capacity() >= 5, "{bytes:?}");
    }

    #[test]
    fn a_command_is_written_as_the_client_library_writes_it() {
        let mut out = BytesMut::new();
        write(&mut out, "MGET", 2, [[&b"cas:"[..], b"e:", b"key"], [b"", b"", b"0123456789"]].into_iter());
        assert_eq!(out, redis::cmd("MGET").arg("cas:e:key").arg("0123456789").get_packed_command());
    }
}
