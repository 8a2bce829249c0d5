//! What this runtime can do, as `features` prints it (runtime-spec features.md).

use oci_spec::runtime::LinuxNamespaceType;

use super::{VERSION, mounts};

/// As JSON.
pub fn features() -> serde_json::Value {
    let namespaces = [
        LinuxNamespaceType::Cgroup,
        LinuxNamespaceType::Ipc,
        LinuxNamespaceType::Mount,
        LinuxNamespaceType::Network,
        LinuxNamespaceType::Pid,
        LinuxNamespaceType::Time,
        LinuxNamespaceType::User,
        LinuxNamespaceType::Uts,
    ];
    let actions = ["KILL", "KILL_THREAD", "KILL_PROCESS", "TRAP", "ERRNO", "NOTIFY", "TRACE", "LOG", "ALLOW"];
    let operators = ["NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"];
    let flags = ["TSYNC", "LOG", "SPEC_ALLOW", "WAIT_KILLABLE_RECV"].map(|flag| format!("SECCOMP_FILTER_FLAG_{flag}"));
    let archs = if cfg!(target_arch = "x86_64") { ["X86_64", "X86"] } else { ["AARCH64", "ARM"] };
    serde_json::json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": VERSION,
        "hooks": ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"],
        "mountOptions": mounts::known(),
        "linux": {
            "namespaces": namespaces,
            "capabilities": super::process::capability_names(),
            "cgroup": {"v1": true, "v2": true, "systemd": false, "systemdUser": false, "rdma": true},
            "seccomp": {
                "enabled": true,
                "actions": actions.map(|action| format!("SCMP_ACT_{action}")),
                "operators": operators.map(|operator| format!("SCMP_CMP_{operator}")),
                "archs": archs.map(|arch| format!("SCMP_ARCH_{arch}")),
                "knownFlags": flags,
                "supportedFlags": flags,
            },
            "apparmor": {"enabled": true},
            "selinux": {"enabled": true},
            "intelRdt": {"enabled": false},
            "mountExtensions": {"idmap": {"enabled": true}},
            "netDevices": {"enabled": false},
        },
    })
}
