//! Containers of `/bin/true` from a zygote that is there, by its spares and by forks of it: one after another, and a hundred at once.
//! With the folder of an OCI bundle as argument, `crun run` of that in the same rounds.
//!
//! `cargo bench -p moyai-runtime --bench start -- BUNDLE`, as root. Prints medians; decides nothing. From the bundle's being there to
//! the shim's word that it has ended; each with a cgroup, an overlay, and every namespace but a user one. Before each there is time
//! to make spares and to clear away what was before, which is not counted; one processor is kept busy meanwhile, since a
//! machine that rests is slow for a while.

#[path = "../tests/archive/mod.rs"]
mod archive;
mod beside;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use archive::{archive, noise};
use beside::{crun, milliseconds, print};
use moyai_runtime::container::{self, Report, Request};
use moyai_runtime::image::{Limits, Progress, import};
use moyai_runtime::launch::{self, Kind, Launcher};
use moyai_runtime::store::{Runnable, Store};

const ROUNDS: usize = 30;
const AT_ONCE: usize = 100;
const ROUNDS_AT_ONCE: usize = 5;

fn main() {
    let bundle = match std::env::args().nth(1) {
        Some(word) if word == launch::ZYGOTE => return launch::zygote().expect("a zygote's life"),
        // cargo's own word.
        Some(word) if word != "--bench" => Some(PathBuf::from(word)),
        _ => None,
    };
    let zygote = Launcher::start(|_| {}).expect("a zygote");
    let dir = tempfile::tempdir().expect("a folder");
    let store = Arc::new(Store::open(&dir.path().join("store"), None).expect("a store"));
    let busybox = std::fs::read("/bin/busybox").expect("Debian's busybox-static");
    let files = [("bin/true", busybox), ("data", noise(0, 1 << 20))];
    let image = import(&archive(&files)[..], &store, Limits::default(), &Progress::default());
    let root = image.expect("a good archive")[0].root;
    let image = store.runnable(&root).expect("a store").expect("a complete image");

    let containers = |round: usize, count: usize| -> Vec<PathBuf> {
        let one = |at| write(&image, &dir.path().join(format!("{round}-{at}")), &format!("moyai-bench-{round}-{at}"));
        (0..count).map(one).collect()
    };
    for (count, rounds) in [(1, ROUNDS), (AT_ONCE, ROUNDS_AT_ONCE)] {
        // By their kind there are spares for the first alone.
        let mut ours =
            [("by a spare", Kind::Alone), ("by a fork", Kind::Other)].map(|(name, kind)| (name, kind, Vec::new()));
        let mut theirs = Vec::new();
        // The first round is for the zygote to learn what is asked for.
        for round in 0..=rounds {
            for (_, kind, times) in &mut ours {
                let containers = containers(round, count);
                rest(count);
                let took = milliseconds(|| run(&zygote, &containers, *kind));
                times.extend((round > 0).then_some(took));
                containers.iter().for_each(|dir| container::remove(dir).expect("a container's folder"));
            }
            if let Some(bundle) = bundle.as_ref().filter(|_| round > 0) {
                rest(count);
                theirs.push(milliseconds(|| crun(bundle, count)));
            }
        }
        ours.iter_mut().for_each(|(name, _, times)| print(count, name, times));
        print(count, "by crun", &mut theirs);
    }
}

fn rest(count: usize) {
    let until = Instant::now() + if count > 1 { Duration::from_millis(1500) } else { Duration::from_millis(20) };
    while Instant::now() < until {
        std::hint::spin_loop();
    }
}

/// A container's folder.
fn write(image: &Runnable, dir: &Path, cgroup: &str) -> PathBuf {
    let limits = container::Limits { memory: 64 << 20, pids: 100, ..Default::default() };
    let request = Request {
        command: vec!["/bin/true".to_owned()],
        hostname: "bench".to_owned(),
        cgroup: cgroup.to_owned(),
        limits,
        ..Default::default()
    };
    container::write_bundle(dir, image, &request).expect("a bundle");
    dir.to_owned()
}

/// All of them, to their ends.
fn run(zygote: &Launcher, containers: &[PathBuf], kind: Kind) {
    let lines: Vec<_> = containers.iter().map(|dir| zygote.launch(dir, kind).expect("a shim")).collect();
    for line in lines {
        loop {
            match container::next_report(&line).expect("a shim's line") {
                Some(Report::Running { .. }) => {}
                Some(Report::Exited(exit)) => break assert_eq!(exit.code, 0),
                other => panic!("{other:?}"),
            }
        }
    }
}
