//! Linux systems with high availability: their node fails, and they begin anew on another one that
//! has their disks and images, in the same network, and never on two at once.

use super::systems::Systems;
use anyhow::{Context, Result};
use keel_kind_qemu::{Disk, DiskFormat, QemuSpec};
use keel_machine::high_availability::{Fence, HighAvailability};
use keel_testkit::wait_for;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

const NODES: [&str; 3] = ["a", "b", "c"];
const ADDRESS: &str = "10.214.0.101";

fn fenced() -> Option<HighAvailability> {
    Some(HighAvailability {
        fence: Fence::Timer,
        ..HighAvailability::default()
    })
}

/// A system with a disk that all nodes see.
async fn with_disk(systems: &Systems) -> Result<(QemuSpec, PathBuf)> {
    let folder = systems.folder.path().join("shared");
    std::fs::create_dir(&folder)?;
    let disk = folder.join("disk.raw");
    std::fs::write(&disk, vec![0; 1 << 20])?;
    let mut spec = systems.spec(ADDRESS, "").await?;
    spec.disks = vec![Disk {
        path: disk.display().to_string(),
        format: DiskFormat::Raw,
        read_only: false,
    }];
    Ok((spec, folder))
}

/// Processes of QEMU on all nodes.
fn qemus(systems: &Systems) -> usize {
    let folder = systems.folder.path().canonicalize();
    let folder = folder.expect("the folder of the cluster");
    let processes = std::fs::read_dir("/proc").expect("processes").flatten();
    let here = processes.map(|entry| entry.path()).filter(|process| {
        let name = std::fs::read_to_string(process.join("comm")).unwrap_or_default();
        let place = std::fs::read_link(process.join("cwd")).unwrap_or_default();
        name.starts_with("qemu") && place.starts_with(&folder)
    });
    here.count()
}

async fn known_by_all(systems: &Systems) -> Result<()> {
    let known = wait_for("all nodes can run it", || async {
        let machine = systems.cluster.inspect("a", "s").await.ok()?;
        (machine.in_sync == NODES).then_some(())
    });
    known.await
}

/// Waits until the machine answers after a failure of `failed`, whose copy of it cannot, and says how
/// long that took.
async fn answers_elsewhere(systems: &Systems, failed: &str, since: Instant) -> Result<()> {
    systems.wait_answer(ADDRESS).await?;
    println!("{failed} failed: it answers after {:?}", since.elapsed());
    let via = if failed == "a" { "b" } else { "a" };
    let moved = wait_for("it runs elsewhere", || async {
        let machine = systems.cluster.inspect(via, "s").await.ok()?;
        (machine.node != failed && machine.status == "running").then_some(())
    });
    moved.await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_system_goes_on_elsewhere_when_its_node_fails() -> Result<()> {
    let Some(mut systems) = Systems::start_replicated(&NODES).await? else {
        return Ok(());
    };
    let (spec, _) = with_disk(&systems).await?;
    systems.run_with("s", "c", spec, fenced()).await?;
    systems.wait_answer(ADDRESS).await?;
    known_by_all(&systems).await?;
    systems.cluster.power_off("c");
    answers_elsewhere(&systems, "c", Instant::now()).await?;
    let said = systems.cluster.error_output("a", "s").await?;
    assert!(said.contains("it boots again"), "{said}");
    systems.cluster.power_on("c").await?;
    systems.cluster.wait_alive("c").await?;
    systems.wait_answer(ADDRESS).await?;
    assert_eq!(qemus(&systems), 1);
    // Back to a node that has just returned.
    known_by_all(&systems).await?;
    let report = systems.cluster.move_machine("a", "s", "c").await?;
    assert_eq!(report.target, "c", "{}", report.line());
    systems.wait_answer(ADDRESS).await
}

/// The kernel's timer ends it there, and with it the lock of its disk.
#[tokio::test(flavor = "multi_thread")]
async fn a_system_whose_node_is_cut_off_runs_on_one_node() -> Result<()> {
    let Some(systems) = Systems::start_replicated(&NODES).await? else {
        return Ok(());
    };
    let (spec, _) = with_disk(&systems).await?;
    systems.run_with("s", "c", spec, fenced()).await?;
    systems.wait_answer(ADDRESS).await?;
    known_by_all(&systems).await?;
    systems.network()?.cut("c", true)?;
    answers_elsewhere(&systems, "c", Instant::now()).await?;
    assert_eq!(qemus(&systems), 1);
    systems.network()?.cut("c", false)?;
    systems.cluster.wait_alive("c").await?;
    systems.wait_answer(ADDRESS).await?;
    assert_eq!(qemus(&systems), 1);
    Ok(())
}

/// Without a disk that others see, or with nothing that keeps a node apart, it is refused.
#[tokio::test(flavor = "multi_thread")]
async fn high_availability_that_cannot_be_is_refused_when_it_is_asked_for() -> Result<()> {
    let Some(systems) = Systems::start(&["a", "b"], &["a", "b"]).await? else {
        return Ok(());
    };
    let refused = async |spec: &QemuSpec, ha: HighAvailability| {
        let said = systems.run_with("s", "b", spec.clone(), Some(ha)).await;
        format!("{:#}", said.expect_err("a refusal"))
    };
    let (mut spec, folder) = with_disk(&systems).await?;
    let said = refused(&spec, HighAvailability::default()).await;
    assert!(
        said.contains("fence") && said.contains("disk.raw"),
        "{said}"
    );
    let fence = Fence::Timer;
    let every = HighAvailability {
        checkpoint_every_ms: 1000,
        fence,
        ..HighAvailability::default()
    };
    let said = refused(&spec, every).await;
    assert!(said.contains("ha: checkpoint"), "{said}");
    let ha = fenced().context("high availability")?;
    // Node a has another directory there.
    shadow(&systems, "a", &folder)?;
    let said = refused(&spec, ha.clone()).await;
    assert!(said.contains("a: ") && said.contains("not there"), "{said}");
    spec.disks.clear();
    let said = refused(&spec, HighAvailability::default()).await;
    assert!(said.contains("the network of lan"), "{said}");
    systems.run_with("s", "b", spec, Some(ha)).await?;
    systems.wait_answer(ADDRESS).await
}

/// Hides a directory from the processes of a node, which have mounts of their own.
fn shadow(systems: &Systems, node: &str, folder: &Path) -> Result<()> {
    let agent = systems.cluster.agent_pid(node)?.to_string();
    let done = Command::new("nsenter")
        .args([
            "--target", &agent, "--mount", "mount", "-t", "tmpfs", "none",
        ])
        .arg(folder)
        .status()?;
    anyhow::ensure!(done.success(), "nsenter: {done}");
    Ok(())
}
