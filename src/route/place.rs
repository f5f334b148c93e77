//! Where a request stands: under which path it came, what a router around the layer has made of it, and which route a router
//! says it is.

use std::borrow::Cow;

use http::{Extensions, Uri};

/// The path of a request.
#[derive(Clone, Debug)]
pub(crate) struct Place<'r> {
    /// As the client sees it, as far as that is known.
    full: Cow<'r, str>,
    /// As it is here: a router that nests takes its prefix away.
    here: Cow<'r, str>,
    /// The pattern of the route that the router has found, from the root.
    matched: Option<Cow<'r, str>>,
}

/// What a path matches.
pub(crate) struct Found<'k, 'p, T> {
    pub(crate) value: &'k T,
    pub(crate) params: matchit::Params<'k, 'p>,
    /// What the pattern says nothing of: the prefix under which its routes are mounted.
    pub(crate) mount: &'p str,
    /// The router does not say that it is another route.
    pub(crate) is_certain: bool,
}

impl<'r> Place<'r> {
    /// `mount` is what routers around the layer take away from every path, where they leave no word of it themselves.
    pub(crate) fn new(uri: &'r Uri, extensions: &'r Extensions, mount: Option<&str>) -> Self {
        let here = uri.path();
        let (original, matched) = routed(extensions);
        let path = original.unwrap_or(here);
        let is_below = |mount: &&str| {
            let rest = path.strip_prefix(*mount).filter(|_| original.is_some());
            rest.is_some_and(|rest| rest.starts_with('/') || rest.is_empty())
        };
        // The router may be within what takes the prefix away, or around it.
        match mount.filter(|mount| !mount.is_empty() && !is_below(mount)) {
            None => Self { full: path.into(), here: here.into(), matched: matched.map(Cow::Borrowed) },
            Some(mount) => Self {
                full: format!("{mount}{path}").into(),
                here: here.into(),
                matched: matched.map(|matched| format!("{mount}{matched}").into()),
            },
        }
    }

    pub(crate) fn into_owned(self) -> Place<'static> {
        let owned = |text: Cow<'_, str>| Cow::Owned(text.into_owned());
        Place { full: owned(self.full), here: owned(self.here), matched: self.matched.map(owned) }
    }

    pub(crate) fn full(&self) -> &str {
        &self.full
    }

    /// What this path matches: as its client sees it, or else as it is here; what is certain before what is not.
    pub(crate) fn find<'k, 'p, T: Pattern>(&'p self, router: &'k matchit::Router<T>) -> Option<Found<'k, 'p, T>> {
        let found = |found: matchit::Match<'k, 'p, &'k T>, mount: &'p str, all: bool| {
            let pattern = found.value.pattern();
            let is_certain = self.matched.as_deref().is_none_or(|matched| is_same(matched, pattern, all));
            Found { value: found.value, params: found.params, mount, is_certain }
        };
        // What a middleware has made of a path is not told by what it was.
        let rewritten = if self.full.ends_with(&*self.here) { "" } else { &*self.here };
        let full = router.at(&self.full).ok().map(|one| found(one, rewritten, true));
        if *self.full == *self.here || full.as_ref().is_some_and(|full| full.is_certain) {
            return full;
        }
        let here = router.at(&self.here).ok().map(|one| found(one, self.mount(), false));
        match (full, here) {
            (Some(full), Some(here)) => Some(if here.is_certain { here } else { full }),
            (full, here) => full.or(here),
        }
    }

    /// The prefix that is hidden here; where something else was made of the path, all of it.
    fn mount(&self) -> &str {
        self.full.strip_suffix(&*self.here).unwrap_or(&self.full)
    }

    /// A path of the same service, as its clients see it, without the prefix that is hidden here.
    pub(crate) fn below<'s>(&self, path: &'s str) -> Option<&'s str> {
        let mount = Some(self.mount()).filter(|mount| !mount.is_empty() && self.full.len() > mount.len())?;
        path.strip_prefix(mount).filter(|path| path.starts_with('/'))
    }
}

/// What has a path pattern.
pub(crate) trait Pattern {
    fn pattern(&self) -> &str;
}

/// The path that axum's router was asked for, and the route that it has found.
#[cfg(feature = "axum")]
fn routed(extensions: &Extensions) -> (Option<&str>, Option<&str>) {
    let original = extensions.get::<axum::extract::OriginalUri>().map(|uri| uri.0.path());
    (original, extensions.get::<axum::extract::MatchedPath>().map(axum::extract::MatchedPath::as_str))
}

#[cfg(not(feature = "axum"))]
fn routed(_: &Extensions) -> (Option<&str>, Option<&str>) {
    (None, None)
}

/// Whether two patterns are the same but for what their parameters are called; or the first ends with the second, if that is
/// not of `all` of it.
pub(crate) fn is_same(matched: &str, pattern: &str, all: bool) -> bool {
    if if all { matched == pattern } else { matched.ends_with(pattern) } {
        return true;
    }
    let (mut matched, mut pattern) = (matched.rsplit('/').map(shape), pattern.rsplit('/').map(shape));
    loop {
        match (matched.next(), pattern.next()) {
            (Some(a), Some(b)) if a == b => {}
            // Every pattern begins with a slash.
            (Some(_), Some(b)) if !all && b.is_empty() && pattern.next().is_none() => return true,
            (None, None) => return true,
            _ => return false,
        }
    }
}

/// A segment without the name of its parameter.
fn shape(segment: &str) -> Cow<'_, str> {
    // Braces that are doubled are the path's own.
    let mut begin = 0;
    let open = loop {
        let Some(at) = segment[begin..].find('{').map(|at| begin + at) else { return segment.into() };
        if !segment[at + 1..].starts_with('{') {
            break at;
        }
        begin = at + 2;
    };
    let (before, rest) = (&segment[..open], &segment[open + 1..]);
    let (name, after) = rest.split_once('}').unwrap_or((rest, ""));
    let star = if name.starts_with('*') { "*" } else { "" };
    format!("{before}{{{star}}}{after}").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_the_same_whatever_their_parameters_are_called() {
        for (matched, pattern, all, same) in [
            ("/users/{id}", "/users/{user_id}", true, true),
            ("/users/me", "/users/{user_id}", true, false),
            ("/users/{id}", "/users/me", true, false),
            ("/users/{id}/x", "/users/{user_id}", true, false),
            ("/api/users/{id}", "/users/{user_id}", true, false),
            ("/api/users/{id}", "/users/{user_id}", false, true),
            ("/users/{id}", "/api/users/{user_id}", false, false),
            ("/users/{*rest}", "/users/{user_id}", true, false),
            ("/users/{*rest}", "/users/{*path}", true, true),
            ("/users/{id}.json", "/users/{user_id}", true, false),
            ("/users/{id}.json", "/users/{user_id}.json", true, true),
            ("/api/users", "/users", false, true),
            ("/api/superusers", "/users", false, false),
            ("/api/", "/", false, true),
            ("/{{a}}/{b}", "/{{x}}/{b}", true, false),
            ("/{{a}}{b}", "/{{a}}{c}", true, true),
        ] {
            assert_eq!(is_same(matched, pattern, all), same, "{matched} {pattern}");
        }
    }

    #[test]
    fn what_a_router_hides_is_part_of_the_place() {
        let uri: Uri = "/agents/1?x=1".parse().unwrap();
        let none = Extensions::new();
        let place = |mount: Option<&str>| Place::new(&uri, &none, mount).mount().to_owned();
        assert_eq!((place(None), place(Some("/admin"))), (String::new(), "/admin".to_owned()));
        assert_eq!(Place::new(&uri, &none, None).below("/agents/2"), None);
        let below = |path: &'static str| Place::new(&uri, &none, Some("/admin")).below(path);
        assert_eq!(
            (below("/admin/agents/2"), below("/agents/2"), below("/administration")),
            (Some("/agents/2"), None, None)
        );
    }
}
