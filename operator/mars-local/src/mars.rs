//! What is special about the kinds of MARS: their definitions and the checks that CEL makes in a real API server.
//!
//! Invariant: an object that a real API server would refuse by a CEL rule is refused here with the same message, because
//! both come from `mars_crds`.

use crate::error::Cause;
use crate::registry::Kind;
use crate::strategy::Admission;
use mars_crds::validate::{self, Problem};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// The definitions of the four kinds.
#[must_use]
pub fn definitions() -> Vec<Value> {
    mars_crds::generate::crds()
        .iter()
        .filter_map(|crd| serde_json::to_value(crd).ok())
        .collect()
}

/// The checks of the four kinds; other kinds pass.
#[must_use]
pub fn admission() -> Box<Admission> {
    Box::new(|kind: &Kind, old: Option<&Value>, new: &Value| {
        if kind.group != mars_crds::GROUP {
            return Vec::new();
        }
        match kind.kind.as_str() {
            "MarsResource" => check(old, new, validate::resource),
            "MarsReplica" => check(old, new, validate::replica),
            "MarsNode" => check(old, new, |new, _| validate::node(new)),
            "MarsAction" => check(old, new, validate::action),
            _ => Vec::new(),
        }
    })
}

fn check<K: DeserializeOwned>(
    old: Option<&Value>,
    new: &Value,
    rules: impl Fn(&K, Option<&K>) -> Vec<Problem>,
) -> Vec<Cause> {
    let parsed = match serde_json::from_value::<K>(new.clone()) {
        Ok(parsed) => parsed,
        // The schema has passed, so this is a value that only the typed form knows to be wrong.
        Err(error) => {
            return vec![Cause {
                reason: "FieldValueInvalid",
                field: String::new(),
                message: error.to_string(),
            }];
        }
    };
    // An old version that cannot be read cannot forbid anything.
    let old = old.and_then(|old| serde_json::from_value::<K>(old.clone()).ok());
    let cause = |problem: Problem| Cause {
        reason: "FieldValueInvalid",
        message: format!("Invalid value: {}", problem.message),
        field: problem.field,
    };
    rules(&parsed, old.as_ref()).into_iter().map(cause).collect()
}
