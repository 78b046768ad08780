//! `cargo xtask package`: one archive for servers with the binary, the guest agent, the manual, completions, the
//! service and licences. The packaged binary itself generates the pages and completions.

use crate::command::{check, guest_agent, keel, root};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::Path;
use std::process::Command;

/// Shells, with the folder of their completions below `share`.
const COMPLETIONS: [(&str, &str); 3] = [
    ("bash", "bash-completion/completions/keel"),
    ("zsh", "zsh/site-functions/_keel"),
    ("fish", "fish/vendor_completions.d/keel.fish"),
];
const TEXTS: [&str; 4] = ["README.md", "CHANGELOG.md", "LICENSE-APACHE", "LICENSE-MIT"];

/// Builds `target/package/keel-VERSION-ARCH.tar.gz`, and prints its path.
pub(crate) fn make() -> Result<()> {
    let (keel, guest_agent) = (keel()?, guest_agent()?);
    let name = format!(
        "keel-{}-{}",
        env!("CARGO_PKG_VERSION"),
        std::env::consts::ARCH
    );
    let place = root().join("target/package");
    let stage = place.join(&name);
    if stage.exists() {
        fs::remove_dir_all(&stage).with_context(|| stage.display().to_string())?;
    }
    fill(&stage, &keel, &guest_agent)?;
    let archive = place.join(format!("{name}.tar.gz"));
    check(
        Command::new("tar")
            .current_dir(&place)
            .args([
                "--create",
                "--gzip",
                "--sort=name",
                "--owner=0",
                "--group=0",
            ])
            .args(["--numeric-owner", "--file"])
            .arg(&archive)
            .arg(&name),
    )?;
    println!("{}", archive.display());
    Ok(())
}

fn fill(stage: &Path, keel: &Path, guest_agent: &Path) -> Result<()> {
    let folder = |path: &str| -> Result<std::path::PathBuf> {
        let folder = stage.join(path);
        fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        Ok(folder)
    };
    let copy = |source: &Path, target: &Path| -> Result<()> {
        let copied = fs::copy(source, target);
        copied
            .map(drop)
            .with_context(|| format!("{} to {}", source.display(), target.display()))
    };
    copy(keel, &folder("bin")?.join("keel"))?;
    // `keel` looks for it beside itself.
    copy(guest_agent, &folder("bin")?.join("keel-guest"))?;
    check(Command::new(keel).arg("man").arg(folder("share/man/man1")?))?;
    for (shell, path) in COMPLETIONS {
        let made = Command::new(keel).args(["completions", shell]).output()?;
        ensure!(
            made.status.success(),
            "completions for {shell}: {}",
            made.status
        );
        let target = stage.join("share").join(path);
        fs::create_dir_all(target.parent().context("a completion's folder")?)?;
        fs::write(target, made.stdout)?;
    }
    let unit = root().join("packaging/keel.service");
    copy(&unit, &folder("lib/systemd/system")?.join("keel.service"))?;
    let texts = folder("share/doc/keel")?;
    for text in TEXTS {
        copy(&root().join(text), &texts.join(text))?;
    }
    Ok(())
}
