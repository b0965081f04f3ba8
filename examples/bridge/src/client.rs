//! One TCP client: its requests one after the other, and the events that it asked for.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use meshx::node::Node;
use meshx_etf::{Term, from_term, to_term};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedWriteHalf;
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::time::timeout;

use crate::route::Route;

/// Longest line of a client, in bytes.
const LINE_MAX: usize = 64 << 10;
/// Topics that one client may subscribe to.
const TOPICS_MAX: usize = 64;
/// How long a server has to answer.
const ANSWER_TIME: Duration = Duration::from_secs(5);
/// How long a client may take no bytes.
const WRITE_TIME: Duration = Duration::from_secs(10);

/// Something that a BEAM published.
#[derive(Debug, Clone)]
pub(crate) struct Event {
    pub(crate) topic: String,
    pub(crate) data: Value,
}

/// A client's line.
#[derive(Debug, Deserialize)]
#[serde(untagged, deny_unknown_fields)]
enum Line {
    Ask {
        /// Comes back with the answer.
        #[serde(default)]
        id: Value,
        #[serde(rename = "do")]
        name: String,
        #[serde(default)]
        with: Value,
    },
    Subscribe {
        subscribe: String,
    },
}

/// Until the client closes, breaks off, or takes nothing.
pub(crate) async fn serve(
    stream: TcpStream,
    node: Node,
    routes: Arc<[Route]>,
    mut events: broadcast::Receiver<Event>,
) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    let (mut topics, mut line) = (HashSet::new(), Vec::new());
    loop {
        let answer = tokio::select! {
            // What was read of a line stays in `line` when an event comes first.
            read = read_line(&mut reader, &mut line) => match read? {
                false => return Ok(()),
                true => {
                    let answer = take(&node, &routes, &mut topics, &line).await;
                    line.clear();
                    answer
                }
            },
            event = events.recv() => match event {
                Ok(event) if topics.contains(&event.topic) => {
                    json!({"topic": event.topic, "data": event.data})
                }
                Ok(_) => continue,
                // The client was slow: the oldest events are gone, and it is told.
                Err(RecvError::Lagged(lost)) => json!({ "lost": lost }),
                Err(RecvError::Closed) => return Ok(()),
            },
        };
        write(&mut writer, &answer).await?;
    }
}

/// Goes on with a line; false at the end of the stream.
async fn read_line(reader: &mut (impl AsyncBufRead + Unpin), line: &mut Vec<u8>) -> io::Result<bool> {
    let room = (LINE_MAX + 1).saturating_sub(line.len()) as u64;
    reader.take(room).read_until(b'\n', line).await?;
    if line.len() > LINE_MAX {
        return Err(io::Error::other(format!("a line of more than {LINE_MAX} bytes")));
    }
    Ok(line.ends_with(b"\n"))
}

async fn take(node: &Node, routes: &[Route], topics: &mut HashSet<String>, line: &[u8]) -> Value {
    match serde_json::from_slice(line) {
        Ok(Line::Ask { id, name, with }) => match ask(node, routes, &name, &with).await {
            Ok(answer) => json!({"id": id, "ok": answer}),
            Err(error) => json!({"id": id, "error": error}),
        },
        Ok(Line::Subscribe { .. }) if topics.len() >= TOPICS_MAX => {
            json!({ "error": format!("{TOPICS_MAX} topics, no more are taken") })
        }
        Ok(Line::Subscribe { subscribe }) => {
            let answer = json!({ "subscribed": subscribe });
            topics.insert(subscribe);
            answer
        }
        Err(_) => json!({"error": "wanted {\"do\": NAME, \"with\": ...} or {\"subscribe\": TOPIC}"}),
    }
}

/// `gen_server:call({Process, Node}, {Name, Argument})`.
async fn ask(node: &Node, routes: &[Route], name: &str, with: &Value) -> Result<Value, String> {
    let route = routes
        .iter()
        .find(|route| route.name == name)
        .ok_or_else(|| format!("there is no {name:?} here"))?;
    let argument = to_term(with).map_err(|error| error.to_string())?;
    let request = Term::tuple([Term::atom(route.name.as_str()), argument]);
    let server = (route.process.as_str(), route.node.as_str());
    let answer = node.gen_call(server, request, ANSWER_TIME).await;
    let answer = answer.map_err(|error| error.to_string())?;
    from_term(&answer).map_err(|error| format!("the answer has no form in JSON: {error}"))
}

async fn write(writer: &mut OwnedWriteHalf, line: &Value) -> io::Result<()> {
    let line = format!("{line}\n");
    timeout(WRITE_TIME, writer.write_all(line.as_bytes()))
        .await
        .unwrap_or_else(|_| Err(io::Error::other(format!("took nothing for {WRITE_TIME:?}"))))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test]
    async fn lines_come_in_pieces_and_have_an_end() {
        let (mut far, near) = tokio::io::duplex(1 << 20);
        let mut near = BufReader::new(near);
        let mut line = Vec::new();
        far.write_all(b"{\"a\"").await.unwrap();
        // An event came: what was read so far is kept.
        let waiting = timeout(Duration::from_millis(50), read_line(&mut near, &mut line)).await;
        assert!(waiting.is_err());
        far.write_all(b":1}\n").await.unwrap();
        assert!(read_line(&mut near, &mut line).await.unwrap());
        assert_eq!(line, b"{\"a\":1}\n");
        line.clear();
        far.write_all(&vec![b'x'; LINE_MAX + 1]).await.unwrap();
        assert!(read_line(&mut near, &mut line).await.is_err());
    }

    #[test]
    fn a_line_asks_or_subscribes() {
        let line = |text: &str| serde_json::from_str::<Line>(text);
        assert!(matches!(
            line(r#"{"id":1,"do":"find","with":"x"}"#),
            Ok(Line::Ask { .. })
        ));
        assert!(matches!(line(r#"{"subscribe":"x"}"#), Ok(Line::Subscribe { .. })));
        for bad in ["", "1", "{}", r#"{"do":1}"#, r#"{"do":"x","other":1}"#] {
            assert!(line(bad).is_err(), "{bad}");
        }
    }
}
