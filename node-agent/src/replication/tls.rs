//! Mutual TLS 1.3: who may talk at all.
//!
//! A node is named by one subject alternative name, the URI `mars://<cluster uuid>/<node uuid>`. Both sides check the
//! other's certificate against the cluster's authority; the server refuses another cluster, the client any node but the one it
//! dialled – within the handshake, so before a byte of any message is parsed. Which resources a node may speak about
//! is decided per request.

use super::certs::Credentials;
use mars_engine::types::{ClusterId, NodeId};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, RootCertStore, ServerConfig,
    SignatureScheme,
};
use std::fmt;
use std::sync::Arc;
use uuid::Uuid;
use x509_parser::extensions::GeneralName;

/// The protocol spoken inside TLS.
const ALPN: &[u8] = b"h2";

/// Who a certificate says its holder is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PeerIdentity {
    /// The cluster.
    pub cluster: ClusterId,
    /// The node.
    pub node: NodeId,
}

impl fmt::Display for PeerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "mars://{}/{}", self.cluster, self.node)
    }
}

impl PeerIdentity {
    /// The name in the certificate.
    #[must_use]
    pub fn to_uri(&self) -> String {
        self.to_string()
    }

    /// Reads the name in a certificate: exactly one URI, of exactly this form.
    ///
    /// # Errors
    /// A text that says what is wrong with it.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Self, String> {
        let (_, parsed) =
            x509_parser::parse_x509_certificate(certificate).map_err(|error| format!("certificate: {error}"))?;
        let names = parsed
            .subject_alternative_name()
            .map_err(|error| format!("certificate: {error}"))?;
        let names = names.ok_or("certificate without a subject alternative name")?;
        match names.value.general_names.as_slice() {
            [GeneralName::URI(uri)] => Self::from_uri(uri),
            _ => Err("certificate does not have exactly one name, a URI mars://<cluster uuid>/<node uuid>".into()),
        }
    }

    fn from_uri(uri: &str) -> Result<Self, String> {
        let parse = || {
            let (cluster, node) = uri.strip_prefix("mars://")?.split_once('/')?;
            Some(Self {
                cluster: ClusterId(hyphenated(cluster)?),
                node: NodeId(hyphenated(node)?),
            })
        };
        parse().ok_or_else(|| format!("certificate name {uri:?} is not mars://<cluster uuid>/<node uuid>"))
    }
}

/// Only the usual lower-case form: one identity has one spelling.
fn hyphenated(text: &str) -> Option<Uuid> {
    let uuid = Uuid::try_parse(text).ok()?;
    (uuid.hyphenated().to_string() == text).then_some(uuid)
}

/// The cryptography in use: ring, TLS 1.3 only.
#[must_use]
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// What the accepting side of connections uses.
///
/// # Errors
/// When certificate, key and authority do not fit together.
pub fn server_config(
    cluster: ClusterId,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: &Arc<RootCertStore>,
) -> Result<ServerConfig, Error> {
    let inner = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider())
        .build()
        .map_err(|error| Error::General(error.to_string()))?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(ClusterClients { cluster, inner }))
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    // Every connection proves itself anew: a resumed session would outlive a replaced authority.
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// What the dialling side uses to reach exactly `expected`.
///
/// # Errors
/// When certificate and key do not fit together.
pub fn client_config(credentials: &Credentials, expected: PeerIdentity) -> Result<ClientConfig, Error> {
    let verifier = ExactServer {
        expected,
        roots: credentials.roots.clone(),
        provider: provider(),
    };
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_auth_cert(credentials.chain.clone(), credentials.key.clone_key())?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    Ok(config)
}

fn rejected(reason: impl AsRef<str>) -> Error {
    let reason = reason.as_ref();
    tracing::warn!(reason, "a peer's certificate was refused");
    Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)
}

/// Accepts certificates of the authority whose name is of this cluster.
#[derive(Debug)]
struct ClusterClients {
    cluster: ClusterId,
    inner: Arc<dyn ClientCertVerifier>,
}

impl ClientCertVerifier for ClusterClients {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.inner.verify_client_cert(end_entity, intermediates, now)?;
        let peer = PeerIdentity::of(end_entity).map_err(rejected)?;
        if peer.cluster != self.cluster {
            return Err(rejected(format!(
                "{peer} belongs to another cluster than {}",
                self.cluster
            )));
        }
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not spoken".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// Accepts only the one node that was dialled. Names and addresses of the network play no part.
#[derive(Debug)]
struct ExactServer {
    expected: PeerIdentity,
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for ExactServer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let parsed = rustls::server::ParsedCertificate::try_from(end_entity)?;
        rustls::client::verify_server_cert_signed_by_trust_anchor(
            &parsed,
            &self.roots,
            intermediates,
            now,
            self.provider.signature_verification_algorithms.all,
        )?;
        let peer = PeerIdentity::of(end_entity).map_err(rejected)?;
        if peer != self.expected {
            return Err(rejected(format!("dialled {}, but {peer} answered", self.expected)));
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not spoken".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_has_exactly_one_spelling() {
        let identity = PeerIdentity {
            cluster: ClusterId(Uuid::from_u128(0xa1)),
            node: NodeId(Uuid::from_u128(2)),
        };
        let uri = identity.to_uri();
        assert_eq!(PeerIdentity::from_uri(&uri), Ok(identity));
        for wrong in [
            uri.to_uppercase(),
            uri.replace('-', ""),
            format!("{uri}/x"),
            format!(" {uri}"),
            uri.replace("mars", "http"),
            "mars:///".into(),
        ] {
            assert!(PeerIdentity::from_uri(&wrong).is_err(), "{wrong}");
        }
    }
}
