//! Every way in of docs/nodes.md: each of its `sh` blocks is run, and prints what the `text` block after it says.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use meshx_tests::{Beam, COOKIE, Mesh, ebin, program, repository};

/// The commands of a page with what they print.
fn blocks(page: &str) -> Vec<(String, String)> {
    let mut fences = page.split("```");
    let mut blocks = Vec::new();
    let mut commands = None;
    // Every second piece is inside of fences.
    while let (Some(_), Some(inside)) = (fences.next(), fences.next()) {
        let (kind, text) = inside.split_once('\n').unwrap();
        match kind {
            "sh" => assert!(
                commands.replace(text.to_owned()).is_none(),
                "nothing is said about {text}"
            ),
            "text" => blocks.push((commands.take().expect("commands"), text.to_owned())),
            _ => {}
        }
    }
    assert!(commands.is_none(), "{commands:?}");
    blocks
}

#[test]
fn every_way_in_of_the_manual_works() {
    let page = std::fs::read_to_string(repository().join("docs/nodes.md")).unwrap();
    let blocks = blocks(&page);
    assert!(blocks.len() >= 11, "{}", blocks.len());

    let mesh = Mesh::new().unwrap();
    let agent = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let _shop = Beam::start(&agent, "shop@h1").unwrap();
    let home = mesh.path().join("home");
    std::fs::create_dir(&home).unwrap();
    let cookie = home.join(".erlang.cookie");
    std::fs::write(&cookie, COOKIE).unwrap();
    std::fs::set_permissions(&cookie, std::fs::Permissions::from_mode(0o400)).unwrap();
    let programs = program("meshx").unwrap();
    let programs = programs.parent().unwrap().display();
    let path = std::env::var("PATH").unwrap();

    for (commands, wanted) in blocks {
        let output = Command::new("bash")
            .args(["-euo", "pipefail", "-c", &commands])
            .current_dir(repository())
            .env("PATH", format!("{programs}:{path}"))
            .env("HOME", &home)
            .env("MESHX_DIR", agent.dir())
            .env("MESHX_EBIN", ebin())
            // Built already, and not again by `mix meshx.run`.
            .env("MESHX_PROGRAM", program("meshx").unwrap())
            .env_remove("ERL_FLAGS")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        let complained = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success() && said == wanted,
            "{commands}\nprinted: {said}\nwanted: {wanted}\n{}: {complained}",
            output.status
        );
    }
}
