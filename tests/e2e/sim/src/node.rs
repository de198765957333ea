//! One simulated machine: a replica, the fetch it has open, the copy it takes.
//!
//! Invariant: everything decided here is decided by the engine's own protocol code; this file only carries messages, and may lose
//! any of them by dropping a session.

use mars_engine::api::{Command, CommandId, DataState, Reply, Role};
use mars_engine::log::serve::SegmentLog;
use mars_engine::replication::digest::{block_digests, differing_runs, region_digests};
use mars_engine::replication::fetch::{self, Decision, FetchSession, Member, Wish};
use mars_engine::replication::messages::{FetchOpen, PeerStatus, SyncEnd, SyncOffer};
use mars_engine::replication::source::SourceStream;
use mars_engine::replication::sync::{self, Step, SyncNeed, SyncTarget, writes_of};
use mars_engine::store::{FileId, Store};
use mars_engine::store_sim::SimStore;
use mars_engine::testing::{Load, Rig};
use mars_engine::types::ReplicaId;
use std::collections::BTreeMap;

/// Commands of a copy that wait for their reply, by what they complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Awaited {
    Begin,
    Write(sync::TaskId),
    Checkpoint(u64),
    Finish,
}

#[derive(Debug)]
struct Fetch {
    from: usize,
    session: FetchSession,
    stream: SourceStream<SegmentLog<SimStore>>,
    /// The reply to the item handed in last has not come yet: nothing more is taken (back-pressure).
    waits_for: Option<CommandId>,
}

#[derive(Debug)]
struct Copy {
    from: usize,
    /// `None` until the owner has begun.
    target: Option<SyncTarget>,
    total_bytes: u64,
    awaited: BTreeMap<CommandId, Awaited>,
    /// Writes that a transfer still waits for.
    open_writes: BTreeMap<sync::TaskId, usize>,
}

/// See the module.
#[derive(Debug)]
pub struct Node {
    /// Its replica.
    pub id: ReplicaId,
    /// The engine on its machine.
    pub rig: Rig,
    /// The user of its device, while it is primary.
    pub load: Option<Load>,
    /// What its agent wants of the protocol.
    pub wish: Wish,
    /// What others last told.
    pub heard: BTreeMap<usize, PeerStatus>,
    fetch: Option<Fetch>,
    copy: Option<Copy>,
}

impl Node {
    /// A machine with an opened replica.
    #[must_use]
    pub fn new(id: ReplicaId, rig: Rig) -> Self {
        Self {
            id,
            rig,
            load: None,
            wish: Wish::default(),
            heard: BTreeMap::new(),
            fetch: None,
            copy: None,
        }
    }

    /// Whether its process runs.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.rig.is_up()
    }

    /// Its role, while it runs.
    #[must_use]
    pub fn role(&self) -> Option<Role> {
        self.is_up().then(|| self.rig.owner().status().role)
    }

    /// The state of its data, while it runs.
    #[must_use]
    pub fn data(&self) -> Option<DataState> {
        self.is_up().then(|| self.rig.owner().status().data.clone())
    }

    /// The process ended: sessions end with it.
    pub fn forget_sessions(&mut self) {
        self.fetch = None;
        self.copy = None;
        self.heard.clear();
    }

    /// Connections to `peer` broke.
    pub fn disconnect(&mut self, peer: usize) {
        if self.fetch.as_ref().is_some_and(|fetch| fetch.from == peer) {
            self.fetch = None;
        }
        if self.copy.as_ref().is_some_and(|copy| copy.from == peer) {
            self.copy = None;
        }
    }

    /// What it tells others about itself.
    #[must_use]
    pub fn tells(&self) -> PeerStatus {
        PeerStatus::of(self.rig.owner().status(), None)
    }

    fn members(&self, ids: &[ReplicaId], reachable: impl Fn(usize) -> bool) -> Vec<Member> {
        let member = |(index, id): (usize, &ReplicaId)| Member {
            replica: *id,
            reachable: reachable(index),
            avoid: false,
            status: self.heard.get(&index).cloned(),
        };
        let others = ids.iter().enumerate().filter(|(_, id)| **id != self.id);
        others.map(member).collect()
    }
}

/// Moves the log transfer of node `at` by one item.
///
/// # Panics
/// When the protocol breaks its own contract.
pub fn step_fetch(nodes: &mut [Node], ids: &[ReplicaId], at: usize, connected: &dyn Fn(usize, usize) -> bool) {
    if !nodes[at].is_up() {
        return;
    }
    if let Some(fetch) = &mut nodes[at].fetch
        && let Some(id) = fetch.waits_for
    {
        match nodes[at].rig.reply(id) {
            None => return,
            Some(Ok(_)) => nodes[at].fetch.as_mut().expect("it is there").waits_for = None,
            Some(Err(_)) => nodes[at].fetch = None,
        }
    }
    let reachable = |peer: usize| connected(at, peer);
    let members = nodes[at].members(ids, reachable);
    let status = nodes[at].rig.owner().status().clone();
    let decision = fetch::decide(&status, &nodes[at].wish, &members);
    let Decision::Fetch(plan) = decision else {
        nodes[at].fetch = None;
        return;
    };
    let from = ids
        .iter()
        .position(|id| *id == plan.source)
        .expect("a source is a member");
    if nodes[at].fetch.as_ref().is_none_or(|fetch| fetch.from != from) {
        nodes[at].fetch = None;
        if status.appended != status.durable || !nodes[from].is_up() {
            return;
        }
        let open = FetchOpen {
            from: status.durable,
            lineage: status.lineage.clone(),
            until: plan.until,
            compression: mars_engine::api::Compression::None,
        };
        let source = nodes[from].rig.owner();
        let Ok((stream, proof)) = SourceStream::open(SegmentLog::new(source.store().clone()), source.log_view(), open)
        else {
            return;
        };
        let mut session = FetchSession::new(plan, status.durable);
        session
            .on_item(proof)
            .expect("the first item is the proof that was asked for");
        nodes[at].fetch = Some(Fetch {
            from,
            session,
            stream,
            waits_for: None,
        });
        return;
    }
    take_item(nodes, at, from);
}

fn take_item(nodes: &mut [Node], at: usize, from: usize) {
    if !nodes[from].is_up() {
        nodes[at].fetch = None;
        return;
    }
    let view = nodes[from].rig.owner().log_view().clone();
    let fetch = nodes[at].fetch.as_mut().expect("a session is open");
    let command = match fetch.stream.next(&view) {
        Ok(None) => return,
        Ok(Some(item)) => fetch.session.on_item(item),
        Err(_) => {
            nodes[at].fetch = None;
            return;
        }
    };
    match command {
        Ok(Some(command)) => {
            let id = nodes[at].rig.order(command);
            nodes[at].fetch.as_mut().expect("a session is open").waits_for = Some(id);
        }
        Ok(None) => {}
        Err(_) => nodes[at].fetch = None,
    }
}

/// Moves the copy of node `at` by one step.
///
/// # Panics
/// When the protocol breaks its own contract.
pub fn step_copy(nodes: &mut [Node], ids: &[ReplicaId], at: usize, connected: &dyn Fn(usize, usize) -> bool) {
    if !nodes[at].is_up() {
        return;
    }
    collect_replies(&mut nodes[at]);
    let reachable = |peer: usize| connected(at, peer);
    let members = nodes[at].members(ids, reachable);
    let status = nodes[at].rig.owner().status().clone();
    let stuck = matches!(fetch::decide(&status, &nodes[at].wish, &members), Decision::Stop(_));
    let SyncNeed::From(source) = sync::sync_need(&status, &nodes[at].wish, &members, stuck) else {
        nodes[at].copy = None;
        return;
    };
    let from = ids.iter().position(|id| *id == source).expect("a source is a member");
    if !nodes[from].is_up() {
        nodes[at].copy = None;
        return;
    }
    match &nodes[at].copy {
        Some(copy) if copy.from == from => copy_more(nodes, at, from),
        _ => open_copy(nodes, ids, at, from),
    }
}

fn open_copy(nodes: &mut [Node], ids: &[ReplicaId], at: usize, from: usize) {
    let source = nodes[from].rig.owner().status();
    if source.data != DataState::Consistent || source.lineage.0.is_empty() {
        return;
    }
    let offer = SyncOffer {
        session: 1,
        applied: source.applied,
        lineage: source.lineage.clone(),
        durable: source.durable,
        log_start: source.log_start,
        size_bytes: source.size_bytes,
    };
    // The offer pins the log: as if the target had reported this position.
    nodes[from].rig.order(Command::PeerReport {
        peer: ids[at],
        durable: offer.applied,
    });
    let id = nodes[at].rig.order(sync::begin(ids[from], &offer));
    let awaited = BTreeMap::from([(id, Awaited::Begin)]);
    nodes[at].fetch = None;
    nodes[at].copy = Some(Copy {
        from,
        target: None,
        total_bytes: offer.size_bytes,
        awaited,
        open_writes: BTreeMap::new(),
    });
}

/// Takes the replies that have come; a refusal ends the session.
fn collect_replies(node: &mut Node) {
    let Some(copy) = &mut node.copy else { return };
    let ids: Vec<CommandId> = copy.awaited.keys().copied().collect();
    for id in ids {
        let Some(reply) = node.rig.reply(id) else { continue };
        let copy = node.copy.as_mut().expect("checked above");
        let what = copy.awaited.remove(&id).expect("it was listed");
        if !apply_reply(copy, what, &reply) {
            node.copy = None;
            return;
        }
    }
    let copy = node.copy.as_mut().expect("checked above");
    if copy.target.is_none() && copy.awaited.is_empty() {
        match sync::resume_point(node.rig.owner().status()) {
            Some(from) => copy.target = Some(SyncTarget::new(copy.total_bytes, from)),
            None => node.copy = None,
        }
    }
}

fn apply_reply(copy: &mut Copy, what: Awaited, reply: &Reply) -> bool {
    if reply.is_err() {
        return false;
    }
    match (what, &mut copy.target) {
        (Awaited::Begin, _) => {}
        (Awaited::Finish, _) => return false,
        (Awaited::Write(task), Some(target)) => {
            let open = copy
                .open_writes
                .get_mut(&task)
                .expect("a write belongs to an open task");
            *open -= 1;
            if *open == 0 {
                copy.open_writes.remove(&task);
                target.on_done(task);
            }
        }
        (Awaited::Checkpoint(done), Some(target)) => target.on_checkpoint(done),
        (Awaited::Write(_) | Awaited::Checkpoint(_), None) => unreachable!("only a begun copy writes"),
    }
    true
}

fn copy_more(nodes: &mut [Node], at: usize, from: usize) {
    let consistent = nodes[from].data() == Some(DataState::Consistent);
    let Some(target) = nodes[at].copy.as_mut().and_then(|copy| copy.target.as_mut()) else {
        return;
    };
    let Some(step) = target.next_step() else { return };
    if !consistent || do_step(nodes, at, from, step).is_err() {
        nodes[at].copy = None;
    }
}

fn do_step(nodes: &mut [Node], at: usize, from: usize, step: Step) -> Result<(), ()> {
    let source = nodes[from].rig.store.open(&FileId::Data).map_err(drop)?;
    let local = nodes[at].rig.store.open(&FileId::Data).map_err(drop)?;
    match step {
        Step::Compare { task, span } => {
            let remote = region_digests(&source, span).map_err(drop)?;
            let ours = region_digests(&local, span).map_err(drop)?;
            let target = nodes[at].copy.as_mut().and_then(|copy| copy.target.as_mut());
            target
                .expect("a copy is under way")
                .on_digests(task, &remote, &ours)
                .map_err(drop)
        }
        Step::Transfer { task, regions } => {
            let mut commands = Vec::new();
            for (region, has_data) in &regions {
                let have = if *has_data {
                    block_digests(&local, *region).map_err(drop)?
                } else {
                    Vec::new()
                };
                let runs = differing_runs(&source, *region, &have).map_err(drop)?;
                commands.extend(writes_of(&regions, runs).map_err(drop)?);
            }
            order_writes(&mut nodes[at], task, commands);
            Ok(())
        }
        Step::Zero { task, range } => {
            order_writes(&mut nodes[at], task, vec![Command::SyncWrite { range, data: None }]);
            Ok(())
        }
        Step::Checkpoint { done_bytes } => {
            order(
                &mut nodes[at],
                Command::SyncCheckpoint { done_bytes },
                Awaited::Checkpoint(done_bytes),
            );
            Ok(())
        }
        Step::End => {
            let status = nodes[from].rig.owner().status();
            let end = SyncEnd {
                dirty_end: status.dirty_end,
                size_bytes: status.size_bytes,
            };
            let target = nodes[at].copy.as_mut().and_then(|copy| copy.target.as_mut());
            target.expect("a copy is under way").on_end(end);
            Ok(())
        }
        Step::Finish(command) => {
            order(&mut nodes[at], command, Awaited::Finish);
            Ok(())
        }
    }
}

fn order(node: &mut Node, command: Command, awaited: Awaited) {
    let id = node.rig.order(command);
    let copy = node.copy.as_mut().expect("a copy is under way");
    copy.awaited.insert(id, awaited);
}

fn order_writes(node: &mut Node, task: sync::TaskId, commands: Vec<Command>) {
    let copy = node.copy.as_mut().expect("a copy is under way");
    if commands.is_empty() {
        copy.target.as_mut().expect("a copy has begun").on_done(task);
        return;
    }
    copy.open_writes.insert(task, commands.len());
    for command in commands {
        order(node, command, Awaited::Write(task));
    }
}

/// Node `to` hears what `from` tells, and `from`'s log may go as far as others have it.
///
/// # Panics
/// When the clocks of the two are months apart.
pub fn gossip(nodes: &mut [Node], ids: &[ReplicaId], from: usize, to: usize) {
    if !nodes[from].is_up() || !nodes[to].is_up() {
        return;
    }
    // A message carries a stamp, and what its receiver records afterwards comes later.
    let stamp = nodes[from].rig.clock.stamp(nodes[from].rig.now.wall_ns);
    let wall_ns = nodes[to].rig.now.wall_ns;
    let seen = nodes[to].rig.clock.see(stamp, wall_ns);
    seen.expect("simulated clocks are hours apart, not months");
    let told = nodes[from].tells();
    let (peer, durable) = (ids[from], told.durable);
    nodes[to].heard.insert(from, told);
    nodes[to].rig.order(Command::PeerReport { peer, durable });
}
