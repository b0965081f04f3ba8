//! The VMs that benchmarks measure, and what distribution is given there.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType,
};

use crate::{Context, Process, Result};

/// The buffers that Meshx gives its sockets, for everybody.
pub const BUFFERS: &str = "{nodelay,true},{buffer,131072},{recbuf,262144},{sndbuf,262144}";

const ANSWER: Duration = Duration::from_secs(120);
const OPTIONS: &str = "tls.conf";

/// Gives a line to a VM of a benchmark; the words of its answer `done ...` as numbers.
///
/// # Errors
/// When it has ended, or answers something else.
pub fn ask(process: &mut Process, line: &str) -> Result<Vec<f64>> {
    process.write_line(line)?;
    let answer = process.wait_for(ANSWER, |line| line.strip_prefix("done").map(str::to_owned))?;
    answer
        .split_ascii_whitespace()
        .map(|word| word.parse().context(word))
        .collect()
}

/// A port of loopback that is free now.
///
/// # Errors
/// When there is none.
pub fn free_port() -> Result<u16> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").context("bind a port")?;
    Ok(listener.local_addr().context("read its address")?.port())
}

/// Emulator flags that give these options to the sockets of distribution.
pub fn distribution_flags(options: &str) -> String {
    format!("-kernel inet_dist_listen_options [{options}] -kernel inet_dist_connect_options [{options}]")
}

/// Writes an authority, one certificate that both sides show, and with them the options of inet_tls_dist: `tls.conf`.
///
/// # Errors
/// When a file cannot be written.
pub fn tls_options(dir: &Path) -> Result<PathBuf> {
    let key = || KeyPair::generate().context("make a key");
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    // Two certificates of one name look like one that signed itself.
    params
        .distinguished_name
        .push(DnType::CommonName, "meshx bench authority");
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    let ca = CertifiedIssuer::self_signed(params, key()?).context("make an authority")?;
    // inet_tls_dist holds the host part of the node name against the names of DNS, as a string; that of OTP 29 takes it
    // for the address that it is.
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![
        SanType::DnsName("127.0.0.1".try_into().context("name a certificate")?),
        SanType::IpAddress([127, 0, 0, 1].into()),
    ];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    params.distinguished_name.push(DnType::CommonName, "meshx bench");
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    let leaf_key = key()?;
    let leaf = params.signed_by(&leaf_key, &ca).context("sign a certificate")?;
    let write = |name: &str, text: String| {
        let path = dir.join(name);
        std::fs::write(&path, text).context(path.display())?;
        Ok::<_, String>(path.display().to_string())
    };
    let common = format!(
        "{{certfile,{:?}}},{{keyfile,{:?}}},{{cacertfile,{:?}}},{{verify,verify_peer}},{{versions,['tlsv1.3']}}",
        write("cert.pem", leaf.pem())?,
        write("key.pem", leaf_key.serialize_pem())?,
        write("ca.pem", ca.pem())?,
    );
    write(
        OPTIONS,
        format!("[{{server,[{common},{{fail_if_no_peer_cert,true}}]}},{{client,[{common}]}}].\n"),
    )?;
    Ok(dir.join(OPTIONS))
}
