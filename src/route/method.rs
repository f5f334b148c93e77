//! Methods: how they are written, and which of them may change anything.

use http::Method;
use serde::{Deserialize, Deserializer, de};

use crate::error::ConfigError;

/// As a file says it.
pub(super) fn method<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Method, D::Error> {
    let text = String::deserialize(deserializer)?;
    Method::from_bytes(text.as_bytes()).map_err(|_| de::Error::custom(format!("`{text}` is not an HTTP method")))
}

/// Whether a method may change anything, where nothing is said of it. (Of the registered ones these are safe, besides those
/// that the `http` crate knows: RFC 4918, RFC 3253, RFC 5323, and `QUERY`.)
pub(super) fn is_unsafe(method: &Method) -> bool {
    let is_safe = method.is_safe() || matches!(method.as_str(), "PROPFIND" | "REPORT" | "SEARCH" | "QUERY");
    !is_safe && *method != Method::CONNECT
}

/// Methods are compared with their case (RFC 9110, section 9.1).
pub(super) fn check_method(what: &str, method: &Method) -> Result<(), ConfigError> {
    let upper = Method::from_bytes(method.as_str().to_ascii_uppercase().as_bytes()).unwrap_or_default();
    let known = [Method::GET, Method::HEAD, Method::OPTIONS, Method::TRACE, Method::CONNECT];
    let known = known.iter().chain(&[Method::PUT, Method::POST, Method::PATCH, Method::DELETE]);
    if *method != upper && known.clone().any(|known| *known == upper) {
        return Err(ConfigError::new(format!("{what}: no client sends the method `{method}`; write {upper}")));
    }
    if method.is_safe() {
        return Err(ConfigError::new(format!("{what}: {method} is a safe method; use another")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_known_method_in_lower_case_is_a_mistake() {
        let check = |method: &str| check_method("it", &Method::from_bytes(method.as_bytes()).unwrap());
        for (method, says) in
            [("put", "write PUT"), ("Delete", "write DELETE"), ("GET", "safe"), ("head", "write HEAD")]
        {
            assert!(check(method).is_err_and(|error| error.to_string().contains(says)), "{method}");
        }
        for method in ["PUT", "PURGE", "purge", "LOCK"] {
            assert!(check(method).is_ok(), "{method}");
        }
    }
}
