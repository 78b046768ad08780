//! Who sees the display of the machine: bytes between its display and the agent, in both directions,
//! for as long as both want. What the bytes mean, and who may see it, is left to others.

use keel_net::{Bytes, RpcError};
use rustix::net::{Shutdown, shutdown};
use std::collections::HashMap;
use std::os::unix::net::UnixStream as Socket;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Mutex as AsyncMutex, mpsc};
use tokio::time::timeout;

/// Viewers at the same time: each costs the machine's display memory and work.
const VIEWERS_MAX: usize = 8;
/// Bytes that are read at once.
const PIECE_BYTES: usize = 64 << 10;
/// Pieces on their way to a viewer that reads slowly.
const PIECES_AHEAD: usize = 4;
/// How long a display may take to read what a viewer has sent that is gone.
const READ_PATIENCE: Duration = Duration::from_secs(2);

/// What viewers send, by their numbers.
type Inputs = HashMap<u64, Arc<AsyncMutex<OwnedWriteHalf>>>;

/// The viewers of a machine.
#[derive(Debug, Default)]
pub(super) struct Viewers(Mutex<Inputs>);

impl Viewers {
    fn lock(&self) -> MutexGuard<'_, Inputs> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a viewer; returns what the display sends it, until either of them ends.
    ///
    /// # Errors
    /// If there are enough, or one of this number.
    pub(super) fn add(
        self: Arc<Self>,
        viewer: u64,
        socket: Socket,
    ) -> Result<mpsc::Receiver<Bytes>, RpcError> {
        socket.set_nonblocking(true).map_err(RpcError::failed)?;
        let socket = UnixStream::from_std(socket).map_err(RpcError::failed)?;
        let (mut output, input) = socket.into_split();
        {
            let mut inputs = self.lock();
            if inputs.len() >= VIEWERS_MAX {
                return Err(RpcError::failed(format!(
                    "its display has {VIEWERS_MAX} viewers, as many as it may have"
                )));
            }
            if inputs.contains_key(&viewer) {
                return Err(RpcError::failed("there is a viewer of this number"));
            }
            inputs.insert(viewer, Arc::new(AsyncMutex::new(input)));
        }
        let (send, pieces) = mpsc::channel(PIECES_AHEAD);
        tokio::spawn(async move {
            pass_on(&mut output, &send).await;
            // What it has sent last is read until there.
            let _ = shutdown(output.as_ref(), Shutdown::Write);
            let _ = timeout(READ_PATIENCE, read_to_end(&mut output)).await;
            let _ = shutdown(output.as_ref(), Shutdown::Both);
            self.lock().remove(&viewer);
        });
        Ok(pieces)
    }

    /// Passes on what a viewer sends.
    ///
    /// # Errors
    /// If it has ended.
    pub(super) async fn send(&self, viewer: u64, input: &[u8]) -> Result<(), RpcError> {
        let ended = "this view of its display has ended";
        let socket = self.lock().get(&viewer).cloned();
        let socket = socket.ok_or_else(|| RpcError::failed(ended))?;
        let mut socket = socket.lock().await;
        let sent = socket.write_all(input).await;
        sent.map_err(|error| RpcError::failed(format!("{ended}: {error}")))
    }
}

/// Passes on what a display sends until it ends, or nobody wants more.
async fn pass_on(output: &mut OwnedReadHalf, send: &mpsc::Sender<Bytes>) {
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        let read = tokio::select! {
            read = output.read(&mut piece) => read,
            () = send.closed() => return,
        };
        let Ok(count @ 1..) = read else { return };
        if send
            .send(Bytes::copy_from_slice(&piece[..count]))
            .await
            .is_err()
        {
            return;
        }
    }
}

/// Waits until a display has noticed that its viewer is gone.
async fn read_to_end(output: &mut OwnedReadHalf) {
    let mut piece = vec![0; PIECE_BYTES];
    while let Ok(1..) = output.read(&mut piece).await {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[tokio::test]
    async fn bytes_pass_both_ways_until_either_end_is_gone() {
        let viewers = Arc::<Viewers>::default();
        let (ours, mut display) = Socket::pair().unwrap();
        let mut pieces = viewers.clone().add(1, ours).unwrap();
        display.write_all(b"RFB").unwrap();
        assert_eq!(pieces.recv().await.as_deref(), Some(&b"RFB"[..]));
        viewers.send(1, b"key").await.unwrap();
        let mut typed = [0; 3];
        display.read_exact(&mut typed).unwrap();
        assert_eq!(&typed, b"key");
        assert!(viewers.send(2, b"").await.is_err());
        drop(display);
        assert_eq!(pieces.recv().await, None);
        while viewers.lock().contains_key(&1) {
            tokio::task::yield_now().await;
        }
        assert!(viewers.send(1, b"key").await.is_err());
        // What a viewer sent that is gone is read by then.
        let (ours, mut display) = Socket::pair().unwrap();
        let pieces = viewers.clone().add(1, ours).unwrap();
        viewers.send(1, b"last").await.unwrap();
        drop(pieces);
        let read = tokio::task::spawn_blocking(move || {
            let mut read = Vec::new();
            display.read_to_end(&mut read).map(|_| read)
        });
        assert_eq!(read.await.unwrap().unwrap(), b"last");
    }

    #[tokio::test]
    async fn there_are_no_more_viewers_than_a_display_may_have() {
        let viewers = Arc::<Viewers>::default();
        let add = |viewer| viewers.clone().add(viewer, Socket::pair().unwrap().0);
        let (ours, _display) = Socket::pair().unwrap();
        let _first = viewers.clone().add(0, ours).unwrap();
        let (ours, _same) = Socket::pair().unwrap();
        assert!(viewers.clone().add(0, ours).is_err());
        let mut kept = Vec::new();
        for viewer in 1..VIEWERS_MAX as u64 {
            let (ours, display) = Socket::pair().unwrap();
            kept.push((viewers.clone().add(viewer, ours).unwrap(), display));
        }
        let refused = add(VIEWERS_MAX as u64).unwrap_err().to_string();
        assert!(refused.contains("as many as it may have"), "{refused}");
    }
}
