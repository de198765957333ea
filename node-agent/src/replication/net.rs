//! Connections: TCP with the right options, TLS on top, a limit on every wait.
//!
//! Invariant: a connection becomes visible to the rest of the agent only after its TLS handshake has proven who is there.

use super::certs::CertSource;
use super::tls::{self, PeerIdentity};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::server::Connected;
use tonic::transport::{Channel, Endpoint};

/// A handshake that takes longer is given up.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Handshakes under way at a time, and connections open at a time.
const MOST_HANDSHAKES: usize = 64;
const MOST_CONNECTIONS: usize = 4096;
/// Silence on a connection after which its liveness is probed, and how long an answer may take.
pub(super) const KEEPALIVE_EVERY: Duration = Duration::from_secs(5);
pub(super) const KEEPALIVE_LIMIT: Duration = Duration::from_secs(10);
/// HTTP/2 windows: the bandwidth-delay product of a 1 Gbit/s link of 60 ms; also what a slow receiver holds at most.
pub(super) const STREAM_WINDOW_BYTES: u32 = 8 << 20;
pub(super) const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;

/// Whether the kernel lets us choose a congestion control that survives loss on long links.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Congestion {
    /// BBR: one connection fills a lossy long-distance link.
    Bbr,
    /// Whatever the kernel does by itself: several connections share the work.
    Default,
}

impl Congestion {
    /// Tries it on a socket that is thrown away.
    #[must_use]
    pub fn probe() -> Self {
        let usable =
            TcpSocket::new_v4().is_ok_and(|socket| rustix::net::sockopt::set_tcp_congestion(&socket, "bbr").is_ok());
        if usable { Self::Bbr } else { Self::Default }
    }
}

fn tune(stream: &TcpStream, congestion: Congestion) {
    use rustix::net::sockopt;
    // None of these is needed for correctness: a kernel that refuses one still replicates.
    let _ = stream.set_nodelay(true);
    let _ = sockopt::set_socket_keepalive(stream, true);
    let _ = sockopt::set_tcp_keepidle(stream, KEEPALIVE_EVERY);
    let _ = sockopt::set_tcp_keepintvl(stream, KEEPALIVE_EVERY);
    let _ = sockopt::set_tcp_user_timeout(stream, 30_000);
    if congestion == Congestion::Bbr {
        let _ = sockopt::set_tcp_congestion(stream, "bbr");
    }
}

/// An accepted connection and who is at its other end.
pub(super) struct Accepted {
    stream: tokio_rustls::server::TlsStream<TcpStream>,
    peer: PeerIdentity,
    _permit: tokio::sync::OwnedSemaphorePermit,
}

impl Connected for Accepted {
    type ConnectInfo = PeerIdentity;

    fn connect_info(&self) -> PeerIdentity {
        self.peer
    }
}

impl AsyncRead for Accepted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Accepted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

/// Accepts connections until `stop`; only those whose handshake succeeded come out.
pub(super) fn accept(
    listener: TcpListener,
    certs: Arc<dyn CertSource>,
    congestion: Congestion,
    tasks: &TaskTracker,
    stop: CancellationToken,
) -> mpsc::Receiver<io::Result<Accepted>> {
    let (ready, accepted) = mpsc::channel(16);
    let handshakes = Arc::new(Semaphore::new(MOST_HANDSHAKES));
    let connections = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    let spawner = tasks.clone();
    tasks.spawn(async move {
        loop {
            // Permits first: under a flood, connections wait in the kernel's queue instead of in our memory.
            let permits = async {
                let connection = connections.clone().acquire_owned().await.ok()?;
                Some((connection, handshakes.clone().acquire_owned().await.ok()?))
            };
            let Some(Some((connection, handshake))) = stop.run_until_cancelled(permits).await else {
                return;
            };
            let stream = match stop.run_until_cancelled(listener.accept()).await {
                None => return,
                Some(Ok((stream, _))) => stream,
                Some(Err(error)) => {
                    // Out of descriptors, mostly: a short pause, and the next one may succeed.
                    tracing::warn!(%error, "accepting a replication connection failed");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            tune(&stream, congestion);
            let (certs, ready, stop) = (certs.clone(), ready.clone(), stop.clone());
            spawner.spawn(async move {
                let from = stream
                    .peer_addr()
                    .map(|address| address.to_string())
                    .unwrap_or_default();
                let shaken = stop.run_until_cancelled(handshake_server(stream, certs.as_ref())).await;
                drop(handshake);
                match shaken {
                    None => {}
                    Some(Ok((stream, peer))) => {
                        let _ = ready
                            .send(Ok(Accepted {
                                stream,
                                peer,
                                _permit: connection,
                            }))
                            .await;
                    }
                    Some(Err(error)) => tracing::warn!(from, %error, "a replication connection was refused"),
                }
            });
        }
    });
    accepted
}

async fn handshake_server(
    stream: TcpStream,
    certs: &dyn CertSource,
) -> io::Result<(tokio_rustls::server::TlsStream<TcpStream>, PeerIdentity)> {
    let acceptor = tokio_rustls::TlsAcceptor::from(certs.current().server.clone());
    let stream = tokio::time::timeout(HANDSHAKE_LIMIT, acceptor.accept(stream)).await??;
    let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let leaf = certificates
        .first()
        .ok_or_else(|| io::Error::other("the peer showed no certificate"))?;
    let peer = PeerIdentity::of(leaf).map_err(io::Error::other)?;
    Ok((stream, peer))
}

/// How to reach others.
pub(super) struct Dialer {
    pub(super) certs: Arc<dyn CertSource>,
    /// Our own address: connections come from it, so that links can be told apart.
    pub(super) bind: Option<IpAddr>,
    pub(super) congestion: Congestion,
    pub(super) connect_limit: Duration,
}

/// Why a node is not reached.
#[derive(Debug, thiserror::Error)]
pub(super) enum DialError {
    #[error("address {address:?} cannot be resolved: {source}")]
    Resolve { address: String, source: io::Error },
    #[error("connecting to {address}: {source}")]
    Connect { address: SocketAddr, source: io::Error },
    #[error("TLS with {address}: {source}")]
    Handshake { address: SocketAddr, source: io::Error },
    #[error("TLS: {0}")]
    Config(#[from] rustls::Error),
    #[error("HTTP/2 with {address}: {source}")]
    Http {
        address: SocketAddr,
        source: tonic::transport::Error,
    },
}

impl Dialer {
    /// A fresh connection to exactly this node. It is not re-established by itself when it breaks.
    pub(super) async fn connect(&self, address: &str, expected: PeerIdentity) -> Result<Channel, DialError> {
        let (stream, address) = self.connect_tcp(address).await?;
        tune(&stream, self.congestion);
        let config = tls::client_config(&self.certs.current(), expected)?;
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        // The name is not looked at: identities are, see `tls`.
        let name = ServerName::IpAddress(address.ip().into());
        let handshake_failed = |source| DialError::Handshake { address, source };
        let stream = tokio::time::timeout(HANDSHAKE_LIMIT, connector.connect(name, stream))
            .await
            .map_err(|_| handshake_failed(io::ErrorKind::TimedOut.into()))?
            .map_err(handshake_failed)?;
        let once = Arc::new(Mutex::new(Some(TokioIo::new(stream))));
        let connector = tower::service_fn(move |_| {
            let stream = once.lock().unwrap_or_else(PoisonError::into_inner).take();
            std::future::ready(stream.ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected)))
        });
        Endpoint::from_static("http://replica.mars")
            .http2_keep_alive_interval(KEEPALIVE_EVERY)
            .keep_alive_timeout(KEEPALIVE_LIMIT)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .connect_timeout(self.connect_limit)
            .connect_with_connector(connector)
            .await
            .map_err(|source| DialError::Http { address, source })
    }

    async fn connect_tcp(&self, address: &str) -> Result<(TcpStream, SocketAddr), DialError> {
        let unresolved = |source| DialError::Resolve {
            address: address.to_owned(),
            source,
        };
        let found = tokio::time::timeout(self.connect_limit, tokio::net::lookup_host(address))
            .await
            .map_err(|_| unresolved(io::ErrorKind::TimedOut.into()))?
            .map_err(unresolved)?;
        let mut last = unresolved(io::ErrorKind::NotFound.into());
        for target in found {
            match tokio::time::timeout(self.connect_limit, self.connect_one(target)).await {
                Ok(Ok(stream)) => return Ok((stream, target)),
                Ok(Err(source)) => {
                    last = DialError::Connect {
                        address: target,
                        source,
                    }
                }
                Err(_) => {
                    last = DialError::Connect {
                        address: target,
                        source: io::ErrorKind::TimedOut.into(),
                    }
                }
            }
        }
        Err(last)
    }

    async fn connect_one(&self, target: SocketAddr) -> io::Result<TcpStream> {
        let socket = if target.is_ipv4() {
            TcpSocket::new_v4()?
        } else {
            TcpSocket::new_v6()?
        };
        if let Some(own) = self.bind.filter(|own| own.is_ipv4() == target.is_ipv4()) {
            socket.bind(SocketAddr::new(own, 0))?;
        }
        socket.connect(target).await
    }
}
