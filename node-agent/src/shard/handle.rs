//! The handle to one replica: orders, published status, and its block device.
//!
//! Invariants: a device exists only while its engine is primary. `attach` refuses before, `Close` is refused while a
//! device is attached, and `detach` refuses while anybody uses it – naming who. A device says that it needs no flushes only while
//! the engine completes nothing that is not durable, at each moment, also of a device that a former life has left in another mode.

use super::Runtime;
use super::host::{Mailbox, Message, Stopped};
use crate::frontend::{
    CloseError, Device, DeviceName, DeviceUser, FrontendChoice, FrontendError, Frontends, OpenParams, Resized, Seat,
    link, users,
};
use mars_engine::api::{Answer, Command, Durability, LogView, Refusal, ReplicaStatus, Reply, Role, Tuning};
use mars_engine::types::ReplicaId;
use std::sync::Arc;
use tokio::sync::{Mutex, watch};

/// What the device of a replica should look like.
#[derive(Debug, Clone)]
pub struct AttachParams {
    /// Name of the resource; the link in the device directory has it.
    pub name: DeviceName,
    /// Whose device it is; how a restarted agent finds it again.
    pub replica: ReplicaId,
    /// Which frontend.
    pub frontend: FrontendChoice,
    /// What the engine shall keep to; its durability decides whether the device advertises a volatile cache.
    pub tuning: Tuning,
    /// Logical block size (bytes): 512 unless the data disk itself has 4,096.
    pub logical_block_bytes: u32,
}

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// Only a primary has a device.
    #[error("a device needs an actual primary, this replica is {0:?}: promote it first")]
    NotPrimary(Role),
    /// There is one already.
    #[error("the device is attached already at {}", .0.link.display())]
    Attached(Box<Device>),
    /// The frontend could not make it.
    #[error(transparent)]
    Frontend(#[from] FrontendError),
    /// The engine did not take the tuning; before the device was made, or after: then it works, each write waiting to be durable.
    #[error("the durability of the device could not be set: {0}")]
    Tuning(Refusal),
    /// The engine is gone.
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

/// Why there still is a device.
#[derive(Debug, thiserror::Error)]
pub enum DetachError {
    /// In use; nothing was changed.
    #[error("the device is in use: {}; stop that first", users::describe(.0))]
    Busy(Vec<DeviceUser>),
    /// The frontend could not close it.
    #[error(transparent)]
    Frontend(FrontendError),
    /// The engine is gone.
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

/// See the module. Cheap to clone; the replica ends when the last clone is gone (its device then pauses).
#[derive(Clone)]
pub struct ReplicaHandle {
    inner: Arc<Inner>,
}

struct Inner {
    mailbox: Mailbox,
    frontends: Arc<Frontends>,
    runtime: Runtime,
    /// Held during attach, detach, resize and changes of tuning: one at a time.
    changing: Mutex<()>,
    device: watch::Sender<Option<Device>>,
}

impl ReplicaHandle {
    pub(super) fn new(mailbox: Mailbox, frontends: Arc<Frontends>, runtime: Runtime) -> Self {
        let device = watch::channel(None).0;
        Self {
            inner: Arc::new(Inner {
                mailbox,
                frontends,
                runtime,
                changing: Mutex::new(()),
                device,
            }),
        }
    }

    /// Gives an order to the engine and waits for its answer.
    ///
    /// `Close` and `StepDown` are refused while a device is attached. `Resize` also grows an attached device. `SetTuning` changes the
    /// advertised cache in the order that never promises more than the engine keeps.
    ///
    /// # Errors
    /// The engine's refusal; [`Refusal::Io`] when the engine has stopped or the device could not follow.
    pub async fn command(&self, command: Command) -> Reply {
        match command {
            Command::Close { .. } | Command::StepDown { .. } => {
                let _changing = self.inner.changing.lock().await;
                if self.device_now().is_some() {
                    let hint = "its device is attached: detach it first";
                    return Err(Refusal::WrongRole {
                        role: Role::Primary,
                        hint,
                    });
                }
                self.order(command).await
            }
            Command::Resize { .. } => {
                let _changing = self.inner.changing.lock().await;
                let answer = self.order(command).await?;
                self.follow_size()
                    .await
                    .map_err(|error| Refusal::Io(error.to_string()))?;
                Ok(answer)
            }
            Command::SetTuning(tuning) => {
                let _changing = self.inner.changing.lock().await;
                let volatile = tuning.durability == Durability::OnFlush;
                if volatile {
                    self.set_volatile_cache(true).await?;
                }
                let answer = self.order(command).await?;
                if !volatile {
                    self.set_volatile_cache(false).await?;
                }
                Ok(answer)
            }
            _ => self.order(command).await,
        }
    }

    async fn order(&self, command: Command) -> Result<Answer, Refusal> {
        let asked = self.inner.mailbox.ask(|to| Message::Command(command, to)).await;
        asked.unwrap_or_else(|stopped| Err(Refusal::Io(stopped.to_string())))
    }

    /// The newest status, and every later one.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<Arc<ReplicaStatus>> {
        self.inner.mailbox.status.clone()
    }

    /// What may be served to peers, and every later state of it.
    #[must_use]
    pub fn log_view(&self) -> watch::Receiver<Arc<LogView>> {
        self.inner.mailbox.log_view.clone()
    }

    /// The attached device, and every later one.
    #[must_use]
    pub fn device(&self) -> watch::Receiver<Option<Device>> {
        self.inner.device.subscribe()
    }

    fn device_now(&self) -> Option<Device> {
        self.inner.device.borrow().clone()
    }

    /// Makes the block device, or takes over the one a former life of this agent left, and links it. Goes on when whoever asked stops
    /// waiting: a device that this handle did not know of would not keep the role from ending under its users.
    ///
    /// # Errors
    /// See [`AttachError`]; unless it says otherwise there is no link then, and no device that was not there before.
    pub async fn attach(&self, params: AttachParams) -> Result<Device, AttachError> {
        let handle = self.clone();
        finished(tokio::spawn(async move { handle.make_device(params).await })).await
    }

    async fn make_device(&self, params: AttachParams) -> Result<Device, AttachError> {
        let _changing = self.inner.changing.lock().await;
        if let Some(device) = self.device_now() {
            return Err(AttachError::Attached(Box::new(device)));
        }
        let status = self.inner.mailbox.status.borrow().clone();
        if status.role != Role::Primary {
            return Err(AttachError::NotPrimary(status.role));
        }
        let open = OpenParams {
            name: params.name,
            replica: params.replica,
            size_bytes: status.size_bytes,
            logical_block_bytes: params.logical_block_bytes,
            volatile_cache: params.tuning.durability == Durability::OnFlush,
        };
        // A device that was left serves its users from the first moment on, in the mode in which it was left. Until it has the right
        // one, and what was completed before is durable, nothing is completed that is not.
        let strict = Tuning {
            durability: Durability::EveryWrite,
            ..params.tuning
        };
        self.order(Command::SetTuning(strict))
            .await
            .map_err(AttachError::Tuning)?;
        let seat = Seat::new(self.inner.mailbox.clone(), self.inner.runtime.clone());
        let frontends = self.inner.frontends.clone();
        let device = blocking(move || frontends.open(params.frontend, &open, &seat)).await?;
        self.inner.device.send_replace(Some(device.clone()));
        if params.tuning != strict {
            self.order(Command::SetTuning(params.tuning))
                .await
                .map_err(AttachError::Tuning)?;
        }
        Ok(device)
    }

    /// Removes the link, then the device; goes on when whoever asked stops waiting. Without a device there is nothing to do.
    ///
    /// # Errors
    /// See [`DetachError`]; when busy, device and link are as before.
    pub async fn detach(&self) -> Result<(), DetachError> {
        let handle = self.clone();
        finished(tokio::spawn(async move { handle.remove_device().await })).await
    }

    async fn remove_device(&self) -> Result<(), DetachError> {
        let _changing = self.inner.changing.lock().await;
        let Some(device) = self.device_now() else { return Ok(()) };
        let frontends = self.inner.frontends.clone();
        let seat = Seat::new(self.inner.mailbox.clone(), self.inner.runtime.clone());
        blocking(move || frontends.close(&device, &seat))
            .await
            .map_err(|error| match error {
                CloseError::Busy(users) => DetachError::Busy(users),
                CloseError::Frontend(error) => DetachError::Frontend(error),
            })?;
        self.inner.device.send_replace(None);
        Ok(())
    }

    /// The device that a former life of the agent left for this replica and that nobody serves, if there is one.
    ///
    /// # Errors
    /// When that cannot be found out.
    pub async fn leftover(&self, replica: ReplicaId) -> Result<Option<Device>, FrontendError> {
        let _changing = self.inner.changing.lock().await;
        if self.device_now().is_some() {
            return Ok(None);
        }
        let frontends = self.inner.frontends.clone();
        blocking(move || frontends.leftover(replica)).await
    }

    /// Gives up a device that was left: whoever uses it gets I/O errors. The caller has made sure that this replica will not
    /// serve it again.
    ///
    /// # Errors
    /// See [`FrontendError`]; it is still there then.
    pub async fn discard(&self, leftover: Device) -> Result<(), FrontendError> {
        let _changing = self.inner.changing.lock().await;
        let frontends = self.inner.frontends.clone();
        blocking(move || frontends.discard(&leftover)).await
    }

    /// Who uses the device now. Looks at /proc and sysfs only; the device itself is not touched.
    pub async fn users(&self) -> Vec<DeviceUser> {
        match self.device_now() {
            Some(device) => blocking(move || users::of(&device)).await,
            None => Vec::new(),
        }
    }

    /// Lets the device show the size the engine has now. Call it when a RESIZE took effect without this handle's
    /// `command` (for example after recovery).
    ///
    /// # Errors
    /// When the frontend cannot change the size; `Ok(Resized::AtNextOpen)` when the kernel cannot do it while open.
    pub async fn resize_device(&self) -> Result<Resized, FrontendError> {
        let _changing = self.inner.changing.lock().await;
        self.follow_size().await
    }

    async fn follow_size(&self) -> Result<Resized, FrontendError> {
        let Some(mut device) = self.device_now() else {
            return Ok(Resized::Done);
        };
        let size_bytes = self.inner.mailbox.status.borrow().size_bytes;
        if size_bytes == device.size_bytes {
            return Ok(Resized::Done);
        }
        let (frontends, old) = (self.inner.frontends.clone(), device.clone());
        let resized = blocking(move || frontends.resize(&old, size_bytes)).await?;
        if resized == Resized::Done {
            device.size_bytes = size_bytes;
        }
        device.resize_pending = resized == Resized::AtNextOpen;
        self.inner.device.send_replace(Some(device));
        Ok(resized)
    }

    async fn set_volatile_cache(&self, volatile: bool) -> Result<(), Refusal> {
        let Some(device) = self.device_now() else { return Ok(()) };
        let frontends = self.inner.frontends.clone();
        blocking(move || frontends.set_volatile_cache(&device, volatile))
            .await
            .map_err(|error| Refusal::Io(error.to_string()))
    }

    /// Ends this life of the replica: stops taking requests, lets the engine write back and save its state, drops it. An
    /// attached device is left to the next life of the agent (its users see a pause): to remove it, `detach` before.
    ///
    /// # Errors
    /// What the engine said to `Command::Shutdown`; it is dropped in any case.
    pub async fn shutdown(&self) -> Result<(), Refusal> {
        let _changing = self.inner.changing.lock().await;
        let stopped = |stopped: Stopped| Refusal::Io(stopped.to_string());
        self.inner.mailbox.ask(Message::RemoveSource).await.map_err(stopped)?;
        let answer = self.order(Command::Shutdown).await;
        self.inner.mailbox.ask(Message::Stop).await.map_err(stopped)?;
        answer.map(|_| ())
    }

    /// Removes leftover links of former lives from the device directory that point to none of `keep`.
    ///
    /// # Errors
    /// When the directory cannot be read or changed.
    pub fn remove_stale_links(
        frontends: &Frontends,
        keep: &[Device],
    ) -> Result<Vec<std::path::PathBuf>, FrontendError> {
        link::remove_stale(frontends.link_dir(), keep)
    }
}

/// Runs blocking device work beside the async runtime.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    finished(tokio::task::spawn_blocking(work)).await
}

async fn finished<T>(task: tokio::task::JoinHandle<T>) -> T {
    match task.await {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

#[cfg(test)]
#[path = "handle_tests.rs"]
mod tests;
