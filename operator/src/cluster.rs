//! The identity of the cluster: a uuid in the Secret `mars-cluster`, created once.
//!
//! Invariant: an existing uuid is never replaced; an adopted one must equal it.

use k8s_openapi::api::core::v1::Secret;
use kube::api::PostParams;
use kube::{Api, Client};
use mars_crds::{CLUSTER_SECRET, CLUSTER_UUID_KEY};
use std::collections::BTreeMap;
use uuid::Uuid;

/// Why there is no usable identity.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// The Secret holds something else.
    #[error(
        "the Secret {CLUSTER_SECRET} in namespace {0} holds no uuid under {CLUSTER_UUID_KEY:?}: restore it from a backup, or \
         take the uuid from status.clusterUuid of any MarsNode"
    )]
    Unreadable(String),
    /// Another uuid was to be adopted.
    #[error("this cluster is {present}, not {wanted}: correct the configured cluster uuid")]
    Other {
        /// In the Secret.
        present: Uuid,
        /// Configured.
        wanted: Uuid,
    },
    /// The API server refuses or does not answer.
    #[error("the Secret {CLUSTER_SECRET} cannot be read or made: {0}")]
    Api(#[from] kube::Error),
}

/// Reads the uuid, or creates it (with `adopt`, this very one).
///
/// # Errors
/// When it cannot be read or made, or contradicts `adopt`.
pub async fn uuid(client: &Client, namespace: &str, adopt: Option<Uuid>) -> Result<Uuid, ClusterError> {
    let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
    for _ in 0..5 {
        if let Some(secret) = api.get_opt(CLUSTER_SECRET).await? {
            let present = read(&secret).ok_or_else(|| ClusterError::Unreadable(namespace.to_owned()))?;
            return match adopt.filter(|wanted| *wanted != present) {
                Some(wanted) => Err(ClusterError::Other { present, wanted }),
                None => Ok(present),
            };
        }
        let uuid = adopt.unwrap_or_else(Uuid::new_v4);
        let mut secret = Secret {
            string_data: Some(BTreeMap::from([(CLUSTER_UUID_KEY.to_owned(), uuid.to_string())])),
            immutable: Some(true),
            type_: Some("Opaque".to_owned()),
            ..Secret::default()
        };
        secret.metadata.name = Some(CLUSTER_SECRET.to_owned());
        match api.create(&PostParams::default(), &secret).await {
            Ok(_) => return Ok(uuid),
            Err(kube::Error::Api(status)) if status.is_already_exists() || status.is_conflict() => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(ClusterError::Unreadable(namespace.to_owned()))
}

fn read(secret: &Secret) -> Option<Uuid> {
    let from_data = secret
        .data
        .as_ref()
        .and_then(|data| data.get(CLUSTER_UUID_KEY))
        .map(|bytes| bytes.0.clone());
    let from_text = secret
        .string_data
        .as_ref()
        .and_then(|data| data.get(CLUSTER_UUID_KEY))
        .map(|text| text.clone().into_bytes());
    let bytes = from_data.or(from_text)?;
    std::str::from_utf8(&bytes).ok()?.trim().parse().ok()
}
