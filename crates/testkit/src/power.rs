//! Nodes of a [`LocalCluster`] that are switched off and on again.

use super::LocalCluster;
use anyhow::Result;
use rustix::process::Signal;
use std::time::Duration;

impl LocalCluster {
    /// Kills all processes of a node at once, as if its computer were switched off.
    pub fn power_off(&mut self, name: &str) {
        // Processes may start others during the loop.
        for _ in 0..5 {
            if self.signal(name, Signal::KILL, &|_| true) == 0 {
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        if let Some(node) = self.nodes.get_mut(name)
            && let Some(mut parent) = node.parent.take()
        {
            // Reaps the process.
            let _ = parent.wait();
        }
    }

    /// Restarts a node that was switched off.
    ///
    /// # Errors
    /// The log of a node that did not start.
    pub async fn power_on(&mut self, name: &str) -> Result<()> {
        self.power_on_all(&[name]).await
    }

    /// Restarts nodes that were switched off, in this order; none waits for another one.
    ///
    /// # Errors
    /// The log of a node that did not start.
    pub async fn power_on_all(&mut self, names: &[&str]) -> Result<()> {
        self.power_on_with(names, &[]).await
    }

    /// Restarts nodes with options of `keel up`.
    ///
    /// # Errors
    /// The log of a node that did not start.
    pub async fn power_on_with(&mut self, names: &[&str], options: &[&str]) -> Result<()> {
        for name in names {
            let folder = self.folder(name);
            // The socket of the dead agent would be mistaken for an answer.
            let _ = std::fs::remove_file(folder.join("api.socket"));
            let mut command = self.command(name, &folder)?;
            command.arg("up").args(options);
            self.launch(name, folder, command)?;
        }
        for name in names {
            self.wait_answers(name).await?;
        }
        Ok(())
    }
}
