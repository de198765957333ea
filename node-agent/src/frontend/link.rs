//! The link `<device directory>/<resource>` to a device node.
//!
//! Invariant: only symbolic links are ever replaced or removed, and a link exists only between the moment its device is
//! ready and the moment its removal begins. A link that a killed agent left behind may point to a device number that
//! belongs to somebody else by now: [`remove_stale`] removes it before anything else is done.

use super::{Device, DeviceName, FrontendError};
use std::io;
use std::path::{Path, PathBuf};

/// Refuses a directory that is not there or an entry that is not a link, before a device is made for nothing.
pub(crate) fn check(dir: &Path, name: &DeviceName) -> Result<(), FrontendError> {
    std::fs::create_dir_all(dir)
        .map_err(|error| FrontendError::io(format!("device directory {}", dir.display()), error))?;
    let path = dir.join(name.as_str());
    match std::fs::symlink_metadata(&path) {
        Ok(found) if found.is_symlink() => Ok(()),
        Ok(_) => {
            let reason = "it is not a symbolic link of ours; move it away".to_owned();
            Err(FrontendError::InTheWay { path, reason })
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(FrontendError::io(format!("look at {}", path.display()), error)),
    }
}

/// Points the link to `node`, atomically.
pub(crate) fn create(dir: &Path, name: &DeviceName, node: &Path) -> Result<PathBuf, FrontendError> {
    check(dir, name)?;
    let link = dir.join(name.as_str());
    restore(&link, node)?;
    Ok(link)
}

/// Makes (or replaces) a link.
pub(crate) fn restore(link: &Path, node: &Path) -> Result<(), FrontendError> {
    let fail = |error| FrontendError::io(format!("link {} to {}", link.display(), node.display()), error);
    // A name that is no DNS label, so it cannot be the link of another resource.
    let aside = link.with_extension("new~");
    match std::fs::remove_file(&aside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(fail(error)),
        _ => {}
    }
    std::os::unix::fs::symlink(node, &aside).map_err(fail)?;
    std::fs::rename(&aside, link).map_err(fail)
}

/// Removes the link if it points to `node`.
pub(crate) fn remove(link: &Path, node: &Path) -> Result<(), FrontendError> {
    let fail = |error| FrontendError::io(format!("remove link {}", link.display()), error);
    match std::fs::read_link(link) {
        Ok(target) if target == node => std::fs::remove_file(link).map_err(fail),
        // Somebody else's by now: not ours to remove.
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(fail(error)),
    }
}

/// Removes all links of `dir` that are not the link of one of `keep`. Everything that is not a symbolic link stays.
/// Returns what was removed.
///
/// # Errors
/// When the directory cannot be read or changed; one that is not there has no stale links.
pub fn remove_stale(dir: &Path, keep: &[Device]) -> Result<Vec<PathBuf>, FrontendError> {
    let fail = |error| FrontendError::io(format!("clean device directory {}", dir.display()), error);
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(fail(error)),
    };
    let mut removed = Vec::new();
    for entry in entries {
        let path = entry.map_err(fail)?.path();
        let Ok(target) = std::fs::read_link(&path) else {
            continue;
        };
        if !keep.iter().any(|device| device.link == path && device.node == target) {
            std::fs::remove_file(&path).map_err(fail)?;
            removed.push(path);
        }
    }
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a59_a_stale_link_is_removed_and_a_file_in_the_way_is_refused_untouched() {
        let dir = tempfile::tempdir().unwrap();
        let name: DeviceName = "mydata".parse().unwrap();
        let link = create(dir.path(), &name, Path::new("/dev/loop77")).unwrap();
        assert_eq!(std::fs::read_link(&link).unwrap(), Path::new("/dev/loop77"));
        create(dir.path(), &name, Path::new("/dev/loop78")).unwrap();
        assert_eq!(std::fs::read_link(&link).unwrap(), Path::new("/dev/loop78"));
        remove(&link, Path::new("/dev/loop77")).unwrap();
        assert!(
            link.is_symlink(),
            "a link that points elsewhere by now is not ours to remove"
        );

        std::fs::write(dir.path().join("other"), "precious").unwrap();
        assert_eq!(remove_stale(dir.path(), &[]).unwrap(), [link]);
        let error = create(dir.path(), &"other".parse().unwrap(), Path::new("/dev/loop1")).unwrap_err();
        assert!(matches!(error, FrontendError::InTheWay { .. }), "{error}");
        assert_eq!(std::fs::read(dir.path().join("other")).unwrap(), b"precious");
    }

    #[test]
    fn names_that_could_leave_the_directory_are_refused() {
        for bad in ["", "..", "a/b", "A", "-a", "a-", "a.b", &"x".repeat(64)] {
            assert!(bad.parse::<DeviceName>().is_err(), "{bad:?}");
        }
        assert!("my-data-2".parse::<DeviceName>().is_ok());
    }
}
