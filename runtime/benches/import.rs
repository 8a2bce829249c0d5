//! Import against its parts: how much of what chunking and hashing alone could do does the whole path reach?
//!
//! `cargo bench -p moyai-runtime`. Prints medians of interleaved rounds; decides nothing.

use std::io::Read;
use std::time::Instant;

use moyai_runtime::image::{Chunker, Limits, Progress, import, sha256_hex};
use moyai_runtime::store::Store;

const ROUNDS: usize = 5;

fn main() {
    let files: Vec<(String, Vec<u8>)> = (0..400u64)
        .map(|at| {
            // From 4 KiB to 4 MiB, as in a root file system.
            let len = 4096usize << (at % 11);
            let mut bytes = vec![0; len];
            blake3::Hasher::new().update(&at.to_le_bytes()).finalize_xof().read_exact(&mut bytes).expect("endless");
            (format!("dir{}/file{at}", at % 20), bytes)
        })
        .collect();
    let bytes: usize = files.iter().map(|(_, bytes)| bytes.len()).sum();
    let archive = archive(&files);
    let rate = |seconds: f64| bytes as f64 / seconds / 1e6;
    let (mut alone, mut hashing, mut whole) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let began = Instant::now();
        for (_, bytes) in &files {
            let mut ignore = |_: &[u8; 32], _: &[u8]| Ok::<(), ()>(());
            let mut chunker = Chunker::default();
            chunker.push(bytes, &mut ignore).and_then(|()| chunker.finish(&mut ignore)).expect("nothing fails");
        }
        alone.push(rate(began.elapsed().as_secs_f64()));
        let began = Instant::now();
        assert!(!sha256_hex(&archive).is_empty());
        hashing.push(rate(began.elapsed().as_secs_f64()));
        let dir = tempfile::tempdir().expect("a folder");
        let store = Store::open(dir.path(), None).expect("a store");
        let began = Instant::now();
        import(&archive[..], &store, Limits::default(), &Progress::default()).expect("a good archive");
        whole.push(rate(began.elapsed().as_secs_f64()));
    }
    let median = |rates: &mut Vec<f64>| {
        rates.sort_by(f64::total_cmp);
        rates[rates.len() / 2]
    };
    let (alone, hashing, whole) = (median(&mut alone), median(&mut hashing), median(&mut whole));
    println!("{} MB in {} files, medians of {ROUNDS} rounds", bytes / 1_000_000, files.len());
    println!("chunk + BLAKE3 alone, one core   {alone:7.0} MB/s");
    println!("SHA-256 alone, one core          {hashing:7.0} MB/s");
    println!("import, whole path to the disk   {whole:7.0} MB/s   {:.0} % of chunk + BLAKE3", whole / alone * 100.0);
}

fn archive(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut layer = tar::Builder::new(Vec::new());
    files.iter().for_each(|(path, bytes)| append(&mut layer, path, bytes));
    let layer = layer.into_inner().expect("in memory");
    let config = format!(r#"{{"rootfs":{{"diff_ids":["sha256:{}"]}}}}"#, sha256_hex(&layer));
    let mut archive = tar::Builder::new(Vec::new());
    append(&mut archive, "layer.tar", &layer);
    append(&mut archive, "config.json", config.as_bytes());
    append(&mut archive, "manifest.json", br#"[{"Config":"config.json","RepoTags":["bench"],"Layers":["layer.tar"]}]"#);
    archive.into_inner().expect("in memory")
}

fn append(archive: &mut tar::Builder<Vec<u8>>, path: &str, bytes: &[u8]) {
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes.len() as u64);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1);
    archive.append_data(&mut header, path, bytes).expect("in memory");
}
