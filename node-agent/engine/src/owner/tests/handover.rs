//! Roles that change hands, and log that is refused.

use super::pair::{catch_up, disk, flush, pair};
use super::{DEVICE, designation, for_seeds, ok, primary};
use crate::api::{Answer, Cause, Command, DataState, Io, IoResult, Refusal, Reply, Role};
use crate::jobs::Job;
use crate::log::reader::{LogReader, Next};
use crate::store_sim::{SimFile, Survival};
use crate::testing::Rig;
use crate::types::Lsn;
use std::time::Duration;

#[test]
fn a50_a_handover_hands_over_everything_and_nothing_is_taken_after_the_close() {
    for_seeds(10, |seed| {
        let (mut a, mut b, mut load) = pair(seed);
        for _ in 0..50 {
            load.step(&mut a);
            a.step();
        }
        let close = a.order(Command::Close {
            designation: designation(2),
            to: Some(b.params.replica),
        });
        let late = a
            .submit(Io::Write {
                offset: 0,
                data: &[1; 512],
                fua: false,
            })
            .1;
        assert!(
            matches!(late, crate::api::Submitted::Now(IoResult::Errno(_))),
            "{late:?}"
        );
        let mut released = None;
        a.run_until(|_| true);
        for _ in 0..10_000 {
            a.step();
            if let Some(reply) = a.reply(close) {
                released = Some(reply.unwrap());
                break;
            }
        }
        let Some(Answer::At(end)) = released else {
            panic!("the close never ends")
        };
        assert_eq!(a.owner().status().released.unwrap().end, end);
        if seed % 2 == 0 {
            // Whatever the slot says, a trailing Close makes it secondary.
            if seed % 4 == 0 {
                a.kill();
            } else {
                a.power_loss(Survival::OnlySynced);
            }
            a.open().unwrap();
            a.settle();
            assert!(a.owner().status().resumable.is_none());
            assert_eq!(a.owner().status().released.unwrap().end, end);
        }
        load.collect(&mut a);
        catch_up(&mut a, &mut b);
        assert_eq!(b.owner().status().durable, end);
        let back = a.command(Command::Promote {
            designation: designation(3),
            cause: Cause::Handover,
        });
        assert!(matches!(back, Some(Err(Refusal::Closed { .. }))), "{back:?}");
        ok(b.command(Command::Promote {
            designation: designation(2),
            cause: Cause::Handover,
        }));
        assert!(b.content() == load.newest());
        // And back as a follower of the new epoch.
        load.write(&mut b, true);
        catch_up(&mut b, &mut a);
        a.settle();
        load.collect(&mut b);
        assert!(disk(&a) == load.newest());
        assert_eq!(a.owner().status().lineage, b.owner().status().lineage);
    });
}

#[test]
fn a56_a_returning_old_primary_with_a_newer_designation_does_not_resume() {
    let (mut a, mut b, mut load) = pair(9);
    load.write(&mut a, true);
    catch_up(&mut a, &mut b);
    a.kill();
    ok(b.command(Command::Promote {
        designation: designation(2),
        cause: Cause::Failover,
    }));
    a.open().unwrap();
    let resumable = a.owner().status().resumable.unwrap();
    ok(a.command(Command::Observe {
        designation: designation(2),
    }));
    assert!(a.owner().status().resumable.is_none());
    let refused = a.command(Command::Resume {
        designation: resumable.designation,
    });
    assert!(matches!(refused, Some(Err(Refusal::WrongRole { .. }))));
    let lower = a.command(Command::Observe {
        designation: designation(1),
    });
    assert!(matches!(lower, Some(Err(Refusal::StaleDesignation { .. }))));
    a.kill();
    a.open().unwrap();
    assert!(
        a.owner().status().resumable.is_none(),
        "the newer designation is remembered"
    );
    // It had nothing more: it simply follows.
    catch_up(&mut b, &mut a);
    assert_eq!(a.owner().status().lineage, b.owner().status().lineage);
}

#[test]
fn a_step_down_leaves_a_history_that_did_not_fork_unforked() {
    let (mut a, mut b, mut load) = pair(10);
    load.write(&mut a, true);
    catch_up(&mut a, &mut b);
    load.collect(&mut a);
    ok(b.command(Command::Promote {
        designation: designation(2),
        cause: Cause::Failover,
    }));
    let end = a.owner().status().durable;
    assert_eq!(
        ok(a.command(Command::StepDown {
            designation: designation(2)
        })),
        Answer::At(end)
    );
    assert_eq!(a.owner().status().role, Role::Secondary);
    catch_up(&mut b, &mut a);
    assert_eq!(a.owner().status().durable, b.owner().status().durable);
}

#[test]
fn log_that_does_not_continue_is_refused() {
    let (mut a, mut b, mut load) = pair(12);
    load.write(&mut a, true);
    catch_up(&mut a, &mut b);
    let view = a.owner().log_view().clone();
    let start = view.segments.first().unwrap().start;
    let mut reader = LogReader::open(a.store.clone(), &view, start).unwrap();
    let chunk = loop {
        match reader.next(&view, Lsn(u64::MAX), 1).unwrap() {
            Next::Records(chunk) => break chunk,
            Next::Epoch(_) => {}
            Next::End => panic!("there is a record"),
        }
    };
    let refused = b.command(Command::AcceptLog(chunk));
    assert!(
        matches!(refused, Some(Err(Refusal::NotContinuing { .. }))),
        "{refused:?}"
    );
}

#[test]
fn a60_log_from_a_clock_more_than_thirty_days_ahead_is_refused_and_the_clock_stays() {
    let (mut a, mut b, mut load) = pair(19);
    a.advance(Duration::from_hours(24 * 31));
    load.write(&mut a, true);
    flush(&mut a);
    let view = a.owner().log_view().clone();
    let from = b.owner().status().appended;
    let mut reader = LogReader::open(a.store.clone(), &view, from).unwrap();
    let Next::Records(chunk) = reader.next(&view, Lsn(u64::MAX), 1 << 20).unwrap() else {
        panic!("there is a record")
    };
    let refused = b.command(Command::AcceptLog(chunk.clone()));
    assert!(
        matches!(&refused, Some(Err(Refusal::Invalid(why))) if why.contains("30 days")),
        "{refused:?}"
    );
    // Set right, it is taken; and what happens here afterwards is stamped later, although this wall clock is behind.
    b.advance(Duration::from_hours(24 * 5));
    ok(b.command(Command::AcceptLog(chunk.clone())));
    b.settle();
    ok(b.command(Command::Promote {
        designation: designation(2),
        cause: Cause::Failover,
    }));
    b.settle();
    let began = b.owner().status().lineage.0.last().unwrap().lamport;
    assert!(began > chunk.records()[0].header.lamport);
}

/// Lets a newer designation be known while a change of role is held up at such jobs.
fn overtaken(mut rig: Rig, order: Command, at: fn(&Job<SimFile>) -> bool) -> (Rig, Option<Reply>) {
    rig.hold = at;
    let role = rig.order(order);
    while rig.run_one_job() {}
    let observed = rig.order(Command::Observe {
        designation: designation(9),
    });
    rig.hold = |_| false;
    rig.settle();
    ok(rig.reply(observed));
    assert_eq!(rig.owner().status().designation, designation(9));
    let reply = rig.reply(role);
    rig.kill();
    rig.open().unwrap();
    let status = rig.owner().status();
    assert_eq!(status.designation, designation(9), "a designation never goes down");
    assert_eq!((status.role, status.resumable), (Role::Secondary, None));
    rig.settle();
    (rig, reply)
}

#[test]
fn a56_a_promotion_that_is_overtaken_by_a_newer_designation_begins_no_epoch() {
    let stages: [fn(&Job<SimFile>) -> bool; 2] = [
        |job| matches!(job, Job::ReadLog { .. } | Job::Rewrite(_)),
        |job| matches!(job, Job::SaveSlot(_)),
    ];
    for at in stages {
        let (mut a, mut b, mut load) = pair(21);
        load.write(&mut a, true);
        catch_up(&mut a, &mut b);
        b.settle();
        let before = b.owner().status().lineage.clone();
        let promote = Command::Promote {
            designation: designation(3),
            cause: Cause::Failover,
        };
        b.kill();
        b.open().unwrap();
        let (mut b, reply) = overtaken(b, promote, at);
        assert!(
            matches!(reply, Some(Err(Refusal::StaleDesignation { .. }))),
            "{reply:?}"
        );
        assert_eq!(b.owner().status().lineage, before);
        load.write(&mut a, true);
        catch_up(&mut a, &mut b);
    }
    let mut killed = primary(20);
    let io = Io::Write {
        offset: 0,
        data: &[1; 4096],
        fua: true,
    };
    assert_eq!(killed.io(io), Some(IoResult::Done));
    killed.kill();
    killed.open().unwrap();
    let designation = killed.owner().status().resumable.unwrap().designation;
    let (_, reply) = overtaken(killed, Command::Resume { designation }, stages[0]);
    assert!(
        matches!(reply, Some(Err(Refusal::StaleDesignation { .. }))),
        "{reply:?}"
    );
    let create = Command::Promote {
        designation,
        cause: Cause::Create,
    };
    let (mut blank, _) = overtaken(Rig::create(4, 24, DEVICE), create, stages[1]);
    assert_eq!(blank.owner().status().data, DataState::Syncing);
    let again = Command::Promote {
        designation: super::designation(10),
        cause: Cause::Create,
    };
    ok(blank.command(again));
}

#[test]
fn a56_a_designation_that_is_heard_of_while_a_role_ends_is_not_forgotten() {
    let designation = designation(3);
    let at: fn(&Job<SimFile>) -> bool = |job| matches!(job, Job::SaveSlot(_) | Job::Sync(_));
    overtaken(primary(22), Command::StepDown { designation }, at);
    overtaken(primary(23), Command::Close { designation, to: None }, at);
}
