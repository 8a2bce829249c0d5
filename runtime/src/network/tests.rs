//! In network namespaces of the tests' own, by the kernel's answers.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use super::*;

/// Runs in a network namespace of its own.
fn apart(run: impl FnOnce() + Send + 'static) {
    std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("these tests make network namespaces: run them as root");
        let mut links = Line::route().unwrap();
        link::up(&mut links, 1).unwrap();
        run();
    })
    .join()
    .unwrap();
}

fn inside<T: Send + 'static>(
    endpoint: &Endpoint,
    run: impl FnOnce() -> T + Send + 'static,
) -> std::thread::JoinHandle<T> {
    let namespace = endpoint.namespace.try_clone().unwrap();
    std::thread::spawn(move || {
        nix::sched::setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
        run()
    })
}

fn tcp(host: u16, container: u16) -> Port {
    Port { host_ip: None, host, container, udp: false }
}

/// A listener in a container that says its name to whoever calls, once.
fn greeter(endpoint: &Endpoint, port: u16, name: &'static str) {
    let (sender, ready) = std::sync::mpsc::channel();
    inside(endpoint, move || {
        let listener = TcpListener::bind(("0.0.0.0", port)).unwrap();
        sender.send(()).unwrap();
        while let Ok((mut caller, _)) = listener.accept() {
            caller.write_all(name.as_bytes()).unwrap();
        }
    });
    ready.recv().unwrap();
}

fn call(to: (Ipv4Addr, u16)) -> io::Result<String> {
    let mut line = TcpStream::connect_timeout(&SocketAddr::from(to), Duration::from_secs(2))?;
    let mut text = String::new();
    line.read_to_string(&mut text).map(|_| text)
}

#[test]
fn containers_reach_one_another_and_published_ports_lead_to_them() {
    apart(|| {
        let bridge = Bridge::open("abcdef12", BTreeMap::new()).unwrap();
        let (one, two) = (bridge.endpoint().unwrap(), bridge.endpoint().unwrap());
        assert_ne!(one.address, two.address);
        greeter(&one, 80, "one");
        let (address, gateway) = (one.address, bridge.subnet().gateway());
        assert_eq!(inside(&two, move || call((address, 80)).unwrap()).join().unwrap(), "one");
        // Before it is published, the port is closed; afterwards it leads there from this machine and from containers.
        assert!(call((Ipv4Addr::LOCALHOST, 8080)).is_err());
        bridge.publish(one.address, &[tcp(8080, 80)]).unwrap();
        assert_eq!(call((Ipv4Addr::LOCALHOST, 8080)).unwrap(), "one");
        assert_eq!(call((gateway, 8080)).unwrap(), "one");
        for from in [&one, &two] {
            assert_eq!(inside(from, move || call((gateway, 8080)).unwrap()).join().unwrap(), "one");
        }
        bridge.release(one.address).unwrap();
        assert!(call((Ipv4Addr::LOCALHOST, 8080)).is_err());
    });
}

#[test]
fn a_port_of_one_address_leads_from_there_alone_and_udp_is_not_tcp() {
    apart(|| {
        let bridge = Bridge::open("abcdef", BTreeMap::new()).unwrap();
        let one = bridge.endpoint().unwrap();
        greeter(&one, 80, "one");
        let exact = Port { host_ip: Some(Ipv4Addr::LOCALHOST), ..tcp(8080, 80) };
        let udp = Port { udp: true, ..tcp(5353, 53) };
        bridge.publish(one.address, &[exact, udp]).unwrap();
        assert_eq!(call((Ipv4Addr::LOCALHOST, 8080)).unwrap(), "one");
        assert!(call((bridge.subnet().gateway(), 8080)).is_err());
        assert!(call((Ipv4Addr::LOCALHOST, 5353)).is_err());
        let (sender, ready) = std::sync::mpsc::channel();
        let heard = inside(&one, move || {
            let socket = UdpSocket::bind("0.0.0.0:53").unwrap();
            sender.send(()).unwrap();
            let mut buffer = [0; 16];
            let (len, from) = socket.recv_from(&mut buffer).unwrap();
            socket.send_to(&buffer[..len], from).unwrap();
        });
        ready.recv().unwrap();
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        socket.send_to(b"ping", "127.0.0.1:5353").unwrap();
        let mut buffer = [0; 16];
        assert_eq!(socket.recv(&mut buffer).unwrap(), 4);
        heard.join().unwrap();
    });
}

#[test]
fn the_machine_s_own_loopback_is_not_reached_from_a_container() {
    apart(|| {
        let bridge = Bridge::open("abcdef", BTreeMap::new()).unwrap();
        let one = bridge.endpoint().unwrap();
        let service = UdpSocket::bind("127.0.0.1:9000").unwrap();
        service.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        let address = one.address;
        inside(&one, move || {
            // What an attacker with rights over his own network would do (CVE-2020-8558): then 127.0.0.1 lies by the way out.
            set_sysctl("ipv4/conf/eth0/route_localnet", "1").unwrap();
            let moved = std::process::Command::new("ip").args(["address", "flush", "dev", "lo"]).status();
            assert!(moved.unwrap().success());
            UdpSocket::bind((address, 0)).unwrap().send_to(b"hello", "127.0.0.1:9000").unwrap();
        })
        .join()
        .unwrap();
        assert!(service.recv(&mut [0; 8]).is_err(), "nothing came");
    });
}

#[test]
fn the_next_daemon_takes_over_what_it_finds() {
    apart(|| {
        let bridge = Bridge::open("abcdef", BTreeMap::new()).unwrap();
        let one = bridge.endpoint().unwrap();
        let two = bridge.endpoint().unwrap();
        greeter(&one, 80, "one");
        bridge.publish(one.address, &[tcp(8080, 80)]).unwrap();
        bridge.publish(two.address, &[tcp(8081, 80)]).unwrap();
        let subnet = bridge.subnet();
        drop(bridge);
        assert_eq!(call((Ipv4Addr::LOCALHOST, 8080)).unwrap(), "one", "without a daemon");
        let used = BTreeMap::from([(one.address, vec![tcp(8080, 80)])]);
        let bridge = Bridge::open("abcdef", used).unwrap();
        assert_eq!(bridge.subnet(), subnet);
        assert_eq!(call((Ipv4Addr::LOCALHOST, 8080)).unwrap(), "one");
        assert!(call((Ipv4Addr::LOCALHOST, 8081)).is_err(), "what is not in use any more leads nowhere");
        bridge.close().unwrap();
        assert!(link::index(&bridge.name).is_ok(), "it is in use");
        bridge.release(one.address).unwrap();
        bridge.close().unwrap();
        assert!(link::index(&bridge.name).is_err());
    });
}

#[test]
fn a_range_that_the_machine_uses_is_left_alone_and_two_nodes_have_two() {
    apart(|| {
        let one = Bridge::open("aaaaaa", BTreeMap::new()).unwrap();
        let two = Bridge::open("bbbbbb", BTreeMap::new()).unwrap();
        assert_eq!(one.subnet().base, Ipv4Addr::new(10, 210, 0, 0));
        assert_eq!(two.subnet().base, Ipv4Addr::new(10, 211, 0, 0));
    });
}

#[test]
fn what_nobody_holds_goes_by_itself_and_its_address_is_given_again_last() {
    apart(|| {
        let bridge = Bridge::open("abcdef", BTreeMap::new()).unwrap();
        let one = bridge.endpoint().unwrap();
        let (address, cable) = (one.address, bridge.cable(one.address));
        assert!(link::index(&cable).is_ok());
        bridge.release(address).unwrap();
        assert_ne!(bridge.endpoint().unwrap().address, address);
        bridge.state().cursor = 1;
        let again = bridge.endpoint().unwrap();
        assert_eq!(again.address, address);
        let left = inside(&one, || nix::net::if_::if_nametoindex("eth0"));
        assert!(left.join().unwrap().is_err(), "what had it before is cut off");
        drop(again);
        let until = std::time::Instant::now() + Duration::from_secs(60);
        while link::index(&cable).is_ok() {
            assert!(std::time::Instant::now() < until, "the kernel clears away what nobody holds");
            std::thread::sleep(Duration::from_millis(5));
        }
    });
}

#[test]
fn rules_that_somebody_flushed_are_put_back_with_the_next_port() {
    apart(|| {
        let bridge = Bridge::open("abcdef", BTreeMap::new()).unwrap();
        let (one, two) = (bridge.endpoint().unwrap(), bridge.endpoint().unwrap());
        greeter(&one, 80, "one");
        bridge.publish(one.address, &[tcp(8080, 80)]).unwrap();
        filter::remove(&mut bridge.state().filter, &bridge.name).unwrap();
        assert!(call((Ipv4Addr::LOCALHOST, 8080)).is_err());
        bridge.publish(two.address, &[tcp(8081, 80)]).unwrap();
        assert_eq!(call((Ipv4Addr::LOCALHOST, 8080)).unwrap(), "one");
        // What another has is not taken from it by one who does not get it.
        assert!(bridge.publish(two.address, &[tcp(8080, 80)]).is_err());
        bridge.release(two.address).unwrap();
        assert_eq!(call((Ipv4Addr::LOCALHOST, 8080)).unwrap(), "one");
    });
}

#[test]
fn a_container_is_nobody_else_and_no_router() {
    apart(|| {
        let bridge = Bridge::open("abcdef", BTreeMap::new()).unwrap();
        let one = bridge.endpoint().unwrap();
        let heard = UdpSocket::bind((bridge.subnet().gateway(), 9000)).unwrap();
        heard.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        let gateway = bridge.subnet().gateway();
        inside(&one, move || {
            let added =
                std::process::Command::new("ip").args(["address", "add", "192.0.2.1/32", "dev", "eth0"]).status();
            assert!(added.unwrap().success());
            UdpSocket::bind("192.0.2.1:0").unwrap().send_to(b"forged", (gateway, 9000)).unwrap();
        })
        .join()
        .unwrap();
        assert!(heard.recv(&mut [0; 8]).is_err(), "nothing came");
        let ipv6 = fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap_or_default();
        assert!(!ipv6.contains(&bridge.name), "{ipv6}");
    });
}
