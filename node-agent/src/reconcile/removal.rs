//! The end of a replica, ordered by the deletion of its `MarsReplica`.
//!
//! Invariants: data goes only here, only with `dataPolicy: Delete`, and only when it is proven that nobody uses the device; the tombstone is durable before the finalizer is
//! removed, so that neither a crash nor a late object brings anything back. Every step may be repeated.

use super::cache::Tombstone;
use super::context::NodeContext;
use super::replica::ReplicaTask;
use super::report::Problem;
use super::superblock::{Belongs, ReplicaDir, SuperblockError};
use super::todo::{DataPolicy, Todo};
use crate::layout::LayoutError;
use crate::pool::backing::{self, BackingError};
use std::time::Duration;
use tracing::{info, warn};

/// Why the data is still there.
#[derive(Debug, thiserror::Error)]
enum RemovalError {
    #[error("its device is in use: {0}")]
    InUse(String),
    #[error(transparent)]
    Dir(#[from] SuperblockError),
    #[error(transparent)]
    Backing(#[from] BackingError),
    #[error(transparent)]
    Layout(#[from] LayoutError),
}

impl ReplicaTask {
    /// Carries the deletion out, trying until it is done or the agent stops. The engine is not running any more.
    pub(super) async fn remove(&mut self) {
        let mut failures = 0;
        loop {
            let order = self.orders.borrow_and_update().clone();
            let Some(policy) = order.todo.deletion else {
                // An object under deletion never comes back to life; a new one has a new uuid.
                return;
            };
            // Whoever ended the replica has made sure of it; this is the last moment at which it can be noticed.
            self.device.look(&self.node.runtime, None, Duration::ZERO).await;
            let in_use = self.device.presence().in_use();
            let (node, todo) = (self.node.clone(), order.todo.clone());
            let removal = move || match in_use {
                Some(users) => Err(RemovalError::InUse(users)),
                None => remove_data(&node, &todo, policy),
            };
            let problem = match tokio::task::spawn_blocking(removal).await {
                Ok(Ok(())) => match self.node.sink.remove_finalizer(&order.todo.name).await {
                    Ok(()) => {
                        info!(replica = order.todo.name, ?policy, "removed");
                        self.node.views.send_modify(|views| {
                            views.remove(&order.todo.replica);
                        });
                        return;
                    }
                    Err(error) => Problem {
                        reason: "Deleting",
                        message: format!("removed here, not yet reported: {error}"),
                    },
                },
                Ok(Err(error)) => Problem {
                    reason: "Deleting",
                    message: format!("not removed yet: {error}"),
                },
                Err(panic) => Problem {
                    reason: "Deleting",
                    message: format!("removal failed: {panic}"),
                },
            };
            if failures == 0 {
                warn!(replica = order.todo.name, "{}", problem.message);
            }
            self.say_problem(&problem, &order);
            failures += 1;
            if self.pause(failures).await.is_err() {
                return;
            }
        }
    }
}

fn remove_data(node: &NodeContext, todo: &Todo, policy: DataPolicy) -> Result<(), RemovalError> {
    if policy == DataPolicy::Delete {
        delete_files(node, todo)?;
        // A block device or a mount may come and go; the fact that this replica is over must not.
        node.cache.bury(&Tombstone {
            replica_uuid: todo.replica.0,
            resource: todo.resource.clone(),
            data_deleted: true,
            time: jiff::Timestamp::now().to_string(),
        })?;
    }
    Ok(node.cache.forget(todo.replica)?)
}

fn delete_files(node: &NodeContext, todo: &Todo) -> Result<(), RemovalError> {
    let path = node.layout.replica_dir(todo.replica.0);
    if !path.is_dir() {
        // Removed by an attempt that was cut short, or never made. The store itself is there: it was checked at start.
        return Ok(());
    }
    let belongs = Belongs {
        cluster: node.cluster,
        node: node.node,
        resource: todo.resource_id,
        replica: todo.replica,
    };
    let dir = ReplicaDir::open(&path, belongs, &todo.resource, todo.size_bytes, false)?;
    // The data first: its place is known only from the directory.
    if let Some(record) = &dir.superblock.backing {
        backing::delete(record, &mut node.pools())?;
    }
    Ok(dir.remove()?)
}
