//! What is said only once.

use std::{
    collections::{HashMap, HashSet},
    sync::{Mutex, PoisonError},
};

/// More different warnings of one kind than this are not told apart any longer: what they are about comes from clients.
const MOST: usize = 1_000;

/// What has been warned of already, by kind.
#[derive(Debug, Default)]
pub(crate) struct Warnings(Mutex<HashMap<&'static str, HashSet<String>>>);

impl Warnings {
    /// Whether this has not been said yet.
    pub(crate) fn is_new(&self, kind: &'static str, about: &str) -> bool {
        let mut kinds = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let said = kinds.entry(kind).or_default();
        said.len() < MOST && said.insert(about.to_owned())
    }
}
