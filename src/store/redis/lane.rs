//! A connection of our own for look-ups, beside the client library's: it writes what gathers of many callers at once, and
//! makes nothing of replies but what is looked for.
//!
//! It is only used where it leads, provably, to the process that the other one leads to: it is opened after the other, and
//! what it leads to must be in the same reign. So what heartbeats prove by the other holds for it, for as long as it is open.
//! It belongs to its server, and each is given up with the other. Encrypted servers, and those
//! that do not say which they are, are asked over the client library's connection alone.
//!
//! *Why tier `on` may look up over it although pushes come over the other.* What is held is held under versions of its tags
//! that were captured before the command was sent (`held::Held`). What drops a generation that is in the reply
//! comes after the command, so its push is heard after the capture, in whatever order with the reply: before the entry is held,
//! which then is not held, or after that, and then it is not answered from. That pushes were heard is proven by heartbeats on
//! their own connection. And an interruption of the pushes drops the era, which is captured as well.

use std::{io, sync::Arc, time::Duration};

use bytes::BytesMut;
use redis::{ConnectionInfo, Value};
use tokio::time::timeout;

use super::{
    dial::Dial,
    identity::Identity,
    resp::{Reply, Resp, write},
    trouble::Trouble,
};
use crate::mux::{Broken, Mux};

/// How long an answer may take at least before the connection is given up. (Heartbeats go over it as well.)
const PATIENCE: Duration = Duration::from_secs(2);

pub(super) struct Lane(Mux<Resp>);

impl Lane {
    /// Connects, logs in, and finds out where it leads; nothing if that is elsewhere.
    async fn open(
        info: &ConnectionInfo,
        dial: &Dial,
        reign: u128,
        heartbeat: Duration,
    ) -> Result<Option<Self>, Trouble> {
        let silent = |error: io::Error| Trouble::silent(&error.to_string());
        // Nobody can tell where it leads.
        if reign == 0 {
            return Ok(None);
        }
        let Some(stream) = dial.stream(info).await.map_err(silent)? else { return Ok(None) };
        let (mux, serving) = Mux::new(stream, Resp::default(), PATIENCE.max(heartbeat * 2));
        tokio::spawn(serving);
        let this = Self(mux);
        let replies = this.greet(info).await?;
        // Those of the login come first.
        let at = replies.len().saturating_sub(2);
        for reply in replies.iter().take(at) {
            if let Value::ServerError(error) = reply {
                return Err(error.into());
            }
        }
        let identity = Identity::of(replies.get(at..).unwrap_or_default())?;
        Ok((identity.reign == Some(reign)).then_some(this))
    }

    async fn greet(&self, info: &ConnectionInfo) -> Result<Vec<Value>, Trouble> {
        let settings = info.redis_settings();
        let mut ask = redis::pipe();
        if let Some(password) = settings.password() {
            ask.cmd("AUTH").arg(settings.username()).arg(password);
        }
        if settings.db() != 0 {
            ask.cmd("SELECT").arg(settings.db());
        }
        ask.cmd("INFO").arg("server").cmd("INFO").arg("replication");
        let packed = ask.get_packed_pipeline();
        let count = u32::try_from(ask.len()).unwrap_or(u32::MAX);
        let answer = self.0.call(count, |out, _| out.extend_from_slice(&packed)).await;
        let answer = answer.map_err(|broken| Trouble::silent(&broken.to_string()))?;
        answer.replies.iter().flatten().map(|reply| reply.value().map_err(Trouble::from)).collect()
    }

    /// Makes one command, at once, or, if `is_shared`, with who asks the same.
    pub(super) fn ask<W: FnOnce(&mut BytesMut)>(
        &self,
        is_shared: bool,
        write: W,
    ) -> impl Future<Output = Result<Reply, Broken>> + use<'_, W> {
        let answer = self.0.ask(is_shared, write);
        async move {
            let reply = answer.await?.replies.pop().flatten();
            reply.ok_or_else(|| Broken::Unanswered(Arc::from("an answer without a reply")))
        }
    }

    /// Gives it up.
    pub(super) fn end(&self, why: &'static str) {
        self.0.end(&why.into());
    }

    pub(super) fn is_over(&self) -> bool {
        self.0.is_over()
    }

    /// A heartbeat over it: only that it is answered counts.
    pub(super) async fn beat(&self) -> Result<(), Trouble> {
        let time = |out: &mut BytesMut| write(out, "TIME", 0, std::iter::empty::<[&[u8]; 0]>());
        self.ask(false, time).await.map(drop).map_err(|broken| Trouble::silent(&broken.to_string()))
    }
}

/// Opens it in that time; where that fails, all goes over the client library's connection.
pub(super) async fn open(
    info: &ConnectionInfo,
    dial: &Dial,
    reign: u128,
    heartbeat: Duration,
    within: Duration,
) -> Option<Lane> {
    let opened = timeout(within, Lane::open(info, dial, reign, heartbeat)).await;
    match opened.unwrap_or_else(|_| Err(Trouble::silent("not in time"))) {
        Ok(lane) => lane,
        Err(trouble) => {
            tracing::debug!(why = %trouble, "no second connection to Redis: look-ups share the first");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::BufMut;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    use super::*;
    use crate::{
        mux::{Framing, tests::all_are_answered},
        store::redis::server::tests::{Answers, Fake},
    };

    const PUSH: &[u8] = b">2\r\n$10\r\ninvalidate\r\n*1\r\n$1\r\ng\r\n";

    fn lane(room: usize) -> (Lane, DuplexStream) {
        let (near, far) = duplex(room);
        let (mux, serving) = Mux::new(near, Resp::default(), PATIENCE);
        tokio::spawn(serving);
        (Lane(mux), far)
    }

    /// A server that answers `MGET` with its keys, in pieces, and says something else now and then; after so many answers it
    /// goes in the middle of one.
    async fn serve(mut far: DuplexStream, piece: usize, answers: usize) {
        let (mut scanner, mut bytes) = (Resp::default(), BytesMut::new());
        let mut answered = 0;
        while matches!(far.read_buf(&mut bytes).await, Ok(1..)) {
            let mut out = BytesMut::new();
            while let Some(command) = scanner.next(&mut bytes).unwrap() {
                let keys: Vec<_> = command.strings().unwrap().skip(1).flatten().collect();
                if answered % 3 == 0 {
                    out.put_slice(PUSH);
                }
                out.put_slice(format!("*{}\r\n", keys.len()).as_bytes());
                for key in keys {
                    out.put_slice(format!("${}\r\n", key.len()).as_bytes());
                    out.put_slice(key);
                    out.put_slice(b"\r\n");
                }
                answered += 1;
                if answered == answers {
                    out.truncate(out.len() - 3);
                    let _ = far.write_all(&out).await;
                    return;
                }
            }
            for piece in out.chunks(piece) {
                if far.write_all(piece).await.is_err() {
                    return;
                }
            }
        }
    }

    async fn echo(lane: &Lane, key: &str) -> Result<String, Broken> {
        let keys = [[b"a:", key.as_bytes()], [b"b:", key.as_bytes()]];
        let reply = lane.ask(true, |out| write(out, "MGET", 2, keys.into_iter())).await?;
        let strings: Vec<_> = reply.strings().unwrap().map(|s| String::from_utf8_lossy(s.unwrap())).collect();
        assert_eq!(strings[0][2..], strings[1][2..]);
        Ok(strings[0][2..].to_owned())
    }

    #[tokio::test]
    async fn everybody_is_answered_what_they_asked_whoever_goes() {
        for (room, piece) in [(1 << 16, 1 << 16), (1 << 16, 1), (7, 3)] {
            let (lane, far) = lane(room);
            tokio::spawn(serve(far, piece, usize::MAX));
            let lane = Arc::new(lane);
            all_are_answered(|key| {
                let lane = lane.clone();
                async move { echo(&lane, &key).await }
            })
            .await;
            assert!(!lane.is_over());
        }
    }

    #[tokio::test]
    async fn half_a_reply_is_none() {
        let (lane, far) = lane(1 << 16);
        tokio::spawn(serve(far, 5, 40));
        let keys: Vec<_> = (0..100).map(|i| format!("key {i}")).collect();
        let answers = futures_util::future::join_all(keys.iter().map(|key| echo(&lane, key))).await;
        for (i, (key, answer)) in keys.iter().zip(answers).enumerate() {
            match answer {
                Ok(answer) => assert!(i < 39 && answer == *key, "{i}: {answer}"),
                Err(broken) => assert!(i >= 39 && matches!(broken, Broken::Unanswered(_)), "{i}: {broken}"),
            }
        }
        assert!(lane.is_over() && matches!(echo(&lane, "more").await, Err(Broken::Unsent(_))));
    }

    /// A heartbeat that nobody answers is none, and what is given up is over.
    #[tokio::test(start_paused = true)]
    async fn it_lives_while_it_is_answered() {
        let (near, far) = lane(1 << 16);
        tokio::spawn(serve(far, 1 << 16, usize::MAX));
        assert!(near.beat().await.is_ok() && !near.is_over());
        near.end("enough");
        assert!(near.is_over() && near.beat().await.is_err());
        let (near, _far) = lane(1 << 16);
        assert!(near.beat().await.is_err() && near.is_over());
    }

    /// Behind one address there may be several servers, of which any may be given a new connection.
    #[tokio::test]
    async fn what_leads_to_another_server_is_not_used() {
        let says = ["run_id:a\r\n", "role:master\r\nmaster_replid:b\r\n"];
        let reign = Identity::of(&says.map(|text| Value::BulkString(text.into()))).unwrap().reign.unwrap();
        for (answer, is_used) in [
            ((|_| None) as Answers, true),
            (|line| (line == "INFO server").then_some("$8\r\nrun_id:b\r\n"), false),
            (|line| (line == "INFO replication").then_some("$30\r\nrole:master\r\nmaster_replid:c\r\n\r\n"), false),
            (|line| line.starts_with("INFO").then_some("$0\r\n\r\n"), false),
        ] {
            let info = Fake::new(answer).await.info;
            let lane = open(&info, &Dial::Network, reign, Duration::from_secs(10), Duration::from_secs(10)).await;
            let own = ["INFO server", "INFO replication"].map(answer);
            assert_eq!(lane.is_some(), is_used, "{own:?}");
            // Of a server that hides which it is nothing is proven.
            let hidden = open(&info, &Dial::Network, 0, Duration::from_secs(10), Duration::from_secs(10)).await;
            assert!(hidden.is_none(), "{own:?}");
        }
    }
}
