//! Commands are executed in a system by its guest agent.

use super::scripted::{NAME, Scripted};
use anyhow::{Context, Result, ensure};
use keel_machine::moves::Ending;
use keel_testkit::wait_for;
use std::io::Write;
use std::path::Path;
use std::process::{Output, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

/// Does nothing for ever.
const SCRIPT: &str = "#!/bin/sh\n";
/// Ends once its file is there.
const WAITS: &str = "touch /run/waits; while [ ! -e /run/go ]; do usleep 20000; done; echo went; echo late >&2; exit 7";

fn said(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let code = output.status.code();
    (code, text(&output.stdout), text(&output.stderr))
}

/// What `keel exec` says of a command; asked at the node `via`.
fn exec(system: &Scripted, via: &str, arguments: &[&str]) -> Result<(Option<i32>, String, String)> {
    let mut command = system.keel(via, &["exec"]);
    Ok(said(&command.args(arguments).output()?))
}

/// Waits until the agent of the system answers.
async fn agent_answers(system: &Scripted) -> Result<()> {
    let answers = wait_for("its agent answers", || async {
        let asked = exec(system, "a", &[NAME, "--", "true"]).ok()?;
        (asked.0 == Some(0)).then_some(())
    });
    answers.await
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_are_executed_in_a_system_that_moves() -> Result<()> {
    let Some(system) = Scripted::start_with_agent().await? else {
        return Ok(());
    };
    system.run(SCRIPT, &[])?;
    executes_commands(&system).await
}

/// The agent of Evenkeel, in a system that has none.
#[tokio::test(flavor = "multi_thread")]
async fn a_system_installs_the_agent_that_it_is_given() -> Result<()> {
    let program = Path::new(env!("CARGO_BIN_EXE_keel")).with_file_name("keel-guest");
    if !program.exists() {
        eprintln!("skipped: no keel-guest here (`cargo xtask guest-agent` builds it)");
        return Ok(());
    }
    let Some(system) = Scripted::start().await? else {
        return Ok(());
    };
    let contrary = ["--install-guest-agent", "true", "--guest-agent", "false"];
    let refused = format!("{:#}", system.run(SCRIPT, &contrary).unwrap_err());
    assert!(refused.contains("needs its port"), "{refused}");
    system.run(
        SCRIPT,
        &["--install-guest-agent", "true", "--shutdown", "600s"],
    )?;
    executes_commands(&system).await?;
    let (_, page, _) = said(&system.keel("a", &["describe", NAME]).output()?);
    let told = page
        .lines()
        .any(|line| line.trim_start().starts_with("load "));
    assert!(told, "{page}");
    // Its system does not heed the power button.
    system.keel("a", &["stop", NAME]).output()?;
    let info = system.cluster.wait_end("a", NAME).await?;
    assert_eq!(info.status, "stopped");
    Ok(())
}

/// What a guest agent executes, also while its system moves.
async fn executes_commands(system: &Scripted) -> Result<()> {
    agent_answers(system).await?;
    let words = [
        NAME,
        "--",
        "sh",
        "-c",
        "echo \"$0 $1\"; exit 3",
        "a  b",
        "$HOME",
    ];
    let expected = (Some(3), "a  b $HOME\n".to_owned(), String::new());
    assert_eq!(exec(system, "b", &words)?, expected);
    let (_, page, _) = said(&system.keel("b", &["describe", NAME]).output()?);
    let (_, kernel, _) = exec(system, "a", &[NAME, "--", "uname", "-r"])?;
    let told = page.lines().find(|line| line.contains("its kernel"));
    assert!(told.is_some_and(|it| it.contains(kernel.trim())), "{page}");
    let environment = [
        "--env",
        "A=b c",
        NAME,
        "--",
        "/bin/sh",
        "-c",
        "echo \"$A\" >&2; kill -9 $$",
    ];
    let expected = (Some(137), String::new(), "b c\n".to_owned());
    assert_eq!(exec(system, "a", &environment)?, expected);
    let mut cat = system.keel("b", &["exec", "--input", NAME, "--", "cat"]);
    let cat = cat.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut cat = cat.stderr(Stdio::piped()).spawn()?;
    let input = vec![0xff; 100_000];
    cat.stdin.take().context("its input")?.write_all(&input)?;
    let output = cat.wait_with_output()?;
    assert!(
        output.status.success() && output.stdout == input,
        "{:?}",
        said(&output).2
    );

    // A command that runs goes along.
    let mut waits = system.keel("b", &["exec", NAME, "--", "sh", "-c", WAITS]);
    let waits = waits
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    wait_for("it was started", || async {
        let looked = exec(system, "a", &[NAME, "--", "test", "-e", "/run/waits"]).ok()?;
        (looked.0 == Some(0)).then_some(())
    })
    .await?;
    let report = system.cluster.move_machine("a", NAME, "b").await?;
    assert_eq!(report.ending, Ending::Moved, "{}", report.line());
    let (code, _, error) = exec(system, "a", &[NAME, "--", "touch", "/run/go"])?;
    assert_eq!(code, Some(0), "{error}");
    let expected = (Some(7), "went\n".to_owned(), "late\n".to_owned());
    assert_eq!(said(&waits.wait_with_output()?), expected);

    // Of much output the beginning is passed on, and the end of the command is known.
    let much = "head -c 3000000 /dev/zero; head -c 3000000 /dev/zero >&2; exit 4";
    let (code, output, error) = exec(system, "a", &[NAME, "--", "sh", "-c", much])?;
    assert_eq!((code, output.len()), (Some(4), 1 << 20));
    assert!(error.ends_with("keel: the command printed more than is shown here\n"));

    // What cannot be.
    let (code, _, error) = exec(system, "a", &[NAME, "--", "no-such-program"])?;
    assert_eq!(code, Some(255));
    assert!(error.contains("guest agent refuses"), "{error}");
    let (code, _, error) = exec(system, "a", &["nobody", "--", "true"])?;
    assert_eq!(code, Some(255));
    assert!(error.contains("nobody"), "{error}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_system_has_the_time_of_its_host() -> Result<()> {
    let Some(system) = Scripted::start_with_agent().await? else {
        return Ok(());
    };
    system.run(SCRIPT, &[])?;
    agent_answers(&system).await?;
    let long_ago = [NAME, "--", "date", "-s", "@1000000000"];
    let (code, _, error) = exec(&system, "a", &long_ago)?;
    assert_eq!(code, Some(0), "{error}");
    let place = system.path("checkpoints")?;
    for arguments in [
        &["checkpoint", NAME, "--to", &place][..],
        &["rm", "--force", NAME],
        &["restore", NAME, "--from", &place, "--detach"],
    ] {
        let done = system.keel("a", arguments).output()?;
        ensure!(done.status.success(), "{done:?}");
    }
    let is_right = wait_for("it has the time", || async {
        let asked = SystemTime::now().duration_since(UNIX_EPOCH).ok()?.as_secs();
        let (_, output, _) = exec(&system, "a", &[NAME, "--", "date", "+%s"]).ok()?;
        let there: u64 = output.trim().parse().ok()?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?.as_secs();
        (asked - 2..=now + 2).contains(&there).then_some(())
    });
    is_right.await
}

/// Its system does not heed the power button, and its power would be cut much later.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_shuts_its_system_down() -> Result<()> {
    let Some(system) = Scripted::start_with_agent().await? else {
        return Ok(());
    };
    let shutdown = ["--shutdown", "600s"];
    system.run(SCRIPT, &shutdown)?;
    agent_answers(&system).await?;
    // It may take longer than the command waits.
    system.keel("a", &["stop", NAME]).output()?;
    let info = system.cluster.wait_end("a", NAME).await?;
    assert_eq!(info.status, "stopped");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_system_without_an_agent_executes_nothing() -> Result<()> {
    let Some(system) = Scripted::start().await? else {
        return Ok(());
    };
    system.run(SCRIPT, &["--guest-agent", "false", "--shutdown", "1s"])?;
    let (code, _, error) = exec(&system, "b", &[NAME, "--", "true"])?;
    assert_eq!(code, Some(255));
    assert!(error.contains("no port for a guest agent"), "{error}");
    let (_, page, _) = said(&system.keel("b", &["describe", NAME]).output()?);
    assert!(!page.contains("System inside"), "{page}");
    let removed = system.keel("a", &["rm", "--force", NAME]).output()?;
    ensure!(removed.status.success(), "{:?}", said(&removed));
    // One that has the port, and nobody who reads it.
    system.run(SCRIPT, &[])?;
    let (_, page, _) = said(&system.keel("b", &["describe", NAME]).output()?);
    assert!(page.contains("no guest agent runs in it"), "{page}");
    let counter = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guests/counter.wasm");
    let counter = counter.to_str().context("a path of UTF-8")?;
    let run = system
        .keel("a", &["run", "-d", "--name", "m", counter])
        .output()?;
    ensure!(run.status.success(), "{:?}", said(&run));
    let (code, _, error) = exec(&system, "b", &["m", "--", "true"])?;
    assert_eq!(code, Some(255));
    assert!(error.contains("of kind wasm"), "{error}");
    Ok(())
}
