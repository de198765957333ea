//! Storage of ours must not lie on a device that we serve ourselves.

use super::PoolError;
use super::sysfs::DevNo;
use crate::frontend::stacked;
use std::path::Path;

/// The devices that this agent serves, as found in its device directory.
#[derive(Debug, Clone, Default)]
pub struct MarsDevices(Vec<(u32, u32)>);

impl MarsDevices {
    /// Looks at the link targets of the device directory; nothing is opened.
    #[must_use]
    pub fn scan(dev_dir: &Path) -> MarsDevices {
        let links = std::fs::read_dir(dev_dir).into_iter().flatten().flatten();
        let devices = links.filter_map(|link| DevNo::of_block_device(&link.path()).ok().flatten());
        MarsDevices(devices.map(|device| (device.major, device.minor)).collect())
    }

    /// Refuses storage that is stacked on a MARS device: the agent would wait for itself.
    ///
    /// # Errors
    /// [`PoolError::Stacked`], which names both.
    pub fn refuse_stacked(&self, path: &Path) -> Result<(), PoolError> {
        Ok(stacked::refuse(&[path.to_path_buf()], &self.0)?)
    }
}
