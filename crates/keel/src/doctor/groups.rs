//! Checks whether machines can have control groups of their own: their place in the hierarchy, and
//! the permission to create them. [`keel_machine::cgroup`] finds the hierarchies.

use super::Check;
use keel_machine::cgroup::Layout;
use std::path::Path;

pub(super) fn check() -> Check {
    let name = "cgroups";
    let why = "in a group of its own each machine's process is bounded and accounted by the kernel, and one that runs out of memory is named";
    let layout = match Layout::read() {
        Ok(layout) => layout,
        Err(error) => {
            return Check::warn(name, why, format!("/proc/self: {error}"), "Mount /proc.");
        }
    };
    let places = layout.places(&layout.on_unified());
    let missing: Vec<&str> = Layout::WANTED
        .into_iter()
        .filter(|wanted| !places.values().any(|there| there.contains(wanted)))
        .collect();
    let mut found = vec![layout.word().to_owned()];
    let mut refused = false;
    for (folder, controllers) in &places {
        let controllers: Vec<&str> = controllers.iter().copied().collect();
        let may = match try_group(folder) {
            Ok(()) => "groups can be created".to_owned(),
            Err(error) => {
                refused = true;
                format!("no groups can be created ({error})")
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

/// Creates and removes a group.
fn try_group(parent: &Path) -> std::io::Result<()> {
    let group = parent.join(format!("keel-doctor-{}", std::process::id()));
    std::fs::create_dir(&group)?;
    std::fs::remove_dir(&group)
}
