//! Log from member to member: backlogs, broken connections, third members, slow disks, forks.

use super::rig::{Cluster, LIMIT, Shape, all_on, designation, followed, payload};
use mars_engine::api::{Cause, Command, Compression, DataState, Fault, Role, Switches};
use mars_engine::replication::fetch::{Wait, Wish};
use mars_node_agent::replication::{Activity, Congestion};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

async fn write_some(cluster: &Cluster, from: u64, count: u64) {
    const CHUNK: usize = 64 << 10;
    for index in from..from + count {
        let offset = index * CHUNK as u64 % cluster.size_bytes;
        cluster.nodes[0].machine.write(offset, payload(index, CHUNK)).await;
    }
    cluster.nodes[0].machine.flush().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a36_secondaries_follow_and_end_byte_for_byte_equal() {
    let cluster = followed(3, Shape::default()).await;
    write_some(&cluster, 0, 200).await;
    for node in &cluster.nodes[1..] {
        node.until_like(&cluster.nodes[0]).await;
    }
    cluster.nodes[0]
        .until("written back", |status| status.applied == status.durable)
        .await;
    let expected = cluster.nodes[0].disk();
    for node in &cluster.nodes[1..] {
        assert!(node.disk() == expected, "the disk of node {} differs", node.index);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_backlog_arrives_over_several_lanes_and_compressed() {
    let shape = Shape {
        congestion: Congestion::Default,
        compression: Compression::Lz4,
        ..Shape::default()
    };
    let cluster = followed(2, shape).await;
    cluster.nodes[0].wire.cut();
    cluster.nodes[1].wire.cut();
    write_some(&cluster, 0, 800).await;
    cluster.nodes[0].wire.heal();
    cluster.nodes[1].wire.heal();
    cluster.nodes[1].until_like(&cluster.nodes[0]).await;
    cluster.nodes[0]
        .until("written back", |status| status.applied == status.durable)
        .await;
    assert!(cluster.nodes[1].disk() == cluster.nodes[0].disk());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a13_damaged_log_is_not_shipped_and_named_by_the_member_whose_it_is() {
    let cluster = followed(2, Shape::default()).await;
    let (primary, secondary) = (&cluster.nodes[0], &cluster.nodes[1]);
    secondary.until_like(primary).await;
    primary.wire.cut();
    secondary.wire.cut();
    write_some(&cluster, 0, 40).await;
    primary
        .until("written back", |status| status.applied == status.durable)
        .await;
    primary.damage_log(&payload(20, 64 << 10)[1000..1064]);
    primary.wire.heal();
    secondary.wire.heal();
    let named = |fault: &Fault| matches!(fault, Fault::BacklogDefect { .. });
    primary
        .until("it is named", |status| status.faults.iter().any(named))
        .await;
    let status = secondary.now();
    assert!(status.durable.lsn < primary.now().durable.lsn && status.data == DataState::Consistent);
    // Whoever has the whole data goes on.
    write_some(&cluster, 40, 1).await;
    assert_eq!(primary.now().role, Role::Primary);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_break_again_and_again_lose_and_double_nothing() {
    let cluster = followed(2, Shape::default()).await;
    let disturber = cluster.nodes[0].wire.clone();
    let disturbing = tokio::spawn(async move {
        loop {
            tokio::time::sleep(Duration::from_millis(300)).await;
            disturber.disturb();
        }
    });
    for round in 0..10 {
        write_some(&cluster, round * 60, 60).await;
    }
    disturbing.abort();
    cluster.nodes[1].until_like(&cluster.nodes[0]).await;
    cluster.nodes[0]
        .until("written back", |status| status.applied == status.durable)
        .await;
    assert!(cluster.nodes[1].disk() == cluster.nodes[0].disk());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a34_a38_a_third_member_serves_what_the_destroyed_primary_cannot() {
    let mut cluster = followed(3, Shape::default()).await;
    // Node 2 is cut off from everybody while node 1 follows.
    cluster.nodes[2]
        .machine
        .order(Command::SetSwitches(Switches {
            fetch: false,
            ..all_on()
        }))
        .await
        .unwrap();
    write_some(&cluster, 0, 300).await;
    cluster.nodes[1].until_like(&cluster.nodes[0]).await;
    let synced_before = cluster.nodes[2].replication().synced_bytes;
    cluster.nodes[0].kill().await;
    cluster.nodes[2]
        .machine
        .order(Command::SetSwitches(all_on()))
        .await
        .unwrap();
    cluster.nodes[2].until_like(&cluster.nodes[1]).await;
    assert_eq!(
        cluster.nodes[2].replication().synced_bytes,
        synced_before,
        "not a byte may come by sync"
    );
    assert!(cluster.nodes[2].disk() == cluster.nodes[1].disk());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a34_restarted_members_whose_primary_is_gone_find_its_history_by_its_epoch() {
    let mut cluster = followed(3, Shape::default()).await;
    let off = Switches {
        fetch: false,
        ..all_on()
    };
    cluster.nodes[2].machine.order(Command::SetSwitches(off)).await.unwrap();
    write_some(&cluster, 0, 100).await;
    cluster.nodes[1].until_like(&cluster.nodes[0]).await;
    let (primary, epoch) = (cluster.nodes[0].replica, cluster.nodes[0].now().durable.epoch);
    for index in 0..3 {
        cluster.nodes[index].kill().await;
    }
    // Nobody has heard of the primary since it started; all they have is what they were told.
    let told = |epoch| Wish {
        designation: designation(1),
        designated: Some(primary),
        epoch,
        ..Wish::default()
    };
    cluster.announce(|_| told(None));
    cluster.nodes[1].restart().await;
    cluster.nodes[2].restart().await;
    cluster.nodes[2]
        .machine
        .order(Command::SetSwitches(all_on()))
        .await
        .unwrap();
    let waits = Activity::Waiting(Wait::NoPrimary.to_string());
    let deadline = Instant::now() + LIMIT;
    while cluster.nodes[2].replication().fetch != waits {
        assert!(Instant::now() < deadline, "{:?}", cluster.nodes[2].replication());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    cluster.announce(|_| told(Some(epoch)));
    cluster.nodes[2].until_like(&cluster.nodes[1]).await;
    assert!(cluster.nodes[2].disk() == cluster.nodes[1].disk());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a30_fetch_goes_on_while_replay_is_held_back() {
    let cluster = followed(2, Shape::default()).await;
    let held = Switches {
        replay: false,
        ..all_on()
    };
    cluster.nodes[1]
        .machine
        .order(Command::SetSwitches(held))
        .await
        .unwrap();
    let before = cluster.nodes[1].now().applied;
    write_some(&cluster, 0, 300).await;
    let end = cluster.nodes[0].now().durable;
    let status = cluster.nodes[1]
        .until("all log fetched", |status| status.durable == end)
        .await;
    assert_eq!(status.applied, before, "nothing may be applied while replay is off");
    cluster.nodes[1]
        .machine
        .order(Command::SetSwitches(all_on()))
        .await
        .unwrap();
    cluster.nodes[1].until_like(&cluster.nodes[0]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_log_disk_slows_the_stream_down_instead_of_filling_memory() {
    let cluster = followed(
        2,
        Shape {
            size_bytes: 128 << 20,
            ..Shape::default()
        },
    )
    .await;
    write_some(&cluster, 0, 1).await;
    cluster.nodes[1].until_like(&cluster.nodes[0]).await;
    let sent_before = cluster.nodes[0].wire.sent.load(Ordering::Relaxed);
    cluster.nodes[1]
        .machine
        .faults
        .slow_sync_ms
        .store(1_000_000, Ordering::Relaxed);
    // 96 MiB are written while the receiver's log disk hangs.
    write_some(&cluster, 1, 1536).await;
    let sent = || cluster.nodes[0].wire.sent.load(Ordering::Relaxed) - sent_before;
    let (mut last, mut since) = (sent(), Instant::now());
    while since.elapsed() < Duration::from_secs(2) {
        tokio::time::sleep(Duration::from_millis(100)).await;
        if sent() > last + (256 << 10) {
            (last, since) = (sent(), Instant::now());
        }
    }
    // Owner 16 MiB, window 8 MiB, HTTP/2 window 8 MiB, queues: well below what was written.
    assert!(
        last < 48 << 20,
        "{} MiB left the source for a receiver that hangs",
        last >> 20
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a53_after_a_failover_the_old_side_stops_at_the_fork_and_everybody_names_it() {
    let cluster = followed(3, Shape::default()).await;
    write_some(&cluster, 0, 50).await;
    for node in &cluster.nodes[1..] {
        node.until_like(&cluster.nodes[0]).await;
    }
    let fork = cluster.nodes[0].now().durable;
    // The old primary loses its connections and goes on writing. The third fetches nothing until it has heard of both sides: whoever
    // hears of the new one first is past the fork, on its side.
    let off = Switches {
        fetch: false,
        ..all_on()
    };
    cluster.nodes[2].machine.order(Command::SetSwitches(off)).await.unwrap();
    for node in &cluster.nodes {
        node.wire.cut();
    }
    write_some(&cluster, 50, 20).await;
    cluster.promote(1, 2, Cause::Failover).await;
    cluster.nodes[1].machine.write(0, payload(999, 4096)).await;
    cluster.nodes[1].machine.flush().await;
    for node in &cluster.nodes {
        node.wire.heal();
    }
    let is_fork = |fault: &Fault| matches!(fault, Fault::Fork { at, .. } if *at == fork.lsn);
    for node in &cluster.nodes {
        node.until("the fork is named", |status| status.faults.iter().any(is_fork))
            .await;
    }
    cluster.nodes[2]
        .machine
        .order(Command::SetSwitches(all_on()))
        .await
        .unwrap();
    let [old, new, third] = [0, 1, 2].map(|index| cluster.nodes[index].now());
    assert_eq!((old.role, new.role), (Role::Primary, Role::Primary), "both go on");
    assert_eq!(
        (third.durable, &third.data),
        (fork, &DataState::Consistent),
        "the third stops before the fork"
    );
    let sizes = |status: &mars_engine::api::ReplicaStatus| {
        status.faults.iter().find_map(|fault| match fault {
            Fault::Fork {
                ours_bytes,
                theirs_bytes,
                ..
            } => Some((*ours_bytes, *theirs_bytes)),
            _ => None,
        })
    };
    let (beyond_old, beyond_new) = (20 * (65536 + 40), 4096 + 40);
    assert_eq!(sizes(&old), Some((beyond_old, beyond_new)));
    assert_eq!(sizes(&new), Some((beyond_new, beyond_old)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a35_a_member_that_stayed_away_too_long_is_an_orphan_with_the_reason_and_comes_back_by_sync() {
    let shape = Shape {
        segment_bytes: 1 << 20,
        retention_bytes: 4 << 20,
        ..Shape::default()
    };
    let cluster = followed(3, shape).await;
    cluster.nodes[2]
        .machine
        .order(Command::SetSwitches(Switches {
            fetch: false,
            ..all_on()
        }))
        .await
        .unwrap();
    let behind = cluster.nodes[2].now().durable;
    for round in 0..8 {
        write_some(&cluster, round * 50, 50).await;
        cluster.nodes[1].until_like(&cluster.nodes[0]).await;
    }
    for node in &cluster.nodes[..2] {
        node.until("log given up", |status| status.log_start > behind.lsn).await;
    }
    cluster.nodes[2]
        .machine
        .order(Command::SetSwitches(all_on()))
        .await
        .unwrap();
    let orphan = cluster.nodes[2]
        .until("named an orphan", |status| {
            status.faults.iter().any(|f| matches!(f, Fault::Orphan { .. }))
        })
        .await;
    assert_eq!(
        (orphan.durable, &orphan.data),
        (behind, &DataState::Consistent),
        "nothing is thrown away by itself"
    );
    cluster.nodes[2].machine.order(Command::Invalidate).await.unwrap();
    cluster.nodes[2]
        .until("consistent again", |status| status.data == DataState::Consistent)
        .await;
    cluster.nodes[2].until_like(&cluster.nodes[0]).await;
    cluster.nodes[0]
        .until("written back", |status| status.applied == status.durable)
        .await;
    assert!(cluster.nodes[2].disk() == cluster.nodes[0].disk());
    cluster.nodes[2]
        .until("no fault is left", |status| status.faults.is_empty())
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a50_the_successor_gets_exactly_the_released_end_and_others_follow_it() {
    let cluster = followed(3, Shape::default()).await;
    write_some(&cluster, 0, 40).await;
    let to = cluster.nodes[1].replica;
    let close = Command::Close {
        designation: designation(2),
        to: Some(to),
    };
    cluster.nodes[0].machine.order(close).await.unwrap();
    let released = cluster.nodes[0].now().released.expect("released").end;
    let before = cluster.nodes[0].replica;
    cluster.announce(|index| Wish {
        designation: designation(2),
        designated: Some(to),
        handover: true,
        predecessor: Some(before),
        epoch: Some(released.epoch),
        handover_end: (index == 1).then_some(released),
    });
    cluster.nodes[1]
        .until("exactly the released end", |status| status.durable == released)
        .await;
    cluster.promote(1, 2, Cause::Handover).await;
    cluster.nodes[1].machine.write(0, payload(7, 8192)).await;
    cluster.nodes[1].machine.flush().await;
    for index in [0, 2] {
        cluster.nodes[index].until_like(&cluster.nodes[1]).await;
        assert!(cluster.nodes[index].now().faults.is_empty());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_was_killed_goes_on_where_its_log_ends() {
    let mut cluster = followed(2, Shape::default()).await;
    write_some(&cluster, 0, 100).await;
    cluster.nodes[1].kill().await;
    write_some(&cluster, 100, 100).await;
    cluster.nodes[1].restart().await;
    cluster.nodes[1].until_like(&cluster.nodes[0]).await;
    let from = Activity::From(cluster.nodes[0].replica);
    let deadline = Instant::now() + LIMIT;
    while cluster.nodes[1].replication().fetch != from {
        assert!(Instant::now() < deadline, "{:?}", cluster.nodes[1].replication());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(cluster.nodes[1].replication().synced_bytes, 0);
}
