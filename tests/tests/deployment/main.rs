//! The files of `examples/systemd` and `examples/nomad`: understood by what reads them, and each option known.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod hcl;

use std::path::{Path, PathBuf};
use std::process::Command;

use hcl::{Block, Value};
use meshx::agent::config::{AgentArgs, AgentConfig};
use meshx_tests::{program, repository};

const UNITS: [&str; 2] = ["meshx-agent.service", "shop.service"];

fn example(name: &str) -> String {
    let path = repository().join("examples").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|e| panic!("{program}: {e}"));
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}\n{text}",
        output.status
    );
    text
}

/// The units as they would be installed, but with the program of this workspace.
fn units(dir: &Path) -> Vec<PathBuf> {
    let meshx = program("meshx").unwrap();
    let write = |name: &&str| {
        let path = dir.join(name);
        let unit = example(&format!("systemd/{name}"));
        assert!(unit.contains("=/usr/local/bin/meshx "), "{name}: no meshx in it");
        std::fs::write(
            &path,
            unit.replace("/usr/local/bin/meshx", meshx.to_str().unwrap()),
        )
        .unwrap();
        path
    };
    UNITS.iter().map(write).collect()
}

#[test]
fn systemd_understands_the_units_and_finds_them_hardened() {
    let dir = tempfile::tempdir().unwrap();
    for unit in units(dir.path()) {
        let unit = unit.to_str().unwrap();
        let said = run("systemd-analyze", &["verify", "--man=no", unit]);
        assert_eq!(said, "", "{unit}");
        // 10 is no protection at all, 2 is more than most services of a distribution have.
        run(
            "systemd-analyze",
            &["security", "--offline=true", "--threshold=20", unit],
        );
    }
}

#[test]
fn users_and_directory_are_those_that_the_agents_rules_name() {
    let dir = tempfile::tempdir().unwrap();
    let root = format!("--root={}", dir.path().display());
    let file = |name: &str| {
        repository()
            .join("examples/systemd")
            .join(name)
            .display()
            .to_string()
    };
    std::fs::create_dir(dir.path().join("etc")).unwrap();
    run("systemd-sysusers", &[&root, &file("meshx.sysusers.conf")]);
    let read = |name: &str| std::fs::read_to_string(dir.path().join("etc").join(name)).unwrap();
    let (users, groups) = (read("passwd"), read("group"));
    let uid = |name: &str| {
        let line = users
            .lines()
            .find(|line| line.starts_with(&format!("{name}:")))
            .unwrap()
            .to_owned();
        line.split(':').nth(2).unwrap().to_owned()
    };

    let settings = example("systemd/agent.toml");
    assert!(
        settings.contains(&format!("uid:{}=", uid("shop"))),
        "{settings}\n{users}"
    );
    assert!(groups.lines().any(|line| line.starts_with("meshx:")), "{groups}");
    // The group is looked up on this machine, which does not have it.
    let here = dir.path().join("agent.toml");
    std::fs::write(
        &here,
        settings.replace("socket_group = \"meshx\"", "socket_group = \"860\""),
    )
    .unwrap();
    let args = AgentArgs {
        config: Some(here),
        ..AgentArgs::default()
    };
    let config = AgentConfig::from_args(args).unwrap();
    assert_eq!(config.access.group, Some(860));
    assert_eq!(config.access.socket_mode, 0o660);

    // Where agent, directory and units say the directory is must be one place.
    let place = config.dir.display().to_string();
    let directory = example("systemd/meshx.tmpfiles.conf");
    assert!(
        directory.contains(&format!("\nd {place} 1770 root meshx ")),
        "{directory}"
    );
    for unit in UNITS {
        let unit = example(&format!("systemd/{unit}"));
        assert!(unit.contains(&format!("\nReadWritePaths={place}\n")), "{unit}");
    }
    assert!(example("systemd/shop.service").contains(&format!("\nEnvironment=MESHX_DIR={place}\n")));
}

/// Holds the options among these words of a command line against what the program says it takes.
fn check_options(words: &[String]) {
    let meshx = program("meshx").unwrap();
    let ours = words.split(|word| word == "--").next().unwrap();
    let help = run(meshx.to_str().unwrap(), &[&ours[0], "--help"]);
    let known: Vec<&str> = help
        .split(|c: char| !(c.is_ascii_alphanumeric() || c == '-'))
        .collect();
    let options: Vec<&String> = ours.iter().filter(|word| word.starts_with("--")).collect();
    assert!(!options.is_empty(), "{words:?}");
    for option in options {
        assert!(
            known.contains(&option.as_str()),
            "meshx {} knows no {option}:\n{help}",
            ours[0]
        );
    }
}

#[test]
fn every_option_in_the_units_is_known() {
    for unit in UNITS {
        let unit = example(&format!("systemd/{unit}"));
        let start = unit
            .lines()
            .find_map(|line| line.strip_prefix("ExecStart=/usr/local/bin/meshx "))
            .unwrap();
        check_options(&start.split(' ').map(str::to_owned).collect::<Vec<_>>());
    }
}

#[test]
fn the_nomad_job_is_read_and_every_option_in_it_is_known() {
    let job = Block::parse(&example("nomad/shop.nomad.hcl")).unwrap();
    let tasks = job.all("task");
    assert_eq!(
        tasks.iter().map(|task| task.head[1].as_str()).collect::<Vec<_>>(),
        ["meshx", "shop"]
    );
    let mut dirs = Vec::new();
    for task in tasks {
        let config = task.all("config")[0];
        let Some(Value::List(list)) = config.attribute("args") else {
            panic!("{config:?}")
        };
        let words = list.iter().map(|value| match value {
            Value::Text(text) => text.clone(),
            other => panic!("{other:?}"),
        });
        let words: Vec<String> = words.collect();
        // The agent's are those of a shell that executes what follows.
        let start = words
            .iter()
            .position(|word| word == "meshx")
            .map_or(0, |at| at + 1);
        check_options(&words[start..]);
        let option = words
            .iter()
            .position(|word| word == "--dir")
            .map(|at| words[at + 1].clone());
        let variable = task.all("env")[0]
            .attribute("MESHX_DIR")
            .map(|value| match value {
                Value::Text(text) => text.clone(),
                other => panic!("{other:?}"),
            });
        dirs.push(option.or(variable).unwrap());
    }
    // The release looks for the agent where that is.
    assert_eq!(dirs[0], dirs[1]);
}
