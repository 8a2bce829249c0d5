//! A registry on each node: docker, podman, skopeo, containerd and others push to the mesh and pull from it, by the OCI
//! distribution specification 1.1. A name that is pushed here is a name of the mesh; what is pulled here and lies elsewhere is
//! fetched first, as what it was made of ([`moyai_runtime::image::Original`]), and given out bit for bit.
//!
//! **States of a push.** Blobs come one by one and are staged ([`uploads`]); the manifest that names them makes them one
//! original, and if it is one for this kind of machine also an image; then it has a name, which every node learns. A manifest
//! that is pushed by digest alone is staged too, for the index that will name it, unless it has a subject: then it is kept under
//! a name of its own, which starts with [`BY_DIGEST`], and shows among that subject's referrers.
//!
//! **Who may.** Whoever reaches the address may pull. Pushing gives images names that the whole mesh runs, so it is for root and
//! the daemon's user on this machine alone: the kernel says whose the other end of a loopback connection is.
//!
//! **If a side dies.** A client that vanishes leaves an upload that it may resume for an hour; a daemon that dies forgets what
//! was staged, and clients begin again: nothing has a name before all of it is in the store.

mod deleted;
mod door;
pub mod outside;
mod referrers;
mod uploads;

use std::io::Read;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::connect_info::Connected;
use axum::extract::{ConnectInfo, Request, State as AxumState};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::serve::IncomingStream;
use bytes::Bytes;
use moyai_protocol::catalog::{Hlc, ImageHeld};
use moyai_protocol::contract::Command;
use moyai_protocol::id::{ChunkId, ImageId};
use moyai_protocol::reference::Reference;
use moyai_runtime::image::{self, ARCHITECTURE, ImportError, Limits, Pushed, digest_text, media, parse_digest};
use moyai_runtime::store::Store;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;

use crate::api::{server::original_held, view};
use crate::daemon::driver::Handle;
use crate::daemon::images::Images;
use crate::net::data::DataPlane;
use deleted::Deleted;
use door::Door;
use referrers::Referrers;
use uploads::{Upload, UploadError, Uploads};

/// Where it listens when nothing else is said.
pub const USUAL: &str = "127.0.0.1:5000";
/// The most bytes of a manifest, as the specification asks for.
pub(crate) const MAX_MANIFEST: usize = 4 << 20;
/// How a manifest that was pushed by digest is tagged.
const BY_DIGEST: &str = "sha256.";
/// Names of one answer.
const PAGE: usize = 1000;
const PIECE: usize = 256 * 1024;
const QUEUE: usize = 8;
/// Blobs that are given out at one time; each takes a thread.
const MAX_READERS: usize = 16;
/// How long a reader may take nothing.
const STALL: Duration = Duration::from_secs(30);
const EXPIRY: Duration = Duration::from_secs(60);

/// What requests need.
#[derive(Clone)]
pub struct Registry {
    handle: Handle,
    store: Arc<Store>,
    images: Images,
    uploads: Arc<Uploads>,
    deleted: Deleted,
    readers: Arc<Semaphore>,
    referrers: Arc<Referrers>,
}

/// An answer that is an error, as the specification shapes it.
struct Refusal(StatusCode, &'static str, String);

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let Refusal(status, code, message) = self;
        let body = json!({"errors": [{"code": code, "message": message, "detail": null}]});
        (status, [(header::CONTENT_TYPE, "application/json")], body.to_string()).into_response()
    }
}

impl From<UploadError> for Refusal {
    fn from(error: UploadError) -> Refusal {
        let (status, code) = match &error {
            UploadError::Unknown => (StatusCode::NOT_FOUND, "BLOB_UPLOAD_UNKNOWN"),
            UploadError::TooMany => (StatusCode::TOO_MANY_REQUESTS, "TOOMANYREQUESTS"),
            UploadError::Broken(_) => (StatusCode::BAD_REQUEST, "BLOB_UPLOAD_INVALID"),
            UploadError::Range(_) => (StatusCode::RANGE_NOT_SATISFIABLE, "BLOB_UPLOAD_INVALID"),
            UploadError::TooLong => (StatusCode::PAYLOAD_TOO_LARGE, "SIZE_INVALID"),
            UploadError::Digest(_) => (StatusCode::BAD_REQUEST, "DIGEST_INVALID"),
            UploadError::Disk(_) => (StatusCode::INSUFFICIENT_STORAGE, "UNKNOWN"),
        };
        Refusal(status, code, error.to_string())
    }
}

type Answer = Result<Response, Refusal>;

fn unknown_manifest(reference: &str) -> Refusal {
    Refusal(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN", format!("the mesh has no manifest {reference} there"))
}

fn unknown_blob(digest: &str) -> Refusal {
    Refusal(StatusCode::NOT_FOUND, "BLOB_UNKNOWN", format!("no blob {digest} is here"))
}

fn internal(error: impl std::fmt::Display) -> Refusal {
    Refusal(StatusCode::INTERNAL_SERVER_ERROR, "UNKNOWN", error.to_string())
}

fn stopping<T>(answer: Result<T, crate::daemon::driver::Stopping>) -> Result<T, Refusal> {
    answer.map_err(|_| Refusal(StatusCode::SERVICE_UNAVAILABLE, "UNKNOWN", "the daemon ends".to_owned()))
}

/// Starts to listen.
pub async fn start(
    address: &str,
    handle: Handle,
    store: Arc<Store>,
    images: Images,
    plane: Arc<DataPlane>,
    dir: &Path,
) -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
    let local = listener.local_addr()?;
    let uploads = Arc::new(Uploads::new(dir).with_context(|| format!("cannot make {}", dir.display()))?);
    let readers = Arc::new(Semaphore::new(MAX_READERS));
    let referrers = Arc::new(Referrers::new(handle.clone(), Arc::clone(&store), plane));
    let registry = Registry {
        handle,
        store,
        images,
        uploads: Arc::clone(&uploads),
        deleted: Deleted::default(),
        readers,
        referrers,
    };
    tokio::spawn(async move {
        let mut round = tokio::time::interval(EXPIRY);
        loop {
            round.tick().await;
            uploads.expire();
        }
    });
    let router = Router::new().fallback(answer).with_state(registry);
    let service = router.into_make_service_with_connect_info::<Ends>();
    tokio::spawn(async move {
        if let Err(error) = axum::serve(Door::new(listener), service).await {
            tracing::error!(%error, "the registry ended");
        }
    });
    Ok(local)
}

/// Both ends of a connection.
#[derive(Clone)]
struct Ends {
    answering: door::Answering,
    peer: SocketAddr,
    /// `None` when it has ended already.
    local: Option<SocketAddr>,
}

impl Connected<IncomingStream<'_, Door>> for Ends {
    fn connect_info(stream: IncomingStream<'_, Door>) -> Ends {
        let answering = stream.io().answering().clone();
        Ends { answering, peer: *stream.remote_addr(), local: stream.io().local() }
    }
}

/// What a path asks for.
enum Target<'a> {
    Version,
    Catalog,
    Tags(&'a str),
    Referrers(&'a str, &'a str),
    Manifest(&'a str, &'a str),
    Blob(&'a str, &'a str),
    Uploads(&'a str),
    Upload(&'a str, &'a str),
}

/// Repository names have slashes, so paths are read from their end.
fn target(path: &str) -> Option<Target<'_>> {
    let rest = path.strip_prefix("/v2")?;
    if rest.is_empty() || rest == "/" {
        return Some(Target::Version);
    }
    let rest = rest.strip_prefix('/')?;
    if rest == "_catalog" {
        return Some(Target::Catalog);
    }
    if let Some(name) = rest.strip_suffix("/tags/list") {
        return Some(Target::Tags(name));
    }
    if let Some(name) = rest.strip_suffix("/blobs/uploads/").or_else(|| rest.strip_suffix("/blobs/uploads")) {
        return Some(Target::Uploads(name));
    }
    let (before, last) = rest.rsplit_once('/')?;
    if let Some(name) = before.strip_suffix("/blobs/uploads") {
        return Some(Target::Upload(name, last));
    }
    let (name, kind) = before.rsplit_once('/')?;
    match kind {
        "referrers" => Some(Target::Referrers(name, last)),
        "manifests" => Some(Target::Manifest(name, last)),
        "blobs" => Some(Target::Blob(name, last)),
        _ => None,
    }
}

async fn answer(
    AxumState(registry): AxumState<Registry>,
    ConnectInfo(ends): ConnectInfo<Ends>,
    request: Request,
) -> Response {
    let _answered = ends.answering.begin();
    // Goes on to its end when the client vanishes, so that what came of an upload is kept.
    let routed = tokio::spawn(async move { registry.route(ends, request).await }).await;
    let mut response = routed.map_err(internal).flatten().unwrap_or_else(IntoResponse::into_response);
    let version =
        (HeaderName::from_static("docker-distribution-api-version"), HeaderValue::from_static("registry/2.0"));
    response.headers_mut().insert(version.0, version.1);
    response
}

/// A parameter of the query, decoded.
fn parameter(query: &str, name: &str) -> Option<String> {
    let value = query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))?;
    let mut bytes = Vec::new();
    let mut rest = value.bytes();
    while let Some(byte) = rest.next() {
        let decoded = match byte {
            b'%' => {
                let hex = [rest.next()?, rest.next()?];
                u8::from_str_radix(std::str::from_utf8(&hex).ok()?, 16).ok()?
            }
            b'+' => b' ',
            byte => byte,
        };
        bytes.push(decoded);
    }
    String::from_utf8(bytes).ok()
}

/// A repository and a tag, as a name of the mesh.
fn reference(name: &str, tag: &str) -> Result<Reference, Refusal> {
    let wrong = |error| Refusal(StatusCode::BAD_REQUEST, "NAME_INVALID", format!("{error}"));
    format!("{name}:{tag}").parse().map_err(|error: moyai_protocol::reference::ReferenceError| wrong(error))
}

fn digest_of(text: &str) -> Result<[u8; 32], Refusal> {
    let wrong = || Refusal(StatusCode::BAD_REQUEST, "DIGEST_INVALID", format!("`{text}` is no sha256 digest"));
    parse_digest(text).ok_or_else(wrong)
}

impl Registry {
    async fn route(&self, ends: Ends, request: Request) -> Answer {
        let (parts, body) = request.into_parts();
        let (path, query) = (parts.uri.path().to_owned(), parts.uri.query().unwrap_or_default().to_owned());
        let not_found = || Refusal(StatusCode::NOT_FOUND, "UNSUPPORTED", format!("there is nothing at {path}"));
        let target = target(&path).ok_or_else(not_found)?;
        let reads = parts.method == Method::GET || parts.method == Method::HEAD;
        if !reads {
            let owner = tokio::task::spawn_blocking(move || may_write(ends)).await;
            owner.map_err(internal)??;
        }
        let headers = &parts.headers;
        let head = parts.method == Method::HEAD;
        match (target, &parts.method) {
            (Target::Version, _) if reads => Ok(StatusCode::OK.into_response()),
            (Target::Catalog, _) if reads => self.catalog(&query).await,
            (Target::Tags(name), _) if reads => self.tags(name, &query).await,
            (Target::Referrers(name, digest), _) if reads => self.referrers(name, digest, &query).await,
            (Target::Manifest(name, at), _) if reads => self.manifest(name, at, head).await,
            (Target::Manifest(name, at), &Method::PUT) => self.put_manifest(name, at, headers, body).await,
            (Target::Manifest(name, at), &Method::DELETE) => self.delete_manifest(name, at).await,
            (Target::Blob(name, digest), _) if reads => self.blob(name, digest, headers, head).await,
            (Target::Blob(_, digest), &Method::DELETE) => self.delete_blob(digest).await,
            (Target::Uploads(name), &Method::POST) => self.begin(name, &query, body).await,
            (Target::Upload(name, id), &Method::PATCH) => self.add(name, id, headers, body).await,
            (Target::Upload(name, id), &Method::PUT) => self.finish(name, id, &query, headers, body).await,
            (Target::Upload(name, id), &Method::GET) => self.status(name, id),
            (Target::Upload(_, id), &Method::DELETE) => {
                self.uploads.cancel(id)?;
                Ok(StatusCode::NO_CONTENT.into_response())
            }
            _ => Err(Refusal(
                StatusCode::METHOD_NOT_ALLOWED,
                "UNSUPPORTED",
                format!("{} is not done to {path}", parts.method),
            )),
        }
    }

    // What there is.

    async fn names(&self) -> Result<Vec<ImageHeld>, Refusal> {
        stopping(self.handle.ask(|node, _| view::all_named(node)).await)
    }

    async fn repository(&self, name: &str) -> Result<Vec<ImageHeld>, Refusal> {
        let any = reference(name, "latest")?;
        let mut held = self.names().await?;
        held.retain(|image| image.reference.name() == any.name() && image.original.is_some());
        Ok(held)
    }

    async fn catalog(&self, query: &str) -> Answer {
        let mut names: Vec<String> = Vec::new();
        for image in self.names().await?.iter().filter(|image| image.original.is_some()) {
            let familiar = image.reference.familiar();
            names.extend(familiar.rsplit_once(':').map(|(name, _)| name.to_owned()));
        }
        names.sort();
        names.dedup();
        page(names, query, "/v2/_catalog", |names| json!({"repositories": names}))
    }

    async fn tags(&self, name: &str, query: &str) -> Answer {
        let held = self.repository(name).await?;
        if held.is_empty() {
            return Err(Refusal(
                StatusCode::NOT_FOUND,
                "NAME_UNKNOWN",
                format!("the mesh has no images called {name}"),
            ));
        }
        let tags = held.iter().map(|image| image.reference.tag().to_owned());
        let mut tags: Vec<String> = tags.filter(|tag| !tag.starts_with(BY_DIGEST)).collect();
        tags.sort();
        page(tags, query, &format!("/v2/{name}/tags/list"), |tags| json!({"name": name, "tags": tags}))
    }

    async fn referrers(&self, name: &str, digest: &str, query: &str) -> Answer {
        digest_of(digest)?;
        let wanted = parameter(query, "artifactType");
        let all = self.repository(name).await?;
        let manifests = self.referrers.of(&all, digest, wanted.as_deref()).await.map_err(internal)?;
        let index = json!({"schemaVersion": 2, "mediaType": media::INDEX, "manifests": manifests});
        let mut response = ([(header::CONTENT_TYPE, media::INDEX)], index.to_string()).into_response();
        if wanted.is_some() {
            let name = HeaderName::from_static("oci-filters-applied");
            response.headers_mut().insert(name, HeaderValue::from_static("artifactType"));
        }
        Ok(response)
    }

    /// A manifest that is here: its media type and bytes.
    async fn read_manifest(&self, digest: &[u8; 32]) -> Result<Option<(String, Vec<u8>)>, Refusal> {
        let (store, uploads, digest) = (Arc::clone(&self.store), Arc::clone(&self.uploads), *digest);
        let read = tokio::task::spawn_blocking(move || -> anyhow::Result<Option<(String, Vec<u8>)>> {
            if let Some(staged) = uploads.blob(&digest).filter(|staged| !staged.media_type.is_empty()) {
                let mut bytes = Vec::new();
                let (_, mut file) = uploads.read(&digest).context("it has just been deleted")?;
                file.read_to_end(&mut bytes)?;
                return Ok(Some((staged.media_type, bytes)));
            }
            held_manifest(&store, &digest)
        });
        read.await.map_err(internal)?.map_err(internal)
    }

    fn is_staged(&self, digest: &[u8; 32]) -> bool {
        self.uploads.blob(digest).is_some_and(|staged| !staged.media_type.is_empty())
    }

    /// Whether a repository with these names may still give out a manifest that none of them is for.
    fn is_left(&self, all: &[ImageHeld], repository: &Reference, digest: &[u8; 32]) -> bool {
        latest(all).is_some_and(|now| !self.deleted.has(repository.name(), digest, now))
    }

    async fn manifest(&self, name: &str, at: &str, head: bool) -> Answer {
        let digest = match parse_digest(at) {
            Some(digest) => {
                let (all, repository) = (self.repository(name).await?, reference(name, "latest")?);
                // Another node may have it, under any tag. What a tag has moved on from may be here yet, and so is what an index
                // lists; whether it was this repository's is not known.
                if let Some(held) = all.iter().find(|image| is_of(image, &digest)) {
                    if self.read_manifest(&digest).await?.is_none() {
                        self.images.original(held).await.map_err(internal)?;
                    }
                } else if !self.is_staged(&digest) && !self.is_left(&all, &repository, &digest) {
                    return Err(unknown_manifest(at));
                }
                digest
            }
            None => {
                let reference = reference(name, at)?;
                let held = stopping(self.handle.ask(move |node, _| view::find_reference(node, &reference)).await)?;
                let held = held.filter(|held| held.original.is_some()).ok_or_else(|| unknown_manifest(at))?;
                self.images.original(&held).await.map_err(internal)?.manifest().digest
            }
        };
        let (media_type, bytes) = self.read_manifest(&digest).await?.ok_or_else(|| unknown_manifest(at))?;
        let len = bytes.len();
        let body = if head { Body::empty() } else { Body::from(bytes) };
        Response::builder()
            .header(header::CONTENT_TYPE, media_type)
            .header(header::CONTENT_LENGTH, len)
            .header("docker-content-digest", digest_text(&digest))
            .body(body)
            .map_err(internal)
    }

    async fn blob(&self, name: &str, text: &str, headers: &HeaderMap, head: bool) -> Answer {
        reference(name, "latest")?;
        let digest = digest_of(text)?;
        let (store, uploads) = (Arc::clone(&self.store), Arc::clone(&self.uploads));
        let found = tokio::task::spawn_blocking(move || -> anyhow::Result<Option<(u64, Box<dyn Read + Send>)>> {
            if let Some((blob, reader)) = store.blob(&digest)? {
                return Ok(Some((blob.size, Box::new(reader))));
            }
            Ok(uploads.read(&digest))
        });
        let (size, reader) = found.await.map_err(internal)?.map_err(internal)?.ok_or_else(|| unknown_blob(text))?;
        let range = headers.get(header::RANGE).and_then(|range| range.to_str().ok());
        // Of several at once, all is given (RFC 9110, 14.2 lets a server).
        let range = range.filter(|range| !range.contains(',')).map(|range| part(range, size));
        let response = Response::builder()
            .header(header::CONTENT_TYPE, "application/octet-stream")
            .header(header::ACCEPT_RANGES, "bytes")
            .header("docker-content-digest", text);
        let (from, len) = match range {
            Some(None) => {
                let response =
                    Refusal(StatusCode::RANGE_NOT_SATISFIABLE, "BLOB_UNKNOWN", format!("it has {size} bytes"));
                return Err(response);
            }
            Some(Some(part)) => part,
            None => (0, size),
        };
        let response = response.header(header::CONTENT_LENGTH, len);
        let response = match range {
            Some(_) => response
                .status(StatusCode::PARTIAL_CONTENT)
                .header(header::CONTENT_RANGE, format!("bytes {from}-{}/{size}", from + len - 1)),
            None => response,
        };
        let body = if head {
            Body::empty()
        } else {
            let readers = Arc::clone(&self.readers).acquire_owned().await.map_err(internal)?;
            stream(reader, from, len, readers)
        };
        response.body(body).map_err(internal)
    }

    // What comes.

    fn location(name: &str, upload: &Upload, status: StatusCode) -> Answer {
        Response::builder()
            .status(status)
            .header(header::LOCATION, format!("/v2/{name}/blobs/uploads/{}", upload.id()))
            .header(header::RANGE, format!("0-{}", upload.len().saturating_sub(1)))
            .header("docker-upload-uuid", upload.id())
            .body(Body::empty())
            .map_err(internal)
    }

    fn created(name: &str, kind: &str, digest: &str) -> Answer {
        Response::builder()
            .status(StatusCode::CREATED)
            .header(header::LOCATION, format!("/v2/{name}/{kind}/{digest}"))
            .header("docker-content-digest", digest)
            .body(Body::empty())
            .map_err(internal)
    }

    async fn begin(&self, name: &str, query: &str, body: Body) -> Answer {
        reference(name, "latest")?;
        if let Some(digest) = parameter(query, "mount").and_then(|text| parse_digest(&text)) {
            let store = Arc::clone(&self.store);
            let known = tokio::task::spawn_blocking(move || store.blob(&digest)).await;
            if self.uploads.blob(&digest).is_some() || known.map_err(internal)?.map_err(internal)?.is_some() {
                return Self::created(name, "blobs", &digest_text(&digest));
            }
        }
        let mut upload = self.uploads.begin().await?;
        if let Some(text) = parameter(query, "digest") {
            let digest = digest_of(&text)?;
            upload.add(body, None).await?;
            self.uploads.finish(upload, &digest, "").await?;
            return Self::created(name, "blobs", &text);
        }
        let answer = Self::location(name, &upload, StatusCode::ACCEPTED);
        self.uploads.put_back(upload);
        answer
    }

    fn status(&self, name: &str, id: &str) -> Answer {
        let len = self.uploads.len(id).ok_or(UploadError::Unknown)?;
        Response::builder()
            .status(StatusCode::NO_CONTENT)
            .header(header::LOCATION, format!("/v2/{name}/blobs/uploads/{id}"))
            .header(header::RANGE, format!("0-{}", len.saturating_sub(1)))
            .header("docker-upload-uuid", id)
            .body(Body::empty())
            .map_err(internal)
    }

    async fn add(&self, name: &str, id: &str, headers: &HeaderMap, body: Body) -> Answer {
        let mut upload = self.uploads.take(id)?;
        let added = upload.add(body, begins_at(headers)).await;
        let answer = match added {
            Ok(()) => Self::location(name, &upload, StatusCode::ACCEPTED),
            Err(error @ UploadError::Range(_)) => {
                let mut response = Refusal::from(error).into_response();
                let range = HeaderValue::try_from(format!("0-{}", upload.len().saturating_sub(1))).map_err(internal)?;
                response.headers_mut().insert(header::RANGE, range);
                Ok(response)
            }
            Err(error) => Err(error.into()),
        };
        self.uploads.put_back(upload);
        answer
    }

    async fn finish(&self, name: &str, id: &str, query: &str, headers: &HeaderMap, body: Body) -> Answer {
        let text = parameter(query, "digest").unwrap_or_default();
        let digest = digest_of(&text)?;
        let mut upload = self.uploads.take(id)?;
        if let Err(error) = upload.add(body, begins_at(headers)).await {
            self.uploads.put_back(upload);
            return Err(error.into());
        }
        self.uploads.finish(upload, &digest, "").await?;
        Self::created(name, "blobs", &text)
    }

    async fn put_manifest(&self, name: &str, at: &str, headers: &HeaderMap, body: Body) -> Answer {
        let invalid = |reason: String| Refusal(StatusCode::BAD_REQUEST, "MANIFEST_INVALID", reason);
        let bytes = to_bytes(body, MAX_MANIFEST).await.map_err(|_| {
            Refusal(
                StatusCode::PAYLOAD_TOO_LARGE,
                "SIZE_INVALID",
                format!("a manifest of more than {MAX_MANIFEST} bytes"),
            )
        })?;
        let parsed: Value = serde_json::from_slice(&bytes).map_err(|error| invalid(error.to_string()))?;
        if !parsed.is_object() {
            return Err(invalid("a manifest is a JSON object".to_owned()));
        }
        let media_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let media_type = media_type.or_else(|| parsed["mediaType"].as_str()).unwrap_or(media::MANIFEST).to_owned();
        if !media::is_index(&media_type) && !media::is_manifest(&media_type) {
            return Err(invalid(format!("`{media_type}` is no manifest that is known here")));
        }
        let digest: [u8; 32] = Sha256::digest(&bytes).into();
        let subject = parsed["subject"]["digest"].as_str().map(str::to_owned);
        let tag = match parse_digest(at) {
            Some(expected) if expected != digest => {
                let reason = format!("the manifest's digest is {}", digest_text(&digest));
                return Err(Refusal(StatusCode::BAD_REQUEST, "DIGEST_INVALID", reason));
            }
            Some(_) => format!("{BY_DIGEST}{}", data_encoding::HEXLOWER.encode(&digest)),
            None => at.to_owned(),
        };
        let reference = reference(name, &tag)?;
        if parse_digest(at).is_some() && subject.is_none() {
            let mut upload = self.uploads.begin().await?;
            upload.add(Body::from(bytes), None).await?;
            self.uploads.finish(upload, &digest, &media_type).await?;
        } else {
            self.keep(bytes, media_type, reference).await?;
        }
        let mut response = Self::created(name, "manifests", &digest_text(&digest))?;
        if let Some(subject) = subject.and_then(|subject| HeaderValue::try_from(subject).ok()) {
            response.headers_mut().insert(HeaderName::from_static("oci-subject"), subject);
        }
        Ok(response)
    }

    /// Makes what a manifest names an original and, if it is one, an image; and gives it its name.
    async fn keep(&self, bytes: Bytes, media_type: String, reference: Reference) -> Result<(), Refusal> {
        let (store, uploads) = (Arc::clone(&self.store), Arc::clone(&self.uploads));
        // Until it has its name, nothing else says that it is needed.
        let _kept = store.hold();
        let imported = tokio::task::spawn_blocking(move || {
            let open = |digest: &[u8; 32]| uploads.read(digest).or_else(|| read_held(&store, digest));
            let pushed = image::import_pushed(&bytes, &media_type, &open, &store, Limits::default());
            if let Ok(pushed) = &pushed
                && let Ok(Some(original)) = store.original(&pushed.original.root)
            {
                original.blobs.iter().for_each(|blob| uploads.forget(&blob.digest));
            }
            pushed
        });
        let pushed = imported.await.map_err(internal)?.map_err(|error| match &error {
            ImportError::Missing { name } => {
                Refusal(StatusCode::NOT_FOUND, "MANIFEST_BLOB_UNKNOWN", format!("{name} has not been pushed"))
            }
            ImportError::Store(store) if store.is_full() => {
                Refusal(StatusCode::INSUFFICIENT_STORAGE, "UNKNOWN", error.to_string())
            }
            ImportError::Store(_) => internal(&error),
            _ => Refusal(StatusCode::BAD_REQUEST, "MANIFEST_INVALID", error.to_string()),
        })?;
        let held = held_as(reference, &pushed);
        let named = stopping(self.handle.command(Command::ImageAdded(held)).await)?;
        named.map(drop).map_err(|refused| Refusal(StatusCode::FORBIDDEN, "DENIED", refused.to_string()))
    }

    async fn delete_manifest(&self, name: &str, at: &str) -> Answer {
        let digest = parse_digest(at);
        let (all, repository) = (self.repository(name).await?, reference(name, "latest")?);
        let is_doomed = |image: &&ImageHeld| match digest {
            Some(digest) => is_of(image, &digest),
            None => image.reference.tag() == at,
        };
        let doomed: Vec<Reference> = all.iter().filter(is_doomed).map(|image| image.reference.clone()).collect();
        if doomed.is_empty() {
            let is_given_out = match digest {
                Some(digest) if self.is_staged(&digest) => true,
                // What a tag has moved on from.
                Some(digest) if self.is_left(&all, &repository, &digest) => {
                    self.read_manifest(&digest).await?.is_some()
                }
                _ => false,
            };
            if !is_given_out {
                return Err(unknown_manifest(at));
            }
        }
        for reference in &doomed {
            let asked = reference.clone();
            let users = stopping(self.handle.ask(move |node, _| view::users_of(node, &asked)).await)?;
            if let Some(user) = users.first() {
                let reason = format!("{} is used by {user}: `moyai rm {user}` first", reference.familiar());
                return Err(Refusal(StatusCode::FORBIDDEN, "DENIED", reason));
            }
        }
        if let Some(digest) = digest {
            self.uploads.forget(&digest);
            self.deleted.insert(repository.name(), digest, latest(&all).unwrap_or_default());
        }
        for reference in doomed {
            let unnamed = stopping(self.handle.command(Command::Unname(reference)).await)?;
            unnamed.map_err(|refused| Refusal(StatusCode::FORBIDDEN, "DENIED", refused.to_string()))?;
        }
        Ok(StatusCode::ACCEPTED.into_response())
    }

    async fn delete_blob(&self, text: &str) -> Answer {
        let digest = digest_of(text)?;
        if self.uploads.blob(&digest).is_some() {
            self.uploads.forget(&digest);
            return Ok(StatusCode::ACCEPTED.into_response());
        }
        let store = Arc::clone(&self.store);
        let known = tokio::task::spawn_blocking(move || store.blob(&digest).map(|found| found.is_some())).await;
        match known.map_err(internal)?.map_err(internal)? {
            true => Err(Refusal(
                StatusCode::METHOD_NOT_ALLOWED,
                "UNSUPPORTED",
                "a blob goes with the last image that has it: delete its manifests".to_owned(),
            )),
            false => Err(unknown_blob(text)),
        }
    }
}

/// A manifest of an original that is here: its media type and bytes.
fn held_manifest(store: &Store, digest: &[u8; 32]) -> anyhow::Result<Option<(String, Vec<u8>)>> {
    let Some((blob, mut reader)) = store.blob(digest)? else { return Ok(None) };
    if blob.media_type.is_empty() || blob.size > MAX_MANIFEST as u64 {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes)?;
    Ok(Some((blob.media_type, bytes)))
}

/// A blob of an original that is here, as an import reads it.
pub(crate) fn read_held(store: &Store, digest: &[u8; 32]) -> Option<(u64, Box<dyn Read + Send>)> {
    let (blob, reader) = store.blob(digest).ok().flatten()?;
    Some((blob.size, Box::new(reader)))
}

/// The digest of the image for this kind of machine, as an index names it.
pub(crate) fn for_this_machine(index: &Value) -> Option<&str> {
    let fits = |one: &&Value| one["platform"]["os"] == "linux" && one["platform"]["architecture"] == ARCHITECTURE;
    index["manifests"].as_array()?.iter().find(fits)?["digest"].as_str()
}

/// When the latest of these names was given.
fn latest(all: &[ImageHeld]) -> Option<Hlc> {
    all.iter().map(|image| image.named).max()
}

/// Whether it is this manifest that an image was made of.
fn is_of(image: &ImageHeld, digest: &[u8; 32]) -> bool {
    image.original.as_ref().is_some_and(|original| original.digest.0 == *digest)
}

/// What was pushed, or pulled from outside, under its name.
pub(crate) fn held_as(reference: Reference, pushed: &Pushed) -> ImageHeld {
    let original = original_held(&pushed.original);
    let (id, root, size) = match pushed.image {
        Some((id, root, size)) => (ImageId(id), ChunkId(root), size),
        None => (original.digest, original.root, original.size),
    };
    let here = pushed.image.is_some();
    ImageHeld { reference, id, root, size, named: Hlc::default(), here, original: Some(original) }
}

/// Whether the other end of a connection is root's on this machine, or the daemon's user's.
fn may_write(ends: Ends) -> Result<(), Refusal> {
    let owner = ends.local.and_then(|local| moyai_runtime::host::socket_owner(ends.peer, local));
    let own = moyai_runtime::host::own_user();
    match owner.filter(|_| ends.peer.ip().to_canonical().is_loopback()) {
        Some(user) if user == 0 || user == own => Ok(()),
        Some(user) => {
            let reason = format!("only root may push to the mesh from this machine, and this is user {user}");
            Err(Refusal(StatusCode::FORBIDDEN, "DENIED", reason))
        }
        None => {
            let reason =
                "pushing is for this machine's root, over its loopback address: push to a node's own 127.0.0.1";
            Err(Refusal(StatusCode::FORBIDDEN, "DENIED", reason.to_owned()))
        }
    }
}

/// Where the bytes of a request begin in the upload, if it says so: `<first>-<last>`.
fn begins_at(headers: &HeaderMap) -> Option<u64> {
    let range = headers.get(header::CONTENT_RANGE)?.to_str().ok()?;
    range.trim_start_matches("bytes ").split('-').next()?.trim().parse().ok()
}

/// The first byte and the length of the one range that is asked for (RFC 9110, 14.1.2); `None` when there is none such.
fn part(range: &str, size: u64) -> Option<(u64, u64)> {
    let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
    let (first, last) = match (first.trim(), last.trim()) {
        ("", count) => (size.saturating_sub(count.parse().ok()?), size.checked_sub(1)?),
        (first, "") => (first.parse().ok()?, size.checked_sub(1)?),
        (first, last) => (first.parse().ok()?, last.parse::<u64>().ok()?.min(size.checked_sub(1)?)),
    };
    (first <= last).then(|| (first, last - first + 1))
}

/// Sends `len` bytes of what is read, from `from` on.
fn stream(mut reader: Box<dyn Read + Send>, from: u64, len: u64, place: OwnedSemaphorePermit) -> Body {
    let (pieces, receiver) = mpsc::channel::<std::io::Result<Bytes>>(QUEUE);
    let runtime = tokio::runtime::Handle::current();
    tokio::task::spawn_blocking(move || {
        let _place = place;
        let (mut skip, mut error) = (from, None);
        while skip > 0 && error.is_none() && !pieces.is_closed() {
            let step = skip.min(PIECE as u64);
            error = std::io::copy(&mut reader.by_ref().take(step), &mut std::io::sink()).err();
            skip -= step;
        }
        let mut left = len;
        while left > 0 && error.is_none() {
            let mut piece = vec![0; PIECE.min(usize::try_from(left).unwrap_or(PIECE))];
            match reader.read(&mut piece) {
                Ok(0) => error = Some(std::io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => {
                    piece.truncate(read);
                    left -= read as u64;
                    // Whoever takes nothing for that long has gone, or keeps others waiting.
                    let sent = runtime.block_on(tokio::time::timeout(STALL, pieces.send(Ok(piece.into()))));
                    if !matches!(sent, Ok(Ok(()))) {
                        return;
                    }
                }
                Err(wrong) => error = Some(wrong),
            }
        }
        if let Some(error) = error {
            // Whoever reads sees the answer break off.
            drop(pieces.try_send(Err(error)));
        }
    });
    Body::from_stream(ReceiverStream::new(receiver))
}

/// The part of a list that is asked for by `n` and `last`, with the way to the next one.
fn page(mut all: Vec<String>, query: &str, path: &str, body: impl Fn(&[String]) -> Value) -> Answer {
    let count = match parameter(query, "n") {
        Some(text) => text.parse::<usize>().map_err(|_| {
            Refusal(StatusCode::BAD_REQUEST, "PAGINATION_NUMBER_INVALID", format!("`{text}` is no number"))
        })?,
        None => PAGE,
    };
    if let Some(last) = parameter(query, "last") {
        all.retain(|name| *name > last);
    }
    let more = all.len() > count.min(PAGE);
    all.truncate(count.min(PAGE));
    let mut response = ([(header::CONTENT_TYPE, "application/json")], body(&all).to_string()).into_response();
    if let Some(last) = all.last().filter(|_| more) {
        let link = format!("<{path}?n={count}&last={last}>; rel=\"next\"");
        response.headers_mut().insert(header::LINK, HeaderValue::try_from(link).map_err(internal)?);
    }
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_read_from_its_end() {
        assert!(matches!(target("/v2/"), Some(Target::Version)));
        assert!(matches!(target("/v2/a/b/manifests/1.0"), Some(Target::Manifest("a/b", "1.0"))));
        assert!(matches!(target("/v2/a/blobs/uploads/"), Some(Target::Uploads("a"))));
        assert!(matches!(target("/v2/a/blobs/uploads/12"), Some(Target::Upload("a", "12"))));
        // Nothing keeps a repository from being called like a part of a path.
        assert!(matches!(target("/v2/manifests/blobs/manifests/x"), Some(Target::Manifest("manifests/blobs", "x"))));
        assert!(target("/v1/").is_none());
        assert!(target("/v2/a").is_none());
    }

    #[test]
    fn a_range_is_within_the_blob() {
        assert_eq!(part("bytes=0-3", 10), Some((0, 4)));
        assert_eq!(part("bytes=8-99", 10), Some((8, 2)));
        assert_eq!(part("bytes=4-", 10), Some((4, 6)));
        assert_eq!(part("bytes=-3", 10), Some((7, 3)));
        for wrong in ["bytes=10-", "bytes=3-2", "bytes=a-b", "lines=1-2", "bytes=1"] {
            assert_eq!(part(wrong, 10), None, "{wrong}");
        }
        assert_eq!(part("bytes=0-0", 0), None);
    }

    #[test]
    fn a_parameter_is_decoded() {
        assert_eq!(parameter("a=1&digest=sha256%3Aab", "digest").as_deref(), Some("sha256:ab"));
        assert_eq!(parameter("xdigest=1", "digest"), None);
        assert_eq!(parameter("digest=%4", "digest"), None);
    }
}
