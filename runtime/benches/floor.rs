//! About what a hundred containers of `/bin/true` at once take of the kernel itself: a start's system calls with nothing around them,
//! and without those that count little (a filter, capabilities, device rules). With the folder of an OCI bundle as argument, `crun run`
//! of that in the same rounds.
//!
//! `cargo bench -p moyai-runtime --bench floor -- BUNDLE`, as root. Prints medians; decides nothing.
//!
//! - *directly*: from the fork of a parent for each to its word that the program has ended;
//! - *made ahead*: before the clock starts, each has its parent, its first process in all namespaces, and every mount that is alike in
//!   all containers;
//! - *groups too*: and its cgroups with their limits.

#![allow(unsafe_code)]

mod beside;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::exit;

use beside::{crun, milliseconds, print};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, chdir, fork, pivot_root};

const AT_ONCE: usize = 100;
const ROUNDS: usize = 7;
const TOP: &str = "/sys/fs/cgroup";
/// Of v1.
const CONTROLLERS: [&str; 6] = ["cpu", "cpuacct", "devices", "freezer", "memory", "pids"];
const NONE: Option<&str> = None;

#[derive(Copy, Clone)]
struct Way {
    name: &'static str,
    ahead: bool,
    groups_ahead: bool,
}

fn main() {
    // Nothing of this process is a child's to put in order.
    std::panic::set_hook(Box::new(|panic| {
        eprintln!("{panic}");
        exit(101)
    }));
    let bundle = std::env::args().nth(1).filter(|word| word != "--bench").map(PathBuf::from);
    let dir = tempfile::tempdir().expect("a folder");
    let image = dir.path().join("image");
    fs::create_dir_all(image.join("bin")).expect("a folder");
    fs::copy("/bin/busybox", image.join("bin/true")).expect("Debian's busybox-static");
    let ways = [
        Way { name: "directly", ahead: false, groups_ahead: false },
        Way { name: "made ahead", ahead: true, groups_ahead: false },
        Way { name: "groups too", ahead: true, groups_ahead: true },
    ];
    let mut times = ways.map(|_| Vec::new());
    let mut theirs = Vec::new();
    for _ in 0..ROUNDS {
        for (way, times) in ways.iter().zip(&mut times) {
            times.push(round(dir.path(), &image, *way));
        }
        if let Some(bundle) = &bundle {
            theirs.push(milliseconds(|| crun(bundle, AT_ONCE)));
        }
    }
    for (way, times) in ways.iter().zip(&mut times) {
        print(AT_ONCE, way.name, times);
    }
    print(AT_ONCE, "by crun", &mut theirs);
}

/// One container.
struct One<'a> {
    at: usize,
    dir: PathBuf,
    image: &'a Path,
    groups: Vec<PathBuf>,
}

/// Milliseconds from the first word to the last answer.
fn round(dir: &Path, image: &Path, way: Way) -> f64 {
    let one = |at: usize| {
        let dir = dir.join(at.to_string());
        for name in ["upper", "work", "root", "proc", "dev", "sys"] {
            fs::create_dir_all(dir.join(name)).expect("a folder");
        }
        let one = One { at, dir, image, groups: groups(at) };
        if way.groups_ahead {
            one.make_groups();
        }
        one
    };
    let all: Vec<One<'_>> = (0..AT_ONCE).map(one).collect();
    let begin = |one: &One<'_>| {
        let (mine, its) = UnixStream::pair().expect("a socket");
        // SAFETY: this process has one thread, so the child may run any code.
        match unsafe { fork() }.expect("a process") {
            ForkResult::Child => {
                drop(mine);
                one.parent(its, way)
            }
            ForkResult::Parent { .. } => mine,
        }
    };
    let early: Vec<UnixStream> = all.iter().filter(|_| way.ahead).map(begin).collect();
    early.iter().for_each(hear);
    let took = milliseconds(|| {
        let lines = if way.ahead { early } else { all.iter().map(begin).collect() };
        lines.iter().for_each(say);
        lines.iter().for_each(hear);
    });
    for _ in &all {
        nix::sys::wait::wait().expect("a child");
    }
    all.iter().for_each(|one| fs::remove_dir_all(&one.dir).expect("a folder"));
    took
}

fn groups(at: usize) -> Vec<PathBuf> {
    let name = format!("moyai-floor-{}-{at}", std::process::id());
    if Path::new(TOP).join("cgroup.controllers").exists() {
        return vec![Path::new(TOP).join(name)];
    }
    // Two may be one: `cpu,cpuacct`.
    let hierarchy = |controller: &&str| fs::canonicalize(Path::new(TOP).join(controller)).expect("a hierarchy");
    let mut groups: Vec<PathBuf> = CONTROLLERS.iter().map(hierarchy).collect();
    groups.sort();
    groups.dedup();
    groups.into_iter().map(|group| group.join(&name)).collect()
}

impl One<'_> {
    fn make_groups(&self) {
        for group in &self.groups {
            fs::create_dir(group).expect("a cgroup");
            for (file, value) in
                [("memory.limit_in_bytes", "67108864"), ("memory.max", "67108864"), ("pids.max", "100")]
            {
                if group.join(file).exists() {
                    fs::write(group.join(file), value).expect("a limit");
                }
            }
        }
    }

    /// Makes it, and says when it has ended.
    fn parent(&self, line: UnixStream, way: Way) -> ! {
        set_pdeathsig(Signal::SIGKILL).expect("a parent");
        unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace");
        mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE).expect("its own mounts");
        let (gate, inside) = UnixStream::pair().expect("a socket");
        let kinds =
            CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNET;
        unshare(kinds).expect("namespaces");
        // SAFETY: this process has one thread, so the child may run any code.
        let child = match unsafe { fork() }.expect("a process") {
            ForkResult::Child => {
                drop((gate, line));
                self.init(&inside)
            }
            ForkResult::Parent { child } => child,
        };
        drop(inside);
        hear(&gate);
        if way.ahead {
            say(&line);
        }
        hear(&line);
        if !way.groups_ahead {
            self.make_groups();
        }
        say(&gate);
        assert_eq!(waitpid(child, None), Ok(WaitStatus::Exited(child, 0)), "container {}", self.at);
        self.groups.iter().for_each(|group| fs::remove_dir(group).expect("an empty cgroup"));
        say(&line);
        exit(0)
    }

    /// Becomes the program.
    fn init(&self, gate: &UnixStream) -> ! {
        set_pdeathsig(Signal::SIGKILL).expect("a parent");
        unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace");
        let plain = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        let put = |what: &str, at: &Path, flags: MsFlags, options: Option<&str>| {
            mount(Some(what), at, Some(what), flags, options).unwrap_or_else(|error| panic!("{what}: {error}"));
        };
        chdir(&self.dir).expect("its folder");
        put("proc", Path::new("proc"), plain, NONE);
        put("sysfs", Path::new("sys"), plain | MsFlags::MS_RDONLY, NONE);
        put("tmpfs", Path::new("dev"), MsFlags::MS_NOSUID, Some("mode=755,size=65536k"));
        for (name, major, minor) in
            [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)]
        {
            let mode = Mode::from_bits_truncate(0o666);
            mknod(&Path::new("dev").join(name), SFlag::S_IFCHR, mode, makedev(major, minor)).expect("a device");
        }
        for (name, kind, options) in
            [("pts", "devpts", "newinstance,ptmxmode=0666"), ("shm", "tmpfs", "mode=1777"), ("mqueue", "mqueue", "")]
        {
            let at = Path::new("dev").join(name);
            fs::create_dir(&at).expect("a folder");
            put(kind, &at, plain, Some(options));
        }
        say(gate);
        hear(gate);
        for group in &self.groups {
            let file = ["tasks", "cgroup.procs"].map(|file| group.join(file)).into_iter().find(|file| file.exists());
            fs::write(file.expect("a cgroup"), "0").expect("a process in it");
        }
        unshare(CloneFlags::CLONE_NEWCGROUP).expect("a cgroup namespace");
        let options = format!("lowerdir={},upperdir=upper,workdir=work", self.image.display());
        put("overlay", Path::new("root"), MsFlags::MS_NODEV, Some(&options));
        for name in ["proc", "dev", "sys"] {
            let to = Path::new("root").join(name);
            fs::create_dir(&to).expect("a folder");
            mount(Some(name), &to, NONE, MsFlags::MS_MOVE, NONE).expect("a mount in its place");
        }
        let cgroups = Path::new("root").join("sys/fs/cgroup");
        if self.groups.len() == 1 {
            put("cgroup2", &cgroups, plain | MsFlags::MS_RDONLY, NONE);
        } else {
            put("tmpfs", &cgroups, plain, Some("mode=755"));
            for controller in CONTROLLERS {
                fs::create_dir(cgroups.join(controller)).expect("a folder");
                put("cgroup", &cgroups.join(controller), plain | MsFlags::MS_RDONLY, Some(controller));
            }
        }
        chdir("root").expect("its root");
        pivot_root(".", ".").expect("another root");
        umount2(".", MntFlags::MNT_DETACH).expect("no old root");
        let (program, none): (_, [&std::ffi::CStr; 0]) = (c"/bin/true", []);
        let failed = nix::unistd::execve(program, &[program], &none);
        panic!("{failed:?}")
    }
}

fn say(mut line: &UnixStream) {
    line.write_all(&[0]).expect("somebody who hears");
}

fn hear(mut line: &UnixStream) {
    line.read_exact(&mut [0]).expect("somebody who says something");
}
