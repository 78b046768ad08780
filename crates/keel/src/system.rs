//! What a machine of kind `qemu` is made of, on a command line.

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use keel_api::Client;
use keel_kind_qemu::{Disk, DiskFormat, Interface, Kernel, QemuKind, QemuSpec, SHUTDOWN_S};
use keel_kind_wasm::WasmKind;
use keel_machine::kind::KindName;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The memory of a whole system that says nothing of it.
pub(crate) const MEMORY_DEFAULT: &str = "1G";

/// A whole system.
#[derive(clap::Args)]
#[command(next_help_heading = "Whole systems (--kind qemu)")]
pub(crate) struct SystemArgs {
    /// What runs the machine: `wasm`, for a program, or `qemu`, for a whole Linux system.
    #[arg(long, value_name = "KIND", default_value = "wasm")]
    kind: KindName,
    /// The kernel that it boots: a bzImage of Linux, or one with a Multiboot header. Without one
    /// its firmware boots from its first disk.
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// The kernel's first file system.
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// The kernel's command line. Output is that of the first serial line (console=ttyS0).
    #[arg(
        long,
        value_name = "TEXT",
        requires = "kernel",
        allow_hyphen_values = true
    )]
    append: Option<String>,
    /// A disk: a file that all nodes see under this path. Its format is that of its name (.qcow2,
    /// .raw, .img) unless it is given.
    #[arg(long, value_name = "PATH[,format=FORMAT][,ro]", value_parser = disk)]
    disk: Vec<Disk>,
    /// A network interface, on a bridge that every node where it may run has under this name. It
    /// keeps its hardware address wherever it runs (default: one at random).
    #[arg(long, value_name = "BRIDGE[,mac=ADDRESS]", value_parser = interface)]
    net: Vec<Interface>,
    /// Its virtual processors (default: 1).
    #[arg(long, value_name = "N")]
    cpu: Option<u32>,
    /// How long it may take to shut down at `keel stop` before its power is cut (default: 30s).
    #[arg(long, value_name = "TIME", value_parser = crate::when::duration)]
    shutdown: Option<Duration>,
}

/// A disk as users write it.
fn disk(text: &str) -> Result<Disk, String> {
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

/// A network interface as users write it.
fn interface(text: &str) -> Result<Interface, String> {
    let (bridge, options) = match text.split_once(',') {
        Some((bridge, options)) => (bridge, Some(options)),
        None => (text, None),
    };
    let interface = match options.map(|options| options.strip_prefix("mac=").ok_or(options)) {
        None => Interface::with_random_mac(bridge.to_owned(), rand::random()),
        Some(Ok(mac)) => Interface {
            bridge: bridge.to_owned(),
            mac: mac.to_lowercase(),
        },
        Some(Err(other)) => return Err(format!("{other:?} is not mac=ADDRESS")),
    };
    interface.check()?;
    Ok(interface)
}

impl SystemArgs {
    /// The kind of the machine, and its own part of the spec if that is `qemu`. Uploads what it
    /// boots.
    pub(crate) async fn upload(
        &self,
        client: &Client,
        has_program: bool,
    ) -> Result<Option<QemuSpec>> {
        if self.kind == WasmKind::kind_name() {
            if let Some(option) = self.given() {
                bail!("{option} is for whole systems: add --kind qemu");
            }
            return Ok(None);
        }
        ensure!(
            self.kind == QemuKind::kind_name(),
            "there are no machines of kind {}: wasm and qemu are known",
            self.kind
        );
        ensure!(
            !has_program,
            "a machine of kind qemu runs no module: its system is --kernel, or on --disk"
        );
        let kernel = match &self.kernel {
            Some(kernel) => Some(Kernel {
                image: upload(client, kernel).await?,
                initrd: match &self.initrd {
                    Some(initrd) => Some(upload(client, initrd).await?),
                    None => None,
                },
                append: self.append.clone().unwrap_or_default(),
            }),
            None => None,
        };
        Ok(Some(QemuSpec {
            cpus: self.cpu.unwrap_or(1),
            kernel,
            disks: self.disk.clone(),
            interfaces: self.net.clone(),
            shutdown_s: match self.shutdown {
                Some(time) => u32::try_from(time.as_secs()).context("--shutdown is too long")?,
                None => SHUTDOWN_S,
            },
        }))
    }

    /// An option that was given and means nothing to a program.
    fn given(&self) -> Option<&'static str> {
        let given = [
            ("--kernel", self.kernel.is_some()),
            ("--disk", !self.disk.is_empty()),
            ("--net", !self.net.is_empty()),
            ("--cpu", self.cpu.is_some()),
            ("--shutdown", self.shutdown.is_some()),
        ];
        let mut given = given.into_iter().filter(|(_, is_given)| *is_given);
        given.next().map(|(option, _)| option)
    }
}

/// Uploads an image; returns its hash.
async fn upload(client: &Client, file: &Path) -> Result<String> {
    let bytes = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    let uploaded = client
        .upload(&QemuKind::kind_name(), Bytes::from(bytes))
        .await
        .with_context(|| file.display().to_string())?;
    Ok(uploaded.hash)
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
    fn an_interface_keeps_the_address_that_is_given_or_gets_one() {
        let given = interface("br0,mac=02:AB:00:00:00:01").unwrap();
        assert_eq!(given.mac, "02:ab:00:00:00:01");
        let (first, second) = (interface("br0").unwrap(), interface("br0").unwrap());
        assert_eq!(first.bridge, "br0");
        assert_ne!(first.mac, second.mac);
        for wrong in [
            "",
            "a/b",
            "a-name-of-16-byt",
            "br0,mac=",
            "br0,mac=01:00:5e:00:00:01",
            "br0,mac=fe:00:00:00:00:01",
            "br0,mac=0200.0000.0107",
            "br0,vlan=3",
        ] {
            interface(wrong).unwrap_err();
        }
    }
}
