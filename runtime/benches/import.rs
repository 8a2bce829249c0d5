//! Import against its parts: how much of what chunking and hashing alone could do does the whole path reach?
//!
//! `cargo bench -p moyai-runtime`. Prints medians of interleaved rounds; decides nothing.

#[path = "../tests/archive/mod.rs"]
mod archive;

use std::time::Instant;

use archive::{archive, noise};
use moyai_runtime::image::{Chunker, Limits, Progress, import, sha256_hex};
use moyai_runtime::store::Store;

const ROUNDS: usize = 5;

fn main() {
    let files: Vec<(String, Vec<u8>)> = (0..400u64)
        .map(|at| {
            // From 4 KiB to 4 MiB, as in a root file system.
            let len = 4096usize << (at % 11);
            (format!("dir{}/file{at}", at % 20), noise(at, len))
        })
        .collect();
    let bytes: usize = files.iter().map(|(_, bytes)| bytes.len()).sum();
    let archive = archive(&files);
    let rate = |seconds: f64| bytes as f64 / seconds / 1e6;
    let (mut alone, mut hashing, mut whole) = (Vec::new(), Vec::new(), Vec::new());
    // Each round's store stays to the end: where many files were removed, ext4 is slow to make new ones for five minutes. So is the
    // next run of this in the same folder; TMPDIR names another.
    let mut stores = Vec::new();
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
        stores.push((store, dir));
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
