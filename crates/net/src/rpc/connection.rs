//! The writing half that client and server share: one loop that batches
//! queued frames into few writes.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};

use super::round_trip::RoundTrips;
use super::wire;
use crate::coarse_timer;
use crate::frame::{Class, Frame, FrameError};

/// Bytes gathered before a write.
const BATCH_BYTES: usize = 64 << 10;

pub(super) struct Outgoing {
    /// Small frames whose number other bounds limit: credits, cancels.
    pub(super) signals: mpsc::UnboundedReceiver<Frame>,
    /// Everything else; waiting for room here is what slows producers.
    pub(super) queue: mpsc::Receiver<Frame>,
    /// Interval of pings, and what measures them, if this side sends them.
    pub(super) keepalive: Option<(Duration, Arc<RoundTrips>)>,
    /// A write that takes longer is a lost connection.
    pub(super) write_timeout: Duration,
    pub(super) class: Class,
}

impl Outgoing {
    /// Writes until both queues are closed and empty, then closes the stream.
    /// `take` sees every queued frame just before its bytes are handed over,
    /// and may withdraw it.
    pub(super) async fn write<W: AsyncWrite + Unpin>(
        mut self,
        mut stream: W,
        mut take: impl FnMut(&Frame) -> bool,
    ) -> Result<(), FrameError> {
        // The first one measures a new connection.
        let mut ping = pin!(sleep_until(Instant::now()));
        let mut batch = BytesMut::with_capacity(BATCH_BYTES);
        loop {
            let frame = tokio::select! {
                biased;
                Some(frame) = self.signals.recv() => frame,
                frame = self.queue.recv() => match frame {
                    Some(frame) if take(&frame) => frame,
                    Some(_) => continue,
                    None => break,
                },
                () = &mut ping, if self.keepalive.is_some() => {
                    if let Some((period, round_trips)) = &self.keepalive {
                        round_trips.sent();
                        ping.as_mut().reset(coarse_timer::after(*period));
                    }
                    wire::signal(wire::PING, 0)
                }
            };
            frame.encode(&self.class, &mut batch)?;
            while batch.len() < BATCH_BYTES {
                let Ok(frame) = self.queue.try_recv() else {
                    break;
                };
                if take(&frame) {
                    frame.encode(&self.class, &mut batch)?;
                }
            }
            crate::delay::wait().await;
            let writing = async {
                stream.write_all(&batch).await?;
                stream.flush().await
            };
            match timeout(self.write_timeout, writing).await {
                Ok(done) => done?,
                Err(_) => return Err(write_timed_out(self.write_timeout)),
            }
            batch.clear();
            if batch.capacity() > 4 * BATCH_BYTES {
                batch = BytesMut::with_capacity(BATCH_BYTES);
            }
        }
        timeout(self.write_timeout, stream.shutdown()).await.ok();
        Ok(())
    }
}

fn write_timed_out(limit: Duration) -> FrameError {
    std::io::Error::new(
        std::io::ErrorKind::TimedOut,
        format!("it took no bytes for {} ms", limit.as_millis()),
    )
    .into()
}
