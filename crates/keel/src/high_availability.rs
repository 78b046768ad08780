//! `--ha` and the key `ha` of machine files: how a machine is kept available when its node fails.

use keel_machine::high_availability::{Fence, HighAvailability};
use serde::Deserialize;
use std::time::Duration;

/// The settings of a machine file: `"off"`, `"on"`, or a table.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum FileSettings {
    Word(Word),
    Table(Table),
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Word {
    Off,
    On,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Table {
    /// What becomes of the machine when its node fails.
    #[serde(default)]
    restart: Restart,
    checkpoint: Option<String>,
    priority: Option<u32>,
    replicas: Option<u32>,
    to: Option<String>,
    #[serde(default)]
    fence: Fence,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Restart {
    #[default]
    Always,
    Never,
}

impl FileSettings {
    /// The settings, with defaults; `None` for none.
    ///
    /// # Errors
    /// A message for the user.
    pub(crate) fn settings(&self) -> Result<Option<HighAvailability>, String> {
        let table = match self {
            FileSettings::Word(Word::Off) => return Ok(None),
            FileSettings::Word(Word::On) => return Ok(Some(HighAvailability::default())),
            FileSettings::Table(table) => table,
        };
        if matches!(table.restart, Restart::Never) {
            return Err("ha with restart = \"never\" contradicts itself: use ha = \"off\"".into());
        }
        let default = HighAvailability::default();
        let settings = HighAvailability {
            checkpoint_every_s: match &table.checkpoint {
                Some(text) => seconds(text)?,
                None => default.checkpoint_every_s,
            },
            priority: table.priority.unwrap_or(default.priority),
            replicas: table.replicas.unwrap_or(default.replicas),
            to: table.to.as_deref().map(place).transpose()?,
            fence: table.fence,
        };
        checked(settings).map(Some)
    }
}

/// Parses the value of `--ha`: settings with commas between them, or nothing.
///
/// # Errors
/// A message for the user, which names the setting.
pub(crate) fn parse(text: &str) -> Result<HighAvailability, String> {
    let mut settings = HighAvailability::default();
    for setting in text.split(',').filter(|setting| !setting.is_empty()) {
        let Some((name, value)) = setting.split_once('=') else {
            return Err(format!("{setting:?} is not NAME=VALUE"));
        };
        let number = || {
            let number = value.parse::<u32>();
            number.map_err(|_| format!("{name}={value:?} is not a number"))
        };
        match name {
            "checkpoint" => settings.checkpoint_every_s = seconds(value)?,
            "priority" => settings.priority = number()?,
            "replicas" => settings.replicas = number()?,
            "to" => settings.to = Some(place(value)?),
            "fence" if value == "timer" => settings.fence = Fence::Timer,
            "fence" if value == "none" => settings.fence = Fence::None,
            "fence" => return Err(format!("fence={value:?}: timer or none")),
            _ => {
                return Err(format!(
                    "there is no setting {name:?}; known are checkpoint, priority, replicas, to, fence"
                ));
            }
        }
    }
    checked(settings)
}

fn checked(settings: HighAvailability) -> Result<HighAvailability, String> {
    settings.check().map(|()| settings)
}

fn seconds(text: &str) -> Result<u64, String> {
    let time: Duration = crate::when::duration(text)?;
    match time.subsec_nanos() {
        0 => Ok(time.as_secs()),
        _ => Err(format!("{text:?} is no number of whole seconds")),
    }
}

fn place(text: &str) -> Result<String, String> {
    crate::checkpoint::place(text).map_err(|error| format!("{error:#}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_of_the_command_line() {
        assert_eq!(parse(""), Ok(HighAvailability::default()));
        let given = parse("checkpoint=2s,priority=9,replicas=2,fence=timer").unwrap();
        let expected = HighAvailability {
            checkpoint_every_s: 2,
            priority: 9,
            replicas: 2,
            to: None,
            fence: Fence::Timer,
        };
        assert_eq!(given, expected);
        for (wrong, named) in [
            ("priority", "NAME=VALUE"),
            ("priority=high", "not a number"),
            ("colour=red", "no setting \"colour\""),
            ("fence=wall", "timer or none"),
            ("checkpoint=0s", "0"),
            ("checkpoint=1500ms", "whole seconds"),
            ("to=/kept,replicas=2", "not to both"),
        ] {
            let error = parse(wrong).unwrap_err();
            assert!(error.contains(named), "{wrong}: {error}");
        }
    }

    #[test]
    fn settings_of_a_file() {
        #[derive(Deserialize)]
        struct File {
            ha: FileSettings,
        }
        let read = |text: &str| {
            let file: File = toml::from_str(text).map_err(|error| error.to_string())?;
            file.ha.settings()
        };
        assert_eq!(read("ha = \"off\""), Ok(None));
        assert_eq!(read("ha = \"on\""), Ok(Some(HighAvailability::default())));
        let table = "ha = { restart = \"always\", checkpoint = \"10s\", priority = 5 }";
        assert_eq!(read(table), Ok(Some(HighAvailability::default())));
        assert!(read("ha = { restart = \"never\" }").is_err());
        assert!(read("ha = { priority = 500 }").is_err());
        assert!(read("ha = { colour = 1 }").is_err());
    }
}
