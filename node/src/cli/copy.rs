//! `moyai cp`: files into a container or out of one, wherever it runs.

use std::io::{self, Write};
use std::path::Path;

use bytes::Bytes;
use moyai_runtime::copy;
use moyai_runtime::launch::exec::{FromProcess, MAX_FRAME, Task, ToProcess};
use tokio::sync::mpsc;

use super::Context;
use super::args::CpWish;
use super::exec::Line;
use crate::daemon::problem;
use crate::pieces::Pieces;

/// Pieces of a stream on their way to or from the disk.
const QUEUE: usize = 16;

/// One side of a copy.
#[derive(Debug, PartialEq, Eq)]
enum Place<'a> {
    Container(&'a str, &'a str),
    Here(&'a str),
    Stream,
}

/// As docker has it: what has a colon before any slash is in a container.
fn place(text: &str) -> Place<'_> {
    match text.split_once(':') {
        _ if text == "-" => Place::Stream,
        Some((name, path)) if !name.is_empty() && !name.contains('/') && !name.starts_with('.') => {
            Place::Container(name, path)
        }
        _ => Place::Here(text),
    }
}

/// Copies.
pub async fn run(context: &Context, wish: &CpWish) -> anyhow::Result<u8> {
    let hint = "write it like `moyai cp web:/etc/hosts .` or `moyai cp ./site web:/srv`";
    match (place(&wish.from), place(&wish.to)) {
        (Place::Container(..), Place::Container(..)) => {
            Err(problem("both are in containers", "copy to this machine first"))
        }
        (Place::Container(name, path), to) => out(context, name, path, &to, wish.archive).await,
        (from, Place::Container(name, path)) => into(context, &from, name, path, wish.archive).await,
        _ => Err(problem("neither is in a container", hint)),
    }
}

async fn out(context: &Context, name: &str, path: &str, to: &Place<'_>, keep_owners: bool) -> anyhow::Result<u8> {
    let contents = copy::means_contents(path);
    let task = Task::CopyOut(path.to_owned(), contents);
    let mut line = Line::open(&context.client(), name, &task).await?;
    let (pieces, received) = mpsc::channel(QUEUE);
    let target = match to {
        Place::Here(path) => Some((*path).to_owned()),
        _ => None,
    };
    let named = Path::new(path).file_name().map(std::ffi::OsStr::to_owned);
    let unpacked = tokio::task::spawn_blocking(move || {
        let mut stream = Pieces::new(received);
        match target {
            Some(target) => {
                let named = named.as_deref().filter(|_| !contents);
                copy::unpack(stream, Path::new(&target), named, keep_owners).map(drop)
            }
            None => io::copy(&mut stream, &mut io::stdout().lock()).map(drop).map_err(copy::CopyError::Stream),
        }
    });
    let mut reason = String::new();
    let code = loop {
        match line.next().await? {
            // Who takes it apart says why it stopped.
            FromProcess::Output(bytes) => {
                if pieces.send(Bytes::from(bytes)).await.is_err() {
                    break None;
                }
            }
            FromProcess::ErrorOutput(bytes) => reason = String::from_utf8_lossy(&bytes).into_owned(),
            FromProcess::Exit(code) => break Some(code as u8),
            FromProcess::NotStarted(_, reason) => {
                return Err(problem(format!("{name}: {reason}"), "`moyai ps` shows whether it runs"));
            }
        }
    };
    drop(pieces);
    let unpacked = unpacked.await?;
    match (code, unpacked) {
        // What it said is the reason; that the stream was short is a consequence.
        (Some(code), _) if code != 0 => Err(stopped(name, &reason)),
        (_, Err(error)) => Err(problem(error.to_string(), "what came before it is there")),
        (code, Ok(())) => {
            if !reason.is_empty() {
                eprintln!("warning: {name}: {reason}");
            }
            Ok(code.unwrap_or(1))
        }
    }
}

async fn into(context: &Context, from: &Place<'_>, name: &str, path: &str, keep_owners: bool) -> anyhow::Result<u8> {
    let source = match from {
        Place::Here(path) => Some((*path).to_owned()),
        _ => None,
    };
    if let Some(path) = &source {
        std::fs::symlink_metadata(path)
            .map_err(|error| problem(format!("{path}: {error}"), "name a file or folder of this machine"))?;
    }
    let mut line = Line::open(&context.client(), name, &Task::CopyIn(path.to_owned(), keep_owners)).await?;
    let say = line.say.clone();
    let packed = tokio::task::spawn_blocking(move || {
        let mut sent = Sent { say: say.clone() };
        let packed = match &source {
            Some(path) => {
                // A link that is named is followed, as by cp(1); links below it are not.
                let plain = Path::new(path);
                let path = if plain.is_symlink() {
                    plain.canonicalize().unwrap_or(plain.to_owned())
                } else {
                    plain.to_owned()
                };
                copy::pack(&path, copy::means_contents(&path.to_string_lossy()), &mut sent).map(|left_out| {
                    if left_out > 0 {
                        eprintln!("warning: {left_out} sockets, pipes or devices were left out");
                    }
                })
            }
            None => io::copy(&mut io::stdin().lock(), &mut sent).map(drop).map_err(copy::CopyError::Stream),
        };
        // A stream that is cut off is not to look whole: then the line goes without an end.
        if packed.is_ok() {
            drop(say.blocking_send(Ok(ToProcess::InputEnd.encode().into())));
        } else {
            drop(say.blocking_send(Ok(ToProcess::Signal(15).encode().into())));
        }
        packed
    });
    let mut reason = String::new();
    let code = loop {
        match line.next().await? {
            FromProcess::Output(_) => {}
            FromProcess::ErrorOutput(bytes) => reason = String::from_utf8_lossy(&bytes).into_owned(),
            FromProcess::Exit(code) => break code as u8,
            FromProcess::NotStarted(_, reason) => {
                return Err(problem(format!("{name}: {reason}"), "`moyai ps` shows whether it runs"));
            }
        }
    };
    drop(line);
    match packed.await? {
        // The container's side has said why.
        _ if code != 0 => Err(stopped(name, &reason)),
        Ok(()) => Ok(0),
        Err(error) => Err(problem(error.to_string(), "what came before it is there")),
    }
}

fn stopped(name: &str, reason: &str) -> anyhow::Error {
    problem(format!("{name}: {reason}"), "what came before it is there")
}

/// A stream as it goes.
struct Sent {
    say: mpsc::Sender<io::Result<Bytes>>,
}

impl Write for Sent {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = &bytes[..bytes.len().min(MAX_FRAME)];
        let frame = ToProcess::Input(piece.to_vec()).encode();
        self.say.blocking_send(Ok(frame.into())).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_a_container_is_told_from_what_is_here() {
        assert_eq!(place("web:/etc"), Place::Container("web", "/etc"));
        assert_eq!(place("web.2:data/x:y"), Place::Container("web.2", "data/x:y"));
        assert_eq!(place("./odd:name"), Place::Here("./odd:name"));
        assert_eq!(place("/tmp/a:b"), Place::Here("/tmp/a:b"));
        assert_eq!(place("file"), Place::Here("file"));
        assert_eq!(place("-"), Place::Stream);
    }
}
