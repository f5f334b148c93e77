//! Inputs in parts.

use http::{HeaderMap, HeaderName, HeaderValue};

/// Bytes that are taken from the front.
pub(super) struct Input<'a>(pub(super) &'a [u8]);

impl<'a> Input<'a> {
    pub(super) fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *first
    }

    /// As many bytes as the first says, or as there are; one of them many times, where it says more than 120.
    pub(super) fn part(&mut self) -> Vec<u8> {
        let length = usize::from(self.byte());
        if length > 120 {
            return vec![self.byte(); length];
        }
        let (part, rest) = self.0.split_at(length.min(self.0.len()));
        self.0 = rest;
        part.to_vec()
    }

    /// The same as text.
    pub(super) fn text(&mut self) -> String {
        String::from_utf8_lossy(&self.part()).into_owned()
    }

    /// Until the end of the line.
    pub(super) fn line(&mut self) -> &'a [u8] {
        let end = self.0.iter().position(|&b| b == b'\n').unwrap_or(self.0.len());
        let (line, rest) = self.0.split_at(end);
        self.0 = rest.get(1..).unwrap_or_default();
        line
    }

    /// `name: value` lines, up to an empty one. What is no header is none.
    pub(super) fn headers(&mut self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        while !self.0.is_empty() {
            let line = self.line();
            if line.is_empty() {
                break;
            }
            let Some(at) = line.iter().position(|&b| b == b':') else { continue };
            let value = HeaderValue::from_bytes(line[at + 1..].trim_ascii());
            if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(&line[..at]), value) {
                headers.append(name, value);
            }
        }
        headers
    }
}
