//! The checks of the schemas and CEL rules once more in Rust, for API servers that do not evaluate CEL and for objects
//! that were stored before a rule existed.
//!
//! Invariant: what CEL refuses is refused here; a test feeds both with the same objects. Every problem names the field
//! and says what to write instead.

use std::collections::BTreeSet;
use std::fmt;
use uuid::Uuid;

use crate::common::{Backing, DurationText};
use crate::{MarsAction, MarsNode, MarsReplica, MarsResource, MarsResourceSpec, Size, Verb, WishRole};

/// Devices are multiples of this (bytes).
pub const SIZE_STEP_BYTES: i64 = 4096;
/// Devices are larger than this (bytes).
pub const SIZE_FLOOR_BYTES: i64 = 64 << 10;
/// Most members of a resource.
pub const MAX_REPLICAS: usize = 16;

/// Something that is wrong with an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Path of the field, as in `spec.replicas[1].device`.
    pub field: String,
    /// What is wrong and what to write instead.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.message)
    }
}

/// All problems in one line, for a condition.
#[must_use]
pub fn summary(problems: &[Problem]) -> String {
    problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

#[derive(Default)]
struct Problems(Vec<Problem>);

impl Problems {
    fn add(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.0.push(Problem {
            field: field.into(),
            message: message.into(),
        });
    }

    fn require(&mut self, holds: bool, field: impl Into<String>, message: impl Into<String>) {
        if !holds {
            self.add(field, message);
        }
    }
}

/// Checks a `MarsResource`; with `old`, also that nothing immutable changes and that the size does not shrink.
#[must_use]
pub fn resource(new: &MarsResource, old: Option<&MarsResource>) -> Vec<Problem> {
    let mut problems = Problems::default();
    let name = new.metadata.name.as_deref().unwrap_or_default();
    problems.require(
        is_dns_label(name),
        "metadata.name",
        "must be a DNS label: at most 63 of a-z, 0-9 and '-', starting and ending with a letter or digit",
    );
    resource_size(&mut problems, &new.spec, old.map(|old| &old.spec));
    resource_members(&mut problems, &new.spec, old.map(|old| &old.spec));
    for (field, size) in [
        ("spec.retention.maxLog", &new.spec.retention.max_log),
        ("spec.limits.fetchPerSecond", &new.spec.limits.fetch_per_second),
        ("spec.limits.syncPerSecond", &new.spec.limits.sync_per_second),
    ] {
        if let Some(Err(error)) = size.as_ref().map(Size::bytes) {
            problems.add(field, error.to_string());
        }
    }
    duration(&mut problems, "spec.rpo", new.spec.rpo);
    duration(&mut problems, "spec.failover.after", new.spec.failover.after);
    problems.0
}

fn resource_size(problems: &mut Problems, new: &MarsResourceSpec, old: Option<&MarsResourceSpec>) {
    match new.size.bytes() {
        Err(error) => problems.add("spec.size", error.to_string()),
        Ok(bytes) => {
            problems.require(
                bytes % SIZE_STEP_BYTES == 0 && bytes > SIZE_FLOOR_BYTES,
                "spec.size",
                format!("{} is not a multiple of 4096 bytes and more than 64Ki", new.size),
            );
            if let Some(Ok(before)) = old.map(|old| old.size.bytes()) {
                problems.require(
                    bytes >= before,
                    "spec.size",
                    format!("never shrinks ({before} to {bytes} bytes): create a smaller resource and copy the data"),
                );
            }
        }
    }
}

fn resource_members(problems: &mut Problems, new: &MarsResourceSpec, old: Option<&MarsResourceSpec>) {
    let count = new.replicas.len();
    problems.require(
        (1..=MAX_REPLICAS).contains(&count),
        "spec.replicas",
        "needs 1 to 16 entries",
    );
    let mut nodes = BTreeSet::new();
    for (index, member) in new.replicas.iter().enumerate() {
        let field = format!("spec.replicas[{index}]");
        problems.require(
            is_node_name(&member.node),
            format!("{field}.node"),
            "must be the name of a node",
        );
        problems.require(
            nodes.insert(member.node.as_str()),
            format!("{field}.node"),
            format!("{} is a member already: name each node once", member.node),
        );
        backing(problems, &field, &member.backing());
        duration(problems, &format!("{field}.applyDelay"), member.apply_delay);
        let before = old.and_then(|old| old.replicas.iter().find(|other| other.node == member.node));
        if let Some(before) = before {
            let advice = "is immutable: remove the replica, then add it again";
            problems.require(before.device == member.device, format!("{field}.device"), advice);
            problems.require(before.pool == member.pool, format!("{field}.pool"), advice);
        }
    }
    problems.require(
        new.primary.is_empty() || nodes.contains(new.primary.as_str()),
        "spec.primary",
        format!("{:?} must be one of replicas[].node, or empty", new.primary),
    );
    let attached = new.attached_to.as_deref().unwrap_or_default();
    problems.require(
        attached.is_empty() || nodes.contains(attached),
        "spec.attachedTo",
        format!("{attached:?} must be one of replicas[].node, or absent"),
    );
}

/// Checks a `MarsReplica`; with `old`, also that its identity stays and nothing goes back.
#[must_use]
pub fn replica(new: &MarsReplica, old: Option<&MarsReplica>) -> Vec<Problem> {
    let mut problems = Problems::default();
    let spec = &new.spec;
    problems.require(
        is_dns_label(&spec.resource),
        "spec.resource",
        "must be the name of a MarsResource",
    );
    problems.require(is_node_name(&spec.node), "spec.node", "must be the name of a node");
    problems.require(
        spec.size_bytes > SIZE_FLOOR_BYTES && spec.size_bytes % SIZE_STEP_BYTES == 0,
        "spec.sizeBytes",
        "must be a multiple of 4096 and more than 65536",
    );
    backing(&mut problems, "spec.backing", &spec.backing);
    problems.require(
        spec.role != WishRole::Primary || spec.designation.is_some(),
        "spec.designation",
        "a grant of the primary role needs a designation",
    );
    if let Some(old) = old.map(|old| &old.spec) {
        problems.require(
            (&spec.resource, &spec.node, spec.resource_uuid, spec.replica_uuid)
                == (&old.resource, &old.node, old.resource_uuid, old.replica_uuid),
            "spec",
            "resource, node, resourceUuid and replicaUuid are immutable",
        );
        problems.require(spec.size_bytes >= old.size_bytes, "spec.sizeBytes", "never shrinks");
        let before = old.designation.map_or(i64::MIN, |designation| designation.number);
        let after = spec.designation.map_or(i64::MIN, |designation| designation.number);
        problems.require(after >= before, "spec.designation", "the number never goes back");
    }
    problems.0
}

/// Checks a `MarsNode`.
#[must_use]
pub fn node(new: &MarsNode) -> Vec<Problem> {
    let mut problems = Problems::default();
    let mut names = BTreeSet::new();
    for (index, pool) in new.spec.pools.iter().enumerate() {
        let field = format!("spec.pools[{index}]");
        problems.require(is_dns_label(&pool.name), format!("{field}.name"), "must be a DNS label");
        problems.require(names.insert(&pool.name), format!("{field}.name"), "is there twice");
        problems.require(
            is_clean_path(&pool.directory, "/"),
            format!("{field}.directory"),
            "must be an absolute path without '..'",
        );
    }
    problems.0
}

/// Checks a `MarsAction` by itself; with `old`, also that its spec is unchanged. See also [`acknowledge`].
#[must_use]
pub fn action(new: &MarsAction, old: Option<&MarsAction>) -> Vec<Problem> {
    let mut problems = Problems::default();
    let spec = &new.spec;
    problems.require(
        is_dns_label(&spec.resource),
        "spec.resource",
        "must be the name of a MarsResource",
    );
    problems.require(
        spec.verb.is_available(),
        "spec.verb",
        "the verbs Resolve, Verify and ExitEmergency are not available in this version",
    );
    problems.require(
        !spec.verb.needs_node() || spec.node.as_deref().is_some_and(|node| !node.is_empty()),
        "spec.node",
        format!("{:?} needs the name of a node", spec.verb),
    );
    problems.require(
        !needs_acknowledge(spec.verb) || spec.acknowledge.is_some(),
        "spec.acknowledge",
        format!(
            "{:?} can lose data: set this to status.uuid of the MarsResource",
            spec.verb
        ),
    );
    problems.require(
        spec.deadline_seconds >= 0,
        "spec.deadlineSeconds",
        "must not be negative",
    );
    problems.require(spec.ttl_seconds >= 0, "spec.ttlSeconds", "must not be negative");
    problems.require(
        old.is_none_or(|old| old.spec == *spec),
        "spec",
        "the spec of a MarsAction is immutable: create another one",
    );
    problems.0
}

/// Checks that a dangerous action names the very resource it is about.
///
/// # Errors
/// When it does not.
pub fn acknowledge(action: &MarsAction, resource_uuid: Uuid) -> Result<(), Problem> {
    if !action.spec.verb.is_dangerous() || action.spec.acknowledge == Some(resource_uuid) {
        return Ok(());
    }
    let resource = &action.spec.resource;
    Err(Problem {
        field: "spec.acknowledge".into(),
        message: format!(
            "is not the uuid of {resource}: create the action again with the output of \
             `kubectl get marsresource {resource} -o jsonpath={{.status.uuid}}`"
        ),
    })
}

fn needs_acknowledge(verb: Verb) -> bool {
    verb.is_dangerous() && verb.is_available()
}

fn backing(problems: &mut Problems, field: &str, backing: &Backing) {
    match (&backing.device, &backing.pool) {
        (Some(device), None) => problems.require(
            is_clean_path(device, "/dev/"),
            format!("{field}.device"),
            "must be an absolute path under /dev without '..', at most 255 characters",
        ),
        (None, Some(pool)) => {
            problems.require(
                is_dns_label(pool),
                format!("{field}.pool"),
                "must be the name of a pool",
            );
        }
        _ => problems.add(field, "set exactly one of device and pool"),
    }
}

fn duration(problems: &mut Problems, field: &str, duration: Option<DurationText>) {
    problems.require(
        duration.is_none_or(|duration| !duration.is_negative()),
        field,
        "must not be negative: write a span such as 90s or 1h30m",
    );
}

/// Whether `name` is a DNS label (RFC 1123).
#[must_use]
pub fn is_dns_label(name: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=63).contains(&name.len()) && name.bytes().all(inner) && !name.starts_with('-') && !name.ends_with('-')
}

/// Whether `name` can be the name of a Kubernetes node (a DNS subdomain).
#[must_use]
pub fn is_node_name(name: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'.';
    let edge = |byte: Option<u8>| byte.is_some_and(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    name.len() <= 253 && name.bytes().all(inner) && edge(name.bytes().next()) && edge(name.bytes().last())
}

fn is_clean_path(path: &str, under: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_alphanumeric() || b"_+=:@.,/-".contains(&byte);
    path.len() <= 255
        && path.len() > under.len()
        && path.starts_with(under)
        && path.bytes().all(inner)
        && !path.contains("..")
}
