//! The demo on a terminal: the present nodes, machines and moves.

use super::{Scene, SharedScene, with_scene};
use anyhow::Result;
use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode};
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Color, Style, Stylize};
use ratatui::text::Line;
use ratatui::widgets::{Block, Row, Table};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::Notify;

/// Interval of redrawing the screen.
const FRAME: Duration = Duration::from_millis(100);

/// The terminal of the demo; restored on drop.
pub(super) struct Screen {
    stop: Arc<AtomicBool>,
    quit: Arc<Notify>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Screen {
    pub(super) fn start(scene: SharedScene) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let quit = Arc::new(Notify::new());
        let mut terminal = ratatui::try_init()?;
        let (stopping, quitting) = (stop.clone(), quit.clone());
        let thread = std::thread::Builder::new()
            .name("screen".into())
            .spawn(move || {
                while !stopping.load(Ordering::Relaxed) {
                    let now = with_scene(&scene, |scene| scene.clone());
                    if terminal.draw(|frame| draw(frame, &now)).is_err() {
                        return;
                    }
                    let pressed = event::poll(FRAME).unwrap_or(false);
                    if pressed
                        && let Ok(Event::Key(key)) = event::read()
                        && matches!(key.code, KeyCode::Char('q') | KeyCode::Esc)
                    {
                        quitting.notify_one();
                    }
                }
            })?;
        Ok(Screen {
            stop,
            quit,
            thread: Some(thread),
        })
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // After a panic in it, only the terminal remains to be restored.
            let _ = thread.join();
        }
        ratatui::restore();
    }
}

/// Returns when the user wants to quit; never without a screen.
pub(super) async fn quit(screen: Option<&Screen>) {
    match screen {
        Some(screen) => screen.quit.notified().await,
        None => std::future::pending().await,
    }
}

fn draw(frame: &mut Frame<'_>, scene: &Scene) {
    let [top, nodes, machines, moves] = Layout::vertical([
        Constraint::Length(2),
        Constraint::Length(scene.nodes.len().max(3) as u16 + 3),
        Constraint::Length(scene.machines.len().max(4) as u16 + 3),
        Constraint::Min(4),
    ])
    .areas(frame.area());
    frame.render_widget(
        Line::from(vec![
            " Evenkeel  ".bold(),
            scene.headline.clone().into(),
            "   (q quits)".dim(),
        ]),
        top,
    );
    let rows = scene.nodes.iter().map(|node| {
        let color = if node.alive { Color::Green } else { Color::Red };
        Row::new([
            node.name.clone(),
            if node.alive { "alive" } else { "away" }.to_owned(),
            if node.voter { "store" } else { "" }.to_owned(),
            node.machines.to_string(),
            node.address.clone(),
        ])
        .style(Style::new().fg(color))
    });
    let widths = [8, 8, 8, 10, 24].map(Constraint::Length);
    frame.render_widget(
        Table::new(rows, widths)
            .header(Row::new(["node", "state", "", "machines", "address"]).dim())
            .block(Block::bordered().title(" nodes ")),
        nodes,
    );
    let rows = scene.machines.iter().map(|machine| {
        let line = scene
            .last_lines
            .iter()
            .find(|(name, _)| *name == machine.name);
        Row::new([
            machine.name.clone(),
            machine.node.clone(),
            machine.status_line(),
            machine.epoch.clone(),
            line.map_or_else(String::new, |(_, line)| line.clone()),
        ])
    });
    let widths = [12, 6, 12, 8].map(Constraint::Length);
    let widths = widths.into_iter().chain([Constraint::Min(10)]);
    frame.render_widget(
        Table::new(rows, widths)
            .header(Row::new(["machine", "node", "status", "epoch", "last line"]).dim())
            .block(Block::bordered().title(" machines ")),
        machines,
    );
    let rows = scene.moves.iter().rev().map(|report| {
        Row::new([
            report.machine.to_string(),
            format!("{} → {}", report.source, report.target),
            format!("{:.1} MB", report.bytes as f64 / 1e6),
            format!("{:.0} ms", report.total_micros as f64 / 1e3),
            format!("downtime {:.2} ms", report.downtime_micros as f64 / 1e3),
        ])
    });
    let widths = [12, 10, 12, 10, 28].map(Constraint::Length);
    frame.render_widget(
        Table::new(rows, widths).block(Block::bordered().title(" moves, newest first ")),
        moves,
    );
}
