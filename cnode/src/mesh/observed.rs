//! A mesh whose answers are counted, for metrics.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use rustls::pki_types::CertificateDer;

use super::{
    Answer, Authorization, Catalogue, Certificates, Decision, Diagnosis, Entry, Finding, Identity, Instance,
    Intentions, Kept, Listed, Mesh, MeshError, Present, Registration, ServiceName, SpiffeId, Token,
};

/// How a mesh has answered so far. Clones share the counts.
#[derive(Debug, Clone, Default)]
pub struct Answers(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    failed: AtomicU64,
    // Held for a look or a change, never across an await.
    last: Mutex<Option<Instant>>,
}

impl Answers {
    /// Questions that were not answered, or not before the asker gave up.
    pub fn failed(&self) -> u64 {
        self.0.failed.load(Ordering::Relaxed)
    }

    /// How long ago the last answer came; none before the first. What a mesh may answer out of its memory does not
    /// count: certificates, rules for a pair and where an instance is.
    pub fn age(&self) -> Option<Duration> {
        let last = *self.0.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.map(|last| last.elapsed())
    }

    /// The mesh was away, or could not be understood. A no is an answer.
    fn note_failure<T>(&self, answer: &Result<T, MeshError>) -> bool {
        let failed = matches!(answer, Err(MeshError::Unavailable(_)));
        if failed {
            self.0.failed.fetch_add(1, Ordering::Relaxed);
        }
        failed
    }

    fn note<T>(&self, answer: &Result<T, MeshError>) {
        if !self.note_failure(answer) {
            let mut last = self.0.last.lock().unwrap_or_else(PoisonError::into_inner);
            *last = Some(Instant::now());
        }
    }
}

/// Counts a question as failed unless it is answered.
struct Asked<'a>(Option<&'a Answers>);

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        if let Some(answers) = self.0 {
            answers.0.failed.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Another mesh, and [`Answers`] beside it.
pub struct Observed {
    mesh: Arc<dyn Mesh>,
    answers: Answers,
}

impl Observed {
    /// Counts what `mesh` answers from now on.
    pub fn new(mesh: Arc<dyn Mesh>) -> Self {
        Self {
            mesh,
            answers: Answers::default(),
        }
    }

    /// The counts.
    pub fn answers(&self) -> Answers {
        self.answers.clone()
    }

    /// A question that is answered at once, or not at all.
    fn ask<'a, T: Send + 'a>(&'a self, answer: Answer<'a, T>) -> Answer<'a, T> {
        Box::pin(async move {
            let mut asked = Asked(Some(&self.answers));
            let answer = answer.await;
            asked.0 = None;
            self.answers.note(&answer);
            answer
        })
    }

    /// A question that the mesh may answer out of its memory.
    fn recall<'a, T: Send + 'a>(&'a self, answer: Answer<'a, T>) -> Answer<'a, T> {
        Box::pin(async move {
            let mut asked = Asked(Some(&self.answers));
            let answer = answer.await;
            asked.0 = None;
            self.answers.note_failure(&answer);
            answer
        })
    }

    /// One that may wait for ever: who gives it up has not waited in vain.
    fn wait<'a, T: Send + 'a>(&'a self, answer: Answer<'a, T>) -> Answer<'a, T> {
        Box::pin(async move {
            let answer = answer.await;
            self.answers.note_failure(&answer);
            answer
        })
    }
}

impl Certificates for Observed {
    fn identity(&self, service: &ServiceName) -> Answer<'_, Arc<Identity>> {
        self.recall(self.mesh.identity(service))
    }

    fn spiffe(&self, service: &ServiceName) -> Result<SpiffeId, MeshError> {
        self.mesh.spiffe(service)
    }

    fn roots(&self) -> Answer<'_, Vec<CertificateDer<'static>>> {
        self.recall(self.mesh.roots())
    }

    fn present_token(&self, service: &ServiceName, token: Token) -> Answer<'_, ()> {
        self.mesh.present_token(service, token)
    }
}

impl Catalogue for Observed {
    fn node(&self, node: &str) -> Answer<'_, Option<Instance>> {
        self.recall(self.mesh.node(node))
    }

    fn instances(&self, service: &ServiceName) -> Answer<'_, Vec<Instance>> {
        self.recall(self.mesh.instances(service))
    }

    fn weights(&self, service: &ServiceName) -> HashMap<String, u32> {
        self.mesh.weights(service)
    }

    fn present(&self, service: &ServiceName) -> Answer<'_, Present> {
        self.recall(self.mesh.present(service))
    }

    fn nodes(&self) -> Answer<'_, Vec<Instance>> {
        self.ask(self.mesh.nodes())
    }

    fn node_services(&self) -> Answer<'_, Vec<ServiceName>> {
        self.ask(self.mesh.node_services())
    }

    fn services(&self) -> Answer<'_, Vec<Listed>> {
        self.ask(self.mesh.services())
    }
}

impl Authorization for Observed {
    fn authorize(&self, source: &SpiffeId, target: &ServiceName) -> Answer<'_, Decision> {
        self.recall(self.mesh.authorize(source, target))
    }

    fn changed(&self) -> Answer<'_, ()> {
        self.wait(self.mesh.changed())
    }

    fn intentions(&self) -> Answer<'_, Intentions> {
        self.ask(self.mesh.intentions())
    }

    fn fix(&self, source: &ServiceName, target: &ServiceName) -> String {
        self.mesh.fix(source, target)
    }
}

impl Registration for Observed {
    fn register(&self, entry: &Entry) -> Answer<'_, ()> {
        self.ask(self.mesh.register(entry))
    }

    fn adopted(&self, id: &str) -> Option<SocketAddr> {
        self.mesh.adopted(id)
    }

    fn deregister(&self, id: &str) -> Answer<'_, ()> {
        self.ask(self.mesh.deregister(id))
    }

    fn set_critical(&self, id: &str, reason: Option<&str>) -> Answer<'_, ()> {
        self.ask(self.mesh.set_critical(id, reason))
    }

    fn passing(&self, id: &str) -> Answer<'_, ()> {
        self.wait(self.mesh.passing(id))
    }

    fn entry_lock(&self) -> io::Result<Option<OwnedFd>> {
        self.mesh.entry_lock()
    }

    fn hand_over(&self) {
        self.mesh.hand_over();
    }

    fn take_over(&self, kept: Vec<Kept>) -> Answer<'_, ()> {
        self.ask(self.mesh.take_over(kept))
    }
}

impl Diagnosis for Observed {
    fn findings(&self) -> BoxFuture<'_, Vec<Finding>> {
        self.mesh.findings()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::mesh::embedded::EmbeddedMesh;

    #[tokio::test]
    async fn answers_and_failures_are_counted_and_a_no_is_an_answer() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("mesh");
        let address = "127.0.0.1:1".parse().unwrap();
        let mesh = EmbeddedMesh::open(&dir, "a", vec!["h1".into()], address).unwrap();
        let mesh = Observed::new(Arc::new(mesh));
        let answers = mesh.answers();
        assert_eq!((answers.failed(), answers.age()), (0, None));
        // It might be remembered.
        mesh.identity(&ServiceName::new("shop").unwrap()).await.unwrap();
        mesh.node("shop@h1").await.unwrap();
        assert_eq!(answers.age(), None);
        mesh.nodes().await.unwrap();
        assert!(answers.age().unwrap() < Duration::from_secs(60));
        assert_eq!(answers.failed(), 0);

        std::fs::write(dir.join("rules.json"), "{").unwrap();
        mesh.intentions().await.unwrap_err();
        assert_eq!(answers.failed(), 1);
        // Who gives up counts as not answered, unless there was nothing to answer yet.
        drop(mesh.nodes());
        let mut question = mesh.ask::<()>(Box::pin(std::future::pending()));
        assert!(futures::poll!(&mut question).is_pending());
        drop(question);
        assert_eq!(answers.failed(), 2);
        mesh.changed().await.unwrap();
        let mut change = mesh.changed();
        _ = futures::poll!(&mut change);
        drop(change);
        assert_eq!(answers.failed(), 2);

        let refused = Err::<(), _>(MeshError::Refused("no".into()));
        let fresh = Answers::default();
        fresh.note(&refused);
        assert!(fresh.age().is_some() && fresh.failed() == 0);
    }
}
