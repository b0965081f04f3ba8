#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;

use super::*;

fn embedded() -> AgentArgs {
    AgentArgs {
        mesh: Some("embedded".into()),
        ..AgentArgs::default()
    }
}

#[test]
fn defaults() {
    let config = AgentConfig::from_args(embedded()).unwrap();
    assert_eq!(config.bind, "127.0.0.1:0".parse().unwrap());
    assert_eq!(config.access, Access::default());
    assert!(!config.hosts.is_empty());
    assert_eq!(config.mesh.name(), "embedded");
}

#[test]
fn every_bad_value_is_told_at_once() {
    let args = AgentArgs {
        mesh: Some("istio".into()),
        host: vec!["h1".into(), "a@b".into(), "h2,h3".into()],
        bind: Some("localhost".into()),
        advertise: Some("h1:x".into()),
        http: Some("9465".into()),
        allow_register: vec!["uid:1000=shop".into(), "bob=shop".into()],
        socket_mode: Some("0777".into()),
        socket_group: Some("no-such-group".into()),
        config: Some("/no/such/file".into()),
        log_format: Some("xml".into()),
        node_service: Some("host".into()),
        data_plane: Some("nginx".into()),
        instance_ports: Some("9-8".into()),
        balance: Some("at will".into()),
        idle_exit: Some(0),
        busy_poll: Some(1_001),
        ..AgentArgs::default()
    };
    let text = AgentConfig::from_args(args).unwrap_err().to_string();
    for seen in [
        "istio",
        "a@b",
        "h2,h3",
        "localhost",
        "h1:x",
        "http \"9465\"",
        "bob=shop",
        "0777",
        "no-such-group",
        "/no/such/file",
        "xml",
        "host",
        "nginx",
        "9-8",
        "at will",
        "idle-exit 0",
        "busy-poll 1001",
    ] {
        assert!(text.contains(seen), "{seen} not in {text}");
    }
    assert_eq!(text.lines().count(), 17, "{text}");
}

#[test]
fn the_embedded_mesh_stays_on_loopback() {
    for (bind, advertise) in [
        ("0.0.0.0:0", None),
        ("127.0.0.1:0", Some("10.0.0.1:1")),
        ("[::]:0", None),
    ] {
        let args = AgentArgs {
            bind: Some(bind.into()),
            advertise: advertise.map(str::to_owned),
            ..embedded()
        };
        let text = AgentConfig::from_args(args).unwrap_err().to_string();
        assert!(text.contains("wanted a loopback address"), "{text}");
    }
    for bind in ["127.0.0.2:0", "[::1]:0"] {
        AgentConfig::from_args(AgentArgs {
            bind: Some(bind.into()),
            ..embedded()
        })
        .unwrap();
    }
}

#[test]
fn epmd_is_off_unless_switched_on_and_stays_on_loopback() {
    let with = |epmd: &[&str], nodes: &[&str], host: Option<&str>| {
        AgentConfig::from_args(AgentArgs {
            epmd: epmd.iter().map(|text| (*text).to_owned()).collect(),
            epmd_nodes: nodes.iter().map(|text| (*text).to_owned()).collect(),
            epmd_host: host.map(str::to_owned),
            host: vec!["h1".into(), "h1.lan".into()],
            ..embedded()
        })
    };
    assert!(with(&[], &[], None).unwrap().epmd.is_none());
    let epmd = with(&["4369"], &["shop*"], None).unwrap().epmd.unwrap();
    assert_eq!(epmd.listen, EpmdConfig::loopback(4369));
    assert!(epmd.nodes.matches("shop2") && !epmd.nodes.matches("cart"));
    assert!(epmd.tools.matches("rpc-1-shop") && epmd.host == "h1");
    let one = with(&["127.0.0.1:7"], &[], Some("h1.lan")).unwrap().epmd.unwrap();
    assert_eq!((one.listen.len(), one.host.as_str()), (1, "h1.lan"));
    assert!(!one.nodes.matches("shop"), "no name is taken that is not listed");
    for (epmd, nodes, host, seen) in [
        (&["0.0.0.0:4369"][..], &[][..], None, "loopback"),
        (&["10.0.0.1:4369"], &[], None, "loopback"),
        (&["x"], &[], None, "loopback"),
        (&["4369"], &["shop@h1"], None, "pattern"),
        (&["4369"], &[], Some("h2"), "h1, h1.lan"),
        (&[], &["shop"], None, "without epmd"),
    ] {
        let text = with(epmd, nodes, host).unwrap_err().to_string();
        assert!(text.contains(seen), "{text}");
    }
}

#[test]
fn a_file_is_read_and_the_command_line_comes_first() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("agent.toml");
    fs::write(
        &path,
        "mesh = \"embedded\"\nhost = [\"h1\", \"h2\"]\nbind = \"127.0.0.2:7\"\nhttp = \"127.0.0.1:9\"\n\
         allow_register = [\"uid:1=a\"]\nsocket_mode = \"0660\"\nsocket_group = \"root\"\n\
         log_format = \"json\"\nidle_exit = 7\nbusy_poll = 0\n",
    )
    .unwrap();
    let args = AgentArgs {
        config: Some(path.clone()),
        bind: Some("127.0.0.3:0".into()),
        dir: Some("/d".into()),
        ..AgentArgs::default()
    };
    let config = AgentConfig::from_args(args).unwrap();
    assert_eq!(config.hosts, ["h1", "h2"]);
    assert_eq!(config.bind, "127.0.0.3:0".parse().unwrap());
    assert_eq!(config.http, Some("127.0.0.1:9".parse().unwrap()));
    assert_eq!(
        config.access,
        Access {
            socket_mode: 0o660,
            group: Some(0)
        }
    );
    assert_eq!(config.idle_exit, Some(std::time::Duration::from_secs(7)));
    assert_eq!(config.busy_poll, Some(std::time::Duration::ZERO));
    assert_eq!(
        (config.log_format, config.dir),
        (LogFormat::Json, PathBuf::from("/d"))
    );

    fs::write(&path, "mesh = \"embedded\"\nbindd = \"x\"\n").unwrap();
    let args = AgentArgs {
        config: Some(path),
        ..AgentArgs::default()
    };
    let text = AgentConfig::from_args(args).unwrap_err().to_string();
    assert!(text.contains("bindd"), "{text}");
}
