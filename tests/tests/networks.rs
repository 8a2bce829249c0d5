//! The network of one host, end to end: containers reach one another, the world, and are reached by published ports; names;
//! what is left when daemons and containers die.

use moyai_tests::{Host, Lab, Output, PATIENCE, images, wait_for};

/// Serves its own name at a port, to whoever calls.
fn server(host: &Host, name: &str, options: &[&str], port: &str) {
    let script = format!("while true; do echo {name} | nc -l -p {port}; done");
    let start =
        [&["run", "-d", "--stop-timeout", "0", "--name", name], options, &["alpine", "sh", "-c", &script]].concat();
    host.moyai(&start).ok();
}

/// What is heard at an address from a host's own network.
fn hear(host: &Host, address: &str, port: u16) -> Output {
    host.run("busybox", &["nc", "-w", "3", address, &port.to_string()])
}

#[test]
fn a_published_port_leads_into_the_container_from_everywhere_and_goes_with_it() {
    let lab = Lab::mesh(2);
    let [one, two] = lab.hosts();
    one.load(&images::alpine());
    server(one, "web", &["--on", "node=lab-2", "-p", "8080:80", "-p", "127.0.0.1:9090:80"], "80");
    for (from, address) in [(one, two.address.as_str()), (two, "127.0.0.1"), (two, two.address.as_str())] {
        wait_for("the port to lead there", PATIENCE, || (hear(from, address, 8080).stdout == "web\n").then_some(()));
    }
    wait_for("the other port to lead there", PATIENCE, || {
        (hear(two, "127.0.0.1", 9090).stdout == "web\n").then_some(())
    });
    assert_eq!(hear(one, &two.address, 9090).stdout, "", "it is published at the loopback alone");
    // The port is one workload's on this machine, and is said to be.
    let taken = ["run", "-d", "--name", "other", "--on", "node=lab-2", "-p", "8080:80", "alpine", "sleep", "1000"];
    one.moyai(&taken).fails(125).says("port 8080:80 leads to web");
    one.moyai(&["rm", "-f", "web"]).ok();
    wait_for("what waits to have the port", PATIENCE, || (one.workload("other")?["state"] == "running").then_some(()));
    assert_eq!(hear(one, &two.address, 8080).stdout, "");
}

#[test]
fn containers_of_one_host_find_one_another_by_name() {
    let lab = Lab::mesh(1);
    let [one] = lab.hosts();
    one.load(&images::alpine());
    server(one, "web", &[], "80");
    let ask = |script: &str| one.moyai(&["run", "--rm", "alpine", "sh", "-c", script]);
    wait_for("the name to be answered for", PATIENCE, || (ask("nc -w 3 web 80").stdout == "web\n").then_some(()));
    assert_eq!(ask("nc -w 3 web.1 80").ok().stdout, "web\n");
    assert_ne!(ask("nc -w 3 web.2 80").code, 0);
    // What it is itself called, and whom it asks.
    let hosts = ask("cat /etc/hosts /etc/resolv.conf; hostname -i").ok().stdout;
    let own = hosts.lines().last().expect("an address");
    assert!(own.starts_with("10.2") && hosts.contains(&format!("{own}\t")), "{hosts}");
    assert!(hosts.contains("nameserver 10.2"), "{hosts}");
    one.moyai(&["rm", "-f", "web"]).ok();
    wait_for("its name to be nobody's", PATIENCE, || (ask("nc -w 3 web 80").code != 0).then_some(()));
}

#[test]
fn names_are_looked_up_as_the_user_asks() {
    let lab = Lab::mesh(2);
    let [one, two] = lab.hosts();
    one.load(&images::alpine());
    let asked = ["--dns", &two.address, "--dns-search", "lab.example", "--dns-option", "ndots:2"];
    let hosts = ["--add-host", "db:10.9.8.7", "--add-host", "six=[fd00::7]", "--add-host", "node:host-gateway"];
    let run = |name: &str, command: &[&str]| {
        let options = [&["run", "-d", "--name", name, "--on", "node=lab-1"], &asked[..], &hosts[..]].concat();
        one.moyai(&[&options[..], &["alpine"], command].concat()).ok();
    };
    run("asks", &["sleep", "1000"]);
    let inside = |script: &str| one.moyai(&["exec", "asks", "sh", "-c", script]);
    let files = inside("cat /etc/hosts /etc/resolv.conf").ok().stdout;
    for line in ["10.9.8.7\tdb", "fd00::7\tsix", "search lab.example", "options ndots:2"] {
        assert!(files.lines().any(|one| one == line), "{line}: {files}");
    }
    let node = files.lines().find_map(|line| line.strip_suffix("\tnode")).expect("the node's address");
    // The same that it asks for names: its node, which knows workloads, and asks the other for what it does not know.
    assert!(files.contains(&format!("nameserver {node}\n")) && !files.contains(&two.address), "{files}");
    inside("nslookup asks.1 | grep -q 'Name:.*asks'").ok();
    for name in ["first", "second"] {
        let heard = lab.folder().join(name);
        let listen =
            "use Socket; socket(S, AF_INET, SOCK_DGRAM, 0); bind(S, sockaddr_in(53, INADDR_ANY)) or die; alarm 60;
            recv(S, $_, 512, 0); open(F, '>', $ARGV[0]); print F; close F";
        let mut server = two.command("perl", &["-e", listen, &heard.display().to_string()]).spawn().expect("a server");
        wait_for("the server to hear the question", PATIENCE, || {
            inside(&format!("nslookup {name}.example.org"));
            std::fs::read(&heard).is_ok_and(|heard| String::from_utf8_lossy(&heard).contains(name)).then_some(())
        });
        drop(server.kill());
        server.wait().expect("it has ended");
        // The next daemon is told the same.
        one.kill_daemon();
        one.up();
    }
    let refused = |option: &[&str]| one.moyai(&[&["run"], option, &["alpine", "true"]].concat()).fails(125);
    refused(&["--add-host", "db"]).says("write it like --add-host db:10.0.0.7");
    refused(&["--add-host", "d b:10.0.0.7"]).says("host `d b`");
    refused(&["--dns", "127.0.0.53"]).says("name server 127.0.0.53");
    refused(&["--network", "none", "--add-host", "node:host-gateway"]).says("no network");
}

#[test]
fn a_container_reaches_the_world_and_neighbours_do_not_reach_what_is_not_published() {
    let lab = Lab::mesh(2);
    let [one, two] = lab.hosts();
    one.load(&images::alpine());
    let mut world =
        two.command("busybox", &["nc", "-l", "-p", "7000", "-e", "echo", "world"]).spawn().expect("a server");
    wait_for("the server to listen", PATIENCE, || {
        two.run("busybox", &["netstat", "-ltn"]).stdout.contains(":7000").then_some(())
    });
    let there = format!("nc -w 5 {} 7000", two.address);
    assert_eq!(one.moyai(&["run", "--rm", "--on", "node=lab-1", "alpine", "sh", "-c", &there]).ok().stdout, "world\n");
    world.wait().expect("it has ended");

    server(one, "hidden", &["--on", "node=lab-1"], "80");
    let address = one.moyai(&["exec", "hidden", "hostname", "-i"]).ok().stdout.trim().to_owned();
    wait_for("it to answer on its own host", PATIENCE, || (hear(one, &address, 80).stdout == "hidden\n").then_some(()));
    // A neighbour that knows the way, and takes it.
    two.run("ip", &["route", "add", &format!("{address}/32"), "via", &one.address]).ok();
    assert_eq!(hear(two, &address, 80).stdout, "");
    assert_eq!(two.run("busybox", &["ping", "-c", "1", "-W", "1", &address]).code, 1);
}

#[test]
fn without_a_daemon_ports_go_on_and_the_next_one_takes_them_up() {
    let lab = Lab::mesh(1);
    let [one] = lab.hosts();
    one.load(&images::alpine());
    server(one, "web", &["-p", "8080:80"], "80");
    server(one, "gone", &["-p", "8081:80"], "80");
    let web = || hear(one, "127.0.0.1", 8080).stdout == "web\n";
    wait_for("the port to lead there", PATIENCE, || web().then_some(()));
    let gone = one.workload("gone").expect("a workload")["id"].as_str().expect("an id").to_owned();
    let gone = one.container(&gone);
    one.kill_daemon();
    assert!(web(), "without a daemon");
    moyai_tests::host::signal("KILL", &[gone.pid]);
    one.up();
    assert!(web(), "after it");
    wait_for("the port of what ended to lead nowhere", PATIENCE, || {
        let refused = hear(one, "127.0.0.1", 8081);
        (refused.code != 0 && refused.stdout.is_empty()).then_some(())
    });
    let ask = one.moyai(&["run", "--rm", "alpine", "nc", "-w", "3", "web", "80"]);
    assert_eq!(ask.ok().stdout, "web\n", "names are known again");
    one.moyai(&["rm", "-f", "web", "gone"]).ok();
    wait_for("both to be gone", PATIENCE, || one.workloads().is_empty().then_some(()));
    wait_for("their folders to be gone", PATIENCE, || {
        std::fs::read_dir(one.data.join("containers")).map_or(true, |mut left| left.next().is_none()).then_some(())
    });
    let links = || one.run("ip", &["-br", "link"]).ok().stdout;
    assert!(links().contains("moyai-"), "{}", links());
    one.moyai(&["down"]).ok();
    assert!(!links().contains("moyai-") && !links().contains("mv"), "nothing is left: {}", links());
    assert_eq!(one.run("nft", &["list", "tables"]).ok().stdout, "");
}

#[test]
fn a_port_that_something_else_has_is_said_to_be_so() {
    let lab = Lab::mesh(1);
    let [one] = lab.hosts();
    one.load(&images::alpine());
    let mut other = one.command("busybox", &["nc", "-l", "-p", "8080"]).spawn().expect("a server");
    wait_for("the server to listen", PATIENCE, || {
        one.run("busybox", &["netstat", "-ltn"]).stdout.contains(":8080").then_some(())
    });
    let asked = ["run", "-d", "--name", "web", "-p", "8080:80", "alpine", "sleep", "1000"];
    let output = one.moyai(&asked);
    let why = one.moyai(&["why", "web"]);
    let told = format!("{output}{why}{}", one.moyai(&["ps", "-a"]));
    assert!(told.contains("port 8080 of this machine is in use by another program"), "{told}");
    other.kill().expect("it runs");
    other.wait().expect("it has ended");
}

#[test]
fn the_network_is_what_was_asked_for() {
    let lab = Lab::new(1);
    let [one] = lab.hosts();
    one.moyai(&["init"]).ok();
    one.load(&images::alpine());
    let links =
        |options: &[&str]| one.moyai(&[&["run", "--rm"], options, &["alpine", "ls", "/sys/class/net"]].concat());
    assert_eq!(links(&[]).ok().stdout, "eth0\nlo\n");
    assert_eq!(links(&["--network", "bridge"]).ok().stdout, "eth0\nlo\n");
    assert_eq!(links(&["--network", "none"]).ok().stdout, "lo\n");
    links(&["--network", "host"]).fails(125).says("does not offer its own network");
    links(&["--network", "mars"]).fails(125).says("bridge, host or none");
    links(&["--network", "none", "-p", "1:1"]).fails(125).says("only what is on the bridge has ports");
    links(&["-p", "0:1"]).fails(125).says("there is no port 0");
    links(&["-p", "80"]).fails(125).says("a port of the node and one of the container");
    links(&["-p", "80:80", "-p", "0.0.0.0:80:81"]).fails(125).says("published twice");
    links(&["--sandbox", "strict", "--network", "bridge"]).fails(125).says("the strict sandbox");
    let strict = ["run", "--rm", "--sandbox", "strict", "alpine", "cat", "/proc/net/dev"];
    let strict = one.moyai(&strict).ok().stdout;
    assert!(!strict.contains("eth0"), "{strict}");
}

#[test]
fn the_machine_s_own_network_is_given_where_it_is_offered() {
    let lab = Lab::new(1);
    let [one] = lab.hosts();
    one.moyai(&["init", "--offer-host-network"]).ok();
    one.load(&images::alpine());
    let run = |script: &str| one.moyai(&["run", "--rm", "--network", "host", "alpine", "sh", "-c", script]).ok();
    let address = run("ip address show eth0").stdout;
    assert!(address.contains(&one.address), "{address}");
}
