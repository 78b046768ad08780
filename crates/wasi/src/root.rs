//! Preopened directories of a machine, on the host or in a volume.

use crate::config::{Preopen, Source};
use crate::descriptor::FileId;
use crate::error::Error;
use crate::volume::{Volume, VolumeRecord};
use cap_std::fs::Dir;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

/// A preopened directory; it stays when the guest closes the descriptor, since files opened below
/// it are located through it.
#[derive(Debug)]
pub(crate) struct Root {
    pub(crate) place: RootPlace,
    pub(crate) guest: String,
    pub(crate) read_only: bool,
}

#[derive(Debug)]
pub(crate) enum RootPlace {
    Host { dir: Dir, id: FileId },
    Volume(Arc<Volume>),
}

/// Opens a preopen; with `record` a captured volume.
pub(crate) fn open_root(
    preopen: &Preopen,
    record: Option<VolumeRecord>,
    now_ns: u64,
) -> Result<Root, Error> {
    let place = match &preopen.source {
        Source::Host(host) => open_host(preopen, host)?,
        Source::Volume {
            folder,
            limits,
            stalls,
        } => {
            let opened = match record {
                Some(record) => Volume::restore(record, folder, *limits, stalls.clone(), None)
                    .map_err(|what| damaged_volume(preopen, &what))?,
                None => Volume::new(folder, *limits, stalls.clone(), now_ns)
                    .map_err(|source| failed_preopen(preopen, folder, source))?,
            };
            RootPlace::Volume(opened)
        }
        Source::Backed {
            folder,
            limits,
            stalls,
            backed,
        } => {
            // A new machine has no open files.
            let begins = record.is_none();
            let record = record.or_else(|| backed.record.clone());
            let record = record.unwrap_or_else(|| VolumeRecord::empty(now_ns));
            let opened = Volume::restore(record, folder, *limits, stalls.clone(), Some(backed))
                .map_err(|what| damaged_volume(preopen, &what))?;
            if begins {
                opened.drop_orphans();
            }
            RootPlace::Volume(opened)
        }
    };
    Ok(Root {
        place,
        guest: preopen.guest.clone(),
        read_only: preopen.read_only,
    })
}

fn damaged_volume(preopen: &Preopen, what: &str) -> Error {
    Error::Damaged(format!("volume {:?}: {what}", preopen.guest))
}

fn failed_preopen(preopen: &Preopen, host: &Path, source: std::io::Error) -> Error {
    Error::Preopen {
        guest: preopen.guest.clone(),
        host: host.display().to_string(),
        source,
    }
}

fn open_host(preopen: &Preopen, host: &Path) -> Result<RootPlace, Error> {
    let failed = |source| failed_preopen(preopen, host, source);
    // Not `O_PATH`, as cap-std would: its times must be settable.
    let directory = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(rustix::fs::OFlags::DIRECTORY.bits().cast_signed())
        .open(host);
    let dir = Dir::from_std_file(directory.map_err(failed)?);
    let id = FileId::of_path(&dir.dir_metadata().map_err(failed)?);
    Ok(RootPlace::Host { dir, id })
}
