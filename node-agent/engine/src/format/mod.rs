//! Bytes on disk. `docs/format.md` describes them with reasons.

pub mod record;
