//! From `keel run --detach` until the machine runs.

use keel_api::{MachineInfo, NodeInfo};
use keel_testkit::{LocalCluster, wait_for};
use std::fmt::Write;
use std::path::Path;
use std::process::{Command, Stdio};

const KEEL: &str = env!("CARGO_BIN_EXE_keel");

/// Number of functions of a program that takes a while to compile.
const FUNCTIONS: usize = 6000;

/// A large program that runs until it is stopped.
fn large() -> Vec<u8> {
    let mut text = String::from("(module (memory 1)\n");
    for number in 0..FUNCTIONS {
        let _ = write!(
            text,
            "(func $f{number} (param $n i32) (result i32) (local $sum i32)
               (loop $again
                 (local.set $sum (i32.add (local.get $sum)
                   (i32.mul (i32.load (local.get $n)) (i32.const {number}))))
                 (i32.store (i32.and (local.get $sum) (i32.const 4095)) (local.get $n))
                 (local.set $n (i32.sub (local.get $n) (i32.const 1)))
                 (br_if $again (i32.gt_s (local.get $n) (i32.const 0))))
               (if (i32.eqz (local.get $sum)) (then (return (i32.const {number}))))
               (i32.rotl (local.get $sum) (i32.clz (local.get $n))))\n"
        );
    }
    text.push_str(
        "(func (export \"_start\") (loop $always (drop (call $f1 (i32.const 9))) (br $always))))",
    );
    wat::parse_str(text).expect("a module")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_starts_is_shown_and_runs_when_detach_returns() {
    let folder = tempfile::Builder::new()
        .prefix("keel-")
        .tempdir()
        .expect("a folder");
    let module = folder.path().join("large.wasm");
    std::fs::write(&module, large()).expect("a file");
    let cluster = LocalCluster::start(Path::new(KEEL), folder.path(), &["a", "b"])
        .await
        .expect("a cluster");
    let state = cluster.folder("b");
    let keel = |args: &[&str]| {
        let mut command = Command::new(KEEL);
        command
            .arg("--state-dir")
            .arg(&state)
            .args(args)
            .stdin(Stdio::null());
        command
    };
    let mut run = keel(&["run", "--detach", "--name", "large", "--on", "a"]);
    let run = run
        .arg(&module)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let run = run.expect("keel runs");

    // Both nodes report the progress.
    let mut last = 0;
    for node in ["a", "b"] {
        let percent = wait_for("a phase with a percentage", || async {
            let machines: Vec<MachineInfo> = cluster.client(node).get("/v1/machines").await.ok()?;
            let phase = machines.first()?.phase.clone()?;
            assert_eq!(machines[0].status, "starting");
            phase.percent.filter(|_| phase.name == "compile")
        })
        .await
        .expect("it compiles");
        assert!(
            (last..=100).contains(&percent),
            "{percent} % after {last} %"
        );
        last = percent;
    }
    let shown = wait_for("keel ps to show it", || async {
        let output = keel(&["ps"]).output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            !text.contains("running"),
            "it ran before it was seen to start: {text}"
        );
        (text.contains("starting (compile ") && text.contains(" %)")).then_some(text)
    });
    shown.await.expect("it is shown");

    let run = run.wait_with_output().expect("keel run ends");
    assert!(run.status.success(), "{run:?}");
    assert_eq!(String::from_utf8_lossy(&run.stdout), "large\n");
    let moved = keel(&["move", "large", "--to", "b"])
        .output()
        .expect("keel move");
    assert!(moved.status.success(), "{moved:?}");
    let info = cluster.inspect("a", "large").await.expect("info");
    assert_eq!((info.node.as_str(), info.phase), ("b", None));
    let nodes: Vec<NodeInfo> = cluster.client("a").get("/v1/nodes").await.expect("nodes");
    assert_eq!(nodes.len(), 2);
}

/// The exit code of `run --detach` tells whether the machine ran.
#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_does_not_start_is_said_by_detach() {
    let folder = tempfile::Builder::new()
        .prefix("keel-")
        .tempdir()
        .expect("a folder");
    let cluster = LocalCluster::start(Path::new(KEEL), folder.path(), &["a"])
        .await
        .expect("a cluster");
    let strange = r#"(module (import "env" "nonsense" (func)) (func (export "_start")))"#;
    let quick = r#"(module (func (export "_start")))"#;
    let run = |name: &str, code: &str, options: &[&str]| {
        let module = folder.path().join(format!("{name}.wasm"));
        std::fs::write(&module, wat::parse_str(code).expect("a module")).expect("a file");
        let mut command = Command::new(KEEL);
        command.arg("--state-dir").arg(cluster.folder("a"));
        command
            .args(["run", "--detach", "--name", name])
            .args(options)
            .arg(module);
        let output = command.stdin(Stdio::null()).output().expect("keel runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (
            output.status.code(),
            text(&output.stdout),
            text(&output.stderr),
        )
    };
    let (code, out, err) = run("strange", strange, &[]);
    assert_eq!((code, out.as_str()), (Some(1), ""), "{err}");
    for part in [
        "machine strange could not be started",
        "nonsense",
        "keel rm strange",
    ] {
        assert!(err.contains(part), "{err}");
    }
    let (code, out, err) = run("again", strange, &["--restart", "always"]);
    assert_eq!((code, out.as_str()), (Some(1), ""), "{err}");
    assert!(err.contains("will be retried"), "{err}");
    // A program that ran counts as started, however short.
    for options in [&[][..], &["--rm"], &["--restart", "always"]] {
        let name = format!("quick{}", options.len() + options.join("").len());
        let (code, out, err) = run(&name, quick, options);
        assert_eq!(
            (code, out),
            (Some(0), format!("{name}\n")),
            "{options:?}: {err}"
        );
    }
}
