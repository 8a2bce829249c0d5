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
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::oci::{environment, mount_read_only, words};
use crate::sys;

/// What it is called.
const NAME: &str = "moyai-oci";
/// `BUILD:PATH` of the program that started it; in that program again, empty.
pub(crate) const STARTED_BY: &str = "MOYAI_STARTED_BY";
const BUILD: &str = env!("MOYAI_RUNTIME_BUILD");
/// Above those that whatever is started is given by number.
const FIRST_FREE: i32 = 10;
/// Who may write to what is nobody else's.
const OTHERS_WRITE: u32 = 0o022;

/// The small program.
pub(crate) struct Small {
    path: PathBuf,
    file: File,
    told: OsString,
}

/// The one beside this program, if there is one: it must belong to whom this one belongs to, and neither it nor the folder be
/// anybody else's to write to.
pub(crate) fn beside() -> io::Result<Option<Small>> {
    let refused = |reason: &str| io::Error::other(reason.to_owned());
    if std::env::var_os(STARTED_BY).is_some() {
        return Err(refused("it was left a moment ago"));
    }
    let own = fs::read_link("/proc/self/exe")?;
    // A mount of itself alone has no name; one that was replaced has another's.
    let folder = own.parent().ok_or_else(|| refused("this program has no name"))?;
    let about_own = fs::metadata("/proc/self/exe")?;
    let is_own = |about: &fs::Metadata| (about.dev(), about.ino()) == (about_own.dev(), about_own.ino());
    if !fs::metadata(&own).is_ok_and(|named| is_own(&named)) {
        return Err(refused("this program has been replaced"));
    }
    let path = own.with_file_name(NAME);
    let flags = libc::O_PATH | libc::O_CLOEXEC | libc::O_NOFOLLOW;
    let file = match File::options().read(true).custom_flags(flags).open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    // Whoever is started by it has descriptors of its own among the first.
    let file = File::from(sys::duplicate_from(&file, FIRST_FREE)?);
    let about = file.metadata()?;
    if !about.is_file() || is_own(&about) {
        return Err(refused("it is no program of its own"));
    }
    let about_folder = fs::metadata(folder)?;
    let is_nobody_elses = about.uid() == about_own.uid()
        && [0, about_own.uid()].contains(&about_folder.uid())
        && (about.mode() | about_folder.mode()) & OTHERS_WRITE == 0;
    if !is_nobody_elses {
        return Err(refused("it or its folder belongs to somebody else, or is others' to write to"));
    }
    let mut told = OsString::from(format!("{BUILD}:"));
    told.push(own);
    Ok(Some(Small { path, file, told }))
}

impl Small {
    /// Starts what was looked at, whatever its name leads to by then.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(format!("/proc/self/fd/{}", self.file.as_raw_fd()));
        command.arg0(&self.path).env_clear().env(STARTED_BY, &self.told);
        command
    }
}

/// Becomes it, out of reach of containers where that is possible ([`crate::oci::seal`]); returns only why not. To be called before
/// there is anything else.
pub fn become_it(args: impl Iterator<Item = OsString>) -> io::Result<Infallible> {
    let absent = || io::Error::from(io::ErrorKind::NotFound);
    let Small { path, file, told } = beside()?.ok_or_else(absent)?;
    let args = words(std::iter::once(path.into_os_string()).chain(args))?;
    let env = telling(&told)?;
    // An ordinary user makes no mounts.
    let mount = mount_read_only(file.as_fd()).ok();
    Err(sys::exec_fd(mount.as_ref().map_or(file.as_fd(), AsFd::as_fd), &args, &env))
}

/// In the small program, before anything else: whether it is of the same build as what started it; if not, it becomes that one, with
/// `before` in front of its arguments.
pub fn become_what_started_it(before: Option<&str>) -> io::Result<()> {
    let Some(told) = std::env::var_os(STARTED_BY).filter(|told| !told.is_empty()) else { return Ok(()) };
    let told = told.as_bytes();
    let end = told.iter().position(|byte| *byte == b':').ok_or_else(|| io::Error::other("it says no path"))?;
    let (build, path) = (&told[..end], Path::new(OsStr::from_bytes(&told[end + 1..])));
    if build == BUILD.as_bytes() {
        return Ok(());
    }
    let args = before.map(OsString::from).into_iter().chain(std::env::args_os().skip(1));
    let args = words(std::iter::once(path.as_os_str().to_owned()).chain(args))?;
    Err(sys::exec(&CString::new(path.as_os_str().as_bytes())?, &args, &telling(OsStr::new(""))?))
}

/// Whether this is a program that the small one has become.
pub(crate) fn has_returned() -> bool {
    std::env::var_os(STARTED_BY).is_some_and(|told| told.is_empty())
}

/// This process's environment, with [`STARTED_BY`] as told.
fn telling(told: &OsStr) -> io::Result<Vec<CString>> {
    let own = std::env::vars_os().filter(|(name, _)| name != STARTED_BY);
    environment(own.chain([(STARTED_BY.into(), told.to_owned())]))
}
