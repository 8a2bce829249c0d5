//! A specification is JSON that a submitter signed; nodes open it before they know whether it is any good. The first byte
//! says who signs. Opening the bytes under a good signature comes to the same as parsing and checking them, whoever may
//! not submit is refused, and what a user's own node would sign opens everywhere to what was asked for.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh::{NOW, SUBMITTERS, members, mesh};
use moyai_protocol::workload::{MAX_SPEC, SignedSpec, Spec, SpecError};

fuzz_target!(|input: &[u8]| {
    let Some((first, bytes)) = input.split_first() else { return };
    let by = usize::from(*first) % members().len();
    let submitter = &members()[by];
    let signed = mesh::sign_spec(bytes.to_vec(), NOW.as_secs(), by);
    let parsed = serde_json::from_slice::<Spec>(bytes).ok();
    let good = parsed.as_ref().is_some_and(|spec| spec.check().is_ok()) && bytes.len() <= MAX_SPEC;
    match signed.open(&mesh()) {
        Ok((spec, member)) => {
            assert!(good && SUBMITTERS.contains(&by));
            assert_eq!((Some(&spec), member.node), (parsed.as_ref(), submitter.id));
        }
        Err(error) => assert!(!good || !SUBMITTERS.contains(&by), "a good specification: {error}"),
    }
    let Some(spec) = parsed else { return };
    let _ = (spec.features(), spec.shuns(&spec), spec.is_apart_from_itself());
    match SignedSpec::sign(&spec, &submitter.key, submitter.chain.clone(), NOW.as_secs()) {
        Ok(signed) if SUBMITTERS.contains(&by) => {
            assert_eq!(signed.open(&mesh()).expect("as it was signed").0, spec);
        }
        Ok(signed) => assert!(signed.open(&mesh()).is_err()),
        // The canonical form may be longer than what came: a reference is written out in full.
        Err(SpecError::TooLarge { .. }) => {}
        Err(error) => assert_eq!(Err(error), spec.check()),
    }
});
