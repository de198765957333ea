//! a busy file system on a MARS device must not deadlock with the process that serves it, when memory is short.
//!
//! Writing out dirty pages needs the agent; the agent needs memory to do it. Natively the writer has a memory cgroup of its own,
//! as in a cluster.
#![allow(clippy::unwrap_used, reason = "in a test a failed step is a failed test")]

mod common;

use common::{Engine, Rig, Served, run, text};
use std::path::PathBuf;
use std::process::Command;

const MIB: u64 = 1 << 20;
const AGENT_BYTES: u64 = 512 * MIB;

/// A memory cgroup with a limit, in whichever hierarchy this machine has.
struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    fn new(name: &str, limit_bytes: u64) -> Self {
        let (base, limit) = if PathBuf::from("/sys/fs/cgroup/cgroup.controllers").exists() {
            ("/sys/fs/cgroup", "memory.max")
        } else {
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
        };
        if limit == "memory.max" {
            // Fails where it is on already and processes are here; then the write below tells.
            let _ = std::fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+memory");
        }
        let path = PathBuf::from(base).join(format!("mars-test-{}-{name}", std::process::id()));
        std::fs::create_dir(&path)
            .unwrap_or_else(|error| panic!("this test makes memory cgroups: {error} at {}", path.display()));
        std::fs::write(path.join(limit), limit_bytes.to_string()).expect("limit the memory of a cgroup");
        Self { path }
    }

    /// The same command, run in this cgroup.
    fn wrap(&self, command: &Command) -> Command {
        let mut wrapped = Command::new("sh");
        let script = format!("echo $$ > {}/cgroup.procs && exec \"$@\"", self.path.display());
        wrapped
            .args(["-c", &script, "sh"])
            .arg(command.get_program())
            .args(command.get_args());
        wrapped
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        common::wait_until("the cgroup to be empty", || std::fs::remove_dir(&self.path).is_ok());
    }
}

#[test]
fn a18_a_buffered_writer_of_twice_the_agents_memory_ends() {
    let agent = Cgroup::new("agent", AGENT_BYTES);
    let other = Cgroup::new("writer", AGENT_BYTES);
    {
        let mut rig = Rig::on_disk();
        rig.storage(2048 * MIB);
        let command = rig.command(Engine::Replica, &["--overlay-bytes", &(64 * MIB).to_string()]);
        let mut served = Served::start(common::piped(agent.wrap(&command), &rig), &rig);
        run("mkfs.ext4", &["-q", "-F", "-E", "lazy_itable_init=0", served.device()]);
        let at = rig.mount(&served.node.clone(), "defaults");
        let file = at.join("file");
        let bytes = 2 * AGENT_BYTES;
        let write = format!("yes mars-a18 | head -c {bytes} > {0} && sync -f {0}", text(&file));
        let mut writer = Command::new("timeout");
        writer.args(["-k", "5", "300", "sh", "-c", &write]);
        let status = other.wrap(&writer).status().unwrap();
        assert!(
            status.success(),
            "the writer ended with {status}: killed by its time limit means a deadlock"
        );
        rig.umount();
        run("fsck.ext4", &["-fn", served.device()]);
        let at = rig.mount(&served.node.clone(), "ro");
        let compare = format!("yes mars-a18 | head -c {bytes} | cmp - {}", text(&at.join("file")));
        run("sh", &["-c", &compare]);
        rig.umount();
        served.ok("detach");
    }
}
