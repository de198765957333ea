//! What the workspace is built from: licences, sources and banned crates, by the lists of `deny.toml`.
//!
//! cargo-deny checks the same file where it is installed; this test keeps the policy enforced where it is not.

#![expect(
    clippy::unwrap_used,
    reason = "the shape of what cargo prints is fixed; a surprise fails the test"
)]

use serde_json::Value;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Command;

fn workspace_root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Packages that are built for Linux on x86-64, as cargo resolves them.
fn packages() -> Vec<Value> {
    let out = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--format-version",
            "1",
            "--locked",
            "--filter-platform",
            "x86_64-unknown-linux-gnu",
        ])
        .current_dir(workspace_root())
        .output()
        .expect("cargo runs");
    assert!(
        out.status.success(),
        "cargo metadata: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    let metadata: Value = serde_json::from_slice(&out.stdout).expect("cargo prints JSON");
    let used: BTreeSet<&str> = metadata["resolve"]["nodes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|node| node["id"].as_str().unwrap())
        .collect();
    let all = metadata["packages"].as_array().unwrap();
    all.iter()
        .filter(|package| used.contains(package["id"].as_str().unwrap()))
        .cloned()
        .collect()
}

/// The strings between the brackets of the first `key = [` after the line `[section]`.
fn list_of(policy: &str, section: &str, key: &str) -> BTreeSet<String> {
    let section = policy.split_once(&format!("[{section}]")).expect("section exists").1;
    let list = section.split_once(&format!("\n{key} = [")).expect("key exists").1;
    let list = &list[..list.find("]\n").expect("list ends")];
    list.split('"').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Whether an SPDX expression can be satisfied with the allowed licences. `/` is the old spelling of OR.
fn satisfied(expression: &str, allowed: &BTreeSet<String>) -> bool {
    let spaced = expression
        .replace('/', " OR ")
        .replace('(', " ( ")
        .replace(')', " ) ")
        .replace(" WITH ", "%");
    let tokens: Vec<&str> = spaced.split_whitespace().collect();
    let mut at = 0;
    let ok = any(&tokens, &mut at, allowed);
    assert_eq!(at, tokens.len(), "not an SPDX expression: {expression}");
    ok
}

fn any(tokens: &[&str], at: &mut usize, allowed: &BTreeSet<String>) -> bool {
    let mut ok = all(tokens, at, allowed);
    while tokens.get(*at) == Some(&"OR") {
        *at += 1;
        ok |= all(tokens, at, allowed);
    }
    ok
}

fn all(tokens: &[&str], at: &mut usize, allowed: &BTreeSet<String>) -> bool {
    let mut ok = one(tokens, at, allowed);
    while tokens.get(*at) == Some(&"AND") {
        *at += 1;
        ok &= one(tokens, at, allowed);
    }
    ok
}

fn one(tokens: &[&str], at: &mut usize, allowed: &BTreeSet<String>) -> bool {
    let token = tokens[*at];
    *at += 1;
    if token != "(" {
        return allowed.contains(&token.replace('%', " WITH "));
    }
    let ok = any(tokens, at, allowed);
    assert_eq!(tokens[*at], ")");
    *at += 1;
    ok
}

#[test]
fn spdx_expressions_are_read_as_written() {
    let allowed: BTreeSet<String> = ["MIT", "ISC", "Apache-2.0 WITH LLVM-exception"]
        .map(str::to_owned)
        .into();
    for good in [
        "MIT",
        "GPL-3.0 OR MIT",
        "MIT AND ISC",
        "(GPL-3.0 OR MIT) AND ISC",
        "MIT/GPL-3.0",
        "Apache-2.0 WITH LLVM-exception",
    ] {
        assert!(satisfied(good, &allowed), "{good}");
    }
    for bad in ["GPL-3.0", "MIT AND GPL-3.0", "(MIT OR ISC) AND GPL-3.0", "Apache-2.0"] {
        assert!(!satisfied(bad, &allowed), "{bad}");
    }
}

#[test]
fn every_dependency_has_an_allowed_licence_a_known_source_and_no_ban() {
    let policy = std::fs::read_to_string(workspace_root().join("deny.toml")).expect("deny.toml is there");
    let allowed = list_of(&policy, "licenses", "allow");
    let banned = list_of(&policy, "bans", "deny");
    // Exceptions come in pairs: licence, crate.
    let exceptions: Vec<String> = policy
        .lines()
        .filter(|line| line.starts_with("exceptions"))
        .flat_map(|line| {
            line.split('"')
                .skip(1)
                .step_by(2)
                .map(str::to_owned)
                .collect::<Vec<_>>()
        })
        .collect();
    let mut complaints = Vec::new();
    for package in packages() {
        let name = package["name"].as_str().unwrap();
        let licence = package["license"].as_str().unwrap_or("none given");
        let excepted = exceptions.chunks(2).any(|pair| pair[0] == licence && pair[1] == name);
        if !excepted && !satisfied(licence, &allowed) {
            complaints.push(format!(
                "{name}: licence {licence} is not in the allow list of deny.toml"
            ));
        }
        if banned.contains(name) {
            complaints.push(format!("{name}: banned in deny.toml"));
        }
        let source = package["source"].as_str().unwrap_or("path");
        if source != "path" && !source.starts_with("registry+") {
            complaints.push(format!("{name}: comes from {source}, not from the registry"));
        }
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}
