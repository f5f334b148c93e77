//! What is said only once.

use std::{
    collections::HashSet,
    sync::{Mutex, PoisonError},
};

/// More different warnings than this are not told apart any longer: what they are about comes from clients.
const MOST: usize = 1_000;

/// What has been warned of already.
#[derive(Debug, Default)]
pub(crate) struct Warnings(Mutex<HashSet<(&'static str, String)>>);

impl Warnings {
    /// Whether this has not been said yet.
    pub(crate) fn is_new(&self, kind: &'static str, about: &str) -> bool {
        let mut said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        said.len() < MOST && said.insert((kind, about.to_owned()))
    }
}
