//! Hosts in network namespaces, joined by a switch (a bridge in a namespace of its own) with shaped links.
//!
//! A lab's name carries the number of the test's process, so that tests run side by side; and so that a lab which a
//! killed test left behind is known as such: the next lab removes it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::host::{Host, signal};

/// What the program that starts containers is called.
pub const SMALL: &str = "moyai-oci";
/// Long enough for a slow, busy machine: when it has passed, what is waited for will not come.
pub const PATIENCE: Duration = Duration::from_secs(90);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(50);
const PREFIX: &str = "moyai-e2e";

/// Some hosts and the network between them; gone when it is dropped.
pub struct Lab {
    hosts: Vec<Host>,
    switch: String,
    folder: TempDir,
}

impl Lab {
    /// `count` hosts, called lab-1, lab-2, …, without nodes.
    pub fn new(count: usize) -> Lab {
        static NUMBER: AtomicU32 = AtomicU32::new(1);
        static LEFT_OVER: OnceLock<()> = OnceLock::new();
        assert!(is_root(), "these tests make network namespaces and cgroups: run them as root");
        let _checked = binary();
        LEFT_OVER.get_or_init(remove_left_over);
        let name = format!("{PREFIX}-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let folder = tempfile::Builder::new().prefix(&format!("{name}-")).tempdir().expect("make a folder for the lab");
        let mut lab = Lab { hosts: Vec::new(), switch: format!("{name}-sw"), folder };
        let switch = &lab.switch;
        run("ip", &["netns", "add", switch]);
        run("ip", &["-n", switch, "link", "set", "lo", "up"]);
        // Without snooping a bridge hands multicast to every port, as a simple switch does.
        run("ip", &["-n", switch, "link", "add", "br0", "type", "bridge", "mcast_snooping", "0"]);
        run("ip", &["-n", switch, "link", "set", "br0", "up"]);
        for number in 1..=count {
            let host = Host::new(&name, number, lab.folder.path(), &lab.switch);
            lab.hosts.push(host);
        }
        lab
    }

    /// `count` hosts whose nodes form one mesh, and each of which knows all the others. lab-1 began it.
    pub fn mesh(count: usize) -> Lab {
        Lab::mesh_with(count, &[])
    }

    /// The same, and this is given to `init` and to each `join`.
    pub fn mesh_with(count: usize, options: &[&str]) -> Lab {
        let lab = Lab::new(count);
        lab.hosts[0].moyai(&[&["init"], options].concat()).ok();
        if count > 1 {
            let ticket = lab.hosts[0].ticket(&[]);
            lab.hosts[1..].iter().for_each(|host| drop(host.moyai(&[&["join", &ticket], options].concat()).ok()));
        }
        lab.wait_for_mesh();
        lab
    }

    /// The hosts, to be taken apart: `let [one, two, three] = lab.hosts();`
    #[track_caller]
    pub fn hosts<const N: usize>(&self) -> [&Host; N] {
        let hosts: Vec<&Host> = self.hosts.iter().collect();
        hosts.try_into().unwrap_or_else(|hosts: Vec<_>| panic!("the lab has {} hosts", hosts.len()))
    }

    /// The host whose node is called `name`.
    #[track_caller]
    pub fn host(&self, name: &str) -> &Host {
        self.hosts.iter().find(|host| host.name == name).unwrap_or_else(|| panic!("no host is called `{name}`"))
    }

    /// A folder for what a test makes; gone with the lab.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Waits until every node thinks every node alive.
    #[track_caller]
    pub fn wait_for_mesh(&self) {
        for host in &self.hosts {
            let what = format!("{} to see {} nodes alive", host.name, self.hosts.len());
            wait_for(&what, PATIENCE, || (host.alive().len() == self.hosts.len()).then_some(()));
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for host in &self.hosts {
                eprintln!("--- the end of daemon.log of {}\n{}", host.name, host.log_tail(40));
            }
        }
        self.hosts.iter().for_each(Host::remove);
        let _gone = Command::new("ip").args(["netns", "del", &self.switch]).stderr(Stdio::null()).status();
    }
}

/// Looks until there is something, and returns it; panics after `patience`.
#[track_caller]
pub fn wait_for<T>(what: &str, patience: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + patience;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < until, "waited {} s in vain for {what}", patience.as_secs());
        std::thread::sleep(LOOK);
    }
}

/// The program under test.
pub fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("MOYAI_BIN") {
        return path.into();
    }
    let path = profile_folder().join("moyai");
    assert!(path.exists(), "{} does not exist; build it first: cargo build -p moyai", path.display());
    path
}

/// A copy of the program, and of the small one that starts containers beside it, or not.
pub fn copy_binary(to: &Path, with_small: bool) {
    let program = binary();
    std::fs::copy(&program, to).expect("copy the program");
    if with_small {
        std::fs::copy(program.with_file_name(SMALL), to.with_file_name(SMALL)).expect("copy the small program");
    }
}

/// The program whose daemon serves wrong chunks (`node/examples/lying_peer.rs`).
pub fn lying_binary() -> PathBuf {
    let path = profile_folder().join("examples/lying_peer");
    assert!(path.exists(), "{} does not exist; build it first: cargo build -p moyai --examples", path.display());
    path
}

/// `target/<triple>/<profile>`, where this test was built, and where the program is.
pub(crate) fn profile_folder() -> PathBuf {
    let test = std::env::current_exe().expect("find this test");
    test.ancestors().nth(2).expect("a test in deps/ of a profile").to_owned()
}

/// Runs one of the machine's own tools, which must succeed.
#[track_caller]
pub(crate) fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|error| panic!("cannot run {program} (tests/run installs it): {error}"));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {} failed: {text}", args.join(" "));
}

fn is_root() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status.lines().any(|line| line.starts_with("Uid:") && line.split_whitespace().nth(2) == Some("0"))
}

/// Removes labs whose test is gone, because it was killed.
fn remove_left_over() {
    let of_a_dead_test = |name: &str| {
        let mut parts = name.strip_prefix(PREFIX)?.trim_start_matches('-').split('-');
        let pid: u32 = parts.next()?.parse().ok()?;
        (!Path::new(&format!("/proc/{pid}")).exists()).then_some(())
    };
    for entry in std::fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if of_a_dead_test(&name).is_none() {
            continue;
        }
        if !name.ends_with("-sw") {
            let cgroups = crate::cgroups::Cgroups::new(&name);
            wait_for("the processes of an old lab to die", PATIENCE, || {
                let pids: Vec<u32> = cgroups.processes().into_iter().collect();
                signal("KILL", &pids);
                pids.is_empty().then_some(())
            });
            cgroups.remove();
        }
        let _gone = Command::new("ip").args(["netns", "del", &name]).stderr(Stdio::null()).status();
    }
    for entry in std::fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten() {
        if of_a_dead_test(&entry.file_name().to_string_lossy()).is_some() {
            let _gone = std::fs::remove_dir_all(entry.path());
        }
    }
}
