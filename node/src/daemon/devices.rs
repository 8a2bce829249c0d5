//! Which devices of this machine are whose.
//!
//! **Who writes.** The worker counts how many of a kind are promised; here it is said which, when a container starts, in
//! `devices.json` of its folder, from which a new daemon knows. A device is free again when its container has ended.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use moyai_protocol::confinement::Device;
use moyai_protocol::worker::StartError;
use moyai_runtime::cdi::{Edits, Registry};

const FILE: &str = "devices.json";

/// `vendor/class`, and a name of it.
type Name = (String, String);

/// The devices that CDI files name, and who has them.
pub(super) struct Devices {
    registry: Registry,
    given: Mutex<BTreeMap<PathBuf, Vec<Name>>>,
}

impl Devices {
    /// Of this machine; `containers` are those that may still have some.
    pub(super) fn new(registry: Registry, containers: &Path) -> Devices {
        let folders = std::fs::read_dir(containers).into_iter().flatten().flatten().map(|entry| entry.path());
        let runs = folders.filter(|dir| !dir.join("exit.json").exists());
        let known = runs.filter_map(|dir| {
            let bytes = std::fs::read(dir.join(FILE)).ok()?;
            Some((dir, serde_json::from_slice(&bytes).ok()?))
        });
        Devices { registry, given: Mutex::new(known.collect()) }
    }

    /// Gives a container what it asks for. Blocks.
    pub(super) fn grant(&self, dir: &Path, asked: &[Device]) -> Result<Vec<Edits>, StartError> {
        let mut given = self.lock();
        given.remove(dir);
        let mut taken: BTreeSet<Name> = given.values().flatten().cloned().collect();
        let kinds = self.registry.kinds();
        let (mut edits, mut names) = (Vec::new(), Vec::new());
        for device in asked {
            match device {
                Device::Node { source, target, access } => edits.push(Edits::node(source, target, access)),
                Device::Named { kind, name } => {
                    let name = (kind.clone(), name.clone());
                    if !taken.insert(name.clone()) {
                        return Err(StartError::Node(format!("{}={} is in use", name.0, name.1)));
                    }
                    names.push(name);
                }
                Device::Count { kind, count } => {
                    let of_kind = kinds.iter().filter(|(known, _)| {
                        *known == kind || known.split_once('/').is_some_and(|(_, class)| class == kind)
                    });
                    let all: Vec<Name> = of_kind
                        .flat_map(|(kind, names)| names.iter().map(|name| (kind.clone(), name.clone())))
                        .collect();
                    let wanted = if *count == 0 { all.len() } else { *count as usize };
                    let free: Vec<Name> = all.into_iter().filter(|name| !taken.contains(name)).take(wanted).collect();
                    if free.len() < wanted || wanted == 0 {
                        return Err(StartError::Node(format!("{wanted} {kind} are not free")));
                    }
                    taken.extend(free.iter().cloned());
                    names.extend(free);
                }
            }
        }
        if !names.is_empty() {
            edits.extend(self.registry.edits(&names).map_err(|error| StartError::Node(error.to_string()))?);
            let written = std::fs::create_dir_all(dir)
                .and_then(|()| std::fs::write(dir.join(FILE), serde_json::to_vec(&names).expect("plain data")));
            written.map_err(|error| StartError::Node(format!("cannot write {}: {error}", dir.join(FILE).display())))?;
            given.insert(dir.to_owned(), names);
        }
        Ok(edits)
    }

    /// The container whose folder is `dir` has ended.
    pub(super) fn release(&self, dir: &Path) {
        if self.lock().remove(dir).is_some()
            && let Err(error) = std::fs::remove_file(dir.join(FILE))
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(dir = %dir.display(), %error, "cannot remove devices.json");
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<PathBuf, Vec<Name>>> {
        self.given.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_one_container_s_at_a_time_and_known_to_the_next_daemon() {
        let dir = std::env::temp_dir().join(format!("moyai-devices-{}", std::process::id()));
        let (cdi, containers) = (dir.join("cdi"), dir.join("containers"));
        std::fs::create_dir_all(&cdi).unwrap();
        std::fs::create_dir_all(&containers).unwrap();
        let document = r#"{"kind": "example.org/gpu", "devices": [{"name": "a"}, {"name": "b"}, {"name": "all"}]}"#;
        std::fs::write(cdi.join("gpu.json"), document).unwrap();
        let registry = || Registry::load(&[&cdi]).0;
        let devices = Devices::new(registry(), &containers);
        let count = |count| [Device::Count { kind: "gpu".to_owned(), count }];
        let (one, two) = (containers.join("one"), containers.join("two"));
        assert!(devices.grant(&one, &count(1)).is_ok());
        assert!(devices.grant(&one, &count(1)).is_ok(), "the same, started again");
        assert!(devices.grant(&two, &count(2)).is_err());
        let named = [Device::Named { kind: "example.org/gpu".to_owned(), name: "a".to_owned() }];
        assert!(devices.grant(&two, &named).is_err());
        let devices = Devices::new(registry(), &containers);
        assert!(devices.grant(&two, &named).is_err(), "another daemon knows it");
        devices.release(&one);
        assert!(devices.grant(&two, &named).is_ok());
        assert!(devices.grant(&one, &count(0)).is_err());
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
