//! Copying between guest memory and bounce buffers. Other guest threads run concurrently: no
//! reference into guest memory is held, and each value is read once.

use crate::abi::{Result, types};
use types::Errno;
use wiggle::{GuestMemory, GuestPtr};

/// Maximum bytes of one read or write; a short result is legal.
pub(crate) const TRANSFER_BYTES_MAX: usize = 1 << 20;

/// Maximum buffers of one call, as Linux's `IOV_MAX`; the rest is left for the next call.
pub(crate) const BUFFERS_MAX: usize = 1024;

/// Maximum length of a path, as Linux's `PATH_MAX` without its NUL.
const PATH_BYTES_MAX: u32 = 4095;

/// The target ranges of a read, all within memory.
#[derive(Debug)]
pub(crate) struct Scatter {
    ranges: Vec<GuestPtr<[u8]>>,
    /// Their sum, at most [`TRANSFER_BYTES_MAX`].
    pub(crate) length: usize,
}

impl Scatter {
    /// # Errors
    /// A trap if any range is outside of memory, before any effect.
    pub(crate) fn new(memory: &GuestMemory<'_>, iovs: types::IovecArray) -> Result<Self> {
        let mut ranges = Vec::new();
        let mut length = 0;
        for iov in iovs.iter().take(BUFFERS_MAX) {
            let iov = memory.read(iov?)?;
            let room = TRANSFER_BYTES_MAX - length;
            let part = iov.buf_len.min(u32::try_from(room)?);
            if part == 0 {
                continue;
            }
            check_range(memory, iov.buf.as_array(iov.buf_len))?;
            ranges.push(iov.buf.as_array(part));
            length += part as usize;
        }
        Ok(Self { ranges, length })
    }

    pub(crate) fn write(&self, memory: &mut GuestMemory<'_>, mut bytes: &[u8]) -> Result<()> {
        for range in &self.ranges {
            let count = (range.len() as usize).min(bytes.len());
            let (now, later) = bytes.split_at(count);
            let part = range.as_ptr().as_array(u32::try_from(count)?);
            memory.copy_from_slice(now, part)?;
            bytes = later;
        }
        Ok(())
    }
}

/// The first [`TRANSFER_BYTES_MAX`] bytes of a write's buffers.
pub(crate) fn gather(memory: &GuestMemory<'_>, iovs: types::CiovecArray) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for iov in iovs.iter().take(BUFFERS_MAX) {
        let iov = memory.read(iov?)?;
        let room = TRANSFER_BYTES_MAX - bytes.len();
        let part = iov.buf_len.min(u32::try_from(room)?);
        if part == 0 {
            continue;
        }
        check_range(memory, iov.buf.as_array(iov.buf_len))?;
        bytes.extend_from_slice(&memory.to_vec(iov.buf.as_array(part))?);
    }
    Ok(bytes)
}

/// # Errors
/// A trap if `range` is not within memory.
pub(crate) fn check_range(memory: &GuestMemory<'_>, range: GuestPtr<[u8]>) -> Result<()> {
    memory.as_slice(range)?;
    Ok(())
}

/// Reads a path. The host refuses NUL bytes.
///
/// # Errors
/// `nametoolong`, `ilseq` if it is not UTF-8, or a trap.
pub(crate) fn read_path(memory: &GuestMemory<'_>, path: GuestPtr<str>) -> Result<String> {
    if path.len() > PATH_BYTES_MAX {
        return Err(Errno::Nametoolong.into());
    }
    Ok(memory.as_cow_str(path)?.into_owned())
}

/// Writes C strings one after the other and a pointer to each.
pub(crate) fn write_strings(
    memory: &mut GuestMemory<'_>,
    mut pointers: GuestPtr<GuestPtr<u8>>,
    mut buffer: GuestPtr<u8>,
    strings: impl Iterator<Item = String>,
) -> Result<()> {
    for string in strings {
        let mut bytes = string.into_bytes();
        bytes.push(0);
        let length = u32::try_from(bytes.len())?;
        memory.write(pointers, buffer)?;
        memory.copy_from_slice(&bytes, buffer.as_array(length))?;
        pointers = pointers.add(1)?;
        buffer = buffer.add(length)?;
    }
    Ok(())
}
