//! Images mounted by the running kernel, alone and under overlayfs, against what was put in.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::PathBuf;

use nix::fcntl::OFlag;
use nix::mount::{MsFlags, mount};
use nix::sys::stat::Mode;

use super::lab::{expected, in_a_lab, survey, unpack};
use super::*;

/// What Linux before 6.16 needs for data-only layers. It works later too.
const METACOPY: &str = ",metacopy=on,redirect_dir=on";

/// An access control list as setxattr(2) takes it: `user::rwx, user:1000:r--, group::r-x, mask::r-x, other::---`.
fn acl() -> Vec<u8> {
    let entry =
        |tag: u16, bits: u16, id: u32| [&tag.to_le_bytes()[..], &bits.to_le_bytes(), &id.to_le_bytes()].concat();
    let none = u32::MAX;
    let entries = [entry(1, 7, none), entry(2, 4, 1000), entry(4, 5, none), entry(0x10, 5, none), entry(0x20, 0, none)];
    [&2u32.to_le_bytes()[..], &entries.concat()].concat()
}

/// `cap_net_raw+ep`, as setcap(8) writes it.
fn capability() -> Vec<u8> {
    [0x0200_0001u32, 1 << 13, 0, 0, 0].iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// One of everything.
fn assortment() -> (Vec<Tree>, BTreeMap<ContentId, Vec<u8>>) {
    let with = |entry: Entry, xattrs: &[(&str, &[u8])]| {
        let xattrs = xattrs.iter().map(|(name, value)| (name.as_bytes().to_vec(), value.to_vec())).collect();
        Entry { xattrs, ..entry }
    };
    let (small, large) = (b"#!/bin/sh\n".to_vec(), vec![0x5a; 300_000]);
    let long_name = "n".repeat(255);
    let lower = layer(vec![
        Entry { mode: 0o1777, mtime: -5, ..entry("tmp", folder()) },
        with(entry("acl", folder()), &[("system.posix_acl_access", &acl()), ("system.posix_acl_default", &acl())]),
        entry("acl/!before the dots", Kind::Fifo),
        Entry {
            mode: 0o4711,
            uid: 4_000_000_000,
            gid: 70_000,
            mtime: i64::from(i32::MIN),
            ..entry("su", file(&small))
        },
        with(entry("ping", file(&small)), &[("security.capability", &capability())]),
        Entry { mtime: 1 << 40, ..entry("large", file(&large)) },
        entry("empty", file("")),
        entry("again", Kind::Hardlink(b"large".to_vec())),
        entry("and again", Kind::Hardlink(b"large".to_vec())),
        entry("link", Kind::Symlink(b"large".to_vec())),
        entry("link 2", Kind::Hardlink(b"link".to_vec())),
        entry("far", Kind::Symlink(vec![b'/'; 4095])),
        entry("far 2", Kind::Symlink(vec![b'x'; 4000])),
        entry(&long_name, folder()),
        entry(format!("{long_name}/{long_name}"), file(&small)),
        entry("tty", Kind::CharDevice(4095, 1_048_575)),
        Entry { mode: 0o600, ..entry("disk", Kind::BlockDevice(8, 257)) },
        entry("pipe", Kind::Fifo),
        with(entry("owned", file(&small)), &[("user.a", b""), ("trusted.b", b"kept")]),
        with(entry("many", file(&small)), &[("user.a", b""), ("user.b", &[1; 60_000]), ("trusted.c", &[2; 65_535])]),
        with(entry("big", folder()), &[("user.x", &[3; 5000]), ("trusted.y", &[4; 10])]),
        with(entry("big link", Kind::Symlink(b"to".to_vec())), &[("trusted.z", &[5; 9000])]),
        entry("gone", file(&small)),
    ]);
    let upper = layer(vec![entry("gone", Kind::Whiteout), entry("tty2", Kind::CharDevice(5, 0))]);
    let contents = [small, large, Vec::new()];
    (vec![lower, upper], contents.into_iter().map(|bytes| (content(&bytes).id(), bytes)).collect())
}

#[test]
fn everything_is_seen_through_the_overlay() {
    in_a_lab(|lab| {
        let (layers, bytes) = assortment();
        bytes.values().filter(|bytes| !bytes.is_empty()).for_each(|bytes| lab.store(bytes));
        lab.mount_image(&layers);
        let alone = survey(&lab.at("erofs"));
        assert_eq!(alone[&b"large"[..]].bytes, vec![0; 300_000], "a hole without the overlay");
        assert_eq!(alone[&b"empty"[..]].xattrs, BTreeMap::new());
        let marks: Vec<&[u8]> = alone[&b"large"[..]].xattrs.keys().map(Vec::as_slice).collect();
        assert_eq!(marks, [&b"trusted.overlay.metacopy"[..], b"trusted.overlay.redirect"]);
        let root = fs::metadata(lab.at("erofs")).unwrap();
        assert_eq!((root.mode(), root.uid(), root.mtime(), root.nlink()), (0o040_755, 0, 0, 6));
        lab.mount_overlay(&format!("{METACOPY},xino=auto"));
        let (seen, wanted) = (survey(&lab.at("root")), expected(&model(&layers), &bytes));
        for (path, facts) in &wanted {
            assert_eq!(seen.get(path), Some(facts), "{}", String::from_utf8_lossy(path));
        }
        assert_eq!(seen.len(), wanted.len());
        let names = [lab.at("root/large"), lab.at("root/again"), lab.at("root/and again")];
        let inodes: BTreeSet<u64> = names.iter().map(|path| fs::metadata(path).unwrap().ino()).collect();
        assert_eq!(inodes.len(), 1, "names of one file");
        let device = |name: &str| fs::symlink_metadata(lab.at("root").join(name)).unwrap().dev();
        assert!(["", "large", "link", "acl", "pipe"].iter().all(|name| device(name) == device("tmp")));
        lab.umount(&["root", "erofs"]);
    });
}

#[test]
fn files_are_changed_and_removed_through_the_overlay() {
    changes(METACOPY);
}

#[test]
fn and_without_any_option_since_linux_6_16() {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(['.', '-']).map(|number| number.parse().unwrap_or(0));
    let version: (u32, u32) = (numbers.next().unwrap(), numbers.next().unwrap());
    if version >= (6, 16) {
        changes("");
    }
}

fn changes(options: &str) {
    in_a_lab(|lab| {
        let (layers, bytes) = assortment();
        bytes.values().for_each(|bytes| lab.store(bytes));
        lab.mount_image(&layers);
        lab.mount_overlay(options);
        let root = lab.at("root");
        fs::set_permissions(root.join("large"), fs::Permissions::from_mode(0o640)).unwrap();
        chown(root.join("owned"), Some(3), Some(4)).unwrap();
        fs::write(root.join("su"), "other").unwrap();
        fs::OpenOptions::new().append(true).open(root.join("again")).unwrap().write_all(b"more").unwrap();
        fs::rename(root.join("ping"), root.join("pong")).unwrap();
        let moved = fs::rename(root.join("acl"), root.join("acl 2"));
        assert_eq!(moved.is_ok(), options == METACOPY, "{moved:?}");
        fs::remove_file(root.join("empty")).unwrap();
        fs::remove_file(root.join("far")).unwrap();
        fs::remove_dir_all(root.join("n".repeat(255))).unwrap();
        // A second look, from the disk.
        lab.umount(&["root", "erofs"]);
        lab.mount_image(&layers);
        lab.mount_overlay(options);
        let seen = survey(&root);
        let (small, large) = (b"#!/bin/sh\n".to_vec(), vec![0x5a; 300_000]);
        assert_eq!((seen[&b"large"[..]].mode, &seen[&b"large"[..]].bytes), (0o100_640, &large));
        assert_eq!((seen[&b"owned"[..]].owner, &seen[&b"owned"[..]].bytes), ((3, 4), &small));
        assert_eq!(seen[&b"owned"[..]].xattrs[&b"trusted.b"[..]], b"kept");
        assert_eq!(seen[&b"su"[..]].bytes, b"other");
        assert_eq!(seen[&b"again"[..]].bytes, [large.as_slice(), b"more"].concat());
        assert_eq!((&seen[&b"pong"[..]].bytes, seen[&b"pong"[..]].xattrs.len()), (&small, 1));
        let folder = if moved.is_ok() { "acl 2" } else { "acl" };
        assert!(seen.contains_key(format!("{folder}/!before the dots").as_bytes()));
        for gone in ["ping", "empty", "far"] {
            assert!(!seen.contains_key(gone.as_bytes()), "{gone}");
        }
        assert!(!seen.keys().any(|path| path.starts_with(b"nnn")));
        for bytes in bytes.values() {
            let kept = fs::read(lab.at("objects").join(OsStr::from_bytes(&object(&content(bytes).id())))).unwrap();
            assert_eq!(kept, *bytes, "nothing writes to an object");
        }
        lab.umount(&["root", "erofs"]);
    });
}

#[test]
fn folders_of_many_files() {
    in_a_lab(|lab| {
        lab.store(b"same");
        let mut entries = vec![entry("many", folder()), entry("long", folder())];
        entries.extend((0..20_000).map(|n| entry(format!("many/{n}"), file("same"))));
        entries.extend((0..1000).map(|n| entry(format!("long/{n:0>255}"), folder())));
        // Each size of a folder around those that fit a block.
        entries.extend((0..300).map(|n| entry(format!("f{n}"), folder())));
        for n in 0..300 {
            entries.extend((0..n).map(|at| entry(format!("f{n}/{at:0>6}"), Kind::Fifo)));
        }
        // One that fills its block to the last byte, and one that needs another block for one name more.
        for name in ["full", "over"] {
            let lengths = [vec![242; 15], vec![247]].concat().into_iter().enumerate();
            entries.push(entry(name, folder()));
            entries.extend(lengths.map(|(n, length)| entry(format!("{name}/{n:f>length$}"), Kind::Fifo)));
        }
        entries.push(entry("over/z", Kind::Fifo));
        let layers = [layer(entries)];
        lab.mount_image(&layers);
        lab.mount_overlay(METACOPY);
        let sizes = ["full", "over"].map(|name| fs::metadata(lab.at("erofs").join(name)).unwrap().len());
        assert_eq!(sizes, [BLOCK, BLOCK + 13]);
        let bytes = [(content(b"same").id(), b"same".to_vec())].into();
        assert!(survey(&lab.at("root")) == expected(&model_of_one(&layers[0]), &bytes));
        assert_eq!(fs::metadata(lab.at("erofs/long")).unwrap().nlink(), 1002);
        // Each found by its name, and what is not there is not.
        for n in 0..20_000 {
            assert!(lab.at("erofs/many").join(n.to_string()).exists() && !lab.at(&format!("erofs/many/{n}x")).exists());
        }
        lab.umount(&["root", "erofs"]);
    });
}

#[test]
fn names_and_attributes_of_any_size() {
    in_a_lab(|lab| {
        lab.store(b"same");
        let mut random = fastrand::Rng::with_seed(1);
        let mut entries = BTreeMap::new();
        for _ in 0..4000 {
            let length = if random.bool() { random.usize(1..10) } else { random.usize(1..256) };
            let name: Vec<u8> =
                (0..length).map(|_| random.u8(1..)).map(|byte| if byte == b'/' { 0xff } else { byte }).collect();
            let kind = match random.u8(..4) {
                0 => folder(),
                1 => Kind::Symlink(vec![b'l'; random.usize(1..4096)]),
                2 => Kind::Fifo,
                _ => file("same"),
            };
            let sizes = (0..random.usize(..4)).map(|_| random.usize(..10) * random.usize(..600));
            let xattrs = sizes.enumerate().map(|(n, size)| (format!("trusted.{n}").into_bytes(), vec![b'v'; size]));
            let entry = Entry { xattrs: xattrs.collect(), ..entry(&name, kind) };
            if !matches!(name.as_slice(), b"." | b"..") {
                entries.insert(name, entry);
            }
        }
        let layers = [Tree { entries: entries.into_values().collect() }];
        lab.mount_image(&layers);
        lab.mount_overlay(METACOPY);
        let bytes = [(content(b"same").id(), b"same".to_vec())].into();
        assert!(survey(&lab.at("root")) == expected(&model_of_one(&layers[0]), &bytes));
        lab.umount(&["root", "erofs"]);
    });
}

/// [`model`], which takes the square of the time.
fn model_of_one(layer: &Tree) -> Model {
    layer.entries.iter().map(|entry| (entry.path.clone(), Rc::new(entry.clone()))).collect()
}

#[test]
fn paths_of_thousands_of_folders() {
    const DEPTH: usize = 5000;
    in_a_lab(|lab| {
        lab.store(b"deep");
        let path = |depth: usize| vec!["d"; depth].join("/");
        let mut entries: Vec<Entry> = (1..=DEPTH).map(|depth| entry(path(depth), folder())).collect();
        entries.push(entry(format!("{}/file", path(DEPTH)), file("deep")));
        lab.mount_image(&[layer(entries)]);
        lab.mount_overlay(METACOPY);
        let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
        let mut at = nix::fcntl::open(&lab.at("root"), flags, Mode::empty()).unwrap();
        for _ in 0..DEPTH {
            at = nix::fcntl::openat(&at, "d", flags, Mode::empty()).unwrap();
        }
        let file = nix::fcntl::openat(&at, "file", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).unwrap();
        let mut text = String::new();
        File::from(file).read_to_string(&mut text).unwrap();
        assert_eq!(text, "deep");
        drop(at);
        lab.umount(&["root", "erofs"]);
    });
}

#[test]
fn any_layers_are_what_overlayfs_makes_of_their_folders() {
    in_a_lab(|lab| {
        let bytes: BTreeMap<_, _> =
            (0..=255).map(|n| n.to_string().into_bytes()).map(|bytes| (content(&bytes).id(), bytes)).collect();
        bytes.values().for_each(|bytes| lab.store(bytes));
        for seed in 0..150 {
            let layers = any_layers(&mut fastrand::Rng::with_seed(seed));
            lab.mount_image(&layers);
            lab.mount_overlay(METACOPY);
            let seen = survey(&lab.at("root"));
            assert_eq!(seen, expected(&model(&layers), &bytes), "seed {seed}");
            lab.umount(&["root", "erofs"]);
            // overlayfs wants two folders at least.
            let names: Vec<PathBuf> = (0..=layers.len()).map(|n| lab.at("plain").join(n.to_string())).collect();
            fs::create_dir(&names[layers.len()]).unwrap();
            layers.iter().zip(&names).for_each(|(layer, path)| unpack(layer, path, &bytes));
            let lower: Vec<&str> = names.iter().rev().map(|path| path.to_str().unwrap()).collect();
            let options = format!("lowerdir={}", lower.join(":"));
            let flags = MsFlags::MS_RDONLY;
            mount(Some("overlay"), &lab.at("root"), Some("overlay"), flags, Some(options.as_str())).unwrap();
            let mut wanted = survey(&lab.at("root"));
            // It does not see that another name of a file is gone.
            wanted.iter_mut().for_each(|(path, facts)| facts.links = seen.get(path).map_or(0, |seen| seen.links));
            assert_eq!(seen, wanted, "seed {seed}");
            lab.umount(&["root"]);
            fs::remove_dir_all(lab.at("plain")).unwrap();
            fs::create_dir(lab.at("plain")).unwrap();
        }
    });
}

#[test]
fn fsck_finds_nothing() {
    if std::process::Command::new("fsck.erofs").arg("-V").output().is_err() {
        eprintln!("erofs-utils is not here: not checked");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let check = |layers: &[Tree], what: &str| {
        let path = dir.path().join("image");
        fs::write(&path, image(layers).unwrap()).unwrap();
        let output = std::process::Command::new("fsck.erofs").arg(&path).output().unwrap();
        assert!(output.status.success(), "{what}: {}", String::from_utf8_lossy(&output.stderr));
    };
    check(&assortment().0, "the assortment");
    check(&[], "nothing");
    for seed in 0..50 {
        check(&any_layers(&mut fastrand::Rng::with_seed(seed)), &format!("seed {seed}"));
    }
}
