//! The three ordinary patches: JSON (RFC 6902), merge (RFC 7386) and strategic merge.
//!
//! Invariant: a patch is applied whole or not at all, and it is a pure function of the object and the patch.

mod strategic;

use crate::error::ApiError;
use crate::registry::Kind;
use serde_json::Value;

/// A patch as it came.
#[derive(Clone, Debug)]
pub enum Patch {
    /// `application/json-patch+json`
    Json(json_patch::Patch),
    /// `application/merge-patch+json`
    Merge(Value),
    /// `application/strategic-merge-patch+json`
    Strategic(Value),
}

/// Content types of patches, for messages.
pub const CONTENT_TYPES: &str = "application/json-patch+json, application/merge-patch+json, application/strategic-merge-patch+json, application/apply-patch+yaml";

impl Patch {
    /// Reads a patch of the given content type for a kind.
    ///
    /// # Errors
    /// 415 for an unknown type (or a strategic patch of a custom resource), 400 for a body that is no such patch.
    pub fn parse(kind: &Kind, content_type: &str, body: &[u8]) -> Result<Self, ApiError> {
        let bad = |e: serde_json::Error| ApiError::bad_request(format!("error decoding patch: {e}"));
        match content_type {
            "application/json-patch+json" => Ok(Self::Json(serde_json::from_slice(body).map_err(bad)?)),
            "application/merge-patch+json" => Ok(Self::Merge(serde_json::from_slice(body).map_err(bad)?)),
            "application/strategic-merge-patch+json" if !kind.custom => {
                Ok(Self::Strategic(serde_json::from_slice(body).map_err(bad)?))
            }
            other => Err(ApiError::unsupported_media_type(other, CONTENT_TYPES)),
        }
    }

    /// The object after the patch.
    ///
    /// # Errors
    /// 422 for a JSON patch that does not fit the object (a failed test, an absent path), 400 for directives that are
    /// not understood.
    pub fn apply(&self, kind: &Kind, object: &Value) -> Result<Value, ApiError> {
        let mut new = object.clone();
        match self {
            Self::Json(patch) => json_patch::patch(&mut new, patch).map_err(|e| {
                let mut error = ApiError::invalid(&kind.group, &kind.kind, crate::meta::name(object), &[]);
                error.message = format!("the server rejected our request due to an error in our request: {e}");
                error
            })?,
            Self::Merge(patch) => json_patch::merge(&mut new, patch),
            Self::Strategic(patch) => strategic::merge(&mut new, patch, Some(&kind.schema))?,
        }
        Ok(new)
    }
}
