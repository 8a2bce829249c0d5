//! Bytes on the wire: the only file that knows the encoding, so that a successor can replace it here.
//!
//! bincode 2.0.1, because 3.0.0 is an empty farewell release. Every decode has a size limit: a length prefix that
//! claims more than the limit is refused before anything is allocated for it.
//!
//! A message travels as one version byte and the encoded [`Message`](crate::message::Message). Once shipped, a message
//! keeps its shape: what is new comes as a new variant at the end, which an older node counts and drops.

use bincode::config::{Configuration, LittleEndian, Varint};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The most bytes one message may have.
pub const MESSAGE_LIMIT: usize = 1 << 20;

/// The version byte of messages this code writes.
pub const WIRE_VERSION: u8 = 1;

type Config = Configuration<LittleEndian, Varint, bincode::config::Limit<MESSAGE_LIMIT>>;

const CONFIG: Config = bincode::config::standard().with_limit::<MESSAGE_LIMIT>();

/// Why bytes from a peer or from disk are not what they should be. Nothing was changed; the sender is at fault.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DecodeError {
    /// The bytes are more than any message may have.
    #[error("{len} bytes, where a message has at most {MESSAGE_LIMIT}")]
    TooLarge {
        /// How many there were.
        len: usize,
    },
    /// There was not even a version byte.
    #[error("an empty message")]
    Empty,
    /// A version from another release.
    #[error("message version {version}, where this release speaks {WIRE_VERSION}")]
    Version {
        /// The version byte.
        version: u8,
    },
    /// Malformed, truncated, or a variant from a newer release.
    #[error("malformed: {reason}")]
    Malformed {
        /// What the decoder said.
        reason: String,
    },
}

/// The bytes of `value`. What is longer than [`MESSAGE_LIMIT`] no peer decodes; writers bound what they collect.
///
/// # Panics
/// Never for the plain data this crate encodes: bincode fails only on types that serde cannot size.
pub fn encode<T: Serialize + ?Sized>(value: &T) -> Vec<u8> {
    bincode::serde::encode_to_vec(value, CONFIG).expect("a bounded plain value always encodes")
}

/// The value whose bytes these are.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, DecodeError> {
    if bytes.len() > MESSAGE_LIMIT {
        return Err(DecodeError::TooLarge { len: bytes.len() });
    }
    match bincode::serde::decode_from_slice(bytes, CONFIG) {
        Ok((value, used)) if used == bytes.len() => Ok(value),
        Ok((_, used)) => Err(DecodeError::Malformed { reason: format!("{} bytes left over", bytes.len() - used) }),
        Err(error) => Err(DecodeError::Malformed { reason: error.to_string() }),
    }
}

/// A message as it travels: its version, then its bytes.
pub fn encode_message<T: Serialize>(message: &T) -> Vec<u8> {
    let mut bytes = vec![WIRE_VERSION];
    bytes.extend(encode(message));
    bytes
}

/// The message in what a peer sent.
pub fn decode_message<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, DecodeError> {
    match bytes.split_first() {
        None => Err(DecodeError::Empty),
        Some((&WIRE_VERSION, rest)) => decode(rest),
        Some((&version, _)) => Err(DecodeError::Version { version }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_length_that_lies_is_refused_without_allocating() {
        // A vector that claims 2^60 elements.
        let mut bytes = vec![253];
        bytes.extend((1u64 << 60).to_le_bytes());
        assert!(matches!(decode::<Vec<u8>>(&bytes), Err(DecodeError::Malformed { .. })));
    }

    #[test]
    fn versions_are_told_apart() {
        assert_eq!(decode_message::<u8>(&[]), Err(DecodeError::Empty));
        assert_eq!(decode_message::<u8>(&[9, 1]), Err(DecodeError::Version { version: 9 }));
        assert_eq!(decode_message::<u8>(&encode_message(&5u8)), Ok(5));
        assert!(decode_message::<u8>(&[WIRE_VERSION, 5, 5]).is_err());
    }
}
