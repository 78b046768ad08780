//! A system's console: what is typed at a terminal or comes from a file reaches it in order, also
//! beside moves.

use super::scripted::{NAME, Scripted};
use anyhow::{Context, Result};
use keel_machine::moves::Ending;
use keel_testkit::wait_for;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::process::{Child, Stdio};
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
async fn with_shell() -> Result<Option<Scripted>> {
    let Some(system) = Scripted::start().await? else {
        return Ok(None);
    };
    system.run(SHELL, &[])?;
    wait_for("a shell", || async {
        system.output().await?.contains(BEGINS).then_some(())
    })
    .await?;
    Ok(Some(system))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_system_is_used_at_its_console_while_it_moves() -> Result<()> {
    let Some(system) = with_shell().await? else {
        return Ok(());
    };
    // At the node that does not have it.
    let mut session = Session::begin(&system, "b")?;
    session.shows("Ctrl-] leaves it").await?;
    session.terminal.write_all(b"echo answer $((6 * 7))\r")?;
    session.shows("answer 42").await?;
    assert!(!session.echoes()?, "the system itself echoes");

    // Many small lines, of which each counts, while it moves there and back.
    let lines = 300;
    let mut file = "n=$((n + 1))\n".repeat(lines);
    file += "echo counted $n\n";
    let path = system.write("input", file.as_bytes())?;
    let mut typing = system.keel("a", &["console", NAME]);
    let typing = typing
        .stdin(File::open(path)?)
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let typing = typing.spawn()?;
    for to in ["b", "a"] {
        let report = system.cluster.move_machine("a", NAME, to).await?;
        assert_eq!(report.ending, Ending::Moved, "{}", report.line());
    }
    let typed = typing.wait_with_output()?;
    let said = String::from_utf8_lossy(&typed.stderr);
    assert!(typed.status.success(), "{said}");
    session.shows(&format!("counted {lines}")).await?;

    session.terminal.write_all(b"\x1d")?;
    assert!(session.keel.wait()?.success());
    assert!(session.echoes()?, "the terminal is as before");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_console_ends_with_its_system() -> Result<()> {
    let Some(system) = with_shell().await? else {
        return Ok(());
    };
    let mut session = Session::begin(&system, "b")?;
    session.shows("Ctrl-] leaves it").await?;
    system.keel("a", &["kill", NAME]).output()?;
    session.shows("has ended").await?;
    assert!(!session.keel.wait()?.success());
    assert!(session.echoes()?, "the terminal is as before");
    Ok(())
}
