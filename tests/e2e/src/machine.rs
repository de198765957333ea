//! Commands of this machine, each with a limit: nothing in a test waits for ever.
//!
//! Invariant: a command that [`Cmd::run`] returns from has ended, or was killed and is named in the error. Children get a
//! process group of their own, so that Ctrl-C at a terminal reaches only the program that cleans up.

use anyhow::{Context, Result, bail, ensure};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Longest that an ordinary command may take.
pub const COMMAND_LIMIT: Duration = Duration::from_mins(2);
/// How often waiting loops look.
pub const POLL: Duration = Duration::from_millis(50);

static INTERRUPTED: AtomicBool = AtomicBool::new(false);
static SHIELDED: AtomicBool = AtomicBool::new(false);

/// From now on every wait of this crate ends with an error, so that guards run and clean up.
pub fn interrupt() {
    INTERRUPTED.store(true, Ordering::SeqCst);
}

/// Whether somebody asked to end.
#[must_use]
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst) && !SHIELDED.load(Ordering::SeqCst)
}

/// Clean-up must run to its end, also after an interrupt.
pub fn shield_clean_up() {
    SHIELDED.store(true, Ordering::SeqCst);
}

/// One command with its arguments, environment, input and limit.
#[derive(Debug)]
pub struct Cmd {
    program: OsString,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    input: Option<Vec<u8>>,
    limit: Duration,
}

/// What a command that ended said.
#[derive(Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Standard output, as text.
    pub stdout: String,
    /// Standard error, as text.
    pub stderr: String,
}

impl Cmd {
    /// A command found through `PATH`, or by its path.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self {
            program: program.as_ref().to_owned(),
            args: Vec::new(),
            env: Vec::new(),
            input: None,
            limit: COMMAND_LIMIT,
        }
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<T: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = T>) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env.push((key.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// What it reads from standard input (nothing by default).
    #[must_use]
    pub fn input(mut self, input: impl Into<Vec<u8>>) -> Self {
        self.input = Some(input.into());
        self
    }

    /// Kills it after this time.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(&self.args)
            .envs(self.env.iter().map(|(key, value)| (key, value)))
            .process_group(0);
        command
    }

    /// Starts it in the background with output to files; the caller keeps it in a [`Background`].
    pub fn spawn(self, stdout: File, stderr: File) -> Result<Background> {
        let child = self
            .command()
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(stderr)
            .spawn()
            .with_context(|| format!("cannot start {}", self.line()))?;
        Ok(Background {
            line: self.line(),
            child,
        })
    }

    /// Runs it to its end, whatever the exit code.
    pub fn output(self) -> Result<Output> {
        let (mut stdout, mut stderr) = (tempfile::tempfile()?, tempfile::tempfile()?);
        let stdin = match &self.input {
            Some(input) => {
                let mut file = tempfile::tempfile()?;
                file.write_all(input)?;
                file.rewind()?;
                Stdio::from(file)
            }
            None => Stdio::null(),
        };
        let mut child = self
            .command()
            .stdin(stdin)
            .stdout(stdout.try_clone()?)
            .stderr(stderr.try_clone()?)
            .spawn()
            .with_context(|| format!("cannot start {}: is it installed?", self.line()))?;
        let status = wait_limited(&mut child, self.limit).with_context(|| self.line())?;
        let read = |file: &mut File| -> Result<String> {
            file.rewind()?;
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        Ok(Output {
            status,
            stdout: read(&mut stdout)?,
            stderr: read(&mut stderr)?,
        })
    }

    /// Runs it to its end and returns standard output; an exit code other than 0 is an error with what it said.
    pub fn run(self) -> Result<String> {
        let line = self.line();
        let output = self.output()?;
        ensure!(
            output.status.success(),
            "{line}: {}\n{}{}",
            output.status,
            output.stdout,
            output.stderr
        );
        Ok(output.stdout)
    }

    fn line(&self) -> String {
        let mut line = self.program.to_string_lossy().into_owned();
        for arg in &self.args {
            line.push(' ');
            line.push_str(&arg.to_string_lossy());
        }
        line
    }
}

/// Runs a program with arguments and the usual limit.
pub fn run(program: &str, args: &[&str]) -> Result<String> {
    Cmd::new(program).args(args).run()
}

/// Whether this is the emulated machine of the VM tier.
#[must_use]
pub fn in_vm() -> bool {
    std::env::var_os("MARS_IN_VM").is_some()
}

/// A directory on a disk. In the VM all others are RAM, which counts as memory of whoever writes it.
#[must_use]
pub fn on_disk() -> PathBuf {
    std::env::var_os("MARS_TEST_DISK").map_or_else(std::env::temp_dir, PathBuf::from)
}

/// An emulated machine is slow: all limits are longer there.
fn patient(limit: Duration) -> Duration {
    if in_vm() { limit * 6 } else { limit }
}

fn wait_limited(child: &mut Child, limit: Duration) -> Result<ExitStatus> {
    let (begin, limit) = (Instant::now(), patient(limit));
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if begin.elapsed() > limit || interrupted() {
            let _ = child.kill();
            // A process stuck in the kernel cannot be reaped; it must not hold up the report.
            for _ in 0..40 {
                if child.try_wait()?.is_some() {
                    break;
                }
                std::thread::sleep(POLL);
            }
            if interrupted() {
                bail!("interrupted");
            }
            bail!("not done after {limit:?}, killed");
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

/// A process that runs beside the test; killed when dropped.
#[derive(Debug)]
pub struct Background {
    line: String,
    child: Child,
}

impl Background {
    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it still runs.
    pub fn running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Sends a signal by name: `TERM`, `STOP`, `CONT`.
    pub fn signal(&self, name: &str) -> Result<()> {
        signal(self.pid(), name)
    }

    /// Waits for its end.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        wait_limited(&mut self.child, limit).with_context(|| self.line.clone())
    }

    /// Asks it to end (`TERM`) and waits.
    pub fn terminate(&mut self, limit: Duration) -> Result<()> {
        if self.running()? {
            self.signal("TERM")?;
            self.wait(limit)?;
        }
        Ok(())
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if self.running().unwrap_or(false) {
            let _ = self.child.kill();
            let _ = wait_limited(&mut self.child, Duration::from_secs(5));
        }
    }
}

/// Sends a signal by name to one process.
pub fn signal(pid: u32, name: &str) -> Result<()> {
    Cmd::new("kill").args(["-s", name, &pid.to_string()]).run().map(drop)
}

/// Whether a process (not a zombie) has this id.
#[must_use]
pub fn alive(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .ok()
        .and_then(|stat| stat.rsplit_once(") ").map(|(_, rest)| !rest.starts_with(['Z', 'X'])))
        .unwrap_or(false)
}

/// Polls until `condition` is true; an error of the condition counts as "not yet" and is shown when time is up.
pub fn until(what: &str, limit: Duration, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let (begin, limit) = (Instant::now(), patient(limit));
    loop {
        let outcome = condition();
        if matches!(outcome, Ok(true)) {
            return Ok(());
        }
        if interrupted() {
            bail!("interrupted while waiting: {what}");
        }
        if begin.elapsed() > limit {
            match outcome {
                Err(error) => return Err(error.context(format!("not after {limit:?}: {what}"))),
                Ok(_) => bail!("not after {limit:?}: {what}"),
            }
        }
        std::thread::sleep(POLL);
    }
}

/// The directory of the programs built with this crate: beside the running test or demo.
pub fn programs() -> Result<PathBuf> {
    let mut dir = std::env::current_exe()?;
    dir.pop();
    if dir.ends_with("deps") {
        dir.pop();
    }
    Ok(dir)
}

/// Path of one program of the workspace, or an error that says how to build it.
pub fn program(name: &str) -> Result<PathBuf> {
    let path = programs()?.join(name);
    ensure!(
        path.exists(),
        "{} is not built: cargo build --workspace --bins",
        path.display()
    );
    Ok(path)
}

/// The root of the workspace (where `examples/` lies).
#[must_use]
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// What device tests need: root, and a network namespace of their own (ports and packet filters are changed).
pub fn require_test_machine() -> Result<()> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "device tests make block devices: run them as root (make device)"
    );
    ensure!(
        run("ip", &["route", "show", "default"])?.is_empty(),
        "device tests change packet filters: run them in a network namespace of their own (make device, or unshare --net)"
    );
    run("ip", &["link", "set", "lo", "up"])?;
    Ok(())
}
