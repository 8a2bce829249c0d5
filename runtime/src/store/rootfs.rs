//! What a container's root is made of, once an image is complete.
//!
//! Two forms, and containers see the same in both:
//! - [`Form::Image`]: one EROFS image of all layers together, without the files' bytes, which overlayfs takes from the objects
//!   ([`crate::image::erofs`]). No file is there twice, whoever owns it and whatever it is called; nothing is unpacked.
//! - [`Form::Folders`]: each layer unpacked ([`crate::image::unpack`]), for kernels before 6.12, for an ordinary user's
//!   daemon, and for an image that EROFS has no room for (attributes of more than 64 KiB, say).
//!
//! Which one is found out when the store is opened, by doing it. An image that was made complete as a file system gets its
//! folders when it is to run where these are wanted; folders that are there are used in both.
//!
//! **If it dies.** Either is made in `tmp`, synced, and renamed to its place; a file system image goes the same way back before it is
//! deleted. What is in its place is whole.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::collect::Away;
use super::{Store, StoreError, hex, lock, object_in};
use crate::image::erofs::{self, ErofsError, Merged};
use crate::image::{Chunk, Content, ContentId, Entry, Kind, Root, Tree};
use crate::lazy::{self, Lazy};
use crate::sys;

/// The most bytes of a file of users or groups.
const MAX_ACCOUNTS: u64 = 1 << 20;
/// Says that everything of an image is here, to the keepers of containers that were started before.
const COMPLETE: &str = "complete";
const ACCOUNTS: [&str; 2] = ["etc/passwd", "etc/group"];

/// What images become.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Form {
    /// One file system image each, over the objects.
    Image,
    /// A folder for each layer.
    Folders,
}

/// Neither `image` nor `folders`.
#[derive(Debug, thiserror::Error)]
#[error("it is `image` or `folders`")]
pub struct NoForm;

impl std::str::FromStr for Form {
    type Err = NoForm;

    fn from_str(text: &str) -> Result<Form, NoForm> {
        match text {
            "image" => Ok(Form::Image),
            "folders" => Ok(Form::Folders),
            _ => Err(NoForm),
        }
    }
}

/// An image's file system, and where its files' bytes are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageFile {
    /// EROFS.
    pub image: PathBuf,
    /// A data-only lower layer of overlayfs.
    pub objects: PathBuf,
    /// Of an image that is not whole yet: who has the bytes instead of `objects`.
    #[serde(default)]
    pub lazy: Option<Lazy>,
}

impl ImageFile {
    /// A detached, read-only mount of the image by itself.
    pub(crate) fn mount(&self) -> io::Result<OwnedFd> {
        let filesystem = sys::open_filesystem(c"erofs")?;
        let source = CString::new(self.image.as_os_str().as_bytes())?;
        sys::set_option(filesystem.as_fd(), c"source", &source)?;
        sys::mount_filesystem(filesystem.as_fd(), libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NODEV)
    }

    /// A detached, read-only mount of the image with its files' bytes.
    pub(super) fn mount_with_bytes(&self) -> io::Result<OwnedFd> {
        let image = self.mount()?;
        let overlay = sys::open_filesystem(c"overlay")?;
        let lower = CString::new(format!("/proc/self/fd/{}", image.as_raw_fd()))?;
        sys::set_option(overlay.as_fd(), c"lowerdir+", &lower)?;
        sys::set_option(overlay.as_fd(), c"datadir+", &CString::new(self.objects.as_os_str().as_bytes())?)?;
        sys::mount_filesystem(overlay.as_fd(), libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NODEV)
    }
}

/// Layers' folders, or the file system of all of them, and where users are looked up.
type Made = (Vec<PathBuf>, Option<ImageFile>, Vec<PathBuf>);

impl Store {
    /// Makes what a complete image's containers stand on.
    pub(super) fn make_rootfs(&self, root: &Chunk, parsed: &Root, trees: &[Tree]) -> Result<(), StoreError> {
        // As folders may be had what EROFS has no room for.
        if self.form == Form::Image
            && let Ok(merged) = erofs::merge(trees)
            && self.make_image(root, &merged, None)?
        {
            return Ok(());
        }
        self.unpack_layers(parsed, trees)
    }

    /// What a complete image's containers stand on; makes it when the image became complete in the other form.
    pub(super) fn rootfs(&self, root: &Chunk, parsed: &Root) -> Result<Made, StoreError> {
        let _not_removed = self.changing();
        if let Some(made) = self.made(root, parsed)? {
            return Ok(made);
        }
        let trees = self.trees(parsed)?;
        self.make_rootfs(root, parsed, &trees)?;
        self.made(root, parsed)?.ok_or_else(|| StoreError::Damaged(format!("image {} has no files", hex(root))))
    }

    /// The file system of an image whose contents are still coming, where its users are looked up, and what its keepers need.
    pub(super) fn make_lazy(
        &self,
        root: &Chunk,
        merged: &Merged<'_>,
        trees: &[Tree],
    ) -> Result<Option<(ImageFile, Vec<PathBuf>)>, StoreError> {
        let dir = self.rootfs_dir(root);
        if !self.make_image(root, merged, Some(trees))? {
            return Ok(None);
        }
        if self.index.image(root)?.is_some() {
            // It became complete a moment ago.
            self.tell_keepers(root)?;
        }
        let contents = dir.join("contents");
        let (complete, socket) = (dir.join(COMPLETE), self.lazy_socket());
        let lazy = Some(Lazy { root: *root, contents, complete, socket });
        let file = ImageFile { image: dir.join("image"), objects: self.dir.join("objects"), lazy };
        Ok(Some((file, vec![dir.join("accounts")])))
    }

    /// Tells the keepers of an image that all of it is here, if there may be any.
    pub(super) fn tell_keepers(&self, root: &Chunk) -> Result<(), StoreError> {
        let dir = self.rootfs_dir(root);
        let complete = dir.join(COMPLETE);
        if dir.join("contents").exists() {
            fs::write(&complete, b"").map_err(|error| StoreError::io("write", &complete, error))?;
        }
        Ok(())
    }

    fn made(&self, root: &Chunk, parsed: &Root) -> Result<Option<Made>, StoreError> {
        let dir = self.rootfs_dir(root);
        let file = ImageFile { image: dir.join("image"), objects: self.dir.join("objects"), lazy: None };
        if self.form == Form::Image && file.image.exists() {
            return Ok(Some((Vec::new(), Some(file), vec![dir.join("accounts")])));
        }
        let mut folders = Vec::new();
        for layer in &parsed.layers {
            let id = layer.tree.id();
            if !self.index.layer(&id)? {
                return Ok(None);
            }
            folders.push(self.layer_dir(&id));
        }
        Ok(Some((folders.clone(), None, folders)))
    }

    pub(super) fn rootfs_dir(&self, root: &Chunk) -> PathBuf {
        self.dir.join("rootfs").join(hex(root))
    }

    /// A short name, so that the kernel's page for mount options holds many layers.
    pub(super) fn layer_dir(&self, tree: &ContentId) -> PathBuf {
        self.dir.join("layers").join(&hex(tree)[..20])
    }

    /// Takes an image's file system away, whole.
    pub(super) fn discard_rootfs(&self, dir: &Path) {
        let mut away = Away::default();
        self.move_away(dir, &mut away);
        away.free();
    }

    /// Whether it could be made. With what keepers need, if it is `lazy`: which contents these trees have.
    fn make_image(&self, root: &Chunk, merged: &Merged<'_>, lazy: Option<&[Tree]>) -> Result<bool, StoreError> {
        let _one_at_a_time = lock(&self.unpacking);
        let target = self.rootfs_dir(root);
        if lazy.is_some() && self.index.image(root)?.is_none() {
            // The image was complete here once, and is not any more.
            drop(fs::remove_file(target.join(COMPLETE)));
        }
        if target.join("image").exists() && (lazy.is_none() || target.join("contents").exists()) {
            return Ok(true);
        }
        self.discard_rootfs(&target);
        let losses = self.losses();
        let half = self.dir.join("tmp").join(format!("rootfs-{}", hex(root)));
        let io_error = |step, path: &Path| {
            let path = path.to_owned();
            move |error| StoreError::io(step, &path, error)
        };
        if half.exists() {
            fs::remove_dir_all(&half).map_err(io_error("remove", &half))?;
        }
        fs::create_dir_all(half.join("accounts/etc")).map_err(io_error("make", &half))?;
        let image = half.join("image");
        let uuid = root[..16].try_into().expect("sixteen of thirty-two");
        match File::create(&image).map_err(ErofsError::Io).and_then(|file| write(merged, uuid, file)) {
            Ok(()) => {}
            Err(ErofsError::Io(error)) => return Err(StoreError::io("write", &image, error)),
            // What is left is emptied at the next start at the latest.
            Err(_) => {
                drop(fs::remove_dir_all(&half));
                return Ok(false);
            }
        }
        if let Some(trees) = lazy {
            let contents = half.join("contents");
            fs::write(&contents, lazy::list(trees.iter().flat_map(Tree::contents)))
                .map_err(io_error("write", &contents))?;
        }
        for (name, content) in accounts(merged) {
            let path = half.join("accounts").join(name);
            fs::write(&path, self.content(content)?).map_err(io_error("write", &path))?;
        }
        self.sync_since(losses)?;
        fs::rename(&half, &target).map_err(io_error("rename", &half))?;
        Ok(true)
    }

    /// Unpacks the layers of an image whose contents are all here.
    fn unpack_layers(&self, root: &Root, trees: &[Tree]) -> Result<(), StoreError> {
        let _one_at_a_time = lock(&self.unpacking);
        let losses = self.losses();
        for (layer, tree) in root.layers.iter().zip(trees) {
            let id = layer.tree.id();
            let target = self.layer_dir(&id);
            if self.index.layer(&id)? {
                continue;
            }
            let half = self.dir.join("tmp").join(hex(&id));
            for left in [&half, &target] {
                if left.exists() {
                    fs::remove_dir_all(left).map_err(|error| StoreError::io("remove", left, error))?;
                }
            }
            let unpacked = crate::image::unpack(tree, &half, &|id| self.object(id));
            if let Err(error) = unpacked {
                // What is left is emptied at the next start at the latest.
                drop(fs::remove_dir_all(&half));
                return Err(error.into());
            }
            fs::rename(&half, &target).map_err(|error| StoreError::io("rename", &half, error))?;
            self.sync_since(losses)?;
            self.index.add_layer(&id)?;
        }
        Ok(())
    }
}

fn write(merged: &Merged<'_>, uuid: [u8; 16], file: File) -> Result<(), ErofsError> {
    let object =
        |id: &ContentId| object_in(Path::new(""), id).strip_prefix("objects").map(path_bytes).unwrap_or_default();
    erofs::write(merged, uuid, object, file)
}

fn path_bytes(path: &Path) -> Vec<u8> {
    path.as_os_str().as_bytes().to_vec()
}

/// The files in which an image's users and groups are, as far as it has them and they are of a sane size.
pub(super) fn accounts<'a>(merged: &'a Merged<'_>) -> impl Iterator<Item = (&'static str, &'a Content)> {
    let sane = |content: &&Content| content.size() <= MAX_ACCOUNTS;
    ACCOUNTS.into_iter().filter_map(move |name| Some((name, merged.file(name).filter(sane)?)))
}

/// Whether the kernel and this process's rights allow images, found out by doing it in the store's `tmp`; or why not.
pub(super) fn try_image(dir: &Path) -> io::Result<()> {
    let probe = dir.join("tmp/probe");
    let tried = try_in(&probe);
    drop(fs::remove_dir_all(&probe));
    tried
}

fn try_in(dir: &Path) -> io::Result<()> {
    const BYTES: &[u8] = b"moyai";
    let chunk = *blake3::hash(BYTES).as_bytes();
    let kind = Kind::File(Content { chunks: vec![(chunk, BYTES.len() as u32)] });
    let entry = Entry { path: b"file".to_vec(), kind, mode: 0o644, uid: 0, gid: 0, mtime: 0, xattrs: Vec::new() };
    let object = object_in(dir, &chunk);
    fs::create_dir_all(object.parent().expect("an object is in a folder"))?;
    fs::write(&object, BYTES)?;
    let file = ImageFile { image: dir.join("image"), objects: dir.join("objects"), lazy: None };
    let trees = [Tree { entries: vec![entry] }];
    let merged = erofs::merge(&trees).map_err(io::Error::other)?;
    write(&merged, [1; 16], File::create(&file.image)?).map_err(io::Error::other)?;
    let mounted = file.mount_with_bytes()?;
    let read = fs::read(format!("/proc/self/fd/{}/file", mounted.as_raw_fd()))?;
    if read == BYTES { Ok(()) } else { Err(io::Error::other("it reads other bytes than were written")) }
}
