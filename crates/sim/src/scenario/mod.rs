//! Scenario files: the simulated cluster, external events, and expectations.
//!
//! - here: the file format
//! - `cluster`: the nodes, machines and events that a scenario describes

mod cluster;

pub use cluster::Cluster;

use crate::bad_input::{self, BadInput};
use crate::curve::Curve;
use crate::energy::Power;
use crate::expect::Expect;
use crate::world::{InvalidReport, Network};
use keel_balance::policy::Policy;
use keel_balance::rules::Rule;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use toml::Spanned;

/// Maximum simulated time, in seconds: a year.
const LENGTH_MAX_S: u64 = 366 * 86_400;
/// Maximum number of nodes, and of machines.
pub(crate) const NODES_MAX: usize = 100_000;
pub(crate) const MACHINES_MAX: usize = 1_000_000;

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// Purpose, in a sentence.
    #[serde(default)]
    pub about: String,
    /// Determines all random choices.
    #[serde(default = "one")]
    pub seed: u64,
    /// Seconds that it lasts.
    pub length_s: u64,
    /// Interval between two samples of all nodes, for the plot, energy and overload, in seconds; by
    /// default about 480 samples.
    pub look_s: Option<u64>,
    /// Time after which the machines of a failed node restart on others, in seconds; `None`: they
    /// wait for their node.
    pub failover_s: Option<u64>,
    #[serde(default)]
    pub network: Network,
    /// The balancing policy.
    #[serde(default)]
    pub policy: Policy,
    /// A cluster in the format of Ganeti's tools.
    pub ganeti: Option<Ganeti>,
    #[serde(default)]
    pub nodes: Vec<Spanned<NodeGroup>>,
    #[serde(default)]
    pub machines: Vec<Spanned<MachineGroup>>,
    /// Rules of where machines may be.
    #[serde(default)]
    pub rules: Vec<Spanned<Rule>>,
    #[serde(default)]
    pub events: Vec<Spanned<Event>>,
    #[serde(default)]
    pub expect: Expect,
    #[serde(skip)]
    pub path: PathBuf,
    #[serde(skip)]
    text: String,
}

fn one() -> u64 {
    1
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ganeti {
    /// The file for `hbal -t`; relative to the scenario.
    pub file: PathBuf,
    /// The file for `hbal -U`.
    pub utilisation: Option<PathBuf>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeGroup {
    #[serde(default = "single")]
    pub count: usize,
    /// Name pattern; `{}` is the number from 1.
    pub name: String,
    pub cores: f64,
    /// Speed of a core relative to the reference core, 0.25 to 4.
    #[serde(default = "reference_speed")]
    pub speed: f64,
    /// Memory of each, in MiB.
    pub memory_mib: u64,
    /// Disk bandwidth, in MiB per second.
    #[serde(default = "usual_io")]
    pub io_mib_per_s: f64,
    /// Labels for initial placement and rules.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    pub power: Option<Power>,
}

fn single() -> usize {
    1
}

fn reference_speed() -> f64 {
    1.0
}

fn usual_io() -> f64 {
    500.0
}

/// Initial placement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InitialPlacement {
    #[default]
    Spread,
    Random,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineGroup {
    /// By default one, or as many as there are traces.
    pub count: Option<usize>,
    /// Name pattern; `{}` is the number from 1.
    pub name: Option<String>,
    /// Their initial node.
    pub on: Option<String>,
    /// Initial placement, unless `on` names a node.
    #[serde(default)]
    pub place: InitialPlacement,
    /// Required labels of their initial nodes.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Their own labels, for rules.
    #[serde(default)]
    pub own_labels: BTreeMap<String, String>,
    /// Demand of each, in cores of the reference speed. For `bursts` and `noise` each machine has
    /// its own seed.
    pub curve: Option<Curve>,
    /// Recorded demand.
    pub traces: Option<Traces>,
    /// Whether they are CPU-bound: they take as many cores on any node.
    #[serde(default)]
    pub burns: bool,
    /// Memory of each, in MiB.
    #[serde(default = "usual_memory")]
    pub memory_mib: u64,
    /// Memory dirtied by each, in MiB per second.
    #[serde(default)]
    pub dirty_mib_per_s: f64,
    /// Disk traffic of each, in MiB per second.
    #[serde(default)]
    pub io_mib_per_s: f64,
    /// Whether the balancer may move them.
    #[serde(default = "yes")]
    pub balance: bool,
}

fn usual_memory() -> u64 {
    256
}

fn yes() -> bool {
    true
}

/// Loads that were recorded.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Traces {
    /// A folder of PlanetLab traces, in the layout of CloudSim; relative to the scenario.
    pub planetlab: Option<PathBuf>,
    /// A file with one column per machine.
    pub csv: Option<PathBuf>,
    /// Index of the first trace used.
    #[serde(default)]
    pub first: usize,
    /// Cores at full utilisation (PlanetLab), or a factor for the values (CSV).
    #[serde(default = "reference_speed")]
    pub cores: f64,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind", deny_unknown_fields)]
pub enum Event {
    NodeDies {
        /// When, in seconds.
        at_s: f64,
        node: String,
    },
    /// A node starts; if this is its first event, it did not run before.
    NodeComes {
        /// When, in seconds.
        at_s: f64,
        node: String,
    },
    /// Machines start; if this is the first event of a machine, it did not run before.
    MachineStarts {
        /// When, in seconds.
        at_s: f64,
        /// A name, or a prefix as in `web-*`.
        machine: String,
    },
    MachineEnds {
        /// When, in seconds.
        at_s: f64,
        /// A name, or a prefix as in `web-*`.
        machine: String,
    },
    Policy {
        /// When, in seconds.
        at_s: f64,
        /// Changed keys of the policy.
        change: toml::Table,
    },
    /// A rule is added or replaced.
    RuleComes {
        /// When, in seconds.
        at_s: f64,
        rule: Rule,
    },
    /// A rule is removed.
    RuleGoes {
        /// When, in seconds.
        at_s: f64,
        rule: String,
    },
    ClockJumps {
        /// When, in seconds.
        at_s: f64,
        node: String,
        /// In seconds; backwards if negative.
        by_s: f64,
    },
    /// A node reports invalid numbers from now on.
    NodeLies {
        /// When, in seconds.
        at_s: f64,
        node: String,
        /// Kind of invalid number; `None`: valid again.
        numbers: Option<InvalidReport>,
    },
    /// A node measures invalid numbers from now on.
    NodeMismeasures {
        /// When, in seconds.
        at_s: f64,
        node: String,
        /// Kind of invalid number; `None`: valid again.
        numbers: Option<InvalidReport>,
    },
    /// A node responds late from now on, or more than once.
    NodeLate {
        /// When, in seconds.
        at_s: f64,
        node: String,
        /// By how many milliseconds.
        #[serde(default)]
        by_ms: u64,
        /// Share of its responses that are duplicated, 0 to 1.
        #[serde(default)]
        doubled: f64,
    },
}

impl Event {
    /// When, in seconds.
    pub fn at_s(&self) -> f64 {
        match self {
            Event::NodeDies { at_s, .. }
            | Event::NodeComes { at_s, .. }
            | Event::MachineStarts { at_s, .. }
            | Event::MachineEnds { at_s, .. }
            | Event::Policy { at_s, .. }
            | Event::RuleComes { at_s, .. }
            | Event::RuleGoes { at_s, .. }
            | Event::ClockJumps { at_s, .. }
            | Event::NodeLies { at_s, .. }
            | Event::NodeMismeasures { at_s, .. }
            | Event::NodeLate { at_s, .. } => *at_s,
        }
    }
}

impl Scenario {
    /// Reads a file.
    ///
    /// # Errors
    /// The file, line and reason of an error; for unknown keys the most similar known key.
    pub fn read(path: &Path) -> Result<Self, BadInput> {
        Self::parse(path, &bad_input::read(path)?)
    }

    /// Parses a file's text; `path` is for errors.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn parse(path: &Path, text: &str) -> Result<Self, BadInput> {
        let read: Result<Scenario, _> = toml::from_str(text);
        let mut scenario = read.map_err(|error| bad_input::from_toml(path, text, &error))?;
        scenario.path = path.to_owned();
        scenario.text = text.to_owned();
        scenario.check()?;
        Ok(scenario)
    }

    /// A scenario of ten minutes for a cluster of Ganeti's tools.
    pub fn from_ganeti(file: PathBuf, utilisation: Option<PathBuf>) -> Self {
        Scenario {
            about: format!("the cluster of {}", file.display()),
            seed: one(),
            length_s: 600,
            look_s: None,
            failover_s: None,
            network: Network::default(),
            policy: Policy::default(),
            nodes: Vec::new(),
            machines: Vec::new(),
            rules: Vec::new(),
            events: Vec::new(),
            expect: Expect::default(),
            path: file.clone(),
            text: String::new(),
            ganeti: Some(Ganeti {
                file: absolute(&file),
                utilisation: utilisation.as_deref().map(absolute),
            }),
        }
    }

    /// Replaces nodes and machines by those of Ganeti's files.
    pub fn use_ganeti(&mut self, file: &Path, utilisation: Option<&Path>) {
        self.nodes.clear();
        self.machines.clear();
        self.ganeti = Some(Ganeti {
            file: absolute(file),
            utilisation: utilisation.map(absolute),
        });
    }

    /// Replaces the folder of PlanetLab traces.
    ///
    /// # Errors
    /// If the scenario uses none.
    pub fn use_planetlab(&mut self, folder: &Path) -> Result<(), BadInput> {
        self.use_traces("planetlab", |traces| traces.planetlab.as_mut(), folder)
    }

    /// Replaces the CSV file of loads.
    ///
    /// # Errors
    /// If the scenario uses none.
    pub fn use_csv(&mut self, file: &Path) -> Result<(), BadInput> {
        self.use_traces("csv", |traces| traces.csv.as_mut(), file)
    }

    fn use_traces(
        &mut self,
        kind: &str,
        of: impl Fn(&mut Traces) -> Option<&mut PathBuf>,
        path: &Path,
    ) -> Result<(), BadInput> {
        let groups = self.machines.iter_mut().map(Spanned::get_mut);
        let traces = groups.filter_map(|group| group.traces.as_mut());
        let mut found = false;
        for named in traces.filter_map(of) {
            *named = absolute(path);
            found = true;
        }
        if found {
            return Ok(());
        }
        let reason = format!("it has no machines with traces = {{ {kind} = ... }}");
        Err(BadInput::file(&self.path, reason))
    }

    /// An error in a group or an event, with its line.
    pub(crate) fn error_at<T>(&self, of: &Spanned<T>, reason: impl ToString) -> BadInput {
        let line = bad_input::line_of(&self.text, of.span().start);
        BadInput::line(&self.path, line, reason)
    }

    fn check(&self) -> Result<(), BadInput> {
        let bad = |reason: String| BadInput::file(&self.path, reason);
        if !(1..=LENGTH_MAX_S).contains(&self.length_s) {
            let reason = format!(
                "length_s is {}; 1 to {LENGTH_MAX_S} are possible",
                self.length_s
            );
            return Err(bad(reason));
        }
        if self.look_s == Some(0) {
            return Err(bad("look_s is 0; at least 1 is possible".into()));
        }
        self.policy
            .check()
            .map_err(|error| bad(error.to_string()))?;
        let network = &self.network;
        for (name, share) in [
            ("lost", network.lost),
            ("doubled", network.doubled),
            ("moves_failed", network.moves_failed),
        ] {
            if !(0.0..=1.0).contains(&share) {
                return Err(bad(format!(
                    "network.{name} is {share}; 0 to 1 are possible"
                )));
            }
        }
        let (least, most) = network.delay_ms;
        if least > most || most > 3_600_000 {
            let reason = format!("network.delay_ms is [{least}, {most}]; it is [LEAST, MOST]");
            return Err(bad(reason));
        }
        if !(1.0..=1e15).contains(&network.bytes_per_s) {
            let reason = format!(
                "network.bytes_per_s is {}; it is at least 1",
                network.bytes_per_s
            );
            return Err(bad(reason));
        }
        for event in &self.events {
            let at_s = event.get_ref().at_s();
            if !(0.0..=self.length_s as f64).contains(&at_s) {
                let reason = format!("at_s is {at_s}; the scenario lasts for {} s", self.length_s);
                return Err(self.error_at(event, reason));
            }
        }
        Ok(())
    }
}

/// Command-line paths are relative to the working directory, not to a scenario.
fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// Changes keys of a policy.
///
/// # Errors
/// A sentence about an unknown key or an invalid value.
pub(crate) fn change_policy(policy: &Policy, change: &toml::Table) -> Result<Policy, String> {
    let text = toml::to_string(policy).map_err(|error| error.to_string())?;
    let mut all: toml::Table = toml::from_str(&text).map_err(|error| error.to_string())?;
    merge(&mut all, change);
    let policy: Policy = all
        .try_into()
        .map_err(|error: toml::de::Error| bad_input::sentence(error.message()))?;
    policy.check().map_err(|error| error.to_string())?;
    Ok(policy)
}

/// Merges tables recursively.
pub(crate) fn merge(all: &mut toml::Table, change: &toml::Table) {
    for (key, value) in change {
        match (all.get_mut(key), value) {
            (Some(toml::Value::Table(inner)), toml::Value::Table(change)) => merge(inner, change),
            _ => {
                all.insert(key.clone(), value.clone());
            }
        }
    }
}
