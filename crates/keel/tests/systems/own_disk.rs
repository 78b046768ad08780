//! A system with a disk of its own, made from an image: what it writes moves along, and stays when
//! its process is lost.

use super::scripted::{NAME, Scripted};
use anyhow::{Context, Result};
use keel_machine::moves::Ending;
use keel_testkit::disk::SmallDisk;
use keel_testkit::wait_for;

/// A line in the image.
const MARK: &str = "of the image";
/// Writes numbered lines, each of which is on the disk when the next one begins, and reads all of
/// them again every now and then.
const SCRIPT: &str = r#"#!/bin/sh
exec </dev/ttyS0 >/dev/ttyS0 2>&1
lines() { dd if=/dev/vda bs=512 skip=4096 count=4096 2> /dev/null | tr -d '\000'; }
echo "begins with $(dd if=/dev/vda bs=512 skip=2048 count=1 2> /dev/null | tr -d '\000')"
n=$(lines | wc -l)
echo "found $n lines in $(cat /sys/block/vda/size) sectors"
while :; do
    n=$((n + 1))
    echo $n | dd of=/dev/vda bs=512 seek=$((4095 + n)) conv=notrunc,fsync 2> /dev/null
    if [ $((n % 25)) = 0 ]; then
        echo 3 > /proc/sys/vm/drop_caches
        lines | awk '$1 != NR { wrong++ } END { print "read " NR " lines, " wrong + 0 " wrong" }'
    fi
done
"#;
/// After so many lines the script reads them.
pub(super) const READ_EVERY: u64 = 25;
const DISK_MIB: u64 = 64;
const SECTORS: u64 = DISK_MIB << 11;

/// Runs the system with an image of half its disk.
pub(super) async fn start(options: &[&str]) -> Result<Option<Scripted>> {
    let Some(system) = Scripted::start().await? else {
        return Ok(None);
    };
    run(&system, options)?;
    Ok(Some(system))
}

/// As [`start`], in a cluster that is there.
pub(super) fn run(system: &Scripted, options: &[&str]) -> Result<()> {
    let mut image = vec![0; 32 << 20];
    image[510..512].copy_from_slice(b"\x55\xaa");
    image[1 << 20..][..MARK.len()].copy_from_slice(MARK.as_bytes());
    let image = system.write("image", &image)?;
    let size = format!("{DISK_MIB}M");
    let options = [&["--image", &image, "--disk-size", &size], options].concat();
    system.run(SCRIPT, &options)
}

/// The numbers of lines that the system has read so far; none was wrong.
pub(super) async fn read(system: &Scripted) -> Result<Vec<u64>> {
    let output = system.output().await.unwrap_or_default();
    let mut counts = Vec::new();
    // The last line may not be whole yet.
    let whole = output.rsplit_once('\n').map_or("", |(lines, _)| lines);
    for line in whole.lines() {
        if let Some(rest) = line.trim().strip_prefix("read ")
            && let Some((count, wrong)) = rest.split_once(" lines, ")
        {
            assert_eq!(wrong, "0 wrong", "{output}");
            counts.push(count.parse().context("a number")?);
        }
    }
    Ok(counts)
}

/// Waits until the system has read its lines twice more.
pub(super) async fn reads_on(system: &Scripted) -> Result<()> {
    let before = read(system).await?.len();
    let read = wait_for("it reads its disk", || async {
        let counts = read(system).await.ok()?;
        counts.get(before + 1).copied()
    });
    read.await.map(drop)
}

/// Waits until the system has booted again, and has found so many lines.
async fn finds(system: &Scripted, lines: u64) -> Result<()> {
    let found = wait_for("another boot", || async {
        let output = system.output().await?;
        let last = output.rsplit_once("found ")?.1;
        let (found, _) = last.split_once(" lines")?;
        (output.matches("found ").count() == 2).then(|| found.parse::<u64>().ok())?
    });
    let found = found.await?;
    assert!(found >= lines, "{found} of {lines}");
    Ok(())
}

pub(super) async fn says(system: &Scripted, what: &str) -> Result<()> {
    let said = wait_for(what, || async {
        system.output().await?.contains(what).then_some(())
    });
    said.await.with_context(|| what.to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_own_disk_of_a_system_moves_along() -> Result<()> {
    let Some(system) = start(&[]).await? else {
        return Ok(());
    };
    says(&system, &format!("begins with {MARK}")).await?;
    says(&system, &format!("found 0 lines in {SECTORS} sectors")).await?;
    reads_on(&system).await?;
    let cluster = &system.cluster;
    // Moves that fail once the disk is copied, before and after the system stands still.
    for (name, order) in [
        ("source.round", "error@2"),
        ("source.converged", "error"),
        ("source.image", "error"),
        ("source.prepared", "error"),
    ] {
        cluster.failpoint("a", name, Some(order)).await?;
        let report = cluster.move_machine("a", NAME, "b").await?;
        assert!(
            matches!(report.ending, Ending::Stayed { .. }),
            "{}",
            report.line()
        );
        cluster.failpoint("a", name, None).await?;
        reads_on(&system).await?;
    }
    for to in ["b", "a"] {
        let report = cluster.move_machine("a", NAME, to).await?;
        assert_eq!(report.ending, Ending::Moved, "{}", report.line());
        reads_on(&system).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_own_disk_of_a_system_stays_when_its_process_is_lost() -> Result<()> {
    let Some(system) = start(&["--restart", "always"]).await? else {
        return Ok(());
    };
    reads_on(&system).await?;
    system.cluster.kill_worker("a", NAME)?;
    // What it had read before was on the disk.
    let before = wait_for("its output", || async {
        read(&system).await.ok()?.last().copied()
    });
    let before = before.await?;
    finds(&system, before).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_own_disk_of_a_system_is_there_when_it_is_started_again() -> Result<()> {
    let Some(system) = start(&["--shutdown", "1s"]).await? else {
        return Ok(());
    };
    reads_on(&system).await?;
    let ended = system.keel("b", &["stop", NAME]).output()?;
    assert!(ended.status.success(), "{ended:?}");
    let before = read(&system).await?.last().copied();
    let before = before.context("it has read nothing")?;
    let again = system.keel("b", &["start", NAME]).output()?;
    assert!(again.status.success(), "{again:?}");
    finds(&system, before).await?;
    reads_on(&system).await?;

    // A node that has no room for it is not sent anything.
    let small = match SmallDisk::mount(&system.cluster.folder("b").join("workers"), 512) {
        Ok(small) => small,
        Err(error) => {
            eprintln!("skipped: {error:#}");
            return Ok(());
        }
    };
    small.fill()?;
    let report = system.cluster.move_machine("a", NAME, "b").await?;
    let Ending::Stayed { reason } = &report.ending else {
        anyhow::bail!("there was no room: {}", report.line());
    };
    assert!(
        reason.contains("b refuses it") && reason.contains("its own disk need"),
        "{reason}"
    );
    small.free()?;
    let report = system.cluster.move_machine("a", NAME, "b").await?;
    assert_eq!(report.ending, Ending::Moved, "{}", report.line());
    reads_on(&system).await
}
