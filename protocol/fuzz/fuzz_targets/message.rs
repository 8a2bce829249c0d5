//! What a peer sends is decoded before anything else is known of it: no bytes may panic the decoder, or make it allocate
//! more than they are long. What decodes is written in one way only, which is never longer than what came and decodes
//! to the same again: a node passes on what it took, and must not pass on what others cannot read.
#![no_main]

use libfuzzer_sys::fuzz_target;
use moyai_protocol::codec;
use moyai_protocol::message::Message;

fuzz_target!(|bytes: &[u8]| {
    let Ok(message) = codec::decode_message::<Message>(bytes) else { return };
    let written = codec::encode_message(&message);
    assert!(written.len() <= bytes.len(), "{} bytes became {}", bytes.len(), written.len());
    let again: Message = codec::decode_message(&written).expect("what was written is read");
    assert_eq!(codec::encode_message(&again), written);
});
