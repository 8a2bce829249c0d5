//! What people do with work that runs: it is drained, updated, gone back on, pushed aside, held together, kept single;
//! nodes are cast out; and the mesh is asked why, and what if.

use moyai_tests::{Host, Lab, PATIENCE, images, wait_for};
use serde_json::Value;

/// Loads the image on the first host, and waits until every node has it.
fn load(hosts: &[&Host]) {
    hosts[0].load(&images::alpine());
    for host in hosts {
        wait_for("every node to have the image", PATIENCE, || {
            (host.images().first()?["nodes"].as_array()?.len() == hosts.len()).then_some(())
        });
    }
}

/// Runs something that goes on until it is stopped.
fn serve(host: &Host, name: &str, options: &[&str]) {
    let what = ["--stop-timeout", "0", "alpine", "sleep", "1000000"];
    host.moyai(&[&["run", "-d", "--name", name], options, &what[..]].concat()).ok();
}

/// The replicas of a workload, as a host sees them.
fn replicas(host: &Host, name: &str) -> Vec<Value> {
    host.workloads().into_iter().filter(|row| row["name"] == name).collect()
}

fn places(host: &Host, name: &str) -> Vec<String> {
    let running = replicas(host, name).into_iter().filter(|row| row["state"] == "running");
    running.map(|row| row["node"].as_str().expect("a node").to_owned()).collect()
}

fn id_of(host: &Host, name: &str) -> String {
    replicas(host, name)[0]["id"].as_str().expect("an id").to_owned()
}

/// How many containers of a workload run on these hosts, whoever knows of them.
fn containers(hosts: &[&Host], id: &str) -> usize {
    hosts.iter().map(|host| host.containers(id).len()).sum()
}

#[test]
fn a_drained_node_is_emptied_and_takes_nothing_until_it_may() {
    let lab = Lab::mesh(3);
    let hosts: [&Host; 3] = lab.hosts();
    load(&hosts);
    // One on each, which may share a node when there is no other.
    serve(hosts[0], "web", &["--replicas", "3", "--spread"]);
    serve(hosts[0], "db", &["--on", "node=lab-2"]);
    assert!(places(hosts[0], "web").contains(&"lab-2".to_owned()));
    let id = id_of(hosts[0], "web");
    // What may run nowhere else stays, and is named; the rest moves.
    hosts[2].moyai(&["drain", "lab-2"]).fails(1).says("may drain itself");
    let drain = hosts[0].start(&["drain", "lab-2"]);
    wait_for("web to have left lab-2 whole", PATIENCE, || {
        let places = places(hosts[0], "web");

        (places.len() == 3 && !places.contains(&"lab-2".to_owned())).then_some(())
    });
    wait_for("nothing of web to be left there", PATIENCE, || hosts[1].containers(&id).is_empty().then_some(()));
    wait_for("what cannot move to be named", PATIENCE, || {
        let still = hosts[0].moyai(&["--json", "drain", "--detach", "lab-2"]).ok().json();
        (still["stuck"][0][0] == "db.1").then_some(())
    });
    let row = hosts[0].moyai(&["--json", "nodes"]).ok().rows().into_iter().find(|row| row["name"] == "lab-2");
    assert_eq!(row.expect("lab-2")["draining"], true);
    hosts[0].moyai(&["rm", "db"]).ok();
    wait_for("the node to be empty", PATIENCE, || drain.text().contains("lab-2 is empty").then_some(()));
    serve(hosts[1], "new", &[]);
    assert_ne!(places(hosts[1], "new"), ["lab-2"]);
    hosts[1].moyai(&["drain", "--undo", "lab-2"]).ok();
    wait_for("lab-2 to take work again", PATIENCE, || {
        let out = hosts[0].moyai(&["run", "--rm", "--on", "node=lab-2", "alpine", "true"]);
        (out.code == 0).then_some(())
    });
    hosts[0].moyai(&["drain", "nowhere"]).fails(1).says("no node `nowhere`");
}

#[test]
fn an_update_replaces_every_replica_and_goes_back_when_one_does_not_stay_up() {
    let lab = Lab::mesh(3);
    let hosts: [&Host; 3] = lab.hosts();
    load(&hosts);
    let run = ["run", "-d", "--name", "web", "--replicas", "3", "--restart", "always", "--stop-timeout", "0"];
    hosts[0].moyai(&[&run[..], &["alpine", "sleep", "1000001"]].concat()).ok();
    let id = id_of(hosts[0], "web");
    hosts[1].moyai(&["update", "web", "--max-surge", "1", "sleep", "1000002"]).ok().says("3 of 3 replicas");
    let commands = || -> Vec<String> {
        let all = hosts.iter().flat_map(|host| host.containers(&id));
        all.map(|container| container.command()).collect()
    };
    wait_for("three of the new form and none of the old", PATIENCE, || {
        let commands = commands();
        (commands.len() == 3 && commands.iter().all(|command| command.contains("1000002"))).then_some(())
    });
    hosts[2].moyai(&["update", "web", "sh", "-c", "exit 3"]).fails(1).says("runs again as before");
    wait_for("all as before the failed update", PATIENCE, || {
        let commands = commands();
        (commands.len() == 3 && commands.iter().all(|command| command.contains("1000002"))).then_some(())
    });
    hosts[0].moyai(&["rollback", "web"]).fails(1).says("has not been updated");
    hosts[0].moyai(&["update", "web", "--max-surge", "0", "--max-unavailable", "0", "true"]).fails(1);
}

#[test]
fn a_singleton_never_runs_twice_and_comes_up_where_its_custodians_are() {
    let lab = Lab::mesh(3);
    let hosts: [&Host; 3] = lab.hosts();
    load(&hosts);
    serve(hosts[0], "ledger", &["--singleton", "--restart", "always"]);
    let id = id_of(hosts[0], "ledger");
    let first = lab.host(&places(hosts[0], "ledger")[0]);
    let container = first.container(&id);
    // Cut off, it ends by itself, and before it runs anywhere else.
    first.cut();
    let others: Vec<&Host> = hosts.iter().copied().filter(|host| host.name != first.name).collect();
    wait_for("it to run on the other side", PATIENCE, || {
        let here = containers(&others, &id);
        assert!(here == 0 || !container.lives(), "it runs twice");
        (here == 1).then_some(())
    });
    first.heal();
    wait_for("all to agree on one", PATIENCE, || {
        let same = hosts.iter().all(|host| places(host, "ledger").len() == 1);
        (same && containers(&hosts, &id) == 1).then_some(())
    });
    // A daemon that is killed renews nothing: the shim ends the container without it.
    let holder = lab.host(&places(hosts[0], "ledger")[0]);
    let container = holder.container(&id);
    holder.kill_daemon();
    let others: Vec<&Host> = hosts.iter().copied().filter(|host| host.name != holder.name).collect();
    wait_for("it to run elsewhere", PATIENCE, || {
        let here = containers(&others, &id);
        assert!(here == 0 || !container.lives(), "it runs twice");
        (here == 1).then_some(())
    });
    holder.up().ok();
    wait_for("all to agree on one", PATIENCE, || {
        (hosts.iter().all(|host| places(host, "ledger").len() == 1) && containers(&hosts, &id) == 1).then_some(())
    });
}

#[test]
fn a_singleton_without_a_majority_waits_until_an_admin_says_so() {
    let lab = Lab::mesh(3);
    let hosts: [&Host; 3] = lab.hosts();
    load(&hosts);
    serve(hosts[0], "ledger", &["--singleton"]);
    let id = id_of(hosts[0], "ledger");
    hosts[1].kill_machine();
    hosts[2].kill_machine();
    wait_for("it to end, or not to start", PATIENCE, || {
        let row = hosts[0].workload("ledger")?;
        // Nobody takes it; or somebody did while the second death was not yet known, and waits.
        let waits = row["state"] == "pending" || row["state"] == "blocked";
        let waits = waits && row["detail"].as_str()?.contains("majority of its custodians");
        (waits && hosts[0].containers(&id).is_empty()).then_some(())
    });
    wait_for("both deaths to be known", PATIENCE, || (hosts[0].nodes_in("down").len() == 2).then_some(()));
    hosts[0].moyai(&["reseat", "ledger"]).fails(1).says("1 of 3 custodians");
    hosts[0].moyai(&["reseat", "--force", "ledger"]).ok();
    wait_for("it to run with new custodians", PATIENCE, || {
        (places(hosts[0], "ledger") == ["lab-1"] && hosts[0].containers(&id).len() == 1).then_some(())
    });
}

#[test]
fn a_gang_runs_whole_or_not_at_all() {
    let lab = Lab::mesh(3);
    let hosts: [&Host; 3] = lab.hosts();
    load(&hosts);
    let cores = hosts[0].moyai(&["--json", "nodes"]).ok().rows()[0]["cpu_milli"][0].as_u64().expect("cores") / 1000;
    // More than half of a node each: one on each node, and no room for a fourth.
    let cpus = format!("{}", cores as f64 * 0.6);
    let gang = |name: &str, count: &str| {
        let options = ["run", "-d", "--name", name, "--gang", "--replicas", count, "--cpus", &cpus];
        hosts[0].moyai(&[&options[..], &["--stop-timeout", "0", "alpine", "sleep", "1000000"]].concat())
    };
    gang("four", "4").fails(125).says("no node takes four");
    assert!(places(hosts[1], "four").is_empty(), "not a part of it");
    gang("three", "3").ok();
    let mut all = places(hosts[0], "three");
    all.sort();
    assert_eq!(all, ["lab-1", "lab-2", "lab-3"]);
    wait_for("the reason to be known elsewhere", PATIENCE, || {
        hosts[2].moyai(&["why", "four"]).ok().text().contains("room for 3 of the gang's 4").then_some(())
    });
}

#[test]
fn what_is_more_urgent_takes_the_place_and_gives_it_back() {
    let lab = Lab::mesh(2);
    let hosts: [&Host; 2] = lab.hosts();
    load(&hosts);
    let cores = hosts[0].moyai(&["--json", "nodes"]).ok().rows()[0]["cpu_milli"][0].as_u64().expect("cores") / 1000;
    let cpus = format!("{}", cores as f64 * 0.6);
    serve(hosts[0], "batch", &["--replicas", "2", "--cpus", &cpus, "--priority", "10", "--restart", "always"]);
    let batch = id_of(hosts[0], "batch");
    serve(hosts[1], "urgent", &["--cpus", &cpus, "--priority", "90"]);
    assert_eq!(places(hosts[1], "urgent").len(), 1);
    wait_for("one of two to have made way and to wait", PATIENCE, || {
        let rows = replicas(hosts[0], "batch");
        let waits = rows.iter().any(|row| row["state"] == "pending" || row["state"] == "evicted");
        (waits && places(hosts[0], "batch").len() == 1 && containers(&hosts, &batch) == 1).then_some(())
    });
    hosts[0].moyai(&["why", "urgent"]).ok().says("lower priority");
    hosts[0].moyai(&["rm", "urgent"]).ok();
    wait_for("both to run again", PATIENCE, || (places(hosts[1], "batch").len() == 2).then_some(()));
}

#[test]
fn neighbours_are_sought_and_shunned() {
    let lab = Lab::mesh(3);
    let hosts: [&Host; 3] = lab.hosts();
    load(&hosts);
    serve(hosts[0], "cache", &["--on", "node=lab-3"]);
    for number in 0..3 {
        let name = format!("near-{number}");
        serve(hosts[0], &name, &["--near", "cache"]);
        assert_eq!(places(hosts[0], &name), ["lab-3"]);
    }
    serve(hosts[1], "each", &["--replicas", "3", "--apart", "each"]);
    let mut all = places(hosts[1], "each");
    all.sort();
    assert_eq!(all, ["lab-1", "lab-2", "lab-3"]);
    let shy = ["run", "-d", "--name", "shy", "--apart", "each", "alpine", "sleep", "1000"];
    hosts[2].moyai(&shy).fails(125).says("apart from each");
}

#[test]
fn a_revoked_node_is_cut_off_and_its_work_comes_up_elsewhere() {
    let lab = Lab::mesh(3);
    let hosts: [&Host; 3] = lab.hosts();
    load(&hosts);
    // The submitter's own work outlives it.
    serve(hosts[2], "web", &["--on", "node=lab-3"]);
    serve(hosts[2], "kept", &["--replicas", "2"]);
    hosts[1].moyai(&["revoke", "lab-3"]).fails(1).says("only an admin may revoke");
    hosts[0].moyai(&["revoke", "lab-3", "--reason", "stolen"]).ok().says("lab-3 is a member no more");
    for host in &hosts[..2] {
        wait_for("lab-3 to be no member", PATIENCE, || (host.alive() == ["lab-1", "lab-2"]).then_some(()));
        wait_for("its work to run on the others", PATIENCE, || (places(host, "kept").len() == 2).then_some(()));
    }
    // It was told: it has ended what it ran, and does not come up any more.
    wait_for("it to have stopped", PATIENCE, || (hosts[2].moyai(&["status"]).code != 0).then_some(()));
    for name in ["web", "kept"] {
        let id = id_of(hosts[0], name);
        wait_for("nothing to run there", PATIENCE, || hosts[2].containers(&id).is_empty().then_some(()));
    }
    hosts[2].moyai(&["up"]).fails(1).says("revoked");
    assert_eq!(hosts[0].alive(), ["lab-1", "lab-2"]);
}

#[test]
fn what_if_foretells_what_then_happens_and_why_remembers_it() {
    let lab = Lab::mesh(3);
    let hosts: [&Host; 3] = lab.hosts();
    load(&hosts);
    serve(hosts[0], "web", &["--replicas", "3", "--spread"]);
    serve(hosts[0], "only", &["--on", "node=lab-3"]);
    let lost = replicas(hosts[0], "web").into_iter().find(|row| row["node"] == "lab-3").expect("one on lab-3");
    let lost = format!("web.{}", lost["replica"]);
    let answer = hosts[1].moyai(&["--json", "whatif", "--kill", "lab-3"]).exits(1).json();
    assert_eq!(answer["moved"].as_array().expect("a list").len(), 1, "{answer}");
    assert_eq!(answer["moved"][0]["replica"], lost.as_str());
    assert_eq!(answer["stuck"][0][0], "only.1");
    hosts[1].moyai(&["whatif", "--kill", "lab-3"]).exits(1).says("would not fit: no label node=lab-3");
    hosts[0].moyai(&["whatif", "--kill", "lab-9"]).fails(1).says("no live node `lab-9`");
    hosts[2].kill_machine();
    wait_for("what was foretold", PATIENCE, || {
        let places = places(hosts[0], "web");
        (places.len() == 3 && !places.contains(&"lab-3".to_owned())).then_some(())
    });
    // From any node: both epochs of what moved, and the reason of the second.
    for host in &hosts[..2] {
        let why = wait_for("the second epoch to be known", PATIENCE, || {
            let why = host.moyai(&["--json", "why", &lost]).ok().rows().into_iter().next()?;
            (why["history"].as_array()?.len() == 2).then_some(why)
        });
        assert_eq!(why["history"][0]["node"], "lab-3");
        assert_eq!(why["history"][1]["cause"], "lab-3 went down");
        host.moyai(&["why", &lost]).ok().says("epoch 1 on lab-3");
        host.moyai(&["events"]).ok().says("lab-3");
    }
}
