//! JSON of requests and answers.
//!
//! By serde_json without its feature `raw_value`, which axum's own would turn on for the whole program: with it a
//! [`serde_json::Value`] gives an object's first key, of one name, a meaning, and reads the text behind it as a document anew,
//! with a new limit of depth. Some ten kilobytes of such documents in one another, sent by a registry or pushed to one,
//! would be deeper than any stack.

use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::server::{Failed, failed};

/// A body of JSON.
pub(super) struct Json<T>(pub(super) T);

/// A request's is of axum's limit at most, 2 MB.
impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Json<T> {
    type Rejection = Failed;

    async fn from_request(request: Request, state: &S) -> Result<Self, Failed> {
        let wrong = |error: String| {
            let hint = "are the daemon and this command of the same release?";
            failed(format!("the request cannot be read: {error}"), hint)
        };
        let bytes = Bytes::from_request(request, state).await.map_err(|error| wrong(error.body_text()))?;
        serde_json::from_slice(&bytes).map(Json).map_err(|error| wrong(error.to_string()))
    }
}

impl<T: Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        match serde_json::to_vec(&self.0) {
            Ok(text) => ([(header::CONTENT_TYPE, "application/json")], text).into_response(),
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    #[test]
    fn no_key_makes_a_text_a_document() {
        const KEY: &str = "$serde_json::private::RawValue";
        let read = |text: &str| serde_json::from_str::<Value>(text).expect("JSON");
        assert_eq!(read(&format!("{{\"{KEY}\":\"[1]\"}}"))[KEY], json!("[1]"));
        // Of 64 documents in one another each is as deep as one alone may be, on a stack as the daemon's threads have it.
        let mut text = "null".to_owned();
        for _ in 0..64 {
            let quoted = text.replace('\\', "\\u005c").replace('"', "\\u0022");
            text = format!("{}{{\"{KEY}\":\"{quoted}\"}}{}", "[".repeat(120), "]".repeat(120));
        }
        assert!(text.len() < 200_000, "{}", text.len());
        let thread = std::thread::Builder::new().stack_size(1 << 20);
        let depth = move || std::iter::successors(Some(&read(&text)), |value| value.get(0)).count();
        assert_eq!(thread.spawn(depth).expect("a thread").join().expect("no end of the stack"), 121);
    }
}
