//! The demo's script. Every claim it prints was checked just before.

use crate::screen::{Screen, Watched, mib};
use anyhow::{Context, Result, ensure};
use mars_crds::{MarsNode, MarsResource, ReplicaData, Verb};
use mars_e2e::cluster::{Cluster, Options};
use mars_e2e::device::{Fs, Mount, checksums, copy_real_files, differences, identity};
use mars_e2e::machine::{run, until, workspace};
use mars_e2e::volume::Volume;
use std::collections::BTreeMap;
use std::io::Write;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

const CHAPTERS: usize = 9;
const FILES_BYTES: u64 = 300 << 20;
/// How long node b writes before it dies.
const WRITES_BEFORE_DEATH: usize = 200;
/// How much it writes while nobody hears.
const WRITES_UNHEARD: usize = 150;

pub(crate) fn tell(screen: &Screen) -> Result<()> {
    screen.chapter(1, CHAPTERS, "A cluster of three nodes on this machine");
    let port = free_api_port()?;
    let options = Options {
        args: vec!["--api".into(), format!("127.0.0.1:{port}")],
        ..Options::default()
    };
    screen.command(&format!("mars-local up --nodes a,b,c --api 127.0.0.1:{port}"));
    let mut cluster = Cluster::start(options)?;
    let outcome = scenes(screen, &cluster);
    screen.unwatch();
    if let Err(error) = &outcome
        && !mars_e2e::machine::interrupted()
    {
        screen.bad(&format!("{error:#}"));
        eprintln!("{}", cluster.report());
    }
    cluster.stop()?;
    outcome?;
    screen.good("everything ended; no process, mount, loop device or file is left");
    Ok(())
}

fn scenes(screen: &Screen, cluster: &Cluster) -> Result<()> {
    for node in cluster.nodes() {
        let object: MarsNode = cluster.get(node)?;
        let status = object.status.unwrap_or_default();
        screen.good(&format!(
            "node {node}: agent at {}, block devices by {}",
            status.address, status.frontend
        ));
    }
    screen.watch(Watched {
        nodes_dir: cluster.state().join("nodes"),
        nodes: cluster.nodes().to_vec(),
        resource: "mydata".into(),
    });
    let _ticker = screen.ticker();
    let volume = appear(screen, cluster)?;
    let files = fill(screen, cluster, &volume)?;
    hand_over(screen, cluster, &volume, &files)?;
    let written = die_while_writing(screen, cluster, &volume)?;
    fail_over(screen, cluster, &volume, &files, written)?;
    come_back(screen, cluster, &volume)?;
    screen.chapter(9, CHAPTERS, "The end");
    screen.table();
    Ok(())
}

fn appear<'a>(screen: &Screen, cluster: &'a Cluster) -> Result<Volume<'a>> {
    screen.chapter(2, CHAPTERS, "A manifest becomes a block device");
    screen.command("kubectl apply -f examples/mydata.yaml");
    let manifest = workspace().join("examples/mydata.yaml");
    for line in cluster.kubectl(&["apply", "-f", &manifest.to_string_lossy()])?.lines() {
        screen.note(line);
    }
    let volume = Volume::existing(cluster, "mydata", cluster.nodes());
    let device = volume.wait_primary("a")?;
    screen.good(&format!("{} is on node a: {}", shown(&volume, "a"), device.display()));
    for node in volume.others("a") {
        volume.wait_consistent(&node)?;
        screen.good(&format!("node {node} is consistent and follows"));
    }
    cluster.wait("mydata", "is healthy", |object: &MarsResource| {
        object.status.as_ref().is_some_and(|status| status.state == "Healthy")
    })?;
    screen.command("kubectl get mars");
    for line in cluster.kubectl(&["get", "mars"])?.lines() {
        screen.note(line);
    }
    screen.table();
    Ok(volume)
}

/// The device link of a node as the story shows it: relative to the state directory.
fn shown(volume: &Volume<'_>, node: &str) -> String {
    format!("nodes/{node}/dev/{}", volume.name)
}

fn mount(screen: &Screen, cluster: &Cluster, volume: &Volume<'_>, node: &str) -> Result<Mount> {
    screen.command(&format!("mount {} mnt-{node}", shown(volume, node)));
    Mount::new(&volume.device(node), &cluster.scratch("mounts")?.join(node), "noatime")
}

fn fill(screen: &Screen, cluster: &Cluster, volume: &Volume<'_>) -> Result<BTreeMap<String, String>> {
    screen.chapter(3, CHAPTERS, "A file system and real files on node a");
    screen.command(&format!("mkfs.ext4 {}", shown(volume, "a")));
    Fs::Ext4.make(&volume.device("a"))?;
    let mounted = mount(screen, cluster, volume, "a")?;
    screen.command("cp -r /usr/share/doc … mnt-a");
    let copied = copy_real_files(mounted.point(), FILES_BYTES)?;
    run("sync", &["--file-system", &mounted.point().to_string_lossy()])?;
    let files = checksums(mounted.point())?;
    screen.good(&format!(
        "{} files, {}, synced to disk, SHA-256 of each noted",
        files.len(),
        mib(i64::try_from(copied)?)
    ));
    screen.table();
    mounted.unmount()?;
    Ok(files)
}

fn hand_over(screen: &Screen, cluster: &Cluster, volume: &Volume<'_>, files: &BTreeMap<String, String>) -> Result<()> {
    screen.chapter(4, CHAPTERS, "Planned handover to node b");
    screen.command("kubectl patch mars mydata --type=merge -p '{\"spec\":{\"primary\":\"b\"}}'");
    let device = volume.handover("b")?;
    volume.wait_secondary("a")?;
    ensure!(!volume.device("a").exists(), "node a must not have a device any more");
    screen.good(&format!(
        "node b is primary: {}; node a has no device any more",
        device.display()
    ));
    let uuid = volume.replica("b")?.spec.replica_uuid.to_string();
    if let Some(file) = identity(&device)?.backing_file {
        ensure!(
            file.to_string_lossy().contains(&uuid),
            "the device of node b is served from {}",
            file.display()
        );
        screen.good(&format!("the kernel says it is backed by node b's replica {uuid}"));
    }
    let mounted = mount(screen, cluster, volume, "b")?;
    let wrong = differences(files, &checksums(mounted.point())?);
    ensure!(wrong.is_empty(), "after the handover: {}", wrong.join(", "));
    screen.good(&format!("all {} files are there, every checksum is right", files.len()));
    screen.table();
    mounted.unmount()
}

/// Files written one after the other, each flushed before the next.
struct Writer {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<usize>>,
}

fn late_content(number: usize) -> String {
    format!("file {number:06}\n").repeat(10_000)
}

fn late_path(dir: &Path, number: usize) -> PathBuf {
    dir.join("late").join(format!("{number:06}"))
}

impl Writer {
    fn start(dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir.join("late"))?;
        let (stop, dir) = (Arc::new(AtomicBool::new(false)), dir.to_owned());
        let seen = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut done = 0;
            while !seen.load(Ordering::SeqCst) {
                let path = late_path(&dir, done);
                let written = std::fs::File::create(path).and_then(|mut file| {
                    file.write_all(late_content(done).as_bytes())?;
                    file.sync_all()
                });
                match written {
                    Ok(()) => done += 1,
                    // The node died under us.
                    Err(_) => break,
                }
            }
            done
        });
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }

    /// How many files were flushed before the end.
    fn finish(mut self) -> Result<usize> {
        self.stop.store(true, Ordering::SeqCst);
        let thread = self.thread.take().context("the writer has ended")?;
        until("the writer ends", Duration::from_secs(30), || Ok(thread.is_finished()))?;
        thread.join().map_err(|_| anyhow::anyhow!("the writer panicked"))
    }
}

fn die_while_writing(screen: &Screen, cluster: &Cluster, volume: &Volume<'_>) -> Result<usize> {
    screen.chapter(5, CHAPTERS, "Node b dies while it writes");
    let mounted = mount(screen, cluster, volume, "b")?;
    let writer = Writer::start(mounted.point())?;
    let target = late_path(mounted.point(), WRITES_BEFORE_DEATH);
    until("the writer has written for a while", Duration::from_mins(1), || {
        Ok(target.exists())
    })?;
    screen.table();
    screen.note("a broken line: the agents of a and c hear of nothing any more (SIGSTOP)");
    for node in ["a", "c"] {
        cluster.node(node).freeze()?;
    }
    let target = late_path(mounted.point(), WRITES_BEFORE_DEATH + WRITES_UNHEARD);
    until("the writer goes on, undisturbed", Duration::from_mins(1), || {
        Ok(target.exists())
    })?;
    screen.command("mars-local node b poweroff");
    cluster.node("b").poweroff()?;
    let written = writer.finish()?;
    for node in ["a", "c"] {
        cluster.node(node).thaw()?;
    }
    drop(mounted);
    screen.good(&format!(
        "node b is gone; its application had flushed {written} more files, one by one"
    ));
    Ok(written)
}

fn act(screen: &Screen, volume: &Volume<'_>, verb: Verb, node: &str, example: &str) -> Result<()> {
    screen.command(&format!(
        "kubectl apply -f examples/{example}      # with the resource's uuid in `acknowledge`"
    ));
    volume.act_and_wait(verb, Some(node))
}

fn fail_over(
    screen: &Screen,
    cluster: &Cluster,
    volume: &Volume<'_>,
    files: &BTreeMap<String, String>,
    written: usize,
) -> Result<()> {
    screen.chapter(6, CHAPTERS, "Failover to node c");
    until("a and c have exchanged what they have", Duration::from_secs(30), || {
        Ok(volume.durable("a")? == volume.durable("c")?)
    })?;
    act(screen, volume, Verb::Failover, "c", "failover.yaml")?;
    let device = volume.wait_primary("c")?;
    screen.good(&format!("node c is primary: {}", device.display()));
    let mounted = mount(screen, cluster, volume, "c")?;
    let found = checksums(mounted.point())?;
    let old: BTreeMap<String, String> = found
        .into_iter()
        .filter(|(path, _)| !path.starts_with("./late/"))
        .collect();
    let wrong = differences(files, &old);
    ensure!(wrong.is_empty(), "after the failover: {}", wrong.join(", "));
    screen.good(&format!(
        "all {} files of the beginning are there, every checksum is right",
        files.len()
    ));
    let intact = |number: &usize| {
        std::fs::read_to_string(late_path(mounted.point(), *number)).is_ok_and(|text| text == late_content(*number))
    };
    let kept = (0..written).take_while(intact).count();
    let later = (kept..written).filter(intact).count();
    ensure!(
        later == 0,
        "{later} files are there although an earlier one is missing: the order of writes was not kept"
    );
    screen.good(&format!(
        "of the {written} files written last, the first {kept} are intact and {} are lost: what had not left node b",
        written - kept
    ));
    mounted.unmount()?;
    screen.command(&format!("e2fsck -fn {}", shown(volume, "c")));
    Fs::Ext4.check(&volume.device("c"))?;
    screen.good("the file system is clean");
    screen.table();
    Ok(())
}

fn come_back(screen: &Screen, cluster: &Cluster, volume: &Volume<'_>) -> Result<()> {
    screen.chapter(7, CHAPTERS, "Node b comes back: its history forks");
    let mounted = mount(screen, cluster, volume, "c")?;
    std::fs::write(mounted.point().join("written-on-c"), "node c goes on\n".repeat(1000))?;
    mounted.unmount()?;
    screen.command("mars-local node b start");
    cluster.node("b").start()?;
    let status = volume.wait_live("b", "is secondary and reports its fork", |status| {
        status.role == Some(mars_crds::ActualRole::Secondary) && !status.forks.is_empty()
    })?;
    let fork = status.forks.first().context("a fork was reported")?;
    screen.good(&format!(
        "b is secondary and stopped before the fork at {}: {} only on b (the lag when it died), {} only on the other side",
        mib(fork.lsn),
        mib(fork.ours_bytes),
        mib(fork.theirs_bytes)
    ));
    let object: MarsResource = cluster.wait("mydata", "reports the split", |object: &MarsResource| {
        object.status.as_ref().is_some_and(|status| !status.forks.is_empty())
    })?;
    screen.note(&format!(
        "kubectl get mars mydata: {}",
        object.status.unwrap_or_default().state
    ));
    screen.table();

    screen.chapter(8, CHAPTERS, "Node b gives up its branch and follows again");
    act(screen, volume, Verb::Invalidate, "b", "invalidate.yaml")?;
    let status = volume.wait_live_for(Duration::from_mins(2), "b", "follows again", |status| {
        status.data_state == Some(ReplicaData::Consistent) && status.forks.is_empty()
    })?;
    if let Some(sync) = status.sync {
        screen.note(&format!(
            "compared {}, transferred {}",
            mib(sync.total_bytes),
            mib(sync.moved_bytes)
        ));
    }
    volume.wait_written_back("c")?;
    for node in ["a", "b"] {
        volume.wait_caught_up("c", node)?;
        volume.same_data("c", node)?;
        screen.good(&format!("the data of node {node} equals node c's, byte for byte"));
    }
    Ok(())
}

/// The usual port of the embedded API, or any free one where that is taken.
fn free_api_port() -> Result<u16> {
    let usual = TcpListener::bind(("127.0.0.1", 7780));
    let listener = usual.or_else(|_| TcpListener::bind(("127.0.0.1", 0)))?;
    Ok(listener.local_addr()?.port())
}
