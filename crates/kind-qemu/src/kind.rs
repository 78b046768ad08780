//! What an agent asks of this kind of machine.

use crate::bare_qemu;
use crate::display;
use crate::host_offers::{self, Offers};
use crate::network;
use crate::process::{QEMU, installed_version, is_installed};
use crate::processor::{Accelerator, Processor};
use crate::root_disk::{self, ImageHeader};
use crate::spec::QemuSpec;
use keel_machine::cgroup::lacks_for_cpu_limits;
use keel_machine::kind::{
    Abilities, Difference, DiskImage, Features, HostFile, Kind, KindName, KindSpec, NodeFeatures,
    WorkerFolders,
};
use keel_machine::spec::Spec;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

const NAME: &str = "qemu";

/// The largest kernel, first file system or image of a disk, in bytes.
const IMAGE_BYTES_MAX: u64 = 1 << 40;

/// Where a bzImage has its signature, and which: Documentation/arch/x86/boot.rst of Linux.
const KERNEL_SIGNATURE: (usize, &[u8]) = (0x202, b"HdrS");

/// What a kernel that any Multiboot loader starts has, aligned, in its first 8192 bytes: the
/// Multiboot specification 0.6.96, section 3.1.
const MULTIBOOT_SIGNATURE: [u8; 4] = 0x1bad_b002_u32.to_le_bytes();

/// How first file systems begin: archives of cpio, and compressed ones, as
/// Documentation/driver-api/early-userspace/buffer-format.rst of Linux lists them.
const INITRD_SIGNATURES: [&[u8]; 8] = [
    b"070701",
    b"070702",
    b"\x1f\x8b",
    b"BZh",
    b"\x5d\0\0",
    b"\xfd7zXZ\0",
    b"\x28\xb5\x2f\xfd",
    b"\x02\x21\x4c\x18",
];

/// Where the boot sector of a file system for cloud-init has its type and label, and which: "Microsoft
/// FAT Specification", section 3.2.
const CLOUD_INIT_SIGNATURE: (usize, &[u8]) = (0x2b, b"CIDATA     FAT12");

/// Whole Linux systems.
#[derive(Debug, Clone, Copy, Default)]
pub struct QemuKind;

impl QemuKind {
    /// The name of this kind.
    pub fn kind_name() -> KindName {
        match NAME.parse() {
            Ok(name) => name,
            Err(_) => unreachable!("a valid name"),
        }
    }
}

/// A field of specs that machines of this kind do not have, by its name in machine files.
fn strange_field(spec: &Spec) -> Option<&'static str> {
    (!spec.volumes.is_empty()).then_some("volume")
}

impl Kind for QemuKind {
    fn name(&self) -> KindName {
        QemuKind::kind_name()
    }

    fn abilities(&self) -> Abilities {
        Abilities {
            keeps_images: true,
            checkpoints: true,
            post_copy: true,
            executes: true,
            has_console: true,
            ..Abilities::default()
        }
    }

    fn check(&self, spec: &Spec) -> Result<(), String> {
        if let Some(field) = strange_field(spec) {
            return Err(format!("a machine of kind qemu cannot have {field}"));
        }
        let mib = 1 << 20;
        if spec.memory_bytes == 0 || !spec.memory_bytes.is_multiple_of(mib) {
            let bytes = spec.memory_bytes;
            return Err(format!("memory of {bytes} bytes: whole MiB are expected"));
        }
        let own = QemuSpec::of(spec)?;
        own.check()?;
        if spec.checkpoints.is_some() {
            let checked = own.check_checkpoints();
            checked.map_err(|reason| format!("checkpoint-every: {reason}"))?;
        }
        let Some(ha) = &spec.ha else { return Ok(()) };
        if ha.protects_output() {
            return Err(
                "ha: protect: what a system sends to its network would not wait for checkpoints"
                    .into(),
            );
        }
        if own.root.is_some() && ha.to.is_some() {
            return Err(
                "ha: to: only nodes that have the machine's checkpoint themselves say whether they can run it: leave it out (`keel checkpoint --to` stores one there as well)"
                    .into(),
            );
        }
        match own.root.is_some() && !own.disks.is_empty() {
            true => Err(
                "ha: the machine's own disk goes on elsewhere from a checkpoint, its other disks as they are: use the one or the others"
                    .into(),
            ),
            false => Ok(()),
        }
    }

    /// Its own disk is lost with its node.
    fn fails_over_from_checkpoint(&self, spec: &Spec) -> bool {
        QemuSpec::of(spec).is_ok_and(|own| own.root.is_some())
    }

    fn images(&self, spec: &Spec) -> Result<Vec<String>, String> {
        let own = QemuSpec::of(spec)?;
        Ok(own.images().map(str::to_owned).collect())
    }

    fn host_files(&self, spec: &Spec) -> Vec<HostFile> {
        let disks = QemuSpec::of(spec).map(|own| own.disks).unwrap_or_default();
        let files = disks.into_iter().map(|disk| HostFile {
            path: disk.path,
            is_written: !disk.read_only,
        });
        files.collect()
    }

    /// The processors that its QEMU can give to systems, and whether it can give them a display, in words;
    /// none if it does not say it.
    fn features_here(&self, cache: &Path) -> Features {
        let offers = host_offers::of_host(cache).unwrap_or_else(|error| {
            tracing::warn!(error, "it is not known what systems can have here");
            Offers::default()
        });
        let display = offers.has_display.then(|| display::WORD.to_owned());
        let words = offers.processors.iter().flat_map(Processor::words);
        words.chain(display).collect()
    }

    fn features_needed(&self, spec: &Spec) -> Features {
        let Ok(own) = QemuSpec::of(spec) else {
            return Features::new();
        };
        let words = own.processor.map(|processor| processor.words());
        let display = own.display.then(|| display::WORD.to_owned());
        words.into_iter().flatten().chain(display).collect()
    }

    /// Decides on its processor.
    fn complete(
        &self,
        spec: &mut Spec,
        nodes: &[NodeFeatures<'_>],
        on: Option<&str>,
    ) -> Result<(), String> {
        let mut own = QemuSpec::of(spec)?;
        own.processor = Processor::chosen(own.cpu_model, nodes, on)?;
        spec.kind_spec = KindSpec::new(&own)?;
        Ok(())
    }

    fn lacks_here(&self, spec: &Spec, cache: &Path) -> Option<String> {
        if !is_installed() {
            return Some(format!(
                "{QEMU} is not installed (apt-get install qemu-system-x86)"
            ));
        }
        if spec.cpu_limit_millis.is_some()
            && let Some(lacking) = lacks_for_cpu_limits()
        {
            return Some(format!("it lacks {lacking}, for the machine's cpu-limit"));
        }
        let own = QemuSpec::of(spec).ok()?;
        if let Some(processor) = &own.processor
            && let Err(lacking) = host_offers::check(processor, cache)
        {
            return Some(lacking);
        }
        if own.display && !host_offers::of_host(cache).is_ok_and(|it| it.has_display) {
            return Some(format!("its {QEMU} has no graphics card or no VNC"));
        }
        network::check(&own.interfaces).err()
    }

    /// A disk is locked, but a node that was cut off may hold its lock; and nothing keeps two
    /// systems of one address apart in a network.
    fn unfenced(&self, spec: &Spec) -> Option<String> {
        let own = QemuSpec::of(spec).ok()?;
        let disk = own.disks.iter().find(|disk| !disk.read_only);
        let disk = disk.map(|disk| format!("disk {}", disk.path));
        let network = || Some(format!("the network of {}", own.interfaces.first()?.bridge));
        disk.or_else(network)
    }

    fn unique(&self, spec: &Spec) -> Option<String> {
        let own = QemuSpec::of(spec).ok()?;
        let mac = &own.interfaces.first()?.mac;
        Some(format!("the hardware address {mac}"))
    }

    fn executed_here(&self, cache: &Path) -> Option<String> {
        let version = installed_version()?;
        let how = match Accelerator::of_host(cache) {
            Accelerator::Kvm => "KVM",
            Accelerator::Tcg => "translated, without KVM",
        };
        Some(format!("{NAME} (QEMU {version}, {how})"))
    }

    fn missing_for_post_copy(&self) -> Option<String> {
        bare_qemu::check_post_copy().err()
    }

    fn image_bytes_max(&self) -> u64 {
        IMAGE_BYTES_MAX
    }

    fn check_image(&self, beginning: &[u8]) -> Result<(), String> {
        let has = |(at, signature): (usize, &[u8])| {
            let rest = beginning.get(at..);
            rest.is_some_and(|rest| rest.starts_with(signature))
        };
        let (words, _) = beginning.as_chunks::<4>();
        if root_disk::is_qcow2(beginning) {
            return ImageHeader::read(beginning).map(drop);
        }
        let mut initrds = INITRD_SIGNATURES.iter();
        let is_known = has(KERNEL_SIGNATURE)
            || has(CLOUD_INIT_SIGNATURE)
            || words.contains(&MULTIBOOT_SIGNATURE)
            || initrds.any(|signature| beginning.starts_with(signature));
        match is_known {
            true => Ok(()),
            false => ImageHeader::read(beginning).map(drop).map_err(|reason| {
                format!(
                    "{reason}; nor a kernel (a bzImage of Linux, or Multiboot), nor a kernel's initrd"
                )
            }),
        }
    }

    fn shutdown_time(&self, spec: &Spec) -> Duration {
        let seconds = QemuSpec::of(spec).map_or(0, |own| own.shutdown_s);
        Duration::from_secs(seconds.into())
    }

    fn missing_of_earlier_life(&self, spec: &Spec, folder: &Path) -> Option<String> {
        let own = QemuSpec::of(spec).ok()?;
        let is_gone = own.root.is_some() && !root_disk::path(folder).exists();
        is_gone.then(|| "its own disk".into())
    }

    fn disk_bytes(&self, folder: &Path) -> u64 {
        root_disk::occupied_bytes(folder)
    }

    fn disk_image(&self, beginning: &[u8], file_bytes: u64) -> Result<DiskImage, String> {
        let header = ImageHeader::read(beginning)?;
        Ok(DiskImage {
            format: header.format.word(),
            bytes: header.disk_bytes.unwrap_or(file_bytes),
        })
    }

    fn summary(&self, spec: &Spec) -> String {
        let own = match QemuSpec::of(spec) {
            Ok(own) => own,
            Err(reason) => return reason,
        };
        let disks = own.disks.iter().map(|disk| disk.path.as_str());
        let kernel = own.kernel.as_ref().map(|kernel| {
            let hash = kernel.image.get(..12).unwrap_or(&kernel.image);
            format!("kernel {hash}")
        });
        let root = own.root.as_ref().map(|root| {
            let hash = root.image.get(..12).unwrap_or(&root.image);
            format!("image {hash}")
        });
        let parts = kernel.into_iter().chain(root);
        let parts: Vec<String> = parts.chain(disks.map(str::to_owned)).collect();
        parts.join(", ")
    }

    fn shown(&self, spec: &Spec) -> serde_json::Value {
        match QemuSpec::of(spec) {
            Ok(own) => json!(own),
            Err(reason) => json!({ "unreadable": reason }),
        }
    }

    fn differences(&self, old: &Spec, new: &Spec) -> Vec<Difference> {
        let (old, new) = (self.shown(old), self.shown(new));
        // By their names in machine files.
        let fields = [
            ("cpu", "cpus"),
            ("cpu-model", "cpu_model"),
            ("kernel", "kernel"),
            ("image or disk-size", "root"),
            ("disk", "disks"),
            ("net", "interfaces"),
            ("user-data, network-config or ssh-key", "cloud_init"),
            ("guest-agent", "guest_agent"),
            ("install-guest-agent", "agent_disk"),
            ("balloon", "balloon"),
            ("display", "display"),
            ("shutdown", "shutdown_s"),
            ("unreadable", "unreadable"),
        ];
        let mut differing = Vec::new();
        for (name, field) in fields {
            // A field that is left out is false.
            let [old, new] = [&old, &new].map(|own| match &own[field] {
                Value::Null if matches!(field, "guest_agent" | "balloon" | "display") => {
                    Value::Bool(false)
                }
                value => value.clone(),
            });
            if old != new {
                differing.push(Difference {
                    field: name.to_owned(),
                    old: old.to_string(),
                    new: new.to_string(),
                });
            }
        }
        differing
    }

    fn processes_beside(&self, worker: &Path) -> Vec<PathBuf> {
        qemu_of(worker).into_iter().collect()
    }

    /// QEMU names the threads of virtual processors `CPU 0/KVM` and `CPU 0/TCG`, or `ALL CPUs/TCG`.
    fn is_guest_thread(&self, name: &str) -> bool {
        name.starts_with("CPU ") || name.starts_with("ALL CPUs")
    }

    fn run_worker(&self, folders: &WorkerFolders) -> Result<(), String> {
        crate::worker::run(folders)
    }
}

/// The QEMU of a worker, as its folder in `/proc`.
fn qemu_of(worker: &Path) -> Option<PathBuf> {
    let tasks = fs::read_dir(worker.join("task")).ok()?;
    let children = tasks.flatten().filter_map(|task| {
        let children = fs::read_to_string(task.path().join("children"));
        children.ok().filter(|children| !children.is_empty())
    });
    let children: Vec<String> = children
        .flat_map(|children| {
            let pids = children.split_whitespace().map(str::to_owned);
            pids.collect::<Vec<_>>()
        })
        .collect();
    children.iter().find_map(|pid| {
        let process = worker.parent()?.join(pid);
        let name = fs::read_to_string(process.join("comm")).ok()?;
        // The kernel keeps 15 bytes of it.
        QEMU.starts_with(name.trim_end()).then_some(process)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_display_is_needed_of_the_host_by_systems_that_have_one() {
        let spec = |display| {
            let own = QemuSpec {
                display,
                ..QemuSpec::of_kernel("ab".repeat(32))
            };
            own.in_spec(64 << 20)
        };
        let needed = |display| QemuKind.features_needed(&spec(display));
        assert!(needed(true).contains(display::WORD));
        assert!(needed(false).is_empty());
        if !is_installed() {
            eprintln!("skipped: {QEMU} is not installed");
            return;
        }
        let cache = tempfile::tempdir().unwrap();
        let here = QemuKind.features_here(cache.path());
        assert!(here.contains(display::WORD), "{here:?}");
        assert_eq!(QemuKind.lacks_here(&spec(true), cache.path()), None);
        // What QEMU was asked for is kept: as if it had none.
        let without = host_offers::Offers {
            has_display: false,
            ..host_offers::of_host(cache.path()).unwrap()
        };
        host_offers::replace(cache.path(), without);
        let lacking = QemuKind.lacks_here(&spec(true), cache.path()).unwrap();
        assert!(lacking.contains("no VNC"), "{lacking}");
        assert_eq!(QemuKind.lacks_here(&spec(false), cache.path()), None);
    }
}
