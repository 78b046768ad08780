//! A guest whose disk has no room on its file system waits for it.
//!
//! QEMU stops the guest in the middle of the write (`werror=enospc`, its default), and repeats the
//! write when the guest goes on: so the guest notices a delay, and nothing is lost. It is let go on
//! again and again until there is room, and users see why it stands still. Other errors of disks are
//! the guest's own to handle.

use crate::arguments::DISK;
use crate::block_job::{BACKUP, COPY};
use crate::root_disk::ROOT;
use crate::spec::Disk;
use crate::vm::Vm;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// Pause before the guest tries again.
const RETRY_AFTER: Duration = Duration::from_secs(2);
/// How long it may take until the repeated write fails too.
const FAILS_WITHIN: Duration = Duration::from_millis(200);

/// Follows a guest with these disks until its process has ended. `paused` gets why it stands still,
/// if it does.
///
/// # Errors
/// If no thread can be started.
pub(crate) fn follow(
    vm: Arc<Vm>,
    disks: Vec<Disk>,
    paused: watch::Sender<Option<String>>,
) -> io::Result<()> {
    let thread = std::thread::Builder::new().name("full-disk".into());
    let follows = move || {
        while !vm.has_ended() {
            let Some(disk) = vm.full_disk_within(Duration::from_secs(3600)) else {
                continue;
            };
            paused.send_replace(Some(sentence(&disks, &disk)));
            let ended = wait_for_room(&vm);
            paused.send_replace(None);
            if ended {
                return;
            }
        }
    };
    thread.spawn(follows).map(drop)
}

/// Waits until the guest runs on, or is stopped for another reason; true if it has ended.
fn wait_for_room(vm: &Vm) -> bool {
    loop {
        if vm.end_within(RETRY_AFTER).is_some() {
            return true;
        }
        match vm.retry_full_disk() {
            Ok(()) if vm.full_disk_within(FAILS_WITHIN).is_some() => {}
            Ok(()) => return false,
            Err(error) => tracing::warn!(%error, "a guest whose disk was full cannot go on yet"),
        }
    }
}

/// Why a guest stands still, for its user. `name` is QEMU's for the disk.
fn sentence(disks: &[Disk], name: &str) -> String {
    // While it is copied, what its writes pass.
    if [ROOT, COPY.filter, BACKUP.filter].contains(&name) {
        return "there is no room left where its own disk is, on this node".to_owned();
    }
    let number = name.strip_prefix(DISK).and_then(|it| it.parse().ok());
    let disk = number.and_then(|number: usize| disks.get(number));
    match disk {
        Some(disk) => format!("there is no room left where its disk {} is", disk.path),
        None => "there is no room left where one of its disks is".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::DiskFormat;

    #[test]
    fn the_disk_is_named() {
        let disks = ["/a.raw", "/b.raw"].map(|path| Disk {
            path: path.to_owned(),
            format: DiskFormat::Raw,
            read_only: false,
        });
        assert!(sentence(&disks, "disk1").contains("/b.raw"));
        for own in [ROOT, "root-mirror", "root-before-write"] {
            assert!(sentence(&disks, own).contains("its own disk"));
        }
        for other in ["disk2", "disk", "", "cloud-init", "#block123"] {
            assert!(sentence(&disks, other).contains("one of its disks"));
        }
    }
}
