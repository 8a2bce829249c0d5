//! `moyai demo`: three virtual hosts on one machine, everything a user would do on three real ones, and one of them
//! dying; then nothing is left.
//!
//! A virtual host is a network namespace on a bridge, a cgroup subtree that is its root, and mount and host name of its
//! own. The daemons on them are ordinary daemons. Without an image, one is made from this very program: it is static,
//! so it runs where there is nothing else.

use std::fs;
use std::io::{Cursor, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use moyai_runtime::host;

use crate::cli::args::VirtualHostWish;
use crate::daemon::problem;

/// The first argument by which this program knows that it runs inside the built-in image.
pub const BUILT_IN: &str = "__built_in";
const HOSTS: usize = 3;
/// The network of the virtual hosts; it exists in their namespaces only.
const NETWORK: &str = "10.77.0";
/// How long the demo waits for what it shows.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the built-in image runs: it says every half second that it is alive, until it is asked to stop.
pub fn built_in() -> ExitCode {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
        return ExitCode::FAILURE;
    };
    runtime.block_on(async {
        let Ok(mut terminate) = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) else {
            return ExitCode::FAILURE;
        };
        let mut beat = tokio::time::interval(Duration::from_millis(500));
        for number in 1u64.. {
            tokio::select! {
                _ = beat.tick() => println!("beat {number} in container {}", host::name()),
                _ = terminate.recv() => break,
            }
        }
        println!("asked to stop, and stopping");
        ExitCode::SUCCESS
    })
}

/// Runs a command as if on another host: the hidden verb by which the demo starts its daemons.
pub fn virtual_host(wish: &VirtualHostWish) -> anyhow::Result<u8> {
    host::enter_network(&wish.network).context("cannot enter the host's network")?;
    host::enter_cgroup(&wish.cgroup).context("cannot enter the host's cgroups")?;
    host::set_name(&wish.name).context("cannot name the host")?;
    let (program, args) = wish.command.split_first().context("no command")?;
    let error = Command::new(program).args(args).exec();
    Err(error).with_context(|| format!("cannot run {program}"))
}

/// The whole show.
pub fn run(image: &Option<PathBuf>) -> anyhow::Result<u8> {
    let missing = host::missing_privileges();
    if !missing.is_empty() {
        return Err(problem(
            format!("the demo makes network namespaces and containers; this process lacks {}", missing.join(", ")),
            "run it as root",
        ));
    }
    let stage = Stage::build()?;
    let result = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?.block_on(async {
        let (image, show) = (image.clone(), stage.clone());
        tokio::select! {
            result = tokio::task::spawn_blocking(move || show.play(image.as_deref())) => result?.map(|()| 0),
            _ = tokio::signal::ctrl_c() => Ok(130),
        }
    });
    let left = stage.strike();
    if result.is_ok() && left.is_empty() {
        println!("\nEverything that the demo made is gone again.");
    }
    for line in left {
        eprintln!("left behind: {line}");
    }
    result
}

#[derive(Clone)]
struct Stage {
    /// Unique on this machine.
    name: String,
    dir: PathBuf,
}

impl Stage {
    fn build() -> anyhow::Result<Stage> {
        let name = format!("moyai-demo-{}", std::process::id());
        let stage = Stage { dir: std::env::temp_dir().join(&name), name };
        stage.try_build().inspect_err(|_| drop(stage.strike()))?;
        Ok(stage)
    }

    fn try_build(&self) -> anyhow::Result<()> {
        fs::create_dir(&self.dir).with_context(|| format!("cannot make {}", self.dir.display()))?;
        let switch = format!("{}-sw", self.name);
        ip(&["netns", "add", &switch])?;
        ip(&["-n", &switch, "link", "add", "br0", "type", "bridge"])?;
        ip(&["-n", &switch, "link", "set", "br0", "up"])?;
        for at in 1..=HOSTS {
            let (host, port) = (self.host(at), format!("port{at}"));
            ip(&["netns", "add", &host])?;
            ip(&["-n", &host, "link", "set", "lo", "up"])?;
            ip(&["link", "add", &port, "netns", &switch, "type", "veth", "peer", "name", "eth0", "netns", &host])?;
            ip(&["-n", &switch, "link", "set", &port, "master", "br0", "up"])?;
            ip(&["-n", &host, "addr", "add", &format!("{NETWORK}.{at}/24"), "dev", "eth0"])?;
            ip(&["-n", &host, "link", "set", "eth0", "up"])?;
            // So that multicast, and "which address is mine", are as on a LAN.
            ip(&["-n", &host, "route", "add", "default", "via", &format!("{NETWORK}.254")])?;
            fs::create_dir(self.data(at))?;
        }
        Ok(())
    }

    fn host(&self, at: usize) -> String {
        format!("{}-{at}", self.name)
    }

    fn data(&self, at: usize) -> PathBuf {
        self.dir.join(format!("lab-{at}"))
    }

    fn play(&self, image: Option<&Path>) -> anyhow::Result<()> {
        println!("Three virtual hosts on this machine: lab-1, lab-2, lab-3.\n");
        self.show(1, &["init"])?;
        let invitation = self.show(1, &["invite"])?;
        let ticket = invitation.split_whitespace().last().context("no ticket in the invitation")?.to_owned();
        self.show(2, &["join", &ticket])?;
        self.show(3, &["join", &ticket])?;
        let (archive, name) = match image {
            Some(path) => (path.to_owned(), None),
            None => (self.built_in_image()?, Some("demo")),
        };
        let archive = archive.display().to_string();
        let loaded = self.show(1, &["load", &archive])?;
        let image = name.map_or_else(|| loaded.split_whitespace().next().unwrap_or_default().to_owned(), str::to_owned);
        self.wait(
            "three nodes alive",
            || Ok(self.ask(3, &["--json", "nodes"])?.matches("\"alive\"").count() == HOSTS),
        )?;
        self.wait("the image known on lab-2", || Ok(!self.ask(2, &["--json", "images"])?.is_empty()))?;

        self.show(2, &["run", "--name", "web", "-d", "--cpus", "0.5", "--memory", "64m", &image])?;
        let ran_on = self.node_of("web")?;
        self.show(3, &["ps"])?;
        if name.is_some() {
            self.wait("three beats in its log", || Ok(self.ask(3, &["logs", "web"])?.lines().count() >= 3))?;
        }
        self.show(3, &["logs", "--tail", "3", "web"])?;
        self.show(3, &["why", "web"])?;
        self.wait("a second node with the image", || {
            let images = self.ask(3, &["--json", "images"])?;
            Ok(images.matches("lab-").count() >= HOSTS)
        })?;

        let died = (1..=HOSTS).find(|at| format!("lab-{at}") == ran_on);
        if let Some(died) = died.filter(|_| name.is_some()) {
            let from = died % HOSTS + 1;
            println!("\nlab-{died}, which runs web, loses its power…");
            let cut = Instant::now();
            self.power_off(died);
            self.wait("web elsewhere", || {
                let row = self.ask(from, &["--json", "ps"])?;
                let state: serde_json::Value = serde_json::from_str(row.lines().next().unwrap_or("{}"))?;
                Ok(state["state"] == "running" && state["node"] != ran_on.as_str())
            })?;
            println!("…and web runs on {} after {:.1} s.", self.node_at(from, "web")?, cut.elapsed().as_secs_f64());
            self.show(from, &["nodes"])?;
            self.show(from, &["why", "web"])?;
            self.show(from, &["stop", "web"])?;
            self.show(from, &["ps", "-a"])?;
        } else {
            self.show(3, &["nodes"])?;
            self.show(3, &["stop", "web"])?;
            self.show(3, &["ps", "-a"])?;
        }
        Ok(())
    }

    fn node_of(&self, name: &str) -> anyhow::Result<String> {
        self.wait("it is known where it runs", || Ok(!self.node_at(3, name)?.is_empty()))?;
        self.node_at(3, name)
    }

    fn node_at(&self, at: usize, name: &str) -> anyhow::Result<String> {
        let rows = self.ask(at, &["--json", "ps", "-a"])?;
        for row in rows.lines() {
            let row: serde_json::Value = serde_json::from_str(row)?;
            if row["name"] == name {
                return Ok(row["node"].as_str().unwrap_or_default().to_owned());
            }
        }
        Ok(String::new())
    }

    /// Runs a command on a host, and shows both it and what it prints.
    fn show(&self, at: usize, args: &[&str]) -> anyhow::Result<String> {
        let shown: Vec<String> = args
            .iter()
            .map(|arg| if arg.len() > 60 { format!("{}…", &arg[..20]) } else { (*arg).to_owned() })
            .collect();
        println!("lab-{at}$ moyai {}", shown.join(" "));
        let text = self.ask(at, args)?;
        for line in text.lines() {
            println!("  {line}");
        }
        println!();
        std::io::stdout().flush()?;
        Ok(text)
    }

    fn ask(&self, at: usize, args: &[&str]) -> anyhow::Result<String> {
        let program = std::env::current_exe().context("cannot find this program")?;
        let mut command = Command::new(&program);
        let network = PathBuf::from("/run/netns").join(self.host(at));
        command.args(["virtual-host", "--name", &format!("lab-{at}"), "--cgroup", &self.host(at), "--network"]);
        command.arg(network).arg("--").arg(&program).arg("--data").arg(self.data(at)).args(args);
        command.env_remove("MOYAI_DATA").env_remove("MOYAI_SOCKET").env_remove("MOYAI_LISTEN");
        let output = command.output().context("cannot run this program again")?;
        if !output.status.success() {
            let log = fs::read_to_string(self.data(at).join("daemon.log")).unwrap_or_default();
            let tail: Vec<&str> = log.lines().rev().take(5).collect();
            bail!(
                "`moyai {}` on lab-{at} failed: {}{}",
                args.join(" "),
                String::from_utf8_lossy(&output.stderr),
                tail.into_iter().rev().map(|line| format!("\n  daemon.log: {line}")).collect::<String>()
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn wait(&self, what: &str, done: impl Fn() -> anyhow::Result<bool>) -> anyhow::Result<()> {
        let until = Instant::now() + PATIENCE;
        while !done()? {
            if Instant::now() > until {
                bail!("waited {} s in vain: {what}", PATIENCE.as_secs());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// A docker-archive with this program in it.
    fn built_in_image(&self) -> anyhow::Result<PathBuf> {
        let program = fs::read(std::env::current_exe()?).context("cannot read this program")?;
        let mut layer = tar::Builder::new(Vec::new());
        append(&mut layer, "bin/moyai", &program, 0o755)?;
        append(&mut layer, "etc/passwd", b"root:x:0:0:root:/:/bin/moyai\n", 0o644)?;
        let layer = layer.into_inner()?;
        let config = serde_json::json!({
            "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
            "os": "linux",
            "config": { "Entrypoint": ["/bin/moyai", BUILT_IN] },
            "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", moyai_runtime::image::sha256_hex(&layer))] },
        });
        let manifest =
            serde_json::json!([{ "Config": "config.json", "RepoTags": ["demo:latest"], "Layers": ["layer.tar"] }]);
        let path = self.dir.join("demo.tar");
        let mut archive = tar::Builder::new(fs::File::create(&path)?);
        append(&mut archive, "layer.tar", &layer, 0o644)?;
        append(&mut archive, "config.json", config.to_string().as_bytes(), 0o644)?;
        append(&mut archive, "manifest.json", manifest.to_string().as_bytes(), 0o644)?;
        archive.finish()?;
        Ok(path)
    }

    /// Takes a host down as a power cut would: nothing on it says goodbye.
    fn power_off(&self, at: usize) {
        // A host whose link is gone already is off as well.
        let _cut = ip(&["-n", &self.host(at), "link", "set", "eth0", "down"]);
        host::kill_cgroup(&self.host(at));
    }

    /// Removes everything; returns what could not be.
    fn strike(&self) -> Vec<String> {
        let mut left = Vec::new();
        for at in 1..=HOSTS {
            host::kill_cgroup(&self.host(at));
            if let Err(error) = host::remove_cgroup(&self.host(at)) {
                left.push(format!("a cgroup {}: {error}", self.host(at)));
            }
        }
        for name in (1..=HOSTS).map(|at| self.host(at)).chain([format!("{}-sw", self.name)]) {
            if Path::new("/run/netns").join(&name).exists() && ip(&["netns", "del", &name]).is_err() {
                left.push(format!("a network namespace {name}"));
            }
        }
        if self.dir.exists()
            && let Err(error) = fs::remove_dir_all(&self.dir)
        {
            left.push(format!("{}: {error}", self.dir.display()));
        }
        left
    }
}

fn append(archive: &mut tar::Builder<impl Write>, path: &str, bytes: &[u8], mode: u32) -> anyhow::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes.len() as u64);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    archive.append_data(&mut header, path, Cursor::new(bytes))?;
    Ok(())
}

fn ip(args: &[&str]) -> anyhow::Result<()> {
    let output = match Command::new("ip").args(args).output() {
        Ok(output) => output,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(problem(
                "the demo needs the program `ip`, which is not on this machine",
                "install the package iproute2",
            ));
        }
        Err(error) => return Err(error).context("cannot run `ip`"),
    };
    if !output.status.success() {
        bail!("`ip {}`: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
