//! Answers other nodes' requests to this node's balancer, as JSON.

use super::drain::info_here;
use super::handle::NodeBalancer;
use super::ledger::LedgerFilter;
use super::peers::{CONFIRM, DRAIN, HISTORY, LEDGER, LEDGER_TRANSFER, LOAD, WHY_NOT};
use super::queries::{confirm_here, load, why_not_here};
use keel_machine::worker::control::unpack;
use keel_net::Bytes;

/// Answers a user or another node. JSON, so that older and newer versions understand each other.
pub(crate) async fn answer(
    handle: &NodeBalancer,
    kind: u16,
    payload: Bytes,
) -> Result<Vec<u8>, String> {
    let json = match kind {
        LOAD => serde_json::to_vec(&load(handle).await?),
        LEDGER => {
            let filter: LedgerFilter = unpack(&payload).map_err(|error| error.to_string())?;
            let lines = handle.ledger.newest(filter).await?;
            serde_json::to_vec(&lines)
        }
        LEDGER_TRANSFER => {
            let lines = unpack(&payload).map_err(|error| error.to_string())?;
            serde_json::to_vec(&handle.ledger.take_along(lines).await?)
        }
        HISTORY => {
            let span = unpack(&payload).map_err(|error| error.to_string())?;
            serde_json::to_vec(&handle.recorder.of(span).await?)
        }
        WHY_NOT => {
            let (machine, to) = unpack(&payload).map_err(|error| error.to_string())?;
            serde_json::to_vec(&why_not_here(handle, &machine, &to).await?)
        }
        CONFIRM => {
            let machine = unpack(&payload).map_err(|error| error.to_string())?;
            serde_json::to_vec(&confirm_here(handle, &machine).await?)
        }
        DRAIN => serde_json::to_vec(&info_here(handle).await?),
        other => {
            return Err(format!(
                "the balancer knows no request of kind {other:#06x}"
            ));
        }
    };
    json.map_err(|error| error.to_string())
}
