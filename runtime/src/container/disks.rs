//! Limits of disks, by whatever lies on them: cgroups know a disk by its number, and take no partition.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};
use oci_spec::runtime::{LinuxBlockIo, LinuxBlockIoBuilder, LinuxThrottleDevice, LinuxThrottleDeviceBuilder};

use super::BundleError;

/// What may be limited.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum ThrottleKind {
    /// Bytes read.
    ReadBytes,
    /// Bytes written.
    WriteBytes,
    /// Reads.
    Reads,
    /// Writes.
    Writes,
}

/// What of one disk may be used at the most.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Throttle {
    /// The disk, or a file or folder that lies on it.
    pub path: PathBuf,
    /// Of what.
    pub kind: ThrottleKind,
    /// How much a second.
    pub rate: u64,
}

/// Why a disk cannot be limited.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// There is nothing at that path.
    #[error("cannot limit the disk of {path}: {source}")]
    Path {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A file system in memory, on a network, or over several disks.
    #[error("cannot limit the disk of {0}: it lies on none that the kernel can limit")]
    None(PathBuf),
}

/// A disk's number: of itself, or of what a path lies on.
fn disk_of(path: &Path) -> Result<(i64, i64), DiskError> {
    let found = fs::metadata(path).map_err(|source| DiskError::Path { path: path.to_owned(), source })?;
    let number = if found.file_type().is_block_device() { found.rdev() } else { found.dev() };
    let known = Path::new("/sys/dev/block").join(format!("{}:{}", major(number), minor(number)));
    // Of a partition the disk is the folder above.
    let disk = if known.join("partition").exists() { known.join("../dev") } else { known.join("dev") };
    let text = fs::read_to_string(disk).map_err(|_| DiskError::None(path.to_owned()))?;
    let numbers = text.trim().split_once(':').and_then(|(one, two)| Some((one.parse().ok()?, two.parse().ok()?)));
    numbers.ok_or_else(|| DiskError::None(path.to_owned()))
}

/// As an OCI spec has them.
pub(super) fn block_io(weight: Option<u16>, throttles: &[Throttle]) -> Result<Option<LinuxBlockIo>, BundleError> {
    if weight.is_none() && throttles.is_empty() {
        return Ok(None);
    }
    let mut found: [Vec<LinuxThrottleDevice>; 4] = Default::default();
    for throttle in throttles {
        let (major, minor) = disk_of(&throttle.path)?;
        let device = LinuxThrottleDeviceBuilder::default().major(major).minor(minor).rate(throttle.rate).build()?;
        found[throttle.kind as usize].push(device);
    }
    let [read_bytes, write_bytes, reads, writes] = found;
    let mut io = LinuxBlockIoBuilder::default()
        .throttle_read_bps_device(read_bytes)
        .throttle_write_bps_device(write_bytes)
        .throttle_read_iops_device(reads)
        .throttle_write_iops_device(writes);
    if let Some(weight) = weight {
        io = io.weight(weight);
    }
    Ok(Some(io.build()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_on_no_disk_is_named() {
        assert!(matches!(disk_of(Path::new("/no/such/folder")), Err(DiskError::Path { .. })));
        assert!(matches!(disk_of(Path::new("/proc")), Err(DiskError::None(_))));
    }
}
