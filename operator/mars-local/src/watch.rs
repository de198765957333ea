//! Watches: a stream of changes from a revision on, as objects, metadata or tables.
//!
//! Invariants:
//! - A watch keeps a position in the history, not a queue: a slow client costs nothing, and one that falls out of the
//!   history is told so (410) and ended, never silently skipped ahead.
//! - Without faults, changes come in order of revision and none is left out.
//! - A bookmark's revision is never above a change of this watch that has not been sent.

use crate::error::ApiError;
use crate::faults::WatchFaults;
use crate::registry::Kind;
use crate::selector::Selector;
use crate::server::{Api, Form, Incoming, Target, raw};
use crate::storage::{Event, Object, Store};
use crate::table;
use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Changes taken from history at once.
const BATCH: usize = 128;
/// Time between bookmarks of an idle watch.
const BOOKMARK_EVERY: Duration = Duration::from_mins(1);
/// Shortest default length of a watch; up to twice that, so that clients do not all come back at once.
const DEFAULT_SECONDS: u64 = 1_800;

struct Watch {
    store: Arc<Store>,
    kind: Arc<Kind>,
    namespace: Option<String>,
    selector: Selector,
    form: Form,
    bookmarks: bool,
    position: u64,
    queue: VecDeque<Bytes>,
    deadline: Instant,
    next_bookmark: Instant,
    revisions: tokio::sync::watch::Receiver<u64>,
    stop: CancellationToken,
    faults: WatchFaults,
    over: bool,
}

/// Starts a watch.
///
/// # Errors
/// Selectors or numbers that are not understood.
pub(crate) fn start(
    api: &Arc<Api>,
    incoming: &Incoming,
    kind: &Arc<Kind>,
    target: &Target,
) -> Result<Response, ApiError> {
    let query = &incoming.query;
    let mut fields = query.text("fieldSelector").to_owned();
    if let Some(name) = &target.name {
        fields = format!("metadata.name={name}");
    }
    let selector = Selector::parse(kind, query.text("labelSelector"), &fields)?;
    let seconds = query.number("timeoutSeconds")?.filter(|s| *s > 0);
    let seconds = seconds.unwrap_or_else(|| DEFAULT_SECONDS + rand::random_range(0..DEFAULT_SECONDS));
    let from = query.number("resourceVersion")?.unwrap_or(0);
    let now = Instant::now();
    let mut watch = Watch {
        store: Arc::clone(&api.store),
        kind: Arc::clone(kind),
        namespace: target.namespace.clone(),
        selector,
        form: incoming.accept.form,
        bookmarks: query.flag("allowWatchBookmarks"),
        position: from,
        queue: VecDeque::new(),
        deadline: now + Duration::from_secs(seconds),
        next_bookmark: now + BOOKMARK_EVERY,
        revisions: api.store.subscribe(),
        stop: api.stop.clone(),
        faults: api.faults.watch(incoming.client.as_deref(), &kind.storage),
        over: false,
    };
    let send_initial = match query.text("sendInitialEvents") {
        "" => from == 0,
        _ => query.flag("sendInitialEvents"),
    };
    if from > api.store.revision() {
        // Another cluster's revision, or one from before the state was lost: only a new list helps the client.
        watch.expire(&format!(
            "too large resource version: {from}, current: {}",
            api.store.revision()
        ));
    } else if send_initial {
        watch.send_initial(!query.text("sendInitialEvents").is_empty());
    }
    let stream = futures::stream::unfold(watch, |mut watch| async move {
        watch.next().await.map(|frame| (frame, watch))
    });
    Ok(raw("application/json", Body::from_stream(stream)))
}

impl Watch {
    /// Everything there is as ADDED, then, if asked for, the bookmark that says it was everything.
    fn send_initial(&mut self, with_end: bool) {
        let (list, revision) = self.store.list(&self.kind.storage, self.namespace.as_deref());
        for object in list.iter().filter(|o| self.selector.matches(&o.value)) {
            let frame = self.frame("ADDED", object);
            self.queue.push_back(frame);
        }
        self.position = revision;
        if with_end {
            let end = self.bookmark(json!({"k8s.io/initial-events-end": "true"}));
            self.queue.push_back(end);
        }
    }

    fn frame(&self, ty: &str, object: &Object) -> Bytes {
        let shown = self.kind.show(&object.value);
        let body = match self.form {
            Form::Object => shown,
            Form::Partial => table::partial(&shown),
            Form::Table(include) => {
                let metadata = json!({"resourceVersion": object.revision.to_string()});
                table::table(&self.kind, &[(&object.value, shown)], &metadata, include)
            }
        };
        line(&json!({"type": ty, "object": body}))
    }

    fn bookmark(&self, annotations: Value) -> Bytes {
        let mut metadata = json!({"resourceVersion": self.position.to_string(), "creationTimestamp": null});
        if annotations.as_object().is_some_and(|a| !a.is_empty()) {
            metadata["annotations"] = annotations;
        }
        let object = match self.form {
            Form::Table(_) => table::table(&self.kind, &[], &metadata, table::Include::Nothing),
            Form::Partial => {
                json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata})
            }
            Form::Object => {
                json!({"kind": self.kind.kind, "apiVersion": self.kind.api_version(), "metadata": metadata})
            }
        };
        line(&json!({"type": "BOOKMARK", "object": object}))
    }

    fn expire(&mut self, message: &str) {
        let status = ApiError::expired(message).status();
        self.queue.push_back(line(&json!({"type": "ERROR", "object": status})));
        self.over = true;
    }

    /// The next frame; none ends the stream.
    async fn next(&mut self) -> Option<Result<Bytes, std::io::Error>> {
        loop {
            if let Some(frame) = self.queue.pop_front() {
                return Some(Ok(frame));
            }
            if self.over {
                return None;
            }
            self.revisions.mark_unchanged();
            match self
                .store
                .changes(&self.kind.storage, self.namespace.as_deref(), self.position, BATCH)
            {
                Ok((events, upto)) => {
                    self.position = upto;
                    if !events.is_empty() {
                        self.deliver(events).await;
                        continue;
                    }
                }
                Err(gap) => {
                    self.expire(&format!("too old resource version: {} ({})", gap.wanted, gap.oldest));
                    continue;
                }
            }
            let bookmark_at = if self.bookmarks {
                self.next_bookmark
            } else {
                self.deadline
            };
            let held_until = self.faults.held_until();
            tokio::select! {
                () = self.stop.cancelled() => self.over = true,
                () = self.faults.cut() => self.over = true,
                changed = self.revisions.changed() => self.over = changed.is_err(),
                () = tokio::time::sleep_until(held_until.unwrap_or(self.deadline)), if held_until.is_some() => {
                    for event in self.faults.release() {
                        self.queue_event(&event);
                    }
                }
                () = tokio::time::sleep_until(self.deadline) => self.over = true,
                () = tokio::time::sleep_until(bookmark_at), if self.bookmarks => {
                    let frame = self.bookmark(json!({}));
                    self.queue.push_back(frame);
                    self.next_bookmark = Instant::now() + BOOKMARK_EVERY;
                }
            }
        }
    }

    /// Passes changes on, through the faults.
    async fn deliver(&mut self, events: Vec<Arc<Event>>) {
        for event in events {
            let (ready, ends) = self.faults.pass(event).await;
            for event in ready {
                self.queue_event(&event);
            }
            if ends {
                self.over = true;
                return;
            }
        }
    }

    /// Queues a change as this watch's selector sees it.
    fn queue_event(&mut self, event: &Event) {
        let before = event.before.as_ref().is_some_and(|o| self.selector.matches(&o.value));
        let after = !event.deleted && self.selector.matches(&event.object.value);
        let ty = match (before, after) {
            (false, true) => "ADDED",
            (true, true) => "MODIFIED",
            (true, false) => "DELETED",
            (false, false) => return,
        };
        let frame = self.frame(ty, &event.object);
        self.queue.push_back(frame);
    }
}

fn line(value: &Value) -> Bytes {
    let mut text = value.to_string();
    text.push('\n');
    Bytes::from(text)
}
