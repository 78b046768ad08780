//! The processor of a system: which features it has beside those of QEMU's model `qemu64`.
//!
//! A system that has used a feature cannot go on where there is none, so what it has is decided once,
//! when the machine is made, from what the nodes have on which it may run, and kept in its spec.
//! Nodes tell each other in words what they have ([`Processor::words`]). What this host has is looked
//! up by [`crate::host_offers`].

use keel_machine::kind::{Features, NodeFeatures, some_of};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

/// QEMU's model with what every x86-64 host has and both accelerators emulate.
const BASE: &str = "qemu64";

/// What level 2 of the "x86-64 psABI" (version 1.0, section 3.1.1) has beside the base, by QEMU's names.
const LEVEL_2: &[&str] = &["popcnt", "sse4.1", "sse4.2", "ssse3"];
/// What level 3 has beside level 2.
const LEVEL_3: &[&str] = &[
    "abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave",
];
/// What level 4 has beside level 3.
const LEVEL_4: &[&str] = &["avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"];
/// Beside those of levels: what makes systems faster, and what tells them which faults the processor
/// has and how to avoid them. Nothing by which systems run systems, measure, or see more of their host.
const OTHERS: &[&str] = &[
    "3dnowprefetch",
    "adx",
    "aes",
    "amd-no-ssb",
    "amd-ssbd",
    "amd-stibp",
    "arch-capabilities",
    "avx-vnni",
    "avx512-vpopcntdq",
    "avx512bitalg",
    "avx512ifma",
    "avx512vbmi",
    "avx512vbmi2",
    "avx512vnni",
    "clflushopt",
    "clwb",
    "erms",
    "fsgsbase",
    "fsrm",
    "gfni",
    "ibpb",
    "ibrs-all",
    "invpcid",
    "md-clear",
    "mds-no",
    "pcid",
    "pclmulqdq",
    "pdpe1gb",
    "pku",
    "pschange-mc-no",
    "rdctl-no",
    "rdpid",
    "rdrand",
    "rdseed",
    "rdtscp",
    "serialize",
    "sha-ni",
    "skip-l1dfl-vmentry",
    "smap",
    "smep",
    "spec-ctrl",
    "ssb-no",
    "ssbd",
    "sse4a",
    "stibp",
    "taa-no",
    "tsc-adjust",
    "tsc-deadline",
    "umip",
    "vaes",
    "virt-ssbd",
    "vpclmulqdq",
    "wbnoinvd",
    "xgetbv1",
    "xsavec",
    "xsaveopt",
    "xsaves",
];

/// All features that a system may have beside those of the base.
pub(crate) fn known_features() -> impl Iterator<Item = &'static str> {
    [LEVEL_2, LEVEL_3, LEVEL_4, OTHERS]
        .into_iter()
        .flatten()
        .copied()
}

/// The longest name of a processor's maker, in bytes, as `cpuid` tells it.
const VENDOR_BYTES_MAX: usize = 12;

/// What executes the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// The host's processor.
    Kvm,
    /// Translation, some ten times slower.
    Tcg,
}

impl Accelerator {
    /// QEMU's name for it.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Accelerator::Kvm => "kvm",
            Accelerator::Tcg => "tcg",
        }
    }
}

/// What a user asks of a system's processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum CpuModel {
    /// All that the nodes have in common on which the machine may run.
    #[serde(rename = "common")]
    Common,
    /// A level of the x86-64 psABI, and nothing else.
    #[serde(rename = "x86-64")]
    Level1,
    #[serde(rename = "x86-64-v2")]
    Level2,
    #[serde(rename = "x86-64-v3")]
    Level3,
    #[serde(rename = "x86-64-v4")]
    Level4,
}

impl CpuModel {
    /// All of them.
    pub const ALL: [CpuModel; 5] = [
        CpuModel::Common,
        CpuModel::Level1,
        CpuModel::Level2,
        CpuModel::Level3,
        CpuModel::Level4,
    ];

    /// Its name.
    pub fn word(self) -> &'static str {
        match self {
            CpuModel::Common => "common",
            CpuModel::Level1 => "x86-64",
            CpuModel::Level2 => "x86-64-v2",
            CpuModel::Level3 => "x86-64-v3",
            CpuModel::Level4 => "x86-64-v4",
        }
    }

    /// The features of a level beside those of the base; `None` where that depends on nodes.
    fn of_level(self) -> Option<BTreeSet<String>> {
        let parts: &[&[&str]] = match self {
            CpuModel::Common => return None,
            CpuModel::Level1 => &[],
            CpuModel::Level2 => &[LEVEL_2],
            CpuModel::Level3 => &[LEVEL_2, LEVEL_3],
            CpuModel::Level4 => &[LEVEL_2, LEVEL_3, LEVEL_4],
        };
        let names = parts.iter().copied().flatten();
        Some(names.map(|name| (*name).to_owned()).collect())
    }
}

impl fmt::Display for CpuModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

impl FromStr for CpuModel {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut all = CpuModel::ALL.into_iter();
        all.find(|model| model.word() == text).ok_or_else(|| {
            let known = CpuModel::ALL.map(CpuModel::word).join(", ");
            format!("{text:?} is none of {known}")
        })
    }
}

/// Whether a text is the name of a maker of processors, which begins with a capital: features do not.
pub(crate) fn is_vendor(text: &str) -> bool {
    (1..=VENDOR_BYTES_MAX).contains(&text.len())
        && text.starts_with(|first: char| first.is_ascii_uppercase())
        && text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// A processor that a system has, or that a host can give to systems.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Processor {
    pub accelerator: Accelerator,
    /// Its maker, as `cpuid` tells it, where the host's processor is seen. Systems choose other code
    /// for other makers, once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vendor: Option<String>,
    /// By QEMU's names: what it has beside the features of the base.
    pub features: BTreeSet<String>,
}

impl Processor {
    /// QEMU's description of it, which must be fulfilled.
    pub(crate) fn argument(&self) -> String {
        let features = self.features.iter().map(|name| format!(",{name}=on"));
        format!("{BASE},enforce=on{}", features.collect::<String>())
    }

    /// QEMU's description of the processor of machines whose spec says nothing of it, as those that
    /// an older version has made.
    pub(crate) fn base_argument() -> String {
        BASE.to_owned()
    }

    /// Checks its values: QEMU takes them as they are.
    ///
    /// # Errors
    /// A message for the user.
    pub(crate) fn check(&self) -> Result<(), String> {
        let is_known = |name: &String| known_features().any(|known| known == name);
        if let Some(name) = self.features.iter().find(|name| !is_known(name)) {
            return Err(format!(
                "its processor has the feature {name:?}, which this version does not know"
            ));
        }
        match self.vendor.as_ref().filter(|vendor| !is_vendor(vendor)) {
            Some(vendor) => Err(format!("{vendor:?} is no maker of processors")),
            None => Ok(()),
        }
    }

    /// It in words, which a host has if it can give this processor to systems: `kvm`,
    /// `kvm:AuthenticAMD`, `kvm:avx2`.
    pub(crate) fn words(&self) -> Features {
        let accelerator = self.accelerator.word();
        let parts = self.vendor.iter().chain(&self.features);
        let parts = parts.map(|part| format!("{accelerator}:{part}"));
        parts.chain([accelerator.to_owned()]).collect()
    }

    /// What a host that has these words gives with an accelerator; `None` if nothing.
    fn of_words(accelerator: Accelerator, words: &Features) -> Option<Self> {
        if !words.contains(accelerator.word()) {
            return None;
        }
        let parts = words.iter().filter_map(|word| {
            let (of, part) = word.split_once(':')?;
            (of == accelerator.word()).then_some(part)
        });
        let (mut vendor, mut features) = (None, BTreeSet::new());
        for part in parts {
            // Names of a later version are not for this one to give.
            match known_features().any(|known| known == part) {
                true => drop(features.insert(part.to_owned())),
                false if is_vendor(part) => vendor = Some(part.to_owned()),
                false => {}
            }
        }
        Some(Processor {
            accelerator,
            vendor,
            features,
        })
    }

    /// What a host lacks that can give these processors, in a sentence; `None` if nothing.
    pub(crate) fn lacking_in(&self, given: &[Processor]) -> Option<String> {
        let accelerator = self.accelerator.word().to_uppercase();
        let mut given = given.iter();
        let Some(given) = given.find(|it| it.accelerator == self.accelerator) else {
            return Some(format!(
                "it has no {accelerator}, with which the machine was made"
            ));
        };
        if self.vendor != given.vendor {
            let made_by = |it: &Processor| it.vendor.clone().unwrap_or_else(|| "nobody".into());
            return Some(format!(
                "its processor is made by {}, that of the machine by {}",
                made_by(given),
                made_by(self)
            ));
        }
        let mut missing = self.features.difference(&given.features).peekable();
        missing.peek()?;
        let missing = some_of(missing);
        Some(format!("its processor ({accelerator}) lacks {missing}"))
    }

    /// The processor of a new machine, from what nodes have on which it may run, of which `on` is the
    /// one where it begins, if that is known. Where processors execute systems themselves, KVM is
    /// preferred, and unless something else is asked for a system has what they have in common; where
    /// systems are translated, further features make them slower, so that they have none. `None` if of
    /// no node it is known what it has.
    ///
    /// # Errors
    /// If no node has what is asked for.
    pub(crate) fn chosen(
        model: Option<CpuModel>,
        nodes: &[NodeFeatures<'_>],
        on: Option<&str>,
    ) -> Result<Option<Self>, String> {
        let level = model.and_then(CpuModel::of_level);
        let mut refusals = Vec::new();
        for accelerator in [Accelerator::Kvm, Accelerator::Tcg] {
            let given = nodes.iter().filter_map(|node| {
                let processor = Processor::of_words(accelerator, node.features)?;
                Some((node.node, processor))
            });
            let mut given: Vec<(&str, Processor)> = given.collect();
            for required in level.iter().flatten() {
                given.retain(|(node, processor)| {
                    let has = processor.features.contains(required);
                    if !has {
                        refusals.push(format!("{node} lacks {required} ({})", accelerator.word()));
                    }
                    has
                });
            }
            let vendor = match on.map(|on| given.iter().find(|(node, _)| *node == on)) {
                Some(None) => continue,
                Some(Some((_, first))) => first.vendor.clone(),
                None => most_frequent(given.iter().map(|(_, it)| it.vendor.clone())).flatten(),
            };
            let of_vendor = given.into_iter().filter(|(_, it)| it.vendor == vendor);
            let all = of_vendor.map(|(_, processor)| processor.features);
            let Some(common) = all.reduce(|one, other| &one & &other) else {
                continue;
            };
            let features = match (&level, model, accelerator) {
                (Some(level), ..) => level.clone(),
                (None, None, Accelerator::Tcg) => BTreeSet::new(),
                (None, ..) => common,
            };
            return Ok(Some(Processor {
                accelerator,
                vendor,
                features,
            }));
        }
        match model {
            Some(model) if !refusals.is_empty() => {
                let refusals = some_of(&refusals);
                Err(format!(
                    "cpu-model: no node where it may begin has all of {model}: {refusals}"
                ))
            }
            Some(_) => Err(
                "cpu-model: no node where it may begin says yet what its processor has; try again"
                    .into(),
            ),
            None => Ok(None),
        }
    }
}

/// The value that is there most often; of those, the first in order.
fn most_frequent<T: Ord>(all: impl Iterator<Item = T>) -> Option<T> {
    let mut counts: BTreeMap<T, usize> = BTreeMap::new();
    for value in all {
        *counts.entry(value).or_default() += 1;
    }
    let most = counts.into_iter().rev().max_by_key(|(_, count)| *count);
    most.map(|(value, _)| value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(all: &[&str]) -> Features {
        all.iter().map(|word| (*word).to_owned()).collect()
    }

    fn chosen(
        model: Option<CpuModel>,
        nodes: &[(&str, &[&str])],
        on: Option<&str>,
    ) -> Result<Option<Processor>, String> {
        let nodes: Vec<(&str, Features)> = nodes
            .iter()
            .map(|(node, all)| (*node, words(all)))
            .collect();
        let nodes: Vec<NodeFeatures<'_>> = nodes
            .iter()
            .map(|(node, features)| NodeFeatures { node, features })
            .collect();
        let chosen = Processor::chosen(model, &nodes, on)?;
        if let Some(processor) = &chosen {
            processor.check().unwrap();
            // What is chosen is there, wherever it may be.
            let needed = processor.words();
            let mut able = nodes.iter().filter(|it| needed.is_subset(it.features));
            assert!(able.any(|it| on.is_none_or(|on| on == it.node)));
        }
        Ok(chosen)
    }

    fn processor(accelerator: Accelerator, vendor: Option<&str>, features: &[&str]) -> Processor {
        Processor {
            accelerator,
            vendor: vendor.map(str::to_owned),
            features: words(features),
        }
    }

    #[test]
    fn a_system_has_what_the_nodes_have_in_common_that_execute_it() {
        let all: [(&str, &[&str]); 4] = [
            (
                "a",
                &[
                    "kvm",
                    "kvm:GenuineIntel",
                    "kvm:aes",
                    "kvm:avx",
                    "tcg",
                    "tcg:aes",
                ],
            ),
            (
                "b",
                &["kvm", "kvm:GenuineIntel", "kvm:avx", "kvm:later", "tcg"],
            ),
            (
                "c",
                &[
                    "kvm",
                    "kvm:AuthenticAMD",
                    "kvm:aes",
                    "kvm:avx",
                    "tcg",
                    "tcg:aes",
                ],
            ),
            ("d", &["tcg", "tcg:aes", "tcg:avx"]),
        ];
        let intel = processor(Accelerator::Kvm, Some("GenuineIntel"), &["avx"]);
        assert_eq!(chosen(None, &all, None), Ok(Some(intel.clone())));
        assert_eq!(chosen(None, &all, Some("b")), Ok(Some(intel.clone())));
        assert_eq!(chosen(Some(CpuModel::Common), &all, None), Ok(Some(intel)));
        let amd = processor(Accelerator::Kvm, Some("AuthenticAMD"), &["aes", "avx"]);
        assert_eq!(chosen(None, &all, Some("c")), Ok(Some(amd)));
        // Translated: the base, unless all is asked for.
        let translated = |features: &[&str]| Ok(Some(processor(Accelerator::Tcg, None, features)));
        assert_eq!(chosen(None, &all, Some("d")), translated(&[]));
        let common = Some(CpuModel::Common);
        assert_eq!(chosen(common, &all, Some("d")), translated(&[]));
        let some = [all[0], all[2], all[3]];
        assert_eq!(chosen(common, &some, Some("d")), translated(&["aes"]));
        assert_eq!(chosen(common, &all[3..], None), translated(&["aes", "avx"]));
    }

    #[test]
    fn a_level_is_given_by_the_nodes_that_have_it_or_refused_by_name() {
        let second: &[&str] = &["tcg", "tcg:popcnt", "tcg:sse4.1", "tcg:sse4.2", "tcg:ssse3"];
        let all: [(&str, &[&str]); 2] = [("a", second), ("b", &["tcg", "tcg:popcnt"])];
        let level = Some(CpuModel::Level2);
        let found = chosen(level, &all, None).unwrap().unwrap();
        assert_eq!(found, processor(Accelerator::Tcg, None, LEVEL_2));
        for (nodes, on) in [(&all[..], Some("b")), (&all[1..], None)] {
            let refused = chosen(level, nodes, on).unwrap_err();
            assert!(refused.contains("b lacks sse4.1 (tcg)"), "{refused}");
        }
        assert!(chosen(Some(CpuModel::Level1), &all, None).is_ok());
        // Nobody has said anything.
        assert_eq!(chosen(None, &[("a", &[])], None), Ok(None));
        let refused = chosen(level, &[], None).unwrap_err();
        assert!(refused.contains("try again"), "{refused}");
    }

    #[test]
    fn a_host_lacks_what_it_does_not_give_with_the_same_accelerator() {
        let needed = processor(Accelerator::Kvm, Some("GenuineIntel"), &["aes", "avx"]);
        let tcg = processor(Accelerator::Tcg, None, &["aes", "avx"]);
        let lacking = |given: &Processor| needed.lacking_in(&[tcg.clone(), given.clone()]);
        let has = |features: &[&str]| processor(Accelerator::Kvm, Some("GenuineIntel"), features);
        assert_eq!(lacking(&has(&["aes", "avx", "avx2"])), None);
        let refused = lacking(&has(&["avx2"])).unwrap();
        assert!(refused.ends_with("(KVM) lacks aes, avx"), "{refused}");
        let other = processor(Accelerator::Kvm, Some("AuthenticAMD"), &["aes", "avx"]);
        assert!(lacking(&other).unwrap().contains("made by AuthenticAMD"));
        assert!(needed.lacking_in(&[tcg]).unwrap().contains("no KVM"));
    }

    #[test]
    fn words_say_all_and_only_known_features_become_arguments() {
        let all = processor(Accelerator::Kvm, Some("HygonGenuine"), &["avx", "sse4.2"]);
        assert_eq!(
            Processor::of_words(Accelerator::Kvm, &all.words()),
            Some(all.clone())
        );
        assert_eq!(Processor::of_words(Accelerator::Tcg, &all.words()), None);
        assert_eq!(all.argument(), "qemu64,enforce=on,avx=on,sse4.2=on");
        for wrong in ["avx=on,kvm", "", "vmx"] {
            let refused = processor(Accelerator::Tcg, None, &[wrong]).check();
            assert!(refused.unwrap_err().contains("does not know"));
        }
        processor(Accelerator::Kvm, Some("no maker"), &[])
            .check()
            .unwrap_err();
        let distinct: BTreeSet<&str> = known_features().collect();
        assert_eq!(distinct.len(), known_features().count());
    }
}
