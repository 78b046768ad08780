//! The part of a machine's spec that only this kind understands.

use keel_machine::kind::KindSpec;
use keel_machine::spec::Spec;
use serde::{Deserialize, Serialize};

/// The most virtual processors of a machine.
pub const CPUS_MAX: u32 = 64;

/// The most disks of a machine.
const DISKS_MAX: usize = 16;

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
    /// Its disks, in this order.
    #[serde(default)]
    pub disks: Vec<Disk>,
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

impl DiskFormat {
    /// QEMU's name for it.
    pub fn word(self) -> &'static str {
        match self {
            DiskFormat::Raw => "raw",
            DiskFormat::Qcow2 => "qcow2",
        }
    }
}

impl QemuSpec {
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
        let kernel = self.kernel.iter();
        kernel.flat_map(|kernel| {
            let initrd = kernel.initrd.as_deref();
            std::iter::once(kernel.image.as_str()).chain(initrd)
        })
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
        if self.kernel.is_none() && self.disks.is_empty() {
            return Err("there is nothing to boot: it needs a kernel or a disk".into());
        }
        for disk in &self.disks {
            if !disk.path.starts_with('/') {
                let path = &disk.path;
                return Err(format!("disk {path:?}: an absolute path is expected"));
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
