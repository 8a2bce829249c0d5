//! The store after a power cut, on a disk that loses what was not flushed.
//!
//! The disk is a file of a FUSE file system, with a loop device and ext4 on it: as a real disk's, its cache is volatile. A flush
//! (FUSE_FSYNC) makes durable what was written before it; at the cut any of the blocks written since may be there, and any
//! may not, whatever their order. Then ext4 is mounted from what is left, and the store opened.
//!
//! Needs root, as all that mounts; without it nothing is tested here.

mod archive;

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, UNIX_EPOCH};

use archive::{archive, noise};
use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, Generation, INodeNo, LockOwner,
    OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyWrite, Request, Session, WriteFlags,
};
use moyai_runtime::image::{Imported, Limits, Progress, import};
use moyai_runtime::store::{Removed, Store};

const SIZE: u64 = 256 << 20;
const BLOCK: usize = 4096;
const SEEDS: u64 = 12;
const FOREVER: Duration = Duration::from_secs(3600);

type Block = [u8; BLOCK];

struct Disk {
    durable: HashMap<u64, Block>,
    /// Written, not flushed: the blocks' numbers in order, and what each holds then.
    volatile: Vec<(u64, Block)>,
    /// What is read of those.
    latest: HashMap<u64, Block>,
    /// Blocks that may be written before the power goes.
    left: u64,
    rng: fastrand::Rng,
    /// What was on it then.
    after: Option<HashMap<u64, Block>>,
}

impl Disk {
    fn block(&self, at: u64) -> Block {
        self.latest.get(&at).or_else(|| self.durable.get(&at)).copied().unwrap_or([0; BLOCK])
    }

    fn write(&mut self, mut offset: u64, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            if self.left == 0 {
                self.cut();
                return false;
            }
            self.left -= 1;
            let (at, from) = (offset / BLOCK as u64, (offset % BLOCK as u64) as usize);
            let (now, rest) = bytes.split_at(bytes.len().min(BLOCK - from));
            let mut block = self.block(at);
            block[from..from + now.len()].copy_from_slice(now);
            self.volatile.push((at, block));
            self.latest.insert(at, block);
            offset += now.len() as u64;
            bytes = rest;
        }
        self.after.is_none()
    }

    fn flush(&mut self) -> bool {
        let flushed = std::mem::take(&mut self.latest);
        self.volatile.clear();
        self.durable.extend(flushed);
        self.after.is_none()
    }

    fn cut(&mut self) {
        if self.after.is_none() {
            let mut after = self.durable.clone();
            let kept = self.rng.f64();
            for (at, block) in &self.volatile {
                if self.rng.f64() < kept {
                    after.insert(*at, *block);
                }
            }
            self.after = Some(after);
        }
    }
}

#[derive(Clone)]
struct Shared(Arc<Mutex<Disk>>);

impl Shared {
    fn disk(&self) -> MutexGuard<'_, Disk> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

const FILE: INodeNo = INodeNo(2);

fn attributes(number: INodeNo) -> FileAttr {
    let folder = number == INodeNo::ROOT;
    FileAttr {
        ino: number,
        size: if folder { 0 } else { SIZE },
        blocks: SIZE / 512,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: if folder { FileType::Directory } else { FileType::RegularFile },
        perm: 0o700,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: BLOCK as u32,
        flags: 0,
    }
}

impl Filesystem for Shared {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == "disk" {
            reply.entry(&FOREVER, &attributes(FILE), Generation(0))
        } else {
            reply.error(Errno::ENOENT)
        }
    }

    fn getattr(&self, _: &Request, number: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&FOREVER, &attributes(number));
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let disk = self.disk();
        let end = (offset + u64::from(size)).min(SIZE);
        let (mut bytes, mut at) = (Vec::new(), offset);
        while at < end {
            let from = (at % BLOCK as u64) as usize;
            let now = (BLOCK - from).min((end - at) as usize);
            bytes.extend_from_slice(&disk.block(at / BLOCK as u64)[from..from + now]);
            at += now as u64;
        }
        reply.data(&bytes);
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        bytes: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        if self.disk().write(offset, bytes) { reply.written(bytes.len() as u32) } else { reply.error(Errno::EIO) }
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        if self.disk().flush() { reply.ok() } else { reply.error(Errno::EIO) }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }
}

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output().expect("one of Debian's tools");
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// A loop device on a file, mounted; gone when it is dropped.
struct Mounted {
    device: String,
    at: PathBuf,
}

impl Mounted {
    fn new(file: &Path, at: &Path) -> Mounted {
        std::fs::create_dir_all(at).expect("a folder");
        let device = run("losetup", &["-f", "--show", &file.to_string_lossy()]);
        let mounted = Mounted { device, at: at.to_owned() };
        run("mount", &["-t", "ext4", &mounted.device, &at.to_string_lossy()]);
        mounted
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        for (program, args) in [("umount", vec![&*self.at.to_string_lossy()]), ("losetup", vec!["-d", &*self.device])] {
            drop(Command::new(program).args(args).stderr(Stdio::null()).status());
        }
    }
}

/// Loads an image of its own file, and of one that all have.
fn load(store: &Store, number: u64) -> Option<Imported> {
    let archive = archive(&[("own", noise(number, 1_500_000)), ("shared", noise(0, 1_500_000))]);
    import(&archive[..], store, Limits::default(), &Progress::default()).ok()?.pop()
}

/// Brings an image from one store to another by chunks; whether all came.
fn fetch(from: &Store, to: &Store, root: &[u8; 32]) -> bool {
    loop {
        let Ok(missing) = to.survey(root) else { return false };
        if missing.complete {
            return true;
        }
        let wanted = missing.pieces.iter().zip(&missing.present).filter(|(_, here)| !**here);
        for ((chunk, _), _) in wanted {
            let bytes = from.chunk(chunk).expect("a whole store").expect("it has all");
            if to.put_chunks(vec![(*chunk, bytes)]).is_err() {
                return false;
            }
        }
    }
}

/// Loads, fetches, removes and sweeps until the power goes: the images that were said to be here, and not removed.
fn work(store: &Store, other: &Store, images: &[Imported]) -> Vec<[u8; 32]> {
    let mut here: Vec<[u8; 32]> = Vec::new();
    for round in 0.. {
        let image = &images[round % images.len()];
        let came = if round % 3 == 0 {
            load(store, (round % images.len()) as u64 + 1).is_some()
        } else {
            fetch(other, store, &image.root)
        };
        if !came {
            break;
        }
        here.retain(|root| *root != image.root);
        here.push(image.root);
        if here.len() == images.len() {
            let gone = here.remove(0);
            // Whether it is gone is not known when this fails.
            if !matches!(store.remove(&[gone], &[]), Ok(Removed::Freed(_))) {
                break;
            }
        }
        if round % 5 == 4 && store.sweep(&[]).is_err() {
            break;
        }
    }
    here
}

#[test]
fn what_was_said_to_be_here_is_here_after_a_power_cut_and_nothing_is_half() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    // Whoever starts a container meanwhile would take these mounts along, and keep them busy.
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).expect("a mount namespace");
    let private = nix::mount::MsFlags::MS_REC | nix::mount::MsFlags::MS_PRIVATE;
    nix::mount::mount(None::<&str>, "/", None::<&str>, private, None::<&str>).expect("mounts of its own");
    let dir = tempfile::Builder::new().prefix("moyai-power-").tempdir().expect("a folder");
    let empty = dir.path().join("empty");
    std::fs::File::create(&empty).and_then(|file| file.set_len(SIZE)).expect("a file");
    run("mkfs.ext4", &["-q", "-F", &empty.to_string_lossy()]);
    let other = Store::open(&dir.path().join("other"), None).expect("a store");
    let images: Vec<Imported> = (1..=4).map(|number| load(&other, number).expect("a good image")).collect();
    let file = std::fs::File::open(&empty).expect("it was made");
    let mut formatted = HashMap::new();
    for at in 0..SIZE / BLOCK as u64 {
        let mut block = [0; BLOCK];
        file.read_exact_at(&mut block, at * BLOCK as u64).expect("it is so long");
        if block != [0; BLOCK] {
            formatted.insert(at, block);
        }
    }
    for seed in 0..SEEDS {
        cut_and_look(dir.path(), seed, &formatted, &other, &images);
    }
}

fn cut_and_look(dir: &Path, seed: u64, formatted: &HashMap<u64, Block>, other: &Store, images: &[Imported]) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let disk = Disk {
        durable: formatted.clone(),
        volatile: Vec::new(),
        latest: HashMap::new(),
        left: rng.u64(200..12_000),
        rng,
        after: None,
    };
    let shared = Shared(Arc::new(Mutex::new(disk)));
    let (fuse, mount) = (dir.join(format!("fuse-{seed}")), dir.join(format!("mount-{seed}")));
    std::fs::create_dir(&fuse).expect("a folder");
    let session: BackgroundSession =
        Session::new(shared.clone(), &fuse, &Config::default()).and_then(Session::spawn).expect("FUSE");
    let said = {
        let mounted = Mounted::new(&fuse.join("disk"), &mount);
        let store = Store::open(&mounted.at.join("store"), None);
        store.map(|store| work(&store, other, images)).unwrap_or_default()
    };
    shared.disk().cut();
    let after = shared.disk().after.take().expect("the power is gone");
    session.umount_and_join().expect("an end");

    let left = dir.join(format!("left-{seed}"));
    let file = std::fs::File::create(&left).expect("a file");
    file.set_len(SIZE).expect("room");
    after.iter().for_each(|(at, block)| file.write_all_at(block, at * BLOCK as u64).expect("room"));
    let mounted = Mounted::new(&left, &mount);
    let store = Store::open(&mounted.at.join("store"), None).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    let here: Vec<[u8; 32]> = store.images().expect("an index").iter().map(|image| image.root).collect();
    println!("seed {seed}: {} images were said to be here, {} are", said.len(), here.len());
    for root in &said {
        assert!(here.contains(root), "seed {seed}: an image that was here is gone");
    }
    let originals = store.originals().expect("an index").into_iter().map(|original| original.root);
    for root in here.iter().copied().chain(originals) {
        assert_eq!(store.verify(&root).expect("it can be read").told, Vec::<String>::new(), "seed {seed}");
    }
    for root in &here {
        assert!(store.runnable(root).expect("it can be read").is_some(), "seed {seed}");
    }
    // And all goes on.
    for (at, image) in images.iter().enumerate() {
        assert!(load(&store, at as u64 + 1).is_some(), "seed {seed}");
        assert_eq!(store.verify(&image.root).expect("it can be read").told, Vec::<String>::new(), "seed {seed}");
    }
    assert!(store.sweep(&[]).is_ok(), "seed {seed}");
    drop((store, mounted));
    std::fs::remove_file(left).expect("it is there");
}
