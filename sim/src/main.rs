//! `moyai-sim`: runs simulated meshes from the command line.

use std::process::ExitCode;
use std::time::Instant;

use clap::{Parser, Subcommand};
use moyai_sim::{Options, Report, run};

/// Simulates whole meshes with the real protocol code.
#[derive(Parser)]
struct Args {
    /// What to do
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Run one seed
    Run {
        /// Decides everything
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// How many nodes
        #[arg(long, default_value_t = 100)]
        nodes: usize,
        /// One JSON object
        #[arg(long)]
        json: bool,
    },
    /// Run many seeds, and name those that fail
    Search {
        /// The first seed, and the one after the last: 1..100
        #[arg(long, value_parser = seeds)]
        seeds: (u64, u64),
        /// How many nodes
        #[arg(long, default_value_t = 30)]
        nodes: usize,
    },
}

fn seeds(text: &str) -> Result<(u64, u64), String> {
    let (from, to) = text.split_once("..").ok_or("write it as FROM..TO")?;
    let number = |text: &str| text.parse::<u64>().map_err(|error| error.to_string());
    Ok((number(from)?, number(to)?))
}

fn main() -> ExitCode {
    match Args::parse().verb {
        Verb::Run { seed, nodes, json } => {
            let began = Instant::now();
            let report = run(Options::random(seed, nodes));
            if json {
                println!("{}", serde_json::to_string(&report).unwrap_or_default());
            } else {
                show(&report, began.elapsed().as_secs_f64());
            }
            ExitCode::from(u8::from(!report.violations.is_empty()))
        }
        Verb::Search { seeds: (from, to), nodes } => {
            let failing: Vec<Report> = (from..to)
                .map(|seed| run(Options::random(seed, nodes)))
                .filter(|report| !report.violations.is_empty())
                .collect();
            for report in &failing {
                println!("seed {}: {:?}", report.seed, report.violations);
                println!("  again: moyai-sim run --seed {} --nodes {nodes}", report.seed);
            }
            println!("{} seeds, {} failing", to.saturating_sub(from), failing.len());
            ExitCode::from(u8::from(!failing.is_empty()))
        }
    }
}

fn show(report: &Report, wall: f64) {
    println!("seed {}, {} nodes, {} workloads", report.seed, report.nodes, report.workloads);
    println!("{:.0} simulated seconds in {wall:.1} real ones, {} messages", report.simulated_s, report.messages);
    println!("{:.0} bytes a second sent by each node", report.bytes_per_node_s);
    match report.violations.as_slice() {
        [] => println!("everything held"),
        violations => violations.iter().for_each(|(checker, what)| println!("VIOLATED {checker}: {what}")),
    }
}
