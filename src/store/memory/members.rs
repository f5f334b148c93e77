//! Who is a member of something, for counts: what is gone is found a few at a time, so that nobody who comes waits for all.

use smallvec::SmallVec;

/// So many are looked at for each that comes: one pass through all takes half as many as there are.
const LOOKS: usize = 3;

/// A list, of which one has a place without an allocation: most tags are those of one entry.
pub(super) type List<T> = SmallVec<[T; 1]>;

/// Those that have come since everything was taken. Where one goes for each that comes, two thirds of these are gone at most.
pub(super) struct Members<T> {
    list: List<T>,
    /// Which is looked at next, of a pass.
    next: Option<usize>,
    /// A pass begins when there are so many.
    most: usize,
}

impl<T> Default for Members<T> {
    fn default() -> Self {
        Self { list: List::new(), next: None, most: 0 }
    }
}

impl<T> Members<T> {
    /// Some are looked at for each that comes.
    pub(super) fn add(&mut self, member: T, is_there: impl Fn(&T) -> bool) {
        if self.next.is_none() && self.list.len() > self.most {
            self.next = Some(0);
        }
        for _ in 0..LOOKS {
            let Some(at) = self.next else { break };
            match self.list.get(at) {
                Some(member) if is_there(member) => self.next = Some(at + 1),
                Some(_) => drop(self.list.swap_remove(at)),
                None => (self.next, self.most) = (None, self.list.len() * 3 / 2 + 8),
            }
        }
        self.list.push(member);
    }

    pub(super) fn list(&self) -> &[T] {
        &self.list
    }

    /// Everything.
    pub(super) fn take(&mut self) -> List<T> {
        std::mem::take(self).list
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, collections::HashSet};

    use super::*;

    /// However many there are, and where one goes for each that comes: also where those that are there fill what has been
    /// allocated.
    #[test]
    fn nobody_waits_for_all() {
        for most in [10, 1_000, 1_023, 1_024, 1_025] {
            let (mut members, mut there, looked) = (Members::default(), HashSet::new(), Cell::new(0));
            for i in 0..20_000 {
                there.insert(i);
                there.remove(&(i - most));
                looked.set(0);
                members.add(i, |i| {
                    looked.set(looked.get() + 1);
                    there.contains(i)
                });
                let kept = members.list().len();
                assert!(looked.get() <= LOOKS && kept <= 3 * most as usize + 30, "{kept} of {most}, {looked:?}");
            }
            assert!(there.iter().all(|i| members.list().contains(i)));
            let kept = members.list().len();
            assert!(members.take().len() == kept && members.list().is_empty());
        }
    }
}
