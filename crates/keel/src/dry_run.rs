//! `keel move --dry-run`: what a move would be like, before it is made.

use crate::cluster::Reach;
use crate::output;
use anyhow::Result;
use keel_api::{DryRun, MoveRequest};
use std::process::ExitCode;

/// Tells it; fails if the target would not take the machine.
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
        None => format!("{machine}: {target} would take it from {source}"),
        Some(reason) => format!("{machine}: {target} would not take it from {source}: {reason}"),
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
            0 => "tried just now; nothing is known of earlier moves".to_owned(),
            count => format!("learned from {count} earlier move(s)"),
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

/// What to choose.
fn advice(dry_run: &DryRun) -> String {
    let (pre, post) = (&dry_run.pre_copy, &dry_run.post_copy);
    let post_gains = post.total_micros.likely * 2 < pre.total_micros.likely;
    match pre.speed_percent {
        100 => "pre-copy does it: its writes are slower than the link".into(),
        percent => format!(
            "it writes faster than the link carries: pre-copy slows it down to {percent} % for a while; --downtime MS allows it to stand still for longer instead{}",
            if post_gains {
                ", --post-copy lets it run there at once (its source must then live until all is there)"
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
        assert!(easy.contains("b would take it from a"), "{easy}");
        assert!(
            easy.contains("* pre-copy: 9000 ms (4500 to 18000)"),
            "{easy}"
        );
        assert!(easy.contains("downtime 4.0 ms (2.0 to 8.0)"), "{easy}");
        assert!(easy.contains("pre-copy does it"), "{easy}");
        let hard = words(&of(25, Some("no room")), true);
        assert!(hard.contains("would not take it from a: no room"), "{hard}");
        assert!(hard.contains("* post-copy"), "{hard}");
        assert!(hard.contains("slows it down to 25 %"), "{hard}");
        assert!(hard.contains("--post-copy lets it run there"), "{hard}");
    }
}
