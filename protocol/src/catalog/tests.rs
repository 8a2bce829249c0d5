use super::hlc::{Clock, Hlc};
use crate::time::UnixMillis;

#[test]
fn a_clock_never_stamps_twice_and_follows_what_it_saw() {
    let mut clock = Clock::default();
    let first = clock.stamp(UnixMillis(1000));
    let second = clock.stamp(UnixMillis(999));
    assert!(second > first);
    clock.observe(Hlc::at(UnixMillis(5000)));
    let third = clock.stamp(UnixMillis(1001));
    assert!(third > Hlc::at(UnixMillis(5000)));
    assert_eq!(third.ahead_of(UnixMillis(1001)), 3999);
}
