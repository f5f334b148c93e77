//! The command line: every flag, its default, and one clear line for each mistake.

use std::{ffi::OsString, net::SocketAddr, path::PathBuf, time::Duration};

use lexopt::Arg;
use tower_cache_aside::{OnUnmapped, OnUnreachable, Tier};

pub const USAGE: &str = "\
The agent service: an axum server on SQLite, with a cache in front of it.

Usage: agent_service [FLAGS]

    [--listen 127.0.0.1:8080]      # port 0 picks a free one; the first line on stdout is: listening on http://ADDR
    [--db PATH]                    # SQLite file, shared by several processes (WAL); default: a fresh temporary one
    [--redis URL]                  # several URLs or redis+cluster:// for a cluster; default: in-process store only
    [--memcached HOST:PORT]        # may be repeated; memcached as the shared store, instead of --redis
    [--l1 validated|on|off]        # in-process tier over the shared store, default validated (strict); on: faster, stale for a push
    [--prefix NAME]                # key prefix in the shared store, default \"cas\"
    [--config FILE]                # TOML: data types, TTLs, routes, cascades; default: the built-in agent catalogue
    [--origin-delay-ms N]          # makes every database read take that much longer (a slow origin), default 0
    [--coalesce process|fleet]     # how far single flight reaches, default process
    [--fence-ms N]                 # fenced writes with that lease; 0 = off, the default
    [--on-unreachable journal|reject]  # writes the store cannot be told about: they go on, the default, or are answered 503
    [--unmapped ignore|warn|drop]  # a successful unsafe request that no mutation names: default warn
    [--audit SHARE]                # share of hits compared with the database, 0 to 1, default 0
    [--outbox on|off]              # triggers in the SQLite file write every change to an outbox, which the service follows: rows
                                   # that another program changes fall too; default off
    [--events REDIS_URL/STREAM]    # follows a Redis stream of events, by the policies of the config file
    [--region NAME]                # the region whose Redis --redis is; what is dropped is told to its peers, and heard of them
    [--peer NAME=REDIS_URL]        # another region, and its Redis; may be repeated
    [--hold-ms N]                  # how long what a peer drops is not stored: as long as the database's replica is behind, default 1000
    [--max-lag-ms N]               # while what others have changed may be unknown for longer, the database answers; default: no bound
    [--admin-token TOKEN]          # turns the /_cache endpoints on; without it they answer 404
    [--metrics-tenants N]          # how many tenants have a label of their own, default 0 (no tenant label)
    [--seed-agents N]              # inserts N sample agents for tenant \"demo\", default 10
    [--warm on|off]                # popular entries are loaded at start, before they expire and after writes; default off
    [--check]                      # prints what each write drops and what drops each route, and ends; mistakes end it with 2
    [--help]                       # prints this
";

/// How far single flight reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coalesce {
    Process,
    Fleet,
}

#[derive(Debug, Clone)]
pub struct Args {
    pub listen: SocketAddr,
    pub db: Option<PathBuf>,
    pub redis: Vec<String>,
    pub memcached: Vec<String>,
    pub l1: Tier,
    pub prefix: String,
    pub config: Option<PathBuf>,
    pub origin_delay: Duration,
    pub coalesce: Coalesce,
    pub fence: Option<Duration>,
    pub on_unreachable: OnUnreachable,
    pub unmapped: Option<OnUnmapped>,
    pub audit: Option<f64>,
    pub outbox: bool,
    pub events: Option<(String, String)>,
    pub max_lag: Option<Duration>,
    pub region: Option<String>,
    pub peers: Vec<(String, String)>,
    pub hold: Option<Duration>,
    pub admin_token: Option<String>,
    pub metrics_tenants: usize,
    pub seed_agents: usize,
    pub warm: bool,
    pub check: bool,
    pub help: bool,
}

impl Default for Args {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            db: None,
            redis: Vec::new(),
            memcached: Vec::new(),
            l1: Tier::Validated,
            prefix: "cas".into(),
            config: None,
            origin_delay: Duration::ZERO,
            coalesce: Coalesce::Process,
            fence: None,
            on_unreachable: OnUnreachable::Journal,
            unmapped: None,
            audit: None,
            outbox: false,
            events: None,
            max_lag: None,
            region: None,
            peers: Vec::new(),
            hold: None,
            admin_token: None,
            metrics_tenants: 0,
            seed_agents: 10,
            warm: false,
            check: false,
            help: false,
        }
    }
}

/// Parses what follows the program's name. `--help` ends the parsing: nothing after it matters.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Args, String> {
    let mut parser = lexopt::Parser::from_args(args);
    let mut parsed = Args::default();
    while let Some(arg) = parser.next().map_err(|e| e.to_string())? {
        let flag = match arg {
            Arg::Long("help") | Arg::Short('h') => {
                parsed.help = true;
                return Ok(parsed);
            }
            Arg::Long(name) => name.to_owned(),
            Arg::Short(letter) => {
                return Err(format!("unknown flag -{letter}; --help lists the flags"));
            }
            Arg::Value(word) => {
                return Err(format!("unexpected argument {word:?}; --help lists the flags"));
            }
        };
        let mut value = |accepted: &'static str| Value::next(&mut parser, &flag, accepted);
        match flag.as_str() {
            "listen" => parsed.listen = value("IP:PORT, such as 127.0.0.1:8080")?.parsed()?,
            "db" => parsed.db = Some(value("the path of an SQLite file")?.path()?),
            "redis" => value("URLs such as redis://127.0.0.1:6379, separated by commas")?.urls(&mut parsed.redis)?,
            "memcached" => {
                let servers = value("HOST:PORT, such as 127.0.0.1:11211")?.text()?;
                parsed.memcached.extend(servers.split(',').map(|server| server.trim().to_owned()));
            }
            "l1" => {
                let tiers = [("validated", Tier::Validated), ("on", Tier::On), ("off", Tier::Off)];
                parsed.l1 = value("validated, on or off")?.one_of(&tiers)?;
            }
            "prefix" => parsed.prefix = value("a name that is not empty")?.text()?,
            "config" => parsed.config = Some(value("the path of a TOML file")?.path()?),
            "origin-delay-ms" => parsed.origin_delay = value("a whole number of milliseconds")?.millis()?,
            "coalesce" => {
                let reaches = [("process", Coalesce::Process), ("fleet", Coalesce::Fleet)];
                parsed.coalesce = value("process or fleet")?.one_of(&reaches)?;
            }
            "fence-ms" => {
                let lease = value("a whole number of milliseconds, 0 for off")?.millis()?;
                parsed.fence = (!lease.is_zero()).then_some(lease);
            }
            "on-unreachable" => {
                let choices = [("journal", OnUnreachable::Journal), ("reject", OnUnreachable::Reject)];
                parsed.on_unreachable = value("journal or reject")?.one_of(&choices)?;
            }
            "unmapped" => {
                let choices = [("ignore", OnUnmapped::Ignore), ("warn", OnUnmapped::Warn), ("drop", OnUnmapped::Drop)];
                parsed.unmapped = Some(value("ignore, warn or drop")?.one_of(&choices)?);
            }
            "audit" => {
                let value = value("a share of hits, from 0 to 1")?;
                let share: f64 = value.parsed()?;
                parsed.audit = Some(if (0.0..=1.0).contains(&share) { share } else { return Err(value.refused()) });
            }
            "outbox" => parsed.outbox = value("on or off")?.one_of(&[("on", true), ("off", false)])?,
            "events" => {
                parsed.events = Some(value("REDIS_URL/STREAM, such as redis://127.0.0.1:6379/changes")?.stream()?)
            }
            "region" => parsed.region = Some(value("the name of a region")?.text()?),
            "peer" => parsed.peers.push(value("NAME=REDIS_URL, such as us=redis://10.0.0.1:6379")?.peer()?),
            "hold-ms" => parsed.hold = Some(value("a whole number of milliseconds")?.millis()?),
            "max-lag-ms" => {
                let value = value("a whole number of milliseconds, not 0")?;
                parsed.max_lag = Some(value.millis()?).filter(|lag| !lag.is_zero());
                parsed.max_lag.ok_or_else(|| value.refused())?;
            }
            "metrics-tenants" => parsed.metrics_tenants = value("a whole number")?.parsed()?,
            "admin-token" => parsed.admin_token = Some(value("a token that is not empty")?.text()?),
            "check" => parsed.check = true,
            "seed-agents" => parsed.seed_agents = value("a whole number")?.parsed()?,
            "warm" => parsed.warm = value("on or off")?.one_of(&[("on", true), ("off", false)])?,
            _ => {
                return Err(format!("unknown flag --{}; --help lists the flags", flag.escape_debug()));
            }
        }
    }
    Ok(parsed)
}

/// A flag's value together with what an error about it has to say.
struct Value<'a> {
    flag: &'a str,
    accepted: &'static str,
    given: OsString,
}

impl<'a> Value<'a> {
    fn next(parser: &mut lexopt::Parser, flag: &'a str, accepted: &'static str) -> Result<Self, String> {
        match parser.value() {
            Ok(given) => Ok(Self { flag, accepted, given }),
            Err(_) => Err(format!("--{flag}: the value is missing; accepted: {accepted}")),
        }
    }

    fn refused(&self) -> String {
        format!("--{}: {:?} is not accepted; accepted: {}", self.flag, self.given, self.accepted)
    }

    /// Text that is valid UTF-8 and not empty.
    fn text(self) -> Result<String, String> {
        match self.given.to_str() {
            Some(text) if !text.is_empty() => Ok(text.to_owned()),
            _ => Err(self.refused()),
        }
    }

    fn path(self) -> Result<PathBuf, String> {
        if self.given.is_empty() { Err(self.refused()) } else { Ok(self.given.into()) }
    }

    fn parsed<T: std::str::FromStr>(&self) -> Result<T, String> {
        self.given.to_str().and_then(|text| text.parse().ok()).ok_or_else(|| self.refused())
    }

    fn millis(&self) -> Result<Duration, String> {
        self.parsed().map(Duration::from_millis)
    }

    fn one_of<T: Copy>(&self, choices: &[(&str, T)]) -> Result<T, String> {
        let chosen = choices.iter().find(|(word, _)| self.given == *word);
        chosen.map(|(_, choice)| *choice).ok_or_else(|| self.refused())
    }

    /// The name of a region, and the URL of its server.
    fn peer(self) -> Result<(String, String), String> {
        match self.given.to_str().and_then(|text| text.split_once('=')) {
            Some((name, url)) if !name.is_empty() && url.contains("://") => Ok((name.to_owned(), url.to_owned())),
            _ => Err(self.refused()),
        }
    }

    /// The URL of a server, and the name of a stream there.
    fn stream(self) -> Result<(String, String), String> {
        let split = self.given.to_str().and_then(|text| text.rsplit_once('/'));
        match split.filter(|(url, stream)| !stream.is_empty() && url.contains("://") && !url.ends_with('/')) {
            Some((url, stream)) => Ok((url.to_owned(), stream.to_owned())),
            None => Err(self.refused()),
        }
    }

    /// Adds to the list, so that the flag may be repeated as well as hold several.
    fn urls(self, all: &mut Vec<String>) -> Result<(), String> {
        let text = self.given.to_str().ok_or_else(|| self.refused())?;
        for (i, url) in text.split(',').map(str::trim).enumerate() {
            match all.last_mut() {
                _ if url.contains("://") => all.push(url.to_owned()),
                // Another host of a `redis+cluster://` or `redis+sentinel://`.
                Some(last) if i > 0 && last.starts_with("redis+") => *last = format!("{last},{url}"),
                _ => return Err(self.refused()),
            }
        }
        Ok(())
    }
}
