//! A Linux kernel and BusyBox for tests of whole systems: packages of Debian, unpacked into the
//! folder of builds and not installed. Where there are none, those tests say that they are skipped.

use crate::command::{check, has, root};
use anyhow::{Context, Result, ensure};
use std::path::Path;
use std::process::Command;

/// The package that depends on the newest small kernel for virtual machines.
const KERNEL: &str = "linux-image-cloud-amd64";
const BUSYBOX: &str = "busybox-static";

/// Unpacks them unless they are there.
pub(crate) fn provide() {
    let folder = root().join("target/linux");
    if folder.is_dir() {
        return;
    }
    let unpacked = match has("apt-get") && has("dpkg-deb") {
        true => unpack(&folder),
        false => Err(anyhow::anyhow!("no apt-get here")),
    };
    if let Err(error) = unpacked {
        println!("tests with a Linux system will be skipped: {error:#}");
    }
}

fn unpack(folder: &Path) -> Result<()> {
    let parent = folder.parent().context("the folder of builds")?;
    std::fs::create_dir_all(parent)?;
    let fresh = tempfile::tempdir_in(parent)?;
    let (packages, unpacked) = (fresh.path().join("packages"), fresh.path().join("linux"));
    std::fs::create_dir(&packages)?;
    let kernel = dependency(KERNEL)?;
    let mut download = Command::new("apt-get");
    download.args(["download", &kernel, BUSYBOX]);
    check(download.current_dir(&packages))?;
    for package in std::fs::read_dir(&packages)? {
        let mut unpack = Command::new("dpkg-deb");
        unpack.arg("--extract").arg(package?.path()).arg(&unpacked);
        check(&mut unpack)?;
    }
    // At once, so that a folder that is there is whole.
    Ok(std::fs::rename(unpacked, folder)?)
}

/// The kernel itself, whose name has its version.
fn dependency(package: &str) -> Result<String> {
    let output = Command::new("apt-cache")
        .args(["depends", "--important", package])
        .output()
        .context("apt-cache")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let found = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("Depends: linux-image-"));
    ensure!(
        found.is_some(),
        "apt does not know {package} (apt-get update)"
    );
    Ok(format!("linux-image-{}", found.unwrap_or_default()))
}
