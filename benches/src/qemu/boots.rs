//! How long a Linux takes from its start to the first line of its own program: by hand and as a
//! machine, with the same kernel and the same devices that take part.

use super::by_hand::Qemu;
use super::{LIMIT, spec_of, upload};
use crate::signals;
use crate::table::{Table, percentile};
use anyhow::{Context, Result};
use keel_kind_qemu::QemuKind;
use keel_testkit::linux_system::LinuxSystem;
use keel_testkit::{Guest, LocalCluster, wait_for};
use std::path::Path;
use std::sync::mpsc::channel;
use std::time::Instant;

const MEMORY_MIB: &str = "128M";
const MEMORY_BYTES: u64 = 128 << 20;
/// Asks nothing of a network.
const ADDRESS: &str = "10.0.0.1/24";

pub(super) async fn bench(keel: &Path, boots: usize) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let Some(linux) = LinuxSystem::make(folder.path())? else {
        return Ok(());
    };
    let [kernel, initrd] = ["kernel", "initrd.cpio"].map(|name| folder.path().join(name));
    std::fs::write(&kernel, &linux.kernel)?;
    std::fs::write(&initrd, &linux.initrd)?;
    let cluster = LocalCluster::start(keel, folder.path(), &["a"]).await?;
    let mut spec = spec_of(&cluster, &kernel).await?;
    let append = LinuxSystem::append(ADDRESS, "");
    let booted = spec.kernel.as_mut().context("a kernel")?;
    booted.initrd = Some(upload(&cluster, linux.initrd).await?);
    booted.append = append.clone();
    let own = spec.to_kind_spec().map_err(anyhow::Error::msg)?;

    let (mut by_hand, mut ours) = (Vec::new(), Vec::new());
    for boot in 0..boots {
        signals::check()?;
        let begun = Instant::now();
        let (send, heard) = channel();
        let initrd = initrd.display().to_string();
        let more = ["-m", MEMORY_MIB, "-initrd", &initrd, "-append", &append];
        let more = more.map(str::to_owned);
        let qemu = Qemu::start(folder.path(), "boot", &kernel, &more, send)?;
        heard.recv_timeout(LIMIT).context("Linux prints nothing")?;
        by_hand.push(begun.elapsed().as_secs_f64() * 1000.0);
        drop(qemu);

        let name = format!("boot-{boot}");
        let guest = Guest {
            memory_bytes: MEMORY_BYTES,
            kind: Some((QemuKind::kind_name(), own.clone())),
            ..Guest::new(&name, "a", &[], &[])
        };
        let begun = Instant::now();
        cluster.run(&guest).await?;
        let printed = wait_for("Linux prints", || async {
            let output = cluster.output("a", &name).await.ok()?;
            (!output.is_empty()).then_some(())
        });
        printed.await?;
        // The first one waits for the trial of what executes guests here.
        if boot > 0 {
            ours.push(begun.elapsed().as_secs_f64() * 1000.0);
        }
        cluster.end("a", &name).await?;
    }
    let mut table = Table::new(&["", "p50 ms", "max", "ratio"]);
    let usual = percentile(&mut by_hand, 0.5);
    for (name, mut took) in [("QEMU by hand", by_hand), ("evenkeel", ours)] {
        let p50 = percentile(&mut took, 0.5);
        table.row(vec![
            name.to_owned(),
            format!("{p50:.0}"),
            format!("{:.0}", percentile(&mut took, 1.0)),
            format!("{:.2}", p50 / usual),
        ]);
    }
    table.print(&format!(
        "{boots} boots of Linux, to the first line of its program"
    ));
    Ok(())
}
