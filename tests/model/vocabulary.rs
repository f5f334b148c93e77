//! What the models have in common.

use std::{collections::BTreeMap, fmt::Debug, hash::Hash, time::Instant};

use stateright::{Checker, HasDiscoveries, Model};

/// How often a row has been written.
pub(crate) type Version = u8;

/// `Generation::unique`: what a tag or the mark is now, and never again. A number that nothing refers to any more is as good as
/// one that never was, so the models are finite although everything may be lost again and again.
pub(crate) type Generation = u8;

/// What every model promises; what "acknowledged" comes to in which mode is said by each.
pub(crate) const PROMISE: &str = "no read that begins after an acknowledged write is from before it";

/// A state that holds generations.
pub(crate) trait Numbered {
    /// Visits each of them, in an order of its own.
    fn visit(&mut self, visit: &mut dyn FnMut(&mut Generation));

    /// Numbers them by their first appearance: states that differ in nothing else are one.
    fn renumber(&mut self) {
        let mut names = BTreeMap::new();
        self.visit(&mut |generation| {
            let next = names.len() as Generation;
            *generation = *names.entry(*generation).or_insert(next);
        });
    }

    /// One that is nowhere in the state.
    fn unique(&mut self) -> Generation {
        let mut next = 0;
        self.visit(&mut |generation| next = next.max(*generation + 1));
        next
    }
}

/// `SET … NX` and `MGET`: the generation that there is, or a new one.
pub(crate) fn open<S: Numbered>(state: &mut S, at: impl Fn(&mut S) -> &mut Option<Generation>) -> Generation {
    let new = state.unique();
    *at(state).get_or_insert(new)
}

/// Every order of every step keeps the promise, and the model can do what it is there for.
pub(crate) fn holds<M>(what: &str, model: M)
where
    M: Model<State: Clone + Debug + Hash + PartialEq + Send + Sync, Action: Clone + Debug + PartialEq>,
    M: Send + Sync + 'static,
{
    let start = Instant::now();
    let checked = model.checker().spawn_dfs().join();
    eprintln!("{what}: {} states in {:?}", checked.unique_state_count(), start.elapsed());
    checked.assert_properties();
    assert!(checked.is_done() && checked.unique_state_count() > 1_000);
}

/// Without a rule, or beyond a limit, some order breaks it: the shortest.
pub(crate) fn breaks<M>(what: &str, without: impl Debug, model: M)
where
    M: Model<State: Clone + Debug + Hash + PartialEq + Send + Sync, Action: Clone + Debug + PartialEq>,
    M: Send + Sync + 'static,
{
    let checked = model.checker().finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    let path = checked.discovery(PROMISE).unwrap_or_else(|| panic!("{what}: without `{without:?}` nothing breaks"));
    eprintln!("{what}, without `{without:?}`: {:?}", path.into_actions());
}
