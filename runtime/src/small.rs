//! The small program: `moyai-oci`, what starts containers and nothing else, when it lies beside `moyai`.
//!
//! The kernel maps and relocates a program anew each time it begins, so one that is a fifth as long begins sooner, and its
//! processes, one of which stays with each container, are smaller. Nothing but that depends on it: where it is missing, belongs to
//! somebody else or is of another build, `moyai` does the same itself.
//!
//! Who starts it tells it by which program, of which build ([`STARTED_BY`]). One that an upgrade has left behind, or has brought
//! before its time, becomes that program again.

use std::convert::Infallible;
use std::ffi::{CString, OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::oci::{mount_read_only, words};
use crate::sys;

/// What it is called.
pub const NAME: &str = "moyai-oci";
/// `BUILD:PATH` of the program that started it; in that program again, empty.
const STARTED_BY: &str = "MOYAI_STARTED_BY";
const BUILD: &str = env!("MOYAI_RUNTIME_BUILD");

/// The small program beside this one, which must belong to whom this one belongs to, and be nobody else's to write to; and what it
/// is to be told.
pub(crate) fn beside() -> io::Result<(PathBuf, File, OsString)> {
    let refused = || io::Error::other("it is not to be trusted");
    if std::env::var_os(STARTED_BY).is_some() {
        return Err(io::Error::other("it was left a moment ago"));
    }
    let own = fs::read_link("/proc/self/exe")?;
    // A mount of itself alone has no name.
    own.file_name().ok_or_else(refused)?;
    let path = own.with_file_name(NAME);
    let small = File::options().read(true).custom_flags(libc::O_PATH | libc::O_CLOEXEC).open(&path)?;
    let (about, about_own) = (small.metadata()?, fs::metadata("/proc/self/exe")?);
    let same = (about.dev(), about.ino()) == (about_own.dev(), about_own.ino());
    if same || !about.is_file() || about.uid() != about_own.uid() || about.mode() & 0o022 != 0 {
        return Err(refused());
    }
    let mut told = OsString::from(format!("{BUILD}:"));
    told.push(own);
    Ok((path, small, told))
}

/// The variable by which [`become_what_started_it`] knows.
pub(crate) fn telling(told: OsString) -> (OsString, OsString) {
    (STARTED_BY.into(), told)
}

/// Becomes it, out of reach of containers where that is possible ([`crate::oci::seal`]); returns only why not. To be called before
/// there is anything else.
pub fn become_it(args: impl Iterator<Item = OsString>) -> io::Result<Infallible> {
    let (path, small, told) = beside()?;
    let args = words(std::iter::once(path.into_os_string()).chain(args))?;
    let env = environment(&told)?;
    // An ordinary user makes no mounts.
    Err(match mount_read_only(small.as_fd()) {
        Ok(mount) => sys::exec_fd(mount.as_fd(), &args, &env),
        Err(_) => sys::exec_fd(small.as_fd(), &args, &env),
    })
}

/// In the small program, before anything else: whether it is of the same build as what started it; if not, it becomes that one, with
/// `before` in front of its arguments.
pub fn become_what_started_it(before: Option<&str>) -> io::Result<()> {
    let Some(told) = std::env::var_os(STARTED_BY) else { return Ok(()) };
    let told = told.as_bytes();
    let end = told.iter().position(|byte| *byte == b':').ok_or_else(|| io::Error::other("it says no path"))?;
    let (build, path) = (&told[..end], Path::new(OsStr::from_bytes(&told[end + 1..])));
    if build == BUILD.as_bytes() {
        return Ok(());
    }
    let args = before.map(OsString::from).into_iter().chain(std::env::args_os().skip(1));
    let args = words(std::iter::once(path.as_os_str().to_owned()).chain(args))?;
    Err(sys::exec(&CString::new(path.as_os_str().as_bytes())?, &args, &environment(OsStr::new(""))?))
}

/// This process's, with [`STARTED_BY`] as told.
fn environment(told: &OsStr) -> io::Result<Vec<CString>> {
    let own = std::env::vars_os().filter(|(name, _)| name != STARTED_BY);
    words(own.chain([telling(told.to_owned())]).map(|(mut name, value)| {
        name.push("=");
        name.push(value);
        name
    }))
}
