//! Every rule of the plan, from YAML: a settled resource, patched, and what shall be done about it.

mod common;

use mars_crds::conditions;
use mars_operator::{Intent, plan};
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    /// A sentence, with the acceptance number it serves.
    name: String,
    #[serde(default)]
    given: Value,
    /// Decisions, in order; words (status, events) left out.
    expect: Vec<String>,
    /// `type: "Status Reason"` after the pass.
    #[serde(default)]
    conditions: BTreeMap<String, String>,
    /// `type: words that the message must contain`.
    #[serde(default)]
    says: BTreeMap<String, Vec<String>>,
    /// `status.state` after the pass.
    state: Option<String>,
    /// Reasons of events that must be there.
    #[serde(default)]
    events: Vec<String>,
    /// Words that the record or the action's message must contain.
    #[serde(default)]
    because: Vec<String>,
    /// JSON pointers into the recorded designation, or the status, with expected values.
    #[serde(default)]
    records: BTreeMap<String, Value>,
    /// Whether a status is written at all.
    writes_status: Option<bool>,
}

fn run(file: &str, text: &str) {
    let cases: Vec<Case> = serde_yaml::from_str(text).unwrap_or_else(|error| panic!("{file}: {error}"));
    let mut failures = Vec::new();
    for case in &cases {
        if let Err(message) = check(case) {
            failures.push(format!("{}:\n{message}", case.name));
        }
    }
    assert!(
        failures.is_empty(),
        "{file}: {} of {} cases\n{}",
        failures.len(),
        cases.len(),
        failures.join("\n")
    );
}

fn check(case: &Case) -> Result<(), String> {
    let world = common::world(&case.given);
    let plan = plan(&world, &mut common::ids());
    let lines: Vec<String> = plan
        .intents
        .iter()
        .filter(|intent| intent.is_decision() || **intent == Intent::Reobserve)
        .map(ToString::to_string)
        .collect();
    if lines != case.expect {
        return Err(format!("  expected {:#?}\n  planned {lines:#?}", case.expect));
    }
    let written = plan.intents.iter().find_map(|intent| match intent {
        Intent::SetStatus(status) => Some(status.as_ref().clone()),
        _ => None,
    });
    if case.writes_status.is_some_and(|expected| expected != written.is_some()) {
        return Err(format!("  writes a status: {}", written.is_some()));
    }
    let status = written.or_else(|| world.resource.status.clone()).unwrap_or_default();
    for (type_, expected) in &case.conditions {
        let condition = conditions::get(&status.conditions, type_).ok_or_else(|| format!("  no condition {type_}"))?;
        let found = format!("{} {}", condition.status, condition.reason);
        if found != *expected {
            return Err(format!(
                "  {type_} is {found} ({}), expected {expected}",
                condition.message
            ));
        }
    }
    for (type_, words) in &case.says {
        let condition = conditions::get(&status.conditions, type_).ok_or_else(|| format!("  no condition {type_}"))?;
        if let Some(word) = words.iter().find(|word| !condition.message.contains(*word)) {
            return Err(format!("  {type_} does not say {word:?}: {}", condition.message));
        }
    }
    if let Some(state) = case.state.as_ref().filter(|state| **state != status.state) {
        return Err(format!("  state is {}, expected {state}", status.state));
    }
    let events: Vec<&str> = plan
        .intents
        .iter()
        .filter_map(|intent| {
            if let Intent::EmitEvent(note) = intent {
                Some(note.reason.as_str())
            } else {
                None
            }
        })
        .collect();
    if let Some(event) = case.events.iter().find(|event| !events.contains(&event.as_str())) {
        return Err(format!("  no event {event}: {events:?}"));
    }
    check_records(case, &plan.intents, &status)
}

fn check_records(case: &Case, intents: &[Intent], status: &mars_crds::MarsResourceStatus) -> Result<(), String> {
    let record = intents.iter().find_map(|intent| match intent {
        Intent::RecordDesignation(designation) => Some(serde_json::to_value(designation).expect("encodes")),
        Intent::SetActionStatus { status, .. } => Some(serde_json::to_value(status).expect("encodes")),
        Intent::CreateReplica(spec) | Intent::PatchReplica(spec) => Some(serde_json::to_value(spec).expect("encodes")),
        _ => None,
    });
    let record = record.unwrap_or_else(|| serde_json::to_value(status).expect("encodes"));
    for (pointer, expected) in &case.records {
        let expected: Value = serde_json::from_str(&common::expand(&expected.to_string())).expect("still JSON");
        let found = record.pointer(pointer).unwrap_or(&Value::Null);
        if *found != expected {
            return Err(format!("  {pointer} is {found}, expected {expected} in {record}"));
        }
    }
    let text = record.to_string();
    if let Some(word) = case.because.iter().find(|word| !text.contains(*word)) {
        return Err(format!("  nothing says {word:?}: {text}"));
    }
    Ok(())
}

macro_rules! fixtures {
    ($($name:ident),* $(,)?) => {$(
        #[test]
        fn $name() {
            run(stringify!($name), include_str!(concat!("fixtures/", stringify!($name), ".yaml")));
        }
    )*};
}

fixtures!(
    a02_wish_and_fact,
    a50_handover,
    a52_partition_table,
    a53_forks,
    a55_device_in_use,
    a56_returning_primary,
    a58_lost_status,
    failover,
    life,
    actions,
);
