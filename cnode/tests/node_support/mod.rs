//! What the tests of the node library share: an EPMD of their own, and real BEAMs to talk to.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic
)]

use std::collections::HashMap;
use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use meshx::node::{Node, NodeBuilder};
use meshx_dist::epmd::{Alive2Resp, Node as Entry, Port2Resp, Request};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

/// The cookie of every node here.
pub const COOKIE: &str = "node-tests";
/// Nothing here takes that long on any machine; it only ends a test that hangs.
pub const LONG: Duration = Duration::from_secs(60);

type Names = Arc<Mutex<HashMap<Vec<u8>, Entry>>>;

/// The part of EPMD that nodes need, on a port of its own: no daemon is started and none is disturbed.
pub struct Epmd {
    pub addr: SocketAddr,
    names: Names,
}

impl Epmd {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let names = Names::default();
        let shared = Arc::clone(&names);
        tokio::spawn(async move {
            let mut creation = 100;
            while let Ok((socket, _)) = listener.accept().await {
                creation += 1;
                tokio::spawn(serve(socket, Arc::clone(&shared), creation));
            }
        });
        Self { addr, names }
    }

    /// Points a name at a port, for a peer that a test plays itself.
    pub fn add(&self, name: &str, port: u16) {
        let entry = Entry::new(name, port, meshx_dist::epmd::NodeType::Hidden);
        self.names.lock().unwrap().insert(name.into(), entry);
    }

    pub fn port_of(&self, name: &str) -> u16 {
        self.names.lock().unwrap().get(name.as_bytes()).unwrap().port
    }

    /// A node of the library, registered here.
    pub fn builder(&self, name: &str) -> NodeBuilder {
        Node::builder(name).cookie(COOKIE).plain_epmd(self.addr)
    }

    pub async fn node(&self, name: &str) -> Node {
        self.until_free(name).await;
        self.builder(name).start().await.unwrap()
    }

    /// Who has stopped has closed its registration: this reads of it a moment later.
    pub async fn until_free(&self, name: &str) {
        // An EPMD knows the part before the host.
        let short = name.split('@').next().unwrap().as_bytes();
        let free = || !self.names.lock().unwrap().contains_key(short);
        let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
        while !free() {
            assert!(
                tokio::time::Instant::now() < deadline,
                "{name} is still registered"
            );
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// A BEAM, registered here.
    pub async fn beam(&self, name: &str) -> Beam {
        Beam::start(self.addr, name, &[]).await
    }
}

async fn serve(mut socket: TcpStream, names: Names, creation: u32) {
    let mut received = Vec::new();
    let request = loop {
        if let Some(request) = Request::decode(&received).unwrap() {
            break request;
        }
        if socket.read_buf(&mut received).await.unwrap_or(0) == 0 {
            return;
        }
    };
    let mut out = Vec::new();
    match request {
        Request::Alive2(entry) => {
            let name = entry.name.clone();
            let taken = names.lock().unwrap().contains_key(&name);
            Alive2Resp::Creation32 {
                result: u8::from(taken),
                creation,
            }
            .encode(&mut out);
            if !taken {
                names.lock().unwrap().insert(name.clone(), entry);
            }
            let _ = socket.write_all(&out).await;
            if !taken {
                // Registered for as long as the connection is open.
                while socket.read(&mut [0; 64]).await.unwrap_or(0) > 0 {}
                names.lock().unwrap().remove(&name);
            }
        }
        Request::PortPlease2(name) => {
            let found = names.lock().unwrap().get(&name).cloned();
            let response = found.map_or(Port2Resp::NotFound(1), Port2Resp::Found);
            response.encode(&mut out).unwrap();
            let _ = socket.write_all(&out).await;
        }
        _ => {}
    }
}

/// Reads expressions, evaluates them with their bindings kept, prints values.
const CONSOLE: &str = r#"
    Loop = fun Loop(Bindings) ->
        case io:get_line("") of
            Line when is_list(Line) ->
                {ok, Tokens, _} = erl_scan:string(Line),
                {ok, Exprs} = erl_parse:parse_exprs(Tokens),
                Next = try
                    {value, Value, New} = erl_eval:exprs(Exprs, Bindings),
                    io:format("ok ~0tp~n", [Value]),
                    New
                catch
                    Class:Reason -> io:format("error ~0tp~n", [{Class, Reason}]), Bindings
                end,
                Loop(Next);
            _ -> erlang:halt(0)
        end
    end,
    io:format("ready~n"),
    Loop([]).
"#;

/// A real node. It ends with its standard input, so also with this process.
pub struct Beam {
    pub name: String,
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

impl Beam {
    pub async fn start(epmd: SocketAddr, name: &str, flags: &[&str]) -> Self {
        let mut child = Command::new("erl")
            .args([
                "-noshell",
                "-start_epmd",
                "false",
                "-setcookie",
                COOKIE,
                "-name",
                name,
            ])
            .args(flags)
            .args(["-eval", CONSOLE])
            .env("ERL_EPMD_ADDRESS", epmd.ip().to_string())
            .env("ERL_EPMD_PORT", epmd.port().to_string())
            .env_remove("ERL_FLAGS")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("erl is needed for these tests");
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut beam = Self {
            name: name.to_owned(),
            child,
            input,
            output,
        };
        let line = beam.line(LONG).await;
        assert_eq!(line, "ready");
        beam
    }

    async fn line(&mut self, patience: Duration) -> String {
        let line = tokio::time::timeout(patience, self.output.next_line())
            .await
            .expect("the BEAM did not answer");
        line.unwrap().expect("the BEAM ended")
    }

    /// Evaluates expressions (one line, with the full stop) and gives the value as printed.
    pub async fn eval(&mut self, expressions: &str) -> String {
        let answer = self.try_eval(expressions).await;
        answer.unwrap_or_else(|error| panic!("{expressions}: {error}"))
    }

    pub async fn try_eval(&mut self, expressions: &str) -> Result<String, String> {
        self.ask(expressions).await;
        self.answer().await
    }

    /// The first half of [`Beam::try_eval`], for what is to happen while the BEAM is busy with it.
    pub async fn ask(&mut self, expressions: &str) {
        let line = format!("{}\n", expressions.replace('\n', " "));
        self.input.write_all(line.as_bytes()).await.unwrap();
        self.input.flush().await.unwrap();
    }

    pub async fn answer(&mut self) -> Result<String, String> {
        self.long_answer(LONG).await
    }

    /// The answer to something that takes up to `patience`.
    pub async fn long_answer(&mut self, patience: Duration) -> Result<String, String> {
        loop {
            let line = self.line(patience).await;
            if let Some(value) = line.strip_prefix("ok ") {
                return Ok(value.to_owned());
            }
            if let Some(error) = line.strip_prefix("error ") {
                return Err(error.to_owned());
            }
        }
    }

    pub async fn kill(mut self) {
        self.child.kill().await.unwrap();
    }
}

/// Waits for `future`, but not for ever.
pub async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LONG, future)
        .await
        .expect("this did not happen in a minute")
}
