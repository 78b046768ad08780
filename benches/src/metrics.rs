//! A node's figures, as it says them in `/metrics`.

use anyhow::{Context, Result};
use keel_testkit::LocalCluster;

/// The metrics of one node at one moment.
pub(crate) struct Metrics(String);

impl Metrics {
    /// Asks a node.
    ///
    /// # Errors
    /// If it does not answer, or not with text.
    pub(crate) async fn of(cluster: &LocalCluster, node: &str) -> Result<Self> {
        let mut answer = cluster.client(node).get_stream("/metrics").await?;
        let mut bytes = Vec::new();
        while let Some(chunk) = answer.chunk().await? {
            bytes.extend_from_slice(&chunk);
        }
        Ok(Metrics(String::from_utf8(bytes)?))
    }

    /// The value of a metric without labels.
    ///
    /// # Errors
    /// If the node has none of that name, or it is no number.
    pub(crate) fn value(&self, name: &str) -> Result<f64> {
        let value = self.0.lines().find_map(|line| {
            let (found, value) = line.split_once(' ')?;
            (found == name).then_some(value)
        });
        Ok(value
            .with_context(|| format!("{name} is missing"))?
            .trim()
            .parse()?)
    }
}
