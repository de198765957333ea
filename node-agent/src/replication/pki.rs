//! A small certificate authority: the one of mars-local, and of tests.
//!
//! Layout: `<dir>/ca.crt`, `<dir>/ca.key` (0600) for the authority; `ca.crt`, `node.crt`, `node.key` (0600) in a
//! directory per node, as [`DirectorySource`](super::certs::DirectorySource) reads them.
//!
//! Invariants: a key is never readable for others, not even for a moment; a file is replaced as a whole or not at all; an
//! existing authority is never replaced.

use super::tls::PeerIdentity;
use mars_engine::types::{ClusterId, NodeId};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// How long an authority is valid.
pub const CA_VALIDITY: Duration = Duration::from_hours(10 * 365 * 24);
/// How long a node certificate is valid unless asked otherwise.
pub const NODE_VALIDITY: Duration = Duration::from_hours(365 * 24);
/// Certificates are valid from a little before they are made: clocks differ.
const BACKDATED: Duration = Duration::from_hours(1);

/// Why certificates could not be made or stored.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// The files.
    #[error("{path}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The contents.
    #[error("{what}: {source}")]
    Certificate {
        /// What was being done.
        what: String,
        /// What the library said.
        source: rcgen::Error,
    },
    /// Only one half is there.
    #[error(
        "{dir} holds only one of ca.crt and ca.key: restore the other one; a new authority would lock out all nodes"
    )]
    HalfAuthority {
        /// Which directory.
        dir: PathBuf,
    },
}

fn certificate_error(what: &str) -> impl FnOnce(rcgen::Error) -> PkiError {
    let what = what.to_owned();
    move |source| PkiError::Certificate { what, source }
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> PkiError {
    let path = path.to_owned();
    move |source| PkiError::Io { path, source }
}

/// A certificate authority with its key.
#[derive(Debug)]
pub struct Authority {
    certificate_pem: String,
    key_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate and its key, PEM.
#[derive(Clone)]
pub struct Issued {
    /// The certificate.
    pub certificate_pem: String,
    /// The private key (PKCS #8).
    pub key_pem: String,
}

impl std::fmt::Debug for Issued {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Issued")
            .field("certificate_pem", &self.certificate_pem)
            .finish_non_exhaustive()
    }
}

impl Authority {
    /// Makes a new authority for a cluster.
    ///
    /// # Errors
    /// When no key can be made.
    pub fn generate(cluster: ClusterId) -> Result<Self, PkiError> {
        let key = KeyPair::generate().map_err(certificate_error("making the key of the authority"))?;
        let mut params = CertificateParams::default();
        params.distinguished_name = name(&format!("MARS authority of cluster {cluster}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let now = SystemTime::now();
        params.not_before = (now - BACKDATED).into();
        params.not_after = (now + CA_VALIDITY).into();
        let certificate = params
            .self_signed(&key)
            .map_err(certificate_error("signing the authority"))?;
        Self::from_pem(&certificate.pem(), &key.serialize_pem())
    }

    /// Reads an authority back.
    ///
    /// # Errors
    /// When the texts are not a certificate and its key.
    pub fn from_pem(certificate_pem: &str, key_pem: &str) -> Result<Self, PkiError> {
        let key = KeyPair::from_pem(key_pem).map_err(certificate_error("reading ca.key"))?;
        let issuer = Issuer::from_ca_cert_pem(certificate_pem, key).map_err(certificate_error("reading ca.crt"))?;
        Ok(Self {
            certificate_pem: certificate_pem.to_owned(),
            key_pem: key_pem.to_owned(),
            issuer,
        })
    }

    /// Reads the authority in `dir`, or makes one when neither of its files is there.
    ///
    /// # Errors
    /// See [`PkiError`]; half an authority is never completed by a new one.
    pub fn load_or_create(dir: &Path, cluster: ClusterId) -> Result<Self, PkiError> {
        let (certificate_path, key_path) = (dir.join("ca.crt"), dir.join("ca.key"));
        match (read_if_there(&certificate_path)?, read_if_there(&key_path)?) {
            (Some(certificate), Some(key)) => Self::from_pem(&certificate, &key),
            (None, None) => {
                let authority = Self::generate(cluster)?;
                make_dir(dir)?;
                write_private(&key_path, &authority.key_pem)?;
                write_private(&certificate_path, &authority.certificate_pem)?;
                Ok(authority)
            }
            _ => Err(PkiError::HalfAuthority { dir: dir.to_owned() }),
        }
    }

    /// The certificate of the authority, PEM.
    #[must_use]
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// Makes a certificate that says who a node is, for both ends of connections.
    ///
    /// # Errors
    /// When it cannot be signed.
    pub fn issue(&self, cluster: ClusterId, node: NodeId, validity: Duration) -> Result<Issued, PkiError> {
        let now = SystemTime::now();
        self.issue_between(
            &PeerIdentity { cluster, node }.to_uri(),
            now - BACKDATED,
            now + validity,
        )
    }

    /// Makes a certificate with any name and time span.
    ///
    /// # Errors
    /// When the name is not ASCII or the certificate cannot be signed.
    pub fn issue_between(&self, uri: &str, from: SystemTime, until: SystemTime) -> Result<Issued, PkiError> {
        let key = KeyPair::generate().map_err(certificate_error("making the key of a node"))?;
        let uri_name = uri.try_into().map_err(certificate_error("naming a node"))?;
        let mut params = CertificateParams::default();
        params.distinguished_name = name("MARS node agent");
        params.subject_alt_names = vec![SanType::URI(uri_name)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        params.not_before = from.into();
        params.not_after = until.into();
        let certificate = params
            .signed_by(&key, &self.issuer)
            .map_err(certificate_error("signing a node"))?;
        Ok(Issued {
            certificate_pem: certificate.pem(),
            key_pem: key.serialize_pem(),
        })
    }

    /// Gives a node what it needs: `ca.crt`, `node.crt` and `node.key` in `dir`. Replaces an older certificate: a running
    /// agent takes it over without dropping a connection.
    ///
    /// # Errors
    /// See [`PkiError`].
    pub fn equip(&self, dir: &Path, cluster: ClusterId, node: NodeId, validity: Duration) -> Result<(), PkiError> {
        let issued = self.issue(cluster, node, validity)?;
        make_dir(dir)?;
        write_private(&dir.join("ca.crt"), &self.certificate_pem)?;
        // Certificate and key are read together; a reader that sees only one of them replaced keeps what it has.
        write_private(&dir.join("node.key"), &issued.key_pem)?;
        write_private(&dir.join("node.crt"), &issued.certificate_pem)
    }
}

fn name(common: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common);
    name
}

fn read_if_there(path: &Path) -> Result<Option<String>, PkiError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(PkiError::Io {
            path: path.to_owned(),
            source,
        }),
    }
}

fn make_dir(dir: &Path) -> Result<(), PkiError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(io_error(dir))
}

/// Replaces a file as a whole, durably, readable for its owner only.
///
/// # Errors
/// [`PkiError::Io`]; the old file is then untouched.
pub fn write_private(path: &Path, text: &str) -> Result<(), PkiError> {
    let aside = path.with_extension(format!("new-{}", uuid::Uuid::new_v4().simple()));
    let write = || -> io::Result<()> {
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&aside)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&aside, path)?;
        match path.parent() {
            Some(dir) => fs::File::open(dir)?.sync_all(),
            None => Ok(()),
        }
    };
    write().map_err(|source| {
        let _ = fs::remove_file(&aside);
        PkiError::Io {
            path: path.to_owned(),
            source,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;
    use uuid::Uuid;

    #[test]
    fn an_authority_is_made_once_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("pki");
        let cluster = ClusterId(Uuid::from_u128(1));
        let first = Authority::load_or_create(&dir, cluster).unwrap();
        let second = Authority::load_or_create(&dir, cluster).unwrap();
        assert_eq!(first.certificate_pem(), second.certificate_pem());
        fs::remove_file(dir.join("ca.crt")).unwrap();
        assert!(matches!(
            Authority::load_or_create(&dir, cluster),
            Err(PkiError::HalfAuthority { .. })
        ));
    }

    #[test]
    fn keys_are_readable_for_their_owner_only_and_nothing_is_left_behind() {
        let dir = tempfile::tempdir().unwrap();
        let node_dir = dir.path().join("a");
        let cluster = ClusterId(Uuid::from_u128(1));
        let authority = Authority::load_or_create(dir.path(), cluster).unwrap();
        for _ in 0..2 {
            authority
                .equip(&node_dir, cluster, NodeId(Uuid::from_u128(2)), NODE_VALIDITY)
                .unwrap();
        }
        let mut names: Vec<String> = fs::read_dir(&node_dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["ca.crt", "node.crt", "node.key"]);
        for path in [dir.path().join("ca.key"), node_dir.join("node.key")] {
            assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600);
        }
    }
}
