//! What this node would take, at what price, and what would have to make way for it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use super::{FEATURES, Held, Intent, MAX_PLACEMENTS, PlacementState, Situation, Worker};
use crate::auction::{Basis, Refusal};
use crate::id::{NodeId, WorkloadId};
use crate::time::Instant;
use crate::workload::{Resources, Spec};

/// Ports of one node that lead into containers: each costs a descriptor.
const MAX_PORTS_HERE: usize = 1024;
/// Room held for gangs at a time.
const MAX_HOLDS: usize = 64;
/// How long room is held for a gang: two steps of an auction, and a lost message in each.
const HOLD: Duration = Duration::from_secs(5);
/// What taking others' places costs: more than any wait for an image, so that it is the last resort.
const EVICTION: u32 = 600_000;
/// And for each placement that would have to go.
const EVICTED: u32 = 10_000;

/// Room that is held for a part of a gang.
#[derive(Debug)]
pub struct Hold {
    spec: Arc<Spec>,
    /// Replicas not awarded yet.
    left: u32,
    until: Instant,
}

impl Worker {
    /// What is promised: to placements that are not over and stay, and to gangs.
    pub fn reserved(&self) -> Resources {
        let stays = self.placements.values().filter(|held| held.fact.state.is_active() && !held.is_leaving());
        let taken = stays.fold(Resources::default(), |sum, held| sum.plus(&held.spec.resources));
        taken.plus(&self.held_for_gangs())
    }

    fn held_for_gangs(&self) -> Resources {
        self.holds.values().fold(Resources::default(), |sum, hold| sum.plus(&hold.spec.resources.times(hold.left)))
    }

    /// Prices for up to `replicas` further replicas, or why not even one. `in_place` counts on the room of what runs here
    /// in an earlier form and would end for it.
    pub fn bid(
        &self,
        spec: &Spec,
        replicas: u32,
        missing: u64,
        in_place: bool,
        now: Instant,
    ) -> Result<(Vec<u32>, Basis), Refusal> {
        let copies = self.suits(spec, now, None, in_place)?;
        let situation = self.situation(missing, spec);
        let basis = situation.basis(&self.capacity, &self.reserved());
        let mut prices = Vec::new();
        let mut reserved = if in_place { self.reserved_without_outdated(spec) } else { self.reserved() };
        let most = if spec.is_apart_from_itself() { 1 } else { copies.min(replicas as usize) };
        while prices.len() < most && self.capacity.fits(&reserved, &spec.resources) {
            prices.push(situation.price(spec, &self.capacity, &reserved, prices.len() as u32));
            reserved = reserved.plus(&spec.resources);
        }
        if !prices.is_empty() {
            return Ok((prices, basis));
        }
        // A gang that would push others aside would do so before it is known whether it has room elsewhere.
        let victims = if spec.gang { None } else { self.victims(spec, &Resources::default()) };
        let victims = victims.ok_or_else(|| self.too_little(spec))?;
        let price = situation.price(spec, &self.capacity, &reserved, 0);
        let evicts = victims.len() as u32;
        let price = price.saturating_add(EVICTION).saturating_add(EVICTED.saturating_mul(evicts));
        Ok((vec![price], Basis { evicts, ..basis }))
    }

    /// Keeps room for `replicas` of a gang until they are awarded, or a few seconds are over.
    pub fn hold(
        &mut self,
        from: NodeId,
        auction: u64,
        spec: &Spec,
        replicas: u32,
        now: Instant,
    ) -> Result<(), Refusal> {
        self.holds.remove(&(from, auction));
        if self.suits(spec, now, None, false)? < replicas as usize {
            return Err(Refusal::OnHold);
        }
        if self.holds.len() >= MAX_HOLDS || (replicas > 1 && spec.is_apart_from_itself()) {
            return Err(Refusal::OnHold);
        }
        let others = self.held_for_gangs();
        let hold = Hold { spec: Arc::new(spec.clone()), left: replicas, until: now + HOLD };
        self.holds.insert((from, auction), hold);
        let reserved = self.reserved();
        if !self.capacity.fits(&reserved, &Resources::default()) {
            self.holds.remove(&(from, auction));
            // But for other gangs, which may get in each other's way, there would be room.
            let alone = self.capacity.fits(&reserved.minus(&others), &Resources::default());
            return Err(if alone { Refusal::OnHold } else { self.too_little(spec) });
        }
        Ok(())
    }

    /// The gang has no place, or another one.
    pub fn unhold(&mut self, from: NodeId, auction: u64) {
        self.holds.remove(&(from, auction));
    }

    /// One replica of what was held is being awarded.
    pub(super) fn use_hold(&mut self, from: NodeId, workload: &WorkloadId) {
        let mut own = self.holds.iter_mut().filter(|((holder, _), hold)| *holder == from && hold.spec.id == *workload);
        if let Some((_, hold)) = own.find(|(_, hold)| hold.left > 0) {
            hold.left -= 1;
        }
        self.holds.retain(|_, hold| hold.left > 0);
    }

    pub(super) fn holds_due(&mut self, now: Instant) {
        self.holds.retain(|_, hold| hold.until > now);
    }

    pub(super) fn next_hold(&self) -> Option<Instant> {
        self.holds.values().map(|hold| hold.until).min()
    }

    /// How many of `spec` this node would run, whatever room it has, or why not one. `replaces` is a placement here that it
    /// would take the place of; `in_place` is any of an earlier form.
    pub(super) fn suits(
        &self,
        spec: &Spec,
        now: Instant,
        replaces: Option<(WorkloadId, u32)>,
        in_place: bool,
    ) -> Result<usize, Refusal> {
        for (name, value) in &spec.on {
            if self.labels.get(name) != Some(value) {
                return Err(Refusal::Label { name: name.clone(), value: value.clone() });
            }
        }
        if let Some(feature) = spec.requires.iter().find(|feature| !FEATURES.contains(&feature.as_str())) {
            return Err(Refusal::Requires(feature.clone()));
        }
        if self.draining {
            return Err(Refusal::Draining);
        }
        if self.placements.len() >= MAX_PLACEMENTS {
            return Err(Refusal::Full);
        }
        let mut shunned = self.shunned.iter().filter(|(_, until)| **until > now).map(|(key, _)| *key);
        if shunned.any(|key| replaces.map_or(key.0 == spec.id, |replaces| key == replaces)) {
            return Err(Refusal::FailedHere);
        }
        if self.offers.ordinary && (spec.resources != Resources::default() || spec.pids > 0) {
            return Err(Refusal::NotOffered("limits, as it runs as an ordinary user".to_owned()));
        }
        if let Some(what) = self.offers.lacks(&spec.confinement) {
            return Err(Refusal::NotOffered(what));
        }
        let stays = |key: &(WorkloadId, u32), held: &Held| {
            held.fact.state.is_active() && !held.is_leaving() && replaces != Some(*key)
        };
        let beside = || self.placements.iter().filter(|(key, held)| stays(key, held));
        let staying = || beside().filter(|(key, _)| !self.is_outdated(spec, key)).map(|(_, held)| &held.spec);
        if let Some(other) = staying().find(|other| spec.shuns(other) || other.shuns(spec)) {
            return Err(Refusal::Apart { from: other.name.clone() });
        }
        // What is bid on in place takes over what its earlier form has; what is awarded says which it replaces.
        let held =
            || beside().filter(|(key, _)| !(in_place && self.is_outdated(spec, key))).map(|(_, held)| &*held.spec);
        if let Some((port, other)) = held().find_map(|other| Some((spec.clashes(other)?, other))) {
            return Err(Refusal::Port { port: port.to_string(), by: other.name.clone() });
        }
        // Of its own gang the room is its own.
        let holds = || self.holds.values().filter(|hold| hold.spec.id != spec.id);
        if holds().any(|hold| spec.clashes(&hold.spec).is_some()) {
            return Err(Refusal::OnHold);
        }
        let published: usize = held().map(|other| other.confinement.ports.len()).sum();
        if let Some(port) =
            spec.confinement.ports.first().filter(|_| published + spec.confinement.ports.len() > MAX_PORTS_HERE)
        {
            return Err(Refusal::Port { port: port.to_string(), by: "too many others here".to_owned() });
        }
        let promised = holds().flat_map(|hold| std::iter::repeat_n(&hold.spec.confinement, hold.left as usize));
        let given = held().map(|other| &other.confinement).chain(promised);
        self.offers.copies(&spec.confinement, given).map_err(Refusal::Devices)
    }

    /// Whether one replica of `spec` has room, with what it takes the place of `freed`, or finds it by what makes way.
    pub(super) fn room(&self, spec: &Spec, freed: &Resources) -> Result<Vec<(WorkloadId, u32)>, Refusal> {
        if self.capacity.fits(&self.reserved().minus(freed), &spec.resources) {
            return Ok(Vec::new());
        }
        self.victims(spec, freed).ok_or_else(|| self.too_little(spec))
    }

    fn too_little(&self, spec: &Spec) -> Refusal {
        let free = self.capacity.minus(&self.reserved());
        if spec.resources.memory > free.memory {
            Refusal::Memory { asked: spec.resources.memory, free: free.memory }
        } else {
            Refusal::Cpu { asked: spec.resources.cpu_milli, free: free.cpu_milli }
        }
    }

    /// The least that would have to make way for one replica of `spec`: of lower priority, the lowest first, of one
    /// priority what has come last.
    fn victims(&self, spec: &Spec, freed: &Resources) -> Option<Vec<(WorkloadId, u32)>> {
        let lower = |held: &Held| {
            held.spec.priority < spec.priority
                && held.spec.id != spec.id
                && held.fact.state.is_active()
                && held.intent == Intent::Run
                && !held.is_leaving()
                // Its predecessor is being stopped as it is: nothing would be free the sooner.
                && held.predecessor.is_none()
        };
        let mut candidates: Vec<_> = self.placements.iter().filter(|(_, held)| lower(held)).collect();
        candidates.sort_by_key(|(_, held)| (held.spec.priority, std::cmp::Reverse(held.fact.accepted)));
        let mut reserved = self.reserved().minus(freed);
        let mut victims = Vec::new();
        for (key, held) in candidates {
            if self.capacity.fits(&reserved, &spec.resources) {
                break;
            }
            reserved = reserved.minus(&held.spec.resources);
            victims.push((*key, held.spec.resources));
        }
        if !self.capacity.fits(&reserved, &spec.resources) {
            return None;
        }
        // Those that were taken first may not be needed with those that came after.
        victims.retain(|(_, resources)| {
            let with = reserved.plus(resources);
            let needed = !self.capacity.fits(&with, &spec.resources);
            if !needed {
                reserved = with;
            }
            needed
        });
        Some(victims.into_iter().map(|(key, _)| key).collect())
    }

    /// Whether a placement is of an earlier form of the same workload: it would be replaced where it is.
    fn is_outdated(&self, spec: &Spec, key: &(WorkloadId, u32)) -> bool {
        key.0 == spec.id && self.placements.get(key).is_some_and(|held| *held.spec != *spec)
    }

    /// An update may replace what runs here in its own place.
    fn reserved_without_outdated(&self, spec: &Spec) -> Resources {
        let outdated = self
            .placements
            .iter()
            .filter(|(key, held)| held.fact.state.is_active() && !held.is_leaving() && self.is_outdated(spec, key));
        outdated.fold(self.reserved(), |sum, (_, held)| sum.minus(&held.spec.resources))
    }

    fn situation(&self, missing: u64, spec: &Spec) -> Situation {
        let count = |which: &dyn Fn(&Held) -> bool| self.placements.values().filter(|held| which(held)).count() as u32;
        let waits = |held: &Held| matches!(held.fact.state, PlacementState::Starting | PlacementState::Fetching);
        let here: BTreeSet<&str> =
            self.placements.values().filter(|held| held.fact.state.is_active()).map(|held| &*held.spec.name).collect();
        Situation {
            missing,
            size: spec.image.size,
            bandwidth: self.bandwidth,
            starting: count(&waits),
            running: count(&|held| held.fact.state.is_active()),
            pressure: self.pressure,
            far: spec.near.iter().filter(|name| !here.contains(name.as_str())).count() as u32,
        }
    }
}
