//! The part of a machine's spec that only this kind understands.

use crate::processor::{CpuModel, Processor};
use keel_machine::kind::KindSpec;
use keel_machine::spec::Spec;
use macaddr::MacAddr6;
use serde::{Deserialize, Serialize};

/// The most virtual processors of a machine.
pub const CPUS_MAX: u32 = 64;

/// The most disks of a machine.
const DISKS_MAX: usize = 16;

/// Disks have whole sectors.
pub const SECTOR_BYTES: u64 = 512;

/// The largest disk of a machine's own, in bytes.
pub const ROOT_BYTES_MAX: u64 = 64 << 40;

/// The most network interfaces of a machine.
const INTERFACES_MAX: usize = 8;

/// The longest name of a network interface, in bytes (`IFNAMSIZ` of Linux, less its zero byte).
const BRIDGE_BYTES_MAX: usize = 15;

/// How long a system may take to shut down before its power is cut, in seconds, unless its spec
/// says otherwise.
pub const SHUTDOWN_S: u32 = 30;

/// A whole system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QemuSpec {
    /// Virtual processors, 1 to [`CPUS_MAX`].
    pub cpus: u32,
    /// The kernel that it boots; without one, its firmware boots from its first disk.
    #[serde(default)]
    pub kernel: Option<Kernel>,
    /// Its own disk, the first one. (Left out where there is none, so that nodes of an older version
    /// understand the rest.)
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<RootDisk>,
    /// Its other disks, in this order.
    #[serde(default)]
    pub disks: Vec<Disk>,
    /// Its network interfaces, in this order.
    #[serde(default)]
    pub interfaces: Vec<Interface>,
    /// Hash (BLAKE3, hex) of the file system from which cloud-init in the system learns how to set
    /// it up.
    #[serde(default)]
    pub cloud_init: Option<String>,
    /// Whether it has a port for a QEMU guest agent. (Left out where it is false, so that nodes of an
    /// older version understand the rest.)
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub guest_agent: bool,
    /// Hash (BLAKE3, hex) of the file system with the guest agent that the system installs; left out
    /// where there is none, likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_disk: Option<String>,
    /// Whether it has a balloon, by which it gives memory back to its node. (Left out likewise.)
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub balloon: bool,
    /// Whether it has a display, with a keyboard and a pointer. (Left out likewise.)
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub display: bool,
    /// What its user asks of its processor. (Left out likewise.)
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_model: Option<CpuModel>,
    /// The processor that it was given when it was made. (Left out likewise; machines without one have
    /// the base model, with whatever executes systems on their node.)
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub processor: Option<Processor>,
    /// How long it may take to shut down before its power is cut, in seconds.
    pub shutdown_s: u32,
}

/// A kernel that is started without a boot loader.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kernel {
    /// Hash (BLAKE3, hex) of its image: a bzImage of Linux, or one with a Multiboot header.
    pub image: String,
    /// Hash (BLAKE3, hex) of its first file system.
    #[serde(default)]
    pub initrd: Option<String>,
    /// Its command line.
    #[serde(default)]
    pub append: String,
}

/// A disk that begins as a copy of an image. What the system writes is kept beside its worker, and
/// moves along.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RootDisk {
    /// Hash (BLAKE3, hex) of the image.
    pub image: String,
    /// What the image is.
    pub format: DiskFormat,
    /// Size of the disk in bytes, a multiple of [`SECTOR_BYTES`]; not less than that of the image.
    pub bytes: u64,
}

/// A disk: a file that every node sees under the same path. QEMU locks it, so that no two
/// processes write it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Absolute path.
    pub path: String,
    /// What is in the file. It is never guessed: a guest that writes the header of another format
    /// could otherwise read files of the host.
    pub format: DiskFormat,
    #[serde(default)]
    pub read_only: bool,
}

/// The format of a disk's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    Raw,
    Qcow2,
}

/// A network interface, which is connected to a bridge of the node where the machine runs. Every
/// node where it may run has one of this name, and all of them are one network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Interface {
    /// Name of the bridge.
    pub bridge: String,
    /// Its hardware address, as six bytes in hexadecimal with colons: the machine keeps it wherever
    /// it runs.
    pub mac: String,
}

impl Interface {
    /// One with an address that nobody has assigned, from 45 bits of `random`.
    pub fn with_random_mac(bridge: String, random: [u8; 6]) -> Self {
        let mut bytes = random;
        // Of one interface, and administered locally (IEEE 802, section 8.2), but not the first
        // byte of the host's ends.
        bytes[0] = bytes[0] & 0x7c | 0x02;
        Interface {
            bridge,
            mac: MacAddr6::from(bytes).to_string().to_lowercase(),
        }
    }

    /// Its hardware address.
    ///
    /// # Errors
    /// If its text is not one that an interface may have.
    pub fn mac(&self) -> Result<MacAddr6, String> {
        let mac = self.mac.parse::<MacAddr6>();
        let usable = mac.ok().filter(|mac| {
            let first = mac.as_bytes()[0];
            // Other notations are accepted here, but not by QEMU.
            let is_usual = mac.to_string().eq_ignore_ascii_case(&self.mac);
            is_usual && mac.is_unicast() && !mac.is_nil() && first != 0xfe
        });
        usable.ok_or_else(|| {
            let text = &self.mac;
            format!("{text:?} is not the address of a network interface, such as 02:3b:5d:00:00:01")
        })
    }

    /// Checks its values.
    ///
    /// # Errors
    /// A message for the user.
    pub fn check(&self) -> Result<(), String> {
        let name = &self.bridge;
        let is_name = !name.is_empty()
            && name.len() <= BRIDGE_BYTES_MAX
            && !matches!(name.as_str(), "." | "..")
            && name
                .bytes()
                .all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'/' | b':' | b','));
        if !is_name {
            return Err(format!("{name:?} is not the name of a bridge"));
        }
        self.mac().map(drop)
    }
}

impl DiskFormat {
    /// QEMU's name for it.
    pub fn word(self) -> &'static str {
        match self {
            DiskFormat::Raw => "raw",
            DiskFormat::Qcow2 => "qcow2",
        }
    }
}

/// One processor, and nothing to boot.
impl Default for QemuSpec {
    fn default() -> Self {
        QemuSpec {
            cpus: 1,
            kernel: None,
            root: None,
            disks: Vec::new(),
            interfaces: Vec::new(),
            cloud_init: None,
            guest_agent: false,
            agent_disk: None,
            balloon: false,
            display: false,
            cpu_model: None,
            processor: None,
            shutdown_s: SHUTDOWN_S,
        }
    }
}

impl QemuSpec {
    /// A system that boots this kernel, an image by its hash, and has nothing else.
    pub fn of_kernel(image: String) -> Self {
        let kernel = Kernel {
            image,
            initrd: None,
            append: String::new(),
        };
        QemuSpec {
            kernel: Some(kernel),
            ..QemuSpec::default()
        }
    }

    /// The part of a spec.
    ///
    /// # Errors
    /// A message that names the field that is missing, unknown or wrong.
    pub fn of(spec: &Spec) -> Result<Self, String> {
        spec.kind_spec
            .decode()
            .map_err(|error| format!("the spec of a machine of kind qemu: {error}"))
    }

    /// The part for a spec.
    ///
    /// # Errors
    /// Never for a value of this type; the message of the encoder.
    pub fn to_kind_spec(&self) -> Result<KindSpec, String> {
        KindSpec::new(self)
    }

    /// The images that it starts from, by hash.
    pub fn images(&self) -> impl Iterator<Item = &str> {
        let kernel = self.kernel.iter().flat_map(|kernel| {
            let initrd = kernel.initrd.as_deref();
            std::iter::once(kernel.image.as_str()).chain(initrd)
        });
        let root = self.root.iter().map(|root| root.image.as_str());
        let made = [&self.cloud_init, &self.agent_disk];
        let made = made.into_iter().filter_map(Option::as_deref);
        kernel.chain(root).chain(made)
    }

    /// Checks that checkpoints have all that the machine writes.
    ///
    /// # Errors
    /// What they would lack.
    pub fn check_checkpoints(&self) -> Result<(), String> {
        match self.disks.iter().find(|disk| !disk.read_only) {
            Some(disk) => Err(format!(
                "disk {} does not belong to the machine alone, so that no checkpoint has what is written to it (--image gives it one that does)",
                disk.path
            )),
            None => Ok(()),
        }
    }

    /// Checks its values.
    ///
    /// # Errors
    /// A message for the user, which names the field.
    pub fn check(&self) -> Result<(), String> {
        if self.cpus == 0 || self.cpus > CPUS_MAX {
            return Err(format!(
                "{} processors: 1 to {CPUS_MAX} are possible",
                self.cpus
            ));
        }
        if self.disks.len() > DISKS_MAX {
            let count = self.disks.len();
            return Err(format!("{count} disks: at most {DISKS_MAX} are possible"));
        }
        self.processor.as_ref().map_or(Ok(()), Processor::check)?;
        if self.kernel.is_none() && self.root.is_none() && self.disks.is_empty() {
            return Err("there is nothing to boot: it needs a kernel, an image or a disk".into());
        }
        if let Some(RootDisk { bytes, .. }) = self.root
            && (bytes == 0 || bytes > ROOT_BYTES_MAX || !bytes.is_multiple_of(SECTOR_BYTES))
        {
            return Err(format!(
                "a disk of {bytes} bytes: a multiple of {SECTOR_BYTES} is expected, at most {ROOT_BYTES_MAX}"
            ));
        }
        for disk in &self.disks {
            if !disk.path.starts_with('/') {
                let path = &disk.path;
                return Err(format!("disk {path:?}: an absolute path is expected"));
            }
        }
        if self.interfaces.len() > INTERFACES_MAX {
            let count = self.interfaces.len();
            return Err(format!(
                "{count} network interfaces: at most {INTERFACES_MAX} are possible"
            ));
        }
        for (number, interface) in self.interfaces.iter().enumerate() {
            interface.check()?;
            let mut before = self.interfaces.iter().take(number);
            if before.any(|other| other.mac() == interface.mac()) {
                let mac = &interface.mac;
                return Err(format!("two network interfaces have the address {mac}"));
            }
        }
        let mut texts = self.disks.iter().map(|disk| &disk.path);
        let append = self.kernel.iter().map(|kernel| &kernel.append);
        match texts.any(|text| text.contains('\0')) || append.clone().any(|it| it.contains('\0')) {
            true => Err("a text has a zero byte".into()),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
impl QemuSpec {
    /// A whole spec, for tests.
    pub(crate) fn in_spec(&self, memory_bytes: u64) -> Spec {
        Spec {
            kind: "qemu".parse().unwrap(),
            kind_spec: self.to_kind_spec().unwrap(),
            volumes: Vec::new(),
            memory_bytes,
            cpu_limit_millis: None,
            output_bytes_per_s: u64::MAX,
            remove_at_end: false,
            restart: keel_machine::restart_policy::Restart::No,
            checkpoints: None,
            ha: None,
            balancing: keel_machine::spec::Balancing::default(),
        }
    }
}
