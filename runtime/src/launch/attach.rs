//! Users at a container's input and output: its shim's side of `moyai attach` and `moyai run -it`.
//!
//! **States.** A line is *silent* until it says [`ToProcess::Attach`], then it gets all that the container writes. What an
//! interactive container writes before the first line asks for it is kept, so that who runs one misses nothing.
//!
//! **If one dies.** A user's end: its line goes, nothing else changes, but that an input which is no terminal has ended when who
//! writes it says so. The shim: the container dies with it, and the lines end without an exit code.
//!
//! **Bounds.** [`MAX_USERS`] lines. Of each [`MAX_BEHIND`] bytes wait for a user that is slow: from then on the container's output
//! is not read, and it waits, as it would for a slow terminal; after [`PATIENCE`] without a byte taken the line is cut.
//! [`MAX_KEPT`] bytes for the first user, the latest ones. [`MAX_FRAME`] bytes of input that the container does not read.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use super::exec::{FromProcess, MAX_FRAME, ToProcess, head};
use super::input::Input;
use crate::container::Stream;
use crate::sys;

const SOCKET: &str = "attach.sock";
const MAX_USERS: usize = 8;
const MAX_BEHIND: usize = 256 * 1024;
const MAX_KEPT: usize = 64 * 1024;
const PATIENCE: Duration = Duration::from_secs(10);

/// A line to the container whose folder is `dir`.
pub(super) fn connect(dir: &Path) -> io::Result<UnixStream> {
    sys::connect(&dir.join(SOCKET))
}

struct User {
    line: UnixStream,
    /// Of a frame that has not come whole.
    heard: Vec<u8>,
    attached: bool,
    behind: VecDeque<u8>,
    taken: Instant,
}

/// What of the container is to be polled for its users, and why.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    Newcomer,
    User(usize),
    Input,
}

/// The users of one container.
pub(super) struct Users {
    listener: UnixListener,
    users: Vec<User>,
    kept: Option<VecDeque<(Stream, Vec<u8>)>>,
    input: Input,
    terminal: bool,
}

impl Users {
    /// Nobody yet, at a container whose folder is the current one. `input` is what it reads from.
    pub(super) fn listen(input: Option<File>, terminal: bool) -> io::Result<Users> {
        drop(std::fs::remove_file(SOCKET));
        let listener = UnixListener::bind(SOCKET)?;
        listener.set_nonblocking(true)?;
        let kept = (terminal || input.is_some()).then(VecDeque::new);
        let input = Input::new(input, terminal)?;
        Ok(Users { listener, users: Vec::new(), kept, input, terminal })
    }

    /// Whether the container's output is to be read: not while somebody is too far behind.
    pub(super) fn take_output(&self) -> bool {
        self.users.iter().all(|user| user.behind.len() < MAX_BEHIND)
    }

    /// When a user that takes nothing is cut off.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.users.iter().filter(|user| !user.behind.is_empty()).map(|user| user.taken + PATIENCE).min()
    }

    /// What to wait for: descriptors, and whether to read, to write, or both.
    pub(super) fn waits(&self) -> Vec<(Wait, BorrowedFd<'_>, bool, bool)> {
        let mut waits = vec![(Wait::Newcomer, self.listener.as_fd(), true, false)];
        let full = self.input.is_full();
        waits.extend(
            self.users
                .iter()
                .enumerate()
                .map(|(at, user)| (Wait::User(at), user.line.as_fd(), !full, !user.behind.is_empty())),
        );
        waits.extend(self.input.waits().map(|input| (Wait::Input, input, false, true)));
        waits
    }

    /// The container wrote something.
    pub(super) fn output(&mut self, stream: Stream, bytes: &[u8]) {
        if let Some(kept) = &mut self.kept {
            kept.push_back((stream, bytes.to_vec()));
            let mut size: usize = kept.iter().map(|(_, bytes)| bytes.len()).sum();
            while size > MAX_KEPT && kept.len() > 1 {
                size -= kept.pop_front().map_or(0, |(_, bytes)| bytes.len());
            }
        }
        let frame = frame(stream, bytes);
        for user in self.users.iter_mut().filter(|user| user.attached) {
            user.tell(&frame);
        }
    }

    /// Does what is due; signals that users send are returned. `ready` is what [`Users::waits`] said and came.
    pub(super) fn handle(&mut self, ready: &[Wait], master: Option<&File>) -> Vec<i32> {
        let mut signals = Vec::new();
        // From behind: none of those before moves when one goes.
        for at in (0..self.users.len()).rev() {
            let due = ready.contains(&Wait::User(at));
            let user = &self.users[at];
            let stuck = !user.behind.is_empty() && user.taken.elapsed() >= PATIENCE;
            if stuck || (due && !self.serve(at, master, &mut signals)) {
                self.users.remove(at);
            }
        }
        if ready.contains(&Wait::Newcomer)
            && let Ok((line, _)) = self.listener.accept()
            && self.users.len() < MAX_USERS
            && line.set_nonblocking(true).is_ok()
        {
            let (heard, behind, taken) = (Vec::new(), VecDeque::new(), Instant::now());
            self.users.push(User { line, heard, attached: false, behind, taken });
        }
        self.input.feed();
        signals
    }

    /// Reads from and writes to one user; whether it is still there.
    fn serve(&mut self, at: usize, master: Option<&File>, signals: &mut Vec<i32>) -> bool {
        if !self.users[at].flush() {
            return false;
        }
        if self.input.is_full() {
            return true;
        }
        let mut buffer = vec![0; MAX_FRAME];
        match self.users[at].line.read(&mut buffer) {
            Ok(0) => return false,
            Ok(len) => self.users[at].heard.extend_from_slice(&buffer[..len]),
            Err(error) => return matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted),
        }
        loop {
            let user = &mut self.users[at];
            let Some(first) = user.heard.first_chunk::<5>() else { return true };
            let Ok((kind, len)) = head(*first) else { return false };
            if user.heard.len() < 5 + len {
                return true;
            }
            let said = ToProcess::decode(kind, &user.heard[5..5 + len]);
            user.heard.drain(..5 + len);
            match said {
                Some(ToProcess::Attach(before)) => {
                    user.attached = true;
                    let kept = if before { self.kept.take() } else { None };
                    kept.into_iter().flatten().for_each(|(stream, bytes)| user.tell(&frame(stream, &bytes)));
                }
                Some(ToProcess::Input(bytes)) => self.input.push(&bytes),
                Some(ToProcess::InputEnd) => self.input.end(),
                Some(ToProcess::Size(rows, columns)) => {
                    if let Some(master) = master.filter(|_| self.terminal) {
                        drop(sys::set_terminal_size(master, rows, columns));
                    }
                }
                Some(ToProcess::Signal(signal)) => signals.push(signal),
                None => {}
            }
        }
    }

    /// Whether somebody has not taken all yet.
    pub(super) fn are_behind(&self) -> bool {
        self.users.iter().any(|user| !user.behind.is_empty())
    }

    /// Nobody else comes.
    pub(super) fn close(&self) {
        drop(std::fs::remove_file(SOCKET));
    }

    /// The container has ended: who is attached is told, without waiting. A line of whoever came too late for that ends without a word,
    /// and what the container wrote is in its log.
    pub(super) fn tell_end(&mut self, code: i32) {
        let exit = FromProcess::Exit(code).encode();
        self.users.iter_mut().filter(|user| user.attached).for_each(|user| user.tell(&exit));
    }

    /// Waits for those who have not taken all yet.
    pub(super) fn finish(mut self) {
        for user in self.users.iter_mut().filter(|user| user.attached && !user.behind.is_empty()) {
            let patient = user.line.set_nonblocking(false).and_then(|()| user.line.set_write_timeout(Some(PATIENCE)));
            if patient.is_ok() {
                // Whoever went misses nothing.
                drop(user.line.write_all(user.behind.make_contiguous()));
            }
        }
    }
}

impl User {
    fn tell(&mut self, frame: &[u8]) {
        if self.behind.is_empty() {
            self.taken = Instant::now();
        }
        self.behind.extend(frame);
        self.flush();
    }

    /// Whether it is still there.
    fn flush(&mut self) -> bool {
        while !self.behind.is_empty() {
            match self.line.write(self.behind.make_contiguous()) {
                Ok(len) => {
                    self.behind.drain(..len);
                    self.taken = Instant::now();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
        true
    }
}

fn frame(stream: Stream, bytes: &[u8]) -> Vec<u8> {
    match stream {
        Stream::Stderr => FromProcess::ErrorOutput(bytes.to_vec()).encode(),
        _ => FromProcess::Output(bytes.to_vec()).encode(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bench {
        users: Users,
        _dir: tempfile::TempDir,
        input: File,
        path: std::path::PathBuf,
    }

    /// Users of a container that reads from `input`; nextest gives each test a process, so its folder is the test's own.
    fn bench(terminal: bool) -> Bench {
        let dir = tempfile::tempdir().unwrap();
        std::env::set_current_dir(dir.path()).unwrap();
        let (input, end) = nix::unistd::pipe().unwrap();
        let users = Users::listen(Some(File::from(end)), terminal).unwrap();
        let path = dir.path().to_owned();
        Bench { users, _dir: dir, input: File::from(input), path }
    }

    impl Bench {
        fn turn(&mut self) -> Vec<i32> {
            let waits: Vec<Wait> = self.users.waits().into_iter().map(|(wait, ..)| wait).collect();
            self.users.handle(&waits, None)
        }

        fn join(&mut self, before: bool) -> UnixStream {
            let mut line = connect(&self.path).unwrap();
            line.write_all(&ToProcess::Attach(before).encode()).unwrap();
            self.turn();
            self.turn();
            line
        }
    }

    fn hear(line: &mut UnixStream) -> FromProcess {
        let mut first = [0; 5];
        line.read_exact(&mut first).unwrap();
        let (kind, len) = head(first).unwrap();
        let mut content = vec![0; len];
        line.read_exact(&mut content).unwrap();
        FromProcess::decode(kind, &content).unwrap()
    }

    #[test]
    fn the_first_user_hears_what_was_said_before_and_all_hear_the_rest() {
        let mut bench = bench(false);
        bench.users.output(Stream::Stdout, b"before");
        let mut late = bench.join(false);
        let mut first = bench.join(true);
        let mut second = bench.join(true);
        bench.users.output(Stream::Stderr, b"after");
        assert_eq!(hear(&mut first), FromProcess::Output(b"before".to_vec()));
        for line in [&mut late, &mut first, &mut second] {
            assert_eq!(hear(line), FromProcess::ErrorOutput(b"after".to_vec()));
        }
        bench.users.tell_end(7);
        bench.users.finish();
        assert_eq!(hear(&mut second), FromProcess::Exit(7));
    }

    #[test]
    fn input_arrives_and_ends_and_signals_are_passed_on() {
        let mut bench = bench(false);
        let mut line = bench.join(true);
        let said = [ToProcess::Input(b"one ".to_vec()), ToProcess::Input(b"two".to_vec()), ToProcess::Signal(2)];
        let bytes: Vec<u8> = said.iter().flat_map(ToProcess::encode).collect();
        // However it is cut.
        for piece in bytes.chunks(3) {
            line.write_all(piece).unwrap();
            let signals = bench.turn();
            assert!(signals.is_empty() || signals == [2]);
        }
        line.write_all(&ToProcess::InputEnd.encode()).unwrap();
        bench.turn();
        let mut text = String::new();
        bench.input.read_to_string(&mut text).unwrap();
        assert_eq!(text, "one two");
    }

    #[test]
    fn who_is_slow_holds_the_output_up_and_who_breaks_the_rules_is_cut_off() {
        let mut bench = bench(true);
        let slow = bench.join(true);
        while bench.users.take_output() {
            bench.users.output(Stream::Stdout, &[b'x'; 32 * 1024]);
        }
        assert!(bench.users.deadline().is_some());
        drop(slow);
        bench.turn();
        assert!(bench.users.take_output(), "it has gone");
        let mut wrong = bench.join(true);
        wrong.write_all(&[0, 255, 255, 255, 255]).unwrap();
        bench.turn();
        assert!(bench.users.users.is_empty());
    }
}
