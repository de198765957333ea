//! The root-only socket of a running `up`: one JSON request per line, one JSON answer per line.
//!
//! Invariant: the socket file is readable for root alone, and requests are bounded in size and time.

use crate::faults::Plan;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};

/// Longest a request may take.
const LIMIT: Duration = Duration::from_secs(30);
/// Largest request.
const MOST_BYTES: u64 = 1 << 20;

/// What `up` can be asked.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub enum Request {
    /// Whether it is there, and what it does.
    Status,
    /// Stops the operator.
    OperatorStop,
    /// Starts the operator.
    OperatorStart,
    /// Sets the faults of the API; none ends them.
    Faults {
        /// The plan.
        plan: Option<Plan>,
    },
    /// The API serves nobody for a while.
    Outage {
        /// How long.
        millis: u64,
    },
    /// Cuts all watches.
    CutWatches,
    /// Forgets the history: watches that resume get 410.
    Compact,
}

/// Serves the socket; `handle` answers.
pub(super) async fn serve<F, A>(path: &Path, handle: F) -> io::Result<()>
where
    F: Fn(Request) -> A + Clone + Send + 'static,
    A: Future<Output = Result<Value, String>> + Send,
{
    // Only the holder of the state directory's lock gets here, so a socket that is left is a dead one.
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    loop {
        let (stream, _) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "accepting a control connection; trying again");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let handle = handle.clone();
        tokio::spawn(async move {
            let _ = tokio::time::timeout(LIMIT, converse(stream, handle)).await;
        });
    }
}

async fn converse<F, A>(stream: UnixStream, handle: F) -> io::Result<()>
where
    F: Fn(Request) -> A,
    A: Future<Output = Result<Value, String>>,
{
    let (read, mut write) = stream.into_split();
    let mut line = String::new();
    BufReader::new(read.take(MOST_BYTES)).read_line(&mut line).await?;
    let answer = match serde_json::from_str::<Request>(&line) {
        Ok(request) => match handle(request).await {
            Ok(value) => json!({"ok": value}),
            Err(error) => json!({"error": error}),
        },
        Err(error) => json!({"error": format!("the request is not understood: {error}")}),
    };
    write.write_all(format!("{answer}\n").as_bytes()).await
}

/// Asks a running `up`.
///
/// # Errors
/// Nobody listens, or the answer is an error; the text says which.
pub async fn ask(socket: &Path, request: &Request) -> Result<Value, String> {
    let conversation = async {
        let stream = UnixStream::connect(socket).await.map_err(|error| {
            format!(
                "mars-local up does not run for this state directory ({}: {error}); start it first",
                socket.display()
            )
        })?;
        let (read, mut write) = stream.into_split();
        let text = serde_json::to_string(request).map_err(|e| e.to_string())?;
        write
            .write_all(format!("{text}\n").as_bytes())
            .await
            .map_err(|e| e.to_string())?;
        let mut line = String::new();
        BufReader::new(read.take(MOST_BYTES))
            .read_line(&mut line)
            .await
            .map_err(|e| e.to_string())?;
        serde_json::from_str::<Value>(&line).map_err(|e| format!("the answer is not understood: {e}"))
    };
    let answer = tokio::time::timeout(LIMIT, conversation)
        .await
        .map_err(|_| format!("no answer from {} within {} s", socket.display(), LIMIT.as_secs()))??;
    match answer.get("error").and_then(Value::as_str) {
        Some(error) => Err(error.to_owned()),
        None => Ok(answer["ok"].clone()),
    }
}
