//! Debian's PostgreSQL on a file system of a test: its own data directory and socket, no network, no service.
//!
//! Invariant: a server is stopped, at the latest by SIGKILL to its postmaster, when its [`Postgres`] is dropped.

use crate::machine::{Background, Cmd, alive, signal, until};
use anyhow::{Context, Result, ensure};
use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

const LIMIT: Duration = Duration::from_mins(3);

/// A running server.
#[derive(Debug)]
pub struct Postgres {
    bin: PathBuf,
    data: PathBuf,
    socket: PathBuf,
    server: Background,
}

/// A process and its children.
fn family_of(parent: u32) -> Vec<u32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_string_lossy().parse::<u32>().ok());
    // After the closing bracket of the name: state, parent.
    let is_child = |pid: &u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let fields = stat
            .rsplit_once(") ")
            .map(|(_, rest)| rest.to_owned())
            .unwrap_or_default();
        fields.split(' ').nth(1) == Some(&parent.to_string())
    };
    pids.filter(|pid| *pid == parent || is_child(pid)).collect()
}

/// The newest server that Debian has installed.
fn bin_dir() -> Result<PathBuf> {
    let mut versions: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql")
        .context("is the package postgresql installed?")?
        .flatten()
        .map(|e| e.path())
        .collect();
    versions.sort();
    Ok(versions
        .pop()
        .context("no version of PostgreSQL below /usr/lib/postgresql")?
        .join("bin"))
}

/// The server refuses to run as root.
fn as_postgres(program: &Path) -> Cmd {
    Cmd::new("setpriv")
        .args(["--reuid=postgres", "--regid=postgres", "--clear-groups", "--"])
        .arg(program)
        .limit(LIMIT)
}

impl Postgres {
    /// Makes a database cluster with page checksums in a mounted file system, and starts it.
    pub fn create(mount: &Path, scratch: &Path) -> Result<Self> {
        let data = mount.join("pg");
        std::fs::create_dir(&data)?;
        Cmd::new("chown").arg("postgres:postgres").arg(&data).run()?;
        as_postgres(&bin_dir()?.join("initdb"))
            .args([
                "--data-checksums",
                "--auth=trust",
                "--username=postgres",
                "--no-locale",
                "--encoding=UTF8",
                "-D",
            ])
            .arg(&data)
            .run()?;
        Self::start(mount, scratch)
    }

    /// Starts the server on an existing data directory; after a crash this includes its recovery.
    pub fn start(mount: &Path, scratch: &Path) -> Result<Self> {
        let (bin, data, socket) = (bin_dir()?, mount.join("pg"), scratch.join("socket"));
        std::fs::create_dir_all(&socket)?;
        Cmd::new("chown").arg("postgres:postgres").arg(&socket).run()?;
        // The directories above belong to root and are closed to others, up to the one for everybody.
        for dir in scratch.ancestors() {
            let mode = dir.metadata()?.permissions().mode();
            if mode & 0o1000 != 0 || dir == Path::new("/") {
                break;
            }
            Cmd::new("chmod").arg("a+x").arg(dir).run()?;
        }
        let log = data.join("server.log");
        let out = File::options().create(true).append(true).open(&log)?;
        // A child of ours, not of pg_ctl: so it can be waited for, also when it was killed.
        let server = as_postgres(&bin.join("postgres"))
            .args(["-c", "listen_addresses=", "-c", "max_wal_size=256MB", "-c"])
            .arg(format!("unix_socket_directories={}", socket.display()))
            .arg("-D")
            .arg(&data)
            .spawn(out.try_clone()?, out)?;
        let mut new = Self {
            bin,
            data,
            socket,
            server,
        };
        until("the database answers", LIMIT, || {
            ensure!(
                new.server.running()?,
                "the server ended: {}",
                std::fs::read_to_string(&log).unwrap_or_default()
            );
            new.sql("SELECT 1").map(|_| true)
        })?;
        Ok(new)
    }

    /// Clean stop: sessions are ended, a checkpoint is written.
    pub fn stop(mut self) -> Result<()> {
        // SIGINT is the fast mode: sessions are ended.
        self.server.signal("INT")?;
        let status = self.server.wait(LIMIT)?;
        ensure!(status.success(), "the server ended with {status}");
        // Only a stopped cluster can be checked: every page of every file.
        as_postgres(&self.bin.join("pg_checksums"))
            .args(["--check", "-D"])
            .arg(&self.data)
            .run()
            .map(drop)
    }

    fn connection(&self) -> [String; 2] {
        [
            format!("--host={}", self.socket.display()),
            "--username=postgres".to_owned(),
        ]
    }

    /// One SQL statement; returns its unaligned output.
    pub fn sql(&self, statement: &str) -> Result<String> {
        let said = as_postgres(&self.bin.join("psql"))
            .args(self.connection())
            .args([
                "--no-psqlrc",
                "--tuples-only",
                "--no-align",
                "--set=ON_ERROR_STOP=1",
                "-c",
                statement,
                "postgres",
            ])
            .run()?;
        Ok(said.trim().to_owned())
    }

    /// pgbench's tables.
    pub fn bench_prepare(&self, scale: u32) -> Result<()> {
        self.bench()
            .args(["--initialize", "--quiet", &format!("--scale={scale}"), "postgres"])
            .run()
            .map(drop)
    }

    fn bench(&self) -> Cmd {
        as_postgres(&self.bin.join("pgbench")).args(self.connection())
    }

    /// Runs exactly this many transactions and returns when all are committed.
    pub fn bench_exactly(&self, transactions: u32) -> Result<()> {
        self.bench()
            .args([
                "--no-vacuum",
                "--client=4",
                &format!("--transactions={}", transactions / 4),
                "postgres",
            ])
            .run()
            .map(drop)
    }

    /// Runs transactions until the server stops.
    pub fn bench_until_stopped(&self) -> Result<Background> {
        let null = File::options().write(true).open("/dev/null")?;
        self.bench()
            .args(["--no-vacuum", "--client=4", "--time=600", "postgres"])
            .spawn(null.try_clone()?, null)
    }

    /// Committed pgbench transactions.
    pub fn history(&self) -> Result<u64> {
        Ok(self.sql("SELECT count(*) FROM pgbench_history")?.parse()?)
    }

    /// amcheck over every table and B-tree of the database, heap against index; and pgbench's own invariant.
    pub fn check(&self) -> Result<()> {
        self.sql("CREATE EXTENSION IF NOT EXISTS amcheck")?;
        as_postgres(&self.bin.join("pg_amcheck"))
            .args(self.connection())
            .args(["--heapallindexed", "postgres"])
            .run()?;
        let sums = self.sql(
            "SELECT (SELECT sum(abalance) FROM pgbench_accounts) || ' ' || (SELECT sum(tbalance) FROM pgbench_tellers) || ' ' ||
             (SELECT sum(bbalance) FROM pgbench_branches) || ' ' || (SELECT coalesce(sum(delta), 0) FROM pgbench_history)",
        )?;
        let mut sums = sums.split(' ');
        let first = sums.next().context("sums")?;
        ensure!(
            sums.all(|sum| sum == first),
            "every transaction changes all four tables or none"
        );
        Ok(())
    }

    /// The machine is gone: ends every process of the server, whose files no longer answer.
    pub fn die(mut self) {
        self.kill();
    }

    fn kill(&mut self) {
        let family = family_of(self.server.pid());
        for pid in &family {
            let _ = signal(*pid, "KILL");
        }
        let _ = self.server.wait(Duration::from_secs(20));
        let _ = until("the server is gone", Duration::from_secs(20), || {
            Ok(!family.iter().any(|pid| alive(*pid)))
        });
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if self.server.running().unwrap_or(false) {
            self.kill();
        }
    }
}
