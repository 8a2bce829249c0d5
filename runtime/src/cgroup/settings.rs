//! Which file each field of `linux.resources` is (runtime-spec config-linux.md, "Control groups"; the conversions to v2 are
//! crun's and systemd's, so that the same bundle means the same everywhere).

use std::fs;
use std::path::Path;

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources, LinuxThrottleDevice};

/// Controllers that only some containers need.
pub(super) const CONTROLLERS: [&str; 6] = ["cpuset", "blkio", "hugetlb", "net_cls", "net_prio", "rdma"];

/// One file to be written.
#[derive(Debug)]
pub(super) struct Setting {
    pub(super) controller: &'static str,
    pub(super) file: String,
    pub(super) value: String,
    /// Which field asks for it, below `linux.resources`.
    pub(super) field: String,
    pub(super) need: Need,
}

/// What becomes of it where there is no such file.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) enum Need {
    /// An error.
    Must,
    /// It is left out, with a warning.
    May,
    /// Always an error: only the other version of cgroups has it, and this one no equivalent (runtime-spec config-linux.md, "Unified").
    Other,
}

impl Setting {
    /// The controller of v2 that its file belongs to: the beginning of its name.
    pub(super) fn hierarchy(&self) -> &str {
        self.file.split('.').next().unwrap_or(&self.file)
    }

    /// Whether something is limited by it.
    pub(super) fn limits(&self) -> bool {
        !["-1", "max"].contains(&self.value.as_str())
    }

    /// That it is left out.
    pub(super) fn left_out(&self, reason: &str) -> String {
        format!("linux.resources.{} left out: {reason}", self.field)
    }
}

struct List(Vec<Setting>);

impl List {
    fn push(&mut self, controller: &'static str, file: &str, field: &str, value: Option<impl ToString>) {
        self.push_as(Need::Must, controller, file, field, value);
    }

    fn push_optional(&mut self, controller: &'static str, file: &str, field: &str, value: Option<impl ToString>) {
        self.push_as(Need::May, controller, file, field, value);
    }

    fn push_as(&mut self, need: Need, controller: &'static str, file: &str, field: &str, value: Option<impl ToString>) {
        if let Some(value) = value {
            let (file, field, value) = (file.to_owned(), field.to_owned(), value.to_string());
            self.0.push(Setting { controller, file, value, field, need });
        }
    }
}

/// Everything that is to be written, in order; also what this machine cannot have, which is refused or left out in words.
pub(super) fn of(resources: Option<&LinuxResources>, v2: bool) -> Vec<Setting> {
    let mut list = List(Vec::new());
    let Some(resources) = resources else { return list.0 };
    // Of v1 alone: there some are needed, and some its newer kernels have no more.
    let needed = if v2 { Need::Other } else { Need::Must };
    let optional = if v2 { Need::Other } else { Need::May };
    // Below 0 is no limit, which v2 has as well.
    let is_of_v1 = |value: &i64| is_asked(value) && (!v2 || *value > 0);
    if let Some(memory) = resources.memory() {
        if v2 {
            memory_v2(memory, &mut list)
        } else {
            memory_v1(memory, &mut list)
        }
        let [kernel, tcp] = [memory.kernel(), memory.kernel_tcp()].map(|limit| limit.filter(is_of_v1));
        // Kernels before 5.16 limit by it, those after refuse it, and the newest take it and mind it no more.
        list.push_as(optional, "memory", "memory.kmem.limit_in_bytes", "memory.kernel", kernel);
        list.push_as(optional, "memory", "memory.kmem.tcp.limit_in_bytes", "memory.kernelTCP", tcp);
        // -1 of some clients, in 64 bits.
        let swappiness = memory.swappiness().filter(|swappiness| *swappiness != u64::MAX);
        list.push_as(needed, "memory", "memory.swappiness", "memory.swappiness", swappiness);
        let no_killer = memory.disable_oom_killer().filter(|disable| *disable).map(|_| 1);
        list.push_as(needed, "memory", "memory.oom_control", "memory.disableOOMKiller", no_killer);
    }
    if let Some(cpu) = resources.cpu() {
        if v2 {
            cpu_v2(cpu, &mut list)
        } else {
            cpu_v1(cpu, &mut list)
        }
        let (period, runtime) = (cpu.realtime_period().filter(is_asked), cpu.realtime_runtime().filter(is_of_v1));
        list.push_as(needed, "cpu", "cpu.rt_period_us", "cpu.realtimePeriod", period);
        list.push_as(needed, "cpu", "cpu.rt_runtime_us", "cpu.realtimeRuntime", runtime);
        cpuset(cpu, &mut list);
    }
    if let Some(pids) = resources.pids() {
        list.push("pids", "pids.max", "pids.limit", Some(pids.limit()).filter(is_asked).map(number));
    }
    if let Some(io) = resources.block_io() {
        if v2 {
            io_v2(io, &mut list)
        } else {
            io_v1(io, &mut list)
        }
        // Of a scheduler that Linux 5.0 has no more.
        let leaf_weight = io.leaf_weight().filter(is_asked);
        list.push_as(optional, "blkio", "blkio.leaf_weight", "blockIO.leafWeight", leaf_weight);
        for (at, device) in io.weight_device().iter().flatten().enumerate() {
            let weight = device.leaf_weight().filter(is_asked);
            let value = weight.map(|weight| format!("{}:{} {weight}", device.major(), device.minor()));
            let field = format!("blockIO.weightDevice[{at}].leafWeight");
            list.push_as(optional, "blkio", "blkio.leaf_weight_device", &field, value);
        }
    }
    for (at, limit) in resources.hugepage_limits().iter().flatten().enumerate() {
        let (size, end) = (limit.page_size(), if v2 { "max" } else { "limit_in_bytes" });
        let (field, value) = (format!("hugepageLimits[{at}]"), Some(limit.limit()));
        // Where the kernel can, a reservation is refused, instead of a fault that ends whoever makes it.
        list.push_optional("hugetlb", &format!("hugetlb.{size}.rsvd.{end}"), &field, value);
        list.push("hugetlb", &format!("hugetlb.{size}.{end}"), &field, value);
    }
    if let Some(network) = resources.network() {
        // Class and priority 0 are none.
        let class = network.class_id().filter(|class| !v2 || is_asked(class));
        list.push_as(needed, "net_cls", "net_cls.classid", "network.classID", class);
        for (at, priority) in network.priorities().iter().flatten().enumerate() {
            let level = Some(priority.priority()).filter(|level| !v2 || is_asked(level));
            let value = level.map(|level| format!("{} {level}", priority.name()));
            list.push_as(needed, "net_prio", "net_prio.ifpriomap", &format!("network.priorities[{at}]"), value);
        }
    }
    for (name, limit) in resources.rdma().iter().flatten() {
        let number = |value: Option<u32>| value.map_or("max".to_owned(), |value| value.to_string());
        let value =
            format!("{name} hca_handle={} hca_object={}", number(limit.hca_handles()), number(limit.hca_objects()));
        list.push("rdma", "rdma.max", &format!("rdma[{name}]"), Some(value));
    }
    for (file, value) in resources.unified().iter().flatten() {
        let need = if v2 { Need::Must } else { Need::Other };
        list.push_as(need, "unified", file, &format!("unified[{file}]"), Some(value));
    }
    list.0
}

/// 0 is not a limit that anybody wants: with it docker, and others whose types know no absence, say that they ask for none.
fn is_asked<T: Default + PartialEq>(value: &T) -> bool {
    *value != T::default()
}

/// -1 is no limit.
fn number(value: i64) -> String {
    if value < 0 { "max".to_owned() } else { value.to_string() }
}

fn memory_v1(memory: &LinuxMemory, list: &mut List) {
    list.push("memory", "memory.limit_in_bytes", "memory.limit", memory.limit().filter(is_asked));
    list.push("memory", "memory.soft_limit_in_bytes", "memory.reservation", memory.reservation().filter(is_asked));
    list.push_optional("memory", "memory.memsw.limit_in_bytes", "memory.swap", memory.swap().filter(is_asked));
    list.push(
        "memory",
        "memory.use_hierarchy",
        "memory.useHierarchy",
        memory.use_hierarchy().filter(|it| *it).map(|_| 1),
    );
}

fn memory_v2(memory: &LinuxMemory, list: &mut List) {
    list.push("memory", "memory.max", "memory.limit", memory.limit().filter(is_asked).map(number));
    list.push("memory", "memory.low", "memory.reservation", memory.reservation().filter(is_asked).map(number));
    // The spec's swap is memory and swap together.
    let swap = memory.swap().filter(is_asked).map(|both| match memory.limit() {
        Some(limit) if both >= limit && limit >= 0 => number(both - limit),
        _ => number(both),
    });
    list.push_optional("memory", "memory.swap.max", "memory.swap", swap);
}

fn cpu_v1(cpu: &LinuxCpu, list: &mut List) {
    list.push("cpu", "cpu.shares", "cpu.shares", cpu.shares().filter(is_asked));
    list.push("cpu", "cpu.cfs_period_us", "cpu.period", cpu.period().filter(is_asked));
    list.push("cpu", "cpu.cfs_quota_us", "cpu.quota", cpu.quota().filter(is_asked));
    list.push_optional("cpu", "cpu.cfs_burst_us", "cpu.burst", cpu.burst());
    list.push_optional("cpu", "cpu.idle", "cpu.idle", cpu.idle());
}

fn cpu_v2(cpu: &LinuxCpu, list: &mut List) {
    // 2 … 262,144 to 1 … 10,000.
    let weight = |shares: u64| 1 + shares.clamp(2, 262_144).saturating_sub(2) * 9999 / 262_142;
    list.push("cpu", "cpu.weight", "cpu.shares", cpu.shares().filter(is_asked).map(weight));
    let (quota, period) = (cpu.quota().filter(is_asked), cpu.period().filter(is_asked));
    if quota.is_some() || period.is_some() {
        let quota = quota.filter(|quota| *quota > 0).map_or("max".to_owned(), |quota| quota.to_string());
        list.push("cpu", "cpu.max", "cpu.quota", Some(format!("{quota} {}", period.unwrap_or(100_000))));
    }
    list.push_optional("cpu", "cpu.max.burst", "cpu.burst", cpu.burst());
    list.push_optional("cpu", "cpu.idle", "cpu.idle", cpu.idle());
}

fn cpuset(cpu: &LinuxCpu, list: &mut List) {
    list.push("cpuset", "cpuset.cpus", "cpu.cpus", cpu.cpus().as_ref().filter(|cpus| !cpus.is_empty()));
    list.push("cpuset", "cpuset.mems", "cpu.mems", cpu.mems().as_ref().filter(|mems| !mems.is_empty()));
}

/// A group of v1 begins without processors and memory: it takes those of the one above.
pub(super) fn inherit_cpuset(dir: &Path) {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let empty = |dir: &Path| fs::read_to_string(dir.join(file)).is_ok_and(|text| text.trim().is_empty());
        let chain: Vec<&Path> = dir.ancestors().take_while(|dir| empty(dir)).collect();
        for dir in chain.into_iter().rev() {
            let above = dir.parent().and_then(|above| fs::read_to_string(above.join(file)).ok()).unwrap_or_default();
            // What cannot be inherited is seen when the limit itself is written.
            drop(fs::write(dir.join(file), above.trim()));
        }
    }
}

type Throttle<'a> = (&'static str, &'static str, &'a Option<Vec<LinuxThrottleDevice>>, &'static str);

fn throttles(io: &LinuxBlockIo) -> [Throttle<'_>; 4] {
    [
        ("throttleReadBpsDevice", "blkio.throttle.read_bps_device", io.throttle_read_bps_device(), "rbps"),
        ("throttleWriteBpsDevice", "blkio.throttle.write_bps_device", io.throttle_write_bps_device(), "wbps"),
        ("throttleReadIOPSDevice", "blkio.throttle.read_iops_device", io.throttle_read_iops_device(), "riops"),
        ("throttleWriteIOPSDevice", "blkio.throttle.write_iops_device", io.throttle_write_iops_device(), "wiops"),
    ]
}

fn io_v1(io: &LinuxBlockIo, list: &mut List) {
    list.push_optional("blkio", "blkio.bfq.weight", "blockIO.weight", io.weight().filter(is_asked));
    for (at, device) in io.weight_device().iter().flatten().enumerate() {
        let weight = device.weight().filter(is_asked);
        let value = weight.map(|weight| format!("{}:{} {weight}", device.major(), device.minor()));
        let field = format!("blockIO.weightDevice[{at}].weight");
        list.push_optional("blkio", "blkio.bfq.weight_device", &field, value);
    }
    for (field, file, devices, _) in throttles(io) {
        for (at, device) in devices.iter().flatten().enumerate() {
            let value = format!("{}:{} {}", device.major(), device.minor(), device.rate());
            list.push("blkio", file, &format!("blockIO.{field}[{at}]"), Some(value));
        }
    }
}

fn io_v2(io: &LinuxBlockIo, list: &mut List) {
    // 10 … 1,000 to 1 … 10,000.
    let weight = |weight: u16| 1 + (u64::from(weight).clamp(10, 1000) - 10) * 9999 / 990;
    list.push_optional("io", "io.bfq.weight", "blockIO.weight", io.weight().filter(is_asked));
    list.push_optional("io", "io.weight", "blockIO.weight", io.weight().filter(is_asked).map(weight));
    for (at, device) in io.weight_device().iter().flatten().enumerate() {
        let field = format!("blockIO.weightDevice[{at}].weight");
        let of_device = |value: String| format!("{}:{} {value}", device.major(), device.minor());
        let own = device.weight().filter(is_asked);
        list.push_optional("io", "io.bfq.weight", &field, own.map(|own| of_device(own.to_string())));
        list.push_optional("io", "io.weight", &field, own.map(|own| of_device(weight(own).to_string())));
    }
    for (field, _, devices, key) in throttles(io) {
        for (at, device) in devices.iter().flatten().enumerate() {
            let value = format!("{}:{} {key}={}", device.major(), device.minor(), device.rate());
            list.push("io", "io.max", &format!("blockIO.{field}[{at}]"), Some(value));
        }
    }
}
