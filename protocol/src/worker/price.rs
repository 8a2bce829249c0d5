//! A price in expected milliseconds: how long until it runs here, and how much slower it would run for company.

use crate::auction::Basis;
use crate::workload::Resources;

/// A container's start, measured on this kind of machine.
const START: u64 = 10;
/// What each start in flight adds: they share the same disk and locks. Counting them is what kept Diego's cells from
/// cascading starts.
const START_IN_FLIGHT: u64 = 20;
/// What a fully reserved, or fully busy, processor costs.
const CONTENTION: f64 = 100.0;
/// What each container that runs here costs when nothing says how much it needs.
const COMPANY: u64 = 2;

/// What a bidder looks at.
#[derive(Clone, Debug)]
pub struct Situation {
    /// Bytes of the image that are not here.
    pub missing: u64,
    /// Bytes of the image in all.
    pub size: u64,
    /// Bytes a second they come with.
    pub bandwidth: u64,
    /// Containers being started.
    pub starting: u32,
    /// Containers here.
    pub running: u32,
    /// PSI of the processors, 0–100.
    pub pressure: u8,
}

impl Situation {
    /// The price of one more replica after `further` others, with `reserved` of `capacity` taken before it.
    pub fn price(&self, capacity: &Resources, reserved: &Resources, asked: &Resources, further: u32) -> u32 {
        // Only the first replica pays for the image.
        let fetch = if further == 0 { self.missing.saturating_mul(1000) / self.bandwidth.max(1) } else { 0 };
        let starts = START + START_IN_FLIGHT * u64::from(self.starting + further);
        let after = share(reserved.cpu_milli + asked.cpu_milli, capacity.cpu_milli)
            .max(share(reserved.memory + asked.memory, capacity.memory));
        let contention = CONTENTION * (after * after + f64::from(self.pressure) / 100.0);
        let company = COMPANY * u64::from(self.running + further);
        u32::try_from(fetch + starts + company + contention as u64).unwrap_or(u32::MAX)
    }

    /// What the first price is made of.
    pub fn basis(&self, capacity: &Resources, reserved: &Resources) -> Basis {
        Basis {
            missing: self.missing,
            size: self.size,
            bandwidth: self.bandwidth,
            starting: self.starting,
            reserved: (share(reserved.cpu_milli, capacity.cpu_milli) * 100.0) as u8,
            pressure: self.pressure,
        }
    }
}

fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { (part as f64 / whole as f64).min(1.0) }
}
