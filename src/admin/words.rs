//! Why the cache does what it does, in words.

/// Why a request bypasses the cache, by its `detail`.
pub(super) fn of_bypass(detail: &str) -> String {
    let words = match detail {
        "disabled" => "the cache is off (`enabled`)",
        "events-behind" => {
            "it is not known whether everything was read that other programs have changed (`max_lag`, `Cache::follow`)"
        }
        "no-tenant" => "it does not say whose it is: no tenant",
        "several-tenants" => "it says more than one tenant",
        "no-user" => "the route's responses are each user's own, and it does not say which user asks",
        "host" => "it does not say for which host, or for two",
        "id" => "its path has an id without a canonical form, by which no write would find the entry",
        "credentials" => "it carries credentials, and the route says nothing of them (`Route::credentials`)",
        "precondition" => {
            "it has a precondition (`If-Match`, `If-Unmodified-Since`, `If-Range`) that only the origin can check"
        }
        "upgrade" => "it asks for another protocol",
        other => return format!("`{other}`"),
    };
    words.to_owned()
}
