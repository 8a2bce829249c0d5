//! Image references, normalised as docker does: `alpine` is `docker.io/library/alpine:latest`.
//!
//! Grammar: the distribution project's `reference` package; a first part with a dot, a colon or `localhost` is a host.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

const DEFAULT_HOST: &str = "docker.io";
const DEFAULT_FOLDER: &str = "library";
/// The longest name the distribution specification allows.
const MAX_NAME: usize = 255;
const MAX_TAG: usize = 128;

/// A full image reference: host, path and tag, each in its canonical form.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference {
    name: String,
    tag: String,
}

/// Why a text names no image. Nothing was changed; the text is at fault.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ReferenceError {
    /// Nothing there.
    #[error("an empty image reference")]
    Empty,
    /// Longer than the specification allows.
    #[error("image reference `{text}`: longer than {MAX_NAME} characters")]
    TooLong {
        /// What was given.
        text: String,
    },
    /// Upper case, which docker refuses too.
    #[error("image reference `{text}`: a repository name is lower case")]
    UpperCase {
        /// What was given.
        text: String,
    },
    /// A part of the name that is none.
    #[error("image reference `{text}`: `{part}` is no part of a repository name")]
    Name {
        /// What was given.
        text: String,
        /// The wrong part.
        part: String,
    },
    /// A tag that is none.
    #[error("image reference `{text}`: `{tag}` is no tag")]
    Tag {
        /// What was given.
        text: String,
        /// The wrong tag.
        tag: String,
    },
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        if text.is_empty() {
            return Err(ReferenceError::Empty);
        }
        let (name, tag) = match text.rsplit_once(':') {
            // A colon before a slash belongs to a port.
            Some((name, tag)) if !tag.contains('/') => (name, tag),
            _ => (text, "latest"),
        };
        let (host, path) = match name.split_once('/') {
            Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" => (first, rest),
            _ => (DEFAULT_HOST, name),
        };
        let host = if host == "index.docker.io" { DEFAULT_HOST } else { host };
        let path = if host == DEFAULT_HOST && !path.contains('/') {
            format!("{DEFAULT_FOLDER}/{path}")
        } else {
            path.to_owned()
        };
        if path.chars().any(|c| c.is_ascii_uppercase()) {
            return Err(ReferenceError::UpperCase { text: text.to_owned() });
        }
        if let Some(part) = path.split('/').find(|part| !is_component(part)) {
            return Err(ReferenceError::Name { text: text.to_owned(), part: part.to_owned() });
        }
        if !is_host(host) {
            return Err(ReferenceError::Name { text: text.to_owned(), part: host.to_owned() });
        }
        if !is_tag(tag) {
            return Err(ReferenceError::Tag { text: text.to_owned(), tag: tag.to_owned() });
        }
        let name = format!("{host}/{path}");
        if name.len() > MAX_NAME {
            return Err(ReferenceError::TooLong { text: text.to_owned() });
        }
        Ok(Reference { name, tag: tag.to_owned() })
    }
}

/// A name or an address, and perhaps a port.
fn is_host(host: &str) -> bool {
    let (name, port) = host.split_once(':').unwrap_or((host, "0"));
    let label = |label: &str| !label.is_empty() && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
    name.split('.').all(label) && !port.is_empty() && port.chars().all(|c| c.is_ascii_digit())
}

fn is_component(part: &str) -> bool {
    let edge = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    part.starts_with(edge) && part.ends_with(edge) && part.chars().all(|c| edge(c) || "._-".contains(c))
}

fn is_tag(tag: &str) -> bool {
    let first = |c: char| c.is_ascii_alphanumeric() || c == '_';
    tag.len() <= MAX_TAG && tag.starts_with(first) && tag.chars().all(|c| first(c) || ".-".contains(c))
}

impl Reference {
    /// Its last part: `3.20` of `alpine:3.20`.
    pub fn tag(&self) -> &str {
        &self.tag
    }

    /// All before the tag: `docker.io/library/alpine`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// As people write it: without the host and folder that docker implies, tag always shown.
    pub fn familiar(&self) -> String {
        let implied = format!("{DEFAULT_HOST}/{DEFAULT_FOLDER}/");
        let short = self.name.strip_prefix(&implied);
        let short = short.or_else(|| self.name.strip_prefix(&format!("{DEFAULT_HOST}/")));
        let text = format!("{}:{}", short.unwrap_or(&self.name), self.tag);
        // A folder of docker's with a dot in its name would be taken for a host.
        if text.parse().as_ref() == Ok(self) { text } else { self.to_string() }
    }

    /// As [`Reference::familiar`], without the tag when it is `latest`.
    pub fn brief(&self) -> String {
        let familiar = self.familiar();
        familiar.strip_suffix(":latest").map_or(familiar.clone(), str::to_owned)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.name, self.tag)
    }
}

impl fmt::Debug for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Reference({self})")
    }
}

impl Serialize for Reference {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Reference {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let full_form = !deserializer.is_human_readable();
        let text = String::deserialize(deserializer)?;
        let reference: Reference = text.parse().map_err(de::Error::custom)?;
        // Between nodes it is written in one way.
        match full_form && reference.to_string() != text {
            true => Err(de::Error::custom(format!("`{text}` is not written in full"))),
            false => Ok(reference),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_image_has_one_name() {
        let full = "docker.io/library/alpine:latest";
        for text in ["alpine", "alpine:latest", "library/alpine", "docker.io/alpine", "index.docker.io/library/alpine"]
        {
            assert_eq!(text.parse::<Reference>().unwrap().to_string(), full, "{text}");
        }
        for (text, expected) in [
            ("alpine:3.20", "docker.io/library/alpine:3.20"),
            ("bitnami/redis", "docker.io/bitnami/redis:latest"),
            ("localhost/a", "localhost/a:latest"),
            ("lab:5000/a/b:v1", "lab:5000/a/b:v1"),
            ("ghcr.io/x/y", "ghcr.io/x/y:latest"),
        ] {
            assert_eq!(text.parse::<Reference>().unwrap().to_string(), expected);
        }
        assert_eq!(full.parse::<Reference>().unwrap().brief(), "alpine");
        assert_eq!("bitnami/redis:7".parse::<Reference>().unwrap().brief(), "bitnami/redis:7");
    }

    #[test]
    fn what_names_no_image_is_refused() {
        for text in ["", "Alpine", "a//b", "-a", "a:", "a:b c", "a/../b", "a:-x", "/a"] {
            assert!(text.parse::<Reference>().is_err(), "{text}");
        }
    }

    #[test]
    fn what_people_read_means_the_same_when_they_write_it() {
        // Found by fuzzing: without docker's host the first folder would be one.
        for text in ["./x/yo", "../x", "a..b/x", "host:/x", ":5000/x", "host:x/y"] {
            assert!(text.parse::<Reference>().is_err(), "{text} names no host");
        }
        for text in ["index.docker.io/lijrar.ioy/alpine:3.20", "docker.io/a.b/c", "alpine", "me/tool:1", "host.io/x/y"]
        {
            let reference: Reference = text.parse().unwrap();
            assert_eq!(reference.familiar().parse(), Ok(reference));
        }
    }
}
