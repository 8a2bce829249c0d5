//! Whether containers are well: a command in each, again and again.
//!
//! **States** of a container: nothing is known, then *healthy*, or *unhealthy* after so many failures in a row. What is known is
//! said with its placement, for `moyai ps`. One that is unhealthy and has a restart policy is killed, so that the policy
//! applies, and it comes up anew. What stands still (`moyai pause`) is not checked.
//!
//! **If the daemon dies**, the next one begins to look anew; a container that was being checked does not notice.
//!
//! **Bounds.** One check at a time for each life of a container, which ends with it, [`MAX_OUTPUT`] bytes of what it writes.

use std::sync::Arc;
use std::time::Duration;

use moyai_protocol::contract::Command;
use moyai_protocol::workload::{Health, MIN_INTERVAL, PlacementId, Restart, Spec};
use moyai_runtime::container;
use moyai_runtime::image::HealthCheck;
use moyai_runtime::launch::exec::{Exec, FromProcess, Task, ToProcess, Wish, head};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, timeout};

use super::effects::{Effects, folder};

const MAX_OUTPUT: usize = 4096;
/// Docker's defaults.
const INTERVAL: u64 = 30_000;
const TIMEOUT: u64 = 30_000;
const RETRIES: u32 = 3;
/// What docker starts a shell's line with.
const SHELL: [&str; 2] = ["/bin/sh", "-c"];
const SIGKILL: i32 = 9;

/// Who looks after one life of a container; dropped with it.
pub(super) struct LookedAfter(AbortHandle);

impl Drop for LookedAfter {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What an image says of how its containers are known to be well.
fn of_image(check: &HealthCheck) -> Option<Health> {
    let test = check.test.as_ref()?;
    let (kind, rest) = test.split_first()?;
    let command: Vec<String> = match (kind.as_str(), rest) {
        ("CMD", words) if !words.is_empty() => words.to_vec(),
        ("CMD-SHELL", [line, ..]) => SHELL.into_iter().map(str::to_owned).chain([line.clone()]).collect(),
        _ => return None,
    };
    let or = |nanos: u64, default: u64| if nanos == 0 { default } else { (nanos / 1_000_000).max(1) };
    Some(Health {
        command,
        interval: or(check.interval, INTERVAL).max(MIN_INTERVAL),
        timeout: or(check.timeout, TIMEOUT),
        retries: if check.retries == 0 { RETRIES } else { check.retries },
        start_period: check.start_period / 1_000_000,
    })
}

impl Effects {
    /// Begins to look after a container that runs, if there is a way to know how it is; until what is returned is dropped.
    pub(super) fn look_after(&self, placement: PlacementId, spec: &Arc<Spec>) -> Option<LookedAfter> {
        let none = spec.health.as_ref().is_some_and(|health| health.command.is_empty());
        if none {
            return None;
        }
        let (effects, spec) = (self.clone(), Arc::clone(spec));
        let task = tokio::spawn(async move {
            let of_spec = spec.health.clone();
            let health = match of_spec {
                Some(health) => Some(health),
                None => {
                    let (store, root) = (Arc::clone(&effects.store), spec.image.root.0);
                    let image = tokio::task::spawn_blocking(move || store.runnable(&root)).await;
                    let image = image.ok().and_then(Result::ok).flatten();
                    image.and_then(|image| image.config.process().healthcheck).as_ref().and_then(of_image)
                }
            };
            if let Some(health) = health.filter(|health| !health.command.is_empty()) {
                effects.check_again_and_again(placement, &health, spec.restart).await;
            }
        });
        Some(LookedAfter(task.abort_handle()))
    }

    async fn check_again_and_again(&self, placement: PlacementId, health: &Health, restart: Restart) {
        let (begun, start_period) = (Instant::now(), Duration::from_millis(health.start_period));
        let (mut failures, mut well) = (0, None);
        loop {
            sleep(Duration::from_millis(health.interval)).await;
            let dir = self.containers.join(folder(&placement));
            let frozen = tokio::task::spawn_blocking(move || container::is_frozen(&dir)).await;
            if frozen.unwrap_or(true) {
                continue;
            }
            let found = self.check(&placement, health).await;
            match found {
                Ok(()) => {
                    failures = 0;
                    if well != Some(true) {
                        self.note(placement, "healthy".to_owned()).await;
                    }
                    well = Some(true);
                }
                Err(_) if begun.elapsed() < start_period => {}
                Err(reason) => {
                    failures += 1;
                    if failures < health.retries || well == Some(false) {
                        continue;
                    }
                    well = Some(false);
                    self.note(placement, format!("unhealthy: {reason}")).await;
                    if restart != Restart::No {
                        self.signal(&placement, SIGKILL).await;
                        // What comes up then is looked after anew.
                        return;
                    }
                }
            }
        }
    }

    /// One check; the error is what it wrote, or why it could not be made.
    async fn check(&self, placement: &PlacementId, health: &Health) -> Result<(), String> {
        let wish = Wish { args: health.command.clone(), ..Wish::default() };
        let exec = Exec { dir: self.containers.join(folder(placement)), task: Task::Run(wish) };
        let launcher = Arc::clone(&self.launcher);
        let line = tokio::task::spawn_blocking(move || launcher.exec(exec)).await.map_err(|error| error.to_string())?;
        let line = line.and_then(|line| {
            line.set_nonblocking(true)?;
            UnixStream::from_std(line)
        });
        let mut line = line.map_err(|error| format!("cannot be checked: {error}"))?;
        match timeout(Duration::from_millis(health.timeout), outcome(&mut line)).await {
            Ok(outcome) => outcome,
            Err(_) => {
                // What hangs is not left behind; it may have ended just now.
                let _gone = line.write_all(&ToProcess::Signal(SIGKILL).encode()).await;
                Err(format!("its check took more than {} ms", health.timeout))
            }
        }
    }

    /// Says something of a container, for who asks the mesh.
    pub(super) async fn note(&self, placement: PlacementId, detail: String) {
        // The loop has ended, and with it all that could be said.
        let _ended = self.handle.command(Command::Note { placement, detail }).await;
    }
}

async fn outcome(line: &mut UnixStream) -> Result<(), String> {
    let mut output = Vec::new();
    loop {
        let mut first = [0; 5];
        let broken = |error: std::io::Error| format!("its check broke off: {error}");
        line.read_exact(&mut first).await.map_err(broken)?;
        let (kind, len) = head(first).map_err(broken)?;
        let mut content = vec![0; len];
        line.read_exact(&mut content).await.map_err(broken)?;
        match FromProcess::decode(kind, &content) {
            Some(FromProcess::Output(bytes) | FromProcess::ErrorOutput(bytes)) => {
                output.extend(bytes.into_iter().take(MAX_OUTPUT - output.len()));
            }
            Some(FromProcess::Exit(0)) => return Ok(()),
            Some(FromProcess::Exit(code)) => {
                let text = String::from_utf8_lossy(&output);
                let said = text.lines().map(str::trim).rfind(|line| !line.is_empty());
                return Err(said.map_or_else(|| format!("its check ended with {code}"), str::to_owned));
            }
            Some(FromProcess::NotStarted(_, reason)) => return Err(format!("its check does not start: {reason}")),
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_s_check_is_docker_s() {
        let check = |test: &[&str]| HealthCheck {
            test: Some(test.iter().map(|word| (*word).to_owned()).collect()),
            interval: 1_500_000_000,
            ..HealthCheck::default()
        };
        assert_eq!(of_image(&check(&["NONE"])), None);
        assert_eq!(of_image(&check(&[])), None);
        assert_eq!(of_image(&HealthCheck::default()), None);
        let shell = of_image(&check(&["CMD-SHELL", "curl -f localhost"])).unwrap();
        assert_eq!(shell.command, ["/bin/sh", "-c", "curl -f localhost"]);
        assert_eq!((shell.interval, shell.timeout, shell.retries), (1500, TIMEOUT, RETRIES));
        assert_eq!(of_image(&check(&["CMD", "a", "b"])).unwrap().command, ["a", "b"]);
    }
}
