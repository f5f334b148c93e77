//! The core: look-up, open, board, load, seal, store, what is made beside a load, late tags, followers, drops, unknown outcomes; what
//! is lost, evicted or vanishes at any time. One process, or several: whoever could join a flight may also lead one of its own.
//!
//! A look-up that finds nothing and what is opened then are one step: what began earlier is promised less. So is one that finds the
//! first tag without a generation, and the mark; that generation is made at any time until the flight lands.

use stateright::{Model, Property};

use crate::vocabulary::{Generation, Numbered, PROMISE, Version, breaks, holds, open};

/// Each taken out is a fault.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Rule {
    /// `Engine::begin` opens the generations before the load, and not when it stores.
    CaptureBeforeTheLoad,
    /// `Flights::join_or_lead` joins a flight that began under the same generations, and no other.
    JoinOnlyAnEqualFlight,
    /// `Store::extend` proves that a tag which only the response declares was not dropped since the mark.
    ProveLateTags,
    /// `Capture::made` takes a generation that was absent only under the mark of the look-up.
    ProveWhatWasAbsent,
    /// `Capture::is_equal` takes what was absent for the same only under the same mark.
    AbsentUnderTheSameMark,
    /// `Follower::landed` takes what might have become equal only if it did.
    TakeOnlyWhatTurnsOutEqual,
    /// `Remote::extend` asks for the mark after the generations.
    TheMarkAfterTheGenerations,
    /// `Engine::is_proven` proves the same to those who joined before the tag was known.
    ProveThemToFollowers,
    /// `Store::invalidate` drops the mark in one step with the generations.
    MarkAndGenerationsInOneStep,
    /// `Write::run` drops what a handler may have written that failed.
    UnknownIsAWrite,
    /// `lookup::validity` compares the generations of all tags.
    CompareGenerations,
}

const RULES: [Rule; 11] = [
    Rule::CaptureBeforeTheLoad,
    Rule::JoinOnlyAnEqualFlight,
    Rule::ProveLateTags,
    Rule::ProveWhatWasAbsent,
    Rule::AbsentUnderTheSameMark,
    Rule::TakeOnlyWhatTurnsOutEqual,
    Rule::TheMarkAfterTheGenerations,
    Rule::ProveThemToFollowers,
    Rule::MarkAndGenerationsInOneStep,
    Rule::UnknownIsAWrite,
    Rule::CompareGenerations,
];

struct Protocol {
    readers: usize,
    /// How often something is lost, or a reader vanishes.
    losses: u8,
    /// Whether other keys of the tenant are loaded.
    has_others: bool,
    without: Option<Rule>,
}

/// What the handler makes of two rows, each with a tag: the first is named by the request, the second by the response.
type Value = [Version; 2];

#[derive(Clone, Debug, Hash, PartialEq)]
struct State {
    /// The rows in the database, and those whose writes have been acknowledged.
    rows: Value,
    acknowledged: Value,
    /// The store.
    generations: [Option<Generation>; 2],
    mark: Option<Generation>,
    entry: Option<Stored>,
    readers: Vec<Reader>,
    writers: [Writer; 2],
    losses: u8,
    /// Somebody was given what he should not have been.
    is_stale: bool,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, PartialOrd, Ord)]
struct Reader {
    /// What was acknowledged when it began, if it follows. (A call of its own reads what there is.)
    began: Value,
    step: Read,
}

/// What `Store::open` gave a flight; the second tag is among it if an earlier response declared it (`Engine::memos`).
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, PartialOrd, Ord)]
struct Opened {
    generations: [Option<Generation>; 2],
    mark: Generation,
    first: First,
}

/// The generation of the first tag, when the load began.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, PartialOrd, Ord)]
enum First {
    Known,
    /// It was absent, and is not made yet.
    Absent,
    /// It was absent, and is made.
    Made,
    /// Something has been dropped before it was made: nothing is stored.
    InVain,
}

#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, PartialOrd, Ord)]
enum Read {
    /// Whoever has seen its last flight may still join that.
    Idle(Option<Landed>),
    /// It leads. (The rows are read at once: the promise is about each.)
    Loading(Opened),
    Loaded(Opened, Value),
    /// Half of `Store::extend`.
    Extending(Opened, Value, Option<Generation>),
    /// Landed: its response may be given to others, under these stamps. Not stored yet.
    Sealed(Opened, Value, [Generation; 2]),
    /// Whoever has read a generation that the leader may just be making takes the result if that is it.
    Following {
        leader: usize,
        own: Option<Generation>,
    },
    /// It has what another's flight landed with, which knew the second tag or didn't.
    Given(bool, Value, [Generation; 2]),
}

/// A flight, what it has landed with, and the stamps of that.
type Landed = (Opened, Value, [Generation; 2]);

/// What is stored, and under what.
type Stored = (Value, [Generation; 2]);

/// A writer of one row.
#[derive(Clone, Copy, Debug, Hash, PartialEq)]
enum Writer {
    Idle,
    /// The handler has committed; whether it fails after that.
    Committed {
        fails: bool,
    },
    /// The mark, or the generation, is yet to be dropped (which is one step, if all is well).
    HalfDropped,
    Acknowledged,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Action {
    /// The next step of a reader that has no choice.
    Read(usize),
    Lead {
        at: usize,
        knows_late: bool,
    },
    /// Without a generation of the first tag.
    LeadAbsent {
        at: usize,
        knows_late: bool,
    },
    /// `Flight::make_absent`.
    Make(usize),
    Join {
        at: usize,
        leader: usize,
    },
    Vanish(usize),
    /// Another key of the tenant is loaded.
    Mark,
    Commit {
        row: usize,
        fails: bool,
    },
    Write(usize),
    /// Evicted, expired, flushed, or restarted without it.
    Lose(usize),
    LoseMark,
    Evict,
}

impl Opened {
    fn visit(&mut self, visit: &mut dyn FnMut(&mut Generation)) {
        self.generations.iter_mut().flatten().for_each(&mut *visit);
        visit(&mut self.mark);
    }
}

impl Numbered for State {
    fn visit(&mut self, visit: &mut dyn FnMut(&mut Generation)) {
        self.generations.iter_mut().chain([&mut self.mark]).flatten().for_each(&mut *visit);
        self.entry.iter_mut().flat_map(|(_, stamps)| stamps).for_each(&mut *visit);
        for reader in &mut self.readers {
            match &mut reader.step {
                Read::Loading(opened) | Read::Loaded(opened, _) => opened.visit(visit),
                Read::Extending(opened, _, late) => {
                    opened.visit(visit);
                    late.iter_mut().for_each(&mut *visit);
                }
                Read::Sealed(opened, _, stamps) | Read::Idle(Some((opened, _, stamps))) => {
                    opened.visit(visit);
                    stamps.iter_mut().for_each(&mut *visit);
                }
                Read::Given(_, _, stamps) => stamps.iter_mut().for_each(&mut *visit),
                Read::Following { own, .. } => own.iter_mut().for_each(&mut *visit),
                Read::Idle(None) => {}
            }
        }
    }
}

impl State {
    fn open(&mut self, tag: usize) -> Generation {
        open(self, |state| &mut state.generations[tag])
    }

    fn open_mark(&mut self) -> Generation {
        open(self, |state| &mut state.mark)
    }

    /// Whether an entry with these stamps is valid now.
    fn is_current(&self, stamps: [Generation; 2]) -> bool {
        self.generations == stamps.map(Some)
    }

    /// Whether these are the generations that a request which comes now would read, or there is still none.
    fn is_equal(&self, opened: Opened, under_any_mark: bool) -> bool {
        let is_same = |tag: usize| opened.generations[tag].is_none_or(|own| self.generations[tag] == Some(own));
        let is_marked = under_any_mark || self.mark == Some(opened.mark);
        let is_absent = opened.first != First::Known && self.generations[0].is_none() && is_marked;
        (opened.generations[0].is_some() && is_same(0) || is_absent) && is_same(1)
    }

    /// Whether these may turn out to be.
    fn may_become_equal(&self, opened: Opened) -> bool {
        let is_same = opened.generations[1].is_none_or(|own| self.generations[1] == Some(own));
        opened.first == First::Absent && self.generations[0].is_some() && is_same
    }

    /// It answers.
    fn answer(&mut self, at: usize, value: Value) {
        let began = self.readers[at].began;
        self.is_stale |= (0..2).any(|row| value[row] < began[row]);
        self.end(at, None);
    }

    /// Another read begins some time.
    fn end(&mut self, at: usize, flight: Option<Landed>) {
        self.readers[at] = Reader { began: [0, 0], step: Read::Idle(flight) };
    }

    /// Those who wait are told, or begin anew (`Landing::TryAgain`); under which generation of the first tag.
    fn land(&mut self, at: usize, how: Option<(Read, Option<Generation>)>) {
        for follower in 0..self.readers.len() {
            let Read::Following { leader, own } = self.readers[follower].step else { continue };
            if leader == at {
                match how.filter(|(_, first)| own.is_none() || *first == own) {
                    Some((how, _)) => self.readers[follower].step = how,
                    None => self.end(follower, None),
                }
            }
        }
    }

    /// What makes no difference is made the same.
    fn normalize(&mut self) {
        for at in 0..self.readers.len() {
            // Its generations never come back.
            if let Read::Idle(Some((opened, ..))) = self.readers[at].step
                && !self.is_equal(opened, true)
                && (opened.first == First::Known || self.mark != Some(opened.mark))
            {
                self.readers[at].step = Read::Idle(None);
            }
        }
        self.renumber();
        let mut order: Vec<_> = (0..self.readers.len()).collect();
        order.sort_by_key(|at| &self.readers[*at]);
        let mut readers: Vec<_> = order.iter().map(|at| self.readers[*at].clone()).collect();
        for reader in &mut readers {
            if let Read::Following { leader, .. } = &mut reader.step {
                *leader = order.iter().position(|at| at == leader).unwrap();
            }
        }
        self.readers = readers;
        self.renumber();
    }
}

impl Protocol {
    fn has(&self, rule: Rule) -> bool {
        self.without != Some(rule)
    }

    fn read(&self, state: &mut State, at: usize) {
        match state.readers[at].step {
            Read::Idle(_) => {
                if let Some((value, _)) = self.find(state) {
                    state.readers[at].began = state.acknowledged;
                    state.answer(at, value);
                }
            }
            Read::Loading(opened) => state.readers[at].step = Read::Loaded(opened, state.rows),
            Read::Loaded(opened, _) if opened.first == First::Absent => self.make(state, at),
            Read::Loaded(..) | Read::Extending(..) => self.seal(state, at),
            // `Sealed::store`, at any time later.
            Read::Sealed(opened, value, stamps) => {
                state.entry = Some((value, stamps));
                state.end(at, Some((opened, value, stamps)));
            }
            // `Engine::is_proven`: the late tag may have been dropped between the landing and this request.
            Read::Given(knew, value, stamps) => {
                let is_proven = knew || state.generations[1] == Some(stamps[1]);
                if is_proven || !self.has(Rule::ProveThemToFollowers) {
                    state.answer(at, value);
                } else {
                    state.end(at, None);
                }
            }
            Read::Following { .. } => {}
        }
    }

    /// `Flight::make_absent`: what `Store::open` reads last, the generation and the mark, is of one moment.
    fn make(&self, state: &mut State, at: usize) {
        let made = state.open(0);
        let is_same_moment = |own: Opened| state.mark == Some(own.mark) || !self.has(Rule::ProveWhatWasAbsent);
        let (Read::Loading(own) | Read::Loaded(own, _)) = state.readers[at].step else { return };
        let is_proven = is_same_moment(own);
        if let Read::Loading(own) | Read::Loaded(own, _) = &mut state.readers[at].step {
            (own.generations[0], own.first) = if is_proven { (Some(made), First::Made) } else { (None, First::InVain) };
        }
        state.open_mark();
    }

    /// `Leader::seal`: the late tag has a generation, if the store can prove it.
    fn seal(&self, state: &mut State, at: usize) {
        match state.readers[at].step {
            Read::Loaded(opened, value) => {
                let opened = if self.has(Rule::CaptureBeforeTheLoad) { opened } else { self.opened(state, false) };
                let [first, late] = opened.generations;
                if let Some(late) = late {
                    return self.sealed(state, at, opened, value, (first, late));
                }
                let is_generation_first = self.has(Rule::TheMarkAfterTheGenerations);
                let late = is_generation_first.then(|| state.open(1));
                if is_generation_first || self.is_marked(state, opened) {
                    state.readers[at].step = Read::Extending(opened, value, late);
                } else {
                    self.unsealed(state, at);
                }
            }
            Read::Extending(opened, value, late) => {
                let is_proven = late.is_none() || self.is_marked(state, opened);
                let late = late.unwrap_or_else(|| state.open(1));
                match is_proven {
                    true => self.sealed(state, at, opened, value, (opened.generations[0], late)),
                    false => self.unsealed(state, at),
                }
            }
            _ => {}
        }
    }

    fn is_marked(&self, state: &State, opened: Opened) -> bool {
        state.mark == Some(opened.mark) || !self.has(Rule::ProveLateTags)
    }

    /// Without a generation of the first tag it is not stored.
    fn sealed(
        &self,
        state: &mut State,
        at: usize,
        opened: Opened,
        value: Value,
        (first, late): (Option<Generation>, Generation),
    ) {
        let stamps = [first.unwrap_or(late), late];
        state.land(at, Some((Read::Given(opened.generations[1].is_some(), value, stamps), first)));
        match first {
            Some(_) => state.readers[at].step = Read::Sealed(opened, value, stamps),
            None => state.end(at, Some((opened, value, stamps))),
        }
    }

    /// The response is good for nobody but its own request.
    fn unsealed(&self, state: &mut State, at: usize) {
        state.land(at, None);
        state.end(at, None);
    }

    /// `Engine::find`.
    fn find(&self, state: &State) -> Option<Stored> {
        state.entry.filter(|(_, stamps)| state.is_current(*stamps) || !self.has(Rule::CompareGenerations))
    }

    /// `Store::open`.
    fn opened(&self, state: &mut State, knows_late: bool) -> Opened {
        let generations = [Some(state.open(0)), knows_late.then(|| state.open(1))];
        Opened { generations, mark: state.open_mark(), first: First::Known }
    }

    /// What a look-up reads that finds no generation of the first tag.
    fn absent(&self, state: &State, knows_late: bool) -> Option<Opened> {
        let late = if knows_late { Some(state.generations[1]?) } else { None };
        let is_absent = state.generations[0].is_none();
        let mark = state.mark.filter(|_| is_absent)?;
        Some(Opened { generations: [None, late], mark, first: First::Absent })
    }

    /// The flight of a reader that others may join, and how it has landed, if it has: `Flights::join_or_lead`.
    fn flight(&self, state: &State, leader: usize) -> Option<(Opened, Option<Stored>)> {
        let (opened, landed) = match state.readers[leader].step {
            Read::Loading(opened) | Read::Loaded(opened, _) | Read::Extending(opened, ..) => (opened, None),
            Read::Sealed(opened, value, stamps) | Read::Idle(Some((opened, value, stamps))) => {
                (opened, Some((value, stamps)))
            }
            _ => return None,
        };
        let under_any_mark = !self.has(Rule::AbsentUnderTheSameMark);
        let is_any = !self.has(Rule::JoinOnlyAnEqualFlight);
        let joins = is_any || state.is_equal(opened, under_any_mark) || state.may_become_equal(opened);
        joins.then_some((opened, landed))
    }

    /// `Engine::board`.
    fn join(&self, state: &mut State, at: usize, leader: usize) {
        let Some((opened, landed)) = self.flight(state, leader) else { return };
        let waits = state.may_become_equal(opened) && self.has(Rule::TakeOnlyWhatTurnsOutEqual);
        // What is absent stays so: who waits makes nothing.
        if state.generations[0].is_some() || opened.first == First::Known {
            self.opened(state, opened.generations[1].is_some());
        }
        state.readers[at].began = state.acknowledged;
        state.readers[at].step = match landed {
            None => Read::Following { leader, own: state.generations[0].filter(|_| waits) },
            Some((value, stamps)) => Read::Given(opened.generations[1].is_some(), value, stamps),
        };
    }

    /// `Write::run`: `Store::invalidate`, and then the client hears of it.
    fn write(&self, state: &mut State, row: usize) {
        let is_half = state.writers[row] == Writer::HalfDropped;
        let is_unknown = state.writers[row] == Writer::Committed { fails: true };
        if !is_unknown || self.has(Rule::UnknownIsAWrite) {
            if is_half || self.has(Rule::MarkAndGenerationsInOneStep) {
                state.mark = None;
            }
            if !is_half {
                state.generations[row] = None;
            }
            if !is_half && !self.has(Rule::MarkAndGenerationsInOneStep) {
                state.writers[row] = Writer::HalfDropped;
                return;
            }
        }
        state.acknowledged[row] = state.rows[row];
        state.writers[row] = Writer::Acknowledged;
    }

    fn reads(&self, state: &State, at: usize, actions: &mut Vec<Action>) {
        match state.readers[at].step {
            Read::Idle(_) => {
                actions.extend(self.find(state).map(|_| Action::Read(at)));
                for knows_late in [false, true] {
                    actions.push(Action::Lead { at, knows_late });
                    actions.extend(self.absent(state, knows_late).map(|_| Action::LeadAbsent { at, knows_late }));
                }
                let joins = (0..self.readers).filter(|leader| self.flight(state, *leader).is_some());
                actions.extend(joins.map(|leader| Action::Join { at, leader }));
            }
            Read::Following { .. } => {}
            Read::Given(..) => actions.push(Action::Read(at)),
            step => {
                let is_open = matches!(step, Read::Loading(opened) if opened.first == First::Absent);
                actions.extend(is_open.then_some(Action::Make(at)));
                actions.push(Action::Read(at));
                actions.extend((state.losses > 0).then_some(Action::Vanish(at)));
            }
        }
    }
}

impl Model for Protocol {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let reader = Reader { began: [0, 0], step: Read::Idle(None) };
        vec![State {
            rows: [0, 0],
            acknowledged: [0, 0],
            generations: [None, None],
            mark: None,
            entry: None,
            readers: vec![reader; self.readers],
            writers: [Writer::Idle; 2],
            losses: self.losses,
            is_stale: false,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        (0..state.readers.len()).for_each(|at| self.reads(state, at, actions));
        for (row, writer) in state.writers.iter().enumerate() {
            match writer {
                Writer::Idle => actions.extend([false, true].map(|fails| Action::Commit { row, fails })),
                Writer::Acknowledged => {}
                Writer::Committed { .. } | Writer::HalfDropped => actions.push(Action::Write(row)),
            }
        }
        actions.extend((self.has_others && state.mark.is_none()).then_some(Action::Mark));
        if state.losses == 0 {
            return;
        }
        actions.extend((0..2).filter(|tag| state.generations[*tag].is_some()).map(Action::Lose));
        actions.extend(state.mark.map(|_| Action::LoseMark));
        actions.extend(state.entry.map(|_| Action::Evict));
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::Read(at) => self.read(&mut state, at),
            Action::Lead { at, knows_late } => {
                state.readers[at].step = Read::Loading(self.opened(&mut state, knows_late));
            }
            Action::LeadAbsent { at, knows_late } => {
                state.readers[at].step = Read::Loading(self.absent(&state, knows_late)?);
            }
            Action::Make(at) => self.make(&mut state, at),
            Action::Join { at, leader } => self.join(&mut state, at, leader),
            // `Leader::drop`.
            Action::Vanish(at) => {
                state.losses -= 1;
                state.land(at, None);
                state.end(at, None);
            }
            Action::Mark => drop(state.open_mark()),
            Action::Commit { row, fails } => {
                state.rows[row] += 1;
                // It makes no difference, if all is well.
                let fails = fails && !self.has(Rule::UnknownIsAWrite);
                state.writers[row] = Writer::Committed { fails };
            }
            Action::Write(row) => self.write(&mut state, row),
            Action::Lose(tag) => (state.generations[tag], state.losses) = (None, last.losses - 1),
            Action::LoseMark => (state.mark, state.losses) = (None, last.losses - 1),
            Action::Evict => (state.entry, state.losses) = (None, last.losses - 1),
        }
        state.normalize();
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let is_valid = |_: &Self, state: &State| {
            state.rows == [1, 1] && state.entry.is_some_and(|(_, stamps)| state.is_current(stamps))
        };
        vec![
            Property::always(PROMISE, |_, state: &State| !state.is_stale),
            Property::sometimes("something is valid after both writes", is_valid),
            Property::sometimes("somebody joins", |_, state: &State| {
                state.readers.iter().any(|reader| matches!(reader.step, Read::Following { .. }))
            }),
        ]
    }
}

const SOUND: Protocol = Protocol { readers: 2, losses: 1, has_others: true, without: None };

#[test]
fn the_core_keeps_the_promise() {
    holds("core", SOUND);
}

#[test]
fn the_core_keeps_the_promise_to_three() {
    holds("core of three readers, without losses", Protocol { readers: 3, losses: 0, has_others: false, ..SOUND });
}

#[test]
fn each_rule_of_the_core_is_needed() {
    for rule in RULES {
        breaks("core", rule, Protocol { without: Some(rule), ..SOUND });
    }
}
