//! `keel vnc`: an address of this computer at which a VNC viewer finds the display of a machine.
//!
//! Each viewer that connects has a WebSocket of its own to the node, over which the bytes of its protocol
//! (RFB, RFC 6143) pass as they are.

use crate::cluster::Reach;
use anyhow::{Context, Result};
use keel_api::{Client, WebSocket};
use std::net::{Ipv4Addr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

/// The ports at which viewers look for displays: that of display 0, and the next ones.
const PORTS: std::ops::RangeInclusive<u16> = 5900..=5999;
/// How long the first view waits for its viewer.
const FIRST_VIEWER_PATIENCE: Duration = Duration::from_secs(10);
/// Pause after a viewer that could not be accepted.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_millis(100);

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The machine, a whole system with a display (`keel run --kind qemu --display true`).
    machine: String,
    /// The address at which viewers find it (default: the first free port of 127.0.0.1 from 5900
    /// on). Whoever can connect there sees the display, and types there.
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,
}

pub(crate) async fn run(reach: &Reach, args: &Args) -> Result<ExitCode> {
    let (client, machine) = (reach.client()?, &args.machine);
    let path = keel_api::path(["machines", machine, "display"]);
    // So that its user learns at once if there is no display. It is for the first viewer.
    let mut first = Some(client.web_socket(&path).await?);
    let listener = listen(args.listen).await?;
    let address = listener.local_addr()?;
    outln!("A VNC viewer finds the display of {machine} at {address}, until Ctrl-C.");
    loop {
        let accepted = match first {
            Some(_) => timeout(FIRST_VIEWER_PATIENCE, listener.accept()).await,
            None => Ok(listener.accept().await),
        };
        let view = first.take();
        // Nobody has come for a while.
        let Ok(accepted) = accepted else { continue };
        match accepted {
            Ok((viewer, _)) => {
                let (client, path) = (client.clone(), path.clone());
                tokio::spawn(async move {
                    if let Err(error) = show(&client, &path, view, viewer).await {
                        eprintln!("keel: a view has ended: {error}");
                    }
                });
            }
            Err(error) => {
                eprintln!("keel: a viewer was not accepted: {error}");
                tokio::time::sleep(ACCEPT_AGAIN_AFTER).await;
            }
        }
    }
}

/// Shows the display to one viewer, until either ends.
async fn show(
    client: &Client,
    path: &str,
    view: Option<WebSocket>,
    viewer: TcpStream,
) -> Result<()> {
    viewer.set_nodelay(true)?;
    let view = match view {
        Some(view) => view,
        None => client.web_socket(path).await?,
    };
    Ok(view.pass_on(viewer).await?)
}

/// Listens at the address that was asked for, or at the first that is free.
async fn listen(address: Option<SocketAddr>) -> Result<TcpListener> {
    if let Some(address) = address {
        let listener = TcpListener::bind(address).await;
        return listener.with_context(|| format!("viewers cannot be accepted at {address}"));
    }
    for port in PORTS {
        if let Ok(listener) = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await {
            return Ok(listener);
        }
    }
    let (first, last) = (PORTS.start(), PORTS.end());
    anyhow::bail!("no port of 127.0.0.1 from {first} to {last} is free: give another by --listen")
}
