//! Checks that files named in the pages of documentation exist. A renamed file would otherwise
//! leave its old name there.

use anyhow::{Context, Result, ensure};
use std::collections::BTreeSet;
use std::path::Path;

/// Top-level folders whose paths are checked.
const FOLDERS: [&str; 4] = ["crates/", "xtask/", "benches/", "docs/"];

/// Checks all pages of a workspace.
///
/// # Errors
/// Names that no file has, with their pages; or a folder cannot be read.
pub(crate) fn check(root: &Path) -> Result<()> {
    let mut files = BTreeSet::new();
    for folder in FOLDERS {
        list(root, &root.join(folder), &mut files)?;
    }
    let mut missing = Vec::new();
    for page in ["ARCHITECTURE.md", "README.md", "CONTRIBUTING.md"]
        .into_iter()
        .map(str::to_owned)
        .chain(files.iter().filter(|it| it.ends_with(".md")).cloned())
    {
        let path = root.join(&page);
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        for name in names(&text) {
            if !is_there(&files, name) {
                missing.push(format!("{page}: {name}"));
            }
        }
    }
    ensure!(
        missing.is_empty(),
        "pages name files that do not exist:\n  {}",
        missing.join("\n  ")
    );
    Ok(())
}

/// Source files and folders that a page names between backquotes.
fn names(text: &str) -> impl Iterator<Item = &str> {
    // Between the first and the second backquote, between the third and the fourth...
    text.lines()
        .flat_map(|line| line.split('`').skip(1).step_by(2))
        .filter(|it| {
            it.chars()
                .all(|c| c.is_ascii_alphanumeric() || "_-./".contains(c))
        })
        .filter(|it| it.ends_with(".rs") || FOLDERS.iter().any(|folder| it.starts_with(folder)))
}

/// Whether a path from the root, or the end of one, is a file or a folder.
fn is_there(files: &BTreeSet<String>, name: &str) -> bool {
    let name = name.trim_end_matches('/');
    let inner = format!("/{name}");
    let folder = format!("{name}/");
    files
        .iter()
        .any(|file| file == name || file.ends_with(&inner) || file.starts_with(&folder))
}

/// Adds the files below a folder, relative to the root.
fn list(root: &Path, folder: &Path, files: &mut BTreeSet<String>) -> Result<()> {
    let entries =
        std::fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            list(root, &path, files)?;
        } else if let Ok(relative) = path.strip_prefix(root) {
            files.insert(relative.to_string_lossy().into_owned());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_between_backquotes() {
        let text = "`a.rs`, `crates/x`: `keel up`\n`docs/y.md` b.rs `t20_*.rs`";
        let found: Vec<&str> = names(text).collect();
        assert_eq!(found, ["a.rs", "crates/x", "docs/y.md"]);
    }

    #[test]
    fn names_are_ends_of_paths_or_folders() {
        let files = BTreeSet::from(["crates/x/src/a.rs".to_owned()]);
        for name in [
            "a.rs",
            "src/a.rs",
            "crates/x/src/a.rs",
            "crates/x",
            "crates/x/",
        ] {
            assert!(is_there(&files, name), "{name}");
        }
        for name in ["b.rs", "aa.rs", "crates/y", "crates/x/src/a"] {
            assert!(!is_there(&files, name), "{name}");
        }
    }
}
