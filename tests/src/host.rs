//! A virtual host: its own network, mounts, name and cgroups; its daemon, its command line, its cable.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use serde_json::Value;

use crate::cgroups::Cgroups;
use crate::container::Container;
use crate::lab::{PATIENCE, binary, run, wait_for};
use crate::output::Output;

/// A command that has not ended after so many seconds is killed, with the exit code 124 of timeout(1).
const COMMAND_SECONDS: &str = "150";

/// One host of a lab.
pub struct Host {
    /// What it is called: `lab-1`.
    pub name: String,
    /// Its address on the lab's network.
    pub address: String,
    /// Its node's folder.
    pub data: PathBuf,
    /// Its cgroups.
    pub cgroups: Cgroups,
    network: String,
    switch: String,
    port: String,
    /// The process that holds the host's namespaces while it is switched on.
    power: Mutex<Option<Child>>,
}

impl Host {
    /// The host `number` of the lab `lab`, with its folders below `dir`, joined to the network namespace `switch`.
    pub(crate) fn new(lab: &str, number: usize, dir: &Path, switch: &str) -> Host {
        let name = format!("lab-{number}");
        let data = dir.join(format!("h{number}"));
        let id = format!("{lab}-{number}");
        let host = Host {
            address: format!("10.77.0.{number}"),
            cgroups: Cgroups::new(&id),
            network: id,
            switch: switch.to_owned(),
            port: format!("v{number}"),
            power: Mutex::new(None),
            name,
            data,
        };
        host.cable();
        host
    }

    fn cable(&self) {
        let (network, switch, port, address) = (&self.network, &self.switch, &self.port, &self.address);
        run("ip", &["netns", "add", network]);
        run("ip", &["link", "add", port, "netns", switch, "type", "veth", "peer", "name", "eth0", "netns", network]);
        run("ip", &["-n", switch, "link", "set", port, "master", "br0", "up"]);
        run("ip", &["-n", network, "link", "set", "lo", "up"]);
        run("ip", &["-n", network, "addr", "add", &format!("{address}/24"), "dev", "eth0"]);
        run("ip", &["-n", network, "link", "set", "eth0", "up"]);
        // With a default route, multicast and "which address is mine" are as on a LAN.
        run("ip", &["-n", network, "route", "add", "default", "via", "10.77.0.254"]);
        self.shape("200mbit");
    }

    /// Gives the host's link, both ways, the rate `rate`.
    pub fn shape(&self, rate: &str) {
        for (network, device) in [(&self.network, "eth0"), (&self.switch, &*self.port)] {
            let shape = ["rate", rate, "burst", "128kb", "latency", "50ms"];
            run("tc", &[&["-n", network, "qdisc", "replace", "dev", device, "root", "tbf"], &shape[..]].concat());
        }
    }

    /// Pulls the host's cable.
    pub fn cut(&self) {
        run("ip", &["-n", &self.switch, "link", "set", &self.port, "down"]);
    }

    /// Puts the cable back.
    pub fn heal(&self) {
        run("ip", &["-n", &self.switch, "link", "set", &self.port, "up"]);
    }

    /// Switches the host on, if it is off; the daemon is not started.
    pub fn boot(&self) {
        self.boot_with("");
    }

    /// The same, with shell commands that its mount namespace is prepared with.
    pub fn boot_with(&self, prepare: &str) {
        let mut power = self.power.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if power.is_some() {
            return;
        }
        self.cgroups.create();
        // A group is the root of a cgroup namespace if it was entered before the namespace was made. Others' networks are no mounts of
        // this host: those would change as they come and go.
        let script = format!(
            "set -e; hostname {}; mount -t sysfs sysfs /sys; {} {prepare}\n\
             umount -R -l /run/netns 2> /dev/null || true; echo on; exec sleep infinity",
            self.name,
            self.cgroups.mounts()
        );
        let unshare = format!(
            "{}exec unshare --mount --uts --cgroup --propagation private bash -c \"$1\"",
            join(&self.cgroups.roots())
        );
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.network));
        command.args(["bash", "-c", &unshare, "_", &script]);
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = child.expect("run nsenter");
        let mut line = String::new();
        let stdout = child.stdout.as_mut().expect("a pipe");
        BufReader::new(stdout).read_line(&mut line).expect("read what the host says");
        if line != "on\n" {
            let mut text = String::new();
            let _nothing = child.stderr.take().expect("a pipe").read_to_string(&mut text);
            panic!("{} does not boot: {text}", self.name);
        }
        *power = Some(child);
    }

    /// `program` with `args` as a process on this host; it is switched on if need be.
    pub fn command(&self, program: impl AsRef<Path>, args: &[&str]) -> Command {
        self.boot();
        let power = self.power.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let pid = power.as_ref().map_or(0, Child::id).to_string();
        let mut command = Command::new("timeout");
        let enter = format!("{}exec nsenter -t {pid} -n -m -u -C -- \"$@\"", join(&self.cgroups.entries()));
        command.args(["-k", "5", COMMAND_SECONDS, "bash", "-c", &enter, "_"]);
        command.arg(program.as_ref()).args(args).stdin(Stdio::null());
        command
    }

    /// Runs a program on this host to its end.
    pub fn run(&self, program: &str, args: &[&str]) -> Output {
        Output::of(self.command(program, args), format!("{}: {program} {}", self.name, args.join(" ")))
    }

    /// The command line of this host's node, not yet started.
    pub fn moyai_command(&self, args: &[&str]) -> Command {
        let data = self.data.to_string_lossy();
        self.command(binary(), &[&["--data", &*data], args].concat())
    }

    /// Runs the command line of this host's node to its end.
    pub fn moyai(&self, args: &[&str]) -> Output {
        Output::of(self.moyai_command(args), format!("{}: moyai {}", self.name, args.join(" ")))
    }

    /// The same, by the program whose daemon lies in this way about the chunks it serves (`node/examples/lying_peer.rs`).
    pub fn lying(&self, lie: &str, args: &[&str]) -> Output {
        let data = self.data.to_string_lossy();
        let mut command = self.command(crate::lab::lying_binary(), &[&["--data", &*data], args].concat());
        command.env("MOYAI_LIE", lie);
        Output::of(command, format!("{}: lying_peer {}", self.name, args.join(" ")))
    }

    /// The same with `input` as its standard input.
    pub fn moyai_fed(&self, args: &[&str], input: &Path) -> Output {
        let mut command = self.moyai_command(args);
        command.stdin(fs::File::open(input).unwrap_or_else(|error| panic!("cannot open {}: {error}", input.display())));
        Output::of(command, format!("{}: moyai {} < {}", self.name, args.join(" "), input.display()))
    }

    /// Starts the command line and returns at once.
    pub fn start(&self, args: &[&str]) -> Stream {
        Stream::start(self.moyai_command(args), format!("{}: moyai {}", self.name, args.join(" ")))
    }

    /// Loads an image.
    #[track_caller]
    pub fn load(&self, archive: &Path) -> Output {
        self.moyai(&["load", &archive.to_string_lossy()]).ok()
    }

    /// Starts the daemon again.
    #[track_caller]
    pub fn up(&self) -> Output {
        self.moyai(&["up"]).ok()
    }

    /// The daemon's process.
    #[track_caller]
    pub fn daemon(&self) -> u32 {
        self.moyai(&["--json", "status"]).ok().json()["pid"].as_u64().expect("a pid") as u32
    }

    /// Kills the daemon alone, as a crash would; its containers are not touched.
    #[track_caller]
    pub fn kill_daemon(&self) {
        let pid = self.daemon();
        assert!(self.cgroups.processes().contains(&pid), "the daemon {pid} of {} is not on it", self.name);
        signal("KILL", &[pid]);
        wait_for("the daemon to die", PATIENCE, || (!Path::new(&format!("/proc/{pid}")).exists()).then_some(()));
    }

    /// Switches the host off: every process on it dies at once, and what lives in the kernel alone is gone.
    pub fn kill_machine(&self) {
        wait_for("every process of the host to die", PATIENCE, || {
            let pids: Vec<u32> = self.cgroups.processes().into_iter().collect();
            signal("KILL", &pids);
            let mut power = self.power.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if let Some(mut child) = power.take() {
                let _killed = child.kill();
                let _reaped = child.wait();
            }
            pids.is_empty().then_some(())
        });
        self.cgroups.remove();
    }

    /// How many bytes the host has sent.
    pub fn sent_bytes(&self) -> u64 {
        let text = self.run("cat", &["/sys/class/net/eth0/statistics/tx_bytes"]).ok();
        text.text().parse().expect("a number")
    }

    /// `moyai ps -a` as this node sees it.
    #[track_caller]
    pub fn workloads(&self) -> Vec<Value> {
        self.moyai(&["--json", "ps", "-a"]).ok().rows()
    }

    /// The first replica of the workload called `name`, as this node sees it.
    pub fn workload(&self, name: &str) -> Option<Value> {
        let output = self.moyai(&["--json", "ps", "-a"]);
        let rows = if output.code == 0 { output.rows() } else { Vec::new() };
        rows.into_iter().find(|row| row["name"] == name)
    }

    /// The images of the mesh, as this node sees them.
    #[track_caller]
    pub fn images(&self) -> Vec<Value> {
        self.moyai(&["--json", "images"]).ok().rows()
    }

    /// Names of the nodes that this one thinks alive.
    pub fn alive(&self) -> Vec<String> {
        self.nodes_in("alive")
    }

    /// Names of the nodes that this one thinks in a state: alive, suspect, down or left.
    pub fn nodes_in(&self, state: &str) -> Vec<String> {
        let output = self.moyai(&["--json", "nodes"]);
        let rows = if output.code == 0 { output.rows() } else { Vec::new() };
        let found = rows.iter().filter(|row| row["state"] == state);
        found.filter_map(|row| row["name"].as_str().map(str::to_owned)).collect()
    }

    /// An invitation's ticket.
    #[track_caller]
    pub fn ticket(&self, options: &[&str]) -> String {
        let output = self.moyai(&[&["--json", "invite"], options].concat()).ok();
        output.json()["ticket"].as_str().expect("a ticket").to_owned()
    }

    /// The containers that run on this host for the workload whose id begins with `id`.
    pub fn containers(&self, id: &str) -> Vec<Container> {
        let pids = self.cgroups.processes_of(&format!("-{id}"));
        pids.into_iter().filter_map(Container::with_first_process).collect()
    }

    /// The one container that runs on this host for a workload.
    #[track_caller]
    pub fn container(&self, id: &str) -> Container {
        let mut found = self.containers(id);
        assert_eq!(found.len(), 1, "containers of {id} on {}", self.name);
        found.remove(0)
    }

    /// The last lines of the daemon's log.
    pub fn log_tail(&self, lines: usize) -> String {
        let bytes = fs::read(self.data.join("daemon.log")).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// Takes the host away.
    pub(crate) fn remove(&self) {
        // Asked politely where it can be, so that the way down is walked too.
        if self.power.lock().is_ok_and(|power| power.is_some()) && self.data.join("moyai.sock").exists() {
            let mut command = self.moyai_command(&["down"]);
            let _down = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
        }
        self.kill_machine();
        let _gone = Command::new("ip").args(["netns", "del", &self.network]).stderr(Stdio::null()).status();
    }
}

/// Shell commands with which a shell enters cgroups.
fn join(entries: &[PathBuf]) -> String {
    entries.iter().map(|path| format!("echo $$ > {}; ", path.display())).collect()
}

/// Sends a signal to processes; those that are gone are no error.
pub fn signal(name: &str, pids: &[u32]) {
    if !pids.is_empty() {
        let pids = pids.iter().map(u32::to_string);
        let sent = Command::new("kill").args(["-s", name, "--"]).args(pids).stderr(Stdio::null()).status();
        sent.expect("run kill");
    }
}

/// A command that goes on; killed when it is dropped.
pub struct Stream {
    child: Child,
    text: Arc<Mutex<String>>,
    shown: String,
}

impl Stream {
    fn start(mut command: Command, shown: String) -> Stream {
        let child = command.stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn();
        let mut child = child.unwrap_or_else(|error| panic!("cannot run {shown}: {error}"));
        let text = Arc::new(Mutex::new(String::new()));
        let mut stdout = child.stdout.take().expect("a pipe");
        let sink = Arc::clone(&text);
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(len @ 1..) = stdout.read(&mut buffer) {
                let piece = String::from_utf8_lossy(&buffer[..len]);
                sink.lock().expect("nobody panics with it").push_str(&piece);
            }
        });
        Stream { child, text, shown }
    }

    /// What it has written to standard output so far.
    pub fn text(&self) -> String {
        self.text.lock().expect("nobody panics with it").clone()
    }

    /// Its exit code once it has ended.
    pub fn ended(&mut self) -> Option<i32> {
        let status = self.child.try_wait().unwrap_or_else(|error| panic!("cannot wait for {}: {error}", self.shown));
        status.map(|status| status.code().unwrap_or(-1))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // timeout(1) passes it on.
        signal("TERM", &[self.child.id()]);
        let _reaped = self.child.wait();
    }
}
