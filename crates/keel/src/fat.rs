//! Small file systems that are made here for systems to read: FAT, which every one of them knows.

use anyhow::Result;
use fatfs::{FatType, FileSystem, FormatVolumeOptions, FsOptions};
use std::io::{Cursor, Write};

/// Room for the file system's own tables.
const TABLES_BYTES: usize = 128 << 10;

/// A file system with these files, by their names. Its label, by which systems find it, is padded with
/// spaces. Equal files make equal bytes.
///
/// # Errors
/// If they do not fit into one.
pub(crate) fn file_system(label: [u8; 11], files: &[(&str, Vec<u8>)]) -> Result<Vec<u8>> {
    let content: usize = files.iter().map(|(_, bytes)| bytes.len()).sum();
    // Whole KiB, and a FAT of 12 bits has some thousand clusters.
    let bytes = (TABLES_BYTES + content + content / 4).next_multiple_of(64 << 10);
    let mut disk = Cursor::new(vec![0; bytes]);
    let options = FormatVolumeOptions::new()
        .volume_label(label)
        .volume_id(0)
        .fat_type(FatType::Fat12);
    fatfs::format_volume(&mut disk, options)?;
    {
        let system = FileSystem::new(&mut disk, FsOptions::new())?;
        for (name, bytes) in files {
            let mut file = system.root_dir().create_file(name)?;
            file.write_all(bytes)?;
            file.flush()?;
        }
        system.unmount()?;
    }
    Ok(disk.into_inner())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::io::Read;

    /// The label of a file system, and what is in one of its files.
    pub(crate) fn content(disk: &[u8], name: &str) -> (String, Vec<u8>) {
        let system = FileSystem::new(Cursor::new(disk.to_vec()), FsOptions::new()).unwrap();
        let mut content = Vec::new();
        let mut file = system.root_dir().open_file(name).unwrap();
        file.read_to_end(&mut content).unwrap();
        (system.volume_label(), content)
    }

    /// Large files fit, and the file system is little larger.
    #[test]
    fn a_file_system_has_room_for_what_is_in_it() {
        for bytes in [0, 20, 100 << 10, 1 << 20, 3_000_001, 12 << 20] {
            let files = [("a-long-name", vec![b'#'; bytes]), ("b", vec![7; 3])];
            let disk = file_system(*b"LABEL      ", &files).unwrap();
            let (label, found) = content(&disk, "a-long-name");
            assert_eq!((label.as_str(), found.len()), ("LABEL", bytes));
            assert_eq!(content(&disk, "b").1, [7; 3]);
            assert!(disk.len() < bytes * 3 / 2 + (256 << 10));
        }
    }
}
