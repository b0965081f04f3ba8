//! How to reach Consul: options, then the environment of the `consul` program, then the file, then defaults.
//!
//! The variables mean what they mean to that program (Consul, "CLI environment variables"), except that
//! verification cannot be switched off. Every bad value is reported at once.

use std::ffi::OsString;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use reqwest::Url;
use serde::Deserialize;

use super::tls;
use crate::mesh::Token;

/// Where the `consul` program looks, too.
const DEFAULT_ADDRESS: &str = "127.0.0.1:8500";
/// Longest token, token file and name of a namespace, partition or data centre, in bytes.
const TOKEN_MAX: usize = 4096;
const SCOPE_MAX: usize = 64;
/// Longest path of a Unix socket (unix(7)).
const SUN_PATH_MAX: usize = 107;

/// Options about Consul. There is none for the token: everybody may see a command line.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ConsulArgs {
    /// Consul's HTTP address: host:port, http://, https:// or unix:///path [default: $CONSUL_HTTP_ADDR, 127.0.0.1:8500]
    #[arg(long, value_name = "ADDRESS")]
    pub consul_addr: Option<String>,
    /// File with the Consul token; read again when it changes [default: $CONSUL_HTTP_TOKEN_FILE, else $CONSUL_HTTP_TOKEN]
    #[arg(long, value_name = "FILE")]
    pub consul_token_file: Option<PathBuf>,
    /// File with the authorities that Consul's HTTPS certificate is held against [default: $CONSUL_CACERT]
    #[arg(long, value_name = "FILE")]
    pub consul_ca_file: Option<PathBuf>,
    /// Directory with such files [default: $CONSUL_CAPATH, else the system's authorities]
    #[arg(long, value_name = "DIR")]
    pub consul_ca_path: Option<PathBuf>,
    /// Certificate that is shown to Consul's HTTPS [default: $CONSUL_CLIENT_CERT]
    #[arg(long, value_name = "FILE")]
    pub consul_client_cert: Option<PathBuf>,
    /// Key of that certificate [default: $CONSUL_CLIENT_KEY]
    #[arg(long, value_name = "FILE")]
    pub consul_client_key: Option<PathBuf>,
    /// Name in Consul's HTTPS certificate, when it is not the address's [default: $CONSUL_TLS_SERVER_NAME]
    #[arg(long, value_name = "NAME")]
    pub consul_tls_server_name: Option<String>,
    /// Consul Enterprise namespace [default: $CONSUL_NAMESPACE]
    #[arg(long, value_name = "NAME")]
    pub consul_namespace: Option<String>,
    /// Consul Enterprise admin partition [default: $CONSUL_PARTITION]
    #[arg(long, value_name = "NAME")]
    pub consul_partition: Option<String>,
    /// Data centre whose catalogue is asked [default: that of the Consul agent]
    #[arg(long, value_name = "NAME")]
    pub consul_datacenter: Option<String>,
}

/// The table `[consul]` of the agent's file: the options without their `consul-`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsulFile {
    addr: Option<String>,
    token_file: Option<PathBuf>,
    ca_file: Option<PathBuf>,
    ca_path: Option<PathBuf>,
    client_cert: Option<PathBuf>,
    client_key: Option<PathBuf>,
    tls_server_name: Option<String>,
    namespace: Option<String>,
    partition: Option<String>,
    datacenter: Option<String>,
}

/// Everything that is needed to ask Consul.
#[derive(Debug, Clone)]
pub struct ConsulSettings {
    pub(super) address: Address,
    pub(super) token: TokenSource,
    pub(super) tls: TlsFiles,
    pub(super) namespace: Option<String>,
    pub(super) partition: Option<String>,
    pub(super) datacenter: Option<String>,
}

/// Where Consul answers HTTP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Address {
    Http(Url),
    Unix(PathBuf),
}

impl Address {
    /// Whether what is sent there can be read by others on the way.
    pub(super) fn is_open(&self) -> bool {
        let Self::Http(url) = self else { return false };
        let host = url.host_str().unwrap_or_default();
        let ip = host.trim_matches(['[', ']']).parse::<IpAddr>();
        url.scheme() == "http" && host != "localhost" && !ip.is_ok_and(|ip| ip.is_loopback())
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Http(url) => f.write_str(url.as_str().trim_end_matches('/')),
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
        }
    }
}

/// Where the token comes from.
#[derive(Debug, Clone)]
pub(super) enum TokenSource {
    /// Consul's anonymous token.
    None,
    Given(Token),
    File(PathBuf),
}

/// The files for HTTPS, and whom to expect.
#[derive(Debug, Clone, Default)]
pub(super) struct TlsFiles {
    pub(super) ca_file: Option<PathBuf>,
    pub(super) ca_path: Option<PathBuf>,
    /// Certificate and key.
    pub(super) client: Option<(PathBuf, PathBuf)>,
    pub(super) server_name: Option<String>,
}

impl ConsulSettings {
    /// Puts the sources together and checks everything. `env` answers for the environment; an empty value
    /// counts as none.
    ///
    /// # Errors
    /// Every bad value, with what was wanted.
    pub fn read(
        args: ConsulArgs,
        file: ConsulFile,
        env: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Self, Vec<String>> {
        let mut faults = Vec::new();
        let env = |name: &str| env(name).filter(|value| !value.is_empty());
        let mut text = |option: Option<String>, name: &str, in_file: Option<String>| {
            let set = option.or_else(|| match env(name)?.into_string() {
                Ok(value) => Some(value),
                Err(_) => {
                    faults.push(format!("{name} is no UTF-8 text"));
                    None
                }
            });
            set.or(in_file)
        };
        let path = |option: Option<PathBuf>, name: &str, in_file: Option<PathBuf>| {
            option.or_else(|| env(name).map(PathBuf::from)).or(in_file)
        };

        let address = text(args.consul_addr, "CONSUL_HTTP_ADDR", file.addr);
        let ssl = text(None, "CONSUL_HTTP_SSL", None);
        let verify = text(None, "CONSUL_HTTP_SSL_VERIFY", None);
        let token = text(None, "CONSUL_HTTP_TOKEN", None);
        let server_name = text(
            args.consul_tls_server_name,
            "CONSUL_TLS_SERVER_NAME",
            file.tls_server_name,
        );
        let namespace = text(args.consul_namespace, "CONSUL_NAMESPACE", file.namespace);
        let partition = text(args.consul_partition, "CONSUL_PARTITION", file.partition);
        let datacenter = args.consul_datacenter.or(file.datacenter);
        // The consul program, too, lets a file win over CONSUL_HTTP_TOKEN; one in our file is the last resort.
        let token_file = path(args.consul_token_file, "CONSUL_HTTP_TOKEN_FILE", None);
        let token_file = token_file.or(if token.is_none() { file.token_file } else { None });
        let certificate = path(args.consul_client_cert, "CONSUL_CLIENT_CERT", file.client_cert);
        let key = path(args.consul_client_key, "CONSUL_CLIENT_KEY", file.client_key);
        let ca_file = path(args.consul_ca_file, "CONSUL_CACERT", file.ca_file);
        let ca_path = path(args.consul_ca_path, "CONSUL_CAPATH", file.ca_path);

        let mut check = |result: Result<(), String>| result.unwrap_or_else(|fault| faults.push(fault));
        check(match verify.map(|text| flag("CONSUL_HTTP_SSL_VERIFY", &text)) {
            None | Some(Ok(true)) => Ok(()),
            Some(Ok(false)) => Err(
                "CONSUL_HTTP_SSL_VERIFY: verification cannot be off; name the authority of \
                                    Consul's certificate with --consul-ca-file or CONSUL_CACERT"
                    .to_owned(),
            ),
            Some(Err(fault)) => Err(fault),
        });
        let ssl = ssl.map_or(Ok(false), |text| flag("CONSUL_HTTP_SSL", &text));
        check(ssl.clone().map(|_| ()));
        let address = parse_address(
            address.as_deref().unwrap_or(DEFAULT_ADDRESS),
            ssl.unwrap_or_default(),
        );
        check(address.clone().map(|_| ()));
        for (name, value) in [
            ("consul-namespace", &namespace),
            ("consul-partition", &partition),
            ("consul-datacenter", &datacenter),
        ] {
            check(value.as_deref().map_or(Ok(()), |value| scope(name, value)));
        }
        check(server_name.as_deref().map_or(Ok(()), check_server_name));
        let client = match (certificate, key) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => None,
            (some, _) => {
                let (seen, missing) = if some.is_some() {
                    (
                        "certificate",
                        "key: name it with --consul-client-key or CONSUL_CLIENT_KEY",
                    )
                } else {
                    (
                        "key",
                        "certificate: name it with --consul-client-cert or CONSUL_CLIENT_CERT",
                    )
                };
                check(Err(format!("a Consul client {seen} without its {missing}")));
                None
            }
        };
        let token = match (token_file, token) {
            (Some(file), _) => {
                check(read_token(&file).map(|_| ()));
                TokenSource::File(file)
            }
            (None, Some(token)) => match check_token("CONSUL_HTTP_TOKEN", &token) {
                Ok(token) => TokenSource::Given(token),
                Err(fault) => {
                    check(Err(fault));
                    TokenSource::None
                }
            },
            (None, None) => TokenSource::None,
        };
        let tls = TlsFiles {
            ca_file,
            ca_path,
            client,
            server_name,
        };
        if let Ok(Address::Http(url)) = &address
            && url.scheme() == "https"
        {
            check(tls::client_config(&tls).map(|_| ()));
        }
        match address {
            Ok(address) if faults.is_empty() => Ok(Self {
                address,
                token,
                tls,
                namespace,
                partition,
                datacenter,
            }),
            _ => Err(faults),
        }
    }

    /// The same settings as the `consul` program reads them from its environment, without a token that was given
    /// by value ([`ConsulSettings::given_token`]).
    pub fn environment(&self) -> Vec<(String, String)> {
        let path = |path: &Path| path.to_string_lossy().into_owned();
        let mut variables = vec![("CONSUL_HTTP_ADDR", self.address.to_string())];
        let optional = [
            ("CONSUL_NAMESPACE", self.namespace.clone()),
            ("CONSUL_PARTITION", self.partition.clone()),
            ("CONSUL_CACERT", self.tls.ca_file.as_deref().map(path)),
            ("CONSUL_CAPATH", self.tls.ca_path.as_deref().map(path)),
            (
                "CONSUL_CLIENT_CERT",
                self.tls.client.as_ref().map(|(file, _)| path(file)),
            ),
            (
                "CONSUL_CLIENT_KEY",
                self.tls.client.as_ref().map(|(_, file)| path(file)),
            ),
            ("CONSUL_TLS_SERVER_NAME", self.tls.server_name.clone()),
        ];
        variables.extend(
            optional
                .into_iter()
                .filter_map(|(name, value)| Some((name, value?))),
        );
        if let TokenSource::File(file) = &self.token {
            variables.push(("CONSUL_HTTP_TOKEN_FILE", path(file)));
        }
        variables
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect()
    }

    /// The token, when it was given by value and not by a file.
    pub fn given_token(&self) -> Option<Token> {
        match &self.token {
            TokenSource::Given(token) => Some(token.clone()),
            TokenSource::None | TokenSource::File(_) => None,
        }
    }

    /// For tests and programs that have a plain HTTP address and at most a token.
    ///
    /// # Errors
    /// As [`ConsulSettings::read`].
    pub fn plain(address: &str, token: Option<Token>) -> Result<Self, Vec<String>> {
        let args = ConsulArgs {
            consul_addr: Some(address.to_owned()),
            ..ConsulArgs::default()
        };
        let mut settings = Self::read(args, ConsulFile::default(), |_| None)?;
        if let Some(token) = token {
            settings.token = TokenSource::Given(token);
        }
        Ok(settings)
    }
}

/// As Go's `strconv.ParseBool`, which the consul program asks.
fn flag(name: &str, text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(format!("{name} {text:?}: wanted true or false")),
    }
}

fn parse_address(text: &str, ssl: bool) -> Result<Address, String> {
    let fault = |why: &str| {
        format!(
            "consul-addr {text:?}: {why}; wanted host:port, http://host:port, https://host:port or unix:///path"
        )
    };
    if let Some(path) = text.strip_prefix("unix://") {
        return match path {
            path if !path.starts_with('/') => Err(fault("the path of the socket is not absolute")),
            path if path.len() > SUN_PATH_MAX => Err(fault("the path is too long for a socket")),
            path => Ok(Address::Unix(path.into())),
        };
    }
    let (bare, address) = match text.split_once("://") {
        Some(("http" | "https", _)) => (false, text.to_owned()),
        Some(_) => return Err(fault("the scheme is not known")),
        None => (true, format!("http://{text}")),
    };
    let mut url = Url::parse(&address).map_err(|error| fault(&error.to_string()))?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err(
            "consul-addr: a user name or password in it; wanted a token by CONSUL_HTTP_TOKEN_FILE".into(),
        );
    }
    if url.path() != "/" || url.query().is_some() || url.fragment().is_some() {
        return Err(fault("there is something after the port"));
    }
    // Url leaves out a port that is the scheme's own.
    if bare && url.port().is_none() && !text.ends_with(":80") {
        return Err(fault("there is no port"));
    }
    // As the consul program: TLS that was asked for is not taken back by an address.
    if ssl && url.scheme() == "http" {
        let port = url.port_or_known_default();
        if url.set_scheme("https").is_err() || url.set_port(port).is_err() {
            return Err(fault("it cannot be made https"));
        }
    }
    Ok(Address::Http(url))
}

fn scope(name: &str, value: &str) -> Result<(), String> {
    let good = |b: u8| b.is_ascii_alphanumeric() || b"-_".contains(&b);
    if (1..=SCOPE_MAX).contains(&value.len()) && value.bytes().all(good) {
        return Ok(());
    }
    Err(format!(
        "{name} {value:?}: wanted 1 to {SCOPE_MAX} letters, digits, - and _"
    ))
}

/// An address in its place could not be told from the one to connect to.
fn check_server_name(name: &str) -> Result<(), String> {
    let good = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
    if !name.is_empty() && name.bytes().all(good) && name.parse::<IpAddr>().is_err() {
        return Ok(());
    }
    Err(format!(
        "consul-tls-server-name {name:?}: wanted a DNS name such as server.dc1.consul"
    ))
}

/// Reads a token file.
pub(super) fn read_token(path: &Path) -> Result<Token, String> {
    let name = format!("consul-token-file {}", path.display());
    let text = tls::read_file(path, TOKEN_MAX as u64).map_err(|error| format!("{name}: {error}"))?;
    let text = String::from_utf8(text).map_err(|_| format!("{name}: it is no text"))?;
    check_token(&name, text.trim())
}

fn check_token(name: &str, token: &str) -> Result<Token, String> {
    if (1..=TOKEN_MAX).contains(&token.len()) && token.bytes().all(|b| b.is_ascii_graphic()) {
        return Ok(Token::new(token));
    }
    Err(format!(
        "{name}: it holds no token of 1 to {TOKEN_MAX} visible characters"
    ))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn read_with(args: ConsulArgs, file: &str, env: &[(&str, &str)]) -> Result<ConsulSettings, Vec<String>> {
        let file = toml::from_str(file).unwrap();
        let env: Vec<_> = env
            .iter()
            .map(|(name, value)| (name.to_string(), value.to_string()))
            .collect();
        ConsulSettings::read(args, file, move |wanted| {
            let found = env.iter().find(|(name, _)| name == wanted);
            found.map(|(_, value)| OsString::from(value))
        })
    }

    fn at(address: &str, env: &[(&str, &str)]) -> Result<String, Vec<String>> {
        let args = ConsulArgs {
            consul_addr: Some(address.to_owned()),
            ..ConsulArgs::default()
        };
        read_with(args, "", env).map(|settings| settings.address.to_string())
    }

    #[test]
    fn addresses_are_those_of_the_consul_program() {
        for (text, env, wanted) in [
            ("127.0.0.1:8500", None, "http://127.0.0.1:8500"),
            ("consul.lan:8500", None, "http://consul.lan:8500"),
            ("[::1]:8500", None, "http://[::1]:8500"),
            ("http://h:1", None, "http://h:1"),
            ("http://h", None, "http://h"),
            ("https://h:8501", None, "https://h:8501"),
            ("https://h", None, "https://h"),
            ("h:8501", Some("true"), "https://h:8501"),
            ("http://h:8501", Some("1"), "https://h:8501"),
            ("http://h:8501", Some("false"), "http://h:8501"),
            ("unix:///run/consul.sock", None, "unix:///run/consul.sock"),
            ("unix:///run/consul.sock", Some("true"), "unix:///run/consul.sock"),
        ] {
            let env: Vec<_> = env.iter().map(|ssl| ("CONSUL_HTTP_SSL", *ssl)).collect();
            assert_eq!(at(text, &env).as_deref(), Ok(wanted), "{text}");
        }
        let long = format!("unix:///{}", "x".repeat(SUN_PATH_MAX));
        for bad in [
            "",
            "h",
            "h:99999",
            "ftp://h:1",
            "http://h:1/prefix",
            "http://h:1?x",
            "http://u:p@h:1",
            "unix://run/consul.sock",
            &long,
        ] {
            let faults = at(bad, &[]).unwrap_err().join("\n");
            assert!(
                faults.contains("wanted") && !faults.contains("u:p"),
                "{bad}: {faults}"
            );
        }
    }

    #[test]
    fn options_come_before_the_environment_and_that_before_the_file() {
        let file = "addr = \"file:1\"\nnamespace = \"file\"\npartition = \"file\"\ndatacenter = \"file\"\n";
        let env = [
            ("CONSUL_HTTP_ADDR", "env:1"),
            ("CONSUL_NAMESPACE", "env"),
            ("CONSUL_PARTITION", ""),
        ];
        let args = ConsulArgs {
            consul_addr: Some("option:1".into()),
            ..ConsulArgs::default()
        };
        let settings = read_with(args, file, &env).unwrap();
        assert_eq!(settings.address.to_string(), "http://option:1");
        assert_eq!(settings.namespace.as_deref(), Some("env"));
        assert_eq!(
            settings.partition.as_deref(),
            Some("file"),
            "an empty variable is none"
        );
        assert_eq!(settings.datacenter.as_deref(), Some("file"));
        let settings = read_with(ConsulArgs::default(), file, &env).unwrap();
        assert_eq!(settings.address.to_string(), "http://env:1");
        let settings = read_with(ConsulArgs::default(), "", &[]).unwrap();
        assert_eq!(settings.address.to_string(), "http://127.0.0.1:8500");
        assert!(matches!(settings.token, TokenSource::None));
        assert!(
            toml::from_str::<ConsulFile>("token = \"x\"\n").is_err(),
            "no token lies in the file"
        );
    }

    #[test]
    fn tokens_come_from_a_file_or_the_environment() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("token");
        std::fs::write(&path, " in-file\n").unwrap();
        let in_file = format!("token_file = {path:?}\n");
        let given = [("CONSUL_HTTP_TOKEN", "in-env")];
        let by_file = [
            ("CONSUL_HTTP_TOKEN", "in-env"),
            ("CONSUL_HTTP_TOKEN_FILE", path.to_str().unwrap()),
        ];
        for (file, env, wanted) in [
            ("", &given[..], "in-env"),
            (in_file.as_str(), &[], "in-file"),
            (in_file.as_str(), &given, "in-env"),
            ("", &by_file, "in-file"),
        ] {
            let settings = read_with(ConsulArgs::default(), file, env).unwrap();
            let token = match settings.token {
                TokenSource::Given(token) => token,
                TokenSource::File(path) => read_token(&path).unwrap(),
                TokenSource::None => panic!("no token"),
            };
            assert_eq!(token.expose(), wanted);
        }
    }

    #[test]
    fn every_bad_value_is_told_at_once_and_no_token_shown() {
        let temp = tempfile::tempdir().unwrap();
        let empty = temp.path().join("empty");
        std::fs::write(&empty, "\n").unwrap();
        let args = ConsulArgs {
            consul_addr: Some("https://h:1".into()),
            consul_token_file: Some(empty.clone()),
            consul_ca_file: Some("/no/such/ca.pem".into()),
            consul_client_key: Some("/no/such/key.pem".into()),
            consul_tls_server_name: Some("127.0.0.1".into()),
            consul_namespace: Some("a/b".into()),
            consul_partition: Some("ä".into()),
            consul_datacenter: Some(String::new()),
            ..ConsulArgs::default()
        };
        let env = [("CONSUL_HTTP_SSL", "maybe"), ("CONSUL_HTTP_SSL_VERIFY", "false")];
        let faults = read_with(args, "", &env).unwrap_err();
        for seen in [
            empty.to_str().unwrap(),
            "/no/such/ca.pem",
            "without its certificate",
            "consul-tls-server-name",
            "consul-namespace",
            "consul-partition",
            "consul-datacenter",
            "CONSUL_HTTP_SSL \"maybe\"",
            "verification cannot be off",
        ] {
            assert!(
                faults.iter().any(|fault| fault.contains(seen)),
                "{seen} not in {faults:?}"
            );
        }
        assert_eq!(faults.len(), 9, "{faults:?}");
        let secret = [("CONSUL_HTTP_TOKEN", "s3cret s3cret")];
        let faults = read_with(ConsulArgs::default(), "", &secret)
            .unwrap_err()
            .join("\n");
        assert!(
            faults.contains("CONSUL_HTTP_TOKEN") && !faults.contains("s3cret"),
            "{faults}"
        );
    }

    #[test]
    fn verification_may_be_asked_for() {
        assert!(read_with(ConsulArgs::default(), "", &[("CONSUL_HTTP_SSL_VERIFY", "true")]).is_ok());
    }

    #[test]
    fn addresses_that_are_open_to_others() {
        for (address, open) in [
            ("http://127.0.0.1:1", false),
            ("http://[::1]:1", false),
            ("http://localhost:1", false),
            ("unix:///s", false),
            ("http://10.0.0.1:1", true),
            ("http://localhost.example:1", true),
        ] {
            assert_eq!(
                parse_address(address, false).unwrap().is_open(),
                open,
                "{address}"
            );
        }
        assert!(!parse_address("10.0.0.1:1", true).unwrap().is_open());
    }
}
