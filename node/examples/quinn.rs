//! What quinn alone carries between two hosts: the peer of a download over an unshaped link. `bash tests/wire` runs both ends.
//!
//! ```text
//! cargo run --release -p moyai --example quinn serve 10.77.0.1:4433            # answers until it is killed
//! cargo run --release -p moyai --example quinn fetch 10.77.0.1:4433 1024       # so many MiB by one stream; prints MB/s
//! ```
//!
//! With what makes quinn carry the most: AES-128, socket buffers of 8 MB, windows of 4 MB. Bytes go from memory into nothing; decides
//! nothing.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use libp2p::identity::Keypair;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{ClientConfig, Endpoint, EndpointConfig, ServerConfig, TransportConfig};

const PIECE: usize = 1 << 20;
const PROTOCOL: &[u8] = b"quinn-alone";
/// Whoever fetches dials this key.
const SERVER: [u8; 32] = [7; 32];

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["serve", address] => serve(address.parse().context("an address and a port")?).await,
        ["fetch", address, mib] => fetch(address.parse()?, mib.parse().context("a number of MiB")?).await,
        _ => {
            println!("serve ADDRESS:PORT, or fetch ADDRESS:PORT MIB, on two hosts: see tests/wire");
            Ok(())
        }
    }
}

/// UDP with larger buffers than the usual, as far as the kernel grants them.
fn socket(address: SocketAddr) -> anyhow::Result<std::net::UdpSocket> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None)?;
    let _smaller = (socket.set_recv_buffer_size(8 << 20), socket.set_send_buffer_size(8 << 20));
    socket.bind(&address.into())?;
    Ok(socket.into())
}

fn transport() -> Arc<TransportConfig> {
    let mut config = TransportConfig::default();
    config.stream_receive_window((4u32 << 20).into()).receive_window((16u32 << 20).into()).send_window(16 << 20);
    Arc::new(config)
}

async fn serve(address: SocketAddr) -> anyhow::Result<()> {
    let keys = Keypair::ed25519_from_bytes(SERVER).context("32 bytes are a key")?;
    let tls = moyai::tls::server(&keys, PROTOCOL)?;
    let mut config = ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls)?));
    config.transport_config(transport());
    let runtime = Arc::new(quinn::TokioRuntime);
    let endpoint = Endpoint::new(EndpointConfig::default(), Some(config), socket(address)?, runtime)?;
    let piece = blake3::hash(b"what is sent").as_bytes().repeat(PIECE / 32);
    while let Some(incoming) = endpoint.accept().await {
        let connection = incoming.await?;
        let (mut send, mut receive) = connection.accept_bi().await?;
        let mut mib = [0; 8];
        receive.read_exact(&mut mib).await?;
        for _ in 0..u64::from_be_bytes(mib) {
            send.write_all(&piece).await?;
        }
        send.finish()?;
        // The other end closes when it has all.
        connection.closed().await;
    }
    Ok(())
}

async fn fetch(address: SocketAddr, mib: u64) -> anyhow::Result<()> {
    let server = Keypair::ed25519_from_bytes(SERVER).context("32 bytes are a key")?.public().to_peer_id();
    let tls = moyai::tls::client(&Keypair::generate_ed25519(), server, PROTOCOL)?;
    let mut config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
    config.transport_config(transport());
    let (any, runtime) = (SocketAddr::from(([0, 0, 0, 0], 0)), Arc::new(quinn::TokioRuntime));
    let endpoint = Endpoint::new(EndpointConfig::default(), None, socket(any)?, runtime)?;
    let connection = endpoint.connect_with(config, address, "l")?.await?;
    let began = Instant::now();
    let (mut send, mut receive) = connection.open_bi().await?;
    send.write_all(&mib.to_be_bytes()).await?;
    let mut bytes = 0;
    while let Some(piece) = receive.read_chunk(PIECE, true).await? {
        bytes += piece.bytes.len();
    }
    anyhow::ensure!(bytes as u64 == mib << 20, "{bytes} bytes came");
    println!("{:.0} MB/s", bytes as f64 / began.elapsed().as_secs_f64() / 1e6);
    connection.close(0u32.into(), b"");
    endpoint.wait_idle().await;
    Ok(())
}
