//! What is done with images beside loading and running them: save, tag, remove, verify; where they are, and what they take.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Query, State as AxumState};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use moyai_protocol::catalog::{ImageHeld, OriginalHeld};
use moyai_protocol::contract::Command;
use moyai_protocol::id::ChunkId;
use moyai_protocol::reference::Reference;
use moyai_runtime::image::{Original, digest_text, media, parse_digest};
use moyai_runtime::store::Store;
use serde::Deserialize;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::json::Json;
use super::server::{Answer, Failed, State, failed, refused};
use super::types::{PlaceRow, UsageRow, Verified};
use super::view;
use crate::daemon::images::{Repair, Swept};
use crate::pieces::Outgoing;
use crate::registry::{MAX_MANIFEST, for_this_machine};

/// Pieces of an archive on their way.
const QUEUE: usize = 16;
const PIECE: usize = 256 * 1024;

#[derive(Deserialize)]
pub(super) struct NameQuery {
    name: String,
}

#[derive(Deserialize)]
pub(super) struct TagQuery {
    name: String,
    /// The new name.
    tag: String,
}

#[derive(Deserialize)]
pub(super) struct RemoveQuery {
    name: String,
    /// Also when something runs it.
    #[serde(default)]
    force: bool,
}

async fn find(state: &State, name: &str) -> Result<ImageHeld, Failed> {
    let name = name.to_owned();
    Ok(state.handle.ask(move |node, _| view::find_held(node, &name)).await??)
}

/// An archive that docker, podman, skopeo and `moyai load` read: an OCI layout, with docker's manifest.json beside it.
pub(super) async fn save(
    AxumState(state): AxumState<State>,
    Query(query): Query<NameQuery>,
) -> Result<Response, Failed> {
    let mut images = Vec::new();
    for name in query.name.split(',') {
        let held = find(&state, name).await?;
        let original = state.images.original(&held).await.map_err(|reason| {
            failed(
                format!("{name} cannot be saved: {reason}"),
                "`moyai image where` shows which nodes have what it was made of",
            )
        })?;
        images.push((held.reference, original));
    }
    let (pieces, receiver) = mpsc::channel::<io::Result<Bytes>>(QUEUE);
    let store = Arc::clone(&state.store);
    tokio::task::spawn_blocking(move || {
        let mut out = io::BufWriter::with_capacity(PIECE, Outgoing::new(pieces.clone()));
        let written = write_archive(&store, &images, &mut out).and_then(|()| out.flush());
        if let Err(error) = written {
            // The other side sees the answer break off.
            let _gone = pieces.blocking_send(Err(error));
        }
    });
    Ok(Body::from_stream(ReceiverStream::new(receiver)).into_response())
}

fn write_archive(store: &Store, images: &[(Reference, Original)], out: &mut impl Write) -> io::Result<()> {
    let mut archive = tar::Builder::new(out);
    let mut written = BTreeSet::new();
    let (mut index, mut docker) = (Vec::new(), Vec::new());
    append(&mut archive, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    for (reference, original) in images {
        for blob in &original.blobs {
            if written.insert(blob.digest) {
                let bytes = store.read_blob(blob).map_err(io::Error::other)?;
                let name = blob_name(&blob.digest);
                let bytes = io::BufReader::with_capacity(PIECE, bytes);
                archive.append_data(&mut header(blob.size), name, bytes)?;
            }
        }
        let top = original.manifest();
        index.push(serde_json::json!({
            "mediaType": top.media_type, "digest": digest_text(&top.digest), "size": top.size,
            "annotations": {
                "io.containerd.image.name": reference.to_string(),
                "org.opencontainers.image.ref.name": reference.tag(),
            },
        }));
        docker.extend(docker_manifest(store, original, reference)?);
    }
    let index = serde_json::json!({"schemaVersion": 2, "mediaType": media::INDEX, "manifests": index});
    append(&mut archive, "index.json", index.to_string().as_bytes())?;
    if !docker.is_empty() {
        append(&mut archive, "manifest.json", serde_json::Value::from(docker).to_string().as_bytes())?;
    }
    archive.finish()
}

fn blob_name(digest: &[u8; 32]) -> String {
    format!("blobs/sha256/{}", data_encoding::HEXLOWER.encode(digest))
}

/// An image's entry in docker's manifest.json; what is no image of this kind of machine has none.
fn docker_manifest(store: &Store, original: &Original, reference: &Reference) -> io::Result<Option<serde_json::Value>> {
    let Some(bytes) = image_manifest(store, original)? else { return Ok(None) };
    let manifest: serde_json::Value = serde_json::from_slice(&bytes)?;
    let name = |descriptor: &serde_json::Value| {
        let hex = descriptor["digest"].as_str()?.strip_prefix("sha256:")?;
        Some(format!("blobs/sha256/{hex}"))
    };
    let layers: Option<Vec<String>> = manifest["layers"].as_array().into_iter().flatten().map(name).collect();
    let (Some(config), Some(layers)) = (name(&manifest["config"]), layers) else { return Ok(None) };
    Ok(Some(serde_json::json!({"Config": config, "RepoTags": [reference.familiar()], "Layers": layers})))
}

/// The manifest of the image for this kind of machine.
fn image_manifest(store: &Store, original: &Original) -> io::Result<Option<Vec<u8>>> {
    let mut blob = original.manifest();
    loop {
        // What others call a manifest may be of any size.
        if blob.size > MAX_MANIFEST as u64 {
            return Ok(None);
        }
        let mut bytes = Vec::new();
        store.read_blob(blob).map_err(io::Error::other)?.read_to_end(&mut bytes)?;
        if !media::is_index(&blob.media_type) {
            return Ok(media::is_manifest(&blob.media_type).then_some(bytes));
        }
        let index: serde_json::Value = serde_json::from_slice(&bytes)?;
        let digest = for_this_machine(&index).and_then(parse_digest);
        // An index below an index comes later in the list, so this ends.
        let at = original.blobs.iter().position(|other| Some(other.digest) == digest);
        let before = original.blobs.iter().position(|other| other.digest == blob.digest);
        match at {
            Some(at) if Some(at) > before => blob = &original.blobs[at],
            _ => return Ok(None),
        }
    }
}

fn header(size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_size(size);
    header.set_mode(0o644);
    header.set_entry_type(tar::EntryType::Regular);
    header
}

fn append(archive: &mut tar::Builder<impl Write>, name: &str, bytes: &[u8]) -> io::Result<()> {
    archive.append_data(&mut header(bytes.len() as u64), name, bytes)
}

/// Gives an image another name.
pub(super) async fn tag(AxumState(state): AxumState<State>, Query(query): Query<TagQuery>) -> Answer<String> {
    let held = find(&state, &query.name).await?;
    let reference: Reference = query.tag.parse().map_err(|error: moyai_protocol::reference::ReferenceError| {
        failed(error.to_string(), "name it like alpine or alpine:3.20")
    })?;
    // A name is held by those who have the image.
    state.images.fetch(held.root).await.map_err(|reason| {
        failed(format!("{} cannot be had here: {reason}", query.name), "`moyai image where` shows who has it")
    })?;
    let familiar = reference.familiar();
    // What of it is here the node knows by its other names.
    let original = held.original.clone().map(|original| OriginalHeld { here: false, ..original });
    let named = ImageHeld { reference, here: false, original, ..held };
    state.handle.command(Command::ImageAdded(named)).await?.map_err(|refusal| refused(&refusal))?;
    Ok(Json(familiar))
}

/// Takes a name back on every node; and gives up here what nothing needs then. Others follow within two minutes.
pub(super) async fn remove(
    AxumState(state): AxumState<State>,
    Query(query): Query<RemoveQuery>,
) -> Answer<(String, u64)> {
    let held = find(&state, &query.name).await?;
    let reference = held.reference.clone();
    let users = state.handle.ask(move |node, _| view::users_of(node, &reference)).await?;
    if let (Some(user), false) = (users.first(), query.force) {
        return Err(failed(
            format!("{} is used by {user}", query.name),
            format!("`moyai rm {user}` first; or `moyai image rm --force`, and it cannot start anywhere anew"),
        ));
    }
    let command = Command::Unname(held.reference.clone());
    state.handle.command(command).await?.map_err(|refusal| refused(&refusal))?;
    let roots = [Some(held.root), held.original.map(|original| original.root)].into_iter().flatten().collect();
    let freed = state.images.release(roots).await.map_err(|error| failed(error.to_string(), ""))?;
    Ok(Json((held.reference.familiar(), freed)))
}

/// Removes what belongs to no image.
pub(super) async fn prune(AxumState(state): AxumState<State>) -> Answer<u64> {
    match state.images.sweep().await {
        Ok(Swept::Freed(freed)) => Ok(Json(freed)),
        Ok(Swept::Busy) => Err(failed("something is being loaded or pushed here", "again when that is done")),
        Ok(Swept::Unknown) => Err(failed(
            "the names of this node's images were lost, so it is not known what is needed",
            "`moyai down && moyai up`, and load or pull what is missing",
        )),
        Err(error) => Err(failed(error.to_string(), "")),
    }
}

/// Reads all of an image that is here.
pub(super) async fn verify(AxumState(state): AxumState<State>, Query(query): Query<NameQuery>) -> Answer<Verified> {
    let held = find(&state, &query.name).await?;
    let own = state.handle.ask(move |node, _| {
        let same = node.images().iter().filter(|image| image.root == held.root);
        same.flat_map(ImageHeld::held).collect::<BTreeSet<ChunkId>>()
    });
    let here = own.await?;
    if here.is_empty() {
        let hint = format!("`moyai pull {}` fetches it, each chunk checked", query.name);
        return Err(failed(format!("{} is not on this node", query.name), hint));
    }
    let mut verified = Verified { parts: here.len() as u32, wrong: Vec::new(), coming: false, lost: false };
    for root in here {
        match state.images.verify(root).await {
            Ok((_, Repair::Gone)) => {
                return Err(failed(format!("{} was removed while it was read", query.name), ""));
            }
            Ok((told, repair)) => {
                verified.coming |= repair == Repair::Coming;
                verified.lost |= repair == Repair::Nobody;
                verified.wrong.extend(told);
            }
            // What was found before is to be known all the same.
            Err(error) if !verified.wrong.is_empty() => {
                verified.lost = true;
                verified.wrong.push(error.to_string());
            }
            Err(error) => return Err(failed(error.to_string(), "")),
        }
    }
    Ok(Json(verified))
}

/// Who has an image, or is getting it.
pub(super) async fn places(
    AxumState(state): AxumState<State>,
    Query(query): Query<NameQuery>,
) -> Answer<Vec<PlaceRow>> {
    /// For nodes to say how far they are.
    const PATIENCE: std::time::Duration = std::time::Duration::from_millis(300);
    let held = find(&state, &query.name).await?;
    let root = held.root;
    state.handle.command(Command::AskParts { root }).await?.map_err(|refusal| refused(&refusal))?;
    let getting = state.handle.ask(move |node, _| view::places(node, &held, None)).await?;
    if getting.iter().all(|row| row.image != view::FETCHING) {
        return Ok(Json(getting));
    }
    tokio::time::sleep(PATIENCE).await;
    let store = Arc::clone(&state.store);
    let all = tokio::task::spawn_blocking(move || {
        let contents = store.contents_of(&root.0).ok()?;
        let chunks: BTreeSet<[u8; 32]> =
            contents.values().flat_map(|content| content.chunks.iter().map(|(chunk, _)| *chunk)).collect();
        Some(chunks.len() as u32)
    });
    let all = all.await.ok().flatten();
    let held = find(&state, &query.name).await?;
    Ok(Json(state.handle.ask(move |node, _| view::places(node, &held, all)).await?))
}

/// What the images on this node take.
pub(super) async fn usage(AxumState(state): AxumState<State>) -> Answer<Vec<UsageRow>> {
    let named = state.handle.ask(|node, _| node.images().to_vec()).await?;
    let mut groups: std::collections::BTreeMap<ChunkId, (Vec<String>, BTreeSet<ChunkId>)> = Default::default();
    for image in &named {
        let (names, roots) = groups.entry(image.root).or_default();
        names.push(image.reference.familiar());
        roots.extend(image.held());
    }
    let (names, roots): (Vec<_>, Vec<Vec<[u8; 32]>>) =
        groups.into_values().map(|(names, roots)| (names, roots.iter().map(|root| root.0).collect())).unzip();
    let store = Arc::clone(&state.store);
    let usage = tokio::task::spawn_blocking(move || store.usage(&roots)).await;
    let usage = usage.map_err(|error| failed(error.to_string(), ""))?;
    let usage = usage.map_err(|error| failed(error.to_string(), ""))?;
    let rows = names.into_iter().zip(usage);
    Ok(Json(rows.map(|(names, usage)| UsageRow { names, size: usage.size, own: usage.own }).collect()))
}
