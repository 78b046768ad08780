//! `keel audit`: who did what.

use crate::cluster::Reach;
use crate::output;
use crate::when;
use anyhow::Result;
use keel_api::AuditEntry;
use std::process::ExitCode;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only since a time: a duration ago (2h, 7d) or a UTC time (2026-01-31).
    #[arg(long, value_parser = when::since, value_name = "TIME")]
    since: Option<u64>,
    /// The newest entries, at most this many (10,000 are kept).
    #[arg(long, default_value_t = keel_api::AUDIT_DEFAULT)]
    limit: usize,
}

pub(crate) async fn run(reach: &Reach, args: &Args) -> Result<ExitCode> {
    let since = args.since.unwrap_or(0);
    let asked = format!("/v1/audit?since={since}&limit={}", args.limit);
    let log: Vec<AuditEntry> = reach.client()?.get(&asked).await?;
    output::list(
        reach.format(),
        &log,
        &["time", "user", "role", "node", "request", "about", "status"],
        |entry| entry.revision.to_string(),
        |entry| {
            vec![
                when::show(entry.at_unix_ms),
                entry.user.clone(),
                entry.role.clone(),
                entry.node.clone(),
                entry.request.clone(),
                entry.about.clone(),
                entry.status.map_or("?".to_owned(), |it| it.to_string()),
            ]
        },
    )?;
    Ok(ExitCode::SUCCESS)
}
