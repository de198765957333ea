//! The binary `mars-node-agent`.

fn main() {}
