//! Who gets in, and who does not.

use std::process::Stdio;
use std::time::{SystemTime, UNIX_EPOCH};

use moyai_tests::{Host, Lab, PATIENCE, images, wait_for};

fn join_fails(host: &Host, ticket: &str) -> moyai_tests::Output {
    let output = host.moyai(&["join", ticket]).fails(1);
    host.moyai(&["nodes"]).fails(1);
    host.moyai(&["up"]).fails(1);
    output
}

fn names(host: &Host) -> Vec<String> {
    let rows = host.moyai(&["--json", "nodes"]).ok().rows();
    rows.iter().filter_map(|row| row["name"].as_str().map(str::to_owned)).collect()
}

#[test]
fn an_expired_invitation_lets_nobody_in() {
    let lab = Lab::new(2);
    let [one, two] = lab.hosts();
    one.moyai(&["init"]).ok();
    let invitation = one.moyai(&["--json", "invite", "--ttl", "1s"]).ok().json();
    let expires = invitation["expires"].as_u64().expect("a time");
    wait_for("it to expire", PATIENCE, || {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
        (now > expires + 1).then_some(())
    });
    let ticket = invitation["ticket"].as_str().expect("a ticket");
    assert!(join_fails(two, ticket).stderr.contains("expired"));
    assert_eq!(names(one), ["lab-1"]);
    two.moyai(&["join", &one.ticket(&[])]).ok();
    lab.wait_for_mesh();
}

#[test]
fn an_invitation_is_used_up() {
    let lab = Lab::new(3);
    let [one, two, three] = lab.hosts();
    one.moyai(&["init"]).ok();
    let ticket = one.ticket(&["--uses", "1"]);
    two.moyai(&["join", &ticket]).ok();
    assert!(join_fails(three, &ticket).stderr.contains("used"));
    // The inviter remembers it over a restart.
    one.moyai(&["down"]).ok();
    one.up();
    assert!(join_fails(three, &ticket).stderr.contains("used"));
    three.moyai(&["join", &one.ticket(&["--uses", "1"])]).ok();
    lab.wait_for_mesh();
    one.moyai(&["invite", "--uses", "0"]).fails(1);
    one.moyai(&["invite", "--ttl", "soon"]).fails(1);
    one.moyai(&["invite", "--role", "king"]).fails(1);
}

/// Of the addresses that a machine listens at the loopback's is known first: an invitation with it alone lets nobody in.
#[test]
fn a_node_knows_all_its_addresses_as_soon_as_it_is_up() {
    let lab = Lab::new(4);
    let hosts: [&Host; 4] = lab.hosts();
    for host in hosts {
        host.boot();
        for last in 1..=3 {
            host.run("ip", &["addr", "add", &format!("10.78.0.{last}/24"), "dev", "eth0"]).ok();
        }
        host.moyai(&["init"]).ok();
        let addresses = host.moyai(&["--json", "status"]).ok().json()["addresses"].to_string();
        let missing = (1..=3).find(|last| !addresses.contains(&format!("10.78.0.{last}:")));
        assert_eq!(missing, None, "{addresses}");
    }
}

#[test]
fn a_damaged_invitation_is_known_as_such() {
    let lab = Lab::new(2);
    let [one, two] = lab.hosts();
    one.moyai(&["init"]).ok();
    let ticket = one.ticket(&[]);
    let mut damaged: Vec<String> = [0, 1, 6, 7, 8, 20, ticket.len() / 2, ticket.len() - 2, ticket.len() - 1]
        .map(|len| ticket[..len].to_owned())
        .into_iter()
        .filter(|text| !text.is_empty())
        .collect();
    for at in [7, 12, ticket.len() / 3, ticket.len() / 2, ticket.len() - 1] {
        let other = if &ticket[at..=at] == "q" { "p" } else { "q" };
        damaged.push(format!("{}{other}{}", &ticket[..at], &ticket[at + 1..]));
    }
    let more =
        ["moyai1", "hello", "moyai2aaaa", "moyai1 aaaa", "moyai1éé", "moyai1qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqq"];
    damaged.extend(more.map(str::to_owned));
    damaged.push(format!("{ticket}{ticket}"));
    damaged.push("x".repeat(100_000));
    for text in &damaged {
        join_fails(two, text);
    }
    assert_eq!(names(one), ["lab-1"]);
    two.moyai(&["join", &ticket]).ok();
    lab.wait_for_mesh();
}

#[test]
fn an_inviter_that_is_gone_is_named() {
    let lab = Lab::new(2);
    let [one, two] = lab.hosts();
    one.moyai(&["init"]).ok();
    let ticket = one.ticket(&[]);
    one.moyai(&["down"]).ok();
    let output = join_fails(two, &ticket);
    assert!(output.stderr.contains(&one.address), "{output}");
    one.cut();
    join_fails(two, &ticket);
    one.heal();
    one.up();
    two.moyai(&["join", &ticket]).ok();
    lab.wait_for_mesh();
}

#[test]
fn another_mesh_at_the_inviter_s_address_lets_nobody_in() {
    let lab = Lab::new(2);
    let [one, two] = lab.hosts();
    one.moyai(&["init"]).ok();
    let ticket = one.ticket(&[]);
    one.kill_machine();
    std::fs::remove_dir_all(&one.data).expect("forget the first mesh");
    one.moyai(&["init"]).ok();
    join_fails(two, &ticket);
    assert_eq!(names(one), ["lab-1"]);
    one.moyai(&["ps"]).ok();
}

#[test]
fn strangers_get_nothing_at_any_port() {
    let lab = Lab::new(4);
    let [one, two, stranger, guest] = lab.hosts();
    one.moyai(&["init"]).ok();
    two.moyai(&["join", &one.ticket(&["--role", "admin"])]).ok();
    let mesh = one.moyai(&["--json", "status"]).ok().json();
    let secrets = ["lab-1", "lab-2", mesh["mesh"].as_str().expect("a mesh"), mesh["mesh_id"].as_str().expect("an id")];

    let listening = one.run("ss", &["-Hlntu"]).ok().stdout;
    let mut ports: Vec<(&str, &str)> = Vec::new();
    for line in listening.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let port = fields[4].rsplit(':').next().expect("a port");
        // Multicast DNS is answered to everybody on the LAN, and says no more than an address.
        if !fields[4].starts_with("127.") && port != "5353" {
            ports.push((if fields[0] == "tcp" { "tcp" } else { "udp" }, port));
        }
    }
    assert!(ports.iter().any(|(kind, _)| *kind == "tcp") && ports.len() >= 3, "{listening}");

    for (kind, port) in &ports {
        let target = format!("/dev/{kind}/{}/{port}", one.address);
        let feeds = [
            "head -c 100000 /dev/urandom",
            "printf 'GET / HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n'",
            "printf '\\x13/multistream/1.0.0\\n\\x0b/yamux/1.0.0\\n'; head -c 2000 /dev/zero",
            "head -c 1000000 /dev/zero | tr '\\0' '\\377'",
            "printf ''",
        ];
        for feed in feeds {
            // Whatever comes back within two seconds, or until the other side hangs up.
            let script = format!("exec 3<>{target}; ({feed}) >&3 2>/dev/null; timeout 2 head -c 100000 <&3 || true");
            let answer = stranger.run("bash", &["-c", &script]);
            assert!(answer.stdout.len() < 4096, "{} bytes came back from {target}", answer.stdout.len());
            for secret in secrets {
                assert!(!answer.stdout.contains(secret), "{target} told a stranger {secret}");
            }
        }
        if *kind == "tcp" {
            let peer = format!("{}:{port}", one.address);
            let tls = stranger.run("timeout", &["5", "openssl", "s_client", "-connect", &peer, "-alpn", "libp2p"]);
            for secret in secrets {
                assert!(!tls.stdout.contains(secret), "a TLS client was told {secret}: {tls}");
            }
        }
    }

    // Many that connect and say nothing cost little, and keep nobody else out.
    let memory = |host: &Host| {
        let status = std::fs::read_to_string(format!("/proc/{}/status", host.daemon())).expect("the daemon lives");
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("a size").to_owned();
        line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).expect("KiB")
    };
    let (daemon, before) = (one.daemon(), memory(one));
    let tcp = ports.iter().find(|(kind, _)| *kind == "tcp").expect("a TCP port").1;
    let crowd =
        format!("for i in $(seq 500); do exec {{fd}}<>/dev/tcp/{}/{tcp}; done; echo all; sleep 100", one.address);
    let mut crowd = stranger.command("bash", &["-c", &crowd]).stdout(Stdio::piped()).spawn().expect("run bash");
    let mut line = String::new();
    let stdout = crowd.stdout.take().expect("a pipe");
    std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut line).expect("read");
    assert_eq!(line, "all\n");
    let grown = memory(one).saturating_sub(before);
    assert!(grown < 100_000, "500 silent strangers cost {grown} KiB");
    two.moyai(&["nodes"]).ok();
    let ticket = one.ticket(&[]);
    guest.moyai(&["join", &ticket]).ok();
    wait_for("a joiner from the crowd's own address to get in", PATIENCE, || {
        (stranger.moyai(&["join", &ticket]).code == 0).then_some(())
    });
    moyai_tests::host::signal("TERM", &[crowd.id()]);
    let _reaped = crowd.wait();
    lab.wait_for_mesh();
    assert_eq!(one.daemon(), daemon, "the daemon lives on");
    let log = std::fs::read_to_string(one.data.join("daemon.log")).expect("a log");
    assert!(!log.contains("panicked"), "{log}");
}

#[test]
fn two_meshes_on_one_lan_stay_apart() {
    let lab = Lab::new(4);
    let [one, two, three, four] = lab.hosts();
    for (first, second) in [(one, two), (three, four)] {
        first.moyai(&["init"]).ok();
        second.moyai(&["join", &first.ticket(&[])]).ok();
    }
    let meshes = [([one, two], ["lab-1", "lab-2"]), ([three, four], ["lab-3", "lab-4"])];
    let together = || {
        for (hosts, own) in &meshes {
            for host in hosts {
                wait_for("both nodes of a mesh to be alive", PATIENCE, || (host.alive() == *own).then_some(()));
            }
        }
    };
    together();
    // All of them announce themselves again while all of them listen.
    for host in [one, two, three, four] {
        host.kill_machine();
        host.up();
    }
    together();
    one.load(&images::alpine());
    wait_for("the other node to know the image", PATIENCE, || (!two.images().is_empty()).then_some(()));
    two.moyai(&["run", "--rm", "--on", "node=lab-1", "alpine", "true"]).ok();
    three.moyai(&["run", "--rm", "alpine", "true"]).fails(125);
    four.moyai(&["run", "--rm", "alpine", "true"]).fails(125);
    for (hosts, own) in &meshes {
        for host in hosts {
            assert_eq!(names(host), *own, "nodes that {} knows of", host.name);
        }
    }
    assert!(three.images().is_empty() && four.images().is_empty());
    let ids: Vec<_> = [one, three].map(|host| host.moyai(&["--json", "status"]).ok().json()["mesh_id"].clone()).into();
    assert_ne!(ids[0], ids[1]);
}

#[test]
fn a_role_allows_what_it_says() {
    let lab = Lab::new(3);
    let [one, two, three] = lab.hosts();
    one.moyai(&["init"]).ok();
    two.moyai(&["join", &one.ticket(&["--role", "worker"])]).ok();
    three.moyai(&["join", &one.ticket(&["--role", "submitter"])]).ok();
    lab.wait_for_mesh();
    one.load(&images::alpine());
    wait_for("the image to be known", PATIENCE, || (two.images().len() == 1).then_some(()));
    let output = two.moyai(&["run", "--name", "x", "alpine", "true"]).fails(125);
    assert!(output.stderr.contains("worker"), "{output}");
    assert!(one.workloads().is_empty());
    two.moyai(&["invite"]).fails(1);
    three.moyai(&["invite"]).fails(1);
    // A worker runs what a submitter submits.
    three.moyai(&["run", "--rm", "--on", "node=lab-2", "alpine", "true"]).ok();
    three.moyai(&["run", "-d", "--name", "kept", "alpine", "sleep", "1000"]).ok();
    wait_for("it to be known", PATIENCE, || two.workload("kept").map(drop));
    for verb in [&["stop", "kept"][..], &["rm", "kept"], &["scale", "kept", "3"]] {
        two.moyai(verb).fails(1);
    }
    assert_eq!(one.workload("kept").expect("a workload")["state"], "running");
    // An admin that is not the first may invite, too.
    let four = Lab::new(3);
    let [first, second, third] = four.hosts();
    first.moyai(&["init"]).ok();
    second.moyai(&["join", &first.ticket(&["--role", "admin"])]).ok();
    third.moyai(&["join", &second.ticket(&[])]).ok();
    four.wait_for_mesh();
}

#[test]
fn keys_and_sockets_are_for_root_alone() {
    use std::os::unix::fs::PermissionsExt;
    let lab = Lab::mesh(1);
    let [one] = lab.hosts();
    let mode = |name: &str| {
        let meta = std::fs::metadata(one.data.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        meta.permissions().mode() & 0o077
    };
    for name in ["node.key", "root.key", "moyai.sock", ""] {
        assert_eq!(mode(name), 0, "others may use `{name}`");
    }
}

#[test]
fn a_cloned_machine_stops_and_says_so() {
    let lab = Lab::new(3);
    let [one, two, third] = lab.hosts();
    one.moyai(&["init"]).ok();
    two.moyai(&["join", &one.ticket(&[])]).ok();
    // The copy is made while nothing writes to the original, as a cloned disk would be.
    two.moyai(&["down"]).ok();
    let copied = std::process::Command::new("cp").arg("-a").args([&two.data, &third.data]).status();
    assert!(copied.is_ok_and(|status| status.success()));
    two.up();
    wait_for("the original to be back", PATIENCE, || (one.alive().len() == 2).then_some(()));
    third.moyai(&["up"]);
    wait_for("the second of the two to stop", PATIENCE, || (third.moyai(&["status"]).code == 1).then_some(()));
    assert!(third.log_tail(5).contains("another machine runs with this node's key"), "{}", third.log_tail(5));
    for host in [one, two] {
        wait_for("the first of them to be alive", PATIENCE, || (host.alive() == ["lab-1", "lab-2"]).then_some(()));
    }
}
