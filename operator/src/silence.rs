//! Says in a `MarsNode` that its agent has not been heard: what it last told about itself would else stand there for ever.
//!
//! Invariants: the status is the agent's; of it the operator writes one condition, `Silent`, guarded by the resourceVersion of the
//! very report that has not changed – an agent that reports meanwhile wins. Silence is measured by our own clock alone, and longer than
//! what counts as silence elsewhere, so that an agent that restarts is not written about. The agent's next report ends the
//! condition: it brings its own list.

use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use mars_crds::conditions::{self, Truth};
use mars_crds::{MarsNode, MarsNodeStatus};
use serde_json::json;

use crate::apply::FIELD_MANAGER;
use crate::cache::{Cache, Kind};
use crate::events::Recorder;
use crate::hearing::Hearing;
use crate::plan::{EventNote, Severity};
use crate::world::Settings;

/// Looks at all nodes, and writes where silence has begun or ended.
pub(crate) async fn pass(client: &Client, recorder: &Recorder, cache: &Cache, hearing: &Hearing, settings: &Settings) {
    for object in cache.list(Kind::Node) {
        let Ok(node) = object.as_ref().clone().try_parse::<MarsNode>() else {
            continue;
        };
        let name = node.metadata.name.clone().unwrap_or_default();
        let Some(change) = change(&node, hearing.unheard_seconds(&name), hearing.is_alive(&name), settings) else {
            continue;
        };
        match write(client, &node, &name, &change).await {
            Ok(()) => {
                tracing::info!(node = name, "{}", change.event.message);
                recorder.emit(&node, &change.event).await;
            }
            Err(kube::Error::Api(status)) if status.is_conflict() || status.is_not_found() => {
                tracing::debug!(node = name, "it has reported meanwhile");
            }
            Err(error) => tracing::warn!(node = name, %error, "its silence could not be written; tried again"),
        }
    }
}

/// What to write.
struct Change {
    status: MarsNodeStatus,
    event: EventNote,
}

/// `alive`: its reports have been seen to change.
fn change(node: &MarsNode, silent_seconds: i64, alive: bool, settings: &Settings) -> Option<Change> {
    let mut status = node.status.clone()?;
    let name = node.metadata.name.as_deref().unwrap_or_default();
    let said = conditions::get(&status.conditions, conditions::SILENT).is_some_and(|silent| silent.status == "True");
    if !said && silent_seconds > settings.node_silent_seconds {
        let message = format!(
            "the agent has not reported since LAST-SEEN, everything else here is as of then: look at the pod of mars-node-agent on {name} \
             and at the machine. If it is lost for ever, see the MarsActions Failover and ForgetNode"
        );
        let now = k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(jiff::Timestamp::now());
        let generation = node.metadata.generation;
        let list = &mut status.conditions;
        conditions::set(
            list,
            conditions::SILENT,
            Truth::True,
            "AgentSilent",
            &message,
            generation,
            &now,
        );
        let event = EventNote {
            severity: Severity::Warning,
            reason: "AgentSilent".to_owned(),
            message,
        };
        return Some(Change { status, event });
    }
    if said && alive && silent_seconds <= settings.liveness_seconds {
        status
            .conditions
            .retain(|condition| condition.type_ != conditions::SILENT);
        let event = EventNote {
            severity: Severity::Normal,
            reason: "AgentHeard".to_owned(),
            message: format!("the agent of {name} reports again"),
        };
        return Some(Change { status, event });
    }
    None
}

async fn write(client: &Client, node: &MarsNode, name: &str, change: &Change) -> Result<(), kube::Error> {
    let api: Api<MarsNode> = Api::all(client.clone());
    let patch = json!({
        "metadata": {"resourceVersion": node.metadata.resource_version},
        "status": {"conditions": change.status.conditions},
    });
    let params = PatchParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PatchParams::default()
    };
    api.patch_status(name, &params, &Patch::Merge(patch)).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mars_crds::MarsNodeSpec;

    fn node() -> MarsNode {
        let mut node = MarsNode::new("a", MarsNodeSpec::default());
        node.status = Some(MarsNodeStatus::default());
        node
    }

    #[test]
    fn silence_is_written_once_and_late_and_ended_only_by_a_report_that_was_seen_to_come() {
        let settings = Settings::default();
        let mut node = node();
        assert!(change(&node, settings.liveness_seconds + 1, true, &settings).is_none());
        let silent = change(&node, settings.node_silent_seconds + 1, false, &settings).expect("silent");
        node.status = Some(silent.status);
        assert!(change(&node, 100_000, false, &settings).is_none(), "said already");
        assert!(
            change(&node, settings.liveness_seconds + 1, true, &settings).is_none(),
            "in between nothing changes"
        );
        assert!(
            change(&node, 0, false, &settings).is_none(),
            "an operator that has just started does not know yet"
        );
        let heard = change(&node, 1, true, &settings).expect("heard");
        assert!(heard.status.conditions.is_empty());
        node.status = None;
        assert!(
            change(&node, 100_000, false, &settings).is_none(),
            "it never said anything"
        );
    }
}
