#[path = "../../tests/archive/mod.rs"]
mod archive;

use std::collections::BTreeMap;
use std::io::Read;
use std::sync::Arc;

use super::spool::Spool;
use super::*;
use crate::image::{Limits, Progress, content_of, import};
use archive::{append, archive, noise};

/// Brings an image from one store to another by chunks, as a download does, several batches at once.
fn transfer(from: &Arc<Store>, to: &Arc<Store>, root: &Chunk) -> usize {
    let mut moved = 0;
    loop {
        let missing = to.survey(root).unwrap();
        if missing.complete {
            return moved;
        }
        let wanted: Vec<Chunk> = missing
            .pieces
            .iter()
            .zip(&missing.present)
            .filter(|(_, here)| !**here)
            .map(|((chunk, _), _)| *chunk)
            .collect();
        moved += wanted.len();
        std::thread::scope(|scope| {
            for part in wanted.chunks(wanted.len().div_ceil(8).max(1)) {
                scope.spawn(|| {
                    for chunk in part.iter().rev() {
                        let bytes = from.chunk(chunk).unwrap().expect("the first store has it");
                        to.put_chunks(vec![(*chunk, bytes)]).unwrap();
                    }
                });
            }
        });
    }
}

fn two_stores() -> (tempfile::TempDir, Arc<Store>, Arc<Store>) {
    two_stores_of(Form::Folders)
}

fn two_stores_of(form: Form) -> (tempfile::TempDir, Arc<Store>, Arc<Store>) {
    let dir = tempfile::tempdir().unwrap();
    let open = |name: &str| Arc::new(Store::open(&dir.path().join(name), Some(form)).unwrap());
    let (one, two) = (open("one"), open("two"));
    (dir, one, two)
}

/// The forms that this machine can.
fn forms() -> Vec<Form> {
    let dir = tempfile::tempdir().unwrap();
    let best = Store::open(dir.path(), None).unwrap().form();
    if best == Form::Folders { vec![best] } else { vec![Form::Folders, best] }
}

/// What a container would read.
fn read(runnable: &Runnable, path: &str) -> Vec<u8> {
    match &runnable.file {
        Some(file) => {
            let mounted = file.mount_with_bytes().unwrap();
            fs::read(format!("/proc/self/fd/{}/{path}", std::os::fd::AsRawFd::as_raw_fd(&mounted))).unwrap()
        }
        None => fs::read(runnable.layers[0].join(path)).unwrap(),
    }
}

#[test]
fn an_image_travels_chunk_by_chunk_and_arrives_whole() {
    // Many rounds: batches that arrive side by side once cut one another's file short.
    for (round, form) in (0..5).flat_map(|round| forms().into_iter().map(move |form| (round, form))) {
        let (_dir, one, two) = two_stores_of(form);
        let files = [
            ("big", noise(round, 9 << 20)),
            ("twice", noise(round, 3 << 20)),
            ("small", noise(99, 100)),
            ("none", Vec::new()),
        ];
        let image = import(&archive(&files)[..], &one, Limits::default(), &Progress::default()).unwrap().remove(0);
        transfer(&one, &two, &image.root);
        let runnable = two.runnable(&image.root).unwrap().unwrap();
        for (path, bytes) in &files {
            assert_eq!(read(&runnable, path), *bytes, "{path} in round {round}, {form:?}");
        }
        assert_eq!(two.images().unwrap(), one.images().unwrap());
    }
}

#[test]
fn what_two_images_share_is_stored_and_sent_once() {
    let (_dir, one, two) = two_stores();
    let shared = noise(1, 2 << 20);
    let first = archive(&[("a", shared.clone()), ("b", noise(2, 1 << 20))]);
    let second = archive(&[("c", shared), ("d", noise(3, 1 << 20))]);
    let load =
        |store: &Store, bytes: &[u8]| import(bytes, store, Limits::default(), &Progress::default()).unwrap().remove(0);
    let (first, again, second) = (load(&one, &first), load(&one, &first), load(&one, &second));
    assert_eq!(again.root, first.root);
    assert_eq!(again.chunks.1, 0, "nothing of it was new");
    assert!(second.chunks.1 < second.chunks.0 * 2 / 3, "{:?}", second.chunks);
    transfer(&one, &two, &first.root);
    let moved = transfer(&one, &two, &second.root) as u64;
    assert!(moved < second.chunks.0 * 2 / 3, "{moved} of {:?}", second.chunks);
}

#[test]
fn wrong_bytes_are_refused_and_lost_bytes_are_fetched_again() {
    let (dir, one, two) = two_stores();
    let image = import(&archive(&[("a", noise(5, 1 << 20))])[..], &one, Limits::default(), &Progress::default())
        .unwrap()
        .remove(0);
    assert!(matches!(two.put_chunks(vec![(image.root, b"not it".to_vec())]), Err(StoreError::WrongChunk(_))));
    assert_eq!(two.chunk(&image.root).unwrap(), None);
    // All chunks arrive, and then the disk loses some before the image is put together.
    loop {
        let missing = two.survey(&image.root).unwrap();
        for (chunk, _) in &missing.pieces {
            two.put_chunks(vec![(*chunk, one.chunk(chunk).unwrap().unwrap())]).unwrap();
        }
        if missing.contents {
            break;
        }
    }
    let big: BTreeMap<u64, PathBuf> = walk(&dir.path().join("two/objects"));
    fs::write(big.last_key_value().unwrap().1, b"").unwrap();
    assert!(!two.survey(&image.root).unwrap().complete);
    transfer(&one, &two, &image.root);
    assert!(two.runnable(&image.root).unwrap().is_some());
}

#[test]
fn whoever_has_something_written_hears_that_it_was_not() {
    let dir = tempfile::tempdir().unwrap();
    let spool = Spool::start().unwrap();
    spool.line().whole(dir.path().join("here"), b"first"[..].into()).unwrap();
    spool.line().whole(dir.path().join("no such folder/there"), b"second"[..].into()).unwrap();
    assert!(matches!(spool.finish(), Err(StoreError::Io { step: "write", .. })));
    assert!(spool.line().whole(dir.path().join("later"), b""[..].into()).is_err());
    drop(spool);
    assert_eq!(fs::read(dir.path().join("here")).unwrap(), b"first");
    assert!(!dir.path().join("later").exists());
}

#[test]
fn many_pieces_are_written_in_their_order() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    let spool = Spool::start().unwrap();
    let file = Arc::new(File::create(&path).unwrap());
    // By blocks, up to one that ends inside of a block; and small ones.
    let lens = [1 << 20, 3 << 20, 4096, 1 << 20, (2 << 20) + 5, 1 << 20, 17, 0, 1 << 20];
    let pieces: Vec<Vec<u8>> = (0..45).map(|at| noise(at, lens[at as usize % lens.len()])).collect();
    for piece in &pieces {
        spool.line().more(&file, &path, piece[..].into()).unwrap();
    }
    spool.line().place(path, dir.path().join("new/file")).unwrap();
    spool.finish().unwrap();
    assert_eq!(fs::read(dir.path().join("new/file")).unwrap(), pieces.concat());
}

fn walk(dir: &Path) -> BTreeMap<u64, PathBuf> {
    let mut found = BTreeMap::new();
    for folder in fs::read_dir(dir).unwrap() {
        for file in fs::read_dir(folder.unwrap().path()).unwrap() {
            let path = file.unwrap().path();
            found.insert(fs::metadata(&path).unwrap().len(), path);
        }
    }
    found
}

#[test]
fn a_failed_import_leaves_nothing_and_harms_nothing() {
    let (dir, one, _) = two_stores();
    let good = archive(&[("a", noise(7, 300_000)), ("b", noise(8, 20_000_000))]);
    let count = || walk(&dir.path().join("one/objects")).len();
    for cut in [0, 511, 5_000, 100_000, 400_000, good.len() / 2, good.len() - 3000] {
        let result = import(&good[..cut], &one, Limits::default(), &Progress::default());
        assert!(result.is_err(), "cut at {cut}");
        assert_eq!(count(), 0, "cut at {cut}");
        assert_eq!(fs::read_dir(dir.path().join("one/tmp")).unwrap().count(), 0);
    }
    let limit = Limits { bytes: 1_000_000 };
    let bomb = import(&good[..], &one, limit, &Progress::default());
    assert!(matches!(bomb, Err(crate::image::ImportError::TooLarge { .. })));
    let mut flipped = good.clone();
    flipped[100_000] ^= 1;
    let flipped = import(&flipped[..], &one, Limits::default(), &Progress::default());
    assert!(matches!(flipped, Err(crate::image::ImportError::Digest { .. })), "{flipped:?}");
    assert_eq!(count(), 0);
    import(&good[..], &one, Limits::default(), &Progress::default()).unwrap();
    assert_eq!(one.images().unwrap().len(), 1);
}

/// A header for a file that is as long as it likes, and then `body`.
fn raw_entry(kind: tar::EntryType, size: u64, body: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_path("x").unwrap();
    header.set_size(size);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1);
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(body);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

#[test]
fn a_bomb_of_names_or_documents_is_refused_before_it_is_in_memory() {
    let (_dir, one, _) = two_stores();
    let import = |bytes: &mut dyn Read| import(bytes, &one, Limits::default(), &Progress::default());
    // The reader must not come as far as this.
    let endless = || std::io::repeat(b'a').take(64 << 20).chain(std::io::empty());
    for kind in [tar::EntryType::GNULongName, tar::EntryType::GNULongLink, tar::EntryType::XHeader] {
        let head = raw_entry(kind, 1 << 40, b"");
        let mut outer = head.chain(endless());
        let error = import(&mut outer).unwrap_err();
        assert!(matches!(error, crate::image::ImportError::Metadata { .. }), "{error}");
        assert!(outer.into_inner().1.into_inner().0.limit() > 60 << 20, "{kind:?} was read on and on");

        // The same inside a layer.
        let mut layer = raw_entry(kind, 3 << 20, &vec![b'a'; 3 << 20]);
        layer.extend(raw_entry(tar::EntryType::Regular, 0, b""));
        let member = raw_entry(tar::EntryType::Regular, layer.len() as u64, &layer);
        let error = import(&mut &member[..]).unwrap_err();
        assert!(matches!(error, crate::image::ImportError::Metadata { .. }), "{error}");
    }
    // Holes of 2^62 bytes that a reader would go through one by one.
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::GNUSparse);
    header.set_path("x").unwrap();
    header.set_size(0);
    let gnu = header.as_gnu_mut().unwrap();
    gnu.sparse[0].offset.copy_from_slice(&[0x80, 0, 0, 0, 0x40, 0, 0, 0, 0, 0, 0, 0]);
    gnu.sparse[0].numbytes.copy_from_slice(b"00000000000\0");
    gnu.realsize.copy_from_slice(&[0x80, 0, 0, 0, 0x40, 0, 0, 0, 0, 0, 0, 0]);
    header.set_cksum();
    assert!(import(&mut &[header.as_bytes(), &[0; 1024][..]].concat()[..]).is_err());
    // A path of two thousand folders implies two thousand entries; a thousand such would be gigabytes.
    let mut layer = tar::Builder::new(Vec::new());
    for number in 0..400 {
        append(&mut layer, &format!("{number}/{}f", "a/".repeat(2000)), b"");
    }
    let layer = layer.into_inner().unwrap();
    let member = raw_entry(tar::EntryType::Regular, layer.len() as u64, &layer);
    let error = import(&mut &member[..]).unwrap_err();
    assert!(matches!(error, crate::image::ImportError::Metadata { .. }), "{error}");
    let document = raw_entry(tar::EntryType::Regular, 4 << 20, &vec![b' '; 4 << 20]);
    let error = import(&mut &document.repeat(129)[..]).unwrap_err();
    assert!(matches!(error, crate::image::ImportError::Metadata { .. }), "{error}");
}

#[test]
fn an_image_that_lies_about_lengths_harms_no_other() {
    let (_dir, one, two) = two_stores();
    let honest = import(&archive(&[("a", noise(11, 500_000))])[..], &one, Limits::default(), &Progress::default())
        .unwrap()
        .remove(0);
    transfer(&one, &two, &honest.root);
    // A hostile image whose layer is the honest one's root, "one byte long", and one whose tree never ends.
    let root = |layers: Vec<crate::image::Content>, config: crate::image::Content| {
        let layers = layers.into_iter().map(|tree| crate::image::Layer { diff_id: [0; 32], tree }).collect();
        Root { version: crate::image::VERSION, config, layers }.encode()
    };
    let cut = crate::image::Content { chunks: vec![(honest.root, 1)] };
    let endless = crate::image::Content { chunks: vec![(honest.root, 200_000); 40_000] };
    for bytes in [root(vec![cut.clone()], cut), root(vec![endless.clone()], endless)] {
        let id = *blake3::hash(&bytes).as_bytes();
        two.put_chunks(vec![(id, bytes)]).unwrap();
        assert!(matches!(two.survey(&id), Err(StoreError::Damaged(_))));
    }
    assert!(two.runnable(&honest.root).unwrap().is_some());
    assert_eq!(two.chunk(&honest.root).unwrap(), one.chunk(&honest.root).unwrap());
}

#[test]
fn a_store_that_is_opened_again_knows_what_it_had_in_any_form() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = noise(9, 100_000);
    let image = {
        let store = Store::open(dir.path(), None).unwrap();
        import(&archive(&[("a", bytes.clone())])[..], &store, Limits::default(), &Progress::default())
            .unwrap()
            .remove(0)
    };
    for form in forms().into_iter().chain([Form::Folders]) {
        fs::write(dir.path().join("tmp/left"), b"x").unwrap();
        let store = Store::open(dir.path(), Some(form)).unwrap();
        assert_eq!(read(&store.runnable(&image.root).unwrap().unwrap(), "a"), bytes, "{form:?}");
        assert!(!dir.path().join("tmp/left").exists());
    }
}

fn load(store: &Store, bytes: &[u8]) -> crate::image::Imported {
    import(bytes, store, Limits::default(), &Progress::default()).unwrap().remove(0)
}

/// Names enough that the list of them is cut into several chunks, and the same in each such archive but for `more`.
fn of_many(more: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let names: Vec<String> =
        (0..2000).map(|at| format!("a-{}", data_encoding::HEXLOWER.encode(&noise(at, 120)))).collect();
    let files = names.iter().map(|name| (name.as_str(), Vec::new()));
    archive(&files.chain(more.iter().cloned()).collect::<Vec<_>>())
}

#[test]
fn what_is_removed_takes_nothing_with_it_that_another_needs() {
    for form in forms() {
        let (_dir, one, two) = two_stores_of(form);
        let first = load(&one, &of_many(&[("shared", noise(1, 300_000)), ("z-first", noise(2, 300_000))]));
        let second = load(&one, &of_many(&[("shared", noise(1, 300_000)), ("z-second", noise(3, 300_000))]));
        // The second's list comes by chunks, of which the first's has most already.
        for root in [first.root, first.original.root, second.root, second.original.root] {
            transfer(&one, &two, &root);
        }
        assert!(two.root(&second.root).unwrap().layers[0].tree.chunks.len() > 3, "a list of several chunks");
        for store in [&one, &two] {
            let usage = store.usage(&[vec![first.root, first.original.root], vec![second.root]]).unwrap();
            assert!(usage[0].own > 300_000 && usage[0].own < usage[0].size, "{usage:?}");
            let freed = store.remove(&[first.root, first.original.root], &[]).unwrap();
            assert!(matches!(freed, Removed::Freed(bytes) if bytes > 300_000), "{freed:?}");
            assert!(store.runnable(&first.root).unwrap().is_none());
            assert!(!store.rootfs_dir(&first.root).exists());
            let runnable = store.runnable(&second.root).unwrap().unwrap();
            assert_eq!(read(&runnable, "shared"), noise(1, 300_000));
            for root in [second.root, second.original.root] {
                assert_eq!(store.verify(&root).unwrap().told, Vec::<String>::new());
            }
            // What is gone can come again.
            assert!(store.chunk(&first.root).unwrap().is_none());
        }
        load(&one, &of_many(&[("shared", noise(1, 300_000)), ("z-first", noise(2, 300_000))]));
        transfer(&one, &two, &first.root);
        assert_eq!(two.verify(&first.root).unwrap().told, Vec::<String>::new());
    }
}

#[test]
fn a_sweep_leaves_what_something_reaches_and_nothing_else() {
    for form in forms() {
        let (_dir, one, two) = two_stores_of(form);
        let left = load(&one, &of_many(&[("shared", noise(1, 900_000)), ("z-left", noise(2, 900_000))]));
        let kept = load(&one, &of_many(&[("shared", noise(1, 900_000)), ("z-kept", noise(3, 900_000))]));
        let coming = load(&one, &archive(&[("coming", noise(4, 900_000))]));
        // Of the first most comes, and then it is given up; the second takes from there what it has too.
        for (root, leave) in [(left.root, 3), (coming.root, 3)] {
            loop {
                let missing = two.survey(&root).unwrap();
                let wanted = missing.pieces.iter().zip(&missing.present).filter(|(_, here)| !**here);
                let wanted: Vec<Chunk> = wanted.map(|((chunk, _), _)| *chunk).collect();
                let all = if missing.contents { wanted.len() - leave } else { wanted.len() };
                for chunk in &wanted[..all] {
                    two.put_chunks(vec![(*chunk, one.chunk(chunk).unwrap().unwrap())]).unwrap();
                }
                if missing.contents {
                    break;
                }
            }
        }
        transfer(&one, &two, &kept.root);
        let two = {
            let dir = two.dir.clone();
            drop(two);
            Arc::new(Store::open(&dir, Some(form)).unwrap())
        };
        fs::create_dir_all(two.rootfs_dir(&[7; 32])).unwrap();
        let before = two.size();
        let hold = two.hold();
        assert_eq!(two.sweep(&[coming.root]).unwrap(), Removed::Busy);
        drop(hold);
        let freed = two.sweep(&[coming.root]).unwrap();
        assert!(matches!(freed, Removed::Freed(bytes) if bytes > 500_000), "{freed:?}");
        assert!(two.size() < before - 500_000);
        assert!(!two.rootfs_dir(&[7; 32]).exists());
        assert_eq!(two.verify(&kept.root).unwrap().told, Vec::<String>::new());
        assert_eq!(read(&two.runnable(&kept.root).unwrap().unwrap(), "shared"), noise(1, 900_000));
        let missing = two.survey(&coming.root).unwrap();
        assert_eq!(missing.present.iter().filter(|here| !**here).count(), 3, "what is on its way stays");
        assert_eq!(two.chunk(&left.root).unwrap(), None);
        // Nothing is left to sweep; and what is gone can come again.
        assert_eq!(two.sweep(&[coming.root]).unwrap(), Removed::Freed(0));
        transfer(&one, &two, &left.root);
        assert_eq!(two.verify(&left.root).unwrap().told, Vec::<String>::new());
    }
}

#[test]
fn nothing_is_removed_while_something_is_imported() {
    let (_dir, one, _) = two_stores();
    let image = load(&one, &archive(&[("a", noise(1, 100_000))]));
    let hold = one.hold();
    assert_eq!(one.remove(&[image.root], &[]).unwrap(), Removed::Busy);
    drop(hold);
    assert!(matches!(one.remove(&[image.root], &[]).unwrap(), Removed::Freed(_)));
}

#[test]
fn an_import_that_fails_takes_no_file_from_another() {
    let (_dir, one, _) = two_stores();
    let progress = Progress::default();
    let (mut failing, mut other) = (one.writer(1 << 30, &progress), one.writer(1 << 30, &progress));
    let bytes = noise(1, 50_000);
    let content = failing.add_bytes(&bytes).unwrap();
    assert_eq!(other.add_bytes(&bytes).unwrap(), content);
    drop(failing);
    other.commit().unwrap();
    assert_eq!(one.content(&content).unwrap(), bytes);
    assert!(one.object(&content.id()).exists());
}

#[test]
fn an_original_whose_blobs_are_something_else_is_not_taken() {
    use crate::image::{ORIGINAL, Original, OriginalRoot, Source};
    let (_dir, one, two) = two_stores();
    let image = load(&one, &archive(&[("a", noise(1, 100_000))]));
    let honest = one.original(&image.original.root).unwrap().unwrap();
    let mut lying = Original { blobs: honest.blobs.clone() };
    let stranger = crate::image::content_of(b"something else");
    lying.blobs[1].source = Source::Verbatim(stranger.clone());
    let progress = Progress::default();
    let mut writer = one.writer(1 << 30, &progress);
    writer.add_bytes(b"something else").unwrap();
    let list = writer.add_bytes(&lying.encode()).unwrap();
    let root = OriginalRoot { version: ORIGINAL, list }.encode();
    let root = writer.add_bytes(&root).unwrap().id();
    writer.commit().unwrap();
    let taken = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| transfer(&one, &two, &root)));
    assert!(taken.is_err(), "it is damaged, and never complete");
    assert!(two.blob(&lying.blobs[1].digest).unwrap().is_none());
    // The honest one comes all the same.
    transfer(&one, &two, &image.original.root);
    let (blob, mut reader) = two.blob(&honest.blobs[1].digest).unwrap().unwrap();
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes).unwrap();
    assert_eq!(crate::image::sha256_hex(&bytes), hex(&blob.digest));
}

/// Overwrites the beginning of an object, as a disk does that forgets.
fn damage(store: &Store, id: &ContentId) {
    let file = std::fs::File::options().write(true).open(store.object(id)).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0xff; 64], 0).unwrap();
}

#[test]
fn what_is_damaged_is_brought_again_and_nothing_is_removed_until_then() {
    for form in forms() {
        let (_dir, one, two) = two_stores_of(form);
        let image = load(&one, &of_many(&[("kept", noise(1, 300_000)), ("other", noise(2, 300_000))]));
        for root in [image.root, image.original.root] {
            transfer(&one, &two, &root);
        }
        let list = two.root(&image.root).unwrap().layers[0].tree.id();
        let content = content_of(&noise(1, 300_000)).id();
        damage(&two, &list);
        damage(&two, &content);
        // Nobody knows what it needs: its contents must not go.
        assert!(matches!(two.sweep(&[]), Err(StoreError::Damaged(_))));
        assert_eq!(two.unlisted().unwrap(), [image.root]);
        let found = two.verify(&image.root).unwrap();
        assert_eq!(found.told.len(), 1, "what a damaged list names is not looked at: {found:?}");
        two.doubt(&image.root, &found, true).unwrap();
        assert!(two.runnable(&image.root).unwrap().is_none());
        assert!(matches!(two.sweep(&[image.root]), Err(StoreError::Damaged(_))));
        assert!(two.object(&content).exists());
        assert_eq!(transfer(&one, &two, &image.root), 1, "its list's first chunk alone");
        let found = two.verify(&image.root).unwrap();
        assert!(found.told.len() == 1 && found.told[0].contains(&hex(&content)), "{found:?}");
        two.doubt(&image.root, &found, true).unwrap();
        assert_eq!(transfer(&one, &two, &image.root), 1);
        assert!(two.verify(&image.root).unwrap().is_none());
        assert!(matches!(two.sweep(&[]), Ok(Removed::Freed(_))));
        assert_eq!(read(&two.runnable(&image.root).unwrap().unwrap(), "kept"), noise(1, 300_000));
    }
}

#[test]
fn what_is_damaged_and_nowhere_else_is_loaded_again() {
    for form in forms() {
        let (_dir, one, _) = two_stores_of(form);
        // Two files that begin with the same chunk, of which the index knows one.
        let (kept, longer) = (noise(1, 300_000), [noise(1, 300_000), noise(2, 300_000)].concat());
        assert_eq!(content_of(&kept).chunks[0], content_of(&longer).chunks[0]);
        let archive = archive(&[("kept", kept.clone()), ("longer", longer.clone())]);
        let image = load(&one, &archive);
        for bytes in [&kept, &longer] {
            damage(&one, &content_of(bytes).id());
        }
        let found = one.verify(&image.root).unwrap();
        assert_eq!(found.told.len(), 2, "each file's own bytes are looked at: {found:?}");
        assert_eq!(one.doubt(&image.root, &found, false).unwrap(), Doubted::Open);
        assert!(one.runnable(&image.root).unwrap().is_some(), "it is all there is");
        load(&one, &archive);
        assert_eq!(one.doubt(&image.root, &found, false).unwrap(), Doubted::Mended, "what was damaged is not any more");
        assert!(one.verify(&image.root).unwrap().is_none());
        let runnable = one.runnable(&image.root).unwrap().unwrap();
        assert!(read(&runnable, "kept") == kept && read(&runnable, "longer") == longer, "{form:?}: containers see it");
    }
}

#[test]
fn what_is_damaged_and_nowhere_else_can_be_removed() {
    let (_dir, one, _) = two_stores();
    let image = load(&one, &of_many(&[("first", noise(1, 300_000))]));
    let other = load(&one, &archive(&[("other", noise(2, 300_000))]));
    damage(&one, &one.root(&image.root).unwrap().layers[0].tree.id());
    assert!(matches!(one.sweep(&[]), Err(StoreError::Damaged(_))));
    let content = one.object(&content_of(&noise(1, 300_000)).id());
    assert!(matches!(one.remove(&[image.root, image.original.root], &[]), Ok(Removed::Freed(_))));
    assert!(matches!(one.sweep(&[]), Ok(Removed::Freed(_))));
    assert!(!content.exists());
    assert!(one.verify(&other.root).unwrap().is_none());
    // One that is in doubt too, though nobody brings it again.
    damage(&one, &one.root(&other.root).unwrap().layers[0].tree.id());
    let found = one.verify(&other.root).unwrap();
    one.doubt(&other.root, &found, true).unwrap();
    assert_eq!(one.doubted().unwrap(), [other.root]);
    assert!(matches!(one.remove(&[other.root], &[]), Ok(Removed::Freed(_))));
    assert_eq!(one.doubted().unwrap(), Vec::<Chunk>::new());
    assert!(matches!(one.sweep(&[other.original.root]), Ok(Removed::Freed(_))));
}

#[test]
fn an_import_that_is_given_up_takes_nothing_from_one_that_is_not() {
    let (_dir, one, _) = two_stores();
    let large = noise(1, 1_000_000);
    let chunks = content_of(&large).chunks;
    let part = &large[..chunks[0].1 as usize];
    let progress = Progress::default();
    let (mut first, mut second) = (one.writer(1 << 30, &progress), one.writer(1 << 30, &progress));
    // Its only chunk is looked for in the larger one.
    first.add_bytes(&large).unwrap();
    let small = first.add_bytes(part).unwrap();
    assert_eq!(second.add_bytes(part).unwrap(), small);
    assert_eq!(small.chunks.len(), 1);
    first.commit().unwrap();
    drop(second);
    assert!(one.object(&small.id()).exists());
}

#[test]
fn chunks_that_the_disk_did_not_take_come_again() {
    let (_dir, one, two) = two_stores();
    let image = load(&one, &archive(&[("kept", noise(1, 300_000))]));
    let bytes = one.chunk(&image.root).unwrap().unwrap();
    two.put_chunks(vec![(image.root, bytes.clone())]).unwrap();
    assert!(two.survey(&image.root).unwrap().present.len() > 1, "its lists come next");
    two.lose(&[]).unwrap();
    assert_eq!(two.survey(&image.root).unwrap().present, [false]);
    two.put_chunks(vec![(image.root, bytes)]).unwrap();
    transfer(&one, &two, &image.root);
}

#[test]
fn what_is_damaged_in_one_file_is_mended_out_of_another() {
    for form in forms() {
        let (_dir, one, _) = two_stores_of(form);
        let (kept, longer) = (noise(1, 300_000), [noise(1, 300_000), noise(2, 300_000)].concat());
        let first = load(&one, &archive(&[("kept", kept.clone())]));
        let second = load(&one, &archive(&[("longer", longer.clone())]));
        let (in_first, in_second) = (content_of(&kept).id(), content_of(&longer).id());
        let shared = content_of(&kept).chunks[0].0;
        assert_eq!(one.index.chunk(&shared).unwrap().map(|at| at.content), Some(in_first));
        // The one that the index knows, and the one that it does not.
        for (damaged, root) in [(in_first, first.root), (in_second, second.root)] {
            damage(&one, &damaged);
            let found = one.verify(&root).unwrap();
            assert_eq!(found.told.len(), 1, "{found:?}");
            assert_eq!(
                one.doubt(&root, &found, false).unwrap(),
                Doubted::Mended,
                "nothing is left to be brought again"
            );
            assert!(one.chunk(&shared).unwrap().is_some(), "others are given it");
            assert!(one.verify(&first.root).unwrap().is_none() && one.verify(&second.root).unwrap().is_none());
        }
        assert!(read(&one.runnable(&first.root).unwrap().unwrap(), "kept") == kept, "{form:?}: containers see it");
        assert!(read(&one.runnable(&second.root).unwrap().unwrap(), "longer") == longer, "{form:?}");
    }
}

#[test]
fn blobs_that_two_share_are_there_without_the_damaged_one() {
    let (_dir, one, _) = two_stores();
    // Pushed as they would be by two names of one image.
    let bytes = of_many(&[("kept", noise(1, 300_000))]);
    let (first, second) =
        (load(&one, &bytes), load(&one, &of_many(&[("kept", noise(1, 300_000)), ("z", noise(2, 9))])));
    let original = one.original(&first.original.root).unwrap().unwrap();
    let blob = original.blobs.last().expect("it has blobs").digest;
    let list = one.original_root(&first.original.root).unwrap().list.id();
    damage(&one, &list);
    assert!(matches!(one.remove(&[first.root, first.original.root], &[]), Ok(Removed::Freed(_))));
    assert!(one.blob(&blob).unwrap().is_none(), "nobody has it, and nobody says so");
    for blob in one.original(&second.original.root).unwrap().unwrap().blobs {
        assert!(one.blob(&blob.digest).unwrap().is_some());
    }
}

#[test]
fn blobs_that_two_share_are_there_while_one_is_in_doubt() {
    let (_dir, one, _) = two_stores();
    let (first, second) = (
        load(&one, &of_many(&[("kept", noise(1, 300_000))])),
        load(&one, &of_many(&[("kept", noise(1, 300_000)), ("z", noise(2, 9))])),
    );
    let blobs = |image: &crate::image::Imported| one.original(&image.original.root).unwrap().unwrap().blobs;
    let (of_first, of_second) = (blobs(&first), blobs(&second));
    let own = of_second.iter().find(|blob| of_first.iter().all(|other| other.digest != blob.digest));
    damage(&one, &one.original_root(&second.original.root).unwrap().list.id());
    let own = own.expect("its manifest, at least").digest;
    assert!(one.blob(&own).unwrap().is_none(), "it is to be brought again, not to fail");
    let found = one.verify(&second.original.root).unwrap();
    assert_eq!(one.doubt(&second.original.root, &found, true).unwrap(), Doubted::Open);
    assert_eq!(one.doubt(&second.original.root, &found, true).unwrap(), Doubted::Open, "another has found the same");
    for blob in of_first {
        assert!(one.blob(&blob.digest).unwrap().is_some());
    }
}

#[test]
fn an_import_does_not_count_on_what_is_found_damaged_meanwhile() {
    let (_dir, one, _) = two_stores();
    let files = archive(&[("kept", noise(1, 300_000))]);
    let image = load(&one, &files);
    let content = content_of(&noise(1, 300_000)).id();
    let progress = Progress::default();
    let mut writer = one.writer(1 << 30, &progress);
    writer.add_bytes(&noise(1, 300_000)).unwrap();
    damage(&one, &content);
    let found = one.verify(&image.root).unwrap();
    assert_eq!(one.doubt(&image.root, &found, false).unwrap(), Doubted::Open);
    assert!(matches!(writer.commit(), Err(StoreError::Damaged(_))));
    load(&one, &files);
    assert!(one.verify(&image.root).unwrap().is_none());
}

#[test]
fn an_import_writes_anew_what_has_a_chunk_that_was_found_damaged_in_another_image() {
    let (_dir, one, _) = two_stores();
    let (kept, longer) = (noise(1, 300_000), [noise(1, 300_000), noise(2, 300_000)].concat());
    let first = load(&one, &archive(&[("kept", kept.clone())]));
    let second = archive(&[("longer", longer.clone())]);
    let image = load(&one, &second);
    for content in [&kept, &longer] {
        damage(&one, &content_of(content).id());
    }
    let found = one.verify(&first.root).unwrap();
    assert_eq!(one.doubt(&first.root, &found, false).unwrap(), Doubted::Open);
    assert_eq!(load(&one, &second).root, image.root);
    assert!(one.verify(&image.root).unwrap().is_none());
    assert!(one.chunk(&content_of(&longer).chunks[0].0).unwrap().is_some(), "others are given it");
}

#[test]
fn what_is_mended_looks_to_containers_as_it_did() {
    use std::os::unix::fs::MetadataExt;
    for form in forms() {
        let (_dir, one, two) = two_stores_of(form);
        let image = load(&one, &archive(&[("kept", noise(1, 300_000))]));
        transfer(&one, &two, &image.root);
        let object = two.object(&content_of(&noise(1, 300_000)).id());
        let look = || std::fs::metadata(&object).map(|it| (it.mode(), it.mtime(), it.uid(), it.nlink())).unwrap();
        let before = look();
        // Not the time of what was written a moment ago.
        let file = std::fs::File::options().write(true).open(&object).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[0xff; 64], 0).unwrap();
        let of_image = std::time::UNIX_EPOCH + std::time::Duration::from_secs(before.1 as u64);
        file.set_modified(of_image).unwrap();
        let found = two.verify(&image.root).unwrap();
        assert_eq!(two.doubt(&image.root, &found, true).unwrap(), Doubted::Open);
        transfer(&one, &two, &image.root);
        assert!(two.verify(&image.root).unwrap().is_none());
        assert!(before.3 == 1 || look() == before, "{form:?}: {before:?}, {:?}", look());
    }
}
