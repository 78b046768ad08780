//! Bytes sent to and received from each node, over connections of this process.

use crate::name::NodeName;
use std::collections::BTreeMap;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Bytes so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bytes {
    /// To the node.
    pub sent: u64,
    pub received: u64,
}

#[derive(Debug, Default)]
struct Counters {
    sent: AtomicU64,
    received: AtomicU64,
}

/// Bytes to and from each node, as they are within TLS; shared by those that count.
#[derive(Debug, Clone, Default)]
pub struct Traffic(Arc<Mutex<BTreeMap<NodeName, Arc<Counters>>>>);

impl PartialEq for Traffic {
    /// Identity of the counters.
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Traffic {}

impl Traffic {
    fn of(&self, node: &NodeName) -> Arc<Counters> {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        table.entry(node.clone()).or_default().clone()
    }

    /// Counts bytes sent to a node over another channel.
    pub fn add_sent(&self, node: &NodeName, bytes: u64) {
        self.of(node).sent.fetch_add(bytes, Ordering::Relaxed);
    }

    /// So far, by node.
    pub fn so_far(&self) -> BTreeMap<NodeName, Bytes> {
        let table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = |counters: &Counters| Bytes {
            sent: counters.sent.load(Ordering::Relaxed),
            received: counters.received.load(Ordering::Relaxed),
        };
        let all = table.iter();
        all.map(|(node, counters)| (node.clone(), bytes(counters)))
            .collect()
    }

    /// The same stream, counted for a node.
    pub(crate) fn count<S>(&self, stream: S, node: &NodeName) -> Counted<S> {
        Counted {
            stream,
            counters: self.of(node),
        }
    }
}

/// A stream whose bytes are counted.
pub(crate) struct Counted<S> {
    stream: S,
    counters: Arc<Counters>,
}

fn add(counter: &AtomicU64, bytes: usize) {
    counter.fetch_add(bytes as u64, Ordering::Relaxed);
}

impl<S: AsyncRead + Unpin> AsyncRead for Counted<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        add(&self.counters.received, buffer.filled().len() - before);
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        if let Poll::Ready(Ok(count)) = &written {
            add(&self.counters.sent, *count);
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, pieces);
        if let Poll::Ready(Ok(count)) = &written {
            add(&self.counters.sent, *count);
        }
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn each_way_is_counted_for_its_node() {
        let traffic = Traffic::default();
        let node = NodeName::new("b").unwrap();
        let (here, mut there) = tokio::io::duplex(64);
        let mut here = traffic.count(here, &node);
        here.write_all(b"12345").await.unwrap();
        here.flush().await.unwrap();
        let mut got = [0; 5];
        there.read_exact(&mut got).await.unwrap();
        there.write_all(b"123").await.unwrap();
        here.read_exact(&mut got[..3]).await.unwrap();
        traffic.add_sent(&node, 100);
        let bytes = Bytes {
            sent: 105,
            received: 3,
        };
        assert_eq!(traffic.so_far(), BTreeMap::from([(node, bytes)]));
    }
}
