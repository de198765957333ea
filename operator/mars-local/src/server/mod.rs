//! The API server: state, routing, and the loopback listener.
//!
//! Invariants:
//! - Every answer that is an error is a `Status` object; every panic in a handler ends one connection, not the server.
//! - Only loopback names are served (the Host header is checked), so a web page cannot reach the API by DNS rebinding.
//! - Stopping ends all watches at once; no request outlives the stop by more than the grace given by the caller.

mod delete;
mod objects;
mod protobuf;
mod read;
mod request;
mod respond;

pub(crate) use delete::{CLEANUP, FOREGROUND, ORPHAN, Options as DeleteOptions, Propagation};
pub use request::{Accept, Form, Query, Route, Target};

use crate::error::ApiError;
use crate::faults::{Call, Faults, Verdict};
use crate::registry::{CRD_STORAGE, Kind, Registry, kinds_of_crd};
use crate::storage::Store;
use crate::strategy::Admission;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method};
use axum::response::{IntoResponse, Response};
use std::sync::{Arc, PoisonError, RwLock};
use tokio_util::sync::CancellationToken;

/// Largest request body, as the real API server has it.
const MAX_BODY_BYTES: usize = 3 * 1024 * 1024;

/// Everything a request needs. Shared by all connections.
pub struct Api {
    /// The objects.
    pub store: Arc<Store>,
    /// What goes wrong on purpose.
    pub faults: Arc<Faults>,
    /// Ends watches and background work.
    pub stop: CancellationToken,
    registry: RwLock<Arc<Registry>>,
    admission: Box<Admission>,
}

/// Why an API cannot be made from a store.
#[derive(Debug, thiserror::Error)]
pub enum ApiSetupError {
    /// A stored definition cannot be used.
    #[error("stored definition {name}: {source}")]
    Definition {
        /// Which.
        name: String,
        /// Why.
        source: crate::registry::CrdError,
    },
    /// Objects that every cluster has could not be written.
    #[error("writing the objects every cluster has: {0}")]
    Seed(ApiError),
}

impl Api {
    /// An API over `store` with the built-in kinds, the stored definitions and `admission` as further check.
    ///
    /// # Errors
    /// A stored definition that cannot be used.
    pub fn new(store: Store, admission: Box<Admission>) -> Result<Arc<Self>, ApiSetupError> {
        let mut registry = Registry::new();
        for object in store.list(CRD_STORAGE, None).0 {
            let name = crate::meta::name(&object.value).to_owned();
            for kind in kinds_of_crd(&object.value).map_err(|source| ApiSetupError::Definition {
                name: name.clone(),
                source,
            })? {
                registry.add(kind);
            }
        }
        Ok(Arc::new(Self {
            store: Arc::new(store),
            faults: Arc::new(Faults::default()),
            stop: CancellationToken::new(),
            registry: RwLock::new(Arc::new(registry)),
            admission,
        }))
    }

    /// The kinds served at this moment.
    #[must_use]
    pub fn registry(&self) -> Arc<Registry> {
        Arc::clone(&self.registry.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn change_registry(&self, change: impl FnOnce(&mut Registry)) {
        let mut guard = self.registry.write().unwrap_or_else(PoisonError::into_inner);
        let mut registry = Registry::clone(&guard);
        change(&mut registry);
        *guard = Arc::new(registry);
    }

    fn kind_of(&self, target: &Target) -> Result<Arc<Kind>, ApiError> {
        let kind = self.registry().find(&target.group, &target.version, &target.plural);
        kind.ok_or_else(ApiError::no_such_path)
    }

    /// Serves on `listener` until [`Api::stop`] is cancelled.
    ///
    /// # Errors
    /// What accepting connections fails with.
    pub async fn serve(self: Arc<Self>, listener: tokio::net::TcpListener) -> std::io::Result<()> {
        let stop = self.stop.clone();
        let listener = crate::faults::FaultyListener::new(listener, Arc::clone(&self.faults));
        let router = axum::Router::new().fallback(entry).with_state(self);
        axum::serve(listener, router)
            .with_graceful_shutdown(stop.cancelled_owned())
            .await
    }
}

/// One request, with everything about it that handlers look at.
pub(crate) struct Incoming {
    pub(crate) method: Method,
    pub(crate) query: Query,
    pub(crate) accept: Accept,
    pub(crate) headers: HeaderMap,
    pub(crate) body: bytes::Bytes,
    /// Name after `/via/`, by which tests tell clients apart.
    pub(crate) client: Option<String>,
}

impl Incoming {
    /// The media type of the body, without parameters.
    pub(crate) fn content_type(&self) -> &str {
        let header = self
            .headers
            .get("content-type")
            .and_then(|v| v.to_str().ok())
            .unwrap_or_default();
        header.split(';').next().unwrap_or_default().trim()
    }

    /// The field manager: the parameter, or the program name of the user agent.
    pub(crate) fn manager(&self) -> String {
        match self.query.text("fieldManager") {
            "" => {
                let agent = self
                    .headers
                    .get("user-agent")
                    .and_then(|v| v.to_str().ok())
                    .unwrap_or("unknown");
                agent.split('/').next().unwrap_or("unknown").to_owned()
            }
            name => name.to_owned(),
        }
    }
}

/// Whether the Host header names this machine's loopback.
fn is_loopback_host(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get("host").and_then(|h| h.to_str().ok()) else {
        return true;
    };
    let name = match host.rfind(':') {
        Some(at) if !host.ends_with(']') => &host[..at],
        _ => host,
    };
    let name = name.trim_start_matches('[').trim_end_matches(']');
    name == "localhost" || name.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

async fn entry(State(api): State<Arc<Api>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    if !is_loopback_host(&parts.headers) {
        let subject = crate::error::Subject::default();
        return ApiError::forbidden(&subject, "only loopback names are served").into_response();
    }
    let (client, path) = request::client_of(parts.uri.path());
    let (client, path) = (client.map(ToOwned::to_owned), path.to_owned());
    let Some(route) = Route::parse(&path) else {
        return ApiError::no_such_path().into_response();
    };
    let query = axum::extract::Query::try_from_uri(&parts.uri)
        .map(|q| Query(q.0))
        .unwrap_or_default();
    let header = parts
        .headers
        .get("accept")
        .and_then(|v| v.to_str().ok())
        .unwrap_or_default();
    let accept = Accept::parse(header, &query);
    let body = match axum::body::to_bytes(body, MAX_BODY_BYTES).await {
        Ok(body) => body,
        Err(e) => {
            return ApiError::bad_request(format!("reading the body (limit {MAX_BODY_BYTES} bytes): {e}"))
                .into_response();
        }
    };
    // OpenAPI has media types of its own and looks at the header itself.
    let accept = match (accept, &route) {
        (Ok(accept), _) => accept,
        (Err(_), Route::OpenApiV2 | Route::OpenApiV3 | Route::OpenApiV3Of(_)) => Accept {
            form: Form::Object,
            yaml: false,
            aggregated: false,
        },
        (Err(error), _) => return error.into_response(),
    };
    let incoming = Incoming {
        method: parts.method,
        query,
        accept,
        headers: parts.headers,
        body,
        client,
    };
    match route {
        Route::Objects(target) => objects_entry(&api, incoming, target).await,
        other => crate::discovery::answer(&api, &incoming, &other),
    }
}

async fn objects_entry(api: &Arc<Api>, incoming: Incoming, target: Target) -> Response {
    let call = Call {
        client: incoming.client.clone(),
        method: incoming.method.to_string(),
        group: target.group.clone(),
        plural: target.plural.clone(),
        is_watch: incoming.query.flag("watch"),
    };
    let verdict = api.faults.judge(&call).await;
    if let Verdict::Refuse(error) = verdict {
        return error.into_response();
    }
    let outcome = respond::dispatch(api, incoming, target).await;
    if let Verdict::LoseAnswer(error) = verdict {
        // The request has been carried out; its answer is what gets lost.
        return error.into_response();
    }
    outcome.unwrap_or_else(IntoResponse::into_response)
}

/// A body with the given content type.
pub(crate) fn raw(content_type: &'static str, body: impl Into<Body>) -> Response {
    ([("content-type", content_type)], body.into()).into_response()
}
