//! What a copy of data says, between the engine's messages and their form on the wire: ranges, digests, blocks, offers.
//!
//! Invariant: as for all of [`wire`](super); besides, no answer is larger than what was asked for.

use super::{ItemError, Malformed, compression_in, compression_out, lineage_in, lineage_out, pb, position};
use mars_engine::api::Compression;
use mars_engine::replication::codec;
use mars_engine::replication::digest::{self, BLOCK_DIGEST_BYTES};
use mars_engine::replication::messages::{BlockRun, RegionDigest, RegionWant, SyncOffer};
use mars_engine::types::{ByteRange, Lsn};
use prost::bytes::Bytes;

/// Longest answer to a request for blocks, per run (bytes).
const MAX_RUN_BYTES: usize = 256 << 10;

impl From<ByteRange> for pb::Range {
    fn from(range: ByteRange) -> Self {
        Self {
            offset: range.offset,
            len: range.len,
        }
    }
}

/// A range that must be there.
///
/// # Errors
/// [`Malformed`] also when it overflows.
pub(in crate::replication) fn range(range: Option<&pb::Range>) -> Result<ByteRange, Malformed> {
    let range = range.ok_or(Malformed("range"))?;
    range
        .offset
        .checked_add(range.len)
        .ok_or(Malformed("range overflows"))?;
    Ok(ByteRange {
        offset: range.offset,
        len: range.len,
    })
}

/// Digests of regions.
#[must_use]
pub(in crate::replication) fn digests_out(digests: &[RegionDigest]) -> Vec<Bytes> {
    let one = |digest: &RegionDigest| match digest {
        RegionDigest::Zero => Bytes::new(),
        RegionDigest::Hash(hash) => Bytes::copy_from_slice(hash),
    };
    digests.iter().map(one).collect()
}

/// Digests of regions.
///
/// # Errors
/// [`Malformed`].
pub(in crate::replication) fn digests_in(digests: &[Bytes]) -> Result<Vec<RegionDigest>, Malformed> {
    let one = |digest: &Bytes| {
        if digest.is_empty() {
            return Ok(RegionDigest::Zero);
        }
        digest
            .as_ref()
            .try_into()
            .map(RegionDigest::Hash)
            .map_err(|_| Malformed("digest"))
    };
    digests.iter().map(one).collect()
}

/// What the target needs of a region.
#[must_use]
pub(in crate::replication) fn want_out(want: &RegionWant) -> pb::RegionWant {
    pb::RegionWant {
        range: Some(want.range.into()),
        have: want.have.concat().into(),
    }
}

/// What the target needs of a region.
///
/// # Errors
/// [`Malformed`] unless there is one digest per block, or none at all.
pub(in crate::replication) fn want_in(want: &pb::RegionWant) -> Result<RegionWant, Malformed> {
    let range = range(want.range.as_ref())?;
    if range.len > digest::REGION_BYTES {
        return Err(Malformed("region is too long"));
    }
    let (have, rest) = want.have.as_chunks::<BLOCK_DIGEST_BYTES>();
    let blocks = range.len.div_ceil(mars_engine::types::BLOCK_BYTES);
    if !rest.is_empty() || !(have.is_empty() || have.len() as u64 == blocks) {
        return Err(Malformed("block digests"));
    }
    Ok(RegionWant {
        range,
        have: have.to_vec(),
    })
}

/// A run of blocks.
#[must_use]
pub(in crate::replication) fn run_out(run: BlockRun, compression: Compression) -> pb::BlockRun {
    let range = Some(run.range.into());
    let Some(data) = run.data else {
        return pb::BlockRun {
            range,
            zero: true,
            ..pb::BlockRun::default()
        };
    };
    let (compression, data) = match codec::compress(&data, compression) {
        Some(smaller) => (compression, smaller),
        None => (Compression::None, data),
    };
    pb::BlockRun {
        range,
        zero: false,
        compression: compression_out(compression),
        data,
    }
}

/// A run of blocks.
///
/// # Errors
/// [`ItemError`].
pub(in crate::replication) fn run_in(run: &pb::BlockRun) -> Result<BlockRun, ItemError> {
    let range = range(run.range.as_ref())?;
    if run.zero {
        return Ok(BlockRun { range, data: None });
    }
    let raw_bytes = usize::try_from(range.len).map_err(|_| Malformed("range"))?;
    let compression = compression_in(run.compression)?;
    let data = codec::decompress(compression, raw_bytes, &run.data, MAX_RUN_BYTES)?;
    Ok(BlockRun {
        range,
        data: Some(data),
    })
}

/// What a source offers.
#[must_use]
pub(in crate::replication) fn offer_out(offer: &SyncOffer) -> pb::SyncOffer {
    pb::SyncOffer {
        session: offer.session,
        applied: Some(offer.applied.into()),
        lineage: lineage_out(&offer.lineage),
        durable: Some(offer.durable.into()),
        log_start: offer.log_start.0,
        size_bytes: offer.size_bytes,
    }
}

/// What a source offers.
///
/// # Errors
/// [`Malformed`].
pub(in crate::replication) fn offer_in(offer: &pb::SyncOffer) -> Result<SyncOffer, Malformed> {
    Ok(SyncOffer {
        session: offer.session,
        applied: position(offer.applied.as_ref())?,
        lineage: lineage_in(&offer.lineage)?,
        durable: position(offer.durable.as_ref())?,
        log_start: Lsn(offer.log_start),
        size_bytes: offer.size_bytes,
    })
}
