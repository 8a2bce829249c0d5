//! OCI bundles, and `moyai oci` driven as podman and containerd drive it: without a daemon, without hosts.
//!
//! What a command writes goes to files, not to pipes: a container that was created keeps its caller's streams, and a pipe
//! would be read until it ends.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::lab::{PATIENCE, binary, wait_for};
use crate::output::Output;

const PREFIX: &str = "moyai-oci-test";
/// What /bin has besides busybox itself.
const PROGRAMS: &str = "sh ash true false ls cat sleep id mount umount ps grep echo env stat dd mknod mkfifo kill head \
    readlink touch rm mkdir chmod chown hostname ip tty stty umask uname sysctl nsenter wc tr sort seq test cut sed awk \
    ionice pwd printf sha256sum ln cp unshare setsid date timeout tail usleep xxd";
/// Docker's.
const CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// A bundle with a busybox, and the container that is made of it; gone when it is dropped.
pub struct Bundle {
    /// Its `config.json`, which `create` and `run` write.
    pub config: Value,
    folder: TempDir,
    id: String,
    program: PathBuf,
}

impl Bundle {
    /// One whose program is a shell with this script.
    pub fn new(script: &str) -> Bundle {
        static NUMBER: AtomicU32 = AtomicU32::new(1);
        static LEFT_OVER: OnceLock<()> = OnceLock::new();
        LEFT_OVER.get_or_init(remove_left_over);
        let id = format!("test-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let prefix = format!("{PREFIX}-{}-", std::process::id());
        let folder = tempfile::Builder::new().prefix(&prefix).tempdir().expect("make a folder for a bundle");
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("open the folder");
        fill(&folder.path().join("rootfs"));
        Bundle { config: config(script), folder, id, program: binary() }
    }

    /// The same, driven by a copy of the program.
    pub fn with_program(mut self, program: PathBuf) -> Bundle {
        self.program = program;
        self
    }

    /// The name of its container.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// A path in its folder, where its `config.json` is.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The same as text.
    pub fn text(&self, name: &str) -> String {
        self.path(name).to_str().expect("a path of ASCII").to_owned()
    }

    /// A path in its root file system.
    pub fn inside(&self, name: &str) -> PathBuf {
        self.path("rootfs").join(name)
    }

    /// Sets a field (`/process/cwd`); makes the objects above it.
    #[track_caller]
    pub fn set(mut self, field: &str, value: impl Into<Value>) -> Bundle {
        set(&mut self.config, field, value.into());
        self
    }

    /// Removes a field.
    #[track_caller]
    pub fn without(mut self, field: &str) -> Bundle {
        let (above, name) = field.rsplit_once('/').expect("a pointer");
        let object = self.config.pointer_mut(above).and_then(Value::as_object_mut).expect("an object");
        assert!(object.remove(name).is_some(), "{field} is there");
        self
    }

    /// Adds an element to a list, which is made if it is missing.
    #[track_caller]
    pub fn add(mut self, list: &str, value: Value) -> Bundle {
        if self.config.pointer(list).is_none() {
            set(&mut self.config, list, json!([]));
        }
        self.config.pointer_mut(list).and_then(Value::as_array_mut).expect("a list").push(value);
        self
    }

    /// Adds a mount.
    #[track_caller]
    pub fn mount(self, kind: &str, source: &str, destination: &str, options: &[&str]) -> Bundle {
        let entry = json!({"type": kind, "source": source, "destination": destination, "options": options});
        self.add("/mounts", entry)
    }

    /// Replaces a namespace by one with these fields; `Null` leaves it out.
    #[track_caller]
    pub fn namespace(mut self, kind: &str, new: Value) -> Bundle {
        let list = self.config.pointer_mut("/linux/namespaces").and_then(Value::as_array_mut).expect("a list");
        list.retain(|namespace| namespace["type"] != kind);
        if !new.is_null() {
            list.push(new);
        }
        self
    }

    /// Adds a hook, a shell with this script, on the host or inside.
    #[track_caller]
    pub fn hook(self, point: &str, script: &str) -> Bundle {
        let hook = json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"]});
        self.add(&format!("/hooks/{point}"), hook)
    }

    /// `moyai oci --root … ARGS`, killed when it takes for ever.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("timeout");
        command.args(["--foreground", "-k", "1", "60"]).arg(&self.program).args(["oci", "--root"]);
        command.arg(self.path("run")).args(args).stdin(Stdio::null());
        command
    }

    /// Runs it to its end.
    pub fn oci(&self, args: &[&str]) -> Output {
        self.finish(self.command(args), &format!("moyai oci {}", args.join(" ")))
    }

    /// Runs a command to its end, with its streams in files.
    pub fn finish(&self, mut command: Command, shown: &str) -> Output {
        static NUMBER: AtomicU32 = AtomicU32::new(1);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let [out, err] = ["out", "err"].map(|name| self.path(&format!("{name}.{number}")));
        command.stdout(File::create(&out).expect("make a file")).stderr(File::create(&err).expect("make a file"));
        let status = command.status().unwrap_or_else(|error| panic!("cannot run {shown}: {error}"));
        let signal = std::os::unix::process::ExitStatusExt::signal(&status).unwrap_or(0);
        let read = |path: &Path| String::from_utf8_lossy(&fs::read(path).expect("read a file")).into_owned();
        let done = Output {
            command: shown.to_owned(),
            code: status.code().unwrap_or(128 + signal),
            stdout: read(&out),
            stderr: read(&err),
        };
        assert!(!done.stderr.contains("panicked"), "{done}");
        done
    }

    /// Starts a command and leaves it; what it writes is in the files `NAME.out` and `NAME.err`.
    pub fn leave(&self, mut command: Command, name: &str) -> Background {
        let file = |kind: &str| File::create(self.path(&format!("{name}.{kind}"))).expect("make a file");
        command.stdout(file("out")).stderr(file("err"));
        Background(command.spawn().unwrap_or_else(|error| panic!("cannot run {name}: {error}")))
    }

    /// Writes the `config.json`.
    pub fn write(&self) {
        fs::write(self.path("config.json"), self.config.to_string()).expect("write config.json");
    }

    /// Creates the container; what it writes is what [`Bundle::said`] reads.
    pub fn create(&self, options: &[&str]) -> Output {
        self.write();
        let bundle = self.text("");
        let mut command = self.command(&[&["create", "--bundle", &bundle], options, &[&self.id]].concat());
        let (out, err) = (self.path("said"), self.path("create.err"));
        command.stdout(File::create(&out).expect("make a file")).stderr(File::create(&err).expect("make a file"));
        let status = command.status().expect("run timeout");
        Output {
            command: format!("moyai oci create {} {}", options.join(" "), self.id),
            code: status.code().unwrap_or(-1),
            stdout: String::new(),
            stderr: fs::read_to_string(&err).expect("read a file"),
        }
    }

    /// Creates it, and lets it run its program.
    #[track_caller]
    pub fn begin(&self) {
        self.create(&[]).ok();
        self.start().ok();
    }

    /// Lets it run its program.
    pub fn start(&self) -> Output {
        self.oci(&["start", &self.id])
    }

    /// Runs it to its end, in front.
    pub fn run(&self) -> Output {
        self.write();
        self.oci(&["run", "--bundle", &self.text(""), &self.id])
    }

    /// Runs it, which must succeed, and returns what it wrote.
    #[track_caller]
    pub fn prints(&self) -> String {
        self.run().ok().stdout
    }

    /// Adds a process and waits for its end.
    pub fn exec(&self, args: &[&str]) -> Output {
        self.oci(&[&["exec", &self.id], args].concat())
    }

    /// The same with options.
    pub fn exec_with(&self, options: &[&str], args: &[&str]) -> Output {
        self.oci(&[&["exec"], options, &[&self.id], args].concat())
    }

    /// What it is.
    #[track_caller]
    pub fn state(&self) -> Value {
        let output = self.oci(&["state", &self.id]).ok();
        serde_json::from_str(&output.stdout).unwrap_or_else(|error| panic!("no JSON ({error}): {output}"))
    }

    /// created, running, …
    #[track_caller]
    pub fn status(&self) -> String {
        self.state()["status"].as_str().expect("a status").to_owned()
    }

    /// Its first process.
    #[track_caller]
    pub fn pid(&self) -> u32 {
        self.state()["pid"].as_u64().expect("a pid") as u32
    }

    /// Waits until it has a status.
    #[track_caller]
    pub fn wait_until(&self, status: &str) {
        wait_for(&format!("{} to be {status}", self.id), PATIENCE, || (self.status() == status).then_some(()));
    }

    /// What it has written since `create`.
    pub fn said(&self) -> String {
        fs::read_to_string(self.path("said")).unwrap_or_default()
    }

    /// Waits until it has written `text`.
    #[track_caller]
    pub fn wait_to_say(&self, text: &str) {
        wait_for(&format!("it to write `{text}`"), PATIENCE, || self.said().contains(text).then_some(()));
    }

    /// The folders of its cgroup, if it is called as usual.
    pub fn groups(&self) -> Vec<PathBuf> {
        groups(&format!("moyai-oci/{}", self.id))
    }

    /// Nothing of it is left: no state, no cgroup.
    #[track_caller]
    pub fn is_gone(&self) {
        let kept = containers(&self.path("run"));
        assert!(kept.is_empty(), "left behind: {kept:?}");
        assert!(self.groups().is_empty(), "left behind: {:?}", self.groups());
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- said by {}: {}", self.id, self.said());
        }
        for id in containers(&self.path("run")) {
            let _gone = self.oci(&["delete", "--force", &id]);
        }
    }
}

/// The folders of a cgroup in every hierarchy that has it.
pub fn groups(path: &str) -> Vec<PathBuf> {
    let hierarchies = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten();
    let v1 = hierarchies.map(|hierarchy| hierarchy.path().join(path));
    v1.chain([Path::new("/sys/fs/cgroup").join(path)]).filter(|group| group.is_dir()).collect()
}

/// A process that is killed when it is dropped.
pub struct Background(pub Child);

impl Background {
    /// Waits for its end, and returns its exit code.
    #[track_caller]
    pub fn wait(&mut self) -> i32 {
        let end = wait_for("a process to end", PATIENCE, || self.0.try_wait().expect("wait for a child"));
        let signal = std::os::unix::process::ExitStatusExt::signal(&end).unwrap_or(0);
        end.code().unwrap_or(128 + signal)
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let _ended = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// Listens at a socket, and takes the descriptor that is sent there. As safe Rust has no recvmsg, a perl does it.
///
/// It prints the bytes that came with it in one line. Of a terminal it then types `typed` and prints what is shown, to the end;
/// of a seccomp filter it answers one question with "operation not permitted" and prints its system call's number. Before
/// Linux 6.11 whoever waits for another is not told that nobody is left to ask.
pub fn take_descriptor(bundle: &Bundle, name: &str, what: &str, typed: &str) -> Background {
    const SCRIPT: &str = r#"
use strict; use Socket;
my ($number, $path, $what, $typed) = @ARGV;
sub pointer { unpack("Q", pack("P", $_[0])) }
socket(my $server, AF_UNIX, SOCK_STREAM, 0) or die $!;
bind($server, pack_sockaddr_un("$path.new")) or die $!;
listen($server, 1) or die $!;
rename("$path.new", $path) or die $!;
accept(my $client, $server) or die $!;
my ($data, $control) = ("\0" x 65536, "\0" x 256);
my $vector = pack("QQ", pointer($data), length $data);
my $message = pack("QLx4QQQQlx4", 0, 0, pointer($vector), 1, pointer($control), length $control, 0);
my $len = syscall($number + 0, fileno($client), $message, 0);
die "recvmsg: $!" if $len < 0;
$| = 1;
print substr($data, 0, $len), "\n";
my $fd = unpack("l", substr($control, 16, 4));
open(my $file, "+<&=", $fd) or die $!;
if ($what eq "terminal") {
    syswrite($file, $typed);
    my $text;
    print $text while sysread($file, $text, 4096);
} else {
    my $question = "\0" x 80;
    ioctl($file, 0xc0502100, $question) or die $!;
    my ($id, undef, undef, $call) = unpack("QLLl", $question);
    print "call $call\n";
    my $answer = pack("QqlL", $id, 0, -1, 0);
    ioctl($file, 0xc0182101, $answer) or die $!;
}
"#;
    let recvmsg = if cfg!(target_arch = "x86_64") { "47" } else { "212" };
    let mut command = Command::new("perl");
    command.args(["-e", SCRIPT, recvmsg]).arg(bundle.path(name)).args([what, typed]).stdin(Stdio::null());
    let taker = bundle.leave(command, name);
    wait_for("somebody to listen", PATIENCE, || bundle.path(name).exists().then_some(()));
    taker
}

fn set(config: &mut Value, field: &str, value: Value) {
    let mut at = config;
    for name in field.split('/').skip(1) {
        at = match name.parse::<usize>() {
            Ok(number) if at.is_array() => &mut at[number],
            _ => &mut at[name],
        };
    }
    *at = value;
}

fn fill(root: &Path) {
    for name in ["bin", "proc", "sys", "dev", "etc", "tmp", "root"] {
        fs::create_dir_all(root.join(name)).expect("make a folder");
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).expect("copy busybox (tests/run installs busybox-static)");
    for name in PROGRAMS.split_whitespace() {
        symlink("busybox", root.join("bin").join(name)).expect("make a link");
    }
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).expect("change a mode");
}

fn config(script: &str) -> Value {
    let sets: serde_json::Map<String, Value> =
        ["bounding", "effective", "permitted"].map(|set| (set.to_owned(), json!(CAPABILITIES))).into_iter().collect();
    let namespaces = ["pid", "network", "ipc", "uts", "mount", "cgroup"].map(|kind| json!({"type": kind}));
    json!({
        "ociVersion": "1.2.0",
        "process": {
            "terminal": false,
            "user": {"uid": 0, "gid": 0},
            "args": ["sh", "-c", script],
            "env": ["PATH=/usr/bin:/bin"],
            "cwd": "/",
            "capabilities": sets,
            "noNewPrivileges": true,
        },
        "root": {"path": "rootfs", "readonly": false},
        "hostname": "inside",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
                "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
                "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]},
        ],
        "linux": {
            "namespaces": namespaces,
            "maskedPaths": ["/proc/asound", "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware",
                "/sys/devices/virtual/powercap"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    })
}

/// The containers below a `--root`.
fn containers(root: &Path) -> Vec<String> {
    let entries = fs::read_dir(root).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).filter(|id| id != "~filters").collect()
}

/// Removes what tests left that were killed.
fn remove_left_over() {
    for entry in fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid =
            name.strip_prefix(PREFIX).and_then(|rest| rest.trim_start_matches('-').split('-').next()?.parse().ok());
        if pid.is_none_or(|pid: u32| Path::new(&format!("/proc/{pid}")).exists()) {
            continue;
        }
        let root = entry.path().join("run");
        for id in containers(&root) {
            let mut command = Command::new(binary());
            command.args(["oci", "--root"]).arg(&root).args(["delete", "--force", &id]);
            let _gone = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
        }
        let _gone = fs::remove_dir_all(entry.path());
    }
}
