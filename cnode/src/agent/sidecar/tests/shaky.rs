//! A mesh whose answers a test can change, and what a sidecar makes of them.

use futures::future::{BoxFuture, ready};
use rustls::pki_types::CertificateDer;
use tokio::time::Instant;

use super::{
    super::view::{Sources, View, Viewer},
    *,
};
use crate::mesh::{
    Authorization, Catalogue, Decision, Diagnosis, Finding, Identity, Intentions, Listed, SpiffeId,
};

/// What it answers instead of the embedded mesh.
#[derive(Default)]
pub(super) struct Answers {
    pub(super) roots: Option<Vec<CertificateDer<'static>>>,
    pub(super) identity: HashMap<ServiceName, Arc<Identity>>,
    /// No answers about instances, rules and pairs.
    pub(super) away: bool,
    /// A token that may not list the rules.
    pub(super) no_rules: bool,
    /// Pairs that were asked about.
    pub(super) asked: usize,
}

pub(super) struct Shaky {
    mesh: Arc<EmbeddedMesh>,
    answers: Mutex<Answers>,
}

impl Shaky {
    pub(super) fn new(world: &World) -> Arc<Self> {
        Arc::new(Self {
            mesh: world.mesh.clone(),
            answers: Mutex::default(),
        })
    }

    pub(super) fn answers(&self) -> std::sync::MutexGuard<'_, Answers> {
        self.answers.lock().unwrap()
    }

    fn unless_away<'a, T: Send + 'a>(&'a self, answer: Answer<'a, T>) -> Answer<'a, T> {
        match self.answers().away {
            true => Box::pin(ready(Err(MeshError::Unavailable("away".into())))),
            false => answer,
        }
    }
}

impl Certificates for Shaky {
    fn identity(&self, service: &ServiceName) -> Answer<'_, Arc<Identity>> {
        match self.answers().identity.get(service) {
            Some(identity) => Box::pin(ready(Ok(identity.clone()))),
            None => self.mesh.identity(service),
        }
    }

    fn spiffe(&self, service: &ServiceName) -> Result<SpiffeId, MeshError> {
        self.mesh.spiffe(service)
    }

    fn roots(&self) -> Answer<'_, Vec<CertificateDer<'static>>> {
        match &self.answers().roots {
            Some(roots) => Box::pin(ready(Ok(roots.clone()))),
            None => self.mesh.roots(),
        }
    }

    fn present_token(&self, service: &ServiceName, token: Token) -> Answer<'_, ()> {
        self.mesh.present_token(service, token)
    }
}

impl Catalogue for Shaky {
    fn node(&self, node: &str) -> Answer<'_, Option<Instance>> {
        self.mesh.node(node)
    }

    fn instances(&self, service: &ServiceName) -> Answer<'_, Vec<Instance>> {
        self.unless_away(self.mesh.instances(service))
    }

    fn nodes(&self) -> Answer<'_, Vec<Instance>> {
        self.mesh.nodes()
    }

    fn services(&self) -> Answer<'_, Vec<Listed>> {
        self.unless_away(self.mesh.services())
    }
}

impl Authorization for Shaky {
    fn authorize(&self, source: &SpiffeId, target: &ServiceName) -> Answer<'_, Decision> {
        self.answers().asked += 1;
        self.unless_away(self.mesh.authorize(source, target))
    }

    fn changed(&self) -> Answer<'_, ()> {
        self.mesh.changed()
    }

    fn intentions(&self) -> Answer<'_, Intentions> {
        let no_rules = self.answers().no_rules;
        match no_rules {
            true => Box::pin(ready(Err(MeshError::Forbidden("intention:read".into())))),
            false => self.unless_away(self.mesh.intentions()),
        }
    }

    fn fix(&self, source: &ServiceName, target: &ServiceName) -> String {
        self.mesh.fix(source, target)
    }
}

impl Registration for Shaky {
    fn register(&self, entry: &Entry) -> Answer<'_, ()> {
        self.mesh.register(entry)
    }

    fn deregister(&self, id: &str) -> Answer<'_, ()> {
        self.mesh.deregister(id)
    }

    fn passing(&self, id: &str) -> Answer<'_, ()> {
        self.mesh.passing(id)
    }
}

impl Diagnosis for Shaky {
    fn findings(&self) -> BoxFuture<'_, Vec<Finding>> {
        self.mesh.findings()
    }
}

async fn started_with(answers: Answers) -> SidecarError {
    let world = World::new();
    let shaky = Shaky::new(&world);
    *shaky.answers() = answers;
    let sidecars = Sidecars::new(shaky, world.dir(), world.settings()).unwrap();
    let error = sidecars
        .start(script("exec sleep 600"), events().0)
        .await
        .unwrap_err();
    assert_eq!(fs::read_dir(world.dir()).unwrap().count(), 0);
    error
}

#[tokio::test]
async fn without_roots_or_with_another_services_certificate_nothing_starts() {
    let none = Answers {
        roots: Some(Vec::new()),
        ..Answers::default()
    };
    let error = started_with(none).await.to_string();
    assert!(error.contains("no root certificates"), "{error}");

    let world = World::new();
    let cart = world.mesh.identity(&service("cart")).await.unwrap();
    let wrong = Answers {
        identity: HashMap::from([(service("shop"), cart)]),
        ..Answers::default()
    };
    let error = started_with(wrong).await.to_string();
    assert!(
        error.contains("certificate of shop names spiffe://") && error.contains("svc/cart"),
        "{error}"
    );
}

fn viewer(shaky: &Arc<Shaky>) -> Viewer {
    Viewer::new(
        shaky.clone(),
        Arc::new(Sources::new(shaky.clone())),
        service("shop"),
    )
}

async fn look(viewer: &mut Viewer, now: Instant) -> View {
    let wanted = [SidecarUpstream {
        target: service("cart"),
        bind: "127.0.0.1:1".parse().unwrap(),
    }];
    viewer.look(&wanted, now).await.unwrap()
}

#[tokio::test]
async fn a_yes_holds_for_ten_minutes_while_the_mesh_is_away() {
    let world = World::new();
    for name in ["shop", "cart"] {
        world.register(name, anywhere()).await;
    }
    let shaky = Shaky::new(&world);
    let mut viewer = viewer(&shaky);
    let began = Instant::now();
    let mut seen = async |away, seconds| {
        shaky.answers().away = away;
        let view = look(&mut viewer, began + Duration::from_secs(seconds)).await;
        (view.allowed.len(), view.upstreams[0].addresses.len())
    };
    assert_eq!(seen(true, 0).await, (0, 0), "unknown is no");
    assert_eq!(seen(false, 10).await, (2, 1));
    assert_eq!(seen(true, 609).await, (2, 1));
    assert_eq!(seen(true, 610).await, (0, 1));
    assert_eq!(seen(false, 611).await, (2, 1));
}

#[tokio::test]
async fn no_more_services_are_let_in_than_a_sidecar_can_be_told_of() {
    let world = World::new();
    let rules: Vec<_> = (0..1030)
        .map(|n| serde_json::json!({"source": format!("s{n}"), "destination": "shop", "action": "allow"}))
        .collect();
    let rules = serde_json::json!({"default": "deny", "rules": rules}).to_string();
    fs::write(world.temp.path().join("mesh/rules.json"), rules).unwrap();
    let view = look(&mut viewer(&Shaky::new(&world)), Instant::now()).await;
    assert_eq!(view.allowed.len(), 1024);
}

#[tokio::test]
async fn who_may_not_see_the_rules_still_learns_who_may_connect() {
    let world = World::new();
    world.register("cart", anywhere()).await;
    let shaky = Shaky::new(&world);
    shaky.answers().no_rules = true;
    let view = look(&mut viewer(&shaky), Instant::now()).await;
    assert_eq!(view.allowed.len(), 1);
}

#[tokio::test]
async fn pairs_are_asked_about_when_something_changed_and_now_and_then() {
    let world = World::new();
    world.register("cart", anywhere()).await;
    let shaky = Shaky::new(&world);
    let mut viewer = viewer(&shaky);
    let began = Instant::now();
    let mut asked = async |seconds| {
        look(&mut viewer, began + Duration::from_secs(seconds)).await;
        std::mem::take(&mut shaky.answers().asked)
    };
    assert_eq!((asked(0).await, asked(2).await), (1, 0));
    world.register("bank", anywhere()).await;
    assert_eq!((asked(4).await, asked(5).await), (0, 2), "another service");
    world.rule("ghost", "shop", Action::Allow);
    assert_eq!(
        (asked(10).await, asked(12).await),
        (3, 0),
        "a rule, and who it names"
    );
    assert_eq!((asked(39).await, asked(40).await), (0, 3));
    world.register("late", anywhere()).await;
    let now = began + Duration::from_secs(41);
    viewer.rules_changed(now);
    look(&mut viewer, now).await;
    assert_eq!(shaky.answers().asked, 4);
}
