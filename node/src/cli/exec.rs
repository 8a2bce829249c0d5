//! `moyai exec`, `moyai attach` and the terminal of `moyai run -it`: to a process in a container wherever that runs.

use std::io::{IsTerminal, Write};

use bytes::Bytes;
use moyai_runtime::launch::exec::{FromProcess, MAX_FRAME, Task, ToProcess, Wish, head};
use moyai_runtime::oci::Raw;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::Context;
use super::args::{AttachWish, ExecWish};
use super::images::encode;
use crate::api::client::Client;
use crate::api::types::Row;
use crate::daemon::problem;

/// Pieces of input on their way.
const QUEUE: usize = 16;
/// How long a line is given to end that its user leaves.
const LEAVE: std::time::Duration = std::time::Duration::from_secs(2);
/// Of a piece of input.
const PIECE: usize = 16 * 1024;

/// The user's end of a line to a container.
pub(super) struct Line {
    /// What is said to it, as frames.
    pub(super) say: mpsc::Sender<std::io::Result<Bytes>>,
    /// What it says, as frames.
    pub(super) hear: Box<dyn AsyncRead + Unpin + Send>,
}

impl Line {
    /// Has something done in a container.
    pub(super) async fn open(client: &Client, name: &str, task: &Task) -> anyhow::Result<Line> {
        let (say, body) = mpsc::channel(QUEUE);
        let query = encode(&serde_json::to_string(task)?);
        let path = format!("/v1/workloads/{}/exec?task={query}", encode(name));
        let hear = client.exchange(&path, body).await?;
        Ok(Line { say, hear })
    }

    /// The next thing it says; what is not known is passed over.
    pub(super) async fn next(&mut self) -> anyhow::Result<FromProcess> {
        loop {
            let mut first = [0; 5];
            if self.hear.read_exact(&mut first).await.is_err() {
                let hint = "`moyai nodes` shows whether its node is alive";
                return Err(problem("the line to it broke; it may go on", hint));
            }
            let (kind, len) = head(first)?;
            let mut content = vec![0; len.min(MAX_FRAME)];
            self.hear.read_exact(&mut content).await?;
            if let Some(said) = FromProcess::decode(kind, &content) {
                return Ok(said);
            }
        }
    }
}

/// Keys that leave a container and let it go on, as docker writes them: `ctrl-p,ctrl-q`, `a,b`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DetachKeys {
    keys: Vec<u8>,
    /// How many of them have just been typed.
    typed: usize,
}

impl DetachKeys {
    pub(super) fn parse(text: &str) -> anyhow::Result<DetachKeys> {
        let key = |word: &str| match (word.strip_prefix("ctrl-"), word.as_bytes()) {
            // What a terminal sends for it: ASCII without its upper bits.
            (Some(key), _) if key.len() == 1 && key.as_bytes()[0].is_ascii_graphic() => Some(key.as_bytes()[0] & 0x1f),
            (None, [key]) => Some(*key),
            _ => None,
        };
        let keys: Option<Vec<u8>> = text.split(',').filter(|word| !word.is_empty()).map(key).collect();
        let keys = keys.ok_or_else(|| {
            problem(format!("--detach-keys {text}: no such keys"), "write it like ctrl-p,ctrl-q or a,b")
        })?;
        Ok(DetachKeys { keys, typed: 0 })
    }

    /// What of `bytes` goes on to the container, and whether the keys came.
    fn pass(&mut self, bytes: &[u8]) -> (Vec<u8>, bool) {
        let mut passed = Vec::new();
        for byte in bytes {
            if self.keys.get(self.typed) == Some(byte) {
                self.typed += 1;
                if self.typed == self.keys.len() {
                    return (passed, true);
                }
                continue;
            }
            passed.extend_from_slice(&self.keys[..self.typed]);
            self.typed = usize::from(self.keys.len() > 1 && self.keys.first() == Some(byte));
            if self.typed == 0 {
                passed.push(*byte);
            }
        }
        (passed, false)
    }
}

/// How a session with a container came to its end.
pub(super) enum End {
    /// The process ended.
    Exit(u8),
    /// The user left.
    Detached,
    /// It never ran, or ran no more.
    NotStarted(u8, String),
}

/// What of this side takes part in a session.
pub(super) struct Side {
    /// Standard input is passed on.
    pub(super) input: bool,
    /// It is a terminal, and so is what the process has.
    pub(super) terminal: bool,
    /// How to leave.
    pub(super) keys: Option<DetachKeys>,
}

/// Passes on both ways until the process has ended or the user leaves.
pub(super) async fn session(mut line: Line, side: Side) -> anyhow::Result<End> {
    // Without its input this side's keys are its own: Ctrl-C leaves.
    let raw = (side.terminal && side.input).then(Raw::enter);
    let (leave, mut left) = mpsc::channel(1);
    if side.input {
        pass_input(line.say.clone(), side.keys.clone().filter(|_| side.terminal), leave);
    }
    let signals = tokio::spawn(pass_signals(line.say.clone(), side.terminal));
    let mut heard = false;
    let end = loop {
        let said = tokio::select! {
            said = line.next() => said,
            Some(()) = left.recv() => break End::Detached,
        };
        let said = match said {
            // It was gone before there was anything to hear.
            Err(error) if !heard => break End::NotStarted(125, format!("{error:#}")),
            said => said?,
        };
        heard = true;
        match said {
            // Whoever reads may have seen enough; what runs is not to be stopped by that.
            FromProcess::Output(bytes) => {
                let _unread = std::io::stdout().write_all(&bytes).and_then(|()| std::io::stdout().flush());
            }
            FromProcess::ErrorOutput(bytes) => {
                let _unread = std::io::stderr().write_all(&bytes);
            }
            FromProcess::Exit(code) => break End::Exit(code as u8),
            FromProcess::NotStarted(code, reason) => break End::NotStarted(code as u8, reason),
        }
    };
    signals.abort();
    drop(raw);
    if matches!(end, End::Detached) {
        let Line { say, mut hear } = line;
        drop(say);
        // What was said last has arrived when the other side ends the line too.
        let mut nowhere = tokio::io::sink();
        let _late = tokio::time::timeout(LEAVE, tokio::io::copy(&mut hear, &mut nowhere)).await;
    }
    Ok(end)
}

/// Runs a process in a container.
pub async fn run(context: &Context, wish: &ExecWish) -> anyhow::Result<u8> {
    must_be_terminal(wish.tty)?;
    let asked = Wish {
        args: wish.command.clone(),
        env: wish.env.clone(),
        user: wish.user.clone(),
        workdir: wish.workdir.clone(),
        terminal: wish.tty.then(|| moyai_runtime::host::terminal_size().unwrap_or((24, 80))),
        input: wish.interactive,
    };
    let line = Line::open(&context.client(), &wish.name, &Task::Run(asked)).await?;
    match session(line, Side { input: wish.interactive, terminal: wish.tty, keys: None }).await? {
        End::Exit(code) => Ok(code),
        End::Detached => Ok(0),
        End::NotStarted(code, reason) => {
            eprintln!("error: {reason}\nhint: `moyai logs` and `moyai ps` show what the container does");
            Ok(code)
        }
    }
}

/// A terminal that is asked for must be there.
pub(super) fn must_be_terminal(asked: bool) -> anyhow::Result<()> {
    match asked && !std::io::stdin().is_terminal() {
        true => Err(problem("standard input is no terminal", "leave out -t, or run it in one")),
        false => Ok(()),
    }
}

/// Shows what a container writes, and writes to it.
pub async fn attach(context: &Context, wish: &AttachWish) -> anyhow::Result<u8> {
    let client = context.client();
    let rows: Vec<Row> = client.get(&format!("/v1/workloads/{}", encode(&wish.name))).await?;
    let terminal = rows.first().is_some_and(|row| row.terminal);
    let side = Side {
        input: !wish.no_stdin,
        terminal: terminal && std::io::stdin().is_terminal(),
        keys: Some(DetachKeys::parse(&wish.detach_keys)?),
    };
    match attached(&client, &wish.name, side, false).await? {
        End::Exit(code) => Ok(code),
        End::Detached => {
            eprintln!("\n{} goes on; `moyai attach {}` comes back to it", wish.name, wish.name);
            Ok(0)
        }
        End::NotStarted(_, reason) => {
            Err(problem(format!("{}: {reason}", wish.name), "`moyai ps -a` shows what became of it"))
        }
    }
}

/// A session with a container's first process. With `before` what it wrote until now is shown too, to the first who asks.
pub(super) async fn attached(client: &Client, name: &str, side: Side, before: bool) -> anyhow::Result<End> {
    let line = Line::open(client, name, &Task::Attach).await?;
    // The first word on a line that nobody else has: it has room.
    let _first = line.say.send(Ok(ToProcess::Attach(before).encode().into())).await;
    if let Some((rows, columns)) = moyai_runtime::host::terminal_size().filter(|_| side.terminal) {
        let _second = line.say.send(Ok(ToProcess::Size(rows, columns).encode().into())).await;
    }
    session(line, side).await
}

/// A thread, since nothing stops a read of a terminal: it ends with this process.
fn pass_input(pieces: mpsc::Sender<std::io::Result<Bytes>>, mut keys: Option<DetachKeys>, leave: mpsc::Sender<()>) {
    std::thread::spawn(move || {
        let mut buffer = vec![0; PIECE];
        loop {
            let read = std::io::Read::read(&mut std::io::stdin().lock(), &mut buffer);
            let told = match read {
                Ok(len) if len > 0 => match keys.as_mut().map(|keys| keys.pass(&buffer[..len])) {
                    None => ToProcess::Input(buffer[..len].to_vec()),
                    Some((bytes, false)) => ToProcess::Input(bytes),
                    Some((bytes, true)) => {
                        // What was typed before the keys is still the container's.
                        let _gone = pieces.blocking_send(Ok(ToProcess::Input(bytes).encode().into()));
                        drop(pieces);
                        let _gone = leave.blocking_send(());
                        return;
                    }
                },
                Ok(_) | Err(_) => ToProcess::InputEnd,
            };
            let last = told == ToProcess::InputEnd;
            if pieces.blocking_send(Ok(told.encode().into())).is_err() || last {
                return;
            }
        }
    });
}

async fn pass_signals(pieces: mpsc::Sender<std::io::Result<Bytes>>, tty: bool) -> std::io::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut window = signal(SignalKind::window_change())?;
    loop {
        let told = tokio::select! {
            _ = interrupt.recv() => ToProcess::Signal(2),
            _ = terminate.recv() => ToProcess::Signal(15),
            _ = window.recv() => match moyai_runtime::host::terminal_size().filter(|_| tty) {
                Some((rows, columns)) => ToProcess::Size(rows, columns),
                None => continue,
            },
        };
        if pieces.send(Ok(told.encode().into())).await.is_err() {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn detach_keys_are_held_back_until_they_are_not() {
        let mut keys = DetachKeys::parse("ctrl-p,ctrl-q").unwrap();
        assert_eq!(keys.pass(b"ab"), (b"ab".to_vec(), false));
        assert_eq!(keys.pass(b"c\x10"), (b"c".to_vec(), false));
        assert_eq!(keys.pass(b"d"), (b"\x10d".to_vec(), false));
        assert_eq!(keys.pass(b"\x10\x10"), (b"\x10".to_vec(), false));
        assert_eq!(keys.pass(b"\x11more"), (Vec::new(), true));
        let mut one = DetachKeys::parse("ctrl-]").unwrap();
        assert_eq!(one.pass(b"a\x1d"), (b"a".to_vec(), true));
        let mut none = DetachKeys::parse("").unwrap();
        assert_eq!(none.pass(b"\x10\x11"), (b"\x10\x11".to_vec(), false));
        for wrong in ["ctrl-", "ctrl-pq", "ab", "é"] {
            assert!(DetachKeys::parse(wrong).is_err(), "{wrong}");
        }
    }
}
