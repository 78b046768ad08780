//! The functions of snapshot 0 (`wasi_unstable`) that are not as preview 1's of the same
//! name. All others are, in values and layouts.
//!
//! - `fd_seek`: `whence` counts current, end, start from 0 (preview 1: start, current, end)
//! - `fd_filestat_get`, `path_filestat_get`: the number of links has 32 bits, so a `filestat`
//!   has 56 bytes
//! - `poll_oneoff`: a clock's subscription begins with an identifier of 64 bits that means
//!   nothing, so a `subscription` has 56 bytes; events are the same

use crate::abi::{self, types, wasi_snapshot_preview1 as p1};
use crate::call::Call;
use p1::WasiSnapshotPreview1;
use types::{Errno, Subscription, SubscriptionClock, SubscriptionFdReadwrite, SubscriptionU};
use wiggle::error::Result;
use wiggle::{GuestError, GuestMemory, GuestPtr};

/// Bytes of a `filestat`.
pub(crate) const FILESTAT_BYTES: usize = 56;
/// Bytes of a `subscription`.
pub(crate) const SUBSCRIPTION_BYTES: usize = 56;

/// `whence` of preview 1 by that of snapshot 0.
const WHENCE: [i32; 3] = [1, 2, 0];

pub(crate) fn fd_seek(
    call: &mut Call<'_>,
    memory: &mut GuestMemory<'_>,
    fd: i32,
    offset: i64,
    whence: i32,
    new_offset: i32,
) -> Result<i32> {
    // (One that there is not stays one.)
    let known = usize::try_from(whence).ok().and_then(|at| WHENCE.get(at));
    let whence = known.copied().unwrap_or(whence);
    p1::fd_seek(call, memory, fd, offset, whence, new_offset)
}

pub(crate) fn fd_filestat_get(
    call: &mut Call<'_>,
    memory: &mut GuestMemory<'_>,
    fd: i32,
    target: i32,
) -> Result<i32> {
    let fd = types::Fd::from(fd.cast_unsigned());
    let filestat = WasiSnapshotPreview1::fd_filestat_get(call, memory, fd);
    write_filestat(memory, target, filestat)
}

pub(crate) fn path_filestat_get(
    call: &mut Call<'_>,
    memory: &mut GuestMemory<'_>,
    fd: i32,
    flags: i32,
    path: i32,
    path_bytes: i32,
    target: i32,
) -> Result<i32> {
    let fd = types::Fd::from(fd.cast_unsigned());
    let flags = types::Lookupflags::try_from(flags)?;
    let path = GuestPtr::<str>::new((path.cast_unsigned(), path_bytes.cast_unsigned()));
    let filestat = WasiSnapshotPreview1::path_filestat_get(call, memory, fd, flags, path);
    write_filestat(memory, target, filestat)
}

pub(crate) fn poll_oneoff(
    call: &mut Call<'_>,
    memory: &mut GuestMemory<'_>,
    subscriptions: i32,
    events: i32,
    count: i32,
    written: i32,
) -> Result<i32> {
    let count = count.cast_unsigned();
    let (from, to) = (subscriptions.cast_unsigned(), events.cast_unsigned());
    let polled = call.poll(memory, count, GuestPtr::new(to), |memory, number| {
        let at = (number as usize)
            .checked_mul(SUBSCRIPTION_BYTES)
            .and_then(|bytes| from.checked_add(u32::try_from(bytes).ok()?))
            .ok_or(GuestError::PtrOverflow)?;
        read_subscription(memory, at)
    });
    match polled {
        Ok(count) => {
            memory.write(GuestPtr::new(written.cast_unsigned()), count)?;
            Ok(Errno::Success as i32)
        }
        Err(error) => errno_of(error),
    }
}

/// The errno for the guest; an error where the call ends otherwise.
fn errno_of(error: types::Error) -> Result<i32> {
    error.downcast().map(|errno| errno as i32)
}

fn write_filestat(
    memory: &mut GuestMemory<'_>,
    target: i32,
    filestat: abi::Result<types::Filestat>,
) -> Result<i32> {
    let filestat = match filestat {
        Ok(filestat) => filestat,
        Err(error) => return errno_of(error),
    };
    let mut bytes = [0; FILESTAT_BYTES];
    let links = u32::try_from(filestat.nlink).unwrap_or(u32::MAX);
    bytes[..8].copy_from_slice(&filestat.dev.to_le_bytes());
    bytes[8..16].copy_from_slice(&filestat.ino.to_le_bytes());
    bytes[16] = filestat.filetype as u8;
    bytes[20..24].copy_from_slice(&links.to_le_bytes());
    bytes[24..32].copy_from_slice(&filestat.size.to_le_bytes());
    bytes[32..40].copy_from_slice(&filestat.atim.to_le_bytes());
    bytes[40..48].copy_from_slice(&filestat.mtim.to_le_bytes());
    bytes[48..].copy_from_slice(&filestat.ctim.to_le_bytes());
    let words = GuestPtr::<u64>::new(target.cast_unsigned()).as_array(FILESTAT_BYTES as u32 / 8);
    for (place, word) in words.iter().zip(bytes.as_chunks().0) {
        memory.write(place?, u64::from_le_bytes(*word))?;
    }
    Ok(Errno::Success as i32)
}

fn read_subscription(memory: &GuestMemory<'_>, at: u32) -> abi::Result<Subscription> {
    let place = |offset: u32| at.checked_add(offset).ok_or(GuestError::PtrOverflow);
    let userdata = memory.read(GuestPtr::<u64>::new(at))?;
    let tag = memory.read(GuestPtr::<u8>::new(place(8)?))?;
    let fd = |memory: &GuestMemory<'_>| {
        Ok::<_, types::Error>(SubscriptionFdReadwrite {
            file_descriptor: memory.read(GuestPtr::new(place(16)?))?,
        })
    };
    let u = match tag {
        // (Behind its identifier.)
        0 => SubscriptionU::Clock(SubscriptionClock {
            id: memory.read(GuestPtr::new(place(24)?))?,
            timeout: memory.read(GuestPtr::new(place(32)?))?,
            precision: memory.read(GuestPtr::new(place(40)?))?,
            flags: memory.read(GuestPtr::new(place(48)?))?,
        }),
        1 => SubscriptionU::FdRead(fd(memory)?),
        2 => SubscriptionU::FdWrite(fd(memory)?),
        _ => return Err(GuestError::InvalidEnumValue("eventtype").into()),
    };
    Ok(Subscription { userdata, u })
}
