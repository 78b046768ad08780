//! `keel import`: reads descriptions of virtual machines by libvirt and Proxmox VE, and prints a
//! machine file that makes them here. What it cannot say is named in comments.
//!
//! - `libvirt`: domains, as XML
//! - `proxmox`: the files of Proxmox VE

mod libvirt;
mod proxmox;

use crate::{input, network, system};
use anyhow::{Context, Result, bail};
use keel_kind_qemu::CpuModel;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// The longest name of a machine, in bytes.
const NAME_BYTES_MAX: usize = 63;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Descriptions: XML of libvirt (virsh dumpxml NAME), or files of Proxmox VE
    /// (/etc/pve/qemu-server/NUMBER.conf).
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Where a storage of Proxmox VE has its volumes, on all nodes: its directory, or the folder of
    /// its devices.
    #[arg(long, value_name = "NAME=PATH", value_parser = storage)]
    storage: Vec<(String, String)>,
}

/// Folders of volumes, by storage.
type Storages = BTreeMap<String, String>;

fn storage(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && path.starts_with('/') => {
            Ok((name.to_owned(), path.trim_end_matches('/').to_owned()))
        }
        _ => Err("NAME=PATH is expected, with an absolute path".into()),
    }
}

/// A machine in the terms of machine files.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
struct Machine {
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    kernel: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    initrd: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    append: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    disk: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    net: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu: Option<u32>,
    #[serde(rename = "cpu-model", skip_serializing_if = "Option::is_none")]
    cpu_model: Option<CpuModel>,
    #[serde(rename = "guest-agent", skip_serializing_if = "Option::is_none")]
    guest_agent: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    balloon: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    display: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    memory: Option<String>,
}

/// What was read of a machine.
#[derive(Debug, Default)]
struct Imported {
    name: String,
    machine: Machine,
    /// What of its description it lacks here.
    left_out: Vec<String>,
}

impl Imported {
    fn new() -> Self {
        Imported {
            machine: Machine {
                kind: "qemu",
                ..Machine::default()
            },
            ..Self::default()
        }
    }

    fn leave_out(&mut self, what: impl Into<String>) {
        self.left_out.push(what.into());
    }

    /// A disk that its description calls `of`.
    fn add_disk(&mut self, of: &str, path: &str, format: Option<&str>, is_read_only: bool) {
        let format = format.map_or_else(String::new, |format| format!(",format={format}"));
        let read_only = if is_read_only { ",ro" } else { "" };
        let text = format!("{path}{format}{read_only}");
        let checked = match path {
            _ if !path.starts_with('/') => Err("an absolute path is expected".to_owned()),
            _ if path.contains(',') => Err("its path has a comma".to_owned()),
            _ => system::disk(&text).map(drop),
        };
        match checked {
            Ok(()) => self.machine.disk.push(text),
            Err(why) => self.leave_out(format!("{of} {path}: {why}")),
        }
    }

    /// A network interface that its description calls `of`.
    fn add_interface(&mut self, of: &str, bridge: &str, mac: Option<&str>) {
        let mac = mac.map_or_else(String::new, |mac| format!(",mac={}", mac.to_lowercase()));
        let text = format!("{bridge}{mac}");
        match network::parse(&text) {
            Ok(_) => self.machine.net.push(text),
            Err(why) => self.leave_out(format!("{of}: {why}")),
        }
    }

    /// The model of its processors, by QEMU's name or one of libvirt or Proxmox VE. Only levels are the
    /// same everywhere: of other models it is not known which nodes have them.
    fn set_cpu_model(&mut self, name: &str) {
        let model = match name {
            "host" | "max" | "host-passthrough" | "host-model" | "maximum" => CpuModel::Common,
            "qemu64" | "kvm64" => CpuModel::Level1,
            "x86-64-v2-AES" => CpuModel::Level2,
            _ => match name.parse() {
                Ok(model) => model,
                Err(_) => {
                    self.leave_out(format!("cpu {name}"));
                    return;
                }
            },
        };
        if name.ends_with("-AES") {
            self.leave_out(format!("cpu {name}: AES"));
        }
        self.machine.cpu_model = Some(model);
    }

    /// Devices are of virtio here, and have other names in the guest.
    fn replace_device(&mut self, of: &str, model: &str) {
        if model != "virtio" {
            self.leave_out(format!("{of}: {model}, it is of virtio here"));
        }
    }

    /// Memory in bytes, as whole MiB.
    ///
    /// # Errors
    /// If that is more than a machine file can say.
    fn set_memory(&mut self, bytes: u64) -> Result<(), String> {
        let text = format!("{}M", bytes.div_ceil(1 << 20).max(1));
        crate::size::parse(&text)
            .map_err(|_| format!("memory of {text} is more than a machine can have"))?;
        self.machine.memory = Some(text);
        Ok(())
    }

    /// Its part of a machine file.
    fn text(&self, from: &Path) -> Result<String> {
        let mut text = format!("# From {}.", one_line(&from.display().to_string()));
        if !self.left_out.is_empty() {
            text.push_str(" Left out:");
        }
        for what in &self.left_out {
            // Writing to a string does not fail.
            let _ = write!(text, "\n#   {}", one_line(what));
        }
        let of_name = BTreeMap::from([(&self.name, &self.machine)]);
        let table = toml::to_string(&BTreeMap::from([("machine", of_name)]))?;
        Ok(format!("{text}\n{table}"))
    }
}

/// Without characters that would end a comment.
fn one_line(text: &str) -> String {
    text.replace(char::is_control, " ")
}

/// The name of a machine that is most like this one; none if nothing of it can be in one.
fn machine_name(name: &str) -> Option<String> {
    let allowed = |letter: char| match letter.to_ascii_lowercase() {
        letter @ ('a'..='z' | '0'..='9') => letter,
        _ => '-',
    };
    let like: String = name.chars().map(allowed).take(NAME_BYTES_MAX).collect();
    let like = like.trim_matches('-');
    (!like.is_empty()).then(|| like.to_owned())
}

/// Reads a description of either form. `stem` is the name of its file, without its ending.
fn read(stem: &str, text: &str, storages: &Storages) -> Result<Imported, String> {
    let is_xml = text.trim_start().starts_with('<');
    let mut read = match is_xml {
        true => libvirt::read(text)?,
        false => proxmox::read(text, storages)?,
    };
    let said = match read.name.is_empty() {
        true => stem.to_owned(),
        false => std::mem::take(&mut read.name),
    };
    read.name = machine_name(&said).ok_or("it has no name that a machine can have")?;
    if read.name != said {
        read.leave_out(format!("name {said}: a machine cannot have it"));
    }
    if read.machine.kernel.is_none() && read.machine.disk.is_empty() {
        read.leave_out("nothing is left to boot: add a disk or a kernel");
    }
    Ok(read)
}

/// Whether a text is a description, for fuzzing.
///
/// # Panics
/// If one becomes a file that is none.
pub(crate) fn is_description(text: &str) -> bool {
    let storages = Storages::from([("local".to_owned(), "/var/lib/vz".to_owned())]);
    let Ok(read) = read("vm", text, &storages) else {
        return false;
    };
    let file = read.text(Path::new("vm")).unwrap_or_default();
    assert!(crate::apply::is_file(&file), "{file}");
    true
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let storages: Storages = args.storage.iter().cloned().collect();
    let (mut parts, mut names) = (Vec::new(), BTreeSet::new());
    for file in &args.files {
        let shown = file.display();
        let text = input::read_text(file).with_context(|| format!("cannot read {shown}"))?;
        let stem = file.file_stem().unwrap_or_default().to_string_lossy();
        let read =
            read(&stem, &text, &storages).map_err(|error| anyhow::anyhow!("{shown}: {error}"))?;
        if !names.insert(read.name.clone()) {
            bail!("{shown}: another description has the name {:?}", read.name);
        }
        parts.push(read.text(file)?);
    }
    out!("{}", parts.join("\n"));
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_those_of_machines() {
        assert_eq!(machine_name("web-1").as_deref(), Some("web-1"));
        assert_eq!(
            machine_name("Web_1.example").as_deref(),
            Some("web-1-example")
        );
        assert_eq!(machine_name("_x_").as_deref(), Some("x"));
        assert_eq!(machine_name("ÄÖ"), None);
        assert_eq!(machine_name(&"a".repeat(99)).unwrap().len(), 63);
    }

    #[test]
    fn what_is_left_out_ends_no_comment() {
        let mut read = read("Vm", "cores: 2\n", &Storages::new()).unwrap();
        read.leave_out("x\nkind = 1\u{85}");
        let text = read.text(Path::new("a\nb")).unwrap();
        assert!(crate::apply::is_file(&text), "{text}");
        assert!(
            text.starts_with("# From a b. Left out:\n#   name Vm"),
            "{text}"
        );
        assert!(text.contains("#   x kind = 1 \n"), "{text}");
        assert!(text.contains("nothing is left to boot"), "{text}");
    }

    #[test]
    fn what_cannot_be_said_in_a_machine_file_is_left_out() {
        let mut read = Imported::new();
        read.add_disk("vda", "/a,b.raw", None, false);
        read.add_disk("vdb", "relative.raw", None, false);
        read.add_disk("vdc", "/a.vmdk", Some("vmdk"), false);
        read.add_disk("vdd", "/a.raw", Some("raw"), true);
        read.add_interface("first", "a/b", None);
        read.add_interface("second", "br0", Some("01:00:00:00:00:01"));
        read.add_interface("third", "br0", Some("BC:24:11:00:00:01"));
        assert_eq!(read.machine.disk, ["/a.raw,format=raw,ro"]);
        assert_eq!(read.machine.net, ["br0,mac=bc:24:11:00:00:01"]);
        assert_eq!(read.left_out.len(), 5);
        assert_eq!(storage("local=/var/lib/vz/").unwrap().1, "/var/lib/vz");
        storage("local").unwrap_err();
        storage("local=relative").unwrap_err();
    }
}
