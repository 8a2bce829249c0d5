//! The modelled network between the hosts: delay, loss, doubling, overtaking, and cuts.

use std::time::Duration;

use fastrand::Rng;

use crate::options::Options;

/// A cut of the network in two sides.
#[derive(Clone, Debug)]
struct Cut {
    /// Which side each host is on.
    side: Vec<bool>,
    /// Messages still come through from the second side to the first.
    one_way: bool,
}

/// What happens to messages.
pub(crate) struct FakeNetwork {
    loss: f64,
    duplicates: f64,
    latency_min: Duration,
    latency_mean: Duration,
    cut: Option<Cut>,
}

impl FakeNetwork {
    pub(crate) fn new(options: &Options) -> FakeNetwork {
        FakeNetwork {
            loss: options.loss,
            duplicates: options.duplicates,
            latency_min: options.latency_min,
            latency_mean: options.latency_mean,
            cut: None,
        }
    }

    /// Nothing is lost or doubled any more, and whatever was cut is healed.
    pub(crate) fn calm(&mut self) {
        (self.loss, self.duplicates, self.cut) = (0.0, 0.0, None);
    }

    /// Cuts the network between two random sides.
    pub(crate) fn cut(&mut self, hosts: usize, one_way: bool, rng: &mut Rng) {
        let share = 0.1 + 0.8 * rng.f64();
        self.cut = Some(Cut { side: (0..hosts).map(|_| rng.f64() < share).collect(), one_way });
    }

    pub(crate) fn heal(&mut self) {
        self.cut = None;
    }

    /// Whether a message from one host reaches another.
    pub(crate) fn reaches(&self, from: usize, to: usize) -> bool {
        match &self.cut {
            Some(cut) => cut.side[from] == cut.side[to] || (cut.one_way && !cut.side[from]),
            None => true,
        }
    }

    /// Whether two hosts can talk, both ways.
    pub(crate) fn connects(&self, a: usize, b: usize) -> bool {
        self.reaches(a, b) && self.reaches(b, a)
    }

    /// When each copy of a message arrives; none when it is lost.
    pub(crate) fn delays(&self, rng: &mut Rng) -> impl Iterator<Item = Duration> {
        let lost = self.loss > 0.0 && rng.f64() < self.loss;
        let doubled = self.duplicates > 0.0 && rng.f64() < self.duplicates;
        let copies = if lost { 0 } else { 1 + usize::from(doubled) };
        let delays: [Duration; 2] = std::array::from_fn(|_| self.delay(rng));
        delays.into_iter().take(copies)
    }

    /// One way, of one message.
    pub(crate) fn delay(&self, rng: &mut Rng) -> Duration {
        self.latency_min + self.latency_mean.mul_f64(-(1.0 - rng.f64()).ln())
    }
}
