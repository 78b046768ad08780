//! `keel describe`: a machine on one page, for users: its origin and state, its resources, its
//! permissions, and its recent history.

use crate::cluster::Reach;
use crate::events::{self, EventPage};
use crate::output::{self, Format};
use crate::when;
use anyhow::Result;
use keel_api::{Client, EventKind, MachineInfo, PartInfo, PartsInfo, SystemInfo};
use keel_machine::cgroup::GroupUsage;
use serde::Serialize;
use std::process::ExitCode;

/// The most moves, checkpoints and events that are shown.
const MOVES: usize = 5;
const CHECKPOINTS: usize = 5;
const EVENTS: usize = 10;
/// The most events that are searched.
const EVENTS_ASKED: u32 = 1000;

/// A machine and its history.
#[derive(Serialize)]
struct Described {
    machine: MachineInfo,
    /// The system in it, if it has a guest agent that answers.
    system: Option<SystemInfo>,
    /// Why that is not known, if a guest agent could tell it.
    #[serde(skip)]
    system_unknown: Option<String>,
    /// Its parts, if it is on several nodes.
    parts: Vec<PartInfo>,
    #[serde(flatten)]
    history: EventPage,
}

pub(crate) async fn run(reach: &Reach, name: &str) -> Result<ExitCode> {
    let client = reach.client()?;
    let machine: MachineInfo = client.get(&keel_api::path(["machines", name])).await?;
    let mut history = events::newest(&client, Some(name), None, EVENTS_ASKED).await?;
    // An earlier machine may have had the same name.
    history
        .events
        .retain(|event| event.at_unix_ms >= machine.created_unix_ms);
    let (system, system_unknown) = system(&client, &machine).await;
    // A machine that does not run has no parts.
    let parts = client
        .get(&keel_api::path(["machines", name, "parts"]))
        .await;
    let parts = parts.map_or_else(|_| Vec::new(), |info: PartsInfo| info.parts);
    let parts = if parts.len() > 1 { parts } else { Vec::new() };
    let described = Described {
        machine,
        system,
        system_unknown,
        parts,
        history,
    };
    match reach.format() {
        Format::Json => outln!("{}", serde_json::to_string_pretty(&described)?),
        Format::Name => outln!("{name}"),
        Format::Text => outln!("{}", page(&described)),
    }
    Ok(ExitCode::SUCCESS)
}

/// Lines of a page: a label on the left, its value on the right.
struct Page(Vec<String>);

impl Page {
    fn head(&mut self, title: &str) {
        self.0.push(title.to_owned());
    }

    fn line(&mut self, word: &str, text: impl AsRef<str>) {
        for (number, line) in text.as_ref().lines().enumerate() {
            let word = if number == 0 { word } else { "" };
            self.0.push(format!("  {word:<19}{line}"));
        }
    }

    fn list(&mut self, title: &str, items: impl IntoIterator<Item = String>) {
        let before = self.0.len();
        self.head(title);
        self.0
            .extend(items.into_iter().map(|item| format!("  {item}")));
        if self.0.len() == before + 1 {
            self.0.push("  none".to_owned());
        }
    }
}

fn moment(unix_ms: u64) -> String {
    format!("{} ({} ago)", when::show(unix_ms), output::ago(unix_ms))
}

fn page(described: &Described) -> String {
    let (machine, history) = (&described.machine, &described.history);
    let mut page = Page(Vec::new());
    write_state(&mut page, machine);
    write_resources(&mut page, machine);
    if !described.parts.is_empty() {
        let parts = described.parts.iter().map(|part| {
            let memory = part.memory.as_ref();
            let memory = memory.map(|it| format!(", {}", output::bytes(it.resident_bytes)));
            let memory = memory.unwrap_or_default();
            let silent = part.silent_s();
            let silent = silent.map(|seconds| format!(", silent for {seconds} s"));
            let silent = silent.unwrap_or_default();
            format!(
                "{} on {}: {} threads{memory}{silent}",
                part.part, part.node, part.threads
            )
        });
        page.line("parts", parts.collect::<Vec<_>>().join("\n"));
    }
    write_permissions(&mut page, machine);
    write_system(&mut page, described);
    page.list(
        "Last moves",
        machine.moves.iter().rev().take(MOVES).map(|report| {
            let begun = when::show(report.started_unix_ms);
            format!("{begun}  {}", report.line())
        }),
    );
    let checkpoints = history.events.iter().rev().filter(|event| {
        matches!(
            event.kind,
            EventKind::CheckpointMade | EventKind::CheckpointFailed
        )
    });
    page.list(
        "Last checkpoints",
        checkpoints
            .take(CHECKPOINTS)
            .map(|event| format!("{}  {}", when::show(event.at_unix_ms), event.text)),
    );
    page.list(
        "Last events",
        history
            .events
            .iter()
            .rev()
            .take(EVENTS)
            .map(events::sentence),
    );
    for silence in &history.silent {
        page.0.push(format!(
            "  node {} does not answer ({}): its information is missing",
            silence.node, silence.reason
        ));
    }
    page.0.join("\n")
}

fn write_state(page: &mut Page, machine: &MachineInfo) {
    page.head(&machine.name);
    page.line(
        "status",
        format!(
            "{}, since {}",
            machine.status_line(),
            moment(machine.since_unix_ms)
        ),
    );
    if let Some(message) = &machine.message {
        page.line("because", message);
    }
    page.line("node", format!("{}, epoch {}", machine.node, machine.epoch));
    page.line("created", moment(machine.created_unix_ms));
    page.line("program", &machine.program);
    page.line("kind", machine.kind.as_str());
    for (name, value) in output::fields(&machine.kind_spec) {
        page.line(&name, value);
    }
    if !machine.ready_on.is_empty() {
        page.line("compiled", format!("on {}", machine.ready_on.join(", ")));
    }
    if let Some(origin) = &machine.created_from {
        page.line("origin", origin);
    }
    page.line(
        "restart",
        format!("{} ({} so far)", machine.restart.word(), machine.restarts),
    );
    if let Some(ha) = &machine.ha {
        page.line("high availability", ha.line());
        if !machine.in_sync.is_empty() {
            page.line("checkpoint on", machine.in_sync.join(", "));
        }
    }
    if let Some(plan) = &machine.checkpoints {
        page.line("checkpoints", plan.line());
    }
    if let Some(balancing) = machine.balancing.line() {
        page.line("balanced", balancing);
    }
    if machine.remove_at_end {
        page.line("at its end", "it is removed, with its output");
    }
}

fn write_resources(page: &mut Page, machine: &MachineInfo) {
    page.head("Has");
    let now = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
    page.line(
        "threads",
        now(machine.threads.map(|threads| threads.to_string())),
    );
    page.line(
        "memory",
        format!(
            "{}, at most {} in each of its memories",
            now(machine.memory_bytes.map(output::bytes)),
            output::bytes(machine.memory_limit_bytes)
        ),
    );
    if let Some(given_back) = machine.memory_given_back_bytes {
        page.line(
            "memory inside",
            format!(
                "{} available to its programs, {} given back to its node",
                now(machine.memory_available_bytes.map(output::bytes)),
                output::bytes(given_back)
            ),
        );
    }
    page.line(
        "cpu",
        format!(
            "{}, {}",
            match machine.cpu_micros {
                Some(micros) => format!("{:.1} s on this node", micros as f64 / 1e6),
                None => "-".to_owned(),
            },
            match machine.cpu_limit_millis {
                Some(millis) => format!("at most {} core(s)", f64::from(millis) / 1000.0),
                None => "without limit".to_owned(),
            }
        ),
    );
    page.line(
        "output",
        format!(
            "{} so far{}, at most {} a second",
            now(machine.output_bytes.map(output::bytes)),
            match machine.held_output_bytes {
                Some(held) if held > 0 => format!(
                    " ({} wait for a checkpoint on another node)",
                    output::bytes(held)
                ),
                _ => String::new(),
            },
            output::bytes(machine.output_bytes_per_s)
        ),
    );
    if let Some(group) = &machine.cgroup {
        page.line("kernel", kernel(group));
    }
    if let Some(pid) = machine.pid {
        page.line("process", format!("{pid} on {}", machine.node));
    }
}

/// The kernel's counters of its process.
pub(crate) fn kernel(group: &GroupUsage) -> String {
    let now = |value: Option<u64>| value.map_or_else(|| "-".to_owned(), output::bytes);
    let mut parts = vec![format!(
        "memory {}, at most {} so far, limit {}",
        now(group.memory_bytes),
        now(group.memory_peak_bytes),
        now(group.memory_limit_bytes)
    )];
    if let Some(micros) = group.cpu_micros {
        parts.push(format!("cpu {:.1} s", micros as f64 / 1e6));
    }
    if let Some(micros) = group.throttled_micros.filter(|micros| *micros > 0) {
        parts.push(format!("throttled {:.1} s", micros as f64 / 1e6));
    }
    parts.join("; ")
}

/// What the guest agent of a machine that runs tells of the system in it, or why it does not.
async fn system(client: &Client, machine: &MachineInfo) -> (Option<SystemInfo>, Option<String>) {
    let has_agent = machine.kind_spec.get("guest_agent") == Some(&true.into());
    if !has_agent || machine.status != "running" {
        return (None, None);
    }
    let path = keel_api::path(["machines", &machine.name, "system"]);
    match client.get(&path).await {
        Ok(system) => (Some(system), None),
        Err(error) => (None, Some(error.to_string())),
    }
}

fn write_system(page: &mut Page, described: &Described) {
    if let Some(reason) = &described.system_unknown {
        page.head("System inside");
        page.line("not known", reason);
    }
    let Some(system) = &described.system else {
        return;
    };
    page.head("System inside");
    let mut line = |word: &str, text: Option<String>| {
        if let Some(text) = text.filter(|text| !text.is_empty()) {
            page.line(word, text);
        }
    };
    line("host name", system.host_name.clone());
    line("system", system.name.clone());
    line("its kernel", system.kernel.clone());
    let interfaces = system.interfaces.iter();
    let interfaces = interfaces.map(|it| format!("{}: {}", it.name, it.addresses.join(", ")));
    line("addresses", Some(interfaces.collect::<Vec<_>>().join("\n")));
    let load = system.load.iter().map(|load| format!("{load:.2}"));
    line("load", Some(load.collect::<Vec<_>>().join(" ")));
    let file_systems = system.file_systems.iter().map(|it| {
        let (used, total) = (output::bytes(it.used_bytes), output::bytes(it.total_bytes));
        format!("{}: {used} of {total}", it.mount_point)
    });
    line(
        "file systems",
        Some(file_systems.collect::<Vec<_>>().join("\n")),
    );
}

fn write_permissions(page: &mut Page, machine: &MachineInfo) {
    page.head("May touch");
    if machine.volumes.is_empty() {
        page.line("directories", "none");
    }
    for volume in &machine.volumes {
        page.line("directory", crate::volume::line(volume));
    }
    page.line("network", "none");
}
