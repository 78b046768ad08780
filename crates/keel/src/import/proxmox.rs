//! Virtual machines of Proxmox VE: `qm.conf(5)`, the files of `/etc/pve/qemu-server`.

use super::{Imported, Storages};

/// The buses of disks, whose numbers follow.
const BUSES: [&str; 4] = ["virtio", "scsi", "sata", "ide"];
/// Options of a disk that say nothing that a machine here would lack.
const OF_DISK: [&str; 5] = ["file", "format", "media", "ro", "size"];

/// The memory of a machine that says nothing of it.
const MEMORY_BYTES: u64 = 512 << 20;

/// A disk as its line has it.
struct Disk<'a> {
    name: &'a str,
    options: Vec<(&'a str, &'a str)>,
}

/// Reads a file.
///
/// # Errors
/// A message that follows the file's name.
pub(super) fn read(text: &str, storages: &Storages) -> Result<Imported, String> {
    let mut read = Imported::new();
    let (mut cores, mut sockets, mut order) = (None, None, "");
    let mut disks = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(snapshot) = line.strip_prefix('[') {
            let name = snapshot.trim_end_matches(']');
            read.leave_out(format!("snapshot {name}, and what follows it"));
            break;
        }
        let Some((key, value)) = line.split_once(':') else {
            let number = number + 1;
            return Err(format!(
                "line {number}: \"KEY: VALUE\" is expected in a file of Proxmox VE (one of libvirt begins with <domain>)"
            ));
        };
        let (key, value) = (key.trim(), value.trim());
        let count = || {
            let count = value.parse::<u32>().ok().filter(|count| *count > 0);
            count.ok_or_else(|| format!("{key}: {value:?} is no number of processors"))
        };
        match key {
            "template" if value == "1" => {
                return Err("it is a template: its clones need its disks as they are".into());
            }
            "arch" if value != "x86_64" => {
                return Err(format!("its processor is {value}: systems are x86_64 here"));
            }
            "arch" => {}
            "agent" => add_agent(value, &mut read),
            // Others are the least memory that it leaves the system.
            "balloon" if value == "0" => read.machine.balloon = Some(false),
            "vga" => set_display(value, &mut read),
            "cpu" => {
                let (model, options) = value.split_once(',').unwrap_or((value, ""));
                read.set_cpu_model(model.strip_prefix("cputype=").unwrap_or(model));
                if !options.is_empty() {
                    read.leave_out(format!("cpu: {options}"));
                }
            }
            "name" => read.name = value.to_owned(),
            "cores" => cores = Some(count()?),
            "sockets" => sockets = Some(count()?),
            "memory" => {
                let mib = value
                    .strip_prefix("current=")
                    .unwrap_or(value)
                    .parse::<u64>();
                let bytes = mib.ok().and_then(|mib| mib.checked_mul(1 << 20));
                read.set_memory(
                    bytes.ok_or_else(|| format!("memory of {value:?} MiB is not known"))?,
                )?;
            }
            "boot" => match value.strip_prefix("order=") {
                Some(listed) => order = listed,
                None => read.leave_out(format!("boot: {value}")),
            },
            _ if is_numbered(key, "net") => add_interface(key, value, &mut read),
            _ if BUSES.iter().any(|bus| is_numbered(key, bus)) => {
                let options = value.split(',');
                // Its volume has no name, usually.
                let options = options.map(|it| it.split_once('=').unwrap_or(("file", it)));
                let options: Vec<(&str, &str)> = options.collect();
                disks.push(Disk { name: key, options });
            }
            _ => read.leave_out(format!("{key}: {value}")),
        }
    }
    // It has one unless it says otherwise.
    read.machine.display = read.machine.display.or(Some(true)).filter(|it| *it);
    if read.machine.memory.is_none() {
        read.set_memory(MEMORY_BYTES)?;
    }
    if cores.is_some() || sockets.is_some() {
        let count = cores.unwrap_or(1).checked_mul(sockets.unwrap_or(1));
        read.machine.cpu = Some(count.ok_or("it has too many processors")?);
    }
    // It boots from its first disk.
    let place = |disk: &Disk| {
        let listed = order.split(';').position(|name| name.trim() == disk.name);
        listed.unwrap_or(usize::MAX)
    };
    disks.sort_by_key(place);
    for disk in disks {
        add_disk(&disk, storages, &mut read);
    }
    Ok(read)
}

/// What `vga` says: the type of its graphics card, or where its console is instead.
fn set_display(value: &str, read: &mut Imported) {
    let value = value.strip_prefix("type=").unwrap_or(value);
    let (kind, options) = match value.split_once(',') {
        Some(parts) => parts,
        None if value.contains('=') => ("std", value),
        None => (value, ""),
    };
    let has_display = kind != "none" && !is_numbered(kind, "serial");
    read.machine.display = Some(has_display);
    if has_display && kind != "std" {
        read.leave_out(format!("vga: {kind}, it is std here"));
    }
    if !options.is_empty() {
        read.leave_out(format!("vga: {options}"));
    }
}

/// Whether a key is this name with a number.
fn is_numbered(key: &str, name: &str) -> bool {
    let number = key.strip_prefix(name).unwrap_or_default();
    !number.is_empty() && number.bytes().all(|digit| digit.is_ascii_digit())
}

fn add_disk(disk: &Disk, storages: &Storages, read: &mut Imported) {
    let Disk { name, options } = disk;
    let option = |wanted: &str| {
        let found = options.iter().find(|(option, _)| *option == wanted);
        found.map(|(_, value)| *value)
    };
    let volume = option("file").unwrap_or_default();
    if option("media").is_some_and(|media| media != "disk") || matches!(volume, "" | "none") {
        read.leave_out(format!("{name}: {volume}"));
        return;
    }
    let path = match volume.split_once(':') {
        _ if volume.starts_with('/') => volume.to_owned(),
        Some((storage, rest)) => match storages.get(storage) {
            Some(folder) => path_of(folder, rest, name, read),
            None => {
                read.leave_out(format!(
                    "{name}: {volume} (say where it is: --storage {storage}=PATH)"
                ));
                return;
            }
        },
        None => {
            read.leave_out(format!("{name}: {volume}"));
            return;
        }
    };
    // The name of a file ends with its format; other volumes are devices.
    let last = path.rsplit('/').next().unwrap_or_default();
    let is_device = path.starts_with("/dev/") || !last.contains('.');
    let format = option("format").or(is_device.then_some("raw"));
    let read_only = option("ro").is_some_and(|ro| matches!(ro, "1" | "on" | "yes" | "true"));
    read.add_disk(name, &path, format, read_only);
    let bus = name.trim_end_matches(|digit: char| digit.is_ascii_digit());
    read.replace_device(name, bus);
    leave_out_rest(name, options, &OF_DISK, read);
}

/// Where a volume of a storage is. Storages of files have a folder for each machine; a linked clone
/// is written behind its base.
fn path_of(folder: &str, volume: &str, name: &str, read: &mut Imported) -> String {
    let parts: Vec<&str> = volume.split('/').collect();
    let is_machine = |part: &str| !part.is_empty() && part.bytes().all(|it| it.is_ascii_digit());
    let (base, own) = match parts.as_slice() {
        [base @ .., machine, own] if is_machine(machine) => {
            (base, format!("images/{machine}/{own}"))
        }
        [base @ .., own] => (base, (*own).to_owned()),
        [] => (&parts[..], String::new()),
    };
    if !base.is_empty() {
        read.leave_out(format!("{name}: it needs its base, {}", base.join("/")));
    }
    format!("{folder}/{own}")
}

/// `1,fstrim_cloned_disks=1,type=isa`
fn add_agent(value: &str, read: &mut Imported) {
    let options = value.split(',');
    let options = options.map(|it| it.split_once('=').unwrap_or(("enabled", it)));
    let options: Vec<(&str, &str)> = options.collect();
    let option = |wanted: &str| {
        let found = options.iter().find(|(option, _)| *option == wanted);
        found.map(|(_, value)| *value)
    };
    // A system has a port for one unless it says otherwise.
    if !matches!(option("enabled"), Some("1" | "on" | "yes" | "true")) {
        read.machine.guest_agent = Some(false);
    }
    if option("type").is_some_and(|kind| kind != "virtio") {
        read.leave_out(format!("agent: {value}: its port is of virtio here"));
    }
}

/// `virtio=BC:24:11:00:00:01,bridge=vmbr0,...`
fn add_interface(name: &str, value: &str, read: &mut Imported) {
    let options: Vec<(&str, &str)> = value
        .split(',')
        .filter_map(|option| option.split_once('='))
        .collect();
    let option = |wanted: &str| {
        let found = options.iter().find(|(option, _)| *option == wanted);
        found.map(|(_, value)| *value)
    };
    // The first one is the model, with the address.
    let model = options.first().filter(|(name, _)| *name != "model");
    let mac = option("macaddr").or_else(|| model.map(|(_, mac)| *mac));
    let Some(bridge) = option("bridge") else {
        read.leave_out(format!("{name}: {value}, which is on no bridge"));
        return;
    };
    read.add_interface(name, bridge, mac);
    let named = model.map_or("model", |(model, _)| *model);
    read.replace_device(name, option("model").unwrap_or(named));
    let known = ["bridge", "macaddr", "model", named];
    leave_out_rest(name, &options, &known, read);
}

fn leave_out_rest(name: &str, options: &[(&str, &str)], known: &[&str], read: &mut Imported) {
    let rest = options.iter().filter(|(option, _)| !known.contains(option));
    let rest: Vec<String> = rest
        .map(|(option, value)| format!("{option}={value}"))
        .collect();
    if !rest.is_empty() {
        read.leave_out(format!("{name}: {}", rest.join(",")));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    const CONF: &str = "\
#A description
agent: 1
balloon: 0
boot: order=scsi1;ide2;net0
cores: 2
cpu: host,flags=+aes
ide2: none,media=cdrom
memory: 2048
name: web
net0: virtio=BC:24:11:AA:00:01,bridge=vmbr0,firewall=1,tag=10
net1: model=e1000,macaddr=BC:24:11:AA:00:02,bridge=vmbr1
scsi0: local:100/vm-100-disk-1.qcow2,iothread=1,size=32G
scsi1: local-lvm:vm-100-disk-0,size=8G
scsi2: ceph:vm-100-disk-2,size=8G
scsi3: /dev/disk/by-id/x,ro=1
scsihw: virtio-scsi-single
sockets: 2
vga: qxl,memory=32

[before-upgrade]
cores: 9
";

    #[test]
    fn a_file_is_a_machine_and_what_it_lacks_is_named() {
        let storages = [("local", "/mnt/vz"), ("local-lvm", "/dev/pve")];
        let storages = storages.map(|(name, path)| (name.to_owned(), path.to_owned()));
        let read = super::super::read("100", CONF, &Storages::from(storages)).unwrap();
        let text = read.text(Path::new("100.conf")).unwrap();
        assert_eq!(
            text,
            r#"# From 100.conf. Left out:
#   cpu: flags=+aes
#   net0: firewall=1,tag=10
#   net1: e1000, it is of virtio here
#   scsihw: virtio-scsi-single
#   vga: qxl, it is std here
#   vga: memory=32
#   snapshot before-upgrade, and what follows it
#   scsi1: scsi, it is of virtio here
#   ide2: none
#   scsi0: scsi, it is of virtio here
#   scsi0: iothread=1
#   scsi2: ceph:vm-100-disk-2 (say where it is: --storage ceph=PATH)
#   scsi3: scsi, it is of virtio here
[machine.web]
kind = "qemu"
disk = ["/dev/pve/vm-100-disk-0,format=raw", "/mnt/vz/images/100/vm-100-disk-1.qcow2", "/dev/disk/by-id/x,format=raw,ro"]
net = ["vmbr0,mac=bc:24:11:aa:00:01", "vmbr1,mac=bc:24:11:aa:00:02"]
cpu = 4
cpu-model = "common"
balloon = false
display = true
memory = "2048M"
"#
        );
        assert!(crate::apply::is_file(&text));
    }

    #[test]
    fn formats_are_not_guessed_and_clones_are_found() {
        let storages = [("local", "/mnt/vz"), ("zfs", "/dev/zvol")];
        let storages = storages.map(|(name, path)| (name.to_owned(), path.to_owned()));
        let text = "\
agent: enabled=0,type=isa
virtio0: local:100/vm-100-disk-0.vmdk,size=32G
virtio1: local:9000/base-9000-disk-0.qcow2/100/vm-100-disk-1.qcow2
virtio2: zfs:base-9000-disk-0/vm-100-disk-2
virtio3: /mnt/a.raw,ro=on
vga: serial0
";
        let read = read(text, &Storages::from(storages)).unwrap();
        let disks = [
            "/mnt/vz/images/100/vm-100-disk-1.qcow2",
            "/dev/zvol/vm-100-disk-2,format=raw",
            "/mnt/a.raw,ro",
        ];
        assert_eq!(read.machine.disk, disks);
        assert_eq!(read.machine.guest_agent, Some(false));
        assert_eq!(read.machine.display, None);
        let left_out = &read.left_out;
        assert!(left_out[0].contains("type=isa"), "{left_out:?}");
        assert!(left_out[1].contains("vm-100-disk-0.vmdk"), "{left_out:?}");
        let base = "virtio1: it needs its base, 9000/base-9000-disk-0.qcow2";
        assert_eq!(left_out[2], base);
        let base = "virtio2: it needs its base, base-9000-disk-0";
        assert_eq!(left_out[3], base);
        assert_eq!(read.machine.memory.as_deref(), Some("512M"));
    }

    #[test]
    fn without_a_name_it_has_that_of_its_file() {
        let storages = Storages::new();
        let read =
            super::super::read("100", "net0: virtio=BC:24:11:AA:00:01\n", &storages).unwrap();
        assert_eq!(read.name, "100");
        assert!(read.left_out[0].contains("on no bridge"), "{read:?}");
    }

    #[test]
    fn what_is_no_such_file_is_refused() {
        for (text, what) in [
            ("nonsense", "line 1"),
            ("cores: 0", "no number of processors"),
            ("memory: much", "is not known"),
            ("memory: 5333330333333", "more than a machine can have"),
            ("cores: 99999\nsockets: 99999", "too many"),
            ("template: 1", "is a template"),
            ("arch: aarch64", "aarch64"),
        ] {
            let said = read(text, &Storages::new()).unwrap_err();
            assert!(said.contains(what), "{text}: {said}");
        }
    }
}
