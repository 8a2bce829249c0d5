//! What can be said without mounting anything.

use super::*;

/// Paths with what is there, from the tree itself.
fn flat<'m>(merged: &'m Merged<'_>) -> BTreeMap<Vec<u8>, (&'m Entry, u32)> {
    let (mut flat, mut folders) = (BTreeMap::new(), vec![(ROOT, Vec::new())]);
    while let Some((at, path)) = folders.pop() {
        for (name, child) in &merged.nodes[at].children {
            let path = [path.as_slice(), name].join(&b'/');
            let path = path.strip_prefix(b"/").map(<[u8]>::to_vec).unwrap_or(path);
            let node = &merged.nodes[*child];
            flat.insert(path.clone(), (node.entry.unwrap(), node.links));
            if node.is_directory() {
                folders.push((*child, path));
            }
        }
    }
    flat
}

fn paths(layers: &[Tree]) -> Vec<String> {
    let merged = merge(layers).unwrap();
    flat(&merged).into_keys().map(|path| String::from_utf8(path).unwrap()).collect()
}

fn base() -> Tree {
    layer(vec![
        entry("etc", folder()),
        entry("etc/a", file("a")),
        entry("etc/d", folder()),
        entry("etc/d/deep", file("deep")),
        entry("lib", Kind::Symlink(b"usr/lib".to_vec())),
    ])
}

#[test]
fn a_file_replaces_what_was_there() {
    let layers = [base(), layer(vec![entry("etc", folder()), entry("etc/a", file("new"))])];
    let merged = merge(&layers).unwrap();
    assert_eq!(flat(&merged)[&b"etc/a"[..]].0.kind, file("new"));
    let over_a_folder = [base(), layer(vec![entry("etc", file("no folder"))])];
    assert_eq!(paths(&over_a_folder), ["etc", "lib"], "with all that was below");
    let and_a_folder_again = [base(), layer(vec![entry("etc", file("x"))]), layer(vec![entry("etc", folder())])];
    assert_eq!(paths(&and_a_folder_again), ["etc", "lib"], "what was gone stays gone");
}

#[test]
fn a_folder_over_a_folder_keeps_what_is_in_it() {
    let upper = Entry { mode: 0o700, uid: 5, mtime: 9, ..entry("etc", folder()) };
    let layers = [base(), layer(vec![upper.clone(), entry("etc/new", Kind::Fifo)])];
    assert_eq!(paths(&layers), ["etc", "etc/a", "etc/d", "etc/d/deep", "etc/new", "lib"]);
    let merged = merge(&layers).unwrap();
    assert_eq!(flat(&merged)[&b"etc"[..]].0, &upper, "the upper one's attributes");
    let over_a_link = [base(), layer(vec![entry("lib", folder()), entry("lib/x", file("x"))])];
    assert_eq!(paths(&over_a_link)[4..], ["lib", "lib/x"], "a folder over a link is a folder");
}

#[test]
fn an_opaque_folder_hides_what_lower_layers_have_in_it() {
    let layers = [base(), layer(vec![entry("etc", opaque()), entry("etc/only", Kind::Fifo)])];
    assert_eq!(paths(&layers), ["etc", "etc/only", "lib"]);
    let and_more = [&layers[..], &[layer(vec![entry("etc", folder()), entry("etc/more", Kind::Fifo)])]].concat();
    assert_eq!(paths(&and_more), ["etc", "etc/more", "etc/only", "lib"], "but not what higher ones have");
}

#[test]
fn a_whiteout_removes() {
    let layers = [base(), layer(vec![entry("etc", folder()), entry("etc/d", Kind::Whiteout)])];
    assert_eq!(paths(&layers), ["etc", "etc/a", "lib"]);
    let of_nothing = [base(), layer(vec![entry("nothing", Kind::Whiteout)])];
    assert_eq!(paths(&of_nothing), paths(&[base()]));
    let as_overlayfs_has_it = [base(), layer(vec![entry("etc", Kind::CharDevice(0, 0))])];
    assert_eq!(paths(&as_overlayfs_has_it), ["lib"]);
    let put_back = [&layers[..], &[layer(vec![entry("etc", folder()), entry("etc/d", folder())])]].concat();
    assert_eq!(paths(&put_back), ["etc", "etc/a", "etc/d", "lib"], "an empty folder");
}

#[test]
fn hard_links_are_one_file() {
    // The link sorts before its target.
    let linked = layer(vec![entry("a", Kind::Hardlink(b"b".to_vec())), entry("b", file("b")), entry("c", folder())]);
    let merged = merge(std::slice::from_ref(&linked)).unwrap();
    let root = &merged.nodes[ROOT].children;
    assert_eq!(root[0].1, root[1].1);
    assert_eq!(flat(&merged)[&b"a"[..]].1, 2);
    let one_replaced = [linked.clone(), layer(vec![entry("b", file("other"))])];
    let merged = merge(&one_replaced).unwrap();
    assert_eq!(flat(&merged)[&b"a"[..]], (&linked.entries[1], 1), "the other name keeps the file");
    let over_a_folder =
        [layer(vec![entry("a", folder()), entry("a/x", Kind::Fifo), entry("z", folder())]), linked.clone()];
    assert_eq!(paths(&over_a_folder), ["a", "b", "c", "z"]);
}

#[test]
fn folders_count_their_subfolders() {
    let layers = [base()];
    let merged = merge(&layers).unwrap();
    let flat = flat(&merged);
    assert_eq!(merged.nodes[ROOT].links, 3);
    assert_eq!((flat[&b"etc"[..]].1, flat[&b"etc/d"[..]].1, flat[&b"etc/a"[..]].1), (3, 2, 1));
}

#[test]
fn any_layers_merge_as_the_model_says() {
    for seed in 0..3000 {
        let layers = any_layers(&mut fastrand::Rng::with_seed(seed));
        let merged = merge(&layers).unwrap();
        let flat: BTreeMap<_, _> = flat(&merged).into_iter().map(|(path, (entry, _))| (path, entry.clone())).collect();
        let model: BTreeMap<_, _> = model(&layers).into_iter().map(|(path, entry)| (path, (*entry).clone())).collect();
        assert_eq!(flat, model, "seed {seed}");
        assert_eq!(image(&layers).unwrap(), image(&layers).unwrap(), "seed {seed}");
    }
}

#[test]
fn what_no_decoder_lets_through_is_an_error() {
    for path in ["", "/", "/a", "a/", "none/a", "f/a", ".", "..", "etc/..", "a\0", "etc//a"] {
        let layers = [base(), layer(vec![entry("f", file("f"))]), layer(vec![entry(path, Kind::Fifo)])];
        assert!(matches!(image(&layers), Err(ErofsError::Adrift { .. })), "{path:?}");
    }
    for target in ["", "none", "etc", "l", "../x"] {
        let link = entry("l", Kind::Hardlink(target.into()));
        assert!(matches!(image(&[base(), layer(vec![link])]), Err(ErofsError::Adrift { .. })), "{target:?}");
    }
    let marked = |name: &[u8]| Entry { xattrs: vec![(name.to_vec(), b"/".to_vec())], ..entry("x", file("x")) };
    for name in ["trusted.overlay.redirect", "user.overlay.metacopy", "trusted.overlay.overlay.opaque"] {
        assert!(matches!(image(&[layer(vec![marked(name.as_bytes())])]), Err(ErofsError::Mark { .. })), "{name}");
    }
}

#[test]
fn any_entries_in_any_order_do_not_panic() {
    for seed in 0..3000 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut layers = any_layers(&mut random);
        for layer in &mut layers {
            random.shuffle(&mut layer.entries);
            for entry in &mut layer.entries {
                match random.u8(..20) {
                    0 => entry.kind = Kind::Hardlink(b"a/b".to_vec()),
                    1 => entry.path = (0..random.usize(..6)).map(|_| b"a/.\0"[random.usize(..4)]).collect(),
                    2 => entry.kind = Kind::BlockDevice(random.u32(..), random.u32(..)),
                    3 => entry.xattrs = vec![(vec![b'.'; random.usize(..300)], vec![0; random.usize(..300)])],
                    _ => {}
                }
            }
        }
        drop(image(&layers));
    }
}

#[test]
fn limits_are_named() {
    let message = |entry: Entry| image(&[layer(vec![entry])]).unwrap_err().to_string();
    let with = |xattrs: Vec<(Vec<u8>, Vec<u8>)>| Entry { xattrs, ..entry("x", Kind::Fifo) };
    let user = |name: usize, value: usize| (format!("user.{name:0>250}").into_bytes(), vec![7; value]);
    let name_too_long = vec![(vec![b'u'; 256], Vec::new())];
    assert_eq!(message(with(name_too_long)), "`x` has an attribute's name of 256, of which 255 is the limit");
    assert_eq!(message(with(vec![user(1, 65536)])), "`x` has an attribute of 65536, of which 65535 is the limit");
    let many = |count| with((0..count).map(|n| user(n, 65000)).collect());
    assert!(image(&[layer(vec![many(4)])]).is_ok());
    assert_eq!(message(many(5)), "`x` has attributes of 326292, of which 262148 is the limit");
    assert!(message(entry([b'n'; 256], Kind::Fifo)).ends_with("a name of 256, of which 255 is the limit"));
    assert!(message(entry("l", Kind::Symlink(vec![b't'; 4096]))).contains("a target of 4096"));
    assert_eq!(message(entry("l", Kind::Symlink(Vec::new()))), "`l` is a symbolic link to no path");
    assert_eq!(message(entry("l", Kind::Symlink(b"a\0b".to_vec()))), "`l` is a symbolic link to no path");
    assert!(message(entry("d", Kind::CharDevice(4096, 0))).contains("a major device number of 4096"));
    assert!(message(entry("d", Kind::BlockDevice(0, 1 << 20))).contains("a minor device number of 1048576"));
    let huge = Kind::File(Content { chunks: vec![([0; 32], u32::MAX); 2049] });
    assert!(message(entry("f", huge)).contains("a size of 8800387987455"));
    let largest = Kind::File(Content { chunks: vec![([0; 32], 1 << 31); 4096] });
    assert!(image(&[layer(vec![entry("f", largest)])]).is_ok());
}

#[test]
fn attributes_that_cannot_be_asked_for_are_left_out() {
    let with = |names: &[(&str, &str)]| {
        let xattrs = names.iter().map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec())).collect();
        image(&[layer(vec![Entry { xattrs, ..entry("x", Kind::Fifo) }])]).unwrap()
    };
    let none = with(&[]);
    let strange = ["", "user", "user.", "trusted.", "security.", "user.a\0b", "btrfs.compression", "system.nfs4_acl"];
    for name in strange.into_iter().chain(["system.posix_acl_access.", "system.posix_acl_defaults", "lustre.lov"]) {
        assert!(with(&[(name, "value")]) == none, "{name}");
    }
    assert!(with(&[("user.a", "value")]) != none);
    let twice = with(&[("user.a", "first"), ("user.b", ""), ("user.a", "last")]);
    assert!(twice == with(&[("user.b", ""), ("user.a", "last")]));
}

#[test]
fn the_superblock_is_as_the_kernel_has_it() {
    assert_eq!(!crc32c(b"123456789"), 0xe306_9283, "RFC 3720's check value");
    let bytes = image(&[base()]).unwrap();
    assert_eq!(bytes.len() as u64 % BLOCK, 0);
    assert_eq!(bytes[1024..1028], [0xe2, 0xe1, 0xf5, 0xe0]);
    let empty = image(&[]).unwrap();
    assert_eq!(empty.len() as u64, 2 * BLOCK, "an image of no layers is an empty folder");
}

#[test]
fn a_disk_that_is_full_is_an_error() {
    let layers = [base()];
    let mut room = [0; 5000];
    let written = write(&merge(&layers).unwrap(), [0; 16], object, &mut room[..]);
    assert!(matches!(written, Err(ErofsError::Io(_))));
}

#[test]
fn a_file_is_found_as_the_topmost_layer_left_it() {
    let users = |text: &str| layer(vec![entry("etc", folder()), entry("etc/passwd", file(text))]);
    let found = |layers: &[Tree]| merge(layers).unwrap().file("etc/passwd").cloned();
    assert_eq!(found(&[users("one"), users("two")]), Some(content(b"two")));
    assert_eq!(found(&[users("one"), layer(vec![entry("etc", folder()), entry("etc/passwd", Kind::Whiteout)])]), None);
    assert_eq!(found(&[users("one"), layer(vec![entry("etc", opaque())])]), None);
    assert_eq!(found(&[users("one"), layer(vec![entry("etc", file("no folder"))])]), None);
    let link = entry("etc/passwd", Kind::Symlink(b"../run/passwd".to_vec()));
    assert_eq!(found(&[users("one"), layer(vec![entry("etc", folder()), link])]), None);
}
