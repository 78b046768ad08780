//! Whether this host's wall clock is kept right by somebody. Wall clocks decide
//! nothing here; people compare times of several nodes by them.

/// Whether the kernel knows the wall clock to be synchronised.
///
/// # Errors
/// The kernel's answer, where it does not tell.
pub fn is_synchronised() -> std::io::Result<bool> {
    #[allow(
        unsafe_code,
        reason = "no crate here wraps this system call; it only reads"
    )]
    // SAFETY: `timex` is plain numbers, for which zero is a value; with no mode
    // the call only writes into the structure, which outlives it.
    let state = unsafe {
        let mut timex: libc::timex = std::mem::zeroed();
        libc::adjtimex(&mut timex)
    };
    match state {
        -1 => Err(std::io::Error::last_os_error()),
        state => Ok(state != libc::TIME_ERROR),
    }
}

#[cfg(test)]
mod tests {
    /// Reading needs no rights, whatever the answer.
    #[test]
    fn anybody_may_ask() {
        super::is_synchronised().unwrap();
    }
}
