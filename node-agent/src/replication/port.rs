//! A real replica as replication sees it: orders through its handle, files beside its owner.

use super::entry::ReplicaPort;
use crate::shard::ReplicaHandle;
use futures::future::BoxFuture;
use mars_engine::api::{Command, LogView, ReplicaStatus, Reply};
use mars_engine::log::serve::SegmentLog;
use mars_engine::replication::digest::DataDisk;
use mars_engine::replication::messages::Refused;
use mars_engine::replication::source::LogReader;
use mars_engine::store::{FileId, Store};
use std::io;
use std::sync::Arc;
use tokio::sync::watch;

/// See the module.
#[derive(Clone)]
pub struct EnginePort<S: Store> {
    handle: ReplicaHandle,
    store: S,
}

impl<S: Store> EnginePort<S> {
    /// The replica behind `handle`, whose files are in `store`.
    #[must_use]
    pub fn new(handle: ReplicaHandle, store: S) -> Self {
        Self { handle, store }
    }
}

impl<S: Store> ReplicaPort for EnginePort<S> {
    fn command(&self, command: Command) -> BoxFuture<'static, Reply> {
        let handle = self.handle.clone();
        Box::pin(async move { handle.command(command).await })
    }

    fn status(&self) -> watch::Receiver<Arc<ReplicaStatus>> {
        self.handle.status()
    }

    fn log_view(&self) -> watch::Receiver<Arc<LogView>> {
        self.handle.log_view()
    }

    fn open_log(&self) -> Result<Box<dyn LogReader>, Refused> {
        Ok(Box::new(SegmentLog::new(self.store.clone())))
    }

    fn open_data(&self) -> io::Result<Arc<dyn DataDisk>> {
        let file = self.store.open(&FileId::Data)?;
        Ok(Arc::new(file))
    }
}
