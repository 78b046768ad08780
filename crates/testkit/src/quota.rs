//! Nodes with a CPU quota: each node of a cluster in a control group of its own, so that the
//! capacities of several nodes on one computer are independent.

use anyhow::{Context, Result};
use keel_machine::cgroup::Layout;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const PERIOD_MICROS: u64 = 20_000;

/// Groups with quotas, by node. Removed on drop, once their processes have ended.
#[derive(Debug)]
pub struct Quotas {
    groups: BTreeMap<String, PathBuf>,
}

impl Quotas {
    /// Creates a group for each node, with a quota in cores.
    ///
    /// # Errors
    /// If this user may not create such groups here; the test is skipped then.
    pub fn new(cores: &[(&str, f64)]) -> Result<Self> {
        let layout = Layout::read().context("the layout of control groups")?;
        let places = layout.places(&layout.on_unified());
        let base = places
            .iter()
            .find(|(_, controllers)| controllers.contains("cpu"))
            .map(|(folder, _)| folder.clone())
            .context("no cpu controller here: nodes cannot be given a CPU quota")?;
        let mut quotas = Quotas {
            groups: BTreeMap::new(),
        };
        let tag = format!("keel-test-{:08x}", rand::random::<u32>());
        for (node, cores) in cores {
            let folder = base.join(format!("{tag}-{node}"));
            let rights = || {
                format!(
                    "{}: nodes cannot be given a CPU quota here (root, or a delegated group, is needed)",
                    folder.display()
                )
            };
            std::fs::create_dir(&folder).with_context(rights)?;
            quotas.groups.insert((*node).to_owned(), folder.clone());
            limit(&folder, *cores).with_context(rights)?;
        }
        Ok(quotas)
    }

    /// A command in its node's group; arguments may be added.
    pub(crate) fn command(&self, node: &str, inner: Command) -> Command {
        let Some(group) = self.groups.get(node) else {
            return inner;
        };
        let mut command = Command::new("sh");
        command
            .arg("-c")
            .arg("echo $$ > \"$0\" && exec \"$@\"")
            .arg(group.join("cgroup.procs"))
            .arg(inner.get_program())
            .args(inner.get_args());
        command
    }
}

fn limit(folder: &Path, cores: f64) -> std::io::Result<()> {
    let quota = (cores * PERIOD_MICROS as f64) as u64;
    if folder.join("cpu.max").exists() {
        return std::fs::write(folder.join("cpu.max"), format!("{quota} {PERIOD_MICROS}"));
    }
    std::fs::write(folder.join("cpu.cfs_period_us"), PERIOD_MICROS.to_string())?;
    std::fs::write(folder.join("cpu.cfs_quota_us"), quota.to_string())
}

impl Drop for Quotas {
    fn drop(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(5);
        for group in self.groups.values() {
            // Its processes were killed; the kernel may need a moment.
            while group.exists() && std::fs::remove_dir(group).is_err() {
                if Instant::now() > deadline {
                    break;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}
