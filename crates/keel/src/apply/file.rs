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
//!
//! [machine.db]
//! kind = "qemu"
//! disk = ["/shared/db.qcow2"]    # on all nodes
//! net = ["br0"]
//! ```

use crate::cloud_init::CloudInit;
use crate::high_availability::FileSettings;
use crate::image::{ImageArg, ImageFile};
use crate::machines::{MEMORY_DEFAULT, OUTPUT_RATE_DEFAULT, THREADS_DEFAULT};
use crate::network::{self, NetworkArg};
use crate::system::{self, System};
use anyhow::Result;
use keel_api::{Client, MachineInfo, RunRequest};
use keel_kind_qemu::{CpuModel, Disk, QemuKind, QemuSpec};
use keel_kind_wasm::{WasmKind, WasmSpec};
use keel_machine::kind::{KindName, KindSpec};
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
const KEYS: [&str; 41] = [
    "module",
    "kind",
    "kernel",
    "initrd",
    "append",
    "image",
    "disk-size",
    "disk",
    "net",
    "cpu",
    "cpu-model",
    "guest-agent",
    "install-guest-agent",
    "balloon",
    "display",
    "shutdown",
    "user-data",
    "network-config",
    "ssh-key",
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
    pub(super) body: Body,
    /// The request, without the part of its kind.
    pub(super) request: RunRequest,
}

/// What a machine is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Body {
    /// A module, and its program without the module's hash.
    Program(PathBuf, WasmSpec),
    /// A whole system.
    System(System),
}

impl Body {
    /// The part of the kind, and the files that the machine of this name starts from. `before` is the
    /// machine as it is: what the file leaves to us stays as it was.
    ///
    /// # Errors
    /// If a file cannot be read, or there is no image of a name.
    pub(super) async fn read(
        &self,
        client: &Client,
        name: &str,
        before: Option<&MachineInfo>,
    ) -> Result<(KindSpec, Vec<ImageFile>)> {
        let (own, files) = match self {
            Body::Program(module, program) => {
                let file = ImageFile::read(module)?;
                let own = WasmSpec {
                    module: file.hash(),
                    ..program.clone()
                };
                (own.to_kind_spec(), vec![file])
            }
            Body::System(system) => {
                let before = before.and_then(system_of);
                let (own, files) = system.read(client, Some(name), before.as_ref()).await?;
                (own.to_kind_spec(), files)
            }
        };
        Ok((own.map_err(anyhow::Error::msg)?, files))
    }
}

/// The part of a whole system in what a node says of it; `None` for a program.
fn system_of(machine: &MachineInfo) -> Option<QemuSpec> {
    let is_system = machine.kind == QemuKind::kind_name();
    let own = is_system.then(|| machine.kind_spec.clone())?;
    serde_json::from_value(own).ok()
}

/// How long a machine may take to shut down.
pub(super) fn shutdown(machine: &MachineInfo) -> Duration {
    let seconds = system_of(machine).map_or(0, |own| own.shutdown_s);
    Duration::from_secs(seconds.into())
}

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    machine: BTreeMap<String, Machine>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Machine {
    module: Option<PathBuf>,
    kind: Option<KindName>,
    kernel: Option<PathBuf>,
    initrd: Option<PathBuf>,
    append: Option<String>,
    image: Option<ImageArg>,
    disk_size: Option<Size>,
    #[serde(default)]
    disk: Vec<FileDisk>,
    #[serde(default)]
    net: Vec<Network>,
    cpu: Option<u32>,
    cpu_model: Option<CpuModel>,
    guest_agent: Option<bool>,
    install_guest_agent: Option<bool>,
    balloon: Option<bool>,
    display: Option<bool>,
    shutdown: Option<Time>,
    user_data: Option<PathBuf>,
    network_config: Option<PathBuf>,
    #[serde(default)]
    ssh_key: Vec<PathBuf>,
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
            "{shown} has no machines: each is a table [machine.NAME] with its module = \"FILE\", or of kind = \"qemu\""
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
    /// What it is made of; takes that.
    fn body(&mut self, folder: &Path) -> Result<Body, String> {
        let cloud_init = CloudInit {
            user_data: self.user_data.take(),
            network_config: self.network_config.take(),
            ssh_key: std::mem::take(&mut self.ssh_key),
        };
        let system = System {
            kernel: self.kernel.take().map(|file| folder.join(file)),
            initrd: self.initrd.take().map(|file| folder.join(file)),
            append: self.append.take(),
            image: self.image.take().map(|image| image.beside(folder)),
            disk_size: self.disk_size.take().map(|Size(bytes)| bytes),
            disk: self.disk.drain(..).map(|FileDisk(disk)| disk).collect(),
            net: self.net.drain(..).map(|Network(network)| network).collect(),
            cpu: self.cpu,
            cpu_model: self.cpu_model,
            guest_agent: self.guest_agent,
            install_guest_agent: self.install_guest_agent,
            balloon: self.balloon,
            display: self.display,
            shutdown: self.shutdown.take().map(|Time(time)| time),
            cloud_init: cloud_init.beside(folder),
        };
        let kind = self.kind.clone().unwrap_or_else(WasmKind::kind_name);
        crate::system::check_kind(&kind).map_err(|error| error.to_string())?;
        if kind == WasmKind::kind_name() {
            if let Some(key) = system.given() {
                return Err(format!("{key} is for whole systems: add kind = \"qemu\""));
            }
            let Some(module) = self.module.take() else {
                return Err(
                    "a program needs its module = \"FILE\", a whole system kind = \"qemu\"".into(),
                );
            };
            let program = module.file_name().unwrap_or_default();
            let mut args = vec![program.to_string_lossy().into_owned()];
            args.append(&mut self.args);
            let own = WasmSpec {
                // Known once the module was read.
                module: String::new(),
                args,
                env: std::mem::take(&mut self.env).into_iter().collect(),
                threads_max: self.threads.unwrap_or(THREADS_DEFAULT),
            };
            return Ok(Body::Program(folder.join(module), own));
        }
        let of_programs = [
            ("module", self.module.is_some()),
            ("args", !self.args.is_empty()),
            ("env", !self.env.is_empty()),
            ("threads", self.threads.is_some()),
        ];
        if let Some((key, _)) = of_programs.iter().find(|(_, is_given)| *is_given) {
            return Err(format!("{key} means nothing to a machine of kind {kind}"));
        }
        if system.image.is_none() && system.disk_size.is_some() {
            return Err("disk-size is of an image: add image = \"FILE\"".into());
        }
        if system.kernel.is_none() && (system.initrd.is_some() || system.append.is_some()) {
            return Err("initrd and append are of a kernel: add kernel = \"FILE\"".into());
        }
        Ok(Body::System(system))
    }

    fn wanted(mut self, name: &str, folder: &Path) -> Result<Wanted, String> {
        let body = self.body(folder)?;
        let (kind, memory_default) = match &body {
            Body::Program(..) => (WasmKind::kind_name(), MEMORY_DEFAULT),
            Body::System(_) => (QemuKind::kind_name(), system::MEMORY_DEFAULT),
        };
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
        let request = RunRequest {
            name: Some(name.to_owned()),
            on: self.on,
            kind,
            kind_spec: KindSpec::default(),
            volumes,
            memory_bytes: size(self.memory, memory_default)?,
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
        Ok(Wanted { body, request })
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
/// A disk in the syntax of `keel run --disk`.
struct FileDisk(Disk);
/// A network interface in the syntax of `keel run --net`.
struct Network(NetworkArg);

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

/// A disk as in `keel run`, but not beside whoever runs the command.
fn absolute_disk(text: &str) -> Result<Disk, String> {
    match text.starts_with('/') {
        true => system::disk(text),
        false => Err(format!("{text:?}: an absolute path is expected")),
    }
}

impl<'de> Deserialize<'de> for FileDisk {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let what = "a disk (examples: \"/shared/a.qcow2\", \"/dev/vg/a,format=raw\")";
        deserializer
            .deserialize_any(Written(absolute_disk, what))
            .map(FileDisk)
    }
}

impl<'de> Deserialize<'de> for Network {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let what = "a network interface (examples: \"br0\", \"br0,mac=02:00:00:00:00:01\")";
        deserializer
            .deserialize_any(Written(network::parse, what))
            .map(Network)
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
        let Body::Program(module, own) = &wanted[0].body else {
            panic!("{wanted:?}");
        };
        assert_eq!(module, Path::new("/abs/plain.wasm"));
        assert_eq!(own.args, ["plain.wasm"]);
        assert_eq!((plain.memory_bytes, own.threads_max), (4 << 30, 256));
        assert_eq!(plain.output_bytes_per_s, 16 << 20);
        assert_eq!((plain.cpu_limit_millis, plain.restart), (None, Restart::No));
        let own = WasmSpec {
            module: String::new(),
            args: vec!["web.wasm".into(), "-v".into()],
            env: vec![("A".into(), "1".into()), ("B".into(), "2".into())],
            threads_max: 4,
        };
        assert_eq!(
            wanted[1].body,
            Body::Program("/etc/sub/web.wasm".into(), own)
        );
        let web = RunRequest {
            name: Some("web".into()),
            on: Some("a".into()),
            kind: WasmKind::kind_name(),
            kind_spec: KindSpec::default(),
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
    fn a_system_is_what_run_makes_of_the_same_options() {
        let text = r#"
            [machine.db]
            kind = "qemu"
            kernel = "boot/vmlinuz"
            initrd = "/boot/initrd"
            append = "console=ttyS0"
            image = "debian.qcow2"
            disk-size = "20G"
            disk = ["/shared/db.qcow2", "/dev/vg/b,format=raw,ro"]
            net = ["br0,mac=02:00:00:00:00:01"]
            cpu = 2
            cpu-model = "x86-64-v2"
            guest-agent = false
            install-guest-agent = false
            balloon = false
            display = true
            shutdown = "10s"
            user-data = "db.yaml"
            ssh-key = ["/keys/admin.pub"]
            ha = { fence = "timer" }
        "#;
        let wanted = read(text).unwrap();
        let system = System {
            kernel: Some("/etc/boot/vmlinuz".into()),
            initrd: Some("/boot/initrd".into()),
            append: Some("console=ttyS0".into()),
            image: Some(ImageArg::File("/etc/debian.qcow2".into())),
            disk_size: Some(20 << 30),
            disk: ["/shared/db.qcow2", "/dev/vg/b,format=raw,ro"]
                .map(|text| system::disk(text).unwrap())
                .to_vec(),
            net: vec![network::parse("br0,mac=02:00:00:00:00:01").unwrap()],
            cpu: Some(2),
            cpu_model: Some(CpuModel::Level2),
            guest_agent: Some(false),
            install_guest_agent: Some(false),
            balloon: Some(false),
            display: Some(true),
            shutdown: Some(Duration::from_secs(10)),
            cloud_init: CloudInit {
                user_data: Some("/etc/db.yaml".into()),
                network_config: None,
                ssh_key: vec!["/keys/admin.pub".into()],
            },
        };
        assert_eq!(wanted[0].body, Body::System(system));
        let request = &wanted[0].request;
        assert_eq!(request.kind, QemuKind::kind_name());
        assert_eq!(request.memory_bytes, 1 << 30);
        assert!(request.ha.is_some());
    }

    #[test]
    fn unknown_keys_are_named_with_their_line_and_the_nearest() {
        let text = "[machine.web]\nmodule = \"a\"\nmemroy = 1\n\n[machine.db]\nmodule = \"b\"\ncpu_limit = 1\nzzz = 2\n";
        assert_eq!(
            read(text).unwrap_err(),
            "/etc/m.toml, line 3: there is no key \"memroy\" of machine \"web\"; did you mean \"memory\"?\n\
             /etc/m.toml, line 7: there is no key \"cpu_limit\" of machine \"db\"; did you mean \"cpu-limit\"?\n\
             /etc/m.toml, line 8: there is no key \"zzz\" of machine \"db\"; known are module, kind, kernel, initrd, append, image, disk-size, disk, net, cpu, cpu-model, guest-agent, install-guest-agent, balloon, display, shutdown, user-data, network-config, ssh-key, args, on, env, volume, memory, threads, cpu-limit, output-rate, rm, restart, checkpoint-every, checkpoint-to, checkpoint-keep, checkpoint-keep-for, ha, balance, cpu-target, memory-target, io-target, max-parts, spawn, part-memory"
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
            ("[machine.web]", "needs its module"),
            ("[machine.web]\nkind = \"xen\"", "wasm and qemu are known"),
            (
                "[machine.web]\nmodule = \"a\"\ndisk = [\"/a.raw\"]",
                "disk is for whole systems",
            ),
            (
                "[machine.web]\nkind = \"qemu\"\nmodule = \"a\"",
                "module means nothing",
            ),
            (
                "[machine.web]\nkind = \"qemu\"\ninitrd = \"a\"",
                "add kernel",
            ),
            (
                "[machine.web]\nkind = \"qemu\"\ndisk-size = \"1G\"",
                "add image",
            ),
            (
                "[machine.web]\nkind = \"qemu\"\ndisk = [\"/a\"]",
                "does not say its format",
            ),
            (
                "[machine.web]\nkind = \"qemu\"\ndisk = [\"a.raw\"]",
                "an absolute path",
            ),
            (
                "[machine.web]\nkind = \"qemu\"\nnet = [\"br0,mac=1\"]",
                "is not the address",
            ),
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
