//! Images on their way.

use std::ops::Range;

use super::*;

#[test]
fn two_providers_that_have_everything_are_both_used() {
    let mut mesh = Mesh::new(&[Manner::Honest; 3], 1);
    assert!(mesh.gets(ms(2000)));
    let (one, two) = (mesh.hosts[1].served, mesh.hosts[2].served);
    assert!(one.min(two) > PIECES / 3, "{one} and {two}");
    assert_eq!(one + two, PIECES + 1, "nothing comes twice");
    assert_eq!(mesh.hosts[0].exchange.poll_timeout(), None);
}

#[test]
fn providers_with_a_part_each_complement_one_another() {
    let mut mesh = Mesh::new(&[Manner::Honest; 3], 1);
    for (at, lacks) in [(1, 0..30), (2, 30..PIECES)] {
        contents(image(0))[lacks].iter().for_each(|piece| _ = mesh.hosts[at].kept.remove(&piece.chunk));
    }
    mesh.loss = 0.2;
    assert!(mesh.gets(ms(5000)));
    assert_eq!(mesh.hosts[1].served + mesh.hosts[2].served, PIECES + 1);
    assert!(mesh.hosts[0].failed.is_empty());
}

#[test]
fn who_lies_is_told_of_and_not_asked_again() {
    for seed in 0..10 {
        let mut mesh = Mesh::new(&[Manner::Honest, Manner::Lies, Manner::Honest, Manner::Lies], seed);
        assert!(mesh.gets(ms(3000)), "seed {seed}");
        let host = &mesh.hosts[0];
        for liar in [node(1), node(3)] {
            assert!(host.asked.iter().filter(|(_, provider, _)| *provider == liar).count() <= PER_PROVIDER);
            assert!(host.lied.contains(&liar), "seed {seed}");
        }
    }
    let mut mesh = Mesh::new(&[Manner::Honest, Manner::Lies, Manner::Lies], 1);
    assert!(!mesh.gets(ms(1000)));
    let [(root, reason)] = &mesh.hosts[0].failed[..] else { panic!("nobody else is left") };
    assert_eq!(*root, image(0));
    assert!(reason.starts_with("every node that has it sent wrong bytes"), "{reason}");
}

#[test]
fn who_are_one_another_s_only_hope_do_not_wait_for_one_another() {
    for seed in 0..10 {
        let mut mesh = Mesh::new(&[Manner::Honest, Manner::Lies, Manner::Honest], seed);
        mesh.hosts[2].kept.clear();
        mesh.want(2, image(0), Need::Copy);
        mesh.want(0, image(0), Need::Use);
        let failed = |mesh: &Mesh| [0, 2].iter().all(|at| !mesh.hosts[*at].failed.is_empty());
        assert!(mesh.run_until(STALEMATE + LOOK * 4, failed), "seed {seed}");
        for at in [0, 2] {
            let [(_, reason)] = &mesh.hosts[at].failed[..] else { panic!("failed once") };
            assert!(reason.starts_with("every node that has it sent wrong bytes: node 0101"), "{reason}");
        }
    }
}

#[test]
fn who_is_away_rests_and_is_asked_again() {
    let mut mesh = Mesh::new(&[Manner::Honest, Manner::Away], 1);
    assert!(!mesh.gets(ms(7500)));
    let asked: Vec<Instant> = mesh.hosts[0].asked.iter().map(|(at, ..)| *at).collect();
    assert!(asked.len() > 1 && asked.windows(2).all(|two| two[1].since(two[0]) >= REST), "{asked:?}");
    mesh.hosts[1].manner = Manner::Honest;
    assert!(mesh.gets(REST + LOOK + ms(1000)), "asked for again, it is the same download");
}

#[test]
fn without_anything_for_a_minute_it_has_failed_and_may_be_wanted_again() {
    for manners in [&[Manner::Honest, Manner::Away][..], &[Manner::Honest]] {
        let mut mesh = Mesh::new(manners, 1);
        assert!(!mesh.gets(GIVE_UP - ms(1)));
        assert!(mesh.hosts[0].failed.is_empty());
        assert!(mesh.run_until(REST + LOOK, |mesh| !mesh.hosts[0].failed.is_empty()));
        assert!(mesh.hosts[0].exchange.failure(&image(0)).is_some());
        mesh.want(0, image(0), Need::Copy);
        assert_eq!(mesh.hosts[0].exchange.failure(&image(0)), None);
    }
}

#[test]
fn what_cannot_be_kept_fails_at_once() {
    let mut mesh = Mesh::new(&[Manner::DiskFull, Manner::Honest, Manner::Honest], 1);
    assert!(!mesh.gets(ms(100)));
    assert_eq!(mesh.hosts[0].failed, [(image(0), "no space left".to_owned())]);
    assert_eq!(mesh.hosts[0].exchange.downloads().count(), 0);
}

#[test]
fn what_hangs_at_the_end_is_asked_for_elsewhere_too() {
    for seed in 0..10 {
        let mut mesh = Mesh::new(&[Manner::Honest, Manner::Hangs, Manner::Honest], seed);
        assert!(mesh.gets(ms(5000)), "seed {seed}");
        let asked: usize = mesh.hosts[0].asked.iter().map(|(_, _, pieces)| pieces.len()).sum();
        assert!(asked > PIECES + 1 && asked <= 2 * (PIECES + 1), "seed {seed}: {asked}");
        // The late answers change nothing.
        assert!(!mesh.run_until(ms(30_000), |mesh| mesh.hosts[0].complete.len() > 1));
    }
}

#[test]
fn what_is_used_takes_the_place_of_a_copy_which_goes_on_later() {
    let mut mesh = Mesh::new(&[Manner::Honest; 3], 1);
    let most = MAX_DOWNLOADS as u8;
    for at in 1..3 {
        mesh.hosts[at].kept = (0..most + 3).map(image).flat_map(everything).collect();
    }
    (0..=most).for_each(|n| mesh.want(0, image(n), Need::Copy));
    assert!(mesh.hosts[0].exchange.is_waiting(&image(most)));
    // What is to be used after all keeps its place.
    mesh.want(0, image(0), Need::Use);
    assert!(!mesh.run_until(ms(100), |mesh| !mesh.hosts[0].complete.is_empty()));
    mesh.want(0, image(most + 1), Need::Use);
    assert!(mesh.hosts[0].exchange.waiting.iter().map(|(root, _)| *root).eq([most, 1].map(image)));
    (2..most).for_each(|n| mesh.want(0, image(n), Need::Use));
    mesh.want(0, image(most + 2), Need::Use);
    // There is no copy left to make room, so it is the next.
    assert!(mesh.hosts[0].exchange.waiting.iter().map(|(root, _)| *root).eq([most + 2, most, 1].map(image)));
    assert!(mesh.run_until(ms(60_000), |mesh| mesh.hosts[0].complete.len() == MAX_DOWNLOADS + 3));
    assert!(mesh.hosts[0].failed.is_empty());
}

#[test]
fn those_who_receive_an_image_pass_it_on() {
    for seed in 0..5 {
        let mut mesh = Mesh::swarm(&[Manner::Honest; 9], seed);
        (1..9).for_each(|at| mesh.want(at, image(0), Need::Copy));
        assert!(mesh.run_until(ms(20_000), Mesh::all_have_it), "seed {seed}");
        assert!(mesh.hosts[0].served < 8 * PIECES * 2 / 3, "seed {seed}: the first served {}", mesh.hosts[0].served);
    }
}

#[test]
fn whoever_lies_hangs_or_goes_away_all_others_get_the_image_whole() {
    for seed in 0..100 {
        let mut rng = Rng::with_seed(seed);
        let mut manners = vec![Manner::Honest; rng.usize(2..10)];
        manners[1..].iter_mut().filter(|_| rng.u8(..4) == 0).for_each(|manner| *manner = Manner::Lies);
        let mut mesh = Mesh::swarm(&manners, seed);
        mesh.loss = rng.f64() * 0.3;
        for _ in 0..10 {
            let at = rng.usize(..manners.len());
            if manners[at] == Manner::Honest {
                mesh.hosts[at].manner = [Manner::Honest, Manner::Away, Manner::Hangs][rng.usize(..3)];
                mesh.want(at, image(0), Need::Copy);
            }
            mesh.run_until(ms(rng.u64(..2000)), |_| false);
        }
        for (at, manner) in manners.iter().enumerate() {
            mesh.hosts[at].manner = *manner;
            if *manner == Manner::Honest && !mesh.has(at, image(0)) {
                mesh.want(at, image(0), Need::Use);
            }
        }
        assert!(mesh.run_until(ms(120_000), Mesh::all_have_it), "seed {seed}");
        for host in &mesh.hosts {
            assert_eq!(host.failed, [], "seed {seed}");
            assert!(host.lied.iter().all(|liar| manners[usize::from(liar.0[0])] == Manner::Lies), "seed {seed}");
            let liars = manners.iter().filter(|manner| **manner == Manner::Lies).count();
            assert!(host.lied.len() <= PER_PROVIDER * liars, "seed {seed}: not asked again");
        }
    }
}

#[test]
fn a_small_image_does_not_wait_for_a_large_one() {
    for seed in 0..5 {
        let mut mesh = Mesh::new(&[Manner::Honest; 2], seed);
        mesh.hosts[1].kept.extend(everything(image(LARGE)));
        mesh.want(0, image(LARGE), Need::Use);
        mesh.run_until(ms(3000), |_| false);
        let bytes = |mesh: &Mesh, root| {
            let here = contents(root).into_iter().filter(|piece| mesh.hosts[0].kept.contains(&piece.chunk));
            here.map(|piece| u64::from(piece.len)).sum::<u64>()
        };
        let before = bytes(&mesh, image(LARGE));
        mesh.want(0, image(0), Need::Use);
        assert!(mesh.run_until(ms(20_000), |mesh| mesh.hosts[0].complete == [image(0)]), "seed {seed}");
        let (large, small) = (bytes(&mesh, image(LARGE)) - before, bytes(&mesh, image(0)));
        // Some of the large one was in flight; a little is lost while the small one's list comes.
        assert!(
            large < small * 2 + MAX_IN_FLIGHT,
            "seed {seed}: {large} bytes of the large one, {small} of the small one"
        );
    }
}

#[test]
fn who_asks_one_node_for_different_images_get_alike() {
    for seed in 0..5 {
        let mut mesh = Mesh::new(&[Manner::Honest; 5], seed);
        mesh.hosts.iter_mut().for_each(|host| host.kept.clear());
        let other = |at: usize| image(LARGE + at as u8);
        (1..5).for_each(|at| mesh.hosts[0].kept.extend(everything(other(at))));
        (1..5).for_each(|at| mesh.want(at, other(at), Need::Use));
        assert!(mesh.run_until(ms(200_000), |mesh| mesh.hosts[1..].iter().any(|host| !host.complete.is_empty())));
        let here: Vec<usize> = mesh.hosts[1..].iter().map(|host| host.kept.len()).collect();
        let half = contents(other(1)).len() / 2;
        assert!(here.iter().all(|count| *count > half), "seed {seed}: {here:?}");
    }
}

/// The first of sixteen has the large image, and nobody else has any.
fn alone(seed: u64) -> Mesh {
    let mut mesh = Mesh::swarm(&[Manner::Honest; 16], seed);
    mesh.hosts[0].kept = everything(image(LARGE)).collect();
    mesh
}

/// Seconds of virtual time until these have that image, and how many copies of it the first sent meanwhile.
fn spread(mesh: &mut Mesh, receivers: Range<usize>) -> (f64, f64) {
    let (begun, before) = (mesh.now, mesh.hosts[0].served);
    receivers.clone().for_each(|at| mesh.want(at, image(LARGE), Need::Copy));
    let all_have_it = |mesh: &Mesh| mesh.hosts[receivers.clone()].iter().all(|host| host.complete.len() == 1);
    assert!(mesh.run_until(ms(200_000), all_have_it));
    let copies = (mesh.hosts[0].served - before) as f64 / contents(image(LARGE)).len() as f64;
    (mesh.now.since(begun).as_secs_f64(), copies)
}

/// The first chunks of it.
fn some(count: usize) -> impl Iterator<Item = ChunkId> {
    contents(image(LARGE)).into_iter().take(count).map(|piece| piece.chunk)
}

/// What a link takes for it, in seconds.
fn bound() -> f64 {
    contents(image(LARGE)).len() as f64 * 262_144.0 / 10e6
}

/// They have it in what is at the least that part of all the time, and are sent no more than that many copies.
fn soon(mesh: &mut Mesh, receivers: Range<usize>, part: f64, most: f64) {
    let (took, copies) = spread(mesh, receivers);
    assert!(took < bound() / part, "{took:.1} s, {:.1} at least", bound());
    assert!(copies < most, "the first sent {copies:.2} copies");
}

#[test]
fn the_first_sends_little_more_than_one_copy_and_all_have_it_soon_after() {
    for seed in 0..2 {
        soon(&mut alone(seed), 1..16, 0.9, 1.05);
    }
}

#[test]
fn what_was_given_to_those_who_left_is_given_to_those_who_come_as_soon() {
    // Those who come first have nothing, or a half of it.
    for (seed, half) in [(0, 0), (1, 512)] {
        let mut mesh = alone(seed);
        mesh.hosts[1..8].iter_mut().for_each(|host| host.kept.extend(some(half)));
        spread(&mut mesh, 1..8);
        mesh.hosts[1..8].iter_mut().for_each(|host| host.kept.clear());
        soon(&mut mesh, 8..16, 0.9, 1.05);
    }
}

#[test]
fn two_that_are_slow_hold_few_up() {
    let mut mesh = alone(0);
    mesh.hosts[14..].iter_mut().for_each(|host| host.manner = Manner::Slow);
    (14..16).for_each(|at| mesh.want(at, image(LARGE), Need::Copy));
    soon(&mut mesh, 1..14, 0.8, 1.2);
}

#[test]
fn some_that_die_hold_nobody_up() {
    let mut mesh = alone(0);
    (1..16).for_each(|at| mesh.want(at, image(LARGE), Need::Copy));
    mesh.run_until(ms(10_000), |_| false);
    for (at, host) in mesh.hosts.iter_mut().enumerate().skip(13) {
        (host.manner, host.exchange) = (Manner::Away, Exchange::new(node(at)));
        host.kept.clear();
    }
    // They were given their shares in vain.
    mesh.hosts[0].served = 0;
    let (took, copies) = spread(&mut mesh, 1..13);
    assert!(took + 10.0 < bound() / 0.85, "{took:.1} s more, {:.1} at least", bound());
    assert!(copies < 0.8, "the first sent {copies:.2} copies more");
}

#[test]
fn who_comes_late_or_has_most_of_it_takes_nobody_s_time() {
    let mut mesh = alone(0);
    (1..8).for_each(|at| mesh.want(at, image(LARGE), Need::Copy));
    mesh.run_until(ms(14_000), |_| false);
    soon(&mut mesh, 1..16, 0.9, 1.0);
    let mut mesh = alone(1);
    mesh.hosts[1..4].iter_mut().for_each(|host| host.kept.extend(some(800)));
    soon(&mut mesh, 1..16, 0.9, 1.0);
}
