//! TLS of the data plane.
//!
//! Peers are authenticated as libp2p's are (libp2p specs, tls/tls.md): each side shows one self-signed certificate, whose extension
//! binds its key to the node's. Only the order of ciphers is another: where the processor has instructions for AES, AES-128 comes
//! first, which costs a byte less than half of what ChaCha20 does; libp2p's own configuration has that first everywhere. The side that
//! dials decides.
//!
//! A certificate's signature of the handshake is checked with the key that is in it; who that is, and whether it is a member, is the
//! admission exchange's to say ([`super::admission`]).

use std::sync::Arc;

use libp2p::PeerId;
use libp2p::identity::Keypair;
use libp2p_tls::certificate::{self, P2pCertificate};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{self, cipher_suite};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::TLS13;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, ServerConfig, SignatureScheme,
};

/// Of a node that dials `peer`, to speak `protocol`.
pub fn client(keys: &Keypair, peer: PeerId, protocol: &[u8]) -> anyhow::Result<ClientConfig> {
    let provider = provider();
    let own = certificate(keys, &provider)?;
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Verifier { peer: Some(peer) }))
        .with_client_cert_resolver(own);
    config.alpn_protocols = vec![protocol.to_vec()];
    Ok(config)
}

/// Of a node that is dialled.
pub fn server(keys: &Keypair, protocol: &[u8]) -> anyhow::Result<ServerConfig> {
    let provider = provider();
    let own = certificate(keys, &provider)?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(Arc::new(Verifier { peer: None }))
        .with_cert_resolver(own);
    config.alpn_protocols = vec![protocol.to_vec()];
    Ok(config)
}

fn provider() -> Arc<CryptoProvider> {
    let (chacha, aes) = (
        [cipher_suite::TLS13_CHACHA20_POLY1305_SHA256],
        [cipher_suite::TLS13_AES_128_GCM_SHA256, cipher_suite::TLS13_AES_256_GCM_SHA384],
    );
    let cipher_suites = if has_aes() { [&aes[..], &chacha].concat() } else { [&chacha[..], &aes].concat() };
    Arc::new(CryptoProvider { cipher_suites, ..aws_lc_rs::default_provider() })
}

/// Whether the processor has instructions for it. Without them it is slow, or tells its key by the time it takes.
fn has_aes() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("aes");
    #[cfg(target_arch = "aarch64")]
    return std::arch::is_aarch64_feature_detected!("aes");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    false
}

fn certificate(keys: &Keypair, provider: &CryptoProvider) -> anyhow::Result<Arc<SingleCertAndKey>> {
    let (certificate, key) = certificate::generate(keys)?;
    let key = provider.key_provider.load_private_key(key)?;
    Ok(Arc::new(SingleCertAndKey::from(CertifiedKey::new(vec![certificate], key))))
}

/// What is asked of a certificate: that it is one, its own signature and its extension's; and whose it is, where that is known.
#[derive(Debug)]
struct Verifier {
    peer: Option<PeerId>,
}

impl Verifier {
    fn verify(&self, certificate: &CertificateDer<'_>, others: &[CertificateDer<'_>]) -> Result<(), Error> {
        if !others.is_empty() {
            return Err(Error::General("a node shows one certificate".to_owned()));
        }
        let shown = parse(certificate)?.peer_id();
        match self.peer {
            Some(peer) if peer != shown => Err(CertificateError::ApplicationVerificationFailure.into()),
            _ => Ok(()),
        }
    }
}

fn parse<'a>(certificate: &'a CertificateDer<'_>) -> Result<P2pCertificate<'a>, Error> {
    certificate::parse(certificate).map_err(|error| Error::General(format!("a node's certificate: {error}")))
}

fn verify_signature(
    message: &[u8],
    certificate: &CertificateDer<'_>,
    signed: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, Error> {
    parse(certificate)?
        .verify_signature(signed.scheme, message, signed.signature())
        .map_err(|_| CertificateError::BadSignature)?;
    Ok(HandshakeSignatureValid::assertion())
}

/// Nobody gets here: TLS 1.3 alone is offered and taken.
fn older<T>() -> Result<T, Error> {
    Err(Error::General("TLS 1.2 is not spoken here".to_owned()))
}

/// The curves that libp2p's certificates are made with; none of a node has another.
fn schemes() -> Vec<SignatureScheme> {
    vec![SignatureScheme::ECDSA_NISTP256_SHA256, SignatureScheme::ECDSA_NISTP384_SHA384, SignatureScheme::ED25519]
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.verify(certificate, others).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        older()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.verify(certificate, others).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        older()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        schemes()
    }
}

#[cfg(test)]
mod tests {
    use rustls::{CipherSuite, ClientConnection, ServerConnection};

    use super::*;

    /// A handshake in memory; both ends, or what the one that refuses says.
    fn shake(client: ClientConfig, server: ServerConfig) -> Result<(ClientConnection, ServerConnection), Error> {
        let name = ServerName::try_from("l").expect("a letter is a name");
        let mut client = ClientConnection::new(Arc::new(client), name)?;
        let mut server = ServerConnection::new(Arc::new(server))?;
        while client.is_handshaking() || server.is_handshaking() || server.wants_write() {
            let mut line = Vec::new();
            client.write_tls(&mut line).expect("memory takes it");
            server.read_tls(&mut &line[..]).expect("memory gives it");
            server.process_new_packets()?;
            line.clear();
            server.write_tls(&mut line).expect("memory takes it");
            client.read_tls(&mut &line[..]).expect("memory gives it");
            client.process_new_packets()?;
        }
        Ok((client, server))
    }

    fn peer(keys: &Keypair) -> PeerId {
        keys.public().to_peer_id()
    }

    #[test]
    fn both_know_who_the_other_is_and_speak_the_cheapest_cipher() {
        let (one, two) = (Keypair::generate_ed25519(), Keypair::generate_ed25519());
        let shaken = shake(client(&one, peer(&two), b"p").unwrap(), server(&two, b"p").unwrap());
        let (at_one, at_two) = shaken.unwrap();
        let shown =
            |certificates: Option<&[CertificateDer<'static>]>| parse(&certificates.unwrap()[0]).unwrap().peer_id();
        assert_eq!((shown(at_one.peer_certificates()), shown(at_two.peer_certificates())), (peer(&two), peer(&one)));
        let suite = at_one.negotiated_cipher_suite().unwrap().suite();
        assert_eq!(suite == CipherSuite::TLS13_AES_128_GCM_SHA256, has_aes());
    }

    #[test]
    fn it_speaks_with_nodes_that_have_libp2p_s_configuration() {
        let (one, two) = (Keypair::generate_ed25519(), Keypair::generate_ed25519());
        let mut theirs = libp2p_tls::make_server_config(&two).unwrap();
        theirs.alpn_protocols = vec![b"p".to_vec()];
        assert!(shake(client(&one, peer(&two), b"p").unwrap(), theirs).is_ok());
        let mut theirs = libp2p_tls::make_client_config(&one, Some(peer(&two))).unwrap();
        theirs.alpn_protocols = vec![b"p".to_vec()];
        assert!(shake(theirs, server(&two, b"p").unwrap()).is_ok());
    }

    #[test]
    fn whoever_is_not_who_was_dialled_is_refused() {
        let [one, two, three] = [(); 3].map(|()| Keypair::generate_ed25519());
        let refused = shake(client(&one, peer(&two), b"p").unwrap(), server(&three, b"p").unwrap()).err();
        assert_eq!(refused, Some(CertificateError::ApplicationVerificationFailure.into()));
    }

    /// A server that shows this certificate with a key.
    fn showing(certificates: Vec<CertificateDer<'static>>, keys: &Keypair) -> ServerConfig {
        let provider = provider();
        let key = provider.key_provider.load_private_key(certificate::generate(keys).unwrap().1).unwrap();
        ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(CertifiedKey::new(certificates, key))))
    }

    #[test]
    fn another_s_certificate_is_of_no_use_without_its_key() {
        let (one, two) = (Keypair::generate_ed25519(), Keypair::generate_ed25519());
        let theirs = certificate::generate(&two).unwrap().0;
        let stolen = showing(vec![theirs.clone()], &Keypair::generate_ed25519());
        let refused = shake(client(&one, peer(&two), b"p").unwrap(), stolen).err();
        assert_eq!(refused, Some(CertificateError::BadSignature.into()));
        // Nor beside another, changed, or none at all.
        for shown in [
            vec![theirs.clone(), certificate::generate(&one).unwrap().0],
            vec![CertificateDer::from(theirs.iter().rev().copied().collect::<Vec<u8>>())],
            vec![],
        ] {
            assert!(shake(client(&one, peer(&two), b"p").unwrap(), showing(shown, &two)).is_err());
        }
    }
}
