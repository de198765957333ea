//! From a parsed request to an answer in the form the client asked for.
//!
//! Invariant: reading never waits for the disk; writing runs on the blocking pool, so a slow disk holds up no watch.

use super::{Api, Form, Incoming, Target, raw};
use crate::error::ApiError;
use crate::registry::Kind;
use crate::storage::Object;
use crate::table;
use axum::http::{HeaderValue, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use std::sync::Arc;

/// An answer with one object or Status, before it gets its form.
pub(super) struct Answer {
    pub(super) code: StatusCode,
    pub(super) object: Value,
    /// Whether `object` is stored data of the kind (else a Status or list that is shown as it is).
    pub(super) is_stored: bool,
    pub(super) warnings: Vec<String>,
}

impl Answer {
    pub(super) fn stored(code: StatusCode, object: &Arc<Object>) -> Self {
        Self::value(code, object.value.clone())
    }

    pub(super) fn value(code: StatusCode, object: Value) -> Self {
        Self {
            code,
            object,
            is_stored: true,
            warnings: Vec::new(),
        }
    }

    pub(super) fn plain(object: Value) -> Self {
        Self {
            code: StatusCode::OK,
            object,
            is_stored: false,
            warnings: Vec::new(),
        }
    }
}

/// Carries out a request on objects.
pub(super) async fn dispatch(api: &Arc<Api>, incoming: Incoming, target: Target) -> Result<Response, ApiError> {
    let kind = api.kind_of(&target)?;
    check_scope(&kind, &target)?;
    match target.subresource.as_deref() {
        None => {}
        Some("status") if kind.has_status => {}
        Some("finalize") if *kind.storage == *"core/namespaces" => {}
        Some(_) => return Err(ApiError::no_such_path()),
    }
    let has_name = target.name.is_some();
    if incoming.method == Method::GET && (incoming.query.flag("watch") || !has_name) {
        return if incoming.query.flag("watch") {
            crate::watch::start(api, &incoming, &kind, &target)
        } else {
            api.list(&incoming, &kind, &target)
        };
    }
    let accept = incoming.accept;
    let form_kind = Arc::clone(&kind);
    let (api, method) = (Arc::clone(api), incoming.method.clone());
    let work = move || match (method, has_name) {
        (Method::GET, true) => api.get(&incoming, &kind, &target),
        (Method::POST, false) => api.create(&incoming, &kind, &target),
        (Method::PUT, true) => api.update(&incoming, &kind, &target),
        (Method::PATCH, true) => api.patch(&incoming, &kind, &target),
        (Method::DELETE, true) => api.delete(&incoming, &kind, &target),
        (Method::DELETE, false) => api.delete_collection(&incoming, &kind, &target),
        _ => Err(ApiError::method_not_allowed()),
    };
    let answer = tokio::task::spawn_blocking(work).await.map_err(ApiError::internal)??;
    Ok(render(&form_kind, accept.form, accept.yaml, answer))
}

fn check_scope(kind: &Kind, target: &Target) -> Result<(), ApiError> {
    let needs_namespace = kind.namespaced && target.name.is_some();
    let fits = if kind.namespaced {
        target.namespace.is_some() || !needs_namespace
    } else {
        target.namespace.is_none()
    };
    if fits { Ok(()) } else { Err(ApiError::no_such_path()) }
}

fn render(kind: &Kind, form: Form, yaml: bool, answer: Answer) -> Response {
    let body = if answer.is_stored {
        let shown = kind.show(&answer.object);
        match form {
            Form::Object => shown,
            Form::Partial => table::partial(&shown),
            Form::Table(include) => {
                let metadata = json!({"resourceVersion": crate::meta::resource_version(&shown)});
                table::table(kind, &[(&answer.object, shown)], &metadata, include)
            }
        }
    } else {
        answer.object
    };
    let mut response = respond(answer.code, &body, yaml);
    for warning in answer.warnings {
        let text = format!("299 - \"{}\"", warning.replace('\\', "\\\\").replace('"', "\\\""));
        if let Ok(value) = HeaderValue::from_str(&text) {
            response.headers_mut().append("warning", value);
        }
    }
    response
}

/// An object as JSON or YAML.
pub(super) fn respond(code: StatusCode, body: &Value, yaml: bool) -> Response {
    let mut response = if yaml {
        match serde_yaml::to_string(body) {
            Ok(text) => raw("application/yaml", text),
            Err(e) => return ApiError::internal(e).into_response(),
        }
    } else {
        raw("application/json", body.to_string())
    };
    *response.status_mut() = code;
    response
}
