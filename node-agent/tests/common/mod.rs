//! What the tests on real devices share: a keeper and a served device as processes of their own, in a directory that goes
//! away. They need root, /dev/fuse and loop devices, and say so.
//!
//! Invariant: whatever a test does, its processes are ended and its devices are removed; only by what this test made.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// No single step of a test takes longer, also on a loaded machine.
pub(crate) const LIMIT: Duration = Duration::from_mins(2);

/// What stores the bytes of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Engine {
    /// A file, in place: what is wrong with it is wrong in the frontend.
    Plain,
    /// A replica with log, overlay and write-back.
    Replica,
}

impl Engine {
    pub(crate) const ALL: [Engine; 2] = [Engine::Plain, Engine::Replica];
}

/// A directory, a keeper in it, and the identity of the one device that is served.
pub(crate) struct Rig {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) replica: uuid::Uuid,
    keeper: Option<Child>,
    /// Mounts to remove, last first.
    mounts: Vec<PathBuf>,
    frontend: &'static str,
}

impl Rig {
    /// A rig with a keeper, for `loop`.
    pub(crate) fn new() -> Self {
        let mut rig = Self::empty("loop", &["/dev/fuse", "/dev/loop-control"]);
        rig.start_keeper();
        rig
    }

    /// A rig for `ublk`, which needs no keeper.
    pub(crate) fn for_ublk() -> Self {
        Self::empty("ublk", &["/dev/ublk-control"])
    }

    /// A rig for `loop` whose files are on a disk: those in memory would count as memory of the agent.
    pub(crate) fn on_disk() -> Self {
        let mut rig = Self::empty_in(Path::new("/var/tmp"), "loop", &["/dev/fuse", "/dev/loop-control"]);
        rig.start_keeper();
        rig
    }

    fn empty(frontend: &'static str, nodes: &[&str]) -> Self {
        let memory = Path::new("/dev/shm");
        Self::empty_in(
            if memory.is_dir() { memory } else { Path::new("/tmp") },
            frontend,
            nodes,
        )
    }

    fn empty_in(base: &Path, frontend: &'static str, nodes: &[&str]) -> Self {
        assert!(
            rustix::process::geteuid().is_root(),
            "this test makes block devices: run it as root"
        );
        for node in nodes {
            assert!(
                Path::new(node).exists(),
                "this test needs {node}: its kernel module is missing"
            );
        }
        let dir = tempfile::Builder::new()
            .prefix("mars-test-")
            .tempdir_in(base)
            .expect("a temporary directory");
        Self {
            dir,
            replica: uuid::Uuid::new_v4(),
            keeper: None,
            mounts: Vec::new(),
            frontend,
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn start_keeper(&mut self) {
        let socket = self.path("keeper/keeper.sock");
        // A socket that a dead keeper left would look like a living one.
        let _ = std::fs::remove_file(&socket);
        let keeper = Command::new(env!("CARGO_BIN_EXE_mars-device-keeper"))
            .args(["--dir".as_ref(), self.path("keeper").as_os_str()])
            .stderr(self.log("keeper.log"))
            .spawn();
        self.keeper = Some(keeper.expect("start the keeper"));
        wait_until("the keeper's socket", || socket.exists());
    }

    pub(crate) fn kill_keeper(&mut self) {
        end(&mut self.keeper.take().expect("a keeper runs"));
    }

    /// A file of zeros as storage of the plain engine.
    pub(crate) fn storage(&self, bytes: u64) -> PathBuf {
        let path = self.path("storage");
        let file = std::fs::File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .unwrap();
        file.set_len(bytes).unwrap();
        path
    }

    fn log(&self, name: &str) -> std::fs::File {
        std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.path(name))
            .unwrap()
    }

    pub(crate) fn log_text(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    /// The command that serves the device; a test may add arguments or run it elsewhere (a cgroup).
    pub(crate) fn server(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mars-serve-device"));
        command
            .args(["--frontend", self.frontend, "--replica", &self.replica.to_string()])
            .arg("--ublk-state-dir")
            .arg(self.path("ublk"))
            .arg("--link-dir")
            .arg(self.path("dev"))
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(self.log("server.log"));
        if self.frontend == "loop" {
            command.arg("--keeper").arg(self.path("keeper/keeper.sock"));
        }
        command
    }

    /// Serves the storage file, in place or as the data disk of a replica.
    pub(crate) fn serve(&self, engine: Engine, arguments: &[&str]) -> Served {
        Served::start(self.command(engine, arguments), self)
    }

    /// The command of [`Rig::serve`].
    pub(crate) fn command(&self, engine: Engine, arguments: &[&str]) -> Command {
        let mut command = self.server(arguments);
        match engine {
            Engine::Plain => command.arg("--defer").arg("--plain").arg(self.path("storage")),
            Engine::Replica => command
                .arg("--store")
                .arg(self.path("store"))
                .arg("--data")
                .arg(self.path("storage")),
        };
        command
    }

    /// Serves the storage file without a log.
    pub(crate) fn serve_plain(&self, arguments: &[&str]) -> Served {
        let mut command = self.server(arguments);
        command.arg("--plain").arg(self.path("storage"));
        Served::start(command, self)
    }

    /// Mounts a device; unmounted with the rig at the latest.
    pub(crate) fn mount(&mut self, device: &Path, options: &str) -> PathBuf {
        let at = self.path("mnt");
        std::fs::create_dir_all(&at).unwrap();
        run("mount", &["-o", options, text(device), text(&at)]);
        self.mounts.push(at.clone());
        at
    }

    pub(crate) fn umount(&mut self) {
        let at = self.mounts.pop().expect("something is mounted");
        // Whoever looks for users of devices – an agent of another test – holds a file for a moment.
        wait_until("umount", || attempt("umount", &[text(&at)]).0);
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "--- keeper ---\n{}\n--- server ---\n{}",
                self.log_text("keeper.log"),
                self.log_text("server.log")
            );
        }
        // First the last copy of the FUSE descriptor: a device without a server would hang the umount.
        if let Some(keeper) = &mut self.keeper {
            end(keeper);
        }
        for at in self.mounts.drain(..).rev() {
            let _ = Command::new("umount").arg("-l").arg(at).status();
        }
        for number in own_loops(self.replica) {
            let _ = Command::new("losetup")
                .args(["-d", &format!("/dev/loop{number}")])
                .status();
        }
    }
}

/// Gives a command the pipes and the log of [`Rig::command`].
pub(crate) fn piped(mut command: Command, rig: &Rig) -> Command {
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(rig.log("server.log"));
    command
}

/// Numbers of the loop devices over the volume file of a replica, from sysfs.
pub(crate) fn own_loops(replica: uuid::Uuid) -> Vec<u32> {
    let backing = |number: &u32| std::fs::read_to_string(format!("/sys/block/loop{number}/loop/backing_file"));
    let ours = |number: &u32| backing(number).is_ok_and(|file| file.contains(&replica.to_string()));
    (0..256).filter(ours).collect()
}

/// A process that serves a device.
pub(crate) struct Served {
    child: Child,
    stdin: ChildStdin,
    lines: Receiver<String>,
    pub(crate) link: PathBuf,
    pub(crate) node: PathBuf,
    pub(crate) numbers: String,
    pub(crate) diskseq: String,
}

impl Served {
    /// Starts it and waits until the device is ready.
    pub(crate) fn start(command: Command, rig: &Rig) -> Self {
        let mut served = Self::start_unready(command);
        let ready = served.line();
        let words: Vec<&str> = ready.split_whitespace().collect();
        let ["ready", link, node, numbers, diskseq] = words[..] else {
            panic!("not ready: {ready:?}\n{}", rig.log_text("server.log"));
        };
        (served.link, served.node) = (link.into(), node.into());
        (served.numbers, served.diskseq) = (numbers.to_owned(), diskseq.to_owned());
        served
    }

    /// Starts it without waiting.
    pub(crate) fn start_unready(mut command: Command) -> Self {
        let mut child = command.spawn().expect("start mars-serve-device");
        let stdin = child.stdin.take().expect("stdin is piped");
        let stdout = BufReader::new(child.stdout.take().expect("stdout is piped"));
        let (to, lines) = channel();
        std::thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|line| to.send(line)));
        let (link, node) = (PathBuf::new(), PathBuf::new());
        Self {
            child,
            stdin,
            lines,
            link,
            node,
            numbers: String::new(),
            diskseq: String::new(),
        }
    }

    /// The next line it says; its end is a line, too.
    pub(crate) fn line(&self) -> String {
        match self.lines.recv_timeout(LIMIT) {
            Ok(line) => line,
            Err(RecvTimeoutError::Disconnected) => "ended".to_owned(),
            Err(RecvTimeoutError::Timeout) => panic!("no answer from mars-serve-device within {LIMIT:?}"),
        }
    }

    /// Sends a command and returns the answer.
    pub(crate) fn ask(&mut self, command: &str) -> String {
        writeln!(self.stdin, "{command}").expect("mars-serve-device takes commands");
        self.line()
    }

    pub(crate) fn ok(&mut self, command: &str) -> String {
        let answer = self.ask(command);
        answer
            .strip_prefix("ok")
            .unwrap_or_else(|| panic!("{command}: {answer}"))
            .trim()
            .to_owned()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// kill -9, and waits until it is gone.
    pub(crate) fn kill(mut self) {
        end(&mut self.child);
    }

    /// An attribute of the device in sysfs.
    pub(crate) fn sysfs(&self, attribute: &str) -> String {
        let path = format!("/sys/dev/block/{}/{attribute}", self.numbers);
        std::fs::read_to_string(&path)
            .unwrap_or_else(|error| panic!("{path}: {error}"))
            .trim()
            .to_owned()
    }

    pub(crate) fn device(&self) -> &str {
        text(&self.node)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("paths of tests are text")
}

/// Runs a program to its end, within [`LIMIT`]; its output is returned. Anything but success fails the test.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let (success, output) = attempt(program, arguments);
    assert!(success, "{program} {arguments:?} failed:\n{output}");
    output
}

/// The same, whether it succeeds or not.
pub(crate) fn attempt(program: &str, arguments: &[&str]) -> (bool, String) {
    let seconds = LIMIT.as_secs().to_string();
    let output = Command::new("timeout")
        .args(["-k", "5", &seconds, program])
        .args(arguments)
        .output();
    let output = output.unwrap_or_else(|error| panic!("cannot run {program}: {error}"));
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

/// How often a test kills the agent: the hundred of A-19, fewer in the emulated machine unless a test asks for more.
pub(crate) fn kills() -> u32 {
    let otherwise = if std::env::var_os("MARS_IN_VM").is_some() {
        20
    } else {
        100
    };
    std::env::var("MARS_TEST_KILLS").map_or(otherwise, |text| text.parse().expect("MARS_TEST_KILLS is a number"))
}

/// fio writes the device again and again and verifies what it wrote, until it is told to end.
fn verifying_writer(device: &str, size: &str) -> Child {
    let (filename, size) = (format!("--filename={device}"), format!("--size={size}"));
    let job = [
        "--name=v",
        "--rw=randwrite",
        "--bsrange=4k-64k",
        "--iodepth=16",
        "--ioengine=libaio",
        "--direct=1",
    ];
    let load = [
        &size,
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--verify_backlog=64",
        "--loops=100000",
        &filename,
    ];
    let mut command = Command::new("fio");
    command.args(job).args(load);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().expect("start fio")
}

/// the server dies again and again under a verifying writer, who must notice nothing; the device stays the same one.
pub(crate) fn killed_under_fio(rig: &Rig, engine: Engine, kills: u32, size: &str) -> Served {
    let mut served = rig.serve(engine, &[]);
    let mut fio = verifying_writer(served.device(), size);
    let identity = (served.numbers.clone(), served.diskseq.clone());
    for kill in 0..kills {
        let before = served.sysfs("stat");
        let mut ended = false;
        wait_until("I/O between two kills", || {
            ended = fio.try_wait().unwrap().is_some();
            ended || served.sysfs("stat") != before
        });
        if ended {
            // It says why.
            assert_fio_clean(fio);
            panic!("fio ended after kill {kill}");
        }
        served.kill();
        served = rig.serve(engine, &[]);
        let now = (served.numbers.clone(), served.diskseq.clone());
        assert_eq!(now, identity, "another device after kill {kill}");
    }
    // SIGINT: fio finishes what it is doing and reports.
    run("kill", &["-INT", &fio.id().to_string()]);
    assert_fio_clean(fio);
    served
}

/// Waits for fio, which was told to end, and checks that it found every byte as it wrote it.
pub(crate) fn assert_fio_clean(fio: Child) {
    let output = fio.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(!said.contains("verify:") && !said.contains("error="), "{said}");
    assert!(said.contains("err= 0"), "{said}");
}

/// Polls with a deadline.
pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < deadline, "waited {LIMIT:?} for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
