//! Many callers on one connection: what they ask is written in the order in which they ask, and answered in that order.
//!
//! Many who ask the same at once ask once: who comes while a question waits to be written, among the last few, shares it, and its
//! answer, which is not older than the youngest of them. What has been written is shared by nobody who comes.
//!
//! One task writes and reads, both at once, so that neither side waits for the other with full buffers. A caller adds bytes
//! to one buffer under a lock, and waits. A caller who goes leaves its place in the line, and its reply is still taken. A
//! connection whose oldest caller waits too long is given up, and so is one that says what nobody asked for: whoever waits on
//! it then does not know whether the server has done what it was asked.

#[cfg(test)]
pub(crate) mod tests;

use std::{
    collections::VecDeque,
    fmt, io,
    ops::Range,
    pin::{Pin, pin},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::BytesMut;
use futures_util::task::AtomicWaker;
use smallvec::SmallVec;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::oneshot,
    task::yield_now,
    time::{Instant, Sleep, sleep},
};
use tokio_util::io::{poll_read_buf, poll_write_buf};

/// Bytes that wait to be written, at most: a server that reads nothing must not take the process' memory.
const QUEUED: usize = 64 << 20;

/// Callers on one connection, at most.
const CALLS: usize = 1 << 16;

/// Replies to one call that do not say to which of its commands, at most.
const OTHERS: usize = 1_000;

/// What so many ask is written at once, or what half of all who wait do if these are more: the server is to work while others still
/// ask.
const GATHERED: usize = 16;

/// So many of the last questions are compared with one that can be shared.
const NEAR: usize = 4;

/// Room made for what is read: the replies to all who ask at once.
const ROOM: usize = 64 << 10;

/// Smaller replies are copied: what is kept of them must not keep all that was read with them.
pub(crate) const COPIED: usize = 64 << 10;

/// How replies are told apart, and whose they are.
pub(crate) trait Framing: Send + Unpin + 'static {
    type Reply: Clone + Send + Unpin + fmt::Debug + 'static;

    /// The reply that the bytes begin with, taken from them; none if it is not all there yet.
    fn next(&mut self, bytes: &mut BytesMut) -> Result<Option<Self::Reply>, Garbled>;

    /// Where a reply belongs to in the oldest call.
    fn place(&self, reply: &Self::Reply, call: Asked) -> Place;
}

/// What is read in pieces of that size, and whether it ends as no replies do.
#[cfg(any(test, fuzzing))]
pub(crate) fn replies_in<F: Framing>(mut framing: F, data: &[u8], piece: usize) -> (Vec<F::Reply>, bool) {
    let (mut bytes, mut found) = (BytesMut::new(), vec![]);
    for part in data.chunks(piece.max(1)) {
        bytes.extend_from_slice(part);
        loop {
            match framing.next(&mut bytes) {
                Ok(Some(reply)) => found.push(reply),
                Ok(None) => break,
                Err(_) => return (found, true),
            }
        }
    }
    (found, false)
}

/// What was read is no reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Garbled(pub(crate) &'static str);

/// The commands of a call: from which number on, and how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) first: u32,
    pub(crate) count: u32,
}

/// Where a reply belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// It answers this command of the call.
    Command(usize),
    /// It answers the first command of the call that has no answer yet; with the last of them the call ends.
    Next,
    /// It answers one of the call's commands, and does not say which.
    Some,
    /// It ends the call, and says nothing.
    End,
    /// Nobody has asked for it.
    Stray,
}

/// What a call was answered.
#[derive(Clone, Debug)]
pub(crate) struct Answer<R> {
    /// The reply to each command, as far as there is one.
    pub(crate) replies: SmallVec<[Option<R>; 1]>,
    /// Replies that do not say to what.
    pub(crate) others: Vec<R>,
}

/// Why a call was not answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Broken {
    /// It was not sent.
    Unsent(Arc<str>),
    /// It may have been sent, and done.
    Unanswered(Arc<str>),
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unsent(why) => write!(f, "not sent: {why}"),
            Self::Unanswered(why) => write!(f, "no answer: {why}"),
        }
    }
}

/// A connection, for as many callers as there are. It is closed with the last of these.
pub(crate) struct Mux<F: Framing>(Arc<Handle<F>>);

struct Handle<F: Framing> {
    shared: Arc<Shared<F::Reply>>,
}

struct Shared<R> {
    queue: Mutex<Queue<R>>,
    /// How many callers wait.
    waiting: AtomicUsize,
    /// Of the task that writes and reads.
    task: AtomicWaker,
}

/// What is to be written, and who waits for what comes of it.
struct Queue<R> {
    bytes: BytesMut,
    calls: VecDeque<Call<R>>,
    /// How many callers these have.
    callers: usize,
    /// The next command's number.
    next: u32,
    end: Option<Arc<str>>,
}

struct Call<R> {
    asked: Asked,
    answer: Answer<R>,
    /// How many commands were answered in their order.
    answered: usize,
    callers: SmallVec<[oneshot::Sender<Answer<R>>; 1]>,
    /// Where in what is to be written it is, if it can be shared.
    place: Range<usize>,
}

impl<R> Queue<R> {
    /// Whose question these last bytes are, if somebody asks the same already.
    fn same(&mut self, asked: Range<usize>) -> Option<&mut Call<R>> {
        let asked = self.bytes.get(asked).filter(|asked| !asked.is_empty())?;
        let is_same = |call: &&mut Call<R>| self.bytes.get(call.place.clone()) == Some(asked);
        self.calls.iter_mut().rev().filter(|call| !call.place.is_empty()).take(NEAR).find(is_same)
    }
}

impl<F: Framing> Clone for Mux<F> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<F: Framing> Drop for Handle<F> {
    fn drop(&mut self) {
        self.shared.end(&"nobody needs it".into());
        self.shared.task.wake();
    }
}

impl<R> Shared<R> {
    fn queue(&self) -> MutexGuard<'_, Queue<R>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on nothing is sent.
    fn end(&self, why: &Arc<str>) {
        let mut queue = self.queue();
        queue.end.get_or_insert_with(|| why.clone());
        queue.bytes = BytesMut::new();
        queue.calls.clear();
        queue.callers = 0;
    }
}

impl<F: Framing> Mux<F> {
    /// The connection, and the task that serves it, which ends with the connection and says why. It is given up when an answer
    /// does not come within `patience` after its question was taken to be written, which is within as much after it was asked: what
    /// was taken before it has the same bound.
    pub(crate) fn new<S>(stream: S, framing: F, patience: Duration) -> (Self, impl Future<Output = Arc<str>> + Send)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
    {
        let queue = Queue { bytes: BytesMut::new(), calls: VecDeque::new(), callers: 0, next: 0, end: None };
        let (queue, waiting) = (Mutex::new(queue), AtomicUsize::new(0));
        let shared = Arc::new(Shared { queue, waiting, task: AtomicWaker::new() });
        let serving = Serving {
            guard: Ended(shared.clone()),
            stream,
            framing,
            output: BytesMut::new(),
            input: BytesMut::new(),
            sent: VecDeque::new(),
            until: Instant::now(),
            gathers: false,
            overdue: Box::pin(sleep(patience)),
            patience,
        };
        (Self(Arc::new(Handle { shared })), serving)
    }

    /// Makes so many commands, which `write` writes, with numbers from the one that it is given. They are made at once: what waits
    /// for the answer holds nothing of them.
    pub(crate) fn call<W: FnOnce(&mut BytesMut, u32)>(
        &self,
        count: u32,
        write: W,
    ) -> impl Future<Output = Result<Answer<F::Reply>, Broken>> + use<'_, F, W> {
        self.answered(self.enqueue(count, false, write))
    }

    /// Makes one command, and shares it with who asks the same before it is written, if that changes nothing.
    pub(crate) fn ask<W: FnOnce(&mut BytesMut)>(
        &self,
        is_shared: bool,
        write: W,
    ) -> impl Future<Output = Result<Answer<F::Reply>, Broken>> + use<'_, F, W> {
        self.answered(self.enqueue(1, is_shared, |out, _| write(out)))
    }

    async fn answered(
        &self,
        answered: Result<oneshot::Receiver<Answer<F::Reply>>, Broken>,
    ) -> Result<Answer<F::Reply>, Broken> {
        answered?.await.map_err(|_| {
            let why = self.0.shared.queue().end.clone();
            Broken::Unanswered(why.unwrap_or_else(|| "the connection is gone".into()))
        })
    }

    /// Whether nothing is sent any more.
    pub(crate) fn is_over(&self) -> bool {
        self.0.shared.queue().end.is_some()
    }

    /// Gives the connection up: whoever waits is told why.
    pub(crate) fn end(&self, why: &Arc<str>) {
        self.0.shared.end(why);
        self.0.shared.task.wake();
    }

    fn enqueue(
        &self,
        count: u32,
        is_shared: bool,
        write: impl FnOnce(&mut BytesMut, u32),
    ) -> Result<oneshot::Receiver<Answer<F::Reply>>, Broken> {
        let shared = &self.0.shared;
        let (caller, answered) = oneshot::channel();
        let mut queue = shared.queue();
        if let Some(why) = &queue.end {
            return Err(Broken::Unsent(why.clone()));
        }
        if queue.bytes.len() > QUEUED || shared.waiting.load(Ordering::Relaxed) >= CALLS {
            return Err(Broken::Unsent("too much waits to be sent already".into()));
        }
        let asked = Asked { first: queue.next, count };
        let begin = queue.bytes.len();
        write(&mut queue.bytes, asked.first);
        let place = if is_shared { begin..queue.bytes.len() } else { 0..0 };
        match queue.same(place.clone()) {
            Some(call) => {
                call.callers.push(caller);
                queue.bytes.truncate(begin);
            }
            None => {
                queue.next = queue.next.wrapping_add(count);
                let answer = Answer { replies: (0..count).map(|_| None).collect(), others: vec![] };
                let callers = SmallVec::from_buf([caller]);
                queue.calls.push_back(Call { asked, answer, answered: 0, callers, place });
            }
        }
        queue.callers += 1;
        let waiting = shared.waiting.fetch_add(1, Ordering::Relaxed);
        // Who comes in between finds the task woken.
        let wakes = queue.callers == 1 || is_enough(queue.callers, waiting);
        drop(queue);
        if wakes {
            shared.task.wake();
        }
        Ok(answered)
    }
}

fn is_enough(queued: usize, waiting: usize) -> bool {
    queued >= GATHERED.max(waiting / 2)
}

/// However its task ends, nobody waits on.
struct Ended<R>(Arc<Shared<R>>);

impl<R> Drop for Ended<R> {
    fn drop(&mut self) {
        self.0.end(&"its runtime has ended".into());
    }
}

/// The task of a connection.
struct Serving<S, F: Framing> {
    /// Dropped first: who waits is to find the reason.
    guard: Ended<F::Reply>,
    stream: S,
    framing: F,
    output: BytesMut,
    input: BytesMut,
    /// Who waits behind what has been written, the oldest first, and until when at most before the connection is given up. (Told when
    /// it is taken, once for all that is: each would else look at the clock.)
    sent: VecDeque<(Instant, Call<F::Reply>)>,
    /// The same of what is being written.
    until: Instant,
    /// Whether it has let others go first, and writes next time.
    gathers: bool,
    overdue: Pin<Box<Sleep>>,
    patience: Duration,
}

impl<S: AsyncRead + AsyncWrite + Unpin, F: Framing> Future for Serving<S, F> {
    type Output = Arc<str>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Arc<str>> {
        let this = self.get_mut();
        this.guard.0.task.register(cx.waker());
        match this.step(cx) {
            Ok(()) => Poll::Pending,
            Err(why) => {
                this.guard.0.end(&why);
                Poll::Ready(why)
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin, F: Framing> Serving<S, F> {
    /// Everything that can be done now: what is read is taken also while the other side takes nothing.
    fn step(&mut self, cx: &mut Context<'_>) -> Result<(), Arc<str>> {
        if let Some(why) = &self.guard.0.queue().end {
            return Err(why.clone());
        }
        self.read(cx)?;
        if !self.waits_for_more(cx) {
            self.write(cx).map_err(|error| error.to_string())?;
        }
        while self.overdue.as_mut().poll(cx).is_ready() {
            let now = Instant::now();
            let written = if self.output.is_empty() { now + self.patience } else { self.until };
            let oldest = self.sent.front().map_or(written, |(until, _)| *until);
            if oldest <= now {
                return Err(format!("no answer within {:?}", self.patience).into());
            }
            self.overdue.as_mut().reset(oldest);
        }
        Ok(())
    }

    /// Whether those who run now may ask first, so that much is written at once: the first that asks wakes this task, which would
    /// else run before the others.
    fn waits_for_more(&mut self, cx: &mut Context<'_>) -> bool {
        let waiting = self.guard.0.waiting.load(Ordering::Relaxed);
        let queued = if self.gathers || !self.output.is_empty() { 0 } else { self.guard.0.queue().callers };
        self.gathers = waiting > 1 && queued > 0 && !is_enough(queued, waiting);
        if self.gathers && waiting > queued {
            // Until others have run it is not scheduled, so that who makes it enough can have it run at once. (Should this thread be
            // kept by one of them: the next reply has it run elsewhere.)
            self.gathers = pin!(yield_now()).poll(cx).is_pending();
        } else if self.gathers {
            cx.waker().wake_by_ref();
        }
        self.gathers
    }

    /// Writes what there is, for as long as it is taken.
    fn write(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        loop {
            if self.output.is_empty() {
                let mut queue = self.guard.0.queue();
                std::mem::swap(&mut queue.bytes, &mut self.output);
                if !queue.calls.is_empty() {
                    self.until = Instant::now() + self.patience;
                    self.sent.extend(queue.calls.drain(..).map(|call| (self.until, call)));
                    queue.callers = 0;
                }
            }
            if self.output.is_empty() {
                let flushed = Pin::new(&mut self.stream).poll_flush(cx);
                return if let Poll::Ready(result) = flushed { result } else { Ok(()) };
            }
            match poll_write_buf(Pin::new(&mut self.stream), cx, &mut self.output)? {
                Poll::Ready(0) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(_) => {}
                Poll::Pending => return Ok(()),
            }
        }
    }

    /// Reads what there is. An answer is handed out as soon as it is whole.
    fn read(&mut self, cx: &mut Context<'_>) -> Result<(), Arc<str>> {
        loop {
            self.input.reserve(ROOM);
            match poll_read_buf(Pin::new(&mut self.stream), cx, &mut self.input) {
                Poll::Pending => return Ok(()),
                Poll::Ready(Ok(0)) => return Err("the server has closed the connection".into()),
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) => return Err(error.to_string().into()),
            }
            while let Some(reply) = self.framing.next(&mut self.input).map_err(|Garbled(what)| what)? {
                self.take(reply)?;
            }
        }
    }

    fn take(&mut self, reply: F::Reply) -> Result<(), Arc<str>> {
        let oldest = self.sent.front_mut().map(|(_, call)| call);
        let place = oldest.as_ref().map_or(Place::Stray, |call| self.framing.place(&reply, call.asked));
        let Some(call) = oldest.filter(|_| place != Place::Stray) else {
            return Err("a reply that nobody has asked for".into());
        };
        let next = call.answered;
        let is_last = place == Place::End || (place == Place::Next && next + 1 >= call.answer.replies.len());
        match place {
            Place::Next => {
                if let Some(none) = call.answer.replies.get_mut(next) {
                    *none = Some(reply);
                }
                call.answered += 1;
            }
            Place::Command(at) => match call.answer.replies.get_mut(at) {
                Some(none @ None) => *none = Some(reply),
                _ => return Err("two replies to one command".into()),
            },
            Place::Some if call.answer.others.len() >= OTHERS => return Err("replies without an end".into()),
            Place::Some => call.answer.others.push(reply),
            Place::End | Place::Stray => {}
        }
        if is_last && let Some((_, Call { answer, mut callers, .. })) = self.sent.pop_front() {
            self.guard.0.waiting.fetch_sub(callers.len(), Ordering::Relaxed);
            let last = callers.pop();
            // Who has gone does not want it any more.
            callers.into_iter().for_each(|caller| _ = caller.send(answer.clone()));
            let _ = last.map(|caller| caller.send(answer));
        }
        Ok(())
    }
}
