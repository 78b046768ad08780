//! The processors of systems: what nodes have in common, and nodes that lack a feature.

use anyhow::{Context, Result};
use keel_api::{MachineInfo, NodeInfo, PlanGoal, PlanInfo, RunRequest};
use keel_api::{Token, TokenRequest};
use keel_kind_qemu::{Accelerator, CpuModel, Processor, QemuKind, QemuSpec};
use keel_machine::moves::Ending;
use keel_testkit::bare_system::{counting_system, qemu_is_installed};
use keel_testkit::{Guest, LocalCluster, wait_for};
use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

const KEEL: &str = env!("CARGO_BIN_EXE_keel");
const QEMU: &str = "qemu-system-x86_64";

/// A folder with a QEMU that gives its guests no AVX2, as on a host whose processor has none.
fn without_avx2(folder: &Path) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").context("a PATH")?;
    let mut programs = std::env::split_paths(&path).map(|folder| folder.join(QEMU));
    let program = programs.find(|it| it.exists()).context("a QEMU")?;
    let programs = folder.join("older");
    std::fs::create_dir(&programs)?;
    let script = format!(
        "#!/bin/sh\nexec {} -global max-x86_64-cpu.avx2=off \"$@\"\n",
        program.display()
    );
    std::fs::write(programs.join(QEMU), script)?;
    std::fs::set_permissions(programs.join(QEMU), PermissionsExt::from_mode(0o755))?;
    Ok(programs)
}

/// The processor of a machine that is shown.
fn processor(machine: &MachineInfo) -> Result<Processor> {
    let shown = machine.kind_spec.get("processor").context("a processor")?;
    Ok(serde_json::from_value(shown.clone())?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_system_has_what_nodes_have_in_common_and_goes_where_nothing_is_missing() -> Result<()> {
    if !qemu_is_installed() {
        return Ok(());
    }
    let folder = tempfile::Builder::new().prefix("keel-").tempdir()?;
    let older = without_avx2(folder.path())?;
    let path = std::env::var("PATH")?;
    let path = format!("{}:{path}", older.to_str().context("a path")?);
    let mut cluster = LocalCluster::start_with_environment(
        Path::new(KEEL),
        folder.path(),
        &["a"],
        &[("PATH", &path)],
    )
    .await?;
    cluster.set_environment(&[]);
    let nodes: Vec<NodeInfo> = cluster.client("a").get("/v1/nodes").await?;
    let via = nodes.first().context("a node")?.address.clone();
    for name in ["b", "c"] {
        let request = TokenRequest::Join { ttl_s: 60 };
        let token: Token = cluster.client("a").post("/v1/tokens", &request).await?;
        cluster
            .join(folder.path(), name, &via, &token.token)
            .await?;
    }
    let client = cluster.client("a");
    wait_for("all nodes say what executes systems", || async {
        let nodes: Vec<NodeInfo> = client.get("/v1/nodes").await.ok()?;
        let says = |node: &NodeInfo| node.kinds.iter().any(|kind| kind.starts_with("qemu"));
        (nodes.len() == 3 && nodes.iter().all(says)).then_some(())
    })
    .await?;

    let image = counting_system(folder.path(), None)?;
    let kind = QemuKind::kind_name();
    let uploaded = client.upload(&kind, image.into()).await?;
    let request = |name: &str, on: Option<&str>, cpu_model| -> Result<RunRequest> {
        let spec = QemuSpec {
            shutdown_s: 1,
            cpu_model,
            ..QemuSpec::of_kernel(uploaded.hash.clone())
        };
        let spec = spec.to_kind_spec().map_err(anyhow::Error::msg)?;
        let guest = Guest {
            memory_bytes: 32 << 20,
            ..Guest::new(name, "a", &[], &[])
        };
        Ok(RunRequest {
            on: on.map(str::to_owned),
            ..guest.request((kind.clone(), spec))
        })
    };
    let run = async |name: &str, on: Option<&str>, model| -> Result<MachineInfo> {
        let made: MachineInfo = client
            .post("/v1/machines", &request(name, on, Some(model))?)
            .await?;
        wait_for("the system runs", || async {
            let shown = cluster.inspect("a", name).await.ok()?;
            (shown.status == "running").then_some(())
        })
        .await?;
        Ok(made)
    };
    // What the older one has, all have.
    let common = run("common", Some("b"), CpuModel::Common).await?;
    let common = processor(&common)?;
    assert!(common.features.contains("avx"), "{common:?}");
    assert!(!common.features.contains("avx2"), "{common:?}");
    cluster.move_machine("a", "common", "a").await?;

    // What only others have is asked for by name.
    let third = run("third", None, CpuModel::Level3).await?;
    assert_ne!(third.node, "a");
    assert!(processor(&third)?.features.contains("avx2"));
    let other = if third.node == "b" { "c" } else { "b" };
    let refused = cluster.move_machine("a", "third", "a").await?;
    let stayed = matches!(refused.ending, Ending::Stayed { .. });
    let refused = refused.line();
    assert!(stayed, "{refused}");
    assert!(refused.contains("lacks avx2"), "{refused}");
    let shown = cluster.inspect("a", "third").await?;
    assert_eq!((&*shown.status, &shown.node), ("running", &third.node));
    cluster.move_machine("a", "third", other).await?;
    let goal = PlanGoal::Drain {
        node: other.to_owned(),
    };
    // Once the nodes have been measured.
    let plan = wait_for("a plan", || async {
        let plan: PlanInfo = client.post("/v1/plan", &goal).await.ok()?;
        (!plan.steps.is_empty()).then_some(plan)
    });
    let plan = plan.await?;
    let targets: BTreeSet<&str> = plan.steps.iter().map(|step| &*step.to).collect();
    assert_eq!(targets, BTreeSet::from([&*third.node]), "{plan:?}");

    // Translated, a system has no more than it must, unless something else is asked for.
    let request = request("plain", None, None)?;
    let plain: MachineInfo = client.post("/v1/machines", &request).await?;
    let plain = processor(&plain)?;
    if plain.accelerator == Accelerator::Tcg {
        assert!(plain.features.is_empty(), "{plain:?}");
    }
    Ok(())
}

/// Bad input: nothing is made.
#[tokio::test(flavor = "multi_thread")]
async fn processors_that_nobody_can_give_are_refused_by_name() -> Result<()> {
    if !qemu_is_installed() {
        return Ok(());
    }
    let folder = tempfile::Builder::new().prefix("keel-").tempdir()?;
    let cluster = LocalCluster::start(Path::new(KEEL), folder.path(), &["a"]).await?;
    let client = cluster.client("a");
    wait_for("the node says what executes systems", || async {
        let nodes: Vec<NodeInfo> = client.get("/v1/nodes").await.ok()?;
        let mut kinds = nodes.iter().flat_map(|node| &node.kinds);
        kinds.any(|kind| kind.starts_with("qemu")).then_some(())
    })
    .await?;
    let image = counting_system(folder.path(), None)?;
    let kind = QemuKind::kind_name();
    let uploaded = client.upload(&kind, image.into()).await?;
    let injected = Processor {
        accelerator: Accelerator::Tcg,
        vendor: None,
        features: BTreeSet::from(["avx=on -S".to_owned()]),
    };
    let of_kernel = QemuSpec::of_kernel(uploaded.hash);
    let strange = QemuSpec {
        processor: Some(injected),
        ..of_kernel.clone()
    };
    let refused = async |spec: QemuSpec| -> Result<String> {
        let spec = spec.to_kind_spec().map_err(anyhow::Error::msg)?;
        let guest = Guest {
            memory_bytes: 32 << 20,
            ..Guest::new("m", "a", &[], &[])
        };
        let request = guest.request((kind.clone(), spec));
        let made = client
            .post::<_, MachineInfo>("/v1/machines", &request)
            .await;
        Ok(made.err().context("it was made")?.to_string())
    };
    let refusal = refused(strange).await?;
    assert!(refusal.contains("does not know"), "{refusal}");
    // No QEMU translates AVX-512. (The processor of a host with KVM may have it.)
    let nodes: Vec<NodeInfo> = client.get("/v1/nodes").await?;
    let mut kinds = nodes.iter().flat_map(|node| &node.kinds);
    if kinds.any(|kind| kind.contains("translated")) {
        let refusal = refused(QemuSpec {
            cpu_model: Some(CpuModel::Level4),
            ..of_kernel
        });
        let refusal = refusal.await?;
        assert!(refusal.contains("a lacks avx512bw (tcg)"), "{refusal}");
    }
    assert!(cluster.inspect("a", "m").await.is_err());
    Ok(())
}
