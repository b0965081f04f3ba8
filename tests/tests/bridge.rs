//! The example bridge: lines of JSON over TCP to a server in the cluster, and events back.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use meshx_tests::{Beam, COOKIE, Mesh, Process, program};

const PATIENCE: Duration = Duration::from_secs(30);

struct Client {
    stream: TcpStream,
    lines: BufReader<TcpStream>,
}

impl Client {
    fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let lines = BufReader::new(stream.try_clone().unwrap());
        Self { stream, lines }
    }

    fn write(&mut self, line: &str) {
        self.stream.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    fn read(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    fn ask(&mut self, line: &str) -> String {
        self.write(line);
        self.read()
    }
}

const SERVER: &str = "defmodule Echo do use GenServer; def init(s), do: {:ok, s}; \
    def handle_call({:upcase, %{\"text\" => t}}, _, s), do: {:reply, {:ok, %{text: String.upcase(t), n: nil}}, s}; \
    def handle_call({:crash, _}, _, s), do: {:stop, :oh, s}; \
    def handle_call({:pid, _}, _, s), do: {:reply, self(), s} end; \
    {:ok, _} = GenServer.start(Echo, 0, name: :echo); :up";

#[test]
fn json_lines_reach_servers_and_events_come_back() {
    let mesh = Mesh::new().unwrap();
    let h1 = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let h2 = mesh.agent("b", "127.0.0.3", &["h2"]).unwrap();
    let mut beam = Beam::start(&h1, "shop@h1").unwrap();
    beam.expect(SERVER, ":up").unwrap();
    let mut arguments = vec!["--name", "bridge@h2", "--cookie", COOKIE];
    for route in [
        "upcase=echo@shop@h1",
        "pid=echo@shop@h1",
        "crash=echo@shop@h1",
        "away=echo@nobody@h1",
    ] {
        arguments.extend(["--route", route]);
    }
    let mut bridge = Process::start("bridge", program("bridge").unwrap(), arguments, |command| {
        command.env("MESHX_DIR", h2.dir());
    })
    .unwrap();
    let address = bridge
        .wait_for(PATIENCE, |line| line.rsplit_once("listening on ")?.1.parse().ok())
        .unwrap();

    let mut client = Client::connect(address);
    assert_eq!(
        client.ask(r#"{"id": 1, "do": "upcase", "with": {"text": "é lamp"}}"#),
        r#"{"id":1,"ok":["ok",{"n":null,"text":"É LAMP"}]}"#
    );
    for (line, words) in [
        (r#"{"id": 2, "do": "halt"}"#, "there is no"),
        (r#"{"id": 3, "do": "away"}"#, "no_such_node"),
        (r#"{"id": 4, "do": "pid"}"#, "no form in JSON"),
        ("garbage", "wanted"),
        (r#"{"id": 5, "do": "crash"}"#, "oh"),
        (r#"{"id": 6, "do": "pid"}"#, "no such process"),
    ] {
        let answer = client.ask(line);
        assert!(
            answer.contains("\"error\"") && answer.contains(words),
            "{line}: {answer}"
        );
    }

    // Events reach those who asked for them, and nobody else.
    let mut other = Client::connect(address);
    assert_eq!(
        client.ask(r#"{"subscribe": "orders"}"#),
        r#"{"subscribed":"orders"}"#
    );
    assert_eq!(
        other.ask(r#"{"subscribe": "prices"}"#),
        r#"{"subscribed":"prices"}"#
    );
    beam.expect("GenServer.call({:bridge, :bridge@h2}, :clients)", "2")
        .unwrap();
    for event in [
        "{:publish, \"orders\", %{id: 7, state: :paid}}",
        "{:publish, \"prices\", [1.5, {1, nil}]}",
        "1",
    ] {
        beam.expect(
            &format!("GenServer.cast({{:bridge, :bridge@h2}}, {event})"),
            ":ok",
        )
        .unwrap();
    }
    assert_eq!(
        client.read(),
        r#"{"data":{"id":7,"state":"paid"},"topic":"orders"}"#
    );
    assert_eq!(other.read(), r#"{"data":[1.5,[1,null]],"topic":"prices"}"#);
    bridge.wait_log("a cast was no", PATIENCE).unwrap();

    // A line without an end is a client's own concern.
    let mut endless = Client::connect(address);
    // It is closed in the middle of it: what was not read makes a reset of the end.
    let _ = endless.stream.write_all(&vec![b'x'; 70 << 10]);
    match endless.stream.read(&mut [0]) {
        Ok(0) => {}
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        other => panic!("{other:?}"),
    }
    bridge
        .wait_log("a line of more than 65536 bytes", PATIENCE)
        .unwrap();
    client.write(r#"{"id": 8, "do": "halt"}"#);
    assert!(client.read().contains("\"id\":8"));
}
