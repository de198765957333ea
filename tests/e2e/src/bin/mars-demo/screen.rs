//! What the demo shows: a story that scrolls, and below it – on a terminal – a live table of the replicas.
//!
//! Invariant: without a terminal only whole plain lines are written, no control sequences.

use mars_crds::{ActualRole, MarsReplicaStatus, ReplicaData};
use mars_e2e::machine::POLL;
use mars_e2e::node::live_in;
use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const REFRESH: Duration = Duration::from_millis(250);
const BAR_CELLS: usize = 24;
const MIB: f64 = 1_048_576.0;
/// Below this a replica counts as caught up: no bar.
const LAG_WORTH_A_BAR_BYTES: i64 = 1 << 20;

/// Where the screen looks for replicas.
#[derive(Debug, Clone)]
pub(crate) struct Watched {
    /// `<state>/nodes`.
    pub(crate) nodes_dir: PathBuf,
    /// Node names.
    pub(crate) nodes: Vec<String>,
    /// The resource.
    pub(crate) resource: String,
}

/// One node as last seen, with what rates and bars need.
#[derive(Debug, Default)]
struct Row {
    status: Option<MarsReplicaStatus>,
    /// Durable end and when it was read, for the rate.
    before: Option<(i64, Instant)>,
    bytes_per_s: f64,
    /// Applied position at which the present lag began.
    catch_up_from: Option<i64>,
}

#[derive(Debug, Default)]
struct Inner {
    watched: Option<Watched>,
    rows: BTreeMap<String, Row>,
    /// Lines of the live table on the terminal now.
    drawn: usize,
}

/// The screen; clones write to the same one.
#[derive(Debug, Clone)]
pub(crate) struct Screen {
    inner: Arc<Mutex<Inner>>,
    live: bool,
    colour: bool,
    begin: Instant,
}

impl Screen {
    pub(crate) fn new() -> Self {
        let terminal = std::io::stdout().is_terminal();
        Self {
            inner: Arc::new(Mutex::new(Inner::default())),
            live: terminal && std::env::var_os("TERM").is_some_and(|term| term != "dumb"),
            colour: terminal && std::env::var_os("NO_COLOR").is_none(),
            begin: Instant::now(),
        }
    }

    /// Begins the live table.
    pub(crate) fn watch(&self, watched: Watched) {
        self.lock().watched = Some(watched);
    }

    /// Ends the live table; the last one stays on the screen.
    pub(crate) fn unwatch(&self) {
        let mut inner = self.lock();
        inner.watched = None;
        inner.drawn = 0;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    /// A chapter of the story.
    pub(crate) fn chapter(&self, number: usize, of: usize, title: &str) {
        let seconds = self.begin.elapsed().as_secs();
        self.line(&format!(
            "\n{}",
            self.paint("1", &format!("[{number}/{of}] {title}  ({seconds} s)"))
        ));
    }

    /// A command as a user would type it.
    pub(crate) fn command(&self, command: &str) {
        self.line(&self.paint("36", &format!("  $ {command}")));
    }

    /// Something that was found true.
    pub(crate) fn good(&self, text: &str) {
        self.line(&format!("  {} {text}", self.paint("32", "ok")));
    }

    /// Something worth knowing.
    pub(crate) fn note(&self, text: &str) {
        self.line(&format!("     {text}"));
    }

    /// Something that went wrong.
    pub(crate) fn bad(&self, text: &str) {
        self.line(&self.paint("31", text));
    }

    fn line(&self, text: &str) {
        let mut inner = self.lock();
        let mut out = self.erase(&mut inner);
        out.push_str(text);
        out.push('\n');
        self.draw(&mut inner, &mut out);
        write_out(&out);
    }

    /// The table as it is now, as part of the story (on a terminal the live one is enough).
    pub(crate) fn table(&self) {
        self.look();
        if !self.live {
            let inner = self.lock();
            let table: Vec<String> = self.render(&inner).iter().map(|line| format!("  {line}")).collect();
            write_out(&(table.join("\n") + "\n"));
        }
    }

    fn erase(&self, inner: &mut Inner) -> String {
        let drawn = std::mem::take(&mut inner.drawn);
        if self.live && drawn > 0 {
            format!("\x1b[{drawn}F\x1b[J")
        } else {
            String::new()
        }
    }

    fn draw(&self, inner: &mut Inner, out: &mut String) {
        if self.live && inner.watched.is_some() {
            let lines = self.render(inner);
            inner.drawn = lines.len() + 1;
            out.push('\n');
            for line in lines {
                out.push_str(&line);
                out.push('\n');
            }
        }
    }

    /// Asks all agents and brings the rows up to date.
    fn look(&self) {
        let Some(watched) = self.lock().watched.clone() else {
            return;
        };
        let now = Instant::now();
        for node in &watched.nodes {
            let status = live_in(&watched.nodes_dir.join(node), &watched.resource).ok();
            self.lock().rows.entry(node.clone()).or_default().update(status, now);
        }
        let mut inner = self.lock();
        let primary_end = inner.primary_end();
        for row in inner.rows.values_mut() {
            row.follow(primary_end);
        }
    }

    /// A thread that keeps the live table live.
    pub(crate) fn ticker(&self) -> Ticker {
        let (screen, stop) = (self.clone(), Arc::new(AtomicBool::new(false)));
        let seen = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut last = Instant::now();
            while !seen.load(Ordering::SeqCst) {
                if last.elapsed() >= REFRESH {
                    last = Instant::now();
                    screen.look();
                    if screen.live {
                        let mut inner = screen.lock();
                        let mut out = screen.erase(&mut inner);
                        screen.draw(&mut inner, &mut out);
                        write_out(&out);
                    }
                }
                std::thread::sleep(POLL);
            }
        });
        Ticker {
            stop,
            thread: Some(thread),
        }
    }

    fn render(&self, inner: &Inner) -> Vec<String> {
        let head = format!(
            "{:<6}{:<11}{:<12}{:<16}{:>13}{:>13}{:>12}{:>12}  {}",
            "NODE", "ROLE", "DATA", "STATE", "LOG END", "ON DISK", "LAG", "LOG/s", "PROGRESS"
        );
        let mut lines = vec![self.paint("1", head.trim_end())];
        let primary_end = inner.primary_end();
        for (node, row) in &inner.rows {
            lines.push(self.render_row(node, row, primary_end));
        }
        lines
    }

    fn render_row(&self, node: &str, row: &Row, primary_end: Option<i64>) -> String {
        let Some(status) = &row.status else {
            return self.paint("31", &format!("{node:<6}{:<11}", "down"));
        };
        let role = status.role.map_or("-".to_owned(), |role| format!("{role:?}"));
        let data = status.data_state.map_or("-".to_owned(), |data| format!("{data:?}"));
        let (end, applied) = status
            .positions
            .as_ref()
            .map_or((0, 0), |at| (at.durable.lsn, at.applied));
        let lag = match (status.role, primary_end) {
            (Some(ActualRole::Primary), _) | (_, None) => "-".to_owned(),
            (_, Some(wanted)) => mib((wanted - applied).max(0)),
        };
        let rate = if row.bytes_per_s < MIB / 10.0 {
            "-".to_owned()
        } else {
            format!("{:.1} MiB", row.bytes_per_s / MIB)
        };
        let line = format!(
            "{node:<6}{role:<11}{data:<12}{:<16}{:>13}{:>13}{lag:>12}{rate:>12}  {}",
            status.state,
            mib(end),
            mib(applied),
            row.progress(primary_end)
        );
        let code = match (status.role, status.data_state) {
            _ if !status.forks.is_empty() => "31",
            (Some(ActualRole::Primary), _) => "32",
            (_, Some(ReplicaData::Consistent)) => "0",
            _ => "33",
        };
        self.paint(code, line.trim_end())
    }
}

impl Inner {
    fn primary_end(&self) -> Option<i64> {
        self.rows
            .values()
            .filter_map(|row| row.status.as_ref())
            .filter(|status| status.role == Some(ActualRole::Primary))
            .filter_map(|status| status.positions.as_ref().map(|at| at.durable.lsn))
            .max()
    }
}

impl Row {
    fn update(&mut self, status: Option<MarsReplicaStatus>, now: Instant) {
        let end = status
            .as_ref()
            .and_then(|status| status.positions.as_ref())
            .map(|at| at.durable.lsn);
        if let (Some((old, at)), Some(new)) = (self.before, end) {
            let seconds = (now - at).as_secs_f64().max(0.05);
            #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
            let present = (new - old).max(0) as f64 / seconds;
            self.bytes_per_s = self.bytes_per_s * 0.6 + present * 0.4;
        }
        self.before = end.map(|end| (end, now));
        self.status = status;
    }

    /// Remembers where the present lag began, so that a bar shows progress since then.
    fn follow(&mut self, primary_end: Option<i64>) {
        let applied = self
            .status
            .as_ref()
            .and_then(|status| status.positions.as_ref())
            .map(|at| at.applied);
        self.catch_up_from = match (applied, primary_end) {
            (Some(applied), Some(end)) if end - applied >= LAG_WORTH_A_BAR_BYTES => {
                Some(self.catch_up_from.unwrap_or(applied).min(applied))
            }
            _ => None,
        };
    }

    fn progress(&self, primary_end: Option<i64>) -> String {
        let Some(status) = &self.status else {
            return String::new();
        };
        if let Some(sync) = &status.sync
            && status.data_state != Some(ReplicaData::Consistent)
        {
            return format!("sync     {}", bar(sync.done_bytes, sync.total_bytes));
        }
        let applied = status.positions.as_ref().map(|at| at.applied);
        match (status.role, self.catch_up_from, applied, primary_end) {
            (Some(ActualRole::Secondary), Some(from), Some(applied), Some(end)) => {
                format!("catch-up {}", bar(applied - from, end - from))
            }
            _ => String::new(),
        }
    }
}

fn bar(done: i64, total: i64) -> String {
    let percent = usize::try_from(done.max(0).saturating_mul(100) / total.max(1))
        .unwrap_or(0)
        .min(100);
    let full = percent * BAR_CELLS / 100;
    format!("{}{} {percent:>3} %", "█".repeat(full), "░".repeat(BAR_CELLS - full))
}

#[expect(clippy::cast_precision_loss, reason = "sizes for people")]
pub(crate) fn mib(bytes: i64) -> String {
    if bytes < 1 << 20 {
        format!("{:.1} KiB", bytes as f64 / 1024.0)
    } else {
        format!("{:.1} MiB", bytes as f64 / MIB)
    }
}

fn write_out(text: &str) {
    let mut out = std::io::stdout().lock();
    // Nobody reads any more ("| head"): the demo still runs to its end and cleans up.
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// Ends the live table's thread when dropped.
#[derive(Debug)]
pub(crate) struct Ticker {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{bar, mib};

    #[test]
    fn bars_never_leave_their_cells() {
        for (done, total, shown) in [
            (0, 100, "  0 %"),
            (50, 100, " 50 %"),
            (100, 100, "100 %"),
            (7, 0, "100 %"),
            (-5, 10, "  0 %"),
        ] {
            let text = bar(done, total);
            assert!(text.ends_with(shown), "{text}");
            assert_eq!(
                text.chars().filter(|cell| "█░".contains(*cell)).count(),
                super::BAR_CELLS
            );
        }
    }

    #[test]
    fn sizes_are_for_people() {
        assert_eq!(mib(512), "0.5 KiB");
        assert_eq!(mib(3 << 20), "3.0 MiB");
    }
}
