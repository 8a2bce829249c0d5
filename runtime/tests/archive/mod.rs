//! Archives of bytes that are not there twice, for the store's tests and benchmarks.

use std::io::Read;

use sha2::{Digest, Sha256};

/// Bytes that follow from `seed`.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().read_exact(&mut bytes).expect("endless");
    bytes
}

/// A docker-archive of one layer with these files, by the name a:1.
pub fn archive(files: &[(impl AsRef<str>, impl AsRef<[u8]>)]) -> Vec<u8> {
    let mut layer = tar::Builder::new(Vec::new());
    files.iter().for_each(|(path, bytes)| append(&mut layer, path.as_ref(), bytes.as_ref()));
    let layer = layer.into_inner().expect("in memory");
    let diff_id = data_encoding::HEXLOWER.encode(&Sha256::digest(&layer));
    let config = format!(r#"{{"os":"linux","rootfs":{{"type":"layers","diff_ids":["sha256:{diff_id}"]}}}}"#);
    let mut archive = tar::Builder::new(Vec::new());
    append(&mut archive, "layer.tar", &layer);
    append(&mut archive, "config.json", config.as_bytes());
    append(&mut archive, "manifest.json", br#"[{"Config":"config.json","RepoTags":["a:1"],"Layers":["layer.tar"]}]"#);
    archive.into_inner().expect("in memory")
}

/// Adds a plain file.
pub fn append(archive: &mut tar::Builder<Vec<u8>>, path: &str, bytes: &[u8]) {
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes.len() as u64);
    header.set_mode(0o755);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1);
    archive.append_data(&mut header, path, bytes).expect("in memory");
}
