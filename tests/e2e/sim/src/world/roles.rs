//! The operator: handovers, failovers, and what a new primary must hold.
//!
//! Invariant: a handover loses nothing; a failover takes over exactly a state that the old primary once had.

use super::{Handover, Order, World};
use mars_engine::api::{Answer, Command, CommandId, DataState, Io, IoResult, Reply, Role};
use mars_engine::lineage::Cause;
use mars_engine::replication::histories::{Relation, relate};
use mars_engine::testing::{Crash, Load};
use mars_engine::types::{ByteRange, Designation, Position};

impl World {
    pub(super) fn begin_handover(&mut self) {
        let (from, to) = (self.designated, self.any());
        let busy = self.handover.is_some() || !self.orders.is_empty() || self.has_forked(to, from);
        let fit =
            self.nodes[to].data() == Some(DataState::Consistent) && self.nodes[to].role() == Some(Role::Secondary);
        if busy || from == to || self.nodes[from].role() != Some(Role::Primary) || !fit {
            return;
        }
        let designation = self.new_designation(to);
        self.handover = Some(Handover {
            from,
            to,
            designation,
            end: None,
            promoting: false,
        });
        let successor = Some(self.ids[to]);
        let id = self.nodes[from].rig.order(Command::Close {
            designation,
            to: successor,
        });
        self.orders.insert((from, id), Order::Close);
    }

    /// Whether `at` could not simply go on with the history of `leader`: the operator refuses a handover to it.
    fn has_forked(&self, at: usize, leader: usize) -> bool {
        if !self.nodes[at].is_up() || !self.nodes[leader].is_up() {
            return true;
        }
        let (ours, theirs) = (
            self.nodes[at].rig.owner().status(),
            self.nodes[leader].rig.owner().status(),
        );
        let relation = relate((&ours.lineage, ours.durable), (&theirs.lineage, theirs.durable));
        !matches!(relation, Relation::Same | Relation::Behind { .. })
    }

    /// Reads the whole device; `None` when the machine dies over it.
    pub(super) fn read_device(&mut self, at: usize) -> Option<Vec<u8>> {
        let rig = &mut self.nodes[at].rig;
        let len = rig.is_up().then(|| rig.owner().status().size_bytes)?;
        match rig.io(Io::Read {
            range: ByteRange { offset: 0, len },
        })? {
            IoResult::Data(bytes) => Some(bytes.to_vec()),
            other => panic!("reading the device of node {at}: {other:?}"),
        }
    }

    pub(super) fn drive_handover(&mut self) {
        if let Some(handover) = self.handover
            && self.nodes[handover.from].rig.is_up()
        {
            self.released_in_a_crash(handover.from);
        }
        let Some(handover) = self.handover else { return };
        let Some(end) = handover.end else { return };
        let to = &self.nodes[handover.to];
        if !to.is_up() {
            self.handover.as_mut().expect("checked").promoting = false;
            return;
        }
        let status = to.rig.owner().status();
        if self.has_forked(handover.to, handover.from) && self.nodes[handover.from].role() == Some(Role::Secondary) {
            // It had bytes of a rival under way when it was chosen: an acknowledged failover gives the role back.
            self.handover = None;
            let designation = self.new_designation(handover.from);
            self.promote(handover.from, designation, Cause::Failover);
            return;
        }
        if !handover.promoting && status.role == Role::Secondary && status.durable == end {
            self.handover.as_mut().expect("checked").promoting = true;
            self.promote(handover.to, handover.designation, Cause::Handover);
        }
    }

    pub(super) fn promote(&mut self, at: usize, designation: Designation, cause: Cause) {
        if cause == Cause::Failover {
            // Whoever takes over by force begins anew: an epoch of an earlier stay does not count.
            self.epoch = None;
        }
        let id = self.nodes[at].rig.order(Command::Promote { designation, cause });
        self.orders.insert((at, id), Order::Promote { designation, cause });
    }

    /// An acknowledged failover: to any consistent replica, whatever the others do.
    pub(super) fn fail_over(&mut self) {
        let at = self.any();
        let fit =
            self.nodes[at].data() == Some(DataState::Consistent) && self.nodes[at].role() == Some(Role::Secondary);
        let resumes = self.nodes[at].is_up() && self.nodes[at].rig.owner().status().resumable.is_some();
        if !fit || resumes || self.orders.keys().any(|(node, _)| *node == at) {
            return;
        }
        self.handover = None;
        let designation = self.new_designation(at);
        self.promote(at, designation, Cause::Failover);
    }

    pub(super) fn collect(&mut self) {
        let waiting: Vec<(usize, CommandId)> = self.orders.keys().copied().collect();
        for (at, id) in waiting {
            let Some(reply) = self.nodes[at].rig.reply(id) else {
                continue;
            };
            let order = self.orders.remove(&(at, id)).expect("it was listed");
            self.on_reply(at, order, reply);
        }
    }

    fn on_reply(&mut self, at: usize, order: Order, reply: Reply) {
        match (order, reply) {
            (Order::Close, Ok(Answer::At(end))) => {
                if let Some(handover) = self.handover.as_mut().filter(|handover| handover.from == at) {
                    handover.end = Some(end);
                }
            }
            (Order::Close, refused) => {
                // Nothing was closed: the operator gives the role back.
                assert!(refused.is_err(), "a close answers with its end");
                if self.handover.is_some_and(|handover| handover.from == at) {
                    self.handover = None;
                    self.designated = at;
                }
            }
            (Order::Promote { designation, cause }, Ok(_)) => self.promoted(at, designation, cause),
            (Order::Promote { .. }, Err(_)) => {
                if let Some(handover) = self.handover.as_mut().filter(|handover| handover.to == at) {
                    handover.promoting = false;
                }
            }
            (Order::Resume { crash }, Ok(_)) => self.resumed(at, crash),
            (Order::Resume { .. }, Err(refusal)) => panic!("node {at} may resume and does not: {refusal}"),
        }
    }

    /// A new primary: what does it hold?
    fn promoted(&mut self, at: usize, designation: Designation, cause: Cause) {
        let Some(content) = self.read_device(at) else { return };
        self.crashed.remove(&at);
        for other in 0..self.nodes.len() {
            self.learn(other);
        }
        if cause != Cause::Create {
            // The new epoch itself is not durable yet, and so not in the published history.
            let status = self.nodes[at].rig.owner().status();
            let end = status.appended;
            let lineage = status.lineage.clone();
            let epoch = lineage.0.last().expect("a primary has a history").id;
            let expected = self.oracle.content_at(&lineage, Position { epoch, ..end });
            assert!(
                content == expected,
                "node {at} opened at {end} ({cause:?}) with another content"
            );
        }
        match cause {
            Cause::Handover => {
                let handover = self.handover.filter(|handover| handover.designation == designation);
                let predecessor = handover.and_then(|handover| self.nodes[handover.from].load.take());
                if let Some(mut load) = predecessor {
                    let from = handover.expect("it was just looked at").from;
                    load.collect(&mut self.nodes[from].rig);
                    load.judge(&content, Crash::Process);
                }
                self.handover = None;
                self.report.handovers += 1;
            }
            Cause::Failover => self.report.failovers += 1,
            Cause::Create | Cause::Recovery | Cause::EmergencyExit => {}
        }
        self.nodes[at].load = Some(Load::with_content(content));
    }
}
