//! What refers to a manifest (distribution-spec 1.1, "Listing Referrers"). Of each manifest of a repository is found out once what it
//! refers to. One that lies elsewhere is read from there alone: the root of what it belongs to, that one's list, itself; what it names
//! stays where it is.
//!
//! **If a provider dies,** or takes longer than [`PATIENCE`], another is asked. What nobody gives within [`SOON`] after the request is
//! not there now; the next request looks again.
//!
//! **Bounds.** [`MAX_READERS`] manifests are read from elsewhere at one time, for all requests together, each with a list of [`MAX_LIST`]
//! bytes at the most; [`MAX_KNOWN`] are remembered, but for those that refer to something with more than [`MAX_DESCRIBED`] bytes.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, ensure};
use futures::StreamExt;
use moyai_protocol::catalog::{ImageHeld, OriginalHeld};
use moyai_protocol::id::{ChunkId, NodeId};
use moyai_runtime::image::{Blob, Content, Original, OriginalRoot, Source, digest_text, parse_digest};
use moyai_runtime::store::Store;
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tracing::debug;

use super::{MAX_MANIFEST, held_manifest};
use crate::daemon::driver::Handle;
use crate::net::data::{DataPlane, addresses_of};

/// Manifests that are read from elsewhere at one time, and of one request.
const MAX_READERS: usize = 4;
const AT_ONCE: usize = 2;
/// Of what a manifest belongs to: it names what some 14 GiB consist of.
const MAX_LIST: u64 = 8 << 20;
const MAX_KNOWN: usize = 4096;
const MAX_DESCRIBED: usize = 4096;
/// How long all that a request asks for is waited for, and one node.
const SOON: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_millis(1500);

/// What the manifests of this mesh refer to.
pub(super) struct Referrers {
    handle: Handle,
    store: Arc<Store>,
    plane: Arc<DataPlane>,
    places: Semaphore,
    /// By the root of what each belongs to; of most, that they refer to nothing.
    known: Mutex<HashMap<ChunkId, Option<Arc<Referrer>>>>,
}

/// A manifest that refers to another.
#[derive(Debug, PartialEq)]
struct Referrer {
    subject: String,
    kind: String,
    descriptor: Value,
}

impl Referrers {
    pub(super) fn new(handle: Handle, store: Arc<Store>, plane: Arc<DataPlane>) -> Self {
        Referrers { handle, store, plane, places: Semaphore::new(MAX_READERS), known: Mutex::default() }
    }

    /// Descriptors of those among `all` that refer to `subject`, and are of this kind if one is given.
    pub(super) async fn of(&self, all: &[ImageHeld], subject: &str, kind: Option<&str>) -> anyhow::Result<Vec<Value>> {
        let manifests: BTreeMap<ChunkId, OriginalHeld> =
            all.iter().filter_map(|held| held.original.clone()).map(|made_of| (made_of.root, made_of)).collect();
        let (mut found, mut elsewhere) = (BTreeMap::new(), Vec::new());
        for (root, made_of) in manifests {
            let known = self.known().get(&root).cloned();
            match known {
                Some(known) => drop(found.insert(root, known)),
                None => match self.here(&made_of).await {
                    Ok(Some(manifest)) => drop(found.insert(root, self.remember(root, &manifest))),
                    // What is damaged here others may have whole.
                    Ok(None) | Err(_) => elsewhere.push(made_of),
                },
            }
        }
        // In another order each time: what cannot be had is not to keep the same ones from being looked for.
        fastrand::shuffle(&mut elsewhere);
        let until = Instant::now() + SOON;
        let look = |made_of: OriginalHeld| async move { (made_of.root, self.look(&made_of, until).await) };
        let looks = futures::stream::iter(elsewhere).map(look);
        found.extend(looks.buffer_unordered(AT_ONCE).collect::<Vec<_>>().await);
        let refer = |one: &Arc<Referrer>| one.subject == subject && kind.is_none_or(|kind| one.kind == kind);
        Ok(found.into_values().flatten().filter(refer).map(|one| one.descriptor.clone()).collect())
    }

    /// What one that lies elsewhere refers to, if it can be had by then.
    async fn look(&self, made_of: &OriginalHeld, until: Instant) -> Option<Arc<Referrer>> {
        let read = tokio::time::timeout_at(until, self.elsewhere(made_of)).await;
        match read.context("nobody gives it in time").and_then(|read| read) {
            Ok(manifest) => self.remember(made_of.root, &manifest),
            Err(error) => {
                debug!(manifest = %digest_text(&made_of.digest.0), "not among the referrers for now: {error:#}");
                None
            }
        }
    }

    /// What a manifest refers to, from now on known.
    fn remember(&self, root: ChunkId, (media_type, bytes): &(String, Vec<u8>)) -> Option<Arc<Referrer>> {
        let found = Referrer::read(media_type, bytes).map(Arc::new);
        let len = found.as_ref().map_or(0, |found| found.descriptor.to_string().len());
        let mut known = self.known();
        if known.len() >= MAX_KNOWN {
            known.clear();
        }
        if len <= MAX_DESCRIBED {
            known.insert(root, found.clone());
        }
        found
    }

    fn known(&self) -> std::sync::MutexGuard<'_, HashMap<ChunkId, Option<Arc<Referrer>>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A manifest's media type and bytes, if it is here.
    async fn here(&self, made_of: &OriginalHeld) -> anyhow::Result<Option<(String, Vec<u8>)>> {
        let (store, digest) = (Arc::clone(&self.store), made_of.digest.0);
        tokio::task::spawn_blocking(move || held_manifest(&store, &digest)).await?
    }

    /// The same as other nodes have it.
    async fn elsewhere(&self, made_of: &OriginalHeld) -> anyhow::Result<(String, Vec<u8>)> {
        let _place = self.places.acquire().await?;
        let root = made_of.root;
        let providers = self.handle.ask(move |node, _| {
            let providers = node.holders(&root);
            providers.map(|provider| (provider, addresses_of(node, &provider))).collect::<Vec<_>>()
        });
        let mut providers = providers.await.map_err(|_| anyhow::anyhow!("the daemon ends"))?;
        fastrand::shuffle(&mut providers);
        let mut last = anyhow::anyhow!("no live node has it");
        for (at, (provider, addresses)) in providers.iter().enumerate() {
            // The last one has all the time that is left.
            let patience = if at + 1 < providers.len() { PATIENCE } else { SOON };
            match tokio::time::timeout(patience, self.manifest_of(*provider, addresses, made_of)).await {
                Ok(Ok(manifest)) => return Ok(manifest),
                Ok(Err(error)) => last = error,
                Err(_) => last = anyhow::anyhow!("node {} does not give it", provider.short()),
            }
        }
        Err(last)
    }

    /// The same as one node has it.
    async fn manifest_of(
        &self,
        provider: NodeId,
        addresses: &[SocketAddr],
        made_of: &OriginalHeld,
    ) -> anyhow::Result<(String, Vec<u8>)> {
        let root = made_of.root;
        let read = |content: Content| async move { self.plane.read(provider, addresses, root, &content.chunks).await };
        let bytes = read(Content { chunks: vec![(root.0, 0)] }).await?;
        let list = OriginalRoot::decode(&bytes).context("it is an image's root")?.map_err(anyhow::Error::msg)?.list;
        ensure!(list.size() <= MAX_LIST, "its list has {} bytes", list.size());
        let original = Original::decode(&read(list).await?).map_err(anyhow::Error::msg)?;
        let Blob { media_type, source: Source::Verbatim(content), .. } = original.manifest() else {
            anyhow::bail!("it is no manifest")
        };
        ensure!(content.size() <= MAX_MANIFEST as u64, "a manifest of {} bytes", content.size());
        let bytes = read(content.clone()).await?;
        let digest: [u8; 32] = Sha256::digest(&bytes).into();
        ensure!(digest == made_of.digest.0, "it is {}", digest_text(&digest));
        Ok((media_type.clone(), bytes))
    }
}

/// What counts of a manifest here.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    subject: Option<Subject>,
    artifact_type: Option<String>,
    config: Option<Part>,
}

#[derive(Deserialize)]
struct Subject {
    digest: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Part {
    media_type: Option<String>,
}

#[derive(Deserialize)]
struct Annotated {
    annotations: Option<BTreeMap<String, String>>,
}

impl Referrer {
    /// What a manifest refers to, if it does.
    fn read(media_type: &str, bytes: &[u8]) -> Option<Referrer> {
        let Manifest { subject, artifact_type, config } = serde_json::from_slice(bytes).ok()?;
        let subject = subject?.digest;
        parse_digest(&subject)?;
        let kinds = [artifact_type, config.and_then(|config| config.media_type)];
        let kind = kinds.into_iter().flatten().find(|kind| !kind.is_empty()).unwrap_or_default();
        let digest = digest_text(&Sha256::digest(bytes).into());
        let mut descriptor =
            json!({"mediaType": media_type, "digest": digest, "size": bytes.len(), "artifactType": kind});
        // Those of which one is no text are none.
        if let Ok(Annotated { annotations: Some(annotations) }) = serde_json::from_slice(bytes) {
            descriptor["annotations"] = json!(annotations);
        }
        Some(Referrer { subject, kind, descriptor })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_referrer_is_described_by_its_manifest() {
        let subject = format!("sha256:{}", "5".repeat(64));
        let read = |manifest: Value| Referrer::read("some/manifest", manifest.to_string().as_bytes());
        let described = read(json!({
            "subject": {"digest": subject}, "artifactType": "", "config": {"mediaType": "some/config"}, "annotations": {"a": "b"},
        }));
        let Referrer { subject: of, kind, descriptor } = described.expect("it refers to something");
        assert_eq!((of, kind.as_str()), (subject.clone(), "some/config"));
        assert_eq!(
            (&descriptor["artifactType"], &descriptor["annotations"]),
            (&json!("some/config"), &json!({"a": "b"}))
        );
        // What is wrong elsewhere does not hide it; without annotations that are texts it has none.
        let odd =
            read(json!({"subject": {"digest": subject}, "config": null, "layers": 5, "annotations": {"a": null}}));
        let odd = odd.expect("it refers to something").descriptor;
        assert_eq!((&odd["artifactType"], odd.get("annotations")), (&json!(""), None));
        for none in
            [json!({}), json!({"subject": {"digest": "x".repeat(1000)}}), json!({"subject": "sha256:5"}), json!([])]
        {
            assert_eq!(read(none), None);
        }
    }
}
