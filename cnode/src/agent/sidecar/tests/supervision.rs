//! Programs that fail, flood, ignore and leave children behind.

use super::*;

#[tokio::test]
async fn it_is_started_again_until_it_has_failed_too_often() {
    let world = World::new();
    let sidecars = world.sidecars(world.settings());
    let (sender, mut events) = events();
    let spec = SidecarSpec {
        max_restarts: 3,
        ..script("echo so; echo no such proxy >&2; exit 7")
    };
    let handle = sidecars.start(spec, sender).await.unwrap();
    for again in [true, true, true, false] {
        let (text, final_) = events.down().await;
        assert!(text.contains("/sh ended: exit status: 7"), "{text}");
        assert_eq!(final_, !again, "{text}");
        assert_eq!(
            text.contains("after 3 restarts within 60 s (max_proxy_restarts)"),
            final_,
            "{text}"
        );
    }
    assert_eq!(soon("the end of events", events.0.recv()).await, None);
    soon("stop", handle.stop()).await;
    assert_eq!(fs::read_dir(world.dir()).unwrap().count(), 0, "keys stay nowhere");
}

#[tokio::test]
async fn restarts_wait_longer_and_longer() {
    let world = World::new();
    let settings = Settings {
        backoff: Backoff {
            min: Duration::from_millis(200),
            max: Duration::from_secs(10),
        },
        ..world.settings()
    };
    let sidecars = world.sidecars(settings);
    let (sender, mut events) = events();
    let began = tokio::time::Instant::now();
    let handle = sidecars.start(script("exit 1"), sender).await.unwrap();
    for _ in 0..4 {
        events.down().await;
    }
    // At least half of 200, 400 and 800 ms.
    assert!(
        began.elapsed() >= Duration::from_millis(700),
        "{:?}",
        began.elapsed()
    );
    handle.stop().await;
}

#[tokio::test]
async fn lines_of_both_streams_come_as_events_and_the_last_tells_of_the_end() {
    let world = World::new();
    let sidecars = world.sidecars(world.settings());
    let (sender, mut events) = events();
    let handle = sidecars
        .start(
            script("echo out; echo err >&2; read x; echo \"read $?\"; sleep 0.5; echo last; exit 3"),
            sender,
        )
        .await
        .unwrap();
    let mut seen = Vec::new();
    while seen.len() < 4 {
        match events.next().await {
            SidecarEventKind::Output { stream, line } => {
                seen.push((stream, String::from_utf8(line).unwrap()))
            }
            down => panic!("{down:?}"),
        }
    }
    for wanted in [
        (Stream::Stdout, "out"),
        (Stream::Stderr, "err"),
        (Stream::Stdout, "read 1"), // Its standard input is closed.
    ] {
        assert!(seen.contains(&(wanted.0, wanted.1.to_owned())), "{seen:?}");
    }
    let (text, final_) = events.down().await;
    assert!(
        text.ends_with("exit status: 3; it said last: last") && !final_,
        "{text}"
    );
    handle.stop().await;
}

#[tokio::test]
async fn without_output_only_its_end_is_told() {
    let world = World::new();
    let sidecars = world.sidecars(world.settings());
    let (sender, mut events) = events();
    let spec = SidecarSpec {
        output: false,
        ..script("echo one; exit 1")
    };
    let handle = sidecars.start(spec, sender).await.unwrap();
    assert!(matches!(events.next().await, SidecarEventKind::Down { .. }));
    handle.stop().await;
}

#[tokio::test]
async fn its_environment_is_what_was_configured() {
    let world = World::new();
    let settings = Settings {
        environment: vec![("COLOUR".into(), "green".into())],
        ..world.settings()
    };
    let sidecars = world.sidecars(settings);
    let (sender, mut events) = events();
    let spec = script("env; echo done; exec sleep 600");
    let (local, public) = (spec.local, spec.public);
    let handle = sidecars.start(spec, sender).await.unwrap();
    let mut all = Vec::new();
    loop {
        match events.line().await {
            done if done == "done" => break,
            line => all.push(line),
        }
    }
    let spiffe = world.mesh.spiffe(&service("shop")).unwrap();
    for wanted in [
        "COLOUR=green".to_owned(),
        format!("MESHX_LOCAL={local}"),
        format!("MESHX_PORT={}", public.port()),
        format!("MESHX_SPIFFE={spiffe}"),
        "MESHX_SERVICE=shop".to_owned(),
    ] {
        assert!(all.contains(&wanted), "{wanted} is not in {all:#?}");
    }
    let known = [
        "PATH", "HOME", "LANG", "TZ", "COLOUR", "PWD", "OLDPWD", "SHLVL", "_",
    ];
    for line in &all {
        let name = line.split('=').next().unwrap();
        assert!(known.contains(&name) || name.starts_with("MESHX_"), "{line}");
    }
    handle.stop().await;
}

#[tokio::test]
async fn a_command_that_does_not_exist_is_refused_with_its_name() {
    let world = World::new();
    let sidecars = world.sidecars(world.settings());
    for (command, wanted) in [
        (vec!["no-such-proxy".to_owned()], "\"no-such-proxy\" in PATH"),
        (vec![], "command of a sidecar is empty"),
    ] {
        let spec = SidecarSpec {
            kind: SidecarKind::Command(command),
            ..script("")
        };
        let error = sidecars.start(spec, events().0).await.unwrap_err().to_string();
        assert!(error.contains(wanted), "{error}");
    }
    let spec = SidecarSpec {
        kind: SidecarKind::ConnectProxy,
        ..script("")
    };
    let error = sidecars.start(spec, events().0).await.unwrap_err().to_string();
    assert!(
        error.contains("connect_proxy") && error.contains("Consul"),
        "{error}"
    );
    assert_eq!(fs::read_dir(world.dir()).unwrap().count(), 0);
}

#[tokio::test]
async fn plain_text_stays_on_loopback() {
    let world = World::new();
    let sidecars = world.sidecars(world.settings());
    let outside = "192.0.2.1:80".parse().unwrap();
    let upstream = |bind| SidecarUpstream {
        target: service("cart"),
        bind,
    };
    let bind = anywhere();
    let good = script("exec sleep 600");
    for (spec, wanted) in [
        (
            SidecarSpec {
                local: outside,
                ..good.clone()
            },
            "local address",
        ),
        (
            SidecarSpec {
                upstreams: vec![upstream(outside)],
                ..good.clone()
            },
            "bind address",
        ),
        (
            SidecarSpec {
                upstreams: vec![upstream(bind); 2],
                ..good.clone()
            },
            "two upstreams",
        ),
        (
            SidecarSpec {
                upstreams: vec![upstream(bind); UPSTREAMS_PER_SIDECAR_MAX + 1],
                ..good.clone()
            },
            "at most 256",
        ),
        (
            SidecarSpec {
                id: String::new(),
                ..good.clone()
            },
            "sidecar id",
        ),
    ] {
        let error = sidecars.start(spec, events().0).await.unwrap_err().to_string();
        assert!(error.contains(wanted), "{error}");
    }
    let handle = sidecars.start(good, events().0).await.unwrap();
    assert!(handle.set_upstreams(vec![upstream(outside)]).is_err());
    handle.stop().await;
}

#[tokio::test]
async fn a_flood_blocks_neither_it_nor_us() {
    let world = World::new();
    let sidecars = world.sidecars(world.settings());
    // Nobody reads these.
    let (sender, kept) = mpsc::channel(1);
    let done = world.temp.path().join("done");
    let spec = script(&format!(
        "head -c 20000000 /dev/zero; yes | head -n 2000000; touch {}; exec sleep 600",
        done.display()
    ));
    let handle = sidecars.start(spec, sender).await.unwrap();
    until("the end of the flood", || done.exists()).await;
    soon("stop", handle.stop()).await;
    drop(kept);
}

#[tokio::test]
async fn who_ignores_sigterm_is_killed_after_the_grace_and_so_are_its_children() {
    let world = World::new();
    let settings = Settings {
        grace: Duration::from_millis(200),
        ..world.settings()
    };
    let sidecars = world.sidecars(settings);
    let (sender, mut events) = events();
    let handle = sidecars
        .start(
            script("trap '' TERM; sleep 600 & echo $!; echo $$; wait; sleep 600"),
            sender,
        )
        .await
        .unwrap();
    let (child, own) = (events.line().await, events.line().await);
    assert!(lives(&child) && lives(&own));
    let began = tokio::time::Instant::now();
    soon("stop", handle.stop()).await;
    assert!(began.elapsed() >= Duration::from_millis(200));
    assert!(!lives(&child) && !lives(&own));
}

#[tokio::test]
async fn sigterm_comes_first_and_is_enough() {
    let world = World::new();
    let settings = Settings {
        grace: PATIENCE,
        ..world.settings()
    };
    let sidecars = world.sidecars(settings);
    let (sender, mut events) = events();
    let handle = sidecars
        .start(
            script("trap 'echo going; exit 0' TERM; echo up; while :; do sleep 0.01; done"),
            sender,
        )
        .await
        .unwrap();
    assert_eq!(events.line().await, "up");
    // Dropped, not stopped: it ends in the background all the same.
    drop(handle);
    assert_eq!(events.line().await, "going");
    assert_eq!(
        soon("the end of events", events.0.recv()).await,
        None,
        "an end on request is no failure"
    );
}

#[tokio::test]
async fn children_go_with_it_even_those_that_left_its_group() {
    let world = World::new();
    let sidecars = world.sidecars(world.settings());
    let (sender, mut events) = events();
    let spec =
        script("sleep 600 & echo $!; setsid sleep 600 & sleep 0.2; pgrep -f -P $$ -n 'sleep 600'; exit 1");
    let spec = SidecarSpec {
        max_restarts: 0,
        ..spec
    };
    let handle = sidecars.start(spec, sender).await.unwrap();
    let (in_group, left) = (events.line().await, events.line().await);
    assert_ne!(in_group, left);
    let (_, final_) = events.down().await;
    assert!(final_ && !lives(&in_group) && !lives(&left));
    handle.stop().await;
}

#[tokio::test]
async fn a_successor_waits_for_its_predecessors_end() {
    let world = World::new();
    let sidecars = world.sidecars(world.settings());
    let (sender, mut events) = events();
    let spec = script("trap 'sleep 0.2; echo gone; exit 0' TERM; echo up; while :; do sleep 0.01; done");
    let first = sidecars.start(spec.clone(), sender.clone()).await.unwrap();
    assert_eq!(events.line().await, "up");
    drop(first);
    let second = sidecars.start(spec, sender).await.unwrap();
    assert_eq!(
        (events.line().await, events.line().await),
        ("gone".into(), "up".into())
    );
    second.stop().await;
}

/// A program that says that it is this Consul, and then how it was started.
fn consul(world: &World, version: &str) -> ConsulProgram {
    use std::os::unix::fs::PermissionsExt;
    let path = world.temp.path().join("consul");
    let text = format!(
        "#!/bin/sh\n[ \"$1\" = version ] && {{ echo Consul {version}; exit; }}\n\
         for word; do echo \"$word\"; done; env | grep ^CONSUL; echo done; exec sleep 600\n"
    );
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    ConsulProgram {
        program: path,
        environment: vec![("CONSUL_HTTP_ADDR".into(), "127.0.0.1:1".into())],
        token: Some(Token::new("agents-own")),
    }
}

async fn said(spec: SidecarSpec, world: &World, consul: ConsulProgram) -> Vec<String> {
    let settings = Settings {
        consul: Some(consul),
        envoy: "/bin/true".into(),
        ..world.settings()
    };
    let sidecars = world.sidecars(settings);
    let (sender, mut events) = events();
    let spec = SidecarSpec {
        log_level: Some("debug".into()),
        output: true,
        ..spec
    };
    let handle = sidecars.start(spec, sender).await.unwrap();
    let mut lines = Vec::new();
    while lines.last().is_none_or(|last| last != "done") {
        lines.push(events.line().await);
    }
    handle.stop().await;
    lines
}

#[tokio::test]
async fn consuls_commands_get_their_instance_and_the_token_by_environment() {
    let world = World::new();
    let proxy = SidecarSpec {
        kind: SidecarKind::ConnectProxy,
        ..script("")
    };
    let said = said(proxy, &world, consul(&world, "v1.8.7")).await;
    assert_eq!(
        said[..4],
        ["connect", "proxy", "-sidecar-for=shop-1", "-log-level=debug"]
    );
    assert!(
        said.contains(&"CONSUL_HTTP_ADDR=127.0.0.1:1".to_owned()),
        "{said:?}"
    );
    // It is there, but what it prints of it is not handed on.
    assert!(said.contains(&"CONSUL_HTTP_TOKEN=(token)".to_owned()), "{said:?}");
}

#[tokio::test]
async fn a_consul_that_speaks_xds_v3_drives_envoy_itself() {
    let world = World::new();
    let envoy = SidecarSpec {
        kind: SidecarKind::Envoy,
        token: Some(Token::new("clients-own")),
        ..script("")
    };
    let said = said(envoy, &world, consul(&world, "v1.11.0")).await;
    let (words, admin) = (
        [
            "connect",
            "envoy",
            "-sidecar-for=shop-1",
            "-envoy-binary=/bin/true",
        ],
        &said[4],
    );
    assert_eq!(said[..4], words);
    assert!(
        admin.starts_with("-admin-bind=127.0.0.1:") && !admin.ends_with(":0"),
        "{admin}"
    );
    assert_eq!(said[5..8], ["--", "-l", "debug"]);
    assert!(said.contains(&"CONSUL_HTTP_TOKEN=(token)".to_owned()), "{said:?}");
}

#[tokio::test]
async fn an_older_consul_leaves_envoy_to_us() {
    let world = World::new();
    let settings = Settings {
        consul: Some(consul(&world, "v1.8.7")),
        envoy: "/bin/false".into(),
        ..world.settings()
    };
    let sidecars = world.sidecars(settings);
    let (sender, mut events) = events();
    let spec = SidecarSpec {
        kind: SidecarKind::Envoy,
        ..script("")
    };
    let handle = sidecars.start(spec, sender).await.unwrap();
    assert!(events.down().await.0.starts_with("/bin/false ended"));
    handle.stop().await;
}
