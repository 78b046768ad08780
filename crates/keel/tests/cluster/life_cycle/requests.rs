//! What users request of a cluster beside moves, and what they get.

use super::*;

/// A machine is checkpointed, lost with its worker, restored; and cloned.
#[tokio::test(flavor = "multi_thread")]
async fn machines_are_kept_and_made_again() {
    let bench = cluster(&["a", "b"]).await;
    let cluster = &bench.cluster;
    let shared = bench.folder.path().join("kept");
    let place = shared.to_str().expect("a path");
    cluster
        .run(&Guest::new("writer", "a", &guest("writer"), &["8", "2"]))
        .await
        .expect("it starts");
    wait_lines(cluster, "a", "writer", 3).await;
    let take = |more: &[&str]| {
        let args = [&["checkpoint", "writer", "--to", place, "-o", "json"], more].concat();
        let (code, out, err) = keel(&bench, "b", &args);
        assert_eq!(code, 0, "{err}");
        let info: CheckpointInfo = serde_json::from_str(&out).expect("JSON");
        info
    };
    let first = take(&[]);
    assert!(
        first.parent.is_none() && first.stored_bytes >= 8 << 20,
        "{first:?}"
    );
    let before = lines(cluster, "a", "writer").await;
    wait_lines(cluster, "a", "writer", before + 2).await;
    let second = take(&[]);
    assert_eq!(second.parent.as_ref(), Some(&first.id));
    assert!(second.stored_bytes < 6 << 20, "{second:?}");
    // It can still move, and be checkpointed elsewhere: in full, since b does not know what a has
    // stored.
    moved(
        &cluster
            .move_machine("a", "writer", "b")
            .await
            .expect("a report"),
    );
    let third = take(&["--keep", "2"]);
    assert!(third.parent.is_none(), "{third:?}");
    let (_, out, _) = keel(
        &bench,
        "a",
        &["checkpoints", "writer", "--from", place, "-o", "name"],
    );
    // The checkpoint on which the second depends is kept too.
    assert_eq!(out.lines().count(), 3, "{out}");

    let (code, _, err) = keel(&bench, "a", &["restore", "writer", "--from", place]);
    assert!(code != 0 && err.contains("is in use"), "{err}");
    cluster.kill_worker("b", "writer").expect("a worker");
    let ended = cluster
        .wait_end("a", "writer")
        .await
        .expect("it is noticed");
    let ended = epoch(&ended);
    assert_eq!(keel(&bench, "a", &["rm", "writer"]).0, 0);
    let (code, _, err) = keel(
        &bench,
        "b",
        &["restore", "writer", "--from", place, "--on", "a"],
    );
    assert_eq!(code, 0, "{err}");
    wait_for("it continues", || async {
        let output = cluster.output("a", "writer").await.ok()?;
        let first: u64 = output.lines().next()?.parse().ok()?;
        assert!(first > before, "{first} after {before}");
        let next = check_numbered(&output, first).expect("once and in order");
        (next > first + 2).then_some(())
    })
    .await
    .expect("it continues");
    let info = cluster.inspect("a", "writer").await.expect("info");
    assert!(epoch(&info) > ended, "{info:?}, after {ended}");
    let (_, _, notice) = keel(&bench, "a", &["logs", "writer"]);
    assert!(notice.contains("restored from checkpoint"), "{notice}");

    // An older one, under another name, while the other runs.
    let older = [
        "restore", "writer", "--from", place, "--id", &first.id, "--as", "old",
    ];
    assert_eq!(keel(&bench, "b", &older).0, 0);
    let (code, _, err) = keel(&bench, "a", &["clone", "writer", "--as", "copy"]);
    assert_eq!(code, 0, "{err}");
    for (node, name) in [("b", "old"), ("a", "copy")] {
        wait_for("it continues from there", || async {
            let output = cluster.output(node, name).await.ok()?;
            let first: u64 = output.lines().next()?.parse().ok()?;
            assert!(first > 0);
            let next = check_numbered(&output, first).expect("once and in order");
            (next > first + 2).then_some(())
        })
        .await
        .expect("it continues");
    }
    let copy = cluster.inspect("a", "copy").await.expect("info");
    assert!(copy.status == "running" && epoch(&copy) > ended, "{copy:?}");

    let cases: &[(&[&str], &str)] = &[
        (
            &["checkpoint", "writer", "--to", "ftp://x"],
            "not a location for checkpoints",
        ),
        (&["checkpoint", "writer", "--keep", "0"], "0 is not in"),
        (&["checkpoint", "nothing"], "no machine"),
        (&["restore", "nothing"], "has no checkpoint there"),
        (
            &["restore", "writer", "--as", "x", "--id", "../../x"],
            "not the name of a checkpoint",
        ),
        (
            &[
                "restore",
                "writer",
                "--as",
                "x",
                "--id",
                "0000000000001-00000000",
            ],
            "missing",
        ),
        (&["restore", "writer", "--as", "x", "--on", "b"], "--from"),
        (&["clone", "writer", "--as", "writer"], "a name of its own"),
        (&["clone", "writer", "--as", "copy"], "is in use"),
    ];
    for (args, words) in cases {
        let (code, out, err) = keel(&bench, "a", args);
        assert_ne!(code, 0, "{args:?}: {out}");
        assert!(err.contains(words), "{args:?}: {err}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn mistakes_are_answered_by_name_and_harm_nothing() {
    let bench = cluster(&["a", "b"]).await;
    let cluster = &bench.cluster;
    let counter = guest("counter");
    cluster
        .run(&Guest::new("counter", "a", &counter, &["1000000", "2"]))
        .await
        .expect("it starts");
    let folder = bench.folder.path();
    let module = folder.join("counter.wasm");
    std::fs::write(&module, &counter).expect("a file");
    let module = module.to_str().expect("a path");
    let broken = folder.join("broken.wasm");
    std::fs::write(&broken, &counter[..counter.len() / 2]).expect("a file");
    let broken = broken.to_str().expect("a path");
    let cases: &[(&[&str], &str)] = &[
        (&["run", "-d", "--name", "counter", module], "is in use"),
        (&["run", "-d", "--name", "Counter", module], "Counter"),
        (&["run", "-d", "--on", "x", module], "no node"),
        (&["run", "-d", "--memory", "1k", module], "memory limit"),
        (
            &["run", "-d", "--dir", "/nowhere-at-all", module],
            "No such file or directory",
        ),
        (&["run", "-d", "/nowhere.wasm"], "/nowhere.wasm"),
        (&["run", "-d", "/etc/passwd"], "not a WebAssembly module"),
        (&["run", "--name", "broken", broken], "not valid"),
        (&["move", "counter", "--to", "a"], "on a already"),
        (&["move", "counter", "--to", "nowhere"], "no node"),
        (&["move", "nothing", "--to", "b"], "no machine"),
        (&["move", "counter", "--cancel"], "not moving"),
        (&["rm", "counter"], "stop it first"),
        (&["start", "counter"], "only one that has ended"),
        (&["start", "nothing"], "no machine"),
        (&["stop", "nothing"], "no machine"),
        (&["logs", "nothing"], "no machine"),
        (&["inspect", "../../etc"], "keel:"),
        (&["schedule", "nowhere"], "no node"),
        (&["up", "--name", "other"], "already"),
    ];
    for (args, words) in cases {
        let (code, out, err) = keel(&bench, "a", args);
        assert_ne!(code, 0, "{args:?}: {out}");
        assert!(
            err.contains(words),
            "{args:?}: {err:?} does not say {words:?}"
        );
    }
    let info = cluster.inspect("a", "broken").await.expect("info");
    assert_eq!(info.status, "failed");
    let count = lines(cluster, "a", "counter").await;
    wait_lines(cluster, "a", "counter", count).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_has_ended_starts_again() {
    let bench = cluster(&["a", "b"]).await;
    let cluster = &bench.cluster;
    let counter = guest("counter");
    cluster
        .run(&Guest::new("counter", "b", &counter, &["3", "1"]))
        .await
        .expect("it starts");
    let mut before = cluster.wait_end("a", "counter").await.expect("it ends");
    let once = cluster.output("a", "counter").await.expect("output");
    let counter_of = |machine: &MachineInfo| {
        let (_, counter) = machine.epoch.rsplit_once('.').expect("an epoch");
        counter.parse::<u64>().expect("a number")
    };
    for lives in 2..4 {
        let (code, _, err) = keel(&bench, "a", &["start", "counter"]);
        assert_eq!(code, 0, "{err}");
        let now = cluster.wait_end("b", "counter").await.expect("it ends");
        assert_eq!(
            (now.node.as_str(), now.status.as_str()),
            ("b", "exited (0)")
        );
        assert!(counter_of(&now) > counter_of(&before));
        let output = cluster.output("a", "counter").await.expect("output");
        assert_eq!(output, once.repeat(lives));
        before = now;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn exit_codes_output_and_removal() {
    let bench = cluster(&["a"]).await;
    let folder = bench.folder.path();
    let write = |name: &str, text: &str| {
        let path = folder.join(name);
        std::fs::write(&path, wat::parse_str(text).expect("wat")).expect("a file");
        path.to_str().expect("a path").to_owned()
    };
    let seven = write(
        "seven.wasm",
        r#"(module
            (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
            (memory (export "memory") 1)
            (func (export "_start") (call $exit (i32.const 7))))"#,
    );
    let trap = write(
        "trap.wasm",
        r#"(module (memory (export "memory") 1)
            (func $deep unreachable) (func (export "_start") (call $deep)))"#,
    );
    let strange = write(
        "strange.wasm",
        r#"(module (import "env" "magic" (func)) (func (export "_start")))"#,
    );
    let (code, _, err) = keel(&bench, "a", &["run", "--name", "seven", &seven]);
    assert_eq!(code, 7, "{err}");
    let (code, _, err) = keel(&bench, "a", &["run", "--name", "trap", &trap]);
    assert_eq!(code, 134, "{err}");
    assert!(err.contains("unreachable") && err.contains("deep"), "{err}");
    let (code, _, err) = keel(&bench, "a", &["run", "--name", "strange", &strange]);
    assert_eq!(code, 1);
    assert!(err.contains("env.magic"), "{err}");
    let (_, out, _) = keel(&bench, "a", &["ps", "-a", "-o", "json"]);
    let machines: Vec<MachineInfo> = serde_json::from_str(&out).expect("JSON");
    assert_eq!(machines.len(), 3);
    assert_eq!(keel(&bench, "a", &["rm", "seven", "trap", "strange"]).0, 0);
    // Its exit code is known, and its name free at once.
    for _ in 0..3 {
        let (code, _, err) = keel(&bench, "a", &["run", "--rm", "--name", "seven", &seven]);
        assert_eq!(code, 7, "{err}");
    }
    let (code, _, err) = keel(&bench, "a", &["run", "-d", "--rm", &seven]);
    assert_eq!(code, 0, "{err}");
    wait_for("it is removed", || async {
        let machines: Vec<MachineInfo> =
            bench.cluster.client("a").get("/v1/machines").await.ok()?;
        machines.is_empty().then_some(())
    })
    .await
    .expect("it is gone");
}

#[tokio::test(flavor = "multi_thread")]
async fn users_come_in_over_tls_with_a_token_and_its_role_only() {
    let folder = tempfile::tempdir().expect("a folder");
    let probe = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let api = probe.local_addr().expect("an address").to_string();
    drop(probe);
    let state = folder.path().join("a");
    let (up, _) = (
        Command::new(KEEL)
            .arg("--state-dir")
            .arg(&state)
            .args([
                "up",
                "--name",
                "a",
                "--listen",
                "127.0.0.1:0",
                "--api",
                &api,
                "-d",
            ])
            .output()
            .expect("keel runs"),
        (),
    );
    assert!(
        up.status.success(),
        "{}",
        String::from_utf8_lossy(&up.stderr)
    );
    let _guard = Stop(String::from_utf8_lossy(&up.stdout).trim().to_owned());
    let local = Client::socket(state.join("api.socket"));
    let token = |role: &str| {
        let request = TokenRequest::User {
            name: "ada".into(),
            role: role.into(),
            ttl_s: None,
        };
        let local = local.clone();
        async move {
            local
                .post::<_, Token>("/v1/tokens", &request)
                .await
                .expect("a token")
        }
    };
    let viewer = token("viewer").await;
    let authority = viewer.authority.parse().expect("a fingerprint");
    let as_viewer = Client::tls(&api, &viewer.token, authority).expect("a client");
    let nodes: Vec<NodeInfo> = as_viewer.get("/v1/nodes").await.expect("nodes");
    assert_eq!(nodes.len(), 1);
    let refused = as_viewer
        .post::<_, serde_json::Value>("/v1/machines/x/stop", &())
        .await
        .expect_err("a viewer stops nothing");
    assert!(refused.to_string().contains("role operator"), "{refused}");
    let refused = as_viewer
        .get::<keel_api::FileStat>("/v1/machines/lines/files/stat?path=/")
        .await
        .expect_err("nor reads files");
    assert!(refused.to_string().contains("operator"), "{refused}");
    let nobody = Client::tls(&api, "keelu1-nonsense", authority).expect("a client");
    let refused = nobody
        .get::<Vec<NodeInfo>>("/v1/nodes")
        .await
        .expect_err("no valid token");
    assert!(refused.to_string().contains("no valid token"), "{refused}");
    // A server of another cluster is rejected.
    let other = keel_net::Fingerprint([7; 32]);
    let foreign = Client::tls(&api, &viewer.token, other).expect("a client");
    assert!(foreign.get::<Vec<NodeInfo>>("/v1/nodes").await.is_err());
}

/// Stops a node that was started in the background.
struct Stop(String);

impl Drop for Stop {
    fn drop(&mut self) {
        if let Some(pid) = self.0.parse().ok().and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn machines_are_started_again_as_their_policy_says() {
    let bench = cluster(&["a"]).await;
    let cluster = &bench.cluster;
    let (counter, hostile) = (guest("counter"), guest("hostile"));
    let with = |name, module, args, restart| {
        let mut guest = Guest::new(name, "a", module, args);
        guest.restart = restart;
        guest
    };
    let always = with("always", &counter, &["3", "1"][..], Restart::Always);
    let failing = with("failing", &hostile, &["exit", "7"][..], Restart::OnFailure);
    let done = with("done", &counter, &["3", "1"][..], Restart::OnFailure);
    let begun = epoch(&cluster.run(&always).await.expect("it starts"));
    for guest in [&failing, &done] {
        cluster.run(guest).await.expect("it starts");
    }
    for name in ["always", "failing"] {
        wait_for(&format!("{name} is restarted"), || async {
            let info = cluster.inspect("a", name).await.ok()?;
            (info.restarts >= 2 && epoch(&info) > begun).then_some(())
        })
        .await
        .expect("restarts");
    }
    let info = cluster.wait_end("a", "done").await.expect("its end");
    assert_eq!((info.status.as_str(), info.restarts), ("exited (0)", 0));
    // Its earlier output stays, with a note about the restart.
    let (_, out, err) = keel(&bench, "a", &["logs", "always"]);
    assert!(out.starts_with("0\n1\n2\n0\n1\n"), "{out}");
    let second = begun.next();
    let notice = format!(
        "keel: restart 1 under epoch {second}, since it exited with code 0; it starts from its beginning"
    );
    assert!(err.contains(&notice), "{err}");
    // Machines that were ended by a command stay ended, also while they wait for a restart.
    for name in ["always", "failing"] {
        let (code, out, err) = keel(&bench, "a", &["stop", name]);
        assert_eq!(code, 0, "{name}: {out}{err}");
        let epoch = cluster.inspect("a", name).await.expect("info").epoch;
        tokio::time::sleep(Duration::from_millis(700)).await;
        let info = cluster.inspect("a", name).await.expect("info");
        // It may have ended by itself just before.
        assert!(!info.is_live(), "{info:?}");
        assert_eq!(info.epoch, epoch);
    }

    // A machine with a lost worker continues from its newest checkpoint.
    let lost = with("lost", &counter, &["1000000", "2"][..], Restart::OnFailure);
    cluster.run(&lost).await.expect("it starts");
    wait_lines(cluster, "a", "lost", 50).await;
    assert_eq!(keel(&bench, "a", &["checkpoint", "lost"]).0, 0);
    let kept = lines(cluster, "a", "lost").await;
    wait_lines(cluster, "a", "lost", kept + 50).await;
    cluster.kill_worker("a", "lost").expect("a worker");
    wait_for("it is running again", || async {
        let info = cluster.inspect("a", "lost").await.ok()?;
        (info.status == "running" && info.restarts == 1).then_some(())
    })
    .await
    .expect("a restart");
    let again = wait_for("it writes on", || async {
        let text = cluster.output("a", "lost").await.ok()?;
        let numbers: Vec<u64> = text.lines().filter_map(|line| line.parse().ok()).collect();
        let back = numbers.windows(2).position(|pair| pair[1] != pair[0] + 1)?;
        (numbers.len() > back + 30).then(|| numbers[back + 1])
    })
    .await
    .expect("lines");
    assert!((40..=kept).contains(&again), "{again} after {kept}");
    // A kill by command is no failure.
    assert_eq!(keel(&bench, "a", &["kill", "lost"]).0, 0);
    let info = cluster.inspect("a", "lost").await.expect("info");
    assert_eq!(info.status, "stopped");
    let (code, _, err) = keel(
        &bench,
        "a",
        &["run", "--rm", "--restart", "always", "x.wasm"],
    );
    assert_eq!(code, 2, "{err}");
}
