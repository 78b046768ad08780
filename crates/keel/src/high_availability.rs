//! `--ha` and the key `ha` of machine files: how a machine is kept available when its node fails.

use keel_machine::high_availability::{Fence, HighAvailability, Protect};
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, MapAccess, Unexpected, Visitor};
use serde::{Deserialize, Deserializer};
use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

/// The settings of a machine file: `"off"`, `"on"`, or a table.
#[derive(Debug)]
pub(crate) enum FileSettings {
    Off,
    On,
    Table(Table),
}

/// By hand, because an untagged enum would forget which setting is wrong.
impl<'de> Deserialize<'de> for FileSettings {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Settings;
        impl<'de> Visitor<'de> for Settings {
            type Value = FileSettings;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"on\", \"off\", or a table of settings")
            }

            fn visit_str<E: de::Error>(self, word: &str) -> Result<FileSettings, E> {
                match word {
                    "on" => Ok(FileSettings::On),
                    "off" => Ok(FileSettings::Off),
                    _ => Err(E::invalid_value(Unexpected::Str(word), &self)),
                }
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<FileSettings, A::Error> {
                Table::deserialize(MapAccessDeserializer::new(map)).map(FileSettings::Table)
            }
        }
        from.deserialize_any(Settings)
    }
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
    protect: Protect,
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
            FileSettings::Off => return Ok(None),
            FileSettings::On => return Ok(Some(HighAvailability::default())),
            FileSettings::Table(table) => table,
        };
        if matches!(table.restart, Restart::Never) {
            return Err("ha with restart = \"never\" contradicts itself: use ha = \"off\"".into());
        }
        let default = HighAvailability::default();
        let settings = HighAvailability {
            checkpoint_every_ms: match &table.checkpoint {
                Some(text) => milliseconds(text)?,
                None => table.protect.every_ms_default(),
            },
            priority: table.priority.unwrap_or(default.priority),
            replicas: table.replicas.unwrap_or(default.replicas),
            to: table.to.as_deref().map(place).transpose()?,
            protect: table.protect,
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
    let mut checkpoint_every_ms = None;
    let mut seen = BTreeSet::new();
    for setting in text.split(',').filter(|setting| !setting.is_empty()) {
        let Some((name, value)) = setting.split_once('=') else {
            return Err(format!("{setting:?} is not NAME=VALUE"));
        };
        if !seen.insert(name) {
            return Err(format!("{name} is given twice"));
        }
        let number = || {
            let number = value.parse::<u32>();
            number.map_err(|_| format!("{name}={value:?} is not a number"))
        };
        match name {
            "checkpoint" => checkpoint_every_ms = Some(milliseconds(value)?),
            "priority" => settings.priority = number()?,
            "replicas" => settings.replicas = number()?,
            "to" => settings.to = Some(place(value)?),
            "protect" if value == "output" => settings.protect = Protect::Output,
            "protect" if value == "none" => settings.protect = Protect::None,
            "protect" => return Err(format!("protect={value:?}: output or none")),
            "fence" if value == "timer" => settings.fence = Fence::Timer,
            "fence" if value == "none" => settings.fence = Fence::None,
            "fence" if value == "hook" => settings.fence = Fence::Hook,
            "fence" => return Err(format!("fence={value:?}: timer, hook or none")),
            _ => {
                return Err(format!(
                    "there is no setting {name:?}; known are checkpoint, priority, replicas, to, protect, fence"
                ));
            }
        }
    }
    settings.checkpoint_every_ms =
        checkpoint_every_ms.unwrap_or(settings.protect.every_ms_default());
    checked(settings)
}

fn checked(settings: HighAvailability) -> Result<HighAvailability, String> {
    settings.check().map(|()| settings)
}

fn milliseconds(text: &str) -> Result<u64, String> {
    let time: Duration = crate::when::duration(text)?;
    match u64::try_from(time.as_millis()) {
        Ok(ms) if time == Duration::from_millis(ms) => Ok(ms),
        _ => Err(format!("{text:?} is no number of whole milliseconds")),
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
            checkpoint_every_ms: 2000,
            priority: 9,
            replicas: 2,
            to: None,
            protect: Protect::None,
            fence: Fence::Timer,
        };
        assert_eq!(given, expected);
        let every =
            |text: &str| parse(text).map(|it| (it.protects_output(), it.checkpoint_every_ms));
        assert_eq!(every("protect=output"), Ok((true, 100)));
        assert_eq!(every("checkpoint=25ms,protect=output"), Ok((true, 25)));
        assert_eq!(every("protect=none"), Ok((false, 10_000)));
        for (wrong, named) in [
            ("priority", "NAME=VALUE"),
            ("priority=high", "not a number"),
            ("colour=red", "no setting \"colour\""),
            ("fence=wall", "timer, hook or none"),
            ("checkpoint=0s", "0"),
            ("checkpoint=1500us", "whole milliseconds"),
            ("checkpoint=5ms", "5ms"),
            (
                "priority=1,fence=timer,priority=9",
                "priority is given twice",
            ),
            ("protect=memory", "output or none"),
            ("protect=output,to=/kept", "does not go with"),
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
        let table = "ha = { protect = \"output\", checkpoint = \"50ms\" }";
        let read_table = read(table).unwrap().unwrap();
        assert_eq!(Ok(read_table), parse("protect=output,checkpoint=50ms"));
        for (wrong, named) in [
            ("{ protect = \"memory\" }", "`memory`"),
            ("{ restart = \"never\" }", "contradicts itself"),
            ("{ priority = 500 }", "500"),
            ("{ priority = \"high\" }", "\"high\""),
            ("{ priority = 1, priority = 2 }", "duplicate key"),
            ("{ colour = 1 }", "`colour`"),
            ("{ checkpoint = \"soon\" }", "soon"),
            (
                "{ protect = \"output\", to = \"/kept\" }",
                "does not go with",
            ),
            ("{ to = \"/kept\", replicas = 2 }", "not to both"),
            ("\"maybe\"", "\"maybe\""),
            ("7", "expected \"on\", \"off\""),
        ] {
            let error = read(&format!("ha = {wrong}")).unwrap_err();
            assert!(error.contains(named), "{wrong}: {error}");
        }
    }
}
