//! A system is placed where there is a QEMU.

use anyhow::{Context, Result};
use keel_api::{MachineInfo, NodeInfo, PlanGoal, PlanInfo, RunRequest, Token, TokenRequest};
use keel_kind_qemu::{QemuKind, QemuSpec};
use keel_testkit::bare_system::{counting_system, qemu_is_installed};
use keel_testkit::{Guest, LocalCluster, wait_for};
use std::path::Path;

const KEEL: &str = env!("CARGO_BIN_EXE_keel");

/// The node that is asked has none.
#[tokio::test(flavor = "multi_thread")]
async fn a_system_starts_where_it_can() -> Result<()> {
    if !qemu_is_installed() {
        return Ok(());
    }
    let folder = tempfile::Builder::new().prefix("keel-").tempdir()?;
    let (program, nothing) = (Path::new(KEEL), [("PATH", "/nonexistent")]);
    let mut cluster =
        LocalCluster::start_with_environment(program, folder.path(), &["a"], &nothing).await?;
    cluster.set_environment(&[]);
    let nodes: Vec<NodeInfo> = cluster.client("a").get("/v1/nodes").await?;
    let via = nodes.first().context("a node")?.address.clone();
    let request = TokenRequest::Join { ttl_s: 60 };
    let token: Token = cluster.client("a").post("/v1/tokens", &request).await?;
    cluster.join(folder.path(), "b", &via, &token.token).await?;
    cluster.set_policy("mode", "automatic").await?;
    let client = cluster.client("a");
    wait_for("the nodes say what executes systems", || async {
        let nodes: Vec<NodeInfo> = client.get("/v1/nodes").await.ok()?;
        let says = |name: &str, what: &str| {
            let mut kinds = nodes
                .iter()
                .filter(|it| it.name == name)
                .flat_map(|it| &it.kinds);
            kinds.any(|kind| kind.starts_with(what))
        };
        (says("a", "wasm") && !says("a", "qemu") && says("b", "qemu")).then_some(())
    })
    .await?;

    let image = counting_system(folder.path(), None)?;
    let kind = QemuKind::kind_name();
    let uploaded = client.upload(&kind, image.into()).await?;
    let spec = QemuSpec {
        shutdown_s: 1,
        ..QemuSpec::of_kernel(uploaded.hash)
    };
    let spec = spec.to_kind_spec().map_err(anyhow::Error::msg)?;
    let names = ["s1", "s2", "s3"];
    for name in names {
        let guest = Guest {
            memory_bytes: 32 << 20,
            ..Guest::new(name, "a", &[], &[])
        };
        let request = RunRequest {
            on: None,
            ..guest.request((kind.clone(), spec.clone()))
        };
        let placed: MachineInfo = client.post("/v1/machines", &request).await?;
        assert_eq!(placed.node, "b");
    }
    for name in names {
        wait_for("the system runs", || async {
            let shown = cluster.inspect("a", name).await.ok()?;
            (shown.status == "running").then_some(())
        })
        .await?;
    }
    // Nor does a plan give one to the node that cannot run it.
    let goal = PlanGoal::Drain {
        node: "b".to_owned(),
    };
    let plan: PlanInfo = client.post("/v1/plan", &goal).await?;
    assert!(
        plan.steps.is_empty() && plan.left.len() == names.len(),
        "{plan:?}"
    );
    Ok(())
}
