//! What the host is told of the system.

use crate::failure::Failure;
use nix::ifaddrs::{InterfaceAddress, getifaddrs};
use nix::sys::socket::SockaddrStorage;
use procfs::process::Process;
use procfs::{Current, LoadAverage};
use rustix::fs::statvfs;
use rustix::system::uname;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::net::IpAddr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// Where a system says which one it is (os-release(5)), the first that there is.
const RELEASES: [&str; 2] = ["/etc/os-release", "/usr/lib/os-release"];

/// Fields of that file, with their names in an answer.
const RELEASE_FIELDS: [(&str, &str); 7] = [
    ("ID", "id"),
    ("NAME", "name"),
    ("PRETTY_NAME", "pretty-name"),
    ("VERSION", "version"),
    ("VERSION_ID", "version-id"),
    ("VARIANT", "variant"),
    ("VARIANT_ID", "variant-id"),
];

/// The answer to `guest-get-host-name`.
///
/// # Errors
/// Never: it is of the form of all commands.
pub(crate) fn host_name() -> Result<Value, Failure> {
    Ok(json!({ "host-name": uname().nodename().to_string_lossy() }))
}

/// The answer to `guest-get-osinfo`.
///
/// # Errors
/// Never, likewise.
pub(crate) fn system() -> Result<Value, Failure> {
    let kernel = uname();
    let mut answer = json!({
        "kernel-release": kernel.release().to_string_lossy(),
        "kernel-version": kernel.version().to_string_lossy(),
        "machine": kernel.machine().to_string_lossy(),
    });
    let text = RELEASES
        .iter()
        .find_map(|path| fs::read_to_string(path).ok());
    for (field, value) in release(&text.unwrap_or_default()) {
        answer[field] = json!(value);
    }
    Ok(answer)
}

/// The fields of a file of os-release(5), by their names in an answer.
fn release(text: &str) -> BTreeMap<&'static str, String> {
    let lines = text.lines().filter_map(|line| line.trim().split_once('='));
    let fields = lines.filter_map(|(key, value)| {
        let mut known = RELEASE_FIELDS.iter();
        let (_, name) = known.find(|(field, _)| *field == key)?;
        Some((*name, unquoted(value)))
    });
    fields.collect()
}

/// A value of that file, whose quotes are those of a shell.
fn unquoted(value: &str) -> String {
    let quote = ['"', '\''].into_iter().find(|it| value.starts_with(*it));
    let inner = quote.and_then(|quote| value.strip_prefix(quote)?.strip_suffix(quote));
    let mut characters = inner.unwrap_or(value).chars();
    let mut text = String::new();
    while let Some(character) = characters.next() {
        match character {
            '\\' if quote != Some('\'') => text.extend(characters.next()),
            other => text.push(other),
        }
    }
    text
}

/// The answer to `guest-get-load`: processes that run or wait to, on average.
///
/// # Errors
/// If the kernel does not tell.
pub(crate) fn load() -> Result<Value, Failure> {
    let load = LoadAverage::current()?;
    Ok(json!({ "load1m": load.one, "load5m": load.five, "load15m": load.fifteen }))
}

/// The answer to `guest-network-get-interfaces`.
///
/// # Errors
/// If the kernel does not tell.
pub(crate) fn interfaces() -> Result<Value, Failure> {
    let mut interfaces: BTreeMap<String, Value> = BTreeMap::new();
    for found in getifaddrs()? {
        let name = found.interface_name.clone();
        let interface = interfaces
            .entry(name)
            .or_insert_with_key(|name| json!({ "name": name, "ip-addresses": [] }));
        let link = found
            .address
            .as_ref()
            .and_then(SockaddrStorage::as_link_addr);
        if let Some(bytes) = link.and_then(|link| link.addr()) {
            let bytes = bytes.map(|byte| format!("{byte:02x}"));
            interface["hardware-address"] = json!(bytes.join(":"));
        }
        if let Some(address) = address(&found)
            && let Some(addresses) = interface["ip-addresses"].as_array_mut()
        {
            addresses.push(address);
        }
    }
    Ok(interfaces.into_values().collect())
}

/// An address of the internet protocol.
fn address(found: &InterfaceAddress) -> Option<Value> {
    let address = ip(found.address.as_ref()?)?;
    let mask = found.netmask.as_ref().and_then(ip);
    let (kind, prefix) = match (address, mask) {
        (IpAddr::V4(_), Some(IpAddr::V4(mask))) => ("ipv4", mask.to_bits().leading_ones()),
        (IpAddr::V4(_), _) => ("ipv4", u32::BITS),
        (IpAddr::V6(_), Some(IpAddr::V6(mask))) => ("ipv6", mask.to_bits().leading_ones()),
        (IpAddr::V6(_), _) => ("ipv6", u128::BITS),
    };
    Some(json!({ "ip-address": address, "ip-address-type": kind, "prefix": prefix }))
}

fn ip(address: &SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|it| it.ip().into());
    v4.or_else(|| address.as_sockaddr_in6().map(|it| it.ip().into()))
}

/// The answer to `guest-get-fsinfo`: file systems on disks.
///
/// # Errors
/// If the kernel does not tell.
pub(crate) fn file_systems() -> Result<Value, Failure> {
    let mut known = BTreeSet::new();
    let mut systems = Vec::new();
    for mount in Process::myself()?.mountinfo()? {
        let source = mount.mount_source.unwrap_or_default();
        // Others have no size of their own, or may not answer. One may be mounted at several places.
        let Some(device) = source.strip_prefix("/dev/") else {
            continue;
        };
        if mount.fs_type.starts_with("fuse") && mount.fs_type != "fuseblk" {
            continue;
        }
        if !known.insert(mount.majmin) {
            continue;
        }
        let mount_point = unescaped(&mount.mount_point);
        let Ok(sizes) = statvfs(&mount_point) else {
            continue;
        };
        let used = sizes.f_blocks.saturating_sub(sizes.f_bfree);
        systems.push(json!({
            "name": device,
            "mountpoint": mount_point.to_string_lossy(),
            "type": mount.fs_type,
            "used-bytes": used.saturating_mul(sizes.f_frsize),
            // Without what is kept for root, as df(1) counts.
            "total-bytes": used.saturating_add(sizes.f_bavail).saturating_mul(sizes.f_frsize),
            "disk": [],
        }));
    }
    Ok(systems.into())
}

/// A path of the kernel's list of mounts, in which white space and backslashes are octal numbers (proc(5)).
fn unescaped(path: &Path) -> PathBuf {
    let mut rest = path.as_os_str().as_bytes();
    let mut bytes = Vec::new();
    while let Some((first, others)) = rest.split_first() {
        let digits = others.get(..3).filter(|_| *first == b'\\');
        let digits = digits.and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &others[3..];
            }
            None => {
                bytes.push(*first);
                rest = others;
            }
        }
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_point_may_have_any_name() {
        for (told, is) in [
            ("/mnt/a\\040b\\011\\134", "/mnt/a b\t\\"),
            ("/mnt/\\9", "/mnt/\\9"),
            ("/\\04", "/\\04"),
            ("/\\777", "/\\777"),
        ] {
            assert_eq!(unescaped(Path::new(told)), Path::new(is));
        }
    }

    #[test]
    fn a_release_file_is_read_as_a_shell_reads_it() {
        let text = "PRETTY_NAME=\"Debian \\\"12\\\"\"\n# NAME=none\nID=debian\nVERSION_ID='12\\'\n\
                    NAME=\nBUG_REPORT_URL=\"x\"\nnonsense\nVERSION=\"half\n";
        let fields = release(text);
        let expected = [
            ("id", "debian"),
            ("name", ""),
            ("pretty-name", "Debian \"12\""),
            ("version", "\"half"),
            ("version-id", "12\\"),
        ];
        let expected = expected.map(|(name, value)| (name, value.to_owned()));
        assert_eq!(fields, BTreeMap::from(expected));
    }
}
