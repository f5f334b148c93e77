//! The rooms of the house, and that no arrow between them runs up or in a circle: dependencies go one way, down.
//!
//! It reads the `use` lines and the paths of `src`. A name is followed through re-exports to the file that defines it; a
//! `pub use` is a signpost, and no arrow.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// Each room, from the top down, and those that it may know. The root only shows what is in them.
const ROOMS: &[(&str, &[&str])] = &[
    // No part of the library: what fuzzers run of all the others.
    (
        "fuzzing",
        &[
            "admin", "cache", "layer", "config", "events", "http", "engine", "store", "route", "catalog", "key",
            "clock", "mux",
        ],
    ),
    (
        "lib",
        &[
            "admin", "cache", "config", "events", "layer", "http", "observe", "route", "engine", "store", "catalog",
            "key", "error", "testing", "clock", "warm",
        ],
    ),
    ("warm", &["cache", "layer", "observe", "store", "clock", "error"]),
    ("admin", &["cache", "events", "layer", "http", "engine", "observe", "route", "store", "catalog", "key", "error"]),
    ("testing", &["cache", "http", "observe", "route", "store", "catalog", "key", "clock"]),
    (
        "cache",
        &["layer", "config", "events", "engine", "observe", "route", "store", "catalog", "key", "clock", "error"],
    ),
    ("layer", &["events", "http", "observe", "route", "engine", "store", "catalog", "key", "clock", "error"]),
    ("config", &["route", "store", "catalog", "events", "error", "units"]),
    ("events", &["store", "catalog", "clock", "error"]),
    ("engine", &["store", "catalog", "key", "clock", "error", "sync"]),
    ("store", &["catalog", "key", "clock", "error", "units", "sync", "mux"]),
    ("route", &["observe", "catalog", "key", "error"]),
    ("observe", &["http", "sync"]),
    ("http", &["catalog", "clock"]),
    ("catalog", &["key", "error", "units"]),
    ("key", &["error"]),
    ("clock", &[]),
    ("units", &[]),
    ("error", &[]),
    ("sync", &[]),
    ("mux", &[]),
];

type Module = Vec<String>;

/// One source file, as it is seen from outside.
#[derive(Default)]
struct File {
    /// Names it shows that others define, and where.
    shows: BTreeMap<String, Module>,
    /// What it uses, and in which line.
    uses: Vec<(Module, usize)>,
}

struct House(BTreeMap<Module, File>);

fn module_of(path: &Path) -> Module {
    let mut parts: Vec<_> = path.iter().map(|part| part.to_str().unwrap().trim_end_matches(".rs").to_owned()).collect();
    if parts.last().is_some_and(|last| last == "mod" || last == "lib") {
        parts.pop();
    }
    parts
}

fn files(dir: &Path, out: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()) {
        match entry.is_dir() {
            true => files(&entry, out),
            false => out.push(entry),
        }
    }
}

/// Without comments and tests, each line at its place.
fn code(text: &str) -> String {
    // However visible the tests are.
    let text = text.split("mod tests {\n").next().unwrap();
    let line = |line: &str| line.split("//").next().unwrap().to_owned();
    text.lines().map(line).collect::<Vec<_>>().join("\n")
}

/// `a::{b, c::{d, self}}` as `a::b`, `a::c::d`, `a::c`.
fn expand(tree: &str) -> Vec<Vec<String>> {
    let tree = tree.trim();
    let Some(open) = tree.find('{') else {
        let path = tree.split(" as ").next().unwrap();
        return vec![path.split("::").map(|part| part.trim().to_owned()).filter(|part| !part.is_empty()).collect()];
    };
    let prefix: Vec<_> = tree[..open].split("::").map(str::trim).filter(|p| !p.is_empty()).map(str::to_owned).collect();
    let (mut depth, mut start, mut members) = (0, open + 1, vec![]);
    for (at, c) in tree.char_indices().skip(open) {
        match c {
            '{' => depth += 1,
            '}' | ',' if depth == 1 => {
                members.push(&tree[start..at]);
                start = at + 1;
            }
            '}' => depth -= 1,
            _ => {}
        }
    }
    let members = members.into_iter().filter(|member| !member.trim().is_empty()).flat_map(expand);
    members
        .map(|member| prefix.iter().cloned().chain(member.into_iter().filter(|part| part != "self")).collect())
        .collect()
}

/// A path from the root of the crate; `None` if it leads elsewhere.
fn absolute(own: &[String], path: &[String]) -> Option<Module> {
    match path.first()?.as_str() {
        "crate" => Some(path[1..].to_vec()),
        "self" => Some([own, &path[1..]].concat()),
        "super" => {
            let up = path.iter().take_while(|part| *part == "super").count();
            Some([&own[..own.len().checked_sub(up)?], &path[up..]].concat())
        }
        _ => None,
    }
}

impl House {
    fn read(root: &Path) -> Self {
        let mut paths = vec![];
        files(root, &mut paths);
        let modules: BTreeSet<Module> = paths.iter().map(|p| module_of(p.strip_prefix(root).unwrap())).collect();
        let mut house = BTreeMap::new();
        for path in paths {
            let own = module_of(path.strip_prefix(root).unwrap());
            house.insert(own.clone(), read_file(&own, &code(&fs::read_to_string(&path).unwrap()), &modules));
        }
        Self(house)
    }

    /// The file in which the last name of a path is defined.
    fn home(&self, path: &[String]) -> Module {
        let mut at: Module = vec![];
        for (i, name) in path.iter().enumerate() {
            let child = [&at[..], std::slice::from_ref(name)].concat();
            if self.0.contains_key(&child) {
                at = child;
                continue;
            }
            if let Some(shown) = self.0[&at].shows.get(name) {
                return self.home(&[&shown[..], &path[i + 1..]].concat());
            }
            break;
        }
        at
    }

    /// From file to file, and the first line that says so.
    fn arrows(&self) -> BTreeMap<(Module, Module), usize> {
        let mut arrows = BTreeMap::new();
        for (own, file) in &self.0 {
            for (path, line) in &file.uses {
                let home = self.home(path);
                if home != *own {
                    arrows.entry((own.clone(), home)).or_insert(*line);
                }
            }
        }
        arrows
    }
}

fn read_file(own: &[String], text: &str, modules: &BTreeSet<Module>) -> File {
    let mut file = File::default();
    let line_of = |at: usize| text[..at].matches('\n').count() + 1;
    let mut rest = text.to_owned();
    // Statements first; what is left of the text has only paths in it.
    while let Some((at, is_pub)) = find_use(&rest) {
        let end = rest[at..].find(';').unwrap() + at;
        let tree = rest[at..end].split_once("use ").unwrap().1.to_owned();
        for path in expand(&tree) {
            // A child module may be named without `self`.
            let child = [own, &path[..1]].concat();
            let path = if modules.contains(&child) { [&["self".to_owned()], &path[..]].concat() } else { path };
            let Some(path) = absolute(own, &path) else { continue };
            let name =
                tree.rsplit_once(" as ").map_or(path.last().unwrap().clone(), |(_, name)| name.trim().to_owned());
            // By it the name is found here too, by whoever looks.
            if is_pub {
                file.shows.insert(name, path);
            } else {
                file.uses.push((path, line_of(at)));
            }
        }
        let blank: String = rest[at..=end].chars().map(|c| if c == '\n' { '\n' } else { ' ' }).collect();
        rest.replace_range(at..=end, &blank);
    }
    for root in ["crate::", "super::"] {
        for (at, _) in rest.match_indices(root) {
            let is_word = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
            if rest[..at].ends_with(is_word) || rest[..at].ends_with("in ") {
                continue;
            }
            let path: String = rest[at..].chars().take_while(|c| is_word(*c)).collect();
            let path: Vec<_> = path.split("::").filter(|p| !p.is_empty()).map(str::to_owned).collect();
            if let Some(path) = absolute(own, &path) {
                file.uses.push((path, line_of(at)));
            }
        }
    }
    file
}

/// The next `use`, and whether it shows what it names to others.
fn find_use(text: &str) -> Option<(usize, bool)> {
    let mut at = 0;
    for line in text.split_inclusive('\n') {
        let trimmed = line.trim_start();
        let is_pub = trimmed.starts_with("pub use ") || (trimmed.starts_with("pub(") && trimmed.contains(") use "));
        if is_pub || trimmed.starts_with("use ") {
            return Some((at + line.len() - trimmed.len(), is_pub));
        }
        at += line.len();
    }
    None
}

fn show(module: &[String]) -> String {
    if module.is_empty() { "lib".to_owned() } else { module.join("/") }
}

fn room(module: &[String]) -> &str {
    module.first().map_or("lib", String::as_str)
}

fn may_know(room: &str) -> &[&str] {
    ROOMS.iter().find(|(name, _)| *name == room).map(|(_, below)| *below).unwrap_or_else(|| {
        panic!("src/{room} is no room of the house: give it a place in tests/architecture.rs and in the design")
    })
}

/// What is wrong with these arrows: those between rooms that do not run down, and circles of files.
fn wrong(arrows: &BTreeMap<(Module, Module), usize>) -> Vec<String> {
    let mut wrong = vec![];
    for ((from, to), line) in arrows {
        let (from_room, to_room) = (room(from), room(to));
        if from_room != to_room && !may_know(from_room).contains(&to_room) {
            wrong.push(format!("{}:{line} uses {}, which is none of its business", show(from), show(to)));
        }
    }
    let mut next: BTreeMap<&Module, Vec<&Module>> = BTreeMap::new();
    for (from, to) in arrows.keys() {
        next.entry(from).or_default().push(to);
    }
    let mut done = BTreeSet::new();
    for start in next.keys() {
        if let Some(circle) = circle(start, &next, &mut vec![], &mut done) {
            wrong.push(format!("a circle: {circle}"));
        }
    }
    wrong
}

fn circle<'a>(
    at: &'a Module,
    next: &BTreeMap<&'a Module, Vec<&'a Module>>,
    path: &mut Vec<&'a Module>,
    done: &mut BTreeSet<&'a Module>,
) -> Option<String> {
    if let Some(begin) = path.iter().position(|module| *module == at) {
        let names: Vec<_> = path[begin..].iter().chain([&at]).map(|module| show(module)).collect();
        return Some(names.join(" → "));
    }
    if !done.insert(at) {
        return None;
    }
    path.push(at);
    let found = next.get(at).into_iter().flatten().find_map(|to| circle(to, next, path, done));
    path.pop();
    found
}

fn house() -> House {
    House::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"))
}

#[test]
fn dependencies_run_down() {
    for (at, (room, below)) in ROOMS.iter().enumerate() {
        let is_below = |name: &&str| ROOMS[at + 1..].iter().any(|(other, _)| other == name);
        assert!(below.iter().all(is_below), "{room} is to know what is not below it");
    }
    let arrows = house().arrows();
    assert!(arrows.len() > 60, "only {} arrows were read", arrows.len());
    let wrong = wrong(&arrows);
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// The check is checked: with one arrow more, upwards or back, it finds that arrow.
#[test]
fn an_arrow_that_is_turned_round_is_found() {
    let module = |path: &str| path.split('/').map(str::to_owned).collect::<Module>();
    let arrows = house().arrows();
    for (from, to) in [("store", "engine"), ("catalog/types", "route/read"), ("http/freshness", "store/entry")] {
        let mut arrows = arrows.clone();
        arrows.insert((module(from), module(to)), 1);
        assert!(wrong(&arrows).iter().any(|line| line.starts_with(&format!("{from}:1 uses {to}"))), "{from} {to}");
    }
    let within: Vec<_> = arrows.keys().filter(|(from, to)| room(from) == room(to)).collect();
    assert!(!within.is_empty());
    for (from, to) in within {
        let mut arrows = arrows.clone();
        arrows.insert((to.clone(), from.clone()), 1);
        assert!(wrong(&arrows).iter().any(|line| line.starts_with("a circle")), "{from:?} {to:?}");
    }
}

/// A function that decides fits on a screen.
#[test]
fn no_function_is_longer_than_seventy_lines() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut paths = vec![];
    files(&root, &mut paths);
    for path in paths {
        let text = code(&fs::read_to_string(&path).unwrap());
        let lines: Vec<_> = text.lines().collect();
        for (first, line) in lines.iter().enumerate().filter(|(_, line)| line.contains("fn ") && !line.contains('"')) {
            let indent = line.len() - line.trim_start().len();
            let end = format!("{}}}", " ".repeat(indent));
            let is_decl = |l: &&str| {
                l.starts_with(&end) || (l.trim_end().ends_with(';') && l.len() - l.trim_start().len() == indent)
            };
            let length = lines[first..].iter().position(is_decl).unwrap_or(0);
            assert!(length <= 70, "{}:{}: {length} lines", path.display(), first + 1);
        }
    }
}
