//! Some nodes, and a Linux system that is told by cloud-init's disk which script to run.

use anyhow::{Context, Result, ensure};
use keel_testkit::LocalCluster;
use keel_testkit::bare_system::qemu_is_installed;
use keel_testkit::linux_system::LinuxSystem;
use std::path::Path;
use std::process::Command;

const KEEL: &str = env!("CARGO_BIN_EXE_keel");
/// The system's machine.
pub(crate) const NAME: &str = "web";

async fn start_two(folder: &Path) -> Result<LocalCluster> {
    LocalCluster::start(Path::new(KEEL), folder, &["a", "b"]).await
}

pub(crate) struct Scripted {
    pub(crate) cluster: LocalCluster,
    linux: LinuxSystem,
    folder: tempfile::TempDir,
}

impl Scripted {
    /// Nodes `a` and `b`; none, with the reason, where no system can run.
    pub(crate) async fn start() -> Result<Option<Self>> {
        Self::start_with(|_, _| Ok(true), start_two).await
    }

    /// As [`Self::start`], with a guest agent in the system.
    pub(crate) async fn start_with_agent() -> Result<Option<Self>> {
        Self::start_with(LinuxSystem::add_guest_agent, start_two).await
    }

    /// Nodes `a`, `b` and `c`, all with copies of the store.
    pub(crate) async fn start_replicated() -> Result<Option<Self>> {
        let start = async |folder: &Path| {
            let names = ["a", "b", "c"];
            LocalCluster::start_to_be_broken(Path::new(KEEL), folder, &names, None, None).await
        };
        Self::start_with(|_, _| Ok(true), start).await
    }

    async fn start_with(
        add: impl FnOnce(&mut LinuxSystem, &Path) -> Result<bool>,
        start: impl AsyncFnOnce(&Path) -> Result<LocalCluster>,
    ) -> Result<Option<Self>> {
        if !qemu_is_installed() {
            return Ok(None);
        }
        let folder = tempfile::Builder::new().prefix("keel-").tempdir()?;
        let Some(mut linux) = LinuxSystem::make(folder.path())? else {
            return Ok(None);
        };
        if !add(&mut linux, folder.path())? {
            return Ok(None);
        }
        let cluster = start(folder.path()).await?;
        Ok(Some(Scripted {
            cluster,
            linux,
            folder,
        }))
    }

    /// Writes a file; returns its path.
    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> Result<String> {
        let path = self.path(name)?;
        std::fs::write(&path, bytes)?;
        Ok(path)
    }

    /// A path in a folder that both nodes see.
    pub(crate) fn path(&self, name: &str) -> Result<String> {
        let path = self.folder.path().join(name);
        Ok(path.to_str().context("a path of UTF-8")?.to_owned())
    }

    /// Runs the system at `a` as a user does, with more options.
    pub(crate) fn run(&self, script: &str, options: &[&str]) -> Result<()> {
        let memory: &[&str] = match options.contains(&"--memory") {
            true => &[],
            false => &["--memory", "128M"],
        };
        let started = Command::new(KEEL)
            .args(["run", "--detach", "--name", NAME])
            .args(memory)
            .args(["--kind", "qemu"])
            .args(["--append", &LinuxSystem::append("", "")])
            .args(["--kernel", &self.write("vmlinuz", &self.linux.kernel)?])
            .args(["--initrd", &self.write("initrd.gz", &self.linux.initrd)?])
            .args(["--user-data", &self.write("script", script.as_bytes())?])
            .args(options)
            .arg("--state-dir")
            .arg(self.cluster.folder("a"))
            .output()?;
        let said = String::from_utf8_lossy(&started.stderr);
        ensure!(started.status.success(), "{said}");
        Ok(())
    }

    /// What `keel` says on both outputs, and how it ended; asked at the node `via`.
    pub(crate) fn keel(&self, via: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(KEEL);
        command.arg("--state-dir").arg(self.cluster.folder(via));
        command.args(arguments);
        command
    }

    pub(crate) async fn output(&self) -> Option<String> {
        self.cluster.output("a", NAME).await.ok()
    }
}
