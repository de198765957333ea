//! The keeper's side of the socket: one thread per connection, one request per message.
//!
//! Invariant: nothing that waits for an agent happens while the tables are locked, and what connections may exist at a
//! time is bounded. Only root may speak; the identity of the caller is the pidfd that the kernel gives for the socket.

use super::protocol::{self, Answer, Failure, Hello, Op, Request, Response, VERSION};
use super::state::{Recorded, StateFile, start_time};
use super::volume::{Volume, file_name};
use crate::frontend::loopdev;
use mars_engine::types::ReplicaId;
use rustix::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use rustix::net::sockopt::{Timeout, set_socket_timeout, socket_peercred};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, acceptfrom_with, bind, listen, socket_with};
use std::collections::HashMap;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tracing::{error, info, warn};
use uuid::Uuid;

/// Most connections at a time; agents open one per operation.
const MAX_CONNECTIONS: usize = 64;
/// How long a connection may stay silent.
const SILENCE: Duration = Duration::from_secs(30);

struct Keeper {
    instance: Uuid,
    volumes: Mutex<HashMap<ReplicaId, Arc<Volume>>>,
    state: Mutex<StateFile>,
    lost: Vec<ReplicaId>,
    connections: AtomicUsize,
}

/// Serves the socket `<dir>/keeper.sock` for ever. State that the next life of the keeper needs is beside it.
///
/// # Errors
/// When another keeper serves this directory, or the directory or socket cannot be made.
pub fn serve(dir: &Path) -> io::Result<()> {
    std::fs::create_dir_all(dir)?;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700))?;
    let lock = std::fs::File::create(dir.join("keeper.lock"))?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).map_err(|_| {
        io::Error::new(
            io::ErrorKind::AddrInUse,
            format!("another keeper serves {}", dir.display()),
        )
    })?;
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .to_owned();
    let mut state = StateFile::open(dir.join("keeper.state"), boot_id)?;
    let lost = clean_up(&mut state)?;
    let listener = listen_at(&dir.join("keeper.sock"))?;
    let (volumes, connections) = (Mutex::default(), AtomicUsize::new(0));
    let keeper = Arc::new(Keeper {
        instance: Uuid::new_v4(),
        volumes,
        state: Mutex::new(state),
        lost,
        connections,
    });
    info!(dir = %dir.display(), "keeper ready");
    loop {
        let connection = match acceptfrom_with(&listener, SocketFlags::CLOEXEC) {
            Ok((connection, _)) => connection,
            Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => continue,
            Err(errno) => return Err(errno.into()),
        };
        if keeper.connections.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
            keeper.connections.fetch_sub(1, Ordering::Relaxed);
            warn!("connection refused: {MAX_CONNECTIONS} are open already");
            continue;
        }
        let for_thread = keeper.clone();
        let spawned = std::thread::Builder::new()
            .name("mars-keeper-op".into())
            .spawn(move || {
                for_thread.converse(&connection);
                for_thread.connections.fetch_sub(1, Ordering::Relaxed);
            });
        if let Err(error) = spawned {
            keeper.connections.fetch_sub(1, Ordering::Relaxed);
            error!(%error, "cannot start a thread for a connection");
        }
    }
}

fn listen_at(path: &Path) -> io::Result<OwnedFd> {
    // The lock says that nobody else serves here, so a socket that is left is a dead one.
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    bind(&listener, &SocketAddrUnix::new(path)?)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    listen(&listener, 16)?;
    Ok(listener)
}

/// What became of the devices of an earlier keeper: those whose agent lives are waited for, the others are cleared.
fn clean_up(file: &mut StateFile) -> io::Result<Vec<ReplicaId>> {
    let mut lost = Vec::new();
    for recorded in file.state.devices.clone() {
        let Recorded {
            replica,
            number,
            diskseq,
            holder,
        } = recorded;
        let ours = loopdev::backing_name(number).is_some_and(|name| name == file_name(replica))
            && loopdev::identity(number).is_ok_and(|now| diskseq.is_none_or(|known| known == now.diskseq));
        if !ours {
            file.forget(replica)?;
        } else if holder.is_some_and(|(pid, ticks)| start_time(pid) == Some(ticks)) {
            info!(%replica, number, "an agent serves this device without a keeper: it must deposit it");
        } else {
            error!(%replica, number, "keeper and agent were lost together: users of this device get I/O errors; close them, \
                   and the device is made again");
            loopdev::clear_when_closed(number)?;
            file.forget(replica)?;
            lost.push(replica);
        }
    }
    Ok(lost)
}

/// Who is at the other end.
struct Peer {
    pidfd: OwnedFd,
    pid: u32,
}

impl Keeper {
    fn volumes(&self) -> MutexGuard<'_, HashMap<ReplicaId, Arc<Volume>>> {
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> MutexGuard<'_, StateFile> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn volume(&self, replica: ReplicaId) -> Result<Arc<Volume>, Failure> {
        self.volumes().get(&replica).cloned().ok_or(Failure::Unknown)
    }

    fn converse(&self, connection: &OwnedFd) {
        let peer = match peer_of(connection) {
            Ok(peer) => peer,
            Err(error) => return warn!(%error, "connection refused"),
        };
        for direction in [Timeout::Recv, Timeout::Send] {
            if let Err(error) = set_socket_timeout(connection, direction, Some(SILENCE)) {
                return warn!(%error, "connection refused");
            }
        }
        loop {
            let (request, descriptors) = match protocol::receive::<Request>(connection) {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return,
                Err(error) => return warn!(%error, pid = peer.pid, "connection closed"),
            };
            let mut volume = None;
            let result = if request.version == VERSION {
                self.perform(request.op, descriptors, &peer, &mut volume)
            } else {
                Err(Failure::Version)
            };
            if let Err(failure) = &result {
                warn!(pid = peer.pid, ?failure, "refused");
            }
            let descriptors = volume.as_ref().map(|volume: &Arc<Volume>| volume.descriptors());
            let descriptors: &[_] = descriptors.as_ref().map_or(&[], |pair| pair);
            if let Err(error) = protocol::send(
                connection,
                &Response {
                    version: VERSION,
                    result,
                },
                descriptors,
            ) {
                return warn!(%error, pid = peer.pid, "the agent did not take the answer");
            }
        }
    }

    /// `give` is set to the volume whose descriptors go with the answer.
    fn perform(
        &self,
        op: Op,
        descriptors: Vec<OwnedFd>,
        peer: &Peer,
        give: &mut Option<Arc<Volume>>,
    ) -> Result<Answer, Failure> {
        match op {
            Op::Hello => Ok(Answer::Hello(self.hello())),
            Op::Acquire { replica } => {
                let (volume, is_new) = self.find_or_create(replica)?;
                self.hand_over(&volume, peer)?;
                let (negotiated, device) = (volume.negotiated, volume.device());
                *give = Some(volume);
                Ok(Answer::Acquired {
                    is_new,
                    negotiated,
                    device,
                })
            }
            Op::SetUp {
                replica,
                logical_block_bytes,
                volatile_cache,
            } => {
                let volume = self.volume(replica)?;
                let holder = start_time(peer.pid).map(|ticks| (peer.pid, ticks));
                let mut record = |number, diskseq| {
                    self.state().record(Recorded {
                        replica,
                        number,
                        diskseq,
                        holder,
                    })
                };
                let device = volume.set_up(logical_block_bytes, &mut record)?;
                volume.set_volatile_cache(volatile_cache)?;
                info!(%replica, number = device.number, "device set up");
                Ok(Answer::Device(device))
            }
            Op::Resize { replica } => self.volume(replica)?.resize().map(|()| Answer::Done),
            Op::SetVolatileCache { replica, volatile } => self
                .volume(replica)?
                .set_volatile_cache(volatile)
                .map(|()| Answer::Done),
            Op::Close { replica } => {
                self.volume(replica)?.close()?;
                self.drop_volume(replica)?;
                info!(%replica, "device closed");
                Ok(Answer::Done)
            }
            Op::Abort { replica } => {
                let volume = self.volume(replica)?;
                self.drop_volume(replica)?;
                warn!(%replica, "device aborted: its users get I/O errors once the agent lets go of it, too");
                // The clearing may wait for requests that only end with the last descriptor of the connection.
                let waiting = std::thread::Builder::new().name("mars-keeper-abort".into());
                waiting.spawn(move || Volume::give_up(volume))?;
                Ok(Answer::Done)
            }
            Op::Deposit { replica, negotiated } => self.deposit(replica, negotiated, descriptors, peer),
        }
    }

    fn hello(&self) -> Hello {
        let volumes = self.volumes();
        let held = volumes
            .iter()
            .map(|(replica, volume)| (*replica, volume.device()))
            .collect();
        let recorded = self.state().state.devices.clone();
        // Whose agent has ended meanwhile gives I/O errors: nobody can deposit it any more.
        let lives = |holder: Option<(u32, u64)>| holder.is_some_and(|(pid, ticks)| start_time(pid) == Some(ticks));
        let unheld = recorded
            .into_iter()
            .filter(|recorded| !volumes.contains_key(&recorded.replica) && lives(recorded.holder))
            .map(|recorded| recorded.replica)
            .collect();
        Hello {
            instance: self.instance,
            held,
            unheld,
            lost: self.lost.clone(),
        }
    }

    fn find_or_create(&self, replica: ReplicaId) -> Result<(Arc<Volume>, bool), Failure> {
        if let Ok(volume) = self.volume(replica) {
            return Ok((volume, false));
        }
        self.refuse_unheld(replica)?;
        let created = Volume::create(replica).map_err(|error| Failure::of("make a FUSE connection", &error))?;
        if !created.negotiated.resends() {
            warn!(%replica, "this kernel's FUSE cannot resend (Linux 6.9): a restart of the agent interrupts I/O");
        }
        let created = Arc::new(created);
        // Another connection may have been faster; then this one is dropped unused.
        let volume = self.volumes().entry(replica).or_insert_with(|| created.clone()).clone();
        let is_new = Arc::ptr_eq(&volume, &created);
        Ok((volume, is_new))
    }

    /// A device of an earlier keeper that a living agent serves must not get a second life beside it.
    fn refuse_unheld(&self, replica: ReplicaId) -> Result<(), Failure> {
        let mut state = self.state();
        let recorded = state
            .state
            .devices
            .iter()
            .find(|recorded| recorded.replica == replica)
            .cloned();
        let Some(Recorded { number, holder, .. }) = recorded else {
            return Ok(());
        };
        if let Some((pid, _)) = holder.filter(|(pid, ticks)| start_time(*pid) == Some(*ticks)) {
            return Err(Failure::HolderAlive { pid });
        }
        error!(%replica, number, "the agent that served this device without a keeper is gone: its users get I/O errors");
        if loopdev::backing_name(number).is_some_and(|name| name == file_name(replica)) {
            loopdev::clear_when_closed(number)?;
        }
        Ok(state.forget(replica)?)
    }

    fn hand_over(&self, volume: &Volume, peer: &Peer) -> Result<(), Failure> {
        let holder = volume.hand_to(peer.pidfd.try_clone()?, peer.pid)?;
        Ok(self.state().set_holder(volume.replica, holder)?)
    }

    fn deposit(
        &self,
        replica: ReplicaId,
        negotiated: crate::frontend::fuse::Negotiated,
        descriptors: Vec<OwnedFd>,
        peer: &Peer,
    ) -> Result<Answer, Failure> {
        let Ok([fuse, mount]) = <[OwnedFd; 2]>::try_from(descriptors) else {
            return Err(Failure::Failed(
                "a deposit has two descriptors: /dev/fuse and the mount".into(),
            ));
        };
        if self.volume(replica).is_ok() {
            return Ok(Answer::Done);
        }
        let number = self
            .state()
            .state
            .devices
            .iter()
            .find(|known| known.replica == replica)
            .map(|known| known.number);
        let ours = |number: &u32| loopdev::backing_name(*number).is_some_and(|name| name == file_name(replica));
        let device = number.filter(ours).map(loopdev::identity).transpose()?;
        let volume = Arc::new(Volume::adopt(replica, negotiated, fuse, mount, device));
        self.hand_over(&volume, peer)?;
        self.volumes().entry(replica).or_insert(volume);
        info!(%replica, "device deposited by its agent");
        Ok(Answer::Done)
    }

    fn drop_volume(&self, replica: ReplicaId) -> Result<(), Failure> {
        self.volumes().remove(&replica);
        Ok(self.state().forget(replica)?)
    }
}

fn peer_of(connection: &OwnedFd) -> io::Result<Peer> {
    let credentials = socket_peercred(connection)?;
    if !credentials.uid.is_root() {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "only root may use the keeper",
        ));
    }
    let pidfd = match peer_pidfd(connection) {
        Ok(pidfd) => pidfd,
        // Before Linux 6.5. The peer waits for our answer, so its process id still is its own.
        Err(_) => rustix::process::pidfd_open(credentials.pid, rustix::process::PidfdFlags::empty())?,
    };
    let pid = u32::try_from(credentials.pid.as_raw_nonzero().get()).map_err(io::Error::other)?;
    Ok(Peer { pidfd, pid })
}

#[expect(unsafe_code, reason = "SO_PEERPIDFD has no safe wrapper")]
fn peer_pidfd(connection: &OwnedFd) -> io::Result<OwnedFd> {
    const SO_PEERPIDFD: i32 = 77;
    let mut fd: i32 = -1;
    let mut len = libc::socklen_t::try_from(size_of::<i32>()).expect("4 fits");
    let socket = connection.as_fd().as_raw_fd();
    // SAFETY: the kernel writes one int into `fd`, whose size is given.
    let result = unsafe {
        libc::getsockopt(
            socket,
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut fd).cast(),
            &raw mut len,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: on success the kernel has installed a new descriptor that nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
