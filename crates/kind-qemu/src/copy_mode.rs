//! How the memory of a guest that runs can be copied: in rounds, or once.
//!
//! QEMU looks up at the end of each round what was written meanwhile, and clears its log. Before
//! 9.0 the log of TCG was cleared without telling the translated code: that goes on to write to
//! pages that it has written to before, without an entry in the log. So each round but the last
//! loses writes (mended by "physmem: Fix migration dirty bitmap coherency with TCG memory access";
//! seen here with 7.2.22: pages that differ at the target after the first or second move). There
//! the log is cleared twice only, at the beginning and at the end, both times with the guest
//! stopped.

use crate::migration_status::Info;
use crate::processor::Accelerator;
use crate::vm::Vm;
use keel_machine::worker::MoveError;
use serde::Deserialize;

/// The first version of QEMU whose log is whole under TCG.
const WHOLE_LOG: u32 = 9;

/// How memory is copied while the guest runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CopyMode {
    /// Again and again what was written meanwhile.
    Rounds,
    /// Once; what was written meanwhile is sent with the guest stopped.
    OnePass,
}

/// The answer to `query-version`.
#[derive(Debug, Deserialize)]
struct Version {
    qemu: Release,
}

#[derive(Debug, Deserialize)]
struct Release {
    major: u32,
}

impl CopyMode {
    /// # Errors
    /// If QEMU does not say its version.
    pub(crate) fn of(vm: &Vm) -> Result<Self, MoveError> {
        let version: Version = vm.qmp()?.query("query-version")?;
        Ok(Self::with(vm.accelerator(), version.qemu.major))
    }

    fn with(accelerator: Accelerator, major: u32) -> Self {
        match accelerator {
            Accelerator::Tcg if major < WHOLE_LOG => CopyMode::OnePass,
            Accelerator::Tcg | Accelerator::Kvm => CopyMode::Rounds,
        }
    }

    /// QEMU's own limit for the downtime, in milliseconds. With 0 it begins no second round. The
    /// least that is more lets it stop the guest itself only when as good as nothing is left.
    pub(crate) fn downtime_limit_ms(self) -> u64 {
        match self {
            CopyMode::Rounds => 1,
            CopyMode::OnePass => 0,
        }
    }

    /// Looks at how often the log was cleared, before the last time.
    ///
    /// # Errors
    /// If that was too often: some version of QEMU behaves in another way.
    pub(crate) fn check(self, info: &Info) -> Result<(), MoveError> {
        if self == CopyMode::OnePass && info.ram.rounds > 1 {
            return Err(
                "this version of QEMU cannot move a system that it translates (TCG): \
                        QEMU 9.0 or newer is needed, or KVM"
                    .into(),
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration_status::Ram;

    #[test]
    fn rounds_need_a_whole_log() {
        assert_eq!(CopyMode::with(Accelerator::Tcg, 8), CopyMode::OnePass);
        assert_eq!(CopyMode::with(Accelerator::Tcg, 9), CopyMode::Rounds);
        assert_eq!(CopyMode::with(Accelerator::Kvm, 7), CopyMode::Rounds);
    }

    #[test]
    fn one_pass_has_no_second_round() {
        let after = |rounds| Info {
            ram: Ram {
                rounds,
                ..Ram::default()
            },
            ..Info::default()
        };
        CopyMode::OnePass.check(&after(1)).unwrap();
        let error = CopyMode::OnePass.check(&after(2)).unwrap_err().to_string();
        assert!(error.contains("9.0"), "{error}");
        CopyMode::Rounds.check(&after(9)).unwrap();
    }
}
