//! Sizes as people write them: `64M`, `1.5G`, `4096`.

/// Bytes of a size such as `512`, `64K`, `64MiB`, `1.5G` (powers of 1024).
///
/// # Errors
/// A sentence that names what was given and what is expected.
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let bad = || format!("{text:?} is not a size (examples: 64M, 1.5G, 4096)");
    let split = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(bad()),
    };
    let number: f64 = number.parse().map_err(|_| bad())?;
    let bytes = number * 2f64.powi(shift);
    if bytes.is_finite() && bytes < 2f64.powi(62) {
        Ok(bytes as u64)
    } else {
        Err(bad())
    }
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn reads_what_people_write() {
        assert_eq!(parse("4096"), Ok(4096));
        assert_eq!(parse("64K"), Ok(64 << 10));
        assert_eq!(parse("64MiB"), Ok(64 << 20));
        assert_eq!(parse("1.5G"), Ok(3 << 29));
        assert_eq!(parse("2t"), Ok(2 << 40));
        for bad in ["", "M", "1X", "-1", "1e99G", "..", "99999999T"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
