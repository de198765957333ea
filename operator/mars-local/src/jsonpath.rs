//! The JSONPath of printer columns: fields, quoted fields, positions, wildcards and `[?(@.x=="y")]`.
//!
//! Invariant: parsing accepts what a CRD may contain or names what it cannot read; evaluating never fails, it finds nothing.

use serde_json::Value;

#[derive(Clone, Debug, PartialEq)]
enum Step {
    Field(String),
    Position(i64),
    All,
    Where {
        path: Vec<Step>,
        equals: bool,
        value: Value,
    },
}

/// A parsed path.
#[derive(Clone, Debug, PartialEq)]
pub struct JsonPath(Vec<Step>);

impl JsonPath {
    /// Parses a path such as `.status.conditions[?(@.type=="Ready")].status`.
    ///
    /// # Errors
    /// What in the text is not understood.
    pub fn parse(text: &str) -> Result<Self, String> {
        let text = text
            .trim()
            .trim_start_matches('{')
            .trim_end_matches('}')
            .trim_start_matches('$');
        parse_steps(text).map(Self)
    }

    /// The values the path leads to.
    #[must_use]
    pub fn find<'a>(&self, value: &'a Value) -> Vec<&'a Value> {
        find(&self.0, value)
    }
}

fn find<'a>(steps: &[Step], value: &'a Value) -> Vec<&'a Value> {
    let mut found = vec![value];
    for step in steps {
        found = found.into_iter().flat_map(|value| one_step(step, value)).collect();
    }
    found
}

fn one_step<'a>(step: &Step, value: &'a Value) -> Vec<&'a Value> {
    match step {
        Step::Field(name) => value.get(name).into_iter().collect(),
        Step::Position(i) => {
            let list = value.as_array().map(Vec::as_slice).unwrap_or_default();
            let len = i64::try_from(list.len()).unwrap_or(i64::MAX);
            let at = if *i < 0 { len + i } else { *i };
            usize::try_from(at)
                .ok()
                .and_then(|at| list.get(at))
                .into_iter()
                .collect()
        }
        Step::All => match value {
            Value::Array(list) => list.iter().collect(),
            Value::Object(map) => map.values().collect(),
            _ => Vec::new(),
        },
        Step::Where {
            path,
            equals,
            value: wanted,
        } => {
            let list = value.as_array().map(Vec::as_slice).unwrap_or_default();
            list.iter()
                .filter(|entry| find(path, entry).contains(&wanted) == *equals)
                .collect()
        }
    }
}

fn parse_steps(text: &str) -> Result<Vec<Step>, String> {
    let mut steps = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        if let Some(after) = rest.strip_prefix('[') {
            let end = closing(after).ok_or_else(|| format!("no closing bracket in {text:?}"))?;
            steps.push(parse_bracket(&after[..end])?);
            rest = &after[end + 1..];
        } else {
            let after = rest.strip_prefix('.').unwrap_or(rest);
            let (name, len) = field_name(after);
            if name.is_empty() && !after.starts_with('[') && !after.is_empty() {
                return Err(format!("a field name is missing in {text:?}"));
            }
            match name.as_str() {
                "" => {}
                "*" => steps.push(Step::All),
                _ => steps.push(Step::Field(name)),
            }
            rest = &after[len..];
        }
    }
    Ok(steps)
}

/// A field name up to `.` or `[`, with `\.` standing for a dot, and how many bytes it took.
fn field_name(text: &str) -> (String, usize) {
    let mut name = String::new();
    let mut chars = text.char_indices();
    while let Some((i, c)) = chars.next() {
        match c {
            '\\' => name.extend(chars.next().map(|(_, c)| c)),
            '.' | '[' => return (name, i),
            _ => name.push(c),
        }
    }
    (name, text.len())
}

/// Where the bracket closes, quotes and inner brackets respected.
fn closing(text: &str) -> Option<usize> {
    let (mut depth, mut quote) = (0, None);
    for (i, c) in text.char_indices() {
        match (quote, c) {
            (Some(q), _) if q == c => quote = None,
            (None, '"' | '\'') => quote = Some(c),
            (None, '[') => depth += 1,
            (None, ']') if depth == 0 => return Some(i),
            (None, ']') => depth -= 1,
            _ => {}
        }
    }
    None
}

fn parse_bracket(inner: &str) -> Result<Step, String> {
    let inner = inner.trim();
    if inner == "*" {
        return Ok(Step::All);
    }
    if let Some(name) = unquoted(inner) {
        return Ok(Step::Field(name));
    }
    if let Ok(position) = inner.parse() {
        return Ok(Step::Position(position));
    }
    let unknown = || format!("[{inner}] is not understood");
    let filter = inner
        .strip_prefix("?(")
        .and_then(|f| f.strip_suffix(')'))
        .ok_or_else(unknown)?;
    let (at, operator) = [("==", true), ("!=", false)]
        .iter()
        .find_map(|(word, equals)| filter.find(word).map(|at| (at, *equals)))
        .ok_or_else(unknown)?;
    let left = filter[..at].trim().strip_prefix('@').ok_or_else(unknown)?;
    let right = filter[at + 2..].trim();
    let value = match unquoted(right) {
        Some(text) => Value::String(text),
        None => serde_json::from_str(right).map_err(|_| unknown())?,
    };
    Ok(Step::Where {
        path: parse_steps(left)?,
        equals: operator,
        value,
    })
}

fn unquoted(text: &str) -> Option<String> {
    let quote = text.chars().next().filter(|c| matches!(c, '"' | '\''))?;
    let inner = text.strip_prefix(quote)?.strip_suffix(quote)?;
    Some(inner.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_paths_of_printer_columns_are_understood() {
        let object = json!({"spec": {"a": 1, "list": [{"n": "x"}, {"n": "y"}]}, "metadata": {"labels": {"a.b/c": "l"}},
            "status": {"conditions": [{"type": "A", "status": "False"}, {"type": "Ready", "status": "True"}]}});
        for (path, expected) in [
            (".spec.a", json!([1])),
            ("{.spec.list[*].n}", json!(["x", "y"])),
            (".spec.list[-1].n", json!(["y"])),
            (r".metadata.labels.a\.b/c", json!(["l"])),
            (".metadata.labels['a.b/c']", json!(["l"])),
            (".status.conditions[?(@.type==\"Ready\")].status", json!(["True"])),
            (".status.conditions[?(@.type!='Ready')].status", json!(["False"])),
            (".spec.absent.deep", json!([])),
        ] {
            let found: Vec<Value> = JsonPath::parse(path)
                .unwrap()
                .find(&object)
                .into_iter()
                .cloned()
                .collect();
            assert_eq!(Value::Array(found), expected, "{path}");
        }
        for bad in [".a[", ".a[?(@.b~1)]", ".a..b"] {
            assert!(JsonPath::parse(bad).is_err(), "{bad}");
        }
    }
}
