//! Compression of payloads as they enter the log, with buffers that are used again and again.
//!
//! Invariant: what comes out is never longer than what went in; equal length means uncompressed.

use crate::api::Compression;
use std::fmt;

/// Payloads below this are stored as they are (bytes).
const WORTH_TRYING: usize = 256;

/// See the module.
#[derive(Default)]
pub(crate) struct Packer {
    buffer: Vec<u8>,
    zstd: Option<zstd::bulk::Compressor<'static>>,
}

impl fmt::Debug for Packer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Packer").finish_non_exhaustive()
    }
}

impl Packer {
    /// The payload as it is to be stored.
    pub(crate) fn pack<'a>(&'a mut self, compression: Compression, payload: &'a [u8]) -> &'a [u8] {
        if payload.len() < WORTH_TRYING {
            return payload;
        }
        let packed_len = match compression {
            Compression::None => None,
            Compression::Lz4 => self.lz4(payload),
            Compression::Zstd => self.zstd(payload),
        };
        match packed_len {
            Some(len) if len < payload.len() => &self.buffer[..len],
            _ => payload,
        }
    }

    fn lz4(&mut self, payload: &[u8]) -> Option<usize> {
        self.buffer
            .resize(lz4_flex::block::get_maximum_output_size(payload.len()), 0);
        lz4_flex::block::compress_into(payload, &mut self.buffer).ok()
    }

    fn zstd(&mut self, payload: &[u8]) -> Option<usize> {
        // One byte less than the payload: what does not get smaller is not wanted, and fails early.
        self.buffer.resize(payload.len() - 1, 0);
        if self.zstd.is_none() {
            self.zstd = zstd::bulk::Compressor::new(1).ok();
        }
        self.zstd
            .as_mut()?
            .compress_to_buffer(payload, &mut self.buffer[..])
            .ok()
    }
}

/// Undoes [`Packer::pack`]: the payload, exactly `len` bytes, or nothing.
pub(crate) fn unpack(compression: Compression, stored: &[u8], len: usize) -> Option<Vec<u8>> {
    if stored.len() == len {
        return Some(stored.to_vec());
    }
    let payload = match compression {
        Compression::None => return None,
        Compression::Lz4 => lz4_flex::block::decompress(stored, len).ok()?,
        Compression::Zstd => zstd::bulk::decompress(stored, len).ok()?,
    };
    (payload.len() == len).then_some(payload)
}
