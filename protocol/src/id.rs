//! Names of things that cannot be confused with one another: fixed-size identifiers, hex in text, raw bytes on the wire.

use std::fmt;
use std::str::FromStr;

use data_encoding::HEXLOWER_PERMISSIVE;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Why a text is not an identifier. Nothing was changed; the caller's input is at fault.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{text}` is not {len} bytes of hexadecimal")]
pub struct ParseIdError {
    text: String,
    len: usize,
}

macro_rules! identifier {
    ($(#[$meta:meta])* $name:ident, $len:literal) => {
        $(#[$meta])*
        #[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; $len]);

        impl $name {
            /// The first 12 hexadecimal digits, as people see it.
            pub fn short(&self) -> String {
                data_encoding::HEXLOWER.encode(&self.0[..6])
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&data_encoding::HEXLOWER.encode(&self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.short())
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                let wrong = || ParseIdError { text: text.to_owned(), len: $len };
                let bytes = HEXLOWER_PERMISSIVE.decode(text.as_bytes()).map_err(|_| wrong())?;
                Ok($name(bytes.try_into().map_err(|_| wrong())?))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serialize_bytes(&self.0, serializer)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserialize_bytes(deserializer).map($name)
            }
        }
    };
}

identifier!(
    /// A node: its ed25519 public key, and so the key inside its libp2p PeerId.
    NodeId,
    32
);
identifier!(
    /// A mesh: BLAKE3 of its root public key.
    MeshId,
    32
);
identifier!(
    /// A workload, chosen by the node it was submitted to.
    WorkloadId,
    16
);
identifier!(
    /// A chunk: BLAKE3 of its bytes.
    ChunkId,
    32
);
identifier!(
    /// An image as OCI tools know it: SHA-256 of its config.
    ImageId,
    32
);
identifier!(
    /// An ed25519 signature.
    Signature,
    64
);
identifier!(
    /// Where a fact stands in the order that reconciliation walks: the first half of BLAKE3 of its key.
    KeyHash,
    16
);
identifier!(
    /// The exclusive or of the hashes of a set of facts and their versions.
    Fingerprint,
    16
);

fn serialize_bytes<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    use serde::ser::SerializeTuple;
    if serializer.is_human_readable() {
        return serializer.serialize_str(&data_encoding::HEXLOWER.encode(bytes));
    }
    let mut tuple = serializer.serialize_tuple(bytes.len())?;
    for byte in bytes {
        tuple.serialize_element(byte)?;
    }
    tuple.end()
}

fn deserialize_bytes<'de, D: Deserializer<'de>, const N: usize>(deserializer: D) -> Result<[u8; N], D::Error> {
    struct Bytes<const N: usize>;

    impl<'de, const N: usize> de::Visitor<'de> for Bytes<N> {
        type Value = [u8; N];

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "{N} bytes")
        }

        fn visit_seq<A: de::SeqAccess<'de>>(self, mut seq: A) -> Result<[u8; N], A::Error> {
            let mut bytes = [0; N];
            for (at, byte) in bytes.iter_mut().enumerate() {
                *byte = seq.next_element()?.ok_or_else(|| de::Error::invalid_length(at, &self))?;
            }
            Ok(bytes)
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<[u8; N], E> {
            let bytes = HEXLOWER_PERMISSIVE.decode(text.as_bytes()).map_err(E::custom)?;
            bytes.try_into().map_err(|_| E::custom(format!("expected {N} bytes of hexadecimal")))
        }
    }

    if deserializer.is_human_readable() {
        deserializer.deserialize_str(Bytes)
    } else {
        deserializer.deserialize_tuple(N, Bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_survive_text_json_and_wire() {
        let id = NodeId([7; 32]);
        assert_eq!(id.to_string().parse(), Ok(id));
        let json = serde_json::to_string(&id).unwrap();
        assert_eq!(serde_json::from_str::<NodeId>(&json).unwrap(), id);
        let wire = crate::codec::encode(&id);
        assert_eq!(wire.len(), 32);
        assert_eq!(crate::codec::decode::<NodeId>(&wire).unwrap(), id);
    }

    #[test]
    fn a_wrong_length_is_refused() {
        assert!("07".parse::<NodeId>().is_err());
        assert!("zz".parse::<WorkloadId>().is_err());
    }
}
