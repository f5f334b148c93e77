//! The protocol as a model that is small enough to be checked whole (stateright): every order of every step of two writers and
//! three readers, with a generation that is lost. The comments name the functions that do the steps.
//!
//! `cargo test --all-features --release --test model -- --nocapture` says how many states that are.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

use stateright::{Checker, Model, Property};

/// The rules of the protocol. Each taken out is a fault.
#[derive(Clone, Copy)]
struct Protocol {
    /// `Engine::begin` opens the generations before the load, and not when it stores.
    captures_before: bool,
    /// `Flights::join_or_lead` joins the flight that began under the same generations, and no other.
    joins_equal: bool,
    /// `Store::extend` proves that a tag which only the response declares was not dropped since the mark.
    proves_late_tags: bool,
    /// `Engine::follow` proves the same to those who joined before the tag was known.
    proves_to_followers: bool,
    /// `Store::invalidate` drops the mark in one step with the generations.
    drops_in_one_step: bool,
    /// `Write::run` drops what a handler may have written that failed.
    unknown_is_a_write: bool,
    /// `lookup::validity` compares the generations of all tags.
    compares: bool,
}

const SOUND: Protocol = Protocol {
    captures_before: true,
    joins_equal: true,
    proves_late_tags: true,
    proves_to_followers: true,
    drops_in_one_step: true,
    unknown_is_a_write: true,
    compares: true,
};

/// What the handler makes of two rows: the first is named by the request's path, the second only by the response's tags.
type Value = [u8; 2];

/// A generation: never used again.
type Generation = u8;

#[derive(Clone, Debug, Hash, PartialEq, Eq)]
struct State {
    /// The rows' versions in the database, and those whose writes have been acknowledged.
    rows: Value,
    acknowledged: Value,
    /// The store: the generations of both tags, the mark, an entry with its stamps.
    generations: [Option<Generation>; 2],
    mark: Option<Generation>,
    entry: Option<(Value, [Generation; 2])>,
    next: Generation,
    readers: [Reader; 3],
    writers: [Writer; 2],
    /// Whether the store may still lose a generation.
    may_lose: bool,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq)]
struct Reader {
    /// What was acknowledged when it began.
    began: Value,
    step: Read,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq)]
enum Read {
    Idle,
    /// `Engine::find` found nothing that is valid.
    Missed,
    /// It leads: what it captured, and the rows that it has read.
    Loading {
        generation: Generation,
        mark: Generation,
        first: Option<u8>,
    },
    Loaded {
        generation: Generation,
        mark: Generation,
        value: Value,
    },
    /// It has its response; and the others, under these stamps, if it may be given to any. Not stored yet.
    Sealed {
        value: Value,
        stamps: Option<[Generation; 2]>,
    },
    /// It waits for the call of another.
    Following {
        leader: usize,
    },
    Done {
        value: Value,
        hit: bool,
    },
}

/// A writer of one row.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
enum Writer {
    Idle,
    /// The handler has committed; whether it fails after that.
    Committed {
        fails: bool,
    },
    /// The generation is dropped, and the mark is not (which is one step, if all is well).
    HalfDropped,
    Acknowledged,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Read(usize),
    Commit { row: usize, fails: bool },
    Write(usize),
    Lose(usize),
}

impl State {
    /// `SET … NX GET`: the generation of a tag, a new one if there is none.
    fn open(&mut self, tag: usize) -> Generation {
        let next = &mut self.next;
        *self.generations[tag].get_or_insert_with(|| {
            *next += 1;
            *next
        })
    }

    fn open_mark(&mut self) -> Generation {
        let next = &mut self.next;
        *self.mark.get_or_insert_with(|| {
            *next += 1;
            *next
        })
    }
}

impl Protocol {
    /// `Engine::begin`: look up, open, board.
    fn read(self, state: &mut State, at: usize) {
        match state.readers[at].step.clone() {
            Read::Idle => {
                state.readers[at].began = state.acknowledged;
                let valid = state
                    .entry
                    .filter(|(_, stamps)| !self.compares || state.generations == [Some(stamps[0]), Some(stamps[1])]);
                state.readers[at].step = match valid {
                    Some((value, _)) => Read::Done { value, hit: true },
                    None => Read::Missed,
                };
            }
            Read::Missed => {
                let (generation, mark) = (state.open(0), state.open_mark());
                let joins = |other: &Reader| match other.step {
                    Read::Loading { generation: own, .. } | Read::Loaded { generation: own, .. } => {
                        own == generation || !self.joins_equal
                    }
                    // Landed, and still on the table until it is stored.
                    Read::Sealed { stamps: Some([own, _]), .. } => own == generation || !self.joins_equal,
                    _ => false,
                };
                let leader = state.readers.iter().position(joins);
                state.readers[at].step = match leader {
                    Some(leader) => Read::Following { leader },
                    None => Read::Loading { generation, mark, first: None },
                };
            }
            Read::Loading { generation, mark, first: None } => {
                state.readers[at].step = Read::Loading { generation, mark, first: Some(state.rows[0]) };
            }
            Read::Loading { generation, mark, first: Some(first) } => {
                state.readers[at].step = Read::Loaded { generation, mark, value: [first, state.rows[1]] };
            }
            Read::Loaded { generation, mark, value } => self.seal(state, at, generation, mark, value),
            Read::Sealed { value, stamps } => {
                // `Sealed::store`, at any time later.
                state.entry = stamps.map(|stamps| (value, stamps)).or(state.entry);
                state.readers[at].step = Read::Done { value, hit: false };
            }
            Read::Following { leader } => {
                let landed = match state.readers[leader].step {
                    Read::Sealed { value, stamps } => Some((value, stamps)),
                    _ => None,
                };
                // `Engine::is_proven`: the late tag may have been dropped between the landing and this request.
                let proven = landed.and_then(|(value, stamps)| {
                    let stamps = stamps?;
                    let is_good = !self.proves_to_followers || state.generations[1] == Some(stamps[1]);
                    is_good.then_some(value)
                });
                state.readers[at].step = match proven {
                    Some(value) => Read::Done { value, hit: false },
                    // `Landing::TryAgain`.
                    None => Read::Missed,
                };
            }
            Read::Done { .. } => {}
        }
    }

    /// `Leader::seal`: the late tag has a generation, if the store can prove it.
    fn seal(self, state: &mut State, at: usize, generation: Generation, mark: Generation, value: Value) {
        let (generation, mark) =
            if self.captures_before { (generation, mark) } else { (state.open(0), state.open_mark()) };
        let is_proven = !self.proves_late_tags || state.mark == Some(mark);
        let stamps = is_proven.then(|| [generation, state.open(1)]);
        state.readers[at].step = Read::Sealed { value, stamps };
    }

    fn write(self, state: &mut State, row: usize) {
        match state.writers[row] {
            Writer::Committed { fails: true } if !self.unknown_is_a_write => {
                state.acknowledged[row] = state.rows[row];
                state.writers[row] = Writer::Acknowledged;
            }
            Writer::Committed { .. } => {
                state.generations[row] = None;
                if self.drops_in_one_step {
                    state.mark = None;
                    state.acknowledged[row] = state.rows[row];
                    state.writers[row] = Writer::Acknowledged;
                } else {
                    state.writers[row] = Writer::HalfDropped;
                }
            }
            Writer::HalfDropped => {
                state.mark = None;
                state.acknowledged[row] = state.rows[row];
                state.writers[row] = Writer::Acknowledged;
            }
            Writer::Idle | Writer::Acknowledged => {}
        }
    }
}

impl Model for Protocol {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let reader = Reader { began: [0, 0], step: Read::Idle };
        vec![State {
            rows: [0, 0],
            acknowledged: [0, 0],
            generations: [None, None],
            mark: None,
            entry: None,
            next: 0,
            readers: [reader.clone(), reader.clone(), reader],
            writers: [Writer::Idle; 2],
            may_lose: true,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        for (at, reader) in state.readers.iter().enumerate() {
            let waits = |leader: usize| {
                matches!(state.readers[leader].step, Read::Missed | Read::Loading { .. } | Read::Loaded { .. })
            };
            match reader.step {
                Read::Done { .. } => {}
                Read::Following { leader } if waits(leader) => {}
                _ => actions.push(Action::Read(at)),
            }
        }
        for (row, writer) in state.writers.iter().enumerate() {
            match writer {
                Writer::Idle => actions.extend([false, true].map(|fails| Action::Commit { row, fails })),
                Writer::Acknowledged => {}
                Writer::Committed { .. } | Writer::HalfDropped => actions.push(Action::Write(row)),
            }
        }
        if state.may_lose {
            actions.extend((0..2).filter(|tag| state.generations[*tag].is_some()).map(Action::Lose));
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::Read(at) => self.read(&mut state, at),
            Action::Commit { row, fails } => {
                state.rows[row] += 1;
                state.writers[row] = Writer::Committed { fails };
            }
            Action::Write(row) => self.write(&mut state, row),
            // Evicted, expired, a server that was restarted without it.
            Action::Lose(tag) => (state.generations[tag], state.may_lose) = (None, false),
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        fn done(state: &State) -> impl Iterator<Item = (Value, Value, bool)> + '_ {
            state.readers.iter().filter_map(|reader| match reader.step {
                Read::Done { value, hit } => Some((reader.began, value, hit)),
                _ => None,
            })
        }
        vec![
            Property::always("no read that begins after an acknowledged write is from before it", |_, state| {
                done(state).all(|(began, value, _)| (0..2).all(|row| value[row] >= began[row]))
            }),
            Property::sometimes("something is hit", |_, state| done(state).any(|(_, _, hit)| hit)),
            Property::sometimes("somebody joins", |_, state: &State| {
                state.readers.iter().any(|reader| matches!(reader.step, Read::Following { .. }))
            }),
        ]
    }
}

const PROMISE: &str = "no read that begins after an acknowledged write is from before it";

/// Every order of every step keeps the promise, and the model can do what it is there for.
#[test]
fn the_protocol_keeps_its_promise() {
    let start = std::time::Instant::now();
    let checked = SOUND.checker().spawn_dfs().join();
    eprintln!("{} states in {:?}", checked.unique_state_count(), start.elapsed());
    checked.assert_properties();
    assert!(checked.is_done() && checked.unique_state_count() > 10_000);
}

/// Each rule taken out breaks it.
#[test]
fn each_rule_is_needed() {
    for (rule, without) in [
        ("capture before the load", Protocol { captures_before: false, ..SOUND }),
        ("join only an equal flight", Protocol { joins_equal: false, ..SOUND }),
        ("prove late tags", Protocol { proves_late_tags: false, ..SOUND }),
        ("prove them to followers", Protocol { proves_to_followers: false, ..SOUND }),
        ("mark and generations in one step", Protocol { drops_in_one_step: false, ..SOUND }),
        ("unknown is a write", Protocol { unknown_is_a_write: false, ..SOUND }),
        ("compare generations", Protocol { compares: false, ..SOUND }),
    ] {
        let checked = without.checker().spawn_bfs().join();
        let path = checked.discovery(PROMISE).unwrap_or_else(|| panic!("without `{rule}` nothing breaks"));
        eprintln!("without `{rule}`: {} steps", path.into_actions().len());
    }
}
