//! The command line's side of the local API.

use std::io;
use std::path::{Path, PathBuf};

use futures::StreamExt;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, BodyStream, Full, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader, Lines};
use tokio::net::UnixStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::io::{ReaderStream, StreamReader};

use super::types::Failure;
use crate::daemon::problem;

type Body = BoxBody<Bytes, io::Error>;
/// Pieces of a file read at a time.
const PIECE: usize = 256 * 1024;

/// The way to a daemon.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

/// An answer of many lines.
pub struct Stream {
    lines: Lines<Box<dyn tokio::io::AsyncBufRead + Unpin + Send>>,
}

impl Stream {
    /// The next line; `None` at the end.
    pub async fn next<T: DeserializeOwned>(&mut self) -> anyhow::Result<Option<T>> {
        match self.lines.next_line().await? {
            Some(line) => match serde_json::from_str(&line) {
                Ok(value) => Ok(Some(value)),
                Err(error) => match serde_json::from_str::<Failure>(&line) {
                    Ok(failure) => Err(problem(failure.error, failure.hint)),
                    Err(_) => Err(error.into()),
                },
            },
            None => Ok(None),
        }
    }
}

impl Client {
    /// The daemon behind this socket.
    pub fn new(socket: &Path) -> Client {
        Client { socket: socket.to_owned() }
    }

    /// GET.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        let response = self.send(Method::GET, path, empty()).await?;
        parse(response).await
    }

    /// POST with a JSON body.
    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> anyhow::Result<T> {
        let body = Full::new(Bytes::from(serde_json::to_vec(body)?)).map_err(|never| match never {}).boxed();
        let response = self.send(Method::POST, path, body).await?;
        parse(response).await
    }

    /// DELETE.
    pub async fn delete<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        let response = self.send(Method::DELETE, path, empty()).await?;
        parse(response).await
    }

    /// GET of many lines.
    pub async fn stream(&self, path: &str) -> anyhow::Result<Stream> {
        let response = self.send(Method::GET, path, empty()).await?;
        into_stream(response).await
    }

    /// POST with a JSON body, answered by many lines.
    pub async fn post_stream_of(&self, path: &str, body: &impl Serialize) -> anyhow::Result<Stream> {
        let body = Full::new(Bytes::from(serde_json::to_vec(body)?)).map_err(|never| match never {}).boxed();
        let response = self.send(Method::POST, path, body).await?;
        into_stream(response).await
    }

    /// POST of a file, answered by many lines. `read` is told how many bytes have been sent.
    pub async fn upload(
        &self,
        path: &str,
        file: impl AsyncRead + Send + Sync + Unpin + 'static,
        read: impl Fn(u64) + Send + Sync + 'static,
    ) -> anyhow::Result<Stream> {
        let pieces = ReaderStream::with_capacity(file, PIECE).map(move |piece| {
            piece.map(|piece| {
                read(piece.len() as u64);
                Frame::data(piece)
            })
        });
        let response = self.send(Method::POST, path, BodyExt::boxed(StreamBody::new(pieces))).await?;
        into_stream(response).await
    }

    /// The same from pieces made on the way.
    pub async fn upload_pieces(
        &self,
        path: &str,
        pieces: tokio::sync::mpsc::Receiver<io::Result<Bytes>>,
    ) -> anyhow::Result<Stream> {
        let pieces = ReceiverStream::new(pieces).map(|piece| piece.map(Frame::data));
        let response = self.send(Method::POST, path, BodyExt::boxed(StreamBody::new(pieces))).await?;
        into_stream(response).await
    }

    /// POST in which both sides go on speaking.
    pub async fn exchange(
        &self,
        path: &str,
        pieces: tokio::sync::mpsc::Receiver<io::Result<Bytes>>,
    ) -> anyhow::Result<Box<dyn AsyncRead + Unpin + Send>> {
        let pieces = ReceiverStream::new(pieces).map(|piece| piece.map(Frame::data));
        let response = self.send(Method::POST, path, BodyExt::boxed(StreamBody::new(pieces))).await?;
        Ok(Box::new(into_reader(response)))
    }

    async fn send(&self, method: Method, path: &str, body: Body) -> anyhow::Result<Response<Incoming>> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|error| self.unreachable(&error))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        // The daemon may end in the middle; then the answer's own reader sees it.
        tokio::spawn(async move { drop(connection.await) });
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "moyai")
            .header("content-type", "application/json")
            .body(body)?;
        let response = sender.send_request(request).await;
        let response = response.map_err(|error| {
            problem(format!("the daemon broke off: {error}"), "its log is daemon.log in its data folder")
        })?;
        if response.status().is_success() {
            return Ok(response);
        }
        let bytes = response.into_body().collect().await?.to_bytes();
        match serde_json::from_slice::<Failure>(&bytes) {
            Ok(failure) => Err(problem(failure.error, failure.hint)),
            Err(_) => Err(problem(
                format!("the daemon answers: {}", String::from_utf8_lossy(&bytes)),
                "are the daemon and this command of the same release?",
            )),
        }
    }

    fn unreachable(&self, error: &io::Error) -> anyhow::Error {
        let why = match error.kind() {
            io::ErrorKind::NotFound => "no such file".to_owned(),
            io::ErrorKind::ConnectionRefused => "nobody listens there".to_owned(),
            io::ErrorKind::PermissionDenied => "permission denied".to_owned(),
            _ => error.to_string(),
        };
        let hint = if error.kind() == io::ErrorKind::PermissionDenied {
            "the daemon's socket is root's: try with sudo"
        } else {
            "start it with `moyai up` (`moyai init` for a new mesh), or name another with --socket"
        };
        problem(format!("no daemon answers at {} ({why})", self.socket.display()), hint)
    }
}

fn empty() -> Body {
    Full::new(Bytes::new()).map_err(|never| match never {}).boxed()
}

async fn parse<T: DeserializeOwned>(response: Response<Incoming>) -> anyhow::Result<T> {
    let bytes = response.into_body().collect().await?.to_bytes();
    Ok(serde_json::from_slice(&bytes)?)
}

fn into_reader(response: Response<Incoming>) -> impl tokio::io::AsyncBufRead + Unpin + Send {
    let frames = BodyStream::new(response.into_body()).filter_map(|frame| async {
        match frame {
            Ok(frame) => frame.into_data().ok().map(Ok),
            Err(error) => Some(Err(io::Error::other(error))),
        }
    });
    BufReader::new(StreamReader::new(Box::pin(frames)))
}

async fn into_stream(response: Response<Incoming>) -> anyhow::Result<Stream> {
    let reader: Box<dyn tokio::io::AsyncBufRead + Unpin + Send> = Box::new(into_reader(response));
    Ok(Stream { lines: reader.lines() })
}
