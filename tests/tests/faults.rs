//! Machines die, daemons crash, cables are pulled: what ran runs on, or runs elsewhere, and once only.

use moyai_tests::container::Container;
use moyai_tests::host::signal;
use moyai_tests::{Host, Lab, PATIENCE, images, wait_for};

const TICK: &str = "i=0; while true; do i=$((i+1)); echo tick $i; sleep 0.2; done";

/// Starts `name`, which ticks, somewhere; returns its id and the host that runs it.
fn tick<'a>(lab: &'a Lab, from: &Host, name: &str, options: &[&str]) -> (String, &'a Host) {
    let what = ["--stop-timeout", "0", "alpine", "sh", "-c", TICK];
    from.moyai(&[&["run", "-d", "--name", name], options, &what[..]].concat()).ok();
    let row = from.workload(name).expect("a workload");
    (row["id"].as_str().expect("an id").to_owned(), lab.host(row["node"].as_str().expect("a node")))
}

/// Loads the image on the first host, and waits until every node has it: then it outlives each of them.
fn load(hosts: &[&Host]) {
    hosts[0].load(&images::alpine());
    for host in hosts {
        wait_for("every node to have the image", PATIENCE, || {
            (host.images().first()?["nodes"].as_array()?.len() == hosts.len()).then_some(())
        });
    }
}

fn others<'a>(hosts: &[&'a Host], but: &Host) -> Vec<&'a Host> {
    hosts.iter().copied().filter(|host| host.name != but.name).collect()
}

/// Waits until `name` runs with an epoch of 2 or more, as every one of `hosts` sees it; returns the node's name.
fn moved(hosts: &[&Host], name: &str) -> String {
    let mut node = String::new();
    for host in hosts {
        let what = format!("{} to see {name} run elsewhere", host.name);
        let row = wait_for(&what, PATIENCE, || {
            let row = host.workload(name)?;
            (row["state"] == "running" && row["epoch"].as_u64() >= Some(2)).then_some(row)
        });
        node = row["node"].as_str().expect("a node").to_owned();
    }
    node
}

/// Waits until exactly one container of `id` runs on all of `hosts`, where every node says it does.
fn only_one<'a>(hosts: &[&'a Host], name: &str, id: &str) -> &'a Host {
    wait_for("exactly one copy, and every node to know where", PATIENCE, || {
        let running: Vec<&Host> = hosts.iter().copied().filter(|host| !host.containers(id).is_empty()).collect();
        let [host] = running.as_slice() else { return None };
        let agrees = |other: &&Host| {
            other.workload(name).is_some_and(|row| row["state"] == "running" && row["node"] == host.name.as_str())
        };
        (host.containers(id).len() == 1 && hosts.iter().all(agrees)).then_some(*host)
    })
}

#[test]
fn a_dead_machine_s_work_runs_elsewhere_and_is_not_revived() {
    let lab = Lab::mesh(3);
    let hosts: [&Host; 3] = lab.hosts();
    load(&hosts);
    let (id, first) = tick(&lab, hosts[1], "clock", &[]);
    first.kill_machine();
    let left = others(&hosts, first);
    let second = moved(&left, "clock");
    assert_ne!(second, first.name);
    let why = left[0].moyai(&["why", "clock"]).ok();
    assert!(why.stdout.contains(&format!("{} went down", first.name)), "{why}");
    for host in &left {
        let logs = host.moyai(&["logs", "clock"]).ok();
        assert!(logs.stdout.starts_with("tick 1\n"), "a new container begins anew: {logs}");
    }
    let epoch = left[0].workload("clock").expect("a workload")["epoch"].clone();
    first.up();
    lab.wait_for_mesh();
    let row = wait_for("the node that returned to know better", PATIENCE, || {
        first.workload("clock").filter(|row| row["node"] == second.as_str() && row["state"] == "running")
    });
    assert_eq!(row["epoch"], epoch, "nothing was placed anew when it returned");
    assert_eq!(only_one(&hosts, "clock", &id).name, second);
    assert!(first.containers(&id).is_empty(), "an old epoch was revived");
    first.moyai(&["rm", "clock"]).ok();
    for host in hosts {
        wait_for("it to be gone everywhere", PATIENCE, || {
            (host.workload("clock").is_none() && host.containers(&id).is_empty()).then_some(())
        });
    }
}

#[test]
fn the_last_machine_runs_it_all() {
    let lab = Lab::mesh(3);
    let hosts: [&Host; 3] = lab.hosts();
    load(&hosts);
    let ids: Vec<String> =
        ["a", "b"].into_iter().map(|name| tick(&lab, hosts[0], name, &["--replicas", "2"]).0).collect();
    hosts[0].kill_machine();
    hosts[1].kill_machine();
    wait_for("all four replicas to run on the one left", PATIENCE, || {
        let rows = hosts[2].workloads();
        let here = rows.iter().filter(|row| row["state"] == "running" && row["node"] == "lab-3").count();
        (here == 4 && ids.iter().all(|id| hosts[2].containers(id).len() == 2)).then_some(())
    });
    assert_eq!(hosts[2].moyai(&["run", "--rm", "alpine", "echo", "still"]).ok().stdout, "still\n");
}

#[test]
fn a_submitter_may_vanish() {
    let lab = Lab::mesh(3);
    let hosts: [&Host; 3] = lab.hosts();
    load(&hosts);
    let (id, at) = tick(&lab, hosts[1], "clock", &["--on", "node=lab-1"]);
    let container = at.container(&id);
    hosts[1].kill_machine();
    wait_for("the others to see it down", PATIENCE, || (hosts[2].alive().len() == 2).then_some(()));
    let row = hosts[2].workload("clock").expect("a workload");
    assert_eq!((&row["state"], &row["epoch"]), (&"running".into(), &1.into()), "{row}");
    assert!(container.lives());
    hosts[2].moyai(&["stop", "clock"]).ok();
    assert!(!container.lives());
    hosts[1].up();
    lab.wait_for_mesh();
    wait_for("the submitter to learn what it missed", PATIENCE, || {
        (hosts[1].workload("clock")?["state"] == "exited").then_some(())
    });
    hosts[0].moyai(&["rm", "clock"]).ok();
}

#[test]
fn a_daemon_s_crash_stops_nothing() {
    let lab = Lab::mesh(1);
    let [one] = lab.hosts();
    one.load(&images::alpine());
    let (id, _) = tick(&lab, one, "clock", &["--restart", "always"]);
    let before = one.workload("clock").expect("a workload");
    let container = one.container(&id);
    let crash = |how: &dyn Fn()| {
        let count = one.moyai(&["logs", "clock"]).ok().stdout.lines().count();
        how();
        assert!(container.lives(), "the container died with its daemon");
        one.moyai(&["ps"]).fails(1);
        one.up();
        let after =
            wait_for("it to be adopted", PATIENCE, || one.workload("clock").filter(|row| row["state"] == "running"));
        for field in ["id", "epoch", "started", "restarts"] {
            assert_eq!(after[field], before[field], "{field} after the daemon has come back");
        }
        assert_eq!(one.container(&id), container, "the same process");
        wait_for("its log to go on", PATIENCE, || {
            let log = one.moyai(&["logs", "clock"]).ok().stdout;
            let lines: Vec<&str> = log.lines().collect();
            let expected = (1..=lines.len()).map(|number| format!("tick {number}"));
            assert!(lines.iter().copied().eq(expected), "lines are missing: {log}");
            (lines.len() > count + 5).then_some(())
        });
    };
    crash(&|| one.kill_daemon());
    crash(&|| drop(one.moyai(&["down"]).ok()));
    crash(&|| one.kill_daemon());
    one.moyai(&["stop", "clock"]).ok();
    assert!(!container.lives(), "an adopted container can be stopped");
    one.moyai(&["rm", "clock"]).ok();
    assert!(one.cgroups.groups("memory", &id).is_empty(), "its cgroup is left");
}

#[test]
fn an_exit_that_no_daemon_saw_is_told_by_the_next() {
    let lab = Lab::mesh(1);
    let [one] = lab.hosts();
    one.load(&images::alpine());
    let wait = "echo begun; while [ ! -e /tmp/go ]; do sleep 0.1; done; echo ended; exit 9";
    one.moyai(&["run", "-d", "--name", "late", "alpine", "sh", "-c", wait]).ok();
    let id = one.workload("late").expect("a workload")["id"].as_str().expect("an id").to_owned();
    let container: Container = one.container(&id);
    one.kill_daemon();
    std::fs::write(container.path("/tmp/go"), "").expect("write into the container");
    wait_for("the container to end", PATIENCE, || (!container.lives()).then_some(()));
    one.up();
    one.moyai(&["wait", "late"]).exits(9);
    let row = one.workload("late").expect("a workload");
    assert_eq!((&row["state"], &row["exit_code"], &row["epoch"]), (&"exited".into(), &9.into(), &1.into()), "{row}");
    assert_eq!(one.moyai(&["logs", "late"]).ok().stdout, "begun\nended\n");
}

#[test]
fn a_mesh_that_lost_all_power_finds_itself_again() {
    let lab = Lab::mesh(3);
    let hosts: [&Host; 3] = lab.hosts();
    load(&hosts);
    let (id, _) = tick(&lab, hosts[1], "clock", &[]);
    let ended = ["run", "--name", "ended", "alpine", "sh", "-c", "exit 4"];
    hosts[2].moyai(&ended).exits(4);
    hosts.iter().for_each(|host| host.kill_machine());
    hosts.iter().for_each(|host| drop(host.up()));
    lab.wait_for_mesh();
    moved(&hosts, "clock");
    only_one(&hosts, "clock", &id);
    for host in hosts {
        let row = wait_for("what had ended to be known", PATIENCE, || host.workload("ended"));
        assert_eq!(
            (&row["state"], &row["exit_code"]),
            (&"exited".into(), &4.into()),
            "as {} sees it: {row}",
            host.name
        );
    }
    assert_eq!(hosts[0].moyai(&["run", "--rm", "alpine", "echo", "on"]).ok().stdout, "on\n");
}

#[test]
fn a_single_node_that_lost_power_runs_its_work_again() {
    let lab = Lab::mesh(1);
    let [one] = lab.hosts();
    one.load(&images::alpine());
    let (id, _) = tick(&lab, one, "clock", &[]);
    one.kill_machine();
    one.up();
    moved(&[one], "clock");
    assert_eq!(one.containers(&id).len(), 1);
}

#[test]
fn both_halves_of_a_split_go_on_and_one_copy_remains() {
    let lab = Lab::mesh(3);
    let hosts: [&Host; 3] = lab.hosts();
    load(&hosts);
    let (id, alone) = tick(&lab, hosts[0], "clock", &["--on", "node=lab-3", "--on", "os=linux"]);
    let (free, at) = tick(&lab, hosts[0], "free", &[]);
    let left = others(&hosts, at);
    at.cut();
    moved(&left, "free");
    assert_eq!(at.containers(&free).len(), 1, "the half with one machine goes on too");
    // Both halves take commands.
    assert_eq!(at.moyai(&["run", "--rm", "alpine", "echo", "alone"]).ok().stdout, "alone\n");
    assert_eq!(left[0].moyai(&["run", "--rm", "alpine", "echo", "two"]).ok().stdout, "two\n");
    at.moyai(&["run", "-d", "--name", "of-one", "alpine", "sleep", "1000"]).ok();
    left[1].moyai(&["run", "-d", "--name", "of-two", "alpine", "sleep", "1000"]).ok();
    at.heal();
    lab.wait_for_mesh();
    only_one(&hosts, "free", &free);
    only_one(&hosts, "clock", &id);
    assert_eq!(alone.name, "lab-3");
    for host in hosts {
        for name in ["of-one", "of-two"] {
            wait_for("both halves' news to be everywhere", PATIENCE, || {
                (host.workload(name)?["state"] == "running").then_some(())
            });
        }
    }
}

#[test]
fn a_daemon_that_stood_still_makes_no_second_copy() {
    let lab = Lab::mesh(3);
    let hosts: [&Host; 3] = lab.hosts();
    load(&hosts);
    let (id, at) = tick(&lab, hosts[1], "clock", &[]);
    let daemon = at.daemon();
    signal("STOP", &[daemon]);
    moved(&others(&hosts, at), "clock");
    signal("CONT", &[daemon]);
    lab.wait_for_mesh();
    let first = only_one(&hosts, "clock", &id);
    assert_ne!(first.name, at.name, "the higher epoch stays");
    assert_eq!(at.daemon(), daemon, "the daemon lives on");
}

#[test]
fn a_node_that_leaves_hands_its_work_over() {
    let lab = Lab::mesh(3);
    let hosts: [&Host; 3] = lab.hosts();
    load(&hosts);
    let (id, at) = tick(&lab, hosts[1], "clock", &[]);
    at.moyai(&["down", "--leave"]).ok();
    let left = others(&hosts, at);
    assert_ne!(moved(&left, "clock"), at.name);
    for host in &left {
        let nodes = host.moyai(&["--json", "nodes"]).ok().rows();
        assert!(!nodes.iter().any(|row| row["name"] == at.name.as_str() && row["state"] == "alive"), "{nodes:?}");
    }
    at.up();
    lab.wait_for_mesh();
    only_one(&hosts, "clock", &id);
}

#[test]
fn nodes_with_new_addresses_find_each_other_on_the_lan() {
    let lab = Lab::mesh(3);
    let hosts: [&Host; 3] = lab.hosts();
    hosts.iter().for_each(|host| host.kill_machine());
    for (number, host) in hosts.iter().enumerate() {
        // Nothing that anybody remembers is true any more.
        host.run("ip", &["addr", "flush", "dev", "eth0"]).ok();
        host.run("ip", &["addr", "add", &format!("10.78.0.{}/24", 9 - number), "dev", "eth0"]).ok();
        host.run("ip", &["route", "add", "default", "via", "10.78.0.254"]).ok();
        host.up();
    }
    lab.wait_for_mesh();
}

#[test]
fn a_provider_may_die_while_it_gives() {
    let lab = Lab::mesh(4);
    let hosts: [&Host; 4] = lab.hosts();
    hosts[0].load(&images::debian("debian.tar"));
    let holders = wait_for("the automatic copies", PATIENCE * 2, || {
        let nodes = hosts[0].images().first()?["nodes"].as_array()?.clone();
        (nodes.len() >= 3).then_some(nodes)
    });
    let fetcher = hosts.iter().find(|host| !holders.contains(&host.name.as_str().into())).expect("one without a copy");
    let providers = others(&hosts, fetcher);
    providers.iter().for_each(|host| host.shape("40mbit"));
    let before: Vec<u64> = providers.iter().map(|host| host.sent_bytes()).collect();
    let on = format!("node={}", fetcher.name);
    let mut run = fetcher.start(&["run", "--rm", "--on", &on, "debian:minimal", "cat", "/etc/debian_version"]);
    // The one that has given first dies while it is giving.
    let victim = wait_for("a provider to have begun", PATIENCE, || {
        providers
            .iter()
            .zip(&before)
            .find(|(host, before)| host.sent_bytes() > *before + 2_000_000)
            .map(|(host, _)| *host)
    });
    victim.kill_machine();
    let code = wait_for("the container to have run", PATIENCE * 2, || run.ended());
    assert_eq!(code, 0, "{}", run.text());
}

#[test]
fn what_was_removed_does_not_come_back_with_its_node() {
    let lab = Lab::mesh(3);
    let hosts: [&Host; 3] = lab.hosts();
    load(&hosts);
    let (pinned, at) = tick(&lab, hosts[1], "pinned", &["--on", "node=lab-1"]);
    let (stopped, _) = tick(&lab, hosts[1], "stopped", &["--on", "node=lab-1"]);
    let containers = [at.container(&pinned), at.container(&stopped)];
    at.kill_daemon();
    wait_for("the others to see it down", PATIENCE, || (hosts[1].alive().len() == 2).then_some(()));
    hosts[2].moyai(&["rm", "pinned"]).ok();
    hosts[2].moyai(&["scale", "stopped", "0"]).ok();
    assert!(containers.iter().all(Container::lives), "a container outlives its daemon");
    at.up();
    lab.wait_for_mesh();
    wait_for("what is not wanted any more to be stopped", PATIENCE, || {
        containers.iter().all(|container| !container.lives()).then_some(())
    });
    for host in hosts {
        wait_for("the mesh to agree", PATIENCE, || {
            (host.workload("pinned").is_none() && host.workload("stopped")?["state"] == "exited").then_some(())
        });
    }
}

#[test]
fn a_crash_while_an_image_is_loaded_costs_only_the_load() {
    let lab = Lab::mesh(1);
    let [one] = lab.hosts();
    let archive = images::debian("debian.tar");
    let loading = one.start(&["load", &archive.to_string_lossy()]);
    let begun = || std::fs::read_dir(one.data.join("store/objects")).map_or(0, Iterator::count);
    wait_for("the load to be under way", PATIENCE, || (begun() > 100).then_some(()));
    one.kill_daemon();
    drop(loading);
    one.up();
    assert!(one.images().is_empty(), "half an image");
    let loaded = one.moyai(&["--json", "load", &archive.to_string_lossy()]).ok().json();
    assert_eq!(loaded["reference"], "debian:minimal");
    one.moyai(&["run", "--rm", "debian:minimal", "cat", "/etc/debian_version"]).ok();
}

#[test]
fn a_crash_while_an_image_is_fetched_costs_only_time() {
    let lab = Lab::mesh(2);
    let hosts: [&Host; 2] = lab.hosts();
    hosts[0].shape("60mbit");
    hosts[0].load(&images::debian("debian.tar"));
    let before = hosts[0].sent_bytes();
    wait_for("a good part to be sent", PATIENCE, || (hosts[0].sent_bytes() > before + 20_000_000).then_some(()));
    hosts[1].kill_daemon();
    hosts[1].up();
    lab.wait_for_mesh();
    let run = ["run", "--rm", "--on", "node=lab-2", "debian:minimal", "cat", "/etc/debian_version"];
    hosts[0].moyai(&run).ok();
    let sent = hosts[0].sent_bytes() - before;
    let size = hosts[0].images()[0]["size"].as_u64().expect("a size");
    assert!(sent < size * 13 / 10, "{sent} bytes were sent for an image of {size}: it was begun anew");
}

#[test]
fn a_link_that_comes_and_goes_leaves_one_copy() {
    let lab = Lab::mesh(3);
    let hosts: [&Host; 3] = lab.hosts();
    load(&hosts);
    let (id, home) = tick(&lab, hosts[0], "web", &[]);
    // Some of the cuts are shorter than a suspicion lasts, some longer.
    for millis in [300, 2500, 700, 4000, 1200, 2500] {
        home.cut();
        std::thread::sleep(std::time::Duration::from_millis(millis));
        home.heal();
        std::thread::sleep(std::time::Duration::from_millis(1500));
    }
    lab.wait_for_mesh();
    only_one(&hosts, "web", &id);
}
