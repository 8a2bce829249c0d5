//! Devices of a machine in containers: those that it offers, and those that its CDI files name.

use moyai_tests::{Host, Lab, PATIENCE, images, wait_for};

/// Two GPUs of a vendor that has none: null devices under other names.
const GPUS: &str = "
cdiVersion: 0.6.0
kind: example.org/gpu
devices:
  - {name: '0', containerEdits: {deviceNodes: [{path: /dev/gpu0, hostPath: /dev/full}], env: [GPU=0]}}
  - {name: '1', containerEdits: {deviceNodes: [{path: /dev/gpu1, hostPath: /dev/full}], env: [GPU=1]}}
containerEdits:
  env: [DRIVER=yes]
";

/// Two hosts; lab-2 has the GPUs, and offers a device.
fn lab() -> Lab {
    let lab = Lab::new(2);
    let [one, two] = lab.hosts();
    let etc = lab.folder().join("etc");
    std::fs::create_dir_all(etc.join("cdi")).expect("make a folder");
    std::fs::write(etc.join("cdi/gpu.yaml"), GPUS).expect("write a file");
    one.moyai(&["init"]).ok();
    two.boot_with(&format!("mount -t overlay overlay -o lowerdir={}:/etc /etc", etc.display()));
    let ticket = one.ticket(&[]);
    two.moyai(&["join", &ticket, "--offer", "/dev/fuse"]).ok();
    lab.wait_for_mesh();
    one.load(&images::alpine());
    lab
}

fn run(host: &Host, options: &[&str], script: &str) -> moyai_tests::Output {
    host.moyai(&[&["run", "--rm"], options, &["alpine", "sh", "-c", script]].concat())
}

#[test]
fn a_device_that_a_node_offers_is_usable_as_asked_and_no_other() {
    let lab = lab();
    let [one, _] = lab.hosts();
    // Only lab-2 offers it, so it comes up there without a word about it.
    run(one, &["--device", "/dev/fuse"], ": <> /dev/fuse").ok();
    run(one, &["--device", "/dev/fuse:/dev/other:r"], ": < /dev/other; : <> /dev/other").exits(1).says("not permitted");
    run(one, &[], ": < /dev/fuse").exits(1);
    run(one, &["--device", "/dev/kmsg"], "true").fails(125).says("does not offer /dev/kmsg");
    run(one, &["--device", "/dev/fuse:q"], "true").fails(125).says("`r`, `w` and `m`");
    run(one, &["--device", "zero"], "true").fails(125).says("vendor/class=name");
    run(one, &["--sandbox", "strict", "--device", "/dev/fuse"], "true").fails(125).says("strict sandbox");
}

#[test]
fn gpus_are_counted_given_to_one_and_free_again() {
    let lab = lab();
    let [one, two] = lab.hosts();
    let seen = "ls /dev/gpu*; echo $DRIVER";
    run(one, &["--gpus", "1"], seen).ok().says("/dev/gpu").says("yes");
    run(one, &["--device", "example.org/gpu=1"], seen).ok().says("/dev/gpu1");
    assert_eq!(run(one, &["--gpus", "all"], "ls /dev/gpu* | wc -l").ok().stdout, "2\n");
    run(one, &["--on", "example.org/gpu=2"], "true").ok();
    run(one, &["--gpus", "3"], "true").fails(125).says("does not offer 3 gpu");
    run(one, &["--gpus", "many"], "true").fails(125).says("a number, all");

    let begin = |name: &str, gpus: &str| {
        one.moyai(&["run", "-d", "--stop-timeout", "0", "--name", name, "--gpus", gpus, "alpine", "sleep", "1000"])
    };
    begin("first", "1").ok();
    begin("second", "1").ok();
    let env = |name: &str| one.moyai(&["exec", name, "sh", "-c", "echo $GPU"]).ok().stdout;
    assert_ne!(env("first"), env("second"), "each has one of its own");
    begin("third", "1").fails(125).says("no gpu is free");
    // What is whose is known to the next daemon.
    let (first, second) = (env("first"), env("second"));
    two.kill_daemon();
    two.up();
    one.moyai(&["rm", "-f", "first"]).ok();
    wait_for("what waits for a GPU to get the one that is free", PATIENCE, || {
        (one.workload("third")?["state"] == "running").then_some(())
    });
    assert_eq!((env("third"), env("second")), (first, second));
}
