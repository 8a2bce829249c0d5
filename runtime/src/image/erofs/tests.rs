//! Merging against a model of its rules; images against the running kernel, in mount namespaces of their own: run them
//! as root.

mod kernel;
mod lab;
mod rules;

use std::collections::BTreeMap;
use std::rc::Rc;

use super::super::Content;
use super::*;

fn entry(path: impl AsRef<[u8]>, kind: Kind) -> Entry {
    Entry { path: path.as_ref().to_vec(), kind, mode: 0o755, uid: 0, gid: 0, mtime: 0, xattrs: Vec::new() }
}

fn folder() -> Kind {
    Kind::Directory { opaque: false }
}

fn opaque() -> Kind {
    Kind::Directory { opaque: true }
}

/// In chunks of 10,000 bytes, with the id that the store would give it.
fn content(bytes: &[u8]) -> Content {
    Content { chunks: bytes.chunks(10_000).map(|chunk| (blake3::hash(chunk).into(), chunk.len() as u32)).collect() }
}

fn file(bytes: impl AsRef<[u8]>) -> Kind {
    Kind::File(content(bytes.as_ref()))
}

fn layer(mut entries: Vec<Entry>) -> Tree {
    entries.sort_by(|a, b| a.path.cmp(&b.path));
    Tree { entries }
}

/// Where the store has a content, below its objects.
fn object(id: &ContentId) -> Vec<u8> {
    let name = blake3::Hash::from_bytes(*id).to_hex();
    format!("{}/{name}", &name[..2]).into_bytes()
}

fn image(layers: &[Tree]) -> Result<Vec<u8>, ErofsError> {
    let mut bytes = Vec::new();
    write(&merge(layers)?, [7; 16], object, &mut bytes)?;
    Ok(bytes)
}

/// What there is, by path. Names of one file share an entry.
type Model = BTreeMap<Vec<u8>, Rc<Entry>>;

/// The rules again, as plainly as can be.
fn model(layers: &[Tree]) -> Model {
    let mut model = Model::new();
    for layer in layers {
        let links = layer.entries.iter().filter(|entry| matches!(entry.kind, Kind::Hardlink(_)));
        let others = layer.entries.iter().filter(|entry| !matches!(entry.kind, Kind::Hardlink(_)));
        for entry in others.chain(links) {
            let is_folder = |entry: &Rc<Entry>| matches!(entry.kind, Kind::Directory { .. });
            let keeps = entry.kind == folder() && model.get(&entry.path).is_some_and(is_folder);
            if !keeps {
                let below = [entry.path.as_slice(), b"/"].concat();
                model.retain(|path, _| *path != entry.path && !path.starts_with(&below));
            }
            match &entry.kind {
                Kind::Whiteout => {}
                Kind::Hardlink(target) => {
                    let target = Rc::clone(&model[target]);
                    model.insert(entry.path.clone(), target);
                }
                _ => {
                    model.insert(entry.path.clone(), Rc::new(entry.clone()));
                }
            }
        }
    }
    model
}

/// Layers in which anything may happen, each as [`Tree::decode`] would let it through, and the contents they name.
fn any_layers(random: &mut fastrand::Rng) -> Vec<Tree> {
    let count = random.usize(1..5);
    (0..count).map(|_| any_layer(random)).collect()
}

fn any_layer(random: &mut fastrand::Rng) -> Tree {
    let mut entries: BTreeMap<Vec<u8>, Entry> = BTreeMap::new();
    for _ in 0..random.usize(0..25) {
        let depth = random.usize(1..5);
        let names: Vec<&str> = (0..depth).map(|_| ["a", "b", "-", "é"][random.usize(..4)]).collect();
        let path = names.join("/").into_bytes();
        let parents = (1..depth).map(|depth| names[..depth].join("/").into_bytes());
        let fits = |parent: Vec<u8>| match entries.get(&parent) {
            Some(entry) => matches!(entry.kind, Kind::Directory { .. }),
            None => false,
        };
        if entries.contains_key(&path) || !parents.into_iter().all(fits) {
            continue;
        }
        let mut files = entries.values().filter(|entry| matches!(entry.kind, Kind::File(_) | Kind::Symlink(_)));
        let kind = match random.u8(..12) {
            0 => opaque(),
            1..5 => folder(),
            5 => Kind::Symlink(b"some/where".to_vec()),
            6 => Kind::Fifo,
            7 => Kind::CharDevice(4, 300),
            8 => Kind::Whiteout,
            9 if entries.values().any(|entry| matches!(entry.kind, Kind::File(_))) => {
                Kind::Hardlink(files.next().map(|entry| entry.path.clone()).unwrap_or_default())
            }
            _ => file(random.u8(..).to_string()),
        };
        let mode = random.u32(..0o10000);
        let (uid, gid) = (random.u32(..5), random.u32(..5));
        let entry = Entry { mode, uid, gid, mtime: random.i64(-1000..1000), ..entry(&path, kind) };
        entries.insert(path, entry);
    }
    Tree { entries: entries.into_values().collect() }
}
