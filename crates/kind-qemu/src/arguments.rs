//! The command line of a machine's QEMU.
//!
//! Source and target of a move use the same, but for `-incoming`: QEMU requires the same devices
//! in the same order. The machine type has a version for the same reason: `q35` alone means
//! another one in each version of QEMU.

use crate::balloon;
use crate::display;
use crate::processor::{Accelerator, Processor};
use crate::root_disk::{self, ROOT};
use crate::spec::{Disk, DiskFormat, QemuSpec};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use serde_json::json;
use std::ffi::OsString;
use std::path::Path;

/// The machine type: of the oldest QEMU that is supported, which later versions have too.
const MACHINE: &str = "pc-q35-7.2";

/// Memory for translated code, in MiB. QEMU's own default grows with the host's memory.
const TRANSLATED_MIB: u32 = 128;

/// QEMU's name for a disk, less its number.
pub(crate) const DISK: &str = "disk";
/// QEMU's name for the file system for cloud-init.
const CLOUD_INIT: &str = "cloud-init";
/// That of the disk with a guest agent.
const AGENT_DISK: &str = "agent-disk";

/// QEMU itself may start nothing and gain no rights, whatever a guest makes of it.
pub(crate) const SANDBOX: [&str; 2] = [
    "-sandbox",
    "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
];

/// Numbers of the descriptors that QEMU inherits.
pub(crate) const QMP_FD: i32 = 3;
pub(crate) const CONSOLE_FD: i32 = 4;
pub(crate) const AGENT_FD: i32 = 5;
/// That of the first network interface; others follow.
pub(crate) const INTERFACES_FD: i32 = 6;

/// QEMU's name for the host's end of the guest agent's port.
pub(crate) const AGENT: &str = "agent";
/// The port by which agents in guests know theirs.
const AGENT_PORT: &str = "org.qemu.guest_agent.0";

/// What the command line depends on.
#[derive(Debug)]
pub(crate) struct Machine<'a> {
    pub(crate) name: &'a str,
    pub(crate) spec: &'a QemuSpec,
    /// A multiple of 1 MiB.
    pub(crate) memory_bytes: u64,
    /// The folder of images, by hash.
    pub(crate) images: &'a Path,
    pub(crate) accelerator: Accelerator,
    /// Whether its state comes from another QEMU.
    pub(crate) is_incoming: bool,
}

impl Machine<'_> {
    /// The arguments, without the program's name. The guest does not run before it is told to.
    pub(crate) fn arguments(&self) -> Vec<OsString> {
        let mut all: Vec<OsString> = Vec::new();
        let mut add = |name: &str, value: String| {
            all.push(name.into());
            all.push(value.into());
        };
        add("-name", format!("guest={},debug-threads=on", self.name));
        add("-machine", MACHINE.into());
        add(
            "-accel",
            match self.accelerator {
                Accelerator::Kvm => "kvm".into(),
                Accelerator::Tcg => format!("tcg,tb-size={TRANSLATED_MIB}"),
            },
        );
        let processor = self.spec.processor.as_ref();
        add(
            "-cpu",
            processor.map_or_else(Processor::base_argument, Processor::argument),
        );
        add("-smp", self.spec.cpus.to_string());
        add("-m", format!("{}M", self.memory_bytes >> 20));
        add("-display", "none".into());
        add("-chardev", format!("socket,id=qmp,fd={QMP_FD}"));
        add("-mon", "chardev=qmp,mode=control".into());
        add("-chardev", format!("socket,id=console,fd={CONSOLE_FD}"));
        add("-serial", "chardev:console".into());
        add("-device", "pvpanic".into());
        add("-object", "rng-builtin,id=random".into());
        add("-device", "virtio-rng-pci,rng=random".into());
        if let Some(disk) = &self.spec.root {
            let device = root_disk::block_device(disk, self.images);
            add("-blockdev", device.to_string());
            add("-device", format!("virtio-blk-pci,drive={ROOT}"));
        }
        for (number, disk) in self.spec.disks.iter().enumerate() {
            add("-blockdev", block_device(number, disk));
            add("-device", format!("virtio-blk-pci,drive={DISK}{number}"));
        }
        if let Some(image) = &self.spec.cloud_init {
            add(
                "-blockdev",
                image_device(CLOUD_INIT, &self.images.join(image)),
            );
            add("-device", format!("virtio-blk-pci,drive={CLOUD_INIT}"));
        }
        for (number, interface) in (0..).zip(&self.spec.interfaces) {
            let (descriptor, mac) = (INTERFACES_FD + number, &interface.mac);
            add(
                "-netdev",
                format!("tap,id=net{number},fd={descriptor},vhost=off"),
            );
            // Without a ROM to boot from: its size would have to be the same at a move's target.
            add(
                "-device",
                format!("virtio-net-pci,netdev=net{number},mac={mac},romfile="),
            );
        }
        // Behind all others: those keep their places on the bus.
        if self.spec.guest_agent {
            add("-device", "virtio-serial-pci".into());
            add("-chardev", format!("socket,id={AGENT},fd={AGENT_FD}"));
            add(
                "-device",
                format!("virtserialport,chardev={AGENT},name={AGENT_PORT}"),
            );
        }
        if self.spec.balloon {
            add("-device", balloon::DEVICE.into());
        }
        if self.spec.display {
            add("-vnc", display::SERVER.into());
            for device in display::DEVICES {
                add("-device", device.into());
            }
        }
        if let Some(image) = &self.spec.agent_disk {
            add(
                "-blockdev",
                image_device(AGENT_DISK, &self.images.join(image)),
            );
            add("-device", format!("virtio-blk-pci,drive={AGENT_DISK}"));
        }
        let [sandbox, denied] = SANDBOX;
        add(sandbox, denied.into());
        if self.is_incoming {
            add("-incoming", "defer".into());
        }
        if let Some(kernel) = &self.spec.kernel {
            let image = |hash: &str| self.images.join(hash).into_os_string();
            all.extend(["-kernel".into(), image(&kernel.image)]);
            if let Some(initrd) = &kernel.initrd {
                all.extend(["-initrd".into(), image(initrd)]);
            }
            all.extend(["-append".into(), kernel.append.clone().into()]);
        }
        for switch in ["-no-user-config", "-nodefaults", "-S"] {
            all.push(switch.into());
        }
        all
    }
}

/// As JSON, in which a path may have any characters. Past the host's page cache, if that can be:
/// another host must see what was written, and what a host that was cut off has in its cache must
/// not be written later, over what another one wrote.
fn block_device(number: usize, disk: &Disk) -> String {
    let cache = json!({ "direct": !disk.read_only && is_direct(&disk.path) });
    json!({
        "driver": disk.format.word(),
        "node-name": format!("{DISK}{number}"),
        "read-only": disk.read_only,
        "cache": cache,
        "file": {
            "driver": "file",
            "filename": disk.path,
            "locking": "on",
            "cache": cache,
        },
    })
    .to_string()
}

/// A file system of which QEMU has this name, and which nobody writes.
fn image_device(name: &str, path: &Path) -> String {
    json!({
        "driver": DiskFormat::Raw.word(),
        "node-name": name,
        "read-only": true,
        "file": { "driver": "file", "filename": path.to_string_lossy() },
    })
    .to_string()
}

/// Whether a file can be opened past the page cache. Some file systems cannot do that, such as
/// older ones in memory, which no other host sees.
fn is_direct(path: &str) -> bool {
    let opened = open(
        path,
        OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC,
        Mode::empty(),
    );
    opened.err() != Some(Errno::INVAL)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{Interface, Kernel};

    #[test]
    fn texts_of_users_stay_one_argument_each() {
        let spec = QemuSpec {
            cpus: 2,
            kernel: Some(Kernel {
                image: "aa".into(),
                initrd: Some("bb".into()),
                append: "console=ttyS0 -S, \"x\"".into(),
            }),
            disks: vec![Disk {
                path: "/disks/a,readonly=off \"b\"".into(),
                format: DiskFormat::Qcow2,
                read_only: true,
            }],
            interfaces: vec![Interface {
                bridge: "lan".into(),
                mac: "02:00:00:00:00:07".into(),
            }],
            guest_agent: true,
            ..QemuSpec::default()
        };
        let machine = Machine {
            name: "db",
            spec: &spec,
            memory_bytes: 256 << 20,
            images: Path::new("/state/images"),
            accelerator: Accelerator::Tcg,
            is_incoming: true,
        };
        let all = machine.arguments();
        let after = |name: &str| {
            let at = all.iter().position(|it| it == name).unwrap();
            all[at + 1].to_str().unwrap()
        };
        assert_eq!(after("-m"), "256M");
        assert_eq!(after("-smp"), "2");
        assert_eq!(after("-append"), "console=ttyS0 -S, \"x\"");
        assert_eq!(after("-kernel"), "/state/images/aa");
        assert_eq!(after("-initrd"), "/state/images/bb");
        assert_eq!(after("-incoming"), "defer");
        assert_eq!(after("-netdev"), "tap,id=net0,fd=6,vhost=off");
        assert_eq!(
            all.iter()
                .filter(|it| *it == "socket,id=agent,fd=5")
                .count(),
            1
        );
        let disk: serde_json::Value = serde_json::from_str(after("-blockdev")).unwrap();
        assert_eq!(disk["file"]["filename"], "/disks/a,readonly=off \"b\"");
        assert_eq!(disk["driver"], "qcow2");
        assert_eq!(disk["read-only"], true);
    }
}
