//! Kinds of machines: what an agent must know of a kind, and their registry.
//!
//! A kind is a crate with an implementation of two traits:
//!
//! - [`Kind`], of which an agent asks questions: is this spec valid, what does this host
//!   lack, how much memory does that process use;
//! - [`Worker`](crate::worker::Worker), which runs one machine in a process of its own.
//!
//! The binary registers its kinds in one line ([`Kinds::new`]). All else (life cycle,
//! moves, ownership, checkpoints' repositories, balancing) is the same for every kind, and
//! asks the registry where kinds differ: nothing outside a kind compares its name.

use crate::high_availability::HighAvailability;
use crate::spec::{Balancing, Spawn, Spec};
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

/// How the names of a worker's threads begin whose time is its machine's demand for CPU; that
/// of other threads counts as the node's own.
pub const GUEST_THREAD_PREFIX: &str = "guest-";

/// The option of a worker's command line that names its kind.
pub const KIND_OPTION: &str = "--kind";

/// What a kind sees of an image to decide whether machines start from it, in bytes.
pub const IMAGE_BEGINNING_BYTES: usize = 8192;

/// Longest name of a kind, in bytes.
const NAME_BYTES_MAX: usize = 16;

/// The name of a kind of machine: 1 to 16 lower-case letters and digits.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct KindName(String);

/// The text is not a name of a kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not the name of a kind of machine: 1 to 16 lower-case letters and digits")]
pub struct InvalidKindName(String);

impl FromStr for KindName {
    type Err = InvalidKindName;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let is_valid = (1..=NAME_BYTES_MAX).contains(&text.len())
            && text
                .bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
        match is_valid {
            true => Ok(KindName(text.to_owned())),
            false => Err(InvalidKindName(text.chars().take(40).collect())),
        }
    }
}

impl<'de> Deserialize<'de> for KindName {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        text.parse().map_err(D::Error::custom)
    }
}

impl fmt::Display for KindName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl KindName {
    /// Its text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The part of a spec that only its kind understands: an object whose fields the kind
/// defines. Everybody else stores and sends it as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct KindSpec(serde_json::Value);

/// One without fields.
impl Default for KindSpec {
    fn default() -> Self {
        KindSpec(serde_json::Value::Object(serde_json::Map::new()))
    }
}

impl KindSpec {
    /// Encodes a kind's own type.
    ///
    /// # Errors
    /// If it is not an object of JSON.
    pub fn new<T: Serialize>(own: &T) -> Result<Self, String> {
        match serde_json::to_value(own) {
            Ok(value) if value.is_object() => Ok(KindSpec(value)),
            Ok(_) => Err("it is not an object".into()),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Decodes the kind's own type, which should refuse unknown fields.
    ///
    /// # Errors
    /// A message that names the field.
    pub fn decode<T: DeserializeOwned>(&self) -> Result<T, String> {
        T::deserialize(&self.0).map_err(|error| error.to_string())
    }
}

/// What machines of a kind can do beside what all can.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Abilities {
    /// A machine may have parts on several nodes; its threads and objects move.
    pub spans: bool,
    /// A move may send memory after the machine resumed at the target.
    pub post_copy: bool,
    /// Its program is compiled on a node before a machine runs there.
    pub compiles: bool,
    /// It uses its images for as long as it runs, so a move's target needs them too.
    pub keeps_images: bool,
    /// Its state can be copied while it runs, and it can begin from that copy.
    pub checkpoints: bool,
    /// A machine that fails, and is restarted on its node, goes on from its newest checkpoint. Without
    /// it a machine begins anew, with what is on its disks.
    pub restarts_from_checkpoints: bool,
    /// A machine that is restored can run before all of its memory is read.
    pub restores_lazily: bool,
    /// Its memory can be changed while it runs.
    pub changes_memory: bool,
    /// Commands can be executed in it.
    pub executes: bool,
    /// It has a console, into which users type.
    pub has_console: bool,
}

/// A file of hosts, beside volumes, that a machine uses wherever it runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFile {
    /// The same on every node.
    pub path: String,
    /// Whether the machine changes it.
    pub is_written: bool,
}

/// The disk in an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskImage {
    /// What the image is, in the kind's word.
    pub format: &'static str,
    /// Size of the disk in bytes.
    pub bytes: u64,
}

/// What a host offers to machines of a kind where hosts differ, or what such a machine needs: words
/// that only the kind understands. A machine may run where all that it needs is offered.
pub type Features = BTreeSet<String>;

/// How many of several things a message names.
const NAMED: usize = 8;

/// Some of these texts for a message, such as missing [`Features`], and how many more there are.
///
/// ```
/// let all: Vec<String> = (1..=10).map(|number| number.to_string()).collect();
/// let text = keel_machine::kind::some_of(&all);
/// assert_eq!(text, "1, 2, 3, 4, 5, 6, 7, 8 and 2 more");
/// assert_eq!(keel_machine::kind::some_of(["aes"]), "aes");
/// ```
pub fn some_of<T: AsRef<str>>(all: impl IntoIterator<Item = T>) -> String {
    let mut all = all.into_iter();
    let named: Vec<T> = all.by_ref().take(NAMED).collect();
    let words: Vec<&str> = named.iter().map(AsRef::as_ref).collect();
    let text = words.join(", ");
    match all.count() {
        0 => text,
        more => format!("{text} and {more} more"),
    }
}

/// A kind whose machines a host executes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Executed {
    pub kind: KindName,
    /// As [`Kind::executed_here`] says it.
    pub how: String,
    pub features: Features,
}

/// What a node's host offers to machines of one kind.
#[derive(Debug, Clone, Copy)]
pub struct NodeFeatures<'a> {
    pub node: &'a str,
    pub features: &'a Features,
}

/// A field of specs in which two of them differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Its name in machine files.
    pub field: String,
    /// For users; secrets are not shown.
    pub old: String,
    pub new: String,
}

/// Where a worker finds the files of its node.
#[derive(Debug, Clone)]
pub struct WorkerFolders {
    /// The worker's own: its socket, its output, its volumes.
    pub folder: PathBuf,
    /// The node's compiled code.
    pub cache: PathBuf,
    /// The node's images, by hash: see [`Kind::images`].
    pub images: PathBuf,
    /// The node's programs, by hash, which other nodes fetch.
    pub programs: PathBuf,
}

/// A kind of machine, as an agent sees it. Methods may block for some milliseconds unless
/// said otherwise.
pub trait Kind: fmt::Debug + Send + Sync + 'static {
    fn name(&self) -> KindName;

    fn abilities(&self) -> Abilities;

    /// Validates a spec of this kind; [`Kinds::check`] has checked what abilities decide.
    ///
    /// # Errors
    /// A message for the user, which names the field.
    fn check(&self, spec: &Spec) -> Result<(), String>;

    /// The hashes (BLAKE3, hex) of the files that a machine starts from, which nodes fetch from
    /// each other before it starts: a worker finds them in [`WorkerFolders::images`].
    ///
    /// # Errors
    /// If the spec cannot be read, as one of a later version.
    fn images(&self, spec: &Spec) -> Result<Vec<String>, String>;

    /// The files of hosts that a machine uses wherever it runs, beside volumes. All nodes that may
    /// run it see the same ones.
    fn host_files(&self, _spec: &Spec) -> Vec<HostFile> {
        Vec::new()
    }

    /// What this host offers. `cache` is the folder of compiled code. May take some seconds.
    fn features_here(&self, _cache: &Path) -> Features {
        Features::new()
    }

    /// What a machine needs of its host, wherever it runs and whenever: of [`Self::features_here`].
    fn features_needed(&self, _spec: &Spec) -> Features {
        Features::new()
    }

    /// Completes the spec of a new machine with what depends on the hosts on which it may run, as far
    /// as they say what they offer. `on` is the node where it begins, if that is known.
    ///
    /// # Errors
    /// Why none of them can run it: a message for the user, which names the field.
    fn complete(
        &self,
        _spec: &mut Spec,
        _nodes: &[NodeFeatures<'_>],
        _on: Option<&str>,
    ) -> Result<(), String> {
        Ok(())
    }

    /// What a machine lacks on this host that it uses wherever it runs, beside files; `None` if
    /// nothing. `cache` is the folder of compiled code. Blocks.
    fn lacks_here(&self, _spec: &Spec, _cache: &Path) -> Option<String> {
        None
    }

    /// Whether a machine whose node fails goes on elsewhere from its newest checkpoint, and not from
    /// its beginning.
    fn fails_over_from_checkpoint(&self, _spec: &Spec) -> bool {
        self.abilities().restarts_from_checkpoints
    }

    /// What a machine changes that refuses nobody, in words that follow "it uses": a node that was
    /// cut off and goes on would disturb the one where the machine goes on. `None` if nothing.
    fn unfenced(&self, _spec: &Spec) -> Option<String> {
        None
    }

    /// The largest file that a machine of this kind starts from, in bytes; 0 if none does.
    fn image_bytes_max(&self) -> u64 {
        0
    }

    /// Checks the beginning of a file that a user wants to start machines from: its first
    /// [`IMAGE_BEGINNING_BYTES`], or all if it has fewer.
    ///
    /// # Errors
    /// Why no machine of this kind starts from it.
    fn check_image(&self, _beginning: &[u8]) -> Result<(), String> {
        Err(format!(
            "machines of kind {} start from no file",
            self.name()
        ))
    }

    /// The disk in an image that has been checked, for machines whose disks begin as a copy of it.
    /// `beginning` are its first [`IMAGE_BEGINNING_BYTES`], or all if it has fewer.
    ///
    /// # Errors
    /// Why it is none.
    fn disk_image(&self, _beginning: &[u8], _file_bytes: u64) -> Result<DiskImage, String> {
        Err(format!("machines of kind {} have no disks", self.name()))
    }

    /// What a machine runs, in one line: for `wasm`, the program and its arguments.
    fn summary(&self, spec: &Spec) -> String;

    /// The kind's part of a spec for users, without secrets.
    fn shown(&self, spec: &Spec) -> serde_json::Value;

    /// The differences between the kind's parts of two specs.
    fn differences(&self, old: &Spec, new: &Spec) -> Vec<Difference>;

    /// What a machine has that no other may have while it runs, so that no clone of it can run beside
    /// it; `None` if nothing.
    fn unique(&self, _spec: &Spec) -> Option<String> {
        None
    }

    /// Its name, with what executes its machines on this host where that differs between hosts;
    /// `None` if nothing there does. `cache` is the folder of compiled code. May take some seconds.
    fn executed_here(&self, _cache: &Path) -> Option<String> {
        Some(self.name().to_string())
    }

    /// What this host lacks for fast moves, and the consequence; `None` if nothing.
    fn missing_for_moves(&self) -> Option<String> {
        None
    }

    /// What this host lacks for post-copy, and the remedy; `None` if nothing.
    fn missing_for_post_copy(&self) -> Option<String> {
        None
    }

    /// The processes beside a worker that run its machine, as folders in `/proc`, given that of
    /// the worker.
    fn processes_beside(&self, _worker: &Path) -> Vec<PathBuf> {
        Vec::new()
    }

    /// Whether a thread with this name, of a worker or a process beside it, executes its machine:
    /// its time is the machine's demand for CPU.
    fn is_guest_thread(&self, name: &str) -> bool {
        name.starts_with(GUEST_THREAD_PREFIX)
    }

    /// Bytes of memory that the machine of a worker occupies; `None` if it has none yet, or
    /// if that process is no worker of this kind. `process` is its folder in `/proc`.
    /// Without it the memory of the whole process counts. (That of processes beside it does always.)
    fn memory_bytes(&self, _process: &Path) -> Option<u64> {
        None
    }

    /// How long a machine may take to end after it was told to.
    fn shutdown_time(&self, _spec: &Spec) -> Duration {
        Duration::ZERO
    }

    /// What an earlier life of a machine left in the folder of its worker, and is not there any more
    /// although its next life needs it; `None` if nothing. Blocks.
    fn missing_of_earlier_life(&self, _spec: &Spec, _folder: &Path) -> Option<String> {
        None
    }

    /// Bytes of what a machine has on disk, beside volumes, in the folder of its worker: a move
    /// brings them along. Blocks.
    fn disk_bytes(&self, _folder: &Path) -> u64 {
        0
    }

    /// The program whose compiled code has this file name in the cache; `None` if it is
    /// no code of this kind.
    fn program_of_code(&self, _file_name: &str) -> Option<String> {
        None
    }

    /// Compiles a program into the node's cache, in a process of its own. `wanted`: a
    /// move waits for it.
    ///
    /// # Errors
    /// Why it cannot be compiled.
    fn compile(&self, _cache: &Path, _program: &Path, _wanted: bool) -> Result<(), String> {
        Err(format!("programs of kind {} are not compiled", self.name()))
    }

    /// Runs a worker in this process until its agent ends it.
    ///
    /// # Errors
    /// If its folders or socket cannot be used.
    fn run_worker(&self, folders: &WorkerFolders) -> Result<(), String>;
}

/// The kinds that this binary has.
#[derive(Debug, Clone)]
pub struct Kinds(Arc<[Arc<dyn Kind>]>);

impl Kinds {
    /// Registers kinds; the first is the default of `keel run`.
    pub fn new(kinds: impl IntoIterator<Item = Arc<dyn Kind>>) -> Self {
        Kinds(kinds.into_iter().collect())
    }

    /// All kinds.
    pub fn all(&self) -> impl Iterator<Item = &dyn Kind> {
        self.0.iter().map(|kind| &**kind)
    }

    /// Finds a kind.
    ///
    /// # Errors
    /// A message for users if this binary does not have it.
    pub fn get(&self, name: &KindName) -> Result<&dyn Kind, String> {
        self.all().find(|kind| kind.name() == *name).ok_or_else(|| {
            let known: Vec<String> = self.all().map(|kind| kind.name().to_string()).collect();
            format!(
                "this node has no machines of kind {name:?}, only {}",
                known.join(", "),
                name = name.as_str()
            )
        })
    }

    /// The kind of a spec.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub fn of(&self, spec: &Spec) -> Result<&dyn Kind, String> {
        self.get(&spec.kind)
    }

    /// Validates a spec. Fields that mean nothing to its kind are refused by name.
    ///
    /// # Errors
    /// A message for users.
    pub fn check(&self, spec: &Spec) -> Result<(), String> {
        let kind = self.of(spec)?;
        if !kind.abilities().spans
            && let Some(field) = spanning_field(&spec.balancing)
        {
            return Err(format!(
                "{field} means nothing to a machine of kind {}, which runs on one node",
                spec.kind
            ));
        }
        let abilities = kind.abilities();
        if !abilities.checkpoints && spec.checkpoints.is_some() {
            return Err(format!(
                "checkpoint-every means nothing to a machine of kind {}, which has no checkpoints",
                spec.kind
            ));
        }
        if !kind.fails_over_from_checkpoint(spec)
            && let Some(field) = failover_field(spec)
        {
            return Err(format!(
                "{field} means nothing to this machine of kind {}, which begins anew when its node fails",
                spec.kind
            ));
        }
        kind.check(spec)
    }

    /// Whether a machine fails over from its newest checkpoint ([`Kind::fails_over_from_checkpoint`]);
    /// false if this binary does not have its kind.
    pub fn fails_over_from_checkpoint(&self, spec: &Spec) -> bool {
        self.of(spec)
            .is_ok_and(|kind| kind.fails_over_from_checkpoint(spec))
    }

    /// The largest file that nodes fetch from each other, in bytes: what machines start from, or
    /// what a kind made of it.
    pub fn file_bytes_max(&self) -> u64 {
        let most = self.all().map(Kind::image_bytes_max).max();
        most.unwrap_or(0).saturating_mul(2)
    }

    /// Checks that a machine of a kind, or of any, can start from a file that begins so, as
    /// [`Kind::check_image`]; returns the most bytes that the file may have.
    ///
    /// # Errors
    /// Why none can; or this binary does not have the kind.
    pub fn check_image(&self, of: Option<&KindName>, beginning: &[u8]) -> Result<u64, String> {
        let kinds: Vec<&dyn Kind> = match of {
            Some(name) => vec![self.get(name)?],
            None => self.all().filter(|it| it.image_bytes_max() > 0).collect(),
        };
        let mut reasons = Vec::new();
        for kind in kinds {
            match kind.check_image(beginning) {
                Ok(()) => return Ok(kind.image_bytes_max()),
                Err(reason) => reasons.push(reason),
            }
        }
        Err(reasons.join("; "))
    }

    /// The kind of a worker's machine, from its command line; `None` if the process has ended, or
    /// is no worker of a kind that this binary has. `worker` is its folder in `/proc`. Blocks.
    pub fn of_worker(&self, worker: &Path) -> Option<&dyn Kind> {
        let line = std::fs::read(worker.join("cmdline")).ok()?;
        let mut words = line.split(|byte| *byte == 0);
        words.find(|word| *word == KIND_OPTION.as_bytes())?;
        let name = std::str::from_utf8(words.next()?).ok()?;
        self.all().find(|kind| kind.name().as_str() == name)
    }

    /// Bytes of memory that the machine of a worker occupies; `None` if it has none yet, or
    /// no memory that its kind tells from that of its process. `process` is the worker's
    /// folder in `/proc`. Blocks.
    pub fn memory_bytes(&self, process: &Path) -> Option<u64> {
        self.all().find_map(|kind| kind.memory_bytes(process))
    }

    /// The program whose compiled code has this file name in the cache.
    pub fn program_of_code(&self, file_name: &str) -> Option<String> {
        self.all().find_map(|kind| kind.program_of_code(file_name))
    }

    /// The kinds whose machines this host executes. Blocks.
    pub fn executed_here(&self, cache: &Path) -> Vec<Executed> {
        let executed = self.all().filter_map(|kind| {
            Some(Executed {
                kind: kind.name(),
                how: kind.executed_here(cache)?,
                features: kind.features_here(cache),
            })
        });
        executed.collect()
    }

    /// What this host lacks for fast moves, of all kinds.
    pub fn missing_for_moves(&self) -> Vec<String> {
        self.all().filter_map(Kind::missing_for_moves).collect()
    }
}

/// A field that only machines with parts can have, by its name in machine files.
fn spanning_field(balancing: &Balancing) -> Option<&'static str> {
    match balancing {
        Balancing {
            parts_max: Some(_), ..
        } => Some("max-parts"),
        Balancing {
            part_memory_bytes: Some(_),
            ..
        } => Some("part-memory"),
        Balancing { spawn, .. } if *spawn != Spawn::Auto => Some("spawn"),
        _ => None,
    }
}

/// A field of high availability that only machines can have which fail over from checkpoints, by its
/// name in machine files.
fn failover_field(spec: &Spec) -> Option<&'static str> {
    let usual = HighAvailability::default();
    match &spec.ha {
        Some(ha) if ha.to.is_some() => Some("ha: to"),
        Some(ha) if ha.protects_output() => Some("ha: protect"),
        Some(ha) if ha.replicas != usual.replicas => Some("ha: replicas"),
        Some(ha) if ha.checkpoint_every_ms != usual.checkpoint_every_ms => Some("ha: checkpoint"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_kinds_are_short_words() {
        for name in ["wasm", "qemu", "k8"] {
            assert_eq!(name.parse::<KindName>().unwrap().as_str(), name);
        }
        for text in ["", "Wasm", "a/b", "..", "a-kind", "aaaaaaaaaaaaaaaaa"] {
            assert!(text.parse::<KindName>().is_err(), "{text}");
            let json = serde_json::to_string(text).unwrap();
            assert!(serde_json::from_str::<KindName>(&json).is_err(), "{text}");
        }
    }

    #[test]
    fn a_part_for_one_kind_is_an_object_and_names_its_unknown_fields() {
        #[derive(Debug, Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Own {
            disk: u32,
        }
        assert!(KindSpec::new(&7).is_err());
        let own = KindSpec::new(&Own { disk: 7 }).unwrap();
        assert_eq!(own.decode::<Own>().unwrap().disk, 7);
        let other = KindSpec(serde_json::json!({ "disk": 7, "drive": 8 }));
        let refused = other.decode::<Own>().unwrap_err();
        assert!(refused.contains("`drive`"), "{refused}");
        // It survives the store's encoding.
        let bytes = keel_store::encoding::to_cbor(&own, Vec::new()).unwrap();
        assert_eq!(
            keel_store::encoding::from_cbor::<KindSpec>(&bytes).unwrap(),
            own
        );
    }
}
