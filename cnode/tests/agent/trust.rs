//! Which user may be which service. These tests become another user, which takes root.

use std::{
    fs,
    os::unix::{
        fs::{MetadataExt, PermissionsExt},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::Command,
};

use meshx::agent::control::message::map;

use crate::support::{Agent, Helper, echo_link, temp};

const STRANGER: u32 = 4711;

fn need_root() {
    assert!(
        rustix::process::geteuid().is_root(),
        "this test starts a process of another user: run it as root"
    );
}

/// A copy of this program that every user can execute, wherever the build directory is.
fn program_for_all(root: &Path) -> PathBuf {
    for_all(root, &std::env::current_exe().unwrap())
}

fn for_all(root: &Path, program: &Path) -> PathBuf {
    fs::set_permissions(root, fs::Permissions::from_mode(0o755)).unwrap();
    let copy = root.join("helper");
    fs::copy(program, &copy).unwrap();
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).unwrap();
    copy
}

fn register_as_stranger(root: &Path, agent: &Agent, node: &str) -> String {
    let socket = agent.vm().join(format!("stranger-{node}"));
    let mut helper = Helper::start(
        &program_for_all(root),
        &agent.dir,
        node,
        socket.to_str().unwrap(),
        Some(STRANGER),
    );
    helper.answer()
}

#[test]
fn another_user_is_refused_without_a_rule() {
    need_root();
    let root = temp();
    let agent = Agent::start(root.path(), "a", &["h1"], &["--socket-mode", "0666"]);
    assert_eq!(
        fs::metadata(agent.dir.join("control.sock")).unwrap().mode() & 0o777,
        0o666
    );
    let answer = register_as_stranger(root.path(), &agent, "shop@h1");
    assert!(answer.starts_with("not_permitted: uid 4711"), "{answer}");
    assert!(
        answer.contains("--allow-register uid:4711=shop"),
        "it says what would allow it: {answer}"
    );
    agent.wait_log(&["refused", "not_permitted", "4711"]);
    assert!(agent.names().is_empty());
}

#[test]
fn another_user_may_be_what_a_rule_says_and_no_more() {
    need_root();
    let root = temp();
    let options = [
        "--socket-mode",
        "0666",
        "--allow-register",
        "uid:4711=shop*",
        "--allow-register",
        "gid:1=cart",
    ];
    let agent = Agent::start(root.path(), "a", &["h1"], &options);
    assert_eq!(register_as_stranger(root.path(), &agent, "shop-eu@h1"), "ok");
    let answer = register_as_stranger(root.path(), &agent, "cart@h1");
    assert!(answer.starts_with("not_permitted"), "{answer}");
}

#[test]
fn a_user_who_is_one_service_cannot_act_as_another_nor_on_links_that_are_not_his() {
    need_root();
    let root = temp();
    let options = ["--socket-mode", "0666", "--allow-register", "uid:4711=shop*"];
    let agent = Agent::start(root.path(), "a", &["h1"], &options);
    let mut client = agent.connect();
    let (link, _streams) = echo_link(&mut client);
    let socket = agent.vm().join("stranger");
    let socket = format!("{}\n{link}", socket.display());
    let program = program_for_all(root.path());
    let mut helper = Helper::start(&program, &agent.dir, "shop@h1", &socket, Some(STRANGER));
    assert_eq!(helper.answer(), "ok");
    for attempt in ["cut", "connect as web", "a socket elsewhere", "register web"] {
        let answer = helper.answer();
        println!("{attempt}: {answer}");
        assert!(answer.starts_with("not_permitted: "), "{attempt}: {answer}");
    }
    // Nobody is registered as mail, and this user may not be it: the agent does not dial in its name.
    let answer = helper.answer();
    assert!(answer.starts_with("no_such_service: "), "{answer}");
    let links = client.ask("links", map([])).unwrap();
    assert_eq!(
        links.map_get("links").unwrap().as_list().unwrap().len(),
        1,
        "the link lives"
    );
}

#[test]
fn a_private_agent_cannot_even_be_reached() {
    need_root();
    let root = temp();
    let program = program_for_all(root.path());
    let agent = Agent::start(root.path(), "a", &["h1"], &[]);
    let socket = root.path().join("s");
    fs::set_permissions(root.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let mut helper = Helper::start(
        &program,
        &agent.dir,
        "shop@h1",
        socket.to_str().unwrap(),
        Some(STRANGER),
    );
    assert!(!helper.child.wait().unwrap().success(), "its connect fails");

    // Who asks by the program is told what it is, not to start another agent.
    fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let meshx = root.path().join("meshx");
    fs::copy(env!("CARGO_BIN_EXE_meshx"), &meshx).unwrap();
    for (command, wanted) in [("names", 77), ("doctor", 69)] {
        let mut asked = Command::new(&meshx);
        asked
            .arg(command)
            .arg("--dir")
            .arg(&agent.dir)
            .uid(STRANGER)
            .gid(STRANGER);
        let output = asked.output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8(text).unwrap();
        assert_eq!(output.status.code(), Some(wanted), "{text}");
        assert!(
            text.contains("uid 4711 may not open") && text.contains("--socket-group"),
            "{text}"
        );
        assert!(!text.contains("start one"), "{text}");
    }
}

#[test]
fn a_mesh_that_another_user_may_not_look_into_is_not_said_to_be_absent() {
    need_root();
    let root = temp();
    let (mesh, none) = (root.path().join("mesh"), root.path().join("none"));
    fs::create_dir(&mesh).unwrap();
    fs::write(mesh.join("mesh.json"), "{}").unwrap();
    fs::set_permissions(&mesh, fs::Permissions::from_mode(0o700)).unwrap();
    let program = for_all(root.path(), Path::new(env!("CARGO_BIN_EXE_meshx")));
    let run = |command: &[&str], mesh: &Path| {
        let mut program = Command::new(&program);
        program.args(command).arg("--mesh-dir").arg(mesh);
        let output = program.uid(STRANGER).gid(STRANGER).output().unwrap();
        (
            output.status.code().unwrap(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    for command in [&["deny", "a", "b"][..], &["rotate"], &["rules"]] {
        let (code, text) = run(command, &mesh);
        assert_eq!(code, 77, "{command:?}: {text}");
        let wanted = format!("cannot look into {}: Permission denied", mesh.display());
        assert!(text.contains(&wanted), "{text}");
        let (code, text) = run(command, &none);
        assert!(
            code == 69 && text.contains("there is no embedded mesh"),
            "{code}: {text}"
        );
    }
}
