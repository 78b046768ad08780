//! A machine file: TOML, one table for each machine, whose keys are the options of `keel run`.
//!
//! ```toml
//! [machine.web]
//! module = "web.wasm"            # beside this file
//! args = ["--verbose"]
//! env = { LEVEL = "info" }
//! volume = ["tmp:1G:/scratch", "/srv/data:/data:ro"]
//! memory = "512M"
//! cpu-limit = 0.5
//! restart = "on-failure"
//! ```

use crate::high_availability::FileSettings;
use crate::machines::{MEMORY_DEFAULT, OUTPUT_RATE_DEFAULT, THREADS_DEFAULT};
use keel_api::RunRequest;
use keel_kind_wasm::{WasmKind, WasmSpec};
use keel_machine::restart_policy::Restart;
use keel_machine::spec::{BalanceBy, Balancing, Spawn};
use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use toml::Spanned;
use toml::de::{DeString, DeTable};

/// Keys of a machine's table.
const KEYS: [&str; 23] = [
    "module",
    "args",
    "on",
    "env",
    "volume",
    "memory",
    "threads",
    "cpu-limit",
    "output-rate",
    "rm",
    "restart",
    "checkpoint-every",
    "checkpoint-to",
    "checkpoint-keep",
    "checkpoint-keep-for",
    "ha",
    "balance",
    "cpu-target",
    "memory-target",
    "io-target",
    "max-parts",
    "spawn",
    "part-memory",
];
/// The least similarity, from 0 to 1, of a name that is suggested for an unknown one.
const LIKE: f64 = 0.7;

/// A machine of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wanted {
    /// The module's file.
    pub(super) module: PathBuf,
    /// The request, without the module's hash.
    pub(super) request: RunRequest,
}

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    machine: BTreeMap<String, Machine>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Machine {
    module: PathBuf,
    #[serde(default)]
    args: Vec<String>,
    on: Option<String>,
    #[serde(default)]
    env: BTreeMap<String, String>,
    #[serde(default)]
    volume: Vec<Volume>,
    memory: Option<Size>,
    threads: Option<u32>,
    cpu_limit: Option<Cores>,
    output_rate: Option<Size>,
    #[serde(default)]
    rm: bool,
    #[serde(default)]
    restart: Restart,
    checkpoint_every: Option<Time>,
    checkpoint_to: Option<String>,
    checkpoint_keep: Option<u32>,
    checkpoint_keep_for: Option<Time>,
    ha: Option<FileSettings>,
    #[serde(default)]
    balance: BalanceBy,
    cpu_target: Option<Cores>,
    memory_target: Option<Size>,
    io_target: Option<Size>,
    max_parts: Option<u32>,
    #[serde(default)]
    spawn: Spawn,
    part_memory: Option<Size>,
}

/// Parses a file's text; `place` is the path of the file.
///
/// # Errors
/// Sentences for users: the error, its line, and the probable intention.
pub(super) fn read(place: &Path, text: &str) -> Result<Vec<Wanted>, String> {
    let shown = place.display();
    let table = DeTable::parse(text).map_err(|error| format!("{shown}: {error}"))?;
    let mut strangers = Strangers {
        place,
        text,
        found: Vec::new(),
    };
    strangers.look(table.get_ref(), &["machine"], "at the top");
    let machines = table.get_ref().get("machine");
    for (name, machine) in machines
        .and_then(|machines| machines.get_ref().as_table())
        .into_iter()
        .flatten()
    {
        if let Some(machine) = machine.get_ref().as_table() {
            let of = format!("of machine {:?}", name.get_ref());
            strangers.look(machine, &KEYS, &of);
        }
    }
    strangers.found.sort();
    let sentences: Vec<String> = strangers.found.into_iter().map(|(_, it)| it).collect();
    if !sentences.is_empty() {
        return Err(sentences.join("\n"));
    }
    let file: File = toml::from_str(text).map_err(|error| format!("{shown}: {error}"))?;
    if file.machine.is_empty() {
        return Err(format!(
            "{shown} has no machines: each is a table [machine.NAME] with its module = \"FILE\""
        ));
    }
    let folder = place.parent().unwrap_or(Path::new(""));
    file.machine
        .into_iter()
        .map(|(name, machine)| {
            machine
                .wanted(&name, folder)
                .map_err(|error| format!("{shown}: machine {name:?}: {error}"))
        })
        .collect()
}

/// Unknown keys.
struct Strangers<'a> {
    place: &'a Path,
    text: &'a str,
    /// The offset of each, with its message.
    found: Vec<(usize, String)>,
}

impl Strangers<'_> {
    fn look(&mut self, table: &DeTable<'_>, known: &[&str], of: &str) {
        let strangers = table
            .keys()
            .filter(|key: &&Spanned<DeString<'_>>| !known.contains(&key.get_ref().as_ref()));
        for key in strangers {
            let at = key.span().start;
            let line = self.text[..at].matches('\n').count() + 1;
            let nearest = known
                .iter()
                .map(|known| (strsim::jaro_winkler(known, key.get_ref()), known))
                .max_by(|(a, _), (b, _)| a.total_cmp(b))
                .filter(|(like, _)| *like >= LIKE);
            let hint = match nearest {
                Some((_, known)) => format!("did you mean {known:?}?"),
                None => format!("known are {}", known.join(", ")),
            };
            let place = self.place.display();
            let stranger = key.get_ref();
            let sentence =
                format!("{place}, line {line}: there is no key {stranger:?} {of}; {hint}");
            self.found.push((at, sentence));
        }
    }
}

impl Machine {
    fn wanted(self, name: &str, folder: &Path) -> Result<Wanted, String> {
        let module = folder.join(&self.module);
        let program = self.module.file_name().unwrap_or_default();
        let mut args = vec![program.to_string_lossy().into_owned()];
        args.extend(self.args);
        let size = |given: Option<Size>, default: &str| match given {
            Some(Size(bytes)) => Ok(bytes),
            None => crate::size::parse(default),
        };
        let volumes = self.volume.iter();
        let volumes = volumes
            .map(|Volume(volume)| crate::machines::request(volume))
            .collect::<Result<_, _>>()
            .map_err(|error| format!("{error:#}"))?;
        let alone = [
            self.checkpoint_to.is_some(),
            self.checkpoint_keep.is_some(),
            self.checkpoint_keep_for.is_some(),
        ];
        let checkpoints = match &self.checkpoint_every {
            None if alone.contains(&true) => {
                return Err("checkpoints need checkpoint-every = \"TIME\"".into());
            }
            None => None,
            Some(Time(every)) => {
                let keep_for = self.checkpoint_keep_for.map(|Time(time)| time);
                let to = self.checkpoint_to.as_deref();
                let plan =
                    crate::machines::checkpoint_plan(*every, to, self.checkpoint_keep, keep_for);
                Some(plan.map_err(|error| format!("{error:#}"))?)
            }
        };
        let ha = self.ha.as_ref().map(FileSettings::settings);
        let own = WasmSpec {
            // The hash is known once the module was read.
            module: String::new(),
            args,
            env: self.env.into_iter().collect(),
            threads_max: self.threads.unwrap_or(THREADS_DEFAULT),
        };
        let request = RunRequest {
            name: Some(name.to_owned()),
            on: self.on,
            kind: WasmKind::kind_name(),
            kind_spec: own.to_kind_spec()?,
            volumes,
            memory_bytes: size(self.memory, MEMORY_DEFAULT)?,
            cpu_limit_millis: self.cpu_limit.map(|Cores(millis)| millis),
            output_bytes_per_s: size(self.output_rate, OUTPUT_RATE_DEFAULT)?,
            remove_at_end: self.rm,
            restart: self.restart,
            checkpoints,
            ha: ha.transpose()?.flatten(),
            balancing: Balancing {
                by: self.balance,
                cpu_target_millis: self.cpu_target.map(|Cores(millis)| millis),
                memory_target_bytes: self.memory_target.map(|Size(bytes)| bytes),
                io_target_bytes_per_s: self.io_target.map(|Size(bytes)| bytes),
                parts_max: self.max_parts,
                spawn: self.spawn,
                part_memory_bytes: self.part_memory.map(|Size(bytes)| bytes),
            },
        };
        Ok(Wanted { module, request })
    }
}

/// Bytes, as a number or a text with a unit.
struct Size(u64);
/// Thousandths of a core, from a number of cores.
struct Cores(u32);
/// A duration, as a text with a unit.
struct Time(Duration);
/// A volume in the syntax of `keel run --volume`.
struct Volume(crate::volume::VolumeArg);

/// A text or a number, parsed as on the command line.
struct Written<T>(fn(&str) -> Result<T, String>, &'static str);

impl<T> Visitor<'_> for Written<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.1)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        (self.0)(text).map_err(E::custom)
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<T, E> {
        self.visit_str(&number.to_string())
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<T, E> {
        self.visit_str(&number.to_string())
    }

    fn visit_f64<E: de::Error>(self, number: f64) -> Result<T, E> {
        self.visit_str(&number.to_string())
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let what = "a size (examples: \"64M\", \"1.5G\", 4096)";
        deserializer
            .deserialize_any(Written(crate::size::parse, what))
            .map(Size)
    }
}

impl<'de> Deserialize<'de> for Cores {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let what = "a number of cores (examples: 0.5, 2)";
        deserializer
            .deserialize_any(Written(crate::size::cores, what))
            .map(Cores)
    }
}

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let what = "a duration (examples: \"30s\", \"10m\", \"7d\")";
        deserializer
            .deserialize_any(Written(crate::when::duration, what))
            .map(Time)
    }
}

impl<'de> Deserialize<'de> for Volume {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let what = "a volume (examples: \"tmp:1G:/scratch\", \"/srv/data:/data:ro\")";
        deserializer
            .deserialize_any(Written(crate::volume::parse, what))
            .map(Volume)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use keel_api::VolumeRequest;
    use keel_machine::checkpoint::Retention;
    use keel_machine::spec::CheckpointPlan;

    fn read(text: &str) -> Result<Vec<Wanted>, String> {
        super::read(Path::new("/etc/m.toml"), text)
    }

    #[test]
    fn a_table_is_a_machine_and_what_is_left_out_is_as_in_run() {
        let text = r#"
            [machine.web]
            module = "sub/web.wasm"
            args = ["-v"]
            on = "a"
            env = { B = "2", A = "1" }
            volume = ["tmp:1G:/scratch"]
            memory = "512M"
            threads = 4
            cpu-limit = 0.5
            output-rate = 1024
            restart = "on-failure"
            checkpoint-every = "10m"
            checkpoint-to = "/kept"
            checkpoint-keep-for = "7d"
            balance = "target"
            cpu-target = 0.25
            memory-target = "128M"
            max-parts = 3
            spawn = "spread"
            part-memory = "64M"

            [machine.plain]
            module = "/abs/plain.wasm"
        "#;
        let wanted = read(text).unwrap();
        let plain = &wanted[0].request;
        assert_eq!(wanted[0].module, Path::new("/abs/plain.wasm"));
        let own: WasmSpec = plain.kind_spec.decode().unwrap();
        assert_eq!(own.args, ["plain.wasm"]);
        assert_eq!((plain.memory_bytes, own.threads_max), (4 << 30, 256));
        assert_eq!(plain.output_bytes_per_s, 16 << 20);
        assert_eq!((plain.cpu_limit_millis, plain.restart), (None, Restart::No));
        assert_eq!(wanted[1].module, Path::new("/etc/sub/web.wasm"));
        let web = RunRequest {
            name: Some("web".into()),
            on: Some("a".into()),
            kind: WasmKind::kind_name(),
            kind_spec: WasmSpec {
                module: String::new(),
                args: vec!["web.wasm".into(), "-v".into()],
                env: vec![("A".into(), "1".into()), ("B".into(), "2".into())],
                threads_max: 4,
            }
            .to_kind_spec()
            .unwrap(),
            volumes: vec![VolumeRequest::Tmp {
                bytes: 1 << 30,
                inodes: None,
                guest: "/scratch".into(),
            }],
            memory_bytes: 512 << 20,
            cpu_limit_millis: Some(500),
            output_bytes_per_s: 1024,
            remove_at_end: false,
            restart: Restart::OnFailure,
            ha: None,
            balancing: Balancing {
                by: BalanceBy::Target,
                cpu_target_millis: Some(250),
                memory_target_bytes: Some(128 << 20),
                io_target_bytes_per_s: None,
                parts_max: Some(3),
                spawn: Spawn::Spread,
                part_memory_bytes: Some(64 << 20),
            },
            checkpoints: Some(CheckpointPlan {
                every_s: 600,
                to: Some("/kept".into()),
                retention: Retention {
                    newest: None,
                    for_s: Some(7 * 86_400),
                },
            }),
        };
        assert_eq!(wanted[1].request, web);
    }

    #[test]
    fn unknown_keys_are_named_with_their_line_and_the_nearest() {
        let text = "[machine.web]\nmodule = \"a\"\nmemroy = 1\n\n[machine.db]\nmodule = \"b\"\ncpu_limit = 1\nzzz = 2\n";
        assert_eq!(
            read(text).unwrap_err(),
            "/etc/m.toml, line 3: there is no key \"memroy\" of machine \"web\"; did you mean \"memory\"?\n\
             /etc/m.toml, line 7: there is no key \"cpu_limit\" of machine \"db\"; did you mean \"cpu-limit\"?\n\
             /etc/m.toml, line 8: there is no key \"zzz\" of machine \"db\"; known are module, args, on, env, volume, memory, threads, cpu-limit, output-rate, rm, restart, checkpoint-every, checkpoint-to, checkpoint-keep, checkpoint-keep-for, ha, balance, cpu-target, memory-target, io-target, max-parts, spawn, part-memory"
        );
        let error = read("[machines.web]\nmodule = \"a\"").unwrap_err();
        assert!(
            error.contains(
                "line 1: there is no key \"machines\" at the top; did you mean \"machine\"?"
            ),
            "{error}"
        );
    }

    #[test]
    fn what_is_wrong_is_shown_where_it_is() {
        for (text, what) in [
            ("", "has no machines"),
            ("[machine.web]", "missing field `module`"),
            ("[machine.web]\nmodule = 1", "line 2"),
            (
                "[machine.web]\nmodule = \"a\"\nmemory = \"much\"",
                "\"much\" is not a size",
            ),
            (
                "[machine.web]\nmodule = \"a\"\nmemory = -1",
                "is not a size",
            ),
            (
                "[machine.web]\nmodule = \"a\"\nmemory = true",
                "a size (examples",
            ),
            (
                "[machine.web]\nmodule = \"a\"\ncpu-limit = 0",
                "0.01 to 1000",
            ),
            (
                "[machine.web]\nmodule = \"a\"\nrestart = \"maybe\"",
                "on-failure",
            ),
            (
                "[machine.web]\nmodule = \"a\"\nvolume = [\"x\"]",
                "this is no volume",
            ),
            ("[machine.web]\nmodule = \"a\"\nmodule = \"b\"", "line 3"),
            (
                "[machine.web]\nmodule = \"a\"\ncheckpoint-keep = 3",
                "need checkpoint-every",
            ),
            (
                "[machine.web]\nmodule = \"a\"\ncheckpoint-every = \"soon\"",
                "is not a duration",
            ),
            ("[machine.web\n", "line 1"),
            ("machine = 1", "invalid type"),
        ] {
            let error = read(text).unwrap_err();
            assert!(
                error.contains("/etc/m.toml") && error.contains(what),
                "{text}: {error}"
            );
        }
    }
}
