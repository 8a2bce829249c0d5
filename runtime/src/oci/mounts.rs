//! What the options of a mount mean (runtime-spec config.md, "Linux mount options"; mount(8)).

use nix::mount::MsFlags;
use oci_spec::runtime::Mount;

/// The options of one mount.
#[derive(Clone, Debug)]
pub(super) struct Options {
    /// It is what is somewhere already.
    pub(super) bind: bool,
    /// With what is mounted below it.
    pub(super) recursive: bool,
    /// Flags of a new file system.
    pub(super) flags: MsFlags,
    /// `MOUNT_ATTR_*` of a bind mount.
    pub(super) set: u64,
    pub(super) clear: u64,
    /// The same for all below it.
    pub(super) set_below: u64,
    pub(super) clear_below: u64,
    /// How mounts and unmounts spread, for it, or for it and all below.
    pub(super) propagation: Option<MsFlags>,
    /// A tmpfs begins with what was in its place.
    pub(super) copy_up: bool,
    /// Owners are shifted by its mappings, or by the container's; with all below it if so.
    pub(super) shifted: Option<bool>,
    /// For the file system itself.
    pub(super) data: Vec<String>,
}

/// One word: its flag for a new file system, its attribute for a bind mount, and whether it sets them.
struct Word(&'static str, MsFlags, u64, bool);

const NONE: MsFlags = MsFlags::empty();
const ATIME: u64 = libc::MOUNT_ATTR__ATIME;
const WORDS: [Word; 25] = [
    Word("ro", MsFlags::MS_RDONLY, libc::MOUNT_ATTR_RDONLY, true),
    Word("rw", MsFlags::MS_RDONLY, libc::MOUNT_ATTR_RDONLY, false),
    Word("nosuid", MsFlags::MS_NOSUID, libc::MOUNT_ATTR_NOSUID, true),
    Word("suid", MsFlags::MS_NOSUID, libc::MOUNT_ATTR_NOSUID, false),
    Word("nodev", MsFlags::MS_NODEV, libc::MOUNT_ATTR_NODEV, true),
    Word("dev", MsFlags::MS_NODEV, libc::MOUNT_ATTR_NODEV, false),
    Word("noexec", MsFlags::MS_NOEXEC, libc::MOUNT_ATTR_NOEXEC, true),
    Word("exec", MsFlags::MS_NOEXEC, libc::MOUNT_ATTR_NOEXEC, false),
    Word("nodiratime", MsFlags::MS_NODIRATIME, libc::MOUNT_ATTR_NODIRATIME, true),
    Word("diratime", MsFlags::MS_NODIRATIME, libc::MOUNT_ATTR_NODIRATIME, false),
    Word("nosymfollow", MsFlags::from_bits_retain(256), libc::MOUNT_ATTR_NOSYMFOLLOW, true),
    Word("symfollow", MsFlags::from_bits_retain(256), libc::MOUNT_ATTR_NOSYMFOLLOW, false),
    Word("noatime", MsFlags::MS_NOATIME, libc::MOUNT_ATTR_NOATIME, true),
    Word("atime", MsFlags::MS_NOATIME, ATIME, false),
    Word("relatime", MsFlags::MS_RELATIME, libc::MOUNT_ATTR_RELATIME, true),
    Word("norelatime", MsFlags::MS_RELATIME, ATIME, false),
    Word("strictatime", MsFlags::MS_STRICTATIME, libc::MOUNT_ATTR_STRICTATIME, true),
    Word("nostrictatime", MsFlags::MS_STRICTATIME, ATIME, false),
    Word("sync", MsFlags::MS_SYNCHRONOUS, 0, true),
    Word("async", MsFlags::MS_SYNCHRONOUS, 0, false),
    Word("dirsync", MsFlags::MS_DIRSYNC, 0, true),
    Word("mand", MsFlags::MS_MANDLOCK, 0, true),
    Word("silent", MsFlags::MS_SILENT, 0, true),
    Word("lazytime", MsFlags::MS_LAZYTIME, 0, true),
    Word("iversion", MsFlags::MS_I_VERSION, 0, true),
];
/// Words that ask for what is so anyway.
const USUAL: [&str; 6] = ["defaults", "nomand", "loud", "nolazytime", "noiversion", "remount"];

/// Every word that has a meaning of its own, for `features`.
pub(super) fn known() -> Vec<String> {
    let words = WORDS.iter().map(|word| word.0.to_owned());
    let below = WORDS.iter().filter(|word| word.2 != 0).map(|word| format!("r{}", word.0));
    let spread = ["shared", "slave", "private", "unbindable"];
    let spread = spread.iter().flat_map(|word| [(*word).to_owned(), format!("r{word}")]);
    let others = ["bind", "rbind", "defaults", "nomand", "loud", "nolazytime", "noiversion", "remount", "tmpcopyup"];
    let others = others.into_iter().chain(["idmap", "ridmap"]).map(str::to_owned);
    let mut all: Vec<String> = words.chain(below).chain(spread).chain(others).collect();
    all.sort();
    all
}

/// The flag of a kind of propagation, with what is below for those that begin with `r`.
pub(super) fn propagation(word: &str) -> Option<MsFlags> {
    let (word, below) = match word.strip_prefix('r') {
        Some(word) => (word, MsFlags::MS_REC),
        None => (word, NONE),
    };
    let flag = match word {
        "shared" => MsFlags::MS_SHARED,
        "slave" => MsFlags::MS_SLAVE,
        "private" => MsFlags::MS_PRIVATE,
        "unbindable" => MsFlags::MS_UNBINDABLE,
        _ => return None,
    };
    Some(flag | below)
}

/// What a mount asks for.
pub(super) fn parse(mount: &Mount) -> Options {
    let mut out = Options {
        bind: mount.typ().as_deref() == Some("bind"),
        recursive: false,
        flags: NONE,
        set: 0,
        clear: 0,
        set_below: 0,
        clear_below: 0,
        propagation: None,
        copy_up: false,
        shifted: None,
        data: Vec::new(),
    };
    for option in mount.options().iter().flatten() {
        match option.as_str() {
            "bind" => out.bind = true,
            "rbind" => (out.bind, out.recursive) = (true, true),
            "tmpcopyup" => out.copy_up = true,
            "idmap" => out.shifted = Some(false),
            "ridmap" => out.shifted = Some(true),
            word => out.word(word),
        }
    }
    let mapped = mount.uid_mappings().as_ref().is_some_and(|list| !list.is_empty());
    if mapped && out.shifted.is_none() {
        out.shifted = Some(false);
    }
    out
}

impl Options {
    fn word(&mut self, word: &str) {
        if USUAL.contains(&word) {
            return;
        }
        if let Some(flag) = propagation(word) {
            self.propagation = Some(flag);
            return;
        }
        if let Some(Word(_, flag, attribute, sets)) = WORDS.iter().find(|known| known.0 == word) {
            self.flags.set(*flag, *sets);
            change(&mut self.set, &mut self.clear, *attribute, *sets);
            return;
        }
        let below = word.strip_prefix('r').and_then(|word| WORDS.iter().find(|known| known.0 == word && known.2 != 0));
        match below {
            Some(Word(_, _, attribute, sets)) => change(&mut self.set_below, &mut self.clear_below, *attribute, *sets),
            None => self.data.push(word.to_owned()),
        }
    }
}

/// The kinds of access time exclude each other: mount_setattr(2) wants all of them cleared before one is set.
fn change(set: &mut u64, clear: &mut u64, attribute: u64, sets: bool) {
    let is_atime = attribute & ATIME != 0 || attribute == libc::MOUNT_ATTR_RELATIME;
    if is_atime {
        *set &= !ATIME;
        *clear |= ATIME;
    }
    if sets {
        *set |= attribute;
        if !is_atime {
            *clear &= !attribute;
        }
    } else if !is_atime {
        *set &= !attribute;
        *clear |= attribute;
    }
}
