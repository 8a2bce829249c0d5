//! run, ps, logs, why, stop, start, scale, rm, wait.

use std::collections::BTreeMap;
use std::io::Write;
use std::time::Duration;

use anyhow::Context as _;

use super::Context;
use super::args::{LogsWish, ManyWish, OneWish, PsWish, ReseatWish, RunWish, ScaleWish, UpdateWish};
use super::exec::{DetachKeys, End, Side};
use super::images::encode;
use super::mesh::pairs;
use super::output::{age, json_lines, parse_cpus, parse_duration, parse_size, table};
use crate::api::client::Client;
use moyai_protocol::confinement::{Confinement, Device, Mount, MountKind, Network, Port, Sandbox};
use moyai_protocol::limits::{Io, IoKind, IoLimit, Limits, UNLIMITED, Ulimit};
use moyai_protocol::lookup::{Host, Lookup};
use moyai_protocol::workload::Health;

use crate::api::types::{EpochRow, LogRow, RolloutRow, Row, RunRequest, Submitted, UpdateRequest, WhyRow};
use crate::daemon::problem;

/// A command that waits says what for after this.
const QUIET: Duration = Duration::from_secs(1);
/// What has ended is known everywhere after this.
const KNOWN: Duration = Duration::from_secs(5);

/// Runs a workload.
pub async fn run(context: &Context, wish: RunWish) -> anyhow::Result<u8> {
    let client = context.client();
    let (detach, remove, replicas) = (wish.detach, wish.rm, wish.replicas);
    let interactive = wish.tty || wish.interactive;
    super::exec::must_be_terminal(wish.tty && !detach)?;
    if interactive && !detach && replicas > 1 {
        return Err(problem("-i and -t are for one replica", "leave out --replicas, or run it with -d"));
    }
    let keys = Some(DetachKeys::parse(&wish.detach_keys)?);
    let side = Side { input: wish.interactive, terminal: wish.tty, keys };
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
    if interactive {
        match super::exec::attached(&client, &submitted.id, side, true).await {
            Ok(End::Exit(_)) => return ended(&client, &submitted, remove).await,
            Ok(End::Detached) => {
                eprintln!("\n{name} goes on; `moyai attach {name}` comes back to it");
                return Ok(0);
            }
            Err(error) => return Err(error),
            Ok(End::NotStarted(_, reason)) => {
                // It may have ended already, and that be on its way here: then its log has all that it wrote.
                let path = format!("/v1/workloads/{}/ended", submitted.id);
                let ended = client.get::<Vec<Row>>(&path);
                if tokio::time::timeout(KNOWN, ended).await.is_err() {
                    return Err(problem(reason, format!("it runs: `moyai attach {name}`, `moyai logs {name}`")));
                }
            }
        }
    }
    attached(&client, &submitted, replicas, remove).await
}

/// Waits until all of it is known to have ended, and exits as it did.
async fn ended(client: &Client, submitted: &Submitted, remove: bool) -> anyhow::Result<u8> {
    let rows = client.get::<Vec<Row>>(&format!("/v1/workloads/{}/ended", submitted.id)).await?;
    verdict(client, submitted, &rows, remove).await
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
                    "blocked" => format!("{name}: on {}, {}", row.node, row.detail),
                    "failed" => format!("{name}: failed on {}: {}", row.node, row.detail),
                    _ if !row.detail.is_empty() => format!("{name}: {}", row.detail),
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
    let wish = LogsWish { name: id.clone(), follow: true, tail: None, timestamps: false, audit: false };
    let logs = copy_logs(client, &wish, replicas > 1);
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
    verdict(client, submitted, &rows, remove).await
}

async fn verdict(client: &Client, submitted: &Submitted, rows: &[Row], remove: bool) -> anyhow::Result<u8> {
    if remove {
        let _removed: Submitted = client.delete(&format!("/v1/workloads/{}", submitted.id)).await?;
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

/// What `-e` means: `NAME=value`, or a name that this shell has a value for. As docker does, one that it has none for is not
/// passed.
fn variable(entry: String) -> Option<String> {
    match entry.contains('=') {
        true => Some(entry),
        false => std::env::var(&entry).ok().map(|value| format!("{entry}={value}")),
    }
}

fn cores(text: &str) -> anyhow::Result<u64> {
    parse_cpus(text).ok_or_else(|| problem(format!("`{text}` is no number of cores"), "write it like 2 or 0.5"))
}

fn bytes(text: &str) -> anyhow::Result<u64> {
    parse_size(text).ok_or_else(|| problem(format!("`{text}` is no size"), "write it like 64m or 2g"))
}

fn request(wish: RunWish) -> anyhow::Result<RunRequest> {
    let cpu_milli = wish.cpus.as_deref().map(cores).transpose()?.unwrap_or(0);
    let memory = wish.memory.as_deref().map(bytes).transpose()?.unwrap_or(0);
    let mut env = Vec::new();
    for file in &wish.env_file {
        let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        env.extend(
            text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')).map(str::to_owned),
        );
    }
    env.extend(wish.env);
    let env = env.into_iter().filter_map(variable);
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
        gang: wish.gang,
        singleton: wish.singleton,
        lazy: wish.lazy,
        priority: wish.priority,
        layout: match (wish.spread, wish.pack) {
            (true, _) => "spread".to_owned(),
            (_, true) => "pack".to_owned(),
            _ => String::new(),
        },
        near: wish.near,
        apart: wish.apart,
        terminal: wish.tty,
        input: wish.interactive,
        health: health(&wish.health)?,
        confinement: confinement(wish.confinement)?,
    })
}

fn health(wish: &super::args::HealthWish) -> anyhow::Result<Option<Health>> {
    let millis = |option: &str, text: &str| match parse_duration(text) {
        Some(seconds) => Ok(seconds.saturating_mul(1000)),
        None => match text.strip_suffix("ms").and_then(|number| number.parse().ok()) {
            Some(millis) => Ok(millis),
            None => Err(problem(format!("{option} {text}: no time"), "write it like 500ms, 10s or 2m")),
        },
    };
    let command = match (&wish.health_cmd, wish.no_healthcheck) {
        (Some(line), _) => ["/bin/sh", "-c", line].map(str::to_owned).to_vec(),
        (None, true) => Vec::new(),
        (None, false) => return Ok(None),
    };
    Ok(Some(Health {
        command,
        interval: millis("--health-interval", &wish.health_interval)?,
        timeout: millis("--health-timeout", &wish.health_timeout)?,
        retries: wish.health_retries,
        start_period: millis("--health-start-period", &wish.health_start_period)?,
    }))
}

fn confinement(wish: super::args::ConfinementWish) -> anyhow::Result<Confinement> {
    let mut mounts = Vec::new();
    for text in &wish.volume {
        mounts.push(volume(text)?);
    }
    for text in &wish.tmpfs {
        let (target, options) = text.split_once(':').unwrap_or((text, ""));
        let mut mount = Mount {
            kind: MountKind::Tmpfs,
            source: String::new(),
            target: target.to_owned(),
            read_only: false,
            size: 0,
        };
        for option in options.split(',').filter(|option| !option.is_empty()) {
            match option.split_once('=') {
                Some(("size", size)) => mount.size = bytes(size)?,
                _ if option == "ro" => mount.read_only = true,
                _ => return Err(problem(format!("--tmpfs {text}: `{option}` is not known"), "ro and size=64m are")),
            }
        }
        mounts.push(mount);
    }
    let capability = |name: &String| {
        let name = name.to_ascii_uppercase();
        name.strip_prefix("CAP_").map_or(name.clone(), str::to_owned)
    };
    let mut ports = Vec::new();
    for text in &wish.publish {
        ports.extend(published(text)?);
    }
    let mut devices = Vec::new();
    for text in &wish.device {
        devices.push(device(text)?);
    }
    if let Some(text) = &wish.gpus {
        devices.extend(gpus(text)?);
    }
    let (io, limits, lookup) = (disks(&wish)?, limits(&wish)?, lookup(&wish)?);
    Ok(Confinement {
        io,
        limits,
        lookup,
        init: wish.init,
        network: wish.network.as_deref().map(network).transpose()?,
        ports,
        devices,
        runtime: wish.runtime,
        mounts,
        read_only: wish.read_only,
        cap_add: wish.cap_add.iter().map(capability).collect(),
        cap_drop: wish.cap_drop.iter().map(capability).collect(),
        sandbox: match wish.sandbox.as_str() {
            "standard" => Sandbox::Standard,
            "strict" => Sandbox::Strict,
            other => return Err(problem(format!("--sandbox {other}: no such sandbox"), "standard or strict")),
        },
    })
}

/// What it has of other parts of its machine.
fn limits(wish: &super::args::ConfinementWish) -> anyhow::Result<Limits> {
    let swap = |text: &str| if text == "-1" { Ok(-1) } else { bytes(text).map(|size| size as i64) };
    let mut storage = None;
    for text in &wish.storage_opt {
        let size = text.strip_prefix("size=").ok_or_else(|| {
            problem(format!("--storage-opt {text}: it is not known"), "write it like --storage-opt size=1g")
        })?;
        storage = Some(bytes(size)?);
    }
    let mut sysctls = BTreeMap::new();
    for text in &wish.sysctl {
        let (name, value) = text.split_once('=').ok_or_else(|| {
            problem(format!("--sysctl {text}: no setting"), "write it like --sysctl net.core.somaxconn=1024")
        })?;
        sysctls.insert(name.replace('/', "."), value.to_owned());
    }
    Ok(Limits {
        cpu_shares: wish.cpu_shares,
        cpus: wish.cpuset_cpus.clone(),
        mems: wish.cpuset_mems.clone(),
        memory_swap: wish.memory_swap.as_deref().map(swap).transpose()?,
        storage,
        shm_size: wish.shm_size.as_deref().map(bytes).transpose()?,
        ulimits: wish.ulimit.iter().map(|text| ulimit(text)).collect::<anyhow::Result<_>>()?,
        sysctls,
    })
}

/// How it finds others by name.
fn lookup(wish: &super::args::ConfinementWish) -> anyhow::Result<Lookup> {
    Ok(Lookup {
        hosts: wish.add_host.iter().map(|text| added_host(text)).collect::<anyhow::Result<_>>()?,
        servers: wish.dns.clone(),
        search: wish.dns_search.clone(),
        options: wish.dns_option.clone(),
    })
}

/// `db:10.0.0.7`, `db=10.0.0.7`, `db:::1`, `db:[::1]`, `node:host-gateway`.
fn added_host(text: &str) -> anyhow::Result<Host> {
    let parsed = text.split_once([':', '=']).and_then(|(name, address)| {
        let address = match address {
            "host-gateway" => None,
            address => {
                let bare = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
                Some(bare.unwrap_or(address).parse().ok()?)
            }
        };
        Some(Host { name: name.to_owned(), address })
    });
    parsed.ok_or_else(|| {
        problem(format!("--add-host {text}: no name and address"), "write it like --add-host db:10.0.0.7")
    })
}

/// `nofile=1024`, `nofile=1024:4096`, `memlock=-1`.
fn ulimit(text: &str) -> anyhow::Result<Ulimit> {
    let number = |text: &str| match text {
        "-1" | "unlimited" => Some(UNLIMITED),
        number => number.parse().ok(),
    };
    let parsed = text.split_once('=').and_then(|(name, limits)| {
        let (soft, hard) = limits.split_once(':').unwrap_or((limits, limits));
        Some(Ulimit { name: name.to_ascii_lowercase(), soft: number(soft)?, hard: number(hard)? })
    });
    parsed.ok_or_else(|| problem(format!("--ulimit {text}: no limit"), "write it like --ulimit nofile=1024:4096"))
}

/// What it has of the disks.
fn disks(wish: &super::args::ConfinementWish) -> anyhow::Result<Io> {
    let flags = [
        ("--device-read-bps", IoKind::ReadBytes, &wish.device_read_bps),
        ("--device-write-bps", IoKind::WriteBytes, &wish.device_write_bps),
        ("--device-read-iops", IoKind::Reads, &wish.device_read_iops),
        ("--device-write-iops", IoKind::Writes, &wish.device_write_iops),
    ];
    let mut limits = Vec::new();
    for (flag, kind, texts) in flags {
        for text in texts {
            let is_bytes = matches!(kind, IoKind::ReadBytes | IoKind::WriteBytes);
            let rate = |rate: &str| if is_bytes { parse_size(rate) } else { rate.parse().ok() };
            let parsed = text.rsplit_once(':').and_then(|(path, count)| Some((path, rate(count)?)));
            let (path, rate) = parsed.ok_or_else(|| {
                problem(
                    format!("{flag} {text}: no disk and rate"),
                    format!("write it like {flag} /dev/sda:{}", if is_bytes { "10m" } else { "100" }),
                )
            })?;
            limits.push(IoLimit { path: path.to_owned(), kind, rate });
        }
    }
    Ok(Io { weight: wish.blkio_weight, limits })
}

fn network(text: &str) -> anyhow::Result<Network> {
    match text {
        "bridge" => Ok(Network::Bridge),
        "host" => Ok(Network::Host),
        "none" => Ok(Network::None),
        _ => Err(problem(format!("--network {text}: no such network"), "bridge, host or none")),
    }
}

/// `/dev/kvm`, `/dev/sda:/dev/disk:r`, `vendor/class=name`, `vendor/class=all`.
fn device(text: &str) -> anyhow::Result<Device> {
    if !text.starts_with('/') {
        let named = text.split_once('=').filter(|(kind, name)| kind.contains('/') && !name.is_empty());
        let (kind, name) = named.ok_or_else(|| {
            problem(format!("--device {text}: no device"), "write it like /dev/kvm, or vendor/class=name")
        })?;
        return Ok(match name {
            "all" => Device::Count { kind: kind.to_owned(), count: 0 },
            name => Device::Named { kind: kind.to_owned(), name: name.to_owned() },
        });
    }
    let parts: Vec<&str> = text.split(':').collect();
    let (source, target, access) = match parts[..] {
        [source] => (source, source, "rwm"),
        [source, rest] if rest.starts_with('/') => (source, rest, "rwm"),
        [source, access] => (source, source, access),
        [source, target, access] => (source, target, access),
        _ => return Err(problem(format!("--device {text}: too many parts"), "write it like /dev/kvm:/dev/kvm:rw")),
    };
    Ok(Device::Node { source: source.to_owned(), target: target.to_owned(), access: access.to_owned() })
}

/// `2`, `all`, `device=0,1`, as docker has it.
fn gpus(text: &str) -> anyhow::Result<Vec<Device>> {
    if let Some(names) = text.strip_prefix("device=") {
        let named = |name: &str| Device::Named { kind: "nvidia.com/gpu".to_owned(), name: name.to_owned() };
        return Ok(names.split(',').map(named).collect());
    }
    let count = match text {
        "all" => Some(0),
        text => text.parse::<u32>().ok().filter(|count| *count > 0),
    };
    let count =
        count.ok_or_else(|| problem(format!("--gpus {text}: no number of them"), "a number, all, or device=0,1"))?;
    Ok(vec![Device::Count { kind: "gpu".to_owned(), count }])
}

/// `8080:80`, `127.0.0.1:8080:80`, `5353:53/udp`, `8000-8009:8000-8009`.
fn published(text: &str) -> anyhow::Result<Vec<Port>> {
    let wrong = |reason: &str| {
        let hint = "write it like 8080:80, 127.0.0.1:8080:80, 5353:53/udp or 8000-8009:8000-8009";
        problem(format!("--publish {text}: {reason}"), hint)
    };
    let (rest, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let udp = match protocol {
        "tcp" => false,
        "udp" => true,
        other => return Err(wrong(&format!("`{other}` is neither tcp nor udp"))),
    };
    let parts: Vec<&str> = rest.split(':').collect();
    let (ip, host, container) = match parts[..] {
        [host, container] => (None, host, container),
        [ip, host, container] => (Some(ip), host, container),
        _ => return Err(wrong("a port of the node and one of the container are wanted")),
    };
    let ip =
        ip.filter(|ip| *ip != "0.0.0.0").map(|ip| ip.parse().map_err(|_| wrong(&format!("`{ip}` is no IPv4 address"))));
    let ip = ip.transpose()?;
    let range = |text: &str| {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let number = |text: &str| text.parse::<u16>().map_err(|_| wrong(&format!("`{text}` is no port")));
        anyhow::Ok(number(first)?..=number(last)?)
    };
    let (host, container) = (range(host)?, range(container)?);
    if host.is_empty() || host.len() != container.len() {
        return Err(wrong("both ranges have as many ports"));
    }
    let port = |(host, container)| Port { host_ip: ip, host, container, udp };
    Ok(host.zip(container).map(port).collect())
}

/// `NAME:/inside`, `/outside:/inside`, each with `:ro`.
fn volume(text: &str) -> anyhow::Result<Mount> {
    let wrong = || {
        problem(format!("--volume {text}: two names are wanted"), "write it like data:/var/lib/db or /srv/in:/in:ro")
    };
    let mut parts = text.split(':');
    let (source, target) = parts.next().zip(parts.next()).ok_or_else(wrong)?;
    let read_only = match parts.next() {
        None | Some("rw") => false,
        Some("ro") => true,
        Some(other) => return Err(problem(format!("--volume {text}: `{other}` is not known"), "ro and rw are")),
    };
    let kind = if source.starts_with('/') { MountKind::Bind } else { MountKind::Volume };
    Ok(Mount { kind, source: source.to_owned(), target: target.to_owned(), read_only, size: 0 })
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
            first.ports.join(", "),
            state(group),
        ]);
    }
    let mut header = vec!["ID", "NAME", "IMAGE", "READY", "NODES", "AGE", "PORTS", "STATE"];
    if rows.iter().all(|row| row.ports.is_empty()) {
        let at = header.len() - 2;
        header.remove(at);
        shown.iter_mut().for_each(|row| drop(row.remove(at)));
    }
    print!("{}", table(&header, &shown));
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
        let mut stream = client.stream(&log_path(wish)).await?;
        while let Some(row) = stream.next::<LogRow>().await? {
            println!("{}", serde_json::to_string(&row)?);
        }
        return Ok(0);
    }
    let rows: Vec<Row> = client.get(&format!("/v1/workloads/{}", encode(&wish.name))).await?;
    let several = rows.len() > 1 && !rows.iter().any(|row| format!("{}.{}", row.name, row.replica) == wish.name);
    tokio::select! {
        result = copy_logs(&client, wish, several) => result?,
        _ = tokio::signal::ctrl_c() => return Ok(130),
    }
    Ok(0)
}

fn log_path(wish: &LogsWish) -> String {
    let tail = wish.tail.map_or(String::new(), |tail| format!("&tail={tail}"));
    format!("/v1/workloads/{}/logs?follow={}&audit={}{tail}", encode(&wish.name), wish.follow, wish.audit)
}

async fn copy_logs(client: &Client, wish: &LogsWish, several: bool) -> anyhow::Result<()> {
    let mut stream = client.stream(&log_path(wish)).await?;
    while let Some(row) = stream.next::<LogRow>().await? {
        let mut line = String::new();
        if several {
            line.push_str(&format!("{} | ", row.replica));
        }
        if wish.timestamps {
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
    let time = clock_time(row.at);
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
    if row.history.len() > 1 {
        text.push_str("  before\n");
        let line = |epoch: &EpochRow| {
            let quote = epoch.price.map_or("quote not kept".to_owned(), |price| format!("quote {price} ms"));
            format!(
                "    {}  epoch {} on {}: {quote} of {} bids (auctioneer {}), because {}\n",
                clock_time(epoch.at),
                epoch.epoch,
                epoch.node,
                epoch.bids,
                epoch.auctioneer,
                epoch.cause
            )
        };
        text.extend(row.history.iter().filter(|epoch| epoch.epoch != row.epoch || row.state == "pending").map(line));
    }
    if !row.custodians.is_empty() {
        let names: Vec<String> = row
            .custodians
            .iter()
            .map(|(name, alive)| if *alive { name.clone() } else { format!("{name} (down)") })
            .collect();
        text.push_str(&format!("  custodians: {}; it runs while most of them renew its lease\n", names.join(", ")));
    }
    let shown = row.refusals.len() as u32;
    let all: u32 = row.refused.iter().map(|(_, count)| count).sum();
    if all > shown || row.more_quotes > 0 {
        let kinds: Vec<String> = row.refused.iter().map(|(reason, count)| format!("{reason} ({count})")).collect();
        text.push_str(&format!("    {} more bids; refused in all: {}\n", row.more_quotes, kinds.join(", ")));
    }
    text
}

/// The time of day, as events have it.
fn clock_time(at: u64) -> String {
    let at = std::time::UNIX_EPOCH + Duration::from_millis(at);
    moyai_runtime::container::timestamp(at).get(11..23).unwrap_or("—").to_owned()
}

/// Runs something else under a name.
pub async fn update(context: &Context, wish: UpdateWish) -> anyhow::Result<u8> {
    let client = context.client();
    let name = encode(&wish.name);
    let request = UpdateRequest {
        image: wish.image,
        command: (!wish.command.is_empty()).then_some(wish.command),
        env: wish.env.into_iter().filter_map(variable).collect(),
        cpu_milli: wish.cpus.as_deref().map(cores).transpose()?,
        memory: wish.memory.as_deref().map(bytes).transpose()?,
        max_surge: wish.max_surge,
        max_unavailable: wish.max_unavailable,
    };
    let asked: Submitted = client.post(&format!("/v1/workloads/{name}/update"), &request).await?;
    if wish.detach {
        match context.json {
            true => println!("{}", serde_json::to_string(&asked)?),
            false => println!("{}", wish.name),
        }
        return Ok(0);
    }
    rolled(context, &client, &wish.name, true).await
}

/// Goes back to what ran before.
pub async fn rollback(context: &Context, wish: &OneWish) -> anyhow::Result<u8> {
    let client = context.client();
    let _asked: Submitted = client.post(&format!("/v1/workloads/{}/rollback", encode(&wish.name)), &()).await?;
    rolled(context, &client, &wish.name, false).await
}

/// Waits until every replica is as it is to be; says how far it is.
/// It was taken back when a setback is shown, which a rollback that somebody asked for shows too.
async fn rolled(context: &Context, client: &Client, name: &str, update: bool) -> anyhow::Result<u8> {
    let path = format!("/v1/workloads/{}/rollout", encode(name));
    let mut told = String::new();
    loop {
        let row: RolloutRow = tokio::select! {
            row = client.get(&path) => row?,
            _ = tokio::signal::ctrl_c() => {
                eprintln!("{name} goes on being changed; `moyai ps` and `moyai why {name}` show how far it is");
                return Ok(130);
            }
        };
        if row.outdated == 0 && row.coming == 0 && row.updated >= row.wanted {
            if context.json {
                println!("{}", serde_json::to_string(&row)?);
            }
            if update && !row.setback.is_empty() {
                return Err(problem(
                    format!("{name} runs again as before: {}", row.setback),
                    format!("`moyai logs {name}` may say more"),
                ));
            }
            if !context.json {
                println!("{name}  {} of {} replicas run as they are to", row.updated, row.wanted);
            }
            return Ok(0);
        }
        let mut text = format!("{name}: {} new, {} coming up, {} as before", row.updated, row.coming, row.outdated);
        if !row.waits.is_empty() {
            text.push_str(&format!("; {}", row.waits));
        }
        if text != told {
            eprintln!("{text}");
            told = text;
        }
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
}

/// Gives a singleton new custodians.
pub async fn reseat(context: &Context, wish: &ReseatWish) -> anyhow::Result<u8> {
    let client = context.client();
    let why: Vec<WhyRow> = client.get(&format!("/v1/workloads/{}/why", encode(&wish.name))).await?;
    let custodians = why.into_iter().map(|row| row.custodians).next().unwrap_or_default();
    if custodians.is_empty() {
        return Err(problem(
            format!("{} is no singleton: it has no custodians of its own", wish.name),
            "`moyai run --singleton` makes one",
        ));
    }
    let alive = custodians.iter().filter(|(_, alive)| *alive).count();
    if !wish.force {
        let majority = custodians.len() / 2 + 1;
        let seen = format!("{alive} of {} custodians of {} are alive", custodians.len(), wish.name);
        if alive >= majority {
            return Err(problem(
                format!("{seen}: they replace the others by themselves"),
                format!("`moyai why {}` shows them", wish.name),
            ));
        }
        return Err(problem(
            format!(
                "{seen}. If the others are only cut off, they may still let it run where they are: with new custodians \
                 it would then run twice"
            ),
            format!("when they are gone for good: `moyai reseat --force {}`", wish.name),
        ));
    }
    let asked: Submitted = client.post(&format!("/v1/workloads/{}/reseat", encode(&wish.name)), &()).await?;
    match context.json {
        true => println!("{}", serde_json::to_string(&asked)?),
        false => println!("{}", wish.name),
    }
    Ok(0)
}

/// Stops workloads and waits until they have ended.
pub async fn stop(context: &Context, wish: &ManyWish) -> anyhow::Result<u8> {
    let client = context.client();
    for name in &wish.names {
        let name = encode(name);
        let _asked: Submitted = client.post(&format!("/v1/workloads/{name}/scale?replicas=0"), &()).await?;
        match client.get::<Vec<Row>>(&format!("/v1/workloads/{name}/ended")).await {
            // It was to be forgotten when it has ended, and is.
            Err(error) if error.to_string().starts_with("no workload") => {}
            ended => drop(ended?),
        }
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
