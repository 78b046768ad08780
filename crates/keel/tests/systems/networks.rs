//! Linux systems on a network, whose hardware addresses move along: a client notices a move as a
//! delay at most, and a copy that is not the machine has no effect on the network.

use super::systems::Systems;
use anyhow::Result;
use keel_api::MachineInfo;
use keel_machine::moves::Ending;
use keel_testkit::wait_for;

#[tokio::test(flavor = "multi_thread")]
async fn a_system_answers_through_moves() -> Result<()> {
    let Some(systems) = Systems::start(&["a", "b"], &["a", "b"]).await? else {
        return Ok(());
    };
    let address = "10.214.0.101";
    systems.run("s", "a", address, "").await?;
    systems.wait_answer(address).await?;
    let client = systems.ask_always(&[address])?;
    for to in ["b", "a", "b"] {
        let report = systems.cluster.move_machine("a", "s", to).await?;
        assert_eq!(report.ending, Ending::Moved, "{}", report.line());
        println!("{}", report.line());
    }
    // The last one is whole: it is asked there.
    systems.wait_answer(address).await?;
    client.end_after_many()
}

/// Where a bridge is missing a system neither starts nor arrives, and the one that was to go
/// answers all the time.
#[tokio::test(flavor = "multi_thread")]
async fn a_system_stays_where_its_network_is() -> Result<()> {
    let Some(systems) = Systems::start(&["a", "b"], &["a"]).await? else {
        return Ok(());
    };
    let address = "10.214.0.101";
    systems.run("s", "a", address, "").await?;
    systems.wait_answer(address).await?;
    let client = systems.ask_always(&[address])?;
    let report = systems.cluster.move_machine("a", "s", "b").await?;
    assert_ne!(report.ending, Ending::Moved, "{}", report.line());
    let line = report.line();
    assert!(line.contains("no bridge lan"), "{line}");
    client.end()?;
    systems.wait_answer(address).await?;

    systems.run("t", "b", "10.214.0.102", "").await.ok();
    let ended = systems.cluster.wait_end("a", "t").await?;
    let shown = serde_json::to_string(&ended)?;
    assert!(shown.contains("no bridge lan"), "{shown}");
    Ok(())
}

/// What arrives is not in the network before the commit: a move that fails at its last step is not
/// noticed.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_is_not_the_machine_is_not_in_its_network() -> Result<()> {
    let Some(systems) = Systems::start(&["a", "b"], &["a", "b"]).await? else {
        return Ok(());
    };
    let (cluster, address) = (&systems.cluster, "10.214.0.101");
    systems.run("s", "a", address, "").await?;
    systems.wait_answer(address).await?;
    let client = systems.ask_always(&[address])?;
    for (node, name) in [("b", "target.ready"), ("a", "source.prepared")] {
        cluster.failpoint(node, name, Some("error")).await?;
        let report = cluster.move_machine("a", "s", "b").await?;
        assert_ne!(report.ending, Ending::Moved, "{}", report.line());
        cluster.failpoint(node, name, None).await?;
    }
    systems.wait_answer(address).await?;
    client.end_after_many()
}

/// A node with three busy systems gives some away, while a client asks all of them; then each agent
/// is killed once.
#[tokio::test(flavor = "multi_thread")]
async fn systems_answer_while_they_are_balanced_and_agents_are_killed() -> Result<()> {
    let nodes = [("a", 0.5), ("b", 0.5), ("c", 0.5)];
    let Some(systems) = Systems::start_balancing(&nodes).await? else {
        return Ok(());
    };
    systems.cluster.set_policy("mode", "off").await?;
    let addresses = ["10.214.0.101", "10.214.0.102", "10.214.0.103"];
    let names = ["one", "two", "three"];
    for (name, address) in names.iter().zip(addresses) {
        systems.run(name, "a", address, "keel.busy").await?;
    }
    for address in addresses {
        systems.wait_answer(address).await?;
    }
    let client = systems.ask_always(&addresses)?;
    systems.cluster.set_policy("mode", "automatic").await?;
    // The nodes share a computer, so that each counts as busy what runs on the others.
    let relieved = wait_for("a system leaves", || async {
        let all: Vec<MachineInfo> = systems.cluster.client("a").get("/v1/machines").await.ok()?;
        let has_left = all.iter().any(|machine| machine.node != "a");
        has_left.then_some(())
    });
    relieved.await?;
    for (node, _) in nodes {
        systems.cluster.kill_agent(node)?;
        systems.cluster.wait_alive(node).await?;
    }
    for address in addresses {
        systems.wait_answer(address).await?;
    }
    client.end_after_many()
}
