//! Fences with leases, over a store that may be out of reach when it is to be told, with processes that are killed at any
//! point. (`Fenced` and `Reject`: a write whose fence cannot be raised does not begin.)
//!
//! To what is acknowledged is added what a killed process has committed, once its lease has ended. One row and its tag, which
//! the request names or only the response. (A look-up that finds nothing and what is opened then are one step: what began
//! earlier is promised less.)

use stateright::{Model, Property};

use crate::vocabulary::{Generation, Numbered, PROMISE, Version, breaks, holds, open};

/// Each taken out is a fault.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Rule {
    /// `Writing::begin` raises the fence before the handler runs.
    RaisedBeforeTheHandler,
    /// `Sealed::is_kept`: what was loaded under a fence is not stored.
    NothingIsStoredUnderIt,
    /// `Engine::begin`: who reads under a fence shares nobody's flight.
    NobodySharesUnderIt,
    /// `Store::extend`: nothing is proven of what is fenced,
    NothingIsProvenUnderIt,
    /// nor of what was, until its lease ended.
    EndedLeasesAreRemembered,
    /// `TagShard::lift`, `ZREM` in `FENCE`.
    EachLiftsItsOwn,
    /// `Fence::NOBODY`: deliveries of the journal leave fences standing.
    TheJournalLeavesThem,
    /// The user's part: `Fence::lease` is longer than a handler takes.
    LeasesOutliveHandlers,
    /// `Writing::held`: where replicas lag, the fence stands until they have caught up.
    HeldWhileReplicasLag,
    /// The user's part: the server evicts no fence (`allkeys-lru`).
    FencesAreKept,
}

#[derive(Clone, Copy)]
struct Protocol {
    /// The request does not name the tag.
    is_late: bool,
    /// The origin may read from a replica that lags.
    lags: bool,
    writers: usize,
    without: Option<Rule>,
}

/// What a tag is now.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, PartialOrd, Ord)]
struct Tag {
    generation: Generation,
    is_fenced: bool,
}

#[derive(Clone, Debug, Hash, PartialEq)]
struct State {
    row: Version,
    replica: Version,
    /// What a read that begins now has to see.
    due: Version,
    generation: Option<Generation>,
    /// That of a fenced tag.
    fenced: Option<Generation>,
    /// A fill under an earlier generation has prolonged the fenced one beyond all leases (`Remote::push_fill`).
    is_prolonged: bool,
    /// A lease has ended, not longer ago than loads take: what `prefix:f:` still tells.
    has_ended: bool,
    /// Who fences the tag.
    fences: [bool; 2],
    mark: Option<Generation>,
    entry: Option<(Version, Generation)>,
    readers: [Reader; 2],
    writers: [Writer; 2],
    is_stale: bool,
}

#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, PartialOrd, Ord)]
struct Reader {
    began: Version,
    step: Read,
}

/// What `Store::open` gave: the tag, if the request names it, and else the mark.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, PartialOrd, Ord)]
enum Opened {
    Tag(Tag),
    Mark(Generation),
}

#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, PartialOrd, Ord)]
enum Read {
    Idle,
    Loading(Opened),
    Loaded(Opened, Version),
    /// Landed, and not stored yet.
    Sealed(Version, Tag),
    Following {
        leader: usize,
    },
    /// What another's flight has landed with.
    Given(Version, Tag),
}

#[derive(Clone, Copy, Debug, Hash, PartialEq)]
enum Writer {
    Idle,
    /// Its handler runs.
    Begun,
    Committed(Version),
    /// Acknowledged, and in the journal.
    Undelivered(Version),
    /// Acknowledged, and the fence is held.
    Held(Version),
    /// Killed; whether it has committed.
    Dead(Option<Version>),
    Done,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Action {
    Read(usize),
    ReadReplica(usize),
    Lead(usize),
    Join { at: usize, leader: usize },
    Begin(usize),
    Commit(usize),
    Invalidate(usize),
    Fail(usize),
    Deliver(usize),
    Kill(usize),
    EndLease(usize),
    EndHold(usize),
    Prolong,
    Lose,
    Forget,
    CatchUp,
}

impl Opened {
    fn visit(&mut self, visit: &mut dyn FnMut(&mut Generation)) {
        match self {
            Self::Tag(tag) => visit(&mut tag.generation),
            Self::Mark(mark) => visit(mark),
        }
    }
}

impl Numbered for State {
    fn visit(&mut self, visit: &mut dyn FnMut(&mut Generation)) {
        let Self { generation, fenced, mark, .. } = self;
        [generation, fenced, mark].into_iter().flatten().for_each(&mut *visit);
        self.entry.iter_mut().for_each(|(_, generation)| visit(generation));
        for reader in &mut self.readers {
            match &mut reader.step {
                Read::Loading(opened) | Read::Loaded(opened, _) => opened.visit(visit),
                Read::Sealed(_, tag) | Read::Given(_, tag) => visit(&mut tag.generation),
                Read::Idle | Read::Following { .. } => {}
            }
        }
    }
}

impl State {
    fn tag(&self) -> Option<Tag> {
        let fenced = self.fenced.map(|generation| Tag { generation, is_fenced: true });
        fenced.or(self.generation.map(|generation| Tag { generation, is_fenced: false }))
    }

    /// `Remote::take_down`: what is fenced by nobody any more is as good as absent to `Store::open`.
    fn tag_to_open(&self) -> Option<Tag> {
        self.tag().filter(|tag| !tag.is_fenced || self.fences.contains(&true))
    }

    fn open_tag(&mut self) -> Tag {
        if self.tag_to_open().is_none() {
            self.fenced = None;
        }
        let is_fenced = self.fenced.is_some();
        let generation = open(self, |state| if is_fenced { &mut state.fenced } else { &mut state.generation });
        Tag { generation, is_fenced }
    }

    /// `FENCE`, and `MemoryStore::drop_group`: drops the tag and the mark; a new generation is fenced while anybody's fence
    /// stands.
    fn drop_tag(&mut self) {
        (self.generation, self.mark, self.is_prolonged, self.has_ended) = (None, None, false, false);
        self.fenced = self.fences.contains(&true).then_some(self.unique());
    }

    fn answer(&mut self, at: usize, value: Version) {
        self.is_stale |= value < self.readers[at].began;
        self.end(at);
    }

    /// Another read begins some time.
    fn end(&mut self, at: usize) {
        self.readers[at] = Reader { began: 0, step: Read::Idle };
    }

    /// Those who wait are told, or begin anew.
    fn land(&mut self, leader: usize, how: Option<Read>) {
        for at in 0..self.readers.len() {
            if self.readers[at].step == (Read::Following { leader }) {
                match how {
                    Some(how) => self.readers[at].step = how,
                    None => self.end(at),
                }
            }
        }
    }
}

impl Protocol {
    fn has(&self, rule: Rule) -> bool {
        self.without != Some(rule)
    }

    /// `Engine::find`.
    fn find(&self, state: &State) -> Option<Version> {
        let now = state.tag().map(|tag| tag.generation);
        state.entry.filter(|(_, generation)| now == Some(*generation)).map(|(value, _)| value)
    }

    fn read(&self, state: &mut State, at: usize, row: Version) {
        match state.readers[at].step {
            Read::Idle => {
                if let Some(value) = self.find(state) {
                    state.readers[at].began = state.due;
                    state.answer(at, value);
                }
            }
            Read::Loading(opened) => state.readers[at].step = Read::Loaded(opened, row),
            Read::Loaded(opened, value) => self.seal(state, at, opened, value),
            // `Sealed::store`.
            Read::Sealed(value, tag) => {
                if !tag.is_fenced || !self.has(Rule::NothingIsStoredUnderIt) {
                    state.entry = Some((value, tag.generation));
                }
                state.end(at);
            }
            // `Engine::is_proven`, where the tag was not among those that it joined by.
            Read::Given(value, tag) => {
                let is_proven = !self.is_late || state.tag_to_open() == Some(tag);
                if is_proven { state.answer(at, value) } else { state.end(at) }
            }
            Read::Following { .. } => {}
        }
    }

    /// `Store::extend`.
    fn extend(&self, state: &mut State, mark: Generation) -> Option<Tag> {
        let has_ended = state.has_ended && self.has(Rule::EndedLeasesAreRemembered);
        let tag = state.open_tag();
        let is_good = !tag.is_fenced || !self.has(Rule::NothingIsProvenUnderIt);
        (state.mark == Some(mark) && is_good && !has_ended).then_some(tag)
    }

    /// `Leader::seal`.
    fn seal(&self, state: &mut State, at: usize, opened: Opened, value: Version) {
        let tag = match opened {
            Opened::Tag(tag) => Some(tag),
            Opened::Mark(mark) => self.extend(state, mark),
        };
        match tag {
            Some(tag) => {
                state.land(at, Some(Read::Given(value, tag)));
                state.readers[at].step = Read::Sealed(value, tag);
            }
            None => {
                state.land(at, None);
                state.end(at);
            }
        }
    }

    /// `Store::open`.
    fn opened(&self, state: &mut State) -> Opened {
        match self.is_late {
            true => Opened::Mark(open(state, |state| &mut state.mark)),
            false => Opened::Tag(state.open_tag()),
        }
    }

    /// `Engine::board`: whether who comes now may share this flight.
    fn joins(&self, state: &State, leader: usize) -> bool {
        match state.readers[leader].step {
            Read::Loading(Opened::Tag(tag)) | Read::Loaded(Opened::Tag(tag), _) => {
                state.tag_to_open() == Some(tag) && (!tag.is_fenced || !self.has(Rule::NobodySharesUnderIt))
            }
            Read::Loading(Opened::Mark(_)) | Read::Loaded(Opened::Mark(_), _) => true,
            _ => false,
        }
    }

    /// `Write::run` up to its handler.
    fn begin(&self, state: &mut State, at: usize) {
        state.writers[at] = Writer::Begun;
        if self.has(Rule::RaisedBeforeTheHandler) {
            state.fences[at] = true;
            state.drop_tag();
        }
    }

    /// `Writing::end`, `Store::invalidate`.
    fn invalidate(&self, state: &mut State, at: usize, version: Version) {
        let is_held = self.lags && self.has(Rule::HeldWhileReplicasLag);
        match self.has(Rule::EachLiftsItsOwn) {
            true => state.fences[at] = is_held,
            false => state.fences = [is_held; 2],
        }
        state.drop_tag();
        state.writers[at] = if self.lags { Writer::Held(version) } else { Writer::Done };
        if !self.lags {
            state.due = state.due.max(version);
        }
    }

    /// `Shared::attempt` of the guard.
    fn deliver(&self, state: &mut State, at: usize) {
        state.drop_tag();
        if !self.has(Rule::TheJournalLeavesThem) {
            state.fenced = None;
        }
        state.writers[at] = Writer::Done;
    }

    /// A fence is over: its key expires, unless it was prolonged.
    fn end(&self, state: &mut State, at: usize) {
        let was_fenced = std::mem::take(&mut state.fences[at]);
        state.has_ended = self.is_late;
        if was_fenced && !state.fences.contains(&true) && !state.is_prolonged {
            state.fenced = None;
        }
        match state.writers[at] {
            Writer::Dead(Some(version)) | Writer::Undelivered(version) | Writer::Held(version) => {
                state.due = state.due.max(version);
            }
            _ => {}
        }
    }

    fn may_end(&self, state: &State, at: usize) -> bool {
        let is_over = state.writers[at] != Writer::Begun || !self.has(Rule::LeasesOutliveHandlers);
        state.fences[at] && is_over && state.replica == state.row
    }

    fn writes(&self, state: &State, at: usize, actions: &mut Vec<Action>) {
        match state.writers[at] {
            Writer::Idle => actions.push(Action::Begin(at)),
            Writer::Begun => actions.extend([Action::Commit(at), Action::Kill(at)]),
            Writer::Committed(_) => {
                actions.extend([Action::Invalidate(at), Action::Fail(at), Action::Kill(at)]);
            }
            Writer::Undelivered(_) => actions.push(Action::Deliver(at)),
            Writer::Held(_) if state.replica == state.row => actions.push(Action::EndHold(at)),
            Writer::Held(_) | Writer::Dead(_) | Writer::Done => {}
        }
        if self.may_end(state, at) && !matches!(state.writers[at], Writer::Held(_)) {
            actions.push(Action::EndLease(at));
        }
    }

    fn write(&self, state: &mut State, action: Action) {
        match (action, action.writer().map(|at| state.writers[at])) {
            (Action::Begin(at), _) => self.begin(state, at),
            (Action::Commit(at), _) => {
                state.row += 1;
                if !self.lags {
                    state.replica = state.row;
                }
                state.writers[at] = Writer::Committed(state.row);
            }
            (Action::Invalidate(at), Some(Writer::Committed(version))) => self.invalidate(state, at, version),
            (Action::Fail(at), Some(Writer::Committed(version))) => {
                state.writers[at] = Writer::Undelivered(version);
                if !self.lags {
                    state.due = state.due.max(version);
                }
            }
            (Action::Deliver(at), _) => self.deliver(state, at),
            (Action::Kill(at), Some(Writer::Committed(version))) => {
                state.writers[at] = Writer::Dead(Some(version));
                // Without a fence there is no lease to wait for.
                if !state.fences[at] && state.replica == state.row {
                    state.due = state.due.max(version);
                }
            }
            (Action::Kill(at), _) => state.writers[at] = Writer::Dead(None),
            (Action::EndLease(at), _) => self.end(state, at),
            (Action::EndHold(at), _) => {
                self.end(state, at);
                state.writers[at] = Writer::Done;
            }
            _ => {}
        }
    }
}

impl Action {
    fn writer(self) -> Option<usize> {
        match self {
            Self::Begin(at) | Self::Commit(at) | Self::Invalidate(at) | Self::Fail(at) => Some(at),
            Self::Deliver(at) | Self::Kill(at) | Self::EndLease(at) | Self::EndHold(at) => Some(at),
            _ => None,
        }
    }
}

impl Model for Protocol {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            row: 0,
            replica: 0,
            due: 0,
            generation: None,
            fenced: None,
            is_prolonged: false,
            has_ended: false,
            fences: [false; 2],
            mark: None,
            entry: None,
            readers: [Reader { began: 0, step: Read::Idle }; 2],
            writers: [Writer::Idle; 2],
            is_stale: false,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        for at in 0..2 {
            match state.readers[at].step {
                Read::Idle => {
                    actions.extend(self.find(state).map(|_| Action::Read(at)));
                    actions.push(Action::Lead(at));
                    let leader = 1 - at;
                    actions.extend(self.joins(state, leader).then_some(Action::Join { at, leader }));
                }
                Read::Following { .. } => {}
                Read::Loading(_) if state.replica != state.row => {
                    actions.extend([Action::Read(at), Action::ReadReplica(at)]);
                }
                _ => actions.push(Action::Read(at)),
            }
            if at < self.writers {
                self.writes(state, at, actions);
            }
        }
        if self.is_late && state.fenced.is_some() && !state.is_prolonged {
            actions.push(Action::Prolong);
        }
        // What else is lost is the core's business.
        if state.fenced.is_some() && !self.has(Rule::FencesAreKept) {
            actions.push(Action::Lose);
        }
        let loads = |reader: &Reader| matches!(reader.step, Read::Loading(_) | Read::Loaded(..));
        if state.has_ended && !state.readers.iter().any(loads) {
            actions.push(Action::Forget);
        }
        if state.replica != state.row {
            actions.push(Action::CatchUp);
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::Read(at) => self.read(&mut state, at, last.row),
            Action::ReadReplica(at) => self.read(&mut state, at, last.replica),
            Action::Lead(at) => state.readers[at].step = Read::Loading(self.opened(&mut state)),
            Action::Join { at, leader } => {
                self.opened(&mut state);
                state.readers[at] = Reader { began: state.due, step: Read::Following { leader } };
            }
            Action::Prolong => state.is_prolonged = true,
            Action::Lose => (state.generation, state.fenced, state.is_prolonged) = (None, None, false),
            Action::Forget => state.has_ended = false,
            Action::CatchUp => state.replica = state.row,
            _ => self.write(&mut state, action),
        }
        state.renumber();
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let is_valid = |_: &Self, state: &State| {
            let now = state.tag().map(|tag| tag.generation);
            state.row > 0 && state.entry.is_some_and(|(_, generation)| now == Some(generation))
        };
        let mut properties = vec![
            Property::always(PROMISE, |_, state: &State| !state.is_stale),
            Property::sometimes("something is valid after a write", is_valid),
        ];
        if self.writers == 2 {
            let both = |_: &Self, state: &State| state.fences == [true; 2];
            properties.push(Property::sometimes("two fence one tag", both));
        }
        properties
    }
}

const NAMED: Protocol = Protocol { is_late: false, lags: false, writers: 2, without: None };
const LATE: Protocol = Protocol { is_late: true, ..NAMED };
const LAGGING: Protocol = Protocol { lags: true, writers: 1, ..NAMED };

#[test]
fn a_fence_keeps_the_promise_though_its_writer_is_killed() {
    holds("fences", NAMED);
    holds("fences of tags that only responses name", LATE);
}

#[test]
fn a_fence_that_is_held_keeps_the_promise_though_replicas_lag() {
    holds("fences that are held", LAGGING);
}

#[test]
fn each_rule_of_fences_is_needed() {
    for (rule, protocol) in [
        (Rule::RaisedBeforeTheHandler, NAMED),
        (Rule::NothingIsStoredUnderIt, NAMED),
        (Rule::NobodySharesUnderIt, NAMED),
        (Rule::NothingIsProvenUnderIt, LATE),
        (Rule::EndedLeasesAreRemembered, LATE),
        (Rule::EachLiftsItsOwn, NAMED),
        (Rule::TheJournalLeavesThem, NAMED),
        (Rule::LeasesOutliveHandlers, NAMED),
        (Rule::HeldWhileReplicasLag, LAGGING),
        (Rule::FencesAreKept, NAMED),
    ] {
        breaks("fences", rule, Protocol { without: Some(rule), ..protocol });
    }
}
