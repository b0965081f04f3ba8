//! `meshx names`.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use meshx_dist::epmd::{MAX_NAMES_RESP, NamesResp, Request, decode_names_resp};
use meshx_etf::Term;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::caller::RoadArgs;
use super::{EX_SOFTWARE, EX_UNAVAILABLE, Failure, block_on, connect, print, table};
use crate::agent::control::message::map;

/// An EPMD on this host answers in no time.
const EPMD_TIME: Duration = Duration::from_secs(5);

/// List the nodes of the mesh, or of an EPMD
#[derive(Debug, clap::Args)]
pub(super) struct NamesArgs {
    #[command(flatten)]
    road: RoadArgs,
    /// Print a JSON array with one object per node
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &NamesArgs) -> Result<ExitCode, Failure> {
    match args.road.epmd() {
        Some(epmd) => {
            args.road.check_epmd()?;
            let names = block_on(epmd_names(epmd))?;
            let mut rows: Vec<[String; 2]> = names
                .nodes
                .iter()
                .map(|(name, port)| [String::from_utf8_lossy(name).into_owned(), port.to_string()])
                .collect();
            rows.sort();
            show(args.json, ["NAME", "PORT"], &rows)
        }
        None => show(
            args.json,
            ["NODE", "SERVICE", "AGENT", "PLACE"],
            &mesh_names(args)?,
        ),
    }
}

fn show<const N: usize>(json: bool, head: [&str; N], rows: &[[String; N]]) -> Result<ExitCode, Failure> {
    if json {
        let object = |row: &[String; N]| -> Value {
            let members = head.iter().zip(row);
            members
                .map(|(key, value)| (key.to_lowercase(), json!(value)))
                .collect()
        };
        let all: Vec<Value> = rows.iter().map(object).collect();
        print(&format!("{}\n", Value::Array(all)))?;
    } else {
        print(&table(head, rows))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn mesh_names(args: &NamesArgs) -> Result<Vec<[String; 4]>, Failure> {
    let answer = block_on(async {
        let client = connect(args.road.agent_dir()).await?;
        Ok(client.request("names", map([])).await?)
    })?;
    let nodes = answer.map_get("nodes").and_then(Term::as_list);
    let nodes = nodes.ok_or_else(|| Failure::new(EX_SOFTWARE, "the agent's answer has no nodes"))?;
    let mut rows: Vec<[String; 4]> = nodes
        .iter()
        .map(|node| {
            let text = |key| {
                node.map_get(key)
                    .and_then(Term::as_str)
                    .unwrap_or_default()
                    .to_owned()
            };
            let local = node.map_get("local").and_then(Term::as_bool) == Some(true);
            let place = if local { "local" } else { "remote" };
            [text("node"), text("service"), text("agent"), place.to_owned()]
        })
        .collect();
    rows.sort();
    Ok(rows)
}

async fn epmd_names(epmd: SocketAddr) -> Result<NamesResp, Failure> {
    let unavailable =
        |error: &dyn std::fmt::Display| Failure::new(EX_UNAVAILABLE, format!("epmd at {epmd}: {error}"));
    let mut request = Vec::new();
    Request::Names
        .encode(&mut request)
        .map_err(|error| unavailable(&error))?;
    let ask = async {
        let mut stream = TcpStream::connect(epmd).await?;
        stream.write_all(&request).await?;
        let mut received = Vec::new();
        stream
            .take(MAX_NAMES_RESP as u64 + 1)
            .read_to_end(&mut received)
            .await?;
        Ok::<_, std::io::Error>(received)
    };
    let received = match timeout(EPMD_TIME, ask).await {
        Ok(received) => received.map_err(|error| unavailable(&error))?,
        Err(_) => return Err(unavailable(&format!("no answer for {EPMD_TIME:?}"))),
    };
    decode_names_resp(&received)
        .map_err(|error| Failure::new(EX_SOFTWARE, format!("epmd at {epmd}: {error}")))
}
