//! Ranges of bytes (RFC 9110, section 14).

use http::HeaderValue;

/// A single range of bytes (RFC 9110, section 14.1.2): `None` if it is to be ignored, `Some(None)` if there are no such
/// bytes.
pub(crate) fn parse_range(range: &HeaderValue, length: usize) -> Option<Option<(usize, usize)>> {
    let (first, last) = range.to_str().ok()?.strip_prefix("bytes=")?.split_once('-')?;
    let is_number = |text: &str| text.bytes().all(|digit| digit.is_ascii_digit());
    let number = |text: &str| text.parse::<usize>().ok().filter(|_| is_number(text));
    match (first.trim(), last.trim()) {
        ("", suffix) => {
            let suffix = number(suffix)?;
            Some((suffix > 0 && length > 0).then(|| (length.saturating_sub(suffix), length - 1)))
        }
        (first, last) => {
            let first = number(first)?;
            let last = if last.is_empty() { usize::MAX } else { number(last)? };
            if last < first {
                return None;
            }
            Some((first < length).then(|| (first, last.min(length - 1))))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_single_or_ignored() {
        for (range, expected) in [
            ("bytes=0-1", Some(Some((0, 1)))),
            ("bytes=8-", Some(Some((8, 9)))),
            ("bytes=-3", Some(Some((7, 9)))),
            ("bytes=-30", Some(Some((0, 9)))),
            ("bytes=5-50", Some(Some((5, 9)))),
            ("bytes=10-", Some(None)),
            ("bytes=-0", Some(None)),
            ("bytes=5-5", Some(Some((5, 5)))),
            ("bytes=9-", Some(Some((9, 9)))),
            ("bytes=3-2", None),
            ("bytes=0-1,3-4", None),
            ("bytes=a-b", None),
            ("bytes=+0-1", None),
            ("bytes=-+3", None),
            ("lines=0-1", None),
            ("bytes", None),
        ] {
            assert_eq!(parse_range(&HeaderValue::from_static(range), 10), expected, "{range}");
        }
        for range in ["bytes=0-", "bytes=-1", "bytes=0-0"] {
            assert_eq!(parse_range(&HeaderValue::from_static(range), 0), Some(None), "{range} of nothing");
        }
    }
}
