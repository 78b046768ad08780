//! The disk from which a system installs Evenkeel's guest agent (`crates/guest`), and the script by
//! which cloud-init does it at the system's first boot.
//!
//! The agent is a program beside this one. A machine keeps the disk that it was given: a new version of
//! the program is no change of the machine.

use crate::fat;
use crate::image::ImageFile;
use anyhow::{Context, Result};
use std::path::Path;

/// The program, and its name on the disk.
const PROGRAM: &str = "keel-guest";
/// The label by which the script finds the disk, padded as in a boot sector.
const LABEL: [u8; 11] = *b"KEEL-GUEST ";

/// What cloud-init runs (its `vendor-data`). Other bytes make another disk for cloud-init of every
/// machine, which `keel apply` shows as a change.
pub(crate) const INSTALL_SCRIPT: &str = "#!/bin/sh
set -e
place=/run/keel-guest
mkdir -p $place
mount -o ro \"$(findfs LABEL=KEEL-GUEST)\" $place
$place/keel-guest install
umount $place
";

/// The disk.
///
/// # Errors
/// If the program is not there.
pub(crate) fn disk() -> Result<ImageFile> {
    let own = std::env::current_exe().context("cannot tell where this program is")?;
    disk_of(&own.with_file_name(PROGRAM))
}

fn disk_of(program: &Path) -> Result<ImageFile> {
    let bytes = std::fs::read(program).with_context(|| {
        let shown = program.display();
        format!(
            "cannot read {shown}, the guest agent to install (it is in the archive of `cargo xtask \
             package`; `cargo xtask guest-agent` builds it)"
        )
    })?;
    let disk = fat::file_system(LABEL, &[(PROGRAM, bytes)]);
    let disk = disk.context("the disk with the guest agent cannot be made")?;
    Ok(ImageFile::made("the disk with the guest agent", disk))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_disk_has_the_program_under_the_names_of_the_script() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join(PROGRAM);
        let missing = format!("{:#}", disk_of(&program).map(drop).unwrap_err());
        assert!(missing.contains("xtask guest-agent"), "{missing}");
        std::fs::write(&program, b"\x7fELF").unwrap();
        let disk = disk_of(&program).unwrap();
        let (label, content) = fat::tests::content(disk.bytes(), PROGRAM);
        assert_eq!(content, b"\x7fELF");
        assert!(INSTALL_SCRIPT.contains(&format!("LABEL={label})")));
        assert!(INSTALL_SCRIPT.contains(&format!("/{PROGRAM} install\n")));
        // Machines have it.
        let hash = blake3::hash(INSTALL_SCRIPT.as_bytes()).to_hex();
        assert_eq!(&hash[..16], "e17c3e41119247c5");
    }
}
