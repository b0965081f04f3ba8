//! A process that reads and writes terms with libei, C's erl_interface. The source is tests/libei/ei_terms.c; it is
//! compiled when it is first needed, against the libei of the `erl` on the path (Debian's package erlang-dev), or that in
//! the directory `MESHX_LIBEI`: `include/ei.h` and `lib/libei.a`.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic
)]

use std::io::{BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

const SOURCE: &str = include_str!("../../../../tests/libei/ei_terms.c");
const NEWER_LIBC: &str = include_str!("../../../../tests/libei/newer_libc.h");

/// Names another libei than that of the `erl` on the path.
const VARIABLE: &str = "MESHX_LIBEI";

/// The process. It ends when this is dropped.
pub struct Libei {
    process: Child,
    requests: Option<ChildStdin>,
    replies: BufReader<ChildStdout>,
}

impl Libei {
    /// Compiles the program and starts it.
    pub fn start() -> Self {
        let program = compile(SOURCE);
        let mut process = Command::new(&program)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        std::fs::remove_file(program).unwrap();
        let (requests, replies) = (process.stdin.take(), process.stdout.take().unwrap());
        Self {
            process,
            requests,
            replies: BufReader::new(replies),
        }
    }

    fn ask(&mut self, letter: u8, body: &[u8]) -> Vec<u8> {
        let requests = self.requests.as_mut().unwrap();
        let request = [&(body.len() as u32 + 1).to_be_bytes()[..], &[letter], body].concat();
        requests.write_all(&request).unwrap();
        requests.flush().unwrap();
        let mut len = [0; 4];
        self.replies.read_exact(&mut len).unwrap();
        let mut reply = vec![0; u32::from_be_bytes(len) as usize];
        self.replies.read_exact(&mut reply).unwrap();
        reply
    }

    /// The term, decoded and encoded again; `None` if libei refuses it.
    pub fn echo(&mut self, term: &[u8]) -> Option<Vec<u8>> {
        let reply = self.ask(b'E', term);
        (reply.first() == Some(&1)).then(|| reply[1..].to_vec())
    }

    /// The length of the term at the start of the bytes; `None` if libei refuses it.
    pub fn skip(&mut self, term: &[u8]) -> Option<usize> {
        let reply = self.ask(b'S', term);
        (reply.first() == Some(&1)).then(|| u32::from_be_bytes(*reply[1..].first_chunk().unwrap()) as usize)
    }

    /// Keeps a term for what is timed.
    pub fn load(&mut self, term: &[u8]) {
        assert_eq!(self.ask(b'L', term), [1], "libei refuses the corpus");
    }

    /// The time to go through the kept term so often, reading every leaf.
    pub fn walk(&mut self, times: u32) -> Duration {
        self.timed(b'W', times)
    }

    /// The time to skip the kept term so often.
    pub fn skip_kept(&mut self, times: u32) -> Duration {
        self.timed(b'K', times)
    }

    /// The time to encode the kept term so often.
    pub fn encode(&mut self, times: u32) -> Duration {
        self.timed(b'N', times)
    }

    fn timed(&mut self, letter: u8, times: u32) -> Duration {
        let reply = self.ask(letter, &times.to_be_bytes());
        Duration::from_nanos(u64::from_be_bytes(*reply.first_chunk().unwrap()))
    }
}

impl Drop for Libei {
    fn drop(&mut self) {
        // Its input ends, and it with it.
        drop(self.requests.take());
        let _ = self.process.wait();
    }
}

/// Where libei is.
fn directory() -> PathBuf {
    if let Some(named) = std::env::var_os(VARIABLE) {
        return named.into();
    }
    let root = Command::new("erl")
        .args(["-noshell", "-eval", "io:put_chars(code:root_dir()), halt()."])
        .output()
        .expect("erl must be on the path");
    let root = String::from_utf8(root.stdout).unwrap();
    PathBuf::from(root).join("usr")
}

/// Compiles a C program with libei into a temporary file, which the caller removes.
pub fn compile(source: &str) -> PathBuf {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let libei = directory();
    let name = format!(
        "libei-{}-{}",
        std::process::id(),
        COUNT.fetch_add(1, Ordering::Relaxed)
    );
    let program = std::env::temp_dir().join(name);
    let mut compiler = Command::new("cc")
        .args(["-O2", "-x", "c", "-", "-o"])
        .arg(&program)
        .arg("-I")
        .arg(libei.join("include"))
        .arg("-L")
        .arg(libei.join("lib"))
        .args(["-lei", "-lpthread"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("cc must be on the path");
    let source = format!("{NEWER_LIBC}#line 1\n{source}");
    // Gone when `cc` cannot even start to read; its messages say why.
    let _ = compiler.stdin.take().unwrap().write_all(source.as_bytes());
    let done = compiler.wait_with_output().unwrap();
    assert!(
        done.status.success(),
        "libei is needed (package erlang-dev): {}",
        String::from_utf8_lossy(&done.stderr)
    );
    program
}
