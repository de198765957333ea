//! The embedded API as a library handle: a store in a directory, a loopback address, and a stop.
//!
//! Invariant: when the handle's `stop` returns, nothing of the API runs any more and the directory can be opened again.

use crate::error::Cause;
use crate::registry::Kind;
use crate::server::{Api, ApiSetupError};
use crate::storage::{DEFAULT_HISTORY, DiskError, Store};
use crate::strategy::Admission;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::task::TaskTracker;

/// Default address of the API.
pub const DEFAULT_LISTEN: &str = "127.0.0.1:7780";
/// Changes kept for watchers unless asked otherwise.
pub const DEFAULT_HISTORY_LIMIT: usize = DEFAULT_HISTORY;
/// Longest a stop waits for requests in flight.
const STOP_WITHIN: Duration = Duration::from_secs(5);

/// Why the API cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The stored objects cannot be used.
    #[error(transparent)]
    Store(#[from] DiskError),
    /// A stored or built-in definition cannot be used.
    #[error(transparent)]
    Setup(#[from] ApiSetupError),
    /// The address cannot be used.
    #[error(
        "the API cannot listen on {address}: {source}; another mars-local or program has the port? choose another address (mars-local up: --api, mars-local api: --listen)"
    )]
    Listen {
        /// Address.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// The address is not loopback.
    #[error("{0} is no loopback address; the embedded API has no authentication and is served on loopback only")]
    NotLoopback(SocketAddr),
}

/// What to start.
pub struct Setup {
    /// Address to listen on; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Definitions to install.
    pub definitions: Vec<Value>,
    /// Further checks of objects.
    pub admission: Box<Admission>,
    /// Changes kept for watchers.
    pub history: usize,
}

impl Setup {
    /// An API on a free loopback port, without definitions or further checks.
    #[must_use]
    pub fn bare() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            definitions: Vec::new(),
            admission: Box::new(|_: &Kind, _: Option<&Value>, _: &Value| Vec::<Cause>::new()),
            history: DEFAULT_HISTORY,
        }
    }
}

/// A running API.
pub struct EmbeddedApi {
    api: Arc<Api>,
    address: SocketAddr,
    tasks: TaskTracker,
}

impl EmbeddedApi {
    /// Opens the store in `dir` and serves it.
    ///
    /// # Errors
    /// See [`StartError`].
    pub async fn start(dir: &Path, setup: Setup) -> Result<Self, StartError> {
        if !setup.listen.ip().is_loopback() {
            return Err(StartError::NotLoopback(setup.listen));
        }
        // The port first: a second mars-local should hear about the port before anything of the first is looked at.
        let listener = tokio::net::TcpListener::bind(setup.listen)
            .await
            .map_err(|source| StartError::Listen {
                address: setup.listen,
                source,
            })?;
        let address = listener.local_addr().map_err(|source| StartError::Listen {
            address: setup.listen,
            source,
        })?;
        let store = Store::open_with_history(dir, setup.history)?;
        let api = Api::new(store, setup.admission)?;
        seed(&api, &setup.definitions).map_err(ApiSetupError::Seed)?;
        let tasks = TaskTracker::new();
        let server = Arc::clone(&api);
        tasks.spawn(async move {
            if let Err(error) = server.serve(listener).await {
                tracing::error!(%error, "the API server ended; restart mars-local");
            }
        });
        tasks.spawn(crate::gc::run(Arc::clone(&api)));
        tasks.close();
        Ok(Self { api, address, tasks })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// URL of the server.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The API itself: store, faults.
    #[must_use]
    pub fn api(&self) -> &Arc<Api> {
        &self.api
    }

    /// A client of this API.
    ///
    /// # Errors
    /// What making a client fails with.
    pub fn client(&self) -> Result<kube::Client, kube::Error> {
        self.client_named(None)
    }

    /// A client whose requests carry a name that fault plans can pick out.
    ///
    /// # Errors
    /// What making a client fails with.
    pub fn client_named(&self, name: Option<&str>) -> Result<kube::Client, kube::Error> {
        let mut url = self.url();
        if let Some(name) = name {
            url = format!("{url}/via/{name}");
        }
        kube::Client::try_from(client_config(&url))
    }

    /// Ends all watches and waits for requests in flight (at most 5 s). The directory is free once the handle is dropped.
    pub async fn stop(&self) {
        self.api.stop.cancel();
        if tokio::time::timeout(STOP_WITHIN, self.tasks.wait()).await.is_err() {
            tracing::warn!(
                "requests still in flight after {} s; going on without them",
                STOP_WITHIN.as_secs()
            );
        }
    }
}

/// Client settings for an API at `url`, independent of any kubeconfig of the environment.
#[must_use]
pub fn client_config(url: &str) -> kube::Config {
    let uri = url.parse().unwrap_or_default();
    let mut config = kube::Config::new(uri);
    config.default_namespace = "default".into();
    config
}

/// Definitions and namespaces that every cluster has.
fn seed(api: &Api, definitions: &[Value]) -> Result<(), crate::error::ApiError> {
    for name in ["default", "kube-system", "kube-node-lease"] {
        api.ensure(
            "",
            "namespaces",
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}),
        )?;
    }
    for definition in definitions {
        api.install_definition(definition)?;
    }
    Ok(())
}

/// A kubeconfig for plain kubectl.
#[must_use]
pub fn kubeconfig(url: &str) -> String {
    let config = json!({"apiVersion": "v1", "kind": "Config", "current-context": "mars-local", "preferences": {},
        "clusters": [{"name": "mars-local", "cluster": {"server": url}}],
        "users": [{"name": "mars-local", "user": {}}],
        "contexts": [{"name": "mars-local", "context": {"cluster": "mars-local", "user": "mars-local", "namespace": "default"}}]});
    serde_yaml::to_string(&config).unwrap_or_default()
}
