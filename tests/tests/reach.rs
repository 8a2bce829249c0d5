//! Into a container that runs, from anywhere: terminals, attach, cp, stats, pause, health, and other OCI runtimes.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::Stdio;

use moyai_tests::lab::binary;
use moyai_tests::{Host, Lab, Output, PATIENCE, images, wait_for};

fn two_hosts() -> Lab {
    let lab = Lab::mesh(2);
    let [one, _] = lab.hosts();
    one.load(&images::alpine());
    lab
}

/// Starts `name` on lab-2, by lab-1.
fn begin(one: &Host, name: &str, options: &[&str], script: &str) {
    let there = ["run", "-d", "--stop-timeout", "0", "--name", name, "--on", "node=lab-2"];
    one.moyai(&[&there[..], options, &["alpine", "sh", "-c", script]].concat()).ok();
}

/// The command line at a terminal, at which `typed` is typed when a shell asks for it, or, where none will, at once.
fn at_terminal(host: &Host, args: &str, typed: &str) -> Output {
    let line = format!("{} --data {} {args}", binary().display(), host.data.display());
    let mut command = host.command("script", &["-qec", &line, "/dev/null"]);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("script(1)");
    let (mut stdin, mut stdout) = (child.stdin.take().expect("a pipe"), child.stdout.take().expect("a pipe"));
    let (typed, mut text, mut buffer) = (typed.to_owned(), Vec::new(), [0; 4096]);
    let mut waits = !typed.is_empty() && !args.starts_with("attach");
    if !waits {
        stdin.write_all(typed.as_bytes()).expect("somebody reads");
    }
    while let Ok(len @ 1..) = stdout.read(&mut buffer) {
        text.extend_from_slice(&buffer[..len]);
        // Its prompt; what is typed before the terminal is raw would be taken for this side's keys.
        if waits && text[text.len().saturating_sub(16)..].windows(4).any(|end| end == b"/ # ") {
            waits = false;
            stdin.write_all(typed.as_bytes()).expect("somebody reads");
        }
    }
    let output = child.wait_with_output().expect("it ends");
    Output {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&text).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        command: args.to_owned(),
    }
}

#[test]
fn a_terminal_of_one_s_own_on_another_machine() {
    let lab = two_hosts();
    let [one, _] = lab.hosts();
    let output = at_terminal(one, "run --rm -it --on node=lab-2 alpine sh", "tty; echo $((40 + 2)) $TERM\nexit 7\n");
    assert!(output.stdout.contains("/dev/pts/0") && output.stdout.contains("42 xterm"), "{output}");
    assert_eq!(output.code, 7, "{output}");
    wait_for("--rm to have removed it", PATIENCE, || one.workloads().is_empty().then_some(()));

    // What it writes before anybody is there is not missed, and its end is not waited for in vain.
    let output = at_terminal(one, "run --rm -t alpine sh -c 'seq 1 500; tty'", "");
    // By the terminal, or, where it had ended before that was there, by the log.
    let text = output.stdout.replace('\r', "");
    assert!(text.contains("1\n2\n") && text.contains("500\n/dev/pts/0"), "{output}");
    assert_eq!(output.code, 0, "{output}");
    one.moyai(&["run", "-t", "alpine", "true"]).fails(125).says("no terminal");
}

#[test]
fn a_node_s_next_life_is_reached_at_once() {
    let lab = two_hosts();
    let [one, two] = lab.hosts();
    begin(one, "web", &[], "sleep 1000");
    for _ in 0..5 {
        // A connection to the life that ends now, of which lab-1 may not have heard when it asks again.
        one.moyai(&["exec", "web", "true"]).ok();
        two.kill_daemon();
        two.up();
        wait_for("it to run there", PATIENCE, || (two.workload("web")?["state"] == "running").then_some(()));
        // On a slow disk it was away for long enough to be missed.
        wait_for("that to be known", PATIENCE, || {
            let alive = one.moyai(&["--json", "nodes"]).ok().stdout.matches("\"alive\"").count() == 2;
            (alive && one.workload("web")?["state"] == "running").then_some(())
        });
        assert_eq!(one.moyai(&["exec", "web", "echo", "still"]).ok().stdout, "still\n");
    }
}

#[test]
fn one_leaves_a_container_and_comes_back() {
    let lab = two_hosts();
    let [one, _] = lab.hosts();
    let output = at_terminal(one, "run -it --name shell --on node=lab-2 alpine sh", "A=kept\n\x10\x11");
    assert!(output.stderr.contains("goes on") || output.stdout.contains("goes on"), "{output}");
    assert_eq!(output.code, 0, "{output}");
    assert_eq!(one.workload("shell").expect("a workload")["state"], "running");
    let output = at_terminal(one, "attach shell", "echo still-$A\nexit 3\n");
    assert!(output.stdout.contains("still-kept"), "{output}");
    assert_eq!(output.code, 3, "{output}");
    one.moyai(&["attach", "shell"]).fails(1).says("does not run anywhere");
    one.moyai(&["attach", "nosuch"]).fails(1).says("nosuch");
}

#[test]
fn input_goes_in_and_output_comes_out_whole() {
    let lab = two_hosts();
    let [one, _] = lab.hosts();
    let bytes = moyai_tests::hostile::noise(3 << 20, 7);
    let file = lab.folder().join("noise");
    fs::write(&file, &bytes).expect("write a file");
    let there = ["run", "--rm", "-i", "--on", "node=lab-2", "alpine", "sha256sum"];
    let output = one.moyai_fed(&there, &file).ok();
    let expected = one.run("sha256sum", &[&file.to_string_lossy()]).ok();
    assert_eq!(output.stdout[..64], expected.stdout[..64]);
    // Both ways at once, more than any pipe holds.
    begin(one, "held", &[], "exec sleep 1000");
    let output = one.moyai_fed(&["exec", "-i", "held", "sh", "-c", "tee /dev/stderr | sha256sum"], &file);
    assert_eq!(output.stdout[..64], expected.stdout[..64]);
    let there = ["run", "--rm", "-i", "--on", "node=lab-2", "alpine", "sh", "-c", "cat; echo to-stderr >&2; exit 4"];
    let output = one.moyai_fed(&there, &file);
    assert_eq!(output.code, 4, "{}", output.stderr);
    assert!(output.stderr.contains("to-stderr"));
}

#[test]
fn files_are_copied_both_ways_and_never_to_where_they_should_not() {
    let lab = two_hosts();
    let [one, _] = lab.hosts();
    begin(
        one,
        "web",
        &[],
        "mkdir -p /srv/in; echo inside > /srv/in/file; ln -s / /srv/root; ln -s /srv/in /srv/link; exec sleep 1000",
    );
    wait_for("its files", PATIENCE, || (one.moyai(&["exec", "web", "ls", "/srv/link"]).code == 0).then_some(()));
    let here = lab.folder().join("here");
    fs::create_dir(&here).expect("make a folder");
    let path = |name: &str| here.join(name).to_string_lossy().into_owned();

    one.moyai(&["cp", "web:/srv/in", &path("new")]).ok();
    assert_eq!(fs::read_to_string(here.join("new/file")).expect("copied"), "inside\n");
    one.moyai(&["cp", "web:/srv/in/file", &path("")]).ok();
    assert_eq!(fs::read_to_string(here.join("file")).expect("copied"), "inside\n");
    let listing = one.moyai(&["cp", "web:/srv/in", "-"]).ok();
    assert!(listing.stdout.contains("in/file"), "a tar stream");

    fs::create_dir_all(here.join("site/sub")).expect("make folders");
    fs::write(here.join("site/sub/page"), "page").expect("write a file");
    fs::set_permissions(here.join("site/sub/page"), fs::Permissions::from_mode(0o4750)).expect("set its mode");
    one.moyai(&["cp", &path("site"), "web:/srv/link"]).ok();
    one.moyai(&["cp", &path("site/."), "web:/srv/other"]).ok();
    let read = |path: &str| one.moyai(&["exec", "web", "cat", path]).ok().stdout;
    assert_eq!((read("/srv/in/site/sub/page"), read("/srv/other/sub/page")), ("page".to_owned(), "page".to_owned()));
    let mode = one.moyai(&["exec", "web", "stat", "-c", "%a %u", "/srv/other/sub/page"]).ok().stdout;
    assert_eq!(mode, "750 0\n", "no set-user-ID bit");

    // The container's root is where its links lead, and not the machine's.
    let secret = lab.folder().join("secret");
    fs::write(&secret, "secret").expect("write a file");
    let outside = format!("web:/srv/root{}", secret.display());
    one.moyai(&["cp", &outside, &path("stolen")]).fails(1).says("No such file");
    one.moyai(&["cp", &path("file"), &format!("web:/srv/root{}/planted", lab.folder().display())]).fails(1);
    assert!(!lab.folder().join("planted").exists());

    one.moyai(&["cp", "web:/nosuch", &path("x")]).fails(1).says("/nosuch");
    one.moyai(&["cp", &path("nosuch"), "web:/srv"]).fails(1).says("nosuch");
    one.moyai(&["cp", "nobody:/srv", &path("x")]).fails(1).says("nobody");
    one.moyai(&["cp", &path("file"), &path("x")]).fails(1).says("neither is in a container");
    assert_eq!(fs::metadata(here.join("file")).expect("there").uid(), 0);
}

#[test]
fn a_strict_sandbox_is_copied_to_as_its_own_root() {
    let lab = two_hosts();
    let [one, _] = lab.hosts();
    begin(one, "trap", &["--sandbox", "strict"], "exec sleep 1000");
    let file = lab.folder().join("file");
    fs::write(&file, "bait").expect("write a file");
    one.moyai(&["cp", &file.to_string_lossy(), "trap:/tmp/bait"]).ok();
    let seen = one.moyai(&["exec", "trap", "stat", "-c", "%u %s", "/tmp/bait"]).ok();
    assert_eq!(seen.stdout, "0 4\n");
    let back = lab.folder().join("back");
    one.moyai(&["cp", "trap:/tmp/bait", &back.to_string_lossy()]).ok();
    assert_eq!(fs::read_to_string(&back).expect("copied"), "bait");
    one.moyai(&["cp", &file.to_string_lossy(), "trap:/etc/bait"]).fails(1).says("Read-only");
}

#[test]
fn what_containers_use_is_shown_from_everywhere() {
    let lab = two_hosts();
    let [one, _] = lab.hosts();
    begin(one, "busy", &["-m", "64m"], "while :; do :; done");
    begin(one, "idle", &[], "exec sleep 1000");
    let rows = one.moyai(&["--json", "stats", "--no-stream"]).ok().rows();
    let of = |name: &str| rows.iter().find(|row| row["name"] == name).unwrap_or_else(|| panic!("{name}: {rows:?}"));
    assert!(of("busy")["cpu_percent"].as_f64() > of("idle")["cpu_percent"].as_f64(), "{rows:?}");
    assert_eq!(of("busy")["memory_limit"], 64 << 20);
    assert_eq!(of("busy")["node"], "lab-2");
    assert!(of("busy")["memory"].as_u64() > Some(0) && of("idle")["pids"] == 1, "{rows:?}");
    one.moyai(&["stats", "--no-stream", "busy"]).ok().says("64.0 MiB");
    one.moyai(&["stats", "nosuch"]).fails(1).says("nosuch");
}

#[test]
fn a_paused_container_stands_still_and_can_be_stopped() {
    let lab = two_hosts();
    let [one, two] = lab.hosts();
    begin(one, "clock", &[], "i=0; while :; do i=$((i + 1)); echo $i; sleep 0.02; done");
    let lines = || one.moyai(&["logs", "clock"]).ok().stdout.lines().count();
    wait_for("it to write", PATIENCE, || (lines() > 3).then_some(()));
    one.moyai(&["pause", "clock"]).ok();
    wait_for("the mesh to know", PATIENCE, || (one.workload("clock")?["detail"] == "paused").then_some(()));
    let id = one.workload("clock").expect("a workload")["id"].as_str().expect("an id").to_owned();
    let pid = two.container(&id).pid;
    let ticks =
        || fs::read_to_string(format!("/proc/{pid}/stat")).expect("it is there").split(' ').nth(13).map(str::to_owned);
    let (before, written) = (ticks(), lines());
    assert_eq!((ticks(), lines()), (before, written));
    one.moyai(&["unpause", "clock"]).ok();
    wait_for("it to go on", PATIENCE, || (lines() > written).then_some(()));
    one.moyai(&["pause", "clock"]).ok();
    one.moyai(&["rm", "-f", "clock"]).ok();
    wait_for("it to be gone", PATIENCE, || two.containers(&id).is_empty().then_some(()));
    one.moyai(&["pause", "clock"]).fails(1).says("clock");
}

#[test]
fn health_is_known_and_what_is_not_well_is_started_anew() {
    let lab = two_hosts();
    let [one, two] = lab.hosts();
    let check = ["--health-cmd", "test -e /well || { echo gone wrong; false; }", "--health-interval", "500ms"];
    begin(one, "marked", &[&check[..], &["--health-retries", "2"]].concat(), "touch /well; exec sleep 1000");
    let detail = |name: &str| Some(one.workload(name)?["detail"].as_str()?.to_owned());
    wait_for("it to be well", PATIENCE, || (detail("marked")? == "healthy").then_some(()));
    one.moyai(&["exec", "marked", "rm", "/well"]).ok();
    wait_for("it to be unwell", PATIENCE, || (detail("marked")? == "unhealthy: gone wrong").then_some(()));
    assert_eq!(one.workload("marked").expect("a workload")["state"], "running", "without a policy it is only said");
    one.moyai(&["exec", "marked", "touch", "/well"]).ok();
    wait_for("it to be well again", PATIENCE, || (detail("marked")? == "healthy").then_some(()));

    let policy = ["--restart", "always"];
    begin(one, "mended", &[&check[..], &policy].concat(), "touch /well; echo begun; exec sleep 1000");
    wait_for("it to be well", PATIENCE, || (detail("mended")? == "healthy").then_some(()));
    one.moyai(&["exec", "mended", "rm", "/well"]).ok();
    wait_for("it to be started anew", PATIENCE, || {
        let row = one.workload("mended")?;
        (row["restarts"].as_u64()? > 0 && row["state"] == "running").then_some(())
    });
    let hangs = ["--health-cmd", "sleep 1000", "--health-interval", "500ms", "--health-timeout", "200ms"];
    begin(one, "hangs", &[&hangs[..], &["--health-retries", "1"]].concat(), "exec sleep 1000");
    wait_for("its check to be given up", PATIENCE, || detail("hangs")?.contains("more than 200 ms").then_some(()));
    let id = one.workload("hangs").expect("a workload")["id"].as_str().expect("an id").to_owned();
    wait_for("no check to be left behind", PATIENCE, || {
        (two.cgroups.processes_of(&format!("-{id}")).len() <= 2).then_some(())
    });
    one.moyai(&["run", "--health-cmd", "true", "--health-interval", "0s", "alpine", "true"])
        .fails(125)
        .says("health check");
}

#[test]
fn crun_makes_containers_of_the_same_bundles() {
    made_by("crun");
}

#[test]
fn runc_makes_containers_of_the_same_bundles() {
    made_by("runc");
}

#[test]
fn runsc_has_containers_in_a_kernel_of_their_own() {
    let lab = two_hosts();
    let [one, two] = lab.hosts();
    // Debian's takes any network namespace of a newer kernel for the machine's, and refuses it.
    let there = ["run", "--rm", "--on", "node=lab-2", "--runtime", "runsc", "--network", "none"];
    let run = |rest: &[&str]| one.moyai(&[&there[..], rest].concat());
    let output = run(&["-m", "64m", "alpine", "sh", "-c", "echo out; echo err >&2; dmesg | grep -c gVisor; exit 5"]);
    assert_eq!(output.code, 5, "{output}");
    assert!(output.stdout.starts_with("out\n1") && output.stderr.contains("err"), "{output}");
    run(&["alpine", "nosuchcommand"]).fails(127).says("nosuchcommand");
    let output = at_terminal(
        one,
        "run --rm -it --runtime runsc --network none alpine sh",
        "test -t 0 && echo term''inal\nexit 6\n",
    );
    assert!(output.stdout.contains("terminal") && output.code == 6, "{output}");

    let script = "trap 'exit 0' TERM; echo ready; while :; do sleep 0.05; done";
    begin(one, "kept", &["--runtime", "runsc", "--network", "none"], script);
    let add = |rest: &[&str]| one.moyai(&[&["exec"], rest].concat());
    assert_eq!(add(&["kept", "echo", "added"]).ok().stdout, "added\n");
    let through = lab.folder().join("through");
    fs::write(&through, "through\n").expect("write a file");
    assert_eq!(one.moyai_fed(&["exec", "-i", "kept", "cat"], &through).ok().stdout, "through\n");
    assert_eq!(
        add(&["-u", "7:8", "-w", "/tmp", "kept", "sh", "-c", "id -u; id -g; pwd; exit 3"]).stdout,
        "7\n8\n/tmp\n"
    );
    add(&["kept", "nosuchcommand"]).exits(127).says("nosuchcommand");
    let output = at_terminal(one, "exec -it kept sh", "test -t 0 && echo term''inal\nexit 4\n");
    assert!(output.stdout.contains("terminal") && output.code == 4, "{output}");
    one.moyai(&["cp", "kept:/etc/hostname", "-"]).fails(1).says("a kernel of its own");
    let id = outlives_its_daemon(one, two, "kept");
    assert_eq!(add(&["kept", "echo", "again"]).ok().stdout, "again\n");
    one.moyai(&["rm", "-f", "kept"]).ok();
    wait_for("it to be gone", PATIENCE, || two.containers(&id).is_empty().then_some(()));
}

/// What runs on `two` under this name goes on when the daemon there is killed and started again; its id.
fn outlives_its_daemon(one: &Host, two: &Host, name: &str) -> String {
    let id = one.workload(name).expect("a workload")["id"].as_str().expect("an id").to_owned();
    let pid = two.container(&id).pid;
    two.kill_daemon();
    two.up();
    assert_eq!(two.container(&id).pid, pid, "{name}: a daemon's end is not its end");
    wait_for("it to be known again", PATIENCE, || (one.workload(name)?["state"] == "running").then_some(()));
    id
}

fn made_by(runtime: &str) {
    let lab = two_hosts();
    let [one, two] = lab.hosts();
    let there = ["run", "--rm", "--on", "node=lab-2", "--runtime", runtime];
    let run = |rest: &[&str]| one.moyai(&[&there[..], rest].concat());
    let output = run(&["-m", "64m", "alpine", "sh", "-c", "echo out; echo err >&2; hostname -i; exit 5"]);
    assert_eq!(output.code, 5, "{runtime}: {output}");
    assert!(output.stdout.starts_with("out\n10.2") && output.stderr.contains("err"), "{runtime}: {output}");
    run(&["alpine", "nosuchcommand"]).fails(127).says("nosuchcommand");
    let output = at_terminal(one, &format!("run --rm -it --runtime {runtime} alpine sh"), "tty\nexit 6\n");
    assert!(output.stdout.contains("/dev/pts/0") && output.code == 6, "{runtime}: {output}");

    begin(one, "served", &["--runtime", runtime], "trap 'exit 0' TERM; echo ready; while :; do sleep 0.05; done");
    assert_eq!(one.moyai(&["exec", "served", "echo", "added"]).ok().stdout, "added\n", "{runtime}");
    let id = outlives_its_daemon(one, two, "served");
    one.moyai(&["rm", "-f", "served"]).ok();
    wait_for("it to be gone", PATIENCE, || two.containers(&id).is_empty().then_some(()));
    one.moyai(&["run", "--rm", "--runtime", "nosuch", "alpine", "true"]).fails(125).says("the OCI runtime nosuch");
    one.moyai(&["run", "--sandbox", "strict", "--runtime", "crun", "alpine", "true"]).fails(125).says("strict sandbox");
}
