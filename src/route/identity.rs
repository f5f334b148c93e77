//! Who asks, as far as a response may be theirs alone: credentials, and the user that they stand for.

use std::{fmt, sync::Arc};

use http::{HeaderName, header, request};
use serde::Deserialize;

use super::tenant::{TenantSource, header_values};
use crate::{
    error::ConfigError,
    key::{KeyBuf, push_secret},
};

/// What the cache does with requests that carry credentials: `Authorization`, `Cookie`, and the other headers by which
/// services know their users ([`credential_headers`](crate::CacheBuilder::credential_headers)).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Credentials {
    /// They are not cached (the default).
    #[default]
    Bypass,
    /// They are ignored: within a tenant everybody who gets through the outer layers may see the same response. Put
    /// authorization *outside* the cache: a hit never reaches what is inside.
    Shared,
    /// The named request header identifies the user, and is part of the key (as its hash). Without it the request is not cached.
    /// It must be set by what authenticates, outside the cache: a client could name anybody.
    PerUser(String),
    /// The user is who [`user_from`](crate::CacheBuilder::user_from) finds in the request, and is part of the key (as a hash).
    /// Where it finds nobody, the request is not cached.
    User,
    /// What the origin declares: the response to a request with credentials is stored, and then serves everybody in
    /// the tenant, if its `Cache-Control` says `public`, `s-maxage` or `must-revalidate` (RFC 9111, section 3.5). Cookies
    /// are ignored.
    Declared,
}

impl Credentials {
    /// The named request header identifies the user, and is part of the key.
    pub fn per_user(header: impl Into<String>) -> Self {
        Self::PerUser(header.into())
    }
}

/// Headers by which services, and the proxies before them, know who asks.
const CREDENTIALS: [&str; 32] = [
    "api-key",
    "authorization",
    "cf-access-jwt-assertion",
    "client-cert",
    "cookie",
    "proxy-authorization",
    "remote-user",
    "ssl-client-cert",
    "tailscale-user-login",
    "x-access-token",
    "x-amz-security-token",
    "x-amzn-oidc-accesstoken",
    "x-amzn-oidc-data",
    "x-amzn-oidc-identity",
    "x-api-key",
    "x-apikey",
    "x-auth-request-access-token",
    "x-auth-request-email",
    "x-auth-request-user",
    "x-auth-token",
    "x-client-cert",
    "x-forwarded-access-token",
    "x-forwarded-client-cert",
    "x-forwarded-email",
    "x-forwarded-groups",
    "x-forwarded-preferred-username",
    "x-forwarded-user",
    "x-goog-authenticated-user-email",
    "x-goog-iap-jwt-assertion",
    "x-ms-client-principal",
    "x-remote-user",
    "x-ssl-client-cert",
];

/// Finds the user in a request.
pub(crate) type UserFrom = Arc<dyn Fn(&request::Parts) -> Option<String> + Send + Sync>;

/// How this service knows who asks.
#[derive(Clone, Default)]
pub(crate) struct Identity {
    names: Vec<HeaderName>,
    /// What the names look like, one bit for each glance: few headers of a request are looked at twice.
    glances: [u64; 4],
    user: Option<UserFrom>,
    /// Of routes that say nothing else.
    default: Credentials,
}

impl Identity {
    /// `own` are headers that this service knows its users by, besides the usual ones. The one that names the tenant is none.
    pub(crate) fn new(
        own: &[String],
        tenants: &TenantSource,
        user: Option<UserFrom>,
        default: Credentials,
    ) -> Result<Self, ConfigError> {
        let mut names: Vec<_> = CREDENTIALS.iter().map(|name| HeaderName::from_static(name)).collect();
        for name in own {
            let not_one = |_| ConfigError::new(format!("credential header `{name}` is not a header name; mend it"));
            names.push(HeaderName::try_from(name.as_str()).map_err(not_one)?);
        }
        names.retain(|name| !tenants.is_named_by(name));
        let mut glances = [0; 4];
        for (at, bit) in names.iter().map(glance) {
            glances[at] |= bit;
        }
        Ok(Self { names, glances, user, default })
    }

    /// Whether this header says who asks.
    pub(crate) fn is_credential(&self, name: &HeaderName) -> bool {
        let (at, bit) = glance(name);
        self.glances[at] & bit != 0 && self.names.contains(name)
    }

    pub(crate) fn knows_users(&self) -> bool {
        self.user.is_some()
    }
}

/// A bit of 256 for its length and its ends: most of what browsers and proxies send has none of those that credentials have.
fn glance(name: &HeaderName) -> (usize, u64) {
    let name = name.as_str().as_bytes();
    let end = |c: Option<&u8>| usize::from(c.copied().unwrap_or_default());
    let seen = 5 * name.len() + end(name.first()) + 3 * end(name.last());
    (seen / 64 % 4, 1 << (seen % 64))
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("names", &self.names).finish_non_exhaustive()
    }
}

/// [`Credentials`], checked.
#[derive(Debug)]
pub(super) enum Credential {
    Bypass,
    Shared,
    PerUser(HeaderName),
    User,
    Declared,
}

impl Credential {
    pub(super) fn new(what: &str, declared: Option<&Credentials>, identity: &Identity) -> Result<Self, ConfigError> {
        Ok(match declared.unwrap_or(&identity.default) {
            Credentials::Bypass => Self::Bypass,
            Credentials::Shared => Self::Shared,
            Credentials::PerUser(name) => {
                Self::PerUser(HeaderName::try_from(name.as_str()).map_err(|_| {
                    ConfigError::new(format!("{what}: `{name}` is not a header name; mend or remove it"))
                })?)
            }
            Credentials::User if !identity.knows_users() => {
                return Err(ConfigError::new(format!(
                    "{what}: nobody says who the user is; do so with `user_from`, or name a header (`per_user`)"
                )));
            }
            Credentials::User => Self::User,
            Credentials::Declared => Self::Declared,
        })
    }

    /// Appends whose response it is, where it is one user's; or why there is none.
    pub(super) fn push_user(
        &self,
        key: &mut KeyBuf,
        parts: &request::Parts,
        identity: &Identity,
    ) -> Result<(), &'static str> {
        match self {
            Self::PerUser(name) => {
                let mut values = header_values(&parts.headers, name);
                match (values.next(), values.next()) {
                    (Some(user), None) if !user.is_empty() => push_user(key, user),
                    _ => return Err("no-user"),
                }
            }
            Self::User => {
                let user = identity.user.as_ref().and_then(|user| user(parts)).filter(|user| !user.is_empty());
                push_user(key, user.ok_or("no-user")?.as_bytes());
            }
            Self::Bypass | Self::Shared | Self::Declared => {}
        }
        Ok(())
    }

    /// Whether a request with this header must not be answered from the cache.
    pub(super) fn forbids(&self, name: &HeaderName, identity: &Identity) -> bool {
        matches!(self, Self::Bypass) && identity.is_credential(name)
    }

    /// Whether the response to a request with this header must say that it is for everybody.
    pub(super) fn needs_public(&self, name: &HeaderName, identity: &Identity) -> bool {
        matches!(self, Self::Declared) && *name != header::COOKIE && identity.is_credential(name)
    }
}

fn push_user(key: &mut KeyBuf, user: &[u8]) {
    key.extend_from_slice(b";;");
    push_secret(key, user);
}

/// Appends the values of a request header. All but what negotiates content may say who asks, and is hashed.
pub(super) fn push_values<'h>(key: &mut KeyBuf, name: &HeaderName, values: impl Iterator<Item = &'h [u8]>) {
    let is_open = name.as_str().starts_with("accept");
    for value in values {
        key.push(b'=');
        if is_open {
            crate::key::push_escaped(key, value);
        } else {
            push_secret(key, value);
        }
    }
}
