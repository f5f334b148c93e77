//! Whose request it is: the isolation boundary of every key and tag.

use std::{borrow::Cow, collections::BTreeSet, fmt, sync::Arc};

use http::{HeaderMap, HeaderName, HeaderValue, request};

use crate::{
    error::ConfigError,
    key::{Space, Tenant},
};

type Extract = dyn Fn(&request::Parts) -> Option<String> + Send + Sync;

/// Where the tenant comes from.
#[derive(Clone)]
pub(crate) enum TenantSource {
    Header(HeaderName),
    Extractor(Arc<Extract>),
    Single(Arc<str>),
    /// Nothing is declared, and requests are not cached: code that is not behind HTTP says whose things it asks for.
    ByHand,
}

impl TenantSource {
    /// The header that names it, if one does.
    #[cfg(feature = "warm")]
    pub(crate) fn named_by(&self) -> Option<&HeaderName> {
        if let Self::Header(name) = self { Some(name) } else { None }
    }

    /// The tenant of a request, or why there is none that the cache may rely on.
    pub(crate) fn tenant<'r>(&'r self, parts: &'r request::Parts) -> Result<Cow<'r, [u8]>, &'static str> {
        match self {
            Self::Header(name) => {
                let mut values = parts.headers.get_all(name).iter();
                match (values.next().map(HeaderValue::as_bytes), values.next()) {
                    // Lines that a proxy has joined are several (RFC 9110, section 5.3).
                    (Some(tenant), None) if tenant.contains(&b',') => Err("several-tenants"),
                    (Some(tenant), None) if !tenant.is_empty() && tenant.trim_ascii() == tenant => Ok(tenant.into()),
                    (Some(_), None) | (None, _) => Err("no-tenant"),
                    (Some(_), Some(_)) => Err("several-tenants"),
                }
            }
            Self::Extractor(extract) => match extract(parts) {
                Some(tenant) if !tenant.is_empty() => Ok(tenant.into_bytes().into()),
                _ => Err("no-tenant"),
            },
            Self::Single(tenant) => Ok(tenant.as_bytes().into()),
            Self::ByHand => Err("no-tenant"),
        }
    }

    /// The tenant that code names which is not behind HTTP. One that is forgotten would be shared by all.
    pub(crate) fn by_hand<'t>(&'t self, named: Option<&'t str>) -> Result<&'t str, ConfigError> {
        match (self, named) {
            (Self::Single(own), None) => Ok(own),
            (Self::Single(own), Some(named)) if **own != *named => Err(ConfigError::new(format!(
                "the tenant `{named}`: this cache has the single tenant `{own}`; name that one"
            ))),
            (_, Some(named)) if !named.is_empty() => Ok(named),
            (Self::Single(own), _) => Ok(own),
            (Self::Header(_) | Self::Extractor(_) | Self::ByHand, _) => Err(ConfigError::new(
                "no tenant is named; say whose it is with `tenant`, or declare `single_tenant` if there is only one",
            )),
        }
    }

    /// Every tenant that a request may be about: a write that says two drops what either has.
    pub(crate) fn tenants(&self, parts: &request::Parts, space: &Space) -> Vec<Tenant> {
        match self {
            Self::Header(name) => {
                let lines = header_values(&parts.headers, name);
                let named = lines.flat_map(|line| line.split(|&c| c == b',')).map(<[u8]>::trim_ascii);
                let named: BTreeSet<_> = named.filter(|tenant| !tenant.is_empty()).collect();
                named.into_iter().map(|tenant| space.tenant(tenant)).collect()
            }
            Self::Extractor(_) | Self::Single(_) | Self::ByHand => {
                self.tenant(parts).into_iter().map(|t| space.tenant(t)).collect()
            }
        }
    }

    /// Whether it is this header that names the tenant.
    pub(crate) fn is_named_by(&self, name: &HeaderName) -> bool {
        matches!(self, Self::Header(own) if own == name)
    }

    /// A source that reads one header, however it is capitalised.
    pub(crate) fn header(name: &str) -> Result<Self, ConfigError> {
        let not_one =
            |_| ConfigError::new(format!("tenant header `{name}` is not a header name; use one such as x-tenant-id"));
        HeaderName::try_from(name).map(Self::Header).map_err(not_one)
    }
}

impl fmt::Debug for TenantSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header(name) => write!(f, "Header({name})"),
            Self::Extractor(_) => f.write_str("Extractor"),
            Self::Single(tenant) => write!(f, "Single({tenant})"),
            Self::ByHand => f.write_str("ByHand"),
        }
    }
}

/// Header values joined the way a variant needs them: nothing that is absent looks like something empty.
pub(crate) fn header_values<'h>(headers: &'h HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'h [u8]> {
    headers.get_all(name).iter().map(HeaderValue::as_bytes)
}
