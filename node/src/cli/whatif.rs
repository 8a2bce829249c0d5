//! whatif: this mesh's catalog, loaded into the simulator, with some of its nodes killed.

use moyai_sim::whatif::{Answer, Model, ask};

use super::Context;
use super::args::WhatifWish;
use super::output::{size, table};
use crate::daemon::problem;

/// Shows what would move where.
pub async fn run(context: &Context, wish: &WhatifWish) -> anyhow::Result<u8> {
    let model: Model = context.client().get("/v1/whatif").await?;
    let mut kill: Vec<usize> = Vec::new();
    for name in &wish.kill {
        let found = model.machines.iter().position(|machine| machine.name == *name);
        kill.push(
            found.ok_or_else(|| problem(format!("no live node `{name}` in this mesh"), "`moyai nodes` lists them"))?,
        );
    }
    kill.sort_unstable();
    kill.dedup();
    if kill.len() == model.machines.len() {
        return Err(problem("nobody would be left", "name fewer nodes"));
    }
    let answer = ask(&model, &kill, wish.seed);
    if context.json {
        println!("{}", serde_json::to_string(&answer)?);
    } else {
        print!("{}", text(&model, &kill, &answer));
    }
    Ok(u8::from(!answer.stuck.is_empty()))
}

fn text(model: &Model, kill: &[usize], answer: &Answer) -> String {
    let lost = answer.moved.len() + answer.stuck.len();
    let left = model.machines.len() - kill.len();
    let mut text = format!("{lost} replicas would be lost with {} of {} nodes", kill.len(), model.machines.len());
    text.push_str(&match lost {
        0 => format!("; {left} stay\n"),
        _ => {
            let last = answer.moved.iter().map(|moved| moved.after_ms).max().unwrap_or(0);
            format!("; {} would run again, the last after {:.1} s\n", answer.moved.len(), last as f64 / 1000.0)
        }
    });
    let row = |moved: &moyai_sim::whatif::Moved| {
        let after = format!("{:.1} s", moved.after_ms as f64 / 1000.0);
        vec![format!("  {}", moved.replica), moved.from.clone(), moved.to.clone(), after]
    };
    let rows: Vec<Vec<String>> = answer.moved.iter().map(row).collect();
    if !rows.is_empty() {
        text.push_str(&table(&["  REPLICA", "FROM", "TO", "AFTER"], &rows));
    }
    for (replica, at) in &answer.evicted {
        text.push_str(&format!("  {replica} would make way on {at}\n"));
    }
    for (replica, why) in &answer.stuck {
        text.push_str(&format!("  {replica} would not fit: {why}\n"));
    }
    let images: u64 = model.images.iter().map(|image| image.size).sum();
    text.push_str(&format!(
        "Simulated from this mesh's catalog ({} workloads, {} in images): 5 ms and 100 MB/s between any two nodes.\n",
        model.workloads.len(),
        size(images)
    ));
    text
}
