//! The harness itself, on plain disks and plain sockets: what it does must work before it can judge anything.

use anyhow::{Result, ensure};
use mars_e2e::backing::{Disk, SmallStore};
use mars_e2e::device::{Fio, Fs, Mount, checksums, copy_real_files, differences};
use mars_e2e::ledger::{Ledger, open_direct};
use mars_e2e::link::{Cut, Wan};
use mars_e2e::machine::require_test_machine;
use mars_e2e::postgres::Postgres;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

#[test]
#[ignore = "needs root and a network namespace of its own: run by the device tier"]
fn disks_file_systems_checksums_and_fio_work_on_a_plain_loop_device() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let disk = Disk::new(&dir.path().join("image"), 400 << 20)?;
    let mut ledger = Ledger::new(1024);
    ledger.write(&open_direct(disk.device())?, 3000)?;
    ensure!(ledger.prefix(disk.device())? == 3000);
    Fio {
        bytes_per_job: 8 << 20,
        depth: 4,
        flush_every: 8,
    }
    .run(disk.device())?;
    for fs in [Fs::Ext4, Fs::Xfs] {
        fs.make(disk.device())?;
        let mounted = Mount::new(disk.device(), &dir.path().join("mnt"), "noatime")?;
        copy_real_files(mounted.point(), 20 << 20)?;
        let before = checksums(mounted.point())?;
        ensure!(before.len() > 10 && differences(&before, &checksums(mounted.point())?).is_empty());
        std::fs::write(mounted.point().join("new"), "x")?;
        ensure!(differences(&before, &checksums(mounted.point())?).len() == 1);
        mounted.unmount()?;
        fs.check(disk.device())?;
    }
    let store = SmallStore::new(64 << 20)?;
    let filler = store.fill(1 << 20)?;
    ensure!(
        std::fs::write(store.path().join("big"), vec![1; 8 << 20]).is_err(),
        "it is full"
    );
    drop(filler);
    Ok(std::fs::write(store.path().join("big"), vec![1; 8 << 20])?)
}

#[test]
#[ignore = "needs root and a network namespace of its own: run by the device tier"]
fn postgresql_works_on_a_plain_disk() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let disk = Disk::new(&dir.path().join("image"), 800 << 20)?;
    Fs::Ext4.make(disk.device())?;
    let mounted = Mount::new(disk.device(), &dir.path().join("mnt"), "noatime")?;
    let server = Postgres::create(mounted.point(), dir.path())?;
    server.bench_prepare(1)?;
    server.bench_exactly(100)?;
    ensure!(server.history()? == 100);
    server.check()?;
    server.stop()?;
    let server = Postgres::start(mounted.point(), dir.path())?;
    let mut load = server.bench_until_stopped()?;
    ensure!(load.running()?);
    server.die();
    load.wait(Duration::from_secs(30))?;
    let server = Postgres::start(mounted.point(), dir.path())?;
    server.check()?;
    server.stop()?;
    mounted.unmount()?;
    Fs::Ext4.check(disk.device())
}

#[test]
#[ignore = "needs root and a network namespace of its own: run by the device tier"]
fn links_are_cut_slowed_and_healed_by_address() -> Result<()> {
    require_test_machine()?;
    let (one, other) = ("127.0.0.21", "127.0.0.22");
    let listener = TcpListener::bind((other, 0))?;
    let port = listener.local_addr()?.port();
    let echo = |from: &str| -> Result<Duration> {
        let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::STREAM, None)?;
        rustix::net::bind(&socket, &format!("{from}:0").parse::<std::net::SocketAddr>()?)?;
        let begin = Instant::now();
        rustix::net::sockopt::set_socket_timeout(
            &socket,
            rustix::net::sockopt::Timeout::Send,
            Some(Duration::from_secs(1)),
        )?;
        rustix::net::connect(&socket, &format!("{other}:{port}").parse::<std::net::SocketAddr>()?)?;
        let mut stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        let (mut accepted, _) = listener.accept()?;
        accepted.write_all(b"x")?;
        stream.read_exact(&mut [0])?;
        Ok(begin.elapsed())
    };
    ensure!(echo(one)? < Duration::from_millis(500));
    let cut = Cut::between(one, other)?;
    ensure!(echo(one).is_err(), "the link is cut");
    ensure!(echo("127.0.0.23").is_ok(), "other links are not");
    cut.heal()?;
    echo(one)?;
    let wan = Wan::between("t", one, other, 50, 0.0, 10)?;
    ensure!(echo(one)? > Duration::from_millis(100), "the link is slow");
    wan.pull()?;
    ensure!(echo(one).is_err(), "nothing gets through");
    wan.plug()?;
    echo(one).map(drop)
}
