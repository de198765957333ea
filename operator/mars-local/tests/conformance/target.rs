//! The API under test, and a small kind to test it with.
//!
//! Invariant: tests share nothing but the definition: every object has a name made for its test.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, DeleteParams, DynamicObject, ListParams, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use mars_local::embedded::{EmbeddedApi, Setup, kubeconfig};
use serde_json::{Value, json};
use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Longest that anything may take to show.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);
/// Group of the test kind.
pub(crate) const GROUP: &str = "conformance.mars.storage";

/// An API server.
pub(crate) struct Target {
    pub(crate) client: kube::Client,
    pub(crate) kubeconfig: PathBuf,
    /// Only what runs in this process can be compacted and the like.
    pub(crate) embedded: Option<EmbeddedApi>,
    dir: tempfile::TempDir,
    unique: String,
}

fn widget_definition() -> Value {
    json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
    "metadata": {"name": format!("widgets.{GROUP}")},
    "spec": {"group": GROUP, "scope": "Cluster",
        "names": {"plural": "widgets", "singular": "widget", "kind": "Widget", "shortNames": ["wdg"], "categories": ["gadgets"]},
        "versions": [{"name": "v1", "served": true, "storage": true, "subresources": {"status": {}},
            "additionalPrinterColumns": [
                {"name": "Size", "type": "integer", "jsonPath": ".spec.size"},
                {"name": "Ready", "type": "string", "jsonPath": ".status.conditions[?(@.type==\"Ready\")].status"},
                {"name": "Mode", "type": "string", "priority": 1, "jsonPath": ".spec.mode"},
                {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}],
            "schema": {"openAPIV3Schema": {"type": "object", "required": ["spec"], "properties": {
                "spec": {"type": "object", "description": "What is wanted.", "required": ["size"], "properties": {
                    "size": {"type": "integer", "minimum": 1, "maximum": 100, "description": "Size in pieces."},
                    "mode": {"type": "string", "enum": ["Fast", "Safe"], "default": "Safe"},
                    "nodes": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["node"],
                        "items": {"type": "object", "required": ["node"], "properties": {
                            "node": {"type": "string"}, "disk": {"type": "string"}}}}}},
                "status": {"type": "object", "properties": {
                    "phase": {"type": "string"},
                    "conditions": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"],
                        "items": {"type": "object", "required": ["type", "status"], "properties": {
                            "type": {"type": "string"}, "status": {"type": "string"}, "reason": {"type": "string"},
                            "message": {"type": "string"}}}}}}}}}}]}})
}

impl Target {
    /// The API to test, with the test kind established.
    pub(crate) async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let unique = uuid::Uuid::new_v4().simple().to_string()[..8].to_owned();
        let target = if let Some(path) = std::env::var_os("MARS_CONFORMANCE_KUBECONFIG") {
            let kubeconfig = PathBuf::from(path);
            let read =
                kube::config::Kubeconfig::read_from(&kubeconfig).expect("MARS_CONFORMANCE_KUBECONFIG is readable");
            let options = kube::config::KubeConfigOptions::default();
            let config = kube::Config::from_custom_kubeconfig(read, &options).await.unwrap();
            let client = kube::Client::try_from(config).unwrap();
            Self {
                client,
                kubeconfig,
                embedded: None,
                dir,
                unique,
            }
        } else {
            let embedded = EmbeddedApi::start(&dir.path().join("api"), Setup::bare())
                .await
                .unwrap();
            let path = dir.path().join("kubeconfig");
            std::fs::write(&path, kubeconfig(&embedded.url())).unwrap();
            let client = embedded.client().unwrap();
            Self {
                client,
                kubeconfig: path,
                embedded: Some(embedded),
                dir,
                unique,
            }
        };
        target.establish().await;
        target
    }

    async fn establish(&self) {
        let api: Api<CustomResourceDefinition> = Api::all(self.client.clone());
        let definition: CustomResourceDefinition = serde_json::from_value(widget_definition()).unwrap();
        match api.create(&PostParams::default(), &definition).await {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.is_already_exists() => {}
            Err(error) => panic!("the test kind cannot be defined: {error}"),
        }
        until("the test kind is established", || async {
            let found = api.get(&format!("widgets.{GROUP}")).await.ok()?;
            let conditions = found.status?.conditions?;
            conditions
                .iter()
                .any(|c| c.type_ == "Established" && c.status == "True")
                .then_some(())
        })
        .await;
        until("the test kind is served", || async {
            self.widgets().list(&ListParams::default()).await.ok()
        })
        .await;
    }

    /// The test kind.
    pub(crate) fn widgets(&self) -> Api<DynamicObject> {
        Api::all_with(self.client.clone(), &widget_resource())
    }

    /// A name nobody else uses.
    pub(crate) fn name(&self, of: &str) -> String {
        format!("{of}-{}", self.unique)
    }

    /// Labels that mark what this test made.
    pub(crate) fn mark(&self) -> String {
        format!("made-by=test-{}", self.unique)
    }

    /// A widget of this test.
    pub(crate) fn widget(&self, of: &str, spec: &Value) -> DynamicObject {
        object(json!({"apiVersion": format!("{GROUP}/v1"), "kind": "Widget",
            "metadata": {"name": self.name(of), "labels": {"made-by": format!("test-{}", self.unique)}}, "spec": spec}))
    }

    /// Creates a widget of size 1.
    pub(crate) async fn create(&self, of: &str) -> DynamicObject {
        self.widgets()
            .create(&PostParams::default(), &self.widget(of, &json!({"size": 1})))
            .await
            .unwrap()
    }

    /// A directory of this test.
    pub(crate) fn scratch(&self) -> &Path {
        self.dir.path()
    }

    /// Removes what the test made; the embedded API goes as a whole.
    pub(crate) async fn finish(self) {
        if let Some(embedded) = &self.embedded {
            embedded.stop().await;
            return;
        }
        let mine = ListParams::default().labels(&self.mark());
        let _ = self.widgets().delete_collection(&DeleteParams::default(), &mine).await;
    }

    /// A kubectl command on this API.
    pub(crate) fn kubectl(&self) -> Command {
        let program = std::env::var_os("MARS_KUBECTL").unwrap_or_else(|| "kubectl".into());
        let mut command = Command::new(program);
        command
            .env("KUBECONFIG", &self.kubeconfig)
            .env("HOME", self.dir.path())
            .stdin(Stdio::null());
        command.arg("--cache-dir").arg(self.dir.path().join("cache"));
        command
    }

    /// Runs kubectl; returns whether it succeeded, and what it said on stdout and stderr together.
    pub(crate) async fn run(&self, arguments: &[&str]) -> (bool, String) {
        self.run_with(arguments, None).await
    }

    /// As [`Target::run`], with standard input.
    pub(crate) async fn run_with(&self, arguments: &[&str], input: Option<&str>) -> (bool, String) {
        let mut command = tokio::process::Command::from(self.kubectl());
        command
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        if input.is_some() {
            command.stdin(Stdio::piped());
        }
        let mut child = command
            .spawn()
            .expect("kubectl is installed (or named by MARS_KUBECTL)");
        if let (Some(text), Some(mut stdin)) = (input, child.stdin.take()) {
            tokio::io::AsyncWriteExt::write_all(&mut stdin, text.as_bytes())
                .await
                .unwrap();
        }
        let output = tokio::time::timeout(LIMIT * 2, child.wait_with_output())
            .await
            .expect("kubectl ends")
            .unwrap();
        let mut said = String::from_utf8_lossy(&output.stdout).into_owned();
        said.push_str(&String::from_utf8_lossy(&output.stderr));
        (output.status.success(), said)
    }

    /// Runs kubectl, which has to succeed.
    pub(crate) async fn ok(&self, arguments: &[&str]) -> String {
        let (success, said) = self.run(arguments).await;
        assert!(success, "kubectl {}:\n{said}", arguments.join(" "));
        said
    }

    /// Runs kubectl with standard input; it has to succeed.
    pub(crate) async fn ok_with(&self, arguments: &[&str], input: &str) -> String {
        let (success, said) = self.run_with(arguments, Some(input)).await;
        assert!(success, "kubectl {}:\n{said}", arguments.join(" "));
        said
    }

    /// Runs kubectl, which has to fail.
    pub(crate) async fn fails(&self, arguments: &[&str], input: &str) -> String {
        let (success, said) = self.run_with(arguments, Some(input)).await;
        assert!(!success, "kubectl {} should fail:\n{said}", arguments.join(" "));
        said
    }
}

/// The test kind as kube clients address it.
pub(crate) fn widget_resource() -> ApiResource {
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(GROUP, "v1", "Widget"), "widgets")
}

/// JSON as an object.
pub(crate) fn object(value: Value) -> DynamicObject {
    serde_json::from_value(value).unwrap()
}

/// The Status of a refused request.
pub(crate) fn refusal<T: std::fmt::Debug>(outcome: Result<T, kube::Error>) -> kube::core::Status {
    match outcome {
        Err(kube::Error::Api(status)) => *status,
        other => panic!("should be refused by the API: {other:?}"),
    }
}

/// Polls until there is an answer.
pub(crate) async fn until<T, F: Future<Output = Option<T>>>(what: &str, mut look: impl FnMut() -> F) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(Instant::now() < deadline, "waited {LIMIT:?} until {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
