//! Times in user syntax: `10m` ago, or `2026-01-31T12:00:00Z`.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Parses a time in the past into milliseconds since 1970-01-01 UTC: a duration ago (`30s`, `10m`,
/// `1h 30m`, `2d`), a time (`2026-01-31T12:00:00Z`, with a space instead of the T, without the Z)
/// or the beginning of a day (`2026-01-31`), in UTC.
///
/// # Errors
/// A sentence with the given text and the expected form.
pub(crate) fn since(text: &str) -> Result<u64, String> {
    since_at(text, SystemTime::now())
}

/// Parses a duration: `30s`, `10m`, `12h`, `7d`.
///
/// # Errors
/// A sentence with the given text and the expected form.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text.trim())
        .map_err(|error| format!("{text:?} is not a duration ({error}; examples: 30s, 10m, 7d)"))
}

fn since_at(text: &str, now: SystemTime) -> Result<u64, String> {
    let text = text.trim();
    if let Ok(ago) = humantime::parse_duration(text) {
        return Ok(unix_ms(now.checked_sub(ago).unwrap_or(UNIX_EPOCH)));
    }
    let day = format!("{text} 00:00:00");
    let moment = humantime::parse_rfc3339_weak(text)
        .or_else(|_| humantime::parse_rfc3339_weak(&day))
        .map_err(|_| {
            format!(
                "{text:?} is neither a duration (examples: 30s, 10m, 2h, 1d) nor a time (examples: 2026-01-31T12:00:00Z, 2026-01-31)"
            )
        })?;
    if moment > now {
        return Err(format!("{text} is in the future (times are UTC)"));
    }
    Ok(unix_ms(moment))
}

pub(crate) fn unix_ms(moment: SystemTime) -> u64 {
    moment.duration_since(UNIX_EPOCH).map_or(0, |since| {
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    })
}

/// Formats a time: UTC, to the millisecond.
pub(crate) fn show(unix_ms: u64) -> String {
    // A value beyond the year 9999 is no valid time.
    match UNIX_EPOCH.checked_add(Duration::from_millis(unix_ms)) {
        Some(moment) if unix_ms < 253_402_300_800_000 => {
            humantime::format_rfc3339_millis(moment).to_string()
        }
        _ => format!("{unix_ms} ms"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_people_write() {
        let now = UNIX_EPOCH + Duration::from_secs(1_769_860_800);
        assert_eq!(show(unix_ms(now)), "2026-01-31T12:00:00.000Z");
        for (text, moment) in [
            ("10m", "2026-01-31T11:50:00.000Z"),
            ("1h 30m", "2026-01-31T10:30:00.000Z"),
            (" 1d ", "2026-01-30T12:00:00.000Z"),
            ("500ms", "2026-01-31T11:59:59.500Z"),
            ("2026-01-31T11:00:00Z", "2026-01-31T11:00:00.000Z"),
            ("2026-01-31 11:00:00.25", "2026-01-31T11:00:00.250Z"),
            ("2026-01-30", "2026-01-30T00:00:00.000Z"),
            // The output of `show` can be parsed.
            ("2026-01-31T11:00:00.125Z", "2026-01-31T11:00:00.125Z"),
            ("1000y", "1970-01-01T00:00:00.000Z"),
        ] {
            assert_eq!(
                since_at(text, now).map(show).as_deref(),
                Ok(moment),
                "{text}"
            );
        }
        for bad in [
            "",
            "soon",
            "10",
            "-5m",
            "10x",
            "2026-13-01",
            "2026-02-30",
            "12:00",
        ] {
            let error = since_at(bad, now).unwrap_err();
            assert!(error.contains("neither a duration"), "{bad}: {error}");
        }
        let error = since_at("2026-01-31T12:00:01Z", now).unwrap_err();
        assert!(error.contains("is in the future"), "{error}");
        assert_eq!(show(u64::MAX), format!("{} ms", u64::MAX));
    }
}
