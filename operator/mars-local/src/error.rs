//! Errors of the API as a Kubernetes `Status` object.
//!
//! Invariant: every refusal a client sees carries the code, the reason word and the details (kind, name, causes) that the
//! real API server gives for the same mistake, because clients branch on them and people read them.

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// One cause of an invalid object: which field, which class of mistake, and the text for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cause {
    /// Reason word, e.g. `FieldValueRequired`.
    pub reason: &'static str,
    /// Path of the field, e.g. `spec.replicas[1].node`.
    pub field: String,
    /// Text without the field name, e.g. `Required value`.
    pub message: String,
}

impl Cause {
    /// A field that has to be there and is not.
    #[must_use]
    pub fn required(field: impl Into<String>, detail: &str) -> Self {
        let message = if detail.is_empty() {
            "Required value".into()
        } else {
            format!("Required value: {detail}")
        };
        Self {
            reason: "FieldValueRequired",
            field: field.into(),
            message,
        }
    }

    /// A value that is not acceptable.
    #[must_use]
    pub fn invalid(field: impl Into<String>, value: &Value, detail: &str) -> Self {
        Self {
            reason: "FieldValueInvalid",
            field: field.into(),
            message: format!("Invalid value: {value}: {detail}"),
        }
    }

    /// A value of another JSON type than the schema says.
    #[must_use]
    pub fn wrong_type(field: impl Into<String>, value: &Value, expected: &str) -> Self {
        let field = field.into();
        let found = json_type(value);
        let message = format!("Invalid value: \"{found}\": {field} in body must be of type {expected}: \"{found}\"");
        Self {
            reason: "FieldValueTypeInvalid",
            field,
            message,
        }
    }

    /// A value that is not one of the supported ones.
    #[must_use]
    pub fn not_supported(field: impl Into<String>, value: &Value, supported: &[Value]) -> Self {
        let list = supported.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let message = format!("Unsupported value: {value}: supported values: {list}");
        Self {
            reason: "FieldValueNotSupported",
            field: field.into(),
            message,
        }
    }

    /// A list entry that is there twice.
    #[must_use]
    pub fn duplicate(field: impl Into<String>, value: &Value) -> Self {
        Self {
            reason: "FieldValueDuplicate",
            field: field.into(),
            message: format!("Duplicate value: {value}"),
        }
    }

    /// A change that is not allowed.
    #[must_use]
    pub fn forbidden(field: impl Into<String>, detail: &str) -> Self {
        Self {
            reason: "FieldValueForbidden",
            field: field.into(),
            message: format!("Forbidden: {detail}"),
        }
    }

    fn text(&self) -> String {
        if self.field.is_empty() {
            self.message.clone()
        } else {
            format!("{}: {}", self.field, self.message)
        }
    }
}

/// The name of a JSON value's type as OpenAPI calls it.
#[must_use]
pub fn json_type(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(n) if n.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// The resource (and object) an error is about, for `details`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Subject {
    /// API group, empty for the core group.
    pub group: String,
    /// Plural resource name, or the kind where the real API names the kind (invalid objects).
    pub resource: String,
    /// Object name, may be empty.
    pub name: String,
}

impl Subject {
    fn qualified(&self) -> String {
        if self.group.is_empty() {
            self.resource.clone()
        } else {
            format!("{}.{}", self.resource, self.group)
        }
    }
}

/// A refusal of the API: HTTP code, reason word, message and details.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// HTTP status code.
    pub code: u16,
    /// Reason word of the Status object.
    pub reason: &'static str,
    /// Text for people.
    pub message: String,
    /// Details of the Status object.
    pub details: Box<Details>,
}

/// Details of a refusal.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Details {
    /// What it is about.
    pub subject: Subject,
    /// Causes, for invalid objects and conflicts of field managers: reason, message, field.
    pub causes: Vec<Value>,
    /// When to try again.
    pub retry_after_seconds: Option<u32>,
}

impl ApiError {
    fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        let message = message.into();
        Self {
            code,
            reason,
            message,
            details: Box::default(),
        }
    }

    /// Names what the error is about.
    #[must_use]
    pub fn about(mut self, subject: &Subject) -> Self {
        self.details.subject = subject.clone();
        self
    }

    /// 400: the request itself makes no sense.
    #[must_use]
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, "BadRequest", message)
    }

    /// 403: understood and refused.
    #[must_use]
    pub fn forbidden(subject: &Subject, why: &str) -> Self {
        let message = format!("{} \"{}\" is forbidden: {why}", subject.qualified(), subject.name);
        Self::new(403, "Forbidden", message).about(subject)
    }

    /// 404 for an object.
    #[must_use]
    pub fn not_found(subject: &Subject) -> Self {
        let message = format!("{} \"{}\" not found", subject.qualified(), subject.name);
        Self::new(404, "NotFound", message).about(subject)
    }

    /// 404 for a path that no kind serves.
    #[must_use]
    pub fn no_such_path() -> Self {
        Self::new(404, "NotFound", "the server could not find the requested resource")
    }

    /// 405: the resource exists, the verb does not.
    #[must_use]
    pub fn method_not_allowed() -> Self {
        let message = "the server does not allow this method on the requested resource";
        Self::new(405, "MethodNotAllowed", message)
    }

    /// 406: none of the accepted media types can be served.
    #[must_use]
    pub fn not_acceptable() -> Self {
        let message = "only the following media types are accepted: application/json, application/yaml";
        Self::new(406, "NotAcceptable", message)
    }

    /// 409: an object of this name is there already.
    #[must_use]
    pub fn already_exists(subject: &Subject) -> Self {
        let message = format!("{} \"{}\" already exists", subject.qualified(), subject.name);
        Self::new(409, "AlreadyExists", message).about(subject)
    }

    /// 409: the caller's picture of the object is stale, or a precondition does not hold.
    #[must_use]
    pub fn conflict(subject: &Subject, why: &str) -> Self {
        let message = format!(
            "Operation cannot be fulfilled on {} \"{}\": {why}",
            subject.qualified(),
            subject.name
        );
        Self::new(409, "Conflict", message).about(subject)
    }

    /// 409 in the words the real API uses for a stale resourceVersion.
    #[must_use]
    pub fn stale(subject: &Subject) -> Self {
        Self::conflict(
            subject,
            "the object has been modified; please apply your changes to the latest version and try again",
        )
    }

    /// 409 of server-side apply: fields that other managers own, as (manager, field) pairs.
    #[must_use]
    pub fn apply_conflict(conflicts: &[(String, String)]) -> Self {
        let plural = if conflicts.len() == 1 { "conflict" } else { "conflicts" };
        let mut message = format!("Apply failed with {} {plural}: ", conflicts.len());
        let list = conflicts
            .iter()
            .map(|(who, field)| format!("conflict with {who}: {field}"));
        message.push_str(&list.collect::<Vec<_>>().join("; "));
        let mut error = Self::new(409, "Conflict", message);
        error.details.causes = conflicts
            .iter()
            .map(|(who, field)| {
                json!({"reason": "FieldManagerConflict", "message": format!("conflict with {who}"), "field": field})
            })
            .collect();
        error
    }

    /// 410: the wanted resource version is no longer in the history.
    #[must_use]
    pub fn expired(message: impl Into<String>) -> Self {
        Self::new(410, "Expired", message)
    }

    /// 415: a body this server cannot read.
    #[must_use]
    pub fn unsupported_media_type(got: &str, supported: &str) -> Self {
        let message = format!(
            "the body of the request was in an unknown format - accepted media types include: {supported} (got \"{got}\")"
        );
        Self::new(415, "UnsupportedMediaType", message)
    }

    /// 422: the object is understood and not valid. `kind` is the kind's name, not the resource.
    #[must_use]
    pub fn invalid(group: &str, kind: &str, name: &str, causes: &[Cause]) -> Self {
        let subject = Subject {
            group: group.into(),
            resource: kind.into(),
            name: name.into(),
        };
        let texts: Vec<String> = causes.iter().map(Cause::text).collect();
        let list = if texts.len() == 1 {
            texts[0].clone()
        } else {
            format!("[{}]", texts.join(", "))
        };
        let mut error = Self::new(
            422,
            "Invalid",
            format!("{} \"{name}\" is invalid: {list}", subject.qualified()),
        );
        error.details.causes = causes
            .iter()
            .map(|c| json!({"reason": c.reason, "message": c.message, "field": c.field}))
            .collect();
        error.about(&subject)
    }

    /// 500: something here failed; the text says what.
    #[must_use]
    pub fn internal(message: impl std::fmt::Display) -> Self {
        Self::new(500, "InternalError", format!("Internal error occurred: {message}"))
    }

    /// 503: not served at the moment.
    #[must_use]
    pub fn unavailable(message: impl Into<String>) -> Self {
        let mut error = Self::new(503, "ServiceUnavailable", message);
        error.details.retry_after_seconds = Some(1);
        error
    }

    /// 504: the wanted resource version has not been reached in time.
    #[must_use]
    pub fn too_large_resource_version(wanted: u64, current: u64) -> Self {
        let message = format!("Too large resource version: {wanted}, current: {current}");
        let mut error = Self::new(504, "Timeout", message);
        error.details.causes =
            vec![json!({"reason": "ResourceVersionTooLarge", "message": "Too large resource version"})];
        error.details.retry_after_seconds = Some(1);
        error
    }

    /// The `Status` object.
    #[must_use]
    pub fn status(&self) -> Value {
        let mut details = serde_json::Map::new();
        if !self.details.subject.name.is_empty() {
            details.insert("name".into(), self.details.subject.name.clone().into());
        }
        if !self.details.subject.group.is_empty() {
            details.insert("group".into(), self.details.subject.group.clone().into());
        }
        if !self.details.subject.resource.is_empty() {
            details.insert("kind".into(), self.details.subject.resource.clone().into());
        }
        if !self.details.causes.is_empty() {
            details.insert("causes".into(), self.details.causes.clone().into());
        }
        if let Some(seconds) = self.details.retry_after_seconds {
            details.insert("retryAfterSeconds".into(), seconds.into());
        }
        let mut status = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": self.message, "reason": self.reason, "code": self.code,
        });
        if !details.is_empty() {
            status["details"] = Value::Object(details);
        }
        status
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let code = StatusCode::from_u16(self.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (code, axum::Json(self.status())).into_response();
        if let Some(seconds) = self.details.retry_after_seconds {
            response.headers_mut().insert("retry-after", seconds.into());
        }
        response
    }
}
