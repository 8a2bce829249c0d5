//! load, pull, images, image, df.

use std::path::Path;

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use moyai_protocol::reference::Reference;
use tokio::fs::File;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::Context;
use super::args::{ImageVerb, LoadWish, PullWish};
use super::output::{json_lines, parse_size, size, table};
use crate::api::client::Stream;
use crate::api::types::{Came, ImageRow, LoadStep, PlaceRow, PullStep, UsageRow, Verified};
use crate::daemon::problem;
use crate::pieces::Outgoing;
use crate::registry::outside::Credentials;

/// Written at one time of an archive that is saved.
const PIECE: usize = 1 << 20;

/// Loads an image archive.
pub async fn load(context: &Context, wish: &LoadWish) -> anyhow::Result<u8> {
    let limit = parse_size(&wish.limit)
        .ok_or_else(|| problem(format!("`{}` is no size", wish.limit), "write it like 500m or 32g"))?;
    let mut path = format!("/v1/images/load?name={}&limit={limit}", encode(&stem(&wish.file)));
    if let Some(tag) = &wish.tag {
        path.push_str(&format!("&tag={}", encode(tag)));
    }
    let shown = wish.file.display().to_string();
    let bar = bar(0, &shown);
    let started = std::time::Instant::now();
    let counted = {
        let bar = bar.clone();
        move |len| bar.inc(len)
    };
    let missing = |error: std::io::Error| problem(format!("cannot read {shown}: {error}"), "is the path right?");
    let stream = if wish.file == Path::new("-") {
        context.client().upload(&path, tokio::io::stdin(), counted).await?
    } else if wish.file.is_dir() {
        context.client().upload_pieces(&path, folder(&wish.file)?).await?
    } else {
        let file = File::open(&wish.file).await.map_err(missing)?;
        bar.set_length(file.metadata().await.context("cannot look at the file")?.len());
        context.client().upload(&path, file, counted).await?
    };
    follow(context, stream, &bar, &shown, started).await
}

async fn follow(
    context: &Context,
    mut stream: Stream,
    bar: &ProgressBar,
    shown: &str,
    started: std::time::Instant,
) -> anyhow::Result<u8> {
    let mut last = 0;
    let mut images = 0;
    while let Some(step) = stream.next::<LoadStep>().await? {
        match step {
            LoadStep::Progress { bytes, chunks } => {
                last = bytes;
                bar.set_message(format!("{} chunks, {} new", chunks.0, chunks.1));
            }
            LoadStep::Image { reference, id, size: bytes, chunks } => {
                bar.finish_and_clear();
                images += 1;
                if context.json {
                    println!(
                        "{}",
                        serde_json::json!({"reference": reference, "id": id, "size": bytes, "chunks": chunks.0, "new": chunks.1})
                    );
                } else {
                    let rate = last.max(bytes) as f64 / started.elapsed().as_secs_f64() / 1e6;
                    let short = id.get(..19).unwrap_or(&id);
                    println!(
                        "{reference}  {short}…  {}  {} chunks, {} new  {rate:.0} MB/s",
                        size(bytes),
                        chunks.0,
                        chunks.1
                    );
                }
            }
            LoadStep::Failed(failure) => {
                bar.finish_and_clear();
                return Err(problem(format!("{shown}: {}", failure.error), failure.hint));
            }
        }
    }
    if images == 0 {
        return Err(problem(format!("{shown}: the daemon broke off"), "its log is daemon.log in its data folder"));
    }
    Ok(0)
}

/// A bar on standard error; none when that is no terminal.
fn bar(len: u64, name: &str) -> ProgressBar {
    let bar = ProgressBar::new(len);
    let style = ProgressStyle::with_template("{prefix}  {bytes} of {total_bytes}  {bytes_per_sec}  {bar:24}  {msg}");
    bar.set_style(style.expect("a fixed template is valid").progress_chars("██ "));
    bar.set_prefix(name.to_owned());
    bar
}

/// An OCI layout in a folder, as a tar archive made on the way.
fn folder(dir: &Path) -> anyhow::Result<tokio::sync::mpsc::Receiver<std::io::Result<hyper::body::Bytes>>> {
    if !dir.join("index.json").is_file() {
        return Err(problem(
            format!("{}: there is no index.json in it, so it is no OCI layout", dir.display()),
            "name an archive, or a folder that `skopeo copy … oci:DIR` or `umoci` made",
        ));
    }
    let (sender, receiver) = tokio::sync::mpsc::channel(16);
    let dir = dir.to_owned();
    tokio::task::spawn_blocking(move || {
        let mut archive = tar::Builder::new(Outgoing::new(sender.clone()));
        archive.follow_symlinks(true);
        let written = archive.append_dir_all(".", &dir).and_then(|()| archive.finish());
        if let Err(error) = written {
            let _gone = sender.blocking_send(Err(error));
        }
    });
    Ok(receiver)
}

/// What an image without a name of its own is called: its file, without endings.
fn stem(file: &Path) -> String {
    let name = file.file_name().map_or_else(|| "image".to_owned(), |name| name.to_string_lossy().to_lowercase());
    let mut name = name.as_str();
    while let Some(cut) =
        [".gz", ".zst", ".tgz", ".tar", ".oci", ".docker"].iter().find_map(|end| name.strip_suffix(end))
    {
        name = cut;
    }
    let clean: String =
        name.chars().map(|c| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' }).collect();
    let clean = clean.trim_matches(|c: char| !c.is_ascii_alphanumeric()).to_owned();
    if clean.is_empty() { "image".to_owned() } else { clean }
}

/// Percent-encoding for a query (RFC 3986).
pub(super) fn encode(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => char::from(byte).to_string(),
            byte => format!("%{byte:02X}"),
        })
        .collect()
}

/// Fetches an image to this node, from others or from outside.
pub async fn pull(context: &Context, wish: &PullWish) -> anyhow::Result<u8> {
    let bar = bar(0, &wish.image);
    let path = format!("/v1/images/pull?name={}&fresh={}", encode(&wish.image), wish.fresh);
    let mut stream = context.client().post_stream_of(&path, &credentials(&wish.image)).await?;
    while let Some(step) = stream.next::<PullStep>().await? {
        match step {
            PullStep::Progress(here, all, sources) => {
                bar.set_length(all);
                bar.set_position(here);
                bar.set_message(match sources {
                    0 => String::new(),
                    1 => "from 1 node".to_owned(),
                    _ => format!("from {sources} nodes"),
                });
            }
            PullStep::Waits(node) => bar.set_message(format!("{node} fetches it from its registry")),
            PullStep::Done { reference, id, size: bytes, came } => {
                bar.finish_and_clear();
                if context.json {
                    println!("{}", serde_json::json!({"reference": reference, "id": id, "size": bytes, "came": came}));
                } else {
                    println!("{reference}  {}…  {}  is here", id.get(..19).unwrap_or(&id), size(bytes));
                    came.iter().for_each(|came| println!("{}", told(came)));
                }
                return Ok(0);
            }
            PullStep::Failed(failure) => {
                bar.finish_and_clear();
                return Err(problem(format!("{}: {}", wish.image, failure.error), failure.hint));
            }
        }
    }
    Err(problem("the daemon broke off", "its log is daemon.log in its data folder"))
}

/// How an image came, in a line.
fn told(came: &Came) -> String {
    const NAMED: usize = 4;
    let bytes: u64 = came.from.iter().map(|(_, bytes)| bytes).sum();
    let rate = bytes as f64 / 1e6 / (came.took.max(1) as f64 / 1e3);
    let mut from: Vec<String> =
        came.from.iter().take(NAMED).map(|(node, bytes)| format!("{node} ({})", size(*bytes))).collect();
    if came.from.len() > NAMED {
        from.push(format!("{} more", came.from.len() - NAMED));
    }
    let from = if from.is_empty() { String::new() } else { format!(" from {}", from.join(", ")) };
    let had = if came.had > 0 { format!("; {} was here already", size(came.had)) } else { String::new() };
    format!("  {} in {:.1} s, {rate:.0} MB/s{from}{had}", size(bytes), came.took as f64 / 1e3)
}

/// What docker's or podman's login has left for the registry of an image.
fn credentials(image: &str) -> Option<Credentials> {
    let reference: Reference = image.parse().ok()?;
    let host = reference.name().split('/').next()?;
    // Docker's own, as it has been written since its first version.
    let keys = if host == "docker.io" { vec!["https://index.docker.io/v1/", "docker.io"] } else { vec![host] };
    let of = |name: &str, file: &str| Some(Path::new(&std::env::var_os(name)?).join(file));
    let files = [
        std::env::var_os("REGISTRY_AUTH_FILE").map(Into::into),
        of("DOCKER_CONFIG", "config.json"),
        of("XDG_RUNTIME_DIR", "containers/auth.json"),
        of("HOME", ".docker/config.json"),
    ];
    files.into_iter().flatten().find_map(|file| {
        let config: serde_json::Value = serde_json::from_slice(&std::fs::read(file).ok()?).ok()?;
        let auth = keys.iter().find_map(|key| config["auths"][key]["auth"].as_str())?;
        let pair = String::from_utf8(data_encoding::BASE64.decode(auth.as_bytes()).ok()?).ok()?;
        let (user, password) = pair.split_once(':')?;
        Some(Credentials { user: user.to_owned(), password: password.to_owned() })
    })
}

/// Lists the images.
pub async fn list(context: &Context) -> anyhow::Result<u8> {
    let images: Vec<ImageRow> = context.client().get("/v1/images").await?;
    if context.json {
        json_lines(&images)?;
        return Ok(0);
    }
    let rows: Vec<Vec<String>> = images
        .iter()
        .map(|image| {
            let short = image.id.strip_prefix("sha256:").and_then(|hex| hex.get(..12)).unwrap_or(&image.id);
            vec![image.reference.clone(), short.to_owned(), size(image.size), image.nodes.join(", ")]
        })
        .collect();
    print!("{}", table(&["IMAGE", "ID", "SIZE", "NODES"], &rows));
    Ok(0)
}

/// One of the things that are done with an image.
pub async fn image(context: &Context, verb: ImageVerb) -> anyhow::Result<u8> {
    let client = context.client();
    match verb {
        ImageVerb::Save { output, images } => save(context, output.as_deref(), &images).await?,
        ImageVerb::Tag { image, name } => {
            let path = format!("/v1/images/tag?name={}&tag={}", encode(&image), encode(&name));
            let name: String = client.post(&path, &()).await?;
            println!("{name}");
        }
        ImageVerb::Rm { force, images } => {
            for image in images {
                let path = format!("/v1/images?name={}&force={force}", encode(&image));
                let (name, freed): (String, u64) = client.delete(&path).await?;
                println!("{name}  {} free again here", size(freed));
            }
        }
        ImageVerb::Prune => {
            let freed: u64 = client.post("/v1/images/prune", &()).await?;
            println!("{} free again here", size(freed));
        }
        ImageVerb::Verify { image } => {
            let verified: Verified = client.post(&format!("/v1/images/verify?name={}", encode(&image)), &()).await?;
            if !verified.wrong.is_empty() {
                verified.wrong.iter().for_each(|part| println!("{part}"));
                let count = verified.wrong.len();
                if !verified.lost && !verified.coming {
                    let how = "other images here have the same bytes";
                    println!("{image}  {count} parts were damaged, and are whole again: {how}");
                    return Ok(0);
                }
                let coming = format!("it is fetched again from other nodes: `moyai pull {image}` waits for that");
                let hint = match (verified.lost, verified.coming) {
                    (true, true) => format!("{coming}; then verify it again, for what no other node has"),
                    (true, false) => "no other node has all of it: load it again from where it came".to_owned(),
                    (false, _) => format!("{coming}; what it names is seen when it is verified again"),
                };
                return Err(problem(format!("{image} is damaged here: {count} parts"), hint));
            }
            let what = if verified.parts > 1 { "the image and what it was made of" } else { "the image" };
            println!("{image}  {what}: every chunk and digest is right");
        }
        ImageVerb::Where { image } => {
            let rows: Vec<PlaceRow> = client.get(&format!("/v1/images/where?name={}", encode(&image))).await?;
            if context.json {
                json_lines(&rows)?;
                return Ok(0);
            }
            let rows: Vec<Vec<String>> =
                rows.into_iter().map(|row| vec![row.node, part(&row.image, row.chunks), row.original]).collect();
            print!("{}", table(&["NODE", "IMAGE", "ORIGINAL"], &rows));
        }
    }
    Ok(0)
}

/// How much of an image is somewhere.
fn part(word: &str, chunks: Option<(u32, Option<u32>)>) -> String {
    match chunks {
        Some((here, Some(all))) if all > 0 => {
            format!("{word}, {here} of {all} chunks ({} %)", u64::from(here) * 100 / u64::from(all))
        }
        Some((here, _)) => format!("{word}, {here} chunks"),
        None => word.to_owned(),
    }
}

async fn save(context: &Context, output: Option<&Path>, images: &[String]) -> anyhow::Result<()> {
    use std::io::IsTerminal;
    if output.is_none() && std::io::stdout().is_terminal() {
        return Err(problem("an archive is nothing for a terminal", "moyai image save IMAGE -o FILE"));
    }
    let names: Vec<String> = images.iter().map(|name| encode(name)).collect();
    let (_end, nothing) = tokio::sync::mpsc::channel(1);
    drop(_end);
    let path = format!("/v1/images/save?name={}", names.join(","));
    let mut archive = context.client().exchange(&path, nothing).await?;
    let Some(output) = output else {
        pass_on(&mut archive, &mut tokio::io::stdout()).await.map_err(|broken| broken.told("standard output"))?;
        return Ok(());
    };
    // Under another name until it is whole: nobody takes a part of it for all.
    let mut part = output.as_os_str().to_owned();
    part.push(".part");
    let written = async {
        let mut file = File::create(&part).await.map_err(Broken::Output)?;
        let len = pass_on(&mut archive, &mut file).await?;
        file.sync_all().await.map_err(Broken::Output)?;
        tokio::fs::rename(&part, output).await.map_err(Broken::Output)?;
        Ok(len)
    };
    match written.await {
        Ok(len) => {
            println!("{}  {}", output.display(), size(len));
            Ok(())
        }
        Err(broken) => {
            // It says nothing more than the error does.
            drop(tokio::fs::remove_file(&part).await);
            Err(Broken::told(broken, &output.display().to_string()))
        }
    }
}

/// Why an archive did not get to where it was to go.
enum Broken {
    /// The daemon broke off.
    Archive(std::io::Error),
    /// It cannot be written there.
    Output(std::io::Error),
}

impl Broken {
    fn told(self, output: &str) -> anyhow::Error {
        match self {
            Broken::Archive(error) => problem(
                format!("the daemon broke off while it sent the image: {error}"),
                "`moyai image verify` says whether it is damaged here; daemon.log has more",
            ),
            Broken::Output(error) => problem(format!("cannot write {output}: {error}"), ""),
        }
    }
}

/// Copies everything in pieces of [`PIECE`] bytes: each is one write by another thread, and for a file one that the kernel does not
/// have to fill up with zeros first.
async fn pass_on(from: &mut (impl AsyncRead + Unpin), to: &mut (impl AsyncWrite + Unpin)) -> Result<u64, Broken> {
    let (mut buffer, mut all) = (vec![0; PIECE], 0);
    loop {
        let mut len = 0;
        while len < PIECE {
            match from.read(&mut buffer[len..]).await.map_err(Broken::Archive)? {
                0 => break,
                count => len += count,
            }
        }
        to.write_all(&buffer[..len]).await.map_err(Broken::Output)?;
        all += len as u64;
        if len < PIECE {
            to.flush().await.map_err(Broken::Output)?;
            return Ok(all);
        }
    }
}

/// Shows what the images on this node take.
pub async fn df(context: &Context) -> anyhow::Result<u8> {
    let mut rows: Vec<UsageRow> = context.client().get("/v1/images/usage").await?;
    if context.json {
        json_lines(&rows)?;
        return Ok(0);
    }
    rows.sort_by(|a, b| b.own.cmp(&a.own).then_with(|| a.names.cmp(&b.names)));
    let cells =
        rows.iter().map(|row| vec![row.names.join(", "), size(row.size), size(row.size - row.own), size(row.own)]);
    print!("{}", table(&["IMAGE", "SIZE", "SHARED", "FREED WITHOUT IT"], &cells.collect::<Vec<_>>()));
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_names_its_image() {
        for (file, name) in [
            ("alpine.tar", "alpine"),
            ("/a/b/Tools_2.tar.gz", "tools_2"),
            ("x.tgz", "x"),
            ("-", "image"),
            ("my image.tar", "my-image"),
        ] {
            assert_eq!(stem(Path::new(file)), name);
        }
        assert_eq!(encode("a/b:c d"), "a%2Fb%3Ac%20d");
    }
}
