//! From a kind of sidecar to a program, its arguments and its environment; and the files of an own command.
//!
//! An own command finds in its environment:
//!
//! | Variable | What |
//! |---|---|
//! | `MESHX_ID`, `MESHX_SERVICE`, `MESHX_SPIFFE` | the instance, its service, the name in its certificate |
//! | `MESHX_LOCAL` | `IP:PORT` where inbound connections are to be handed to |
//! | `MESHX_BIND`, `MESHX_PORT` | the address and port to take mesh connections at |
//! | `MESHX_LEAF` | PEM: the certificate, then its intermediates |
//! | `MESHX_KEY` | PEM: its key; the name is that of `MESHX_LEAF` with `.key`, as HAProxy looks for it |
//! | `MESHX_ROOTS` | PEM: whom to believe |
//! | `MESHX_ALLOWED` | the SPIFFE URIs that may connect, one a line; empty: none |
//! | `MESHX_UPSTREAMS` | JSON: `[{"service", "bind", "spiffe", "server_name", "addresses"}]` |
//!
//! The files are replaced by rename. A command that catches SIGHUP gets one then, and should read them again.

use std::{
    env,
    ffi::OsString,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Stdio,
};

use pem::Pem;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::json;
use tokio::{process::Command, time::timeout};

use super::{
    ConsulProgram, START_TIME, Settings, SidecarError, SidecarSpec,
    files::Files,
    free_loopback,
    process::{Environment, Program},
    view::View,
};
use crate::mesh::SpiffeId;

const LEAF: &str = "leaf.pem";
const KEY: &str = "leaf.pem.key";
const ROOTS: &str = "roots.pem";
const ALLOWED: &str = "allowed";
const UPSTREAMS: &str = "upstreams.json";
/// Variables of the agent's own that every sidecar gets.
const HANDED_ON: [&str; 4] = ["PATH", "HOME", "LANG", "TZ"];
/// The first Consul whose `connect envoy` speaks xDS v3, the only version that Envoys since 1.19 know.
const XDS_V3: (u32, u32) = (1, 11);
/// Where programs are looked for when the agent has no `PATH`.
const DEFAULT_PATH: &str = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin";

/// `consul connect proxy`.
pub(super) fn connect_proxy(settings: &Settings, spec: &SidecarSpec) -> Result<Program, SidecarError> {
    let consul = settings
        .consul
        .as_ref()
        .ok_or(SidecarError::NoConsul("connect_proxy"))?;
    let mut arguments: Vec<OsString> = vec!["connect".into(), "proxy".into()];
    arguments.push(format!("-sidecar-for={}", spec.id).into());
    if let Some(level) = &spec.log_level {
        arguments.push(format!("-log-level={level}").into());
    }
    consul_program(settings, consul, spec, arguments)
}

/// `consul connect envoy`, when this Consul can drive today's Envoys.
pub(super) async fn consul_envoy(
    settings: &Settings,
    spec: &SidecarSpec,
) -> Result<Option<Program>, SidecarError> {
    let Some(consul) = settings.consul.as_ref() else {
        return Ok(None);
    };
    if !speaks_xds_v3(consul).await {
        return Ok(None);
    }
    let envoy = find(&settings.envoy)?;
    // Its own default, port 19000, is free for one Envoy of a host.
    let admin = free_loopback().map_err(|source| SidecarError::System {
        what: "find a port for Envoy's admin interface".into(),
        source,
    })?;
    let mut arguments: Vec<OsString> = vec!["connect".into(), "envoy".into()];
    arguments.push(format!("-sidecar-for={}", spec.id).into());
    let mut binary = OsString::from("-envoy-binary=");
    binary.push(envoy);
    arguments.push(binary);
    arguments.push(format!("-admin-bind={admin}").into());
    arguments.extend([
        "--".into(),
        "-l".into(),
        spec.log_level.as_deref().unwrap_or("warning").into(),
    ]);
    consul_program(settings, consul, spec, arguments).map(Some)
}

fn consul_program(
    settings: &Settings,
    consul: &ConsulProgram,
    spec: &SidecarSpec,
    arguments: Vec<OsString>,
) -> Result<Program, SidecarError> {
    let mut environment = base(settings);
    let own = consul.environment.iter();
    environment.extend(own.map(|(name, value)| (name.into(), value.into())));
    if let Some(token) = spec.token.as_ref().or(consul.token.as_ref()) {
        environment.push(("CONSUL_HTTP_TOKEN".into(), token.expose().into()));
    }
    Ok(Program {
        path: find(&consul.program)?,
        arguments,
        environment: Environment(environment),
    })
}

/// Where Consul does not tell, it is taken for an old one: an Envoy that this agent drives works with any.
async fn speaks_xds_v3(consul: &ConsulProgram) -> bool {
    let Ok(path) = find(&consul.program) else {
        return false;
    };
    let output = Command::new(path)
        .arg("version")
        .env_clear()
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let Ok(Ok(output)) = timeout(START_TIME, output).await else {
        return false;
    };
    version(&String::from_utf8_lossy(&output.stdout)).is_some_and(|version| version >= XDS_V3)
}

/// The first two numbers of `Consul v1.8.7`.
fn version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.lines().next()?.strip_prefix("Consul v")?.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// The user's own program.
pub(super) fn own(
    settings: &Settings,
    spec: &SidecarSpec,
    command: &[String],
    spiffe: &SpiffeId,
    files: &Files,
) -> Result<Program, SidecarError> {
    let Some((program, arguments)) = command.split_first() else {
        return Err(SidecarError::Invalid(
            "the command of a sidecar is empty: name a program".into(),
        ));
    };
    let mut environment = base(settings);
    let texts = [
        ("MESHX_ID", spec.id.clone()),
        ("MESHX_SERVICE", spec.service.to_string()),
        ("MESHX_SPIFFE", spiffe.to_string()),
        ("MESHX_LOCAL", spec.local.to_string()),
        ("MESHX_BIND", spec.public.ip().to_string()),
        ("MESHX_PORT", spec.public.port().to_string()),
    ];
    environment.extend(texts.map(|(name, value)| (name.into(), value.into())));
    let paths = [
        ("MESHX_LEAF", LEAF),
        ("MESHX_KEY", KEY),
        ("MESHX_ROOTS", ROOTS),
        ("MESHX_ALLOWED", ALLOWED),
        ("MESHX_UPSTREAMS", UPSTREAMS),
    ];
    environment.extend(paths.map(|(name, file)| (name.into(), files.path(file).into())));
    Ok(Program {
        path: find(Path::new(program))?,
        arguments: arguments.iter().map(Into::into).collect(),
        environment: Environment(environment),
    })
}

/// Writes the files of an own command. Tells whether any is new.
pub(super) fn write(files: &mut Files, view: &View) -> Result<bool, SidecarError> {
    let upstreams: Vec<_> = view
        .upstreams
        .iter()
        .map(|upstream| {
            json!({
                "service": upstream.spiffe.service(),
                "bind": upstream.bind,
                "spiffe": upstream.spiffe.to_string(),
                "server_name": upstream.spiffe.server_name(),
                "addresses": upstream.addresses,
            })
        })
        .collect();
    let allowed: String = view.allowed.iter().map(|uri| format!("{uri}\n")).collect();
    // The key before its certificate: who is told by the latter finds both.
    let all = [
        (ROOTS, certificates(&view.roots)),
        (ALLOWED, allowed),
        (UPSTREAMS, json!(upstreams).to_string()),
        (KEY, key(&view.identity.key)),
        (LEAF, certificates(&view.identity.chain)),
    ];
    let mut changed = false;
    for (name, content) in all {
        changed |= files.put(name, content.as_bytes())?;
    }
    Ok(changed)
}

/// Certificates in PEM (RFC 7468), one after the other.
pub(super) fn certificates(all: &[CertificateDer<'_>]) -> String {
    all.iter()
        .map(|certificate| pem::encode(&Pem::new("CERTIFICATE", certificate.as_ref())))
        .collect()
}

/// A key in PEM, by the name of its form.
pub(super) fn key(key: &PrivateKeyDer<'_>) -> String {
    let form = match key {
        PrivateKeyDer::Pkcs1(_) => "RSA PRIVATE KEY",
        PrivateKeyDer::Sec1(_) => "EC PRIVATE KEY",
        _ => "PRIVATE KEY",
    };
    pem::encode(&Pem::new(form, key.secret_der()))
}

/// What every sidecar's environment has.
pub(super) fn base(settings: &Settings) -> Vec<(OsString, OsString)> {
    let handed_on = HANDED_ON
        .iter()
        .filter_map(|name| Some(((*name).into(), env::var_os(name)?)));
    handed_on.chain(settings.environment.iter().cloned()).collect()
}

/// The absolute path of a program that can be started.
pub(super) fn find(program: &Path) -> Result<PathBuf, SidecarError> {
    let search = env::var_os("PATH").unwrap_or_else(|| DEFAULT_PATH.into());
    let executable = |path: &PathBuf| {
        fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    };
    let missing = |wanted: String| SidecarError::NoProgram {
        program: program.display().to_string(),
        wanted,
    };
    if program.is_absolute() {
        return Some(program.to_path_buf())
            .filter(executable)
            .ok_or_else(|| missing("that is an executable file".into()));
    }
    if program.components().count() != 1 || program.as_os_str().is_empty() {
        return Err(missing(
            ": wanted an absolute path or a name without a slash".into(),
        ));
    }
    env::split_paths(&search)
        .filter(|dir| dir.is_absolute())
        .map(|dir| dir.join(program))
        .find(executable)
        .ok_or_else(|| missing(format!("in PATH, which is {}", search.to_string_lossy())))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn a_missing_program_is_named_with_where_it_was_looked_for() {
        let text = |program: &str| find(Path::new(program)).unwrap_err().to_string();
        let error = text("no-such-proxy");
        assert!(
            error.contains("\"no-such-proxy\" in PATH, which is /") && error.contains("install it"),
            "{error}"
        );
        assert!(
            text("/etc/passwd").contains("executable file"),
            "{}",
            text("/etc/passwd")
        );
        assert!(text("/nowhere/envoy").contains("executable file"));
        for relative in ["./sh", "bin/sh", "../sh", ""] {
            assert!(text(relative).contains("absolute path"), "{relative}");
        }
        assert!(find(Path::new("sh")).unwrap().is_absolute());
    }

    #[test]
    fn a_consul_tells_whether_it_can_drive_envoy() {
        assert_eq!(version("Consul v1.8.7\nProtocol 2 spoken\n"), Some((1, 8)));
        assert!(version("Consul v1.20.1+ent").unwrap() >= XDS_V3);
        assert!(version("Consul v1.10.12").unwrap() < XDS_V3);
        assert_eq!(version("consul: no such thing"), None);
    }
}
