//! A node among members that may say anything: no sequence of messages, of ends of effects, of commands and of time brings
//! it down or over its bounds (`Node::invariants`, after every step). Whatever it sends can be read, no container is started
//! without its image or twice, and no timer that is due stays due. What an input is: see [`mesh::history`].
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| mesh::history::live(input));
