//! Linux systems that run at the target of a move before all of their memory is there.

use super::own_disk::{reads_on, start};
use super::scripted::{NAME, Scripted};
use anyhow::{Context, Result};
use keel_api::{MoveRequest, Urgency};
use keel_machine::moves::{Ending, MoveReport};
use keel_testkit::{move_as, wait_for};

/// Moves the system, asked at node `a`; its memory comes after it.
async fn go_ahead(system: &Scripted, to: &str) -> Result<MoveReport> {
    let request = MoveRequest {
        to: to.to_owned(),
        post_copy: true,
        checkpoint_to: None,
        urgency: Urgency::Normal,
        downtime_ms: None,
    };
    move_as(&system.cluster.client("a"), NAME, &request).await
}

/// With its own disk, whose lines the system checks again and again.
#[tokio::test(flavor = "multi_thread")]
async fn memory_comes_after_a_system() -> Result<()> {
    let Some(system) = start(&["--restart", "always"]).await? else {
        return Ok(());
    };
    reads_on(&system).await?;
    let cluster = &system.cluster;
    // Until the commit a move that fails leaves the system where it is.
    for (name, order) in [
        ("source.converged", "error"),
        ("source.frozen", "error"),
        ("source.image", "error"),
        ("source.prepared", "error"),
        ("move.freeze", "error"),
    ] {
        cluster.failpoint("a", name, Some(order)).await?;
        let report = go_ahead(&system, "b").await?;
        let stayed = matches!(report.ending, Ending::Stayed { .. });
        assert!(stayed, "{name}: {}", report.line());
        cluster.failpoint("a", name, None).await?;
        reads_on(&system).await?;
    }
    // (How much follows depends on the link: the last part may be sent before the guest is stopped.)
    for to in ["b", "a", "b"] {
        let report = go_ahead(&system, to).await?;
        assert_eq!(report.ending, Ending::Moved, "{}", report.line());
        assert!(report.fill.is_some(), "{}", report.line());
        reads_on(&system).await?;
    }
    // All of it is there: nothing stands in the way of other moves.
    let report = cluster.move_machine("a", NAME, "a").await?;
    assert_eq!(report.ending, Ending::Moved, "{}", report.line());
    reads_on(&system).await?;

    // A source that is lost takes memory with it: the system boots again, visibly, with its disk.
    let epoch = cluster.inspect("a", NAME).await?.epoch;
    cluster
        .failpoint("a", "post-copy.serve", Some("kill"))
        .await?;
    let report = go_ahead(&system, "b").await?;
    assert_eq!(report.ending, Ending::Moved, "{}", report.line());
    cluster.failpoint("a", "post-copy.serve", None).await?;
    let runs = wait_for("it runs again", || async {
        let shown = cluster.inspect("a", NAME).await.ok()?;
        let runs = shown.status == "running" && shown.node == "b" && shown.epoch > epoch;
        runs.then_some(())
    });
    let runs = runs.await;
    let shown = cluster.inspect("a", NAME).await;
    runs.with_context(|| format!("{shown:?}, moved as {}", report.line()))?;
    reads_on(&system).await?;
    let output = system.output().await.context("its output")?;
    assert!(!output.contains("1 wrong"), "{output}");
    Ok(())
}
