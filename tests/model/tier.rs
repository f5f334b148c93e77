//! The tier in process over a shared store: what is held is answered from without asking, while the pushes of client tracking
//! are heard. Pushes are delayed, connections die in silence, the store is flushed, and may be out of reach when this process
//! invalidates.
//!
//! A write of this process has to be seen once it is acknowledged; one of another, once its push has been heard, or two
//! heartbeats after it. What loads do is the core's business: here, an entry is made in one step.

use stateright::{Model, Property};

use crate::vocabulary::{Generation, Numbered, PROMISE, Version, breaks, holds, open};

/// Each taken out is a fault.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Rule {
    /// `RedisStore::tracked` captures before the command; `MemoryStore::insert` compares.
    CapturedBeforeTheCommand,
    /// `Held::hear`.
    PushesAreHeard,
    /// `Held::hear`: a push without keys means everything.
    NothingMeansEverything,
    /// `Server::connect`: pushes and the answers to heartbeats come over one connection, and keep their order.
    OneConnection,
    /// `Held::lose`: after an interruption it begins with nothing.
    NothingOutlivesAConnection,
    /// `RedisStore::peek` asks whether it `is_alive`.
    OnlyWhileProven,
    /// `Server::beat`: it proves what was so when it was asked, not when it was answered.
    ProvenSinceItWasAsked,
    /// `RedisStore::invalidate` drops what it holds itself,
    DroppedHere,
    /// and after the command,
    AfterTheCommand,
    /// whatever came of that.
    WhateverCameOfIt,
    /// `Guard::call`: nothing is read while the journal holds anything.
    TheJournalBeforeReads,
}

const RULES: [Rule; 11] = [
    Rule::CapturedBeforeTheCommand,
    Rule::PushesAreHeard,
    Rule::NothingMeansEverything,
    Rule::OneConnection,
    Rule::NothingOutlivesAConnection,
    Rule::OnlyWhileProven,
    Rule::ProvenSinceItWasAsked,
    Rule::DroppedHere,
    Rule::AfterTheCommand,
    Rule::WhateverCameOfIt,
    Rule::TheJournalBeforeReads,
];

/// In heartbeats.
type Time = u8;

/// How long an answered heartbeat is good for.
const PROVEN: Time = 2;

/// The model's end.
const LAST: Time = 3;

/// No more is on its way at once.
const WIRE: usize = 2;

/// Each begins anew when it has been answered: what one leaves behind, it finds itself.
const READERS: usize = 1;

struct Protocol {
    without: Option<Rule>,
}

#[derive(Clone, Debug, Hash, PartialEq)]
struct State {
    now: Time,
    row: Version,
    /// The shared store.
    generation: Option<Generation>,
    entry: Option<(Version, Generation)>,
    /// What it has sent to this process.
    wire: Vec<Message>,
    is_connected: bool,
    tracks: bool,
    /// Until when this process knows that it has heard of every drop.
    proven_until: Time,
    held: Option<Version>,
    journal: bool,
    readers: [Reader; READERS],
    own: Writer,
    other: Writer,
    /// What has to be seen: of its own writes, and of others' of which it has heard.
    due: Version,
    /// Another's write, and when it was acknowledged.
    others: Option<(Version, Time)>,
    is_stale: bool,
}

#[derive(Clone, Copy, Debug, Hash, PartialEq)]
enum Message {
    /// A generation was dropped (or evicted, which is the same), and which write is known with that.
    Push(Version),
    /// The same of all.
    Flushed(Version),
    /// A heartbeat is answered that was sent then.
    Beat(Time),
    /// To a look-up.
    Reply(usize, Version),
}

#[derive(Clone, Copy, Debug, Hash, PartialEq)]
struct Reader {
    began: Version,
    /// Nothing was dropped or lost here since its look-up began, which then was proven to hear of it.
    is_clean: bool,
    step: Read,
}

#[derive(Clone, Copy, Debug, Hash, PartialEq)]
enum Read {
    Idle,
    /// `RedisStore::lookup` is on its way.
    Asked,
    /// The store has answered, which is on its way.
    Answered,
    /// The connection's task has the answer; the reader hasn't.
    Received(Version),
}

#[derive(Clone, Copy, Debug, Hash, PartialEq)]
enum Writer {
    Idle,
    Committed(Version),
    /// The store has executed the command, or won't.
    Commanded(Version),
    Acknowledged,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Action {
    Tick,
    Beat,
    Track,
    /// The connection dies, and nobody is told.
    Cut,
    Reconnect,
    Deliver(usize),
    Read(usize),
    /// Somebody stores what the origin says now.
    Fill,
    Flush,
    WriteHere,
    FailHere,
    DeliverJournal,
    WriteElsewhere,
}

impl Numbered for State {
    fn visit(&mut self, visit: &mut dyn FnMut(&mut Generation)) {
        self.generation.iter_mut().for_each(&mut *visit);
        self.entry.iter_mut().for_each(|(_, generation)| visit(generation));
    }
}

impl State {
    fn is_proven(&self) -> bool {
        self.tracks && self.now < self.proven_until
    }

    /// What a read that begins now has to see.
    fn bar(&self) -> Version {
        let others = self.others.filter(|(_, at)| self.now >= at + PROVEN || !self.is_proven());
        others.map_or(self.due, |(version, _)| self.due.max(version))
    }

    /// `MemoryStore::drop_local`: of the tag, or of the era that everything carries.
    fn drop_local(&mut self) {
        self.held = None;
        self.readers.iter_mut().for_each(|reader| reader.is_clean = false);
    }

    /// The generation is dropped or lost, which those who track are told; of what is absent already they were told before.
    fn drop_generation(&mut self, message: Message) {
        if self.generation.take().is_some() && self.is_connected && self.tracks {
            self.wire.push(message);
        }
    }

    /// Another's write is known here with the last push that is on its way, if there is one.
    fn tell_of(&mut self, version: Version) {
        self.others = Some((version, self.now));
        let last = self.wire.iter_mut().rev().find_map(|message| match message {
            Message::Push(known) | Message::Flushed(known) => Some(known),
            Message::Beat(_) | Message::Reply(..) => None,
        });
        match last {
            Some(known) => *known = version,
            None if self.is_connected && self.tracks => self.due = self.due.max(version),
            None => {}
        }
    }

    fn answer(&mut self, at: usize, value: Version) {
        self.is_stale |= value < self.readers[at].began;
        self.readers[at] = Reader { began: 0, is_clean: false, step: Read::Idle };
    }
}

impl Protocol {
    fn has(&self, rule: Rule) -> bool {
        self.without != Some(rule)
    }

    fn read(&self, state: &mut State, at: usize) {
        match state.readers[at].step {
            Read::Idle => {
                let (began, is_proven) = (state.bar(), state.is_proven());
                state.readers[at] = Reader { began, is_clean: is_proven, step: Read::Asked };
                // `RedisStore::peek`.
                match state.held.filter(|_| is_proven || !self.has(Rule::OnlyWhileProven)) {
                    Some(value) => state.answer(at, value),
                    None if state.journal && self.has(Rule::TheJournalBeforeReads) => state.answer(at, state.row),
                    None => {}
                }
            }
            // `Remote::lookup`. What is not found, or not to be asked for, the origin knows.
            Read::Asked => {
                let found = state.entry.filter(|(_, generation)| state.generation == Some(*generation));
                match found.filter(|_| state.is_connected) {
                    Some((value, _)) => {
                        state.wire.push(Message::Reply(at, value));
                        state.readers[at].step = Read::Answered;
                    }
                    None => state.answer(at, state.row),
                }
            }
            // `MemoryStore::insert`.
            Read::Received(value) => {
                let is_late = !self.has(Rule::CapturedBeforeTheCommand);
                if state.readers[at].is_clean || is_late && state.is_proven() {
                    state.held = Some(value);
                }
                state.answer(at, value);
            }
            Read::Answered => {}
        }
    }

    /// The connection's task takes a message: `Held::hear`, `Link::up`.
    fn deliver(&self, state: &mut State, at: usize) {
        match state.wire.remove(at) {
            Message::Push(version) => {
                if self.has(Rule::PushesAreHeard) {
                    state.drop_local();
                }
                state.due = state.due.max(version);
            }
            Message::Flushed(version) => {
                if self.has(Rule::NothingMeansEverything) {
                    state.drop_local();
                }
                state.due = state.due.max(version);
            }
            Message::Beat(sent) => {
                let since = if self.has(Rule::ProvenSinceItWasAsked) { sent } else { state.now };
                state.proven_until = since + PROVEN;
            }
            Message::Reply(reader, value) => state.readers[reader].step = Read::Received(value),
        }
    }

    /// `Link::lost`, and `watch::follow` connects anew.
    fn reconnect(&self, state: &mut State) {
        state.wire.clear();
        if self.has(Rule::NothingOutlivesAConnection) {
            state.drop_local();
        }
        (state.is_connected, state.tracks, state.proven_until) = (true, false, 0);
        for at in 0..READERS {
            if state.readers[at].step == Read::Answered {
                state.answer(at, state.row);
            }
        }
    }

    /// `RedisStore::invalidate`.
    fn write_here(&self, state: &mut State, is_reached: bool) {
        state.own = match state.own {
            Writer::Idle => {
                state.row += 1;
                if !self.has(Rule::AfterTheCommand) {
                    state.drop_local();
                }
                Writer::Committed(state.row)
            }
            Writer::Committed(version) => {
                match is_reached {
                    true => state.drop_generation(Message::Push(0)),
                    // `Shared::postpone`.
                    false => state.journal = true,
                }
                let drops = is_reached && self.has(Rule::AfterTheCommand) && self.has(Rule::DroppedHere)
                    || !is_reached && self.has(Rule::WhateverCameOfIt);
                if drops {
                    state.drop_local();
                }
                Writer::Commanded(version)
            }
            Writer::Commanded(version) => {
                state.due = state.due.max(version);
                Writer::Acknowledged
            }
            Writer::Acknowledged => Writer::Acknowledged,
        };
    }

    fn write_elsewhere(&self, state: &mut State) {
        state.other = match state.other {
            Writer::Idle => {
                state.row += 1;
                Writer::Committed(state.row)
            }
            Writer::Committed(version) => {
                state.drop_generation(Message::Push(0));
                state.tell_of(version);
                Writer::Acknowledged
            }
            other => other,
        };
    }

    fn of_the_connection(&self, state: &State, actions: &mut Vec<Action>) {
        if !state.is_connected {
            actions.push(Action::Reconnect);
            return;
        }
        actions.push(Action::Cut);
        if !state.tracks {
            actions.push(Action::Track);
        }
        if !state.wire.iter().any(|message| matches!(message, Message::Beat(_))) {
            actions.push(Action::Beat);
        }
        let all = if self.has(Rule::OneConnection) { state.wire.len().min(1) } else { state.wire.len() };
        actions.extend((0..all).map(Action::Deliver));
    }
}

impl Model for Protocol {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            now: 0,
            row: 0,
            generation: None,
            entry: None,
            wire: vec![],
            is_connected: true,
            tracks: false,
            proven_until: 0,
            held: None,
            journal: false,
            readers: [Reader { began: 0, is_clean: false, step: Read::Idle }; READERS],
            own: Writer::Idle,
            other: Writer::Idle,
            due: 0,
            others: None,
            is_stale: false,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        self.of_the_connection(state, actions);
        if state.now < LAST {
            actions.push(Action::Tick);
        }
        let reads = (0..READERS).filter(|at| state.readers[*at].step != Read::Answered);
        actions.extend(reads.map(Action::Read));
        if state.entry.is_none_or(|(value, generation)| (value, Some(generation)) != (state.row, state.generation)) {
            actions.push(Action::Fill);
        }
        if state.generation.is_some() {
            actions.push(Action::Flush);
        }
        match state.own {
            Writer::Committed(_) if state.is_connected => actions.extend([Action::WriteHere, Action::FailHere]),
            Writer::Committed(_) => actions.push(Action::FailHere),
            Writer::Idle | Writer::Commanded(_) => actions.push(Action::WriteHere),
            Writer::Acknowledged => {}
        }
        if state.other != Writer::Acknowledged {
            actions.push(Action::WriteElsewhere);
        }
        if state.journal && state.is_connected {
            actions.push(Action::DeliverJournal);
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::Tick => state.now += 1,
            Action::Beat => state.wire.push(Message::Beat(state.now)),
            Action::Track => state.tracks = true,
            Action::Cut => {
                state.is_connected = false;
                state.wire.clear();
            }
            Action::Reconnect => self.reconnect(&mut state),
            Action::Deliver(at) => self.deliver(&mut state, at),
            Action::Read(at) => self.read(&mut state, at),
            Action::Fill => {
                let generation = open(&mut state, |state| &mut state.generation);
                state.entry = Some((state.row, generation));
            }
            Action::Flush => {
                state.drop_generation(Message::Flushed(0));
                state.entry = None;
            }
            Action::WriteHere => self.write_here(&mut state, true),
            Action::FailHere => self.write_here(&mut state, false),
            Action::DeliverJournal => {
                state.drop_generation(Message::Push(0));
                state.journal = false;
            }
            Action::WriteElsewhere => self.write_elsewhere(&mut state),
        }
        state.renumber();
        Some(state)
    }

    fn within_boundary(&self, state: &State) -> bool {
        state.wire.len() <= WIRE
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(PROMISE, |_, state: &State| !state.is_stale),
            Property::sometimes("it answers from what it holds after both writes", |_, state: &State| {
                state.held == Some(2) && state.is_proven()
            }),
            Property::sometimes("it answers with what another has changed", |_, state: &State| {
                state.held.is_some_and(|held| state.others.is_some_and(|(version, _)| held < version))
                    && state.is_proven()
            }),
        ]
    }
}

#[test]
fn the_tier_in_process_keeps_the_promise() {
    holds("tier", Protocol { without: None });
}

#[test]
fn each_rule_of_the_tier_is_needed() {
    for rule in RULES {
        breaks("tier", rule, Protocol { without: Some(rule) });
    }
}
