//! What the handlers of a service do with its rows.

use std::collections::BTreeMap;

use http::Method;

use super::{
    super::{
        requests,
        world::{Said, Saying, Seen},
    },
    Flaw, Id, Means, Page, Row, Rows, Service, Shape, Tenancy, file, name, number, tenant_of,
};

impl Service {
    pub(super) fn tenant(&self, seen: &Seen) -> Option<String> {
        match self.tenancy {
            Tenancy::Single => Some("t".to_owned()),
            Tenancy::Header => {
                let first = seen.header("x-tenant-id").split(',').next().unwrap_or_default().trim().to_owned();
                Some(first).filter(|tenant| !tenant.is_empty())
            }
            Tenancy::Host => tenant_of(&seen.host),
        }
    }

    /// A row and all that it is below.
    pub(super) fn line(&self, rows: &BTreeMap<Id, Row>, id: Id) -> Vec<Id> {
        let above = |id: &Id| Some((self.parent(id.0)?, rows.get(id)?.parent?));
        std::iter::successors(Some(id), above).collect()
    }

    /// Which page a path is, and of which row or below which.
    pub(super) fn find<'p>(&self, seen: &'p Seen) -> Option<(&Page, Vec<&'p str>)> {
        let is_of = |shape: Shape| self.pages.iter().find(move |page| page.shape == shape);
        if let (Some(path), Some(files)) = (seen.path.strip_prefix("/files/"), is_of(Shape::File)) {
            return Some((files, vec![path])).filter(|_| !path.is_empty());
        }
        let parts: Vec<_> = seen.path.strip_prefix('/')?.split('/').collect();
        let page = self.pages.iter().find(|page| {
            let path = self.path(page);
            let pattern: Vec<_> = path[1..].split('/').collect();
            let is_like = |(pattern, part): (&&str, &&str)| {
                if pattern.starts_with('{') { !part.is_empty() } else { pattern == part }
            };
            (page.shape == Shape::Search) == (seen.method == Method::POST)
                && pattern.len() == parts.len()
                && pattern.iter().zip(&parts).all(is_like)
        })?;
        let path = self.path(page);
        let values = path[1..].split('/').zip(parts).filter(|(pattern, _)| pattern.starts_with('{'));
        Some((page, values.map(|(_, part)| part).collect()))
    }

    /// The number that a segment of a path names.
    fn number(&self, kind: usize, part: &str) -> Option<u32> {
        let text = percent_encoding::percent_decode_str(part).decode_utf8().ok()?;
        self.kinds[kind].ids.number(&text)
    }

    /// The rows that a page shows, or that there is no such thing.
    fn shown(&self, page: &Page, values: &[&str], rows: &BTreeMap<Id, Row>) -> Option<Vec<Id>> {
        let kind = page.kind;
        let children = |of: Id| {
            rows.keys()
                .filter(|id| self.parent(id.0) == Some(of.0) && rows[*id].parent == Some(of.1))
                .copied()
                .collect::<Vec<_>>()
        };
        let row = |kind: usize, part: &str| Some((kind, self.number(kind, part)?)).filter(|id| rows.contains_key(id));
        match page.shape {
            Shape::List | Shape::Search => Some(rows.keys().filter(|id| id.0 == kind).copied().collect()),
            Shape::Row => Some(vec![row(kind, values[0])?]),
            Shape::Slug => {
                let name = percent_encoding::percent_decode_str(values[0]).decode_utf8().ok()?;
                let id = (kind, number(name.strip_prefix("name-")?)?);
                Some(vec![id]).filter(|_| rows.contains_key(&id))
            }
            Shape::Line => Some(self.line(rows, row(kind, values[0])?)),
            Shape::Summary => {
                let own = row(kind, values[0])?;
                Some([vec![own], children(own)].concat())
            }
            Shape::Below => {
                let parent = row(self.parent(kind)?, values[0])?;
                Some(children(parent).into_iter().filter(|id| id.0 == kind).collect())
            }
            Shape::Nested => {
                let (own, parent) = (row(kind, values[1])?, self.number(self.parent(kind)?, values[0])?);
                Some(vec![own]).filter(|_| rows[&own].parent == Some(parent))
            }
            Shape::File => Some([file(values[0])].into_iter().filter(|id| rows.contains_key(id)).collect()),
        }
    }

    pub(super) fn show(&self, page: &Page, values: &[&str], rows: &BTreeMap<Id, Row>, seen: &Seen) -> Said {
        let (shown, of) = (self.shown(page, values, rows), &self.kinds[page.kind]);
        let lines = shown.iter().flatten().map(|id| {
            let Row { version, parent } = &rows[id];
            format!("{id:?} {version} below {parent:?}\n")
        });
        // As another server may take it, letter by letter.
        let raw = if page.shape == Shape::File { values[0] } else { "" };
        let text = lines.collect::<String>() + raw + "\n" + &requests::seen(self, page, seen);
        let mut said = Said::new(if shown.is_some() { 200 } else { 404 }, text);
        if !page.control.is_empty() {
            said = said.header("cache-control", page.control);
        }
        let mut vary = vec![];
        if page.sees.vary && !self.lacks(Flaw::Vary) {
            vary.push("Accept-Language");
        }
        if page.is_for_who_asks() {
            vary.push("Authorization, X-Api-Key");
        }
        if !vary.is_empty() {
            said = said.header("vary", vary.join(", "));
        }
        let shown = shown.unwrap_or_default();
        let tags = match page.shape {
            Shape::Slug => &shown[..],
            Shape::Line if of.line == Means::Tags => shown.get(1..).unwrap_or_default(),
            _ => &[],
        };
        let tag = |id: &Id| {
            let bytes = self.id(id.0, id.1).into_bytes();
            format!("{}={}", name(id.0), bytes.iter().map(|c| format!("%{c:02X}")).collect::<String>())
        };
        let is_left_out = self.lacks(Flaw::Line) && page.shape == Shape::Line;
        if !tags.is_empty() && !is_left_out {
            said = said.header("cache-tag", tags.iter().map(tag).collect::<Vec<_>>().join(", "));
        }
        if page.shape == Shape::Line && of.line == Means::Depends && !self.lacks(Flaw::Line) {
            let above = shown.iter().skip(1);
            said.depends = above.map(|id| (name(id.0), self.id(id.0, id.1))).collect();
        }
        (said.framing, said.has_tag, said.encodes) = (page.framing.clone(), page.has_tag, page.sees.encodes);
        said
    }

    /// What calls of gRPC read.
    pub(super) fn called(&self, rows: &Rows, seen: &Seen) -> Option<Said> {
        let (service, method) = seen.path.strip_prefix("/twin.")?.split_once('/')?;
        if service == "Answers" {
            return Some(requests::answer_of(seen.message()));
        }
        let kind = (0..self.kinds.len()).find(|kind| name(*kind) == service)?;
        if !matches!(method, "Get" | "List") {
            return None;
        }
        let Some(rows) = self.tenant(seen).map(|tenant| rows.get(&tenant).cloned().unwrap_or_default()) else {
            return Some(Said::new(400, ""));
        };
        let line = |id: &Id| format!("{}{} {} below {:?}\n", name(id.0), id.1, rows[id].version, rows[id].parent);
        match method {
            "Get" => {
                Some(match self.kinds[kind].ids.number(seen.message()).filter(|n| rows.contains_key(&(kind, *n))) {
                    Some(number) => Said::new(200, line(&(kind, number))),
                    None => Said::new(404, ""),
                })
            }
            _ => {
                let lines = rows.keys().filter(|id| id.0 == kind).map(line).collect::<String>();
                Some(Said::new(200, format!("{lines}{}", seen.message())))
            }
        }
    }

    /// Writes, and says which rows that were, with their parents before and after.
    pub(super) fn apply(&self, rows: &mut BTreeMap<Id, Row>, what: &What) -> Option<Vec<Touched>> {
        match *what {
            What::Put(id, to) => {
                let to = to.filter(|to| self.parent(id.0).is_some_and(|parent| rows.contains_key(&(parent, *to))));
                let row = rows.get_mut(&id)?;
                let before = row.parent;
                row.version += 1;
                row.parent = to.or(before);
                Some(vec![(id, before, row.parent)])
            }
            What::Delete(id) => {
                rows.get(&id)?;
                let gone: Vec<_> =
                    rows.keys().filter(|other| self.line(rows, **other).contains(&id)).copied().collect();
                // From below, so that each still has its line.
                let parents: Vec<_> = gone.iter().map(|id| (*id, rows[id].parent, None)).collect();
                gone.iter().for_each(|id| _ = rows.remove(id));
                Some(parents)
            }
            What::Create(id, below) => {
                let is_below = match self.parent(id.0) {
                    None => true,
                    Some(parent) => below.is_some_and(|below| rows.contains_key(&(parent, below))),
                };
                if rows.contains_key(&id) || !is_below {
                    return None;
                }
                let parent = below.filter(|_| self.parent(id.0).is_some());
                // Nobody takes it for what was there before.
                rows.insert(id, Row { version: 1_000, parent });
                Some(vec![(id, None, parent)])
            }
        }
    }

    /// What a handler says that it has changed, where the mapping counts on that.
    pub(super) fn says(&self, what: &What, touched: &[Touched], is_job: bool) -> Vec<Saying> {
        let own = what.id();
        let mut says = vec![];
        if is_job {
            let how = if own.1.is_multiple_of(2) { Saying::ByHandle } else { Saying::ByFunction };
            says.push(how(name(own.0), self.id(own.0, own.1)));
            says.extend(self.relations(own.0).into_iter().map(|(name, ..)| Saying::Include(name)));
        }
        for (id, before, after) in touched {
            let is_gone = *id != own && self.kinds[own.0].gone == Means::Said && !self.lacks(Flaw::Children);
            if is_gone {
                says.push(Saying::ByHandle(name(id.0), self.id(id.0, id.1)));
            }
            if self.kinds[id.0].up == Means::Said && !self.lacks(Flaw::Parent) || is_gone {
                let parents = before.iter().chain(after);
                let ups = parents.flat_map(|parent| self.ups(id.0).into_iter().map(move |up| (up, *parent)));
                says.extend(ups.map(|(up, number)| Saying::ByHandle(up, self.id(self.parent(id.0).unwrap(), number))));
            }
        }
        says
    }

    /// What an unsafe request asks for.
    pub(super) fn wanted(&self, seen: &Seen) -> Option<(What, bool)> {
        let text =
            if seen.is_grpc() { seen.message().to_owned() } else { String::from_utf8(seen.body.to_vec()).ok()? };
        let field = |name: &str| text.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
        let numbered = |name: &str| field(name).and_then(|value| value.parse::<u32>().ok());
        let parts: Vec<_> = seen.path.split('/').skip(1).collect();
        let of = |part: &str| (0..self.kinds.len()).find(|kind| name(*kind) == part);
        if let Some((service, method)) = seen.path.strip_prefix("/twin.").and_then(|path| path.split_once('/')) {
            let kind = of(service)?;
            let id = (kind, self.kinds[kind].ids.number(&text)?);
            return Some((if method == "Put" { What::Put(id, None) } else { What::Delete(id) }, false));
        }
        if parts == ["jobs"] {
            let kind = (numbered("kind")? as usize).min(self.kinds.len() - 1);
            return Some((What::Put((kind, numbered("id")?), None), true));
        }
        let what = match (&seen.method, &parts[..]) {
            (&Method::POST, [k]) => What::Create((of(k)?, numbered("id")?), numbered("below")),
            (&Method::POST, [p, parent, k]) if of(p).is_some() && self.parent(of(k)?) == of(p) => {
                What::Create((of(k)?, numbered("id")?), Some(self.number(of(p)?, parent)?))
            }
            (&Method::PUT, [k, id]) => What::Put((of(k)?, self.number(of(k)?, id)?), numbered("to")),
            (&Method::PUT, [p, _, k, id]) if of(p).is_some() && self.parent(of(k)?) == of(p) => {
                What::Put((of(k)?, self.number(of(k)?, id)?), numbered("to"))
            }
            (&Method::DELETE, [k, id]) => What::Delete((of(k)?, self.number(of(k)?, id)?)),
            _ => return None,
        };
        Some((what, false))
    }
}

/// A row, and its parents before and after.
pub(super) type Touched = (Id, Option<u32>, Option<u32>);

pub(super) enum What {
    /// Renames it, and moves it.
    Put(Id, Option<u32>),
    Delete(Id),
    Create(Id, Option<u32>),
}

impl What {
    fn id(&self) -> Id {
        match *self {
            Self::Put(id, _) | Self::Delete(id) | Self::Create(id, _) => id,
        }
    }
}
