//! The crate `erl_dist` as a peer of a whole node: an implementation that shares no line with this one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod node_support;

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use erl_dist::handshake::{ClientSideHandshake, HandshakeStatus, ServerSideHandshake};
use erl_dist::message::{Message as Theirs, Receiver, Sender, channel};
use erl_dist::node::{Creation, LocalNode, NodeName};
use erl_dist::term::{Atom, FixInteger, List, Pid, PidOrAtom, Reference, Term as TheirTerm, Tuple};
use erl_dist::{DistributionFlags, LOWEST_DISTRIBUTION_PROTOCOL_VERSION};
use futures::io::{AsyncRead, AsyncWrite};
use meshx::node::{Mailbox, Message, Node};
use meshx_etf::Term;
use node_support::{COOKIE, Epmd, LONG, soon};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::compat::{Compat, TokioAsyncReadCompatExt as _};

const THEIRS: &str = "theirs@127.0.0.1";

/// A socket that can be cloned, as `erl_dist::message::channel` wants it.
#[derive(Clone)]
struct Shared(Arc<Mutex<Compat<TcpStream>>>);

impl Shared {
    fn new(stream: TcpStream) -> Self {
        stream.set_nodelay(true).unwrap();
        Self(Arc::new(Mutex::new(stream.compat())))
    }

    fn with<T>(&self, f: impl FnOnce(Pin<&mut Compat<TcpStream>>) -> T) -> T {
        f(Pin::new(&mut *self.0.lock().unwrap()))
    }
}

impl AsyncRead for Shared {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        self.with(|stream| stream.poll_read(cx, buf))
    }
}

impl AsyncWrite for Shared {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.with(|stream| stream.poll_write(cx, buf))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|stream| stream.poll_flush(cx))
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|stream| stream.poll_close(cx))
    }
}

fn their_node() -> LocalNode {
    let mut node = LocalNode::new(NodeName::new("theirs", "127.0.0.1").unwrap(), Creation::new(22));
    // Its defaults lack what a node that monitors says; its own constants name them.
    node.flags |= DistributionFlags::DIST_MONITOR
        | DistributionFlags::DIST_MONITOR_NAME
        | DistributionFlags::ALIAS
        | DistributionFlags::SPAWN
        | DistributionFlags::UNLINK_ID;
    node
}

struct TheirEnd {
    sender: Sender<Shared>,
    receiver: Receiver<Shared>,
    next: u32,
}

impl TheirEnd {
    fn new(stream: Shared) -> Self {
        let (sender, receiver) = channel(stream, DistributionFlags::new());
        Self {
            sender,
            receiver,
            next: 0,
        }
    }

    fn pid(&mut self) -> Pid {
        self.next += 1;
        Pid::new(THEIRS, self.next, 0, 22)
    }

    fn reference(&mut self) -> Reference {
        self.next += 1;
        Reference {
            node: Atom::from(THEIRS),
            id: vec![self.next, 0, 0],
            creation: 22,
        }
    }

    async fn send(&mut self, message: Theirs) {
        soon(self.sender.send(message)).await.unwrap();
    }

    /// The next message that is no tick.
    async fn recv(&mut self) -> Theirs {
        loop {
            match soon(self.receiver.recv()).await.unwrap() {
                Theirs::Tick => {}
                message => return message,
            }
        }
    }
}

async fn scene() -> (Epmd, Node) {
    let epmd = Epmd::start().await;
    let node = epmd.node("ours@127.0.0.1").await;
    node.serve("echo", |request: Term| async move {
        Term::tuple([Term::atom("echo"), request])
    })
    .unwrap();
    (epmd, node)
}

fn their_pid(pid: &meshx_etf::Pid) -> Pid {
    Pid::new(pid.node.as_str(), pid.id, pid.serial, pid.creation)
}

#[tokio::test(flavor = "multi_thread")]
async fn they_dial() {
    let (epmd, node) = scene().await;
    let stream = TcpStream::connect(("127.0.0.1", epmd.port_of("ours")))
        .await
        .unwrap();
    let mut handshake = ClientSideHandshake::new(Shared::new(stream), their_node(), COOKIE);
    soon(handshake.execute_send_name(LOWEST_DISTRIBUTION_PROTOCOL_VERSION))
        .await
        .unwrap();
    let (stream, peer) = soon(handshake.execute_rest(true)).await.unwrap();
    assert_eq!(peer.name.to_string(), "ours@127.0.0.1");
    everything(&node, TheirEnd::new(stream)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn we_dial() {
    let (epmd, node) = scene().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    epmd.add("theirs", listener.local_addr().unwrap().port());
    let accepting = async {
        let (stream, _) = listener.accept().await.unwrap();
        let mut handshake = ServerSideHandshake::new(Shared::new(stream), their_node(), COOKIE);
        handshake.execute_recv_name().await.unwrap();
        handshake.execute_rest(HandshakeStatus::Ok).await.unwrap().0
    };
    let (connected, stream) = soon(async { tokio::join!(node.connect(THEIRS), accepting) }).await;
    connected.unwrap();
    everything(&node, TheirEnd::new(stream)).await;
}

/// Messages, calls, monitors, links and exits, both ways.
async fn everything(node: &Node, mut theirs: TheirEnd) {
    assert_eq!(node.nodes(), [THEIRS]);
    let mut mailbox = node.register("inbox").unwrap();
    messages(node, &mut theirs, &mut mailbox).await;
    calls(node, &mut theirs).await;
    they_watch(node, &mut theirs).await;
    we_watch(&mut theirs, &mut mailbox).await;
    let mut events = node.events();
    drop(theirs);
    loop {
        if let meshx::node::NodeEvent::Down { node, .. } = soon(events.recv()).await.unwrap() {
            assert_eq!(node, THEIRS);
            return;
        }
    }
}

async fn messages(node: &Node, theirs: &mut TheirEnd, mailbox: &mut Mailbox) {
    let from = theirs.pid();
    let big = TheirTerm::from(List::from(vec![
        TheirTerm::from(FixInteger::from(70_000));
        50_000
    ]));
    for (i, payload) in [TheirTerm::from(Atom::from("hello")), big]
        .into_iter()
        .enumerate()
    {
        theirs
            .send(Theirs::reg_send(
                from.clone(),
                Atom::from("inbox"),
                payload.clone(),
            ))
            .await;
        theirs
            .send(Theirs::send_sender(
                from.clone(),
                their_pid(mailbox.pid()),
                payload,
            ))
            .await;
        for _ in 0..2 {
            let Some(Message::Term {
                from: Some(sender),
                term,
            }) = soon(mailbox.recv()).await
            else {
                panic!("no message")
            };
            assert_eq!((sender.node.as_str(), sender.id), (THEIRS, from.id));
            match i {
                0 => assert_eq!(term, Term::atom("hello")),
                _ => assert_eq!(term, Term::list(vec![Term::Int(70_000); 50_000])),
            }
        }
    }
    // As one frame, since that crate knows no fragments.
    let to = meshx_etf::Pid {
        node: THEIRS.into(),
        id: 7,
        serial: 0,
        creation: 22,
    };
    mailbox.send(&to, &Term::binary(vec![5; 300_000])).await.unwrap();
    let message = match theirs.recv().await {
        Theirs::Send(it) => it.message,
        Theirs::SendSender(it) => it.message,
        other => panic!("{other:?}"),
    };
    let TheirTerm::Binary(binary) = message else {
        panic!("{message:?}")
    };
    assert_eq!(binary.bytes, vec![5; 300_000]);
    node.send(("their_name", THEIRS), &Term::Int(-3)).await.unwrap();
    let Theirs::RegSend(it) = theirs.recv().await else {
        panic!("no REG_SEND")
    };
    assert_eq!(
        (it.to_name.name.as_str(), it.message),
        ("their_name", FixInteger::from(-3).into())
    );
}

async fn calls(node: &Node, theirs: &mut TheirEnd) {
    // They call a server here.
    let (from, tag) = (theirs.pid(), theirs.reference());
    let caller = Tuple::from(vec![from.clone().into(), tag.clone().into()]);
    let call = Tuple::from(vec![
        Atom::from("$gen_call").into(),
        caller.into(),
        Atom::from("req").into(),
    ]);
    theirs
        .send(Theirs::reg_send(from, Atom::from("echo"), call.into()))
        .await;
    let answer = match theirs.recv().await {
        Theirs::Send(it) => it.message,
        Theirs::SendSender(it) => it.message,
        other => panic!("{other:?}"),
    };
    let echo = Tuple::from(vec![Atom::from("echo").into(), Atom::from("req").into()]);
    assert_eq!(answer, Tuple::from(vec![tag.into(), echo.into()]).into());
    // A server there is called from here: a monitor, the request, the answer, and the monitor is taken back.
    let calling = node.gen_call(("server", THEIRS), Term::Int(20), LONG);
    let serving = async {
        let Theirs::MonitorP(monitor) = theirs.recv().await else {
            panic!("no MONITOR_P")
        };
        assert_eq!(monitor.to_proc, PidOrAtom::Atom(Atom::from("server")));
        let Theirs::RegSend(request) = theirs.recv().await else {
            panic!("no REG_SEND")
        };
        let TheirTerm::Tuple(request) = request.message else {
            panic!("no request")
        };
        let [_, TheirTerm::Tuple(caller), TheirTerm::FixInteger(number)] = &request.elements[..] else {
            panic!("{request:?}")
        };
        let [TheirTerm::Pid(pid), tag] = &caller.elements[..] else {
            panic!("{caller:?}")
        };
        let answer = Tuple::from(vec![tag.clone(), FixInteger::from(number.value + 1).into()]);
        let from = theirs.pid();
        let to = pid.clone();
        theirs.send(Theirs::send_sender(from, to, answer.into())).await;
        let Theirs::DemonitorP(taken_back) = theirs.recv().await else {
            panic!("no DEMONITOR_P")
        };
        assert_eq!(taken_back.reference, monitor.reference);
    };
    let (answer, ()) = soon(async { tokio::join!(calling, serving) }).await;
    assert_eq!(answer.unwrap(), Term::Int(21));
}

async fn they_watch(node: &Node, theirs: &mut TheirEnd) {
    let watched = node.register("watched").unwrap();
    let (from, reference) = (theirs.pid(), theirs.reference());
    theirs
        .send(Theirs::monitor_p(
            from.clone(),
            PidOrAtom::Atom(Atom::from("watched")),
            reference.clone(),
        ))
        .await;
    theirs
        .send(Theirs::link(from.clone(), their_pid(watched.pid())))
        .await;
    let absent = theirs.reference();
    theirs
        .send(Theirs::monitor_p(
            from.clone(),
            PidOrAtom::Atom(Atom::from("absent")),
            absent.clone(),
        ))
        .await;
    let Theirs::MonitorPExit(down) = theirs.recv().await else {
        panic!("no MONITOR_P_EXIT")
    };
    assert_eq!(
        (down.reference, down.reason),
        (absent, Atom::from("noproc").into())
    );
    let pid = their_pid(watched.pid());
    watched.close(Term::atom("done"));
    let mut seen = (0, 0);
    for _ in 0..2 {
        match theirs.recv().await {
            Theirs::Exit(exit) => {
                assert_eq!((&exit.from_pid, &exit.to_pid), (&pid, &from));
                assert_eq!(exit.reason, Atom::from("done").into());
                seen.0 += 1;
            }
            Theirs::MonitorPExit(down) => {
                assert_eq!(
                    (&down.reference, down.reason),
                    (&reference, Atom::from("done").into())
                );
                seen.1 += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(seen, (1, 1));
}

async fn we_watch(theirs: &mut TheirEnd, mailbox: &mut Mailbox) {
    let pid = theirs.pid();
    let target = meshx_etf::Pid {
        node: THEIRS.into(),
        id: pid.id,
        serial: 0,
        creation: 22,
    };
    let reference = mailbox.monitor(target.clone()).await;
    mailbox.link(&target).await;
    let Theirs::MonitorP(monitor) = theirs.recv().await else {
        panic!("no MONITOR_P")
    };
    assert_eq!(monitor.to_proc, PidOrAtom::Pid(pid.clone()));
    let Theirs::Link(link) = theirs.recv().await else {
        panic!("no LINK")
    };
    let us = link.from_pid.clone();
    theirs
        .send(Theirs::exit(pid.clone(), us.clone(), Atom::from("boom").into()))
        .await;
    let gone = Atom::from("gone").into();
    theirs
        .send(Theirs::monitor_p_exit(
            PidOrAtom::Pid(pid.clone()),
            us.clone(),
            monitor.reference,
            gone,
        ))
        .await;
    assert_eq!(
        soon(mailbox.recv()).await,
        Some(Message::Exit {
            from: target.clone(),
            reason: Term::atom("boom")
        })
    );
    let Some(Message::Down {
        reference: down,
        reason,
        ..
    }) = soon(mailbox.recv()).await
    else {
        panic!("no DOWN")
    };
    assert_eq!((down, reason), (reference, Term::atom("gone")));
    // exit/2 both ways, and a link given up.
    mailbox.exit(&target, &Term::atom("stop")).await.unwrap();
    let Theirs::Exit2(exit) = theirs.recv().await else {
        panic!("no EXIT2")
    };
    assert_eq!(
        (exit.to_pid, exit.reason),
        (pid.clone(), Atom::from("stop").into())
    );
    theirs
        .send(Theirs::exit2(pid.clone(), us, Atom::from("hey").into()))
        .await;
    assert_eq!(
        soon(mailbox.recv()).await,
        Some(Message::Exit {
            from: target.clone(),
            reason: Term::atom("hey")
        })
    );
    mailbox.link(&target).await;
    mailbox.unlink(&target);
    assert!(matches!(theirs.recv().await, Theirs::Link(_)));
    let Theirs::UnlinkId(unlink) = theirs.recv().await else {
        panic!("no UNLINK_ID")
    };
    theirs
        .send(Theirs::unlink_id_ack(unlink.id, pid, unlink.from_pid))
        .await;
}
