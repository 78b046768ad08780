//! `keel rule` and `keel label`: placement rules and labels.

use crate::cluster::Reach;
use crate::input;
use crate::output::{self, Format};
use anyhow::{Context, Result, ensure};
use hyper::Method;
use keel_api::{LabelRequest, RulesInfo};
use keel_balance::rules::{Labels, Rule};
use serde::Deserialize;
use std::path::PathBuf;
use std::process::ExitCode;

// Rustdoc would take a TOML table for a link.
#[allow(rustdoc::broken_intra_doc_links)]
#[derive(clap::Subcommand)]
pub(crate) enum RuleCommand {
    /// Lists the rules, and the machines that violate one.
    Ls,
    /// Adds rules, or replaces those with the same names.
    ///
    /// In a TOML file, one [[rule]] each:
    ///
    ///   [[rule]]
    ///   name = "web-apart"
    ///   rule = "apart"            # together, apart, spread, pin, avoid, stay, licence, hours
    ///   per = { label = "zone" }  # or "node", the default
    ///   max = 1
    ///   machines.names = ["web-*"]
    ///
    /// together: all in one place (per). apart: at most `max` in one place. spread: counts
    /// of places at most `skew` apart. pin, avoid: only on, not on `nodes.names`,
    /// `nodes.labels`. stay: never moved by the balancer. licence: on at most `nodes_max`
    /// nodes. hours: moved by the balancer from `from_minute` to `to_minute` of a day (UTC)
    /// only.
    #[command(verbatim_doc_comment)]
    Set {
        /// The file.
        #[arg(short, long)]
        file: PathBuf,
    },
    /// Removes rules.
    Rm {
        /// Their names.
        #[arg(required = true)]
        rules: Vec<String>,
    },
}

#[derive(clap::Args)]
pub(crate) struct LabelArgs {
    /// The machine, or with --node the node.
    name: String,
    /// The name is a node's.
    #[arg(long)]
    node: bool,
    /// Labels to set; KEY= removes one. Without, they are shown.
    #[arg(value_name = "KEY=VALUE", value_parser = parse_label)]
    labels: Vec<(String, String)>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleFile {
    rule: Vec<Rule>,
}

/// The rules in a file: all, or none if one is invalid by itself.
pub(crate) fn parse(text: &str) -> Result<Vec<Rule>> {
    let RuleFile { rule: rules } = toml::from_str(text)?;
    ensure!(!rules.is_empty(), "it has no [[rule]]");
    for rule in &rules {
        rule.check().map_err(anyhow::Error::msg)?;
    }
    Ok(rules)
}

pub(crate) async fn run(reach: &Reach, command: RuleCommand) -> Result<ExitCode> {
    let client = reach.client()?;
    match command {
        RuleCommand::Ls => {
            let info: RulesInfo = client.get("/v1/rules").await?;
            if reach.format() == Format::Json {
                outln!("{}", serde_json::to_string_pretty(&info)?);
                return Ok(ExitCode::SUCCESS);
            }
            output::list(
                reach.format(),
                &info.rules,
                &["name", "machines", "says", "held by"],
                |rule| rule.name.to_string(),
                |rule| {
                    vec![
                        rule.name.to_string(),
                        rule.machines.to_string(),
                        rule.requirement.to_string(),
                        held(&info, rule),
                    ]
                },
            )?;
            for (machine, broken) in &info.broken {
                eprintln!(
                    "keel: {machine} violates rule {:?}: {}",
                    &*broken.rule, broken.why
                );
            }
        }
        RuleCommand::Set { file } => {
            let shown = file.display();
            let text = input::read_text(&file).with_context(|| shown.to_string())?;
            for rule in &parse(&text).with_context(|| shown.to_string())? {
                let _: serde_json::Value = client.post("/v1/rules", rule).await?;
                outln!("{}", rule.name);
            }
        }
        RuleCommand::Rm { rules } => {
            for rule in rules {
                let path = keel_api::path(["rules", &rule]);
                let _: serde_json::Value = client
                    .call(Method::DELETE, &path, bytes::Bytes::new())
                    .await?;
                outln!("{rule}");
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The machines in each place of a rule.
fn held(info: &RulesInfo, rule: &Rule) -> String {
    let Some(holders) = info.holders.get(&rule.name) else {
        return String::new();
    };
    let places = holders.iter().filter(|(_, machines)| !machines.is_empty());
    let places = places.map(|(place, machines)| {
        let machines: Vec<&str> = machines.iter().map(|it| &**it).collect();
        format!("{place}: {}", machines.join(" "))
    });
    places.collect::<Vec<_>>().join("; ")
}

/// Reads `KEY=VALUE`.
pub(crate) fn parse_label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) => Ok((key.to_owned(), value.to_owned())),
        None => Err("write KEY=VALUE (KEY= removes one)".into()),
    }
}

pub(crate) async fn label(reach: &Reach, args: &LabelArgs) -> Result<ExitCode> {
    let labels = args.labels.iter().cloned().collect();
    let request = LabelRequest {
        node: args.node,
        name: args.name.clone(),
        labels,
    };
    let labels: Labels = reach.client()?.post("/v1/labels", &request).await?;
    output::one(reach.format(), &labels, &args.name, |labels| {
        let shown = labels.iter().map(|(key, value)| format!("{key}={value}"));
        shown.collect::<Vec<_>>().join(" ")
    })?;
    Ok(ExitCode::SUCCESS)
}
