//! run, ps, logs, why, stop, start, scale, rm, wait.

use std::io::Write;
use std::time::Duration;

use anyhow::Context as _;

use super::Context;
use super::args::{LogsWish, ManyWish, OneWish, PsWish, RunWish, ScaleWish};
use super::images::encode;
use super::mesh::pairs;
use super::output::{age, json_lines, parse_cpus, parse_size, table};
use crate::api::client::Client;
use crate::api::types::{LogRow, Row, RunRequest, Submitted, WhyRow};
use crate::daemon::problem;

/// A command that waits says what for after this.
const QUIET: Duration = Duration::from_secs(1);

/// Runs a workload.
pub async fn run(context: &Context, wish: RunWish) -> anyhow::Result<u8> {
    let client = context.client();
    let (detach, remove, replicas) = (wish.detach, wish.rm, wish.replicas);
    let submitted: Submitted = client.post("/v1/workloads", &request(wish)?).await?;
    let name = submitted.name.clone();
    let begun = std::time::Instant::now();
    let rows = tokio::select! {
        rows = decided(&client, &submitted.id, &name) => match rows {
            // It has come to its end and is forgotten, as was asked for.
            Err(error) if detach && remove && error.to_string().starts_with("no workload") => {
                println!("{name}");
                return Ok(0);
            }
            rows => rows?,
        },
        _ = tokio::signal::ctrl_c() => {
            eprintln!("{name} stays submitted; `moyai ps` shows it, `moyai rm {name}` takes it back");
            return Ok(130);
        }
    };
    if let Some(row) = rows.iter().find(|row| row.state == "pending" || row.node.is_empty()) {
        return Err(not_taken(&client, &submitted.id, row).await);
    }
    if detach {
        say_placed(context, &submitted, &rows, begun.elapsed())?;
        let broken = rows
            .iter()
            .find(|row| row.state == "exited" && matches!(row.exit_code, Some(125..=127)) && !row.detail.is_empty());
        return match broken {
            Some(row) => start_failure(row, false),
            None => Ok(0),
        };
    }
    attached(&client, &submitted, replicas, remove).await
}

async fn decided(client: &Client, id: &str, name: &str) -> anyhow::Result<Vec<Row>> {
    let path = format!("/v1/workloads/{id}/decided");
    let answer = client.get::<Vec<Row>>(&path);
    tokio::pin!(answer);
    tokio::select! {
        rows = &mut answer => return rows,
        () = tokio::time::sleep(QUIET) => {}
    }
    let mut told = String::new();
    let mut look = tokio::time::interval(QUIET);
    loop {
        tokio::select! {
            rows = &mut answer => return rows,
            _ = look.tick() => {
                let rows: Vec<Row> = client.get(&format!("/v1/workloads/{id}")).await?;
                let waits = rows.iter().find(|row| row.state != "running").map(|row| match row.state.as_str() {
                    "fetching" => format!("{name}: its image is on its way to {}", row.node),
                    "starting" => format!("{name}: starting on {}", row.node),
                    _ => format!("{name}: waiting for bids"),
                });
                if let Some(waits) = waits.filter(|waits| *waits != told) {
                    eprintln!("{waits}");
                    told = waits;
                }
            }
        }
    }
}

fn say_placed(context: &Context, submitted: &Submitted, rows: &[Row], took: Duration) -> anyhow::Result<()> {
    if context.json {
        return json_lines(rows);
    }
    let mut nodes: Vec<&str> = rows.iter().map(|row| row.node.as_str()).collect();
    nodes.dedup();
    let what = if rows.len() == 1 { "1 replica".to_owned() } else { format!("{} replicas", rows.len()) };
    println!("{}  {}  {what} placed in {} ms: {}", submitted.name, submitted.id, took.as_millis(), nodes.join(", "));
    Ok(())
}

async fn not_taken(client: &Client, id: &str, row: &Row) -> anyhow::Error {
    let why: Vec<WhyRow> = client.get(&format!("/v1/workloads/{id}/why")).await.unwrap_or_default();
    let mut reasons: Vec<String> = Vec::new();
    if let Some(why) = why.iter().find(|why| why.state == "pending") {
        reasons.extend(why.refusals.iter().map(|(node, reason)| format!("{node}: {reason}")));
        let shown = why.refusals.len() as u32;
        let all: u32 = why.refused.iter().map(|(_, count)| count).sum();
        if all > shown {
            let kinds: Vec<String> = why.refused.iter().map(|(reason, count)| format!("{reason} ({count})")).collect();
            reasons.push(format!("in all: {}", kinds.join(", ")));
        }
    }
    let reasons = if reasons.is_empty() { row.detail.clone() } else { reasons.join("; ") };
    let name = &row.name;
    problem(
        format!("no node takes {name} now: {reasons}"),
        format!("it stays pending and starts when one can (`moyai why {name}`); `moyai rm {name}` takes it back"),
    )
}

fn start_failure(row: &Row, removed: bool) -> anyhow::Result<u8> {
    eprintln!("error: {} did not start on {}: {}", row.name, row.node, row.detail);
    if removed {
        eprintln!("hint: `moyai run --entrypoint sh {} -c 'ls /bin'` shows what the image has", row.image);
    } else {
        eprintln!("hint: it keeps its name until `moyai rm {}`", row.name);
    }
    Ok(row.exit_code.map_or(125, |code| code as u8))
}

/// Shows what the first replica writes until it ends, and exits as it did.
async fn attached(client: &Client, submitted: &Submitted, replicas: u32, remove: bool) -> anyhow::Result<u8> {
    let id = &submitted.id;
    let logs = copy_logs(client, id, true, None, false, replicas > 1);
    let ended = async {
        let ended = client.get::<Vec<Row>>(&format!("/v1/workloads/{id}/ended")).await?;
        anyhow::Ok(ended)
    };
    tokio::pin!(ended, logs);
    let mut all_read = false;
    let rows = loop {
        tokio::select! {
            rows = &mut ended => break rows?,
            // They may end before the workload's end is known here.
            read = &mut logs, if !all_read => {
                read?;
                all_read = true;
            }
            _ = tokio::signal::ctrl_c() => {
                let _asked: Submitted = client.post(&format!("/v1/workloads/{id}/scale?replicas=0"), &()).await?;
                eprintln!("{} is being stopped", submitted.name);
                break ended.await?;
            }
        }
    };
    if !all_read {
        // What it wrote last is still on its way.
        let _late = tokio::time::timeout(Duration::from_secs(5), &mut logs).await;
    }
    if remove {
        let _removed: Submitted = client.delete(&format!("/v1/workloads/{id}")).await?;
    }
    let worst = rows.iter().filter(|row| row.exit_code.is_some_and(|code| code != 0)).max_by_key(|row| row.exit_code);
    match worst {
        Some(row) if matches!(row.exit_code, Some(125..=127)) && !row.detail.is_empty() => start_failure(row, remove),
        Some(row) => {
            if !row.detail.is_empty() {
                eprintln!("{}: {}", row.name, row.detail);
            }
            Ok(row.exit_code.unwrap_or(1) as u8)
        }
        None => Ok(0),
    }
}

fn request(wish: RunWish) -> anyhow::Result<RunRequest> {
    let cpu_milli = match &wish.cpus {
        Some(text) => parse_cpus(text)
            .ok_or_else(|| problem(format!("`{text}` is no number of cores"), "write it like 2 or 0.5"))?,
        None => 0,
    };
    let memory = match &wish.memory {
        Some(text) => {
            parse_size(text).ok_or_else(|| problem(format!("`{text}` is no size"), "write it like 64m or 2g"))?
        }
        None => 0,
    };
    let mut env = Vec::new();
    for file in &wish.env_file {
        let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        env.extend(
            text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')).map(str::to_owned),
        );
    }
    env.extend(wish.env);
    let env = env.into_iter().filter_map(|entry| match entry.contains('=') {
        true => Some(entry),
        // As docker does: a variable that this shell does not have is not passed.
        false => std::env::var(&entry).ok().map(|value| format!("{entry}={value}")),
    });
    Ok(RunRequest {
        name: wish.name.unwrap_or_default(),
        image: wish.image,
        command: wish.command,
        entrypoint: wish.entrypoint.map(|text| if text.is_empty() { Vec::new() } else { vec![text] }),
        env: env.collect(),
        user: wish.user,
        workdir: wish.workdir,
        hostname: wish.hostname,
        cpu_milli,
        memory,
        pids: wish.pids_limit,
        replicas: wish.replicas,
        restart: wish.restart,
        on: pairs(&wish.on)?,
        stop_signal: wish.stop_signal,
        stop_timeout: wish.stop_timeout,
        // In front of the user it is this command that removes it, when it has shown all of the log.
        auto_remove: wish.rm && wish.detach,
    })
}

/// Lists what runs.
pub async fn ps(context: &Context, wish: &PsWish) -> anyhow::Result<u8> {
    let mut rows: Vec<Row> = context.client().get("/v1/workloads").await?;
    if !wish.all {
        rows.retain(|row| row.state != "exited");
    }
    if wish.quiet {
        let mut ids: Vec<String> = rows.into_iter().map(|row| row.id).collect();
        ids.dedup();
        ids.iter().for_each(|id| println!("{id}"));
        return Ok(0);
    }
    if context.json {
        json_lines(&rows)?;
        return Ok(0);
    }
    let mut shown: Vec<Vec<String>> = Vec::new();
    for group in rows.chunk_by(|a, b| a.id == b.id) {
        let first = &group[0];
        let ready = group.iter().filter(|row| row.state == "running").count();
        let mut nodes: Vec<&str> = group.iter().map(|row| row.node.as_str()).filter(|node| !node.is_empty()).collect();
        nodes.dedup();
        let nodes = if nodes.is_empty() { "—".to_owned() } else { nodes.join(", ") };
        let since = group.iter().map(|row| row.started).filter(|started| *started > 0).min().unwrap_or(first.submitted);
        let (name, image) = (first.name.clone(), first.image.clone());
        shown.push(vec![
            first.id.clone(),
            name,
            image,
            format!("{ready}/{}", first.wanted),
            nodes,
            age(since),
            state(group),
        ]);
    }
    print!("{}", table(&["ID", "NAME", "IMAGE", "READY", "NODES", "AGE", "STATE"], &shown));
    Ok(0)
}

/// One word for all replicas when they agree, else the states counted; and the reason of the first that has one.
fn state(group: &[Row]) -> String {
    let mut counts: Vec<(String, usize)> = Vec::new();
    for row in group {
        let word = match row.exit_code {
            Some(code) => format!("{} ({code})", row.state),
            None => row.state.clone(),
        };
        match counts.iter_mut().find(|(known, _)| *known == word) {
            Some((_, count)) => *count += 1,
            None => counts.push((word, 1)),
        }
    }
    let mut text = match counts.as_slice() {
        [(word, _)] => word.clone(),
        counts => counts.iter().map(|(word, count)| format!("{count} {word}")).collect::<Vec<_>>().join(", "),
    };
    if let Some(row) = group.iter().find(|row| !row.detail.is_empty()) {
        text.push_str(&format!(": {}", row.detail));
    }
    text
}

/// Shows what a workload wrote.
pub async fn logs(context: &Context, wish: &LogsWish) -> anyhow::Result<u8> {
    let client = context.client();
    if context.json {
        let mut stream = client.stream(&log_path(&wish.name, wish.follow, wish.tail)).await?;
        while let Some(row) = stream.next::<LogRow>().await? {
            println!("{}", serde_json::to_string(&row)?);
        }
        return Ok(0);
    }
    let rows: Vec<Row> = client.get(&format!("/v1/workloads/{}", encode(&wish.name))).await?;
    let several = rows.len() > 1 && !rows.iter().any(|row| format!("{}.{}", row.name, row.replica) == wish.name);
    tokio::select! {
        result = copy_logs(&client, &wish.name, wish.follow, wish.tail, wish.timestamps, several) => result?,
        _ = tokio::signal::ctrl_c() => return Ok(130),
    }
    Ok(0)
}

fn log_path(name: &str, follow: bool, tail: Option<u32>) -> String {
    let tail = tail.map_or(String::new(), |tail| format!("&tail={tail}"));
    format!("/v1/workloads/{}/logs?follow={follow}{tail}", encode(name))
}

async fn copy_logs(
    client: &Client,
    name: &str,
    follow: bool,
    tail: Option<u32>,
    times: bool,
    several: bool,
) -> anyhow::Result<()> {
    let mut stream = client.stream(&log_path(name, follow, tail)).await?;
    while let Some(row) = stream.next::<LogRow>().await? {
        let mut line = String::new();
        if several {
            line.push_str(&format!("{} | ", row.replica));
        }
        if times {
            line.push_str(&format!("{} ", row.time));
        }
        line.push_str(&row.text);
        let written = if row.stream == "stderr" {
            std::io::stderr().write_all(line.as_bytes())
        } else {
            std::io::stdout().write_all(line.as_bytes()).and_then(|()| std::io::stdout().flush())
        };
        match written {
            // `moyai logs | head` has seen enough.
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => return Ok(()),
            result => result?,
        }
    }
    Ok(())
}

/// Shows why each replica is where it is.
pub async fn why(context: &Context, wish: &OneWish) -> anyhow::Result<u8> {
    let rows: Vec<WhyRow> = context.client().get(&format!("/v1/workloads/{}/why", encode(&wish.name))).await?;
    if context.json {
        json_lines(&rows)?;
        return Ok(0);
    }
    for row in &rows {
        print!("{}", explain(row));
    }
    Ok(0)
}

fn explain(row: &WhyRow) -> String {
    let at = std::time::UNIX_EPOCH + Duration::from_millis(row.at);
    let time = moyai_runtime::container::timestamp(at);
    let time = time.get(11..23).unwrap_or("—");
    let mut text = if row.node.is_empty() || row.state == "pending" {
        format!("{}  {} for {}; last asked at {time}, because {}\n", row.replica, row.state, age(row.at), row.cause)
    } else {
        format!(
            "{}  {} on {}, epoch {}; placed at {time} by {} in {} ms, because {}\n",
            row.replica, row.state, row.node, row.epoch, row.auctioneer, row.took, row.cause
        )
    };
    if !row.detail.is_empty() {
        text.push_str(&format!("  {}\n", row.detail));
    }
    text.push_str(&format!("  asked {} of {} nodes\n", row.asked.0, row.asked.1));
    let number: u32 = row.replica.rsplit('.').next().and_then(|number| number.parse().ok()).unwrap_or(0);
    let mut rows: Vec<Vec<String>> = Vec::new();
    for quote in &row.quotes {
        let won = if quote.won.contains(&number) {
            "← won".to_owned()
        } else if quote.won.is_empty() {
            String::new()
        } else {
            format!("took {}", quote.won.iter().map(u32::to_string).collect::<Vec<_>>().join(", "))
        };
        rows.push(vec![format!("    {}", quote.node), quote.because.clone(), format!("{} ms", quote.price), won]);
    }
    for (node, reason) in &row.refusals {
        rows.push(vec![format!("    {node}"), format!("refused: {reason}"), String::new(), String::new()]);
    }
    if !rows.is_empty() {
        text.push_str(&table(&["    node", "", "quote", ""], &rows));
    }
    let shown = row.refusals.len() as u32;
    let all: u32 = row.refused.iter().map(|(_, count)| count).sum();
    if all > shown || row.more_quotes > 0 {
        let kinds: Vec<String> = row.refused.iter().map(|(reason, count)| format!("{reason} ({count})")).collect();
        text.push_str(&format!("    {} more bids; refused in all: {}\n", row.more_quotes, kinds.join(", ")));
    }
    text
}

/// Stops workloads and waits until they have ended.
pub async fn stop(context: &Context, wish: &ManyWish) -> anyhow::Result<u8> {
    let client = context.client();
    for name in &wish.names {
        let name = encode(name);
        let _asked: Submitted = client.post(&format!("/v1/workloads/{name}/scale?replicas=0"), &()).await?;
        let _ended: Vec<Row> = client.get(&format!("/v1/workloads/{name}/ended")).await?;
    }
    wish.names.iter().for_each(|name| println!("{name}"));
    Ok(0)
}

/// Starts stopped workloads again, with as many replicas as they had.
pub async fn start(context: &Context, wish: &ManyWish) -> anyhow::Result<u8> {
    let client = context.client();
    for name in &wish.names {
        let encoded = encode(name);
        let rows: Vec<Row> = client.get(&format!("/v1/workloads/{encoded}")).await?;
        if rows.first().is_some_and(|row| row.wanted > 0) {
            return Err(problem(
                format!("{name} is not stopped"),
                format!("`moyai scale {name} N` changes how many of it run"),
            ));
        }
        let replicas = rows.iter().map(|row| row.replica).max().unwrap_or(1);
        let _asked: Submitted = client.post(&format!("/v1/workloads/{encoded}/scale?replicas={replicas}"), &()).await?;
        println!("{name}");
    }
    Ok(0)
}

/// Changes how many replicas are wanted.
pub async fn scale(context: &Context, wish: &ScaleWish) -> anyhow::Result<u8> {
    let name = encode(&wish.name);
    let client = context.client();
    let _asked: Submitted = client.post(&format!("/v1/workloads/{name}/scale?replicas={}", wish.replicas), &()).await?;
    println!("{}  {} replicas wanted", wish.name, wish.replicas);
    Ok(0)
}

/// Stops workloads and forgets them.
pub async fn rm(context: &Context, wish: &ManyWish) -> anyhow::Result<u8> {
    let client = context.client();
    for name in &wish.names {
        let _removed: Submitted = client.delete(&format!("/v1/workloads/{}", encode(name))).await?;
        println!("{name}");
    }
    Ok(0)
}

/// Waits until a workload has ended.
pub async fn wait(context: &Context, wish: &OneWish) -> anyhow::Result<u8> {
    let rows: Vec<Row> = context.client().get(&format!("/v1/workloads/{}/ended", encode(&wish.name))).await?;
    let code = rows.iter().filter_map(|row| row.exit_code).max().unwrap_or(0);
    println!("{code}");
    Ok(code as u8)
}
