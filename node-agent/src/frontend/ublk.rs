//! The `ublk` frontend: a block device whose requests arrive on an `io_uring`, through libublk. All of libublk is in here.
//!
//! An open device has one thread. Its ring carries the requests and, by a poll of the owner's eventfd, everything else that
//! concerns the owner – which therefore lives on this thread while the device exists and returns to a shard afterwards.
//!
//! Invariants: a request is answered only after the owner said so, and doing it twice is the same as doing it once: the device
//! is made with user recovery and reissue, so a killed agent is a pause, and what it had taken comes again. A device that a
//! former life left is taken over only if the record of it (boot id, number, kernel sequence number) agrees with sysfs.

use super::{BlockFrontend, CloseError, Device, FrontendError, FrontendKind, OpenParams, Resized, Seat, sysfs, users};
use crate::shard::host::{Host, Message, Taken};
use crate::shard::pool::panic_message;
use futures::channel::oneshot;
use libublk::ctrl::{UblkCtrl, UblkCtrlBuilder};
use libublk::helpers::IoBuf;
use libublk::io::{UblkDev, UblkQueue};
use libublk::{BufDesc, UblkError, UblkFlags, UblkUringData, sys};
use mars_engine::api::{Io, IoResult, Submitted};
use mars_engine::types::{ByteRange, ReplicaId, SECTOR_BYTES};
use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tracing::{error, info, warn};

/// Requests the kernel may have under way.
const QUEUE_DEPTH: u16 = 64;
/// Largest read or write (bytes); with the depth it bounds the memory of a device: 16 MiB.
const IO_BYTES: u32 = 256 << 10;
/// Largest discard or write-zeroes request (sectors); a small limit makes mkfs and fstrim slow.
const DISCARD_SECTORS: u32 = (1 << 30) >> 9;
/// Discards smaller than this are not worth a record (bytes).
const DISCARD_GRANULARITY_BYTES: u32 = 4096;
/// How long a dead agent's device may take to become quiescent, and a new one to start.
const DEVICE_WAIT: Duration = Duration::from_mins(1);
const POLL_STEP: Duration = Duration::from_millis(20);
/// Longest sleep of a device's thread.
const IDLE: Duration = Duration::from_mins(1);

/// Whether this kernel has the driver. Nothing is opened.
pub(super) fn is_available() -> bool {
    Path::new("/dev/ublk-control").exists()
}

/// See the module.
pub(super) struct UblkFrontend {
    state_dir: PathBuf,
    running: Mutex<HashMap<ReplicaId, Running>>,
}

/// A device that this process serves.
struct Running {
    id: u32,
    /// The owner comes back through this when the device is gone.
    returned: Receiver<Box<Host>>,
}

/// What is written down about a device, for the next life of the agent.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    boot_id: String,
    id: u32,
    /// Unknown until the device has started.
    diskseq: Option<u64>,
}

fn failed(what: &str, error: &UblkError) -> FrontendError {
    FrontendError::Io {
        what: format!("ublk: {what}"),
        source: io::Error::other(format!("{error:?}")),
    }
}

impl UblkFrontend {
    /// Records of devices go to `state_dir`: volatile storage, private to this node.
    pub(super) fn new(state_dir: PathBuf) -> Self {
        Self {
            state_dir,
            running: Mutex::default(),
        }
    }

    fn running(&self) -> MutexGuard<'_, HashMap<ReplicaId, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn record_path(&self, replica: ReplicaId) -> PathBuf {
        self.state_dir.join(format!("ublk-{replica}"))
    }

    /// Number of the device that a former life left for this replica, if it is there and provably ours.
    fn leftover(&self, replica: ReplicaId) -> Result<Option<u32>, FrontendError> {
        let path = self.record_path(replica);
        let fail = |error| FrontendError::io(format!("record {}", path.display()), error);
        let record: Record = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| fail(error.into()))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(fail(error)),
        };
        let same_boot = boot_id().map_err(fail)? == record.boot_id;
        let now = identity(record.id).ok().map(|identity| identity.2);
        if same_boot && now.is_some() && now == record.diskseq {
            return Ok(Some(record.id));
        }
        if same_boot && record.diskseq.is_none() {
            warn!(%replica, id = record.id, "a former agent died while it made this ublk device: if /dev/ublkc{} is unused, \
                  delete it by hand", record.id);
        }
        std::fs::remove_file(&path).map_err(fail)?;
        Ok(None)
    }

    fn start(&self, params: &OpenParams, recover: Option<u32>, seat: &Seat) -> Result<u32, FrontendError> {
        let host = seat.mailbox.ask_blocking(Message::Leave)?;
        let (ready_to, ready) = channel();
        let (returned_to, returned) = channel();
        let served = Arc::new(Mutex::new(Some((host, returned_to))));
        let setup = Setup {
            params: params.clone(),
            recover,
            record: self.record_path(params.replica),
            served: served.clone(),
        };
        let name = format!("mars-ublk-{}", params.name);
        let spawned = std::thread::Builder::new()
            .name(name)
            .spawn(move || run(&setup, &ready_to));
        let started = match spawned {
            Ok(_) => ready
                .recv_timeout(DEVICE_WAIT)
                .unwrap_or_else(|_| Err((None, "it does not start".to_owned()))),
            Err(error) => Err((None, error.to_string())),
        };
        let (id, text) = match started {
            Ok(id) => {
                self.running().insert(params.replica, Running { id, returned });
                return Ok(id);
            }
            Err(failure) => failure,
        };
        // If no queue took the owner, it is still here; else it comes back when the queue ends.
        let untaken = served.lock().unwrap_or_else(PoisonError::into_inner).take();
        match (untaken, id) {
            (Some((host, _)), _) => seat.runtime.place(host),
            (None, Some(id)) => {
                self.running().insert(params.replica, Running { id, returned });
                self.stop(params.replica, recover.is_none(), None, seat)?;
            }
            (None, None) => error!(replica = %params.replica, "a ublk device hangs while it starts: restart the agent"),
        }
        Err(FrontendError::Io {
            what: format!("ublk device of {}", params.name),
            source: io::Error::other(text),
        })
    }

    /// Stops the device and gives the owner back to a shard. `claim` is released once nobody can open the device any more.
    fn stop(&self, replica: ReplicaId, delete: bool, claim: Option<OwnedFd>, seat: &Seat) -> Result<(), FrontendError> {
        let Some(Running { id, returned }) = self.running().remove(&replica) else {
            return Ok(());
        };
        let number = i32::try_from(id).expect("device numbers are small");
        let control = UblkCtrl::new_simple(number).map_err(|error| failed("open control", &error))?;
        control.kill_dev().map_err(|error| failed("stop the device", &error))?;
        drop(claim);
        let host = returned.recv_timeout(DEVICE_WAIT).map_err(|_| FrontendError::Io {
            what: format!("ublk device {id}"),
            source: io::Error::new(io::ErrorKind::TimedOut, "its thread did not end; restart the agent"),
        })?;
        seat.runtime.place(host);
        if delete {
            // Not the waiting kind: a late opener would hold it, and its descriptor only gives errors by now.
            control
                .del_dev_async()
                .map_err(|error| failed("delete the device", &error))?;
            let path = self.record_path(replica);
            std::fs::remove_file(&path)
                .map_err(|error| FrontendError::io(format!("remove {}", path.display()), error))?;
        }
        Ok(())
    }
}

/// Deletes the devices that are recorded in `state_dir` and provably ours, for a node whose agent is gone for good: users get
/// I/O errors, as when a machine dies. Says what could not be deleted.
pub(super) fn delete_leftovers(state_dir: &Path) -> Vec<String> {
    let frontend = UblkFrontend::new(state_dir.to_owned());
    let mut problems = Vec::new();
    for entry in std::fs::read_dir(state_dir).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(replica) = name
            .strip_prefix("ublk-")
            .and_then(|uuid| uuid::Uuid::parse_str(uuid).ok())
        else {
            continue;
        };
        let deleted = frontend
            .leftover(ReplicaId(replica))
            .map_err(|error| error.to_string())
            .and_then(|id| id.map_or(Ok(()), delete));
        if let Err(problem) = deleted {
            problems.push(format!("{name}: {problem}"));
        }
    }
    problems
}

/// Deletes one device, on a thread of its own: libublk's control ring belongs to the thread that made it.
fn delete(id: u32) -> Result<(), String> {
    let work = move || -> Result<(), String> {
        let number = i32::try_from(id).map_err(|error| error.to_string())?;
        let text = |error: UblkError| format!("ublk device {id}: {error:?}");
        let control = UblkCtrl::new_simple(number).map_err(text)?;
        control.kill_dev().map_err(text)?;
        // Not the waiting kind: whoever has it open would hold us.
        control.del_dev_async().map_err(text).map(drop)
    };
    let thread = std::thread::Builder::new()
        .name(format!("mars-ublk-del-{id}"))
        .spawn(work);
    let ended = thread.map_err(|error| error.to_string())?.join();
    ended.unwrap_or_else(|_| Err("the deletion failed abnormally".to_owned()))
}

impl BlockFrontend for UblkFrontend {
    fn kind(&self) -> FrontendKind {
        FrontendKind::Ublk
    }

    fn has_leftover(&self, replica: ReplicaId) -> Result<bool, FrontendError> {
        Ok(self.leftover(replica)?.is_some())
    }

    fn open(&self, params: &OpenParams, seat: &Seat) -> Result<Device, FrontendError> {
        let leftover = self.leftover(params.replica)?;
        if let Some(id) = leftover {
            wait_until_quiescent(id)?;
            info!(replica = %params.replica, id, "taking the device over from a former agent");
        }
        let id = self.start(params, leftover, seat)?;
        let (major, minor, diskseq) =
            identity(id).map_err(|error| FrontendError::io(format!("ublk device {id}"), error))?;
        write_record(&self.record_path(params.replica), id, Some(diskseq))?;
        let mut device = Device {
            kind: FrontendKind::Ublk,
            replica: params.replica,
            link: PathBuf::new(),
            node: node(id),
            major,
            minor,
            diskseq,
            size_bytes: params.size_bytes,
            resize_pending: false,
            survives_restart: true,
        };
        self.set_volatile_cache(&device, params.volatile_cache)?;
        if shown_bytes(id).is_some_and(|bytes| bytes < params.size_bytes) {
            // It grew while no agent was there.
            device.resize_pending = self.resize(&device, params.size_bytes)? == Resized::AtNextOpen;
        }
        Ok(device)
    }

    fn resize(&self, device: &Device, size_bytes: u64) -> Result<Resized, FrontendError> {
        let features = UblkCtrl::get_features().unwrap_or(0);
        if features & u64::from(sys::UBLK_F_UPDATE_SIZE) == 0 {
            return Ok(Resized::AtNextOpen);
        }
        let Some(id) = self.running().get(&device.replica).map(|running| running.id) else {
            return Ok(Resized::AtNextOpen);
        };
        let number = i32::try_from(id).expect("device numbers are small");
        let control = UblkCtrl::new_simple(number).map_err(|error| failed("open control", &error))?;
        control
            .update_size(size_bytes)
            .map_err(|error| failed("grow the device", &error))?;
        Ok(Resized::Done)
    }

    /// The device is made with a volatile cache and FUA; "write through" makes the block layer drop flushes and FUA.
    fn set_volatile_cache(&self, device: &Device, volatile: bool) -> Result<(), FrontendError> {
        let path = sysfs::dir(device.major, device.minor).join("queue/write_cache");
        let wanted = if volatile { "write back" } else { "write through" };
        std::fs::write(&path, wanted).map_err(|error| FrontendError::io(format!("set {}", path.display()), error))
    }

    fn close(&self, device: &Device, seat: &Seat) -> Result<(), CloseError> {
        // The claim keeps everybody from mounting it from now on.
        let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC;
        let claim = match rustix::fs::open(&device.node, flags, Mode::empty()) {
            Ok(claim) => claim,
            Err(rustix::io::Errno::BUSY) => return Err(CloseError::Busy(users::of(device))),
            Err(errno) => return Err(FrontendError::io(format!("claim {}", device.node.display()), errno).into()),
        };
        let me = std::process::id();
        let others: Vec<_> = users::of(device)
            .into_iter()
            .filter(|user| !matches!(user, super::DeviceUser::Open { pid, .. } if *pid == me))
            .collect();
        if !others.is_empty() {
            return Err(CloseError::Busy(others));
        }
        rustix::fs::fsync(&claim)
            .map_err(|errno| FrontendError::io(format!("flush {}", device.node.display()), errno))?;
        self.stop(device.replica, true, Some(claim), seat)?;
        Ok(())
    }
}

fn boot_id() -> io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .to_owned())
}

fn node(id: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkb{id}"))
}

fn sys_block(id: u32) -> PathBuf {
    Path::new("/sys/block").join(format!("ublkb{id}"))
}

/// Major, minor and diskseq, from sysfs alone.
fn identity(id: u32) -> io::Result<(u32, u32, u64)> {
    let missing = || {
        io::Error::new(
            io::ErrorKind::NotFound,
            format!("{} has no identity", sys_block(id).display()),
        )
    };
    let numbers = sysfs::attribute(&sys_block(id).join("dev"))
        .as_deref()
        .and_then(sysfs::parse_numbers);
    let (major, minor) = numbers.ok_or_else(missing)?;
    let diskseq = sysfs::attribute(&sys_block(id).join("diskseq")).and_then(|text| text.parse().ok());
    Ok((major, minor, diskseq.ok_or_else(missing)?))
}

fn shown_bytes(id: u32) -> Option<u64> {
    Some(sysfs::attribute(&sys_block(id).join("size"))?.parse::<u64>().ok()? * SECTOR_BYTES)
}

/// Opens the control side: a new device, or the one to be recovered.
fn control(recover: Option<u32>) -> Result<UblkCtrl, FrontendError> {
    let id = recover.map_or(-1, |id| i32::try_from(id).expect("device numbers are small"));
    if recover.is_some() {
        let control = UblkCtrl::new_simple(id).map_err(|error| failed("open control", &error))?;
        control
            .start_user_recover()
            .map_err(|error| failed("start the recovery", &error))?;
    }
    let how = if recover.is_some() {
        UblkFlags::UBLK_DEV_F_RECOVER_DEV
    } else {
        UblkFlags::UBLK_DEV_F_ADD_DEV
    };
    let built = UblkCtrlBuilder::default()
        .name("mars")
        .id(id)
        .nr_queues(1)
        .depth(QUEUE_DEPTH)
        .io_buf_bytes(IO_BYTES)
        // Recovery: the device stays when the agent dies, and new requests wait. Reissue: those it had taken come again.
        .ctrl_flags(u64::from(sys::UBLK_F_USER_RECOVERY | sys::UBLK_F_USER_RECOVERY_REISSUE))
        .dev_flags(how)
        .build();
    built.map_err(|error| failed("make the device", &error))
}

/// A dead agent's device is torn down for a moment before it can be recovered.
fn wait_until_quiescent(id: u32) -> Result<(), FrontendError> {
    let number = i32::try_from(id).expect("device numbers are small");
    let deadline = Instant::now() + DEVICE_WAIT;
    loop {
        let control = UblkCtrl::new_simple(number).map_err(|error| failed("open control", &error))?;
        let info = control.dev_info();
        if u32::from(info.state) == sys::UBLK_S_DEV_QUIESCED {
            return Ok(());
        }
        if Instant::now() >= deadline {
            let text = format!(
                "state {} (process {}): the former agent must end first",
                info.state, info.ublksrv_pid
            );
            return Err(FrontendError::Io {
                what: format!("ublk device {id}"),
                source: io::Error::other(text),
            });
        }
        std::thread::sleep(POLL_STEP);
    }
}

/// The device's promises to the kernel. A recovery does not change them.
fn set_params(device: &mut UblkDev, params: &OpenParams) {
    device.set_default_params(params.size_bytes);
    let to = &mut device.tgt.params;
    let shift = if params.logical_block_bytes == 4096 { 12 } else { 9 };
    to.basic.logical_bs_shift = shift;
    to.basic.io_min_shift = shift.max(12);
    // FUA needs VOLATILE_CACHE; without FUA the kernel would send a write and a flush.
    to.basic.attrs = sys::UBLK_ATTR_VOLATILE_CACHE | sys::UBLK_ATTR_FUA;
    to.types |= sys::UBLK_PARAM_TYPE_DISCARD;
    to.discard = sys::ublk_param_discard {
        discard_granularity: DISCARD_GRANULARITY_BYTES,
        max_discard_sectors: DISCARD_SECTORS,
        max_write_zeroes_sectors: DISCARD_SECTORS,
        max_discard_segments: 1,
        ..Default::default()
    };
}

/// The owner on its way to the queue thread, and the way back.
type Served = Arc<Mutex<Option<(Box<Host>, Sender<Box<Host>>)>>>;

/// What the control thread of a device gets.
struct Setup {
    params: OpenParams,
    recover: Option<u32>,
    record: PathBuf,
    served: Served,
}

/// Number of the device, or how far it came and what happened.
type Started = Result<u32, (Option<u32>, String)>;

/// Makes (or recovers) a device and runs it until it is stopped; on a thread of its own, since libublk's rings are
/// thread-local.
fn run(setup: &Setup, ready: &Sender<Started>) {
    let make = || -> Result<UblkCtrl, FrontendError> {
        let control = control(setup.recover)?;
        // The device outlives this process unless it is closed on purpose.
        control.disown();
        if setup.recover.is_none() {
            write_record(&setup.record, control.dev_info().dev_id, None)?;
        }
        Ok(control)
    };
    let control = match make() {
        Ok(control) => control,
        Err(error) => {
            // Whoever waits may have given up.
            let _ = ready.send(Err((None, error.to_string())));
            return;
        }
    };
    let id = control.dev_info().dev_id;
    let (served, started) = (setup.served.clone(), ready.clone());
    let serve = move |queue: u16, device: &UblkDev| {
        let taken = served.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some((host, returned)) = taken else { return };
        if let Some(host) = serve_queue(queue, device, host) {
            let _ = returned.send(host);
        }
    };
    let announce = move |_: &UblkCtrl| {
        let _ = started.send(Ok(id));
    };
    let describe = |device: &mut UblkDev| {
        set_params(device, &setup.params);
        Ok(())
    };
    if let Err(error) = control.run_target(describe, serve, announce) {
        let _ = ready.send(Err((Some(id), format!("{error:?}"))));
    }
}

fn write_record(path: &Path, id: u32, diskseq: Option<u64>) -> Result<(), FrontendError> {
    let write = || -> io::Result<()> {
        std::fs::create_dir_all(path.parent().unwrap_or(Path::new("/")))?;
        let aside = path.with_extension("new");
        std::fs::write(
            &aside,
            serde_json::to_vec(&Record {
                boot_id: boot_id()?,
                id,
                diskseq,
            })?,
        )?;
        std::fs::rename(&aside, path)
    };
    write().map_err(|error| FrontendError::io(format!("record {}", path.display()), error))
}

/// What the tasks of a device's thread share.
struct Thread {
    host: RefCell<Box<Host>>,
    waiting: RefCell<HashMap<u64, oneshot::Sender<IoResult>>>,
    /// Requests are not handed to the owner any more: it is being shut down for the next life of the agent.
    holding: Cell<bool>,
    /// What the owner said when it failed an assertion: it must not be used any more.
    failed: RefCell<Option<String>>,
}

/// Serves the queue until the device is stopped and returns the owner. Never returns when the owner has stopped while the
/// device goes on: its requests must wait for the next life of the agent, and a queue that ends would fail them.
fn serve_queue(queue: u16, device: &UblkDev, host: Box<Host>) -> Option<Box<Host>> {
    let queue = match UblkQueue::new(queue, device) {
        Ok(queue) => Rc::new(queue),
        Err(error) => {
            error!(replica = host.name, ?error, "cannot serve the queue of a ublk device");
            return Some(host);
        }
    };
    let thread = Rc::new(Thread {
        host: RefCell::new(host),
        waiting: RefCell::default(),
        holding: Cell::new(false),
        failed: RefCell::new(None),
    });
    let executor = Rc::new(smol::LocalExecutor::new());
    let depth = device.dev_info.queue_depth;
    let tags: Vec<_> = (0..depth)
        .map(|tag| executor.spawn(serve_tag(queue.clone(), tag, thread.clone())))
        .collect();
    let wake = executor.spawn(watch_mailbox(queue.clone(), thread.clone()));

    let turn = || thread.turn(&executor);
    let poll = || {
        let limit = thread.sleep_limit();
        let limit = io_uring::types::Timespec::new()
            .sec(limit.as_secs())
            .nsec(limit.subsec_nanos());
        std::future::ready(libublk::uring_async::uring_poll_io_fn::<io_uring::squeue::Entry>(
            &queue,
            Some(limit),
            1,
        ))
    };
    let reap = |_timeout| {
        libublk::uring_async::ublk_reap_io_events_with_update_queue(&queue, false, None, |event| {
            libublk::uring_async::ublk_wake_task(event.user_data(), event);
        })
    };
    let done = || tags.iter().all(smol::Task::is_finished);
    let served = catch_unwind(AssertUnwindSafe(|| {
        smol::block_on(libublk::uring_async::run_uring_tasks(poll, reap, turn, done))
    }));
    match served {
        Ok(Ok(())) => {}
        Ok(Err(error)) => error!(?error, "the queue of a ublk device ended"),
        Err(panic) => {
            let message = panic_message(panic.as_ref());
            error!("the engine stopped: {message}; its device pauses until the agent restarts");
            // The ring stays open: a queue that ended would make the kernel fail the requests.
            loop {
                std::thread::park();
            }
        }
    }
    drop((wake, tags, executor));
    Rc::into_inner(thread).map(|thread| thread.host.into_inner())
}

impl Thread {
    /// Runs tasks and the owner until neither has anything to do.
    fn turn(&self, executor: &smol::LocalExecutor<'_>) {
        loop {
            let mut ran = false;
            while executor.try_tick() {
                ran = true;
            }
            if let Some(message) = self.failed.take() {
                panic!("{message}");
            }
            self.drive();
            if !ran {
                return;
            }
        }
    }

    /// Messages, job results and steps of the owner.
    fn drive(&self) {
        let mut host = self.host.borrow_mut();
        host.wake.clear();
        loop {
            match host.take_messages() {
                Taken::Nothing | Taken::Abandoned => break,
                Taken::Message(Message::RemoveSource(told)) => {
                    self.holding.set(true);
                    let _ = told.send(());
                }
                Taken::Message(Message::Stop(told)) => {
                    let _ = told.send(());
                    info!(replica = host.name, "its device waits for the next life of the agent");
                    loop {
                        std::thread::park();
                    }
                }
                // Dropping the sender is the refusal.
                Taken::Message(Message::Leave(_) | Message::AddSource(..)) => {
                    warn!(replica = host.name, "cannot move while a device is served");
                }
                Taken::Message(Message::Command(..)) => unreachable!("take_messages hands commands to the engine"),
            }
        }
        host.pump(&mut |tag, result| {
            if let Some(to) = self.waiting.borrow_mut().remove(&tag) {
                let _ = to.send(result);
            }
        });
    }

    fn sleep_limit(&self) -> Duration {
        let deadline = self.host.borrow().next_deadline();
        let rest = deadline.map_or(IDLE, |deadline| {
            deadline.saturating_sub(crate::shard::engine::now().mono)
        });
        // Never zero: the kernel would not wait at all, and a deadline that is due is seen in this turn anyway.
        rest.clamp(Duration::from_micros(50), IDLE)
    }

    async fn execute(&self, request: &sys::ublksrv_io_desc, buffer: &mut [u8]) -> i32 {
        if self.holding.get() {
            std::future::pending::<()>().await;
        }
        let operation = request.op_flags & 0xff;
        // A flush comes with a start sector that means nothing.
        let start = if operation == sys::UBLK_IO_OP_FLUSH {
            0
        } else {
            request.start_sector
        };
        let len = u64::from(request.nr_sectors) * SECTOR_BYTES;
        let Some(offset) = start.checked_mul(SECTOR_BYTES) else {
            return -libc::EINVAL;
        };
        let range = ByteRange { offset, len };
        let Ok(bytes) = usize::try_from(len) else {
            return -libc::EINVAL;
        };
        let fua = request.op_flags & sys::UBLK_IO_F_FUA != 0;
        let io = match operation {
            sys::UBLK_IO_OP_READ => Io::Read { range },
            sys::UBLK_IO_OP_WRITE => match buffer.get(..bytes) {
                Some(data) => Io::Write {
                    offset: range.offset,
                    data,
                    fua,
                },
                None => return -libc::EINVAL,
            },
            sys::UBLK_IO_OP_FLUSH => Io::Flush,
            sys::UBLK_IO_OP_DISCARD => Io::Discard { range },
            sys::UBLK_IO_OP_WRITE_ZEROES => Io::WriteZeroes { range, fua },
            _ => return -libc::EOPNOTSUPP,
        };
        // A panic in a task would end that task alone.
        let submitted = catch_unwind(AssertUnwindSafe(|| self.host.borrow_mut().submit(io)));
        let (tag, submitted) = match submitted {
            Ok(submitted) => submitted,
            Err(panic) => {
                self.failed.replace(Some(panic_message(panic.as_ref())));
                std::future::pending().await
            }
        };
        let result = match submitted {
            Submitted::Now(result) => result,
            Submitted::Later => {
                let (to, from) = oneshot::channel();
                self.waiting.borrow_mut().insert(tag, to);
                // The sender lives until the owner has answered.
                from.await.unwrap_or(IoResult::Errno(libc::EIO))
            }
        };
        match result {
            IoResult::Errno(errno) => -errno,
            IoResult::Done => i32::try_from(len).unwrap_or(i32::MAX),
            IoResult::Data(data) => match buffer.get_mut(..data.len()) {
                Some(target) => {
                    target.copy_from_slice(&data);
                    i32::try_from(len).unwrap_or(i32::MAX)
                }
                None => -libc::EINVAL,
            },
        }
    }
}

/// One task per tag: the first command registers the buffer and asks for a request; each commit answers one and asks for
/// the next. Ends with an error when the device is stopped.
async fn serve_tag(queue: Rc<UblkQueue<'_>>, tag: u16, thread: Rc<Thread>) -> Result<(), UblkError> {
    let mut buffer = IoBuf::<u8>::new(queue.dev.dev_info.max_io_buf_bytes as usize);
    queue
        .submit_io_prep_cmd(tag, BufDesc::Slice(buffer.as_slice()), 0, Some(&buffer))
        .await?;
    loop {
        let request = *queue.get_iod(tag);
        let result = thread.execute(&request, buffer.as_mut_slice()).await;
        queue
            .submit_io_commit_cmd(tag, BufDesc::Slice(buffer.as_slice()), result)
            .await?;
    }
}

/// Keeps a poll of the owner's eventfd in the ring, so that messages and job results end its sleep.
async fn watch_mailbox(_queue: Rc<UblkQueue<'_>>, thread: Rc<Thread>) {
    let fd = thread.host.borrow().wake.as_fd().as_raw_fd();
    loop {
        let poll =
            io_uring::opcode::PollAdd::new(io_uring::types::Fd(fd), u32::from(libc::POLLIN.unsigned_abs())).build();
        if let Err(error) = libublk::uring_async::ublk_submit_sqe_async(poll, UblkUringData::Target as u64).await {
            error!(?error, "cannot watch the mailbox of a ublk device");
            return;
        }
        // The next poll enters the ring when this turn is over, and the turn clears the counter.
    }
}
