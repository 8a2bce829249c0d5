//! `moyai stats`, `pause` and `unpause`.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::time::Duration;

use moyai_runtime::launch::Usage;
use moyai_runtime::launch::exec::{FromProcess, Task};
use serde::Serialize;
use tokio::sync::mpsc;

use super::Context;
use super::args::{NamesWish, StatsWish};
use super::exec::Line;
use super::images::encode;
use super::output::{size, table};
use crate::api::client::Client;
use crate::api::types::Row;
use crate::daemon::problem;

/// Between two pictures.
const LOOK: Duration = Duration::from_secs(1);
/// Looks after which figures are shown without those that have not come.
const PATIENCE: u32 = 5;
/// The most containers that are looked at; each is a line of its own to its node.
const MOST: usize = 256;

/// What one container uses.
#[derive(Clone, Debug, Serialize)]
struct StatsRow {
    name: String,
    node: String,
    /// Of one core, in percent, since the look before.
    cpu_percent: f64,
    #[serde(flatten)]
    usage: Usage,
}

/// Replicas that run, by the names that people gave, or all.
async fn running(client: &Client, names: &[String]) -> anyhow::Result<Vec<Row>> {
    let mut rows: Vec<Row> = Vec::new();
    if names.is_empty() {
        rows = client.get("/v1/workloads").await?;
    }
    for name in names {
        rows.extend(client.get::<Vec<Row>>(&format!("/v1/workloads/{}", encode(name))).await?);
    }
    rows.retain(|row| row.state == "running");
    if let Some(name) = names.iter().find(|_| rows.is_empty()) {
        return Err(problem(format!("{name} does not run anywhere"), format!("`moyai why {name}` says why")));
    }
    Ok(rows)
}

fn shown_name(row: &Row) -> String {
    if row.wanted > 1 || row.replica > 1 { format!("{}.{}", row.name, row.replica) } else { row.name.clone() }
}

/// Shows what containers use.
pub async fn run(context: &Context, wish: &StatsWish) -> anyhow::Result<u8> {
    let client = context.client();
    let rows = running(&client, &wish.names).await?;
    let (found, mut looks) = mpsc::channel(MOST);
    for (at, row) in rows.iter().take(MOST).enumerate() {
        let (client, found, name) = (client.clone(), found.clone(), format!("{}.{}", row.id, row.replica));
        tokio::spawn(async move {
            // One that ended, or whose node is gone, has no figures.
            if let Ok(mut line) = Line::open(&client, &name, &Task::Usage(true)).await {
                while let Ok(FromProcess::Output(bytes)) = line.next().await {
                    let Ok(usage) = serde_json::from_slice::<Usage>(&bytes) else { continue };
                    if found.send((at, usage)).await.is_err() {
                        return;
                    }
                }
            }
        });
    }
    drop(found);
    let mut latest: BTreeMap<usize, (Usage, Option<Usage>)> = BTreeMap::new();
    let mut next = tokio::time::Instant::now() + LOOK + Duration::from_millis(200);
    let terminal = std::io::stdout().is_terminal() && !context.json;
    let mut rounds = 0;
    loop {
        tokio::select! {
            look = looks.recv() => match look {
                Some((at, usage)) => {
                    let before = latest.get(&at).map(|(usage, _)| *usage);
                    latest.insert(at, (usage, before));
                }
                // All have ended.
                None => return Ok(0),
            },
            () = tokio::time::sleep_until(next) => {
                next += LOOK;
                rounds += 1;
                // A share of the processors takes two looks, which a slow machine gives late.
                let ripe = latest.len() == rows.len().min(MOST) && latest.values().all(|(_, before)| before.is_some());
                if wish.no_stream && !ripe && rounds < PATIENCE {
                    continue;
                }
                let stats: Vec<StatsRow> = latest.iter().map(|(at, (usage, before))| stats_row(&rows[*at], usage, before.as_ref())).collect();
                show(&stats, context.json, terminal && !wish.no_stream)?;
                if wish.no_stream {
                    return Ok(0);
                }
            }
        }
    }
}

fn stats_row(row: &Row, usage: &Usage, before: Option<&Usage>) -> StatsRow {
    let cpu_percent = before.map_or(0.0, |before| {
        let (used, passed) = (usage.cpu.saturating_sub(before.cpu), usage.at.saturating_sub(before.at));
        used as f64 * 100.0 / passed.max(1) as f64
    });
    StatsRow { name: shown_name(row), node: row.node.clone(), cpu_percent, usage: *usage }
}

fn show(stats: &[StatsRow], json: bool, again: bool) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    if json {
        for row in stats {
            writeln!(out, "{}", serde_json::to_string(row)?)?;
        }
        return Ok(out.flush()?);
    }
    let shown = stats.iter().map(|row| {
        let usage = &row.usage;
        let limit = if usage.memory_limit > 0 { size(usage.memory_limit) } else { "—".to_owned() };
        vec![
            row.name.clone(),
            row.node.clone(),
            format!("{:.1} %", row.cpu_percent),
            format!("{} / {limit}", size(usage.memory)),
            format!("{} / {}", size(usage.received), size(usage.sent)),
            format!("{} / {}", size(usage.read), size(usage.written)),
            usage.pids.to_string(),
        ]
    });
    let header = ["NAME", "NODE", "CPU", "MEMORY / LIMIT", "NETWORK IN / OUT", "DISK READ / WRITTEN", "PIDS"];
    let text = table(&header, &shown.collect::<Vec<_>>());
    // From the top, and what was there before is gone.
    let begin = if again { "\x1b[H\x1b[2J" } else { "" };
    write!(out, "{begin}{text}")?;
    Ok(out.flush()?)
}

/// Stops all processes of containers where they are, or lets them go on.
pub async fn pause(context: &Context, wish: &NamesWish, frozen: bool) -> anyhow::Result<u8> {
    let client = context.client();
    for name in &wish.names {
        for row in running(&client, std::slice::from_ref(name)).await? {
            let mut line = Line::open(&client, &format!("{}.{}", row.id, row.replica), &Task::Freeze(frozen)).await?;
            match line.next().await? {
                FromProcess::Exit(0) => println!("{}", shown_name(&row)),
                FromProcess::NotStarted(_, reason) => {
                    return Err(problem(format!("{}: {reason}", shown_name(&row)), "`moyai ps` shows its state"));
                }
                other => return Err(problem(format!("{}: {other:?}", shown_name(&row)), "`moyai ps` shows its state")),
            }
        }
    }
    Ok(0)
}
