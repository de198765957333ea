//! Agents that die: nothing acknowledged is lost, no user of a device notices more than a pause.

use anyhow::{Context, Result, ensure};
use mars_crds::MarsNode;
use mars_e2e::cluster::{Cluster, Options, scenario};
use mars_e2e::device::{Fio, Fs, Mount, same_content};
use mars_e2e::ledger::{Ledger, open_direct};
use mars_e2e::machine::{Cmd, in_vm, on_disk};
use mars_e2e::volume::Volume;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// A hundred; fewer in the emulated machine, where one takes ten times as long and the tests of the agent do a hundred.
fn kills() -> usize {
    let wished = std::env::var("MARS_TEST_KILLS").ok();
    let otherwise = if in_vm() { 15 } else { 100 };
    wished.map_or(otherwise, |text| text.parse().expect("MARS_TEST_KILLS is a number"))
}

#[test]
fn a19_a_hundred_kills_of_the_agent_under_verified_load_are_not_noticed() {
    scenario(Options::two(), |cluster| kills_under_load(cluster, kills()));
}

fn kills_under_load(cluster: &Cluster, kills: usize) -> Result<()> {
    let volume = Volume::create(cluster, "kills", "128Mi", "a", &["a", "b"])?;
    let device = volume.wait_primary("a")?;
    let fio = Fio {
        bytes_per_job: 16 << 20,
        depth: 4,
        flush_every: 16,
    };
    let mut outcome = Ok(());
    let stop = &AtomicBool::new(false);
    std::thread::scope(|scope| {
        let load = scope.spawn(move || -> Result<u32> {
            let mut rounds = 0;
            while !stop.load(Ordering::SeqCst) {
                fio.run(&device).with_context(|| format!("fio round {rounds}"))?;
                rounds += 1;
            }
            Ok(rounds)
        });
        outcome = (|| {
            for kill in 0..kills {
                ensure!(!load.is_finished(), "the load ended at kill {kill}");
                cluster.node("a").kill()?;
                cluster.node("a").start()?;
                volume.wait_primary("a").with_context(|| format!("after kill {kill}"))?;
            }
            Ok(())
        })();
        stop.store(true, Ordering::SeqCst);
        match load.join().expect("the load does not panic") {
            Ok(rounds) if outcome.is_ok() && rounds == 0 => outcome = Err(anyhow::anyhow!("fio never came to its end")),
            Ok(_) => {}
            Err(error) => outcome = Err(error),
        }
    });
    outcome?;
    volume.wait_written_back("a")?;
    volume.wait_caught_up("a", "b")?;
    volume.same_data("a", "b")
}

#[test]
fn p1_every_acknowledged_write_survives_the_death_of_the_agent() {
    scenario(Options::two(), |cluster| {
        let volume = Volume::create(cluster, "acked", "64Mi", "a", &["a", "b"])?;
        let device = open_direct(&volume.device("a"))?;
        let mut ledger = Ledger::new(2048);
        for round in 1..=10 {
            ledger.write(&device, 700)?;
            cluster.node("a").kill()?;
            cluster.node("a").start()?;
            volume.wait_primary("a")?;
            let found = ledger.prefix(&volume.device("a"))?;
            ensure!(
                found == 700 * round,
                "{} writes were acknowledged, {found} are there",
                700 * round
            );
        }
        Ok(())
    });
}

/// The memory control group of a process, where this machine has them.
fn memory_limit_file(pid: u32) -> Result<PathBuf> {
    let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next().unwrap_or_default(), fields.next().unwrap_or_default());
        let file = match controllers {
            "memory" => format!("/sys/fs/cgroup/memory{path}/memory.limit_in_bytes"),
            "" => format!("/sys/fs/cgroup{path}/memory.max"),
            _ => continue,
        };
        if std::path::Path::new(&file).exists() {
            ensure!(path != "/", "the agent has no memory control group of its own");
            return Ok(file.into());
        }
    }
    anyhow::bail!("no memory controller for process {pid}:\n{groups}")
}

const AGENT_BYTES: u64 = 512 << 20;

/// What an agent that is started within such a limit would choose by itself: a quarter of it.
fn within_the_limit() -> Options {
    Options {
        args: vec![format!("--agent-arg=--overlay-bytes={}", AGENT_BYTES / 4)],
        // Files in RAM would count as memory of the agent.
        parent: on_disk(),
        ..Options::two()
    }
}

#[test]
fn a18_buffered_writes_of_twice_the_agents_memory_limit_do_not_deadlock() {
    scenario(within_the_limit(), |cluster| {
        // In the emulated machine a second copy of it all would take minutes, and the memory is that of the first agent.
        let members = if in_vm() { &["a"][..] } else { &["a", "b"] };
        let volume = Volume::create(cluster, "memory", "2Gi", "a", members)?;
        let agent = cluster.node("a").agent_pid()?;
        let limit = memory_limit_file(agent)?;
        std::fs::write(&limit, AGENT_BYTES.to_string()).with_context(|| limit.display().to_string())?;
        Fs::Ext4.make(&volume.device("a"))?;
        let mounted = Mount::new(&volume.device("a"), &cluster.scratch("mnt")?, "noatime")?;
        let source = cluster.scratch("source")?.join("pattern");
        Cmd::new("sh")
            .args(["-c", "head -c 67108864 /dev/urandom > \"$1\"", "sh"])
            .arg(&source)
            .run()?;
        // Where the agent may say that it flushes I/O (the VM grants it), the writer shares its control group: the hardest case.
        // Elsewhere that is measured to hang both for ever, and the writer lives outside, as in a cluster.
        let group = limit.parent().context("a limit lies in a group")?.join("cgroup.procs");
        let join = if may_flush_io(cluster)? {
            group
        } else {
            PathBuf::from("/dev/null")
        };
        let script = "echo $$ > \"$1\" && for copy in $(seq 0 15); do cat \"$2\" > \"$3/copy$copy\" || exit 1; done; sync --file-system \"$3\"";
        let writer = Cmd::new("sh").args(["-c", script, "sh"]);
        let writer = writer.arg(&join).arg(&source).arg(mounted.point());
        writer
            .limit(Duration::from_mins(5))
            .run()
            .context("it must come to its end")?;
        ensure!(
            cluster.node("a").agent_pid()? == agent && cluster.node("a").agent_runs(),
            "the agent lives on"
        );
        for copy in [0, 7, 15] {
            same_content(&source, &mounted.point().join(format!("copy{copy}")), 64 << 20)?;
        }
        mounted.unmount()?;
        Fs::Ext4.check(&volume.device("a"))
    });
}

/// What the agent of a says: whether this machine let it set `PR_SET_IO_FLUSHER`.
fn may_flush_io(cluster: &Cluster) -> Result<bool> {
    let node: MarsNode = cluster.get("a")?;
    let conditions = node.status.unwrap_or_default().conditions;
    let flusher = conditions.iter().find(|condition| condition.type_ == "IoFlusher");
    let granted = flusher.context("the agent says nothing about IoFlusher")?.status == "True";
    ensure!(granted || !in_vm(), "the VM grants everything");
    Ok(granted)
}
