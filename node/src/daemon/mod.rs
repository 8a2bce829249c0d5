//! The daemon: one driver of a protocol node, and what it drives.
//!
//! - [`home`]: the node's folder
//! - [`driver`]: the loop that owns the node
//! - [`effects`]: what the node wants done outside
//! - [`records`]: what it wants remembered
//! - [`logs`]: what its containers wrote
//! - [`health`]: whether they are well
//! - [`devices`]: which devices of the machine they have
//! - [`networks`], [`names`]: how its containers are reached, and by what name
//!
//! Everything else (swarm, data plane, local API) talks to the loop over bounded channels.

mod devices;
pub mod driver;
mod effects;
mod execs;
mod health;
pub mod home;
pub mod images;
mod lazy;
mod logs;
mod names;
mod networks;
mod records;

use std::collections::BTreeMap;
use std::io::Write;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use libp2p::Multiaddr;
use moyai_protocol::confinement::Offers;
use moyai_protocol::contract::Command;
use moyai_protocol::id::ChunkId;
use moyai_protocol::limits::{ULIMITS, numbers};
use moyai_protocol::node::{Config, Restored};
use moyai_protocol::trust::{Chain, node_of};
use moyai_runtime::cdi::{self, Registry};
use moyai_runtime::launch::Launcher;
use moyai_runtime::store::Store;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tracing::{info, warn};

use crate::api::server;
use crate::net::admission::{Gate, unix_now};
use crate::net::chunks::{ChunkTamper, Limit, Shelf};
use crate::net::{control, data};
use crate::registry;
use driver::{Driver, Handle};
use home::{Home, random};

/// On how many nodes an image is kept.
const IMAGE_COPIES: usize = 3;
/// The root's own certificate for the node that holds it, in seconds.
pub const FOUNDER_LIFE: u64 = moyai_protocol::node::ADMIN_LIFE;

/// An error that a user caused or can mend: a sentence, and what to do.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Problem {
    /// What is wrong.
    pub message: String,
    /// What to do.
    pub hint: String,
}

/// An error with a hint.
pub fn problem(message: impl Into<String>, hint: impl Into<String>) -> anyhow::Error {
    Problem { message: message.into(), hint: hint.into() }.into()
}

/// How a daemon is started.
#[derive(Clone, Debug)]
pub struct Options {
    /// The node's folder.
    pub data: PathBuf,
    /// The local API's socket.
    pub socket: PathBuf,
    /// What a daemon of the tests does to the chunks it serves.
    pub tamper: Option<ChunkTamper>,
}

/// Runs a daemon to its end. `ready` is told "ready" or the reason why not. The process has one thread until here.
pub fn run(options: &Options, ready: Option<OwnedFd>) -> anyhow::Result<()> {
    let home = Home::new(&options.data);
    let started = prepare(&home).and_then(|launcher| {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .max_blocking_threads(64)
            .thread_stack_size(1 << 20)
            .enable_all()
            .build()
            .context("cannot start tokio")?;
        Ok((launcher, runtime))
    });
    let mut ready = ready.map(std::fs::File::from);
    let mut tell = |text: &str| {
        if let Some(mut pipe) = ready.take() {
            // Whoever started it may have gone already.
            let _gone = writeln!(pipe, "{text}");
        }
    };
    let ((lock, launcher), runtime) = match started {
        Ok(started) => started,
        Err(error) => {
            tell(&render(&error));
            return Err(error);
        }
    };
    let result = runtime.block_on(async {
        let daemon = match start(options, &home, launcher).await {
            Ok(daemon) => daemon,
            Err(error) => {
                tell(&render(&error));
                return Err(error);
            }
        };
        tell("ready");
        daemon.wait().await
    });
    // Blocking tasks that hang on a disk must not keep a daemon from ending.
    runtime.shutdown_timeout(Duration::from_millis(200));
    drop(lock);
    result
}

/// An error as it crosses the pipe: message, then hint.
fn render(error: &anyhow::Error) -> String {
    let hint = error.downcast_ref::<Problem>().map_or("", |problem| problem.hint.as_str());
    format!("{error:#}\n{hint}").trim_end().to_owned()
}

fn prepare(home: &Home) -> anyhow::Result<(std::fs::File, Launcher)> {
    if !home.is_member() {
        return Err(problem(
            format!("no node lives in {}", home.path("").display()),
            "`moyai init` starts a mesh, `moyai join` joins one",
        ));
    }
    let missing = moyai_runtime::host::missing_privileges();
    if !missing.is_empty() {
        return Err(problem(
            format!("this process may not run containers; it lacks {}", missing.join(", ")),
            "run it as root, or give it these capabilities",
        ));
    }
    let lock = home.lock()?;
    let refused = |reason: &std::io::Error| {
        warn!(%reason, "this program starts containers itself, not moyai-oci beside it");
    };
    let launcher = Launcher::start(refused).context("cannot start the process that starts containers")?;
    Ok((lock, launcher))
}

struct Daemon {
    driver: tokio::task::JoinHandle<anyhow::Result<()>>,
    stop: watch::Receiver<bool>,
    handle: Handle,
    networks: Arc<networks::Networks>,
    socket: PathBuf,
}

impl Daemon {
    async fn wait(mut self) -> anyhow::Result<()> {
        let mut terminate = signal(SignalKind::terminate()).context("cannot wait for signals")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for signals")?;
        let ended = tokio::select! {
            _ = terminate.recv() => None,
            _ = interrupt.recv() => None,
            _ = self.stop.wait_for(|stop| *stop) => None,
            ended = &mut self.driver => Some(ended),
        };
        if ended.is_none() {
            info!("stopping; containers go on");
            self.handle.finish().await;
        }
        self.networks.close();
        // The next daemon makes its own.
        let _gone = std::fs::remove_file(&self.socket);
        ended.map_or(Ok(()), |ended| ended.context("the daemon's loop ended")?)
    }
}

async fn start(options: &Options, home: &Home, launcher: Launcher) -> anyhow::Result<Daemon> {
    let settings = home.settings()?;
    let key = home.key()?;
    let chain = own_chain(home, &key, &settings)?;
    let membership = chain.verify_shown_by(&node_of(&key), &settings.mesh, unix_now());
    let membership = membership
        .map_err(|error| problem(error.to_string(), "ask an admin for an invitation, and join again: `moyai join`"))?;

    let store = Arc::new(Store::open(&home.path("store"), settings.rootfs)?);
    tracing::info!(form = ?store.form(), "the images' file systems");
    let records = records::Records::open(&home.path("state.redb"))?;
    let mut restored = records.restore()?;
    restored.damaged = store.doubted()?.into_iter().map(ChunkId).collect();
    if home.is_revoked() {
        return Err(problem(
            "this node's certificates are revoked: it is a member no more",
            format!(
                "ask an admin for an invitation, move {} away, and join again: the machine then has a new key",
                home.path("").display()
            ),
        ));
    }
    add_peers(&mut restored, home);
    let keep = {
        let home = home.clone();
        Box::new(move |vouchers: &_| home.set_vouchers(vouchers))
    };
    let gate = Arc::new(Gate::new(settings.mesh, key.clone(), chain.clone(), home.vouchers()?, keep));

    let listen: SocketAddr = settings.listen.parse().map_err(|_| listen_problem(&settings.listen))?;
    let (incoming_sender, incoming) = mpsc::channel(1024);
    let addresses = multiaddrs(&listen);
    let book = control::AddressBook::default();
    let control = control::start(
        &key,
        Arc::clone(&gate),
        membership.role,
        &addresses,
        settings.mdns,
        book.clone(),
        incoming_sender,
    );
    let outgoing = control.await.map_err(|error| {
        let hint = "`moyai up --listen ADDR:PORT` chooses another; port 0 takes any";
        problem(error.to_string(), hint)
    })?;

    let containers = home.path("containers");
    let (handle, requests) = driver::channel();
    let logs = Arc::new(logs::Logs::new(containers.clone(), handle.clone()));
    let launcher = Arc::new(launcher);
    let execs = Arc::new(execs::Execs::new(Arc::clone(&launcher), containers.clone(), handle.clone()));
    let data_address = SocketAddr::new(listen.ip(), if listen.port() == 0 { 0 } else { listen.port() + 1 });
    let limit = Arc::new(Limit::new(settings.upload_limit));
    let data_plane = |address| {
        data::DataPlane::start(
            address,
            &key,
            Arc::clone(&gate),
            data::Offer {
                shelf: Shelf {
                    store: Arc::clone(&store),
                    tamper: options.tamper,
                    limit: Arc::clone(&limit),
                    partly: Arc::default(),
                },
                logs: Arc::clone(&logs) as _,
                execs: Arc::clone(&execs) as _,
            },
        )
    };
    // Its port is told to the others, so any will do when the usual one is taken.
    let plane = data_plane(data_address)
        .or_else(|_| data_plane(SocketAddr::new(listen.ip(), 0)))
        .context("cannot listen for data")?;

    let runtimes = installed_runtimes();
    let (cdi_files, warnings) = Registry::load(&cdi::FOLDERS.map(std::path::Path::new));
    warnings.iter().for_each(|warning| tracing::warn!(warning, "a CDI file is not used"));
    let given = offers(&settings, &runtimes, cdi_files.kinds());
    let complete = store.images()?.into_iter().map(|image| image.root);
    let complete = complete.chain(store.originals()?.into_iter().map(|original| original.root));
    let images = complete.map(ChunkId).collect();
    let config = Config {
        key: key.clone(),
        mesh: settings.mesh,
        chain,
        name: settings.name.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        labels: labels(&settings, &cdi_files),
        offers: given.clone(),
        wall: driver::wall_now(),
        restored,
        images,
        image_copies: IMAGE_COPIES,
        memo: None,
    };
    let seed = u64::from_le_bytes(random()?);
    let devices = Arc::new(devices::Devices::new(cdi_files, &containers));
    let networks = Arc::new(networks::Networks::new(&node_of(&key).short(), containers.clone()));
    let images = images::Images::new(handle.clone(), Arc::clone(&store));
    let reads = lazy::Reads::new(handle.clone(), Arc::clone(&store), images.clone());
    let effects = effects::Effects {
        handle: handle.clone(),
        store: Arc::clone(&store),
        launcher,
        containers,
        plane: Arc::clone(&plane),
        records: records.writer(handle.clone()),
        node: node_of(&key),
        offers: settings.offers.clone(),
        given,
        networks: Arc::clone(&networks),
        devices,
        volumes: home.path("volumes"),
        runtimes: runtimes.clone(),
        lines: Arc::default(),
        zero: moyai_runtime::host::boot_time(),
        deadlines: Arc::default(),
        fetches: Arc::default(),
        reads: reads.clone(),
    };
    let capacity = capacity(&settings);
    let (stop_sender, stop) = watch::channel(false);
    let driver =
        Driver::new(config, seed, effects, outgoing, book, Arc::clone(&gate), home.clone(), capacity, plane.port());
    let driver = tokio::spawn(driver.run(requests, incoming));

    reads.listen().context("cannot listen for what containers read of images that are not all here")?;
    tokio::spawn(images.clone().collect(settings.image_budget));
    let address = settings.registry.as_deref().unwrap_or(registry::USUAL);
    if address != "off" {
        let uploads = home.path("uploads");
        match registry::start(address, handle.clone(), Arc::clone(&store), images.clone(), Arc::clone(&plane), &uploads)
            .await
        {
            Ok(address) => tracing::info!(%address, "a registry for docker and others"),
            // The usual address may be another's; one that was asked for must be this node's.
            Err(error) if settings.registry.is_none() => tracing::warn!("no registry here: {error:#}"),
            Err(error) => return Err(error),
        }
    }
    let state = server::State {
        handle: handle.clone(),
        store,
        images,
        outside: registry::outside::Outside::new(&home.path("outside"))?,
        gate,
        plane,
        logs,
        execs,
        stop: stop_sender,
        mesh: settings.mesh,
        me: node_of(&key),
        store_dir: home.path("store"),
    };
    server::start(&options.socket, state)?;
    Ok(Daemon { driver, stop, handle, networks, socket: options.socket.clone() })
}

/// The node that holds the root key renews its own certificate.
fn own_chain(home: &Home, key: &ed25519_dalek::SigningKey, settings: &home::Settings) -> anyhow::Result<Chain> {
    let chain = home.chain()?;
    let ends = chain.leaf().map_or(0, |leaf| leaf.not_after);
    match home.root_key()? {
        Some(root) if ends < unix_now() + FOUNDER_LIFE / 2 => {
            let chain = Chain::root(&root, node_of(key), unix_now(), FOUNDER_LIFE);
            if chain.verify(&settings.mesh, unix_now()).is_ok() {
                home.set_chain(&chain)?;
                return Ok(chain);
            }
            home.chain()
        }
        _ => Ok(chain),
    }
}

fn add_peers(restored: &mut Restored, home: &Home) {
    for (node, addresses) in home.peers() {
        if !restored.members.iter().any(|(known, _)| *known == node) {
            restored.members.push((node, addresses));
        }
    }
}

fn multiaddrs(listen: &SocketAddr) -> Vec<Multiaddr> {
    let ip = match listen.ip() {
        std::net::IpAddr::V4(ip) => format!("/ip4/{ip}"),
        std::net::IpAddr::V6(ip) => format!("/ip6/{ip}"),
    };
    let port = listen.port();
    [format!("{ip}/udp/{port}/quic-v1"), format!("{ip}/tcp/{port}")]
        .iter()
        .map(|text| text.parse().expect("made of good parts"))
        .collect()
}

/// What is wrong with an address to listen on.
pub fn listen_problem(text: &str) -> anyhow::Error {
    problem(format!("`{text}` is no address to listen on"), "write it as ADDRESS:PORT, for example 0.0.0.0:4755")
}

fn labels(settings: &home::Settings, registry: &Registry) -> BTreeMap<String, String> {
    let mut labels = BTreeMap::from([
        ("os".to_owned(), std::env::consts::OS.to_owned()),
        ("arch".to_owned(), std::env::consts::ARCH.to_owned()),
        ("node".to_owned(), settings.name.clone()),
    ]);
    // How many of each kind of device it has: `--on nvidia.com/gpu=2`.
    labels.extend(registry.kinds().into_iter().map(|(kind, names)| (kind, names.len().to_string())));
    labels.extend(settings.labels.clone());
    labels
}

/// OCI runtimes that are known to take the same command line.
const RUNTIMES: [&str; 4] = ["crun", "runc", "runsc", "youki"];

/// Those that are installed here.
fn installed_runtimes() -> BTreeMap<String, PathBuf> {
    let usual = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    let found = |name: &str| {
        let places = usual.split(':').map(|folder| PathBuf::from(folder).join(name));
        places.into_iter().find(|path| path.is_file()).map(|path| (name.to_owned(), path))
    };
    RUNTIMES.iter().filter_map(|name| found(name)).collect()
}

fn offers(
    settings: &home::Settings,
    runtimes: &BTreeMap<String, PathBuf>,
    devices: BTreeMap<String, Vec<String>>,
) -> Offers {
    let (processors, memory_nodes) = moyai_runtime::host::parts();
    let paths = settings.offers.iter().map(|path| path.to_string_lossy().into_owned()).collect();
    Offers {
        paths,
        host_network: settings.offer_host_network,
        devices,
        runtimes: runtimes.keys().cloned().collect(),
        processors: numbers(&processors).unwrap_or_default(),
        memory_nodes: numbers(&memory_nodes).unwrap_or_default(),
        ulimits: ULIMITS
            .iter()
            .filter_map(|name| Some(((*name).to_owned(), moyai_runtime::host::highest_limit(name)?)))
            .collect(),
        missing_controllers: moyai_runtime::host::missing_controllers(),
        missing_capabilities: moyai_runtime::host::missing_capabilities(),
        ordinary: moyai_runtime::rootless::is_rootless(),
    }
}

fn capacity(settings: &home::Settings) -> Command {
    let machine = moyai_runtime::host::capacity();
    let capacity = moyai_protocol::workload::Resources {
        cpu_milli: settings.cpus.unwrap_or(machine.cpu_milli),
        memory: settings.memory.unwrap_or(machine.memory),
    };
    Command::Load { capacity, pressure: 0 }
}
