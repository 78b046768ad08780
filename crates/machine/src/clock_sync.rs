//! Whether this host's wall clock is synchronised. No decision depends on wall clocks;
//! users compare times of several nodes by them.

/// Whether the kernel considers the wall clock synchronised.
///
/// # Errors
/// That of the kernel, if it does not report it.
pub fn is_synchronised() -> std::io::Result<bool> {
    #[allow(
        unsafe_code,
        reason = "no crate here wraps this system call; it only reads"
    )]
    // SAFETY: all fields of `timex` are numbers, for which zero is valid; with no mode
    // the call only writes to the structure, which outlives it.
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
    /// Reading needs no rights, whatever the result.
    #[test]
    fn reading_needs_no_rights() {
        super::is_synchronised().unwrap();
    }
}
