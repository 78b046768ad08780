//! Where the programs of the system are.

use std::env;
use std::path::PathBuf;

/// The folders of programs, for an agent that was started without a path.
pub(crate) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A program by its name, as a shell would find it; a name with a slash is its place.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    if program.contains('/') {
        return Some(program.into());
    }
    let path = env::var_os("PATH").unwrap_or_else(|| PATH.into());
    let mut places = env::split_paths(&path).map(|folder| folder.join(program));
    places.find(|place| place.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_by_name() {
        assert!(find("sh").is_some_and(|place| place.is_absolute()));
        assert_eq!(find("no-such-program"), None);
        assert_eq!(find("./here"), Some("./here".into()));
    }
}
