//! Says of which sources this is built, so that two programs that speak with one another know whether they are of the same.

use std::hash::{DefaultHasher, Hasher};
use std::path::{Path, PathBuf};

fn main() {
    let mut files = Vec::new();
    walk(Path::new("src"), &mut files);
    walk(Path::new("regex/src"), &mut files);
    files.sort();
    // What both programs have besides, where this is built as a part of them.
    let others = [
        "Cargo.toml",
        "regex/Cargo.toml",
        "../Cargo.toml",
        "../Cargo.lock",
        "../node/src/cli/oci.rs",
        "../node/src/lib.rs",
    ];
    let others = others.map(PathBuf::from);
    let others: Vec<PathBuf> = others.into_iter().filter(|file| file.exists()).collect();
    println!("cargo::rerun-if-changed=src");
    println!("cargo::rerun-if-changed=regex/src");
    others.iter().for_each(|file| println!("cargo::rerun-if-changed={}", file.display()));
    let mut hasher = DefaultHasher::new();
    // Filters that one program has compiled another takes.
    hasher.write(std::env::var("TARGET").expect("cargo says it").as_bytes());
    for file in files.into_iter().chain(others) {
        hasher.write(file.as_os_str().as_encoded_bytes());
        hasher.write(&std::fs::read(&file).expect("a source can be read"));
    }
    println!("cargo::rustc-env=MOYAI_RUNTIME_BUILD={:016x}", hasher.finish());
}

fn walk(dir: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).expect("a folder can be read") {
        let path = entry.expect("it can be read to its end").path();
        if path.is_dir() {
            walk(&path, files);
        } else {
            files.push(path);
        }
    }
}
