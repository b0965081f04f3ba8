//! A process that was taken over: it holds its links under the rules until the last has ended, and stands at the
//! orders of whoever serves.

use std::{path::PathBuf, sync::Arc, time::Duration};

use tokio::{
    io::AsyncWriteExt,
    net::UnixStream,
    sync::mpsc,
    time::{Instant, MissedTickBehavior, interval, sleep, timeout},
};
use tracing::{debug, info};

use super::{
    Meeting,
    message::{Order, Report, Role, ShownLink},
    wire::{MESSAGE_MAX, MESSAGE_TIME},
};
use crate::{
    agent::control::{
        commands::Client,
        frame::{frame, read_frame},
    },
    proxy::{
        Proxy,
        links::{CutEvent, LinkTable},
    },
};

/// Pause before whoever serves is looked for again.
const RETRY: Duration = Duration::from_millis(200);
/// How often the number of links is told.
const COUNT_EVERY: Duration = Duration::from_secs(1);
/// Links in one message: it stays well below [`MESSAGE_MAX`].
const LINKS_AT_ONCE: usize = 256;
/// Cut events that may wait while nobody serves; a link is closed all the same.
const CUTS_MAX: usize = 1024;

/// What is left of a process that was taken over.
pub(in crate::agent) struct Follower {
    pub(in crate::agent) socket: PathBuf,
    pub(in crate::agent) proxy: Arc<Proxy>,
    pub(in crate::agent) links: LinkTable,
    /// Its former clients, for the links of their upstreams.
    pub(in crate::agent) clients: Vec<Arc<Client>>,
    pub(in crate::agent) cuts: mpsc::Receiver<(u64, CutEvent)>,
}

impl Follower {
    /// Until dropped.
    pub(in crate::agent) async fn follow(mut self) {
        loop {
            match super::meet(&self.socket, Role::Predecessor).await {
                Ok(Some(Meeting { channel, welcome })) => {
                    info!(
                        program = welcome.program,
                        "told the successor of the links that are left"
                    );
                    let began = Instant::now();
                    self.obey(channel.stream).await;
                    // Whoever served was taken over, too: the next one listens already.
                    if began.elapsed() > RETRY {
                        continue;
                    }
                }
                Ok(None) => {}
                Err(error) => debug!(%error, "whoever serves does not talk"),
            }
            sleep(RETRY).await;
        }
    }

    async fn obey(&mut self, stream: UnixStream) {
        let (mut reader, mut writer) = stream.into_split();
        let (orders, mut given) = mpsc::channel(1);
        // Reading a frame cannot be given up half way.
        let hearing = async move {
            while let Ok(Some(bytes)) = read_frame(&mut reader, MESSAGE_MAX).await {
                match serde_json::from_slice::<Order>(&bytes) {
                    Ok(order) => {
                        if orders.send(order).await.is_err() {
                            return;
                        }
                    }
                    // Of a later release.
                    Err(error) => debug!(%error, "an order is not understood"),
                }
            }
        };
        let doing = async {
            let mut count = interval(COUNT_EVERY);
            count.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                let reports = tokio::select! {
                    Some(order) = given.recv() => self.carry_out(order).await,
                    Some((owner, event)) = self.cuts.recv() => vec![Report::Cut { owner, event }],
                    _ = count.tick() => vec![Report::Holding { links: self.links.snapshot().len() }],
                    else => return,
                };
                for report in reports {
                    let Ok(bytes) = frame(|bytes| serde_json::to_writer(bytes, &report)) else {
                        continue;
                    };
                    if !matches!(timeout(MESSAGE_TIME, writer.write_all(&bytes)).await, Ok(Ok(()))) {
                        return;
                    }
                }
            }
        };
        tokio::select! {
            () = hearing => {}
            () = doing => {}
        }
    }

    async fn carry_out(&self, order: Order) -> Vec<Report> {
        match order {
            Order::Cut { link, cause, text } => {
                self.links.cut(link, cause, &text);
            }
            Order::CutInstance { id, cause, text } => {
                self.links.cut_instance(&id, cause, &text);
            }
            Order::CloseUpstream { owner, id } => {
                for client in self.clients.iter().filter(|client| client.owner.id == owner) {
                    client.upstreams.close(&id, true);
                }
            }
            Order::ClientGone { owner } => {
                for client in self.clients.iter().filter(|client| client.owner.id == owner) {
                    client.upstreams.close_all();
                }
            }
            Order::Prove(forwarded) => {
                let answer = self.proxy.reprove_forwarded(forwarded).await;
                return vec![Report::Proven { answer }];
            }
            Order::Links => {
                let links = self.links.snapshot().into_iter().map(ShownLink::from);
                let links: Vec<_> = links.collect();
                let mut reports: Vec<_> = links
                    .chunks(LINKS_AT_ONCE)
                    .map(|links| Report::Links {
                        links: links.to_vec(),
                        last: false,
                    })
                    .collect();
                reports.push(Report::Links {
                    links: Vec::new(),
                    last: true,
                });
                return reports;
            }
        }
        Vec::new()
    }
}

/// The cut events of all of these, each with its client's id.
pub(in crate::agent) fn merge(
    events: Vec<(u64, mpsc::Receiver<CutEvent>)>,
) -> mpsc::Receiver<(u64, CutEvent)> {
    let (sender, receiver) = mpsc::channel(CUTS_MAX);
    for (owner, mut cuts) in events {
        let sender = sender.clone();
        tokio::spawn(async move {
            while let Some(cut) = cuts.recv().await {
                if sender.send((owner, cut)).await.is_err() {
                    return;
                }
            }
        });
    }
    receiver
}
