//! Archives that no honest tool writes, and honest ones of any content: docker-archives put together byte by byte.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

/// An entry of a layer, as a tar archive can have it.
#[derive(Clone, Debug)]
pub enum Entry {
    /// A file: path, content.
    File(String, Vec<u8>),
    /// A symbolic link: path, target.
    Symlink(String, String),
    /// A hard link: path, target.
    Hardlink(String, String),
    /// A folder.
    Folder(String),
    /// A block device: path, major and minor number.
    BlockDevice(String, u32, u32),
}

impl Entry {
    /// A small file.
    pub fn file(path: &str) -> Entry {
        Entry::File(path.to_owned(), b"content\n".to_vec())
    }

    /// A symbolic link.
    pub fn symlink(path: &str, target: &str) -> Entry {
        Entry::Symlink(path.to_owned(), target.to_owned())
    }

    /// A hard link.
    pub fn hardlink(path: &str, target: &str) -> Entry {
        Entry::Hardlink(path.to_owned(), target.to_owned())
    }
}

/// A tar archive (POSIX ustar) of `entries`.
pub fn tar(entries: &[Entry]) -> Vec<u8> {
    let mut archive = Vec::new();
    for entry in entries {
        let none = String::new();
        let (path, kind, link, content, device) = match entry {
            Entry::File(path, content) => (path, b'0', &none, &content[..], (0, 0)),
            Entry::Symlink(path, target) => (path, b'2', target, &[][..], (0, 0)),
            Entry::Hardlink(path, target) => (path, b'1', target, &[][..], (0, 0)),
            Entry::Folder(path) => (path, b'5', &none, &[][..], (0, 0)),
            Entry::BlockDevice(path, major, minor) => (path, b'4', &none, &[][..], (*major, *minor)),
        };
        archive.extend(header(path, kind, link, content.len() as u64, device));
        archive.extend(content);
        archive.resize(archive.len().next_multiple_of(512), 0);
    }
    archive.extend([0; 1024]);
    archive
}

fn header(path: &str, kind: u8, link: &str, size: u64, device: (u32, u32)) -> [u8; 512] {
    let mut header = [0; 512];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, path.as_bytes());
    put(100, b"0000755\0");
    put(108, b"0000000\0");
    put(116, b"0000000\0");
    put(124, format!("{size:011o}\0").as_bytes());
    put(136, b"00000000000\0");
    put(148, b"        ");
    put(156, &[kind]);
    put(157, link.as_bytes());
    put(257, b"ustar\x0000");
    put(329, format!("{:07o}\0", device.0).as_bytes());
    put(337, format!("{:07o}\0", device.1).as_bytes());
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}

/// A docker-archive of an image called `name` with these layers, digests and all, written to `path`.
pub fn docker_archive(path: &Path, name: &str, layers: &[Vec<u8>]) {
    let mut entries = Vec::new();
    let (mut names, mut diff_ids) = (Vec::new(), Vec::new());
    for layer in layers {
        let digest = sha256(layer);
        names.push(format!("{digest}.tar"));
        diff_ids.push(format!("sha256:{digest}"));
        entries.push(Entry::File(format!("{digest}.tar"), layer.clone()));
    }
    let config = serde_json::json!({
        "architecture": std::env::consts::ARCH.replace("x86_64", "amd64").replace("aarch64", "arm64"),
        "os": "linux",
        "config": {"Cmd": ["/bin/sh"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let config = config.to_string().into_bytes();
    let config_name = format!("{}.json", sha256(&config));
    let manifest =
        serde_json::json!([{"Config": config_name, "RepoTags": [format!("{name}:latest")], "Layers": names}]);
    entries.push(Entry::File(config_name, config));
    entries.push(Entry::File("manifest.json".to_owned(), manifest.to_string().into_bytes()));
    fs::write(path, tar(&entries)).unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
}

/// SHA-256 in hexadecimal, by sha256sum(1).
pub fn sha256(bytes: &[u8]) -> String {
    let mut child = Command::new("sha256sum");
    let mut child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("run sha256sum");
    child.stdin.take().expect("a pipe").write_all(bytes).expect("feed sha256sum");
    let output = child.wait_with_output().expect("wait for sha256sum");
    String::from_utf8_lossy(&output.stdout[..64]).into_owned()
}

/// Bytes that do not compress, the same each time for one `seed` (Marsaglia's xorshift64).
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}
