//! The loop that owns the protocol node: the daemon's half of the driver contract.
//!
//! One task. It takes messages, completions, commands and questions from bounded channels, gives them to the node one
//! at a time, and carries out what comes out: transmits go to the swarm (dropped when its queue is full, as a network
//! may), effects to [`super::effects`], events to the log and to whoever follows them. Questions are closures that look
//! at the node between two steps, so the local API needs no copy of its state.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use moyai_protocol::catalog::Key;
use moyai_protocol::contract::{Command, CommandId, Completion, Event, Input, Outcome, Output, Refused, Reply};
use moyai_protocol::id::{ImageId, NodeId, WorkloadId};
use moyai_protocol::node::{Config, Node};
use moyai_protocol::time::{Instant, UnixMillis};
use moyai_protocol::worker::PlacementState;
use serde::{Deserialize, Serialize};
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::time::Instant as TokioInstant;
use tracing::{debug, error, info, warn};

use super::effects::Effects;
use super::home::Home;
use crate::net::admission::Gate;
use crate::net::control::{AddressBook, Incoming, Outgoing};

/// Requests waiting for the loop.
const QUEUE: usize = 4096;
/// Events kept for a follower that is slow; then it is told that it missed some.
const EVENTS: usize = 1024;
/// Between two lines of the log about what one peer sent: it must not fill the disk.
const COMPLAINT: Duration = Duration::from_secs(10);
/// A node that is a member no more is told so before its connections are cut.
const CUT: Duration = Duration::from_millis(500);
/// Between two looks at how busy the machine is, and at the wall clock.
const LOOK: Duration = Duration::from_secs(5);

/// Something that happened, for people.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Told {
    /// Milliseconds since 1970.
    pub at: u64,
    /// About what: a node's or a workload's name.
    pub about: String,
    /// In words.
    pub text: String,
}

type Question = Box<dyn FnOnce(&Node, Instant) + Send>;

/// What the loop is asked.
pub enum Request {
    /// Give this command, and say what came of it.
    Command(Command, oneshot::Sender<Result<Reply, Refused>>),
    /// Look at the node.
    Question(Question),
    /// An effect ended.
    Completion(Completion),
    /// End.
    Finish(oneshot::Sender<()>),
    /// The disk fails: end at once.
    Fail,
}

/// The way to the loop.
#[derive(Clone)]
pub struct Handle {
    requests: mpsc::Sender<Request>,
    changes: watch::Receiver<u64>,
    events: broadcast::Sender<Told>,
    past: Past,
}

/// The last [`EVENTS`] of what was told.
type Past = Arc<Mutex<VecDeque<Told>>>;

/// The loop's end of a [`Handle`].
pub struct Requests {
    requests: mpsc::Receiver<Request>,
    changes: watch::Sender<u64>,
    events: broadcast::Sender<Told>,
    past: Past,
}

/// A handle and its other end.
pub fn channel() -> (Handle, Requests) {
    let (sender, requests) = mpsc::channel(QUEUE);
    let (change, changes) = watch::channel(0);
    let (events, _) = broadcast::channel(EVENTS);
    let past = Past::default();
    let handle = Handle { requests: sender, changes, events: events.clone(), past: Arc::clone(&past) };
    (handle, Requests { requests, changes: change, events, past })
}

/// The loop has ended.
#[derive(Debug, thiserror::Error)]
#[error("the daemon is stopping")]
pub struct Stopping;

impl Handle {
    /// Gives a command and waits for its answer.
    pub async fn command(&self, command: Command) -> Result<Result<Reply, Refused>, Stopping> {
        let (sender, answer) = oneshot::channel();
        self.requests.send(Request::Command(command, sender)).await.map_err(|_| Stopping)?;
        answer.await.map_err(|_| Stopping)
    }

    /// Looks at the node between two steps.
    pub async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&Node, Instant) -> T + Send + 'static,
    ) -> Result<T, Stopping> {
        let (sender, answer) = oneshot::channel();
        let question: Question = Box::new(move |node, now| {
            // Whoever asked may have gone.
            let _gone = sender.send(question(node, now));
        });
        self.requests.send(Request::Question(question)).await.map_err(|_| Stopping)?;
        answer.await.map_err(|_| Stopping)
    }

    /// Reports the end of an effect.
    pub async fn complete(&self, completion: Completion) {
        // The loop has ended, and the effect's life with it.
        let _ended = self.requests.send(Request::Completion(completion)).await;
    }

    /// Counts changes of the catalog; to be waited on before looking again.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.clone()
    }

    /// What has happened lately, since this daemon started, and what happens from then on.
    pub fn events(&self) -> (Vec<Told>, broadcast::Receiver<Told>) {
        let past = self.past.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        (past.iter().cloned().collect(), self.events.subscribe())
    }

    /// Ends the loop when what came before is done.
    pub async fn finish(&self) {
        let (sender, done) = oneshot::channel();
        if self.requests.send(Request::Finish(sender)).await.is_ok() {
            let _ended = done.await;
        }
    }

    /// Ends the loop because the node's state cannot be kept.
    pub fn fail(&self) {
        let _ended = self.requests.blocking_send(Request::Fail);
    }
}

/// The wall clock.
pub fn wall_now() -> UnixMillis {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    UnixMillis(since.as_millis() as u64)
}

/// The loop's state.
pub struct Driver {
    node: Node,
    /// The node's zero on the clock that goes on while the machine sleeps: a lease does not wait for it to wake.
    zero: Duration,
    effects: Effects,
    outgoing: mpsc::Sender<Outgoing>,
    addresses: AddressBook,
    gate: Arc<Gate>,
    home: Home,
    capacity: Command,
    data_port: u16,
    next_command: u64,
    waiting: HashMap<CommandId, oneshot::Sender<Result<Reply, Refused>>>,
    change: u64,
    names: HashMap<NodeId, String>,
    /// When something that a peer sent was last complained of. Bounded by the members.
    complaints: HashMap<NodeId, TokioInstant>,
}

impl Driver {
    /// A loop around a new node.
    #[expect(clippy::too_many_arguments, reason = "each is a different end of the daemon, given once")]
    pub(super) fn new(
        config: Config,
        seed: u64,
        effects: Effects,
        outgoing: mpsc::Sender<Outgoing>,
        addresses: AddressBook,
        gate: Arc<Gate>,
        home: Home,
        capacity: Command,
        data_port: u16,
    ) -> Driver {
        let zero = effects.zero;
        let node = Node::new(config, seed, Instant::ZERO);
        gate.revoke(node.catalog().revoked().iter().copied());
        Driver {
            node,
            zero,
            effects,
            outgoing,
            addresses,
            gate,
            home,
            capacity,
            data_port,
            next_command: 0,
            waiting: HashMap::new(),
            change: 0,
            names: HashMap::new(),
            complaints: HashMap::new(),
        }
    }

    fn now(&self) -> Instant {
        let since = moyai_runtime::host::boot_time().saturating_sub(self.zero);
        Instant::from_nanos(since.as_nanos() as u64)
    }

    /// Runs until it is asked to end, or the node's state cannot be kept.
    pub async fn run(mut self, mut requests: Requests, mut incoming: mpsc::Receiver<Incoming>) -> anyhow::Result<()> {
        self.effects.sweep(&self.node).await;
        let capacity = self.capacity.clone();
        self.command(capacity, None);
        if let Ok(first) = incoming.try_recv() {
            // Where this node listens: it is told before there is a driver, and must be known before anything is asked.
            self.arrived(first);
        }
        self.drain(&requests);
        let mut look = tokio::time::interval(LOOK);
        loop {
            let wait = self.node.poll_timeout().map_or(Duration::from_secs(3600), |at| at.since(self.now()));
            let timeout = TokioInstant::now() + wait;
            tokio::select! {
                request = requests.requests.recv() => match request {
                    Some(Request::Command(command, answer)) => self.command(command, Some(answer)),
                    Some(Request::Question(question)) => {
                        question(&self.node, self.now());
                        continue;
                    }
                    Some(Request::Completion(completion)) => {
                        let now = self.now();
                        let moves_images = matches!(completion.outcome, Outcome::Fetched(_) | Outcome::Surveyed(_));
                        self.node.handle(now, Input::Completion(completion));
                        if moves_images {
                            let exchange = self.node.exchange();
                            let coming = exchange.downloads().map(|(root, _)| *root);
                            let here = coming.filter_map(|root| Some((root, exchange.bitfield(&root)?)));
                            self.effects.plane.partly().set(here);
                        }
                    }
                    Some(Request::Finish(done)) => {
                        let _gone = done.send(());
                        return Ok(());
                    }
                    Some(Request::Fail) => anyhow::bail!("the node's state cannot be written; its containers go on"),
                    None => return Ok(()),
                },
                arrived = incoming.recv() => match arrived {
                    Some(arrived) => self.arrived(arrived),
                    None => return Ok(()),
                },
                () = tokio::time::sleep_until(timeout) => {
                    let now = self.now();
                    self.node.handle_timeout(now);
                }
                _ = look.tick() => self.look(),
            }
            // Whatever else has ended one.
            self.effects.plane.partly().retain(|root| self.node.exchange().bitfield(root).is_some());
            self.drain(&requests);
        }
    }

    fn command(&mut self, command: Command, answer: Option<oneshot::Sender<Result<Reply, Refused>>>) {
        self.next_command += 1;
        let id = CommandId(self.next_command);
        if let Some(answer) = answer {
            self.waiting.insert(id, answer);
        }
        let now = self.now();
        self.node.handle(now, Input::Command { id, command });
    }

    fn arrived(&mut self, arrived: Incoming) {
        let now = self.now();
        match arrived {
            Incoming::Message { from, bytes, place } => {
                self.node.handle(now, Input::Message { from, bytes });
                drop(place);
            }
            Incoming::Admitted { membership, address } => {
                self.effects.plane.begin_anew(membership.node);
                self.command(Command::Admitted { membership, address }, None);
            }
            Incoming::Listening(addresses) => {
                let port = self.data_port;
                let mut data: Vec<String> = addresses
                    .iter()
                    .filter_map(|address| host_of(address))
                    .map(|host| format!("{host}:{port}"))
                    .collect();
                data.dedup();
                self.command(Command::Listening { addresses, data }, None);
            }
        }
    }

    fn look(&mut self) {
        self.command(Command::WallClock(wall_now()), None);
        if let Command::Load { capacity, .. } = self.capacity {
            let pressure = moyai_runtime::host::cpu_pressure();
            self.command(Command::Load { capacity, pressure }, None);
        }
        let members = self.node.membership().members();
        let reachable = members.filter(|(_, member)| member.state.is_live() && !member.addresses.is_empty());
        self.gate.set_members(reachable.map(|(node, member)| (*node, member.addresses.clone())).collect());
    }

    fn drain(&mut self, requests: &Requests) {
        let mut changed = false;
        while let Some(output) = self.node.poll_output() {
            match output {
                Output::Transmit { to, bytes } => {
                    if self.outgoing.try_send(Outgoing { to, bytes }).is_err() {
                        debug!(to = %to.short(), "dropped a message: the network is behind");
                    }
                }
                Output::Effect { id, effect } => self.effects.carry_out(&self.node, id, effect),
                Output::Cancel(id) => self.effects.call_off(id),
                Output::Event(event) => {
                    changed = true;
                    self.event(event, requests);
                }
            }
        }
        if changed {
            self.change += 1;
            requests.changes.send_replace(self.change);
        }
    }

    fn event(&mut self, event: Event, requests: &Requests) {
        let told = match event {
            Event::Reply { id, result } => {
                if let Some(answer) = self.waiting.remove(&id) {
                    // Whoever asked may have gone.
                    let _gone = answer.send(result);
                }
                return;
            }
            Event::Addresses { node, addresses } => return self.addresses.insert(&node, &addresses),
            Event::Changed(Key::Placement(node, workload, replica)) => {
                match self.placement_words(&node, &workload, replica) {
                    Some(words) => words,
                    None => return,
                }
            }
            Event::Changed(Key::Node(_) | Key::Workload(_) | Key::Journal(..) | Key::Seats(..)) => {
                return;
            }
            Event::Dropped { from, reason } => {
                if self.may_complain(from) {
                    warn!(from = %from.short(), reason, "dropped what it sent, and perhaps more since the last time");
                }
                return;
            }
            Event::Faulty { node, reason } => {
                if self.may_complain(node) {
                    warn!(
                        node = self.name_of(&node),
                        reason, "it did not give what was asked of an image; others are asked"
                    );
                }
                return;
            }
            Event::ImageFailed { root, reason } => {
                warn!(root = %root.short(), reason, "an image cannot be had");
                return;
            }
            Event::Renewed(chain) => {
                self.gate.set_chain(chain.clone());
                if let Err(problem) = self.home.set_chain(&chain) {
                    error!("cannot keep the renewed certificate: {problem:#}");
                }
                return;
            }
            Event::ImageComplete { root } => {
                info!(root = %root.short(), "an image is complete here");
                return;
            }
            Event::CastOut => {
                error!("this node's certificates are revoked: it is a member no more; it ends what it runs, and stops");
                if let Err(problem) = self.home.set_revoked() {
                    error!("cannot remember that: {problem:#}");
                }
                self.effects.end_all();
                std::process::exit(70);
            }
            Event::Changed(Key::Revoked(node)) => {
                self.gate.revoke([node]);
                return;
            }
            Event::Revoked { node } => {
                let gate = Arc::clone(&self.gate);
                // Not before it has heard of it: an honest one then ends what it runs.
                tokio::spawn(async move {
                    tokio::time::sleep(CUT).await;
                    gate.cut(node);
                });
                (self.name_of(&node), "is a member no more: its certificates are revoked".to_owned())
            }
            Event::Noted { workload, text } => (self.workload_name(&workload), text),
            Event::Changed(Key::Drain(node)) => {
                let text = if self.node.catalog().is_draining(&node) { "is being drained" } else { "takes work again" };
                (self.name_of(&node), text.to_owned())
            }
            Event::Member { node, state } => (self.name_of(&node), format!("{state:?}").to_lowercase()),
            Event::Placed { placement, node, record } => {
                let to = self.name_of(&node);
                let (bids, took) = (record.quotes.len() as u32 + record.more_quotes, record.took);
                let text = format!("placed on {to}: epoch {}, best of {bids} bids, {took} ms", placement.epoch);
                (self.replica_name(&placement), text)
            }
            Event::Pending { workload, record } => {
                let reasons: Vec<String> =
                    record.refused.iter().map(|(reason, count)| format!("{reason} ({count})")).collect();
                (self.workload_name(&workload), format!("no node takes it: {}", reasons.join(", ")))
            }
            Event::ClockOff { by, .. } if !self.may_complain(by) => return,
            Event::ClockOff { by, ahead } => {
                let text = format!("this machine's clock is {} s ahead, says {}", ahead / 1000, self.name_of(&by));
                error!("{text}");
                ("clock".to_owned(), text)
            }
            Event::NameContested { reference, meant, other } => {
                let mut who = |(id, node): (ImageId, NodeId)| format!("sha256:{id} on {}", self.name_of(&node));
                let (meant, other) = (who(meant), who(other));
                let text = format!("two images were given this name at once: {meant} is meant now, {other} is not");
                warn!(name = reference.familiar(), text);
                (reference.familiar(), text)
            }
            Event::Cloned { other_boot } => {
                error!(other_boot, "another machine runs with this node's key and was first: this one stops");
                std::process::exit(70);
            }
        };
        let (about, text) = told;
        info!(about, text);
        let told = Told { at: wall_now().0, about, text };
        {
            let mut past = requests.past.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if past.len() == EVENTS {
                past.pop_front();
            }
            past.push_back(told.clone());
            // Nobody may be listening. Under the lock: who begins to follow has it in the past or hears it, not both.
            let _unheard = requests.events.send(told);
        }
    }

    /// Whether it is time for another line about what a peer sends.
    fn may_complain(&mut self, about: NodeId) -> bool {
        let now = TokioInstant::now();
        let due = self.complaints.get(&about).is_none_or(|last| now.duration_since(*last) >= COMPLAINT);
        if due {
            self.complaints.insert(about, now);
        }
        due
    }

    fn name_of(&mut self, node: &NodeId) -> String {
        if let Some(fact) = self.node.catalog().node(node) {
            self.names.insert(*node, fact.name.clone());
        }
        self.names.get(node).cloned().unwrap_or_else(|| node.short())
    }

    /// What a placement's change means to people; its end and its removal are told by the workload's own.
    fn placement_words(&mut self, node: &NodeId, workload: &WorkloadId, replica: u32) -> Option<(String, String)> {
        let on = self.name_of(node);
        let mut all = self.node.catalog().placements_of(workload);
        let fact = all.find(|placement| placement.node == *node && placement.replica == replica)?.fact;
        let state = format!("{:?}", fact.state).split('(').next().unwrap_or_default().to_lowercase();
        let code = match fact.state {
            PlacementState::Exited(status) => format!(" with {}", status.code),
            _ => String::new(),
        };
        let detail = if fact.detail.is_empty() { String::new() } else { format!(": {}", fact.detail) };
        let text = format!("{state}{code} on {on}, epoch {}{detail}", fact.epoch);
        Some((format!("{}.{}", self.workload_name(workload), replica + 1), text))
    }

    fn workload_name(&self, workload: &WorkloadId) -> String {
        self.node.catalog().workload(workload).map_or_else(|| workload.short(), |known| known.spec.name.clone())
    }

    fn replica_name(&self, placement: &moyai_protocol::workload::PlacementId) -> String {
        format!("{}.{}", self.workload_name(&placement.workload), placement.replica + 1)
    }
}

/// The host in a multiaddress, as it stands before a port.
fn host_of(address: &str) -> Option<String> {
    let mut parts = address.split('/').skip(1);
    match (parts.next()?, parts.next()?) {
        ("ip4", host) => Some(host.to_owned()),
        ("ip6", host) => Some(format!("[{host}]")),
        _ => None,
    }
}
