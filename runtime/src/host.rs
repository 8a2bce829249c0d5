//! The machine: what it has, how busy it is, what this process may do on it, and other hosts' namespaces.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::time::Duration;

use nix::ifaddrs::InterfaceAddress;
use nix::net::if_::InterfaceFlags;
use nix::sched::{CloneFlags, setns, unshare};

/// What a machine can give.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Capacity {
    /// Thousandths of a core.
    pub cpu_milli: u64,
    /// Bytes.
    pub memory: u64,
}

/// Cores that this process may use, and memory, as the kernel reports them.
pub fn capacity() -> Capacity {
    let cores = std::thread::available_parallelism().map_or(1, usize::from) as u64;
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    Capacity { cpu_milli: cores * 1000, memory: kib.unwrap_or(0) * 1024 }
}

/// Processors and memory nodes that this process may use, each as a list (cpuset(7), "List format").
pub fn parts() -> (String, String) {
    let text = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let list = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("0").trim().to_owned();
    (list("Cpus_allowed_list:"), list("Mems_allowed_list:"))
}

/// The highest hard limit that this process may give to others, by `setrlimit(2)`'s names in small letters and without `RLIMIT_`;
/// none is any.
pub fn highest_limit(name: &str) -> Option<u64> {
    crate::oci::highest_limit(crate::container::limit_kind(name)?)
}

/// Capabilities, without `CAP_`, that nothing that this process starts can have.
pub fn missing_capabilities() -> BTreeSet<String> {
    let names = crate::oci::missing_capabilities().into_iter();
    names.map(|name| name.trim_start_matches("CAP_").to_owned()).collect()
}

/// Controllers of cgroups, by their names in v2, that some workloads ask for and none can have here.
pub fn missing_controllers() -> BTreeSet<String> {
    crate::cgroup::missing().into_iter().map(str::to_owned).collect()
}

/// Share of the last ten seconds in which some task waited for a processor, 0–100 (Documentation/accounting/psi.rst);
/// 0 where the kernel has no PSI.
pub fn cpu_pressure() -> u8 {
    let text = fs::read_to_string("/proc/pressure/cpu").unwrap_or_default();
    let some = text.lines().find_map(|line| line.strip_prefix("some avg10=")?.split(' ').next()?.parse::<f64>().ok());
    some.map_or(0, |percent| percent.clamp(0.0, 100.0) as u8)
}

/// The addresses of this network namespace's interfaces that are up, but for those of one link (RFC 4291 section 2.5.6).
pub fn addresses() -> Vec<IpAddr> {
    let interfaces = nix::ifaddrs::getifaddrs().into_iter().flatten();
    let up = interfaces.filter(|interface| interface.flags.contains(InterfaceFlags::IFF_UP));
    let address = |interface: InterfaceAddress| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
    };
    // What containers are on is no way to this machine: every node has such a bridge, and often with the same addresses.
    let up = up.filter(|interface| !interface.interface_name.starts_with(crate::network::BRIDGE_PREFIX));
    up.filter_map(address).filter(|ip| !matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local())).collect()
}

/// The addresses of the bridges that containers are on.
pub fn bridge_addresses() -> Vec<IpAddr> {
    let interfaces = nix::ifaddrs::getifaddrs().into_iter().flatten();
    let bridges = interfaces.filter(|interface| interface.interface_name.starts_with(crate::network::BRIDGE_PREFIX));
    bridges.filter_map(|bridge| Some(IpAddr::V4(bridge.address?.as_sockaddr_in()?.ip()))).collect()
}

/// Time since the machine started, also while it slept (CLOCK_BOOTTIME); the same for all processes on it.
pub fn boot_time() -> Duration {
    // It fails for no clock that the kernel has, and it has had this one since 2.6.39.
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).map(Duration::from).unwrap_or_default()
}

/// This machine's name.
pub fn name() -> String {
    nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default()
}

/// What this process lacks to run containers, in words; empty is nothing.
pub fn missing_privileges() -> Vec<String> {
    // linux/capability.h; what each is for here.
    const NEEDED: [(u32, &str); 7] = [
        (0, "CAP_CHOWN (to keep the owners of an image's files)"),
        (1, "CAP_DAC_OVERRIDE (to write files of other owners)"),
        (6, "CAP_SETGID (to become a container's group)"),
        (7, "CAP_SETUID (to become a container's user)"),
        (12, "CAP_NET_ADMIN (to set up a container's network)"),
        (21, "CAP_SYS_ADMIN (to make namespaces and mounts)"),
        (27, "CAP_MKNOD (to make whiteouts and devices)"),
    ];
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let hex = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = hex.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0);
    NEEDED.iter().filter(|(bit, _)| effective & (1 << bit) == 0).map(|(_, what)| (*what).to_owned()).collect()
}

/// Enters the network namespace at `path`, and mount and UTS namespaces of its own: this process then sees the machine
/// as another host would. Meant for a process with one thread that goes on to exec.
pub fn enter_network(path: &Path) -> io::Result<()> {
    setns(File::open(path)?, CloneFlags::CLONE_NEWNET)?;
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS)?;
    let none: Option<&str> = None;
    let flags = nix::mount::MsFlags::MS_REC | nix::mount::MsFlags::MS_PRIVATE;
    nix::mount::mount(none, "/", none, flags, none)?;
    // /sys shows the network devices of the namespace it was mounted in.
    let flags = nix::mount::MsFlags::MS_NOSUID | nix::mount::MsFlags::MS_NODEV | nix::mount::MsFlags::MS_NOEXEC;
    nix::mount::mount(Some("sysfs"), "/sys", Some("sysfs"), flags, none)?;
    Ok(())
}

/// Moves this process into the cgroup subtree `name`, made if need be, and makes that the root of what it sees: it and
/// what it starts can use no more of the hierarchies than another host could. After [`enter_network`].
pub fn enter_cgroup(name: &str) -> io::Result<()> {
    let top = Path::new("/sys/fs/cgroup");
    let none: Option<&str> = None;
    let flags = nix::mount::MsFlags::MS_NOSUID | nix::mount::MsFlags::MS_NODEV | nix::mount::MsFlags::MS_NOEXEC;
    let unified = cgroups_rs::fs::hierarchies::is_cgroup2_unified_mode();
    // sysfs was mounted afresh, without what was mounted on it: the hierarchies are found through a mount of our own.
    if unified {
        nix::mount::mount(Some("cgroup2"), top, Some("cgroup2"), flags, none)?;
        let dir = top.join(name);
        fs::create_dir_all(&dir)?;
        fs::write(dir.join("cgroup.procs"), "0")?;
        unshare(CloneFlags::CLONE_NEWCGROUP)?;
        nix::mount::umount(top)?;
        nix::mount::mount(Some("cgroup2"), top, Some("cgroup2"), flags, none)?;
        // A cgroup with processes of its own cannot hand controllers down.
        let own = top.join("host");
        fs::create_dir_all(&own)?;
        return fs::write(own.join("cgroup.procs"), "0");
    }
    nix::mount::mount(Some("tmpfs"), top, Some("tmpfs"), flags, Some("mode=755"))?;
    let hierarchies = v1_hierarchies()?;
    for hierarchy in &hierarchies {
        let dir = mount_v1(top, hierarchy)?;
        let sub = dir.join(name);
        fs::create_dir_all(&sub)?;
        for file in ["cpuset.cpus", "cpuset.mems"] {
            // A cpuset takes no process before it has these.
            if let Ok(all) = fs::read_to_string(dir.join(file)) {
                fs::write(sub.join(file), all)?;
            }
        }
        if sub.join("cgroup.clone_children").exists() && hierarchy.contains("cpuset") {
            fs::write(sub.join("cgroup.clone_children"), "1")?;
        }
        fs::write(sub.join("cgroup.procs"), "0")?;
        nix::mount::umount(&dir)?;
    }
    unshare(CloneFlags::CLONE_NEWCGROUP)?;
    for hierarchy in &hierarchies {
        mount_v1(top, hierarchy)?;
    }
    Ok(())
}

/// The v1 hierarchies that have controllers, as mount options: `memory`, `cpu,cpuacct`.
fn v1_hierarchies() -> io::Result<Vec<String>> {
    let text = fs::read_to_string("/proc/self/cgroup")?;
    let options = text.lines().filter_map(|line| line.split(':').nth(1));
    Ok(options.filter(|name| !name.is_empty() && !name.starts_with("name=")).map(str::to_owned).collect())
}

fn mount_v1(top: &Path, hierarchy: &str) -> io::Result<std::path::PathBuf> {
    let flags = nix::mount::MsFlags::MS_NOSUID | nix::mount::MsFlags::MS_NODEV | nix::mount::MsFlags::MS_NOEXEC;
    let dir = top.join(hierarchy);
    fs::create_dir_all(&dir)?;
    nix::mount::mount(Some("cgroup"), &dir, Some("cgroup"), flags, Some(hierarchy))?;
    Ok(dir)
}

/// Every folder of the cgroup subtree `name`, in every hierarchy that is mounted under /sys/fs/cgroup; deepest first.
fn cgroup_dirs(name: &str) -> Vec<std::path::PathBuf> {
    fn below(dir: &Path, found: &mut Vec<std::path::PathBuf>) {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                below(&entry.path(), found);
            }
        }
        found.push(dir.to_owned());
    }
    let top = Path::new("/sys/fs/cgroup");
    let hierarchies = fs::read_dir(top).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut found = Vec::new();
    for dir in hierarchies.chain([top.to_owned()]).map(|hierarchy| hierarchy.join(name)).filter(|dir| dir.is_dir()) {
        below(&dir, &mut found);
    }
    found
}

/// Kills every process in the cgroup subtree `name` and waits until they are gone.
pub fn kill_cgroup(name: &str) {
    for _ in 0..500 {
        let texts = cgroup_dirs(name).into_iter().filter_map(|dir| fs::read_to_string(dir.join("cgroup.procs")).ok());
        let pids: std::collections::BTreeSet<i32> =
            texts.flat_map(|text| text.lines().filter_map(|line| line.parse().ok()).collect::<Vec<_>>()).collect();
        if pids.is_empty() {
            return;
        }
        for pid in pids {
            // It may have ended a moment ago.
            let _gone = signal_process(pid, libc::SIGKILL);
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

/// Removes the cgroup subtree `name`, which must have no processes.
pub fn remove_cgroup(name: &str) -> io::Result<()> {
    for dir in cgroup_dirs(name) {
        match fs::remove_dir(&dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Names this host, in its own UTS namespace.
pub fn set_name(name: &str) -> io::Result<()> {
    Ok(nix::unistd::sethostname(name)?)
}

/// Sends a signal to a process this user started.
pub fn signal_process(pid: i32, signal: i32) -> io::Result<()> {
    let signal = nix::sys::signal::Signal::try_from(signal)?;
    Ok(nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal)?)
}

/// Has whoever waits to read from this TCP socket wait until there are so many bytes, or no more come (SO_RCVLOWAT, socket(7)).
pub fn wake_for(socket: impl AsFd, bytes: u32) -> io::Result<()> {
    crate::sys::set_low_water_mark(socket.as_fd().as_raw_fd(), bytes)
}

/// Rows and columns of the terminal at standard output.
pub fn terminal_size() -> Option<(u16, u16)> {
    crate::sys::terminal_size(&io::stdout()).ok()
}

/// How many columns it has.
pub fn terminal_columns() -> Option<u16> {
    terminal_size().map(|(_, columns)| columns)
}

/// The user whose process has the other end of a TCP connection on this machine, `peer` being its address and `local` this end's:
/// the kernel's word (/proc/net/tcp and tcp6, where such a socket may be either), so it cannot be made up. `None` when it is no
/// connection of this machine, or not one alone.
pub fn socket_owner(peer: SocketAddr, local: SocketAddr) -> Option<u32> {
    const ESTABLISHED: &str = "01";
    let word = |bytes: [u8; 4]| format!("{:08X}", u32::from_ne_bytes(bytes));
    let v4 = |address: SocketAddr| match address.ip().to_canonical() {
        IpAddr::V4(ip) => Some(format!("{}:{:04X}", word(ip.octets()), address.port())),
        IpAddr::V6(_) => None,
    };
    let v6 = |address: SocketAddr| {
        let ip = match address.ip() {
            IpAddr::V4(ip) => ip.to_ipv6_mapped(),
            IpAddr::V6(ip) => ip,
        };
        let words = ip.octets().chunks(4).map(|four| word([four[0], four[1], four[2], four[3]])).collect::<String>();
        Some(format!("{words}:{:04X}", address.port()))
    };
    let mut owners = Vec::new();
    for (file, ends) in [("tcp", v4(peer).zip(v4(local))), ("tcp6", v6(peer).zip(v6(local)))] {
        let Some((peer, local)) = ends else { continue };
        // Without IPv6 there is no second table.
        let table = std::fs::read_to_string(Path::new("/proc/net").join(file)).unwrap_or_default();
        for line in table.lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            // What has ended is listed too, as root's.
            if fields.get(1..4) == Some(&[&*peer, &*local, ESTABLISHED]) {
                owners.push(fields.get(7)?.parse().ok()?);
            }
        }
    }
    match owners.as_slice() {
        [owner] => Some(*owner),
        _ => None,
    }
}

/// The user that this process runs as.
pub fn own_user() -> u32 {
    nix::unistd::geteuid().as_raw()
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;

    #[test]
    fn whoever_waits_to_read_is_woken_for_many_bytes_or_the_last() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (receiver, _) = listener.accept().unwrap();
        let is_ready = |wait: u16| {
            let mut sockets = [PollFd::new(receiver.as_fd(), PollFlags::POLLIN)];
            poll(&mut sockets, PollTimeout::from(wait)).unwrap() > 0
        };
        wake_for(&receiver, 1000).unwrap();
        sender.write_all(&[7; 999]).unwrap();
        assert!(!is_ready(50));
        sender.write_all(&[7]).unwrap();
        assert!(is_ready(10_000));
        wake_for(&receiver, 2000).unwrap();
        assert!(!is_ready(0));
        drop(sender);
        assert!(is_ready(10_000), "no more come");
    }
}
