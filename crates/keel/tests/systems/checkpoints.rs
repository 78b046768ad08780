//! Systems that go on from a checkpoint, with their memory and their own disk of one moment.

use super::own_disk::{self, READ_EVERY, read, reads_on, start};
use super::scripted::{NAME, Scripted};
use anyhow::{Context, Result, ensure};
use keel_api::{CheckpointInfo, CheckpointRequest};
use keel_machine::moves::Ending;
use keel_testkit::disk::SmallDisk;
use keel_testkit::wait_for;
use std::ops::RangeInclusive;
use std::process::Output;
use std::time::Instant;

/// Where checkpoints are.
const PLACE: &str = "checkpoints";

async fn checkpoint(system: &Scripted) -> Result<CheckpointInfo> {
    let request = CheckpointRequest {
        to: Some(system.path(PLACE)?),
        ..CheckpointRequest::default()
    };
    let path = format!("/v1/machines/{NAME}/checkpoints");
    let made = system.cluster.client("b").post(&path, &request).await;
    made.context("a checkpoint")
}

/// A checkpoint, with the counts of which the system may read the next one after it.
async fn checkpoint_among_reads(
    system: &Scripted,
) -> Result<(CheckpointInfo, RangeInclusive<u64>)> {
    let last = async || read(system).await?.last().copied().context("no reads");
    let before = last().await?;
    let made = checkpoint(system).await?;
    Ok((made, before + READ_EVERY..=last().await? + READ_EVERY))
}

/// What `keel` says if it fails.
fn refused(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{said}");
    said
}

/// Waits for a notice beside its output.
async fn notes(system: &Scripted, what: &str) -> Result<()> {
    let noted = wait_for(what, || async {
        let notices = system.cluster.error_output("a", NAME).await.ok()?;
        notices.contains(what).then_some(())
    });
    noted.await
}

/// Restores the system at a node, with these options.
fn restore(system: &Scripted, node: &str, options: &[&str]) -> Result<()> {
    let place = system.path(PLACE)?;
    let arguments = ["restore", NAME, "--detach", "--from", &place, "--on", node];
    let restored = system
        .keel(node, &[&arguments, options].concat())
        .output()?;
    let said = String::from_utf8_lossy(&restored.stderr);
    ensure!(restored.status.success(), "{said}");
    Ok(())
}

/// Nothing of what it started from is left on the nodes.
fn forget_images(system: &Scripted) -> Result<()> {
    for node in ["a", "b"] {
        for image in std::fs::read_dir(system.cluster.folder(node).join("images"))? {
            std::fs::remove_file(image?.path())?;
        }
    }
    Ok(())
}

/// Ends the system for good.
async fn remove(system: &Scripted) -> Result<()> {
    let removed = system.keel("a", &["rm", "--force", NAME]).output()?;
    ensure!(removed.status.success(), "{removed:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_system_goes_on_from_its_checkpoint_with_its_disk() -> Result<()> {
    let Some(system) = start(&["--restart", "always", "--shutdown", "1s"]).await? else {
        return Ok(());
    };
    reads_on(&system).await?;
    let cluster = &system.cluster;
    // Whatever fails, the system runs on, and the next one is made.
    for name in ["checkpoint.worker.frozen", "checkpoint.worker.packs"] {
        cluster.failpoint("a", name, Some("error")).await?;
        let failed = checkpoint(&system).await;
        assert!(failed.is_err(), "{name}: {failed:?}");
        cluster.failpoint("a", name, None).await?;
        reads_on(&system).await?;
    }
    let (full, of_full) = checkpoint_among_reads(&system).await?;
    reads_on(&system).await?;
    let second = checkpoint(&system).await?;
    assert_eq!(second.parent.as_ref(), Some(&full.id));
    assert!(
        second.stored_bytes < full.stored_bytes,
        "{full:?} {second:?}"
    );
    let report = cluster.move_machine("a", NAME, "b").await?;
    assert_eq!(report.ending, Ending::Moved, "{}", report.line());
    reads_on(&system).await?;
    assert_eq!(checkpoint(&system).await?.parent, None);
    reads_on(&system).await?;
    // A move that fails takes what was known of the disk with it.
    cluster
        .failpoint("b", "source.converged", Some("error"))
        .await?;
    let report = cluster.move_machine("a", NAME, "a").await?;
    assert_ne!(report.ending, Ending::Moved, "{}", report.line());
    cluster.failpoint("b", "source.converged", None).await?;
    reads_on(&system).await?;
    assert_eq!(checkpoint(&system).await?.parent, None);
    reads_on(&system).await?;
    let (last, of_last) = checkpoint_among_reads(&system).await?;
    assert!(last.parent.is_some());
    reads_on(&system).await?;
    remove(&system).await?;

    for (node, id, reads) in [("a", &last.id, of_last), ("b", &full.id, of_full)] {
        // The repository alone brings it back.
        forget_images(&system)?;
        restore(&system, node, &["--id", id])?;
        notes(&system, &format!("restored from checkpoint {id}")).await?;
        reads_on(&system).await?;
        // It goes on from there: each line is on the disk that the system knows of.
        let first = read(&system).await?.first().copied();
        let first = first.context("it has read nothing")?;
        assert!(reads.contains(&first), "{first} of {reads:?}");
        if node == "a" {
            remove(&system).await?;
        }
    }
    // Lost, it boots with the disk as it is, not with that of the checkpoint.
    let before = read(&system).await?.last().copied();
    cluster.kill_worker("b", NAME)?;
    boots_with(&system, before).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_gives_a_checkpoint_up_and_a_damaged_one_is_passed_over() -> Result<()> {
    let Some(system) = start(&["--shutdown", "1s"]).await? else {
        return Ok(());
    };
    reads_on(&system).await?;
    let cluster = &system.cluster;
    let first = checkpoint(&system).await?;
    let slow = "delay(3000)";
    cluster
        .failpoint("a", "checkpoint.worker.round", Some(slow))
        .await?;
    let (given_up, moved) = tokio::join!(checkpoint(&system), async {
        let passes = wait_for("the checkpoint begins", || async {
            let passed = cluster.failpoints_passed("a");
            passed.iter().any(|it| it.contains("round")).then_some(())
        });
        passes.await?;
        cluster.move_machine("a", NAME, "b").await
    });
    let given_up = format!("{:#}", given_up.err().context("it was made")?);
    assert!(given_up.contains("given up"), "{given_up}");
    let moved = moved?;
    assert_eq!(moved.ending, Ending::Moved, "{}", moved.line());
    reads_on(&system).await?;
    let second = checkpoint(&system).await?;
    remove(&system).await?;

    let place = std::path::PathBuf::from(system.path(PLACE)?);
    let machine = place.join("machines").join(NAME);
    for pack in std::fs::read_dir(&machine)? {
        let path = pack?.path();
        let name = path.file_name().and_then(|it| it.to_str());
        let is_block = name.is_some_and(|it| it.starts_with(&second.id) && it.contains(".v"));
        if is_block {
            let mut bytes = std::fs::read(&path)?;
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            std::fs::write(&path, bytes)?;
        }
    }
    restore(&system, "b", &[])?;
    notes(&system, "passed over").await?;
    notes(&system, &format!("restored from checkpoint {}", first.id)).await?;
    reads_on(&system).await
}

/// Its own disk is lost with its node; another node has its checkpoint.
#[tokio::test(flavor = "multi_thread")]
async fn a_system_with_its_own_disk_goes_on_elsewhere_when_its_node_fails() -> Result<()> {
    let Some(mut system) = Scripted::start_replicated().await? else {
        return Ok(());
    };
    let protected = own_disk::run(&system, &["--ha=protect=output"]);
    let said = protected.err().context("it runs")?.to_string();
    assert!(said.contains("ha: protect"), "{said}");
    own_disk::run(&system, &["--on", "c", "--ha=checkpoint=1s"])?;
    reads_on(&system).await?;
    is_elsewhere_too(&system, "c").await?;
    reads_on(&system).await?;
    let before = read(&system).await?.last().copied();
    system.cluster.power_off("c");
    let failed = Instant::now();
    notes(&system, "restored from checkpoint").await?;
    println!("c failed: it goes on after {:?}", failed.elapsed());
    // What it had done since that checkpoint it does again.
    let goes_on = wait_for("it goes on", || async {
        let counts = read(&system).await.ok()?;
        (counts.last().copied() > before).then_some(())
    });
    goes_on.await?;
    // Back to the node that has the disk of before.
    system.cluster.power_on("c").await?;
    system.cluster.wait_alive("c").await?;
    let report = system.cluster.move_machine("a", NAME, "c").await?;
    assert_eq!(report.ending, Ending::Moved, "{}", report.line());
    reads_on(&system).await?;
    // Lost with its process alone, it has its disk.
    let before = read(&system).await?.last().copied();
    system.cluster.kill_worker("c", NAME)?;
    boots_with(&system, before).await
}

/// Waits until a node other than that of the system has its checkpoint.
async fn is_elsewhere_too(system: &Scripted, node: &str) -> Result<()> {
    let known = wait_for("another node has its checkpoint", || async {
        let machine = system.cluster.inspect("a", NAME).await.ok()?;
        machine.in_sync.iter().any(|it| it != node).then_some(())
    });
    known.await
}

/// Waits until it has booted again, and has found at least so many lines on its disk.
async fn boots_with(system: &Scripted, lines: Option<u64>) -> Result<()> {
    notes(system, "it boots again").await?;
    let lines = lines.context("it has read nothing")?;
    let found = wait_for("another boot with its disk", || async {
        let output = system.output().await?;
        let (found, _) = output.rsplit_once("found ")?.1.split_once(" lines")?;
        (found.parse::<u64>().ok()? >= lines).then_some(())
    });
    found.await?;
    reads_on(system).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_checkpoint_of_a_system_cannot_be_is_refused() -> Result<()> {
    let Some(system) = Scripted::start().await? else {
        return Ok(());
    };
    let disk = system.write("disk", &[0; 1 << 20])?;
    let raw = format!("{disk},format=raw");
    let shared = ["--disk", &raw, "--checkpoint-every", "10s"];
    let error = system
        .run("", &shared)
        .err()
        .context("it runs")?
        .to_string();
    assert!(error.contains("checkpoint-every: disk"), "{error}");
    system.run("", &["--disk", &raw])?;
    let made = system.keel("a", &["checkpoint", NAME]).output()?;
    let said = refused(&made);
    assert!(
        said.contains("does not belong to the machine alone"),
        "{said}"
    );
    remove(&system).await?;

    // Without an address, so that a clone may run beside it.
    system.run("", &["--shutdown", "1s"])?;
    let counts = wait_for("it counts", || async {
        let output = system.output().await?;
        output.lines().any(|it| it.trim() == "9").then_some(())
    });
    counts.await?;
    checkpoint(&system).await?;
    let place = system.path(PLACE)?;
    let warm = ["restore", NAME, "--as", "w", "--from", &place, "--warm"];
    let said = refused(&system.keel("a", &warm).output()?);
    assert!(said.contains("does not start warm"), "{said}");
    let clone = [
        "restore", NAME, "--as", "clone", "--from", &place, "--detach",
    ];
    let cloned = system.keel("a", &clone).output()?;
    ensure!(cloned.status.success(), "{cloned:?}");
    let counts = wait_for("the clone counts on", || async {
        let output = system.cluster.output("a", "clone").await.ok()?;
        (output.lines().count() > 3).then_some(())
    });
    counts.await?;

    // A node that has no room for its memory makes none, and the system runs on there.
    let _small = match SmallDisk::mount(&system.cluster.folder("b").join("workers"), 300) {
        Ok(small) => small,
        Err(error) => {
            eprintln!("skipped: {error:#}");
            return Ok(());
        }
    };
    let report = system.cluster.move_machine("a", NAME, "b").await?;
    assert_eq!(report.ending, Ending::Moved, "{}", report.line());
    let said = refused(&system.keel("a", &["checkpoint", NAME]).output()?);
    assert!(said.contains("no room for a copy"), "{said}");
    let before = system.output().await.context("its output")?;
    let counts = wait_for("it counts on", || async {
        let output = system.output().await?;
        (output.len() > before.len() + 100).then_some(())
    });
    counts.await
}
