//! Who is let in: certificates, clusters, nodes, resources.

use super::rig::{Cluster, LIMIT, Shape};
use mars_engine::api::{Cause, DataState};
use mars_engine::types::{ClusterId, NodeId, ReplicaId};
use mars_node_agent::replication::certs::{CertSource, Credentials};
use mars_node_agent::replication::clock::SharedClock;
use mars_node_agent::replication::pki::{Authority, Issued, NODE_VALIDITY};
use mars_node_agent::replication::tls::{self, PeerIdentity};
use mars_node_agent::replication::{Congestion, Hub, HubConfig, Membership, PeerAddress};
use rustls::pki_types::ServerName;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio::sync::watch;
use uuid::Uuid;

/// What a server says to a client with these credentials: `Ok` once it has answered a byte of HTTP/2.
async fn knock(server: SocketAddr, expected: PeerIdentity, credentials: &Credentials) -> std::io::Result<()> {
    let config = tls::client_config(credentials, expected).unwrap();
    knock_with(server, config).await
}

async fn knock_with(server: SocketAddr, config: rustls::ClientConfig) -> std::io::Result<()> {
    let stream = TcpStream::connect(server).await?;
    let name = ServerName::IpAddress(server.ip().into());
    let knocked = async {
        let mut stream = tokio_rustls::TlsConnector::from(Arc::new(config))
            .connect(name, stream)
            .await?;
        // An HTTP/2 server speaks first (SETTINGS); in TLS 1.3 a refused client certificate shows only here.
        let mut byte = [0; 1];
        stream.read_exact(&mut byte).await.map(drop)
    };
    tokio::time::timeout(LIMIT, knocked).await?
}

fn credentials(identity: PeerIdentity, authority: &Authority, issued: &Issued) -> Credentials {
    let ca = authority.certificate_pem().as_bytes();
    Credentials::from_pem(
        identity,
        ca,
        issued.certificate_pem.as_bytes(),
        issued.key_pem.as_bytes(),
    )
    .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a63_only_a_valid_certificate_of_this_cluster_gets_past_the_handshake() {
    let cluster = Cluster::new(1, Shape::default()).await;
    let (server, expected) = (cluster.nodes[0].server, cluster.nodes[0].identity);
    let client = PeerIdentity {
        cluster: cluster.id,
        node: NodeId(Uuid::new_v4()),
    };
    let issue = |authority: &Authority, identity: PeerIdentity| {
        credentials(
            identity,
            authority,
            &authority.issue(identity.cluster, identity.node, NODE_VALIDITY).unwrap(),
        )
    };
    let good = issue(&cluster.authority, client);
    knock(server, expected, &good)
        .await
        .expect("a good certificate is let in");

    // Another authority: the client does not believe the server …
    let stranger = Authority::generate(cluster.id).unwrap();
    let wrong = issue(&stranger, client);
    knock(server, expected, &wrong)
        .await
        .expect_err("the server's certificate is not believed");
    // … and the server does not believe the client, even if that one believes the server.
    let mut half = issue(&stranger, client);
    half.roots = good.roots.clone();
    knock(server, expected, &half)
        .await
        .expect_err("a certificate of another authority");

    let now = SystemTime::now();
    let hour = Duration::from_hours(1);
    let expired = cluster
        .authority
        .issue_between(&client.to_uri(), now - 2 * hour, now - hour)
        .unwrap();
    knock(server, expected, &credentials(client, &cluster.authority, &expired))
        .await
        .expect_err("expired");
    let later = cluster
        .authority
        .issue_between(&client.to_uri(), now + hour, now + 2 * hour)
        .unwrap();
    knock(server, expected, &credentials(client, &cluster.authority, &later))
        .await
        .expect_err("not valid yet");

    let foreign = PeerIdentity {
        cluster: ClusterId(Uuid::new_v4()),
        ..client
    };
    knock(server, expected, &issue(&cluster.authority, foreign))
        .await
        .expect_err("another cluster");

    let other_node = PeerIdentity {
        node: NodeId(Uuid::new_v4()),
        ..expected
    };
    knock(server, other_node, &good)
        .await
        .expect_err("the dialled node did not answer");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a63_no_certificate_an_unnamed_one_or_an_older_protocol_is_refused() {
    let cluster = Cluster::new(1, Shape::default()).await;
    let server = cluster.nodes[0].server;
    let mut roots = rustls::RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_slice(cluster.authority.certificate_pem().as_bytes()).unwrap())
        .unwrap();
    let verifier = Arc::new(AnyServer(tls::provider()));
    let builder = |versions: &[&'static rustls::SupportedProtocolVersion]| {
        rustls::ClientConfig::builder_with_provider(tls::provider())
            .with_protocol_versions(versions)
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(verifier.clone())
    };
    let tls13: &[&rustls::SupportedProtocolVersion] = &[&rustls::version::TLS13];
    let without = builder(tls13).with_no_client_auth();
    knock_with(server, without).await.expect_err("no certificate");

    let now = SystemTime::now();
    for name in [
        "https://example.org/",
        &format!("mars://{}", cluster.id),
        &format!("mars://{}/x", cluster.id),
    ] {
        let issued = cluster.authority.issue_between(name, now, now + NODE_VALIDITY).unwrap();
        let chain = vec![CertificateDer::from_pem_slice(issued.certificate_pem.as_bytes()).unwrap()];
        let key = PrivateKeyDer::from_pem_slice(issued.key_pem.as_bytes()).unwrap();
        let config = builder(tls13).with_client_auth_cert(chain, key).unwrap();
        knock_with(server, config)
            .await
            .expect_err("a certificate that names no node");
    }

    let identity = PeerIdentity {
        cluster: cluster.id,
        node: NodeId(Uuid::new_v4()),
    };
    let issued = cluster
        .authority
        .issue(cluster.id, identity.node, NODE_VALIDITY)
        .unwrap();
    let chain = vec![CertificateDer::from_pem_slice(issued.certificate_pem.as_bytes()).unwrap()];
    let key = PrivateKeyDer::from_pem_slice(issued.key_pem.as_bytes()).unwrap();
    let old = builder(&[&rustls::version::TLS12])
        .with_client_auth_cert(chain.clone(), key.clone_key())
        .unwrap();
    knock_with(server, old).await.expect_err("TLS 1.2");
    let new = builder(tls13).with_client_auth_cert(chain, key).unwrap();
    knock_with(server, new)
        .await
        .expect("the same certificate over TLS 1.3");
}

/// Believes every server: so that only the server's own checks count.
#[derive(Debug)]
struct AnyServer(Arc<rustls::crypto::CryptoProvider>);

impl rustls::client::danger::ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// A node of the cluster that nobody has made a member, with a replica of its own making.
async fn intruder(
    cluster: &Cluster,
    claimed: ReplicaId,
) -> (Arc<mars_node_agent::replication::ReplicationStatus>, u64) {
    let other = Cluster::new(1, Shape::default()).await;
    let node = &other.nodes[0];
    let identity = PeerIdentity {
        cluster: cluster.id,
        node: NodeId(Uuid::new_v4()),
    };
    let issued = cluster
        .authority
        .issue(cluster.id, identity.node, NODE_VALIDITY)
        .unwrap();
    let certs: Arc<dyn CertSource> = Arc::new(Arc::new(credentials(identity, &cluster.authority, &issued)));
    let config = HubConfig {
        congestion: Congestion::Bbr,
        reconnect_limit: Duration::from_millis(200),
        ..HubConfig::new(identity.cluster, identity.node)
    };
    let hub = Hub::new(config, certs, Arc::new(SharedClock::default()));
    let victim = &cluster.nodes[0];
    let peer = PeerAddress {
        replica: victim.replica,
        node: Some(victim.identity.node),
        address: victim.server.to_string(),
    };
    let membership = Membership {
        peers: vec![peer],
        ..Membership::default()
    };
    let (_keep, membership) = watch::channel(Arc::new(membership));
    let follower = hub
        .join(cluster.resource, claimed, Arc::new(node.machine.clone()), membership)
        .unwrap();
    let mut status = follower.status();
    let refused = status.wait_for(|status| status.peers.iter().any(|peer| peer.problem.is_some()));
    let status = tokio::time::timeout(LIMIT, refused)
        .await
        .expect("it is refused")
        .unwrap()
        .clone();
    let fetched = status.fetched_bytes;
    follower.stop().await;
    (status, fetched)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a61_a_node_that_is_no_member_gets_and_gives_nothing() {
    let cluster = Cluster::new(2, Shape::default()).await;
    cluster.promote(0, 1, Cause::Create).await;
    cluster.nodes[1]
        .until("consistent", |status| status.data == DataState::Consistent)
        .await;
    let before = cluster.nodes[0].now().members.clone();
    // First with a replica id of its own, then with that of a real member: the certificate decides.
    for (claimed, reason) in [
        (ReplicaId(Uuid::new_v4()), "not a member"),
        (cluster.nodes[1].replica, "does not live on node"),
    ] {
        let (status, fetched) = intruder(&cluster, claimed).await;
        let peer = &status.peers[0];
        assert!(peer.problem.as_ref().unwrap().contains(reason), "{:?}", peer.problem);
        assert_eq!((fetched, &peer.status), (0, &None), "it learned something");
    }
    let after = cluster.nodes[0].now().members.clone();
    let names = |members: &[mars_engine::api::MemberStatus]| members.iter().map(|m| m.replica).collect::<Vec<_>>();
    assert_eq!(names(&before), names(&after));
    let peers = &cluster.nodes[0].replication().peers;
    assert_eq!(peers.len(), 1, "the intruder left a trace");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a63_certificates_are_replaced_without_an_interruption() {
    let cluster = Cluster::new(2, Shape::default()).await;
    cluster.promote(0, 1, Cause::Create).await;
    cluster.nodes[1]
        .until("consistent", |status| status.data == DataState::Consistent)
        .await;
    for round in 0..5u8 {
        for node in &cluster.nodes {
            cluster
                .authority
                .equip(&node.pki_dir, cluster.id, node.identity.node, NODE_VALIDITY)
                .unwrap();
            assert!(node.certs.reload().unwrap(), "the new certificate is in use");
        }
        if round == 3 {
            // New connections use the new certificates; the old ones had gone on.
            cluster.nodes[0].wire.disturb();
        }
        cluster.nodes[0].machine.write(0, vec![round; 65536]).await;
        cluster.nodes[0].machine.flush().await;
        cluster.nodes[1].until_like(&cluster.nodes[0]).await;
        if round < 3 {
            assert_eq!(
                cluster.nodes[1].replication().problem,
                None,
                "a session ended in round {round}"
            );
        }
    }
}
