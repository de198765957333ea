//! Kubernetes Events that say why, as core/v1 (which every API server has).
//!
//! Invariant: an event is words; failing to write one never fails a pass. The same words about the same object are not
//! repeated within ten minutes, and the memory for that is bounded.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::api::PostParams;
use kube::{Api, Client, Resource};
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use uuid::Uuid;

use crate::plan::{EventNote, Severity};

const REPEAT_AFTER: Duration = Duration::from_mins(10);
const REMEMBERED: usize = 1024;
/// API servers refuse longer messages.
const LONGEST_MESSAGE: usize = 1000;

/// Writes events.
pub struct Recorder {
    client: Client,
    instance: String,
    recent: Mutex<BTreeMap<String, Instant>>,
}

impl Recorder {
    /// Events will carry `instance` as their reporting instance.
    #[must_use]
    pub fn new(client: Client, instance: String) -> Self {
        Recorder {
            client,
            instance,
            recent: Mutex::default(),
        }
    }

    /// Tells people about `object`.
    pub async fn emit<K: Resource<DynamicType = ()>>(&self, object: &K, note: &EventNote) {
        let reference = object.object_ref(&());
        let key = format!("{:?} {} {}", reference.uid, note.reason, note.message);
        if !self.is_news(key) {
            return;
        }
        let api: Api<Event> = Api::namespaced(self.client.clone(), "default");
        let event = self.event(reference, note);
        if let Err(error) = api.create(&PostParams::default(), &event).await {
            tracing::debug!(%error, reason = note.reason, "an event could not be written");
        }
    }

    fn is_news(&self, key: String) -> bool {
        let now = Instant::now();
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        recent.retain(|_, at| now.duration_since(*at) < REPEAT_AFTER);
        if recent.len() >= REMEMBERED {
            recent.clear();
        }
        recent.insert(key, now).is_none()
    }

    fn event(&self, mut reference: ObjectReference, note: &EventNote) -> Event {
        let now = Some(Time(Timestamp::now()));
        let name = reference.name.clone().unwrap_or_default();
        reference.namespace = None;
        Event {
            metadata: ObjectMeta {
                name: Some(format!("{name}.{}", &Uuid::new_v4().simple().to_string()[..16])),
                namespace: Some("default".to_owned()),
                ..ObjectMeta::default()
            },
            involved_object: reference,
            reason: Some(note.reason.clone()),
            message: Some(note.message.chars().take(LONGEST_MESSAGE).collect()),
            type_: Some(match note.severity {
                Severity::Normal => "Normal".to_owned(),
                Severity::Warning => "Warning".to_owned(),
            }),
            first_timestamp: now.clone(),
            last_timestamp: now,
            count: Some(1),
            source: Some(EventSource {
                component: Some("mars-operator".to_owned()),
                host: None,
            }),
            reporting_component: Some("mars-operator".to_owned()),
            reporting_instance: Some(self.instance.clone()),
            ..Event::default()
        }
    }
}
