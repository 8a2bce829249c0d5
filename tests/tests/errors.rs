//! What goes wrong is said in a sentence that names it, with a hint; nothing is left half done, and the next good
//! command works.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use moyai_tests::hostile::{Entry, docker_archive, noise, tar};
use moyai_tests::lab::binary;
use moyai_tests::{Host, Lab, Output, PATIENCE, images, wait_for};

/// Loads what must not be loaded: nothing of it may be there afterwards.
#[track_caller]
fn refused(host: &Host, archive: &Path) -> Output {
    let output = host.moyai(&["load", &archive.to_string_lossy()]).fails(1);
    assert!(host.images().is_empty(), "an image came of {output}");
    output
}

#[track_caller]
fn good_load_works(host: &Host) {
    host.load(&images::alpine());
    assert_eq!(host.moyai(&["run", "--rm", "alpine", "cat", "/etc/kept"]).ok().stdout, "kept\n");
}

/// Files in a store, without its index.
fn objects(host: &Host) -> usize {
    fn below(path: &Path) -> usize {
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        entries.map(|entry| if entry.path().is_dir() { below(&entry.path()) } else { 1 }).sum()
    }
    ["objects", "tmp", "layers"].iter().map(|dir| below(&host.data.join("store").join(dir))).sum()
}

fn write(folder: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.join(name);
    fs::write(&path, bytes).expect("write an archive");
    path
}

#[test]
fn a_cut_archive_is_refused_wherever_it_is_cut() {
    let lab = Lab::mesh(1);
    let [one] = lab.hosts();
    for form in ["alpine.tar", "alpine.oci.tar", "alpine.tar.gz", "alpine.tar.zst"] {
        let whole = fs::read(images::busybox(form)).expect("an archive");
        let cuts = [0, 1, 2, 100, 511, 512, 513, 1024, 3000, 70_000];
        let parts = [1, 2, 3, 5, 7, 8, 9].map(|tenths| whole.len() * tenths / 10);
        for cut in cuts.into_iter().chain(parts).filter(|cut| *cut < whole.len()) {
            let output = refused(one, &write(lab.folder(), &format!("cut-{cut}-{form}"), &whole[..cut]));
            assert!(output.stderr.contains(&format!("cut-{cut}-{form}")), "the file is named: {output}");
        }
    }
    assert_eq!(objects(one), 0, "files of archives that were refused are left in the store");
    good_load_works(one);
}

#[test]
fn a_changed_byte_is_found() {
    let lab = Lab::mesh(1);
    let [one] = lab.hosts();
    let change = |form: &str, text: &[u8]| {
        let mut bytes = fs::read(images::busybox(form)).expect("an archive");
        let at = bytes.windows(text.len()).position(|window| window == text).expect("the text is in the archive");
        bytes[at] ^= 1;
        refused(one, &write(lab.folder(), "changed.tar", &bytes))
    };
    assert!(change("alpine.tar", b"hello from the image").stderr.contains("sha256"), "a file of a layer");
    change("alpine.tar", b"\"diff_ids\"");
    change("alpine.tar", b"sha256:");
    change("alpine.oci.tar", b"application/vnd.oci.image.layer");
    let middle = |form: &str| {
        let mut bytes = fs::read(images::busybox(form)).expect("an archive");
        let at = bytes.len() / 2;
        bytes[at] ^= 0x55;
        refused(one, &write(lab.folder(), "changed.tar", &bytes))
    };
    for form in ["alpine.tar", "alpine.tar.gz", "alpine.tar.zst", "alpine.oci.tar"] {
        middle(form);
    }
    assert_eq!(objects(one), 0);
    good_load_works(one);
}

#[test]
fn nothing_in_an_archive_leads_out_of_it() {
    let lab = Lab::mesh(1);
    let [one] = lab.hosts();
    let outside = lab.folder().join("outside");
    fs::create_dir(&outside).expect("make a folder");
    let target = outside.to_string_lossy().into_owned();
    let victim = write(&outside, "victim", b"untouched");
    let victim_name = victim.to_string_lossy().into_owned();
    let up = "../".repeat(8);
    let cases: Vec<(&str, Vec<Entry>)> = vec![
        ("up", vec![Entry::file("../../etc/x")]),
        ("far up", vec![Entry::file(&format!("{up}{}/x", &target[1..]))]),
        ("up in the middle", vec![Entry::Folder("a/".to_owned()), Entry::file(&format!("a/{up}{}/x", &target[1..]))]),
        ("up alone", vec![Entry::file("..")]),
        ("through an absolute link", vec![Entry::symlink("out", &target), Entry::file("out/x")]),
        (
            "through a relative link",
            vec![Entry::symlink("out", &format!("{up}{}", &target[1..])), Entry::file("out/x")],
        ),
        ("a folder through a link", vec![Entry::symlink("out", &target), Entry::Folder("out/x/".to_owned())]),
        ("a link through a link", vec![Entry::symlink("out", &target), Entry::symlink("out/x", "/etc/passwd")]),
        ("a hard link out", vec![Entry::hardlink("x", &victim_name)]),
        ("a hard link up", vec![Entry::hardlink("x", &format!("{up}{}", &victim_name[1..]))]),
        ("a hard link through a link", vec![Entry::symlink("out", &target), Entry::hardlink("x", "out/victim")]),
        ("through a file", vec![Entry::file("a"), Entry::file("a/b")]),
    ];
    for (what, entries) in cases {
        let archive = lab.folder().join(format!("{}.tar", what.replace(' ', "-")));
        docker_archive(&archive, "evil", &[tar(&entries)]);
        let output = one.moyai(&["load", &archive.to_string_lossy()]).fails(1);
        assert!(one.images().is_empty(), "{what}: {output}");
    }
    // A link in a lower layer, and a file through it in an upper one.
    let archive = lab.folder().join("two-layers.tar");
    docker_archive(&archive, "evil", &[tar(&[Entry::symlink("out", &target)]), tar(&[Entry::file("out/x")])]);
    let loaded = one.moyai(&["load", &archive.to_string_lossy()]);
    if loaded.code == 0 {
        // The upper layer's folder replaces the link: that is what overlayfs makes of it.
        one.moyai(&["run", "--rm", "evil", "/nothing"]).fails(127);
    }
    let left: Vec<_> = fs::read_dir(&outside).expect("a folder").flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(left, ["victim"], "something was written outside");
    assert_eq!(fs::read(&victim).expect("a file"), b"untouched");
    assert!(!Path::new("/etc/x").exists());
    good_load_works(one);
}

#[test]
fn whiteouts_hide_nothing_outside() {
    let lab = Lab::mesh(1);
    let [one] = lab.hosts();
    for name in [".wh..", ".wh...", "a/.wh...", ".wh.", "a/.wh.b/c"] {
        let archive = lab.folder().join("whiteout.tar");
        docker_archive(&archive, "whiteout", &[tar(&[Entry::Folder("a/".to_owned()), Entry::file(name)])]);
        let output = one.moyai(&["load", &archive.to_string_lossy()]);
        if output.code != 0 {
            output.fails(1);
        }
        one.moyai(&["status"]).ok();
        assert!(one.data.join("store").is_dir() && one.data.join("node.key").exists());
    }
    one.load(&images::alpine());
    one.moyai(&["run", "--rm", "alpine", "true"]).ok();
}

#[test]
fn a_bomb_stops_at_the_limit() {
    let lab = Lab::mesh(1);
    let [one] = lab.hosts();
    let plain = lab.folder().join("bomb.tar");
    docker_archive(&plain, "bomb", &[tar(&[Entry::File("zeros".to_owned(), vec![0; 200 << 20])])]);
    for tool in [&["gzip", "-1"][..], &["zstd", "-q", "-3"]] {
        let bomb = lab.folder().join(format!("bomb.tar.{}", tool[0]));
        let input = fs::File::open(&plain).expect("an archive");
        let output = fs::File::create(&bomb).expect("a file");
        let packed =
            std::process::Command::new(tool[0]).args(&tool[1..]).arg("-c").stdin(input).stdout(output).status();
        assert!(packed.is_ok_and(|status| status.success()));
        assert!(bomb.metadata().expect("a file").len() < 2_000_000, "it is small on the outside");
        let load = ["load", "--limit", "50m", &*bomb.to_string_lossy()];
        let output = one.moyai(&load).fails(1);
        assert!(output.stderr.contains("--limit"), "the hint says how to allow it: {output}");
        assert!(one.images().is_empty());
    }
    assert_eq!(objects(one), 0);
    // An archive whose header promises more than there is.
    let mut lie = tar(&[Entry::File("layer.tar".to_owned(), vec![0; 512])]);
    lie[124..136].copy_from_slice(b"77777777777\0");
    lie[148..156].copy_from_slice(b"        ");
    let sum: u32 = lie[..512].iter().map(|byte| u32::from(*byte)).sum();
    lie[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    refused(one, &write(lab.folder(), "lie.tar", &lie));
    good_load_works(one);
    one.moyai(&["load", "--limit", "a lot", "x"]).fails(1);
}

#[test]
fn what_is_no_image_is_called_so() {
    let lab = Lab::mesh(1);
    let [one] = lab.hosts();
    let folder = lab.folder();
    refused(one, &write(folder, "empty.tar", b""));
    refused(one, &write(folder, "text.tar", b"this is no archive\n"));
    refused(one, &write(folder, "noise.tar", &noise(300_000, 3)));
    refused(one, &write(folder, "zeros.tar", &[0; 10_240]));
    refused(one, &write(folder, "other.tar", &tar(&[Entry::file("README")])));
    refused(one, &write(folder, "array.tar", &tar(&[Entry::File("manifest.json".to_owned(), b"[]".to_vec())])));
    refused(
        one,
        &write(folder, "json.tar", &tar(&[Entry::File("manifest.json".to_owned(), b"[{\"Config\":".to_vec())])),
    );
    let outside = br#"[{"Config":"../../etc/passwd","RepoTags":["x:1"],"Layers":["/etc/passwd"]}]"#;
    refused(one, &write(folder, "outside.tar", &tar(&[Entry::File("manifest.json".to_owned(), outside.to_vec())])));
    let deep = "[".repeat(100_000).into_bytes();
    refused(one, &write(folder, "deep.tar", &tar(&[Entry::File("index.json".to_owned(), deep)])));
    refused(one, Path::new("/no/such/file"));
    refused(one, Path::new("/etc"));
    refused(one, Path::new("/dev/null"));
    one.moyai(&["load", "--tag", "No Such:Name!", &images::alpine().to_string_lossy()]).fails(1);
    good_load_works(one);
}

#[test]
fn a_request_that_no_node_can_take_says_why() {
    let lab = Lab::mesh(3);
    let [one, two, three] = lab.hosts();
    one.load(&images::alpine());
    let output = two.moyai(&["run", "--name", "big", "--memory", "4t", "alpine", "true"]).fails(125);
    for name in ["lab-1", "lab-2", "lab-3", "memory"] {
        assert!(output.stderr.contains(name), "no word of {name}: {output}");
    }
    for host in [one, two, three] {
        wait_for("it to be pending, and why", PATIENCE, || {
            let row = host.workload("big").filter(|row| row["state"] == "pending")?;
            row["detail"].as_str()?.contains("memory").then_some(())
        });
        host.moyai(&["why", "big"]).ok().says("memory");
    }
    three.moyai(&["rm", "big"]).ok();
    wait_for("it to be gone", PATIENCE, || two.workload("big").is_none().then_some(()));
    two.moyai(&["run", "--name", "fast", "--cpus", "4000", "alpine", "true"]).fails(125).says("cpu");
    two.moyai(&["run", "--name", "odd", "--on", "gpu=none", "alpine", "true"]).fails(125).says("gpu");
    two.moyai(&["rm", "fast", "odd"]).ok();
    two.moyai(&["run", "--rm", "alpine", "true"]).ok();
}

#[test]
fn a_name_is_given_once() {
    let lab = Lab::mesh(2);
    let [one, two] = lab.hosts();
    one.load(&images::alpine());
    one.moyai(&["run", "-d", "--name", "taken", "alpine", "sleep", "1000"]).ok();
    one.moyai(&["run", "-d", "--name", "taken", "alpine", "true"]).fails(125).says("taken");
    wait_for("the other node to know", PATIENCE, || two.workload("taken").map(drop));
    two.moyai(&["run", "-d", "--name", "taken", "alpine", "true"]).fails(125).says("taken");
    assert_eq!(one.workloads().len(), 1);
    two.moyai(&["rm", "taken"]).ok();
    two.moyai(&["run", "--rm", "--name", "taken", "alpine", "true"]).ok();
    for name in ["a b", "../x", "a/b", "-x", &"x".repeat(300)] {
        one.moyai(&["run", &format!("--name={name}"), "alpine", "true"]).fails(125);
    }
}

#[test]
fn wrong_words_are_explained() {
    let lab = Lab::mesh(1);
    let [one] = lab.hosts();
    one.load(&images::alpine());
    for options in [
        &["--memory", "lots"][..],
        &["--memory", "1k"],
        &["--cpus", "0"],
        &["--cpus", "many"],
        &["--restart", "sometimes"],
        &["--stop-signal", "SIGNONE"],
        &["--on", "nothing"],
        &["--env-file", "/no/such/file"],
    ] {
        one.moyai(&[&["run"], options, &["alpine", "true"]].concat()).fails(125);
    }
    assert!(one.workloads().is_empty());
    for command in [
        &["logs", "nobody"][..],
        &["why", "nobody"],
        &["stop", "nobody"],
        &["start", "nobody"],
        &["rm", "nobody"],
        &["scale", "nobody", "2"],
        &["wait", "nobody"],
    ] {
        one.moyai(command).fails(1).says("nobody");
    }
    one.moyai(&["run", "-d", "--name", "on", "alpine", "sleep", "1000"]).ok();
    one.moyai(&["start", "on"]).fails(1);
    one.moyai(&["frobnicate"]).fails(2);
    one.moyai(&["run", "--no-such-option", "alpine"]).fails(2);
    one.moyai(&["run"]).fails(2);
}

#[test]
fn a_port_that_is_taken_is_named() {
    let lab = Lab::new(1);
    let [one] = lab.hosts();
    let mut taker = one.command("busybox", &["nc", "-l", "-p", "4755"]).stdout(Stdio::null()).spawn().expect("run nc");
    wait_for("the port to be taken", PATIENCE, || one.run("ss", &["-Hlnt"]).stdout.contains(":4755").then_some(()));
    let output = one.moyai(&["init"]).fails(1);
    assert!(output.stderr.contains("4755"), "{output}");
    one.moyai(&["nodes"]).fails(1);
    one.moyai(&["--listen", "0.0.0.0:5000", "init"]).ok();
    one.moyai(&["down"]).ok();
    one.moyai(&["--listen", "0.0.0.0:4755", "up"]).fails(1);
    moyai_tests::host::signal("TERM", &[taker.id()]);
    let _reaped = taker.wait();
    one.moyai(&["--listen", "0.0.0.0:4755", "up"]).ok();
    one.moyai(&["down"]).ok();
    for listen in ["nonsense", "4755", "10.99.99.99:4755", "0.0.0.0:99999", ""] {
        one.moyai(&["--listen", listen, "up"]).fails(1);
    }
    one.moyai(&["--listen", "0.0.0.0:0", "up"]).ok();
}

#[test]
fn without_a_daemon_every_command_says_so() {
    let lab = Lab::new(1);
    let [one] = lab.hosts();
    let archive = images::alpine();
    let commands: [&[&str]; 14] = [
        &["nodes"],
        &["status"],
        &["images"],
        &["ps"],
        &["events"],
        &["invite"],
        &["down"],
        &["load", &archive.to_string_lossy()],
        &["logs", "x"],
        &["why", "x"],
        &["stop", "x"],
        &["rm", "x"],
        &["wait", "x"],
        &["run", "alpine", "true"],
    ];
    let all_fail = |wanted: &str| {
        for command in commands {
            let output = one.moyai(command).fails(if command[0] == "run" { 125 } else { 1 });
            assert!(output.stderr.contains(wanted), "no word of `{wanted}`: {output}");
        }
    };
    all_fail("moyai init");
    one.moyai(&["up"]).fails(1).says("moyai init");
    one.moyai(&["init"]).ok();
    one.moyai(&["init"]).fails(1);
    let ticket = one.ticket(&[]);
    one.moyai(&["join", &ticket]).fails(1);
    one.moyai(&["up"]).fails(1);
    one.moyai(&["nodes"]).ok();
    one.moyai(&["down"]).ok();
    all_fail("moyai up");
    one.up();
    one.kill_daemon();
    // Its socket is still there.
    all_fail("moyai up");
    one.up();
    one.moyai(&["nodes"]).ok();
}

#[test]
fn without_privileges_it_says_which() {
    let lab = Lab::mesh(1);
    let [one] = lab.hosts();
    // Where anybody may read and write.
    let folder = lab.folder().join("open");
    fs::create_dir(&folder).expect("make a folder");
    for path in [lab.folder(), &folder] {
        fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o777)).expect("open it to all");
    }
    let program = folder.join("moyai");
    fs::copy(binary(), &program).expect("copy the program");
    let without = |rights: &[&str], data: &Path, args: &[&str]| {
        let program = program.to_string_lossy();
        let data = data.to_string_lossy();
        one.run("setpriv", &[rights, &[&*program, "--data", &*data], args].concat())
    };
    // Root of a container, as docker makes it.
    let output = without(&["--bounding-set=-all", "--inh-caps=-all"], &folder.join("data"), &["init"]).fails(1);
    assert!(output.stderr.contains("CAP_SYS_ADMIN"), "{output}");
    assert!(!folder.join("data").exists(), "nothing is made");
    let nobody =
        |data: &Path, args: &[&str]| without(&["--reuid", "65534", "--regid", "65534", "--clear-groups"], data, args);
    nobody(&one.data, &["nodes"]).fails(1).says("root");
    nobody(&one.data, &["run", "alpine", "true"]).fails(125);
    nobody(&one.data, &["up"]).fails(1);
    one.moyai(&["nodes"]).ok();
}

#[test]
fn a_full_disk_is_named_and_harms_nothing() {
    let lab = Lab::new(1);
    let [one] = lab.hosts();
    let data = one.data.to_string_lossy();
    one.boot_with(&format!("mkdir -p {data}; mount -t tmpfs -o size=40m tmpfs {data};"));
    one.moyai(&["init"]).ok();
    let big = lab.folder().join("big.tar");
    docker_archive(&big, "big", &[tar(&[Entry::File("noise".to_owned(), noise(60 << 20, 5))])]);
    for _ in 0..2 {
        let output = one.moyai(&["load", &big.to_string_lossy()]).fails(1);
        assert!(output.stderr.contains("full") && output.stderr.contains("make room"), "{output}");
        assert!(one.images().is_empty());
    }
    let left = one.run("find", &[&format!("{data}/store/objects"), "-type", "f"]).ok();
    assert_eq!(left.text(), "", "what did not fit is left on the disk");
    good_load_works(one);
    // A container that fills the disk harms itself.
    let fill = ["run", "--name", "filler", "alpine", "sh", "-c", "cat /dev/zero > /fill; rm /fill; echo emptied"];
    one.moyai(&fill).ok().says("emptied");
    one.moyai(&["rm", "filler"]).ok();
    good_load_works(one);
    one.moyai(&["down"]).ok();
    one.up();
    one.moyai(&["run", "--rm", "alpine", "true"]).ok();
}
