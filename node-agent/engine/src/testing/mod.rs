//! Drives an [`Owner`] on a simulated machine: jobs in random order, virtual time, crashes, all from one seed.
//!
//! For tests of this crate and for the simulator. Invariant: the same seed and the same calls give the same run.

mod load;

pub use load::{Crash, Load};

use crate::api::{
    Action, Command, CommandId, Compression, Durability, Event, Io, IoResult, JobId, Now, ReplicaStatus, Reply,
    Submitted, Tuning,
};
use crate::clock::LamportClock;
use crate::jobs::{Job, run_job};
use crate::owner::{OpenError, OpenParams, Owner};
use crate::store_sim::{SimFile, SimStore, Survival};
use crate::types::{ByteRange, ClusterId, Lsn, ReplicaId, ResourceId};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::time::Duration;
use uuid::Uuid;

/// Most steps until something awaited must have come: more means that nothing moves any more.
const PATIENCE: u32 = 200_000;

/// A request that was answered later or not yet.
pub type Tag = u64;

/// One replica on its own simulated machine, with whatever runs its jobs.
#[derive(Debug)]
pub struct Rig {
    /// The machine.
    pub store: SimStore,
    /// How it is opened the next time.
    pub params: OpenParams,
    /// The present moment.
    pub now: Now,
    /// The clock of the running process, for messages and records.
    pub clock: LamportClock,
    /// The status that was announced last: what everybody outside knows.
    announced: Option<ReplicaStatus>,
    /// The durable end that was announced when a request was answered later.
    announced_at: BTreeMap<Tag, Lsn>,
    owner: Option<Owner<SimStore>>,
    rng: StdRng,
    jobs: Vec<(JobId, Job<SimFile>)>,
    replies: BTreeMap<CommandId, Reply>,
    completions: BTreeMap<Tag, IoResult>,
    next_id: u64,
    /// Jobs of these kinds are kept back until this is cleared.
    pub hold: fn(&Job<SimFile>) -> bool,
    /// Looks at every job just before it is run.
    pub watch: fn(&Rig, &Job<SimFile>),
    /// The driver is busy with something else: it hands things in and looks for actions later.
    pub busy: bool,
}

/// Parameters of a replica: small segments and a small budget, so that everything happens often.
#[must_use]
pub fn small_params(replica: u128, seed: u64) -> OpenParams {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    bytes[8..24].copy_from_slice(&replica.to_le_bytes());
    OpenParams {
        cluster: ClusterId(Uuid::from_u128(1)),
        resource: ResourceId(Uuid::from_u128(2)),
        replica: ReplicaId(Uuid::from_u128(replica << 96 | replica)),
        boot_id: Uuid::from_u128(100),
        create: None,
        tuning: Tuning {
            durability: Durability::OnFlush,
            compression: Compression::None,
            overlay_budget_bytes: 256 << 10,
            segment_bytes: 128 << 10,
            retention_bytes: 0,
        },
        seed: bytes,
    }
}

impl Rig {
    /// A new replica on a new machine with a zeroed data disk.
    ///
    /// # Panics
    /// When it cannot be opened: a mistake in the test.
    #[must_use]
    pub fn create(replica: u128, seed: u64, data_bytes: u64) -> Self {
        Self::create_with(small_params(replica, seed), seed, data_bytes)
    }

    /// A new replica with these parameters.
    ///
    /// # Panics
    /// When it cannot be opened: a mistake in the test.
    #[must_use]
    pub fn create_with(mut params: OpenParams, seed: u64, data_bytes: u64) -> Self {
        let store = SimStore::new(seed, data_bytes, 64 << 20);
        params.create = Some(data_bytes);
        let mut rig = Self::on(store, params, seed);
        rig.open().expect("a new replica opens");
        rig
    }

    /// A machine on which nothing runs yet.
    #[must_use]
    pub fn on(store: SimStore, params: OpenParams, seed: u64) -> Self {
        Rig {
            store,
            params,
            now: Now {
                mono: Duration::from_secs(1),
                wall_ns: 1_700_000_000_000_000_000,
            },
            clock: LamportClock::default(),
            announced: None,
            announced_at: BTreeMap::new(),
            owner: None,
            rng: StdRng::seed_from_u64(seed ^ 0x5eed),
            jobs: Vec::new(),
            replies: BTreeMap::new(),
            completions: BTreeMap::new(),
            next_id: 1,
            hold: |_| false,
            watch: |_, _| {},
            busy: false,
        }
    }

    /// Starts the process: opens the replica. Later openings are of a known replica.
    ///
    /// # Errors
    /// What `Owner::open` says.
    pub fn open(&mut self) -> Result<(), OpenError> {
        let mut owner = Owner::open(self.store.clone(), self.params, self.now)?;
        self.clock = LamportClock::default();
        owner.share_clock(&self.clock, self.now);
        self.params.create = None;
        self.params.seed[31] = self.params.seed[31].wrapping_add(1);
        self.owner = Some(owner);
        self.collect();
        Ok(())
    }

    /// Whether a process runs, and the machine under it is alive.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.owner.is_some() && !self.store.is_dead()
    }

    /// The owner.
    ///
    /// # Panics
    /// When no process runs.
    #[must_use]
    pub fn owner(&self) -> &Owner<SimStore> {
        self.owner.as_ref().expect("a process runs")
    }

    /// The process dies (and starts anew with `open`): what it wrote to files stays.
    pub fn kill(&mut self) {
        self.store.crash_process();
        self.forget();
        self.store = self.store.restart();
    }

    /// The power fails; a new boot id.
    pub fn power_loss(&mut self, survival: Survival) {
        self.store.power_loss(survival);
        self.forget();
        self.store = self.store.restart();
        self.params.boot_id = Uuid::from_u128(self.params.boot_id.as_u128() + 1);
    }

    fn forget(&mut self) {
        self.owner = None;
        self.jobs.clear();
        self.replies.clear();
        self.completions.clear();
        self.announced = None;
        self.announced_at.clear();
        self.store.never_crash();
    }

    /// Virtual time passes; timers that are due fire.
    pub fn advance(&mut self, by: Duration) {
        self.now.mono += by;
        self.now.wall_ns += u64::try_from(by.as_nanos()).unwrap_or(0);
        let now = self.now;
        if let Some(owner) = &mut self.owner
            && owner.next_deadline().is_some_and(|deadline| deadline <= now.mono)
        {
            owner.handle(now, Event::Tick);
        }
        self.collect();
    }

    /// Runs one random pending job; `false` when none is pending.
    pub fn run_one_job(&mut self) -> bool {
        let hold = self.hold;
        let ready: Vec<usize> = (0..self.jobs.len())
            .filter(|&index| !hold(&self.jobs[index].1))
            .collect();
        if ready.is_empty() || !self.is_up() {
            return false;
        }
        let (id, job) = self.jobs.swap_remove(ready[self.rng.random_range(0..ready.len())]);
        (self.watch)(self, &job);
        let outcome = run_job(&self.store, job);
        if self.is_up() {
            let now = self.now;
            if let Some(owner) = &mut self.owner {
                owner.handle(now, Event::JobDone(id, outcome));
            }
            self.collect();
        }
        true
    }

    /// Runs a job, or lets time pass up to the next timer; `false` when neither is there.
    pub fn step(&mut self) -> bool {
        if self.run_one_job() {
            return true;
        }
        let Some(deadline) = self
            .owner
            .as_ref()
            .and_then(Owner::next_deadline)
            .filter(|_| self.is_up())
        else {
            return false;
        };
        self.advance(deadline.saturating_sub(self.now.mono));
        true
    }

    /// Runs everything until nothing is left to do now or later.
    ///
    /// # Panics
    /// When that never happens.
    pub fn settle(&mut self) {
        for _ in 0..PATIENCE {
            if !self.step() {
                return;
            }
        }
        panic!("never settles: {:?}", self.owner.as_ref().map(Owner::status));
    }

    /// Runs everything until nothing is left to do, or the machine dies.
    pub fn settle_if_up(&mut self) {
        while self.is_up() && self.step() {}
    }

    /// Runs everything until `done` holds; `false` when nothing moves any more (or the machine died) before that.
    ///
    /// # Panics
    /// When it goes on for ever.
    pub fn run_until(&mut self, done: impl Fn(&Rig) -> bool) -> bool {
        for _ in 0..PATIENCE {
            if !self.is_up() {
                return false;
            }
            if done(self) {
                return true;
            }
            if !self.step() {
                return done(self);
            }
        }
        panic!("waits for ever: {:?}", self.owner.as_ref().map(Owner::status));
    }

    /// Gives an order; the answer comes through [`Rig::reply`].
    pub fn order(&mut self, command: Command) -> CommandId {
        let id = self.id();
        let now = self.now;
        if let Some(owner) = self.owner.as_mut().filter(|_| !self.store.is_dead()) {
            owner.command(now, id, command);
        }
        self.collect();
        id
    }

    /// The answer to an order, once.
    pub fn reply(&mut self, id: CommandId) -> Option<Reply> {
        self.replies.remove(&id)
    }

    /// Gives an order and waits for the answer; `None` when the machine died first.
    pub fn command(&mut self, command: Command) -> Option<Reply> {
        let id = self.order(command);
        self.run_until(|rig| rig.replies.contains_key(&id));
        self.reply(id)
    }

    /// A block request. What comes later is asked for with [`Rig::completion`].
    pub fn submit(&mut self, io: Io<'_>) -> (Tag, Submitted) {
        let tag = self.id();
        let now = self.now;
        let submitted = match self.owner.as_mut().filter(|_| !self.store.is_dead()) {
            Some(owner) => owner.submit(now, tag, io),
            None => Submitted::Later,
        };
        self.collect();
        // The process died while it appended: nobody ever saw an answer.
        if self.is_up() {
            (tag, submitted)
        } else {
            (tag, Submitted::Later)
        }
    }

    /// Whether a block request that was answered later has its answer.
    #[must_use]
    pub fn has_completion(&self, tag: Tag) -> bool {
        self.completions.contains_key(&tag)
    }

    /// The durable end that everybody could know when a request was answered later.
    #[must_use]
    pub fn announced_at(&self, tag: Tag) -> Option<Lsn> {
        self.announced_at.get(&tag).copied()
    }

    /// The durable end that everybody can know now.
    #[must_use]
    pub fn announced(&self) -> Option<Lsn> {
        self.announced.as_ref().map(|status| status.durable.lsn)
    }

    /// The answer to a block request that was answered later, once.
    pub fn completion(&mut self, tag: Tag) -> Option<IoResult> {
        self.completions.remove(&tag)
    }

    /// A block request, with everything run until its answer; `None` when the machine died first.
    pub fn io(&mut self, io: Io<'_>) -> Option<IoResult> {
        let (tag, submitted) = self.submit(io);
        if let Submitted::Now(result) = submitted {
            return Some(result);
        }
        self.run_until(|rig| rig.completions.contains_key(&tag));
        self.completion(tag)
    }

    /// Reads the whole device.
    ///
    /// # Panics
    /// When the machine died or the read fails.
    pub fn content(&mut self) -> Vec<u8> {
        let range = ByteRange {
            offset: 0,
            len: self.owner().status().size_bytes,
        };
        match self.io(Io::Read { range }) {
            Some(IoResult::Data(bytes)) => bytes.to_vec(),
            other => panic!("reading the device: {other:?}"),
        }
    }

    /// Number of jobs that wait to be run.
    #[must_use]
    pub fn pending_jobs(&self) -> usize {
        self.jobs.len()
    }

    /// Randomness of this run.
    pub fn rng(&mut self) -> &mut StdRng {
        &mut self.rng
    }

    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn collect(&mut self) {
        if self.store.is_dead() || self.busy {
            return;
        }
        let Some(owner) = &mut self.owner else { return };
        while let Some(action) = owner.next_action() {
            match action {
                Action::Complete { tag, result } => {
                    let twice = self.completions.insert(tag, result);
                    assert!(twice.is_none(), "request {tag} was answered twice");
                    let known = self.announced.as_ref().map_or(Lsn::ZERO, |status| status.durable.lsn);
                    self.announced_at.insert(tag, known);
                }
                Action::Job(id, job) => self.jobs.push((id, job)),
                Action::Reply(id, reply) => {
                    let twice = self.replies.insert(id, reply);
                    assert!(twice.is_none(), "command {id} was answered twice");
                }
                Action::Changed => self.announced = Some(owner.status().clone()),
            }
        }
        let (deadline, now) = (owner.next_deadline(), self.now.mono);
        assert!(
            deadline.is_none_or(|deadline| deadline > now),
            "a timer at {deadline:?} would fire for ever at {now:?}"
        );
    }
}
