//! The Kubernetes API of MARS: four cluster-scoped kinds in `mars.storage/v1alpha1`.
//!
//! | kind | written by | says |
//! |---|---|---|
//! | [`MarsResource`] | the user (spec), the operator (status) | one replicated block device |
//! | [`MarsReplica`] | the operator (spec), the agent of its node (status) | one node's copy |
//! | [`MarsNode`] | the administrator (spec), the agent (status) | pools, space and address of a node |
//! | [`MarsAction`] | the user (spec, once), the operator (status) | a one-shot verb |
//!
//! Invariant: `spec` is todo, `status` is actual, each has exactly one writer, and neither is inferred from the other.
//! What the schemas and CEL rules refuse, [`validate`] refuses too, for API servers that do not evaluate CEL.

#![forbid(unsafe_code)]
#![expect(
    clippy::duplicated_attributes,
    reason = "the printer columns of a kind often have the same type"
)]

pub mod action;
pub mod common;
pub mod conditions;
pub mod generate;
pub mod node;
pub mod replica;
pub mod resource;
pub mod size;
pub mod validate;

pub use action::{ActionPhase, MarsAction, MarsActionSpec, MarsActionStatus, Verb};
pub use common::{DataPolicy, DesignationRef, GrantCause, HistoryPosition, Lag, RateLimits, Retention, Switches};
pub use node::{MarsNode, MarsNodeSpec, MarsNodeStatus};
pub use replica::{ActualRole, MarsReplica, MarsReplicaSpec, MarsReplicaStatus, ReplicaData, WishRole};
pub use resource::{Designation, DesignationSource, MarsResource, MarsResourceSpec, MarsResourceStatus};
pub use size::Size;

/// API group of all kinds.
pub const GROUP: &str = "mars.storage";
/// The only version so far.
pub const VERSION: &str = "v1alpha1";
/// Finalizer the operator keeps on a `MarsResource` until its last replica is gone.
pub const RESOURCE_FINALIZER: &str = "mars.storage/replicas";
/// Finalizer on a `MarsReplica`: its agent removes it after closing the device, stopping the engine and carrying out `dataPolicy`.
pub const REPLICA_FINALIZER: &str = "mars.storage/agent";
/// Label on a `MarsReplica` with the name of its resource.
pub const LABEL_RESOURCE: &str = "mars.storage/resource";
/// Label on a `MarsReplica` with the name of its node, where that is a valid label value.
pub const LABEL_NODE: &str = "mars.storage/node";
/// Annotation on generated CRDs that keeps Helm from deleting them, and with them every object.
pub const HELM_KEEP: (&str, &str) = ("helm.sh/resource-policy", "keep");
/// Name of the Secret in the operator's namespace that holds the cluster uuid under [`CLUSTER_UUID_KEY`].
pub const CLUSTER_SECRET: &str = "mars-cluster";
/// Key of the cluster uuid in [`CLUSTER_SECRET`].
pub const CLUSTER_UUID_KEY: &str = "uuid";

/// Name of the `MarsReplica` of `resource` on `node`: `<resource>.<node>`, or a hashed form where that exceeds 253 characters.
///
/// The hash is over the full name, so two nodes with a long common prefix never share a replica.
#[must_use]
pub fn replica_name(resource: &str, node: &str) -> String {
    let full = format!("{resource}.{node}");
    if full.len() <= 253 {
        return full;
    }
    let hash = uuid::Uuid::new_v5(&uuid::Uuid::NAMESPACE_OID, full.as_bytes())
        .simple()
        .to_string();
    let mut short: String = full.chars().take(253 - 33).collect();
    short.truncate(short.trim_end_matches(['.', '-']).len());
    format!("{short}-{hash}")
}

#[cfg(test)]
mod tests {
    use super::replica_name;

    #[test]
    fn replica_names_are_readable_and_never_longer_than_kubernetes_allows() {
        assert_eq!(replica_name("mydata", "node-a"), "mydata.node-a");
        let long = "n".repeat(230);
        let first = replica_name("a-resource-with-a-rather-long-name", &format!("{long}1"));
        let second = replica_name("a-resource-with-a-rather-long-name", &format!("{long}2"));
        assert!(first.len() <= 253 && second.len() <= 253, "{first}");
        assert_ne!(first, second);
    }
}
