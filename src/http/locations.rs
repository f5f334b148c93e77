//! What references in a response name (RFC 9110, section 10.2.2; RFC 3986, section 5).

use fluent_uri::{Uri, UriRef};
use http::{HeaderMap, HeaderValue, header};

/// Stands for a host that the request does not name.
const NOWHERE: &str = "nowhere.invalid";

/// What a request was about, against which references in its response are resolved.
#[derive(Clone, Debug)]
pub(crate) struct Target(Option<Uri<String>>);

impl Target {
    pub(crate) fn new(uri: &http::Uri, headers: &HeaderMap) -> Self {
        let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
        let host = uri.authority().map(http::uri::Authority::as_str).or(host).unwrap_or(NOWHERE);
        Self(Uri::parse(format!("http://{host}{}", uri.path())).ok())
    }

    /// The path that this reference names, in its normal form.
    pub(crate) fn path(&self, reference: &HeaderValue) -> Option<String> {
        Some(self.resolve(reference)?.path().as_str().to_owned())
    }

    /// The same, if it is on the host of the request. Behind a proxy that ends TLS the scheme is another one.
    pub(crate) fn own_path(&self, reference: &HeaderValue) -> Option<String> {
        let (own, named) = (self.0.as_ref()?.normalize(), self.resolve(reference)?);
        let is_own = own.authority().map(|a| a.as_str()) == named.authority().map(|a| a.as_str());
        is_own.then(|| named.path().as_str().to_owned())
    }

    fn resolve(&self, reference: &HeaderValue) -> Option<Uri<String>> {
        let reference = UriRef::parse(reference.to_str().ok()?).ok()?;
        Some(reference.resolve_against(self.0.as_ref()?).ok()?.normalize())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_resolved_as_the_rfc_has_it() {
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, HeaderValue::from_static("Example.com:80"));
        let target = Target::new(&"/teams/7/agents".parse().unwrap(), &headers);
        for (reference, path, is_own) in [
            ("/agents/1", Some("/agents/1"), true),
            ("agents/1", Some("/teams/7/agents/1"), true),
            ("./agents/1", Some("/teams/7/agents/1"), true),
            ("../8/agents/1", Some("/teams/8/agents/1"), true),
            ("../../agents/./1?x=1#y", Some("/agents/1"), true),
            ("", Some("/teams/7/agents"), true),
            ("?page=2", Some("/teams/7/agents"), true),
            ("http://EXAMPLE.com/agents/1", Some("/agents/1"), true),
            ("https://example.com:443/agents/1", Some("/agents/1"), true),
            ("//example.com/agents/1", Some("/agents/1"), true),
            ("/%61gents/1", Some("/agents/1"), true),
            ("http://example.com:8080/agents/1", Some("/agents/1"), false),
            ("http://other.example/agents/1", Some("/agents/1"), false),
            ("/a b", None, false),
        ] {
            let value = HeaderValue::from_str(reference).unwrap();
            assert_eq!(target.path(&value).as_deref(), path, "{reference}");
            assert_eq!(target.own_path(&value).is_some(), is_own, "{reference}");
        }
        let target = Target::new(&"/agents".parse().unwrap(), &HeaderMap::new());
        let elsewhere = HeaderValue::from_static("http://example.com/agents/1");
        assert_eq!((target.own_path(&elsewhere), target.path(&elsewhere).as_deref()), (None, Some("/agents/1")));
    }
}
