//! `moyai-sim`: runs simulated meshes from the command line.

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use clap::{Args as ClapArgs, Parser, Subcommand};
use moyai_sim::{Distribution, Options, Report, Scenario, run};

/// Simulates whole meshes with the real protocol code.
#[derive(Parser)]
#[command(
    after_help = "Examples:\n  moyai-sim run --scenario failover --nodes 1000\n  moyai-sim search --seeds 1..1000"
)]
struct Args {
    /// What to do
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Run one seed
    Run(RunWish),
    /// Run what shows how a mesh grows, and write it all to one HTML page
    Report(ReportWish),
    /// Run many seeds, and name those that fail, each with the command that runs it again
    Search(SearchWish),
}

#[derive(ClapArgs)]
struct RunWish {
    /// Decides everything
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How many nodes
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=20_000))]
    nodes: u64,
    /// What is done to them: chaos, idle, spread, failover, storm, split, churn, singleton, load50, load90
    #[arg(long, default_value_t = Scenario::Chaos)]
    scenario: Scenario,
    /// One JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    overrides: Overrides,
}

#[derive(ClapArgs)]
struct SearchWish {
    /// The first seed, and the one after the last: 1..100
    #[arg(long, value_parser = seeds)]
    seeds: (u64, u64),
    /// How many run side by side
    #[arg(long, default_value_t = std::thread::available_parallelism().map_or(1, usize::from))]
    jobs: usize,
    /// The most nodes of a mesh; each seed has its own number from 2 on
    #[arg(long, default_value_t = 20)]
    nodes: usize,
    /// What is done to them
    #[arg(long, default_value_t = Scenario::Chaos)]
    scenario: Scenario,
}

#[derive(ClapArgs)]
struct ReportWish {
    /// Where the page goes
    #[arg(long, default_value = "target/report.html")]
    out: std::path::PathBuf,
    /// Decides everything
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Sizes of meshes. 10,000 nodes take 8 GB and minutes for each scenario; storm ends at 5,000 and load90 at 300
    #[arg(long, value_delimiter = ',', default_values_t = [10, 100, 300, 1000])]
    sizes: Vec<usize>,
}

/// What differs from the scenario's own.
#[derive(ClapArgs, Clone, Default)]
struct Overrides {
    /// Share of messages that are lost
    #[arg(long)]
    loss: Option<f64>,
    /// Share of messages that arrive twice
    #[arg(long)]
    duplicates: Option<f64>,
    /// Share of nodes that are slow
    #[arg(long)]
    slow: Option<f64>,
    /// Workloads submitted
    #[arg(long)]
    workloads: Option<usize>,
    /// Machines that lose their power
    #[arg(long)]
    crashes: Option<usize>,
    /// Daemons that are killed while their containers go on
    #[arg(long)]
    kills: Option<usize>,
    /// Nodes that are drained for a while
    #[arg(long)]
    drains: Option<usize>,
    /// Workloads that are updated
    #[arg(long)]
    updates: Option<usize>,
    /// Share of workloads that are singletons; as many are gangs
    #[arg(long)]
    singletons: Option<f64>,
    /// Cuts of the network
    #[arg(long)]
    splits: Option<usize>,
    /// Seconds until nothing fails any more
    #[arg(long)]
    safety: Option<u64>,
    /// Seconds that the mesh then has
    #[arg(long)]
    liveness: Option<u64>,
    /// Say on standard error what happens
    #[arg(long)]
    trace: bool,
    /// Begin in step instead of joining one another
    #[arg(long)]
    warm: bool,
}

impl Overrides {
    fn apply(&self, mut options: Options) -> Options {
        options.loss = self.loss.unwrap_or(options.loss);
        options.duplicates = self.duplicates.unwrap_or(options.duplicates);
        options.slow = self.slow.unwrap_or(options.slow);
        options.workloads = self.workloads.unwrap_or(options.workloads);
        options.crashes = self.crashes.unwrap_or(options.crashes);
        options.kills = self.kills.unwrap_or(options.kills);
        options.drains = self.drains.unwrap_or(options.drains);
        options.updates = self.updates.unwrap_or(options.updates);
        options.singletons = self.singletons.unwrap_or(options.singletons);
        options.splits = self.splits.unwrap_or(options.splits);
        options.safety = self.safety.map_or(options.safety, Duration::from_secs);
        options.liveness = self.liveness.map_or(options.liveness, Duration::from_secs);
        options.cold &= !self.warm;
        options.trace = self.trace;
        options
    }
}

fn seeds(text: &str) -> Result<(u64, u64), String> {
    let (from, to) = text.split_once("..").ok_or("write it as FROM..TO")?;
    let number = |text: &str| text.parse::<u64>().map_err(|error| error.to_string());
    Ok((number(from)?, number(to)?))
}

fn main() -> ExitCode {
    let holds = match Args::parse().verb {
        Verb::Run(wish) => run_one(&wish),
        Verb::Search(wish) => search(&wish),
        Verb::Report(wish) => report(&wish),
    };
    ExitCode::from(u8::from(!holds))
}

fn run_one(wish: &RunWish) -> bool {
    let report = run(wish.overrides.apply(Options::new(wish.scenario, wish.seed, wish.nodes as usize)));
    if wish.json {
        println!("{}", serde_json::to_string(&report).unwrap_or_default());
    } else {
        show(&report);
    }
    report.violations.is_empty()
}

fn report(wish: &ReportWish) -> bool {
    let mut reports = Vec::new();
    for scenario in moyai_sim::report::scenarios() {
        let most = match scenario {
            Scenario::Storm => 5000,
            Scenario::Load50 | Scenario::Load90 => 300,
            _ => usize::MAX,
        };
        for nodes in wish.sizes.iter().filter(|nodes| **nodes <= most) {
            let report = run(Options::new(scenario, wish.seed, *nodes));
            eprintln!("{scenario}, {nodes} nodes: {:.0} virtual seconds in {:.1}", report.simulated_s, report.wall_s);
            reports.push(report);
        }
    }
    if let Err(error) = std::fs::write(&wish.out, moyai_sim::report::page(&reports)) {
        eprintln!("error: cannot write {}: {error}", wish.out.display());
        return false;
    }
    println!("{}", wish.out.display());
    reports.iter().all(|report| report.violations.is_empty())
}

thread_local! {
    /// What a thread is running, for when it panics.
    static RUNNING: std::cell::Cell<Option<(u64, usize)>> = const { std::cell::Cell::new(None) };
}

/// A seed that makes the protocol panic ends the search: there is no more to be said than which it was.
fn name_panics(scenario: Scenario) {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if let Some((seed, nodes)) = RUNNING.get() {
            eprintln!("seed {seed}, {nodes} nodes: a panic");
            eprintln!("  again: moyai-sim run --scenario {scenario} --seed {seed} --nodes {nodes}");
        }
        before(panic);
    }));
}

fn search(wish: &SearchWish) -> bool {
    name_panics(wish.scenario);
    let next = AtomicU64::new(wish.seeds.0);
    let failing = Mutex::new(0);
    std::thread::scope(|scope| {
        for _ in 0..wish.jobs.max(1) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= wish.seeds.1 {
                        return;
                    }
                    let nodes = 2 + seed as usize % wish.nodes.saturating_sub(1).max(1);
                    RUNNING.set(Some((seed, nodes)));
                    let report = run(Options::new(wish.scenario, seed, nodes));
                    if let Some((checker, what)) = report.violations.first() {
                        let (nodes, flags) = smallest(wish.scenario, seed, nodes, checker);
                        let mut failing = failing.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                        *failing += 1;
                        println!("seed {seed}, {nodes} nodes: {checker}: {what}");
                        let scenario = wish.scenario;
                        println!("  again: moyai-sim run --scenario {scenario} --seed {seed} --nodes {nodes}{flags}");
                    }
                }
            });
        }
    });
    let failing = *failing.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    println!("{} seeds, {failing} failing", wish.seeds.1.saturating_sub(wish.seeds.0));
    failing == 0
}

/// The smallest variant found of a failing seed that breaks the same property: fewer nodes, then without this or that.
fn smallest(scenario: Scenario, seed: u64, nodes: usize, checker: &str) -> (usize, String) {
    let breaks = |nodes: usize, overrides: &Overrides| {
        let report = run(overrides.apply(Options::new(scenario, seed, nodes)));
        report.violations.iter().any(|(other, _)| other == checker)
    };
    let mut kept = Overrides::default();
    let nodes = (2..nodes).find(|fewer| breaks(*fewer, &kept)).unwrap_or(nodes);
    let mut flags = String::new();
    type Without = (&'static str, fn(&mut Overrides));
    let tries: [Without; 12] = [
        (" --warm", |o| o.warm = true),
        (" --loss 0", |o| o.loss = Some(0.0)),
        (" --duplicates 0", |o| o.duplicates = Some(0.0)),
        (" --slow 0", |o| o.slow = Some(0.0)),
        (" --splits 0", |o| o.splits = Some(0)),
        (" --kills 0", |o| o.kills = Some(0)),
        (" --drains 0", |o| o.drains = Some(0)),
        (" --updates 0", |o| o.updates = Some(0)),
        (" --singletons 0", |o| o.singletons = Some(0.0)),
        (" --crashes 0", |o| o.crashes = Some(0)),
        (" --crashes 1", |o| o.crashes = Some(1)),
        (" --workloads 1", |o| o.workloads = Some(1)),
    ];
    for (flag, without) in tries {
        let mut tried = kept.clone();
        without(&mut tried);
        if breaks(nodes, &tried) {
            kept = tried;
            flags.push_str(flag);
        }
    }
    (nodes, flags)
}

fn show(report: &Report) {
    println!("{}, seed {}, {} nodes, {} workloads", report.scenario, report.seed, report.nodes, report.workloads);
    println!(
        "{:.0} simulated seconds in {:.1} real ones, {} messages",
        report.simulated_s, report.wall_s, report.messages
    );
    println!("{:.0} bytes a second sent by each node", report.bytes_per_node_s);
    let times = |what: &str, times: &Option<Distribution>| {
        if let Some(Distribution { p50, p99, max, count }) = times {
            println!("{what}: p50 {p50:.0} ms, p99 {p99:.0} ms, the longest {max:.0} ms, of {count}");
        }
    };
    times("known by 99 % of nodes", &report.spread_ms);
    times("running elsewhere", &report.failover_ms);
    times("placed and started", &report.placement_ms);
    if let Some(rate) = report.placements_per_s {
        println!("{rate:.0} placements a second");
    }
    if let Some(quality) = report.quality {
        println!("placed {:.1} % of what a scheduler that sees everything would have", quality * 100.0);
    }
    println!("{} false deaths", report.false_deaths);
    match report.violations.as_slice() {
        [] => println!("everything held"),
        violations => violations.iter().for_each(|(checker, what)| println!("VIOLATED {checker}: {what}")),
    }
}
