//! A rolling deployment that adds a tag: processes of the old code store entries without it, processes of the new code count
//! on it, also where they hold entries in process.
//!
//! What a read by the new code has to see is what was written through the new code.

use stateright::{Model, Property};

use crate::vocabulary::{Generation, Numbered, PROMISE, Version, breaks, holds, open};

/// Each taken out is a fault.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Rule {
    /// `lookup::validity`: an entry that lacks a tag which the request names is none.
    RequestsRequireTheirTags,
    /// `redis::is_current`: nor is it in process (`Inquiry::required`).
    TheTierRequiresThem,
    /// The user's part: a tag that only responses declare is added with another `CacheBuilder::version`.
    DeclaredTagsNeedAnotherVersion,
    /// The user's part: nobody writes through the old code when the new cascade is counted on.
    NobodyWritesThroughTheOldCode,
}

#[derive(Clone, Copy)]
struct Protocol {
    /// The new code's route names the tag; else its responses declare it.
    is_named: bool,
    without: Option<Rule>,
}

#[derive(Clone, Debug, Hash, PartialEq)]
struct State {
    row: Version,
    acknowledged: Version,
    /// Of the tag that both know, which no write of the row drops, and of the new one.
    generations: [Option<Generation>; 2],
    entry: Option<Entry>,
    /// What a new process holds.
    held: Option<Version>,
    old: Read,
    new: Reader,
    committed: Option<Version>,
    is_stale: bool,
}

#[derive(Clone, Copy, Debug, Hash, PartialEq)]
struct Entry {
    value: Version,
    stamps: [Option<Generation>; 2],
}

#[derive(Clone, Copy, Debug, Hash, PartialEq)]
struct Reader {
    began: Version,
    step: Read,
}

#[derive(Clone, Copy, Debug, Hash, PartialEq)]
enum Read {
    Idle,
    Missed,
    Loading([Option<Generation>; 2]),
    Filling(Entry),
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Action {
    ReadOld,
    ReadNew,
    Commit,
    Drop,
    /// The old cascade drops nothing of the new tag.
    WriteOld,
}

impl Numbered for State {
    fn visit(&mut self, visit: &mut dyn FnMut(&mut Generation)) {
        self.generations.iter_mut().flatten().for_each(&mut *visit);
        self.entry.iter_mut().flat_map(|entry| &mut entry.stamps).flatten().for_each(&mut *visit);
        for step in [&mut self.new.step, &mut self.old] {
            match step {
                Read::Loading(stamps) | Read::Filling(Entry { stamps, .. }) => {
                    stamps.iter_mut().flatten().for_each(&mut *visit);
                }
                Read::Idle | Read::Missed => {}
            }
        }
    }
}

impl State {
    fn open(&mut self, tag: usize) -> Generation {
        open(self, |state| &mut state.generations[tag])
    }

    fn answer(&mut self, value: Version, then: Read) {
        self.is_stale |= value < self.new.began;
        self.new = Reader { began: 0, step: then };
    }

    /// `validity`, `is_current`: the stamps that it has are current, and it has those that it must have.
    fn is_valid(&self, entry: Entry, must_have: bool) -> bool {
        let is_current = |tag: usize| entry.stamps[tag].is_none_or(|own| self.generations[tag] == Some(own));
        is_current(0) && is_current(1) && (entry.stamps[1].is_some() || !must_have)
    }
}

impl Protocol {
    fn has(&self, rule: Rule) -> bool {
        self.without != Some(rule)
    }

    /// Of the old code it matters what it stores.
    fn read_old(&self, state: &mut State) {
        state.old = match state.old {
            Read::Idle | Read::Missed => Read::Loading([Some(state.open(0)), None]),
            Read::Loading(stamps) => Read::Filling(Entry { value: state.row, stamps }),
            Read::Filling(entry) => {
                // Of another version, it would be under another key.
                if self.is_named || !self.has(Rule::DeclaredTagsNeedAnotherVersion) {
                    state.entry = Some(entry);
                }
                Read::Idle
            }
        };
    }

    fn read_new(&self, state: &mut State) {
        match state.new.step {
            Read::Idle => {
                state.new.began = state.acknowledged;
                // `RedisStore::peek`.
                if let Some(value) = state.held {
                    return state.answer(value, Read::Idle);
                }
                self.find(state);
            }
            // `Store::open`.
            Read::Missed => {
                let stamps = [Some(state.open(0)), Some(state.open(1))];
                state.new.step = Read::Loading(stamps);
            }
            Read::Loading(stamps) => {
                let entry = Entry { value: state.row, stamps };
                state.answer(state.row, Read::Filling(entry));
            }
            Read::Filling(entry) => {
                state.entry = Some(entry);
                state.new.step = Read::Idle;
            }
        }
    }

    /// `RedisStore::tracked`, and `Engine::find` with what that gives.
    fn find(&self, state: &mut State) {
        let requires = |rule| self.is_named && self.has(rule);
        let is_valid = |rule| state.entry.filter(|entry| state.is_valid(*entry, requires(rule)));
        let held = is_valid(Rule::TheTierRequiresThem).map(|entry| entry.value);
        let found = is_valid(Rule::RequestsRequireTheirTags);
        state.held = held;
        match found {
            Some(entry) => state.answer(entry.value, Read::Idle),
            None => state.new.step = Read::Missed,
        }
    }
}

impl Model for Protocol {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            row: 0,
            acknowledged: 0,
            generations: [None; 2],
            entry: None,
            held: None,
            old: Read::Idle,
            new: Reader { began: 0, step: Read::Idle },
            committed: None,
            is_stale: false,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        actions.extend([Action::ReadOld, Action::ReadNew]);
        match state.committed {
            Some(_) => actions.push(Action::Drop),
            None if state.row < WRITES => {
                actions.push(Action::Commit);
                actions.extend((!self.has(Rule::NobodyWritesThroughTheOldCode)).then_some(Action::WriteOld));
            }
            None => {}
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::ReadOld => self.read_old(&mut state),
            Action::ReadNew => self.read_new(&mut state),
            Action::Commit => {
                state.row += 1;
                state.committed = Some(state.row);
            }
            // The push is heard at once: the rest is the tier's business.
            Action::Drop => {
                (state.generations[1], state.held) = (None, None);
                state.acknowledged = state.committed.take().unwrap_or_default();
            }
            Action::WriteOld => {
                state.row += 1;
                state.acknowledged = state.row;
            }
        }
        state.renumber();
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(PROMISE, |_, state: &State| !state.is_stale),
            Property::sometimes("it answers from what it holds after all writes", |_, state: &State| {
                state.held == Some(WRITES) && state.acknowledged == WRITES
            }),
        ]
    }
}

/// How often the row is written.
const WRITES: Version = 3;

const NAMED: Protocol = Protocol { is_named: true, without: None };
const DECLARED: Protocol = Protocol { is_named: false, ..NAMED };

#[test]
fn a_deployment_that_adds_a_tag_keeps_the_promise() {
    holds("deployment", NAMED);
    holds("deployment of a declared tag", DECLARED);
}

#[test]
fn each_rule_of_a_deployment_is_needed() {
    for (rule, protocol) in [
        (Rule::RequestsRequireTheirTags, NAMED),
        (Rule::TheTierRequiresThem, NAMED),
        (Rule::DeclaredTagsNeedAnotherVersion, DECLARED),
        (Rule::NobodyWritesThroughTheOldCode, NAMED),
    ] {
        breaks("deployment", rule, Protocol { without: Some(rule), ..protocol });
    }
}
