//! Carries out a plan, step by step, in its order.
//!
//! Invariant: a step that fails ends the round with its own words in the report; nothing behind it is tried on a wrong footing.

use super::disk;
use super::facts::RefusedPromote;
use super::opening;
use super::plan::{Plan, Step, ends_in_own_epoch};
use super::presence::Presence;
use super::replica::ReplicaTask;
use super::report::Problem;
use super::running::Running;
use super::todo::Todo;
use crate::pool::backing::{self, Backing};
use crate::shard::{AttachError, AttachParams};
use mars_engine::api::{Command, DataState, Refusal, Role};
use mars_engine::lineage::Cause;
use mars_engine::types::Designation;
use std::time::Duration;
use tracing::{info, warn};
use uuid::Uuid;

/// Making a device waits for the keeper and the kernel; beyond this somebody has to look.
const ATTACH_LIMIT: Duration = Duration::from_secs(90);
/// Orders are answered at once, or when a disk has done something. Longer than this a replica does not wait: it has to report, and to hear of newer
/// orders.
const ORDER_LIMIT: Duration = Duration::from_secs(20);
/// A role that takes longer to change is watched instead of waited for.
const ROLE_MOMENT: Duration = Duration::from_secs(2);
/// A failover replays the local log first.
const FAILOVER_LIMIT: Duration = Duration::from_mins(4);

pub(super) type Outcome = Result<(), Problem>;

pub(super) fn problem(reason: &'static str, error: &impl std::fmt::Display) -> Problem {
    Problem {
        reason,
        message: error.to_string(),
    }
}

impl ReplicaTask {
    /// Carries out the steps; true when at least one was done. A failure is left in `running.failed`.
    pub(super) async fn execute(&self, todo: &Todo, plan: &Plan, running: &mut Running) -> bool {
        let mut progress = false;
        for step in &plan.steps {
            let outcome = self.step(todo, step, running).await;
            match outcome {
                Ok(()) => {
                    info!(replica = todo.name, ?step, "done");
                    progress = true;
                    running.failed = None;
                }
                Err(failed) => {
                    if running.failed.as_ref() != Some(&failed) {
                        warn!(replica = todo.name, ?step, "not done: {}", failed.message);
                    }
                    running.failed = Some(failed);
                    return progress;
                }
            }
        }
        if plan.steps.is_empty() {
            running.failed = None;
        }
        progress
    }

    async fn step(&self, todo: &Todo, step: &Step, running: &mut Running) -> Outcome {
        match step {
            Step::SetMembers(members) => command(running, Command::SetMembers(members.clone())).await,
            Step::SetSwitches(switches) => command(running, Command::SetSwitches(switches.clone())).await,
            Step::SetTuning(tuning) => {
                command(running, Command::SetTuning(*tuning)).await?;
                running.tuning = Some(*tuning);
                Ok(())
            }
            Step::Observe(designation) => {
                command(
                    running,
                    Command::Observe {
                        designation: *designation,
                    },
                )
                .await
            }
            Step::Resume(designation) => {
                begin(
                    running,
                    Command::Resume {
                        designation: *designation,
                    },
                )
                .await
            }
            Step::Promote { designation, cause } => promote(running, *designation, *cause).await,
            Step::RefusePromote { designation, reason } => remember(running, |done| {
                done.refused_promote = Some(RefusedPromote {
                    designation: *designation,
                    reason: reason.clone(),
                });
            }),
            Step::Attach => self.attach(todo, running).await,
            Step::Detach => running
                .handle
                .detach()
                .await
                .map_err(|error| problem("DetachFailed", &error)),
            Step::Discard => discard(todo, running).await,
            Step::Close { designation, to } => {
                begin(
                    running,
                    Command::Close {
                        designation: *designation,
                        to: *to,
                    },
                )
                .await
            }
            Step::StepDown(designation) => {
                begin(
                    running,
                    Command::StepDown {
                        designation: *designation,
                    },
                )
                .await
            }
            Step::DetachDisk => disk::detach(todo, running),
            Step::AttachDisk => disk::attach(&self.node, todo, running),
            Step::GrowDisk(size_bytes) => grow_disk(running, *size_bytes),
            Step::Resize(size_bytes) => {
                command(
                    running,
                    Command::Resize {
                        size_bytes: *size_bytes,
                    },
                )
                .await
            }
            Step::GrowDevice => {
                let grown = running.handle.resize_device().await;
                grown.map(drop).map_err(|error| problem("ResizeFailed", &error))
            }
            Step::Invalidate(id) => {
                command(running, Command::Invalidate).await?;
                remember(running, |done| {
                    done.invalidate = Some(*id);
                    // Everything will be compared: what a detached disk holds does not matter any more.
                    if let Some(detached) = &mut done.detached {
                        detached.witness = None;
                    }
                })
            }
            Step::NothingToFake(id) => remember(running, |done| done.fake_sync = Some(*id)),
            Step::Rotate(id) => {
                command(running, Command::Rotate).await?;
                remember(running, |done| done.rotate = Some(*id))
            }
        }
    }

    async fn attach(&self, todo: &Todo, running: &mut Running) -> Outcome {
        let params = AttachParams {
            name: todo.resource.parse().map_err(|error| problem("AttachFailed", &error))?,
            replica: todo.replica,
            frontend: self.node.frontend,
            tuning: todo.tuning,
            logical_block_bytes: running.backing.as_ref().map_or(512, Backing::logical_block_bytes),
        };
        match tokio::time::timeout(ATTACH_LIMIT, running.handle.attach(params)).await {
            Ok(Ok(device)) => {
                info!(replica = todo.name, device = %device.node.display(), link = %device.link.display(), "device is ready");
                Ok(())
            }
            // An earlier attempt took longer than was waited for.
            Ok(Err(AttachError::Attached(_))) => Ok(()),
            Ok(Err(error)) => {
                if let AttachError::Tuning(_) = &error {
                    // To be said again.
                    running.tuning = None;
                }
                Err(problem("AttachFailed", &error))
            }
            Err(_) => {
                // The attempt goes on; how it ends is not heard of, so this is to be said again.
                running.tuning = None;
                let message = format!(
                    "the device was not made within {} s: look at the log of the device keeper",
                    ATTACH_LIMIT.as_secs()
                );
                Err(Problem {
                    reason: "AttachFailed",
                    message,
                })
            }
        }
    }

    /// An acknowledged failover without the API server: one more than the highest number known.
    pub(super) async fn failover(&self, running: &mut Running) -> Result<Designation, String> {
        let order = self.order();
        let status = running.handle.status().borrow().clone();
        if status.role == Role::Primary {
            return Err("this replica is primary already".into());
        }
        if status.role != Role::Secondary {
            return Err(format!(
                "this replica is changing its role ({:?}): ask again in a moment",
                status.role
            ));
        }
        if running.done.detached.is_some() {
            return Err(
                "the data disk here is detached (attach is off): unmount it and switch attach on, or fail over to another member"
                    .into(),
            );
        }
        if status.data != DataState::Consistent {
            return Err(format!(
                "the data here is not consistent ({:?}): fail over to another member",
                status.data
            ));
        }
        running.look(&self.node.runtime, Duration::ZERO).await;
        let device = running.device.presence();
        if let Presence::Unknown { reason } = &device {
            return Err(format!(
                "whether a device of an earlier stay as primary is in use here cannot be told ({reason}): look at the device keeper, \
                 then ask again"
            ));
        }
        if device.is_left_behind() && !ends_in_own_epoch(order.todo.replica, &status) {
            discard(&order.todo, running).await.map_err(|failed| failed.message)?;
        }
        let highest = running.highest_designation(&order.todo);
        let designation = Designation {
            number: highest + 1,
            id: Uuid::new_v4(),
        };
        warn!(
            replica = order.todo.name,
            number = designation.number,
            "failover by local command"
        );
        promote(running, designation, Cause::Failover)
            .await
            .map_err(|failed| failed.message)?;
        let mut engine = running.handle.status();
        let settled = engine.wait_for(|status| status.role != Role::Promoting);
        match tokio::time::timeout(FAILOVER_LIMIT, settled).await {
            Ok(Ok(status)) if status.role == Role::Primary => {}
            Ok(Ok(_)) => return Err("the promotion was broken off: look at the agent's log, then ask again".into()),
            Ok(Err(_)) => return Err("the engine has stopped: restart the agent".into()),
            Err(_) => return Err("the local log is still being replayed: look at the status for the role".into()),
        }
        Ok(designation)
    }
}

/// Gives an order. One whose answer waits for a store or disk that does not work now goes on by itself, and is given again.
async fn command(running: &Running, command: Command) -> Outcome {
    match tokio::time::timeout(ORDER_LIMIT, running.handle.command(command)).await {
        Ok(reply) => reply.map(drop).map_err(|refusal| problem(word(&refusal), &refusal)),
        Err(_) => Err(Problem {
            reason: "EngineWaits",
            message: format!(
                "the engine has not carried out an order within {} s: its other conditions say what log store, saved state or data \
                 disk lack",
                ORDER_LIMIT.as_secs()
            ),
        }),
    }
}

/// A refusal in one word.
fn word(refusal: &Refusal) -> &'static str {
    match refusal {
        Refusal::StaleDesignation { .. } => "StaleDesignation",
        Refusal::WrongRole { .. } => "WrongRole",
        Refusal::Inconsistent { .. } => "NotConsistent",
        Refusal::NotContinuing { .. } => "NotContinuing",
        Refusal::Closed { .. } => "Closed",
        Refusal::Invalid(_) => "Invalid",
        Refusal::Io(_) => "EngineFailed",
    }
}

/// Begins a change of role. What takes longer than a moment goes on by itself: the role says so, and the plan waits for it.
async fn begin(running: &Running, order: Command) -> Outcome {
    tokio::time::timeout(ROLE_MOMENT, command(running, order))
        .await
        .unwrap_or(Ok(()))
}

async fn promote(running: &Running, designation: Designation, cause: Cause) -> Outcome {
    begin(running, Command::Promote { designation, cause }).await
}

pub(super) fn remember(running: &mut Running, change: impl FnOnce(&mut super::facts::Done)) -> Outcome {
    let mut done = running.done.clone();
    change(&mut done);
    done.keep_earlier(&running.done);
    opening::write_done(&running.dir.path, &done).map_err(|error| problem("StateFailed", &error))?;
    running.done = done;
    Ok(())
}

async fn discard(todo: &Todo, running: &mut Running) -> Outcome {
    let Some(device) = running.device.left_behind().cloned() else {
        return Ok(());
    };
    warn!(
        replica = todo.name,
        device = %device.node.display(),
        "the device of an earlier stay as primary is given up, its users get I/O errors"
    );
    let given_up = running.handle.discard(device).await;
    given_up.map_err(|error| problem("DiscardFailed", &error))?;
    running.device.gave_up();
    Ok(())
}

fn grow_disk(running: &mut Running, size_bytes: u64) -> Outcome {
    // Allocating a file may take long, but this replica's round has nothing else to do; the data path goes on.
    let Some(backing) = &mut running.backing else {
        let detached = "the data disk is detached, so it cannot grow: switch attach on";
        return Err(problem("Detached", &detached));
    };
    let grown = tokio::task::block_in_place(|| backing::grow(backing, size_bytes));
    grown.map_err(|error| problem("DiskTooSmall", &error))?;
    let updated = running
        .dir
        .update(|superblock| superblock.size_bytes = superblock.size_bytes.max(size_bytes));
    updated.map_err(|error| problem("StateFailed", &error))
}
