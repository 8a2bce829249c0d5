//! Limits of disks, by whatever lies on them: cgroups know a disk by its number, and take no partition.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};
use oci_spec::runtime::{LinuxBlockIo, LinuxBlockIoBuilder, LinuxThrottleDevice, LinuxThrottleDeviceBuilder};

use super::BundleError;

/// What may be limited.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
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

/// A disk that cannot be limited: it is not there, or something in memory, on a network, or over several disks.
#[derive(Debug, thiserror::Error)]
#[error("cannot limit {}: it is no disk of this machine, and lies on none alone", .0.display())]
pub struct DiskError(PathBuf);

/// A disk's number: of itself, or of what a path lies on.
fn disk_of(path: &Path) -> Result<(i64, i64), DiskError> {
    let none = || DiskError(path.to_owned());
    // A name below /dev may be a link (by-id), and not out of it.
    let found = fs::canonicalize(path).map_err(|_| none())?;
    let about = fs::metadata(&found).map_err(|_| none())?;
    let is_disk = about.file_type().is_block_device();
    if path.starts_with("/dev") && !(is_disk && found.starts_with("/dev")) {
        return Err(none());
    }
    let number = if is_disk { about.rdev() } else { about.dev() };
    let known = Path::new("/sys/dev/block").join(format!("{}:{}", major(number), minor(number)));
    // Of a partition the disk is the folder above.
    let disk = if known.join("partition").exists() { known.join("../dev") } else { known.join("dev") };
    let text = fs::read_to_string(disk).map_err(|_| none())?;
    let numbers = text.trim().split_once(':').and_then(|(one, two)| Some((one.parse().ok()?, two.parse().ok()?)));
    numbers.ok_or_else(none)
}

/// As an OCI spec has them; of several limits of one disk the least.
pub(super) fn block_io(weight: Option<u16>, throttles: &[Throttle]) -> Result<Option<LinuxBlockIo>, BundleError> {
    if weight.is_none() && throttles.is_empty() {
        return Ok(None);
    }
    let mut rates: BTreeMap<(ThrottleKind, (i64, i64)), u64> = BTreeMap::new();
    for throttle in throttles {
        let rate = rates.entry((throttle.kind, disk_of(&throttle.path)?)).or_insert(throttle.rate);
        *rate = throttle.rate.min(*rate);
    }
    let of = |kind: ThrottleKind| {
        let chosen = rates.iter().filter(|((of, _), _)| *of == kind);
        let device = |((_, (major, minor)), rate): (&(ThrottleKind, (i64, i64)), &u64)| {
            LinuxThrottleDeviceBuilder::default().major(*major).minor(*minor).rate(*rate).build()
        };
        chosen.map(device).collect::<Result<Vec<LinuxThrottleDevice>, _>>()
    };
    let mut io = LinuxBlockIoBuilder::default()
        .throttle_read_bps_device(of(ThrottleKind::ReadBytes)?)
        .throttle_write_bps_device(of(ThrottleKind::WriteBytes)?)
        .throttle_read_iops_device(of(ThrottleKind::Reads)?)
        .throttle_write_iops_device(of(ThrottleKind::Writes)?);
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
        for path in ["/no/such/folder", "/proc", "/dev/null", "/dev/fd", "/dev/../etc"] {
            assert!(disk_of(Path::new(path)).is_err(), "{path}");
        }
    }
}
