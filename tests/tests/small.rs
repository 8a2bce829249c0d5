//! The small program beside `moyai`, which starts containers: when it is taken, and when it is not.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use moyai_tests::bundle::Bundle;
use moyai_tests::lab::{SMALL, binary, copy_binary};
use moyai_tests::{Host, Lab};

/// Copies of both programs in a folder of their own.
fn copies() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let copy = folder.path().join("moyai");
    copy_binary(&copy, true);
    (folder, copy)
}

/// What a process calls itself.
fn name_of(pid: u32) -> String {
    let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let program = line.split('\0').next().unwrap_or_default();
    Path::new(program).file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Which program makes the containers that `program` is asked for.
fn maker(program: &Path) -> String {
    let bundle = Bundle::new("echo ran").with_program(program.to_owned());
    // It waits at its gate, and is still what made it.
    bundle.create(&[]).ok();
    let name = name_of(bundle.pid());
    bundle.start().ok();
    bundle.wait_to_say("ran");
    name
}

#[test]
fn the_small_program_is_taken_where_it_is_to_be_trusted() {
    let (folder, program) = copies();
    let small = folder.path().join(SMALL);
    assert_eq!(maker(&program), SMALL);
    fs::set_permissions(&small, fs::Permissions::from_mode(0o775)).expect("chmod");
    assert_eq!(maker(&program), "moyai", "others could write to it");
    fs::set_permissions(&small, fs::Permissions::from_mode(0o755)).expect("chmod");
    chown(&small, Some(1), None).expect("chown");
    assert_eq!(maker(&program), "moyai", "it is somebody else's");
    chown(&small, Some(0), None).expect("chown");
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).expect("chmod");
    assert_eq!(maker(&program), "moyai", "others could put another in its place");
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("chmod");
    chown(folder.path(), Some(1), None).expect("chown");
    assert_eq!(maker(&program), "moyai", "the folder is somebody else's");
    chown(folder.path(), Some(0), None).expect("chown");
    assert_eq!(maker(&program), SMALL);
    fs::remove_file(&small).expect("remove it");
    assert_eq!(maker(&program), "moyai");
}

#[test]
fn one_of_another_build_becomes_what_started_it() {
    let run = |build: &str, program: &str| {
        let mut command = Command::new(binary().with_file_name(SMALL));
        let output = command.env("MOYAI_STARTED_BY", format!("{build}:{program}")).args(["state", "none"]).output();
        let output = output.expect("run it");
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
    };
    assert_eq!(run("0", "/bin/echo"), "oci state none\n");
    assert_eq!(run("0", binary().to_str().expect("ASCII")), "error: there is no container `none`\n");
    let said = run("0", "/nowhere/moyai");
    assert!(said.starts_with("error: this program is of another build than what started it"), "{said}");
}

#[test]
fn by_itself_it_is_a_runtime() {
    let bundle = Bundle::new("echo ran").with_program(binary().with_file_name(SMALL));
    assert_eq!(bundle.prints(), "ran\n");
    let output = Command::new(binary().with_file_name(SMALL)).arg("--version").output().expect("run it");
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("moyai version"));
}

/// Which program starts containers for a daemon of `program`, that has its folder in `data` for as long.
fn starter(host: &Host, program: &Path, data: &Path) -> String {
    let data = data.to_str().expect("ASCII");
    let moyai = |args: &[&str]| host.run(program.to_str().expect("ASCII"), &[&["--data", data], args].concat());
    moyai(&["init", "--registry", "off"]).ok();
    let daemon = moyai(&["--json", "status"]).ok().json()["pid"].as_u64().expect("a pid");
    let children = fs::read_to_string(format!("/proc/{daemon}/task/{daemon}/children")).expect("its children");
    let is_zygote = |pid: &u32| {
        let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.contains("__zygote")
    };
    let zygote = children.split_whitespace().filter_map(|pid| pid.parse().ok()).find(is_zygote).expect("a zygote");
    let name = name_of(zygote);
    moyai(&["down"]).ok();
    name
}

#[test]
fn a_daemon_has_it_start_containers() {
    let lab = Lab::new(1);
    let [host] = lab.hosts();
    let (_folder, program) = copies();
    assert_eq!(starter(host, &program, &lab.folder().join("data")), SMALL);
}

#[test]
fn a_daemon_starts_whatever_lies_there() {
    let lab = Lab::new(1);
    let [host] = lab.hosts();
    let (folder, program) = copies();
    let small = folder.path().join(SMALL);
    for (at, (text, mode)) in [("#!/bin/sh\nexit 0\n", 0o755), ("", 0o755), ("half", 0o644)].into_iter().enumerate() {
        fs::remove_file(&small).expect("remove it");
        fs::write(&small, text).expect("write");
        fs::set_permissions(&small, fs::Permissions::from_mode(mode)).expect("chmod");
        let name = starter(host, &program, &lab.folder().join(format!("data-{at}")));
        assert_eq!(name, "exe", "{text:?}: it does the same itself");
    }
}
