//! The list of commands in `keel --help`, in groups.

use clap::Command;
use std::fmt::Write;

/// The commands of each group, in display order.
const GROUPS: &[(&str, &[&str])] = &[
    (
        "Machines",
        &[
            "run", "ps", "logs", "inspect", "describe", "set", "start", "stop", "kill", "rm", "cp",
            "exec", "console", "vnc", "apply", "import",
        ],
    ),
    (
        "Moves and spanning",
        &[
            "move", "span", "unspan", "parts", "threads", "objects", "shake",
        ],
    ),
    (
        "Balancing",
        &[
            "balance", "why", "why-not", "ledger", "history", "drain", "undrain", "rule", "label",
        ],
    ),
    (
        "Checkpoints, volumes and images",
        &[
            "checkpoint",
            "checkpoints",
            "restore",
            "clone",
            "volume",
            "image",
        ],
    ),
    (
        "Cluster",
        &[
            "up", "join", "down", "leave", "reload", "status", "nodes", "node", "store", "recover",
            "schedule", "events",
        ],
    ),
    ("Users", &["token", "login", "context", "ca", "audit"]),
    (
        "Tools",
        &["demo", "wasm", "sim", "doctor", "completions", "man"],
    ),
];

/// The command with its subcommands listed in groups.
pub(crate) fn grouped(command: Command) -> Command {
    let mut text = String::new();
    let width = GROUPS.iter().flat_map(|(_, names)| names.iter());
    let width = width.map(|name| name.len()).max().unwrap_or(0);
    for (title, names) in GROUPS {
        // Writing to a string does not fail.
        let _ = writeln!(text, "{title}:");
        for name in *names {
            let about = command
                .find_subcommand(name)
                .and_then(Command::get_about)
                .map(ToString::to_string)
                .unwrap_or_default();
            let about = brief(&about);
            let _ = writeln!(text, "  {name:<width$}  {about}");
        }
        text.push('\n');
    }
    text.push_str("`keel COMMAND --help` describes each.");
    command
        .help_template(
            "{about-with-newline}\n{usage-heading} {usage}{after-help}\n\nOptions:\n{options}",
        )
        .after_help(text)
}

/// The first clause of a description: one line of the list.
fn brief(about: &str) -> &str {
    about.split([';', ':']).next().unwrap_or(about)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn every_command_is_in_one_group() {
        let command = crate::Cli::command();
        let shown = command.get_subcommands().filter(|it| !it.is_hide_set());
        let mut shown: Vec<&str> = shown.map(Command::get_name).collect();
        let mut grouped: Vec<&str> = GROUPS
            .iter()
            .flat_map(|(_, names)| names.iter().copied())
            .collect();
        shown.sort_unstable();
        grouped.sort_unstable();
        assert_eq!(grouped, shown);
    }

    /// A wrapped line would begin like another command.
    #[test]
    fn each_command_has_one_line() {
        let help = grouped(crate::Cli::command()).render_help().to_string();
        let (list, _) = help.split_once("Options:").unwrap();
        for line in list.lines().filter(|it| it.starts_with("  ")) {
            assert!(line.chars().count() <= 80, "{line}");
        }
    }
}
