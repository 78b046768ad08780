//! Checkpoints of systems in a real QEMU.

use super::create::{Checkpointer, CreateError, Destination};
use super::restore::restore;
use crate::arguments::Machine;
use crate::console::Console;
use crate::guest::Guest;
use crate::process::VmEnd;
use crate::processor::Accelerator;
use crate::spec::QemuSpec;
use crate::vm::{Launch, Vm};
use keel_cluster::Epoch;
use keel_machine::checkpoint::{
    CreatedCheckpoint, MemoryRestore, Origin, Repository, Subject, compact,
};
use keel_machine::log::{Log, split_records};
use keel_testkit::bare_system::{counting_system, qemu_is_installed};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;

const MEMORY_BYTES: u64 = 32 << 20;
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes of the pages to which the system writes with each number.
const WRITTEN_BYTES: u64 = 256 << 12;

/// A system that counts, and its checkpoints.
struct Counting {
    folder: tempfile::TempDir,
    own: QemuSpec,
    repository: Repository,
    runtime: Runtime,
    checkpointer: Checkpointer,
}

impl Counting {
    /// None if this computer has no QEMU.
    fn new() -> Option<Self> {
        if !qemu_is_installed() {
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let system = counting_system(folder.path(), None).unwrap();
        fs::write(folder.path().join("kernel"), system).unwrap();
        let store = folder.path().join("store");
        Some(Counting {
            own: QemuSpec::of_kernel("kernel".into()),
            repository: Repository::create(store.to_str().unwrap()).unwrap(),
            runtime: Runtime::new().unwrap(),
            checkpointer: Checkpointer::default(),
            folder,
        })
    }

    fn place(&self, name: &str) -> PathBuf {
        let place = self.folder.path().join(name);
        fs::create_dir_all(&place).unwrap();
        place
    }

    /// One that does not run yet.
    fn launch(&self, folder: &Path, log_base: u64, is_incoming: bool) -> Guest {
        let machine = Machine {
            name: "s",
            spec: &self.own,
            memory_bytes: MEMORY_BYTES,
            images: self.folder.path(),
            accelerator: Accelerator::Tcg,
            is_incoming,
        };
        let Launch { vm, console } = Vm::launch(folder, &machine).unwrap();
        let log = Arc::new(Log::open(folder, log_base).unwrap());
        let console = Console::follow(console, log.clone(), u64::MAX).unwrap();
        Guest { vm, console, log }
    }

    fn take(&mut self, guest: &Guest, give_up: bool) -> Result<CreatedCheckpoint, CreateError> {
        let subject = Subject {
            name: "s".parse().unwrap(),
            spec: self.own.in_spec(MEMORY_BYTES),
            epoch: Epoch::default(),
        };
        let destination = Destination {
            repository: &self.repository,
            runtime: self.runtime.handle(),
            full: false,
            after: None,
            give_up: &AtomicBool::new(give_up),
        };
        self.checkpointer.take(guest, subject, &destination)
    }

    /// What it printed, restored from a checkpoint, until it had counted on.
    fn counted_after(&self, checkpoint: &CreatedCheckpoint, name: &str) -> String {
        let (manifest, folder) = (&checkpoint.manifest, self.place(name));
        let origin = Origin {
            repository: self.repository.url().to_owned(),
            machine: "s".parse().unwrap(),
            id: Some(manifest.id.clone()),
            is_clone: false,
            memory: MemoryRestore::Eager,
        };
        let handle = self.runtime.handle();
        let restored = restore(&origin, &self.own, &self.repository, handle, &folder).unwrap();
        let guest = self.launch(&folder, manifest.log_end, true);
        restored.load(&guest.vm, &self.repository, handle).unwrap();
        guest.vm.resume().unwrap();
        wait_output(&guest, 40);
        end(&guest);
        printed(&guest.log, manifest.log_end)
    }
}

/// Waits until it has printed so many bytes more.
fn wait_output(guest: &Guest, bytes: u64) {
    let (before, deadline) = (guest.log.end(), Instant::now() + PATIENCE);
    while guest.log.end() < before + bytes {
        assert!(guest.vm.end_within(Duration::from_millis(5)).is_none());
        assert!(Instant::now() < deadline, "it prints nothing more");
    }
}

fn end(guest: &Guest) {
    guest.vm.kill(VmEnd::Discarded);
    guest.vm.wait();
    guest.console.close();
}

/// What is in the log behind an offset.
fn printed(log: &Log, from: u64) -> String {
    let (mut bytes, mut at) = (Vec::new(), from);
    while at < log.end() {
        let (begins, mut piece) = log.read(at, 1 << 20).unwrap();
        assert_eq!(begins, at, "output is missing");
        at += piece.len() as u64;
        bytes.append(&mut piece);
    }
    let records = split_records(&mut bytes).into_iter();
    let text: Vec<u8> = records.flat_map(|(_, text)| text).collect();
    String::from_utf8(text).unwrap()
}

/// Checks that each number is there once, and the memory was right each time; returns how many.
fn check_count(text: &str) -> usize {
    // The last one may not be whole.
    let (whole, _) = text.rsplit_once('\n').unwrap();
    for (number, line) in whole.lines().enumerate() {
        assert_eq!(line, number.to_string(), "{text}");
    }
    whole.lines().count()
}

#[test]
fn a_system_goes_on_from_where_it_was() {
    let Some(mut counting) = Counting::new() else {
        return;
    };
    let guest = counting.launch(&counting.place("a"), 0, false);
    guest.vm.resume().unwrap();
    wait_output(&guest, 40);
    let full = counting.take(&guest, false).unwrap();
    wait_output(&guest, 40);
    let second = counting.take(&guest, false).unwrap();
    // Given up for a move, after which nothing is known of what it wrote.
    let given_up = counting.take(&guest, true);
    assert!(
        matches!(given_up, Err(CreateError::GivenUp)),
        "{given_up:?}"
    );
    wait_output(&guest, 40);
    let third = counting.take(&guest, false).unwrap();
    wait_output(&guest, 40);
    let fourth = counting.take(&guest, false).unwrap();
    wait_output(&guest, 40);
    end(&guest);
    check_count(&printed(&guest.log, 0));

    assert_eq!(second.manifest.parent.as_ref(), Some(&full.manifest.id));
    assert_eq!(third.manifest.parent, None);
    assert_eq!(fourth.manifest.parent.as_ref(), Some(&third.manifest.id));
    for (changed, whole) in [(&second, &full), (&fourth, &third)] {
        let (changed, whole) = (&changed.manifest, &whole.manifest);
        let (changed, whole) = (changed.stored_bytes(), whole.stored_bytes());
        assert!(changed >= WRITTEN_BYTES, "{changed} bytes");
        assert!(
            changed < 2 * WRITTEN_BYTES && changed < whole,
            "{changed} of {whole}"
        );
    }
    let before = printed(&guest.log, 0);
    for (number, checkpoint) in [&full, &second, &third, &fourth].into_iter().enumerate() {
        let until = {
            let log_end = checkpoint.manifest.log_end;
            let later = printed(&guest.log, log_end);
            &before[..before.len() - later.len()]
        };
        let after = counting.counted_after(checkpoint, &format!("restored-{number}"));
        let all = format!("{until}{after}");
        assert!(check_count(&all) > until.lines().count());
    }
    // A later one without those before.
    let (id, handle) = (&second.manifest.id, counting.runtime.handle());
    let machine = &second.manifest.machine;
    let bytes = compact(&counting.repository, handle, machine, id).unwrap();
    assert!(bytes.is_some_and(|bytes| bytes >= full.manifest.stored_bytes()));
    let after = counting.counted_after(&second, "compacted");
    let later = printed(&guest.log, second.manifest.log_end);
    let until = &before[..before.len() - later.len()];
    check_count(&format!("{until}{after}"));
}
