//! Label and field selectors.
//!
//! Invariant: a selector that is not understood is refused, never treated as "everything".

use crate::error::ApiError;
use crate::meta;
use crate::registry::{Kind, View};
use serde_json::Value;

#[derive(Clone, Debug, PartialEq)]
enum Requirement {
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
    Exists(String),
    Absent(String),
}

/// What a list or watch is limited to.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Selector {
    labels: Vec<Requirement>,
    /// Path in the stored object, whether it has to be equal, value.
    fields: Vec<(String, bool, String)>,
}

impl Selector {
    /// Parses the two selectors of a request for `kind`.
    ///
    /// # Errors
    /// 400 with the part that is not understood, or the field the kind does not support.
    pub fn parse(kind: &Kind, labels: &str, fields: &str) -> Result<Self, ApiError> {
        Ok(Self {
            labels: parse_labels(labels)?,
            fields: parse_fields(kind, fields)?,
        })
    }

    /// Whether a stored object is selected.
    #[must_use]
    pub fn matches(&self, object: &Value) -> bool {
        let labels = meta::map(object, &["metadata", "labels"]);
        let value = |key: &String| labels.get(key).and_then(Value::as_str);
        let by_labels = self.labels.iter().all(|requirement| match requirement {
            Requirement::In(key, values) => value(key).is_some_and(|v| values.iter().any(|w| w == v)),
            Requirement::NotIn(key, values) => value(key).is_none_or(|v| values.iter().all(|w| w != v)),
            Requirement::Exists(key) => labels.contains_key(key),
            Requirement::Absent(key) => !labels.contains_key(key),
        });
        by_labels
            && self
                .fields
                .iter()
                .all(|(path, equal, wanted)| (field(object, path) == *wanted) == *equal)
    }

    /// The one name this selects, if it selects by name.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.fields
            .iter()
            .find(|(path, equal, _)| *equal && path == "metadata.name")
            .map(|(_, _, name)| name.as_str())
    }
}

fn field(object: &Value, path: &str) -> String {
    let found = path.split('.').try_fold(object, |value, part| value.get(part));
    match found {
        Some(Value::String(text)) => text.clone(),
        // `source` of an Event stands for its component.
        Some(Value::Object(map)) => map
            .get("component")
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned(),
        None | Some(Value::Null) => String::new(),
        Some(other) => other.to_string(),
    }
}

fn parse_fields(kind: &Kind, text: &str) -> Result<Vec<(String, bool, String)>, ApiError> {
    let mut fields = Vec::new();
    for part in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        let bad = || ApiError::bad_request(format!("invalid selector: '{part}'; can't understand '{part}'"));
        let (path, equal, value) = if let Some((path, value)) = part.split_once("!=") {
            (path, false, value)
        } else {
            let (path, value) = part.split_once("==").or_else(|| part.split_once('=')).ok_or_else(bad)?;
            (path, true, value)
        };
        let known = matches!(path, "metadata.name" | "metadata.namespace") || kind.selectable.iter().any(|f| f == path);
        if !known {
            return Err(ApiError::bad_request(format!("field label not supported: {path}")));
        }
        let path = match kind.view {
            View::NewEvents if !path.starts_with("metadata.") => crate::registry::core_event_field(path),
            _ => path.to_owned(),
        };
        fields.push((path, equal, value.to_owned()));
    }
    Ok(fields)
}

/// Splits at commas that are not inside parentheses.
fn split_requirements(text: &str) -> Vec<&str> {
    let (mut parts, mut depth, mut start) = (Vec::new(), 0_usize, 0);
    for (i, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            ',' if depth == 0 => {
                parts.push(&text[start..i]);
                start = i + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts.into_iter().map(str::trim).filter(|p| !p.is_empty()).collect()
}

fn parse_labels(text: &str) -> Result<Vec<Requirement>, ApiError> {
    split_requirements(text).into_iter().map(parse_label).collect()
}

fn parse_label(part: &str) -> Result<Requirement, ApiError> {
    let bad = || ApiError::bad_request(format!("unable to parse requirement: {part:?} is not understood"));
    let key = |text: &str| {
        let key = text.trim();
        if meta::is_qualified_name(key) {
            Ok(key.to_owned())
        } else {
            Err(bad())
        }
    };
    if let Some(open) = part.find('(') {
        let inside = part[open + 1..].strip_suffix(')').ok_or_else(bad)?;
        let values = inside.split(',').map(|v| v.trim().to_owned()).collect();
        let head = part[..open].trim_end();
        if let Some(name) = head.strip_suffix(" notin") {
            return Ok(Requirement::NotIn(key(name)?, values));
        }
        let name = head.strip_suffix(" in").ok_or_else(bad)?;
        return Ok(Requirement::In(key(name)?, values));
    }
    if let Some((name, value)) = part.split_once("!=") {
        return Ok(Requirement::NotIn(key(name)?, vec![value.trim().to_owned()]));
    }
    if let Some((name, value)) = part.split_once("==").or_else(|| part.split_once('=')) {
        return Ok(Requirement::In(key(name)?, vec![value.trim().to_owned()]));
    }
    match part.strip_prefix('!') {
        Some(name) => Ok(Requirement::Absent(key(name)?)),
        None => Ok(Requirement::Exists(key(part)?)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn label_selectors_of_all_forms_select() {
        let kind = crate::registry::builtin_kinds()
            .into_iter()
            .find(|k| k.kind == "Node")
            .unwrap();
        let object = json!({"metadata": {"name": "n", "labels": {"a": "1", "b/c": ""}}});
        let cases = [
            ("a=1", true),
            ("a==2", false),
            ("a!=2", true),
            ("x!=2", true),
            ("a in (1, 2)", true),
            ("a notin (1,2)", false),
            ("b/c", true),
            ("!b/c", false),
            ("!x,a", true),
            ("", true),
        ];
        for (text, expected) in cases {
            assert_eq!(
                Selector::parse(&kind, text, "").unwrap().matches(&object),
                expected,
                "{text}"
            );
        }
        for bad in ["a in 1", "=1", "a b"] {
            assert_eq!(Selector::parse(&kind, bad, "").unwrap_err().code, 400, "{bad}");
        }
        assert!(Selector::parse(&kind, "", "metadata.name=n").unwrap().matches(&object));
        assert!(!Selector::parse(&kind, "", "metadata.name!=n").unwrap().matches(&object));
        assert!(Selector::parse(&kind, "", "spec.other=n").is_err());
    }
}
