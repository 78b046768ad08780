//! `keel token`: who may join or use the cluster.

use crate::cluster::Reach;
use crate::output;
use crate::when;
use anyhow::{Context, Result};
use bytes::Bytes;
use hyper::Method;
use keel_api::{Token, TokenInfo, TokenRequest, TokenUseInfo, path};
use std::process::ExitCode;

/// Expiry of a user's token if nothing is said.
const USER_EXPIRY: &str = "90d";

#[derive(clap::Subcommand)]
pub(crate) enum TokenCommand {
    /// Lets one node join, once.
    Join {
        /// Minutes until it expires.
        #[arg(long, default_value_t = 60)]
        minutes: u64,
    },
    /// Lets a user in over TLS (`keel login`).
    User {
        /// Who it is for.
        name: String,
        /// `viewer`, `operator` or `admin`.
        #[arg(long, default_value = "viewer")]
        role: String,
        /// Time until it expires, as 12h or 90d; or never.
        #[arg(long, value_name = "TIME", default_value = USER_EXPIRY)]
        expires: String,
    },
    /// Lists the tokens, without their secrets.
    Ls,
    /// Removes tokens: their holders are refused from now on.
    Rm {
        /// Their numbers, as `keel token ls` shows them.
        #[arg(required = true)]
        ids: Vec<String>,
    },
}

pub(crate) async fn run(reach: &Reach, what: TokenCommand) -> Result<ExitCode> {
    let client = reach.client()?;
    let (request, for_user) = match what {
        TokenCommand::Join { minutes } => {
            let ttl_s = minutes.saturating_mul(60);
            (TokenRequest::Join { ttl_s }, false)
        }
        TokenCommand::User {
            name,
            role,
            expires,
        } => {
            let ttl_s = match expires.as_str() {
                "never" => None,
                time => Some(
                    when::duration(time)
                        .map_err(anyhow::Error::msg)
                        .context("--expires")?
                        .as_secs(),
                ),
            };
            (TokenRequest::User { name, role, ttl_s }, true)
        }
        TokenCommand::Ls => {
            let tokens: Vec<TokenInfo> = client.get("/v1/tokens").await?;
            return list(reach, &tokens);
        }
        TokenCommand::Rm { ids } => {
            for id in ids {
                let _: serde_json::Value = client
                    .call(Method::DELETE, &path(["tokens", &id]), Bytes::new())
                    .await?;
                outln!("{id} is removed");
            }
            return Ok(ExitCode::SUCCESS);
        }
    };
    let token: Token = client.post("/v1/tokens", &request).await?;
    output::one(reach.format(), &token, &token.token, |token| {
        if for_user {
            format!("{}\nauthority {}", token.token, token.authority)
        } else {
            token.token.clone()
        }
    })?;
    Ok(ExitCode::SUCCESS)
}

fn list(reach: &Reach, tokens: &[TokenInfo]) -> Result<ExitCode> {
    output::list(
        reach.format(),
        tokens,
        &["id", "for", "role", "expires"],
        |token| token.id.clone(),
        |token| {
            let (whose, role) = match &token.of {
                TokenUseInfo::Join { used_by: None } => ("a node that joins".to_owned(), "-"),
                TokenUseInfo::Join {
                    used_by: Some(node),
                } => (format!("node {node}, used"), "-"),
                TokenUseInfo::User { name, role } => (format!("user {name}"), role.as_str()),
            };
            let expires = token.expires_unix_ms.map_or("never".to_owned(), when::show);
            vec![token.id.clone(), whose, role.to_owned(), expires]
        },
    )?;
    Ok(ExitCode::SUCCESS)
}
