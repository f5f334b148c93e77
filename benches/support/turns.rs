//! Whatever is compared runs by turns, so that each side sees the machine at all of its speeds, and is compared round by round:
//! the ratio is the median of the rounds' ratios. A table for people, and JSON for machines.
#![allow(dead_code, clippy::unwrap_used)]

use std::{
    fmt,
    path::{Path, PathBuf},
};

/// How a figure is held against another's, or by itself; and its goal, if there is one.
#[derive(Clone, Copy)]
pub enum Goal {
    /// This share of the other's rate, or more.
    Rate(Option<f64>),
    /// So many times the other's cost, or less.
    Times(Option<f64>),
    /// So much more than the other, or less.
    More(Option<f64>),
    /// So much, or less.
    Most(Option<f64>),
}

impl Goal {
    fn goal(self) -> Option<f64> {
        let (Self::Rate(goal) | Self::Times(goal) | Self::More(goal) | Self::Most(goal)) = self;
        goal
    }
}

struct Row {
    name: String,
    unit: &'static str,
    rounds: Vec<f64>,
    beside: Option<String>,
    /// By the goal: of rates, of costs, or a difference.
    ratio: Option<f64>,
    goal: Goal,
}

impl Row {
    fn is_met(&self) -> Option<bool> {
        let (goal, held) = (self.goal.goal()?, self.ratio.unwrap_or_else(|| median(&self.rounds)));
        Some(if matches!(self.goal, Goal::Rate(_)) { held >= goal } else { held <= goal })
    }
}

/// One of those who take turns: what it is called, and one round of it, which says what a call costs.
pub type Side<'a> = (String, Box<dyn FnMut() -> f64 + 'a>);

pub struct Table {
    name: &'static str,
    rounds: usize,
    filter: Option<String>,
    /// Whether this only shows that it works.
    pub is_quick: bool,
    rows: Vec<Row>,
}

impl Table {
    /// Reads the arguments: a word that the names of groups contain, `--rounds N`, and `--quick`.
    pub fn from_args(name: &'static str) -> Self {
        let mut this = Self { name, rounds: 7, filter: None, is_quick: false, rows: vec![] };
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--rounds" => this.rounds = args.next().and_then(|n| n.parse().ok()).unwrap_or(this.rounds),
                "--quick" => (this.is_quick, this.rounds) = (true, 1),
                word if !word.starts_with('-') => this.filter = Some(arg),
                _ => {}
            }
        }
        this
    }

    pub fn wants(&self, group: &str) -> bool {
        let wants = self.filter.as_ref().is_none_or(|word| group.contains(word));
        if wants {
            eprintln!("{group} …");
        }
        wants
    }

    /// So many calls, or few.
    pub fn calls(&self, full: u64) -> u64 {
        if self.is_quick { full.div_ceil(100) } else { full }
    }

    /// Runs all sides by turns, every other round the other way round. The first is what the others are held against.
    pub fn compare(&mut self, unit: &'static str, mut sides: Vec<Side<'_>>, goals: &[Goal]) {
        let mut rounds = vec![vec![]; sides.len()];
        for round in 0..self.rounds {
            let mut order: Vec<_> = (0..sides.len()).collect();
            if round % 2 == 1 {
                order.reverse();
            }
            for i in order {
                rounds[i].push((sides[i].1)());
            }
        }
        let (base, beside) = (rounds[0].clone(), sides[0].0.clone());
        for (i, ((name, _), rounds)) in sides.into_iter().zip(rounds).enumerate() {
            let goal = if i == 0 { Goal::Most(None) } else { goals[i - 1] };
            let ratios = rounds.iter().zip(&base).map(|(ours, theirs)| match goal {
                Goal::Rate(_) => theirs / ours,
                Goal::More(_) => ours - theirs,
                _ => ours / theirs,
            });
            let ratio = (i > 0).then(|| median(&ratios.collect::<Vec<_>>()));
            let beside = (i > 0).then(|| beside.clone());
            self.rows.push(Row { name, unit, rounds, beside, ratio, goal });
        }
    }

    /// What is counted, and needs no rounds.
    pub fn count(&mut self, name: &str, unit: &'static str, value: f64, goal: Goal) {
        let (name, rounds) = (name.to_owned(), vec![value]);
        self.rows.push(Row { name, unit, rounds, beside: None, ratio: None, goal });
    }

    /// Prints the table, and writes it as JSON.
    pub fn finish(self, package: &str) {
        println!("| | median | beside | | goal | |\n| --- | --- | --- | --- | --- | --- |");
        for row in &self.rows {
            let beside = row.beside.as_deref().unwrap_or_default();
            let ratio = match (row.ratio, row.goal) {
                (Some(ratio), Goal::Rate(_)) => format!("{ratio:.2} of its rate"),
                (Some(ratio), Goal::More(_)) => format!("{ratio:.0} {} more", row.unit),
                (Some(ratio), _) => format!("{ratio:.2} ×"),
                (None, _) => String::new(),
            };
            let met = row.is_met().map_or("", |met| if met { "met" } else { "**missed**" });
            let least = if matches!(row.goal, Goal::Rate(_)) { "≥" } else { "≤" };
            let goal = row.goal.goal().map_or(String::new(), |goal| format!("{least} {goal}"));
            let value = Figure(median(&row.rounds));
            println!("| {} | {value} {} | {beside} | {ratio} | {goal} | {met} |", row.name, row.unit);
        }
        let folder = folder(package);
        let path = folder.join(format!("{}.json", self.name));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(&path, serde_json::to_string_pretty(&self.json()).unwrap()).unwrap();
        eprintln!("written to {}", path.display());
    }

    fn json(&self) -> serde_json::Value {
        let rows = self.rows.iter().map(|row| {
            let kind = match row.goal {
                Goal::Rate(_) => "rate",
                Goal::Times(_) => "cost",
                Goal::More(_) => "difference",
                Goal::Most(_) => "value",
            };
            serde_json::json!({
                "name": row.name, "unit": row.unit, "rounds": row.rounds, "median": median(&row.rounds),
                "beside": row.beside, "ratio": row.ratio, "kind": kind, "goal": row.goal.goal(), "met": row.is_met(),
            })
        });
        serde_json::json!({ "bench": self.name, "rows": rows.collect::<Vec<_>>() })
    }
}

/// `target/bench` of the crate, whichever package of it is run.
pub fn folder(package: &str) -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    target.unwrap_or_else(|| Path::new(package).join("target")).join("bench")
}

pub fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

struct Figure(f64);

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.abs() < 100.0 { write!(f, "{:.2}", self.0) } else { write!(f, "{:.0}", self.0) }
    }
}
