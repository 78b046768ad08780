//! A system whose disk has no room waits for it, and its program notices a delay at most.

use super::scripted::{NAME, Scripted};
use anyhow::{Context, Result};
use keel_api::MachineInfo;
use keel_machine::moves::Ending;
use keel_testkit::disk::SmallDisk;
use keel_testkit::wait_for;

const SCRIPT: &str = "#!/bin/sh
dd if=/dev/zero of=/dev/vda bs=64k count=64 conv=fsync 2> /dev/null && echo written || echo lost
";

/// Also while it moves: what was to be written goes along.
#[tokio::test(flavor = "multi_thread")]
async fn a_system_waits_for_room_on_its_disk() -> Result<()> {
    let folder = tempfile::Builder::new().prefix("keel-").tempdir()?;
    let small = match SmallDisk::mount(&folder.path().join("small"), 16) {
        Ok(small) => small,
        Err(error) => {
            eprintln!("skipped: {error:#}");
            return Ok(());
        }
    };
    let Some(system) = Scripted::start().await? else {
        return Ok(());
    };
    let path = folder.path().join("small/disk.raw");
    std::fs::File::create(&path)?.set_len(64 << 20)?;
    small.fill()?;
    let disk = path.to_str().context("a path of UTF-8")?;
    system.run(SCRIPT, &["--disk", disk])?;
    let cluster = &system.cluster;
    let waits_at = async |node: &str| {
        let waits = wait_for("it waits for room", || async {
            let shown = cluster.inspect("a", NAME).await.ok()?;
            let MachineInfo {
                status, message, ..
            } = &shown;
            let says = message.as_deref().is_some_and(|it| it.contains(disk));
            (status == "paused" && shown.node == node && says).then_some(())
        });
        waits.await
    };
    waits_at("a").await?;
    let report = cluster.move_machine("a", NAME, "b").await?;
    assert_eq!(report.ending, Ending::Moved, "{}", report.line());
    waits_at("b").await?;
    let output = system.output().await.context("its output")?;
    assert!(!output.contains("written"), "{output}");
    small.free()?;
    let output = wait_for("it goes on", || async {
        let output = system.output().await?;
        let shown = cluster.inspect("a", NAME).await.ok()?;
        let done = output.contains("written") || output.contains("lost");
        (done && shown.status == "running").then_some(output)
    });
    let output = output.await?;
    assert!(!output.contains("lost"), "{output}");
    Ok(())
}
