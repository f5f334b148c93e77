use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    net::TcpStream,
    task::JoinHandle,
    time::timeout,
};

use super::*;

const LONG: Duration = Duration::from_secs(5);

/// Lines: `number text`, or `.`, which ends a call.
struct Lines;

#[derive(Clone, Debug, PartialEq)]
enum Line {
    Text(Option<u32>, String),
    End,
}

impl Framing for Lines {
    type Reply = Line;

    fn next(&mut self, bytes: &mut BytesMut) -> Result<Option<Line>, Garbled> {
        let Some(end) = bytes.iter().position(|&c| c == b'\n') else { return Ok(None) };
        let line = bytes.split_to(end + 1);
        let line = str::from_utf8(&line[..end]).map_err(|_| Garbled("no text"))?;
        let (number, text) = line.split_once(' ').unwrap_or((line, ""));
        Ok(Some(if line == "." { Line::End } else { Line::Text(number.parse().ok(), text.to_owned()) }))
    }

    fn place(&self, reply: &Line, call: Asked) -> Place {
        match reply {
            Line::End => Place::End,
            Line::Text(None, _) => Place::Some,
            Line::Text(Some(number), _) => match number.wrapping_sub(call.first) {
                at if at < call.count => Place::Command(at as usize),
                _ => Place::Stray,
            },
        }
    }
}

/// A connection, its other end, and why it ended.
fn connection(room: usize, patience: Duration) -> (Mux<Lines>, DuplexStream, JoinHandle<Arc<str>>) {
    let (near, far) = duplex(room);
    let (mux, serving) = Mux::new(near, Lines, patience);
    (mux, far, tokio::spawn(serving))
}

async fn ask(mux: &Mux<Lines>, text: &str) -> Result<String, Broken> {
    let write = |out: &mut BytesMut, first: u32| out.extend_from_slice(format!("{first} {text}\n.\n").as_bytes());
    let answer = mux.call(1, write).await?;
    match answer.replies.into_iter().next() {
        Some(Some(Line::Text(_, text))) => Ok(text),
        other => panic!("{other:?}"),
    }
}

/// Sends back what it reads, in pieces of so many bytes.
fn echo(mut far: DuplexStream, piece: usize) {
    tokio::spawn(async move {
        let mut bytes = vec![0; piece];
        while let Ok(size @ 1..) = far.read(&mut bytes).await {
            if far.write_all(&bytes[..size]).await.is_err() {
                return;
            }
        }
    });
}

/// Many ask what is answered with the same, and a third of them go at once.
pub(crate) async fn all_are_answered<A>(ask: impl Fn(String) -> A)
where
    A: Future<Output = Result<String, Broken>> + Send + 'static,
{
    let mut tasks = vec![];
    for i in 0..300_u32 {
        let task = tokio::spawn(ask(format!("call {i}")));
        if i % 3 == 0 {
            tokio::task::yield_now().await;
            task.abort();
        } else {
            tasks.push((i, task));
        }
    }
    for (i, task) in tasks {
        assert_eq!(task.await.unwrap().unwrap(), format!("call {i}"));
    }
}

#[tokio::test]
async fn everybody_is_answered_what_they_asked_whoever_goes() {
    for (room, piece) in [(1 << 16, 1 << 16), (1 << 16, 1), (7, 3)] {
        let (mux, far, _) = connection(room, LONG);
        echo(far, piece);
        all_are_answered(|text| {
            let mux = mux.clone();
            async move { ask(&mux, &text).await }
        })
        .await;
    }
}

/// Who asks the same before it is written shares the answer, whoever goes; nobody does who asks after that.
#[tokio::test]
async fn what_is_asked_at_once_is_asked_once() {
    let (mux, mut far, _) = connection(1 << 16, LONG);
    let ask = |is_shared, text: &'static str| {
        let answer =
            mux.ask(is_shared, move |out: &mut BytesMut| out.extend_from_slice(format!("- {text}\n.\n").as_bytes()));
        async move { format!("{:?}", answer.await.unwrap().others) }
    };
    let mut asked = async |expected: &str| {
        let mut read = vec![0; expected.len()];
        far.read_exact(&mut read).await.unwrap();
        assert_eq!(String::from_utf8(read).unwrap(), expected);
        tokio::task::yield_now().await;
    };
    let (goes, one, two, again, alone) =
        (ask(true, "one"), ask(true, "one"), ask(true, "two"), ask(true, "one"), ask(false, "one"));
    drop(goes);
    asked("- one\n.\n- two\n.\n- one\n.\n").await;
    let (other, late, later) = (ask(false, "two"), ask(true, "one"), ask(true, "one"));
    asked("- two\n.\n- one\n.\n").await;
    for said in ["1", "2", "3", "4", "5"] {
        far.write_all(format!("- {said}\n.\n").as_bytes()).await.unwrap();
    }
    let said = |said: &str| format!("[Text(None, {said:?})]");
    assert_eq!([one.await, again.await, two.await], ["1", "1", "2"].map(said));
    assert_eq!([alone.await, other.await, late.await, later.await], ["3", "4", "5", "5"].map(said));
}

/// Each side has more to say than the way between them holds.
#[tokio::test]
async fn it_reads_while_it_writes() {
    let (mux, far, _) = connection(64, LONG);
    echo(far, 64);
    let text = "x".repeat(5_000);
    let calls = (0..20).map(|_| ask(&mux, &text));
    for answer in futures_util::future::join_all(calls).await {
        assert_eq!(answer.unwrap(), text);
    }
}

#[tokio::test(start_paused = true)]
async fn nobody_waits_without_a_bound() {
    let (mux, far, ended) = connection(1 << 16, LONG);
    let waits = ask(&mux, "hello").await.unwrap_err();
    assert_eq!(waits, Broken::Unanswered("no answer within 5s".into()));
    assert_eq!(ask(&mux, "again").await, Err(Broken::Unsent("no answer within 5s".into())));
    assert_eq!(&*ended.await.unwrap(), "no answer within 5s");
    drop(far);
    // Nor one whose question is not even taken.
    let (mux, _far, _) = connection(4, LONG);
    assert!(matches!(ask(&mux, "hello").await, Err(Broken::Unanswered(_))));
}

/// It begins when a question is taken, whatever came before, and what is taken behind another has its own.
#[tokio::test(start_paused = true)]
async fn each_answer_has_its_time() {
    let (mux, _far, _) = connection(1 << 16, LONG);
    sleep(LONG * 3 / 2).await;
    let start = Instant::now();
    assert!(ask(&mux, "late").await.is_err());
    assert_eq!(start.elapsed().as_secs(), LONG.as_secs());
    for (answers, ends) in [(true, 9_500), (false, 9_900)] {
        let (mux, mut far, _) = connection(4, LONG);
        let start = Instant::now();
        let asks = |text: &'static str| {
            let mux = mux.clone();
            tokio::spawn(async move { ask(&mux, text).await })
        };
        let first = asks("first");
        sleep(Duration::from_secs(1)).await;
        let second = asks("second");
        sleep(Duration::from_millis(3_900)).await;
        far.read_exact(&mut [0; 10]).await.unwrap();
        far.write_all(b"0 first\n.\n").await.unwrap();
        assert_eq!(first.await.unwrap().as_deref(), Ok("first"));
        if answers {
            sleep(Duration::from_millis(4_600)).await;
            far.read_exact(&mut [0; 11]).await.unwrap();
            far.write_all(b"1 second\n.\n").await.unwrap();
        }
        assert_eq!(second.await.unwrap().is_ok(), answers);
        assert_eq!(start.elapsed().as_millis() / 10 * 10, ends);
    }
    // Nor is what nobody takes waited behind, though all that was asked is answered.
    let (mux, mut far, _) = connection(4, LONG);
    let first = ask(&mux, "first");
    let answers = async {
        far.write_all(b"0 first\n.\n").await.unwrap();
        sleep(LONG / 2).await;
        timeout(LONG, ask(&mux, "second")).await
    };
    let (first, second) = tokio::join!(first, answers);
    assert!(first.is_ok() && matches!(second, Ok(Err(Broken::Unanswered(_)))), "{second:?}");
}

#[tokio::test]
async fn what_nobody_asked_for_ends_it() {
    for said in ["7 stray\n", ".\n", "0 one\n0 two\n", "-\n-\n", "\u{7f}\n"] {
        let (mux, mut far, ended) = connection(1 << 16, LONG);
        let call = if said == ".\n" || said == "7 stray\n" && said.len() == 8 {
            None
        } else {
            let mux = mux.clone();
            let call = tokio::spawn(async move { ask(&mux, "hello").await });
            let mut question = [0; 10];
            far.read_exact(&mut question).await.unwrap();
            Some(call)
        };
        far.write_all(said.as_bytes()).await.unwrap();
        if said.starts_with(['-', '\u{7f}']) {
            // Which command it is about nobody knows; so many replies to one call are too many.
            for _ in 0..OTHERS {
                let _ = far.write_all(b"-\n").await;
            }
        }
        ended.await.unwrap();
        if let Some(call) = call {
            assert!(matches!(call.await.unwrap(), Err(Broken::Unanswered(_))), "{said:?}");
        }
        assert!(matches!(ask(&mux, "more").await, Err(Broken::Unsent(_))), "{said:?}");
    }
}

#[tokio::test]
async fn it_ends_with_its_other_end_and_with_its_last_handle() {
    let (mux, far, ended) = connection(1 << 16, LONG);
    drop(far);
    assert_eq!(&*ended.await.unwrap(), "the server has closed the connection");
    assert!(matches!(ask(&mux, "hello").await, Err(Broken::Unsent(_))));
    let (mux, _far, ended) = connection(1 << 16, LONG);
    drop(mux);
    assert_eq!(&*ended.await.unwrap(), "nobody needs it");
}

/// A server that takes nothing does not fill the process' memory.
#[tokio::test]
async fn what_waits_to_be_sent_is_bounded() {
    let (mux, _far, _) = connection(4, LONG);
    let text = "x".repeat(1 << 20);
    let mut refused = 0;
    let mut waiting = vec![];
    for _ in 0..200 {
        let mut call = Box::pin(ask(&mux, &text));
        match futures_util::poll!(&mut call) {
            Poll::Ready(Err(Broken::Unsent(_))) => refused += 1,
            Poll::Ready(other) => panic!("{other:?}"),
            Poll::Pending => waiting.push(call),
        }
        tokio::task::yield_now().await;
    }
    assert!(refused > 100 && waiting.len() >= 64, "{refused} refused, {} wait", waiting.len());
}

/// Notes of each write how many had asked.
struct Counted(TcpStream, Arc<AtomicUsize>, Arc<Mutex<Vec<usize>>>);

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut tokio::io::ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let asked = self.1.load(Ordering::Relaxed);
        self.2.lock().unwrap().push(asked);
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// But the server is not kept waiting until the last of them has asked.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_many_ask_is_written_at_once() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    // Of a thread of its own, as servers are: what it answers wakes nobody before it is there.
    std::thread::spawn(move || {
        let (mut far, _) = listener.accept().unwrap();
        std::io::copy(&mut far.try_clone().unwrap(), &mut far)
    });
    let (asked, writes) = (Arc::new(AtomicUsize::new(0)), Arc::default());
    let (mux, serving) = Mux::new(Counted(near, asked.clone(), Arc::clone(&writes)), Lines, LONG);
    tokio::spawn(serving);
    let rounds = move |mux: Mux<Lines>| {
        let asked = asked.clone();
        async move {
            for i in 0..20 {
                asked.fetch_add(1, Ordering::Relaxed);
                assert_eq!(ask(&mux, &format!("call {i}")).await.unwrap(), format!("call {i}"));
            }
        }
    };
    // From the worker's thread: all of them before any runs.
    let all = tokio::spawn(async move {
        let tasks: Vec<_> = (0..50).map(|_| tokio::spawn(rounds(mux.clone()))).collect();
        for task in tasks {
            task.await.unwrap();
        }
    });
    all.await.unwrap();
    let writes = writes.lock().unwrap();
    assert!((20..200).contains(&writes.len()), "{} for 1,000 calls", writes.len());
    assert!(writes.iter().any(|asked| (16..50).contains(asked)), "written when so many had asked: {writes:?}");
}
