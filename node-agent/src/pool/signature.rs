//! Finds what is already on a disk by its magic numbers, so that nobody's data is overwritten by mistake.
//!
//! Invariant: reads only. An unreadable disk is an error, never "empty".

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Where a magic number lies (bytes).
enum At {
    /// From the start of the disk.
    Start(u64),
    /// Back from the end of the disk, after rounding that down.
    End { back: u64, rounded_to: u64 },
}

impl At {
    fn offset(&self, size_bytes: u64) -> u64 {
        match *self {
            At::Start(offset) => offset,
            At::End { back, rounded_to } => (size_bytes / rounded_to * rounded_to).saturating_sub(back),
        }
    }
}

struct Magic {
    name: &'static str,
    at: At,
    bytes: &'static [u8],
}

const fn magic(name: &'static str, offset: u64, bytes: &'static [u8]) -> Magic {
    Magic {
        name,
        at: At::Start(offset),
        bytes,
    }
}

/// Checked in this order; the first match names the disk's content.
const MAGICS: &[Magic] = &[
    magic("LUKS", 0, b"LUKS\xba\xbe"),
    magic("xfs file system", 0, b"XFSB"),
    magic("ext2/3/4 file system", 1080, b"\x53\xef"),
    magic("btrfs file system", 0x1_0040, b"_BHRfS_M"),
    magic("f2fs file system", 1024, b"\x10\x20\xf5\xf2"),
    magic("bcachefs file system", 4120, b"\xc6\x85\x73\xf6\x66\xce\x90\xa9"),
    magic("bcache device", 4120, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca"),
    magic("LVM2 physical volume", 512, b"LABELONE"),
    magic("LVM2 physical volume", 0, b"LABELONE"),
    magic("LVM2 physical volume", 1024, b"LABELONE"),
    magic("LVM2 physical volume", 1536, b"LABELONE"),
    magic("Linux RAID member", 4096, b"\xfc\x4e\x2b\xa9"),
    magic("Linux RAID member", 0, b"\xfc\x4e\x2b\xa9"),
    Magic {
        name: "Linux RAID member",
        at: At::End {
            back: 8192,
            rounded_to: 4096,
        },
        bytes: b"\xfc\x4e\x2b\xa9",
    },
    Magic {
        name: "Linux RAID member",
        at: At::End {
            back: 0x1_0000,
            rounded_to: 0x1_0000,
        },
        bytes: b"\xfc\x4e\x2b\xa9",
    },
    Magic {
        name: "DRBD metadata",
        at: At::End {
            back: 4096 - 60,
            rounded_to: 4096,
        },
        bytes: b"\x83\x74\x02\x6b",
    },
    Magic {
        name: "DRBD metadata",
        at: At::End {
            back: 4096 - 60,
            rounded_to: 4096,
        },
        bytes: b"\x83\x74\x02\x6d",
    },
    magic("swap space", 4086, b"SWAPSPACE2"),
    magic("swap space", 4086, b"SWAP-SPACE"),
    magic("swap space", 65526, b"SWAPSPACE2"),
    magic("Ceph OSD", 0, b"bluestore block device"),
    magic("ZFS member", 0x2_0000, b"\x0c\xb1\xba\0\0\0\0\0"),
    magic("ZFS member", 0x2_0000, b"\0\0\0\0\0\xba\xb1\x0c"),
    magic("GPT partition table", 512, b"EFI PART"),
    magic("GPT partition table", 4096, b"EFI PART"),
    Magic {
        name: "GPT backup partition table",
        at: At::End {
            back: 512,
            rounded_to: 512,
        },
        bytes: b"EFI PART",
    },
    magic("NTFS file system", 3, b"NTFS    "),
    magic("exFAT file system", 3, b"EXFAT   "),
    magic("squashfs file system", 0, b"hsqs"),
    magic("EROFS file system", 1024, b"\xe2\xe1\xf5\xe0"),
    magic("NILFS2 file system", 1030, b"\x34\x34"),
    magic("OCFS2 file system", 8192, b"OCFSV2"),
    magic("GFS2 file system", 0x1_0000, b"\x01\x16\x19\x70"),
    magic("reiserfs file system", 0x1_0034, b"ReIsEr"),
    magic("JFS file system", 0x8000, b"JFS1"),
    magic("ISO 9660 image", 0x8001, b"CD001"),
    magic("VMFS volume", 0x10_0000, b"\x0d\xd0\x01\xc0"),
    magic("VDO volume", 0, b"dmvdo001"),
    magic("Stratis member", 4100, b"!Stra0tis\x86\xff\x02^\x41rh"),
    magic("BitLocker volume", 3, b"-FVE-FS-"),
    magic("partition table or boot sector", 510, b"\x55\xaa"),
];

/// Names what a disk holds, or `None` when no known content is found.
///
/// # Errors
/// The disk cannot be read where it says it has bytes.
pub fn find(disk: &File, size_bytes: u64) -> io::Result<Option<&'static str>> {
    let mut buffer = [0_u8; 32];
    for magic in MAGICS {
        let offset = magic.at.offset(size_bytes);
        let found = &mut buffer[..magic.bytes.len()];
        if offset.saturating_add(found.len() as u64) > size_bytes {
            continue;
        }
        disk.read_exact_at(found, offset)?;
        if found == magic.bytes {
            return Ok(Some(magic.name));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk() -> File {
        let disk = tempfile::tempfile().unwrap();
        disk.set_len(8 << 20).unwrap();
        disk
    }

    #[test]
    fn a59_every_known_signature_is_found_and_an_empty_disk_has_none() {
        assert_eq!(find(&disk(), 8 << 20).unwrap(), None);
        for magic in MAGICS {
            let disk = disk();
            disk.write_all_at(magic.bytes, magic.at.offset(8 << 20)).unwrap();
            assert_eq!(find(&disk, 8 << 20).unwrap(), Some(magic.name));
        }
    }

    #[test]
    fn a59_what_mkfs_makes_is_found() {
        for (tool, arguments, name) in [
            ("mkfs.ext4", &["-q", "-F"][..], "ext2/3/4 file system"),
            ("mkswap", &["-f"][..], "swap space"),
        ] {
            let file = tempfile::NamedTempFile::new().unwrap();
            file.as_file().set_len(32 << 20).unwrap();
            let Ok(output) = std::process::Command::new(tool)
                .args(arguments)
                .arg(file.path())
                .output()
            else {
                eprintln!("{tool} is not installed: this case is covered by the table only");
                continue;
            };
            assert!(output.status.success(), "{output:?}");
            assert_eq!(find(file.as_file(), 32 << 20).unwrap(), Some(name));
        }
    }

    #[test]
    fn a_disk_that_cannot_be_read_is_an_error_and_not_empty() {
        assert!(find(&disk(), 16 << 20).is_err());
    }
}
