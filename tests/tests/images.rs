//! Images: every form goes in, what is in them comes out unchanged on another node, nothing is stored or sent twice.

use std::fs;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use moyai_tests::container::Container;
use moyai_tests::hostile::{self, Entry};
use moyai_tests::{Host, Lab, PATIENCE, has_linux, images, wait_for};

/// The forms that images have on this machine.
fn forms() -> impl Iterator<Item = &'static str> {
    let can_mount = has_linux(6, 12);
    ["image", "folders"].into_iter().filter(move |form| *form == "folders" || can_mount)
}

/// Does it in a mesh of `count` nodes for each form that images have on this machine.
fn in_both_forms(count: usize, test: impl Fn(&Lab)) {
    for form in forms() {
        let lab = Lab::mesh_with(count, &["--rootfs", form]);
        test(&lab);
        let made =
            |folder: &str| fs::read_dir(lab.host("lab-1").data.join("store").join(folder)).expect("a folder").count();
        let (images, folders) = (made("rootfs"), made("layers"));
        assert!(if form == "image" { folders == 0 } else { images == 0 }, "{form}: {images} and {folders}");
    }
}

/// Starts a container of `image` on lab-2 that only sleeps, to be looked into from outside.
fn asleep(host: &Host, there: &Host, image: &str) -> Container {
    let name = image.replace(['/', ':'], "-");
    let sleep = ["run", "-d", "--name", &name, "--on", "node=lab-2", "--entrypoint", "/bin/sleep", image, "1000"];
    host.moyai(&sleep).ok();
    there.container(host.workload(&name).expect("a workload")["id"].as_str().expect("an id"))
}

fn attribute(path: &Path, name: &str) -> String {
    let output = Command::new("getfattr").args(["--absolute-names", "-e", "hex", "-n", name]).arg(path).output();
    let output = output.expect("run getfattr");
    assert!(output.status.success(), "{} has no {name}", path.display());
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().find_map(|line| line.split_once('=')).map(|(_, value)| value.to_owned()).expect("a value")
}

#[test]
fn every_form_of_archive_is_the_same_image() {
    let lab = Lab::mesh(1);
    let [one] = lab.hosts();
    let first = one.moyai(&["--json", "load", &images::alpine().to_string_lossy()]).ok().json();
    assert_eq!(first["reference"], "alpine:latest");
    assert!(first["new"].as_u64() > Some(10) && first["new"] == first["chunks"], "{first}");
    // An image's id is the digest of its config (OCI image specification, "ImageID").
    let layout = images::busybox("alpine.oci");
    let json = |path: &str| -> serde_json::Value {
        serde_json::from_slice(&fs::read(layout.join(path)).expect("a document")).expect("JSON")
    };
    let manifest = json("index.json")["manifests"][0]["digest"].as_str().expect("a digest").replace(':', "/");
    assert_eq!(json(&format!("blobs/{manifest}"))["config"]["digest"], first["id"]);
    let size = stored(&one.data);
    for form in [
        "alpine.tar",
        "alpine.tar.gz",
        "alpine.tar.zst",
        "alpine.oci",
        "alpine.oci.tar",
        "alpine.oci.tar.gz",
        "alpine.oci.tar.zst",
    ] {
        let again = one.moyai(&["--json", "load", &images::busybox(form).to_string_lossy()]).ok().json();
        assert_eq!((&again["id"], &again["reference"]), (&first["id"], &first["reference"]), "{form}");
        assert_eq!((&again["new"], &again["size"]), (&0.into(), &first["size"]), "{form} stored something anew");
    }
    // But for the compressed layer, which is kept as it came, once.
    let layer = fs::metadata(images::busybox("alpine.oci.tar")).expect("an archive").len();
    assert!(
        stored(&one.data) <= size + layer + (256 << 10),
        "the store has grown from {size} to {}",
        stored(&one.data)
    );
    assert_eq!(one.images().len(), 1);
    let zstd = one.moyai(&["--json", "load", &images::busybox("zstd.oci").to_string_lossy()]).ok().json();
    assert_eq!((&zstd["reference"], &zstd["new"]), (&"zstd:latest".into(), &0.into()), "layers compressed by zstd");
    let fed = one.moyai_fed(&["load", "--tag", "lab/piped:2", "-"], &images::busybox("alpine.tar.zst")).ok();
    assert!(fed.stdout.starts_with("lab/piped:2  sha256:") && fed.stdout.contains(", 0 new"), "{fed}");
    let id = first["id"].as_str().expect("an id").to_owned();
    for name in ["alpine", "alpine:latest", "docker.io/library/alpine:latest", "zstd", "lab/piped:2", &id, &id[7..19]] {
        one.moyai(&["run", "--rm", name, "true"]).ok();
    }
}

/// Bytes that a node's images take on its disk.
fn stored(data: &Path) -> u64 {
    fn below(path: &Path, seen: &mut std::collections::BTreeSet<u64>) -> u64 {
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        let sizes = entries.filter_map(|entry| {
            let meta = entry.path().symlink_metadata().ok()?;
            let own = if seen.insert(meta.ino()) { meta.blocks() * 512 } else { 0 };
            Some(if meta.is_dir() { own + below(&entry.path(), seen) } else { own })
        });
        sizes.sum()
    }
    below(&data.join("store"), &mut std::collections::BTreeSet::new())
}

#[test]
fn what_is_in_a_layer_arrives_unchanged() {
    in_both_forms(2, |lab| {
        let [one, two] = lab.hosts();
        one.load(&images::alpine());
        let container = asleep(one, two, "alpine");
        let at = |path: &str| container.path(path);
        let meta = |path: &str| at(path).symlink_metadata().unwrap_or_else(|error| panic!("{path}: {error}"));
        assert_eq!(meta("/lab/hard-a").ino(), meta("/lab/hard-b").ino());
        assert_eq!(fs::read_link(at("/lab/symbolic")).expect("a link"), Path::new("hard-a"));
        assert_eq!(fs::read_link(at("/lab/dangling")).expect("a link"), Path::new("/nowhere"));
        assert_eq!(meta("/lab/setuid").permissions().mode() & 0o7777, 0o4755);
        assert_eq!(meta("/tmp").permissions().mode() & 0o7777, 0o1777);
        assert_eq!(meta("/root").permissions().mode() & 0o7777, 0o700);
        let owned = meta("/lab/owned");
        assert_eq!((owned.uid(), owned.gid(), owned.permissions().mode() & 0o7777), (1000, 2000, 0o640));
        assert_eq!(owned.mtime(), 981_173_106, "2001-02-03 04:05:06 UTC");
        let home = meta("/home/app");
        assert_eq!((home.uid(), home.gid()), (1000, 1000));
        // 1 << 8 | 3: major 1, minor 3, as the kernel encodes small numbers.
        assert!(meta("/lab/null").file_type().is_char_device() && meta("/lab/null").rdev() == 0x103);
        assert!(meta("/lab/fifo").file_type().is_fifo());
        assert_eq!(attribute(&at("/lab/attributes"), "user.lab"), "0x616e20617474726962757465");
        assert_eq!(attribute(&at("/lab/capable"), "security.capability"), "0x0100000200200000000000000000000000000000");
        assert_eq!(fs::read(at("/lab/bytes")).expect("a file"), b"\xff\xfe not utf-8");
        assert!(at("/lab/name with spaces").exists() && at("/lab/ünïcode").exists());
        assert_eq!(fs::read(at("/bin/busybox")).expect("a file"), fs::read("/bin/busybox").expect("busybox-static"));
        // What one container writes, the next one does not see.
        let run = ["run", "--rm", "--on", "node=lab-2", "alpine", "sh", "-c"];
        let change = "echo changed > /lab/hard-a; rm /etc/kept; cat /lab/hard-a";
        assert_eq!(one.moyai(&[&run[..], &[change]].concat()).ok().stdout, "changed\n");
        let look = "cat /lab/hard-a /etc/kept";
        assert_eq!(one.moyai(&[&run[..], &[look]].concat()).ok().stdout, "linked\nkept\n");
    });
}

#[test]
fn a_container_writes_over_its_image_as_over_any_folder() {
    in_both_forms(1, |lab| {
        let [one] = lab.hosts();
        one.load(&images::alpine());
        let sh = |options: &[&str], script: &str| {
            one.moyai(&[&["run", "--rm"], options, &["alpine", "sh", "-ec", script]].concat()).ok().stdout
        };
        // What is copied up keeps owner, mode and contents; hard links, folders and what is gone are as they should be.
        let script = "echo more >> /lab/owned; stat -c '%u %g %a' /lab/owned; mv /lab/setuid /tmp/; stat -c %a /tmp/setuid
                      mv /root /home/; test ! -e /root; cat /lab/hard-b; rm -r /home; mkdir /home; ls -A /home
                      ln /etc/kept /etc/kept2; echo x >> /etc/kept2; tail -n 1 /etc/kept; rm -r /lab; ls -d /lab 2>&1 || :";
        let said = sh(&[], script);
        let lines: Vec<&str> = said.lines().collect();
        assert_eq!(lines[..4], ["1000 2000 640", "4755", "linked", "x"], "{said}");
        assert!(lines.len() == 5 && lines[4].contains("No such file"), "{said}");
        // Its users are looked up in it.
        assert_eq!(sh(&["-u", "app"], "id -u; cat /lab/hard-a"), "1000\nlinked\n");
        // In a sandbox its root owns what root owns in the image, and everything is read-only.
        let strict = sh(
            &["--sandbox", "strict"],
            "stat -c %u:%g /etc/kept /lab/owned; echo x 2> /dev/null > /etc/kept || echo no",
        );
        assert_eq!(strict, "0:0\n1000:2000\nno\n");
        // Many at once mount the same, and after the daemon's next start too.
        let names: Vec<String> = (0..5).map(|number| format!("same-{number}")).collect();
        for name in &names {
            one.moyai(&[
                "run",
                "-d",
                "--name",
                name,
                "alpine",
                "sh",
                "-c",
                "while :; do cat /lab/hard-a; sleep 1; done",
            ])
            .ok();
        }
        one.kill_daemon();
        one.up();
        for name in &names {
            let running = || (one.workload(name)?["state"] == "running").then_some(());
            wait_for("it to run on", PATIENCE, running);
            assert_eq!(one.moyai(&["exec", name, "cat", "/lab/hard-b"]).ok().stdout, "linked\n");
        }
        one.moyai(&["image", "rm", "alpine"]).says("is used by");
    });
}

#[test]
fn upper_layers_hide_and_replace() {
    in_both_forms(2, |lab| {
        let [one, two] = lab.hosts();
        one.load(&images::alpine());
        let layers = one.moyai(&["--json", "load", &images::busybox("layers.tar").to_string_lossy()]).ok().json();
        assert_eq!(layers["reference"], "lab/layers:1");
        assert!(layers["new"].as_u64() < Some(20), "what two images share is stored once: {layers}");
        let container = asleep(one, two, "lab/layers:1");
        let names = |path: &str| {
            let entries = fs::read_dir(container.path(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
            let mut names: Vec<String> =
                entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
            names.sort();
            names
        };
        assert!(!names("/etc").contains(&"gone".to_owned()) && names("/etc").contains(&"kept".to_owned()));
        assert!(!names("/etc").iter().any(|name| name.starts_with(".wh.")));
        assert_eq!(names("/opaque"), ["new"], "an opaque folder hides all below it");
        assert_eq!(names("/lab/changes"), ["inside"], "a file that became a folder");
        let run = one.moyai(&["run", "--rm", "--on", "node=lab-2", "lab/layers:1", "cat", "/etc/gone"]);
        run.exits(1);
    });
}

#[test]
fn a_layer_that_umoci_inserted_is_taken() {
    in_both_forms(1, |lab| {
        let [one] = lab.hosts();
        one.load(&images::busybox("inserted.tar"));
        assert_eq!(one.moyai(&["run", "--rm", "inserted", "ls", "/opaque"]).ok().stdout, "new\n");
    });
}

#[test]
fn files_that_are_alike_are_not_the_same_file() {
    use moyai_tests::hostile::{Entry, docker_archive, tar};
    in_both_forms(1, |lab| {
        let [one] = lab.hosts();
        let busybox = fs::read("/bin/busybox").expect("busybox-static");
        let layer = tar(&[
            Entry::Folder("bin/".to_owned()),
            Entry::File("bin/sh".to_owned(), busybox),
            Entry::file("one"),
            Entry::file("other"),
            Entry::hardlink("link", "one"),
        ]);
        let archive = lab.folder().join("alike.tar");
        docker_archive(&archive, "alike", &[layer]);
        one.load(&archive);
        let sh = |script: &str| one.moyai(&["run", "--rm", "alike", "sh", "-c", script]);
        sh("echo changed > /one; cat /other").ok().says("content");
        sh("test /one -ef /link").ok();
        sh("test /one -ef /other").exits(1);
        // cp(1) refuses to copy a file onto itself.
        sh("cp /one /other").ok();
    });
}

#[test]
fn a_hundred_megabytes_are_loaded_in_every_form_and_fetched() {
    let lab = Lab::mesh(2);
    let [one, two] = lab.hosts();
    let first = one.moyai(&["--json", "load", &images::debian("debian.tar").to_string_lossy()]).ok().json();
    assert_eq!(first["reference"], "debian:minimal");
    assert!(first["size"].as_u64() > Some(100_000_000), "{first}");
    // Asked for before the automatic copies can be complete: it starts when its image is there.
    let run = ["run", "--rm", "--on", "node=lab-2", "debian:minimal"];
    let version = one.moyai(&[&run[..], &["cat", "/etc/debian_version"]].concat()).ok();
    assert!(version.text().starts_with(|c: char| c.is_ascii_alphanumeric()), "{version}");
    assert!(two.images()[0]["nodes"].as_array().is_some_and(|nodes| nodes.len() == 2));
    for form in ["debian.tar", "debian.oci", "debian.oci.tar"] {
        for host in [one, two] {
            let again = host.moyai(&["--json", "load", &images::debian(form).to_string_lossy()]).ok().json();
            assert_eq!((&again["id"], &again["new"]), (&first["id"], &0.into()), "{form} on {}", host.name);
        }
    }
    // Every file arrived as it was: the package manager has their checksums.
    let check =
        one.moyai(&[&run[..], &["sh", "-c", "cd /; cat var/lib/dpkg/info/*.md5sums | md5sum -c --quiet"]].concat());
    assert_eq!((check.code, &*check.stdout), (0, ""), "{check}");
}

#[test]
fn a_node_fetches_from_several_at_once() {
    let lab = Lab::mesh(4);
    let [one, two, three, four] = lab.hosts();
    let hosts = [one, two, three, four];
    one.load(&images::debian("debian.tar"));
    let holders = wait_for("the automatic copies", PATIENCE * 2, || {
        let nodes = one.images().first()?["nodes"].as_array()?.clone();
        (nodes.len() >= 3).then_some(nodes)
    });
    let fetcher = hosts.into_iter().find(|host| !holders.contains(&host.name.as_str().into()));
    let fetcher = fetcher.expect("one node without a copy: three are kept");
    let before = hosts.map(Host::sent_bytes);
    let on = format!("node={}", fetcher.name);
    let one_of_them = if fetcher.name == "lab-1" { two } else { one };
    one_of_them.moyai(&["run", "--rm", "--on", &on, "debian:minimal", "cat", "/etc/debian_version"]).ok();
    let sent: Vec<u64> = hosts.iter().zip(before).map(|(host, before)| host.sent_bytes() - before).collect();
    let providers = sent.iter().filter(|bytes| **bytes > 10_000_000).count();
    assert!(providers >= 2, "bytes sent by each host: {sent:?}");
    let all: u64 = sent.iter().sum();
    let size = one.images()[0]["size"].as_u64().expect("a size");
    assert!(all < size * 13 / 10, "{all} bytes were sent for an image of {size}: {sent:?}");
}

#[test]
fn what_two_images_share_is_sent_once() {
    use moyai_tests::hostile::{Entry, docker_archive, noise, tar};
    let lab = Lab::mesh(2);
    let [one, two] = lab.hosts();
    let busybox = fs::read("/bin/busybox").expect("busybox-static");
    let base = || {
        vec![
            Entry::Folder("bin/".to_owned()),
            Entry::File("bin/sh".to_owned(), busybox.clone()),
            Entry::File("bulk".to_owned(), noise(20_000_000, 7)),
        ]
    };
    let load = |name: &str, entries: &[Entry]| {
        let path = lab.folder().join(format!("{name}.tar"));
        docker_archive(&path, name, &[tar(entries)]);
        one.moyai(&["--json", "load", &path.to_string_lossy()]).ok().json()
    };
    load("first", &base());
    one.moyai(&["run", "--rm", "--on", "node=lab-2", "first", "sh", "-c", "exit 0"]).ok();
    let before = one.sent_bytes();
    // Another layer, another digest, the same file under another name and with a few bytes put before it.
    let mut moved = b"a few bytes".to_vec();
    moved.extend(noise(20_000_000, 7));
    let mut entries = base();
    entries[2] = Entry::File("elsewhere".to_owned(), moved);
    let second = load("second", &entries);
    assert!(second["new"].as_u64() < second["chunks"].as_u64().map(|all| all / 4), "{second}");
    one.moyai(&["run", "--rm", "--on", "node=lab-2", "second", "sh", "-c", "test -s /elsewhere"]).ok();
    let sent = one.sent_bytes() - before;
    assert!(sent < 5_000_000, "{sent} bytes were sent for what lab-2 had already");
    assert_eq!(two.images().len(), 2);
}

/// Files of an image that takes its time on a slow line, `bulk-00` and on; see [`large`].
const FILES: u64 = 12;

/// What is in one of them.
fn file(number: u64) -> Vec<u8> {
    moyai_tests::hostile::noise(4_000_000, number)
}

/// An archive of a shell, a user `app`, and much else.
fn large(lab: &Lab) -> std::path::PathBuf {
    use moyai_tests::hostile::{Entry, docker_archive, tar};
    let mut entries = vec![
        Entry::Folder("bin/".to_owned()),
        Entry::File("bin/sh".to_owned(), fs::read("/bin/busybox").expect("busybox-static")),
        Entry::Folder("etc/".to_owned()),
        Entry::File("etc/passwd".to_owned(), b"app:x:1000:1000::/:/bin/sh\n".to_vec()),
    ];
    entries.extend((0..FILES).map(|number| Entry::File(format!("bulk-{number:02}"), file(number))));
    let path = lab.folder().join("large.tar");
    docker_archive(&path, "large", &[tar(&entries)]);
    path
}

#[test]
fn a_container_starts_before_all_of_its_image_is_there() {
    use moyai_tests::hostile::sha256;
    for form in forms() {
        let lab = Lab::mesh_with(2, &["--rootfs", form]);
        let [one, two] = lab.hosts();
        one.shape("12mbit");
        one.load(&large(&lab));
        let run = [
            "run",
            "-d",
            "--lazy",
            "--name",
            "early",
            "--on",
            "node=lab-2",
            "-u",
            "app",
            "large",
            "sh",
            "-c",
            "sleep 1000",
        ];
        one.moyai(&run).ok();
        wait_for("it to run", PATIENCE, || (one.workload("early")?["state"] == "running").then_some(()));
        let sum = |number| {
            let name = format!("sha256sum < /bulk-{number:02}");
            one.moyai(&["exec", "early", "sh", "-c", &name]).ok().stdout[..64].to_owned()
        };
        let is_whole = || one.images()[0]["nodes"].as_array().is_some_and(|nodes| nodes.len() == 2);
        if form == "image" {
            // The last comes long before all that is before it.
            assert_eq!(sum(FILES - 1), sha256(&file(FILES - 1)));
            assert!(!is_whole(), "it ran only when all of its image was there");
            // Whoever reads while there is no daemon waits for the next one.
            two.kill_daemon();
            let container = two.container(one.workload("early").expect("a workload")["id"].as_str().expect("an id"));
            let path = container.path("/bulk-06");
            let reading = std::thread::spawn(move || fs::read(path));
            two.up();
            assert_eq!(reading.join().expect("a reader").expect("a file"), file(6));
            assert_eq!(one.moyai(&["exec", "early", "sh", "-c", "id -u"]).ok().stdout, "1000\n");
        } else {
            assert!(is_whole(), "where it cannot be otherwise it waits for all of its image");
        }
        one.shape("1gbit");
        wait_for("all of the image", PATIENCE, || is_whole().then_some(()));
        for number in 0..FILES {
            assert_eq!(sum(number), sha256(&file(number)), "{form}: file {number}");
        }
        two.kill_daemon();
        let container = two.container(one.workload("early").expect("a workload")["id"].as_str().expect("an id"));
        assert_eq!(fs::read(container.path("/bulk-03")).expect("a file"), file(3), "what is whole needs no daemon");
        two.up();
        one.moyai(&["rm", "-f", "early"]).ok();
    }
}

#[test]
fn a_container_whose_image_stops_coming_reads_an_error_until_it_comes_again() {
    use moyai_tests::hostile::sha256;
    if forms().all(|form| form != "image") {
        return;
    }
    let lab = Lab::mesh(2);
    let [one, two] = lab.hosts();
    one.shape("12mbit");
    one.load(&large(&lab));
    one.moyai(&["run", "-d", "--lazy", "--name", "early", "--on", "node=lab-2", "large", "sh", "-c", "sleep 1000"])
        .ok();
    wait_for("it to run", PATIENCE, || (one.workload("early")?["state"] == "running").then_some(()));
    let sum = |number: u64| two.moyai(&["exec", "early", "sh", "-c", &format!("sha256sum < /bulk-{number:02}")]);
    // Of a program that is not all here the kernel would kill it where that is missing.
    two.moyai(&["exec", "early", "sh", "-c", "cat /bin/sh > /dev/null"]).ok();
    one.shape("1mbit");
    // Its only provider is gone.
    one.kill_machine();
    let output = sum(11);
    assert_ne!(output.code, 0, "{output}");
    output.says("Input/output error");
    let again = std::time::Instant::now();
    assert_ne!(sum(11).code, 0, "and again");
    assert!(again.elapsed() < std::time::Duration::from_secs(60), "at once, not after another minute");
    assert_eq!(two.workload("early").expect("a workload")["state"], "running", "what it has read it goes on with");
    two.moyai(&["exec", "early", "sh", "-c", "echo works"]).ok().says("works");
    one.boot();
    one.up();
    one.shape("1gbit");
    wait_for("the rest to come", PATIENCE, || {
        let output = sum(11);
        (output.code == 0 && output.stdout.starts_with(&sha256(&file(11)))).then_some(())
    });
}

#[test]
fn a_node_keeps_to_its_budget_and_gives_up_only_what_others_have() {
    let lab = Lab::new(4);
    let [one, two, three, four] = lab.hosts();
    one.moyai(&["init", "--image-budget", "much"]).fails(1).says("--image-budget");
    one.moyai(&["init", "--image-budget", "12m"]).ok();
    let ticket = one.ticket(&[]);
    [two, three, four].iter().for_each(|host| drop(host.moyai(&["join", &ticket]).ok()));
    lab.wait_for_mesh();
    one.load(&bulk(&lab, "first", 8_000_000, 1));
    one.load(&bulk(&lab, "second", 8_000_000, 2));
    let nodes = |name: &str| {
        let images = two.images();
        let image = images.iter().find(|image| image["reference"] == format!("{name}:latest")).expect("it is named");
        image["nodes"].as_array().expect("nodes").iter().map(|node| node.as_str().expect("a name").to_owned()).collect()
    };
    let (kept, gone) = wait_for("one to be given up where there is no room for both", PATIENCE * 3, || {
        let (first, second): (Vec<String>, Vec<String>) = (nodes("first"), nodes("second"));
        match (first.contains(&one.name), second.contains(&one.name)) {
            (true, true) => None,
            (true, false) => Some(("first", "second")),
            (false, _) => Some(("second", "first")),
        }
    });
    // This node may hear of the others a moment later than the one that gave it up.
    wait_for("two others to have what was given up", PATIENCE, || {
        let others: Vec<String> = nodes(gone);
        (others.len() >= 2).then_some(())
    });
    one.moyai(&["image", "verify", kept]).ok();
    one.moyai(&["image", "prune"]).ok().says("free again here");
    // It can be had again by whoever asks for it.
    one.moyai(&["pull", gone]).ok();
}

/// An archive of one file of random bytes.
fn bulk(lab: &Lab, name: &str, len: usize, seed: u64) -> std::path::PathBuf {
    use moyai_tests::hostile::{Entry, docker_archive, noise, tar};
    let path = lab.folder().join(format!("{name}-{seed}.tar"));
    docker_archive(&path, name, &[tar(&[Entry::File("bulk".to_owned(), noise(len, seed))])]);
    path
}

#[test]
fn a_pull_says_where_it_came_from_and_where_it_is_shows_how_far_others_are() {
    let lab = Lab::mesh(2);
    let [one, two] = lab.hosts();
    one.shape("40mbit");
    one.load(&bulk(&lab, "large", 20_000_000, 1));
    let pulling = two.start(&["pull", "large"]);
    let part = wait_for("it to be on its way", PATIENCE, || {
        let row =
            one.moyai(&["--json", "image", "where", "large"]).rows().into_iter().find(|row| row["node"] == "lab-2")?;
        (row["image"] == "fetching" && row["chunks"][0].as_u64() > Some(0)).then_some(row)
    });
    assert!(part["chunks"][1].as_u64() > part["chunks"][0].as_u64(), "{part}");
    wait_for("its end", PATIENCE, || pulling.text().contains("MB/s from lab-1").then_some(()));
    assert!(pulling.text().contains("large:latest  sha256:"), "{}", pulling.text());
    let shown = one.moyai(&["image", "where", "large"]).ok();
    assert!(shown.stdout.lines().skip(1).all(|line| line.contains("whole")), "{shown}");
    // Most of the next one is here.
    use moyai_tests::hostile::{Entry, docker_archive, noise, tar};
    let second = lab.folder().join("second.tar");
    let entries =
        [Entry::File("bulk".to_owned(), noise(20_000_000, 1)), Entry::File("more".to_owned(), noise(1_000_000, 2))];
    docker_archive(&second, "second", &[tar(&entries)]);
    one.load(&second);
    let came = two.moyai(&["--json", "pull", "second"]).ok().json();
    if came["came"].is_object() {
        assert!(came["came"]["had"].as_u64() > Some(15_000_000), "{came}");
        assert!(came["came"]["from"][0][1].as_u64() < Some(5_000_000), "{came}");
    }
    // What is here does not come.
    assert_eq!(two.moyai(&["--json", "pull", "second"]).ok().json()["came"], serde_json::Value::Null);
}

#[test]
fn two_images_under_one_name_at_once_are_both_named() {
    let lab = Lab::mesh(2);
    let [one, two] = lab.hosts();
    let id = |host: &Host, seed| {
        let path = bulk(&lab, "same", 100_000, seed);
        host.moyai(&["--json", "load", &path.to_string_lossy()]).ok().json()["id"].as_str().expect("an id").to_owned()
    };
    two.cut();
    let first = id(one, 1);
    let second = id(two, 2);
    two.heal();
    let told =
        |host: &Host| host.log_tail(200).lines().find(|line| line.contains("two images were given")).map(str::to_owned);
    let told = wait_for("a warning", PATIENCE, || told(one).or_else(|| told(two)));
    assert!(told.contains(&first) && told.contains(&second) && told.contains("same"), "{told}");
    let meant =
        |host: &Host| host.images().iter().find(|row| row["reference"] == "same:latest").map(|row| row["id"].clone());
    wait_for("both to mean the later one", PATIENCE, || {
        [one, two].iter().all(|host| meant(host) == Some(second.as_str().into())).then_some(())
    });
}

#[test]
fn a_node_gives_no_more_than_it_may() {
    let lab = Lab::new(2);
    let [one, two] = lab.hosts();
    one.moyai(&["init", "--upload-limit", "1"]).fails(1).says("--upload-limit");
    one.moyai(&["init", "--upload-limit", "1m"]).ok();
    two.moyai(&["join", &one.ticket(&[])]).ok();
    lab.wait_for_mesh();
    one.load(&bulk(&lab, "large", 12_000_000, 3));
    let came = two.moyai(&["--json", "pull", "large"]).ok().json();
    // 12 MB at 1 MiB a second, of which the first second's worth may come at once.
    assert!(came["came"]["took"].as_u64() > Some(9_000), "{came}");
}

#[test]
fn a_name_moves_to_the_newer_image() {
    use moyai_tests::hostile::{Entry, docker_archive, tar};
    let lab = Lab::mesh(2);
    let hosts: [&Host; 2] = lab.hosts();
    let busybox = fs::read("/bin/busybox").expect("busybox-static");
    for (round, host) in [(1, hosts[0]), (2, hosts[1]), (3, hosts[0])] {
        let layer = tar(&[
            Entry::Folder("bin/".to_owned()),
            Entry::File("bin/sh".to_owned(), busybox.clone()),
            Entry::File("round".to_owned(), format!("{round}\n").into_bytes()),
        ]);
        let archive = lab.folder().join(format!("round-{round}.tar"));
        docker_archive(&archive, "app", &[layer]);
        host.load(&archive);
        for asked in hosts {
            wait_for("the name to mean the newer image everywhere", PATIENCE, || {
                let output = asked.moyai(&["run", "--rm", "app", "sh", "-c", "read line < /round; echo $line"]).ok();
                (output.stdout == format!("{round}\n")).then_some(())
            });
        }
    }
    assert_eq!(hosts[1].images().len(), 1);
}

#[test]
fn a_node_pulls_what_others_have() {
    let lab = Lab::mesh(4);
    let hosts: [&Host; 4] = lab.hosts();
    hosts[0].load(&images::alpine());
    let holders = wait_for("the automatic copies", PATIENCE, || {
        let nodes = hosts[3].images().first()?["nodes"].as_array()?.clone();
        (nodes.len() >= 3).then_some(nodes)
    });
    let without = hosts.into_iter().find(|host| !holders.contains(&host.name.as_str().into()));
    let without = without.expect("one node without a copy: three are kept");
    without.moyai(&["pull", "alpine"]).ok();
    let nodes = without.images()[0]["nodes"].clone();
    assert_eq!(nodes.as_array().map(Vec::len), Some(4), "{nodes}");
    without.moyai(&["pull", "alpine"]).ok();
    without.moyai(&["pull", "nosuchimage"]).fails(1).says("nosuchimage");
}

#[test]
fn what_is_damaged_on_one_node_is_brought_again_from_another() {
    let lab = Lab::mesh(2);
    let [one, two] = lab.hosts();
    let archive = bulk(&lab, "large", 3_000_000, 4);
    one.load(&archive);
    two.moyai(&["pull", "large"]).ok();
    let largest = || {
        let folders = fs::read_dir(two.data.join("store/objects")).expect("objects").flatten();
        let files = folders.flat_map(|folder| fs::read_dir(folder.path()).into_iter().flatten().flatten());
        let file = files.max_by_key(|file| file.metadata().map_or(0, |about| about.len())).expect("an object");
        file.path()
    };
    let object = fs::File::options().write(true).open(largest()).expect("it is a file");
    object.write_all_at(&[0; 4096], 1_000_000).expect("it can be damaged");
    // Two nodes keep what was loaded on one.
    wait_for("both to be known to have it", PATIENCE, || {
        (two.images().first()?["nodes"].as_array()?.len() == 2).then_some(())
    });
    two.moyai(&["image", "verify", "large"]).fails(1).says("chunk ").says("is fetched again from other nodes");
    two.moyai(&["pull", "large"]).ok();
    two.moyai(&["image", "verify", "large"]).ok().says("is right");
    one.moyai(&["down"]).ok();
    wait_for("the other to be gone", PATIENCE, || {
        let nodes = two.moyai(&["--json", "nodes"]).ok().stdout;
        (nodes.matches("\"alive\"").count() == 1 && !nodes.contains("\"suspect\"")).then_some(())
    });
    object.write_all_at(&[0; 4096], 1_000_000).expect("it can be damaged");
    two.moyai(&["image", "verify", "large"]).fails(1).says("load it again from where it came");
    two.load(&archive);
    two.moyai(&["image", "verify", "large"]).ok().says("is right");
}

/// A pull from a mesh in which one node is honest and one lies: it ends, and whoever lied is named in the log.
fn pulled_beside_a_liar(lie: &str, told: &str) {
    let lab = Lab::new(3);
    let [one, liar, three] = lab.hosts();
    one.moyai(&["init"]).ok();
    let ticket = one.ticket(&[]);
    liar.lying(lie, &["join", &ticket]).ok();
    three.moyai(&["join", &ticket]).ok();
    lab.wait_for_mesh();
    one.shape("40mbit");
    let archive = bulk(&lab, "large", 16_000_000, 9);
    liar.load(&archive);
    one.load(&archive);
    three.moyai(&["pull", "large"]).ok();
    three.moyai(&["image", "verify", "large"]).ok();
    let log = three.log_tail(500);
    let named = log.lines().any(|line| line.contains(told) && (line.contains("lab-2") || line.contains("from=")));
    assert!(named, "`{told}` is said of lab-2:\n{log}");
}

#[test]
fn a_peer_that_sends_less_of_a_chunk_is_named() {
    pulled_beside_a_liar("short", "bytes that are not chunk");
}

#[test]
fn a_peer_that_promises_more_than_it_sends_is_named() {
    pulled_beside_a_liar("less", "bytes that are not chunk");
}

#[test]
fn a_peer_that_sends_without_end_is_named() {
    pulled_beside_a_liar("endless", "a chunk of 4294967285 bytes");
}

#[test]
fn a_peer_that_sends_too_late_is_named() {
    pulled_beside_a_liar("late", "too slow");
}

#[test]
fn a_peer_that_has_nothing_of_what_it_says_it_has_is_named() {
    pulled_beside_a_liar("none", "that it says it has");
}

#[test]
fn a_peer_that_serves_wrong_chunks_is_named_and_not_believed() {
    let lab = Lab::new(4);
    let [one, liar, three, four] = lab.hosts();
    one.moyai(&["init"]).ok();
    let ticket = one.ticket(&[]);
    liar.lying("wrong", &["join", &ticket]).ok();
    three.moyai(&["join", &ticket]).ok();
    four.moyai(&["join", &ticket]).ok();
    lab.wait_for_mesh();
    let archive = lab.folder().join("noise.tar");
    let noise = |seed| Entry::File(format!("noise{seed}"), hostile::noise(8 << 20, seed));
    hostile::docker_archive(&archive, "noise", &[hostile::tar(&[noise(1), noise(2), noise(3)])]);

    // While only the liar has it, nobody gets it, and everybody who asks is told why.
    liar.load(&archive);
    wait_for("the image to be known", PATIENCE, || (three.images().len() == 1).then_some(()));
    let output = three.moyai(&["pull", "noise"]).fails(1);
    assert!(output.stderr.contains("wrong bytes"), "{output}");
    let id = three.moyai(&["--json", "nodes"]).ok().rows();
    let id = id.iter().find(|row| row["name"] == "lab-2").and_then(|row| row["id"].as_str()).expect("an id");
    assert!(output.stderr.contains(&id[..12]), "the liar is named: {output}");
    assert!(three.log_tail(100).contains("bytes that are not chunk"), "{}", three.log_tail(100));

    // With an honest one beside it the image comes whole, to each who asks.
    one.load(&archive);
    for host in [three, four] {
        host.moyai(&["pull", "noise"]).ok();
    }
    // What is stored is what was loaded: chunks are named by their hashes, and a second load finds nothing new.
    let again = four.moyai(&["--json", "load", &archive.to_string_lossy()]).ok().json();
    assert_eq!(again["new"], 0, "{again}");
}
