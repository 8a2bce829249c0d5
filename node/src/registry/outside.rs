//! Images from registries outside of the mesh, over HTTPS (OCI distribution-spec 1.1, "Pulling"; tokens as in the distribution
//! project's "Token Authentication Specification").
//!
//! ```text
//! outside/<sha256>.part   a blob that is on its way; a later pull goes on where this one ends
//! outside/<sha256>        a blob that is whole and on the disk, until its image is in the store, or is found to be none
//! ```
//!
//! **Steps.** The manifest (of an index, the one for this kind of machine) → its blobs that the store has not, [`AT_ONCE`] at a
//! time, each checked against its digest and length → the import that a push ends with. **If it breaks off**, a blob is asked for
//! again from where it ended, [`TRIES`] times with longer and longer waits; after the daemon's death too. **Bounds.** A manifest of
//! [`MAX_MANIFEST`] bytes, blobs of the lengths that it states and [`MAX_BYTES`] in all; parts that nobody goes on with for
//! [`KEPT`] are deleted at the next start.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use moyai_protocol::reference::Reference;
use moyai_runtime::image::{ARCHITECTURE, digest_text, media, parse_digest};
use reqwest::{Client, Response, StatusCode, header};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tokio::io::AsyncWriteExt;

use super::{MAX_MANIFEST, for_this_machine};

/// Blobs fetched side by side.
const AT_ONCE: usize = 3;
const TRIES: u32 = 5;
/// The most bytes of one image's blobs.
const MAX_BYTES: u64 = 64 << 30;
/// Of a token's answer.
const MAX_TOKEN: usize = 64 * 1024;
const CONNECT: Duration = Duration::from_secs(10);
/// Without a byte for this long, it has broken off.
const STALL: Duration = Duration::from_secs(30);
const KEPT: Duration = Duration::from_secs(24 * 3600);
const DOCKER_HOST: &str = "docker.io";
const DOCKER_REGISTRY: &str = "registry-1.docker.io";

/// Who asks, at a registry that wants to know.
#[derive(Clone, Serialize, Deserialize)]
pub struct Credentials {
    /// A name.
    pub user: String,
    /// A password or token.
    pub password: String,
}

/// Why an image cannot be had from outside.
#[derive(Debug, thiserror::Error)]
pub enum OutsideError {
    /// The registry cannot be reached.
    #[error("the registry {host} cannot be reached: {reason}")]
    Unreachable {
        /// Which.
        host: String,
        /// What happened.
        reason: String,
    },
    /// What came, or was kept of it from before, is not what was named; it begins anew.
    #[error("what the registry {host} sent of {what} is damaged")]
    Broken {
        /// Which.
        host: String,
        /// The blob.
        what: String,
    },
    /// It wants to know who asks, or does not give it to whom that is.
    #[error("the registry {0} does not give it to whoever asks")]
    Denied(String),
    /// It has no such image.
    #[error("the registry {host} has no {what}")]
    Unknown {
        /// Which.
        host: String,
        /// What was asked for.
        what: String,
    },
    /// It answers something else than the specification says.
    #[error("the registry {host} answers {reason}")]
    Answer {
        /// Which.
        host: String,
        /// What.
        reason: String,
    },
    /// None of its images is for this kind of machine.
    #[error("it has no image for linux/{ARCHITECTURE}")]
    Platform,
    /// What was sent is not what was named.
    #[error("what the registry sent as {0} is something else")]
    Digest(String),
    /// No registry can be told from somebody who says to be it.
    #[error("this machine has no certificates to know the registry {host} by: {reason}")]
    Certificates {
        /// Which.
        host: String,
        /// What is wrong with them.
        reason: String,
    },
    /// The disk.
    #[error("cannot keep it: {0}")]
    Disk(#[from] io::Error),
}

/// What was pulled, to be imported.
pub struct Pulled {
    /// The manifest, verbatim.
    pub manifest: Bytes,
    /// Its media type.
    pub media_type: String,
    blobs: Vec<[u8; 32]>,
}

/// How far a pull is.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes that are here.
    pub here: AtomicU64,
    /// All of them; 0 until it is known.
    pub all: AtomicU64,
}

/// Locked by whoever fetches a blob.
type Alone = tokio::sync::Mutex<()>;

/// Pulls from outside.
#[derive(Clone)]
pub struct Outside {
    /// Made when it is needed: a machine without certificates may get some, and runs without.
    client: Arc<OnceLock<Client>>,
    dir: PathBuf,
    /// Blobs that are on their way; whoever else wants one waits.
    coming: Arc<Mutex<HashMap<[u8; 32], Weak<Alone>>>>,
}

/// One repository of a registry, for one pull.
struct Session<'a> {
    client: Client,
    host: String,
    /// `https://host/v2/repository`.
    base: String,
    repository: String,
    credentials: Option<&'a Credentials>,
    /// What is sent to say who asks.
    authorization: Option<String>,
}

#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

impl Outside {
    /// Keeps what is on its way in `dir`.
    pub fn new(dir: &Path) -> anyhow::Result<Outside> {
        fs::create_dir_all(dir)?;
        for entry in fs::read_dir(dir)?.flatten() {
            let age = entry.metadata().and_then(|meta| meta.modified()).ok().and_then(|time| time.elapsed().ok());
            if age.is_none_or(|age| age > KEPT) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(Outside { client: Arc::default(), dir: dir.to_owned(), coming: Arc::default() })
    }

    fn client(&self, reference: &Reference) -> Result<Client, OutsideError> {
        if let Some(client) = self.client.get() {
            return Ok(client.clone());
        }
        let agent = concat!("moyai/", env!("CARGO_PKG_VERSION"));
        let builder = || Client::builder().user_agent(agent).connect_timeout(CONNECT).read_timeout(STALL);
        let built = match builder().build() {
            Ok(client) => return Ok(self.client.get_or_init(|| client).clone()),
            // One that trusts nobody suffices where nobody is asked for a certificate.
            Err(_) if is_of_this_machine(reference) => builder().tls_certs_only([]).build(),
            failed => failed,
        };
        built.map_err(|error| {
            let (host, reason) = (host(reference).0.to_owned(), root_cause(&error));
            let reason = reason.strip_prefix("unexpected error: ").unwrap_or(&reason).to_owned();
            OutsideError::Certificates { host, reason }
        })
    }

    /// Fetches all of an image that `has` does not know.
    pub async fn pull(
        &self,
        reference: &Reference,
        credentials: Option<&Credentials>,
        has: &(dyn Fn(&[u8; 32]) -> bool + Sync),
        progress: &Progress,
    ) -> Result<Pulled, OutsideError> {
        let mut session = Session::new(self.client(reference)?, reference, credentials);
        let (mut manifest, mut media_type) = session.manifest(reference.tag()).await?;
        if media::is_index(&media_type) {
            let index: Value = serde_json::from_slice(&manifest).map_err(|error| session.wrong(error))?;
            let digest = for_this_machine(&index).ok_or(OutsideError::Platform)?.to_owned();
            (manifest, media_type) = session.manifest(&digest).await?;
            if Some(<[u8; 32]>::from(Sha256::digest(&manifest))) != parse_digest(&digest) {
                return Err(OutsideError::Digest(digest));
            }
        }
        if !media::is_manifest(&media_type) {
            return Err(session.wrong(format!("with a manifest of the type {media_type}")));
        }
        let parsed: Value = serde_json::from_slice(&manifest).map_err(|error| session.wrong(error))?;
        let layers = parsed["layers"].as_array().into_iter().flatten();
        let mut wanted: Vec<([u8; 32], u64)> = Vec::new();
        for descriptor in [&parsed["config"]].into_iter().chain(layers) {
            let digest = descriptor["digest"].as_str().and_then(parse_digest).zip(descriptor["size"].as_u64());
            wanted.push(digest.ok_or_else(|| session.wrong("with a part that has no sha256 digest or no size"))?);
        }
        wanted.sort_unstable();
        wanted.dedup();
        let all: u64 = wanted.iter().fold(0, |sum, (_, size)| sum.saturating_add(*size));
        if all > MAX_BYTES {
            return Err(session.wrong(format!("with an image of {all} bytes, {MAX_BYTES} being the most")));
        }
        progress.all.store(all, Ordering::Relaxed);
        let blobs = wanted.iter().map(|(digest, _)| *digest).collect();
        let session = &session;
        let mut fetches = futures::stream::iter(wanted.into_iter().map(|(digest, size)| async move {
            let alone = self.alone_with(&digest);
            let _alone = alone.lock().await;
            if has(&digest) {
                progress.here.fetch_add(size, Ordering::Relaxed);
                return Ok(());
            }
            self.blob(session, &digest, size, progress).await
        }))
        .buffer_unordered(AT_ONCE);
        while let Some(fetched) = fetches.next().await {
            fetched?;
        }
        Ok(Pulled { manifest, media_type, blobs })
    }

    /// To be locked by whoever fetches this blob: two pulls may want it.
    fn alone_with(&self, digest: &[u8; 32]) -> Arc<Alone> {
        let mut coming = self.coming.lock().unwrap_or_else(PoisonError::into_inner);
        coming.retain(|_, lock| lock.strong_count() > 0);
        if let Some(lock) = coming.get(digest).and_then(Weak::upgrade) {
            return lock;
        }
        let lock = Arc::default();
        coming.insert(*digest, Arc::downgrade(&lock));
        lock
    }

    async fn blob(
        &self,
        session: &Session<'_>,
        digest: &[u8; 32],
        size: u64,
        progress: &Progress,
    ) -> Result<(), OutsideError> {
        let whole = self.path(digest);
        if whole.exists() {
            progress.here.fetch_add(size, Ordering::Relaxed);
            return Ok(());
        }
        let part = whole.with_extension("part");
        let mut wait = Duration::from_millis(500);
        for last in (0..TRIES).map(|tried| tried + 1 == TRIES) {
            match self.blob_once(session, digest, size, &part, progress).await {
                Ok(()) => {
                    fs::rename(&part, &whole)?;
                    return Ok(());
                }
                Err(error @ (OutsideError::Unreachable { .. } | OutsideError::Broken { .. })) if !last => {
                    tracing::debug!(%error, "a blob from outside is asked for again");
                    tokio::time::sleep(wait).await;
                    wait *= 2;
                }
                Err(error) => return Err(error),
            }
        }
        unreachable!("the last try returns")
    }

    /// Asks for what is missing of a blob, and checks all of it.
    async fn blob_once(
        &self,
        session: &Session<'_>,
        digest: &[u8; 32],
        size: u64,
        part: &Path,
        progress: &Progress,
    ) -> Result<(), OutsideError> {
        let (mut hash, mut here) = (Sha256::new(), 0u64);
        let mut file = tokio::fs::File::options().append(true).read(true).create(true).open(part).await?;
        if let Ok(mut before) = fs::File::open(part) {
            here = tokio::task::block_in_place(|| io::copy(&mut before, &mut hash))?;
        }
        if here > size {
            file.set_len(0).await?;
            (hash, here) = (Sha256::new(), 0);
        }
        let (mut counted, resumed) = (here, here > 0);
        progress.here.fetch_add(here, Ordering::Relaxed);
        let result = async {
            if here < size {
                let response = session.get(&format!("/blobs/{}", digest_text(digest)), None, here).await?;
                if here > 0 && response.status() != StatusCode::PARTIAL_CONTENT {
                    // It begins anew, and so do we.
                    file.set_len(0).await?;
                    progress.here.fetch_sub(counted, Ordering::Relaxed);
                    (hash, here, counted) = (Sha256::new(), 0, 0);
                }
                let mut pieces = response.bytes_stream();
                while let Some(piece) = pieces.next().await {
                    let piece = piece.map_err(|error| session.unreachable(&error))?;
                    here += piece.len() as u64;
                    if here > size {
                        break;
                    }
                    hash.update(&piece);
                    file.write_all(&piece).await?;
                    counted += piece.len() as u64;
                    progress.here.fetch_add(piece.len() as u64, Ordering::Relaxed);
                }
            }
            // What another attempt was about to write when it was given up may still come: then it is longer than it should be.
            file.sync_all().await?;
            let extra = file.metadata().await?.len() > here.min(size);
            if here < size && !extra {
                return Err(session.broken("it sends less than it said"));
            }
            if extra || here > size || <[u8; 32]>::from(hash.finalize()) != *digest {
                fs::remove_file(part)?;
                // What was kept may be at fault; it is asked for from its beginning then.
                let what = digest_text(digest);
                return Err(match resumed || extra {
                    true => OutsideError::Broken { host: session.host.clone(), what },
                    false => OutsideError::Digest(what),
                });
            }
            Ok(())
        };
        let result = result.await;
        if result.is_err() {
            // Before another may open it.
            let _broken_anyway = file.flush().await;
            // It is counted again when it goes on.
            progress.here.fetch_sub(counted, Ordering::Relaxed);
        }
        result
    }

    fn path(&self, digest: &[u8; 32]) -> PathBuf {
        self.dir.join(data_encoding::HEXLOWER.encode(digest))
    }

    /// A blob that was pulled.
    pub fn read(&self, digest: &[u8; 32]) -> Option<(u64, Box<dyn Read + Send>)> {
        let file = fs::File::open(self.path(digest)).ok()?;
        let len = file.metadata().ok()?.len();
        Some((len, Box::new(io::BufReader::with_capacity(256 * 1024, file))))
    }

    /// Deletes what was pulled, which is in the store now or nothing that could be.
    pub fn forget(&self, pulled: &Pulled) {
        for digest in &pulled.blobs {
            // One that the store had already was never here.
            drop(fs::remove_file(self.path(digest)));
        }
    }
}

/// Whether its registry is at the loopback address: there each machine has its own.
pub fn is_of_this_machine(reference: &Reference) -> bool {
    let host = reference.name().split(['/', ':']).next().unwrap_or_default();
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// The registry that a name says, and what it is called there.
fn host(reference: &Reference) -> (&str, &str) {
    reference.name().split_once('/').unwrap_or((DOCKER_HOST, reference.name()))
}

/// The first error of a client's says where, those below it why.
fn root_cause(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(below) = cause.source() {
        cause = below;
    }
    cause.to_string()
}

impl<'a> Session<'a> {
    fn new(client: Client, reference: &Reference, credentials: Option<&'a Credentials>) -> Session<'a> {
        let (host, repository) = host(reference);
        // As docker does: this machine's own may do without TLS.
        let scheme = if is_of_this_machine(reference) { "http" } else { "https" };
        let server = if host == DOCKER_HOST { DOCKER_REGISTRY } else { host };
        let base = format!("{scheme}://{server}/v2/{repository}");
        let (host, repository) = (host.to_owned(), repository.to_owned());
        Session { client, host, base, repository, credentials, authorization: None }
    }

    fn wrong(&self, reason: impl ToString) -> OutsideError {
        OutsideError::Answer { host: self.host.clone(), reason: reason.to_string() }
    }

    fn broken(&self, reason: &str) -> OutsideError {
        OutsideError::Unreachable { host: self.host.clone(), reason: reason.to_owned() }
    }

    fn unreachable(&self, error: &reqwest::Error) -> OutsideError {
        self.broken(&root_cause(error))
    }

    /// A manifest by tag or digest, with its media type.
    async fn manifest(&mut self, at: &str) -> Result<(Bytes, String), OutsideError> {
        let path = format!("/manifests/{at}");
        let accept = media::ALL.join(", ");
        let response = match self.get(&path, Some(&accept), 0).await {
            Err(OutsideError::Denied(challenge)) if self.authorization.is_none() => {
                self.authorize(&challenge).await?;
                self.get(&path, Some(&accept), 0).await
            }
            response => response,
        };
        let response = response.map_err(|error| match error {
            OutsideError::Denied(_) => OutsideError::Denied(self.host.clone()),
            error => error,
        })?;
        let media_type = response.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let media_type = media_type.and_then(|text| text.split(';').next()).unwrap_or_default().trim().to_owned();
        Ok((self.body(response, MAX_MANIFEST).await?, media_type))
    }

    async fn body(&self, response: Response, most: usize) -> Result<Bytes, OutsideError> {
        let mut pieces = response.bytes_stream();
        let mut body = Vec::new();
        while let Some(piece) = pieces.next().await {
            let piece = piece.map_err(|error| self.unreachable(&error))?;
            if body.len() + piece.len() > most {
                return Err(self.wrong(format!("more than {most} bytes")));
            }
            body.extend_from_slice(&piece);
        }
        Ok(body.into())
    }

    /// GET, from byte `from` on. Denied carries what the registry wants to be shown.
    async fn get(&self, path: &str, accept: Option<&str>, from: u64) -> Result<Response, OutsideError> {
        let mut request = self.client.get(format!("{}{path}", self.base));
        if let Some(accept) = accept {
            request = request.header(header::ACCEPT, accept);
        }
        if let Some(authorization) = &self.authorization {
            request = request.header(header::AUTHORIZATION, authorization);
        }
        if from > 0 {
            request = request.header(header::RANGE, format!("bytes={from}-"));
        }
        let response = request.send().await.map_err(|error| self.unreachable(&error))?;
        match response.status() {
            status if status.is_success() => Ok(response),
            StatusCode::UNAUTHORIZED => {
                let challenge = response.headers().get(header::WWW_AUTHENTICATE).and_then(|value| value.to_str().ok());
                Err(OutsideError::Denied(challenge.unwrap_or_default().to_owned()))
            }
            StatusCode::FORBIDDEN => Err(OutsideError::Denied(self.host.clone())),
            StatusCode::NOT_FOUND => {
                let what = format!("{}{}", self.repository, path.replace("/manifests/", ":").replace("/blobs/", "@"));
                Err(OutsideError::Unknown { host: self.host.clone(), what })
            }
            status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
                Err(self.broken(&format!("it answers {status}")))
            }
            status => Err(self.wrong(status)),
        }
    }

    /// Finds out how to say who asks.
    async fn authorize(&mut self, challenge: &str) -> Result<(), OutsideError> {
        let denied = || OutsideError::Denied(self.host.clone());
        let basic = self.credentials.map(|who| {
            let pair = format!("{}:{}", who.user, who.password);
            format!("Basic {}", data_encoding::BASE64.encode(pair.as_bytes()))
        });
        let Some((scheme, parameters)) = challenge.split_once(' ') else { return Err(denied()) };
        if scheme.eq_ignore_ascii_case("basic") {
            self.authorization = Some(basic.ok_or_else(denied)?);
            return Ok(());
        }
        let realm = challenge_parameter(parameters, "realm").ok_or_else(denied)?;
        let url = reqwest::Url::parse_with_params(
            &realm,
            challenge_parameter(parameters, "service")
                .map(|service| ("service", service))
                .into_iter()
                .chain([("scope", format!("repository:{}:pull", self.repository))]),
        );
        let url = url.map_err(|error| self.wrong(format!("a place for tokens that is none: {error}")))?;
        if url.scheme() != "https" && !self.base.starts_with("http:") {
            // A password is not sent where anybody could read it.
            return Err(self.wrong("a place for tokens without TLS"));
        }
        let mut request = self.client.get(url);
        if let Some(basic) = basic {
            request = request.header(header::AUTHORIZATION, basic);
        }
        let response = request.send().await.map_err(|error| self.unreachable(&error))?;
        if !response.status().is_success() {
            return Err(denied());
        }
        let answer = self.body(response, MAX_TOKEN).await?;
        let token: Token = serde_json::from_slice(&answer).map_err(|error| self.wrong(error))?;
        let token = token.token.or(token.access_token).ok_or_else(denied)?;
        self.authorization = Some(format!("Bearer {token}"));
        Ok(())
    }
}

/// `name="value"` of a challenge (RFC 9110, 11.6.1).
fn challenge_parameter(parameters: &str, name: &str) -> Option<String> {
    let mut rest = parameters;
    loop {
        let (key, after) = rest.split_once('=')?;
        let (value, next) = match after.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"')?,
            None => after.split_once(',').map_or((after, ""), |(value, _)| (value, &after[value.len()..])),
        };
        if key.trim().eq_ignore_ascii_case(name) {
            return Some(value.to_owned());
        }
        rest = next.trim_start_matches([',', ' ']);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_challenge_is_read() {
        let text = r#"realm="https://auth.example/token?a=b,c",service=reg.example, scope="repository:a/b:pull""#;
        let of = |name| challenge_parameter(text, name);
        assert_eq!(of("realm").as_deref(), Some("https://auth.example/token?a=b,c"));
        assert_eq!(of("service").as_deref(), Some("reg.example"));
        assert_eq!(of("Scope").as_deref(), Some("repository:a/b:pull"));
        assert_eq!(of("error"), None);
    }

    #[test]
    fn only_this_machine_s_registry_goes_without_tls() {
        let client = Client::builder().tls_certs_only([]).build().expect("a client");
        let base = |name: &str| Session::new(client.clone(), &name.parse().expect("a name"), None).base;
        assert_eq!(base("alpine"), "https://registry-1.docker.io/v2/library/alpine");
        assert_eq!(base("reg.example:5000/a/b:1"), "https://reg.example:5000/v2/a/b");
        assert_eq!(base("localhost:5001/a"), "http://localhost:5001/v2/a");
        assert_eq!(base("127.0.0.1:5001/a"), "http://127.0.0.1:5001/v2/a");
    }
}
