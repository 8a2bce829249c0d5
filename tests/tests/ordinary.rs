//! A node whose daemon is an ordinary user's: what works, and what it says of the rest.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use moyai_tests::hostile::{Entry, docker_archive, tar};
use moyai_tests::lab::binary;
use moyai_tests::{Host, Lab, Output, PATIENCE, images, wait_for};

/// Two hosts: lab-1 is root's, lab-2 has a user `ann` and her home.
struct Bench {
    lab: Lab,
    home: PathBuf,
    program: PathBuf,
    /// Another for each: a user's daemon joins the namespace of any shim of that user on the machine, a lab's beside it too.
    uid: u32,
}

impl Bench {
    /// `ids` are the ids that ann has besides her own.
    fn new(ids: &str) -> Bench {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        // No other process has this one's number, and no test of it the same ten millions.
        let uid = (NUMBER.fetch_add(1, Ordering::Relaxed) + 1) * 10_000_000 + std::process::id();
        let lab = Lab::new(2);
        let open =
            |path: &PathBuf, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("set a mode");
        open(&lab.folder().to_owned(), 0o755);
        let (home, etc, program) = (lab.folder().join("ann"), lab.folder().join("etc"), lab.folder().join("moyai"));
        fs::create_dir(&home).expect("make a folder");
        std::os::unix::fs::chown(&home, Some(uid), Some(uid)).expect("give it away");
        fs::copy(binary(), &program).expect("copy the program");
        open(&program, 0o755);
        fs::create_dir(&etc).expect("make a folder");
        let passwd = fs::read_to_string("/etc/passwd").expect("users");
        let ann = format!("ann:x:{uid}:{uid}::{}:/bin/sh\n", home.display());
        fs::write(etc.join("passwd"), passwd + &ann).expect("write a file");
        fs::write(etc.join("subuid"), ids).expect("write a file");
        fs::write(etc.join("subgid"), ids).expect("write a file");
        let [one, two] = lab.hosts();
        two.boot_with(&format!("mount -t overlay overlay -o lowerdir={}:/etc /etc", etc.display()));
        one.moyai(&["init"]).ok();
        one.load(&images::alpine());
        Bench { lab, home, program, uid }
    }

    fn hosts(&self) -> [&Host; 2] {
        self.lab.hosts()
    }

    /// The command line as ann has it.
    fn ann(&self, args: &[&str]) -> Output {
        let [_, two] = self.hosts();
        let home = format!("HOME={}", self.home.display());
        let uid = self.uid.to_string();
        let become_ann = ["--reuid", &uid, "--regid", &uid, "--clear-groups", "env", "-u", "XDG_DATA_HOME", &home];
        let program = self.program.to_string_lossy();
        let mut command = two.command("setpriv", &[&become_ann[..], &[&*program], args].concat());
        command.current_dir("/");
        Output::of(command, format!("ann: moyai {}", args.join(" ")))
    }

    fn join(&self) {
        let [one, _] = self.hosts();
        let ticket = one.ticket(&[]);
        self.ann(&["join", &ticket]).ok();
        wait_for("both to be alive", PATIENCE, || (one.alive().len() == 2).then_some(()));
    }
}

#[test]
fn an_ordinary_user_s_node_runs_containers_and_says_what_it_cannot() {
    let bench = Bench::new("ann:200000:65536\n");
    let [one, _] = bench.hosts();
    bench.join();
    let there = |options: &[&str], script: &str| {
        one.moyai(&[&["run", "--rm", "--on", "node=lab-2"], options, &["alpine", "sh", "-c", script]].concat())
    };
    let output = there(&[], "id -u; cat /proc/self/uid_map; echo out; echo err >&2; exit 3");
    assert_eq!(output.code, 3, "{output}");
    assert!(output.stdout.starts_with("0\n") && output.stdout.contains("200000"), "{output}");
    assert!(output.stdout.contains("out\n") && output.stderr.contains("err"), "{output}");
    assert_eq!(there(&[], "ls /sys/class/net; echo x > /file; cat /file").ok().stdout, "lo\nx\n");
    there(&["--user", "1000"], "id -u; touch /tmp/mine").ok().says("1000");
    there(&[], "echo x > /dev/null && head -c 4 /dev/urandom | wc -c").ok().says("4");
    there(&["-v", "data:/data"], "echo kept > /data/file").ok();
    assert_eq!(there(&["-v", "data:/data"], "cat /data/file").ok().stdout, "kept\n");
    for (options, lacks) in [
        (&["--memory", "64m"][..], "limits"),
        (&["-p", "8080:80"], "a bridge"),
        (&["--sandbox", "strict"], "a strict sandbox"),
    ] {
        there(options, "true").fails(125).says(lacks).says("ordinary user");
    }
    wait_for("what was refused to be taken back", PATIENCE, || {
        one.workloads().iter().for_each(|row| drop(one.moyai(&["rm", "-f", row["name"].as_str().unwrap_or_default()])));
        one.workloads().is_empty().then_some(())
    });

    // Ann commands as anybody does; what she runs outlives her daemon, and the next one reaches it.
    bench
        .ann(&["run", "-d", "--stop-timeout", "0", "--name", "web", "--on", "node=lab-2", "alpine", "sleep", "1000"])
        .ok();
    assert_eq!(bench.ann(&["exec", "web", "echo", "inside"]).ok().stdout, "inside\n");
    bench.ann(&["down"]).ok();
    bench.ann(&["up"]).ok();
    wait_for("it to be known again", PATIENCE, || (one.workload("web")?["state"] == "running").then_some(()));
    assert_eq!(one.workload("web").expect("a workload")["restarts"], 0);
    assert_eq!(one.moyai(&["exec", "web", "echo", "still"]).ok().stdout, "still\n");
    let file = bench.home.join("hosts");
    bench.ann(&["cp", "web:/etc/hostname", &file.to_string_lossy()]).ok();
    assert!(file.exists());
    bench.ann(&["rm", "-f", "web"]).ok();
    wait_for("it to be gone", PATIENCE, || one.workloads().is_empty().then_some(()));
    bench.ann(&["down"]).ok();
}

#[test]
fn without_more_ids_it_says_so_and_runs_what_is_root_s() {
    let bench = Bench::new("");
    let [one, _] = bench.hosts();
    let ticket = one.ticket(&[]);
    bench.ann(&["join", &ticket]).ok().says("give this user no ids");
    wait_for("both to be alive", PATIENCE, || (one.alive().len() == 2).then_some(()));
    let busybox = fs::read("/bin/busybox").expect("busybox-static");
    let layer = tar(&[Entry::Folder("bin/".to_owned()), Entry::File("bin/id".to_owned(), busybox)]);
    let archive = bench.lab.folder().join("plain.tar");
    docker_archive(&archive, "plain", &[layer]);
    one.load(&archive);
    let output = one.moyai(&["run", "--rm", "--on", "node=lab-2", "plain", "id", "-u"]);
    assert_eq!(output.ok().stdout, "0\n");
    // An image with other owners than root is refused for that, and not for anything less clear.
    let run = one.start(&["run", "--rm", "--on", "node=lab-2", "--name", "owned", "alpine", "id", "-u"]);
    wait_for("it to be said why", PATIENCE, || {
        one.workload("owned")?["detail"].as_str()?.contains("is not among this user's ids").then_some(())
    });
    drop(run);
    one.moyai(&["rm", "-f", "owned"]).ok();
    bench.ann(&["down"]).ok();
}
