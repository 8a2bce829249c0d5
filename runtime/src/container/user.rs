//! Who a container runs as: the `User` of an image, looked up in the image's own passwd and group files.

use std::fs;
use std::path::{Path, PathBuf};

/// A resolved user.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct User {
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) groups: Vec<u32>,
    pub(super) home: Option<String>,
}

/// Resolves `user`, `uid`, `user:group` or `uid:gid`. `layers` are lowest first, as far as these files are concerned.
pub(super) fn resolve(text: &str, layers: &[PathBuf]) -> Result<User, String> {
    let passwd = read(layers, "etc/passwd");
    let group = read(layers, "etc/group");
    let (user_text, group_text) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (text, None),
    };
    let user_text = if user_text.is_empty() { "0" } else { user_text };
    let number = user_text.parse::<u32>().ok();
    let line = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|fields| {
        fields.len() >= 6 && (fields[0] == user_text || number.is_some_and(|uid| fields[2].parse() == Ok(uid)))
    });
    let mut user = match (&line, number) {
        (Some(fields), _) => User {
            uid: fields[2].parse().map_err(|_| format!("user {user_text} has no number in /etc/passwd"))?,
            gid: fields[3].parse().map_err(|_| format!("user {user_text} has no group in /etc/passwd"))?,
            groups: Vec::new(),
            home: Some(fields[5].to_owned()).filter(|home| !home.is_empty()),
        },
        (None, Some(uid)) => User { uid, ..User::default() },
        (None, None) => return Err(format!("the image has no user `{user_text}` in its /etc/passwd")),
    };
    let groups: Vec<Vec<&str>> =
        group.lines().map(|line| line.split(':').collect()).filter(|f: &Vec<_>| f.len() >= 4).collect();
    match group_text {
        Some(wanted) => {
            let found = groups.iter().find(|fields| fields[0] == wanted).and_then(|fields| fields[2].parse().ok());
            user.gid = found
                .or_else(|| wanted.parse().ok())
                .ok_or_else(|| format!("the image has no group `{wanted}` in its /etc/group"))?;
        }
        None => {
            let name = line.as_ref().map_or("", |fields| fields[0]);
            let member = |fields: &&Vec<&str>| !name.is_empty() && fields[3].split(',').any(|member| member == name);
            user.groups = groups.iter().filter(member).filter_map(|fields| fields[2].parse().ok()).collect();
        }
    }
    Ok(user)
}

/// The topmost layer's copy, if it is a plain file of a sane size.
fn read(layers: &[PathBuf], path: &str) -> String {
    let plain = |layer: &PathBuf| -> Option<PathBuf> {
        let full = layer.join(path);
        let folder = fs::symlink_metadata(layer.join("etc")).ok()?;
        let meta = fs::symlink_metadata(&full).ok()?;
        (folder.is_dir() && meta.is_file() && meta.len() <= 1 << 20).then_some(full)
    };
    let found = layers.iter().rev().find_map(plain);
    found
        .as_deref()
        .and_then(|path: &Path| fs::read(path).ok())
        .map_or_else(String::new, |bytes| String::from_utf8_lossy(&bytes).into_owned())
}
