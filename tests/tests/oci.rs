//! `moyai oci` against the OCI runtime-spec 1.2, clause by clause: what it must do with a bundle, what it must refuse, and what
//! an image must not be able to do to the host.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown, symlink};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use moyai_tests::bundle::{Background, Bundle, groups, take_descriptor};
use moyai_tests::container::namespace;
use moyai_tests::lab::copy_binary;
use moyai_tests::{Output, PATIENCE, has_linux, wait_for};
use serde_json::{Value, json};

const ALL: [&str; 6] = ["mnt", "uts", "ipc", "pid", "net", "cgroup"];

/// It failed, and says why in one line.
#[track_caller]
fn refused(output: &Output) {
    assert_ne!(output.code, 0, "it should have failed: {output}");
    assert!(output.stderr.starts_with("error: ") || output.stderr.contains("\nerror: "), "no reason from {output}");
}

fn alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.starts_with(" Z") && !rest.starts_with(" X"))
}

/// Whether this machine has one tree for all controllers.
fn one_tree() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

/// What a file of its cgroup says; its name in v1 and in v2.
#[track_caller]
fn group_value(bundle: &Bundle, controller: &str, [v1, v2]: [&str; 2]) -> String {
    let path = match one_tree() {
        true => format!("/sys/fs/cgroup/moyai-oci/{}/{v2}", bundle.id()),
        false => format!("/sys/fs/cgroup/{controller}/moyai-oci/{}/{v1}", bundle.id()),
    };
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}")).trim().to_owned()
}

/// The machine's tool, which must succeed.
#[track_caller]
fn tool(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Something mounted on the host, until it is dropped.
struct Mounted(String);

impl Mounted {
    fn tmpfs(path: &str) -> Mounted {
        fs::create_dir_all(path).expect("make a folder");
        tool("mount", &["-t", "tmpfs", "test", path]);
        Mounted(path.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _gone = Command::new("umount").args(["-l", "-R", &self.0]).output();
    }
}

// Lifecycle (runtime.md).

#[test]
fn state_has_the_fields_of_the_specification() {
    let bundle = Bundle::new("sleep 1000").set("/annotations", json!({"org.example.a": "b", "org.example.empty": ""}));
    bundle.create(&[]).ok();
    let state = bundle.state();
    assert!(state["ociVersion"].as_str().is_some_and(|version| version.starts_with("1.")), "{state}");
    assert_eq!(state["id"], bundle.id());
    assert_eq!(state["status"], "created");
    assert_eq!(state["bundle"], bundle.text("").trim_end_matches('/'));
    assert_eq!(state["annotations"], json!({"org.example.a": "b", "org.example.empty": ""}));
    let pid = state["pid"].as_u64().expect("a pid") as u32;
    assert!(alive(pid));
    assert_ne!(namespace(&pid.to_string(), "pid"), namespace("self", "pid"), "it is numbered as the host numbers it");
    bundle.start().ok();
    assert_eq!(bundle.pid(), pid, "the process that was created is the one that runs");
}

#[test]
fn a_container_is_created_running_and_stopped() {
    let bundle = Bundle::new("while [ ! -e /go ]; do usleep 10000; done");
    bundle.create(&[]).ok();
    assert_eq!(bundle.status(), "created");
    bundle.start().ok();
    assert_eq!(bundle.status(), "running");
    let pid = bundle.pid();
    fs::write(bundle.inside("go"), "").expect("write a file");
    bundle.wait_until("stopped");
    assert!(!alive(pid));
    bundle.oci(&["delete", bundle.id()]).ok();
    refused(&bundle.oci(&["state", bundle.id()]));
    bundle.is_gone();
    // What was deleted may be made again under the same name.
    bundle.create(&[]).ok();
    assert_eq!(bundle.status(), "created");
}

#[test]
fn create_does_not_run_the_program_until_start() {
    let bundle = Bundle::new("echo ran; sleep 1000");
    bundle.create(&[]).ok();
    let name = fs::read_to_string(format!("/proc/{}/comm", bundle.pid())).expect("a process");
    assert_ne!(name.trim(), "sh");
    assert_eq!(bundle.said(), "");
    bundle.start().ok();
    bundle.wait_to_say("ran");
}

#[test]
fn what_becomes_of_the_bundle_after_create_does_not_matter() {
    let mut bundle = Bundle::new("echo first; sleep 1000").set("/annotations/which", "first");
    bundle.create(&[]).ok();
    bundle.config["process"]["args"] = json!(["sh", "-c", "echo second"]);
    bundle.config["annotations"]["which"] = json!("second");
    bundle.write();
    bundle.start().ok();
    bundle.wait_to_say("first");
    assert_eq!(bundle.state()["annotations"]["which"], "first");
    fs::remove_file(bundle.path("config.json")).expect("remove it");
    bundle.exec(&["true"]).ok();
    bundle.oci(&["delete", "--force", bundle.id()]).ok();
    bundle.is_gone();
}

#[test]
fn what_does_not_fit_the_status_is_refused_and_changes_nothing() {
    let bundle = Bundle::new("sleep 1000");
    bundle.create(&[]).ok();
    refused(&bundle.create(&[]).says(bundle.id()));
    assert_eq!(bundle.status(), "created", "the one that has the name is left alone");
    refused(&bundle.oci(&["delete", bundle.id()]).says("created"));
    assert_eq!(bundle.status(), "created");
    bundle.start().ok();
    let pid = bundle.pid();
    refused(&bundle.start().says("running"));
    refused(&bundle.oci(&["delete", bundle.id()]).says("running"));
    refused(&bundle.create(&[]).says(bundle.id()));
    refused(&bundle.oci(&["resume", bundle.id()]).says("running"));
    assert_eq!((bundle.status(), bundle.pid()), ("running".to_owned(), pid));
    bundle.oci(&["kill", bundle.id(), "KILL"]).ok();
    bundle.wait_until("stopped");
    refused(&bundle.start().says("stopped"));
    refused(&bundle.oci(&["kill", bundle.id(), "KILL"]).says("stopped"));
    refused(&bundle.oci(&["pause", bundle.id()]).says("stopped"));
    refused(&bundle.exec(&["true"]).says("stopped"));
    refused(&bundle.create(&[]).says(bundle.id()));
    assert_eq!(bundle.status(), "stopped");
}

#[test]
fn what_does_not_exist_is_refused() {
    let bundle = Bundle::new("true");
    for verb in ["state", "start", "kill", "delete", "pause", "resume", "ps"] {
        refused(&bundle.oci(&[verb, "nobody"]).says("nobody"));
        assert_ne!(bundle.oci(&[verb]).code, 0, "{verb} without an id");
    }
    refused(&bundle.oci(&["exec", "nobody", "true"]).says("nobody"));
    bundle.oci(&["delete", "--force", "nobody"]).ok();
    refused(&bundle.oci(&["create", "--bundle", "/nonexistent", "new"]).says("/nonexistent"));
    refused(&bundle.oci(&["create", "--bundle", &bundle.text(""), "new"]).says("config.json"));
    bundle.is_gone();
}

#[test]
fn a_name_cannot_lead_out_of_the_folder_of_containers() {
    let bundle = Bundle::new("true");
    bundle.write();
    for id in ["../out", "a/b", "/etc", ".", "..", "", "a b", "a\nb", &"x".repeat(300)] {
        refused(&bundle.oci(&["create", "--bundle", &bundle.text(""), id]));
        refused(&bundle.oci(&["delete", "--force", id]));
        refused(&bundle.oci(&["state", id]));
    }
    assert!(!bundle.path("out").exists());
    bundle.is_gone();
}

#[test]
fn the_pid_file_names_the_first_process() {
    let bundle = Bundle::new("sleep 1000");
    let file = bundle.text("pid");
    bundle.create(&["--pid-file", &file]).ok();
    assert_eq!(fs::read_to_string(&file).expect("a pid file"), bundle.pid().to_string());
    let other = Bundle::new("sleep 1000");
    refused(&other.create(&["--pid-file", "/nonexistent/pid"]));
    other.is_gone();
}

#[test]
fn a_container_can_be_paused_and_resumed() {
    let bundle = Bundle::new("i=0; while :; do i=$((i+1)); echo $i > /count; usleep 1000; done");
    bundle.begin();
    let count = || fs::read_to_string(bundle.inside("count")).unwrap_or_default();
    wait_for("it to count", PATIENCE, || (!count().is_empty()).then_some(()));
    bundle.oci(&["pause", bundle.id()]).ok();
    bundle.wait_until("paused");
    let stopped = if one_tree() { "1" } else { "FROZEN" };
    wait_for("the freezer to say so", PATIENCE, || {
        (group_value(&bundle, "freezer", ["freezer.state", "cgroup.freeze"]) == stopped).then_some(())
    });
    refused(&bundle.exec(&["true"]).says("paused"));
    refused(&bundle.oci(&["delete", bundle.id()]).says("paused"));
    bundle.oci(&["resume", bundle.id()]).ok();
    assert_eq!(bundle.status(), "running");
    let before = count();
    wait_for("it to go on", PATIENCE, || (count() != before).then_some(()));
    bundle.oci(&["pause", bundle.id()]).ok();
    bundle.oci(&["delete", "--force", bundle.id()]).ok();
    bundle.is_gone();
}

#[test]
fn containers_and_their_processes_are_listed() {
    let bundle = Bundle::new("sleep 1000 & sleep 1000; :");
    bundle.begin();
    assert_eq!(bundle.oci(&["list", "--quiet"]).ok().text(), bundle.id());
    let list: Value = serde_json::from_str(&bundle.oci(&["list", "--format", "json"]).ok().stdout).expect("JSON");
    assert_eq!((&list[0]["id"], &list[0]["status"]), (&json!(bundle.id()), &json!("running")), "{list}");
    assert!(
        bundle.oci(&["list"]).ok().stdout.lines().any(|line| line.contains(bundle.id()) && line.contains("running"))
    );
    wait_for("three processes", PATIENCE, || {
        let pids = bundle.oci(&["ps", "--format", "json", bundle.id()]).ok().json();
        let pids: Vec<u64> = pids.as_array()?.iter().filter_map(Value::as_u64).collect();
        (pids.len() == 3 && pids.contains(&u64::from(bundle.pid()))).then_some(())
    });
}

#[test]
fn of_several_at_once_one_creates_and_one_starts() {
    let bundle = Bundle::new("echo ran; sleep 1000");
    bundle.write();
    let at_once = |args: &[&str]| {
        let mut all: Vec<_> =
            (0..6).map(|number| bundle.leave(bundle.command(args), &format!("once.{number}"))).collect();
        all.iter_mut().map(|one| one.wait()).filter(|code| *code == 0).count()
    };
    assert_eq!(at_once(&["create", "--bundle", &bundle.text(""), bundle.id()]), 1);
    assert_eq!(bundle.status(), "created");
    assert_eq!(at_once(&["start", bundle.id()]), 1);
    assert_eq!(bundle.status(), "running");
    bundle.oci(&["delete", "--force", bundle.id()]).ok();
    bundle.is_gone();
}

#[test]
fn a_run_leaves_nothing_behind() {
    let mounts = || fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    let bundle = Bundle::new("echo out; echo err >&2; sleep 1000 & exit 7")
        .mount("bind", "rootfs", "/mnt", &["rbind"])
        .mount("tmpfs", "tmpfs", "/tmp", &[]);
    let before = mounts();
    let output = bundle.run().exits(7);
    assert_eq!((&*output.stdout, &*output.stderr), ("out\n", "err\n"));
    bundle.is_gone();
    // Other tests mount and unmount meanwhile.
    let own: Vec<String> =
        mounts().lines().filter(|line| line.contains(&*bundle.text(""))).map(str::to_owned).collect();
    assert!(own.is_empty() || before == mounts(), "{own:?}");
    assert_eq!(fs::read_dir(bundle.inside("proc")).expect("a folder").count(), 0);
    assert_eq!(fs::read_dir(bundle.inside("dev")).expect("a folder").count(), 0);
}

#[test]
fn delete_force_ends_what_runs() {
    let bundle = Bundle::new("trap '' TERM; sleep 1000 & sleep 1000");
    bundle.begin();
    let pids = bundle.oci(&["ps", bundle.id()]).ok();
    let pid = bundle.pid();
    assert!(pids.stdout.lines().any(|line| line == pid.to_string()), "{pids}");
    bundle.oci(&["delete", "--force", bundle.id()]).ok();
    for pid in pids.stdout.lines() {
        assert!(!alive(pid.parse().expect("a number")), "{pid} lives");
    }
    bundle.is_gone();
}

#[test]
fn delete_force_ends_processes_that_have_no_pid_namespace_of_their_own() {
    let bundle =
        Bundle::new("setsid sleep 1000 & setsid sleep 1000 & echo ready; sleep 1000").namespace("pid", Value::Null);
    bundle.begin();
    bundle.wait_to_say("ready");
    let pids = wait_for("all to run", PATIENCE, || {
        Some(bundle.oci(&["ps", bundle.id()]).ok().stdout).filter(|text| text.lines().count() >= 3)
    });
    bundle.oci(&["delete", "--force", bundle.id()]).ok();
    for pid in pids.lines() {
        assert!(!alive(pid.parse().expect("a number")), "{pid} lives");
    }
    bundle.is_gone();
}

#[test]
fn kill_sends_a_signal_by_name_or_number() {
    let script = "for s in HUP USR1 TERM; do trap \"echo got $s\" $s; done; echo ready; while :; do sleep 0.01; done";
    let bundle = Bundle::new(script);
    bundle.begin();
    bundle.wait_to_say("ready");
    for (given, name) in [("HUP", "HUP"), ("SIGUSR1", "USR1"), ("15", "TERM")] {
        bundle.oci(&["kill", bundle.id(), given]).ok();
        bundle.wait_to_say(&format!("got {name}"));
    }
    for wrong in ["NOSUCH", "SIGNOSUCH", "100000", "-3", ""] {
        refused(&bundle.oci(&["kill", "--", bundle.id(), wrong]));
    }
    assert_eq!(bundle.status(), "running");
    bundle.oci(&["kill", bundle.id(), "9"]).ok();
    bundle.wait_until("stopped");
}

#[test]
fn kill_sends_term_when_nothing_is_said_and_reaches_all_when_asked() {
    let bundle = Bundle::new(
        "trap 'echo term' TERM; sh -c \"trap 'echo child' TERM; while :; do sleep 0.01; done\" & \
        sleep 1000 & echo ready; while :; do sleep 0.01; done",
    );
    bundle.begin();
    bundle.wait_to_say("ready");
    bundle.oci(&["kill", bundle.id()]).ok();
    bundle.wait_to_say("term");
    assert!(!bundle.said().contains("child"), "the first process alone");
    wait_for("the child to get it", PATIENCE, || {
        bundle.oci(&["kill", "--all", bundle.id(), "TERM"]).ok();
        bundle.said().contains("child").then_some(())
    });
    bundle.oci(&["kill", "--all", bundle.id(), "KILL"]).ok();
    bundle.wait_until("stopped");
}

#[test]
fn a_created_container_can_be_killed() {
    let bundle = Bundle::new("echo ran");
    bundle.create(&[]).ok();
    bundle.oci(&["kill", bundle.id(), "KILL"]).ok();
    bundle.wait_until("stopped");
    refused(&bundle.start());
    bundle.oci(&["delete", bundle.id()]).ok();
    assert_eq!(bundle.said(), "");
    bundle.is_gone();
}

#[test]
fn run_ends_as_the_program_ends() {
    let ends = |args: Value, code: i32| {
        let bundle = Bundle::new("").set("/process/args", args);
        let output = bundle.run().exits(code);
        bundle.is_gone();
        output
    };
    ends(json!(["sh", "-c", "exit 3"]), 3);
    ends(json!(["sh", "-c", "sh -c 'kill -9 $$'; exit $?"]), 137);
    refused(&ends(json!(["nosuchprogram"]), 127).says("nosuchprogram"));
    refused(&ends(json!(["/bin/nosuchprogram"]), 127).says("/bin/nosuchprogram"));
    refused(&ends(json!(["/etc"]), 126).says("/etc"));
}

#[test]
fn run_detached_returns_and_keeps_it() {
    let bundle = Bundle::new("sleep 1000");
    bundle.write();
    bundle.oci(&["run", "--detach", "--bundle", &bundle.text(""), bundle.id()]).ok();
    assert_eq!(bundle.status(), "running");
    bundle.oci(&["kill", bundle.id(), "KILL"]).ok();
    bundle.wait_until("stopped");
    bundle.oci(&["delete", bundle.id()]).ok();
    bundle.is_gone();
}

#[test]
fn run_passes_signals_on() {
    let bundle = Bundle::new("trap 'echo got; exit 5' TERM; echo ready; while :; do sleep 0.01; done");
    bundle.write();
    let mut command = Command::new(moyai_tests::lab::binary());
    command.args(["oci", "--root"]).arg(bundle.path("run")).args(["run", "--bundle", &bundle.text(""), bundle.id()]);
    let mut run = bundle.leave(command, "front");
    wait_for("it to run", PATIENCE, || fs::read_to_string(bundle.path("front.out")).ok().filter(|it| it == "ready\n"));
    moyai_tests::host::signal("TERM", &[run.0.id()]);
    assert_eq!(run.wait(), 5);
    bundle.is_gone();
}

#[test]
fn a_container_without_a_process_can_be_created_and_not_started() {
    let bundle = Bundle::new("").without("/process");
    bundle.create(&[]).ok();
    assert_eq!(bundle.status(), "created");
    refused(&bundle.start().says("process"));
    bundle.wait_until("stopped");
    bundle.oci(&["delete", bundle.id()]).ok();
    bundle.is_gone();
}

#[test]
fn features_say_what_there_is() {
    let bundle = Bundle::new("");
    let features: Value = serde_json::from_str(&bundle.oci(&["features"]).ok().stdout).expect("JSON");
    let has = |field: &str, value: &str| {
        let list = features.pointer(field).and_then(Value::as_array);
        assert!(list.is_some_and(|list| list.iter().any(|one| one == value)), "{value} in {field}: {features}");
    };
    assert_eq!(features["ociVersionMin"], "1.0.0");
    for hook in ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"] {
        has("/hooks", hook);
    }
    for kind in ["pid", "network", "ipc", "uts", "mount", "cgroup", "user", "time"] {
        has("/linux/namespaces", kind);
    }
    for option in ["bind", "rbind", "ro", "rro", "nosuid", "tmpcopyup", "idmap", "rshared"] {
        has("/mountOptions", option);
    }
    has("/linux/capabilities", "CAP_SYS_ADMIN");
    has("/linux/seccomp/actions", "SCMP_ACT_NOTIFY");
    has("/linux/seccomp/operators", "SCMP_CMP_MASKED_EQ");
    assert_eq!(features.pointer("/linux/cgroup/v1"), Some(&json!(true)));
}

#[test]
fn update_changes_the_limits_of_what_runs() {
    let bundle = Bundle::new("sleep 1000").set("/linux/resources/pids/limit", 20).mount("tmpfs", "tmpfs", "/held", &[]);
    bundle.begin();
    let file = bundle.text("resources.json");
    fs::write(&file, json!({"memory": {"limit": 64 << 20}, "pids": {"limit": 33}}).to_string()).expect("write");
    bundle.oci(&["update", "--resources", &file, bundle.id()]).ok();
    assert_eq!(group_value(&bundle, "memory", ["memory.limit_in_bytes", "memory.max"]), (64 << 20).to_string());
    assert_eq!(group_value(&bundle, "pids", ["pids.max"; 2]), "33");
    if one_tree() {
        // v1 looks itself, and may swap what is there.
        bundle.exec(&["dd", "if=/dev/zero", "of=/held/x", "bs=1M", "count=32"]).ok();
        let limit = json!({"memory": {"limit": 8 << 20, "checkBeforeUpdate": true}});
        fs::write(&file, limit.to_string()).expect("write");
        refused(&bundle.oci(&["update", "--resources", &file, bundle.id()]).says("checkBeforeUpdate"));
        assert_eq!(bundle.state()["status"], "running");
    }
    // As docker says that it changes the weight alone.
    let memory =
        json!({"limit": 0, "reservation": 0, "swap": 0, "kernel": 0, "kernelTCP": 0, "checkBeforeUpdate": true});
    let zeros = json!({"memory": memory,
        "cpu": {"shares": 2048, "quota": 0, "period": 0, "realtimeRuntime": 0, "realtimePeriod": 0, "cpus": "", "mems": ""},
        "pids": {"limit": 0}});
    fs::write(&file, zeros.to_string()).expect("write");
    bundle.oci(&["update", "--resources", &file, bundle.id()]).ok();
    assert_eq!(group_value(&bundle, "memory", ["memory.limit_in_bytes", "memory.max"]), (64 << 20).to_string());
    assert_eq!(group_value(&bundle, "pids", ["pids.max"; 2]), "33");
    fs::write(&file, "{nonsense").expect("write");
    refused(&bundle.oci(&["update", "--resources", &file, bundle.id()]).says(&file));
}

#[test]
fn errors_go_to_the_log_too() {
    let bundle = Bundle::new("true");
    let log = bundle.text("log");
    refused(&bundle.oci(&["--log", &log, "--log-format", "json", "state", "nobody"]));
    let text = fs::read_to_string(&log).expect("a log");
    let line: Value = serde_json::from_str(text.trim()).expect("a line of JSON");
    assert_eq!(line["level"], "error");
    assert!(line["msg"].as_str().is_some_and(|text| text.contains("nobody")), "{line}");
}

// Hooks (config.md, "POSIX-platform Hooks"; runtime.md, "Lifecycle").

const POINTS: [&str; 6] = ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];

/// A bundle with its folder `shared` at the same place inside, where hooks of all points write.
fn with_hooks(script: &str, hook: impl Fn(&str, &str) -> String) -> Bundle {
    let mut bundle = Bundle::new(script);
    let shared = bundle.text("shared");
    fs::create_dir(&shared).expect("make a folder");
    bundle = bundle.mount("bind", &shared, "/shared", &["bind"]);
    for point in POINTS {
        let folder = if point == "startContainer" { "/shared" } else { &shared };
        bundle = bundle.hook(point, &hook(point, folder));
    }
    bundle
}

#[test]
fn hooks_run_in_their_order_around_the_program() {
    let mut bundle = with_hooks("echo program >> /shared/order; sleep 1000", |point, folder| {
        format!("echo {point} >> {folder}/order")
    });
    for point in POINTS {
        let folder = if point == "startContainer" { "/shared".to_owned() } else { bundle.text("shared") };
        bundle = bundle.hook(point, &format!("echo {point} again >> {folder}/order"));
    }
    let order = |bundle: &Bundle| fs::read_to_string(bundle.path("shared/order")).unwrap_or_default();
    let twice = |points: &[&str]| points.iter().map(|point| format!("{point}\n{point} again\n")).collect::<String>();
    bundle.create(&[]).ok();
    assert_eq!(order(&bundle), twice(&POINTS[..3]));
    bundle.start().ok();
    wait_for("the program to run", PATIENCE, || order(&bundle).contains("program").then_some(()));
    // The program and poststart run at the same time.
    let without: String =
        order(&bundle).lines().filter(|line| *line != "program").map(|line| format!("{line}\n")).collect();
    assert_eq!(without, twice(&POINTS[..5]));
    let at = |line: &str| order(&bundle).lines().position(|other| other == line);
    assert!(at("program") > at("startContainer again"), "{}", order(&bundle));
    bundle.oci(&["delete", "--force", bundle.id()]).ok();
    assert!(order(&bundle).ends_with(&twice(&POINTS[5..])), "{}", order(&bundle));
    assert_eq!(order(&bundle).lines().count(), 13);
}

#[test]
fn hooks_run_in_the_namespaces_of_their_point() {
    let bundle = with_hooks("sleep 1000", |point, folder| {
        format!(
            "cd {folder}; for n in mnt net pid uts; do readlink /proc/self/ns/$n; done > {point}; \
                 ls -d /rootfs.here /shared > {point}.root 2>/dev/null; hostname > {point}.name; true"
        )
    });
    fs::write(bundle.inside("rootfs.here"), "").expect("write");
    bundle.begin();
    let pid = bundle.pid().to_string();
    let inside: String = ["mnt", "net", "pid", "uts"].map(|kind| namespace(&pid, kind) + "\n").concat();
    let outside: String = ["mnt", "net", "pid", "uts"].map(|kind| namespace("self", kind) + "\n").concat();
    bundle.oci(&["delete", "--force", bundle.id()]).ok();
    let text = |name: &str| fs::read_to_string(bundle.path("shared").join(name)).expect("a hook's output");
    for point in ["prestart", "createRuntime", "poststart", "poststop"] {
        assert_eq!(text(point), outside, "{point}");
    }
    for point in ["createContainer", "startContainer"] {
        assert_eq!(text(point), inside, "{point}");
        assert_eq!(text(&format!("{point}.name")), "inside\n", "{point}");
    }
    assert_eq!(text("createContainer.root"), "", "before the root is changed");
    assert_eq!(text("startContainer.root"), "/rootfs.here\n/shared\n", "after it was changed");
}

#[test]
fn hooks_get_the_state_on_standard_input() {
    let bundle = with_hooks("sleep 1000", |point, folder| format!("cat > {folder}/{point}"))
        .set("/annotations", json!({"key": "value"}));
    bundle.begin();
    let pid = bundle.pid();
    bundle.oci(&["delete", "--force", bundle.id()]).ok();
    let expected = ["created", "creating", "creating", "created", "running", "stopped"];
    for (point, status) in POINTS.into_iter().zip(expected) {
        let text = fs::read_to_string(bundle.path("shared").join(point)).expect("a hook's output");
        let state: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{point}: {error}: {text}"));
        assert_eq!(state["status"], status, "{point}");
        assert_eq!(state["id"], bundle.id(), "{point}");
        assert_eq!(state["bundle"], bundle.text("").trim_end_matches('/'), "{point}");
        assert_eq!(state["annotations"], json!({"key": "value"}), "{point}");
        assert!(state["ociVersion"].is_string(), "{point}");
        match point {
            "prestart" | "createRuntime" | "poststart" => assert_eq!(state["pid"], pid, "{point}"),
            "createContainer" | "startContainer" => assert_eq!(state["pid"], 1, "{point}: as it is numbered there"),
            _ => {}
        }
    }
}

#[test]
fn a_hook_can_ask_for_the_state() {
    let bundle = Bundle::new("sleep 1000");
    let program = moyai_tests::lab::binary();
    let ask = |point: &str| {
        let (root, out) = (bundle.text("run"), bundle.text(point));
        format!("{} oci --root {root} state {} > {out} 2>&1; true", program.display(), bundle.id())
    };
    let asked = ["createRuntime", "poststart", "poststop"].map(|point| (point, ask(point)));
    let bundle = asked.into_iter().fold(bundle, |bundle, (point, script)| bundle.hook(point, &script));
    bundle.begin();
    bundle.oci(&["delete", "--force", bundle.id()]).ok();
    let answer = |point: &str| fs::read_to_string(bundle.path(point)).expect("an answer");
    for (point, status) in [("createRuntime", "creating"), ("poststart", "running")] {
        let state: Value = serde_json::from_str(&answer(point)).expect("JSON");
        assert_eq!(state["status"], status, "{point}");
    }
    assert!(answer("poststop").starts_with("error: "), "it has been deleted: {}", answer("poststop"));
}

#[test]
fn hooks_get_their_arguments_and_environment_and_nothing_else() {
    let bundle = Bundle::new("sleep 1000");
    let dump = |name: &str| {
        let script = format!("tr '\\0' '\\n' < /proc/self/environ > {}", bundle.text(name));
        format!("{script}; echo \"$0\" \"$@\" > {}", bundle.text(&format!("{name}.args")))
    };
    let with = json!({"path": "/bin/sh", "args": ["my shell", "-c", dump("with"), "zero", "one two", ""],
        "env": ["A=1", "PATH=/usr/bin:/bin", "EMPTY=", "B=x=y"]});
    let without = json!({"path": "/usr/bin/env"});
    let without_out = bundle.text("create.err");
    let bundle = bundle.add("/hooks/createRuntime", with).add("/hooks/poststart", without);
    bundle.create(&[]).ok();
    let read = |name: &str| fs::read_to_string(bundle.path(name)).expect("a file");
    let mut lines: Vec<String> = read("with").lines().map(str::to_owned).collect();
    lines.sort();
    assert_eq!(lines, ["A=1", "B=x=y", "EMPTY=", "PATH=/usr/bin:/bin"]);
    assert_eq!(read("with.args"), "zero one two \n");
    let output = bundle.start().ok();
    assert_eq!(output.stdout, "", "an empty environment, of {without_out}");
}

#[test]
fn a_hook_that_takes_too_long_is_killed() {
    let slow = json!({"path": "/bin/sh", "args": ["sh", "-c", "exec sleep 1000"], "env": ["PATH=/bin:/usr/bin"],
        "timeout": 1});
    let bundle = Bundle::new("true").add("/hooks/createRuntime", slow);
    let began = std::time::Instant::now();
    refused(&bundle.create(&[]).says("hooks.createRuntime[0]"));
    assert!(began.elapsed().as_secs() < 30);
    bundle.is_gone();
}

#[test]
fn a_hook_that_fails_before_the_start_stops_the_creation() {
    for point in ["prestart", "createRuntime", "createContainer"] {
        let bundle = Bundle::new("true").hook(point, "true");
        let after = bundle.text("after");
        let stopped = bundle.text("poststop");
        let bundle = bundle
            .hook(point, "exit 3")
            .hook(point, &format!("touch {after}"))
            .hook("poststop", &format!("touch {stopped}"));
        refused(&bundle.create(&[]).says(&format!("hooks.{point}[1]")));
        assert!(!bundle.path("after").exists(), "those after it are not run");
        bundle.is_gone();
        refused(&bundle.oci(&["state", bundle.id()]));
        refused(&bundle.run().says(&format!("hooks.{point}[1]")));
        bundle.is_gone();
    }
}

#[test]
fn a_hook_that_cannot_be_run_is_named() {
    let bundle = Bundle::new("true").add("/hooks/createRuntime", json!({"path": "/nonexistent/hook"}));
    refused(&bundle.create(&[]).says("/nonexistent/hook"));
    bundle.is_gone();
}

#[test]
fn a_start_container_hook_that_fails_stops_the_container() {
    let bundle = Bundle::new("echo ran").hook("startContainer", "exit 3");
    bundle.create(&[]).ok();
    refused(&bundle.start().says("hooks.startContainer[0]"));
    bundle.wait_until("stopped");
    assert_eq!(bundle.said(), "");
    bundle.oci(&["delete", bundle.id()]).ok();
    bundle.is_gone();
}

#[test]
fn hooks_that_fail_after_the_start_are_warnings() {
    let bundle = Bundle::new("sleep 1000");
    let (first, second) = (bundle.text("first"), bundle.text("second"));
    let bundle = bundle
        .hook("poststart", "exit 3")
        .hook("poststart", &format!("touch {first}"))
        .hook("poststop", "exit 3")
        .hook("poststop", &format!("test -e {} || touch {second}", bundle_state(&first)));
    bundle.create(&[]).ok();
    let output = bundle.start().ok();
    assert!(output.stderr.contains("warning") && output.stderr.contains("poststart[0]"), "{output}");
    assert!(bundle.path("first").exists(), "those after it are run");
    assert_eq!(bundle.status(), "running");
    let output = bundle.oci(&["delete", "--force", bundle.id()]).ok();
    assert!(output.stderr.contains("warning") && output.stderr.contains("poststop[0]"), "{output}");
    assert!(bundle.path("second").exists(), "it is run when the container has been deleted");
    bundle.is_gone();
}

/// Where `state.json` of the only container is, beside a file in the bundle's folder.
fn bundle_state(beside: &str) -> String {
    let folder = Path::new(beside).parent().expect("a folder").join("run");
    format!("{}/*/state.json", folder.display())
}

// Process (config.md, "Process").

#[test]
fn it_starts_in_its_working_folder() {
    assert_eq!(Bundle::new("pwd").set("/process/cwd", "/etc").prints(), "/etc\n");
    let missing = Bundle::new("pwd; stat -c %F /a/b/c").set("/process/cwd", "/a/b/c");
    assert_eq!(missing.prints(), "/a/b/c\ndirectory\n");
    let relative = Bundle::new("pwd").set("/process/cwd", "etc");
    refused(&relative.create(&[]).says("process.cwd"));
    relative.is_gone();
}

#[test]
fn arguments_and_environment_are_given_exactly() {
    let args = json!([
        "sh",
        "-c",
        "tr '\\0' '|' < /proc/self/cmdline; echo; tr '\\0' '|' < /proc/1/cmdline; exit",
        "",
        "two words",
        "ünï",
        "$HOME",
        "\t"
    ]);
    let bundle = Bundle::new("").set("/process/args", args);
    let text = bundle.prints();
    assert!(text.ends_with("exit||two words|ünï|$HOME|\t|"), "{text}");
    let env = json!(["PATH=/bin", "A=1", "EMPTY=", "EQUAL=a=b", "SPACE= x "]);
    let bundle = Bundle::new("").set("/process/args", json!(["cat", "/proc/self/environ"])).set("/process/env", env);
    assert_eq!(bundle.prints(), "PATH=/bin\0A=1\0EMPTY=\0EQUAL=a=b\0SPACE= x \0");
}

#[test]
fn it_runs_as_its_user() {
    let script = "grep -E '^(Uid|Gid|Groups|Umask)' /proc/self/status; touch /tmp/f; mkdir /tmp/d; stat -c '%a %u %g' /tmp/f /tmp/d";
    let user = json!({"uid": 1234, "gid": 2345, "additionalGids": [7, 8, 4_000_000], "umask": 0o027});
    let text = Bundle::new(script).set("/process/user", user).prints();
    let lines: Vec<String> = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    assert_eq!(
        lines,
        [
            "Umask: 0027",
            "Uid: 1234 1234 1234 1234",
            "Gid: 2345 2345 2345 2345",
            "Groups: 7 8 4000000",
            "640 1234 2345",
            "750 1234 2345"
        ]
    );
    let root = Bundle::new("grep Groups /proc/self/status").prints();
    assert_eq!(root.trim(), "Groups:", "the caller's groups are not kept");
}

#[test]
fn capabilities_are_those_of_each_set() {
    let status = |bundle: Bundle| {
        let text = bundle.set("/process/args", json!(["grep", "^Cap", "/proc/self/status"])).prints();
        text.lines().map(|line| line.split_once(":\t").expect("a field").1.to_owned()).collect::<Vec<String>>()
    };
    let sets = json!({
        "bounding": ["CAP_KILL", "CAP_NET_RAW", "CAP_CHOWN", "CAP_SETUID"],
        "permitted": ["CAP_KILL", "CAP_NET_RAW", "CAP_CHOWN"],
        "inheritable": ["CAP_KILL", "CAP_NET_RAW"],
        "effective": ["CAP_KILL"],
        "ambient": ["CAP_KILL"],
    });
    let user = json!({"uid": 1000, "gid": 1000});
    let seen = status(Bundle::new("").set("/process/capabilities", sets).set("/process/user", user.clone()));
    // An ordinary user's exec keeps what is ambient, of permitted and effective (capabilities(7)).
    let kill = "0000000000000020";
    assert_eq!(seen, ["0000000000002020", kill, kill, "00000000000020a1", kill], "Inh, Prm, Eff, Bnd, Amb");
    let none = status(Bundle::new("").set("/process/capabilities", json!({})).set("/process/user", user));
    assert_eq!(none, ["0000000000000000"; 5]);
    let root = status(Bundle::new("").without("/process/capabilities"));
    assert_eq!(root, ["0000000000000000"; 5], "root without capabilities has none");
}

#[test]
fn an_ambient_capability_that_cannot_be_is_a_warning() {
    let bundle = Bundle::new("grep CapAmb /proc/self/status").set("/process/capabilities/ambient", json!(["CAP_KILL"]));
    let output = bundle.run().ok();
    assert!(output.stderr.contains("warning") && output.stderr.contains("KILL"), "{output}");
    assert_eq!(output.stdout.split_whitespace().last(), Some("0000000000000000"));
}

#[test]
fn it_gains_no_rights_unless_it_may() {
    for (given, value) in [(true, "1"), (false, "0")] {
        // A set-user-id ping has the right to its raw socket.
        let bundle = Bundle::new("grep NoNewPrivs /proc/self/status; /suid/ping -c 1 -W 1 127.0.0.1")
            .set("/process/noNewPrivileges", given)
            .set("/process/user", json!({"uid": 1000, "gid": 1000}));
        fs::create_dir(bundle.inside("suid")).expect("make a folder");
        fs::copy(bundle.inside("bin/busybox"), bundle.inside("suid/ping")).expect("copy");
        fs::set_permissions(bundle.inside("suid/ping"), fs::Permissions::from_mode(0o4755)).expect("chmod");
        let output = bundle.run();
        assert!(output.stdout.contains(&format!("NoNewPrivs:\t{value}")), "{output}");
        assert_eq!(output.code == 0, !given, "{output}");
    }
}

#[test]
fn limits_are_set() {
    let limits = json!([
        {"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200},
        {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
        {"type": "RLIMIT_NPROC", "soft": 50, "hard": 60},
    ]);
    let script = "sed -nE 's/^Max (open files|core file size|processes) +([0-9a-z]+) +([0-9a-z]+).*/\\1 \\2 \\3/p' \
        /proc/self/limits | sort";
    let text = Bundle::new(script).set("/process/rlimits", limits).prints();
    assert_eq!(text, "core file size 0 0\nopen files 100 200\nprocesses 50 60\n");
}

#[test]
fn the_oom_score_priority_and_scheduler_are_set() {
    let bundle = Bundle::new("cat /proc/self/oom_score_adj; ionice; cut -d' ' -f41 /proc/self/stat")
        .set("/process/oomScoreAdj", 500)
        .set("/process/ioPriority", json!({"class": "IOPRIO_CLASS_BE", "priority": 6}))
        .set("/process/scheduler", json!({"policy": "SCHED_BATCH", "nice": 5}));
    let text = bundle.prints();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], "500");
    assert!(lines[1].contains("best-effort") && lines[1].contains('6'), "{text}");
    assert_eq!(lines[2], "3", "SCHED_BATCH");
}

/// `moyai oci ARGS` by a shell that does `before` first.
fn after(bundle: &Bundle, before: &str, shell: &[&str], args: &[&str]) -> Output {
    bundle.write();
    let inner = bundle.command(args);
    let mut command = Command::new(shell[0]);
    command.args(&shell[1..]).args(["-c", &format!("{before} && exec \"$@\""), "_"]);
    command.arg(inner.get_program()).args(inner.get_args());
    bundle.finish(command, before)
}

#[test]
fn descriptors_of_the_caller_are_not_seen_inside() {
    let bundle =
        Bundle::new("ls /proc/1/fd; for fd in 7 8 9; do ls -d /proc/self/fd/$fd/etc; done").set("/process/cwd", "/");
    bundle.write();
    let through = |bundle: &Bundle, args: &[&str]| after(bundle, "exec 7</ 8</etc 9</root", &["sh"], args);
    let output = through(&bundle, &["run", "--bundle", &bundle.text(""), bundle.id()]);
    assert!(!output.stdout.contains("/etc"), "{output}");
    let fds: Vec<&str> = output.stdout.split_whitespace().filter(|fd| *fd != "255" && *fd != "10").collect();
    assert_eq!(fds, ["0", "1", "2"], "{output}");
    let bundle = Bundle::new("sleep 1000");
    bundle.begin();
    let output =
        through(&bundle, &["exec", bundle.id(), "sh", "-c", "ls /proc/self/fd; ls -d /proc/self/fd/[789]/etc"]);
    let fds: Vec<&str> = output.stdout.split_whitespace().filter(|fd| *fd != "3").collect();
    assert_eq!(fds, ["0", "1", "2"], "{output}");
}

#[test]
fn a_working_folder_outside_of_the_container_is_refused() {
    // CVE-2024-21626
    for fd in 3..12 {
        let bundle = Bundle::new("ls -a; cat etc/shadow ../etc/shadow ../../../etc/shadow")
            .set("/process/cwd", format!("/proc/self/fd/{fd}"));
        let run = ["run", "--bundle", &bundle.text(""), bundle.id()];
        let output = after(&bundle, "exec 7</ 8</etc 9</root", &["sh"], &run);
        assert!(!output.stdout.contains("root:"), "{output}");
        assert_ne!(output.code, 0, "{output}");
        bundle.is_gone();
    }
    let bundle = Bundle::new("sleep 1000");
    bundle.begin();
    for fd in 3..12 {
        let output =
            bundle.exec_with(&["--cwd", &format!("/proc/self/fd/{fd}")], &["cat", "etc/shadow", "../../etc/shadow"]);
        assert!(output.code != 0 && !output.stdout.contains("root:"), "{output}");
    }
}

#[test]
fn descriptors_are_passed_on_when_asked() {
    let bundle = Bundle::new("cat <&3; ls /proc/self/fd/4 2>/dev/null; sleep 0");
    fs::write(bundle.path("given"), "from outside\n").expect("write");
    let run = ["run", "--preserve-fds", "1", "--bundle", &bundle.text(""), bundle.id()];
    let before = format!("exec 3<{} 4</", bundle.text("given"));
    assert_eq!(after(&bundle, &before, &["sh"], &run).stdout, "from outside\n");
}

#[test]
fn a_limit_above_the_callers_is_given_by_whoever_may_raise_it() {
    const CAP_SYS_RESOURCE: u32 = 24;
    let status = fs::read_to_string("/proc/self/status").expect("a status");
    let had = status.lines().find_map(|line| line.strip_prefix("CapEff:")).expect("capabilities");
    let had = u64::from_str_radix(had.trim(), 16).expect("a number") & 1 << CAP_SYS_RESOURCE != 0;
    let may_raise = had && fs::read_to_string("/proc/self/uid_map").expect("a map").contains("4294967295");
    let maps = json!([{"containerID": 0, "hostID": 200_000, "size": 65536}]);
    let asks = "ulimit -Sl; ulimit -Hl";
    for own_users in [false, true] {
        let limited = |script: &str| {
            let limit = json!([{"type": "RLIMIT_MEMLOCK", "soft": 131_072, "hard": 131_072}]);
            let bundle = Bundle::new(script).set("/process/rlimits", limit);
            if !own_users {
                return bundle;
            }
            own(&bundle.path("rootfs"), 200_000);
            let bundle = bundle.namespace("user", json!({"type": "user"}));
            bundle.set("/linux/uidMappings", maps.clone()).set("/linux/gidMappings", maps.clone())
        };
        let lowered = |bundle: &Bundle, args: &[&str]| {
            let done = after(bundle, "ulimit -l 64", &["bash"], args).ok();
            let told = "RLIMIT_MEMLOCK stays as it is: this process may not give more than 65536";
            assert_ne!(done.stderr.contains(told), may_raise, "{done}");
            assert_eq!(done.stdout, if may_raise { "128\n128\n" } else { "64\n64\n" }, "own users: {own_users}");
        };
        let first = limited(asks);
        lowered(&first, &["run", "--bundle", &first.text(""), first.id()]);
        let second = limited("sleep 1000");
        second.begin();
        lowered(&second, &["exec", second.id(), "sh", "-c", asks]);
    }
}

#[test]
fn a_network_namespace_that_cannot_be_made_is_the_reason() {
    let bundle = Bundle::new("true");
    let shell = ["unshare", "--user", "--map-root-user", "--mount", "bash"];
    let run = ["run", "--bundle", &bundle.text(""), bundle.id()];
    let done = after(&bundle, "echo 0 >/proc/sys/user/max_net_namespaces", &shell, &run);
    done.exits(125).says("cannot make a network namespace: ENOSPC");
}

// File system (config.md, "Root", "Mounts"; config-linux.md).

/// What /proc/mounts says of a mount inside: its kind and options.
fn mount_of(text: &str, path: &str) -> (String, Vec<String>) {
    let line = text.lines().rfind(|line| line.split(' ').nth(1) == Some(path));
    let line = line.unwrap_or_else(|| panic!("{path} is not mounted: {text}"));
    let fields: Vec<&str> = line.split(' ').collect();
    (fields[2].to_owned(), fields[3].split(',').map(str::to_owned).collect())
}

fn has(options: &[String], wanted: &[&str]) -> bool {
    wanted.iter().all(|option| options.iter().any(|other| other == option))
}

#[test]
fn the_root_can_be_read_only() {
    let script = "touch /file && echo written; touch /dev/shm/file && echo shm; touch /data/file && echo data";
    let bundle = Bundle::new(script).mount("tmpfs", "tmpfs", "/data", &[]);
    assert_eq!(bundle.prints(), "written\nshm\ndata\n");
    let bundle = Bundle::new(script).mount("tmpfs", "tmpfs", "/data", &[]).set("/root/readonly", true);
    let output = bundle.run().ok();
    assert_eq!(output.stdout, "shm\ndata\n");
    assert!(output.stderr.contains("Read-only"), "{output}");
    fs::write(bundle.inside("still"), "").expect("the host's is as it was");
}

#[test]
fn an_absolute_root_is_taken_as_it_is_and_a_missing_one_refused() {
    let bundle = Bundle::new("ls -d /here");
    let elsewhere = bundle.text("elsewhere");
    fs::rename(bundle.path("rootfs"), &elsewhere).expect("move");
    fs::write(format!("{elsewhere}/here"), "").expect("write");
    refused(&bundle.create(&[]).says("root.path"));
    bundle.is_gone();
    let bundle = bundle.set("/root/path", elsewhere);
    assert_eq!(bundle.prints(), "/here\n");
}

#[test]
fn the_hostname_and_domainname_are_its_own() {
    let before = tool("uname", &["-n"]);
    let bundle =
        Bundle::new("hostname; cat /proc/sys/kernel/domainname").set("/hostname", "one").set("/domainname", "example");
    assert_eq!(bundle.prints(), "one\nexample\n");
    assert_eq!(tool("uname", &["-n"]), before);
}

#[test]
fn a_tmpfs_has_its_options() {
    let bundle = Bundle::new("cat /proc/mounts; stat -c 'mode %a' /data").mount(
        "tmpfs",
        "tmpfs",
        "/data",
        &["nosuid", "noexec", "nodev", "ro", "noatime", "size=64k", "mode=1750"],
    );
    let text = bundle.prints();
    let (kind, options) = mount_of(&text, "/data");
    assert_eq!(kind, "tmpfs");
    assert!(has(&options, &["ro", "nosuid", "nodev", "noexec", "noatime", "size=64k", "mode=1750"]), "{options:?}");
    assert!(text.ends_with("mode 1750\n"), "{text}");
}

#[test]
fn bind_mounts_have_their_options() {
    let bundle =
        Bundle::new("cat /proc/mounts; touch /ro/x && echo ro; touch /rw/x && echo rw; touch /plain/x && echo plain");
    let source = bundle.text("source");
    fs::create_dir(&source).expect("make a folder");
    let bundle = bundle
        .mount("bind", &source, "/ro", &["bind", "ro", "nosuid", "nodev", "noexec"])
        .mount("bind", &source, "/rw", &["bind", "rw", "nosuid"])
        .mount("none", "source", "/plain", &["bind"]);
    let text = bundle.prints();
    assert!(text.ends_with("rw\nplain\n") && !text.contains("\nro\n"), "{text}");
    assert!(has(&mount_of(&text, "/ro").1, &["ro", "nosuid", "nodev", "noexec"]), "{text}");
    let rw = mount_of(&text, "/rw").1;
    assert!(has(&rw, &["rw", "nosuid"]) && !has(&rw, &["noexec"]), "{text}");
    let plain = mount_of(&text, "/plain").1;
    assert!(!has(&plain, &["ro"]) && !has(&plain, &["nosuid"]), "a relative source is of the bundle: {text}");
    fs::write(format!("{source}/host"), "").expect("the source itself is not read-only");
}

#[test]
fn what_is_mounted_below_a_source_comes_with_rbind_alone() {
    let script = "for d in bind rbind ro rro; do ls /$d/below; touch /$d/below/$d && echo wrote $d; done";
    let bundle = Bundle::new(script);
    let source = bundle.text("source");
    let _below = Mounted::tmpfs(&format!("{source}/below"));
    fs::write(format!("{source}/below/file"), "").expect("write");
    let bundle = bundle
        .mount("bind", &source, "/bind", &["bind", "ro"])
        .mount("bind", &source, "/rbind", &["rbind"])
        .mount("bind", &source, "/ro", &["rbind", "ro"])
        .mount("bind", &source, "/rro", &["rbind", "rro"]);
    // Of `bind` nothing is below; of `rbind` `ro` says nothing of what is below (mount(8)); of `rro` it does.
    let output = bundle.run();
    let wrote: Vec<&str> = output.stdout.lines().filter(|line| line.starts_with("wrote")).collect();
    assert_eq!(wrote, ["wrote rbind", "wrote ro"], "{output}");
    assert_eq!(output.stdout.lines().filter(|line| *line == "file").count(), 3, "{output}");
}

#[test]
fn nosuid_nodev_and_noexec_are_kept() {
    let bundle = Bundle::new("/noexec/true; echo $?; cat /nodev/null; echo $?; /exec/true; echo $?");
    let source = bundle.text("source");
    fs::create_dir(&source).expect("make a folder");
    fs::copy("/bin/busybox", format!("{source}/true")).expect("copy");
    tool("mknod", &[&format!("{source}/null"), "c", "1", "3"]);
    let bundle = bundle
        .mount("bind", &source, "/noexec", &["bind", "noexec"])
        .mount("bind", &source, "/nodev", &["bind", "nodev"])
        .mount("bind", &source, "/exec", &["bind"]);
    assert_eq!(bundle.prints(), "126\n1\n0\n");
}

#[test]
fn mounts_have_their_propagation() {
    let bundle = Bundle::new("cat /proc/self/mountinfo");
    let source = bundle.text("source");
    let mut bundle = bundle;
    let mounted = Mounted::tmpfs(&source);
    tool("mount", &["--make-shared", &mounted.0]);
    for word in ["private", "rprivate", "slave", "rslave", "shared", "rshared", "unbindable"] {
        bundle = bundle.mount("bind", &source, &format!("/{word}"), &["rbind", word]);
    }
    let text = bundle.prints();
    for word in ["private", "rprivate", "slave", "rslave", "shared", "rshared", "unbindable"] {
        let line =
            text.lines().find(|line| line.split(' ').nth(4) == Some(&format!("/{word}"))).expect("it is mounted");
        let tags = line.split(" - ").next().expect("fields");
        let is = |tag: &str| tags.contains(tag);
        let right = match word.trim_start_matches('r') {
            "private" => !is("shared:") && !is("master:") && !is("unbindable"),
            "slave" => is("master:"),
            "shared" => is("shared:"),
            _ => is("unbindable"),
        };
        assert!(right, "{word}: {line}");
    }
}

#[test]
fn the_propagation_of_the_root_is_set() {
    for (word, tag) in
        [("shared", Some("shared:")), ("private", None), ("slave", None), ("unbindable", Some("unbindable"))]
    {
        let bundle = Bundle::new("grep ' / / \\|rootfs / ' /proc/self/mountinfo").set("/linux/rootfsPropagation", word);
        let text = bundle.prints();
        let tags = text.split(" - ").next().expect("fields");
        assert_eq!(tags.contains("shared:"), tag == Some("shared:"), "{word}: {text}");
        assert_eq!(tags.contains("unbindable"), tag == Some("unbindable"), "{word}: {text}");
    }
}

#[test]
fn a_tmpfs_can_begin_with_what_was_there() {
    let bundle = Bundle::new(
        "cd /data; cat file sub/deep; readlink link; stat -c '%a %u:%g %n' . file sub; touch new; ls /data",
    );
    let data = bundle.inside("data");
    fs::create_dir_all(data.join("sub")).expect("make a folder");
    fs::write(data.join("file"), "file\n").expect("write");
    fs::write(data.join("sub/deep"), "deep\n").expect("write");
    symlink("/nowhere", data.join("link")).expect("link");
    fs::set_permissions(data.join("file"), fs::Permissions::from_mode(0o640)).expect("chmod");
    fs::set_permissions(&data, fs::Permissions::from_mode(0o751)).expect("chmod");
    fs::set_permissions(data.join("sub"), fs::Permissions::from_mode(0o700)).expect("chmod");
    chown(data.join("file"), Some(12), Some(34)).expect("chown");
    let bundle = bundle.mount("tmpfs", "tmpfs", "/data", &["tmpcopyup"]);
    assert_eq!(bundle.prints(), "file\ndeep\n/nowhere\n751 0:0 .\n640 12:34 file\n700 0:0 sub\nfile\nlink\nnew\nsub\n");
    assert!(!data.join("new").exists(), "the image itself is not written");
}

#[test]
fn what_a_mount_needs_is_made() {
    let bundle = Bundle::new("cat /a/b/file; stat -c %F /c/d /e/f");
    fs::write(bundle.path("file"), "bound\n").expect("write");
    let bundle = bundle.mount("bind", "file", "/a/b/file", &["bind", "ro"]).mount("tmpfs", "tmpfs", "/c/d", &[]).mount(
        "bind",
        "rootfs/etc",
        "/e/f",
        &["bind"],
    );
    assert_eq!(bundle.prints(), "bound\ndirectory\ndirectory\n");
}

#[test]
fn mounts_are_made_in_their_order() {
    let bundle = Bundle::new("ls /data; ls /data/sub; ls /late");
    fs::create_dir_all(bundle.path("source/sub")).expect("make folders");
    fs::write(bundle.path("source/first"), "").expect("write");
    fs::create_dir_all(bundle.path("other")).expect("make folders");
    fs::write(bundle.path("other/second"), "").expect("write");
    let bundle = bundle
        .mount("bind", "source", "/data", &["bind"])
        .mount("bind", "other", "/data/sub", &["bind"])
        .mount("bind", "source", "/late", &["bind"])
        .mount("bind", "other", "/late", &["bind"]);
    assert_eq!(bundle.prints(), "first\nsub\nsecond\nsecond\n");
}

#[test]
fn an_idmapped_bind_shows_other_owners() {
    let bundle = Bundle::new("stat -c '%u:%g' /data/file /plain/file; touch /data/new");
    let source = bundle.text("source");
    let _mounted = Mounted::tmpfs(&source);
    fs::write(format!("{source}/file"), "").expect("write");
    chown(format!("{source}/file"), Some(1001), Some(1002)).expect("chown");
    let ids = |first: u32| json!([{"containerID": 1000, "hostID": first, "size": 10}, {"containerID": 0, "hostID": 0, "size": 1}]);
    let entry = json!({"type": "bind", "source": source, "destination": "/data", "options": ["bind", "idmap"],
        "uidMappings": ids(5000), "gidMappings": ids(7000)});
    let bundle = bundle.add("/mounts", entry).mount("bind", &source, "/plain", &["bind"]);
    if !has_linux(6, 3) {
        // Not every file system can be shifted; a tmpfs can since then.
        refused(&bundle.run().says("mounts[7]: cannot shift the ids of").says("its file system cannot"));
        return;
    }
    assert_eq!(bundle.prints(), "5001:7002\n1001:1002\n");
    assert_eq!(fs::metadata(format!("{source}/new")).expect("a file").uid(), 0);
}

#[test]
fn destinations_do_not_lead_out_of_the_root() {
    // CVE-2019-19921, CVE-2021-30465
    let bundle = Bundle::new("cat /foo/etc/moyai/marker; cat /marker.seen; ls /up; stat -c %F /proc/self");
    let outside = bundle.text("outside");
    fs::create_dir_all(format!("{outside}/sub")).expect("make folders");
    fs::create_dir_all(bundle.path("source")).expect("make folders");
    fs::write(bundle.path("source/marker"), "marker\n").expect("write");
    symlink(&outside, bundle.inside("absolute")).expect("link");
    symlink("../../../../../../../../etc", bundle.inside("foo")).expect("link");
    symlink("../outside", bundle.inside("relative")).expect("link");
    fs::remove_dir(bundle.inside("proc")).expect("remove");
    symlink("/etc", bundle.inside("proc")).expect("link");
    let bundle = bundle
        .mount("bind", "source", "/absolute/sub", &["bind"])
        .mount("bind", "source", "/foo/moyai-oci-test", &["bind"])
        .mount("tmpfs", "tmpfs", "/relative/made", &[])
        .mount("bind", "source/marker", "/relative/file", &["bind"]);
    let output = bundle.run();
    assert!(!Path::new("/etc/moyai-oci-test").exists(), "{output}");
    assert_eq!(fs::read_dir(&outside).expect("a folder").count(), 1, "nothing was made there: {output}");
    assert_eq!(fs::read_dir(format!("{outside}/sub")).expect("a folder").count(), 0);
    let mounts = fs::read_to_string("/proc/self/mounts").expect("mounts");
    assert!(!mounts.lines().any(|line| line.contains(" /etc")), "{mounts}");
    assert!(!mounts.contains(&*bundle.text("")), "{mounts}");
    assert!(Path::new("/etc/passwd").exists());
    bundle.is_gone();
}

#[test]
fn default_devices_and_links_are_there() {
    let script = "cd /dev; for d in null zero full random urandom tty ptmx; do stat -L -c \"$d %F %t:%T %a\" $d; done; \
        for l in fd stdin stdout stderr; do readlink $l; done; \
        head -c 3 zero | wc -c; echo x > null; echo x > full || echo full";
    let text = Bundle::new(script).prints();
    let expected = "null character special file 1:3 666\nzero character special file 1:5 666\n\
        full character special file 1:7 666\nrandom character special file 1:8 666\n\
        urandom character special file 1:9 666\ntty character special file 5:0 666\nptmx character special file 5:2 666\n\
        /proc/self/fd\n/proc/self/fd/0\n/proc/self/fd/1\n/proc/self/fd/2\n3\nfull\n";
    assert_eq!(text, expected);
}

#[test]
fn listed_devices_are_made() {
    let devices = json!([
        {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o640, "uid": 12, "gid": 34},
        {"path": "/dev/sub/block", "type": "b", "major": 8, "minor": 0, "fileMode": 0o600},
        {"path": "/dev/unbuffered", "type": "u", "major": 1, "minor": 3},
        {"path": "/opt/fifo", "type": "p", "fileMode": 0o622, "uid": 5, "gid": 6},
    ]);
    let script = "stat -c '%F %t:%T %a %u:%g' /dev/fuse /dev/sub/block /opt/fifo; stat -c '%F %t:%T' /dev/unbuffered";
    let text = Bundle::new(script).set("/linux/devices", devices).prints();
    assert_eq!(
        text,
        "character special file a:e5 640 12:34\nblock special file 8:0 600 0:0\nfifo 0:0 622 5:6\n\
        character special file 1:3\n"
    );
}

#[test]
fn devices_that_are_not_allowed_cannot_be_opened() {
    let script = "mknod /block b 8 0 && echo made; cat /block; mknod /null c 1 3; cat /null && echo null; \
        mknod /kmsg c 1 11; head -c 1 /kmsg && echo kmsg; mknod /mem c 1 1; head -c 1 /mem && echo mem; \
        mknod /rtc c 10 229 && cat /rtc; : < /rtc && echo fuse";
    let deny = json!({"allow": false, "access": "rwm"});
    let output = Bundle::new(script).add("/linux/resources/devices", deny.clone()).run();
    assert_eq!(output.stdout, "made\nnull\n", "{output}");
    assert!(output.stderr.contains("/block': Operation not permitted"), "{output}");
    // One of the devices that most kernels have, and that may be opened without any capability.
    let devices = fs::read_to_string("/proc/misc").expect("a list of devices");
    let usable =
        |line: &&str| ["autofs", "loop-control", "fuse"].iter().any(|name| line.ends_with(&format!(" {name}")));
    let device = devices.lines().find(usable).expect("autofs, loop-control or fuse");
    let minor: u32 = device.split_whitespace().next().and_then(|number| number.parse().ok()).expect("a number");
    let allow = json!({"allow": true, "type": "c", "major": 10, "minor": minor, "access": "r"});
    let bundle = Bundle::new(&format!("mknod /it c 10 {minor}; : < /it && echo read; : > /it && echo write"));
    let output = bundle.add("/linux/resources/devices", deny).add("/linux/resources/devices", allow).run();
    assert_eq!(output.stdout, "read\n", "{output}");
}

#[test]
fn masked_paths_show_nothing() {
    let script = "cat /secret/file; ls -A /hidden | wc -l; touch /hidden/x || echo no; wc -c < /proc/timer_list; ls -A /link | wc -l";
    let masked = json!(["/secret/file", "/hidden", "/nonexistent/path", "/proc/timer_list", "/link"]);
    let bundle = Bundle::new(script).set("/linux/maskedPaths", masked);
    for folder in ["secret", "hidden", "behind"] {
        fs::create_dir(bundle.inside(folder)).expect("make a folder");
        fs::write(bundle.inside(folder).join("file"), "secret").expect("write");
    }
    symlink("behind", bundle.inside("link")).expect("link");
    let output = bundle.run();
    assert_eq!(output.stdout, "0\nno\n0\n0\n", "{output}");
    assert_eq!(fs::read_to_string(bundle.inside("secret/file")).expect("read"), "secret");
}

#[test]
fn read_only_paths_cannot_be_written() {
    let script = "touch /locked/x || echo no; echo x > /file || echo no; echo 1 > /proc/sys/net/ipv4/ip_forward || echo no; \
        cat /locked/file /file; touch /locked/below/x || echo no";
    let bundle = Bundle::new(script)
        .set("/linux/readonlyPaths", json!(["/locked", "/file", "/nonexistent", "/proc/sys"]))
        .mount("tmpfs", "tmpfs", "/locked/below", &[]);
    fs::create_dir(bundle.inside("locked")).expect("make a folder");
    fs::write(bundle.inside("locked/file"), "in\n").expect("write");
    fs::write(bundle.inside("file"), "in\n").expect("write");
    assert_eq!(bundle.prints(), "no\nno\nno\nin\nin\nno\n");
}

#[test]
fn settings_of_its_namespaces_are_set() {
    let before = fs::read_to_string("/proc/sys/net/ipv4/ip_forward").expect("a setting");
    let bundle = Bundle::new("cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/core/somaxconn /proc/sys/kernel/msgmax")
        .set("/linux/sysctl", json!({"net.ipv4.ip_forward": "1", "net/core/somaxconn": "77", "kernel.msgmax": "9999"}));
    assert_eq!(bundle.prints(), "1\n77\n9999\n");
    assert_eq!(fs::read_to_string("/proc/sys/net/ipv4/ip_forward").expect("a setting"), before);
    for name in ["kernel.panic", "vm.swappiness", "fs.file-max", "kernel/core_pattern", "net/../kernel/panic"] {
        let bundle = Bundle::new("true").set("/linux/sysctl", json!({name: "1"}));
        refused(&bundle.create(&[]).says("linux.sysctl"));
        bundle.is_gone();
    }
    let bundle =
        Bundle::new("true").namespace("network", Value::Null).set("/linux/sysctl", json!({"net.ipv4.ip_forward": "1"}));
    refused(&bundle.create(&[]).says("linux.sysctl"));
    let bundle = Bundle::new("true").set("/linux/sysctl", json!({"net.ipv4.no_such_setting": "1"}));
    refused(&bundle.create(&[]).says("no_such_setting"));
    bundle.is_gone();
}

// Namespaces (config-linux.md).

#[test]
fn new_namespaces_differ_from_the_hosts_and_the_others_are_the_hosts() {
    let bundle = Bundle::new("sleep 1000");
    bundle.begin();
    let pid = bundle.pid().to_string();
    for kind in ALL {
        assert_ne!(namespace(&pid, kind), namespace("self", kind), "{kind}");
    }
    for kind in ["user", "time"] {
        assert_eq!(namespace(&pid, kind), namespace("self", kind), "{kind}");
    }
    let bundle = Bundle::new("sleep 1000")
        .without("/hostname")
        .set("/linux/namespaces", json!([{"type": "mount"}]))
        .set("/linux/readonlyPaths", json!([]))
        .set("/linux/maskedPaths", json!([]));
    bundle.begin();
    let pid = bundle.pid().to_string();
    assert_ne!(namespace(&pid, "mnt"), namespace("self", "mnt"));
    for kind in ["uts", "ipc", "pid", "net", "cgroup", "user", "time"] {
        assert_eq!(namespace(&pid, kind), namespace("self", kind), "{kind}");
    }
}

/// Mounts at a container's root or inside, as process `of` has them.
fn mounts_inside(bundle: &Bundle, of: &str) -> usize {
    let table = fs::read_to_string(format!("/proc/{of}/mountinfo")).expect("a table");
    let root = bundle.inside("").display().to_string();
    table.lines().filter(|line| line.contains(root.trim_end_matches('/'))).count()
}

#[test]
fn what_is_mounted_among_others_mounts_goes_with_the_container() {
    // "If a namespace type is not specified in the namespaces array, the container MUST inherit the runtime namespace of that type."
    let script = "[ -c /dev/null ] && [ -e /proc/self ] && ! touch /x 2> /dev/null && echo inside; ls /; sleep 1000";
    let within = |other: Value| Bundle::new(script).namespace("mount", other).set("/root/readonly", true);
    let bundle = within(Value::Null);
    bundle.begin();
    bundle.wait_to_say("inside");
    let pid = bundle.pid().to_string();
    assert_eq!(namespace(&pid, "mnt"), namespace("self", "mnt"));
    assert!(mounts_inside(&bundle, "self") > 2);
    bundle.exec(&["cat", "/proc/sys/kernel/hostname"]).ok().says("inside");
    bundle.oci(&["delete", "--force", bundle.id()]).ok();
    assert_eq!(mounts_inside(&bundle, "self"), 0);
    bundle.is_gone();
    let fails = within(Value::Null).set("/process/args", json!(["/nonexistent/program"]));
    refused(&fails.create(&[]));
    assert_eq!(mounts_inside(&fails, "self"), 0);
    let fails = within(Value::Null).set("/mounts/1", json!({"destination": "/x", "type": "nosuchfs", "source": "x"}));
    refused(&fails.create(&[]));
    assert_eq!(mounts_inside(&fails, "self"), 0);
    let ends = within(Value::Null).set("/process/args", json!(["true"]));
    ends.run().ok();
    assert_eq!(mounts_inside(&ends, "self"), 0);
    for root in ["/", "../../../../../..", "link"] {
        let bundle = within(Value::Null).set("/root/path", root);
        symlink("/", bundle.path("link")).expect("make a link");
        refused(&bundle.create(&[]).says("root.path"));
    }
    for (field, value) in [
        ("linux.rootfsPropagation", within(Value::Null).set("/linux/rootfsPropagation", "shared")),
        (
            "linux.namespaces",
            within(Value::Null)
                .namespace("user", json!({"type": "user"}))
                .set("/linux/uidMappings", json!([{"containerID": 0, "hostID": 0, "size": 1}]))
                .set("/linux/gidMappings", json!([{"containerID": 0, "hostID": 0, "size": 1}])),
        ),
    ] {
        refused(&value.create(&[]).says(field));
    }
}

#[test]
fn what_is_mounted_among_others_mounts_is_found_again() {
    let within = |other: Value| Bundle::new("sleep 1000").namespace("mount", other);
    // One whose `create` was killed in a hook.
    let killed = within(Value::Null).hook("createRuntime", "kill -KILL $PPID; sleep 1");
    assert_ne!(killed.create(&[]).code, 0);
    assert!(mounts_inside(&killed, "self") > 2);
    killed.oci(&["delete", "--force", killed.id()]).ok();
    assert_eq!(mounts_inside(&killed, "self"), 0);
    // What others have mounted over it is left alone, and told of.
    let under = within(Value::Null);
    under.begin();
    let over = Mounted::tmpfs(under.inside("").to_str().expect("a path"));
    under.oci(&["kill", under.id(), "KILL"]).ok();
    under.wait_until("stopped");
    refused(&under.oci(&["delete", under.id()]).says("something else is mounted over it"));
    drop(over);
    under.oci(&["delete", under.id()]).ok();
    assert_eq!(mounts_inside(&under, "self"), 0);
    under.is_gone();
    // One that somebody has taken away already.
    let bare = within(Value::Null);
    bare.begin();
    tool("umount", &["-l", bare.inside("").to_str().expect("a path")]);
    bare.oci(&["delete", "--force", bare.id()]).ok();
    bare.is_gone();
}

#[test]
fn a_mount_namespace_that_exists_is_joined() {
    let script = "[ -c /dev/null ] && [ -e /proc/self ] && echo inside; ls /; sleep 1000";
    let within = |other: Value| Bundle::new(script).namespace("mount", other);
    let holder = Command::new("unshare").args(["--mount", "sleep", "1000"]).spawn().map(Background).expect("unshare");
    let holder = holder.0.id().to_string();
    wait_for("a namespace", PATIENCE, || (namespace(&holder, "mnt") != namespace("self", "mnt")).then_some(()));
    let joined = within(json!({"type": "mount", "path": format!("/proc/{holder}/ns/mnt")}));
    joined.begin();
    joined.wait_to_say("inside");
    assert_eq!(namespace(&joined.pid().to_string(), "mnt"), namespace(&holder, "mnt"));
    assert_eq!(mounts_inside(&joined, "self"), 0);
    assert!(mounts_inside(&joined, &holder) > 2);
    assert_eq!(joined.exec(&["ls", "/"]).ok().stdout, joined.said().replace("inside\n", ""));
    joined.oci(&["delete", "--force", joined.id()]).ok();
    assert_eq!(mounts_inside(&joined, &holder), 0);
    joined.is_gone();
}

#[test]
fn namespaces_that_exist_are_joined() {
    let one = Bundle::new("sleep 1000").set("/linux/sysctl", json!({"net.ipv4.ip_forward": "1"}));
    one.begin();
    let pid = one.pid().to_string();
    let path = |kind: &str| format!("/proc/{pid}/ns/{kind}");
    let two = Bundle::new("cat /proc/sys/net/ipv4/ip_forward; echo $$; hostname; exec sleep 1000")
        .namespace("network", json!({"type": "network", "path": path("net")}))
        .namespace("pid", json!({"type": "pid", "path": path("pid")}))
        .namespace("ipc", json!({"type": "ipc", "path": path("ipc")}))
        .namespace("uts", json!({"type": "uts", "path": path("uts")}))
        .set("/hostname", "renamed");
    two.begin();
    let other = two.pid().to_string();
    for kind in ["net", "pid", "ipc", "uts"] {
        assert_eq!(namespace(&pid, kind), namespace(&other, kind), "{kind}");
    }
    for kind in ["mnt", "cgroup"] {
        assert_ne!(namespace(&pid, kind), namespace(&other, kind), "{kind}");
    }
    two.wait_to_say("renamed");
    let said = two.said();
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines[0], "1");
    assert_ne!(lines[1], "1", "the first process there is another");
    two.exec(&["ps"]).ok().says("sleep 1000");
    two.oci(&["delete", "--force", two.id()]).ok();
    two.is_gone();
    assert_eq!(one.status(), "running");
    // "The runtime MUST generate an error if path is not associated with a namespace of type `type`".
    for (name, path) in [
        ("of another kind", path("uts")),
        ("missing", "/nonexistent/ns".to_owned()),
        ("no namespace", "/etc/passwd".to_owned()),
    ] {
        let wrong = Bundle::new("true").namespace("network", json!({"type": "network", "path": path}));
        assert_ne!(wrong.create(&[]).code, 0, "{name}");
        wrong.is_gone();
    }
}

#[test]
fn its_clocks_can_be_set_off() {
    let uptime = |text: &str| text.split('.').next().and_then(|text| text.parse::<u64>().ok()).expect("seconds");
    let host = uptime(&fs::read_to_string("/proc/uptime").expect("uptime"));
    let bundle = Bundle::new("cat /proc/uptime; sleep 1000").namespace("time", json!({"type": "time"})).set(
        "/linux/timeOffsets",
        json!({"boottime": {"secs": 1_000_000, "nanosecs": 5}, "monotonic": {"secs": 2_000_000}}),
    );
    bundle.begin();
    bundle.wait_to_say("\n");
    let inside = uptime(&bundle.said());
    assert!((1_000_000..1_001_000).contains(&(inside - host)), "{inside} {host}");
    assert_ne!(namespace(&bundle.pid().to_string(), "time"), namespace("self", "time"));
    let offsets = bundle.exec(&["cat", "/proc/1/timens_offsets"]).ok().stdout;
    let words: Vec<&str> = offsets.split_whitespace().collect();
    assert_eq!(words, ["monotonic", "2000000", "0", "boottime", "1000000", "5"]);
    assert_eq!(
        uptime(&bundle.exec(&["cat", "/proc/uptime"]).ok().stdout) / 1_000_000,
        1,
        "what is added lives by it too"
    );
}

fn own(path: &Path, id: u32) {
    lchown(path, Some(id), Some(id)).expect("chown");
    if !path.is_symlink() && path.is_dir() {
        for entry in fs::read_dir(path).expect("a folder") {
            own(&entry.expect("an entry").path(), id);
        }
    }
}

#[test]
fn a_user_namespace_maps_its_ids() {
    let maps = json!([{"containerID": 0, "hostID": 200_000, "size": 65536}]);
    let script = "id -u; touch /made; cat /proc/self/uid_map | tr -s ' '; stat -c '%t:%T' /dev/null; echo x > /dev/null; \
        stat -c %u /bin/busybox; echo ready; sleep 1000";
    let bundle = Bundle::new(script)
        .namespace("user", json!({"type": "user"}))
        .set("/linux/uidMappings", maps.clone())
        .set("/linux/gidMappings", maps);
    own(&bundle.path("rootfs"), 200_000);
    bundle.begin();
    bundle.wait_to_say("ready");
    assert_eq!(bundle.said(), "0\n 0 200000 65536\n1:3\n0\nready\n");
    let pid = bundle.pid();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("a status");
    assert!(status.contains("Uid:\t200000\t200000\t200000\t200000"), "{status}");
    assert_eq!(fs::metadata(bundle.inside("made")).expect("a file").uid(), 200_000);
    assert_ne!(namespace(&pid.to_string(), "user"), namespace("self", "user"));
    assert_eq!(bundle.exec(&["id", "-u"]).ok().text(), "0");
    let added = bundle.exec_with(&["--user", "1000:1000"], &["sh", "-c", "id -u; touch /tmp/user"]).ok();
    assert_eq!(added.text(), "1000");
    assert_eq!(fs::metadata(bundle.inside("tmp/user")).expect("a file").uid(), 201_000);
}

// Control groups (config-linux.md).

#[test]
fn the_path_of_the_cgroup_is_honoured() {
    let name = format!("moyai-oci-at-{}", std::process::id());
    let bundle = Bundle::new("sleep 1000").set("/linux/cgroupsPath", format!("/{name}/below"));
    bundle.begin();
    let pid = bundle.pid();
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("its groups");
    assert!(text.lines().any(|line| line.ends_with(&format!(":/{name}/below"))), "{text}");
    let folders = groups(&format!("{name}/below"));
    assert!(!folders.is_empty());
    for folder in &folders {
        let pids = fs::read_to_string(folder.join("cgroup.procs")).expect("processes");
        assert!(pids.lines().any(|line| line == pid.to_string()), "{}: {pids}", folder.display());
    }
    bundle.oci(&["delete", "--force", bundle.id()]).ok();
    assert!(groups(&format!("{name}/below")).is_empty());
    for folder in groups(&name) {
        fs::remove_dir(&folder).expect("what is above it was not the container's");
    }
}

#[test]
fn limits_are_those_of_the_bundle() {
    let mut resources = json!({
        "memory": {"limit": 128 << 20, "reservation": 64 << 20, "swappiness": 10},
        "cpu": {"shares": 512, "quota": 50000, "period": 200_000, "cpus": "0", "mems": "0"},
        "pids": {"limit": 42},
    });
    if one_tree() {
        resources["memory"].as_object_mut().expect("limits").remove("swappiness");
    }
    let bundle = Bundle::new("sleep 1000").set("/linux/resources", resources);
    bundle.begin();
    let v1 = [
        ("memory", "memory.limit_in_bytes", "134217728"),
        ("memory", "memory.soft_limit_in_bytes", "67108864"),
        ("memory", "memory.swappiness", "10"),
        ("cpu", "cpu.shares", "512"),
        ("cpu", "cpu.cfs_quota_us", "50000"),
        ("cpu", "cpu.cfs_period_us", "200000"),
        ("cpuset", "cpuset.cpus", "0"),
        ("cpuset", "cpuset.mems", "0"),
        ("pids", "pids.max", "42"),
    ];
    let v2 = [
        ("", "memory.max", "134217728"),
        ("", "memory.low", "67108864"),
        ("", "cpu.max", "50000 200000"),
        ("", "cpuset.cpus", "0"),
        ("", "cpuset.mems", "0"),
        ("", "pids.max", "42"),
    ];
    for (controller, file, expected) in if one_tree() { &v2[..] } else { &v1[..] } {
        assert_eq!(group_value(&bundle, controller, [file; 2]), *expected, "{file}");
        let pids = group_value(&bundle, controller, ["cgroup.procs"; 2]);
        assert!(pids.lines().any(|pid| pid == bundle.pid().to_string()), "{controller}: {pids}");
    }
    let bundle = Bundle::new("sleep 1000").set("/linux/resources/pids/limit", -1);
    bundle.begin();
    assert_eq!(group_value(&bundle, "pids", ["pids.max"; 2]), "max");
}

#[test]
fn a_limit_that_cannot_be_set_is_named() {
    let at = |field: &str, value: Value| Bundle::new("true").set(&format!("/linux/resources{field}"), value);
    // No machine has pages of that size, and this one perhaps no controller for any.
    let huge = json!([{"pageSize": "3MB", "limit": 0}]);
    // "If the conversion is not possible the runtime MUST generate an error" (config-linux.md, "Unified").
    let other = if one_tree() {
        [
            (at("/memory", json!({"swappiness": 10})), "linux.resources.memory.swappiness: only cgroup v1"),
            (at("/network", json!({"classID": 1})), "linux.resources.network.classID: only cgroup v1"),
        ]
    } else {
        [
            (at("/unified", json!({"memory.high": "1000"})), "linux.resources.unified[memory.high]: only cgroup v2"),
            (at("/unified", json!({"no.such": "1000"})), "linux.resources.unified[no.such]: only cgroup v2"),
        ]
    };
    let own = [
        (at("/hugepageLimits", huge), "linux.resources.hugepageLimits[0]"),
        (at("/cpu", json!({"cpus": "4000"})), "linux.resources.cpu.cpus"),
    ];
    for (bundle, field) in own.into_iter().chain(other) {
        refused(&bundle.create(&[]).says(field));
        bundle.is_gone();
    }
}

#[test]
fn a_limit_that_this_kernel_has_not_is_left_out_in_words() {
    // The weights of a scheduler that Linux 5.0 has no more.
    let device = json!([{"major": 1, "minor": 3, "leafWeight": 100}]);
    let lost = json!({"blockIO": {"leafWeight": 100, "weightDevice": device}});
    let bundle = Bundle::new("echo runs").set("/linux/resources", lost);
    if one_tree() {
        refused(&bundle.run().says("linux.resources.blockIO.leafWeight: only cgroup v1"));
        return;
    }
    let output = bundle.run().ok();
    assert_eq!(output.stdout, "runs\n");
    let said = |field: &str| {
        format!("warning: linux.resources.blockIO.{field} left out: this kernel has no blkio.leaf_weight")
    };
    output.says(&said("leafWeight")).says(&said("weightDevice[0].leafWeight"));
}

#[test]
fn what_goes_beyond_its_limits_is_stopped() {
    let hungry = Bundle::new("exec dd if=/dev/zero of=/dev/null bs=200M count=1")
        .set("/linux/resources/memory", json!({"limit": 16 << 20}));
    hungry.run().exits(137);
    hungry.is_gone();
    let many =
        Bundle::new("for i in 1 2 3 4 5 6 7 8; do sleep 100 & done; echo all").set("/linux/resources/pids/limit", 5);
    let output = many.run();
    assert!(!output.stdout.contains("all"), "{output}");
    many.is_gone();
}

#[test]
fn its_cgroups_are_mounted_read_only_and_show_it_alone() {
    let [folder, file] = match one_tree() {
        true => ["/sys/fs/cgroup", "memory.max"],
        false => ["/sys/fs/cgroup/memory", "memory.limit_in_bytes"],
    };
    let script = format!(
        "grep -c . {folder}/cgroup.procs; touch /sys/fs/cgroup/x || echo no; echo 1 > {folder}/{file} || echo no; \
         ls {folder} | grep -c moyai; ls -d {folder}/release_agent 2>/dev/null"
    );
    assert_eq!(Bundle::new(&script).run().stdout, "2\nno\nno\n0\n");
}

// System call filters (config-linux.md, "Seccomp").

fn with_filter(script: &str, rules: Value) -> Bundle {
    Bundle::new(script).set("/linux/seccomp", json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}))
}

#[test]
fn a_call_can_be_refused_with_an_error_number() {
    let rules = json!([
        {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28},
        {"names": ["rmdir", "unlinkat"], "action": "SCMP_ACT_ERRNO"},
        {"names": ["no_such_call", "mknod_of_another_time"], "action": "SCMP_ACT_KILL_PROCESS"},
    ]);
    let output = with_filter("mkdir /x; rmdir /tmp; grep Seccomp: /proc/self/status", rules).run();
    assert!(output.stderr.contains("'/x': No space left on device"), "{output}");
    assert!(output.stderr.contains("'/tmp': Operation not permitted"), "{output}");
    assert_eq!(output.stdout.trim(), "Seccomp:\t2");
}

#[test]
fn a_default_can_refuse_and_a_list_allow() {
    let bundle = Bundle::new("uname -s; umask; mkdir /x").set("/linux/seccomp", json!({
        "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 13,
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_AARCH64"],
        "syscalls": [{"action": "SCMP_ACT_ALLOW", "names": ["read", "write", "open", "openat", "close", "stat", "fstat", "lstat",
            "newfstatat", "mmap", "mprotect", "munmap", "brk", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "ioctl",
            "execve", "exit_group", "fork", "clone", "vfork", "wait4", "uname", "getpid", "getppid", "getuid", "geteuid",
            "getgid", "getegid", "getcwd", "fcntl", "arch_prctl", "set_tid_address", "set_robust_list", "rseq", "prlimit64",
            "readlink", "readlinkat", "getrandom", "prctl", "setuid", "setgid", "dup2", "dup3", "pipe", "pipe2", "umask", "access",
            "faccessat", "faccessat2", "statx", "futex", "sigaltstack", "setreuid", "setregid", "chdir", "getgroups",
            "setgroups", "capget", "capset", "close_range", "fchdir", "getdents64"]}],
    }));
    let output = bundle.run();
    assert!(output.stdout.starts_with("Linux\n"), "{output}");
    assert!(output.stderr.contains("Permission denied"), "{output}");
}

#[test]
fn a_call_can_kill() {
    let rules = json!([{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_KILL_PROCESS"}]);
    with_filter("exec mkdir /x", rules.clone()).run().exits(159);
    assert_eq!(with_filter("mkdir /x; echo $?", rules).prints(), "159\n", "it alone");
    let rules = json!([{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_TRAP"}]);
    assert_eq!(with_filter("mkdir /x; echo $?", rules).prints(), "159\n");
}

#[test]
fn a_rule_can_test_arguments() {
    // The mode of chmod, its second argument, or fchmodat's third.
    let test = |operator: &str, value: u64, two: u64| {
        let rule = |names: &str, index: u32| {
            json!({"names": [names], "action": "SCMP_ACT_ERRNO", "errnoRet": 5,
            "args": [{"index": index, "value": value, "valueTwo": two, "op": operator}]})
        };
        let script = "touch /f; for m in 600 644 700 755; do chmod $m /f 2>/dev/null || printf \"$m \"; done";
        let rules = json!([rule("chmod", 1), rule("fchmodat", 2)]);
        with_filter(script, rules).run().stdout.trim().to_owned()
    };
    assert_eq!(test("SCMP_CMP_EQ", 0o644, 0), "644");
    assert_eq!(test("SCMP_CMP_NE", 0o644, 0), "600 700 755");
    assert_eq!(test("SCMP_CMP_LT", 0o644, 0), "600");
    assert_eq!(test("SCMP_CMP_LE", 0o644, 0), "600 644");
    assert_eq!(test("SCMP_CMP_GT", 0o644, 0), "700 755");
    assert_eq!(test("SCMP_CMP_GE", 0o644, 0), "644 700 755");
    assert_eq!(test("SCMP_CMP_MASKED_EQ", 0o044, 0o044), "644 755");
    assert_eq!(test("SCMP_CMP_EQ", 0o644 | 1 << 32, 0), "", "all 64 bits are compared");
}

#[test]
fn a_call_can_be_logged_and_goes_on() {
    let rules = json!([{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_LOG"}]);
    let bundle =
        with_filter("mkdir /x && echo made", rules).set("/linux/seccomp/flags", json!(["SECCOMP_FILTER_FLAG_LOG"]));
    assert_eq!(bundle.prints(), "made\n");
}

#[test]
fn a_filter_that_was_compiled_before_holds_as_it_did() {
    let rules = json!([{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}]);
    let bundle = with_filter("mkdir /x; grep Seccomp: /proc/self/status", rules.clone());
    // What is kept: a file that is written anew is another one.
    let kept = |bundle: &Bundle| {
        let files = fs::read_dir(bundle.path("run/~filters")).into_iter().flatten().flatten();
        files.map(|file| (file.file_name(), file.metadata().expect("a file").ino())).collect::<BTreeMap<_, _>>()
    };
    let run = || {
        let output = bundle.run();
        assert!(output.stderr.contains("'/x': No space left on device"), "{output}");
        assert_eq!(output.stdout.trim(), "Seccomp:\t2");
    };
    // The folder of containers is there after the first.
    (0..2).for_each(|_| run());
    let first = kept(&bundle);
    assert_eq!(first.len(), 1);
    (0..2).for_each(|_| run());
    assert_eq!(kept(&bundle), first);
    let listed: Value = serde_json::from_str(&bundle.oci(&["list", "--format", "json"]).ok().stdout).expect("JSON");
    assert_eq!(listed, json!([]), "it is no container");
    refused(&bundle.oci(&["state", "~filters"]));
    // Another's is another.
    let bundle = bundle.set("/linux/seccomp/syscalls/0/errnoRet", 5);
    let output = bundle.run();
    assert!(output.stderr.contains("'/x': I/O error") || output.stderr.contains("Input/output"), "{output}");
    // Nor is one kept that the start goes another way under.
    let others = json!([{"names": ["fcntl"], "action": "SCMP_ACT_LOG"}]);
    let bundle = bundle.set("/linux/seccomp/syscalls", others);
    (0..2).for_each(|_| drop(bundle.run().ok()));
    assert_eq!(kept(&bundle).len(), 2);
    fs::remove_dir(bundle.inside("x")).expect("what that filter let it make");
    // A container that is made, started and added to with one that is kept; with what is left out of its bundle.
    let script = "mkdir /x; grep Seccomp: /proc/self/status; exec sleep 1000";
    let bundle = bundle
        .set("/linux/seccomp/syscalls", rules)
        .set("/process/args", json!(["sh", "-c", script]))
        .set("/process/capabilities/bounding", json!(["CAP_MKNOD", "CAP_OF_ANOTHER_TIME"]));
    // That one is taken is noted by the hour.
    let taken = |verb: &dyn Fn() -> Output| {
        let long_ago = SystemTime::now() - Duration::from_secs(2 * 3600);
        let files = fs::read_dir(bundle.path("run/~filters")).expect("a folder").flatten();
        let files: Vec<_> = files.map(|file| fs::File::open(file.path()).expect("a file")).collect();
        files.iter().for_each(|file| file.set_modified(long_ago).expect("a time"));
        let output = verb();
        let is_noted =
            |file: &&fs::File| file.metadata().and_then(|about| about.modified()).expect("a time") > long_ago;
        assert_eq!(files.iter().filter(is_noted).count(), 1, "{output}");
        output
    };
    let mut last = kept(&bundle);
    for again in [false, true] {
        let warned = taken(&|| bundle.create(&[])).ok();
        assert!(warned.stderr.contains("\"CAP_OF_ANOTHER_TIME\" left out"), "{warned}");
        bundle.start().ok();
        bundle.wait_to_say("Seccomp:\t2");
        let added = taken(&|| bundle.exec(&["mkdir", "/y"])).exits(1);
        assert!(added.stderr.contains("'/y': No space left on device"), "{added}");
        assert!(!bundle.inside("x").exists() && !bundle.inside("y").exists());
        bundle.oci(&["delete", "--force", bundle.id()]).ok();
        assert!(!again || kept(&bundle) == last, "{last:?}");
        last = kept(&bundle);
    }
    assert!(first.iter().all(|(name, inode)| last.get(name) == Some(inode)), "{first:?} serves for it: {last:?}");
}

#[test]
fn a_filter_holds_without_no_new_privileges_and_for_what_is_added() {
    let rules = json!([{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}]);
    let bundle = with_filter("mkdir /x; sleep 1000", rules)
        .set("/process/noNewPrivileges", false)
        .set("/process/user", json!({"uid": 1000, "gid": 1000}));
    bundle.begin();
    let output = bundle.exec(&["mkdir", "/tmp/y"]).exits(1);
    assert!(output.stderr.contains("No space left"), "{output}");
    let status = bundle.exec(&["grep", "-E", "^(NoNewPrivs|Seccomp):", "/proc/1/status", "/proc/self/status"]).ok();
    assert_eq!(status.stdout.matches("NoNewPrivs:\t0").count(), 2, "{status}");
    assert_eq!(status.stdout.matches("Seccomp:\t2").count(), 2, "{status}");
}

#[test]
fn a_listener_is_asked() {
    let rules = json!([{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_NOTIFY"}]);
    let bundle = with_filter("mkdir /x; echo end", rules).set("/annotations", json!({"key": "value"}));
    let path = bundle.text("listener");
    let bundle =
        bundle.set("/linux/seccomp/listenerPath", path).set("/linux/seccomp/listenerMetadata", "some metadata");
    let mut listener = take_descriptor(&bundle, "listener", "filter", "");
    let output = bundle.run();
    assert_eq!(output.stdout, "end\n", "{output}");
    assert!(output.stderr.contains("Operation not permitted"), "{output}");
    assert_eq!(listener.wait(), 0);
    let text = fs::read_to_string(bundle.path("listener.out")).expect("what was sent");
    let (first, calls) = text.split_once('\n').expect("a line");
    let state: Value = serde_json::from_str(first).unwrap_or_else(|error| panic!("{error}: {first}"));
    assert!(state["ociVersion"].is_string(), "{state}");
    assert_eq!(state["fds"], json!(["seccompFd"]));
    assert_eq!(state["metadata"], "some metadata");
    assert_eq!(state["state"]["id"], bundle.id());
    assert_eq!(state["state"]["annotations"], json!({"key": "value"}));
    assert_eq!(state["state"]["bundle"], bundle.text("").trim_end_matches('/'));
    assert!(calls.starts_with("call "), "{text}");
}

#[test]
fn a_listener_that_is_not_there_is_an_error() {
    let rules = json!([{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_NOTIFY"}]);
    let bundle = with_filter("true", rules.clone());
    refused(&bundle.create(&[]).says("linux.seccomp.listenerPath"));
    let path = bundle.text("nobody");
    let bundle = bundle.set("/linux/seccomp/listenerPath", path);
    refused(&bundle.create(&[]).says("linux.seccomp.listenerPath"));
    bundle.is_gone();
}

#[test]
fn its_personality_can_be_of_32_bits() {
    let bundle = Bundle::new("uname -m; sleep 1000").set("/linux/personality", json!({"domain": "LINUX32"}));
    bundle.begin();
    bundle.wait_to_say("\n");
    assert!(["i686\n", "armv8l\n"].contains(&&*bundle.said()), "{}", bundle.said());
}

// Terminals.

#[test]
fn a_terminal_goes_to_the_console_socket() {
    let script = "tty; stty size; stat -c '%F' /dev/console; test -t 0 -a -t 1 -a -t 2 && echo all; read line; echo \"got $line\"; \
        echo console > /dev/console; echo tty > /dev/tty; stat -c '%t' /dev/console";
    let bundle = Bundle::new(script)
        .set("/process/terminal", true)
        .set("/process/consoleSize", json!({"height": 33, "width": 77}));
    refused(&bundle.create(&[]).says("console-socket"));
    bundle.is_gone();
    let mut taker = take_descriptor(&bundle, "console", "terminal", "typed\n");
    bundle.create(&["--console-socket", &bundle.text("console")]).ok();
    bundle.start().ok();
    assert_eq!(taker.wait(), 0);
    let shown = fs::read_to_string(bundle.path("console.out")).expect("what was shown").replace('\r', "");
    for line in ["/dev/pts/0", "33 77", "character special file", "all", "got typed", "console", "tty", "88"] {
        assert!(shown.lines().any(|other| other == line), "`{line}` is not in {shown}");
    }
    bundle.wait_until("stopped");
}

#[test]
fn what_is_added_can_have_a_terminal() {
    let bundle = Bundle::new("sleep 1000");
    bundle.begin();
    let mut taker = take_descriptor(&bundle, "console", "terminal", "typed\n");
    let socket = bundle.text("console");
    let script = "tty; read line; echo \"got $line\"";
    bundle.exec_with(&["--tty", "--detach", "--console-socket", &socket], &["sh", "-c", script]).ok();
    assert_eq!(taker.wait(), 0);
    let shown = fs::read_to_string(bundle.path("console.out")).expect("what was shown");
    assert!(shown.contains("/dev/pts/0") && shown.contains("got typed"), "{shown}");
    refused(&bundle.exec_with(&["--tty", "--detach"], &["true"]).says("console-socket"));
}

#[test]
fn run_and_exec_show_a_terminal_of_their_own() {
    let bundle = Bundle::new("tty; echo shown; exit 4").set("/process/terminal", true);
    let output = bundle.run().exits(4);
    assert_eq!(output.stdout.replace('\r', ""), "/dev/pts/0\nshown\n");
    let bundle = Bundle::new("sleep 1000");
    bundle.begin();
    let output = bundle.exec_with(&["--tty"], &["sh", "-c", "tty; exit 6"]).exits(6);
    assert_eq!(output.stdout.trim(), "/dev/pts/0");
}

// Adding processes.

#[test]
fn what_is_added_runs_on_the_processors_that_are_named() {
    const LIST: &str = "Cpus_allowed_list:\t";
    let listed = |text: &str| text.lines().find_map(|line| Some(line.strip_prefix(LIST)?.to_owned())).expect("a list");
    let own = listed(&fs::read_to_string("/proc/self/status").expect("this process"));
    // Not the same, where it has two.
    let numbers: Vec<&str> = own.split([',', '-']).collect();
    let (one, other) = (numbers[0], numbers[numbers.len() - 1]);
    let shown = |output: Output| listed(&output.ok().stdout);
    let bundle = Bundle::new("sleep 1000").set("/process/execCPUAffinity", json!({"initial": one, "final": other}));
    bundle.begin();
    assert_eq!(shown(bundle.exec(&["cat", "/proc/self/status"])), other);
    // Not the first process.
    assert_eq!(shown(bundle.exec(&["cat", "/proc/1/status"])), own);
    let with = |affinity: Value| {
        let process = json!({"args": ["cat", "/proc/self/status"], "cwd": "/", "user": {"uid": 0, "gid": 0},
            "env": ["PATH=/bin"], "execCPUAffinity": affinity, "capabilities": {"bounding": ["CAP_NET_RAW", "CAP_NOSUCH"]}});
        fs::write(bundle.path("process.json"), process.to_string()).expect("written");
        bundle.exec_with(&["--process", &bundle.text("process.json")], &[])
    };
    // No list is as good as none, and an unknown capability a warning.
    assert_eq!(shown(with(json!({"initial": "", "final": one})).says("CAP_NOSUCH")), one);
    assert_eq!(shown(with(json!({"final": ""}))), own);
    refused(&with(json!({"final": "1-0"})).says("execCPUAffinity.final: `1-0`"));
    refused(&with(json!({"final": "0,99999"})).says("execCPUAffinity.final: `99999`"));
    refused(&with(json!({"initial": "x"})).says("execCPUAffinity.initial"));
    // Each is tried: no machine of the tests has these.
    refused(&with(json!({"initial": "8191"})).says("execCPUAffinity.initial: cannot run on 8191"));
    refused(&with(json!({"final": "8191"})).says("execCPUAffinity.final: cannot run on 8191"));
    let wrong = Bundle::new("true").set("/process/execCPUAffinity", json!({"initial": "3-1"}));
    refused(&wrong.run().says("process.execCPUAffinity.initial"));
}

#[test]
fn what_is_added_is_like_the_first_process_and_as_asked() {
    let bundle = Bundle::new("sleep 1000")
        .set("/process/env", json!(["PATH=/bin", "OWN=1", "BOTH=1"]))
        .set("/process/cwd", "/etc");
    bundle.begin();
    assert_eq!(bundle.exec(&["pwd"]).ok().stdout, "/etc\n");
    assert_eq!(bundle.exec(&["sh", "-c", "echo $OWN $BOTH"]).ok().stdout, "1 1\n");
    let options =
        ["--env", "BOTH=2", "--env", "NEW=a=b", "--cwd", "/tmp", "--user", "12:34", "--additional-gids", "56"];
    let script =
        "pwd; echo $OWN $BOTH $NEW; id -u; id -g; grep Groups /proc/self/status; grep CapBnd /proc/self/status";
    let text = bundle.exec_with(&options, &["sh", "-c", script]).ok().stdout;
    assert_eq!(text.replace('\t', ""), "/tmp\n1 2 a=b\n12\n34\nGroups:56 \nCapBnd:00000000a80425fb\n");
    let caps = bundle.exec_with(&["--cap", "CAP_SYS_ADMIN"], &["grep", "CapEff", "/proc/self/status"]).ok();
    assert_eq!(caps.stdout.trim(), "CapEff:\t00000000a82425fb");
    bundle.exec(&["sh", "-c", "exit 9"]).exits(9);
    bundle.exec(&["sh", "-c", "kill -TERM $$"]).exits(143);
    refused(&bundle.exec(&["nosuchprogram"]).exits(127).says("nosuchprogram"));
    refused(&bundle.exec(&["/etc"]).exits(126));
    refused(&bundle.exec(&[]));
    assert_eq!(bundle.status(), "running");
}

#[test]
fn what_is_added_is_in_all_namespaces_and_cgroups() {
    let bundle = Bundle::new("sleep 1000");
    bundle.begin();
    let first = bundle.pid().to_string();
    let file = bundle.text("pid");
    bundle.exec_with(&["--detach", "--pid-file", &file], &["sleep", "1000"]).ok();
    let added = fs::read_to_string(&file).expect("a pid file");
    assert_ne!(added, first);
    for kind in ALL.into_iter().chain(["user", "time"]) {
        assert_eq!(namespace(&added, kind), namespace(&first, kind), "{kind}");
    }
    let groups = |pid: &str| fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("its groups");
    assert_eq!(groups(&added), groups(&first));
    assert!(groups(&added).contains(bundle.id()));
    assert_eq!(fs::read_link(format!("/proc/{added}/root")).ok(), fs::read_link(format!("/proc/{first}/root")).ok());
    bundle.exec(&["ps"]).ok().says("sleep 1000");
    bundle.oci(&["delete", "--force", bundle.id()]).ok();
    assert!(!alive(added.parse().expect("a number")));
    bundle.is_gone();
}

#[test]
fn what_is_added_reads_what_is_given_to_it() {
    let bundle = Bundle::new("sleep 1000");
    bundle.begin();
    fs::write(bundle.path("given"), "given\n").expect("write");
    let mut command = bundle.command(&["exec", bundle.id(), "cat"]);
    command.stdin(fs::File::open(bundle.path("given")).expect("open"));
    assert_eq!(bundle.finish(command, "exec cat < given").ok().stdout, "given\n");
}

#[test]
fn a_process_can_be_added_from_a_file() {
    let bundle = Bundle::new("sleep 1000");
    bundle.begin();
    let file = bundle.text("process.json");
    let mut process = json!({
        "args": ["sh", "-c", "pwd; id -u; echo $A; umask; grep -E '^(CapEff|NoNewPrivs)' /proc/self/status; ulimit -n; exit 8"],
        "env": ["PATH=/bin", "A=1"], "cwd": "/tmp", "user": {"uid": 7, "gid": 8, "umask": 0o077},
        "capabilities": {"bounding": ["CAP_KILL"]}, "noNewPrivileges": true,
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 99, "hard": 99}],
    });
    fs::write(&file, process.to_string()).expect("write");
    let output = bundle.exec_with(&["--process", &file], &[]).exits(8);
    assert_eq!(
        output.stdout,
        "/tmp\n7\n1\n0077\nNoNewPrivs:\t1\nCapEff:\t0000000000000000\n99\n"
            .replace("NoNewPrivs:\t1\nCapEff:\t0000000000000000\n", "CapEff:\t0000000000000000\nNoNewPrivs:\t1\n"),
        "{output}"
    );
    process["cwd"] = json!("relative");
    fs::write(&file, process.to_string()).expect("write");
    refused(&bundle.exec_with(&["--process", &file], &[]).says("cwd"));
    fs::write(&file, "{\"args\": 5}").expect("write");
    refused(&bundle.exec_with(&["--process", &file], &[]).says(&file));
    refused(&bundle.exec_with(&["--process", "/nonexistent/process"], &[]).says("/nonexistent/process"));
}

#[test]
fn a_process_can_be_added_before_the_start() {
    let bundle = Bundle::new("sleep 1000");
    bundle.create(&[]).ok();
    assert_eq!(bundle.exec(&["hostname"]).ok().stdout, "inside\n");
    assert_eq!(bundle.status(), "created");
}

// What cannot be carried out (config.md).

#[test]
fn a_wrong_config_is_refused_with_the_path_of_the_field() {
    let cases: Vec<(&str, Value, &str)> = vec![
        ("/ociVersion", json!(""), "ociVersion"),
        ("/ociVersion", json!("1.x"), "ociVersion"),
        ("/ociVersion", json!("9.0.0"), "ociVersion"),
        ("/ociVersion", json!(5), "ociVersion"),
        ("/root", Value::Null, "root"),
        ("/root/path", json!(""), "root.path"),
        ("/root/path", json!("nonexistent"), "root.path"),
        ("/root/path", json!("config.json"), "root.path"),
        ("/process/args", json!([]), "process.args"),
        ("/process/args", json!([""]), "process.args"),
        ("/process/args", json!("sh"), "process.args"),
        ("/process/args", json!(["a\u{0}b"]), "process.args[0]"),
        ("/process/env", json!(["A=\u{0}"]), "process.env[0]"),
        ("/process/cwd", json!("tmp"), "process.cwd"),
        ("/process/cwd", json!(""), "process.cwd"),
        ("/process/user/uid", json!(-1), "process.user.uid"),
        ("/process/user/uid", json!("root"), "process.user.uid"),
        ("/process/rlimits", json!([{"type": "RLIMIT_NOSUCH", "soft": 1, "hard": 1}]), "process.rlimits[0].type"),
        ("/process/rlimits", json!([{"type": "RLIMIT_NOFILE", "soft": 2, "hard": 1}]), "process.rlimits[0].soft"),
        (
            "/process/rlimits",
            json!([{"type": "RLIMIT_NOFILE", "soft": 1, "hard": 1},
            {"type": "RLIMIT_NOFILE", "soft": 1, "hard": 1}]),
            "process.rlimits[1].type",
        ),
        ("/linux/namespaces", json!([{"type": "nosuch"}]), "linux.namespaces[0].type"),
        ("/linux/namespaces", json!([{"type": "uts"}, {"type": "mount"}, {"type": "uts"}]), "linux.namespaces[2].type"),
        (
            "/linux/namespaces",
            json!([{"type": "uts"}, {"type": "network", "path": "ns/net"}]),
            "linux.namespaces[1].path",
        ),
        (
            "/linux/namespaces",
            json!([{"type": "uts"}, {"type": "mount"}, {"type": "network", "path": "/nonexistent/net"}]),
            "/nonexistent/net",
        ),
        ("/linux/namespaces", json!([{"type": "mount"}]), "hostname"),
        ("/linux/uidMappings", json!([{"containerID": 0, "hostID": 0, "size": 1}]), "linux.uidMappings"),
        ("/linux/gidMappings", json!([{"containerID": 0, "hostID": 0, "size": 1}]), "linux.gidMappings"),
        ("/linux/timeOffsets", json!({"monotonic": {"secs": 1}}), "linux.timeOffsets"),
        ("/linux/maskedPaths", json!(["/proc/keys", "proc/keys"]), "linux.maskedPaths[1]"),
        ("/linux/readonlyPaths", json!(["proc/sys"]), "linux.readonlyPaths[0]"),
        ("/linux/rootfsPropagation", json!("sideways"), "linux.rootfsPropagation"),
        ("/linux/devices", json!([{"path": "dev/x", "type": "c", "major": 1, "minor": 3}]), "linux.devices[0].path"),
        ("/linux/devices", json!([{"path": "/dev/x", "type": "z", "major": 1, "minor": 3}]), "linux.devices[0].type"),
        ("/linux/seccomp", json!({"defaultAction": "SCMP_ACT_NOSUCH"}), "linux.seccomp.defaultAction"),
        (
            "/linux/seccomp",
            json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"], "action": "X"}]}),
            "linux.seccomp.syscalls[0].action",
        ),
        (
            "/linux/seccomp",
            json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"],
            "action": "SCMP_ACT_ERRNO", "args": [{"index": 6, "value": 1, "op": "SCMP_CMP_EQ"}]}]}),
            "linux.seccomp.syscalls[0].args[0].index",
        ),
        ("/linux/personality", json!({"domain": "LINUX64"}), "linux.personality.domain"),
        ("/linux/intelRdt", json!({"closID": "x"}), "linux.intelRdt"),
        ("/mounts/0", json!({"destination": ""}), "mounts[0].destination"),
        ("/mounts/0", json!({"source": "proc"}), "mounts[0]"),
        (
            "/mounts/0",
            json!({"destination": "/a/../../b", "type": "tmpfs", "source": "tmpfs"}),
            "mounts[0].destination",
        ),
        ("/mounts/0", json!({"destination": "/x", "type": "bind"}), "mounts[0].source"),
        (
            "/mounts/0",
            json!({"destination": "/x", "type": "bind", "source": "/nonexistent/source"}),
            "/nonexistent/source",
        ),
        ("/mounts/0", json!({"destination": "/x", "type": "nosuchfs", "source": "x"}), "mounts[0]"),
        (
            "/mounts/0",
            json!({"destination": "/x", "type": "tmpfs", "source": "x", "options": ["nosuchoption"]}),
            "mounts[0]",
        ),
        ("/hooks/poststop", json!([{"path": "/bin/true"}, {"path": "bin/true"}]), "hooks.poststop[1].path"),
        ("/hooks/prestart", json!([{"path": "/bin/true", "timeout": 0}]), "hooks.prestart[0].timeout"),
        ("/hooks/prestart", json!([{"args": ["true"]}]), "hooks.prestart[0]"),
        ("/linux/resources/devices", json!([{"allow": "yes"}]), "linux.resources.devices[0].allow"),
        ("/linux/resources/memory/limit", json!("1g"), "linux.resources.memory.limit"),
        ("/annotations", json!({"key": 5}), "annotations"),
    ];
    let bundle = Bundle::new("true");
    let good = bundle.config.clone();
    let mut bundle = bundle;
    let mut wrong = Vec::new();
    for (at, value, named) in cases {
        bundle.config = good.clone();
        bundle = bundle.set(at, value.clone());
        let output = bundle.create(&[]);
        if output.code == 0 || !output.stderr.starts_with("error: ") || !output.stderr.contains(named) {
            wrong.push(format!("{at} = {value}: `{named}` is not in {output}"));
        }
        if output.code == 0 {
            bundle.oci(&["delete", "--force", bundle.id()]).ok();
        }
        bundle.is_gone();
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_user_namespace_is_checked() {
    let user = |uids: Value, gids: Value| {
        Bundle::new("true")
            .namespace("user", json!({"type": "user"}))
            .set("/linux/uidMappings", uids)
            .set("/linux/gidMappings", gids)
    };
    let good = json!([{"containerID": 0, "hostID": 200_000, "size": 10}]);
    let twice =
        json!([{"containerID": 0, "hostID": 200_000, "size": 10}, {"containerID": 5, "hostID": 300_000, "size": 10}]);
    let zero = json!([{"containerID": 0, "hostID": 200_000, "size": 0}]);
    for (bundle, field) in [
        (user(json!([]), good.clone()), "linux.uidMappings"),
        (user(good.clone(), json!([])), "linux.gidMappings"),
        (user(twice, good.clone()), "linux.uidMappings[1]"),
        (user(good.clone(), zero), "linux.gidMappings[0].size"),
    ] {
        refused(&bundle.create(&[]).says(field));
        bundle.is_gone();
    }
}

#[test]
fn json_that_is_none_is_refused_with_its_place() {
    let bundle = Bundle::new("true");
    bundle.write();
    let path = bundle.path("config.json");
    for (text, place) in
        [("{\n  \"ociVersion\": \"1.2.0\",\n  oops\n}", "line 3 column 3"), ("", "line 1"), ("5", "line 1")]
    {
        fs::write(&path, text).expect("write");
        let output = bundle.oci(&["create", "--bundle", &bundle.text(""), bundle.id()]);
        refused(&output.says("config.json").says(place));
    }
    fs::write(&path, vec![b' '; 17 << 20]).expect("write");
    refused(&bundle.oci(&["create", "--bundle", &bundle.text(""), bundle.id()]).says("config.json"));
    bundle.is_gone();
}

#[test]
fn what_it_does_not_know_is_ignored() {
    // "Runtimes … MUST NOT generate an error if they encounter an unknown property" (config.md, "Extensibility").
    let bundle = Bundle::new("echo ran")
        .set("/unknown", json!({"a": 1}))
        .set("/process/unknown", "x")
        .set("/linux/unknown", json!([1]))
        .set("/linux/resources/unknown", json!({}))
        .set("/windows", json!({"layerFolders": ["x"]}));
    assert_eq!(bundle.prints(), "ran\n");
}

// What an image must not be able to do.

#[test]
fn the_program_itself_cannot_be_written_from_inside() {
    // CVE-2019-5736
    for with_small in [false, true] {
        program_is_out_of_reach(with_small);
    }
}

/// A rule on a call that the short way of `run` makes, which refuses nothing that anybody calls.
fn looks_at_fcntl() -> Value {
    let argument = json!({"index": 1, "value": 4095, "op": "SCMP_CMP_EQ"});
    json!([{"names": ["fcntl"], "action": "SCMP_ACT_ERRNO", "args": [argument]}])
}

#[test]
fn what_cannot_be_executed_is_named_whichever_way_it_would_begin() {
    // By a few instructions in memory; and where a filter looks at what those call, by the program itself from a read-only mount.
    for filtered in [false, true] {
        let program = |name: &str, text: &str, mode: u32| {
            let bundle = if filtered { with_filter("", looks_at_fcntl()) } else { Bundle::new("") };
            let bundle = bundle.set("/process/args", json!([name, "--version"]));
            if !text.is_empty() {
                let path = bundle.inside(name.trim_start_matches('/'));
                fs::write(&path, text).expect("write");
                fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("chmod");
            }
            bundle
        };
        let fails = |bundle: Bundle, code: i32, text: &str| {
            let output = bundle.run();
            assert!(output.code == code && output.stderr.contains(text), "{code} and `{text}`: {output}");
            bundle.is_gone();
        };
        fails(program("/script", "#!/no/such -x\n", 0o755), 127, "its interpreter is not: /no/such -x");
        fails(program("/garbage", "garbage", 0o755), 126, "`/garbage` is no program that this machine can run");
        fails(program("/missing", "", 0), 127, "there is no `/missing` in the image");
        let as_other = |bundle: Bundle| {
            bundle.set("/process/user", json!({"uid": 1000, "gid": 1000})).set("/process/capabilities", json!({}))
        };
        let unread = as_other(program("/unread", "#!/no/such\n", 0o111));
        fails(unread, 127, "`/unread` is in the image, but its interpreter is not: ");
        let own = as_other(program("/own", "#!/bin/sh\n", 0o700));
        fails(own, 126, "`/own` may not be executed: permission denied");
        let long = program("/bin/true", "", 0).set("/process/args", json!(["/bin/true", "x".repeat(200_000)]));
        fails(long, 126, "`/bin/true` cannot be executed: Argument list too long");
        // That is what leads to the program, once more: it has nowhere to say anything.
        let itself = program("/proc/self/exe", "", 0).run();
        let has_trampoline = cfg!(target_arch = "x86_64") && !filtered;
        assert_eq!(
            (itself.code, itself.stdout.is_empty()),
            if has_trampoline { (126, true) } else { (0, false) },
            "{itself}"
        );
    }
}

/// Where `run` cannot do with less it begins again from a read-only mount, before anything runs inside.
#[test]
fn what_runs_itself_inside_is_out_of_reach_too() {
    for with_small in [false, true] {
        let folder = tempfile::tempdir().expect("a folder");
        let copy = folder.path().join("moyai");
        copy_binary(&copy, with_small);
        let own = Bundle::new("sleep 1000").with_program(copy.clone());
        // A hook inside, with the right to look into what is not dumpable, keeps it until nobody runs it any more.
        let keep = "exec 3< /proc/1/exe; (while :; do (: > /proc/self/fd/3) 2> /tried; grep -q busy /tried || break; sleep 0.01; done; \
            mv /tried /why) > /dev/null 2>&1 &";
        let bundle = ["bounding", "effective", "permitted"]
            .iter()
            .fold(own, |bundle, set| bundle.add(&format!("/process/capabilities/{set}"), json!("CAP_SYS_PTRACE")));
        let bundle = bundle.hook("startContainer", keep);
        bundle.write();
        bundle.oci(&["run", "--detach", "--bundle", &bundle.text(""), bundle.id()]).ok();
        let why = || fs::read_to_string(bundle.inside("why")).ok();
        let why = wait_for("a write to it", PATIENCE, why);
        assert!(why.contains("Read-only file system"), "{why}");
        bundle.oci(&["delete", "--force", bundle.id()]).ok();
        // It runs itself, as process 1, which stays for as long as it reads; and a filter looks at what the short way calls.
        let bundle = with_filter("", looks_at_fcntl())
            .with_program(copy.clone())
            .set("/process/args", json!(["/proc/self/exe", "oci", "update", "--resources", "/hold", "none"]));
        bundle.write();
        tool("mkfifo", &[&bundle.text("rootfs/hold")]);
        bundle.oci(&["run", "--detach", "--bundle", &bundle.text(""), bundle.id()]).ok();
        let mount_of = |path: &str| {
            let file = fs::File::open(path).expect("a program");
            let about = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd())).expect("its descriptor");
            about.lines().find_map(|line| line.strip_prefix("mnt_id:").map(str::to_owned)).expect("its mount")
        };
        let inside = format!("/proc/{}/exe", bundle.pid());
        assert_ne!(mount_of(&inside), mount_of(&copy.to_string_lossy()), "it is on a mount of its own");
        bundle.oci(&["delete", "--force", bundle.id()]).ok();
    }
}

fn program_is_out_of_reach(with_small: bool) {
    let bundle = Bundle::new("");
    let program = bundle.path("moyai");
    copy_binary(&program, with_small);
    let sum = || tool("sh", &["-c", &format!("sha256sum {}*", program.display())]);
    let before = sum();
    // Whoever opens the program while it runs inside can write it when it has ended, through the descriptor.
    let attacker = "while :; do for p in /proc/[0-9]*; do case \"$(readlink $p/exe)\" in */busybox|'') ;; \
        *) echo found; exec 3< $p/exe && for i in 1 2 3 4 5 6 7 8 9; do (echo bad > /proc/self/fd/3) 2>/dev/null && echo WROTE; \
        (echo bad > $p/exe) 2>/dev/null && echo WROTE; done;; esac; done; done";
    let bundle = bundle
        .with_program(program.clone())
        .set("/process/args", json!(["/entry"]))
        .set("/process/noNewPrivileges", false);
    fs::write(bundle.inside("entry"), "#!/proc/self/exe\n").expect("write");
    fs::set_permissions(bundle.inside("entry"), fs::Permissions::from_mode(0o755)).expect("chmod");
    bundle.run();
    bundle.is_gone();
    let bundle = bundle.set("/process/args", json!(["/proc/self/exe", "oci", "--version"]));
    bundle.run();
    bundle.is_gone();
    let bundle = bundle.set("/process/args", json!(["sh", "-c", attacker]));
    bundle.begin();
    for _ in 0..20 {
        bundle.exec(&["true"]).ok();
    }
    assert!(!bundle.said().contains("WROTE"), "{}", bundle.said());
    assert_eq!(sum(), before);
}

#[test]
fn the_release_agent_cannot_be_written() {
    // CVE-2022-0492
    let script = "for f in $(ls -d /sys/fs/cgroup/*/release_agent /sys/fs/cgroup/release_agent 2>/dev/null); do \
        echo x > $f && echo WROTE; done; mkdir /tmp/c; mount -t cgroup -o memory c /tmp/c && echo MOUNTED; \
        unshare -UrmC mount -t cgroup -o memory c /tmp/c && echo MOUNTED; \
        mount -o remount,rw /sys/fs/cgroup && echo REMOUNTED; echo end";
    let output = Bundle::new(script).run();
    assert_eq!(output.stdout.lines().filter(|line| !line.starts_with("0")).collect::<Vec<_>>(), ["end"], "{output}");
}

#[test]
fn a_null_device_that_is_a_link_masks_nothing_of_the_host() {
    // CVE-2025-31133: what masks is bound from /dev/null, which the image must not choose.
    let without_dev = |bundle: Bundle| {
        let mut bundle = bundle;
        let mounts = bundle.config["mounts"].as_array_mut().expect("a list");
        mounts.retain(|mount| !mount["destination"].as_str().is_some_and(|path| path.starts_with("/dev")));
        bundle
    };
    for target in ["/proc/sysrq-trigger", "/etc/secret", "/proc/sys/kernel/core_pattern"] {
        let bundle = without_dev(Bundle::new("ls -l /etc/masked; head -c 3 /etc/masked"))
            .set("/linux/maskedPaths", json!(["/etc/masked"]));
        fs::write(bundle.inside("etc/masked"), "secret").expect("write");
        fs::write(bundle.inside("etc/secret"), "other").expect("write");
        symlink(target, bundle.inside("dev/null")).expect("link");
        let output = bundle.run();
        assert_ne!(output.code, 0, "{output}");
        refused(&output);
        bundle.is_gone();
        let null = fs::metadata("/dev/null").expect("the host's");
        assert_eq!(null.rdev(), 0x103, "the host's is what it was");
    }
}

#[test]
fn a_console_that_is_a_link_is_not_followed_out() {
    // CVE-2025-52565
    let bundle = Bundle::new("stat -c %t /dev/console; echo end").set("/process/terminal", true);
    let outside = bundle.text("outside");
    fs::write(&outside, "untouched").expect("write");
    let mut bundle = bundle;
    bundle.config["mounts"].as_array_mut().expect("a list").retain(|mount| mount["destination"] != "/dev");
    fs::create_dir_all(bundle.inside("dev/pts")).expect("make a folder");
    symlink(&outside, bundle.inside("dev/console")).expect("link");
    bundle.run();
    assert_eq!(fs::read_to_string(&outside).expect("read"), "untouched");
    assert!(!fs::read_to_string("/proc/self/mounts").expect("mounts").contains(&outside));
    bundle.is_gone();
}

// What was found by reading and by trying, and is mended.

/// CVE-2019-5736: whoever enters has a program that can be opened from inside, and written to when nobody runs it.
#[test]
fn a_program_that_enters_cannot_be_overwritten_from_inside() {
    for with_small in [false, true] {
        entering_is_out_of_reach(with_small);
    }
}

fn entering_is_out_of_reach(with_small: bool) {
    let folder = tempfile::tempdir().expect("a folder");
    let copy = folder.path().join("moyai");
    copy_binary(&copy, with_small);
    let length = || {
        let files = fs::read_dir(folder.path()).expect("the folder").flatten();
        files.map(|file| file.metadata().expect("a program").len()).sum::<u64>()
    };
    let before = length();
    let script = "while :; do for p in /proc/[0-9]*; do case \"$(readlink $p/exe)\" in */busybox|'') ;; *) \
        exec 3< $p/exe && { echo found > /found; n=0; while [ $n -lt 300 ]; do n=$((n+1)); \
        (echo '#!/bin/sh' > /proc/self/fd/3) 2>> /why && { echo WROTE > /wrote; break 3; }; done; }; esac; done; done";
    let bundle = Bundle::new(script).with_program(copy.clone());
    bundle.begin();
    tool("mkfifo", &[&bundle.text("rootfs/hold")]);
    wait_for("the program to be found from inside", PATIENCE, || {
        // It waits for what is written there, so that it is there for long enough to be found.
        bundle.exec(&["sh", "-c", "(sleep 1; : > /hold) > /dev/null 2>&1 &"]).ok();
        bundle.exec(&["/proc/self/exe", "oci", "update", "--resources", "/hold", "none"]);
        fs::read(bundle.inside("why")).is_ok_and(|why| !why.is_empty()).then_some(())
    });
    for _ in 0..20 {
        bundle.exec(&["/proc/self/exe", "oci", "features"]);
    }
    let why = bundle.text("rootfs/why");
    let why = fs::read_to_string(&why).unwrap_or_default();
    assert!(!bundle.inside("wrote").exists() && why.contains("Read-only file system"), "{why}");
    assert_eq!(length(), before);
}

#[test]
fn what_is_mounted_inside_never_appears_on_the_host() {
    let folder = tempfile::tempdir().expect("a folder");
    let shared = folder.path().join("shared").to_string_lossy().into_owned();
    let _mounted = Mounted::tmpfs(&shared);
    tool("mount", &["--make-shared", &shared]);
    fs::create_dir(format!("{shared}/sub")).expect("make a folder");
    let bundle = Bundle::new("mount -t tmpfs leak /data/sub && grep -c leak /proc/self/mounts; sleep 1000")
        .mount("bind", &shared, "/data", &["rbind"])
        .add("/process/capabilities/bounding", json!("CAP_SYS_ADMIN"))
        .add("/process/capabilities/effective", json!("CAP_SYS_ADMIN"))
        .add("/process/capabilities/permitted", json!("CAP_SYS_ADMIN"));
    bundle.begin();
    bundle.wait_to_say("1");
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    assert!(!mounts.lines().any(|line| line.contains(" leak ")), "{mounts}");
}

#[test]
fn what_cannot_be_granted_is_warned_of_and_relative_destinations_are_below_the_root() {
    let bundle = Bundle::new("ls /rel")
        .add("/process/capabilities/bounding", json!("CAP_SYS_RESOURCE"))
        .add("/process/capabilities/permitted", json!("CAP_SYS_RESOURCE"))
        .mount("tmpfs", "tmpfs", "rel/made", &[]);
    let output = bundle.run().ok();
    assert_eq!(output.stdout, "made\n");
    let had = fs::read_to_string("/proc/self/status").expect("status");
    let had = had.lines().find_map(|line| line.strip_prefix("CapBnd:\t")).expect("a mask");
    let has = u64::from_str_radix(had, 16).expect("a mask") & 1 << 24 != 0;
    assert_eq!(output.stderr.contains("CAP_SYS_RESOURCE"), !has, "{output}");
}

#[test]
fn a_hook_s_time_counts_though_it_does_not_read_the_state() {
    let bundle = Bundle::new("true")
        .set("/annotations", json!({"org.example.long": "x".repeat(200_000)}))
        .set("/hooks", json!({"createRuntime": [{"path": "/bin/sleep", "args": ["sleep", "60"], "timeout": 1}]}));
    let output = bundle.create(&[]);
    assert!(output.code != 0 && output.stderr.contains("longer than 1 s"), "{output}");
    bundle.is_gone();
}

#[test]
fn a_container_in_front_can_be_killed_and_added_to_from_elsewhere() {
    let bundle = Bundle::new("sleep 1000");
    bundle.write();
    let command = bundle.command(&["run", "--bundle", &bundle.text(""), bundle.id()]);
    let mut front = bundle.leave(command, "front");
    wait_for("it to run", PATIENCE, || {
        let output = bundle.oci(&["state", bundle.id()]);
        (output.code == 0 && output.stdout.contains("\"running\"")).then_some(())
    });
    bundle.exec(&["true"]).ok();
    bundle.oci(&["kill", bundle.id(), "KILL"]).ok();
    assert_eq!(front.wait(), 137);
    bundle.is_gone();
}
