//! What is made of containers before they are asked for: that it changes nothing but the time, and that nothing of it is left.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use moyai_tests::host::signal;
use moyai_tests::{Host, Lab, Output, PATIENCE, has_linux, images, wait_for};

/// What a container can see of itself, each line as good in any order; numbers that the kernel gives are left out.
const LOOK: &str = r#"
awk '{ at = index($0, " - "); split(substr($0, at + 3), rest, " "); root = $4; sub(".*/containers/[^/]*", "", root)
    print "mount", root, $5, $6, $7, rest[1], rest[2], rest[1] == "overlay" ? "" : rest[3] }' /proc/self/mountinfo
ls -lnR /dev | sed 's/  */ /g; s/ [A-Z][a-z][a-z] [0-9]* [0-9:]* / /; s/^total.*//'
ls -ln / /proc/sys /sys /sys/fs/cgroup | sed 's/  */ /g; s/ [A-Z][a-z][a-z] [0-9]* [0-9:]* / /; s/^total.*//' | grep -v "self\| proc$"
cat /proc/self/cgroup /proc/self/oom_score_adj /proc/self/limits /proc/self/mounts | grep -v ^overlay
grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp|SigBlk|SigIgn|SigCgt|Cpus_allowed|Mems_allowed)' /proc/self/status
sed 's/:.*//' /proc/net/dev; cat /proc/net/route; cat /proc/sys/net/ipv4/conf/lo/forwarding
hostname; id; umask; pwd; env | grep -v HOSTNAME; ls /proc/self/fd; ls /proc | grep -c '^[0-9]'
cat /proc/keys /proc/timer_list /proc/interrupts | wc -c; touch /proc/sys/kernel/hostname 2>&1; ls /sys/firmware
cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids/pids.max /sys/fs/cgroup/pids.max 2>&1
cat /sys/fs/cgroup/devices/devices.list 2>&1; cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us /sys/fs/cgroup/cpu.max 2>&1
touch /sys/fs/cgroup/x 2>&1; echo 1 2>&1 > /proc/sysrq-trigger; cat /etc/hosts /etc/resolv.conf | grep -v 10.210; true
"#;

fn is_called(pid: u32, name: &str) -> bool {
    fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == name)
}

/// The spares of a host: processes that wait for a container.
fn spares(host: &Host) -> BTreeSet<u32> {
    host.cgroups.processes().into_iter().filter(|pid| is_called(*pid, "moyai-spare")).collect()
}

/// The processes that it has started.
fn children(pid: u32) -> Vec<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().map(|pid| pid.parse().expect("a number")).collect()
}

/// Waits until there are some that are ready: each has a first process by then.
fn wait_for_spares(host: &Host) -> BTreeSet<u32> {
    wait_for("spares", PATIENCE, || {
        let all = spares(host);
        (all.len() >= 2 && all.iter().all(|pid| children(*pid).len() == 1)).then_some(all)
    })
}

fn one_host(options: &[&str]) -> Lab {
    let lab = Lab::mesh_with(1, options);
    let [host] = lab.hosts();
    host.load(&images::alpine());
    lab
}

/// A host with a folder that it offers, which is told too.
fn host_with_folder() -> (Lab, String) {
    let lab = Lab::new(1);
    let [host] = lab.hosts();
    let folder = lab.folder().join("later");
    fs::create_dir(&folder).expect("a folder");
    let folder = folder.to_str().expect("ASCII").to_owned();
    host.moyai(&["init", "--offer", &folder]).ok();
    host.load(&images::alpine());
    (lab, folder)
}

/// Runs a command among the daemon's mounts: they are those that count.
fn inside(host: &Host, args: &[&str]) -> Output {
    let daemon = host.daemon().to_string();
    host.run("nsenter", &[&["--mount", "--target", &daemon, "--"], args].concat())
}

/// Runs a script, with what it printed in order.
fn lines(host: &Host, options: &[&str], script: &str) -> Vec<String> {
    let start = ["run", "--rm", "--name", "look", "--hostname", "look"];
    let output = host.moyai(&[&start[..], options, &["alpine", "sh", "-c", script]].concat()).ok();
    let mut lines: Vec<String> = output.stdout.lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

/// Starts a script in the background; the id of the workload.
fn begin(host: &Host, name: &str, options: &[&str], script: &str) -> String {
    host.moyai(&[&["run", "-d", "--name", name], options, &["alpine", "sh", "-c", script]].concat()).ok();
    wait_for("it to run", PATIENCE, || {
        let row = host.workload(name)?;
        (row["state"] == "running").then(|| row["id"].as_str().expect("an id").to_owned())
    })
}

/// Starts it in the background; the shim that is its parent.
fn shim_of(host: &Host, name: &str, options: &[&str]) -> u32 {
    let id = begin(host, name, options, "exec sleep 1000");
    host.container(&id).status("PPid").parse().expect("a number")
}

#[test]
fn what_starts_from_a_spare_is_as_any_other() {
    let lab = one_host(&["--offer-host-network"]);
    let [host] = lab.hosts();
    for (at, options) in [
        &["--network", "none"][..],
        &[],
        &["--network", "host"],
        &["--memory", "64m", "--pids-limit", "50", "--cpus", "0.5", "--network", "none"],
        &["--shm-size", "8m", "--user", "1000", "--read-only", "--ulimit", "nofile=99", "--cap-add", "SYS_NICE"],
        &["--tmpfs", "/dev/shm/x", "--sysctl", "net.ipv4.ip_unprivileged_port_start=9", "--cap-drop", "ALL"],
        // What is hidden is hidden after all mounts.
        &["--tmpfs", "/proc/fs", "--tmpfs", "/sys/firmware"],
        &["--sandbox", "strict"],
    ]
    .into_iter()
    .enumerate()
    {
        // A new daemon has none.
        host.moyai(&["down"]).ok();
        wait_for("no spares", PATIENCE, || spares(host).is_empty().then_some(()));
        host.up().ok();
        let cold = lines(host, options, LOOK);
        assert!(cold.len() > 60, "{cold:?}");
        if options.contains(&"strict") {
            continue;
        }
        let there = wait_for_spares(host);
        let warm = lines(host, options, LOOK);
        let without = |all: &[String], other: &[String]| {
            all.iter().filter(|line| !other.contains(line)).cloned().collect::<Vec<_>>()
        };
        assert_eq!(without(&warm, &cold), without(&cold, &warm), "{options:?}");
        assert_eq!(warm.len(), cold.len(), "{options:?}");
        // One of them it was: it is no spare any more.
        assert!(there.difference(&spares(host)).next().is_some(), "{options:?} found none");
        let there = wait_for_spares(host);
        let shim = shim_of(host, &format!("again-{at}"), options);
        assert!(there.contains(&shim), "{options:?}: {shim} is none of {there:?}");
        assert_eq!(fs::read_to_string(format!("/proc/{shim}/comm")).expect("its name").trim(), "moyai-shim");
        host.moyai(&["rm", "-f", &format!("again-{at}")]).ok();
    }
}

#[test]
fn what_started_from_a_spare_is_reached_as_any_other() {
    let lab = one_host(&[]);
    let [host] = lab.hosts();
    host.moyai(&["run", "--rm", "alpine", "true"]).ok();
    let there = wait_for_spares(host);
    assert!(there.contains(&shim_of(host, "web", &["--memory", "64m", "--init"])));
    host.moyai(&["exec", "web", "cat", "/proc/1/comm"]).ok().says("moyai-init");
    host.moyai(&["exec", "web", "sh", "-c", "echo written > /tmp/there"]).ok();
    let to = lab.folder().join("there");
    host.moyai(&["cp", "web:/tmp/there", to.to_str().expect("ASCII")]).ok();
    assert_eq!(fs::read_to_string(&to).expect("the copy"), "written\n");
    host.moyai(&["pause", "web"]).ok();
    host.moyai(&["unpause", "web"]).ok();
    host.moyai(&["rm", "web"]).ok();
    wait_for("its group to go", PATIENCE, || host.cgroups.containers().is_empty().then_some(()));
}

#[test]
fn what_the_machine_mounts_later_is_there() {
    let (lab, folder) = host_with_folder();
    let [host] = lab.hosts();
    host.moyai(&["run", "--rm", "alpine", "true"]).ok();
    let there = wait_for_spares(host);
    inside(host, &["mount", "-t", "tmpfs", "tmpfs", &folder]).ok();
    inside(host, &["touch", &format!("{folder}/mounted")]).ok();
    host.moyai(&["run", "--rm", "-v", &format!("{folder}:/later"), "alpine", "ls", "/later"]).ok().says("mounted");
    // And what it unmounts is nowhere kept.
    wait_for("other spares", PATIENCE, || spares(host).is_disjoint(&there).then_some(()));
    wait_for_spares(host);
    inside(host, &["umount", &folder]).ok();
    wait_for("none that has it", PATIENCE, || {
        let has = |pid: &u32| {
            let path = format!("/proc/{pid}/mountinfo");
            fs::read_to_string(path).is_ok_and(|text| text.lines().any(|line| line.contains(&folder)))
        };
        (!host.cgroups.processes().iter().any(has)).then_some(())
    });
}

#[test]
fn mounts_that_come_and_go_leave_the_spares() {
    // Before Linux 6.8 one mount cannot be told from another in the same place.
    if !has_linux(6, 8) {
        return eprintln!("this Linux has no listmount(2)");
    }
    let (lab, folder) = host_with_folder();
    let [host] = lab.hosts();
    let [one, other] = ["one", "other"].map(|name| lab.folder().join(name).to_string_lossy().into_owned());
    fs::create_dir(&one).expect("a folder");
    let mounts = || inside(host, &["mount", "--bind", &one, &folder]).ok();
    let mount = format!("{folder}:/later");
    let sees = |script: &str| host.moyai(&["run", "--rm", "-v", &mount, "alpine", "sh", "-c", script]);
    fs::write(Path::new(&one).join("old"), "").expect("a file");
    host.moyai(&["run", "--rm", "alpine", "true"]).ok();
    // On a busy machine what comes and goes may stay for a second, which is too long.
    let stayed = (0..9).any(|_| {
        let there = wait_for_spares(host);
        mounts();
        // It is seen, by no spare.
        sees("ls /later").ok().says("old");
        inside(host, &["umount", &folder]).ok();
        let shim = shim_of(host, "after", &[]);
        host.moyai(&["rm", "after"]).ok();
        there.contains(&shim)
    });
    assert!(stayed, "there was none whenever a mount had come and gone");
    // One that stays is in the next ones.
    let there = wait_for_spares(host);
    mounts();
    wait_for("others", PATIENCE, || spares(host).is_disjoint(&there).then_some(()));
    let there = wait_for_spares(host);
    sees("ls /later").ok().says("old");
    assert!(!there.is_subset(&spares(host)), "{there:?} are all there");
    // Another folder is mounted in its place, and all that is written of that is the same, also its number: mounts take the lowest ones
    // that are free, where nobody else has the same one by then. Whoever would look in between does not.
    let zygote = children(host.daemon()).into_iter().find(|pid| is_called(*pid, "moyai-zygote")).expect("a zygote");
    // None is being made.
    let there = wait_for("all spares", PATIENCE, || {
        let all = wait_for_spares(host);
        std::thread::sleep(Duration::from_millis(200));
        (spares(host) == all).then_some(all)
    });
    signal("STOP", &[zygote]);
    let swap = format!(
        "line() {{ grep -F ' {folder} ' /proc/self/mountinfo; }}; old=$(line); fill={folder}-fill
        [ -n \"$old\" ] || exit 1
        umount {folder} && mv {one} {other} && mkdir {one} $fill && mount --bind {one} {folder} || exit 1
        tries=0
        while [ \"$(line)\" != \"$old\" ] && [ $tries -lt 300 ]; do
            tries=$((tries + 1))
            umount {folder} && mkdir $fill/$tries && mount --bind {one} $fill/$tries && mount --bind {one} {folder} || exit 1
        done
        for dir in $fill/*; do [ ! -d $dir ] || umount $dir; done
        [ $tries -lt 300 ] || echo 'its number is another'"
    );
    let swapped = inside(host, &["sh", "-c", &swap]);
    signal("CONT", &[zygote]);
    eprint!("{}", swapped.ok().stdout);
    assert_eq!(sees("ls /later").ok().stdout, "");
    wait_for("others", PATIENCE, || spares(host).is_disjoint(&there).then_some(()));
    // And one that is another by its options alone.
    wait_for_spares(host);
    inside(host, &["mount", "-o", "remount,bind,ro", &folder]).ok();
    sees("touch /later/new || true").ok().says("Read-only");
}

#[test]
fn what_is_left_of_a_container_is_gone_before_its_next_life() {
    let lab = one_host(&[]);
    let [host] = lab.hosts();
    // Whose mounts the shims have hold of, as they call them.
    let held = || -> BTreeSet<PathBuf> {
        let shims = host.cgroups.processes().into_iter().filter(|pid| is_called(*pid, "moyai-shim"));
        let opened = shims.flat_map(|pid| fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten());
        let links = opened.flatten().filter_map(|file| fs::read_link(file.path()).ok());
        links.filter(|link| link.to_string_lossy().starts_with("mnt:")).collect()
    };
    for (warm, options) in [(false, &[][..]), (true, &[]), (true, &["--shm-size", "8m"])] {
        if warm {
            wait_for_spares(host);
        }
        let with_restarts = [&["--restart", "always"], options].concat();
        let id = begin(host, "web", &with_restarts, "echo life >> /lives; exec sleep 1000");
        // Sooner than what is left goes by itself.
        for restarts in 1..3 {
            let before = held();
            // One with memory of its own has them go when it ends.
            assert_eq!(before.len(), usize::from(options.is_empty()), "{options:?}");
            signal("KILL", &[host.container(&id).pid]);
            wait_for("its restart", PATIENCE, || {
                let row = host.workload("web")?;
                (row["restarts"].as_u64() >= Some(restarts) && row["state"] == "running").then_some(())
            });
            let after = held();
            assert!(after.is_disjoint(&before), "{after:?} of {before:?}");
            let lives = restarts + 1;
            host.moyai(&["exec", "web", "wc", "-l", "/lives"]).ok().says(&lives.to_string());
        }
        host.moyai(&["rm", "web"]).ok();
        wait_for("what is left of it to go", PATIENCE, || held().is_empty().then_some(()));
    }
}

#[test]
fn spares_that_are_killed_are_missed_by_nobody_and_none_outlives_the_daemon() {
    let lab = one_host(&[]);
    let [host] = lab.hosts();
    host.moyai(&["run", "--rm", "alpine", "true"]).ok();
    let there = wait_for_spares(host);
    signal("KILL", &there.iter().copied().collect::<Vec<_>>());
    host.moyai(&["run", "--rm", "alpine", "echo", "ran"]).ok().says("ran");
    host.moyai(&["run", "--rm", "alpine", "echo", "ran"]).ok().says("ran");
    // The first processes of some alone: whoever has one left starts it anew.
    let there = wait_for_spares(host);
    let firsts: Vec<u32> = there.iter().flat_map(|pid| children(*pid)).collect();
    assert_eq!(firsts.len(), there.len());
    signal("KILL", &firsts);
    let shim = shim_of(host, "anew", &["--init"]);
    assert!(there.contains(&shim), "{shim} is none of {there:?}");
    host.moyai(&["rm", "anew"]).ok();
    host.moyai(&["run", "--rm", "alpine", "echo", "ran"]).ok().says("ran");
    wait_for("what the killed have left to go", PATIENCE, || {
        let groups = host.cgroups.groups("memory", "moyai-spare-");
        let pid = |group: &PathBuf| group.to_string_lossy().rsplit('-').next().map(str::to_owned);
        let lives = |group| pid(group).is_some_and(|pid| Path::new("/proc").join(pid).exists());
        groups.iter().all(lives).then_some(())
    });
    host.kill_daemon();
    wait_for("every spare to end", PATIENCE, || spares(host).is_empty().then_some(()));
    wait_for("their groups to go", PATIENCE, || host.cgroups.groups("memory", "moyai-spare-").is_empty().then_some(()));
}
