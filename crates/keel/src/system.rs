//! What a machine of kind `qemu` is made of, on a command line and in a machine file.

use crate::cloud_init::CloudInit;
use crate::guest_agent;
use crate::image::{self, ImageArg, ImageDisk, ImageFile};
use crate::network::{self, NetworkArg};
use anyhow::{Context, Result, bail, ensure};
use keel_api::{Client, ClientError};
use keel_kind_qemu::{
    CpuModel, Disk, DiskFormat, Kernel, QemuKind, QemuSpec, RootDisk, SECTOR_BYTES, SHUTDOWN_S,
};
use keel_kind_wasm::WasmKind;
use keel_machine::kind::KindName;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The memory of a whole system that says nothing of it.
pub(crate) const MEMORY_DEFAULT: &str = "1G";

/// The kind of a machine, and what it is made of if that is a whole system.
#[derive(clap::Args)]
#[command(next_help_heading = "Whole systems (--kind qemu)")]
pub(crate) struct SystemArgs {
    /// What runs the machine: `wasm`, for a program, or `qemu`, for a whole Linux system.
    #[arg(long, value_name = "KIND", default_value = "wasm")]
    kind: KindName,
    #[command(flatten)]
    system: System,
}

/// A whole system, as users write it.
#[derive(clap::Args, Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct System {
    /// The kernel that it boots: a bzImage of Linux, or one with a Multiboot header. Without one
    /// its firmware boots from its first disk.
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,
    /// The kernel's first file system.
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub(crate) initrd: Option<PathBuf>,
    /// The kernel's command line. Output is that of the first serial line (console=ttyS0).
    #[arg(
        long,
        value_name = "TEXT",
        requires = "kernel",
        allow_hyphen_values = true
    )]
    pub(crate) append: Option<String>,
    /// The image of its own disk: the disk begins as a copy of it, is kept on the machine's node,
    /// and moves along. A name of `keel image ls`, or a file (qcow2 or raw), with a dot or a slash.
    #[arg(long, value_name = "IMAGE")]
    pub(crate) image: Option<ImageArg>,
    /// The size of that disk (default: that of the image).
    #[arg(long, value_name = "SIZE", requires = "image", value_parser = crate::size::parse)]
    pub(crate) disk_size: Option<u64>,
    /// A disk: a file that all nodes see under this path. Its format is that of its name (.qcow2,
    /// .raw, .img) unless it is given.
    #[arg(long, value_name = "PATH[,format=FORMAT][,ro]", value_parser = disk)]
    pub(crate) disk: Vec<Disk>,
    /// A network interface, on a bridge that every node where it may run has under this name. It
    /// keeps its hardware address wherever it runs (default: one at random). Cloud-init gives it the
    /// addresses of ip=, with a gateway= and name servers (dns=); others then ask by DHCP.
    #[arg(
        long,
        value_name = "BRIDGE[,mac=ADDRESS][,ip=ADDRESS/BITS]",
        value_parser = network::parse
    )]
    pub(crate) net: Vec<NetworkArg>,
    /// Its virtual processors (default: 1).
    #[arg(long, value_name = "N")]
    pub(crate) cpu: Option<u32>,
    /// What its processors have: `common`, what the nodes have in common on which it may run; or a
    /// level of x86-64, on the nodes that have it: `x86-64` (what all have), `x86-64-v2`, `-v3`, `-v4`
    /// (default: common with KVM, x86-64 where systems are translated).
    #[arg(long, value_name = "MODEL")]
    pub(crate) cpu_model: Option<CpuModel>,
    /// Whether it has a port for a QEMU guest agent, which `keel exec` needs (default: true).
    #[arg(long, value_name = "BOOL")]
    pub(crate) guest_agent: Option<bool>,
    /// Whether cloud-init installs Evenkeel's own guest agent at its first boot, for an image that has
    /// none (default: false).
    #[arg(long, value_name = "BOOL")]
    pub(crate) install_guest_agent: Option<bool>,
    /// Whether it has a balloon, by which it gives memory back to its node (default: true).
    #[arg(long, value_name = "BOOL")]
    pub(crate) balloon: Option<bool>,
    /// Whether it has a display, with a keyboard and a pointer, for `keel vnc` (default: false).
    #[arg(long, value_name = "BOOL")]
    pub(crate) display: Option<bool>,
    /// How long it may take to shut down at `keel stop` before its power is cut (default: 30s).
    #[arg(long, value_name = "TIME", value_parser = crate::when::duration)]
    pub(crate) shutdown: Option<Duration>,
    #[command(flatten)]
    pub(crate) cloud_init: CloudInit,
}

/// A disk as users write it.
pub(crate) fn disk(text: &str) -> Result<Disk, String> {
    let mut parts = text.split(',');
    let path = parts.next().unwrap_or_default();
    let mut format = match Path::new(path).extension().and_then(|it| it.to_str()) {
        Some("qcow2") => Some(DiskFormat::Qcow2),
        Some("raw" | "img") => Some(DiskFormat::Raw),
        _ => None,
    };
    let mut read_only = false;
    for part in parts {
        match part {
            "ro" => read_only = true,
            "format=raw" => format = Some(DiskFormat::Raw),
            "format=qcow2" => format = Some(DiskFormat::Qcow2),
            other => {
                return Err(format!(
                    "{other:?} is none of format=raw, format=qcow2 and ro"
                ));
            }
        }
    }
    let Some(format) = format else {
        return Err("its name does not say its format: add ,format=raw or ,format=qcow2".into());
    };
    let absolute = std::path::absolute(path).map_err(|error| error.to_string())?;
    let Some(absolute) = absolute.to_str() else {
        return Err("its path is not UTF-8".into());
    };
    Ok(Disk {
        path: absolute.to_owned(),
        format,
        read_only,
    })
}

impl SystemArgs {
    /// The system, unless the machine is a program.
    pub(crate) fn system(&self, has_program: bool) -> Result<Option<&System>> {
        if self.kind == WasmKind::kind_name() {
            if let Some(option) = self.system.given() {
                bail!("--{option} is for whole systems: add --kind qemu");
            }
            ensure!(
                has_program,
                "a machine of kind wasm needs a MODULE, its program"
            );
            return Ok(None);
        }
        check_kind(&self.kind)?;
        ensure!(
            !has_program,
            "a machine of kind qemu runs no module: its system is --kernel, or on --image or --disk"
        );
        ensure!(
            self.system.boots(),
            "a machine of kind qemu needs a system to boot: --image, --kernel or --disk"
        );
        Ok(Some(&self.system))
    }
}

/// # Errors
/// If nobody can write a machine of this kind.
pub(crate) fn check_kind(kind: &KindName) -> Result<()> {
    ensure!(
        [WasmKind::kind_name(), QemuKind::kind_name()].contains(kind),
        "there are no machines of kind {kind}: wasm and qemu are known"
    );
    Ok(())
}

impl System {
    /// Whether there is anything that may have a system on it.
    fn boots(&self) -> bool {
        self.image.is_some() || self.kernel.is_some() || !self.disk.is_empty()
    }

    /// The first option that was given, which means nothing to a program.
    pub(crate) fn given(&self) -> Option<&'static str> {
        let given = [
            ("kernel", self.kernel.is_some()),
            ("initrd", self.initrd.is_some()),
            ("append", self.append.is_some()),
            ("image", self.image.is_some()),
            ("disk-size", self.disk_size.is_some()),
            ("disk", !self.disk.is_empty()),
            ("net", !self.net.is_empty()),
            ("cpu", self.cpu.is_some()),
            ("cpu-model", self.cpu_model.is_some()),
            ("guest-agent", self.guest_agent.is_some()),
            ("install-guest-agent", self.install_guest_agent.is_some()),
            ("balloon", self.balloon.is_some()),
            ("display", self.display.is_some()),
            ("shutdown", self.shutdown.is_some()),
        ];
        let given = given.into_iter().chain(self.cloud_init.given());
        let mut given = given.filter(|(_, is_given)| *is_given);
        given.next().map(|(option, _)| option)
    }

    /// Its part of the spec, and the files to upload. Its system is given the machine's name, if it
    /// has one yet. What is not said stays as it was `before`: a guest agent's port, whether one is
    /// installed, a balloon, a display, and addresses of interfaces; and so does the disk with the agent.
    ///
    /// # Errors
    /// If a file cannot be read, or is not what it has to be; or there is no image of a name.
    pub(crate) async fn read(
        &self,
        client: &Client,
        name: Option<&str>,
        before: Option<&QemuSpec>,
    ) -> Result<(QemuSpec, Vec<ImageFile>)> {
        let (mut spec, mut files) = self.read_without_root(name, before)?;
        let kept = before.and_then(|own| own.agent_disk.as_ref());
        if let Some(disk) = kept.filter(|kept| spec.agent_disk.as_ref() == Some(kept)) {
            let kind = QemuKind::kind_name();
            // The nodes that had it may be gone. (Other errors say nothing of that.)
            if let Err(ClientError::Problem { status: 404, .. }) =
                image::known(client, &kind, disk).await
            {
                let disk = guest_agent::disk()?;
                spec.agent_disk = Some(disk.hash());
                files.push(disk);
            }
        }
        let (shown, disk) = match &self.image {
            Some(ImageArg::File(path)) => {
                let (file, disk) = ImageFile::disk(path)?;
                files.push(file);
                (path.display().to_string(), disk)
            }
            Some(ImageArg::Name(name)) => {
                (name.to_string(), image::named_disk(client, name).await?)
            }
            None => return Ok((spec, files)),
        };
        spec.root = Some(root_disk(&shown, &disk, self.disk_size)?);
        Ok((spec, files))
    }

    /// As [`Self::read`], but for its own disk.
    fn read_without_root(
        &self,
        name: Option<&str>,
        before: Option<&QemuSpec>,
    ) -> Result<(QemuSpec, Vec<ImageFile>)> {
        let mut files = Vec::new();
        let mut image = |path: &Path| {
            let file = ImageFile::read(path)?;
            let hash = file.hash();
            files.push(file);
            anyhow::Ok(hash)
        };
        let kernel = match &self.kernel {
            Some(kernel) => Some(Kernel {
                image: image(kernel)?,
                initrd: self.initrd.as_deref().map(&mut image).transpose()?,
                append: self.append.clone().unwrap_or_default(),
            }),
            None => None,
        };
        let known = before.map_or(&[][..], |own| &own.interfaces);
        let interfaces = network::interfaces(&self.net, known);
        let guest_agent = self
            .guest_agent
            .or_else(|| before.map(|own| own.guest_agent))
            .unwrap_or(true);
        let agent_before = before.and_then(|own| own.agent_disk.clone());
        let is_installed = self.install_guest_agent.unwrap_or(agent_before.is_some());
        ensure!(
            guest_agent || !is_installed,
            "a guest agent that is installed needs its port: leave guest-agent false out, or say \
             install-guest-agent false"
        );
        let agent_disk = match (is_installed, agent_before) {
            (true, Some(disk)) => Some(disk),
            (true, None) => {
                let disk = guest_agent::disk()?;
                let hash = disk.hash();
                files.push(disk);
                Some(hash)
            }
            (false, _) => None,
        };
        let script = is_installed.then_some(guest_agent::INSTALL_SCRIPT);
        let network = network::config(&self.net, &interfaces);
        let cloud_init = self.cloud_init.disk(name, network, script)?;
        let spec = QemuSpec {
            cpus: self.cpu.unwrap_or(1),
            kernel,
            root: None,
            disks: self.disk.clone(),
            interfaces,
            cloud_init: cloud_init.as_ref().map(ImageFile::hash),
            guest_agent,
            agent_disk,
            balloon: self
                .balloon
                .or_else(|| before.map(|own| own.balloon))
                .unwrap_or(true),
            display: self
                .display
                .or_else(|| before.map(|own| own.display))
                .unwrap_or(false),
            cpu_model: self.cpu_model,
            // Nodes know what they can give it.
            processor: None,
            shutdown_s: match self.shutdown {
                Some(time) => {
                    let seconds = time.as_millis().div_ceil(1000);
                    u32::try_from(seconds).context("shutdown is too long")?
                }
                None => SHUTDOWN_S,
            },
        };
        files.extend(cloud_init);
        Ok((spec, files))
    }
}

/// A disk from an image, of this size if there is one. `shown` is the image for users.
fn root_disk(shown: &str, image: &ImageDisk, bytes: Option<u64>) -> Result<RootDisk> {
    let bytes = bytes.unwrap_or(image.bytes);
    let bytes = bytes.next_multiple_of(SECTOR_BYTES);
    ensure!(
        bytes >= image.bytes,
        "a disk of {bytes} bytes is smaller than that of {shown}, of {} bytes",
        image.bytes
    );
    Ok(RootDisk {
        image: image.hash.clone(),
        format: image.format,
        bytes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_has_the_format_of_its_name_or_the_one_that_is_given() {
        let parsed = disk("/disks/a.qcow2,ro").unwrap();
        assert_eq!(parsed.format, DiskFormat::Qcow2);
        assert!(parsed.read_only);
        let parsed = disk("/dev/vg/a,format=raw").unwrap();
        assert_eq!(parsed.format, DiskFormat::Raw);
        assert!(!parsed.read_only);
        assert!(disk("/dev/vg/a").unwrap_err().contains("format"));
        assert!(disk("/a.img,format=vmdk").unwrap_err().contains("vmdk"));
    }

    #[test]
    fn a_disk_is_not_smaller_than_its_image() {
        let image = ImageDisk {
            hash: "ab".repeat(32),
            format: DiskFormat::Raw,
            bytes: 1000,
        };
        let sized = |bytes| root_disk("debian", &image, bytes);
        let disk = sized(None).unwrap();
        assert_eq!(
            (disk.image, disk.format),
            (image.hash.clone(), DiskFormat::Raw)
        );
        assert_eq!(disk.bytes, 1024);
        assert_eq!(sized(Some(1 << 30)).unwrap().bytes, 1 << 30);
        let smaller = sized(Some(512)).unwrap_err().to_string();
        assert!(smaller.contains("smaller than that of debian"), "{smaller}");
    }

    #[test]
    fn a_machine_keeps_the_disk_with_its_guest_agent() {
        let own = QemuSpec {
            guest_agent: true,
            agent_disk: Some("ab".repeat(32)),
            ..QemuSpec::default()
        };
        let read = |install_guest_agent| {
            let system = System {
                install_guest_agent,
                ..System::default()
            };
            system.read_without_root(None, Some(&own)).unwrap()
        };
        for said in [None, Some(true)] {
            let (spec, files) = read(said);
            assert_eq!(spec.agent_disk, own.agent_disk);
            // Of which cloud-init is told.
            assert_eq!(files.len(), 1);
            assert_eq!(spec.cloud_init, Some(files[0].hash()));
        }
        let (spec, files) = read(Some(false));
        assert_eq!((spec.agent_disk, files.len()), (None, 0));
    }
}
