//! Images as other tools know them: pushed and pulled by name and digest on any node, saved bit for bit, named and unnamed.
//!
//! The distribution specification's own requirements (OCI distribution-spec 1.1, spec.md) are the tests that begin with its
//! categories: pull, push, content discovery, content management.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use moyai_tests::bundle::Background;
use moyai_tests::{Host, Lab, Output, PATIENCE, images, wait_for};
use serde_json::{Value, json};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const EMPTY: &str = "application/vnd.oci.empty.v1+json";

/// An HTTP answer.
#[derive(Debug)]
struct Answer {
    status: u16,
    headers: BTreeMap<String, String>,
    body: String,
}

impl Answer {
    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or_else(|| panic!("no {name} in {self:?}"), String::as_str)
    }

    #[track_caller]
    fn is(self, status: u16) -> Answer {
        assert_eq!(self.status, status, "{self:?}");
        self
    }

    /// An error as the specification shapes it ("Error Codes").
    #[track_caller]
    fn refuses(self, status: u16, code: &str) {
        let answer = self.is(status);
        assert_eq!(answer.json()["errors"][0]["code"], code, "{answer:?}");
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

fn answer(output: &Output) -> Answer {
    let (mut head, mut body) = output.stdout.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {output}"));
    while head.starts_with("HTTP/1.1 100") {
        (head, body) = body.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {output}"));
    }
    let mut lines = head.lines();
    let status = lines.next().and_then(|line| line.split(' ').nth(1)?.parse().ok()).expect("a status");
    let headers =
        lines.filter_map(|line| line.split_once(": ")).map(|(name, value)| (name.to_lowercase(), value.to_owned()));
    Answer { status, headers: headers.collect(), body: body.to_owned() }
}

/// Asks the registry of a host.
fn ask(host: &Host, method: &str, path: &str, options: &[&str]) -> Answer {
    let url = if path.starts_with("http") { path.to_owned() } else { format!("http://127.0.0.1:5000{path}") };
    let kind: &[&str] = if method == "HEAD" { &["-I"] } else { &["-X", method] };
    answer(&host.run("curl", &[&["-s", "-i", "--max-time", "60"], kind, options, &[&url]].concat()))
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest;
    let hex: String = sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// Pushes a blob in one request.
fn push_blob(host: &Host, name: &str, bytes: &str) -> String {
    let digest = sha256(bytes.as_bytes());
    let path = format!("/v2/{name}/blobs/uploads/?digest={digest}");
    let pushed = ask(host, "POST", &path, &["-H", "content-type: application/octet-stream", "--data-binary", bytes]);
    assert!(pushed.is(201).header("location").contains(&digest));
    digest
}

fn put_manifest(host: &Host, name: &str, at: &str, media_type: &str, manifest: &Value) -> Answer {
    let content_type = format!("content-type: {media_type}");
    let text = manifest.to_string();
    ask(host, "PUT", &format!("/v2/{name}/manifests/{at}"), &["-H", &content_type, "--data-binary", &text])
}

/// A manifest of something that is no image, with one blob.
fn artifact(host: &Host, name: &str, content: &str, subject: Option<Value>) -> Value {
    let (empty, blob) = (push_blob(host, name, "{}"), push_blob(host, name, content));
    let mut manifest = json!({
        "schemaVersion": 2, "mediaType": MANIFEST, "artifactType": "text/note",
        "config": {"mediaType": EMPTY, "digest": empty, "size": 2},
        "layers": [{"mediaType": "text/plain", "digest": blob, "size": content.len()}],
        "annotations": {"said": content},
    });
    if let Some(subject) = subject {
        manifest["subject"] = subject;
    }
    manifest
}

fn skopeo(host: &Host, args: &[&str]) -> Output {
    host.run("skopeo", args).ok()
}

fn push(host: &Host, layout: &Path, name: &str) {
    let (from, to) = (format!("oci:{}", layout.display()), format!("docker://127.0.0.1:5000/{name}"));
    skopeo(host, &["copy", "--dest-tls-verify=false", &from, &to]);
}

/// All blobs of a layout or an unpacked archive, each with its bytes.
fn blobs(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(folder.join("blobs/sha256")).expect("blobs").flatten();
    entries
        .map(|entry| (entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path()).expect("read")))
        .collect()
}

fn whole_on(host: &Host, image: &str, count: usize) {
    wait_for("what it was made of to be on enough nodes", PATIENCE, || {
        let rows = host.moyai(&["--json", "image", "where", image]).rows();
        (rows.iter().filter(|row| row["original"] == "whole").count() == count).then_some(())
    });
}

#[test]
fn what_is_pushed_on_one_node_runs_and_is_pulled_on_all() {
    let lab = Lab::mesh(3);
    let [one, two, three] = lab.hosts();
    let layout = images::busybox("alpine.oci");
    push(one, &layout, "team/alp:1");
    let digest = |host: &Host| {
        skopeo(host, &["inspect", "--tls-verify=false", "-f", "{{.Digest}}", "docker://127.0.0.1:5000/team/alp:1"])
            .stdout
    };
    wait_for("its name to be known", PATIENCE, || (three.images().len() == 1).then_some(()));
    let pushed = digest(one);
    assert_eq!(digest(three), pushed);
    assert_eq!(two.moyai(&["run", "--rm", "--on", "node=lab-3", "team/alp:1", "echo", "ran"]).ok().stdout, "ran\n");
    whole_on(two, "team/alp:1", 3);
    // The node that it was pushed to is nothing special.
    one.kill_machine();
    let pulled = lab.folder().join("pulled");
    let to = format!("oci:{}:1", pulled.display());
    skopeo(two, &["copy", "--src-tls-verify=false", "docker://127.0.0.1:5000/team/alp:1", &to]);
    let expected = blobs(&layout);
    for (name, bytes) in blobs(&pulled) {
        assert!(expected.get(&name) == Some(&bytes), "blob {name} is not what was pushed");
    }
    assert_eq!(digest(two), pushed);
}

#[test]
fn what_was_loaded_is_saved_bit_for_bit() {
    let lab = Lab::mesh(2);
    let [one, two] = lab.hosts();
    for form in ["alpine.oci", "zstd.oci"] {
        let layout = images::busybox(form);
        let name = &format!("{form}:1");
        let loaded = one.moyai(&["--json", "load", "--tag", name, &layout.to_string_lossy()]).ok().json();
        wait_for("its name to be known", PATIENCE, || {
            two.images().iter().any(|row| row["reference"] == **name && row["id"] == loaded["id"]).then_some(())
        });
        whole_on(two, name, 2);
        let archive = lab.folder().join(format!("{form}.tar"));
        two.moyai(&["image", "save", name, "-o", &archive.to_string_lossy()]).ok();
        let unpacked = lab.folder().join(format!("{form}.saved"));
        fs::create_dir(&unpacked).expect("make a folder");
        two.run("tar", &["-xf", &archive.to_string_lossy(), "-C", &unpacked.to_string_lossy()]).ok();
        assert!(blobs(&unpacked) == blobs(&layout), "{form}: other blobs come out than went in");
        for kind in ["docker-archive", "oci-archive"] {
            skopeo(two, &["inspect", &format!("{kind}:{}", archive.display())]);
        }
        let again = two.moyai(&["--json", "load", "--tag", "again:1", &archive.to_string_lossy()]).ok().json();
        assert_eq!((&again["id"], &again["new"]), (&loaded["id"], &0.into()));
        one.moyai(&["image", "verify", name]).ok().says("is right");
    }
    // An uncompressed layer is made again out of its files, and what lay between them.
    for file in ["alpine.tar", "layers.tar", "inserted.tar"] {
        let source = images::busybox(file);
        one.moyai(&["load", "--tag", "plain:1", &source.to_string_lossy()]).ok();
        let archive = lab.folder().join(file);
        one.moyai(&["image", "save", "plain:1", "-o", &archive.to_string_lossy()]).ok();
        let layers = |archive: &Path| {
            let text = |name: &str| {
                let output =
                    Command::new("tar").args(["-xOf", &archive.to_string_lossy(), name]).output().expect("tar");
                output.stdout
            };
            let manifest: Value = serde_json::from_slice(&text("manifest.json")).expect("a manifest");
            let names = manifest[0]["Layers"].as_array().expect("layers").iter().chain([&manifest[0]["Config"]]);
            names.map(|name| sha256(&text(name.as_str().expect("a name")))).collect::<Vec<_>>()
        };
        assert_eq!(layers(&archive), layers(&source), "{file}");
    }
    let nobody = lab.folder().join("none.tar");
    one.moyai(&["image", "save", "nosuch", "-o", &nobody.to_string_lossy()]).fails(1).says("nosuch");
    assert!(!nobody.exists());
}

#[test]
fn a_name_taken_back_is_gone_everywhere() {
    let lab = Lab::mesh(2);
    let [one, two] = lab.hosts();
    one.load(&images::alpine());
    whole_on(one, "alpine", 2);
    assert_eq!(two.moyai(&["image", "tag", "alpine", "base:1"]).ok().text(), "base:1");
    two.moyai(&["image", "tag", "alpine", "UPPER"]).fails(1).says("lower case");
    wait_for("both names to be known", PATIENCE, || (one.images().len() == 2).then_some(()));
    let usage = one.moyai(&["--json", "df"]).ok().rows();
    assert!(
        usage.len() == 1 && usage[0]["own"] == usage[0]["size"] && usage[0]["size"].as_u64() > Some(1 << 20),
        "{usage:?}"
    );
    one.moyai(&["run", "-d", "--stop-timeout", "0", "--name", "user", "base:1", "sleep", "1000"]).ok();
    // Another name is left to it, so nothing is lost.
    two.moyai(&["image", "rm", "base:1"]).ok();
    wait_for("the name to be gone", PATIENCE, || (one.images().len() == 1 && two.images().len() == 1).then_some(()));
    one.moyai(&["image", "rm", "alpine"]).fails(1).says("used by user");
    one.moyai(&["rm", "-f", "user"]).ok();
    wait_for("it to be gone", PATIENCE, || one.workloads().is_empty().then_some(()));
    one.moyai(&["image", "rm", "alpine"]).ok().says("free again here");
    wait_for("the name to be gone", PATIENCE, || (one.images().is_empty() && two.images().is_empty()).then_some(()));
    one.moyai(&["image", "rm", "alpine"]).fails(1).says("no image `alpine`");
    let objects = |host: &Host| {
        fs::read_dir(host.data.join("store/objects"))
            .expect("objects")
            .flatten()
            .filter(|prefix| fs::read_dir(prefix.path()).is_ok_and(|mut entries| entries.next().is_some()))
            .count()
    };
    // At once, or when the container has ended that still used it.
    wait_for("nothing of it to be left", PATIENCE, || (objects(one) == 0).then_some(()));
    // What was taken back can be given anew, and what was forgotten comes again whole.
    one.load(&images::alpine());
    assert_eq!(one.moyai(&["run", "--rm", "alpine", "echo", "back"]).ok().stdout, "back\n");
    one.moyai(&["image", "verify", "alpine"]).ok();
}

#[test]
fn pull_gives_manifests_and_blobs_by_tag_digest_and_range() {
    let lab = Lab::mesh(1);
    let [one] = lab.hosts();
    assert_eq!(ask(one, "GET", "/v2/", &[]).is(200).header("docker-distribution-api-version"), "registry/2.0");
    let manifest = artifact(one, "notes", "0123456789", None);
    let pushed = put_manifest(one, "notes", "v1", MANIFEST, &manifest).is(201);
    let digest = pushed.header("docker-content-digest").to_owned();
    assert_eq!(digest, sha256(manifest.to_string().as_bytes()));
    for at in ["v1", &digest] {
        let path = format!("/v2/notes/manifests/{at}");
        let got = ask(one, "GET", &path, &[]).is(200);
        assert_eq!((got.header("content-type"), got.header("docker-content-digest")), (MANIFEST, &*digest));
        assert_eq!(got.body, manifest.to_string());
        let head = ask(one, "HEAD", &path, &[]).is(200);
        assert_eq!(head.header("content-length"), got.body.len().to_string());
        assert!(head.body.is_empty());
    }
    let blob = format!("/v2/notes/blobs/{}", sha256(b"0123456789"));
    assert_eq!(ask(one, "GET", &blob, &[]).is(200).body, "0123456789");
    assert_eq!(ask(one, "HEAD", &blob, &[]).is(200).header("content-length"), "10");
    let part = ask(one, "GET", &blob, &["-H", "range: bytes=3-5"]).is(206);
    assert_eq!((&*part.body, part.header("content-range")), ("345", "bytes 3-5/10"));
    ask(one, "GET", &blob, &["-H", "range: bytes=10-"]).is(416);
    ask(one, "GET", "/v2/notes/manifests/v2", &[]).refuses(404, "MANIFEST_UNKNOWN");
    ask(one, "GET", &format!("/v2/notes/manifests/{}", sha256(b"x")), &[]).refuses(404, "MANIFEST_UNKNOWN");
    ask(one, "GET", &format!("/v2/notes/blobs/{}", sha256(b"x")), &[]).refuses(404, "BLOB_UNKNOWN");
    ask(one, "GET", "/v2/notes/blobs/sha256:12", &[]).refuses(400, "DIGEST_INVALID");
    ask(one, "GET", "/v2/Notes/manifests/v1", &[]).refuses(400, "NAME_INVALID");
    // It has a name like an image, and is none.
    one.moyai(&["run", "notes:v1"]).fails(125).says("is not an image");
}

#[test]
fn push_takes_blobs_whole_or_in_chunks_and_resumes() {
    let lab = Lab::mesh(1);
    let [one] = lab.hosts();
    let begin = || ask(one, "POST", "/v2/up/blobs/uploads/", &[]).is(202).header("location").to_owned();
    let octets = ["-H", "content-type: application/octet-stream"];
    // POST, then PUT.
    let (digest, at) = (sha256(b"in one go"), begin());
    ask(one, "PUT", &format!("{at}?digest={digest}"), &[&octets[..], &["--data-binary", "in one go"]].concat()).is(201);
    // POST, PATCHes, PUT.
    let at = begin();
    let patch = |range: &str, bytes: &str| {
        let range = format!("content-range: {range}");
        ask(one, "PATCH", &at, &[&octets[..], &["-H", &range, "--data-binary", bytes]].concat())
    };
    assert_eq!(patch("0-4", "first").is(202).header("range"), "0-4");
    let wrong = patch("0-4", "again").is(416);
    assert_eq!(wrong.header("range"), "0-4", "whoever lost count is told");
    assert_eq!(ask(one, "GET", &at, &[]).is(204).header("range"), "0-4");
    patch("5-10", " and s").is(202);
    let digest = sha256(b"first and second");
    let last = [&octets[..], &["-H", "content-range: 11-15", "--data-binary", "econd"]].concat();
    let put = ask(one, "PUT", &format!("{at}?digest={digest}"), &last).is(201);
    assert_eq!(ask(one, "GET", put.header("location"), &[]).is(200).body, "first and second");
    // Mounted from elsewhere, or uploaded when there is nothing to mount.
    ask(one, "POST", &format!("/v2/other/blobs/uploads/?mount={digest}&from=up"), &[]).is(201);
    ask(one, "POST", &format!("/v2/other/blobs/uploads/?mount={}&from=up", sha256(b"none")), &[]).is(202);
    // What is wrong.
    let at = begin();
    let put = |digest: &str| {
        ask(one, "PUT", &format!("{at}?digest={digest}"), &[&octets[..], &["--data-binary", "x"]].concat())
    };
    put(&sha256(b"y")).refuses(400, "DIGEST_INVALID");
    put(&sha256(b"x")).refuses(404, "BLOB_UPLOAD_UNKNOWN");
    ask(one, "DELETE", &begin(), &[]).is(204);
    ask(one, "GET", "/v2/up/blobs/uploads/none", &[]).refuses(404, "BLOB_UPLOAD_UNKNOWN");
    let missing = json!({"schemaVersion": 2, "mediaType": MANIFEST, "layers": [],
        "config": {"mediaType": EMPTY, "digest": sha256(b"never pushed"), "size": 12}});
    put_manifest(one, "up", "v1", MANIFEST, &missing).refuses(404, "MANIFEST_BLOB_UNKNOWN");
    put_manifest(one, "up", "v1", "text/plain", &missing).refuses(400, "MANIFEST_INVALID");
    let broken =
        ask(one, "PUT", "/v2/up/manifests/v1", &["-H", "content-type: application/json", "--data-binary", "{"]);
    broken.refuses(400, "MANIFEST_INVALID");
    put_manifest(one, "up", &sha256(b"another"), MANIFEST, &missing).refuses(400, "DIGEST_INVALID");
    // Documents in one another, by a key that serde_json can be built to give a meaning, deeper than any stack.
    let nested = lab.folder().join("nested");
    let deeper = |text: String, _| {
        let quoted = text.replace('\\', "\\u005c").replace('"', "\\u0022");
        let (begin, end) = ("[".repeat(120), "]".repeat(120));
        format!("{begin}{{\"$serde_json::private::RawValue\":\"{quoted}\"}}{end}")
    };
    fs::write(&nested, (0..64).fold("null".to_owned(), deeper)).expect("write");
    let data = format!("@{}", nested.display());
    let media_type = format!("content-type: {MANIFEST}");
    let options = ["-H", "expect:", "-H", &media_type, "--data-binary", &data];
    // What matters is that it answers, now and below.
    ask(one, "PUT", "/v2/up/manifests/v1", &options).refuses(400, "MANIFEST_INVALID");
    let large = lab.folder().join("large");
    fs::write(&large, format!("\"{}\"", "x".repeat(5 << 20))).expect("write");
    let data = format!("@{}", large.display());
    ask(one, "PUT", "/v2/up/manifests/v1", &["-H", "expect:", "--data-binary", &data]).refuses(413, "SIZE_INVALID");
    ask(one, "GET", "/v2/up/tags/list", &[]).refuses(404, "NAME_UNKNOWN");
    assert!(one.images().is_empty());
}

#[test]
fn push_from_a_client_that_vanishes_can_go_on() {
    let lab = Lab::mesh(1);
    let [one] = lab.hosts();
    let at = ask(one, "POST", "/v2/cut/blobs/uploads/", &[]).is(202).header("location").to_owned();
    let bytes = "z".repeat(3 << 20);
    let whole = lab.folder().join("blob");
    fs::write(&whole, &bytes).expect("write");
    let data = format!("@{}", whole.display());
    let url = format!("http://127.0.0.1:5000{at}");
    // At this rate it is in the middle when it is stopped.
    let cut = ["-s", "--limit-rate", "1m", "--max-time", "1.5", "-X", "PATCH", "--data-binary", &data, &url];
    one.run("curl", &cut).exits(28);
    let range = wait_for("the upload to be free again", PATIENCE, || {
        let status = ask(one, "GET", &at, &[]);
        (status.status == 204).then(|| status.header("range").to_owned())
    });
    let here: usize = range.trim_start_matches("0-").parse::<usize>().expect("a number") + 1;
    assert!((1..bytes.len()).contains(&here), "{range}");
    fs::write(&whole, &bytes[here..]).expect("write");
    let range = format!("content-range: {here}-{}", bytes.len() - 1);
    let put = format!("{at}?digest={}", sha256(bytes.as_bytes()));
    ask(one, "PUT", &put, &["-H", &range, "--data-binary", &data]).is(201);
}

#[test]
fn content_discovery_lists_tags_and_referrers() {
    let lab = Lab::mesh(2);
    let [one, two] = lab.hosts();
    let manifest = artifact(one, "lab/thing", "the thing", None);
    for tag in ["b", "a", "c"] {
        put_manifest(one, "lab/thing", tag, MANIFEST, &manifest).is(201);
    }
    let tags = |host: &Host, query: &str| ask(host, "GET", &format!("/v2/lab/thing/tags/list{query}"), &[]).is(200);
    assert_eq!(tags(one, "").json(), json!({"name": "lab/thing", "tags": ["a", "b", "c"]}));
    let first = tags(one, "?n=2");
    assert_eq!(first.json()["tags"], json!(["a", "b"]));
    assert_eq!(first.header("link"), "</v2/lab/thing/tags/list?n=2&last=b>; rel=\"next\"");
    assert_eq!(tags(one, "?n=2&last=b").json()["tags"], json!(["c"]));
    assert_eq!(tags(one, "?n=0").json()["tags"], json!([]));
    wait_for("the tags to be known everywhere", PATIENCE, || (two.images().len() == 3).then_some(()));
    assert_eq!(tags(two, "").json()["tags"], json!(["a", "b", "c"]));
    // What refers to it, pushed by digest: on another node too.
    let digest = sha256(manifest.to_string().as_bytes());
    let subject = json!({"mediaType": MANIFEST, "digest": digest, "size": manifest.to_string().len()});
    let signature = artifact(one, "lab/thing", "signed", Some(subject));
    let at = sha256(signature.to_string().as_bytes());
    let pushed = put_manifest(one, "lab/thing", &at, MANIFEST, &signature).is(201);
    assert_eq!(pushed.header("oci-subject"), digest);
    let referrers = |host: &Host, query: &str| {
        let answer = ask(host, "GET", &format!("/v2/lab/thing/referrers/{digest}{query}"), &[]).is(200);
        assert_eq!(answer.header("content-type"), INDEX);
        answer
    };
    wait_for("it to be known everywhere", PATIENCE, || {
        (referrers(two, "").json()["manifests"].as_array()?.len() == 1).then_some(())
    });
    for host in [one, two] {
        let found = referrers(host, "").json()["manifests"][0].clone();
        assert_eq!((&found["digest"], &found["artifactType"]), (&json!(at), &json!("text/note")));
        assert_eq!(found["annotations"]["said"], "signed");
    }
    // It is listed once, under however many names.
    put_manifest(one, "lab/thing", "signature", MANIFEST, &signature).is(201);
    assert_eq!(referrers(one, "").json()["manifests"].as_array().map(Vec::len), Some(1));
    ask(one, "DELETE", "/v2/lab/thing/manifests/signature", &[]).is(202);
    assert_eq!(referrers(one, "?artifactType=text/other").json()["manifests"], json!([]));
    assert_eq!(referrers(one, "?artifactType=text/note").header("oci-filters-applied"), "artifactType");
    let none = ask(one, "GET", &format!("/v2/lab/thing/referrers/{}", sha256(b"none")), &[]).is(200);
    assert_eq!(none.json()["manifests"], json!([]));
    assert_eq!(tags(one, "").json()["tags"], json!(["a", "b", "c"]), "what has no tag shows none");
    assert_eq!(ask(one, "GET", "/v2/_catalog", &[]).is(200).json(), json!({"repositories": ["lab/thing"]}));
}

#[test]
fn content_management_takes_tags_and_manifests_back() {
    let lab = Lab::mesh(2);
    let [one, two] = lab.hosts();
    let manifest = artifact(one, "gone", "soon", None);
    let digest = sha256(manifest.to_string().as_bytes());
    for tag in ["a", "b", "c"] {
        put_manifest(one, "gone", tag, MANIFEST, &manifest).is(201);
    }
    let stays = artifact(one, "gone", "stays", None);
    put_manifest(one, "gone", "stays", MANIFEST, &stays).is(201);
    wait_for("the tags to be known everywhere", PATIENCE, || (two.images().len() == 4).then_some(()));
    let by_digest = format!("manifests/{digest}");
    for host in [one, two] {
        ask(host, "GET", &format!("/v2/gone/{by_digest}"), &[]).is(200);
        // The mesh has it, and no repository of that name.
        ask(host, "GET", &format!("/v2/other/{by_digest}"), &[]).refuses(404, "MANIFEST_UNKNOWN");
    }
    ask(two, "DELETE", "/v2/gone/manifests/a", &[]).is(202);
    ask(two, "GET", "/v2/gone/manifests/a", &[]).refuses(404, "MANIFEST_UNKNOWN");
    ask(two, "GET", "/v2/gone/manifests/b", &[]).is(200);
    ask(two, "DELETE", &format!("/v2/gone/blobs/{}", sha256(b"soon")), &[]).refuses(405, "UNSUPPORTED");
    ask(two, "DELETE", &format!("/v2/gone/manifests/{digest}"), &[]).is(202);
    ask(two, "DELETE", &format!("/v2/gone/manifests/{digest}"), &[]).refuses(404, "MANIFEST_UNKNOWN");
    ask(two, "GET", &format!("/v2/gone/{by_digest}"), &[]).refuses(404, "MANIFEST_UNKNOWN");
    // What a tag has moved on from is had by its digest, until that is deleted.
    let before = format!("/v2/gone/manifests/{}", sha256(stays.to_string().as_bytes()));
    put_manifest(two, "gone", "stays", MANIFEST, &artifact(two, "gone", "moved on", None)).is(201);
    wait_for("the tag to have moved everywhere", PATIENCE, || {
        let tagged = ask(one, "GET", "/v2/gone/manifests/stays", &[]).is(200);
        (!before.ends_with(tagged.header("docker-content-digest"))).then_some(())
    });
    ask(one, "GET", &before, &[]).is(200);
    ask(one, "DELETE", &before, &[]).is(202);
    ask(one, "GET", &before, &[]).refuses(404, "MANIFEST_UNKNOWN");
    wait_for("it to be gone everywhere", PATIENCE, || (one.images().len() == 1).then_some(()));
    assert_eq!(artifact(two, "gone", "soon", None), manifest);
    put_manifest(two, "gone", "again", MANIFEST, &manifest).is(201);
    ask(two, "GET", &format!("/v2/gone/{by_digest}"), &[]).is(200);
    for tag in ["again", "stays"] {
        ask(two, "DELETE", &format!("/v2/gone/manifests/{tag}"), &[]).is(202);
    }
    wait_for("all to be gone everywhere", PATIENCE, || one.images().is_empty().then_some(()));
    ask(one, "GET", &format!("/v2/gone/{by_digest}"), &[]).refuses(404, "MANIFEST_UNKNOWN");
    ask(one, "GET", "/v2/gone/tags/list", &[]).refuses(404, "NAME_UNKNOWN");
    let staged = push_blob(one, "gone", "never named");
    ask(one, "DELETE", &format!("/v2/gone/blobs/{staged}"), &[]).is(202);
    ask(one, "GET", &format!("/v2/gone/blobs/{staged}"), &[]).refuses(404, "BLOB_UNKNOWN");
}

#[test]
fn an_index_of_platforms_is_one_name() {
    let lab = Lab::mesh(1);
    let [one] = lab.hosts();
    push(one, &images::busybox("alpine.oci"), "multi:amd64");
    let got = ask(one, "GET", "/v2/multi/manifests/amd64", &[]).is(200);
    let other = artifact(one, "multi", "another machine's", None);
    let other_digest = sha256(other.to_string().as_bytes());
    put_manifest(one, "multi", &other_digest, MANIFEST, &other).is(201);
    let entry = |digest: &str, size: usize, architecture: &str| json!({"mediaType": MANIFEST, "digest": digest, "size": size, "platform": {"os": "linux", "architecture": architecture}});
    let here = if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" };
    let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [
        entry(got.header("docker-content-digest"), got.body.len(), here), entry(&other_digest, other.to_string().len(), "riscv64")]});
    put_manifest(one, "multi", "all", INDEX, &index).is(201);
    assert_eq!(one.moyai(&["run", "--rm", "multi:all", "echo", "mine"]).ok().stdout, "mine\n");
    assert_eq!(ask(one, "GET", "/v2/multi/manifests/all", &[]).is(200).body, index.to_string());
    ask(one, "GET", &format!("/v2/multi/manifests/{other_digest}"), &[]).is(200);
    let unknown = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry(&sha256(b"no"), 2, here)]});
    put_manifest(one, "multi", "bad", INDEX, &unknown).refuses(404, "MANIFEST_BLOB_UNKNOWN");
}

#[test]
fn only_this_machine_s_root_pushes() {
    let lab = Lab::mesh(1);
    let [one] = lab.hosts();
    one.load(&images::alpine());
    let as_nobody = |method: &str, path: &str| {
        let url = format!("http://127.0.0.1:5000{path}");
        answer(&one.run("setpriv", &["--reuid", "65534", "--clear-groups", "curl", "-s", "-i", "-X", method, &url]))
    };
    as_nobody("POST", "/v2/evil/blobs/uploads/").refuses(403, "DENIED");
    as_nobody("DELETE", "/v2/library/alpine/manifests/latest").refuses(403, "DENIED");
    as_nobody("GET", "/v2/library/alpine/manifests/latest").is(200);
    ask(one, "POST", "/v2/good/blobs/uploads/", &[]).is(202);
    ask(one, "PUT", "/v2/good/tags/list", &[]).refuses(405, "UNSUPPORTED");
    ask(one, "GET", "/nothing", &[]).refuses(404, "UNSUPPORTED");
}

/// Docker's registry on lab-1, with the image `alp:1` in it. `more` is for its configuration.
fn outside(lab: &Lab, one: &Host, address: &str, more: &str) -> Background {
    let (folder, config) = (lab.folder().join("outside"), lab.folder().join("outside.yml"));
    fs::write(
        &config,
        format!(
            "version: 0.1\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp:\n  addr: {address}\n{more}",
            folder.display()
        ),
    )
    .expect("write");
    let mut command = one.command("docker-registry", &["serve", &config.to_string_lossy()]);
    let log = fs::File::create(lab.folder().join("outside.log")).expect("make a file");
    let registry = Background(command.stdout(log).stderr(Stdio::null()).spawn().expect("docker-registry"));
    wait_for("the registry to listen", PATIENCE, || {
        let answer =
            one.run("curl", &["-sk", "-o", "/dev/null", "-w", "%{http_code}", &format!("http://{address}/v2/")]);
        (answer.text() != "000").then_some(())
    });
    registry
}

#[test]
fn what_the_mesh_has_not_comes_from_outside() {
    let lab = Lab::mesh(2);
    let [one, two] = lab.hosts();
    let _registry = outside(&lab, one, "127.0.0.1:5001", "");
    let layout = images::busybox("alpine.oci");
    let from = format!("oci:{}", layout.display());
    skopeo(one, &["copy", "--dest-tls-verify=false", &from, "docker://127.0.0.1:5001/alp:1"]);
    one.moyai(&["run", "127.0.0.1:5001/alp:1", "true"]).fails(125).says("moyai pull 127.0.0.1:5001/alp:1");
    // What an earlier pull has left is gone on with, if it is right.
    let layer = fs::read_dir(layout.join("blobs/sha256"))
        .expect("blobs")
        .flatten()
        .max_by_key(|blob| blob.metadata().map_or(0, |meta| meta.len()));
    let layer = layer.expect("a blob");
    let part = one.data.join("outside").join(layer.file_name()).with_extension("part");
    let bytes = fs::read(layer.path()).expect("read");
    fs::write(&part, &bytes[..bytes.len() / 2]).expect("write");
    let pulled = one.moyai(&["--json", "pull", "127.0.0.1:5001/alp:1"]).ok().json();
    assert!(!part.exists() && fs::read_dir(one.data.join("outside")).expect("a folder").next().is_none());
    let config: Value = serde_json::from_slice(&fs::read(layout.join("index.json")).expect("an index")).expect("JSON");
    let digest = config["manifests"][0]["digest"].as_str().expect("a digest").to_owned();
    wait_for("its name to be known", PATIENCE, || (two.images().len() == 1).then_some(()));
    assert_eq!(two.images()[0]["id"], pulled["id"]);
    two.moyai(&["run", "--rm", "--on", "node=lab-2", "127.0.0.1:5001/alp:1", "true"]).ok();
    let saved = lab.folder().join("saved.tar");
    one.moyai(&["image", "save", "127.0.0.1:5001/alp:1", "-o", &saved.to_string_lossy()]).ok();
    let output = Command::new("tar").args(["-tf", &saved.to_string_lossy()]).output().expect("tar");
    assert!(
        String::from_utf8_lossy(&output.stdout).contains(&digest.replace("sha256:", "blobs/sha256/")),
        "bit for bit"
    );
    // Damaged leftovers cost a second try, not the pull.
    one.moyai(&["image", "rm", "127.0.0.1:5001/alp:1"]).ok();
    wait_for("it to be gone", PATIENCE, || {
        let objects = fs::read_dir(one.data.join("store/objects")).expect("objects").flatten();
        let left = objects.filter(|entry| fs::read_dir(entry.path()).is_ok_and(|mut files| files.next().is_some()));
        (left.count() == 0).then_some(())
    });
    fs::write(&part, "garbage").expect("write");
    one.moyai(&["pull", "127.0.0.1:5001/alp:1"]).ok();
    one.moyai(&["pull", "127.0.0.1:5001/none:1"]).fails(1).says("has no none:1");
    one.moyai(&["pull", "127.0.0.1:5009/alp:1"]).fails(1).says("cannot be reached");
}

#[test]
fn a_registry_outside_is_shown_who_asks() {
    let lab = Lab::mesh(2);
    let [one, _] = lab.hosts();
    // It wants a token, which is had at another place.
    let tokens = lab.folder().join("tokens");
    fs::create_dir(&tokens).expect("make a folder");
    let mut server = one.command("busybox", &["httpd", "-f", "-p", "127.0.0.1:5002", "-h", &tokens.to_string_lossy()]);
    let _tokens = Background(server.spawn().expect("busybox"));
    let silly = "auth: {silly: {realm: 'http://127.0.0.1:5002/token.json', service: lab}}\n";
    let _registry = outside(&lab, one, "127.0.0.1:5001", silly);
    one.moyai(&["pull", "127.0.0.1:5001/alp:1"]).fails(1).says("docker login 127.0.0.1:5001");
    fs::write(tokens.join("token.json"), r#"{"token": "let me in"}"#).expect("write");
    let from = format!("oci:{}", images::busybox("alpine.oci").display());
    skopeo(
        one,
        &["copy", "--dest-tls-verify=false", "--dest-registry-token", "any", &from, "docker://127.0.0.1:5001/alp:1"],
    );
    one.moyai(&["pull", "127.0.0.1:5001/alp:1"]).ok();
}

/// Docker's registry on lab-1 at 10.77.0.1:5003, with `alp:1` in it; the certificate that signed its own.
fn outside_with_tls(lab: &Lab, one: &Host) -> (Background, String) {
    let file = |name: &str| lab.folder().join(name).to_string_lossy().into_owned();
    let (key, certificate) = (file("key.pem"), file("certificate.pem"));
    let (authority, authority_key) = (file("authority.pem"), file("authority-key.pem"));
    let new = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1"];
    one.run(
        "openssl",
        &[&new[..], &["-subj", "/CN=authority", "-keyout", &authority_key, "-out", &authority]].concat(),
    )
    .ok();
    let signed = [
        "-CA",
        &authority,
        "-CAkey",
        &authority_key,
        "-subj",
        "/CN=lab",
        "-addext",
        "subjectAltName=IP:10.77.0.1",
        "-addext",
        "basicConstraints=critical,CA:FALSE",
        "-keyout",
        &key,
        "-out",
        &certificate,
    ];
    one.run("openssl", &[&new[..], &signed].concat()).ok();
    let registry = outside(lab, one, "10.77.0.1:5003", &format!("  tls: {{certificate: {certificate}, key: {key}}}\n"));
    let from = format!("oci:{}", images::busybox("alpine.oci").display());
    skopeo(one, &["copy", "--dest-tls-verify=false", &from, "docker://10.77.0.1:5003/alp:1"]);
    (registry, authority)
}

/// Runs `moyai VERB` that starts the host's daemon, which then trusts these authorities alone.
fn start_trusting(host: &Host, verb: &str, authorities: &str) {
    let (data, trusting) = (host.data.to_string_lossy(), format!("SSL_CERT_FILE={authorities}"));
    let moyai = moyai_tests::lab::binary();
    host.run("env", &["-u", "SSL_CERT_DIR", &trusting, &moyai.to_string_lossy(), "--data", &data, verb]).ok();
}

/// Starts a node's daemon again, which then trusts this authority.
fn trust(host: &Host, authority: &str) {
    host.moyai(&["down"]).ok();
    start_trusting(host, "up", authority);
}

#[test]
fn a_registry_outside_must_show_a_good_certificate() {
    let lab = Lab::new(2);
    let [one, two] = lab.hosts();
    let (_registry, authority) = outside_with_tls(&lab, one);
    two.moyai(&["init"]).ok();
    two.moyai(&["pull", "10.77.0.1:5003/alp:1"]).fails(1).says("certificate");
    trust(two, &authority);
    two.moyai(&["pull", "10.77.0.1:5003/alp:1"]).ok();
    two.moyai(&["run", "--rm", "10.77.0.1:5003/alp:1", "true"]).ok();
}

#[test]
fn a_machine_without_certificates_runs_and_pulls_when_it_has_some() {
    let lab = Lab::new(2);
    let [one, two] = lab.hosts();
    let (_registry, authority) = outside_with_tls(&lab, one);
    let installed = lab.folder().join("installed.pem");
    start_trusting(two, "init", &installed.to_string_lossy());
    let refused = two.moyai(&["pull", "10.77.0.1:5003/alp:1"]);
    let said = "error: 10.77.0.1:5003/alp:1: this machine has no certificates to know the registry 10.77.0.1:5003 by";
    refused.fails(1).says(said).says("install");
    // One of its own is spoken to without.
    two.moyai(&["pull", "127.0.0.1:5009/alp:1"]).fails(1).says("127.0.0.1:5009 cannot be reached");
    std::fs::copy(authority, installed).expect("a file");
    two.moyai(&["pull", "10.77.0.1:5003/alp:1"]).ok();
}

#[test]
fn what_many_pull_at_once_is_fetched_from_outside_by_one() {
    let lab = Lab::mesh(4);
    let hosts: [&Host; 4] = lab.hosts();
    let (_registry, authority) = outside_with_tls(&lab, hosts[0]);
    hosts.iter().for_each(|host| trust(host, &authority));
    wait_for("all to see all", PATIENCE, || hosts.iter().all(|host| host.nodes_in("alive").len() == 4).then_some(()));
    let log = || fs::read_to_string(lab.folder().join("outside.log")).expect("its log");
    std::thread::scope(|scope| {
        for host in hosts {
            scope.spawn(move || host.moyai(&["pull", "10.77.0.1:5003/alp:1"]).ok());
        }
    });
    let asked = log();
    let count = |what: &str| asked.lines().filter(|line| line.contains(&format!("\"GET /v2/alp/{what}/"))).count();
    // A config and a layer.
    assert_eq!((count("manifests"), count("blobs")), (1, 2), "{asked}");
    for host in hosts {
        host.moyai(&["run", "--rm", "--on", &format!("node={}", host.name), "10.77.0.1:5003/alp:1", "true"]).ok();
    }
}
