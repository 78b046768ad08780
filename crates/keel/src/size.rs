//! Sizes and shares in user syntax: `64M`, `1.5G`, `4096`; `0.5` cores.

/// Parses bytes, such as `512`, `64K`, `64MiB`, `1.5G` (powers of 1024).
///
/// # Errors
/// A sentence with the given text and the expected form.
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

/// Parses a number of cores, such as `0.5`, `2`, into thousandths.
///
/// # Errors
/// A sentence with the given text and the expected form.
pub(crate) fn cores(text: &str) -> Result<u32, String> {
    let cores: f64 = text
        .parse()
        .map_err(|_| format!("{text:?} is not a number of cores (examples: 0.5, 2)"))?;
    // NaN is in no range.
    if (0.01..=1000.0).contains(&cores) {
        Ok((cores * 1000.0).round() as u32)
    } else {
        Err(format!("{text} cores: 0.01 to 1000 are possible"))
    }
}

#[cfg(test)]
mod tests {
    use super::{cores, parse};

    #[test]
    fn reads_cores() {
        assert_eq!(cores("0.5"), Ok(500));
        assert_eq!(cores("2"), Ok(2000));
        for bad in ["", "0", "-1", "NaN", "inf", "1e9", "half", "0.001"] {
            assert!(cores(bad).is_err(), "{bad}");
        }
    }

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
