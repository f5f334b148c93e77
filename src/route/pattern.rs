//! Path patterns: axum's `{param}` syntax, and which entity each parameter names.

use std::{borrow::Cow, collections::BTreeMap};

use percent_encoding::percent_decode_str;

use crate::error::ConfigError;

/// The parameters of a path, in the order of the path.
#[derive(Debug, Clone, Default)]
pub(crate) struct Pattern {
    /// (parameter, entity).
    params: Vec<(String, String)>,
}

impl Pattern {
    /// `entities` overrides what a parameter is called: else `agent_id` names the entity `agent`.
    pub(crate) fn new(path: &str, entities: &BTreeMap<String, String>) -> Result<Self, String> {
        if !path.starts_with('/') {
            return Err("it must begin with /".to_owned());
        }
        let mut params = vec![];
        let mut rest = path;
        while let Some(open) = rest.find('{') {
            if rest[open..].starts_with("{{") {
                rest = &rest[open + 2..];
                continue;
            }
            let close = rest[open..].find('}').ok_or("a { is not closed")? + open;
            let param = rest[open + 1..close].trim_start_matches('*').to_owned();
            let entity = entities.get(&param).cloned();
            let entity = entity.unwrap_or_else(|| param.strip_suffix("_id").unwrap_or(&param).to_owned());
            params.push((param, entity));
            rest = &rest[close + 1..];
        }
        if let Some(unknown) = entities.keys().find(|name| !params.iter().any(|(p, _)| p == *name)) {
            return Err(format!("it has no parameter `{unknown}`, which `entities` names"));
        }
        Ok(Self { params })
    }

    pub(crate) fn params(&self) -> &[(String, String)] {
        &self.params
    }

    pub(crate) fn position(&self, param: &str) -> Option<usize> {
        self.params.iter().position(|(p, _)| p == param)
    }

    /// The entity of this parameter, or of the last.
    pub(crate) fn entity(&self, param: Option<&str>) -> Option<&str> {
        let at = match param {
            None => self.params.len().checked_sub(1)?,
            Some(param) => self.position(param)?,
        };
        self.params.get(at).map(|(_, entity)| entity.as_str())
    }

    pub(crate) fn names(&self, entity: &str) -> bool {
        self.params.iter().any(|(_, e)| e == entity)
    }
}

/// The value of a parameter as handlers see it: percent-decoded, so that every spelling of an id is the same id.
pub(crate) fn value<'p>(params: &matchit::Params<'_, 'p>, param: &str) -> Cow<'p, [u8]> {
    percent_decode_str(params.get(param).unwrap_or_default()).into()
}

pub(crate) fn pattern_error(what: &str, error: &str) -> ConfigError {
    ConfigError::new(format!("{what}: bad pattern: {error}"))
}
