//! The control client that C-nodes and the command line use.

use std::{io::Read, os::unix::fs::PermissionsExt, time::Duration};

use futures::future::join_all;
use meshx::agent::{
    client::{ClientError, ControlClient},
    control::{
        UNANSWERED_MAX,
        message::{map, text},
    },
};
use meshx_etf::Term;
use tokio::time::timeout;

use crate::support::{Agent, LONG, echo_link, temp};

#[tokio::test]
async fn it_says_hello_asks_many_things_at_once_and_hears_of_the_end() {
    let root = temp();
    let mut agent = Agent::start(root.path(), "a", &["h1"], &[]);
    let client = ControlClient::connect(Some(&agent.dir)).await.unwrap();
    let hello = client.hello();
    assert_eq!(
        (hello.version, hello.hosts.as_slice()),
        (1, &["h1".to_owned()][..])
    );
    assert_eq!((hello.mesh.as_str(), &hello.vm_dir), ("embedded", &agent.vm()));
    assert!(hello.agent.starts_with("meshx ") && hello.trust_domain.ends_with(".embedded"));
    assert_eq!(hello.dist_socket, agent.vm().parent().unwrap().join("dist.sock"));

    let answers = join_all((0..4 * UNANSWERED_MAX).map(|_| client.request("names", map([])))).await;
    assert!(
        answers.iter().all(Result::is_ok),
        "more than may be unanswered wait here"
    );

    let refused = client.request("dance", map([])).await.unwrap_err();
    assert_eq!(refused.cause(), Some("invalid_request"), "{refused}");
    let long = client
        .request("dance", map([("x", text("x".repeat(70_000)))]))
        .await
        .unwrap_err();
    assert!(matches!(long, ClientError::Request(_)), "{long}");

    let mut events = client.events();
    agent.child.kill().unwrap();
    agent.wait_exit();
    assert_eq!(timeout(LONG, events.recv()).await.unwrap(), None);
    let gone = client.request("names", map([])).await.unwrap_err();
    assert!(matches!(gone, ClientError::Closed(_)), "{gone}");
}

#[tokio::test]
async fn no_agent_and_an_untrusted_directory_are_told_apart() {
    let root = temp();
    let error = ControlClient::connect(Some(&root.path().join("none")))
        .await
        .unwrap_err();
    assert!(matches!(error, ClientError::NoAgent { .. }));
    assert!(
        error.to_string().contains("meshx agent --mesh embedded --dir"),
        "{error}"
    );
    let error = ControlClient::connect(Some(root.path())).await.unwrap_err();
    assert!(matches!(error, ClientError::NoAgent { .. }), "{error}");

    // Whoever may write to the directory could answer in the agent's place.
    let agent = Agent::start(root.path(), "a", &["h1"], &[]);
    std::fs::set_permissions(&agent.dir, std::fs::Permissions::from_mode(0o777)).unwrap();
    let error = ControlClient::connect(Some(&agent.dir)).await.unwrap_err();
    assert!(
        matches!(error, ClientError::Dir(_)) && error.to_string().contains("0777"),
        "{error}"
    );
}

#[tokio::test]
async fn the_agents_user_cuts_a_link_and_its_owner_hears_why() {
    let root = temp();
    let agent = Agent::start(root.path(), "a", &["h1"], &[]);
    let mut owner = agent.connect();
    let (link, [mut near, _far]) = echo_link(&mut owner);
    let id = u128::from_str_radix(&link, 16).unwrap().to_be_bytes();
    let operator = ControlClient::connect(Some(&agent.dir)).await.unwrap();
    operator
        .request(
            "cut",
            map([("link", Term::binary(id)), ("reason", text("enough"))]),
        )
        .await
        .unwrap();
    let event = owner.receive().unwrap();
    let meshx::agent::control::message::Message::Event { name, args } = event else {
        panic!("{event:?}")
    };
    assert_eq!(name, "cut");
    assert_eq!(args.map_get("link").unwrap().as_binary(), Some(&id[..]));
    assert!(
        args.map_get("text")
            .unwrap()
            .as_str()
            .unwrap()
            .ends_with(": enough"),
        "{args}"
    );
    near.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    assert_eq!(near.read(&mut [0]).unwrap(), 0, "the link is closed");
}
