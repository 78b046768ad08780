//! Files that the kernel makes up, in `/proc` and `/sys`: what nodes read each second.

use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Bytes that are read; the kernel gives a page at a time.
const BYTES_MAX: usize = 4096;

/// The text of a file that is shorter than a page, in one call where
/// [`std::fs::read_to_string`] makes five; a longer one is cut off. `None` if it cannot be read.
pub fn read_short(path: &Path) -> Option<String> {
    let mut text = vec![0; BYTES_MAX];
    let length = File::open(path).ok()?.read(&mut text).ok()?;
    text.truncate(length);
    String::from_utf8(text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_files_are_read_whole() {
        let status = read_short(Path::new("/proc/self/status")).unwrap();
        assert!(status.starts_with("Name:"));
        assert!(status.contains("nonvoluntary_ctxt_switches:"));
        assert!(read_short(Path::new("/proc/self/nothing")).is_none());
    }
}
