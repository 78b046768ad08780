//! Domains of libvirt: <https://libvirt.org/formatdomain.html>.

use super::Imported;
use roxmltree::{Document, Node};

/// Devices that a machine has here too, and what connects devices.
const PROVIDED: [&str; 5] = ["console", "controller", "emulator", "rng", "serial"];
/// Of a disk, and of an interface, what is read or says only how the device is connected.
const OF_DISK: [&str; 8] = [
    "address",
    "alias",
    "backingStore",
    "boot",
    "driver",
    "readonly",
    "source",
    "target",
];
const OF_INTERFACE: [&str; 7] = [
    "address", "alias", "boot", "mac", "model", "source", "target",
];

/// Reads a domain.
///
/// # Errors
/// A message that follows the file's name.
pub(super) fn read(text: &str) -> Result<Imported, String> {
    let document = Document::parse(text).map_err(|error| format!("that is no XML: {error}"))?;
    let domain = document.root_element();
    if domain.tag_name().name() != "domain" {
        let found = domain.tag_name().name();
        return Err(format!("a <domain> of libvirt is expected, not <{found}>"));
    }
    let hypervisor = domain.attribute("type").unwrap_or("kvm");
    if !["kvm", "qemu", "hvf"].contains(&hypervisor) {
        return Err(format!("its type is {hypervisor}: kvm or qemu is expected"));
    }
    let mut read = Imported::new();
    for part in elements(domain) {
        match part.tag_name().name() {
            "name" => read.name = content(part),
            "memory" => match bytes(part) {
                Some(bytes) => read.set_memory(bytes)?,
                None => return Err(format!("memory of {:?} is not known", content(part))),
            },
            // What a balloon leaves of it.
            "currentMemory" => {}
            "vcpu" => {
                let count = content(part).parse();
                read.machine.cpu = Some(
                    count.map_err(|_| format!("{:?} is no number of processors", content(part)))?,
                );
                for attribute in part.attributes() {
                    let (name, value) = (attribute.name(), attribute.value());
                    read.leave_out(format!("vcpu {name}={value}"));
                }
            }
            "cpu" => {
                let model = match part.attribute("mode") {
                    None | Some("custom") => child(part, "model").map(content),
                    Some(mode) => Some(mode.to_owned()),
                };
                // What else it says is of that model.
                match model {
                    Some(model) => read.set_cpu_model(&model),
                    None => read.leave_out("cpu"),
                }
            }
            "os" => system(part, &mut read)?,
            "devices" => {
                let mut devices: Vec<Node<'_, '_>> = elements(part).collect();
                // It boots from its first disk.
                devices.sort_by_key(|device| boot_order(*device));
                let is_serial = |it: &&Node<'_, '_>| it.tag_name().name() == "serial";
                if devices.iter().filter(is_serial).count() > 1 {
                    read.leave_out("all serial lines but the first");
                }
                for device in devices {
                    add(device, &mut read);
                }
            }
            other => read.leave_out(other),
        }
    }
    Ok(read)
}

fn elements<'a>(of: Node<'a, 'a>) -> impl Iterator<Item = Node<'a, 'a>> {
    of.children().filter(Node::is_element)
}

/// When it is booted from a device, among others.
fn boot_order(device: Node<'_, '_>) -> u32 {
    let order = child(device, "boot").and_then(|boot| boot.attribute("order")?.parse().ok());
    order.unwrap_or(u32::MAX)
}

fn child<'a>(of: Node<'a, 'a>, name: &str) -> Option<Node<'a, 'a>> {
    elements(of).find(|it| it.tag_name().name() == name)
}

fn content(of: Node<'_, '_>) -> String {
    of.text().unwrap_or_default().trim().to_owned()
}

/// An amount of memory, whose unit is KiB unless it says otherwise.
fn bytes(of: Node<'_, '_>) -> Option<u64> {
    let unit: u64 = match of.attribute("unit").unwrap_or("KiB") {
        "b" | "bytes" => 1,
        "KB" => 1000,
        "k" | "KiB" => 1 << 10,
        "MB" => 1_000_000,
        "M" | "MiB" => 1 << 20,
        "GB" => 1_000_000_000,
        "G" | "GiB" => 1 << 30,
        "TB" => 1_000_000_000_000,
        "T" | "TiB" => 1 << 40,
        _ => return None,
    };
    content(of).parse::<u64>().ok()?.checked_mul(unit)
}

fn system(os: Node<'_, '_>, read: &mut Imported) -> Result<(), String> {
    if let Some(firmware) = os.attribute("firmware") {
        read.leave_out(format!("os firmware={firmware}: it boots by BIOS"));
    }
    for part in elements(os) {
        match part.tag_name().name() {
            "type" => {
                let arch = part.attribute("arch").unwrap_or("x86_64");
                if arch != "x86_64" {
                    return Err(format!("its processor is {arch}: systems are x86_64 here"));
                }
                let what = content(part);
                if !["", "hvm"].contains(&what.as_str()) {
                    return Err(format!("its os type is {what}: hvm is expected"));
                }
                let machine = part.attribute("machine").unwrap_or_default();
                if !machine.contains("q35") && !machine.is_empty() {
                    read.leave_out(format!("os machine={machine}: it is q35 here"));
                }
            }
            "kernel" => read.machine.kernel = Some(content(part)),
            "initrd" => read.machine.initrd = Some(content(part)),
            "cmdline" => read.machine.append = Some(content(part)),
            // It boots from its first disk.
            "boot" if part.attribute("dev") == Some("hd") => {}
            other => {
                let dev = part.attribute("dev").unwrap_or_default();
                read.leave_out(format!("os {other} {dev}").trim_end());
            }
        }
    }
    if read.machine.kernel.is_none() {
        let of_kernel = [read.machine.initrd.take(), read.machine.append.take()];
        for what in of_kernel.into_iter().flatten() {
            read.leave_out(format!("os {what}: it has no kernel"));
        }
    }
    Ok(())
}

fn add(device: Node<'_, '_>, read: &mut Imported) {
    match device.tag_name().name() {
        "disk" => add_disk(device, read),
        "interface" => add_interface(device, read),
        "memballoon" => {
            if device.attribute("model") == Some("none") {
                read.machine.balloon = Some(false);
            }
        }
        "input"
            if matches!(
                device.attribute("type"),
                Some("tablet" | "mouse" | "keyboard")
            ) => {}
        "video" => add_video(device, read),
        "graphics" => {
            read.machine.display = Some(true);
            let kind = device.attribute("type").unwrap_or_default();
            if kind != "vnc" {
                read.leave_out(format!("graphics {kind}: it is vnc here"));
            }
            // Where it listens is decided by `keel vnc`.
            let known = ["type", "port", "autoport"];
            let attributes = device.attributes().map(|it| it.name());
            let rest: Vec<&str> = attributes.filter(|it| !known.contains(it)).collect();
            if !rest.is_empty() {
                read.leave_out(format!("graphics {kind}: {}", rest.join(", ")));
            }
        }
        provided if PROVIDED.contains(&provided) => {}
        // Every system has a port for it.
        "channel" if is_agent_port(device) => {}
        other => {
            let kind = device
                .attribute("type")
                .or_else(|| device.attribute("model"));
            let text = format!("{other} {}", kind.unwrap_or_default());
            read.leave_out(text.trim_end());
        }
    }
}

fn add_video(video: Node<'_, '_>, read: &mut Imported) {
    let model = child(video, "model").and_then(|it| it.attribute("type"));
    if model == Some("none") {
        return;
    }
    read.machine.display = Some(true);
    if let Some(model) = model.filter(|model| *model != "vga") {
        read.leave_out(format!("video {model}: it is vga here"));
    }
}

/// Whether a channel is the port of a QEMU guest agent.
fn is_agent_port(channel: Node<'_, '_>) -> bool {
    let name = child(channel, "target").and_then(|it| it.attribute("name"));
    name == Some("org.qemu.guest_agent.0")
}

fn add_disk(disk: Node<'_, '_>, read: &mut Imported) {
    let target = child(disk, "target").and_then(|it| it.attribute("dev"));
    let name = format!("disk {}", target.unwrap_or_default());
    let name = name.trim_end();
    let source = child(disk, "source");
    let kind = disk.attribute("type").unwrap_or_default();
    let path = match kind {
        "file" => source.and_then(|it| it.attribute("file")),
        "block" => source.and_then(|it| it.attribute("dev")),
        _ => None,
    };
    let device = disk.attribute("device").unwrap_or("disk");
    let Some(path) = path.filter(|_| device == "disk") else {
        let path = path.unwrap_or_default();
        read.leave_out(format!("{name}: {device} of type {kind} {path}").trim_end());
        return;
    };
    let of_source = source.into_iter().flat_map(elements);
    let of_source: Vec<&str> = of_source.map(|it| it.tag_name().name()).collect();
    if of_source
        .iter()
        .any(|it| ["encryption", "slices"].contains(it))
    {
        let what = of_source.join(", ");
        read.leave_out(format!("{name} {path}: with {what} its file is no disk"));
        return;
    }
    for what in of_source {
        read.leave_out(format!("{name}: {what}"));
    }
    if let Some(base) = child(disk, "backingStore").and_then(|it| child(it, "source")) {
        let base = base.attributes().next().map_or("", |it| it.value());
        read.leave_out(format!("{name}: it needs its base, {base}"));
    }
    let driver = child(disk, "driver").and_then(|it| it.attribute("type"));
    let is_read_only = child(disk, "readonly").is_some();
    // libvirt's own default.
    read.add_disk(name, path, Some(driver.unwrap_or("raw")), is_read_only);
    let bus = child(disk, "target").and_then(|it| it.attribute("bus"));
    read.replace_device(name, bus.unwrap_or("virtio"));
    leave_out_rest(disk, &OF_DISK, name, read);
}

fn add_interface(interface: Node<'_, '_>, read: &mut Imported) {
    let mac = child(interface, "mac").and_then(|it| it.attribute("address"));
    let name = format!("interface {}", mac.unwrap_or_default());
    let name = name.trim_end();
    let source = child(interface, "source");
    let kind = interface.attribute("type").unwrap_or_default();
    match source.and_then(|it| it.attribute("bridge")) {
        Some(bridge) if kind == "bridge" => {
            read.add_interface(name, bridge, mac);
            let model = child(interface, "model").and_then(|it| it.attribute("type"));
            read.replace_device(name, model.unwrap_or("virtio"));
            leave_out_rest(interface, &OF_INTERFACE, name, read);
        }
        _ => {
            let source = source.and_then(|it| it.attributes().next());
            let source = source.map_or("", |it| it.value());
            let text = format!("{name}: type {kind} {source}");
            read.leave_out(format!("{}, which is no bridge", text.trim_end()));
        }
    }
}

fn leave_out_rest(device: Node<'_, '_>, known: &[&str], name: &str, read: &mut Imported) {
    for part in elements(device) {
        let tag = part.tag_name().name();
        if !known.contains(&tag) {
            read.leave_out(format!("{name}: {tag}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    /// As `virsh dumpxml` prints it, shortened.
    const DOMAIN: &str = r#"
<domain type='kvm' id='4'>
  <name>Web_1</name>
  <uuid>0f9b1e0a-5a5c-4b7e-8d1c-2f6f3a1d9c11</uuid>
  <memory unit='KiB'>2097152</memory>
  <currentMemory unit='KiB'>2097152</currentMemory>
  <vcpu placement='static'>2</vcpu>
  <os>
    <type arch='x86_64' machine='pc-q35-9.2'>hvm</type>
    <boot dev='hd'/>
  </os>
  <cpu mode='host-passthrough' check='none'/>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' discard='unmap'/>
      <source file='/srv/vm/web.qcow2'/>
      <target dev='vda' bus='virtio'/>
      <iotune><total_iops_sec>100</total_iops_sec></iotune>
    </disk>
    <disk type='block' device='disk'>
      <source dev='/dev/vg/data'/>
      <target dev='vdb' bus='virtio'/>
      <readonly/>
    </disk>
    <disk type='file' device='cdrom'>
      <source file='/srv/iso/debian.iso'/>
      <target dev='sda' bus='sata'/>
    </disk>
    <disk type='network' device='disk'>
      <source protocol='rbd' name='pool/image'/>
      <target dev='vdc' bus='virtio'/>
    </disk>
    <controller type='usb' index='0' model='qemu-xhci'/>
    <interface type='bridge'>
      <mac address='52:54:00:AA:00:01'/>
      <source bridge='br0'/>
      <model type='virtio'/>
      <vlan><tag id='10'/></vlan>
    </interface>
    <interface type='network'>
      <mac address='52:54:00:aa:00:02'/>
      <source network='default'/>
    </interface>
    <serial type='pty'/>
    <channel type='unix'>
      <target type='virtio' name='org.qemu.guest_agent.0'/>
    </channel>
    <channel type='spicevmc'>
      <target type='virtio' name='com.redhat.spice.0'/>
    </channel>
    <input type='tablet' bus='usb'/>
    <input type='evdev'/>
    <graphics type='vnc' port='-1' passwd='secret' keymap='de'/>
    <video/>
    <memballoon model='none'/>
  </devices>
</domain>"#;

    #[test]
    fn a_domain_is_a_machine_and_what_it_lacks_is_named() {
        let read = super::super::read("file", DOMAIN, &super::super::Storages::new()).unwrap();
        let text = read.text(Path::new("web.xml")).unwrap();
        assert_eq!(
            text,
            r#"# From web.xml. Left out:
#   uuid
#   vcpu placement=static
#   disk vda: iotune
#   disk sda: cdrom of type file /srv/iso/debian.iso
#   disk vdc: disk of type network
#   interface 52:54:00:AA:00:01: vlan
#   interface 52:54:00:aa:00:02: type network default, which is no bridge
#   channel spicevmc
#   input evdev
#   graphics vnc: passwd, keymap
#   name Web_1: a machine cannot have it
[machine.web-1]
kind = "qemu"
disk = ["/srv/vm/web.qcow2,format=qcow2", "/dev/vg/data,format=raw,ro"]
net = ["br0,mac=52:54:00:aa:00:01"]
cpu = 2
cpu-model = "common"
balloon = false
display = true
memory = "2048M"
"#
        );
        assert!(crate::apply::is_file(&text));
    }

    #[test]
    fn what_changes_for_the_guest_is_named() {
        let devices = "
            <disk type='file'><source file='/a.raw'/><target dev='vda' bus='virtio'/></disk>
            <disk type='file'><source file='/b.raw'/><target dev='sda' bus='sata'/><boot order='1'/><serial>X</serial></disk>
            <disk type='file'><source file='/c.raw'><encryption format='luks'/></source><target dev='vdc' bus='virtio'/></disk>
            <disk type='file'><driver type='qcow2'/><source file='/d'/><target dev='vdd' bus='virtio'/>
              <backingStore type='file'><source file='/base'/></backingStore></disk>
            <interface type='bridge'><source bridge='br0'/><model type='e1000'/></interface>
            <serial type='pty'/><serial type='pty'/>";
        let os = "<os><type arch='x86_64' machine='pc-i440fx-9.0'>hvm</type></os>";
        let found = read(&format!(
            "<domain>{os}<devices>{devices}</devices></domain>"
        ));
        let found = found.unwrap();
        let disks = ["/b.raw,format=raw", "/a.raw,format=raw", "/d,format=qcow2"];
        assert_eq!(found.machine.disk, disks);
        assert_eq!(found.machine.net, ["br0"]);
        assert_eq!(
            found.left_out,
            [
                "os machine=pc-i440fx-9.0: it is q35 here",
                "all serial lines but the first",
                "disk sda: sata, it is of virtio here",
                "disk sda: serial",
                "disk vdc /c.raw: with encryption its file is no disk",
                "disk vdd: it needs its base, /base",
                "interface: e1000, it is of virtio here",
            ]
        );
    }

    #[test]
    fn a_kernel_is_booted_and_firmware_is_left_out() {
        let domain =
            |os: &str| format!("<domain><name>k</name><memory unit='G'>1</memory>{os}</domain>");
        let os = "<os firmware='efi'><type>hvm</type><loader>/x</loader><kernel>/k</kernel><initrd>/i</initrd><cmdline>a b</cmdline></os>";
        let found = read(&domain(os)).unwrap();
        assert_eq!(found.machine.kernel.as_deref(), Some("/k"));
        assert_eq!(found.machine.append.as_deref(), Some("a b"));
        assert_eq!(found.machine.memory.as_deref(), Some("1024M"));
        assert_eq!(
            found.left_out,
            ["os firmware=efi: it boots by BIOS", "os loader"]
        );
        let without = read(&domain("<os><initrd>/i</initrd></os>")).unwrap();
        assert_eq!(without.machine.initrd, None);
        assert_eq!(without.left_out, ["os /i: it has no kernel"]);
    }

    #[test]
    fn what_is_no_domain_for_us_is_refused() {
        for (text, what) in [
            ("<domain", "that is no XML"),
            ("<network/>", "not <network>"),
            (
                "<domain><memory unit='PiB'>1</memory></domain>",
                "is not known",
            ),
            (
                "<domain><memory>99999999999999999999</memory></domain>",
                "is not known",
            ),
            (
                "<domain><vcpu>two</vcpu></domain>",
                "no number of processors",
            ),
            (
                "<domain><os><type arch='aarch64'/></os></domain>",
                "aarch64",
            ),
            ("<domain type='xen'/>", "xen"),
            (
                "<domain><os><type>linux</type></os></domain>",
                "hvm is expected",
            ),
            (
                "<!DOCTYPE d [<!ENTITY a 'x'>]><domain><name>&a;</name></domain>",
                "that is no XML",
            ),
        ] {
            let said = read(text).unwrap_err();
            assert!(said.contains(what), "{text}: {said}");
        }
    }
}
