//! init, invite, join, up, down, nodes, status, events; and the daemon itself.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use moyai_protocol::trust::{Chain, Ticket, mesh_name, mesh_of, node_of};
use moyai_protocol::workload::is_name;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::prelude::*;

use super::args::{DownWish, DrainWish, EventsWish, InitWish, InviteWish, JoinWish, NodeWish, RevokeWish, UpWish};
use super::images::encode;
use super::output::{
    age, clock, cpus, humanise_times, json_lines, parse_cpus, parse_duration, parse_size, size, table,
};
use super::{Context, on_tokio};
use crate::api::types::{Invitation, InviteRequest, NodeRow, Ordered, RevokeRequest, Status};
use crate::daemon::driver::Told;
use crate::daemon::home::{Home, Settings, read_key};
use crate::daemon::{FOUNDER_LIFE, listen_problem, problem};
use crate::net::admission::unix_now;
use crate::net::join;

/// Moyai's own port: nothing else is registered there.
const DEFAULT_LISTEN: &str = "0.0.0.0:4755";
/// What makes a folder a member's.
const MEMBERSHIP: [&str; 3] = ["mesh.json", "certificates", "peers.json"];
/// And a founder's.
const FOUNDING: [&str; 4] = ["mesh.json", "certificates", "peers.json", "root.key"];
/// A log larger than this is put aside at the next start.
const MAX_LOG: u64 = 16 << 20;
/// How long a daemon may take to come up before the command line stops waiting.
const START: Duration = Duration::from_secs(30);

/// Runs the daemon in this process.
pub fn daemon(context: &Context, ready: bool) -> anyhow::Result<u8> {
    let wished = levels(&std::env::var_os("RUST_LOG").unwrap_or_default().to_string_lossy());
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false);
    let usual = || {
        let levels = [("libp2p_mdns", LevelFilter::ERROR), ("libp2p_kad", LevelFilter::ERROR)];
        Targets::new().with_default(LevelFilter::INFO).with_targets(levels)
    };
    let (filter, wrong) = match wished {
        Ok(wished) => (wished.unwrap_or_else(usual), None),
        Err(wrong) => (usual(), Some(wrong)),
    };
    tracing_subscriber::registry().with(lines).with(filter).init();
    if let Some(wrong) = wrong {
        tracing::warn!("RUST_LOG: {wrong}; the usual is logged");
    }
    let pipe = if ready {
        Some(moyai_runtime::launch::inherited().context("started with --ready, but not by moyai")?)
    } else {
        None
    };
    crate::daemon::run(&context.options, pipe)?;
    Ok(0)
}

/// What is to be logged: a level for all, and `TARGET=LEVEL`, with commas between; `None` where nothing is said, an error for what
/// is neither.
fn levels(text: &str) -> Result<Option<Targets>, String> {
    let parts: Vec<&str> = text.split(',').map(str::trim).filter(|part| !part.is_empty()).collect();
    if parts.is_empty() {
        return Ok(None);
    }
    if let Some(span) = parts.iter().find(|part| part.contains(['[', '{'])) {
        return Err(format!("`{span}` names a span, and only targets and levels are known"));
    }
    // A target alone would be all of it and nothing else, and may well be a level that is misspelt.
    if let Some(word) = parts.iter().find(|part| !part.contains('=') && part.parse::<LevelFilter>().is_err()) {
        return Err(format!(
            "`{word}` is no level (error, warn, info, debug, trace, off); a target has one: `{word}=info`"
        ));
    }
    parts.join(",").parse().map(Some).map_err(|error| format!("`{text}`: {error}"))
}

/// Starts a mesh.
pub fn init(context: &Context, wish: &InitWish) -> anyhow::Result<u8> {
    let home = new_home(context)?;
    let settings = |mesh| settings(context, &wish.node, mesh);
    // Checked before anything is made.
    let draft = settings(moyai_protocol::id::MeshId([0; 32]))?;
    home.create()?;
    // A root key that was put here beforehand is a mesh begun again, and never deleted.
    let made: &[&str] = if home.path("root.key").exists() { &MEMBERSHIP } else { &FOUNDING };
    let root = home.new_root_key()?;
    let mesh = mesh_of(&node_of(&root));
    let key = home.key()?;
    home.set_chain(&Chain::root(&root, node_of(&key), unix_now(), FOUNDER_LIFE))?;
    home.set_settings(&Settings { mesh, ..draft })?;
    let say = || {
        let settings = home.settings()?;
        if context.json {
            println!(
                "{}",
                serde_json::json!({"mesh": mesh_name(&mesh), "mesh_id": mesh.to_string(), "node": settings.name})
            );
            return Ok(());
        }
        println!("Mesh  {}  (moyai:{})  started; this node is {}.", mesh_name(&mesh), mesh.short(), settings.name);
        println!(
            "The root key is in {}. Keep a copy somewhere safe: with it you can always get back in.",
            home.path("root.key").display()
        );
        println!("Next: run `moyai invite` here, and the line it prints on another machine.");
        anyhow::Ok(())
    };
    begin(context, &home, wish.node.foreground, made, say)
}

/// Joins a mesh.
pub fn join(context: &Context, wish: &JoinWish) -> anyhow::Result<u8> {
    let ticket: Ticket = wish.ticket.parse().map_err(|error: moyai_protocol::trust::TicketError| {
        problem(error.to_string(), "copy the whole line that `moyai invite` printed, from `moyai1` to its end")
    })?;
    let home = new_home(context)?;
    let settings = settings(context, &wish.node, ticket.mesh)?;
    home.create()?;
    let key = home.key()?;
    let joined = on_tokio(async {
        join::join(&ticket, &key).await.map_err(|error| problem(humanise_times(&error.to_string()), error.hint()))
    })?;
    home.set_chain(&joined.chain)?;
    home.set_peers(&joined.members)?;
    home.set_settings(&settings)?;
    let until = joined.membership.not_after;
    let say = || {
        let status = on_tokio(async { Ok(first_sight(context).await) })?;
        if context.json {
            println!(
                "{}",
                serde_json::json!({"mesh": mesh_name(&ticket.mesh), "mesh_id": ticket.mesh.to_string(),
                    "node": settings.name, "role": joined.membership.role.to_string(), "certified_until": until})
            );
            return Ok(());
        }
        let role = joined.membership.role;
        print!("Joined {} as {}, a {role} certified until {}.", mesh_name(&ticket.mesh), settings.name, clock(until));
        match status {
            Some(status) => {
                println!(" {} nodes, {} cpus, {}.", status.nodes, cpus(status.cpu_milli), size(status.memory))
            }
            None => println!(" No other node has answered yet; `moyai nodes` will show them."),
        }
        anyhow::Ok(())
    };
    begin(context, &home, wish.node.foreground, &MEMBERSHIP, say)
}

/// Waits a little until the new node has met another.
async fn first_sight(context: &Context) -> Option<Status> {
    let until = Instant::now() + Duration::from_secs(5);
    while Instant::now() < until {
        let status: Option<Status> = context.client().get("/v1/status").await.ok();
        if let Some(status) = status.filter(|status| status.nodes > 1) {
            return Some(status);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    None
}

/// Starts the daemon again.
pub fn up(context: &Context, wish: &UpWish) -> anyhow::Result<u8> {
    let home = Home::new(&context.options.data);
    if !home.is_member() {
        return Err(problem(
            format!("no node lives in {}", context.options.data.display()),
            "`moyai init` starts a mesh, `moyai join` joins one",
        ));
    }
    if let Some(listen) = &context.listen {
        listen.parse::<std::net::SocketAddr>().map_err(|_| listen_problem(listen))?;
        home.set_settings(&Settings { listen: listen.clone(), ..home.settings()? })?;
    }
    if wish.foreground {
        return daemon(context, false);
    }
    start_daemon(context)?;
    if !context.json {
        let name = home.settings()?.name;
        println!("{name} is up.");
    }
    Ok(0)
}

fn new_home(context: &Context) -> anyhow::Result<Home> {
    let home = Home::new(&context.options.data);
    if home.is_member() {
        let mesh = home.settings().map(|settings| mesh_name(&settings.mesh)).unwrap_or_default();
        return Err(problem(
            format!("a node of the mesh {mesh} lives in {} already", context.options.data.display()),
            "`moyai up` starts it; --data DIR makes another node beside it",
        ));
    }
    let missing = moyai_runtime::host::missing_privileges();
    if !missing.is_empty() {
        return Err(problem(
            format!("this process may not run containers; it lacks {}", missing.join(", ")),
            "run it as root, or give it these capabilities",
        ));
    }
    Ok(home)
}

/// Less would take longer for a slab of chunks than whoever asked for it waits.
const MIN_UPLOAD: u64 = 16 << 10;

fn settings(context: &Context, wish: &NodeWish, mesh: moyai_protocol::id::MeshId) -> anyhow::Result<Settings> {
    let listen = context.listen.clone().unwrap_or_else(|| DEFAULT_LISTEN.to_owned());
    listen.parse::<std::net::SocketAddr>().map_err(|_| listen_problem(&listen))?;
    let name = wish.node_name.clone().unwrap_or_else(moyai_runtime::host::name);
    if !is_name(&name) {
        return Err(problem(
            format!("`{name}` is no name for a node"),
            "give it one with --node-name: letters, digits, `.`, `_` and `-`",
        ));
    }
    let memory = match &wish.memory {
        Some(text) => {
            Some(parse_size(text).ok_or_else(|| problem(format!("`{text}` is no size"), "write it like 512m or 2g"))?)
        }
        None => None,
    };
    let image_budget =
        match &wish.image_budget {
            Some(text) => Some(parse_size(text).ok_or_else(|| {
                problem(format!("`{text}` is no size for --image-budget"), "write it like 500m or 50g")
            })?),
            None => None,
        };
    let upload_limit = match &wish.upload_limit {
        Some(text) => Some(parse_size(text).filter(|rate| *rate >= MIN_UPLOAD).ok_or_else(|| {
            let hint = "write bytes a second, like 512k or 2m; 16k is the least";
            problem(format!("`{text}` is no rate for --upload-limit"), hint)
        })?),
        None => None,
    };
    let cpus = match &wish.cpus {
        Some(text) => Some(
            parse_cpus(text)
                .ok_or_else(|| problem(format!("`{text}` is no number of cores"), "write it like 2 or 0.5"))?,
        ),
        None => None,
    };
    let mut offers = Vec::new();
    for folder in &wish.offer {
        let found = std::fs::canonicalize(folder);
        offers.push(found.map_err(|error| {
            problem(format!("--offer {}: {error}", folder.display()), "name a folder of this machine")
        })?);
    }
    Ok(Settings {
        mesh,
        name,
        listen,
        labels: pairs(&wish.label)?,
        mdns: !wish.no_mdns,
        cpus,
        memory,
        offers,
        offer_host_network: wish.offer_host_network,
        registry: wish.registry.clone(),
        upload_limit,
        image_budget,
        rootfs: wish.rootfs,
    })
}

/// `NAME=VALUE` options.
pub(super) fn pairs(list: &[String]) -> anyhow::Result<BTreeMap<String, String>> {
    list.iter()
        .map(|text| match text.split_once('=') {
            Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
            _ => Err(problem(format!("`{text}` is no label"), "write it as NAME=VALUE")),
        })
        .collect()
}

/// The first start of a node. If it fails, what made it a member is taken back, so that the command can be given again.
fn begin(
    context: &Context,
    home: &Home,
    foreground: bool,
    made: &[&str],
    say: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<u8> {
    if foreground {
        say_in_front(context, home)?;
        return daemon(context, false).inspect_err(|_| undo(home, made));
    }
    if let Err(error) = start_daemon(context) {
        undo(home, made);
        return Err(error);
    }
    say()?;
    Ok(0)
}

fn say_in_front(context: &Context, home: &Home) -> anyhow::Result<()> {
    if !context.json {
        let settings = home.settings()?;
        println!("{} of {} listens on {}.", settings.name, mesh_name(&settings.mesh), settings.listen);
        std::io::stdout().flush()?;
    }
    Ok(())
}

fn undo(home: &Home, made: &[&str]) {
    // A daemon that failed is gone in a moment; one that is late, and not failed, goes on holding its folder.
    let until = Instant::now() + Duration::from_secs(3);
    while home.lock().is_err() {
        if Instant::now() > until {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    for name in made {
        let _absent = std::fs::remove_file(home.path(name));
    }
}

/// Starts a daemon in the background and waits until it answers, or says why it does not.
pub fn start_daemon(context: &Context) -> anyhow::Result<()> {
    let (mut told, tell) = std::io::pipe().context("cannot make a pipe")?;
    let log_path = Home::new(&context.options.data).path("daemon.log");
    if std::fs::metadata(&log_path).is_ok_and(|meta| meta.len() > MAX_LOG) {
        let _kept = std::fs::rename(&log_path, log_path.with_extension("log.1"));
    }
    let log = File::options().create(true).append(true).open(&log_path);
    let log = log.with_context(|| format!("cannot open {}", log_path.display()))?;
    let mut command = Command::new(std::env::current_exe().context("cannot find this program")?);
    command
        .arg("--data")
        .arg(&context.options.data)
        .arg("--socket")
        .arg(&context.options.socket)
        .args(["daemon", "--ready"])
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    let tell = std::os::fd::OwnedFd::from(tell);
    let _runs_on = moyai_runtime::launch::spawn_detached(command, &tell).context("cannot start the daemon")?;
    drop(tell);
    let (sender, answer) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut text = String::new();
        let read = told.read_to_string(&mut text);
        let _late = sender.send(read.map(|_| text));
    });
    let text = match answer.recv_timeout(START) {
        Ok(text) => text?,
        Err(_) => {
            return Err(problem(
                format!("the daemon has not come up in {} s", START.as_secs()),
                format!("its log is {}", log_path.display()),
            ));
        }
    };
    match text.trim_end().split_once('\n') {
        _ if text.trim_end() == "ready" => Ok(()),
        Some((message, hint)) => Err(problem(message, hint)),
        None if text.trim().is_empty() => {
            Err(problem("the daemon ended before it was ready", format!("its log is {}", log_path.display())))
        }
        None => Err(problem(text.trim_end(), format!("its log is {}", log_path.display()))),
    }
}

/// Stops the daemon.
pub async fn down(context: &Context, wish: &DownWish) -> anyhow::Result<u8> {
    let client = context.client();
    let status: Status = client.get("/v1/status").await?;
    if wish.leave {
        client.post::<()>("/v1/leave", &()).await?;
        // The word goes out by datagrams nobody waits for.
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    client.delete::<()>("/v1/daemon").await?;
    let until = Instant::now() + Duration::from_secs(10);
    // It answers no more a moment before it has ended, and only then may another start.
    let home = Home::new(&context.options.data);
    let ended = || !home.is_member() || home.lock().is_ok();
    while (client.get::<Status>("/v1/status").await.is_ok() || !ended()) && Instant::now() < until {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    if !context.json {
        print!("{} is down.", status.node);
        if status.running_here > 0 {
            print!(
                " Its {} containers go on here; the mesh will run them elsewhere too, in a few seconds.",
                status.running_here
            );
        }
        println!(" `moyai up` starts it again.");
    }
    Ok(0)
}

/// Prints an invitation.
pub async fn invite(context: &Context, wish: &InviteWish) -> anyhow::Result<u8> {
    let ttl = parse_duration(&wish.ttl)
        .ok_or_else(|| problem(format!("`{}` is no time", wish.ttl), "write it like 30m, 2h or 7d"))?;
    let request = InviteRequest { role: wish.role.clone(), uses: wish.uses, ttl };
    let invitation: Invitation = context.client().post("/v1/invite", &request).await?;
    if context.json {
        println!("{}", serde_json::to_string(&invitation)?);
    } else {
        println!("moyai join {}", invitation.ticket);
        let uses = if invitation.uses == 1 { "1 use".to_owned() } else { format!("{} uses", invitation.uses) };
        eprintln!("# {uses}, until {}; joiners become {}", clock(invitation.expires), invitation.role);
    }
    Ok(0)
}

/// Lists the nodes.
pub async fn nodes(context: &Context) -> anyhow::Result<u8> {
    let nodes: Vec<NodeRow> = context.client().get("/v1/nodes").await?;
    if context.json {
        json_lines(&nodes)?;
        return Ok(0);
    }
    let rows: Vec<Vec<String>> = nodes
        .iter()
        .map(|node| {
            vec![
                format!("{}{}", node.name, if node.here { " *" } else { "" }),
                node.id.clone(),
                if node.draining { format!("{}, draining", node.state) } else { node.state.clone() },
                node.role.clone(),
                format!("{} of {}", cpus(node.cpu_milli.1), cpus(node.cpu_milli.0)),
                format!("{} of {}", size(node.memory.1), size(node.memory.0)),
                node.placements.to_string(),
                node.images.to_string(),
            ]
        })
        .collect();
    print!("{}", table(&["NODE", "ID", "STATE", "ROLE", "CPUS", "MEMORY", "RUNS", "IMAGES"], &rows));
    Ok(0)
}

/// Shows this node and its mesh.
pub async fn status(context: &Context) -> anyhow::Result<u8> {
    let status: Status = context.client().get("/v1/status").await?;
    if context.json {
        println!("{}", serde_json::to_string(&status)?);
        return Ok(0);
    }
    println!("mesh      {} ({})", status.mesh, status.mesh_id);
    println!(
        "node      {} ({}), {}, certified until {}",
        status.node,
        &status.node_id[..12],
        status.role,
        clock(status.certified_until)
    );
    println!("mesh has  {} nodes alive, {} cpus, {}", status.nodes, cpus(status.cpu_milli), size(status.memory));
    println!("here      {} containers running, daemon {}", status.running_here, status.pid);
    Ok(0)
}

/// Empties a node, or takes that back.
pub async fn drain(context: &Context, wish: &DrainWish) -> anyhow::Result<u8> {
    let client = context.client();
    let path = format!("/v1/nodes/{}/drain", encode(&wish.node));
    let mut ordered: Ordered = client.post(&format!("{path}?undo={}", wish.undo), &()).await?;
    if wish.undo {
        if context.json {
            println!("{}", serde_json::to_string(&ordered)?);
        } else {
            println!("{} takes work again.", ordered.node);
        }
        return Ok(0);
    }
    let mut told = (u32::MAX, Vec::new());
    while !wish.detach && ordered.placements > 0 {
        let news = (ordered.placements, ordered.stuck.clone());
        if told != news {
            eprintln!("{}: {} still there", ordered.node, ordered.placements);
            ordered.stuck.iter().for_each(|(name, reason)| eprintln!("  {name}: {reason}"));
            told = news;
        }
        tokio::select! {
            () = tokio::time::sleep(Duration::from_millis(250)) => {}
            _ = tokio::signal::ctrl_c() => {
                eprintln!("{} goes on being emptied; `moyai drain --undo {}` takes it back", ordered.node, wish.node);
                return Ok(130);
            }
        }
        ordered = client.get(&path).await?;
        if !ordered.draining {
            return Err(problem(
                format!("{} is not being emptied any more: somebody has taken it back", ordered.node),
                "`moyai events` may say when",
            ));
        }
    }
    if context.json {
        println!("{}", serde_json::to_string(&ordered)?);
    } else if ordered.state == "down" {
        println!("{} is down; what it ran comes up elsewhere.", ordered.node);
    } else if ordered.placements == 0 {
        println!("{} is empty; `moyai down --leave` there lets it go.", ordered.node);
    } else {
        println!("{} is being emptied: {} still there.", ordered.node, ordered.placements);
    }
    Ok(0)
}

/// Makes a node a member no more.
pub async fn revoke(context: &Context, wish: &RevokeWish) -> anyhow::Result<u8> {
    let root_key = match &wish.root_key {
        Some(path) => {
            let key = read_key(path).map_err(|error| problem(format!("{error:#}"), "`moyai init` said where it is"))?;
            Some(key.to_bytes())
        }
        None => None,
    };
    let request = RevokeRequest { reason: wish.reason.clone(), root_key, force: wish.force };
    let path = format!("/v1/nodes/{}/revoke", encode(&wish.node));
    let ordered: Ordered = context.client().post(&path, &request).await?;
    if context.json {
        println!("{}", serde_json::to_string(&ordered)?);
    } else {
        print!("{} is a member no more.", ordered.node);
        match ordered.placements {
            0 => println!(),
            1 => println!(" What it ran comes up elsewhere."),
            many => println!(" The {many} that it ran come up elsewhere."),
        }
    }
    Ok(0)
}

/// Shows what has happened, and follows what happens.
pub async fn events(context: &Context, wish: &EventsWish) -> anyhow::Result<u8> {
    let mut stream = context.client().stream(&format!("/v1/events?follow={}", wish.follow)).await?;
    while let Some(told) = stream.next::<Told>().await? {
        if context.json {
            println!("{}", serde_json::to_string(&told)?);
        } else {
            let at = std::time::UNIX_EPOCH + Duration::from_millis(told.at);
            let text = moyai_runtime::container::timestamp(at);
            println!("{}  {:<12}  {}", text.get(11..23).unwrap_or(&age(told.at)), told.about, told.text);
        }
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use tracing::Level;

    use super::*;

    #[test]
    fn what_is_logged_is_what_is_asked_for() {
        let would = |text: &str, target: &str, level: Level| {
            levels(text).expect("levels").expect("some").would_enable(target, &level)
        };
        for text in ["info", "info,", " info ", ",info,,", "INFO", "moyai=info", "moyai=info , libp2p_kad=off"] {
            assert!(would(text, "moyai::net", Level::INFO), "{text}");
            assert!(!would(text, "moyai::net", Level::DEBUG), "{text}");
        }
        assert!(would("warn,moyai::net=debug", "moyai::net::dials", Level::DEBUG));
        assert!(!would("warn,moyai::net=debug", "moyai::daemon", Level::INFO));
        for nothing in ["", " ", ",", " , "] {
            assert_eq!(levels(nothing), Ok(None));
        }
        for (wrong, named) in [
            ("moyai[span]=info", "`moyai[span]=info` names a span"),
            ("[{peer=5}]", "names a span"),
            ("moyai=loud", "`moyai=loud`: "),
            ("warn, verbose", "`verbose` is no level"),
            ("moyai", "`moyai=info`"),
            ("info,a=b=c", "`info,a=b=c`: "),
        ] {
            let error = levels(wrong).expect_err(wrong);
            assert!(error.starts_with(named) || error.contains(named), "{error}");
        }
    }
}
