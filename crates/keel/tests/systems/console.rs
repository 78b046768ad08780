//! A system's console: what is typed at a terminal or comes from a file reaches it in order, also
//! beside moves.

use super::scripted::{NAME, Scripted};
use anyhow::{Context, Result};
use keel_machine::moves::Ending;
use keel_testkit::wait_for;
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// A shell on the console.
const SHELL: &str = "#!/bin/sh\nexec </dev/ttyS0 >/dev/ttyS0 2>&1; echo shell begins; exec sh\n";
const BEGINS: &str = "shell begins";

/// `keel console` in a terminal.
struct Session {
    keel: Child,
    terminal: File,
    shown: Arc<Mutex<Vec<u8>>>,
}

impl Session {
    fn begin(system: &Scripted, via: &str) -> Result<Self> {
        let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
        grantpt(&terminal)?;
        unlockpt(&terminal)?;
        let name = ptsname(&terminal, Vec::new())?;
        let path = std::ffi::OsStr::from_bytes(name.to_bytes());
        let open = || OpenOptions::new().read(true).write(true).open(path);
        let mut command = system.keel(via, &["console", NAME]);
        let command = command.stdin(open()?).stdout(open()?).stderr(open()?);
        let keel = command.spawn()?;
        let terminal = File::from(terminal);
        let shown = Arc::<Mutex<Vec<u8>>>::default();
        let (mut reader, text) = (terminal.try_clone()?, shown.clone());
        std::thread::spawn(move || {
            let mut piece = [0; 4096];
            // Reading fails once nobody has the other end.
            while let Ok(count @ 1..) = reader.read(&mut piece) {
                text.lock().unwrap().extend_from_slice(&piece[..count]);
            }
        });
        Ok(Session {
            keel,
            terminal,
            shown,
        })
    }

    async fn shows(&self, what: &str) -> Result<()> {
        let shown = wait_for("the terminal shows it", || async {
            let shown = self.shown.lock().unwrap();
            String::from_utf8_lossy(&shown).contains(what).then_some(())
        });
        shown.await.with_context(|| {
            let shown = self.shown.lock().unwrap();
            format!("{what:?} in {:?}", String::from_utf8_lossy(&shown))
        })
    }

    fn echoes(&self) -> Result<bool> {
        Ok(tcgetattr(&self.terminal)?
            .local_modes
            .contains(LocalModes::ECHO))
    }
}

/// A system at whose console a shell waits; none where no system can run.
async fn with_shell(options: &[&str]) -> Result<Option<Scripted>> {
    let Some(system) = Scripted::start().await? else {
        return Ok(None);
    };
    system.run(SHELL, options)?;
    wait_for("a shell", || async {
        system.output().await?.contains(BEGINS).then_some(())
    })
    .await?;
    Ok(Some(system))
}

/// A session at the node `b`, at which something was typed.
async fn session_of(system: &Scripted) -> Result<Session> {
    let mut session = Session::begin(system, "b")?;
    session.shows("Ctrl-] leaves it").await?;
    session.terminal.write_all(b"echo answer $((6 * 7))\r")?;
    session.shows("answer 42").await?;
    assert!(!session.echoes()?, "the system itself echoes");
    Ok(session)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_system_is_used_at_its_console_while_it_moves() -> Result<()> {
    let Some(system) = with_shell(&[]).await? else {
        return Ok(());
    };
    // The machine is at the other node.
    let mut session = session_of(&system).await?;
    // Small lines, of which each counts, from before the machine moves there and back until after.
    let typing = system
        .keel("a", &["console", NAME])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    let mut typing = typing?;
    let mut input = typing.stdin.take().context("its input")?;
    const BLOCK: usize = 50;
    let block = "n=$((n + 1))\n".repeat(BLOCK) + "echo counted $n lines\n";
    let (moves, has_moved) = (AtomicUsize::new(0), AtomicBool::new(false));
    let typed = async {
        let (mut blocks, mut beside_moves) = (0, 0);
        while !has_moved.load(Ordering::Acquire) {
            let before = moves.load(Ordering::Acquire);
            input.write_all(block.as_bytes())?;
            blocks += 1;
            let counted = format!("counted {} lines", blocks * BLOCK);
            session.shows(&counted).await?;
            beside_moves += usize::from(moves.load(Ordering::Acquire) != before);
        }
        assert!(
            beside_moves > 0,
            "of {blocks} blocks, one at the end of a move"
        );
        drop(input);
        Ok::<_, anyhow::Error>(())
    };
    let moved = async {
        for to in ["b", "a"] {
            let report = system.cluster.move_machine("a", NAME, to).await?;
            assert_eq!(report.ending, Ending::Moved, "{}", report.line());
            moves.fetch_add(1, Ordering::AcqRel);
        }
        has_moved.store(true, Ordering::Release);
        Ok(())
    };
    tokio::try_join!(typed, moved)?;
    let typed = typing.wait_with_output()?;
    let said = String::from_utf8_lossy(&typed.stderr);
    assert!(typed.status.success(), "{said}");

    session.terminal.write_all(b"\x1d")?;
    assert!(session.keel.wait()?.success());
    assert!(session.echoes()?, "the terminal is as before");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_console_is_left_although_its_system_takes_nothing() -> Result<()> {
    let Some(system) = with_shell(&[]).await? else {
        return Ok(());
    };
    let mut left = session_of(&system).await?;
    let mut ended = session_of(&system).await?;
    system.cluster.stop_worker("a", NAME, true)?;
    left.terminal.write_all(b"echo never\r\x1d")?;
    left.shows("has not taken all that was typed").await?;
    assert!(!left.keel.wait()?.success());
    assert!(left.echoes()?, "the terminal is as before");

    let pid = Pid::from_child(&ended.keel);
    kill_process(pid, Signal::TERM)?;
    assert_eq!(ended.keel.wait()?.code(), Some(128 + 15));
    assert!(ended.echoes()?, "the terminal is as before");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_console_outlives_an_agent_and_ends_with_its_boot() -> Result<()> {
    let Some(system) = with_shell(&["--restart", "always"]).await? else {
        return Ok(());
    };
    let mut session = session_of(&system).await?;
    system.cluster.kill_agent("a")?;
    session
        .terminal
        .write_all(b"n=$((n + 1)); echo typed $n times\r")?;
    session.shows("typed 1 times").await?;
    // What comes after the end is not for the next boot.
    session.terminal.write_all(b"poweroff -f\r")?;
    wait_for("another boot", || async {
        let output = system.output().await?;
        (output.matches(BEGINS).count() == 2).then_some(())
    })
    .await?;
    session.terminal.write_all(b"echo never\r")?;
    session.shows("has begun anew").await?;
    assert!(!session.keel.wait()?.success());
    assert!(
        !system
            .output()
            .await
            .context("its output")?
            .contains("echo never")
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_console_ends_with_its_system() -> Result<()> {
    let Some(system) = with_shell(&[]).await? else {
        return Ok(());
    };
    let mut session = session_of(&system).await?;
    system.keel("a", &["kill", NAME]).output()?;
    session.shows("has ended").await?;
    assert!(!session.keel.wait()?.success());
    assert!(session.echoes()?, "the terminal is as before");
    Ok(())
}
