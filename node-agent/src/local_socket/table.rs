//! Status and devices as tables for people.

use super::Devices;
use serde_json::Value;

/// Aligns columns; the first row is the heading.
fn align(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

/// A number of bytes with a unit, three digits.
#[must_use]
pub fn bytes(value: i64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let (mut whole, mut rest, mut unit) = (value.max(0), 0, 0);
    while whole >= 1024 && unit + 1 < UNITS.len() {
        rest = whole % 1024;
        whole /= 1024;
        unit += 1;
    }
    if unit == 0 || whole >= 100 {
        format!("{whole} {}", UNITS[unit])
    } else {
        format!("{whole}.{} {}", rest * 10 / 1024, UNITS[unit])
    }
}

/// The table of `mars-node-agent status`.
#[must_use]
pub fn status(answer: &Value) -> String {
    let heading = [
        "RESOURCE", "WISH", "ROLE", "STATE", "DURABLE", "APPLIED", "LAG", "LOG/s", "APPLY/s", "SYNC", "MEMORY", "LOG",
        "DEVICE",
    ];
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    let replicas = answer["replicas"].as_array().map(Vec::as_slice).unwrap_or_default();
    rows.extend(replicas.iter().map(row));
    let mut text = format!("node {}\n", answer["node"].as_str().unwrap_or("?"));
    text.push_str(&align(&rows));
    for replica in replicas {
        for condition in replica["status"]["conditions"].as_array().into_iter().flatten() {
            let (kind, truth) = (
                condition["type"].as_str().unwrap_or_default(),
                condition["status"].as_str().unwrap_or_default(),
            );
            if (kind == "Ready") == (truth == "False") && kind != "Degraded" {
                let name = replica["resource"].as_str().unwrap_or_default();
                let (reason, message) = (&condition["reason"], &condition["message"]);
                let (reason, message) = (
                    reason.as_str().unwrap_or_default(),
                    message.as_str().unwrap_or_default(),
                );
                text.extend([name, ": ", reason, ": ", message, "\n"]);
            }
        }
    }
    text
}

fn row(replica: &Value) -> Vec<String> {
    let status = &replica["status"];
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let amount = |value: &Value| value.as_i64().map_or_else(|| "-".to_owned(), bytes);
    let rate = |value: &Value| {
        value
            .as_i64()
            .filter(|rate| *rate > 0)
            .map_or_else(|| "-".to_owned(), bytes)
    };
    let position = |value: &Value| value.as_i64().map_or_else(|| "-".to_owned(), |lsn| lsn.to_string());
    let lag = match (status["lag"]["bytes"].as_i64(), status["lag"]["seconds"].as_i64()) {
        (Some(0), _) => "0".to_owned(),
        (Some(lag), seconds) => format!("{} {}s", bytes(lag), seconds.unwrap_or_default()),
        (None, _) => "-".to_owned(),
    };
    vec![
        text(&replica["resource"]),
        text(&replica["wish"]),
        text(&status["role"]),
        text(&status["state"]),
        position(&status["positions"]["durable"]["lsn"]),
        position(&status["positions"]["applied"]),
        lag,
        rate(&replica["rates"]["log"]),
        rate(&replica["rates"]["apply"]),
        status["sync"]["percent"]
            .as_i64()
            .map_or_else(|| "-".to_owned(), |percent| format!("{percent} %")),
        amount(&replica["overlayBytes"]),
        amount(&replica["logBytes"]),
        text(&status["device"]["path"]),
    ]
}

/// The table of `mars-node-agent devices`.
#[must_use]
pub fn devices(answer: &Devices) -> String {
    let heading = ["RESOURCE", "DEVICE", "NUMBERS", "FRONTEND", "SIZE", "OPENED BY"];
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    rows.extend(answer.devices.iter().map(|device| {
        let user = |user: &mars_crds::replica::User| match user.pid {
            Some(pid) => format!("{} {} (pid {pid})", user.kind, user.name),
            None => format!("{} {}", user.kind, user.name),
        };
        let users: Vec<String> = device.opened_by.iter().map(user).collect();
        vec![
            device.resource.clone(),
            device.path.clone(),
            device.numbers.clone(),
            device.frontend.clone(),
            bytes(device.size_bytes),
            if users.is_empty() {
                "nobody".to_owned()
            } else {
                users.join(", ")
            },
        ]
    }));
    align(&rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn amounts_have_three_digits() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(200 << 20), "200 MiB");
        assert_eq!(bytes(-5), "0 B");
    }

    #[test]
    fn a_table_shows_what_is_known_and_says_why_a_replica_is_not_ready() {
        let text = status(&json!({"node": "a", "replicas": [{
            "resource": "r", "wish": "Primary", "rates": {"log": 2048, "apply": 0}, "overlayBytes": 0,
            "status": {"state": "Blank", "conditions": [
                {"type": "Ready", "status": "False", "reason": "NotConsistent", "message": "wait"},
                {"type": "SplitBrain", "status": "False", "reason": "Over", "message": "no"}]},
        }]}));
        assert!(text.contains("r: NotConsistent: wait"), "{text}");
        assert!(!text.contains("Over"), "{text}");
        assert!(text.contains("2.0 KiB"), "{text}");
    }
}
