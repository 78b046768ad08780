//! `keel doctor`: checks what this computer offers to a node, what it lacks, the consequences, and
//! the remedies. Needs no running agent; a running one is queried too.
//!
//! - `kernel`: kernel features, each tried
//! - `groups`: the layout of control groups
//! - `host`: privileges, limits, clocks, cores, memory
//! - `place`: the node's folder, its ports, its agent
//!
//! All changes are undone at once: a file in the node's folder, a control group, a bound port.

mod groups;
mod host;
mod kernel;
mod place;

use crate::cluster::Reach;
use crate::output::Format;
use anyhow::Result;
use serde::Serialize;
use std::net::SocketAddr;
use std::process::ExitCode;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Address of this node for other nodes (default: that of its settings, or of `keel up`).
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,
    /// Address for users over TLS (default: that of its settings).
    #[arg(long, value_name = "ADDRESS:PORT")]
    api: Option<SocketAddr>,
}

/// The result of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Outcome {
    /// Nothing to do.
    Ok,
    /// A node works, but with limitations.
    Warn,
    /// A node does not work.
    Fail,
}

/// A check with its result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Check {
    name: &'static str,
    outcome: Outcome,
    /// The finding.
    found: String,
    /// Why it matters.
    why: &'static str,
    /// The remedy; none if none is needed.
    remedy: Option<String>,
}

impl Check {
    fn ok(name: &'static str, why: &'static str, found: impl Into<String>) -> Self {
        Check {
            name,
            outcome: Outcome::Ok,
            found: found.into(),
            why,
            remedy: None,
        }
    }

    fn warn(
        name: &'static str,
        why: &'static str,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Check {
            outcome: Outcome::Warn,
            remedy: Some(remedy.into()),
            ..Check::ok(name, why, found)
        }
    }

    fn fail(
        name: &'static str,
        why: &'static str,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Check {
            outcome: Outcome::Fail,
            remedy: Some(remedy.into()),
            ..Check::ok(name, why, found)
        }
    }
}

/// All checks.
#[derive(Serialize)]
struct Findings {
    checks: Vec<Check>,
    warned: usize,
    failed: usize,
}

pub(crate) async fn run(reach: &Reach, args: &Args) -> Result<ExitCode> {
    let (folder, listen, api) = (reach.state_dir(), args.listen, args.api);
    let looked_at = folder.clone();
    let mut checks = tokio::task::spawn_blocking(move || {
        let mut checks = kernel::checks();
        checks.push(groups::check());
        checks.extend(host::checks());
        checks.extend(place::checks(&looked_at, listen, api));
        checks
    })
    .await?;
    checks.push(place::agent(&folder).await);
    let count = |outcome| {
        checks
            .iter()
            .filter(|check| check.outcome == outcome)
            .count()
    };
    let findings = Findings {
        warned: count(Outcome::Warn),
        failed: count(Outcome::Fail),
        checks,
    };
    match reach.format() {
        Format::Json => outln!("{}", serde_json::to_string_pretty(&findings)?),
        Format::Name => {
            for check in &findings.checks {
                if check.outcome != Outcome::Ok {
                    outln!("{}", check.name);
                }
            }
        }
        Format::Text => outln!("{}", page(&findings)),
    }
    Ok(ExitCode::from(u8::from(findings.failed > 0)))
}

fn page(findings: &Findings) -> String {
    let mut lines = Vec::new();
    for check in &findings.checks {
        let word = match check.outcome {
            Outcome::Ok => "ok",
            Outcome::Warn => "warn",
            Outcome::Fail => "FAIL",
        };
        lines.push(format!("{word:<5} {:<17} {}", check.name, check.found));
        if let Some(remedy) = &check.remedy {
            lines.push(format!("{:24}why: {}", "", check.why));
            lines.push(format!("{:24}do:  {remedy}", ""));
        }
    }
    lines.push(match (findings.failed, findings.warned) {
        (0, 0) => "nothing is missing".to_owned(),
        (0, warned) => format!("a node works here; {warned} thing(s) could be better"),
        (failed, warned) => {
            format!("a node does not work here: {failed} failed, {warned} could be better")
        }
    });
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_asks_for_something_has_a_remedy() {
        let findings = Findings {
            checks: vec![
                Check::ok("fine", "it matters", "there"),
                Check::fail("broken", "nothing works", "not there", "bring it"),
            ],
            warned: 0,
            failed: 1,
        };
        assert_eq!(
            page(&findings),
            "ok    fine              there\n\
             FAIL  broken            not there\n                        \
             why: nothing works\n                        \
             do:  bring it\n\
             a node does not work here: 1 failed, 0 could be better"
        );
    }
}
