//! Services made of what services are made of: entities below others, pages of one row, of its line, of its children, lists,
//! searches; writes that rename, move, create, and remove with all that is below. The mapping is derived from that, by any of the
//! means that there are for each thing; and with a flaw, if one is wanted, for the twins to find.

mod does;
mod told;

use std::collections::BTreeMap;

use http::Method;
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use tower_cache_aside::{BodyKey, CacheBuilder, Canonical, Credentials, Query};

use super::{
    requests,
    world::{Asked, Framing, Said, Seen, Shared, World, pick},
};

/// A kind and a number.
pub type Id = (usize, u32);

/// By tenant: what each row was written last, and its parent.
pub type Rows = BTreeMap<String, BTreeMap<Id, Row>>;

#[derive(Clone, Debug)]
pub struct Row {
    version: u64,
    parent: Option<u32>,
}

/// What the mapping does not say, although the service does it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Flaw {
    /// A removal is no mutation.
    Mutation,
    /// A creation says that it changes nothing but its own row.
    List,
    /// A header by which an answer differs, in the mapping or in the response.
    Header,
    Vary,
    Host,
    Tenant,
    User,
    Query,
    Mount,
    /// How ids are spelled.
    Spelling,
    /// What a row's page shows of its children, and of what is above it; and what falls with it.
    Parent,
    Line,
    Children,
}

impl Flaw {
    pub const ALL: [Self; 13] = [
        Self::Mutation,
        Self::List,
        Self::Header,
        Self::Vary,
        Self::Host,
        Self::Tenant,
        Self::User,
        Self::Query,
        Self::Mount,
        Self::Spelling,
        Self::Parent,
        Self::Line,
        Self::Children,
    ];
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Tenancy {
    Single,
    Header,
    /// The first part of its name.
    Host,
}

/// What ids are to the handlers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Ids {
    Integer,
    Text,
    Lowercase,
    Uuid,
}

impl Ids {
    /// In its plain spelling.
    pub fn text(self, number: u32) -> String {
        match self {
            Self::Integer => number.to_string(),
            Self::Text => format!("T é;{number}"),
            Self::Lowercase => format!("zoë-{number}"),
            Self::Uuid => uuid::Uuid::from_u128(0xA000 + u128::from(number)).hyphenated().to_string(),
        }
    }

    /// As the handlers read it.
    fn number(self, text: &str) -> Option<u32> {
        match self {
            Self::Integer => text.parse::<i64>().ok()?.try_into().ok(),
            Self::Text => text.strip_prefix("T é;").and_then(number),
            Self::Lowercase => text.to_lowercase().strip_prefix("zoë-").and_then(number),
            Self::Uuid => uuid::Uuid::try_parse(text).ok()?.as_u128().checked_sub(0xA000)?.try_into().ok(),
        }
    }

    fn canonical(self) -> Option<Canonical> {
        match self {
            Self::Integer => Some(Canonical::Integer),
            Self::Text => None,
            Self::Lowercase => Some(Canonical::Lowercase),
            Self::Uuid => Some(Canonical::Uuid),
        }
    }
}

/// A number in its one spelling.
fn number(text: &str) -> Option<u32> {
    text.parse::<u32>().ok().filter(|number| number.to_string() == text)
}

/// How the mapping knows what else a write makes stale.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Means {
    /// A relation, and a resolver that asks the rows.
    Resolver,
    /// The type falls whole.
    All,
    /// The handler says it.
    Said,
    /// The response declares it: by tags, or by what it depends on.
    Tags,
    Depends,
}

#[derive(Clone, Debug)]
pub struct Kind {
    pub parent: Option<usize>,
    pub ids: Ids,
    /// How pages of its parent, lines of what is below, and what is removed with it are found.
    up: Means,
    line: Means,
    gone: Means,
    policy: Policy,
}

/// What the types of a kind say besides.
#[derive(Clone, Debug)]
struct Policy {
    /// That there is none is kept.
    keeps_none: bool,
    /// What is old is served while it is replaced, and instead of an error.
    is_stale: bool,
    refreshes_early: bool,
    by_response: bool,
    loads_whole: bool,
    is_fenced: bool,
}

/// What a page shows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Shape {
    Row,
    /// The row below its parent.
    Nested,
    /// The row by its name.
    Slug,
    /// The row and all that it is below.
    Line,
    /// The row and what is below it.
    Summary,
    List,
    /// All rows below one parent.
    Below,
    /// A list that a body asks for.
    Search,
    /// What is there under any path, as it is spelled.
    File,
}

/// What of a request an answer is made of, besides the path.
#[derive(Clone, Debug)]
pub struct Sees {
    pub query: Query,
    /// Header by which it differs, as the mapping says, and as the response says.
    pub header: bool,
    pub vary: bool,
    pub credentials: Credentials,
    encodes: bool,
    pub body: BodyKey,
}

#[derive(Clone, Debug)]
pub struct Page {
    pub shape: Shape,
    pub kind: usize,
    pub sees: Sees,
    pub control: &'static str,
    has_tag: bool,
    framing: Framing,
}

#[derive(Clone, Debug)]
pub struct Service {
    pub kinds: Vec<Kind>,
    pub pages: Vec<Page>,
    pub tenancy: Tenancy,
    pub shows_host: bool,
    pub mounts: &'static [&'static str],
    pub answers: Answers,
    pub flaw: Option<Flaw>,
}

/// What the cache is told of all answers, and requests.
#[derive(Clone, Debug)]
pub struct Answers {
    pub body_limit: usize,
    heeds_requests: bool,
    drops_unmapped: bool,
    /// One call in the whole fleet, which needs a store that it shares.
    pub in_fleet: bool,
}

/// Files are rows of a kind of their own, which nothing else is about.
const FILES: usize = 99;

pub fn name(kind: usize) -> String {
    char::from(b'a' + kind as u8).to_string()
}

// ---- what there is ---------------------------------------------------------------------------------------------------

impl Service {
    pub fn random(seed: u64, flaw: Option<Flaw>) -> Self {
        let rng = &mut SmallRng::seed_from_u64(seed);
        let count = rng.random_range(1..=3);
        let kinds: Vec<_> = (0..count).map(|kind| Kind::random(rng, kind)).collect();
        let mut pages = vec![];
        for (kind, of) in kinds.iter().enumerate() {
            pages.push(Page::random(rng, Shape::Row, kind));
            for (shape, share) in [
                (Shape::Line, 0.6),
                (Shape::Summary, 0.6),
                (Shape::List, 0.7),
                (Shape::Search, 0.4),
                (Shape::Slug, 0.4),
            ] {
                // Of what is not there a name says nothing.
                let keeps_none = of.policy.keeps_none || of.policy.by_response;
                if rng.random_bool(share) && !(shape == Shape::Slug && keeps_none) {
                    pages.push(Page::random(rng, shape, kind));
                }
            }
            for shape in [Shape::Below, Shape::Nested] {
                if of.parent.is_some() && rng.random_bool(0.5) {
                    pages.push(Page::random(rng, shape, kind));
                }
            }
        }
        if rng.random_bool(0.5) {
            pages.push(Page::random(rng, Shape::File, 0));
        }
        Self {
            kinds,
            pages,
            tenancy: *pick(rng, &[Tenancy::Single, Tenancy::Header, Tenancy::Header, Tenancy::Host]),
            shows_host: rng.random_bool(0.5),
            mounts: *pick(rng, &[&[""] as &[_], &[""], &["/admin", "/public"]]),
            answers: Answers {
                body_limit: *pick(rng, &[1 << 20, 1 << 20, 60]),
                heeds_requests: rng.random_bool(0.3),
                drops_unmapped: rng.random_bool(0.2),
                in_fleet: false,
            },
            flaw,
        }
    }

    pub fn has(&self, shape: Shape, kind: usize) -> bool {
        self.pages.iter().any(|page| page.shape == shape && page.kind == kind)
    }

    fn parent(&self, kind: usize) -> Option<usize> {
        self.kinds.get(kind)?.parent
    }

    fn below(&self, kind: usize) -> Vec<usize> {
        (0..self.kinds.len()).filter(|below| self.parent(*below) == Some(kind)).collect()
    }

    /// All kinds above, the nearest first.
    fn above(&self, kind: usize) -> Vec<usize> {
        std::iter::successors(self.parent(kind), |above| self.parent(*above)).collect()
    }

    fn descendants(&self, kind: usize) -> Vec<usize> {
        (0..self.kinds.len()).filter(|below| self.above(*below).contains(&kind)).collect()
    }

    fn data_type(&self, shape: Shape, kind: usize) -> String {
        let k = name(kind);
        match shape {
            Shape::Row | Shape::Nested | Shape::Slug => k,
            Shape::Line => format!("{k}_line"),
            Shape::Summary => format!("{k}_summary"),
            Shape::List => format!("{k}_list"),
            Shape::Search => format!("{k}_search"),
            Shape::File => "file".to_owned(),
            Shape::Below => format!("{k}_of_{}", name(self.parent(kind).unwrap())),
        }
    }

    /// The types of pages of the parent that show rows of this kind.
    fn ups(&self, kind: usize) -> Vec<String> {
        let Some(parent) = self.parent(kind) else { return vec![] };
        let below = self.has(Shape::Below, kind).then(|| self.data_type(Shape::Below, kind));
        let summary = self.has(Shape::Summary, parent).then(|| self.data_type(Shape::Summary, parent));
        below.into_iter().chain(summary).collect()
    }

    fn id(&self, kind: usize, number: u32) -> String {
        self.kinds[kind].ids.text(number)
    }

    /// Whether the service does what its mapping does not say.
    pub fn has_its_flaw(&self) -> bool {
        let has = |is: &dyn Fn(&Page) -> bool| {
            self.pages.iter().any(|page| is(page) && page.control != "no-store" && page.control != "no-cache")
        };
        let is_row = |page: &Page| page.shape == Shape::Row;
        match self.flaw {
            None => true,
            Some(Flaw::Header) => has(&|page| page.sees.header && is_row(page)),
            Some(Flaw::Vary) => has(&|page| page.sees.vary && is_row(page)),
            Some(Flaw::Host) => self.shows_host,
            Some(Flaw::Tenant) => self.tenancy != Tenancy::Single,
            Some(Flaw::User) => has(&|page| page.sees.credentials == Credentials::per_user("x-user")),
            Some(Flaw::Query) => has(&|page| page.sees.query != Query::Ignore && is_row(page)),
            Some(Flaw::Mount) => self.mounts.len() > 1,
            Some(Flaw::List) => has(&|page| matches!(page.shape, Shape::List | Shape::Search)),
            Some(Flaw::Parent) => has(&|page| page.shape == Shape::Below),
            Some(Flaw::Line) => has(&|page| page.shape == Shape::Line && self.parent(page.kind).is_some()),
            Some(Flaw::Spelling) => self.kinds.iter().any(|kind| kind.ids != Ids::Text),
            Some(Flaw::Mutation | Flaw::Children) => self.kinds.iter().any(|kind| kind.parent.is_some()),
        }
    }

    fn lacks(&self, flaw: Flaw) -> bool {
        self.flaw == Some(flaw)
    }
}

impl Kind {
    fn random(rng: &mut SmallRng, kind: usize) -> Self {
        Self {
            parent: (kind > 0 && rng.random_bool(0.85)).then(|| rng.random_range(0..kind)),
            ids: *pick(rng, &[Ids::Integer, Ids::Integer, Ids::Text, Ids::Lowercase, Ids::Uuid]),
            up: *pick(rng, &[Means::Resolver, Means::All, Means::Said]),
            line: *pick(rng, &[Means::Resolver, Means::All, Means::Tags, Means::Depends]),
            gone: *pick(rng, &[Means::Resolver, Means::All, Means::Said]),
            policy: Policy {
                keeps_none: rng.random_bool(0.3),
                is_stale: rng.random_bool(0.3),
                refreshes_early: rng.random_bool(0.2),
                by_response: rng.random_bool(0.25),
                loads_whole: rng.random_bool(0.3),
                is_fenced: rng.random_bool(0.2),
            },
        }
    }
}

impl Page {
    fn random(rng: &mut SmallRng, shape: Shape, kind: usize) -> Self {
        let credentials =
            [Credentials::Bypass, Credentials::Shared, Credentials::Declared, Credentials::per_user("x-user")];
        let sees = Sees {
            query: pick(rng, &[Query::All, Query::All, Query::Exact, Query::only(["page"]), Query::Ignore]).clone(),
            header: rng.random_bool(0.3),
            vary: rng.random_bool(0.3),
            credentials: pick(rng, &credentials).clone(),
            encodes: rng.random_bool(0.3),
            body: *pick(rng, &[BodyKey::Json, BodyKey::Bytes]),
        };
        let framing = Framing {
            pieces: if rng.random_bool(0.3) { rng.random_range(1..4) } else { 0 },
            length: rng.random_bool(0.2).then_some(0),
            slow: rng.random_bool(0.3),
            messages: 1,
            ..Framing::default()
        };
        let trailers = framing.length.is_none() && rng.random_bool(0.2);
        let controls = ["", "", "", "", "max-age=600", "public, max-age=600", "max-age=0", "no-cache", "no-store"];
        let control = *pick(rng, &controls);
        let framing = Framing { trailers, ..framing };
        Self { shape, kind, sees, control, has_tag: rng.random_bool(0.4), framing }
    }
}

impl Page {
    /// Its answer is made of credentials, and says so.
    pub fn is_for_who_asks(&self) -> bool {
        self.sees.credentials == Credentials::Declared && !self.control.starts_with("public")
    }
}

impl Service {
    fn path(&self, page: &Page) -> String {
        let k = name(page.kind);
        let above = || {
            let p = name(self.parent(page.kind).unwrap());
            format!("/{p}/{{{p}_id}}/{k}")
        };
        match page.shape {
            Shape::Row => format!("/{k}/{{{k}_id}}"),
            Shape::Line => format!("/{k}/{{{k}_id}}/line"),
            Shape::Summary => format!("/{k}/{{{k}_id}}/summary"),
            Shape::Slug => format!("/{k}-by-name/{{name}}"),
            Shape::List => format!("/{k}"),
            Shape::Search => format!("/{k}-search"),
            Shape::File => "/files/{*path}".to_owned(),
            Shape::Below => above(),
            Shape::Nested => format!("{}/{{{k}_id}}", above()),
        }
    }

    /// A method cannot say that other types fall whole.
    pub fn removes_by_call(&self, kind: usize) -> bool {
        self.kinds[kind].gone != Means::All || self.descendants(kind).is_empty()
    }
}

/// What is written under a path, however that is spelled.
fn file(path: &str) -> Id {
    let decoded: Vec<u8> = percent_encoding::percent_decode_str(path).collect();
    (FILES, decoded.iter().fold(7, |hash: u32, c| hash.wrapping_mul(31).wrapping_add(u32::from(*c))))
}

fn tenant_of(host: &str) -> Option<String> {
    host.to_lowercase().split('.').next().filter(|tenant| !tenant.is_empty()).map(str::to_owned)
}

impl World for Service {
    type Rows = Rows;

    /// Two of each kind below each parent; numbers of different kinds are the same.
    fn rows(&self) -> Rows {
        let mut rows: BTreeMap<Id, Row> = BTreeMap::new();
        for (kind, of) in self.kinds.iter().enumerate() {
            let above: Vec<_> = match of.parent {
                None => vec![None],
                Some(parent) => rows.keys().filter(|id| id.0 == parent).map(|id| Some(id.1)).collect(),
            };
            for (number, parent) in (1..).zip(above.into_iter().flat_map(|parent| [parent, parent])) {
                rows.insert((kind, number), Row { version: 0, parent });
            }
        }
        ["t", "acme", "umbrella"].into_iter().map(|tenant| (tenant.to_owned(), rows.clone())).collect()
    }

    fn mapping(&self, rows: &Shared<Rows>) -> CacheBuilder {
        self.told(rows)
    }

    fn mounts(&self) -> &'static [&'static str] {
        self.mounts
    }

    fn says_mounts(&self) -> bool {
        !self.lacks(Flaw::Mount)
    }

    fn read(&self, rows: &Rows, seen: &Seen) -> Option<Said> {
        if seen.is_grpc() {
            return self.called(rows, seen);
        }
        let is_safe = matches!(seen.method, Method::GET | Method::HEAD);
        if let Some(number) = seen.path.strip_prefix("/answers/").filter(|_| is_safe) {
            return Some(requests::answer_of(number));
        }
        if seen.method == Method::OPTIONS {
            return Some(Said::new(204, "").header("allow", "GET"));
        }
        let found = self.find(seen).filter(|(page, _)| is_safe || page.shape == Shape::Search);
        let Some((page, values)) = found else { return is_safe.then(|| Said::new(404, "no such page")) };
        let Some(tenant) = self.tenant(seen) else { return Some(Said::new(400, "whose?")) };
        let none = BTreeMap::new();
        Some(self.show(page, &values, rows.get(&tenant).unwrap_or(&none), seen))
    }

    fn write(&self, rows: &mut Rows, seen: &Seen) -> Said {
        let Some(rows) = self.tenant(seen).and_then(|tenant| rows.get_mut(&tenant)) else {
            return Said::new(400, "whose?");
        };
        if let Some(path) = seen.path.strip_prefix("/files/").filter(|_| seen.method == Method::PUT) {
            rows.entry(file(path)).or_insert(Row { version: 0, parent: None }).version += 1;
            return Said::new(200, "done");
        }
        let Some((what, is_job)) = self.wanted(seen) else { return Said::new(405, "not so") };
        let Some(touched) = self.apply(rows, &what) else { return Said::new(404, "no such row") };
        let mut said = Said::new(200, "done");
        said.changes = self.says(&what, &touched, is_job);
        if let does::What::Create((kind, number), _) = what {
            said.status = 201;
            let rng = &mut SmallRng::seed_from_u64(seen.body.len() as u64 + u64::from(number));
            let id = requests::spelled(self.kinds[kind].ids, number, rng);
            let place = format!("{}/{}/{id}", seen.mount, name(kind));
            match seen.header("x-location") {
                "none" => {}
                "absolute" => said = said.header("location", format!("http://{}{place}", seen.host)),
                _ => said = said.header("location", place),
            }
        }
        said
    }

    fn any_read(&self, rng: &mut SmallRng) -> Asked {
        requests::any_read(self, rng)
    }

    fn any_write(&self, rng: &mut SmallRng) -> Asked {
        requests::any_write(self, rng)
    }
}
