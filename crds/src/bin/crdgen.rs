//! Writes the generated CRDs into a directory (default: `crds`), or with `--check` compares them.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut check = false;
    let mut directory = PathBuf::from("crds");
    for argument in std::env::args().skip(1) {
        match argument.as_str() {
            "--check" => check = true,
            "--help" | "-h" => {
                println!("usage: crdgen [--check] [DIRECTORY]");
                return ExitCode::SUCCESS;
            }
            other => directory = PathBuf::from(other),
        }
    }
    let mut stale = false;
    for (name, text) in mars_crds::generate::files() {
        let path = directory.join(name);
        if std::fs::read_to_string(&path).is_ok_and(|present| present == text) {
            continue;
        }
        if check {
            eprintln!(
                "{} differs from the types: run `cargo run -p mars-crds --bin crdgen`",
                path.display()
            );
            stale = true;
        } else if let Err(error) = std::fs::write(&path, text) {
            eprintln!(
                "cannot write {}: {error}; run this from the top of the repository or name a directory",
                path.display()
            );
            return ExitCode::FAILURE;
        }
    }
    if stale { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
