//! `keel login` and `keel context`: clusters that a user reaches over TLS, by name, and which of
//! them is meant where nothing is said.
//!
//! They are in `~/.config/keel/contexts.toml`, readable by their user only: it has the tokens.

use crate::cluster::Reach;
use crate::output;
use anyhow::{Context as _, Result, bail};
use keel_api::{Client, ClusterInfo};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::PathBuf;
use std::process::ExitCode;

/// The node of this computer, which needs no token.
const LOCAL: &str = "local";

/// A cluster that is reached over TLS.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Context {
    /// `host:port` of a node's API.
    pub(crate) server: String,
    pub(crate) token: String,
    /// Fingerprint of the cluster's authority, in hex digits.
    pub(crate) authority: String,
}

/// The content of the file.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Contexts {
    /// The one that is meant where nothing is said; the node of this computer if there is none.
    current: Option<String>,
    #[serde(default)]
    contexts: BTreeMap<String, Context>,
}

fn file() -> Result<PathBuf> {
    let config = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from);
    let config = config.filter(|path| path.is_absolute());
    let config = config.or_else(|| std::env::home_dir().map(|home| home.join(".config")));
    let config = config.context("no home directory; set XDG_CONFIG_HOME")?;
    Ok(config.join("keel").join("contexts.toml"))
}

impl Contexts {
    fn load() -> Result<Self> {
        let path = file()?;
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self::default());
            }
            Err(error) => return Err(error).with_context(|| path.display().to_string()),
        };
        Self::parse(&text).with_context(|| path.display().to_string())
    }

    pub(crate) fn parse(text: &str) -> Result<Self> {
        Ok(toml::from_str(text)?)
    }

    fn save(&self) -> Result<()> {
        let path = file()?;
        let shown = || path.display().to_string();
        if let Some(folder) = path.parent() {
            let made = std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(folder);
            made.with_context(shown)?;
        }
        let text = toml::to_string(self).with_context(shown)?;
        let temporary = path.with_extension(format!("{}.new", std::process::id()));
        let written = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)
            .and_then(|mut file| file.write_all(text.as_bytes()))
            .and_then(|()| std::fs::rename(&temporary, &path));
        written.with_context(shown)
    }

    fn named(&self, name: &str) -> Result<Option<Context>> {
        match self.contexts.get(name) {
            Some(context) => Ok(Some(context.clone())),
            None if name == LOCAL => Ok(None),
            None => bail!("there is no context {name:?} (see `keel context ls`)"),
        }
    }
}

/// The context `name`, or the current one; `None` for the node of this computer.
pub(crate) fn chosen(name: Option<&str>) -> Result<Option<Context>> {
    let contexts = Contexts::load()?;
    match name.or(contexts.current.as_deref()) {
        Some(name) => contexts.named(name),
        None => Ok(None),
    }
}

#[derive(clap::Args)]
pub(crate) struct LoginArgs {
    /// `HOST:PORT` of a node's API (`keel up --api`).
    server: String,
    /// A user's token; it and --authority are asked for without them.
    #[arg(long)]
    token: Option<String>,
    /// Name of the context (default: the server's host).
    #[arg(long)]
    name: Option<String>,
}

/// Checks a token at a server, keeps both as a context, and makes it the current one.
pub(crate) async fn login(reach: &Reach, args: &LoginArgs) -> Result<ExitCode> {
    let read = |what: &str, given: Option<String>| match given {
        Some(given) => Ok(given),
        None => ask(what),
    };
    let token = args.token.clone().or_else(|| reach.user_token());
    let context = Context {
        server: args.server.clone(),
        token: read("Token", token)?,
        authority: read("Authority", reach.authority())?,
    };
    let client = client(&context)?;
    let info: ClusterInfo = client.get("/v1/status").await?;
    let host = args
        .server
        .rsplit_once(':')
        .map_or(&*args.server, |it| it.0);
    let name = args.name.clone().unwrap_or_else(|| host.to_owned());
    if name == LOCAL {
        bail!("{LOCAL} is the node of this computer: choose another --name");
    }
    let mut contexts = Contexts::load()?;
    contexts.contexts.insert(name.clone(), context);
    contexts.current = Some(name.clone());
    contexts.save()?;
    outln!(
        "context {name}: cluster {} by node {}",
        info.cluster,
        info.node
    );
    Ok(ExitCode::SUCCESS)
}

fn ask(what: &str) -> Result<String> {
    eprint!("{what}: ");
    std::io::stderr().flush()?;
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    match line.trim() {
        "" => bail!("no {} was given", what.to_lowercase()),
        text => Ok(text.to_owned()),
    }
}

/// A client of the cluster of a context.
pub(crate) fn client(context: &Context) -> Result<Client> {
    let authority = context.authority.parse().context("the authority")?;
    Ok(Client::tls(&context.server, &context.token, authority)?)
}

#[derive(clap::Subcommand)]
pub(crate) enum ContextCommand {
    /// Lists the contexts; the current one has a star.
    Ls,
    /// Makes a context the current one; `local` is the node of this computer.
    Use {
        /// Its name.
        name: String,
    },
    /// Forgets a context with its token (`keel token rm` revokes a token).
    Rm {
        /// Its name.
        name: String,
    },
}

/// A line of the list.
#[derive(Serialize)]
struct Line {
    name: String,
    server: Option<String>,
    current: bool,
}

pub(crate) fn run(reach: &Reach, what: ContextCommand) -> Result<ExitCode> {
    let mut contexts = Contexts::load()?;
    match what {
        ContextCommand::Ls => {
            let current = contexts.current.clone().unwrap_or_else(|| LOCAL.into());
            let named = contexts.contexts.into_iter();
            let named = named.map(|(name, context)| (name, Some(context.server)));
            let lines: Vec<Line> = std::iter::once((LOCAL.to_owned(), None))
                .chain(named)
                .map(|(name, server)| Line {
                    current: name == current,
                    name,
                    server,
                })
                .collect();
            output::list(
                reach.format(),
                &lines,
                &["", "name", "server"],
                |line| line.name.clone(),
                |line| {
                    let star = if line.current { "*" } else { "" };
                    let server = line.server.clone();
                    let server = server.unwrap_or_else(|| "the node of this computer".into());
                    vec![star.to_owned(), line.name.clone(), server]
                },
            )?;
        }
        ContextCommand::Use { name } => {
            contexts.named(&name)?;
            contexts.current = Some(name.clone()).filter(|name| name != LOCAL);
            contexts.save()?;
            outln!("{name} is the current context");
        }
        ContextCommand::Rm { name } => {
            if contexts.contexts.remove(&name).is_none() {
                bail!("there is no context {name:?} (see `keel context ls`)");
            }
            contexts.current = contexts.current.filter(|current| *current != name);
            contexts.save()?;
            outln!("context {name} is removed");
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contexts_go_both_ways_and_unknown_ones_are_refused() {
        let context = Context {
            server: "h:7443".into(),
            token: "keelu1-x".into(),
            authority: "ab".into(),
        };
        let contexts = Contexts {
            current: Some("site".into()),
            contexts: BTreeMap::from([("site".to_owned(), context.clone())]),
        };
        let text = toml::to_string(&contexts).unwrap();
        assert_eq!(toml::from_str::<Contexts>(&text).unwrap(), contexts);
        assert_eq!(contexts.named("site").unwrap(), Some(context));
        assert_eq!(contexts.named(LOCAL).unwrap(), None);
        let error = contexts.named("other").unwrap_err().to_string();
        assert!(error.contains("keel context ls"), "{error}");
        assert!(toml::from_str::<Contexts>("currant = 1").is_err());
        assert_eq!(toml::from_str::<Contexts>("").unwrap(), Contexts::default());
    }
}
