//! Reading: one object, or a list with selectors, pages and resource versions.
//!
//! Invariant: all pages of a list show one revision; a page of a picture that is gone answers 410, never a mixture.

use super::respond::{Answer, respond};
use super::{Api, Form, Incoming, Target};
use crate::error::ApiError;
use crate::registry::Kind;
use crate::selector::Selector;
use crate::storage::{Key, Object};
use crate::table;
use axum::http::StatusCode;
use axum::response::Response;
use base64::Engine as _;
use serde_json::{Value, json};
use std::sync::Arc;

/// Key of the object a target names.
pub(super) fn key(kind: &Kind, target: &Target) -> Key {
    Key {
        kind: Arc::clone(&kind.storage),
        namespace: target.namespace.as_deref().unwrap_or_default().into(),
        name: target.name.as_deref().unwrap_or_default().into(),
    }
}

/// Where the next page begins.
#[derive(Debug, PartialEq, Eq)]
struct Continue {
    revision: u64,
    namespace: String,
    name: String,
}

impl Continue {
    fn encode(&self) -> String {
        let text = json!([self.revision, self.namespace, self.name]).to_string();
        base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(text)
    }

    fn decode(token: &str) -> Result<Self, ApiError> {
        let raw = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(token).ok();
        let parts = raw.and_then(|raw| serde_json::from_slice::<(u64, String, String)>(&raw).ok());
        let bad = || ApiError::bad_request("continue key is not valid");
        parts
            .map(|(revision, namespace, name)| Self {
                revision,
                namespace,
                name,
            })
            .ok_or_else(bad)
    }
}

impl Api {
    pub(super) fn get(&self, incoming: &Incoming, kind: &Kind, target: &Target) -> Result<Answer, ApiError> {
        let key = key(kind, target);
        let found = match self.faults.stale_by(incoming.client.as_deref(), &kind.storage) {
            Some(behind) => self.past(kind, behind).0.into_iter().find(|o| is(o, &key)),
            None => self.store.get(&key),
        };
        let object = found.ok_or_else(|| ApiError::not_found(&kind.subject(&key.name)))?;
        Ok(Answer::stored(StatusCode::OK, &object))
    }

    /// The objects of a kind as they were `behind` revisions ago, as far as history goes; for stale reads.
    pub(crate) fn past(&self, kind: &Kind, behind: u64) -> (Vec<Arc<Object>>, u64) {
        for behind in [behind, behind / 2, behind / 4] {
            let revision = self.store.revision().saturating_sub(behind);
            if let Ok(list) = self.store.list_at(&kind.storage, None, revision) {
                return (list, revision);
            }
        }
        self.store.list(&kind.storage, None)
    }

    /// The picture a list request asks for, and its revision.
    fn picture(
        &self,
        incoming: &Incoming,
        kind: &Kind,
        namespace: Option<&str>,
        token: Option<&Continue>,
    ) -> Result<(Vec<Arc<Object>>, u64), ApiError> {
        let current = self.store.revision();
        let expired = |_| {
            ApiError::expired(
                "The provided continue parameter is too old to display a consistent list result. You can start a new list without the continue parameter.",
            )
        };
        if let Some(token) = token {
            let list = self
                .store
                .list_at(&kind.storage, namespace, token.revision)
                .map_err(expired)?;
            return Ok((list, token.revision));
        }
        let wanted = incoming.query.number("resourceVersion")?;
        if let Some(wanted) = wanted.filter(|wanted| *wanted > current) {
            return Err(ApiError::too_large_resource_version(wanted, current));
        }
        if incoming.query.text("resourceVersionMatch") == "Exact" {
            let revision = wanted.filter(|r| *r > 0).ok_or_else(|| {
                ApiError::bad_request(
                    "resourceVersionMatch Exact is forbidden unless resourceVersion is provided and not 0",
                )
            })?;
            let list = self
                .store
                .list_at(&kind.storage, namespace, revision)
                .map_err(|e| ApiError::expired(e.to_string()))?;
            return Ok((list, revision));
        }
        if let Some(behind) = self.faults.stale_by(incoming.client.as_deref(), &kind.storage) {
            let (mut list, revision) = self.past(kind, behind);
            list.retain(|o| namespace.is_none_or(|ns| crate::meta::namespace(&o.value) == ns));
            return Ok((list, revision));
        }
        Ok(self.store.list(&kind.storage, namespace))
    }

    pub(super) fn list(&self, incoming: &Incoming, kind: &Kind, target: &Target) -> Result<Response, ApiError> {
        let query = &incoming.query;
        let selector = Selector::parse(kind, query.text("labelSelector"), query.text("fieldSelector"))?;
        let token = match query.text("continue") {
            "" => None,
            text => Some(Continue::decode(text)?),
        };
        let limit = query
            .number("limit")?
            .filter(|l| *l > 0)
            .and_then(|l| usize::try_from(l).ok());
        let (list, revision) = self.picture(incoming, kind, target.namespace.as_deref(), token.as_ref())?;
        let place = |o: &Object| {
            (
                crate::meta::namespace(&o.value).to_owned(),
                crate::meta::name(&o.value).to_owned(),
            )
        };
        let mut rows: Vec<Arc<Object>> = list
            .into_iter()
            .filter(|o| selector.matches(&o.value))
            .filter(|o| {
                token
                    .as_ref()
                    .is_none_or(|t| place(o) >= (t.namespace.clone(), t.name.clone()))
            })
            .collect();
        let mut metadata = json!({"resourceVersion": revision.to_string()});
        if let Some(limit) = limit.filter(|limit| *limit < rows.len()) {
            let (namespace, name) = place(&rows[limit]);
            metadata["continue"] = Continue {
                revision,
                namespace,
                name,
            }
            .encode()
            .into();
            metadata["remainingItemCount"] = (rows.len() - limit).into();
            rows.truncate(limit);
        }
        let body = list_body(kind, incoming.accept.form, &rows, &metadata);
        Ok(respond(StatusCode::OK, &body, incoming.accept.yaml))
    }
}

fn is(object: &Object, key: &Key) -> bool {
    crate::meta::name(&object.value) == &*key.name && crate::meta::namespace(&object.value) == &*key.namespace
}

fn list_body(kind: &Kind, form: Form, rows: &[Arc<Object>], metadata: &Value) -> Value {
    match form {
        Form::Object => {
            let items: Vec<Value> = rows.iter().map(|o| kind.show(&o.value)).collect();
            json!({"kind": kind.list_kind(), "apiVersion": kind.api_version(), "metadata": metadata, "items": items})
        }
        Form::Partial => {
            let items: Vec<Value> = rows.iter().map(|o| table::partial(&kind.show(&o.value))).collect();
            json!({"kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1", "metadata": metadata, "items": items})
        }
        Form::Table(include) => {
            let rows: Vec<(&Value, Value)> = rows.iter().map(|o| (&o.value, kind.show(&o.value))).collect();
            table::table(kind, &rows, metadata, include)
        }
    }
}
