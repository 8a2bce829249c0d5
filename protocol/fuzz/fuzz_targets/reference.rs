//! An image reference comes from users and, inside specifications and reports, from peers. What parses has one canonical
//! form, which parses to itself; so does what people are shown, since they type it again. Nothing that parses can climb
//! out of a folder.
#![no_main]

use libfuzzer_sys::fuzz_target;
use moyai_protocol::reference::Reference;

fuzz_target!(|text: &str| {
    let Ok(reference) = text.parse::<Reference>() else { return };
    let full = reference.to_string();
    assert_eq!(full.parse().as_ref(), Ok(&reference), "the full form of `{text}`");
    assert!(full.split('/').all(|part| !part.is_empty() && part != "." && part != ".."), "`{full}` climbs");
    for shown in [reference.familiar(), reference.brief()] {
        assert_eq!(shown.parse().as_ref(), Ok(&reference), "`{shown}`, as which people see `{full}`");
    }
});
