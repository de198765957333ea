//! Commands to `/dev/ublk-control`: make a device or begin its recovery, describe it to the kernel, grow, stop, delete it.
//!
//! Invariant: a device is made with user recovery and reissue, so that it stays when its agent dies and what it had taken comes
//! again; and no command here waits for a user of the device.

use super::{FrontendError, failed};
use crate::frontend::{OpenParams, Resized};
use libublk::ctrl::{UblkCtrl, UblkCtrlBuilder};
use libublk::io::UblkDev;
use libublk::{UblkFlags, sys};
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

/// Requests the kernel may have under way.
const QUEUE_DEPTH: u16 = 64;
/// Largest read or write (bytes); with the depth it bounds the memory of a device: 16 MiB.
const IO_BYTES: u32 = 256 << 10;
/// Largest discard or write-zeroes request (sectors); a small limit makes mkfs and fstrim slow.
const DISCARD_SECTORS: u32 = (1 << 30) >> 9;
/// Discards smaller than this are not worth a record (bytes).
const DISCARD_GRANULARITY_BYTES: u32 = 4096;
/// How long a dead agent's device may take to become quiescent, and a new one to start.
pub(super) const DEVICE_WAIT: Duration = Duration::from_mins(1);
const POLL_STEP: Duration = Duration::from_millis(20);

/// Whether this kernel has the driver. Nothing is opened.
pub(crate) fn is_available() -> bool {
    Path::new("/dev/ublk-control").exists()
}

fn number(id: u32) -> i32 {
    i32::try_from(id).expect("device numbers are small")
}

/// The control side of a device that is there.
fn existing(id: u32) -> Result<UblkCtrl, FrontendError> {
    UblkCtrl::new_simple(number(id)).map_err(|error| failed("open control", &error))
}

/// Opens the control side of a new device, or of the one to be recovered.
pub(super) fn make(recover: Option<u32>) -> Result<UblkCtrl, FrontendError> {
    if let Some(id) = recover {
        existing(id)?
            .start_user_recover()
            .map_err(|error| failed("start the recovery", &error))?;
    }
    let how = if recover.is_some() {
        UblkFlags::UBLK_DEV_F_RECOVER_DEV
    } else {
        UblkFlags::UBLK_DEV_F_ADD_DEV
    };
    let built = UblkCtrlBuilder::default()
        .name("mars")
        .id(recover.map_or(-1, number))
        .nr_queues(1)
        .depth(QUEUE_DEPTH)
        .io_buf_bytes(IO_BYTES)
        // Recovery: the device stays when the agent dies, and new requests wait. Reissue: those it had taken come again.
        .ctrl_flags(u64::from(sys::UBLK_F_USER_RECOVERY | sys::UBLK_F_USER_RECOVERY_REISSUE))
        .dev_flags(how)
        .build();
    built.map_err(|error| failed("make the device", &error))
}

/// The device's promises to the kernel. A recovery does not change them.
pub(super) fn describe(device: &mut UblkDev, params: &OpenParams) {
    device.set_default_params(params.size_bytes);
    let to = &mut device.tgt.params;
    let shift = if params.logical_block_bytes == 4096 { 12 } else { 9 };
    to.basic.logical_bs_shift = shift;
    to.basic.io_min_shift = shift.max(12);
    // FUA needs VOLATILE_CACHE; without FUA the kernel would send a write and a flush.
    to.basic.attrs = sys::UBLK_ATTR_VOLATILE_CACHE | sys::UBLK_ATTR_FUA;
    to.types |= sys::UBLK_PARAM_TYPE_DISCARD;
    to.discard = sys::ublk_param_discard {
        discard_granularity: DISCARD_GRANULARITY_BYTES,
        max_discard_sectors: DISCARD_SECTORS,
        max_write_zeroes_sectors: DISCARD_SECTORS,
        max_discard_segments: 1,
        ..Default::default()
    };
}

/// A dead agent's device is torn down for a moment before it can be recovered.
pub(super) fn wait_until_quiescent(id: u32) -> Result<(), FrontendError> {
    let deadline = Instant::now() + DEVICE_WAIT;
    loop {
        let info = existing(id)?.dev_info();
        if u32::from(info.state) == sys::UBLK_S_DEV_QUIESCED {
            return Ok(());
        }
        if Instant::now() >= deadline {
            let text = format!(
                "state {} (process {}): the former agent must end first",
                info.state, info.ublksrv_pid
            );
            return Err(FrontendError::Io {
                what: format!("ublk device {id}"),
                source: io::Error::other(text),
            });
        }
        std::thread::sleep(POLL_STEP);
    }
}

/// Grows a device, where this kernel can do that while it is open.
pub(super) fn grow(id: u32, size_bytes: u64) -> Result<Resized, FrontendError> {
    let features = UblkCtrl::get_features().unwrap_or(0);
    if features & u64::from(sys::UBLK_F_UPDATE_SIZE) == 0 {
        return Ok(Resized::AtNextOpen);
    }
    existing(id)?
        .update_size(size_bytes)
        .map_err(|error| failed("grow the device", &error))?;
    Ok(Resized::Done)
}

/// Takes the block device away: whoever has it open gets I/O errors from now on.
pub(super) fn stop(id: u32) -> Result<(), FrontendError> {
    let stopped = existing(id)?.kill_dev();
    stopped.map(drop).map_err(|error| failed("stop the device", &error))
}

/// Deletes a stopped device.
pub(super) fn delete(id: u32) -> Result<(), FrontendError> {
    // Not the waiting kind: a late opener would hold it, and its descriptor only gives errors by now.
    let deleted = existing(id)?.del_dev_async();
    deleted.map(drop).map_err(|error| failed("delete the device", &error))
}
