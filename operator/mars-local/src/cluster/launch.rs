//! Starting a process that outlives its starter: session, control group, then exec.
//!
//! The child is this same program with the hidden command `launch`; it makes itself a session leader, joins the control
//! groups and becomes the program, all without leaving its pid.
//! Invariant: the program runs in its control group from its first instruction on.

use super::process::Process;
use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// What to start.
pub(super) struct Launch<'a> {
    pub(super) program: &'a Path,
    pub(super) arguments: &'a [String],
    pub(super) log: &'a Path,
    /// `cgroup.procs` of the group to join.
    pub(super) group: Option<&'a Path>,
}

/// This program's own file, also after it was replaced by a newer build.
pub(super) fn own_program() -> io::Result<PathBuf> {
    let path = std::env::current_exe()?;
    let text = path.to_string_lossy();
    Ok(PathBuf::from(text.strip_suffix(" (deleted)").unwrap_or(&text)))
}

impl Launch<'_> {
    /// Starts it. The process is not ours to wait for: a thread reaps it if it ends while we live.
    pub(super) fn start(&self) -> io::Result<Process> {
        let log = File::options().create(true).append(true).open(self.log)?;
        let mut command = Command::new(own_program()?);
        command.arg("launch");
        if let Some(group) = self.group {
            command.arg("--cgroup-procs").arg(group);
        }
        command.arg("--").arg(self.program).args(self.arguments);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let mut child = command.spawn()?;
        let observed = Process::observe(child.id());
        if let Some(status) = wait_for_exec(&mut child)? {
            return Err(io::Error::other(format!(
                "it ended at once ({status}); see {}",
                self.log.display()
            )));
        }
        let reap = std::thread::Builder::new().name("mars-local-reap".into());
        reap.spawn(move || {
            let _ = child.wait();
        })?;
        observed.ok_or_else(|| io::Error::other(format!("it ended at once; see {}", self.log.display())))
    }
}

/// Waits until the child has become the program (at most 10 s); returns how it ended if it did before.
fn wait_for_exec(child: &mut Child) -> io::Result<Option<ExitStatus>> {
    let own = own_program()?;
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        // For a moment during exec there is no link.
        let now = std::fs::read_link(format!("/proc/{}/exe", child.id())).unwrap_or_else(|_| own.clone());
        if now != own {
            break;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(None)
}

/// The hidden command: does not return if it succeeds, else with what went wrong.
#[must_use]
pub fn launch(group: Option<&Path>, program: &Path, arguments: &[String]) -> io::Error {
    // Away from the terminal, whose Ctrl-C is for the starter.
    if let Err(error) = rustix::process::setsid() {
        return io::Error::new(io::Error::from(error).kind(), format!("making a session: {error}"));
    }
    if let Some(group) = group
        && let Err(error) = std::fs::write(group, "0")
    {
        return io::Error::new(
            error.kind(),
            format!("joining the control group {}: {error}", group.display()),
        );
    }
    Command::new(program).args(arguments).exec()
}
