//! The agent's options in a file.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use crate::mesh::consul::ConsulFile;

/// Largest configuration file that is read.
const CONFIG_FILE_MAX: u64 = 1 << 20;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileSettings {
    pub(super) mesh: Option<String>,
    pub(super) mesh_dir: Option<PathBuf>,
    pub(super) dir: Option<PathBuf>,
    #[serde(default)]
    pub(super) host: Vec<String>,
    pub(super) bind: Option<String>,
    pub(super) advertise: Option<String>,
    pub(super) http: Option<String>,
    #[serde(default)]
    pub(super) allow_register: Vec<String>,
    pub(super) socket_mode: Option<String>,
    pub(super) socket_group: Option<String>,
    pub(super) log_format: Option<String>,
    pub(super) node_service: Option<String>,
    pub(super) data_plane: Option<String>,
    pub(super) instance_ports: Option<String>,
    pub(super) balance: Option<String>,
    pub(super) busy_poll: Option<u64>,
    pub(super) consul_program: Option<PathBuf>,
    pub(super) envoy_program: Option<PathBuf>,
    #[serde(default)]
    pub(super) allow_unverified_peers: bool,
    pub(super) drain_time: Option<u64>,
    pub(super) idle_exit: Option<u64>,
    pub(super) session_service: Option<String>,
    #[serde(default)]
    pub(super) epmd: Vec<String>,
    #[serde(default)]
    pub(super) epmd_nodes: Vec<String>,
    #[serde(default)]
    pub(super) epmd_tools: Vec<String>,
    pub(super) epmd_host: Option<String>,
    #[serde(default)]
    pub(super) consul: ConsulFile,
}

pub(super) fn read_file(path: &Path) -> Result<FileSettings, String> {
    let name = path.display();
    let size = fs::metadata(path)
        .map_err(|error| format!("config {name}: {error}"))?
        .len();
    if size > CONFIG_FILE_MAX {
        return Err(format!(
            "config {name}: {size} bytes, at most {CONFIG_FILE_MAX} are read"
        ));
    }
    let text = fs::read_to_string(path).map_err(|error| format!("config {name}: {error}"))?;
    toml::from_str(&text).map_err(|error| format!("config {name}: {error}"))
}
