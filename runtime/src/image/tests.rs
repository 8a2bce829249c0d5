use super::*;

const GOLDEN: [u32; 14] =
    [71791, 89804, 36896, 71775, 95052, 38007, 117681, 73470, 72823, 83293, 65149, 130731, 64011, 38093];

#[test]
fn cut_points_are_part_of_the_format() {
    let mut bytes = vec![0; 1 << 20];
    std::io::Read::read_exact(&mut blake3::Hasher::new().update(b"golden").finalize_xof(), &mut bytes).unwrap();
    let content = content_of(&bytes);
    let lengths: Vec<u32> = content.chunks.iter().map(|(_, len)| *len).collect();
    assert_eq!(lengths, GOLDEN, "fastcdc cuts elsewhere than it did: what is stored would not be found again");
    let mut pieces = Chunker::default();
    let mut emit = |_: &Chunk, _: &[u8]| Ok::<(), ()>(());
    for piece in bytes.chunks(10_007) {
        pieces.push(piece, &mut emit).unwrap();
    }
    assert_eq!(pieces.finish(&mut emit).unwrap(), content, "how it is read does not matter");
}

#[test]
fn small_contents_are_one_chunk_and_empty_ones_none() {
    assert_eq!(content_of(&[7; WHOLE]).chunks.len(), 1);
    assert!(content_of(&[]).chunks.is_empty());
    assert_eq!(content_of(b"abc").id(), *blake3::hash(b"abc").as_bytes());
}

fn entry(path: &str, kind: Kind) -> Entry {
    Entry { path: path.into(), kind, mode: 0o755, uid: 0, gid: 0, mtime: 0, xattrs: Vec::new() }
}

#[test]
fn a_tree_from_a_peer_cannot_lead_out() {
    let decode = |entries: Vec<Entry>| Tree::decode(&Tree { entries }.encode());
    let folder = || Kind::Directory { opaque: false };
    assert!(decode(vec![entry("a", folder()), entry("a/b", Kind::Fifo)]).is_ok());
    for bad in ["..", "a/../b", "/a", "a//b", "./a", ""] {
        assert!(decode(vec![entry(bad, Kind::Fifo)]).is_err(), "{bad}");
    }
    let through_link = vec![entry("a", Kind::Symlink(b"/etc".to_vec())), entry("a/b", Kind::Fifo)];
    assert!(decode(through_link).is_err());
    assert!(decode(vec![entry("b", Kind::Fifo), entry("a", Kind::Fifo)]).is_err(), "out of order");
    assert!(decode(vec![entry("a", Kind::Hardlink(b"../x".to_vec()))]).is_err());
    let host_file =
        vec![entry("a", Kind::Symlink(b"/var/lib".to_vec())), entry("b", Kind::Hardlink(b"a/root.key".to_vec()))];
    assert!(decode(host_file).is_err(), "a hard link through a symbolic one would be to the host's file");
    let obeyed =
        Entry { xattrs: vec![(b"trusted.overlay.redirect".to_vec(), b"/".to_vec())], ..entry("a", Kind::Fifo) };
    assert!(decode(vec![obeyed]).is_err());
    assert!(Tree::decode(b"\xff\xff\xff\xff\xff\xff").is_err());
}

#[test]
fn a_tree_from_a_peer_takes_no_more_memory_than_an_honest_one() {
    let with = |count: usize| Entry { xattrs: vec![(vec![], vec![]); count], ..entry("a", Kind::Fifo) };
    let decode = |entries: Vec<Entry>| Tree::decode(&Tree { entries }.encode());
    assert!(decode(vec![with(MAX_XATTRS / ATTRIBUTE)]).is_ok());
    let refused = decode(vec![with(MAX_XATTRS / ATTRIBUTE + 1)]).expect_err("too many");
    assert!(refused.starts_with("a malformed layer tree"), "{refused}");
    // One entry of a hundred million attributes, or what is left of them: it is not read to its end.
    let one = Tree { entries: vec![with(0)] }.encode();
    let many = [&one[..one.len() - 1], &[0xff, 0xff, 0xff, 0x2f], &[0; 4 * MAX_XATTRS][..]].concat();
    assert!(Tree::decode(&many).is_err());
    let paths: Vec<Vec<u8>> = (0..=MAX_ENTRIES).map(|number| format!("{number:07}").into_bytes()).collect();
    let of = |count: usize| {
        let entries = paths[..count].iter().map(|path| Entry { path: path.clone(), ..entry("", Kind::Fifo) });
        Tree { entries: entries.collect() }.encode()
    };
    assert_eq!(Tree::decode(&of(MAX_ENTRIES)).map(|tree| tree.entries.len()), Ok(MAX_ENTRIES));
    let refused = Tree::decode(&of(MAX_ENTRIES + 1)).expect_err("too many");
    assert!(refused.contains("larger than any honest one"), "{refused}");
}
