//! The balloon of a system: a device (virtio specification 1.2, section 5.5) by which it gives memory
//! back to its node, and tells how much of it is in use.
//!
//! What a system does not use it gives back by itself, some seconds after it has freed it ("free page
//! reporting"). What it keeps for files that it may read again it gives back when it is asked to: how
//! much, the node's agent decides. If the system then runs out of memory it takes it all again.

use crate::qmp::{Qmp, QmpError};
use keel_machine::worker::control::GuestMemory;
use serde::Deserialize;
use serde_json::{Number, json};
use std::time::{Duration, Instant};

/// The device on QEMU's command line.
pub(crate) const DEVICE: &str =
    "virtio-balloon-pci,id=balloon,deflate-on-oom=on,free-page-reporting=on";
/// Its place among QEMU's objects.
const PATH: &str = "/machine/peripheral/balloon";
/// How often the system tells how much is in use, in seconds.
const TOLD_EVERY_S: u64 = 5;
/// A system that has told nothing new for so long may not be able to.
const SILENT_AFTER: Duration = Duration::from_secs(30);

/// The answer to `query-balloon`.
#[derive(Debug, Deserialize)]
struct Size {
    /// What the system has, in bytes.
    actual: u64,
}

/// The property `guest-stats`, in which a system tells how much memory is in use.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Told {
    /// By QEMU's clock, in seconds since 1970-01-01 UTC; 0 if it has told nothing yet.
    last_update: u64,
    stats: Stats,
}

/// In bytes; what is not known is the largest number, or negative.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Stats {
    stat_available_memory: Option<Number>,
    stat_free_memory: Option<Number>,
}

impl Told {
    /// What programs could use without swap space, and what is not used for anything, in bytes.
    fn bytes(&self) -> Option<(u64, u64)> {
        let known = |bytes: &Option<Number>| bytes.as_ref()?.as_u64().filter(|it| *it < u64::MAX);
        let stats = &self.stats;
        (known(&stats.stat_available_memory)).zip(known(&stats.stat_free_memory))
    }
}

/// What a worker knows of its guest's balloon.
#[derive(Debug, Default)]
pub(crate) struct Balloon {
    seen: Option<Seen>,
    /// What the guest was last asked to have given back, in bytes.
    asked_bytes: u64,
}

/// The balloon when it was looked at.
#[derive(Debug, Clone, Copy)]
struct Seen {
    /// What the guest had, in bytes.
    actual: u64,
    /// What it had told last when that was seen first.
    before: u64,
    /// What it has told last.
    last: u64,
    /// When that was new.
    at: Instant,
}

impl Seen {
    /// What is seen now, after `earlier`.
    fn next(earlier: Option<Self>, actual: u64, last: u64, now: Instant) -> Self {
        let same = earlier.filter(|earlier| earlier.actual == actual);
        let told = earlier.filter(|earlier| earlier.last == last);
        Seen {
            actual,
            before: same.map_or(last, |same| same.before),
            last,
            at: told.map_or(now, |told| told.at),
        }
    }

    /// Whether what the guest has told is of a time when it had what it has now.
    fn is_current(&self) -> bool {
        self.last != self.before
    }
}

impl Balloon {
    /// The memory of a guest that was started with `memory_bytes`.
    ///
    /// # Errors
    /// What QEMU says.
    pub(crate) fn memory(&mut self, qmp: &Qmp, memory_bytes: u64) -> Result<GuestMemory, QmpError> {
        if self.seen.is_none() {
            self.begin(qmp, memory_bytes)?;
        }
        let given_back_bytes = given_back(qmp, memory_bytes)?;
        let stats = json!({ "path": PATH, "property": "guest-stats" });
        let told: Told = qmp.query_with("qom-get", stats)?;
        let actual = memory_bytes - given_back_bytes;
        let seen = Seen::next(self.seen, actual, told.last_update, Instant::now());
        self.seen = Some(seen);
        let bytes = told.bytes().filter(|_| seen.is_current());
        let (available_bytes, free_bytes) = bytes.unzip();
        Ok(GuestMemory {
            memory_bytes,
            available_bytes,
            free_bytes,
            is_silent: seen.at.elapsed() > SILENT_AFTER,
            given_back_bytes,
            asked_bytes: self.asked_bytes,
        })
    }

    /// Has the guest tell how much memory is in use, from now on and while it runs here. What it was
    /// asked for elsewhere it need not give any more.
    fn begin(&mut self, qmp: &Qmp, memory_bytes: u64) -> Result<(), QmpError> {
        let every = json!({
            "path": PATH,
            "property": "guest-stats-polling-interval",
            "value": TOLD_EVERY_S,
        });
        qmp.execute("qom-set", every)?;
        let given_back_bytes = given_back(qmp, memory_bytes)?;
        self.ask(qmp, memory_bytes, given_back_bytes)
    }

    /// Asks a guest that was started with `memory_bytes` to have given so much back. It does that by
    /// and by, as far as it can.
    ///
    /// # Errors
    /// What QEMU says.
    pub(crate) fn ask(&mut self, qmp: &Qmp, memory_bytes: u64, bytes: u64) -> Result<(), QmpError> {
        let rest = memory_bytes.saturating_sub(bytes);
        qmp.execute("balloon", json!({ "value": rest }))?;
        self.asked_bytes = bytes;
        Ok(())
    }

    /// Keeps a guest from giving back more than it has: while QEMU copies its memory the node would not
    /// get it.
    ///
    /// # Errors
    /// What QEMU says.
    pub(crate) fn stop(&mut self, qmp: &Qmp, memory_bytes: u64) -> Result<(), QmpError> {
        if self.asked_bytes == 0 {
            return Ok(());
        }
        let given_back_bytes = given_back(qmp, memory_bytes)?;
        match self.asked_bytes > given_back_bytes {
            true => self.ask(qmp, memory_bytes, given_back_bytes),
            false => Ok(()),
        }
    }
}

fn given_back(qmp: &Qmp, memory_bytes: u64) -> Result<u64, QmpError> {
    let size: Size = qmp.query("query-balloon")?;
    Ok(memory_bytes.saturating_sub(size.actual))
}

/// Whether bytes are what a system may tell of its memory, for fuzzing.
pub(crate) fn is_told(bytes: &[u8]) -> bool {
    serde_json::from_slice::<Told>(bytes).is_ok_and(|told| told.bytes().is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(text: &str) -> Told {
        serde_json::from_str(text).unwrap()
    }

    /// As QEMU 7.2 and 10.0 write it.
    #[test]
    fn what_a_system_tells_is_read() {
        let text = r#"{"stats":{"stat-htlb-pgalloc":0,"stat-swap-out":0,
            "stat-available-memory":95780864,"stat-free-memory":91906048},"last-update":1760000000}"#;
        assert_eq!(told(text).bytes(), Some((95_780_864, 91_906_048)));
        for unknown in ["18446744073709551615", "-1", "1.5"] {
            let text = text.replace("91906048", unknown);
            assert_eq!(told(&text).bytes(), None, "{unknown}");
        }
        assert_eq!(told(r#"{"stats":{},"last-update":0}"#).bytes(), None);
    }

    #[test]
    fn only_what_is_told_of_what_it_has_now_is_current() {
        let begun = Instant::now();
        let at = |s| begun + Duration::from_secs(s);
        let mut seen = None;
        let mut look = |actual, last, s| {
            seen = Some(Seen::next(seen, actual, last, at(s)));
            seen.unwrap()
        };
        assert!(!look(8, 0, 0).is_current());
        assert!(look(8, 100, 5).is_current());
        // It gives memory back, and tells something meanwhile.
        assert!(!look(6, 105, 10).is_current());
        assert!(!look(4, 110, 15).is_current());
        assert!(!look(4, 110, 20).is_current());
        let current = look(4, 115, 25);
        assert!(current.is_current());
        // A clock that is set back.
        assert!(look(4, 3, 30).is_current());
        assert_eq!(look(4, 3, 70).at, at(30));
    }
}
