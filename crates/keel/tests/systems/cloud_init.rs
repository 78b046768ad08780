//! A system finds what cloud-init reads, wherever it runs.

use super::scripted::{NAME, Scripted};
use anyhow::{Context, Result};
use keel_machine::moves::Ending;
use keel_testkit::wait_for;

/// Says what the machine is told, then reads it again and again, each time from the disk itself.
const SCRIPT: &str = r#"#!/bin/sh
cd /cloud-init
echo "told: $(cat meta-data network-config | tr -d ' \n')"
while :; do
    echo 3 > /proc/sys/vm/drop_caches
    tail -n 1 user-data
    usleep 50000
done
# read
"#;
const KEY: &str =
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ me";

#[tokio::test(flavor = "multi_thread")]
async fn a_system_is_told_who_it_is() -> Result<()> {
    let Some(system) = Scripted::start().await? else {
        return Ok(());
    };
    let network = system.write("network", b"version: 2\n")?;
    let keys = system.write("keys", KEY.as_bytes())?;
    system.run(SCRIPT, &["--network-config", &network, "--ssh-key", &keys])?;
    let told = wait_for("the system is told", || async {
        let output = system.output().await?;
        let told = output.lines().find(|line| line.starts_with("told: "))?;
        output.contains("# read").then(|| told.trim().to_owned())
    });
    let told = told.await?;
    assert!(told.contains(r#""local-hostname":"web""#), "{told}");
    let key = KEY.replace(' ', "");
    assert!(told.contains(&key), "{told}");
    assert!(told.ends_with("version:2"), "{told}");
    let report = system.cluster.move_machine("a", NAME, "b").await?;
    assert_eq!(report.ending, Ending::Moved, "{}", report.line());
    let reads = async || Some(system.output().await?.matches("# read").count());
    let before = reads().await.context("its output")?;
    wait_for("it reads at its new place", || async {
        (reads().await? > before + 2).then_some(())
    })
    .await
}
