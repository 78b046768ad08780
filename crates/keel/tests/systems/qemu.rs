//! Machines of kind `qemu`: whole systems live, move and end as machines of every kind do. The
//! system here counts, and compares its memory with each number, so that a move that loses memory
//! or output, or runs two copies, shows.

use anyhow::{Context, Result};
use keel_api::{LedgerInfo, MachineInfo, NodeInfo};
use keel_balance::ledger::Decision;
use keel_kind_qemu::{Disk, DiskFormat, QemuKind, QemuSpec};
use keel_machine::high_availability::{HighAvailability, Protect};
use keel_machine::moves::Ending;
use keel_testkit::bare_system::{counting_system, qemu_is_installed};
use keel_testkit::{Guest, LocalCluster, check_numbered, wait_for};
use rustix::fs::{FlockOperation, fcntl_lock};
use std::fs::File;
use std::path::{Path, PathBuf};

const KEEL: &str = env!("CARGO_BIN_EXE_keel");
const MIB: u64 = 1 << 20;

struct Systems {
    cluster: LocalCluster,
    folder: tempfile::TempDir,
}

impl Systems {
    /// A cluster; none if this computer has no QEMU.
    async fn start(names: &[&str]) -> Option<Self> {
        Self::started(async |folder| LocalCluster::start(Path::new(KEEL), folder, names).await)
            .await
    }

    /// A cluster that balances, whose nodes have so many cores each.
    async fn start_balancing(nodes: &[(&str, f64)]) -> Option<Self> {
        Self::started(async |folder| {
            LocalCluster::start_balancing(Path::new(KEEL), folder, nodes).await
        })
        .await
    }

    async fn started(start: impl AsyncFnOnce(&Path) -> Result<LocalCluster>) -> Option<Self> {
        if !qemu_is_installed() {
            return None;
        }
        let folder = tempfile::Builder::new().prefix("keel-").tempdir().unwrap();
        let cluster = start(folder.path()).await.expect("a cluster");
        Some(Systems { cluster, folder })
    }

    /// The spec of a system that counts, whose image the nodes have.
    async fn counting(&self, last: Option<u32>) -> Result<QemuSpec> {
        let system = counting_system(self.folder.path(), last)?;
        let client = self.cluster.client("a");
        let uploaded = client.upload(&QemuKind::kind_name(), system.into()).await?;
        Ok(QemuSpec {
            shutdown_s: 1,
            ..QemuSpec::of_kernel(uploaded.hash)
        })
    }

    async fn run(&self, name: &str, node: &str, spec: &QemuSpec) -> Result<MachineInfo> {
        self.cluster.run(&guest(name, node, spec)).await
    }

    /// Waits until the machine has printed more than `after`; returns how much it has.
    async fn counted(&self, machine: &str, after: u64) -> Result<u64> {
        let counted = wait_for("the system counts", || async {
            let output = self.cluster.output("a", machine).await.ok()?;
            let next = check_numbered(&output, 0).expect("each number once");
            (next > after).then_some(next)
        });
        counted.await
    }

    /// The QEMU processes of a worker.
    fn qemus(&self, node: &str) -> Vec<PathBuf> {
        let folder = self.cluster.folder(node).canonicalize().unwrap();
        let processes = std::fs::read_dir("/proc").unwrap().flatten();
        let here = processes.map(|entry| entry.path()).filter(|process| {
            let name = std::fs::read_to_string(process.join("comm")).unwrap_or_default();
            let place = std::fs::read_link(process.join("cwd")).unwrap_or_default();
            name.starts_with("qemu") && place.starts_with(&folder)
        });
        here.collect()
    }
}

fn guest<'a>(name: &'a str, node: &'a str, spec: &QemuSpec) -> Guest<'a> {
    let mut guest = Guest::new(name, node, &[], &[]);
    guest.memory_bytes = 32 * MIB;
    guest.kind = Some((QemuKind::kind_name(), spec.to_kind_spec().unwrap()));
    guest
}

#[tokio::test(flavor = "multi_thread")]
async fn a_system_moves_while_it_counts() -> Result<()> {
    let Some(systems) = Systems::start(&["a", "b"]).await else {
        return Ok(());
    };
    let executed = wait_for("the nodes say what executes systems", || async {
        let nodes: Vec<NodeInfo> = systems.cluster.client("a").get("/v1/nodes").await.ok()?;
        let says = |it: &NodeInfo| it.kinds.iter().any(|kind| kind.starts_with("qemu (QEMU "));
        nodes.iter().all(says).then_some(())
    });
    executed.await?;
    let spec = systems.counting(None).await?;
    systems.run("s", "a", &spec).await?;
    let mut next = systems.counted("s", 0).await?;
    for (from, to) in [("a", "b"), ("b", "a"), ("a", "b")] {
        let report = systems.cluster.move_machine("a", "s", to).await?;
        assert_eq!(report.ending, Ending::Moved, "{}", report.line());
        assert_eq!((report.source.as_str(), report.target.as_str()), (from, to));
        next = systems.counted("s", next + 10).await?;
        let gone = wait_for("the source's QEMU is gone", || async {
            systems.qemus(from).is_empty().then_some(())
        });
        gone.await?;
        assert_eq!(systems.qemus(to).len(), 1);
    }
    let info = systems.cluster.inspect("a", "s").await?;
    assert_eq!((info.kind.as_str(), info.node.as_str()), ("qemu", "b"));
    assert_eq!(info.threads, Some(1));
    systems.cluster.end("a", "s").await?;
    assert!(systems.qemus("b").is_empty());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_system_ends_by_itself_by_a_user_and_by_its_qemu() -> Result<()> {
    let Some(systems) = Systems::start(&["a"]).await else {
        return Ok(());
    };
    let brief = systems.counting(Some(50)).await?;
    systems.run("brief", "a", &brief).await?;
    let ended = systems.cluster.wait_end("a", "brief").await?;
    assert_eq!(ended.exit_code, Some(0), "{ended:?}");
    let output = systems.cluster.output("a", "brief").await?;
    assert_eq!(check_numbered(&output, 0)?, 50);

    let spec = systems.counting(None).await?;
    // It does not listen: its power is cut.
    systems.run("stopped", "a", &spec).await?;
    systems.counted("stopped", 0).await?;
    let client = systems.cluster.client("a");
    let _: serde_json::Value = client.post("/v1/machines/stopped/stop", &()).await?;
    let ended = systems.cluster.wait_end("a", "stopped").await?;
    assert_eq!(ended.status, "stopped", "{ended:?}");

    systems.run("killed", "a", &spec).await?;
    systems.counted("killed", 0).await?;
    let [qemu] = &systems.qemus("a")[..] else {
        anyhow::bail!("not one QEMU: {:?}", systems.qemus("a"));
    };
    kill(qemu)?;
    let ended = systems.cluster.wait_end("a", "killed").await?;
    let shown = serde_json::to_string(&ended)?;
    assert_eq!(ended.status, "failed", "{shown}");
    assert!(shown.contains("QEMU ended (signal: 9"), "{shown}");

    // The kernel ends a QEMU with its worker.
    systems.run("orphan", "a", &spec).await?;
    systems.counted("orphan", 0).await?;
    systems.cluster.kill_worker("a", "orphan")?;
    let gone = wait_for("its QEMU is gone", || async {
        systems.qemus("a").is_empty().then_some(())
    });
    gone.await?;
    let ended = systems.cluster.wait_end("a", "orphan").await?;
    assert_eq!(ended.status, "failed", "{ended:?}");
    Ok(())
}

fn kill(process: &Path) -> Result<()> {
    let pid = process.file_name().and_then(|name| name.to_str());
    let pid = pid.context("a process id")?.parse()?;
    let pid = rustix::process::Pid::from_raw(pid).context("a process id")?;
    Ok(rustix::process::kill_process(
        pid,
        rustix::process::Signal::KILL,
    )?)
}

/// After each fault the machine runs under one epoch, and has lost neither memory nor output.
#[tokio::test(flavor = "multi_thread")]
async fn a_move_that_fails_leaves_the_system_at_its_source() -> Result<()> {
    let Some(systems) = Systems::start(&["a", "b"]).await else {
        return Ok(());
    };
    let spec = systems.counting(None).await?;
    systems.run("s", "a", &spec).await?;
    let mut next = systems.counted("s", 0).await?;
    let at_source = [
        "source.connect",
        "source.hello",
        "source.round",
        "source.converged",
        "source.freeze",
        "source.frozen",
        "source.last-pages",
        "source.image",
        "source.prepared",
    ];
    let at_target = [
        "target.greeted",
        "target.round",
        "target.image",
        "target.ready",
    ];
    let of = |node: &'static str| move |name: &'static str| (node, name);
    let faults = at_source
        .into_iter()
        .map(of("a"))
        .chain(at_target.into_iter().map(of("b")));
    for (node, name) in faults {
        let cluster = &systems.cluster;
        cluster.failpoint(node, name, Some("error")).await?;
        let report = cluster.move_machine("a", "s", "b").await?;
        assert_ne!(report.ending, Ending::Moved, "{name}: {}", report.line());
        cluster.failpoint(node, name, None).await?;
        let info = cluster.inspect("a", "s").await?;
        assert_eq!((info.node.as_str(), info.status.as_str()), ("a", "running"));
        // What it printed before the fault does not count.
        let now = systems.counted("s", next).await.context(name)?;
        next = systems.counted("s", now + 3).await.context(name)?;
        let gone = wait_for("the target's QEMU is gone", || async {
            systems.qemus("b").is_empty().then_some(())
        });
        gone.await.context(name)?;
    }
    let report = systems.cluster.move_machine("a", "s", "b").await?;
    assert_eq!(report.ending, Ending::Moved, "{}", report.line());
    systems.counted("s", next).await?;
    Ok(())
}

/// Whoever is hit after the commit: one system goes on, with all its memory and output.
#[tokio::test(flavor = "multi_thread")]
async fn a_fault_after_the_commit_leaves_one_system() -> Result<()> {
    let Some(systems) = Systems::start(&["a", "b"]).await else {
        return Ok(());
    };
    let cluster = &systems.cluster;
    let spec = systems.counting(None).await?;
    systems.run("s", "a", &spec).await?;
    let mut next = systems.counted("s", 0).await?;
    let faults = [
        ("b", "target.prepared"),
        ("a", "move.go"),
        ("a", "source.go"),
        ("b", "target.go"),
        ("b", "target.gone"),
        ("a", "source.gone"),
    ];
    for (node, name) in faults {
        cluster.failpoint(node, name, Some("error")).await?;
        let report = cluster.move_machine("a", "s", "b").await?;
        cluster.failpoint(node, name, None).await?;
        let passed = cluster.failpoints_passed(node);
        assert_eq!(passed.last().map(String::as_str), Some(name), "{passed:?}");
        let only = wait_for("one QEMU is left", || async {
            (systems.qemus("a").len() + systems.qemus("b").len() == 1).then_some(())
        });
        only.await.context(name)?;
        let now = systems.counted("s", next).await.context(name)?;
        next = systems.counted("s", now + 3).await.context(name)?;
        let info = cluster.inspect("a", "s").await?;
        assert_eq!(info.status, "running", "{name}");
        let has_moved = report.ending == Ending::Moved;
        assert_eq!(info.node == "b", has_moved, "{name}: {}", report.line());
        if has_moved {
            let report = cluster.move_machine("a", "s", "a").await?;
            assert_eq!(report.ending, Ending::Moved, "{name}: {}", report.line());
        }
    }
    systems.counted("s", next).await?;
    Ok(())
}

/// What has arrived is lost before it runs: the source, which has the only copy then, goes on with
/// it.
#[tokio::test(flavor = "multi_thread")]
async fn a_system_that_cannot_run_where_it_arrived_goes_on_at_its_source() -> Result<()> {
    let Some(systems) = Systems::start(&["a", "b"]).await else {
        return Ok(());
    };
    let cluster = &systems.cluster;
    let mut spec = systems.counting(None).await?;
    let kills = |_: &File| match &systems.qemus("b")[..] {
        [qemu] => kill(qemu),
        other => anyhow::bail!("not one QEMU: {other:?}"),
    };
    // QEMU marks by shared locks of single bytes what it does not share.
    let locks = |disk: &File| Ok(fcntl_lock(disk, FlockOperation::NonBlockingLockShared)?);
    type Fault<'a> = &'a dyn Fn(&File) -> Result<()>;
    let faults: [(&str, &str, &str, Fault<'_>); 3] = [
        ("one", "a", "move.commit", &kills),
        ("two", "b", "target.go", &kills),
        // The lock of the disk is nobody's between source and target.
        ("three", "b", "target.go", &locks),
    ];
    for (machine, node, name, fault) in faults {
        let path = systems.folder.path().join(machine);
        std::fs::write(&path, vec![0; 1 << 20])?;
        spec.disks = vec![Disk {
            path: path.display().to_string(),
            format: DiskFormat::Raw,
            read_only: false,
        }];
        systems.run(machine, "a", &spec).await?;
        let next = systems.counted(machine, 0).await?;
        let disk = File::open(&path)?;
        // Each time: both the source and the target's agent tell it to go.
        cluster.failpoint(node, name, Some("delay(2000)*")).await?;
        let passed = cluster.failpoints_passed(node).len();
        let strikes = async {
            let there = wait_for("the move is there", || async {
                (cluster.failpoints_passed(node).len() > passed).then_some(())
            });
            there.await?;
            fault(&disk)?;
            let gone = wait_for("the target's QEMU is gone", || async {
                systems.qemus("b").is_empty().then_some(())
            });
            gone.await?;
            anyhow::Ok(fcntl_lock(&disk, FlockOperation::Unlock)?)
        };
        let (report, struck) = tokio::join!(cluster.move_machine("a", machine, "b"), strikes);
        let report = report?;
        struck.with_context(|| format!("{machine}: {}", report.line()))?;
        assert_ne!(report.ending, Ending::Moved, "{}", report.line());
        let now = systems.counted(machine, next).await.context(machine)?;
        systems.counted(machine, now + 3).await.context(machine)?;
        let info = cluster.inspect("a", machine).await?;
        assert_eq!((info.node.as_str(), info.status.as_str()), ("a", "running"));
        cluster.failpoint(node, name, None).await?;
    }
    let report = cluster.move_machine("a", "one", "b").await?;
    assert_eq!(report.ending, Ending::Moved, "{}", report.line());
    let next = systems.counted("one", 0).await?;
    systems.counted("one", next + 3).await?;
    Ok(())
}

/// Its processors' load is measured, and counts.
#[tokio::test(flavor = "multi_thread")]
async fn a_hot_node_gives_a_system_away() -> Result<()> {
    let Some(systems) = Systems::start_balancing(&[("a", 0.4), ("b", 0.4)]).await else {
        return Ok(());
    };
    // Between two numbers it keeps its processor busy.
    let spec = systems.counting(None).await?;
    for name in ["one", "two"] {
        systems.run(name, "a", &spec).await?;
        systems.counted(name, 0).await?;
    }
    let apart = wait_for("each node has one system", || async {
        let all: Vec<MachineInfo> = systems.cluster.client("a").get("/v1/machines").await.ok()?;
        let on_b = all.iter().filter(|machine| machine.node == "b").count();
        (on_b == 1).then_some(())
    });
    apart.await?;
    for name in ["one", "two"] {
        systems.counted(name, 0).await?;
    }
    Ok(())
}

/// One round weighs systems and programs against each other.
#[tokio::test(flavor = "multi_thread")]
async fn systems_and_programs_are_balanced_together() -> Result<()> {
    let Some(systems) = Systems::start_balancing(&[("a", 0.4), ("b", 0.4)]).await else {
        return Ok(());
    };
    let cluster = &systems.cluster;
    for (field, value) in [("mode", "off"), ("basis", "target")] {
        cluster.set_policy(field, value).await?;
    }
    let spec = systems.counting(None).await?;
    let module = keel_testkit::guest("counter");
    for number in 1..=2 {
        let (system, program) = (format!("system-{number}"), format!("program-{number}"));
        let quiet = Guest::new(&program, "a", &module, &["1000000", "500"]);
        for mut machine in [guest(&system, "a", &spec), quiet] {
            machine.balancing.cpu_target_millis = Some(1000);
            cluster.run(&machine).await?;
        }
    }
    cluster.set_policy("mode", "automatic").await?;
    let level = wait_for("each node has two machines", || async {
        let all: Vec<MachineInfo> = cluster.client("a").get("/v1/machines").await.ok()?;
        let on_b = all.iter().filter(|machine| machine.node == "b").count();
        (on_b == 2).then_some(())
    });
    level.await?;
    let told: LedgerInfo = cluster.client("a").get("/v1/ledger?limit=10000").await?;
    let mixed = told.lines.iter().any(|line| match &line.decision {
        Decision::Move { considered, .. } => ["system-", "program-"]
            .iter()
            .all(|kind| considered.iter().any(|it| it.machine.starts_with(kind))),
        _ => false,
    });
    assert!(mixed, "{told:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_agent_finds_its_system_again() -> Result<()> {
    let Some(systems) = Systems::start(&["a", "b"]).await else {
        return Ok(());
    };
    let spec = systems.counting(None).await?;
    systems.run("s", "b", &spec).await?;
    let next = systems.counted("s", 0).await?;
    let qemus = systems.qemus("b");
    systems.cluster.kill_agent("b")?;
    systems.cluster.wait_alive("b").await?;
    let next = systems.counted("s", next + 10).await?;
    assert_eq!(systems.qemus("b"), qemus);
    let report = systems.cluster.move_machine("a", "s", "a").await?;
    assert_eq!(report.ending, Ending::Moved, "{}", report.line());
    systems.counted("s", next).await?;
    Ok(())
}

/// The lock of a disk goes along with its system, and nobody else gets it.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_is_in_the_hands_of_one_system() -> Result<()> {
    let Some(systems) = Systems::start(&["a", "b"]).await else {
        return Ok(());
    };
    let disk = systems.folder.path().join("disk, with \"marks\".raw");
    std::fs::write(&disk, vec![0; 1 << 20])?;
    let mut spec = systems.counting(None).await?;
    spec.disks = vec![Disk {
        path: disk.display().to_string(),
        format: DiskFormat::Raw,
        read_only: false,
    }];
    systems.run("first", "a", &spec).await?;
    let next = systems.counted("first", 0).await?;
    for (second, node) in [("second", "a"), ("third", "b")] {
        systems.run(second, node, &spec).await.ok();
        let ended = systems.cluster.wait_end("a", second).await?;
        let shown = serde_json::to_string(&ended)?;
        assert!(shown.contains("lock"), "{shown}");
        if node == "a" {
            let report = systems.cluster.move_machine("a", "first", "b").await?;
            assert_eq!(report.ending, Ending::Moved, "{}", report.line());
        }
    }
    systems.counted("first", next).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_system_cannot_be_is_refused_by_name() -> Result<()> {
    let Some(systems) = Systems::start(&["a"]).await else {
        return Ok(());
    };
    let spec = systems.counting(None).await?;
    let refused = async |change: &dyn Fn(&mut Guest<'_>, &mut QemuSpec)| {
        let (mut own, mut machine) = (spec.clone(), guest("s", "a", &spec));
        change(&mut machine, &mut own);
        machine.kind = Some((QemuKind::kind_name(), own.to_kind_spec().unwrap()));
        let refused = systems.cluster.run(&machine).await;
        format!("{:#}", refused.expect_err("a refusal"))
    };
    let said = refused(&|machine, _| machine.memory_bytes += 1).await;
    assert!(said.contains("whole MiB"), "{said}");
    let said = refused(&|machine, _| machine.tmp_bytes = Some(MIB)).await;
    assert!(said.contains("cannot have volume"), "{said}");
    let protected = HighAvailability {
        protect: Protect::Output,
        ..HighAvailability::default()
    };
    let said = refused(&|machine, _| machine.ha = Some(protected.clone())).await;
    assert!(said.contains("ha: protect means nothing"), "{said}");
    let said = refused(&|_, own| own.cpus = 0).await;
    assert!(said.contains("0 processors"), "{said}");
    let said = refused(&|_, own| own.kernel = None).await;
    assert!(said.contains("nothing to boot"), "{said}");
    let strange = |own: &mut QemuSpec| {
        let kernel = own.kernel.as_mut().unwrap();
        kernel.image = "00".repeat(32);
    };
    let said = refused(&|_, own| strange(own)).await;
    assert!(said.contains("no node that answers has image"), "{said}");

    let client = systems.cluster.client("a");
    let text = bytes::Bytes::from_static(b"#!/bin/sh");
    let uploaded = client.upload(&QemuKind::kind_name(), text).await;
    let said = uploaded.expect_err("a refusal").to_string();
    assert!(said.contains("that is no disk"), "{said}");
    assert!(said.contains("nor a kernel"), "{said}");
    Ok(())
}

/// The image of a qcow2 disk of 1 MiB, without content: docs/interop/qcow2.txt of QEMU.
fn empty_qcow2() -> Vec<u8> {
    const CLUSTER: usize = 1 << 16;
    let mut image = vec![0; 4 * CLUSTER];
    let mut put = |at: usize, bytes: &[u8]| image[at..][..bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb");
    put(4, &3_u32.to_be_bytes());
    put(20, &16_u32.to_be_bytes());
    put(24, &(1_u64 << 20).to_be_bytes());
    // The first table of clusters, and that of their counts with its only block.
    put(36, &1_u32.to_be_bytes());
    put(40, &(3 * CLUSTER as u64).to_be_bytes());
    put(48, &(CLUSTER as u64).to_be_bytes());
    put(56, &1_u32.to_be_bytes());
    put(CLUSTER, &(2 * CLUSTER as u64).to_be_bytes());
    for cluster in 0..4 {
        put(2 * CLUSTER + 2 * cluster, &1_u16.to_be_bytes());
    }
    // Counts have 16 bits, and the header 104 bytes.
    put(96, &4_u32.to_be_bytes());
    put(100, &104_u32.to_be_bytes());
    image
}

/// Where a system's disk cannot be used, its machine ends and says which, and why.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_cannot_be_used_is_named() -> Result<()> {
    let Some(systems) = Systems::start(&["a"]).await else {
        return Ok(());
    };
    let spec = systems.counting(None).await?;
    let on_disk = |path: &Path| QemuSpec {
        disks: vec![Disk {
            path: path.display().to_string(),
            format: DiskFormat::Qcow2,
            read_only: false,
        }],
        ..spec.clone()
    };
    let write = |name: &str, change: &dyn Fn(&mut Vec<u8>)| -> Result<PathBuf> {
        let path = systems.folder.path().join(name);
        let mut image = empty_qcow2();
        change(&mut image);
        std::fs::write(&path, image)?;
        Ok(path)
    };
    let based = |image: &mut Vec<u8>| {
        let base = b"/nowhere/base.qcow2";
        image[8..16].copy_from_slice(&512_u64.to_be_bytes());
        image[16..20].copy_from_slice(&(base.len() as u32).to_be_bytes());
        image[512..][..base.len()].copy_from_slice(base);
    };
    let cases = [
        (PathBuf::from("/nowhere/disk"), "No such file"),
        (write("garbage", &|image| image.fill(7))?, "not in qcow2"),
        (write("encrypted", &|image| image[35] = 1)?, "encrypt"),
        (write("corrupt", &|image| image[47] = 1)?, "L1 table"),
        (write("based", &based)?, "/nowhere/base.qcow2"),
    ];
    for (number, (path, why)) in cases.into_iter().enumerate() {
        let name = format!("disk-{number}");
        systems.run(&name, "a", &on_disk(&path)).await.ok();
        let ended = systems.cluster.wait_end("a", &name).await?;
        let shown = serde_json::to_string(&ended)?;
        assert!(shown.contains(&*path.display().to_string()), "{shown}");
        assert!(shown.contains(why), "{shown}");
    }
    let whole = on_disk(&write("whole", &|_| {})?);
    systems.run("s", "a", &whole).await?;
    systems.counted("s", 0).await.map(drop)
}

/// Longer than a machine that ends at once is given, and than a request between agents.
#[tokio::test(flavor = "multi_thread")]
async fn a_system_that_heeds_no_power_button_has_its_time() -> Result<()> {
    let Some(systems) = Systems::start(&["a", "b"]).await else {
        return Ok(());
    };
    // cli; hlt: nothing that takes time.
    let mut image = vec![0; 512];
    image[..2].copy_from_slice(b"\xfa\xf4");
    image[510..].copy_from_slice(b"\x55\xaa");
    let path = systems.folder.path().join("disk.raw");
    std::fs::write(&path, image)?;
    let path = path.to_str().context("a path of UTF-8")?;
    let keel = |node, line: &str| {
        let (is_done, said) = systems.cluster.keel(node, &Vec::from_iter(line.split(' ')));
        anyhow::ensure!(is_done, "{said}");
        Ok(())
    };
    keel(
        "a",
        &format!(
            "run -d --on a --kind qemu --name deaf --memory 16M --shutdown 31s --image {path}"
        ),
    )?;
    keel("b", "rm --force deaf")
}
