//! A user's own project, outside of this repository, that names Meshx by path and by git.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use meshx_tests::{COOKIE, Mesh, Process, program, repository};

fn run(dir: &Path, program: &str, arguments: &[&str]) {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(dir)
        .env_remove("MIX_ENV")
        .env("MESHX_NIF", "require")
        // A user's machine knows nothing of this repository's.
        .env_remove("CARGO_TARGET_DIR")
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr]
        .map(|o| String::from_utf8_lossy(&o).into_owned())
        .concat();
    assert!(
        output.status.success(),
        "{program} {arguments:?} in {}: {text}",
        dir.display()
    );
}

/// `mix new`, with one dependency.
fn fresh(root: &Path, dependency: &str) -> PathBuf {
    run(root, "mix", &["new", "fresh"]);
    let project = root.join("fresh");
    let mix_exs = std::fs::read_to_string(project.join("mix.exs")).unwrap();
    let with = mix_exs.replacen(
        "[\n      # {:dep_from_hexpm",
        &format!("[\n      {dependency},\n      # {{:dep_from_hexpm"),
        1,
    );
    assert_ne!(mix_exs, with, "the generated mix.exs has another form: {mix_exs}");
    std::fs::write(project.join("mix.exs"), with).unwrap();
    project
}

fn boots_a_node(dependency: &str) {
    let mesh = Mesh::new().unwrap();
    let agent = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    // A space in the path: users have them, and emulator flags split at them.
    let root = mesh.path().join("my projects");
    std::fs::create_dir(&root).unwrap();
    let project = fresh(&root, dependency);
    run(&project, "mix", &["deps.get"]);
    // No `mix compile` first: `meshx run` must see to it that the VM finds its carrier at boot.
    let script = "IO.puts(\"node #{node()} codec #{inspect(MeshxRpc.Codec.impl())} names #{inspect(MeshxNode.names())}\")";
    let arguments = [
        "run", "fresh@h1", "--cookie", COOKIE, "--", "mix", "run", "-e", script,
    ];
    let mut node = Process::start("fresh@h1", program("meshx").unwrap(), arguments, |command| {
        command
            .current_dir(&project)
            .env("MESHX_DIR", agent.dir())
            .env("MESHX_NIF", "require");
    })
    .unwrap();
    let line = node
        .wait_for(Duration::from_secs(600), |line| {
            line.starts_with("node ").then(|| line.to_owned())
        })
        .unwrap();
    assert!(
        line.starts_with("node fresh@h1 codec MeshxRpc.Codec.Nif "),
        "{line}"
    );
    assert!(line.contains("fresh@h1\""), "{line}");
    assert!(node.wait_exit(Duration::from_secs(30)).unwrap().success());
}

#[test]
fn by_path() {
    let path = repository().join("mix_project").canonicalize().unwrap();
    boots_a_node(&format!("{{:meshx, path: {path:?}}}"));
}

#[test]
fn by_git_with_subdir() {
    let repository = repository().canonicalize().unwrap();
    boots_a_node(&format!(
        "{{:meshx, git: \"file://{}\", subdir: \"mix_project\"}}",
        repository.display()
    ));
}
