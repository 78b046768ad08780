//! Memory that systems give back to their nodes: what they have freed, and what they keep for files
//! when their node runs out of it.

use super::scripted::{NAME, Scripted};
use anyhow::{Context, Result};
use keel_machine::moves::Ending;
use keel_testkit::wait_for;
use std::sync::atomic::{AtomicU64, Ordering};

/// What the system has: Linux does not say what is free of the last 64 MiB.
const MEMORY: &str = "384M";
/// What it reads of its disk, and so keeps in memory: far more than the eighth that it is left.
const DISK_MIB: u64 = 128;
/// What it frees.
const FREED_MIB: u64 = 80;

fn script() -> String {
    let bytes = FREED_MIB << 20;
    format!(
        "#!/bin/sh
exec </dev/ttyS0 >/dev/ttyS0 2>&1
head -c {bytes} /dev/zero > /big
sleep 2
rm /big
echo freed
sleep 6
# Linux forgets what it has read of a disk that nobody has open.
exec 3< /dev/vda
while :; do
    dd if=/dev/vda of=/dev/null bs=64k 2> /dev/null
    echo read
    sleep 1
done
"
    )
}

/// Occupies memory until four fifths of this computer's are available.
fn occupy_some() -> Result<Vec<u8>> {
    let figures = std::fs::read_to_string("/proc/meminfo")?;
    let bytes = |name: &str| -> Option<u64> {
        let line = figures.lines().find(|line| line.starts_with(name))?;
        let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
        Some(kib << 10)
    };
    let total = bytes("MemTotal:").context("its memory")?;
    let available = bytes("MemAvailable:").context("what is available of it")?;
    let occupied = usize::try_from(available.saturating_sub(total / 5 * 4))?;
    Ok(vec![1; occupied])
}

/// What it has given back as it was asked to, in MiB; none while that is not known.
async fn given_back(system: &Scripted) -> Option<u64> {
    let shown = system.cluster.inspect("a", NAME).await.ok()?;
    shown.memory_available_bytes?;
    shown.memory_given_back_bytes.map(|bytes| bytes >> 20)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_system_gives_memory_back_to_its_node() -> Result<()> {
    let Some(system) = Scripted::start().await? else {
        return Ok(());
    };
    let disk = system.write("disk", &vec![1; (DISK_MIB as usize) << 20])?;
    let disk = format!("{disk},format=raw");
    let options = ["--memory", MEMORY, "--disk", &disk, "--balance", "off"];
    system.run(&script(), &options)?;
    let cluster = &system.cluster;
    let most = AtomicU64::new(0);
    let freed = wait_for("it frees memory", || async {
        let shown = cluster.inspect("a", NAME).await.ok()?;
        most.fetch_max(shown.memory_bytes.unwrap_or_default(), Ordering::Relaxed);
        system.output().await?.contains("freed").then_some(())
    });
    freed.await?;
    let most = most.into_inner();
    // Linux tells what is free after 2 s; a while later the system fills its cache.
    let least = most - ((FREED_MIB / 2) << 20);
    let returned = wait_for("its node has that again", || async {
        let shown = cluster.inspect("a", NAME).await.ok()?;
        (shown.memory_bytes? <= least).then_some(())
    });
    returned.await?;
    let caches = wait_for("it has read its disk", || async {
        let read = system.output().await?.contains("read");
        (read && given_back(&system).await == Some(0)).then_some(())
    });
    caches.await?;
    let resident = async || {
        let shown = cluster.inspect("a", NAME).await.ok()?;
        Some(shown.memory_bytes? >> 20)
    };
    let before = resident().await.context("its memory")?;

    let occupied = occupy_some()?;
    cluster.set_policy("memory_headroom", "0.9").await?;
    cluster.set_policy("mode", "automatic").await?;
    let gives = wait_for("it gives back what it keeps for its disk", || async {
        given_back(&system).await.filter(|mib| *mib >= 16)
    });
    gives.await?;
    let has = wait_for("its node has that", || async {
        resident().await.filter(|now| now + 32 <= before)
    });
    has.await?;
    let report = cluster.move_machine("a", NAME, "b").await?;
    assert_eq!(report.ending, Ending::Moved, "{}", report.line());
    let still = wait_for("it gives it back there too", || async {
        given_back(&system).await.filter(|mib| *mib >= 16)
    });
    still.await?;
    let shown = system.keel("a", &["describe", NAME]).output()?;
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(shown.contains("given back to its node"), "{shown}");

    drop(occupied);
    cluster.set_policy("memory_headroom", "0.01").await?;
    let again = wait_for("it has its memory again", || async {
        given_back(&system).await.filter(|mib| *mib == 0)
    });
    again.await?;
    let before = system.output().await.context("its output")?;
    let reads = wait_for("it reads on", || async {
        let output = system.output().await?;
        (output.matches("read").count() > before.matches("read").count()).then_some(())
    });
    reads.await
}
