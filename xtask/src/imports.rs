//! Checks the imports between source files for cycles.
//!
//! A file is a module; it imports another one if a path in it refers to that one (`use`, or a path
//! that begins with `crate`, `super`, `self` or one of its own modules). Tests do not count. Two
//! rules:
//!
//! - A cycle may include a module and its own children only.
//! - In `crates/node` there is no cycle at all, and a layer imports only layers below it.
//!
//! Crates that know machines of every kind import no engine, and of kinds only the agent's layers for
//! machines with parts import one.

use anyhow::{Context, Result, bail};
use petgraph::algo::tarjan_scc;
use petgraph::graphmap::DiGraphMap;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use syn::visit::{self, Visit};

/// The crate whose files form layers.
const LAYERED: &str = "node";

/// Its layers, from the bottom up: modules of one layer do not import each other, unless they
/// share one line here because they form one unit.
const LAYERS: &[&[&str]] = &[
    &[
        "error",
        "host",
        "identity",
        "metrics",
        "proof_file",
        "state_dir",
        "traces",
    ],
    &["events"],
    &["external_store", "role"],
    &["lease"],
    &["context"],
    &["gossip", "records", "voters"],
    &[
        "certificates",
        "cluster_info",
        "cluster_events",
        "processes",
    ],
    &["supervisor", "images", "logs", "node_record"],
    &["compilation", "rules", "volumes"],
    // They have snapshots of volumes.
    &["checkpoints"],
    &["spanning"],
    &["moves"],
    &["balancer"],
    &["failover"],
    &["machines"],
    &["front"],
    &["agent"],
    &["lib"],
];

/// Crates that must not be named in a file of another one: the crate's folder, the name, and the
/// modules that may name it (with their children). Tests do not count.
const FOREIGN: &[(&str, &str, &[&str])] = &[
    ("machine", "keel_wasm", &[]),
    ("machine", "keel_kind_wasm", &[]),
    ("node", "keel_wasm", &[]),
    (
        "node",
        "keel_kind_wasm",
        &["spanning", "balancer", "machines", "moves", "front"],
    ),
];

/// Checks all crates of the workspace.
pub(crate) fn check(root: &Path) -> Result<()> {
    let mut wrong = Vec::new();
    for entry in std::fs::read_dir(root.join("crates"))? {
        let folder = entry?.path();
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        let name = name.into_owned();
        let modules = Modules::read(&folder.join("src"))
            .with_context(|| format!("the modules of {}", folder.display()))?;
        let imports = modules.imports();
        wrong.extend(cycles(&modules, &imports, name == LAYERED));
        wrong.extend(foreign(&name, &modules));
        if name == LAYERED {
            wrong.extend(upward(&modules, &imports));
        }
    }
    if wrong.is_empty() {
        return Ok(());
    }
    bail!("imports:\n{}", wrong.join("\n"))
}

/// Files that name a crate which they must not know.
fn foreign(name: &str, modules: &Modules) -> Vec<String> {
    let mut wrong = Vec::new();
    let of_crate = FOREIGN.iter().filter(|(folder, _, _)| *folder == name);
    for (_, foreign, allowed) in of_crate {
        for (module, (path, file)) in &modules.files {
            let top = module.first().map_or("", String::as_str);
            if allowed.contains(&top) {
                continue;
            }
            let mut names = Names {
                foreign,
                is_found: false,
            };
            names.visit_file(file);
            if names.is_found {
                wrong.push(format!("{} names {foreign}", path.display()));
            }
        }
    }
    wrong
}

/// Looks for paths that begin with the name of a crate.
struct Names<'a> {
    foreign: &'a str,
    is_found: bool,
}

impl<'ast> Visit<'ast> for Names<'_> {
    fn visit_item_mod(&mut self, module: &'ast syn::ItemMod) {
        if !is_for_tests(&module.attrs) {
            visit::visit_item_mod(self, module);
        }
    }

    fn visit_use_path(&mut self, path: &'ast syn::UsePath) {
        self.is_found |= path.ident == self.foreign;
        visit::visit_use_path(self, path);
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let first = path.segments.first();
        self.is_found |= first.is_some_and(|first| first.ident == self.foreign);
        visit::visit_path(self, path);
    }
}

/// A module's path in its crate: empty for the root.
type ModulePath = Vec<String>;

/// The files of one crate, by module.
struct Modules {
    files: BTreeMap<ModulePath, (PathBuf, syn::File)>,
}

impl Modules {
    fn read(src: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        let mut folders = vec![src.to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(&folder)? {
                let path = entry?.path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.extension().is_some_and(|it| it == "rs") {
                    let text = std::fs::read_to_string(&path)?;
                    let parsed = syn::parse_file(&text)
                        .with_context(|| format!("{} does not parse", path.display()))?;
                    files.insert(module_of(src, &path), (path, parsed));
                }
            }
        }
        Ok(Modules { files })
    }

    /// The file of the innermost module on a path.
    fn resolve(&self, path: &[String]) -> Option<&ModulePath> {
        (0..=path.len())
            .rev()
            .find_map(|end| self.files.get_key_value(&path[..end]))
            .map(|(module, _)| module)
    }

    fn imports(&self) -> BTreeSet<(ModulePath, ModulePath)> {
        let mut imports = BTreeSet::new();
        for (module, (_, file)) in &self.files {
            let mut paths = Paths {
                module: module.clone(),
                inner: Vec::new(),
                children: children(file),
                found: Vec::new(),
            };
            paths.visit_file(file);
            for path in paths.found {
                if let Some(to) = self.resolve(&path)
                    && to != module
                {
                    imports.insert((module.clone(), to.clone()));
                }
            }
        }
        imports
    }
}

fn module_of(src: &Path, file: &Path) -> ModulePath {
    let relative = file.strip_prefix(src).unwrap_or(file).with_extension("");
    let mut module: ModulePath = relative
        .components()
        .map(|part| part.as_os_str().to_string_lossy().into_owned())
        .collect();
    match module.last().map(String::as_str) {
        Some("mod") => drop(module.pop()),
        Some("lib" | "main") if module.len() == 1 => module.clear(),
        _ => {}
    }
    module
}

/// Modules that a file declares and that are files of their own.
fn children(file: &syn::File) -> BTreeSet<String> {
    let declared = file.items.iter().filter_map(|item| match item {
        syn::Item::Mod(module) if module.content.is_none() => Some(module.ident.to_string()),
        _ => None,
    });
    declared.collect()
}

/// Collects the paths in a file that refer to modules of its crate.
struct Paths {
    module: ModulePath,
    /// Modules within the file that enclose the visited item.
    inner: ModulePath,
    children: BTreeSet<String>,
    found: Vec<ModulePath>,
}

impl Paths {
    /// A path from the crate's root, if it is one within the crate.
    fn absolute(&self, segments: &[String]) -> Option<ModulePath> {
        let mut at: ModulePath = self.module.iter().chain(&self.inner).cloned().collect();
        let mut rest = segments;
        match segments.first()?.as_str() {
            "crate" => {
                at.clear();
                rest = &rest[1..];
            }
            "self" => rest = &rest[1..],
            "super" => {
                while rest.first().is_some_and(|it| it == "super") {
                    at.pop()?;
                    rest = &rest[1..];
                }
            }
            child if self.inner.is_empty() && self.children.contains(child) => {}
            _ => return None,
        }
        Some(at.into_iter().chain(rest.iter().cloned()).collect())
    }

    fn add(&mut self, segments: &[String]) {
        self.found.extend(self.absolute(segments));
    }

    fn add_tree(&mut self, before: &mut Vec<String>, tree: &syn::UseTree) {
        match tree {
            syn::UseTree::Path(path) => {
                before.push(path.ident.to_string());
                self.add_tree(before, &path.tree);
                before.pop();
            }
            syn::UseTree::Name(name) if name.ident == "self" => self.add(before),
            syn::UseTree::Name(syn::UseName { ident })
            | syn::UseTree::Rename(syn::UseRename { ident, .. }) => {
                before.push(ident.to_string());
                self.add(before);
                before.pop();
            }
            syn::UseTree::Glob(_) => self.add(before),
            syn::UseTree::Group(group) => {
                for tree in &group.items {
                    self.add_tree(before, tree);
                }
            }
        }
    }
}

impl<'ast> Visit<'ast> for Paths {
    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        if !is_for_tests(&item.attrs) {
            self.add_tree(&mut Vec::new(), &item.tree);
        }
    }

    fn visit_item_mod(&mut self, module: &'ast syn::ItemMod) {
        if is_for_tests(&module.attrs) || module.content.is_none() {
            return;
        }
        self.inner.push(module.ident.to_string());
        visit::visit_item_mod(self, module);
        self.inner.pop();
    }

    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        if !is_for_tests(&item.attrs) {
            visit::visit_item_fn(self, item);
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        if path.leading_colon.is_none() && path.segments.len() > 1 {
            let segments = path.segments.iter().map(|it| it.ident.to_string());
            self.add(&segments.collect::<Vec<String>>());
        }
        visit::visit_path(self, path);
    }

    // Paths in these refer to nothing that code does not.
    fn visit_visibility(&mut self, _: &'ast syn::Visibility) {}
    fn visit_attribute(&mut self, _: &'ast syn::Attribute) {}
}

fn is_for_tests(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let is_test = attribute.path().is_ident("test");
        let is_cfg_test = attribute.path().is_ident("cfg")
            && attribute
                .parse_args::<syn::Path>()
                .is_ok_and(|path| path.is_ident("test"));
        is_test || is_cfg_test
    })
}

/// Forbidden cycles, each with its files and the imports that form it.
fn cycles(
    modules: &Modules,
    imports: &BTreeSet<(ModulePath, ModulePath)>,
    none_at_all: bool,
) -> Vec<String> {
    let graph: DiGraphMap<&ModulePath, ()> =
        imports.iter().map(|(from, to)| (from, to, ())).collect();
    let mut wrong = Vec::new();
    for cycle in tarjan_scc(&graph) {
        if cycle.len() < 2 || !none_at_all && is_one_family(&cycle) {
            continue;
        }
        let file = |module: &ModulePath| modules.files[module].0.display().to_string();
        let mut lines = vec![format!("a cycle of {} files:", cycle.len())];
        for (from, to) in imports {
            if cycle.contains(&from) && cycle.contains(&to) {
                lines.push(format!("  {} imports {}", file(from), file(to)));
            }
        }
        wrong.push(lines.join("\n"));
    }
    wrong
}

/// Whether these are one module and children of its own.
fn is_one_family(cycle: &[&ModulePath]) -> bool {
    let is_in = |parent: &[String], module: &ModulePath| {
        module == parent || module.len() == parent.len() + 1 && module.starts_with(parent)
    };
    let first = cycle[0];
    let parents = [&first[..], &first[..first.len().saturating_sub(1)]];
    let mut parents = parents.iter();
    parents.any(|parent| cycle.iter().all(|module| is_in(parent, module)))
}

/// Imports of a layer that is not below the importing one.
fn upward(modules: &Modules, imports: &BTreeSet<(ModulePath, ModulePath)>) -> Vec<String> {
    let part = |module: &ModulePath| module.first().map_or("lib", String::as_str).to_owned();
    let layer = |part: &str| LAYERS.iter().position(|layer| layer.contains(&part));
    let mut wrong: Vec<String> = modules
        .files
        .keys()
        .map(part)
        .filter(|part| layer(part).is_none())
        .map(|part| format!("{part} of crates/{LAYERED} is in no layer (xtask/src/imports.rs)"))
        .collect();
    for (from, to) in imports {
        let (above, below) = (part(from), part(to));
        if above != below && layer(&above) <= layer(&below) {
            let file = |module: &ModulePath| modules.files[module].0.display().to_string();
            let (from, to) = (file(from), file(to));
            wrong.push(format!("  {from} imports {to}, which is not below it"));
        }
    }
    wrong.sort();
    wrong.dedup();
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;

    fn modules(files: &[(&str, &str)]) -> Modules {
        let files = files.iter().map(|(path, text)| {
            let module = module_of(Path::new("src"), Path::new(path));
            (
                module,
                (PathBuf::from(path), syn::parse_file(text).unwrap()),
            )
        });
        Modules {
            files: files.collect(),
        }
    }

    fn wrong(files: &[(&str, &str)], none_at_all: bool) -> Vec<String> {
        let modules = modules(files);
        cycles(&modules, &modules.imports(), none_at_all)
    }

    #[test]
    fn a_module_may_use_its_children_and_they_it() {
        let files = [
            ("src/lib.rs", "mod a; use a::f;"),
            ("src/a/mod.rs", "mod b; pub use b::f; pub struct S;"),
            ("src/a/b.rs", "use super::S; pub fn f() {}"),
        ];
        assert_eq!(wrong(&files, false), Vec::<String>::new());
        assert_eq!(wrong(&files, true).len(), 1);
    }

    #[test]
    fn a_cycle_of_two_families_is_named() {
        let files = [
            ("src/lib.rs", "mod a; mod b;"),
            ("src/a/mod.rs", "mod c;"),
            ("src/a/c.rs", "fn f() { crate::b::g(); }"),
            ("src/b.rs", "pub fn g() { super::a::c::f(); }"),
        ];
        let found = wrong(&files, false);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(
            found[0].contains("src/a/c.rs imports src/b.rs"),
            "{found:?}"
        );
    }

    #[test]
    fn tests_and_other_crates_do_not_count() {
        let files = [
            ("src/lib.rs", "mod a; mod b;"),
            ("src/a.rs", "use crate::b::g;"),
            (
                "src/b.rs",
                "use std::a; pub fn g() {} #[cfg(test)] mod tests { use crate::a::f; }",
            ),
        ];
        assert_eq!(wrong(&files, true), Vec::<String>::new());
    }
}
