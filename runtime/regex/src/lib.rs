//! `regex-lite` in the place of `regex`.
//!
//! What we take of oci-spec matches one expression, of ASCII digits, for which `regex` brings Unicode's tables into whatever starts
//! containers: some seven thousand pointers that each of its processes relocates before it begins (`moyai oci run`: a tenth of a
//! millisecond).

pub use regex_lite::*;
