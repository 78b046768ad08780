//! The layout of control groups: version 2, version 1, or both (hybrid), which
//! controllers are where, and where this process is.

use procfs::process::{MountInfos, Process};
use procfs::{ProcResult, ProcessCGroups};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The version 2 group that an agent creates for itself.
pub(super) const AGENT_LEAF: &str = "keel-agent";

/// The group that systemd creates for commands it runs after a service has stopped.
const CONTROL_LEAF: &str = ".control";

/// Version of a hierarchy.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
pub(super) enum Version {
    V1,
    V2,
}

/// The folder for workers' groups in one hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HierarchyRoot {
    pub(super) version: Version,
    pub(super) folder: PathBuf,
    /// Controllers that groups there should have.
    pub(super) controllers: Vec<&'static str>,
}

/// The groups of this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// Folder of the version 2 group.
    unified: Option<PathBuf>,
    /// Folders of version 1 groups, by controller.
    legacy: BTreeMap<String, PathBuf>,
}

impl Layout {
    /// Controllers that limit and account machines.
    pub const WANTED: [&str; 3] = ["cpu", "memory", "io"];

    /// That of this process.
    ///
    /// # Errors
    /// If `/proc` cannot be read.
    pub fn read() -> ProcResult<Self> {
        let process = Process::myself()?;
        Ok(Layout::of(&process.mountinfo()?, &process.cgroups()?))
    }

    fn of(mounts: &MountInfos, groups: &ProcessCGroups) -> Self {
        let mut layout = Layout {
            unified: None,
            legacy: BTreeMap::new(),
        };
        for group in groups {
            let unified = group.hierarchy == 0;
            let mount = mounts.iter().find(|mount| match mount.fs_type.as_str() {
                "cgroup2" => unified,
                "cgroup" => group
                    .controllers
                    .iter()
                    .any(|name| mount.super_options.contains_key(name)),
                _ => false,
            });
            let Some(mount) = mount else { continue };
            // In a container the mount may be a subtree, and the group may be outside of
            // it.
            let inner = Path::new(&group.pathname)
                .strip_prefix(&mount.root)
                .unwrap_or(Path::new(""));
            let inside = !inner
                .components()
                .any(|part| part == std::path::Component::ParentDir);
            let folder = if inside && inner != Path::new("") {
                mount.mount_point.join(inner)
            } else {
                mount.mount_point.clone()
            };
            if unified {
                layout.unified = Some(folder);
            } else {
                for controller in &group.controllers {
                    layout.legacy.insert(controller.clone(), folder.clone());
                }
            }
        }
        layout
    }

    /// Folder of this process's version 2 group.
    pub(super) fn unified(&self) -> Option<&Path> {
        self.unified.as_deref()
    }

    /// Folder of this process's version 1 group for a controller.
    pub(super) fn legacy(&self, controller: &str) -> Option<&Path> {
        self.legacy.get(controller).map(PathBuf::as_path)
    }

    /// A word for users.
    pub fn word(&self) -> &'static str {
        match (&self.unified, self.legacy.is_empty()) {
            (Some(_), true) => "version 2",
            (Some(_), false) => "hybrid",
            (None, false) => "version 1",
            (None, true) => "none mounted",
        }
    }

    /// The folder for version 2 groups: this process's group, or its parent if an agent
    /// has entered a group of its own.
    fn unified_root(&self) -> Option<&Path> {
        let own = self.unified.as_deref()?;
        match own.file_name() {
            Some(name) if name == AGENT_LEAF || name == CONTROL_LEAF => own.parent(),
            _ => Some(own),
        }
    }

    /// Controllers available to version 2 groups here, in the kernel's notation; empty
    /// without version 2.
    pub fn on_unified(&self) -> String {
        self.unified_root()
            .and_then(|folder| std::fs::read_to_string(folder.join("cgroup.controllers")).ok())
            .unwrap_or_default()
    }

    /// The folders for groups, each with its controllers of [`Self::WANTED`].
    /// `on_unified` is the result of [`Self::on_unified`].
    pub fn places(&self, on_unified: &str) -> BTreeMap<PathBuf, BTreeSet<&'static str>> {
        let mut places: BTreeMap<PathBuf, BTreeSet<&'static str>> = BTreeMap::new();
        for wanted in Layout::WANTED {
            // Its name in version 1.
            let legacy = if wanted == "io" { "blkio" } else { wanted };
            let unified = self.unified_root().filter(|_| has(on_unified, wanted));
            let legacy = self.legacy.get(legacy).map(PathBuf::as_path);
            if let Some(folder) = unified.or(legacy) {
                places.entry(folder.to_owned()).or_default().insert(wanted);
            }
        }
        places
    }

    /// The hierarchy with the `cpu` controller, and this process's folder in it for groups.
    pub(super) fn cpu_root(&self, on_unified: &str) -> Option<(Version, &Path)> {
        let unified = self.unified_root().filter(|_| has(on_unified, "cpu"));
        let unified = unified.map(|folder| (Version::V2, folder));
        unified.or_else(|| Some((Version::V1, self.legacy.get("cpu")?.as_path())))
    }

    /// The hierarchies for workers' groups.
    ///
    /// The `cpu` controller is taken only from version 2. There a node's machines compete
    /// only with its agent; in version 1 a machine's group would have the weight of a
    /// single process of the host, so only threads with a limit enter one
    /// ([`Self::cpu_root`]).
    pub(super) fn roots(&self, on_unified: &str) -> Vec<HierarchyRoot> {
        let mut roots = Vec::new();
        if let Some(folder) = self.unified_root() {
            let wanted = ["memory", "cpu"].into_iter();
            roots.push(HierarchyRoot {
                version: Version::V2,
                folder: folder.to_owned(),
                controllers: wanted.filter(|name| has(on_unified, name)).collect(),
            });
        }
        if !has(on_unified, "memory")
            && let Some(folder) = self.legacy.get("memory")
        {
            roots.push(HierarchyRoot {
                version: Version::V1,
                folder: folder.clone(),
                controllers: vec!["memory"],
            });
        }
        roots
    }
}

fn has(list: &str, controller: &str) -> bool {
    list.split_whitespace().any(|name| name == controller)
}

#[cfg(test)]
mod tests {
    use super::*;
    use procfs::FromRead;

    fn layout(mounts: &str, groups: &str) -> Layout {
        Layout::of(
            &MountInfos::from_read(mounts.as_bytes()).unwrap(),
            &ProcessCGroups::from_read(groups.as_bytes()).unwrap(),
        )
    }

    const UNIFIED: &str = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
    const HYBRID: &str = "\
            31 30 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
            32 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
            33 30 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
            34 30 0:30 / /sys/fs/cgroup/blkio rw - cgroup cgroup rw,blkio\n";
    const HYBRID_GROUPS: &str =
        "4:blkio:/a\n3:memory:/b\n2:cpu,cpuacct:/c\n1:name=systemd:/d\n0::/e\n";

    fn root(version: Version, folder: &str, controllers: &[&'static str]) -> HierarchyRoot {
        HierarchyRoot {
            version,
            folder: folder.into(),
            controllers: controllers.to_vec(),
        }
    }

    #[test]
    fn version_2_has_one_folder() {
        let layout = layout(UNIFIED, "0::/user.slice/me\n");
        assert_eq!(layout.word(), "version 2");
        let mine = PathBuf::from("/sys/fs/cgroup/user.slice/me");
        assert_eq!(
            layout.places("cpuset cpu io memory pids\n"),
            BTreeMap::from([(mine.clone(), BTreeSet::from(["cpu", "io", "memory"]))])
        );
        // A controller that is not delegated is not available.
        assert_eq!(
            layout.places("memory\n"),
            BTreeMap::from([(mine, BTreeSet::from(["memory"]))])
        );
        let mine = "/sys/fs/cgroup/user.slice/me";
        assert_eq!(
            layout.roots("cpu io memory\n"),
            [root(Version::V2, mine, &["memory", "cpu"])]
        );
        assert_eq!(layout.roots("\n"), [root(Version::V2, mine, &[])]);
    }

    #[test]
    fn an_agent_in_its_own_group_uses_the_parent() {
        let mine = "/sys/fs/cgroup/system.slice/keel.service";
        for leaf in ["keel-agent", ".control"] {
            let layout = layout(UNIFIED, &format!("0::/system.slice/keel.service/{leaf}\n"));
            let expected = [root(Version::V2, mine, &["memory"])];
            assert_eq!(layout.roots("memory\n"), expected);
        }
        let layout = layout(UNIFIED, "0::/system.slice/keel.service/keel-agent\n");
        assert_eq!(
            layout.places("memory\n"),
            BTreeMap::from([(mine.into(), BTreeSet::from(["memory"]))])
        );
    }

    #[test]
    fn hybrid_uses_the_hierarchy_of_each_controller() {
        let layout = layout(HYBRID, HYBRID_GROUPS);
        assert_eq!(layout.word(), "hybrid");
        let place = |path: &str, what| (PathBuf::from(path), BTreeSet::from([what]));
        assert_eq!(
            layout.places(""),
            BTreeMap::from([
                place("/sys/fs/cgroup/cpu,cpuacct/c", "cpu"),
                place("/sys/fs/cgroup/memory/b", "memory"),
                place("/sys/fs/cgroup/blkio/a", "io"),
            ])
        );
        let unified = "/sys/fs/cgroup/unified/e";
        assert_eq!(
            layout.roots("hugetlb\n"),
            [
                root(Version::V2, unified, &[]),
                root(Version::V1, "/sys/fs/cgroup/memory/b", &["memory"]),
            ]
        );
        // A controller is in one hierarchy only.
        assert_eq!(
            layout.roots("memory\n"),
            [root(Version::V2, unified, &["memory"])]
        );
    }

    #[test]
    fn containers_use_their_subtree() {
        let mounts = "30 23 0:26 /docker/x /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        let inside = layout(mounts, "0::/docker/x/inner\n");
        assert_eq!(inside.unified, Some("/sys/fs/cgroup/inner".into()));
        let outside = layout(UNIFIED, "0::/../other\n");
        assert_eq!(outside.unified, Some("/sys/fs/cgroup".into()));
        let none = layout("", "0::/\n");
        assert_eq!((none.word(), none.roots("")), ("none mounted", Vec::new()));
    }
}
