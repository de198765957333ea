//! The order in which an engine and the kernel are told about durability.

use super::*;
use crate::frontend::{BlockFrontend, FrontendKind};
use crate::shard::RuntimeConfig;
use crate::shard::engine::{Engine, Outcome, Step};
use crate::shard::plain::PlainEngine;
use mars_engine::api::{CommandId, Compression, Io, Now, Submitted};
use std::path::PathBuf;
use std::sync::{Mutex as Lock, PoisonError};
use std::time::Duration;

/// What was asked of whom, in order.
type Story = Arc<Lock<Vec<String>>>;

fn tell(story: &Story, what: String) {
    story.lock().unwrap_or_else(PoisonError::into_inner).push(what);
}

struct TellingEngine(PlainEngine, Story);

impl Engine for TellingEngine {
    fn submit(&mut self, now: Now, tag: u64, io: Io<'_>) -> Submitted {
        self.0.submit(now, tag, io)
    }

    fn command(&mut self, now: Now, id: CommandId, command: Command) {
        if let Command::SetTuning(tuning) = &command {
            tell(&self.1, format!("engine {:?}", tuning.durability));
        }
        self.0.command(now, id, command);
    }

    fn finished(&mut self, now: Now, outcome: Outcome) {
        self.0.finished(now, outcome);
    }

    fn tick(&mut self, now: Now) {
        self.0.tick(now);
    }

    fn next_step(&mut self) -> Option<Step> {
        self.0.next_step()
    }

    fn next_deadline(&self) -> Option<Duration> {
        self.0.next_deadline()
    }

    fn status(&self) -> ReplicaStatus {
        self.0.status()
    }

    fn log_view(&self) -> LogView {
        self.0.log_view()
    }
}

struct TellingFrontend(Story, Duration);

impl BlockFrontend for TellingFrontend {
    fn kind(&self) -> FrontendKind {
        FrontendKind::Loop
    }

    fn leftover(&self, _: ReplicaId) -> Result<Option<Device>, FrontendError> {
        Ok(None)
    }

    fn discard(&self, _: &Device) -> Result<(), FrontendError> {
        Ok(())
    }

    fn open(&self, params: &OpenParams, _: &Seat) -> Result<Device, FrontendError> {
        std::thread::sleep(self.1);
        tell(&self.0, format!("device volatile={}", params.volatile_cache));
        Ok(Device {
            kind: FrontendKind::Loop,
            replica: params.replica,
            link: PathBuf::new(),
            node: "/dev/null".into(),
            major: 0,
            minor: 0,
            diskseq: 0,
            size_bytes: params.size_bytes,
            resize_pending: false,
            survives_restart: true,
        })
    }

    fn resize(&self, _: &Device, _: u64) -> Result<Resized, FrontendError> {
        Ok(Resized::Done)
    }

    fn set_volatile_cache(&self, _: &Device, volatile: bool) -> Result<(), FrontendError> {
        tell(&self.0, format!("device volatile={volatile}"));
        Ok(())
    }

    fn close(&self, _: &Device, _: &Seat) -> Result<(), CloseError> {
        Ok(())
    }
}

fn tuning(durability: Durability) -> Tuning {
    Tuning {
        durability,
        compression: Compression::None,
        overlay_budget_bytes: 1 << 20,
        segment_bytes: 1 << 20,
        retention_bytes: 0,
    }
}

/// A handle whose device takes `delay` to be made, and a runtime to wait in.
fn handle(dir: &std::path::Path, story: &Story, delay: Duration) -> (ReplicaHandle, tokio::runtime::Runtime) {
    let frontend = TellingFrontend(story.clone(), delay);
    let frontends = Frontends::only(Box::new(frontend), dir.to_owned());
    let runtime = Runtime::start(&RuntimeConfig::default(), Arc::new(frontends)).unwrap();
    let file = tempfile::tempfile_in(dir).unwrap();
    file.set_len(1 << 20).unwrap();
    let engine = TellingEngine(PlainEngine::new(file, false).unwrap(), story.clone());
    let waits = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    (runtime.add("told", Box::new(engine)).unwrap(), waits)
}

fn params(durability: Durability) -> AttachParams {
    AttachParams {
        name: "told".parse().unwrap(),
        replica: ReplicaId(uuid::Uuid::nil()),
        frontend: FrontendChoice::Auto,
        tuning: tuning(durability),
        logical_block_bytes: 512,
    }
}

/// Attaches with one durability, changes to the other, and returns the story of each.
fn story_of(first: Durability, then: Durability) -> [Vec<String>; 2] {
    let (dir, story) = (tempfile::tempdir().unwrap(), Story::default());
    let (handle, waits) = handle(dir.path(), &story, Duration::ZERO);
    let take = || std::mem::take(&mut *story.lock().unwrap_or_else(PoisonError::into_inner));
    waits.block_on(async {
        handle.attach(params(first)).await.unwrap();
        let attached = take();
        handle.command(Command::SetTuning(tuning(then))).await.unwrap();
        [attached, take()]
    })
}

#[test]
fn a55_a_device_that_is_made_after_nobody_waits_for_it_still_keeps_the_role() {
    let (dir, story) = (tempfile::tempdir().unwrap(), Story::default());
    let (handle, waits) = handle(dir.path(), &story, Duration::from_millis(300));
    waits.block_on(async {
        let given_up =
            tokio::time::timeout(Duration::from_millis(50), handle.attach(params(Durability::OnFlush))).await;
        assert!(given_up.is_err(), "it takes longer");
        let designation = mars_engine::types::Designation::default();
        let refused = handle.command(Command::StepDown { designation }).await;
        assert!(matches!(refused, Err(Refusal::WrongRole { .. })), "{refused:?}");
        assert!(handle.device().borrow().is_some());
        let again = handle.attach(params(Durability::OnFlush)).await;
        assert!(matches!(again, Err(AttachError::Attached(_))), "{again:?}");
    });
}

#[test]
fn p2_a_device_that_was_left_without_flushes_is_served_durably_until_it_sends_them() {
    let [attached, changed] = story_of(Durability::OnFlush, Durability::EveryWrite);
    assert_eq!(
        attached,
        ["engine EveryWrite", "device volatile=true", "engine OnFlush"]
    );
    assert_eq!(changed, ["engine EveryWrite", "device volatile=false"]);
}

#[test]
fn p2_flushes_end_only_after_everything_completed_before_is_durable() {
    let [attached, changed] = story_of(Durability::EveryWrite, Durability::OnFlush);
    assert_eq!(attached, ["engine EveryWrite", "device volatile=false"]);
    assert_eq!(changed, ["device volatile=true", "engine OnFlush"]);
}
