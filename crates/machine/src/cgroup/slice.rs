//! The folder of all groups of one node's workers, in each hierarchy of use.

use super::cpu_limit::GUEST_LEAF;
use super::group::{Folder, Group, REMOVE_PATIENCE, field, make, named};
use super::layout::{AGENT_LEAF, HierarchyRoot, Layout, Version};
use crate::kernel_file::read_short;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The parent groups of a node's workers; by default none.
#[derive(Debug, Default)]
pub struct Slice {
    pub(super) folders: Vec<Folder>,
    /// Where its machines' threads with a limit enter groups, in version 1: the beginning of the
    /// groups' paths.
    threads: Option<PathBuf>,
    /// What its groups lack, and why.
    missing: Option<String>,
}

/// Name of the folder of the node with this state directory.
fn name(state_dir: &Path) -> String {
    let hash = blake3::hash(state_dir.as_os_str().as_encoded_bytes());
    format!("keel-{}", &hash.to_hex()[..12])
}

impl Slice {
    /// Creates the folder of a node's groups. If the kernel requires it, this process and
    /// `parent`, another process of the same program, enter a group beside it.
    pub fn prepare(state_dir: &Path, parent: Option<u32>) -> Self {
        let name = name(state_dir);
        let (roots, threads) = match Layout::read() {
            Ok(layout) => {
                let on_unified = layout.on_unified();
                (layout.roots(&on_unified), thread_groups(&layout, &name))
            }
            Err(error) => {
                return Slice {
                    folders: Vec::new(),
                    threads: None,
                    missing: Some(format!("their location is unknown: {error}")),
                };
            }
        };
        let mut folders = Vec::new();
        let mut missing = None;
        for root in roots {
            let path = root.folder.join(&name);
            if let Err(error) = make(&path) {
                missing = Some(error);
                continue;
            }
            let memory = root.controllers.contains(&"memory");
            let memory = memory
                && match enable(&root, &path, parent) {
                    Ok(()) => true,
                    Err(error) => {
                        missing = Some(error);
                        false
                    }
                };
            folders.push(Folder {
                version: root.version,
                path,
                memory,
            });
        }
        if missing.is_none() && !folders.iter().any(|folder| folder.memory) {
            missing = Some("this system has no memory controller for them".into());
        }
        Slice {
            folders,
            threads,
            missing,
        }
    }

    /// Whether the processor time of a worker's group counts as the slice's: not that of an agent
    /// that was started elsewhere.
    pub fn holds(&self, group: &Group) -> bool {
        let unified = |folders: &[Folder]| {
            let mut folders = folders.iter();
            let folder = folders.find(|folder| folder.version == Version::V2)?;
            Some(folder.path.clone())
        };
        let own = unified(&self.folders);
        let of_group = unified(&group.folders);
        own.zip(of_group)
            .is_some_and(|(own, of_group)| of_group.starts_with(own))
    }

    /// Processor time of all processes in it so far, in microseconds, where it is accounted.
    pub fn cpu_micros(&self) -> Option<u64> {
        let mut folders = self.folders.iter();
        let unified = folders.find(|folder| folder.version == Version::V2)?;
        field(&read_short(&unified.path.join("cpu.stat"))?, "usage_usec")
    }

    /// What this node's groups lack, and the consequence; `None` if nothing.
    pub fn missing(&self) -> Option<String> {
        let missing = self.missing.as_ref()?;
        Some(format!(
            "Machines' memory is not bounded by cgroups: {missing} (`keel doctor` shows the remedy)."
        ))
    }

    /// Creates a group for a machine's worker; `None` where none can be created.
    ///
    /// # Errors
    /// That of the kernel, as a message; nothing is left then.
    pub fn make(&self, machine: &str) -> Result<Option<Group>, String> {
        let inner = format!("{machine}.{:08x}", rand::random::<u32>());
        let threads = self.threads.as_ref().map(|beginning| {
            let mut path = beginning.clone().into_os_string();
            path.push(&inner);
            PathBuf::from(path)
        });
        let mut group = Group {
            folders: Vec::new(),
            threads,
        };
        for folder in &self.folders {
            let path = folder.path.join(&inner);
            if let Err(error) = make(&path) {
                group.remove();
                return Err(error);
            }
            group.folders.push(Folder {
                path,
                ..folder.clone()
            });
        }
        Ok((!group.folders.is_empty()).then_some(group))
    }

    /// Removes groups of agents that died: those without processes that are not used by
    /// the workers with folders in `workers`.
    pub fn sweep(&self, workers: &Path) {
        let used: Vec<PathBuf> = std::fs::read_dir(workers)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| Group::load(&entry.path()))
            .flat_map(|group| {
                let folders = group.folders.into_iter().map(|folder| folder.path);
                folders.chain(group.threads).collect::<Vec<_>>()
            })
            .collect();
        for folder in &self.folders {
            remove_children(&folder.path, |child| !used.contains(child));
        }
        remove_thread_groups(self.threads.as_deref(), |child| !used.contains(child));
    }

    /// Removes the folder if it has no machines.
    pub fn remove_if_empty(&self) {
        for folder in &self.folders {
            // It is not empty while a machine runs.
            let _ = std::fs::remove_dir(&folder.path);
        }
    }

    /// Takes controllers away from the groups of a node whose agent has ended, while its
    /// machines run on, so that its service can be started in the surrounding group: a
    /// group that has controllers enabled for children takes no processes, which systemd
    /// before 254 does not expect. The next agent enables them again and restores the
    /// machines' limits.
    pub fn release(state_dir: &Path) {
        let Ok(layout) = Layout::read() else { return };
        for root in layout.roots(&layout.on_unified()) {
            if root.version == Version::V2 {
                disable(&root, &root.folder.join(name(state_dir)));
            }
        }
    }

    /// Removes all groups of a node whose processes were killed, from outside, and waits
    /// until they are gone. For tests, which leave nothing behind.
    pub fn remove_all(state_dir: &Path) {
        let Ok(layout) = Layout::read() else { return };
        let threads = thread_groups(&layout, &name(state_dir));
        remove_thread_groups(threads.as_deref(), |_| true);
        for root in layout.roots(&layout.on_unified()) {
            let path = root.folder.join(name(state_dir));
            let deadline = Instant::now() + REMOVE_PATIENCE;
            while path.exists() && Instant::now() < deadline {
                remove_children(&path, |_| true);
                if std::fs::remove_dir(&path).is_err() {
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
        }
    }
}

/// Enables the root's controllers for the groups in `path`, which is in the root. In
/// version 1 they always are.
fn enable(root: &HierarchyRoot, path: &Path, parent: Option<u32>) -> Result<(), String> {
    if root.version == Version::V1 {
        return Ok(());
    }
    // A single controller first: others may not be available.
    let [first, others @ ..] = &root.controllers[..] else {
        return Ok(());
    };
    if let Err(error) = enable_controller(&root.folder, first) {
        // A group with controllers enabled for children has no processes of its own.
        if error.kind() != std::io::ErrorKind::ResourceBusy {
            return Err(named(&root.folder)(error));
        }
        enter_agent_group(&root.folder, parent)?;
        if let Err(error) = enable_controller(&root.folder, first) {
            leave_agent_group(&root.folder, parent);
            return Err(format!(
                "{} has processes that are not this node's ({error})",
                root.folder.display()
            ));
        }
    }
    enable_controller(path, first).map_err(named(path))?;
    for other in others {
        let given =
            enable_controller(&root.folder, other).and_then(|()| enable_controller(path, other));
        if let Err(error) = given {
            tracing::debug!(%error, controller = other, "cannot enable a controller for machines' groups");
        }
    }
    Ok(())
}

/// Enables a controller for the children of a group.
fn enable_controller(group: &Path, controller: &str) -> std::io::Result<()> {
    std::fs::write(
        group.join("cgroup.subtree_control"),
        format!("+{controller}"),
    )
}

/// Undoes [`enable`].
fn disable(root: &HierarchyRoot, path: &Path) {
    // The inner group first.
    for group in [path, &root.folder] {
        for controller in &root.controllers {
            let control = group.join("cgroup.subtree_control");
            if let Err(error) = std::fs::write(&control, format!("-{controller}")) {
                tracing::debug!(%error, group = %control.display(), "cannot disable a controller");
            }
        }
    }
}

/// Moves this process and its parent into a group beside the workers'.
fn enter_agent_group(root: &Path, parent: Option<u32>) -> Result<(), String> {
    let leaf = root.join(AGENT_LEAF);
    make(&leaf)?;
    enter(&leaf, parent).inspect_err(|_| leave_agent_group(root, parent))
}

fn leave_agent_group(root: &Path, parent: Option<u32>) {
    if let Err(error) = enter(root, parent) {
        tracing::debug!(error, "the agent cannot leave its own group");
    }
    // Another node's agent may be in it.
    let _ = std::fs::remove_dir(root.join(AGENT_LEAF));
}

fn enter(group: &Path, parent: Option<u32>) -> Result<(), String> {
    let path = group.join("cgroup.procs");
    for process in parent.into_iter().chain([std::process::id()]) {
        std::fs::write(&path, process.to_string()).map_err(named(&path))?;
    }
    Ok(())
}

/// The beginning of the paths of groups for threads of a node of this name, in version 1.
fn thread_groups(layout: &Layout, name: &str) -> Option<PathBuf> {
    match layout.cpu_root(&layout.on_unified())? {
        (Version::V1, folder) => Some(folder.join(format!("{name}."))),
        (Version::V2, _) => None,
    }
}

/// Removes groups whose paths begin so.
fn remove_thread_groups(beginning: Option<&Path>, unused: impl Fn(&PathBuf) -> bool) {
    let Some((folder, name)) = beginning.and_then(|it| Some((it.parent()?, it.file_name()?)))
    else {
        return;
    };
    let name = name.as_encoded_bytes();
    remove_children(folder, |child| {
        let own = child.file_name().unwrap_or_default().as_encoded_bytes();
        own.starts_with(name) && unused(child)
    });
}

fn remove_children(folder: &Path, unused: impl Fn(&PathBuf) -> bool) {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    for entry in entries {
        let path = entry.path();
        if path.is_dir() && unused(&path) {
            // Most have none.
            let _ = std::fs::remove_dir(path.join(GUEST_LEAF));
            // A group with a process stays.
            if let Err(error) = std::fs::remove_dir(&path) {
                tracing::debug!(%error, group = %path.display(), "cannot remove an old group");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slice(folder: &Path) -> Slice {
        Slice {
            folders: vec![Folder {
                version: Version::V1,
                path: folder.to_owned(),
                memory: true,
            }],
            threads: Some(folder.join("beside.")),
            missing: None,
        }
    }

    #[test]
    fn groups_of_dead_agents_are_removed() {
        let (groups, workers) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let slice = slice(groups.path());
        let [old, used] = ["old", "used"].map(|name| slice.make(name).unwrap().unwrap());
        let worker = workers.path().join("used");
        std::fs::create_dir(&worker).unwrap();
        used.save(&worker).unwrap();
        let threads = [&old, &used].map(|group| group.threads.clone().unwrap());
        for path in &threads {
            std::fs::create_dir(path).unwrap();
        }
        let stranger = groups.path().join("another");
        std::fs::create_dir(&stranger).unwrap();
        remove_thread_groups(slice.threads.as_deref(), |path| *path == threads[0]);
        assert!(!threads[0].exists() && threads[1].exists() && stranger.exists());
        std::fs::remove_dir(stranger).unwrap();
        slice.sweep(workers.path());
        assert!(!old.folders[0].path.exists() && used.folders[0].path.exists());
        assert!(threads[1].exists());
        Group::remove_saved(&worker);
        assert!(!used.folders[0].path.exists() && Group::load(&worker).is_none());
        assert!(!threads[1].exists());
        slice.remove_if_empty();
        assert!(!groups.path().exists());
    }

    #[test]
    fn without_hierarchies_there_are_no_groups() {
        let slice = Slice {
            folders: Vec::new(),
            threads: None,
            missing: Some("no rights".into()),
        };
        assert_eq!(slice.make("m"), Ok(None));
        assert!(slice.missing().unwrap().contains("no rights"));
    }

    #[test]
    fn nodes_on_one_host_have_distinct_groups() {
        assert_ne!(name(Path::new("/tmp/a")), name(Path::new("/tmp/b")));
    }

    /// A group of this process in the real version 2 hierarchy whose children can have a
    /// controller; the process leaves it at the end.
    struct RealHierarchy {
        home: PathBuf,
        root: HierarchyRoot,
    }

    impl RealHierarchy {
        fn new() -> Option<Self> {
            let roots = Layout::read().ok()?.roots("");
            let home = roots.into_iter().next()?.folder;
            let given = std::fs::read_to_string(home.join("cgroup.subtree_control")).ok()?;
            let given = given.split_whitespace().collect::<Vec<_>>();
            let of_processes = ["hugetlb", "memory", "io"];
            let controller = of_processes.into_iter().find(|name| given.contains(name))?;
            let folder = home.join(format!("keel-test-{:x}", rand::random::<u64>()));
            std::fs::create_dir(&folder).ok()?;
            let root = HierarchyRoot {
                version: Version::V2,
                folder,
                controllers: vec![controller],
            };
            enter(&root.folder, None).ok()?;
            Some(RealHierarchy { home, root })
        }

        fn processes(&self, inner: &str) -> Vec<u32> {
            let path = self.root.folder.join(inner).join("cgroup.procs");
            let text = std::fs::read_to_string(path).unwrap_or_default();
            text.lines().map(|line| line.parse().unwrap()).collect()
        }
    }

    impl Drop for RealHierarchy {
        fn drop(&mut self) {
            enter(&self.home, None).unwrap();
            remove_children(&self.root.folder, |_| true);
            std::fs::remove_dir(&self.root.folder).unwrap();
        }
    }

    /// A single test, since a process is in one group at a time.
    #[test]
    fn an_agent_enters_its_own_group_where_required() {
        let Some(real) = RealHierarchy::new() else {
            eprintln!("not tested: no version 2 group here gives its groups a controller");
            return;
        };
        let workers = real.root.folder.join("workers");
        std::fs::create_dir(&workers).unwrap();
        let me = std::process::id();
        // Another program's process stays where it is: the agent leaves its group again.
        let mut other = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let error = enable(&real.root, &workers, None).unwrap_err();
        assert!(
            error.contains("processes that are not this node's"),
            "{error}"
        );
        let mut both = vec![me, other.id()];
        both.sort_unstable();
        let mut there = real.processes("");
        there.sort_unstable();
        assert_eq!(there, both);
        // The agent's parent is moved as well.
        enable(&real.root, &workers, Some(other.id())).unwrap();
        assert_eq!(real.processes(""), Vec::<u32>::new());
        let mut there = real.processes(AGENT_LEAF);
        there.sort_unstable();
        assert_eq!(there, both);
        other.kill().unwrap();
        other.wait().unwrap();
        // A restarted agent finds the groups in place.
        enable(&real.root, &workers, None).unwrap();
        let control = workers.join("cgroup.subtree_control");
        let given = std::fs::read_to_string(&control).unwrap();
        assert_eq!(given.trim(), real.root.controllers[0]);
        // Now nothing can be started around them, until the controllers are taken away.
        let machine = workers.join("machine");
        std::fs::create_dir(&machine).unwrap();
        let mut running = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        std::fs::write(machine.join("cgroup.procs"), running.id().to_string()).unwrap();
        assert!(enter(&real.root.folder, None).is_err());
        disable(&real.root, &workers);
        enter(&real.root.folder, None).unwrap();
        enable(&real.root, &workers, None).unwrap();
        let given = std::fs::read_to_string(&control).unwrap();
        assert_eq!(given.trim(), real.root.controllers[0]);
        running.kill().unwrap();
        running.wait().unwrap();
        std::fs::remove_dir(&machine).unwrap();
    }
}
