#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::mesh::{META_CLUSTER, Mesh, Protocol};

fn open(dir: &Path, agent: &str, host: &str) -> EmbeddedMesh {
    EmbeddedMesh::open(
        dir,
        agent,
        vec![host.to_owned()],
        "127.0.0.2:4000".parse().unwrap(),
    )
    .unwrap()
}

fn node(name: &str, agent: &str) -> Instance {
    Instance {
        id: name.to_owned(),
        service: ServiceName::from_node(name).unwrap(),
        node: Some(name.to_owned()),
        agent: agent.to_owned(),
        address: "127.0.0.2:4000".parse().unwrap(),
        protocol: Protocol::Meshx,
        meta: Default::default(),
    }
}

fn service(name: &str) -> ServiceName {
    ServiceName::new(name).unwrap()
}

fn rule(source: &str, destination: &str, action: Action) -> Rule {
    Rule {
        source: source.parse().unwrap(),
        destination: destination.parse().unwrap(),
        action,
    }
}

#[tokio::test]
async fn two_agents_share_names_and_one_authority() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("mesh");
    let (a, b) = (open(&dir, "a1", "h1"), open(&dir, "a2", "h2"));
    assert_eq!(a.trust_domain(), b.trust_domain());
    assert!(a.trust_domain().ends_with(".embedded"));

    a.register(&Entry::plain(node("shop@h1", "a1"))).await.unwrap();
    assert_eq!(b.node("shop@h1").await.unwrap().unwrap(), node("shop@h1", "a1"));
    assert_eq!(b.instances(&service("shop")).await.unwrap().len(), 1);
    assert!(matches!(
        b.register(&Entry::plain(node("shop@h1", "a2"))).await,
        Err(MeshError::NameTaken(_))
    ));
    a.deregister("shop@h1").await.unwrap();
    a.deregister("shop@h1").await.unwrap();
    assert!(b.nodes().await.unwrap().is_empty());
    b.register(&Entry::plain(node("shop@h1", "a2"))).await.unwrap();
}

#[tokio::test]
async fn what_is_critical_is_shown_and_led_to_by_nobody() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("mesh");
    let (a, b) = (open(&dir, "a1", "h1"), open(&dir, "a2", "h2"));
    let mut labelled = node("shop@h1", "a1");
    labelled.meta = [(META_CLUSTER.to_owned(), "blue".to_owned())].into();
    a.register(&Entry::plain(labelled.clone())).await.unwrap();
    a.register(&Entry::plain(node("cart@h1", "a1"))).await.unwrap();
    let of_others = fs::read_to_string(dir.join("agents/a1.json")).unwrap();
    assert!(!of_others.contains("critical"), "{of_others}");
    a.set_critical("shop@h1", Some("it hangs")).await.unwrap();
    a.set_critical("none@h1", Some("it hangs")).await.unwrap();
    assert_eq!(b.node("shop@h1").await.unwrap(), None);
    assert!(b.instances(&service("shop")).await.unwrap().is_empty());
    assert_eq!(b.nodes().await.unwrap(), [node("cart@h1", "a1")]);
    // It is there all the same: its links stay, and its name is taken.
    assert!(b.present(&service("shop")).await.unwrap().ids.contains("shop@h1"));
    let status = |listed: Vec<Listed>| listed[0].status.clone();
    assert_eq!(status(b.services().await.unwrap()), "critical: it hangs");
    assert!(matches!(
        b.register(&Entry::plain(node("shop@h1", "a2"))).await,
        Err(MeshError::NameTaken(_))
    ));
    a.set_critical("shop@h1", None).await.unwrap();
    assert_eq!(b.node("shop@h1").await.unwrap(), Some(labelled));
    assert_eq!(b.node("shop@h1").await.unwrap().unwrap().cluster(), "blue");
    assert_eq!(status(b.services().await.unwrap()), "passing");
}

#[tokio::test]
async fn an_agent_that_is_gone_takes_its_names_along() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("mesh");
    let (a, b) = (open(&dir, "a1", "h1"), open(&dir, "a2", "h2"));
    a.register(&Entry::plain(node("shop@h1", "a1"))).await.unwrap();
    let file = dir.join("agents/a1.json");
    let left_behind = fs::read(&file).unwrap();
    drop(a);
    assert!(b.node("shop@h1").await.unwrap().is_none());
    // A killed agent leaves its entry, but not its lock.
    fs::write(&file, left_behind).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    assert!(b.node("shop@h1").await.unwrap().is_none());
    open(&dir, "a3", "h3");
    assert!(!file.exists(), "the next agent sweeps");
}

#[tokio::test]
async fn entries_are_read_again_when_they_are_others() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("mesh");
    let (a, b) = (open(&dir, "a1", "h1"), open(&dir, "a2", "h2"));
    let read = |id: &str| {
        let live = b.inner.own.entries.live(&b.inner.dir).unwrap();
        live.into_iter().find(|entry| entry.id() == id).unwrap()
    };
    // As soon as it is old enough to be believed.
    let kept = |id: &str| {
        let mut seen = read(id);
        while !Arc::ptr_eq(&seen, &read(id)) {
            std::thread::yield_now();
            seen = read(id);
        }
        seen
    };
    let (first, own) = (kept("a1"), kept("a2"));
    a.register(&Entry::plain(node("shop@h1", "a1"))).await.unwrap();
    assert!(!Arc::ptr_eq(&first, &kept("a1")));
    assert!(Arc::ptr_eq(&own, &read("a2")));
    assert!(b.node("shop@h1").await.unwrap().is_some());
    // What nobody may read, or is no entry, is no memory either.
    let file = dir.join("agents/a1.json");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    b.node("shop@h1").await.unwrap_err();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    b.node("shop@h1").await.unwrap();
    fs::write(&file, "{").unwrap();
    b.node("shop@h1").await.unwrap_err();
}

#[tokio::test]
async fn one_id_and_one_host_belong_to_one_agent() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("mesh");
    let older = open(&dir, "a1", "h1");
    let again = EmbeddedMesh::open(&dir, "a1", vec![], "127.0.0.1:1".parse().unwrap()).unwrap_err();
    assert!(again.to_string().contains("lives"), "{again}");
    let newer = open(&dir, "a2", "h1");
    assert_eq!(
        (
            older.host_conflicts().unwrap().len(),
            newer.host_conflicts().unwrap().len()
        ),
        (1, 1)
    );
    let refused = newer
        .register(&Entry::plain(node("shop@h1", "a2")))
        .await
        .unwrap_err();
    assert!(
        refused.to_string().contains("a1 owned host h1 first"),
        "{refused}"
    );
    older
        .register(&Entry::plain(node("shop@h1", "a1")))
        .await
        .unwrap();
}

#[test]
fn bad_places_and_ids_are_refused() {
    let temp = tempfile::tempdir().unwrap();
    let at = |dir: &str, id: &str, address: &str| {
        EmbeddedMesh::open(&temp.path().join(dir), id, vec![], address.parse().unwrap())
            .map(|_| ())
            .map_err(|error| error.to_string())
    };
    assert!(at("a", "a1", "192.0.2.1:1").unwrap_err().contains("loopback"));
    for id in ["", "../x", "a.b", &"x".repeat(catalogue::MAX_AGENT_ID + 1)] {
        assert!(
            at("a", id, "127.0.0.1:1").unwrap_err().contains("agent id"),
            "{id}"
        );
    }
    fs::create_dir(temp.path().join("open")).unwrap();
    fs::set_permissions(temp.path().join("open"), fs::Permissions::from_mode(0o750)).unwrap();
    assert!(at("open", "a1", "127.0.0.1:1").unwrap_err().contains("mode 0750"));
    std::os::unix::fs::symlink(temp.path().join("a"), temp.path().join("link")).unwrap();
    assert!(at("link", "a1", "127.0.0.1:1").is_err());

    at("b", "a1", "127.0.0.1:1").unwrap();
    let mode = |name: &str| fs::metadata(temp.path().join(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!(
        (mode("b"), mode("b/ca.key"), mode("b/rules.json")),
        (0o700, 0o600, 0o600)
    );
    fs::set_permissions(temp.path().join("b/ca.key"), fs::Permissions::from_mode(0o640)).unwrap();
    assert!(at("b", "a1", "127.0.0.1:1").unwrap_err().contains("ca.key"));
}

#[tokio::test]
async fn leaves_are_kept_until_they_are_old() {
    let temp = tempfile::tempdir().unwrap();
    let mesh = open(&temp.path().join("mesh"), "a1", "h1");
    let leaf = mesh.identity(&service("shop")).await.unwrap();
    assert!(Arc::ptr_eq(
        &leaf,
        &mesh.identity(&service("shop")).await.unwrap()
    ));
    assert_eq!(leaf.id, SpiffeId::new(mesh.trust_domain(), service("shop")));
    assert!(authority::is_fresh(&leaf, 0, unix_now()));
    assert!(!authority::is_fresh(&leaf, 0, leaf.not_after - 3600));
    let whole_life = leaf.not_after - unix_now();
    assert!(
        !authority::is_fresh(&leaf, 0, leaf.not_after - whole_life - 600),
        "made while the clock was ahead: not valid yet"
    );
    let other = mesh.identity(&service("cart")).await.unwrap();
    assert_ne!(other.chain, leaf.chain);
    let shop = service("shop");
    let ages = |seconds: i64| {
        let mut issued = mesh.inner.issued.lock().unwrap();
        let mut old = issued.authority.issue(&shop).unwrap();
        old.not_after = unix_now() + seconds;
        let leaf = Leaf {
            identity: Arc::new(old),
            early: 3600,
        };
        issued.leaves.insert(shop.clone(), leaf);
    };
    // The last day of its life, and as early as was drawn for it.
    for left in [60, 24 * 3600 + 3500] {
        ages(left);
        let renewed = mesh.identity(&shop).await.unwrap();
        assert!(authority::is_fresh(&renewed, 0, unix_now()));
        assert!(renewed.not_after > unix_now() + 48 * 3600, "{left}");
    }
    ages(24 * 3600 + 3700);
    let kept = mesh.identity(&shop).await.unwrap();
    assert!(kept.not_after < unix_now() + 48 * 3600);
    let early: std::collections::HashSet<i64> = (0..8).map(|_| authority::early()).collect();
    assert!(early.len() > 1 && early.iter().all(|early| (0..6 * 3600).contains(early)));
    assert!(!format!("{leaf:?}").contains("key"), "{leaf:?}");
}

#[tokio::test]
async fn running_agents_follow_a_rotation() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("mesh");
    let (a, b) = (open(&path, "a1", "h1"), open(&path, "a2", "h2"));
    let dir = MeshDir::open(&path).unwrap();
    let shop = service("shop");
    let first = a.identity(&shop).await.unwrap();
    let root = a.roots().await.unwrap();

    rotate(&dir, Rotation::Leaves).unwrap();
    let leaf = a.identity(&shop).await.unwrap();
    assert_ne!(leaf.chain, first.chain);
    assert_eq!(a.roots().await.unwrap(), root);
    assert!(believed(&first, &leaf) && believed(&leaf, &first));

    rotate(&dir, Rotation::Root).unwrap();
    let next = b.identity(&shop).await.unwrap();
    let both = b.roots().await.unwrap();
    assert_eq!((both.len(), &both[1]), (2, &root[0]));
    assert!(
        believed(&leaf, &next),
        "the root before signs no more, and is believed"
    );
    assert!(!believed(&next, &leaf), "the new root signs");
    assert_eq!(a.identity(&shop).await.unwrap().roots.len(), 2);

    rotate(&dir, Rotation::Forget).unwrap();
    let last = a.identity(&shop).await.unwrap();
    assert_eq!(a.roots().await.unwrap(), both[..1]);
    assert!(believed(&next, &last) && !believed(&leaf, &last));
    assert_eq!(a.trust_domain(), b.trust_domain());
    assert_eq!(last.id, first.id);

    for _ in 1..8 {
        rotate(&dir, Rotation::Root).unwrap();
    }
    let error = rotate(&dir, Rotation::Root).unwrap_err().to_string();
    assert!(error.contains("ROOTS_MAX"), "{error}");

    // Stopped between its two files, a rotation has changed nothing that anybody sees.
    let (roots, key) = (dir.read("ca.pem").unwrap(), dir.read("ca.key").unwrap());
    rotate(&dir, Rotation::Forget).unwrap();
    rotate(&dir, Rotation::Root).unwrap();
    dir.replace("ca.key", &key.unwrap()).unwrap();
    let signed = a.identity(&shop).await.unwrap();
    assert!(believed(&signed, &signed));
    // A key that belongs to no root signs nothing.
    dir.replace("ca.pem", &roots.unwrap()).unwrap();
    dir.replace("ca.key", &rcgen::KeyPair::generate().unwrap().serialize_pem())
        .unwrap();
    let error = a.identity(&shop).await.unwrap_err().to_string();
    assert!(error.contains("ca.key"), "{error}");
}

/// What signs below a root of one's own leads to that, or nothing is signed.
#[tokio::test]
async fn an_intermediate_must_lead_to_a_root() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("mesh");
    let mesh = open(&path, "a1", "h1");
    let dir = MeshDir::open(&path).unwrap();
    let shop = service("shop");
    let authority = |name: &str| {
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        (params, rcgen::KeyPair::generate().unwrap())
    };
    let (root, root_key) = authority("root");
    let (other, other_key) = authority("other");
    let (middle, key) = authority("middle");
    let root_pem = root.self_signed(&root_key).unwrap().pem();
    let below = |root, root_key| {
        middle
            .signed_by(&key, &rcgen::Issuer::new(root, root_key))
            .unwrap()
            .pem()
    };
    let (good, bad) = (below(root, root_key), below(other, other_key));
    dir.replace("ca.chain.pem", &good).unwrap();
    dir.replace("ca.pem", &root_pem).unwrap();
    dir.replace("ca.key", &key.serialize_pem()).unwrap();
    let leaf = mesh.identity(&shop).await.unwrap();
    assert_eq!(leaf.chain.len(), 2);
    rotate(&dir, Rotation::Leaves).unwrap();
    assert_ne!(mesh.identity(&shop).await.unwrap().chain[0], leaf.chain[0]);
    let error = rotate(&dir, Rotation::Forget).unwrap_err().to_string();
    assert!(error.contains("an intermediate in ca.chain.pem"), "{error}");

    for (chain, seen) in [
        (
            &bad,
            "do not lead to a root in ca.pem, by way of ca.chain.pem: invalid peer certificate: UnknownIssuer",
        ),
        (&root_pem, "its first certificate is not of the key in ca.key"),
        (&good.repeat(5), "5 certificates, wanted 1 to 4"),
        (&String::new(), "0 certificates"),
    ] {
        dir.replace("ca.chain.pem", chain).unwrap();
        let error = mesh.identity(&shop).await.unwrap_err().to_string();
        assert!(error.contains(seen), "{error}");
    }
    dir.replace("ca.chain.pem", &good).unwrap();
    mesh.identity(&shop).await.unwrap();
}

/// Whether the leaf is signed by one of the roots that the other identity believes.
fn believed(leaf: &Identity, by: &Identity) -> bool {
    let parsed = rustls::server::ParsedCertificate::try_from(&leaf.chain[0]).unwrap();
    let algorithms = rustls::crypto::ring::default_provider().signature_verification_algorithms;
    rustls::client::verify_server_cert_signed_by_trust_anchor(
        &parsed,
        &by.roots,
        &[],
        rustls::pki_types::UnixTime::now(),
        algorithms.all,
    )
    .is_ok()
}

#[tokio::test]
async fn so_many_leaves_are_kept_and_no_more() {
    let temp = tempfile::tempdir().unwrap();
    let mesh = open(&temp.path().join("mesh"), "a1", "h1");
    let identity = mesh.identity(&service("old")).await.unwrap();
    let leaf = || Leaf {
        identity: identity.clone(),
        early: 0,
    };
    let issued = || mesh.inner.issued.lock().unwrap();
    let more = (1..MAX_LEAVES).map(|n| (service(&format!("s{n}")), leaf()));
    issued().leaves.extend(more);
    mesh.identity(&service("one-more")).await.unwrap();
    assert_eq!(issued().leaves.len(), MAX_LEAVES);
    assert!(issued().leaves.contains_key(&service("one-more")));
}

#[tokio::test]
async fn what_could_not_be_taken_out_of_the_file_goes_with_the_next_change() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("mesh");
    let mesh = open(&dir, "a1", "h1");
    mesh.register(&Entry::plain(node("shop@h1", "a1"))).await.unwrap();
    // Nothing can be written, as on a full disk.
    let obstacle = dir.join("agents/a1.new");
    fs::create_dir(&obstacle).unwrap();
    assert!(mesh.deregister("shop@h1").await.is_err());
    fs::remove_dir(&obstacle).unwrap();
    mesh.register(&Entry::plain(node("cart@h1", "a1"))).await.unwrap();
    assert_eq!(mesh.nodes().await.unwrap(), [node("cart@h1", "a1")]);
}

#[test]
fn the_directory_is_locked_against_those_who_clean_by_age() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("mesh");
    let (mesh, other) = (open(&path, "a1", "h1"), open(&path, "a2", "h2"));
    let dir = fs::File::open(&path).unwrap();
    let exclusive = || rustix::fs::flock(&dir, rustix::fs::FlockOperation::NonBlockingLockExclusive);
    drop(other);
    assert!(exclusive().is_err());
    drop(mesh);
    exclusive().unwrap();
}

#[test]
fn a_change_of_the_rules_is_seen_whatever_time_the_file_shows() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("mesh");
    let _mesh = open(&path, "a1", "h1");
    let dir = MeshDir::open(&path).unwrap();
    let file = path.join("rules.json");
    let rewrite = |text: &str| {
        fs::write(&file, text).unwrap();
        let file = fs::File::options().write(true).open(&file).unwrap();
        file.set_modified(std::time::UNIX_EPOCH).unwrap();
        Rules::stamp(&dir)
    };
    let before = rewrite(r#"{"default":"deny","rules":[{"source":"a","destination":"b","action":"allow"}]}"#);
    // The kernel's clock for files may tick as rarely as every 10 ms.
    let began = std::time::Instant::now();
    let swapped = r#"{"default":"deny","rules":[{"source":"b","destination":"a","action":"allow"}]}"#;
    while rewrite(swapped) == before {
        assert!(began.elapsed() < Duration::from_secs(10));
    }
}

#[test]
fn the_most_precise_rule_holds() {
    let mut rules = Rules {
        default: Action::Allow,
        rules: Vec::new(),
    };
    let decide = |rules: &Rules, a: &str, b: &str| rules.decide(&service(a), &service(b)).allowed;
    assert!(decide(&rules, "shop", "cart"));
    rules.rules.push(rule("*", "*", Action::Deny));
    assert!(!decide(&rules, "shop", "cart"));
    rules.rules.push(rule("shop", "*", Action::Allow));
    assert!(decide(&rules, "shop", "cart"));
    rules.rules.push(rule("*", "cart", Action::Deny));
    assert!(!decide(&rules, "shop", "cart"), "the destination counts first");
    rules.rules.push(rule("shop", "cart", Action::Allow));
    assert!(decide(&rules, "shop", "cart"));
    assert!(
        !decide(&rules, "cart", "shop"),
        "one direction says nothing of the other"
    );
    rules.rules.insert(0, rule("shop", "cart", Action::Deny));
    assert!(!decide(&rules, "shop", "cart"), "of two for one pair the denial");
    assert_eq!(
        rules.decide(&service("shop"), &service("cart")).rule,
        "rule shop -> cart deny"
    );
}

#[tokio::test]
async fn rules_change_at_once_and_broken_ones_are_no_answer() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("mesh");
    let mesh = open(&path, "a1", "h1");
    let dir = MeshDir::open(&path).unwrap();
    let shop = SpiffeId::new(mesh.trust_domain(), service("shop"));
    let cart = service("cart");
    assert!(mesh.authorize(&shop, &cart).await.unwrap().allowed);
    Rules::set(&dir, rule("shop", "cart", Action::Deny)).unwrap();
    Rules::set(&dir, rule("shop", "cart", Action::Deny)).unwrap();
    assert_eq!(Rules::load(&dir).unwrap().rules.len(), 1);
    assert!(!mesh.authorize(&shop, &cart).await.unwrap().allowed);
    assert!(
        Rules::remove(
            &dir,
            &Pattern::Exact(service("shop")),
            &Pattern::Exact(cart.clone())
        )
        .unwrap()
    );
    assert!(!Rules::remove(&dir, &Pattern::Any, &Pattern::Any).unwrap());
    assert!(mesh.authorize(&shop, &cart).await.unwrap().allowed);
    Rules::set_default(&dir, Action::Deny).unwrap();
    assert_eq!(mesh.authorize(&shop, &cart).await.unwrap().rule, "default deny");
    Rules::set_default(&dir, Action::Allow).unwrap();

    let stranger = SpiffeId::new("elsewhere.embedded", service("shop"));
    assert!(!mesh.authorize(&stranger, &cart).await.unwrap().allowed);

    let file = path.join("rules.json");
    for broken in [
        "",
        "{",
        r#"{"default":"allow"}"#,
        r#"{"default":"maybe","rules":[]}"#,
        r#"{"default":"allow","rules":[],"permissions":[]}"#,
        r#"{"default":"allow","rules":[{"source":"a","destination":"b","action":"allow","path":"/"}]}"#,
        r#"{"default":"allow","rules":[{"source":"A*","destination":"b","action":"allow"}]}"#,
    ] {
        fs::write(&file, broken).unwrap();
        assert!(
            matches!(mesh.authorize(&shop, &cart).await, Err(MeshError::Unavailable(_))),
            "{broken}"
        );
    }
    fs::write(&file, vec![b' '; usize::try_from(dir::MAX_FILE).unwrap() + 1]).unwrap();
    assert!(
        mesh.authorize(&shop, &cart)
            .await
            .unwrap_err()
            .to_string()
            .contains("longer than")
    );
    let many = Rules {
        default: Action::Allow,
        rules: vec![rule("a", "b", Action::Allow); rules::MAX_RULES + 1],
    };
    fs::write(&file, serde_json::to_string(&many).unwrap()).unwrap();
    assert!(
        mesh.authorize(&shop, &cart)
            .await
            .unwrap_err()
            .to_string()
            .contains("at most 4096")
    );
    fs::remove_file(&file).unwrap();
    assert!(
        mesh.authorize(&shop, &cart).await.is_err(),
        "a lost file is no yes"
    );
    open(&path, "a2", "h2");
    assert!(
        mesh.authorize(&shop, &cart).await.is_err(),
        "and is not made anew"
    );
}

#[tokio::test]
async fn a_broken_catalogue_is_no_answer() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("mesh");
    let (a, b) = (open(&path, "a1", "h1"), open(&path, "a2", "h2"));
    fs::write(path.join("agents/a2.json"), "{").unwrap();
    assert!(matches!(a.node("shop@h1").await, Err(MeshError::Unavailable(_))));
    let far = Instance {
        address: "192.0.2.1:1".parse().unwrap(),
        ..node("shop@h2", "a2")
    };
    drop(b);
    let b = open(&path, "a2", "h2");
    b.register(&Entry::plain(far)).await.unwrap();
    assert!(
        a.node("shop@h1")
            .await
            .unwrap_err()
            .to_string()
            .contains("loopback")
    );
}

#[test]
fn it_is_a_mesh() {
    fn takes(_: &dyn Mesh) {}
    let temp = tempfile::tempdir().unwrap();
    takes(&open(&temp.path().join("mesh"), "a1", "h1"));
}
