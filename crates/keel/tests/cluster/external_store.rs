//! A cluster whose store is an etcd outside of its nodes: machines run, move and fail over as with
//! a store in the nodes, and any three nodes admit others.

use keel_api::{StoreInfo, Token, TokenRequest};
use keel_machine::high_availability::{Fence, HighAvailability};
use keel_machine::moves::Ending;
use keel_machine::restart_policy::Restart;
use keel_testkit::witness::examine;
use keel_testkit::{Certificates, Etcd, Guest, LocalCluster, guest, wait_for};
use std::path::Path;
use std::process::Command;

const KEEL: &str = env!("CARGO_BIN_EXE_keel");

fn folder() -> tempfile::TempDir {
    let folder = tempfile::Builder::new().prefix("keel-").tempdir();
    folder.expect("a folder")
}

/// What `keel` says in a state folder, and whether it succeeds.
fn keel(state: &Path, args: &[&str]) -> (bool, String) {
    let output = Command::new(KEEL)
        .arg("--state-dir")
        .arg(state)
        .args(args)
        .output()
        .expect("keel runs");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    (output.status.success(), said)
}

async fn store_of(cluster: &LocalCluster, node: &str) -> Option<StoreInfo> {
    cluster.client(node).get("/v1/store").await.ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn machines_move_and_fail_over_and_the_node_that_began_the_cluster_is_not_needed() {
    let folder = folder();
    let Some(mut etcd) = Etcd::start(3).expect("etcd") else {
        return;
    };
    let names = ["a", "b", "c", "d"];
    let address = etcd.address("site-1");
    let cluster = LocalCluster::start_with_store(
        Path::new(KEEL),
        folder.path(),
        &names,
        &["--store", &address],
    )
    .await;
    let mut cluster = cluster.expect("a cluster");
    let (_, status) = keel(&cluster.folder("b"), &["status"]);
    assert!(status.contains(&format!("store at {address}")), "{status}");
    assert!(!status.contains("no failover"), "{status}");
    let (_, refused) = keel(&cluster.folder("b"), &["store", "voters", "3"]);
    assert!(refused.contains("its own nodes hold none"), "{refused}");

    // A member of etcd less is no reason to stop.
    etcd.kill(0).expect("it ends");
    let file = folder.path().join("written");
    let module = guest("witness");
    let args = [file.display().to_string(), "8".into(), "1000".into()];
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let witness = Guest {
        volume: Some(folder.path()),
        ha: Some(HighAvailability {
            checkpoint_every_ms: 1000,
            fence: Fence::Timer,
            ..HighAvailability::default()
        }),
        ..Guest::new("w", "a", &module, &args)
    };
    cluster.run(&witness).await.expect("it starts");
    let evidence = || examine(&std::fs::read_to_string(&file).unwrap_or_default());
    let writes_on = async |lines: u64| {
        let before = evidence().expect("one copy wrote").lines;
        wait_for("it writes on", || async {
            let now = evidence().expect("one copy wrote").lines;
            (now >= before + lines).then_some(())
        })
        .await
        .expect("it writes");
    };
    writes_on(50).await;
    let client = cluster.client("a");
    let moved = keel_testkit::move_by(&client, "w", "b")
        .await
        .expect("it moves");
    assert_eq!(moved.ending, Ending::Moved);
    writes_on(50).await;
    wait_for("another node has its checkpoint", || async {
        let machine = cluster.inspect("a", "w").await.ok()?;
        (machine.in_sync.len() >= 2 && machine.in_sync.contains(&"b".to_owned())).then_some(())
    })
    .await
    .expect("it is copied");
    // Three nodes have the authority, the first among them.
    wait_for("three nodes admit others", || async {
        let info = store_of(&cluster, "d").await?;
        (info.voters.len() == 3 && info.external.is_some()).then_some(())
    })
    .await
    .expect("it is spread");

    let before = evidence().expect("one copy wrote").epochs;
    cluster.power_off("b");
    wait_for("it runs elsewhere", || async {
        (evidence().expect("one copy wrote").epochs > before).then_some(())
    })
    .await
    .expect("it is restarted");
    writes_on(50).await;
    assert_eq!(evidence().expect("one copy wrote").rewinds, 1);

    // The node that began the cluster fails for good, perhaps with the machine; another one admits
    // a new node.
    wait_for("a third node has its checkpoint", || async {
        let machine = cluster.inspect("d", "w").await.ok()?;
        let mut has = machine.in_sync.iter();
        has.any(|node| node == "c" || node == "d").then_some(())
    })
    .await
    .expect("it is copied");
    cluster.power_off("a");
    let admits = wait_for("another node admits", || async {
        let info = store_of(&cluster, "d").await?;
        let others = info.voters.iter().filter(|it| it.alive && it.node != "a");
        others.map(|voter| voter.address.clone()).next()
    })
    .await
    .expect("there is one");
    let token: Token = cluster
        .client("d")
        .post("/v1/tokens", &TokenRequest::Join { ttl_s: 60 })
        .await
        .expect("a token");
    let state = folder.path().join("without");
    let join = ["join", &admits, "--name", "e", "--token", &token.token];
    let (ok, said) = keel(&state, &[&join[..], &["--listen", "127.0.0.1:0"]].concat());
    assert!(
        !ok && said.contains(&format!("join with `--store {address}`")),
        "{said}"
    );
    // (The token is still good.)
    let joined = cluster
        .join(folder.path(), "e", &admits, &token.token)
        .await;
    joined.expect("it joins");
    cluster.wait_alive("e").await.expect("it is a node");
    wait_for("it runs on a node that is left", || async {
        let machine = cluster.inspect("d", "w").await.ok()?;
        let is_left = machine.node != "a" && machine.node != "b";
        (is_left && machine.status == "running").then_some(())
    })
    .await
    .expect("it is restarted");
    let client = cluster.client("d");
    let moved = keel_testkit::move_by(&client, "w", "e")
        .await
        .expect("it moves");
    assert_eq!(moved.ending, Ending::Moved);
    writes_on(50).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_used_is_refused_before_anything_is_made() {
    let folder = folder();
    let Some(etcd) = Etcd::start(1).expect("etcd") else {
        return;
    };
    let address = etcd.address("one");
    let up = |state: &Path, store: &[&str]| {
        let place = ["up", "--name", "x", "--listen", "127.0.0.1:0", "--detach"];
        keel(state, &[&place[..], store].concat())
    };
    let cluster = LocalCluster::start_with_store(
        Path::new(KEEL),
        folder.path(),
        &["a"],
        &["--store", &address],
    )
    .await;
    let mut cluster = cluster.expect("a cluster");
    let other = folder.path().join("x");
    let nobody = "etcd://127.0.0.1:1";
    for (store, said) in [
        (&["--store", &address][..], "has cluster"),
        (&["--store", "http://a:1"], "is not of the form"),
        (&["--store", "etcd://a:1/b/c"], "has a `/`"),
        (&["--store", nobody], "127.0.0.1:1"),
        (&["--store-user", "u"], "--store"),
        (
            &["--store", &address, "--store-ca", "absent.pem"],
            "absent.pem",
        ),
    ] {
        let (ok, text) = up(&other, store);
        assert!(!ok && text.contains(said), "{store:?}: {text}");
        assert!(!other.join("node.json").exists(), "{store:?}");
    }
    // Backups are as with a store in the nodes; bringing one back is etcd's matter.
    let backup = folder.path().join("backup");
    let file = backup.display().to_string();
    let (ok, said) = keel(&cluster.folder("a"), &["store", "backup", &file]);
    assert!(ok && said.contains("entries"), "{said}");
    cluster.power_off("a");
    let (ok, said) = keel(
        &cluster.folder("a"),
        &["store", "restore", "--others-are-lost", &file],
    );
    assert!(!ok && said.contains("etcd's own snapshots"), "{said}");
    let (ok, said) = keel(&cluster.folder("a"), &["recover", "--others-are-lost"]);
    assert!(ok && said.contains("incarnation 2"), "{said}");
    cluster.power_on("a").await.expect("it starts");
    cluster.wait_alive("a").await.expect("it is a node again");
}

/// With these options for a store at an address no node is made, and what is said has a reason.
fn is_refused(state: &Path, address: &str, options: &[&str], reason: &str) {
    let up = ["up", "--name", "x", "--listen", "127.0.0.1:0", "--detach"];
    let (ok, said) = keel(state, &[&up[..], &["--store", address], options].concat());
    assert!(!ok && said.contains(reason), "{options:?}: {said}");
    assert!(!state.join("node.json").exists(), "{options:?}");
}

/// What nodes were given to reach their etcd they keep: they move machines, and are restarted.
async fn nodes_use(options: &[&str]) {
    let folder = folder();
    let names = ["a", "b"];
    let cluster =
        LocalCluster::start_with_store(Path::new(KEEL), folder.path(), &names, options).await;
    let mut cluster = cluster.expect("a cluster");
    let counter = guest("counter");
    let mut machine = Guest::new("m", "a", &counter, &["1000000", "2"]);
    machine.restart = Restart::Always;
    cluster.run(&machine).await.expect("it starts");
    for node in names {
        cluster.power_off(node);
        cluster.power_on(node).await.expect("it starts");
        cluster.wait_alive(node).await.expect("it is a node again");
    }
    wait_for("the machine runs", || async {
        let machine = cluster.inspect("b", "m").await.ok()?;
        (machine.status == "running").then_some(())
    })
    .await
    .expect("it is restarted");
    let moved = keel_testkit::move_by(&cluster.client("b"), "m", "b").await;
    assert_eq!(moved.expect("it moves").ending, Ending::Moved);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_that_asks_for_a_user_is_used_by_nodes_that_have_one() {
    let folder = folder();
    let Some(etcd) = Etcd::start(1).expect("etcd") else {
        return;
    };
    etcd.ask_for_user("keel", "secret", "site")
        .expect("it asks for a user");
    let address = etcd.address("site");
    let password = |name: &str, text: &str| {
        let file = folder.path().join(name);
        std::fs::write(&file, text).expect("it is written");
        file.display().to_string()
    };
    // A file that an editor wrote ends with a line end.
    let (right, wrong) = (password("right", "secret\n"), password("wrong", "Secret"));
    let user = |password| ["--store-user", "keel", "--store-password-file", password];
    let state = folder.path().join("x");
    for (options, said) in [
        (&[][..], "asks for a user"),
        (&user(&wrong)[..], "authentication failed"),
        (&user("absent")[..], "absent"),
    ] {
        is_refused(&state, &address, options, said);
    }
    nodes_use(&[&["--store", &address][..], &user(&right)].concat()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_that_asks_for_a_certificate_is_used_by_nodes_that_have_one() {
    let folder = folder();
    let certificates = Certificates::new().expect("certificates");
    let Some(etcd) = Etcd::start_encrypted(&certificates).expect("etcd") else {
        return;
    };
    let address = etcd.address("site");
    let file = |name: &str| certificates.file(name).display().to_string();
    let (ca, foreign) = (file("ca.pem"), file("foreign-ca.pem"));
    let (certificate, key) = (file("client.pem"), file("client.key"));
    let client = ["--store-cert", &certificate, "--store-key", &key];
    let state = folder.path().join("x");
    for options in [
        vec![],
        vec!["--store-ca", &ca],
        [&["--store-ca", &foreign][..], &client].concat(),
    ] {
        let member = address
            .trim_start_matches("etcd://")
            .trim_end_matches("/site");
        is_refused(&state, &address, &options, member);
    }
    nodes_use(&[&["--store", &address, "--store-ca", &ca][..], &client].concat()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_store_is_moved_out_of_the_nodes_while_machines_run() {
    let folder = folder();
    let Some(etcd) = Etcd::start(1).expect("etcd") else {
        return;
    };
    let names = ["a", "b", "c"];
    let cluster = LocalCluster::start_replicated(Path::new(KEEL), folder.path(), &names).await;
    let mut cluster = cluster.expect("a cluster");
    let file = folder.path().join("written");
    let args = [file.display().to_string(), "8".into(), "1000".into()];
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let module = guest("witness");
    let witness = Guest {
        volume: Some(folder.path()),
        ha: Some(HighAvailability {
            checkpoint_every_ms: 1000,
            fence: Fence::Timer,
            ..HighAvailability::default()
        }),
        ..Guest::new("w", "b", &module, &args)
    };
    cluster.run(&witness).await.expect("it starts");
    let counter = guest("counter");
    let lines = Guest::new("lines", "c", &counter, &["1000000", "2"]);
    let process = cluster.run(&lines).await.expect("it starts").pid;
    let evidence = || examine(&std::fs::read_to_string(&file).unwrap_or_default());
    let writes_on = async || {
        let before = evidence().expect("one copy wrote").lines;
        wait_for("it writes on", || async {
            let now = evidence().expect("one copy wrote").lines;
            (now >= before + 50).then_some(())
        })
        .await
        .expect("it writes");
    };
    writes_on().await;

    let address = etcd.address("site");
    let migrate = ["store", "migrate", "--store", &address];
    // Not while an agent runs, nor while others hold the store.
    let (ok, said) = keel(&cluster.folder("a"), &migrate);
    assert!(
        !ok && said.contains("another process has it open"),
        "{said}"
    );
    let (ok, said) = keel(&cluster.folder("a"), &["down"]);
    assert!(ok, "{said}");
    let (ok, said) = keel(&cluster.folder("a"), &migrate);
    assert!(!ok && said.contains("keel store voters 1"), "{said}");
    cluster.power_on("a").await.expect("it is up again");

    let (ok, said) = keel(&cluster.folder("a"), &["store", "voters", "1"]);
    assert!(ok, "{said}");
    let last = cluster.wait_voters("a", 1).await.expect("one voter");
    let before = cluster.inspect("a", "w").await.expect("it runs").epoch;
    let (ok, said) = keel(&cluster.folder(&last), &["down"]);
    assert!(ok, "{said}");
    let (ok, said) = keel(&cluster.folder(&last), &migrate);
    assert!(ok && said.contains("incarnation 2"), "{said}");
    let (ok, said) = keel(&cluster.folder(&last), &migrate);
    assert!(!ok && said.contains("already"), "{said}");
    cluster.power_on(&last).await.expect("it is up again");
    for node in names.iter().filter(|node| **node != last) {
        let state = cluster.folder(node);
        let (ok, said) = keel(&state, &["down"]);
        assert!(ok, "{said}");
        // Another cluster's store is none to follow.
        let (ok, said) = keel(&state, &["up", "--store", &etcd.address("other")]);
        assert!(!ok && said.contains("no cluster"), "{said}");
        let (ok, said) = keel(&state, &["up", "--detach", "--store", &address]);
        assert!(ok, "{said}");
    }
    for node in names {
        cluster.wait_alive(node).await.expect("it is a node again");
        let info = store_of(&cluster, node).await.expect("the store answers");
        assert_eq!(info.external.as_ref(), Some(&address));
    }
    writes_on().await;
    let evidence_now = evidence().expect("one copy wrote");
    assert_eq!(evidence_now.rewinds, 0, "it ran on");
    let now = cluster.inspect("a", "lines").await.expect("it is known");
    assert_eq!((now.status.as_str(), now.pid), ("running", process));

    // Epochs only rise, though etcd's revisions began anew.
    let to = if last == "b" { "c" } else { "b" };
    let client = cluster.client("a");
    for (machine, to) in [("w", to), ("w", "a"), ("lines", "b")] {
        if cluster
            .inspect("a", machine)
            .await
            .expect("it is known")
            .node
            == to
        {
            continue;
        }
        let moved = keel_testkit::move_by(&client, machine, to).await;
        assert_eq!(moved.expect("it moves").ending, Ending::Moved);
    }
    writes_on().await;
    let after = cluster.inspect("a", "w").await.expect("it is known").epoch;
    let parts = |epoch: &str| -> (u64, u64) {
        let (incarnation, counter) = epoch.split_once('.').expect("two numbers");
        let number = |text: &str| text.parse().expect("a number");
        (number(incarnation), number(counter))
    };
    assert!(parts(&after) > parts(&before), "{before} to {after}");
    let new = Guest::new("new", "a", &counter, &["1000000", "2"]);
    let created = cluster.run(&new).await.expect("it starts").epoch;
    assert_eq!(parts(&created).0, 2, "{created}");
}
