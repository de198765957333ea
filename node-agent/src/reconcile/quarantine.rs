//! A replica that was given up: by `ForgetNode` while its node was away, or because another one has taken its place.
//!
//! Invariants: its data is neither used nor announced nor erased. A device that its earlier stay as primary has left is given up: nobody
//! will serve it again, and users who would wait for ever get I/O errors instead, as when a machine dies.

use super::presence::Presence;
use super::replica::ReplicaTask;
use super::report::Problem;
use crate::frontend::users;
use std::time::Duration;
use tracing::warn;

impl ReplicaTask {
    /// Waits as a quarantined replica; true when it is wanted again.
    pub(super) async fn quarantined(&mut self) -> bool {
        loop {
            let order = self.orders.borrow_and_update().clone();
            if !order.forgotten {
                return true;
            }
            self.device.look(&self.node.runtime, None, Duration::ZERO).await;
            let mut failed = None;
            if self.device.presence().is_left_behind()
                && let Err(problem) = self.give_up_device(&order).await
            {
                warn!(replica = order.todo.name, "{}", problem.message);
                failed = Some(problem.message);
            }
            self.say_problem(&quarantine(&self.device.presence(), failed.as_deref()), &order);
            if self.pause(8).await.is_err() {
                return false;
            }
        }
    }
}

fn quarantine(device: &Presence, failed: Option<&str>) -> Problem {
    let about_device = match (device, failed) {
        (_, Some(failed)) => format!(". Tried again: {failed}"),
        (Presence::GivenUp { users }, None) if !users.is_empty() => format!(
            ". The device of its earlier stay as primary was given up, too: {} get I/O errors, as when a machine dies. Stop them (umount, \
             or stop the pod)",
            users::describe(users)
        ),
        (Presence::Unknown { reason }, None) => {
            format!(". Whether it has left a device that somebody uses is not known yet: {reason}")
        }
        _ => String::new(),
    };
    Problem {
        reason: "Quarantined",
        message: format!(
            "this replica was given up while its node was away: its data is kept, not announced and not used. \
             If no other replica has taken its place, remove it from MarsNode.spec.forgotten to take it back; else \
             delete its directory by hand once nothing in it is needed{about_device}"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frontend::DeviceUser;

    #[test]
    fn a62_a_quarantined_replica_names_who_uses_the_device_that_was_given_up() {
        let says = |device: &Presence, failed| quarantine(device, failed).message;
        let used = Presence::GivenUp {
            users: vec![DeviceUser::Open {
                pid: 7,
                command: "writer".into(),
            }],
        };
        assert!(says(&used, None).contains("writer") && says(&used, None).contains("I/O errors"));
        assert!(says(&used, Some("the keeper is silent")).contains("the keeper is silent"));
        assert!(!says(&Presence::Absent, None).contains("device"));
    }
}
