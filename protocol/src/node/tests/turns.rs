//! Which of several nodes fetches something from outside of the mesh.

use super::*;
use crate::turns::{TURN, Turn};

fn reference() -> Reference {
    "quay.io/a/b:1".parse().unwrap()
}

fn ask(mesh: &mut Mesh, at: usize, shares: bool) {
    mesh.command(at, Command::AskTurn { reference: reference(), shares });
}

fn turn(mesh: &Mesh, at: usize) -> Option<Turn> {
    mesh.node(at).turn(&reference())
}

#[test]
fn of_all_that_ask_one_fetches_and_when_it_dies_another() {
    for seed in 0..20 {
        let mut mesh = Mesh::new(5, seed);
        mesh.run(secs(10));
        (0..5).for_each(|at| ask(&mut mesh, at, false));
        mesh.wait("an answer", secs(2), |mesh| (0..5).all(|at| turn(mesh, at).is_some()));
        let mine: Vec<usize> = (0..5).filter(|at| turn(&mesh, *at) == Some(Turn::Yours)).collect();
        let [first] = mine[..] else { panic!("seed {seed}: the turn is that of {mine:?}") };
        mesh.kill(first, true);
        // It may have been the steward, too.
        mesh.run(TURN);
        let left: Vec<usize> = (0..5).filter(|at| *at != first).collect();
        left.iter().for_each(|at| ask(&mut mesh, *at, true));
        mesh.wait("an answer", secs(2), |mesh| left.iter().all(|at| turn(mesh, *at).is_some()));
        let next: Vec<usize> = left.iter().copied().filter(|at| turn(&mesh, *at) == Some(Turn::Yours)).collect();
        let [next] = next[..] else { panic!("seed {seed}: then it is that of {next:?}") };
        let root = ChunkId([9; 32]);
        mesh.command(next, Command::EndTurn { reference: reference(), root: Some(root) });
        mesh.run(secs(1));
        let left: Vec<usize> = left.into_iter().filter(|at| *at != next).collect();
        left.iter().for_each(|at| ask(&mut mesh, *at, true));
        mesh.wait("what came of it", secs(2), |mesh| left.iter().all(|at| turn(mesh, *at) == Some(Turn::Over(root))));
    }
}
