//! What benchmarks of starts have in common: crun beside them, and medians.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

/// So many containers of a bundle at once, to their ends.
pub fn crun(bundle: &Path, count: usize) {
    let start = |at| {
        let mut command = Command::new("crun");
        command.arg("run").arg("--bundle").arg(bundle).arg(format!("moyai-bench-{at}")).stdin(Stdio::null());
        command.spawn().expect("crun")
    };
    let children: Vec<_> = (0..count).map(start).collect();
    children.into_iter().for_each(|mut child| assert!(child.wait().expect("a child").success()));
}

/// How long it takes.
pub fn milliseconds(work: impl FnOnce()) -> f64 {
    let began = Instant::now();
    work();
    began.elapsed().as_secs_f64() * 1e3
}

/// Prints the median of the milliseconds that `count` at once took, if there are any.
pub fn print(count: usize, who: &str, times: &mut [f64]) {
    if times.is_empty() {
        return;
    }
    times.sort_by(f64::total_cmp);
    let median = times[times.len() / 2];
    println!("{count:3} {who:15}  median {median:6.1} ms, {:4.0} a second", count as f64 / median * 1e3);
}
