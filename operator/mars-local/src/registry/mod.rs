//! The kinds this API serves, and how each behaves.
//!
//! Invariant: a kind is found only under a group, version and plural that is served; all versions of one kind share one
//! storage name, so an object exists once.

mod builtin;
mod crd;

use crate::error::Subject;
use crate::jsonpath::JsonPath;
use crate::schema::Schema;
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;

pub(crate) use builtin::core_event_field;
pub use builtin::kinds as builtin_kinds;
pub use crd::{CRD_STORAGE, CrdError, kinds_of as kinds_of_crd};

/// One printer column.
#[derive(Clone, Debug)]
pub struct Column {
    /// Heading.
    pub name: String,
    /// `string`, `integer`, `number`, `boolean` or `date`.
    pub ty: String,
    /// `name` for the first column.
    pub format: String,
    /// Text for people.
    pub description: String,
    /// 0 = always shown, else only with `-o wide`.
    pub priority: i64,
    /// How the cell is computed.
    pub cell: Cell,
}

/// How a cell is computed.
#[derive(Clone, Debug)]
pub enum Cell {
    /// By a path of the CRD.
    Path(JsonPath),
    /// By code, for built-in kinds.
    Code(fn(&Value) -> Value),
}

/// How objects look under this version, compared with how they are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    /// As stored.
    Same,
    /// `events.k8s.io/v1` names of what is stored in the names of core `v1`.
    NewEvents,
}

/// A served kind.
#[derive(Clone, Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "independent properties of a kind, as discovery lists them"
)]
pub struct Kind {
    /// API group, empty for core.
    pub group: String,
    /// Version, e.g. `v1alpha1`.
    pub version: String,
    /// Kind, e.g. `MarsResource`.
    pub kind: String,
    /// Plural name in paths.
    pub plural: String,
    /// Singular name.
    pub singular: String,
    /// Short names.
    pub short_names: Vec<String>,
    /// Categories.
    pub categories: Vec<String>,
    /// Whether objects live in namespaces.
    pub namespaced: bool,
    /// Storage name, `<group or core>/<plural>`.
    pub storage: Arc<str>,
    /// Parsed schema of whole objects, metadata included.
    pub schema: Arc<Schema>,
    /// The same schema as published in OpenAPI.
    pub openapi: Arc<Value>,
    /// Whether `/status` is a subresource.
    pub has_status: bool,
    /// Whether `metadata.generation` counts changes of anything but metadata and status.
    pub has_generation: bool,
    /// Whether an update without resourceVersion is allowed.
    pub unconditional_update: bool,
    /// Whether a PUT may create.
    pub create_on_update: bool,
    /// Whether the name must be a DNS label (else a subdomain).
    pub name_is_label: bool,
    /// Whether the kind comes from a CRD.
    pub custom: bool,
    /// Printer columns, the name first.
    pub columns: Vec<Column>,
    /// Fields that fieldSelector may name besides metadata.name and metadata.namespace.
    pub selectable: Vec<String>,
    /// How objects look.
    pub view: View,
}

impl Kind {
    /// `group/version`, or the version alone for core.
    #[must_use]
    pub fn api_version(&self) -> String {
        if self.group.is_empty() {
            self.version.clone()
        } else {
            format!("{}/{}", self.group, self.version)
        }
    }

    /// What errors about an object of this kind name.
    #[must_use]
    pub fn subject(&self, name: &str) -> Subject {
        Subject {
            group: self.group.clone(),
            resource: self.plural.clone(),
            name: name.into(),
        }
    }

    /// Kind of a list.
    #[must_use]
    pub fn list_kind(&self) -> String {
        format!("{}List", self.kind)
    }

    /// A stored object as this version shows it.
    #[must_use]
    pub fn show(&self, stored: &Value) -> Value {
        let mut object = stored.clone();
        if self.view == View::NewEvents {
            builtin::rename_event(&mut object, false);
        }
        let fields = crate::meta::object_mut(&mut object);
        fields.insert("apiVersion".into(), self.api_version().into());
        fields.insert("kind".into(), self.kind.clone().into());
        object
    }

    /// An object of this version as it is stored.
    pub fn store(&self, object: &mut Value) {
        if self.view == View::NewEvents {
            builtin::rename_event(object, true);
            crate::meta::object_mut(object).insert("apiVersion".into(), "v1".into());
        }
    }

    /// Verbs of the resource itself.
    #[must_use]
    pub fn verbs(&self) -> Vec<&'static str> {
        vec![
            "create",
            "delete",
            "deletecollection",
            "get",
            "list",
            "patch",
            "update",
            "watch",
        ]
    }
}

type Address = (String, String, String);

/// All served kinds.
#[derive(Clone, Debug, Default)]
pub struct Registry {
    kinds: BTreeMap<Address, Arc<Kind>>,
}

impl Registry {
    /// A registry with the built-in kinds.
    #[must_use]
    pub fn new() -> Self {
        let mut registry = Self::default();
        for kind in builtin::kinds() {
            registry.add(kind);
        }
        registry
    }

    /// Serves a kind; one at the same address is replaced.
    pub fn add(&mut self, kind: Kind) {
        let address = (kind.group.clone(), kind.version.clone(), kind.plural.clone());
        self.kinds.insert(address, Arc::new(kind));
    }

    /// Stops serving all versions of a custom resource.
    pub fn remove(&mut self, group: &str, plural: &str) {
        self.kinds.retain(|(g, _, p), _| g != group || p != plural);
    }

    /// The kind at a path.
    #[must_use]
    pub fn find(&self, group: &str, version: &str, plural: &str) -> Option<Arc<Kind>> {
        self.kinds
            .get(&(group.to_owned(), version.to_owned(), plural.to_owned()))
            .cloned()
    }

    /// A kind by its storage name (any version).
    #[must_use]
    pub fn by_storage(&self, storage: &str) -> Option<Arc<Kind>> {
        self.kinds
            .values()
            .find(|kind| *kind.storage == *storage && kind.view == View::Same)
            .cloned()
    }

    /// A kind by apiVersion and kind name, for owner references.
    #[must_use]
    pub fn by_kind(&self, api_version: &str, name: &str) -> Option<Arc<Kind>> {
        self.kinds
            .values()
            .find(|kind| kind.kind == name && kind.api_version() == api_version)
            .cloned()
    }

    /// All kinds, ordered by group, version and plural.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Kind>> {
        self.kinds.values()
    }

    /// Groups (core excluded) with their versions.
    #[must_use]
    pub fn groups(&self) -> BTreeMap<&str, Vec<&str>> {
        let mut groups: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (group, version, _) in self.kinds.keys().filter(|(group, ..)| !group.is_empty()) {
            let versions = groups.entry(group).or_default();
            if !versions.contains(&version.as_str()) {
                versions.push(version);
            }
        }
        groups
    }

    /// Kinds of one group and version.
    #[must_use]
    pub fn resources(&self, group: &str, version: &str) -> Vec<Arc<Kind>> {
        let here = |kind: &&Arc<Kind>| kind.group == group && kind.version == version;
        self.kinds.values().filter(here).cloned().collect()
    }
}
