//! Where the emulator finds meshx's modules: it picks its carrier while it boots, before mix has set any
//! code path.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::cli::Failure;

/// The module that `-proto_dist meshx` loads.
const CARRIER: &str = "meshx_dist.beam";
const VARIABLE: &str = "MESHX_EBIN";

/// The absolute directory that holds the carrier; it is compiled when it is not there yet and a mix
/// project is.
pub(super) fn find(explicit: Option<&Path>) -> Result<PathBuf, Failure> {
    let here = env::current_dir().map_err(|error| Failure::new(74, format!("current directory: {error}")))?;
    let variable = env::var_os(VARIABLE)
        .filter(|value| !value.is_empty())
        .map(PathBuf::from);
    for (source, dir) in [("--ebin", explicit.map(Path::to_path_buf)), (VARIABLE, variable)] {
        if let Some(dir) = dir {
            let dir = here.join(dir);
            return if has_carrier(&dir) {
                Ok(dir)
            } else {
                Err(Failure::usage(format!(
                    "{source} is {}, which has no {CARRIER}",
                    dir.display()
                )))
            };
        }
    }
    let project = Project::around(&here);
    if let Some(found) = project.as_ref().and_then(Project::compiled) {
        return Ok(found);
    }
    let Some(project) = project else {
        return Err(Failure::new(
            69,
            format!(
                "no {CARRIER} and no mix.exs in {}; go to a mix project that depends on meshx, or say where \
                 meshx is compiled with --ebin DIR or ${VARIABLE}",
                here.display()
            ),
        ));
    };
    project.compile()?;
    project.compiled().ok_or_else(|| {
        Failure::new(
            69,
            format!(
                "{} compiled but has no {CARRIER}; add meshx to the deps in its mix.exs, or say where meshx \
                 is compiled with --ebin DIR or ${VARIABLE}",
                project.dir.display()
            ),
        )
    })
}

fn has_carrier(dir: &Path) -> bool {
    dir.join(CARRIER).is_file()
}

/// A mix project: the current directory, or meshx itself below it.
struct Project {
    dir: PathBuf,
    is_meshx: bool,
}

impl Project {
    fn around(here: &Path) -> Option<Self> {
        [here.to_path_buf(), here.join("mix_project")]
            .into_iter()
            .find_map(|dir| {
                let mix_exs = fs::read_to_string(dir.join("mix.exs")).ok()?;
                let is_meshx = mix_exs.contains("app: :meshx,");
                (is_meshx || dir == here).then_some(Self { dir, is_meshx })
            })
    }

    /// The ebin directory in mix's build directory, when the carrier is in it.
    fn compiled(&self) -> Option<PathBuf> {
        let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty());
        let environment = set("MIX_ENV").unwrap_or_else(|| "dev".into());
        let build = set("MIX_BUILD_PATH").map(PathBuf::from).unwrap_or_else(|| {
            PathBuf::from(set("MIX_BUILD_ROOT").unwrap_or_else(|| "_build".into())).join(environment)
        });
        let ebin = self.dir.join(build).join("lib/meshx/ebin");
        has_carrier(&ebin).then_some(ebin)
    }

    fn compile(&self) -> Result<(), Failure> {
        eprintln!(
            "meshx run: meshx is not compiled in {}, compiling it",
            self.dir.display()
        );
        if self.is_meshx {
            return self.mix(&["compile"]);
        }
        if self.deps_are_missing()? {
            self.mix(&["deps.get"])?;
        }
        self.mix(&["deps.compile", "meshx"])
    }

    /// `mix deps` tells for each dependency what is to be done about it.
    fn deps_are_missing(&self) -> Result<bool, Failure> {
        let output = Command::new("mix")
            .arg("deps")
            .current_dir(&self.dir)
            .stdin(Stdio::null())
            .output()
            .map_err(|error| Failure::new(69, format!("cannot execute mix: {error}")))?;
        Ok(!output.status.success() || String::from_utf8_lossy(&output.stdout).contains("mix deps.get"))
    }

    /// Runs mix with its output on stderr: stdout belongs to the command that follows.
    fn mix(&self, arguments: &[&str]) -> Result<(), Failure> {
        eprintln!("meshx run: mix {}", arguments.join(" "));
        let status = Command::new("mix")
            .args(arguments)
            .current_dir(&self.dir)
            .stdout(Stdio::from(std::io::stderr()))
            .status()
            .map_err(|error| Failure::new(69, format!("cannot execute mix: {error}")))?;
        if status.success() {
            return Ok(());
        }
        Err(Failure::new(
            69,
            format!(
                "`mix {}` failed in {} ({status})",
                arguments.join(" "),
                self.dir.display()
            ),
        ))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    #[test]
    fn an_explicit_directory_must_hold_the_carrier() {
        let temp = tempfile::tempdir().unwrap();
        assert!(
            find(Some(temp.path()))
                .unwrap_err()
                .to_string()
                .contains("--ebin is /")
        );
        fs::write(temp.path().join(CARRIER), "").unwrap();
        assert_eq!(find(Some(temp.path())).unwrap(), temp.path());
    }

    #[test]
    fn the_project_is_here_or_meshx_itself_below() {
        let temp = tempfile::tempdir().unwrap();
        assert!(Project::around(temp.path()).is_none());
        let below = temp.path().join("mix_project");
        fs::create_dir(&below).unwrap();
        fs::write(below.join("mix.exs"), "[app: :other, deps: []]").unwrap();
        assert!(
            Project::around(temp.path()).is_none(),
            "somebody else's mix_project"
        );
        fs::write(below.join("mix.exs"), "[app: :meshx, deps: []]").unwrap();
        assert!(Project::around(temp.path()).is_some_and(|project| project.is_meshx && project.dir == below));
        fs::write(temp.path().join("mix.exs"), "[app: :demo, deps: []]").unwrap();
        let project = Project::around(temp.path()).unwrap();
        assert!(!project.is_meshx && project.dir == temp.path());
        assert!(project.compiled().is_none());
    }
}
