//! `keel events`: the events of all nodes that answer.

use crate::cluster::Reach;
use crate::output::Format;
use crate::when;
use anyhow::Result;
use keel_api::{Client, ClientError, EVENTS_DEFAULT, EVENTS_MAX, Event, EventLine, Lines, Silence};
use serde::Serialize;
use std::collections::HashMap;
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

/// Pause before a node that did not answer is asked again.
const RETRY_AFTER: Duration = Duration::from_millis(500);

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only events about this machine (removed ones too).
    machine: Option<String>,
    /// Only events since: a duration ago (10m, 2h, 1d) or a time (2026-01-31T12:00:00Z).
    #[arg(long, value_name = "WHEN", value_parser = when::since)]
    since: Option<u64>,
    /// Continues with new events.
    #[arg(short, long)]
    follow: bool,
    /// The most events, newest first.
    #[arg(long, value_name = "N", default_value_t = EVENTS_DEFAULT,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(EVENTS_MAX)))]
    limit: u32,
}

/// The events of the nodes.
#[derive(Debug, Default, Serialize)]
pub(crate) struct EventPage {
    /// Oldest first.
    pub(crate) events: Vec<Event>,
    /// Nodes that did not answer, whose events are missing.
    pub(crate) silent: Vec<Silence>,
    /// Whether there are older events.
    pub(crate) older_left_out: bool,
}

async fn ask(
    client: &Client,
    machine: Option<&str>,
    since: Option<u64>,
    limit: u32,
    follow: bool,
) -> Result<Lines, ClientError> {
    let mut query = form_urlencoded::Serializer::new(String::new());
    query.append_pair("limit", &limit.to_string());
    query.append_pair("since", &since.unwrap_or(0).to_string());
    query.append_pair("follow", &follow.to_string());
    if let Some(machine) = machine {
        query.append_pair("machine", machine);
    }
    client
        .get_stream(&format!("/v1/events?{}", query.finish()))
        .await
}

/// The newest events of a machine, or of all.
pub(crate) async fn newest(
    client: &Client,
    machine: Option<&str>,
    since: Option<u64>,
    limit: u32,
) -> Result<EventPage> {
    let mut lines = ask(client, machine, since, limit, false).await?;
    let mut told = EventPage::default();
    while let Some(line) = lines.line().await? {
        match line {
            EventLine::Event(event) => told.events.push(event),
            EventLine::Silent(silence) => told.silent.push(silence),
            EventLine::OlderLeftOut => told.older_left_out = true,
        }
    }
    Ok(told)
}

pub(crate) async fn run(reach: &Reach, args: &Args) -> Result<ExitCode> {
    let client = reach.client()?;
    if args.follow {
        return follow(&client, reach.format(), args).await;
    }
    let told = newest(&client, args.machine.as_deref(), args.since, args.limit).await?;
    match reach.format() {
        Format::Json => outln!("{}", serde_json::to_string_pretty(&told)?),
        format => {
            if told.older_left_out {
                tell_older(args.limit);
            }
            for event in &told.events {
                print(format, event)?;
            }
            for silence in &told.silent {
                tell_silent(silence);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn follow(client: &Client, format: Format, args: &Args) -> Result<ExitCode> {
    // By node, so that no event is shown twice when a node returns.
    let mut last: HashMap<String, u64> = HashMap::new();
    let mut first = true;
    loop {
        let machine = args.machine.as_deref();
        let mut lines = match ask(client, machine, args.since, args.limit, true).await {
            Ok(lines) => lines,
            Err(error) if first => return Err(error.into()),
            Err(_) => {
                tokio::time::sleep(RETRY_AFTER).await;
                continue;
            }
        };
        while let Ok(Some(line)) = lines.line::<EventLine>().await {
            match &line {
                EventLine::Event(event) => {
                    let last = last.entry(event.node.clone()).or_default();
                    if event.id <= *last {
                        continue;
                    }
                    *last = event.id;
                    if format != Format::Json {
                        print(format, event)?;
                    }
                }
                EventLine::Silent(silence) if format != Format::Json => tell_silent(silence),
                EventLine::OlderLeftOut if format != Format::Json && first => {
                    tell_older(args.limit);
                }
                EventLine::Silent(_) | EventLine::OlderLeftOut => {}
            }
            if format == Format::Json {
                line_out(&serde_json::to_string(&line)?)?;
            }
        }
        if first {
            first = false;
        }
        eprintln!("keel: the node does not answer; trying again");
        tokio::time::sleep(RETRY_AFTER).await;
    }
}

fn print(format: Format, event: &Event) -> Result<()> {
    match format {
        Format::Name => line_out(event.kind.name()),
        Format::Text | Format::Json => line_out(&sentence(event)),
    }
}

fn line_out(line: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}

/// An event on one line.
pub(crate) fn sentence(event: &Event) -> String {
    let machine = event.machine.as_deref().unwrap_or("-");
    let epoch = event.epoch.as_deref().unwrap_or("-");
    format!(
        "{}  {:<8} {machine:<16} {epoch:<6} {:<18} {}",
        when::show(event.at_unix_ms),
        event.node,
        event.kind,
        // A backtrace has several lines.
        event.text.replace('\n', " | ")
    )
}

fn tell_silent(silence: &Silence) {
    eprintln!(
        "keel: node {} does not answer ({}): its events are missing",
        silence.node, silence.reason
    );
}

fn tell_older(limit: u32) {
    eprintln!("keel: there are older events than these {limit} (see --limit, --since)");
}
