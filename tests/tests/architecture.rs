//! The walls between the crates, as ARCHITECTURE.md draws them, read off `cargo metadata`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use serde_json::Value;

fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .current_dir(root)
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo prints JSON");
    let name = |value: &Value| value["name"].as_str().expect("a name").to_owned();
    let packages = metadata["packages"].as_array().expect("packages");
    packages
        .iter()
        .map(|package| {
            let listed = package["dependencies"].as_array().expect("dependencies");
            (name(package), listed.iter().map(name).collect())
        })
        .collect()
}

fn ours(list: &BTreeSet<String>) -> Vec<&str> {
    list.iter().map(String::as_str).filter(|name| name.starts_with("moyai")).collect()
}

#[test]
fn crates_depend_only_on_what_they_may() {
    let all = dependencies();
    let names: Vec<&str> = all.keys().map(String::as_str).collect();
    assert_eq!(names, ["moyai", "moyai-protocol", "moyai-runtime", "moyai-sim", "moyai-tests"]);
    assert_eq!(ours(&all["moyai-protocol"]), [""; 0]);
    assert_eq!(ours(&all["moyai-runtime"]), [""; 0]);
    assert_eq!(ours(&all["moyai-sim"]), ["moyai-protocol"]);
    assert_eq!(ours(&all["moyai-tests"]), [""; 0]);
    assert_eq!(ours(&all["moyai"]), ["moyai-protocol", "moyai-runtime", "moyai-sim"]);
}

#[test]
fn only_the_program_sees_the_network_and_only_the_runtime_the_kernel() {
    let all = dependencies();
    for (package, listed) in all.iter().filter(|(package, _)| *package != "moyai") {
        for name in ["libp2p", "quinn", "tokio", "axum", "hyper"] {
            assert!(!listed.contains(name), "{package} depends on {name}");
        }
    }
    for (package, listed) in all.iter().filter(|(package, _)| *package != "moyai-runtime") {
        for name in ["nix", "libc", "cgroups-rs", "rustix"] {
            assert!(!listed.contains(name), "{package} depends on {name}");
        }
    }
}

#[test]
fn every_dependency_is_explained() {
    let text =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../ARCHITECTURE.md")).expect("it is there");
    for (package, listed) in dependencies() {
        for name in listed.iter().filter(|name| !name.starts_with("moyai")) {
            assert!(text.contains(name.as_str()), "{package} depends on {name}, and ARCHITECTURE.md does not say why");
        }
    }
}

/// `runtime/regex` says why. Cargo leaves a patch out, with a warning, when its version no longer fits.
#[test]
fn the_runtime_brings_no_tables_of_unicode() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--offline", "--package=moyai-runtime", "--edges=normal", "--prefix=none"])
        .current_dir(root)
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let tree = String::from_utf8_lossy(&output.stdout);
    assert!(tree.contains("regex-lite"), "{tree}");
    assert!(!tree.contains("regex-syntax"), "{tree}");
}
