//! A network of the test's own between a process and its store.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{sync::Arc, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, tcp},
    sync::{Semaphore, watch},
};

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mode {
    Pass,
    Delay(Duration),
    /// Nothing arrives; all of it does when this is over.
    Hold,
    /// What is asked in these words is held, and what its connection asks after it; all of it arrives when this is over.
    HoldAt(&'static str, &'static str),
    /// Nothing arrives, ever; connections end when this is over.
    Swallow,
    /// Connections end at once.
    Cut,
    /// Connections end in the middle of what is answered.
    CutShort,
    /// What is answered has the first bytes replaced by the others, as long as those.
    Garble(&'static str, &'static str),
}

/// A network of the test's own between a process and its store.
pub struct Proxy {
    /// Of Redis.
    pub url: String,
    pub address: String,
    mode: watch::Sender<Mode>,
    held: Arc<Semaphore>,
}

impl Proxy {
    pub async fn start(port: u16) -> Self {
        Self::between("127.0.0.1", format!("127.0.0.1:{port}")).await
    }

    /// At this address of the test's, to another.
    pub async fn between(host: &str, to: String) -> Self {
        let listener = TcpListener::bind((host, 0)).await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (mode, modes) = watch::channel(Mode::Pass);
        let held = Arc::new(Semaphore::new(0));
        let holds = held.clone();
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let (modes, to, holds) = (modes.clone(), to.clone(), holds.clone());
                tokio::spawn(async move {
                    let Ok(far) = TcpStream::connect(&to).await else { return };
                    let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
                    tokio::select! {
                        _ = pump(near_in, far_out, modes.clone(), Some(&holds)) => {}
                        _ = pump(far_in, near_out, modes, None) => {}
                    }
                });
            }
        });
        Self { url: format!("redis://{address}"), address, mode, held }
    }

    /// That something is held by [`Mode::HoldAt`].
    pub async fn holds(&self) {
        self.held.acquire().await.unwrap().forget();
    }

    /// How long it takes there and back.
    pub async fn ping(&self) -> Duration {
        let mut stream = TcpStream::connect(&self.address).await.unwrap();
        let start = std::time::Instant::now();
        stream.write_all(b"PING\r\n").await.unwrap();
        assert!(stream.read(&mut [0; 16]).await.unwrap() > 0, "nobody answers");
        start.elapsed()
    }

    pub fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }
}

type Modes = watch::Receiver<Mode>;

/// `holds` is told of what is held; nobody is of answers.
async fn pump(mut from: tcp::OwnedReadHalf, mut to: tcp::OwnedWriteHalf, mut modes: Modes, holds: Option<&Semaphore>) {
    let answers = holds.is_none();
    let (mut buffer, mut hole, mut ends) = (vec![0; 1 << 16], false, modes.clone());
    loop {
        let bytes = tokio::select! {
            read = from.read(&mut buffer) => match read {
                Ok(size) if size > 0 => &mut buffer[..size],
                _ => return,
            },
            _ = ends.wait_for(|mode| *mode == Mode::Cut || (hole && *mode != Mode::Swallow)) => return,
        };
        let mode = *modes.borrow();
        match mode {
            Mode::Delay(delay) => tokio::time::sleep(delay).await,
            Mode::Swallow => {
                hole = true;
                continue;
            }
            Mode::HoldAt(one, other) if !answers && has(bytes, one) && has(bytes, other) => {
                holds.iter().for_each(|holds| holds.add_permits(1));
                if modes.wait_for(|now| *now != mode).await.is_err() {
                    return;
                }
            }
            Mode::CutShort if answers => {
                let half = bytes.len() / 2;
                let _ = to.write_all(&bytes[..half]).await;
                return;
            }
            Mode::Garble(old, new) if answers => {
                for at in 0..(bytes.len() + 1).saturating_sub(old.len()) {
                    if bytes[at..].starts_with(old.as_bytes()) {
                        bytes[at..at + new.len()].copy_from_slice(new.as_bytes());
                    }
                }
            }
            _ => {}
        }
        if modes.wait_for(|mode| *mode != Mode::Hold).await.is_err() || to.write_all(bytes).await.is_err() {
            return;
        }
    }
}

fn has(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|at| at == text.as_bytes())
}
