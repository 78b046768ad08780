//! A Linux system that boots in seconds: a kernel and BusyBox that `cargo xtask test` has unpacked,
//! with a first file system made here. It answers HTTP, and counts on its console. The host's QEMU guest
//! agent can be added to it.

use anyhow::{Context, Result, ensure};
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// Where the packages are unpacked.
const UNPACKED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/linux");

/// The agent of the package `qemu-guest-agent`.
const AGENT: &str = "/usr/sbin/qemu-ga";

/// The kernel's modules that it needs, each after those that it uses itself.
const MODULES: [&str; 15] = [
    "drivers/virtio/virtio_ring.ko",
    "drivers/virtio/virtio.ko",
    "drivers/virtio/virtio_pci_modern_dev.ko",
    "drivers/virtio/virtio_pci_legacy_dev.ko",
    "drivers/virtio/virtio_pci.ko",
    "net/core/failover.ko",
    "drivers/net/net_failover.ko",
    "drivers/net/virtio_net.ko",
    "drivers/block/virtio_blk.ko",
    "drivers/char/virtio_console.ko",
    "drivers/virtio/virtio_balloon.ko",
    "fs/nls/nls_ascii.ko",
    "fs/nls/nls_cp437.ko",
    "fs/fat/fat.ko",
    "fs/fat/vfat.ko",
];

/// Its first process. Its address is on the kernel's command line, and whether it is busy. It runs
/// scripts for cloud-init as that would.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
for module in MODULES; do insmod /modules/$module; done
for word in $(cat /proc/cmdline); do
    case $word in keel.address=*) address=${word#*=} ;; esac
done
ip link set lo up
if [ -n "$address" ]; then
    ip address add $address dev eth0
    ip link set eth0 up
    echo ${address%/*} > /www/index.html
    httpd -p 80 -h /www
fi
for disk in /dev/vd?; do
    if mount -t vfat -o ro $disk /cloud-init 2> /dev/null; then
        sh /cloud-init/user-data &
        if [ -e /cloud-init/vendor-data ]; then sh /cloud-init/vendor-data; fi
        break
    fi
done
if [ -x /agent/qemu-ga ]; then
    while ! port=$(ls /dev/vport*p*); do usleep 10000; done 2> /dev/null
    /agent/loader --library-path /agent /agent/qemu-ga --method=virtio-serial --path=$port --statedir=/run &
fi
case $(cat /proc/cmdline) in *keel.idle*) while :; do sleep 3600; done ;; esac
case $(cat /proc/cmdline) in *keel.busy*) while :; do :; done & ;; esac
number=0
while :; do
    echo $number
    number=$((number + 1))
    usleep 20000
done
"#;

/// How it is shut down.
const SHUTDOWN: &str = "#!/bin/busybox sh\n/bin/busybox poweroff -f\n";

/// What such a system boots.
pub struct LinuxSystem {
    pub kernel: Vec<u8>,
    pub initrd: Vec<u8>,
}

impl LinuxSystem {
    /// Makes its files; none if the packages are not there: says then that the test is skipped.
    ///
    /// # Errors
    /// If a file cannot be made, or `cpio` is missing.
    pub fn make(folder: &Path) -> Result<Option<Self>> {
        let unpacked = Path::new(UNPACKED);
        if !unpacked.is_dir() {
            eprintln!(
                "skipped: no Linux here (`cargo xtask test` unpacks one from Debian's packages)"
            );
            return Ok(None);
        }
        let kernel = only_in(&unpacked.join("boot"), "vmlinuz-")?;
        let modules = only_in(&unpacked.join("lib/modules"), "")?.join("kernel");
        let tree = folder.join("initrd");
        for name in [
            "bin",
            "cloud-init",
            "dev",
            "modules",
            "proc",
            "run",
            "sbin",
            "sys",
            "www",
        ] {
            fs::create_dir_all(tree.join(name))?;
        }
        fs::copy(unpacked.join("bin/busybox"), tree.join("bin/busybox"))?;
        let mut names = Vec::new();
        for module in MODULES {
            let from = modules.join(module);
            let name = from.file_name().context("a module")?;
            let copied = fs::copy(&from, tree.join("modules").join(name));
            copied.with_context(|| from.display().to_string())?;
            names.push(name.to_string_lossy().into_owned());
        }
        write_program(
            &tree.join("init"),
            &INIT.replace("MODULES", &names.join(" ")),
        )?;
        // What the guest agent calls.
        write_program(&tree.join("sbin/shutdown"), SHUTDOWN)?;
        Ok(Some(LinuxSystem {
            kernel: fs::read(kernel)?,
            initrd: archive(&tree)?,
        }))
    }

    /// Adds the QEMU guest agent of this computer, with its libraries, which the system then starts;
    /// false if there is none here: says then that the test is skipped.
    ///
    /// # Errors
    /// If a file cannot be read or made.
    pub fn add_guest_agent(&mut self, folder: &Path) -> Result<bool> {
        let listed = Command::new("ldd").arg(AGENT).output();
        let listed = listed.context("ldd (apt-get install libc-bin)")?;
        if !listed.status.success() {
            eprintln!("skipped: no {AGENT} here (apt-get install qemu-guest-agent)");
            return Ok(false);
        }
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        let tree = folder.join("agent-initrd");
        let target = tree.join("agent");
        fs::create_dir_all(&target)?;
        fs::copy(AGENT, target.join("qemu-ga"))?;
        // "libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x...)", and the loader without an arrow.
        let files = listed.split_whitespace().filter(|it| it.starts_with('/'));
        for file in files.map(Path::new) {
            let name = file.file_name().context("a library")?;
            let name = name.to_string_lossy();
            let is_loader = name.starts_with("ld-linux");
            let name = if is_loader { "loader" } else { &*name };
            fs::copy(file, target.join(name)).with_context(|| file.display().to_string())?;
        }
        // Another archive: the kernel unpacks one after the other.
        self.initrd.extend_from_slice(&archive(&tree)?);
        Ok(true)
    }

    /// The kernel's command line for a system with this address, such as `10.0.0.7/24`, and with
    /// more words: `keel.busy` for one whose processor is busy, `keel.idle` for one that does nothing.
    /// Its console has its count alone, and what a script for cloud-init says.
    pub fn append(address: &str, words: &str) -> String {
        format!("console=ttyS0 quiet loglevel=0 panic=-1 keel.address={address} {words}")
    }
}

/// The only entry of a folder that begins so.
fn only_in(folder: &Path, prefix: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let mut found = entries.flatten().map(|entry| entry.path()).filter(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with(prefix)
    });
    let only = found.next().filter(|_| found.next().is_none());
    only.with_context(|| format!("not one {prefix}* in {}", folder.display()))
}

fn write_program(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text)?;
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    Ok(fs::set_permissions(path, executable)?)
}

fn archive(tree: &Path) -> Result<Vec<u8>> {
    let mut find = Command::new("find");
    let mut names = find
        .arg(".")
        .current_dir(tree)
        .stdout(Stdio::piped())
        .spawn()?;
    let output = Command::new("cpio")
        .args(["--create", "--format=newc", "--owner=0:0", "--quiet"])
        .current_dir(tree)
        .stdin(names.stdout.take().context("a pipe")?)
        .output()
        .context("cpio (apt-get install cpio)")?;
    ensure!(
        names.wait()?.success() && output.status.success(),
        "cpio failed"
    );
    Ok(output.stdout)
}

/// Asks the system with this address over HTTP; returns what it says.
///
/// # Errors
/// If the answer is not a whole one within `patience` for each step.
pub fn ask(address: &str, patience: Duration) -> Result<String> {
    let server: SocketAddr = format!("{address}:80").parse()?;
    let mut connection = TcpStream::connect_timeout(&server, patience)?;
    connection.set_read_timeout(Some(patience))?;
    connection.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("half an answer")?;
    ensure!(head.split(' ').nth(1) == Some("200"), "{head}");
    Ok(body.trim().to_owned())
}
