//! `keel move --dry-run`: the prediction of a move.

use crate::cluster::Reach;
use crate::output;
use anyhow::Result;
use keel_api::{DryRun, MoveRequest};
use std::process::ExitCode;

/// Prints the prediction; fails if the target would refuse the machine.
pub(crate) async fn dry_run(
    reach: &Reach,
    machine: &str,
    request: &MoveRequest,
) -> Result<ExitCode> {
    let path = keel_api::path(["machines", machine, "dry-run"]);
    let dry_run: DryRun = reach.client()?.post(&path, request).await?;
    output::one(reach.format(), &dry_run, machine, |dry_run| {
        words(dry_run, request.post_copy)
    })?;
    Ok(match dry_run.refusal {
        None => ExitCode::SUCCESS,
        Some(_) => ExitCode::from(1),
    })
}

fn words(dry_run: &DryRun, post_copy: bool) -> String {
    let DryRun {
        machine,
        source,
        target,
        pre_copy,
        ..
    } = dry_run;
    let mut lines = Vec::new();
    lines.push(match &dry_run.refusal {
        None => format!("{machine}: {target} would accept it from {source}"),
        Some(reason) => format!("{machine}: {target} would refuse it from {source}: {reason}"),
    });
    let mut sizes = format!(
        "  memory {}, of which it writes {}/s",
        output::bytes(dry_run.memory_bytes),
        output::bytes(pre_copy.written_bytes_per_s),
    );
    if dry_run.volume_bytes > 0 {
        sizes += &format!("; volumes {}", output::bytes(dry_run.volume_bytes));
    }
    lines.push(sizes);
    lines.push(format!(
        "  link {}/s ({})",
        output::bytes(pre_copy.link_bytes_per_s),
        match pre_copy.learned_from {
            0 => "measured now; there were no earlier moves".to_owned(),
            count => format!("measured by {count} earlier move(s)"),
        }
    ));
    let both = [(pre_copy, !post_copy), (&dry_run.post_copy, post_copy)];
    for (prediction, asked) in both {
        let mark = if asked { '*' } else { ' ' };
        lines.push(format!("{mark} {}", prediction.line()));
    }
    lines.push(format!("  {}", advice(dry_run)));
    lines.join("\n")
}

/// The recommended options.
fn advice(dry_run: &DryRun) -> String {
    let (pre, post) = (&dry_run.pre_copy, &dry_run.post_copy);
    let post_gains = post.total_micros.likely * 2 < pre.total_micros.likely;
    match pre.speed_percent {
        100 => "pre-copy converges: its dirty rate is below the link's throughput".into(),
        percent => format!(
            "its dirty rate exceeds the link's throughput: pre-copy throttles it to {percent} % for a while; --downtime MS allows a longer downtime instead{}",
            if post_gains {
                ", --post-copy runs it there at once (its source must then live until all memory has arrived)"
            } else {
                ""
            }
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use keel_machine::moves::prediction::{Estimate, Prediction};

    fn prediction(post_copy: bool, speed_percent: u32, ms: u64) -> Prediction {
        let of = |likely| Estimate {
            low: likely / 2,
            likely,
            high: likely * 2,
        };
        Prediction {
            post_copy,
            total_micros: of(ms * 1000),
            downtime_micros: of(4000),
            bytes: of(1 << 30),
            rounds: 3,
            speed_percent,
            written_bytes_per_s: 200 << 20,
            link_bytes_per_s: 1 << 30,
            learned_from: 0,
        }
    }

    fn of(speed_percent: u32, refusal: Option<&str>) -> DryRun {
        DryRun {
            machine: "web-1".into(),
            source: "a".into(),
            target: "b".into(),
            refusal: refusal.map(str::to_owned),
            memory_bytes: 1 << 30,
            volume_bytes: 0,
            pre_copy: prediction(false, speed_percent, 9000),
            post_copy: prediction(true, 100, 1200),
        }
    }

    #[test]
    fn it_says_what_to_choose() {
        let easy = words(&of(100, None), false);
        assert!(easy.contains("b would accept it from a"), "{easy}");
        assert!(
            easy.contains("* pre-copy: 9000 ms (4500 to 18000)"),
            "{easy}"
        );
        assert!(easy.contains("downtime 4.0 ms (2.0 to 8.0)"), "{easy}");
        assert!(easy.contains("pre-copy converges"), "{easy}");
        let hard = words(&of(25, Some("no room")), true);
        assert!(hard.contains("would refuse it from a: no room"), "{hard}");
        assert!(hard.contains("* post-copy"), "{hard}");
        assert!(hard.contains("throttles it to 25 %"), "{hard}");
        assert!(hard.contains("--post-copy runs it there"), "{hard}");
    }
}
