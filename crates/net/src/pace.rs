//! Keeps bulk data from filling the links that it crosses, so that the store's votes and renewals
//! pass at about the round trip of an empty link: the kernel paces the socket at a rate that follows
//! the delay.
//!
//! The usual congestion control sends more until something is lost: the buffers on the way are full
//! by then, and what other connections send waits behind them for some hundred milliseconds. Here a
//! rate is set instead, once in a round trip:
//!
//! ```text
//!   queue = smoothed round trip - least round trip
//!   queue <= target   rate grows by up to 3 % and 6 KiB a round trip, the less the longer the queue is
//!   queue >  target   rate = what was delivered * (1 - 0.8 * (queue - target) / round trip)
//! ```
//!
//! The decrease is that of Swift (Kumar et al., "Swift: Delay is Simple and Effective for Congestion
//! Control in the Datacenter", SIGCOMM 2020, section 3.1). The increase is proportional, because a few
//! segments in a round trip take minutes to fill a long link; those are added so that connections that
//! share a link come to equal rates. Until the first queue there is no rate,
//! so that a connection begins as fast as any other. All delays are the kernel's (`TCP_INFO`).
//!
//! Near peers are not paced: a full buffer of a local network delays others by a few milliseconds
//! only, and the round trip to a busy computer varies by more.

#![allow(unsafe_code)]

use std::io;
use std::mem::{MaybeUninit, offset_of, size_of};
use std::os::fd::{AsFd, AsRawFd};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// Peers with a shorter round trip than this are near.
const NEAR: Duration = Duration::from_millis(5);
/// A queue's target is this part of the least round trip, within these bounds.
const TARGET_PART: u32 = 5;
const TARGET_MIN: Duration = Duration::from_millis(5);
const TARGET_MAX: Duration = Duration::from_millis(25);
/// How much a rate grows in a round trip without a queue: a part of it, and these bytes per round trip.
const INCREASE: f64 = 0.03;
const INCREASE_BYTES: f64 = 6.0 * 1024.0;
/// Swift's β, and how much one decrease takes at most.
const DECREASE: f64 = 0.8;
const DECREASE_MAX: f64 = 0.5;
/// The lowest rate, in bytes per second.
const RATE_MIN: f64 = 64.0 * 1024.0;
/// Time without bulk data after which a rate is forgotten.
const IDLE: Duration = Duration::from_secs(10);
/// Writes of fewer bytes do not count as bulk data.
const BULK_BYTES: usize = 8 << 10;

/// What the kernel says of a connection.
#[derive(Debug, Clone, Copy)]
struct Sample {
    /// The smoothed round trip.
    round_trip: Duration,
    /// The least one of the last minutes.
    least: Duration,
    /// Bytes per second, as they arrived.
    delivered: f64,
    /// Whether there are bytes that the kernel has not sent yet.
    waits: bool,
}

/// The rate of one connection, decided from samples.
#[derive(Debug, Default)]
struct Rate {
    /// Bytes per second; `None` for no limit.
    limit: Option<f64>,
}

impl Rate {
    /// Takes a sample; returns how long to wait until the next one.
    fn update(&mut self, sample: Sample) -> Duration {
        if sample.least < NEAR {
            self.limit = None;
            return Duration::from_secs(1);
        }
        if !sample.waits {
            // What this side offers is the limit; a queue is of other connections.
            return sample.round_trip;
        }
        let target = (sample.least / TARGET_PART).clamp(TARGET_MIN, TARGET_MAX);
        let queue = sample.round_trip.saturating_sub(sample.least);
        if queue > target {
            let beyond = (queue - target).as_secs_f64() / sample.round_trip.as_secs_f64();
            let kept = 1.0 - (DECREASE * beyond).min(DECREASE_MAX);
            // Of a rate that other traffic on the link has made too high already.
            let from = self
                .limit
                .map_or(sample.delivered, |limit| limit.min(sample.delivered));
            self.limit = Some((from * kept).max(RATE_MIN));
            // It shows a round trip later, and is in the smoothed round trip another one later.
            return 2 * sample.round_trip;
        }
        if let Some(limit) = &mut self.limit {
            let room = 1.0 - queue.as_secs_f64() / target.as_secs_f64();
            let more = INCREASE_BYTES / sample.round_trip.as_secs_f64();
            *limit += (*limit * INCREASE + more) * room;
        }
        sample.round_trip
    }
}

/// Paces one connection.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    rate: Rate,
    /// When the kernel is asked next.
    next: Option<Instant>,
    /// What the kernel was told last.
    told: Option<u32>,
}

impl Pace {
    /// To be called before each write, with its size. What the kernel cannot do is left undone: the
    /// data goes out all the same.
    pub(crate) fn adjust(&mut self, socket: &impl AsFd, bytes: usize) {
        if bytes < BULK_BYTES {
            return;
        }
        let now = Instant::now();
        let first = *self.next.get_or_insert(now + NEAR);
        if now < first {
            return;
        }
        if now - first > IDLE {
            self.rate = Rate::default();
        }
        let wait = match sample(socket) {
            Ok(Some(sample)) => self.rate.update(sample),
            Ok(None) => NEAR,
            Err(error) => {
                tracing::debug!(%error, "this connection is not paced");
                IDLE
            }
        };
        self.next = Some(now + wait);
        // All ones is the kernel's word for no limit.
        let rate = self.rate.limit.map_or(u32::MAX, |limit| limit as u32);
        if self.told.unwrap_or(u32::MAX) != rate && set_pacing_rate(socket, rate).is_ok() {
            self.told = Some(rate);
        }
    }
}

/// `None` until a round trip was measured.
fn sample(socket: &impl AsFd) -> io::Result<Option<Sample>> {
    let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the socket is open as long as it is borrowed. The kernel writes at most `length` bytes
    // to `info`, which has as many.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    let needed = offset_of!(libc::tcp_info, tcpi_delivery_rate) + size_of::<u64>();
    if (length as usize) < needed {
        return Err(io::Error::other("this kernel tells no delivery rate"));
    }
    // SAFETY: all fields are integers, and those that an older kernel did not write are zero.
    let info = unsafe { info.assume_init() };
    let is_measured = info.tcpi_rtt > 0 && (1..u32::MAX).contains(&info.tcpi_min_rtt);
    Ok(is_measured.then(|| Sample {
        round_trip: Duration::from_micros(info.tcpi_rtt.into()),
        least: Duration::from_micros(info.tcpi_min_rtt.into()),
        delivered: info.tcpi_delivery_rate as f64,
        waits: info.tcpi_notsent_bytes > 0,
    }))
}

/// Bytes per second.
fn set_pacing_rate(socket: &impl AsFd, rate: u32) -> io::Result<()> {
    // SAFETY: the socket is open as long as it is borrowed, and the kernel reads four bytes: `rate`.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MAX_PACING_RATE,
            (&raw const rate).cast(),
            size_of::<u32>() as libc::socklen_t,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A socket whose bulk data is paced. Small writes pass as they are.
#[derive(Debug)]
pub struct PacedStream {
    socket: TcpStream,
    pace: Pace,
}

impl From<TcpStream> for PacedStream {
    fn from(socket: TcpStream) -> Self {
        Self {
            socket,
            pace: Pace::default(),
        }
    }
}

impl AsyncRead for PacedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_read(context, buffer)
    }
}

impl AsyncWrite for PacedStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let Self { socket, pace } = &mut *self;
        pace.adjust(socket, bytes.len());
        Pin::new(socket).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let Self { socket, pace } = &mut *self;
        pace.adjust(socket, pieces.iter().map(|piece| piece.len()).sum());
        Pin::new(socket).poll_write_vectored(context, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;

    /// A link with a queue that never overflows, in steps of a millisecond.
    struct Link {
        /// Bytes per step, and of one connection without a limit.
        capacity: f64,
        offered: f64,
        /// Without the queue.
        round_trip: Duration,
        queued: f64,
    }

    /// A connection through it that always has data.
    struct Flow {
        rate: Rate,
        next: u32,
        smoothed: f64,
        least: f64,
        /// Delays of the queue and rates that this side has not heard of yet.
        on_the_way: VecDeque<(f64, f64)>,
    }

    impl Flow {
        fn new() -> Self {
            Self {
                rate: Rate::default(),
                next: 0,
                smoothed: 0.0,
                least: f64::MAX,
                on_the_way: VecDeque::new(),
            }
        }
    }

    impl Link {
        fn megabits(rate: u32, round_trip: Duration) -> Self {
            let capacity = f64::from(rate) * 125.0;
            Self {
                capacity,
                offered: 1.5 * capacity,
                round_trip,
                queued: 0.0,
            }
        }

        /// The queue in milliseconds of the link's time.
        fn queue_ms(&self) -> f64 {
            self.queued / self.capacity
        }

        fn step(&mut self, flows: &mut [Flow], now: u32) {
            let sent: Vec<f64> = flows
                .iter()
                .map(|flow| {
                    flow.rate
                        .limit
                        .map_or(self.offered, |it| (it / 1e3).min(self.offered))
                })
                .collect();
            let total: f64 = sent.iter().sum();
            self.queued = (self.queued + total - self.capacity).max(0.0);
            let is_full = self.queued > 0.0;
            let delay = self.queue_ms();
            for (flow, sent) in flows.iter_mut().zip(sent) {
                let share = if is_full {
                    self.capacity * sent / total
                } else {
                    sent
                };
                flow.on_the_way.push_back((delay, share));
                if flow.on_the_way.len() <= self.round_trip.as_millis() as usize {
                    continue;
                }
                let Some((delay, share)) = flow.on_the_way.pop_front() else {
                    continue;
                };
                let round_trip = self.round_trip.as_secs_f64() * 1e3 + delay;
                flow.least = flow.least.min(round_trip);
                flow.smoothed = match flow.smoothed {
                    0.0 => round_trip,
                    before => before + (round_trip - before) / 8.0,
                };
                if now >= flow.next {
                    let wait = flow.rate.update(Sample {
                        round_trip: Duration::from_secs_f64(flow.smoothed / 1e3),
                        least: Duration::from_secs_f64(flow.least / 1e3),
                        delivered: share * 1e3,
                        waits: true,
                    });
                    flow.next = now + wait.as_millis() as u32;
                }
            }
        }
    }

    /// The longest queue in milliseconds and the used part of the link, from ten seconds on.
    fn settled(link: &mut Link, flows: &mut [Flow]) -> (f64, f64) {
        let (mut longest, mut used) = (0f64, 0.0);
        let (begin, end) = (10_000, 40_000);
        for now in 0..end {
            link.step(flows, now);
            if now >= begin {
                longest = longest.max(link.queue_ms());
                let sent: f64 = flows
                    .iter()
                    .map(|it| it.rate.limit.unwrap_or(f64::MAX) / 1e3)
                    .sum();
                used += if link.queued > 0.0 {
                    1.0
                } else {
                    (sent / link.capacity).min(1.0)
                };
            }
        }
        (longest, used / f64::from(end - begin))
    }

    #[test]
    fn a_link_is_used_and_its_queue_stays_short() {
        for (rate, round_trip_ms) in [(100, 100), (1000, 20), (10, 300), (20, 10)] {
            let mut link = Link::megabits(rate, Duration::from_millis(round_trip_ms));
            let (longest, used) = settled(&mut link, &mut [Flow::new()]);
            let case = format!("{rate} Mbit/s, {round_trip_ms} ms: {longest:.0} ms, {used:.2}");
            assert!(longest < 15.0 + round_trip_ms as f64 / 2.0, "{case}");
            assert!(used > 0.9, "{case}");
        }
    }

    #[test]
    fn connections_share_one_queue() {
        let mut link = Link::megabits(100, Duration::from_millis(100));
        let mut flows = [Flow::new(), Flow::new(), Flow::new()];
        let whole = link.capacity * 1e3;
        for (flow, part) in flows.iter_mut().zip([0.05, 0.2, 0.75]) {
            flow.rate.limit = Some(part * whole);
        }
        let (longest, used) = settled(&mut link, &mut flows);
        assert!(longest < 60.0, "{longest} ms");
        assert!(used > 0.9, "{used}");
        for flow in &flows {
            let part = flow.rate.limit.unwrap_or(whole) / whole;
            assert!((0.2..0.5).contains(&part), "{part}");
        }
    }

    #[test]
    fn near_peers_links_without_a_queue_and_small_requests_have_no_limit() {
        let sample = |round_trip, least| Sample {
            round_trip: Duration::from_millis(round_trip),
            least: Duration::from_millis(least),
            delivered: 1e6,
            waits: true,
        };
        let mut rate = Rate::default();
        for (round_trip, least) in [(300, 1), (100, 100), (119, 100)] {
            rate.update(sample(round_trip, least));
            assert_eq!(rate.limit, None);
        }
        rate.update(sample(200, 100));
        let Some(limit) = rate.limit else {
            panic!("no limit with a queue of 100 ms")
        };
        for round_trip in [100, 300] {
            rate.update(Sample {
                waits: false,
                ..sample(round_trip, 100)
            });
            assert_eq!(rate.limit, Some(limit));
        }
        rate.update(sample(100, 100));
        let more = limit * INCREASE + INCREASE_BYTES / 0.1;
        assert_eq!(rate.limit, Some(limit + more));
    }

    /// What the kernel says of a real connection, and that it takes a rate.
    #[tokio::test]
    async fn the_kernel_measures_and_paces() -> io::Result<()> {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let near = TcpStream::connect(listener.local_addr()?).await?;
        let (mut far, _) = listener.accept().await?;
        let mut stream = PacedStream::from(near);
        let mut buffer = vec![0; 1 << 20];
        stream.write_all(&buffer[..1000]).await?;
        far.read_exact(&mut buffer[..1000]).await?;
        far.write_all(&buffer[..1]).await?;
        stream.read_exact(&mut buffer[..1]).await?;
        let measured = sample(&stream.socket)?;
        assert!(measured.is_some_and(|it| it.least > Duration::ZERO && it.delivered > 0.0));
        set_pacing_rate(&stream.socket, 100_000_000)?;
        set_pacing_rate(&stream.socket, u32::MAX)?;
        let sent = buffer.clone();
        let (written, read) = tokio::join!(stream.write_all(&sent), far.read_exact(&mut buffer));
        written?;
        read?;
        assert_eq!(sent, buffer);
        assert_eq!(stream.pace.told, None, "a near peer is not paced");
        Ok(())
    }
}
