//! Machines that die and come back.
//!
//! Invariant: what a machine comes back with is judged by the worst that has happened to it since it was last looked at.

use super::{Order, World};
use mars_engine::api::{Command, DataState};
use mars_engine::store_sim::Survival;
use mars_engine::testing::{Crash, Load};
use rand::Rng as _;

impl World {
    pub(super) fn crash_somebody(&mut self) {
        let at = self.any();
        if !self.nodes[at].is_up() {
            return;
        }
        self.learn(at);
        if self.rng.random_bool(0.3) {
            // In the middle of something, a few I/Os from now.
            let io = self.nodes[at].rig.store.io_count() + self.rng.random_range(1..12);
            self.nodes[at].rig.store.crash_at_io(io);
            return;
        }
        self.die(at);
    }

    fn die(&mut self, at: usize) {
        let crash = if self.rng.random_bool(0.5) {
            self.report.kills += 1;
            self.nodes[at].rig.kill();
            Crash::Process
        } else {
            let survival = match self.rng.random_range(0..4) {
                0 => Survival::OnlySynced,
                1 => Survival::Everything,
                2 => Survival::Some,
                _ => Survival::Torn,
            };
            self.report.power_losses += 1;
            self.nodes[at].rig.power_loss(survival);
            Crash::Power
        };
        let worst = match self.crashed.get(&at) {
            Some(Crash::Power) => Crash::Power,
            _ => crash,
        };
        self.crashed.insert(at, worst);
        self.orders.retain(|(node, _), _| *node != at);
        self.nodes[at].forget_sessions();
        for other in 0..self.nodes.len() {
            self.nodes[other].disconnect(at);
        }
    }

    /// A machine that died at an I/O of its own.
    pub(super) fn note_deaths(&mut self) {
        for at in 0..self.nodes.len() {
            if self.nodes[at].rig.store.is_dead() {
                self.die(at);
            }
        }
    }

    pub(super) fn start_somebody(&mut self) {
        let down: Vec<usize> = (0..self.nodes.len()).filter(|at| !self.nodes[*at].is_up()).collect();
        if !down.is_empty() {
            let at = down[self.rng.random_range(0..down.len())];
            self.start(at);
        }
    }

    pub(super) fn start(&mut self, at: usize) {
        if let Err(error) = self.nodes[at].rig.open() {
            assert!(
                self.nodes[at].rig.store.is_dead(),
                "node {at} does not start again: {error}"
            );
            return;
        }
        self.set_members(at);
        let status = self.nodes[at].rig.owner().status();
        assert_ne!(status.data, DataState::LogLost, "node {at} lost log that was durable");
        let Some(resumable) = status.resumable else {
            return;
        };
        // The agent's rule (P9): only when nobody is designated anew.
        let newest = self.designated == at && self.handover.is_none();
        let aborted = self
            .handover
            .is_some_and(|handover| handover.from == at && handover.end.is_none());
        if newest || aborted {
            if aborted {
                self.handover = None;
                self.designated = at;
            }
            let crash = self.crashed.get(&at).copied().unwrap_or(Crash::Process);
            let id = self.nodes[at].rig.order(Command::Resume {
                designation: resumable.designation,
            });
            self.orders.insert((at, id), Order::Resume { crash });
        } else {
            self.nodes[at].load = None;
            let designation = self.designation;
            self.nodes[at].rig.order(Command::StepDown { designation });
        }
    }

    /// A node that closed, and died before it could say so, says so once that is durable.
    pub(super) fn released_in_a_crash(&mut self, at: usize) {
        let released = self.nodes[at].rig.owner().status().released;
        if let (Some(handover), Some(released)) = (&mut self.handover, released)
            && handover.from == at
            && handover.end.is_none()
            && released.designation == handover.designation
        {
            handover.end = Some(released.end);
        }
    }

    pub(super) fn resumed(&mut self, at: usize, crash: Crash) {
        let Some(content) = self.read_device(at) else { return };
        self.crashed.remove(&at);
        match &mut self.nodes[at].load {
            Some(load) => {
                load.judge(&content, crash);
            }
            None => self.nodes[at].load = Some(Load::with_content(content)),
        }
    }
}
