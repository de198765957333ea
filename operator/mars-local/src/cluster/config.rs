//! What a cluster is, as written down in `<state>/cluster.json`.
//!
//! Invariants: the cluster uuid never changes; a node is never forgotten by leaving it out of a command line; nothing is
//! taken over from a file of another format.

use super::{FileError, StateDir, file_error, write_private};
use mars_crds::validate::is_dns_label;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use uuid::Uuid;

const FORMAT: u32 = 1;
/// Port of replication unless a node says otherwise.
const REPLICATION_PORT: u16 = 7777;
/// Last byte of the first node's address.
const FIRST_ADDRESS: u8 = 11;
/// Where the API of a new cluster listens unless told otherwise.
pub(super) const DEFAULT_API: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 7780);
/// Most nodes of one cluster.
const MOST_NODES: usize = 26;

/// One node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeConfig {
    /// Its name.
    pub name: String,
    /// Where its agent serves replication.
    pub address: SocketAddr,
}

/// The cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClusterConfig {
    /// Format of this file.
    pub format: u32,
    /// Identity of the cluster.
    pub cluster_uuid: Uuid,
    /// Address of the API.
    pub api: SocketAddr,
    /// Which device frontend the agents use.
    pub frontend: String,
    /// Further arguments of every agent.
    #[serde(default)]
    pub agent_args: Vec<String>,
    /// The nodes, in order.
    pub nodes: Vec<NodeConfig>,
}

/// Why there is no usable cluster in a directory, or why it is not the wanted one.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Trouble with a file.
    #[error(transparent)]
    File(#[from] FileError),
    /// No cluster there.
    #[error("{0} holds no cluster; make one with: mars-local up --state {0}")]
    Absent(String),
    /// Something else is there.
    #[error("{0} is not empty and holds no cluster of mars-local; choose another --state directory")]
    Foreign(String),
    /// Damaged, or of another version.
    #[error("{path} cannot be used: {problem}; restore it from a backup, or take the mars-local that wrote it")]
    Unusable {
        /// The file.
        path: String,
        /// What is wrong.
        problem: String,
    },
    /// The command line does not fit the cluster.
    #[error("{0}")]
    Mismatch(String),
}

/// What the command line says about a cluster; absent parts are as recorded, or the defaults of a new one.
#[derive(Clone, Debug, Default)]
pub struct Wish {
    /// Node names.
    pub nodes: Option<Vec<String>>,
    /// Addresses of single nodes.
    pub addresses: Vec<(String, SocketAddr)>,
    /// Address of the API.
    pub api: Option<SocketAddr>,
    /// Frontend.
    pub frontend: Option<String>,
    /// Further arguments of agents; if given, they replace the recorded ones.
    pub agent_args: Vec<String>,
}

/// Parses `--nodes`: names with commas, or how many nodes (named a, b, c, …).
///
/// # Errors
/// What is wrong with the text.
pub fn parse_nodes(text: &str) -> Result<Vec<String>, String> {
    let names: Vec<String> = match text.parse::<usize>() {
        Ok(count) => (b'a'..=b'z')
            .take(count)
            .map(|letter| char::from(letter).to_string())
            .collect(),
        Err(_) => text.split(',').map(|name| name.trim().to_owned()).collect(),
    };
    if names.is_empty() || names.len() > MOST_NODES || text.parse::<usize>().is_ok_and(|n| n > MOST_NODES) {
        return Err(format!(
            "1 to {MOST_NODES} nodes, as a number or as names with commas between"
        ));
    }
    if let Some(bad) = names.iter().find(|name| !is_dns_label(name)) {
        return Err(format!(
            "{bad:?} is no node name: 1 to 63 of a-z, 0-9 and '-', letter or digit at both ends"
        ));
    }
    let distinct: BTreeSet<&String> = names.iter().collect();
    if distinct.len() != names.len() {
        return Err(format!("a node is named twice in {text:?}"));
    }
    Ok(names)
}

impl ClusterConfig {
    /// Reads the cluster in a directory.
    ///
    /// # Errors
    /// There is none, or its file cannot be used.
    pub fn load(state: &StateDir) -> Result<Self, ConfigError> {
        let path = state.join("cluster.json");
        let raw = match fs::read(&path) {
            Ok(raw) => raw,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(ConfigError::Absent(state.path().display().to_string()));
            }
            Err(error) => return Err(file_error("reading", &path)(error).into()),
        };
        let unusable = |problem: String| ConfigError::Unusable {
            path: path.display().to_string(),
            problem,
        };
        let value: serde_json::Value = serde_json::from_slice(&raw).map_err(|e| unusable(e.to_string()))?;
        match value["format"].as_u64() {
            Some(format) if format == u64::from(FORMAT) => {}
            other => {
                return Err(unusable(format!(
                    "its format is {other:?}, this mars-local knows {FORMAT}"
                )));
            }
        }
        serde_json::from_value(value).map_err(|e| unusable(e.to_string()))
    }

    /// Reads the cluster, or makes a new one in a directory that is absent or empty, with what the command line wishes.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn load_or_create(state: &StateDir, wish: &Wish) -> Result<Self, ConfigError> {
        let mut config = match Self::load(state) {
            Ok(config) => config,
            Err(ConfigError::Absent(_)) => Self::fresh(state)?,
            Err(error) => return Err(error),
        };
        config.fulfil(wish)?;
        write_private(
            &state.join("cluster.json"),
            &serde_json::to_vec_pretty(&config).unwrap_or_default(),
        )?;
        Ok(config)
    }

    fn fresh(state: &StateDir) -> Result<Self, ConfigError> {
        let dir = state.path();
        fs::create_dir_all(dir).map_err(file_error("making directory", dir))?;
        let mut entries = fs::read_dir(dir).map_err(file_error("listing", dir))?;
        if entries.next().is_some() {
            return Err(ConfigError::Foreign(dir.display().to_string()));
        }
        Ok(Self {
            format: FORMAT,
            cluster_uuid: Uuid::new_v4(),
            api: DEFAULT_API,
            frontend: "auto".into(),
            agent_args: Vec::new(),
            nodes: Vec::new(),
        })
    }

    fn fulfil(&mut self, wish: &Wish) -> Result<(), ConfigError> {
        let is_new = self.nodes.is_empty();
        let default = || ["a", "b", "c"].map(ToOwned::to_owned).to_vec();
        let names = match &wish.nodes {
            Some(names) => names.clone(),
            None if is_new => default(),
            None => self.nodes.iter().map(|n| n.name.clone()).collect(),
        };
        if let Some(left_out) = self.nodes.iter().find(|node| !names.contains(&node.name)) {
            return Err(ConfigError::Mismatch(format!(
                "this cluster has a node {0:?} that --nodes leaves out; name all its nodes, or stop it with: mars-local node {0} stop",
                left_out.name
            )));
        }
        for name in names {
            if self.nodes.iter().all(|node| node.name != name) {
                let address = self.free_address();
                self.nodes.push(NodeConfig { name, address });
            }
        }
        for (name, address) in &wish.addresses {
            let Some(node) = self.nodes.iter_mut().find(|node| node.name == *name) else {
                return Err(ConfigError::Mismatch(format!(
                    "--node {name}=… names no node of this cluster"
                )));
            };
            if !is_new && node.address != *address {
                return Err(ConfigError::Mismatch(format!(
                    "node {name} has the address {}; it cannot be changed to {address} in an existing cluster",
                    node.address
                )));
            }
            node.address = *address;
        }
        self.api = wish.api.unwrap_or(self.api);
        self.frontend = wish.frontend.clone().unwrap_or_else(|| self.frontend.clone());
        if !wish.agent_args.is_empty() {
            self.agent_args.clone_from(&wish.agent_args);
        }
        Ok(())
    }

    fn free_address(&self) -> SocketAddr {
        let used: BTreeSet<IpAddr> = self.nodes.iter().map(|node| node.address.ip()).collect();
        let candidates = (FIRST_ADDRESS..=u8::MAX).map(|last| IpAddr::V4(Ipv4Addr::new(127, 0, 0, last)));
        let free = candidates.into_iter().find(|ip| !used.contains(ip));
        SocketAddr::new(free.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST)), REPLICATION_PORT)
    }

    /// A node of the cluster.
    ///
    /// # Errors
    /// No node of that name.
    pub fn node(&self, name: &str) -> Result<&NodeConfig, ConfigError> {
        self.nodes.iter().find(|node| node.name == name).ok_or_else(|| {
            let names: Vec<&str> = self.nodes.iter().map(|n| n.name.as_str()).collect();
            ConfigError::Mismatch(format!("there is no node {name:?}; the nodes are {}", names.join(", ")))
        })
    }

    /// Short name of the cluster for things outside its directory (control groups).
    #[must_use]
    pub fn short_name(&self) -> String {
        format!("mars-local-{}", &self.cluster_uuid.simple().to_string()[..12])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(dir: &std::path::Path) -> StateDir {
        StateDir::new(dir).unwrap()
    }

    #[test]
    fn a_cluster_is_made_once_and_grows_but_never_forgets_a_node() {
        let dir = tempfile::tempdir().unwrap();
        let state = state(&dir.path().join("s"));
        let first = ClusterConfig::load_or_create(&state, &Wish::default()).unwrap();
        assert_eq!(
            first.nodes.iter().map(|n| n.name.as_str()).collect::<Vec<_>>(),
            ["a", "b", "c"]
        );
        assert_eq!(first.nodes[1].address.to_string(), "127.0.0.12:7777");
        assert_eq!(ClusterConfig::load_or_create(&state, &Wish::default()).unwrap(), first);
        let nodes = |text: &str| Wish {
            nodes: Some(parse_nodes(text).unwrap()),
            ..Wish::default()
        };
        let grown = ClusterConfig::load_or_create(&state, &nodes("4")).unwrap();
        assert_eq!(grown.nodes[3].address.to_string(), "127.0.0.14:7777");
        let error = ClusterConfig::load_or_create(&state, &nodes("a,b")).unwrap_err();
        assert!(error.to_string().contains("\"c\""), "{error}");
        let moved = Wish {
            addresses: vec![("a".into(), "127.0.0.99:1".parse().unwrap())],
            ..Wish::default()
        };
        assert!(ClusterConfig::load_or_create(&state, &moved).is_err());
    }

    #[test]
    fn foreign_directories_and_newer_formats_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("precious"), "data").unwrap();
        let state = state(dir.path());
        assert!(matches!(
            ClusterConfig::load_or_create(&state, &Wish::default()),
            Err(ConfigError::Foreign(_))
        ));
        std::fs::write(dir.path().join("cluster.json"), r#"{"format": 9}"#).unwrap();
        let error = ClusterConfig::load_or_create(&state, &Wish::default()).unwrap_err();
        assert!(matches!(error, ConfigError::Unusable { .. }), "{error}");
    }

    #[test]
    fn node_lists_are_checked() {
        assert_eq!(parse_nodes("2").unwrap(), ["a", "b"]);
        assert_eq!(parse_nodes("x, y").unwrap(), ["x", "y"]);
        for bad in ["0", "27", "", "A", "a,a", "a/b", "../x"] {
            assert!(parse_nodes(bad).is_err(), "{bad}");
        }
    }
}
