//! The three figures that decide the threading of the engine, on real files:
//!
//! 1. `OnFlush`: how much longer than a raw `pwrite` into a prepared file a write takes until it is acknowledged;
//! 2. `EveryWrite`, one write at a time, against raw append + `fdatasync`;
//! 3. `EveryWrite`, 32 writes at a time, against raw append of 32 + one `fdatasync` (ideal group commit).
//!
//! Rounds of engine and raw baseline alternate, so that both see the same machine; medians of all rounds are printed. The directory is a
//! temporary one, or that named by `MARS_BENCH_DIR`.
#![expect(
    clippy::disallowed_methods,
    reason = "a bench measures time and runs jobs on threads of its own"
)]

use mars_engine::api::{
    Action, Cause, Command, CommandId, Compression, Durability, Event, Io, JobId, Now, Reply, Submitted, Tuning,
};
use mars_engine::jobs::{Job, JobOutcome, run_job};
use mars_engine::owner::{OpenParams, Owner};
use mars_engine::store_fs::{FsFile, FsStore};
use mars_engine::types::{ClusterId, Designation, ReplicaId, ResourceId};
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use uuid::Uuid;

const DEVICE_BYTES: u64 = 256 << 20;
const BLOCK: usize = 4096;
const ROUNDS: usize = 9;
const ON_FLUSH_WRITES: usize = 4_000;
/// Few per slice and many slices: a disk that others use, too, changes its mind from second to second.
const SYNCED_WRITES: u32 = 20;
const SYNCED_ROUNDS: usize = 61;
const DEPTH: u32 = 32;

type Done = (JobId, JobOutcome<FsFile>);
type Work = (JobId, Job<FsFile>);

/// An owner with a pool of two threads, driven from one thread.
struct Engine {
    owner: Owner<FsStore>,
    work: Sender<Work>,
    done: Receiver<Done>,
    replies: HashMap<CommandId, Reply>,
    completed: Vec<u64>,
    started: Instant,
}

impl Engine {
    fn open(dir: &Path) -> Self {
        FsStore::create_layout(dir).expect("make the layout");
        let data = dir.join("data");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&data)
            .expect("make the data disk");
        file.set_len(DEVICE_BYTES).expect("size the data disk");
        let store = FsStore::open(dir, file).expect("open the store");
        let (work, jobs) = channel::<Work>();
        let (finished, done) = channel();
        let jobs = Arc::new(Mutex::new(jobs));
        for _ in 0..2 {
            let (store, jobs, finished) = (store.clone(), Arc::clone(&jobs), finished.clone());
            std::thread::spawn(move || {
                loop {
                    let next = jobs.lock().expect("no job panics").recv();
                    let Ok((id, job)) = next else { return };
                    if finished.send((id, run_job(&store, job))).is_err() {
                        return;
                    }
                }
            });
        }
        let params = OpenParams {
            cluster: ClusterId(Uuid::from_u128(1)),
            resource: ResourceId(Uuid::from_u128(2)),
            replica: ReplicaId(Uuid::from_u128(3)),
            boot_id: Uuid::from_u128(4),
            create: Some(DEVICE_BYTES),
            tuning: tuning(Durability::OnFlush),
            seed: [7; 32],
        };
        let started = Instant::now();
        let owner = Owner::open(store, params, now(started)).expect("open the replica");
        let mut engine = Engine {
            owner,
            work,
            done,
            replies: HashMap::new(),
            completed: Vec::new(),
            started,
        };
        let designation = Designation {
            number: 1,
            id: Uuid::from_u128(5),
        };
        engine.command(
            1,
            Command::Promote {
                designation,
                cause: Cause::Create,
            },
        );
        engine
    }

    fn command(&mut self, id: CommandId, command: Command) {
        self.owner.command(now(self.started), id, command);
        self.pump();
        while !self.replies.contains_key(&id) {
            self.wait();
        }
        self.replies
            .remove(&id)
            .expect("it is there")
            .expect("the command is accepted");
    }

    fn submit(&mut self, tag: u64, offset: u64, data: &[u8]) -> Submitted {
        self.owner.submit(
            now(self.started),
            tag,
            Io::Write {
                offset,
                data,
                fua: false,
            },
        )
    }

    /// Takes what the owner wants done.
    fn pump(&mut self) {
        while let Some(action) = self.owner.next_action() {
            match action {
                Action::Job(id, job) => self.work.send((id, job)).expect("the pool lives"),
                Action::Complete { tag, .. } => self.completed.push(tag),
                Action::Reply(id, reply) => drop(self.replies.insert(id, reply)),
                Action::Changed => {}
            }
        }
    }

    /// Hands in everything that has come back, without waiting.
    fn poll(&mut self) {
        self.pump();
        while let Ok((id, outcome)) = self.done.try_recv() {
            self.owner.handle(now(self.started), Event::JobDone(id, outcome));
            self.pump();
        }
        self.tick();
    }

    /// Waits for a job or a timer.
    fn wait(&mut self) {
        self.pump();
        let until = self
            .owner
            .next_deadline()
            .map(|at| at.saturating_sub(self.started.elapsed()));
        if let Ok((id, outcome)) = self.done.recv_timeout(until.unwrap_or(Duration::from_secs(1))) {
            self.owner.handle(now(self.started), Event::JobDone(id, outcome));
        }
        self.tick();
        self.pump();
    }

    fn tick(&mut self) {
        let time = now(self.started);
        if self.owner.next_deadline().is_some_and(|at| at <= time.mono) {
            self.owner.handle(time, Event::Tick);
            self.pump();
        }
    }

    /// Until everything is written back: rounds do not disturb each other.
    fn settle(&mut self) {
        while self.owner.status().applied.lsn != self.owner.status().appended.lsn {
            self.wait();
        }
    }
}

fn tuning(durability: Durability) -> Tuning {
    Tuning {
        durability,
        compression: Compression::None,
        overlay_budget_bytes: 256 << 20,
        segment_bytes: 64 << 20,
        retention_bytes: 0,
    }
}

fn now(started: Instant) -> Now {
    let wall = SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is set");
    Now {
        mono: started.elapsed(),
        wall_ns: u64::try_from(wall.as_nanos()).expect("before the year 2554"),
    }
}

/// The raw baseline: a file of written zeros, appended to as the log is.
struct Raw {
    file: File,
    at: u64,
}

impl Raw {
    fn open(dir: &Path) -> Self {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(dir.join("raw"))
            .expect("raw file");
        let zeros = vec![0; 1 << 20];
        for chunk in 0..64 {
            file.write_all_at(&zeros, chunk << 20).expect("fill the raw file");
        }
        file.sync_all().expect("sync the raw file");
        Raw { file, at: 0 }
    }

    fn append(&mut self, data: &[u8]) {
        if self.at + data.len() as u64 > 64 << 20 {
            self.at = 0;
        }
        self.file.write_all_at(data, self.at).expect("raw write");
        self.at += data.len() as u64;
    }

    fn sync(&mut self) {
        self.file.sync_data().expect("raw fdatasync");
        self.at = self.at.next_multiple_of(BLOCK as u64);
    }
}

/// Middle and 99th of a hundred.
fn percentiles(samples: &mut [Duration]) -> (Duration, Duration) {
    samples.sort_unstable();
    (samples[samples.len() / 2], samples[samples.len() * 99 / 100])
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

fn micros(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}

/// Device offsets in a fixed, scattered order.
fn offset(index: u64) -> u64 {
    index.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (DEVICE_BYTES / BLOCK as u64) * BLOCK as u64
}

fn engine_on_flush(engine: &mut Engine, data: &[u8]) -> (Duration, Duration) {
    let mut samples = Vec::with_capacity(ON_FLUSH_WRITES);
    for index in 0..ON_FLUSH_WRITES as u64 {
        let start = Instant::now();
        let submitted = engine.submit(index, offset(index), data);
        let taken = start.elapsed();
        engine.poll();
        match submitted {
            Submitted::Now(_) => samples.push(taken),
            Submitted::Later => {
                while engine.completed.pop().is_none() {
                    engine.wait();
                }
                samples.push(start.elapsed());
            }
        }
    }
    engine.settle();
    percentiles(&mut samples)
}

fn raw_on_flush(raw: &mut Raw, data: &[u8]) -> (Duration, Duration) {
    let mut samples = Vec::with_capacity(ON_FLUSH_WRITES);
    for index in 0..ON_FLUSH_WRITES {
        let start = Instant::now();
        raw.append(data);
        samples.push(start.elapsed());
        if index % 1024 == 1023 {
            raw.sync();
        }
    }
    raw.sync();
    percentiles(&mut samples)
}

/// Microseconds per write.
fn engine_every_write(engine: &mut Engine, data: &[u8], depth: u32) -> f64 {
    let start = Instant::now();
    let (mut sent, mut open) = (0_u32, 0_u32);
    engine.completed.clear();
    while sent < SYNCED_WRITES * depth || open > 0 {
        while open < depth && sent < SYNCED_WRITES * depth {
            match engine.submit(u64::from(sent), offset(u64::from(sent)), data) {
                Submitted::Now(_) => panic!("a durable write is never answered at once"),
                Submitted::Later => open += 1,
            }
            engine.pump();
            sent += 1;
        }
        engine.wait();
        open -= engine.completed.drain(..).map(|_| 1).sum::<u32>();
    }
    let per_write = micros(start.elapsed()) / f64::from(SYNCED_WRITES * depth);
    engine.settle();
    per_write
}

fn raw_every_write(raw: &mut Raw, data: &[u8], depth: u32) -> f64 {
    let start = Instant::now();
    for _ in 0..SYNCED_WRITES {
        for _ in 0..depth {
            raw.append(data);
        }
        raw.sync();
    }
    micros(start.elapsed()) / f64::from(SYNCED_WRITES * depth)
}

fn main() {
    // `cargo test --benches` runs this, too: it is no test.
    if std::env::args().any(|argument| argument == "--test") {
        return;
    }
    let temporary = tempfile::tempdir().expect("a temporary directory");
    let dir = std::env::var_os("MARS_BENCH_DIR").map_or(temporary.path().to_owned(), Into::into);
    let dir = tempfile::tempdir_in(dir).expect("a directory for the bench");
    let mut engine = Engine::open(dir.path());
    let mut raw = Raw::open(dir.path());
    let data: Vec<u8> = (0..BLOCK)
        .map(|index| u8::try_from(index % 251).expect("below 251"))
        .collect();
    // What the log writes for one such write: the raw baseline moves the same bytes.
    let record = vec![7_u8; BLOCK + 48];

    let (mut on_flush, mut on_flush_99) = (Vec::new(), Vec::new());
    let (mut raw_write, mut raw_write_99) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        // Who comes first alternates, too: whatever one leaves behind in the disk, the other pays for as often.
        for turn in [round % 2, (round + 1) % 2] {
            if turn == 0 {
                let (middle, tail) = raw_on_flush(&mut raw, &record);
                raw_write.push(micros(middle));
                raw_write_99.push(micros(tail));
            } else {
                let (middle, tail) = engine_on_flush(&mut engine, &data);
                on_flush.push(micros(middle));
                on_flush_99.push(micros(tail));
            }
        }
    }
    engine.command(2, Command::SetTuning(tuning(Durability::EveryWrite)));
    let mut every = [(1, Vec::new(), Vec::new()), (DEPTH, Vec::new(), Vec::new())];
    for round in 0..SYNCED_ROUNDS {
        for (depth, of_raw, of_engine) in &mut every {
            for turn in [round % 2, (round + 1) % 2] {
                if turn == 0 {
                    of_raw.push(raw_every_write(&mut raw, &record, *depth));
                } else {
                    of_engine.push(engine_every_write(&mut engine, &data, *depth));
                }
            }
        }
    }

    println!(
        "4 KiB writes, microseconds per write, medians of {ROUNDS} (OnFlush) and {SYNCED_ROUNDS} (EveryWrite) alternating rounds"
    );
    println!("{:<44} {:>9} {:>9} {:>9}", "", "raw", "engine", "extra");
    let line = |name: &str, raw: f64, engine: f64| {
        println!("{name:<44} {raw:>9.2} {engine:>9.2} {:>+9.2}", engine - raw);
    };
    line(
        "OnFlush acknowledge, median",
        median(&mut raw_write),
        median(&mut on_flush),
    );
    line(
        "OnFlush acknowledge, 99th percentile",
        median(&mut raw_write_99),
        median(&mut on_flush_99),
    );
    for (depth, of_raw, of_engine) in &mut every {
        line(
            &format!("EveryWrite, {depth} at a time"),
            median(of_raw),
            median(of_engine),
        );
    }
}
