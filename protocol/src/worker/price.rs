//! A price in expected milliseconds: how long until it runs here, and how much slower it would run for company.

use crate::auction::Basis;
use crate::workload::{Layout, Resources, Spec};

/// A container's start, measured on this kind of machine.
const START: u64 = 10;
/// What each start in flight adds: they share the same disk and locks. Counting them is what kept Diego's cells from
/// cascading starts.
const START_IN_FLIGHT: u64 = 20;
/// What a fully busy processor costs; and one that is half reserved.
const CONTENTION: f64 = 100.0;
/// What each container that runs here costs when nothing says how much it needs.
const COMPANY: u64 = 2;
/// The same for what is to be spread.
const SPREAD_COMPANY: u64 = 20;
/// What a workload costs that one would rather be near to and is not here.
const FAR: u64 = 1000;

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
    /// Workloads it wants to be near to that are not here.
    pub far: u32,
}

impl Situation {
    /// The price of one more replica after `further` others, with `reserved` of `capacity` taken before it.
    pub fn price(&self, spec: &Spec, capacity: &Resources, reserved: &Resources, further: u32) -> u32 {
        // Only the first replica pays for the image.
        let fetch = if further == 0 { self.missing.saturating_mul(1000) / self.bandwidth.max(1) } else { 0 };
        let starts = START + START_IN_FLIGHT * u64::from(self.starting + further);
        let asked = &spec.resources;
        let after = share(reserved.cpu_milli + asked.cpu_milli, capacity.cpu_milli)
            .max(share(reserved.memory + asked.memory, capacity.memory));
        let contention = CONTENTION * (crowding(spec.layout, after) + f64::from(self.pressure) / 100.0);
        let each = if spec.layout == Layout::Spread { SPREAD_COMPANY } else { COMPANY };
        let company = if spec.layout == Layout::Pack { 0 } else { each * u64::from(self.running + further) };
        let far = FAR * u64::from(self.far);
        u32::try_from(fetch + starts + company + contention as u64 + far).unwrap_or(u32::MAX)
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
            far: self.far,
            evicts: 0,
        }
    }
}

/// What a machine costs that is reserved so far, as a share of [`CONTENTION`]. Reservations are what may be used, PSI says
/// what is. Left alone, work goes to the emptiest machine until that is half reserved. Above that a machine gets
/// cheaper as it fills: with every machine three quarters full, what asks for half of one would find no room although there
/// is plenty, so those that are half full are filled one after the other instead.
fn crowding(layout: Layout, after: f64) -> f64 {
    match layout {
        Layout::Balance if after <= 0.5 => 4.0 * after * after,
        Layout::Balance => 2.0 - after,
        Layout::Spread => 4.0 * after * after,
        Layout::Pack => 4.0 * (1.0 - after),
    }
}

fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { (part as f64 / whole as f64).min(1.0) }
}
