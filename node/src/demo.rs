//! placeholder
pub const BUILT_IN: &str = "__built_in";
pub fn built_in() -> std::process::ExitCode { std::process::ExitCode::SUCCESS }
pub fn run(_image: &Option<std::path::PathBuf>) -> anyhow::Result<u8> { Ok(0) }
pub fn virtual_host(_w: &crate::cli::args::VirtualHostWish) -> anyhow::Result<u8> { Ok(0) }
