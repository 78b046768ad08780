//! The layout of control groups: version 2, version 1, or both (hybrid), which
//! controllers are where, and whether this user may make groups.

use super::Check;
use procfs::process::{MountInfos, Process};
use procfs::{ProcResult, ProcessCGroups};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// What machines are bounded and accounted by.
const WANTED: [&str; 3] = ["cpu", "memory", "io"];

/// Where this process's groups are.
#[derive(Debug, PartialEq, Eq)]
struct Layout {
    /// Folder of the version 2 group.
    unified: Option<PathBuf>,
    /// Folders of version 1 groups, by controller.
    legacy: BTreeMap<String, PathBuf>,
}

impl Layout {
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
            // In a container the mount may begin further down, and the group
            // may be outside of it.
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

    fn word(&self) -> &'static str {
        match (&self.unified, self.legacy.is_empty()) {
            (Some(_), true) => "version 2",
            (Some(_), false) => "hybrid",
            (None, false) => "version 1",
            (None, true) => "none mounted",
        }
    }

    /// Where groups would be made: in which folder, for which controllers.
    /// `on_unified` are the controllers that the version 2 group has.
    fn places(&self, on_unified: &str) -> BTreeMap<PathBuf, BTreeSet<&'static str>> {
        let mut places: BTreeMap<PathBuf, BTreeSet<&'static str>> = BTreeMap::new();
        for wanted in WANTED {
            // Version 1 has another name for it.
            let legacy = if wanted == "io" { "blkio" } else { wanted };
            let unified = self
                .unified
                .as_ref()
                .filter(|_| on_unified.split_whitespace().any(|name| name == wanted));
            if let Some(folder) = unified.or_else(|| self.legacy.get(legacy)) {
                places.entry(folder.clone()).or_default().insert(wanted);
            }
        }
        places
    }
}

fn read() -> ProcResult<Layout> {
    let process = Process::myself()?;
    Ok(Layout::of(&process.mountinfo()?, &process.cgroups()?))
}

pub(super) fn check() -> Check {
    let name = "cgroups";
    let why = "groups of their own bound and account each machine's processes by the kernel";
    let layout = match read() {
        Ok(layout) => layout,
        Err(error) => {
            return Check::warn(name, why, format!("/proc/self: {error}"), "Mount /proc.");
        }
    };
    let on_unified = layout
        .unified
        .as_ref()
        .and_then(|folder| std::fs::read_to_string(folder.join("cgroup.controllers")).ok())
        .unwrap_or_default();
    let places = layout.places(&on_unified);
    let missing: Vec<&str> = WANTED
        .into_iter()
        .filter(|wanted| !places.values().any(|there| there.contains(wanted)))
        .collect();
    let mut found = vec![layout.word().to_owned()];
    let mut refused = false;
    for (folder, controllers) in &places {
        let controllers: Vec<&str> = controllers.iter().copied().collect();
        let may = match try_group(folder) {
            Ok(()) => "groups can be made".to_owned(),
            Err(error) => {
                refused = true;
                format!("no groups can be made ({error})")
            }
        };
        found.push(format!(
            "{} in {}: {may}",
            controllers.join(", "),
            folder.display()
        ));
    }
    if !missing.is_empty() {
        found.push(format!("without {}", missing.join(", ")));
    }
    let found = found.join("; ");
    if missing.is_empty() && !refused {
        return Check::ok(name, why, found);
    }
    Check::warn(
        name,
        why,
        found,
        "Run the node as a systemd service with Delegate=yes, or as root; in a container, mount /sys/fs/cgroup for writing.",
    )
}

/// Makes a group and removes it.
fn try_group(parent: &Path) -> std::io::Result<()> {
    let group = parent.join(format!("keel-doctor-{}", std::process::id()));
    std::fs::create_dir(&group)?;
    std::fs::remove_dir(&group)
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

    #[test]
    fn version_2_has_one_folder() {
        let layout = layout(UNIFIED, "0::/user.slice/me\n");
        assert_eq!(layout.word(), "version 2");
        let mine = PathBuf::from("/sys/fs/cgroup/user.slice/me");
        assert_eq!(
            layout.places("cpuset cpu io memory pids\n"),
            BTreeMap::from([(mine.clone(), BTreeSet::from(["cpu", "io", "memory"]))])
        );
        // What was not delegated is not there.
        assert_eq!(
            layout.places("memory\n"),
            BTreeMap::from([(mine, BTreeSet::from(["memory"]))])
        );
    }

    #[test]
    fn hybrid_takes_controllers_where_they_are() {
        let mounts = "\
            31 30 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
            32 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
            33 30 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
            34 30 0:30 / /sys/fs/cgroup/blkio rw - cgroup cgroup rw,blkio\n";
        let groups = "4:blkio:/a\n3:memory:/b\n2:cpu,cpuacct:/c\n1:name=systemd:/d\n0::/e\n";
        let layout = layout(mounts, groups);
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
    }

    #[test]
    fn containers_begin_further_down() {
        let mounts = "30 23 0:26 /docker/x /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        let inside = layout(mounts, "0::/docker/x/inner\n");
        assert_eq!(inside.unified, Some("/sys/fs/cgroup/inner".into()));
        let outside = layout(UNIFIED, "0::/../other\n");
        assert_eq!(outside.unified, Some("/sys/fs/cgroup".into()));
        assert_eq!(layout("", "0::/\n").word(), "none mounted");
    }
}
