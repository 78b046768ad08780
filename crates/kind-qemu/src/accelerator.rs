//! What executes guests on this host: found by booting a tiny payload.
//!
//! That `/dev/kvm` exists and can be opened proves nothing: inside some virtual machines KVM
//! initialises, and then QEMU aborts, or the guest never executes an instruction while its status
//! is `running`. So a payload that ends by itself is booted, with a time limit. That is not enough
//! either: with KVM on a host whose processor has no virtualisation (`kvm_pvm`) the payload ends and
//! Linux hangs, so the processor's own module must be there. The answer holds until the host boots
//! again.

use crate::arguments::SANDBOX;
use crate::process::{QEMU, die_with_parent};
use crate::processor::Accelerator;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long the payload may take; with KVM it takes some 200 ms.
const PATIENCE: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(20);

/// Where the kernel lists its modules, those that are built in too.
const MODULES: &str = "/sys/module";

/// The modules of KVM for processors with virtualisation, of Intel and of AMD.
const KVM_MODULES: [&str; 2] = ["kvm_intel", "kvm_amd"];

/// The file, among compiled code, that has the answer.
const CACHED: &str = "qemu-accelerator";

/// The status with which QEMU exits when a guest writes 0x31 to its exit device.
const EXIT_STATUS: i32 = 0x31 << 1 | 1;

/// A Multiboot image (specification 0.6.96, section 3.1, with addresses in the header): 32 bits,
/// loaded at 1 MiB; it writes 0x31 to port 0xf4, and halts.
const PAYLOAD: [u8; 39] = {
    const LOAD: u32 = 0x10_0000;
    const FLAGS: u32 = 1 << 16;
    const MAGIC: u32 = 0x1bad_b002;
    const CODE: u32 = 32;
    const LENGTH: u32 = 39;
    let words = [
        MAGIC,
        FLAGS,
        0u32.wrapping_sub(MAGIC.wrapping_add(FLAGS)),
        LOAD,
        LOAD,
        LOAD + LENGTH,
        0,
        LOAD + CODE,
    ];
    // mov al, 0x31; out 0xf4, al; hlt; jmp to the hlt
    let code = [0xb0, 0x31, 0xe6, 0xf4, 0xf4, 0xeb, 0xfd];
    let mut all = [0; 39];
    let mut at = 0;
    while at < 32 {
        all[at] = words[at / 4].to_le_bytes()[at % 4];
        at += 1;
    }
    while at < 39 {
        all[at] = code[at - 32];
        at += 1;
    }
    all
};

impl Accelerator {
    /// What works on this host. Blocks for some seconds at the first call since the host booted,
    /// if it has KVM. `cache` keeps the answer.
    pub(crate) fn of_host(cache: &Path) -> Self {
        if !has_kvm(Path::new(MODULES)) {
            // Looked up each time: the module may be loaded later.
            return Accelerator::Tcg;
        }
        Self::probed(cache, || boots(cache, Accelerator::Kvm))
    }

    /// The answer that is kept, or that of `boots`, which is kept if there is one.
    fn probed(cache: &Path, boots: impl FnOnce() -> Option<bool>) -> Self {
        let file = cache.join(CACHED);
        let boot = boot_id();
        let known = fs::read_to_string(&file).unwrap_or_default();
        let known = known.split_once(' ').filter(|(_, of)| *of == boot);
        match known {
            Some(("kvm", _)) => return Accelerator::Kvm,
            Some(("tcg", _)) => return Accelerator::Tcg,
            _ => {}
        }
        let found = match boots() {
            Some(true) => Accelerator::Kvm,
            Some(false) => Accelerator::Tcg,
            // QEMU may be installed later.
            None => return Accelerator::Tcg,
        };
        tracing::info!(accelerator = found.word(), "found what executes guests");
        if let Err(error) = fs::write(&file, format!("{} {boot}", found.word())) {
            tracing::warn!(%error, "{} cannot be written", file.display());
        }
        found
    }
}

/// What tells this start of the host from others: proc_sys_kernel(5), `random/boot_id`.
pub(crate) fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default()
}

/// Whether the processor has virtualisation, and the kernel uses it.
fn has_kvm(modules: &Path) -> bool {
    let mut names = KVM_MODULES.iter();
    names.any(|name| modules.join(name).exists())
}

/// Whether a guest executes instructions; none if that cannot be tried.
fn boots(folder: &Path, accelerator: Accelerator) -> Option<bool> {
    let payload = folder.join(format!("qemu-payload-{}", std::process::id()));
    fs::write(&payload, PAYLOAD).ok()?;
    let mut command = Command::new(QEMU);
    die_with_parent(&mut command);
    let started = command
        .args(SANDBOX)
        .args([
            "-no-user-config",
            "-nodefaults",
            "-display",
            "none",
            "-m",
            "16M",
        ])
        .args([
            "-machine",
            "pc",
            "-cpu",
            "qemu64",
            "-accel",
            accelerator.word(),
        ])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=1", "-kernel"])
        .arg(&payload)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let boots = started.map(|qemu| status_in_time(qemu) == Some(EXIT_STATUS));
    let _ = fs::remove_file(&payload);
    boots.ok()
}

fn status_in_time(mut qemu: Child) -> Option<i32> {
    let until = Instant::now() + PATIENCE;
    loop {
        match qemu.try_wait() {
            Ok(Some(status)) => return status.code(),
            Ok(None) if Instant::now() < until => std::thread::sleep(POLL),
            Ok(None) | Err(_) => {
                // It hangs.
                let _ = qemu.kill();
                let _ = qemu.wait();
                return None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_payload_boots_where_instructions_are_translated() {
        if Command::new(QEMU).arg("--version").output().is_err() {
            eprintln!("skipped: {QEMU} is not installed");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(boots(folder.path(), Accelerator::Tcg), Some(true));
    }

    #[test]
    fn the_module_of_the_processor_is_required() {
        let modules = tempfile::tempdir().unwrap();
        for other in ["kvm", "kvm_pvm"] {
            fs::create_dir(modules.path().join(other)).unwrap();
            assert!(!has_kvm(modules.path()));
        }
        fs::create_dir(modules.path().join("kvm_amd")).unwrap();
        assert!(has_kvm(modules.path()));
    }

    #[test]
    fn an_answer_is_kept_until_the_host_boots_again_and_a_failure_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(CACHED);
        let probed = |answer: Option<bool>| Accelerator::probed(folder.path(), || answer);
        let kept = || Accelerator::probed(folder.path(), || panic!("it was kept"));
        assert_eq!(probed(None), Accelerator::Tcg);
        assert_eq!(probed(Some(true)), Accelerator::Kvm);
        assert_eq!(kept(), Accelerator::Kvm);
        fs::write(&file, "kvm of-an-earlier-boot").unwrap();
        assert_eq!(probed(Some(false)), Accelerator::Tcg);
        assert_eq!(kept(), Accelerator::Tcg);
    }
}
