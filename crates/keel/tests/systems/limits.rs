//! The CPU time of a system is limited, wherever it runs.

use super::scripted::{NAME, Scripted};
use anyhow::{Result, ensure};
use keel_machine::cgroup::lacks_for_cpu_limits;
use keel_machine::moves::Ending;
use keel_testkit::wait_for;

/// Keeps its processor busy.
const SCRIPT: &str = "#!/bin/sh\nwhile :; do :; done\n";

/// Waits until it was held back for longer than `before`, in microseconds; returns for how long.
async fn held_back(system: &Scripted, before: u64) -> Result<u64> {
    wait_for("it is held back", || async {
        let info = system.cluster.inspect("a", NAME).await.ok()?;
        let micros = info.cgroup?.throttled_micros?;
        (micros > before).then_some(micros)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_system_is_held_back_wherever_it_runs() -> Result<()> {
    if let Some(lacking) = lacks_for_cpu_limits() {
        eprintln!("skipped: this computer lacks {lacking}");
        return Ok(());
    }
    let Some(system) = Scripted::start().await? else {
        return Ok(());
    };
    system.run(SCRIPT, &["--cpu-limit", "0.5"])?;
    held_back(&system, 0).await?;
    let report = system.cluster.move_machine("a", NAME, "b").await?;
    assert_eq!(report.ending, Ending::Moved, "{}", report.line());
    // Of its new group.
    held_back(&system, 0).await?;
    let set = async |cores: &str| {
        let said = system.keel("a", &["set", NAME, "--cpu", cores]).output()?;
        ensure!(said.status.success(), "{said:?}");
        let info = system.cluster.inspect("a", NAME).await?;
        let micros = info.cgroup.and_then(|group| group.throttled_micros);
        anyhow::Ok((info.cpu_limit_millis, micros.unwrap_or(0)))
    };
    let (limit, before) = set("0.25").await?;
    assert_eq!(limit, Some(250));
    held_back(&system, before).await?;
    let (limit, _) = set("none").await?;
    assert_eq!(limit, None);
    Ok(())
}
