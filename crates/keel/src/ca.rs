//! `keel ca`: the cluster's certificate authority, and the certificates of its nodes.

use crate::cluster::Reach;
use crate::output;
use crate::when;
use anyhow::{Context, Result};
use keel_api::{AuthorityChange, AuthorityInfo, Nothing};
use std::process::ExitCode;
use std::time::Duration;

/// Pause between two looks at a replacement.
const LOOK_EVERY: Duration = Duration::from_millis(500);

#[derive(clap::Subcommand)]
pub(crate) enum CaCommand {
    /// Replaces the authority, while all nodes go on.
    ///
    /// Nodes trust the new authority first, then get certificates of it, then trust the old one no
    /// more. Each step waits for all nodes: one that is away holds it up until it is back or removed
    /// (`keel node rm`). Join tokens and contexts that were made before are of no use afterwards:
    /// make new ones.
    Rotate {
        /// Only begins it.
        #[arg(long)]
        no_wait: bool,
    },
    /// Sets how long certificates of nodes are valid. Nodes renew theirs in the last third.
    Set {
        /// As 90d or 12h: a minute to ten years.
        #[arg(long, value_name = "TIME")]
        lifetime: String,
    },
}

pub(crate) async fn run(reach: &Reach, what: Option<CaCommand>) -> Result<ExitCode> {
    let client = reach.client()?;
    match what {
        None => {
            let info: AuthorityInfo = client.get("/v1/authority").await?;
            show(reach, &info)?;
        }
        Some(CaCommand::Set { lifetime }) => {
            let lifetime = when::duration(&lifetime).map_err(anyhow::Error::msg);
            let lifetime_s = lifetime.context("--lifetime")?.as_secs();
            let change = AuthorityChange { lifetime_s };
            let _: Nothing = client.post("/v1/authority", &change).await?;
            outln!("certificates are valid for {lifetime_s} s from now on");
        }
        Some(CaCommand::Rotate { no_wait }) => {
            let _: Nothing = client.post("/v1/authority/rotate", &()).await?;
            if no_wait {
                outln!("the authority is being replaced; `keel ca` shows how far it is");
                return Ok(ExitCode::SUCCESS);
            }
            let mut said = String::new();
            loop {
                tokio::time::sleep(LOOK_EVERY).await;
                let info: AuthorityInfo = client.get("/v1/authority").await?;
                if !info.is_rotating {
                    let authority = info.authorities.first();
                    let authority = authority.map_or("?", |it| it.fingerprint.as_str());
                    outln!("authority {authority}");
                    return Ok(ExitCode::SUCCESS);
                }
                let waits = waits_for(&info);
                if waits != said && !waits.is_empty() {
                    eprintln!("waits: {waits}");
                }
                said = waits;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn waits_for(info: &AuthorityInfo) -> String {
    let waits = info.nodes.iter().filter_map(|node| {
        let missing = node.missing.as_ref()?;
        Some(format!("{} {missing}", node.node))
    });
    waits.collect::<Vec<_>>().join("; ")
}

fn show(reach: &Reach, info: &AuthorityInfo) -> Result<()> {
    output::one(reach.format(), info, "ca", |info| {
        let mut text = String::new();
        for authority in &info.authorities {
            let signs = if authority.signs { "signs" } else { "" };
            let ends = when::show(authority.ends_unix_ms);
            text += &format!("authority {} until {ends} {signs}\n", authority.fingerprint);
        }
        text += &format!("certificates are valid for {} s\n", info.lifetime_s);
        let rows = info.nodes.iter().map(|node| {
            let authority = node.authority.as_deref().unwrap_or("-");
            vec![
                node.node.clone(),
                authority.chars().take(12).collect(),
                node.ends_unix_ms.map_or("-".to_owned(), when::show),
                node.missing.clone().unwrap_or_default(),
            ]
        });
        text + &output::table(&["node", "authority", "certificate until", "missing"], rows)
    })
}
