//! A program on a command line: the module, followed by the program's own arguments.

use crate::input;
use anyhow::{Context, Result};
use std::ffi::OsString;
use std::path::Path;

/// `MODULE [ARGS]...`, at the end of a command line.
#[derive(clap::Args)]
pub(crate) struct Invocation {
    // One list, since options behind a separate positional argument would be keel's.
    /// The program, a WASI preview 1 core module with or without threads, and its arguments.
    /// Options before it are keel's, those after it are the program's.
    #[arg(required = true, trailing_var_arg = true, num_args = 1.., value_names = ["MODULE", "ARGS"])]
    program: Vec<OsString>,
}

impl Invocation {
    /// The module's file and the program's arguments.
    pub(crate) fn new(program: Vec<OsString>) -> Self {
        Invocation { program }
    }

    /// The module's file.
    pub(crate) fn module(&self) -> &Path {
        // The parser requires one.
        self.program.first().map_or(Path::new(""), Path::new)
    }

    /// The module's bytes.
    pub(crate) fn read(&self) -> Result<Vec<u8>> {
        let module = self.module();
        let read = input::read(module, input::MODULE_BYTES_MAX);
        read.with_context(|| format!("cannot read module {}", module.display()))
    }

    /// The arguments of the program; the first is its name.
    ///
    /// # Errors
    /// An argument that is not UTF-8, which WASI requires.
    pub(crate) fn arguments(&self) -> Result<Vec<String>> {
        let name = self.module().file_name().unwrap_or_default();
        let mut arguments = vec![name.to_string_lossy().into_owned()];
        for argument in self.program.iter().skip(1) {
            let text = argument.to_str().with_context(|| {
                format!("argument {argument:?} of the program is not UTF-8, as WASI demands")
            })?;
            arguments.push(text.to_owned());
        }
        Ok(arguments)
    }
}
