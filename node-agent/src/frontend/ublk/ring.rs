//! The queue of one device: requests from the `io_uring` go to the owner, which lives on this thread while the device exists.
//!
//! Invariants: a request is committed only with the owner's answer; everything else that concerns the owner (messages, job
//! results, deadlines) ends the same sleep, by a poll of its eventfd in the same ring. An owner that must not be used any more
//! keeps its ring open: a queue that ended would make the kernel fail requests that the next life of the agent can answer.

use crate::shard::host::{Host, Message, Taken};
use crate::shard::pool::panic_message;
use futures::channel::oneshot;
use libublk::helpers::IoBuf;
use libublk::io::{UblkDev, UblkQueue};
use libublk::{BufDesc, UblkError, UblkUringData, sys};
use mars_engine::api::{Io, IoResult, Submitted};
use mars_engine::types::{ByteRange, SECTOR_BYTES};
use rustix::fd::{AsFd, AsRawFd};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::time::Duration;
use tracing::{error, info, warn};

/// Longest sleep of a device's thread.
const IDLE: Duration = Duration::from_mins(1);

/// What the tasks of a device's thread share.
struct Thread {
    host: RefCell<Box<Host>>,
    waiting: RefCell<HashMap<u64, oneshot::Sender<IoResult>>>,
    /// Requests are not handed to the owner any more: it is being shut down for the next life of the agent.
    holding: Cell<bool>,
    /// What the owner said when it failed an assertion: it must not be used any more.
    failed: RefCell<Option<String>>,
}

/// Serves the queue until the device is stopped and returns the owner. Never returns when the owner has stopped while the
/// device goes on: its requests must wait for the next life of the agent, and a queue that ends would fail them.
pub(super) fn serve_queue(queue: u16, device: &UblkDev, host: Box<Host>) -> Option<Box<Host>> {
    let queue = match UblkQueue::new(queue, device) {
        Ok(queue) => Rc::new(queue),
        Err(error) => {
            error!(replica = host.name, ?error, "cannot serve the queue of a ublk device");
            return Some(host);
        }
    };
    let thread = Rc::new(Thread {
        host: RefCell::new(host),
        waiting: RefCell::default(),
        holding: Cell::new(false),
        failed: RefCell::new(None),
    });
    let executor = Rc::new(smol::LocalExecutor::new());
    let depth = device.dev_info.queue_depth;
    let tags: Vec<_> = (0..depth)
        .map(|tag| executor.spawn(serve_tag(queue.clone(), tag, thread.clone())))
        .collect();
    let wake = executor.spawn(watch_mailbox(queue.clone(), thread.clone()));

    let turn = || thread.turn(&executor);
    let poll = || {
        let limit = thread.sleep_limit();
        let limit = io_uring::types::Timespec::new()
            .sec(limit.as_secs())
            .nsec(limit.subsec_nanos());
        std::future::ready(libublk::uring_async::uring_poll_io_fn::<io_uring::squeue::Entry>(
            &queue,
            Some(limit),
            1,
        ))
    };
    let reap = |_timeout| {
        libublk::uring_async::ublk_reap_io_events_with_update_queue(&queue, false, None, |event| {
            libublk::uring_async::ublk_wake_task(event.user_data(), event);
        })
    };
    let done = || tags.iter().all(smol::Task::is_finished);
    let served = catch_unwind(AssertUnwindSafe(|| {
        smol::block_on(libublk::uring_async::run_uring_tasks(poll, reap, turn, done))
    }));
    match served {
        Ok(Ok(())) => {}
        Ok(Err(error)) => error!(?error, "the queue of a ublk device ended"),
        Err(panic) => {
            let message = panic_message(panic.as_ref());
            error!("the engine stopped: {message}; its device pauses until the agent restarts");
            // The ring stays open: a queue that ended would make the kernel fail the requests.
            loop {
                std::thread::park();
            }
        }
    }
    drop((wake, tags, executor));
    Rc::into_inner(thread).map(|thread| thread.host.into_inner())
}

impl Thread {
    /// Runs tasks and the owner until neither has anything to do.
    fn turn(&self, executor: &smol::LocalExecutor<'_>) {
        loop {
            let mut ran = false;
            while executor.try_tick() {
                ran = true;
            }
            if let Some(message) = self.failed.take() {
                panic!("{message}");
            }
            self.drive();
            if !ran {
                return;
            }
        }
    }

    /// Messages, job results and steps of the owner.
    fn drive(&self) {
        let mut host = self.host.borrow_mut();
        host.wake.clear();
        loop {
            match host.take_messages() {
                Taken::Nothing | Taken::Abandoned => break,
                Taken::Message(Message::RemoveSource(told)) => {
                    self.holding.set(true);
                    let _ = told.send(());
                }
                Taken::Message(Message::Stop(told)) => {
                    let _ = told.send(());
                    info!(replica = host.name, "its device waits for the next life of the agent");
                    loop {
                        std::thread::park();
                    }
                }
                // Dropping the sender is the refusal.
                Taken::Message(Message::Leave(_) | Message::AddSource(..)) => {
                    warn!(replica = host.name, "cannot move while a device is served");
                }
                Taken::Message(Message::Command(..)) => unreachable!("take_messages hands commands to the engine"),
            }
        }
        host.pump(&mut |tag, result| {
            if let Some(to) = self.waiting.borrow_mut().remove(&tag) {
                let _ = to.send(result);
            }
        });
    }

    fn sleep_limit(&self) -> Duration {
        let deadline = self.host.borrow().next_deadline();
        let rest = deadline.map_or(IDLE, |deadline| {
            deadline.saturating_sub(crate::shard::engine::now().mono)
        });
        // Never zero: the kernel would not wait at all, and a deadline that is due is seen in this turn anyway.
        rest.clamp(Duration::from_micros(50), IDLE)
    }

    async fn execute(&self, request: &sys::ublksrv_io_desc, buffer: &mut [u8]) -> i32 {
        if self.holding.get() {
            std::future::pending::<()>().await;
        }
        let operation = request.op_flags & 0xff;
        // A flush comes with a start sector that means nothing.
        let start = if operation == sys::UBLK_IO_OP_FLUSH {
            0
        } else {
            request.start_sector
        };
        let len = u64::from(request.nr_sectors) * SECTOR_BYTES;
        let Some(offset) = start.checked_mul(SECTOR_BYTES) else {
            return -libc::EINVAL;
        };
        let range = ByteRange { offset, len };
        let Ok(bytes) = usize::try_from(len) else {
            return -libc::EINVAL;
        };
        let fua = request.op_flags & sys::UBLK_IO_F_FUA != 0;
        let io = match operation {
            sys::UBLK_IO_OP_READ => Io::Read { range },
            sys::UBLK_IO_OP_WRITE => match buffer.get(..bytes) {
                Some(data) => Io::Write {
                    offset: range.offset,
                    data,
                    fua,
                },
                None => return -libc::EINVAL,
            },
            sys::UBLK_IO_OP_FLUSH => Io::Flush,
            sys::UBLK_IO_OP_DISCARD => Io::Discard { range },
            sys::UBLK_IO_OP_WRITE_ZEROES => Io::WriteZeroes { range, fua },
            _ => return -libc::EOPNOTSUPP,
        };
        // A panic in a task would end that task alone.
        let submitted = catch_unwind(AssertUnwindSafe(|| self.host.borrow_mut().submit(io)));
        let (tag, submitted) = match submitted {
            Ok(submitted) => submitted,
            Err(panic) => {
                self.failed.replace(Some(panic_message(panic.as_ref())));
                std::future::pending().await
            }
        };
        let result = match submitted {
            Submitted::Now(result) => result,
            Submitted::Later => {
                let (to, from) = oneshot::channel();
                self.waiting.borrow_mut().insert(tag, to);
                // The sender lives until the owner has answered.
                from.await.unwrap_or(IoResult::Errno(libc::EIO))
            }
        };
        match result {
            IoResult::Errno(errno) => -errno,
            IoResult::Done => i32::try_from(len).unwrap_or(i32::MAX),
            IoResult::Data(data) => match buffer.get_mut(..data.len()) {
                Some(target) => {
                    target.copy_from_slice(&data);
                    i32::try_from(len).unwrap_or(i32::MAX)
                }
                None => -libc::EINVAL,
            },
        }
    }
}

/// One task per tag: the first command registers the buffer and asks for a request; each commit answers one and asks for
/// the next. Ends with an error when the device is stopped.
async fn serve_tag(queue: Rc<UblkQueue<'_>>, tag: u16, thread: Rc<Thread>) -> Result<(), UblkError> {
    let mut buffer = IoBuf::<u8>::new(queue.dev.dev_info.max_io_buf_bytes as usize);
    queue
        .submit_io_prep_cmd(tag, BufDesc::Slice(buffer.as_slice()), 0, Some(&buffer))
        .await?;
    loop {
        let request = *queue.get_iod(tag);
        let result = thread.execute(&request, buffer.as_mut_slice()).await;
        queue
            .submit_io_commit_cmd(tag, BufDesc::Slice(buffer.as_slice()), result)
            .await?;
    }
}

/// Keeps a poll of the owner's eventfd in the ring, so that messages and job results end its sleep.
async fn watch_mailbox(_queue: Rc<UblkQueue<'_>>, thread: Rc<Thread>) {
    let fd = thread.host.borrow().wake.as_fd().as_raw_fd();
    loop {
        let poll =
            io_uring::opcode::PollAdd::new(io_uring::types::Fd(fd), u32::from(libc::POLLIN.unsigned_abs())).build();
        if let Err(error) = libublk::uring_async::ublk_submit_sqe_async(poll, UblkUringData::Target as u64).await {
            error!(?error, "cannot watch the mailbox of a ublk device");
            return;
        }
        // The next poll enters the ring when this turn is over, and the turn clears the counter.
    }
}
