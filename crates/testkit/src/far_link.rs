//! A link with a delay and a rate, for kernels that have no `netem`: its frames pass through this
//! process, which holds one end of the link as a tap device in each of the two namespaces.
//!
//! ```text
//!   node's namespace                 this process                   switch
//!   eth0 (tap) ── read ─▶ queue: serialized at the rate, due after the delay ─▶ write ── port (tap)
//! ```

use crate::network::enter;
use anyhow::{Context, Result};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};
use tun_rs::{DeviceBuilder, Layer, SyncDevice};

/// The largest frame: Ethernet's header and what the devices carry.
const FRAME_MAX: usize = 14 + 1500;
/// What would wait longer to be sent is dropped, as by a router whose buffer is full.
const QUEUE_TIME_MAX: Duration = Duration::from_millis(200);
/// Frames under way in one direction: more than fit into a link of 1 Gbit/s and 100 ms.
const FRAMES_MAX: usize = 16_384;

/// What a link is like, in each direction.
#[derive(Debug, Clone, Copy)]
pub struct Distance {
    /// From one end to the other: half of what it adds to a round trip.
    pub delay: Duration,
    /// Bytes per second.
    pub rate: u64,
}

/// Creates the two devices, each in its namespace, and carries frames between them as long as both
/// of them exist.
///
/// # Errors
/// Missing privileges, or no `/dev/net/tun`.
pub(crate) fn connect(ends: [(&str, &str); 2], distance: Distance) -> Result<()> {
    let [first, second] = ends.map(|(space, device)| open(space, device));
    let (first, second) = (Arc::new(first?), Arc::new(second?));
    carry(first.clone(), second.clone(), distance)?;
    carry(second, first, distance)
}

/// A tap device in a namespace. Only the thread that creates it has to be there.
fn open(space: &str, device: &str) -> Result<SyncDevice> {
    let (space, name) = (space.to_owned(), device.to_owned());
    let created = std::thread::spawn(move || -> Result<SyncDevice> {
        enter(&space)?;
        let builder = DeviceBuilder::new().name(&name).layer(Layer::L2);
        let built = builder.packet_information(false).build_sync();
        built.with_context(|| format!("a tap device {name} in {space}"))
    });
    let created = created.join();
    created.unwrap_or_else(|_| anyhow::bail!("the thread for device {device} panicked"))
}

type Frame = (Instant, Vec<u8>);

/// One direction: ends when one of the devices is deleted.
fn carry(from: Arc<SyncDevice>, to: Arc<SyncDevice>, distance: Distance) -> Result<()> {
    let (queue, queued) = sync_channel(FRAMES_MAX);
    let thread = |name: &str| std::thread::Builder::new().name(name.to_owned());
    thread("link-in").spawn(move || receive(&from, &queue, distance))?;
    thread("link-out").spawn(move || deliver(&queued, &to))?;
    Ok(())
}

fn receive(from: &SyncDevice, queue: &SyncSender<Frame>, distance: Distance) {
    // When the last accepted frame has left.
    let mut free_at = Instant::now();
    let mut buffer = [0; FRAME_MAX];
    while let Ok(bytes) = from.recv(&mut buffer) {
        let now = Instant::now();
        let begins = free_at.max(now);
        if begins - now > QUEUE_TIME_MAX {
            continue;
        }
        let nanos = (bytes as u64 * 1_000_000_000).div_ceil(distance.rate.max(1));
        free_at = begins + Duration::from_nanos(nanos);
        let due = free_at + distance.delay;
        // A full queue loses it.
        if let Err(TrySendError::Disconnected(_)) = queue.try_send((due, buffer[..bytes].to_vec()))
        {
            return;
        }
    }
}

fn deliver(queued: &Receiver<Frame>, to: &SyncDevice) {
    while let Ok((due, frame)) = queued.recv() {
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        // One that the other end cannot take is lost, as on any link.
        let is_deleted = || to.if_index().is_err();
        if to.send(&frame).is_err() && is_deleted() {
            return;
        }
    }
}
