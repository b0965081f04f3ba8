//! Hostile clients of EPMD's stand-in.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpStream};
use std::time::{Duration, Instant};

use meshx_tests::epmd::{Alive, alive2, dial, names, port_please};
use meshx_tests::{Agent, Mesh};

const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

fn agent() -> (Mesh, Agent) {
    let mesh = Mesh::new().unwrap();
    let options = ["--epmd=127.0.0.1:0", "--epmd-nodes", "*"];
    let agent = mesh.agent_with("a", "127.0.0.2", &["h1"], &options).unwrap();
    (mesh, agent)
}

/// What comes back, up to the end.
fn ask(epmd: u16, bytes: &[u8]) -> Vec<u8> {
    let mut stream = dial((HERE, epmd).into()).unwrap();
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    answer
}

#[test]
fn what_is_no_request_is_closed_and_disturbs_nobody() {
    let (_mesh, agent) = agent();
    let epmd = agent.epmd().unwrap();
    let _shop = Alive::register(epmd, "shop").unwrap();
    let giant_name = [
        &[0u8, 18, 120, 0, 9, 77, 0, 0, 6, 0, 6][..],
        &[0xff, 0xff],
        &[b'a'; 7],
    ]
    .concat();
    for bytes in [
        &b"\xff\xff\x78"[..],
        b"\x00\x00",
        b"\x00\x01\x00",
        b"\x00\x01nn",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x00\x05z\xff\xfe@\n",
        b"\x00\x03x\x00\x01",
        &giant_name,
        &[0; 70_000],
    ] {
        let at = Instant::now();
        assert_eq!(ask(epmd, bytes), b"", "{bytes:?}");
        // Refused when seen, and not when the time for a request is over.
        assert!(
            at.elapsed() < Duration::from_secs(4),
            "{:?}: {bytes:?}",
            at.elapsed()
        );
    }
    // An older node is told no in the form that it knows, and nobody's name is taken away.
    let old = [
        &[0u8, 17, 120, 0, 9, 77, 0, 0, 5, 0, 5, 0, 4][..],
        b"late",
        &[0, 0],
    ]
    .concat();
    assert_eq!(ask(epmd, &old), [121, 1, 0, 0]);
    assert_eq!(ask(epmd, b"\x00\x01k"), b"NO");
    assert_eq!(ask(epmd, b"\x00\x05sshop"), b"NOEXIST");
    assert_eq!(ask(epmd, b"\x00\x01d"), b"");
    assert_eq!(names(epmd).unwrap(), ["shop"]);
}

#[test]
fn half_requests_and_a_thousand_connections_keep_nobody_out() {
    let (_mesh, agent) = agent();
    let epmd = agent.epmd().unwrap();
    let shop = Alive::register(epmd, "shop").unwrap();
    // None of them says more than half a word.
    let halves: Vec<TcpStream> = (0..1000)
        .map(|number| {
            let mut stream = dial((HERE, epmd).into()).unwrap();
            let half = [0, 20, 120, 0, 9];
            let _ = stream.write_all(&half[..number % 6]);
            stream
        })
        .collect();
    let at = Instant::now();
    assert_eq!(names(epmd).unwrap(), ["shop"]);
    assert!(port_please(HERE, epmd, "shop").unwrap().is_some());
    let late = Alive::register(epmd, "late").unwrap();
    println!(
        "answered and registered in {:?} beside 1,000 half requests",
        at.elapsed()
    );
    assert_eq!(names(epmd).unwrap(), ["late", "shop"]);
    // Each of them ends within the time of a request, by room or by time.
    for mut half in halves {
        half.set_read_timeout(Some(Duration::from_secs(15))).unwrap();
        match half.read(&mut [0]) {
            Ok(0) => {}
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
            other => panic!("{other:?}"),
        }
    }
    // Whoever is registered is not.
    for node in [&shop, &late] {
        node.registration.set_nonblocking(true).unwrap();
        let seen = (&node.registration).read(&mut [0]).unwrap_err();
        assert_eq!(seen.kind(), std::io::ErrorKind::WouldBlock);
    }
}

#[test]
fn names_that_come_and_go_leave_nothing() {
    let (_mesh, agent) = agent();
    let epmd = agent.epmd().unwrap();
    for round in 0..30 {
        // Gone before, while and after it is answered.
        let (registration, _) = alive2(epmd, &format!("gone{round}"), 9).unwrap();
        drop(registration);
        let mut early = dial((HERE, epmd).into()).unwrap();
        let name = format!("early{}", round % 10);
        let request = [
            &[0u8, 19, 120, 0, 9, 77, 0, 0, 6, 0, 6, 0, 6][..],
            name.as_bytes(),
            &[0, 0],
        ]
        .concat();
        early.write_all(&request).unwrap();
    }
    // The mesh lets a name go a moment later than its agent.
    let left = || !names(epmd).unwrap().is_empty() || agent.meshx_ok(&["names"]).unwrap().contains("@h1");
    meshx_tests::wait_until(Duration::from_secs(30), || !left()).unwrap();
}

#[test]
fn tools_come_and_go_without_the_mesh() {
    let (_mesh, agent) = agent();
    let epmd = agent.epmd().unwrap();
    let tools = [
        "rabbitmqcli-77-r2",
        "epmd-starter-1",
        "rpc-ab12-shop",
        "rem-ab12-shop",
        "r1_prelaunch_42",
    ];
    let held: Vec<Alive> = tools
        .iter()
        .map(|name| Alive::register(epmd, name).unwrap())
        .collect();
    let mut sorted = tools;
    sorted.sort_unstable();
    assert_eq!(names(epmd).unwrap(), sorted);
    for (tool, name) in held.iter().zip(tools) {
        assert!(tool.creation >= 4);
        let port = port_please(HERE, epmd, name).unwrap();
        assert_eq!(port, Some(tool.listener.local_addr().unwrap().port()));
    }
    let (_, taken) = alive2(epmd, tools[0], 9).unwrap();
    assert_eq!(taken.creation(), None);
    assert!(!agent.meshx_ok(&["names"]).unwrap().contains("@h1"));
    drop(held);
    meshx_tests::wait_until(Duration::from_secs(30), || names(epmd).unwrap().is_empty()).unwrap();
}
