//! A log store without space: writers wait, nobody gets an error, nothing is lost.

use anyhow::{Result, ensure};
use mars_e2e::backing::SmallStore;
use mars_e2e::cluster::{Cluster, Options, scenario};
use mars_e2e::ledger::{Ledger, open_direct};
use mars_e2e::machine::until;
use mars_e2e::volume::Volume;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const WRITES: u64 = 60_000;

#[test]
fn a16_a_full_disk_holds_writers_without_an_error_and_lets_them_go_when_there_is_space() {
    scenario_on_small_store();
}

fn scenario_on_small_store() {
    let store = SmallStore::new(1 << 30).expect("a small file system can be made");
    scenario(
        Options {
            parent: store.path().to_owned(),
            ..Options::two()
        },
        |cluster| full(cluster, &store),
    );
}

fn full(cluster: &Cluster, store: &SmallStore) -> Result<()> {
    let volume = Volume::create(cluster, "full", "64Mi", "a", &["a", "b"])?;
    let device = open_direct(&volume.device("a"))?;
    let mut ledger = Ledger::new(4096);
    ledger.write(&device, 500)?;
    let filler = store.fill(24 << 20)?;
    let written = &AtomicU64::new(0);
    std::thread::scope(|scope| {
        let ledger = &mut ledger;
        let device = &device;
        let load = scope.spawn(move || -> Result<()> {
            while ledger.written < WRITES {
                ledger.write(device, 10)?;
                written.store(ledger.written, Ordering::SeqCst);
            }
            Ok(device.sync_all()?)
        });
        // No space for 60,000 writes: either the writer waits, or old log is given up; never an error.
        let mut last = 0;
        let mut same_since = std::time::Instant::now();
        until("the writer waits, or is done", Duration::from_mins(2), || {
            let now = written.load(Ordering::SeqCst);
            if now != last {
                (last, same_since) = (now, std::time::Instant::now());
            }
            Ok(load.is_finished() || same_since.elapsed() > Duration::from_secs(5))
        })?;
        drop(filler);
        load.join().expect("the load does not panic")
    })?;
    ensure!(ledger.prefix(&volume.device("a"))? == WRITES, "every write is there");
    volume.wait_written_back("a")?;
    ensure!(
        ledger.prefix(&volume.data_file("a")?)? == WRITES,
        "and on the data disk"
    );
    Ok(())
}
