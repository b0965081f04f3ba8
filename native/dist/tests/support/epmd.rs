//! A tiny EPMD on a port of its own.

use std::collections::HashMap;
use std::sync::Arc;

use meshx_dist::epmd::{
    Alive2Resp, EpmdError, Node, NodeType, Port2Resp, Request, decode_port2_resp, encode_names_resp,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// The creation that every node gets.
pub const CREATION: u32 = 0x6500_0007;

type Nodes = HashMap<Vec<u8>, Node>;

/// Serves until it is dropped with its runtime.
pub struct Epmd {
    pub port: u16,
    nodes: Arc<watch::Sender<Nodes>>,
}

impl Epmd {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let nodes = Arc::new(watch::Sender::new(Nodes::new()));
        let served = nodes.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, port, served.clone()));
            }
        });
        Self { port, nodes }
    }

    pub fn register(&self, name: &str, port: u16) {
        let node = Node::new(name, port, NodeType::Hidden);
        self.nodes
            .send_modify(|nodes| drop(nodes.insert(node.name.clone(), node)));
    }

    /// Waits until a node of this name has registered.
    pub async fn registered(&self, name: &str) -> Node {
        let mut nodes = self.nodes.subscribe();
        let nodes = super::soon(name, nodes.wait_for(|nodes| nodes.contains_key(name.as_bytes())))
            .await
            .unwrap();
        nodes[name.as_bytes()].clone()
    }

    /// Waits until no node of this name is registered.
    pub async fn unregistered(&self, name: &str) {
        let mut nodes = self.nodes.subscribe();
        super::soon(name, nodes.wait_for(|nodes| !nodes.contains_key(name.as_bytes())))
            .await
            .unwrap();
    }
}

async fn serve(mut stream: TcpStream, epmd_port: u16, nodes: Arc<watch::Sender<Nodes>>) {
    let mut received = Vec::new();
    let request = loop {
        match Request::decode(&received) {
            Ok(Some(request)) => break request,
            Ok(None) if stream.read_buf(&mut received).await.unwrap_or(0) > 0 => {}
            _ => return,
        }
    };
    let mut out = Vec::new();
    let mut registered = None;
    match request {
        Request::Alive2(node) => {
            Alive2Resp::Creation32 {
                result: 0,
                creation: CREATION,
            }
            .encode(&mut out);
            registered = Some(node);
        }
        Request::PortPlease2(name) => {
            let found = nodes.borrow().get(&name).cloned();
            found
                .map_or(Port2Resp::NotFound(1), Port2Resp::Found)
                .encode(&mut out)
                .unwrap();
        }
        Request::Names => {
            let nodes = nodes.borrow();
            let list = nodes.values().map(|node| (&node.name[..], node.port));
            encode_names_resp(u32::from(epmd_port), list, &mut out).unwrap();
        }
        Request::Dump | Request::Kill | Request::Stop(_) => {}
    }
    let answered = stream.write_all(&out).await;
    if let (Some(node), Ok(())) = (registered, answered) {
        let name = node.name.clone();
        nodes.send_modify(|nodes| drop(nodes.insert(name.clone(), node)));
        // Until the node closes; it sends nothing more.
        let _ = stream.read(&mut [0]).await;
        nodes.send_modify(|nodes| drop(nodes.remove(&name)));
    }
}

/// Asks an EPMD for a node.
pub async fn ask(port: u16, name: &str) -> Result<Option<Node>, EpmdError> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let mut out = Vec::new();
    Request::PortPlease2(name.into()).encode(&mut out)?;
    stream.write_all(&out).await.unwrap();
    let mut received = Vec::new();
    stream.read_to_end(&mut received).await.unwrap();
    Ok(match decode_port2_resp(&received)?.unwrap() {
        Port2Resp::Found(node) => Some(node),
        Port2Resp::NotFound(_) => None,
    })
}
