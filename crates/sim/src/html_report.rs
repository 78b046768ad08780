//! Loads over time as a self-contained HTML page: few nodes as lines, many as rows of a heat map;
//! moves are marked.

use crate::report::Report;
use std::fmt::Write;

/// Maximum number of nodes drawn as lines.
const LINES_MAX: usize = 16;
/// Maximum rows and columns of a heat map: beyond, several nodes or samples share one.
const ROWS_MAX: usize = 200;
const COLUMNS_MAX: usize = 480;
/// Maximum number of moves drawn.
const MOVES_MAX: usize = 2_000;
const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 56.0;
const BARS: f64 = 60.0;

/// A page with the load of each node over time.
pub fn page(title: &str, report: &Report) -> String {
    let mut out = String::new();
    let title = escape(title);
    let about = escape(&report.about);
    let _ = write!(
        out,
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>{title}</title><style>\
         body{{font:14px system-ui,sans-serif;margin:24px auto;max-width:1060px;color:#222}}\
         svg{{width:100%;height:auto}}text{{font-size:11px;fill:#555}}\
         table{{border-collapse:collapse}}td,th{{padding:2px 12px 2px 0;text-align:left}}\
         .no{{color:#b00}}</style><h1>{title}</h1><p>{about}</p>"
    );
    let total = report.series.nodes.len();
    let _ = write!(
        out,
        "<p>{total} nodes, {} machines, {} s; {} moves; unevenness {:.3} at first, {:.3} at the \
         end.</p>",
        report.start.machines,
        report.length_s,
        report.moves.len(),
        report.start.unevenness,
        report.end.unevenness
    );
    let _ = write!(
        out,
        "<svg viewBox=\"0 0 {:.0} {:.0}\" role=\"img\">",
        WIDTH + LEFT + 20.0,
        HEIGHT + BARS + 60.0
    );
    if total <= LINES_MAX {
        lines(&mut out, report);
    } else {
        heat_map(&mut out, report);
    }
    bars(&mut out, report);
    out.push_str("</svg>");
    expectations(&mut out, report);
    out.push_str("</html>\n");
    out
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            _ => out.push(c),
        }
    }
    out
}

fn x(report: &Report, at_s: f64) -> f64 {
    LEFT + WIDTH * at_s / report.length_s.max(1) as f64
}

fn load_max(report: &Report) -> f64 {
    let loads = report.series.samples.iter().flatten();
    let load_max = loads
        .copied()
        .filter(|it| it.is_finite())
        .fold(0.1, f32::max);
    f64::from(load_max)
}

/// Time of a sample, in seconds; the last interval may be shorter.
fn instant_s(report: &Report, look: usize) -> f64 {
    (look as u64 * report.series.every_s).min(report.length_s) as f64
}

fn lines(out: &mut String, report: &Report) {
    let top = load_max(report) * 1.05;
    let y = |load: f64| HEIGHT * (1.0 - load / top);
    for step in 0..=4 {
        let load = top * f64::from(step) / 4.0;
        let _ = write!(
            out,
            "<line x1=\"{LEFT}\" x2=\"{:.0}\" y1=\"{:.1}\" y2=\"{:.1}\" stroke=\"#ddd\"/>\
             <text x=\"4\" y=\"{:.1}\">{load:.2}</text>",
            LEFT + WIDTH,
            y(load),
            y(load),
            (y(load) + 4.0).max(10.0)
        );
    }
    let count = report.series.nodes.len();
    let stride = report.series.samples.len().div_ceil(2 * COLUMNS_MAX).max(1);
    for (node, name) in report.series.nodes.iter().enumerate() {
        let colour = format!("hsl({},65%,42%)", node * 360 / count.max(1));
        let mut path = String::new();
        let mut pen_down = false;
        for (look, loads) in report.series.samples.iter().enumerate().step_by(stride) {
            let load = f64::from(loads[node]);
            if load.is_nan() {
                pen_down = false;
                continue;
            }
            let command = if pen_down { 'L' } else { 'M' };
            let x = x(report, instant_s(report, look));
            let _ = write!(path, "{command}{x:.1} {:.1}", y(load));
            pen_down = true;
        }
        let name = escape(name);
        let _ = write!(
            out,
            "<path d=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\"><title>\
             {name}</title></path><text x=\"{:.0}\" y=\"{:.0}\" style=\"fill:{colour}\">{name}</text>",
            LEFT + 8.0 + 60.0 * (node % 16) as f64,
            HEIGHT + BARS + 50.0
        );
    }
    for it in report.moves.iter().take(MOVES_MAX) {
        let look = (it.at_s as u64 / report.series.every_s.max(1)) as usize;
        let look = look.min(report.series.samples.len().saturating_sub(1));
        let number = |name: &str| report.series.nodes.iter().position(|it| it == name);
        let (Some(source), Some(target)) = (number(&it.source), number(&it.target)) else {
            continue;
        };
        let Some(loads) = report.series.samples.get(look) else {
            continue;
        };
        let at = |node: usize| {
            let load = f64::from(loads[node]);
            y(if load.is_nan() { 0.0 } else { load })
        };
        let x = x(report, it.at_s);
        let _ = write!(
            out,
            "<g stroke=\"#333\" stroke-opacity=\".5\"><line x1=\"{x:.1}\" x2=\"{x:.1}\" \
             y1=\"{:.1}\" y2=\"{:.1}\"/><circle cx=\"{x:.1}\" cy=\"{:.1}\" r=\"2\" fill=\"#333\"/>\
             <title>{} from {} to {} at {} s</title></g>",
            at(source),
            at(target),
            at(target),
            escape(&it.machine),
            escape(&it.source),
            escape(&it.target),
            it.at_s
        );
    }
}

fn heat_map(out: &mut String, report: &Report) {
    let (nodes, looks) = (report.series.nodes.len(), report.series.samples.len());
    let (rows, columns) = (nodes.min(ROWS_MAX), looks.min(COLUMNS_MAX));
    // The shade saturates: otherwise one overloaded node would leave all others pale.
    let top = load_max(report).min(2.0);
    let (width, height) = (WIDTH / columns as f64, HEIGHT / rows as f64);
    for row in 0..rows {
        let of_row = row * nodes / rows..((row + 1) * nodes / rows).max(row * nodes / rows + 1);
        let mut column = 0;
        while column < columns {
            let shade = |column: usize| {
                let look = column * looks / columns;
                let loads = report.series.samples[look][of_row.clone()].iter();
                let loads: Vec<f64> = loads.map(|it| f64::from(*it)).collect();
                let alive: Vec<f64> = loads.into_iter().filter(|it| !it.is_nan()).collect();
                if alive.is_empty() {
                    return None;
                }
                let mean = alive.iter().sum::<f64>() / alive.len() as f64;
                Some((mean / top * 32.0).min(32.0) as u32)
            };
            // Adjacent samples of one shade are one rectangle.
            let this = shade(column);
            let mut end = column + 1;
            while end < columns && shade(end) == this {
                end += 1;
            }
            let colour = match this {
                Some(shade) => format!("hsl(212,60%,{}%)", 97 - shade * 75 / 32),
                None => "#e8c4c4".to_owned(),
            };
            let _ = write!(
                out,
                "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{colour}\"/>",
                LEFT + column as f64 * width,
                row as f64 * height,
                (end - column) as f64 * width + 0.3,
                height + 0.3
            );
            column = end;
        }
    }
    let first = report.series.nodes.first().map_or("", String::as_str);
    let last = report.series.nodes.last().map_or("", String::as_str);
    let _ = write!(
        out,
        "<text x=\"2\" y=\"12\">{}</text><text x=\"2\" y=\"{HEIGHT:.0}\">{}</text>\
         <text x=\"{LEFT}\" y=\"{:.0}\">each row {} node(s); white is idle, dark blue a load of \
         {top:.2} or more, red is dead</text>",
        escape(first),
        escape(last),
        HEIGHT + BARS + 50.0,
        nodes.div_ceil(rows)
    );
}

/// Moves in each part of time, below.
fn bars(out: &mut String, report: &Report) {
    const PARTS: usize = 160;
    let mut parts = [0u32; PARTS];
    for it in &report.moves {
        let part = (it.at_s / report.length_s.max(1) as f64 * PARTS as f64) as usize;
        parts[part.min(PARTS - 1)] += 1;
    }
    let most = parts.iter().copied().max().unwrap_or(0).max(1);
    let base = HEIGHT + BARS;
    for (part, count) in parts.iter().enumerate().filter(|(_, count)| **count > 0) {
        let height = (BARS - 16.0) * f64::from(*count) / f64::from(most);
        let _ = write!(
            out,
            "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{height:.1}\" fill=\"#c60\">\
             <title>{count} moves</title></rect>",
            LEFT + WIDTH * part as f64 / PARTS as f64,
            base - height,
            WIDTH / PARTS as f64 - 0.5
        );
    }
    let _ = write!(
        out,
        "<text x=\"2\" y=\"{:.0}\">moves</text><line x1=\"{LEFT}\" x2=\"{:.0}\" y1=\"{base}\" \
         y2=\"{base}\" stroke=\"#999\"/>",
        base - 4.0,
        LEFT + WIDTH
    );
    for step in 0..=6u64 {
        let at_s = report.length_s * step / 6;
        let _ = write!(
            out,
            "<text x=\"{:.0}\" y=\"{:.0}\">{at_s} s</text>",
            x(report, at_s as f64) - if step == 6 { 36.0 } else { 0.0 },
            base + 16.0
        );
    }
}

fn expectations(out: &mut String, report: &Report) {
    if report.expectations.is_empty() {
        return;
    }
    out.push_str("<table><tr><th>expectation</th><th>expected</th><th>found</th><th></th></tr>");
    for it in &report.expectations {
        let (class, word) = if it.met {
            ("", "met")
        } else {
            ("no", "not met")
        };
        let _ = write!(
            out,
            "<tr class=\"{class}\"><td>{}</td><td>{}</td><td>{}</td><td>{word}</td></tr>",
            escape(&it.expectation),
            escape(&it.expected),
            escape(&it.found)
        );
    }
    out.push_str("</table>");
}
