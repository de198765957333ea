//! Where an agent's certificate comes from, and how it is replaced while connections go on.
//!
//! Invariant: credentials are taken over only when certificate, key and authority fit together and the certificate names this
//! very node; until then the old ones stay. Open connections are never dropped by a rotation.

use super::tls::{self, PeerIdentity};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{RootCertStore, ServerConfig};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Who we are, and whom we believe.
pub struct Credentials {
    /// The node certificate, and what links it to the authority.
    pub chain: Vec<CertificateDer<'static>>,
    /// Its key.
    pub key: PrivateKeyDer<'static>,
    /// The authorities that are believed.
    pub roots: Arc<RootCertStore>,
    /// Ready for accepting connections.
    pub server: Arc<ServerConfig>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("roots", &self.roots.len())
            .finish_non_exhaustive()
    }
}

/// Why there are no credentials.
#[derive(Debug, thiserror::Error)]
pub enum CertError {
    /// A file.
    #[error("{path}: {message}")]
    File {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// The certificate is somebody else's.
    #[error("the certificate is for {found}, this agent is {expected}: issue one for this node")]
    OtherIdentity {
        /// What it says.
        found: PeerIdentity,
        /// What it should say.
        expected: PeerIdentity,
    },
    /// The parts do not fit.
    #[error("certificate, key and authority do not fit together: {0}")]
    Mismatch(String),
}

impl Credentials {
    /// Puts credentials together from PEM texts and checks that they are `identity`'s.
    ///
    /// # Errors
    /// See [`CertError`].
    pub fn from_pem(identity: PeerIdentity, ca: &[u8], certificate: &[u8], key: &[u8]) -> Result<Self, CertError> {
        let mismatch = |error: &dyn fmt::Display| CertError::Mismatch(error.to_string());
        let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(certificate)
            .collect::<Result<_, _>>()
            .map_err(|e| mismatch(&e))?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|e| mismatch(&e))?;
        let mut roots = RootCertStore::empty();
        for root in CertificateDer::pem_slice_iter(ca) {
            roots.add(root.map_err(|e| mismatch(&e))?).map_err(|e| mismatch(&e))?;
        }
        let leaf = chain
            .first()
            .ok_or_else(|| CertError::Mismatch("no certificate".into()))?;
        let found = PeerIdentity::of(leaf).map_err(CertError::Mismatch)?;
        if found != identity {
            return Err(CertError::OtherIdentity {
                found,
                expected: identity,
            });
        }
        let roots = Arc::new(roots);
        let server =
            tls::server_config(identity.cluster, chain.clone(), key.clone_key(), &roots).map_err(|e| mismatch(&e))?;
        Ok(Self {
            chain,
            key,
            roots,
            server: Arc::new(server),
        })
    }
}

/// Gives the newest credentials; asked anew for every connection.
pub trait CertSource: Send + Sync + 'static {
    /// The newest ones.
    fn current(&self) -> Arc<Credentials>;
}

/// Credentials that never change.
impl CertSource for Arc<Credentials> {
    fn current(&self) -> Arc<Credentials> {
        self.clone()
    }
}

/// `ca.crt`, `node.crt` and `node.key` in a directory, read again when they change.
#[derive(Debug)]
pub struct DirectorySource {
    identity: PeerIdentity,
    dir: PathBuf,
    current: RwLock<Loaded>,
}

#[derive(Debug)]
struct Loaded {
    texts: [Vec<u8>; 3],
    credentials: Arc<Credentials>,
}

impl DirectorySource {
    /// Reads the directory for the first time.
    ///
    /// # Errors
    /// See [`CertError`].
    pub fn open(dir: &Path, identity: PeerIdentity) -> Result<Self, CertError> {
        let texts = read(dir)?;
        let credentials = Arc::new(load(identity, &texts)?);
        Ok(Self {
            identity,
            dir: dir.to_owned(),
            current: RwLock::new(Loaded { texts, credentials }),
        })
    }

    /// Looks whether the files have changed; says whether new credentials are in use now.
    ///
    /// # Errors
    /// See [`CertError`]; the old credentials stay in use.
    pub fn reload(&self) -> Result<bool, CertError> {
        let texts = read(&self.dir)?;
        if texts == self.lock_read().texts {
            return Ok(false);
        }
        let credentials = Arc::new(load(self.identity, &texts)?);
        *self.current.write().unwrap_or_else(std::sync::PoisonError::into_inner) = Loaded { texts, credentials };
        Ok(true)
    }

    fn lock_read(&self) -> std::sync::RwLockReadGuard<'_, Loaded> {
        self.current.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Looks every `interval` until cancelled.
    pub async fn watch(self: Arc<Self>, interval: Duration, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(interval);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut last_problem = None;
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            let source = self.clone();
            let reloaded = tokio::task::spawn_blocking(move || source.reload()).await;
            let problem = match reloaded {
                Ok(Ok(changed)) => {
                    if changed {
                        tracing::info!(dir = %self.dir.display(), "new certificate in use");
                    }
                    None
                }
                Ok(Err(error)) => Some(error.to_string()),
                Err(error) => Some(error.to_string()),
            };
            if problem.is_some() && problem != last_problem {
                let dir = self.dir.display();
                tracing::warn!(%dir, problem, "the new certificate cannot be used; the old one stays in use");
            }
            last_problem = problem;
        }
    }
}

impl CertSource for DirectorySource {
    fn current(&self) -> Arc<Credentials> {
        self.lock_read().credentials.clone()
    }
}

fn read(dir: &Path) -> Result<[Vec<u8>; 3], CertError> {
    let read_one = |name: &str| {
        let path = dir.join(name);
        std::fs::read(&path).map_err(|error| CertError::File {
            path,
            message: error.to_string(),
        })
    };
    Ok([read_one("ca.crt")?, read_one("node.crt")?, read_one("node.key")?])
}

fn load(identity: PeerIdentity, texts: &[Vec<u8>; 3]) -> Result<Credentials, CertError> {
    let [ca, certificate, key] = texts;
    Credentials::from_pem(identity, ca, certificate, key)
}

#[cfg(test)]
mod tests {
    use super::super::pki::{Authority, NODE_VALIDITY};
    use super::*;
    use mars_engine::types::{ClusterId, NodeId};
    use uuid::Uuid;

    #[test]
    fn a63_a_rotation_is_taken_over_and_half_a_rotation_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let identity = PeerIdentity {
            cluster: ClusterId(Uuid::from_u128(1)),
            node: NodeId(Uuid::from_u128(2)),
        };
        let authority = Authority::generate(identity.cluster).unwrap();
        let equip = |node| {
            let equipped = authority.equip(dir.path(), identity.cluster, node, NODE_VALIDITY);
            equipped.unwrap();
        };
        equip(identity.node);
        let source = DirectorySource::open(dir.path(), identity).unwrap();
        let first = source.current();
        assert!(!source.reload().unwrap());
        let old_certificate = std::fs::read(dir.path().join("node.crt")).unwrap();
        equip(identity.node);
        let new_certificate = std::fs::read(dir.path().join("node.crt")).unwrap();
        // The key is already new, the certificate still old: as if read in the middle of a rotation.
        std::fs::write(dir.path().join("node.crt"), old_certificate).unwrap();
        assert!(matches!(source.reload(), Err(CertError::Mismatch(_))));
        assert!(Arc::ptr_eq(&source.current(), &first));
        std::fs::write(dir.path().join("node.crt"), new_certificate).unwrap();
        assert!(source.reload().unwrap());
        assert!(!Arc::ptr_eq(&source.current(), &first));
        equip(NodeId(Uuid::from_u128(3)));
        assert!(matches!(source.reload(), Err(CertError::OtherIdentity { .. })));
    }
}
