//! What is told of each request: in its response, and to those who look after the service.

mod outcome;

pub(crate) use outcome::{Found, Teller, Tellers};
pub use outcome::{FoundIn, Handling, Outcome};
