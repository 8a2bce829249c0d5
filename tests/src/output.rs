//! What a command printed, and how it ended.

use std::process::Command;

use serde_json::Value;

/// A command that has ended.
#[derive(Clone, Debug)]
pub struct Output {
    /// As it was given.
    pub command: String,
    /// Its exit code; a signal is 128 + its number.
    pub code: i32,
    /// What it wrote to standard output.
    pub stdout: String,
    /// What it wrote to standard error.
    pub stderr: String,
}

impl Output {
    /// Runs `command` to its end. `shown` is what messages call it.
    pub fn of(mut command: Command, shown: String) -> Output {
        let done = command.output().unwrap_or_else(|error| panic!("cannot run {shown}: {error}"));
        let signal = std::os::unix::process::ExitStatusExt::signal(&done.status).unwrap_or(0);
        Output {
            command: shown,
            code: done.status.code().unwrap_or(128 + signal),
            stdout: String::from_utf8_lossy(&done.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&done.stderr).into_owned(),
        }
    }

    /// It succeeded.
    #[track_caller]
    pub fn ok(self) -> Output {
        self.exits(0)
    }

    /// It exited with `code`.
    #[track_caller]
    pub fn exits(self, code: i32) -> Output {
        assert_eq!(self.code, code, "the exit code of {self}");
        self
    }

    /// It exited with `code` and said what is wrong and what to do: an `error:` line, then a `hint:` line.
    #[track_caller]
    pub fn fails(self, code: i32) -> Output {
        let lines: Vec<&str> = self.stderr.lines().collect();
        let at = lines.iter().position(|line| line.strip_prefix("error: ").is_some_and(|text| !text.trim().is_empty()));
        let at = at.unwrap_or_else(|| panic!("no `error:` line from {self}"));
        let hint = lines[at + 1..].iter().find_map(|line| line.strip_prefix("hint: "));
        assert!(
            hint.is_some_and(|text| !text.trim().is_empty()),
            "no `hint:` line after the `error:` line from {self}"
        );
        assert!(!self.stderr.contains("panicked"), "{self}");
        self.exits(code)
    }

    /// It says `text`, on either stream.
    #[track_caller]
    pub fn says(self, text: &str) -> Output {
        assert!(self.stdout.contains(text) || self.stderr.contains(text), "`{text}` is not in {self}");
        self
    }

    /// Standard output without the white space around it.
    pub fn text(&self) -> &str {
        self.stdout.trim()
    }

    /// Standard output as JSON, one value a line.
    #[track_caller]
    pub fn rows(&self) -> Vec<Value> {
        let parse = |line| serde_json::from_str(line).unwrap_or_else(|error| panic!("no JSON ({error}): {self}"));
        self.stdout.lines().map(parse).collect()
    }

    /// Standard output as one JSON value.
    #[track_caller]
    pub fn json(&self) -> Value {
        let mut rows = self.rows();
        assert_eq!(rows.len(), 1, "one line of JSON expected: {self}");
        rows.remove(0)
    }
}

impl std::fmt::Display for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "`{}` (exit code {})", self.command, self.code)?;
        for (name, text) in [("stdout", &self.stdout), ("stderr", &self.stderr)] {
            for line in text.lines() {
                writeln!(f, "  {name}: {line}")?;
            }
        }
        Ok(())
    }
}
