//! Clusters of real processes that balance themselves. Each node has a CPU quota of its own (a
//! control group); without quotas these tests fail with a message.

use keel_api::{BalanceInfo, LedgerInfo, MachineInfo, NodeLoad, WhyNot};
use keel_balance::ledger::Decision;
use keel_machine::spec::BalanceBy;
use keel_testkit::{Guest, LocalCluster, guest, wait_for};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

const KEEL: &str = env!("CARGO_BIN_EXE_keel");

/// A cluster in which target loads count, so that other load of this computer does not matter.
async fn start(folder: &Path, nodes: &[(&str, f64)]) -> LocalCluster {
    let cluster = LocalCluster::start_balancing(Path::new(KEEL), folder, nodes)
        .await
        .expect("a cluster whose nodes have quotas");
    cluster
        .set_policy("basis", "target")
        .await
        .expect("a policy");
    cluster
}

/// Starts this number of machines on one node with a target of one core each, like busy ones.
async fn burn(cluster: &LocalCluster, node: &str, count: usize) {
    let module = guest("counter");
    for number in 0..count {
        let name = format!("burn-{number}");
        let mut quiet = Guest::new(&name, node, &module, &["1000000", "500"]);
        quiet.memory_bytes = 64 << 20;
        quiet.balancing.cpu_target_millis = Some(1000);
        cluster.run(&quiet).await.expect("it starts");
    }
}

/// Starts this number of busy machines on one node, for measurements.
async fn spin(cluster: &LocalCluster, node: &str, count: usize) {
    let module = guest("spinner");
    for number in 0..count {
        let name = format!("burn-{number}");
        let mut burner = Guest::new(&name, node, &module, &["0", "20000000"]);
        burner.memory_bytes = 64 << 20;
        cluster.run(&burner).await.expect("it starts");
    }
}

async fn machines(cluster: &LocalCluster) -> Vec<MachineInfo> {
    let machines = cluster.client("a").get("/v1/machines").await;
    machines.expect("the machines")
}

/// Number of machines of each node.
async fn spread(cluster: &LocalCluster) -> BTreeMap<String, usize> {
    let mut spread = BTreeMap::new();
    for machine in machines(cluster).await {
        assert_eq!(machine.exit_code, None, "{machine:?}");
        *spread.entry(machine.node).or_default() += 1;
    }
    spread
}

async fn ledger(cluster: &LocalCluster) -> LedgerInfo {
    let ledger = cluster.client("a").get("/v1/ledger?limit=10000").await;
    ledger.expect("the ledger")
}

async fn moves(cluster: &LocalCluster) -> usize {
    let mut moves = 0;
    for machine in machines(cluster).await {
        moves += machine.moves.len();
    }
    moves
}

fn keel(cluster: &LocalCluster, args: &[&str]) -> String {
    let output = Command::new(KEEL)
        .arg("--state-dir")
        .arg(cluster.folder("a"))
        .args(args)
        .output()
        .expect("keel runs");
    assert!(output.status.success(), "{args:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hot_node_cures_itself_and_says_why() {
    let _alone = crate::ALONE.lock().await;
    let folder = tempfile::Builder::new().prefix("keel-").tempdir().unwrap();
    let cluster = start(folder.path(), &[("a", 0.4), ("b", 0.4), ("c", 0.4)]).await;
    burn(&cluster, "a", 12).await;
    let begun = Instant::now();
    let even = BTreeMap::from([("a".into(), 4), ("b".into(), 4), ("c".into(), 4)]);
    let level = wait_for("four machines on each node", || async {
        (spread(&cluster).await == even).then_some(())
    });
    if let Err(error) = level.await {
        panic!("{error}; {}", keel(&cluster, &["ledger"]));
    }
    let took = begun.elapsed();
    // The report of the last move comes when its source has dropped the machine.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let made = moves(&cluster).await;
    println!("level after {took:?} with {made} moves");
    assert!(made <= 10, "{made} moves; {}", keel(&cluster, &["ledger"]));
    // Afterwards no machine moves any more.
    tokio::time::sleep(Duration::from_secs(12)).await;
    assert_eq!(
        moves(&cluster).await,
        made,
        "{}",
        keel(&cluster, &["ledger"])
    );
    assert_eq!(spread(&cluster).await, even);

    // Every move is explained, with its inputs.
    let told = ledger(&cluster).await;
    assert!(told.silent.is_empty());
    let decided: Vec<&Decision> = told
        .lines
        .iter()
        .map(|line| &line.decision)
        .filter(|it| matches!(it, Decision::Move { .. }))
        .collect();
    assert!(decided.len() >= made);
    for decision in decided {
        let Decision::Move {
            here,
            there,
            considered,
            machine,
            ..
        } = decision
        else {
            continue;
        };
        assert!(here.load > there.load && here.pressed, "{decision}");
        assert_eq!(considered[0].machine, *machine);
        assert!((here.capacity.cores - 0.4).abs() < 0.01, "{here:?}");
    }
    let moved = machines(&cluster).await;
    let moved = moved.iter().find(|it| it.node != "a").expect("one moved");
    let why = keel(&cluster, &["why", &moved.name]);
    assert!(
        why.contains("moves to") && why.contains("levels the two nodes best"),
        "{why}"
    );
    // The nodes' speeds were measured one by one and differ a little, their loads thus too: only
    // from the least loaded one to the most loaded one is there no move in any case.
    let loads: BalanceInfo = cluster.client("b").get("/v1/balance").await.expect("loads");
    assert_eq!(loads.nodes.len(), 3);
    let load = |node: &&NodeLoad| node.side.as_ref().expect("it has measured").load;
    let by_load = |x: &&NodeLoad, y: &&NodeLoad| load(x).total_cmp(&load(y));
    let from = &loads.nodes.iter().min_by(by_load).expect("a node").node;
    let to = &loads.nodes.iter().max_by(by_load).expect("a node").node;
    let settled = machines(&cluster).await;
    let settled = settled.iter().find(|it| it.node == *from);
    let settled = &settled.expect("four machines").name;
    let path = format!("/v1/machines/{settled}/why-not?to={to}");
    let why_not: WhyNot = cluster.client("a").get(&path).await.expect("a reason");
    assert!(why_not.explained.no_move.is_some(), "{why_not:?}");
    let said = keel(&cluster, &["why-not", settled, "--to", to]);
    assert!(said.contains("no machine moves from"), "{said}");
    assert!(keel(&cluster, &["balance"]).contains("automatic"));
}

#[tokio::test(flavor = "multi_thread")]
async fn unlike_nodes_end_level_in_relative_load() {
    let _alone = crate::ALONE.lock().await;
    let folder = tempfile::Builder::new().prefix("keel-").tempdir().unwrap();
    let cluster = start(folder.path(), &[("a", 0.2), ("b", 0.4), ("c", 0.8)]).await;
    burn(&cluster, "a", 14).await;
    // A machine that moved to the middle node first continues when its hold time is over.
    for more in [true, true, false] {
        let level = wait_for("machines as the nodes' quotas", || async {
            let spread = spread(&cluster).await;
            let of = |node: &str| spread.get(node).copied().unwrap_or(0);
            ((of("a"), of("b"), of("c")) == (2, 4, 8)).then_some(())
        });
        match level.await {
            Ok(()) => return,
            Err(_) if more => {}
            Err(error) => panic!(
                "{error}; {:?}\n{}",
                spread(&cluster).await,
                keel(&cluster, &["ledger"])
            ),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_only_suggested_waits_for_a_person() {
    let _alone = crate::ALONE.lock().await;
    let folder = tempfile::Builder::new().prefix("keel-").tempdir().unwrap();
    let cluster = start(folder.path(), &[("a", 0.5), ("b", 0.5)]).await;
    cluster
        .set_policy("mode", "confirm")
        .await
        .expect("a policy");
    burn(&cluster, "a", 4).await;
    let proposed = wait_for("a proposal", || async {
        let loads: BalanceInfo = cluster.client("b").get("/v1/balance").await.ok()?;
        let proposals = loads.nodes.into_iter().flat_map(|node| node.proposals);
        proposals.into_iter().next()
    });
    let (machine, target) = proposed.await.expect("a proposal");
    assert_eq!(&*target, "b");
    assert_eq!(moves(&cluster).await, 0);
    assert!(keel(&cluster, &["balance"]).contains(&format!("proposed: {machine}")));
    keel(&cluster, &["balance", "confirm", &machine]);
    wait_for("the confirmed move", || async {
        let info = cluster.inspect("a", &machine).await.ok()?;
        (info.node == "b").then_some(())
    })
    .await
    .expect("it moves");
    let refused = Command::new(KEEL)
        .arg("--state-dir")
        .arg(cluster.folder("a"))
        .args(["balance", "confirm", "burn-nobody"])
        .output()
        .expect("keel runs");
    assert!(!refused.status.success());
    let bad = Command::new(KEEL)
        .arg("--state-dir")
        .arg(cluster.folder("a"))
        .args(["balance", "policy", "margn=1"])
        .output()
        .expect("keel runs");
    assert!(
        String::from_utf8_lossy(&bad.stderr).contains("\"margin\""),
        "{bad:?}"
    );
}

/// Starts a machine that counts slowly, and is nearly idle.
async fn quiet(cluster: &LocalCluster, name: &str, node: &str) -> anyhow::Result<MachineInfo> {
    let module = guest("counter");
    cluster
        .run(&Guest::new(name, node, &module, &["1000000", "50"]))
        .await
}

fn try_keel(cluster: &LocalCluster, args: &[&str]) -> (bool, String) {
    let output = Command::new(KEEL)
        .arg("--state-dir")
        .arg(cluster.folder("a"))
        .args(args)
        .output()
        .expect("keel runs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.success(), said)
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_hold_for_everyone_and_are_repaired() {
    let _alone = crate::ALONE.lock().await;
    let folder = tempfile::Builder::new().prefix("keel-").tempdir().unwrap();
    let names = ["a", "b", "c"];
    let cluster = LocalCluster::start(Path::new(KEEL), folder.path(), &names)
        .await
        .expect("a cluster");
    let set = |text: &str| {
        let file = folder.path().join("rules.toml");
        std::fs::write(&file, text).unwrap();
        try_keel(&cluster, &["rule", "set", "-f", file.to_str().unwrap()])
    };
    for (node, zone) in [("a", "x"), ("b", "x"), ("c", "y")] {
        keel(
            &cluster,
            &["label", "--node", node, &format!("zone={zone}")],
        );
    }
    let apart = "[[rule]]\nname = \"web-apart\"\nrule = \"apart\"\n\
                 per = { label = \"zone\" }\nmachines.names = [\"web-*\"]\n";
    assert_eq!(set(apart), (true, String::new()));

    // Placement and moves obey the rules, whoever requests them.
    quiet(&cluster, "web-1", "a")
        .await
        .expect("it is the first");
    let refused = quiet(&cluster, "web-2", "b").await.unwrap_err().to_string();
    assert!(
        refused.contains("web-apart") && refused.contains("zone x has 1"),
        "{refused}"
    );
    quiet(&cluster, "web-2", "c")
        .await
        .expect("it is alone there");
    let (moved, said) = try_keel(&cluster, &["move", "web-2", "--to", "b"]);
    assert!(!moved && said.contains("web-apart"), "{said}");
    let within = cluster
        .move_machine("a", "web-1", "b")
        .await
        .expect("a report");
    assert!(
        matches!(within.ending, keel_machine::moves::Ending::Moved),
        "{}",
        within.line()
    );
    let shown = keel(&cluster, &["rule", "ls"]);
    assert!(
        shown.contains("x: web-1") && shown.contains("y: web-2"),
        "{shown}"
    );

    // Unsatisfiable rules are refused, with the conflicting ones.
    let pinned = "[[rule]]\nname = \"web-pin\"\nrule = \"pin\"\n\
                  machines.names = [\"web-*\"]\nnodes.labels = { zone = \"x\" }\n";
    let (taken, said) = set(pinned);
    assert!(!taken && said.contains("web-apart, web-pin"), "{said}");
    let (taken, said) = set("[[rule]]\nname = \"r\"\nrule = \"stay\"\n[rule.machines]\n");
    assert!(!taken && said.contains("names no machines"), "{said}");

    // A rule that is violated when it is set is repaired, if balancing may act.
    cluster
        .set_policy("mode", "automatic")
        .await
        .expect("a policy");
    quiet(&cluster, "db-1", "a").await.expect("it starts");
    quiet(&cluster, "db-2", "a").await.expect("it starts");
    let alone = "[[rule]]\nname = \"db-apart\"\nrule = \"apart\"\nmachines.names = [\"db-*\"]\n";
    assert_eq!(set(alone), (true, String::new()));
    wait_for("one of them moves away", || async {
        let (one, other) = (
            cluster.inspect("a", "db-1").await.ok()?,
            cluster.inspect("a", "db-2").await.ok()?,
        );
        (one.node == "a" && other.node != "a" && other.status == "running").then_some(())
    })
    .await
    .expect("the rule is repaired");
    let why = keel(&cluster, &["ledger", "db-2"]);
    assert!(
        why.contains("because its placement violates rule \"db-apart\""),
        "{why}"
    );
    let info = cluster.inspect("a", "db-1").await.expect("it is there");
    assert!(info.moves.is_empty(), "the fewest moves");
    keel(&cluster, &["rule", "rm", "db-apart", "web-apart"]);
    assert!(!try_keel(&cluster, &["rule", "rm", "nobody"]).0);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_who_race_for_a_rule_one_is_refused() {
    let _alone = crate::ALONE.lock().await;
    let folder = tempfile::Builder::new().prefix("keel-").tempdir().unwrap();
    let cluster = LocalCluster::start(Path::new(KEEL), folder.path(), &["a", "b", "c"])
        .await
        .expect("a cluster");
    let file = folder.path().join("rules.toml");
    let alone = "[[rule]]\nname = \"apart\"\nrule = \"apart\"\nmachines.names = [\"m-*\"]\n";
    std::fs::write(&file, alone).unwrap();
    keel(&cluster, &["rule", "set", "-f", file.to_str().unwrap()]);
    quiet(&cluster, "m-1", "a").await.expect("it starts");
    quiet(&cluster, "m-2", "b").await.expect("it starts");
    for _ in 0..6 {
        let (one, other) = tokio::join!(
            cluster.move_machine("a", "m-1", "c"),
            cluster.move_machine("b", "m-2", "c"),
        );
        let moved = |report: &anyhow::Result<keel_machine::moves::MoveReport>| {
            let moved = report.as_ref().map(|it| it.ending.clone());
            matches!(moved, Ok(keel_machine::moves::Ending::Moved))
        };
        assert!(
            !(moved(&one) && moved(&other)),
            "both are on c: {one:?} {other:?}"
        );
        let mut nodes: Vec<String> = Vec::new();
        for machine in ["m-1", "m-2"] {
            let info = cluster.inspect("a", machine).await.expect("it is there");
            nodes.push(info.node.clone());
            // Back to the first node, for the next step.
            let home = if machine == "m-1" { "a" } else { "b" };
            if info.node != home {
                let back = cluster
                    .move_machine("a", machine, home)
                    .await
                    .expect("a report");
                assert!(moved(&Ok(back)));
            }
        }
        assert_ne!(nodes[0], nodes[1], "at no revision both");
    }
}

/// A machine's node can explain its history when its earlier nodes are gone; and the measured
/// history is kept by time.
#[tokio::test(flavor = "multi_thread")]
async fn the_past_is_known_when_the_source_is_gone() {
    let _alone = crate::ALONE.lock().await;
    let folder = tempfile::Builder::new().prefix("keel-").tempdir().unwrap();
    let mut cluster = start(folder.path(), &[("b", 0.4), ("a", 0.4), ("c", 0.4)]).await;
    cluster.set_policy("mode", "suggest").await.unwrap();
    spin(&cluster, "a", 2).await;
    cluster.set_policy("mode", "automatic").await.unwrap();
    let moved = wait_for("a move", || async {
        let machines: Vec<MachineInfo> = cluster.client("b").get("/v1/machines").await.ok()?;
        let moved = machines.into_iter().find(|it| it.node != "a");
        moved.filter(|it| it.status == "running" && !it.moves.is_empty())
    })
    .await
    .expect("a move");
    cluster.set_policy("mode", "off").await.unwrap();
    let state = cluster.folder("b");
    let via = |args: &[&str]| {
        let output = Command::new(KEEL)
            .arg("--state-dir")
            .arg(&state)
            .args(args)
            .output()
            .expect("keel runs");
        let said = [output.stdout, output.stderr].concat();
        (
            output.status.success(),
            String::from_utf8_lossy(&said).into_owned(),
        )
    };
    let path = format!("/v1/ledger?machine={}", moved.name);
    // Known to b and c without a: the line with the reason, from their own ledgers.
    wait_for("the ledger to go along", || async {
        let told: LedgerInfo = cluster.client("b").get(&path).await.ok()?;
        let ended = |it: &Decision| matches!(it, Decision::Ended { .. });
        told.lines
            .iter()
            .any(|it| ended(&it.decision))
            .then_some(())
    })
    .await
    .expect("its end in the ledger");
    let loads: BalanceInfo = cluster.client("b").get("/v1/balance").await.unwrap();
    let of_b = loads.nodes.iter().find(|it| it.node == "b").unwrap();
    let mut peers: Vec<&str> = of_b.traffic.iter().map(|it| it.peer.as_str()).collect();
    peers.sort_unstable();
    assert_eq!(peers, ["a", "c"], "{:?}", of_b.traffic);
    let (done, shown) = via(&["history", "--since", "1m"]);
    assert!(done && shown.contains('█'), "{shown}");
    let (done, shown) = via(&["history", "a", "--since", "1m", "--points", "3"]);
    assert!(done && shown.contains("MACHINES"), "{shown}");
    let args = ["history", "--machine", &moved.name, "--since", "5m"];
    let (done, shown) = via(&args);
    assert!(done && shown.contains("WORKING SET"), "{shown}");
    let (done, said) = via(&["history", "nobody"]);
    assert!(!done && said.contains("there is no node"), "{said}");
    let (done, said) = via(&["history", "--machine", "nobody"]);
    assert!(!done && said.contains("no measurements"), "{said}");

    // The reason was sent when the machine left, seconds before the end of the move was recorded.
    cluster.power_off("a");
    let (done, why) = via(&["why", &moved.name]);
    assert!(done && why.contains("levels the two nodes best"), "{why}");
}

/// With a target load an idle machine has the weight of its future need; one that opted out stays,
/// except in a drain.
#[tokio::test(flavor = "multi_thread")]
async fn promises_count_where_they_are_wanted_and_who_opted_out_stays() {
    let _alone = crate::ALONE.lock().await;
    let folder = tempfile::Builder::new().prefix("keel-").tempdir().unwrap();
    let cluster = start(folder.path(), &[("a", 0.5), ("b", 0.5)]).await;
    let (counter, spinner) = (guest("counter"), guest("spinner"));
    let mut still = Guest::new("still", "a", &spinner, &["0", "20000000"]);
    still.memory_bytes = 64 << 20;
    still.balancing.by = BalanceBy::Off;
    cluster.run(&still).await.expect("it starts");
    for name in ["q-0", "q-1", "q-2", "q-3"] {
        let mut quiet = Guest::new(name, "a", &counter, &["1000000", "50"]);
        quiet.balancing.cpu_target_millis = Some(400);
        cluster.run(&quiet).await.expect("it starts");
    }
    // A measured load of 2 and 0.8 of each target: 2.8 and 2.4.
    let even = BTreeMap::from([("a".into(), 2), ("b".into(), 3)]);
    wait_for("promises level", || async {
        (spread(&cluster).await == even).then_some(())
    })
    .await
    .unwrap_or_else(|error| panic!("{error}; {}", keel(&cluster, &["ledger"])));
    assert_eq!(cluster.inspect("a", "still").await.unwrap().node, "a");
    let why_not = keel(&cluster, &["why-not", "still", "--to", "b"]);
    assert!(why_not.contains("excludes it from balancing"), "{why_not}");

    // The measured load of an idle machine is nearly zero.
    let one = wait_for("its move to be over", || async {
        let output = Command::new(KEEL)
            .arg("--state-dir")
            .arg(cluster.folder("a"))
            .args(["set", "q-0", "--balance", "actual"])
            .output()
            .ok()?;
        let done = output.status.success();
        done.then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    })
    .await
    .expect("it is set");
    assert!(one.contains("balanced by actual, cpu.target 0.4"), "{one}");
    let shown = keel(&cluster, &["describe", "q-0"]);
    assert!(shown.contains("by actual, cpu.target 0.4"), "{shown}");
    // It may be moved once more, now that its weight is lower.
    let loads = || async {
        let info: BalanceInfo = cluster.client("a").get("/v1/balance").await.ok()?;
        let samples = info.nodes.into_iter().filter_map(|it| it.sample);
        let machines = samples.flat_map(|sample| sample.machines);
        let its = machines.filter(|it| &*it.name == "q-0");
        Some(its.map(|it| it.factors.cpu_cores).collect::<Vec<f64>>())
    };
    let small = wait_for("its own load", || async {
        let loads = loads().await?;
        (!loads.is_empty() && loads.iter().all(|cores| *cores < 0.2)).then_some(())
    });
    if let Err(error) = small.await {
        let loads = loads().await;
        panic!("{error}: {loads:?}, {}", keel(&cluster, &["ledger"]));
    }
    let (done, said) = try_keel(&cluster, &["set", "q-0", "--cpu-target", "0"]);
    assert!(!done && said.contains("0.01 to 1000"), "{said}");

    keel(&cluster, &["drain", "a"]);
    assert_eq!(cluster.inspect("a", "still").await.unwrap().node, "b");
}

/// A plan for all nodes, while the balancer is off: it is carried out as shown on an unchanged
/// cluster, or not at all. Target loads count, so that other load of this computer does not
/// matter.
#[tokio::test(flavor = "multi_thread")]
async fn a_plan_levels_all_nodes_once_it_is_confirmed() {
    let _alone = crate::ALONE.lock().await;
    let folder = tempfile::Builder::new().prefix("keel-").tempdir().unwrap();
    let cluster = start(folder.path(), &[("a", 0.4), ("b", 0.4), ("c", 0.4)]).await;
    cluster.set_policy("mode", "off").await.unwrap();
    burn(&cluster, "a", 7).await;
    let file = folder.path().join("plan.json");
    let path = file.to_str().unwrap();
    let planned = || async {
        let plan = wait_for("a plan that levels", || async {
            let shown = keel(&cluster, &["-o", "json", "balance", "--plan"]);
            let plan: keel_api::PlanInfo = serde_json::from_str(&shown).ok()?;
            (plan.steps.len() >= 2 && plan.after < plan.before / 2.0).then_some(plan)
        });
        let plan = plan.await.expect("the plan");
        std::fs::write(&file, serde_json::to_vec(&plan).unwrap()).unwrap();
        plan
    };
    let confirm = ["balance", "--plan", "--from", path, "--yes"];
    let plan = planned().await;
    let shown = keel(
        &cluster,
        &["balance", "--plan", "--from", path, "--dry-run"],
    );
    assert!(
        shown.contains(&format!("plan {}: {} moves", plan.id, plan.steps.len()))
            && shown.contains("WAVE"),
        "{shown}"
    );

    // A plan other than the shown one is refused, and so is one for a cluster that has changed.
    let mut other = plan.clone();
    other.steps[0].to = other.steps[0].from.clone();
    std::fs::write(&file, serde_json::to_vec(&other).unwrap()).unwrap();
    let (done, said) = try_keel(&cluster, &confirm);
    assert!(
        !done && said.contains("not the steps of the plan"),
        "{said}"
    );
    std::fs::write(&file, serde_json::to_vec(&plan).unwrap()).unwrap();
    let ended = &plan.steps[0].machine;
    keel(&cluster, &["stop", ended]);
    let (done, said) = try_keel(&cluster, &confirm);
    let why = format!("machine {ended} is stopped");
    assert!(
        !done && said.contains(&why) && said.contains("nothing was moved"),
        "{said}"
    );
    assert_eq!(moves(&cluster).await, 0, "nothing moves unasked");
    keel(&cluster, &["rm", ended]);

    let plan = planned().await;
    keel(&cluster, &confirm);
    let last: BTreeMap<&str, &str> = plan
        .steps
        .iter()
        .map(|step| (&*step.machine, &*step.to))
        .collect();
    for machine in machines(&cluster).await {
        let node = last.get(&*machine.name).copied().unwrap_or("a");
        assert_eq!(machine.node, node, "{} as planned: {plan:?}", machine.name);
    }
    let (done, said) = try_keel(&cluster, &confirm);
    assert!(!done && said.contains("moved from a to"), "{said}");
    let (done, said) = try_keel(&cluster, &["balance", "--plan", "--objective", "nowhere"]);
    assert!(!done && said.contains("possible values"), "{said}");
}

/// Without a requested node the loads decide; a host directory keeps the machine on the node where
/// it was named.
#[tokio::test(flavor = "multi_thread")]
async fn new_machines_start_where_there_is_least_to_do() {
    let _alone = crate::ALONE.lock().await;
    let folder = tempfile::Builder::new().prefix("keel-").tempdir().unwrap();
    let cluster = start(folder.path(), &[("a", 0.4), ("b", 0.4), ("c", 0.4)]).await;
    cluster.set_policy("mode", "suggest").await.unwrap();
    wait_for("all have measured", || async {
        let info: BalanceInfo = cluster.client("a").get("/v1/balance").await.ok()?;
        let ready = |it: &keel_api::NodeLoad| it.side.is_some();
        let suggests = info.policy.mode == keel_balance::policy::Mode::Suggest;
        (suggests && info.nodes.len() == 3 && info.nodes.iter().all(ready)).then_some(())
    })
    .await
    .expect("loads");
    let module = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guests/counter.wasm");
    let module = module.to_str().unwrap();
    for _ in 0..6 {
        let args = [
            "run",
            "-d",
            "--memory",
            "64M",
            "--cpu-target",
            "1",
            module,
            "1000000",
            "500",
        ];
        keel(&cluster, &args);
    }
    let started = spread(&cluster).await;
    assert!(started.len() == 3 && started["a"] <= 3, "{started:?}");
    let volume = format!("{}:/data", folder.path().display());
    let args = [
        "run", "-d", "--memory", "64M", "--volume", &volume, module, "1000000", "500",
    ];
    keel(&cluster, &args);
    let there = spread(&cluster).await;
    assert_eq!(there["a"], started["a"] + 1, "{there:?}");
}
