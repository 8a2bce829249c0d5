//! The images that the tests load, built once with the tools that people use, by `tests/images/*`, and kept below the
//! target folder. A lock keeps tests that run side by side from building them twice.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use crate::lab::profile_folder;

/// A file, or folder, of the small busybox image; `tests/images/busybox` says which there are.
pub fn busybox(file: &str) -> PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    existing(FOLDER.get_or_init(|| built("busybox")), file)
}

/// The busybox image called `alpine:latest`.
pub fn alpine() -> PathBuf {
    busybox("alpine.tar")
}

/// A file, or folder, of the Debian image of more than 100 MB; `tests/images/debian` says which there are.
pub fn debian(file: &str) -> PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    existing(FOLDER.get_or_init(|| built("debian")), file)
}

fn existing(folder: &Path, file: &str) -> PathBuf {
    let path = folder.join(file);
    assert!(path.exists(), "{} was not built", path.display());
    path
}

/// Runs the script `name` unless its result is there; a script that was changed is run again.
fn built(name: &str) -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("images").join(name);
    let text = fs::read(&script).unwrap_or_else(|error| panic!("cannot read {}: {error}", script.display()));
    let folder = profile_folder().parent().expect("the target folder").join("lab-images");
    fs::create_dir_all(&folder).expect("make the images' folder");
    let lock = File::create(folder.join(format!("{name}.lock"))).expect("make a lock file");
    lock.lock().expect("lock the images' folder");
    let (done, made_by) = (folder.join(name), folder.join(name).join("made-by"));
    if fs::read(&made_by).is_ok_and(|by| by == text) {
        return done;
    }
    let _none = fs::remove_dir_all(&done);
    fs::create_dir(&done).expect("make the image's folder");
    let output = Command::new(&script).arg(&done).output();
    let output = output.unwrap_or_else(|error| panic!("cannot run {}: {error}", script.display()));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{} failed (does tests/run install what it needs?):\n{said}", script.display());
    fs::write(&made_by, text).expect("note which script made it");
    done
}
