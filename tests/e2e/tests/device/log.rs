//! The transaction log on real devices: what is read, what survives, what replicas denote.

use anyhow::{Context, Result, ensure};
use mars_e2e::cluster::{Options, scenario};
use mars_e2e::device::drop_cache;
use mars_e2e::ledger::{Aligned, BLOCK_BYTES, LSN_PER_WRITE, Ledger, open_direct};
use mars_e2e::machine::{in_vm, until};
use mars_e2e::volume::Volume;
use serde_json::json;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Writes a block and reads it back at once, over and over, until told to stop; returns the number of rounds.
fn write_then_read(device: &Path, first_block: u64, stop: &AtomicBool, rounds: &AtomicU64) -> Result<()> {
    let file = open_direct(device)?;
    let (mut block, mut back) = (Aligned::new(BLOCK_BYTES), Aligned::new(BLOCK_BYTES));
    let mut round = 0_u64;
    while !stop.load(Ordering::SeqCst) {
        round += 1;
        let offset = (first_block + round % 64) * BLOCK_BYTES as u64;
        for chunk in block.get_mut().chunks_exact_mut(8) {
            chunk.copy_from_slice(&(round ^ first_block).to_le_bytes());
        }
        file.write_all_at(block.get(), offset)
            .with_context(|| format!("write round {round}"))?;
        file.read_exact_at(back.get_mut(), offset)
            .with_context(|| format!("read round {round}"))?;
        ensure!(
            block.get() == back.get(),
            "round {round}: byte {offset} does not read as just written"
        );
        if round > 64 {
            let old = (first_block + (round + 1) % 64) * BLOCK_BYTES as u64;
            file.read_exact_at(back.get_mut(), old)?;
            let wanted = ((round - 63) ^ first_block).to_le_bytes();
            ensure!(
                back.get().starts_with(&wanted),
                "round {round}: an older block at byte {old} is not the newest version"
            );
        }
        rounds.store(round, Ordering::SeqCst);
    }
    Ok(())
}

#[test]
fn a10_a_read_returns_the_newest_acknowledged_bytes_also_across_agent_crashes() {
    scenario(Options::two(), |cluster| {
        let volume = Volume::create(cluster, "newest", "64Mi", "a", &["a", "b"])?;
        let device = volume.device("a");
        let (stop, rounds) = (AtomicBool::new(false), [AtomicU64::new(0), AtomicU64::new(0)]);
        let mut outcome = Ok(());
        std::thread::scope(|scope| {
            let (device, stop, rounds) = (&device, &stop, &rounds);
            let jobs: Vec<_> = (0..2)
                .map(|job| scope.spawn(move || write_then_read(device, job as u64 * 64, stop, &rounds[job])))
                .collect();
            outcome = (|| {
                for _ in 0..5 {
                    let before = rounds[0].load(Ordering::SeqCst);
                    until("the load goes on", Duration::from_mins(1), || {
                        ensure!(
                            !jobs.iter().any(std::thread::ScopedJoinHandle::is_finished),
                            "a job ended"
                        );
                        Ok(rounds[0].load(Ordering::SeqCst) > before + 200)
                    })?;
                    cluster.node("a").kill()?;
                    cluster.node("a").start()?;
                }
                Ok(())
            })();
            stop.store(true, Ordering::SeqCst);
            for job in jobs {
                if let Err(error) = job.join().expect("a job does not panic") {
                    outcome = Err(error);
                }
            }
        });
        outcome
    });
}

#[test]
fn a36_a_secondary_disk_at_rest_is_the_primarys_content_at_its_applied_position_at_a_hundred_moments() {
    scenario(Options::default(), |cluster| {
        let volume = Volume::create(cluster, "moments", "64Mi", "a", &["a", "b"])?;
        volume.wait_caught_up("a", "b")?;
        let begin = volume.durable("a")?;
        let data = volume.data_file("b")?;
        let device = open_direct(&volume.device("a"))?;
        let mut ledger = Ledger::new(2048);
        let mut moments = 0;
        let mut seen = std::collections::BTreeSet::new();
        while moments < 100 {
            ledger.write(&device, 40 + rand::random_range(0..200))?;
            if moments % 3 == 0 {
                device.sync_data()?;
            }
            // Nobody touches the disk of a replica whose replay is held; another moment each time, also in mid catch-up.
            cluster.patch_resource("moments", &switches(&json!({ "replay": false })))?;
            let status = volume.wait_live("b", "stands still", |status| {
                status.state == "PausedReplay"
                    && status
                        .positions
                        .as_ref()
                        .is_some_and(|at| at.applied == at.dirty_end && at.applied == at.replayed)
            })?;
            let applied = status
                .positions
                .context("a replica that is held keeps its positions")?
                .applied;
            let found = ledger.prefix(&data)?;
            ensure!(
                i64::try_from(found)? * LSN_PER_WRITE == applied - begin,
                "the disk holds {found} writes, the applied position says {} bytes after the beginning",
                applied - begin
            );
            seen.insert(found);
            cluster.patch_resource("moments", &switches(&json!({ "replay": true })))?;
            volume.wait_live("b", "goes on", |status| status.state != "PausedReplay")?;
            moments += 1;
        }
        ensure!(seen.len() > 30, "only {} different moments were seen", seen.len());
        Ok(())
    });
}

/// The member list of `moments` with switches for node b.
fn switches(b: &serde_json::Value) -> serde_json::Value {
    json!({ "replicas": [{ "node": "a", "pool": "default" }, { "node": "b", "pool": "default", "switches": b }] })
}

#[test]
fn a37_resize_discard_and_write_zeroes_take_effect_on_every_replica() {
    scenario(Options::default(), |cluster| {
        let volume = Volume::create(cluster, "sizes", "64Mi", "a", &["a", "b", "c"])?;
        let device = volume.wait_primary("a")?;
        let mut ledger = Ledger::new(16_384);
        ledger.write(&open_direct(&device)?, if in_vm() { 500 } else { 4000 })?;
        let on = device.to_string_lossy().into_owned();
        mars_e2e::machine::run("blkdiscard", &["--offset", "1MiB", "--length", "1MiB", &on])?;
        mars_e2e::machine::run(
            "blkdiscard",
            &["--zeroout", "--offset", "4MiB", "--length", "64KiB", &on],
        )?;
        let mut zeros = vec![1; 1 << 20];
        drop_cache(&device)?;
        File::open(&device)?.read_exact_at(&mut zeros, 1 << 20)?;
        ensure!(zeros.iter().all(|byte| *byte == 0), "what was discarded reads as zeros");

        cluster.patch_resource("sizes", &json!({ "size": "96Mi" }))?;
        until("the device has grown", Duration::from_mins(1), || {
            Ok(mars_e2e::device::size_bytes(&volume.wait_primary("a")?)? == 96 << 20)
        })?;
        // A kernel that cannot grow an open device shows another one, with the new size, once nobody has the old one open.
        let file = File::options().write(true).open(volume.wait_primary("a")?)?;
        file.write_all_at(&[42; 8192], (96 << 20) - 8192)?;
        file.sync_all()?;
        // A crash replays the same records once more.
        cluster.node("b").kill()?;
        cluster.node("b").start()?;
        volume.wait_written_back("a")?;
        for node in ["b", "c"] {
            volume.wait_caught_up("a", node)?;
            volume.wait_live(node, "has grown", |status| status.size_bytes == Some(96 << 20))?;
            volume.same_data("a", node)?;
        }
        Ok(())
    });
}
