//! A real BEAM that registers with our EPMD.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};

use super::epmd::Epmd;

pub const COOKIE: &str = "monster";

/// Ends when its standard input does, so that nothing stays behind even if the test is killed. `echo` sends back
/// what it gets; `do` applies a fun's name to arguments and sends the result.
const PROGRAM: &str = r#"
    spawn(fun() -> io:get_line(""), erlang:halt(0, [{flush, false}]) end),
    Echo = fun Loop() -> receive {P, T} -> P ! {echo, T}, Loop() end end,
    register(echo, spawn(Echo)),
    Do = fun Loop() ->
        receive {P, M, F, A} -> spawn(fun() -> P ! {result, catch apply(M, F, A)} end), Loop() end
    end,
    register(do, spawn(Do)),
    io:put_chars("ready\n").
"#;

pub struct Beam {
    child: Child,
    pub name: String,
    pub port: u16,
}

impl Beam {
    /// Starts a visible node `ALIVE@127.0.0.1` and waits until it has registered and runs its program: a node can
    /// be dialled before that.
    pub async fn start(epmd: &Epmd, alive: &str) -> Self {
        let mut beam = Self::spawn(epmd, alive, PROGRAM);
        beam.port = epmd.registered(alive).await.port;
        let stdout = beam.child.stdout.take().unwrap();
        let first_line = tokio::task::spawn_blocking(|| {
            let mut line = String::new();
            BufReader::new(stdout).read_line(&mut line).map(|_| line)
        });
        let first_line = super::soon("the BEAM's program", first_line).await.unwrap();
        assert_eq!(first_line.unwrap(), "ready\n");
        beam
    }

    /// Starts a node that is given its name by the first node that it connects to, here `peer`, and tells the
    /// process `named` there what it is called.
    pub fn start_without_name(epmd: &Epmd, peer: &str) -> Self {
        let program = format!(
            r#"
            spawn(fun() -> io:get_line(""), erlang:halt(0, [{{flush, false}}]) end),
            true = net_kernel:connect_node('{peer}'),
            {{named, '{peer}'}} ! {{node(), erlang:system_info(creation)}}.
            "#
        );
        Self::spawn(epmd, "undefined", &program)
    }

    fn spawn(epmd: &Epmd, alive: &str, program: &str) -> Self {
        let name = format!("{alive}@127.0.0.1");
        let child = Command::new("erl")
            .args([
                "-noshell",
                "-start_epmd",
                "false",
                "-setcookie",
                COOKIE,
                "-name",
                &name,
            ])
            .args(["-kernel", "inet_dist_use_interface", "{127,0,0,1}"])
            .args(["-kernel", "logger_level", "emergency"])
            // Longest time for a handshake, in seconds: a busy machine must not fail a test.
            .args(["-kernel", "net_setuptime", "60"])
            .args(["-eval", program])
            .env("ERL_EPMD_PORT", epmd.port.to_string())
            .env("ERL_EPMD_ADDRESS", "127.0.0.1")
            .env("ERL_CRASH_DUMP_BYTES", "0")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("erl, which this test needs, could not be started");
        Self { child, name, port: 0 }
    }
}

impl Drop for Beam {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
