//! An image's OCI config, as far as running it needs it. Lenient where tools differ (null for empty), strict where a
//! guess would be dangerous.

use serde::Deserialize;

use super::parse_digest;

/// What is in a config (OCI image-spec, config.md).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct ImageConfig {
    /// GOARCH.
    #[serde(default)]
    pub architecture: String,
    /// GOOS.
    #[serde(default)]
    pub os: String,
    /// What to run by default.
    #[serde(default)]
    config: Option<Process>,
    rootfs: RootFs,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
struct RootFs {
    #[serde(default)]
    diff_ids: Vec<String>,
}

/// What an image runs by default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Process {
    /// Comes before the command.
    pub entrypoint: Option<Vec<String>>,
    /// What an argument list replaces.
    pub cmd: Option<Vec<String>>,
    /// `NAME=value`.
    pub env: Option<Vec<String>>,
    /// `user`, `uid`, `user:group` or `uid:gid`.
    pub user: Option<String>,
    /// Where it starts.
    pub working_dir: Option<String>,
    /// What asks it to stop.
    pub stop_signal: Option<String>,
    /// How it is known to be well; docker's, not in the OCI specification.
    pub healthcheck: Option<HealthCheck>,
}

/// Docker's HEALTHCHECK; times in nanoseconds, zero is docker's default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct HealthCheck {
    /// `NONE`, `CMD` and words, or `CMD-SHELL` and a line for a shell.
    pub test: Option<Vec<String>>,
    /// Between two checks.
    pub interval: u64,
    /// That one may take.
    pub timeout: u64,
    /// From its start, in which failures do not count.
    pub start_period: u64,
    /// So many failures in a row.
    pub retries: u32,
}

/// Why a config cannot be used. The image is at fault; nothing was stored.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// Not the JSON it should be.
    #[error("the image's config is malformed: {0}")]
    Malformed(String),
    /// For another kind of machine.
    #[error("the image is for {os}/{architecture}, this machine is linux/{here}")]
    Platform {
        /// GOOS.
        os: String,
        /// GOARCH.
        architecture: String,
        /// This machine's GOARCH.
        here: &'static str,
    },
    /// A layer's digest that is none.
    #[error("the image's config names a layer `{0}`, which is no SHA-256 digest")]
    DiffId(String),
}

/// This machine, as Go names it.
pub const ARCHITECTURE: &str = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };

impl ImageConfig {
    /// From the config's bytes.
    pub fn parse(bytes: &[u8]) -> Result<ImageConfig, ConfigError> {
        let config: ImageConfig =
            serde_json::from_slice(bytes).map_err(|error| ConfigError::Malformed(error.to_string()))?;
        let (os, architecture) = (config.os.clone(), config.architecture.clone());
        if !(os.is_empty() || os == "linux") || !(architecture.is_empty() || architecture == ARCHITECTURE) {
            return Err(ConfigError::Platform { os, architecture, here: ARCHITECTURE });
        }
        Ok(config)
    }

    /// What to run by default.
    pub fn process(&self) -> Process {
        self.config.clone().unwrap_or_default()
    }

    /// The layers' digests, lowest first.
    pub fn diff_ids(&self) -> Result<Vec<[u8; 32]>, ConfigError> {
        self.rootfs
            .diff_ids
            .iter()
            .map(|text| parse_digest(text).ok_or_else(|| ConfigError::DiffId(text.clone())))
            .collect()
    }
}
