//! The shared store of two processes: what could not be delivered is in the journal, and the store is two servers, one of which
//! takes over from the other without its last drops, and back; or is restarted without them.
//!
//! A process has to see its own writes once they are acknowledged; those of the other, once they are delivered, and two
//! heartbeats after the last change of servers (and, where a master may be cut off, after that has noticed).

use stateright::{Model, Property};

use crate::vocabulary::{Generation, Numbered, PROMISE, Version, breaks, holds, open};

/// Each taken out is a fault.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Rule {
    /// `Identity::of`: the run id is a part of the reign, which `parse_generation` folds into what it reads,
    RunIdIsFoldedIn,
    /// and so is the replication id.
    ReplicationIdIsFoldedIn,
    /// `Server::beat` asks for the role,
    BeatsAskForTheRole,
    /// and for the reign.
    BeatsAskForTheReign,
    /// `Pending::drop`, `Shared::postpone`: what is not acknowledged goes to the journal.
    TheUnacknowledgedIsKept,
    /// `Guard::call`: nothing is read while the journal holds anything.
    TheJournalBeforeReads,
    /// `Journal::delivered`: what was added during a delivery is not struck out.
    WhatIsAddedMeanwhileStays,
    /// The user's part, where a master may be cut off: `RedisBuilder::replicas`, so that `Remote::acknowledged` waits,
    DropsWaitForReplicas,
    /// and `min-replicas-to-write`, so that it refuses a heartbeat's write.
    MastersAloneRefuse,
    /// That a demoted server takes two heartbeats to be filled anew by its master.
    DemotedServersAreSlow,
}

#[derive(Clone, Copy)]
struct Protocol {
    /// A master may be cut off, and not know that another has taken over.
    splits: bool,
    /// How often the row is written, and servers change.
    writes: Version,
    changes: u8,
    without: Option<Rule>,
}

/// One of the processes writes and reads, the other reads and stores.
const WRITER: usize = 0;

/// What a server says it is: both are digested into one.
#[derive(Clone, Copy, Debug, Hash, PartialEq)]
struct Reign {
    run: Generation,
    replication: Generation,
}

/// As it is stored, and the reign under which it was read.
type Folded = (Generation, Reign);

#[derive(Clone, Debug, Hash, PartialEq)]
struct State {
    row: Version,
    /// What is known to have been delivered.
    delivered: Version,
    servers: [Server; 2],
    /// The one that clients are sent to.
    master: usize,
    /// How often servers may still change.
    changes: u8,
    processes: [Process; 2],
    is_stale: bool,
}

#[derive(Clone, Debug, Hash, PartialEq)]
struct Server {
    is_master: bool,
    /// It has noticed that nobody follows it, and takes no writes.
    refuses: bool,
    reign: Reign,
    generation: Option<Generation>,
    entry: Option<(Version, Folded)>,
}

#[derive(Clone, Debug, Hash, PartialEq)]
struct Process {
    /// Whom it is connected to, and which reign that was then.
    server: Option<(usize, Reign)>,
    /// A heartbeat was answered since servers changed.
    is_up_to_date: bool,
    /// The last of its writes that was acknowledged.
    own: Version,
    /// Its handler has committed this.
    committed: Option<Version>,
    /// The last write in the journal, and the one that is being delivered.
    journal: Option<Version>,
    delivering: Option<Version>,
    read: Read,
}

#[derive(Clone, Copy, Debug, Hash, PartialEq)]
enum Read {
    Idle,
    Loading(Folded),
    /// Its request has been answered.
    Filling(Version, Folded),
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Action {
    Read(usize),
    Commit(usize),
    /// Acknowledged by the store.
    Drop(usize),
    /// Executed, and the answer is lost.
    DropUnanswered(usize),
    /// Not even that.
    DropUnreached(usize),
    Deliver(usize),
    Strike(usize),
    /// Two heartbeats go by.
    Beat(usize),
    Connect(usize),
    Replicate,
    Promote,
    /// Promoted, while the old one is cut off.
    Split,
    /// It is told that it has lost its replicas.
    Notice,
    Heal,
    /// Restarted without its last drops.
    Restart,
}

impl Numbered for State {
    fn visit(&mut self, visit: &mut dyn FnMut(&mut Generation)) {
        let mut reign = |reign: &mut Reign| [&mut reign.run, &mut reign.replication].into_iter().for_each(&mut *visit);
        self.servers.iter_mut().for_each(|server| reign(&mut server.reign));
        self.processes.iter_mut().filter_map(|process| process.server.as_mut()).for_each(|(_, own)| reign(own));
        let mut folded = |(generation, reign): &mut Folded| {
            [generation, &mut reign.run, &mut reign.replication].into_iter().for_each(&mut *visit);
        };
        self.servers.iter_mut().filter_map(|server| server.entry.as_mut()).for_each(|(_, own)| folded(own));
        for process in &mut self.processes {
            match &mut process.read {
                Read::Loading(own) | Read::Filling(_, own) => folded(own),
                Read::Idle => {}
            }
        }
        self.servers.iter_mut().filter_map(|server| server.generation.as_mut()).for_each(&mut *visit);
    }
}

impl State {
    fn changed(&mut self) {
        self.changes -= 1;
        self.processes.iter_mut().for_each(|process| process.is_up_to_date = false);
    }

    /// The other server becomes the master; which it is from now on is what it never was.
    fn promote(&mut self) -> usize {
        let (old, new) = (self.master, 1 - self.master);
        let replication = self.unique();
        self.servers[new].reign.replication = replication;
        (self.master, self.servers[new].is_master) = (new, true);
        self.changed();
        old
    }

    /// A server that believes itself the master, and is not.
    fn is_alone(&self, server: usize) -> bool {
        self.servers[server].is_master && server != self.master
    }
}

impl Protocol {
    fn has(&self, rule: Rule) -> bool {
        self.without != Some(rule)
    }

    /// Whether what was stored is read as what it was: `parse_generation`.
    fn is_same(&self, one: Folded, other: Folded) -> bool {
        let is_same_run = one.1.run == other.1.run || !self.has(Rule::RunIdIsFoldedIn);
        let is_same_replication = one.1.replication == other.1.replication || !self.has(Rule::ReplicationIdIsFoldedIn);
        one.0 == other.0 && is_same_run && is_same_replication
    }

    /// Whether a process' server takes what it writes: a replica answers `READONLY`.
    fn writable(&self, state: &State, at: usize) -> Option<usize> {
        let (server, _) = state.processes[at].server?;
        (state.servers[server].is_master && !state.servers[server].refuses).then_some(server)
    }

    fn read(&self, state: &mut State, at: usize) {
        let process = &state.processes[at];
        // `Guard::call`: else the origin answers, and nothing is stored.
        let is_behind = process.journal.is_some() && self.has(Rule::TheJournalBeforeReads);
        let reachable = process.server.filter(|_| !is_behind);
        let writable = self.writable(state, at).filter(|_| !is_behind);
        let read = match (process.read, reachable) {
            (Read::Idle, None) => Read::Idle,
            (Read::Idle, Some((server, reign))) => match (self.find(&state.servers[server], reign), writable) {
                (Some(value), _) => {
                    let others = if process.is_up_to_date { state.delivered } else { 0 };
                    state.is_stale |= value < process.own.max(others);
                    Read::Idle
                }
                // `Remote::open`.
                (None, Some(_)) if at != WRITER => {
                    let generation = open(state, |state| &mut state.servers[server].generation);
                    Read::Loading((generation, reign))
                }
                (None, _) => Read::Idle,
            },
            (Read::Loading(stamp), _) => Read::Filling(state.row, stamp),
            // `Remote::fill`.
            (Read::Filling(value, stamp), _) => {
                if let Some(server) = writable {
                    state.servers[server].entry = Some((value, stamp));
                }
                Read::Idle
            }
        };
        state.processes[at].read = read;
    }

    /// `Remote::lookup`.
    fn find(&self, server: &Server, reign: Reign) -> Option<Version> {
        let now = server.generation.map(|generation| (generation, reign));
        let is_valid = |stamp| now.is_some_and(|now| self.is_same(now, stamp));
        server.entry.filter(|(_, stamp)| is_valid(*stamp)).map(|(value, _)| value)
    }

    /// `Guard::invalidate`, and then the client hears of it.
    fn drop_tag(&self, state: &mut State, at: usize, is_executed: bool, is_answered: bool) {
        let server = self.writable(state, at).filter(|_| is_executed);
        if let Some(server) = server {
            state.servers[server].generation = None;
        }
        let is_replicated = server.is_some_and(|server| self.is_replicated(state, server));
        let process = &mut state.processes[at];
        let Some(version) = process.committed.take() else { return };
        process.own = process.own.max(version);
        if is_answered && is_replicated {
            state.delivered = state.delivered.max(version);
        } else if self.has(Rule::TheUnacknowledgedIsKept) {
            process.journal = Some(version);
        }
    }

    /// `Remote::acknowledged`: where it waits for replicas, one has to have what was dropped.
    fn is_replicated(&self, state: &State, server: usize) -> bool {
        !self.splits || !self.has(Rule::DropsWaitForReplicas) || !state.is_alone(server)
    }

    /// `Shared::deliver`: the command is executed,
    fn deliver(&self, state: &mut State, at: usize) {
        let Some(server) = self.writable(state, at).filter(|server| self.is_replicated(state, *server)) else { return };
        state.servers[server].generation = None;
        state.processes[at].delivering = state.processes[at].journal;
    }

    /// and answered: `Shared::strike`.
    fn strike(&self, state: &mut State, at: usize) {
        let process = &mut state.processes[at];
        let Some(version) = process.delivering.take() else { return };
        if process.journal == Some(version) || !self.has(Rule::WhatIsAddedMeanwhileStays) {
            process.journal = None;
        }
        state.delivered = state.delivered.max(version);
    }

    /// `Server::beat`: whoever is not the master it was is left.
    fn beat(&self, state: &mut State, at: usize) {
        let (mut is_good, mut is_told) = (false, true);
        if let Some((server, reign)) = state.processes[at].server {
            let asked = &state.servers[server];
            let is_master = asked.is_master && !asked.refuses || !self.has(Rule::BeatsAskForTheRole);
            is_good = is_master && (asked.reign == reign || !self.has(Rule::BeatsAskForTheReign));
            // It does not know yet.
            is_told = asked.refuses || !state.is_alone(server) || !self.has(Rule::MastersAloneRefuse);
        }
        let process = &mut state.processes[at];
        process.server = process.server.filter(|_| is_good);
        process.is_up_to_date |= is_told;
    }

    /// The replica has all that its master has, and says that it follows it.
    fn replicate(&self, state: &mut State) {
        let Server { reign, generation, entry, .. } = state.servers[state.master].clone();
        let replica = &mut state.servers[1 - state.master];
        (replica.generation, replica.entry) = (generation, entry);
        replica.reign.replication = reign.replication;
    }

    fn may_replicate(&self, state: &State) -> bool {
        let replica = 1 - state.master;
        let is_believed =
            state.processes.iter().any(|process| process.server.is_some_and(|(server, _)| server == replica));
        !state.servers[replica].is_master && (!is_believed || !self.has(Rule::DemotedServersAreSlow))
    }

    /// What was not written to disk in time is what was not replicated in time.
    fn restart(&self, state: &mut State) {
        let run = state.unique();
        let (master, replica) = (state.master, 1 - state.master);
        let Server { generation, entry, .. } = state.servers[replica].clone();
        let server = &mut state.servers[master];
        (server.generation, server.entry, server.reign.run) = (generation, entry, run);
        state.changed();
        // Its connections are gone.
        for process in &mut state.processes {
            process.server = process.server.filter(|(server, _)| *server != master);
        }
    }

    fn of_servers(&self, state: &State, actions: &mut Vec<Action>) {
        if self.may_replicate(state) {
            actions.push(Action::Replicate);
        }
        if state.is_alone(1 - state.master) {
            actions.push(Action::Heal);
            let notices = self.has(Rule::MastersAloneRefuse) && !state.servers[1 - state.master].refuses;
            actions.extend(notices.then_some(Action::Notice));
        } else if state.changes > 0 {
            actions.extend([Action::Promote, Action::Restart]);
            actions.extend(self.splits.then_some(Action::Split));
        }
    }

    fn of_process(&self, state: &State, at: usize, actions: &mut Vec<Action>) {
        let process = &state.processes[at];
        actions.extend([Action::Read(at), Action::Beat(at)]);
        if process.server.is_none() {
            actions.push(Action::Connect(at));
        }
        match process.committed {
            Some(_) if self.writable(state, at).is_some() => {
                actions.extend([Action::Drop(at), Action::DropUnanswered(at), Action::DropUnreached(at)]);
            }
            Some(_) => actions.push(Action::DropUnreached(at)),
            None if at == WRITER && state.row < self.writes => actions.push(Action::Commit(at)),
            None => {}
        }
        match (process.journal, process.delivering) {
            (Some(_), None) if self.writable(state, at).is_some() => actions.push(Action::Deliver(at)),
            (_, Some(_)) => actions.push(Action::Strike(at)),
            _ => {}
        }
    }
}

impl Model for Protocol {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let server = |run| Server {
            is_master: run == 0,
            refuses: false,
            reign: Reign { run, replication: 2 },
            generation: None,
            entry: None,
        };
        let process = Process {
            server: None,
            is_up_to_date: true,
            own: 0,
            committed: None,
            journal: None,
            delivering: None,
            read: Read::Idle,
        };
        vec![State {
            row: 0,
            delivered: 0,
            servers: [server(0), server(1)],
            master: 0,
            changes: self.changes,
            processes: [process.clone(), process],
            is_stale: false,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        self.of_servers(state, actions);
        (0..2).for_each(|at| self.of_process(state, at, actions));
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::Read(at) => self.read(&mut state, at),
            Action::Commit(at) => {
                state.row += 1;
                state.processes[at].committed = Some(state.row);
            }
            Action::Drop(at) => self.drop_tag(&mut state, at, true, true),
            Action::DropUnanswered(at) => self.drop_tag(&mut state, at, true, false),
            Action::DropUnreached(at) => self.drop_tag(&mut state, at, false, false),
            Action::Deliver(at) => self.deliver(&mut state, at),
            Action::Strike(at) => self.strike(&mut state, at),
            Action::Beat(at) => self.beat(&mut state, at),
            // `Server::connect`.
            Action::Connect(at) => {
                state.processes[at].server = Some((state.master, state.servers[state.master].reign));
            }
            Action::Replicate => self.replicate(&mut state),
            Action::Promote => {
                let old = state.promote();
                state.servers[old].is_master = false;
            }
            Action::Split => {
                state.promote();
            }
            Action::Notice => state.servers[1 - last.master].refuses = true,
            Action::Heal => {
                let other = &mut state.servers[1 - last.master];
                (other.is_master, other.refuses) = (false, false);
            }
            Action::Restart => self.restart(&mut state),
        }
        state.renumber();
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let is_valid = |protocol: &Self, state: &State| {
            let server = &state.servers[state.master];
            state.changes == 0 && protocol.find(server, server.reign) == Some(protocol.writes)
        };
        let mut properties = vec![
            Property::always(PROMISE, |_, state: &State| !state.is_stale),
            Property::sometimes("something is valid after all writes and changes", is_valid),
        ];
        if self.writes > 1 {
            properties.push(Property::sometimes("something is added during a delivery", |_, state: &State| {
                let is_added = |process: &Process| process.delivering.is_some() && process.journal > process.delivering;
                state.processes.iter().any(is_added)
            }));
        }
        properties
    }
}

const SERVERS: Protocol = Protocol { splits: false, writes: 1, changes: 2, without: None };
const SPLIT: Protocol = Protocol { splits: true, changes: 1, ..SERVERS };
const JOURNAL: Protocol = Protocol { writes: 2, changes: 0, ..SERVERS };

#[test]
fn what_is_not_delivered_keeps_the_promise() {
    holds("journal", JOURNAL);
}

#[test]
fn servers_that_take_over_keep_the_promise() {
    holds("servers", SERVERS);
}

#[test]
fn servers_that_are_cut_off_keep_the_promise() {
    holds("servers that are cut off", SPLIT);
}

#[test]
fn each_rule_of_the_shared_store_is_needed() {
    for (rule, protocol) in [
        (Rule::RunIdIsFoldedIn, SERVERS),
        (Rule::ReplicationIdIsFoldedIn, SERVERS),
        (Rule::BeatsAskForTheRole, SERVERS),
        (Rule::BeatsAskForTheReign, SERVERS),
        (Rule::TheUnacknowledgedIsKept, JOURNAL),
        (Rule::TheJournalBeforeReads, JOURNAL),
        (Rule::WhatIsAddedMeanwhileStays, JOURNAL),
        (Rule::DropsWaitForReplicas, SPLIT),
        (Rule::MastersAloneRefuse, SPLIT),
        (Rule::DemotedServersAreSlow, SERVERS),
    ] {
        breaks("shared store", rule, Protocol { without: Some(rule), ..protocol });
    }
}
