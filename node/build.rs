//! How the program is linked.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // Relocations in a bit or two each instead of 24 bytes (DT_RELR), which glibc reads since 2.36: a megabyte less.
    println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
}
