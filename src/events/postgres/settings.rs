//! What a source is told.

use std::time::Duration;

use pgwire_replication::ReplicationConfig;
use tokio_postgres::{
    Config,
    config::{Host, SslMode},
};

use super::sql::PUBLICATION;
use crate::error::ConfigError;

const APPLICATION_NAME: &str = "tower-cache-aside";
const PORT: u16 = 5432;

pub(super) struct Settings {
    /// The first of them that takes writes is read.
    pub(super) hosts: Vec<(Host, u16)>,
    pub(super) user: String,
    pub(super) password: Option<String>,
    pub(super) database: String,
    pub(super) application_name: String,
    /// `-c name=value`, for both connections.
    pub(super) options: String,
    pub(super) slot: String,
    /// How long the server may be silent.
    pub(super) timeout: Duration,
}

impl Settings {
    pub(super) fn new(url: &str, slot: String, timeout: Duration) -> Result<Self, ConfigError> {
        // The text itself may have a password.
        let wrong = |fix: &str| ConfigError::new(format!("PostgreSQL's address: {fix}"));
        let config: Config = url.parse().map_err(|e: tokio_postgres::Error| {
            let cause = std::error::Error::source(&e).map_or(String::new(), |cause| format!(": {cause}"));
            wrong(&format!("{e}{cause}; write postgres://user:password@host:5432/database"))
        })?;
        if config.get_ssl_mode() == SslMode::Require {
            return Err(wrong("TLS is not built in; leave `sslmode=require` out, or have a proxy speak it"));
        }
        if !config.get_hostaddrs().is_empty() {
            return Err(wrong("`hostaddr` is not known; put the address into `host`"));
        }
        let user = config.get_user().ok_or_else(|| wrong("it names no user; write postgres://user@host"))?;
        let port = |at: usize| match config.get_ports() {
            [] => PORT,
            [port] => *port,
            ports => ports.get(at).copied().unwrap_or(PORT),
        };
        let hosts: Vec<_> = config.get_hosts().iter().enumerate().map(|(at, host)| (host.clone(), port(at))).collect();
        if hosts.is_empty() {
            return Err(wrong("it names no host; write postgres://user@host"));
        }
        check_slot(&slot)?;
        Ok(Self {
            hosts,
            user: user.to_owned(),
            password: config.get_password().map(|password| String::from_utf8_lossy(password).into_owned()),
            database: config.get_dbname().unwrap_or(user).to_owned(),
            application_name: config.get_application_name().unwrap_or(APPLICATION_NAME).to_owned(),
            options: config.get_options().unwrap_or_default().to_owned(),
            slot,
            timeout,
        })
    }

    /// For the connection that reads the log.
    pub(super) fn replication(&self, host: &Host, port: u16) -> ReplicationConfig {
        let host = match host {
            Host::Tcp(name) => name.clone(),
            #[cfg(unix)]
            Host::Unix(path) => path.to_string_lossy().into_owned(),
        };
        let password = self.password.as_deref().unwrap_or_default();
        ReplicationConfig::new(host, &self.user, password, &self.database, &self.slot, PUBLICATION)
            .with_port(port)
            .with_application_name(&self.application_name)
            // A keepalive comes each half of it while there is nothing else.
            .with_options(format!("{} -c wal_sender_timeout={}ms", self.options, self.timeout.as_millis()))
            .with_status_interval(Duration::from_millis(100))
            .with_buffer_size(256)
    }
}

/// It goes into a command as it is.
fn check_slot(slot: &str) -> Result<(), ConfigError> {
    let is_plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
    if slot.is_empty()
        || slot.len() > 63
        || !slot.bytes().all(is_plain)
        || slot.starts_with(|c: char| c.is_ascii_digit())
    {
        return Err(ConfigError::new(format!(
            "PostgreSQL slot `{slot}`: it is to be a letter followed by small letters, digits and `_`, 63 at most; \
             choose one for each fleet, such as agents_cache"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(url: &str) -> Result<Settings, ConfigError> {
        Settings::new(url, "agents_cache".to_owned(), Duration::from_secs(1))
    }

    #[test]
    fn addresses_are_read() {
        let read = settings("postgres://ada:s%20t@a:1,b:2/agents").unwrap();
        let hosts = [(Host::Tcp("a".to_owned()), 1), (Host::Tcp("b".to_owned()), 2)];
        assert_eq!((&*read.hosts, &*read.user, read.password.as_deref()), (&hosts[..], "ada", Some("s t")));
        assert_eq!((&*read.database, read.hosts[0].1), ("agents", 1));
        let read = settings("host=/run/postgresql user=ada").unwrap();
        assert_eq!((&*read.database, &*read.application_name, read.hosts[0].1), ("ada", APPLICATION_NAME, PORT));
    }

    #[test]
    fn what_cannot_work_is_refused() {
        for (url, says) in [
            ("postgres://ada@a?sslmode=require", "TLS"),
            ("host=a hostaddr=127.0.0.1 user=ada", "hostaddr"),
            ("postgres://a/agents", "user"),
            ("user=ada", "host"),
            ("postgres://ada:secret@a:port", "write postgres://"),
        ] {
            let error = settings(url).err().unwrap().to_string();
            assert!(error.contains(says) && !error.contains("secret"), "{error}");
        }
        for slot in ["", "1a", "A", "a b", "a;", &"x".repeat(64)] {
            assert!(Settings::new("postgres://ada@a", slot.to_owned(), Duration::from_secs(1)).is_err(), "{slot}");
        }
    }
}
