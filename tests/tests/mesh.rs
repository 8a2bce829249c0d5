//! Three hosts, one mesh: what the first five minutes promise, from every node.

use std::path::Path;

use moyai_tests::{Lab, PATIENCE, images, wait_for};

const TICK: &str = "i=0; while true; do i=$((i+1)); echo tick $i; sleep 0.2; done";

#[test]
fn any_node_takes_any_command() {
    let lab = Lab::mesh(3);
    let [one, two, three] = lab.hosts();
    for host in [one, two, three] {
        let nodes = host.moyai(&["--json", "nodes"]).ok().rows();
        let names: Vec<&str> = nodes.iter().filter_map(|row| row["name"].as_str()).collect();
        assert_eq!(names, ["lab-1", "lab-2", "lab-3"], "nodes seen by {}", host.name);
        assert!(nodes.iter().all(|row| row["state"] == "alive"), "{nodes:?}");
        let here = nodes.iter().find(|row| row["here"] == true).expect("a node that is here");
        assert_eq!(here["name"], host.name.as_str());
    }
    let loaded = one.load(&images::alpine());
    assert!(loaded.stdout.starts_with("alpine:latest  sha256:"), "{loaded}");

    let web = [
        "--cpus",
        "0.5",
        "--memory",
        "64m",
        "--stop-timeout",
        "1",
        "alpine",
        "httpd",
        "-f",
        "-p",
        "8080",
        "-h",
        "/www",
    ];
    // A node that has not heard of the image refuses, and rightly so.
    for host in [one, two, three] {
        wait_for("every node to know the image", PATIENCE, || (!host.images().is_empty()).then_some(()));
    }
    two.moyai(&[&["run", "--name", "web", "-d"], &web[..]].concat()).ok().says("1 replica placed");
    for host in [one, two, three] {
        let row = wait_for("every node to see it run", PATIENCE, || {
            let row = host.moyai(&["--json", "ps"]).ok().rows().into_iter().find(|row| row["name"] == "web")?;
            (row["state"] == "running").then_some(row)
        });
        for field in ["id", "name", "image", "node", "state", "replica", "epoch", "started"] {
            assert!(!row[field].is_null(), "no {field} in {row}");
        }
        assert_eq!((&row["image"], &row["replica"], &row["epoch"]), (&"alpine".into(), &1.into(), &1.into()));
        assert!(row["started"].as_u64() > Some(1_500_000_000_000), "milliseconds since 1970: {row}");
        let why = host.moyai(&["why", "web"]).ok();
        for name in ["lab-1", "lab-2", "lab-3"] {
            assert!(why.stdout.contains(name), "no quote of {name} in {why}");
        }
        assert!(why.stdout.contains("won") && why.stdout.contains(" ms"), "{why}");
        let why = host.moyai(&["--json", "why", "web"]).ok().json();
        assert_eq!(why["quotes"].as_array().map(Vec::len), Some(3), "{why}");
    }

    let row = three.workload("web").expect("a workload");
    let id = row["id"].as_str().expect("an id");
    let node = lab.host(row["node"].as_str().expect("a node"));
    let container = node.container(id);
    let page = wait_for("httpd to answer", PATIENCE, || {
        let page = container.in_network("busybox", &["wget", "-q", "-O", "-", "http://127.0.0.1:8080/index.html"]);
        (page.code == 0).then_some(page)
    });
    assert_eq!(page.stdout, "hello from the image\n");

    three.moyai(&["stop", "web"]).ok();
    assert!(!container.lives());
    for host in [one, two, three] {
        wait_for("every node to see it stopped", PATIENCE, || {
            (host.workload("web")?["state"] == "exited").then_some(())
        });
    }
    one.moyai(&["start", "web"]).ok();
    let row = wait_for("it to run again", PATIENCE, || two.workload("web").filter(|row| row["state"] == "running"));
    assert!(row["epoch"].as_u64() >= Some(1), "{row}");
    one.moyai(&["rm", "web"]).ok();
    for host in [one, two, three] {
        wait_for("every node to forget it", PATIENCE, || host.workload("web").is_none().then_some(()));
        wait_for("every process of it to end", PATIENCE, || host.containers(id).is_empty().then_some(()));
    }
}

#[test]
fn logs_are_read_from_every_node() {
    let lab = Lab::mesh(3);
    let [one, two, three] = lab.hosts();
    one.load(&images::alpine());
    two.moyai(&["run", "-d", "--name", "clock", "--on", "node=lab-3", "alpine", "sh", "-c", TICK]).ok();
    for host in [one, two, three] {
        wait_for("a line of the log", PATIENCE, || {
            let logs = host.moyai(&["logs", "clock"]);
            (logs.code == 0 && logs.stdout.starts_with("tick 1\n")).then_some(())
        });
        let mut follow = host.start(&["logs", "-f", "clock"]);
        let seen =
            wait_for("the log to grow", PATIENCE, || Some(follow.text()).filter(|text| text.contains("tick 3\n")));
        let next = format!("tick {}\n", seen.lines().count() + 5);
        wait_for("the log to grow further", PATIENCE, || follow.text().contains(&next).then_some(()));
        assert_eq!(follow.ended(), None, "`logs -f` goes on while its container runs");
        let tail = host.moyai(&["logs", "--tail", "2", "clock"]).ok();
        assert_eq!(tail.stdout.lines().count(), 2, "{tail}");
        let row = &host.moyai(&["--json", "logs", "clock"]).ok().rows()[0];
        assert_eq!((&row["text"], &row["stream"]), (&"tick 1\n".into(), &"stdout".into()));
        let stamped = host.moyai(&["logs", "-t", "--tail", "1", "clock"]).ok();
        assert!(stamped.stdout.starts_with("20") && stamped.stdout.contains("Z tick "), "{stamped}");
    }
    let mut follow = one.start(&["logs", "-f", "clock"]);
    two.moyai(&["stop", "clock"]).ok();
    wait_for("`logs -f` to end with its container", PATIENCE, || follow.ended());
    assert!(one.moyai(&["logs", "clock"]).ok().stdout.starts_with("tick 1\n"), "a stopped workload keeps its log");
}

#[test]
fn replicas_are_scaled_both_ways() {
    let lab = Lab::mesh(3);
    let [one, two, three] = lab.hosts();
    one.load(&images::alpine());
    two.moyai(&["run", "-d", "--name", "many", "--replicas", "3", "alpine", "sh", "-c", "hostname; exec sleep 1000"])
        .ok();
    let running = |count: usize| {
        for host in [one, two, three] {
            wait_for(&format!("{} to see {count} replicas run", host.name), PATIENCE, || {
                let rows = host.moyai(&["--json", "ps"]).ok().rows();
                (rows.iter().filter(|row| row["state"] == "running").count() == count && rows.len() == count)
                    .then_some(())
            });
        }
        let id = two.workload("many").expect("a workload")["id"].as_str().expect("an id").to_owned();
        let count_on = |host: &moyai_tests::Host| host.containers(&id).len();
        wait_for("as many containers", PATIENCE, || {
            ([one, two, three].into_iter().map(count_on).sum::<usize>() == count).then_some(())
        });
    };
    running(3);
    let mut numbers: Vec<_> = three.workloads().iter().filter_map(|row| row["replica"].as_u64()).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, [1, 2, 3]);
    assert_eq!(three.moyai(&["logs", "many.2"]).ok().stdout.lines().count(), 1);
    assert_eq!(three.moyai(&["logs", "many"]).ok().stdout.lines().count(), 3);
    three.moyai(&["scale", "many", "5"]).ok();
    running(5);
    one.moyai(&["scale", "many", "1"]).ok();
    running(1);
    two.moyai(&["scale", "many", "2"]).ok();
    running(2);
    let id = two.workload("many").expect("a workload")["id"].as_str().expect("an id").to_owned();
    three.moyai(&["rm", &id[..6]]).ok();
    wait_for("it to be forgotten", PATIENCE, || one.workload("many").is_none().then_some(()));
}

#[test]
fn labels_and_room_decide_where_it_runs() {
    let lab = Lab::new(3);
    let [one, two, three] = lab.hosts();
    one.moyai(&["init", "--memory", "256m", "--cpus", "1"]).ok();
    let ticket = one.ticket(&[]);
    two.moyai(&["join", "--label", "disk=fast", "--memory", "1g", "--cpus", "2", &ticket]).ok();
    three.moyai(&["join", "--node-name", "other", "--memory", "1g", "--cpus", "2", &ticket]).ok();
    lab.wait_for_mesh();
    let nodes = one.moyai(&["--json", "nodes"]).ok().rows();
    let second = nodes.iter().find(|row| row["name"] == "lab-2").expect("lab-2");
    assert_eq!((&second["labels"]["disk"], &second["cpu_milli"][0]), (&"fast".into(), &2000.into()), "{second}");
    three.load(&images::alpine());
    let place = |name: &str, options: &[&str]| {
        let sleep = ["--name", name, "alpine", "sleep", "1000"];
        three.moyai(&[&["run", "-d", "--stop-timeout", "0"], options, &sleep[..]].concat()).ok();
        three.workload(name).expect("a workload")["node"].as_str().expect("a node").to_owned()
    };
    assert_eq!(place("a", &["--on", "disk=fast"]), "lab-2");
    assert_eq!(place("b", &["--on", "node=other"]), "other");
    assert_eq!(place("c", &["--on", "node=lab-1", "--memory", "200m"]), "lab-1");
    // lab-1 has no room for a second of that size, and lab-2 after this one neither.
    assert_eq!(place("d", &["--on", "disk=fast", "--memory", "900m"]), "lab-2");
    assert_eq!(place("e", &["--memory", "200m"]), "other");
    // What one node frees, another's workload gets.
    three.moyai(&["run", "-d", "--name", "f", "--memory", "900m", "alpine", "sleep", "1000"]).fails(125);
    three.moyai(&["rm", "d"]).ok();
    wait_for("the pending one to start", PATIENCE, || (one.workload("f")?["state"] == "running").then_some(()));
    assert_eq!(one.workload("f").expect("a workload")["node"], "lab-2");
}

#[test]
fn what_happens_is_told() {
    let lab = Lab::mesh(2);
    let [one, two] = lab.hosts();
    one.load(&images::alpine());
    let (here, there) = (one.start(&["--json", "events", "-f"]), two.start(&["--json", "events", "-f"]));
    // A stream has begun once anything is in it; each try makes something to tell.
    let mut number = 0;
    wait_for("an event of a workload from the node that was asked", PATIENCE, || {
        number += 1;
        one.moyai(&["run", "-d", "--name", &format!("try-{number}"), "--on", "node=lab-2", "alpine", "true"]).ok();
        here.text().contains("try-").then_some(())
    });
    wait_for("an event of a workload from the node that runs it", PATIENCE, || {
        there.text().contains("try-").then_some(())
    });
    for line in here.text().lines().chain(there.text().lines()) {
        assert!(line.starts_with('{') && line.ends_with('}'), "one JSON object a line: {line}");
    }
}

#[test]
fn a_short_command_ends_well_every_time() {
    let lab = Lab::mesh(2);
    let [one, _] = lab.hosts();
    one.load(&images::alpine());
    for round in 0..100 {
        let output = one.moyai(&["run", "--rm", "--on", "node=lab-2", "alpine", "echo", "said"]);
        assert_eq!((output.code, &*output.stdout, &*output.stderr), (0, "said\n", ""), "round {round}: {output}");
    }
}

#[test]
fn a_node_takes_a_folder_of_any_name() {
    let lab = Lab::new(1);
    let [one] = lab.hosts();
    // A socket's path has 108 bytes; this folder's has more.
    let long = lab.folder().join("x".repeat(60)).join("a folder, with: odd names");
    std::fs::create_dir_all(&long).expect("make a folder");
    let data = long.join("y".repeat(40));
    let socket = lab.folder().join("short.sock");
    let (data, socket) = (data.to_string_lossy(), socket.to_string_lossy());
    let moyai = |args: &[&str]| {
        let all = [&["--data", &*data, "--socket", &*socket], args].concat();
        one.run(&moyai_tests::lab::binary().to_string_lossy(), &all)
    };
    moyai(&["init"]).ok();
    moyai(&["load", &images::alpine().to_string_lossy()]).ok();
    assert_eq!(moyai(&["run", "--rm", "alpine", "echo", "here"]).ok().stdout, "here\n");
    moyai(&["down"]).ok();
    assert!(!Path::new(&*socket).exists(), "a daemon that stops takes its socket away");
}

#[test]
fn the_demo_ends_well_and_leaves_nothing() {
    let lab = Lab::new(1);
    let [one] = lab.hosts();
    one.boot();
    let left = || (one.run("ip", &["netns"]).ok().stdout, one.cgroups.processes().len());
    let before = left();
    let program = moyai_tests::lab::binary();
    let demo = one.run(&program.to_string_lossy(), &["demo"]).ok();
    assert!(demo.stdout.contains("loses its power") && demo.stdout.contains("why web"), "{demo}");
    assert!(!demo.stderr.contains("error"), "{demo}");
    // Other tests' networks come and go beside it.
    let names = |text: &str| text.lines().filter(|line| line.starts_with("moyai-demo-")).count();
    wait_for("what the demo made to be gone", PATIENCE, || {
        let after = left();
        (names(&after.0) == names(&before.0) && after.1 == before.1).then_some(())
    });
    one.run(&program.to_string_lossy(), &["demo", "/no/such/file"]).fails(1);
}
