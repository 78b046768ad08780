//! Memory of this node for arriving machines: the available memory by the kernel, less a reserve,
//! the reservations of arriving machines, and what is kept for machines that a failover would bring.

use super::machine::Reservation;
use crate::context::Context;
use crate::host::HostMemory;
use keel_cluster::failover::Headroom;
use keel_cluster::{MachineName, NodeName};
use keel_store::keys::{self, Key};

/// Memory that a node keeps for itself.
const SPARE_BYTES: u64 = 256 << 20;

/// Checks that the memories of a machine, in 64 KiB pages, fit beside the reservations of other
/// arriving machines.
///
/// # Errors
/// What it needs and what is free, in a sentence.
pub(crate) async fn check_free_memory(
    context: &Context,
    machine: &MachineName,
    memory_pages: &[u64],
    source: Option<&NodeName>,
) -> Result<(), String> {
    let (free, headroom) = tokio::try_join!(available(context, machine), headroom(context))?;
    let wanted = bytes_of(memory_pages);
    let kept = headroom.kept_from(source, wanted);
    check_fits(wanted, free, kept)
}

/// What this node keeps free for failovers.
async fn headroom(context: &Context) -> Result<Headroom, String> {
    let key = Key::Headroom(context.name.clone()).to_string();
    let found = context.store.get(&key).await;
    let found = found.map_err(|error| format!("what is kept for failovers: {error}"))?;
    let read = found.map(|entry| keel_store::encoding::decode("a headroom", &entry.value));
    read.unwrap_or_else(|| Ok(Headroom::default()))
        .map_err(|error| error.to_string())
}

/// Free bytes here for a machine that a failover brings.
///
/// # Errors
/// If the reservations cannot be read.
pub(crate) async fn free_bytes_for(
    context: &Context,
    machine: &MachineName,
) -> Result<u64, String> {
    let (available, promised) = available(context, machine).await?;
    Ok(available.saturating_sub(promised))
}

/// Free bytes here, and the bytes of them that are reserved for other arriving machines.
async fn available(context: &Context, machine: &MachineName) -> Result<(u64, u64), String> {
    let listing = context
        .store
        .list(&keys::reservations_of(&context.name))
        .await
        .map_err(|error| format!("the reservations here cannot be read: {error}"))?;
    let own = Key::Reservation(context.name.clone(), machine.clone()).to_string();
    let promised: u64 = listing
        .entries
        .iter()
        .filter(|entry| entry.key != own)
        .filter_map(|entry| keel_store::encoding::decode("a reservation", &entry.value).ok())
        .map(|reservation: Reservation| reservation.bytes)
        .fold(0, u64::saturating_add);
    Ok((free_bytes(), promised))
}

/// Free bytes here, reserved or not.
pub(crate) fn free_bytes() -> u64 {
    let host = HostMemory::read();
    host.available_bytes.saturating_sub(SPARE_BYTES)
}

/// Bytes of memories in 64 KiB pages.
fn bytes_of(memory_pages: &[u64]) -> u64 {
    memory_pages.iter().fold(0u64, |sum, pages| {
        sum.saturating_add(pages.saturating_mul(1 << 16))
    })
}

/// Whether so many bytes fit. Pages of a reserved machine that have arrived count twice for a
/// while: the error is on the safe side.
fn check_fits(wanted: u64, (available, promised): (u64, u64), kept: u64) -> Result<(), String> {
    let free = available.saturating_sub(promised).saturating_sub(kept);
    if wanted <= free {
        return Ok(());
    }
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    Err(format!(
        "it needs {:.1} GiB of memory; {:.1} GiB are free here, of which {:.1} GiB are reserved for other arriving machines, and {:.1} GiB kept for machines of nodes that may fail",
        gib(wanted),
        gib(available),
        gib(promised),
        gib(kept)
    ))
}

#[cfg(test)]
mod tests {
    use super::{bytes_of, check_fits};

    #[test]
    fn what_is_promised_is_not_free() {
        let gib = 1u64 << 30;
        // 16,384 pages of 64 KiB are 1 GiB.
        assert_eq!(bytes_of(&[16_384]), gib);
        assert_eq!(bytes_of(&[8192, 8192]), gib);
        assert_eq!(check_fits(gib, (gib, 0), 0), Ok(()));
        assert_eq!(check_fits(gib, (3 * gib, 2 * gib), 0), Ok(()));
        let error = check_fits(gib, (2 * gib, 2 * gib), 0).unwrap_err();
        assert!(error.contains("2.0 GiB are reserved"), "{error}");
        assert!(check_fits(gib, (gib, 2 * gib), 0).is_err());
        assert!(check_fits(bytes_of(&[u64::MAX, 1]), (gib, 0), 0).is_err());
        // Nor is what a failover would bring.
        assert_eq!(check_fits(gib, (4 * gib, gib), 2 * gib), Ok(()));
        let error = check_fits(gib, (4 * gib, gib), 2 * gib + 1).unwrap_err();
        assert!(error.contains("2.0 GiB kept"), "{error}");
    }
}
