//! What references in a response name (RFC 9110, section 10.2.2; RFC 3986, section 5).

use fluent_uri::{Uri, UriRef};
use http::{HeaderMap, HeaderValue, header};

/// Stands for a host that the request does not name.
const NOWHERE: &str = "nowhere.invalid";

/// What a request was about, against which references in its response are resolved.
#[derive(Clone, Debug)]
pub(crate) struct Target(Option<Uri<String>>);

impl Target {
    /// `path` is that of the request as its client sees it.
    pub(crate) fn new(uri: &http::Uri, path: &str, headers: &HeaderMap) -> Self {
        let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
        let host = uri.authority().map(http::uri::Authority::as_str).or(host).unwrap_or(NOWHERE);
        Self(Uri::parse(format!("http://{host}{path}")).ok())
    }

    /// The path that this reference names, in its normal form.
    pub(crate) fn path(&self, reference: &HeaderValue) -> Option<String> {
        Some(self.resolve(reference)?.path().as_str().to_owned())
    }

    /// The same, if it is on the host of the request. Behind a proxy that ends TLS the scheme is another one.
    pub(crate) fn own_path(&self, reference: &HeaderValue) -> Option<String> {
        let (own, named) = (self.0.as_ref()?.normalize(), self.resolve(reference)?);
        let host = |uri: &Uri<String>| uri.authority().map(|authority| without_port(authority.as_str()).to_owned());
        let is_own = host(&own) == host(&named);
        is_own.then(|| named.path().as_str().to_owned())
    }

    fn resolve(&self, reference: &HeaderValue) -> Option<Uri<String>> {
        let reference = UriRef::parse(reference.to_str().ok()?).ok()?;
        let named = reference.resolve_against(self.0.as_ref()?).ok()?.normalize();
        // What has no host is nothing that HTTP serves: `mailto:a`, `https:/a`.
        named.authority().is_some().then_some(named)
    }
}

/// Without a port that is the usual one, of either scheme.
fn without_port(authority: &str) -> &str {
    authority.strip_suffix(":443").or_else(|| authority.strip_suffix(":80")).unwrap_or(authority)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_resolved_as_the_rfc_has_it() {
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, HeaderValue::from_static("Example.com:80"));
        let target = Target::new(&"/agents".parse().unwrap(), "/teams/7/agents", &headers);
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
            ("mailto:agents", None, false),
            ("https:/agents/1", None, false),
        ] {
            let value = HeaderValue::from_str(reference).unwrap();
            assert_eq!(target.path(&value).as_deref(), path, "{reference}");
            assert_eq!(target.own_path(&value).is_some(), is_own, "{reference}");
        }
        let target = Target::new(&"/agents".parse().unwrap(), "/agents", &HeaderMap::new());
        headers.insert(header::HOST, HeaderValue::from_static("example.com:443"));
        let secure = Target::new(&"/agents".parse().unwrap(), "/agents", &headers);
        assert!(secure.own_path(&HeaderValue::from_static("https://example.com/agents/1")).is_some());
        let elsewhere = HeaderValue::from_static("http://example.com/agents/1");
        assert_eq!((target.own_path(&elsewhere), target.path(&elsewhere).as_deref()), (None, Some("/agents/1")));
    }
}
