//! A container's output on disk, in the format of the Kubernetes CRI, which log collectors know:
//! `2026-11-23T06:30:00.000000000Z stdout F a line`, with `P` for a part of a line that was too long.
//!
//! The shim writes and rotates: [`MAX_FILE`] bytes a file, [`FILES`] files. When the disk is full, lines are dropped
//! and the container is not held up. Readers follow the newest file by its inode.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// When a file has grown to this, the next one begins.
const MAX_FILE: u64 = 10 << 20;
/// The current file and the ones before it.
const FILES: u32 = 3;
/// A longer line is written in parts.
const MAX_LINE: usize = 16 * 1024;

/// Where it comes from.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    /// What a strict sandbox refused; not of the CRI's format, whose readers leave out what they do not know.
    Audit,
}

impl Stream {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Stream::Stdout => "stdout",
            Stream::Stderr => "stderr",
            Stream::Audit => "audit",
        }
    }
}

/// The shim's end.
pub struct LogWriter {
    path: PathBuf,
    file: Option<File>,
    size: u64,
    partial: [Vec<u8>; 3],
}

impl LogWriter {
    /// Appends to `log` in a container's folder.
    pub fn open(dir: &Path) -> LogWriter {
        let path = dir.join("log");
        let file = File::options().append(true).create(true).open(&path).ok();
        let size = file.as_ref().and_then(|file| file.metadata().ok()).map_or(0, |meta| meta.len());
        LogWriter { path, file, size, partial: Default::default() }
    }

    /// Takes what the container wrote.
    pub fn write(&mut self, stream: Stream, bytes: &[u8]) {
        let mut partial = std::mem::take(&mut self.partial[stream as usize]);
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            partial.extend_from_slice(piece);
            let whole = partial.ends_with(b"\n");
            if whole {
                partial.pop();
            }
            while partial.len() > MAX_LINE {
                let rest = partial.split_off(MAX_LINE);
                self.line(stream, &partial, b"P");
                partial = rest;
            }
            if whole {
                self.line(stream, &partial, b"F");
                partial.clear();
            }
        }
        self.partial[stream as usize] = partial;
    }

    /// Writes what has no newline yet.
    pub fn finish(&mut self) {
        for stream in [Stream::Stdout, Stream::Stderr] {
            let partial = std::mem::take(&mut self.partial[stream as usize]);
            if !partial.is_empty() {
                self.line(stream, &partial, b"P");
            }
        }
    }

    fn line(&mut self, stream: Stream, text: &[u8], tag: &[u8]) {
        let mut line = Vec::with_capacity(text.len() + 48);
        line.extend_from_slice(timestamp(SystemTime::now()).as_bytes());
        for part in [b" ", stream.name().as_bytes(), b" ", tag, b" ", text, b"\n"] {
            line.extend_from_slice(part);
        }
        if self.size + line.len() as u64 > MAX_FILE {
            self.rotate();
        }
        if let Some(file) = &mut self.file
            && file.write_all(&line).is_ok()
        {
            self.size += line.len() as u64;
        }
    }

    fn rotate(&mut self) {
        let numbered = |number: u32| PathBuf::from(format!("{}.{number}", self.path.display()));
        for number in (1..FILES - 1).rev() {
            // The oldest may not be there yet.
            drop(fs::rename(numbered(number), numbered(number + 1)));
        }
        drop(fs::rename(&self.path, numbered(1)));
        self.file = File::options().append(true).create(true).open(&self.path).ok();
        self.size = 0;
    }
}

/// One line as a reader gets it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogLine {
    /// RFC 3339, UTC.
    pub time: String,
    /// Where it was written to.
    pub stream: Stream,
    /// With its newline, where it had one.
    pub text: Vec<u8>,
}

/// Reads a container's log from its oldest line on, across rotations.
pub struct LogReader {
    path: PathBuf,
    older: Vec<PathBuf>,
    current: Option<BufReader<File>>,
    inode: u64,
    partial: Vec<u8>,
    audit: bool,
}

impl LogReader {
    /// From the oldest line kept: what the container wrote, or what its sandbox refused.
    pub fn open(dir: &Path, audit: bool) -> LogReader {
        let path = dir.join("log");
        let older = (1..FILES).map(|number| PathBuf::from(format!("{}.{number}", path.display())));
        let older = older.filter(|path| path.exists()).collect();
        LogReader { path, older, current: None, inode: 0, partial: Vec::new(), audit }
    }

    /// The next line; `None` when there is none yet. Does not wait.
    pub fn next_line(&mut self) -> io::Result<Option<LogLine>> {
        loop {
            if self.current.is_none() && !self.advance()? {
                return Ok(None);
            }
            let Some(file) = &mut self.current else { return Ok(None) };
            file.read_until(b'\n', &mut self.partial)?;
            if self.partial.ends_with(b"\n") {
                let line = parse(&self.partial);
                self.partial.clear();
                if let Some(line) = line.filter(|line| (line.stream == Stream::Audit) == self.audit) {
                    return Ok(Some(line));
                }
                continue;
            }
            // At the end: of an older file, or of one that was rotated away, there is more elsewhere.
            let rotated = fs::metadata(&self.path).is_ok_and(|meta| meta.ino() != self.inode);
            if !rotated {
                return Ok(None);
            }
            self.current = None;
            self.partial.clear();
        }
    }

    /// Goes to the last `lines` lines.
    pub fn tail(&mut self, lines: usize) -> io::Result<Vec<LogLine>> {
        let mut kept = std::collections::VecDeque::new();
        while let Some(line) = self.next_line()? {
            kept.push_back(line);
            if kept.len() > lines {
                kept.pop_front();
            }
        }
        Ok(kept.into())
    }

    fn advance(&mut self) -> io::Result<bool> {
        let path = self.older.pop().unwrap_or_else(|| self.path.clone());
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        self.inode = file.metadata()?.ino();
        file.seek(SeekFrom::Start(0))?;
        self.current = Some(BufReader::new(file));
        Ok(true)
    }
}

fn parse(line: &[u8]) -> Option<LogLine> {
    let mut parts = line.splitn(4, |byte| *byte == b' ');
    let (time, stream, tag, text) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let stream = match stream {
        b"stderr" => Stream::Stderr,
        b"audit" => Stream::Audit,
        _ => Stream::Stdout,
    };
    let text = if tag == b"P" { &text[..text.len() - 1] } else { text };
    Some(LogLine { time: String::from_utf8_lossy(time).into_owned(), stream, text: text.to_vec() })
}

/// RFC 3339 with nanoseconds, UTC.
pub fn timestamp(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    // Days to a date by the civil calendar (Howard Hinnant, chrono-compatible low-level date algorithms).
    let z = days as i64 + 719_468;
    let era = z.div_euclid(146_097);
    let doe = z.rem_euclid(146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (day, month) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    let year = yoe + era * 400 + i64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:09}Z",
        second / 3600,
        second / 60 % 60,
        second % 60,
        since.subsec_nanos()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back_across_rotation() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = LogWriter::open(dir.path());
        writer.write(Stream::Stdout, b"one\ntw");
        writer.write(Stream::Stderr, b"oops\n");
        writer.write(Stream::Audit, b"process 2 mount() refused\n");
        writer.write(Stream::Stdout, b"o\n");
        let mut reader = LogReader::open(dir.path(), false);
        let mut lines = Vec::new();
        while let Some(line) = reader.next_line().unwrap() {
            lines.push((line.stream, line.text));
        }
        let expected = [(Stream::Stdout, "one\n"), (Stream::Stderr, "oops\n"), (Stream::Stdout, "two\n")];
        assert_eq!(lines, expected.map(|(stream, text)| (stream, text.as_bytes().to_vec())));
        let audit = LogReader::open(dir.path(), true).next_line().unwrap().unwrap();
        assert_eq!((audit.stream, &*audit.text), (Stream::Audit, &b"process 2 mount() refused\n"[..]));
        let long = vec![b'x'; 1 << 20];
        for _ in 0..40 {
            writer.write(Stream::Stdout, &long);
        }
        writer.write(Stream::Stdout, b"\nlast");
        writer.finish();
        let mut bytes = 0;
        let mut last = Vec::new();
        while let Some(line) = reader.next_line().unwrap() {
            bytes += line.text.len();
            last = line.text;
        }
        assert_eq!(last, b"last");
        assert!(bytes > 9 << 20, "{bytes}");
        let on_disk: u64 =
            fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
        assert!(on_disk <= u64::from(FILES) * MAX_FILE, "{on_disk}");
    }

    #[test]
    fn times_are_dates() {
        let at = |secs| timestamp(UNIX_EPOCH + std::time::Duration::from_secs(secs));
        assert_eq!(at(0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00.000000000Z");
        assert_eq!(at(1_795_413_600), "2026-11-23T06:00:00.000000000Z");
    }
}
