//! Administrators, and the end of a run: whatever broke is mended until all replicas are equal.
//!
//! Invariant: nothing is mended here that an administrator or the operator could not mend in the field.

use super::World;
use crate::node::{self, Node};
use mars_engine::api::{Command, DataState, Role, Switches};
use mars_engine::lineage::Cause;
use mars_engine::replication::histories::{Relation, relate};
use mars_engine::types::Position;

/// Most rounds of healing at the end.
const PATIENCE: u32 = 6_000;

impl World {
    /// An administrator looks after a node: an old primary steps down, a replica that cannot go on is invalidated.
    pub(super) fn repair(&mut self) {
        let at = self.any();
        self.repair_node(at);
    }

    fn repair_node(&mut self, at: usize) {
        if !self.nodes[at].is_up() || at == self.designated || self.handover.is_some() || !self.orders.is_empty() {
            return;
        }
        let leader = self.designated;
        if self.nodes[leader].role() != Some(Role::Primary) {
            return;
        }
        let (ours, theirs) = (
            self.nodes[at].rig.owner().status().clone(),
            self.nodes[leader].rig.owner().status().clone(),
        );
        if ours.role == Role::Primary || ours.resumable.is_some() {
            self.nodes[at].load = None;
            let designation = self.designation;
            self.nodes[at].rig.order(Command::StepDown { designation });
            return;
        }
        let relation = relate((&ours.lineage, ours.durable), (&theirs.lineage, theirs.durable));
        let lost = matches!(
            relation,
            Relation::Fork(_) | Relation::Ahead { .. } | Relation::Differs { .. }
        );
        let blank = ours.lineage.0.is_empty();
        if ours.role == Role::Secondary && !blank && (lost || ours.durable.lsn < theirs.log_start) {
            self.report.invalidations += 1;
            self.nodes[at].rig.order(Command::Invalidate);
        }
    }

    /// Everything comes back, and all replicas become equal.
    pub(super) fn heal(&mut self) {
        self.links.clear();
        for round in 0..PATIENCE {
            for at in 0..self.nodes.len() {
                self.heal_node(at, round);
                self.learn(at);
            }
            self.pass_time();
            self.collect();
            self.drive_handover();
            self.note_deaths();
            (0..self.nodes.len()).for_each(|at| self.learn(at));
            if round % 64 == 63 && self.is_whole() {
                self.check();
                return;
            }
        }
        panic!("the replicas do not become equal:\n{}", self.summary());
    }

    /// The state of everything, for a failure.
    fn summary(&self) -> String {
        let node = |(at, node): (usize, &Node)| {
            if !node.is_up() {
                return format!("{at}: down\n");
            }
            let status = node.rig.owner().status();
            format!(
                "{at}: {:?} {:?} designation {} durable {} applied {} dirty to {} log from {} resumable {} released {} faults {:?}\n",
                status.role,
                status.data,
                status.designation.number,
                status.durable,
                status.applied.lsn,
                status.dirty_end,
                status.log_start,
                status.resumable.is_some(),
                status.released.is_some(),
                status.faults,
            )
        };
        let nodes: String = self.nodes.iter().enumerate().map(node).collect();
        format!(
            "designation {} names {}, handover {:?}, orders {:?}\n{nodes}",
            self.designation.number, self.designated, self.handover, self.orders
        )
    }

    fn heal_node(&mut self, at: usize, round: u32) {
        if round == 0 {
            self.nodes[at].rig.order(Command::SetSwitches(Switches::default()));
        }
        if !self.nodes[at].is_up() {
            self.start(at);
            self.nodes[at].rig.order(Command::SetSwitches(Switches::default()));
        }
        for job in 0..100 {
            if !self.nodes[at].rig.run_one_job() {
                break;
            }
            // What it has made durable may be retired by the next job.
            if job % 8 == 0 {
                self.learn(at);
            }
        }
        for other in 0..self.nodes.len() {
            if other != at && round.is_multiple_of(4) {
                node::gossip(&mut self.nodes, &self.ids, other, at);
            }
        }
        self.set_wish(at);
        node::step_fetch(&mut self.nodes, &self.ids, at, &|_, _| true);
        node::step_copy(&mut self.nodes, &self.ids, at, &|_, _| true);
        if round % 16 == 15 {
            self.repair_node(at);
            self.lead_again(at);
        }
    }

    /// Nobody leads and nobody is about to: the replica with most durable log takes over.
    fn lead_again(&mut self, at: usize) {
        let leaders = |node: &Node| matches!(node.role(), Some(Role::Primary | Role::Promoting | Role::Closing));
        let designated_leads = leaders(&self.nodes[self.designated]);
        if designated_leads || self.handover.is_some() || !self.orders.is_empty() {
            return;
        }
        let durable = |node: &Node| node.rig.owner().status().durable.lsn;
        let most = self
            .nodes
            .iter()
            .filter(|node| node.data() == Some(DataState::Consistent) && node.role() == Some(Role::Secondary))
            .map(durable)
            .max();
        let node = &self.nodes[at];
        if node.data() == Some(DataState::Consistent)
            && Some(durable(node)) == most
            && node.role() == Some(Role::Secondary)
        {
            let designation = self.new_designation(at);
            self.promote(at, designation, Cause::Failover);
        }
    }

    fn is_whole(&self) -> bool {
        let leader = &self.nodes[self.designated];
        if self.handover.is_some() || !self.orders.is_empty() || leader.role() != Some(Role::Primary) {
            return false;
        }
        let end = leader.rig.owner().status().appended;
        self.nodes.iter().all(|node| {
            node.is_up() && {
                let status = node.rig.owner().status();
                let at_end = |position: Position| (position.lsn, position.chain) == (end.lsn, end.chain);
                let equal = status.durable == end && at_end(status.applied) && status.dirty_end.lsn == end.lsn;
                equal && status.data == DataState::Consistent
            }
        })
    }
}
