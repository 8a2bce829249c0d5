//! Names for containers: who asks the bridge's address at port 53 (RFC 1035) is told where the containers of this node are, by
//! the names of their workloads, and gets everything else from whom this machine asks, or its workload (`--dns`).
//!
//! **States.** None but questions that are on their way. Each has a socket and a random port of its own, and an answer counts
//! only from whom was asked and to what was asked (RFC 5452).
//!
//! **If it dies**, with the daemon, containers find no names until the next one is up; resolvers ask again for seconds.
//!
//! **Who may ask.** What comes from outside of the bridge's range is dropped: this is nobody else's resolver. Only plain questions are
//! passed on: a server that trusts this machine is not to be told anything by a container, nor asked for whole zones.
//!
//! **Bounds.** [`MAX_QUESTIONS`] questions at a time, [`MAX_OF_ONE`] of one container; beyond that, and over UDP, the newest is dropped, and its resolver asks
//! again. [`PATIENCE`] for an answer, [`MAX_SERVERS`] servers asked in turn.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hickory_proto::op::{Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{Name, RData, Record, RecordType};
use moyai_runtime::network::Subnet;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tracing::debug;

use crate::net::doorstep::{Place, Places};

const MAX_QUESTIONS: usize = 256;
/// The same of one container.
const MAX_OF_ONE: usize = 32;
const MAX_SERVERS: usize = 3;
/// What resolvers wait by default (resolv.conf(5), "timeout").
const PATIENCE: Duration = Duration::from_secs(5);
/// How long an answer about a container may be kept, in seconds: it may be elsewhere soon.
const LIFE: u32 = 2;
/// The longest datagram: what resolvers announce at the most (RFC 6891 section 6.2.5, and its common practice).
const DATAGRAM: usize = 4096;

/// Where containers are.
#[derive(Clone, Default)]
pub(super) struct Names(Arc<Mutex<BTreeMap<Ipv4Addr, Known>>>);

struct Known {
    /// Of its workload.
    name: String,
    /// Counts from 0.
    replica: u32,
    /// Whom it has asked for what this node does not know; none are whom the machine asks.
    servers: Vec<IpAddr>,
}

impl Names {
    /// A container of the workload `name` is at `address`.
    pub(super) fn insert(&self, address: Ipv4Addr, name: &str, replica: u32, servers: Vec<IpAddr>) {
        self.lock().insert(address, Known { name: name.to_ascii_lowercase(), replica, servers });
    }

    /// Who is asked for what a container there wants to know.
    async fn servers(&self, from: IpAddr) -> Vec<SocketAddr> {
        let own = match from {
            IpAddr::V4(from) => self.lock().get(&from).map(|known| known.servers.clone()).unwrap_or_default(),
            IpAddr::V6(_) => Vec::new(),
        };
        let all = if own.is_empty() { of_machine().await } else { own };
        all.into_iter().take(MAX_SERVERS).map(|ip| SocketAddr::new(ip, 53)).collect()
    }

    /// Nothing is there any more.
    pub(super) fn remove(&self, address: Ipv4Addr) {
        self.lock().remove(&address);
    }

    /// Where `name` is: a workload's, or one with a replica (`web.2`). A name with a dot and no replica is never a
    /// workload's here, whatever somebody calls it: it would take the place of a name of the world.
    fn find(&self, name: &str) -> Option<Vec<Ipv4Addr>> {
        let name = name.trim_end_matches('.').to_ascii_lowercase();
        let (name, replica) = match name.split_once('.') {
            None => (name.as_str(), None),
            Some((name, replica)) => (name, Some(replica.parse::<u32>().ok()?.checked_sub(1)?)),
        };
        let all = self.lock();
        let here =
            all.iter().filter(|(_, known)| known.name == name && replica.is_none_or(|asked| asked == known.replica));
        let found: Vec<Ipv4Addr> = here.map(|(address, _)| *address).collect();
        (!found.is_empty()).then_some(found)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<Ipv4Addr, Known>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Answers at the bridge's address, until the daemon ends. An error when something else answers there already.
pub(super) fn serve(names: &Names, subnet: Subnet, runtime: &tokio::runtime::Handle) -> std::io::Result<()> {
    let at = SocketAddr::from((subnet.gateway(), 53));
    let datagrams = std::net::UdpSocket::bind(at)?;
    let streams = std::net::TcpListener::bind(at)?;
    datagrams.set_nonblocking(true)?;
    streams.set_nonblocking(true)?;
    let _entered = runtime.enter();
    let (datagrams, streams) = (UdpSocket::from_std(datagrams)?, TcpListener::from_std(streams)?);
    let places = Hall { all: Arc::new(Semaphore::new(MAX_QUESTIONS)), of_one: Places::default() };
    runtime.spawn(serve_datagrams(Arc::new(datagrams), names.clone(), subnet, places.clone()));
    runtime.spawn(serve_streams(streams, names.clone(), subnet, places));
    Ok(())
}

fn is_inside(from: SocketAddr, subnet: Subnet) -> bool {
    matches!(from.ip(), IpAddr::V4(ip) if subnet.has(ip))
}

/// Places for questions.
#[derive(Clone)]
struct Hall {
    all: Arc<Semaphore>,
    of_one: Places<IpAddr>,
}

impl Hall {
    fn enter(&self, from: SocketAddr, subnet: Subnet) -> Option<(OwnedSemaphorePermit, Place<IpAddr>)> {
        if !is_inside(from, subnet) {
            return None;
        }
        let own = self.of_one.enter(from.ip(), MAX_OF_ONE)?;
        Some((Arc::clone(&self.all).try_acquire_owned().ok()?, own))
    }
}

async fn serve_datagrams(socket: Arc<UdpSocket>, names: Names, subnet: Subnet, places: Hall) {
    let mut buffer = vec![0; DATAGRAM];
    loop {
        let Ok((len, from)) = socket.recv_from(&mut buffer).await else {
            // Of an answer that could not be delivered.
            continue;
        };
        let Some(place) = places.enter(from, subnet) else { continue };
        let (question, socket, names) = (buffer[..len].to_vec(), Arc::clone(&socket), names.clone());
        tokio::spawn(async move {
            let answer = match answer(&question, &names) {
                Some(answer) => Some(answer),
                None => {
                    forward_datagram(&question, &names.servers(from.ip()).await).await.or_else(|| failure(&question))
                }
            };
            if let Some(answer) = answer {
                // Who asked may be gone.
                let _gone = socket.send_to(&answer, from).await;
            }
            drop(place);
        });
    }
}

async fn serve_streams(listener: TcpListener, names: Names, subnet: Subnet, places: Hall) {
    loop {
        let Ok((mut stream, from)) = listener.accept().await else {
            // No descriptor is free: there will be one.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let Some(place) = places.enter(from, subnet) else { continue };
        let names = names.clone();
        tokio::spawn(async move {
            // One question; a resolver that has more calls again.
            if let Ok(Some(question)) = timeout(PATIENCE, read_framed(&mut stream)).await {
                let answer = match answer(&question, &names) {
                    Some(answer) => Some(answer),
                    None => {
                        forward_stream(&question, &names.servers(from.ip()).await).await.or_else(|| failure(&question))
                    }
                };
                if let Some(answer) = answer {
                    let _gone = timeout(PATIENCE, write_framed(&mut stream, &answer)).await;
                }
            }
            drop(place);
        });
    }
}

/// What this node knows itself.
fn answer(question: &[u8], names: &Names) -> Option<Vec<u8>> {
    let asked = Message::from_vec(question).ok()?;
    let (query, plain) = (asked.queries.first()?, asked.metadata.op_code == OpCode::Query);
    if asked.metadata.message_type != MessageType::Query || !plain {
        return None;
    }
    let found = names.find(&query.name().to_ascii())?;
    let mut reply = reply_to(&asked, ResponseCode::NoError);
    reply.metadata.authoritative = true;
    if matches!(query.query_type(), RecordType::A | RecordType::ANY) {
        let record = |address| Record::from_rdata(Name::clone(query.name()), LIFE, RData::A(A(address)));
        reply.add_answers(found.into_iter().map(record));
    }
    // A name that exists has no addresses of another kind: an empty answer, which is not "no such name".
    reply.to_vec().ok()
}

/// That nobody could be asked: better than silence, which is waited out.
fn failure(question: &[u8]) -> Option<Vec<u8>> {
    let asked = Message::from_vec(question).ok()?;
    let query = asked.metadata.message_type == MessageType::Query;
    query.then(|| reply_to(&asked, ResponseCode::ServFail).to_vec().ok()).flatten()
}

fn reply_to(asked: &Message, code: ResponseCode) -> Message {
    let mut reply = Message::response(asked.metadata.id, asked.metadata.op_code);
    reply.metadata.response_code = code;
    reply.metadata.recursion_desired = asked.metadata.recursion_desired;
    reply.metadata.recursion_available = true;
    reply.queries.clone_from(&asked.queries);
    reply
}

/// Whom this machine asks (resolv.conf(5)). Read for each question: it changes as a laptop moves.
async fn of_machine() -> Vec<IpAddr> {
    let text = tokio::fs::read_to_string("/etc/resolv.conf").await.unwrap_or_default();
    text.lines().filter_map(|line| line.trim_start().strip_prefix("nameserver")?.trim().parse().ok()).collect()
}

async fn forward_datagram(question: &[u8], servers: &[SocketAddr]) -> Option<Vec<u8>> {
    if !is_plain(question) {
        return None;
    }
    for server in servers {
        match timeout(PATIENCE / MAX_SERVERS as u32, ask(question, *server)).await {
            Ok(Ok(answer)) => return Some(answer),
            Ok(Err(error)) => debug!(%server, %error, "a name server does not answer"),
            Err(_) => debug!(%server, "a name server does not answer in time"),
        }
    }
    None
}

async fn ask(question: &[u8], server: SocketAddr) -> std::io::Result<Vec<u8>> {
    let any: IpAddr =
        if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { std::net::Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    socket.send(question).await?;
    let mut buffer = vec![0; DATAGRAM];
    loop {
        let len = socket.recv(&mut buffer).await?;
        if answers(&buffer[..len], question) {
            buffer.truncate(len);
            return Ok(buffer);
        }
    }
}

async fn forward_stream(question: &[u8], servers: &[SocketAddr]) -> Option<Vec<u8>> {
    if !is_plain(question) {
        return None;
    }
    for server in servers {
        let asked = async {
            let mut stream = TcpStream::connect(server).await.ok()?;
            write_framed(&mut stream, question).await.ok()?;
            read_framed(&mut stream).await.filter(|answer| answers(answer, question))
        };
        if let Ok(Some(answer)) = timeout(PATIENCE, asked).await {
            return Some(answer);
        }
    }
    None
}

/// Whether it is one question for one name, and nothing else.
fn is_plain(question: &[u8]) -> bool {
    Message::from_vec(question).is_ok_and(|asked| {
        let [query] = &asked.queries[..] else { return false };
        asked.metadata.message_type == MessageType::Query
            && asked.metadata.op_code == OpCode::Query
            && !matches!(query.query_type(), RecordType::AXFR | RecordType::IXFR)
    })
}

/// Whether it is an answer to that question, and not to another's.
fn answers(answer: &[u8], question: &[u8]) -> bool {
    match (Message::from_vec(answer), Message::from_vec(question)) {
        (Ok(answer), Ok(question)) => {
            answer.metadata.message_type == MessageType::Response
                && answer.metadata.id == question.metadata.id
                && answer.queries == question.queries
        }
        _ => false,
    }
}

/// Over TCP each message has its length before it (RFC 1035 section 4.2.2).
async fn read_framed(stream: &mut TcpStream) -> Option<Vec<u8>> {
    let len = stream.read_u16().await.ok()?;
    let mut bytes = vec![0; usize::from(len)];
    stream.read_exact(&mut bytes).await.ok()?;
    Some(bytes)
}

async fn write_framed(stream: &mut TcpStream, bytes: &[u8]) -> std::io::Result<()> {
    let len = u16::try_from(bytes.len()).map_err(std::io::Error::other)?;
    stream.write_all(&[&len.to_be_bytes(), bytes].concat()).await
}

#[cfg(test)]
mod tests {
    use hickory_proto::op::Query;

    use super::*;

    fn ask_for(name: &str, kind: RecordType) -> Vec<u8> {
        let mut message = Message::query();
        message.queries.push(Query::query(Name::from_ascii(name).unwrap(), kind));
        message.to_vec().unwrap()
    }

    #[test]
    fn workloads_are_found_by_name_and_by_replica() {
        let names = Names::default();
        let (one, two) = (Ipv4Addr::new(10, 210, 0, 2), Ipv4Addr::new(10, 210, 0, 3));
        names.insert(one, "web", 0, Vec::new());
        names.insert(two, "Web", 1, Vec::new());
        assert_eq!(names.find("web"), Some(vec![one, two]));
        assert_eq!(names.find("WEB.2."), Some(vec![two]));
        for other in ["web.3", "web.0", "web.example", "example.com", ""] {
            assert_eq!(names.find(other), None, "{other}");
        }
        let answer = |kind| Message::from_vec(&super::answer(&ask_for("web.1.", kind), &names).unwrap()).unwrap();
        assert_eq!(answer(RecordType::A).answers[0].data, RData::A(A(one)));
        let other = answer(RecordType::AAAA);
        assert_eq!((other.answers.len(), other.metadata.response_code), (0, ResponseCode::NoError));
        names.remove(two);
        assert_eq!(names.find("web"), Some(vec![one]));
    }

    #[test]
    fn a_workload_cannot_take_a_name_of_the_world() {
        let names = Names::default();
        names.insert(Ipv4Addr::new(10, 210, 0, 2), "example.com", 0, Vec::new());
        assert_eq!(super::answer(&ask_for("example.com.", RecordType::A), &names), None);
    }

    #[test]
    fn only_plain_questions_are_passed_on() {
        let question = ask_for("example.com.", RecordType::A);
        assert!(is_plain(&question));
        assert!(!is_plain(&ask_for("example.com.", RecordType::AXFR)));
        let mut update = Message::from_vec(&question).unwrap();
        update.metadata.op_code = OpCode::Update;
        assert!(!is_plain(&update.to_vec().unwrap()));
        let mut two = Message::from_vec(&question).unwrap();
        two.queries.push(two.queries[0].clone());
        assert!(!is_plain(&two.to_vec().unwrap()));
        assert!(!is_plain(b"GET / HTTP/1.0\r\n\r\n"));
    }

    #[test]
    fn what_is_no_answer_to_it_is_not_taken_for_one() {
        let question = ask_for("example.com.", RecordType::A);
        let asked = Message::from_vec(&question).unwrap();
        let good = reply_to(&asked, ResponseCode::NoError);
        assert!(answers(&good.to_vec().unwrap(), &question));
        assert!(!answers(&question, &question), "a question is no answer");
        let mut other = good.clone();
        other.metadata.id ^= 1;
        assert!(!answers(&other.to_vec().unwrap(), &question));
        let mut other = good;
        other.queries = vec![Query::query(Name::from_ascii("evil.example.").unwrap(), RecordType::A)];
        assert!(!answers(&other.to_vec().unwrap(), &question));
        assert!(!answers(b"noise", &question));
    }
}
