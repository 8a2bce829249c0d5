//! How a container finds others by name, beyond what its node tells it: docker's `--add-host`, `--dns`, `--dns-search` and
//! `--dns-option`.
//!
//! Names of workloads come first whatever is asked for here: a container on the bridge asks its node, which asks these servers what
//! it does not know itself.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::workload::SpecError;

/// The most lines that its hosts file has of its own.
const MAX_HOSTS: usize = 256;
/// More servers no resolver asks (resolv.conf(5)).
const MAX_SERVERS: usize = 3;
/// glibc took six until 2.26, and any number since.
const MAX_SEARCH: usize = 32;
const MAX_OPTIONS: usize = 16;
/// The longest name (RFC 1035 section 2.3.4), and option.
const MAX_NAME: usize = 253;
const MAX_OPTION: usize = 64;

/// See above; the default is what its machine has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Lookup {
    /// Lines of its hosts file.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub hosts: Vec<Host>,
    /// Who is asked for names, in this order, instead of those whom its machine asks.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub servers: Vec<IpAddr>,
    /// Domains in which a name without a dot is looked for, instead of its machine's.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<String>,
    /// What resolvers mind (`ndots:2`), instead of its machine's.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

/// A line of a hosts file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// Who.
    pub name: String,
    /// Where; none is its machine, as it is reached from the bridge.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
}

impl Lookup {
    /// Whether it is as its machine's.
    pub fn is_usual(&self) -> bool {
        *self == Lookup::default()
    }

    /// Whether it names its machine, which only a network leads to.
    pub(crate) fn names_machine(&self) -> bool {
        self.hosts.iter().any(|host| host.address.is_none())
    }

    /// Of a container that has a network of its own, on its machine's bridge, or not.
    pub(crate) fn check(&self, is_bridged: bool) -> Result<(), SpecError> {
        let wrong = |what: String, reason: &str| Err(SpecError::Limit { what, reason: reason.to_owned() });
        let lens = [
            ("added hosts", self.hosts.len(), MAX_HOSTS),
            ("name servers", self.servers.len(), MAX_SERVERS),
            ("search domains", self.search.len(), MAX_SEARCH),
            ("resolver options", self.options.len(), MAX_OPTIONS),
        ];
        if let Some((what, len, most)) = lens.into_iter().find(|(_, len, most)| len > most) {
            return wrong(what.to_owned(), &format!("{len} of them: {most} at the most"));
        }
        if let Some(host) = self.hosts.iter().find(|host| !is_host(&host.name)) {
            return wrong(format!("host `{}`", shown(&host.name)), "a name has letters, digits, `-`, `_` and `.`");
        }
        // Its node asks for it, and would ask itself.
        let is_own = |server: &&IpAddr| server.to_canonical().is_loopback() || server.to_canonical().is_unspecified();
        if let Some(server) = self.servers.iter().find(is_own).filter(|_| is_bridged) {
            return wrong(format!("name server {server}"), "at that address every machine has another");
        }
        // resolv.conf(5): a lone dot is the root, and no search at all.
        if let Some(domain) = self.search.iter().find(|domain| !is_host(domain) && *domain != ".") {
            return wrong(
                format!("search domain `{}`", shown(domain)),
                "a domain has letters, digits, `-`, `_` and `.`",
            );
        }
        let is_option = |option: &String| {
            (1..=MAX_OPTION).contains(&option.len()) && option.bytes().all(|byte| byte.is_ascii_graphic())
        };
        if let Some(option) = self.options.iter().find(|option| !is_option(option)) {
            return wrong(format!("resolver option `{}`", shown(option)), "it is a word, as in `ndots:2`");
        }
        Ok(())
    }
}

/// Also with a dot at its end.
fn is_host(name: &str) -> bool {
    (1..=MAX_NAME).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
}

/// On one line, whatever is in it.
fn shown(text: &str) -> String {
    text.chars().take(MAX_OPTION).flat_map(char::escape_debug).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_line_of_those_files_is_refused() {
        let host = |name: &str| Lookup {
            hosts: vec![Host { name: name.to_owned(), address: Some(IpAddr::from([10, 0, 0, 1])) }],
            ..Lookup::default()
        };
        assert!(host("db.example.org").check(true).is_ok() && Lookup::default().check(true).is_ok());
        for name in ["", "two words", "a\n10.0.0.2\tb", "-x", &"x".repeat(254)] {
            assert!(host(name).check(true).is_err(), "{name:?}");
        }
        let refused = host("a\nb").check(true).unwrap_err().to_string();
        assert_eq!(refused, "host `a\\nb`: a name has letters, digits, `-`, `_` and `.`");
        let servers = |servers: &[&str]| Lookup {
            servers: servers.iter().map(|server| server.parse().unwrap()).collect(),
            ..Lookup::default()
        };
        assert!(servers(&["9.9.9.9", "2620:fe::fe"]).check(true).is_ok());
        assert!(servers(&["127.0.0.53"]).check(true).is_err() && servers(&["::1"]).check(true).is_err());
        assert!(servers(&["::ffff:127.0.0.1"]).check(true).is_err() && servers(&["127.0.0.53"]).check(false).is_ok());
        assert!(servers(&["1.1.1.1"; 4]).check(true).is_err());
        let search = |domain: &str| Lookup { search: vec![domain.to_owned()], ..Lookup::default() };
        assert!(search("lab.example").check(true).is_ok() && search(".").check(true).is_ok());
        assert!(search("lab example").check(true).is_err());
        let option = |option: &str| Lookup { options: vec![option.to_owned()], ..Lookup::default() };
        assert!(option("ndots:2").check(true).is_ok());
        assert!(option("ndots:2\nnameserver 10.0.0.1").check(true).is_err() && option("").check(true).is_err());
    }
}
