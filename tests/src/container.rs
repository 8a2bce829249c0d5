//! A running container as the kernel shows it, from outside.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::output::Output;

/// A running container.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Container {
    /// Its first process, as the machine numbers it.
    pub pid: u32,
}

impl Container {
    /// The container of which `pid` is the first process; `None` when it is not the first of any.
    pub fn with_first_process(pid: u32) -> Option<Container> {
        let container = Container { pid };
        let numbers = container.try_status()?.remove("NSpid")?;
        let numbers: Vec<&str> = numbers.split_whitespace().collect();
        (numbers.len() > 1 && numbers.last() == Some(&"1")).then_some(container)
    }

    fn try_status(&self) -> Option<BTreeMap<String, String>> {
        let text = fs::read_to_string(format!("/proc/{}/status", self.pid)).ok()?;
        let fields = text.lines().filter_map(|line| line.split_once(':'));
        Some(fields.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect())
    }

    /// A field of `/proc/PID/status` (proc(5)).
    #[track_caller]
    pub fn status(&self, field: &str) -> String {
        let mut fields = self.try_status().unwrap_or_else(|| panic!("the process {} is gone", self.pid));
        fields.remove(field).unwrap_or_else(|| panic!("no {field} in the status of {}", self.pid))
    }

    /// The kernel's name for one of its namespaces, for example `net:[4026531840]`.
    #[track_caller]
    pub fn namespace(&self, kind: &str) -> String {
        namespace(&self.pid.to_string(), kind)
    }

    /// Where a path inside can be reached from outside.
    pub fn path(&self, inside: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{inside}", self.pid))
    }

    /// What runs in it, with its arguments; empty when it has ended.
    pub fn command(&self) -> String {
        String::from_utf8_lossy(&fs::read(format!("/proc/{}/cmdline", self.pid)).unwrap_or_default()).replace('\0', " ")
    }

    /// Whether it still lives.
    pub fn lives(&self) -> bool {
        self.try_status().is_some_and(|fields| !fields["State"].starts_with('Z'))
    }

    /// Runs one of this machine's programs in the container's network.
    pub fn in_network(&self, program: &str, args: &[&str]) -> Output {
        let mut command = Command::new("timeout");
        command.args(["60", "nsenter", "-t", &self.pid.to_string(), "-n", program]).args(args);
        Output::of(command, format!("{program} {} in the network of {}", args.join(" "), self.pid))
    }
}

/// The kernel's name for a namespace of a process, `self` included.
#[track_caller]
pub fn namespace(process: &str, kind: &str) -> String {
    let link = fs::read_link(format!("/proc/{process}/ns/{kind}"));
    link.unwrap_or_else(|error| panic!("no {kind} namespace of {process}: {error}")).to_string_lossy().into_owned()
}
