//! Names that connections hold: how many each user has, and those of tools, which the mesh is not told.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use meshx_dist::epmd::Node;

use super::{NAMES_MAX, NAMES_PER_USER_MAX};
use crate::proxy::cause::{Cause, Refusal};

/// Clones share one table.
#[derive(Debug, Clone, Default)]
pub(super) struct Names {
    // Held for a look-up or a change, never across an await.
    table: Arc<Mutex<Table>>,
}

#[derive(Debug, Default)]
struct Table {
    held: usize,
    by_uid: HashMap<u32, usize>,
    tools: BTreeMap<String, Tool>,
}

/// A tool's name, as it was registered.
#[derive(Debug, Clone)]
pub(super) struct Tool {
    pub(super) uid: u32,
    pub(super) node: Node,
}

/// A name that is held until this is dropped.
#[derive(Debug)]
pub(super) struct Place {
    names: Names,
    uid: u32,
    tool: Option<String>,
}

impl Names {
    /// A place for one more name of this user.
    pub(super) fn enter(&self, uid: u32) -> Result<Place, Refusal> {
        let mut table = self.lock();
        if table.held >= NAMES_MAX {
            return Err(Cause::Limit.because(format!(
                "{NAMES_MAX} names are registered, more are not taken (NAMES_MAX)"
            )));
        }
        let own = rustix::process::geteuid().as_raw();
        let of_user = table.by_uid.entry(uid).or_default();
        if uid != own && *of_user >= NAMES_PER_USER_MAX {
            return Err(Cause::Limit.because(format!(
                "uid {uid} has {NAMES_PER_USER_MAX} names registered, more are not taken (NAMES_PER_USER_MAX)"
            )));
        }
        *of_user += 1;
        table.held += 1;
        Ok(Place {
            names: self.clone(),
            uid,
            tool: None,
        })
    }

    pub(super) fn tool(&self, name: &str) -> Option<Tool> {
        self.lock().tools.get(name).cloned()
    }

    /// Names and ports of all tools.
    pub(super) fn tools(&self) -> Vec<(String, u16)> {
        let table = self.lock();
        let tools = table.tools.iter();
        tools.map(|(name, tool)| (name.clone(), tool.node.port)).collect()
    }

    /// How many names are held.
    pub(super) fn len(&self) -> usize {
        self.lock().held
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // Nothing that can panic runs under the lock, so what it holds is whole.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Whose it is.
    pub(super) fn uid(&self) -> u32 {
        self.uid
    }

    /// The place is that of a tool of this name.
    pub(super) fn hold_tool(&mut self, name: &str, node: Node) -> Result<(), Refusal> {
        let mut table = self.names.lock();
        if table.tools.contains_key(name) {
            return Err(Cause::NameTaken.because(format!("{name} is registered")));
        }
        let tool = Tool { uid: self.uid, node };
        table.tools.insert(name.to_owned(), tool);
        self.tool = Some(name.to_owned());
        Ok(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut table = self.names.lock();
        table.held = table.held.saturating_sub(1);
        if let Some(of_user) = table.by_uid.get_mut(&self.uid) {
            *of_user = of_user.saturating_sub(1);
            if *of_user == 0 {
                table.by_uid.remove(&self.uid);
            }
        }
        if let Some(tool) = &self.tool {
            table.tools.remove(tool);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use meshx_dist::epmd::NodeType;

    use super::*;

    #[test]
    fn places_are_limited_and_given_back() {
        let names = Names::default();
        let stranger = rustix::process::geteuid().as_raw() + 1;
        let mut places: Vec<_> = (0..NAMES_PER_USER_MAX)
            .map(|_| names.enter(stranger).unwrap())
            .collect();
        let refusal = names.enter(stranger).unwrap_err();
        assert!(refusal.text.contains("NAMES_PER_USER_MAX"), "{refusal}");
        places.extend((places.len()..NAMES_MAX).map(|_| names.enter(stranger - 1).unwrap()));
        let refusal = names.enter(stranger + 1).unwrap_err();
        assert!(refusal.text.contains("(NAMES_MAX)"), "{refusal}");
        places.pop();
        assert!(names.enter(stranger - 1).is_ok());
        drop(places);
        assert_eq!((names.len(), names.lock().by_uid.len()), (0, 0));
    }

    #[test]
    fn a_tool_has_its_name_alone_and_for_as_long_as_its_place() {
        let names = Names::default();
        let node = Node::new("rpc-1-shop", 7, NodeType::Hidden);
        let mut place = names.enter(1).unwrap();
        place.hold_tool("rpc-1-shop", node.clone()).unwrap();
        let taken = names.enter(2).unwrap().hold_tool("rpc-1-shop", node.clone());
        assert_eq!(taken.unwrap_err().cause, Cause::NameTaken);
        assert_eq!(names.tool("rpc-1-shop").unwrap().uid, 1);
        assert_eq!(names.tools(), [("rpc-1-shop".to_owned(), 7)]);
        drop(place);
        assert!(names.tool("rpc-1-shop").is_none());
    }
}
