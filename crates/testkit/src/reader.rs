//! A reader that follows a machine's output from whichever node answers, and appends what it sees to
//! a file: what a user saw, whatever became of the machine and of the nodes.

use anyhow::{Context, Result, bail};
use keel_api::Client;
use keel_machine::log::{StreamKind, offset_behind, split_records};
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

/// How long a node may be silent before another one is asked.
const PATIENCE: Duration = Duration::from_secs(3);
/// Pause before the next node is asked.
const PAUSE: Duration = Duration::from_millis(50);

/// The task of a reader; it ends when this is dropped.
#[derive(Debug)]
pub struct Reader(tokio::task::JoinHandle<()>);

impl Reader {
    /// Follows the standard output of a machine into a file, through these nodes in turn.
    ///
    /// # Errors
    /// If the file cannot be created.
    pub fn begin(clients: Vec<Client>, machine: &str, file: &Path) -> Result<Self> {
        let mut reading = Reading {
            path: format!("/v1/machines/{machine}/logs"),
            file: File::create(file).with_context(|| file.display().to_string())?,
            at: 0,
            bytes: Vec::new(),
        };
        Ok(Reader(tokio::spawn(async move {
            for client in clients.iter().cycle() {
                // A node that is cut off, or does not find the machine: the next one may.
                let _ = reading.follow(client).await;
                tokio::time::sleep(PAUSE).await;
            }
        })))
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.abort();
    }
}

struct Reading {
    path: String,
    file: File,
    /// The offset from which it continues.
    at: u64,
    /// The beginning of a record.
    bytes: Vec<u8>,
}

impl Reading {
    async fn follow(&mut self, client: &Client) -> Result<()> {
        let path = format!("{}?follow=true&from={}", self.path, self.at);
        let mut stream = tokio::time::timeout(PATIENCE, client.get_stream(&path)).await??;
        loop {
            let chunk = tokio::time::timeout(PATIENCE, stream.chunk()).await??;
            let Some(chunk) = chunk else {
                bail!("the output ended");
            };
            self.at += chunk.len() as u64;
            self.bytes.extend_from_slice(&chunk);
            self.at = offset_behind(&self.bytes).unwrap_or(self.at);
            for (kind, text) in split_records(&mut self.bytes) {
                if kind == StreamKind::Output {
                    self.file.write_all(&text)?;
                }
            }
        }
    }
}
