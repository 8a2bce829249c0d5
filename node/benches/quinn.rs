//! What quinn alone carries between two hosts: the peer of a download over an unshaped link. `bash tests/wire` runs both ends.
//!
//! ```text
//! cargo bench -p moyai --bench quinn -- serve 10.77.0.1:4433            # answers until it is killed
//! cargo bench -p moyai --bench quinn -- fetch 10.77.0.1:4433 1024       # so many MiB by one stream; prints MB/s
//! ```
//!
//! quinn's own settings, TLS by the keys that libp2p would have, bytes from memory into nothing; decides nothing.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{ClientConfig, Endpoint, ServerConfig};

const PIECE: usize = 1 << 20;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["serve", address] => serve(address.parse().context("an address and a port")?).await,
        ["fetch", address, mib] => fetch(address.parse()?, mib.parse().context("a number of MiB")?).await,
        _ => {
            println!("serve ADDRESS:PORT, or fetch ADDRESS:PORT MIB, on two hosts: see tests/wire");
            Ok(())
        }
    }
}

async fn serve(address: SocketAddr) -> anyhow::Result<()> {
    let tls = libp2p_tls::make_server_config(&libp2p::identity::Keypair::generate_ed25519())?;
    let config = ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls)?));
    let endpoint = Endpoint::server(config, address)?;
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
    let tls = libp2p_tls::make_client_config(&libp2p::identity::Keypair::generate_ed25519(), None)?;
    let config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
    let endpoint = Endpoint::client(SocketAddr::from(([0, 0, 0, 0], 0)))?;
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
