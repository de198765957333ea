//! The asking side: what `mars-node-agent status` and the like use.

use super::{Devices, FailoverDone, FailoverRequest, Failure};
use serde_json::Value;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;
use uuid::Uuid;

/// An agent that does not answer within this is said not to.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// A failover replays first.
const FAILOVER_LIMIT: Duration = Duration::from_secs(330);
/// Most bytes of an answer.
const ANSWER_BYTES: u64 = 64 << 20;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody listens.
    #[error("no agent answers on {socket} ({source}): is it running, is --run-dir right, are you root?")]
    Unreachable {
        /// The socket.
        socket: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The answer is not what it should be.
    #[error("the agent's answer on {socket} is not understood: {reason}")]
    Garbled {
        /// The socket.
        socket: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The agent says no.
    #[error("{0}")]
    Refused(String),
}

/// Asks the agent whose socket this is.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// The agent with this run directory.
    #[must_use]
    pub fn new(run_dir: &Path) -> Client {
        Client {
            socket: run_dir.join("agent.sock"),
        }
    }

    /// `GET /status`, as it came.
    ///
    /// # Errors
    /// See [`AskError`].
    pub fn status(&self) -> Result<Value, AskError> {
        self.decode(&self.ask("GET", "/status", "", ANSWER_LIMIT)?)
    }

    /// `GET /devices`.
    ///
    /// # Errors
    /// See [`AskError`].
    pub fn devices(&self) -> Result<Devices, AskError> {
        self.decode(&self.ask("GET", "/devices", "", ANSWER_LIMIT)?)
    }

    /// `POST /failover`.
    ///
    /// # Errors
    /// See [`AskError`].
    pub fn failover(&self, resource: &str, acknowledge: Uuid) -> Result<FailoverDone, AskError> {
        let request = FailoverRequest {
            resource: resource.to_owned(),
            acknowledge,
        };
        let body = serde_json::to_string(&request).map_err(|error| self.garbled(error))?;
        self.decode(&self.ask("POST", "/failover", &body, FAILOVER_LIMIT)?)
    }

    fn decode<T: serde::de::DeserializeOwned>(&self, body: &str) -> Result<T, AskError> {
        serde_json::from_str(body).map_err(|error| self.garbled(error))
    }

    fn garbled(&self, reason: impl std::fmt::Display) -> AskError {
        AskError::Garbled {
            socket: self.socket.clone(),
            reason: reason.to_string(),
        }
    }

    /// One request per connection; HTTP/1.0 keeps the answer in one piece.
    fn ask(&self, method: &str, path: &str, body: &str, limit: Duration) -> Result<String, AskError> {
        let unreachable = |source| AskError::Unreachable {
            socket: self.socket.clone(),
            source,
        };
        let mut stream = UnixStream::connect(&self.socket).map_err(unreachable)?;
        stream.set_read_timeout(Some(limit)).map_err(unreachable)?;
        stream.set_write_timeout(Some(ANSWER_LIMIT)).map_err(unreachable)?;
        let length = body.len();
        let request = format!(
            "{method} {path} HTTP/1.0\r\nHost: agent\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        );
        stream.write_all(request.as_bytes()).map_err(unreachable)?;
        let mut answer = String::new();
        stream
            .take(ANSWER_BYTES)
            .read_to_string(&mut answer)
            .map_err(unreachable)?;
        let (head, body) = answer
            .split_once("\r\n\r\n")
            .ok_or_else(|| self.garbled("no end of header"))?;
        let code = head.split(' ').nth(1).unwrap_or_default();
        if code == "200" {
            return Ok(body.to_owned());
        }
        let failure: Result<Failure, _> = serde_json::from_str(body);
        Err(AskError::Refused(failure.map_or_else(
            |_| format!("the agent answered {code}: {body}"),
            |failure| failure.error,
        )))
    }
}
