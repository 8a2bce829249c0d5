//! Facts travel from node to node and are believed by everybody, so what opens must be exactly what its author said: as
//! bytes from the wire, and behind a good signature, where only a member gets.
//!
//! The input is an encoded fact, an encoded body, or the raw content of one. The first byte says who signs, the second
//! about what, and whether the signatures inside are made good too.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh::{NOW, members, mesh, workload};
use moyai_protocol::catalog::{Body, Fact, Hlc, Key, Said};
use moyai_protocol::codec;
use moyai_protocol::time::UnixMillis;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(fact) = codec::decode::<Fact>(bytes) {
        opens(&fact);
        opens(&mesh::mend_fact(&fact));
    }
    let [by, about, content @ ..] = bytes else { return };
    let by = usize::from(*by) % members().len();
    let mut key = key(*about, by);
    let version = Hlc::at(UnixMillis(NOW.0 + u64::from(*about)));
    opens(&mesh::sign_fact(key, version, content.to_vec(), by));
    let Ok(mut body) = codec::decode::<Body>(content) else { return };
    assert_eq!(codec::decode(&codec::encode(&body)).as_ref(), Ok(&body));
    opens(&Fact::sign(key, version, &body, &members()[by].key));
    if about & 0x80 != 0 {
        mesh::mend_body(&mut body, &mut key, by);
        opens(&Fact::sign(key, version, &body, &members()[by].key));
    }
});

fn key(about: u8, by: usize) -> Key {
    let (node, workload) = (members()[by].id, workload(about >> 3));
    let other = members()[usize::from(about >> 3) % members().len()].id;
    match about % 8 {
        0 => Key::Node(node),
        1 => Key::Placement(node, workload, u32::from(about >> 6)),
        2 => Key::Journal(node, workload),
        3 => Key::Workload(workload),
        4 => Key::Drain(other),
        5 => Key::Revoked(other),
        6 => Key::Seats(node, workload),
        _ => Key::Node(other),
    }
}

fn opens(fact: &Fact) {
    let Ok(said) = fact.open(&mesh()) else { return };
    let body: Body = codec::decode(&fact.content).expect("what opens is well formed");
    assert_eq!(said.body(), body, "it says something else than what was signed");
    assert!(fact.key.owner().is_none_or(|owner| owner == fact.author), "said in another's name");
    if let Said::Workload { spec, .. } = &said {
        assert_eq!((fact.key, spec.check()), (Key::Workload(spec.id), Ok(())));
    }
    assert_eq!(codec::decode(&codec::encode(fact)).as_ref(), Ok(fact));
}
