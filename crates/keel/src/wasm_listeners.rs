//! The sockets of `keel wasm --listen`: carries bytes between clients and the program, whose end of
//! each connection is plain data (`keel_wasi::network`).
//!
//! One thread serves all clients. It holds no bytes of its own: what the program has no room for,
//! and what a client does not take, stays where it is.

use anyhow::{Context, Result};
use keel_wasi::Wasi;
use keel_wasi::network::{Connection, ConnectionId, NotOffered};
use std::cell::RefCell;
use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, oneshot, watch};
use tokio::task::LocalSet;

/// How long clients may take to receive what a program sent before it ended.
const END_PATIENCE: Duration = Duration::from_secs(10);

/// How long no connection is accepted where this process has no descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Bytes that are read or written at once.
const BUFFER_BYTES: usize = 64 << 10;

/// Clients' connections: each with what wakes the task that carries it.
#[derive(Default)]
struct Clients {
    tasks: Mutex<HashMap<ConnectionId, Arc<Notify>>>,
    /// Changes when any connection does.
    any: watch::Sender<()>,
}

impl Clients {
    fn tasks(&self) -> std::sync::MutexGuard<'_, HashMap<ConnectionId, Arc<Notify>>> {
        // Each critical section is one operation of the map.
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self, id: ConnectionId) {
        if let Some(task) = self.tasks().get(&id) {
            task.notify_one();
        }
        self.tell_all();
    }

    /// Tells those who wait for any change.
    fn tell_all(&self) {
        if self.any.receiver_count() > 0 {
            self.any.send_replace(());
        }
    }
}

/// Listening sockets that nobody serves yet.
pub(crate) struct Listeners(Vec<std::net::TcpListener>);

/// The thread that serves them.
pub(crate) struct Carrier {
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Listeners {
    /// Binds `addresses`.
    ///
    /// # Errors
    /// If one cannot be listened on, naming it.
    pub(crate) fn bind(addresses: &[String]) -> Result<Self> {
        let bind = |address: &String| {
            let listener = std::net::TcpListener::bind(address);
            let listener =
                listener.with_context(|| format!("--listen {address}: cannot listen"))?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        Ok(Self(addresses.iter().map(bind).collect::<Result<_>>()?))
    }

    pub(crate) fn count(&self) -> u32 {
        self.0.len() as u32
    }

    /// Serves them, until the carrier is told that the program ended.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub(crate) fn serve(self, wasi: Arc<Wasi>) -> Result<Carrier> {
        if self.0.is_empty() {
            return Ok(Carrier {
                end: None,
                thread: None,
            });
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("connections cannot be served")?;
        let (end, ended) = oneshot::channel();
        let serve = move || runtime.block_on(LocalSet::new().run_until(serve(self.0, wasi, ended)));
        let thread = std::thread::Builder::new()
            .name("connections".into())
            .spawn(serve)
            .context("connections cannot be served")?;
        Ok(Carrier {
            end: Some(end),
            thread: Some(thread),
        })
    }
}

impl Carrier {
    /// The program ended, and its connections are closed: waits until clients have what it sent.
    pub(crate) fn finish(mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that serves connections panicked");
        }
    }
}

async fn serve(
    listeners: Vec<std::net::TcpListener>,
    wasi: Arc<Wasi>,
    ended: oneshot::Receiver<()>,
) {
    let clients = Arc::new(Clients::default());
    let told = clients.clone();
    wasi.network()
        .set_changed(Arc::new(move |id| told.changed(id)));
    let accepting: Vec<_> = (0_u32..)
        .zip(listeners)
        .map(|(index, listener)| {
            tokio::task::spawn_local(accept(index, listener, wasi.clone(), clients.clone()))
        })
        .collect();
    // Dropped without a message: also if the main thread panicked.
    drop(ended.await);
    for task in accepting {
        task.abort();
        drop(task.await);
    }
    for connection in wasi.network().connections() {
        // The program never accepted it.
        if !connection.progress().closed {
            wasi.network().remove(connection.id());
            clients.changed(connection.id());
        }
    }
    let mut changes = clients.any.subscribe();
    let all_sent = async {
        // The sender is there as long as `clients`.
        while !clients.tasks().is_empty() && changes.changed().await.is_ok() {}
    };
    if tokio::time::timeout(END_PATIENCE, all_sent).await.is_err() {
        let count = clients.tasks().len();
        tracing::warn!(count, "clients did not receive all that the program sent");
    }
}

/// Accepts clients of one listener, as long as the program has room for them.
async fn accept(
    index: u32,
    listener: std::net::TcpListener,
    wasi: Arc<Wasi>,
    clients: Arc<Clients>,
) {
    let listener = match TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return tracing::error!(index, %error, "no connection can be accepted"),
    };
    let buffer = Rc::new(RefCell::new(vec![0; BUFFER_BYTES]));
    let carrier = rand::random();
    for number in 0.. {
        let id = ConnectionId { carrier, number };
        let socket = loop {
            match listener.accept().await {
                Ok((socket, _)) => break socket,
                Err(error) if is_of_one_client(&error) => {}
                Err(error) => {
                    tracing::warn!(%error, "no connection is accepted for a moment");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        };
        let (Ok(local), Ok(peer)) = (socket.local_addr(), socket.peer_addr()) else {
            continue;
        };
        let connection = loop {
            let mut changes = clients.any.subscribe();
            match wasi.network().offer(id, index, local, peer) {
                Ok(connection) => break connection,
                // The next ones wait in the kernel meanwhile.
                Err(NotOffered::Full(_)) => drop(changes.changed().await),
                Err(error) => return tracing::error!(index, %error, "connections are refused"),
            }
        };
        // What changed before is looked at when the task begins.
        let wake = Arc::new(Notify::new());
        clients.tasks().insert(id, wake.clone());
        let client = Client {
            socket,
            connection,
            wake,
            buffer: buffer.clone(),
        };
        let (wasi, clients) = (wasi.clone(), clients.clone());
        tokio::task::spawn_local(async move {
            if let Err(error) = client.carry().await {
                tracing::debug!(%peer, %error, "connection lost");
            }
            wasi.network().remove(id);
            clients.tasks().remove(&id);
            clients.tell_all();
        });
    }
}

/// Whether only the client that was to be accepted is gone.
fn is_of_one_client(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::ConnectionAborted | ErrorKind::ConnectionReset | ErrorKind::Interrupted
    )
}

/// One client's socket, and the program's end of the connection.
struct Client {
    socket: TcpStream,
    connection: Arc<Connection>,
    wake: Arc<Notify>,
    /// One for all clients: never in use while a task waits.
    buffer: Rc<RefCell<Vec<u8>>>,
}

impl Client {
    /// Carries bytes both ways, until the program has closed its end and the client has all of it,
    /// or the connection is lost.
    ///
    /// # Errors
    /// Of the socket; the connection is to be reset.
    async fn carry(mut self) -> io::Result<()> {
        let (mut received, mut sent) = (0, 0);
        let (mut client_ended, mut program_ended) = (false, false);
        loop {
            let progress = self.connection.progress();
            if progress.reset {
                // The client sees the same.
                self.socket.set_zero_linger()?;
                return Ok(());
            }
            let is_full = self.write(&mut sent)?;
            if progress.ended && sent == progress.sent && !program_ended {
                self.socket.shutdown().await?;
                self.connection
                    .acknowledge_end()
                    .map_err(io::Error::other)?;
                program_ended = true;
            }
            if program_ended && progress.closed {
                return Ok(());
            }
            let is_empty = !client_ended && self.read(&mut received, &mut client_ended)?;
            let interest = match (is_empty, is_full) {
                (true, true) => Interest::READABLE | Interest::WRITABLE,
                (true, false) => Interest::READABLE,
                (false, true) => Interest::WRITABLE,
                (false, false) => {
                    self.wake.notified().await;
                    continue;
                }
            };
            tokio::select! {
                () = self.wake.notified() => {}
                ready = self.socket.ready(interest) => drop(ready?),
            }
        }
    }

    /// Writes what the program sent from `sent` on; whether the socket takes no more now.
    fn write(&self, sent: &mut u64) -> io::Result<bool> {
        let mut buffer = self.buffer.borrow_mut();
        loop {
            let count = self.connection.sent_from(*sent, &mut buffer);
            if count == 0 {
                return Ok(false);
            }
            match self.socket.try_write(&buffer[..count]) {
                Ok(written) => {
                    *sent += written as u64;
                    self.connection
                        .acknowledge(*sent)
                        .map_err(io::Error::other)?;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(true),
                Err(error) => return Err(error),
            }
        }
    }

    /// Reads what the program has room for; whether it waits for more of the client.
    fn read(&self, received: &mut u64, ended: &mut bool) -> io::Result<bool> {
        let mut buffer = self.buffer.borrow_mut();
        loop {
            let room = self.connection.room().min(buffer.len());
            if room == 0 {
                return Ok(false);
            }
            match self.socket.try_read(&mut buffer[..room]) {
                Ok(0) => {
                    *ended = true;
                    let delivered = self.connection.deliver_end(*received);
                    delivered.map_err(io::Error::other)?;
                    return Ok(false);
                }
                Ok(count) => {
                    let delivered = self.connection.deliver(*received, &buffer[..count]);
                    delivered.map_err(io::Error::other)?;
                    *received += count as u64;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(true),
                Err(error) => return Err(error),
            }
        }
    }
}
