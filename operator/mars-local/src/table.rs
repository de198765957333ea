//! Tables: what `kubectl get` prints, computed by the server.
//!
//! Invariant: a table has one row per object, in order, and one cell per column; a value that is not there is null.

use crate::registry::{Cell, Column, Kind};
use serde_json::{Value, json};

/// What a row carries besides its cells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Include {
    /// Nothing.
    Nothing,
    /// The metadata.
    Metadata,
    /// The whole object.
    Object,
}

/// A table of objects as shown by `kind`, with the metadata of the list. `stored` are (stored, shown) pairs.
#[must_use]
pub fn table(kind: &Kind, rows: &[(&Value, Value)], list_metadata: &Value, include: Include) -> Value {
    let definitions: Vec<Value> = kind.columns.iter().map(definition).collect();
    let rows: Vec<Value> = rows
        .iter()
        .map(|(stored, shown)| row(kind, stored, shown, include))
        .collect();
    json!({"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": list_metadata,
        "columnDefinitions": definitions, "rows": rows})
}

fn definition(column: &Column) -> Value {
    json!({"name": column.name, "type": column.ty, "format": column.format, "description": column.description,
        "priority": column.priority})
}

fn row(kind: &Kind, stored: &Value, shown: &Value, include: Include) -> Value {
    let cells: Vec<Value> = kind.columns.iter().map(|column| cell(column, stored)).collect();
    let mut row = json!({"cells": cells});
    match include {
        Include::Nothing => {}
        Include::Metadata => row["object"] = partial(shown),
        Include::Object => row["object"] = shown.clone(),
    }
    row
}

/// An object reduced to its metadata.
#[must_use]
pub fn partial(shown: &Value) -> Value {
    json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": shown["metadata"]})
}

fn cell(column: &Column, object: &Value) -> Value {
    let path = match &column.cell {
        Cell::Code(compute) => return compute(object),
        Cell::Path(path) => path,
    };
    // A path with a wildcard shows its first value, as the real API does.
    let Some(value) = path.find(object).into_iter().next() else {
        return Value::Null;
    };
    match column.ty.as_str() {
        "date" => value.as_str().map_or(Value::Null, |time| age(time).into()),
        "integer" => value.as_i64().map_or(Value::Null, Into::into),
        "number" if value.is_number() => value.clone(),
        "boolean" if value.is_boolean() => value.clone(),
        "number" | "boolean" => Value::Null,
        _ => match value {
            Value::String(_) | Value::Null => value.clone(),
            other => other.to_string().into(),
        },
    }
}

/// How long ago a time was, as kubectl writes it; `<unknown>` if there is none.
#[must_use]
pub fn age(time: &str) -> String {
    if time.is_empty() {
        return "<unknown>".into();
    }
    match time.parse::<jiff::Timestamp>() {
        Ok(then) => human(jiff::Timestamp::now().duration_since(then).as_secs()),
        Err(_) => "<invalid>".into(),
    }
}

/// A span of seconds in at most two units.
fn human(seconds: i64) -> String {
    const MINUTE: i64 = 60;
    const HOUR: i64 = 60 * MINUTE;
    const DAY: i64 = 24 * HOUR;
    const YEAR: i64 = 365 * DAY;
    let two = |big: i64, big_unit: &str, small: i64, small_unit: &str| {
        let (whole, rest) = (seconds / big, seconds % big / small);
        if rest == 0 {
            format!("{whole}{big_unit}")
        } else {
            format!("{whole}{big_unit}{rest}{small_unit}")
        }
    };
    match seconds {
        ..-1 => "<invalid>".into(),
        -1..0 => "0s".into(),
        s if s < 2 * MINUTE => format!("{s}s"),
        s if s < 10 * MINUTE => two(MINUTE, "m", 1, "s"),
        s if s < 3 * HOUR => format!("{}m", s / MINUTE),
        s if s < 8 * HOUR => two(HOUR, "h", MINUTE, "m"),
        s if s < 2 * DAY => format!("{}h", s / HOUR),
        s if s < 8 * DAY => two(DAY, "d", HOUR, "h"),
        s if s < 2 * YEAR => format!("{}d", s / DAY),
        s if s < 8 * YEAR => two(YEAR, "y", DAY, "d"),
        s => format!("{}y", s / YEAR),
    }
}

#[cfg(test)]
mod tests {
    use super::human;

    #[test]
    fn ages_read_as_kubectl_writes_them() {
        let cases = [
            (-5, "<invalid>"),
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (125, "2m5s"),
            (600, "10m"),
            (10_800, "3h"),
            (11_100, "3h5m"),
            (100_000, "27h"),
            (200_000, "2d7h"),
            (800_000, "9d"),
            (70_000_000, "2y80d"),
        ];
        for (seconds, text) in cases {
            assert_eq!(human(seconds), text, "{seconds}");
        }
    }
}
