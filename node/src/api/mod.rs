//! The local API: HTTP on a Unix socket, one JSON object a line where there are many.
//!
//! - [`types`]: what travels; field names are stable
//! - [`view`]: how the node's state becomes that
//! - [`server`]: the daemon's side; [`changes`]: what of it changes what runs;
//!   [`images`]: what is done with images, [`pull`]: how they come here
//! - [`client`]: the command line's side
//!
//! Who may write to the socket may do anything on this node, as with docker's: it is readable by root only.

mod changes;
pub mod client;
mod exec;
pub(crate) mod images;
mod json;
mod pull;
pub mod server;
pub mod types;
pub(crate) mod view;
